"""The three ways of merging, on tensors: the papers' equations.

All compute in float32 (float64 where an input is), and round once, to nearest even. Where the exact result is an
element of an input, that element is given as it is, bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.merging.compare import same
from hf_pretrain_ext.values import is_number, shown

__all__ = [
    "average_tensors",
    "instruction_residual_tensors",
    "lines_rates",
    "lines_tensors",
    "multi_task_alpha",
    "shares_of",
]


def shares_of(weights: Sequence[float] | None, number: int) -> list[float]:
    """The weights of an average of `number` inputs, divided by their sum; equal ones for None.

    Raises:
        `ValueError`: another number of weights, one that is no finite number, or a sum that is not above zero.

    Example:

    >>> shares_of([3, 1], 2), shares_of(None, 2), shares_of([2, -1], 2)
    ([0.75, 0.25], [0.5, 0.5], [2.0, -1.0])
    """
    if weights is None:
        return [1 / number] * number
    if not isinstance(weights, Sequence) or isinstance(weights, str) or not all(map(is_number, weights)):
        raise ValueError(f"weights must be a list of finite numbers, one an input, or None, got {shown(weights)}")
    if len(weights) != number:
        raise ValueError(f"weights must be one an input: {number} inputs, {len(weights)} weights")
    scaled = _scaled(weights)
    total = math.fsum(scaled)
    if total <= 0:
        raise ValueError(f"weights are divided by their sum, which must be above 0, got {shown(list(weights))}")
    return [weight / total for weight in scaled]


def _scaled(weights: Sequence[float]) -> list[float]:
    """Over a power of two, by which nothing is rounded, so that the largest is about 1; zeros where all are next to
    nothing. The sum of the largest numbers there are is none, and that of the smallest has few digits."""
    largest = max(map(abs, weights))
    if largest < sys.float_info.min:
        return [0.0] * len(weights)
    exponent = math.frexp(largest)[1]
    return [math.ldexp(weight, -exponent) for weight in weights]


def lines_rates(number: int, alpha: float | None, beta: float | None) -> tuple[float, float]:
    """`alpha` and `beta` of LiNeS for `number` tuned models, with the paper's values for those left out.

    One model: `beta = 1 − alpha`, so that the last block is kept whole. Several, summed: `alpha = 1/number`.

    Example:

    >>> lines_rates(1, 0.25, None), lines_rates(4, None, 0.5)
    ((0.25, 0.75), (0.25, 0.5))
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and not is_number(value):
            raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    if number == 1:
        if alpha is None:
            raise ValueError("alpha must be given for one tuned model: a number from 0 to 1, chosen on held-out data")
        return float(alpha), float(1 - alpha if beta is None else beta)
    if beta is None:
        raise ValueError("beta must be given for several tuned models: a number, chosen on held-out data")
    return float(1 / number if alpha is None else alpha), float(beta)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def average_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The weighted mean of tensors of one shape: Σ wᵢ θᵢ / Σ wᵢ.

    Args:
        tensors (`list[Tensor]`): Of any floating types.
        weights (`list[float]`, *optional*): One a tensor; they are divided by their sum. Equal by default.
        dtype (`torch.dtype`, *optional*): Of the result; by default that of the first tensor.

    Example:

    >>> average_tensors([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], weights=[3, 1])
    tensor([1.5000, 3.0000])
    """
    shares_of(weights, len(tensors))
    dtype = dtype or tensors[0].dtype
    given = [1.0] * len(tensors) if weights is None else _scaled(weights)
    used = [(tensor, weight) for tensor, weight in zip(tensors, given, strict=True) if weight]
    first, weight = used[0]
    if all(same(first, tensor) for tensor, _ in used):
        return first.to(dtype)
    wide = _wide(*tensors)
    total = first.to(wide) * weight
    for tensor, weight in used[1:]:
        total.add_(tensor.to(wide), alpha=weight)
    # Divided at the end: thirds of a sum have exact ties among bfloat16 numbers, sums of rounded thirds do not.
    return total.div_(math.fsum(given)).to(dtype)


def lines_tensors(base: Tensor, tuned: Sequence[Tensor], scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """θ₀ + scale · Σ (θᵢ − θ₀): the task vectors of one parameter, scaled by what LiNeS gives its block.

    Args:
        base (`Tensor`): The parameter before tuning.
        tuned (`list[Tensor]`): The parameter after it, of one or several models.
        scale (`float`): alpha + beta · l / (L − 1) in block l of L, alpha elsewhere.
        dtype (`torch.dtype`, *optional*): Of the result; by default that of `base`.

    Example:

    >>> lines_tensors(torch.tensor([1.0, 2.0]), [torch.tensor([2.0, 4.0])], scale=0.5)
    tensor([1.5000, 3.0000])
    """
    dtype = dtype or base.dtype
    if not scale or all(same(base, each) for each in tuned):
        return base.to(dtype)
    if scale == 1 and len(tuned) == 1:
        return tuned[0].to(dtype)
    wide = _wide(base, *tuned)
    start = base.to(wide)
    change = tuned[0].to(wide) - start
    for each in tuned[1:]:
        change += each.to(wide) - start
    return torch.add(start, change, alpha=scale).to(dtype)


def instruction_residual_tensors(
    base: Tensor, instruct: Tensor, adapted: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """θ_adapted + (θ_instruct − θ_base).

    Args:
        base (`Tensor`): The parameter of the model that both others were trained from.
        instruct (`Tensor`): After instruction tuning.
        adapted (`Tensor`): After continued pre-training.
        dtype (`torch.dtype`, *optional*): Of the result; by default that of `instruct`.

    Example:

    >>> one = torch.ones(2)
    >>> instruction_residual_tensors(base=one, instruct=one + 2, adapted=one + 10)
    tensor([13., 13.])
    """
    dtype = dtype or instruct.dtype
    if same(base, adapted):
        return instruct.to(dtype)
    if same(base, instruct):
        return adapted.to(dtype)
    wide = _wide(base, instruct, adapted)
    start, taught, learned = base.to(wide), instruct.to(wide), adapted.to(wide)
    result = learned + (taught - start)
    # Rounding of the difference would show in elements that only one of the two trainings changed.
    result = torch.where(learned == start, taught, result)
    return torch.where(taught == start, learned, result).to(dtype)


def multi_task_alpha(task_vectors: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> float:
    """The `alpha` of LiNeS for task vectors merged in any way: (‖Σ τᵢ‖₁ / ‖τ_merged‖₁) / N.

    For their plain sum it is 1/N. For a merge that drops entries (TIES, say) it makes up for what was dropped.

    Args:
        task_vectors (`list[dict[str, Tensor]]`): θᵢ − θ₀ of each model.
        merged (`dict[str, Tensor]`): What a merging method made of them.

    Example:

    >>> first, second = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -1.0])}
    >>> multi_task_alpha([first, second], {"w": torch.tensor([4.0, 0.0])})
    0.625
    """
    if not task_vectors:
        raise ValueError("task_vectors must hold one at least")
    for vector in task_vectors:
        if vector.keys() != merged.keys():
            other = sorted(vector.keys() ^ merged.keys())
            raise ValueError(f"task_vectors and merged must have the same names; they differ in {shown(other)}")
    whole = sum(float(sum(v[key].double() for v in task_vectors).abs().sum()) for key in merged)
    kept = sum(float(tensor.double().abs().sum()) for tensor in merged.values())
    if not kept:
        raise ValueError("merged is zero everywhere: there is no task vector to scale")
    return whole / kept / len(task_vectors)
