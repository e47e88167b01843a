"""What makes a run the run it is, and what is said when a resume would be another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_pretrain_ext import checkpoint
from hf_pretrain_ext.schedules import LRSchedule

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["compare", "compared_arguments"]

# What may differ between a run and its resume, because it does not change what is trained on or how: where files go,
# what is logged, evaluated and saved, workers, and the split of one global batch over ranks and micro-batches.
_FREE_PREFIXES = ("logging_", "log_", "eval_", "save_", "dataloader_", "hub_", "push_to_hub", "ddp_", "do_", "report_")
_FREE_ARGUMENTS = frozenset(
    "batch_eval_metrics bf16_full_eval dataset_num_proc debug disable_tqdm enable_jit_checkpoint fp16_full_eval "
    "gradient_accumulation_steps greater_is_better include_for_metrics "
    "include_num_input_tokens_seen load_best_model_at_end local_rank metric_for_best_model output_dir "
    "per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project "
    "restore_callback_states_from_checkpoint resume_from_checkpoint run_name skip_memory_metrics "
    "torch_empty_cache_steps trackio_space_id trackio_bucket_id trackio_static_space_id".split()
)


def compared_arguments(args: TrainingArguments, has_plan: bool) -> dict[str, Any]:
    """The training arguments that a resume must find unchanged."""
    arguments = {
        key: value
        for key, value in args.to_dict().items()
        if key == "dataloader_drop_last" or not (key in _FREE_ARGUMENTS or key.startswith(_FREE_PREFIXES))
    }
    if has_plan:
        # The plan goes on at the right sample with or without the host's skipping.
        arguments.pop("ignore_data_skip")
    return arguments


def compare(folder: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to resume the run `saved` in `folder` as the run `now`, listing the differences.

    Arguments that only one version of transformers knows are left out.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: the two differ.
    """
    known = saved["arguments"].keys() & now["arguments"].keys()
    # Checkpoints of before there was `sharding` were whole, those of before there was `stage` were told of none.
    sides = [
        {"sharding": None, "stage": None, **side, "arguments": {key: side["arguments"][key] for key in known}}
        for side in (saved, now)
    ]
    if not now["total_steps"]:
        for side in sides:
            side.update(total_steps=None, schedule=None)
    changed = checkpoint.differences(sides[0], sides[1])
    if not changed:
        return
    lines = [f"cannot resume from {folder}: the run would not be the one that was interrupted. Changed:"]
    lines += [f"  {line}" for line in changed if not line.startswith("schedule.")]
    if sides[0]["schedule"] != sides[1]["schedule"]:
        for title, side in zip(("learning rate of the checkpoint:", "learning rate now:"), sides, strict=True):
            schedule = side["schedule"]
            rates = LRSchedule.from_identity(schedule).describe() if schedule else ["the host's own"]
            lines += [title, *(f"  {line}" for line in rates)]
    lines.append(
        "Restore these settings to resume. To train further with new ones or on other data, begin a new stage, with a "
        f"schedule and a plan of its own: {checkpoint.continue_call(folder)}. Or load the model from that folder and "
        "call train() without resume_from_checkpoint: a new run, which knows of no earlier one."
    )
    raise checkpoint.CheckpointError("\n".join(lines))
