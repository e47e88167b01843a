"""Which rows a buffer keeps: those of the lowest random words, as many as fit.

Row number n has the word w(n), a function of the seed and n alone (SplitMix64, no two alike). In the order of their
words, which is a uniformly random order, rows are kept up to the first that would exceed the limit in bytes:

    keep row n   ⇔   Σ bytes of all rows m with w(m) ≤ w(n)  ≤  limit

This is reservoir sampling by random sort keys. What is kept follows from the seed and the set of rows that were added,
not from the order in which, or the batches and processes by which, they came. A row that is left out never comes back,
because sums only grow; so rows are judged as they come, by one number, the `bound`: the word of the first that did not
fit.

**Inclusion.** Of rows of one length, k fit, and every set of k of the n rows is kept with the same probability:
exactly uniform. Of rows of different lengths, row n is kept with the probability that its bytes and those of the rows
before it in a random order stay within the limit. A row of b bytes is thus kept a little less often than a short one,
by a factor of about 1 − b/limit; rows of more than 1/64 of the limit are refused, so that this is at most 1.6 %.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.values import is_whole, shown

__all__ = ["LARGEST_SHARE", "NO_BOUND", "SMALLEST", "cut", "parse_bytes", "priorities"]

NO_BOUND = 1 << 64
"""The bound of a buffer that never was full: above every word."""
LARGEST_SHARE = 64
"""A row may take one part in so many of what the rows may take."""
SMALLEST = 1 << 20
"""Bytes of the smallest buffer: below, what files need besides their rows would count."""

_BYTES = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kMGT]i?)?B?\s*")
_UNITS: dict[str | None, int] = {
    None: 1,
    **{f"{u}{i}": (1024 if i else 1000) ** n for n, u in enumerate("kMGT", 1) for i in ("", "i")},
}


def priorities(seed: int, numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The random word of each row number.

    Example:

    >>> words = priorities(0, np.arange(1000))
    >>> len(np.unique(words)), bool(priorities(0, np.array([7]))[0] == words[7])
    (1000, True)
    """
    return random_words(derive_key(seed, "replay buffer"), numbers)


def cut(words: NDArray[np.uint64], sizes: NDArray[np.int64], limit: int, bound: int = NO_BOUND) -> int:
    """The bound under which the rows with these words stay, where all of them and none above `bound` were added.

    Args:
        words (`NDArray`): random word of each row, shape `(rows,)`, any order.
        sizes (`NDArray`): bytes of each row, same shape.
        limit (`int`): bytes that the rows may take.
        bound (`int`, *optional*): the bound so far; the new one is no higher.

    Example:

    >>> words, sizes = np.array([30, 10, 20], dtype=np.uint64), np.array([1, 4, 4])
    >>> cut(words, sizes, limit=9) == NO_BOUND, cut(words, sizes, limit=7)  # the row of word 20 would exceed 7
    (True, 20)
    """
    order = np.argsort(words)
    over = np.flatnonzero(np.cumsum(sizes[order], dtype=np.int64) > limit)
    return min(bound, int(words[order[over[0]]])) if len(over) else bound


def parse_bytes(value: Any, name: str = "max_bytes") -> int:
    """Bytes as users write them: an int, or a string with a unit (`"500 MB"`, `"2GiB"`).

    Raises:
        `ValueError`: anything else, or less than 1 MiB.

    Example:

    >>> parse_bytes("1.5 MB"), parse_bytes("2 GiB") == 2 << 30, parse_bytes(1 << 20)
    (1500000, True, 1048576)
    """
    advice = f'{name} must be a number of bytes, or a string such as "500 MB" or "2 GiB"'
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        if match is None:
            raise ValueError(f"{advice}, got {shown(value)}")
        number = float(match[1]) * _UNITS[match[2]]
    elif is_whole(value):
        number = value
    else:
        raise ValueError(f"{advice}, got {shown(value)}")
    if not SMALLEST <= number < 1 << 62:
        raise ValueError(f"{advice}, from 1 MiB (1048576 bytes) on, got {shown(value)}")
    return int(number)
