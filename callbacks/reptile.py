"""Reptile steps: every so often the weights go back most of the way they came (gradient alignment)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_pretrain_ext.anchored import check_holds
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.reptile import DEVICES, Interpolation, Reptile, anchor_bytes, check_settings
from hf_pretrain_ext.units import to_point, to_steps
from hf_pretrain_ext.values import check_flag

__all__ = ["ReptileCallback"]

_DEEPSPEED = "DeepSpeed keeps 32-bit weights of its own, and its next step would undo the interpolation"


class ReptileCallback(TrainerPlugin):
    """Interpolates the weights every `every` steps: θ ← θ₀ + ε · (θ − θ₀) (Abbes et al., 2025).

    θ₀ is where the last interpolation, or training, left them. Beside [`ReplayCallback`] this is meta-experience
    replay. Works with any optimizer that updates in `step`; one copy of the trained weights is kept, in 32 bits, and
    saved with the optimizer. In a branch of [`anneal`] it stands aside: each interpolation would take most of the
    anneal back.

    Args:
        every (`int`, `float` or `str`, *optional*, defaults to 500): steps between two interpolations, as an int
            (Abbes et al.), a fraction of the run (`1 / 24`), or with its unit (`"500 steps"`, `"1B tokens"`).
        epsilon (`float`, *optional*, defaults to 0.1): share of the way that is kept (Abbes et al.); their released
            code has 0.01.
        anchor_device (`str`, *optional*, defaults to `"weights"`): where θ₀ lies: beside the weights, or `"cpu"`.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept `epsilon=1`, which changes nothing.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, for a run that it cannot work in.

    Example:

    ```python
    callbacks = [ReplayCallback(general, ratio=0.25), ReptileCallback(every=500, epsilon=0.1)]
    extend(trainer, *callbacks).train()
    ```
    """

    name = "reptile"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": "exact, without resume",
        "zero2": f"refused: {_DEEPSPEED}",
        "zero3": f"refused: {_DEEPSPEED}",
    }

    def __init__(
        self,
        every: int | float | str = 500,
        *,
        epsilon: float = 0.1,
        anchor_device: str = DEVICES[0],
        allow_no_effect: bool = False,
    ):
        steps, share = to_point(every, "every", tokens_per_step=1)
        if not steps and not share:
            raise ValueError(f"every must be at least 1 step, got {every!r}")
        check_settings(1, epsilon, anchor_device)
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        self.every, self.epsilon, self.anchor_device = every, float(epsilon), anchor_device
        self._seen: Interpolation | None = None

    def settings(self) -> dict[str, Any]:
        # Where the anchor lies decides nothing.
        return {"every": str(self.every), "epsilon": self.epsilon}

    def _steps(self, total_steps: int, tokens_per_step: float | None) -> int:
        return to_steps(self.every, total_steps, "every", tokens_per_step)

    def check(self, setup: Setup) -> Iterable[Problem]:
        if setup.trainer.is_deepspeed_enabled and setup.args.world_size == 1:
            yield Problem(self.name, _DEEPSPEED, "Train without it, or without DeepSpeed.")
        for plugin in setup.plugins:
            if getattr(plugin, "layerwise", False):
                yield Problem(
                    self.name,
                    f"{plugin.name} updates in the backward pass (layerwise=True), where the last gradient of an "
                    "interval cannot be had",
                    "Pass layerwise=False.",
                )
        if self.epsilon == 1 and not self.allow_no_effect:
            yield Problem(
                self.name,
                "epsilon=1 keeps the whole way and would change nothing",
                "Lower it, or pass allow_no_effect=True.",
            )
        if setup.total_steps is None or setup.beginning.anneal is not None:
            return
        in_tokens = "token" in str(self.every)
        try:
            every = self._steps(setup.total_steps, setup.tokens_per_step if in_tokens else None)
        except ValueError as error:
            yield Problem(self.name, str(error), "Give `every` in steps.")
            return
        if every < 1:
            yield Problem(
                self.name,
                f"every={self.every!r} is less than a step of the {setup.total_steps:,} of the run",
                "Raise it, or give it in steps, such as every=1.",
            )
        elif every > setup.total_steps:
            yield Problem(
                self.name,
                f"every={self.every!r} is {every:,} of the {setup.total_steps:,} steps of the run: it would change "
                "nothing",
                "Lower it; the paper's runs have about 24 interpolations a stage, which is every=1/24.",
            )

    def wrap_optimizer(self, optimizer: Any) -> Any:
        assert self.run is not None
        if self.run.beginning.anneal is not None:
            return optimizer
        check_holds(optimizer, self.run.model)
        in_tokens = "token" in str(self.every)
        every = self._steps(self.run.total_steps, self.run.tokens_per_step if in_tokens else None)
        wrapped = Reptile(optimizer, every=every, epsilon=self.epsilon, anchor_device=self.anchor_device)
        wrapped.on_interpolation = self._told
        return wrapped

    def _told(self, seen: Interpolation) -> None:
        self._seen = seen

    def begin(self) -> None:
        self._seen = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = self._seen
        if seen is None or self.run is None:
            return
        self._seen = None
        scalars = {
            "reptile_displacement": seen.displacement,
            "reptile_inner_product": seen.inner_product,
            "reptile_cosine": seen.cosine,
        }
        self.run.log(scalars)
        self.run.trace("reptile", **scalars)

    def marks(self, total_steps: int) -> list[int]:
        if self.run is None or self.run.beginning.anneal is not None:
            return []
        in_tokens = "token" in str(self.every)
        every = self._steps(total_steps, self.run.tokens_per_step if in_tokens else None)
        return list(range(every, total_steps + 1, max(every, 1)))

    def describe(self) -> list[str]:
        if self.run is None:
            return []
        if self.run.beginning.anneal is not None:
            return [f"{self.name}: stands aside in an annealing branch, which an interpolation would take back"]
        marks = self.marks(self.run.total_steps)
        bytes_kept = anchor_bytes(self.run.model)
        if not marks:
            return [f"{self.name}: no interpolation in {self.run.total_steps:,} steps, every={self.every!r}"]
        left = self.run.total_steps - marks[-1]
        return [
            f"{self.name}: {len(marks)} interpolations, every {marks[0]:,} steps, {self.epsilon:g} of the way kept; "
            f"a copy of the weights of {bytes_kept / 1e6:.2f} MB ({self.anchor_device})",
            *([f"{self.name}: the last {left:,} steps come after the last interpolation"] if left else []),
        ]
