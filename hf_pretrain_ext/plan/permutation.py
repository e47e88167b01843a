"""Keyed permutations of the rows of a source: the order of a pass without a list of its rows.

Sources under 2^16 rows get an exact shuffle (a sort of keyed 48-bit random words); larger ones a modular Feistel
network over a × b ≥ n with cycle walking, in O(1) memory, so that shuffling 10^12 rows costs nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from hf_pretrain_ext.plan.counter import derive_key, random_words

__all__ = ["MAX_ROWS", "SMALL", "PassOrder", "feistel", "shuffles"]

SMALL = 1 << 16
MAX_ROWS = 1 << 62
ROUNDS = 8
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_BLOCK = 1 << 21


def shuffles(key: int, passes: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """Exact uniform shuffles of `range(n)`, `n` ≤ 2^16, one row per entry of `passes`: shape `(passes, n)`.

    Row numbers ride in the low 16 bits of the sorted words, so ties cannot occur and no argsort is needed.

    Example:

    >>> sorted(shuffles(0, np.array([3]), 5)[0].tolist())
    [0, 1, 2, 3, 4]
    """
    rows = np.arange(n, dtype=np.uint64)
    counters = passes.astype(np.uint64)[:, None] * np.uint64(SMALL) + rows[None, :]
    words = random_words(key, counters)
    words &= np.uint64(0xFFFF_FFFF_FFFF_0000)
    words |= rows[None, :]
    words.sort(axis=1)
    words &= np.uint64(0xFFFF)
    return words.astype(np.int64)


def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(word) for word in random_words(key, np.arange(ROUNDS))]


def _network(x: NDArray[np.uint64], a: int, b: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    half = [x // np.uint64(b), x % np.uint64(b)]
    sizes = (np.uint64(a), np.uint64(b))
    for turn, round_key in enumerate(keys):
        side = turn % 2
        word = half[1 - side] + round_key
        word *= _MULTIPLIER
        word ^= word >> np.uint64(32)
        word *= _MULTIPLIER
        word >>= np.uint64(32)
        word *= sizes[side]
        word >>= np.uint64(32)
        word += half[side]
        # Below 2·size, so one subtraction reduces it; where it was already reduced the difference wraps and is larger.
        half[side] = np.minimum(word, word - sizes[side])
    result = half[0] * sizes[1]
    result += half[1]
    return result


def feistel(key: int, positions: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """Images of `positions` under a keyed permutation of `range(n)`: a modular Feistel network, 8 rounds.

    `positions` are int64 in [0, n); `n` may be up to 2^62. Time and memory are O(1) per position.

    Example:

    >>> sorted(feistel(1, np.arange(7), 7).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    >>> int(feistel(1, np.array([5]), 10**12)[0]) < 10**12
    True
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(key)
    values = _network(positions.astype(np.uint64), a, b, keys)
    if a * b > n:
        outside = np.flatnonzero(values >= np.uint64(n))
        while outside.size:
            walked = _network(values[outside], a, b, keys)
            values[outside] = walked
            outside = outside[walked >= np.uint64(n)]
    return values.astype(np.int64)


class PassOrder:
    """Row order of one source over all its passes.

    Args:
        key (`int`): 64-bit key of the source (seed and name).
        n (`int`): rows in the source.

    Example:

    >>> order = PassOrder(key=3, n=4)
    >>> first, second = order.rows(np.arange(4)), order.rows(np.arange(4, 8))
    >>> sorted(first.tolist()) == sorted(second.tolist()) == [0, 1, 2, 3]
    True
    """

    def __init__(self, key: int, n: int):
        self.key = key
        self.n = n
        self._recent: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def rows(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the draws number `counts` (int64, of this source alone) in their passes: same shape."""
        if counts.size == 0 or self.n == 1:
            return np.zeros_like(counts)
        passes = counts // self.n
        first, last = int(passes.min()), int(passes.max())
        if self.n >= SMALL:
            if first == last:
                return self._large(first, counts - first * self.n)
            rows = np.empty_like(counts)
            for number in range(first, last + 1):
                mask = passes == number
                rows[mask] = self._large(number, counts[mask] - number * self.n)
            return rows
        if first == last:
            return self._table(first)[counts - first * self.n]
        rows = np.empty_like(counts)
        # In slabs of bounded size, so that a slice over many passes of a tiny source stays vectorised.
        slab = max(1, _BLOCK // self.n)
        for start in range(first, last + 1, slab):
            stop = min(start + slab, last + 1)
            mask = (passes >= start) & (passes < stop)
            tables = shuffles(self.key, np.arange(start, stop), self.n)
            rows[mask] = tables[passes[mask] - start, counts[mask] - passes[mask] * self.n]
        return rows

    def _large(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return feistel(derive_key(self.key, number), positions, self.n)

    def _table(self, number: int) -> NDArray[np.int64]:
        table = self._recent.get(number)
        if table is None:
            table = shuffles(self.key, np.array([number]), self.n)[0]
            self._recent[number] = table
            # Neighbouring batches alternate between two passes at most; four also covers look-ups from a preview.
            while len(self._recent) > 4:
                self._recent.popitem(last=False)
        return table
