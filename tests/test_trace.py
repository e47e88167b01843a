"""trace.jsonl: what a kill, a resume and a second run leave in it, and what `read_trace` makes of that."""

from __future__ import annotations

import enum
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pretrain_ext.trace import TRACE_NAME, Trace, command, plain, read_trace, versions

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


def test_lines_wait_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line gets written, then nothing more: once there is room, every event is there, once and in order."""
    trace = Trace(tmp_path)
    trace.write("start", 0)
    real = Path.open

    class Full:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *given: Any) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[:7])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def full(self: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        opened = real(self, mode, *given, **named)
        return Full(opened) if mode == "a" else opened

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        trace.write("log", 1)
        trace.write("log", 2)
        assert [line["step"] for line in read_trace(tmp_path)] == [0]
    trace.write("log", 3)
    assert [line["step"] for line in read_trace(tmp_path)] == [0, 1, 2, 3]


def strict(text: str) -> Any:
    """JSON as every parser reads it: NaN and Infinity, which Python's alone accepts, are refused."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def short(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events]


def written(folder: Path, *events: tuple[str, int]) -> Path:
    for event, step in events:
        Trace(folder).write(event, step)
    return folder / TRACE_NAME


def tear(path: Path, keep: int) -> None:
    """Cuts the last line down to its first `keep` bytes, as a kill in the middle of a write does."""
    lines = path.read_bytes().split(b"\n")
    assert lines[-1] == b"" and 0 < keep < len(lines[-2])
    path.write_bytes(b"\n".join(lines[:-2]) + (b"\n" if lines[:-2] else b"") + lines[-2][:keep])


# --- writing and reading ----------------------------------------------------------------------------


def test_events_come_back_as_written(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "run")  # made on the first event
    assert not (tmp_path / "run").exists()
    trace.write("start", 0, identity={"seed": 3}, describe=["größer → kleiner", 'a "quote"', "two\nlines"])
    trace.write("log", 10, scalars={"loss": 2.5, "none": None, "flag": True})
    expected = [
        {"event": "start", "step": 0, "identity": {"seed": 3}}
        | {"describe": ["größer → kleiner", 'a "quote"', "two\nlines"]},
        {"event": "log", "step": 10, "scalars": {"loss": 2.5, "none": None, "flag": True}},
    ]
    assert read_trace(tmp_path / "run") == read_trace(tmp_path / "run" / TRACE_NAME) == expected
    text = (tmp_path / "run" / TRACE_NAME).read_text(encoding="utf-8")
    assert [strict(line) for line in text.split("\n")[:-1]] == expected and text.endswith("}\n")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Trace(tmp_path / "run", enabled=False).write("start", 0)
    assert list(tmp_path.iterdir()) == []


def test_no_trace_is_an_error_that_says_where_one_would_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no trace at .*trace\.jsonl"):
        read_trace(tmp_path)


@PROPERTY
@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_text_survives(texts: list[str]) -> None:
    """Characters that end a line for some readers (U+2028, U+0085, form feed) do not end one here."""
    with tempfile.TemporaryDirectory() as folder:
        for text in [*texts, "a\u2028b", "a\u2029b", "a\x85b", "a\x0c\x0b\x1cb", "a\r\nb"]:
            Trace(folder).write("note", 1, text=text, **{"key" + text: text})
            event = read_trace(folder)[-1]
            assert event == {"event": "note", "step": 1, "text": text, "key" + text: text}


# --- kills, resumes, second runs --------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    """Cut after any byte: what was whole is read, the rest ignored."""
    for keep in range(1, len('{"event": "log", "step": 20}')):
        path = written(tmp_path / str(keep), ("start", 0), ("log", 10), ("log", 20))
        tear(path, keep)
        assert short(read_trace(path)) == [("start", 0), ("log", 10)]


def test_a_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    """Lines hold text such as "3e-4 → 3e-5"; a kill may leave the first of the arrow's three bytes."""
    path = written(tmp_path, ("start", 0))
    Trace(tmp_path).write("phase", 10, text="→")
    for keep in (
        len('{"event": "phase", "step": 10, "text": "') + 1,
        len('{"event": "phase", "step": 10, "text": "') + 2,
    ):
        torn = tmp_path / str(keep)
        torn.mkdir()
        (torn / TRACE_NAME).write_bytes(path.read_bytes())
        tear(torn / TRACE_NAME, keep)
        assert short(read_trace(torn)) == [("start", 0)]
        Trace(torn).write("resume", 0)
        Trace(torn).write("log", 5)
        assert short(read_trace(torn)) == [("start", 0), ("resume", 0), ("log", 5)]


@pytest.mark.parametrize("keep", [1, 12, 27])
def test_a_torn_line_does_not_spoil_the_resume_after_it(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path, ("start", 0), ("log", 10), ("save", 10), ("log", 20))
    tear(path, keep)
    written(tmp_path, ("resume", 10), ("log", 20), ("end", 20))
    assert short(read_trace(path)) == [
        ("start", 0),
        ("log", 10),
        ("save", 10),
        ("resume", 10),
        ("log", 20),
        ("end", 20),
    ]


def test_a_torn_line_does_not_spoil_the_run_after_it(tmp_path: Path) -> None:
    path = written(tmp_path, ("start", 0), ("log", 10))
    tear(path, 9)
    written(tmp_path, ("start", 0), ("log", 5))
    assert short(read_trace(path)) == [("start", 0), ("log", 5)]


def test_a_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    """Killed between the line and its newline: the event is whole, and the next one starts its own line."""
    path = written(tmp_path, ("start", 0), ("log", 10))
    path.write_bytes(path.read_bytes()[:-1])
    assert short(read_trace(path)) == [("start", 0), ("log", 10)]
    written(tmp_path, ("resume", 10), ("log", 20))
    assert short(read_trace(path)) == [("start", 0), ("log", 10), ("resume", 10), ("log", 20)]


@pytest.mark.parametrize(
    "line", ["not json", "[]", "3", "{}", '{"event": "log"}', '{"step": 1}', '{"event": "x", "step": "1"}', ""]
)
def test_other_damage_is_an_error_that_names_the_line(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, ("start", 0))
    path.write_text(path.read_text() + line + "\n")
    written(tmp_path, ("log", 10))
    with pytest.raises(ValueError, match="line 2 is not an event of a trace") as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_resume_supersedes_what_came_after_its_step(tmp_path: Path) -> None:
    """Steps 11 to 25 were lost with the kill, and trained again; what was saved at step 10 stays."""
    path = written(tmp_path, ("start", 0), ("log", 5), ("log", 10), ("save", 10), ("log", 15), ("probe", 25))
    written(tmp_path, ("resume", 10), ("log", 15), ("log", 20))
    assert short(read_trace(path)) == [
        ("start", 0),
        ("log", 5),
        ("log", 10),
        ("save", 10),
        ("resume", 10),
        ("log", 15),
        ("log", 20),
    ]
    written(tmp_path, ("resume", 5), ("log", 6))  # twice, and further back
    assert short(read_trace(path)) == [("start", 0), ("log", 5), ("resume", 5), ("log", 6)]


def test_a_finished_run_that_goes_on_has_one_end(tmp_path: Path) -> None:
    path = written(tmp_path, ("start", 0), ("save", 10), ("end", 10), ("resume", 10), ("log", 12), ("end", 12))
    assert short(read_trace(path)) == [("start", 0), ("save", 10), ("resume", 10), ("log", 12), ("end", 12)]


def test_of_two_runs_in_one_file_the_last_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, ("start", 0), ("log", 5), ("end", 5))
    written(tmp_path, ("start", 0), ("log", 7), ("resume", 6), ("log", 8))
    assert short(read_trace(path)) == [("start", 0), ("resume", 6), ("log", 8)]


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 40)), max_size=5), st.integers(0, 9))
def test_a_killed_and_resumed_run_reads_like_one_that_was_not(kills: list[tuple[int, int, int]], last: int) -> None:
    """A run that logs every step, killed at random bytes and resumed from a save before: every step once, in order."""
    with tempfile.TemporaryDirectory() as name:
        folder, step = Path(name), 0
        written(folder, ("start", 0))
        for steps, back, cut in kills:
            for done in range(step + 1, step + steps + 1):
                written(folder, ("log", done))
            step = max(step + steps - back, 0)
            if cut:
                tear(folder / TRACE_NAME, min(cut, 20))
                step = min(step, short(read_trace(folder))[-1][1])
            written(folder, ("resume", step))
        for done in range(step + 1, step + last + 1):
            written(folder, ("log", done))
        events = [event for event in short(read_trace(folder)) if event[0] == "log"]
        assert events == [("log", done) for done in range(1, step + last + 1)]


# --- values -----------------------------------------------------------------------------------------


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        (np.float64("inf"), "inf"),
        (torch.tensor(float("nan")), "nan"),
        (torch.tensor([1.0, float("-inf")]), [1.0, "-inf"]),
        (np.array([[1.5, np.nan], [2.0, np.inf]]), [[1.5, "nan"], [2.0, "inf"]]),
        ({"a": [math.nan, {"b": (math.inf, 1)}]}, {"a": ["nan", {"b": ["inf", 1]}]}),
        (0.1, 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (torch.tensor(3), 3),
        (True, True),
        (None, None),
        (10**30, 10**30),
        (Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        (torch.float32, "torch.float32"),
        ({3: 1, None: 2}, {"3": 1, "None": 2}),
        ({5}, [5]),
    ],
)
def test_values_become_strict_json(value: Any, expected: Any, tmp_path: Path) -> None:
    Trace(tmp_path).write("note", 1, value=value)
    (event,) = read_trace(tmp_path)
    assert event["value"] == expected and type(event["value"]) is type(expected)
    assert strict((tmp_path / TRACE_NAME).read_text(encoding="utf-8"))["value"] == expected


def test_sets_have_one_order_in_every_process() -> None:
    """Two processes must write equal settings equally: a resume compares them as text."""
    code = "from hf_pretrain_ext.trace import plain; print(plain({'a', 'b', 'c', 'dd', 'ee', 'ff', 'wiki', 'books'}))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1


def test_versions_name_what_decides_a_run() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ or found["torch"] == torch.__version__.split("+")[0]
    assert {"python", "hf_pretrain_ext", "transformers", "accelerate", "datasets", "peft"} <= found.keys()
    assert plain(found) == found


@pytest.mark.parametrize(
    ("argv", "module", "told"),
    [
        (["/home/me/train.py", "--lr", "1 e"], None, "python train.py --lr '1 e'"),
        (["/env/bin/hf-pretrain-ext", "train", "r.yaml"], None, "hf-pretrain-ext train r.yaml"),
        (["/env/hf_pretrain_ext/__main__.py", "train"], "hf_pretrain_ext.__main__", "python -m hf_pretrain_ext train"),
        (["/env/mine/go.py"], "mine.go", "python -m mine.go"),
        (["/env/colab_kernel_launcher.py", "-f", "kernel.json"], None, None),
        (["/env/ipykernel_launcher.py", "-f", "kernel.json"], "ipykernel_launcher", None),
    ],
)
def test_the_command_is_one_that_runs(
    argv: list[str], module: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    spec = None if module is None else importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert command() == told
