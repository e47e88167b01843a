"""Every mistake of `bad_inputs.ROWS` ends in its error, raised by a line of this package, with nothing changed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import matplotlib.font_manager  # noqa: F401  # makes its folders when it is first imported
import pytest
from bad_inputs import CATEGORIES, ROWS, Row
from transformers import Trainer

import hf_pretrain_ext
from hf_pretrain_ext import extend

# callbacks/ is a link to a folder beside the package.
PACKAGE = Path(hf_pretrain_ext.__file__).resolve().parent
HOMES = {PACKAGE, (PACKAGE / "callbacks").resolve()}

_seen: list[tuple[str, bool]] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes):
            _seen.append((os.fsdecode(path), bool(flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link", "os.truncate"):
        _seen.extend((os.fsdecode(path), True) for path in arguments[:2] if isinstance(path, str | bytes))


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[tuple[str, bool]]]:
    """Every path that is opened meanwhile, as the interpreter sees it, and whether it is written, made or removed."""
    global _seen
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file under `folder` with its content, what lies in `output` and `cache` left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in ("output", "cache"):
            continue
        regular = path.is_file() and not path.is_symlink()
        found[str(name)] = path.read_bytes() if regular else path.is_dir()
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.category}-{row.name}")
def test_a_mistake_ends_in_its_error(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error and its text; our line raises it; Trainer, inputs and the working folder are as they were."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    act = row.prepare(tmp_path)
    trainer = act.args[0] if isinstance(act, partial) and act.func is extend else None
    if isinstance(trainer, Trainer):
        kind, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    before = snapshot(tmp_path)
    with watched() as seen, pytest.raises(row.error) as caught:
        act()
    assert type(caught.value) is row.error
    assert row.text in str(caught.value)
    assert HOMES & set(Path(caught.traceback[-1].path).resolve().parents)
    if isinstance(trainer, Trainer):
        assert type(trainer) is kind and trainer.callback_handler.callbacks == callbacks
        assert not hasattr(trainer, "_plugin_run")
    assert snapshot(tmp_path) == before
    allowed = (tmp_path / "output", tmp_path / "cache", Path("/dev/null"))
    touched = {Path(path).absolute() for path, writes in seen if writes and "__pycache__" not in path}
    assert not [path for path in touched if not any(path.is_relative_to(place) for place in allowed)]


def test_the_table_is_long_and_wide_enough() -> None:
    """At least 80 rows, at least 10 a category, no two alike."""
    count = Counter(row.category for row in ROWS)
    assert set(count) == set(CATEGORIES) and min(count.values()) >= 10 and len(ROWS) >= 80
    assert len({(row.category, row.name) for row in ROWS}) == len(ROWS)
    assert all(len(row.text) >= 5 for row in ROWS)
