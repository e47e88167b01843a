"""Generic behaviour of every plug-in, driven by the table in settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import PlanConfig, extend

IDS = [row.name for row in settings.ROWS]
OBSERVERS = [row for row in settings.ROWS if row.observer]
CHANGING = [row for row in settings.ROWS if not row.observer]


def train(folder: Path, *plugins: TrainerCallback, plan: PlanConfig | None = None, **arguments: Any) -> Trainer:
    trained = extend(tiny.trainer(folder, *plugins, **{"dropout": 0.1, **arguments}), plan=plan)
    trained.train()
    return trained


def host_lines(trained: Trainer) -> list[dict[str, Any]]:
    """The lines of the log that a bare Trainer writes too."""
    ours = ("eval_old", "buffer_", "benchmark_")
    return [line for line in tiny.history(trained) if not any(key.startswith(ours) for key in line)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trained = tiny.trainer(tmp_path_factory.mktemp("bare"), dropout=0.1)
    trained.train()
    return trained


def test_off_is_identical(tmp_path: Path, bare: Trainer) -> None:
    """Extended without plug-ins: weights and log history of a bare Trainer, bit for bit."""
    trained = train(tmp_path)
    assert tiny.same_weights(trained, bare)
    assert tiny.history(trained) == tiny.history(bare)


def test_off_reads_no_data_before_training(tmp_path: Path) -> None:
    """A dataset that draws as it is read: extended without plug-ins, training sees the draws of a bare Trainer."""

    class Draws(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(1, 64, (16,))
            return {"input_ids": ids, "labels": ids}

    bare = tiny.trainer(tmp_path / "bare", data=Draws())
    bare.train()
    off = extend(tiny.trainer(tmp_path / "off", data=Draws()))
    off.train()
    rewarmed = extend(tiny.trainer(tmp_path / "on", settings.by_name("rewarm").make(), data=Draws()))
    rewarmed.train()
    assert tiny.same_weights(off, bare)
    assert tiny.history(off) == tiny.history(bare)
    # The same data reaches a run with a plug-in that leaves data alone: its first loss is the bare one.
    assert tiny.history(rewarmed)[0]["loss"] == tiny.history(bare)[0]["loss"]


@pytest.mark.parametrize("row", OBSERVERS, ids=lambda row: row.name)
def test_observers_change_nothing(row: settings.Row, tmp_path: Path, bare: Trainer) -> None:
    trained = train(tmp_path, row.make(), **row.trainer())
    assert tiny.same_weights(trained, bare)
    assert host_lines(trained) == tiny.history(bare)
    assert len(tiny.history(trained)) > len(tiny.history(bare))


@pytest.mark.parametrize("row", [row for row in CHANGING if row.neutral], ids=lambda row: row.name)
def test_neutral_settings_are_a_no_op(row: settings.Row, tmp_path: Path) -> None:
    """In the host's own order, a plug-in at neutral settings gives a bare Trainer's weights, over two epochs."""
    arguments = {"max_steps": -1, "num_train_epochs": 2, **row.neutral_arguments}
    neutral = row.neutral
    assert neutral is not None
    plan = PlanConfig(order="host") if row.wraps_plan else None
    ours = train(tmp_path / "ours", neutral(), plan=plan, **arguments)
    theirs = tiny.trainer(tmp_path / "theirs", dropout=0.1, **arguments)
    theirs.train()
    assert tiny.same_weights(ours, theirs)
    kept = [
        {k: v for k, v in line.items() if not k.startswith(("replay_", "share_", "reptile_"))}
        for line in tiny.history(ours)
    ]
    assert [line for line in kept if set(line) - {"epoch", "step"}] == tiny.history(theirs)


@pytest.mark.parametrize("row", [row for row in CHANGING if row.neutral], ids=lambda row: row.name)
def test_neutral_settings_are_refused_unless_allowed(row: settings.Row, tmp_path: Path) -> None:
    neutral = row.neutral
    assert neutral is not None
    plugin: Any = neutral()
    plugin.allow_no_effect = False
    with pytest.raises(ValueError, match="would change nothing"):
        extend(tiny.trainer(tmp_path, plugin, **row.neutral_arguments))


@pytest.mark.parametrize("row", CHANGING, ids=lambda row: row.name)
def test_every_setting_has_an_effect(row: settings.Row, tmp_path: Path, bare: Trainer) -> None:
    """Negative control: a plug-in at work differs from none, from itself at other settings and under another seed."""
    base = train(tmp_path / "base", row.make(), **row.trainer())
    again = train(tmp_path / "again", row.make(), **row.trainer())
    assert tiny.same_weights(base, again)
    assert not tiny.same_weights(base, bare)
    for number, varied in enumerate(row.varied):
        assert not tiny.same_weights(base, train(tmp_path / str(number), varied(), **row.trainer()))
    if row.wraps_plan:
        seeded = train(tmp_path / "seed", row.make(), plan=PlanConfig(seed=99), **row.trainer())
        assert not tiny.same_weights(base, seeded)


class Recorder(TrainerCallback):
    """Which rows each optimizer step saw, read off the ids by an ordinary forward hook."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def attach(self, trainer: Trainer) -> Trainer:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            if module.training:
                self.batches.append(kwargs["input_ids"].clone())

        trainer.model.register_forward_pre_hook(see, with_kwargs=True)
        return trainer

    def per_step(self, accumulation: int) -> list[torch.Tensor]:
        joined = [torch.cat(self.batches[k : k + accumulation]) for k in range(0, len(self.batches), accumulation)]
        return joined


@pytest.mark.parametrize("row", [row for row in settings.ROWS if row.wraps_plan], ids=lambda row: row.name)
def test_order_does_not_depend_on_workers_or_accumulation(row: settings.Row, tmp_path: Path) -> None:
    seen = {}
    for workers, batch, accumulation in ((0, 4, 1), (1, 4, 1), (4, 4, 1), (0, 2, 2), (2, 1, 4)):
        recorder = Recorder()
        trained = extend(
            tiny.trainer(
                tmp_path / f"{workers}-{batch}",
                row.make(),
                recorder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                dataloader_num_workers=workers,
                **row.trainer(),
            )
        )
        recorder.attach(trained).train()
        seen[workers, batch] = recorder.per_step(accumulation)
    reference = seen[0, 4]
    assert len(reference) == 6
    for batches in seen.values():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(reference, batches, strict=True))


def test_accumulation_gives_the_same_training(tmp_path: Path) -> None:
    """1 × 8 against 2 × 4 against 8 × 1, all plug-ins together: largest and mean difference of the weights."""
    runs = [
        train(
            tmp_path / str(batch),
            *settings.make(settings.TOGETHER),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            dropout=0.0,  # its masks follow the micro-batches
        )
        for batch in (8, 4, 1)
    ]
    reference = tiny.weights(runs[0])
    for other in runs[1:]:
        gaps = torch.cat([(reference[k] - v).abs().flatten() for k, v in tiny.weights(other).items()])
        assert float(gaps.max()) < 2e-4
        assert float(gaps.mean()) < 2e-6


@pytest.mark.parametrize("row", settings.ROWS, ids=lambda row: row.name)
def test_without_extend_a_plugin_works_or_says_what_to_add(row: settings.Row, tmp_path: Path) -> None:
    plugin = row.make()
    trained = tiny.trainer(tmp_path, plugin, **row.trainer())
    if plugin.needs_extend:
        # Of data that is not tokenized the host speaks before any callback can.
        known = r"extend\(trainer\)|No columns in the dataset match" if row.trainer() else r"extend\(trainer\)"
        with pytest.raises((RuntimeError, ValueError), match=known):
            trained.train()
    else:
        trained.train()


@pytest.mark.parametrize("row", settings.ROWS, ids=lambda row: row.name)
def test_settings_and_state_are_plain_json(row: settings.Row, tmp_path: Path) -> None:
    import json

    trained = train(tmp_path, row.make(), **row.trainer())
    plugin = trained.plugin_run.plugins[0]
    for content in (plugin.settings(), plugin.state()):
        assert json.loads(json.dumps(content)) == content


@pytest.mark.parametrize("row", settings.ROWS, ids=lambda row: row.name)
def test_declared_capabilities_are_words_of_the_contract(row: settings.Row) -> None:
    plugin = row.make()
    assert plugin.name and plugin.resume in ("exact", "approximate")
    assert set(plugin.distributed) == {"ddp", "fsdp2", "zero2", "zero3"}
    words = ("exact", "exact, without resume", "untested")
    assert all(v in words or v.startswith("refused: ") for v in plugin.distributed.values())


@pytest.mark.parametrize("row", settings.ROWS, ids=lambda row: row.name)
def test_a_second_train_repeats_the_plugin_from_its_start(row: settings.Row, tmp_path: Path) -> None:
    """Counts, history and schedule of a second `train()` are those of a run, not of two."""
    trained = train(tmp_path, row.make(), max_steps=4, **row.trainer())
    first = trained.plugin_run.realised(), [line["step"] for line in tiny.history(trained)]
    trained.train()
    assert (trained.plugin_run.realised(), [line["step"] for line in tiny.history(trained)]) == first
