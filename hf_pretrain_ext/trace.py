"""`trace.jsonl`: what happened in a run, one JSON object a line, from which report and card are made.

Lines carry `event` and `step`. A line `start` opens a run and holds its settings; `resume` continues it from a step,
and what an interrupted session had written beyond that step no longer counts: `read_trace` leaves it out, but for how
far it had come (`reached`) and the exception that ended it (`interrupted`), if one did, which it adds to the `resume`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_pretrain_ext.home import without_home
from hf_pretrain_ext.say import say

__all__ = ["TRACE_NAME", "Trace", "command", "read_trace", "scrubbed", "versions"]

TRACE_NAME = "trace.jsonl"
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "lm_eval")


# No boundary before it: in JSON a line break is "\\n", whose n is a letter.
_SECRET = re.compile(r"(hf|api_org)_[A-Za-z0-9]{16,}")


def scrubbed(text: str) -> str:
    """`text` without access tokens of the Hub.

    Example:

    >>> scrubbed("train.py --token hf_aBcDeFgHiJkLmNoP")
    'train.py --token <token>'
    >>> scrubbed(json.dumps("\\nhf_aBcDeFgHiJkLmNoP")), scrubbed("my_hf_aBcDeFgHiJkLmNoP"), scrubbed("hf_pretrain_ext")
    ('"\\\\n<token>"', 'my_<token>', 'hf_pretrain_ext')
    """
    return _SECRET.sub("<token>", text)


_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def command() -> str | None:
    """The command that this process was started by; None in a notebook, whose cells are what was run."""
    script, *arguments = sys.argv or [""]
    name = os.path.basename(script)
    if name in _NOTEBOOKS:
        return None
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        start = ["python", name] if name.endswith(".py") else [name]
    return scrubbed(shlex.join([*start, *map(without_home, arguments)]))


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide what a run does."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from hf_pretrain_ext._version import __version__

    found = {"python": platform.python_version(), "hf_pretrain_ext": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """`value` in JSON types; NaN and infinities become strings, which strict parsers accept."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str | int | bool) or value is None:
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


class Trace:
    """Appends events to `folder`/trace.jsonl; on every rank but the first it writes nothing.

    Where the file cannot be written (a full disk), lines wait in memory for the next event: a record is not worth the
    run that it records.
    """

    def __init__(self, folder: str | Path, enabled: bool = True):
        self.path = Path(folder) / TRACE_NAME
        self.enabled = enabled
        self.waiting: list[str] = []

    def write(self, event: str, step: int, **data: Any) -> None:
        if not self.enabled:
            return
        line = json.dumps({"event": event, "step": step, **plain(data)}, ensure_ascii=False, allow_nan=False)
        line = without_home(scrubbed(line))
        self.waiting.append(line + "\n")
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                # A kill may have left half a line: the next event starts one of its own.
                file.write(("\n" if self._torn() else "") + "".join(self.waiting))
        except OSError as error:
            if len(self.waiting) == 1:
                say(f"{self.path} cannot be written ({error}); its lines wait in memory", logging.WARNING)
            if size is not None and self.path.exists():
                # What did get written is written again later, whole.
                os.truncate(self.path, size)
            return
        self.waiting.clear()

    def _torn(self) -> bool:
        if not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """The events of the last run in a trace (a file, or the folder of a run), superseded ones left out.

    Raises:
        `FileNotFoundError`: no trace there.
        `ValueError`: a line other than the last is not a JSON object (a torn last line, left by a kill, is ignored).

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> trace = Trace(folder)
    >>> for event, step in (("start", 0), ("log", 10), ("log", 20), ("resume", 10), ("log", 20)):
    ...     trace.write(event, step)
    >>> [(line["event"], line["step"]) for line in read_trace(folder)]
    [('start', 0), ('log', 10), ('resume', 10), ('log', 20)]
    """
    path = Path(path)
    if path.is_dir():
        path = path / TRACE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no trace at {path}: a run with plug-ins writes {TRACE_NAME} into its output_dir")
    return _effective(_parse(path))


def _parse(path: Path) -> Iterable[dict[str, Any]]:
    # Bytes, split at the line ends that we write: text may hold other separators, and a kill may cut a character.
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line.decode("utf-8"))
            if not isinstance(event, dict) or "event" not in event or not isinstance(event.get("step"), int):
                raise ValueError("not an event")
        except ValueError as error:
            # A kill may tear the line being written: the last one, or the last before a resume.
            following = lines[number] if number < len(lines) else None
            if following is None or b'"event": "resume"' in following or b'"event": "start"' in following:
                continue
            raise ValueError(
                f"{path}, line {number} is not an event of a trace: {line[:80].decode('utf-8', 'replace')!r}"
            ) from error
        yield event


def _effective(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "start":
            kept = []
        elif event["event"] == "resume":
            event = {**event, **_lost(kept)}
            kept = _until(kept, event["step"])
        kept.append(event)
    return kept


def _lost(events: list[dict[str, Any]]) -> dict[str, Any]:
    if not events:
        return {}
    broken = {"interrupted": events[-1].get("error")} if events[-1]["event"] == "interrupted" else {}
    return {"reached": max(event["step"] for event in events), **broken}


def _until(events: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """What a checkpoint of `step` knows of: what came after its save, in the same step too, will be done again."""
    saves = [n for n, event in enumerate(events) if event["event"] == "save" and event["step"] == step]
    if saves:
        return events[: saves[-1] + 1]
    # A kill came between the save and its line here.
    return [event for event in events if event["step"] <= step and event["event"] not in ("end", "forgetting")]
