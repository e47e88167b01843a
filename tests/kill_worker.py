"""Runs that are killed: one settings row or several at once, with dropout, that resume by themselves."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "together": (("rewarm", "replay", "forgetting"), {}),
    "workers and epochs": (
        ("rewarm", "replay-mixture", "forgetting"),
        {"dataloader_num_workers": 2, **{"max_steps": -1, "num_train_epochs": 2}},
    ),
    "accumulation": (("rewarm", "replay-additional", "forgetting"), {"gradient_accumulation_steps": 2}),
    "tokens": (("rewarm", "replay-tokens", "forgetting"), {}),
    "stream": (("rewarm", "replay-stream"), {"dataloader_num_workers": 1}),
    "shuffled stream": (("replay-shuffled-stream", "forgetting"), {}),
    "projected": (("rewarm", "replay", "forgetting", "gradnormlorp"), {}),
    "buffered": (("buffer", "replay-stream", "l2_init", "self_distillation"), {"dataloader_num_workers": 1}),
}


def train(case: str, folder: str) -> None:
    """One start: from the newest complete checkpoint, if there is one."""
    os.setsid()
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.path[:0] = [str(Path(__file__).parent)]
    import settings
    import tiny
    import torch

    from hf_pretrain_ext import extend
    from hf_pretrain_ext.checkpoint import last_complete_checkpoint

    torch.set_num_threads(1)
    names, arguments = CASES[case]
    trainer = tiny.trainer(
        folder,
        *settings.make(names),
        dropout=0.1,
        data=tiny.rows(46),
        **{"max_steps": 24, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, **arguments},
    )
    extend(trainer).train(resume_from_checkpoint=last_complete_checkpoint(folder)[0] is not None)


class Forked:
    """A run in a new process, forked from one that has the libraries imported and nothing else done."""

    context: Any = None

    def __init__(self, case: str, folder: Path):
        if Forked.context is None:
            Forked.context = multiprocessing.get_context("forkserver")
            Forked.context.set_forkserver_preload(
                ["transformers", "datasets", "accelerate", "hf_pretrain_ext.trainer"]
            )
        self.process = Forked.context.Process(target=train, args=(case, str(folder)))
        self.process.start()

    def running(self) -> bool:
        return bool(self.process.is_alive())

    def exit_code(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def kill(self) -> None:
        # With its data workers, which would otherwise live on and hold files.
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            self.process.kill()
        self.process.join()
