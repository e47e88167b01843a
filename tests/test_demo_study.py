"""The full scale of the demo, shrunk: all arms, exact shares, intervals by hand, and what a restart does."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_pretrain_ext import read_trace
from hf_pretrain_ext.demo import study
from hf_pretrain_ext.demo.main import DemoConfig, load_domains, run_demo
from hf_pretrain_ext.demo.study import ARMS, interval, study_table

LABELS = ["constant", "0 %", "1 %", "5 %", "10 %", "25 %", "50 %", "joint"]
STEPS, PRETRAIN_STEPS, BATCH = 5, 10, 4
SHRUNK = DemoConfig(
    scale="full",
    domain="python",
    pretrain_steps=PRETRAIN_STEPS,
    steps=STEPS,
    batch_size=BATCH,
    block_size=32,
    vocabulary=300,
    hidden_size=32,
    layers=1,
    heldout_rows=2,
    seeds=2,
    limit=6,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The study end to end, and the data that it read."""
    folder = tmp_path_factory.mktemp("study")
    read: list[Any] = []

    def load(*args: Any) -> Any:
        read.append(load_domains(*args))
        return read[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "load_domains", load)
        patch.setattr("hf_pretrain_ext.callbacks.forgetting.have_matplotlib", lambda: False)  # 16 plots of single runs
        run_demo(replace(SHRUNK, output=str(folder)))
    return folder, read[0]


@pytest.fixture
def made(finished: tuple[Path, Any]) -> Path:
    return finished[0]


@pytest.fixture
def folder(finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, to be restarted and broken; the same data again without reading it for seconds."""
    monkeypatch.setattr(study, "load_domains", lambda *args: finished[1])
    return Path(shutil.copytree(finished[0], tmp_path / "study"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are trained from here on, by folder."""
    models: list[str] = []

    def spy(name: str, place: int) -> None:
        train = getattr(study, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            models.append("/".join(args[place].parts[-2:]))
            return train(*args, **kwargs)

        monkeypatch.setattr(study, name, wrapped)

    spy("pretrain", 1)
    spy("train_arm", 1)
    return models


def restart(folder: Path, **changed: Any) -> dict[str, Any]:
    return run_demo(replace(SHRUNK, output=str(folder), **changed))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key not in ("seconds", "config")}


def test_every_arm_of_every_seed_has_its_trace_and_its_share(made: Path) -> None:
    results = results_of(made)
    assert [row["arm"] for row in results["arms"]] == LABELS
    steps = {label: STEPS for label in LABELS} | {"joint": PRETRAIN_STEPS + STEPS}
    for row in results["arms"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for run in row["runs"]:
            events = read_trace(made / run["folder"])
            assert events[-1]["step"] == steps[row["arm"]]
            assert events[0]["identity"]["arguments"]["seed"] == run["seed"]
            assert ("rewarm" in events[0]["plugins"]) == (row["arm"] != "constant")
            assert ("replay" in events[0]["plugins"]) == (row["arm"] not in ("constant", "0 %"))
            assert run["tokens"] == steps[row["arm"]] * BATCH * SHRUNK.block_size
            if row["ratio"] is not None:  # within one sample of the share, the nearest whole number where there is one
                assert abs(run["old_samples"] - row["ratio"] * STEPS * BATCH) < 1
    assert len({run["folder"] for row in results["arms"] for run in row["runs"]}) == 2 * len(LABELS)
    by_arm = {row["arm"]: row for row in results["arms"]}
    assert [run["old_samples"] for run in by_arm["50 %"]["runs"]] == [10, 10]
    # Seeds differ in weights, arms of a seed start from the same ones, joint training from others.
    starts = {arm: [run["old_before"] for run in row["runs"]] for arm, row in by_arm.items()}
    assert starts["0 %"][0] != starts["0 %"][1]
    assert all(starts[arm] == starts["0 %"] for arm in LABELS[:-1])
    assert starts["joint"][0] not in starts["0 %"]


def test_joint_training_sees_both_stages_exactly(made: Path) -> None:
    """Two thirds are no multiple of 1/65536, yet the counts are exact; a run that is not so is refused."""
    (joint,) = [row for row in results_of(made)["arms"] if row["arm"] == "joint"]
    for run in joint["runs"]:
        assert run["counts"]["replay"]["samples"] == run["old_samples"] == PRETRAIN_STEPS * BATCH
        assert run["counts"]["train"]["samples"] == STEPS * BATCH
    counts = joint["runs"][0]["counts"]
    counts["train"]["samples"] -= 1
    counts["replay"]["samples"] += 1
    with pytest.raises(ValueError, match="not those of both stages"):
        study._check_joint(SHRUNK, counts)


def test_intervals_are_students(made: Path) -> None:
    values = [2.31, 2.35, 2.36]
    figures = interval(values)
    mean = (2.31 + 2.35 + 2.36) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert figures["mean"] == pytest.approx(mean) and figures["half"] == pytest.approx(
        4.303 * deviation / math.sqrt(3), rel=1e-9
    )
    # Of two values, in closed form: t is tan(0.475 π) for one degree of freedom, the deviation |a − b| / √2.
    results = results_of(made)
    by_arm = {row["arm"]: row for row in results["arms"]}
    baseline = [run["old"] for run in by_arm["0 %"]["runs"]]
    for row in results["arms"]:
        for key in ("old", "new", "mean", "gap_depth"):
            a, b = (run[key] for run in row["runs"])
            assert row[key]["values"] == [a, b]
            assert row[key]["half"] == pytest.approx(math.tan(0.475 * math.pi) * abs(a - b) / 2, rel=1e-4)
        differences = [run["old"] - base for run, base in zip(row["runs"], baseline, strict=True)]
        assert row["minus_baseline"]["old"]["values"] == pytest.approx(differences)
        assert row["minus_baseline"]["old"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert by_arm["0 %"]["minus_baseline"]["old"] == {"mean": 0, "half": 0, "values": [0, 0]}
    assert by_arm["50 %"]["minus_baseline"]["old"]["mean"] < 0  # half of the samples are old ones


def test_table_and_curves_are_those_of_the_results(made: Path) -> None:
    results = results_of(made)
    lines = (made / "table.md").read_text().splitlines()
    assert lines == study_table(results)
    cells = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert list(cells) == ["before", *LABELS]
    for row in results["arms"]:
        shown = [float(number) for number in re.findall(r"\d+\.\d+", cells[row["arm"]])]
        wanted = [row[key][part] for key in ("old", "new", "mean") for part in ("mean", "half")]
        assert shown[:6] == pytest.approx(wanted, abs=5.1e-4)
        # Each seed's figures are those of its own folder, and the curves end where the table is.
        for run in row["runs"]:
            history = json.loads((made / run["folder"] / "forgetting.json").read_text())["sets"]
            assert (run["old"], run["new"]) == (history["old"]["losses"][-1], history["new"]["losses"][-1])
        for name in ("old", "new"):
            assert row["curves"][name]["mean"][-1] == pytest.approx(row[name]["mean"])
            assert row["curves"][name]["half"][-1] == pytest.approx(row[name]["half"])
    assert "−" in "".join(lines[2:])  # the differences carry their sign


def test_the_plot_shows_these_results(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hf_pretrain_ext.report.plots import study_plot

    page = (made / "report.html").read_text()
    assert all(arm["arm"] in page for arm in results_of(made)["arms"])
    drawn = (made / "study.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    results = results_of(made)
    study_plot(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == drawn
    for row in results["arms"]:
        row["old"]["mean"] += 1
    study_plot(results, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != drawn


@pytest.mark.slow
def test_a_restart_trains_what_is_missing(folder: Path, trained: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    before = results_of(folder)
    restart(folder)
    assert trained == []
    assert without_times(results_of(folder)) == without_times({**before})
    said = capfd.readouterr().err
    assert said.count("finished before with these settings, skipped") == 2 * (1 + len(ARMS))

    # Killed in the middle of seed 1: a half-written trace and no result, and the models after it not begun.
    for arm in ("replay-25", "replay-50", "joint"):
        (folder / "seed-1" / arm / "result.json").unlink()
    shutil.rmtree(folder / "seed-1" / "joint")
    again = restart(folder)
    assert trained == ["seed-1/replay-25", "seed-1/replay-50", "seed-1/joint"]
    for old, new in zip(before["arms"], again["arms"], strict=True):
        assert new["old"]["values"] == pytest.approx(old["old"]["values"], abs=1e-4)
    events = [json.loads(line)["event"] for line in (folder / "seed-1/replay-25/trace.jsonl").open()]
    assert events.count("start") == 1


@pytest.mark.slow
def test_results_of_other_settings_are_not_used(
    finished: tuple[Path, Any],
    folder: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only what a setting has a part in is trained again; a third seed adds its own models to those that are there."""
    arms = [arm.folder for arm in ARMS]
    known = {arm: json.loads((folder / "seed-0" / arm / "result.json").read_text())["result"] for arm in arms}

    def train(_: Any, config: DemoConfig, seed: Path, arm: Any, lr: float) -> dict[str, Any]:
        trained.append(f"{seed.name}/{arm.folder}")  # what is trained is the point here, not what comes out
        return known[arm.folder]

    monkeypatch.setattr(study, "_train", train)
    restart(folder, steps=STEPS - 1)
    assert trained == [f"seed-{seed}/{arm}" for seed in (0, 1) for arm in arms]
    assert "kept result is of other settings (steps), made again" in capfd.readouterr().err
    trained.clear()
    restart(folder, steps=STEPS - 1, seeds=3)
    assert trained == ["seed-2/base", *(f"seed-2/{arm}" for arm in arms)]
    trained.clear()
    restart(folder, steps=STEPS - 1, peak_lr=1e-3)
    everything = [f"seed-{seed}/{model}" for seed in (0, 1) for model in ("base", *arms)]
    assert trained == everything
    trained.clear()
    tokenizer, old, new = finished[1]
    fewer = replace(new, train=new.train.select(range(1, len(new.train))))
    monkeypatch.setattr(study, "load_domains", lambda *args: (tokenizer, old, fewer))
    restart(folder, steps=STEPS - 1, peak_lr=1e-3)
    assert trained == everything


def test_a_base_model_that_changed_is_not_used(folder: Path) -> None:
    weights = folder / "seed-0" / "base" / "model" / "model.safetensors"
    shutil.copy(folder / "seed-1" / "base" / "model" / "model.safetensors", weights)
    with pytest.raises(ValueError, match="is not the model that"):
        restart(folder)


def test_a_digest_is_of_every_token_in_order() -> None:
    from datasets import Dataset

    one = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    other = Dataset.from_dict({"input_ids": [[1, 2], [3, 5]]})
    assert study._data_digest([one]) == study._data_digest([Dataset.from_dict(one.to_dict())])
    assert len({study._data_digest(data) for data in ([one], [other], [one, other], [other, one])}) == 4


@pytest.mark.parametrize(
    ("wrong", "text"), [({"seeds": 1}, "an interval needs two"), ({"scale": "huge"}, "scale must")]
)
def test_refused_settings(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DemoConfig(**wrong)
