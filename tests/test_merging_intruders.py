"""Intruder dimensions: matrices whose answer is known, PEFT's own merge, and the definition written out in NumPy."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_pretrain_ext.merging import MergeError, intruder_cosines, intruder_dimensions
from hf_pretrain_ext.merging.adapter import Adapter, oriented
from hf_pretrain_ext.merging.checkpoints import open_checkpoint
from tests import architectures, tiny


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor([float(value) for value in values]))


def hadamard(size: int) -> Tensor:
    """Orthogonal columns, each as near to every axis as to every other."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


# Matrices by hand


def test_a_matrix_has_no_intruders_in_itself() -> None:
    base = torch.randn(12, 7)
    assert torch.allclose(intruder_cosines(base, base), torch.ones(7), atol=1e-5)
    assert torch.allclose(intruder_cosines(base, -3 * base), torch.ones(7), atol=1e-5)


def test_directions_that_base_does_not_have() -> None:
    """Every vector of the tuned matrix is at 1/√8 from all of base's."""
    base = diagonal(8, 7, 6, 5, 4, 3, 2, 1)
    tuned = hadamard(8) @ diagonal(80, 70, 60, 50, 40, 30, 20, 10)
    assert torch.allclose(intruder_cosines(base, tuned, k=3), torch.full((3,), 1 / math.sqrt(8)), atol=1e-6)


def test_a_turned_plane() -> None:
    """Turned by 30°, its two vectors stay at cos 30° from where they were; by 60°, at cos 30° from each other's."""
    for degrees, nearest in ((30, math.cos(math.pi / 6)), (60, math.cos(math.pi / 6)), (45, math.cos(math.pi / 4))):
        angle = math.radians(degrees)
        turn = torch.eye(4)
        turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        found = intruder_cosines(diagonal(9, 7, 5, 3), turn @ diagonal(9, 7, 5, 3), k=3)
        assert torch.allclose(found, torch.tensor([nearest, nearest, 1.0]), atol=1e-6)


def test_all_vectors_of_base_count_not_its_strongest_alone() -> None:
    """The weakest direction made the strongest is no intruder: the base has it."""
    assert torch.allclose(intruder_cosines(diagonal(5, 4, 3, 1), diagonal(5, 4, 3, 100), k=1), torch.ones(1))


def test_left_vectors_are_those_of_the_output_side() -> None:
    base = torch.zeros(5, 2)
    base[0, 0], base[1, 1] = 2.0, 1.0
    tuned = base.clone()
    tuned[4, 0] = 1000.0  # an output that the base never writes to
    assert float(intruder_cosines(base, tuned, k=1)) < 0.01
    # Another input for an output that it does write to.
    tuned = base.clone()
    tuned[0] = torch.tensor([0.0, 1000.0])
    assert float(intruder_cosines(base, tuned, k=1)) > 0.99


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices of one shape, got \[2, 3\] and \[3, 2\]"):
        intruder_cosines(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got \[2\] and \[2\]"):
        intruder_cosines(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"matrices of floats, got torch.int64 and torch.float32"):
        intruder_cosines(torch.ones(2, 2).long(), torch.ones(2, 2))
    # Decompositions exist in float32 and float64 only.
    base = torch.randn(6, 6)
    tuned = base + torch.randn(6, 6)
    assert torch.allclose(
        intruder_cosines(base.bfloat16(), tuned.bfloat16()), intruder_cosines(base, tuned), atol=0.05
    )


# Whole checkpoints


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "homemade", **config}))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def test_the_count_of_a_checkpoint(tmp_path: Path) -> None:
    """12 strong directions, 8 of them new at 1/√8; 10 are looked at, of which the 4 strongest are old."""
    strengths = [40.0, 39, 38, 37, 20, 19, 18, 17, 16, 15, 14, 13]
    tuned = diagonal(*strengths)
    tuned[4:, 4:] = hadamard(8) @ tuned[4:, 4:]
    base = {
        "embed.weight": torch.randn(20, 12),
        "layers.0.q.weight": diagonal(*range(12, 0, -1)),
        "layers.0.norm.weight": torch.ones(12),
        "layers.1.q.weight": diagonal(*range(12, 0, -1)),
        "layers.1.conv.weight": torch.randn(4, 3, 2),
        "layers.1.steps": torch.tensor([[3]]),
    }
    after = {**base, "layers.1.q.weight": tuned, "embed.weight": torch.randn(20, 12)}
    folders = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", after)
    report = intruder_dimensions(*folders)
    assert [(matrix.name, matrix.intruders) for matrix in report.matrices] == [
        ("layers.0.q.weight", 0),
        ("layers.1.q.weight", 6),
    ]
    assert report.total == 6 and report.matrices[0].cosines == (1.0,) * 10
    assert report.matrices[1].cosines == pytest.approx([1.0] * 4 + [1 / math.sqrt(8)] * 6, abs=1e-5)
    assert report.skipped == {"embed.weight": "outside the blocks", "layers.1.conv.weight": "of 3 dimensions"}
    assert intruder_dimensions(*folders, k=4).total == 0 and intruder_dimensions(*folders, k=5).total == 1
    assert intruder_dimensions(*folders, eps=0.35).total == 0 and intruder_dimensions(*folders, k=12).total == 8
    chosen = intruder_dimensions(*folders, target_modules=["0.q", "embed"])
    assert [matrix.name for matrix in chosen.matrices] == ["embed.weight", "layers.0.q.weight"]
    assert json.loads(json.dumps(report.to_dict()))["total"] == 6
    last = str(report).splitlines()
    assert last[-2] == "6 intruder dimensions among 20 top singular vectors of 2 matrices (k=10, eps=0.5)"
    assert last[2].split() == ["layers.1.q.weight", "12x12", "6", "0.354"]


def test_weights_that_are_stored_the_other_way(tmp_path: Path) -> None:
    base = {"h.0.w.weight": torch.randn(6, 9), "h.1.w.weight": torch.randn(6, 9)}
    after = {key: torch.randn(6, 9) for key in base}
    folders = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", after)
    turned = intruder_dimensions(*folders, fan_in_fan_out=True)
    assert turned.matrices[0].shape == (9, 6)
    expected = intruder_cosines(base["h.0.w.weight"].T, after["h.0.w.weight"].T)
    assert turned.matrices[0].cosines == pytest.approx(expected.tolist())
    straight = intruder_dimensions(*folders)
    assert straight.matrices[0].cosines != turned.matrices[0].cosines


# Adapters, against PEFT's own merge


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 40, "q_proj": 2}},
    "another start": {"init_lora_weights": "gaussian"},
}


def make_adapter(folder: Path, model: Any, targets: list[str], seed: int = 0, **settings: Any) -> Path:
    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight += torch.randn(weight.shape, generator=generator)
    peft.save_pretrained(folder / "adapter")
    return folder


def merged_by_peft(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    return {key: value.detach() for key, value in merged.state_dict().items()}


def counted(base: Tensor, tuned: Tensor, k: int, eps: float) -> int:
    """The paper's count written out, in float64 and by another library."""
    known, _, _ = np.linalg.svd(base.double().numpy(), full_matrices=False)
    found, _, _ = np.linalg.svd(tuned.double().numpy(), full_matrices=False)
    count = 0
    for i in range(min(k, found.shape[1])):
        nearest = max(abs(float(found[:, i] @ known[:, j])) for j in range(known.shape[1]))
        count += nearest < eps
    return count


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    folder = make_adapter(tmp_path, tiny.model(), targets, **SETTINGS[name])
    merged, base = merged_by_peft(folder), load_file(folder / "base" / "model.safetensors")
    adapter, opened = Adapter(folder / "adapter", "tuned"), open_checkpoint(folder / "base", "base")
    names = adapter.names_in(opened)
    assert len(names) == 6 and adapter.skipped == {}
    for module, key in names.items():
        found = adapter.tuned(module, oriented(opened.matrix(key), adapter.fan_in_fan_out))
        assert torch.allclose(found, merged[key], rtol=1e-5, atol=1e-6), key
        assert not torch.allclose(found, base[key], atol=1e-2)
    for k, eps in ((10, 0.5), (3, 0.8)):
        report = intruder_dimensions(folder / "base", folder / "adapter", k, eps)
        expected = {key: counted(base[key], merged[key], k, eps) for key in names.values()}
        assert {matrix.name: matrix.intruders for matrix in report.matrices} == expected
        assert report.total == sum(expected.values()) > 0
    # The same by way of the merged checkpoint.
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    whole = intruder_dimensions(folder / "base", folder / "merged", target_modules=targets)
    by_adapter = intruder_dimensions(folder / "base", folder / "adapter")
    assert {m.name: m.intruders for m in whole.matrices} == {m.name: m.intruders for m in by_adapter.matrices}
    # All matrices in the blocks, of which those that the adapter leaves alone have no intruders.
    everything = intruder_dimensions(folder / "base", folder / "merged")
    assert len(everything.matrices) == 14 and everything.total == by_adapter.total


def test_an_adapter_of_gpt2(tmp_path: Path) -> None:
    """Its weights are stored as (in, out); the left vectors are those of the output all the same."""
    folder = make_adapter(tmp_path, architectures.build("GPT-2"), ["c_attn"], fan_in_fan_out=True)
    merged, base = merged_by_peft(folder), load_file(folder / "base" / "model.safetensors")
    report = intruder_dimensions(folder / "base", folder / "adapter", k=4)
    assert [(matrix.name, matrix.shape) for matrix in report.matrices] == [
        ("transformer.h.0.attn.c_attn.weight", (48, 16)),
        ("transformer.h.1.attn.c_attn.weight", (48, 16)),
    ]
    for matrix in report.matrices:
        assert matrix.intruders == counted(base[matrix.name].T, merged[matrix.name].T, 4, 0.5)


def test_an_adapter_that_was_not_trained_has_none(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    report = intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    assert report.total == 0 and all(set(matrix.cosines) == {1.0} for matrix in report.matrices)


def test_names_with_a_prefix_more(tmp_path: Path) -> None:
    """A base saved without its head has names that lack the first part."""
    model = tiny.model()
    folder = make_adapter(tmp_path, tiny.model(), ["q_proj"])
    shutil.rmtree(folder / "base")
    model.model.save_pretrained(folder / "base")
    report = intruder_dimensions(folder / "base", folder / "adapter")
    assert [matrix.name for matrix in report.matrices] == [f"layers.{n}.self_attn.q_proj.weight" for n in range(2)]


def test_what_is_trained_beside_the_factors_is_told(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    assert len(report.matrices) == 2
    assert sorted(report.skipped.values())[:2] == ["an embedding", "an embedding"]
    assert "trained whole (modules_to_save): compare the merged checkpoint" in report.skipped.values()


# Bad input


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), tiny.model(), ["q_proj"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be an integer from 1 on, got 0"),
        ({"k": 2.5}, "k must be an integer from 1 on, got 2.5"),
        ({"eps": 0}, "eps must be a cosine above 0, up to 1, got 0"),
        ({"eps": 1.1}, "eps must be a cosine above 0, up to 1, got 1.1"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of ends of module names, or None, got 'q_proj'"),
        ({"target_modules": []}, r"target_modules must be a list of ends of module names, or None, got \[\]"),
        ({"target_modules": ["proj"]}, r"no matrix to look at: target_modules=\['proj'\] ends no module's name"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be True, False or None, got 1"),
    ],
)
def test_bad_settings_are_named(made: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intruder_dimensions(made / "base", made / "adapter", **settings)


def edited(made: Path, to: Path, **fields: Any) -> Path:
    shutil.copytree(made / "adapter", to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return to


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "tuned is an adapter of type 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, r"tuned uses init_lora_weights='pissa', with which W \+ \(alpha / r\) B A"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "tuned uses layer_replication"),
    ],
)
def test_other_adapters_are_refused(made: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        intruder_dimensions(made / "base", edited(made, tmp_path / "x", **fields))


def test_adapters_that_do_not_belong_are_refused(made: Path, tmp_path: Path) -> None:
    architectures.build("GPT-2").save_pretrained(tmp_path / "other")
    with pytest.raises(MergeError, match=r"modules that base=.* has no weights of: .*q_proj.* \(2 in all\)"):
        intruder_dimensions(tmp_path / "other", made / "adapter")
    wide = tiny.model().config
    wide.hidden_size, wide.head_dim = 32, 16
    type(tiny.model())(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(MergeError, match=r"q_proj is for a weight of shape \[16, 16\], and the base has \[32, 32\]"):
        intruder_dimensions(tmp_path / "wide", made / "adapter")
    pickled = edited(made, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(MergeError, match=r"tuned has no adapter_model.safetensors: save it with safe_serialization"):
        intruder_dimensions(made / "base", pickled)
    broken = edited(made, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[:] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"tuned: .*q_proj.weight holds NaN or infinities"):
        intruder_dimensions(made / "base", broken)
