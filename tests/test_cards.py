"""The method cards say what the classes say, and what they show runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import warm
import yaml
from transformers import TrainerCallback, default_data_collator

from hf_pretrain_ext import TrainerPlugin

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parents[1]
CARDS = {path.stem: path for path in sorted((ROOT / "model_cards" / "methods").glob("*.md"))}
SECTIONS = [
    "What it does",
    "Functional form",
    "Trainer form",
    "Suggested settings",
    "Cost and composition",
    "What we measured",
    "What is exact and what is not",
    "Attribution",
    "API",
]
KEYS = [
    "name",
    "title",
    "summary",
    "callback",
    "functional",
    "needs_extend",
    "papers",
    "hooks",
    "changes",
    "resume",
    "distributed",
    "memory",
    "conflicts",
]
# All that a plug-in may define: the contract of TrainerPlugin and the events of TrainerCallback.
CONTRACT = [name for name, value in inspect.getmembers(TrainerPlugin, callable) if not name.startswith("_")]


def entry_points() -> dict[str, str]:
    """Ours as the project declares them: an environment may hold an older list, and plug-ins of others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["entry-points"]["hf_pretrain_ext.plugins"]


def front_matter(card: Path) -> dict[str, Any]:
    text = card.read_text("utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n", 2)[1])


def body(card: Path) -> str:
    return card.read_text("utf-8").split("---\n", 2)[2]


def sections(card: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", body(card), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def python_blocks() -> list[Any]:
    found = []
    for name, card in CARDS.items():
        blocks = re.findall(r"^```python\n(.*?)^```", body(card), flags=re.MULTILINE | re.DOTALL)
        found += [pytest.param(block, id=f"{name}-{number}") for number, block in enumerate(blocks, start=1)]
    return found


def test_every_plug_in_has_a_card_and_every_card_a_plug_in() -> None:
    assert set(CARDS) == set(entry_points())


def test_the_contract_is_what_the_cards_are_held_to() -> None:
    assert {"check", "schedule", "wrap_plan", "wrap_loss", "eval_metrics", "on_step_end", "on_save"} <= set(CONTRACT)
    assert {name for name in vars(TrainerCallback) if name.startswith("on_")} <= set(CONTRACT)


@pytest.mark.parametrize("name", CARDS)
def test_front_matter_agrees_with_the_class(name: str) -> None:
    card = front_matter(CARDS[name])
    assert list(card) == KEYS
    cls = load(card["callback"])
    assert cls is load(entry_points()[name].replace(":", ".")) and issubclass(cls, TrainerPlugin)
    assert callable(load(card["functional"]))
    assert card["name"] == cls.name == name
    for key in ("needs_extend", "resume", "distributed"):
        assert card[key] == getattr(cls, key), key
    assert tuple(card["conflicts"]) == cls.conflicts
    hooks = [method for method in CONTRACT if getattr(cls, method) is not getattr(TrainerPlugin, method)]
    assert sorted(card["hooks"]) == hooks
    assert card["changes"] and all(isinstance(change, str) for change in card["changes"])
    assert isinstance(card["memory"], str) and isinstance(card["title"], str)


@pytest.mark.parametrize("name", CARDS)
def test_papers_are_named_and_credited(name: str) -> None:
    card = front_matter(CARDS[name])
    attribution = sections(CARDS[name])["Attribution"]
    for paper in card["papers"]:
        assert list(paper) == ["title", "authors", "arxiv"]
        # A string: as a number, 2308.04010 would lose its last digit.
        assert isinstance(paper["arxiv"], str) and re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"])
        assert paper["authors"].split(",")[0] in body(CARDS[name])
    assert any(paper["arxiv"] in attribution for paper in card["papers"])


@pytest.mark.parametrize("name", CARDS)
def test_sections(name: str) -> None:
    found = sections(CARDS[name])
    assert list(found) == SECTIONS
    # A plug-in that hands on another library's figures has none of its own.
    pattern = r"Measured (?:in|with) `(make demo|python (\S+))`; see |Nothing of its own: "
    measured = re.match(pattern, found["What we measured"].strip())
    assert measured and (not measured[2] or (ROOT / measured[2]).exists())
    for title in ("Functional form", "Trainer form"):
        assert found[title].count("```python") >= 1, title
    exact = found["What is exact and what is not"]
    assert "Where this differs from the papers" in exact
    untested = [value for value in front_matter(CARDS[name])["distributed"].values() if value == "untested"]
    assert ("Untested:" in exact) == bool(untested)


def test_the_readme_and_the_sections_api_are_what_front_matter_and_classes_say() -> None:
    done = subprocess.run(
        [*warm.python(), ROOT / "docs" / "_generated.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), f"{done.stdout}{done.stderr}: run `make tables`"


@pytest.mark.parametrize("name", CARDS)
def test_api_shows_what_python_would_bind(name: str) -> None:
    """Arguments and defaults of both forms, read back as Python reads them."""
    shown = re.search(r"^```text\n(.*?)^```", sections(CARDS[name])["API"], re.MULTILINE | re.DOTALL)
    assert shown
    calls = shown[1].strip().split("\n\n")
    for path, call in zip([front_matter(CARDS[name])[key] for key in ("callback", "functional")], calls, strict=True):
        assert call.startswith(f"{path}(")
        (parsed,) = ast.parse(f"def found{call.removeprefix(path)}: ...").body
        assert isinstance(parsed, ast.FunctionDef)
        wanted = [each for each in inspect.signature(load(path)).parameters.values() if each.name != "self"]
        by_name = [each.name for each in wanted if each.kind is each.KEYWORD_ONLY]
        assert [each.arg for each in parsed.args.kwonlyargs] == by_name
        assert [each.arg for each in parsed.args.args] == [
            each.name for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        with_default = [each for each in wanted if each.default is not each.empty]
        defaults = [ast.unparse(each) for each in [*parsed.args.defaults, *parsed.args.kw_defaults] if each]
        assert len(defaults) == len(with_default)
        plain = [repr(each.default) for each in with_default if isinstance(each.default, int | float | str | None)]
        assert set(plain) <= {
            repr(ast.literal_eval(each))
            for each in defaults
            if not each.isidentifier() or each in ("None", "True", "False")
        }


@pytest.mark.parametrize("name", CARDS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", body(CARDS[name])):
        assert (CARDS[name].parent / target).exists(), target


@pytest.mark.parametrize("name", CARDS)
def test_settings_named_in_the_table_exist(name: str) -> None:
    cls = load(front_matter(CARDS[name])["callback"])
    known = inspect.signature(cls.__init__).parameters
    for cell in re.findall(r"^\| (`.+?) \|", sections(CARDS[name])["Suggested settings"], flags=re.MULTILINE):
        for setting in re.findall(r"`(\w+)`", cell):
            assert setting in known, setting


@pytest.mark.parametrize("code", python_blocks())
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself; one in the Trainer's form finds a model, settings and data to stand in for the reader's own."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "card"}
    of_the_reader = {
        "model": tiny.model(),
        "args": tiny.arguments(tmp_path, learning_rate=3e-4),
        "collator": default_data_collator,
        "domain": tiny.rows(40),
        "general": tiny.rows(30, seed=1),
        "held_out": tiny.rows(8, seed=2),
        "wiki": tiny.rows(30, seed=3),
        "code": tiny.rows(20, seed=4),
        "documents": tiny.documents(200),
        "tokenizer": tiny.tokenizer(),
        "folder_of_tasks": settings.LM_EVAL_TASKS,
    }
    in_trainer_form = "Trainer(" in code
    if in_trainer_form or "# Your model" in code:
        namespace.update(of_the_reader)
    exec(compile(code, "card", "exec"), namespace)
    if in_trainer_form:
        assert namespace["trainer"].state.global_step == 6
