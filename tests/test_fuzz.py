"""Recipes and checkpoints made of anything: a Recipe or a RecipeError, a list of faults or a CheckpointError.

Nothing else is raised, nothing takes long, nothing is written, and no file outside a checkpoint is read.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from bad_inputs import MANIFEST, STATE_FILE, valid_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_inputs import watched

from hf_pretrain_ext.checkpoint import (
    CheckpointError,
    find_faults,
    read_state,
    resolve,
    write_state,
)
from hf_pretrain_ext.checkpoint import (
    last_complete_checkpoint as newest_of,
)
from hf_pretrain_ext.recipe import Recipe, RecipeError, load_recipe

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SECONDS = 60
LONGEST_MESSAGE = 20_000


class Hangs(BaseException):
    """Not an Exception, so that nothing in between catches it."""


@contextmanager
def in_time() -> Iterator[None]:
    """Raises `Hangs` after `SECONDS`, also out of a read that blocks."""

    def stop(*_: Any) -> None:
        raise Hangs(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends(act: Callable[[], Any], error: type[Exception]) -> Any:
    """What `act` returns, `error` if it was raised; any other fails the test."""
    with in_time():
        try:
            return act()
        except error as raised:
            assert type(raised) is error and str(raised) and len(str(raised)) < LONGEST_MESSAGE
            return error


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own for every example."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


FULL = json.loads(
    json.dumps(
        valid_recipe(
            model={"name_or_path": "x", "revision": "main", "dtype": "float32", "tokenizer": "x"},
            data={
                "path": "json",
                "name": "x",
                "split": "train",
                "data_files": ["x"],
                "streaming": False,
            },
            eval_data={"path": "json", "text_column": "text"},
            trainer="trainer",
            pack={"block_size": 16, "isolate": True, "remainder": "drop", "seed": 1, "num_proc": 1},
            plan={"order": "shuffled", "seed": 1, "window": 4},
            on_nonfinite="stop",
            rewarm={"peak_lr": 1.0, "schedule": "wsd", "warmup": 2, "min_lr": 0.1, "start_lr": 0.0, "total_steps": 99}
            | {"decay": 3},
            replay={"sources": {"old": {"path": "json", "weight": 1.0}}, "ratio": 0.1, "mode": "additional"}
            | {"order": "original", "unit": "tokens", "ratio_changes": {"0.5": 0.2}},
            forgetting={"sets": {"old": {"path": "json"}}, "every": 3, "first_steps": "dense", "max_samples": 9}
            | {"batch_size": 2, "alert_if": {"old": 0.1}, "stop_if": {"old": 0.2}},
        )
    )
)
"""A recipe with almost every key there is."""

# --- recipes ----------------------------------------------------------------------------------------


def loads(content: bytes, *changes: str) -> None:
    with scratch() as folder:
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        with watched() as seen:
            made = ends(lambda: load_recipe(path, changes), RecipeError)
        assert made is RecipeError or isinstance(made, Recipe)
        assert not [name for name, writes in seen if writes and "__pycache__" not in name]
        assert sorted(folder.iterdir()) == [path]


ENDLESS = 10**30 + 7
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**30, -(10**30), 10**400, ENDLESS, 2**63, 1e308, float("inf"), float("nan"), -0.0])
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "../../etc",
        "/dev/zero",
        "a\0b",
        "x" * 5000,
        "1e400",
        "1e400 tokens",
        "9" * 5000,
        "50%",
        "~",
        "{}",
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.dates() | st.binary(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = ["model", "data", "training", "rewarm", "replay", "forgetting", "pack", "plan", "eval_data", "trainer"]
KEYS = [
    "path",
    "sources",
    "sets",
    "ratio",
    "output_dir",
    "max_steps",
    "peak_lr",
    "warmup",
    "every",
    "weights",
    "window",
]
NAMES = st.sampled_from([*SECTIONS, *KEYS])


@settings(FUZZ)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_recipes_of_random_bytes(content: bytes) -> None:
    """Random bytes, and random text, surrogates among it."""
    loads(content)


PIECES = [
    ": ",
    ":",
    "\n",
    "\n  ",
    "- ",
    "? ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!!float ",
    "!!set ",
]
PIECES += [
    "!!bool ",
    "!!timestamp ",
    "!!binary ",
    "!!omap ",
    "!!python/name:os.system ",
    "!x ",
    "|",
    ">",
    "'",
    '"',
    "#",
]
PIECES += [
    "%YAML 9.9\n",
    "---\n",
    "...\n",
    "\t",
    "2001-99-99",
    "1e999",
    "0x",
    "1:99",
    "=",
    "~",
    ".nan",
    "\u2028",
    "\ufeff",
]


@settings(FUZZ, max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | NAMES | TEXTS, max_size=25).map("".join), st.booleans())
def test_recipes_of_pieces_of_yaml(text: str, begun: bool) -> None:
    """Indicators, tags, anchors and our own names in any order, alone and behind a recipe that is right."""
    start = yaml.safe_dump(valid_recipe()) if begun else ""
    loads((start + text).encode("utf-8", "surrogatepass"))


@st.composite
def mutated(draw: Any) -> dict[str, Any]:
    """A right recipe with up to three places changed: another value, a key removed, added or misspelt."""
    made = json.loads(json.dumps(valid_recipe(plan={"order": "shuffled", "window": 4})))
    for _ in range(draw(st.integers(1, 3))):
        place = made
        while inner := [value for value in place.values() if isinstance(value, dict) and value]:
            if draw(st.booleans()):
                break
            place = draw(st.sampled_from(inner))
        keys = sorted(place, key=str)
        key = draw(st.sampled_from(keys)) if keys else "model"
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"]))
        if change == "replace":
            place[key] = draw(VALUES)
        elif change == "add":
            place[draw(NAMES | TEXTS)] = draw(VALUES)
        else:
            value = place.pop(key, None)
            if change == "rename":
                place[draw(TEXTS)] = value
    return made


@settings(FUZZ, max_examples=400)
@given(mutated())
def test_recipes_with_anything_in_any_place(content: dict[str, Any]) -> None:
    """Values of every kind, huge numbers, paths and NUL as names, keys that are no text."""
    loads(_dumped(content))


def _dumped(content: Any) -> bytes:
    """As YAML; an integer of more digits than Python prints or reads stands in for `ENDLESS`."""
    text = yaml.safe_dump(content, allow_unicode=True).replace(str(ENDLESS), "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


ODD_VALUES = [None, True, -1, 0, 10**30, 10**400, ENDLESS, -0.5, 1e308, float("inf"), float("nan"), "", "x", "a\0b"]
ODD_VALUES += ["../..", "/dev/zero", "x" * 5000, "1e400", "1e400 tokens", "9" * 5000, "\u2028", [], [[]], {}, {"x": 1}]


def places(content: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def test_the_recipe_with_almost_every_key_is_right() -> None:
    with scratch() as folder:
        (folder / "recipe.yaml").write_bytes(_dumped(FULL))
        assert isinstance(load_recipe(folder / "recipe.yaml"), Recipe)


@pytest.mark.parametrize("path", list(places(FULL)), ids=".".join)
def test_recipes_with_odd_values(path: tuple[str, ...]) -> None:
    """Every key of a recipe that has them all, with every odd value."""
    for value in ODD_VALUES:
        made = copy.deepcopy(FULL)
        place = made
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        loads(_dumped(made))


SNIPPETS = ["{[a]: b}", "{{a: 1}: b}", "2001-99-99", "2001-02-30", "!!int x", "!!float x", "!!bool x", "!!timestamp x"]
SNIPPETS += [
    "!!binary x",
    "!!set {[a]}",
    "!!omap [a]",
    "!!pairs [a]",
    "!!null x",
    "<<",
    "=",
    "!!str [a]",
    "!!map [a]",
    "!!int ''",
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_recipes_with_odd_yaml(snippet: str) -> None:
    """What YAML's own loader stumbles over, in a file and in a change."""
    text = yaml.safe_dump(valid_recipe())
    loads(f"{text}plan: {snippet}\n".encode())
    loads(text.encode(), f"plan={snippet}")


@settings(FUZZ)
@given(st.data())
def test_recipes_cut_short_or_damaged(data: st.DataObject) -> None:
    """Cut anywhere, and with one byte replaced."""
    content = yaml.safe_dump(valid_recipe()).encode()
    at = data.draw(st.integers(0, len(content)))
    loads(
        content[:at]
        if data.draw(st.booleans())
        else content[:at] + data.draw(st.binary(max_size=2)) + content[at + 1 :]
    )


@settings(FUZZ)
@given(
    st.lists(st.builds("{}{}{}".format, NAMES | TEXTS, st.sampled_from(["=", ".", ".max_steps="]), TEXTS), max_size=3)
)
def test_changes_of_any_text(changes: list[str]) -> None:
    """`--set` with anything behind it."""
    loads(yaml.safe_dump(valid_recipe()).encode(), *changes)


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 3_000, "- " * 3_000, "model: &a [*a, *a]"], ids=len)
def test_recipes_that_go_deep(text: str) -> None:
    loads(text.encode())


# --- checkpoints ------------------------------------------------------------------------------------

HASH = "0" * 32
ODD = ["../secret", "adapter/../../secret", "/etc/passwd", "/dev/zero", "..", ".", "", "a\0b", "\ud800", "x" * 300]
ODD += [
    "fifo",
    "zero",
    "loop",
    "outside/fifo",
    "outside/secret",
    "optimizer.pt/x",
    "optimizer.pt",
    STATE_FILE,
    MANIFEST,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**4000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = JSON | st.fixed_dictionaries(
    {"size": st.integers(0, 10) | JSON, "xxh3_128": st.just(HASH) | JSON}, optional={"more": JSON}
)
FILES = JSON | st.dictionaries(st.sampled_from(ODD) | st.text(max_size=6), ENTRY, max_size=5)


@contextmanager
def odd_checkpoint() -> Iterator[Path]:
    """A checkpoint with links to a pipe, to what never ends, to itself and to the folder above, which has a secret."""
    with scratch() as folder:
        (folder / "secret").write_bytes(b"secret!")
        os.mkfifo(folder / "fifo")
        checkpoint = folder / "output" / "checkpoint-1"
        (checkpoint / "adapter").mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
        with mock.patch("os.fsync"):  # which takes longer than all the rest
            write_state(checkpoint, {"step": 1})
        for name, target in (("fifo", folder / "fifo"), ("zero", "/dev/zero"), ("loop", "loop"), ("outside", folder)):
            (checkpoint / name).symlink_to(target)
        yield checkpoint


def looks_at(checkpoint: Path) -> None:
    """All that reads a checkpoint; what is opened lies in it by name, and is a regular file."""
    with watched() as seen:
        faults = ends(lambda: find_faults(checkpoint), CheckpointError)
        newest = ends(lambda: resolve(True, checkpoint.parent), CheckpointError)
        named = ends(lambda: resolve(str(checkpoint), checkpoint.parent), CheckpointError)
        state = ends(lambda: read_state(checkpoint), CheckpointError)
        assert newest_of(checkpoint.parent)[0] == (None if faults else checkpoint)
    assert isinstance(faults, list) and all(isinstance(fault, str) and fault for fault in faults)
    assert (newest is CheckpointError) == (named is CheckpointError) == bool(faults)
    assert state is CheckpointError or isinstance(state, dict)
    for name, writes in seen:
        path = Path(name).absolute()
        assert not writes and path.is_relative_to(checkpoint) and ".." not in path.parts
        assert stat.S_ISREG(path.stat().st_mode)


@settings(FUZZ)
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()), st.booleans())
def test_manifests_and_states_of_anything(content: bytes, state: bool) -> None:
    """Random bytes and random JSON in place of the manifest, or of the state."""
    with odd_checkpoint() as checkpoint:
        (checkpoint / (STATE_FILE if state else MANIFEST)).write_bytes(content)
        looks_at(checkpoint)


@settings(FUZZ, max_examples=300)
@given(FILES, st.just(1) | JSON, st.booleans())
def test_manifests_that_name_anything(files: Any, form: Any, kept: bool) -> None:
    """Parents, roots, NUL, links out of the folder, sizes of every kind: with what was there, and without."""
    with odd_checkpoint() as checkpoint:
        before = json.loads((checkpoint / MANIFEST).read_text())["files"]
        merged = {**before, **files} if kept and isinstance(files, dict) else files
        (checkpoint / MANIFEST).write_text(json.dumps({"format": form, "files": merged}))
        looks_at(checkpoint)


@settings(FUZZ)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=2), st.booleans(), st.booleans())
def test_manifests_and_states_cut_short_or_damaged(at: int, by: bytes, cut: bool, state: bool) -> None:
    with odd_checkpoint() as checkpoint:
        path = checkpoint / (STATE_FILE if state else MANIFEST)
        content = path.read_bytes()
        path.write_bytes(content[:at] if cut else content[:at] + by + content[at + 1 :])
        looks_at(checkpoint)


@pytest.mark.parametrize("name", [MANIFEST, STATE_FILE, "optimizer.pt"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "loop", "folder", "nothing"])
def test_parts_of_a_checkpoint_that_are_no_files(name: str, kind: str) -> None:
    """A pipe would be waited for and /dev/zero read for ever."""
    with odd_checkpoint() as checkpoint:
        path = checkpoint / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "nothing":
            path.symlink_to("/dev/zero" if kind == "endless" else path.name)
        looks_at(checkpoint)


@settings(FUZZ, max_examples=60)
@given(TEXTS | st.text(max_size=300))
@pytest.mark.parametrize("prefix", ["", "/"])
def test_paths_of_anything(prefix: str, text: str) -> None:
    """A path to resume from that no system could have."""
    with scratch() as folder:
        name = f"{folder}/nowhere/{text}" if prefix else f"nowhere/{text}"
        with watched() as seen:
            found = [ends(partial(resolve, name, folder), CheckpointError)]
            found += [ends(partial(function, name), CheckpointError) for function in (find_faults, newest_of)]
        expected = [CheckpointError, ["there is no such folder"], (None, [])]
        assert found == expected and not seen
