"""How long a run is, in optimizer steps, before the host has said so."""

from __future__ import annotations

import math
from typing import Any

from hf_pretrain_ext.plan.plan import MAX_WINDOW

__all__ = ["host_length", "run_length", "window_for"]


def run_length(args: Any, epoch: int, global_batch: int) -> tuple[int, int]:
    """Optimizer steps of an epoch of `epoch` draws of a plan, and of the whole run.

    Epochs are rounded up to whole global batches (down with `dataloader_drop_last`).
    """
    per_epoch = epoch // global_batch if args.dataloader_drop_last else -(-epoch // global_batch)
    return _with_epochs(args, per_epoch)


def host_length(args: Any, samples: int, batch_size: int, global_batch: int) -> tuple[int, int]:
    """The same for `samples` rows without a plan, as the host counts them: rounded per rank and micro-batch."""
    ranks = global_batch // (batch_size * args.gradient_accumulation_steps)
    if args.dataloader_drop_last:
        per_rank = samples // batch_size // ranks
    else:
        per_rank = -(-samples // (batch_size * ranks))
    return _with_epochs(args, -(-per_rank // args.gradient_accumulation_steps))


def _with_epochs(args: Any, per_epoch: int) -> tuple[int, int]:
    per_epoch = max(per_epoch, 1)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return per_epoch, int(total)


def window_for(global_batch: int) -> int:
    """The global batch, or its largest divisor that a plan's windows can be."""
    parts = -(-global_batch // MAX_WINDOW)
    while global_batch % parts:
        parts += 1
    return global_batch // parts
