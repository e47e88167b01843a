"""Which source comes next: exact integer shares with every prefix within one sample (Tijdeman's chairman assignment).

Source k with integer weight w_k out of W = Σ w_k is served so that after t draws its count n_k(t) obeys
|n_k(t) − t·w_k/W| ≤ 1 − 1/(2K − 2) for K ≥ 2 sources (Tijdeman, 1980). The m-th sample of a source is a unit job that
may not start before the source lags by 1/(2K − 2) and must be done before it would lag by more than 1 − 1/(2K − 2);
serving the earliest deadline among the released jobs meets all of them, in integers only. One period of the result is
stored as a table, so that "source and count of draw t" is a look-up.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_WEIGHT", "SampleMixture", "Schedule", "integer_weights", "quota_schedule"]

MAX_WEIGHT = 1 << 16
_UNIT = 1 << 32
"""Residuals carried into a schedule are multiples of 1/2^32 sample: 10^6 segments drift by less than 0.001 sample."""


def integer_weights(shares: Sequence[float | Fraction], limit: int = MAX_WEIGHT) -> tuple[int, ...]:
    """Integer weights, summing to at most `limit`, in the proportion of `shares`.

    Shares whose proportions have a common denominator up to `limit` come out exactly (`0.05` as 1 in 20); others are
    rounded by largest remainder to a total of `limit`.

    Raises:
        `ValueError`: a negative, infinite or all-zero share, or one so small that it would round to nothing.

    Example:

    >>> integer_weights([0.95, 0.05])
    (19, 1)
    >>> integer_weights([2**0.5, 1.0])  # rounded to 65536 parts
    (19195, 13573)
    """
    values = [share if isinstance(share, Fraction) else _as_fraction(share) for share in shares]
    if any(value < 0 for value in values) or not any(values):
        raise ValueError(f"shares must be non-negative and not all zero, got {[str(value) for value in values]}")
    total = sum(values, Fraction(0))
    parts = [value / total for value in values]
    denominator = math.lcm(*(part.denominator for part in parts))
    if denominator <= limit:
        return tuple(int(part * denominator) for part in parts)
    floors = [math.floor(part * limit) for part in parts]
    order = sorted(range(len(parts)), key=lambda k: (floors[k] - parts[k] * limit, k))
    for k in order[: limit - sum(floors)]:
        floors[k] += 1
    for k, (part, weight) in enumerate(zip(parts, floors, strict=True)):
        if part > 0 and weight == 0:
            raise ValueError(f"share number {k} is {float(part):.3g} of the total, below 1/{limit}: leave it out")
    divisor = math.gcd(*floors)
    return tuple(weight // divisor for weight in floors)


def _as_fraction(share: float) -> Fraction:
    if not math.isfinite(share):
        raise ValueError(f"shares must be finite numbers, got {share}")
    # repr is the shortest decimal that gives the same float, hence what the user typed: 0.05 means 1/20.
    return Fraction(repr(float(share)))


@dataclass(frozen=True)
class Schedule:
    """A stored schedule: `prefix` draws, then `len(source) − prefix` draws (none: it ends there) repeated for ever.

    `source[t]` is the source of draw t and `count[t]` how many draws of that source came before it.
    """

    weights: tuple[int, ...]
    source: NDArray[np.uint8]
    count: NDArray[np.int64]
    prefix: int
    cycle_counts: NDArray[np.int64]

    @property
    def cycle(self) -> int:
        return len(self.source) - self.prefix

    def look_up(self, t: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Source and per-source count of the draws number `t` (int64, from 0): two arrays of the shape of `t`."""
        if not self.cycle:
            return self.source[t], self.count[t]
        repeats = np.maximum(t - self.prefix, 0) // self.cycle
        position = t - repeats * self.cycle
        source = self.source[position]
        return source, self.count[position] + repeats * self.cycle_counts[source]

    def counts(self, t: int) -> NDArray[np.int64]:
        """How many of the first `t` draws each source gets: shape `(sources,)`."""
        repeats = max(t - self.prefix, 0) // self.cycle if self.cycle else 0
        position = t - repeats * self.cycle
        head = np.bincount(self.source[:position], minlength=len(self.weights)).astype(np.int64)
        return head + repeats * self.cycle_counts


def quota_schedule(
    weights: Sequence[int], residual: Sequence[int] | None = None, length: int | None = None
) -> Schedule:
    """The schedule of sources with integer `weights`, by earliest deadlines.

    Args:
        weights (`Sequence[int]`): non-negative, at least one positive, sum at most 2^16, at most 255 sources.
        residual (`Sequence[int]`, *optional*): how far each source is ahead of its share when the schedule starts, in
            units of 2^-32 samples, summing to 0; a source that is ahead waits, one that lags is served early.
        length (`int`, *optional*): draws that will be asked for. A shorter segment than a period costs only its own
            length; by default the schedule goes on for ever.

    Raises:
        `ValueError`: weights outside these limits.

    Example:

    >>> quota_schedule([3, 1]).source.tolist()
    [0, 0, 1, 0]
    """
    weights = tuple(int(weight) for weight in weights)
    total = sum(weights)
    if not 1 <= len(weights) <= 255 or any(weight < 0 for weight in weights) or not 1 <= total <= MAX_WEIGHT:
        raise ValueError(
            f"weights must be 1 to 255 non-negative integers that sum to 1..{MAX_WEIGHT}, got {weights!r}"
        )
    divisor = math.gcd(*weights)
    weights = tuple(weight // divisor for weight in weights)
    total //= divisor
    ahead = [0] * len(weights) if residual is None else [int(value) for value in residual]
    if len(ahead) != len(weights) or sum(ahead) != 0:
        raise ValueError(f"residual must hold one integer a source and sum to 0, got {ahead}")

    # Schedules are immutable, and appending a segment to a plan asks for those of all segments before it again.
    return _built(weights, tuple(ahead), length if length is not None and length < total else None)


class SampleMixture:
    """Source and per-source number of every draw, for shares counted in samples.

    Args:
        segments (`Sequence[tuple[int, tuple[int, ...]]]`): start draw and integer weights of each mixture, in order;
            the first starts at 0, and each starts from the residual of the last, else drift would add up.

    Example:

    >>> SampleMixture([(0, (3, 1)), (4, (1, 1))]).look_up(0, 8)[0].tolist()
    [0, 0, 1, 0, 0, 1, 0, 1]
    """

    def __init__(self, segments: Sequence[tuple[int, tuple[int, ...]]]):
        self.starts = [start for start, _ in segments]
        self.schedules: list[Schedule] = []
        self.before: list[NDArray[np.int64]] = []
        before = np.zeros(len(segments[0][1]), dtype=np.int64)
        residual = [0] * len(before)
        for number, (start, weights) in enumerate(segments):
            if number:
                length = start - self.starts[number - 1]
                gained = self.schedules[-1].counts(length)
                before = before + gained
                residual = _carry(residual, gained, self.schedules[-1].weights, length)
            until = self.starts[number + 1] - start if number + 1 < len(segments) else None
            self.schedules.append(quota_schedule(weights, residual, until))
            self.before.append(before)

    def look_up(self, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Source and number within the source of the draws `start` to `stop` − 1: two arrays of that length."""
        sources, numbers = [], []
        k = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(self.starts[k + 1], stop) if k + 1 < len(self.starts) else stop
            source, number = self.schedules[k].look_up(np.arange(start - self.starts[k], end - self.starts[k]))
            sources.append(source)
            numbers.append(number + self.before[k][source])
            start, k = end, k + 1
        return (sources[0], numbers[0]) if len(sources) == 1 else (np.concatenate(sources), np.concatenate(numbers))

    def counts(self, stop: int) -> NDArray[np.int64]:
        """How many of the first `stop` draws each source gets: shape `(sources,)`."""
        k = bisect.bisect_right(self.starts, stop) - 1
        return self.before[k] + self.schedules[k].counts(stop - self.starts[k])


def _carry(residual: list[int], gained: NDArray[np.int64], weights: tuple[int, ...], length: int) -> list[int]:
    """How far each source is ahead of its share after `length` draws, in 2^-32 samples, summing to 0."""
    total = sum(weights)
    ahead = [
        old + int(count) * _UNIT - (length * weight * _UNIT + total // 2) // total
        for old, count, weight in zip(residual, gained, weights, strict=True)
    ]
    # Rounding leaves a few units; the largest weight takes them, for which they matter least.
    ahead[weights.index(max(weights))] -= sum(ahead)
    return ahead


@functools.lru_cache(maxsize=1024)
def _built(weights: tuple[int, ...], ahead: tuple[int, ...], length: int | None) -> Schedule:
    served = [0] * len(weights)
    sources: list[int] = []
    runner = _EarliestDeadline(weights, sum(weights), list(ahead))
    prefix = 0
    if length is not None:
        sources = [runner.next() for _ in range(length)]
        prefix = length
    else:
        seen: dict[tuple[int, ...], int] = {}
        for period in itertools.count():
            state = tuple(served[k] - period * weights[k] for k in range(len(weights)))
            if state in seen:
                prefix = seen[state] * sum(weights)
                break
            seen[state] = period
            for _ in range(sum(weights)):
                chosen = runner.next()
                served[chosen] += 1
                sources.append(chosen)
    source = np.array(sources, dtype=np.uint8)
    count = np.zeros(len(source), dtype=np.int64)
    for k in range(len(weights)):
        mask = source == k
        count[mask] = np.arange(int(mask.sum()))
    cycle_counts = np.bincount(source[prefix:], minlength=len(weights)).astype(np.int64)
    for array in (source, count, cycle_counts):
        array.setflags(write=False)
    return Schedule(weights, source, count, prefix, cycle_counts)


class _EarliestDeadline:
    """Serves one unit job a step; job m of source k is (m−1)·W·U in the integer scale where one step adds w_k·U."""

    def __init__(self, weights: tuple[int, ...], total: int, ahead: list[int]):
        active = [k for k, weight in enumerate(weights) if weight]
        self.weights, self.total, self.ahead = weights, total, ahead
        slack = max(2 * len(active) - 2, 1)
        # Lags at which a job may start and must be done, in units of 1/(W·2^32·slack) samples.
        self.scale = _UNIT * slack
        self.start_lag = total * _UNIT if slack > 1 else 0
        self.due_lag = total * _UNIT * (slack - 1) if slack > 1 else total * self.scale
        self.slack = slack
        self.step = 0
        self.waiting: list[tuple[int, int, int, int]] = []
        self.released: list[tuple[int, int, int]] = []
        for k in active:
            self._announce(k, 1)

    def _announce(self, k: int, job: int) -> None:
        rate = self.weights[k] * self.scale
        debt = (job - 1) * self.total * self.scale + self.ahead[k] * self.total * self.slack
        # The first steps t with t·rate − debt ≥ start_lag and t·rate − debt > due_lag.
        release = -(-(debt + self.start_lag) // rate)
        deadline = (debt + self.due_lag) // rate + 1
        heapq.heappush(self.waiting, (max(release, 1), deadline, k, job))

    def next(self) -> int:
        self.step += 1
        while self.waiting and self.waiting[0][0] <= self.step:
            _, deadline, k, job = heapq.heappop(self.waiting)
            heapq.heappush(self.released, (deadline, k, job))
        if self.released:
            _, k, job = heapq.heappop(self.released)
        else:
            # Only a carried residual can leave nobody released: then the one released next goes first.
            _, _, k, job = heapq.heappop(self.waiting)
        self._announce(k, job + 1)
        return k
