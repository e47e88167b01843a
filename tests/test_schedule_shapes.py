"""linear, wsd, infinite_*, callables: each against equations written out again, or another library's schedule."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import get_linear_schedule_with_warmup, get_wsd_schedule

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.callbacks import RewarmCallback
from hf_pretrain_ext.schedules import (
    LRSchedule,
    RewarmConfig,
    infinite_cosine,
    infinite_linear,
    infinite_rsqrt,
    linear,
    wsd,
)

PEAK, CONST, LOW = 3e-4, 1.65e-4, 3e-5


def infinite(kind: str, t: int, total: int) -> float:
    """The released code's equations (method notes, 1.3) for T iterations: W = 1 %, Ncd = 0.6 T, Nconst = 0.85 T."""
    warm, cool, hold = 0.01 * total, 0.6 * total, 0.85 * total
    if t <= warm:
        return PEAK * t / warm
    n = t - warm
    if n <= cool:
        if kind == "cosine":
            return CONST + (PEAK - CONST) / 2 * (math.cos(math.pi * n / cool) + 1)
        if kind == "linear":
            return PEAK - (PEAK - CONST) * n / cool
        f = [1 / math.sqrt(1 + 10 * x) - 1 for x in (n / cool, 1.0)]
        return PEAK + (CONST - PEAK) * f[0] / f[1]
    if n <= hold:
        return CONST
    rate = math.log(CONST / LOW) / (total - warm - hold)
    return max(CONST * math.exp(-rate * (n - hold)), LOW)


@pytest.mark.parametrize(
    ("kind", "build"), [("cosine", infinite_cosine), ("rsqrt", infinite_rsqrt), ("linear", infinite_linear)]
)
def test_infinite_schedules_are_the_released_equations(kind: str, build: Any) -> None:
    schedule = build(total_steps=1000, peak_lr=PEAK)
    for step in range(1001):
        assert schedule(step) == pytest.approx(infinite(kind, step, 1000), rel=1e-12), step
    # The released code wraps round at T and gives 2.999e-4, 3.022e-4 or 3.184e-4 there.
    assert schedule(1000) == schedule(1001) == schedule(10**9) == pytest.approx(LOW, rel=1e-12)
    assert max(schedule(step) for step in range(2000)) <= PEAK


ALL: dict[str, LRSchedule] = {
    name: RewarmConfig(peak_lr=PEAK, schedule=name).build(997)
    for name in ("cosine", "linear", "wsd", "infinite_cosine", "infinite_rsqrt", "infinite_linear")
}


@pytest.mark.parametrize("name", ALL)
def test_continuous_at_every_joint(name: str) -> None:
    schedule = ALL[name]
    for before, after in zip(schedule.phases, schedule.phases[1:], strict=False):
        assert before.at(before.steps) == pytest.approx(after.at(0), rel=1e-12)
    steps = [schedule(step) for step in range(998)]
    longest = max(abs(a - b) for a, b in itertools.pairwise(steps[10:]))
    assert longest < PEAK / 50  # no jump after the warm-up; the steepest is the last 10 % of wsd
    assert schedule.total_steps == 997
    assert LRSchedule.from_identity(schedule.identity()) == schedule


def host_rates(build: Any, steps: int, **kwargs: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer, **kwargs)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_and_wsd_are_the_hosts() -> None:
    ours = linear(total_steps=100, peak_lr=1.0, min_lr=0.0, warmup=7)
    theirs = host_rates(get_linear_schedule_with_warmup, 100, num_warmup_steps=7, num_training_steps=100)
    assert [ours(step) for step in range(100)] == pytest.approx(theirs, abs=1e-12)
    ours = wsd(total_steps=100, peak_lr=1.0, min_lr="25%", start_lr="25%", warmup=7, decay=20)  # the host's start
    theirs = host_rates(
        get_wsd_schedule,
        101,
        num_warmup_steps=7,
        num_stable_steps=73,
        num_decay_steps=20,
        decay_type="linear",
        min_lr_ratio=0.25,
    )
    assert [ours(step) for step in range(101)] == pytest.approx(theirs, abs=1e-12)


def test_phases_in_steps_fractions_and_tokens() -> None:
    same = [
        infinite_cosine(total_steps=1000, peak_lr=1.0, warmup=20, cooldown=500, constant=200),
        infinite_cosine(total_steps=1000, peak_lr=1.0, warmup="2%", cooldown=0.5, constant="200 steps"),
        infinite_cosine(
            total_steps=1000, peak_lr=1.0, warmup="40k tokens", cooldown="1M tokens", constant="0.4M tokens",
            tokens_per_step=2000,
        ),
    ]  # fmt: skip
    assert same[0] == same[1] == same[2]
    with pytest.raises(ValueError, match="'1B tokens' is in tokens, but the tokens of a step are not known here"):
        wsd(total_steps=10, peak_lr=1.0, decay="1B tokens")


def rates(trainer: Any) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


def test_tokens_are_counted_from_the_data(tmp_path: Path) -> None:
    """Rows of 16 tokens in batches of 4: 64 tokens a step, so 128 tokens of warm-up are two steps."""
    trainer = extend(tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup="128 tokens", schedule="linear")))
    trainer.train()
    wanted = linear(total_steps=6, peak_lr=1e-2, warmup=2)
    assert rates(trainer) == pytest.approx([wanted(step) for step in range(6)], rel=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_a_function_of_the_users_own(plain: bool, tmp_path: Path) -> None:
    def own(step: int) -> float:
        return 1e-2 / (1 + step)

    trainer = tiny.trainer(tmp_path, RewarmCallback(schedule=own))
    (trainer if plain else extend(trainer)).train()
    assert rates(trainer) == pytest.approx([own(step) for step in range(6)], rel=1e-12)


def test_a_changed_function_is_refused_on_resume(tmp_path: Path) -> None:
    def build(power: int) -> Any:
        def own(step: int) -> float:
            return 1e-2 / (1 + step) ** power

        plugin = RewarmCallback(schedule=own)
        return extend(tiny.trainer(tmp_path, plugin, save_strategy="steps", save_steps=3))

    build(1).train()
    build(1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="learning rate of the checkpoint:"):
        build(2).train(resume_from_checkpoint=True)


def test_wrong_functions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a name or a function of the step, got 3"):
        RewarmCallback(schedule=3)  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ValueError, match="peak_lr must be a positive learning rate such as 3e-4, got None"):
        RewarmCallback()
    with pytest.raises(PluginError, match="must give a learning rate for every step, got nan for step 0"):
        extend(tiny.trainer(tmp_path, RewarmCallback(schedule=lambda step: math.nan)))
