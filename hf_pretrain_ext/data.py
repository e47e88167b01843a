"""A look at samples of the data before training: columns, token ids, lengths, tokenizer identity, overlap."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.plan.permutation import feistel

__all__ = [
    "columns",
    "copied_rows",
    "fault_of_ids",
    "fingerprint",
    "id_range",
    "is_map_style",
    "is_stream",
    "mean_tokens",
    "ngram_hashes",
    "row_lengths",
    "sample_rows",
    "token_rows",
    "tokenizer_fingerprint",
]

SAMPLE = 1_000
"""Rows that a check looks at (DESIGN: 1,000 sampled rows at `extend`)."""


def is_map_style(dataset: Any) -> bool:
    """Whether rows of `dataset` can be looked up by number, and there are any."""
    from torch.utils.data import IterableDataset

    # A pandas table counts its rows and looks up columns; text is a path more often than a dataset.
    if isinstance(dataset, IterableDataset | Mapping | str | bytes) or hasattr(dataset, "iloc"):
        return False
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset) > 0


def is_stream(dataset: Any) -> bool:
    """Whether `dataset` can be read from its start again and again, but has no rows by number."""
    from torch.utils.data import IterableDataset

    if isinstance(dataset, IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not isinstance(dataset, Mapping | str) and not hasattr(dataset, "__len__")


def columns(dataset: Any) -> set[str]:
    """Names of the columns of a map-style dataset; of its first row where it has no schema."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return set(names)
    first = dataset[0]
    return set(first) if isinstance(first, Mapping) else set()


def sample_rows(num_rows: int, size: int = SAMPLE, seed: int = 0) -> list[int]:
    """At most `size` row numbers, without repeats, keyed by `seed`, in rising order.

    Example:

    >>> sample_rows(3), len(sample_rows(10**9, 5))
    ([0, 1, 2], 5)
    """
    if num_rows <= size:
        return list(range(num_rows))
    chosen = feistel(derive_key(seed, "sample rows"), np.arange(size), num_rows)
    return sorted(chosen.tolist())


def token_rows(dataset: Any, rows: Sequence[int], column: str = "input_ids") -> list[NDArray[np.int64]]:
    """The token ids in `column` of some rows, as int64 arrays; rows without that column are left out."""
    if _is_arrow(dataset) and column in columns(dataset):
        try:
            found: Iterable[Any] = _view(dataset, column, "numpy")[list(rows)][column]
        except AttributeError:  # of `datasets`, where a row is None
            found = _view(dataset, column, None)[list(rows)][column]
    else:
        items = [dataset[row] for row in rows]
        found = [item[column] for item in items if isinstance(item, Mapping) and column in item]
    return [flat for ids in found if (flat := _flat_ids(ids)) is not None]


_VIEWS: WeakKeyDictionary[Any, dict[tuple[str, str | None], Any]] = WeakKeyDictionary()
"""One column of a dataset in one format: to make it takes longer than to read a thousand rows."""


def _view(dataset: Any, column: str, form: str | None) -> Any:
    views = _VIEWS.setdefault(dataset, {})
    if (column, form) not in views:
        views[column, form] = dataset.select_columns([column]).with_format(form)
    return views[column, form]


def _is_arrow(dataset: Any) -> bool:
    return hasattr(dataset, "with_format") and hasattr(dataset, "select_columns")


def _flat_ids(ids: Any) -> NDArray[np.int64] | None:
    """Token ids as one array; None where they are ragged lists of lists (multiple choice, say), or no integers."""
    try:
        flat = np.asarray(ids).reshape(-1)
    except (TypeError, ValueError):
        return None
    return flat.astype(np.int64) if flat.dtype.kind in "iu" or not flat.size else None


def fault_of_ids(dataset: Any, rows: Sequence[int], column: str = "input_ids") -> str | None:
    """Why the values of `column` in some rows are no lists of integers; None if they are, or nothing is there.

    Example:

    >>> fault_of_ids([{"input_ids": [1, 2]}, {"input_ids": [1, None]}], [0, 1])
    'None among its input_ids'
    >>> fault_of_ids([{"input_ids": [1.5]}], [0])
    'input_ids of float64 instead of integers'
    """
    if _is_arrow(dataset) and column in columns(dataset):
        return _fault_of_arrow(_view(dataset, column, "arrow")[list(rows)][column], column)
    for row in rows:
        item = dataset[row]
        if not isinstance(item, Mapping) or column not in item:
            continue
        if item[column] is None:
            return f"None instead of {column} in row {row}"
        try:
            values = np.asarray(item[column]).reshape(-1)
        except (TypeError, ValueError):
            continue
        kinds = {type(value) for value in values} if values.dtype.kind == "O" else set()
        if type(None) in kinds:
            return f"None among its {column}"
        if values.size and values.dtype.kind not in "iuO":
            return f"{column} of {values.dtype} instead of integers"
    return None


def _fault_of_arrow(values: Any, column: str) -> str | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if values.null_count:
        return f"None instead of {column}"
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(is_one(values.type) for is_one in is_list):
        values = pc.list_flatten(values)
        if values.null_count:
            return f"None among its {column}"
    kind = values.type
    known = pa.types.is_floating(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return f"{column} of {kind} instead of integers" if known else None


def mean_tokens(dataset: Any) -> float | None:
    """Mean tokens a row, over sampled rows; None where rows have no `input_ids`.

    Example:

    >>> mean_tokens([{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5, 6]}])
    3.0
    """
    rows = token_rows(dataset, sample_rows(len(dataset))) if "input_ids" in columns(dataset) else []
    return float(np.mean([len(row) for row in rows])) if rows else None


def row_lengths(dataset: Any, column: str | None = None) -> NDArray[np.int32] | None:
    """Tokens of every row of a map-style dataset, or None where that would mean reading all of its rows.

    A column `column` with the lengths is taken as it is; else the lengths of `input_ids` are read off the Arrow
    offsets of a `datasets.Dataset`, without touching the ids.

    Example:

    >>> from datasets import Dataset
    >>> row_lengths(Dataset.from_dict({"input_ids": [[1, 2], [3], []]})).tolist()
    [2, 1, 0]
    """
    if not hasattr(dataset, "with_format"):
        return None
    names = columns(dataset)
    chosen = column if column in names else "input_ids"
    if chosen not in names:
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = [np.zeros(0, dtype=np.int32)]
    for table in dataset.select_columns([chosen]).with_format("arrow").iter(batch_size=1 << 16):
        values = table[chosen].combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            parts.append(np.full(len(values), values.type.list_size, dtype=np.int32))
        elif chosen == column:
            parts.append(np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int32))
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            parts.append(np.asarray(pc.fill_null(pc.list_value_length(values), 0), dtype=np.int32))
        else:
            return None
    return np.concatenate(parts)


def fingerprint(dataset: Any, size: int = 64) -> str:
    """A hash of a map-style dataset's length and of some of its rows, chosen by key: other data gives another.

    Rows are hashed by their token ids where they have any, else by those of their values that are plain.

    Example:

    >>> rows = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    >>> fingerprint(rows) == fingerprint(list(rows)), fingerprint(rows) == fingerprint(rows[::-1])
    (True, False)
    """
    digest = hashlib.blake2b(str(len(dataset)).encode(), digest_size=16)
    rows = sample_rows(len(dataset), size)
    if "input_ids" in columns(dataset):
        for ids in token_rows(dataset, rows):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    else:
        for row in rows:
            item = dataset[row]
            values = sorted(item.items()) if isinstance(item, Mapping) else [("", item)]
            # Other objects print their address, which is another one in every process.
            plain = [(key, value) for key, value in values if isinstance(value, str | int | float | bool)]
            digest.update(repr(plain).encode())
    return digest.hexdigest()


def id_range(rows: Sequence[NDArray[np.int64]]) -> tuple[int, int] | None:
    """Smallest and largest token id in `rows`, None where there are no tokens."""
    full = [ids for ids in rows if ids.size]
    if not full:
        return None
    return min(int(ids.min()) for ids in full), max(int(ids.max()) for ids in full)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary: equal for tokenizers that give every token the same id.

    `tokenizer` is anything with `get_vocab()`, a processor holding one, or a path or name for `AutoTokenizer`.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.blake2b(digest_size=16)
    for token, number in vocabulary:
        digest.update(f"{number}\x00{token}\x01".encode())
    return digest.hexdigest()


def ngram_hashes(rows: Sequence[NDArray[np.int64]], n: int = 13) -> NDArray[np.uint64]:
    """Sorted distinct hashes of all `n`-grams of token ids in `rows`.

    Example:

    >>> ngram_hashes([np.arange(14)], n=13).shape
    (2,)
    """
    parts = []
    for ids in rows:
        if len(ids) < n:
            continue
        hashed = random_words(0, ids)
        total = np.zeros(len(ids) - n + 1, dtype=np.uint64)
        for offset in range(n):
            total *= np.uint64(0x100000001B3)
            total += hashed[offset : offset + len(total)]
        parts.append(random_words(1, total))
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


def copied_rows(
    held_out: Sequence[NDArray[np.int64]], other: Sequence[NDArray[np.int64]], n: int = 13, share: float = 0.4
) -> tuple[int, int]:
    """How many held-out rows are in `other` whole, and how many more share `share` of their `n`-grams with one row.

    Both are of single rows of `other`, so phrases that are everywhere (a licence, indentation) do not count. A copy
    that is cut into blocks elsewhere shares nearly half of its `n`-grams with one block at least. Rows of fewer than
    `n` different `n`-grams only count when found whole.

    Example:

    >>> text = np.arange(100)
    >>> copied_rows([text[:50], text[20:70], text + 1000], [text[:50], text[50:]])
    (1, 1)
    """
    theirs = {ids.tobytes() for ids in other if len(ids)}
    whole = np.array([ids.tobytes() in theirs for ids in held_out], dtype=bool)
    grams = [ngram_hashes([ids], n) for ids in held_out]
    sizes = np.array([len(each) for each in grams], dtype=np.int64)
    if not sizes.any():
        return int(whole.sum()), 0
    hashes, owners = np.concatenate(grams), np.repeat(np.arange(len(grams)), sizes)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    most = np.zeros(len(grams), dtype=np.int64)
    for ids in other:
        found = ngram_hashes([ids], n)
        first, last = np.searchsorted(hashes, found, "left"), np.searchsorted(hashes, found, "right")
        places = [np.arange(a, b) for a, b in zip(first, last, strict=True) if a < b]
        if places:
            np.maximum(most, np.bincount(owners[np.concatenate(places)], minlength=len(grams)), out=most)
    near = (sizes >= n) & (most >= share * sizes) & ~whole
    return int(whole.sum()), int(near.sum())
