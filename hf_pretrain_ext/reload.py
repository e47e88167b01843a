"""Weights of a checkpoint whose names in the file are not the model's own.

`save_pretrained` writes some families (GPT-NeoX, Mixtral and others) under other names than the model's, and
`from_pretrained` converts them back; the Trainer, on resume and for the best model, does not: what it does not
recognise keeps its initial weights, with a warning. Here such a checkpoint is read by `from_pretrained`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_pretrain_ext.checkpoint import CheckpointError

__all__ = ["load_converted", "misnamed"]


def misnamed(model: Any, folder: str | Path) -> list[str]:
    """Weights of `model` that the safetensors files in `folder` do not hold under that name, tied ones left out."""
    held = _names(Path(folder))
    if held is None:
        return []
    state = model.state_dict()
    # A tied weight is held under one of its names.
    present = {tensor.data_ptr() for name, tensor in state.items() if name in held}
    return sorted(name for name, tensor in state.items() if name not in held and tensor.data_ptr() not in present)


def _names(folder: Path) -> set[str] | None:
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return None


def load_converted(model: Any, folder: str | Path) -> bool:
    """Loads `folder` into `model` by way of `from_pretrained` if names differ; returns whether it had to.

    Costs a second copy of the weights on the CPU while it runs.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: weights that are not there under any name.
    """
    missing = misnamed(model, folder)
    if not missing:
        return False
    if not hasattr(model, "from_pretrained"):
        raise CheckpointError(
            f"{folder} does not hold the weights {', '.join(missing[:5])} of this {type(model).__name__}: resuming "
            "would go on with their initial values. Resume with the model that was trained."
        )
    loaded, report = type(model).from_pretrained(
        folder, config=model.config, dtype=model.dtype, output_loading_info=True
    )
    lost = sorted(set(report["missing_keys"]) - set(loaded.all_tied_weights_keys))
    if lost:
        raise CheckpointError(
            f"{folder} does not hold the weights {', '.join(lost[:5])} of this {type(model).__name__}: resuming would "
            "go on with their initial values. Resume with the model that was trained."
        )
    model.load_state_dict(loaded.state_dict())
    return True
