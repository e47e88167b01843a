"""Checkpoints that do not fit together, and what is no float: all reasons in one error, nothing half merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_pretrain_ext import merging
from hf_pretrain_ext.merging import MergeError
from tests import tiny
from tests.merging_checkpoints import State, copied, edit_config, edit_weights, make_checkpoints, same_bits, state_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


# Tied embeddings, buffers of integers, values without a number


def test_a_stored_copy_of_tied_embeddings_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """Older hosts wrote the tied head twice."""
    twice = edit_weights(
        copied(folders["base"], tmp_path / "twice"),
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    output = merging.average([twice, folders["adapted"]], output=tmp_path / "out")
    once = merging.average([folders["base"], folders["adapted"]], output=tmp_path / "once")
    assert same_bits(state_of(output), state_of(once))
    record = json.loads((output / "merge.json").read_text())
    assert record["inputs"][0]["tied_copies_left_out"] == {"lm_head.weight": "model.embed_tokens.weight"}
    # Where all store it, it stays.
    both = merging.average([twice, twice], output=tmp_path / "both")
    assert same_bits(state_of(both), state_of(twice))


def test_a_head_of_its_own_is_not_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    def add_head(state: State) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1

    other = edit_weights(copied(folders["base"], tmp_path / "other"), add_head)
    with pytest.raises(
        MergeError, match=r"checkpoints\[1\] lacks 1 of the 21 tensors that others hold: lm_head.weight"
    ):
        merging.average([other, folders["adapted"]], output=tmp_path / "out")
    # An untied model that only looks like a copy is a model that lost its head.
    twice = edit_weights(
        copied(folders["base"], tmp_path / "twice"),
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    edit_config(twice, tie_word_embeddings=False)
    bare = edit_config(copied(folders["base"], tmp_path / "bare"), tie_word_embeddings=False)
    with pytest.raises(MergeError, match="lacks 1 of the 21 tensors"):
        merging.average([twice, bare], output=tmp_path / "out")


def test_integers_are_copied_if_equal_and_refused_if_not(folders: dict[str, Path], tmp_path: Path) -> None:
    def add(value: int) -> Callable[[State], None]:
        def change(state: State) -> None:
            state["model.steps"] = torch.tensor([value, 5])
            state["model.mask"] = torch.tensor([True, False])

        return change

    one = edit_weights(copied(folders["base"], tmp_path / "one"), add(1))
    two = edit_weights(copied(folders["adapted"], tmp_path / "two"), add(1))
    three = edit_weights(copied(folders["adapted"], tmp_path / "three"), add(2))
    found = state_of(merging.average([one, two], output=tmp_path / "out", dtype="float32"))
    assert found["model.steps"].tolist() == [1, 5] and found["model.steps"].dtype == torch.int64
    assert found["model.mask"].tolist() == [True, False]
    with pytest.raises(MergeError, match=r"integers cannot be merged, .* not the same in all inputs: model.steps\."):
        merging.average([one, three], output=tmp_path / "never")
    with pytest.raises(MergeError, match=r"not the same in all inputs: model.steps"):
        merging.average_state_dicts([state_of(one), state_of(three)])
    assert not (tmp_path / "never").exists()


def test_infinities_that_all_inputs_hold_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    def add(state: State) -> None:
        state["model.bias_mask"] = torch.tensor([0.0, float("-inf")])

    one = edit_weights(copied(folders["base"], tmp_path / "one"), add)
    two = edit_weights(copied(folders["adapted"], tmp_path / "two"), add)
    for output in (
        merging.average([one, two], output=tmp_path / "a"),
        merging.lines(one, two, 0.5, output=tmp_path / "b"),
        merging.instruction_residual(one, two, two, output=tmp_path / "c"),
    ):
        assert state_of(output)["model.bias_mask"].tolist() == [0.0, float("-inf")]


def test_values_that_are_no_numbers_are_found(folders: dict[str, Path], tmp_path: Path) -> None:
    def breaks(state: State) -> None:
        state["model.norm.weight"][3] = float("nan")

    def grows(state: State) -> None:
        state["model.norm.weight"][5] = 3e5

    broken = edit_weights(copied(folders["adapted"], tmp_path / "broken"), breaks)
    message = r"model.norm.weight, element 3, .*checkpoints\[1\] nan\): an input is broken"
    with pytest.raises(MergeError, match=message):
        merging.average([folders["base"], broken], output=tmp_path / "out")
    large = edit_weights(copied(folders["adapted"], tmp_path / "large"), grows)
    message = "element 5, would become inf .*too large for float16: set dtype to a wider type"
    with pytest.raises(MergeError, match=message):
        merging.average([folders["base"], large], output=tmp_path / "out", dtype="float16")
    with pytest.raises(MergeError, match=message):
        merging.average([large, large], output=tmp_path / "out", dtype="float16")
    merging.average([folders["base"], large], output=tmp_path / "out")


# Checkpoints that do not fit together


def test_all_reasons_are_in_one_error(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(state: State) -> None:
        state["model.embed_tokens.weight"] = torch.zeros(66, 16, dtype=torch.bfloat16)
        del state["model.norm.weight"]

    other = edit_weights(copied(folders["adapted"], tmp_path / "other"), change)
    edit_config(other, vocab_size=66, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(MergeError) as caught:
        merging.average([folders["base"], other], output=tmp_path / "out")
    message = str(caught.value)
    assert "vocab_size (checkpoints[0] 64; checkpoints[1] 66)" in message
    assert "rope_parameters.rope_theta (checkpoints[0] 10000.0; checkpoints[1] 500000.0)" in message
    assert "checkpoints[1] lacks 1 of the 20 tensors that others hold: model.norm.weight" in message
    assert "model.embed_tokens.weight (checkpoints[0] [64, 16]; checkpoints[1] [66, 16])" in message
    assert "give 2 tokens other ids: '<x>' (checkpoints[0] None; checkpoints[1] 43)" in message
    assert not (tmp_path / "out").exists()


def test_config_fields_that_may_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    free = edit_config(copied(folders["adapted"], tmp_path / "free"), attention_dropout=0.1, use_cache=False)
    merging.average([folders["base"], free], output=tmp_path / "a")
    # A field that an older host did not write yet has the host's default.
    old = copied(folders["adapted"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["mlp_bias"], config["head_dim"]
    (old / "config.json").write_text(json.dumps(config))
    merging.average([folders["base"], old], output=tmp_path / "b")
    longer = edit_config(copied(folders["adapted"], tmp_path / "longer"), max_position_embeddings=128)
    with pytest.raises(
        MergeError, match=r"configs differ in max_position_embeddings .*name the fields in ignore_config"
    ):
        merging.average([folders["base"], longer], output=tmp_path / "c")
    output = merging.average(
        [folders["base"], longer], output=tmp_path / "c", ignore_config=["max_position_embeddings"], donor=longer
    )
    assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 128
    assert json.loads((output / "merge.json").read_text())["ignored_config"] == ["max_position_embeddings"]
    with pytest.raises(MergeError, match="ignore_config names fields that no config has: max_positions"):
        merging.average([folders["base"], longer], output=tmp_path / "d", ignore_config=["max_positions"])


def test_architectures_that_the_host_does_not_know(folders: dict[str, Path], tmp_path: Path) -> None:
    """Their configs are compared as they are written."""
    one, two = (
        edit_config(copied(folders[name], tmp_path / name), model_type="homemade", depth=2)
        for name in ("base", "adapted")
    )
    for folder in (one, two):
        for file in folder.glob("*token*"):
            file.unlink()
    assert same_bits(
        state_of(merging.average([one, two], output=tmp_path / "a")),
        state_of(merging.average([folders["base"], folders["adapted"]], output=tmp_path / "b")),
    )
    edit_config(two, depth=3)
    with pytest.raises(MergeError, match=r"configs differ in depth \(checkpoints\[0\] 2; checkpoints\[1\] 3\)"):
        merging.average([one, two], output=tmp_path / "c")


def test_other_model_types(folders: dict[str, Path], tmp_path: Path) -> None:
    other = edit_config(copied(folders["adapted"], tmp_path / "other"), model_type="mistral")
    with pytest.raises(MergeError, match=r"different model types: base llama, instruct llama, adapted mistral"):
        merging.instruction_residual(folders["base"], folders["instruct"], other, output=tmp_path / "out")


def test_quantised_checkpoints_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = edit_config(copied(folders["adapted"], tmp_path / "other"), quantization_config={"quant_method": "gptq"})
    with pytest.raises(MergeError, match=r"checkpoints\[1\] quantised: dequantise and save first"):
        merging.average([folders["base"], other], output=tmp_path / "out")
    eight = edit_weights(
        copied(folders["adapted"], tmp_path / "eight"),
        lambda state: state.update({"model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn)}),
    )
    with pytest.raises(MergeError, match=r"model.norm.weight is stored as F8_E4M3, .*dequantised first"):
        merging.average([folders["base"], eight], output=tmp_path / "out")


def test_tokenizers(folders: dict[str, Path], tmp_path: Path) -> None:
    swapped = copied(folders["adapted"], tmp_path / "swapped")
    text = (swapped / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    found = vocabulary["model"]["vocab"]
    found["a"], found["b"] = found["b"], found["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        MergeError, match=r"the tokenizers of base and tuned give 2 tokens other ids: 'a' \(base 2; tuned 3\)"
    ):
        merging.lines(folders["base"], swapped, 0.5, output=tmp_path / "out")
    merging.lines(folders["base"], swapped, 0.5, output=tmp_path / "out", allow_other_tokenizer=True)
    bare = copied(folders["adapted"], tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    output = merging.lines(folders["base"], bare, 0.5, output=tmp_path / "bare out")
    record = json.loads((output / "merge.json").read_text())
    assert record["inputs"][0]["tokenizer"] is not None and record["inputs"][1]["tokenizer"] is None
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(MergeError, match=r"tuned=.* its tokenizer cannot be loaded"):
        merging.lines(folders["base"], bare, 0.5, output=tmp_path / "never")
    output = merging.lines(folders["base"], bare, 0.5, output=tmp_path / "unseen", allow_other_tokenizer=True)
    assert json.loads((output / "merge.json").read_text())["inputs"][1]["tokenizer"] == "cannot be loaded"


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "one checkpoint": (lambda f, o: merging.average([f["base"]], output=o), "checkpoints must be a list of 2 or more"),
    "a text": (lambda f, o: merging.average("ab", output=o), "a list of 2 or more, got 'ab'"),
    "weights of another number": (
        lambda f, o: merging.average([f["base"]] * 2, [1], output=o),
        "one an input: 2 inputs, 1 weights",
    ),
    "weights of nothing": (
        lambda f, o: merging.average([f["base"]] * 2, [1, -1], output=o),
        r"sum, which must be above 0, got \[1, -1\]",
    ),
    "weights without numbers": (
        lambda f, o: merging.average([f["base"]] * 2, [1, float("nan")], output=o),
        "weights must be a list of",
    ),
    "alpha left out": (
        lambda f, o: merging.lines(f["base"], f["wide"], output=o),
        "alpha must be given for one tuned",
    ),
    "alpha as text": (
        lambda f, o: merging.lines(f["base"], f["wide"], "0.5", output=o),
        "alpha must be a finite number, got '0.5'",
    ),
    "beta left out": (
        lambda f, o: merging.lines(f["base"], [f["wide"]] * 2, 0.5, output=o),
        "beta must be given for several tuned",
    ),
    "no tuned": (
        lambda f, o: merging.lines(f["base"], [], 0.5, output=o),
        r"tuned must be a list of 1 or more, got \[\]",
    ),
    "a base that is a number": (
        lambda f, o: merging.lines(3, f["wide"], 0.5, output=o),
        r"base must be a folder, or a name on the Hub .*, got 3",
    ),
    "a folder that is not there": (
        lambda f, o: merging.average([f["base"], "./nowhere"], output=o),
        r"checkpoints\[1\] must be a folder, or a name on the Hub .*; there is no folder ./nowhere",
    ),
    "a name that the Hub does not know": (
        lambda f, o: merging.average([f["base"], "nobody/nothing"], output=o),
        r"checkpoints\[1\] must be .*; nobody/nothing is no folder, and the Hub did not give it",
    ),
    "a donor that is no input": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, donor="else"),
        "one of the inputs, got 'else'",
    ),
    "a type that is none": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, dtype="int8"),
        "dtype must be one of float64, float32",
    ),
    "a size that is none": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, max_shard_size="5 boxes"),
        "max_shard_size must be a number",
    ),
    "a size of nothing": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, max_shard_size=0),
        "max_shard_size must be .*, got 0",
    ),
    "a flag that is none": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, overwrite=1),
        "overwrite must be True or False, got 1",
    ),
    "fields as a text": (
        lambda f, o: merging.average([f["base"]] * 2, output=o, ignore_config="x"),
        "ignore_config must be a list",
    ),
    "blocks that are not there": (
        lambda f, o: merging.lines(f["base"], f["wide"], 0.5, output=o, blocks="layer"),
        "blocks='layer': no name begins so",
    ),
    "an output that is none": (lambda f, o: merging.average([f["base"]] * 2, output=3), "output must be the path"),
    "no state dicts": (
        lambda f, o: merging.average_state_dicts([{}, 3]),
        r"state_dicts\[1\] must be a state dict .*got 3",
    ),
    "state dicts of other names": (
        lambda f, o: merging.average_state_dicts([{"a": torch.ones(1)}, {"b": torch.ones(1)}]),
        r"state_dicts\[0\] lacks 1 of the 2 tensors that others hold: b",
    ),
    "state dicts of other shapes": (
        lambda f, o: merging.average_state_dicts([{"a": torch.ones(1)}, {"a": torch.ones(2)}]),
        r"shapes differ: a \(state_dicts\[0\] \[1\]; state_dicts\[1\] \[2\]\)",
    ),
    "integers against floats": (
        lambda f, o: merging.average_state_dicts([{"a": torch.ones(1)}, {"a": torch.ones(1).long()}]),
        "floats in some inputs, integers in others: a",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(folders, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
