"""Weights that a checkpoint holds under other names than the model's: loaded on resume and as the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, default_data_collator

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.reload import load_converted, misnamed

RENAMED = ("GPT-NeoX", "Mixtral")


def trainer(name: str, folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        model=architectures.build(name),
        args=tiny.arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **settings),
        train_dataset=tiny.rows(20, low=3),
        eval_dataset=tiny.rows(6, seed=1, low=3),
        data_collator=default_data_collator,
        callbacks=[RewarmCallback(1e-1, warmup=1)],
    )


@pytest.mark.parametrize("name", RENAMED)
def test_the_host_alone_leaves_such_weights_out(name: str, tmp_path: Path) -> None:
    """Why this module is there: when this fails, upstream has mended it."""
    trainer(name, tmp_path).train()
    resumed = trainer(name, tmp_path)
    folder = str(tmp_path / "checkpoint-2")
    resumed._load_from_checkpoint(folder)
    found = misnamed(resumed.model, folder)
    right = type(resumed.model).from_pretrained(folder).state_dict()
    assert found and all(not torch.equal(resumed.model.state_dict()[key], right[key]) for key in found)
    assert load_converted(resumed.model, folder)
    assert all(torch.equal(tensor, right[key]) for key, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("name", [*RENAMED, "Llama"])
def test_the_best_model_is_the_best_checkpoint(name: str, tmp_path: Path) -> None:
    trained = extend(
        trainer(
            name, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=None
        )
    )
    trained.train()
    best = trained.state.best_model_checkpoint
    assert best is not None
    right = type(trained.model).from_pretrained(best).state_dict()
    assert all(torch.equal(tensor, right[key]) for key, tensor in trained.model.state_dict().items())


def test_names_that_agree_cost_nothing(tmp_path: Path) -> None:
    """Llama, with its head tied to its embeddings and without."""
    for model in (tiny.model(), architectures.build("Llama")):
        model.save_pretrained(tmp_path)
        assert misnamed(model, tmp_path) == [] and not load_converted(model, tmp_path)


def test_weights_that_are_nowhere_are_an_error(tmp_path: Path) -> None:
    model = architectures.build("Llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not hold the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_converted(model, tmp_path)


def test_a_model_of_torch_is_named(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the weights bias, weight of this Linear"):
        load_converted(torch.nn.Linear(2, 2), tmp_path)
