"""The same blocks of a stream of raw documents, made as they are read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hf_pretrain_ext.metadata.documents import (
    Overflow,
    check_head,
    checked_drop,
    checked_overflow,
    checked_template,
    pieces_of,
)
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import IGNORED, check_sizes, checked_tokenizer, opening, text_encoder, text_ids
from hf_pretrain_ext.plan.counter import derive_key
from hf_pretrain_ext.streams import StreamError
from hf_pretrain_ext.values import check_flag, is_number, shown

__all__ = ["BlockStream"]

TOGETHER = 64
"""Documents that are tokenized at once."""


class BlockStream:
    """
    Blocks of the documents of a stream, as [`prepare`] makes them of a dataset: with metadata, or plain.

    A stream can be split in two, for a cooldown: which documents are plain follows from `seed` and from a document's
    text, so that two views never share one, and equal texts are on one side. Each view reads the whole stream.

    Args:
        stream (iterable): raw documents, one a row, starting anew at every `iter`.
        tokenizer, block_size, template, text_column, isolate, overflow, drop: those of [`prepare`].
        conditioned (`bool`, *optional*, defaults to `True`): with metadata, of the documents that are not plain; else
            without, of those that are.
        plain (`float`, *optional*, defaults to `0.0`): share of documents that are plain, in [0, 1].
        seed (`int`, *optional*, defaults to `0`): keys the split and `drop`.

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
        self.template = checked_template(template)
        self.block_size = block_size
        self.conditioned = check_flag("conditioned", conditioned)
        self.plain = float(plain)
        self.text_column = text_column
        self.isolate = check_flag("isolate", isolate)
        self.overflow = checked_overflow(overflow)
        self.drop = checked_drop(drop)
        self.seed = seed
        self.encoder, self.control = text_encoder(tokenizer)
        self.bos = opening(tokenizer, self.encoder)
        self.eos = tokenizer.eos_token_id
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        held: dict[int, tuple[list[int], list[int]]] = {}

        def lengths() -> Iterator[tuple[int, int]]:
            for number, (head, body) in enumerate(self._documents()):
                held.clear()  # of an earlier document nothing is left to place
                held[number] = head, body
                yield len(head), len(body)

        parts: list[tuple[list[int], list[int]]] = []
        current = blocks = 0
        for document, start, length, block in pieces_of(lengths(), self.block_size, self.overflow):
            if block != current:
                yield self._block(parts)
                parts, current, blocks = [], block, blocks + 1
            head, body = held[document]
            parts.append((head, body[start : start + length]))
        if parts:
            yield self._block(parts)
            blocks += 1
        raise StreamError(
            f"the stream ran dry after {blocks:,} {'conditioned' if self.conditioned else 'plain'} blocks, and no "
            "document is read twice. Pass a longer stream, or set a lower max_steps"
        )

    def _block(self, parts: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
        ids = [number for head, body in parts for number in (*head, *body)]
        labels = [label for head, body in parts for label in (*[IGNORED] * len(head), *body)]
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

    def _documents(self) -> Iterator[tuple[list[int], list[int]]]:
        """Head and body of each document of this view; the body of an empty one is empty."""
        rows = enumerate(_rows(self.stream))
        while chunk := list(itertools.islice(rows, TOGETHER)):
            kept = [(number, row, self._text(number, row)) for number, row in chunk]
            kept = [each for each in kept if self._is_ours(each[2])]
            if not kept:
                continue
            texts = text_ids(self.encoder, [text for _, _, text in kept], self.control)
            heads = self._heads(kept)
            for head, ids in zip(heads, texts, strict=True):
                yield [*self.bos, *head], [*ids, self.eos] if ids else []

    def _heads(self, kept: list[tuple[int, Mapping[str, Any], str]]) -> list[list[int]]:
        if not self.conditioned:
            return [[] for _ in kept]
        lines = []
        for number, row, text in kept:
            if absent := [name for name in self.template.roots if name not in row]:
                raise ValueError(
                    f"the template {shown(self.template.text)} takes the columns {self.template.roots}, but row "
                    f"{number} of the stream has no {absent}, only {list(row)}"
                )
            dropped = self.drop and self._uniform("metadata drop", text) < self.drop
            lines.append(None if dropped else self.template.render(row))
        distinct = list(dict.fromkeys(line for line in lines if line))
        known = dict(zip(distinct, text_ids(self.encoder, distinct, self.control), strict=True)) if distinct else {}
        heads = [known[line] if line else [] for line in lines]
        for (number, row, _), head in zip(kept, heads, strict=True):
            check_head(len(head), len(self.bos), self.block_size, f"row {number}", self.template, row)
        return heads

    def _text(self, number: int, row: Mapping[str, Any]) -> str:
        if self.text_column not in row:
            raise ValueError(
                f"text_column={shown(self.text_column)} is no column of row {number} of the stream, which has "
                f"{list(row)}. Name the one that holds the documents"
            )
        return str(row[self.text_column] or "")

    def _is_ours(self, text: str) -> bool:
        return (self._uniform("metadata cooldown", text) >= self.plain) == self.conditioned

    def _uniform(self, what: str, text: str) -> float:
        key = derive_key(self.seed, what).to_bytes(8, "little")
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") / 2**64


def _rows(stream: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(stream, "iter"):
        # Unlike the plain iteration of `datasets`, this does not split the shards over the workers of a DataLoader.
        return ({key: values[0] for key, values in batch.items()} for batch in stream.iter(batch_size=1))
    return iter(stream)
