"""`continue_from` and `anneal`: what a new stage takes along, what it leaves behind, and what it is told."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import load_from_disk
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import PluginError, anneal, continue_from, extend
from hf_pretrain_ext.callbacks import (
    ForgettingCallback,
    L2InitCallback,
    ReplayCallback,
    ReptileCallback,
    RewarmCallback,
)
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.stages import read_stages

STEPS = 6
INFINITE = {"schedule": "infinite_cosine", "warmup": 1, "cooldown": 2, "constant": 10, "total_steps": 20}
CONST = 5.5e-3
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}


def infinite(**more: Any) -> RewarmCallback:
    return RewarmCallback(1e-2, **{**INFINITE, **more})


def on_disk(folder: Path, number: int = 40, seed: int = 0) -> Any:
    tiny.rows(number, seed=seed).save_to_disk(folder)
    return load_from_disk(folder)


def held_out() -> ForgettingCallback:
    return ForgettingCallback({"old": tiny.rows(8, seed=77)}, every=3, first_steps="sparse")


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage with checkpoints at 2, 4 and 6, the last in the constant phase, over rows on disk."""
    folder = tmp_path_factory.mktemp("english")
    data = on_disk(folder / "rows")
    trainer = extend(tiny.trainer(folder / "run", infinite(), replay_of_nothing(), held_out(), data=data, **SAVES))
    trainer.train()
    trainer.save_model()
    return folder


def replay_of_nothing() -> ReplayCallback:
    """A plan over the training data alone."""
    return ReplayCallback(tiny.rows(4, seed=3), ratio=0, allow_no_effect=True)


def last(english: Path) -> str:
    return str(english / "run" / "checkpoint-6")


def rates(trainer: Trainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


def loaded(folder: str) -> Any:
    return type(tiny.model()).from_pretrained(folder)


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    saved = trainer.optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, held in saved.items() for key, value in held.items()}


def same_moments(first: Trainer, second: Trainer) -> bool:
    ours, theirs = optimizer_state(first), optimizer_state(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# What is left behind


def new_stage(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    plugins = callbacks or (RewarmCallback(1e-2, warmup=2), ReplayCallback(tiny.rows(30, seed=5), ratio=0.25))
    return tiny.trainer(folder, *plugins, **{"data": tiny.rows(40, seed=8), "max_steps": 5, **settings})


def test_a_new_stage_is_a_fresh_training_of_those_weights(english: Path, tmp_path: Path) -> None:
    """Bit for bit, dropout too, what a trainer does in a process that never saw the first stage."""
    model = type(tiny.model()).from_pretrained(last(english), attention_dropout=0.2)
    fresh = extend(new_stage(tmp_path / "fresh", model=model, seed=4))
    fresh.train()
    stage = continue_from(new_stage(tmp_path / "stage", dropout=0.2, seed=4), last(english))
    assert stage.state.global_step == 0
    stage.train()
    assert tiny.same_weights(fresh, stage) and same_moments(fresh, stage)
    assert tiny.history(fresh)[:-1] == tiny.history(stage)[:-1]
    assert fresh.plugin_run.realised() == stage.plugin_run.realised()


def test_a_trainer_that_has_trained_begins_a_stage_without_its_moments(english: Path, tmp_path: Path) -> None:
    used = extend(new_stage(tmp_path / "used"))
    used.train()
    assert optimizer_state(used)
    continue_from(used, last(english))
    assert used.optimizer is None and used.lr_scheduler is None and used.state.global_step == 0
    assert used.state.log_history == []
    used.train()
    fresh = continue_from(new_stage(tmp_path / "fresh"), last(english))
    fresh.train()
    assert tiny.same_weights(fresh, used) and same_moments(fresh, used)
    assert rates(fresh) == rates(used)


def test_a_second_train_inherits_no_moments(english: Path, tmp_path: Path) -> None:
    twice = extend(new_stage(tmp_path / "twice", model=loaded(last(english))))
    twice.train()
    twice.save_model(str(tmp_path / "between"))
    twice.train()
    fresh = extend(new_stage(tmp_path / "fresh", model=loaded(str(tmp_path / "between"))))
    fresh.train()
    assert tiny.same_weights(fresh, twice) and same_moments(fresh, twice)
    # Both are recorded: the second began with what the first had made.
    stages = read_stages(tmp_path / "twice")
    assert [(stage.number, stage.name, stage.steps) for stage in stages or ()] == [
        (0, "base", None),
        (1, "stage-1", 5),
        (2, "stage-2", 5),
    ]


def test_moments_come_along_when_carried(english: Path, tmp_path: Path) -> None:
    """Bit for bit, at the rates of the new stage; and what is learned with them is something else."""
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(copy.deepcopy(kwargs["optimizer"].state_dict()))

    saved = torch.load(Path(last(english)) / "optimizer.pt", weights_only=True)
    carried = new_stage(tmp_path / "carried", RewarmCallback(3e-3, warmup=2), Look(), weight_decay=0.25)
    continue_from(carried, last(english), carry=("weights", "optimizer")).train()
    assert seen["state"].keys() == saved["state"].keys()
    for number, held in saved["state"].items():
        for key, value in held.items():
            assert seen["state"][number][key].dtype == value.dtype and torch.equal(seen["state"][number][key], value)
    assert [group["weight_decay"] for group in seen["param_groups"]] == [0.25, 0.0]
    assert rates(carried)[:3] == pytest.approx([0, 1.5e-3, 3e-3])
    dropped = new_stage(tmp_path / "dropped", RewarmCallback(3e-3, warmup=2), weight_decay=0.25)
    continue_from(dropped, last(english)).train()
    assert not tiny.same_weights(carried, dropped)
    assert read_stages(tmp_path / "carried")[-1].carry == ("weights", "optimizer")  # type: ignore[index]


def test_moments_of_others_are_refused(english: Path, tmp_path: Path) -> None:
    other = new_stage(tmp_path, optim="sgd")
    with pytest.raises(
        CheckpointError, match=r"it is that of AdamW, and this stage trains with SGD.*Leave 'optimizer'"
    ):
        continue_from(other, last(english), carry=("weights", "optimizer")).train()
    frozen = new_stage(tmp_path)
    frozen.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"its groups have \[15, 5\] parameters, those of this stage \[14, 5\]"):
        continue_from(frozen, last(english), carry=("weights", "optimizer")).train()
    model_only = tmp_path / "only"
    loaded(last(english)).save_pretrained(model_only)
    with pytest.raises(CheckpointError, match="no checkpoint of a run with plug-ins, so that it has no moments"):
        continue_from(new_stage(tmp_path), str(model_only), carry=("weights", "optimizer"))


def test_an_optimizer_that_was_given_and_used_is_not_dropped_silently(english: Path, tmp_path: Path) -> None:
    trainer = new_stage(tmp_path)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
    trainer.model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    trainer.optimizer.step()
    with pytest.raises(ValueError, match=r"holds the moments of an earlier training\. Make a new Trainer"):
        continue_from(trainer, last(english))


# Learning rates


def test_an_infinite_schedule_goes_on_at_its_constant_rate(english: Path, tmp_path: Path) -> None:
    second = continue_from(new_stage(tmp_path / "two", infinite(), **SAVES), last(english), name="german")
    second.train()
    assert rates(second) == [CONST] * STEPS
    third = continue_from(new_stage(tmp_path / "three", infinite()), str(tmp_path / "two" / "checkpoint-6"))
    third.train()
    assert rates(third) == [CONST] * 5
    schedule = read_stages(tmp_path / "three")[-1].schedule  # type: ignore[index]
    assert schedule is not None
    # The peak stays known: what 10 % of it is, an anneal will have to know.
    assert (schedule["rate"], schedule["phase"], schedule["peak"], schedule["const"]) == (
        CONST,
        "constant",
        1e-2,
        CONST,
    )


def test_other_settings_are_said_to_stand_aside_and_can_be_had(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = continue_from(new_stage(tmp_path / "a", infinite(const_lr=2e-3)), last(english))
    assert (
        "would hold a rate of 0.002; the stage before ended in a constant phase at 0.0055" in capsys.readouterr().err
    )
    other.train()
    assert rates(other) == [CONST] * 5
    said = capsys.readouterr().err
    assert "rate: goes on at 0.0055, where the stage before ended: no re-warming" in said
    anew = continue_from(new_stage(tmp_path / "b", infinite(go_on=False)), last(english))
    anew.train()
    assert rates(anew) == pytest.approx([0, 1e-2, 7.75e-3, CONST, CONST])
    assert (
        "the stage before ended at 0.0055 (constant); this one goes from 0 to a peak of 0.01"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="go_on=False is a setting of the infinite_"):
        RewarmCallback(1e-2, go_on=False)


@pytest.mark.parametrize(("step", "phase", "following"), [(4, "constant", "constant"), (2, "cool-down", "cool-down")])
def test_only_the_constant_phase_goes_on(step: int, phase: str, following: str, english: Path, tmp_path: Path) -> None:
    stages = read_stages(english / "run" / f"checkpoint-{step}")
    assert stages is not None and stages[-1].schedule is not None
    assert (stages[-1].schedule["phase"], stages[-1].schedule["next"]) == (phase, following)
    stage = continue_from(new_stage(tmp_path, infinite()), str(english / "run" / f"checkpoint-{step}"))
    stage.train()
    assert (rates(stage) == [CONST] * 5) == (phase == "constant")


def test_the_hosts_own_schedule_is_recorded_and_its_jump_is_said(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        **{"save_strategy": "steps", "save_steps": 4},
    }
    first = extend(new_stage(tmp_path / "a", replay_of_nothing(), **plain))
    first.train()
    held = read_stages(tmp_path / "a" / "checkpoint-4")[-1]  # type: ignore[index]
    assert held.schedule is not None and held.schedule["name"] == "host: linear" and held.rate == 0 and held.annealed
    continue_from(
        new_stage(tmp_path / "b", replay_of_nothing(), **plain), str(tmp_path / "a" / "checkpoint-4")
    ).train()
    assert "the stage before ended at 0; this one begins with learning_rate=0.01 of the arguments (linear)" in (
        capsys.readouterr().err
    )


def test_an_annealed_base_is_a_warning_that_names_what_came_before(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = RewarmCallback(1e-2, schedule="wsd", warmup=1, decay=3)
    extend(new_stage(tmp_path / "wsd", short, **{**SAVES, "save_steps": 1})).train()
    continue_from(new_stage(tmp_path / "b"), str(tmp_path / "wsd" / "checkpoint-6"))
    said = capsys.readouterr().err
    assert "ended annealed, at a rate of 0.001" in said
    assert f"The newest checkpoint before its anneal is {tmp_path / 'wsd' / 'checkpoint-3'}" in said
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / "wsd" / f"checkpoint-{number}")
    continue_from(new_stage(tmp_path / "c"), str(tmp_path / "wsd" / "checkpoint-6"))
    assert "No checkpoint from before its anneal is left" in capsys.readouterr().err
    continue_from(new_stage(tmp_path / "d"), str(tmp_path / "wsd" / "checkpoint-5"))
    assert "annealed" not in capsys.readouterr().err  # it was under way


# Annealing


def test_an_annealing_branch(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rates are the paper's exponential to a tenth of the peak, its moments the checkpoint's."""
    branch = new_stage(tmp_path / "branch", infinite(), max_steps=50)
    anneal(branch, last(english), steps=4)
    assert branch.args.max_steps == 4
    branch.train()
    assert branch.state.global_step == 4
    assert rates(branch) == pytest.approx([CONST * (1e-3 / CONST) ** (n / 4) for n in range(4)], rel=1e-12)
    saved = torch.load(Path(last(english)) / "optimizer.pt", weights_only=True)["state"]
    assert optimizer_state(branch)["0.step"] == saved[0]["step"] + 4
    stage = read_stages(tmp_path / "branch")[-1]  # type: ignore[index]
    assert (stage.kind, stage.name, stage.steps) == ("anneal", "anneal-2", 4) and stage.annealed
    assert stage.rate == pytest.approx(1e-3)
    branch.save_model()
    continue_from(new_stage(tmp_path / "next"), str(tmp_path / "branch"))
    assert f"The newest checkpoint before its anneal is {last(english)}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"which must be above 0 and below the last one, 0.001: there is nothing to"):
        anneal(new_stage(tmp_path / "again"), str(tmp_path / "branch"), steps=4)


@pytest.mark.parametrize(
    ("shape", "low", "expected"),
    [("linear", 0.0, [CONST, CONST / 2]), ("cosine", "1%", [CONST, (CONST + 1e-4) / 2])],
)
def test_shapes_of_a_branch(shape: str, low: Any, expected: list[float], english: Path, tmp_path: Path) -> None:
    """Without any plug-in too: the rate is the branch's own."""
    branch = tiny.trainer(tmp_path, max_steps=9)
    anneal(branch, last(english), steps="2 steps", shape=shape, min_lr=low, name="to-deploy").train()
    assert rates(branch) == pytest.approx(expected)
    assert read_stages(tmp_path)[-1].name == "to-deploy"  # type: ignore[index]


def test_the_run_goes_on_where_a_branch_began(english: Path, tmp_path: Path) -> None:
    """The original is resumed after the branch, and ends where it would have ended: bit for bit."""
    folder = tmp_path / "english"
    shutil.copytree(english, folder)
    before = {path: path.read_bytes() for path in (folder / "run" / "checkpoint-4").rglob("*") if path.is_file()}
    anneal(new_stage(tmp_path / "branch"), str(folder / "run" / "checkpoint-4"), steps=2).train()
    assert {path: path.read_bytes() for path in before} == before
    for end in ("checkpoint-6",):
        shutil.rmtree(folder / "run" / end)
    resumed = extend(
        tiny.trainer(
            folder / "run", infinite(), replay_of_nothing(), held_out(), data=load_from_disk(folder / "rows"), **SAVES
        )
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plugin_run.resumed_at == 4
    whole = loaded(last(english)).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tiny.weights(resumed).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least one step"),
        ({"steps": 0.1}, "steps must be at least one step"),
        ({"steps": 3, "shape": "step"}, "shape must be one of"),
        ({"steps": 3, "min_lr": 1.0}, "must be above 0 and below the last one, 0.0055"),
        ({"steps": 3, "min_lr": 0.0}, "must be above 0"),
        ({"steps": 3, "name": "stage-1"}, "name='stage-1' is taken"),
    ],
)
def test_a_branch_that_cannot_be(change: dict[str, Any], message: str, english: Path, tmp_path: Path) -> None:
    trainer = new_stage(tmp_path)
    with pytest.raises(ValueError, match=message):
        anneal(trainer, last(english), **change)
    assert trainer.args.max_steps == 5


# Replay of what earlier stages read


def test_what_earlier_stages_read_is_replayed(english: Path, tmp_path: Path) -> None:
    """Opened from its files; the third stage replays both, in proportion to the tokens that were seen of them."""
    german = on_disk(tmp_path / "german", seed=21)
    replay = ReplayCallback(from_history=True, ratio=0.25)
    second = new_stage(tmp_path / "two", infinite(), replay, data=german, **SAVES)
    continue_from(second, last(english), name="german").train()
    counts = {name: entry["samples"] for name, entry in second.plugin_run.realised().items()}
    assert counts == {"train": 18, "stage-1": 6}
    # Really those 24 rows of 40 that the first stage read, in the order in which it did.
    first = extend(tiny.trainer(tmp_path / "as-one", infinite(), replay_of_nothing(), **SAVES)).plugin_run.build_plan()
    plan = second.plugin_run.plan
    assert first is not None and plan is not None
    read = first.draws(0, 24).row
    assert plan.sources[1].dataset["input_ids"][:] == tiny.rows(40).select(read)["input_ids"][:]
    again = ReplayCallback(from_history=True, ratio=0.25)
    third = new_stage(tmp_path / "three", infinite(), again, data=tiny.rows(60, seed=30), max_steps=8)
    continue_from(third, str(tmp_path / "two" / "checkpoint-6"), name="code")
    plan = third.plugin_run.build_plan()
    assert plan is not None
    # Of English the first stage read 24 samples and the second 6, of German 18.
    assert dict(zip([s.name for s in plan.sources], plan.shares(0), strict=True)) == pytest.approx(
        {"train": 0.75, "stage-1": 0.25 * 30 / 48, "german": 0.25 * 18 / 48}
    )
    third.train()
    recorded = read_stages(tmp_path / "three")
    assert recorded is not None
    assert [s.name for s in recorded[-1].sources] == ["code", "stage-1", "german"]
    assert [stage.name for stage in recorded] == ["stage-1", "german", "code"]


def test_the_home_folder_is_in_no_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are pushed; a second stage opens the rows again by what the first one wrote."""
    home = tmp_path / "jane.doe"
    monkeypatch.setenv("HOME", str(home))
    data = on_disk(home / "rows")
    extend(tiny.trainer(home / "one", infinite(), replay_of_nothing(), held_out(), data=data, **SAVES)).train()
    second = new_stage(home / "two", infinite(), ReplayCallback(from_history=True, ratio=0.5), **SAVES)
    continue_from(second, str(home / "one" / "checkpoint-6")).train()
    assert second.plugin_run.realised()["stage-1"]["samples"] == 12
    assert '"~/one/checkpoint-6"' in (home / "two" / "stages.json").read_text()
    assert '"~/rows/' in (home / "two" / "checkpoint-6" / "hf_pretrain_ext" / "stages.json").read_text()
    ours = [
        path for name in ("stages.json", "trace.jsonl", "state.json", "forgetting.json") for path in home.rglob(name)
    ]
    assert len({path.name for path in ours}) == 4
    for path in ours:
        assert "jane.doe" not in path.read_text("utf-8"), path


def test_a_second_train_of_a_stage_is_one_more(english: Path, tmp_path: Path) -> None:
    """It knows what the first knew, and of the first: it goes on at the rate and replays what was before."""
    stage = new_stage(tmp_path, infinite(), ReplayCallback(from_history=True, ratio=0.25))
    continue_from(stage, last(english), name="german").train()
    stage.train()
    assert rates(stage) == [CONST] * 5
    stages = read_stages(tmp_path)
    assert stages is not None and [each.name for each in stages] == ["stage-1", "german", "stage-3"]
    assert [source.name for source in stages[2].sources] == ["stage-3", "stage-1"]  # German is what it trains on


def test_rows_that_are_gone_are_one_error_with_the_ways_out(english: Path, tmp_path: Path) -> None:
    folder = tmp_path / "english"
    shutil.copytree(english / "run", folder)
    path = folder / "checkpoint-6" / "hf_pretrain_ext" / "stages.json"
    content = json.loads(path.read_text())
    (source,) = [s for s in content["stages"][-1]["sources"] if not s["replayed"]]
    source["place"]["files"] = [str(tmp_path / "gone.arrow")]
    source["hub"] = {"path": "org/english", "revision": "abc"}
    path.write_text(json.dumps(content))
    remanifest(folder / "checkpoint-6")
    trainer = new_stage(tmp_path / "two", infinite(), ReplayCallback(from_history=True))
    with pytest.raises(PluginError) as refusal:
        continue_from(trainer, str(folder / "checkpoint-6"))
    (problem,) = refusal.value.problems
    for text in ("gone.arrow is not there any more", "org/english at revision abc", "data={'stage-1': ...}", "public"):
        assert text in str(problem)
    assert type(trainer) is Trainer  # nothing was changed
    named = new_stage(
        tmp_path / "three", infinite(), ReplayCallback(data={"stage-1": tiny.rows(40)}, from_history=True)
    )
    continue_from(named, str(folder / "checkpoint-6")).train()
    assert named.plugin_run.realised()["stage-1"]["samples"] == 1


def remanifest(folder: Path) -> None:
    """As a checkpoint would be that was written like this."""
    from hf_pretrain_ext.checkpoint import read_state, write_state

    write_state(folder, read_state(folder))


def test_rows_that_stand_in(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other rows under the name of a source count as it in later stages."""
    stand_in = ReplayCallback(from_history=True, ratio=0.25, data={"stage-1": tiny.rows(10, seed=50)})
    second = new_stage(tmp_path / "two", infinite(), stand_in, **SAVES)
    continue_from(second, last(english), name="german").train()
    assert "data['stage-1'] has other rows than stage 'stage-1' read" in capsys.readouterr().err
    german = {"german": tiny.rows(40, seed=8)}
    third = new_stage(
        tmp_path / "three",
        infinite(),
        ReplayCallback(from_history=True, ratio=0.5, data=german),
        data=tiny.rows(40, seed=9),
    )
    continue_from(third, str(tmp_path / "two" / "checkpoint-6"))
    plan = third.plugin_run.build_plan()
    assert plan is not None and plan.shares(0).tolist() == pytest.approx([0.5, 0.5 * 30 / 48, 0.5 * 18 / 48])
    # What a stage trains on is not replayed beside it, so it needs no rows either.
    same = new_stage(tmp_path / "four", infinite(), ReplayCallback(from_history=True, ratio=0.5))
    continue_from(same, str(tmp_path / "two" / "checkpoint-6"))
    assert "'german' is the training data itself and is not replayed beside it" in capsys.readouterr().err
    plan = same.plugin_run.build_plan()
    assert plan is not None and [source.name for source in plan.sources] == ["train", "stage-1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "dataset is missing: pass old data, or from_history=True"),
        ({"dataset": tiny.rows(3), "data": {"a": tiny.rows(3)}}, "data belongs to from_history=True"),
        ({"dataset": tiny.rows(3), "from_history": True}, "two ways to say what is replayed"),
        ({"from_history": True, "data": tiny.rows(3)}, "data must be a dict of datasets by the names of sources"),
        ({"from_history": 1}, "from_history must be True or False"),
    ],
)
def test_settings_of_replay_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayCallback(**given)


def test_a_history_that_nobody_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = extend(new_stage(tmp_path, ReplayCallback(from_history=True)))
    assert "Call continue_from(trainer, checkpoint) before train()" in capsys.readouterr().err
    with pytest.raises(PluginError, match="knows of no earlier stage yet"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": {"french": tiny.rows(9)}}, r"data has 'french', which no earlier stage read.*\['stage-1'\]"),
        ({"weights": {"german": 1}}, r"weights must name the sources \['stage-1'\]"),
    ],
)
def test_names_that_no_stage_has(given: dict[str, Any], message: str, english: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=message):
        continue_from(new_stage(tmp_path, ReplayCallback(from_history=True, **given)), last(english))


# Forgetting over the life


def test_forgetting_over_the_life(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = json.loads((english / "run" / "forgetting.json").read_text())["sets"]["old"]["losses"]
    probe = held_out()
    stage = continue_from(new_stage(tmp_path / "two", infinite(), probe), last(english))
    stage.train()
    losses = probe.history.sets["old"]["losses"]
    lines = [line for line in stage.state.log_history if "life_forgetting_old" in line]
    assert [line["life_forgetting_old"] for line in lines] == pytest.approx([loss - min(first) for loss in losses])
    assert [line["life_gain_old"] for line in lines] == pytest.approx([first[0] - loss for loss in losses])
    assert [line["backward_transfer"] for line in lines] == pytest.approx([first[-1] - loss for loss in losses])
    written = json.loads((tmp_path / "two" / "forgetting.json").read_text())
    assert written["life"]["backward_transfer"] == pytest.approx(first[-1] - losses[-1])
    assert written["sets"]["old"]["past"] == {
        "baseline": first[0],
        "best": min(first),
        "best_stage": "stage-1",
        "last": first[-1],
    }
    # The first stage knows of no life before it.
    assert "life_forgetting_old" not in (english / "run" / "trace.jsonl").read_text()
    capsys.readouterr()
    other = ForgettingCallback({"old": tiny.rows(8, seed=78), "new": tiny.rows(8, seed=79)})
    anew = continue_from(new_stage(tmp_path / "three", infinite(), other, max_steps=1), last(english))
    said = capsys.readouterr().err
    assert "forgetting[old]: is not the set of that name in stage 'stage-1' (other rows)" in said
    assert "forgetting[new]" not in said
    anew.train()
    assert not any("life_gain_old" in line for line in anew.state.log_history)


# Resuming


def test_a_finished_run_says_how_to_go_on(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "english"
    shutil.copytree(english / "run", folder)
    again = extend(
        tiny.trainer(
            folder, infinite(), replay_of_nothing(), held_out(), data=load_from_disk(english / "rows"), **SAVES
        )
    )
    again.train(resume_from_checkpoint=True)
    said = capsys.readouterr().err
    assert "is finished (step 6 of 6): there is nothing to resume" in said
    assert f"continue_from(trainer, '{folder / 'checkpoint-6'}').train()" in said


def test_a_resume_with_other_data_says_how_to_go_on(english: Path) -> None:
    other = extend(
        tiny.trainer(
            english / "run", infinite(), replay_of_nothing(), held_out(), data=tiny.rows(40, seed=12), **SAVES
        )
    )
    with pytest.raises(CheckpointError, match=r"data\.train: .*\n.*begin a new stage.*continue_from\(trainer, '.*'\)"):
        other.train(resume_from_checkpoint=str(english / "run" / "checkpoint-4"))


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def lived(root: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None, told: bool) -> tuple[Trainer, list[Any]]:
    """Three stages with dropout; the second is interrupted after `stop` steps and resumed in another trainer."""
    root.mkdir()
    monkeypatch.chdir(root)
    for number, name in enumerate(("english", "german", "code")):
        tiny.rows(40, seed=number).save_to_disk(f"rows-{name}")

    def build(name: str, *more: Any) -> Trainer:
        replay = [] if name == "english" else [ReplayCallback(from_history=True, ratio=0.25)]
        plugins = [infinite(), *replay, held_out(), *more]
        rows = load_from_disk(f"rows-{name}")
        return tiny.trainer(f"run-{name}", *plugins, data=rows, dropout=0.2, **SAVES)

    extend(build("english")).train()
    begun: Callable[[Trainer], Trainer] = lambda trainer: continue_from(  # noqa: E731
        trainer, "run-english/checkpoint-6", name="german"
    )
    if stop is None:
        begun(build("german")).train()
    else:
        with pytest.raises(KeyboardInterrupt):
            begun(build("german", StopAt(stop))).train()
        resumed = build("german")
        (begun(resumed) if told else extend(resumed)).train(resume_from_checkpoint=True)
        assert resumed.plugin_run.resumed_at == stop
    final = continue_from(build("code"), "run-german/checkpoint-6", carry=("weights", "optimizer"), name="code")
    final.train()
    stages = json.loads(Path("run-code/stages.json").read_text())["stages"]
    for stage in stages:
        assert stage.pop("dates").keys() == {"started", "saved"}
        (stage["parent"] or {}).pop("folder", None)
        for source in stage["sources"]:
            source["place"] = None if source["place"] is None else Path(source["place"]["files"][0]).parent.name
    return final, stages


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, list[Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        yield lived(tmp_path_factory.mktemp("whole") / "life", patch, None, True)


@pytest.mark.resume
@pytest.mark.parametrize(("stop", "told"), [(2, True), (4, False)])
def test_a_life_that_was_interrupted_ends_the_same(
    stop: int, told: bool, whole: tuple[Trainer, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and history of all stages, dates apart; the resume may name its base again or not."""
    final, stages = lived(tmp_path / "life", monkeypatch, stop, told)
    assert tiny.same_weights(whole[0], final) and same_moments(whole[0], final)
    assert stages == whole[1]
    assert [stage["name"] for stage in stages] == ["stage-1", "german", "code"]
    # The first stage had no plan: all its rows are replayed. Of the second those that were read, no file of their own.
    assert [source["place"] for source in stages[2]["sources"]] == ["rows-code", "rows-english", None]
    assert tiny.history(whole[0])[:-1] == tiny.history(final)[:-1]


def test_a_resume_after_another_base_is_refused(english: Path, tmp_path: Path) -> None:
    plugins = lambda: [infinite(), replay_of_nothing()]  # noqa: E731
    one, other = tmp_path / "one", tmp_path / "other"
    continue_from(new_stage(one, *plugins(), **SAVES), last(english), name="german").train()
    with pytest.raises(ValueError, match="of the stage 'german', with whose checkpoints those of 'french' would mix"):
        continue_from(new_stage(one, *plugins(), **SAVES), last(english), name="french")
    before = str(english / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match="of another stage 'german', begun otherwise, with whose checkpoints"):
        continue_from(new_stage(one, *plugins(), **SAVES), before, name="german")
    trainer = continue_from(new_stage(other, *plugins(), **SAVES), before, name="german")
    with pytest.raises(CheckpointError, match=r"stage\.earlier\[0\]\.steps: 6 → 4"):
        trainer.train(resume_from_checkpoint=str(one / "checkpoint-4"))


# What a stage can begin with


def test_a_model_folder_without_history(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config and card are read, and what nobody can know is said; the advice can be followed."""
    folder = tmp_path / "base"
    loaded(last(english)).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nbase_model: org/older\ndatasets:\n- org/text\ntags: [causal]\n---\n# A model\n"
    )
    stage = continue_from(
        new_stage(tmp_path / "a", ReplayCallback(from_history=True, data={"base": tiny.rows(9)})), str(folder)
    )
    said = capsys.readouterr().err
    assert "model_type llama, vocab_size 64" in said and "base_model 'org/older', datasets ['org/text']" in said
    assert "not known: how its learning rate ended" in said and "which data" not in said
    stage.train()
    assert stage.plugin_run.realised()["base"]["replayed"]
    stages = read_stages(tmp_path / "a")
    assert stages is not None
    assert (stages[0].kind, stages[0].name, stages[0].base["card"]["datasets"]) == ("unknown", "base", ["org/text"])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"at which learning rate .*base stopped is not known"):
        anneal(new_stage(tmp_path / "b"), str(folder), steps=3)
    with pytest.raises(PluginError, match="found nothing that earlier stages read"):
        continue_from(new_stage(tmp_path / "c", ReplayCallback(from_history=True)), str(folder))


def test_the_share_of_a_base_that_nobody_measured_has_to_be_said(english: Path, tmp_path: Path) -> None:
    """A model of the Hub, then a first stage; in the second both are replayed."""
    folder = tmp_path / "base"
    loaded(last(english)).save_pretrained(folder)
    rows = {"data": on_disk(tmp_path / "rows", seed=4)}
    continue_from(
        new_stage(tmp_path / "one", replay_of_nothing(), **rows, **SAVES), str(folder), name="german"
    ).train()
    base = {"base": tiny.rows(30, seed=60)}
    with pytest.raises(PluginError, match=r"how many tokens 'base' was trained on is not known.*'base': 30000"):
        continue_from(
            new_stage(tmp_path / "two", ReplayCallback(from_history=True, data=base)),
            str(tmp_path / "one" / "checkpoint-6"),
        )
    told = ReplayCallback(from_history=True, data=base, ratio=0.5, weights={"base": 3e3, "german": 1e3})
    stage = continue_from(new_stage(tmp_path / "two", told), str(tmp_path / "one" / "checkpoint-6"))
    plan = stage.plugin_run.build_plan()
    assert plan is not None and [s.name for s in plan.sources] == ["train", "german", "base"]
    assert plan.shares(0).tolist() == [0.5, 0.125, 0.375]


def test_a_model_object_and_model_init(english: Path, tmp_path: Path) -> None:
    folder = continue_from(new_stage(tmp_path / "a"), last(english))
    given = continue_from(new_stage(tmp_path / "b"), loaded(last(english)))
    made = Trainer(
        model_init=lambda: tiny.model(seed=99),
        args=tiny.arguments(tmp_path / "c", max_steps=5),
        train_dataset=tiny.rows(40, seed=8),
        data_collator=folder.data_collator,
        callbacks=[RewarmCallback(1e-2, warmup=2), ReplayCallback(tiny.rows(30, seed=5), ratio=0.25)],
    )
    continue_from(made, last(english))
    for trainer in (folder, given, made):
        trainer.train()
    assert tiny.same_weights(folder, given) and tiny.same_weights(folder, made)
    # Of its own model a trainer knows the history.
    continue_from(folder, folder.model, name="more").train()
    names = [stage.name for stage in read_stages(tmp_path / "a") or ()]
    assert names == ["stage-1", "stage-2", "more"]


def test_the_folder_that_save_model_wrote(english: Path, tmp_path: Path) -> None:
    """The history lies beside the weights there too."""
    stages = read_stages(english / "run")
    assert stages is not None and stages[-1].steps == 6 and (english / "run" / "model.safetensors").is_file()
    copied = tmp_path / "deployed"
    shutil.copytree(english / "run", copied, ignore=shutil.ignore_patterns("checkpoint-*"))
    trainer = continue_from(new_stage(tmp_path / "a", infinite()), str(copied))
    trainer.train()
    assert rates(trainer) == [CONST] * 5


def test_a_checkpoint_of_a_bare_trainer(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "bare", save_strategy="steps", save_steps=2, max_steps=2).train()
    refused = extend(tiny.trainer(tmp_path / "bare", RewarmCallback(1e-2)))
    with pytest.raises(CheckpointError, match=r"or continue_from\(trainer, '.*checkpoint-2'\)"):
        refused.train(resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-2"))
    stage = continue_from(new_stage(tmp_path / "a"), str(tmp_path / "bare" / "checkpoint-2"))
    expected = loaded(str(tmp_path / "bare" / "checkpoint-2")).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(stage).items())


def test_checkpoints_of_before_there_were_stages(english: Path, tmp_path: Path) -> None:
    """They resume, and what they tell of their one stage is made of their state."""
    from hf_pretrain_ext.checkpoint import read_state, write_state

    folder = tmp_path / "run"
    shutil.copytree(english / "run", folder)
    for number in (4, 6):
        state = read_state(folder / f"checkpoint-{number}")
        del state["identity"]["stage"]
        (folder / f"checkpoint-{number}" / "hf_pretrain_ext" / "stages.json").unlink()
        write_state(folder / f"checkpoint-{number}", state)
    (folder / "stages.json").unlink()
    stage = continue_from(new_stage(tmp_path / "a", infinite()), str(folder / "checkpoint-6"))
    stage.train()
    assert rates(stage) == [CONST] * 5
    first = read_stages(tmp_path / "a")[0]  # type: ignore[index]
    known = read_stages(last(english))[0]  # type: ignore[index]
    assert (first.steps, first.tokens, first.rate) == (known.steps, known.tokens, known.rate) == (6, 384, CONST)
    shutil.rmtree(folder / "checkpoint-6")
    resumed = extend(
        tiny.trainer(
            folder, infinite(), replay_of_nothing(), held_out(), data=load_from_disk(english / "rows"), **SAVES
        )
    )
    resumed.train(resume_from_checkpoint=True)
    whole = loaded(last(english)).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tiny.weights(resumed).items())


# What is refused


def test_a_damaged_checkpoint(english: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(english / "run", folder)
    with (folder / "checkpoint-6" / "model.safetensors").open("r+b") as file:
        file.seek(3000)
        file.write(b"\x07\x07\x07")
    with pytest.raises(
        CheckpointError,
        match=r"cannot continue from .*: model.safetensors was altered.*newest complete checkpoint is .*checkpoint-4",
    ):
        continue_from(new_stage(tmp_path / "a"), str(folder / "checkpoint-6"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model itself, but checkpoints: .*checkpoint-4"):
        continue_from(new_stage(tmp_path / "a"), str(folder))


def wide(folder: Path) -> None:
    tiny.model(vocabulary=80).save_pretrained(folder)


def deep(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict({**tiny.model().config.to_dict(), "num_hidden_layers": 3})
    LlamaForCausalLM(config).save_pretrained(folder)


def pickled(folder: Path) -> None:
    folder.mkdir()
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wide, r"of another shape: model.embed_tokens.weight: \(80, 16\) there, \(64, 16\) in the model.*carry=\(\)"),
        (deep, r"not in the model: model.layers.2.* and 1 more.*configuration of that folder"),
        (pickled, "holds weights as pickles, which are not read"),
        (Path.mkdir, "holds no weights in safetensors"),
        (lambda folder: None, "is no folder here, and no model that the Hub gives"),
    ],
)
def test_weights_that_do_not_fit(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "base")
    trainer = new_stage(tmp_path / "a")
    before = tiny.weights(trainer)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        continue_from(trainer, str(tmp_path / "base"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.weights(trainer).items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"carry": "moments"}, ValueError, "carry must be"),
        ({"carry": ("optimizer",)}, ValueError, "moments belong to weights"),
        ({"name": "stage-1"}, ValueError, "name='stage-1' is taken"),
        ({"name": "train"}, ValueError, "name='train' is taken"),
        ({"name": "two words"}, ValueError, "name must hold letters"),
        ({"revision": "main"}, ValueError, "is for models of the Hub"),
    ],
)
def test_arguments_that_cannot_be(
    given: dict[str, Any], error: type[Exception], message: str, english: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        continue_from(new_stage(tmp_path), last(english), **given)


@pytest.mark.parametrize("wrong", [None, 7, "", ["a"]])
def test_no_place_to_begin(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="checkpoint_or_model must be a folder"):
        continue_from(new_stage(tmp_path), wrong)
    with pytest.raises(TypeError, match=r"trainer must be a transformers.Trainer"):
        continue_from(wrong, "x")


def test_a_stage_needs_a_folder_of_its_own(english: Path) -> None:
    with pytest.raises(ValueError, match="Give the new stage an output_dir of its own"):
        continue_from(new_stage(english / "run"), last(english))
    with pytest.raises(ValueError, match="Give the new stage an output_dir of its own"):
        anneal(new_stage(english / "run"), last(english), steps=2)
    with pytest.raises(ValueError, match="Give the new stage an output_dir of its own"):
        continue_from(new_stage(english / "run"), str(english / "run"))


# Vocabularies, adapters, families


def test_another_vocabulary_is_refused_and_a_larger_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny.tokenizer()
    extend(new_stage(tmp_path / "one", processing_class=tokenizer, **SAVES)).train()
    folder = str(tmp_path / "one" / "checkpoint-6")
    vocabulary = tokenizer.get_vocab()
    turned = {token: len(vocabulary) - 1 - number for token, number in vocabulary.items()}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(turned, [], unk_token="<unk>")))
    with pytest.raises(
        CheckpointError, match=r"another tokenizer .*tokens have another id \('.*' was \d+ and is \d+\)"
    ):
        continue_from(new_stage(tmp_path / "two", processing_class=other), folder)
    for path in Path(folder).glob("*token*"):
        path.unlink()
    shutil.rmtree(Path(folder) / "hf_pretrain_ext")
    more = tiny.tokenizer()
    more.add_tokens(["<|good|>"])
    continue_from(new_stage(tmp_path / "three", processing_class=more), folder)  # nothing there to compare with
    tokenizer.save_pretrained(folder)
    continue_from(new_stage(tmp_path / "three", processing_class=more), folder)
    assert "the tokenizer has 1 tokens that" in capsys.readouterr().err


def test_history_alone_for_a_model_that_was_resized(english: Path, tmp_path: Path) -> None:
    model = loaded(last(english))
    model.resize_token_embeddings(72)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage = continue_from(new_stage(tmp_path, infinite(), model=model), last(english), carry=())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.weights(stage).items())
    stage.train()
    assert rates(stage) == [CONST] * 5


def test_adapters(tmp_path: Path) -> None:
    """A stage that trained an adapter goes on in another; in a model without one it is refused with the ways out."""
    from peft import LoraConfig, get_peft_model

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    first = extend(new_stage(tmp_path / "one", model=adapted(1), **SAVES))
    first.train()
    folder = str(tmp_path / "one" / "checkpoint-6")
    stage = continue_from(new_stage(tmp_path / "two", model=adapted(2)), folder)
    assert tiny.same_weights(first, stage)
    stage.train()
    with pytest.raises(CheckpointError, match=r"holds an adapter, and the model has none.*merge_and_unload"):
        continue_from(new_stage(tmp_path / "three"), folder)
    wide = get_peft_model(tiny.model(), LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"of another shape: .*lora_A.weight: \(2, 16\) there, \(3, 16\)"):
        continue_from(new_stage(tmp_path / "four", model=wide), folder)


def test_an_adapter_that_a_plug_in_gives(english: Path, tmp_path: Path) -> None:
    """The base fits the model as it is; the next stage's checkpoint fits it only once the plug-in wrapped it."""
    import settings

    def dora() -> Any:
        return settings.by_name("gradnormlorp-dora").make()

    two = continue_from(new_stage(tmp_path / "two", dora(), **SAVES), last(english))
    two.train()
    three = continue_from(
        new_stage(tmp_path / "three", dora(), model=loaded(last(english))), str(tmp_path / "two" / "checkpoint-6")
    )
    assert tiny.same_weights(two, three)
    three.train()


def test_families_that_are_saved_under_other_names(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)

    first = extend(new_stage(tmp_path / "one", model=model(1), **SAVES))
    first.train()
    stage = continue_from(new_stage(tmp_path / "two", model=model(2)), str(tmp_path / "one" / "checkpoint-6"))
    assert tiny.same_weights(first, stage)


def test_weights_of_a_wider_type_are_said_to_be_rounded(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = continue_from(new_stage(tmp_path, model=tiny.model().to(torch.bfloat16)), last(english))
    assert "weights are rounded from float32 to bfloat16" in capsys.readouterr().err
    expected = loaded(last(english)).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(stage).items())


# Optimizers that keep more than moments; the report


@pytest.mark.parametrize("plugin", ["reptile", "gradnormlorp"])
def test_all_that_an_optimizer_counts_comes_along(plugin: str, tmp_path: Path) -> None:
    """Moments and projectors: as they were saved, bit for bit. What Reptile keeps is the stage's own."""
    import settings

    made = settings.by_name(plugin).make
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(copy.deepcopy(kwargs["optimizer"].state_dict()))

    extend(new_stage(tmp_path / "one", made(), **{**SAVES, "save_steps": 3})).train()
    folder = tmp_path / "one" / "checkpoint-3"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    stage = new_stage(tmp_path / "two", made(), Look(), learning_rate=5e-3)
    continue_from(stage, str(folder), carry=("weights", "optimizer")).train()
    assert any("reptile" in key for key in saved["state"][0]) == (plugin == "reptile")
    for number, held in saved["state"].items():
        for key, value in held.items():
            if "reptile" in key:
                assert key not in seen["state"][number]
                continue
            now = seen["state"][number][key]
            equal = torch.equal(now, value) and now.dtype == value.dtype if torch.is_tensor(value) else now == value
            assert equal, (number, key)
    for ours, theirs in zip(seen["param_groups"], saved["param_groups"], strict=True):
        rest = {k: 0 if "reptile" in k else value for k, value in theirs.items() if k not in ("lr", "initial_lr")}
        assert {key: ours[key] for key in rest} == rest and ours["initial_lr"] == 5e-3
    bare = new_stage(tmp_path / "three", RewarmCallback(1e-2), Look())
    if plugin == "reptile":
        # Around AdamW, whose moments they are.
        assert read_stages(folder)[-1].optimizer == "AdamW"  # type: ignore[index]
        continue_from(bare, str(folder), carry=("weights", "optimizer")).train()
        assert set(seen["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        return
    with pytest.raises(CheckpointError, match="Leave 'optimizer' out of carry"):
        continue_from(bare, str(folder), carry=("weights", "optimizer")).train()


def test_no_copy_of_the_weights_comes_along(tmp_path: Path) -> None:
    """Two wrappers in one stage, one in the next: what the other kept is left, and not in later checkpoints."""
    first = new_stage(tmp_path / "one", L2InitCallback(1.0), ReptileCallback(every=2), **{**SAVES, "save_steps": 3})
    extend(first).train()
    folder = tmp_path / "one" / "checkpoint-3"
    held = torch.load(folder / "optimizer.pt", weights_only=True)
    assert {"l2_init_anchor", "reptile_anchor"} <= set(held["state"][0])
    second = new_stage(tmp_path / "two", ReptileCallback(every=2), **{**SAVES, "save_steps": 3})
    continue_from(second, str(folder), carry=("weights", "optimizer")).train()
    kept = torch.load(tmp_path / "two" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    keys = {key for state in kept["state"].values() for key in state} | set(kept["param_groups"][0])
    assert "reptile_anchor" in keys and not any("l2" in key for key in keys)


@pytest.mark.parametrize("alone", [False, True], ids=["anneal again", "train alone"])
def test_a_branch_of_a_stage_with_reptile(alone: bool, tmp_path: Path) -> None:
    """With and without it among the plug-ins, the branch is the same; interrupted and resumed too."""
    first = new_stage(tmp_path / "one", infinite(), ReptileCallback(every=2), replay_of_nothing(), **SAVES)
    extend(first).train()
    start = str(tmp_path / "one" / "checkpoint-6")

    def branch(name: str, *plugins: Any, **settings: Any) -> Trainer:
        return new_stage(tmp_path / name, *plugins, replay_of_nothing(), **{**SAVES, **settings})

    # `extend` alone knows of the branch only once it resumes.
    every = 2 if alone else 500
    plain, aside = branch("plain"), branch("aside", ReptileCallback(every=every))
    anneal(plain, start, steps=6).train()
    anneal(aside, start, steps=6).train()
    assert tiny.same_weights(plain, aside) and same_moments(plain, aside)
    assert not any("reptile" in key for line in aside.state.log_history for key in line)
    resumed = branch("aside", ReptileCallback(every=every))
    resumed = extend(resumed) if alone else anneal(resumed, start, steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "aside" / "checkpoint-2"))
    assert tiny.same_weights(plain, resumed) and same_moments(plain, resumed)
    assert read_stages(tmp_path / "aside")[-1].kind == "anneal"  # type: ignore[index]


def test_the_report_shows_the_stages_before(english: Path, tmp_path: Path) -> None:
    from hf_pretrain_ext.report.html import report

    replay = ReplayCallback(from_history=True, ratio=0.25, data={"stage-1": tiny.rows(40)})
    stage = new_stage(tmp_path / "two", infinite(), replay, max_steps=4)
    continue_from(stage, last(english), name="german").train()
    page = report([english / "run", tmp_path / "two"], tmp_path / "page.html").read_text()
    table = page[page.index("Stages before") :]
    for words in ("stage-1", "german 75.0%, stage-1 25.0%", "0.0055", "constant", "What each stage read, in tokens"):
        assert words in table
    assert "Stages before" not in report([english / "run"], tmp_path / "one.html").read_text()


def test_a_model_of_the_hub(english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub's client puts into its cache is read from there, and the commit is recorded."""
    commit = "89abcdef" * 5
    loaded(last(english)).save_pretrained(tmp_path / "snapshots" / commit)
    asked: list[Any] = []

    def download(name: str, **given: Any) -> str:
        asked.append((name, given["revision"]))
        assert not any("bin" in pattern or "pt" in pattern.split(".") for pattern in given["allow_patterns"])
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    stage = continue_from(new_stage(tmp_path / "a"), "org/model", revision="v1")
    assert asked == [("org/model", "v1")]
    expected = loaded(last(english)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(stage).items())
    stage.train()
    base = read_stages(tmp_path / "a")[0].base  # type: ignore[index]
    assert base is not None and (base["path"], base["revision"]) == ("org/model", commit)


def test_data_that_the_trainer_prepares_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL: rows that were tokenized in the first stage are opened as they were; raw ones by name give the same."""
    from trl import SFTConfig, SFTTrainer

    def texts(name: str, seed: int) -> Any:
        tiny.documents(60, seed=seed).remove_columns("url").save_to_disk(tmp_path / name)
        return load_from_disk(tmp_path / name)

    def trainer(folder: str, data: Any, *callbacks: Any) -> Trainer:
        args = SFTConfig(
            str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=2,
            packing=True,
            packing_strategy="wrapped",
            max_length=16,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_steps=4,
        )
        return SFTTrainer(
            model=tiny.model(),
            args=args,
            train_dataset=data,
            processing_class=tiny.tokenizer(),
            callbacks=[*callbacks],
        )

    english, german = texts("english", 1), texts("german", 2)
    extend(trainer("one", english, RewarmCallback(1e-2, warmup=1))).train()
    opened = trainer("two", german, ReplayCallback(from_history=True, ratio=0.5))
    named = trainer("three", german, ReplayCallback(from_history=True, ratio=0.5, data={"stage-1": english}))
    for stage in (opened, named):
        continue_from(stage, str(tmp_path / "one" / "checkpoint-4")).train()
        assert stage.plugin_run.realised()["stage-1"]["samples"] == 4
    assert tiny.same_weights(opened, named)
    assert "has other rows" not in capsys.readouterr().err


def test_the_history_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    """With `load_best_model_at_end`, what lies in the output folder ends where the best checkpoint does."""
    trainer = extend(
        new_stage(
            tmp_path,
            held_out(),
            RewarmCallback(0.5, warmup=1),
            **{**SAVES, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.rows(4, seed=2)},
            load_best_model_at_end=True,
            metric_for_best_model="eval_old_loss",
            greater_is_better=True,  # it is highest first
        )
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best is not None and best < trainer.state.global_step == STEPS
    stages = read_stages(tmp_path)
    assert stages is not None and stages[-1].steps == best
    assert stages == read_stages(tmp_path / f"checkpoint-{best}")


# Slips that used to go through


def llama(**settings: Any) -> Any:
    config = copy.deepcopy(tiny.model().config)
    config.update(settings)
    return type(tiny.model())(config)


def test_weights_of_their_own_do_not_load_into_tied_ones(english: Path, tmp_path: Path) -> None:
    apart = llama(tie_word_embeddings=False)
    apart.save_pretrained(tmp_path / "apart")
    tied = llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"weights of their own for .*tie_word_embeddings=False"):
        continue_from(new_stage(tmp_path / "two", model=tied), str(tmp_path / "apart"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tied.state_dict().items())
    # Stored twice, and the same both times: nothing is lost.
    state = {**before, "lm_head.weight": before["model.embed_tokens.weight"].clone()}
    torch.nn.init.zeros_(tied.model.embed_tokens.weight)
    from hf_pretrain_ext.loading import load_weights

    load_weights(tied, state, "a state")
    assert torch.equal(tied.lm_head.weight, before["model.embed_tokens.weight"])


def test_another_configuration_is_said(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    continue_from(new_stage(tmp_path / "same"), last(english))
    assert "says otherwise" not in capsys.readouterr().err
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    continue_from(new_stage(tmp_path / "other", model=other), last(english))
    said = capsys.readouterr().err
    assert "config.json of " in said and "rope_theta" in said and "500000.0 here" in said


def test_a_folder_that_holds_another_stage(english: Path, tmp_path: Path) -> None:
    one = extend(new_stage(tmp_path / "out", infinite(), replay_of_nothing(), **SAVES))
    one.train()
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of the stage 'stage-1', with whose checkpoints"):
        continue_from(one, one.model, name="german")
    assert (tmp_path / "out" / "checkpoint-6").is_dir()
    # A script that begins its stage again, to resume it, is no other stage.
    for _ in range(2):
        two = continue_from(new_stage(tmp_path / "two", infinite(), **SAVES), last(english), name="german")
        two.train()


@pytest.mark.parametrize("told_again", [False, True])
@pytest.mark.parametrize("init", [False, True])
def test_an_adapter_resumes_on_the_weights_that_it_was_on(
    told_again: bool, init: bool, english: Path, tmp_path: Path
) -> None:
    """Its checkpoints hold the adapter alone: begun again, the stage loads what is below; else it is refused."""
    from peft import LoraConfig

    from hf_pretrain_ext.callbacks import GradNormLoRPCallback

    def made(folder: Path, steps: int) -> Trainer:
        adapter = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"])
        plugins = (RewarmCallback(1e-2, schedule="linear", warmup=1), GradNormLoRPCallback(4, adapter=adapter))
        given = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "max_grad_norm": 0}
        trainer = new_stage(folder, *plugins, **given)
        if init:
            trainer = Trainer(
                model_init=lambda: tiny.model(),
                args=trainer.args,
                train_dataset=trainer.train_dataset,
                data_collator=trainer.data_collator,
                callbacks=[*plugins],
            )
        return trainer

    whole = continue_from(made(tmp_path / "whole", 6), last(english), name="adapted")
    whole.train()
    again = made(tmp_path / "whole", 6)
    if told_again:
        continue_from(again, last(english), name="adapted")
    else:
        extend(again)
    there = str(tmp_path / "whole" / "checkpoint-3")
    if not told_again:
        with pytest.raises(CheckpointError, match=r"other weights here than when it was saved.*continue_from"):
            again.train(resume_from_checkpoint=there)
        return
    again.train(resume_from_checkpoint=there)
    assert tiny.same_weights(whole, again)


def test_a_checkpoint_of_the_hub_comes_without_its_moments(
    english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploaded whole, fetched by the patterns that are asked for."""
    from fnmatch import fnmatch

    there = tmp_path / "snapshots" / ("0123abcd" * 5)

    def fetched(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        def left(folder: str, names: list[str]) -> list[str]:
            inside = [n for n in names if (Path(folder) / n).is_file()]
            rel = {n: (Path(folder) / n).relative_to(last(english)).as_posix() for n in inside}
            return [n for n in inside if not any(fnmatch(rel[n], pattern) for pattern in allow_patterns)]

        shutil.copytree(last(english), there, ignore=left, dirs_exist_ok=True)
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    stage = continue_from(new_stage(tmp_path / "two", infinite()), "me/english", name="german")
    assert not (there / "optimizer.pt").exists()
    assert rates_of_first_step(stage) == CONST
    with pytest.raises(CheckpointError, match=r"fetched without its moments.*snapshot_download"):
        continue_from(new_stage(tmp_path / "three", infinite()), "me/english", carry=("weights", "optimizer"))
    damage = there / "hf_pretrain_ext" / "state.json"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(there))
    damage.write_text(damage.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        continue_from(new_stage(tmp_path / "four", infinite()), "me/english")


def rates_of_first_step(trainer: Trainer) -> float:
    trainer.train()
    return rates(trainer)[0]


def test_a_stage_has_no_name_of_what_it_replays(english: Path, tmp_path: Path) -> None:
    replay = ReplayCallback({"wiki": tiny.rows(20, seed=5)}, ratio=0.25)
    with pytest.raises(ValueError, match="name='wiki' is also that of data that the stage replays"):
        continue_from(new_stage(tmp_path, RewarmCallback(1e-2), replay), last(english), name="wiki")


def test_a_model_object_and_where_it_is_from(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded(str(english / "run"))
    with pytest.raises(ValueError, match="revision='main' is for a name on the Hub"):
        continue_from(new_stage(tmp_path / "a", model=model), model, revision="main")
    continue_from(new_stage(tmp_path / "b", model=model), model)
    assert "has a history, which a model object does not bring" in capsys.readouterr().err
    fresh = tiny.model()
    continue_from(new_stage(tmp_path / "c", model=fresh), fresh)
    assert "its card was not looked for" in capsys.readouterr().err


def test_the_working_folder_may_change_before_train(
    english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(english / "run")
    stage = new_stage(tmp_path / "out", infinite())
    continue_from(stage, "checkpoint-6", carry=("weights", "optimizer"))
    monkeypatch.chdir(tmp_path)
    stage.train()
    assert stage.state.global_step == 5


def test_where_a_stage_began_is_its_own(tmp_path: Path) -> None:
    """Carried moments bring no anchor of the stage before: the distance is from where this one began."""
    from hf_pretrain_ext.callbacks import L2InitCallback

    made = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6, "weight_decay": 0.0, "logging_steps": 1}
    first = extend(new_stage(tmp_path / "one", RewarmCallback(1e-2), L2InitCallback(0.1), **made))
    first.train()
    second = new_stage(tmp_path / "two", RewarmCallback(1e-2), L2InitCallback(0.1), **made)
    continue_from(second, str(tmp_path / "one" / "checkpoint-6"), carry=("weights", "optimizer"))
    began = {name: tensor.clone() for name, tensor in second.model.named_parameters()}
    second.train()
    moved = sum(
        float((p.detach() - began[name]).double().square().sum()) for name, p in second.model.named_parameters()
    )
    told = [line["l2_init_distance"] for line in second.state.log_history if "l2_init_distance" in line]
    assert told[-1] == pytest.approx(moved**0.5, rel=1e-4)


@pytest.mark.parametrize("carry", [None, 3])
def test_carry_of_another_kind(carry: Any, english: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carry must be"):
        continue_from(new_stage(tmp_path), last(english), carry=carry)
