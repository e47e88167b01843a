"""Checkpoints to merge, and what the tests of merging do to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

State = dict[str, Tensor]


def state_of(folder: Path) -> State:
    """All tensors of a folder, by the library that reads whole files."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def same_bits(found: State, other: State) -> bool:
    return found.keys() == other.keys() and all(
        found[key].dtype is other[key].dtype
        and torch.equal(found[key].view(torch.uint8), other[key].view(torch.uint8))
        for key in found
    )


def perturbed(seed: int, spread: float) -> Any:
    """A model near that of seed 0, every parameter of it (norms, too) moved."""
    model = tiny.model(seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += spread * torch.randn(weight.shape, generator=generator)
    return model


def save(folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16, shards: str = "50GB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def make_checkpoints(root: Path) -> dict[str, Path]:
    """A base in one file and what others made of it, in several files divided in different ways."""
    made = {
        "base": save(root / "base", perturbed(0, 0.0)),
        "instruct": save(root / "instruct", perturbed(1, 0.02), shards="3KB"),
        "adapted": save(root / "adapted", perturbed(2, 0.02), shards="4KB"),
        "wide": save(root / "wide", perturbed(3, 0.02), torch.float32, shards="8KB"),
    }
    assert [len(list(folder.glob("*.safetensors"))) for folder in made.values()] == [1, 5, 3, 3]
    (made["instruct"] / "chat_template.jinja").write_text("{{ messages }}")
    return made


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_weights(folder: Path, change: Callable[[State], None]) -> Path:
    state = state_of(folder)
    change(state)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
