"""Stages that are refused, interrupted, repeated, moved or put on other weights: what is known of them afterwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, load_from_disk
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import PackedCollator, PluginError, anneal, continue_from, extend
from hf_pretrain_ext.callbacks import GradNormLoRPCallback, MetadataCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError, last_complete_checkpoint
from hf_pretrain_ext.plan import SamplePlan, Segment, Source
from hf_pretrain_ext.plugin import TrainerPlugin
from hf_pretrain_ext.stages import SeenSource, Stage, life_of, read_stages, schedule_record

STEPS = 6
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
CONST = 5.5e-3


class StopAt(TrainerCallback):
    """An interruption by hand at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def infinite() -> RewarmCallback:
    return RewarmCallback(1e-2, schedule="infinite_cosine", warmup=1, cooldown=2, constant=10, total_steps=20)


def plan_only() -> ReplayCallback:
    return ReplayCallback(tiny.rows(4, seed=3), ratio=0, allow_no_effect=True)


def on_disk(folder: Path, number: int = 40, seed: int = 0) -> Any:
    tiny.rows(number, seed=seed).save_to_disk(folder)
    return load_from_disk(folder)


def trained(folder: Path, *plugins: Any, **given: Any) -> Trainer:
    trainer = extend(tiny.trainer(folder, *(plugins or (infinite(), plan_only())), **{**SAVES, **given}))
    trainer.train()
    return trainer


def told(folder: Path) -> list[tuple[Any, ...]]:
    return [(s.number, s.name, s.steps, s.samples) for s in read_stages(folder) or ()]


def rates(trainer: Trainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


# Refused and interrupted


def test_a_refused_resume_leaves_nothing_behind(tmp_path: Path) -> None:
    """The next train() is the first stage that it would have been, at rates that warm up, bit for bit."""
    trained(tmp_path / "one", data=on_disk(tmp_path / "rows"))
    later = tiny.trainer(tmp_path / "two", infinite(), plan_only(), data=tiny.rows(40, seed=8), **SAVES)
    continue_from(later, str(tmp_path / "one" / "checkpoint-6"), name="german").train()
    used = extend(tiny.trainer(tmp_path / "used", infinite(), plan_only(), data=tiny.rows(40, seed=9), **SAVES))
    with pytest.raises(CheckpointError, match="the run would not be the one that was interrupted"):
        used.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    used.save_model(str(tmp_path / "nothing"))
    assert read_stages(tmp_path / "nothing") is None
    used.train()
    fresh = trained(tmp_path / "fresh", data=tiny.rows(40, seed=9))
    assert tiny.same_weights(fresh, used) and rates(used) == rates(fresh) and rates(used)[0] == 0
    assert told(tmp_path / "used") == [(1, "stage-1", 6, 24)]


def test_a_refused_resume_after_a_training_leaves_that_training(tmp_path: Path) -> None:
    trained(tmp_path / "one", data=tiny.rows(40, seed=1))
    used = trained(tmp_path / "two", data=tiny.rows(40, seed=2))
    with pytest.raises(CheckpointError, match="the run would not be"):
        used.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    used.save_model(str(tmp_path / "saved"))
    assert told(tmp_path / "saved") == [(1, "stage-1", 6, 24)]
    used.train()
    assert told(tmp_path / "two") == [(1, "stage-1", 6, 24), (2, "stage-2", 6, 24)]


@pytest.mark.parametrize("how", ["saved", "trained again", "continued"])
def test_an_interrupted_stage_has_read_what_it_read(how: str, tmp_path: Path) -> None:
    """Nothing was logged or saved before the interruption after step 5: counts are gathered afterwards."""

    quiet = {"logging_steps": 100, "save_strategy": "no"}
    stop = StopAt(5)
    trainer = extend(tiny.trainer(tmp_path / "one", infinite(), plan_only(), stop, **{**SAVES, **quiet}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    if how == "saved":
        trainer.save_model(str(tmp_path / "rescued"))
        assert told(tmp_path / "rescued") == [(1, "stage-1", 5, 20)]
        return
    if how == "continued":
        trainer.args.output_dir = str(tmp_path / "two")
        continue_from(trainer, trainer.model)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert told(folder) == [(1, "stage-1", 5, 20), (2, "stage-2", 6, 24)]


# Again and again


def test_a_second_train_without_plug_ins_has_fresh_moments(tmp_path: Path) -> None:
    trained(tmp_path / "one")
    trainer = continue_from(tiny.trainer(tmp_path / "two", **SAVES), str(tmp_path / "one" / "checkpoint-6"))
    for _ in range(2):
        trainer.train()
        steps = {float(held["step"]) for held in trainer.optimizer.state_dict()["state"].values()}
        assert steps == {6.0}


def test_a_second_train_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told what mixes, and a resume takes the newest stage, whose steps are fewer."""
    trainer = trained(tmp_path / "one")
    stop = StopAt(5)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (
        "holds checkpoint-6 of an earlier stage. A second train() counts its steps from 0" in capsys.readouterr().err
    )
    trainer.remove_callback(stop)
    newest, _ = last_complete_checkpoint(tmp_path / "one")
    assert newest == tmp_path / "one" / "checkpoint-4"
    trainer.train(resume_from_checkpoint=True)
    assert trainer.plugin_run.resumed_at == 4
    assert told(tmp_path / "one") == [(1, "stage-1", 6, 24), (2, "stage-2", 6, 24)]


def test_two_branches_do_not_mix(tmp_path: Path) -> None:
    """Of the same name, from different checkpoints of a stage."""
    trained(tmp_path / "one")
    branch = tiny.trainer(tmp_path / "branch", **SAVES)
    anneal(branch, str(tmp_path / "one" / "checkpoint-4"), steps=4).train()
    with pytest.raises(ValueError, match="of another stage 'anneal-2', begun otherwise"):
        anneal(tiny.trainer(tmp_path / "branch", **SAVES), str(tmp_path / "one" / "checkpoint-6"), steps=3)
    # The same branch begun again is the same.
    anneal(tiny.trainer(tmp_path / "branch", **SAVES), str(tmp_path / "one" / "checkpoint-4"), steps=4)


def test_a_history_ahead_of_the_weights_beside_it(tmp_path: Path) -> None:
    """Training ended after the weights in its folder were saved: these are not of that stage."""
    trainer = trained(tmp_path / "one")
    trainer.save_model()
    trainer.train()
    with pytest.raises(
        CheckpointError, match=r"weights that were saved before the training .*checkpoint-6; to continue"
    ):
        continue_from(tiny.trainer(tmp_path / "two", **SAVES), str(tmp_path / "one"))
    trainer.save_model()
    new = continue_from(tiny.trainer(tmp_path / "two", **SAVES), str(tmp_path / "one"))
    assert [stage.name for stage in new.plugin_run.beginning.earlier] == ["stage-1", "stage-2"]
    # Weights that were saved by other means after training are newer than the history.
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "one")
    new = continue_from(tiny.trainer(tmp_path / "three", **SAVES), str(tmp_path / "one"))
    assert [stage.name for stage in new.plugin_run.beginning.earlier] == ["stage-1", "stage-2", "stage-3"]


def test_the_best_weights_have_the_history_of_their_checkpoint(tmp_path: Path) -> None:
    """Going on in the same process too: the schedule stood in its cool-down there, not in the constant phase."""
    trainer = extend(
        tiny.trainer(
            tmp_path / "one",
            infinite(),
            plan_only(),
            eval_dataset=tiny.rows(8, seed=77),
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_runtime",
            greater_is_better=True,
            **SAVES,
        )
    )
    evaluate = trainer.evaluate

    def worse(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(*args, **kwargs), "eval_runtime": 10.0 - trainer.state.global_step}

    trainer.evaluate = worse  # type: ignore[method-assign]
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    best = read_stages(tmp_path / "one" / "checkpoint-2")
    trainer.save_model()
    assert read_stages(tmp_path / "one") == best
    trainer.args.output_dir = str(tmp_path / "two")
    continue_from(trainer, trainer.model)
    last = trainer.plugin_run.beginning.last
    assert last is not None and (last.steps, last.samples, last.phase) == (2, 8, "cool-down")
    assert last.constant_rate is None


def test_a_model_of_another_trainer_brings_its_history(tmp_path: Path) -> None:
    first = trained(tmp_path / "one")
    second = continue_from(tiny.trainer(tmp_path / "two", infinite(), plan_only(), **SAVES), first.model)
    assert [(s.name, s.steps) for s in second.plugin_run.beginning.earlier] == [("stage-1", 6)]
    assert tiny.same_weights(first, second)


def test_a_model_of_the_hub_brings_its_revision(tmp_path: Path) -> None:
    model = tiny.model()
    model.config._commit_hash = "c" * 40
    model.name_or_path = model.config._name_or_path = "someone/something"
    stage = continue_from(tiny.trainer(tmp_path, **SAVES), model).plugin_run.beginning.earlier[0]
    assert stage.base is not None and stage.base["revision"] == "c" * 40


# Other weights below an adapter


def test_an_adapter_goes_on_over_the_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    """Full training, then an adapter, then one more stage of it: the script's own base is not that of the second."""

    def adapter() -> GradNormLoRPCallback:
        return GradNormLoRPCallback(4, adapter={"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]})

    saves = {**SAVES, "max_grad_norm": 0}
    trained(tmp_path / "one")
    parent = str(tmp_path / "one" / "checkpoint-6")
    continue_from(tiny.trainer(tmp_path / "two", adapter(), **saves), parent, name="adapted").train()
    child = str(tmp_path / "two" / "checkpoint-6")
    third = tiny.trainer(tmp_path / "three", adapter(), **saves)
    with pytest.raises(CheckpointError, match="the weights below it are others here") as refusal:
        continue_from(third, child)
    assert f"that stage began with {parent}" in str(refusal.value)
    right = tiny.trainer(tmp_path / "four", adapter(), model=type(tiny.model()).from_pretrained(parent), **saves)
    continue_from(right, child)
    below = {name.replace(".base_layer", ""): value for name, value in right.model.get_base_model().named_parameters()}
    saved = type(tiny.model()).from_pretrained(parent).state_dict()
    assert all(torch.equal(below[name], saved[name]) for name in ("model.embed_tokens.weight",))
    assert torch.equal(
        below["model.layers.0.self_attn.q_proj.weight"], saved["model.layers.0.self_attn.q_proj.weight"]
    )


# What is replayed


def test_stages_replay_other_rows_each_and_only_such_as_were_read(tmp_path: Path) -> None:
    """400 rows, of which the first stage reads 24: each later stage replays 12 of those, in an order of its own."""
    big = on_disk(tmp_path / "big", 400, seed=70)
    first = trained(tmp_path / "one", data=big)
    plan = first.plugin_run.plan
    assert plan is not None
    read = {tuple(big[int(row)]["input_ids"]) for row in plan.draws(0, 24).row}
    assert len(read) == 24
    parent, replayed = tmp_path / "one", []
    for number, name in enumerate(("two", "three", "four")):
        replay = ReplayCallback(from_history=True, ratio=0.5)
        data = on_disk(tmp_path / f"rows-{name}", seed=80 + number)
        stage = continue_from(
            tiny.trainer(tmp_path / name, infinite(), replay, data=data, **SAVES),
            str(parent / "checkpoint-6"),
            name=name,
        )
        stage.train()
        parent, plan = tmp_path / name, stage.plugin_run.plan
        assert plan is not None
        k = [source.name for source in plan.sources].index("stage-1")
        drawn = plan.draws(0, 24)
        rows = [tuple(plan.sources[k].dataset[int(row)]["input_ids"]) for row in drawn.row[drawn.source == k]]
        assert rows and set(rows) <= read
        replayed.append(rows)
    shortest = min(map(len, replayed))
    assert len({tuple(rows[:shortest]) for rows in replayed}) == 3


def test_the_order_of_the_first_visit(tmp_path: Path) -> None:
    """`order="original"`: Ibrahim et al. replay the old data as it was read."""
    rows = on_disk(tmp_path / "rows")
    first = trained(tmp_path / "one", data=rows)
    replay = ReplayCallback(from_history=True, ratio=0.5, order="original")
    second = tiny.trainer(tmp_path / "two", infinite(), replay, data=tiny.rows(40, seed=8), **SAVES)
    continue_from(second, str(tmp_path / "one" / "checkpoint-6")).train()
    assert first.plugin_run.plan is not None and second.plugin_run.plan is not None
    read, drawn = first.plugin_run.plan.draws(0, 24).row, second.plugin_run.plan.draws(0, 24)
    old = second.plugin_run.plan.sources[1]
    numbers = drawn.row[drawn.source == 1]
    assert old.name == "stage-1" and numbers.tolist() == list(range(12))
    assert old.dataset["input_ids"][:12] == rows.select(read[:12])["input_ids"][:]


def test_a_stage_behind_metadata_is_one_source_that_is_passed_as_plain_rows(tmp_path: Path) -> None:
    texts = {"text": [f"{n:03d} {'lorem ipsum ' * (1 + n % 3)}" for n in range(200)]}

    def metadata(name: str, *plugins: Any) -> Trainer:
        Dataset.from_dict({**texts, "url": [f"https://a.io/{name}/{n}" for n in range(200)]}).save_to_disk(
            tmp_path / name
        )
        view = MetadataCallback(template="{domain} ", block_size=32, cooldown=0.25)
        return tiny.trainer(
            tmp_path / f"run-{name}",
            infinite(),
            view,
            *plugins,
            data=load_from_disk(tmp_path / name),
            data_collator=PackedCollator(),
            processing_class=tiny.tokenizer(),
            **SAVES,
        )

    extend(metadata("one")).train()
    stages = read_stages(tmp_path / "run-one")
    assert stages is not None
    [source] = stages[-1].sources
    assert (source.name, source.samples, source.tokens, source.place) == ("stage-1", 24, 24 * 32, None)
    parent = str(tmp_path / "run-one" / "checkpoint-6")
    with pytest.raises(
        PluginError, match=r"'stage-1': it was not read from files of its own .*data=\{'stage-1': \.\.\.\}"
    ):
        continue_from(metadata("two", ReplayCallback(from_history=True, ratio=0.25)), parent)
    plain = Dataset.from_dict(texts)
    told_by_name = ReplayCallback(from_history=True, ratio=0.25, data={"stage-1": plain})
    second = continue_from(metadata("two", told_by_name), parent, name="german")
    second.train()
    shares = {name: entry["samples"] for name, entry in second.plugin_run.realised().items()}
    assert shares["stage-1"] == 6 and sum(shares.values()) == 24
    assert [s.name for s in (read_stages(tmp_path / "run-two") or ())[-1].sources] == ["german", "stage-1"]


def test_a_stand_in_for_a_base_says_nothing_of_its_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once replayed, it is no measure of what the base read: it has to be passed, with its weight, at every stage."""
    tiny.model().save_pretrained(tmp_path / "base")
    stand_in = {"base": on_disk(tmp_path / "stand-in", seed=50)}
    first = tiny.trainer(
        tmp_path / "one",
        infinite(),
        ReplayCallback(from_history=True, ratio=0.25, data=stand_in),
        data=on_disk(tmp_path / "german", seed=1),
        **SAVES,
    )
    continue_from(first, str(tmp_path / "base"), name="german").train()
    parent = str(tmp_path / "one" / "checkpoint-6")

    def second(**given: Any) -> Trainer:
        replay = ReplayCallback(from_history=True, ratio=0.5, **given)
        return tiny.trainer(tmp_path / "two", infinite(), replay, data=tiny.rows(40, seed=8), **SAVES)

    capsys.readouterr()
    without = continue_from(second(), parent)
    assert [source.name for source in without.plugin_run.build_plan().sources] == ["train", "german"]  # type: ignore[union-attr]
    assert "nothing is replayed of what 'base' was trained on" in capsys.readouterr().err
    with pytest.raises(PluginError, match="how many tokens 'base' was trained on is not known"):
        continue_from(second(data=stand_in), parent)
    both = continue_from(second(data=stand_in, weights={"base": 3, "german": 1}), parent)
    assert both.plugin_run.build_plan().shares(0) == pytest.approx((0.5, 0.125, 0.375))  # type: ignore[union-attr]


def test_a_branch_on_its_own_data_has_nothing_to_replay(tmp_path: Path) -> None:
    rows = on_disk(tmp_path / "rows")
    trained(tmp_path / "one", data=rows)
    branch = tiny.trainer(tmp_path / "two", ReplayCallback(from_history=True, ratio=0.25), data=rows, **SAVES)
    with pytest.raises(PluginError, match=r"all that earlier stages read is the training data itself \('stage-1'\)"):
        anneal(branch, str(tmp_path / "one" / "checkpoint-6"), steps=4)


# Where things are


def test_the_newest_place_of_the_same_rows() -> None:
    old, new = ({"files": [path], "start": 0, "rows": 40} for path in ("/old/x.arrow", "/new/x.arrow"))
    first = Stage(1, "pile", sources=(SeenSource("pile", 40, "abc", samples=10, tokens=10, place=old),))
    again = SeenSource("pile", 40, "abc", replayed=True, samples=5, tokens=5, place=new)
    second = Stage(2, "slim", sources=(again,), recorded={"replay": {"from_history": ["pile"]}})
    assert life_of([first, second])["pile"].place == new
    third = Stage(3, "more", sources=(SeenSource("pile", 40, "abc", samples=1, tokens=1),))
    assert life_of([first, second, third])["pile"].place == new


def test_the_parent_of_a_branch_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(Path("one"))
    anneal(tiny.trainer("deploy", **SAVES), "one/checkpoint-6", steps=4).train()  # type: ignore[arg-type]
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    branch = str(tmp_path / "deploy" / "checkpoint-4")
    capsys.readouterr()
    continue_from(tiny.trainer(tmp_path / "a", infinite(), **SAVES), branch)
    where = tmp_path / "one" / "checkpoint-6"
    assert f"The newest checkpoint before its anneal is {where}" in capsys.readouterr().err
    shutil.rmtree(where)
    continue_from(tiny.trainer(tmp_path / "b", infinite(), **SAVES), branch)
    assert "The checkpoint that it branched from, one/checkpoint-6, is not there" in capsys.readouterr().err


def test_a_script_whose_parent_is_gone_is_told_how_to_finish(tmp_path: Path) -> None:
    trained(tmp_path / "one")
    parent = str(tmp_path / "one" / "checkpoint-6")

    def stage() -> Trainer:
        return tiny.trainer(tmp_path / "two", infinite(), plan_only(), data=tiny.rows(40, seed=8), **SAVES)

    continue_from(stage(), parent).train()
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    shutil.rmtree(parent)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is of, leave continue_from out") as refusal:
        continue_from(stage(), parent)
    assert "train(resume_from_checkpoint=True)" in str(refusal.value)
    resumed = extend(stage())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plugin_run.resumed_at == 4
    assert [name for _, name, *_ in told(tmp_path / "two")] == ["stage-1", "stage-2"]


@pytest.mark.parametrize(
    ("function", "annealed"),
    [(lambda step: 1e-3 * (1 - step / 100), True), (lambda step: 1e-3, False)],
    ids=["to 1 %", "constant"],
)
def test_functions_that_came_down_count_as_annealed(function: Any, annealed: bool) -> None:
    schedule = RewarmCallback(schedule=function).schedule(tiny.arguments("unused"), 100)
    assert schedule is not None
    assert Stage(1, "a", schedule=schedule_record(schedule, 99)).annealed == annealed


def test_the_last_steps_of_a_decay_count_as_annealed() -> None:
    schedule = RewarmCallback(1e-3, warmup=10, min_lr="10%").schedule(tiny.arguments("unused"), 1000)
    assert schedule is not None
    ended = {step: Stage(1, "a", schedule=schedule_record(schedule, step)).annealed for step in (500, 990, 1000)}
    assert ended == {500: False, 990: True, 1000: True}


def test_only_weights_that_lay_there_before_are_older(tmp_path: Path) -> None:
    """By their content: files are copied, and come from the Hub, in any order and with times of their own."""
    trainer = trained(tmp_path / "one")
    path = tmp_path / "one" / "stages.json"
    assert "older_weights" not in json.loads(path.read_text())
    # As `push_to_hub` saves.
    trainer.save_model(_internal_call=True)
    (tmp_path / "copy").mkdir()
    for file in sorted((tmp_path / "one").iterdir(), reverse=True):
        if file.is_file():
            shutil.copyfile(file, tmp_path / "copy" / file.name)
    for number, folder in enumerate(("one", "copy")):
        new = continue_from(tiny.trainer(tmp_path / f"new-{number}", **SAVES), str(tmp_path / folder))
        assert [stage.steps for stage in new.plugin_run.beginning.earlier] == [6]
    trainer.train()
    assert json.loads(path.read_text())["older_weights"].keys() == {"model.safetensors"}
    with pytest.raises(CheckpointError, match="weights that were saved before the training"):
        continue_from(tiny.trainer(tmp_path / "new", **SAVES), str(tmp_path / "one"))


def test_a_history_is_that_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """Of a model object: trained on by a bare Trainer, or loaded with others, it is not what its stage left behind."""
    first = trained(tmp_path / "one")
    model = first.model
    bare = tiny.trainer(tmp_path / "bare", model=model, **SAVES)
    bare.train()
    new = continue_from(tiny.trainer(tmp_path / "two", **SAVES), model)
    assert [stage.kind for stage in new.plugin_run.beginning.earlier] == ["unknown"]
    loaded = continue_from(
        tiny.trainer(tmp_path / "three", model=model, **SAVES), str(tmp_path / "one" / "checkpoint-4")
    )
    again = continue_from(tiny.trainer(tmp_path / "four", **SAVES), loaded.model)
    assert [(stage.name, stage.steps) for stage in again.plugin_run.beginning.earlier] == [("stage-1", 4)]


def test_an_interrupted_stage_of_another_trainer(tmp_path: Path) -> None:
    first = trained(tmp_path / "one")
    stop = StopAt(5)
    second = tiny.trainer(tmp_path / "two", infinite(), plan_only(), stop, model=first.model, **SAVES)
    continue_from(second, first.model, name="german")
    with pytest.raises(KeyboardInterrupt):
        second.train()
    third = continue_from(tiny.trainer(tmp_path / "three", **SAVES), second.model)
    assert [(stage.name, stage.steps) for stage in third.plugin_run.beginning.earlier] == [
        ("stage-1", 6),
        ("german", 5),
    ]


def test_data_that_is_exchanged_after_an_interruption(tmp_path: Path) -> None:
    """The stage is told of as it was, with the data that it read."""
    stop = StopAt(5)
    trainer = extend(tiny.trainer(tmp_path / "one", infinite(), stop, **SAVES))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train_dataset = tiny.rows(400, seed=9)
    trainer.train()
    assert [stage.sources[0].rows for stage in read_stages(tmp_path / "one") or ()] == [40, 400]


def test_without_plug_ins_nothing_changes(tmp_path: Path) -> None:
    """A second train() too goes on as the host's does, moments included."""
    bare, extended = tiny.trainer(tmp_path / "bare", **SAVES), extend(tiny.trainer(tmp_path / "extended", **SAVES))
    for trainer in (bare, extended):
        trainer.train()
        trainer.train()
    assert tiny.same_weights(bare, extended)


def test_an_optimizer_that_is_set_after_extend_is_the_users(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "one")
    made = torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
    trainer.optimizer = made
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", None) is made
    # Taken away again, the host makes one as ever.
    trainer.optimizer = None
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", None), torch.optim.AdamW)
    # One that a bare train() left is in the way of a plug-in that makes its own, and can be taken away.
    used = tiny.trainer(tmp_path / "two", **{**SAVES, "max_grad_norm": 0})
    used.train()
    with pytest.raises(PluginError, match=r"set trainer\.optimizer = None if a train"):
        extend(used, RewarmCallback(1e-2), GradNormLoRPCallback(4))
    used.optimizer = None
    extend(used, RewarmCallback(1e-2), GradNormLoRPCallback(4)).train()


def test_a_wrapper_without_a_name(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.config = model.config
            self.inner = model

    wrapper = Wrapper(tiny.model())
    wrapper.config._commit_hash = "c" * 40
    stage = continue_from(tiny.trainer(tmp_path, model=wrapper, **SAVES), wrapper).plugin_run.beginning.earlier[0]
    assert stage.base is not None and stage.base["revision"] is None and stage.base["path"] == "Wrapper"


def test_a_source_beside_the_training_data_is_one_of_its_own(tmp_path: Path) -> None:
    class Beside(TrainerPlugin):
        name = "beside"

        def wrap_plan(self, plan: SamplePlan, setup: Any) -> SamplePlan:
            code = Source("code", 30, dataset=tiny.rows(30, seed=4))
            return dataclasses.replace(plan, sources=(*plan.sources, code), segments=(Segment(0, (3, 1)),))

    trained(tmp_path, infinite(), Beside())
    [stage] = read_stages(tmp_path) or ()
    assert [(source.name, source.rows, source.samples) for source in stage.sources] == [
        ("stage-1", 40, 18),
        ("code", 30, 6),
    ]
    assert len({source.fingerprint for source in stage.sources}) == 2


def test_saving_after_a_training_that_could_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the stage before, whose plan had other sources, or none."""
    trainer = trained(tmp_path / "one", infinite())

    def broken(dataset: Any) -> str:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("hf_pretrain_ext.run.fingerprint", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            extend(trainer, plan_only()).train()
    trainer.save_model(str(tmp_path / "saved"))
    assert told(tmp_path / "saved") == [(1, "stage-1", 6, 24)]
