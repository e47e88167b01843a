"""What training a model takes, in bytes, before any of it exists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_pretrain_ext.gradnormlorp.groups import param_groups, projected_modules
from hf_pretrain_ext.gradnormlorp.optimizer import CHUNK, DTYPES, settings_of
from hf_pretrain_ext.gradnormlorp.projector import OVERSAMPLING, projects_right
from hf_pretrain_ext.gradnormlorp.quantised import CHUNK as ROUNDED
from hf_pretrain_ext.gradnormlorp.quantised import basis_bytes, moment_bits, moment_bytes

__all__ = ["Memory", "compare", "comparison_table", "measured_state", "memory", "memory_of", "on_meta"]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training process, activations apart.

    `moments`, `projectors` and `magnitudes` are the optimizer's state, scales and maxima included. `temporaries` is
    the most that the tensors of its step take besides (workspaces of LAPACK or cuSOLVER apart), `gradients` all that
    exist at once (with the layer-wise form: the largest), and `peak` the sum of all.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    projectors: int
    magnitudes: int
    temporaries: int

    @property
    def state(self) -> int:
        return self.moments + self.projectors + self.magnitudes

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.state + self.temporaries

    def lines(self) -> list[str]:
        """For people, in units of 10⁹ or 10⁶ bytes."""
        unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if self.peak >= u), (1e3, "kB"))
        parts = ("weights", "gradients", "moments", "projectors", "magnitudes", "temporaries", "peak")
        figures = ", ".join(f"{part} {getattr(self, part) / unit:.2f}" for part in parts)
        return [f"{figures} {name} ({self.parameters / 1e6:.1f}M parameters; activations apart)"]


def on_meta(model_or_config: Any) -> Any:
    """A model as it is; of a config, or a path or Hub name of one, a model without storage."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(model_or_config, (str, os.PathLike)):
        model_or_config = AutoConfig.from_pretrained(os.fspath(model_or_config))
    if not isinstance(model_or_config, PretrainedConfig):
        raise ValueError(
            f"model_or_config must be a model, a config, or a path or Hub name of one, got "
            f"{type(model_or_config).__name__}"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_or_config)


def memory(
    model_or_config: Any,
    rank: int,
    bits: int = 8,
    projector_bits: int = 8,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    norm: str | None = "out",
    proj_type: str = "std",
    dtype: torch.dtype | None = None,
    layerwise: bool = False,
) -> Memory:
    """Bytes that training with [`GradNormLoRP`] takes; nothing is allocated for a config.

    Args:
        model_or_config: a model, a `PretrainedConfig`, or a path or Hub name of one.
        rank, bits, projector_bits, norm, proj_type: as of the optimizer.
        target_modules (`str` or list of `str`, *optional*, defaults to `"all-linear"`): as of `param_groups`.
        dtype (`torch.dtype`, *optional*): of weights and gradients, if not that of the model.
        layerwise (`bool`, *optional*, defaults to `False`): updates inside `backward`, one gradient at a time.

    Raises:
        `ValueError`: for settings that the optimizer refuses, or a model without matrices to project.

    Example:

    >>> from transformers import LlamaConfig
    >>> from hf_pretrain_ext.gradnormlorp import memory
    >>> plan = memory(LlamaConfig(), rank=1024, dtype=__import__("torch").bfloat16)  # LLaMA-7B
    >>> round(plan.parameters / 1e9, 2), round(1 - plan.state / (8 * plan.parameters), 3)
    (6.74, 0.911)
    """
    settings: dict[str, Any] = {"bits": bits, "projector_bits": projector_bits, "norm": norm, "proj_type": proj_type}
    settings_of(rank=rank, **settings)
    model = on_meta(model_or_config)
    _check_dtype(model, dtype)
    groups = param_groups(model, rank, target_modules)
    return memory_of(model, [{**settings, **group} for group in groups], dtype, layerwise)


def _check_dtype(model: nn.Module, dtype: Any) -> None:
    """Raises `ValueError` for what the optimizer would refuse."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, or None for the model's own, got {dtype!r}")
    own = {param.dtype for param in model.parameters() if param.requires_grad}
    if dtype is None and (others := sorted(map(str, own.difference(DTYPES)))):
        raise ValueError(
            f"parameters must be float32 or bfloat16, and the model has {', '.join(others)}: plan with "
            "dtype=torch.bfloat16, and load it so to train it"
        )


def memory_of(
    model: nn.Module, groups: Sequence[dict[str, Any]], dtype: torch.dtype | None = None, layerwise: bool = False
) -> Memory:
    """The same for given groups of parameters, of any form; parameters of `model` in no group are frozen."""
    parts = dict.fromkeys(("trained", "gradients", "moments", "projectors", "magnitudes", "temporaries"), 0)
    for group in map(lambda given: settings_of(**given), groups):
        for param in group["params"]:
            size = (dtype or param.dtype).itemsize * param.numel()
            low = (dtype or param.dtype) != torch.float32
            parts["trained"] += param.numel()
            parts["gradients"] = max(parts["gradients"], size) if layerwise else parts["gradients"] + size
            if group["rank"] is None:
                parts["moments"] += 2 * moment_bytes(param.numel(), group["bits"])
                took = _plain_temporaries(param.numel(), group["bits"], low)
            else:
                right = projects_right(param.shape, group["proj_type"])
                side, other = (param.shape[1], param.shape[0]) if right else (param.shape[0], param.shape[1])
                parts["moments"] += 2 * moment_bytes(other * group["rank"], group["bits"])
                parts["projectors"] += basis_bytes(side, group["rank"], group["projector_bits"])
                if group["norm"] is not None:
                    units = param.shape[0] if (group["norm"] == "out") != group["transposed"] else param.shape[1]
                    # Two moments; under bfloat16 also the magnitude itself and the norm that was written.
                    parts["magnitudes"] += 4 * units * (4 if low else 2)
                took = _projected_temporaries(param.shape, group, low)
            parts["temporaries"] = max(parts["temporaries"], took)
    everything = list(model.parameters())
    return Memory(
        parameters=sum(param.numel() for param in everything),
        weights=sum((dtype or param.dtype).itemsize * param.numel() for param in everything),
        **parts,
    )


def _plain_temporaries(numel: int, bits: int, low: bool) -> int:
    """AdamW on a part: what makes its step, then (if low) what rounds the moved value."""
    part, bits = min(numel, CHUNK), moment_bits(numel, bits)
    # Gradient and denominator, beside both moments where they are decoded (and, by then, encoded anew) or first made.
    step = 8 * part
    if bits < 32:
        step += 8 * part + 2 * -(part * bits // -8)
    elif numel > CHUNK:
        step += 8 * part
    # Gradient, step and moved value.
    return max(step, 12 * part + 6 * min(part, ROUNDED) if low else 0)


def _projected_temporaries(shape: Sequence[int], group: dict[str, Any], low: bool) -> int:
    """The largest of the stages of a step on a matrix."""
    right, rank, norm = projects_right(torch.Size(shape), group["proj_type"]), group["rank"], group["norm"]
    side, other = (shape[1], shape[0]) if right else (shape[0], shape[1])
    matrix, inside, copy = 4 * side * other, 4 * other * rank, 4 * side * other if low else 0
    quantised = moment_bits(other * rank, group["bits"]) < 32
    gradient = matrix if group["tangential"] and norm is not None else copy
    # The product whose sum is the gradient of m, or the gradient without the part along V.
    dot = 2 * copy + (matrix if norm is not None else 0)
    tried = rank + OVERSAMPLING
    if 2 * tried >= side:
        refresh = matrix + 4 * (2 * side * side + side * rank)
    else:
        refresh = 4 * (other * tried + max(side * 2 + other, side * 3 + tried) * tried)
    basis = 4 * side * rank if group["projector_bits"] < 32 else 0
    if group["on_refresh"] == "rotate":
        refresh += basis
    # From here on the basis and the projected gradient in float32, later Adam's step beside them.
    project = gradient + basis + inside
    # Beside the projected gradient as it came and cleaned: decoded moments and the denominator, or the denominator
    # alone, or moments made anew while the old ones are still there.
    adam = basis + (5 if quantised else 4 if group["on_refresh"] == "reset" else 3) * inside
    # Norms along columns are of a product.
    norms = basis + 2 * inside + (matrix if norm is not None and (norm == "out") == group["transposed"] else 0)
    rounding = basis + 2 * inside + 6 * min(side * other, ROUNDED) if low else 0
    return max(dot, copy + max(gradient + refresh, project, adam, norms, rounding))


def measured_state(optimizer: Any) -> int:
    """Bytes that the storages of an optimizer's state hold: what `Memory.state` predicts."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def compare(
    model_or_config: Any,
    rank: int,
    bits: int = 8,
    projector_bits: int = 8,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Bytes beside other ways to train the same model: one row each, with `name`, `weights`, `gradients`, `state`.

    The others are counted as their papers do, in payload: GaLore with projector and moments in the weights' dtype (or
    its 8-bit form: moments in 8 bits), LoRA and DoRA with frozen weights and Adam in float32 on their factors.
    """
    model = on_meta(model_or_config)
    _check_dtype(model, dtype)
    # A weight that several modules share is trained once.
    modules = {id(module.weight): module for module in projected_modules(model, rank, target_modules).values()}
    matrices = [tuple(module.weight.shape) for module in modules.values()]
    total = sum(param.numel() for param in model.parameters())
    rest = total - sum(rows * columns for rows, columns in matrices)
    width = dtype.itemsize
    bases = sum(min(shape) * rank for shape in matrices)
    inside = sum(max(shape) * rank for shape in matrices)
    factors = sum(sum(shape) * rank for shape in matrices)
    units = sum(module.out_features if isinstance(module, nn.Linear) else module.nf for module in modules.values())
    blocks = 2 * 4 / 256

    def row(name: str, weights: float, gradients: float, state: float) -> dict[str, Any]:
        return {"name": name, "weights": round(weights), "gradients": round(gradients), "state": round(state)}

    def eight(numel: float) -> float:
        return numel * (2 + blocks)

    plan = memory(model, rank, bits, projector_bits, target_modules=target_modules, dtype=dtype)
    slow = memory(model, rank, bits, projector_bits, target_modules=target_modules, dtype=dtype, layerwise=True)
    return [
        row("Adam, FP32 moments", width * total, width * total, 8 * total),
        row("Adam, BF16 moments", width * total, width * total, 4 * total),
        row("Adam, 8 bits", width * total, width * total, eight(total)),
        row("GaLore", width * total, width * total, width * (bases + 2 * inside + 2 * rest)),
        row("GaLore, 8 bits", width * total, width * total, width * bases + eight(inside + rest)),
        row("LoRA", width * (total + factors), width * factors, 8 * factors),
        row("DoRA", width * (total + factors + units), width * (factors + units), 8 * (factors + units)),
        row(f"GradNormLoRP, {bits} bits", plan.weights, plan.gradients, plan.state),
        row(f"GradNormLoRP, {bits} bits, layer-wise", slow.weights, slow.gradients, slow.state),
    ]


def comparison_table(model_or_config: Any, rank: int, *args: Any, **settings: Any) -> list[str]:
    """`compare` for people: gigabytes, and the share of FP32 Adam's state that is saved."""
    model = on_meta(model_or_config)
    rows = compare(model, rank, *args, **settings)
    numel = sum(param.numel() for param in model.parameters())
    lines = [
        f"{numel / 1e6:.1f}M parameters, rank {rank}; GB (10⁹ bytes), activations apart",
        "",
        f"{'':<34}{'weights':>9}{'gradients':>11}{'state':>9}{'in all':>9}{'state saved':>13}",
    ]
    for row in rows:
        parts = [row[key] / 1e9 for key in ("weights", "gradients", "state")]
        saved = 1 - row["state"] / rows[0]["state"]
        lines.append(f"{row['name']:<34}{parts[0]:9.3f}{parts[1]:11.3f}{parts[2]:9.3f}{sum(parts):9.3f}{saved:13.1%}")
    return lines
