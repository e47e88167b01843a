"""ReplayCallback: what reaches the model, at which ratio, and which data is refused at `extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from datasets.distributed import split_dataset_by_node
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from hf_pretrain_ext import PlanConfig, PluginError, extend, read_trace
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer

NEW, OLD = range(1, 32), range(32, 64)


def new_rows(number: int, **kwargs: Any) -> Dataset:
    """Rows whose ids are all below 32, so that a batch tells where each row came from."""
    return tiny.rows(number, seed=1, low=NEW.start, high=NEW.stop, **kwargs)


def old_rows(number: int, **kwargs: Any) -> Dataset:
    return tiny.rows(number, seed=2, low=OLD.start, high=OLD.stop, **kwargs)


class Watch(TrainerCallback):
    """Rows that the model was trained on, step by step, read off its inputs."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            if module.training:
                self.batches.append(kwargs["input_ids"].clone())

        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True)

    def replayed(self) -> list[int]:
        return [int((batch[:, 0] >= OLD.start).sum()) for batch in self.batches]

    def rows(self, old: bool) -> list[tuple[int, ...]]:
        return [tuple(row.tolist()) for batch in self.batches for row in batch if (int(row[0]) >= OLD.start) == old]


def run(folder: Path, plugin: ReplayCallback, plan: PlanConfig | None = None, **arguments: Any) -> tuple[Any, Watch]:
    watch = Watch()
    data = arguments.pop("data", new_rows(40))
    trainer = extend(tiny.trainer(folder, plugin, watch, data=data, **arguments), plan=plan)
    trainer.train()
    return trainer, watch


def as_tuples(data: Dataset) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in data["input_ids"]]


def test_the_model_sees_the_ratio(tmp_path: Path) -> None:
    """Ratio 0.25 of batches of 8: two replayed rows in every step; 0.05: within one sample of it at every step."""
    _, watch = run(tmp_path / "a", ReplayCallback(old_rows(30), ratio=0.25), per_device_train_batch_size=8)
    assert watch.replayed() == [2] * 6
    _, watch = run(tmp_path / "b", ReplayCallback(old_rows(30), ratio=0.05), max_steps=50)
    total = 0
    for step, replayed in enumerate(watch.replayed(), start=1):
        total += replayed
        assert abs(total - 0.05 * 4 * step) < 1


def test_realised_ratio_is_counted_and_logged(tmp_path: Path) -> None:
    """Samples and loss-bearing tokens (length 16: 15 targets a row) as a brute-force count of what the model saw."""
    trainer, watch = run(tmp_path, ReplayCallback(old_rows(30), ratio=0.25), max_steps=5)
    seen = len(watch.rows(old=False)), len(watch.rows(old=True))
    realised = trainer.plugin_run.realised()
    assert (realised["train"]["samples"], realised["replay"]["samples"]) == seen == (15, 5)
    assert (realised["train"]["loss_tokens"], realised["replay"]["loss_tokens"]) == (15 * 15, 5 * 15)
    assert (realised["train"]["tokens"], realised["replay"]["tokens"]) == (15 * 16, 5 * 16)
    logged = [line for line in trainer.state.log_history if "replay_ratio" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]
    assert logged[-1]["replay_ratio"] == logged[-1]["replay_ratio_tokens"] == 0.25
    end = read_trace(tmp_path)[-1]
    assert end["event"] == "end" and end["counts"] == realised


def test_ragged_rows_are_counted_in_tokens(tmp_path: Path) -> None:
    """Replayed rows half as long, padded by the collator: a third of the samples, less of the tokens."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocab_size=257)
    old = old_rows(30, length=8)
    trainer = Trainer(
        model=tiny.model(vocabulary=300),
        args=tiny.arguments(tmp_path, per_device_train_batch_size=6, max_steps=4),
        train_dataset=new_rows(40).select_columns("input_ids"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    extend(trainer, ReplayCallback(old.select_columns("input_ids"), ratio=1 / 3)).train()
    realised = trainer.plugin_run.realised()
    assert realised["train"] == {"samples": 16, "tokens": 16 * 16, "loss_tokens": 16 * 15, "replayed": False}
    assert realised["replay"] == {"samples": 8, "tokens": 8 * 8, "loss_tokens": 8 * 7, "replayed": True}


def test_modes_and_epochs(tmp_path: Path) -> None:
    """30 new rows, ratio 0.25, batches of 4: an epoch is 30 draws, or 40 when replay is additional."""
    epochs = {"max_steps": -1, "num_train_epochs": 1, "data": new_rows(30)}
    trainer, watch = run(tmp_path / "a", ReplayCallback(old_rows(50), ratio=0.25), **epochs)
    assert trainer.state.max_steps == 8  # 30 rounded up to whole batches
    assert (len(watch.rows(old=False)), len(watch.rows(old=True))) == (24, 8)
    trainer, watch = run(tmp_path / "b", ReplayCallback(old_rows(50), ratio=0.25, mode="additional"), **epochs)
    assert trainer.state.max_steps == 10
    assert sorted(watch.rows(old=False)) == sorted(as_tuples(new_rows(30)))
    assert len(watch.rows(old=True)) == 10


def test_orders(tmp_path: Path) -> None:
    """`original` replays in stored order; the training rows follow PlanConfig; a pass never repeats a row."""
    plugin = ReplayCallback(old_rows(10), ratio=0.25, order="original")
    _, watch = run(tmp_path / "a", plugin, PlanConfig(order="original"), max_steps=16)
    assert watch.rows(old=True) == (as_tuples(old_rows(10)) * 2)[:16]
    assert watch.rows(old=False) == (as_tuples(new_rows(40)) * 2)[:48]
    _, watch = run(tmp_path / "b", ReplayCallback(old_rows(10), ratio=0.25), max_steps=20)
    first, second = watch.rows(old=True)[:10], watch.rows(old=True)[10:]
    assert sorted(first) == sorted(second) == sorted(as_tuples(old_rows(10)))
    assert first != second and first != as_tuples(old_rows(10))


def test_lists_and_torch_datasets_are_sources_too(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        def __init__(self, data: Dataset) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {**self.data[number], "unused": "column"}

    reference, _ = run(tmp_path / "a", ReplayCallback(old_rows(20), ratio=0.25))
    other, _ = run(tmp_path / "b", ReplayCallback(Rows(old_rows(20)), ratio=0.25), data=Rows(new_rows(40)))
    assert tiny.same_weights(reference, other)


WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 1.0}, "ratio must be what is replayed out of all, at least 0 and below 1, got 1.0"),
    ({"ratio": -0.1}, "got -0.1"),
    ({"ratio": "5%"}, "got '5%'"),
    ({"ratio": True}, "got True"),
    ({"mode": "extra"}, "mode must be one of ('equivalent', 'additional'), got 'extra'"),
    ({"order": "random"}, "order must be one of ('shuffled', 'original'), got 'random'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS, ids=[text for _, text in WRONG_SETTINGS])
def test_wrong_settings_fail_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ReplayCallback(old_rows(4), **settings)
    assert message in str(error.value)


def stream(data: Dataset) -> Any:
    return data.to_iterable_dataset()


WRONG_DATA: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    ("empty", old_rows(4).select([]), None, {}, "the replay data is empty"),
    ("splits", DatasetDict(train=old_rows(4)), None, {}, "of a DatasetDict, one split"),
    ("once", (row for row in old_rows(4)), None, {}, "is a generator, which can be read only once"),
    ("split stream", split_dataset_by_node(stream(old_rows(4)), 0, 2), None, {}, "split_dataset_by_node"),
    ("stream without rows", stream(old_rows(4)).take(0), None, {}, "a stream without rows"),
    ("named train", {"train": old_rows(4)}, None, {}, "a source is named 'train'"),
    ("no size", {"a": old_rows(4), "b": stream(old_rows(4))}, None, {}, "the size of the stream 'b' is not known"),
    ("one of two", {"a": old_rows(4), "b": tiny.rows(4, high=100)}, None, {}, "the replay data 'b' holds token ids"),
    ("no training data", old_rows(4), new_rows(4).select([]), {}, "the train_dataset is empty"),
    ("vocabulary", tiny.rows(4, high=100), None, {}, "token ids"),
    ("columns", Dataset.from_dict({"text": ["raw"]}), None, {}, "No columns in the dataset match"),
    ("labels", old_rows(4).remove_columns("labels"), None, {}, "has the columns ['input_ids'], the training data"),
    ("lengths", old_rows(4, length=12), None, {}, "cannot be collated together"),
    ("group_by_length", old_rows(4), None, {"train_sampling_strategy": "group_by_length"}, "'group_by_length'"),
    ("sequential", old_rows(4), None, {"train_sampling_strategy": "sequential"}, "PlanConfig(order='original')"),
    ("split", old_rows(4), None, {"accelerator_config": {"split_batches": True}}, "split_batches=True"),
    ("dispatch", old_rows(4), None, {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ("auto batch", old_rows(4), None, {"auto_find_batch_size": True}, "auto_find_batch_size would change the run"),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "arguments", "message"), WRONG_DATA, ids=[row[0] for row in WRONG_DATA]
)
def test_data_that_does_not_fit_is_refused_at_extend(
    name: str, old: Any, new: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = tiny.trainer(
        tmp_path, ReplayCallback(old, ratio=0.25), data=new_rows(40) if new is None else new, **arguments
    )
    with pytest.raises(PluginError) as error:
        extend(trainer)
    assert message in str(error.value)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    ours = train_tokenizer(["the cat sat on the mat"], vocab_size=260)
    other = train_tokenizer(["der Hund sah den Hund"], vocab_size=260)
    for tokenizer, fine in ((ours, True), (other, False)):
        trainer = tiny.trainer(tmp_path, ReplayCallback(old_rows(9), ratio=0.25, tokenizer=tokenizer))
        trainer.processing_class = ours
        if fine:
            extend(trainer)
        else:
            with pytest.raises(PluginError, match="made by another tokenizer"):
                extend(trainer)


def test_too_small_a_source_is_a_note_with_its_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(tiny.trainer(tmp_path, ReplayCallback(old_rows(4), ratio=0.5), max_steps=10))
    assert "too small for its share: 4 rows for 20 samples, 5.0 passes" in capsys.readouterr().err


def test_additional_with_fixed_steps_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(tiny.trainer(tmp_path, ReplayCallback(old_rows(40), ratio=0.25, mode="additional"), max_steps=6))
    assert "max_steps=6 fixes the run. Use num_train_epochs, or set max_steps to 8" in capsys.readouterr().err


def test_ids_beyond_the_sample_are_caught_in_the_batch(tmp_path: Path) -> None:
    """A wrong id in one row of thousands slips past the 1,000 sampled rows, and is named when it comes up."""
    ids = old_rows(3000)["input_ids"][:]
    bad = next(n for n in range(3000) if n not in set(_sampled(3000)))
    ids[bad] = [999] * tiny.LENGTH
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).select([bad, *_sampled(3000)])
    plugin = ReplayCallback(data, ratio=0.9, order="original")
    plugin._check_rows = lambda *given: ()  # type: ignore[method-assign]  # as if it had not met that row
    with pytest.raises(ValueError, match=r"token id 999, but the model has 64 embeddings.*replay.*rows 0"):
        run(tmp_path, plugin)


def _sampled(number: int) -> list[int]:
    from hf_pretrain_ext.data import sample_rows

    return sample_rows(number)


def test_the_end_of_a_trace_counts_every_step(tmp_path: Path) -> None:
    """Six steps, a log line after four and no save: the last two are counted too."""
    run(tmp_path, ReplayCallback(old_rows(30), ratio=0.25), logging_steps=4)
    counts = read_trace(tmp_path)[-1]["counts"]
    assert {name: entry["samples"] for name, entry in counts.items()} == {"train": 18, "replay": 6}
