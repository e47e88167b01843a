"""L2 towards the initial weights: a pull back to where training began, for when no old data can be had."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_pretrain_ext.anchored import DEVICES, check_holds
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.regularise import L2Init, check_strength
from hf_pretrain_ext.values import check_flag, shown

__all__ = ["L2InitCallback"]

_DEEPSPEED = "DeepSpeed keeps 32-bit weights of its own, and its next step would undo the pull"


class L2InitCallback(TrainerPlugin):
    """Pulls the weights towards those that the run began with: θ ← θ − lr · λ · (θ − θ₀) before every step.

    Decoupled, as AdamW's weight decay is: λ means the same for every optimizer, and the loss is the language model's
    alone ([`L2Init`] says why). Needs no data of earlier stages. One copy of the trained weights is kept, in their
    own type, and saved with the optimizer. `l2_init_distance`, ‖θ − θ₀‖, is logged.

    Args:
        strength (`float`, *optional*, defaults to `0.1`): λ, of the same unit as weight decay. (Ours.)
        anchor_device (`str`, *optional*, defaults to `"weights"`): where θ₀ lies: beside the weights, or `"cpu"`.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept a strength of 0.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, for a run that it cannot work in.

    Example:

    ```python
    extend(trainer, L2InitCallback(strength=0.1)).train()
    ```
    """

    name = "l2_init"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": "exact, without resume",
        "zero2": f"refused: {_DEEPSPEED}",
        "zero3": f"refused: {_DEEPSPEED}",
    }

    def __init__(self, strength: float = 0.1, *, anchor_device: str = DEVICES[0], allow_no_effect: bool = False):
        check_strength(strength)
        if anchor_device not in DEVICES:
            raise ValueError(f"anchor_device must be one of {DEVICES}, got {shown(anchor_device)}")
        self.strength, self.anchor_device = float(strength), anchor_device
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        self._optimizer: L2Init | None = None

    def settings(self) -> dict[str, Any]:
        # Where θ₀ lies decides nothing.
        return {"strength": self.strength}

    def check(self, setup: Setup) -> Iterable[Problem]:
        if setup.trainer.is_deepspeed_enabled and setup.args.world_size == 1:
            yield Problem(self.name, _DEEPSPEED, "Train without it, or without DeepSpeed.")
        if self.strength == 0 and not self.allow_no_effect:
            yield Problem(self.name, "would change nothing with strength=0", "Raise it, or pass allow_no_effect=True.")
        for plugin in setup.plugins:
            if getattr(plugin, "layerwise", False):
                yield Problem(
                    self.name,
                    f"{plugin.name} updates in the backward pass (layerwise=True), where no step can be changed",
                    "Pass layerwise=False.",
                )
        if self.strength and setup.args.weight_decay:
            yield Problem(
                self.name,
                f"weight_decay={setup.args.weight_decay:g} pulls the same weights to 0",
                "Pass weight_decay=0 if they are to stay near where they began.",
                level="note",
            )

    def wrap_optimizer(self, optimizer: Any) -> Any:
        if self.strength == 0:
            return optimizer
        assert self.run is not None
        check_holds(optimizer, self.run.model)
        seed = self.run.trainer.args.seed
        self._optimizer = L2Init(optimizer, strength=self.strength, seed=seed, anchor_device=self.anchor_device)
        return self._optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None and self._optimizer is not None and control.should_log:
            self.run.log({"l2_init_distance": self._optimizer.distance()})

    def describe(self) -> list[str]:
        if self.run is None or self.strength == 0:
            return []
        kept = sum(p.numel() * p.element_size() for p in self.run.model.parameters() if p.requires_grad)
        return [
            f"l2_init: strength {self.strength:g}; a copy of the weights of {kept / 1e6:.2f} MB ({self.anchor_device})"
        ]
