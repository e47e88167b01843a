"""Configurations of mergekit: as written by hand, and meaning what our own merge does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_pretrain_ext import merging
from hf_pretrain_ext.merging import MergeError
from tests import architectures
from tests.merging_checkpoints import State, make_checkpoints, state_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


# By hand, after mergekit's README and its guide to the methods


def test_an_average() -> None:
    assert yaml.safe_load(merging.average_yaml(["org/a", "org/b@v2"], [3, 1], out_dtype="bfloat16")) == {
        "merge_method": "linear",
        "models": [
            {"model": "org/a", "parameters": {"weight": 3.0}},
            {"model": "org/b@v2", "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_lines_of_one_and_of_several() -> None:
    assert yaml.safe_load(merging.lines_yaml("org/base", "org/tuned", 0.25, blocks="model.layers")) == {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [{"model": "org/tuned", "parameters": {"weight": 1.0}}],
        "parameters": {
            "normalize": False,
            "lambda": [{"filter": "model.layers.", "value": [0.25, 1.0]}, {"value": 0.25}],
        },
        "dtype": "float32",
    }
    assert yaml.safe_load(
        merging.lines_yaml(
            "org/base",
            ["org/one", "org/two"],
            alpha=0.75,
            beta=0.5,
            blocks="gpt_neox.layers",
            merge_method="ties",
            density=0.2,
            tokenizer_source="union",
        )
    ) == {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/one", "parameters": {"weight": 1.0, "density": 0.2}},
            {"model": "org/two", "parameters": {"weight": 1.0, "density": 0.2}},
        ],
        "parameters": {
            "normalize": False,
            "lambda": [{"filter": "gpt_neox.layers.", "value": [0.75, 1.25]}, {"value": 0.75}],
        },
        "dtype": "float32",
        "tokenizer_source": "union",
    }


def test_a_residual() -> None:
    assert yaml.safe_load(merging.instruction_residual_yaml("org/base", "org/instruct", "runs/adapted")) == {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [
            {"model": "org/instruct", "parameters": {"weight": 1.0}},
            {"model": "runs/adapted", "parameters": {"weight": 1.0}},
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
    }


def test_blocks_are_read_from_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    found = yaml.safe_load(merging.lines_yaml(folders["base"], folders["adapted"], 0.5))
    assert found["parameters"]["lambda"][0]["filter"] == "model.layers."
    architectures.build("GPT-NeoX").save_pretrained(tmp_path)
    found = yaml.safe_load(merging.lines_yaml(tmp_path, "org/tuned", 0.5))
    assert found["parameters"]["lambda"][0]["filter"] == "gpt_neox.layers."


# The meaning, by a reading of the documents in a few lines


def interpreted(text: str, blocks: str, number: int) -> State:
    """Runs `linear` and `task_arithmetic` as mergekit documents them, in float64."""
    config = yaml.safe_load(text)

    def setting(value: Any, key: str) -> float:
        if isinstance(value, list) and isinstance(value[0], dict):
            value = next(each["value"] for each in value if each.get("filter", "") in key)
        if isinstance(value, list):  # a gradient, from the first block to the last
            at = int(key.removeprefix(f"{blocks}.").split(".")[0]) / (number - 1) if key.startswith(blocks) else 0.0
            low = min(int(at * (len(value) - 1)), len(value) - 2)
            share = at * (len(value) - 1) - low
            return float((1 - share) * value[low] + share * value[low + 1])
        return float(value)

    states = [state_of(Path(each["model"])) for each in config["models"]]
    parameters = config.get("parameters", {})
    merged = {}
    for key in states[0]:
        weights = [setting(each["parameters"]["weight"], key) for each in config["models"]]
        if config["merge_method"] == "linear":
            total = sum(w * state[key].double() for w, state in zip(weights, states, strict=True))
            merged[key] = total / (sum(weights) if parameters.get("normalize", True) else 1)
        else:
            assert config["merge_method"] == "task_arithmetic" and parameters["normalize"] is False
            base = state_of(Path(config["base_model"]))[key].double()
            change = sum(w * (state[key].double() - base) for w, state in zip(weights, states, strict=True))
            merged[key] = base + setting(parameters.get("lambda", 1.0), key) * change
    return merged  # type: ignore[return-value]  # sum() begins with an int


PAIRS: dict[str, tuple[Callable[[Any], str], Callable[[Any, Path], Path]]] = {
    "average": (
        lambda f: merging.average_yaml([f["base"], f["instruct"], f["adapted"]], [1, 2, 4], out_dtype="bfloat16"),
        lambda f, o: merging.average([f["base"], f["instruct"], f["adapted"]], [1, 2, 4], output=o),
    ),
    "lines": (
        lambda f: merging.lines_yaml(f["base"], f["adapted"], 0.25, out_dtype="bfloat16"),
        lambda f, o: merging.lines(f["base"], f["adapted"], 0.25, output=o),
    ),
    "lines of two": (
        lambda f: merging.lines_yaml(f["base"], [f["instruct"], f["adapted"]], beta=0.3, out_dtype="bfloat16"),
        lambda f, o: merging.lines(f["base"], [f["instruct"], f["adapted"]], beta=0.3, output=o),
    ),
    "residual": (
        lambda f: merging.instruction_residual_yaml(f["base"], f["instruct"], f["adapted"], out_dtype="bfloat16"),
        lambda f, o: merging.instruction_residual(f["base"], f["instruct"], f["adapted"], output=o),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_it_means_what_our_merge_does(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    written, merge = PAIRS[name]
    theirs, ours = interpreted(written(folders), "model.layers", 2), state_of(merge(folders, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        # Half a step of bfloat16 is our rounding.
        assert torch.allclose(value.double(), theirs[key], rtol=2**-8, atol=1e-7), key


@pytest.mark.parametrize("name", PAIRS)
def test_mergekit_does_the_same(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Where mergekit can be imported (it is not installed with this package: its pins are of other versions)."""
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    import mergekit.architecture.base as architecture
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    for value in vars(architecture).values():
        # With transformers 5, pydantic finds these unfinished.
        if isinstance(value, type) and value.__name__.startswith("Configured"):
            value.model_rebuild(_types_namespace={**vars(architecture), "torch": torch})
    written, merge = PAIRS[name]
    ours = state_of(merge(folders, tmp_path / "ours"))
    config = MergeConfiguration.model_validate(yaml.safe_load(written(folders)))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions())
    theirs = state_of(tmp_path / "theirs")
    assert theirs.keys() == ours.keys()
    unlike = sum(int((theirs[key] != value).sum()) for key, value in ours.items())
    elements = sum(value.numel() for value in ours.values())
    print(f"{name}: {unlike} of {elements} elements differ")
    for key, value in ours.items():
        assert theirs[key].dtype is value.dtype is torch.bfloat16
        assert torch.allclose(theirs[key].float(), value.float(), rtol=2**-7, atol=1e-7), key
    assert unlike <= 0.01 * elements


def test_mergekit_applies_lines_to_ties_and_dare(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, changes = state_of(folders["base"]), {}
    for method in merging.TASK_METHODS[1:]:
        for name, rates in (("flat", (0.5, 0.0)), ("scaled", (0.5, 1.5))):
            text = merging.lines_yaml(
                folders["base"], [folders["instruct"], folders["adapted"]], *rates, merge_method=method, density=0.5
            )
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, str(tmp_path / method / name), MergeOptions(random_seed=1))
            found = state_of(tmp_path / method / name)
            changes[name] = {key: value - base[key].float() for key, value in found.items()}
        if method == "ties":  # the others drop entries at random
            for key, change in changes["flat"].items():
                scale = 4.0 if ".layers.1." in key else 1.0
                assert torch.allclose(changes["scaled"][key], scale * change, atol=1e-6), key


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merging.average_yaml(["a"]), "checkpoints must be a list of 2 or more"),
        (lambda: merging.average_yaml(["a", 3]), r"checkpoints\[1\] must be a folder or a name on the Hub, got 3"),
        (lambda: merging.average_yaml(["a+b", "c"]), r"checkpoints\[0\]='a\+b': mergekit reads \+ and @ in a name"),
        (lambda: merging.average_yaml(["a/b@c@d", "c"]), r"checkpoints\[0\]='a/b@c@d': mergekit reads"),
        (lambda: merging.average_yaml(["a", "b"], out_dtype="int8"), "out_dtype must be one of float32, bfloat16"),
        (lambda: merging.average_yaml(["a", "b"], tokenizer_source=3), "tokenizer_source must be a folder or a name"),
        (
            lambda: merging.lines_yaml("a/b", "c", 0.5),
            "blocks must be given where base is not a folder, got base='a/b'",
        ),
        (lambda: merging.lines_yaml("a", "c", blocks="h"), "alpha must be given for one tuned model"),
        (
            lambda: merging.lines_yaml("a", "c", 0.5, blocks="h", merge_method="slerp"),
            "merge_method must be one of task_arithmetic, ties, dare_linear, dare_ties, got 'slerp'",
        ),
        (
            lambda: merging.lines_yaml("a", "c", 0.5, blocks="h", density=0.5),
            "density must be left out for task_arithmetic, got 0.5",
        ),
        (
            lambda: merging.lines_yaml("a", "c", 0.5, blocks="h", merge_method="ties"),
            "density must be a number above 0, up to 1 for ties, got None",
        ),
        (
            lambda: merging.lines_yaml("a", "c", 0.5, blocks="h", merge_method="ties", density=0),
            "density must be a number above 0, up to 1 for ties, got 0",
        ),
        (
            lambda: merging.lines_yaml("a", ["c", "d"], beta=0.5, blocks="h", merge_method="ties", density=0.5),
            "alpha must be given for ties",
        ),
    ],
)
def test_bad_inputs_are_named(call: Callable[[], str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_filter_that_would_match_more_is_refused(tmp_path: Path) -> None:
    """mergekit looks for the text anywhere in a name."""
    import json

    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "homemade"}))
    tensors = {name: torch.ones(1) for name in ("h.0.w", "h.1.w", "patch.norm.w")}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MergeError, match=r"filter 'h\.' would also match patch.norm.w, which are outside the blocks"):
        merging.lines_yaml(tmp_path, "org/tuned", 0.5)
