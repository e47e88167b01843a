"""Recipes: what a file means, every way to get it wrong, and whole runs from the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import warm
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pretrain_ext import PluginError, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, MetadataCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.metadata import ControlTokens, Template
from hf_pretrain_ext.recipe import RecipeError, load_recipe
from hf_pretrain_ext.stages import read_stages

WORDS = "the cat sat on the mat and the dog ran over the hill to see what the bird had made of it".split()


def text(number: int, seed: int) -> list[str]:
    import random

    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(number)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and three small corpora."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(text(50, 0), vocab_size=300)
    model = tiny.model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, number, seed in (("new", 60, 1), ("old", 40, 2), ("held", 20, 3)):
        lines = [json.dumps({"text": document}) for document in text(number, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def recipe(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = {name: {"path": "json", "data_files": str(world / f"{name}.jsonl")} for name in ("new", "old", "held")}
    return {
        "model": str(world / "model"),
        "data": data["new"],
        "pack": {"block_size": 16},
        "training": {
            "output_dir": str(output),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
        "rewarm": {"peak_lr": 1e-3, "warmup": 2},
        "replay": {"sources": {"old": data["old"]}, "ratio": 0.25},
        "forgetting": {"sets": {"old": data["held"]}, "every": 3, "first_steps": "sparse"},
        **changes,
    }


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_recipe_is_the_same_settings_as_python(world: Path, tmp_path: Path) -> None:
    trainer = load_recipe(written(tmp_path / "r.yaml", recipe(world, tmp_path / "out"))).build()
    rewarm, replay, forgetting = (
        next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, kind))
        for kind in (RewarmCallback, ReplayCallback, ForgettingCallback)
    )
    assert rewarm.config == RewarmCallback(peak_lr=1e-3, warmup=2).config
    assert replay.settings() == ReplayCallback({"old": None}, ratio=0.25).settings()
    assert forgetting.config == ForgettingCallback({"old": []}, every=3, first_steps="sparse").config
    assert trainer.args.max_steps == 6 and trainer.args.learning_rate == 1e-3
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {16}


def test_numbers_as_everybody_writes_them(world: Path, tmp_path: Path) -> None:
    """YAML 1.1 takes 3e-4 for text; here it is a number. Fractions, text with units and later ratios come through."""
    content = yaml.safe_dump(recipe(world, tmp_path / "out")).replace("peak_lr: 0.001", "peak_lr: 3e-4")
    content = content.replace(
        "ratio: 0.25", "ratio: .25\n  unit: tokens\n  ratio_changes: {0.5: 1e-1, 2k tokens: .05}"
    )
    made = load_recipe(written(tmp_path / "r.yaml", content), ["training.learning_rate=3e-4", "rewarm.min_lr=5%"])
    assert made.rewarm == {"peak_lr": 3e-4, "warmup": 2, "min_lr": "5%"}
    assert made.replay == {"ratio": 0.25, "unit": "tokens", "ratio_changes": {0.5: 0.1, "2k tokens": 0.05}}
    assert made.training["learning_rate"] == 3e-4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"replya": {}}, "the recipe has no setting 'replya': did you mean 'replay'?"),
    ({"pack": {"blocksize": 3}}, "pack has no setting 'blocksize': did you mean 'block_size'?"),
    ({"pack": {"isolate": True}}, "pack.block_size is missing: Tokens a block."),
    ({"pack": {"block_size": "many"}}, "pack.block_size must be int, got 'many'"),
    ({"rewarm": {"peak": 1e-3}}, "rewarm has no setting 'peak': did you mean 'peak_lr'?"),
    ({"rewarm": {"peak_lr": "high"}}, "rewarm.peak_lr must be float, got 'high'"),
    ({"rewarm": {"peak_lr": 1e-3, "schedule": "cosin"}}, "cosin"),
    ({"data": {"path": "json", "datafiles": "x"}}, "data has no setting 'datafiles': did you mean 'data_files'?"),
    ({"data": None}, "data must hold settings by name, got None"),
    ({"model": {"revision": "main"}}, "model.name_or_path is missing"),
    ({"training": {"output_dir": "x", "learning_rat": 1}}, "did you mean 'learning_rate'?"),
    ({"training": {"max_steps": 3}}, "training.output_dir is missing"),
    ({"training": {"output_dir": "x", "max_steps": "3 steps"}}, "training.max_steps must be int, got '3 steps'"),
    ({"trainer": "ppo"}, "trainer must be 'trainer' or 'sft', got 'ppo'"),
    ({"replay": {"ratio": 0.1}}, "replay.sources is missing"),
    ({"replay": {"sources": {"a": {"path": "json"}}, "ratio": 2}}, "replay: ratio must be"),
    ({"replay": {"sources": {"a": {"pth": "json"}}}}, "replay.sources.a has no setting 'pth': did you mean 'path'?"),
    (
        {"replay": {"sources": {"a": {"path": "json"}}, "mode": "more"}},
        "replay.mode must be 'equivalent' or 'additional'",
    ),
    ({"forgetting": {"sets": {"a": {"path": "json"}}, "evry": 3}}, "did you mean 'every'?"),
    ({"plan": {"order": "random"}}, "plan.order must be 'shuffled' or 'original' or 'host', got 'random'"),
    ({"trainer": "sft"}, "pack: SFTTrainer packs by itself"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, world: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", recipe(world, tmp_path / "out", **changes))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_data_that_is_torn_is_named(world: Path, tmp_path: Path) -> None:
    """`datasets` says only that something went wrong; the error behind it is shown too."""
    (tmp_path / "torn.jsonl").write_text('{"text": "a b"}\n{"text"\n')
    content = recipe(world, tmp_path / "out", data={"path": "json", "data_files": str(tmp_path / "torn.jsonl")})
    with pytest.raises(RecipeError, match=r"data \(path='json', split='train'\): DatasetGenerationError.*JSON"):
        load_recipe(written(tmp_path / "r.yaml", content)).build()


def test_what_is_right_stays_right(world: Path, tmp_path: Path) -> None:
    """Sections with nothing behind their name, weights of sources, a stream of tokens, names that are numbers."""
    held = {"path": "json", "data_files": str(world / "held.jsonl")}
    content = recipe(world, tmp_path / "out", plan=None, eval_data=None)
    content["replay"]["sources"] = {2023: {**held, "weight": 1}, "other": {**held, "weight": 3.0}}
    content["training"]["report_to"] = ["none"]
    made = load_recipe(written(tmp_path / "r.yaml", content), ["rewarm.warmup=1e-1", "forgetting="])
    assert made.replay is not None and made.replay["weights"] == {"2023": 1.0, "other": 3.0}
    assert made.plan is None and made.forgetting is None and made.rewarm == {"peak_lr": 1e-3, "warmup": 0.1}


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    for content, message in (
        ("a: [", "is not YAML"),
        ("- a\n- b", "must hold settings by name, got list"),
        ("model: x\ndata: {path: json}\nmodel: y\n", "line 3: 'model' is given twice"),
        ("training: {output_dir: x}\ndata: {path: json}", "model is missing"),
        ("model: !!python/object/apply:os.system ['true']", "is not YAML"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(written(tmp_path / "r.yaml", content))
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        load_recipe(written(tmp_path / "r.yaml", "model: x"), ["training.max_steps"])
    with pytest.raises(RecipeError, match="model holds 'x', not settings"):
        load_recipe(written(tmp_path / "r.yaml", "model: x"), ["model.name=y"])


def test_raw_text_without_pack_is_explained(world: Path, tmp_path: Path) -> None:
    content = recipe(world, tmp_path / "out")
    del content["pack"]
    with pytest.raises(RecipeError, match=r"hold \['text'\] and no input_ids: add a section"):
        load_recipe(written(tmp_path / "r.yaml", content)).build()


def ended(folder: Path) -> dict[str, Any]:
    return next(line for line in read_trace(folder) if line["event"] == "end")


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


ACCELERATE = [
    *("accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"),
]


def command(*arguments: Any, ranks: int = 0, launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
    start = warm.ranks(ranks) if ranks else warm.python()
    if ranks and launcher == "accelerate":
        start = [sys.executable, "-m", *ACCELERATE, str(ranks)]
    return subprocess.run(
        [*start, "-m", "hf_pretrain_ext", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_plan_train_report(world: Path, tmp_path: Path) -> None:
    """What a new user types: plan, train, report. The plan is the run's; the page holds its figures."""
    path = written(tmp_path / "r.yaml", recipe(world, tmp_path / "out"))
    planned = command("plan", path, "--output", tmp_path / "plan.png")
    assert planned.returncode == 0, planned.stderr
    assert "6 optimizer steps of 4 samples: 24 samples, 384 tokens" in planned.stdout
    assert re.search(r"^old \(replayed\) .* 6 +25\.00% +96 +25\.00%", planned.stdout, re.M)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "trace.jsonl").exists()

    trained = command("train", path)
    assert trained.returncode == 0, trained.stderr
    end = ended(tmp_path / "out")
    assert end["counts"]["old"]["tokens"] == 96 and end["step"] == 6
    assert (tmp_path / "out" / "recipe.yaml").read_text() == path.read_text()
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}

    made = command("report", tmp_path / "out", "--output", tmp_path / "report.html")
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and "replay" in page and "forgetting" in page


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_several_ranks_train_the_same_run(launcher: str, world: Path, tmp_path: Path) -> None:
    """Two ranks of 2 samples see what one rank of 4 sees; one of them prints, plans and writes.

    `accelerate launch` starts one process on a CPU, however many are asked for.
    """
    losses = {}
    several = 2 if launcher == "torchrun" else 1
    for ranks in (0, several):
        output = tmp_path / str(ranks)
        path = written(tmp_path / f"{ranks}.yaml", recipe(world, output))
        size = ["--set", f"training.per_device_train_batch_size={4 // max(ranks, 1)}"]
        done = command("train", path, *size, ranks=ranks, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("makes a page of it") == 1
        trace = read_trace(output)
        assert ended(output)["counts"]["old"]["samples"] == 6
        losses[ranks] = [line["scalars"]["loss"] for line in trace if "loss" in line.get("scalars", {})]
    assert losses[0] == pytest.approx(losses[several], rel=1e-3) and len(losses[0]) == 6


def test_resume_from_the_command_line(world: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", recipe(world, tmp_path / "out"))
    saving = ["--set", "training.save_strategy=steps", "--set", "training.save_steps=4"]
    assert command("train", path, *saving).returncode == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = command("train", path, *saving, "--resume", tmp_path / "out" / "checkpoint-4")
    assert again.returncode == 0, again.stderr
    assert [line["event"] for line in read_trace(tmp_path / "out")].count("resume") == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    # What reproduces it is kept: the recipe with its changes, and a command that runs.
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept == {**yaml.safe_load(path.read_text()), "training": kept["training"]}
    assert kept["training"]["save_steps"] == 4 and load_recipe(tmp_path / "out" / "recipe.yaml").text
    told = read_trace(tmp_path / "out")[0]["command"]
    assert told.startswith("python -m hf_pretrain_ext") and told.endswith("training.save_steps=4")
    refused = command("train", path, *saving, "--set", "rewarm.peak_lr=5e-3", "--resume")
    assert refused.returncode == 1 and "hf-pretrain-ext: cannot resume" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def first_stage(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the constant phase of an infinite schedule."""
    output = tmp_path_factory.mktemp("first") / "out"
    settings = recipe(world, output, rewarm={"peak_lr": 1e-2, "schedule": "infinite_cosine", "total_steps": 15})
    settings["training"] |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 12}
    path = written(output.parent / "first.yaml", {k: v for k, v in settings.items() if k != "replay"})
    assert main(["train", str(path)]) == 0
    return output / "checkpoint-12"


def later(world: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A recipe without model, rate and replay of its own."""
    settings = recipe(world, output)
    for name in ("model", "rewarm", "replay", "forgetting"):
        settings.pop(name, None)
    return {**settings, **sections}


def test_a_stage_after_others(world: Path, first_stage: Path, tmp_path: Path) -> None:
    """Weights of the checkpoint, its constant rate, its data replayed, its history."""
    old = {"path": "json", "data_files": str(world / "new.jsonl")}
    settings = later(
        world,
        tmp_path / "out",
        data={"path": "json", "data_files": str(world / "old.jsonl")},
        continue_from={"checkpoint": str(first_stage), "name": "second"},
        rewarm={"peak_lr": 1e-2, "schedule": "infinite_cosine", "total_steps": 40},
        replay={"from_history": True, "ratio": 0.25, "sources": {"stage-1": old}},
        plan={"seed": 5},
    )
    made = load_recipe(written(tmp_path / "r.yaml", settings)).build()
    before = load_file(first_stage / "model.safetensors")
    assert all(torch.equal(made.model.state_dict()[name], value) for name, value in before.items())
    made.train()
    stages = read_stages(tmp_path / "out")
    assert [stage.name for stage in stages] == ["base", "stage-1", "second"] and stages[2].seed == 5
    rates = {line["learning_rate"] for line in made.state.log_history if "learning_rate" in line}
    assert rates == {stages[1].rate}
    assert {source.name: source.replayed for source in stages[2].sources} == {"second": False, "stage-1": True}


def test_a_stage_after_an_adapter(world: Path, tmp_path: Path) -> None:
    """The checkpoint holds the adapter alone; the model is its base with the adapter around it, to be trained."""
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "adapter")
    settings = later(
        world,
        tmp_path / "out",
        continue_from={"checkpoint": str(tmp_path / "adapter"), "name": "second"},
        rewarm={"peak_lr": 1e-2, "warmup": 1},
    )
    made = load_recipe(written(tmp_path / "r.yaml", settings)).build()
    expected = {name: value.clone() for name, value in adapted.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in made.model.state_dict().items())
    made.train()
    now = made.model.state_dict()
    assert {"lora_" in name for name in now if not torch.equal(now[name], expected[name])} == {True}


def test_a_stage_that_warms_up_all_the_same(world: Path, first_stage: Path, tmp_path: Path) -> None:
    """`go_on` and `allow_no_effect` are settings of plug-ins, not of the schedule or the mixture."""
    settings = later(
        world,
        tmp_path / "out",
        continue_from={"checkpoint": str(first_stage)},
        rewarm={"peak_lr": 1e-2, "schedule": "infinite_cosine", "total_steps": 40, "warmup": 2, "go_on": False},
        replay={"sources": {"old": {"path": "json", "data_files": str(world / "old.jsonl")}}, "ratio": 0},
    )
    with pytest.raises(PluginError, match="allow_no_effect=True"):
        load_recipe(written(tmp_path / "r.yaml", settings)).build()
    made = load_recipe(tmp_path / "r.yaml", ["replay.allow_no_effect=true"]).build()
    learning_rate = made.preview().learning_rate
    assert learning_rate is not None and learning_rate["rates"][:3] == [0.0, 5e-3, 1e-2]
    with pytest.raises(RecipeError, match="go_on must be"):
        load_recipe(tmp_path / "r.yaml", ["rewarm.go_on=3"])
    with pytest.raises(RecipeError, match="did you mean 'go_on'"):
        load_recipe(tmp_path / "r.yaml", ["rewarm.goon=true"])


def test_a_branch_to_deploy(world: Path, first_stage: Path, tmp_path: Path) -> None:
    settings = later(world, tmp_path / "out", anneal={"checkpoint": str(first_stage), "steps": 5, "min_lr": "10%"})
    path = written(tmp_path / "r.yaml", settings)
    assert main(["train", str(path), "--set", "anneal.steps=4"]) == 0
    stages = read_stages(tmp_path / "out")
    assert [stage.kind for stage in stages] == ["unknown", "stage", "anneal"] and stages[2].steps == 4
    scalars = [line.get("scalars", {}) for line in read_trace(tmp_path / "out")]
    logged = [each["learning_rate"] for each in scalars if "learning_rate" in each]
    first, last = stages[1].rate, stages[1].peak / 10
    assert logged == pytest.approx([first * (last / first) ** (step / 4) for step in range(4)])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"continue_from": ""}, "continue_from: checkpoint is empty"),
        ({"continue_from": {"carry": ["weights"]}}, "continue_from.checkpoint is missing"),
        ({"l2_init": {"strength": "a"}}, "l2_init: strength"),
        ({"benchmarks": {"tasks": 3}}, "benchmarks: tasks"),
        (
            {"continue_from": {"checkpoint": "a", "carry": ["moments"]}},
            "continue_from: carry must be ('weights',), ",
        ),
        ({"continue_from": {"checkpoint": "a", "from": "b"}}, "continue_from has no setting 'from'"),
        ({"anneal": {"checkpoint": "a"}}, "anneal.steps is missing"),
        ({"anneal": {"checkpoint": "a", "steps": 3, "shape": "wsd"}}, "anneal.shape must be"),
        ({"anneal": {"checkpoint": "a", "steps": 3}, "continue_from": "a"}, "a stage is one or the other"),
        ({"replay": {"from_history": True, "ratio": 0.1}}, "there is no history without `continue_from`"),
        ({"model": None}, "model is missing"),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(
    sections: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    settings = {**recipe(world, tmp_path / "out"), **sections}
    if settings["model"] is None:
        del settings["model"]
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(written(tmp_path / "r.yaml", settings))


@pytest.mark.parametrize("section", ["continue_from", "anneal"])
def test_a_stage_after_nothing_is_one_message(section: str, world: Path, tmp_path: Path) -> None:
    """It names what the user wrote, with a model beside it and without."""
    nowhere = {"checkpoint": str(tmp_path / "nowhere"), **({"steps": 3} if section == "anneal" else {})}
    for settings in (recipe(world, tmp_path / "out"), later(world, tmp_path / "out")):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(written(tmp_path / "r.yaml", {**settings, section: nowhere}))])
        assert f"{section}.checkpoint: " in str(ended.value) and "nowhere' is no folder here" in str(ended.value)


@pytest.mark.slow
def test_kill_test_of_a_recipe(world: Path, tmp_path: Path) -> None:
    """For users: the run of their recipe, killed once and compared; and a recipe that cannot train."""
    path = written(tmp_path / "r.yaml", recipe(world, tmp_path / "out"))
    saving = ["--set", "training.save_strategy=steps", "--set", "training.save_steps=2"]
    done = command("kill-test", path, *saving, "--kills", 1, "--seconds", 8, "--output", tmp_path / "kill")
    assert done.returncode == 0 and "starts: equal to the run left alone" in done.stdout, done.stdout + done.stderr
    again = command("kill-test", path, "--output", tmp_path / "kill")
    assert again.returncode == 1 and "holds an earlier test" in again.stderr


def test_the_sft_trainer_prepares_raw_text(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    content = recipe(world, tmp_path / "out", trainer="sft")
    del content["pack"]
    content["training"] |= {"max_length": 32, "bf16": False, tiny.CHECKPOINTING: False}
    trainer = load_recipe(written(tmp_path / "r.yaml", content)).build()
    assert "SFTTrainer" in type(trainer).__name__
    trainer.train()
    assert trainer.plugin_run.realised()["old"]["samples"] == 6


def test_errors_of_the_command_line_are_one_message(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "r.yaml", recipe(world, tmp_path / "out", replay={"ratio": 0.1}))
    for arguments, message in (
        (["plan", str(path)], "replay.sources is missing"),
        (["train", str(tmp_path / "none.yaml")], "none.yaml"),
        (["report", str(tmp_path)], "no trace at"),
        (["memory", "a/b/c"], "a/b/c is no folder or file, nor a name on the Hub"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert str(stop.value.code).startswith("hf-pretrain-ext: ") and message in str(stop.value.code)


@pytest.mark.parametrize("name", ["demo", "plan", "train", "report", "recall", "kill-test", "plugins"])
def test_help_says_what_to_type(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith(f"usage: hf-pretrain-ext {name}")
    assert max(len(line) for line in shown.splitlines()) <= 119
    if name in ("plan", "train", "kill-test"):
        example = shown.split("A recipe is a YAML file:")[1].split("Further sections")[0]
        assert {"model", "data", "pack", "training", "rewarm", "replay", "forgetting"} == set(yaml.safe_load(example))


def test_the_recipe_in_the_help_and_in_the_module_is_one() -> None:
    from hf_pretrain_ext import cli, recipe

    examples = [
        yaml.safe_load(re.search(r"(?m)(^ +\w+: .*\n)+", document or "").group(0))  # type: ignore[union-attr]
        for document in (cli._RECIPE, recipe.__doc__)
    ]
    assert examples[0] == examples[1]


# Raw documents


@pytest.fixture(scope="module")
def documents(world: Path) -> Path:
    """The corpora with an address and a score each, the old one with other names of its columns."""
    for name, number, seed in (("new", 90, 1), ("old", 60, 2), ("held", 20, 3)):
        column = "body" if name == "old" else "text"
        rows = [
            {column: document, "meta": {"url": f"https://{name}.org/{n}"}, "score": n % 4}
            for n, document in enumerate(text(number, seed))
        ]
        (world / f"{name}-documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def of_documents(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = {n: {"path": "json", "data_files": str(world / f"{n}-documents.jsonl")} for n in ("new", "old", "held")}
    given = recipe(
        world,
        output,
        data=data["new"],
        eval_data=data["held"],
        replay={"sources": {"old": {**data["old"], "text_column": "body"}}, "ratio": 0.25},
        forgetting={"sets": {"old": data["held"]}, "every": 3, "first_steps": "sparse"},
        metadata={
            "template": "{domain}\n",
            "columns": {"domain": ["meta.url", "domain"]},
            "block_size": 32,
            "cooldown": "34%",
            "control": {"thresholds": 1, "tokens": ["<|short|>", "<|long|>"], "drop": 0},
        },
        **changes,
    )
    return {name: value for name, value in given.items() if name != "pack"}


def test_raw_documents_with_metadata_and_control_tokens(documents: Path, tmp_path: Path) -> None:
    """As Python code would do it: conditioned blocks to train on, plain ones to replay, probe and evaluate on."""
    made = load_recipe(written(tmp_path / "r.yaml", of_documents(documents, tmp_path / "out")))
    trainer = made.build()
    plugin = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, MetadataCallback))
    control = ControlTokens(1, ["<|short|>", "<|long|>"], drop=0)
    template = Template("{domain}\n", {"domain": ("meta.url", "domain")})
    assert plugin.settings() == MetadataCallback(template, block_size=32, cooldown="34%", control=control).settings()
    trainer.train()
    tokenizer = trainer.processing_class
    ids = tokenizer.convert_tokens_to_ids(["<|short|>", "<|long|>"])
    sources = {source.name: source.dataset for source in trainer.plugin_run.plan.sources}
    assert set(sources) == {"conditioned", "plain", "old"}
    decoded = tokenizer.decode(sources["conditioned"][0]["input_ids"])
    assert re.match(r"new\.org\n<\|(short|long)\|>", decoded), decoded
    for rows in (sources["plain"], sources["old"], trainer.eval_dataset):
        assert not any(set(ids) & set(row) for row in rows["input_ids"]) and len(rows[0]["input_ids"]) == 32
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.model.config.vocab_size == 302 and trainer.model.config.fitted_tokens


def test_a_stream_of_raw_documents(documents: Path, tmp_path: Path) -> None:
    content = of_documents(documents, tmp_path / "out")
    content["data"]["streaming"] = True
    trainer = load_recipe(written(tmp_path / "r.yaml", content)).build()
    trainer.train()
    assert trainer.state.global_step == 6


METADATA_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"metadata": {"template": "{domain}\n"}}, "metadata.block_size is missing: Tokens a block."),
    ({"metadata": {"block_size": 32, "templat": "x"}}, "metadata has no setting 'templat': did you mean 'template'?"),
    ({"metadata": {"block_size": 32, "cooldown": 2.0}}, "metadata: cooldown must be an int (steps)"),
    ({"metadata": 32}, "metadata must hold settings by name, got 32"),
    ({"metadata": {"block_size": 32, "control": {}}}, "metadata.control.thresholds is missing"),
    ({"metadata": {"block_size": 32, "control": 0.5}}, "metadata.control must hold settings by name, got 0.5"),
    (
        {"metadata": {"block_size": 32, "control": {"thresholds": [1, 0]}}},
        "metadata.control: thresholds must be finite numbers, each above the one before",
    ),
    (
        {"metadata": {"block_size": 32, "control": {"thresholds": 1, "token": []}}},
        "metadata.control has no setting 'token': did you mean 'tokens'?",
    ),
    ({"pack": {"block_size": 16}}, "pack: metadata makes blocks of its own, of metadata.block_size tokens"),
    ({"trainer": "sft"}, "trainer: metadata takes raw documents, and SFTTrainer tokenizes them"),
    (
        {"eval_data": {"path": "json", "data_files": "x.jsonl", "streaming": True}},
        "eval_data.streaming: only the data of the run can be a stream of raw documents",
    ),
]


@pytest.mark.parametrize(("changes", "message"), METADATA_WRONG, ids=range(len(METADATA_WRONG)))
def test_what_is_wrong_with_metadata_is_said_before_data_is_loaded(
    changes: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    content = {**of_documents(world, tmp_path / "out"), **changes}
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(written(tmp_path / "r.yaml", content))


def test_documents_that_hold_no_such_column(documents: Path, tmp_path: Path) -> None:
    content = of_documents(documents, tmp_path / "out")
    content["metadata"]["control"]["column"] = "toxicity"
    made = load_recipe(written(tmp_path / "r.yaml", content))
    with pytest.raises(PluginError, match=r"control tokens take the columns \['toxicity'\]"):
        made.build()
