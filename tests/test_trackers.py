"""What trackers show: the documented names (docs/logging.md), and the values of the log at their steps."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import warm

from hf_pretrain_ext import continue_from, extend
from hf_pretrain_ext.callbacks import ForgettingCallback

ROOT = Path(__file__).resolve().parents[1]
HOST = {
    "loss", "grad_norm", "learning_rate", "epoch", "step", "train_runtime", "train_samples_per_second",
    "train_steps_per_second", "train_loss", "total_flos", "num_input_tokens_seen",
}  # fmt: skip
ROWS = [
    "replay", "replay-mixture", "meta_tokens", "reptile", "buffer", "l2_init", "self_distillation",
    "self_distillation-features", "forgetting", "benchmarks", "rewarm", "gradnormlorp", "metadata",
]  # fmt: skip
STAGES_ONLY = {"life_forgetting_<set>", "life_gain_<set>", "backward_transfer"}


def documented() -> list[str]:
    table = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "logging.md").read_text("utf-8"), flags=re.MULTILINE)
    return [name for cell in table for name in re.findall(r"`([^`]+)`", cell)]


def matching(name: str) -> list[str]:
    """The documented names that `name` is one of."""
    return [each for each in documented() if re.fullmatch(re.sub(r"<\w+>", r"[\\w.-]+", each), name)]


def logged(trainer: Any) -> set[str]:
    return {key for line in trainer.state.log_history for key in line} - HOST


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Of one short run a plug-in."""
    found = {}
    for name in [*ROWS, "meta_tokens-fixed"]:
        row = settings.by_name(name.removesuffix("-fixed"))
        plugin = settings.meta_tokens(length="fixed") if name.endswith("-fixed") else row.make()
        trainer = extend(tiny.trainer(tmp_path_factory.mktemp(name), plugin, **row.trainer()))
        trainer.train()
        found[name] = logged(trainer)
    return found


def test_every_name_that_is_logged_is_documented(names: dict[str, set[str]]) -> None:
    assert {key: name for name, keys in names.items() for key in keys if not matching(key)} == {}


def test_every_documented_name_is_logged(names: dict[str, set[str]]) -> None:
    seen = {each for keys in names.values() for key in keys for each in matching(key)}
    assert set(documented()) - seen == STAGES_ONLY


def test_names_over_the_life_of_a_model(tmp_path: Path) -> None:
    held = tiny.rows(10, seed=9)
    extend(
        tiny.trainer(tmp_path / "a", ForgettingCallback({"old": held}, every=3), save_strategy="steps", save_steps=6)
    ).train()
    second = extend(tiny.trainer(tmp_path / "b", ForgettingCallback({"old": held}, every=3)))
    continue_from(second, tmp_path / "a" / "checkpoint-6")
    second.train()
    keys = logged(second)
    assert {each for key in keys for each in matching(key)} >= STAGES_ONLY
    assert all(matching(key) for key in keys)


def observed(folder: Path, **given: Any) -> Any:
    trainer = tiny.trainer(folder, *settings.make(("replay", "forgetting", "reptile")), **given)
    extend(trainer).train()
    return trainer


def expected(trainer: Any) -> dict[str, list[tuple[int, float]]]:
    """By the host's documented rule for names, from the log history."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in trainer.state.log_history:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, []).append((line["step"], value))
    return found


def test_tensorboard_shows_every_scalar_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = observed(tmp_path / "run", report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    wanted = expected(trainer)
    assert {"train/replay_ratio", "eval/old_loss", "train/reptile_displacement"} <= set(wanted)
    for name, values in wanted.items():
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in values], name
        # TensorBoard keeps 32 bits.
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(shown, values, strict=True)), name


TRACKIO = """
import json, sys
sys.path.insert(0, {tests!r})
import settings, test_trackers, trackio
from pathlib import Path

given = dict(report_to=["trackio"], project="ours", run_name="one", trackio_static_space_id=False)
trainer = test_trackers.observed(Path({folder!r}), **given)
shown = trackio.SQLiteStorage.get_logs("ours", "one")
Path({folder!r}, "found.json").write_text(json.dumps([test_trackers.expected(trainer), shown]))
"""


def test_trackio_shows_every_scalar_at_its_step(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where to keep its files as it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    script = TRACKIO.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*warm.python(), "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, shown = json.loads((tmp_path / "found.json").read_text())
    assert {"train/replay_ratio", "eval/old_loss", "train/reptile_displacement"} <= set(wanted)
    # What the host says once, at the end, it sends without the step.
    summary = {"train/total_flos"} | {name for name in wanted if name.startswith("train/train_")}
    for name in set(wanted) - summary:
        found = [[line["train/global_step"], line[name]] for line in shown if name in line]
        assert found == wanted[name], name
