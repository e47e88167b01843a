"""The sample plan: what is seen when, as a pure function of the global sample index.

Draw i of a stage is `(source, row, phase, seed)`, from integer arithmetic on (plan, i) alone. Order therefore does not
depend on workers, ranks or accumulation, a resume touches no data, and any slice can be looked at before training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hf_pretrain_ext.plan.counter import bounded, derive_key, random_words
from hf_pretrain_ext.plan.mixture import MAX_WEIGHT, SampleMixture, integer_weights
from hf_pretrain_ext.plan.permutation import MAX_ROWS, PassOrder, shuffles
from hf_pretrain_ext.plan.tokens import Cursor, TokenMixture

__all__ = ["Draw", "Draws", "Order", "Phase", "SamplePlan", "Segment", "Source", "Unit"]

Order = Literal["shuffled", "original", "host"]
Unit = Literal["samples", "tokens"]
MAX_WINDOW = 1 << 15
_CHUNK = 1 << 15
EXACT_DRAWS = 1 << 18
"""Draws that shares in tokens are worked out for where a forecast is asked for: about a second."""


@dataclass(frozen=True)
class Draw:
    """One draw: position in the run, source number, row in the source, phase number, 63-bit seed."""

    index: int
    source: int
    row: int
    phase: int
    seed: int


@dataclass(frozen=True)
class Draws:
    """A slice of a plan: arrays of one length. `number` is how many draws of that source came before the draw."""

    index: NDArray[np.int64]
    source: NDArray[np.uint8]
    row: NDArray[np.int64]
    phase: NDArray[np.uint8]
    seed: NDArray[np.int64]
    number: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, k: int) -> Draw:
        return Draw(*(int(a[k]) for a in (self.index, self.source, self.row, self.phase, self.seed)))


@dataclass(frozen=True)
class Source:
    """Rows that a plan draws from.

    Args:
        name (`str`): unique in the plan.
        num_rows (`int` or `None`): 1 to 2^62; None for a stream, whose rows come as they come: row c is the c-th read.
        order (`str`): `"shuffled"` (a new keyed permutation every pass), `"original"` (rows in order, every pass), or
            `"host"` (the order of the Trainer's own random sampler: pass p is `torch.randperm` seeded with seed + p).
        replayed (`bool`): whether the rows are old data, counted as replay in logs and reports.
        dataset: what the rows are read from; not part of the plan's identity.
        lengths (`NDArray`, *optional*): tokens of each row, shape `(num_rows,)`; needed where shares are in tokens.
        mean_tokens (`float`, *optional*): tokens of a mean row, for forecasts; taken from `lengths` where given.
        key (`str`, *optional*): with the plan's seed, what `"shuffled"` rows are ordered by; defaults to the name.
    """

    name: str
    num_rows: int | None
    order: Order = "shuffled"
    replayed: bool = False
    dataset: Any = dataclasses.field(default=None, compare=False, repr=False)
    lengths: NDArray[np.integer] | None = dataclasses.field(default=None, compare=False, repr=False)
    mean_tokens: float | None = dataclasses.field(default=None, compare=False)
    key: str | None = None

    def __post_init__(self) -> None:
        if self.num_rows is not None and not 1 <= self.num_rows <= MAX_ROWS:
            raise ValueError(f"source {self.name!r}: num_rows must lie in 1..2^62, got {self.num_rows}")
        if self.order not in get_args(Order):
            raise ValueError(f"source {self.name!r}: order must be one of {get_args(Order)}, got {self.order!r}")
        if self.lengths is None:
            return
        if self.num_rows is None or self.lengths.shape != (self.num_rows,) or self.lengths.min() < 0:
            raise ValueError(
                f"source {self.name!r}: lengths must hold a number of tokens for each of its {self.num_rows} rows, "
                f"got shape {self.lengths.shape}"
            )
        object.__setattr__(self, "mean_tokens", int(self.lengths.sum(dtype=np.int64)) / self.num_rows)


@dataclass(frozen=True)
class Segment:
    """From draw `start` on, sources are mixed by integer `weights` (one a source, sum at most 2^16)."""

    start: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """A named range `[start, stop)` of draws."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class SamplePlan:
    """Which row of which source is sample i of the run, for every i.

    Args:
        sources (`tuple[Source, ...]`): 1 to 255 sources with distinct names.
        segments (`tuple[Segment, ...]`, *optional*): mixtures by start index; the first starts at 0. Defaults to the
            first source alone.
        seed (`int`): keys row orders, windows and per-sample seeds.
        epoch (`int`, *optional*): draws in an epoch; defaults to the rows of the first source.
        window (`int`): draws are permuted by key within windows of this many, so that no rank or micro-batch always
            gets the same source. Every prefix that ends at a window's end is within one sample of each source's
            share, as long as there is one segment, or two sources. (Three sources or more whose weights change on the
            way cannot be held to that by any rule that does not know the future: 1.4 samples is the most seen over
            random chains of segments, 2.4 when sources come and go.) The Trainer binding sets it to the global batch.
        phases (`tuple[Phase, ...]`): disjoint named ranges; phase number 0 is "outside any", k is `phases[k - 1]`.
        unit (`str`, *optional*, defaults to `"samples"`): what the weights are shares of. `"tokens"` needs the
            `lengths` of every source; at window ends a source is then at most (its longest row + the mean of all
            longest rows)/2 tokens ahead of its share, and was never seen to be a longest row behind.
        cursors (`tuple[Cursor, ...]`): for shares in tokens, where the order may be computed from instead of draw 0.

    Raises:
        `ValueError`: inconsistent sources, segments, phases or sizes.

    Example:

    >>> plan = SamplePlan((Source("new", 95), Source("old", 10**12, replayed=True)), (Segment(0, (19, 1)),), seed=7)
    >>> draws = plan.draws(0, 100)
    >>> int((draws.source == 1).sum())
    5
    >>> plan[3] == draws[3]
    True
    """

    sources: tuple[Source, ...]
    segments: tuple[Segment, ...] = ()
    seed: int = 0
    epoch: int = 0
    window: int = 1
    phases: tuple[Phase, ...] = ()
    unit: Unit = "samples"
    cursors: tuple[Cursor, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= 255:
            raise ValueError(f"a plan needs 1 to 255 sources, got {len(self.sources)}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must be distinct, got {names}")
        if not 1 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window must lie in 1..{MAX_WINDOW} draws, got {self.window}")
        if not self.segments:
            alone = (1,) + (0,) * (len(self.sources) - 1)
            object.__setattr__(self, "segments", (Segment(0, alone),))
        if not self.epoch:
            object.__setattr__(self, "epoch", self.sources[0].num_rows or 0)
        if self.epoch < 1:
            raise ValueError(
                f"epoch must be a positive number of draws, got {self.epoch}; with a stream first, it must be given"
            )
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {get_args(Unit)}, got {self.unit!r}")
        if len(self.phases) > 255:
            raise ValueError(f"a plan has at most 255 phases, got {len(self.phases)}")
        self._check_segments()
        if self.unit == "tokens":
            drawn = np.any([segment.weights for segment in self.segments], axis=0)
            for source, used in zip(self.sources, drawn, strict=True):
                if used and (source.lengths is None or not source.mean_tokens):
                    raise ValueError(f"source {source.name!r}: shares in tokens need `lengths` that are not all 0")
        last = 0
        for phase in self.phases:
            if not last <= phase.start < phase.stop:
                raise ValueError(f"phases must be disjoint, in order and not empty, got {self.phases}")
            last = phase.stop

    def _check_segments(self) -> None:
        if self.segments[0].start != 0:
            raise ValueError(f"the first segment must start at draw 0, got {self.segments[0].start}")
        for segment, following in zip(self.segments, (*self.segments[1:], None), strict=True):
            if len(segment.weights) != len(self.sources):
                raise ValueError(f"{segment} must hold one weight for each of the {len(self.sources)} sources")
            if min(segment.weights) < 0 or not 1 <= sum(segment.weights) <= MAX_WEIGHT:
                raise ValueError(f"{segment} must hold non-negative weights that sum to 1..{MAX_WEIGHT}")
            if segment.start % self.window:
                raise ValueError(f"{segment} must start at a multiple of the window of {self.window} draws")
            if following is not None and following.start <= segment.start:
                raise ValueError(f"segments must have rising starts, got {segment.start} then {following.start}")

    # Building

    def with_source(self, source: Source, share: float, epoch: int | None = None) -> SamplePlan:
        """A plan that also draws from `source`: a fixed `share` in [0, 1) of all draws, in every segment.

        The sources that were there keep their proportions among each other.

        Example:

        >>> plan = SamplePlan((Source("new", 100),)).with_source(Source("old", 50), share=0.25)
        >>> plan.segments
        (Segment(start=0, weights=(3, 1)),)
        """
        return self.with_sources([source], [(0, [share])], epoch)

    def with_sources(
        self,
        sources: Sequence[Source],
        shares: Sequence[tuple[int, Sequence[float | Fraction]]],
        epoch: int | None = None,
    ) -> SamplePlan:
        """A plan that also draws from `sources`, whose shares of all draws may change on the way.

        Args:
            sources (`Sequence[Source]`): the new ones.
            shares (`Sequence`): pairs of a start draw (a multiple of the window, the first 0) and the share of each
                new source from there on, in [0, 1) and together below 1. What was there keeps its proportions.
            epoch (`int`, *optional*): draws in an epoch, if it changes.

        Example:

        >>> plan = SamplePlan((Source("new", 100),))
        >>> plan.with_sources([Source("a", 9), Source("b", 9)], [(0, [0.25, 0.25]), (50, [0.1, 0])]).segments
        (Segment(start=0, weights=(2, 1, 1)), Segment(start=50, weights=(9, 1, 0)))
        """
        if not shares or shares[0][0] != 0:
            raise ValueError(f"shares must begin at draw 0, got {[start for start, _ in shares]}")
        parts = []
        for start, given in shares:
            if len(given) != len(sources) or not all(share >= 0 for share in given) or not sum(given) < 1:
                raise ValueError(
                    f"share must lie in [0, 1), one for each of {len(sources)} sources and together below 1, "
                    f"got {[float(share) for share in given]} from draw {start} on"
                )
            exact = [share if isinstance(share, Fraction) else Fraction(repr(float(share))) for share in given]
            parts.append((start, exact))
        segments = []
        for start in sorted({segment.start for segment in self.segments} | {start for start, _ in parts}):
            old = [segment for segment in self.segments if segment.start <= start][-1].weights
            new = [exact for at, exact in parts if at <= start][-1]
            kept = [Fraction(weight, sum(old)) * (1 - sum(new)) for weight in old]
            segments.append(Segment(start, integer_weights([*kept, *new], MAX_WEIGHT)))
        return dataclasses.replace(
            self, sources=(*self.sources, *sources), segments=tuple(segments), epoch=epoch or self.epoch
        )

    def with_segment(self, start: int, shares: Sequence[float | Fraction]) -> SamplePlan:
        """A plan whose mixture changes at draw `start`, after its last segment: draws before it stay as they were.

        Example:

        >>> plan = SamplePlan((Source("a", 10), Source("b", 10)), (Segment(0, (1, 1)),))
        >>> later = plan.with_segment(8, [0.75, 0.25])
        >>> later.segments[-1], bool((later.draws(0, 8).row == plan.draws(0, 8).row).all())
        (Segment(start=8, weights=(3, 1)), True)
        """
        return self.with_segments((*self.segments, Segment(start, integer_weights(shares, MAX_WEIGHT))))

    def with_segments(self, segments: tuple[Segment, ...]) -> SamplePlan:
        """The plan with segments added at its end."""
        if segments[: len(self.segments)] != self.segments:
            raise ValueError(f"segments can be added at the end only: {self.segments} is not how {segments} begins")
        added = segments[len(self.segments) :]
        cursors = self.cursors
        if self.unit == "tokens" and isinstance(self._mixture, TokenMixture) and added:
            # A cursor at the start itself counts in the units of the mixture that was.
            cursors = tuple(cursor for cursor in self._mixture.cursors if cursor.index < added[0].start)
        return dataclasses.replace(self, segments=segments, cursors=cursors)

    def with_phase(self, name: str, start: int, stop: int) -> SamplePlan:
        """A plan with one more named phase, draws `start` to `stop` − 1."""
        phases = sorted((*self.phases, Phase(name, start, stop)), key=lambda phase: phase.start)
        return dataclasses.replace(self, phases=tuple(phases))

    # Looking up

    def __getitem__(self, index: int) -> Draw:
        return self.draws(index, index + 1)[0]

    def draws(self, start: int, stop: int) -> Draws:
        """Draws `start` to `stop` − 1, vectorised: the same as single look-ups, millions a second."""
        if not 0 <= start <= stop:
            raise IndexError(f"draws({start}, {stop}): start and stop must be non-negative and in order")
        # Chunks that stay in the processor's cache are twice as fast as one long array.
        parts = [self._chunk(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self._chunk(start, start)
        names = [field.name for field in dataclasses.fields(Draws)]
        return Draws(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def counts(self, stop: int) -> NDArray[np.int64]:
        """How many of the first `stop` draws each source gets: shape `(sources,)`, int64."""
        if stop < 0:
            raise IndexError(f"counts({stop}): stop must not be negative")
        whole = stop - stop % self.window
        counts = self._mixture.counts(whole)
        if whole < stop:
            counts = counts + np.bincount(self.draws(whole, stop).source, minlength=len(self.sources))
        return counts

    def expected_counts(self, stop: int) -> NDArray[np.float64]:
        """Draws of each source among the first `stop`: shape `(sources,)`.

        Exact, but for shares in tokens over more draws than can be gone through in a moment: there from mean lengths.
        """
        if self.unit == "samples" or stop <= EXACT_DRAWS:
            return self.counts(stop).astype(np.float64)
        counts = np.zeros(len(self.sources))
        means = np.array([source.mean_tokens or np.inf for source in self.sources])
        for segment, following in zip(self.segments, (*self.segments[1:], Segment(stop, ())), strict=True):
            drawn = np.array(segment.weights) / means
            counts += max(min(following.start, stop) - segment.start, 0) * drawn / drawn.sum()
        return counts

    def shares(self, index: int) -> NDArray[np.float64]:
        """The share of each source in the mixture in force at draw `index`: shape `(sources,)`, sums to 1."""
        segment = [segment for segment in self.segments if segment.start <= index][-1]
        weights = np.array(segment.weights, dtype=np.float64)
        return weights / weights.sum()

    def passes(self, stop: int) -> NDArray[np.float64]:
        """How many times each source has been gone through after `stop` draws: shape `(sources,)`; NaN for streams."""
        return self.counts(stop) / np.array([source.num_rows or np.nan for source in self.sources], dtype=np.float64)

    def cursor_before(self, index: int) -> Cursor:
        """For shares in tokens, the last cursor at or before draw `index`: what a resume computes the order from."""
        if not isinstance(self._mixture, TokenMixture):
            raise TypeError("only a plan with unit='tokens' has cursors")
        return self._mixture.cursor_before(index)

    def identity(self) -> dict[str, Any]:
        """All that decides the order, as JSON types: two plans with equal identities draw the same for ever."""
        return {
            "seed": self.seed,
            "window": self.window,
            "epoch": self.epoch,
            "unit": self.unit,
            "sources": [
                {
                    "name": s.name,
                    "num_rows": s.num_rows,
                    "order": s.order,
                    "replayed": s.replayed,
                    **({} if s.key is None else {"key": s.key}),
                }
                for s in self.sources
            ],
            "segments": [{"start": s.start, "weights": list(s.weights)} for s in self.segments],
            "phases": [{"name": p.name, "start": p.start, "stop": p.stop} for p in self.phases],
        }

    # Internals

    def _chunk(self, start: int, stop: int) -> Draws:
        # Whole windows are looked up: which positions of a window a source gets depends on all of it.
        before, after = start % self.window, -stop % self.window
        index = np.arange(start - before, stop + after, dtype=np.int64)
        source, number = self._mixed(index)
        kept = slice(before, len(index) - after)
        index, source, number = index[kept], source[kept], number[kept]
        row = np.empty(len(index), dtype=np.int64)
        if len(self.sources) == 1:
            row = self._rows(0, number)
        else:
            grouped = np.argsort(source, kind="stable")
            ends = np.cumsum(np.bincount(source, minlength=len(self.sources))).tolist()
            for k, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if first < end:
                    row[grouped[first:end]] = self._rows(k, number[grouped[first:end]])
        seed = (random_words(self._keys["sample"], index) >> np.uint64(1)).astype(np.int64)
        return Draws(index, source, row, self._phase(index), seed, number)

    def _mixed(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Source and per-source number of the draws `index`, a run of whole windows."""
        if not len(index):
            return np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64)
        start = int(index[0])
        source, number = self._mixture.look_up(start, int(index[-1]) + 1)
        if self.window > 1 and len(self.sources) > 1:
            moved = source[self._permuted(index) - start]
            # The permutation moves sources, not the order within one: its draws are numbered as they come.
            numbered = np.empty_like(number)
            numbered[np.argsort(moved, kind="stable")] = number[np.argsort(source, kind="stable")]
            return moved, numbered
        return source, number

    def _permuted(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.window == 1:
            return index
        which = index // self.window
        offset = index - which * self.window
        # One word a window: its upper half turns the window, its lower bits choose a stored permutation.
        first = int(which[0]) if len(which) else 0
        words = random_words(self._keys["window"], np.arange(first, int(which[-1]) + 1 if len(which) else first))
        table = self._window_tables
        turn = bounded(words, self.window).astype(np.int64)[which - first]
        choice = (words & np.uint64(len(table) - 1)).astype(np.int64)[which - first]
        moved = table[choice, offset] + turn
        moved -= np.where(moved >= self.window, self.window, 0)
        return index - offset + moved

    def _rows(self, k: int, number: NDArray[np.int64]) -> NDArray[np.int64]:
        source = self.sources[k]
        return number if source.num_rows is None else self._orders[k].rows(number)

    def _phase(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        phase = np.zeros(len(index), dtype=np.uint8)
        for k, named in enumerate(self.phases, start=1):
            phase[(index >= named.start) & (index < named.stop)] = k
        return phase

    @cached_property
    def _keys(self) -> dict[str, int]:
        return {name: derive_key(self.seed, name) for name in ("sample", "window", "window tables")}

    @cached_property
    def _window_tables(self) -> NDArray[np.int64]:
        # A power of two of stored permutations, about 2^18 entries; with the turn, window times as many arrangements.
        number = 1 << max(4, min(10, 18 - self.window.bit_length()))
        return shuffles(self._keys["window tables"], np.arange(number), self.window)

    @cached_property
    def _orders(self) -> list[Any]:
        return [None if source.num_rows is None else _order(source, self.seed) for source in self.sources]

    @cached_property
    def _mixture(self) -> SampleMixture | TokenMixture:
        segments = [(segment.start, segment.weights) for segment in self.segments]
        if self.unit == "samples":
            return SampleMixture(segments)
        return TokenMixture(
            segments, self._lengths, [source.mean_tokens or 0.0 for source in self.sources], self.window, self.cursors
        )

    def _lengths(self, k: int, numbers: NDArray[np.int64]) -> NDArray[np.integer]:
        lengths = self.sources[k].lengths
        if lengths is None:
            raise ValueError(f"source {self.sources[k].name!r} has no lengths")
        return lengths[self._rows(k, numbers)]


def first_rows(source: Source, seed: int, draws: int) -> NDArray[np.int64]:
    """The rows that the first `draws` draws of a source give in a plan with that seed, one each, within one pass.

    Example:

    >>> first_rows(Source("train", 5, order="original"), seed=0, draws=3).tolist()
    [0, 1, 2]
    """
    return np.asarray(_order(source, seed).rows(np.arange(min(draws, source.num_rows or draws), dtype=np.int64)))


def _order(source: Source, seed: int) -> Any:
    rows = source.num_rows or 1
    if source.order == "original":
        return _FileOrder(rows)
    if source.order == "host":
        return _HostOrder(seed, rows)
    return PassOrder(derive_key(seed, "rows", source.key or source.name), rows)


@dataclass(frozen=True)
class _FileOrder:
    """Rows as they come, every pass."""

    n: int

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers % self.n


class _HostOrder:
    """The order of accelerate's `SeedableRandomSampler`: pass p is `torch.randperm` seeded with seed + p."""

    def __init__(self, seed: int, n: int):
        self.seed = seed
        self.n = n
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        passes = numbers // self.n
        rows = np.empty_like(numbers)
        for number in np.unique(passes):
            mask = passes == number
            rows[mask] = self._pass(int(number))[numbers[mask] - number * self.n]
        return rows

    def _pass(self, number: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != number:
            import torch

            generator = torch.Generator().manual_seed(self.seed + number)
            self._cached = (number, torch.randperm(self.n, generator=generator).numpy())
        return self._cached[1]
