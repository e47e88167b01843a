"""Self-distillation: stay near what a frozen model says about the new rows, for when no old data can be had."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext import _host
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.regularise import (
    feature_distance,
    frozen_copy,
    kl_to_teacher,
    scored_positions,
    trained_beside_adapter,
    weights_digest,
    without_adapter,
)
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import check_flag, is_number, reason, shown

__all__ = ["SelfDistillationCallback"]

MATCHES = ("kl", "features")
NOT_INPUTS = ("labels", "shift_labels", "num_items_in_batch")
_SHARDED = "the teacher would need its weights gathered for every forward pass"


class SelfDistillationCallback(TrainerPlugin):
    """Adds to the loss how far the model has gone from a frozen teacher on the rows of the batch; needs no old data.

        loss = loss of the language model + weight · D

    With `match="kl"`, D is KL(teacher ‖ model) of the next-token distributions; with `"features"`, the squared
    distance of the last hidden states, summed over their size. Both are means over the tokens that bear a loss, as
    the language model's own loss is, over accumulated batches and ranks.

    The teacher is a copy of the model as the run begins, unless one is given. With a PEFT adapter it is the base with
    the adapter off, and no copy is made unless something beside the adapter is trained. It is no part of the model:
    checkpoints do not hold it, and a resume needs the model that the run began with, which is compared.

    Lee et al. (2023) give the further-trained model as teacher and train the original again: that is `teacher=` a
    model already trained on this data, `match="features"`, and the original model in the Trainer. Theirs are encoders,
    and match one vector a text; every token's is our choice for causal models.

    Args:
        weight (`float`, *optional*, defaults to `1.0`): of D (Lee et al., for their feature distance).
        match (`str`, *optional*, defaults to `"kl"`): `"kl"` or `"features"`. (Ours.)
        teacher (model or `str`, *optional*): a model of the same kind and vocabulary, or the folder or name of one.
            Defaults to the model as the run begins.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept a weight of 0.

    Raises:
        `ValueError`: at construction, settings out of range; on a resume, another teacher.
        [`PluginError`]: at `extend`, for a model or teacher that does not fit.

    Example:

    ```python
    extend(trainer, SelfDistillationCallback(weight=1.0)).train()
    ```
    """

    name = "self_distillation"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": f"refused: {_SHARDED}",
        "zero2": "exact",
        "zero3": f"refused: {_SHARDED}",
    }
    # The copy is of the model with the tokens and adapters that they give it.
    after = ("gradnormlorp", "meta_tokens", "metadata")

    def __init__(
        self,
        weight: float = 1.0,
        *,
        match: str = "kl",
        teacher: Any = None,
        allow_no_effect: bool = False,
    ):
        if not is_number(weight) or weight < 0:
            raise ValueError(f"weight must be a number from 0 on, such as 1.0, got {shown(weight)}")
        if match not in MATCHES:
            raise ValueError(f"match must be one of {MATCHES}, got {shown(match)}")
        named = isinstance(teacher, str | os.PathLike) and os.fspath(teacher)
        if not (teacher is None or named or isinstance(teacher, torch.nn.Module)):
            raise ValueError(f"teacher must be a model, or the folder or name of one, got {shown(teacher)}")
        self.weight, self.match, self.teacher = float(weight), match, teacher
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        self._model: Any = None
        self._digest: str | None = None
        self._takes_cache = False
        self._left_out: tuple[str, ...] = NOT_INPUTS
        self._sums: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight, "match": self.match}

    # Checks

    def check(self, setup: Setup) -> Iterable[Problem]:
        if self.weight == 0 and not self.allow_no_effect:
            yield Problem(self.name, "would change nothing with weight=0", "Raise it, or pass allow_no_effect=True.")
        if setup.args.n_gpu > 1:
            yield Problem(
                self.name,
                f"{setup.args.n_gpu} GPUs in one process split a batch, and the distance would weigh too much beside "
                "the mean of their losses",
                "Start one process a GPU, with torchrun, or show this one a single GPU.",
            )
        if _host.sharding(setup.trainer) in ("fsdp", "fsdp2", "zero3"):
            yield Problem(self.name, _SHARDED, "Train without it, or with DDP or ZeRO-2.")
        if getattr(setup.args, "use_liger_kernel", False) and self.match == "kl":
            yield Problem(
                self.name,
                "use_liger_kernel=True computes the loss without logits, which match='kl' needs",
                "Pass match='features', or leave the kernel out.",
            )
        if isinstance(self.teacher, torch.nn.Module):
            yield from self._check_teacher(setup, self.teacher)

    def _check_teacher(self, setup: Setup, teacher: Any) -> Iterable[Problem]:
        if teacher is setup.model:
            yield Problem(
                self.name,
                "teacher is the model that is trained, so that it would never differ",
                "Leave it out for a copy of it as the run begins.",
            )
            return
        ours, theirs = setup.outputs, _host.output_vocabulary(teacher)
        if ours is not None and theirs is not None and ours != theirs:
            yield Problem(
                self.name,
                f"the teacher has a vocabulary of {theirs:,}, the model of {ours:,}",
                "Use a teacher of the same vocabulary.",
            )

    # The teacher

    def wrap_model(self, model: Any) -> Any:
        if self.weight == 0:
            return model
        adapted = self.teacher is None and hasattr(model, "disable_adapter")
        beside = trained_beside_adapter(model) if adapted else []
        with rng_guard():
            if adapted and not beside:
                self._model = None
            elif self.teacher is None:
                self._model = frozen_copy(model)
            else:
                self._model = self._given(model)
        if self._model is None:
            self._digest = None
        elif adapted:
            # With the adapter off its weights say nothing; a new one may begin at random.
            below = {name: p for name, p in model.named_parameters() if not p.requires_grad or name in beside}
            self._digest = weights_digest(below)
        else:
            self._digest = weights_digest(self._model)
        return model

    def _given(self, model: Any) -> Any:
        if isinstance(self.teacher, torch.nn.Module):
            return self.teacher.requires_grad_(False).eval()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        try:
            loaded = type(base).from_pretrained(os.fspath(self.teacher), dtype=base.dtype)
        except Exception as error:  # whatever comes up on the way to a model is the finding here
            raise ValueError(
                f"teacher={shown(self.teacher)} cannot be loaded as the model is ({reason(error)})"
            ) from error
        ours, theirs = _host.output_vocabulary(base), _host.output_vocabulary(loaded)
        if ours != theirs:
            raise ValueError(
                f"teacher={shown(self.teacher)} has a vocabulary of {theirs}, the model of {ours}: use a teacher of "
                "the same vocabulary"
            )
        return loaded.requires_grad_(False).eval()

    def state(self) -> dict[str, Any]:
        return {"teacher": self._digest}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("teacher") != self._digest:
            what = "the model that the Trainer was built with" if self.teacher is None else "teacher"
            raise ValueError(
                f"{self.name}: {what} is not the one that this run began with, so that the loss would be another. "
                "Build the Trainer anew with the model that the run began with, not with one of its checkpoints, or "
                "pass that model as teacher"
            )

    def begin(self) -> None:
        self._sums = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.run is None or self.weight == 0:
            return
        # A copy of a model that is spread over devices lies as that does.
        if self._model is not None and not self.run.trainer.accelerator.verify_device_map(self._model):
            self._model.to(self.run.device)
        teacher = self.run.model if self._model is None else self._model
        base = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
        # Those make the decoder's inputs of the labels.
        needs_labels = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        self._left_out = tuple(name for name in NOT_INPUTS if not (needs_labels and name == "labels"))
        self._takes_cache = "use_cache" in inspect.signature(base.forward).parameters

    def _asked(self, inputs: Mapping[str, Any]) -> Any:
        """What the teacher says of a batch."""
        assert self.run is not None
        given = {key: value for key, value in inputs.items() if key not in self._left_out}
        if self._takes_cache:
            given["use_cache"] = False
        if self.match == "features":
            given["output_hidden_states"] = True
        whom = self.run.trainer.accelerator.unwrap_model(self.run.model) if self._model is None else self._model
        adapted = self.teacher is None and hasattr(whom, "disable_adapter")
        asked: AbstractContextManager[Any] = without_adapter(whom) if adapted else nullcontext(whom)
        with torch.no_grad(), asked as teacher:
            return teacher(**given)

    # The loss

    def wrap_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        if self.weight == 0:
            return compute_loss

        def with_teacher(
            model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            labels = inputs.get("labels", inputs.get("shift_labels"))
            if not model.training or labels is None:
                return compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
            theirs = self._asked(inputs)
            given = {**inputs, "output_hidden_states": True} if self.match == "features" else dict(inputs)
            loss, ours = compute_loss(model, given, True, num_items_in_batch=num_items_in_batch, **kwargs)
            loss = loss + self.weight * self._distance(ours, theirs, inputs, num_items_in_batch)
            return (loss, ours) if return_outputs else loss

        return with_teacher

    def _distance(self, ours: Any, theirs: Any, inputs: Mapping[str, Any], items: Any) -> Tensor:
        run = self.run
        assert run is not None
        if "shift_labels" in inputs:
            positions = scored_positions(inputs["shift_labels"], shifted=False)
        else:
            positions = scored_positions(inputs["labels"], shifted=run.shifts_labels)
        pair = self._of(ours), self._of(theirs)
        if pair[0].shape != pair[1].shape or pair[0].shape[:2] != positions.shape:
            raise ValueError(
                f"{self.name}: the model gives {tuple(pair[0].shape)}, the teacher {tuple(pair[1].shape)} for labels "
                f"of {tuple(positions.shape)}. They must agree: use a teacher of the same kind"
            )
        measure = kl_to_teacher if self.match == "kl" else feature_distance
        summed = measure(*pair, positions.to(pair[0].device))
        counted = positions.sum()
        seen = torch.stack([summed.detach().double(), counted.to(summed.device).double()])
        self._sums = seen if self._sums is None else self._sums + seen
        if items is None:
            return summed / counted.clamp_min(1)
        # As the host does it with the loss: items are those of all ranks, whose gradients are averaged.
        args, trainer = run.trainer.args, run.trainer
        whole = args.average_tokens_across_devices and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
        # A step without one label has a distance of 0, and not 0/0.
        items = items.clamp_min(1) if isinstance(items, Tensor) else max(items, 1)
        return summed / items * (run.ranks[1] if whole else 1)

    def _of(self, outputs: Any) -> Tensor:
        if self.match == "features":
            states = getattr(outputs, "hidden_states", None) or getattr(outputs, "decoder_hidden_states", None)
            if states:
                found: Tensor = states[-1]
                return found
            raise ValueError(f"{self.name}: the model gives no hidden states; use match='kl'")
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 3:
            return logits
        raise ValueError(f"{self.name}: the model gives no logits with this loss; use match='features'")

    # What is said

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sums = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is None or not control.should_log or self.weight == 0:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=self.run.device) if self._sums is None else self._sums
        summed, counted = self.run.sum_over_ranks(sums).tolist()
        self.run.log({f"distillation_{self.match}": summed / max(counted, 1)})

    def describe(self) -> list[str]:
        if self.run is None or self.weight == 0:
            return []
        if self._model is None:
            who = "the model without its adapter, no copy"
        else:
            size = sum(p.numel() * p.element_size() for p in self._model.parameters())
            who = f"{'a copy of the model' if self.teacher is None else 'a model given'} of {size / 1e6:.2f} MB"
            if self.teacher is None and hasattr(self._model, "disable_adapter"):
                who += " with its adapter off"
        return [f"self_distillation: weight {self.weight:g} on {self.match}; the teacher is {who}"]
