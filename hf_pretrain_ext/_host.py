"""The private parts of transformers and TRL that the package leans on, in one place.

Each is here because no public one does the job; `tests/test_host.py` fails when upstream renames or reshapes one.

Overridden in `PluginTrainerMixin`:
    Trainer._maybe_log_save_evaluate   the only moment after the host's log line and before its save
    Trainer._save_checkpoint           the SIGTERM checkpoint calls it directly; `on_save` comes after push and pruning
    Trainer._save                      pickles the arguments, a Hub token among them, beside weights that are pushed
    Trainer._get_grad_norm             the norm of a step's gradients, which the host computes anyway
    Trainer._hp_search_setup           the moment in train() at which the arguments, a search's included, are settled
    Trainer._load_from_checkpoint      weights whose names in the file are not the model's are left out, with a warning
    Trainer._load_best_model           likewise
    Trainer._load_optimizer_and_scheduler   files that cannot be loaded are named, with what to do
    Trainer._load_rng_state            the random state of a resume is in place, and the next draw belongs to training
    Trainer._save_rng_state            the last file that every rank writes: the barrier before the manifest goes here
Called or read here:
    Trainer._remove_unused_columns, Trainer._get_collator_with_removed_columns   what the host does to its own dataset
    Trainer._loss_shifts_labels        whether labels are shifted inside the model
    Trainer._created_lr_scheduler      that the scheduler is the Trainer's own, to be rebuilt by a second train()
    Trainer._globalstep_last_logged    whether a log line is due
    Trainer._tr_loss                   the losses summed since the last log line, which the host does not save
    Trainer._get_output_dir            where a checkpoint goes, during a hyper-parameter search too
    Trainer._eval_dataloaders          those that are kept for the next evaluation
    Trainer._train_batch_size          samples a rank and micro-batch, DataParallel included
    SFTTrainer._prepare_dataset, ._formatting_func, ._skip_prepare_dataset       how TRL prepares a dataset
Of torch and datasets (`tests/test_streams.py`):
    _iterator of torch's DataLoader              holds the workers that outlive an epoch
    _worker_info of torch's data workers         streams split themselves by it, and the plan needs each of them whole
    _distributed of datasets.IterableDataset     whether a stream was split over ranks before we saw it
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "PRIVATE",
    "checkpoint_folder",
    "claim_scheduler",
    "embeddings",
    "end_workers",
    "has_own_scheduler",
    "log_is_due",
    "log_sums",
    "optimizer_name",
    "output_vocabulary",
    "positions",
    "prepare_dataset",
    "restore_log_sums",
    "sharding",
    "shifts_labels",
    "strip_columns",
    "split_over_ranks",
    "train_batch_size",
    "updates_in_backward",
    "whole_stream",
]

_POSITIONS = re.compile("wpe|embed_positions|position_embedding|pos_emb")

PRIVATE = {
    "Trainer": (
        "_get_grad_norm",
        "_hp_search_setup",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_maybe_log_save_evaluate",
        "_save_checkpoint",
        "_save",
        "_save_rng_state",
        "_remove_unused_columns",
        "_get_collator_with_removed_columns",
        "_get_output_dir",
    ),
    "SFTTrainer": ("_prepare_dataset",),
}


def strip_columns(
    trainer: Any, datasets: list[Any], collator: Callable[[list[Any]], Any]
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Datasets and collator without the columns that the model's forward does not name, as the host does it."""
    import datasets as hf_datasets

    stripped, others = [], False
    for dataset in datasets:
        if isinstance(dataset, hf_datasets.Dataset):
            stripped.append(trainer._remove_unused_columns(dataset, description="training"))
        else:
            stripped.append(dataset)
            others = True
    if others:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    return stripped, collator


def shifts_labels(trainer: Any) -> bool:
    return bool(trainer._loss_shifts_labels)


def sharding(trainer: Any) -> str:
    """What ranks share: `"ddp"` (nothing), `"zero0"` to `"zero3"`, `"fsdp2"`, or `"fsdp"` for accelerate's FSDP."""
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    if trainer.is_fsdp_enabled:
        return "fsdp"
    return "fsdp2" if getattr(trainer, "is_distributed_loading_by_transformers", False) else "ddp"


def splits_batches_or_layers(trainer: Any) -> bool:
    """Whether several ranks work on the same rows: tensor, context or sequence parallelism."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return trainer.get_tp_size() > 1 or (config is not None and config.non_data_parallel_size > 1)


def deepspeed_owns(trainer: Any, part: str) -> bool:
    """Whether the `"optimizer"` or the `"scheduler"` is made by DeepSpeed, from its own settings."""
    return trainer.is_deepspeed_enabled and part in trainer.accelerator.state.deepspeed_plugin.deepspeed_config


def optimizer_name(args: Any) -> str:
    """`optim` as users write it."""
    return str(getattr(args.optim, "value", args.optim))


def updates_in_backward(args: Any) -> bool:
    """Whether the optimizer that the host makes of `optim` updates the weights in the backward pass."""
    name = optimizer_name(args)
    return name.endswith("_layerwise") or name in ("lomo", "adalomo")


def has_own_scheduler(trainer: Any) -> bool:
    """Whether the user gave the Trainer a scheduler object."""
    return trainer.lr_scheduler is not None and not trainer._created_lr_scheduler


def claim_scheduler(trainer: Any) -> None:
    """Marks the scheduler as made by the Trainer, so that the next `train()` makes a new one."""
    trainer._created_lr_scheduler = True


def log_is_due(trainer: Any) -> bool:
    return bool(trainer.control.should_log and trainer.state.global_step > trainer._globalstep_last_logged)


def log_sums(trainer: Any) -> dict[str, Any]:
    """The losses summed since the last log line, a tensor, and its step: what the next line will be made of."""
    return {"loss": trainer._tr_loss.clone(), "last_logged": trainer._globalstep_last_logged}


def restore_log_sums(trainer: Any, sums: dict[str, Any]) -> None:
    trainer._tr_loss += float(sums["loss"])
    trainer._globalstep_last_logged = int(sums["last_logged"])


def end_workers(trainer: Any) -> None:
    """Ends workers that outlive their epoch (`dataloader_persistent_workers`); whoever iterates again gets new ones.

    An extended trainer is freed by the garbage collector, which takes a loader's pipes from under it: each worker
    would then be waited for in vain, for five seconds.
    """
    for shard in [trainer.callback_handler.train_dataloader, *getattr(trainer, "_eval_dataloaders", {}).values()]:
        for loader in (shard, getattr(shard, "base_dataloader", None)):  # accelerate's, and what it iterates
            if loader is not None and getattr(loader, "_iterator", None) is not None:
                loader._iterator = None


def checkpoint_folder(trainer: Any, trial: Any) -> str:
    """The folder of the checkpoint that would be written now."""
    return os.path.join(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")


def train_batch_size(trainer: Any) -> int:
    return int(trainer._train_batch_size)


def prepare_dataset(trainer: Any, dataset: Any, name: str, training: bool) -> Any:
    """`dataset` as the trainer prepares its own: TRL tokenizes, truncates and packs; a plain Trainer does nothing."""
    import datasets as hf_datasets

    trl = sys.modules.get("trl")
    if trl is None or not isinstance(trainer, trl.SFTTrainer) or trainer._skip_prepare_dataset:
        return dataset
    if not isinstance(dataset, hf_datasets.Dataset | hf_datasets.IterableDataset):
        return dataset
    args = trainer.args
    packing = args.packing if training or args.eval_packing is None else args.eval_packing
    return trainer._prepare_dataset(dataset, trainer.processing_class, args, packing, trainer._formatting_func, name)


def embeddings(model: Any) -> int | None:
    """Rows of the model's input embedding: token ids must lie below."""
    table = _end(model, "get_input_embeddings")
    if table is None:
        return None
    number = getattr(table, "num_embeddings", None)
    return int(number) if number else getattr(getattr(model, "config", None), "vocab_size", None)


def output_vocabulary(model: Any) -> int | None:
    """The number of classes that a language model's loss chooses among: labels must lie below."""
    return getattr(_end(model, "get_output_embeddings"), "out_features", None) or embeddings(model)


def _end(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        # Modules of the user's own have no such method; transformers' without embeddings raise in it.
        return None


def positions(model: Any) -> tuple[int | None, bool]:
    """The positions that a model was made for, and whether it has a table of them: then there are no others."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None, False
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and _POSITIONS.search(name.rpartition(".")[2]):
            # Some tables begin with rows for padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            if module.num_embeddings >= limit:
                return min(limit, module.num_embeddings - first), True
    return limit, False


@contextmanager
def whole_stream() -> Iterator[None]:
    """Inside, a stream does not see that it is read by a worker, so it does not keep to that worker's part."""
    from torch.utils.data._utils import worker

    kept = worker._worker_info
    worker._worker_info = None
    try:
        yield
    finally:
        worker._worker_info = kept


def split_over_ranks(stream: Any) -> bool:
    """Whether `split_dataset_by_node` was applied to a stream: then no rank sees all of it."""
    return getattr(stream, "_distributed", None) is not None
