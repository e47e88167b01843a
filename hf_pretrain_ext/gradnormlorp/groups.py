"""Which parameters of a model are projected, as groups for the optimizer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["adapter_groups", "param_groups", "projected_modules"]


def projected_modules(
    model: Any, rank: int, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, nn.Linear | Conv1D]:
    """The modules whose weight would be projected, by name.

    Args:
        model (`nn.Module`): any model.
        rank (`int`): matrices whose smaller side is not above it gain nothing and are left out.
        target_modules (`str` or list of `str`, *optional*, defaults to `"all-linear"`): as in PEFT's `LoraConfig`:
            `"all-linear"` for every linear layer but the head; another string is a regular expression that the whole
            name must match; a list names modules by their last parts (`"q_proj"`, `"mlp.up_proj"`).

    Raises:
        `ValueError`: if nothing matches, or part of a list matches nothing.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    ends = [
        getattr(model, getter)()
        for getter in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, getter)
    ]
    excluded = {id(end.weight) for end in ends if getattr(end, "weight", None) is not None}
    linear = {
        name: module for name, module in model.named_modules() if name and isinstance(module, (nn.Linear, Conv1D))
    }
    if target_modules == "all-linear":
        named = {name: module for name, module in linear.items() if id(module.weight) not in excluded}
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is no regular expression: {error}. Pass a list to name modules"
            ) from error
        named = {name: module for name, module in linear.items() if pattern.fullmatch(name)}
    else:
        wanted = list(target_modules)
        named = {name: module for name, module in linear.items() if any(_ends(name, part) for part in wanted)}
        missing = [part for part in wanted if not any(_ends(name, part) for name in named)]
        if missing:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(f"target_modules names {missing}, but the linear layers of this model are {kinds}")
    trained = {name: module for name, module in named.items() if module.weight.requires_grad}
    large = {name: module for name, module in trained.items() if min(module.weight.shape) > rank}
    if not large:
        sides = sorted({min(module.weight.shape) for module in trained.values()})
        raise ValueError(
            f"target_modules={target_modules!r} with rank={rank} leaves no matrix to project: "
            + (
                f"{len(trained)} match, of smaller sides {sides}. Lower the rank"
                if trained
                else f"of {len(linear)} linear layers {len(named)} match, none of which is trained"
            )
        )
    return large


def _ends(name: str, part: str) -> bool:
    return name == part or name.endswith("." + part)


def adapter_groups(model: Any, rank: int, weight_decay: float = 0.0, **settings: Any) -> list[dict[str, Any]]:
    """Groups of a PEFT DoRA adapter (form B): gradients of the factors A and B projected, magnitudes in plain AdamW.

    DoRA normalises the weight itself, so the factors' groups have `norm=None`. Weight decay is of matrices, also of
    those that `modules_to_save` trains in full.

    Raises:
        `ValueError`: if no trained parameter is a factor, one is smaller than the rank, or there is no DoRA magnitude.
    """
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    factors = [(name, param) for name, param in trained if _FACTOR.search(name) and param.ndim == 2]
    if not factors or not any(_MAGNITUDE.search(name) for name, _ in trained):
        raise ValueError(
            "the model has no trained DoRA adapter, which W = m·(W0 + BA)/‖W0 + BA‖ is: pass "
            "adapter=LoraConfig(use_dora=True, ...), or wrap the model with one"
        )
    smallest = min(min(param.shape) for _, param in factors)
    if rank > smallest:
        raise ValueError(
            f"rank={rank} exceeds the rank of the adapter, {smallest}: lower it, or raise r of LoraConfig"
        )
    chosen = {id(param) for _, param in factors}
    rest = [(name, param) for name, param in trained if id(param) not in chosen]
    # Magnitudes of convolutions are no vectors by shape.
    decays = {id(param) for name, param in rest if param.ndim > 1 and not _MAGNITUDE.search(name)}
    matrices = [param for _, param in rest if id(param) in decays]
    vectors = [param for _, param in rest if id(param) not in decays]
    projected = {"params": [param for _, param in factors], "rank": rank, "weight_decay": weight_decay, "norm": None}
    groups: list[dict[str, Any]] = [
        projected | settings,
        {"params": matrices, "rank": None, "weight_decay": weight_decay},
        {"params": vectors, "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.|$)")


def param_groups(
    model: Any,
    rank: int,
    target_modules: str | Sequence[str] = "all-linear",
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    **settings: Any,
) -> list[dict[str, Any]]:
    """Groups for [`GradNormLoRP`]: the linear layers projected, embeddings, norms, biases and head in plain AdamW.

    Args:
        model (`nn.Module`): only parameters that are trained count.
        rank (`int`): dimensions of the subspace.
        target_modules (`str` or list of `str`, *optional*, defaults to `"all-linear"`): see `projected_modules`.
        weight_decay (`float`, *optional*, defaults to 0.0): of matrices.
        no_decay (sequence of `str`, *optional*): patterns (`*.bias`) of names without decay, besides vectors.
        settings: of the projected groups: `scale`, `norm`...

    Example:

    >>> from torch import nn
    >>> from hf_pretrain_ext.gradnormlorp import param_groups
    >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    >>> [(group["rank"], len(group["params"])) for group in param_groups(model, rank=8)]
    [(8, 1), (None, 1), (None, 3)]
    """
    modules = projected_modules(model, rank, target_modules)
    flipped = {id(module.weight) for module in modules.values() if isinstance(module, Conv1D)}
    weights = {id(module.weight) for module in modules.values()}

    def groups() -> Iterator[dict[str, Any]]:
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        for transposed in (False, True):
            chosen = [param for _, param in trained if id(param) in weights and (id(param) in flipped) == transposed]
            yield {"params": chosen, "rank": rank, "weight_decay": weight_decay, "transposed": transposed, **settings}
        rest = [(name, param) for name, param in trained if id(param) not in weights]
        for decays in (True, False):
            chosen = [
                param
                for name, param in rest
                if (param.ndim > 1 and not any(fnmatch.fnmatch(name, each) for each in no_decay)) == decays
            ]
            yield {"params": chosen, "rank": None, "weight_decay": weight_decay if decays else 0.0}

    return [group for group in groups() if group["params"]]
