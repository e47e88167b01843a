"""Two ranks of DDP or FSDP2 over a model with meta-attention; each writes the gradients that it ends up with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from meta_attention_reference import META, build, ids


def run(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model: Any = build("Llama").train()
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        tiny.checkpoint_activations(model)
        mesh = init_device_mesh("cpu", (2,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    tokens = ids() if rank == 0 else torch.full((2, 14), 7)
    positions = torch.tensor([[3, 7, 9], [7, 9, -1]]) if rank == 0 else torch.full((2, 3), -1)
    labels = tokens.masked_fill(tokens == META, -100)
    owners = torch.where(positions < 0, -1, 0)
    model(
        input_ids=tokens, labels=labels, meta_positions=positions, meta_documents=owners, use_cache=False
    ).loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    torch.save(whole, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(run, args=(sys.argv[1], sys.argv[2]), nprocs=2)
