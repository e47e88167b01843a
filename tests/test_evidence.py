"""The page of evidence: what is concluded from runs, and that the committed page is of the committed runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
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


def line(run: str, seed: int = 0, corpus: str = "a", setting: str = "", **losses: float) -> dict[str, Any]:
    module = sys.modules["continual"]
    return {
        "setting": setting or module.setting(module.KNOWN[run], "full"),
        **{"run": run, "seed": seed, "scale": "full", "steps": 488, "seconds": 3600.0, "threads": 1},
        **{"date": "2026-01-02", "machine": "a machine", "corpus": corpus},
        "losses": {"english": 4.0, "german": 2.0, "python": 6.0, **losses},
        "before": {"english": 4.0, "german": 6.0, "python": 6.0},
        "gap": {"english": 1.0, "german": 0.0, "python": 0.0},
        "recovery": {"english": None, "german": 0, "python": 0},
        "course": {name: {"steps": [0, 488], "losses": [4.0, 4.5]} for name in ("english", "german", "python")},
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
    named = {card for card, *_ in page.claims}
    for path in sorted((ROOT / "model_cards" / "methods").glob("*.md")):
        card = path.read_text()
        assert (path.stem in named) == (continual.MARKS[0] in card)
        assert path.stem not in named or continual.into_card(page, path.stem, card) == card
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


def test_runs_of_other_settings_are_made_again(continual: Any, tmp_path: Path) -> None:
    """Also those whose parent was trained otherwise."""
    runs = continual.all_runs(["reptile"])
    wanted = [(run, 0) for run in runs.values()]
    found = results(continual, tmp_path, *(line(name) for name in runs if name != continual.FULL))
    found.done[continual.FULL, 0] = line(continual.FULL, setting="of before")
    found.leave_out(wanted, "a")
    assert set(found.done) == {(name, 0) for name in runs} - {(continual.FULL, 0)}

    def with_base(**changes: Any) -> dict[str, str]:
        kept = dict(continual.KNOWN)
        continual.KNOWN["base"] = dataclasses.replace(kept["base"], **changes)
        try:
            return {name: continual.setting(run, "full") for name, run in continual.KNOWN.items()}
        finally:
            continual.KNOWN.update(kept)

    same, other = with_base(), with_base(length=3)
    assert {name for name in same if same[name] != other[name]} == {
        name for name, run in continual.KNOWN.items() if name == "base" or ancestor(continual, run) == "base"
    }
    assert len({*same.values()}) == len(same)


def ancestor(continual: Any, run: Any) -> str:
    return run.name if run.parent is None else ancestor(continual, continual.KNOWN[run.parent])


@pytest.mark.parametrize(
    ("values", "low", "high", "verdict"),
    [
        ([0.01, 0.02, 0.03], -0.1, 0.1, "Agrees"),
        ([0.02, 0.021, 0.022], -math.inf, 0.0, "Does not agree"),
        # 0.05 ± 4.303 · 0.05 / √3, so up to 0.174
        ([0.0, 0.05, 0.1], -0.1, 0.1, "Not to be told here: the interval is wider than that"),
        ([0.5, 0.5], 0.6, math.inf, "Does not agree"),
        ([0.7], 0.6, math.inf, "One seed only: no verdict"),
    ],
)
def test_verdicts_of_intervals(continual: Any, values: list[float], low: float, high: float, verdict: str) -> None:
    assert continual._within(values, low, high) == verdict


def test_most_of_the_forgetting_is_more_than_half(continual: Any, tmp_path: Path) -> None:
    """The base has an old loss of 4; without replay 8, with 5 % as given, at the cost given."""

    def verdict(old: float, new: float) -> str:
        lines = [line(continual.FULL, seed, english=8.0 + seed / 100) for seed in range(3)]
        lines += [line(continual.replay_arm(0.05), seed, english=old, german=2.0 + new) for seed in range(3)]
        page = continual.write_page(results(continual, tmp_path, *lines), tmp_path / "page.md")
        claims = {label: told for _, label, _, told in page.claims}
        return str(claims["A few per cent of replay undo most of the forgetting, at little cost (Ibrahim et al.)"])

    assert verdict(5.0, 0.02).count(": Agrees") == 2
    assert verdict(7.8, 0.005).count(": Does not agree") == 1
    assert verdict(5.0, 0.5).count(": Does not agree") == 1


def test_losses_within_a_run(continual: Any, tmp_path: Path) -> None:
    """The rise in the first tenth, steps 0 to 49 of 488, is not the worst one; a share of the run ends at a probe."""
    course = {"steps": [0, 5, 49, 98, 408, 488], "losses": [4.0, 5.5, 5.0, 5.2, 7.0, 6.5]}
    made = line(continual.FULL) | {"course": dict.fromkeys(continual.DOMAINS, course)}
    page = continual.Page(results(continual, tmp_path, made))
    assert page.early_depth(continual.FULL) == [1.5]
    assert page.at(continual.FULL, 0.85, "german") == [7.0] and page.at(continual.FULL, 1, "german") == [6.5]


def test_the_rate_of_the_third_stage(continual: Any) -> None:
    """Held, then the exponential anneal of infinite schedules: half-way at the geometric mean."""
    rate = continual.HoldAndAnneal(1e-3, 1e-5, 80, 100)
    assert rate(0) == rate(80) == 1e-3
    assert rate(90) == pytest.approx(1e-4) and rate(100) == pytest.approx(1e-5)


def test_low_rank_arms_train_all_else_but_the_one_that_says_so(continual: Any) -> None:
    for kind in ("LoRA", "DoRA", continual.FROZEN):
        model = continual.adapted(continual.build_model(0), kind)
        trained = {name: param.requires_grad for name, param in model.named_parameters()}
        others = {name: it for name, it in trained.items() if "lora_" not in name and "base_layer" not in name}
        assert set(others.values()) == {kind != continual.FROZEN} and len(others) > 8
        assert not any(it for name, it in trained.items() if "base_layer" in name)
        assert all(it for name, it in trained.items() if "lora_" in name)


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
    peaks = {3e-4, 1.5e-3, 3e-3, 6e-3}
    shapes = {continual.rewarm_arm(peak, shape) for peak in peaks for shape in ("constant", "cosine")}
    assert shapes | {continual.rewarm_arm(3e-3, "cosine", share) for share in (0, 0.005, 0.01, 0.02)} <= set(names)
    for peak in peaks:
        constant = dict(runs[continual.rewarm_arm(peak, "constant")].plugins)["rewarm"]
        assert constant["peak_lr"] == peak and constant["min_lr"] == "100%"
    lives = [(runs[name].domain, runs[name].parent) for name in ("cosine, third stage", "infinite, third stage")]
    assert lives == [("python", "replay 5 %"), ("python", "infinite, second stage")]
    assert runs["infinite, second stage"].parent == "base, infinite"
    quarter, fifth = runs[continual.SUBSET], runs[continual.SUBSET_AND_OLD]
    assert (
        quarter.subset == 0.25
        and fifth.subset == pytest.approx(0.205)
        and dict(fifth.plugins)["replay"]["ratio"] == 0.18
    )
    assert "replay 18 %" in names and set(continual.remedies()) <= set(names)
    kinds = ("GradNormLoRP", "LoRA", "DoRA", "LoRA, all else frozen")
    assert {continual.lowrank_arm(kind, rate) for kind in kinds for rate in (1e-3, 3e-3, 1e-2, 3e-2)} <= set(names)
    pulls = {dict(run.plugins)["l2"]["strength"] for run in runs.values() if "l2" in dict(run.plugins)}
    assert pulls == {1, 3} and "self-distillation" in names
    size = continual.SCALES["full"]
    tokens = size.steps * size.batch * continual.BLOCK
    assert tokens == pytest.approx(1e6, rel=1e-3)
