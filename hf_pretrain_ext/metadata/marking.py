"""Control tokens put into the documents of a dataset, and where its segments then are.

Texts are tokenized once, whatever the thresholds; what goes before them is put in afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_pretrain_ext.metadata.control import ControlTokens, drop_key, texts_of
from hf_pretrain_ext.metadata.layout import NONE, Segments
from hf_pretrain_ext.packing import (
    CHUNK,
    document_lengths,
    flat_values,
    list_lengths,
    lists,
    opening,
    rows_within,
    text_encoder,
    text_ids,
)

__all__ = ["Marked", "joined_texts", "mark", "segment_texts"]

REVISION = 1
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""


def joined_texts(dataset: Any, column: str, num_proc: int | None) -> Any:
    """The documents that the lists of texts in `column` are, as a dataset with the column `text`."""
    from datasets import Features, Value

    source = dataset.select_columns([column]).with_format("arrow")
    return source.map(
        _join,
        desc="Joining segments",
        batched=True,
        num_proc=num_proc,
        remove_columns=[column],
        features=Features({"text": Value("large_string")}),
        with_indices=True,
        fn_kwargs={"revision": REVISION, "column": column},
    ).with_format(None)


def _join(batch: pa.Table, rows: Sequence[int], revision: int, column: str) -> pa.Table:
    values = zip(rows, batch[column].to_pylist(), strict=True)
    made = ["".join(texts_of(value, column, f"row {row}")) for row, value in values]
    return pa.table({"text": pa.array(made, pa.large_string())})


def segment_texts(dataset: Any, tokenizer: Any, control: ControlTokens, text_column: str, num_proc: int | None) -> Any:
    """Documents as `input_ids` with BOS and EOS, their segments tokenized apart, and `sizes` in tokens of those."""
    from datasets import Features, List, Value

    column = control.segments if isinstance(control.segments, str) else text_column
    encoder, special = text_encoder(tokenizer)
    source = dataset.select_columns([column]).with_format("arrow")
    numbers = List(Value("int32"))
    return source.map(
        _tokenize_segments,
        desc="Tokenizing segments",
        batched=True,
        batch_size=rows_within(64 * CHUNK, source.data.nbytes / source.data.num_rows, 1_000),
        num_proc=num_proc,
        remove_columns=[column],
        features=Features({"input_ids": numbers, "sizes": numbers}),
        with_indices=True,
        fn_kwargs={
            "revision": REVISION,
            "splitter": control,
            "text_column": text_column,
            "encoder": encoder,
            "special": special,
            "prefix": opening(tokenizer, encoder),
            "eos": tokenizer.eos_token_id,
        },
    )


def _tokenize_segments(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    splitter: ControlTokens,
    text_column: str,
    encoder: Any,
    special: dict[int, str],
    prefix: list[int],
    eos: int,
) -> pa.Table:
    split = [
        splitter.split(row, text_column, f"row {number}") for number, row in zip(rows, batch.to_pylist(), strict=True)
    ]
    texts = [text for parts in split for text in parts]
    encoded = iter(text_ids(encoder, texts, special) if texts else [])
    whole, sizes = [], []
    for parts in split:
        ids = [next(encoded) for _ in parts]
        sizes.append([len(part) for part in ids])
        body = [number for part in ids for number in part]
        whole.append([*prefix, *body, eos] if body else [])
    return lists(
        input_ids=(_flat(whole), [len(row) for row in whole]), sizes=(_flat(sizes), [len(row) for row in sizes])
    )


def _flat(rows: list[list[int]]) -> NDArray[np.int32]:
    return np.array([number for row in rows for number in row], dtype=np.int32)


@dataclass(frozen=True)
class Marked:
    """Documents with control tokens: `texts` with BOS and EOS, the lengths of their bodies, and by row which segments
    there are (`first[row]` to `first[row + 1]`), where each starts in the body and its token; how many have had theirs
    left out, and how many lack a score."""

    texts: Any
    body: NDArray[np.int64]
    first: NDArray[np.int64]
    starts: NDArray[np.int32]
    tokens: NDArray[np.int16]
    without: NDArray[np.int64]
    missing: NDArray[np.int64]
    ids: tuple[int, ...]
    loss: bool

    def segments(self, row: int) -> Segments:
        part = slice(int(self.first[row]), int(self.first[row + 1]))
        return self.starts[part].tolist(), self.tokens[part].tolist()

    def before(self, rows: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Control tokens in the bodies of `rows` before `places` there."""
        owner = np.repeat(np.arange(len(self.body)), np.diff(self.first))
        has = self.tokens != NONE
        stride = int(self.body.max(initial=0)) + 1
        positions = (owner * stride + self.starts)[has]
        return np.searchsorted(positions, rows * stride + places) - np.searchsorted(positions, rows * stride)


def mark(
    dataset: Any, texts: Any, control: ControlTokens, ids: list[int], bos: int, seed: int, num_proc: int | None
) -> Marked:
    """Control tokens put into `texts`, which hold one segment, or `sizes` of several."""
    from datasets import Features, List, Value

    column = control.column.split(".")[0]
    source = dataset.select_columns([column]).with_format("arrow")
    made = source.map(
        _mark,
        desc="Control tokens",
        batched=True,
        batch_size=rows_within(CHUNK, float(document_lengths(texts).mean()), 10_000),
        num_proc=num_proc,
        remove_columns=[column],
        features=Features(
            {
                "input_ids": List(Value("int32")),
                "starts": List(Value("int32")),
                "tokens": List(Value("int16")),
                "without": Value("int32"),
                "missing": Value("int32"),
            }
        ),
        with_indices=True,
        fn_kwargs={
            "revision": REVISION,
            "texts": texts,
            "control": control,
            "ids": ids,
            "bos": bos,
            "key": drop_key(seed),
        },
    )
    lengths = document_lengths(made)
    columns = ["starts", "tokens", "without", "missing"]
    tables = list(made.select_columns(columns).with_format("arrow").iter(batch_size=100_000))
    counts = np.concatenate([list_lengths(table["starts"]) for table in tables])
    return Marked(
        texts=made,
        body=np.where(lengths > 0, lengths - bos, 0),
        first=np.concatenate([[0], np.cumsum(counts)]),
        starts=np.concatenate([flat_values(table["starts"]) for table in tables]),
        tokens=np.concatenate([flat_values(table["tokens"]) for table in tables]),
        without=np.concatenate([table["without"].to_numpy() for table in tables]).astype(np.int64),
        missing=np.concatenate([table["missing"].to_numpy() for table in tables]).astype(np.int64),
        ids=tuple(ids),
        loss=control.loss,
    )


def _mark(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    texts: Any,
    control: ControlTokens,
    ids: list[int],
    bos: int,
    key: int,
) -> pa.Table:
    table = texts[rows[0] : rows[-1] + 1]
    flat, lengths = flat_values(table["input_ids"]), list_lengths(table["input_ids"])
    if "sizes" in table.column_names:
        sizes, counts = flat_values(table["sizes"]).astype(np.int64), list_lengths(table["sizes"])
    else:
        sizes, counts = np.maximum(lengths - bos - 1, 0), np.ones(len(rows), dtype=np.int64)
    owner = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = [
        score
        for row, values, count in zip(rows, batch.to_pylist(), counts.tolist(), strict=True)
        for score in control.scores(values, count, f"row {row}")
    ]
    full = sizes > 0
    chosen = control.choose(np.array(scores, dtype=np.float64))
    missing = full & (chosen == NONE)
    counters = (np.array(rows, dtype=np.uint64)[owner] << np.uint64(24)) + number.astype(np.uint64)
    without = full & ~missing & control.drops(key, counters)
    has = full & ~missing & ~without
    # Where each segment starts in its document's text, without control tokens and with those before it.
    bare = _within(sizes, owner, len(rows))
    starts = bare + _within(has.astype(np.int64), owner, len(rows))
    begins = np.cumsum(lengths) - lengths + bos
    places = (begins[owner] + bare)[has]
    marked = np.insert(flat.astype(np.int32), places, np.array(ids, dtype=np.int32)[chosen[has]])
    kept = np.bincount(owner[full], minlength=len(rows))
    return (
        lists(
            input_ids=(marked, lengths + np.bincount(owner[has], minlength=len(rows))),
            starts=(starts[full].astype(np.int32), kept),
            tokens=(np.where(has, chosen, NONE)[full].astype(np.int16), kept),
        )
        .append_column("without", pa.array(np.bincount(owner[without], minlength=len(rows)).astype(np.int32)))
        .append_column("missing", pa.array(np.bincount(owner[missing], minlength=len(rows)).astype(np.int32)))
    )


def _within(values: NDArray[np.int64], owner: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Sums of the values before each one, begun anew with every owner."""
    before = np.cumsum(values) - values
    totals = np.bincount(owner, weights=values, minlength=rows).astype(np.int64)
    return before - (np.cumsum(totals) - totals)[owner]
