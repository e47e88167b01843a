"""Learning-rate schedules and the units they are set in, against the paper's formula and the host's own schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from hf_pretrain_ext.forgetting import ForgettingConfig
from hf_pretrain_ext.replay import ReplayConfig
from hf_pretrain_ext.schedules import LRPhase, LRSchedule, RewarmConfig, cosine
from hf_pretrain_ext.trainer import PlanConfig, lambda_lr
from hf_pretrain_ext.units import to_rate, to_steps

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `cosine` with a start and an end not above the peak."""
    total = draw(st.integers(1, 3000))
    peak = draw(st.floats(1e-6, 10.0))
    share = st.floats(0, 1)
    return {
        "total_steps": total,
        "peak_lr": peak,
        "min_lr": peak * draw(share),
        "warmup": draw(st.integers(0, total - 1)),
        "start_lr": peak * draw(share),
    }


# --- the formula ------------------------------------------------------------------------------------


def paper(t: np.ndarray, total: int, warm: int, peak: float, low: float, start: float) -> np.ndarray:
    """Ibrahim et al. (2024), section 3, with 1 + cos x written as 2 cos² x/2, over all steps at once."""
    t = np.minimum(t, total).astype(np.float64)
    rising = start + (peak - start) * t / max(warm, 1)
    falling = low + (peak - low) * np.cos(np.pi * (t - warm) / (2 * (total - warm))) ** 2
    return np.where(t < warm, rising, falling)


@PROPERTY
@given(shapes())
def test_cosine_is_the_papers_formula(shape: dict[str, Any]) -> None:
    schedule = cosine(**shape)
    total, warm = shape["total_steps"], shape["warmup"]
    steps = np.arange(total + 50)
    expected = paper(steps, total, warm, shape["peak_lr"], shape["min_lr"], shape["start_lr"])
    assert np.abs(np.array([schedule(step) for step in steps.tolist()]) - expected).max() <= 1e-15 * shape["peak_lr"]


def test_the_papers_own_numbers() -> None:
    """405M: 3e-4 to 3e-5 over 132,366 steps, 1 % of them warm-up; a few rates worked out by hand."""
    schedule = cosine(total_steps=132_366, peak_lr=3e-4)
    warm = 1324  # 1 % of 132,366 is 1,323.66
    assert schedule.phases[0].steps == warm
    assert schedule(0) == 0
    assert schedule(warm // 2) == pytest.approx(1.5e-4, rel=1e-15)
    assert schedule(warm) == 3e-4
    middle = (132_366 - warm) // 2 + warm
    assert schedule(middle) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-15)
    assert schedule(132_366) == schedule(10**12) == 3e-5


@pytest.mark.parametrize(("total", "warm", "rate"), [(1000, 10, 0.1), (777, 0, 0.1), (500, 499, 0.5), (300, 30, 0.0)])
def test_cosine_agrees_with_the_hosts(total: int, warm: int, rate: float) -> None:
    """`cosine_with_min_lr` of transformers, stepped by torch; ours through `lambda_lr` on two parameter groups."""

    def optimizer() -> torch.optim.Optimizer:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        groups[1]["lr"] = 3e-5  # type: ignore[assignment]
        return torch.optim.SGD(groups, lr=3e-4)

    def run(optimizer: torch.optim.Optimizer, scheduler: Any) -> np.ndarray:
        rates = []
        for _ in range(total + 1):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return np.array(rates)

    ours, theirs = optimizer(), optimizer()
    schedule = cosine(total_steps=total, peak_lr=3e-4, min_lr=3e-4 * rate, warmup=warm)
    expected = run(theirs, get_cosine_with_min_lr_schedule_with_warmup(theirs, warm, total, min_lr_rate=rate))
    assert np.abs(run(ours, lambda_lr(ours, schedule, 3e-4)) - expected).max() <= 1e-12 * 3e-4


def test_steps_are_clamped_where_others_wrap() -> None:
    """After T the final rate holds. Negative controls: the host's cosine rises again after T, and the paper's
    released code, which takes t modulo T, is back at the peak at t = T."""
    total, warm = 100, 10
    schedule = cosine(total_steps=total, peak_lr=1.0, min_lr=0.1, warmup=warm)
    assert [schedule(t) for t in (total, total + 1, total + 50, 2 * total, 10**15)] == [0.1] * 5
    assert schedule(-5) == schedule(0) == 0.0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    host = get_cosine_schedule_with_warmup(optimizer, warm, total, num_cycles=0.5).lr_lambdas[0]
    assert host(total + 50) > 0.4
    wrapped = 0.1 + 0.9 / 2 * (1 + math.cos(math.pi * ((total % total) - warm) / (total - warm)))
    assert wrapped > 0.9


@PROPERTY
@given(shapes(), st.integers(0, 10**9))
def test_rates_never_leave_their_range(shape: dict[str, Any], beyond: int) -> None:
    """Never above the peak nor below start and end; the final rate, exactly, from T on; the peak, exactly, at W."""
    schedule = cosine(**shape)
    rates = [schedule(step) for step in range(shape["total_steps"] + 2)]
    ulp = 2e-16 * shape["peak_lr"]
    assert max(rates) <= shape["peak_lr"] + ulp
    assert min(rates) >= min(shape["start_lr"], shape["min_lr"]) - ulp
    assert schedule(shape["total_steps"] + beyond) == shape["min_lr"]
    assert schedule(shape["warmup"]) == pytest.approx(shape["peak_lr"], rel=1e-15)
    assert schedule.total_steps == shape["total_steps"]


@PROPERTY
@given(shapes())
def test_rates_are_continuous_at_the_joints(shape: dict[str, Any]) -> None:
    """No step changes the rate by more than the steepest slope of its phase, joints and end included."""
    schedule, total, warm, peak = cosine(**shape), shape["total_steps"], shape["warmup"], shape["peak_lr"]
    rising = (peak - shape["start_lr"]) / max(warm, 1)
    falling = (peak - shape["min_lr"]) / 2 * math.pi / (total - warm)
    for step in range(total + 1):
        change = schedule(step + 1) - schedule(step)
        if step < warm:
            assert -1e-15 * peak <= change <= rising * (1 + 1e-9) + 1e-15 * peak
        else:
            assert -falling * (1 + 1e-9) - 1e-15 * peak <= change <= 1e-15 * peak


def test_other_shapes_of_phases() -> None:
    schedule = LRSchedule("x", (LRPhase("up", 4, "linear", 0.0, 1.0), LRPhase("flat", 3, "constant", 1.0, 1.0)))
    assert [schedule(step) for step in range(9)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


@PROPERTY
@given(shapes())
def test_identity_round_trips_through_json(shape: dict[str, Any]) -> None:
    """What a checkpoint keeps gives the same schedule, every rate to the last bit."""
    schedule = cosine(**shape)
    again = LRSchedule.from_identity(json.loads(json.dumps(schedule.identity(), allow_nan=False)))
    assert again == schedule and again.identity() == schedule.identity()
    assert again.describe() == schedule.describe()
    assert all(again(step) == schedule(step) for step in range(0, shape["total_steps"] + 3, 7))


def test_identity_tells_schedules_apart() -> None:
    base: dict[str, Any] = {"total_steps": 100, "peak_lr": 1e-3, "min_lr": 1e-4, "warmup": 10}
    changes = [{}, {"total_steps": 101}, {"peak_lr": 2e-3}, {"min_lr": 0}, {"warmup": 11}, {"start_lr": 1e-5}]
    assert len({json.dumps(cosine(**{**base, **change}).identity()) for change in changes}) == len(changes)


# --- units ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "total", "steps"),
    [
        (0, 1000, 0),
        (20, 1000, 20),
        (5000, 1000, 5000),  # longer than the run: not this function's business
        (0.0, 1000, 0),
        (0.02, 1000, 20),
        (0.01, 150, 2),  # 1.5 rounds up
        (0.01, 149, 1),
        (0.999, 100, 100),
        ("20", 1000, 20),
        ("0", 1000, 0),
        (" 1_000 steps ", 9000, 1000),
        ("1 step", 1000, 1),
        ("500 steps", 1000, 500),
        ("0.02", 1000, 20),
        ("2e-2", 1000, 20),
        ("2%", 1000, 20),
        ("2.5 %", 1000, 25),
        ("0%", 1000, 0),
        ("99.9%", 1000, 999),
    ],
)
def test_lengths(value: Any, total: int, steps: int) -> None:
    found = to_steps(value, total, "warmup")
    assert found == steps and type(found) is int


@PROPERTY
@given(st.integers(1, 9999), st.integers(1, 10**7))
def test_fractions_are_rounded_to_the_nearest_step(hundredths: int, total: int) -> None:
    """As a float, as its text and as a percentage: within half a step of the exact product."""
    exact = Fraction(hundredths, 10_000) * total
    for value in (hundredths / 10_000, str(hundredths / 10_000), f"{hundredths / 100}%"):
        assert abs(to_steps(value, total, "warmup") - exact) <= Fraction(1, 2) + Fraction(1, 10**6)


NO_LENGTHS = [-1, -0.5, 1.0, 1.5, 1000.0, math.nan, math.inf, -math.inf, True, False, None, [1]]
NO_LENGTHS += [
    "",
    " ",
    "steps",
    "-5",
    "5 epochs",
    "2B token s",
    "-2B tokens",
    "100%",
    "250%",
    "1.0",
    "1.5 steps",
    "1e3 steps",
    "nan",
]
NO_LENGTHS += ["inf", "0x10", "5 5", "2%%", "½", "1__0", "1_%"]


@pytest.mark.parametrize("value", NO_LENGTHS)
def test_lengths_refused(value: Any) -> None:
    """The message names the setting, shows the value and says what is allowed."""
    with pytest.raises(ValueError) as caught:
        to_steps(value, 1000, "warmup")
    message = str(caught.value)
    shown = repr(value).strip("'").strip()
    assert "warmup" in message and shown in message, message
    assert "int (steps)" in message and "fraction of the run" in message and '"500 steps"' in message, message


@pytest.mark.parametrize(
    ("value", "peak", "rate"),
    [
        ("10%", 3e-4, 3e-5),
        ("10 %", 1.2e-4, 1.2e-5),
        ("100%", 3e-4, 3e-4),
        ("0%", 3e-4, 0.0),
        ("12.5%", 8e-4, 1e-4),
        (1e-5, 3e-4, 1e-5),
        ("1e-5", 3e-4, 1e-5),
        ("0.1", 3e-4, 0.1),  # absolute, like peak_lr
        (".5", 1.0, 0.5),
        (0, 3e-4, 0.0),
        ("0", 3e-4, 0.0),
    ],
)
def test_rates(value: Any, peak: float, rate: float) -> None:
    found = to_rate(value, peak, "min_lr")
    assert found == rate and type(found) is float


def test_relative_rates_are_decimal() -> None:
    """10 % of 3e-4 is 3e-5, which it is not in floats."""
    assert 3e-4 * 0.1 != 3e-5
    for peak, tenth in ((1e-3, 1e-4), (3e-4, 3e-5), (1.2e-4, 1.2e-5), (6e-5, 6e-6), (7e-6, 7e-7)):
        assert to_rate("10%", peak, "min_lr") == tenth


@pytest.mark.parametrize(
    "value",
    [-1e-5, math.nan, math.inf, True, None, [1], "", "ten", "-1e-5", "-10%", "10%%", "1e999", "nan", "10 percent"],
)
def test_rates_refused(value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        to_rate(value, 3e-4, "min_lr")
    message = str(caught.value)
    shown = "inf" if value == "1e999" else repr(value)
    assert "min_lr" in message and shown in message and "3e-5" in message and '"10%"' in message, message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total_steps": 0}, ["total_steps", "positive int", "0"]),
        ({"total_steps": -3}, ["total_steps", "positive int", "-3"]),
        ({"total_steps": 10.0}, ["total_steps", "positive int", "10.0"]),
        ({"total_steps": True}, ["total_steps", "True"]),
        ({"peak_lr": 0.0}, ["peak_lr", "positive", "0.0"]),
        ({"peak_lr": -1e-3}, ["peak_lr", "positive", "-0.001"]),
        ({"peak_lr": math.nan}, ["peak_lr", "nan"]),
        ({"peak_lr": math.inf}, ["peak_lr", "inf"]),
        ({"peak_lr": "3e-4"}, ["peak_lr", "'3e-4'"]),
        ({"peak_lr": True}, ["peak_lr", "True"]),
        ({"min_lr": 2e-3}, ["min_lr", "0.002", "peak_lr", "0.001"]),
        ({"min_lr": "101%"}, ["min_lr", "0.00101", "peak_lr", "0.001"]),
        ({"min_lr": "low"}, ["min_lr", "'low'"]),
        ({"start_lr": -1.0}, ["start_lr", "-1.0"]),
        ({"warmup": 100}, ["warmup", "100 steps"]),
        ({"warmup": 500}, ["warmup", "500 steps", "100 steps"]),
        ({"warmup": 0.999}, ["warmup", "100 steps"]),
        ({"warmup": 2.0}, ["warmup", "2.0", "[0, 1)"]),
    ],
)
def test_schedules_refused(arguments: dict[str, Any], words: list[str]) -> None:
    settings: dict[str, Any] = {"total_steps": 100, "peak_lr": 1e-3, **arguments}
    with pytest.raises(ValueError) as caught:
        cosine(**settings)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# --- settings from the command line -----------------------------------------------------------------


def parse(config: type, *words: str) -> Any:
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(list(words))
    return parsed


@pytest.mark.parametrize("config", [RewarmConfig, ReplayConfig, ForgettingConfig, PlanConfig])
def test_help_can_be_printed_and_says_something_of_every_field(config: type) -> None:
    """argparse formats the help texts: a stray per cent sign would break `--help`."""
    parser = HfArgumentParser(config)
    text = " ".join(parser.format_help().split())
    for name, entry in config.__dataclass_fields__.items():  # type: ignore[attr-defined]
        assert f"--{name}" in text
        assert len(entry.metadata["help"]) > 20
    assert "%%" not in text


@pytest.mark.parametrize(
    ("warmup", "steps"), [("0.02", 20), ("20", 20), ("2%", 20), ("500 steps", 500), ("0", 0), (0.02, 20), (20, 20)]
)
def test_rewarm_settings_are_read(warmup: Any, steps: int) -> None:
    """A length means the same on the command line, in a file of settings and in Python."""
    if isinstance(warmup, str):
        made = [parse(RewarmConfig, "--peak_lr", "1e-3", "--warmup", warmup, "--min_lr", "10%")]
        made += [HfArgumentParser(RewarmConfig).parse_dict({"peak_lr": 1e-3, "warmup": warmup})[0]]
    else:
        made = [HfArgumentParser(RewarmConfig).parse_dict({"peak_lr": 1e-3, "warmup": warmup})[0]]
        made += [RewarmConfig(peak_lr=1e-3, warmup=warmup)]
    for config in made:
        assert config.build(1000) == cosine(total_steps=1000, peak_lr=1e-3, min_lr=1e-4, warmup=steps)


def test_rewarm_settings_reach_the_schedule() -> None:
    words = ["--peak_lr", "3e-4", "--schedule", "cosine", "--warmup", "7", "--min_lr", "3e-6", "--start_lr", "50%"]
    config = parse(RewarmConfig, *words, "--total_steps", "60")
    assert config.build(1000) == cosine(total_steps=60, peak_lr=3e-4, min_lr=3e-6, warmup=7, start_lr=1.5e-4)
    assert parse(RewarmConfig, "--peak_lr", "3e-4").build(1000) == cosine(total_steps=1000, peak_lr=3e-4)
    with pytest.raises(SystemExit):
        parse(RewarmConfig)


def test_rewarm_settings_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of \['cosine'.*got 'triangle'"):
        RewarmConfig(peak_lr=1e-3, schedule="triangle").build(10)


@pytest.mark.parametrize("total_steps", [-3, 0])
def test_a_schedule_without_steps_is_refused(total_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"total_steps must be a positive int .*, got {total_steps}"):
        RewarmConfig(peak_lr=1e-3, total_steps=total_steps).build(10)


def test_replay_settings_are_read() -> None:
    assert parse(ReplayConfig) == ReplayConfig(ratio=0.05, mode="equivalent", order="shuffled")
    read = parse(ReplayConfig, "--ratio", "0.25", "--mode", "additional", "--order", "original")
    assert read == ReplayConfig(ratio=0.25, mode="additional", order="original")
    for words in (["--mode", "more"], ["--order", "host"], ["--ratio", "some"]):
        with pytest.raises(SystemExit):
            parse(ReplayConfig, *words)


def test_forgetting_settings_are_read() -> None:
    assert parse(ForgettingConfig) == ForgettingConfig()
    words = ["--every", "2%", "--first_steps", "sparse", "--max_samples", "12", "--batch_size", "3"]
    assert parse(ForgettingConfig, *words) == ForgettingConfig("2%", "sparse", 12, 3)
    for every in ("50", "0.05", "5%", "10 steps"):
        assert to_steps(parse(ForgettingConfig, "--every", every).every, 1000, "every") in (50, 10)


def test_plan_settings_are_read() -> None:
    assert parse(PlanConfig) == PlanConfig(order="shuffled", seed=None, window=None)
    read = parse(PlanConfig, "--order", "host", "--seed", "7", "--window", "32")
    assert read == PlanConfig(order="host", seed=7, window=32)
    with pytest.raises(SystemExit):
        parse(PlanConfig, "--order", "random")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReplayConfig(ratio=1.0), ["ratio", "at least 0 and below 1", "1.0"]),
        (lambda: ReplayConfig(ratio=-0.1), ["ratio", "-0.1"]),
        (lambda: ReplayConfig(ratio=math.nan), ["ratio", "nan"]),
        (lambda: ReplayConfig(ratio=True), ["ratio", "True"]),
        (lambda: ReplayConfig(ratio="0.1"), ["ratio", "'0.1'"]),  # type: ignore[arg-type]
        (lambda: ReplayConfig(mode="more"), ["mode", "equivalent", "additional", "'more'"]),  # type: ignore[arg-type]
        (lambda: ReplayConfig(order="host"), ["order", "shuffled", "original", "'host'"]),  # type: ignore[arg-type]
        (lambda: ForgettingConfig(first_steps="some"), ["first_steps", "'dense'", "'sparse'", "'some'"]),
        (lambda: ForgettingConfig(max_samples=0), ["max_samples", "positive int", "0"]),
        (lambda: ForgettingConfig(max_samples=True), ["max_samples", "True"]),
        (lambda: ForgettingConfig(batch_size=-1), ["batch_size", "positive int", "-1"]),
        (lambda: ForgettingConfig(batch_size=2.0), ["batch_size", "2.0"]),  # type: ignore[arg-type]
        (lambda: ForgettingConfig(every="0"), ["every", "at least one step", "'0'"]),
        (lambda: ForgettingConfig(every="often"), ["every", "'often'", "fraction of the run"]),
        (lambda: ForgettingConfig(every=1.5), ["every", "1.5", "[0, 1)"]),  # type: ignore[arg-type]
    ],
)
def test_settings_refused(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
