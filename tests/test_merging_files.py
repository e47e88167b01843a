"""Files of merged checkpoints: the format, memory that does not grow with the model, and whole folders or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import warm
from safetensors import safe_open
from safetensors.torch import save_file

from hf_pretrain_ext import merging
from hf_pretrain_ext.merging import MergeError, checkpoints, writer
from hf_pretrain_ext.merging.checkpoints import SafetensorsFile, Spec, open_checkpoint, pieces
from tests.merging_checkpoints import copied, edit_weights, make_checkpoints, same_bits, state_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


# The format


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "w.bf16": torch.randn(7, 3).bfloat16(),
        "w.fp32": torch.randn(5),
        "ä.fp32": torch.randn(2, 2, 2),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(9),
    }


def written(folder: Path, tensors: dict[str, torch.Tensor], most: int) -> dict[str, dict[str, Any]]:
    def pieces_of(key: str) -> Iterator[torch.Tensor]:
        flat = tensors[key].reshape(-1)
        for start in range(0, flat.numel(), 4):
            yield flat[start : start + 4]

    specs = {key: Spec(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    return writer.write_shards(folder, specs, pieces_of, most)


def test_a_file_is_what_the_library_writes(tmp_path: Path) -> None:
    """Byte for byte: floats of two widths, whose order the library's is."""
    tensors = {key: value for key, value in some_tensors().items() if key.startswith(("w.", "ä"))}
    written(tmp_path, tensors, 10**9)
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.parametrize("most", [1, 40, 10**9])
def test_shards_and_their_index(tmp_path: Path, most: int) -> None:
    tensors = some_tensors()
    files = written(tmp_path, tensors, most)
    assert same_bits_of(state_of(tmp_path), tensors)
    assert sorted(files) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            data = sum(file.get_tensor(key).nbytes for key in file.keys())
            assert data <= most or len(file.keys()) == 1 + ("none" in file.keys())
    if most == 10**9:
        assert list(files) == ["model.safetensors"] and not (tmp_path / "model.safetensors.index.json").exists()
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        for key, name in index["weight_map"].items():
            with safe_open(tmp_path / name, "pt") as file:
                assert key in file.keys()


def same_bits_of(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return found.keys() == other.keys() and all(
        found[key].dtype is value.dtype and torch.equal(found[key], value) for key, value in other.items()
    )


def test_tensors_come_in_pieces_and_files_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PIECE", 5)
    monkeypatch.setattr(checkpoints, "_RENEW", 30)
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    openings = []
    monkeypatch.setattr(
        "safetensors.safe_open", lambda *given, **settings: openings.append(given) or safe_open(*given, **settings)
    )
    for key, value in tensors.items():
        assert file.specs[key] == Spec(value.dtype, tuple(value.shape))
        found = [file.read(key, *place) for place in pieces(value.numel())]
        assert all(piece.numel() <= 5 for piece in found)
        assert torch.equal(torch.cat([*found, value.new_zeros(0)]), value.reshape(-1))
    assert len(openings) >= 4


def test_merging_in_pieces_changes_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = [folders[name] for name in ("base", "instruct", "adapted")]
    whole = merging.instruction_residual(*three, output=tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "PIECE", 7)
    split = merging.instruction_residual(*three, output=tmp_path / "split", max_shard_size=1000)
    assert same_bits(state_of(whole), state_of(split))


# Memory

MEASURE = """
import json, re, sys, time
from pathlib import Path
from hf_pretrain_ext import merging

def figure(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def measured(call):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = figure("VmRSS"), time.perf_counter()
    call()
    return figure("VmHWM") - before, time.perf_counter() - start

root = Path(sys.argv[1])
names = ("base", "instruct", "adapted")
def merge(size, number):
    three = [root / size / name for name in names]
    return lambda: merging.instruction_residual(*three, output=root / size / f"out{number}", max_shard_size="24MB")
measured(merge("small", 0))  # what is imported on the way is no part of it
print(json.dumps({size: measured(merge(size, 1)) for size in ("small", "large")}))
"""


def write_large(folder: Path, blocks: int, seed: int) -> int:
    """A checkpoint of `blocks` files of 16.8 MB and one of 33.6 MB; its bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "homemade", "num_hidden_layers": blocks}))
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(1 << 20, generator=generator).bfloat16()
    shards = [{f"layers.{n}.w": (pattern + n).repeat(8).reshape(2048, 4096)} for n in range(blocks)]
    shards.append({"embed.w": pattern.repeat(16).reshape(8192, 2048)})
    weight_map = {}
    for n, shard in enumerate(shards):
        name = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(value.nbytes for shard in shards for value in shard.values())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks of memory are read from Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes = {}
    for size, blocks in (("small", 2), ("large", 10)):
        for seed, name in enumerate(("base", "instruct", "adapted")):
            sizes[size] = write_large(tmp_path / size / name, blocks, seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_PRETRAIN_EXT_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for size, (peak, seconds) in found.items():
        print(
            f"{size}: three checkpoints of {sizes[size] / 1e6:.0f} MB each merged in {seconds:.1f} s, "
            f"{peak / 1e6:.0f} MB of memory at most above what there was"
        )
    assert sizes["large"] == 3 * sizes["small"] == 201326592
    # A piece of each input and what is computed of them, in float32, and what is still mapped of each file.
    assert found["large"][0] < 120e6 < 0.2 * 3 * sizes["large"]
    assert found["large"][0] < found["small"][0] + 60e6
    output = open_checkpoint(tmp_path / "large" / "out1", "output")
    assert len(output.files) == 11
    three = [open_checkpoint(tmp_path / "large" / name, name) for name in ("base", "instruct", "adapted")]
    base, instruct, adapted = (each.matrix("layers.9.w").double() for each in three)
    assert torch.equal(output.matrix("layers.9.w"), (adapted + (instruct - base)).bfloat16())
    shutil.rmtree(tmp_path / "large")


# Whole, or not at all


def test_a_folder_that_is_not_empty_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    two = [folders["base"], folders["adapted"]]
    merging.average(two, output=output)  # empty: nothing is lost
    (output / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(MergeError, match=r"output=.*out is not empty: name another folder, or set overwrite=True"):
        merging.average([folders["base"], folders["instruct"]], output=output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    merging.average([folders["base"], folders["instruct"]], output=output, overwrite=True)
    assert not (output / "notes.txt").exists()
    assert (output / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_merge_that_fails_leaves_what_was_there(folders: dict[str, Path], tmp_path: Path, overwrite: bool) -> None:
    def break_last(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"][0] = float("nan")

    broken = edit_weights(copied(folders["adapted"], tmp_path / "broken"), break_last)
    output = tmp_path / "out"
    if overwrite:
        merging.average([folders["base"], folders["adapted"]], output=output)
        before = (output / "model.safetensors").read_bytes()
    with pytest.raises(MergeError, match="holds NaN"):
        merging.average([folders["base"], broken], output=output, overwrite=overwrite, max_shard_size="2KB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"][: 1 + overwrite]
    if overwrite:
        assert (output / "model.safetensors").read_bytes() == before


KILLED = """
import os, signal, sys
from hf_pretrain_ext import merging
from hf_pretrain_ext.merging import merge

# The last thing before the folder takes its name.
merge.write_json = lambda path, content: os.kill(os.getpid(), signal.SIGKILL)
merging.average([sys.argv[1], sys.argv[2]], output=sys.argv[3], overwrite=True)
"""


def test_a_kill_leaves_what_was_there(folders: dict[str, Path], tmp_path: Path) -> None:
    for output in (tmp_path / "new", tmp_path / "old"):
        if output.name == "old":
            merging.average([folders["base"], folders["adapted"]], output=output)
            before = {path.name: path.read_bytes() for path in output.iterdir()}
        command = [*warm.python(), "-c", KILLED, str(folders["base"]), str(folders["instruct"]), str(output)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    # What the killed ones had written is under names of its own, and in nobody's way.
    left = [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert len(left) == 2 and all(name.startswith((".new.", ".old.")) for name in left)
    merging.average([folders["base"], folders["instruct"]], output=tmp_path / "new")


def test_inputs_are_never_the_output(folders: dict[str, Path], tmp_path: Path) -> None:
    base = copied(folders["base"], tmp_path / "models" / "base")
    for output in (base, tmp_path / "models", tmp_path / "models" / "x" / ".." / "base"):
        with pytest.raises(MergeError, match=r"is, or holds, the input .*: name another folder"):
            merging.average([base, folders["adapted"]], output=output, overwrite=True)
    assert same_bits(state_of(base), state_of(folders["base"]))
    merging.average([base, folders["adapted"]], output=base / "merged")


def test_an_input_behind_a_link_is_never_the_output(folders: dict[str, Path], tmp_path: Path) -> None:
    """The link may be above the output, or above the input."""
    base = copied(folders["base"], tmp_path / "real" / "base")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for given, output in ((base, tmp_path / "link" / "base"), (tmp_path / "link" / "base", base)):
        with pytest.raises(MergeError, match=r"is, or holds, the input .*: name another folder"):
            merging.average([given, folders["adapted"]], output=output, overwrite=True)
    assert same_bits(state_of(base), state_of(folders["base"]))


def test_an_output_that_is_no_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(MergeError, match="is a file or a link"):
            merging.average([folders["base"], folders["adapted"]], output=tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_seen_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match=r"output=.* needs 1.14e-05 GB, and 1e-09 GB are free there"):
        merging.average([folders["base"], folders["adapted"]], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Inputs that cannot be read


def test_broken_checkpoints_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(MergeError, match=message):
            merging.average([folders["base"], folder], output=tmp_path / "out")
        shutil.rmtree(folder)

    folder = copied(folders["instruct"], tmp_path / "x")
    (folder / "model-00002-of-00005.safetensors").unlink()
    refused(folder, r"checkpoints\[1\]=.* lacks model-00002-of-00005.safetensors \(1 files\)$")
    folder = copied(folders["instruct"], tmp_path / "x")
    part = folder / "model-00002-of-00005.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    refused(folder, r"model-00002-of-00005.safetensors cannot be read: SafetensorError")
    folder = copied(folders["instruct"], tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.other.weight"] = "model-00001-of-00005.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"index lists tensors that are not in the files it names: model.other.weight \(1 in all\)")
    folder = copied(folders["instruct"], tmp_path / "x")
    del index["weight_map"]["model.other.weight"], index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"its files hold tensors that its index does not list, .*: model.norm.weight \(1 in all\)")
    folder = copied(folders["instruct"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "foo"}))
    refused(folder, r"config.json holds what no config may \(.*hidden_size")
    folder = copied(folders["instruct"], tmp_path / "x")
    index["weight_map"]["model.other.weight"] = "../base/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names '../base/model.safetensors', which is no file of its folder")
    folder = copied(folders["instruct"], tmp_path / "x")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "model.safetensors.index.json holds no JSON object")
    folder = copied(folders["base"], tmp_path / "x")
    (folder / "config.json").write_text("{")
    refused(folder, r"config.json cannot be read: JSONDecodeError")
    folder = copied(folders["base"], tmp_path / "x")
    (folder / "config.json").unlink()
    refused(folder, r"checkpoints\[1\]=.* has no config.json: give a folder that save_pretrained wrote")
    folder = copied(folders["base"], tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"lacks model.safetensors \(1 files\) \(pickled weights are not read: load the model and save it")
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"is an adapter: load it on its base with PeftModel.from_pretrained, then merge_and_unload\(\)")


# Names on the Hub, from its cache


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub; what is put into it is found offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path, name: str, folder: Path, commit: str) -> None:
    place = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


def test_names_on_the_hub(folders: dict[str, Path], tmp_path: Path, hub: Path) -> None:
    publish(hub, "org/tuned", folders["instruct"], COMMIT)
    publish(hub, "org/tuned", folders["adapted"], COMMIT[::-1])  # the newest
    newest = merging.lines(folders["base"], "org/tuned", 0.5, output=tmp_path / "a")
    pinned = merging.lines(folders["base"], f"org/tuned@{COMMIT}", 0.5, output=tmp_path / "b")
    for output, name, commit in ((newest, "adapted", COMMIT[::-1]), (pinned, "instruct", COMMIT)):
        local = merging.lines(folders["base"], folders[name], 0.5, output=tmp_path / name)
        assert same_bits(state_of(output), state_of(local))
        record = json.loads((output / "merge.json").read_text())["inputs"][1]
        assert record["revision"] == commit and record["source"].startswith("org/tuned")


def test_of_the_hub_only_weights_and_texts_are_fetched(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **settings: Any) -> str:
        asked.append({"name": name, **settings})
        return str(folders["instruct"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder, revision = checkpoints.resolve("org/name@v2", "base")
    assert folder == folders["instruct"] and revision == folder.name
    first, second = asked
    assert first["name"] == second["name"] == "org/name"
    # The second call is for the commit that the first one found.
    assert first["revision"] == "v2" and second["revision"] == folder.name
    from fnmatch import fnmatch

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for each in asked for pattern in each["allow_patterns"])

    shards = [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    assert all(map(fetched, ["config.json", "tokenizer.model", "chat_template.jinja", "merges.txt", *shards]))
    others = ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/model.pth", "optimizer.pt"]
    assert not any(map(fetched, others))
