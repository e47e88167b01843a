"""Learning-rate schedules as pure functions of the step, built of named phases. Knows no Trainer.

A schedule is a callable `step -> learning rate`; its phases follow each other, each with a length in optimizer steps
and a shape. Steps are clamped to the schedule, never wrapped: after the last phase the final rate holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_pretrain_ext.units import to_rate, to_steps

__all__ = ["LRPhase", "LRSchedule", "RewarmConfig", "cosine"]

_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda u, first, last: first,
    "linear": lambda u, first, last: first + (last - first) * u,
    "cosine": lambda u, first, last: last + (first - last) / 2 * (1 + math.cos(math.pi * u)),
}


@dataclass(frozen=True)
class LRPhase:
    """`steps` optimizer steps from rate `first` to rate `last` along `shape`."""

    name: str
    steps: int
    shape: str
    first: float
    last: float

    def at(self, step: int) -> float:
        """The rate `step` steps into the phase, 0 ≤ step ≤ steps."""
        return _SHAPES[self.shape](step / self.steps, self.first, self.last)


@dataclass(frozen=True)
class LRSchedule:
    """A learning rate for every optimizer step: `schedule(step)`, `step` counted from 0.

    Example:

    >>> schedule = cosine(total_steps=100, peak_lr=1.0, min_lr="10%", warmup=10)
    >>> [round(schedule(step), 3) for step in (0, 5, 10, 55, 100, 10**9)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """

    name: str
    phases: tuple[LRPhase, ...]

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def __call__(self, step: int) -> float:
        step = max(int(step), 0)
        for phase in self.phases:
            if step < phase.steps:
                return phase.at(step)
            step -= phase.steps
        return self.phases[-1].last

    def describe(self) -> list[str]:
        """The plan of the learning rate, one line a phase."""
        lines, start = [], 0
        for phase in self.phases:
            stop = start + phase.steps
            rates = f"{phase.first:.3g}" if phase.first == phase.last else f"{phase.first:.3g} → {phase.last:.3g}"
            lines.append(f"{phase.name:<9} steps {start:>7,} – {stop:>9,}  learning rate {rates} ({phase.shape})")
            start = stop
        return lines

    def identity(self) -> dict[str, Any]:
        """All that decides the rates, as JSON types."""
        return {"name": self.name, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_identity(cls, identity: dict[str, Any]) -> LRSchedule:
        """The schedule that `identity` describes, to show it again."""
        return cls(str(identity["name"]), tuple(LRPhase(**phase) for phase in identity["phases"]))


def _schedule(name: str, *phases: LRPhase) -> LRSchedule:
    kept = tuple(phase for phase in phases if phase.steps > 0)
    return LRSchedule(name, kept or phases[-1:])


def cosine(
    *,
    total_steps: int,
    peak_lr: float,
    min_lr: float | str = "10%",
    warmup: int | float | str = 0.01,
    start_lr: float | str = 0.0,
) -> LRSchedule:
    """Linear re-warm to `peak_lr`, then cosine re-decay to `min_lr` (Ibrahim et al., 2024).

        lr(t) = start + (peak − start) · t / W                                 t ≤ W
        lr(t) = min + (peak − min)/2 · (1 + cos(π (t − W)/(T − W)))            W < t ≤ T, clamped after T

    Args:
        total_steps (`int`): T, optimizer steps of the whole schedule.
        peak_lr (`float`): the rate re-warmed to; the paper's advice is the peak of the pre-training.
        min_lr (`float` or `str`, *optional*, defaults to `"10%"`): the final rate, absolute or relative to the peak
            (the paper: 0.1 × peak).
        warmup (`int`, `float` or `str`, *optional*, defaults to `0.01`): W, steps or a fraction of T (the paper: 1 %;
            Gupta et al., 2023, found 0 to 2 % to end alike).
        start_lr (`float` or `str`, *optional*, defaults to `0.0`): the rate at step 0.

    Raises:
        `ValueError`: a length or rate out of range; the message names it.

    Example:

    >>> cosine(total_steps=1000, peak_lr=3e-4)(10)
    0.0003
    """
    total_steps, peak_lr = _check_run(total_steps, peak_lr)
    warm = to_steps(warmup, total_steps, "warmup")
    low, start = to_rate(min_lr, peak_lr, "min_lr"), to_rate(start_lr, peak_lr, "start_lr")
    if warm >= total_steps:
        raise ValueError(f"warmup of {warm} steps leaves nothing of a schedule of {total_steps} steps to decay over")
    if low > peak_lr:
        raise ValueError(f"min_lr {low:g} is above peak_lr {peak_lr:g}")
    return _schedule(
        "cosine",
        LRPhase("warm-up", warm, "linear", start, peak_lr),
        LRPhase("decay", total_steps - warm, "cosine", peak_lr, low),
    )


def _check_run(total_steps: int, peak_lr: float) -> tuple[int, float]:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive int (optimizer steps), got {total_steps!r}")
    if isinstance(peak_lr, bool) or not isinstance(peak_lr, int | float) or not 0 < peak_lr < math.inf:
        raise ValueError(f"peak_lr must be a positive learning rate such as 3e-4, got {peak_lr!r}")
    return total_steps, float(peak_lr)


_BUILDERS: dict[str, Callable[..., LRSchedule]] = {"cosine": cosine}


@dataclass
class RewarmConfig:
    """Settings of re-warming, readable by `HfArgumentParser`.

    Lengths and rates are typed `str`, the only form in which the parser can hand over both `0.01` and `500 steps`;
    from Python, numbers are as good.
    """

    peak_lr: float = field(metadata={"help": "Learning rate to re-warm to; usually the peak of the pre-training."})
    schedule: str = field(default="cosine", metadata={"help": f"Shape of the schedule: {', '.join(_BUILDERS)}."})
    warmup: str = field(
        default="0.01", metadata={"help": "Warm-up: steps as an int, or a fraction of the run as a float below 1."}
    )
    min_lr: str = field(
        default="10%", metadata={"help": 'Final learning rate: absolute, or relative to the peak as in "10%%".'}
    )
    start_lr: str = field(default="0", metadata={"help": "Learning rate at step 0, absolute or relative."})
    total_steps: int | None = field(
        default=None, metadata={"help": "Length of the schedule in steps; defaults to the length of the run."}
    )

    def build(self, run_steps: int) -> LRSchedule:
        """The schedule of a run of `run_steps` optimizer steps.

        Raises:
            `ValueError`: an unknown schedule, or a length or rate out of range.

        Example:

        >>> RewarmConfig(peak_lr=1e-3).build(200).total_steps
        200
        """
        if self.schedule not in _BUILDERS:
            raise ValueError(f"schedule must be one of {sorted(_BUILDERS)}, got {self.schedule!r}")
        return _BUILDERS[self.schedule](
            total_steps=run_steps if self.total_steps is None else self.total_steps,
            peak_lr=self.peak_lr,
            min_lr=self.min_lr,
            warmup=self.warmup,
            start_lr=self.start_lr,
        )
