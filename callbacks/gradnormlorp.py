"""GradNormLoRP: train all weights, or a DoRA adapter, with low-rank projected, 8-bit Adam."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_pretrain_ext.gradnormlorp import GradNormLoRP, Memory, adapter_groups, measured_state, memory_of, param_groups
from hf_pretrain_ext.gradnormlorp.optimizer import settings_of
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import reason

__all__ = ["GradNormLoRPCallback"]

_ADAPTER = (
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "bias",
)
"""Fields of a LoraConfig that make another run of it."""

_WHOLE = "needs whole matrices, and a sharded or flattened one has neither its norms nor its singular vectors"


class GradNormLoRPCallback(TrainerPlugin):
    """Owns the optimizer: [`gradnormlorp.GradNormLoRP`] (after Huang et al., 2024, AAAI-25).

    On a plain model (form A, our variant for pre-training) every chosen linear layer is trained in full, as magnitude
    and direction, its gradient projected to `rank` dimensions; all else gets AdamW in the same bits. On a PEFT DoRA
    adapter (form B, the paper's) the gradients of the factors are projected; checkpoints stay ordinary PEFT ones.
    Learning rate, betas, epsilon and weight decay are those of the TrainingArguments.

    Args:
        rank (`int`): dimensions of the subspace. A quarter of the hidden size is what the GaLore family pre-trains
            with; 4 on GLUE.
        target_modules (`str` or list of `str`, *optional*, defaults to `"all-linear"`): as in `LoraConfig`, of form A.
        adapter (`peft.LoraConfig` or its settings as a `dict`, *optional*): with `use_dora=True`; wraps the model for
            form B. A model that is wrapped already needs none.
        update_proj_gap (`int`, *optional*): steps between two bases; 200 in form A (GaLore), 500 in form B (the
            paper's GLUE setting).
        scale (`float`, *optional*): of the projected step; 0.25 in form A, 4.0 in form B, from the same.
        proj_type, bits, projector_bits, norm, tangential, on_refresh: as of the optimizer; `norm` and `tangential` are
            of form A.
        layerwise (`bool`, *optional*, defaults to `False`): update inside `backward` and free each gradient at once.
            Wants one process, `gradient_accumulation_steps=1` and `max_grad_norm=0` (clip with `max_matrix_norm`).
        max_matrix_norm (`float`, *optional*): clips each parameter's gradient to this norm; of the layer-wise form.

    Raises:
        `ValueError`: at construction, for settings that cannot be; `ImportError` without bitsandbytes.
        [`PluginError`]: at `extend`, for what does not fit this model or run.

    Example:

    >>> from hf_pretrain_ext.callbacks import GradNormLoRPCallback
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(100, 256), nn.Linear(256, 256, bias=False))
    >>> [(group["rank"], group.get("update_proj_gap")) for group in GradNormLoRPCallback(rank=64).groups(model)]
    [(64, 200), (None, None)]
    """

    name = "gradnormlorp"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": f"refused: {_WHOLE}",
        "zero2": f"refused: {_WHOLE}",
        "zero3": f"refused: {_WHOLE}",
    }

    def __init__(
        self,
        rank: int,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        adapter: Any = None,
        update_proj_gap: int | None = None,
        scale: float | None = None,
        proj_type: str = "std",
        bits: int = 8,
        projector_bits: int = 8,
        norm: str | None = "out",
        tangential: bool = False,
        on_refresh: str = "rotate",
        layerwise: bool = False,
        max_matrix_norm: float | None = None,
    ):
        settings_of(
            rank=1 if rank is None else rank,
            update_proj_gap=1 if update_proj_gap is None else update_proj_gap,
            scale=1.0 if scale is None else scale,
            proj_type=proj_type,
            bits=bits,
            projector_bits=projector_bits,
            norm=norm,
            tangential=tangential,
            on_refresh=on_refresh,
        )
        if rank is None:
            raise ValueError("rank must be an integer of at least 1, got None")
        if not isinstance(target_modules, str):
            target_modules = tuple(target_modules)
            if not target_modules or not all(isinstance(name, str) for name in target_modules):
                raise ValueError(
                    f"target_modules must be a string or a list of names of modules, got {list(target_modules)!r}"
                )
        if not isinstance(layerwise, bool):
            raise ValueError(f"layerwise must be True or False, got {layerwise!r}")
        if max_matrix_norm is not None and not layerwise:
            raise ValueError(
                f"max_matrix_norm={max_matrix_norm!r} is of the layer-wise form: pass layerwise=True, or clip with "
                "max_grad_norm of the TrainingArguments"
            )
        if max_matrix_norm is not None and not 0 < max_matrix_norm < float("inf"):
            raise ValueError(f"max_matrix_norm must be positive, or None, got {max_matrix_norm!r}")
        if isinstance(adapter, Mapping):
            from peft import LoraConfig

            try:
                adapter = LoraConfig(**adapter)
            except (TypeError, ValueError) as error:
                raise ValueError(f"adapter={dict(adapter)!r} makes no LoraConfig: {error}") from error
        if adapter is not None and not getattr(adapter, "use_dora", False):
            raise ValueError(
                f"adapter must be a peft.LoraConfig with use_dora=True, got {type(adapter).__name__}"
                + (" without it" if hasattr(adapter, "use_dora") else "")
            )
        self.rank, self.target_modules, self.adapter = rank, target_modules, adapter
        self.update_proj_gap, self.scale = update_proj_gap, scale
        self.shared = {
            "proj_type": proj_type,
            "bits": bits,
            "projector_bits": projector_bits,
            "on_refresh": on_refresh,
        }
        self.norm, self.tangential = norm, tangential
        self.layerwise, self.max_matrix_norm = layerwise, max_matrix_norm
        self.memory: Memory | None = None
        self._optimizer: GradNormLoRP | None = None
        self._measured = False
        self._wrapped: Any = None

    def settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "target_modules": list(self.target_modules)
            if isinstance(self.target_modules, tuple)
            else self.target_modules,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "norm": self.norm,
            "tangential": self.tangential,
            "layerwise": self.layerwise,
            "max_matrix_norm": self.max_matrix_norm,
            "adapter": None
            if self.adapter is None
            else {name: _plain(getattr(self.adapter, name, None)) for name in _ADAPTER},
            **self.shared,
        }

    # What is trained

    def wrap_model(self, model: Any) -> Any:
        if self.adapter is None or _is_adapted(model):
            return model
        from peft import get_peft_model

        # PEFT writes into the configuration which modules it found.
        self._wrapped = get_peft_model(model, copy.deepcopy(self.adapter))
        return self._wrapped

    def groups(self, model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The optimizer's groups for a model; see `gradnormlorp.param_groups`."""
        form_b = _is_adapted(model)
        gap = self.update_proj_gap or (500 if form_b else 200)
        scale = (4.0 if form_b else 0.25) if self.scale is None else self.scale
        projected: dict[str, Any] = {"update_proj_gap": gap, "scale": scale}
        if form_b:
            groups = adapter_groups(model, self.rank, weight_decay, **projected)
        else:
            projected |= {"norm": self.norm, "tangential": self.tangential}
            groups = param_groups(model, self.rank, self.target_modules, weight_decay, **projected)
        return [{**self.shared, **group} for group in groups]

    def optimizer(self, model: Any, args: Any) -> GradNormLoRP:
        self.end()
        groups = self.groups(model, args.weight_decay)
        self.memory = memory_of(model, groups, layerwise=self.layerwise)
        for line in self.memory.lines():
            self._say(f"planned: {line}")
        self._optimizer = GradNormLoRP(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            seed=args.seed,
        )
        return self._optimizer

    # Checks

    def check(self, setup: Setup) -> Iterable[Problem]:
        model = setup.model
        if self.adapter is None and isinstance(model, nn.Module):
            try:
                GradNormLoRP(self.groups(model), lr=1.0)
            except ValueError as error:
                message, _, fix = str(error).rstrip(".").partition(". ")
                yield Problem(self.name, message, f"{fix or 'Change that setting of GradNormLoRPCallback'}.")
        if self.adapter is not None:
            # A second train() finds the model that the first has wrapped.
            if _is_adapted(model) and model is not self._wrapped:
                yield Problem(
                    self.name,
                    "adapter is given, and the model has an adapter already",
                    "Leave adapter out, or pass the model without its adapter.",
                )
            elif self.rank > self.adapter.r:
                yield Problem(
                    self.name,
                    f"rank={self.rank} exceeds the rank of the adapter, r={self.adapter.r}",
                    "Lower rank, or raise r of the LoraConfig.",
                )
            elif isinstance(model, nn.Module) and not _is_adapted(model):
                yield from self._check_adapter(model)
        if (self.adapter is not None or _is_adapted(model)) and self.target_modules != "all-linear":
            yield Problem(
                self.name,
                f"target_modules={self.target_modules!r} is of form A: an adapter trains the modules of its own "
                "configuration",
                "Leave it out, and set target_modules of the LoraConfig.",
            )
        if (self.adapter is not None or _is_adapted(model)) and (self.norm != "out" or self.tangential):
            yield Problem(
                self.name,
                "norm and tangential are of form A: a DoRA adapter normalises by output unit on its own",
                "Leave them out.",
            )
        if setup.args.fp16:
            yield Problem(self.name, "fp16 scales the loss, and with it every norm", "Use bf16, or float32.")
        if self.layerwise:
            yield from self._check_layerwise(setup)

    def _check_adapter(self, model: nn.Module) -> Iterable[Problem]:
        """What PEFT, or the optimizer of its factors, would say when training begins."""
        from peft.tuners.tuners_utils import check_target_module_exists
        from peft.utils.other import get_pattern_key

        config, wanted = self.adapter, self.adapter.target_modules
        if wanted is None:  # PEFT knows by the kind of model
            return
        sizes = {
            name: min(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 2
        }
        if wanted == "all-linear":
            linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
            head = getattr(model, "get_output_embeddings", lambda: None)()
            linear -= {name for name, module in model.named_modules() if module is head}
            sizes = {name: size for name, size in sizes.items() if name in linear}
        else:
            if not any(check_target_module_exists(config, name) for name, _ in model.named_modules() if name):
                yield Problem(
                    self.name,
                    f"adapter has target_modules={_plain(wanted)!r}, which match no module of {type(model).__name__}",
                    f"Name some that it has, such as {sorted({name.rsplit('.', 1)[-1] for name in sizes})}.",
                )
                return
            sizes = {name: size for name, size in sizes.items() if check_target_module_exists(config, name)}
        pattern = config.rank_pattern or {}
        for name, size in sizes.items():
            key = get_pattern_key(list(pattern), name)
            if min(pattern.get(key, config.r), size) < self.rank:
                small = key in pattern and pattern[key] < self.rank
                yield Problem(
                    self.name,
                    f"rank={self.rank} exceeds the "
                    + (
                        f"rank of the adapter at {name}, {pattern[key]} by rank_pattern"
                        if small
                        else f"smaller side of {name}, {size}"
                    ),
                    "Lower rank, or "
                    + (
                        f"raise rank_pattern[{key!r}] of the LoraConfig."
                        if small
                        else "leave that module to exclude_modules of the LoraConfig."
                    ),
                )
                return
        if error := self._refusal(model):
            yield Problem(
                self.name,
                f"PEFT does not put this adapter into a {type(model).__name__}: {reason(error)}",
                "Name target_modules that it can adapt, such as ['q_proj', 'v_proj'].",
            )

    def _refusal(self, model: nn.Module) -> Exception | None:
        """What PEFT itself says, of a copy of the model without weights."""
        from peft import get_peft_model

        with rng_guard(), torch.device("meta"):
            try:
                bare = type(model)(copy.deepcopy(model.config))
            except Exception:  # a class that is not made from its config alone: train() will see
                return None
            adapter = copy.deepcopy(self.adapter)
            adapter.init_lora_weights = True  # others compute with the weights, which are not there
            try:
                get_peft_model(bare, adapter)
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                return error
        return None

    def _check_layerwise(self, setup: Setup) -> Iterable[Problem]:
        args, who = setup.args, f"{self.name}[layerwise]"
        if args.gradient_accumulation_steps > 1:
            yield Problem(
                who,
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} wants gradients kept, and none is",
                "Set it to 1 and raise per_device_train_batch_size, or pass layerwise=False.",
            )
        if args.max_grad_norm:
            yield Problem(
                who,
                f"max_grad_norm={args.max_grad_norm} clips by the norm over all gradients, the first of which are "
                "gone before the last is there",
                "Set max_grad_norm=0, and max_matrix_norm here to clip each matrix by its own.",
            )
        if args.world_size > 1:
            yield Problem(
                who,
                "several processes average their gradients after each is there, when it has been used already",
                "Train in one process, or pass layerwise=False.",
            )
        # Seen when `train` checks again: while `extend` first does, the run is not the trainer's yet.
        watch = getattr(getattr(setup.trainer, "_plugin_run", None), "nonfinite", None)
        if watch is not None and watch.action != "report":
            yield Problem(
                who,
                f"on_nonfinite={watch.action!r} looks at all gradients before any update",
                "Leave it at 'report': a gradient that is not finite counts as zero here.",
            )

    # What is told

    def begin(self) -> None:
        self._measured = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.layerwise and self._optimizer is not None:
            self._optimizer.step_in_backward(self.max_matrix_norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def end(self) -> None:
        # Its hooks would update beside those of a second training, also after one that was interrupted.
        if self._optimizer is not None:
            self._optimizer.step_after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._measured or self._optimizer is None or self.memory is None or self.run is None:
            return
        self._measured = True
        held, planned = measured_state(self._optimizer), self.memory.state
        self._say(f"optimizer state: {held / 1e6:.2f} MB held, {planned / 1e6:.2f} MB planned")
        if abs(held - planned) > 0.01 * planned:
            self.run.say(
                f"{self.name}: the optimizer holds {held:,} bytes where {planned:,} were planned, more than 1 % off: "
                "the plan of the peak is off as well. Please report the model and the settings",
                logging.WARNING,
            )
        self.run.trace("memory", state=held, planned=planned, plan=vars(self.memory), peak=self.memory.peak)

    def _say(self, line: str) -> None:
        if self.run is not None:
            self.run.say(f"{self.name}: {line}")


def _plain(value: Any) -> Any:
    """A field of a LoraConfig as JSON, whatever order it was given in."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted(value)
    return value


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")
