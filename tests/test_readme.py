"""The README keeps its word: its Python runs as pasted, its files exist, its table names the plug-ins there are."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import warm
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.docs
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_as_pasted(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [*warm.python(), "-c", BLOCKS[number]], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("forgetting.json", "forgetting.png", "trace.jsonl"):
        assert (tmp_path / "runs" / "readme" / name).is_file()


def test_there_is_a_block_to_paste() -> None:
    assert len(BLOCKS) == 1
    code = [line for line in BLOCKS[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(code) <= 12


def test_the_recipe_is_the_one_of_the_help() -> None:
    from hf_pretrain_ext.cli import _RECIPE

    (block,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shown = _RECIPE.split("A recipe is a YAML file:")[1].split("Further sections")[0]
    assert yaml.safe_load(block) == yaml.safe_load(shown)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
