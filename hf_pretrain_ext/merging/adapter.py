"""The matrices that a LoRA adapter stands for, one at a time: no model is built, and none merged."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.merging.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    MergeError,
    SafetensorsFile,
    read_json,
)
from hf_pretrain_ext.values import reason, shown

__all__ = ["Adapter", "is_adapter"]

_PREFIX = "base_model.model."
# Initialisations that leave the base's weights as they are; the others subtract from them what the factors begin with.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# What changes the arithmetic of W + (alpha / r) B A, as far as the config says it.
_FOREIGN = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


class Adapter:
    """A folder that PEFT saved a LoRA or DoRA adapter in.

    Attributes:
        modules (`list[str]`): Names, in the base model, of the linear layers that it changes.
        skipped (`dict[str, str]`): Other tensors in it, with the reason why they are left out.
    """

    def __init__(self, folder: Path, name: str):
        from peft import PeftConfig

        self.name, self.folder = name, folder
        kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
        if kind != "LORA":
            raise MergeError(f"{name} is an adapter of type {shown(kind)}; only LORA (with DoRA) can be looked at")
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise MergeError(
                f"{name} has no {ADAPTER_WEIGHTS}: save it with safe_serialization (pickles are not read)"
            )
        try:
            self.config: Any = PeftConfig.from_pretrained(str(folder))
        except (TypeError, ValueError) as error:
            raise MergeError(f"{folder / ADAPTER_CONFIG} cannot be read by PEFT: {reason(error)}") from error
        foreign = [key for key in _FOREIGN if getattr(self.config, key, None)]
        if self.config.init_lora_weights not in _PLAIN_STARTS:
            foreign.append(f"init_lora_weights={self.config.init_lora_weights!r}")
        if foreign:
            raise MergeError(
                f"{name} uses {', '.join(foreign)}, with which W + (alpha / r) B A is not what its layers compute: "
                "merge it with PEFT (merge_and_unload, save_pretrained) and give that folder"
            )
        self.file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
        self.modules: list[str] = []
        self.skipped: dict[str, str] = {}
        for key in self.file.specs:
            module, part = key.removeprefix(_PREFIX), key.rpartition(".lora_")[2]
            if part == "A.weight" and len(self.file.specs[key].shape) == 2:
                self.modules.append(module.removesuffix(".lora_A.weight"))
            elif "lora_embedding_" in key:
                self.skipped[module] = "an embedding"
            elif "lora_" not in key:
                self.skipped[module] = "trained whole (modules_to_save): compare the merged checkpoint"
            elif part.startswith(("A.", "B.")) and len(self.file.specs[key].shape) > 2:
                self.skipped[module] = "a convolution"
        if not self.modules:
            raise MergeError(f"{name} changes no linear layer")

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores these weights as (in, out), as GPT-2 does."""
        return bool(self.config.fan_in_fan_out)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / √r for rsLoRA, with the alpha that `alpha_pattern` gives this module."""
        patterns: dict[str, float] = self.config.alpha_pattern or {}
        # As PEFT matches them: the first that the name ends with, as a regular expression.
        named = [alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", module)]
        alpha = float([*named, self.config.lora_alpha][0])
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def tuned(self, module: str, base: Tensor) -> Tensor:
        """The weight (out, in) of `module` with the adapter merged in, from its weight in the base."""
        first, second = (self._read(f"{module}.lora_{part}.weight") for part in "AB")
        shape = (second.shape[0], first.shape[1])
        if tuple(base.shape) != shape or first.shape[0] != second.shape[1]:
            raise MergeError(
                f"{self.name}: {module} is for a weight of shape {list(shape)}, and the base has {list(base.shape)}"
            )
        merged = base + self.scaling(module, first.shape[0]) * (second.to(base.dtype) @ first.to(base.dtype))
        if self.config.use_dora:
            magnitude = self._read(f"{module}.lora_magnitude_vector").to(base.dtype)
            merged *= (magnitude / merged.norm(dim=1))[:, None]
        return merged

    def _read(self, module: str) -> Tensor:
        for key in (_PREFIX + module, f"{_PREFIX}{module}.weight"):
            if key in self.file.specs:
                return self.file.read(key).reshape(self.file.specs[key].shape)
        raise MergeError(f"{self.name} lacks {_PREFIX}{module}")

    def names_in(self, base: Checkpoint) -> dict[str, str]:
        """By module, the name of its weight in the base's files, which may lack, or have, a prefix more."""
        names, missing = {}, []
        for module in self.modules:
            key = f"{module}.weight"
            found = [key] if key in base.specs else _ends_alike(key, list(base.specs))
            if len(found) == 1:
                names[module] = found[0]
            else:
                missing.append(module)
        if missing:
            raise MergeError(
                f"{self.name} changes modules that base={base.source} has no weights of: {', '.join(missing[:5])} "
                f"({len(missing)} in all); is it the adapter's base (its config names "
                f"{shown(self.config.base_model_name_or_path)})?"
            )
        return names

    def close(self) -> None:
        self.file.close()


def _ends_alike(key: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(f".{key}") or key.endswith(f".{name}")]


def oriented(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A stored weight as (out, in), in float32 (float64 stays)."""
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return (weight.T if fan_in_fan_out else weight).to(wide)
