"""BufferCallback: what training saw is what is sampled, for any workers, ranks, plans, streams and restarts."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import settings
import test_buffer
import tiny
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from test_distributed import WHERE, launch
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainerCallback, default_data_collator

from hf_pretrain_ext import PluginError, continue_from, extend
from hf_pretrain_ext.buffer import BufferWriter, ReplayBuffer, ReplayBufferError
from hf_pretrain_ext.buffer.sampling import NO_BOUND
from hf_pretrain_ext.callbacks import BufferCallback, ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.callbacks.buffer import SERVED, _Served
from hf_pretrain_ext.kill_test import compare_runs, kill_until_done

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


class Seen(TrainerCallback):
    """The ids that the model is given in training, row by row, by an ordinary hook."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def attach(self, trainer: Trainer) -> Trainer:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            if module.training:
                self.rows += kwargs["input_ids"].tolist()

        trainer.model.register_forward_pre_hook(see, with_kwargs=True)
        return trainer


def run(folder: Path, *plugins: Any, **settings: Any) -> tuple[Trainer, list[list[int]]]:
    seen = Seen()
    trained = seen.attach(extend(tiny.trainer(folder, *plugins, seen, **settings)))
    trained.train()
    return trained, seen.rows


def kept(folder: Path) -> list[list[int]]:
    return ReplayBuffer.open(folder / "_replay_buffer").dataset()["input_ids"][:]


def stream(number: int = 40, seed: int = 0) -> Any:
    return tiny.rows(number, seed).to_iterable_dataset(num_shards=4)


SETTINGS = {
    "plain": {},
    "workers": {"dataloader_num_workers": 2},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "stream": {"data": stream},
    "stream in workers": {"data": stream, "dataloader_num_workers": 2},
}


@pytest.mark.parametrize("planned", [False, True], ids=["host", "plan"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_kept_is_what_was_seen(name: str, planned: bool, tmp_path: Path) -> None:
    """A buffer with room for all: every row of the training data that the model had, in that order, and no other."""
    settings: dict[str, Any] = {k: v() if callable(v) else v for k, v in SETTINGS[name].items()}
    plugins = [ReplayCallback(tiny.rows(30, seed=9), ratio=0.25)] if planned else []
    _, seen = run(tmp_path, BufferCallback(max_bytes=MIB), *plugins, **settings)
    old = tiny.rows(30, seed=9)["input_ids"][:]
    new = [row for row in seen if row not in old]
    assert len(seen) == 24 and len(new) == (18 if planned else 24)
    # A stream that the host gives to two workers is read by both, one batch in turn; order is by number all the same.
    assert kept(tmp_path) == new
    found = ReplayBuffer.open(tmp_path / "_replay_buffer")
    assert found.seen == len(new) and found.share == 1
    dataset = found.dataset()
    assert dataset.column_names == ["input_ids", "labels"] and dataset["labels"][:] == dataset["input_ids"][:]


@pytest.mark.parametrize("planned", [False, True], ids=["host", "plan"])
@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_later_passes_add_nothing(planned: bool, streamed: bool, tmp_path: Path) -> None:
    """Three passes over ten rows, of which the last batch of each is ragged."""
    data = stream(10) if streamed else tiny.rows(10)
    plugins = [ReplayCallback(tiny.rows(30, seed=9), ratio=0.25)] if planned else []
    run(tmp_path, BufferCallback(max_bytes=MIB), *plugins, data=data, max_steps=8)
    found = kept(tmp_path)
    assert sorted(found) == sorted(tiny.rows(10)["input_ids"][:])
    assert ReplayBuffer.open(tmp_path / "_replay_buffer").seen == 10


def long_rows(number: int, seed: int = 0) -> Dataset:
    return tiny.rows(number, seed, length=64)


LARGE = {"per_device_train_batch_size": 64, "max_steps": 24, "logging_steps": 100}
LIMIT = MIB * 2 // 3
ROW = (4 * 64 + 4) + (8 * 64 + 4) + 8  # `datasets` keeps input_ids in 32 bits


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_buffer_is_the_reference_sample(workers: int, tmp_path: Path) -> None:
    """1,536 rows, of which 891 fit."""
    data = long_rows(1600)
    _, seen = run(tmp_path, BufferCallback(max_bytes=MIB, seed=3), data=data, dataloader_num_workers=workers, **LARGE)
    expected = test_buffer.reference(3, [ROW] * 1536, LIMIT)
    found = ReplayBuffer.open(tmp_path / "_replay_buffer")
    assert found.numbers.tolist() == expected and len(expected) == LIMIT // ROW
    assert kept(tmp_path) == [seen[number] for number in expected]
    assert test_buffer.disk(tmp_path / "_replay_buffer") <= MIB
    assert found.seen == 1536


class Stops(TrainerCallback):
    """Saves at a step, trains on, and breaks off as abruptly as a loop can at another."""

    def __init__(self, save: int, stop: int):
        self.save, self.stop = save, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.save

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_a_resume_counts_nothing_twice(streamed: bool, tmp_path: Path) -> None:
    """Broken off ten steps after the checkpoint, with a full buffer that went on: the same sample at the end."""

    def data() -> Any:
        rows = long_rows(1600)
        return rows.to_iterable_dataset(num_shards=4) if streamed else rows

    run(tmp_path / "whole", BufferCallback(max_bytes=MIB), data=data(), **LARGE)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", BufferCallback(max_bytes=MIB), Stops(9, 19), data=data(), **LARGE)
    ahead = ReplayBuffer.open(tmp_path / "cut" / "_replay_buffer")
    assert ahead.manifest.through > 9 * 64
    resumed = extend(tiny.trainer(tmp_path / "cut", BufferCallback(max_bytes=MIB), data=data(), **LARGE))
    resumed.train(resume_from_checkpoint=True)
    whole, again = (ReplayBuffer.open(tmp_path / name / "_replay_buffer") for name in ("whole", "cut"))
    assert again.numbers.tolist() == whole.numbers.tolist()
    assert again.seen == whole.seen == 1536 and again.manifest.bound == whole.manifest.bound
    assert again.dataset()["input_ids"][:] == whole.dataset()["input_ids"][:]


def test_a_checkpoint_waits_for_what_was_seen_before_it(tmp_path: Path) -> None:
    """With a cadence of many steps, the rows of all steps up to a save are on disk when it is made."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes="1 GB"), Stops(5, 5), max_steps=9)
    assert ReplayBuffer.open(tmp_path / "_replay_buffer").manifest.through == 20
    assert (tmp_path / "checkpoint-5" / "hf_pretrain_ext" / "manifest.json").is_file()


def test_another_folder_on_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes=MIB), Stops(3, 3))
    for folder, text in ((tmp_path / "elsewhere", "it holds no rows"), (tmp_path / "behind", "the rows between are")):
        if folder.name == "behind":
            with BufferWriter(folder, MIB) as writer:
                writer.begin_stage()
        resumed = extend(tiny.trainer(tmp_path, BufferCallback(folder, max_bytes=MIB)))
        with pytest.raises(ReplayBufferError, match=text):
            resumed.train(resume_from_checkpoint=True)


def test_a_new_run_asks_about_one_that_was_broken_off(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes=MIB), Stops(3, 3))
    for other in ({"data": tiny.rows(40, seed=5)}, {"data": stream(40)}, {"seed": 4}):
        with pytest.raises(ReplayBufferError, match=r"12 rows, from number 0 on.*resume_from_checkpoint"):
            run(tmp_path, BufferCallback(max_bytes=MIB), **other)
    run(tmp_path, BufferCallback(max_bytes=MIB, unfinished="drop"), seed=4)
    found = ReplayBuffer.open(tmp_path / "_replay_buffer")
    assert found.seen == len(found) == 24


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_a_run_that_begins_again_adds_nothing_twice(streamed: bool, tmp_path: Path) -> None:
    """Broken off before its first checkpoint, and started again as it was."""

    def data() -> Any:
        return stream() if streamed else tiny.rows(40)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes=MIB), Stops(99, 4), data=data())
    assert ReplayBuffer.open(tmp_path / "_replay_buffer").seen > 0
    _, seen = run(tmp_path, BufferCallback(max_bytes=MIB), data=data())
    found = ReplayBuffer.open(tmp_path / "_replay_buffer")
    assert kept(tmp_path) == seen and found.seen == 24 and len(found.manifest.stages) == 1


def test_two_stages_and_a_replay_of_the_first(tmp_path: Path) -> None:
    """The second stage replays a copy of what the first saw, and adds its own new rows alone."""
    buffer = tmp_path / "seen"
    _, first = run(tmp_path / "one", BufferCallback(buffer, max_bytes=MIB), data=stream())
    old = ReplayBuffer.open(buffer).copy(tmp_path / "two" / "replayed").dataset()
    assert old["input_ids"][:] == first

    def second() -> list[Any]:
        return [BufferCallback(buffer, max_bytes=MIB), ReplayCallback(old, ratio=0.5)]

    trained, seen = run(tmp_path / "two", *second(), data=tiny.rows(40, seed=1), dataloader_num_workers=2)
    assert sum(row in first for row in seen) == 12
    new = [row for row in seen if row not in first]
    assert ReplayBuffer.open(buffer).dataset()["input_ids"][:] == first + new
    assert trained.plugin_run.realised()["replay"]["samples"] == 12


@pytest.mark.parametrize("moved", [False, True], ids=["linked", "from elsewhere"])
def test_a_history_of_streams_is_replayed_from_the_buffer(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One folder for the whole life: each stage replays the rows of those before it, by stage, and adds its own."""
    monkeypatch.chdir(tmp_path)

    def stage(name: str, seed: int, buffer: str | Path, *plugins: Any) -> tuple[Trainer, Seen]:
        seen = Seen()
        plugins = (*plugins, BufferCallback(buffer, max_bytes=MIB), seen)
        saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        return seen.attach(tiny.trainer(tmp_path / name, *plugins, data=stream(60, seed), **saves)), seen

    def replay() -> ReplayCallback:
        return ReplayCallback(from_history=True, ratio=0.5)

    first, one = stage("one", 0, "seen")
    extend(first).train()
    # Rows that were read after the checkpoint are not part of this life.
    steps, buffer = 6 if moved else 3, tmp_path / "seen"
    if moved:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    second, two = stage("two", 1, buffer, replay())
    continue_from(second, tmp_path / "one" / f"checkpoint-{steps}").train()
    said = capsys.readouterr().err
    assert f"'stage-1' is replayed from its replay buffer: {4 * steps} of its rows (it was a stream)" in said
    read = one.rows[: 4 * steps]
    new = [row for row in two.rows if row not in one.rows]
    assert len(new) == 12 and all(row in read for row in two.rows if row not in new)
    assert ReplayBuffer.open(buffer).dataset()["input_ids"][:] == one.rows + new

    # On a resume the rows that it began with are replayed, though the buffer has others since.
    resumed, _ = stage("two", 1, buffer, replay())
    extend(resumed).train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert tiny.same_weights(second, resumed)
    assert ReplayBuffer.open(buffer).dataset()["input_ids"][:] == one.rows + new
    assert len(list((tmp_path / "two" / "_replayed").iterdir())) == 1

    past = replay()
    continue_from(stage("three", 2, buffer, past)[0], tmp_path / "two" / "checkpoint-6")
    assert {name: rows["input_ids"][:] for name, rows in past.datasets.items()} == {"stage-1": read, "stage-2": new}


def test_a_stage_that_is_begun_again_replays_what_it_began_with(tmp_path: Path) -> None:
    """Of a buffer that is full, rows of the stage before are dropped as this one adds its own."""
    seen, saves = tmp_path / "seen", {**LARGE, "save_strategy": "steps", "save_steps": 12}

    def stage(name: str, seed: int, *plugins: Any) -> Trainer:
        data = long_rows(1600, seed).to_iterable_dataset(num_shards=4)
        return tiny.trainer(tmp_path / name, *plugins, BufferCallback(seen, max_bytes=MIB), data=data, **saves)

    def second(name: str, *plugins: Any) -> Trainer:
        trainer = stage(name, 1, ReplayCallback(from_history=True, ratio=0.25), *plugins)
        return continue_from(trainer, tmp_path / "one" / "checkpoint-24")

    extend(stage("one", 0)).train()
    shutil.copytree(seen, tmp_path / "as it was")
    whole = second("two")
    whole.train()
    dropped = set(ReplayBuffer.open(tmp_path / "as it was").numbers) - set(ReplayBuffer.open(seen).numbers)
    assert len(dropped) > 100

    shutil.rmtree(seen)
    shutil.copytree(tmp_path / "as it was", seen)
    with pytest.raises(KeyboardInterrupt):
        second("again", Stops(save=99, stop=8)).train()
    assert ReplayBuffer.open(seen).seen > 1536 and not list((tmp_path / "again").glob("checkpoint-*"))
    again = second("again")
    again.train()
    assert tiny.same_weights(whole, again)

    os.rename(tmp_path / "again", tmp_path / "moved")
    moved = extend(stage("moved", 1, ReplayCallback(from_history=True, ratio=0.25)))
    moved.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-12"))
    assert tiny.same_weights(whole, moved)


def test_a_history_of_streams_without_their_buffer_says_what_to_do(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    buffer = tmp_path / "seen"

    def train(name: str, *plugins: Any) -> None:
        extend(tiny.trainer(tmp_path / name, *plugins, data=stream(), **saves)).train()

    def second(name: str) -> Trainer:
        replay = ReplayCallback(from_history=True, ratio=0.5)
        return continue_from(tiny.trainer(tmp_path / "two", replay), tmp_path / name / "checkpoint-3")

    train("bare", RewarmCallback(1e-3))
    with pytest.raises(PluginError, match=r"it was a stream, and no replay buffer has its rows.*BufferCallback keeps"):
        second("bare")
    train("one", BufferCallback(buffer, max_bytes=MIB))
    shutil.rmtree(buffer)
    with pytest.raises(PluginError, match=r"it was a stream, and '.*seen' holds no replay buffer"):
        second("one")
    train("other", BufferCallback(buffer, max_bytes=MIB), RewarmCallback(1e-3))
    with pytest.raises(PluginError, match=r"the replay buffer .*seen was made anew since"):
        second("one")
    second("other")


def test_replaying_from_the_folder_that_is_written_to_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "one", BufferCallback(tmp_path / "seen", max_bytes=MIB))
    old = ReplayBuffer.open(tmp_path / "seen").dataset()
    plugins = [BufferCallback(tmp_path / "seen", max_bytes=MIB), ReplayCallback(old, ratio=0.5)]
    with pytest.raises(PluginError, match=r"from the buffer to which this run adds rows. Read from a copy"):
        extend(tiny.trainer(tmp_path / "two", *plugins))


def test_rows_that_do_not_fit_the_buffer_are_refused_at_extend(tmp_path: Path) -> None:
    run(tmp_path / "one", BufferCallback(tmp_path / "kept"), max_steps=2)
    wider = tiny.rows(20).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    with pytest.raises(
        PluginError, match=r"they have the columns \['attention_mask', .*those that it holds \['input_ids'"
    ):
        extend(tiny.trainer(tmp_path / "two", BufferCallback(tmp_path / "kept"), data=wider))
    floats = Dataset.from_dict({"input_ids": tiny.rows(20)["input_ids"][:], "labels": [["a"] * 4] * 20})
    with pytest.raises(PluginError, match=r"rows cannot be added to .*kept"):
        extend(tiny.trainer(tmp_path / "three", BufferCallback(tmp_path / "kept"), data=floats))
    run(tmp_path / "four", BufferCallback(tmp_path / "kept"), max_steps=2)


def test_weights_are_those_without_it(tmp_path: Path) -> None:
    """With a plan, dropout, a full buffer and a random collator: bit for bit."""

    def train(name: str, *plugins: Any) -> Trainer:
        replay = ReplayCallback(long_rows(50, seed=9), ratio=0.25)
        return run(tmp_path / name, replay, *plugins, data=long_rows(1600), dropout=0.1, **LARGE)[0]

    with_it, without = train("with", BufferCallback(max_bytes=MIB)), train("without")
    assert tiny.same_weights(with_it, without)
    assert ReplayBuffer.open(tmp_path / "with" / "_replay_buffer").share < 1


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    """Of map-style rows the host removes them before, of streams in the collator."""
    rows = tiny.rows(40).add_column("text", ["x"] * 40)
    for name, data in (("rows", rows), ("stream", rows.to_iterable_dataset())):
        for planned in (False, True):
            plugins = [ReplayCallback(tiny.rows(30, seed=9), ratio=0.25)] if planned else []
            folder = tmp_path / f"{name}-{planned}"
            run(folder, BufferCallback(max_bytes=MIB), *plugins, data=data)
            dataset = ReplayBuffer.open(folder / "_replay_buffer").dataset()
            assert dataset.column_names == ["input_ids", "labels"]


def test_tensors_and_plain_rows(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            ids = torch.full((16,), number + 1)
            return {"input_ids": ids, "labels": ids}

    for workers in (0, 2):
        folder = tmp_path / str(workers)
        _, seen = run(folder, BufferCallback(max_bytes=MIB), data=Rows(), dataloader_num_workers=workers)
        assert kept(folder) == seen
    _, seen = run(tmp_path / "torch", BufferCallback(max_bytes=MIB), data=tiny.rows(40).with_format("torch"))
    assert kept(tmp_path / "torch") == seen


def test_a_stop_before_the_end_leaves_the_stage_open(tmp_path: Path) -> None:
    stop = ForgettingCallback({"old": tiny.rows(9, seed=8)}, every=2, stop_if={"old": 1e-9})
    trained, _ = run(tmp_path, BufferCallback(max_bytes=MIB), stop, learning_rate=1.0)
    assert trained.state.global_step < 6
    assert not ReplayBuffer.open(tmp_path / "_replay_buffer").manifest.stages[-1].finished


def test_a_disk_that_is_full_ends_training_with_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = BufferCallback(max_bytes=MIB)
    trainer = extend(tiny.trainer(tmp_path, plugin))

    class Fills(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                plugin._wait()
                monkeypatch.setattr("hf_pretrain_ext.buffer.storage.os.replace", full)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer.add_callback(Fills())
    with pytest.raises(ReplayBufferError, match="could not be written"):
        trainer.train()
    monkeypatch.undo()
    assert len(ReplayBuffer.open(tmp_path / "_replay_buffer")) >= 4


def test_a_training_that_breaks_off_hands_the_folder_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written then is written, however slow, before `train()` raises; another writer may begin."""
    committing = BufferWriter._commit

    def slow(self: Any, state: Any) -> None:
        time.sleep(0.3)
        committing(self, state)

    monkeypatch.setattr(BufferWriter, "_commit", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes=MIB), Stops(99, 2))
    found = ReplayBuffer.open(tmp_path / "_replay_buffer")
    assert found.seen >= 4
    monkeypatch.undo()
    script = f"from hf_pretrain_ext.buffer import BufferWriter; BufferWriter({str(found.folder)!r}, {MIB})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_rows_that_were_lost_as_training_broke_off_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt
            monkeypatch.setattr("hf_pretrain_ext.buffer.storage.os.replace", full)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, BufferCallback(max_bytes=MIB), Breaks())
    assert "buffer: the last rows could not be written" in caplog.text


def test_a_collator_without_dicts_is_named(tmp_path: Path) -> None:
    trainer = extend(tiny.trainer(tmp_path, BufferCallback(max_bytes=MIB), data_collator=lambda rows: (rows,)))
    with pytest.raises(TypeError, match="batches are dicts, got tuple"):
        trainer.train()


@pytest.mark.parametrize("collate", ["its own", "the Trainer's"])
def test_a_loader_of_the_users_own(collate: str, tmp_path: Path) -> None:
    """By a collator that nobody wrapped it ends at the first step; with self.data_collator all rows are kept."""

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            made = default_data_collator if collate == "its own" else self.data_collator
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=4, collate_fn=made))

    trainer = extend(tiny.trainer(tmp_path, BufferCallback(max_bytes=MIB), cls=Own))
    if collate == "its own":
        with pytest.raises(ReplayBufferError, match=r"none of its rows would be kept. Let its get_train_dataloader"):
            trainer.train()
        assert trainer.state.global_step == 0
    else:
        trainer.train()
        assert kept(tmp_path) == tiny.rows(40)["input_ids"][:24]


@pytest.mark.parametrize("number", [10, 13, 16, 17])
def test_rows_that_fill_up_the_last_batch_of_an_epoch_are_not_new(number: int, tmp_path: Path) -> None:
    """Two ranks in the host's order: the rows that accelerate deals to them, of an epoch and a half, each once."""
    batches = BatchSampler(range(number), 4, drop_last=False)
    dealt = [list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1)]
    found: dict[int, int] = {}
    for rank in (0, 1):
        plugin = BufferCallback(tmp_path, max_bytes=MIB)
        run = SimpleNamespace(
            ranks=(rank, 2),
            trainer=SimpleNamespace(_train_batch_size=4, train_dataset=tiny.rows(number)),
            plan=None,
            step=0,
            steps_per_epoch=len(dealt[0]),
            global_batch=8,
        )
        plugin.run, plugin._bound, plugin._epochs = run, NO_BOUND, 0  # type: ignore[assignment]  # what is looked at
        for batch in (dealt[rank] * 2)[: 3 * len(dealt[0]) // 2]:
            plugin.see_batches([{SERVED: _Served([{"row": row} for row in batch], None)}])
            run.step += 1
            plugin._take_over()
        for served in plugin._pending:
            assert served.numbers is not None
            for at, row in zip(served.numbers.tolist(), served.rows, strict=True):
                assert at not in found
                found[at] = row["row"]
    assert found == {row: row for row in range(number)}


def test_a_resume_that_begins_the_epoch_again_is_refused(tmp_path: Path) -> None:
    """With a plan, or a stream of rows that are new, it may."""
    with pytest.raises(PluginError, match="ignore_data_skip=True begins an epoch anew"):
        extend(tiny.trainer(tmp_path, BufferCallback(), ignore_data_skip=True))
    extend(tiny.trainer(tmp_path, BufferCallback(), ReplayCallback(tiny.rows(9, seed=9)), ignore_data_skip=True))
    extend(tiny.trainer(tmp_path, BufferCallback(), data=stream(), ignore_data_skip=True))


def test_the_reader_of_a_random_collator_is_found(tmp_path: Path) -> None:
    """Under a plan, masking draws by position: also behind the collator that records."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})

    def train(name: str, *plugins: Any) -> Trainer:
        masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=1)
        data = tiny.rows(40).remove_columns("labels")
        replay = ReplayCallback(tiny.rows(30, seed=9).remove_columns("labels"), ratio=0.25)
        return run(tmp_path / name, replay, *plugins, data=data, data_collator=masked)[0]

    assert tiny.same_weights(train("with", BufferCallback(max_bytes=MIB)), train("without"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("where", WHERE)
def test_two_ranks_keep_what_one_keeps(where: str, tmp_path: Path) -> None:
    """Rows of both ranks, also after a resume; with the plan, and in the host's own order."""
    for plugins in (["buffer", "replay"], ["buffer"])[: 2 if where == "ddp" else 1]:
        name = "-".join(plugins)
        run(tmp_path / f"one-{name}", *settings.make(tuple(plugins)), per_device_train_batch_size=8)
        launch(tmp_path, f"{where}-{name}", where, plugins=plugins)
        one, two = (
            ReplayBuffer.open(tmp_path / folder / "_replay_buffer") for folder in (f"one-{name}", f"{where}-{name}")
        )
        assert two.numbers.tolist() == one.numbers.tolist() and two.seen == one.seen == len(one) >= 30
        assert two.dataset()["input_ids"][:] == one.dataset()["input_ids"][:]
        if where == "ddp":
            saved = str(tmp_path / f"{where}-{name}" / "checkpoint-3")
            launch(tmp_path, f"{where}-{name}", where, plugins=plugins, resume_from=saved)
            again = ReplayBuffer.open(tmp_path / f"{where}-{name}" / "_replay_buffer")
            assert again.numbers.tolist() == one.numbers.tolist() and again.seen == one.seen


@pytest.mark.distributed
@pytest.mark.slow
def test_a_folder_that_cannot_be_used_ends_all_ranks(tmp_path: Path) -> None:
    from test_distributed import start

    (tmp_path / "ddp" / "_replay_buffer").mkdir(parents=True)
    (tmp_path / "ddp" / "_replay_buffer" / "buffer.json").write_text("{}")
    done = start(tmp_path, "ddp", "ddp", plugins=["buffer"])
    assert done.returncode != 0 and "buffer.json cannot be read" in done.stderr


def test_the_default_collator_is_left_as_it_is(tmp_path: Path) -> None:
    trained, _ = run(tmp_path, BufferCallback(max_bytes=MIB))
    assert trained.data_collator is default_data_collator


@pytest.mark.kill
@pytest.mark.slow
def test_killed_at_random_moments_it_keeps_what_a_run_left_alone_keeps(tmp_path: Path) -> None:
    """SIGKILL during saves and commits too; weights, logs and the buffer's rows are those of a run left alone."""
    from kill_worker import Forked
    from test_kill import left_alone

    alone, folder = left_alone("buffered", tmp_path / "alone"), tmp_path / "killed"
    kills = int(os.environ.get("KILLS", "12"))
    report = kill_until_done(functools.partial(Forked, "buffered", folder), folder, kills, seed=2, seconds=3.0)
    assert compare_runs(alone, folder) == [] and report.kills >= 3
    one, other = (ReplayBuffer.open(where / "_replay_buffer") for where in (alone, folder))
    assert other.numbers.tolist() == one.numbers.tolist() and other.seen == one.seen
    assert other.dataset()["input_ids"][:] == one.dataset()["input_ids"][:]


def test_a_push_leaves_the_buffer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the patterns that the host hands to the Hub's client, which applies them."""
    sent: list[str] = []

    def upload_folder(folder_path: str, ignore_patterns: list[str], **kwargs: Any) -> None:
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        sent.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    hub = SimpleNamespace(
        create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}"), upload_folder=upload_folder
    )
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = tiny.trainer(tmp_path, BufferCallback(max_bytes="1 MiB"), push_to_hub=True, hub_model_id="m")
    extend(trainer).train()
    trainer.push_to_hub()
    assert len(ReplayBuffer.open(tmp_path / "_replay_buffer")) > 0
    assert "model.safetensors" in sent and not [name for name in sent if "buffer" in name]


@pytest.mark.parametrize("inside", ["replayed", ""])
def test_a_buffer_that_would_be_published_is_refused(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}"))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    plugin = BufferCallback(tmp_path / inside, max_bytes="1 MiB")
    with pytest.raises(PluginError, match="rows of the training data would be published"):
        extend(tiny.trainer(tmp_path, plugin, push_to_hub=True, hub_model_id="m"))
    # Without a push it is nobody's business.
    extend(tiny.trainer(tmp_path, BufferCallback(tmp_path / "replayed", max_bytes="1 MiB")))
