"""One rank of a distributed run: `torchrun ... distributed_worker.py FOLDER OUTPUT BATCH STEPS [CHECKPOINT]`.

Trains all plug-ins together, saves at step 3, and writes what this rank saw and ended with to OUTPUT-rank.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import settings
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import extend


class Watch(TrainerCallback):
    """The rows of each step on this rank, read off the model's inputs."""

    def __init__(self) -> None:
        self.steps: dict[int, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, inputs: Any, named: Any) -> None:
            if module.training:
                self.steps[state.global_step] = named["input_ids"].clone()

        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True)


def run(folder: Path, batch: int, steps: int, resume_from: str | None = None) -> tuple[Trainer, dict[str, Any]]:
    watch = Watch()
    trainer = extend(
        tiny.trainer(
            folder,
            *settings.make(settings.TOGETHER),
            watch,
            per_device_train_batch_size=batch,
            max_steps=steps,
            save_strategy="steps",
            save_steps=3,
            **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
        )
    )
    trainer.train(resume_from_checkpoint=resume_from)
    content = {
        "rows": watch.steps,
        "weights": tiny.weights(trainer),
        "counts": trainer.plugin_run.realised(),
        "losses": trainer.plugin_run.plugins[0].state()["sets"]["old"]["losses"],
        "log": [line for line in tiny.history(trainer) if "loss" in line],
        "world": trainer.args.world_size,
    }
    return trainer, content


if __name__ == "__main__":
    folder, output, batch, steps = sys.argv[1:5]
    trainer, content = run(Path(folder), int(batch), int(steps), sys.argv[5] if len(sys.argv) > 5 else None)
    torch.save(content, f"{output}-{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()
