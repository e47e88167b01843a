"""Replay of several sources, in samples and in tokens, at ratios that change: read off what the model was given.

Every row says in its first two ids which source it is from and which row it is, so that a batch can be decoded.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import warm
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, HfArgumentParser, Trainer, TrainerCallback

from hf_pretrain_ext import PlanConfig, PluginError, extend, read_trace
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.checkpoint import CheckpointError, read_state
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.lengths import run_length
from hf_pretrain_ext.plan import SamplePlan
from hf_pretrain_ext.plan import tokens as tokens_module
from hf_pretrain_ext.replay import ReplayConfig

DIGITS = 15
NAMES = ("train", "a", "b", "c")
Row = tuple[str, int, int]
"""Source, row number and tokens."""


def ids_of(name: str, row: int, length: int) -> list[int]:
    base = 1 + DIGITS * NAMES.index(name)
    digits = [base + row // DIGITS, base + row % DIGITS]
    return (digits + [base + (row * k) % DIGITS for k in range(length)])[:length]


def table(name: str, lengths: Sequence[int]) -> Dataset:
    """A row of each length (2 or more), whose ids name the source and the row."""
    ids = [ids_of(name, row, length) for row, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def alike(name: str, number: int, length: int = tiny.LENGTH) -> Dataset:
    return table(name, [length] * number)


def some_lengths(number: int, seed: int, low: int = 2, high: int = 24) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(number)]


def pad(features: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(feature["input_ids"]) for feature in features)
    return {
        "input_ids": torch.tensor([[*f["input_ids"], *[0] * (longest - len(f["input_ids"]))] for f in features]),
        "labels": torch.tensor([[*f["input_ids"], *[-100] * (longest - len(f["input_ids"]))] for f in features]),
    }


def decode(ids: torch.Tensor) -> list[Row]:
    found = []
    for row in ids.tolist():
        source = (row[0] - 1) // DIGITS
        base = 1 + DIGITS * source
        found.append((NAMES[source], (row[0] - base) * DIGITS + row[1] - base, sum(token > 0 for token in row)))
    return found


class Watch(TrainerCallback):
    """What the model was trained on, by step, read off its inputs."""

    def __init__(self) -> None:
        self.steps: dict[int, list[Row]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, arguments: Any, named: Any) -> None:
            if module.training:
                self.steps.setdefault(state.global_step, []).extend(decode(named["input_ids"]))

        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True)

    def counts(self) -> list[tuple[int, ...]]:
        """Samples of each source in every step."""
        return [tuple(Counter(name for name, _, _ in rows)[name] for name in NAMES) for rows in self.steps.values()]

    def all(self) -> list[Row]:
        return [row for rows in self.steps.values() for row in rows]


def make(folder: Path, plugin: ReplayCallback, data: Any, watch: Watch, **arguments: Any) -> Trainer:
    trainer = tiny.trainer(folder, plugin, watch, data=data, **arguments)
    trainer.data_collator = pad
    return trainer


def run(
    folder: Path, plugin: ReplayCallback, data: Any = None, resume: Path | None = None, **arguments: Any
) -> tuple[Any, Watch]:
    watch = Watch()
    trainer = extend(make(folder, plugin, alike("train", 40) if data is None else data, watch, **arguments))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, watch


def planned(folder: Path, plugin: ReplayCallback, data: Any, **arguments: Any) -> tuple[SamplePlan, int, int]:
    """The plan of a run that is not made, its global batch and its steps."""
    trainer = extend(make(folder, plugin, data, Watch(), **arguments))
    plan, batch = trainer.plugin_run.build_plan(), trainer.plugin_run.global_batch
    assert plan is not None
    return plan, batch, run_length(trainer.args, plan.epoch, batch)[1]


# --- several sources, in samples --------------------------------------------------------------------


def sources(**sizes: int) -> dict[str, Dataset]:
    return {name: alike(name, number) for name, number in sizes.items()}


def test_weights_are_exact_shares(tmp_path: Path) -> None:
    """Half of 12 replayed, in the proportion 3 : 2 : 1 in any scale and any order of the names: 3, 2 and 1 a step."""
    for number, weights in enumerate(({"a": 3, "b": 2, "c": 1}, {"c": 0.125, "a": 0.375, "b": 0.25})):
        plugin = ReplayCallback(sources(a=9, b=50, c=4), ratio=0.5, weights=weights)
        _, watch = run(tmp_path / str(number), plugin, per_device_train_batch_size=12)
        assert watch.counts() == [(6, 3, 2, 1)] * 6


def test_shares_that_do_not_fit_a_step_are_kept_within_a_sample(tmp_path: Path) -> None:
    plugin = ReplayCallback(sources(a=9, b=50), ratio=0.3, weights={"a": 5, "b": 1})
    _, watch = run(tmp_path, plugin, per_device_train_batch_size=8, max_steps=25)
    shares = (Fraction(7, 10), Fraction(1, 4), Fraction(1, 20))
    for step, counts in enumerate(itertools.accumulate(watch.counts(), lambda a, b: _added(a, b)), start=1):
        for count, share in zip(counts, shares, strict=False):
            assert abs(count - 8 * step * share) <= Fraction(3, 4)


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def test_default_weights_are_sizes(tmp_path: Path) -> None:
    _, watch = run(tmp_path, ReplayCallback(sources(a=30, b=10), ratio=0.5), per_device_train_batch_size=8)
    assert watch.counts() == [(4, 3, 1, 0)] * 6


def test_sources_keep_their_names_and_passes(tmp_path: Path) -> None:
    """Names in counts, log, trace and terminal; a pass of each source holds every row once."""
    plugin = ReplayCallback(sources(a=4, b=6), ratio=0.5, weights={"a": 1, "b": 3})
    trainer, watch = run(tmp_path, plugin, per_device_train_batch_size=8, max_steps=8)
    realised = trainer.plugin_run.realised()
    assert {name: entry["samples"] for name, entry in realised.items()} == {"train": 32, "a": 8, "b": 24}
    assert [entry["replayed"] for entry in realised.values()] == [False, True, True]
    for name, number in (("a", 4), ("b", 6)):
        rows = [row for source, row, _ in watch.all() if source == name]
        assert all(sorted(rows[at : at + number]) == list(range(number)) for at in range(0, len(rows), number))
    line = [line for line in trainer.state.log_history if "replay_ratio" in line][-1]
    assert (line["share_train"], line["share_a"], line["share_b_tokens"]) == (0.5, 0.125, 0.375)
    start = read_trace(tmp_path)[0]
    assert "replay: a 8 samples, 2.00 passes over 4 old rows" in start["describe"]
    assert start["plugins"]["replay"]["weights"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "weights must name the datasets ['a', 'b'], got ['a']"),
        ({"a": 1, "b": 1, "c": 1}, "got ['a', 'b', 'c']"),
        ({"a": 1, "b": 0}, "weights['b'] must be a positive, finite number, got 0"),
        ({"a": 1, "b": -1}, "got -1"),
        ({"a": 1, "b": math.inf}, "got inf"),
        ({"a": 1, "b": math.nan}, "got nan"),
        ({"a": 1, "b": "1"}, "got '1'"),
        ({"a": True, "b": 1}, "weights['a'] must be a positive, finite number, got True"),
    ],
)
def test_wrong_weights_fail_at_construction(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ReplayCallback(sources(a=3, b=3), ratio=0.5, weights=weights)
    assert message in str(error.value)


@pytest.mark.parametrize("given", [{}, {1: alike("a", 3)}, {"": alike("a", 3)}], ids=["none", "number", "empty name"])
def test_datasets_need_names(given: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="dataset must hold at least one dataset, by names that are strings"):
        ReplayCallback(given, ratio=0.5)


def test_a_share_below_the_smallest_is_refused(tmp_path: Path) -> None:
    plugin = ReplayCallback(sources(a=9, b=9), ratio=0.25, weights={"a": 1, "b": 1e-9})
    with pytest.raises(PluginError, match=r"replay: share number 2 is .* leave it out"):
        extend(make(tmp_path, plugin, alike("train", 40), Watch()))


# --- ratios that change -----------------------------------------------------------------------------

# Ten steps of 4 rows of 16 tokens: step 4 is two fifths of the run and 256 tokens, and what is nearest to it.
FOURTH = [
    *(4, "4", "4 steps", 0.4, "0.4", "40%", 0.36, "44%"),
    *("256 tokens", "250 tokens", "280 tokens", "0.287k tokens", "0.000287M tokens"),
]


@pytest.mark.parametrize("point", FOURTH)
def test_a_point_may_be_written_in_many_ways(point: Any, tmp_path: Path) -> None:
    plugin = ReplayCallback(alike("a", 30), ratio=0.25, ratio_changes={point: 0.5})
    plan, batch, steps = planned(tmp_path, plugin, alike("train", 40), max_steps=10)
    assert [(s.start, s.weights) for s in plan.segments] == [(0, (3, 1)), (16, (1, 1))]
    assert (batch, steps) == (4, 10)


def test_the_ratio_changes_at_its_steps(tmp_path: Path) -> None:
    """One of 4, from step 4 on two, from half of 14 steps none, and three of 4 in the last steps."""
    changes = {4: 0.5, 0.5: 0, "12 steps": 0.75}
    plugin = ReplayCallback({"replay": alike("a", 30)}, ratio=0.25, ratio_changes=changes)
    trainer, watch = run(tmp_path, plugin, max_steps=14)
    assert [replayed for _, replayed, _, _ in watch.counts()] == [1] * 4 + [2] * 3 + [0] * 5 + [3] * 2
    rows = [row for name, row, _ in watch.all() if name == "a"]
    assert len(rows) == len(set(rows)) == 16
    start = read_trace(tmp_path)[0]
    assert "replay: ratio 0.25, 0.5 from 4, 0 from 0.5, 0.75 from 12 steps in samples" in start["describe"]
    assert start["plugins"]["replay"]["ratio_changes"] == {"4": 0.5, "0.5": 0, "12 steps": 0.75}
    assert trainer.plugin_run.realised()["replay"]["samples"] == 16


def test_every_step_of_a_phase_is_floor_or_ceil(tmp_path: Path) -> None:
    """0.3, 0.1 and 0.65 of 8 with three sources: whole samples above or below, in total within one and a half."""
    plugin = ReplayCallback(
        sources(a=30, b=20), ratio=0.3, weights={"a": 2, "b": 1}, ratio_changes={0.3: 0.1, "60%": 0.65}
    )
    _, watch = run(tmp_path, plugin, per_device_train_batch_size=8, max_steps=30)
    counts = watch.counts()
    expected, seen = Fraction(0), 0
    for step, (_, a, b, _) in enumerate(counts):
        ratio = Fraction(3, 10) if step < 9 else Fraction(1, 10) if step < 18 else Fraction(65, 100)
        assert math.floor(8 * ratio) <= a + b <= math.ceil(8 * ratio), step
        expected, seen = expected + 8 * ratio, seen + a + b
        assert abs(seen - expected) <= Fraction(3, 2)


def test_weights_hold_in_every_phase(tmp_path: Path) -> None:
    plugin = ReplayCallback(sources(a=30, b=20), ratio=0.25, weights={"a": 2, "b": 1}, ratio_changes={3: 0.75})
    _, watch = run(tmp_path, plugin, per_device_train_batch_size=12)
    assert watch.counts() == [(9, 2, 1, 0)] * 3 + [(3, 6, 3, 0)] * 3


WRONG_POINTS: list[tuple[dict[Any, Any], str]] = [
    ({0: 0.1}, "ratio_changes must hold points after the start, got '0'"),
    ({"0%": 0.1}, "ratio_changes must hold points after the start, got '0%'"),
    ({"0 tokens": 0.1}, "ratio_changes must hold points after the start, got '0 tokens'"),
    ({0.0: 0.1}, "ratio_changes must hold points after the start, got '0.0'"),
    ({"later": 0.1}, "ratio_changes must be an int (steps), a float in [0, 1)"),
    ({"100%": 0.1}, "ratio_changes"),
    ({1.5: 0.1}, "ratio_changes"),
    ({-1: 0.1}, "ratio_changes"),
    ({"3 epochs": 0.1}, "ratio_changes"),
    ({"2.5 steps": 0.1}, "ratio_changes"),
    ({True: 0.1}, "ratio_changes"),
    ({3: 1.0}, "ratio_changes['3'] must be what is replayed out of all"),
    ({3: -0.1}, "ratio_changes['3']"),
    ({3: "10%"}, "ratio_changes['3']"),
    ({3: 1e-9}, "ratio_changes['3'] must be 0 or at least 1/65536"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_POINTS, ids=[str(changes) for changes, _ in WRONG_POINTS])
def test_wrong_points_fail_at_construction(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ReplayCallback(alike("a", 9), ratio=0.25, ratio_changes=changes)
    assert message in str(error.value)


EPOCHS = {"max_steps": -1, "num_train_epochs": 1}
LATE: list[tuple[dict[Any, Any], dict[str, Any]]] = [
    ({6: 0.5}, {"max_steps": 6}),
    ({7: 0.5}, {"max_steps": 6}),
    ({4: 0.5, 2: 0.1}, {"max_steps": 6}),
    ({0.8: 0.5, 0.2: 0.1}, {"max_steps": 6}),
    ({3: 0.5, "50%": 0.1}, {"max_steps": 6}),
    ({"1 tokens": 0.5}, {"max_steps": 6}),
    ({0.01: 0.5}, {"max_steps": 6}),
    ({"1B tokens": 0.5}, {"max_steps": 6}),
    ({10: 0.5}, EPOCHS),
    ({20: 0.5}, {**EPOCHS, "mode": "additional"}),
    ({0.8: 0.5, 0.2: 0.1}, {**EPOCHS, "mode": "additional"}),
    ({0.9: 0.0, 0.2: 0.6875}, {**EPOCHS, "mode": "additional", "ratio": 0.5}),
    ({0.99: 0.0, 0.01: 0.99}, {**EPOCHS, "mode": "additional", "ratio": 0.99}),
]


@pytest.mark.parametrize(("changes", "arguments"), LATE, ids=[f"{changes} {given}" for changes, given in LATE])
def test_points_outside_the_run_or_out_of_order_fail_at_extend(
    changes: dict[Any, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    given = dict(arguments)
    settings = {"ratio": 0.25, **{name: given.pop(name) for name in ("mode", "ratio") if name in given}}
    plugin = ReplayCallback(alike("a", 9), **settings, ratio_changes=changes)
    with pytest.raises(PluginError) as error:
        extend(make(tmp_path, plugin, alike("train", 40), Watch(), **given))
    assert "ratio_changes" in str(error.value)


def test_points_in_tokens_need_token_ids(tmp_path: Path) -> None:
    """Rows without `input_ids`: a length in tokens cannot be told, and the setting is named."""
    rows = Dataset.from_dict({"inputs_embeds": [[[0.0] * 16] * 4] * 8, "labels": [[1] * 4] * 8})
    plugin = ReplayCallback(rows, ratio=0.25, ratio_changes={"256 tokens": 0.5})
    with pytest.raises(PluginError, match=r"ratio_changes='256 tokens' is in tokens, but the tokens of a step"):
        extend(tiny.trainer(tmp_path, plugin, data=rows))


# --- modes ------------------------------------------------------------------------------------------


def seen_of_new(folder: Path, rows: int, **settings: Any) -> tuple[Counter[int], int, int]:
    """How often each new row is drawn over the whole run, epochs · rows, and the global batch."""
    arguments = {name: settings.pop(name) for name in ("num_train_epochs", "per_device_train_batch_size")}
    plugin = ReplayCallback(alike("a", 220), mode="additional", allow_no_effect=True, **settings)
    plan, batch, steps = planned(folder, plugin, alike("train", rows), max_steps=-1, **arguments)
    draws = plan.draws(0, steps * batch)
    drawn = Counter(draws.row[draws.source == 0].tolist())
    return drawn, arguments["num_train_epochs"] * rows, batch


ADDITIONAL: list[dict[str, Any]] = [
    {"rows": 30, "ratio": 0.25},
    {"rows": 31, "ratio": 0.25, "per_device_train_batch_size": 1},
    {"rows": 30, "ratio": 0.25, "ratio_changes": {0.5: 0.5}},
    {"rows": 30, "ratio": 0.25, "ratio_changes": {0.5: 0.5}, "num_train_epochs": 2},
    {"rows": 60, "ratio": 0.5, "ratio_changes": {5: 0.25, 12: 0}, "num_train_epochs": 3},
    {"rows": 45, "ratio": 0.1, "ratio_changes": {"10%": 0.3, "256 tokens": 0.6}},
    {"rows": 60, "ratio": 0.0, "ratio_changes": {0.25: 0.5}, "per_device_train_batch_size": 8},
    {"rows": 62, "ratio": 0.0, "ratio_changes": {0.24: 0.5}, "per_device_train_batch_size": 10},
]


@pytest.mark.parametrize("case", ADDITIONAL, ids=str)
def test_additional_replay_sees_all_new_data(case: dict[str, Any], tmp_path: Path) -> None:
    """Every new row once an epoch; more only as whole steps ask for, a step an epoch."""
    given = {"num_train_epochs": 1, "per_device_train_batch_size": 4, **case}
    drawn, wanted, batch = seen_of_new(tmp_path, **given)
    assert min(drawn[row] for row in range(case["rows"])) >= given["num_train_epochs"], (sum(drawn.values()), wanted)
    assert sum(drawn.values()) < wanted + (given["num_train_epochs"] + 1) * batch


def test_additional_replay_sees_all_new_data_whatever_the_numbers(tmp_path: Path) -> None:
    """120 random runs with ratios that change at fractions and steps: no new row may be left out."""
    generator = random.Random(0)
    short = []
    for number in range(120):
        points = sorted(generator.sample(range(5, 95), generator.choice([1, 2])))
        case = {
            "rows": generator.randint(40, 200),
            "ratio": generator.randint(0, 90) / 100,
            "ratio_changes": {point / 100: generator.randint(0, 90) / 100 for point in points},
            "num_train_epochs": generator.choice([1, 1, 3]),
            "per_device_train_batch_size": generator.choice([1, 5, 10]),
        }
        drawn, _, _ = seen_of_new(tmp_path / str(number), **case)
        if min(drawn[row] for row in range(case["rows"])) < case["num_train_epochs"]:
            short.append((case, sum(drawn.values())))
    assert not short, (len(short), short[0])


def test_the_model_sees_every_new_row_as_often_as_there_are_epochs(tmp_path: Path) -> None:
    """By hand: 0.75 and 0.5 of the halves of D draws are new, so two epochs of 30 rows take D = 96."""
    plugin = ReplayCallback(sources(a=20, b=20), ratio=0.25, mode="additional", ratio_changes={0.5: 0.5})
    trainer, watch = run(tmp_path, plugin, alike("train", 30), max_steps=-1, num_train_epochs=2)
    assert trainer.state.max_steps == 24 and trainer.plugin_run.steps_per_epoch == 12
    drawn = Counter(row for name, row, _ in watch.all() if name == "train")
    assert drawn == dict.fromkeys(range(30), 2)
    assert len(watch.all()) == 96


def test_equivalent_replay_keeps_the_samples_of_a_stage(tmp_path: Path) -> None:
    for epochs in (1, 3):
        plugin = ReplayCallback(sources(a=20, b=20), ratio=0.25, ratio_changes={0.5: 0.5})
        plan, batch, steps = planned(
            tmp_path / str(epochs), plugin, alike("train", 40), max_steps=-1, num_train_epochs=epochs
        )
        assert (plan.epoch, steps * batch) == (40, 40 * epochs)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("changes", [None, {0.5: 0.75}], ids=["fixed", "changing"])
def test_equivalent_replay_keeps_the_tokens_of_a_stage(epochs: int, changes: Any, tmp_path: Path) -> None:
    """New rows of 8, old ones of 24 and 4 tokens: the stage reads the tokens of the new data, to a step each epoch."""
    old = {"a": alike("a", 20, 24), "b": alike("b", 20, 4)}
    plugin = ReplayCallback(old, ratio=0.5, unit="tokens", weights={"a": 1, "b": 2}, ratio_changes=changes)
    plan, batch, steps = planned(tmp_path, plugin, alike("train", 120, 8), max_steps=-1, num_train_epochs=epochs)
    assert plan.unit == "tokens"
    tokens = tokens_read(plan, steps * batch)
    assert abs(sum(tokens) - 960 * epochs) <= (24 * batch) * (epochs + 1)
    first = 960 * epochs * (0.5 if changes is None else 0.625)
    assert sum(tokens[1:]) == pytest.approx(first, rel=0.05)


def tokens_read(plan: SamplePlan, stop: int) -> list[int]:
    draws = plan.draws(0, stop)
    return [
        int(source.lengths[draws.row[draws.source == k]].sum())  # type: ignore[index]
        for k, source in enumerate(plan.sources)
    ]


@pytest.mark.parametrize("epochs", [1, 2])
def test_additional_replay_in_tokens_sees_all_new_data(epochs: int, tmp_path: Path) -> None:
    """New rows of 6, old ones of 18 tokens, a third of tokens replayed: one old row for six new ones."""
    plugin = ReplayCallback({"a": alike("a", 30, 18)}, ratio=1 / 3, unit="tokens", mode="additional")
    plan, batch, steps = planned(tmp_path, plugin, alike("train", 60, 6), max_steps=-1, num_train_epochs=epochs)
    assert plan.epoch == 70
    draws = plan.draws(0, steps * batch)
    drawn = Counter(draws.row[draws.source == 0].tolist())
    assert min(drawn[row] for row in range(60)) >= epochs


# --- shares in tokens -------------------------------------------------------------------------------


def ragged_data() -> tuple[Dataset, dict[str, Dataset]]:
    old = {"a": table("a", some_lengths(25, 2)), "b": table("b", some_lengths(30, 3, 2, 9))}
    return table("train", some_lengths(60, 1)), old


def bounds(plan: SamplePlan) -> dict[str, Fraction]:
    """Half of ((1 − s)·L of a source + s·L of the others together)."""
    weights = plan.segments[0].weights
    longest = [int(source.lengths.max()) for source in plan.sources]  # type: ignore[union-attr]
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    return {
        source.name: Fraction(max(longest)) if share else Fraction(0)
        for source, share in zip(plan.sources, shares, strict=True)
    }


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 3}],
    ids=str,
)
def test_realised_shares_of_tokens_are_within_the_bound(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every logged step, over several blocks; what is logged is what the model was given."""
    monkeypatch.setattr(tokens_module, "_BLOCK", 32)
    data, old = ragged_data()
    plugin = ReplayCallback(old, ratio=0.25, unit="tokens", weights={"a": 2, "b": 3})
    trainer, watch = run(tmp_path, plugin, data, max_steps=30, **arguments)
    plan = trainer.plugin_run.plan
    limits, shares = bounds(plan), {"train": Fraction(3, 4), "a": Fraction(1, 10), "b": Fraction(3, 20)}
    lines = {line["step"]: line for line in trainer.state.log_history if "replay_ratio_tokens" in line}
    assert sorted(lines) == list(range(1, 31))
    tokens: Counter[str] = Counter()
    for step, rows in watch.steps.items():
        for name, _, length in rows:
            tokens[name] += length
        total = sum(tokens.values())
        line = lines[step + 1]
        assert line["replay_ratio_tokens"] == pytest.approx((tokens["a"] + tokens["b"]) / total, rel=1e-12)
        for name, share in shares.items():
            assert line[f"share_{name}_tokens"] == pytest.approx(tokens[name] / total, rel=1e-12)
            assert abs(tokens[name] - share * total) <= limits[name] + Fraction(1, 100)
    traced = [line["scalars"] for line in read_trace(tmp_path) if "replay_ratio_tokens" in line.get("scalars", {})]
    assert [scalars["replay_ratio_tokens"] for scalars in traced] == [
        lines[step]["replay_ratio_tokens"] for step in sorted(lines)
    ]
    assert {name: entry["tokens"] for name, entry in trainer.plugin_run.realised().items()} == dict(tokens)
    # In samples the ratio is another one: short rows.
    assert lines[30]["replay_ratio"] > 0.3


def test_default_weights_in_tokens_are_tokens(tmp_path: Path) -> None:
    """20 rows of 20 and 40 of 5 tokens: 400 and 200 tokens, hence two thirds and one third of what is replayed."""
    old = {"a": alike("a", 20, 20), "b": alike("b", 40, 5)}
    plugin = ReplayCallback(old, ratio=0.3, unit="tokens")
    trainer, watch = run(tmp_path, plugin, alike("train", 90, 10), max_steps=60)
    assert trainer.plugin_run.plan.segments[0].weights == (7, 2, 1)
    tokens: Counter[str] = Counter()
    for name, _, length in watch.all():
        tokens[name] += length
    total = sum(tokens.values())
    for name, share in (("train", 0.7), ("a", 0.2), ("b", 0.1)):
        assert abs(tokens[name] - share * total) <= float(bounds(trainer.plugin_run.plan)[name]) + 0.01


def test_ratio_changes_in_tokens(tmp_path: Path) -> None:
    """Rows of 8 and 24 tokens: a quarter of tokens is one old row in ten, from step 10 on a half is one in four."""
    plugin = ReplayCallback(
        {"replay": alike("a", 40, 24)}, ratio=0.25, unit="tokens", ratio_changes={0.5: 0.5, "15 steps": 0}
    )
    _, watch = run(tmp_path, plugin, alike("train", 90, 8), per_device_train_batch_size=20, max_steps=20)
    assert [replayed for _, replayed, _, _ in watch.counts()] == [2] * 10 + [5] * 5 + [0] * 5


def test_a_padding_collator_of_transformers(tmp_path: Path) -> None:
    """DataCollatorForLanguageModeling pads; ids of a real tokenizer; tokens of padding are not counted."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocab_size=257)
    data, old = (table("train", some_lengths(60, 1)), table("a", some_lengths(25, 2, 2, 8)))
    trainer = Trainer(
        model=tiny.model(vocabulary=300),
        args=tiny.arguments(tmp_path, max_steps=25),
        train_dataset=data.select_columns("input_ids"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    extend(trainer, ReplayCallback(old.select_columns("input_ids"), ratio=0.2, unit="tokens")).train()
    plan = trainer.plugin_run.plan
    assert plan.unit == "tokens"
    limit = float(bounds(plan)["replay"])
    realised = trainer.plugin_run.realised()
    expected = tokens_read(plan, 100)
    assert [entry["tokens"] for entry in realised.values()] == expected
    assert abs(expected[1] - 0.2 * sum(expected)) <= limit + 0.01
    lines = [line for line in trainer.state.log_history if "replay_ratio_tokens" in line]
    assert lines[-1]["replay_ratio_tokens"] == expected[1] / sum(expected)


@pytest.mark.parametrize("which", ["lists", "one list", "stream"])
def test_without_lengths_shares_are_expected_and_said_to_be(
    which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, old = ragged_data()
    sources: dict[str, Any] = {"a": old["a"], "b": list(old["b"])}
    train: Any = data
    if which == "lists":
        sources["a"], train = list(old["a"]), list(data)
    if which == "stream":
        sources["b"] = old["b"].to_iterable_dataset(num_shards=3)
    plugin = ReplayCallback(sources, ratio=0.25, unit="tokens", weights={"a": 2, "b": 3})
    trainer, watch = run(tmp_path, plugin, train, max_steps=120)
    said = capsys.readouterr().err
    unknown = "train, a, b" if which == "lists" else "b"
    assert f"row lengths of {unknown} are not known, so the share in tokens is an expected value" in said
    assert "replay: ratio 0.25 in tokens (expected)" in said
    assert trainer.plugin_run.plan.unit == "samples"
    tokens: Counter[str] = Counter()
    for name, _, length in watch.all():
        tokens[name] += length
    total = sum(tokens.values())
    # 480 draws, several passes over each source: what is left is the unfinished pass of each and one sample.
    for name, share in (("train", 0.75), ("a", 0.1), ("b", 0.15)):
        assert tokens[name] / total == pytest.approx(share, abs=0.03)


def test_known_lengths_are_not_called_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, old = ragged_data()
    run(tmp_path, ReplayCallback(old, ratio=0.25, unit="tokens"), data)
    said = capsys.readouterr().err
    assert "replay: ratio 0.25 in tokens" in said and "expected" not in said


@pytest.mark.parametrize("mode", ["equivalent", "additional"])
def test_for_blocks_of_one_length_tokens_are_samples(mode: str, tmp_path: Path) -> None:
    """Bit for bit: weights, rows and length of the run."""
    results = []
    for unit in ("samples", "tokens"):
        plugin = ReplayCallback(
            sources(a=30, b=10), ratio=0.3, unit=unit, mode=mode, weights={"a": 5, "b": 2}, ratio_changes={0.5: 0.1}
        )
        results.append(run(tmp_path / unit, plugin, max_steps=-1, num_train_epochs=1))
    (first, watch), (second, other) = results
    assert watch.steps == other.steps and tiny.same_weights(first, second)


def test_a_column_of_lengths_is_taken_as_it_is(tmp_path: Path) -> None:
    """`length_column_name` names it; here it says twice the truth of the old rows, so they come half as often."""
    data, old = alike("train", 60, 8), alike("a", 40, 8)
    data, old = data.add_column("size", [8] * 60), old.add_column("size", [16] * 40)
    plans = {}
    for column in ("size", "other"):
        plugin = ReplayCallback(old, ratio=0.5, unit="tokens")
        plans[column] = planned(tmp_path / column, plugin, data, max_steps=30, length_column_name=column)[0]
    assert plans["size"].counts(120).tolist() == [80, 40]
    assert plans["other"].counts(120).tolist() == [60, 60] and plans["other"].unit == "samples"


def test_lengths_follow_a_selection(tmp_path: Path) -> None:
    """Rows that were shuffled and selected: lengths by row number as the rows are read."""
    data, old = ragged_data()
    chosen = old["a"].shuffle(seed=3).select(range(5, 20))
    plugin = ReplayCallback({"a": chosen, "b": old["b"].with_format("torch")}, ratio=0.25, unit="tokens")
    plan, _, _ = planned(tmp_path, plugin, data.with_format("numpy"))
    for source, rows in zip(plan.sources, (data, chosen, old["b"]), strict=True):
        assert source.lengths is not None
        assert source.lengths.tolist() == [len(ids) for ids in rows["input_ids"]]


def test_rows_of_other_lengths_in_samples_get_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows a third as long: 0.5 in samples is a quarter in tokens; with unit='tokens' there is nothing to say."""
    for unit, noted in (("samples", True), ("tokens", False)):
        plugin = ReplayCallback(alike("a", 40, 4), ratio=0.5, unit=unit)
        extend(make(tmp_path, plugin, alike("train", 40, 12), Watch()))
        said = capsys.readouterr().err
        assert ("a ratio of 0.5 in samples is about 0.25 in tokens. Pass unit='tokens'" in said) == noted


def test_the_plan_follows_planconfig_in_tokens_too(tmp_path: Path) -> None:
    """Training rows in their original order; the replayed ones in theirs."""
    data, old = ragged_data()
    watch = Watch()
    plugin = ReplayCallback(old, ratio=0.3, unit="tokens", order="original")
    trainer = extend(make(tmp_path, plugin, data, watch, max_steps=12), plan=PlanConfig(order="original"))
    trainer.train()
    for name, number in (("train", 60), ("a", 25), ("b", 30)):
        rows = [row for source, row, _ in watch.all() if source == name]
        assert rows == [count % number for count in range(len(rows))] and rows


# --- settings ---------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "ratio": 0.25,
    "mode": "additional",
    "unit": "tokens",
    "weights": {"a": 3, "b": 1.5},
    "ratio_changes": {"0.5": 0.1, "2B tokens": 0.05},
}


def test_settings_are_json_and_make_the_same_plugin() -> None:
    plugin = ReplayCallback(sources(a=3, b=3), **SETTINGS)
    saved = json.loads(json.dumps(plugin.settings()))
    assert saved == {"order": "shuffled", **SETTINGS}
    assert ReplayCallback(sources(a=3, b=3), **saved).settings() == plugin.settings()
    assert ReplayConfig(**saved) == plugin.config


def test_settings_are_readable_from_files(tmp_path: Path) -> None:
    """Dicts by name in JSON and YAML; a YAML key that is a number too, which `ReplayCallback` takes."""
    import yaml

    parser = HfArgumentParser(ReplayConfig)
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    for found in (
        parser.parse_json_file(str(tmp_path / "settings.json"))[0],
        parser.parse_yaml_file(str(tmp_path / "settings.yaml"))[0],
        parser.parse_dict(SETTINGS)[0],
    ):
        assert found == ReplayConfig(**SETTINGS)
    given = yaml.safe_load("{0.5: 0.1, 2B tokens: 0.05}")
    assert ReplayCallback(sources(a=3), ratio=0.25, ratio_changes=given).settings()["ratio_changes"] == {
        "0.5": 0.1,
        "2B tokens": 0.05,
    }


def test_settings_are_readable_from_a_command_line() -> None:
    parser = HfArgumentParser(ReplayConfig)
    assert parser.parse_args_into_dataclasses(["--ratio", "0.25", "--unit", "tokens"])[0].unit == "tokens"
    given = ["--ratio", "0.25", "--weights", '{"a": 3}', "--ratio_changes", '{"0.5": 0.1}']
    found = parser.parse_args_into_dataclasses(given)[0]
    assert found == ReplayConfig(ratio=0.25, weights={"a": 3}, ratio_changes={"0.5": 0.1})


def test_wrong_values_in_a_config_are_named() -> None:
    for wrong, name in (({"unit": "words"}, "unit"), ({"mode": "x"}, "mode"), ({"order": "host"}, "order")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            ReplayConfig(**wrong)


# --- resume -----------------------------------------------------------------------------------------


def token_shares(**changed: Any) -> ReplayCallback:
    _, old = ragged_data()
    given = {"ratio": 0.3, "unit": "tokens", "weights": {"a": 2, "b": 3}, "ratio_changes": {7: 0.6}, **changed}
    return ReplayCallback(given.pop("datasets", old), **given)


RESUMES = [(0, 1), (2, 2), pytest.param(0, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)]


@pytest.mark.resume
@pytest.mark.parametrize(("workers", "accumulation"), RESUMES)
def test_resume_of_a_resume_in_tokens_is_exact(
    workers: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps in blocks of 16 draws, three epochs, a ratio that changes at step 7; cut after 5 and after 10 steps."""
    monkeypatch.setattr(tokens_module, "_BLOCK", 16)
    data = ragged_data()[0].select(range(16))
    options: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
        "dropout": 0.1,
    }
    whole, watch = run(tmp_path / "whole", token_shares(), data, **options)
    saving = {**options, "save_strategy": "steps", "save_steps": 5}
    folder = tmp_path / "cut"
    run(folder, token_shares(), data, **saving)
    for step in (5, 10):
        resumed, rest = run(folder, token_shares(), data, folder / f"checkpoint-{step}", **saving)
        assert rest.steps == {at: rows for at, rows in watch.steps.items() if at >= step}
        assert tiny.same_weights(whole, resumed)
        assert resumed.plugin_run.realised() == whole.plugin_run.realised()
        # The order was computed from the saved cursor on, not from draw 0.
        assert [cursor.index for cursor in resumed.plugin_run.plan.cursors] == [16 if step == 5 else 28]
        assert [line for line in tiny.history(resumed) if "replay_ratio" in line] == [
            line for line in tiny.history(whole) if "replay_ratio" in line
        ]
    cursors = {step: read_state(folder / f"checkpoint-{step}")["cursor"] for step in (5, 10)}
    # The last start of a block: 16 draws each from 0 on, and from draw 28 on, where the ratio changes.
    assert {step: cursor["index"] for step, cursor in cursors.items()} == {5: 16, 10: 28}
    for step, cursor in cursors.items():
        drawn = [row for rows in watch.steps.values() for row in rows][: cursor["index"]]
        assert cursor["draws"] == [sum(name == mine for name, _, _ in drawn) for mine in ("train", "a", "b")], step
        assert cursor["tokens"] == [sum(n for name, _, n in drawn if name == mine) for mine in ("train", "a", "b")]


def test_the_comparison_of_runs_can_fail(tmp_path: Path) -> None:
    data, _ = ragged_data()
    seen = [
        run(tmp_path / str(number), token_shares(**changed), data, max_steps=4)[1].steps
        for number, changed in enumerate(
            (
                {"ratio_changes": None},
                {"ratio_changes": None, "ratio": 0.5},
                {"ratio_changes": None, "weights": {"a": 9, "b": 3}},
                {"ratio_changes": None, "unit": "samples"},
                {"ratio_changes": {3: 0.9}},
            )
        )
    ]
    assert all(one != other for one, other in itertools.combinations(seen, 2))


CHANGED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "weights": ({"weights": {"a": 1, "b": 3}}, ["plugins.replay.weights.a: 2 → 1", "plan.segments[0].weights"]),
    "unit": ({"unit": "samples"}, ["plugins.replay.unit: 'tokens' → 'samples'", "plan.unit: 'tokens' → 'samples'"]),
    "a later ratio": (
        {"ratio_changes": {7: 0.5}},
        ["plugins.replay.ratio_changes.7: 0.6 → 0.5", "plan.segments[1].weights"],
    ),
    "a later point": (
        {"ratio_changes": {8: 0.6}},
        ["ratio_changes.7: 0.6 → absent", "plan.segments[1].start: 28 → 32"],
    ),
    "no change": ({"ratio_changes": None}, ["plugins.replay.ratio_changes", "plan.segments"]),
    "names": (
        {
            "weights": {"c": 2, "b": 3},
            "datasets": {"c": table("c", some_lengths(25, 2)), "b": table("b", some_lengths(30, 3, 2, 9))},
        },
        ["plan.sources[1].name: 'a' → 'c'", "plugins.replay.weights.a: 2 → absent"],
    ),
    "data": (
        {"datasets": {"a": table("a", some_lengths(25, 9)), "b": table("b", some_lengths(30, 3, 2, 9))}},
        ["data.a: "],
    ),
}


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    run(folder, token_shares(), ragged_data()[0], max_steps=10, save_strategy="steps", save_steps=5)
    return folder / "checkpoint-5"


@pytest.mark.parametrize("change", CHANGED)
def test_changed_settings_are_refused_with_their_differences(change: str, checkpointed: Path, tmp_path: Path) -> None:
    settings, expected = CHANGED[change]
    with pytest.raises(CheckpointError) as refusal:
        run(tmp_path, token_shares(**settings), ragged_data()[0], checkpointed, max_steps=10)
    for text in expected:
        assert text in str(refusal.value)


def test_what_writes_the_same_in_other_words_goes_on(checkpointed: Path, tmp_path: Path) -> None:
    """The order of weights, and other workers, micro-batches and folders."""
    same: Mapping[str, Any] = {"weights": {"b": 3, "a": 2}}
    _, watch = run(
        tmp_path,
        token_shares(**same),
        ragged_data()[0],
        checkpointed,
        max_steps=10,
        dataloader_num_workers=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    _, whole = run(tmp_path / "whole", token_shares(), ragged_data()[0], max_steps=10)
    assert watch.steps == {step: rows for step, rows in whole.steps.items() if step >= 5}


class SavesInAStep(TrainerCallback):
    """What the host does on SIGTERM: a checkpoint inside the step after `at`, and the end."""

    def __init__(self, at: int):
        self.at = at
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            raise KeyboardInterrupt


@pytest.mark.resume
@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_inside_a_step_knows_whole_steps_only(workers: int, tmp_path: Path) -> None:
    """A stream as a source, cut in the middle of step 5, in the second epoch: its mark is where step 4 left it."""

    def make() -> ReplayCallback:
        old = {"a": alike("a", 9), "b": alike("b", 40).to_iterable_dataset(num_shards=3)}
        return ReplayCallback(old, ratio=0.5, weights={"a": 1, "b": 3}, ratio_changes={3: 0.75})

    options: dict[str, Any] = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "dropout": 0.1,
        "dataloader_num_workers": workers,
    }
    data = alike("train", 24)
    whole, watch = run(tmp_path / "whole", make(), data, **options)
    # What workers of one more epoch would begin from: the end, not the first row.
    (reader,) = whole.plugin_run._dataset.readers.values()
    assert reader.mark().number == sum(name == "b" for name, _, _ in watch.all())
    signal = SavesInAStep(4)
    cut = extend(make_with(tmp_path / "cut", make(), data, signal, **options))
    signal.trainer = cut
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    state = read_state(tmp_path / "cut" / "checkpoint-4")
    taken = [name for step in range(4) for name, _, _ in watch.steps[step]]
    assert state["streams"]["b"]["number"] == taken.count("b") > 0
    assert [row[0] for row in state["counts"]] == [taken.count(name) for name in ("train", "a", "b")]
    resumed, rest = run(tmp_path / "on", make(), data, tmp_path / "cut" / "checkpoint-4", **options)
    assert rest.steps == {at: rows for at, rows in watch.steps.items() if at >= 4}
    assert tiny.same_weights(whole, resumed)
    assert resumed.plugin_run.realised() == whole.plugin_run.realised()


def make_with(folder: Path, plugin: ReplayCallback, data: Any, callback: TrainerCallback, **arguments: Any) -> Trainer:
    trainer = tiny.trainer(folder, plugin, callback, data=data, **arguments)
    trainer.data_collator = pad
    return trainer


# --- two ranks --------------------------------------------------------------------------------------


def ranks(folder: Path, case: str, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{case}-{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs on two ranks, and their resumes in the second and in the third epoch by new trainers."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*warm.ranks(2), str(Path(__file__).with_name("mixture_worker.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["stream", "tokens", "changing"])
@pytest.mark.slow
def test_two_ranks_see_the_samples_of_one(
    case: str, on_two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mixture_worker

    monkeypatch.setattr(tokens_module, "_BLOCK", mixture_worker.BLOCK)
    one = mixture_worker.run(case, tmp_path, batch=8)
    two = ranks(on_two_ranks, case, "whole")
    assert [rank["world"] for rank in two] == [2, 2] and len(one["rows"]) == 9
    for step, rows in one["rows"].items():
        assert two[0]["rows"][step] + two[1]["rows"][step] == rows, step
        assert len(two[0]["rows"][step]) == 4
    assert two[0]["counts"] == two[1]["counts"] == one["counts"]
    assert two[0]["segments"] == two[1]["segments"] == one["segments"] and len(one["segments"]) == 2


@pytest.mark.distributed
@pytest.mark.resume
@pytest.mark.parametrize("case", ["stream", "tokens", "changing"])
@pytest.mark.parametrize("step", [4, 7])
def test_two_ranks_resume_exactly_in_later_epochs(case: str, step: int, on_two_ranks: Path) -> None:
    """Epochs of three steps: step 4 is the second of the second epoch, step 7 the second of the third. The resume at 7
    goes on from a checkpoint of the run that was resumed at 4."""
    whole, resumed = (ranks(on_two_ranks, case, name) for name in ("whole", f"resumed-{step}"))
    for theirs, ours in zip(whole, resumed, strict=True):
        assert ours["rows"] == {at: rows for at, rows in theirs["rows"].items() if at >= step}
        assert len(ours["rows"]) == 9 - step
        assert all(torch.equal(ours["weights"][key], value) for key, value in theirs["weights"].items())
        assert ours["counts"] == theirs["counts"]
        assert ours["segments"] == theirs["segments"]
