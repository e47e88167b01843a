"""ForgettingCallback: exact losses, the steps it probes, what it writes, stops and leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator

from hf_pretrain_ext import PluginError, extend, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.data import sample_rows


def test_loss_equals_the_hosts_own_evaluation(tmp_path: Path) -> None:
    """Same model, same rows: our token-weighted loss against `Trainer.evaluate` over one even batch, and by hand."""
    rows = tiny.rows(8, seed=5)
    probe = ForgettingCallback({"old": rows})
    trainer = extend(tiny.trainer(tmp_path, probe, max_steps=1, learning_rate=1e-9, per_device_eval_batch_size=8))
    trainer.train()
    measured = probe.history.sets["old"]["losses"][0]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(measured, rel=1e-5)
    ids = torch.tensor(rows["input_ids"][:])
    logits = tiny.model()(ids).logits.double()
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert measured == pytest.approx(float(by_hand), rel=1e-6)
    assert probe.history.sets["old"]["tokens"] == 8 * 15


def test_ragged_last_batches_are_exact(tmp_path: Path) -> None:
    """10 rows in batches of 4, or of 10, or one by one: the same loss, which a mean of batch means would not give."""
    losses = []
    for size in (1, 4, 10):
        probe = ForgettingCallback({"old": tiny.rows(10, seed=5)}, batch_size=size)
        extend(tiny.trainer(tmp_path / str(size), probe, max_steps=1)).train()
        losses.append(probe.history.sets["old"]["losses"][0])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_probe_steps_and_logged_names(tmp_path: Path) -> None:
    probe = ForgettingCallback({"old": tiny.rows(4), "new": tiny.rows(4, seed=8)}, every=50)
    trainer = extend(tiny.trainer(tmp_path, probe, max_steps=110, logging_steps=1000))
    trainer.train()
    wanted = [*range(21), 32, 50, 64, 100, 110]
    assert probe.history.sets["old"]["steps"] == wanted
    lines = [line for line in trainer.state.log_history if "eval_old_loss" in line]
    assert [line["step"] for line in lines] == wanted
    for line in lines:
        assert line["eval_old_perplexity"] == pytest.approx(math.exp(line["eval_old_loss"]))
        assert "eval_new_loss" in line
    sparse = ForgettingCallback({"old": tiny.rows(4)}, every=50, first_steps="sparse")
    extend(tiny.trainer(tmp_path, sparse, max_steps=110)).train()
    assert sparse.history.sets["old"]["steps"] == [0, 50, 100, 110]


def test_files_and_figures(tmp_path: Path) -> None:
    probe = ForgettingCallback({"old": tiny.rows(6, seed=9)}, every=0.5)
    trainer = extend(tiny.trainer(tmp_path, probe, RewarmCallback(peak_lr=5e-2, warmup=2), max_steps=24))
    trainer.train()
    written = json.loads((tmp_path / "forgetting.json").read_text())
    entry = written["sets"]["old"]
    losses, figures = entry["losses"], entry["summary"]
    assert figures["initial"] == losses[0] and figures["final"] == losses[-1]
    assert figures["worst"] == max(losses) and figures["gap_depth"] == max(losses) - losses[0]
    assert figures["forgetting"] == losses[-1] - min(losses)
    assert figures["gain"] == losses[0] - losses[-1]
    png = (tmp_path / "forgetting.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    probes = [event for event in read_trace(tmp_path) if event["event"] == "probe"]
    assert [event["step"] for event in probes] == entry["steps"]


def test_dropout_modes_and_gradients_are_left_alone(tmp_path: Path) -> None:
    """A module that the user keeps in evaluation mode stays there; probes leave no gradients behind."""

    class Freeze(TrainerCallback):
        modes: list[tuple[bool, bool]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].model.layers[0].eval()  # the probe comes after this, the host's next train() later

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                layers = kwargs["model"].model.layers
                self.modes.append((layers[0].training, layers[1].training))

    freeze = Freeze()
    trainer = extend(tiny.trainer(tmp_path, ForgettingCallback({"old": tiny.rows(4)}), freeze))
    trainer.train()
    assert freeze.modes == [(False, True)] * 5
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_stop_if_stops_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that wrecks the model: the loss on the set rises above step 0, the run ends, its checkpoint is there."""
    probe = ForgettingCallback({"old": tiny.rows(6, seed=9)}, stop_if={"old": 0.05}, alert_if={"old": 0.01})
    trainer = extend(
        tiny.trainer(tmp_path, probe, max_steps=40, learning_rate=0.5, save_strategy="steps", save_steps=1000)
    )
    trainer.train()
    step = trainer.state.global_step
    assert step < 40
    assert probe.history.rise("old") > 0.05
    assert probe.history.sets["old"]["losses"][-2] - probe.history.sets["old"]["losses"][0] <= 0.05
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    events = {event["event"] for event in read_trace(tmp_path)}
    assert {"stop", "alert"} <= events
    said = capsys.readouterr().err
    assert said.count("alert: the loss on old has risen") == 1 and "stopping: the loss on old" in said


def test_best_model_and_early_stopping_can_use_it(tmp_path: Path) -> None:
    """`metric_for_best_model="eval_old_loss"`: the best checkpoint is the one where our figure was lowest."""
    probe = ForgettingCallback({"old": tiny.rows(6, seed=9)}, first_steps="sparse", every=1000)
    trainer = extend(
        tiny.trainer(
            tmp_path,
            probe,
            EarlyStoppingCallback(early_stopping_patience=2),
            max_steps=40,
            learning_rate=0.05,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            eval_dataset=tiny.rows(4, seed=3),
            metric_for_best_model="eval_old_loss",
            greater_is_better=False,
            load_best_model_at_end=True,
        )
    )
    trainer.train()
    entry = probe.history.sets["old"]
    measured = dict(zip(entry["steps"], entry["losses"], strict=True))
    evaluated = {step: loss for step, loss in measured.items() if step and step % 2 == 0}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == evaluated[best]
    assert trainer.state.global_step < 40
    assert "eval_old_loss" in next(line for line in trainer.state.log_history if "eval_loss" in line)


def test_masked_language_models_and_encoder_decoders(tmp_path: Path) -> None:
    """Labels that are not shifted: BERT by hand; T5 makes its decoder inputs from the labels."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=32))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    rows = tiny.rows(6, seed=4)
    ids = torch.tensor(rows["input_ids"][:])
    for name, model in (("bert", bert), ("t5", t5)):
        probe = ForgettingCallback({"old": rows})
        model.eval()
        with torch.no_grad():
            outputs = model(input_ids=ids, labels=ids)
        trainer = Trainer(
            model=model,
            args=tiny.arguments(tmp_path / name, max_steps=1),
            train_dataset=tiny.rows(8),
            data_collator=default_data_collator,
        )
        extend(trainer, probe, ReplayCallback(tiny.rows(8, seed=2), ratio=0.25)).train()
        assert probe.history.sets["old"]["losses"][0] == pytest.approx(float(outputs.loss), rel=1e-5)
        assert probe.history.sets["old"]["tokens"] == ids.numel()
        assert trainer.plugin_run.realised()["replay"]["loss_tokens"] == 16


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ({}, {}, "datasets must be a dict of held-out sets by name"),
    ([1], {}, "datasets must be a dict of held-out sets by name"),
    ({"a/b": 1}, {}, "a name holds letters, digits"),
    ({"old": 1}, {"every": 0}, "every must be at least one step"),
    ({"old": 1}, {"every": 2.5}, "every must be an int (steps)"),
    ({"old": 1}, {"first_steps": "all"}, "first_steps must be 'dense' or 'sparse', got 'all'"),
    ({"old": 1}, {"max_samples": 0}, "max_samples must be a positive int (rows), got 0"),
    ({"old": 1}, {"batch_size": -1}, "batch_size must be a positive int (rows), got -1"),
    ({"old": 1}, {"stop_if": {"new": 0.1}}, "stop_if: 'new' is not one of the sets ['old']"),
    ({"old": 1}, {"alert_if": {"old": 0}}, "alert_if['old'] must be a positive rise in nats, got 0"),
]


@pytest.mark.parametrize(("sets", "settings", "message"), WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_settings_fail_at_construction(sets: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ForgettingCallback(sets, **settings)
    assert message in str(error.value)


WRONG_SETS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("empty", tiny.rows(4).select([]), {}, "forgetting[old]: is empty"),
    ("stream", tiny.rows(4).to_iterable_dataset(), {}, "whose rows cannot be looked up"),
    ("vocabulary", tiny.rows(4, high=100), {}, "but the model has 64 embeddings"),
    ("columns", Dataset.from_dict({"text": ["raw"]}), {}, "cannot be used: No columns in the dataset match"),
    ("no labels", tiny.rows(4).remove_columns("labels"), {}, "gives batches without labels"),
    ("name", tiny.rows(4), {"eval_dataset": {"old": tiny.rows(4)}}, "has the name of a set in the Trainer's"),
]


@pytest.mark.parametrize(("name", "data", "arguments", "message"), WRONG_SETS, ids=[row[0] for row in WRONG_SETS])
def test_sets_that_do_not_fit_are_refused_at_extend(
    name: str, data: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError) as error:
        extend(tiny.trainer(tmp_path, ForgettingCallback({"old": data}), **arguments))
    assert message in str(error.value)


def test_held_out_rows_that_are_trained_on_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(tiny.trainer(tmp_path, ForgettingCallback({"old": tiny.rows(10)}), data=tiny.rows(40)))
    assert "10 of its 10 rows are in the training data, and 0 more share 40 % or more" in capsys.readouterr().err
    extend(tiny.trainer(tmp_path, ForgettingCallback({"old": tiny.rows(10, seed=77)}), data=tiny.rows(40)))
    assert "13-grams" not in capsys.readouterr().err


def test_held_out_rows_that_are_replayed_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = tiny.rows(10, seed=77)
    extend(tiny.trainer(tmp_path, ForgettingCallback({"old": held_out}), ReplayCallback(held_out, ratio=0.25)))
    assert "10 of its 10 rows are in the replay data" in capsys.readouterr().err


def test_of_many_rows_a_sample_is_looked_at_and_the_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of ten held-out rows stand among 1,500 that are trained on, in places that a sample of 1,000 has."""
    trained, held_out = tiny.rows(1500, seed=5), tiny.rows(10, seed=77)
    seen, unseen = sample_rows(1500)[:2], next(row for row in range(1500) if row not in sample_rows(1500))
    for places, expected in (
        (seen, "2 of its 10 rows are in 1,000 of the 1,500 rows of the training data"),
        ([unseen], ""),
    ):
        mixed = [held_out[places.index(n)] if n in places else trained[n] for n in range(1500)]
        extend(tiny.trainer(tmp_path, ForgettingCallback({"old": held_out}), data=Dataset.from_list(mixed)))
        note = capsys.readouterr().err
        assert expected in note and ("13-grams" in note) == bool(expected)
