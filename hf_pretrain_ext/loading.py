"""Weights and moments of a folder into a model and an optimizer that exist already, or all that does not fit.

Knows no Trainer. Files are safetensors; `optimizer.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hf_pretrain_ext.anchored import bare
from hf_pretrain_ext.checkpoint import CheckpointError, reading
from hf_pretrain_ext.regularise import L2Init, weights_digest
from hf_pretrain_ext.reptile import Reptile
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import reason

__all__ = [
    "ABOUT_NATIVE",
    "base_parts",
    "carry_optimizer",
    "fits",
    "is_adapter",
    "is_native",
    "is_sharded",
    "load_weights",
    "missing_names",
    "others_below",
    "state_of",
    "weight_files",
]

_INDEX, _SINGLE, _ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
ABOUT_NATIVE = (
    "the model's own from_pretrained or add_adapter put its adapter into it, where the Trainer saves it but never "
    "loads it again. Load it with peft.AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True), or put a "
    "new one around the model with peft.get_peft_model(model, config)"
)
"""What is to be said of a model that `is_native`."""
_EMBEDDING = ("embed", "wte", "lm_head")
_LISTED = 8
"""Names that a message lists; of more, their number."""
_OF_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
"""State of torch's optimizers that has the shape of its parameter."""


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that hold the weights of a model, or of an adapter; empty if there are none.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: an index that cannot be read, or files that it names are gone.
    """
    folder = Path(folder)
    # A single file first, as the host has it: saving one leaves the index of former shards behind.
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        with reading(folder, _INDEX):
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            if lost := [name for name in names if os.path.basename(name) != name or not (folder / name).is_file()]:
                raise FileNotFoundError(f"it names {', '.join(lost[:_LISTED])}, which is not there")
        return [folder / name for name in names]
    return [folder / _ADAPTER] if (folder / _ADAPTER).is_file() else []


def is_native(model: Any) -> bool:
    """Whether transformers put an adapter into `model` itself, by `from_pretrained` or `add_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_adapter(files: list[Path]) -> bool:
    return [path.name for path in files] == [_ADAPTER]


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what safetensors files hold, from their headers."""
    from safetensors import safe_open

    found = {}
    for path in files:
        with reading(path.parent, path.name), safe_open(path, framework="pt") as file:
            found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
    return found


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a model's state on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def is_sharded(model: Any) -> bool:
    """Whether no rank holds a whole parameter of `model`: ZeRO-3's partitions, FSDP2's tensors."""
    return any(hasattr(param, "ds_id") or hasattr(param, "full_tensor") for param in model.parameters())


def base_parts(model: Any) -> dict[str, str] | None:
    """Type, shape and hash of each weight below an adapter, which its checkpoints do not hold; None where there are
    none, or no rank has them whole."""
    if not hasattr(model, "peft_config") or is_sharded(model):
        return None
    return {name: _part(name, param) for name, param in model.named_parameters() if not param.requires_grad}


def others_below(model: Any, parts: Mapping[str, str]) -> list[str]:
    """Names of weights that [`base_parts`] gave for a model, and that are others in this one, of the same type and
    shape. What was frozen then and is trained now is compared too."""
    now = {name: _part(name, param) for name, param in model.named_parameters() if name in parts}
    kinds = {name: part.rpartition(" ")[0] for name, part in parts.items()}
    return [name for name, part in now.items() if part.rpartition(" ")[0] == kinds[name] and part != parts[name]]


def _part(name: str, param: torch.Tensor) -> str:
    shape = "x".join(map(str, param.shape))
    return f"{str(param.dtype).removeprefix('torch.')} {shape} {weights_digest({name: param})[:16]}"


def missing_names(model: Any, files: list[Path]) -> list[str]:
    """Weights of `model` that its `files` do not hold under that name; a tied one is held under one of its names."""
    return _missing(model.state_dict(), _shapes(files))


def _missing(expected: Mapping[str, torch.Tensor], held: Collection[str]) -> list[str]:
    present = {tensor.data_ptr() for name, tensor in expected.items() if name in held}
    return [name for name, tensor in expected.items() if name not in held and tensor.data_ptr() not in present]


@dataclass(frozen=True)
class _Faults:
    """What of some weights does not fit a model: names, and for those of another shape both shapes."""

    missing: list[str]
    unknown: list[str]
    other: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.other)

    def lines(self) -> list[str]:
        other = [f"{name}: {there} there, {ours} in the model" for name, there, ours in self.other]
        kinds = (("not there", self.missing), ("not in the model", self.unknown), ("of another shape", other))
        return [f"{what}: {_list(names)}" for what, names in kinds if names]

    @property
    def is_vocabulary(self) -> bool:
        """Whether embeddings with other numbers of rows are all that has another shape."""
        return bool(self.other) and all(
            there[1:] == ours[1:] and any(part in name for part in _EMBEDDING) for name, there, ours in self.other
        )


def _faults(expected: Mapping[str, torch.Tensor], held: Mapping[str, tuple[int, ...]]) -> _Faults:
    """What of `held` does not fit a model's state; a tied weight is held under one of its names."""
    return _Faults(
        missing=_missing(expected, held),
        unknown=[name for name in held if name not in expected],
        other=_of_another_shape(expected, held),
    )


def _of_another_shape(
    expected: Mapping[str, torch.Tensor], held: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [
        (name, held[name], tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in held and held[name] != tuple(tensor.shape)
    ]


def _apart(expected: Mapping[str, torch.Tensor], origin: list[Path] | Mapping[str, torch.Tensor]) -> list[str]:
    """Names that one tensor of the model has, and that differ in `origin`."""
    held = _held(origin)
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        if name in held and tensor.data_ptr():
            groups.setdefault(tensor.data_ptr(), []).append(name)
    apart = []
    for first, *others in groups.values():
        same_shape = [name for name in others if held[name] == held[first]]
        apart += [name for name in same_shape if not torch.equal(_tensor(origin, name), _tensor(origin, first))]
    return apart


def _tensor(origin: list[Path] | Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    from safetensors import safe_open

    if isinstance(origin, Mapping):
        return origin[name]
    for path in origin:
        with reading(path.parent, path.name), safe_open(path, framework="pt") as file:
            if name in file.keys():
                found: torch.Tensor = file.get_tensor(name)
                return found
    raise KeyError(name)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def fits(model: Any, origin: list[Path] | Mapping[str, torch.Tensor]) -> bool:
    """Whether names and shapes of `origin`, files or a state, are those of the model."""
    if isinstance(origin, list) and is_adapter(origin):
        return hasattr(model, "peft_config")
    return not _faults(model.state_dict(), _held(origin))


def _held(origin: list[Path] | Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    if isinstance(origin, list):
        return _shapes(origin)
    return {name: tuple(tensor.shape) for name, tensor in origin.items()}


def load_weights(model: Any, origin: list[Path] | Mapping[str, torch.Tensor], where: str, hint: str = "") -> list[str]:
    """
    Loads `origin` into `model`, every tensor or none. Draws no random number.

    Args:
        model: with parameters that are whole; a PEFT model for an adapter's file.
        origin (`list[Path]` or `dict[str, Tensor]`): what [`weight_files`] gave, or a state. Files under names that
            are not the model's own are read by its `from_pretrained`, at the cost of a second copy.
        where (`str`): what messages call it.
        hint (`str`, *optional*): what messages say besides where something does not fit.

    Returns:
        `list[str]`: what is to be known: weights that were rounded to a narrower type.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: names and shapes that do not fit, listed.
    """
    with rng_guard():
        if isinstance(origin, list) and is_adapter(origin):
            return _load_adapter(model, origin[0], where)
        faults = _faults(model.state_dict(), _held(origin))
        if not faults:
            if apart := _apart(model.state_dict(), origin):
                raise CheckpointError(
                    f"{where} holds weights of their own for {_list(apart)}, which are tied to others in the model: "
                    "one would take the place of the other, and nothing was loaded. Build the model with "
                    "tie_word_embeddings=False"
                )
            return _load(model, origin)
        if isinstance(origin, list) and hasattr(model, "from_pretrained") and not hasattr(model, "peft_config"):
            return _load_converted(model, origin, where, hint)
    raise CheckpointError(_misfit(model, where, faults, hint))


def _load(model: Any, origin: list[Path] | Mapping[str, torch.Tensor]) -> list[str]:
    from safetensors.torch import load_file

    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    rounded: set[str] = set()
    # File by file: no more than one is in memory.
    for part in [origin] if isinstance(origin, Mapping) else origin:
        state = part if isinstance(part, Mapping) else load_file(part)
        rounded |= {
            f"{str(tensor.dtype)[6:]} to {str(types[name])[6:]}"
            for name, tensor in state.items()
            if tensor.is_floating_point() and _bits(types[name]) < _bits(tensor.dtype)
        }
        model.load_state_dict(state, strict=False)
    return [f"weights are rounded from {change}, the type of the model" for change in sorted(rounded)]


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits if dtype.is_floating_point else 64


def _load_converted(model: Any, files: list[Path], where: str, hint: str) -> list[str]:
    """Families that are saved under other names than the model's: `from_pretrained` knows which."""
    try:
        loaded, report = type(model).from_pretrained(
            files[0].parent,
            config=model.config,
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    except Exception as error:  # whatever a model's loading raises is the finding here
        raise CheckpointError(f"{where} cannot be read as a {type(model).__name__} ({reason(error)})") from error
    state = loaded.state_dict()
    # Modules that were put into the model, which its class does not know, are in the files under their own names.
    added = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    own = {name: _tensor(files, name) for name in added if name in report["unexpected_keys"]}
    faults = _Faults(
        missing=sorted({*report["missing_keys"], *added} - {*loaded.all_tied_weights_keys, *own}),
        unknown=sorted(set(report["unexpected_keys"]) - set(own)),
        other=[(name, tuple(there), tuple(ours)) for name, there, ours in sorted(report["mismatched_keys"])]
        + _of_another_shape(added, {name: tuple(tensor.shape) for name, tensor in own.items()}),
    )
    if faults:
        raise CheckpointError(_misfit(model, where, faults, hint))
    return _load(model, {**state, **own})


def _load_adapter(model: Any, path: Path, where: str) -> list[str]:
    if not hasattr(model, "peft_config"):
        raise CheckpointError(
            f"{where} holds an adapter, and the model has none. Give it one of the same kind (get_peft_model, or the "
            "plug-in that did), or merge: PeftModel.from_pretrained(base, folder).merge_and_unload() gives a model to "
            "continue from"
        )
    if is_native(model):
        raise CheckpointError(f"{where} holds an adapter, and {ABOUT_NATIVE}")
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = model.active_adapter
    if not isinstance(adapter, str):
        raise CheckpointError(f"the model has several active adapters, {list(adapter)}: activate the one to continue")
    # Not "auto": it would ask the Hub for the base model's configuration.
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    base = set(model.state_dict())
    held = {name: shape for name, shape in _shapes([path]).items() if name in expected or name not in base}
    if faults := _faults(expected, held):
        raise CheckpointError(_misfit(model, where, faults, "", is_adapter=True))
    set_peft_model_state_dict(model, load_file(path), adapter_name=adapter)
    return []


def _misfit(model: Any, where: str, faults: _Faults, hint: str, is_adapter: bool = False) -> str:
    lines = [f"{where} does not fit this {type(model).__name__}, and nothing was loaded:", *faults.lines()]
    if faults.is_vocabulary:
        lines.append(
            "Embeddings of another size are another vocabulary: resize them after loading the model from there "
            "(`fit_embeddings`, or `resize_token_embeddings`), and pass carry=(), which takes the history alone."
        )
    elif is_adapter:
        lines.append(
            "Give the model an adapter of the configuration of that folder: get_peft_model(base, "
            "PeftConfig.from_pretrained(folder)), or the plug-in that did."
        )
    elif hasattr(model, "peft_config"):
        lines.append(
            "It holds a whole model, and this one has an adapter: load the base from there, from_pretrained(...), put "
            "the adapter on it, and pass carry=(), which takes the history alone."
        )
    else:
        lines.append(
            "Build the model with the configuration of that folder, and the plug-ins that gave it modules of its own."
        )
    return "\n  ".join([*lines, *([hint] if hint else [])])


def carry_optimizer(optimizer: Any, folder: str | Path, was: str | None = None) -> None:
    """
    Loads the moments that a checkpoint holds into a new optimizer, bit by bit. Rates and other settings of its groups
    stay as they are; what optimizers count in their groups comes along. Where the weights once were (the anchors of
    Reptile, of L2 to the start), with the steps since, does not: a stage begins where it begins.

    Args:
        optimizer (`torch.optim.Optimizer`): of parameters with the same shapes in the same groups.
        folder (`str` or `Path`): the checkpoint.
        was (`str`, *optional*): the class of the optimizer that was saved.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: it is of another class or of other parameters.

    Example:

    >>> import tempfile
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> old, new = torch.optim.AdamW([weight], lr=1e-1), torch.optim.AdamW([weight], lr=1e-3)
    >>> weight.sum().backward(); old.step()
    >>> folder = tempfile.mkdtemp()
    >>> torch.save(old.state_dict(), f"{folder}/optimizer.pt")
    >>> carry_optimizer(new, folder)
    >>> torch.equal(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"]), new.param_groups[0]["lr"]
    (True, 0.001)
    """

    def refused(why: str) -> CheckpointError:
        return CheckpointError(
            f"the optimizer state of {folder} cannot be carried over: {why}. Train with the optimizer of that "
            "checkpoint. Leave 'optimizer' out of carry to begin with fresh moments (continue_from; a branch of "
            "anneal needs the old ones)"
        )

    now = type(bare(optimizer)).__name__
    if was is not None and was != now:
        raise refused(f"it is that of {was}, and this stage trains with {now}")
    with reading(folder, "optimizer.pt"):
        saved = torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True)
        theirs = [list(group["params"]) for group in saved["param_groups"]]
    ours = [list(group["params"]) for group in optimizer.param_groups]
    if [len(group) for group in ours] != [len(group) for group in theirs]:
        raise refused(
            f"its groups have {[len(group) for group in theirs]} parameters, those of this stage "
            f"{[len(group) for group in ours]}"
        )
    for number, param in zip(chain.from_iterable(theirs), chain.from_iterable(ours), strict=True):
        # Others keep moments in shapes of their own, and look at them as they load.
        for key, value in saved["state"].get(number, {}).items() if _is_torchs(optimizer) else ():
            if key in _OF_PARAMETER and isinstance(value, torch.Tensor) and value.shape != param.shape:
                raise refused(
                    f"{key} of parameter {number} has the shape {tuple(value.shape)}, and the parameter "
                    f"{tuple(param.shape)}"
                )
    left = {key for kind in (L2Init, Reptile) for key in (kind.anchor_key, *kind.numbers)}
    state = {number: {k: v for k, v in held.items() if k not in left} for number, held in saved["state"].items()}
    settings = {*optimizer.defaults, "lr", "initial_lr", "params", *left}
    fresh = optimizer.state_dict()["param_groups"]
    groups = [
        {**mine, **{k: v for k, v in old.items() if k not in settings}, "params": old["params"]}
        for mine, old in zip(fresh, saved["param_groups"], strict=True)
    ]
    try:
        optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise refused(reason(error, 300)) from error


def _is_torchs(optimizer: Any) -> bool:
    """Whether it is one of `torch.optim`, wrapped or not."""
    return type(bare(optimizer)).__module__.startswith("torch.optim")
