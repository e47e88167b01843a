"""Losses and gradients that are not finite: the rows that did it are named, and what was asked for is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import PluginTrainerMixin, extend, read_trace
from hf_pretrain_ext.callbacks import ReplayCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError

POISON = 63
"""A token id that no ordinary row holds."""


def rows(number: int, seed: int, bad: tuple[int, ...] = ()) -> Any:
    data = tiny.rows(number, seed=seed, high=POISON)

    def spoil(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"input_ids": [POISON, *row["input_ids"][1:]]} if index in bad else row

    return data.map(spoil, with_indices=True)


class Poisoned(Trainer):
    """The loss of a batch that holds POISON is not finite."""

    kind = float("nan")

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * self.kind if (inputs["input_ids"] == POISON).any() else loss


class Overflow(Trainer):
    """The loss is finite, its gradient is not: d sqrt(x)/dx at 0."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + torch.sqrt(loss - loss.detach()) if (inputs["input_ids"] == POISON).any() else loss


def run(folder: Path, action: str | None, cls: type[Trainer] = Poisoned, **settings: Any) -> Trainer:
    plugins = [RewarmCallback(1e-2), ReplayCallback(rows(12, 2, bad=(5,)), ratio=0.25)]
    trainer = tiny.trainer(folder, *plugins, cls=cls, data=rows(40, 1), **{"max_steps": 20, **settings})
    extend(trainer, on_nonfinite=action).train()  # type: ignore[arg-type]  # what a user may pass
    return trainer


def events(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_trace(folder) if line["event"] == "nonfinite"]


def finite(trainer: Trainer) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in tiny.weights(trainer).values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rows_that_did_it_are_named(accumulation: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 5 of the replayed data is among the rows reported, at the step where the plan says it comes up."""
    size = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = run(tmp_path, "skip", **size)
    plan = trainer.plugin_run.plan
    assert plan is not None
    hits = [i for i in range(80) if plan.sources[plan[i].source].name == "replay" and plan[i].row == 5]
    found = events(tmp_path)
    assert [event["step"] for event in found] == [i // 4 for i in hits] and hits
    for event, i in zip(found, hits, strict=True):
        micro = 4 // accumulation
        span = range(i // micro * micro, i // micro * micro + micro)
        expected: dict[str, list[int]] = {}
        for k in span:
            expected.setdefault(plan.sources[plan[k].source].name, []).append(plan[k].row)
        assert event["rows"] == expected and 5 in expected["replay"]
        assert event["what"] == ["loss", "gradients"] and event["action"] == "skip"
    said = capsys.readouterr().err
    assert re.search(rf"step {hits[0] // 4 + 1}: the loss and the gradients are not finite.*replay rows .*5", said)


def test_report_changes_nothing(tmp_path: Path) -> None:
    """As in a Trainer that nobody watches, the weights are lost; but it is said at once."""
    watched = run(tmp_path, None)
    assert not finite(watched) and watched.state.global_step == 20
    assert events(tmp_path)[0]["action"] == "report"
    assert watched.plugin_run.nonfinite.found == len(events(tmp_path)) > 1


@pytest.mark.parametrize("cls", [Poisoned, Overflow])
def test_skip_leaves_out_only_that_update(cls: type[Trainer], tmp_path: Path) -> None:
    """The weights stay as they were over that step, the schedule and the data go on."""

    class Weights(TrainerCallback):
        def __init__(self) -> None:
            self.kept: list[torch.Tensor] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.kept.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    weights = Weights()
    plugins = [RewarmCallback(1e-2), ReplayCallback(rows(12, 2, bad=(5,)), ratio=0.25), weights]
    trainer = tiny.trainer(tmp_path, *plugins, cls=cls, data=rows(40, 1), max_steps=20)
    extend(trainer, on_nonfinite="skip").train()
    assert finite(trainer) and trainer.state.global_step == 20
    skipped = {event["step"] for event in events(tmp_path)}
    assert skipped and {event["what"][-1] for event in events(tmp_path)} == {"gradients"}
    still = {step for step in range(1, 19) if torch.equal(weights.kept[step], weights.kept[step + 1])}
    assert still == skipped - {0, 19}
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    schedule = trainer.plugin_run.lr_schedule
    assert schedule is not None and rates == pytest.approx([schedule(step) for step in range(20)])


def test_stop_keeps_the_weights_and_a_checkpoint(tmp_path: Path) -> None:
    trainer = run(tmp_path, "stop", save_strategy="steps", save_steps=100)
    (event,) = events(tmp_path)
    assert finite(trainer) and trainer.state.global_step == event["step"] + 1 < 20
    assert (tmp_path / f"checkpoint-{event['step'] + 1}" / "hf_pretrain_ext" / "manifest.json").is_file()


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """All three actions on clean data: weights and logs of a bare Trainer of the same class."""
    bare = tiny.trainer(tmp_path / "bare", data=rows(40, 1), dropout=0.1)
    bare.train()
    for action in ("report", "skip", "stop"):
        trainer = tiny.trainer(tmp_path / action, data=rows(40, 1), dropout=0.1)
        extend(trainer, on_nonfinite=action).train()
        assert tiny.same_weights(bare, trainer) and tiny.history(bare) == tiny.history(trainer)


def test_the_mixin_takes_it_too(tmp_path: Path) -> None:
    class Mine(PluginTrainerMixin, Poisoned):
        pass

    trainer = Mine(
        model=tiny.model(),
        args=tiny.arguments(tmp_path, max_steps=20),
        train_dataset=rows(40, 1, bad=(3,)),
        data_collator=tiny.default_data_collator,
        on_nonfinite="skip",
    )
    trainer.train()
    assert finite(trainer) and events(tmp_path)[0]["rows"] == {}, "without a plan, rows are the host's"


def test_another_action_is_refused_and_nothing_kept(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of \('report', 'stop', 'skip'\), got 'ignore'"):
        extend(trainer, on_nonfinite="ignore")  # type: ignore[arg-type]  # the mistake under test
    assert type(trainer) is Trainer


def test_another_action_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, "skip", save_strategy="steps", save_steps=7)
    other = tiny.trainer(
        tmp_path,
        RewarmCallback(1e-2),
        ReplayCallback(rows(12, 2, bad=(5,)), ratio=0.25),
        cls=Poisoned,
        data=rows(40, 1),
        max_steps=20,
    )
    with pytest.raises(CheckpointError, match="on_nonfinite: 'skip' → 'report'"):
        extend(other).train(resume_from_checkpoint=True)
