"""docs/stages.md keeps its word: its Python runs as it stands, and its tables name what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from hf_pretrain_ext import read_stages
from hf_pretrain_ext.stages import SeenSource, Stage

pytestmark = pytest.mark.docs

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "stages.md").read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/stages.md", "exec"), names)
    out = capsys.readouterr().out
    # The preview of the third stage: what English and German have of a quarter, 25 to 15.
    assert re.search(r"stage-1 \(replayed\) +200 +25 +15\.62%", out) and re.search(
        r"german \(replayed\).* 9\.38%", out
    )
    found = {
        name: [stage.name for stage in read_stages(tmp_path / name) or ()] for name in ("runs/adapted", "runs/german")
    }
    assert found == {"runs/adapted": ["base", "german"], "runs/german": ["stage-1", "german"]}
    assert [stage.kind for stage in read_stages(tmp_path / "models" / "deploy") or ()] == ["stage", "stage", "anneal"]


def test_the_guide_names_every_key() -> None:
    schema = GUIDE.split("## `stages.json`")[1].split("## What is exact")[0]
    named = set(re.findall(r"`([a-z_]+)`", schema))
    keys = {field.name for cls in (Stage, SeenSource) for field in dataclasses.fields(cls)}
    assert keys <= named
