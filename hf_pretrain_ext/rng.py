"""Random-number state: taken, put back, and kept out of the way of code that must not disturb training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["get_rng_state", "rng_guard", "seed_all", "set_rng_state"]


def get_rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    # is_initialized: asking an untouched CUDA context for its state would create the context.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators of the CPU with `seed` (any non-negative int).

    Not `torch.manual_seed`: it would also seed an accelerator that is not initialised yet, later, out of any guard.
    """
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.default_generator.manual_seed(seed % (1 << 63))


@contextmanager
def rng_guard(seed: int | None = None) -> Iterator[None]:
    """Leaves the global random state as it was, whatever the body draws; inside, it starts from `seed` if given.

    Example:

    >>> _ = torch.manual_seed(0)
    >>> with rng_guard(seed=1):
    ...     _ = torch.rand(3)
    >>> a = torch.rand(1); _ = torch.manual_seed(0)
    >>> bool(a == torch.rand(1))
    True
    """
    state = get_rng_state()
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        set_rng_state(state)
