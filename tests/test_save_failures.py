"""A save that fails: training stops with one clear error, and the checkpoint before it is intact and resumable."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import warm

from hf_pretrain_ext import extend
from hf_pretrain_ext.checkpoint import CheckpointError, find_faults

SAVING = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1}

# A limit on the size of any file stands in for a full disk: the write that crosses it fails as one there does.
FULL = """
import resource, signal, sys
sys.path[:0] = [{tests!r}]
import test_save_failures as this
from transformers import TrainerCallback

class Fill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))

this.build({folder!r}, Fill()).train()
"""


def build(folder: Any, *callbacks: Any) -> Any:
    return extend(tiny.trainer(folder, *settings.make(settings.TOGETHER), *callbacks, **SAVING))


@pytest.mark.parametrize(
    "limit",
    [0, 20_000, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (2_000, 50_000))],
    ids=lambda limit: f"{limit} bytes",
)
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    """Wherever in the save the disk is full: at the first byte, in the weights, in the optimizer's state."""
    script = FULL.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"), limit=limit)
    done = subprocess.run([*warm.python(), "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hf_pretrain_ext.checkpoint.CheckpointError: the checkpoint "), done.stderr[-2000:]
    assert "checkpoint-6 could not be written" in last and "GB are free there. Training stops here" in last
    assert f"The newest complete checkpoint is {tmp_path / 'run' / 'checkpoint-3'}, which is intact" in last
    assert find_faults(tmp_path / "run" / "checkpoint-3") == [] != find_faults(tmp_path / "run" / "checkpoint-6")

    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_weights(whole, resumed)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the folder should go, which not even root can write through."""
    trainer = build(tmp_path)
    (tmp_path / "checkpoint-6").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written.*checkpoint-3, which is intact"):
        trainer.train()
    assert trainer.state.global_step == 6


def test_the_first_save_of_all(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    (tmp_path / "checkpoint-3").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"There is no complete one yet"):
        trainer.train()


def test_errors_that_are_not_about_files_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)

    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer, "save_model", broken)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
