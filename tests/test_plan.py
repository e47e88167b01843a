"""The sample plan against counting by hand: shares, passes, windows, segments, seeds, phases, identity.

Shares are compared in integers (served·W against t·w), so that no rounding hides or makes a deviation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pretrain_ext.plan import (
    MAX_WEIGHT,
    Draws,
    Phase,
    SamplePlan,
    Segment,
    Source,
    integer_weights,
    quota_schedule,
)

PROPERTY = settings(max_examples=40, derandomize=True, deadline=None)
CHUNK = 1 << 15
FIELDS = [field.name for field in dataclasses.fields(Draws)]


def mixture(weights: Sequence[int], window: int = 1, seed: int = 0, num_rows: int = 10**6) -> SamplePlan:
    sources = tuple(Source(f"s{k}", num_rows + k) for k in range(len(weights)))
    return SamplePlan(sources, (Segment(0, tuple(weights)),), window=window, seed=seed)


def served(draws: Draws, sources: int) -> np.ndarray:
    """How often each source was drawn in every prefix: `(draws, sources)`."""
    return np.cumsum(np.eye(sources, dtype=np.int64)[draws.source], axis=0)


def deviations(plan: SamplePlan, stop: int) -> np.ndarray:
    """|served − t·w/W| · W, exact, for every t in 1..stop and source: `(stop, sources)`."""
    (segment,) = plan.segments
    weights = np.array(segment.weights, dtype=np.int64)
    t = np.arange(1, stop + 1, dtype=np.int64)[:, None]
    return np.abs(served(plan.draws(0, stop), len(weights)) * weights.sum() - t * weights)


def assert_same_draws(ours: Draws, theirs: Draws) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def chi_square(observed: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def limit(freedom: int) -> float:
    """Five standard deviations above the mean of a chi-square variable, and a little for its tail."""
    return freedom + 5 * math.sqrt(2 * freedom) + 5


# --- shares -----------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 100), st.integers(0, 2**32))
def test_two_sources_keep_their_shares(a: int, b: int, window: int, seed: int) -> None:
    """Every prefix that ends at a window's end is within half a sample (Tijdeman's bound for two sources)."""
    stop = (min(2 * (a + b), 9000) // window + 2) * window
    ends = deviations(mixture((a, b), window, seed), stop)[window - 1 :: window]
    assert (2 * ends <= a + b).all()
    assert (2 * deviations(mixture((a, b), 1, seed), stop) <= a + b).all()


@PROPERTY
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20).filter(any), st.integers(1, 50))
def test_many_sources_keep_their_shares(weights: list[int], window: int) -> None:
    """Within 1 − 1/(2K − 2) of a sample for K sources with a share, hence within one; none from weight 0."""
    total, active = sum(weights), sum(weight > 0 for weight in weights)
    slack = max(2 * active - 2, 1)
    stop = (min(3 * total, 9000) // window + 2) * window
    for size in {1, window}:
        ends = deviations(mixture(weights, size), stop)[size - 1 :: size]
        assert (ends * slack <= total * (slack - 1)).all()
        assert (ends < total).all()


def test_shares_hold_for_the_largest_sums() -> None:
    """Weights that sum to 2^16, over more than two periods, with very unequal sources."""
    generator = random.Random(1)
    for count in (2, 3, 20):
        weights = [1, *(generator.randint(1, 400) for _ in range(count - 2))]
        weights.append(MAX_WEIGHT - sum(weights))
        ends = deviations(mixture(weights), 2 * MAX_WEIGHT + 1000)
        assert (ends * (2 * count - 2) <= MAX_WEIGHT * (2 * count - 3)).all()
        assert not ends[MAX_WEIGHT - 1].any() and not ends[2 * MAX_WEIGHT - 1].any()


@pytest.mark.parametrize("window", [1, 8, 4096])
@pytest.mark.parametrize(
    ("ratio", "exact"),
    [
        (0.05, Fraction(1, 20)),
        (0.1, Fraction(1, 10)),
        (0.015625, Fraction(1, 64)),
        (2**-16, Fraction(1, 65536)),
        (0.25, Fraction(1, 4)),
        (0.9999, Fraction(9999, 10000)),
        (1e-4, Fraction(1, 10000)),
        (1 / 3, None),
        (math.pi / 10, None),
        (0.0123456789, None),
    ],
)
def test_a_ratio_given_as_a_float_is_kept(ratio: float, exact: Fraction | None, window: int) -> None:
    """Decimals mean what was typed (0.05 is 1 in 20); others are rounded to 2^-16, and the rounded share is exact."""
    plan = SamplePlan((Source("new", 1000),), window=window).with_source(Source("old", 77), ratio)
    weights = plan.segments[0].weights
    share = Fraction(weights[1], sum(weights))
    assert share == exact if exact is not None else abs(share - Fraction(ratio)) <= Fraction(1, 2 * MAX_WEIGHT)
    stop = (2 * MAX_WEIGHT // window + 2) * window
    ends = deviations(plan, stop)[window - 1 :: window]
    assert (2 * ends <= sum(weights)).all()


@PROPERTY
@given(st.floats(min_value=1e-4, max_value=0.9999))
def test_any_ratio_is_within_a_sample_and_its_rounding(ratio: float) -> None:
    plan = SamplePlan((Source("new", 1000),), window=16).with_source(Source("old", 77), ratio)
    stop = 20_000
    replayed = served(plan.draws(0, stop), 2)[15::16, 1]
    target = np.arange(16, stop + 1, 16) * ratio
    assert (np.abs(replayed - target) <= 1 + stop / (2 * MAX_WEIGHT)).all()


@PROPERTY
@given(st.lists(st.sampled_from([0.5, 0.25, 0.1, 0.05, 0.2, 0.75]), min_size=1, max_size=3))
def test_sources_added_one_by_one_keep_their_proportions(ratios: list[float]) -> None:
    """Each new source gets its share of everything, and those before it share the rest as they did."""
    plan = SamplePlan((Source("s", 10),), window=4)
    expected = [Fraction(1)]
    for number, ratio in enumerate(ratios):
        plan = plan.with_source(Source(f"s{number}", 10), ratio)
        part = Fraction(str(ratio))
        expected = [share * (1 - part) for share in expected] + [part]
    weights = plan.segments[0].weights
    assert [Fraction(weight, sum(weights)) for weight in weights] == expected
    period = math.lcm(*(share.denominator for share in expected))
    assert plan.counts(4 * period).tolist() == [4 * period * share for share in expected]


def test_integer_weights_round_by_largest_remainder() -> None:
    for shares in ([2**0.5, 1.0], [math.pi, math.e, 1.0, 0.5], [1 / 3] * 3, [1e-5, 1.0]):
        weights = integer_weights(shares)
        total = sum(Fraction(repr(share)) for share in shares)
        assert sum(weights) <= MAX_WEIGHT and all(weights)
        for weight, share in zip(weights, shares, strict=True):
            assert abs(Fraction(weight, sum(weights)) - Fraction(repr(share)) / total) < Fraction(1, MAX_WEIGHT)
    assert integer_weights([0.0, 3.0]) == (0, 1)
    assert integer_weights([0.95, 0.05]) == (19, 1)  # decimals as typed: as binary fractions these are not 19 to 1
    assert integer_weights([Fraction(1, 3), Fraction(2, 3)]) == (1, 2)


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "original", "host"])
@pytest.mark.parametrize(
    ("num_rows", "passes"),
    [
        *((n, 1000) for n in (1, 2, 3, 4, 7)),
        (100, 50),
        (12_345, 3),
        *((n, 2) for n in (65_535, 65_536, 65_537, 70_001)),
    ],
)
def test_a_pass_holds_every_row_once(num_rows: int, passes: int, order: Any) -> None:
    plan = SamplePlan((Source("s", num_rows, order=order),), seed=5)
    if order == "host":
        passes = min(passes, 50)
    stop = passes * num_rows + num_rows // 2
    rows = plan.draws(0, stop).row
    complete = rows[: passes * num_rows].reshape(passes, num_rows)
    assert (np.sort(complete, axis=1) == np.arange(num_rows)).all()
    assert len(np.unique(rows[passes * num_rows :])) == num_rows // 2  # nor does a row repeat in a part of a pass
    if order == "original":
        assert (complete == np.arange(num_rows)).all()


@PROPERTY
@given(
    st.integers(1, 80),
    st.integers(1, 2000),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 64),
    st.sampled_from(["shuffled", "original", "host"]),
)
def test_passes_are_complete_in_a_mixture(n: int, m: int, a: int, b: int, window: int, order: Any) -> None:
    """Whatever the window: as they come, the draws of a source are number 0, 1, 2, ..., and every pass is complete."""
    sources = (Source("a", n, order=order), Source("b", m, order=order))
    mixed = SamplePlan(sources, (Segment(0, (a, b)),), window=window, seed=3)
    draws = mixed.draws(0, 30 * window * (a + b))
    for k, num_rows in enumerate((n, m)):
        mine = draws.source == k
        rows = draws.row[mine]
        assert np.array_equal(draws.number[mine], np.arange(len(rows)))
        for at in range(0, len(rows), num_rows):
            part = rows[at : at + num_rows]
            assert len(np.unique(part)) == len(part) and part.min() >= 0 and part.max() < num_rows
        if order == "original":
            assert np.array_equal(rows, np.arange(len(rows)) % num_rows)
        # Neither mixture nor window changes the order within a source.
        alone = SamplePlan((sources[k],), seed=3).draws(0, len(rows))
        assert np.array_equal(rows, alone.row)


@pytest.mark.parametrize("n", [60, 70_000])
def test_passes_seeds_and_sources_have_orders_of_their_own(n: int) -> None:
    sources = (Source("a", n), Source("b", n))
    plan = SamplePlan(sources, (Segment(0, (1, 1)),), seed=1)
    draws = plan.draws(0, 4 * n)
    a, b = (draws.row[draws.source == k] for k in (0, 1))
    other = SamplePlan((sources[0],), seed=2).draws(0, n).row
    orders = [a[:n], a[n:], b[:n], b[n:], other, np.arange(n)]
    # Unrelated orders agree at one row on average (Poisson), whatever n.
    agreements = [int((x == y).sum()) for i, x in enumerate(orders) for y in orders[:i]]
    assert max(agreements) < 10


# --- windows and look-ups ---------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(2, 200), st.integers(0, 99))
def test_a_window_only_permutes_its_own_draws(weights: list[int], window: int, seed: int) -> None:
    """Each window holds the draws that it would hold unpermuted: the same (source, row) pairs."""
    plain, moved = mixture(weights, 1, seed, 50), mixture(weights, window, seed, 50)
    stop = 20 * window
    pairs = [np.stack([d.source, d.number, d.row]) for d in (p.draws(0, stop) for p in (plain, moved))]
    for at in range(0, stop, window):
        ours, theirs = (sorted(map(tuple, pair[:, at : at + window].T.tolist())) for pair in pairs)
        assert ours == theirs


@pytest.fixture(scope="module")
def busy() -> SamplePlan:
    """Tiny, middling and large sources, a window that does not divide the chunk, segments and phases."""
    sources = (Source("tiny", 7), Source("some", 1000), Source("large", 70_000), Source("host", 90, order="host"))
    starts_weights = [
        (0, (5, 5, 1, 0)),
        (24 * 100, (1, 0, 0, 3)),
        (24 * 101, (0, 7, 90, 3)),
        (24 * 1500, (1, 1, 1, 1)),
    ]
    segments = tuple(Segment(start, weights) for start, weights in starts_weights)
    phases = (Phase("metadata", 0, 30_000), Phase("cooldown", 32_768, 60_001))
    return SamplePlan(sources, segments, seed=11, window=24, phases=phases)


@pytest.fixture(scope="module")
def all_draws(busy: SamplePlan) -> Draws:
    return busy.draws(0, 100_000)


def cut(draws: Draws, start: int, stop: int) -> Draws:
    return Draws(*(getattr(draws, name)[start:stop] for name in FIELDS))


def test_single_look_ups_equal_slices_at_every_boundary(busy: SamplePlan, all_draws: Draws) -> None:
    """Around the ends of chunks, windows, segments, phases and passes."""
    ends = [0, 24, 7 * 3, CHUNK, 2 * CHUNK, 3 * CHUNK, 30_000, 60_001, 90_000, *(s.start for s in busy.segments)]
    for end in ends:
        for index in range(max(end - 3, 0), end + 4):
            assert busy[index] == all_draws[index], index
            assert_same_draws(busy.draws(index, index + 1), cut(all_draws, index, index + 1))
    assert len(busy.draws(5, 5)) == 0
    assert busy.draws(5, 5).source.dtype == all_draws.source.dtype


@PROPERTY
@given(st.data())
def test_any_slice_equals_its_part_of_the_whole(busy: SamplePlan, all_draws: Draws, data: st.DataObject) -> None:
    near = st.builds(
        lambda base, off: max(base + off, 0), st.sampled_from([0, CHUNK, 2 * CHUNK, 2424]), st.integers(-40, 40)
    )
    start = data.draw(st.one_of(st.integers(0, 99_000), near))
    stop = data.draw(st.integers(start, min(start + 40_000, 100_000)))
    assert_same_draws(busy.draws(start, stop), cut(all_draws, start, stop))
    for index in data.draw(st.lists(st.integers(0, 99_999), max_size=5)):
        assert busy[index] == all_draws[index]


def test_a_fresh_plan_draws_the_same_wherever_it_is_asked_first(busy: SamplePlan, all_draws: Draws) -> None:
    """No look-up leaves a trace: a copy asked backwards, one draw at a time, agrees."""
    fresh = dataclasses.replace(busy)
    for index in range(99_999, 0, -4999):
        assert fresh[index] == all_draws[index]


def test_huge_sources_cost_no_memory() -> None:
    """10^12 rows, draw 10^15: valid rows, exact shares, and far below a list of anything."""
    plan = SamplePlan(
        (Source("new", 10**12), Source("old", 2**62, replayed=True), Source("few", 10)),
        (Segment(0, (899, 100, 1)),),
        window=256,
    )
    tracemalloc.start()
    try:
        base = 10**15 - 10**15 % 256_000
        draws = plan.draws(base, base + 2000)
        single = plan[base + 1234]
        counts = plan.counts(base)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    assert single == draws[1234]
    assert counts.tolist() == [base // 1000 * weight for weight in (899, 100, 1)]
    sizes = np.array([10**12, 2**62, 10])
    assert (draws.row >= 0).all() and (draws.row < sizes[draws.source]).all()
    ends = np.abs(served(draws, 3)[255::256] * 1000 - np.arange(256, 2001, 256)[:, None] * np.array([899, 100, 1]))
    assert (4 * ends <= 3 * 1000).all()
    for k in (0, 1):
        rows = draws.row[draws.source == k]
        assert len(np.unique(rows)) == len(rows)
    assert set(draws.number[draws.source == 0] // 10**12) == {base * 899 // 1000 // 10**12}


# --- segments ---------------------------------------------------------------------------------------


def chain(generator: random.Random, sources: int, number: int, window: int, idle: float) -> tuple[SamplePlan, int]:
    """A plan of `number` short segments with random weights, each 0 with probability `idle`; and where it ends."""
    segments, at = [], 0
    top, longest = generator.choice([1, 2, 5, 20, 100]), generator.choice([1, 2, 4, 10, 30])
    for _ in range(number):
        weights = [0] * sources
        while not any(weights):
            weights = [0 if generator.random() < idle else generator.randint(1, top) for _ in range(sources)]
        segments.append(Segment(at, tuple(weights)))
        at += window * generator.randint(1, longest)
    names = tuple(Source(f"s{k}", 5 + 3 * k) for k in range(sources))
    return SamplePlan(names, tuple(segments), window=window, seed=generator.randint(0, 99)), at


def chain_deviation(plan: SamplePlan, stop: int) -> Fraction:
    """Largest |served − target| at a window's end, the target being what every segment's exact shares add up to."""
    counts = served(plan.draws(0, stop), len(plan.sources))
    targets = [Fraction(0)] * len(plan.sources)
    worst = Fraction(0)
    for segment, end in zip(plan.segments, [*(s.start for s in plan.segments[1:]), stop], strict=True):
        total = sum(segment.weights)
        for t in range(segment.start + plan.window, end + 1, plan.window):
            gone = t - segment.start
            for k, weight in enumerate(segment.weights):
                worst = max(worst, abs(int(counts[t - 1, k]) - targets[k] - Fraction(gone * weight, total)))
        for k, weight in enumerate(segment.weights):
            targets[k] += Fraction((end - segment.start) * weight, total)
    return worst


@PROPERTY
@given(st.integers(1, 7), st.integers(1, 200), st.integers(1, 12), st.integers(0, 10**6))
def test_no_draw_is_lost_or_repeated_over_a_chain_of_segments(k: int, number: int, window: int, seed: int) -> None:
    """As they come, the draws of a source are number 0, 1, 2, ..., and each number is the row it always was."""
    plan, stop = chain(random.Random(seed), k, number, window, idle=0.3)
    draws = plan.draws(0, stop)
    for source in range(k):
        mine = draws.source == source
        assert np.array_equal(draws.number[mine], np.arange(mine.sum()))
        alone = SamplePlan((plan.sources[source],), seed=plan.seed).draws(0, int(mine.sum()))
        assert np.array_equal(draws.row[mine], alone.row)
    for end in [s.start for s in plan.segments[:: max(number // 5, 1)]]:
        assert plan.counts(end).tolist() == np.bincount(draws.source[:end], minlength=k).tolist()


def test_a_chain_of_two_sources_stays_within_one_sample() -> None:
    """Half a sample, in fact: of two lags that sum to 1 the larger is served, so it falls to at most a half."""
    generator = random.Random(2)
    for window in (1, 1, 1, 4, 16):
        plan, stop = chain(generator, 2, 200, window, idle=generator.choice([0, 0.3]))
        worst = chain_deviation(plan, stop)
        assert worst <= Fraction(1, 2) + Fraction(200, 2**32)  # and what 200 rounded residuals add
        assert worst <= 1


@pytest.mark.parametrize(("idle", "bound"), [((0.0,), 1.4), ((0.3, 0.7, 0.85), 2.4)], ids=["all served", "some idle"])
def test_a_chain_of_more_sources_stays_near_its_shares(idle: tuple[float, ...], bound: float) -> None:
    """Three or more sources: no bound is proven, and one sample is not it. The largest deviations measured in random
    search are 1.33 samples where every source has a share in every segment (110,000 chains of 2 to 200 segments of 3
    to 20 sources), and 2.30 where sources pause (170,000 chains); weights picked to hurt do worse (see below)."""
    generator = random.Random(3)
    worst = Fraction(0)
    for sources in (3, 3, 4, 5, 5, 8, 12, 20):
        for pausing in idle:
            plan, stop = chain(generator, sources, 80, generator.choice([1, 1, 4]), pausing)
            worst = max(worst, chain_deviation(plan, stop))
    assert 0.5 < worst <= bound


@pytest.mark.parametrize("sources", [3, 8, 20])
def test_a_chain_made_to_hurt_meets_the_bound_of_every_rule(sources: int) -> None:
    """Equal shares among those not served yet, one draw a segment: whoever does not know the future ends K-harmonic
    minus one behind with the last source, and the plan does no worse than that. So "within one sample" cannot hold
    over a chain of three or more sources, whatever the rule."""
    unserved, segments = list(range(sources)), []
    for at in range(sources - 1):
        segments.append(Segment(at, tuple(int(k in unserved) for k in range(sources))))
        names = tuple(Source(f"s{k}", 5) for k in range(sources))
        unserved.remove(SamplePlan(names, tuple(segments))[at].source)
    harmonic = sum(Fraction(1, j) for j in range(2, sources + 1))
    worst = chain_deviation(SamplePlan(names, tuple(segments)), sources - 1)
    assert abs(worst - harmonic) < Fraction(sources, 2**30)


@PROPERTY
@given(st.integers(1, 5), st.integers(2, 30), st.integers(1, 8), st.integers(0, 10**6))
def test_appending_a_segment_changes_nothing_before_it(k: int, number: int, window: int, seed: int) -> None:
    plan, stop = chain(random.Random(seed), k, number, window, idle=0.3)
    kept = seed % (number - 1) + 1
    shorter = dataclasses.replace(plan, segments=plan.segments[:kept])
    end = plan.segments[kept].start
    assert_same_draws(shorter.draws(0, end), plan.draws(0, end))
    assert stop > end


@PROPERTY
@given(st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any), st.lists(st.integers(1, 90), max_size=5))
def test_segments_of_one_mixture_are_that_mixture(weights: list[int], starts: list[int]) -> None:
    """Splitting a segment anywhere keeps every source within a sample: the residual is carried over."""
    plan = mixture(weights)
    split = dataclasses.replace(plan, segments=tuple(Segment(at, tuple(weights)) for at in sorted({0, *starts})))
    assert chain_deviation(split, 300) <= 1


# --- spread over ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "ranks", "batch", "accumulation", "steps"),
    [
        (0.25, 2, 2, 1, 4000),
        (0.05, 2, 2, 1, 20_000),
        (0.25, 2, 1, 2, 4000),
        (0.05, 4, 2, 4, 4000),
        (0.5, 4, 8, 1, 2000),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_replayed_rows_spread_over_ranks_and_slots(
    ratio: float, ranks: int, batch: int, accumulation: int, steps: int, seed: int
) -> None:
    """Each place of a global batch gets the replayed row as often as any other; each step keeps its share."""
    window = ranks * batch * accumulation
    plan = SamplePlan((Source("new", 10**6),), seed=seed, window=window).with_source(Source("old", 100), ratio)
    replayed = (plan.draws(0, steps * window).source == 1).reshape(steps, accumulation, ranks, batch)
    total = int(replayed.sum())
    assert abs(total - steps * window * ratio) <= 1
    a_step = replayed.sum(axis=(1, 2, 3))
    assert a_step.min() >= math.floor(window * ratio) and a_step.max() <= math.ceil(window * ratio)
    for axis in ((0, 1, 3), (0, 1, 2), (0, 2, 3), (0,)):  # by rank, slot, micro-batch, and each place
        observed = replayed.sum(axis=axis).reshape(-1)
        assert chi_square(observed, total / observed.size) < limit(observed.size - 1)
        binomial = 5 * math.sqrt(total / observed.size)
        assert (np.abs(observed - total / observed.size) < binomial + 1).all()


def test_places_of_following_steps_are_independent() -> None:
    """No pattern from step to step: pairs of places of the one replayed row in four are all alike."""
    plan = SamplePlan((Source("new", 10**6),), window=4).with_source(Source("old", 100), 0.25)
    steps = 16_001
    place = (plan.draws(0, 4 * steps).source == 1).reshape(steps, 4).argmax(axis=1)
    for gap in (1, 2, 3, 16):
        pairs = np.bincount(place[:-gap] * 4 + place[gap:], minlength=16)
        assert chi_square(pairs, pairs.sum() / 16) < limit(15)


def test_without_a_window_one_rank_would_get_every_replayed_row() -> None:
    """Negative control for the tests above: what the window is for."""
    plan = SamplePlan((Source("new", 10**6),), window=1).with_source(Source("old", 100), 0.25)
    replayed = (plan.draws(0, 4000).source == 1).reshape(1000, 4).sum(axis=0)
    assert sorted(replayed.tolist()) == [0, 0, 0, 1000]


@pytest.mark.parametrize("window", [2, 3, 5, 16])
def test_every_source_of_a_window_goes_to_every_place(window: int) -> None:
    """With one draw of each source a window, where each lands is uniform, and so is where each pair lands."""
    windows = 30_000
    drawn = mixture((1,) * window, window, seed=6).draws(0, windows * window).source.reshape(windows, window)
    assert (np.sort(drawn, axis=1) == np.arange(window)).all()
    for place in range(window):
        assert chi_square(np.bincount(drawn[:, place], minlength=window), windows / window) < limit(window - 1)
    pairs = np.bincount(drawn[:, 0].astype(int) * window + drawn[:, 1], minlength=window**2).reshape(window, window)
    apart = pairs[~np.eye(window, dtype=bool)]
    # The 1,024 stored permutations are a sample themselves, and their unevenness is multiplied by the windows.
    assert chi_square(apart, windows / apart.size) < limit(apart.size - 1) * (1 + windows / 1024)


# --- seeds and phases -------------------------------------------------------------------------------


def test_sample_seeds_are_distinct_and_look_random() -> None:
    """Per-sample seeds: 63 bits, all different, every bit and every pair of neighbours balanced."""
    plan = SamplePlan((Source("s", 10),), seed=3)
    near, far = plan.draws(0, 200_000).seed, plan.draws(10**15, 10**15 + 50_000).seed
    other = SamplePlan((Source("s", 10),), seed=4).draws(0, 200_000).seed
    assert len(np.unique(np.concatenate([near, far, other]))) == 450_000
    for seeds in (near, far, other):
        assert seeds.min() >= 0  # torch and Python take it as it is
        shifts = np.arange(63)
        ones = ((seeds[:, None] >> shifts) & 1).sum(axis=0)
        assert chi_square(ones, len(seeds) / 2) * 2 < limit(63)
        flips = (((seeds[1:] ^ seeds[:-1])[:, None] >> shifts) & 1).sum(axis=0)
        assert chi_square(flips, len(seeds) / 2) * 2 < limit(63)
        assert chi_square(np.bincount(seeds >> 55, minlength=256), len(seeds) / 256) < limit(255)
        assert chi_square(np.bincount(seeds & 255, minlength=256), len(seeds) / 256) < limit(255)


def test_seeds_follow_the_position_and_nothing_else() -> None:
    """Mixture, window and sources leave the seed of sample i alone."""
    seeds = mixture((1,), 1, seed=8).draws(0, 500).seed
    for other in (mixture((3, 1), 7, seed=8), mixture((1, 1, 5), 64, seed=8, num_rows=3)):
        assert np.array_equal(other.draws(0, 500).seed, seeds)


@PROPERTY
@given(st.lists(st.integers(0, 300), min_size=2, max_size=10, unique=True))
def test_phases_are_ranges_of_positions(edges: list[int]) -> None:
    edges = sorted(edges)
    ranges = list(zip(edges[0::2], edges[1::2], strict=False))
    plan = SamplePlan((Source("s", 10),), window=4)
    for number, (start, stop) in reversed(list(enumerate(ranges))):  # added in any order
        plan = plan.with_phase(f"p{number}", start, stop)
    assert [phase.name for phase in plan.phases] == [f"p{number}" for number in range(len(ranges))]
    expected = [next((k for k, (a, b) in enumerate(ranges, 1) if a <= i < b), 0) for i in range(310)]
    assert plan.draws(0, 310).phase.tolist() == expected
    assert plan[7].phase == expected[7]


# --- counts, shares, passes -------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_counts_equal_counting(k: int, number: int, window: int, seed: int, data: st.DataObject) -> None:
    plan, end = chain(random.Random(seed), k, number, window, idle=0.2)
    stop = data.draw(st.integers(0, end + 500))
    draws = plan.draws(0, stop)
    expected = np.bincount(draws.source, minlength=k)
    assert plan.counts(stop).tolist() == expected.tolist()
    sizes = [source.num_rows for source in plan.sources]
    assert plan.passes(stop).tolist() == [count / size for count, size in zip(expected, sizes, strict=True)]


def test_shares_are_those_of_the_segment_in_force(busy: SamplePlan) -> None:
    for index, weights in ((0, (5, 5, 1, 0)), (2399, (5, 5, 1, 0)), (2400, (1, 0, 0, 3)), (10**12, (1, 1, 1, 1))):
        assert busy.shares(index) == pytest.approx([weight / sum(weights) for weight in weights])


def test_an_epoch_is_the_first_source_unless_said() -> None:
    plan = SamplePlan((Source("new", 95), Source("old", 7)), (Segment(0, (19, 1)),))
    assert plan.epoch == 95
    assert plan.with_source(Source("third", 3), 0.5).epoch == 95
    assert plan.with_source(Source("third", 3), 0.5, epoch=190).epoch == 190


# --- identity ---------------------------------------------------------------------------------------


def rebuilt(identity: dict[str, Any]) -> SamplePlan:
    """A plan from nothing but what its identity says."""
    return SamplePlan(
        tuple(Source(**source) for source in identity["sources"]),
        tuple(Segment(segment["start"], tuple(segment["weights"])) for segment in identity["segments"]),
        seed=identity["seed"],
        epoch=identity["epoch"],
        window=identity["window"],
        phases=tuple(Phase(**phase) for phase in identity["phases"]),
    )


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6))
def test_identity_decides_every_draw(k: int, number: int, window: int, seed: int) -> None:
    """Through JSON and back: an equal identity gives equal draws."""
    plan, stop = chain(random.Random(seed), k, number, window, idle=0.2)
    plan = plan.with_phase("late", stop // 2, stop)
    text = json.dumps(plan.identity(), allow_nan=False)
    again = rebuilt(json.loads(text))
    assert again.identity() == plan.identity() == json.loads(text)
    assert_same_draws(again.draws(0, stop), plan.draws(0, stop))


def test_identity_tells_plans_apart(busy: SamplePlan) -> None:
    """Everything that changes draws (or what is reported of them) changes the identity; the data objects do not."""
    first, *rest = busy.sources
    renamed = dataclasses.replace(first, name="other")
    segments = (*busy.segments[:-1], Segment(busy.segments[-1].start, (1, 1, 1, 2)))
    others: list[dict[str, Any]] = [
        {"seed": 12},
        {"window": 12},
        {"epoch": 8},
        {"sources": (renamed, *rest)},
        {"sources": (dataclasses.replace(first, num_rows=8), *rest)},
        {"sources": (dataclasses.replace(first, order="original"), *rest)},
        {"sources": (dataclasses.replace(first, replayed=True), *rest)},
        {"segments": segments},
        {"phases": busy.phases[:1]},
    ]
    identities = [json.dumps(dataclasses.replace(busy, **change).identity()) for change in others]
    assert len({*identities, json.dumps(busy.identity())}) == len(others) + 1
    same = dataclasses.replace(busy, sources=(dataclasses.replace(first, dataset=[1, 2]), *rest))
    assert same.identity() == busy.identity() and same == busy


# --- errors -----------------------------------------------------------------------------------------

TWO = (Source("a", 3), Source("b", 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Source("wiki", 0), ["'wiki'", "num_rows", "0", "1..2^62"]),
        (lambda: Source("wiki", -4), ["'wiki'", "num_rows", "-4"]),
        (lambda: Source("wiki", 2**62 + 1), ["num_rows", str(2**62 + 1)]),
        (lambda: Source("wiki", 5, order="random"), ["'wiki'", "order", "'random'", "'shuffled'", "'host'"]),
        (lambda: SamplePlan(()), ["1 to 255 sources", "0"]),
        (lambda: SamplePlan(tuple(Source(str(k), 1) for k in range(256))), ["1 to 255 sources", "256"]),
        (lambda: SamplePlan((Source("a", 3), Source("a", 4))), ["distinct", "'a'"]),
        (lambda: SamplePlan(TWO, window=0), ["window", "1..32768", "0"]),
        (lambda: SamplePlan(TWO, window=2**15 + 1), ["window", "32769"]),
        (lambda: SamplePlan(TWO, (Segment(4, (1, 1)),)), ["first segment", "0", "4"]),
        (lambda: SamplePlan(TWO, (Segment(0, (1,)),)), ["one weight", "2 sources", "(1,)"]),
        (lambda: SamplePlan(TWO, (Segment(0, (1, 1)), Segment(6, (1, 2))), window=4), ["window of 4", "6"]),
        (lambda: SamplePlan(TWO, (Segment(0, (1, 1)), Segment(0, (1, 2)))), ["rising", "0"]),
        (lambda: SamplePlan(TWO, (Segment(0, (1, 1)), Segment(8, (1, 2)), Segment(4, (1, 2)))), ["rising", "8", "4"]),
        (lambda: SamplePlan(TWO, phases=(Phase("x", 3, 3),)), ["phases", "not empty", "'x'"]),
        (lambda: SamplePlan(TWO, phases=(Phase("x", -1, 3),)), ["phases"]),
        (lambda: SamplePlan(TWO, phases=(Phase("x", 0, 9), Phase("y", 5, 12))), ["phases", "disjoint", "'y'"]),
        (lambda: SamplePlan(TWO).with_phase("x", 0, 9).with_phase("y", 8, 12), ["phases", "disjoint"]),
        (lambda: SamplePlan(TWO).with_source(Source("c", 3), 1.0), ["share", "[0, 1)", "1.0"]),
        (lambda: SamplePlan(TWO).with_source(Source("c", 3), -0.1), ["share", "[0, 1)", "-0.1"]),
        (lambda: SamplePlan(TWO).with_source(Source("c", 3), math.nan), ["share", "nan"]),
        (lambda: SamplePlan(TWO).with_source(Source("c", 3), 1e-6), ["1e-06", "65536"]),
        (lambda: SamplePlan(TWO).with_source(Source("a", 3), 0.5), ["distinct", "'a'"]),
        (lambda: integer_weights([0.5, -0.5]), ["non-negative", "-1/2"]),
        (lambda: integer_weights([0.0, 0.0]), ["not all zero"]),
        (lambda: integer_weights([0.5, math.inf]), ["finite", "inf"]),
        (lambda: integer_weights([0.5, math.nan]), ["finite", "nan"]),
        (lambda: quota_schedule([]), ["1 to 255", "()"]),
        (lambda: quota_schedule([0, 0]), ["1..65536", "(0, 0)"]),
        (lambda: quota_schedule([2, -1]), ["non-negative", "(2, -1)"]),
        (lambda: quota_schedule([2**16, 1]), ["65536", "(65536, 1)"]),
        (lambda: quota_schedule([1, 1], [1, 0]), ["residual", "sum to 0", "[1, 0]"]),
        (lambda: quota_schedule([1, 1], [0]), ["residual", "one integer a source"]),
    ],
)
def test_refusals_name_what_and_why(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplePlan(TWO, (Segment(0, (1, -1)),)),
        lambda: SamplePlan(TWO, (Segment(0, (0, 0)),)),
        lambda: SamplePlan(TWO, (Segment(0, (2**16, 1)),)),
        lambda: SamplePlan(TWO, (Segment(0, (1, 1)), Segment(4, (0, 0)))),
        lambda: SamplePlan(TWO, epoch=-1),
        lambda: SamplePlan(TWO, phases=tuple(Phase(f"p{k}", k, k + 1) for k in range(256))),
    ],
    ids=["negative weight", "no weight", "weights too large", "no weight later", "negative epoch", "256 phases"],
)
def test_an_inconsistent_plan_is_refused_when_it_is_made(make: Callable[[], SamplePlan]) -> None:
    """Not at the first look-up, which may be hours later in another process (or never, for a far segment)."""
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (-2, 5), (5, 4)])
def test_look_ups_out_of_range_are_refused(start: int, stop: int) -> None:
    plan = SamplePlan(TWO)
    with pytest.raises(IndexError, match="start and stop"):
        plan.draws(start, stop)
    with pytest.raises(IndexError):
        plan[-1]
