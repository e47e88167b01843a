"""Losses and gradients that are not finite: noticed, traced to the rows that were read, and acted on as asked.

The host's own filter leaves them out of the logged loss, so that a run can go on for days with weights that are NaN.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from hf_pretrain_ext.values import shown

if TYPE_CHECKING:
    from hf_pretrain_ext.run import PluginRun

__all__ = ["Action", "NonFiniteWatch"]

Action = Literal["report", "stop", "skip"]

_SAID = 10
_ROWS = 256


class NonFiniteWatch:
    """Looks at every loss and gradient norm of a run.

    Args:
        run ([`PluginRun`]): whose plan names the rows.
        action (`str`, *optional*, defaults to `"report"`): `"report"` changes nothing; `"stop"` leaves the update out,
            saves if saving is on, and ends training; `"skip"` leaves the update out and goes on (the step counts, the
            learning rate moves on). What is decided on is the gradient norm, which is the same on all ranks.

    Raises:
        `ValueError`: another action.
    """

    def __init__(self, run: PluginRun, action: Action = "report"):
        if action not in get_args(Action):
            raise ValueError(f"on_nonfinite must be one of {get_args(Action)}, got {shown(action)}")
        self.run = run
        self.action = action
        self.begin()

    def begin(self) -> None:
        self.found = 0
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | float | None = None

    def loss(self, loss: Any) -> None:
        """Takes the loss of a micro-batch."""
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach())

    def gradient_norm(self, norm: Any) -> None:
        """Takes the norm of the step's gradients, before clipping."""
        self._norm = norm

    def before_update(self, model: torch.nn.Module, control: Any) -> None:
        """Judges the step whose update comes next."""
        losses, norm = self._losses, self._norm
        self._losses, self._norm = [], None
        scaled = getattr(self.run.trainer.accelerator, "scaler", None) is not None
        # A loss scaler finds its scale by overflowing, and leaves those updates out itself.
        bad_norm = norm is not None and not scaled and not bool(torch.isfinite(torch.as_tensor(norm)).all())
        finite = torch.isfinite(torch.stack([loss.float().mean() for loss in losses])).tolist() if losses else []
        bad_micro = [number for number, good in enumerate(finite) if not good]
        if not bad_norm and not bad_micro:
            return
        self.found += 1
        what = [name for name, bad in (("loss", bad_micro), ("gradients", bad_norm)) if bad]
        acted = self.action if bad_norm else "report"
        rows = self._rows(bad_micro, len(losses))
        self.run.trace("nonfinite", what=what, action=acted, rows=rows, micro_batches=bad_micro)
        if self.found <= _SAID or self.found & (self.found - 1) == 0:
            self.run.say(self._message(what, acted, rows), logging.WARNING)
        if acted == "report":
            return
        for parameter in model.parameters():
            parameter.grad = None
        if acted == "stop":
            control.should_training_stop = True
            control.should_save = control.should_save or self.run.trainer.args.save_strategy != "no"

    def _rows(self, micro: list[int], number: int) -> dict[str, list[int]]:
        """The rows of the micro-batches `micro` of this rank, or of the whole step where none is to blame alone."""
        run, plan = self.run, self.run.plan
        if plan is None:
            return {}
        first = run.step * run.global_batch
        spans = [(first, first + run.global_batch)]
        rank, ranks = run.ranks
        if micro and number:
            size = run.global_batch // (ranks * number)
            spans = [(first + (m * ranks + rank) * size, first + (m * ranks + rank + 1) * size) for m in micro]
        found: dict[str, list[int]] = {}
        for start, stop in spans:
            draws = plan.draws(start, stop)
            for source, row in zip(draws.source.tolist(), draws.row.tolist(), strict=True):
                found.setdefault(plan.sources[source].name, []).append(row)
        return {name: rows[:_ROWS] for name, rows in found.items()}

    def _message(self, what: list[str], acted: str, rows: dict[str, list[int]]) -> str:
        # The step that is being made: the log counts it once it is done.
        verb = "is" if what == ["loss"] else "are"
        message = f"step {self.run.step + 1}: the {' and the '.join(what)} {verb} not finite"
        for name, numbers in rows.items():
            shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
            message += f"; {name} rows {shown}"
        return (
            message
            + {
                "report": ". The weights may be lost: pass on_nonfinite='stop' or 'skip' to `extend` to keep them",
                "stop": ". The update is left out and training stops (on_nonfinite='stop')",
                "skip": ". The update is left out (on_nonfinite='skip')",
            }[acted]
        )
