"""Which source comes next when shares are counted in tokens and rows differ in length: largest deficit first.

After T tokens in all, source k with share s_k should have had s_k·T of them. Served next is the source whose deficit,
counted to the middle of its next row of l tokens, is largest: s_k·(T + l) − (c_k + l/2) for c_k tokens so far; of
equal ones the first. Since deficits sum to 0, the source served is never more than

    (L_k + mean of all L_j)/2

tokens ahead of its share, L being longest rows: less than a row where rows are alike, half a row for two sources of
them. No source was ever seen to be behind by more than one longest row, also where mixtures change on the way
(`tests/test_tokens.py`).

The order depends on lengths, so it is no closed formula of the position: it is computed draw by draw, in integers, and
a cursor (a few integers a source) is kept at each block's start. Any block follows from the cursor before it.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cursor", "TokenMixture"]

_UNIT = 1 << 16
"""What is carried from one mixture to the next is a multiple of 1/2^16 token."""
_BLOCK = 1 << 14
_KEPT = 4


@dataclass(frozen=True)
class Cursor:
    """Where a token mixture stands before draw `index`: per source, draws and tokens served, and deficit.

    `behind` sums to 0 and is in units of 1/(W·2^16) tokens, W being the sum of the weights in force at `index`.
    """

    index: int
    draws: tuple[int, ...]
    tokens: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def start(cls, sources: int) -> Cursor:
        return cls(0, (0,) * sources, (0,) * sources, (0,) * sources)

    def to_json(self) -> dict[str, Any]:
        return {"index": self.index, "draws": [*self.draws], "tokens": [*self.tokens], "behind": [*self.behind]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Cursor:
        return cls(int(saved["index"]), *(tuple(map(int, saved[key])) for key in ("draws", "tokens", "behind")))


class TokenMixture:
    """Source and per-source number of every draw, for shares counted in tokens.

    Args:
        segments (`Sequence[tuple[int, tuple[int, ...]]]`): start draw and integer weights of each mixture, in order.
        lengths (`Callable`): `lengths(k, numbers)` gives the tokens of the draws `numbers` (int64) of source k.
        means (`Sequence[float]`): mean tokens a row of each source; positive where a weight is.
        window (`int`): blocks are whole windows.
        cursors (`Sequence[Cursor]`): known ones, in order; the order is computed from them instead of from draw 0.

    Example:

    >>> mixture = TokenMixture([(0, (1, 1))], lambda k, numbers: np.full(len(numbers), (30, 10)[k]), (30, 10))
    >>> mixture.look_up(0, 8)[0].tolist()  # three short rows for a long one
    [0, 1, 1, 1, 0, 1, 1, 1]
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, tuple[int, ...]]],
        lengths: Callable[[int, NDArray[np.int64]], NDArray[np.integer]],
        means: Sequence[float],
        window: int = 1,
        cursors: Sequence[Cursor] = (),
    ):
        self.segments = list(segments)
        self.lengths = lengths
        self.means = means
        self.window = window
        self.block = window * max(1, _BLOCK // window)
        self.cursors = list(cursors) or [Cursor.start(len(means))]
        self._starts = [start for start, _ in self.segments]
        self._recent: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.int64]]] = OrderedDict()
        self._earlier: TokenMixture | None = None

    def look_up(self, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Source and number within the source of the draws `start` to `stop` − 1: two arrays of that length."""
        sources, numbers = [np.zeros(0, dtype=np.uint8)], [np.zeros(0, dtype=np.int64)]
        while start < stop:
            cursor, (source, number) = self._block_of(start)
            piece = slice(start - cursor.index, min(stop - cursor.index, len(source)))
            sources.append(source[piece])
            numbers.append(number[piece])
            start = cursor.index + piece.stop
        return np.concatenate(sources), np.concatenate(numbers)

    def counts(self, stop: int) -> NDArray[np.int64]:
        """How many of the first `stop` draws each source gets: shape `(sources,)`."""
        cursor = self.cursor_before(stop)
        counts = np.array(cursor.draws, dtype=np.int64)
        if cursor.index < stop:
            counts += np.bincount(self.look_up(cursor.index, stop)[0], minlength=len(counts))
        return counts

    def cursor_before(self, index: int) -> Cursor:
        """The last cursor at or before draw `index`."""
        if index < self.cursors[0].index:
            # Asked for what lies before the cursor that a resume started from: from the beginning, then.
            if self._earlier is None:
                self._earlier = TokenMixture(self.segments, self.lengths, self.means, self.window)
            return self._earlier.cursor_before(index)
        while self.cursors[-1].index < index:
            last = self.cursors[-1]
            if last.index + self._length(last) > index:
                break
            self.cursors.append(self._build(last)[1])
        return self.cursors[bisect.bisect_right(self.cursors, index, key=lambda cursor: cursor.index) - 1]

    def _block_of(self, index: int) -> tuple[Cursor, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        cursor = self.cursor_before(index)
        if cursor.index in self._recent:
            self._recent.move_to_end(cursor.index)
            return cursor, self._recent[cursor.index]
        return cursor, self._build(cursor)[0]

    def _segment(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _length(self, cursor: Cursor) -> int:
        """Draws from a cursor to the next: a block, or less where the mixture changes."""
        number = self._segment(cursor.index)
        if number + 1 < len(self._starts):
            return min(self.block, self._starts[number + 1] - cursor.index)
        return self.block

    def _build(self, cursor: Cursor) -> tuple[tuple[NDArray[np.uint8], NDArray[np.int64]], Cursor]:
        weights = self.segments[self._segment(cursor.index)][1]
        active = [k for k, weight in enumerate(weights) if weight]
        count = self._length(cursor)
        chosen, behind = self._serve(cursor, weights, active, count)
        source = np.array(active, dtype=np.uint8)[chosen]
        number = np.empty(count, dtype=np.int64)
        draws, tokens = list(cursor.draws), list(cursor.tokens)
        for k in active:
            mask = source == k
            taken = int(np.count_nonzero(mask))
            number[mask] = np.arange(draws[k], draws[k] + taken)
            tokens[k] += int(self.lengths(k, np.arange(draws[k], draws[k] + taken)).sum(dtype=np.int64))
            draws[k] += taken
        following = self.segments[self._segment(cursor.index + count)][1]
        if following is not weights:
            behind = _rescaled(behind, sum(weights), sum(following), weights.index(max(weights)))
        self._recent[cursor.index] = (source, number)
        while len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return (source, number), Cursor(cursor.index + count, tuple(draws), tuple(tokens), tuple(behind))

    def _serve(
        self, cursor: Cursor, weights: tuple[int, ...], active: list[int], count: int
    ) -> tuple[list[int], list[int]]:
        """Which of the `active` sources each of the next `count` draws goes to, and everybody's deficit afterwards."""
        total = sum(weights)
        rate = sum(weights[k] / self.means[k] for k in active)
        waiting = []
        for k in active:
            wanted = int(1.25 * count * weights[k] / self.means[k] / rate) + 64
            waiting.append(_Rows(self.lengths, k, cursor.draws[k], wanted))
        behind = [cursor.behind[k] for k in active]
        # Twice the deficit at the middle of the next row, in units of 1/(W·2^16) tokens.
        own = [(2 * weights[k] - total) * _UNIT for k in active]
        gains = [2 * weights[k] * _UNIT for k in active]
        heads = [rows.next() for rows in waiting]
        due = [2 * lag + half * head for lag, half, head in zip(behind, own, heads, strict=True)]
        chosen = []
        served = [0] * len(active)
        for _ in range(count):
            best = due.index(max(due))
            chosen.append(best)
            length = heads[best]
            served[best] += length
            due = [stamp + gain * length for stamp, gain in zip(due, gains, strict=True)]
            heads[best] = waiting[best].next()
            due[best] += own[best] * (heads[best] - length) - 2 * total * _UNIT * length
        read = sum(served)
        after = list(cursor.behind)
        for number, k in enumerate(active):
            after[k] += (weights[k] * read - total * served[number]) * _UNIT
        return chosen, after


class _Rows:
    """Lengths of the rows of a source one by one, looked up many at a time."""

    def __init__(
        self, lengths: Callable[[int, NDArray[np.int64]], NDArray[np.integer]], k: int, start: int, size: int
    ):
        self.lengths, self.k, self.at, self.size = lengths, k, start, size
        self.found: Iterator[int] = iter(())

    def next(self) -> int:
        length = next(self.found, None)
        if length is None:
            numbers = np.arange(self.at, self.at + self.size)
            self.found = iter(self.lengths(self.k, numbers).tolist())
            self.at += self.size
            length = next(self.found)
        return length


def _rescaled(behind: Sequence[int], old: int, new: int, largest: int) -> list[int]:
    """Deficits in units of 1/(old·2^16) tokens as units of 1/(new·2^16), rounded to 2^-16 tokens and summing to 0."""
    rounded = [(lag + old // 2) // old for lag in behind]
    # Rounding leaves a few units; the largest weight takes them, for which they matter least.
    rounded[largest] -= sum(rounded)
    return [lag * new for lag in rounded]
