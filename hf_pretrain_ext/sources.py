"""Where the rows of a dataset lie, so that a later stage can open them again: cache files, Hub revision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_pretrain_ext.data import fingerprint, is_map_style
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import reason

__all__ = ["hub_origin", "identified", "is_of_the_hub", "place_of", "reopen"]

# The cache of `datasets`: namespace___name/config/version/commit/file. Local files have a longer hash there.
_CACHED = re.compile(r"([^/\\]+)[/\\][^/\\]+[/\\][^/\\]+[/\\]([0-9a-f]{40})[/\\][^/\\]+\.arrow")
_HUB_URL = re.compile(r"hf://datasets/([^@]+)@([^/]+)/")


def identified(dataset: Any) -> str | None:
    """[`~hf_pretrain_ext.data.fingerprint`] of a map-style dataset, leaving the random state alone; else None."""
    if not is_map_style(dataset):
        return None
    # A dataset may draw as it is read; the same draws give the same hash.
    with rng_guard(seed=0):
        return fingerprint(dataset)


def hub_origin(dataset: Any) -> dict[str, str] | None:
    """Repository and revision of a dataset of the Hub, as far as `datasets` tells: from URLs or its cache's folders.

    Rows that were joined with others, of another repository or of none, have no one origin: None.

    Example:

    >>> hub_origin([1, 2]) is None
    True
    """
    urls = [_HUB_URL.match(str(url)) for url in getattr(dataset, "download_checksums", None) or {}]
    if found := {(match[1], match[2]) for match in urls if match}:
        return _origin(found)
    return _origin({_cached(files) for files in _files_by_rows(dataset)})


def _origin(found: set[tuple[str, str] | None] | set[tuple[str, str]]) -> dict[str, str] | None:
    one = next(iter(found)) if len(found) == 1 else None
    return None if one is None else {"path": one[0], "revision": one[1]}


def _cached(files: list[str]) -> tuple[str, str] | None:
    """Of the first of the files that is in the cache of a repository."""
    matches = (_CACHED.search(name) for name in files)
    return next(((match[1].replace("___", "/"), match[2]) for match in matches if match), None)


def is_of_the_hub(file: str) -> bool:
    """Whether a file lies where `datasets` caches what it loads from the Hub."""
    return _CACHED.search(file) is not None


def _files_by_rows(dataset: Any) -> list[list[str]]:
    """The files of each block of rows, none for a block in memory; `cache_files` says nothing of those."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return []
    blocks = getattr(dataset.data, "blocks", None) or [[dataset.data]]
    return [[str(part.path) for part in row if getattr(part, "path", None)] for row in blocks]


def place_of(dataset: Any, expected: str | None = None) -> dict[str, Any] | None:
    """The files from which [`reopen`] gets these very rows again; None where there are none, or others would come.

    `expected` is the dataset's fingerprint, if it is known already. A head or a tail of the rows in the files is
    recognised; another slice is not, because a dataset does not tell where it begins.

    Example:

    >>> from datasets import Dataset
    >>> place_of(Dataset.from_dict({"input_ids": [[1]]})) is None  # in memory only
    True
    """
    files = _cache_files(dataset)
    if not files:
        return None
    files = [os.path.abspath(name) for name in files]
    found = {"files": files, "start": 0, "rows": len(dataset)}
    wanted = expected or identified(dataset)
    try:
        whole = len(_opened(files))
    except Exception:  # whatever `datasets` cannot open now will not open later
        return None
    for start in dict.fromkeys((0, whole - len(dataset))):
        place = {**found, "start": start}
        if start >= 0 and identified(reopen(place)) == wanted:
            return place
    return None


def reopen(place: Mapping[str, Any]) -> Any:
    """The dataset that [`place_of`] described, memory-mapped.

    Raises:
        `ValueError`: a file is gone, cannot be read or holds too few rows.
    """
    missing = [name for name in place["files"] if not os.path.isfile(name)]
    if missing:
        raise ValueError(f"{missing[0]} is not there any more")
    try:
        dataset = _opened(place["files"])
    except Exception as error:  # whatever `datasets` raises about a file is the finding here
        raise ValueError(f"{place['files'][0]} cannot be opened ({reason(error, 200)})") from error
    start, rows = int(place["start"]), int(place["rows"])
    if start + rows > len(dataset):
        raise ValueError(
            f"{place['files'][0]} holds {len(dataset):,} rows, and rows up to {start + rows:,} are wanted"
        )
    return dataset if rows == len(dataset) else dataset.select(range(start, start + rows))


def _cache_files(dataset: Any) -> list[str]:
    from datasets import Dataset

    return [str(entry["filename"]) for entry in dataset.cache_files] if isinstance(dataset, Dataset) else []


def _opened(files: list[str]) -> Any:
    """The rows of Arrow files, in the order that a table of indices among them gives."""
    from datasets import Dataset, concatenate_datasets

    tables, order = list(files), None
    # A shuffled or selected dataset lists its table of indices last.
    if len(files) > 1 and Dataset.from_file(files[-1]).column_names == ["indices"]:
        order = tables.pop()
    if len(tables) == 1:
        return Dataset.from_file(tables[0], indices_filename=order)
    joined = concatenate_datasets(list(_each(tables)))
    if order is None:
        return joined
    return joined.select(Dataset.from_file(order).with_format("numpy")["indices"][:])


def _each(files: list[str]) -> Iterator[Any]:
    from datasets import Dataset

    for name in files:
        yield Dataset.from_file(name)
