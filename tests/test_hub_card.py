"""The continued-pretraining section of a card: from the trace, idempotent, read by huggingface_hub."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.hub_card import BEGIN, END, check_metadata, read_facts, write_card
from hf_pretrain_ext.hub_card.writing import cell, section, with_section
from hf_pretrain_ext.trace import read_trace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    plugins = [
        RewarmCallback(peak_lr=1e-2, warmup=2),
        ReplayCallback(tiny.rows(20, seed=3), ratio=0.25),
        ForgettingCallback({"old": tiny.rows(8, seed=3)}),
    ]
    trained = extend(tiny.trainer(folder, *plugins, logging_steps=1))
    trained.train()
    return trained


def text_of(run: Any, tmp_path: Path, **given: Any) -> str:
    return write_card(run.args.output_dir, output=tmp_path / "README.md", **given).read_text("utf-8")


def test_figures_are_those_of_the_trace(run: Any, tmp_path: Path) -> None:
    """Read off trace.jsonl and forgetting.json by other means."""
    text = text_of(run, tmp_path)
    end = [event for event in read_trace(run.args.output_dir) if event["event"] == "end"][-1]
    for name, entry in end["counts"].items():
        row = next(
            line for line in text.splitlines() if "| stage-1 |" in line and ("replay" in line) == (name == "replay")
        )
        assert f"| {entry['samples']:,} | {entry['tokens']:,} |" in row
    losses = json.loads(Path(run.args.output_dir, "forgetting.json").read_text())["sets"]["old"]["losses"]
    assert f"| old | {losses[0]:.4f} | {losses[-1]:.4f} | {losses[0] - losses[-1]:+.4f} |" in text
    assert "learning rate 0, 0.01 at its highest" in text and "6 of 6 optimizer steps of 4 samples" in text


def test_metadata_is_read_by_the_hubs_own_classes(run: Any, tmp_path: Path) -> None:
    given = {"license": "mit", "language": "de", "tags": ["mine"], "datasets": ["org/data"]}
    text_of(run, tmp_path, base_model="org/base", metadata=given, model_name="toy")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/base" and data.to_dict()["base_model_relation"] == "finetune"
    assert data.library_name == "transformers" and data.license == "mit" and data.datasets == ["org/data"]
    assert data.tags == ["mine", "continued-pretraining", "hf-pretrain-ext", "forgetting", "replay", "rewarm"]
    (result,) = data.eval_results
    assert result.dataset_name == "old (held out)" and result.metric_type == "loss"
    assert check_metadata(yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])) == []
    assert isinstance(data, ModelCardData)


def test_it_is_idempotent_and_keeps_what_the_user_wrote(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: apache-2.0\ntags:\n- mine\n---\n\n# My model\n\nBefore.\n")
    first = text_of(run, tmp_path)
    path.write_text(first + "\nAfter, with a rule:\n\n---\n\nEnd.\n")
    second = text_of(run, tmp_path)
    assert text_of(run, tmp_path) == second
    assert second.count(BEGIN) == second.count(END) == 1
    assert "# My model\n\nBefore.\n" in second and second.endswith("\nAfter, with a rule:\n\n---\n\nEnd.\n")
    assert ModelCard.load(path).data.license == "apache-2.0"
    assert ModelCard.load(path).data.tags.count("rewarm") == 1


def test_nothing_is_left_open(run: Any, tmp_path: Path) -> None:
    text = text_of(run, tmp_path)
    for words in ("More information needed", "None", "TODO", "[]", "{}", "nan"):
        assert words not in text, words
    # Of both sources, in memory, where they are on the Hub; and what this run has no record of.
    assert text_of(run, tmp_path).count("not recorded") <= 4
    for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / file).stat().st_size > 1000


def test_what_the_machine_and_the_base_said_is_shown(run: Any, tmp_path: Path) -> None:
    said = re.search(r"At the highest: (\d+\.\d\d) GB of main memory in the first process\.", text_of(run, tmp_path))
    assert said
    # Of the whole process, and other tests ran in it before.
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.1 < float(said[1]) <= now + 0.05
    facts = dataclasses.replace(
        read_facts(run.args.output_dir),
        base_licence="apache-2.0",
        peaks={"device": 21_500_000_000, "resident": 3_000_000_000},
    )
    text = section(facts, {"base_model": "org/base"}, {})
    assert "[org/base](https://huggingface.co/org/base). Its card states the licence apache-2.0." in text
    assert "At the highest: 21.50 GB of tensors on the device, 3.00 GB of main memory in the first process." in text


def test_names_make_no_markup(run: Any, tmp_path: Path) -> None:
    assert cell("a|b\n`c` <img src=x> [d](e)") == "a\\|b \\`c\\` &lt;img src=x&gt; \\[d\\](e)"
    text = text_of(run, tmp_path, data_licences={"replay": "<script>alert(1)</script>|x"})
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_no_token_of_the_hub_gets_in(run: Any, tmp_path: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    text = text_of(run, tmp_path, data_licences={"replay": f"see {secret}"})
    assert secret not in text and "<token>" in text.replace("&lt;", "<").replace("&gt;", ">")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (f"# x\n{BEGIN}\n", "1 opening and 0 closing"),
        (f"# x\n{END}\n{BEGIN}\n", "1 opening and 1 closing"),
        (f"{BEGIN}{END}{BEGIN}{END}", "2 opening and 2 closing"),
    ],
)
def test_broken_markers(body: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_section(body, "new")


def test_broken_yaml_is_not_overwritten(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for broken in ("---\na: [\n---\n", "---\na: 1\n", "---\n- a\n---\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="the card's YAML"):
            write_card(run.args.output_dir, output=path)
        assert path.read_text() == broken


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"base_model": "a/b/c"}, "base_model must be a name on the Hub"),
        ({"base_model_relation": "finetune"}, "base_model_relation is there without base_model"),
        ({"datasets": "one"}, "datasets must be a list of text"),
        ({"datasets": ["/data/of/mine"]}, "datasets must be names on the Hub"),
        ({"library_name": ["keras"]}, "library_name must be text"),
        ({"license": ["mit"]}, "license must be text"),
        ({"model-index": {}}, "model-index must be a list"),
        ({"model-index": [{"name": "x", "results": [{"task": {}}]}]}, "task of a result needs type"),
    ],
)
def test_faults_of_metadata(data: dict[str, Any], said: str) -> None:
    assert any(said in fault for fault in check_metadata(data))


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither trace\.jsonl nor stages\.json"):
        write_card(tmp_path)


def test_what_was_not_recorded_is_not_made_up(run: Any, tmp_path: Path) -> None:
    """A copy of the run without its end: no counts, no seconds."""
    events = Path(run.args.output_dir, "trace.jsonl").read_text().splitlines()
    (tmp_path / "trace.jsonl").write_text("\n".join(line for line in events if '"event": "start"' in line) + "\n")
    facts = read_facts(tmp_path)
    assert facts.tokens is None and facts.seconds is None and facts.tokens_per_second is None and facts.rates is None
    assert facts.base_model is None and facts.sources == ()
    assert "What was forgotten was not measured." in write_card(tmp_path).read_text("utf-8")


def test_through_the_trainer(run: Any) -> None:
    """`create_model_card`, which every push calls, keeps the host's card and adds the section."""
    run.create_model_card(license="mit", language="en", model_name="toy")
    text = Path(run.args.output_dir, "README.md").read_text("utf-8")
    assert text.count(BEGIN) == 1 and "## Continued pre-training" in text and "license: mit" in text
    run.create_model_card(license="mit", language="en", model_name="toy")
    again = Path(run.args.output_dir, "README.md").read_text("utf-8")
    assert again.count(BEGIN) == 1


def test_from_the_command_line(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_pretrain_ext.cli import main

    output = tmp_path / "CARD.md"
    arguments = [run.args.output_dir, "--output", str(output), "--base-model", "org/base", "--license", "mit"]
    assert main(["card", *arguments]) == 0
    assert str(output) in capsys.readouterr().out
    assert ModelCard.load(output).data.base_model == "org/base"


EXAMPLES = Path(__file__).resolve().parents[1] / "model_cards" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_finished_examples_are_cards(path: Path) -> None:
    """Made by the demo; the Hub's classes read them, their figures are there, their sections those of the template."""
    text = path.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and "more information needed" not in text.lower()
    assert check_metadata(yaml.safe_load(text.split("---")[1])) == []
    assert ModelCard.load(path).data.eval_results
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures and all((path.parent / figure).is_file() for figure in figures)
    headings = re.findall(r"^### (.+)$", text, flags=re.MULTILINE)
    template = (EXAMPLES.parent / "templates" / "continued_pretraining.md.j2").read_text("utf-8")
    assert headings and all(f"### {heading}" in template for heading in headings)


def test_there_is_a_finished_example() -> None:
    assert (EXAMPLES / "demo" / "README.md").is_file()
