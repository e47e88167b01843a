"""An optimizer around an optimizer that keeps a copy of the weights in its state. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer

from hf_pretrain_ext.values import shown

__all__ = ["DEVICES", "Anchored", "bare", "check_holds", "total"]

DEVICES = ("weights", "cpu")


class Anchored(Optimizer):
    """
    Base class: groups, state and steps are those of the wrapped optimizer, and θ₀, where the weights once were, is
    saved and loaded with them.

    Args:
        optimizer (`torch.optim.Optimizer`): that makes the steps.
        anchor_device (`str`): where θ₀ lies: beside the weights (`"weights"`), or `"cpu"`.
    """

    anchor_key: ClassVar[str]
    """Of θ₀ in the state of each parameter."""
    numbers: ClassVar[dict[str, str]] = {}
    """Attributes that are saved besides, as numbers, by the key that they have in the first group."""

    # A GradScaler that leaves unscaling to the optimizer would set attributes of this one.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer, anchor_device: str):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if anchor_device not in DEVICES:
            raise ValueError(f"anchor_device must be one of {DEVICES}, got {shown(anchor_device)}")
        # `fused_backward` is that of LOMO and AdaLOMO.
        if getattr(optimizer, "updated_in_backward", False) or hasattr(optimizer, "fused_backward"):
            raise ValueError(
                "optimizer updates the weights in the backward pass, where θ₀ and the last gradient cannot be had. "
                "Use its form that updates in step()"
            )
        # Not super().__init__: groups, state and defaults are the wrapped optimizer's, by the properties below.
        self.optimizer = optimizer
        self.anchor_device = anchor_device
        self._anchors: dict[torch.Tensor, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def _params(self) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _anchor_type(self, param: torch.Tensor) -> torch.dtype:
        return torch.float32

    def _take_anchors(self) -> None:
        """Before the first step of each parameter: where it is now is θ₀."""
        for param in self._params():
            if param not in self._anchors:
                kept = param.detach().to(self._anchor_type(param), copy=True)
                self._anchors[param] = kept.cpu() if self.anchor_device == "cpu" else kept

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, with θ₀ in the state of each parameter."""
        saved = self.optimizer.state_dict()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        state = dict(saved["state"])
        for number, param in zip(numbers, self._params(), strict=True):
            if param in self._anchors:
                state[number] = {**state.get(number, {}), self.anchor_key: self._anchors[param]}
        first, *others = saved["param_groups"]
        first = {**first, **{key: getattr(self, attribute) for key, attribute in self.numbers.items()}}
        return {**saved, "state": state, "param_groups": [first, *others]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict` gave; from that of a bare optimizer on, θ₀ is where the weights are at the next step.

        Raises:
            `ValueError`: a θ₀ of another shape, or for some parameters only.
        """
        groups = state_dict["param_groups"]
        state, anchors = {}, {}
        for number, held in state_dict["state"].items():
            rest = dict(held)
            if self.anchor_key in rest:
                anchors[number] = rest.pop(self.anchor_key)
            if rest:
                state[number] = rest
        numbers = [number for group in groups for number in group["params"]]
        params = list(self._params())
        if anchors and (len(numbers) != len(params) or set(anchors) != set(numbers)):
            raise ValueError(
                f"the state holds θ₀ for {len(anchors)} of {len(numbers)} parameters, and the optimizer has "
                f"{len(params)}: it belongs to another model or was cut short"
            )
        for number, param in zip(numbers, params, strict=False):
            if number in anchors and anchors[number].shape != param.shape:
                raise ValueError(
                    f"the state holds θ₀ of shape {tuple(anchors[number].shape)} for a parameter of shape "
                    f"{tuple(param.shape)}: it belongs to another model"
                )
        bare = [{key: value for key, value in group.items() if key not in self.numbers} for group in groups]
        self.optimizer.load_state_dict({**state_dict, "state": state, "param_groups": bare})
        for key, attribute in self.numbers.items():
            setattr(self, attribute, int(groups[0].get(key, 0)))
        # torch casts state to the type of the weights, which would round θ₀.
        self._anchors = {
            param: anchors[number].to(
                "cpu" if self.anchor_device == "cpu" else param.device, self._anchor_type(param), copy=True
            )
            for number, param in zip(numbers, params, strict=False)
            if number in anchors
        }


def bare(optimizer: Any) -> Any:
    """The optimizer that makes the steps, below accelerate's wrapper and those that keep a copy of the weights."""
    while isinstance(optimizer, Anchored | AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_holds(optimizer: Optimizer, model: torch.nn.Module) -> None:
    """
    Raises:
        `ValueError`: weights of `model` are trained that `optimizer` does not hold, and that nobody would hold back.

    Example:

    >>> model = torch.nn.Linear(2, 1)
    >>> check_holds(torch.optim.SGD([model.weight], lr=0.1), model)
    Traceback (most recent call last):
    ValueError: the optimizer holds 1 of the 2 trained weights of the model, and not 'bias': ...
    """
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    lacking = [name for name, param in trained.items() if id(param) not in held]
    if lacking:
        raise ValueError(
            f"the optimizer holds {len(trained) - len(lacking)} of the {len(trained)} trained weights of the model, "
            f"and not {lacking[0]!r}: those would be left out. Pass an optimizer of all of them that updates in "
            "step(), or freeze the others with requires_grad_(False)"
        )


def total(values: torch.Tensor) -> float:
    """The sum of all elements; of a sharded tensor, over all shards."""
    found: Any = values.sum(dtype=torch.float64)
    return float(found.full_tensor() if hasattr(found, "full_tensor") else found)
