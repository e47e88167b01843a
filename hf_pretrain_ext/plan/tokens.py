"""Which source comes next when shares are counted in tokens and rows differ in length.

Source k with share s_k is served by virtual time: its next row, of l tokens after c_k tokens so far, is due at
(c_k + l/2) / s_k, and the row due first goes first (weighted fair queueing, with the middle of a row as its stamp).
At virtual time v every source has received s_k·v tokens to within half of its longest row L_k, hence after T tokens

    |c_k − s_k·T| ≤ ((1 − s_k)·L_k + s_k·Σ_{j≠k} L_j) / 2,

half a row for two sources of equal rows. "Largest deficit first" holds a looser bound (a whole row ahead, the sum of
all others' rows behind) and cannot be computed for many draws at once; this is a merge of sorted sequences.

Rows depend on lengths, so the order is not a closed formula of the position: it is computed in blocks, and a cursor (a
few integers a source) is kept at each block's start. Any block follows from the cursor before it, in integers; keys
are divided once in IEEE double precision, which rounds the same everywhere.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cursor", "TokenMixture"]

_UNIT = 1 << 16
"""Residuals are multiples of 1/2^16 token."""
_BLOCK = 1 << 14
_KEPT = 4


@dataclass(frozen=True)
class Cursor:
    """Where a token mixture stands before draw `index`: per source, draws and tokens served, and lead over its share.

    `ahead` is in units of 2^-16 tokens and sums to 0.
    """

    index: int
    draws: tuple[int, ...]
    tokens: tuple[int, ...]
    ahead: tuple[int, ...]

    @classmethod
    def start(cls, sources: int) -> Cursor:
        return cls(0, (0,) * sources, (0,) * sources, (0,) * sources)

    def to_json(self) -> dict[str, Any]:
        return {"index": self.index, "draws": [*self.draws], "tokens": [*self.tokens], "ahead": [*self.ahead]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Cursor:
        return cls(int(saved["index"]), *(tuple(map(int, saved[key])) for key in ("draws", "tokens", "ahead")))


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
    [1, 0, 1, 1, 1, 0, 1, 1]
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
        spread = 1.25
        while True:
            candidates = {k: self._due(cursor, k, weights, count, spread) for k in active}
            due = np.concatenate([candidates[k][0] for k in active])
            # A source's next row after its candidates is due no earlier than the last of them; a block has no room
            # for more than `count` of them.
            open_ended = [float(stamps[-1]) for stamps, _ in candidates.values() if len(stamps) < count]
            if not open_ended or int(np.count_nonzero(due < min(open_ended))) >= count:
                break
            spread *= 2
        # Stable: the order within a source, and between sources where stamps are equal, stays.
        order = np.argsort(due, kind="stable")[:count]
        source = np.repeat(np.array(active, dtype=np.uint8), [len(candidates[k][0]) for k in active])[order]
        number = np.empty(count, dtype=np.int64)
        draws, tokens, ahead = list(cursor.draws), list(cursor.tokens), list(cursor.ahead)
        for k in active:
            mask = source == k
            taken = int(np.count_nonzero(mask))
            number[mask] = np.arange(draws[k], draws[k] + taken)
            draws[k] += taken
            read = int(candidates[k][1][:taken].sum())
            tokens[k] += read
            ahead[k] += read * _UNIT
        total, scale = (sum(tokens) - sum(cursor.tokens)) * _UNIT, sum(weights)
        ahead = [lead - (total * weight + scale // 2) // scale for lead, weight in zip(ahead, weights, strict=True)]
        # Rounding leaves a few units; the largest weight takes them, for which they matter least.
        ahead[weights.index(max(weights))] -= sum(ahead)
        self._recent[cursor.index] = (source, number)
        while len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return (source, number), Cursor(cursor.index + count, tuple(draws), tuple(tokens), tuple(ahead))

    def _due(
        self, cursor: Cursor, k: int, weights: tuple[int, ...], count: int, spread: float
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Stamps of the next rows of source k, and their lengths: more than a block of `count` draws should need."""
        rate = sum(weight / mean for weight, mean in zip(weights, self.means, strict=True) if weight)
        share = weights[k] / self.means[k] / rate
        wanted = min(int(count * share * spread) + 64, count)
        lengths = self.lengths(k, np.arange(cursor.draws[k], cursor.draws[k] + wanted)).astype(np.int64)
        middle = 2 * np.cumsum(lengths) - lengths
        middle *= _UNIT
        middle += 2 * cursor.ahead[k]
        return middle / weights[k], lengths
