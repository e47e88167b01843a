"""Learning-rate schedules as pure functions of the step, built of named phases. Knows no Trainer.

A schedule is a callable `step -> learning rate`; its phases follow each other, each with a length in optimizer steps
and a shape. Steps are clamped to the schedule, never wrapped: after the last phase the final rate holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from hf_pretrain_ext.units import to_rate, to_steps
from hf_pretrain_ext.values import MAX_STEPS, is_number, is_whole, shown

__all__ = [
    "CallableSchedule",
    "LRPhase",
    "LRSchedule",
    "RewarmConfig",
    "cosine",
    "infinite",
    "infinite_cosine",
    "infinite_linear",
    "infinite_rsqrt",
    "linear",
    "wsd",
]

TIMESCALE = 10.0
"""α of the inverse-square-root cool-down: `timescale` in the released configurations of Ibrahim et al. (2024)."""


def _rsqrt(u: float, first: float, last: float) -> float:
    fall = (1 / math.sqrt(1 + TIMESCALE * u) - 1) / (1 / math.sqrt(1 + TIMESCALE) - 1)
    return first + (last - first) * fall


_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda u, first, last: first,
    "linear": lambda u, first, last: first + (last - first) * u,
    "cosine": lambda u, first, last: last + (first - last) / 2 * (1 + math.cos(math.pi * u)),
    "rsqrt": _rsqrt,
    "exponential": lambda u, first, last: first * (last / first) ** u,
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


@dataclass(frozen=True)
class CallableSchedule(LRSchedule):
    """A function of the user's as a schedule of `total_steps` steps, clamped at the end.

    What a checkpoint keeps of it, to be compared on resume, is its rate at 65 steps spread over the run.

    Example:

    >>> schedule = CallableSchedule.of(lambda step: 1e-3 / (1 + step), total_steps=9)
    >>> schedule(9) == schedule(100) == 1e-4
    True
    """

    function: Callable[[int], float] = field(default=lambda step: 0.0, compare=False)

    @classmethod
    def of(cls, function: Callable[[int], float], total_steps: int) -> CallableSchedule:
        """Raises `ValueError` where the function gives no finite, non-negative number."""
        points = sorted({round(total_steps * k / 64) for k in range(65)})
        rates = []
        for step in points:
            rate = function(step)
            if not is_number(rate) or rate < 0:
                raise ValueError(
                    f"schedule must give a learning rate for every step, got {shown(rate)} for step {step}"
                )
            rates.append(float(rate))
        pairs = zip(points, points[1:], rates, rates[1:], strict=False)
        phases = tuple(LRPhase("callable", b - a, "linear", first, last) for a, b, first, last in pairs)
        return cls("callable", phases, function)

    def __call__(self, step: int) -> float:
        return float(self.function(min(max(int(step), 0), self.total_steps)))

    def describe(self) -> list[str]:
        rates = [self.phases[0].first, *(phase.last for phase in self.phases)]
        return [
            f"callable  steps {0:>7,} – {self.total_steps:>9,}  learning rate {rates[0]:.3g} → {rates[-1]:.3g} "
            f"(between {min(rates):.3g} and {max(rates):.3g})"
        ]


def _schedule(name: str, *phases: LRPhase) -> LRSchedule:
    kept = tuple(phase for phase in phases if phase.steps > 0)
    return LRSchedule(name, kept or phases[-1:])


def check_total_steps(total_steps: Any) -> None:
    """Raises `ValueError` where a schedule cannot be `total_steps` optimizer steps long."""
    if not is_whole(total_steps) or not 1 <= total_steps <= MAX_STEPS:
        most = f": at most {MAX_STEPS:.0e}" if is_whole(total_steps) and total_steps > 0 else ""
        raise ValueError(f"total_steps must be a positive int (optimizer steps), got {shown(total_steps)}{most}")


class _Run:
    """What all schedules share: the settings, read and checked."""

    def __init__(
        self,
        total_steps: int,
        peak_lr: float,
        min_lr: float | str,
        warmup: int | float | str,
        start_lr: float | str,
        tokens_per_step: float | None,
    ):
        check_total_steps(total_steps)
        if not is_number(peak_lr) or peak_lr <= 0:
            raise ValueError(f"peak_lr must be a positive learning rate such as 3e-4, got {shown(peak_lr)}")
        self.total, self.peak, self.tokens_per_step = total_steps, float(peak_lr), tokens_per_step
        self.low, self.start = to_rate(min_lr, peak_lr, "min_lr"), to_rate(start_lr, peak_lr, "start_lr")
        for name, rate in (("min_lr", self.low), ("start_lr", self.start)):
            if rate > peak_lr:
                raise ValueError(f"{name} {rate:g} is above peak_lr {peak_lr:g}")
        self.warm = self.length(warmup, "warmup")

    def length(self, value: int | float | str, name: str) -> int:
        return to_steps(value, self.total, name, self.tokens_per_step)

    def warm_up(self) -> LRPhase:
        return LRPhase("warm-up", self.warm, "linear", self.start, self.peak)

    def rest(self, names: str, used: int) -> int:
        """Steps left after the warm-up and `used` others; at least one."""
        left = self.total - self.warm - used
        if left < 1:
            raise ValueError(
                f"{names} of {self.warm + used} steps leaves nothing of a schedule of {self.total} steps to decay over"
            )
        return left


def cosine(
    *,
    total_steps: int,
    peak_lr: float,
    min_lr: float | str = "10%",
    warmup: int | float | str = 0.01,
    start_lr: float | str = 0.0,
    tokens_per_step: float | None = None,
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
        tokens_per_step (`float`, *optional*): tokens an optimizer step, for lengths given in tokens.

    Raises:
        `ValueError`: a length or rate out of range; the message names it.

    Example:

    >>> cosine(total_steps=1000, peak_lr=3e-4)(10)
    0.0003
    """
    run = _Run(total_steps, peak_lr, min_lr, warmup, start_lr, tokens_per_step)
    return _schedule("cosine", run.warm_up(), LRPhase("decay", run.rest("warmup", 0), "cosine", run.peak, run.low))


def linear(
    *,
    total_steps: int,
    peak_lr: float,
    min_lr: float | str = "10%",
    warmup: int | float | str = 0.01,
    start_lr: float | str = 0.0,
    tokens_per_step: float | None = None,
) -> LRSchedule:
    """Linear re-warm to `peak_lr`, then linear re-decay to `min_lr`; arguments and errors as for [`cosine`].

    Example:

    >>> schedule = linear(total_steps=110, peak_lr=1.0, min_lr=0.0, warmup=10)
    >>> schedule(5), schedule(60), schedule(110)
    (0.5, 0.5, 0.0)
    """
    run = _Run(total_steps, peak_lr, min_lr, warmup, start_lr, tokens_per_step)
    return _schedule("linear", run.warm_up(), LRPhase("decay", run.rest("warmup", 0), "linear", run.peak, run.low))


def wsd(
    *,
    total_steps: int,
    peak_lr: float,
    min_lr: float | str = "10%",
    warmup: int | float | str = 0.01,
    start_lr: float | str = 0.0,
    decay: int | float | str = 0.1,
    tokens_per_step: float | None = None,
) -> LRSchedule:
    """Warm-up, stable, decay: `peak_lr` holds until a last linear decay to `min_lr`.

    Arguments and errors as for [`cosine`], and:
        decay (`int`, `float` or `str`, *optional*, defaults to `0.1`): length of the decay at the end of the run.

    Example:

    >>> schedule = wsd(total_steps=100, peak_lr=1.0, min_lr=0.0, warmup=10, decay=20)
    >>> schedule(10), schedule(80), schedule(90), schedule(100)
    (1.0, 1.0, 0.5, 0.0)
    """
    run = _Run(total_steps, peak_lr, min_lr, warmup, start_lr, tokens_per_step)
    last = run.length(decay, "decay")
    return _schedule(
        "wsd",
        run.warm_up(),
        LRPhase("stable", run.rest("warmup and decay", last), "constant", run.peak, run.peak),
        LRPhase("decay", last, "linear", run.peak, run.low),
    )


def infinite(
    *,
    total_steps: int,
    peak_lr: float,
    min_lr: float | str = "10%",
    warmup: int | float | str = 0.01,
    start_lr: float | str = 0.0,
    const_lr: float | str | None = None,
    cooldown: int | float | str = 0.6,
    constant: int | float | str = 0.25,
    shape: str = "cosine",
    tokens_per_step: float | None = None,
) -> LRSchedule:
    """Infinite schedule: warm-up, cool-down, constant, exponential anneal (Ibrahim et al., 2024, and released code).

    With W the warm-up, n = t − W, C and H the lengths of cool-down and constant phase and f(x) = 1/√(1 + 10x) − 1:

        warm-up    lr = start + (peak − start) · t/W                            t ≤ W
        cool-down  lr = const + (peak − const)/2 · (1 + cos(π n/C))             n ≤ C     infinite_cosine
                   lr = peak + (const − peak) · f(n/C)/f(1)                               infinite_rsqrt
                   lr = peak − (peak − const) · n/C                                       infinite_linear
        constant   lr = const                                                   C < n ≤ C + H
        anneal     lr = const · (min/const)^((n − C − H)/(T − W − C − H))       to T, clamped after T

    Stop in the constant phase and go on with other data later, without re-warming; anneal on a branch when a model is
    to be used. The released code wraps round at t = T, to a rate near the peak; this one is clamped.

    Arguments and errors as for [`cosine`], and:
        const_lr (`float` or `str`, *optional*): rate of the constant phase, absolute or relative to the peak; defaults
            to (peak + min)/2 (released configurations: 1.65e-4 between 3e-4 and 3e-5).
        cooldown (`int`, `float` or `str`, *optional*, defaults to `0.6`): C (`cooldown_iters_percent` there).
        constant (`int`, `float` or `str`, *optional*, defaults to `0.25`): H; `constant_iters_percent` there is 0.85,
            where the phase ends: 0.6 + 0.25. Both count after the warm-up, which leaves 14 % for the anneal.
        shape (`str`, *optional*, defaults to `"cosine"`): of the cool-down: `"cosine"`, `"rsqrt"` or `"linear"`.

    Raises:
        `ValueError`: also: phases longer than the run, `const_lr` not between `min_lr` and `peak_lr`, `min_lr` of 0.

    Example:

    >>> schedule = infinite_cosine(total_steps=1000, peak_lr=3e-4)
    >>> schedule(10), round(schedule(700), 8), round(schedule(1000), 8)
    (0.0003, 0.000165, 3e-05)
    """
    run = _Run(total_steps, peak_lr, min_lr, warmup, start_lr, tokens_per_step)
    const = (run.peak + run.low) / 2 if const_lr is None else to_rate(const_lr, run.peak, "const_lr")
    if not 0 < run.low <= const <= run.peak:
        raise ValueError(
            f"an infinite schedule needs 0 < min_lr <= const_lr <= peak_lr (its exponential anneal cannot reach 0), "
            f"got min_lr {run.low:g}, const_lr {const:g}, peak_lr {run.peak:g}"
        )
    cool, hold = run.length(cooldown, "cooldown"), run.length(constant, "constant")
    return _schedule(
        f"infinite_{shape}",
        run.warm_up(),
        LRPhase("cool-down", cool, shape, run.peak, const),
        LRPhase("constant", hold, "constant", const, const),
        LRPhase("anneal", run.rest("warmup, cooldown and constant", cool + hold), "exponential", const, run.low),
    )


infinite_cosine = partial(infinite, shape="cosine")
infinite_rsqrt = partial(infinite, shape="rsqrt")
infinite_linear = partial(infinite, shape="linear")

_BUILDERS: dict[str, Callable[..., LRSchedule]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "infinite_cosine": infinite_cosine,
    "infinite_rsqrt": infinite_rsqrt,
    "infinite_linear": infinite_linear,
}
_OPTIONS = {
    "wsd": ("decay",),
    **{name: ("const_lr", "cooldown", "constant") for name in _BUILDERS if "infinite" in name},
}


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
    decay: str | None = field(default=None, metadata={"help": "wsd: length of the decay; 0.1 of the run by default."})
    const_lr: str | None = field(
        default=None, metadata={"help": "infinite_*: rate of the constant phase; (peak + min)/2 by default."}
    )
    cooldown: str | None = field(
        default=None, metadata={"help": "infinite_*: length of the cool-down; 0.6 of the run by default."}
    )
    constant: str | None = field(
        default=None, metadata={"help": "infinite_*: length of the constant phase; 0.25 of the run by default."}
    )

    def build(self, run_steps: int, tokens_per_step: float | None = None) -> LRSchedule:
        """The schedule of a run of `run_steps` optimizer steps of `tokens_per_step` tokens.

        Raises:
            `ValueError`: an unknown schedule, or a length or rate out of range.

        Example:

        >>> RewarmConfig(peak_lr=1e-3).build(200).total_steps
        200
        """
        if not isinstance(self.schedule, str) or self.schedule not in _BUILDERS:
            raise ValueError(f"schedule must be one of {sorted(_BUILDERS)}, got {shown(self.schedule)}")
        allowed = _OPTIONS.get(self.schedule, ())
        options = {name: getattr(self, name) for name in ("decay", "const_lr", "cooldown", "constant")}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in allowed:
                owners = sorted(schedule for schedule, names in _OPTIONS.items() if name in names)
                raise ValueError(f"{name} is an option of schedule {' or '.join(owners)}, not of {self.schedule!r}")
        return _BUILDERS[self.schedule](
            **given,
            tokens_per_step=tokens_per_step,
            total_steps=run_steps if self.total_steps is None else self.total_steps,
            peak_lr=self.peak_lr,
            min_lr=self.min_lr,
            warmup=self.warmup,
            start_lr=self.start_lr,
        )
