"""One rank of a new stage: `torchrun ... continuing_worker.py BASE ROWS FOLDER OUTPUT WHERE`.

Continues from the checkpoint BASE on 2 ranks, replaying what the stage before read from its files in ROWS, and writes
what this rank was told and ended with to OUTPUT-rank.pt; of a refusal, its text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import load_from_disk

from hf_pretrain_ext import continue_from, extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback

INFINITE = {"schedule": "infinite_cosine", "warmup": 1, "cooldown": 1, "constant": 10, "total_steps": 20}


def rows(folder: Path) -> Any:
    if not folder.is_dir():
        tiny.rows(40).save_to_disk(folder)
    return load_from_disk(folder)


def first(folder: Path, rows_folder: Path, **settings: Any) -> Any:
    """The stage before, in one process."""
    trainer = extend(
        tiny.trainer(
            folder,
            RewarmCallback(1e-2, **INFINITE),
            ForgettingCallback({"old": tiny.rows(8, seed=77)}),
            data=rows(rows_folder),
            **{"max_steps": 4, "save_strategy": "steps", "save_steps": 4, **settings},
        )
    )
    trainer.train()
    return trainer


def stage(base: str, folder: Path, carry: tuple[str, ...] = ("weights",), **settings: Any) -> dict[str, Any]:
    trainer = tiny.trainer(
        folder,
        RewarmCallback(1e-2, **INFINITE),
        ReplayCallback(from_history=True, ratio=0.25),
        ForgettingCallback({"old": tiny.rows(8, seed=77)}),
        data=tiny.rows(40, seed=8),
        **{"max_steps": 4, **settings},
    )
    try:
        continue_from(trainer, base, carry, name="second").train()
    except ValueError as error:
        return {"refused": str(error)}
    run = trainer.plugin_run
    return {
        "weights": {n: getattr(w, "full_tensor", lambda w=w: w)() for n, w in tiny.weights(trainer).items()},
        "counts": run.realised(),
        "earlier": [each.name for each in run.beginning.history],
        "log": [line for line in tiny.history(trainer) if "learning_rate" in line or "backward_transfer" in line],
        "world": run.ranks[1],
    }


if __name__ == "__main__":
    base, _, folder, output, where = sys.argv[1:]
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    if where.startswith("fsdp2"):
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        tiny.arguments(folder, ddp_backend="gloo").device  # noqa: B018  # starts the process group
        model = LlamaForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(fsdp_size=2))
        settings |= {"model": model, "save_only_model": True, "carry": () if where == "fsdp2" else ("weights",)}
    found = stage(base, Path(folder), **settings)
    torch.save(found, f"{output}-{torch.distributed.get_rank()}.pt")
