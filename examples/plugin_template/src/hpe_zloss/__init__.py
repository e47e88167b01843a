"""Z-loss as a plug-in: keeps the logits' normaliser near 1 (Chowdhery et al., 2022, PaLM, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_pretrain_ext import Problem, Setup, TrainerPlugin

__all__ = ["ZLossCallback", "z_loss"]


def z_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of log² Z over the positions whose label counts.

    Args:
        logits (`Tensor`): `(batch, length, vocabulary)`.
        labels (`Tensor`): `(batch, length)`; −100 where there is none.

    Example:

    >>> z_loss(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))  # (ln 4)²
    tensor(1.9218)
    """
    return (logits.float().logsumexp(-1).square() * (labels != -100)).sum()


class ZLossCallback(TrainerPlugin):
    """Adds `weight` times the mean of log² Z to the training loss.

    Args:
        weight (`float`, *optional*, defaults to 1e-4): PaLM's.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept a weight of 0.
    """

    name = "zloss"
    resume = "exact"
    distributed = {"ddp": "untested", "fsdp2": "untested", "zero2": "untested", "zero3": "untested"}

    def __init__(self, weight: float = 1e-4, allow_no_effect: bool = False):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a number of at least 0, got {weight!r}")
        self.weight, self.allow_no_effect = float(weight), allow_no_effect

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def check(self, setup: Setup) -> Iterable[Problem]:
        if not self.weight and not self.allow_no_effect:
            yield Problem(self.name, "weight=0 would change nothing", "Raise it, or pass allow_no_effect=True.")

    def wrap_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def with_z_loss(
            model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **more: Any
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            loss, outputs = compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **more
            )
            if self.weight and model.training:
                # Of a step with several micro-batches, each takes its share of the tokens of all.
                tokens = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
                loss = loss + self.weight * self._ranks() * z_loss(outputs["logits"][:, :-1], labels) / max(tokens, 1)
            return (loss, outputs) if return_outputs else loss

        return with_z_loss

    def _ranks(self) -> int:
        """On several ranks the tokens of a step are those of all, and gradients are averaged: as the host does it."""
        run = self.run
        return run.ranks[1] if run is not None and run.trainer.args.average_tokens_across_devices else 1

    def describe(self) -> list[str]:
        return [f"{self.name}: weight {self.weight:g}"]
