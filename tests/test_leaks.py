"""Memory and open files over a long run with all plug-ins, saves that rotate, and data workers: they do not grow.

`python test_leaks.py FOLDER STEPS WORKERS WHAT` is one such run; it prints what it saw as JSON. WHAT is `plugins`,
`bare` (a Trainer without any: what the host itself grows by) or `leak` (a plug-in that keeps 4 KiB a step: what the
test must see).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import tiny
from transformers import TrainerCallback

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback

LOOKS = 20
BOUND = 512
"""Bytes a step over what the host grows by: a run of a million steps may grow by half a GB at the most.

The host alone, with two workers, grew by 808 bytes a step, without workers by 137 (21 November 2026).
"""


class Look(TrainerCallback):
    """Memory and open files of this process and of its workers, LOOKS times a run."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % max(state.max_steps // LOOKS, 1):
            return
        gc.collect()
        if not self.seen:
            gc.freeze()  # what is imported need not be looked through again
        process = psutil.Process()
        self.seen.append(
            {
                "step": state.global_step,
                "bytes": process.memory_full_info().uss,
                "worker_bytes": max((child.memory_full_info().uss for child in process.children()), default=0),
                "files": process.num_fds(),
                "workers": len(process.children()),
            }
        )


class Leak(TrainerCallback):
    def __init__(self) -> None:
        self.kept: list[bytearray] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(bytearray(os.urandom(4096)))


def run(folder: str, steps: int, workers: int, what: str) -> dict[str, Any]:
    if sys.platform == "linux":
        # One huge page more (2 MiB) would look like 1,000 bytes a step; 41 is PR_SET_THP_DISABLE.
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
    look = Look()
    plugins: list[TrainerCallback] = [
        RewarmCallback(peak_lr=1e-3, warmup=10),
        ReplayCallback(
            {"old": tiny.rows(500, seed=9), "stream": tiny.rows(300, seed=8).to_iterable_dataset(num_shards=2)},
            ratio=0.25,
            weights={"old": 2, "stream": 1},
        ),
        ForgettingCallback({"old": tiny.rows(16, seed=9), "new": tiny.rows(16, seed=1)}),
    ]
    trainer = tiny.trainer(
        folder,
        *({"plugins": plugins, "bare": [], "leak": [*plugins, Leak()]}[what]),
        look,
        data=tiny.rows(1000, seed=1),
        max_steps=steps,
        logging_steps=50,
        save_strategy="steps",
        save_steps=steps // LOOKS,
        save_total_limit=2,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    if what != "bare":
        extend(trainer)
    trainer.train()
    gc.collect()
    process = psutil.Process()
    return {
        "seen": look.seen,
        "left": {"workers": len(process.children()), "saves": len(list(Path(folder).glob("c*")))},
    }


def slope(points: list[tuple[int, int]]) -> float:
    """The median of all slopes between two looks (Theil and Sen): one look that is off moves it little."""
    return median((b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2))


def measured(folder: Path, steps: int, workers: int, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder / what), str(steps), str(workers), what]
    # One arena: with more, what glibc keeps for threads that come and go hides what is kept by us.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # The first quarter warms up: caches, a first save, a first pass of every source.
    settled = [look for look in found["seen"] if look["step"] >= steps // 4]
    assert len(settled) >= LOOKS // 2
    for key in ("bytes", "worker_bytes"):
        found[f"{key}_a_step"] = slope([(look["step"], look[key]) for look in settled])
    found["files"] = [look["files"] for look in settled]
    found["workers"] = {look["workers"] for look in settled}
    print(steps, workers, what, {key: value for key, value in found.items() if key != "seen"})
    return found


def check(found: dict[str, Any], workers: int, host: float = 0.0, bound: int = BOUND) -> None:
    assert found["bytes_a_step"] - host < bound
    # A worker comes to own the pages that it touches, fewer and fewer: 430 bytes a step in 2,000 steps, 65 in 6,000.
    assert found["worker_bytes_a_step"] < 2 * BOUND
    # Medians: a worker's pipes are sometimes caught while they are opened.
    assert median(found["files"][-7:]) <= median(found["files"][:7])
    assert found["workers"] == {workers}
    assert found["left"] == {"workers": 0, "saves": 2}


@pytest.mark.slow
@pytest.mark.leaks
def test_nothing_grows(tmp_path: Path) -> None:
    # What is still warming up weighs more in few steps (137 to 546 bytes a step seen); 4 KiB kept a step would show.
    check(measured(tmp_path, 400, 0, "plugins"), 0, bound=4 * BOUND)


@pytest.mark.slow
@pytest.mark.leaks
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_grows_in_2000_steps(workers: int, tmp_path: Path) -> None:
    host = measured(tmp_path, 2000, workers, "bare")["bytes_a_step"] if workers else 0.0
    check(measured(tmp_path, 2000, workers, "plugins"), workers, host)


@pytest.mark.slow
@pytest.mark.leaks
def test_a_leak_is_seen(tmp_path: Path) -> None:
    """Negative control: 4 KiB kept a step."""
    assert measured(tmp_path, 800, 0, "leak")["bytes_a_step"] > 4 * BOUND


if __name__ == "__main__":
    folder, steps, workers, what = sys.argv[1:5]
    print(json.dumps(run(folder, int(steps), int(workers), what)))
