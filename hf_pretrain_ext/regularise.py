"""Staying near the model that training began with, without any of its data: in its weights, or in what it says.

`L2Init` pulls the weights back a little at every step. `kl_to_teacher` and `feature_distance` measure how far a model
has gone from a frozen one on the rows of a batch, to be added to the loss. Knows no Trainer.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pretrain_ext.anchored import Anchored, total
from hf_pretrain_ext.gradnormlorp.quantised import round_into
from hf_pretrain_ext.plan.counter import derive_key
from hf_pretrain_ext.values import is_number, shown

__all__ = [
    "L2Init",
    "feature_distance",
    "frozen_copy",
    "kl_to_teacher",
    "scored_positions",
    "trained_beside_adapter",
    "weights_digest",
    "without_adapter",
]

ANCHOR = "l2_init_anchor"
STEPS = "l2_init_steps"
_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
CHUNK = 1024
"""Positions whose probabilities are worked out at a time."""


class L2Init(Anchored):
    """
    An optimizer with a decoupled pull towards the weights that training began with: before every step,

        θ ← θ − lr · λ · (θ − θ₀)

    This is AdamW's weight decay with θ₀ in the place of 0. As a term λ/2·‖θ − θ₀‖² of the loss (L2-SP, Li et al.,
    2018) it would pass through the optimizer's moments, which divide it by the size of the gradients; here λ means the
    same for every optimizer and every weight, and neither losses nor gradient norms change.

    θ₀ is kept in the type of the weights, which holds it exactly. Pulls on bfloat16 weights, each far below what such
    a weight can hold, are rounded up or down at random so that their mean is right.

    Args:
        optimizer (`torch.optim.Optimizer`): that makes the steps.
        strength (`float`, *optional*, defaults to 0.1): λ, of the same unit as weight decay. (Ours; 0.1 is what
            weight decay usually is.)
        seed (`int`, *optional*, defaults to 0): of rounding at random.
        anchor_device (`str`, *optional*, defaults to `"weights"`): where θ₀ lies: beside the weights, or `"cpu"`.

    Raises:
        `ValueError`: a setting out of range, or float16 weights. `TypeError`: `optimizer` is none.

    Example:

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = L2Init(torch.optim.SGD([weight], lr=0.5), strength=1.0)
    >>> for _ in range(2):
    ...     weight.grad = -torch.ones(1)
    ...     optimizer.step()
    >>> weight.item()  # 1 + 0.5, then half of that back and 0.5 on
    1.75
    """

    anchor_key = ANCHOR
    numbers = {STEPS: "steps"}

    def __init__(self, optimizer: Optimizer, *, strength: float = 0.1, seed: int = 0, anchor_device: str = "weights"):
        check_strength(strength)
        super().__init__(optimizer, anchor_device)
        if any(param.dtype == torch.float16 for param in self._params()):
            raise ValueError("float16 weights would lose the pull in rounding: use bfloat16 or float32 weights")
        self.strength, self.seed, self.steps = float(strength), seed, 0

    def __repr__(self) -> str:
        return f"L2Init(strength={self.strength}, {self.optimizer!r})"

    def _anchor_type(self, param: Tensor) -> torch.dtype:
        return param.dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._take_anchors()
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                self._pull(param, float(group["lr"]) * self.strength, number)
                number += 1
        self.steps += 1
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _pull(self, param: Tensor, weight: float, number: int) -> None:
        # A parameter without a gradient is left alone by the optimizer, and by this.
        if weight == 0 or param.grad is None:
            return
        anchor = self._anchors[param].to(param.device)
        if param.dtype != torch.bfloat16:
            param.lerp_(anchor, weight)
            return
        wanted = torch.lerp(param.float(), anchor.float(), weight)
        noise = torch.Generator(param.device)
        noise.manual_seed(derive_key(self.seed, "l2 init", number, self.steps) >> 1)
        target: Any = param.data
        local = getattr(target, "to_local", None)
        # Of a sharded tensor, each rank rounds its own part.
        round_into(target if local is None else local(), wanted if local is None else _local(wanted), noise)

    def distance(self) -> float:
        """‖θ − θ₀‖ over all weights, 0 before the first step."""
        squares = 0.0
        for param in self._params():
            if param in self._anchors:
                way = param.detach().float() - self._anchors[param].to(param.device).float()
                squares += total(way * way)
        return squares**0.5


def _local(values: Any) -> Tensor:
    return cast(Tensor, values.to_local())


def check_strength(strength: Any) -> None:
    """
    Raises:
        `ValueError`: a strength of [`L2Init`] out of range.
    """
    if not is_number(strength) or strength < 0:
        raise ValueError(f"strength must be a number from 0 on, such as 0.1, got {shown(strength)}")


def scored_positions(labels: Tensor, shifted: bool) -> Tensor:
    """
    Which positions of the logits bear a loss, shape `(batch, sequence)`.

    Args:
        labels (`Tensor`): -100 where there is none, shape `(batch, sequence)`.
        shifted (`bool`): whether the logits at position t predict label t + 1 (causal language models).

    Example:

    >>> scored_positions(torch.tensor([[5, 6, -100, 7]]), shifted=True).tolist()
    [[True, False, True, False]]
    """
    bearing = labels.ne(-100)
    if not shifted:
        return bearing
    return torch.cat([bearing[:, 1:], torch.zeros_like(bearing[:, :1])], dim=1)


def kl_to_teacher(logits: Tensor, teacher_logits: Tensor, positions: Tensor) -> Tensor:
    """
    Σ KL(teacher ‖ model) of the next-token distributions, over the `positions` that count, in nats.

    Its gradient, softmax(model) − softmax(teacher), is worked out on the way, a chunk of positions at a time, so that
    no other tensor of the logits' size is kept.

    Args:
        logits (`Tensor`): of the model, shape `(batch, sequence, vocabulary)`.
        teacher_logits (`Tensor`): same shape; no gradient flows into them.
        positions (`Tensor`): which count, bool, shape `(batch, sequence)`.

    Example:

    >>> one = torch.tensor([[[0.0, 0.0]]])
    >>> other = torch.tensor([[[1.0, 0.0]]])
    >>> all_of_them = torch.tensor([[True]])
    >>> float(kl_to_teacher(one, one, all_of_them)), round(float(kl_to_teacher(one, other, all_of_them)), 4)
    (0.0, 0.1109)
    """
    rows = positions.flatten().nonzero().flatten()
    return cast(Tensor, _KL.apply(logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2), rows))


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        needed = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits) if needed else None
        found = torch.zeros((), dtype=precise, device=logits.device)
        for chosen in rows.split(CHUNK):
            ours = logits[chosen].to(precise).log_softmax(dim=-1)
            theirs = teacher[chosen].to(precise).log_softmax(dim=-1)
            probabilities = theirs.exp()
            found += (probabilities * (theirs - ours)).sum()
            if gradient is not None:
                gradient[chosen] = (ours.exp() - probabilities).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def feature_distance(features: Tensor, teacher_features: Tensor, positions: Tensor) -> Tensor:
    """
    Σ ‖h − h_teacher‖² over the `positions` that count, where h are hidden states, squares summed over their size.

    Args:
        features (`Tensor`): of the model, shape `(batch, sequence, size)`.
        teacher_features (`Tensor`): same shape; no gradient flows into them.
        positions (`Tensor`): which count, bool, shape `(batch, sequence)`.

    Example:

    >>> h = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])
    >>> float(feature_distance(h, torch.zeros_like(h), torch.tensor([[True, False]])))
    25.0
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    way = features[positions].to(precise) - teacher_features.detach()[positions].to(precise)
    return way.square().sum()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is now, in evaluation mode, that takes no gradients."""
    made = copy.deepcopy(model)
    for module in made.modules():
        for name in _MOVERS:
            # accelerate puts functions of that name on a model that it spreads: copied, they move the original.
            vars(module).pop(name, None)
    made.requires_grad_(False)
    return made.eval()


@contextmanager
def without_adapter(model: Any) -> Iterator[Any]:
    """The base of a PEFT model: adapters off, in evaluation mode; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(param, param.requires_grad) for param in model.parameters()]
    model.eval()
    try:
        with model.disable_adapter():
            yield model
    finally:
        for module, training in modes:
            module.training = training
        for param, kept in trained:
            # PEFT makes all of an adapter trainable as it switches it on again.
            param.requires_grad = kept


def trained_beside_adapter(model: Any) -> list[str]:
    """Names of the parameters of a PEFT model that are trained and stay in force with its adapters off."""
    prompts = getattr(model, "prompt_encoder", nn.Module())
    own = {id(param) for param in prompts.parameters()}
    with without_adapter(model):
        # PEFT freezes what it switches off: adapters, and modules that they train in the place of others. Not prompts.
        return [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in own]


def weights_digest(model: nn.Module | Mapping[str, Tensor], per_tensor: int = 4096) -> str:
    """
    A hash of names, shapes, types and of elements of every weight of a model or state, evenly chosen where they are
    many.

    Example:

    >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> weights_digest(one) == weights_digest(copy.deepcopy(one)), weights_digest(one) == weights_digest(other)
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in (model.state_dict() if isinstance(model, nn.Module) else model).items():
        digest.update(f"{name}\x1f{tuple(weight.shape)}\x1f{weight.dtype}\x1e".encode())
        flat = weight.detach().flatten()
        flat = flat[:: max(-(-flat.numel() // per_tensor), 1)].contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
