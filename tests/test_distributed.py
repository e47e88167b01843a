"""Two gloo ranks through torchrun against one process with the same global batch: samples, losses, counts, resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch

pytestmark = pytest.mark.distributed


def launch(folder: Path, name: str, batch: int, steps: int, resume_from: Path | None = None) -> list[dict[str, Any]]:
    """Trains on two ranks in `folder`/`name`; what each rank saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [distributed_worker.__file__, str(folder / name), str(folder / f"{name}-out"), str(batch), str(steps)]
    if resume_from is not None:
        command.append(str(resume_from))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{name}-out-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return distributed_worker.run(folder / "one", batch=8, steps=6)[1]


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return launch(folder, "two", batch=4, steps=6)


def joined(ranks: list[dict[str, Any]], step: int) -> torch.Tensor:
    return torch.cat([rank["rows"][step] for rank in ranks])


def test_two_ranks_see_the_samples_of_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert [rank["world"] for rank in two] == [2, 2]
    for step in range(6):
        assert torch.equal(joined(two, step), one["rows"][step])


def test_two_ranks_train_as_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Losses, weights, probes within float tolerance; counts over all ranks exactly; ranks alike bit for bit."""
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    gaps = torch.cat([(two[0]["weights"][k] - v).abs().flatten() for k, v in one["weights"].items()])
    assert float(gaps.max()) < 2e-4 and float(gaps.mean()) < 2e-6
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    assert two[0]["counts"] == one["counts"]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_resume_on_two_ranks_is_bit_exact(folder: Path, two: list[dict[str, Any]]) -> None:
    resumed = launch(folder, "two-resumed", 4, 6, folder / "two" / "checkpoint-3")
    for rank in (0, 1):
        assert sorted(resumed[rank]["rows"]) == [3, 4, 5]
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        assert all(torch.equal(resumed[rank]["rows"][step], two[rank]["rows"][step]) for step in (3, 4, 5))
        assert resumed[rank]["counts"] == two[rank]["counts"]
        assert resumed[rank]["losses"] == two[rank]["losses"]


def test_one_rank_goes_on_as_two_and_two_as_one(folder: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    more = launch(folder, "one-to-two", 4, 6, folder / "one" / "checkpoint-3")
    for step in (3, 4, 5):
        assert torch.equal(joined(more, step), one["rows"][step])
    fewer = distributed_worker.run(folder / "two-to-one", 8, 6, str(folder / "two" / "checkpoint-3"))[1]
    for step in (3, 4, 5):
        assert torch.equal(fewer["rows"][step], one["rows"][step])
    assert more[0]["counts"] == fewer["counts"] == one["counts"]


def test_accelerate_that_starts_one_process_is_noticed(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one, silently; we say so."""
    script = tmp_path / "one.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny\n"
        "from hf_pretrain_ext import extend\n"
        f"extend(tiny.trainer({str(tmp_path / 'out')!r}))\n"
    )
    for number, said in ((2, True), (1, False)):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(number)]
        done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("asked for 2 processes and started one" in done.stderr) == said
