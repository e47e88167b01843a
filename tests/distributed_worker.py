"""One rank of a distributed run: `torchrun ... distributed_worker.py FOLDER OUTPUT WHERE [SETTINGS]`.

Trains under WHERE (one of `WHERE`) with plug-ins, saves at step 3, and writes what this rank saw and ended with to
OUTPUT-rank.pt. SETTINGS is JSON: the arguments of `run`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import settings
import tiny
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_pretrain_ext import extend

WHERE = ("ddp", "fsdp2", "zero2", "zero3")


class Watch(TrainerCallback):
    """The rows of each step on this rank, read off the model's inputs."""

    def __init__(self) -> None:
        self.steps: dict[int, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, inputs: Any, named: Any) -> None:
            if module.training:
                earlier = [self.steps[state.global_step]] if state.global_step in self.steps else []
                self.steps[state.global_step] = torch.cat([*earlier, named["input_ids"]])

        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True)


class SavesInsideAStep(TrainerCallback):
    """What the host does on SIGTERM: a checkpoint before the update of the step after `at`, and the end."""

    def __init__(self, at: int):
        self.at, self.trainer = at, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings; what is `auto` is the Trainer's to fill in."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(names, "auto"),
    }


def arguments(where: str, folder: Path) -> dict[str, Any]:
    """What a Trainer needs to train under `where`."""
    if "WORLD_SIZE" not in os.environ:
        return {}
    if where.startswith("zero"):
        return {"deepspeed": zero(int(where[-1]))}
    if where == "fsdp2":
        return {"model": sharded(folder), "save_only_model": True, "ddp_backend": "gloo"}
    return {"ddp_backend": "gloo"}


def sharded(folder: Path) -> Any:
    """The tiny model, sharded while it is loaded: the only FSDP2 that the host gives a CPU."""
    from transformers.distributed import DistributedConfig

    tiny.arguments(folder, ddp_backend="gloo").device  # noqa: B018  # starts the process group
    source = folder.parent / f"{folder.name}-model"
    tiny.model().save_pretrained(source)  # on one rank
    torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))


def sft_trainer(args: Any, **given: Any) -> Any:
    """TRL's, with the settings of a Trainer, on rows without labels."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**{**args.to_dict(), tiny.CHECKPOINTING: False})
    given["train_dataset"] = given["train_dataset"].select_columns(["input_ids"])
    return SFTTrainer(args=args, **given)


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights, whatever rank holds which part of them."""
    if not trainer.is_deepspeed_enabled:
        return {name: getattr(w, "full_tensor", lambda w=w: w)() for name, w in tiny.weights(trainer).items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def run(
    folder: Path,
    where: str = "ddp",
    *,
    plugins: tuple[str, ...] = settings.TOGETHER,
    resume_from: str | None = None,
    save_inside: int | None = None,
    streamed: bool = False,
    sft: bool = False,
    **changed: Any,
) -> tuple[Trainer, dict[str, Any]]:
    """Trains; `changed` are TrainingArguments, `streamed` makes the training data a stream, `sft` is for TRL."""
    watch = Watch()
    inside = [SavesInsideAStep(save_inside)] if save_inside is not None else []
    given = settings.trainer_for(tuple(plugins))
    for module in given["model"].modules() if "model" in given else ():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # its masks follow the ranks
    trainer = extend(
        tiny.trainer(
            folder,
            *settings.make(tuple(plugins)),
            watch,
            *inside,
            **{"data": tiny.rows(40).to_iterable_dataset(num_shards=4)} if streamed else {},
            **{
                **given,
                **({"cls": sft_trainer, "data_collator": None} if sft else {}),
                "per_device_train_batch_size": 4 if "WORLD_SIZE" in os.environ else 8,
                "max_steps": 6,
                "save_strategy": "steps",
                "save_steps": 3,
                **arguments(where, folder),
                **changed,
            },
        )
    )
    for callback in inside:
        callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resume_from)
    states = {plugin.name: plugin.state() for plugin in trainer.plugin_run.plugins}
    content = {
        "rows": watch.steps,
        "weights": whole(trainer),
        "counts": trainer.plugin_run.realised(),
        "losses": states["forgetting"]["sets"]["old"]["losses"] if "forgetting" in states else [],
        "log": [line for line in tiny.history(trainer) if "loss" in line],
        "world": trainer.args.world_size,
        "step": trainer.state.global_step,
    }
    return trainer, content


if __name__ == "__main__":
    folder, output, where = sys.argv[1:4]
    trainer, content = run(Path(folder), where, **json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
    torch.save(content, f"{output}-{trainer.args.process_index}.pt")
    torch.distributed.barrier()  # a rank that aborts at its exit takes the others with it
    torch.distributed.destroy_process_group()
