"""What a trace says of each session of a run: on which machine it ran, how much memory it held, how it ended.

A session is one call of `train()`. Its line `session` opens it, lines `usage` follow at each log of a training loss
and at the end, and a line `interrupted` closes one that an exception ended; a kill leaves no line.
"""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_pretrain_ext.trace import command

__all__ = ["Session", "machine", "memory_use"]

_LONGEST = 200
"""Characters of an exception's text that are kept."""


def machine(device: torch.device) -> dict[str, Any]:
    """What a session runs on: system, processors, memory in bytes, and the device that trains; not the host's name.

    Example:

    >>> found = machine(torch.device("cpu"))
    >>> found["device"], found["processors"] > 0
    ('cpu', True)
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processors": allowed,
        "memory": _main_memory(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device_name": properties.name, "device_memory": properties.total_memory}
    return found


def memory_use(device: torch.device) -> dict[str, int | None]:
    """
    Bytes that this process holds now, at its highest, and at its highest on the device that trains.

    Args:
        device (`torch.device`): that trains.

    Returns:
        `dict`: `resident` and `peak_resident`, pages in main memory now and at most since the process began (None
            where the system has no /proc); `device_peak`, the most that tensors held on the device since the process
            began or the peak was reset (None on a CPU, and where torch does not count it). Nothing is reset here.

    Example:

    >>> use = memory_use(torch.device("cpu"))
    >>> sorted(use), use["device_peak"]
    (['device_peak', 'peak_resident', 'resident'], None)
    """
    peak = None
    if device.type != "cpu":
        counter = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        peak = int(counter(device)) if counter is not None else None
    return {**_resident(), "device_peak": peak}


def _resident() -> dict[str, int | None]:
    # Not getrusage: on Linux its maximum is inherited from the process that started this one.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        status = ""
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    names = {"resident": "VmRSS", "peak_resident": "VmHWM"}
    return {key: int(lines[name].split()[0]) * 1024 if name in lines else None for key, name in names.items()}


def _main_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


class Session:
    """Writes the lines of one session into the trace of `run`; before `begin` it writes nothing."""

    def __init__(self, run: Any):
        self.run = run
        self._began: float | None = None

    def begin(self, notes: list[str]) -> None:
        """`notes`: what the checks of the set-up warned of."""
        self._began = time.monotonic()
        self.run.trace(
            "session",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(self.run.device),
            ranks=self.run.ranks[1],
            command=command(),
            notes=notes,
        )

    def use(self) -> None:
        if self._began is not None:
            self.run.trace("usage", **memory_use(self.run.device), seconds=round(time.monotonic() - self._began, 3))

    def interrupted(self, error: BaseException) -> None:
        if self._began is None:
            # What failed before training is no part of the run, and the trace may still be that of another.
            return
        self.use()
        text = (str(error).splitlines() or [""])[0]
        told = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
        self.run.trace("interrupted", error=type(error).__name__, message=told)
        self._began = None

    def end(self) -> None:
        self.use()
        self._began = None
