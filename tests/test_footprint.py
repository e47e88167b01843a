"""The copies that plug-ins keep, as they are planned and as they are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import L2InitCallback, ReptileCallback, SelfDistillationCallback
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.footprint import copies


def tensors(state_dict: dict[str, Any]) -> int:
    """Bytes of the tensors in an optimizer's state."""
    held = [value for state in state_dict["state"].values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in held)


def copied(trainer: Any, plugin: Any) -> int:
    """Bytes beyond the weights and the optimizer's own state."""
    if isinstance(plugin, SelfDistillationCallback):
        return sum(param.numel() * param.element_size() for param in plugin._model.parameters())
    ours = trainer.optimizer
    while not hasattr(ours, "anchor_key"):
        ours = ours.optimizer
    return tensors(ours.state_dict()) - tensors(ours.optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: ReptileCallback(every=2), lambda: L2InitCallback(), lambda: SelfDistillationCallback()]
)
def test_as_many_bytes_are_held_as_planned(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    plugin = make()
    trainer = extend(tiny.trainer(tmp_path, plugin, model=tiny.model().to(dtype)))
    trainer.train()
    trained = sum(param.numel() for param in trainer.model.parameters())
    assert copied(trainer, plugin) == copies(trained, dtype)[type(plugin).__name__]


def test_the_command_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    assert main(["memory", str(tmp_path), "--rank", "4"]) == 0
    shown = capsys.readouterr().out
    trained = sum(param.numel() for param in tiny.model().parameters())
    for name, size in copies(trained, torch.bfloat16).items():
        assert f"{name:<34}{size / 1e9:9.3f}" in shown
