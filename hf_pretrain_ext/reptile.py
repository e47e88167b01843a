"""Reptile steps for any optimizer: every k steps the weights go back most of the way they came. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from hf_pretrain_ext.anchored import DEVICES, Anchored, total
from hf_pretrain_ext.values import MAX_STEPS, check_integers, is_number, shown

__all__ = ["Interpolation", "Reptile", "anchor_bytes"]

ANCHOR = "reptile_anchor"
STEPS = "reptile_steps"


@dataclass(frozen=True)
class Interpolation:
    """What one Reptile step saw.

    `displacement` is the norm of what the weights moved by since the last one, before most of it was taken back;
    `inner_product` that of the last step's gradient and the way back to where the interval began,
    ⟨∇L(B_k), θ₀ − θ_{k−1}⟩: under SGD the learning rate times the sum of that gradient's inner products with those of
    the steps before it. Above 0, they agree. `cosine` is the same over both norms.
    """

    step: int
    displacement: float
    inner_product: float
    cosine: float


def anchor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the copy of the weights that [`Reptile`] keeps: 4 a trained parameter.

    Example:

    >>> anchor_bytes(torch.nn.Linear(10, 10))
    440
    """
    return 4 * sum(param.numel() for param in model.parameters() if param.requires_grad)


class Reptile(Anchored):
    """
    An optimizer with Reptile steps (Abbes et al., 2025): after every `every` of its steps

        θ ← θ₀ + ε · (θ − θ₀)

    where θ₀ is where the last such step, or training, left the weights. With replayed samples in the batches this is
    meta-experience replay. Moments are left alone.

    θ₀ is kept in 32 bits whatever the weights' type: over weights of 16 bits it is what they are rounded from, and ε
    times the way they went is added to it, so that small steps are not rounded away.

    Args:
        optimizer (`torch.optim.Optimizer`): that makes the steps. Its groups and state are this one's.
        every (`int`, *optional*, defaults to 500): steps between two interpolations (Abbes et al.).
        epsilon (`float`, *optional*, defaults to 0.1): share of the way that is kept, above 0 and up to 1 (Abbes
            et al.).
        anchor_device (`str`, *optional*, defaults to `"weights"`): where θ₀ lies: beside the weights, or `"cpu"`.

    Raises:
        `ValueError`: a setting out of range. `TypeError`: `optimizer` is none.

    Example:

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = Reptile(torch.optim.SGD([weight], lr=1.0), every=2, epsilon=0.5)
    >>> for _ in range(2):
    ...     weight.grad = -torch.ones(1)
    ...     optimizer.step()
    >>> weight.item(), optimizer.last.displacement
    (1.0, 2.0)
    """

    anchor_key = ANCHOR
    numbers = {STEPS: "steps"}

    def __init__(
        self, optimizer: Optimizer, *, every: int = 500, epsilon: float = 0.1, anchor_device: str = "weights"
    ):
        if isinstance(optimizer, Reptile):
            raise TypeError("optimizer makes Reptile steps already: wrap it once")
        check_settings(every, epsilon, anchor_device)
        super().__init__(optimizer, anchor_device)
        self.every, self.epsilon = every, float(epsilon)
        self.steps = 0
        self.last: Interpolation | None = None
        self.on_interpolation: Callable[[Interpolation], None] | None = None

    def __repr__(self) -> str:
        return f"Reptile(every={self.every}, epsilon={self.epsilon}, {self.optimizer!r})"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._take_anchors()
        due = (self.steps + 1) % self.every == 0
        seen = self._alignment() if due else None
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if seen is not None:
            self._interpolate(*seen)
        return loss

    def _begin(self, param: torch.Tensor) -> torch.Tensor:
        """θ₀ as the weights had it, in 32 bits."""
        anchor = self._anchors[param].to(param.device)
        return anchor if param.dtype == torch.float32 else anchor.to(param.dtype).float()

    def _alignment(self) -> tuple[float, float]:
        """Inner product of the gradients with the way back to θ₀, and its share of the product of both norms."""
        product = gradients = way = 0.0
        for param in self._params():
            back = self._begin(param) - param.float()
            way += total(back * back)
            if param.grad is not None:
                gradient = param.grad.float()
                product += total(gradient * back)
                gradients += total(gradient * gradient)
        norms = (way * gradients) ** 0.5
        return product, product / norms if norms > 0 else 0.0

    def _interpolate(self, product: float, cosine: float) -> None:
        moved = 0.0
        for param in self._params():
            anchor, begin = self._anchors[param], self._begin(param)
            way = param.float() - begin
            moved += total(way * way)
            if self.epsilon == 1:
                # Leaves the weights alone, to the bit, whatever their type.
                anchor.copy_(param)
                continue
            new = anchor.to(param.device) + self.epsilon * way
            anchor.copy_(new)
            param.copy_(new)
        self.last = Interpolation(self.steps, moved**0.5, product, cosine)
        if self.on_interpolation is not None:
            self.on_interpolation(self.last)


def check_settings(every: Any, epsilon: Any, anchor_device: Any) -> None:
    """
    Raises:
        `ValueError`: a setting of [`Reptile`] out of range.
    """
    check_integers(every=(every, 1, MAX_STEPS, False))
    if not is_number(epsilon) or not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be above 0, where nothing would be learned, and up to 1, got {shown(epsilon)}")
    if anchor_device not in DEVICES:
        raise ValueError(f"anchor_device must be one of {DEVICES}, got {shown(anchor_device)}")
