"""A new stage on two gloo ranks: one rank looks, all agree, and the outcome is that of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import continuing_worker
import pytest
import torch
import warm

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stages")
    continuing_worker.first(made / "first", made / "rows")
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return continuing_worker.stage(str(folder / "first" / "checkpoint-4"), folder / "one")


def launch(folder: Path, name: str, base: str, where: str = "ddp") -> list[dict[str, Any]]:
    command = warm.ranks(2)
    command += [
        continuing_worker.__file__,
        base,
        str(folder / "rows"),
        str(folder / name),
        str(folder / f"{name}-out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, where], capture_output=True, text=True, env=environment, timeout=300)
    found = [folder / f"{name}-out-{rank}.pt" for rank in (0, 1)]
    assert all(path.is_file() for path in found) and done.returncode == 0, done.stderr[-4000:]
    return [torch.load(path, weights_only=True) for path in found]


@pytest.mark.parametrize("where", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_stage_on_two_ranks_is_that_of_one(where: str, folder: Path, one: dict[str, Any]) -> None:
    """History, counts and rates exactly; weights and figures within float tolerance; ranks alike bit for bit."""
    two = launch(folder, where, str(folder / "first" / "checkpoint-4"), where)
    for rank in two:
        assert rank["world"] == 2 and rank["earlier"] == one["earlier"] == ["stage-1"]
        assert rank["counts"] == one["counts"]
    assert two[0]["log"] == two[1]["log"] and len(two[0]["log"]) == len(one["log"])
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours.get("learning_rate") == theirs.get("learning_rate")
        assert ours.get("backward_transfer", 0) == pytest.approx(theirs.get("backward_transfer", 0), abs=1e-5)
    assert all(torch.equal(two[0]["weights"][name], weight) for name, weight in two[1]["weights"].items())
    gaps = torch.cat([(two[0]["weights"][name] - weight).abs().flatten() for name, weight in one["weights"].items()])
    assert float(gaps.max()) < 2e-4


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse(folder: Path) -> None:
    """A damaged checkpoint, and weights for a model that is split over ranks: no rank is left waiting."""
    damaged = folder / "damaged" / "checkpoint-4"
    shutil.copytree(folder / "first" / "checkpoint-4", damaged)
    (damaged / "optimizer.pt").unlink()
    refused = launch(folder, "refused", str(damaged))
    assert refused[0] == refused[1] and "optimizer.pt is missing" in refused[0]["refused"]
    split = launch(folder, "split", str(folder / "first" / "checkpoint-4"), "fsdp2 with weights")
    assert split[0] == split[1] and "split over ranks" in split[0]["refused"] and "carry=()" in split[0]["refused"]
