"""`stages.json` and what follows from it: pure functions, checked against numbers written out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.info import DatasetInfo

from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.forgetting import Past, backward_transfer, past_of
from hf_pretrain_ext.past_data import ReplayedHistory
from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.replay import with_replay
from hf_pretrain_ext.schedules import CallableSchedule, LRSchedule, cosine, infinite_cosine, wsd
from hf_pretrain_ext.sources import hub_origin, identified, place_of, reopen
from hf_pretrain_ext.stages import (
    Beginning,
    SeenSource,
    Stage,
    annealing,
    check_name,
    going_on,
    life_of,
    rate_line,
    read_stages,
    schedule_record,
    write_stages,
)

PILE, SLIM = "pile", "slimpajama-1"


def stage(number: int, name: str, *sources: SeenSource, history: tuple[str, ...] = (), **more: Any) -> Stage:
    recorded = {"replay": {"from_history": list(history)}} if history else {}
    return Stage(number, name, sources=sources, recorded=recorded, **more)


def seen(name: str, billions: float, **more: Any) -> SeenSource:
    return SeenSource(name, **{"tokens": int(billions * 1_000_000_000), "samples": int(billions * 488_281), **more})


# Shares over stages


def test_the_weights_of_the_released_configurations() -> None:
    """
    Ibrahim et al.: 300B tokens of the Pile, then 100B at 5 % replay, twice more. Their third run has the weights Pile
    3.8125 and SlimPajama-1 1.1875, their fourth 3.088125, 0.961875 and 0.95, next to 95 of new data.
    """
    pile = stage(1, PILE, seen(PILE, 300))
    second = stage(2, SLIM, seen(SLIM, 95), seen(PILE, 5, replayed=True), history=(PILE,))
    weights = {name: Fraction(source.tokens or 0) for name, source in life_of([pile, second]).items()}
    assert weights == {PILE: 305 * 10**9, SLIM: 95 * 10**9}
    shares = {name: 5 * tokens / sum(weights.values()) for name, tokens in weights.items()}
    assert shares == {PILE: Fraction("3.8125"), SLIM: Fraction("1.1875")}
    third = stage(
        3,
        "slimpajama-2",
        seen("slimpajama-2", 95),
        *(seen(name, float(share), replayed=True) for name, share in shares.items()),
        history=(PILE, SLIM),
    )
    weights = {name: Fraction(source.tokens or 0) for name, source in life_of([pile, second, third]).items()}
    shares = {name: 5 * tokens / sum(weights.values()) for name, tokens in weights.items()}
    assert shares == {PILE: Fraction("3.088125"), SLIM: Fraction("0.961875"), "slimpajama-2": Fraction("0.95")}
    # The plan has them: of 95 to 5 where that is a fraction of its table, else to one part in 65,536.
    plan = with_replay(
        SamplePlan((Source("train", 1000),)),
        [Source(name, 1000) for name in shares],
        [float(weight) for weight in weights.values()],
        [(0, 0.05)],
        epoch=1000,
    )
    expected = [0.95, *(float(share) / 100 for share in shares.values())]
    assert plan.shares(0).tolist() == pytest.approx(expected, abs=2**-16)


def test_one_source_under_two_names_is_one() -> None:
    """Replayed by hand as `replay`, the rows of the first stage are still its rows; others of that name are others."""
    first = stage(1, "english", seen("english", 3, fingerprint="e"))
    second = stage(2, "german", seen("german", 2, fingerprint="g"), seen("replay", 1, fingerprint="e"))
    third = stage(3, "code", seen("code", 2, fingerprint="c"), seen("replay", 1, fingerprint="other"))
    fourth = stage(4, "more", seen("more", 2, fingerprint="m"), seen("replay", 1, fingerprint="another"))
    life = life_of([first, second, third, fourth])
    assert {name: (source.tokens or 0) // 10**9 for name, source in life.items()} == {
        "english": 4,
        "german": 2,
        "code": 2,
        "replay": 1,
        "more": 2,
        "replay-more": 1,
    }
    assert life["english"].stages == ("english", "german")


def test_streams_are_known_by_name_and_what_was_not_read_is_left_out() -> None:
    first = stage(1, "english", seen("english", 3), seen("web", 1), seen("never", 0, samples=0))
    second = stage(2, "german", seen("german", 2, tokens=None), seen("web", 1))
    life = life_of([first, second])
    assert {name: source.tokens for name, source in life.items()} == {
        "english": 3_000_000_000,
        "web": 2_000_000_000,
        "german": None,
    }


def test_shares_by_samples_where_tokens_are_not_known() -> None:
    life = (stage(1, "a", SeenSource("a", samples=30)), stage(2, "b", SeenSource("b", tokens=50, samples=10)))
    found = ReplayedHistory({"a": tiny.rows(3), "b": tiny.rows(4)})
    notes = found.find(Beginning(life, told=True))
    assert found.weights == {"a": 30, "b": 10} and not found.in_tokens
    assert [fatal for _, _, fatal in notes] == [False] and "shares go by samples" in notes[0][0]
    unknown = ReplayedHistory({"a": tiny.rows(3), "b": tiny.rows(4)})
    life = (stage(1, "a", SeenSource("a")), life[1])
    assert "how much was seen of ['a'] is not known" in unknown.find(Beginning(life, told=True))[0][0]


# How a stage ended


@pytest.mark.parametrize(
    ("step", "phase", "following", "rate", "goes_on"),
    [
        (0, "warm-up", "warm-up", 0.0, None),
        (10, "warm-up", "cool-down", 1.0, None),
        (39, "cool-down", "cool-down", None, None),
        (40, "cool-down", "constant", 0.55, 0.55),
        (41, "constant", "constant", 0.55, 0.55),
        (70, "constant", "anneal", 0.55, 0.55),
        (71, "anneal", "anneal", None, None),
        (100, "anneal", None, 0.1, None),
    ],
)
def test_where_an_infinite_schedule_stood(
    step: int, phase: str, following: str | None, rate: float | None, goes_on: float | None
) -> None:
    """On either edge of the constant phase its rate is in force already, or still."""
    schedule = infinite_cosine(total_steps=100, peak_lr=1.0, warmup=10, cooldown=30, constant=30)
    ended = stage(1, "a", schedule=schedule_record(schedule, step))
    assert ended.schedule is not None
    assert (ended.phase, ended.schedule["next"]) == (phase, following)
    assert rate is None or ended.rate == pytest.approx(rate)
    assert ended.constant_rate == (None if goes_on is None else pytest.approx(goes_on))
    assert ended.annealed == (step == 100) and ended.anneal_start == 70


def test_what_counts_as_annealed() -> None:
    def ended(schedule: LRSchedule, step: int) -> Stage:
        return stage(1, "a", schedule=schedule_record(schedule, step))

    assert ended(cosine(total_steps=9, peak_lr=1.0), 9).annealed
    assert not ended(cosine(total_steps=9, peak_lr=1.0), 8).annealed
    assert ended(cosine(total_steps=9, peak_lr=1.0), 9).anneal_start is None  # no rate was held before
    assert ended(wsd(total_steps=10, peak_lr=1.0, warmup=1, decay=3), 10).anneal_start == 7
    assert not ended(CallableSchedule.of(lambda step: 1e-3, 9), 9).annealed
    assert not ended(going_on("infinite_cosine", 0.5, 9), 9).annealed
    assert ended(going_on("infinite_cosine", 0.5, 9), 9).constant_rate == 0.5
    # Of a schedule of the host's own only rates are known.
    for rate, annealed in ((0.0, True), (0.1, True), (0.11, False)):
        assert stage(1, "a", schedule=schedule_record(None, 5, rate, 1.0, "linear")).annealed == annealed
    assert not stage(1, "a").annealed and stage(1, "a").rate is None


def test_schedules_of_the_next_stage() -> None:
    branch = annealing(10, "exponential", 1e-3, 1e-5)
    for step in range(11):
        assert branch(step) == pytest.approx(1e-3 * math.exp(math.log(1e-2) * step / 10), rel=1e-12)
    assert {going_on("infinite_cosine", 2e-4, 7)(step) for step in range(20)} == {2e-4}
    unknown = Beginning((Stage(0, "base", kind="unknown"),), told=True)
    assert "how the base's learning rate ended is not known" in rate_line(unknown, None, 1e-4, "linear")


# Names and beginnings


def test_names_of_stages() -> None:
    assert Beginning().name == "stage-1"
    base = Stage(0, "base", kind="unknown")
    assert Beginning((base,)).name == "stage-1"
    first = stage(1, "english", seen("stage-2", 1))
    assert Beginning((base, first)).name == "stage-3"  # a source has the other name
    assert Beginning((base, first), kind="anneal").name == "anneal-2"
    assert Beginning((base, first), given_name="german").name == "german"
    check_name("german", (base, first))
    for wrong in ("english", "base", "stage-2", "train", "", "a b", 7, "ä"):
        with pytest.raises(ValueError, match="name"):
            check_name(wrong, (base, first))


def test_a_stage_that_was_told_of_nothing_is_like_those_of_before() -> None:
    first = stage(1, "english")
    untold, told = Beginning((first,)), Beginning((first,), told=True)
    assert untold.identity() is None and untold.history == () and untold.last is None
    assert (
        told.history == (first,) and told.identity() != Beginning((first,), told=True, carry=("weights",)).identity()
    )
    rebuilt = Beginning.of((first, stage(2, "german", begun_by="continue_from", carry=("weights",))))
    assert rebuilt.identity() == Beginning((first,), given_name="german", carry=("weights",), told=True).identity()


# Files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    full = stage(
        2,
        "german",
        seen("german", 1.5, fingerprint="f", hub={"path": "a/b", "revision": "c"}, place={"files": ["x"]}),
        seen("english", 0.5, replayed=True),
        history=("english",),
        kind="anneal",
        begun_by="continue_from",
        carry=("weights", "optimizer"),
        anneal={"steps": 3, "shape": "linear", "first": 1e-3, "last": 0.0},
        schedule=schedule_record(infinite_cosine(total_steps=100, peak_lr=1e-3), 70),
        dates={"started": "2026-01-01T00:00:00+00:00", "saved": None},
    )
    stages = (Stage(0, "base", kind="unknown", base={"path": "x"}), full)
    assert read_stages(tmp_path) is None
    write_stages(tmp_path / "new", stages)
    assert read_stages(tmp_path / "new") == stages
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stages.json"]
    # A checkpoint keeps it in its own folder, which comes first.
    write_stages(tmp_path / "new" / "hf_pretrain_ext", stages[:1])
    assert read_stages(tmp_path / "new") == stages[:1]


def test_keys_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    write_stages(tmp_path, [stage(1, "a", seen("a", 1))])
    content = json.loads((tmp_path / "stages.json").read_text())
    content["more"] = 1
    content["stages"][0]["more"] = content["stages"][0]["sources"][0]["more"] = 2
    for left_out in ("carry", "dates", "schedule"):
        del content["stages"][0][left_out]
    (tmp_path / "stages.json").write_text(json.dumps(content))
    assert read_stages(tmp_path) == (stage(1, "a", seen("a", 1)),)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "stages": []}',
        '{"format": 1, "stages": []}',
        '{"format": 1, "stages": [{}]}',
        '{"format": 1, "stages": [{"number": "1", "name": "a", "sources": []}]}',
        '{"format": 1, "stages": [{"number": 1, "name": "a"}]}',
        '{"format": 1, "stages": [{"number": 1, "name": "a", "sources": [{}]}]}',
        '{"format": 1, "stages": [{"number": 1, "name": "a", "sources": [], "schedule": 3}]}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_file_that_cannot_be_read_is_explained(content: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"stages\.json cannot be read .* remove it to go on without"):
        read_stages(tmp_path)


# Rows that can be opened again


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    tiny.rows(30).save_to_disk(folder, num_shards=2)
    return load_from_disk(folder)


@pytest.mark.parametrize("form", ["whole", "head", "tail", "one file", "shuffled", "mapped", "joined"])
def test_rows_are_found_again(form: str, saved: Any, tmp_path: Path) -> None:
    tiny.rows(20, seed=2).save_to_disk(tmp_path)
    alone = load_from_disk(tmp_path)
    made = {
        "whole": lambda: saved,
        "head": lambda: saved.select(range(11)),
        "tail": lambda: saved.select(range(11, 30)),
        "one file": lambda: alone,
        "shuffled": lambda: alone.shuffle(seed=1, indices_cache_file_name=str(tmp_path / "order.arrow")),
        "mapped": lambda: alone.map(lambda row: {"input_ids": row["labels"][::-1]}),
        "joined": lambda: concatenate_datasets([saved, alone]),
    }[form]()
    place = place_of(made)
    assert place is not None and json.loads(json.dumps(place)) == place
    again = reopen(place)
    assert again["input_ids"][:] == made["input_ids"][:] and identified(again) == identified(made)


def test_rows_that_files_do_not_give(saved: Any) -> None:
    assert place_of(saved.select(range(3, 20))) is None  # a dataset does not tell where it begins
    assert place_of(saved.select([4, 2, 9])) is None
    assert place_of(tiny.rows(5)) is None
    assert place_of([{"input_ids": [1]}]) is None
    assert place_of(saved.to_iterable_dataset()) is None and identified(saved.to_iterable_dataset()) is None


def test_files_that_are_gone_or_shorter(saved: Any, tmp_path: Path) -> None:
    place = place_of(saved)
    assert place is not None
    with pytest.raises(ValueError, match=r"gone\.arrow is not there any more"):
        reopen({**place, "files": [str(tmp_path / "gone.arrow")]})
    with pytest.raises(ValueError, match="holds 30 rows, and rows up to 31 are wanted"):
        reopen({**place, "rows": 31})
    (tmp_path / "text.arrow").write_text("no table")
    with pytest.raises(ValueError, match=r"text\.arrow cannot be opened"):
        reopen({**place, "files": [str(tmp_path / "text.arrow")]})


def test_what_is_known_of_the_hub(tmp_path: Path) -> None:
    """From the URLs that `datasets` recorded, or from its cache: namespace___name/config/version/commit/file."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    urls = DatasetInfo(download_checksums={f"hf://datasets/org/text@{commit}/a.parquet": {"num_bytes": 1}})
    assert hub_origin(Dataset.from_dict({"a": [1]}, info=urls)) == {"path": "org/text", "revision": commit}
    folder = tmp_path / "org___text" / "default" / "0.0.0" / commit
    tiny.rows(3).save_to_disk(folder)
    assert hub_origin(load_from_disk(folder)) == {"path": "org/text", "revision": commit}
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    local = load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert hub_origin(local) is None and place_of(local) is not None


# Forgetting over a life


def test_what_earlier_stages_measured() -> None:
    def entry(baseline: float, best: float, last: float, rows: str = "f") -> dict[str, Any]:
        return {"fingerprint": rows, "baseline": baseline, "best": best, "last": last}

    measured = [("a", entry(5.0, 3.0, 3.5)), ("b", entry(3.5, 3.2, 4.0)), ("c", entry(4.0, 1.0, 1.0, "other"))]
    past = past_of(measured, "f")
    assert past == Past(baseline=5.0, best=3.0, best_stage="a", last=4.0)
    assert past.life(2.5) == {"life_forgetting": -0.5, "life_gain": 2.5}  # better than ever
    assert past_of(measured, "none of them") is None and past_of([], "f") is None
    lost = past_of([("a", {**entry(5.0, 3.0, 3.5), "best": "nan"}), ("b", entry(3.5, 3.2, 4.0))], "f")
    assert lost is not None and (lost.best, lost.best_stage) == (3.2, "b")
    assert backward_transfer({"x": past, "y": Past(1, 1, "a", 2.0)}, {"x": 3.0, "y": 2.5}) == 0.25
    assert backward_transfer({}, {"x": 1.0}) is None and backward_transfer({"x": past}, {"z": 1.0}) is None


def test_rows_that_a_buffer_kept() -> None:
    """Numbered from the start of the stage on, as many as it read; none of what a plug-in made or replayed."""
    buffer = {"folder": "/seen", "start": 40, "seen": 24, "run": "a"}
    streams = (SeenSource("german", samples=18), SeenSource("english", samples=6, replayed=True))
    stage = Stage(2, "german", steps=6, global_batch=4, sources=streams, recorded={"buffer": buffer})
    life = life_of([stage])
    assert life["german"].kept == (("/seen", "a", 40, 64),) and life["english"].kept == ()
    again = dataclasses.replace(stage, number=3, recorded={"buffer": {**buffer, "start": 64, "run": "b"}})
    assert life_of([stage, again])["german"].kept == (("/seen", "a", 40, 64), ("/seen", "b", 64, 88))
    for other in (
        {"plugins": {"metadata": {}}},
        {"sources": (*streams, SeenSource("more", samples=3))},
        {"recorded": {"buffer": {"folder": "/seen", "start": 40, "seen": 24}}},
        {"steps": None},
    ):
        assert life_of([dataclasses.replace(stage, **other)])["german"].kept == ()
