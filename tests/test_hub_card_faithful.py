"""Cards say what holds of the weights that are published, and keep what a user wrote in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoModelForCausalLM, Trainer

from hf_pretrain_ext import extend
from hf_pretrain_ext.base_model import Base
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.hub_card import BEGIN, END, read_facts, write_card, writing
from hf_pretrain_ext.hub_card.metadata import metadata_of, without_paths
from hf_pretrain_ext.hub_card.writing import filled_only, kept_card, limits, put_back, section
from hf_pretrain_ext.report.drawing import save_png, style
from hf_pretrain_ext.report.life import life_figure
from hf_pretrain_ext.run_stage import _base_of
from hf_pretrain_ext.sources import hub_origin
from hf_pretrain_ext.stages import SeenSource, Stage, write_stages

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    plugins = [ReplayCallback(tiny.rows(20, seed=3), ratio=0.25), ForgettingCallback({"old": tiny.rows(8, seed=3)})]
    trained = extend(tiny.trainer(tmp_path_factory.mktemp("run"), *plugins, max_steps=3))
    trained.train()
    return trained


@pytest.fixture
def copied(run: Any, tmp_path: Path) -> Path:
    """The records of the run, without a card."""
    for name in ("trace.jsonl", "stages.json"):
        shutil.copy(Path(run.args.output_dir, name), tmp_path)
    return tmp_path


@pytest.fixture
def card(run: Any) -> Any:
    path = Path(run.args.output_dir, "README.md")
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def head(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text("utf-8").split("---")[1]))


# What the user wrote


def test_fields_that_are_not_given_stay(copied: Path) -> None:
    path = copied / "README.md"
    path.write_text("---\nlicense: llama3\nlanguage: de\nlibrary_name: sentence-transformers\n---\n\n# Mine\n")
    write_card(copied, metadata={"license": None, "language": None}, figures=False)
    assert main(["card", str(copied)]) == 0
    kept = head(path)
    assert (kept["license"], kept["language"], kept["library_name"]) == ("llama3", "de", "sentence-transformers")
    write_card(copied, base_model="org/first", figures=False)
    write_card(copied, base_model="org/second", figures=False)
    assert head(path)["base_model"] == "org/second"


def test_the_trainers_draft_is_filled_and_not_written_over(run: Any, card: Path) -> None:
    run.create_model_card(license="mit")
    text = card.read_text("utf-8")
    for words in ("more information needed", "None", "[](", "generated automatically"):
        assert words not in text.split(BEGIN)[0].replace("More", "more"), words
    assert "### Training hyperparameters" in text and head(card)["license"] == "mit"
    mine = "## Mine\n\nWritten by me.\n\n## Training procedure"
    card.write_text(text.replace("## Training procedure", mine).replace("tags:\n", "tags:\n- mine\n"))
    run.create_model_card(tags=["more"])
    again = card.read_text("utf-8")
    assert "Written by me." in again and again.count(BEGIN) == again.count(END) == 1
    assert head(card)["license"] == "mit" and {"mine", "more", "generated_from_trainer"} <= set(head(card)["tags"])
    run.create_model_card(license="apache-2.0")
    assert head(card)["license"] == "apache-2.0" and "Written by me." in card.read_text("utf-8")


def test_a_card_of_the_users_own_is_kept_and_a_draft_is_not(run: Any, card: Path) -> None:
    card.write_text("# Ours\n\nAll about it.\n")
    run.create_model_card()
    text = card.read_text("utf-8")
    assert "# Ours\n\nAll about it.\n" in text and "Training hyperparameters" not in text and text.count(BEGIN) == 1
    draft = (
        "<!-- This model card has been generated automatically according to the information the Trainer had access "
        "to. You\nshould probably proofread and complete it, then remove this comment. -->\n\n# x\n\nThis model is a "
        "fine-tuned version of [](https://huggingface.co/) on the None dataset.\n\n## Model description\n\n"
    )
    for body, kept in ((f"{draft}More information needed\n", False), (f"{draft}A Llama.\n", True)):
        card.write_text(body)
        assert (kept_card(card) == body) is kept


def test_a_push_keeps_what_was_there_before_the_adapter_was_saved(
    run: Any, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes tags and base anew at every save, the first thing that a push does."""
    run.create_model_card()
    card.write_text(card.read_text("utf-8").replace("tags:\n", "tags:\n- mine\n"))

    def push(self: Any) -> None:
        card.write_text(card.read_text("utf-8").replace("- mine\n", "- lora\n"))
        self.create_model_card()

    monkeypatch.setattr(Trainer, "push_to_hub", push)
    run.push_to_hub()
    assert "mine" in head(card)["tags"] and run._kept_card is None


def test_a_card_that_cannot_be_read_is_put_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Host's\n")
    with pytest.raises(ValueError, match="the card's YAML cannot be read"):
        put_back(path, "---\na: [\n---\n\nMine.\n")
    assert path.read_text() == "---\na: [\n---\n\nMine.\n"


def test_the_form_of_peft_leaves_nothing_unfilled() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    form = ModelCard.from_template(ModelCardData()).text + "\n### Framework versions\n\n- PEFT 0.21.2"
    assert filled_only(form, "mine") == "# mine\n\n### Framework versions\n\n- PEFT 0.21.2\n"


# Adapters, and bases


def test_an_adapter_by_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a relative folder, whose path looks like a name on the Hub; data sets as text, library as the host says."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    for part in (tiny.model(), tokenizer):
        part.save_pretrained("runs/base")
    trainer = extend(
        SFTTrainer(
            model="runs/base",
            args=SFTConfig(
                "out",
                max_steps=2,
                max_length=16,
                save_steps=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=tiny.documents(20).select_columns("text"),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        ),
        RewarmCallback(peak_lr=1e-3, warmup=1),
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="org/text")
    text = Path("out/README.md").read_text("utf-8")
    said = head(Path("out/README.md"))
    assert said["library_name"] == "peft" and said["datasets"] == ["org/text"] and text.count(BEGIN) == 1
    assert "None" not in text.replace("NoneType", "") and "runs/base" not in text
    assert json.loads(Path("out/stages.json").read_text())["stages"][0]["base"]["local"] is True
    monkeypatch.chdir("/")
    facts = read_facts(tmp_path / "out")
    assert facts.relation == "adapter" and facts.base_model is None and facts.local_base == "runs/base"


def test_the_library_of_an_adapter_is_peft(copied: Path) -> None:
    facts = dataclasses.replace(read_facts(copied), relation="adapter", base_model="org/base")
    host = {"library_name": "transformers", "base_model_relation": "finetune"}
    found = metadata_of(facts, "x", host)
    assert (found["library_name"], found["base_model_relation"]) == ("peft", "adapter")
    assert (
        metadata_of(facts, "x", {"library_name": "sentence-transformers"})["library_name"] == "sentence-transformers"
    )


def test_a_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was is decided as training begins: later, the folder may be somewhere else."""
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("runs/base")
    (stage,) = _base_of(AutoModelForCausalLM.from_pretrained("runs/base"))
    assert stage.base == {"path": "runs/base", "revision": None, "local": True}
    assert Base("runs/base").stage().base["local"] is True  # type: ignore[index]
    write_stages("out", [stage, Stage(1, "one", steps=2)])
    shutil.rmtree("runs")
    Path("out/README.md").write_text(
        "---\nbase_model: runs/base\ntags: ['base_model:adapter:runs/base']\n---\n\n# x\n"
    )
    text = write_card("out").read_text("utf-8")
    assert "runs/base" not in text and "was not recorded under a name on the Hub" in text
    assert without_paths({"base_model": "org/base"}, "runs/base") == {"base_model": "org/base"}


def test_the_revision_of_the_base_is_said(tmp_path: Path) -> None:
    model = SimpleNamespace(name_or_path="org/base", config=SimpleNamespace(_commit_hash=COMMIT))
    (stage,) = _base_of(model)
    assert stage.base == {"path": "org/base", "revision": COMMIT, "local": False}
    write_stages(tmp_path, [stage, Stage(1, "one", steps=2)])
    assert f"[org/base](https://huggingface.co/org/base) at revision {COMMIT}." in write_card(tmp_path).read_text()
    assert COMMIT not in write_card(tmp_path, base_model="org/other").read_text()


def test_several_bases(copied: Path) -> None:
    text = write_card(copied, metadata={"base_model": ["a/b", "c/d"]}, figures=False).read_text("utf-8")
    assert "Continued from [a/b](https://huggingface.co/a/b), [c/d](https://huggingface.co/c/d)." in text


# Whose losses


def test_losses_are_those_of_the_weights(tmp_path: Path) -> None:
    """The best checkpoint, loaded at the end; and another checkpoint, which knows nothing of what came after it."""
    held_out = tiny.rows(20)
    trainer = extend(
        tiny.trainer(
            tmp_path / "out",
            ForgettingCallback({"old": held_out}),
            eval_dataset=held_out,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **{f"{kind}_strategy": "steps" for kind in ("eval", "save")},
            **{f"{kind}_steps": 2 for kind in ("eval", "save")},
        )
    )
    trainer.train()
    best = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert best < 6
    losses = json.loads((tmp_path / "out" / "forgetting.json").read_text())["sets"]["old"]["losses"]
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text("utf-8").partition(BEGIN)[2]
    assert f"| old | {losses[0]:.4f} | {losses[best]:.4f} |" in text and f"{losses[-1]:.4f}" not in text
    assert f"the best checkpoint, of step {best}, was loaded" in text
    (result,) = head(tmp_path / "out" / "README.md")["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    other = next(step for step in (2, 4) if step != best)
    text = write_card(tmp_path / "out" / f"checkpoint-{other}").read_text("utf-8")
    assert f"| old | {losses[0]:.4f} | {losses[other]:.4f} |" in text and "was loaded" not in text
    assert f"{other} of 6 optimizer steps of 4 samples, {other * 4 * tiny.LENGTH} tokens" in text


def test_a_checkpoint_knows_no_benchmarks_after_training(copied: Path, tmp_path: Path) -> None:
    figures = {"mmlu": {"acc": {"value": 0.5, "stderr": 0.1}}}
    with (copied / "trace.jsonl").open("a") as file:
        for step, when in ((0, "before"), (3, "after")):
            event = {"event": "benchmarks", "step": step, "when": when, "found": figures, "asked": {}}
            file.write(json.dumps(event) + "\n")
    (copied / "checkpoint-3").mkdir()
    assert read_facts(copied).benchmarks[0].after == (0.5, 0.1)
    facts = read_facts(copied / "checkpoint-3")
    assert facts.benchmarks[0].before == (0.5, 0.1) and facts.benchmarks[0].after is None and facts.reached is None


def test_a_loss_of_an_earlier_step_is_not_published_as_the_models(copied: Path) -> None:
    lines = (copied / "trace.jsonl").read_text().splitlines()
    kept = [line for line in lines if not ('"event": "probe"' in line and json.loads(line)["step"] == 3)]
    assert len(kept) == len(lines) - 1
    (copied / "trace.jsonl").write_text("\n".join(kept) + "\n")
    assert "(step 2) |" in write_card(copied, figures=False).read_text("utf-8")
    assert "model-index" not in head(copied / "README.md")


# Several stages, and what was measured


def test_all_stages_are_told(tmp_path: Path) -> None:
    one = Stage(1, "one", steps=4, plugins={"meta_tokens": {"ratio": 0.1}, "rewarm": {"peak_lr": 0.1}})
    two = Stage(2, "two", steps=3, total_steps=3, plugins={"l2_init": {"strength": 1.0}, "rewarm": {"peak_lr": 0.2}})
    write_stages(tmp_path, [one, two])
    text = write_card(tmp_path).read_text("utf-8")
    assert "In its last stage, two: 3 of 3 optimizer steps" in text and "load_meta_tokens" in text
    assert {"meta_tokens", "rewarm", "l2_init"} <= set(head(tmp_path / "README.md")["tags"])
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| meta_", "| rewarm", "| l2_"))]
    assert rows == [["| l2_init", "two"], ["| rewarm", "two"], ["| meta_tokens", "one"], ["| rewarm", "one"]]
    assert "arXiv 2403.08763" in text and "| rate of the next update |" in text
    assert "stages.png" not in text and not (tmp_path / "continued_pretraining").exists()


def test_the_lineage_is_drawn(tmp_path: Path) -> None:
    """As wide as the tokens of each stage, split by source; a base of which nothing is known is hatched."""
    base = Stage(0, "base", kind="unknown")
    one = Stage(1, "one", steps=4, tokens=300, sources=(SeenSource("one", samples=3, tokens=300),))
    read = (SeenSource("two", samples=3, tokens=75), SeenSource("one", samples=1, tokens=25, replayed=True))
    plugins = {"reptile": {"every": "2"}, "replay": {"ratio": 0.25}}
    two = Stage(2, "deploy", kind="anneal", steps=3, tokens=100, sources=read, plugins=plugins)
    write_stages(tmp_path, [base, one, two])
    card = write_card(tmp_path).read_text("utf-8")
    assert "](continued_pretraining/stages.png)" in card
    # Reptile stands aside in a branch.
    assert "| replay | deploy |" in card and "| reptile |" not in card
    assert (tmp_path / "continued_pretraining" / "stages.png").stat().st_size > 10_000
    stages = [{**stage.to_json(), "sources": {s.name: s.tokens for s in stage.sources}} for stage in (base, one, two)]
    with style():
        (panel,) = life_figure({"run": stages}).axes
    bars = [bar.get_bbox().bounds for bar in panel.patches]
    assert bars == [
        (0, 0, pytest.approx(0.12 * 400), 1),
        (48, 0, 300, 1),
        (348, 0, 100, 0.75),
        (348, 0.75, 100, 0.25),
    ]
    assert (
        panel.patches[0].get_hatch() == "//" and panel.patches[3].get_facecolor() == panel.patches[1].get_facecolor()
    )
    assert [each.get_text() for each in panel.texts] == ["base", "one", "deploy (annealed)"]
    many = {"name": "many", "sources": {f"source {n}": 1 + n for n in range(40)}}
    old = {"name": "old", "kind": "stage", "steps": 3}
    with style():
        assert life_figure({"run": stages[:1]}) is None and life_figure({"run": [old]}) is None
        crowded = life_figure({"run": [old, many, {"name": "odd", "sources": {"source 39": float("inf")}}]})
        save_png(crowded, tmp_path / "crowded.png")
        # Lives of unlike lengths, under names of any length: a layout that collapses is a warning, and an error here.
        save_png(
            life_figure({"a": [old], "b": stages, **{f"{k} " * 20: [many] for k in range(20)}}), tmp_path / "x.png"
        )
    words = [each.get_text() for each in crowded.legends[0].get_texts()]
    assert words == [*(f"source {n}" for n in range(34, 40)), "others"]


def test_what_the_stage_recorded_stands_in_for_probes(tmp_path: Path) -> None:
    entry = {"fingerprint": "f", "baseline": 4.0, "best": 2.0, "best_step": 1, "last": 2.5, "last_step": 3}
    write_stages(tmp_path, [Stage(1, "one", steps=3, recorded={"forgetting": {"old": entry}})])
    text = write_card(tmp_path).read_text("utf-8")
    assert "| old | 4.0000 | 2.5000 | +1.5000 | 0.5000 | not recorded | not recorded |" in text
    assert "was not measured" not in text
    facts = dataclasses.replace(read_facts(tmp_path), forgetting={})
    earlier = Stage(0, "zero", recorded={"forgetting": {"old": entry}})
    assert limits(facts) == ["What was forgotten was not measured."]
    (line,) = limits(dataclasses.replace(facts, stages=(earlier, *facts.stages)))
    assert line == "What was forgotten in the last stage was not measured; it was in earlier ones."


def test_losses_that_are_not_finite_are_said_to_be(copied: Path) -> None:
    (copied / "stages.json").unlink()
    events = [json.loads(line) for line in (copied / "trace.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "probe" and event["step"] == 2:
            event["losses"] = dict.fromkeys(event["losses"], "nan")
    (copied / "trace.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    text = write_card(copied, figures=False).read_text("utf-8")
    assert "- Held-out losses were not finite at times: old." in text and "was not measured" not in text


def test_a_set_that_never_rose_had_no_gap(copied: Path) -> None:
    figures = {"initial": 2.0, "final": 1.0, "final_step": 3, "gain": 1.0, "forgetting": 0.0, "gap_depth": 0.0}
    facts = dataclasses.replace(read_facts(copied), forgetting={"old": {**figures, "recovery_step": 1}})
    assert "| old | 2.0000 | 1.0000 | +1.0000 | 0.0000 | 0.0000 | no gap |" in section(facts, {}, {})


# Data


def test_data_that_the_user_names_is_asked_about(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(datasets: Any, models: Any, **settings: Any) -> dict[str, Any]:
        asked.append((list(datasets), list(models)))
        return {}

    monkeypatch.setattr(writing, "ask_the_hub", ask)
    given: dict[str, Any] = {"base_model": "org/base", "metadata": {"datasets": ["org/text"]}, "figures": False}
    text = write_card(copied, ask_hub=True, **given).read_text("utf-8")
    assert asked == [(["org/text"], ["org/base"])] and "looked up on the Hub: org/base, org/text." in text


def test_where_rows_are_is_said_only_if_it_is_known(tmp_path: Path) -> None:
    files = {"start": 0, "rows": 1}
    sources = (
        SeenSource("memory"),
        SeenSource("file", place={**files, "files": ["/data/a.arrow"]}),
        SeenSource("joined", place={**files, "files": [f"/c/org___text/default/0.0.0/{COMMIT}/a.arrow"]}),
    )
    write_stages(tmp_path, [Stage(1, "one", steps=3, sources=sources)])
    lines = [line.split(" | ") for line in write_card(tmp_path).read_text().splitlines() if line.startswith("| one |")]
    assert [cells[2] for cells in lines] == ["not recorded", "no", "not recorded"]


def test_joined_rows_have_no_one_origin(tmp_path: Path) -> None:
    folders = [tmp_path / f"org___{name}" / "default" / "0.0.0" / COMMIT for name in ("text", "more")]
    for seed, folder in enumerate(folders):
        tiny.rows(3, seed=seed).save_to_disk(folder)
    text, more = (load_from_disk(folder) for folder in folders)
    assert hub_origin(concatenate_datasets([text, text])) == {"path": "org/text", "revision": COMMIT}
    assert hub_origin(concatenate_datasets([text, more])) is None
    assert hub_origin(concatenate_datasets([text, Dataset.from_dict(tiny.rows(2)[:])])) is None


# The command


def test_faults_at_the_command(copied: Path) -> None:
    assert main(["card", str(copied / "trace.jsonl")]) == 0
    assert (copied / "README.md").is_file()
    with pytest.raises(SystemExit, match=r"names 'nosuch', and the run's sources are \['stage-1', 'replay'\]"):
        main(["card", str(copied), "--data-license", "nosuch=mit"])
    with pytest.raises(SystemExit, match=r"no card: Not a directory \(.*trace\.jsonl"):
        main(["card", str(copied), "--output", str(copied / "trace.jsonl" / "README.md")])
