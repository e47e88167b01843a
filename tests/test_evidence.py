"""The page of evidence: what is concluded from runs, and that the committed page is of the committed runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def continual() -> Any:
    spec = importlib.util.spec_from_file_location("continual", ROOT / "benchmarks" / "continual.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["continual"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def line(run: str, seed: int = 0, corpus: str = "a", **losses: float) -> dict[str, Any]:
    return {
        **{"run": run, "seed": seed, "scale": "full", "steps": 488, "seconds": 3600.0, "threads": 1},
        **{"date": "2026-01-02", "machine": "a machine", "corpus": corpus},
        "losses": {"english": 4.0, "german": 2.0, "python": 6.0, **losses},
        "before": {"english": 4.0, "german": 6.0, "python": 6.0},
        "gap": {"english": 1.0, "german": 0.0, "python": 0.0},
        "recovery": {"english": None, "german": 0, "python": 0},
        "course": {"english": {"steps": [0, 488], "losses": [4.0, 4.5]}},
    }


def results(continual: Any, folder: Path, *lines: dict[str, Any], torn: str = "") -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + torn)
    return continual.Results(folder, "full")


def test_the_committed_page_is_that_of_the_committed_runs(continual: Any, tmp_path: Path) -> None:
    committed = ROOT / "benchmarks" / "results" / "continual.jsonl"
    page = continual.write_page(continual.Results(tmp_path, "full", committed), tmp_path / "evidence.md")
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text()
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    readme = (ROOT / "README.md").read_text()
    assert continual.into_readme(page, readme) == readme
    with pytest.raises(ValueError, match="the README has no place between"):
        continual.into_readme(page, readme.replace(continual.MARKS[1], ""))


@pytest.mark.parametrize(
    ("values", "expected", "verdict"),
    [
        ([-1.0, -1.1, -0.9], -1, "Agrees"),
        ([1.0, 1.1, 0.9], -1, "Does not agree"),
        ([1.0, 1.1, 0.9], 1, "Agrees"),
        # t of two degrees is 4.303: 0.5 ± 4.303 · 0.5 / √3
        ([0.0, 0.5, 1.0], 1, "Not to be told here: the interval holds 0"),
        ([1.0], 1, "One seed only: no verdict"),
    ],
)
def test_verdicts(continual: Any, values: list[float], expected: float, verdict: str) -> None:
    assert continual._verdict(values, expected) == verdict


def test_differences_are_taken_within_a_seed(continual: Any, tmp_path: Path) -> None:
    """Seeds differ by 2, arms by 1 in each: the interval of the difference has no width."""
    lines = [line(continual.FULL, seed, english=4.0 + 2 * seed) for seed in range(3)]
    lines += [line(continual.replay_arm(0.05), seed, english=3.0 + 2 * seed) for seed in (0, 2)]
    page = continual.Page(results(continual, tmp_path, *lines))
    assert page.difference(continual.replay_arm(0.05), continual.FULL, "english") == [-1.0, -1.0]
    assert "| -1.000 ± 0.000 | +0.000 ± 0.000 | 2 |" in page.row(continual.replay_arm(0.05))


def test_a_torn_line_is_a_run_to_make_again(continual: Any, tmp_path: Path) -> None:
    found = results(continual, tmp_path, line("base"), torn=json.dumps(line(continual.FULL))[:-9])
    assert list(found.done) == [("base", 0)]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_runs_of_other_text_are_not_compared(continual: Any, tmp_path: Path) -> None:
    runs = continual.all_runs(["reptile"])
    wanted = [(run, 0) for run in runs.values()]
    some = [line(name) for name in list(runs)[:2]]
    found = results(continual, tmp_path, *some)
    found.leave_out(wanted, "a")
    assert len(found.done) == 2
    found.leave_out(wanted, "b")
    assert not found.done
    # A seed that is finished stays as it is.
    whole = results(continual, tmp_path, *map(line, runs))
    whole.leave_out(wanted, "b")
    assert len(whole.done) == len(runs)


def test_the_best_rate_is_of_a_whole_sweep(continual: Any, tmp_path: Path) -> None:
    lines = [line(continual.lowrank_arm("LoRA", rate), german=abs(rate - 0.01)) for rate in continual.SWEEP]
    assert continual.best_rate(results(continual, tmp_path, *lines), "LoRA") == 0.01
    assert continual.best_rate(results(continual, tmp_path, *lines[1:]), "LoRA") is None


def test_a_page_of_some_runs_says_so(continual: Any, tmp_path: Path) -> None:
    found = results(continual, tmp_path, line("base"), line(continual.FULL))
    assert continual.unfinished(found).startswith(f"**Not finished: 2 of {continual.expected('full')} runs so far.**")
    runs = continual.all_runs(continual.SECTIONS)
    best = {continual.lowrank_arm(kind, 0.01) for kind in continual.LOWRANK}
    swept = {continual.lowrank_arm(kind, rate) for kind in continual.LOWRANK for rate in continual.SWEEP}
    lines = [line(name, german=abs("0.01" not in name)) for name in runs]
    lines += [line(name, seed) for name in runs for seed in (1, 2) if name not in swept - best]
    assert continual.unfinished(results(continual, tmp_path, *lines)) == ""
    assert continual.unfinished(results(continual, tmp_path, *lines[1:])) != ""


def test_the_arms_are_those_that_the_papers_compare(continual: Any) -> None:
    """Parents come before their children, an arm of two sections is one run."""
    runs = continual.all_runs(continual.SECTIONS)
    names = list(runs)
    assert all(run.parent is None or names.index(run.parent) < names.index(name) for name, run in runs.items())
    assert {continual.replay_arm(ratio) for ratio in (0, 0.01, 0.05, 0.1, 0.25, 0.5)} | {"union"} <= set(names)
    reptile = {dict(run.plugins)["reptile"]["epsilon"] for run in runs.values() if "reptile" in dict(run.plugins)}
    assert reptile == {0.1, 0.5, 0.9}
    assert all(
        dict(run.plugins)["reptile"]["every"] == 1 / 24 for run in runs.values() if "reptile" in dict(run.plugins)
    )
    tokens = continual.STEPS["full"] * continual.BATCH * continual.BLOCK
    assert tokens == pytest.approx(1e6, rel=1e-3)
