"""The recipes of examples/recipes are what the guide says: each is loaded as it is, and run shrunk to toys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from test_recipe import text

from hf_pretrain_ext.advice import data_constrained
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples" / "recipes").glob("*.yaml"))
# What makes a toy of a run; all else stays as it is in the file.
SMALL = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = train_tokenizer(text(50, 0), vocab_size=300)
    model = tiny.model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def first_stage(world: Path) -> Path:
    """A checkpoint in the constant phase of an infinite schedule, as a recipe makes one."""
    folder = world / "first"
    (world / "stage-1.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in text(60, 9)))
    first = {
        "model": str(world / "model"),
        "data": {"path": "json", "data_files": str(world / "stage-1.jsonl")},
        "pack": {"block_size": 48, "seed": 0},
        "training": {
            **SMALL,
            "output_dir": str(folder),
            "learning_rate": 1e-3,
            "save_strategy": "steps",
            "save_steps": 8,
        },
        "rewarm": {"peak_lr": 1e-3, "schedule": "infinite_cosine", "total_steps": 10},
    }
    (world / "first.yaml").write_text(yaml.safe_dump(first))
    load_recipe(world / "first.yaml").build().train()
    return folder / "checkpoint-8"


def shrunk(content: dict[str, Any], world: Path, output: Path) -> dict[str, Any]:
    """The same recipe with a tiny model, files made here, short blocks and few steps."""

    def files(value: Any, seed: int = 1) -> Any:
        if isinstance(value, dict) and "data_files" in value:
            path = world / value["data_files"]
            rows = [{"text": each, "repository": f"org/{n % 3}"} for n, each in enumerate(text(60, seed))]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return {**value, "data_files": str(path)}
        if isinstance(value, dict):
            return {key: files(each, seed + n + 1) for n, (key, each) in enumerate(value.items())}
        return value

    made = files(content)
    if "continue_from" in made:
        made["continue_from"]["checkpoint"] = str(first_stage(world))
        made["replay"]["sources"]["stage-1"]["data_files"] = str(world / "stage-1.jsonl")
        made["model"] = str(world / "model")
    model = made["model"] if isinstance(made["model"], dict) else {"name_or_path": made["model"]}
    made["model"] = {**model, "name_or_path": str(world / "model")}
    made["training"] |= {**SMALL, "output_dir": str(output)}
    made["training"].pop("save_steps", None)
    for section in ("pack", "metadata"):
        if section in made:
            made[section]["block_size"] = 48
    if "gradnormlorp" in made:
        made["gradnormlorp"]["rank"] = 4
    if "reptile" in made:
        made["reptile"]["every"] = 2
    return made


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_one_and_runs(path: Path, world: Path, tmp_path: Path) -> None:
    as_it_is = load_recipe(path)
    (tmp_path / "toy.yaml").write_text(
        yaml.safe_dump(shrunk(yaml.safe_load(path.read_text()), world, tmp_path / "out"))
    )
    toy = load_recipe(tmp_path / "toy.yaml")
    assert set(toy.plugins) == set(as_it_is.plugins) and bool(toy.replay) == bool(as_it_is.replay)
    trainer = toy.build()
    trainer.train()
    assert trainer.state.global_step == 8
    counts = trainer.plugin_run.realised()
    shares = {name: entry["samples"] / 32 for name, entry in counts.items() if entry["replayed"]}
    assert sum(shares.values()) == pytest.approx((as_it_is.replay or {"ratio": 0})["ratio"], abs=1 / 32)
    assert set(trainer.plugin_run.plugins[0].run.output_dir) and (tmp_path / "out" / "trace.jsonl").is_file()


def test_there_is_one_for_each_common_case() -> None:
    assert {path.stem for path in RECIPES} == {
        "code",
        "data_constrained",
        "domain_24gb",
        "instruct_model",
        "many_stages",
        "new_language",
    }


def test_the_data_constrained_recipe_is_what_the_advice_says() -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "data_constrained"))
    advice = data_constrained(300e6, 200e6)
    assert recipe.training["num_train_epochs"] == advice.epochs
    assert recipe.training["weight_decay"] == advice.weight_decay
    assert recipe.training["learning_rate"] == recipe.rewarm["peak_lr"] == advice.learning_rate
