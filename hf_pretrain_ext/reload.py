"""Weights of a checkpoint whose names in the file are not the model's own.

`save_pretrained` writes some families (GPT-NeoX, Mixtral and others) under other names than the model's, and
`from_pretrained` converts them back; the Trainer, on resume and for the best model, does not: what it does not
recognise keeps its initial weights, with a warning. Here such a checkpoint is read by `from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.loading import is_adapter, missing_names, weight_files

__all__ = ["load_converted", "misnamed"]


def misnamed(model: Any, folder: str | Path) -> list[str]:
    """Weights of `model` that the safetensors files in `folder` do not hold under that name, tied ones left out."""
    files = weight_files(folder)
    return [] if not files or is_adapter(files) else sorted(missing_names(model, files))


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
