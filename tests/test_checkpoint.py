"""Our part of a checkpoint: a damaged one is recognised and explained whatever happened to it, never raised on."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pretrain_ext import checkpoint
from hf_pretrain_ext.checkpoint import (
    STATE_FOLDER,
    CheckpointError,
    differences,
    find_faults,
    invalidate,
    last_complete_checkpoint,
    read_state,
    resolve,
    write_state,
)

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)
STATE: dict[str, Any] = {
    "step": 5,
    "plugins": {"replay": {"counts": [1, 2]}},
    "none": None,
    "text": "größer → kleiner",
}
MANIFEST, STATE_FILE = f"{STATE_FOLDER}/manifest.json", f"{STATE_FOLDER}/state.json"
HOST_FILES = {
    "model.safetensors": bytes(range(256)) * 9,
    "optimizer.pt": b"moments",
    "trainer_state.json": b"{}",
    "adapter/weights.bin": b"abc",
    "empty.txt": b"",
}


def host_files(folder: Path) -> Path:
    for name, content in HOST_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def complete(folder: Path, state: dict[str, Any] | None = None) -> Path:
    write_state(host_files(folder), STATE if state is None else state)
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own for each example of a property."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- complete, and what makes it not so -------------------------------------------------------------


def test_what_was_written_is_complete_and_read_back(tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    assert find_faults(folder) == []
    assert read_state(folder) == STATE
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed.keys() == {*HOST_FILES, STATE_FILE}
    assert {name: entry["size"] for name, entry in listed.items() if name in HOST_FILES} == {
        name: len(content) for name, content in HOST_FILES.items()
    }
    assert sorted(path.name for path in (folder / STATE_FOLDER).iterdir()) == ["manifest.json", "state.json"]


def test_state_is_strict_json(tmp_path: Path) -> None:
    """NaN and infinities are written as strings: any parser reads the file."""
    folder = complete(tmp_path / "checkpoint-5", {"loss": float("nan"), "worst": [float("inf"), -float("inf"), 1.5]})

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    for name in (STATE_FILE, MANIFEST):
        json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=refuse)
    assert read_state(folder) == {"loss": "nan", "worst": ["inf", "-inf", 1.5]}


def test_writing_again_replaces_state_and_manifest(tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    (folder / "optimizer.pt").write_bytes(b"other moments")
    assert find_faults(folder) != []
    write_state(folder, {"step": 6})
    assert find_faults(folder) == [] and read_state(folder) == {"step": 6}


@pytest.mark.parametrize("name", [*HOST_FILES, STATE_FILE])
def test_every_file_is_watched(name: str, tmp_path: Path) -> None:
    """Deleted, one byte longer, emptied, or one bit other: the fault names the file."""
    for number, damage in enumerate(("delete", "append", "cut", "flip")):
        folder = complete(tmp_path / f"checkpoint-{number}")
        path = folder / name
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
            expected = f"{name} is missing"
        elif damage == "append":
            path.write_bytes(content + b"x")
            expected = f"{name} has {len(content) + 1} bytes instead of {len(content)}"
        elif not content:
            continue
        elif damage == "cut":
            path.write_bytes(content[:-1])
            expected = f"{name} has {len(content) - 1} bytes instead of {len(content)}"
        else:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            expected = f"{name} was altered (its hash differs)"
        assert find_faults(folder) == [expected]


@settings(PROPERTY, max_examples=30)
@given(st.sampled_from([name for name in HOST_FILES if HOST_FILES[name]] + [STATE_FILE]), st.data())
def test_any_flipped_bit_and_any_cut_is_found(name: str, data: st.DataObject) -> None:
    with scratch() as base:
        path = complete(base / "checkpoint-1") / name
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[at:]
        path.write_bytes(content)
        faults = find_faults(base / "checkpoint-1")
        assert len(faults) == 1 and faults[0].startswith(name)


def test_all_faults_are_listed(tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    (folder / "optimizer.pt").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    faults = find_faults(folder)
    assert len(faults) == 2 and all(any(name in fault for fault in faults) for name in ("optimizer.pt", "model."))


def test_files_added_later_are_no_fault(tmp_path: Path) -> None:
    """A model card, or the sentinel that the SIGTERM checkpoint keeps while it saves and removes afterwards."""
    folder = host_files(tmp_path / "checkpoint-5")
    (folder / "checkpoint-is-incomplete.txt").write_text("saving")
    write_state(folder, STATE)
    assert find_faults(folder) == []
    (folder / "checkpoint-is-incomplete.txt").unlink()
    (folder / "README.md").write_text("card")
    (folder / STATE_FOLDER / "more.json").write_text("{}")
    assert find_faults(folder) == []


def test_folders_without_a_manifest_are_told_apart(tmp_path: Path) -> None:
    assert find_faults(tmp_path / "checkpoint-1") == ["there is no such folder"]
    (tmp_path / "checkpoint-2").mkdir()
    assert find_faults(tmp_path / "checkpoint-2") == ["the folder is empty"]
    (bare,) = find_faults(host_files(tmp_path / "checkpoint-3"))
    assert "not written by a Trainer with plug-ins" in bare and MANIFEST in bare
    folder = complete(tmp_path / "checkpoint-4")
    invalidate(folder)
    assert find_faults(folder) == ["its save did not finish (no manifest)"]
    invalidate(folder)  # again, and where there never was one
    invalidate(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-5").write_text("a file")
    assert find_faults(tmp_path / "checkpoint-5") == ["there is no such folder"]


# --- manifests that are not ours any more -----------------------------------------------------------

GOOD = {"size": 3, "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"files"',
        "{}",
        '{"format": 1}',
        '{"files": {}}',
        '{"format": 1, "files": null}',
        '{"format": 1, "files": 7}',
        '{"format": 1, "files": "x"}',
        '{"format": 1, "files": ["a", "b"]}',
        '{"format": 1, "files": {"a": null}}',
        '{"format": 1, "files": {"a": []}}',
        '{"format": 1, "files": {"a": {}}}',
        '{"format": 1, "files": {"a": {"size": 1}}}',
        '{"format": 1, "files": {"a": {"size": "many", "xxh3_128": ""}}}',
        '{"format": 1, "files": {"a": {"size": null, "xxh3_128": ""}}}',
        '{"format": 1, "files": {"a": {"size": NaN, "xxh3_128": ""}}}',
        '{"format": 1, "files": {"a": {"size": 1' + "0" * 5000 + ', "xxh3_128": ""}}}',
        '{"format": 1, "files": {"a": {"size": Infinity, "xxh3_128": ""}}}',
        '{"format": 1, "files": {"a": {"size": 1e999, "xxh3_128": ""}}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_manifests_of_the_wrong_shape_are_unreadable(text: str, tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    (folder / MANIFEST).write_text(text)
    (fault,) = find_faults(folder)
    assert MANIFEST in fault and "cannot be read" in fault


@pytest.mark.parametrize("form", [0, 2, "1", None, [1]])
def test_manifests_of_another_format_are_refused(form: Any, tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": form}))
    assert find_faults(folder) == [f"its manifest has format {form!r}; this version reads format 1"]


@pytest.mark.parametrize(
    "name",
    ["../outside.txt", "adapter/../../outside.txt", "/etc/hostname", "..", "a/../../b", "adapter/../optimizer.pt"],
)
def test_manifests_cannot_point_outside(name: str, tmp_path: Path) -> None:
    """Not even at a file whose size and hash are right: it is not looked at."""
    folder = complete(tmp_path / "checkpoint-5")
    (tmp_path / "outside.txt").write_bytes(HOST_FILES["optimizer.pt"])
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["optimizer.pt"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert find_faults(folder) == [f"its manifest names a file outside the checkpoint: {name!r}"]


@pytest.mark.parametrize("name", ["", ".", "adapter", "a\0b", "optimizer.pt/x", "\ud800", "x" * 300, "x/" * 3000])
def test_manifests_with_names_that_are_no_files(name: str, tmp_path: Path) -> None:
    """Folders, impossible and overlong names: a fault, not an exception."""
    folder = complete(tmp_path / "checkpoint-5")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = GOOD
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (fault,) = find_faults(folder)
    assert "missing" in fault or "outside" in fault


def test_a_manifest_must_list_the_state(tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][STATE_FILE]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert find_faults(folder) == [f"its manifest does not list {STATE_FILE}"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["format", "files", "size", "xxh3_128"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(PROPERTY, max_examples=150)
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())), st.booleans())
def test_no_manifest_makes_find_faults_raise(content: bytes, wrapped: bool) -> None:
    """Random bytes, and JSON of every shape, alone or as the list of files: always a fault, never an exception."""
    if wrapped:
        content = b'{"format": 1, "files": {"optimizer.pt": ' + content + b"}}"
    with scratch() as base:
        folder = host_files(base / "checkpoint-1")
        (folder / STATE_FOLDER).mkdir()
        (folder / MANIFEST).write_bytes(content)
        faults = find_faults(folder)
        assert faults and all(isinstance(fault, str) and fault for fault in faults)
        newest, skipped = last_complete_checkpoint(base)
        assert newest is None and skipped == [(folder, faults[0])]


@pytest.mark.parametrize("content", ["[1, 2]", "null", "3", '"x"'])
def test_a_state_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-5")
    (folder / STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="does not hold an object"):
        read_state(folder)


# --- interrupted saves ------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True], ids=["first save", "save over an older one"])
@pytest.mark.parametrize("moment", range(9))
def test_a_save_cut_short_is_never_complete_and_can_be_repeated(
    moment: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each of its calls to the system: the checkpoint is incomplete, and the next save makes it whole."""
    folder = tmp_path / "checkpoint-5"
    if again:
        complete(folder, {"step": 4})
        (folder / "optimizer.pt").write_bytes(b"of the second save")
    host_files(folder)
    calls = {"left": moment}

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not calls["left"]:
                raise Killed
            calls["left"] -= 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", dying(os.fsync))
        patch.setattr(checkpoint.os, "replace", dying(os.replace))
        patch.setattr(checkpoint.json, "dump", dying(json.dump))
        try:
            write_state(folder, STATE)
            finished = True
        except Killed:
            finished = False
    # Past the last rename the manifest is there and right: dying in the sync of the folder loses nothing.
    manifest_there = (folder / MANIFEST).is_file()
    assert (find_faults(folder) == []) == manifest_there
    assert manifest_there or not finished
    write_state(folder, {"step": 6})
    assert find_faults(folder) == [] and read_state(folder) == {"step": 6}


# --- which checkpoint -------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path) -> None:
    """By number, not by name or date; what is newer and damaged is listed with its fault, newest first."""
    for step in (1000, 90, 200, 1100, 1200):
        complete(tmp_path / f"checkpoint-{step}", {"step": step})
    complete(tmp_path / "checkpoint-7000-backup")
    complete(tmp_path / "old-checkpoint-5000")
    (tmp_path / "checkpoint-9999").write_text("no folder")
    (tmp_path / "checkpoint-1200" / "optimizer.pt").unlink()
    invalidate(tmp_path / "checkpoint-1100")
    newest, skipped = last_complete_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-1000"
    assert skipped == [
        (tmp_path / "checkpoint-9999", "there is no such folder"),
        (tmp_path / "checkpoint-1200", "optimizer.pt is missing"),
        (tmp_path / "checkpoint-1100", "its save did not finish (no manifest)"),
    ]
    shutil.rmtree(tmp_path / "checkpoint-1000")
    assert last_complete_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-200"
    assert last_complete_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("asked", [None, False])
def test_without_a_resume_nothing_is_looked_at(asked: bool | None, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    assert resolve(asked, tmp_path) == (None, [])


def test_resume_true_takes_the_newest_and_says_what_it_skipped(tmp_path: Path) -> None:
    complete(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-20").mkdir()
    found, lines = resolve(True, str(tmp_path))
    assert found == str(tmp_path / "checkpoint-10")
    assert lines == ["skipped checkpoint-20: the folder is empty"]


def test_resume_true_without_a_complete_checkpoint_lists_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint") as caught:
        resolve(True, tmp_path)
    assert str(tmp_path) in str(caught.value) and "it holds no checkpoints" in str(caught.value)
    host_files(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(CheckpointError) as caught:
        resolve(True, tmp_path)
    text = str(caught.value)
    assert "skipped checkpoint-20: the folder is empty" in text
    assert "skipped checkpoint-10: it has no" in text and "not written by a Trainer with plug-ins" in text


def test_an_explicit_path_is_taken_or_refused_never_replaced(tmp_path: Path) -> None:
    complete(tmp_path / "checkpoint-10")
    complete(tmp_path / "checkpoint-20")
    assert resolve(str(tmp_path / "checkpoint-10"), tmp_path) == (str(tmp_path / "checkpoint-10"), [])
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError) as caught:
        resolve(str(tmp_path / "checkpoint-20"), tmp_path)
    text = str(caught.value)
    size = len(HOST_FILES["model.safetensors"])
    assert f"cannot resume from {tmp_path / 'checkpoint-20'}" in text
    assert f"model.safetensors has 3 bytes instead of {size}" in text
    assert f"The newest complete checkpoint is {tmp_path / 'checkpoint-10'}." in text
    assert "without resume_from_checkpoint" in text  # and what to do for a new run from these weights


def test_an_explicit_path_names_the_checkpoints_beside_it(tmp_path: Path) -> None:
    """Resuming another run's folder: the advice is about that run, or about this one if that has none."""
    here, there = tmp_path / "here", tmp_path / "there"
    complete(here / "checkpoint-5")
    complete(there / "checkpoint-10")
    (there / "checkpoint-20").mkdir()
    with pytest.raises(CheckpointError, match="newest complete checkpoint is") as caught:
        resolve(there / "checkpoint-20", here)
    assert str(there / "checkpoint-10") in str(caught.value)
    shutil.rmtree(there / "checkpoint-10")
    with pytest.raises(CheckpointError, match="the folder is empty") as caught:
        resolve(there / "checkpoint-20", here)
    assert str(here / "checkpoint-5") in str(caught.value)
    shutil.rmtree(here)
    with pytest.raises(CheckpointError, match="There is no complete checkpoint"):
        resolve(there / "checkpoint-20", here)


# --- differences ------------------------------------------------------------------------------------

STRICT = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("saved", "now", "lines"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 → 2"]),
        ({"a": 1}, {}, ["a: 1 → absent"]),
        ({}, {"a": None}, ["a: absent → None"]),
        ({"a": None}, {"a": 0}, ["a: None → 0"]),
        ({"a": {"b": {"c": "x", "d": 1}}}, {"a": {"b": {"c": "y", "d": 1}}}, ["a.b.c: 'x' → 'y'"]),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ["a[1].b: 2 → 3"]),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, ["a: [1, 2] → [1, 2, 3]"]),
        ({"a": [1]}, {"a": {"0": 1}}, ["a: [1] → {'0': 1}"]),
        ({"b": 1, "a": 1}, {"c": 1, "a": 2}, ["a: 1 → 2", "b: 1 → absent", "c: absent → 1"]),
        ([1, 2, 3], [1, 5, 6], ["[1]: 2 → 5", "[2]: 3 → 6"]),
        ({"a": 1}, {"a": 1.0}, []),  # JSON knows one kind of number
    ],
)
def test_differences_by_hand(saved: Any, now: Any, lines: list[str]) -> None:
    assert differences(saved, now) == lines


@PROPERTY
@given(STRICT, STRICT)
def test_differences_are_empty_only_for_equal_values(saved: Any, now: Any) -> None:
    assert differences(saved, copy.deepcopy(saved)) == []
    assert (differences(saved, now) == []) == (saved == now)
    assert len(differences(saved, now)) == len(differences(now, saved))
    assert differences(saved, json.loads(json.dumps(saved))) == []  # as a checkpoint gives it back


@PROPERTY
@given(st.dictionaries(st.text(min_size=1, max_size=4), STRICT, min_size=1, max_size=5), st.data())
def test_one_change_is_one_line_that_names_its_place(saved: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(saved)))
    now = {**saved, key: "something else entirely"}
    assert differences({"top": saved}, {"top": now}) == [f"top.{key}: {saved[key]!r} → 'something else entirely'"]
