"""The same blocks of a stream of raw documents, made as they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_pretrain_ext.metadata.control import ControlTokens, assemble, drop_key
from hf_pretrain_ext.metadata.layout import NONE, Overflow, Segments, pieces_of
from hf_pretrain_ext.metadata.source import check_head, checked_condition, checked_drop, checked_overflow
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import IGNORED, check_sizes, checked_tokenizer, opening, text_encoder, text_ids
from hf_pretrain_ext.plan.counter import derive_key
from hf_pretrain_ext.streams import StreamError
from hf_pretrain_ext.values import check_flag, is_number, shown

__all__ = ["BlockStream", "StreamReport"]

TOGETHER = 64
"""Documents that are tokenized at once."""

MEASURED = 64
"""Blocks that a report of a stream is about."""

_TOKENS = ("kept", "bos_tokens", "metadata_tokens", "control_tokens")


@dataclass(frozen=True)
class StreamReport:
    """
    Where the tokens of the first blocks of a stream went: blocks · block_size = kept + BOS + metadata + control +
    padded. The names are those of [`MetadataReport`]; documents are those that begin in these blocks.
    """

    documents: int
    conditioned_documents: int
    missing: int
    without_metadata: int
    bos_tokens: int
    metadata_tokens: int
    control_tokens: int
    segments: int
    without_control: int
    missing_scores: int
    pieces: int
    blocks: int
    block_size: int
    kept: int
    dropped: int
    padded: int


class _Document(NamedTuple):
    head: list[int]
    body: list[int]
    segments: Segments | None
    facts: dict[str, int]


class BlockStream:
    """
    Blocks of the documents of a stream, as [`prepare`] makes them of a dataset: with metadata, or plain.

    A stream can be split in two, for a cooldown: which documents are plain follows from `seed` and from a document's
    text, so that two views never share one, and equal texts are on one side. Each view reads the whole stream.

    Args:
        stream (iterable): raw documents, one a row, starting anew at every `iter`.
        tokenizer, block_size, template, control, text_column, isolate, overflow, drop: those of [`prepare`].
        conditioned (`bool`, *optional*, defaults to `True`): with metadata and control tokens, of the documents that
            are not plain; else without, of those that are.
        plain (`float`, *optional*, defaults to `0.0`): share of documents that are plain, in [0, 1].
        seed (`int`, *optional*, defaults to `0`): keys the split and both `drop`.

    Raises:
        `ValueError`: a value out of its range, or, while it is read, a document without the columns needed.
        [`StreamError`]: while it is read, at the end of the stream: there is no second pass.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> stream = BlockStream([{"text": "abcd", "at": "x"}], tokenizer, 8, "{at}:")
    >>> block = next(iter(stream))
    >>> tokenizer.decode(block["input_ids"][:6]), block["position_ids"], block["seq_lengths"]
    ('x:abcd', [0, 1, 2, 3, 4, 5, 6, 0], [7, 1])
    """

    def __init__(
        self,
        stream: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        block_size: int,
        template: Template | str | None = None,
        *,
        control: ControlTokens | None = None,
        conditioned: bool = True,
        plain: float = 0.0,
        text_column: str = "text",
        isolate: bool = True,
        overflow: Overflow = "split",
        drop: float = 0.0,
        seed: int = 0,
    ):
        tokenizer = checked_tokenizer(tokenizer)
        check_sizes(block_size, seed, None)
        if not is_number(plain) or not 0 <= plain <= 1:
            raise ValueError(f"plain must be a share of the documents, from 0 to 1, got {shown(plain)}")
        self.stream = stream
        self.template, self.tokens = checked_condition(template, control)
        self.block_size = block_size
        self.conditioned = check_flag("conditioned", conditioned)
        self.plain = float(plain)
        self.text_column = text_column
        self.isolate = check_flag("isolate", isolate)
        self.overflow = checked_overflow(overflow)
        self.drop = checked_drop(drop)
        self.seed = seed
        # First of all: what the tokenizer has decides what is text.
        self.ids = self.tokens.add_to(tokenizer) if self.conditioned and self.tokens is not None else []
        self.encoder, self.control = text_encoder(tokenizer)
        self.bos = opening(tokenizer, self.encoder)
        self.eos = tokenizer.eos_token_id
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return self._blocks(None)

    def report(self, blocks: int = MEASURED) -> StreamReport:
        """Reads the stream's first blocks, and counts.

        Raises:
            `ValueError`: the stream does not fill one block.
        """
        counts: Counter[str] = Counter()
        made = self._blocks(counts)
        found = 0
        try:
            for _block in itertools.islice(made, blocks):
                found += 1
        except StreamError:
            if not found:
                raise
        padded = found * self.block_size - sum(counts[name] for name in _TOKENS)
        known = {field.name: counts[field.name] for field in dataclasses.fields(StreamReport)}
        return StreamReport(**{**known, "blocks": found, "block_size": self.block_size, "padded": padded})

    def _blocks(self, counts: Counter[str] | None) -> Iterator[dict[str, list[int]]]:
        """The blocks; what is in those handed out is counted in `counts`."""
        held: dict[int, _Document] = {}
        pending: Counter[str] = Counter()

        def lengths() -> Iterator[tuple[int, int, Segments | None]]:
            for number, document in enumerate(self._documents()):
                held.clear()  # of an earlier document nothing is left to place
                held[number] = document
                yield len(document.head), len(document.body), document.segments

        parts: list[tuple[list[int], list[int]]] = []
        current = blocks = 0
        for number, start, length, block, repeated in pieces_of(lengths(), self.block_size, self.overflow):
            if block != current:
                if counts is not None:
                    counts.update(pending)
                    pending.clear()
                yield self._block(parts)
                parts, current, blocks = [], block, blocks + 1
            document = held[number]
            head = document.head if repeated == NONE else [*document.head, self.ids[repeated]]
            parts.append((head, document.body[start : start + length]))
            if counts is not None:
                pending.update(self._counted(document, start, length, repeated))
        if parts:
            if counts is not None:
                counts.update(pending)
            yield self._block(parts)
            blocks += 1
        raise StreamError(
            f"the stream ran dry after {blocks:,} {'conditioned' if self.conditioned else 'plain'} blocks, and no "
            "document is read twice. Pass a longer stream, or set a lower max_steps"
        )

    def _counted(self, document: _Document, start: int, length: int, repeated: int) -> dict[str, int]:
        """What a piece of a document adds to the report; its first piece brings what is known of the whole."""
        facts = document.facts
        starts, tokens = document.segments or ((), ())
        inside = sum(start <= at < start + length and token != NONE for at, token in zip(starts, tokens, strict=True))
        found = {
            "pieces": 1,
            "bos_tokens": len(self.bos),
            "metadata_tokens": facts["metadata_tokens"],
            "control_tokens": inside + (repeated != NONE),
            "kept": length - inside,
        }
        if start:
            return found
        whole = {name: count for name, count in facts.items() if name != "metadata_tokens"}
        every = sum(token != NONE for token in tokens)
        left = (len(document.body) - every) - (length - inside) if self.overflow == "discard" else 0
        return {**found, **whole, "documents": 1, "dropped": left}

    def _block(self, parts: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
        ids = [number for head, body in parts for number in (*head, *body)]
        labels = [label for head, body in parts for label in (*[IGNORED] * len(head), *body)]
        if self.ids and self.tokens is not None and not self.tokens.loss:
            labels = [IGNORED if label in self.ids else label for label in labels]
        lengths = [len(head) + len(body) for head, body in parts]
        if not self.isolate:
            lengths = [len(ids)]
        padded = self.block_size - len(ids)
        lengths += [1] * padded
        labels += [IGNORED] * padded
        for at in itertools.accumulate(lengths[:-1], initial=0):
            labels[at] = IGNORED  # nothing predicts a first token
        return {
            "input_ids": ids + [self.padding] * padded,
            "labels": labels,
            "position_ids": [position for length in lengths for position in range(length)],
            "seq_lengths": lengths,
        }

    def _documents(self) -> Iterator[_Document]:
        """Head and body of each document of this view; the body of an empty one is empty."""
        rows = enumerate(_rows(self.stream))
        while chunk := list(itertools.islice(rows, TOGETHER)):
            kept = [(number, row, self._parts(number, row)) for number, row in chunk]
            kept = [each for each in kept if self._is_ours("".join(each[2]))]
            if not kept:
                continue
            heads = self._heads(kept)
            encoded = iter(text_ids(self.encoder, [part for _, _, parts in kept for part in parts], self.control))
            for (head, facts), (number, row, parts) in zip(heads, kept, strict=True):
                ids = [next(encoded) for _ in parts]
                yield self._marked(head, facts, number, row, "".join(parts), ids)

    def _marked(
        self,
        head: list[int],
        facts: dict[str, int],
        number: int,
        row: Mapping[str, Any],
        text: str,
        parts: list[list[int]],
    ) -> _Document:
        head = [*self.bos, *head]
        if self.tokens is None or not self.conditioned:
            body = [token for part in parts for token in part]
            return _Document(head, [*body, self.eos] if body else [], None, facts)
        chosen = self.tokens.choose(self.tokens.scores(row, len(parts), f"row {number}"))
        counters = np.arange(len(parts), dtype=np.uint64) + np.uint64(self._word("control drop", text))
        dropped = self.tokens.drops(drop_key(self.seed), counters)
        body, starts, tokens = assemble(parts, np.where(dropped, NONE, chosen).tolist(), self.ids)
        full = np.array([bool(part) for part in parts], dtype=bool)
        told = {
            "segments": int(full.sum()),
            "missing_scores": int((full & (chosen == NONE)).sum()),
            "without_control": int((full & dropped & (chosen != NONE)).sum()),
        }
        return _Document(head, [*body, self.eos] if body else [], (starts, tokens), {**facts, **told})

    def _heads(self, kept: list[tuple[int, Mapping[str, Any], list[str]]]) -> list[tuple[list[int], dict[str, int]]]:
        """The metadata of each document, and what to count of it."""
        bos, controls = len(self.bos), bool(self.ids)
        if not self.conditioned or self.template is None:
            check_head(0, bos, controls, self.block_size, "", None, {})
            return [([], {"metadata_tokens": 0}) for _ in kept]
        lines: list[str | None] = []
        facts: list[dict[str, int]] = []
        for number, row, parts in kept:
            roots = self.template.roots(row)
            if absent := [name for name in roots if name not in row]:
                raise ValueError(
                    f"the template {shown(self.template.text)} takes the columns {roots}, but row "
                    f"{number} of the stream has no {absent}, only {list(row)}"
                )
            dropped = bool(self.drop and self._uniform("metadata drop", "".join(parts)) < self.drop)
            values = {} if dropped else self.template.values(row)
            lines.append(None if dropped else self.template.fill(values, f"row {number}"))
            facts.append({"missing": int(None in values.values()), "without_metadata": int(dropped)})
        distinct = list(dict.fromkeys(line for line in lines if line))
        known = dict(zip(distinct, text_ids(self.encoder, distinct, self.control), strict=True)) if distinct else {}
        heads = [known[line] if line else [] for line in lines]
        for (number, row, _), head, fact in zip(kept, heads, facts, strict=True):
            check_head(len(head), bos, controls, self.block_size, f"row {number}", self.template, row)
            fact |= {"metadata_tokens": len(head), "conditioned_documents": int(bool(head))}
        return list(zip(heads, facts, strict=True))

    def _parts(self, number: int, row: Mapping[str, Any]) -> list[str]:
        """The text of a row; where control tokens stand before segments, those."""
        of_segments = self.tokens is not None and isinstance(self.tokens.segments, str)
        wanted = [] if of_segments else [self.text_column]
        if self.tokens is not None and (self.conditioned or of_segments):
            wanted += self.tokens.roots
        if absent := [name for name in wanted if name not in row]:
            given = f"text_column={shown(self.text_column)}" if absent == [self.text_column] else shown(absent)
            raise ValueError(
                f"{given} is no column of row {number} of the stream, which has {list(row)}. Name the one that holds "
                f"{'the documents' if absent == wanted[:1] else 'scores or segments, in ControlTokens'}"
            )
        if self.tokens is None or not (self.conditioned or of_segments):
            return [str(row[self.text_column] or "")]
        parts = self.tokens.split(row, self.text_column, f"row {number}")
        return parts if self.conditioned else ["".join(parts)]

    def _is_ours(self, text: str) -> bool:
        return (self._uniform("metadata cooldown", text) >= self.plain) == self.conditioned

    def _uniform(self, what: str, text: str) -> float:
        return self._word(what, text) / 2**64

    def _word(self, what: str, text: str) -> int:
        key = derive_key(self.seed, what).to_bytes(8, "little")
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little")


def _rows(stream: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(stream, "iter"):
        if getattr(stream, "_formatting", None) is not None:
            # Scores and metadata would be tensors. A stream with another format begins at epoch 0.
            epoch, stream = stream.epoch, stream.with_format(None)
            stream.set_epoch(epoch)
        # Unlike the plain iteration of `datasets`, this does not split the shards over the workers of a DataLoader.
        return ({key: values[0] for key, values in batch.items()} for batch in stream.iter(batch_size=1))
    return iter(stream)
