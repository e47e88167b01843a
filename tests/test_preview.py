"""Preview against reality: what `preview()` says is what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer

from hf_pretrain_ext import extend, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.plugin import Setup, TrainerPlugin


def ragged(number: int, seed: int, longest: int) -> Dataset:
    generator = np.random.default_rng(seed)
    return Dataset.from_dict(
        {"input_ids": [generator.integers(1, 60, generator.integers(2, longest)).tolist() for _ in range(number)]}
    )


def padded(tmp_path: Path, *callbacks: Any, data: Any, **settings: Any) -> Trainer:
    trainer = tiny.trainer(tmp_path, *callbacks, data=data, **settings)
    trainer.data_collator = DataCollatorForLanguageModeling(train_tokenizer(["a b"], 260), mlm=False)
    return trainer


SETUPS: dict[str, dict[str, Any]] = {
    "cosine, samples": {},
    "wsd, two sources": {"schedule": "wsd", "two": True},
    "tokens": {"unit": "tokens"},
    "tokens, changing": {"unit": "tokens", "ratio_changes": {0.5: 0.1}, "two": True, "schedule": "infinite_cosine"},
    "epochs, additional": {"mode": "additional", "epochs": 3},
    "changing, additional": {"mode": "additional", "epochs": 2, "ratio_changes": {"30%": 0.5, 9: 0.125}},
    "callable": {"schedule": lambda step: 1e-3 / (1 + step)},
}


@pytest.mark.parametrize("name", SETUPS)
def test_what_is_predicted_is_what_happens(name: str, tmp_path: Path) -> None:
    """Rates, steps, samples, tokens, probes and the mixture of every step, each as the run then logs it."""
    options = dict(SETUPS[name])
    schedule, epochs = options.pop("schedule", "cosine"), options.pop("epochs", None)
    old: Any = ragged(30, 1, 30)
    if options.pop("two", False):
        old = {"a": ragged(30, 1, 30), "b": ragged(12, 2, 8)}
    length = {"num_train_epochs": epochs, "max_steps": -1} if epochs else {"max_steps": 24}
    probe = ForgettingCallback({"old": ragged(9, 3, 20)}, every=5, first_steps="sparse")
    replay = ReplayCallback(old, ratio=0.25, **options)
    trainer = extend(
        padded(
            tmp_path,
            RewarmCallback(schedule=schedule)
            if callable(schedule)
            else RewarmCallback(1e-2, schedule=schedule, warmup=3),
            replay,
            probe,
            data=ragged(40, 0, 40),
            **length,
        )
    )
    before = tiny.weights(trainer)
    preview = trainer.preview()
    assert all((before[key] == value).all() for key, value in tiny.weights(trainer).items())
    trainer.train()
    assert (preview.total_steps, preview.steps_per_epoch) == (
        trainer.state.max_steps,
        trainer.plugin_run.steps_per_epoch,
    )
    logs = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert preview.learning_rate is not None
    rates = dict(zip(preview.learning_rate["steps"], preview.learning_rate["rates"], strict=True))
    # A line after step s holds the rate of the update that made it, the s-th, which the schedule calls s − 1.
    assert {line["step"] - 1: line["learning_rate"] for line in logs} == pytest.approx(rates, abs=1e-15)
    realised = trainer.plugin_run.realised()
    assert {source.name: (source.samples, source.tokens) for source in preview.sources} == {
        name: (entry["samples"], entry["tokens"]) for name, entry in realised.items()
    }
    assert preview.tokens == sum(entry["tokens"] for entry in realised.values()) and preview.tokens_exact
    assert preview.marks["forgetting"] == probe.history.sets["old"]["steps"]
    changes = [change["step"] for change in preview.mixture]
    for line, after in zip(read_counts(tmp_path), [*read_counts(tmp_path)[1:], None], strict=True):
        if after is None:
            break
        drawn = after[1] - line[1]
        share = [change for change in preview.mixture if change["step"] <= line[0]][-1]["shares"]
        if preview.mixture[0]["unit"] == "samples":
            expected = np.array([share[name] for name in realised]) * preview.global_batch
            assert (np.abs(drawn - expected) < 1 + 0.4 * (len(changes) > 1)).all(), line


def read_counts(folder: Path) -> list[tuple[int, Any]]:
    """Step and samples of every source so far, at every line of the host's log."""
    found = {
        line["step"]: np.array([entry["samples"] for entry in line["counts"].values()])
        for line in read_trace(folder)
        if line["event"] == "log" and "loss" in line["scalars"]
    }
    return [(0, 0 * next(iter(found.values()))), *found.items()]


def test_the_trace_holds_the_preview(tmp_path: Path) -> None:
    """The report draws the plan from there; only some rows are read for it, so tokens are estimates."""
    trainer = extend(tiny.trainer(tmp_path, RewarmCallback(1e-2), ReplayCallback(tiny.rows(20, seed=2), ratio=0.25)))
    preview = trainer.preview().to_json()
    trainer.train()
    written = read_trace(tmp_path)[0]["preview"]
    assert preview["tokens_exact"] and not written["tokens_exact"] and preview["tokens"] == written["tokens"] == 384
    for entry in (preview, written):
        for source in [entry, *entry["sources"]]:
            source.pop("tokens_exact")
    assert written == json.loads(json.dumps(preview))


def test_preview_disturbs_nothing(tmp_path: Path) -> None:
    """Weights and logs of a run that was previewed before, and of one that was not, are equal."""
    results = []
    for folder, look in (("a", False), ("b", True)):
        plugins = [RewarmCallback(1e-2), ReplayCallback(tiny.rows(20, seed=2), ratio=0.25)]
        trainer = extend(tiny.trainer(tmp_path / folder, *plugins, dropout=0.1))
        if look:
            trainer.preview(), str(trainer.preview())
        trainer.train()
        results.append(trainer)
    assert tiny.same_weights(*results) and tiny.history(results[0]) == tiny.history(results[1])


def test_the_table_reads(tmp_path: Path) -> None:
    replay = ReplayCallback(
        {"wiki": tiny.rows(50, seed=2), "code": tiny.rows(30, seed=3)},
        ratio=0.2,
        weights={"wiki": 3, "code": 1},
        ratio_changes={"50%": 0.1},
    )
    trainer = extend(tiny.trainer(tmp_path, RewarmCallback(1e-2, warmup=10), replay, max_steps=100))
    lines = str(trainer.preview()).splitlines()
    assert lines[:2] == ["100 optimizer steps of 4 samples: 400 samples, 6,400 tokens", "10 steps an epoch, 10 epochs"]
    assert lines[3].split() == ["step", "learning", "rate", "train", "wiki", "code", "phases"]
    assert lines[4].split() == ["0", "0", "80.00%", "15.00%", "5.00%", "warm-up"]
    assert lines[6].split() == [
        "50",
        "0.00628",
        "90.00%",
        "7.50%",
        "2.50%",
        "decay",
    ]  # 1e-3 + 4.5e-3·(1 + cos(π·40/90))
    assert [line.split()[0] for line in lines[9:13]] == ["source", "train", "wiki", "code"]
    # 50 steps of 4 samples at 20 %, 50 at 10 %: 40 + 20 of 400, a quarter of them code.
    assert [line.split()[2:] for line in lines[11:13]] == [
        ["50", "45", "11.25%", "720", "11.25%", "0.90"],
        ["30", "15", "3.75%", "240", "3.75%", "0.50"],
    ]


def test_without_a_plan_or_a_schedule(tmp_path: Path) -> None:
    bare = extend(tiny.trainer(tmp_path)).preview()
    assert bare.learning_rate is None and bare.sources == () and bare.total_steps == 6 and bare.tokens == 6 * 4 * 16
    assert "the host's own" in str(bare) and "it is the Trainer's own" in str(bare)


def test_streams_are_estimated_from_their_first_rows(tmp_path: Path) -> None:
    old = tiny.rows(20, seed=2).to_iterable_dataset()
    preview = extend(tiny.trainer(tmp_path, ReplayCallback(old, ratio=0.25))).preview()
    train, replayed = preview.sources
    assert (replayed.rows, replayed.passes, replayed.samples, replayed.tokens) == (None, None, 6, 96)
    assert not replayed.tokens_exact and "a stream" in str(preview) and "about 96" in str(preview)
    assert train.samples == 18


class Phased(TrainerPlugin):
    name = "phased"

    def wrap_plan(self, plan: Any, setup: Setup) -> Any:
        return plan.with_phase("anneal", 8, 24)

    def marks(self, total_steps: int) -> list[int]:
        return list(range(0, total_steps, 7))


def test_phases_and_marks_of_any_plugin(tmp_path: Path) -> None:
    preview = extend(tiny.trainer(tmp_path, Phased(), max_steps=200)).preview()
    assert preview.phases == ({"name": "anneal", "start": 2, "stop": 6},)
    assert preview.marks == {"phased": list(range(0, 200, 7))}
    text = str(preview)
    assert "phased: at 29 steps: 0, 7, 14, 21, 28, 35, ..., 182, 189, 196" in text and "anneal" in text


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plugins = [RewarmCallback(1e-2), ReplayCallback(tiny.rows(20, seed=2), ratio=0.25)]
    extend(tiny.trainer(tmp_path / "run", *plugins)).preview(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and not list((tmp_path / "run").iterdir())
