"""Every plug-in on models of many families: three steps, a save, a reload, a resume, all exact, or a refusal.

`make test` takes six families; `make test-architectures` all of them, and writes docs/architectures.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import settings
import tiny
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, default_data_collator

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.meta_tokens import load_meta_tokens

PLUGINS = (
    "rewarm",
    "replay",
    "replay-mixture",
    "replay-tokens",
    "replay-stream",
    "forgetting",
    "gradnormlorp",
    "meta_tokens",
    "metadata",
    "metadata-control",
    "reptile",
    "l2_init",
    "self_distillation",
    "buffer",
)
METADATA = ("metadata", "metadata-control")
LEAKING = ("OPT", "BLOOM", "Falcon", "MPT", "Mamba", "Mamba 2", "RWKV")
REFUSED = {
    **dict.fromkeys([("Mamba", "meta_tokens"), ("Mamba 2", "meta_tokens"), ("RWKV", "meta_tokens")], "is recurrent"),
    **{(name, p): "is no causal language model" for name in ("RoBERTa", "T5") for p in ("meta_tokens", *METADATA)},
    # With isolate=False they train: tests/test_metadata_callback.py.
    **{(name, p): "lets documents of a packed row influence each other" for name in LEAKING for p in METADATA},
}
IN_MAKE_TEST = ("Llama", "Gemma 2", "GPT-2", "GPT-NeoX", "Mixtral", "Mamba")
MODELS: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: architectures.build(name)) for name in architectures.CAUSAL},  # type: ignore[misc]
    "RoBERTa": architectures.masked,
    "T5": architectures.encoder_decoder,
}


def cases() -> list[Any]:
    found = []
    for name in MODELS:
        quick = name in IN_MAKE_TEST
        for plugin in PLUGINS:
            # In `make test` the six families take one plug-in that decides the order, and the others together.
            marks = (
                []
                if quick and plugin in ("replay", "forgetting", "gradnormlorp", "meta_tokens", "metadata")
                else [pytest.mark.slow]
            )
            found.append(pytest.param(name, plugin, marks=[pytest.mark.architectures, *marks]))
    return found


class Save(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 2


def trainer(name: str, plugin: str, folder: Path) -> Trainer:
    seq2seq = name == "T5"
    made: dict[str, Any] = vars(tiny.arguments(folder, max_steps=3)) if seq2seq else {}
    arguments: Any = tiny.arguments(folder, max_steps=3)
    if seq2seq:
        kept = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps", "seed")
        arguments = Seq2SeqTrainingArguments(
            **{key: made[key] for key in kept}, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
    given = settings.by_name(plugin).trainer()
    return extend(
        (Seq2SeqTrainer if seq2seq else Trainer)(
            model=MODELS[name](),
            args=arguments,
            train_dataset=given.get("data", tiny.rows(20, low=3)),
            data_collator=given.get("data_collator", default_data_collator),
            processing_class=given.get("processing_class"),
            callbacks=[*settings.make(("rewarm",) if plugin == "rewarm" else ("rewarm", plugin)), Save()],
        )
    )


@pytest.mark.parametrize(("name", "plugin"), cases())
def test_trains_saves_reloads_and_resumes(name: str, plugin: str, tmp_path: Path) -> None:
    if (name, plugin) in REFUSED:
        with pytest.raises(PluginError, match=REFUSED[name, plugin]):
            trainer(name, plugin, tmp_path)
        note(name, plugin, "refused")
        return
    whole = trainer(name, plugin, tmp_path)
    start = tiny.weights(whole)
    whole.train()
    end = tiny.weights(whole)
    assert any(not torch.equal(start[key], end[key]) for key in end)
    assert all(torch.isfinite(tensor).all() for tensor in end.values() if tensor.is_floating_point())

    resumed = trainer(name, plugin, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.same_weights(whole, resumed)
    assert resumed.plugin_run.realised() == whole.plugin_run.realised()

    whole.save_model(str(tmp_path / "model"))
    reloaded = type(whole.model).from_pretrained(tmp_path / "model").eval()
    batch = {"input_ids": torch.tensor(tiny.rows(2, seed=7, low=3)["input_ids"][:])}
    if plugin == "meta_tokens":
        batch["input_ids"][:, 4::5] = load_meta_tokens(reloaded, tmp_path / "model")
    batch |= {"labels": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, whole.model.eval()(**batch).logits)
    note(name, plugin, "exact")


def note(name: str, plugin: str, outcome: str) -> None:
    if "ARCHITECTURES" in os.environ:
        with open(os.environ["ARCHITECTURES"], "a") as file:
            file.write(json.dumps([name, plugin, outcome]) + "\n")


def test_the_families_are_what_they_say() -> None:
    types = {MODELS[name]().config.model_type for name in MODELS}
    assert len(types) == len(MODELS) >= 26


def test_the_page_of_the_docs_has_a_row_a_family() -> None:
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ") and "family" not in line]
    assert rows == list(MODELS)
    outcomes = {name: {p: "refused" if (name, p) in REFUSED else "exact" for p in PLUGINS} for name in MODELS}
    assert page == architectures.table(outcomes)


def test_rows_are_whole(tmp_path: Path) -> None:
    """The data of these tests is what every family can read: ids above the special ones, one length."""
    data = tiny.rows(20, low=3)
    assert isinstance(data, Dataset) and min(min(row) for row in data["input_ids"]) >= 3
