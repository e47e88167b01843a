"""Blocks of tokenized documents: what goes where, written by many processes, and where every token went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_pretrain_ext.metadata.layout import NONE, Overflow, Pieces, lay_out
from hf_pretrain_ext.metadata.marking import Marked
from hf_pretrain_ext.packing import (
    CHUNK,
    IGNORED,
    block_features,
    block_table,
    document_lengths,
    flat_values,
    list_lengths,
    rows_within,
)
from hf_pretrain_ext.plan.counter import derive_key, random_words

__all__ = ["Bodies", "Documents", "Layout", "MetadataReport"]

REVISION = 2
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""


@dataclass(frozen=True)
class MetadataReport:
    """
    Where every token went: text + EOS = kept + dropped, and blocks · block_size = kept + BOS + metadata + control +
    padded.

    Args:
        documents (`int`): documents, the empty ones among them.
        empty_documents (`int`): documents without a token; they leave nothing in the blocks.
        conditioned_documents (`int`): documents that go with metadata.
        missing (`int`): documents that lack a value of the template; `Template.missing` says what became of them.
        without_metadata (`int`): documents whose metadata `drop` took away.
        text_tokens (`int`): tokens of text.
        eos_tokens (`int`): end-of-sequence tokens that close documents, one each.
        bos_tokens (`int`): beginning-of-sequence tokens in the blocks, one a piece of a document.
        metadata_tokens (`int`): tokens of metadata in the blocks, repeated with every piece.
        control_tokens (`int`): control tokens in the blocks, repeated with every piece that goes on in a segment.
        segments (`int`): texts that a control token can stand before: segments, or documents.
        without_control (`int`): those whose control token `ControlTokens.drop` took away.
        missing_scores (`int`): those that lack a score, hence a control token.
        pieces (`int`): pieces that the documents were put into the blocks in.
        blocks (`int`): rows of the dataset.
        block_size (`int`): tokens a block.
        kept (`int`): tokens of text and EOS in the blocks.
        dropped (`int`): tokens of text and EOS that `overflow="discard"` left out.
        padded (`int`): tokens that fill blocks up where no piece would fit, and the last one.
    """

    documents: int
    empty_documents: int
    conditioned_documents: int
    missing: int
    without_metadata: int
    text_tokens: int
    eos_tokens: int
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

    def __str__(self) -> str:
        control = ""
        if self.segments:
            control = (
                f"; {self.control_tokens:,} control tokens for {self.segments:,} texts ({self.missing_scores:,} lack "
                f"a score, {self.without_control:,} had theirs dropped)"
            )
        return (
            f"{self.documents:,} documents ({self.empty_documents:,} empty, {self.conditioned_documents:,} with "
            f"metadata, {self.missing:,} lack a value, {self.without_metadata:,} had theirs dropped) in "
            f"{self.blocks:,} blocks of {self.block_size:,} tokens: {self.kept:,} of text and EOS, "
            f"{self.bos_tokens:,} BOS, {self.metadata_tokens:,} of metadata, {self.padded:,} padded; "
            f"{self.dropped:,} dropped{control}"
        )


@dataclass(frozen=True)
class Layout:
    block_size: int
    isolate: bool
    overflow: Overflow
    num_proc: int | None


@dataclass(frozen=True)
class Bodies:
    """Tokenized documents with BOS and EOS, and by row the tokens of text and EOS."""

    texts: Any
    length: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Any, bos: int) -> Bodies:
        length = document_lengths(texts)
        return cls(texts, np.where(length > 0, length - bos, 0))


@dataclass(frozen=True)
class Documents:
    """Tokenized documents: `told` as they are, `marked` with control tokens, one of the two None where it is not
    needed; `metadata` (None: there is none); and their lengths by row."""

    told: Bodies | None
    marked: Marked | None
    metadata: Any
    metadata_tokens: NDArray[np.int64]
    missing: NDArray[np.bool_]
    bos: int | None
    padding: int

    def _bodies(self, conditioned: bool) -> Bodies:
        if conditioned and self.marked is not None:
            return Bodies(self.marked.texts, self.marked.body)
        return cast(Bodies, self.told)

    def _kept_metadata(self, rows: NDArray[np.int64], conditioned: bool, drop: float, seed: int) -> NDArray[np.bool_]:
        if not conditioned:
            return np.zeros(len(rows), dtype=bool)
        if not drop:
            return np.ones(len(rows), dtype=bool)
        words = random_words(derive_key(seed, "metadata drop"), rows) >> np.uint64(11)
        return words.astype(np.float64) >= drop * 2**53

    def _lay_out(
        self, rows: NDArray[np.int64], layout: Layout, conditioned: bool, drop: float, seed: int
    ) -> tuple[Pieces, NDArray[np.int64], NDArray[np.bool_]]:
        kept = self._kept_metadata(rows, conditioned, drop, seed)
        metadata = self.metadata_tokens[rows] * kept
        heads = metadata + (self.bos is not None)
        lengths = self._bodies(conditioned).length[rows]
        segments = map(self.marked.segments, rows.tolist()) if conditioned and self.marked is not None else None
        pieces = lay_out(heads.tolist(), lengths.tolist(), layout.block_size, layout.overflow, segments)
        return pieces, metadata, kept

    def reserve(self, wanted: Callable[[int], int], layout: Layout, drop: float, seed: int) -> NDArray[np.int64]:
        """Rows, chosen by key, that fill `wanted(n)` blocks without metadata out of n in all."""
        body = cast(Bodies, self.told).length
        order = np.argsort(random_words(derive_key(seed, "metadata cooldown"), np.arange(len(body))), kind="stable")
        order = order[body[order] > 0]
        tokens = np.cumsum(body[order] + (self.bos is not None))
        rows, blocks = order[:0], 0
        # What is wanted depends on how many blocks there are, and those a little on what is wanted.
        for _ in range(8):
            rest = np.setdiff1d(np.arange(len(body)), rows, assume_unique=True)
            plain = self._lay_out(rows, layout, False, 0.0, seed)[0].blocks
            total = plain + self._lay_out(rest, layout, True, drop, seed)[0].blocks
            if total == blocks:
                break
            blocks = total
            rows = self._filling(wanted(blocks), order, tokens, layout)
        if len(rows) == len(order) or not len(rows):
            raise ValueError(
                f"{len(order):,} documents in {blocks:,} blocks are too few for two views, conditioned and plain, of "
                "documents of their own. Pass more documents, or a smaller block_size"
            )
        return rows

    def _filling(
        self, target: int, order: NDArray[np.int64], tokens: NDArray[np.int64], layout: Layout
    ) -> NDArray[np.int64]:
        """The first of `order` that fill `target` blocks, in rising order."""
        budget = target * layout.block_size
        while True:
            count = min(int(np.searchsorted(tokens, budget)) + 1, len(order))
            rows = np.sort(order[:count])
            lacking = target - self._lay_out(rows, layout, False, 0.0, 0)[0].blocks
            if lacking <= 0 or count == len(order):
                return rows
            budget += lacking * layout.block_size

    def blocks(
        self, rows: NDArray[np.int64], layout: Layout, conditioned: bool, drop: float, seed: int
    ) -> tuple[Any, MetadataReport]:
        pieces, metadata, kept = self._lay_out(rows, layout, conditioned, drop, seed)
        report = self._account(rows, pieces, metadata, kept, layout, conditioned)
        bodies, marked = self._bodies(conditioned), self.marked if conditioned else None
        whole = len(rows) == len(bodies.length) and bool((np.diff(rows) > 0).all())
        texts = bodies.texts if whole else bodies.texts.select(rows)
        heads = self.metadata if whole or self.metadata is None else self.metadata.select(rows)
        # The document that each block begins with.
        begins = pieces.document[np.flatnonzero(np.diff(pieces.block, prepend=-1))]
        made = texts.map(
            _cut,
            desc="Cutting blocks",
            with_indices=True,
            batched=True,
            batch_size=rows_within(CHUNK, float(bodies.length[rows].mean()), 100_000),
            num_proc=layout.num_proc,
            remove_columns=[name for name in texts.column_names if name != "input_ids"],
            features=block_features(layout.block_size, "input_ids", "labels"),
            fn_kwargs={
                "revision": REVISION,
                "texts": texts,
                "metadata": heads,
                "kept": kept,
                "pieces": pieces,
                "begins": begins,
                "bos": self.bos,
                "control": np.array(() if marked is None else marked.ids, dtype=np.int32),
                "control_loss": marked is not None and marked.loss,
                "padding": self.padding,
                "block_size": layout.block_size,
                "isolate": layout.isolate,
            },
        )
        return made.with_format(None), report

    def _account(
        self,
        rows: NDArray[np.int64],
        pieces: Pieces,
        metadata: NDArray[np.int64],
        kept: NDArray[np.bool_],
        layout: Layout,
        conditioned: bool,
    ) -> MetadataReport:
        body, marked = self._bodies(conditioned).length[rows], self.marked if conditioned else None
        full = body > 0
        own, inside = np.zeros(len(rows), dtype=np.int64), np.zeros(len(pieces.document), dtype=np.int64)
        counts = {"segments": 0, "without_control": 0, "missing_scores": 0}
        if marked is not None:
            own = marked.before(rows, body)
            of = rows[pieces.document]
            inside = marked.before(of, pieces.start + pieces.length) - marked.before(of, pieces.start)
            each = {"segments": np.diff(marked.first), "without_control": marked.without}
            each["missing_scores"] = marked.missing
            counts = {name: int(values[rows].sum()) for name, values in each.items()}
        tokens, eos = int((body - own).sum()), int(full.sum())
        placed, bos = int((pieces.length - inside).sum()), len(pieces.document) * (self.bos is not None)
        repeated = int(metadata[pieces.document].sum())
        control = int(inside.sum()) + int((pieces.repeated != NONE).sum())
        return MetadataReport(
            documents=len(rows),
            empty_documents=len(rows) - eos,
            conditioned_documents=int((full & (metadata > 0)).sum()),
            missing=int((full & self.missing[rows]).sum()) if conditioned else 0,
            without_metadata=int((full & ~kept).sum()) if conditioned and self.metadata is not None else 0,
            text_tokens=tokens - eos,
            eos_tokens=eos,
            bos_tokens=bos,
            metadata_tokens=repeated,
            control_tokens=control,
            **counts,
            pieces=len(pieces.document),
            blocks=pieces.blocks,
            block_size=layout.block_size,
            kept=placed,
            dropped=tokens - placed,
            padded=pieces.blocks * layout.block_size - placed - bos - repeated - control,
        )


def _cut(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    texts: Any,
    metadata: Any,
    kept: NDArray[np.bool_],
    pieces: Pieces,
    begins: NDArray[np.int64],
    bos: int | None,
    control: NDArray[np.int32],
    control_loss: bool,
    padding: int,
    block_size: int,
    isolate: bool,
) -> pa.Table:
    """The blocks that begin with a document of the batch; they may end with documents behind it."""
    first, last = np.searchsorted(begins, [rows[0], rows[-1] + 1])
    chosen = slice(*np.searchsorted(pieces.block, [first, last]))
    document, start, length = pieces.document[chosen], pieces.start[chosen], pieces.length[chosen]
    repeated = pieces.repeated[chosen]
    total = int(last - first) * block_size
    ids = np.full(total, padding, dtype=np.int32)
    labels = np.full(total, IGNORED, dtype=np.int32)
    if not total:
        return block_table(block_size, np.zeros(0, dtype=np.int64), input_ids=ids, labels=labels)
    low, high = int(document[0]), int(document[-1]) + 1
    opened = int(bos is not None)
    body = texts[low:high]["input_ids"]
    first_text = 1 + len(control)
    pool = [np.array([padding if bos is None else bos], dtype=np.int32), control, flat_values(body)]
    size = np.zeros(high - low, dtype=np.int64)
    head_at = size
    if metadata is not None:
        heads = metadata[low:high]["input_ids"]
        found = list_lengths(heads)
        head_at = first_text + len(pool[2]) + np.cumsum(found) - found
        size = found * kept[low:high]
        pool.append(flat_values(heads))
    text_at = first_text + np.cumsum(list_lengths(body)) - list_lengths(body) + opened
    own = document - low
    # Each piece is copied from four places: BOS, metadata, the control token it goes on under, its part of the text.
    sources = np.stack([np.zeros_like(own), head_at[own], 1 + repeated, text_at[own] + start], axis=1).ravel()
    parts = np.stack([np.full_like(own, opened), size[own], repeated != NONE, length], axis=1)
    whole = parts.sum(axis=1)
    offsets = np.cumsum(whole) - whole
    block = pieces.block[chosen] - first
    opens = np.flatnonzero(np.diff(block, prepend=-1))
    places = block * block_size + offsets - offsets[opens][block]
    from_ = _ranges(sources, parts.ravel())
    to = _ranges(places, whole)
    ids[to] = np.concatenate(pool)[from_]
    of_text = np.repeat(np.tile([False, False, False, True], len(own)), parts.ravel())
    if len(control) and not control_loss:
        of_text &= ~np.isin(ids[to], control)
    # A first token without a head has nothing to be predicted from, unless documents see each other.
    if isolate:
        of_text[offsets] = False
    labels[to[of_text]] = ids[to[of_text]]
    labels[::block_size] = IGNORED
    filled = np.zeros(total, dtype=bool)
    filled[to] = True
    # Every token of padding is a stretch of its own, as in `pack`.
    restarts = [np.arange(0, total, block_size), np.flatnonzero(~filled), places if isolate else places[:0]]
    return block_table(block_size, np.concatenate(restarts), input_ids=ids, labels=labels)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from each start on, as many as its length says, one after the other.

    Example:

    >>> _ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
