"""Exact resume in a new process, and what is refused as a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume_cases
import settings
import tiny
import warm
from transformers import TrainerCallback

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError, last_complete_checkpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    script = Path(resume_cases.__file__)
    # The second starts as new as can be, hash seed and all.
    for part, python in (("first", warm.python()), ("second", [sys.executable])):
        done = subprocess.run(
            [*python, str(script), part, str(folder)], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.resume
@pytest.mark.parametrize("case", resume_cases.CASES, ids=lambda case: case.name)
def test_resume_in_a_new_process_is_exact(case: resume_cases.Case, results: dict[str, Any]) -> None:
    """Weights, optimizer, schedule, generator, counts, plug-in state and log equal an uninterrupted run's."""
    found = results[case.name]
    assert found["different"] == []
    assert found["log"] == []
    assert found["lengths"][0] == found["lengths"][1]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Negative control: a run of another seed is seen to differ in weights and optimizer."""
    case = resume_cases.Case(("replay",), (2,), {"seed": 3})
    other = resume_cases.Case(("replay",), (2,), {"seed": 4})
    runs = []
    for each in (case, other):
        trained = resume_cases.build(each, tmp_path / each.name, None)
        trained.train()
        runs.append(resume_cases.snapshot(trained))
    different = [key for key in runs[0] if not resume_cases.same(runs[0][key], runs[1][key])]
    assert any(key.startswith("/weights") for key in different)
    assert any(key.startswith("/optimizer") for key in different)


def interrupted(folder: Path, **arguments: Any) -> Any:
    trained = extend(
        tiny.trainer(
            folder,
            *settings.make(settings.TOGETHER),
            **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **arguments},
        )
    )
    trained.train()
    return trained


def again(folder: Path, *plugins: Any, **arguments: Any) -> Any:
    return extend(
        tiny.trainer(
            folder,
            *(plugins or settings.make(settings.TOGETHER)),
            **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **arguments},
        )
    )


CHANGES: dict[str, tuple[dict[str, Any], list[Any], list[str]]] = {
    "length": ({"max_steps": 8}, [], ["total_steps: 4 → 8", "learning rate of the checkpoint:", "learning rate now:"]),
    "weight decay": ({"weight_decay": 0.1}, [], ["arguments.weight_decay: 0.0 → 0.1"]),
    "global batch": ({"per_device_train_batch_size": 2}, [], ["global_batch: 4 → 2"]),
    "seed": ({"seed": 5}, [], ["plan.seed: 3 → 5", "arguments.seed: 3 → 5"]),
    "rate": (
        {},
        [
            RewarmCallback(peak_lr=2e-2, warmup=2),
            settings.by_name("replay").make(),
            settings.by_name("forgetting").make(),
        ],
        ["plugins.rewarm.peak_lr: 0.01 → 0.02", "0 → 0.01 (linear)", "0 → 0.02 (linear)"],
    ),
    "ratio": (
        {},
        [
            settings.by_name("rewarm").make(),
            ReplayCallback(settings.old_data(), ratio=0.5),
            settings.by_name("forgetting").make(),
        ],
        ["plugins.replay.ratio: 0.25 → 0.5", "plan.segments[0].weights"],
    ),
    "data": (
        {},
        [
            settings.by_name("rewarm").make(),
            ReplayCallback(tiny.rows(60, seed=9), ratio=0.25),
            settings.by_name("forgetting").make(),
        ],
        ["plan.sources[1].num_rows: 50 → 60"],
    ),
    "plug-ins": ({}, [settings.by_name("rewarm").make()], ["plugins.replay: {", "→ absent"]),
}


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpointed")
    interrupted(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_refused_with_its_differences(change: str, checkpointed: Path) -> None:
    arguments, plugins, expected = CHANGES[change]
    with pytest.raises(CheckpointError) as refusal:
        again(checkpointed, *plugins, **arguments).train(resume_from_checkpoint=str(checkpointed / "checkpoint-2"))
    for text in [*expected, "a new run"]:
        assert text in str(refusal.value)


def test_what_may_change_does(checkpointed: Path, tmp_path: Path) -> None:
    """Accumulation at an equal global batch, workers, logging, saving and output_dir may differ; order goes on."""
    resumed = again(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=1,
        logging_steps=2,
        save_strategy="no",
    )
    resumed.train(resume_from_checkpoint=str(checkpointed / "checkpoint-2"))
    assert resumed.state.global_step == 4
    whole = again(tmp_path / "whole", save_strategy="no")
    whole.train()
    gaps = [
        (a - b).abs().max() for a, b in zip(tiny.weights(whole).values(), tiny.weights(resumed).values(), strict=True)
    ]
    assert float(max(gaps)) < 1e-4


def damaged(checkpointed: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(checkpointed, folder)
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_missing_file_is_skipped_and_named(name: str, checkpointed: Path, tmp_path: Path) -> None:
    """The host resumes silently without optimizer, scheduler or generator state; here that is not complete."""
    folder = damaged(checkpointed, tmp_path)
    (folder / "checkpoint-4" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing.*newest complete checkpoint is .*checkpoint-2"):
        again(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed = again(folder)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plugin_run.resumed_at == 2


def test_empty_and_half_written_folders_are_skipped(checkpointed: Path, tmp_path: Path) -> None:
    folder = damaged(checkpointed, tmp_path)
    (folder / "checkpoint-6").mkdir()
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-5")
    (folder / "checkpoint-5" / "hf_pretrain_ext" / "manifest.json").unlink()
    with (folder / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    newest, skipped = last_complete_checkpoint(folder)
    assert newest == folder / "checkpoint-2"
    assert [path.name for path, _ in skipped] == ["checkpoint-6", "checkpoint-5", "checkpoint-4"]
    assert [reason.split()[0] for _, reason in skipped] == ["the", "its", "optimizer.pt"]


def test_a_checkpoint_of_a_bare_trainer_is_not_a_resume(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(
        CheckpointError, match=r"not written by a Trainer with plug-ins.*load the model from that folder"
    ):
        again(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        again(tmp_path).train(resume_from_checkpoint=True)


def test_weights_only_checkpoints_are_not_a_resume(tmp_path: Path) -> None:
    interrupted(tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError, match="save_only_model=True: it has no optimizer state"):
        again(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def test_everything_written_loads_without_pickled_objects(checkpointed: Path) -> None:
    import torch

    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpointed / "checkpoint-2" / name, weights_only=True)
    for path in (checkpointed / "checkpoint-2" / "hf_pretrain_ext").iterdir():
        json.loads(path.read_text())


def test_other_data_of_the_same_size_is_other_data(checkpointed: Path) -> None:
    plugins = settings.make(settings.TOGETHER)
    other = extend(
        tiny.trainer(
            checkpointed, *plugins, data=tiny.rows(40, seed=123), save_strategy="steps", save_steps=2, max_steps=4
        )
    )
    with pytest.raises(CheckpointError, match=r"data\.train: '[0-9a-f]+' → '[0-9a-f]+'"):
        other.train(resume_from_checkpoint=str(checkpointed / "checkpoint-2"))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("samples", [3, 37, 40, 41])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (4, 3), (7, 2)])
def test_the_length_of_a_run_is_the_hosts(
    drop_last: bool, samples: int, batch: int, accumulation: int, tmp_path: Path
) -> None:
    """Steps predicted before training against what the host itself computes, without a plan and with one."""
    from hf_pretrain_ext.lengths import host_length, run_length

    trainer = tiny.trainer(
        tmp_path,
        data=tiny.rows(samples),
        max_steps=-1,
        num_train_epochs=1.5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    per_epoch, total = host_length(trainer.args, samples, batch, batch * accumulation)
    if samples >= batch or not drop_last:
        values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        assert (per_epoch, total) == (values[1], values[6])
    planned = extend(trainer, ReplayCallback(tiny.rows(9, seed=5), ratio=0.25))
    plan = planned.plugin_run.build_plan()
    assert plan is not None
    values = planned.set_initial_training_values(planned.args, planned.get_train_dataloader())
    assert run_length(planned.args, plan.epoch, batch * accumulation) == (values[1], values[6])


class _SavesInsideAStep(TrainerCallback):
    """What the host's SIGTERM handler does: a checkpoint at `event` of the step `at`, then the end."""

    def __init__(self, event: str | None, at: int):
        self.at, self.trainer = at, None
        if event is not None:
            setattr(self, event, self._save)

    def _save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            raise KeyboardInterrupt


@pytest.mark.resume
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize(
    ("at", "accumulation"),
    [(3, 1), (3, 2), (10, 1), *(pytest.param(at, 1, marks=pytest.mark.slow) for at in (12, 1))],
)
def test_a_checkpoint_inside_a_step_is_exact(event: str, at: int, accumulation: int, tmp_path: Path) -> None:
    """Dropout has drawn and the loss been summed when SIGTERM saves; the resume makes that step again, the same.

    An epoch is 10 steps: step 10 is the first of the second, where the loader draws a seed before the step begins.
    """

    def build(event: str | None) -> Any:
        signal = _SavesInsideAStep(event, at)
        trainer = extend(
            tiny.trainer(
                tmp_path / "run",
                *settings.make(settings.TOGETHER),
                signal,
                dropout=0.3,
                max_steps=14,
                logging_steps=4,
                gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=4 // accumulation,
            )
        )
        signal.trainer = trainer
        return trainer

    whole = build(None)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(event).train()
    resumed = build(None)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plugin_run.resumed_at == at
    assert tiny.same_weights(whole, resumed)
    assert resumed.plugin_run.realised() == whole.plugin_run.realised()
    probes = [trainer.plugin_run.plugins[0].state()["sets"]["old"] for trainer in (whole, resumed)]
    assert probes[0] == probes[1]
    lines = [[line for line in tiny.history(trainer) if "loss" in line] for trainer in (whole, resumed)]
    if event == "on_step_end" and at % 4 == 0:
        lines[0] = [line for line in lines[0] if line["step"] != at]  # the host saved before it logged
    assert lines[0] == lines[1]


@pytest.mark.parametrize("rows", [24, 46])
def test_a_finished_run_is_over(rows: int, tmp_path: Path) -> None:
    """Killed after its last save and before its end, a run makes no further step, where an epoch is not over either.

    The host would: it asks whether training is over only after a step.
    """
    saving = {"data": tiny.rows(rows), "max_steps": 8, "save_strategy": "steps", "save_steps": 8, "dropout": 0.1}
    whole = extend(tiny.trainer(tmp_path, *settings.make(settings.TOGETHER), **saving))
    whole.train()
    again = extend(tiny.trainer(tmp_path, *settings.make(settings.TOGETHER), **saving))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8 and tiny.same_weights(whole, again)
    assert again.plugin_run.realised() == whole.plugin_run.realised()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-8"]


def test_a_run_that_was_stopped_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Any:
        stopping = ForgettingCallback({"old": tiny.rows(10, seed=9)}, every=2, stop_if={"old": 1e-9})
        return extend(
            tiny.trainer(tmp_path, RewarmCallback(1e-1), stopping, max_steps=30, save_strategy="steps", save_steps=30)
        )

    stopped = make()
    stopped.train()
    step = stopped.state.global_step
    assert step < 30
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == step and tiny.same_weights(stopped, again)
    assert "this run was stopped (stop_if)" in capsys.readouterr().err
