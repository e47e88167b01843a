"""Bytes that plug-ins keep besides weights, gradients and optimizer state."""

from __future__ import annotations

import torch

__all__ = ["copies", "copies_table"]


def copies(trained: int, dtype: torch.dtype) -> dict[str, int]:
    """
    Copies of the weights that plug-ins keep, in bytes.

    Args:
        trained (`int`): trained parameters.
        dtype (`torch.dtype`): of the weights.

    Returns:
        `dict[str, int]`: by plug-in. Those of the first two may lie on the CPU (`anchor_device`).

    Example:

    >>> copies(1_000, torch.bfloat16)
    {'ReptileCallback': 4000, 'L2InitCallback': 2000, 'SelfDistillationCallback': 2000}
    """
    own = trained * dtype.itemsize
    return {"ReptileCallback": 4 * trained, "L2InitCallback": own, "SelfDistillationCallback": own}


_NOTES = {
    "ReptileCallback": "where the last interval began, in 32 bits; with anchor_device='cpu' not on the device",
    "L2InitCallback": "where training began, in the weights' type; with anchor_device='cpu' not on the device",
    "SelfDistillationCallback": "the teacher; none where an adapter alone is trained, whose base is the teacher",
}


def copies_table(trained: int, dtype: torch.dtype) -> list[str]:
    """`copies` for people, in gigabytes."""
    lines = ["copies of the weights that plug-ins keep besides, GB:", ""]
    lines += [f"{name:<34}{size / 1e9:9.3f}   {_NOTES[name]}" for name, size in copies(trained, dtype).items()]
    return lines
