"""SIGKILL at random moments, during saves too: the finished run equals one that nobody touched, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
from kill_worker import CASES, Forked

from hf_pretrain_ext.checkpoint import last_complete_checkpoint
from hf_pretrain_ext.kill_test import KillReport, compare_runs, kill_until_done


def left_alone(case: str, folder: Path) -> Path:
    process = Forked(case, folder)
    assert process.exit_code() == 0, Path(f"{folder}.log").read_text()[-3000:]
    return folder


def killed(case: str, tmp_path: Path, kills: int, seed: int) -> KillReport:
    reference, report = left_alone(case, tmp_path / "alone"), KillReport()
    while report.kills < kills:
        # A run that came to its end before all of its kills is followed by another.
        folder = tmp_path / f"killed-{report.starts}"
        once = kill_until_done(
            functools.partial(Forked, case, folder),
            folder,
            kills - report.kills,
            seed=seed + report.starts,
            seconds=3.0,
        )
        report.kills, report.in_save = report.kills + once.kills, report.in_save + once.in_save
        report.starts += once.starts
        report.differences += compare_runs(reference, folder)
    print(f"{case}: {report}")
    return report


def test_a_few_kills(tmp_path: Path) -> None:
    """The short version: several plug-ins and dropout at once."""
    report = killed("together", tmp_path, kills=4, seed=1)
    assert report.differences == [] and report.kills == 4 and report.starts >= 5


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_many_kills(case: str, tmp_path: Path) -> None:
    report = killed(case, tmp_path, kills=int(os.environ.get("KILLS", "20")), seed=len(case))
    assert report.differences == [], report
    with open(os.environ.get("KILL_LOG", os.devnull), "a") as log:
        log.write(f"{case}: {report}\n")


def test_differences_are_seen(tmp_path: Path) -> None:
    """Negative control: one byte of the weights, one logged loss, one number of the state, a lost file."""
    first = left_alone("together", tmp_path / "a")
    second = tmp_path / "b"
    shutil.copytree(first, second)
    assert compare_runs(first, second) == []
    newest, _ = last_complete_checkpoint(second)
    assert newest is not None
    for name, change, expected in (
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "model.safetensors differs"),
        ("trainer_state.json", lambda data: data.replace(b'"loss": 4', b'"loss": 5', 1), "log["),
        ("hf_pretrain_ext/state.json", lambda data: data.replace(b'"step": 24', b'"step": 25', 1), "state.step"),
    ):
        kept = (newest / name).read_bytes()
        assert change(kept) != kept
        (newest / name).write_bytes(change(kept))
        refresh(newest, name)
        assert any(expected in line for line in compare_runs(first, second)), name
        (newest / name).write_bytes(kept)
        refresh(newest, name)
    assert compare_runs(first, second) == []
    (newest / "scheduler.pt").unlink()
    assert "one ended at checkpoint-24, the other at checkpoint-22" in compare_runs(first, second)


def refresh(checkpoint: Path, name: str) -> None:
    """The manifest as if the changed file had been written so."""
    import xxhash

    path = checkpoint / "hf_pretrain_ext" / "manifest.json"
    manifest = json.loads(path.read_text())
    data = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    path.write_text(json.dumps(manifest))


class Failing:
    def running(self) -> bool:
        return False

    def exit_code(self) -> int | None:
        return 3

    def kill(self) -> None:
        return None


def test_a_run_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended by itself, with exit code 3"):
        kill_until_done(Failing, tmp_path, kills=3)
