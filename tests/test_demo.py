"""The demo, shrunk: what it trains, writes and says, and that its model loads by the lines it prints."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors import safe_open

from hf_pretrain_ext import __version__, read_trace
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.demo.main import DemoConfig, _arguments
from hf_pretrain_ext.demo.precision import fast_bf16

SHRUNK = {
    "pretrain_steps": 6,
    "steps": 6,
    "batch_size": 4,
    "block_size": 64,
    "vocabulary": 300,
    "hidden_size": 32,
    "layers": 2,
    "heldout_rows": 4,
    "limit": 6,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "output"
    options = [str(part) for name, value in SHRUNK.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [*warm.python(), "-m", "hf_pretrain_ext.cli", "demo", "--output", str(folder), "--domain", "python", *options],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_arms_differ_only_in_plugins(demo: tuple[Path, str]) -> None:
    """Same settings and same before-values in every arm; each arm's trace holds its plug-ins alone."""
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text())
    wanted = {
        "constant": ["forgetting"],
        "re-warm": ["forgetting", "rewarm"],
        "re-warm + 5 % replay": ["forgetting", "replay", "rewarm"],
        "re-warm + 25 % replay": ["forgetting", "replay", "rewarm"],
    }
    assert [row["arm"] for row in results["arms"]] == list(wanted)
    starts = {row["arm"]: read_trace(folder / row["folder"])[0] for row in results["arms"]}
    assert {arm: sorted(start["plugins"]) for arm, start in starts.items()} == wanted
    assert len({(row["old_before"], row["new_before"]) for row in results["arms"]}) == 1
    rates = {arm: start["identity"]["arguments"].pop("learning_rate") for arm, start in starts.items()}
    arguments = [start["identity"]["arguments"] for start in starts.values()]
    for each in arguments:
        each.pop("ignore_data_skip", None)  # not compared where there is a plan
    assert all(each == arguments[0] for each in arguments)
    # The arm without plug-ins goes on at the rate with which the pre-training ended: a tenth of its peak.
    assert rates["constant"] == pytest.approx(3e-4) and rates["re-warm"] == 3e-3
    replayed = {row["arm"]: row["counts"].get("replay", {}).get("samples") for row in results["arms"]}
    assert replayed["re-warm + 25 % replay"] == 6 and replayed["re-warm"] is None


def test_what_it_writes(demo: tuple[Path, str]) -> None:
    folder, said = demo
    histories = json.loads((folder / "forgetting.json").read_text())
    assert len(histories) == 4 and all(set(arm["sets"]) == {"old", "new"} for arm in histories.values())
    assert (folder / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert all(label.replace("&", "&amp;") in page for label in histories)
    table = (folder / "table.md").read_text()
    assert table in said and table.count("\n") == 7
    with safe_open(folder / "model" / "model.safetensors", framework="pt") as weights:
        assert weights.keys()
    loading = said.split("To load it:")[1].strip()
    assert (folder / "load.py").read_text().strip() == loading
    done = subprocess.run([*warm.python(), "-c", loading], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0 and done.stdout.startswith("The file"), done.stderr[-2000:]


def test_command_line_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--help"], "the main job on real text"),
        (["demo", "--help"], "--pretrain_steps"),
        (["--version"], __version__),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out
    wrong: list[tuple[list[str], Any]] = [(["dmeo"], "invalid choice: 'dmeo'"), ([], "required: COMMAND")]
    for arguments, text in wrong:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "fast"),
    [({"avx512_bf16": False, "amx_bf16": True}, True), ({"avx512_bf16": False, "bmi": True}, False), (None, False)],
)
def test_bf16_only_where_the_processor_has_it(told: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: a torch that cannot tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if told is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert fast_bf16() is fast
    assert _arguments(DemoConfig(), Path("out"), 1, 1e-3).bf16 is fast
