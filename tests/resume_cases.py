"""Cases of exact resume, run in two processes: one makes reference and first leg, a new one resumes and compares.

`python resume_cases.py first FOLDER` trains every case without interruption and once more up to its stop;
`python resume_cases.py second FOLDER` resumes each in the new process, as often as the case says, and writes what it
finds to FOLDER/results.json.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import settings
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import extend


@dataclass(frozen=True)
class Case:
    """Train with `plugins` and `arguments`; stop after each of `stops` optimizer steps and resume."""

    plugins: tuple[str, ...]
    stops: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 40

    @property
    def name(self) -> str:
        given = "-".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{'+'.join(self.plugins)}_stop={'+'.join(map(str, self.stops))}_rows={self.rows}_{given}"


EPOCHS = {"max_steps": -1, "num_train_epochs": 2}

# A pairwise cover: each plug-in and all together; after the first step, mid-epoch, at the epoch's end, twice in a row;
# workers 0 and 2; accumulation 1, 2 and with a remainder; epochs and steps; logging between checkpoints.
CASES = [
    Case(("rewarm",), (1,)),
    Case(("rewarm",), (3,), {"gradient_accumulation_steps": 2}),
    Case(("replay",), (2,), {"dataloader_num_workers": 2}),
    Case(("replay",), (5, 12), EPOCHS),
    Case(("replay-additional",), (10,), {**EPOCHS, "gradient_accumulation_steps": 2}, rows=38),
    Case(("replay-additional",), (4,), {"dataloader_num_workers": 2, "max_steps": 8}),
    Case(("forgetting",), (2, 4)),
    Case(settings.TOGETHER, (1, 2)),
    Case(settings.TOGETHER, (10,), {**EPOCHS, "logging_steps": 4}),
    Case(settings.TOGETHER, (13,), {**EPOCHS, "logging_steps": 4, "gradient_accumulation_steps": 3}, rows=83),
    Case(settings.TOGETHER, (3,), {"bf16": True, "dataloader_num_workers": 2}),
    Case(("replay",), (7,), {**EPOCHS, tiny.CHECKPOINTING: True}, rows=37),
    Case(("replay-mixture", "rewarm"), (2, 12), {**EPOCHS, "dataloader_num_workers": 2}, rows=38),
    Case(("replay-mixture",), (5,), {"gradient_accumulation_steps": 2}),
    Case(("replay-tokens",), (3, 11), EPOCHS),
    Case(("replay-tokens", "forgetting"), (4,), {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}),
    Case(("replay-stream",), (1, 13), {**EPOCHS, "dataloader_num_workers": 2}, rows=37),
    Case(("gradnormlorp",), (1, 4)),
    Case(("l2_init", "reptile"), (3,), {"gradient_accumulation_steps": 2}),
    Case(("self_distillation", "gradnormlorp-dora"), (2, 12), EPOCHS),
    Case(("self_distillation-features", "l2_init"), (1, 4), {"bf16": True, "gradient_accumulation_steps": 2}),
    Case(("buffer",), (2, 4), {"dataloader_num_workers": 2}),
    Case(("buffer", "replay-stream"), (3, 12), EPOCHS),
    # In the middle of an interval, and at its end.
    Case(("reptile", "replay"), (3, 12), EPOCHS),
    Case(("reptile", "gradnormlorp"), (1, 4), {"bf16": True, "gradient_accumulation_steps": 2}),
    Case(("gradnormlorp", *settings.TOGETHER), (3,), {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}),
    Case(("gradnormlorp-dora", "replay"), (2, 12), EPOCHS),
    Case(("replay-stream", "rewarm"), (3,), {"bf16": True, "gradient_accumulation_steps": 2}),
    Case(("replay-shuffled-stream",), (4, 12), EPOCHS),
    # Before the cooldown, at its first step and inside it.
    Case(("metadata",), (2, 4, 5), {"dataloader_num_workers": 2}),
    Case(("metadata", "replay-documents", "forgetting-documents"), (5, 17), EPOCHS),
    Case(("metadata-stream",), (3, 4), {"dataloader_num_workers": 2}),
    Case(("metadata-mixed", "rewarm"), (3,), {"gradient_accumulation_steps": 2}),
    Case(("meta_tokens",), (1, 4), {"dataloader_num_workers": 2}),
    Case(("meta_tokens", "replay", "rewarm"), (2, 12), {**EPOCHS, tiny.CHECKPOINTING: True}, rows=38),
    Case(("meta_tokens", "gradnormlorp"), (3,), {"bf16": True, "gradient_accumulation_steps": 2}),
    Case(("meta_tokens-row", "forgetting"), (3, 11), EPOCHS),
    Case(("meta_tokens-meta",), (4,), {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}),
    # Beside an adapter, whose checkpoints hold neither the token's row nor meta-attention.
    Case(("meta_tokens-lora", "replay"), (1, 13), EPOCHS),
    # Rows that the model gets for control tokens; a stop after the first step, and in the cooldown.
    Case(("metadata-segments",), (1, 5), {"dataloader_num_workers": 2}),
]


class _Stop(TrainerCallback):
    """Saves at the wanted steps and, in an interrupted leg, ends there as abruptly as a loop can."""

    def __init__(self, saves: tuple[int, ...], last: int | None):
        self.saves, self.last = saves, last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.saves

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            raise KeyboardInterrupt


def build(case: Case, folder: Path, stop: int | None) -> Trainer:
    callbacks = [*settings.make(case.plugins), _Stop(case.stops, stop)]
    data = {"data": tiny.rows(case.rows), **settings.trainer_for(case.plugins)}
    return extend(tiny.trainer(folder, *callbacks, dropout=0.1, save_strategy="no", **data, **case.arguments))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in flat(item, f"{path}/{n}").items()}
    return {path: value}


def snapshot(trained: Trainer) -> dict[str, Any]:
    """Weights, optimizer, scheduler, generator, counts, plug-ins' state: all that the next step would depend on."""
    return flat(
        {
            "weights": tiny.weights(trained),
            "optimizer": trained.optimizer.state_dict(),
            "scheduler": trained.lr_scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "counts": trained.plugin_run.realised(),
            "state": {plugin.name: plugin.state() for plugin in trained.plugin_run.plugins},
        }
    )


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and ours == theirs


def log_lines(trained: Trainer) -> list[dict[str, Any]]:
    """The history but for its last line, which the host makes of this call alone."""
    return tiny.history(trained)[:-1]


def first(folder: Path) -> None:
    for number, case in enumerate(CASES):
        reference = build(case, folder / f"{number}-whole", None)
        reference.train()
        content = {"snapshot": snapshot(reference), "log": log_lines(reference)}
        torch.save(content, folder / f"{number}.pt")
        _until(build(case, folder / f"{number}", case.stops[0]), None)


def _until(trained: Trainer, resume: bool | None) -> None:
    try:
        trained.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        return
    raise RuntimeError("the leg was to be interrupted")


def second(folder: Path) -> None:
    results = {}
    for number, case in enumerate(CASES):
        for stop in case.stops[1:]:
            _until(build(case, folder / f"{number}", stop), True)
        resumed = build(case, folder / f"{number}", None)
        resumed.train(resume_from_checkpoint=True)
        reference = torch.load(folder / f"{number}.pt", weights_only=True)
        ours = snapshot(resumed)
        theirs = reference["snapshot"]
        different = [key for key in sorted({*ours, *theirs}) if not same(ours.get(key), theirs.get(key))]
        lines = [[a, b] for a, b in zip(log_lines(resumed), reference["log"], strict=False) if a != b]
        results[case.name] = {
            "different": different,
            "log": lines,
            "lengths": [len(log_lines(resumed)), len(reference["log"])],
        }
    (folder / "results.json").write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    {"first": first, "second": second}[sys.argv[1]](Path(sys.argv[2]))
