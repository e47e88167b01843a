"""Streams as sources: the reader against plain iteration, and runs over streams against runs over the same rows."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext._host import split_over_ranks, whole_stream
from hf_pretrain_ext.callbacks import ReplayCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.streams import ANCHOR, StreamError, StreamMark, StreamReader, first_rows

NUMBER = 300


def table(number: int = NUMBER, start: int = 0) -> Dataset:
    return Dataset.from_dict({"n": list(range(start, start + number)), "text": [f"row {n}" for n in range(number)]})


def sharded(number: int = NUMBER) -> IterableDataset:
    return table(number).to_iterable_dataset(num_shards=4)


class Plain(torch.utils.data.IterableDataset):
    """A stream without a state, which keeps to a part of its rows when it sees that a worker reads it."""

    def __init__(self, number: int = NUMBER):
        self.number = number

    def __iter__(self) -> Iterator[dict[str, int]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter([{"n": n} for n in range(first, self.number, step)])


class Noisy(Plain):
    """Other rows at every reading."""

    def __iter__(self) -> Iterator[dict[str, int]]:
        source = random.SystemRandom()
        return iter([{"n": source.randrange(10**9)} for _ in range(self.number)])


class Opaque(Plain):
    """A stream whose state is no JSON."""

    def state_dict(self) -> Any:
        return {"at": object()}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("no state was saved")


def doubled(row: dict[str, Any]) -> dict[str, Any]:
    return {"n": row["n"] * 2}


def twice(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: [value for value in values for _ in range(2)] for key, values in batch.items()}


STREAMS: dict[str, Callable[[], Any]] = {
    "sharded": sharded,
    "mapped": lambda: sharded().map(doubled),
    "batched map": lambda: sharded().map(twice, batched=True, batch_size=7),
    "filtered": lambda: sharded().filter(lambda row: row["n"] % 3 > 0),
    "shuffled shards": lambda: sharded().shuffle(seed=5, buffer_size=1),
    "shuffle buffer": lambda: sharded().shuffle(seed=5, buffer_size=40),
    "torch format": lambda: sharded().with_format("torch"),
    "generator": lambda: IterableDataset.from_generator(lambda: ({"n": n} for n in range(NUMBER))),
    "plain torch": Plain,
    "opaque state": Opaque,
    "a list": lambda: [{"n": n} for n in range(NUMBER)],
}
RELIABLE = ("sharded", "mapped", "batched map", "filtered", "shuffled shards", "torch format", "generator")
"""Streams whose own state leads back exactly; the others are counted to."""


def numbers(rows: list[Any]) -> list[int]:
    return [int(row["n"]) for row in rows]


@pytest.mark.parametrize("kind", STREAMS)
def test_rows_are_those_of_plain_iteration(kind: str) -> None:
    """Every row of two passes, the second as the stream itself begins its second epoch."""
    expected = []
    reference = copy.deepcopy(STREAMS[kind]())
    for turn in range(2):
        if hasattr(reference, "set_epoch"):
            reference.set_epoch(turn)
        expected += numbers(list(reference))
    reader = StreamReader(STREAMS[kind](), kind)
    assert numbers(reader.rows(range(len(expected)))) == expected


@pytest.mark.parametrize("kind", STREAMS)
def test_a_mark_leads_back_exactly(kind: str) -> None:
    """From marks at many places, through JSON, of a reader that was itself put back: the rows that would have come."""
    whole = numbers(StreamReader(STREAMS[kind](), kind).rows(range(700)))
    reader = StreamReader(STREAMS[kind](), kind)
    at = 0
    for step in (1, 5, 10, 60, 4, 90, 130, 3, 200):
        assert numbers(reader.rows(range(at, at + step))) == whole[at : at + step]
        at += step
        mark = StreamMark.from_json(json.loads(json.dumps(reader.mark().to_json())))
        assert mark.number == at
        reader = StreamReader(STREAMS[kind](), kind, mark=mark)
    assert numbers(reader.rows([at, at + 40])) == [whole[at], whole[at + 40]]


def test_only_states_that_do_not_lead_back_are_counted_to(caplog: pytest.LogCaptureFixture) -> None:
    """A shuffle buffer is not in datasets' state: this is noticed, said, and made up for by reading again."""
    counted = {}
    for kind, make in STREAMS.items():
        reader = StreamReader(make(), kind)
        reader.rows(range(ANCHOR + 50))
        mark = reader.mark()
        caplog.clear()
        again = StreamReader(make(), kind, mark=mark)
        again.rows([mark.number])
        counted[kind] = mark.state is None or "does not lead back" in caplog.text
    assert counted == {kind: kind not in RELIABLE for kind in STREAMS}


def test_going_back_reads_only_a_little_where_there_is_a_state() -> None:
    """Of 300,000 rows, a reader put back at row 200,000 makes fewer than 100."""
    made: list[int] = []

    def make(row: dict[str, Any]) -> dict[str, Any]:
        made.append(row["n"])
        return row

    stream = Dataset.from_dict({"n": range(3000)}).to_iterable_dataset(num_shards=3)
    reader = StreamReader(stream, "many")
    reader.rows([2000])
    again = StreamReader(stream.map(make), "many")
    again.rows(range(1990, 2001))
    mark, before = again.mark(), len(made)
    assert numbers(StreamReader(stream.map(make), "many", mark=mark).rows([2001])) == [2001]
    assert before > 2000 and len(made) - before < ANCHOR + 20


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 90))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_rising_numbers_and_any_length(steps: list[int], length: int) -> None:
    """Row n of a stream of `length` rows is row n mod length, whatever is left out, with a mark after every read."""
    reader, at = StreamReader([{"n": n} for n in range(length)], "any"), 0
    for step in steps:
        assert numbers(reader.rows([at + step])) == [(at + step) % length]
        at += step + 1
        reader = StreamReader([{"n": n} for n in range(length)], "any", mark=reader.mark())


def test_a_stream_that_gives_other_rows_is_refused() -> None:
    """Data that changed, and transforms that cannot be repeated: an error, not other data."""
    for first, second in ((table(), table(start=1000)), (table(), table(50))):
        reader = StreamReader(first.to_iterable_dataset(), "wiki")
        reader.rows(range(100))
        with pytest.raises(StreamError, match="the stream of wiki does not give the rows that it gave before: row 99"):
            StreamReader(second.to_iterable_dataset(), "wiki", mark=reader.mark()).rows([100])
    noisy = Noisy()
    reader = StreamReader(noisy, "noisy")
    reader.rows(range(5))
    with pytest.raises(StreamError, match="transform that draws at random"):
        StreamReader(noisy, "noisy", mark=reader.mark()).rows([5])


def test_random_transforms_draw_by_row() -> None:
    """A transform that uses the global generators gives the same rows again, and leaves the generators alone."""

    def jitter(row: dict[str, Any]) -> dict[str, Any]:
        return {"n": row["n"] + 1000 * random.randrange(100), "x": float(torch.rand(1))}

    before = torch.get_rng_state(), random.getstate()
    whole = StreamReader(sharded().map(jitter), "jitter").rows(range(150))
    reader = StreamReader(sharded().map(jitter), "jitter")
    reader.rows([90])
    assert StreamReader(sharded().map(jitter), "jitter", mark=reader.mark()).rows(range(91, 150)) == whole[91:]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert len({row["n"] // 1000 for row in whole}) > 20


def test_an_empty_stream_is_an_error_and_not_a_loop() -> None:
    with pytest.raises(StreamError, match="the stream of none holds no rows"):
        StreamReader([], "none").rows([0])


def test_a_pickled_reader_goes_on_where_it_was() -> None:
    reader = StreamReader(sharded(), "sharded")
    reader.rows(range(77))
    assert numbers(pickle.loads(pickle.dumps(reader)).rows([77])) == numbers(reader.rows([77]))


def test_going_backwards_starts_anew() -> None:
    reader = StreamReader(sharded(), "sharded")
    whole = numbers(reader.rows(range(50)))
    assert numbers(reader.rows([3, 8])) == [whole[3], whole[8]]


def test_first_rows_leave_the_stream_alone() -> None:
    stream = sharded()
    assert numbers(first_rows(stream, 3)) == numbers(list(stream))[:3]
    assert len(first_rows(table(2).to_iterable_dataset(), 5)) == 2 and first_rows([], 5) == []
    assert stream.state_dict() == sharded().state_dict() or stream.epoch == 0


class Worker:
    id, num_workers = 1, 2


def test_the_private_names_of_torch_and_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils import worker

    monkeypatch.setattr(worker, "_worker_info", Worker())
    assert torch.utils.data.get_worker_info() is not None
    with whole_stream():
        assert torch.utils.data.get_worker_info() is None
        assert len(list(Plain())) == NUMBER
    assert torch.utils.data.get_worker_info() is not None and len(list(Plain())) == NUMBER // 2
    for kind in ("sharded", "plain torch"):
        assert numbers(StreamReader(STREAMS[kind](), kind).rows(range(NUMBER))) == list(range(NUMBER))
    assert split_over_ranks(split_dataset_by_node(sharded(), 0, 2)) and not split_over_ranks(sharded())


# Runs


def rows(number: int, seed: int) -> Dataset:
    return tiny.rows(number, seed=seed)


def streamed(number: int, seed: int, shards: int = 3) -> IterableDataset:
    return rows(number, seed).to_iterable_dataset(num_shards=shards)


def seen(tmp_path: Path, data: Any, old: Any, **settings: Any) -> tuple[Trainer, list[list[tuple[int, ...]]]]:
    """The ids that the model was given, one list a step."""
    trainer = tiny.trainer(
        tmp_path, ReplayCallback(old, ratio=0.25, order="original"), RewarmCallback(1e-2), data=data, **settings
    )
    batches: list[list[tuple[int, ...]]] = []

    def look(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        batches.append([tuple(ids) for ids in keywords["input_ids"].tolist()])

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    extend(trainer).train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer, batches


@pytest.mark.parametrize("which", ["train", "replay", "both"])
def test_a_stream_is_the_same_rows_in_order(which: str, tmp_path: Path) -> None:
    """A run over streams equals, bit for bit, a run over the same rows in original order."""
    from hf_pretrain_ext import PlanConfig

    kept = {"train": rows(17, 1), "replay": rows(5, 2)}
    made = {
        name: data.to_iterable_dataset(num_shards=3) if which in (name, "both") else data
        for name, data in kept.items()
    }
    results = []
    for folder, sources in (("a", kept), ("b", made)):
        trainer = tiny.trainer(
            tmp_path / folder,
            ReplayCallback(sources["replay"], ratio=0.25, order="original"),
            data=sources["train"],
            max_steps=8,
        )
        extend(trainer, plan=PlanConfig(order="original")).train()
        results.append(trainer)
    assert tiny.same_weights(*results)
    # A stream after its end: datasets shuffles the shards of later passes, so only what stays in one pass is compared.
    assert results[1].plugin_run.realised()["replay"]["samples"] == 8


def test_workers_do_not_change_what_a_stream_gives(tmp_path: Path) -> None:
    orders = [
        seen(tmp_path / str(workers), streamed(60, 1), streamed(20, 2), dataloader_num_workers=workers)[1]
        for workers in (0, 1, 3)
    ]
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 6


def test_new_epochs_go_on_in_the_stream(tmp_path: Path) -> None:
    """Map-style training data over three epochs, a replay stream of 100 rows: none of them twice, with workers too."""
    for workers in (0, 2):
        _, batches = seen(
            tmp_path / str(workers),
            rows(16, 1),
            streamed(100, 2),
            num_train_epochs=3,
            max_steps=-1,
            dataloader_num_workers=workers,
        )
        old = {tuple(row["input_ids"]) for row in rows(100, 2)}
        replayed = [ids for batch in batches for ids in batch if ids in old]
        assert len(replayed) == 12 == len(set(replayed))


@pytest.mark.parametrize("kind", ["state", "buffer"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_of_a_resume_is_exact(kind: str, workers: int, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        data, old = streamed(70, 1), streamed(6, 2)
        return (data.shuffle(seed=3, buffer_size=16), old) if kind == "buffer" else (data, old)

    options: dict[str, Any] = {"max_steps": 24, "dataloader_num_workers": workers, "dropout": 0.1}
    whole, batches = seen(tmp_path / "whole", *make(), **options)
    later = batches[:7]
    saving = {**options, "save_strategy": "steps", "save_steps": 7}
    folder = tmp_path / "cut"
    seen(folder, *make(), **saving)
    for step in (7, 14):
        resumed, rest = seen(folder, *make(), **saving, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert rest == batches[step:], step
        assert tiny.same_weights(whole, resumed)
    assert later != batches[7:14]


def test_resume_over_other_data_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    seen(tmp_path, streamed(70, 1), streamed(6, 2), **saving)
    with pytest.raises(StreamError, match="the stream of train does not give the rows that it gave before"):
        seen(
            tmp_path, streamed(70, 8), streamed(6, 2), **saving, resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_a_stream_in_place_of_rows_is_another_run(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    seen(tmp_path, rows(70, 1), rows(6, 2), **saving)
    with pytest.raises(CheckpointError, match="num_rows"):
        seen(tmp_path, rows(70, 1), streamed(6, 2), **saving, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_training_stream_needs_max_steps(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, ReplayCallback(rows(6, 2)), data=streamed(70, 1))
    trainer.args.max_steps = -1
    with pytest.raises(PluginError, match=r"a stream, whose length nobody knows\. Set `max_steps`"):
        extend(trainer)


def test_ids_of_a_stream_are_looked_at(tmp_path: Path) -> None:
    wrong = tiny.rows(6, high=1000).to_iterable_dataset()
    with pytest.raises(PluginError, match="holds token ids"):
        extend(tiny.trainer(tmp_path, ReplayCallback(wrong), data=streamed(70, 1)))
