"""The pages of docs/: their Python runs, their recipes are recipes, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import default_data_collator

from hf_pretrain_ext import callbacks

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages whose code is run by tests of their own.
ELSEWHERE = {"stages.md", "merging.md"}
PAGES = [
    path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text("utf-8") and path.name not in ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model, settings and data that stand in for the reader's own."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {
        "__name__": "page",
        "model": tiny.model(),
        "args": tiny.arguments(tmp_path / "out", learning_rate=3e-4),
        "collator": default_data_collator,
        "domain": tiny.rows(40),
        "general": tiny.rows(30, seed=1),
        "held_out": tiny.rows(8, seed=2),
        "documents": tiny.documents(200),
        "tokenizer": tiny.tokenizer(),
    }
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
    assert namespace["trainer"].state.global_step > 0


def test_other_pages_with_python_have_tests_of_their_own() -> None:
    tests = "".join(
        path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_docs.py"
    )
    for name in ELSEWHERE:
        assert name in tests, name


def test_recipes_of_the_pages_are_recipes(tmp_path: Path) -> None:
    from hf_pretrain_ext.recipe import load_recipe

    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "recipes.md").read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        assert load_recipe(tmp_path / "recipe.yaml")


def test_every_page_is_in_the_navigation_and_links_hold(tmp_path: Path) -> None:
    """Built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed: pip install 'hf-pretrain-ext[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = {Path(name).stem for name in re.findall(r": ([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text())}
    assert {path.stem for path in DOCS.glob("*.md")} <= listed | {"index"}
    api = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    for name in ("extend", "continue_from", "LRSchedule", "anchor_bytes", *callbacks.__all__):
        assert name in api, name
    for card in (ROOT / "model_cards" / "methods").glob("*.md"):
        assert (tmp_path / "site" / "methods" / card.stem / "index.html").is_file()
    # Nothing is fetched by who reads it.
    assert not re.findall(r'(?:src|href)="https?://(?:fonts|cdn|unpkg)', api)
