"""Kills a run at random moments, saves included, resumes it until it is done, and compares it with one left alone.

    hf-pretrain-ext kill-test recipe.yaml --kills 20

Knows processes and files, not the Trainer: what is killed is anything that trains into a folder and, started again,
goes on from the newest complete checkpoint there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hf_pretrain_ext.checkpoint import STATE_FOLDER, find_faults, last_complete_checkpoint, read_state
from hf_pretrain_ext.trace import read_trace

__all__ = ["CommandProcess", "KillReport", "Process", "compare_runs", "kill_until_done"]

_POLL = 0.0005
_TIMINGS = ("runtime", "per_second", "total_flos", "seconds")


class Process(Protocol):
    """What is needed of a running process."""

    def running(self) -> bool: ...

    def exit_code(self) -> int | None: ...

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""


@dataclass
class KillReport:
    """What happened: `kills` in all, `in_save` between the first and the last byte of a save, and what differs."""

    kills: int = 0
    in_save: int = 0
    starts: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = (
            "equal to the run left alone" if not self.differences else "DIFFERENT: " + "; ".join(self.differences)
        )
        return f"{self.kills} kills ({self.in_save} inside a save), {self.starts} starts: {verdict}"


class CommandProcess:
    """`python -m hf_pretrain_ext` with `arguments` in a process group of its own; what it prints goes to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hf_pretrain_ext", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def exit_code(self) -> int | None:
        return self.process.wait()

    def kill(self) -> None:
        # With its data workers, which would otherwise live on and hold files.
        if self.running():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _saving(folder: Path) -> Path | None:
    """The checkpoint being written: the newest, if it has no manifest yet."""
    try:
        found = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
    except OSError:
        return None
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]) if path.name[-1].isdigit() else -1)
    return None if (newest / STATE_FOLDER / "manifest.json").exists() else newest


def kill_until_done(
    start: Callable[[], Process],
    folder: str | Path,
    kills: int,
    seed: int = 0,
    seconds: float = 5.0,
    in_save: float = 0.5,
    longest_save: float = 0.05,
) -> KillReport:
    """Starts a run again and again, killing it `kills` times, then lets it finish.

    Args:
        start (`Callable[[], Process]`): starts the run in a new process; it resumes by itself.
        folder (`str` or `Path`): where the run keeps its checkpoints.
        kills (`int`): how often to kill.
        seed (`int`, *optional*): of the moments.
        seconds (`float`, *optional*): kills outside saves come at up to this many seconds after a start. A run that
            gets to its end before its kill is left to be the last.
        in_save (`float`, *optional*): share of the kills that wait for a save to begin.
        longest_save (`float`, *optional*): seconds; those kills come up to this long after the save's first byte.

    Raises:
        `RuntimeError`: a start that was not killed ended with an error.
    """
    draw, folder, report = random.Random(seed), Path(folder), KillReport()
    while True:
        process = start()
        report.starts += 1
        if report.kills >= kills:
            while process.running():
                time.sleep(_POLL)
        elif draw.random() < in_save:
            _kill_in_save(process, folder, draw.uniform(0, longest_save))
        else:
            end = time.monotonic() + draw.uniform(0, seconds)
            while process.running() and time.monotonic() < end:
                time.sleep(_POLL)
            process.kill()
        code = process.exit_code()
        if code == 0:
            return report
        if code is None or code > 0:
            raise RuntimeError(f"a start of the run ended by itself, with exit code {code}; see its output")
        report.kills += 1
        # Counted by what is found, not by what was meant: the save may have been over by the time of the kill.
        report.in_save += _saving(folder) is not None


def _kill_in_save(process: Process, folder: Path, delay: float) -> None:
    before = _saving(folder)
    changed = before.stat().st_mtime_ns if before else None
    while process.running():
        now = _saving(folder)
        # An incomplete folder that an earlier kill left is not a save, until it is written to again.
        if now is not None and (now != before or now.stat().st_mtime_ns != changed):
            time.sleep(delay)
            break
        time.sleep(_POLL)
    process.kill()


def compare_runs(reference: str | Path, other: str | Path) -> list[str]:
    """Where two finished runs differ, one line a place: weights, optimizer, schedule, counts, logs, trace.

    Compared are the newest complete checkpoints, bit for bit but for timings.
    """
    folders = [last_complete_checkpoint(run)[0] for run in (reference, other)]
    if None in folders:
        return [
            f"{run} has no complete checkpoint" for run, f in zip((reference, other), folders, strict=True) if not f
        ]
    first, second = (Path(folder) for folder in folders if folder is not None)
    if first.name != second.name:
        return [f"one ended at {first.name}, the other at {second.name}"]
    found = [f"{path}: {fault}" for path in (first, second) for fault in find_faults(path)]
    names = {path.name for folder in (first, second) for path in folder.iterdir() if path.is_file()}
    for name in sorted(names - {"training_args.bin"}):
        if not ((first / name).is_file() and (second / name).is_file()):
            found.append(f"{name} is in one of them only")
        elif name == "trainer_state.json":
            found += _different(_history(first / name), _history(second / name), "log")
        elif (first / name).read_bytes() != (second / name).read_bytes():
            found += _different_file(first / name, second / name)
    found += _different(read_state(first), read_state(second), "state")
    return found + _different(_events(reference), _events(other), "trace")


def _different_file(first: Path, second: Path) -> list[str]:
    """Files of torch that hold the same tensors may have other bytes; others may not."""
    if first.suffix not in (".pt", ".pth"):
        return [f"{first.name} differs"]
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        loaded = [torch.load(path, weights_only=True) for path in (first, second)]
    return _different(loaded[0], loaded[1], first.name)


def _history(path: Path) -> Any:
    return [_untimed(line) for line in json.loads(path.read_text())["log_history"]]


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not any(part in key for part in _TIMINGS)}


def _events(run: str | Path) -> list[Any]:
    """What the trace says happened, without times, places, and how often it was resumed."""
    kept = []
    for event in read_trace(run):
        if event["event"] in ("log", "probe", "forgetting", "alert", "stop", "nonfinite", "mixture", "end"):
            scalars = {"scalars": _untimed(event["scalars"])} if "scalars" in event else {}
            if any(key.startswith("train_") for key in event.get("scalars", {})):
                continue  # the host's summary of its last call
            kept.append(_untimed({**event, **scalars}))
    return kept


def _different(first: Any, second: Any, place: str) -> list[str]:
    import numpy as np
    import torch

    if isinstance(first, dict) and isinstance(second, dict):
        lines = [f"{place}: {key!r} is in one of them only" for key in first.keys() ^ second.keys()]
        return lines + [
            x for key in first if key in second for x in _different(first[key], second[key], f"{place}.{key}")
        ]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [f"{place}: {len(first)} and {len(second)} entries"]
        return [
            x for n, pair in enumerate(zip(first, second, strict=True)) for x in _different(*pair, f"{place}[{n}]")
        ]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [f"{place}: tensors differ"]
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return [] if first.dtype == second.dtype and np.array_equal(first, second) else [f"{place}: arrays differ"]
    return [] if type(first) is type(second) and first == second else [f"{place}: {first!r} and {second!r}"]
