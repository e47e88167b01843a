"""The report: what stands on the page is what stands in the traces, whatever these hold or lack."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.text import Text

from hf_pretrain_ext.report import figures
from hf_pretrain_ext.report.drawing import style
from hf_pretrain_ext.report.html import report
from hf_pretrain_ext.report.plan_plot import plan_figure, plan_plot
from hf_pretrain_ext.report.reading import RunRecord
from hf_pretrain_ext.trace import read_trace
from tests import report_traces as traces
from tests.report_traces import BATCH, DOMAIN, GENERAL, TOTAL, Page, cheap

HOSTILE = (
    "<script>alert(1)</script>",
    '"onload=alert(1) x="',
    "'><img src=x onerror=alert(1)>",
    "</style><style>*{display:none}</style>",
    "</title></head><!-- --> ]]> {{ 7 * 7 }} {% raw %}",
    "$\\frac{1}{",
    "$x$ and $",
    "_hidden",
    "a\x00b\x1bc\u202ed\ud800e",
    "名前 🙂 " + "long" * 60,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """One finished run with everything; and another seed of it, interrupted."""
    folder = tmp_path_factory.mktemp("full")
    other = traces.start()
    other["identity"]["arguments"] |= {"seed": 12, "weight_decay": 0.0}
    other["plugins"]["replay"]["ratio"] = 0.125
    traces.write(folder / "one", traces.events())
    traces.write(folder / "two", traces.events(until=21, **other))
    return Page(report([folder / "one", folder / "two"], folder / "report.html"))


def page_of(folder: Path, *runs: list[dict[str, Any]]) -> Page:
    folders = [traces.write(folder / f"run-{k}", found) for k, found in enumerate(runs)]
    return Page(report(folders, folder / "report.html"))


# --- what is on the page is what is in the trace ----------------------------------------------------


def logged(folder_events: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(e["step"], e["scalars"][key]) for e in folder_events if e["event"] == "log" and key in e["scalars"]]


def test_losses_are_those_of_the_trace(full: Page) -> None:
    points = logged(traces.events(), "loss")
    assert len(points) == 10 and points[0] == (4, 3.2)
    lowest = min(points, key=lambda point: point[1])
    assert full.row("losses", "one", "training loss") == [*points[0], *lowest, *points[-1], 3.0625]
    assert full.row("losses", "one", "eval_loss")[:-1] == [10, 4.9, 40, 4.6, 40, 4.6]
    assert full.row("losses", "two", "training loss")[:-1] == [4, 3.2, 20, 3 + 1 / 21, 20, 3 + 1 / 21]
    assert full.row("glance", "one")[2:5] == [3.2, 3 + 1 / 41, 0.25]


def test_planned_and_seen_stand_side_by_side(full: Page) -> None:
    """Of 320 samples 240 and 80; the interrupted run was counted last at step 20, with 160 of them."""
    table = 0
    one = full.row("plan", "one", "train", table=table)
    assert one == [160, "shuffled", 240, 240, 3840, 3840, 3600, 1.5, 40]
    assert full.row("plan", "one", "replay (replayed)") == [400, "original", 80, 80, 961.5, 960, 880, 0.2, 40]
    assert full.row("plan", "two", "train") == [160, "shuffled", 240, 120, 3840, 1920, 1800, 1.5, 20]
    assert "≈ 962" in full.text("plan") and "≈ 3,840" not in full.text("plan")
    assert "40 steps, 8 samples a step, 25 steps an epoch, ≈ 4,802 tokens in all" in full.text("plan")


def test_replayed_shares_by_hand(full: Page) -> None:
    shares = full.row("mixture", "one")
    assert shares == [0.25, 0.25, pytest.approx(960 / 4800), pytest.approx(880 / 4480), 40]
    over_steps = full.tables["mixture"][1][1:]
    found = {row[0][1]: [cell[1] for cell in row[1:]] for row in over_steps}
    assert found[4] == [24, 8, 24 * 16, 8 * 12, 0.25] and found[40] == [240, 80, 3840, 960, 0.25]


def test_forgetting_by_hand(full: Page) -> None:
    """initial, lowest, at, final, at, forgetting, gain, probes."""
    expected = [2.0, 1.9, 20, 1.95, 40, 0.05, 0.05, 7]
    assert full.row("forgetting", "one", "general") == pytest.approx(expected)
    assert full.row("forgetting", "one", "domain") == pytest.approx([4.0, 2.25, 40, 2.25, 40, 0, 1.75, 7])
    assert full.row("forgetting", "two", "general") == pytest.approx([2.0, 1.9, 20, 1.9, 20, 0, 0.1, 6])
    assert "one 1.8 s, two 1.5 s" in full.text("forgetting")
    for term in ("Lowest", "Forgetting", "Gain"):
        assert full.texts["forgetting"].count(term) >= 2  # as a column and defined


def test_the_stability_gap_by_hand(full: Page) -> None:
    """initial, worst, at, gap depth, recovery step, steps to recover: 2.0, up to 2.5 at step 2, 2.005 at step 4."""
    for run in ("one", "two"):
        assert full.row("gap", run, "general") == pytest.approx([2.0, 2.5, 2, 0.5, 4, 2])
    # Never above where it began: worst at step 0, nothing to come back from.
    assert full.row("gap", "one", "domain") == [4.0, 4.0, 0, 0.0, "no gap", "–"]
    for term in ("Worst", "Gap depth", "Recovery step", "Steps to recover"):
        assert full.texts["gap"].count(term) >= 2


def test_a_set_that_has_not_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found = traces.events()
    for event in found:
        if event["event"] == "probe" and event["step"] > 2:
            event["losses"]["eval_general_loss"] = 2.25
    running = [event for event in found if event["event"] != "end"]
    page = page_of(tmp_path, found, running)
    assert page.row("gap", "run-0", "general")[4:] == ["never", "–"]
    assert page.row("gap", "run-1", "general")[4] == "not so far"


def test_figures_over_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found = traces.events()
    assert "Over the stages" not in page_of(tmp_path / "first", found).text("forgetting")
    for step in (2, 40):
        scalars = {"life_forgetting_general": 0.5 / step, "life_gain_general": -0.25, "backward_transfer": 0.125}
        found.append({"event": "log", "step": step, "scalars": scalars})
    page = page_of(tmp_path / "later", found)
    assert page.row("forgetting", "run-0", "general", table=1) == [0.0125, -0.25]
    assert "Backward transfer: run-0 +0.1250." in page.text("forgetting")


def test_memory_and_time_by_hand(full: Page) -> None:
    """device, its peak, peak of main memory, main memory at the last log, seconds, steps a second."""
    peaks = {40: (1024 + 40) * traces.MIB, 20: (1024 + 20) * traces.MIB}
    assert full.row("memory", "one") == ["A GPU", peaks[40], 512 * traces.MIB, 300 * traces.MIB, 20.0, 2.0]
    assert full.row("memory", "two") == ["A GPU", peaks[20], 512 * traces.MIB, 300 * traces.MIB, 10.0, 2.0]
    assert "1.04 GiB" in full.text("memory") and "20.0 s" in full.text("memory")


def test_memory_of_a_run_on_the_cpu_and_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    on_cpu = traces.events()
    on_cpu[1]["machine"] = {"device": "cpu", "processors": 2, "memory": 1 << 33}
    for event in on_cpu:
        if event["event"] == "usage":
            event |= {"device_peak": None}
    page = page_of(tmp_path, on_cpu, without(traces.events(), "usage", "session"))
    assert page.row("memory", "run-0") == ["cpu", "trained on the CPU", 512 * traces.MIB, 300 * traces.MIB, 20.0, 2.0]
    assert page.row("memory", "run-1") == ["not known"] * 6
    assert "No memory was measured: the trace is an older one" in page.text("unknown")


def test_benchmarks_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found, other = traces.events(), traces.events()
    for when, value in (("before", 0.25), ("after", 0.5)):
        accuracy = {"value": value, "stderr": 0.0125, "higher_is_better": True}
        loss = {"value": 10 - value, "stderr": None, "higher_is_better": False}
        event = {"event": "benchmarks", "step": 0, "when": when, "found": {"quiz": {"acc": accuracy, "ppl": loss}}}
        found.append({**event, "asked": {"limit": 10}, "seconds": 1.0})
        other.append({**event, "asked": {"limit": 10 if when == "before" else 20}, "seconds": 1.0})
    page = page_of(tmp_path, found, other)
    assert page.row("benchmarks", "run-0", "quiz") == ["acc", "higher", 0.25, 0.5, 0.25]
    assert page.row("benchmarks", "run-0", "quiz", "ppl") == ["lower", 9.75, 9.5, -0.25]
    # Other questions were asked before: those figures are no column of this table, nor of the card's.
    assert page.row("benchmarks", "run-1", "quiz") == ["acc", "higher", "not measured", 0.5, "–"]
    assert "0.5000 ± 0.0125" in page.text("benchmarks")


def test_planned_memory_and_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    parts = {"weights": 10, "gradients": 9, "moments": 8, "projectors": 7, "magnitudes": 6, "temporaries": 5}
    found = traces.events()
    found.append({"event": "memory", "step": 1, "state": 22, "planned": 21, "plan": parts, "peak": 45})
    found.append({"event": "buffer", "step": 40, "rows": 12, "seen": 320, "bytes": 4096, "share": 0.1})
    page = page_of(tmp_path, found)
    assert page.row("memory", "run-0", table=1) == [10, 9, 8, 7, 6, 5, 45, 21, 22]
    assert page.row("memory", "run-0", table=2) == [12, 320, 4096]
    assert "memory" not in [row[2][0] for row in page.tables["events"][1]]


def test_the_plan_of_the_rate_was_followed(full: Page) -> None:
    name, peak, end, logs, highest, last, apart = full.row("rate", "one")
    assert (name, logs) == ("cosine", 10)
    assert [peak, end] == pytest.approx([traces.PEAK, traces.LOW])
    assert highest == pytest.approx(max(traces.rate(step - 1) for step in range(4, 41, 4)))
    assert last == pytest.approx(traces.rate(39))
    assert isinstance(apart, float) and apart < 1e-15


@pytest.mark.parametrize("name", ["cosine", "callable", None])
def test_a_rate_off_its_plan_is_seen(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the schedule in the trace, and with the points of the preview alone."""
    cheap(monkeypatch)
    found = traces.events()
    found[0]["identity"]["schedule"] = {**found[0]["identity"]["schedule"], "name": name} if name else None
    clean = page_of(tmp_path / "clean", copy.deepcopy(found)).row("rate", "run-0")[-1]
    wrong = next(e for e in found if e["event"] == "log" and e["step"] == 24 and "learning_rate" in e["scalars"])
    wrong["scalars"]["learning_rate"] += 0.003
    assert page_of(tmp_path / "wrong", found).row("rate", "run-0")[-1] == pytest.approx(0.003)
    assert isinstance(clean, float) and clean < 1e-15


def test_runs_are_compared(full: Page) -> None:
    """Exactly the lines that differ are marked."""

    def marked(section: str) -> set[str]:
        return {row[0][0] for table in full.tables[section] for row in table if "differs" in row[0][2]}

    assert marked("environment") == {"seed", "weight_decay"} and marked("run") == {"ratio"}
    assert full.row("environment", "seed", table=2) == [11, 12]
    assert full.row("run", "ratio") == [0.25, 0.125]
    assert full.row("environment", "torch") == ["2.13.0", "2.13.0"]
    assert full.row("environment", "plan: seed", table=2) == [11, 11]
    assert full.row("environment", "device_name", table=1) == ["A GPU", "A GPU"]
    assert "Command of all runs train.py --fast" in full.text("environment")
    assert "decay" not in {row[0][0] for row in full.tables["run"][0]}  # none in both
    for line in traces.start()["describe"]:
        assert line in full.texts["run"]


def test_events_are_told(full: Page) -> None:
    rows = [[cell[0] for cell in row] for row in full.tables["events"][1][1:]]
    warning = "replay: the old rows are few. Add some."
    alert = "loss on general had risen by 0.5000 nats since step 0 (threshold 0.125)"
    saves = "checkpoint-10, checkpoint-20, checkpoint-30, checkpoint-40"
    assert rows == [
        ["one", "0", "warning", warning],
        ["one", "2", "alert", alert],
        ["one", "10 – 40", "save × 4", saves],
        ["one", "40", "end", "training ended"],
        ["two", "0", "warning", warning],
        ["two", "2", "alert", alert],
        ["two", "10 – 20", "save × 2", "checkpoint-10, checkpoint-20"],
    ]
    began = "2026-03-04 05:06:07"
    assert full.row("events", "one") == [0, began, 40, 20.0, "training ended"]
    assert full.row("events", "two") == [0, began, 20, 10.0, "no end in the trace"]
    assert full.row("glance", "one")[0] == "finished, 40 of 40 steps"
    assert full.row("glance", "two")[0] == "interrupted, last seen at step 20 of 40"


def test_a_resume_replaces_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    lost = [{"event": "log", "step": 24, "scalars": {"loss": 1.2345}, "counts": traces.counts(24)}]
    resume = {"event": "resume", "step": 20, "checkpoint": "out/checkpoint-20", "versions": {"python": "3.12.0"}}
    rest = [event for event in traces.events() if event["step"] > 20]
    for event in rest:
        if event["event"] == "usage":
            event["seconds"] -= 10  # they count from the session's beginning
    again = traces.session(20, command="train.py --resume")
    page = page_of(tmp_path, [*traces.events(until=20), *lost, resume, again, *rest])
    assert page.row("losses", "run-0", "training loss")[2:4] == [40, 3 + 1 / 41]  # not 24, 1.2345
    told = "from out/checkpoint-20; the session before had come to step 24, what it did after step 20 was done again"
    assert ["run-0", "20", "resume", told] in [[cell[0] for cell in row] for row in page.tables["events"][1]]
    sessions = [[cell[0] for cell in row] for row in page.tables["events"][0][1:]]
    began = "2026-03-04 05:06:07"
    assert sessions == [
        ["run-0", "0", began, "20", "10.0 s", "killed, without a trace of why"],
        ["run-0", "20", began, "40", "10.0 s", "training ended"],
    ]
    assert page.row("memory", "run-0")[-2:] == [20.0, 2.0]
    assert "train.py --fast" in page.text("environment") and "train.py --resume" in page.text("environment")
    assert "Resumed once" in page.text("unknown") and "python 3.11.7 → 3.12.0" in page.text("unknown")


def test_an_exception_that_ended_a_session_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    broken = {"event": "interrupted", "step": 23, "error": "OutOfMemoryError", "message": "tried to allocate"}
    resume = {"event": "resume", "step": 20, "checkpoint": "out/checkpoint-20"}
    found = [*traces.events(until=20), broken]
    page = page_of(tmp_path, found, [*found, resume, traces.session(20)])
    assert page.row("events", "run-0")[-1] == page.row("events", "run-1")[-1] == "interrupted: OutOfMemoryError"
    rows = [[cell[0] for cell in row] for row in page.tables["events"][1]]
    assert ["run-0", "23", "interrupted", "OutOfMemoryError: tried to allocate"] in rows
    assert [row[0] for row in rows if row[2] == "interrupted"] == ["run-0"]  # of the other it is in the resume


def test_events_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found = traces.events(until=12)
    found.append({"event": "mixture", "step": 8, "shares": {"train": 3, "replay": 1}, "start": 10})
    found.append({"event": "nonfinite", "step": 9, "what": ["loss"], "action": "skip", "rows": {"train": [4]}})
    rows = {row[2][0]: row[3][0] for row in page_of(tmp_path, found).tables["events"][1][1:]}
    assert rows["mixture"] == "from step 10: train 75.0%, replay 25.0%"
    assert rows["nonfinite"] == 'loss not finite: the update was left out; rows read: {"train": [4]}'


def test_events_of_others_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found = traces.events(until=12)
    found += [{"event": "refresh", "step": step, "rank": step * 2} for step in range(1, 13)]
    found.append({"event": "mixture", "step": 12, "weights": [1, 1], "start": 96})
    found.append({"event": "stop", "step": 12, "set": "general", "rise": 0.75, "threshold": 0.5})
    found.append({"event": "end", "step": 12, "counts": traces.counts(12)})
    page = page_of(tmp_path, found)
    rows = {row[2][0]: row[3][0] for row in page.tables["events"][1][1:]}
    assert rows["refresh × 12"] == '{"rank": 2} … {"rank": 24}'
    assert rows["mixture"] == '{"weights": [1, 1], "start": 96}'
    assert "0.7500 nats" in rows["stop"]
    assert page.row("glance", "run-0")[0] == "stopped by general after step 12 of 40"
    assert "mixture was changed" in page.text("unknown")


# --- pieces that are missing ------------------------------------------------------------------------


def without(found: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] not in names]


def no_plan() -> list[dict[str, Any]]:
    start = traces.start(preview=traces.preview(sources=[], mixture=[], phases=[], tokens=None))
    start["identity"]["plan"] = None
    found = traces.events(**start)
    for event in found:
        event.pop("counts", None)
    return found


def hosts_schedule() -> list[dict[str, Any]]:
    start = traces.start(preview=traces.preview(learning_rate=None))
    start["identity"]["schedule"] = None
    return traces.events(**start)


def old() -> list[dict[str, Any]]:
    """As written before plans and counts were in the trace: tokens were those that bear loss."""
    found = traces.events()
    del found[0]["preview"]
    for event in found:
        if event["event"] == "log":
            event.pop("counts")
            if "loss" in event["scalars"]:
                event["scalars"] |= {"replay_ratio": 0.25, "replay_ratio_tokens": 0.2}
    old_counts = {"samples": 240, "tokens": 3600, "replayed": False}, {"samples": 80, "tokens": 880, "replayed": True}
    found[-1]["counts"] = dict(zip(("train", "replay"), old_counts, strict=True))
    return found


def probes_only() -> list[dict[str, Any]]:
    found = without(traces.events(), "log")
    return [{**event, "step": event["step"] + 1} if event["event"] == "probe" else event for event in found]


def stream() -> list[dict[str, Any]]:
    source = {"name": "train", "rows": None, "samples": 320, "tokens": None, "passes": None}
    return traces.events(preview=traces.preview(sources=[source]))


CASES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "no forgetting": (without(traces.events(), "probe"), "forgetting", "No run measured held-out sets"),
    "no plan": (no_plan(), "plan", "no plug-in decided the order"),
    "no plan, mixture": (no_plan(), "mixture", "nothing was counted, since no plug-in decided the order"),
    "host's schedule": (hosts_schedule(), "rate", "the host's own schedule"),
    "host's schedule, unknown": (hosts_schedule(), "unknown", "followed the host's own schedule"),
    "interrupted": (traces.events(until=21), "unknown", "The trace has no end: what happened after step 20"),
    "no losses": (without(traces.events(), "log"), "losses", "No loss was logged in any run"),
    "no start": (traces.events()[1:], "unknown", "does not begin with a start"),
    "no start, run": (traces.events()[1:], "run", "No plug-in is named in the traces"),
    "only a resume": ([{"event": "resume", "step": 7}], "glance", "interrupted, last seen at step 7"),
    "empty": ([], "unknown", "The trace holds no event at all"),
    "bare start": ([{"event": "start", "step": 0}], "environment", "Versions: not in the traces"),
    "old": (old(), "unknown", "written before plans were recorded"),
    "first probe missing": (probes_only(), "forgetting", "not measured"),
    "a stream": (stream(), "plan", "a stream"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_said(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    found, section, words = CASES[case]
    page = page_of(tmp_path, copy.deepcopy(found))
    assert words in page.text(section)
    for name, text in page.texts.items():
        assert "None" not in text.split() and "nan" not in text.split(), name
    for section in page.tables:  # nothing is left blank
        assert len(page.text(section)) > 60


def test_runs_that_lack_pieces_beside_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    page = page_of(tmp_path, *(copy.deepcopy(found) for found, _, _ in CASES.values()), traces.events())
    assert page.row("losses", f"run-{len(CASES)}", "training loss")[:2] == [4, 3.2]
    assert len(page.tables["glance"][0]) == 1 + len(CASES) + 1


def test_a_complete_run_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    page = page_of(tmp_path, traces.events())
    assert "Nothing that this page looks for is missing" in page.text("unknown")
    assert "–" not in [cell[0] for row in page.tables["plan"][0] for cell in row]


def test_an_old_trace_shows_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out from the identity: 320 samples in parts of 3 and 1, and the schedule from its phases."""
    cheap(monkeypatch)
    page = page_of(tmp_path, old())
    assert page.row("plan", "run-0", "train")[2:] == [240, 240, "not known", "not known", 3600, 1.5, 40]
    assert page.row("plan", "run-0", "replay (replayed)")[2:] == [80, 80, "not known", "not known", 880, 0.2, 40]
    rates = RunRecord("", "", old()).preview["learning_rate"]
    assert rates["steps"] == list(range(TOTAL + 1)) and rates["rates"] == pytest.approx([*map(traces.rate, range(41))])
    assert rates["phases"] == traces.preview()["learning_rate"]["phases"]


def test_an_old_trace_with_a_changing_mixture() -> None:
    """Half of the run 3 to 1, half 1 to 1."""
    found = old()
    segments = [{"start": 0, "weights": [3, 1]}, {"start": 160, "weights": [1, 1]}]
    found[0]["identity"]["plan"]["segments"] = segments
    run = RunRecord("", "", found)
    assert [source["samples"] for source in run.sources] == [120 + 80, 40 + 80]
    assert [(part["step"], part["shares"]) for part in run.preview["mixture"]] == [
        (0, {"train": 0.75, "replay": 0.25}),
        (20, {"train": 0.5, "replay": 0.5}),
    ]
    assert figures.planned_shares(run, 40) == pytest.approx({"train": 200 / 320, "replay": 120 / 320})


@pytest.mark.parametrize("wrong", [None, -1.5, "text", "nan", [{"step": 0}]])
def test_fields_of_another_form_do_no_harm(wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of the trace in turn, and each of the preview, of the identity and of an event."""
    cheap(monkeypatch)
    found, runs = traces.events(), []
    for path in [(key,) for key in found[0] if key not in ("event", "step")] + [
        (outer, key) for outer in ("preview", "identity") for key in found[0][outer]
    ]:
        run = copy.deepcopy(found[:8])
        spot = run[0]
        for key in path[:-1]:
            spot = spot[key]
        spot[path[-1]] = wrong
        runs.append(run)
    for name in ("log", "probe", "alert", "save", "end", "session", "usage"):
        run = copy.deepcopy(found)
        for event in run:
            if event["event"] == name:
                event.update({key: wrong for key in event if key not in ("event", "step")})
        runs.append(run)
    # Several in one page: 25 pages would take a minute.
    page = page_of(tmp_path, *runs[: len(runs) // 2])
    page_of(tmp_path, *runs[len(runs) // 2 :])
    assert len(page.tables["glance"][0]) == 1 + len(runs) // 2


def test_losses_that_are_not_numbers(tmp_path: Path) -> None:
    found = traces.events()
    for event in found:
        if event["event"] == "probe" and event["step"] == 3:
            event["losses"]["eval_general_loss"] = "nan"
        if event["event"] == "log" and event["step"] == 8 and "loss" in event["scalars"]:
            event["scalars"]["loss"] = "inf"
    page = page_of(tmp_path, found)
    general = next(row for row in page.tables["gap"][0] if row[1][0] == "general")
    assert general[3][0] == "not a number" and general[4][1] == 3 and "bad" in general[3][2]


# --- text that others wrote -------------------------------------------------------------------------


def poison(value: Any, name: str) -> Any:
    """Every key and every text of a trace but the ones that give it its form."""
    kept = {
        "event",
        "step",
        "counts",
        "scalars",
        "losses",
        "samples",
        "tokens",
        "loss_tokens",
        "replayed",
        "steps",
        "rates",
    }
    kept |= {
        *traces.start(),
        *traces.preview(),
        *traces.start()["identity"],
        "name",
        "start",
        "stop",
        "shares",
        "unit",
    }
    kept |= {
        "set",
        "rise",
        "threshold",
        "folder",
        "loss",
        "learning_rate",
        "rows",
        "num_rows",
        "first",
        "last",
        "shape",
    }
    kept |= {"start", "log", "probe", "alert", "save", "end", "segments", "weights", "seed", "cosine", "linear"}
    kept |= {"session", "usage", *traces.session(), *traces.usage(0)}
    if isinstance(value, dict):
        return {
            key if key in kept else f"eval_{name}_loss" if key.startswith("eval_") else f"{name} {key}": poison(
                v, name
            )
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [poison(item, name) for item in value]
    return name if isinstance(value, str) and value not in kept else value


def images(page: Page) -> list[tuple[str, bytes]]:
    found = []
    for image in page.of("img"):
        head, data = (image["src"] or "").split(",", 1)
        found.append((head, base64.b64decode(data, validate=True)))
    return found


def check_svg(data: bytes) -> None:
    tree = ElementTree.fromstring(data.decode("utf-8"))
    for element in tree.iter():
        name = element.tag.rsplit("}", 1)[-1]
        assert name in {"svg", "style", "defs", "g", "path", "use", "clipPath", "rect"}, name
        for key, value in element.attrib.items():
            assert not key.rsplit("}", 1)[-1].lower().startswith("on")
            assert not key.endswith("href") or value.startswith("#")
    # What is drawn is outlines: no text of a trace is in the file at all.
    assert b"alert" not in data and b"<!--" not in data


ALLOWED = set(
    "html head meta title style body header main section nav a p h1 h2 h3 ul li span code div table caption".split()
)
ALLOWED |= set("thead tbody tr th td data figure figcaption img dl dt dd details summary".split())


@pytest.mark.parametrize("name", HOSTILE)
def test_text_from_a_trace_stays_text(name: str, tmp_path: Path) -> None:
    found = poison(traces.events(), name)
    folder = traces.write(tmp_path / "run", found)
    page = Page(report([folder], tmp_path / "report.html", labels=[name]))
    assert {tag for tag, _ in page.elements} <= ALLOWED
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") or key == "style" for key in attributes), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    shown = re.sub("[\x00-\x08\x0b-\x1f\u202e\ud800]", "\ufffd", name)
    for section in ("glance", "run", "plan", "forgetting", "gap", "events", "environment"):
        assert shown in page.texts[section], section
    assert page.texts["title"] == f"Report: {shown}"
    assert len(page.of("style")) == 1
    kinds = images(page)
    assert len(kinds) == 7
    for head, data in kinds:
        if head == "data:image/svg+xml;base64":
            check_svg(data)
        else:
            assert head == "data:image/png;base64" and data.startswith(b"\x89PNG")


def test_dollars_are_drawn_as_they_stand() -> None:
    """As mathematics, `$x$` would be an italic x without the dollars, and half a formula an error."""
    run = RunRecord("$x$", "", poison(traces.events(), "$x$"))
    with style():
        drawn = [plan_figure(run.preview, "$x$"), figures.rate_figure([run, run]), figures.loss_figure([run])]
        drawn += [figures.mixture_figure([run]), figures.forgetting_figure([run, run])]
        texts = [text for figure in drawn for text in figure.findobj(Text)]
    assert sum("$x$" in text.get_text() for text in texts) > 8
    assert not any(text.get_parse_math() for text in texts)


# --- the page as a file -----------------------------------------------------------------------------


def test_the_page_is_valid_and_needs_nothing_else(full: Page) -> None:
    assert full.source.lstrip().startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in full.elements} <= ALLOWED
    assert full.texts["title"] == "Report: one, two"
    ids = [attributes["id"] for _, attributes in full.elements if "id" in attributes]
    sections = [section["id"] or "" for section in full.of("section")]
    assert len(ids) == len(set(ids)) and len(sections) == 12
    assert [a["href"] for a in full.of("a")] == ["#content", *(f"#{name}" for name in sections)]
    assert {section["aria-labelledby"] for section in full.of("section")} <= set(ids)
    assert [level for level, _ in full.elements if level in ("h1", "h2")] == ["h1"] + ["h2"] * len(sections)
    regions = [a for _, a in full.elements if a.get("role") == "region"]
    assert regions and all(a.get("tabindex") == "0" and len(a.get("aria-label") or "") > 8 for a in regions)
    assert all(
        len(image["alt"] or "") > 30 and (image["src"] or "").startswith("data:image/") for image in full.of("img")
    )
    assert all("src" not in a or tag == "img" for tag, a in full.elements)
    assert not re.search(r"https?:|url\(|@import|javascript:", re.sub(r'src="[^"]*"', "", full.source))
    assert all(th.get("scope") in ("row", "col") for th in full.of("th"))
    for table in (table for tables in full.tables.values() for table in tables):
        assert len({len(row) for row in table}) == 1


def test_the_policy_allows_this_style_sheet_and_no_script(full: Page) -> None:
    policy = next(m["content"] for m in full.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    digest = base64.b64encode(hashlib.sha256(full.texts["style"].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for media in ("prefers-color-scheme: dark", "print", "max-width"):
        assert f"@media ({media}" in full.texts["style"] or f"@media {media}" in full.texts["style"]


def test_the_same_traces_give_the_same_page(tmp_path: Path) -> None:
    folder = traces.write(tmp_path / "run", traces.events(until=8))
    before = dict(matplotlib.rcParams)
    first = report(folder, tmp_path / "deep" / "er" / "a.html")
    (tmp_path / "folder").mkdir()
    second = report([str(folder)], tmp_path / "folder")
    assert first == tmp_path / "deep/er/a.html" and second == tmp_path / "folder/report.html"
    assert first.read_bytes() == second.read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in first.parent.iterdir()] == ["a.html"]


def test_a_long_run_gives_a_page_of_sensible_size(tmp_path: Path) -> None:
    """10,000 logs: curves are drawn by their extremes, tables show some of the lines and say so."""
    import random

    noise = random.Random(0)
    found = [traces.start()]
    for step in range(1, 10_001):
        scalars = {"loss": 2 + noise.random(), "learning_rate": noise.random()}
        found.append({"event": "log", "step": step, "scalars": scalars, "counts": traces.counts(step)})
    path = report([traces.write(tmp_path / "run", found)], tmp_path / "report.html")
    page = Page(path)
    assert path.stat().st_size < 700_000
    # Long curves are drawn by their extremes: noise of 10,000 points stays a drawing.
    assert {head for head, _ in images(page)} == {"data:image/svg+xml;base64"}
    assert len(page.tables["mixture"][1]) == 1 + 12 and "12 of 10000 counts" in page.text("mixture")


# --- runs and labels --------------------------------------------------------------------------------


def titles(tmp_path: Path, names: list[str], labels: list[str] | None = None) -> list[str]:
    folders = [traces.write(tmp_path / name, [{"event": "start", "step": 0}]) for name in names]
    page = Page(report(folders, tmp_path / "r.html", labels=labels))
    return [row[0][0] for row in page.tables["glance"][0][1:]]


def test_labels(tmp_path: Path) -> None:
    assert titles(tmp_path, ["a", "b"]) == ["a", "b"]
    assert titles(tmp_path, ["a", "b"], ["plain", "5 %"]) == ["plain", "5 %"]
    assert titles(tmp_path, ["a/out", "b/out", "c"]) == ["a/out", "b/out", "c"]
    assert titles(tmp_path, ["a", "b", "c"], ["x", "x", "y"]) == ["x (a)", "x (b)", "y"]
    assert titles(tmp_path, ["a", "a"]) == ["a", "a (2)"]
    assert titles(tmp_path, ["x/1/out", "y/1/out"]) == ["x/1/out", "y/1/out"]
    file = traces.write(tmp_path / "by-file", [{"event": "start", "step": 0}]) / "trace.jsonl"
    assert Page(report(file, tmp_path / "r.html")).texts["title"] == "Report: by-file"


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    good = traces.write(tmp_path / "good", traces.events(until=2))
    with pytest.raises(FileNotFoundError, match=re.escape(f"no trace at {tmp_path / 'gone'}")):
        report([good, tmp_path / "gone"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="3 labels for 2 runs"):
        report([good, good], tmp_path / "report.html", labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="no runs"):
        report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("absent", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=r"pip install 'hf-pretrain-ext\[report\]'"):
        report([traces.write(tmp_path, traces.events(until=2))], tmp_path / "report.html")
    if absent == "matplotlib":
        with pytest.raises(ImportError, match=r"pip install 'hf-pretrain-ext\[report\]'"):
            plan_plot(traces.preview(), tmp_path / "plan.png")


# --- figures ----------------------------------------------------------------------------------------


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [*zip(*map(list, line.get_data()), strict=True)] for line in panel.get_lines()}


def test_curves_hold_the_values_of_the_trace() -> None:
    runs = [RunRecord("one", "", traces.events()), RunRecord("two", "", traces.events(until=21))]
    with style():
        general, domain = figures.forgetting_figure(runs).axes
        training, evaluation = figures.loss_figure(runs).axes
        (rates,) = figures.rate_figure(runs).axes
        shares = figures.mixture_figure(runs).axes
    assert lines(general)["one"] == sorted(GENERAL.items()) and lines(domain)["one"] == sorted(DOMAIN.items())
    assert lines(general)["two"] == sorted(GENERAL.items())[:-1] and general.get_xscale() == "symlog"
    assert lines(training)["one"] == logged(traces.events(), "loss") and lines(evaluation)["two"] == [
        (10, 4.9),
        (20, 4.8),
    ]
    drawn = lines(rates)
    assert drawn["one"][:3] == [(0, 0.0), (1, pytest.approx(0.0025)), (2, pytest.approx(0.005))]
    dots = [points for points in drawn.values() if len(points) == 10]
    assert dots and dots[0] == [(step - 1, traces.rate(step - 1)) for step in range(4, 41, 4)]
    assert len(shares) == 2 and all(y in (0.25, 0.75) for line in shares[0].get_lines() for y in line.get_ydata())


def test_the_gap_is_drawn_to_the_recovery() -> None:
    """General: worst at 2 and back at 4, drawn to step 20; domain: never above. The second never comes back."""
    lasting = traces.events()
    for event in lasting:
        if event["event"] == "probe" and event["step"] > 2:
            event["losses"]["eval_general_loss"] = 2.25
    with style():
        general, domain = figures.gap_figure(
            [RunRecord("one", "", traces.events()), RunRecord("two", "", lasting)]
        ).axes
    drawn = lines(general)
    assert drawn["one"] == [(step, pytest.approx(GENERAL[step] - 2.0)) for step in (0, 1, 2, 3, 4, 20)]
    assert [step for step, _ in drawn["two"]] == sorted(GENERAL)
    marks = [(line.get_marker(), line.get_xdata()[0]) for line in general.get_lines() if len(line.get_xdata()) == 1]
    assert marks == [("v", 2), ("o", 4), ("v", 2)]
    assert all(y <= 0 for _, y in lines(domain)["one"])
    later = [event for event in traces.events() if event["step"]]
    assert figures.gap_figure([RunRecord("", "", later)]) is None


def test_memory_is_drawn_in_gib() -> None:
    with style():
        main, device = figures.memory_figure([RunRecord("one", "", traces.events())]).axes
        alone = figures.memory_figure([RunRecord("", "", traces.events(until=4))])
    assert alone is None  # one point is no curve
    assert lines(main)["one"] == [(step, 300 / 1024) for step in [*range(4, 41, 4), 40]]
    assert lines(device)["one"][-1] == (40, pytest.approx((1024 + 40) / 1024))


def test_extremes_of_long_curves_are_kept() -> None:
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[1234], points[8765] = (1234, 99.0), (8765, -99.0)
    drawn = figures.outline(points)
    assert len(drawn) <= 2 * figures.PARTS + 2 and set(drawn) <= set(points) and drawn == sorted(drawn)
    assert {points[0], points[1234], points[8765], points[-1]} <= set(drawn)
    assert figures.outline(points[:100]) == points[:100]


def preview_axes(**changes: Any) -> list[Any]:
    with style():
        figure = plan_figure(traces.preview(**changes))
        figure.canvas.draw()
    return list(figure.axes)


def words(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.texts]


def test_the_picture_of_a_plan() -> None:
    rate, mixture, lane = preview_axes()
    assert [(step, traces.rate(step)) for step in range(TOTAL + 1)] in lines(rate).values()
    assert words(rate) == ["warm-up", "decay"]
    assert words(mixture) == ["75.0%", "25.0%", "train", "replay"] and mixture.get_ylabel() == "share of samples"
    assert words(lane) == ["cooldown"]
    assert [label.get_text() for label in lane.get_yticklabels()] == ["phases", "forgetting"]
    marks = [segment[0][0] for segment in lane.collections[0].get_segments()]
    assert marks == sorted(GENERAL)
    (band,) = lane.patches
    assert (band.get_x(), band.get_width()) == (30, 10)


def test_pictures_of_plans_that_have_less() -> None:
    assert len(preview_axes(mixture=[], phases=[], marks={})) == 1
    (rate, mixture) = preview_axes(learning_rate=None, phases=[], marks={})
    assert words(rate) == ["learning rate: the host's own schedule"] and "75.0%" in words(mixture)
    single = [{"step": 0, "shares": {"train": 1.0}, "unit": "samples"}]
    assert len(preview_axes(mixture=single, phases=[], marks={})) == 1  # one source needs no panel
    changing = [
        {"step": 0, "shares": {"a": 0.75, "b": 0.25}, "unit": "tokens"},
        {"step": 20, "shares": {"a": 0.5, "b": 0.5}, "unit": "tokens"},
    ]
    (_, mixture) = preview_axes(mixture=changing, phases=[], marks={})
    assert words(mixture)[:4] == ["75.0%", "50.0%", "25.0%", "50.0%"] and mixture.get_ylabel() == "share of tokens"


def test_phases_of_one_name_are_one_and_names_do_not_meet() -> None:
    """A function of the user's comes as 64 pieces of one name; a warm-up of one step leaves no room beside it."""
    rates = traces.preview()["learning_rate"]
    pieces = [{"name": "callable", "start": k, "stop": k + 1} for k in range(40)]
    assert words(preview_axes(learning_rate={**rates, "phases": pieces})[0]) == ["callable"]
    narrow = [{"name": "warm-up", "start": 0, "stop": 1}, {"name": "decay", "start": 1, "stop": 40}]
    with style():
        figure = plan_figure(traces.preview(learning_rate={**rates, "phases": narrow}))
        figure.canvas.draw()
        first, second = (text.get_window_extent() for text in figure.axes[0].texts)
    assert not first.overlaps(second)


def test_the_plan_as_a_file(tmp_path: Path) -> None:
    plan_plot(traces.preview(), tmp_path / "new" / "plan.png", title="A $plan$ of mine")
    plan_plot({}, tmp_path / "nothing.png")
    header = (tmp_path / "new" / "plan.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") == 1800
    assert (tmp_path / "nothing.png").stat().st_size > 1000


# --- a real run -------------------------------------------------------------------------------------


def test_the_page_of_a_real_run(tmp_path: Path) -> None:
    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
    from tests import tiny

    trainer = tiny.trainer(
        tmp_path / "run",
        RewarmCallback(peak_lr=1e-2, warmup=2),
        ReplayCallback(tiny.rows(24, seed=5), ratio=0.25),
        ForgettingCallback({"old": tiny.rows(8, seed=6)}),
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
    )
    extend(trainer).train()
    found = [json.loads(line) for line in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    page = Page(report([tmp_path / "run"], tmp_path / "report.html"))
    points = logged(found, "loss")
    assert len(points) == 8
    lowest = min(points, key=lambda point: point[1])
    assert page.row("losses", "run", "training loss")[:6] == [*points[0], *lowest, *points[-1]]
    probes = [event["losses"]["eval_old_loss"] for event in found if event["event"] == "probe"]
    assert len(probes) == 9 and page.row("forgetting", "run", "old")[0] == probes[0]
    assert page.row("forgetting", "run", "old")[3] == probes[-1] and page.row("gap", "run", "old")[1] == max(probes)
    used = [event for event in found if event["event"] == "usage"]
    assert [event["step"] for event in used] == [*range(1, 9), 8]
    assert page.row("memory", "run")[2:5] == [used[-1][key] for key in ("peak_resident", "resident", "seconds")]
    assert 10_000_000 < used[0]["resident"] <= used[-1]["peak_resident"]
    (session,) = [event for event in found if event["event"] == "session"]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(session["time"])).total_seconds()) < 600
    assert page.row("environment", "device", table=1) == ["cpu"] and session["machine"]["processors"] >= 1
    samples = 8 * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    assert samples == 8 * BATCH // 2
    assert page.row("plan", "run", "train")[2:4] == [24, 24]
    assert page.row("plan", "run", "replay (replayed)")[2:4] == [8, 8]
    deviation = page.row("rate", "run")[-1]
    assert isinstance(deviation, float) and deviation < 1e-12
    assert read_trace(tmp_path / "run")[-1]["event"] in ("end", "forgetting")
