"""The three ways of merging on state dicts, for raw loops: no files, no configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.merging.blocks import find_blocks
from hf_pretrain_ext.merging.checkpoints import MergeError, Spec
from hf_pretrain_ext.merging.compare import check_specs
from hf_pretrain_ext.merging.formulas import (
    average_tensors,
    instruction_residual_tensors,
    lines_rates,
    lines_tensors,
    shares_of,
)
from hf_pretrain_ext.values import shown

__all__ = ["average_state_dicts", "instruction_residual_state_dict", "lines_state_dict", "several"]


def several(name: str, values: Any, least: int = 1) -> list[Any]:
    """The list that the argument `name` must be, of `least` elements or more."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) < least:
        raise MergeError(f"{name} must be a list of {least} or more, got {shown(values)}")
    return list(values)


def _merged(
    named: Mapping[str, Any], donor: str, combine: Callable[[str, list[Tensor], torch.dtype], Tensor]
) -> dict[str, Tensor]:
    for name, each in named.items():
        if not isinstance(each, Mapping) or not all(isinstance(tensor, Tensor) for tensor in each.values()):
            raise MergeError(f"{name} must be a state dict (names to tensors), got {shown(each)}")
    problems = check_specs(
        {name: {key: Spec(t.dtype, tuple(t.shape)) for key, t in each.items()} for name, each in named.items()}
    )
    if problems:
        raise MergeError("these state dicts cannot be merged:\n" + "\n".join(f"  {line}" for line in problems))
    result, unlike = {}, []
    for key, kept in named[donor].items():
        tensors = [each[key].detach() for each in named.values()]
        if kept.dtype.is_floating_point:
            result[key] = combine(key, tensors, kept.dtype)
        elif all(torch.equal(kept, tensor) for tensor in tensors):
            result[key] = kept.detach().clone()
        else:
            unlike.append(key)
    if unlike:
        raise MergeError(f"integers cannot be merged, and these are not the same in all inputs: {', '.join(unlike)}")
    return result


def average_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of state dicts; types are those of the first.

    Args:
        state_dicts (`list[dict[str, Tensor]]`): Two or more, with the same names and shapes.
        weights (`list[float]`, *optional*): One a state dict; they are divided by their sum. Equal by default.

    Raises:
        [`~hf_pretrain_ext.merging.MergeError`]: names, shapes or integers differ.

    Example:

    >>> average_state_dicts([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    {'w': tensor([0.5000, 0.5000])}
    """
    given = several("state_dicts", state_dicts, 2)
    shares_of(weights, len(given))
    named = {f"state_dicts[{number}]": each for number, each in enumerate(given)}
    return _merged(named, "state_dicts[0]", lambda key, tensors, dtype: average_tensors(tensors, weights, dtype))


def lines_state_dict(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    alpha: float | None = None,
    beta: float | None = None,
    blocks: str | None = None,
) -> dict[str, Tensor]:
    """LiNeS (Wang et al., 2024): changes from `base` to `tuned`, less in shallow blocks than in deep ones.

    Args:
        base (`dict[str, Tensor]`): The state before tuning, whose types the result has.
        tuned (`dict[str, Tensor]` or a list of them): The state after it; several are merged by the sum of changes.
        alpha (`float`, *optional*): Share of the change that the first block, and what is outside the blocks, keeps.
            Must be given for one tuned state; 1/N by default for N.
        beta (`float`, *optional*): What the last block keeps beyond it. 1 − alpha by default for one tuned state;
            must be given for several.
        blocks (`str`, *optional*): What stands before a block's number in the names, found where it is not given.

    Example:

    >>> base = {"layers.0.w": torch.zeros(1), "layers.1.w": torch.zeros(1), "head": torch.zeros(1)}
    >>> lines_state_dict(base, {name: torch.ones(1) for name in base}, alpha=0.25)
    {'layers.0.w': tensor([0.2500]), 'layers.1.w': tensor([1.]), 'head': tensor([0.2500])}
    """
    states = [tuned] if isinstance(tuned, Mapping) else several("tuned", tuned)
    rates = lines_rates(len(states), alpha, beta)
    names = ["tuned"] if isinstance(tuned, Mapping) else [f"tuned[{number}]" for number in range(len(states))]
    stack = find_blocks(base, blocks)
    return _merged(
        {"base": base, **dict(zip(names, states, strict=True))},
        "base",
        lambda key, tensors, dtype: lines_tensors(tensors[0], tensors[1:], stack.scale(key, *rates), dtype),
    )


def instruction_residual_state_dict(
    base: Mapping[str, Tensor], instruct: Mapping[str, Tensor], adapted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Continued pre-training of a base model, and what instruction tuning changed in it, added (arXiv 2410.10739).

    Args:
        base (`dict[str, Tensor]`): The state that both others were trained from.
        instruct (`dict[str, Tensor]`): After instruction tuning; the result has its types.
        adapted (`dict[str, Tensor]`): After continued pre-training of `base`.

    Example:

    >>> one = torch.ones(1)
    >>> instruction_residual_state_dict({"w": one}, instruct={"w": one + 2}, adapted={"w": one + 10})
    {'w': tensor([13.])}
    """
    named = {"base": base, "instruct": instruct, "adapted": adapted}
    return _merged(
        named,
        "instruct",
        lambda key, tensors, dtype: instruction_residual_tensors(tensors[0], tensors[1], tensors[2], dtype),
    )
