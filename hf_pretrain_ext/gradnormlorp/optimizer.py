"""GradNormLoRP: weight normalisation and projected gradients, with no second full-size tensor (Huang et al., 2024)."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from hf_pretrain_ext.gradnormlorp.projector import PROJ_TYPES, keyed_generator, leading_basis, projects_right
from hf_pretrain_ext.gradnormlorp.quantised import (
    BASIS_BLOCK,
    MOMENT_BLOCK,
    decode_basis,
    decode_moment,
    encode_basis,
    encode_moment,
    functional,
    moment_bits,
    round_into,
)

__all__ = ["GradNormLoRP"]

CHUNK = 1 << 24
"""Elements of a tensor without projection that are updated at a time: 64 MiB a temporary in float32."""

_REFRESH, _ROUNDING = 1, 2
"""Purposes of random numbers, part of their key."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8, 32),
    "projector_bits": (4, 8, 16, 32),
    "proj_type": PROJ_TYPES,
    "norm": ("out", "in", None),
    "on_refresh": ("reset", "keep", "rotate"),
    "tangential": (True, False),
    "transposed": (True, False),
}

LAYOUT = ("rank", "proj_type", "bits", "projector_bits", "norm", "transposed")
"""Settings that decide what a state consists of: it loads only with the same ones."""

_HOOKED: Any = WeakTensorKeyDictionary()
"""By parameter: a reference to the optimizer whose `step_in_backward` updates it."""

TINY = torch.finfo(torch.float32).tiny

DTYPES = (torch.float32, torch.bfloat16)


class GradNormLoRP(Optimizer):
    """Adam in a low-rank subspace of the gradient, on weights split into magnitude and direction.

    Of each matrix in a group with a `rank`, W = m ⊙ V/‖V‖ (one magnitude a unit), with P the basis of the gradient's
    leading singular vectors, on its smaller side:

        g_m = ⟨G, V⟩/‖V‖                   m ← m · (1 − lr · weight_decay) − lr · adam(g_m)
        R = G·P                            V ← W − lr · scale · adam(R)·Pᵀ
                                           W ← m ⊙ V/‖V‖

    V is W itself before each step, so nothing of the size of W is kept: the state is m's Adam, the moments of R and P.
    This is form A, on full weights: our variant for pre-training of the paper's W = m·(W0 + BA)/‖W0 + BA‖, which is
    form B: PEFT's DoRA, its factors in groups with `norm=None`. All other tensors (groups without a `rank`, and those
    that are no matrices) get AdamW with moments in the same `bits`.

    Args:
        params (iterable of `Tensor` or of `dict`): parameters or groups, in GaLore's dialect: any setting below may
            stand in a group. [`gradnormlorp.param_groups`] makes them from a model.
        lr (`float`, *optional*, defaults to 1e-3): learning rate of everything: m, direction and other tensors.
        rank (`int`, *optional*): dimensions of the subspace, at most the smaller side; None for plain AdamW.
        update_proj_gap (`int`, *optional*, defaults to 200): steps between two bases of a matrix (GaLore's T). The
            matrices take turns, so that no step but the first computes many.
        scale (`float`, *optional*, defaults to 0.25): of the direction's step (GaLore's α).
        proj_type (`str`, *optional*, defaults to `"std"`): which side is projected: `"std"` the smaller,
            `"reverse_std"` the larger, `"left"`, `"right"`.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Adam's.
        eps (`float`, *optional*, defaults to 1e-8): Adam's.
        weight_decay (`float`, *optional*, defaults to 0.0): decoupled. It acts on m alone; a decay of the direction is
            cancelled by its normalisation.
        bits (`int`, *optional*, defaults to 8): of the moments: 8 or 4 (blockwise, needs bitsandbytes) or 32. Moments
            of fewer than 4096 elements, and m's, stay in float32.
        projector_bits (`int`, *optional*, defaults to 8): of P: 8 (int8 by column), 4 (NF4), 16 or 32.
        norm (`str`, *optional*, defaults to `"out"`): one magnitude an output unit (as PEFT's DoRA), `"in"` for an
            input unit, None for no weight normalisation (then weight decay is that of AdamW).
        tangential (`bool`, *optional*, defaults to `False`): take the component along V out of G before projecting.
        on_refresh (`str`, *optional*, defaults to `"rotate"`): what becomes of the moments when P changes: `"rotate"`
            turns them into the new subspace (the best in `benchmarks/gradnormlorp.py options`), `"keep"` reads the old
            numbers in the new one (GaLore), `"reset"` starts from zero.
        seed (`int`, *optional*, defaults to 0): of the range finder and of stochastic rounding.

    bfloat16 weights are rounded stochastically, by a key of seed, parameter and step. A gradient that holds NaN or
    infinity counts as zero.

    Raises:
        `ValueError`: at construction, for a setting or a parameter that cannot be; the message names it.
        `ImportError`: if bitsandbytes is needed and missing.

    Example:

    >>> import torch
    >>> from hf_pretrain_ext.gradnormlorp import GradNormLoRP
    >>> layer = torch.nn.Linear(64, 32, bias=False)
    >>> optimizer = GradNormLoRP(layer.parameters(), lr=1e-2, rank=4, projector_bits=32)
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.randn(8, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> bool((layer.weight != before).any())
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 8,
        projector_bits: int = 8,
        norm: str | None = "out",
        tangential: bool = False,
        on_refresh: str = "rotate",
        seed: int = 0,
    ):
        given = locals()
        defaults = {name: given.get(name, default) for name, default in DEFAULTS.items()}
        self._hooks: list[RemovableHandle] = []
        self._replaced = False
        self._updated: dict[Tensor, Tensor] = {}
        self._places: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        _check_settings(defaults)
        groups = list(params)
        if rank is not None and groups and not isinstance(groups[0], dict):
            vectors = [item for item in groups if (item[1] if isinstance(item, tuple) else item).ndim != 2]
            matrices = [item for item in groups if not any(item is vector for vector in vectors)]
            groups = [{"params": matrices}, {"params": vectors, "rank": None}]
            groups = [group for group in groups if group["params"]]
        super().__init__(groups, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a copy or a pickle: hooks belong to the parameters of the optimizer that it was made from.
        self.__dict__.setdefault("_hooks", [])
        self.__dict__.setdefault("_replaced", False)
        self.__dict__.setdefault("_updated", {})
        self._places = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as it was saved: torch would turn codes and scales into the dtype of the weights.

        Raises:
            `ValueError`: for the state of other parameters or another rank.
        """
        ours, theirs = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in ours] == [len(group["params"]) for group in theirs]:
            self._check_saved(state_dict)
        # Refuses other numbers of parameters.
        super().load_state_dict({**state_dict, "state": {}})
        keys = [key for group in theirs for key in group["params"]]
        for key, param in zip(keys, self._parameters(), strict=True):
            if saved := state_dict["state"].get(key):
                self.state[param] = {
                    name: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in saved.items()
                }

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            for key in LAYOUT:
                if saved.get(key, group[key]) != group[key]:
                    raise ValueError(
                        f"the state was saved with {key}={saved[key]!r} in group {number}, where this optimizer has "
                        f"{key}={group[key]!r}: build it as it was, or begin without a state"
                    )
            for place, param in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(place, {}).items():
                    if isinstance(value, Tensor) and value.numel() != (
                        wanted := _elements(name, param.shape, group, value.dtype)
                    ):
                        raise ValueError(
                            f"the state of parameter {place} has {value.numel()} elements of {name!r}, a parameter of "
                            f"shape {tuple(param.shape)} and rank {group['rank']} has {wanted}: it belongs to another "
                            "model"
                        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checked as at construction. A group with a rank may hold matrices only."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            for param in group["params"]:
                _check_parameter(param, group)
        except (ValueError, ImportError):
            self.param_groups.pop()
            raise
        self._places = {}

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; with `step_in_backward`, the end of the step."""
        if self._replaced:
            raise RuntimeError(
                "another optimizer's step_in_backward has taken over parameters of this one: step with that one, or "
                "call this one's step_in_backward() or step_after_backward() to take them back"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in self._parameters():
            if param.grad is not None:
                self._update(param)
        self._updated.clear()
        return loss

    def step_in_backward(self, max_norm: float | None = None) -> None:
        """From now on each parameter is updated inside `backward`, as soon as its gradient is there, which is freed.

        One matrix's gradient then exists at a time. `step` still ends each step; one backward a step (a second raises
        RuntimeError: gradients cannot accumulate, since none is left). Several processes need their gradients
        averaged first, so this is for one. Parameters are taken over from an earlier optimizer, whose `step` then
        raises RuntimeError.

        Args:
            max_norm (`float`, *optional*): clips each parameter's gradient to this norm. The norm over all parameters
                is not known before the last gradient, when the first is gone.
        """
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm!r}")
        self.step_after_backward()
        params = [param for param in self._parameters() if param.requires_grad]
        mine = weakref.ref(self)
        for param in params:
            # Of a training that was interrupted; were it still stepped, its own step says so.
            other = _HOOKED.get(param, lambda: None)()
            if other is not None and other is not self and other._hooks:
                other.step_after_backward()
                other._replaced = True
            _HOOKED[param] = mine

        @torch.no_grad()
        def update(param: Tensor) -> None:
            optimizer = mine()
            if optimizer is None:  # nobody steps with it any more
                return
            if param in optimizer._updated:
                raise RuntimeError(
                    "a second backward before optimizer.step(): with step_in_backward gradients cannot accumulate. "
                    "Call step() after each backward, or step_after_backward() to accumulate"
                )
            gradient = cast(Tensor, param.grad)
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            if max_norm is not None:
                gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
            optimizer._update(param)
            optimizer._updated[param] = norm
            param.grad = None

        self._hooks = [param.register_post_accumulate_grad_hook(update) for param in params]

    def step_after_backward(self) -> None:
        """Undoes `step_in_backward`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._replaced = False

    @property
    def updated_in_backward(self) -> bool:
        """Whether a backward has updated parameters since the last `step`."""
        return bool(self._updated)

    def gradient_norm(self) -> Tensor | None:
        """Norm over all gradients that `step_in_backward` has used since the last step, before any clipping."""
        return torch.stack(list(self._updated.values())).norm() if self._updated else None

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _place(self, param: Tensor) -> tuple[int, dict[str, Any]]:
        """A parameter's number among all, and its group."""
        if param not in self._places:
            groups = [(param, group) for group in self.param_groups for param in group["params"]]
            self._places = {param: (index, group) for index, (param, group) in enumerate(groups)}
        return self._places[param]

    def _update(self, param: Tensor) -> None:
        index, group = self._place(param)
        if param.grad is None or param.grad.is_sparse:
            raise ValueError(f"gradients must be dense, parameter {index} has a sparse one: embed with sparse=False")
        state = self.state[param]
        state["step"] = state.get("step", 0) + 1
        if group["rank"] is None:
            self._plain_step(index, param, param.grad, state, group)
        else:
            if param.ndim != 2:
                raise RuntimeError(
                    f"parameter {index} was a matrix and is {tuple(param.shape)} now: something has flattened or "
                    "sharded it. GradNormLoRP needs whole matrices"
                )
            self._projected_step(index, param, param.grad, state, group)

    def _projected_step(
        self, index: int, param: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        right, norm = projects_right(param.shape, group["proj_type"]), group["norm"]
        dim = 1 if (norm == "out") != group["transposed"] else 0
        gradient, weight = gradient.to(torch.float32), param.to(torch.float32)
        if norm is None:
            finite = gradient.sum().isfinite()
            length = along = gradient.new_zeros(())
        else:
            length = _norm(weight, dim)
            along = torch.linalg.vecdot(gradient, weight, dim=dim)
            finite = along.sum().isfinite()
            along = torch.where(finite, along / length.clamp_min(TINY), 0.0)
            if group["tangential"]:
                share = (along / length.clamp_min(TINY)).unsqueeze(dim)
                gradient = torch.addcmul(gradient, weight, share, value=-1)

        if state["step"] >= state.get("next_refresh", 1):
            # The one look from the host. Nothing can be learned from NaN, or from the zeros that the first gradient of
            # a LoRA's A is: it is tried again at the next step.
            telling = bool(finite & (gradient.count_nonzero() > 0))
            if telling or "basis" not in state:
                self._refresh(index, param, gradient.T if right else gradient, telling, state, group)
        basis = self._basis(state, param.shape[1] if right else param.shape[0], group)
        projected = gradient @ basis if right else basis.T @ gradient
        # Under bfloat16 a float32 copy, and no longer needed.
        del gradient
        bits = moment_bits(projected.numel(), group["bits"])
        step = _adam("", torch.where(finite, projected, 0.0), state, group, bits, age=state["age"])
        state["age"] += 1

        if norm is None and group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        factors = (step, basis.T) if right else (basis, step)
        weight.addmm_(*factors, alpha=-group["lr"] * group["scale"])
        if norm is not None:
            self._set_magnitude(weight, dim, length, along, state, group, param.dtype)
        if weight is not param:
            round_into(param, weight, keyed_generator(param.device, group["seed"], index, state["step"], _ROUNDING))
            if norm is not None:
                del weight
                state["written"] = _norm(param.to(torch.float32), dim)

    def _set_magnitude(
        self,
        moved: Tensor,
        dim: int,
        length: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Scales `moved` (V after its step) in place to the magnitudes after theirs; `length` is ‖W‖ before."""
        magnitude = length
        if dtype != torch.float32 and "magnitude" in state:
            # Rounding blurs the weight's norm. What others have changed since our last write (replay's Reptile, a
            # checkpoint) is taken over: else it is a factor of exactly 1.
            magnitude = state["magnitude"] * torch.where(state["written"] > 0, length / state["written"], 1.0)
        step = _adam("magnitude_", gradient, state, group, 32, age=state["magnitude_age"])
        state["magnitude_age"] += 1
        magnitude = magnitude * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * step
        # (m, V) and (−m, −V) are the same weight: the next step starts from the one whose V is the weight.
        state["magnitude_exp_avg"].mul_(torch.where(magnitude < 0, -1.0, 1.0))
        moved_length = _norm(moved, dim)
        # A unit of zeros has no direction: its first step gives it one, and its magnitude.
        alive = (length > 0) & (moved_length > 0)
        factor = torch.where(alive, magnitude / moved_length, 1.0)
        moved.mul_(factor.unsqueeze(dim))
        if dtype != torch.float32:
            state["magnitude"] = torch.where(alive, magnitude.abs(), moved_length)

    def _refresh(
        self,
        index: int,
        param: Tensor,
        gradient: Tensor,
        telling: bool,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        """A new basis of the columns of `gradient`, `[side that is projected, other side]`; any unless `telling`."""
        first, gap = not state.get("refreshes"), group["update_proj_gap"]
        before = None if first or group["on_refresh"] != "rotate" else self._basis(state, gradient.shape[0], group)
        state["refreshes"] = state.get("refreshes", 0) + telling
        generator = keyed_generator(gradient.device, group["seed"], index, state["refreshes"], _REFRESH)
        basis = leading_basis(gradient if telling else torch.zeros_like(gradient), group["rank"], generator)
        state["basis"], scale = encode_basis(basis, group["projector_bits"])
        if scale is not None:
            state["basis_scale"] = scale
        state["next_refresh"] = state["step"] + (1 if not telling else self._turn(param) if first else gap)
        if first or group["on_refresh"] == "reset":
            state["age"] = 0
        if first:
            state["magnitude_age"] = 0
        if before is not None:
            turn = self._basis(state, gradient.shape[0], group).T @ before
            _rotate(state, turn, param.shape, group)

    def _turn(self, param: Tensor) -> int:
        """Steps from a matrix's first basis to its second: spread over the gap, so that the matrices take turns."""
        matrices = [other for group in self.param_groups if group["rank"] is not None for other in group["params"]]
        gap = self._place(param)[1]["update_proj_gap"]
        place = next(number for number, other in enumerate(matrices) if other is param)
        return gap - place * gap // len(matrices)

    @staticmethod
    def _basis(state: dict[str, Any], rows: int, group: dict[str, Any]) -> Tensor:
        return decode_basis(state["basis"], state.get("basis_scale"), (rows, group["rank"]), group["projector_bits"])

    def _plain_step(
        self, index: int, param: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """AdamW, a part at a time, so that float32 temporaries stay small beside a vocabulary's embedding."""
        bits = moment_bits(param.numel(), group["bits"])
        finite = gradient.sum(dtype=torch.float32).isfinite()
        decay = 1 - group["lr"] * group["weight_decay"]
        age = state["step"] - 1
        generator = keyed_generator(param.device, group["seed"], index, state["step"], _ROUNDING)
        values, gradients = param.view(-1), gradient.reshape(-1)
        for start in range(0, param.numel(), CHUNK):
            stop = min(start + CHUNK, param.numel())
            value = values[start:stop]
            # Views of the moments of this part, which _adam replaces or changes in place.
            part = {key: state[key][_span(key, start, stop, bits)] for key in state if key.startswith("exp_avg")}
            gradient = torch.where(finite, gradients[start:stop].to(torch.float32), 0.0)
            step = _adam("", gradient, part, group, bits, age)
            for key, moment in part.items():
                if param.numel() <= CHUNK:
                    state[key] = moment
                    continue
                if key not in state:
                    state[key] = moment.new_empty(_span(key, 0, param.numel(), bits).stop)
                state[key][_span(key, start, stop, bits)] = moment
            del part, moment
            moved = value.to(torch.float32).mul_(decay).sub_(step, alpha=group["lr"])
            if moved is not value:
                round_into(value, moved, generator)
            # Or they would stand beside those of the next part.
            del gradient, step, moved


def _norm(matrix: Tensor, dim: int) -> Tensor:
    # Along columns torch's own norm takes a hundred times as long as along rows (CPU).
    if dim == 1:
        return torch.linalg.vector_norm(matrix, dim=1)
    return torch.linalg.vecdot(matrix, matrix, dim=0).sqrt_()


def _adam(
    name: str,
    gradient: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    bits: int,
    age: int,
) -> Tensor:
    """Adam's direction for a float32 `gradient`, `age` steps after the moments were zero."""
    keys = (f"{name}exp_avg", f"{name}exp_avg_sq")
    beta1, beta2 = group["betas"]
    if age == 0:
        first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
    elif bits == 32:
        first, second = (state[key] for key in keys)
    else:
        first, second = (
            decode_moment(state[key], state[f"{key}_absmax"], gradient.shape, bits, signed)
            for key, signed in zip(keys, (True, False), strict=True)
        )
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    for key, moment, signed in zip(keys, (first, second), (True, False), strict=True):
        if bits == 32:
            state[key] = moment
        else:
            state[key], state[f"{key}_absmax"] = encode_moment(moment, bits, signed)
    correction1, correction2 = 1 - beta1 ** (age + 1), 1 - beta2 ** (age + 1)
    denominator = second.sqrt().div_(math.sqrt(correction2)).add_(group["eps"]).mul_(correction1)
    return torch.div(first, denominator, out=denominator)


def _rotate(state: dict[str, Any], turn: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
    """The moments in a new basis; `turn` is Pₙₑᵥᵀ·P_old. Squares add up as if coordinates were independent."""
    right = projects_right(shape, group["proj_type"])
    inside = torch.Size((shape[0], group["rank"]) if right else (group["rank"], shape[1]))
    bits = moment_bits(inside.numel(), group["bits"])
    for key, signed, by in (("exp_avg", True, turn), ("exp_avg_sq", False, turn.square())):
        moment = state[key] if bits == 32 else decode_moment(state[key], state[f"{key}_absmax"], inside, bits, signed)
        moment = moment @ by.T if right else by @ moment
        if bits == 32:
            state[key] = moment
        else:
            state[key], state[f"{key}_absmax"] = encode_moment(moment, bits, signed)


def _span(key: str, start: int, stop: int, bits: int) -> slice:
    """Where the elements `start:stop` of a tensor stand in one of its moments' parts."""
    if bits == 32:
        return slice(start, stop)
    if key.endswith("_absmax"):
        return slice(start // MOMENT_BLOCK[bits], -(stop // -MOMENT_BLOCK[bits]))
    return slice(start * bits // 8, -(stop * bits // -8))


def _elements(name: str, shape: torch.Size, group: dict[str, Any], dtype: torch.dtype) -> int:
    """Elements that the tensor `name` of a parameter's state has."""
    rank = group["rank"]
    if rank is None:
        inside = shape.numel()
    else:
        right = projects_right(shape, group["proj_type"])
        side, other = (shape[1], shape[0]) if right else (shape[0], shape[1])
        if name == "basis_scale":
            return rank if group["projector_bits"] == 8 else -(side * rank // -BASIS_BLOCK)
        if name == "basis":
            return -(side * rank // -2) if group["projector_bits"] == 4 else side * rank
        if name.startswith("magnitude") or name == "written":
            return shape[0] if (group["norm"] == "out") != group["transposed"] else shape[1]
        inside = other * rank
    return _span(name, 0, inside, moment_bits(inside, group["bits"])).stop


DEFAULTS: dict[str, Any] = {
    name: setting.default for name, setting in inspect.signature(GradNormLoRP).parameters.items() if name != "params"
} | {"transposed": False}
"""Settings of a group; `transposed`: whether the weight is stored `[in, out]`, as Conv1D's."""


def settings_of(**settings: Any) -> dict[str, Any]:
    """All settings of a group, the given ones checked and the others at their defaults."""
    group = {**DEFAULTS, **settings}
    _check_settings(group)
    return group


def _check_settings(group: dict[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        if not any(
            group[key] is choice or (group[key] == choice and type(group[key]) is type(choice)) for choice in allowed
        ):
            raise ValueError(f"{key} must be one of {', '.join(map(repr, allowed))}, got {group[key]!r}")
    for key, lowest in (("lr", 0.0), ("scale", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        value = group[key].item() if isinstance(group[key], Tensor) else group[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < math.inf:
            raise ValueError(f"{key} must be a finite number, {lowest:g} or more, got {group[key]!r}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_is_beta, betas)):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
    for key in ("rank", "update_proj_gap", "seed"):
        value, lowest = group[key], 0 if key == "seed" else 1
        if key == "rank" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{key} must be an integer of at least {lowest}, got {value!r}")
    if group["tangential"] and group["norm"] is None and group["rank"] is not None:
        raise ValueError(
            "tangential=True takes out what the magnitude follows, and with norm=None there is no magnitude. Pass "
            "norm='out', or tangential=False"
        )
    if group["bits"] < 32 or group["projector_bits"] == 4:
        functional()


def _is_beta(value: Any) -> bool:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _check_parameter(param: Tensor, group: dict[str, Any]) -> None:
    shape, rank = tuple(param.shape), group["rank"]
    if hasattr(param, "full_tensor"):
        raise ValueError(f"a parameter of shape {shape} is a DTensor: GradNormLoRP needs whole, unsharded parameters")
    if param.dtype not in DTYPES:
        raise ValueError(f"parameters must be float32 or bfloat16, one of shape {shape} is {param.dtype}")
    if not param.numel():
        raise ValueError(
            f"a parameter of shape {shape} is empty: if it is sharded (ZeRO-3), GradNormLoRP cannot see it"
        )
    if not param.is_contiguous():
        raise ValueError(f"a parameter of shape {shape} is not contiguous: param.data = param.data.contiguous()")
    if rank is None:
        return
    if param.ndim != 2:
        raise ValueError(f"a group with a rank holds matrices only, one parameter has shape {shape}: pass rank=None")
    side = param.shape[1] if projects_right(param.shape, group["proj_type"]) else param.shape[0]
    if rank > side:
        raise ValueError(f"rank={rank} exceeds the projected side, {side}, of a parameter of shape {shape}: lower it")
