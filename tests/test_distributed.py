"""Two gloo ranks through torchrun against one process with the same global batch: samples, losses, counts, resumes.

DDP, FSDP2 (a model sharded while it is loaded), and DeepSpeed's ZeRO-2 and ZeRO-3 where deepspeed is installed:
`make test-distributed` does that, `make deepspeed` puts it into the environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
import warm

from hf_pretrain_ext.checkpoint import find_faults

pytestmark = pytest.mark.distributed

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make deepspeed"
)
WHERE = ["ddp", "fsdp2", *(pytest.param(where, marks=needs_deepspeed) for where in ("zero2", "zero3"))]
RESUMABLE = ["ddp", *(pytest.param(w, marks=[needs_deepspeed, pytest.mark.slow]) for w in ("zero2", "zero3"))]


def start(folder: Path, name: str, where: str, ranks: int = 2, **arguments: Any) -> subprocess.CompletedProcess[str]:
    cold = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    # DeepSpeed looks at its environment as it is imported.
    command = cold if where.startswith("zero") else warm.ranks(ranks)
    command += [distributed_worker.__file__, str(folder / name), str(folder / f"{name}-out"), where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True, env=environment)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    return done


def launch(folder: Path, name: str, where: str = "ddp", **arguments: Any) -> list[dict[str, Any]]:
    """Trains on two ranks in `folder`/`name`; what each rank saw."""
    done = start(folder, name, where, **arguments)
    found = [folder / f"{name}-out-{rank}.pt" for rank in (0, 1)]
    # Under DeepSpeed a process may abort at its exit, with all done and written.
    complete = all(path.is_file() for path in found)
    assert complete and (done.returncode == 0 or where.startswith("zero")), done.stderr[-4000:]
    return [torch.load(path, weights_only=True) for path in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return distributed_worker.run(folder / "one")[1]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Any:
    """The run on two ranks, made once for each way to share a model."""
    made: dict[str, list[dict[str, Any]]] = {}

    def run(where: str) -> list[dict[str, Any]]:
        if where not in made:
            made[where] = launch(folder, where, where)
        return made[where]

    return run


def joined(ranks: list[dict[str, Any]], step: int) -> torch.Tensor:
    return torch.cat([rank["rows"][step] for rank in ranks])


@pytest.mark.parametrize("where", WHERE)
def test_two_ranks_see_the_samples_of_one_and_train_as_one(where: str, one: dict[str, Any], runs: Any) -> None:
    """Samples and counts exactly; losses, weights, probes within float tolerance; ranks alike bit for bit."""
    two = runs(where)
    assert [rank["world"] for rank in two] == [2, 2]
    assert all(torch.equal(joined(two, step), one["rows"][step]) for step in range(6))
    assert two[0]["counts"] == two[1]["counts"] == one["counts"]
    assert len(two[0]["log"]) == 6
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["learning_rate"] == theirs["learning_rate"]
    # DeepSpeed's names leave out weights that are tied to others.
    gaps = torch.cat([(weight - one["weights"][name]).abs().flatten() for name, weight in two[0]["weights"].items()])
    assert {*one["weights"], *two[0]["weights"]} - {*two[0]["weights"]} <= {"lm_head.weight"}
    assert float(gaps.max()) < 2e-4 and float(gaps.mean()) < 2e-6
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    assert len(one["losses"]) == 7 and two[0]["losses"] == two[1]["losses"]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("where", RESUMABLE)
def test_resume_on_two_ranks_is_bit_exact(where: str, folder: Path, runs: Any) -> None:
    two = runs(where)
    resumed = launch(folder, f"{where}-resumed", where, resume_from=str(folder / where / "checkpoint-3"))
    for rank in (0, 1):
        assert sorted(resumed[rank]["rows"]) == [3, 4, 5]
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        assert all(torch.equal(resumed[rank]["rows"][step], two[rank]["rows"][step]) for step in (3, 4, 5))
        for part in ("counts", "losses", "log"):
            assert resumed[rank][part] == two[rank][part], part


def test_one_rank_goes_on_as_two_and_two_as_one(folder: Path, one: dict[str, Any], runs: Any) -> None:
    runs("ddp")
    more = launch(folder, "one-to-two", resume_from=str(folder / "one" / "checkpoint-3"))
    for step in (3, 4, 5):
        assert torch.equal(joined(more, step), one["rows"][step])
    fewer = distributed_worker.run(folder / "two-to-one", resume_from=str(folder / "ddp" / "checkpoint-3"))[1]
    for step in (3, 4, 5):
        assert torch.equal(fewer["rows"][step], one["rows"][step])
    assert more[0]["counts"] == fewer["counts"] == one["counts"]


def test_fsdp2_checkpoints_are_no_resume_and_say_so(folder: Path, runs: Any) -> None:
    """The host saves no optimizer state for a model that was sharded while it was loaded."""
    runs("fsdp2")
    assert "optimizer state, so that this run cannot be resumed" in (folder / "fsdp2.log").read_text()
    saved = folder / "fsdp2" / "checkpoint-3"
    assert find_faults(saved) == [] and (saved / "model.safetensors").is_file()
    with pytest.raises(
        ValueError, match="as the host saves every model that is sharded while it is loaded: it has no"
    ):
        distributed_worker.run(folder / "fsdp2-on-one", resume_from=str(saved))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("where", ["zero2", "zero3"])
def test_zero_checkpoints_are_watched_file_by_file(where: str, folder: Path, runs: Any, tmp_path: Path) -> None:
    runs(where)
    shutil.copytree(folder / where / "checkpoint-3", tmp_path / "checkpoint-3")
    assert find_faults(tmp_path / "checkpoint-3") == []
    shard = "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "checkpoint-3" / shard).unlink()
    assert find_faults(tmp_path / "checkpoint-3") == [f"{shard} is missing"]


@needs_deepspeed
@pytest.mark.slow
def test_a_zero_checkpoint_is_refused_where_its_shards_do_not_fit(folder: Path, runs: Any) -> None:
    """The host would go on without optimizer state on DDP, DeepSpeed would fail later on another number of ranks."""
    runs("zero2")
    saved = str(folder / "zero2" / "checkpoint-3")
    with pytest.raises(ValueError, match="sharding: 'zero2 on 2 ranks' → None"):
        distributed_worker.run(folder / "zero2-on-one", resume_from=saved)
    arguments = {"resume_from": saved, "per_device_train_batch_size": 8}
    done = start(folder, "zero2-on-one-rank", "zero2", ranks=1, **arguments)
    assert done.returncode and "sharding: 'zero2 on 2 ranks' → 'zero2 on 1 rank'" in done.stderr


@needs_deepspeed
@pytest.mark.slow
def test_a_zero_checkpoint_on_sigterm_is_the_end_of_its_step(folder: Path, runs: Any) -> None:
    """DeepSpeed has updated the weights by the moment that the host saves at: the step is finished, then saved."""
    whole = runs("zero2")
    stopped = launch(folder, "zero2-sigterm", "zero2", save_inside=4, save_steps=100)
    assert [rank["step"] for rank in stopped] == [5, 5]
    assert [path.name for path in (folder / "zero2-sigterm").glob("checkpoint-*")] == ["checkpoint-5"]
    saved = str(folder / "zero2-sigterm" / "checkpoint-5")
    resumed = launch(folder, "zero2-sigterm-resumed", "zero2", resume_from=saved)
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in whole[rank]["weights"].items())
        assert resumed[rank]["counts"] == whole[rank]["counts"] and resumed[rank]["losses"] == whole[rank]["losses"]


REFUSED_UNDER_ZERO = """
import sys
sys.path.insert(0, {tests!r})
import distributed_worker, settings, tiny
from hf_pretrain_ext import extend

def refusal(on_nonfinite=None, **more):
    config = {{**distributed_worker.zero(2), **more}}
    trainer = tiny.trainer({folder!r}, *settings.make(settings.TOGETHER), deepspeed=config)
    try:
        extend(trainer, on_nonfinite=on_nonfinite)
    except ValueError as error:
        return str(error)

print("1:", refusal(scheduler={{"type": "WarmupLR", "params": {{}}}}))
print("2:", refusal(on_nonfinite="skip"))
print("3:", refusal())
"""


@needs_deepspeed
def test_what_deepspeed_would_take_over_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "refused.py"
    script.write_text(REFUSED_UNDER_ZERO.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert "1: 1 problem with the plug-ins" in done.stdout, done.stderr[-3000:]
    assert "rewarm: the DeepSpeed settings have a 'scheduler' of their own, which would win" in done.stdout
    assert "on_nonfinite: 'skip' would leave out an update that DeepSpeed makes in the backward pass" in done.stdout
    assert "3: None" in done.stdout


@pytest.mark.slow
def test_a_stream_as_training_data_on_two_ranks(folder: Path) -> None:
    """The rows of one process, and a bit-exact resume: every rank reads the whole stream and keeps its own rows."""
    arguments = {"streamed": True, "plugins": ("replay-stream", "rewarm"), "dataloader_num_workers": 1}
    one = distributed_worker.run(folder / "stream-one", **arguments)[1]
    two = launch(folder, "stream-two", **arguments)
    assert all(torch.equal(joined(two, step), one["rows"][step]) for step in range(6))
    assert two[0]["counts"] == one["counts"]
    saved = str(folder / "stream-two" / "checkpoint-3")
    resumed = launch(folder, "stream-resumed", resume_from=saved, **arguments)
    for rank in (0, 1):
        assert sorted(resumed[rank]["rows"]) == [3, 4, 5]
        assert all(torch.equal(resumed[rank]["rows"][step], two[rank]["rows"][step]) for step in (3, 4, 5))
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        assert resumed[rank]["counts"] == two[rank]["counts"]


@pytest.mark.parametrize(("number", "said"), [(2, True), pytest.param(1, False, marks=pytest.mark.slow)])
def test_accelerate_that_starts_one_process_is_noticed(number: int, said: bool, tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one, silently; we say so."""
    script = tmp_path / "one.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny\n"
        "from hf_pretrain_ext import extend\n"
        f"extend(tiny.trainer({str(tmp_path / 'out')!r}))\n"
    )
    # The command that it was started with is looked at, so it needs one of its own.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(number)]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("asked for 2 processes and started one" in done.stderr) == said


@pytest.mark.slow
def test_projected_gradients_on_two_ranks(folder: Path) -> None:
    """GradNormLoRP: ranks alike bit for bit, a resume too; one process within what signs of small gradients do."""
    plugins = ["gradnormlorp"]
    alone = distributed_worker.run(folder / "projected-one", plugins=tuple(plugins))[1]
    two = launch(folder, "projected", plugins=plugins)
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    gaps = torch.cat([(weight - alone["weights"][name]).abs().flatten() for name, weight in two[0]["weights"].items()])
    assert float(gaps.max()) < 2e-3 and float(gaps.mean()) < 1e-5
    resumed = launch(folder, "projected-resumed", plugins=plugins, resume_from=str(folder / "projected/checkpoint-3"))
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        assert resumed[rank]["log"] == two[rank]["log"]


@pytest.mark.parametrize("where", ["fsdp2", *(pytest.param(w, marks=needs_deepspeed) for w in ("zero2", "zero3"))])
@pytest.mark.slow
def test_projected_gradients_refuse_what_is_sharded(where: str, folder: Path) -> None:
    done = start(folder, f"projected-{where}", where, plugins=["gradnormlorp"])
    assert done.returncode != 0
    assert "gradnormlorp: " in done.stderr and "needs whole matrices" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp", "fsdp2"])
def test_reptile_on_two_ranks(where: str, folder: Path) -> None:
    """As one process up to rounding; the ranks alike; under DDP a resume inside an interval is bit-exact."""
    plugins = ["reptile", "replay"]
    alone = distributed_worker.run(folder / f"reptile-one-{where}", plugins=tuple(plugins))[1]
    two = launch(folder, f"reptile-{where}", where, plugins=plugins)
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    for name, weight in two[0]["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=2e-5)
    if where == "ddp":
        saved = str(folder / "reptile-ddp" / "checkpoint-3")
        resumed = launch(folder, "reptile-resumed", plugins=plugins, resume_from=saved)
        for rank in (0, 1):
            assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())


@needs_deepspeed
def test_reptile_is_refused_where_deepspeed_would_undo_it(folder: Path) -> None:
    done = start(folder, "reptile-zero", "zero2", plugins=["reptile"])
    assert done.returncode != 0 and "its next step would undo the interpolation" in done.stderr


@pytest.mark.slow
def test_benchmarks_on_two_ranks(folder: Path) -> None:
    """One rank asks, all hold its figures, and those are of one process; training goes on as without."""
    alone, content = distributed_worker.run(folder / "benchmarks-one", plugins=("benchmarks", "forgetting"))
    two = launch(folder, "benchmarks-two", "ddp", plugins=["benchmarks", "forgetting"])
    found = json.loads((folder / "benchmarks-two" / "benchmarks.json").read_text())
    plugin = next(plugin for plugin in alone.plugin_run.plugins if plugin.name == "benchmarks")
    assert found["before"] == plugin.found["before"] and set(found["after"]) == {"letters"}
    assert two[0]["step"] == two[1]["step"] == 6
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    assert two[0]["losses"] == two[1]["losses"]
    assert two[0]["losses"] == pytest.approx(content["losses"], abs=1e-5)


@pytest.mark.parametrize("plugin", ["meta_tokens", pytest.param("meta_tokens-lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["ddp", *WHERE[2:]])
@pytest.mark.slow
def test_meta_tokens_on_two_ranks(where: str, plugin: str, folder: Path) -> None:
    """Samples with the meta-tokens that one process gives them; the ranks alike; a resume that is bit-exact."""
    if where == "zero3" and plugin == "meta_tokens-lora":
        done = start(folder, "meta-zero3", where, plugins=[plugin])
        assert done.returncode != 0 and "ZeRO-3 splits the token's row, which is trained alone" in done.stderr
        return
    plugins = [plugin, "replay"]
    # Dropout of an adapter follows the micro-batches.
    alone = distributed_worker.run(folder / f"{plugin}-one-{where}", plugins=tuple(plugins))[1]
    two = launch(folder, f"{plugin}-{where}", where, plugins=plugins)
    assert all(torch.equal(joined(two, step), alone["rows"][step]) for step in range(6))
    assert two[0]["counts"] == two[1]["counts"] == alone["counts"]
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    if plugin == "meta_tokens":
        for name, weight in two[0]["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=2e-5)
    saved = str(folder / f"{plugin}-{where}" / "checkpoint-3")
    resumed = launch(folder, f"{plugin}-again-{where}", where, plugins=plugins, resume_from=saved)
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        assert resumed[rank]["counts"] == two[rank]["counts"] and resumed[rank]["log"] == two[rank]["log"]


@pytest.mark.slow
def test_meta_tokens_of_an_sft_trainer_on_two_ranks(folder: Path) -> None:
    """Rows and batches are TRL's: samples and counts of one process, weights up to rounding, an exact resume."""
    given: dict[str, Any] = {"plugins": ["meta_tokens", "rewarm"], "sft": True}
    alone = distributed_worker.run(folder / "sft-one", "ddp", **{**given, "plugins": ("meta_tokens", "rewarm")})[1]
    two = launch(folder, "sft-two", "ddp", **given)
    assert all(torch.equal(joined(two, step), alone["rows"][step]) for step in range(6))
    assert two[0]["counts"] == two[1]["counts"] == alone["counts"]
    assert [line["loss"] for line in two[0]["log"]] == pytest.approx([line["loss"] for line in alone["log"]], abs=1e-4)
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name])
        torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=2e-5)
    resumed = launch(folder, "sft-again", "ddp", **given, resume_from=str(folder / "sft-two" / "checkpoint-3"))
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
        # TRL counts from 0 again.
        logs = [[{**line, "num_tokens": None} for line in run[rank]["log"]] for run in (resumed, two)]
        assert logs[0] == logs[1]


@pytest.mark.slow
def test_meta_tokens_refuse_a_model_that_is_sharded_already(folder: Path) -> None:
    done = start(folder, "meta-fsdp2", "fsdp2", plugins=["meta_tokens"])
    assert done.returncode != 0 and "what is put into a model that is sharded already would not be" in done.stderr


DOCUMENTS = ["metadata", "replay-documents"]


@pytest.mark.parametrize("where", ["ddp", *(pytest.param(w, marks=pytest.mark.slow) for w in ("fsdp2",)), *WHERE[2:]])
@pytest.mark.slow
def test_metadata_on_two_ranks(where: str, folder: Path) -> None:
    """Blocks with metadata, their cooldown and replay beside them: the samples of one process, and a resume."""
    one = distributed_worker.run(folder / f"documents-one-{where}", plugins=tuple(DOCUMENTS))[1]
    two = launch(folder, f"documents-{where}", where, plugins=DOCUMENTS)
    assert all(torch.equal(joined(two, step), one["rows"][step]) for step in range(6))
    assert two[0]["counts"] == two[1]["counts"] == one["counts"]
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    if where != "fsdp2":
        saved = str(folder / f"documents-{where}" / "checkpoint-3")
        resumed = launch(folder, f"documents-again-{where}", where, plugins=DOCUMENTS, resume_from=saved)
        for rank in (0, 1):
            assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())
            assert resumed[rank]["counts"] == two[rank]["counts"]


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["metadata-control", "metadata-segments"])
@pytest.mark.parametrize("where", ["ddp", *WHERE[2:]])
def test_control_tokens_on_two_ranks(where: str, plugin: str, folder: Path) -> None:
    """Rows that every rank gives its model, where it had room (the first) and where it had not: as in one process."""
    name = f"{plugin}-{where}"
    one = distributed_worker.run(folder / f"{name}-one", plugins=(plugin,))[1]
    two = launch(folder, name, where, plugins=[plugin])
    assert all(torch.equal(joined(two, step), one["rows"][step]) for step in range(6))
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    gaps = [(weight - one["weights"][key]).abs().max().item() for key, weight in two[0]["weights"].items()]
    assert max(gaps) < 2e-4
    assert all(torch.equal(two[0]["weights"][key], weight) for key, weight in two[1]["weights"].items())
    resumed = launch(folder, f"{name}-again", where, plugins=[plugin], resume_from=str(folder / name / "checkpoint-3"))
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank]["weights"][key], v) for key, v in two[rank]["weights"].items())


@pytest.mark.slow
def test_control_tokens_are_refused_where_embeddings_are_sharded(folder: Path) -> None:
    done = start(folder, "control-fsdp2", "fsdp2", plugins=["metadata-control"])
    assert done.returncode != 0 and "the embeddings of the model are sharded" in done.stderr
