"""Averages, LiNeS and instruction residuals: against float64 written out, identities, and another library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pretrain_ext import merging
from hf_pretrain_ext.data import tokenizer_fingerprint
from hf_pretrain_ext.merging import Blocks, MergeError, find_blocks
from tests import architectures, tiny
from tests.merging_checkpoints import State, make_checkpoints, same_bits, state_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def check_rounding(found: State, exact: dict[str, Tensor]) -> None:
    """Each element is the float64 result rounded, but for those so near to a tie that float32 falls beside it."""
    assert found.keys() == exact.keys()
    elements = unlike = 0
    for key, value in found.items():
        rounded = exact[key].to(value.dtype)
        differ = value != rounded
        elements, unlike = elements + value.numel(), unlike + int(differ.sum())
        step = torch.finfo(value.dtype).eps * exact[key].abs()
        # Where it is another, the exact value is as near to it: half a step, and float32's own error.
        error = (value.double() - exact[key]).abs()
        scale = 1e-6 + step * (0.5 if value.dtype is not torch.float32 else 4)
        assert bool((error <= scale).all()), key
    # In bfloat16, ties are rare; in float32 it is the arithmetic's own last bit that differs.
    wide = any(value.dtype is torch.float32 for value in found.values())
    assert wide or unlike <= elements * 1e-3


def in_double(folder: Path) -> State:
    return {key: value.double() for key, value in state_of(folder).items()}


# The three formulas, folder in and folder out, against float64


@pytest.mark.parametrize("weights", [None, [3, 1, 2], [1.5, -0.5, 1.0]])
def test_average_is_that_of_float64(folders: dict[str, Path], tmp_path: Path, weights: list[float] | None) -> None:
    names = ["base", "instruct", "adapted"]
    output = merging.average([folders[n] for n in names], weights, output=tmp_path / "out", max_shard_size="5KB")
    states, shares = [in_double(folders[n]) for n in names], weights or [1, 1, 1]
    exact = {key: sum(w * s[key] for w, s in zip(shares, states, strict=True)) / sum(shares) for key in states[0]}
    found = state_of(output)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    check_rounding(found, exact)  # type: ignore[arg-type]  # sum() begins with an int
    assert len(list(output.glob("model-*.safetensors"))) > 2


def test_lines_is_that_of_float64(folders: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = in_double(folders["base"]), in_double(folders["adapted"])
    output = merging.lines(folders["base"], folders["adapted"], 0.25, 0.5, output=tmp_path / "out")
    scales = {key: 0.75 if "layers.1." in key else 0.25 for key in base}
    assert sorted(set(scales.values())) == [0.25, 0.75]
    check_rounding(state_of(output), {key: base[key] + scales[key] * (tuned[key] - base[key]) for key in base})


def test_lines_of_several_sums_the_changes(folders: dict[str, Path], tmp_path: Path) -> None:
    base, one, two = (in_double(folders[name]) for name in ("base", "instruct", "adapted"))
    several = [folders["instruct"], folders["adapted"]]
    output = merging.lines(folders["base"], several, beta=0.3, output=tmp_path / "out")
    scales = {key: 0.5 + 0.3 if "layers.1." in key else 0.5 for key in base}
    exact = {key: base[key] + scales[key] * (one[key] - base[key] + two[key] - base[key]) for key in base}
    check_rounding(state_of(output), exact)
    settings = json.loads((output / "merge.json").read_text())["settings"]
    assert settings == {"alpha": 0.5, "beta": 0.3, "blocks": "model.layers", "number_of_blocks": 2}


def test_residual_is_that_of_float64(folders: dict[str, Path], tmp_path: Path) -> None:
    base, instruct, adapted = (in_double(folders[name]) for name in ("base", "instruct", "adapted"))
    output = merging.instruction_residual(
        folders["base"], folders["instruct"], folders["adapted"], output=tmp_path / "out"
    )
    check_rounding(state_of(output), {key: adapted[key] + (instruct[key] - base[key]) for key in base})


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_inputs_of_several_types(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    output = merging.average([folders["base"], folders["wide"]], output=tmp_path / "out", dtype=dtype)
    first, second = in_double(folders["base"]), in_double(folders["wide"])
    found = state_of(output)
    assert {value.dtype for value in found.values()} == {wanted}
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    exact = {key: (first[key] + second[key]) / 2 for key in first}
    for key, value in found.items():
        bound, least = (1e-3, 6e-8) if dtype == "float16" else (2e-7, 1e-8)
        assert torch.allclose(value.double(), exact[key], rtol=bound, atol=least), key


# Identities, bit for bit


IDENTITIES: dict[str, tuple[Callable[..., Path], str]] = {
    "average (1, 0)": (lambda f, o: merging.average([f["adapted"], f["wide"]], [1, 0], output=o), "adapted"),
    "average (0, 1)": (lambda f, o: merging.average([f["base"], f["adapted"]], [0, 7], output=o), "adapted"),
    "average of three equals": (lambda f, o: merging.average([f["adapted"]] * 3, output=o), "adapted"),
    "lines, alpha 1": (lambda f, o: merging.lines(f["base"], f["adapted"], 1, output=o), "adapted"),
    "lines, nothing kept": (lambda f, o: merging.lines(f["base"], f["adapted"], 0, 0, output=o), "base"),
    "lines, tuned is base": (lambda f, o: merging.lines(f["base"], f["base"], 0.3, output=o), "base"),
    "residual, adapted is base": (
        lambda f, o: merging.instruction_residual(f["base"], f["instruct"], f["base"], output=o),
        "instruct",
    ),
    "residual, instruct is base": (
        lambda f, o: merging.instruction_residual(f["base"], f["base"], f["adapted"], output=o),
        "adapted",
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    merge, expected = IDENTITIES[name]
    assert same_bits(state_of(merge(folders, tmp_path / "out")), state_of(folders[expected]))


def test_elements_that_only_one_training_changed_are_taken_as_they_are() -> None:
    torch.manual_seed(1)
    base = torch.randn(1000) * 10.0 ** torch.randint(-6, 6, (1000,))
    instruct, adapted = base.clone(), base.clone()
    instruct[:300] = torch.randn(300)
    adapted[200:600] = torch.randn(400)
    found = merging.instruction_residual_tensors(base, instruct, adapted)
    assert torch.equal(found[:200], instruct[:200]) and torch.equal(found[300:], adapted[300:])
    # Without care, rounding of the difference shows.
    assert not torch.equal((adapted + (instruct - base))[:200], instruct[:200])


def test_averages_are_linear() -> None:
    torch.manual_seed(2)
    first, second, third = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    inner = merging.average_tensors([first, second], [1, 3])
    assert torch.allclose(
        merging.average_tensors([inner, third], [4, 2]), merging.average_tensors([first, second, third], [1, 3, 2])
    )
    # LiNeS with one scale for all is a weighted mean of base and tuned.
    assert torch.allclose(
        merging.lines_tensors(first, [second], 0.3), merging.average_tensors([first, second], [0.7, 0.3])
    )


def test_average_agrees_with_torchs_weight_averaging(folders: dict[str, Path], tmp_path: Path) -> None:
    names = ["base", "instruct", "adapted"]
    models = [AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32) for name in names]
    averaged = AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    output = merging.average([folders[name] for name in names], output=tmp_path / "out", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.float32
    for (name, ours), theirs in zip(merged.named_parameters(), averaged.module.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=2.4e-7), name


def test_state_dicts_give_what_folders_give(folders: dict[str, Path], tmp_path: Path) -> None:
    base, instruct, adapted = (state_of(folders[name]) for name in ("base", "instruct", "adapted"))
    paths = [folders[name] for name in ("base", "instruct", "adapted")]
    pairs = [
        (merging.average(paths, [1, 2, 3], output=tmp_path / "a"),
         merging.average_state_dicts([base, instruct, adapted], [1, 2, 3])),
        (merging.lines(paths[0], paths[2], 0.2, output=tmp_path / "b"),
         merging.lines_state_dict(base, adapted, 0.2)),
        (merging.lines(paths[0], paths[1:], 0.2, 0.4, output=tmp_path / "c"),
         merging.lines_state_dict(base, [instruct, adapted], 0.2, 0.4, blocks="model.layers")),
        (merging.instruction_residual(*paths, output=tmp_path / "d"),
         merging.instruction_residual_state_dict(base, instruct, adapted)),
    ]  # fmt: skip
    for folder, state in pairs:
        assert same_bits(state_of(folder), state)


def test_inputs_are_left_as_they_are() -> None:
    base, tuned = {"h.0.w": torch.ones(3), "h.1.w": torch.ones(3)}, {"h.0.w": torch.zeros(3), "h.1.w": torch.zeros(3)}
    for result in (
        merging.lines_state_dict(base, tuned, 0.5),
        merging.average_state_dicts([base, tuned]),
        merging.instruction_residual_state_dict(base, base, tuned),
        merging.average_state_dicts([base, base]),
    ):
        assert torch.equal(base["h.0.w"], torch.ones(3)) and torch.equal(tuned["h.1.w"], torch.zeros(3))
        assert result.keys() == base.keys()


# LiNeS: depth from names, and the paper's alpha for several tasks


def test_depth_of_every_block() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.w.weight" for n in range(11) for e in range(3)] + ["lm_head.weight"]
    blocks = find_blocks(names)
    assert blocks == Blocks("model.layers", 11)
    for n in range(11):
        # Written out: alpha at the first, alpha + beta at the last; the expert's number has no say.
        assert blocks.scale(f"model.layers.{n}.mlp.experts.2.w.weight", 0.1, 0.5) == 0.1 + 0.5 * n / 10
    assert blocks.scale("lm_head.weight", 0.1, 0.5) == blocks.scale("model.layers_norm.weight", 0.1, 0.5) == 0.1


# Another family's parameters than `layers` or `model.layers` are in these stacks.
PREFIXES = {
    "GPT-2": "transformer.h",
    "GPT-J": "transformer.h",
    "GPT-NeoX": "gpt_neox.layers",
    "GPT-BigCode": "transformer.h",
    "CodeGen": "transformer.h",
    "OPT": "model.decoder.layers",
    "BLOOM": "transformer.h",
    "Falcon": "transformer.h",
    "MPT": "transformer.blocks",
    "Mamba": "backbone.layers",
    "Mamba 2": "backbone.layers",
    "RWKV": "rwkv.blocks",
}


@pytest.mark.architectures
@pytest.mark.parametrize("family", architectures.CAUSAL)
def test_every_family_merges_and_loads(family: str, tmp_path: Path) -> None:
    model = architectures.build(family)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1.0
    model.save_pretrained(tmp_path / "tuned")
    output = merging.lines(tmp_path / "base", tmp_path / "tuned", 0.25, output=tmp_path / "out")
    base, tuned, found = (state_of(tmp_path / name) for name in ("base", "tuned", "out"))
    prefix = PREFIXES.get(family, "model.layers")
    assert find_blocks(base) == Blocks(prefix, 2)
    for key, value in found.items():
        scale = 1.0 if key.startswith(f"{prefix}.1.") else 0.25
        exact = base[key].double() + scale * (tuned[key].double() - base[key].double())
        assert torch.allclose(value.double(), exact, rtol=1e-6, atol=1e-6), key
    loaded, report = type(model).from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    # All parameters were moved by 1; what is loaded is moved by 1 in the last block and by a quarter elsewhere.
    pairs = zip(loaded.parameters(), model.parameters(), strict=True)
    moved = {round(float((now - (was - 1)).mean()), 4) for now, was in pairs}
    assert moved == {0.25, 1.0}


def test_several_stacks_need_a_name_or_a_number() -> None:
    names = [f"{side}.block.{n}.w" for side in ("encoder", "decoder") for n in range(3)] + ["vision.0.w", "vision.1.w"]
    with pytest.raises(MergeError, match=r"several stacks of blocks: encoder.block \(3 blocks\), decoder.block"):
        find_blocks(names, number=3)
    assert find_blocks(names, number=2) == Blocks("vision", 2)
    assert find_blocks(names, "decoder.block").index("encoder.block.1.w") is None
    assert find_blocks(names, "decoder.block").index("decoder.block.1.w") == 1


@pytest.mark.parametrize(
    ("names", "prefix", "message"),
    [
        (["layers.0.w", "head.w"], None, "no blocks were found"),
        (["layers.0.w", "layers.2.w"], None, "no blocks were found"),
        (["layers.0.w", "layers.1.w"], "layer", "blocks='layer': no name begins so"),
        (["layers.0.w", "layers.2.w"], "layers", r"blocks='layers': only the numbers \[0, 2\]"),
        (["layers.0.w", "layers.1.w"], 3, "blocks must be the text before the number of a block, got 3"),
    ],
)
def test_no_blocks(names: list[str], prefix: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        find_blocks(names, prefix)


def test_alpha_of_merged_task_vectors() -> None:
    torch.manual_seed(3)
    vectors = [{"a": torch.randn(40), "b": torch.randn(3, 5)} for _ in range(4)]
    total = {key: sum(vector[key] for vector in vectors) for key in vectors[0]}
    assert merging.multi_task_alpha(vectors, total) == pytest.approx(1 / 4)  # type: ignore[arg-type]
    halved = {key: torch.as_tensor(value) / 2 for key, value in total.items()}
    assert merging.multi_task_alpha(vectors, halved) == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="differ in"):
        merging.multi_task_alpha(vectors, {"a": torch.ones(40)})
    with pytest.raises(ValueError, match="merged is zero everywhere"):
        merging.multi_task_alpha(vectors, {key: 0 * value for key, value in halved.items()})


@pytest.mark.parametrize("weights", [[1e308, 1e308], [3e-308, 3e-308], [1e308, 1.0]])
def test_weights_of_any_size_are_divided_by_their_sum(weights: list[float]) -> None:
    by_hand = 2.0 if weights[0] == weights[1] else 1.0
    assert merging.average_tensors([torch.ones(3), torch.full((3,), 3.0)], weights).tolist() == [by_hand] * 3


def test_weights_that_are_next_to_nothing() -> None:
    """Below the smallest normal number a quotient has few digits left, or none."""
    with pytest.raises(ValueError, match="weights are divided by their sum, which must be above 0"):
        merging.average_tensors([torch.ones(3)] * 2, [1e-320, 1e-320])


# What comes with the weights


def test_the_donor_gives_config_tokenizer_and_types(folders: dict[str, Path], tmp_path: Path) -> None:
    three = [folders[name] for name in ("base", "instruct", "adapted")]
    merged = merging.instruction_residual(*three, output=tmp_path / "a")
    assert (merged / "chat_template.jinja").read_text() == "{{ messages }}"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (folders["instruct"] / name).read_bytes()
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tiny.tokenizer().get_vocab()
    other = merging.instruction_residual(*three, output=tmp_path / "b", donor=folders["adapted"])
    assert not (other / "chat_template.jinja").exists()
    wide = merging.average([folders["base"], folders["wide"]], output=tmp_path / "c", donor=str(folders["wide"]))
    assert {value.dtype for value in state_of(wide).values()} == {torch.float32}
    assert json.loads((wide / "merge.json").read_text())["donor"] == "checkpoints[1]"


def test_the_record_says_how_it_was_made(folders: dict[str, Path], tmp_path: Path) -> None:
    output = merging.average([folders["base"], folders["instruct"]], [1, 3], output=tmp_path / "out")
    record = json.loads((output / "merge.json").read_text())
    assert record["method"] == "average" and record["settings"] == {"weights": [0.25, 0.75]}
    assert [each["source"] for each in record["inputs"]] == [str(folders["base"]), str(folders["instruct"])]
    for each in [*record["inputs"], {"source": str(output), "files": record["output"]["files"]}]:
        for name, entry in each["files"].items():
            content = (Path(each["source"]) / name).read_bytes()
            assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert record["inputs"][0]["tokenizer"] == tokenizer_fingerprint(tiny.tokenizer())
    assert record["output"]["tensors"] == len(state_of(output))
    assert record["output"]["parameters"] == sum(value.numel() for value in state_of(output).values())
    assert record["output"]["tensors_equal_in_all_inputs"] == 0
    assert record["versions"]["torch"] == torch.__version__


def test_the_merged_model_computes(folders: dict[str, Path], tmp_path: Path) -> None:
    output = merging.lines(folders["base"], folders["adapted"], 0.5, output=tmp_path / "out", max_shard_size="3KB")
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    logits = {
        name: AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)(ids).logits
        for name in ("base", "adapted")
    }
    ours = model(ids).logits
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(ours, logits["base"]) and not torch.equal(ours, logits["adapted"])
    assert float((ours - logits["base"]).abs().max()) < float((logits["adapted"] - logits["base"]).abs().max()) * 1.5
