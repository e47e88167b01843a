"""One rank of runs over mixtures: `torchrun ... mixture_worker.py FOLDER`.

Trains every case for three epochs of three steps, saving at steps 4 and 7; then a new trainer goes on from the
checkpoint at step 4, saves at 7, and another one goes on from there. What each rank saw is written to
FOLDER/CASE-PART-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from test_dynamic_mixture import Saves, Shift
from test_replay_mixtures import Watch, alike, pad, ragged_data

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.plan import tokens as tokens_module

BLOCK = 16
STEPS = (4, 7)


def stream() -> tuple[Any, list[Any], dict[str, Any]]:
    """A stream of 20 rows in three shards beside rows, at a ratio that changes in the second epoch."""
    old = {"a": alike("a", 9), "b": alike("b", 20).to_iterable_dataset(num_shards=3)}
    plugin = ReplayCallback(old, ratio=0.5, weights={"a": 1, "b": 3}, ratio_changes={5: 0.75})
    return alike("train", 24), [plugin], {}


def tokens() -> tuple[Any, list[Any], dict[str, Any]]:
    """Shares in tokens of ragged rows, read by workers."""
    data, old = ragged_data()
    plugin = ReplayCallback(old, ratio=0.4, unit="tokens", weights={"a": 1, "b": 1}, ratio_changes={5: 0.75})
    return data.select(range(24)), [plugin], {"dataloader_num_workers": 2, "max_steps": 9, "num_train_epochs": 3}


def changing() -> tuple[Any, list[Any], dict[str, Any]]:
    """Shares in tokens that a plug-in changes after step 3 from step 6 on."""
    data, old = ragged_data()
    plugin = ReplayCallback(old, ratio=0.4, unit="tokens", weights={"a": 1, "b": 1})
    shift = Shift((3, {"train": 1, "a": 2, "b": 1}, 6))
    return data.select(range(24)), [plugin, shift], {"max_steps": 9}


CASES: dict[str, Callable[[], tuple[Any, list[Any], dict[str, Any]]]] = {
    "stream": stream,
    "tokens": tokens,
    "changing": changing,
}


def run(case: str, folder: Path, batch: int, resume: Path | None = None) -> dict[str, Any]:
    data, plugins, given = CASES[case]()
    watch = Watch()
    trainer = tiny.trainer(
        folder,
        *plugins,
        watch,
        Saves(*STEPS),
        data=data,
        **{
            "per_device_train_batch_size": batch,
            "max_steps": -1,
            "num_train_epochs": 3,
            "dropout": 0.1 if "WORLD_SIZE" in os.environ else 0.0,
            **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
            **given,
        },
    )
    trainer.data_collator = pad
    extend(trainer).train(resume_from_checkpoint=None if resume is None else str(resume))
    return {
        "rows": watch.steps,
        "weights": tiny.weights(trainer),
        "counts": trainer.plugin_run.realised(),
        "segments": [(s.start, s.weights) for s in trainer.plugin_run.plan.segments],
        "epochs": trainer.plugin_run.steps_per_epoch,
        "world": trainer.args.world_size,
        "rank": trainer.args.process_index,
    }


def main(folder: Path) -> None:
    tokens_module._BLOCK = BLOCK
    for case in CASES:
        again = folder / f"{case}-again"
        legs: list[tuple[str, Path, Path | None]] = [
            ("whole", folder / case, None),
            ("resumed-4", again, folder / case / "checkpoint-4"),
            ("resumed-7", folder / f"{case}-last", again / "checkpoint-7"),
        ]
        for name, output, resume in legs:
            content = run(case, output, 4, resume)
            torch.save(content, folder / f"{case}-{name}-{content['rank']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
