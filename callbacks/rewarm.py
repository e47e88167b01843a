"""Re-warming: bring the learning rate back up, then down again, so that a trained model can learn a new domain."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR

from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.run import PluginRun
from hf_pretrain_ext.say import say
from hf_pretrain_ext.schedules import CallableSchedule, LRSchedule, RewarmConfig
from hf_pretrain_ext.stages import Beginning, going_on
from hf_pretrain_ext.trainer import lambda_lr, relative_rate
from hf_pretrain_ext.values import check_flag, shown

__all__ = ["RewarmCallback"]


class RewarmCallback(TrainerPlugin):
    """Re-warms and re-decays the learning rate (Gupta et al., 2023; Ibrahim et al., 2024).

        lr(t) = start + (peak − start) · t / W                                 t ≤ W
        lr(t) = min + (peak − min)/2 · (1 + cos(π (t − W)/(T − W)))            W < t ≤ T, clamped after T

    Groups whose rate is `args.learning_rate` get these rates; groups with other rates keep their ratio to it. Works
    in a plain `Trainer` too; with `extend` a resume also checks that the plan is the one that was interrupted.

    Args:
        peak_lr (`float`): peak learning rate; the paper's advice is the peak of the pre-training. Left out only with a
            `schedule` that is a function.
        schedule (`str`, *optional*, defaults to `"cosine"`): `"cosine"`, `"linear"`, `"wsd"`, `"infinite_cosine"`,
            `"infinite_rsqrt"` or `"infinite_linear"`: the functions of those names in `hf_pretrain_ext.schedules`. Or
            a function `step -> learning rate`, for which the other settings but `total_steps` are left out.
        warmup (`int`, `float` or `str`, *optional*, defaults to `0.01`): W: steps as an int, a fraction of the run as
            a float below 1, or a string with a unit (`"500 steps"`, `"2%"`, `"2M tokens"`, which needs `extend`). 1 %
            in the paper; 0 to 2 % end alike.
        min_lr (`float` or `str`, *optional*, defaults to `"10%"`): final rate, absolute or relative to the peak.
        start_lr (`float` or `str`, *optional*, defaults to `0.0`): rate at step 0, absolute or relative to the peak.
        total_steps (`int`, *optional*): T; defaults to the length of the run. May be longer than the run.
        decay (`int`, `float` or `str`, *optional*): of `"wsd"`: length of the last decay; 0.1 of T by default.
        const_lr (`float` or `str`, *optional*): of `"infinite_*"`: rate of the constant phase; by default half-way
            between peak and final rate.
        cooldown, constant (`int`, `float` or `str`, *optional*): of `"infinite_*"`: lengths of these phases; 0.6 and
            0.25 of T by default.
        go_on (`bool`, *optional*, defaults to `True`): of `"infinite_*"`, in a stage begun with `continue_from`: where
            the last stage ended in its constant phase, go on at that rate to the end, without warm-up, cool-down and
            anneal (`anneal` makes a branch for that). False re-warms as in a first stage.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept settings that change nothing.

    Raises:
        `ValueError`: at construction, settings that no run could use; the message names the setting.
        [`PluginError`]: at `extend`, settings that this run cannot use.

    Example:

    >>> from hf_pretrain_ext.callbacks import RewarmCallback
    >>> schedule = RewarmCallback(peak_lr=3e-4).schedule(args=None, total_steps=1000)
    >>> schedule(10), schedule(1000)
    (0.0003, 3e-05)
    """

    name = "rewarm"
    needs_extend = False
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "exact, without resume", "zero2": "exact", "zero3": "exact"}

    def __init__(
        self,
        peak_lr: float | None = None,
        *,
        schedule: str | Callable[[int], float] = "cosine",
        warmup: int | float | str = 0.01,
        min_lr: float | str = "10%",
        start_lr: float | str = 0.0,
        total_steps: int | None = None,
        decay: int | float | str | None = None,
        const_lr: float | str | None = None,
        cooldown: int | float | str | None = None,
        constant: int | float | str | None = None,
        go_on: bool = True,
        allow_no_effect: bool = False,
    ):
        self.function = None if isinstance(schedule, str) else schedule
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        if self.function is not None and not callable(self.function):
            raise ValueError(f"schedule must be a name or a function of the step, got {shown(schedule)}")
        self.config = RewarmConfig(
            # A function is its own peak; the number stands for the settings that need one.
            peak_lr=cast(float, 1.0 if self.function and peak_lr is None else peak_lr),
            schedule="cosine" if self.function else cast(str, schedule),
            warmup=cast(str, warmup),
            min_lr=cast(str, min_lr),
            start_lr=cast(str, start_lr),
            total_steps=total_steps,
            decay=cast(Any, decay),
            const_lr=cast(Any, const_lr),
            cooldown=cast(Any, cooldown),
            constant=cast(Any, constant),
        )
        self.go_on = check_flag("go_on", go_on)
        self.infinite = self.function is None and str(schedule).startswith("infinite")
        if not self.go_on and not self.infinite:
            raise ValueError(
                f"go_on=False is a setting of the infinite_* schedules; {shown(schedule)} always re-warms"
            )
        if self.function is not None:
            self._refuse_other_settings(peak_lr)
        # A trial build finds what is wrong whatever the length of the run; a length in steps is judged at `extend`.
        self.config.build(1_000_000_000, tokens_per_step=1e6)

    def _refuse_other_settings(self, peak_lr: Any) -> None:
        """A function says all of the rate: settings beside it would be ignored."""
        given = {**dataclasses.asdict(self.config), "peak_lr": peak_lr}
        alone = dataclasses.asdict(RewarmCallback(1.0, total_steps=self.config.total_steps).config)
        for name, value in given.items():
            if value != {**alone, "peak_lr": None}[name]:
                raise ValueError(
                    f"{name}={shown(value)} is a setting of the schedules that have a name; a function says all of "
                    f"the rate: leave {name} out"
                )

    def schedule(self, args: Any, total_steps: int) -> LRSchedule:
        return self._build(total_steps, self.run)

    def _build(self, total_steps: int, source: PluginRun | Setup | None) -> LRSchedule:
        """The schedule of a run; `source` knows the tokens of a step, asked only where a length is in tokens."""
        began = source.beginning if source else Beginning()
        if began.schedule is not None:
            return began.schedule
        if (rate := self._constant(began)) is not None:
            return going_on(self.config.schedule, rate, total_steps)
        return self._own(total_steps, source)

    def _constant(self, began: Beginning) -> float | None:
        """The rate at which an infinite schedule goes on, if it does."""
        return began.last.constant_rate if self.infinite and self.go_on and began.last else None

    def _own(self, total_steps: int, source: PluginRun | Setup | None) -> LRSchedule:
        """The schedule that the settings say."""
        if self.function is not None:
            length = total_steps if self.config.total_steps is None else self.config.total_steps
            return CallableSchedule.of(self.function, length)
        in_tokens = any("token" in str(value) for value in dataclasses.asdict(self.config).values())
        return self.config.build(total_steps, source.tokens_per_step if source and in_tokens else None)

    def settings(self) -> dict[str, Any]:
        # Lengths and rates as text, whether they came from Python or from a command line.
        if self.function is not None:
            named = getattr(self.function, "__qualname__", type(self.function).__qualname__)
            return {"schedule": f"{self.function.__module__}.{named}", "total_steps": self.config.total_steps}
        given = {
            key: value if value is None or key in ("peak_lr", "total_steps") else str(value)
            for key, value in dataclasses.asdict(self.config).items()
        }
        # Left out where it is as in checkpoints that do not know of it.
        return given if self.go_on else {**given, "go_on": False}

    def check(self, setup: Setup) -> Iterable[Problem]:
        if setup.args.learning_rate <= 0:
            yield Problem(
                self.name,
                f"learning_rate={setup.args.learning_rate} of the TrainingArguments is the rate that peak_lr scales",
                "Set learning_rate to the rate of the main parameter group, usually peak_lr.",
            )
        elif setup.given_optimizer:
            # initial_lr: what a scheduler of an earlier train() started from.
            groups = [group.get("initial_lr", group["lr"]) for group in setup.trainer.optimizer.param_groups]
            if setup.args.learning_rate not in groups:
                yield Problem(self.name, *_no_main_group(setup.args.learning_rate, groups))
        if setup.total_steps is None:
            return
        try:
            schedule = self._build(setup.total_steps, setup)
        except ValueError as error:
            yield Problem(self.name, f"in a run of {setup.total_steps} steps, {error}", "Shorten it, or train longer.")
            return
        if schedule.total_steps > setup.total_steps:
            yield Problem(
                self.name,
                f"the schedule has {schedule.total_steps} steps, the run {setup.total_steps}: it stops at a learning "
                f"rate of {schedule(setup.total_steps):.3g} instead of {schedule(schedule.total_steps):.3g}",
                "Leave total_steps out to fit the run, if that is not meant.",
                level="note",
            )
        if setup.beginning.anneal is not None:
            return
        if (rate := self._constant(setup.beginning)) is not None:
            yield from self._check_constant(setup, setup.total_steps, rate)
            return
        rates = {schedule(step) for step in range(min(setup.total_steps, 1000))} | {schedule(setup.total_steps)}
        host = str(getattr(setup.args.lr_scheduler_type, "value", setup.args.lr_scheduler_type))
        if rates == {setup.args.learning_rate} and host == "constant" and not self.allow_no_effect:
            yield Problem(
                self.name,
                f"would change nothing: the rate is {setup.args.learning_rate:g} with and without it",
                "Raise peak_lr, or pass allow_no_effect=True.",
            )

    def _check_constant(self, setup: Setup, total_steps: int, rate: float) -> Iterable[Problem]:
        """Where the rate of the stage before goes on: settings that say another one."""
        try:
            held = [phase.first for phase in self._own(total_steps, setup).phases if phase.name == "constant"]
        except ValueError:  # lengths that do not fit a run which does not need them
            return
        if held and not math.isclose(held[0], rate, rel_tol=1e-9):
            yield Problem(
                self.name,
                f"its settings would hold a rate of {held[0]:.4g}; the stage before ended in a constant phase at "
                f"{rate:.4g}, which goes on",
                "Pass go_on=False to re-warm and cool down to the other rate.",
                level="note",
            )

    def describe(self) -> list[str]:
        schedule = self.run.lr_schedule if self.run else None
        return [f"{self.name}: {line}" for line in schedule.describe()] if schedule else []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.run is None:
            self._replace(args, state, kwargs["optimizer"], kwargs["lr_scheduler"])

    def _replace(self, args: Any, state: Any, optimizer: Any, scheduler: Any) -> None:
        """In a plain Trainer: the host's scheduler keeps its count of steps and is given our function."""
        if not isinstance(scheduler, LambdaLR):
            raise TypeError(
                f"RewarmCallback in a plain Trainer needs a LambdaLR scheduler, got {type(scheduler).__name__}. "
                "Use `extend(trainer)`, or an lr_scheduler_type such as 'constant'."
            )
        if args.learning_rate not in scheduler.base_lrs:
            raise ValueError("RewarmCallback: {}. {}".format(*_no_main_group(args.learning_rate, scheduler.base_lrs)))
        schedule = self._build(state.max_steps, None)
        ours = lambda_lr(optimizer, schedule, args.learning_rate)
        scheduler.lr_lambdas = ours.lr_lambdas
        # Building `ours` wrote step-0 rates into the groups; these are the rates of the step that comes next.
        rates = [
            base * relative_rate(scheduler.last_epoch, schedule, args.learning_rate) for base in scheduler.base_lrs
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        if state.is_world_process_zero:
            say("\n".join(f"{self.name}: {line}" for line in schedule.describe()))
            if state.global_step:
                say(
                    "rewarm: a plain Trainer does not tell callbacks what it resumes; `extend(trainer)` would check "
                    "that this plan is the one that was interrupted",
                    logging.WARNING,
                )


def _no_main_group(rate: float, groups: Sequence[Any]) -> tuple[str, str]:
    """What is wrong, and how to mend it, where no group trains at `learning_rate`."""
    return (
        f"the optimizer's groups have the rates {list(groups)}, none of them learning_rate={rate:g}, which becomes "
        "peak_lr",
        "Set learning_rate of the TrainingArguments to the rate of the main group.",
    )
