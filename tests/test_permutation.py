"""Row orders: that they are permutations, that they look random, and that the host's order is the host's.

Chi-square thresholds are five standard deviations above the mean: with fixed keys nothing is flaky, and a visible
unevenness (a round too few, a word reused) is far beyond them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.plan.counter import bounded, derive_key, random_words
from hf_pretrain_ext.plan.permutation import MAX_ROWS, SMALL, PassOrder, feistel, shuffles

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)
KEYS = st.integers(0, 2**64 - 1)


def assert_uniform(values: np.ndarray, cells: int) -> None:
    """`values` in 0..cells − 1 fall into all cells alike: neither too unevenly nor too evenly."""
    observed = np.bincount(values, minlength=cells)
    assert len(observed) == cells
    expected = len(values) / cells
    assert expected >= 20
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = cells - 1
    spread = 5 * math.sqrt(2 * freedom)
    assert freedom - spread < chi_square < freedom + spread + 5, f"chi-square {chi_square:.1f} for {freedom} degrees"


# --- the generator ----------------------------------------------------------------------------------


def test_words_are_splitmix64() -> None:
    """The first outputs for seed 1234567 that Rosetta Code and the reference C program print."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert random_words(1234567, np.arange(5)).tolist() == words


@PROPERTY
@given(KEYS, st.integers(0, 2**63 - 100))
def test_words_follow_python_integers(key: int, start: int) -> None:
    """SplitMix64 once more in unbounded Python integers, at any position."""
    mask, expected = 2**64 - 1, []
    for counter in range(start, start + 5):
        z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert random_words(key, np.arange(start, start + 5)).tolist() == expected


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000])
def test_bounded_is_even(bound: int) -> None:
    values = bounded(random_words(5, np.arange(50_000)), bound).astype(np.int64)
    assert values.min() >= 0 and values.max() == bound - 1
    if bound > 1:
        assert_uniform(values, bound)


def test_keys_tell_their_parts_apart() -> None:
    parts: list[tuple[int | str, ...]] = [(1, "a"), ("1", "a"), ("a", 1), ("a",), ("", "a"), ("a", ""), (1, "a", "")]
    parts += [("ab", "c"), ("a", "bc"), ("abc",), (-1,), (1,), (11,), (1, 1), ("1\x1f1",), ("1", "1")]
    assert len({derive_key(*each) for each in parts}) == len(parts)
    assert all(0 <= derive_key(*each) < 2**64 for each in parts)
    # Written down once: a key must not depend on the process, the platform or the version.
    assert derive_key(7, "rows", "wiki") == 12833170159977088820


# --- bijections -------------------------------------------------------------------------------------


@PROPERTY
@given(KEYS, st.integers(1, 100_000))
def test_feistel_is_a_bijection(key: int, n: int) -> None:
    images = feistel(key, np.arange(n), n)
    assert np.array_equal(np.sort(images), np.arange(n))


def test_feistel_is_a_bijection_for_every_small_n() -> None:
    for n in range(1, 400):
        assert np.array_equal(np.sort(feistel(n * 7919, np.arange(n), n)), np.arange(n)), n


@PROPERTY
@given(KEYS, st.integers(10**5, MAX_ROWS), st.data())
def test_feistel_has_no_collisions_on_huge_ranges(key: int, n: int, data: st.DataObject) -> None:
    """Consecutive positions, strides and both ends: distinct images inside the range."""
    start = data.draw(st.integers(0, n - 4000))
    stride = max(n // 4001, 1)
    positions = np.unique(
        np.concatenate([np.arange(start, start + 4000), np.arange(4000) * stride, n - 1 - np.arange(100)])
    )
    images = feistel(key, positions, n)
    assert images.min() >= 0 and images.max() < n
    assert len(np.unique(images)) == len(positions)


@pytest.mark.parametrize("n", [MAX_ROWS, MAX_ROWS - 1, 2**61 + 1, (2**31 - 1) ** 2, 2**32, 2**32 + 1])
def test_feistel_at_the_edges_of_its_words(n: int) -> None:
    """Where a × b is n exactly and where it is just above: no overflow in 64-bit words."""
    positions = np.concatenate([np.arange(3000), n - 1 - np.arange(3000), n // 2 + np.arange(3000)])
    images = feistel(11, positions, n)
    assert images.min() >= 0 and images.max() < n
    assert len(np.unique(images)) == len(positions)
    assert_uniform((images // (-(-n // 16))).astype(np.int64), 16)


@PROPERTY
@given(KEYS, st.integers(1, 2000), st.integers(0, 10**9))
def test_shuffles_are_bijections(key: int, n: int, number: int) -> None:
    for row in shuffles(key, np.array([number, number + 1]), n):
        assert np.array_equal(np.sort(row), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 5, 300, SMALL - 1, SMALL, SMALL + 1])
def test_rows_of_many_passes_equal_rows_one_by_one(n: int) -> None:
    """The vectorised look-up over several passes, in any order, gives what a fresh object gives for each number."""
    generator = np.random.default_rng(n)
    numbers = generator.integers(0, 40 * n if n < SMALL else 3 * n, 200)
    numbers[:6] = [0, n - 1, n, 2 * n - 1, 2 * n, 0]
    rows = PassOrder(key=9, n=n).rows(numbers)
    singles = [int(PassOrder(key=9, n=n).rows(np.array([number]))[0]) for number in numbers]
    assert rows.tolist() == singles
    kept = PassOrder(key=9, n=n)
    assert [int(kept.rows(np.array([number]))[0]) for number in numbers] == singles  # whatever was asked before


# --- randomness -------------------------------------------------------------------------------------


def test_small_shuffles_are_uniform_over_passes_and_over_keys() -> None:
    """All 24 orders of four rows occur alike: over passes of one key, and over keys at one pass."""
    number = {order: k for k, order in enumerate(itertools.permutations(range(4)))}
    over_passes = shuffles(123, np.arange(24_000), 4)
    over_keys = np.concatenate([shuffles(derive_key(key), np.array([0]), 4) for key in range(4_800)])
    for orders in (over_passes, over_keys):
        assert_uniform(np.array([number[tuple(order)] for order in orders.tolist()]), 24)


@pytest.mark.parametrize("n", [1000, 70_000, 10**12])
def test_images_of_fixed_points_are_uniform_over_keys(n: int) -> None:
    positions = np.array([0, 1, n // 2, n - 1])
    images = np.array([feistel(derive_key(key), positions, n) for key in range(3_000)])
    for column in images.T:
        assert_uniform(column // (-(-n // 20)), 20)


@pytest.mark.parametrize("n", [70_000, 10**12])
def test_successive_differences_are_uniform(n: int) -> None:
    """Neighbours, and positions one Feistel column apart, land at unrelated places."""
    for gap in (1, 2, math.isqrt(n - 1) + 1, -(-n // (math.isqrt(n - 1) + 1))):
        positions = np.arange(60_000)
        differences = (feistel(77, positions + gap, n) - feistel(77, positions, n)) % n
        assert_uniform(differences // (-(-n // 64)), 64)


@pytest.mark.parametrize("n", [40, 1000, 70_000])
def test_passes_agree_no_more_often_than_chance(n: int) -> None:
    """Two independent orders of n rows agree at one place on average, whatever n (a Poisson variable of mean 1)."""
    order = PassOrder(key=4, n=n)
    passes = [order.rows(np.arange(number * n, (number + 1) * n)) for number in range(25)]
    agreements = [int((a == b).sum()) for a, b in itertools.combinations(passes, 2)]
    assert abs(np.mean(agreements) - 1) < 5 / math.sqrt(len(agreements))
    assert max(agreements) < 10


@pytest.mark.parametrize("n", [50, 70_000])
def test_keys_give_unrelated_orders(n: int) -> None:
    orders = [PassOrder(key=key, n=n).rows(np.arange(n)) for key in (0, 1, 2, 2**63, 2**64 - 1)]
    assert all(int((a == b).sum()) < 10 for a, b in itertools.combinations(orders, 2))


# --- the host's order -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 5), (40, 42), (1000, 0), (70_000, 123)])
def test_host_order_is_accelerates(n: int, seed: int) -> None:
    """Rows of `order="host"` over several epochs are those of accelerate's `SeedableRandomSampler`."""
    sampler = SeedableRandomSampler(range(n), data_seed=seed, generator=torch.Generator())
    epochs = 3
    expected = [row for _ in range(epochs) for row in sampler]
    plan = SamplePlan((Source("train", n, order="host"),), seed=seed)
    assert plan.draws(0, epochs * n).row.tolist() == expected
    assert [plan[i].row for i in (epochs * n - 1, 0, n - 1)] == [expected[i] for i in (epochs * n - 1, 0, n - 1)]
    if n > 2:
        assert SamplePlan((Source("train", n, order="host"),), seed=seed + 1).draws(0, n).row.tolist() != expected[:n]
