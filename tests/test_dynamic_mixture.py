"""`run.change_mixture`: a plug-in of the test's own changes the shares while the run goes on.

What is trained on is read off the model's inputs; rows name their source and number (see test_replay_mixtures.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_replay_mixtures import SavesInAStep, Watch, alike, make_with, pad, ragged_data
from transformers import TrainerCallback

from hf_pretrain_ext import TrainerPlugin, extend, read_trace
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.checkpoint import CheckpointError, read_state
from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.plan import tokens as tokens_module

Shares = dict[str, float]
BATCH = {"per_device_train_batch_size": 8}


class Shift(TrainerPlugin):
    """At the end of step `at`, asks for other shares, from the step named or from the earliest on."""

    name = "shift"
    changes_mixture = True

    def __init__(self, *changes: tuple[int, Shares, int | None]):
        self.changes = changes
        self.steps: list[int] = []
        self.handed_out: list[int] = []

    def begin(self) -> None:
        self.steps, self.handed_out = [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for at, shares, step in self.changes:
            if at == state.global_step:
                assert self.run is not None
                self.steps.append(self.run.change_mixture(shares, step=step))


class Alone(Shift):
    """Brings its own source, without ReplayCallback."""

    name = "alone"

    def wrap_plan(self, plan: SamplePlan, setup: Any) -> SamplePlan:
        old = alike("a", 20)
        return plan.with_source(Source("a", 20, replayed=True, dataset=old), 0.25)


class Saves(TrainerCallback):
    def __init__(self, *steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def replay() -> ReplayCallback:
    return ReplayCallback({"a": alike("a", 20), "b": alike("b", 30)}, ratio=0.5, weights={"a": 1, "b": 1})


def run(
    folder: Path,
    *plugins: Any,
    data: Any = None,
    resume: Path | None = None,
    saves: tuple[int, ...] = (),
    **given: Any,
) -> tuple[Any, Watch]:
    watch = Watch()
    given = {**BATCH, "max_steps": 10, **given}
    trainer = tiny.trainer(
        folder, *plugins, watch, Saves(*saves), data=alike("train", 60) if data is None else data, **given
    )
    trainer.data_collator = pad
    extend(trainer).train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, watch


def rows_of(watch: Watch, name: str) -> list[int]:
    return [row for source, row, _ in watch.all() if source == name]


def assert_nothing_lost(trainer: Any, watch: Watch) -> None:
    """The rows of every source, as they came, are those that it gives when it is drawn from alone."""
    plan = trainer.plugin_run.plan
    for source in plan.sources:
        rows = rows_of(watch, source.name)
        assert rows == SamplePlan((source,), seed=plan.seed).draws(0, len(rows)).row.tolist()
        number = source.num_rows
        passes = [rows[at : at + number] for at in range(0, len(rows), number)]
        assert all(len(set(one)) == len(one) for one in passes)


TO: Shares = {"train": 1, "a": 3, "b": 4}
BEFORE, AFTER = (4, 2, 2, 0), (1, 3, 4, 0)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"dataloader_num_workers": 2},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    {"max_steps": -1, "num_train_epochs": 2, "data": alike("train", 40)},
]
PERSISTENT: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": 5,
    "data": alike("train", 16),
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
}


@pytest.mark.parametrize(
    "options",
    # torch takes 5 s to end each persistent worker.
    [*OPTIONS, pytest.param(PERSISTENT, marks=pytest.mark.slow)],
    ids=lambda options: str({key: value for key, value in options.items() if key != "data"}),
)
def test_a_change_takes_effect_at_its_step(options: dict[str, Any], tmp_path: Path) -> None:
    """4, 2 and 2 of 8, from step 8 on 1, 3 and 4: for all workers, micro-batches and epochs."""
    shift = Shift((2, TO, 8))
    trainer, watch = run(tmp_path, replay(), shift, **options)
    assert shift.steps == [8]
    assert watch.counts() == [BEFORE] * 8 + [AFTER] * 2
    assert_nothing_lost(trainer, watch)
    plain, same = run(tmp_path / "plain", replay(), **options)
    assert [same.steps[step] for step in range(8)] == [watch.steps[step] for step in range(8)]
    assert same.counts() == [BEFORE] * 10 and not tiny.same_weights(plain, trainer)
    realised = trainer.plugin_run.realised()
    assert {name: entry["samples"] for name, entry in realised.items()} == {"train": 34, "a": 22, "b": 24}


def test_workers_do_not_matter_where_a_step_is_named(tmp_path: Path) -> None:
    """Rows and weights bit for bit without workers and with two; the rows with micro-batches too."""
    (first, watch), (second, other) = (
        run(tmp_path / str(n), replay(), Shift((2, TO, 8)), **OPTIONS[n]) for n in (0, 1)
    )
    assert watch.steps == other.steps and tiny.same_weights(first, second)
    assert run(tmp_path / "3", replay(), Shift((2, TO, 8)), **OPTIONS[3])[1].steps == watch.steps


def test_a_plugin_alone_may_bring_source_and_changes(tmp_path: Path) -> None:
    trainer, watch = run(tmp_path, Alone((3, {"train": 0.5, "a": 0.5}, 5), (6, {"train": 1, "a": 0}, 8)))
    assert watch.counts() == [(6, 2, 0, 0)] * 5 + [(4, 4, 0, 0)] * 3 + [(8, 0, 0, 0)] * 2
    assert_nothing_lost(trainer, watch)


def test_shares_are_in_any_scale_and_exact(tmp_path: Path) -> None:
    for number, shares in enumerate(({"b": 0.5, "a": 0.375, "train": 0.125}, {"train": 10, "a": 30, "b": 40})):
        _, watch = run(tmp_path / str(number), replay(), Shift((1, shares, 4)), max_steps=6)
        assert watch.counts() == [BEFORE] * 4 + [AFTER] * 2


def test_several_changes(tmp_path: Path) -> None:
    """Asked for at one step for different later ones, and again later; each begins from what the last left over."""
    changes = [(1, TO, 4), (1, {"train": 1, "a": 0, "b": 0}, 6), (6, {"train": 0, "a": 1, "b": 1}, 9)]
    trainer, watch = run(tmp_path, replay(), Shift(*changes), max_steps=11)
    assert watch.counts() == [BEFORE] * 4 + [AFTER] * 2 + [(8, 0, 0, 0)] * 3 + [(0, 4, 4, 0)] * 2
    assert_nothing_lost(trainer, watch)
    assert [(s.start, s.weights) for s in trainer.plugin_run.plan.segments] == [
        (0, (2, 1, 1)),
        (32, (1, 3, 4)),
        (48, (1, 0, 0)),
        (72, (0, 1, 1)),
    ]


def test_a_change_every_step_keeps_the_sum_of_all_shares(tmp_path: Path) -> None:
    """Shares that are no whole samples of 3: what is served stays within a sample and a half of what was asked."""
    asked = [{"train": 1 + n % 3, "a": 1 + n % 2, "b": n % 4} for n in range(30)]
    changes = [(n, asked[n], n + 3) for n in range(1, 27)]
    trainer, watch = run(tmp_path, replay(), Shift(*changes), max_steps=30, per_device_train_batch_size=3)
    wanted, got = [0.0] * 3, [0] * 3
    for step, counts in enumerate(watch.counts()):
        shares = asked[step - 3] if step >= 4 else {"train": 2, "a": 1, "b": 1}
        for k, share in enumerate(shares.values()):
            wanted[k] += 3 * share / sum(shares.values())
            got[k] += counts[k]
            assert abs(wanted[k] - got[k]) < 1.5, step
    assert_nothing_lost(trainer, watch)


# --- when --------------------------------------------------------------------------------------------


class Eager(Shift):
    """Also tries one step earlier than the earliest, which must be refused and change nothing."""

    refused = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.run is not None
        for at, shares, _ in self.changes:
            if at == state.global_step:
                before = self.run.plan
                probe = self.run.change_mixture(shares)
                self.steps.append(probe)
                after = self.run.plan
                for early in (probe, probe - 1, 0, -3):
                    with pytest.raises(ValueError, match=rf"step must be at least {probe + 1}.*got {early}"):
                        self.run.change_mixture(shares, step=early)
                assert self.run.plan is after and after is not before


@pytest.mark.parametrize(
    ("options", "earliest"),
    [
        ({}, 4),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 4),
        ({"dataloader_num_workers": 2}, None),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4}, None),
    ],
    ids=str,
)
def test_the_default_is_the_earliest_step(options: dict[str, Any], earliest: int | None, tmp_path: Path) -> None:
    """After step 3 one more micro-batch has been fetched; workers fetch more, and the change still is at the step."""
    shift = Eager((3, TO, None))
    trainer, watch = run(tmp_path, replay(), shift, max_steps=16, **options)
    (step,) = shift.steps
    assert step == earliest if earliest else 4 < step <= 10
    assert watch.counts() == [BEFORE] * step + [AFTER] * (16 - step)
    assert_nothing_lost(trainer, watch)


def test_a_step_that_was_handed_out_is_refused(tmp_path: Path) -> None:
    """Workers have fetched steps 3 to 7 or so when step 3 ends: named by number, before anything changes."""
    shift = Shift((3, TO, 4))
    with pytest.raises(ValueError, match=r"step must be at least \d+: earlier ones are handed out already; got 4"):
        run(tmp_path, replay(), shift, dataloader_num_workers=2)
    assert [s.start for s in shift.run.plan.segments] == [0]  # type: ignore[union-attr]
    assert [line["event"] for line in read_trace(tmp_path) if line["event"] == "mixture"] == []


def test_at_an_epochs_end_the_next_epoch_can_change(tmp_path: Path) -> None:
    """Epochs of 5 steps: all of the first is handed out at its end, none of the second."""
    for number, workers in enumerate((0, 2)):
        shift = Shift((5, TO, None))
        _, watch = run(
            tmp_path / str(number),
            replay(),
            shift,
            data=alike("train", 40),
            max_steps=-1,
            num_train_epochs=2,
            dataloader_num_workers=workers,
        )
        assert shift.steps == [5]
        assert watch.counts() == [BEFORE] * 5 + [AFTER] * 5


class Asks(TrainerPlugin):
    """Calls with what it is given, at an event of its own, and keeps what came of it."""

    name = "asks"
    changes_mixture = True

    def __init__(self, event: str, *shares: Shares, step: int | None = None):
        self.found: list[Any] = []

        def ask(*args: Any, **kwargs: Any) -> None:
            for one in shares:
                before = self.run.plan  # type: ignore[union-attr]
                try:
                    self.found.append(self.run.change_mixture(one, step=step))  # type: ignore[union-attr]
                except (ValueError, RuntimeError) as error:
                    self.found.append(str(error))
                    assert self.run.plan is before  # type: ignore[union-attr]

        setattr(self, event, ask)


WRONG_SHARES: list[tuple[Shares, str]] = [
    ({"train": 1}, "shares must name the sources ['train', 'a', 'b'], got ['train']"),
    ({"train": 1, "a": 1, "b": 1, "wiki": 1}, "got ['a', 'b', 'train', 'wiki']"),
    ({}, "shares must name the sources ['train', 'a', 'b'], got []"),
    ({"train": 1, "a": -1, "b": 1}, "shares must be non-negative and not all zero"),
    ({"train": 0, "a": 0, "b": 0}, "shares must be non-negative and not all zero"),
    ({"train": 1, "a": float("nan"), "b": 1}, "shares must be finite numbers, got nan"),
    ({"train": 1, "a": 1e-9, "b": 1}, "share number 1 is"),
]


def test_wrong_shares_are_named_and_change_nothing(tmp_path: Path) -> None:
    asks = Asks("on_epoch_begin", *(shares for shares, _ in WRONG_SHARES))
    _, watch = run(tmp_path, replay(), asks, max_steps=3)
    assert len(asks.found) == len(WRONG_SHARES)
    for found, (_, message) in zip(asks.found, WRONG_SHARES, strict=True):
        assert message in found
    assert watch.counts() == [BEFORE] * 3
    assert [line for line in read_trace(tmp_path) if line["event"] == "mixture"] == []


class Undeclared(Shift):
    changes_mixture = False


def test_what_is_not_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="by a plug-in with the class attribute changes_mixture = True"):
        run(tmp_path, replay(), Undeclared((2, TO, 5)))


def test_without_a_plan_or_a_run_there_is_nothing_to_change(tmp_path: Path) -> None:
    """Before training, and where no plug-in decides the order."""
    with pytest.raises(RuntimeError, match="while a run with a sample plan is training"):
        run(tmp_path / "a", Shift((2, {"train": 1}, 5)))
    trainer = extend(tiny.trainer(tmp_path / "b", replay(), Shift(), data=alike("train", 60)))
    with pytest.raises(RuntimeError, match="while a run with a sample plan is training"):
        trainer.plugin_run.change_mixture(TO)


def test_after_training_there_is_nothing_to_change(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, replay(), Shift(), max_steps=2)
    with pytest.raises(RuntimeError, match="while a run with a sample plan is training"):
        trainer.plugin_run.change_mixture(TO)


def test_the_earliest_step_names_the_segment_in_the_way(tmp_path: Path) -> None:
    """A ratio that is planned to change at step 6 stands before any change: the message must not blame the loader."""
    asks = Asks("on_epoch_begin", {"train": 1, "replay": 1}, step=3)
    plugin = ReplayCallback(alike("a", 20), ratio=0.25, ratio_changes={6: 0.5})
    _, watch = run(tmp_path, plugin, asks)
    assert "step must be at least 7" in asks.found[0] and "handed out" not in asks.found[0]
    assert watch.counts() == [(6, 2, 0, 0)] * 6 + [(4, 4, 0, 0)] * 4


def test_a_change_before_the_first_step(tmp_path: Path) -> None:
    """The mixture at draw 0 is the plan's own; from step 1 on all can change."""
    asks = Asks("on_train_begin", TO)
    trainer, watch = run(tmp_path, replay(), asks, max_steps=4)
    assert asks.found == [1] and watch.counts() == [BEFORE] + [AFTER] * 3
    assert_nothing_lost(trainer, watch)


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin"])
@pytest.mark.parametrize("step", [None, 2])
def test_a_resumed_run_cannot_change_what_it_trained_on(event: str, step: int | None, tmp_path: Path) -> None:
    """Before the first batch of a resume nothing has been handed out in this process, but four steps are made."""
    run(tmp_path, replay(), Asks("on_evaluate"), saves=(4,), max_steps=6)
    asks = Asks(event, TO, step=step)
    trainer, watch = run(tmp_path, replay(), asks, resume=tmp_path / "checkpoint-4", max_steps=6)
    if step is None:
        assert asks.found[0] >= 4
    else:
        assert "step must be at least" in asks.found[0]
    first = {name: entry["samples"] for name, entry in trainer.plugin_run.realised().items()}
    assert first == dict(zip(("train", "a", "b"), trainer.plugin_run.plan.counts(48).tolist(), strict=True))
    assert len(watch.all()) == 16


class Looks(Shift):
    """Takes a look at the training data through the trainer before it changes the mixture."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.run is not None
        next(iter(self.run.trainer.get_train_dataloader()))
        super().on_step_end(args, state, control, **kwargs)


def test_another_loader_does_not_take_the_change_away(tmp_path: Path) -> None:
    """A callback that asks for a loader of its own gets one; the mixture changes in the one that trains."""
    looks = Looks((2, TO, 5))
    _, watch = run(tmp_path, replay(), looks, max_steps=8)
    assert looks.steps == [5]
    assert watch.counts() == [BEFORE] * 5 + [AFTER] * 3


# --- resume and trace -------------------------------------------------------------------------------


def compare(whole: Any, watch: Watch, resumed: Any, rest: Watch, step: int) -> None:
    assert rest.steps == {at: rows for at, rows in watch.steps.items() if at >= step}
    assert tiny.same_weights(whole, resumed)
    assert resumed.plugin_run.realised() == whole.plugin_run.realised()
    assert resumed.plugin_run.plan.segments == whole.plugin_run.plan.segments


@pytest.mark.resume
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_around_a_change_is_exact(workers: int, tmp_path: Path) -> None:
    """Asked for after step 3 for step 8: checkpoints before the call, at it, between it and the change, at the change
    and after it; the last from a run that was itself resumed."""
    options: dict[str, Any] = {"dropout": 0.1, "dataloader_num_workers": workers, "logging_steps": 3}
    if workers:
        options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    changes = ((3, TO, 8), (7, {"train": 2, "a": 0, "b": 1}, 14))
    options["max_steps"] = 18
    whole, watch = run(tmp_path / "whole", replay(), Shift(*changes), **options)
    assert Counter(watch.counts()[:14]) == {BEFORE: 8, AFTER: 6}
    folder = tmp_path / "cut"
    saves = (2, 3, 5, 8, 10, 15)
    run(folder, replay(), Shift(*changes), saves=saves, **options)
    segments = {step: read_state(folder / f"checkpoint-{step}")["segments"] for step in saves}
    assert [len(segments[step]) for step in saves] == [0, 1, 1, 2, 2, 2]
    assert segments[3] == [[64, [1, 3, 4]]]
    for step in (3, 10) if workers else saves:
        cut = folder / f"checkpoint-{step}"
        resumed, rest = run(folder, replay(), Shift(*changes), resume=cut, saves=(15,), **options)
        compare(whole, watch, resumed, rest, step)
        events = [(line["step"], line["start"]) for line in read_trace(folder) if line["event"] == "mixture"]
        assert events == [(3, 8), (7, 14)]


class AtStepBegin(Shift):
    """Asks at the beginning of step `at` + 1, which is inside that step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.resume
def test_a_checkpoint_inside_the_step_that_changes_is_exact(tmp_path: Path) -> None:
    """SIGTERM saves inside a step that has just asked for a change: the resume makes that step, and asks, again."""
    options: dict[str, Any] = {"max_steps": 10, "dropout": 0.1}
    whole, watch = run(tmp_path / "whole", replay(), AtStepBegin((3, TO, 7)), **options)
    assert watch.counts() == [BEFORE] * 7 + [AFTER] * 3
    signal = SavesInAStep(3)
    cut = extend(make_with(tmp_path / "cut", replay(), alike("train", 60), signal, **{**BATCH, **options}))
    cut = extend(cut, AtStepBegin((3, TO, 7)))
    signal.trainer = cut
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed, rest = run(
        tmp_path / "on", replay(), AtStepBegin((3, TO, 7)), resume=tmp_path / "cut" / "checkpoint-3", **options
    )
    compare(whole, watch, resumed, rest, 3)


@pytest.mark.resume
def test_resume_of_the_earliest_step_is_exact_with_equal_workers(tmp_path: Path) -> None:
    """Default steps in a run that is cut after the call: the recorded step counts, not the loader that resumes."""
    options: dict[str, Any] = {"max_steps": 14, "dataloader_num_workers": 2}
    whole, watch = run(tmp_path / "cut", replay(), Shift((3, TO, None)), saves=(4, 9), **options)
    for step, workers in ((4, 0), (9, 1)):
        options["dataloader_num_workers"] = workers
        cut = tmp_path / "cut" / f"checkpoint-{step}"
        resumed, rest = run(tmp_path / str(step), replay(), Shift((3, TO, None)), resume=cut, **options)
        compare(whole, watch, resumed, rest, step)


@pytest.mark.resume
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_changes_in_tokens(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows in blocks of 16 draws: shares in tokens before and after, and every checkpoint leads on exactly."""
    monkeypatch.setattr(tokens_module, "_BLOCK", 16)
    data, old = ragged_data()

    def make() -> tuple[ReplayCallback, Shift]:
        plugin = ReplayCallback(old, ratio=0.25, unit="tokens", weights={"a": 2, "b": 3})
        return plugin, Shift((4, {"train": 1, "a": 2, "b": 1}, 20), (22, {"train": 3, "a": 0, "b": 1}, 30))

    options: dict[str, Any] = {"max_steps": 40, "per_device_train_batch_size": 4, "dataloader_num_workers": workers}
    folder = tmp_path / "cut"
    whole, watch = run(folder, *make(), data=data, saves=(3, 12, 20, 25, 36), **options)
    assert_nothing_lost(whole, watch)
    for first, last, shares in (
        (0, 20, {"train": 0.75, "a": 0.1, "b": 0.15}),
        (20, 30, {"train": 0.25, "a": 0.5, "b": 0.25}),
        (30, 40, {"train": 0.75, "a": 0.0, "b": 0.25}),
    ):
        tokens: Counter[str] = Counter()
        for step in range(first, last):
            for name, _, length in watch.steps[step]:
                tokens[name] += length
        total = sum(tokens.values())
        assert all(abs(tokens[name] - share * total) <= 2 * 24 for name, share in shares.items()), (first, tokens)
        assert tokens["a"] > 0 or first == 30
    for step in (12, 25) if workers else (3, 12, 20, 25, 36):
        cut = folder / f"checkpoint-{step}"
        resumed, rest = run(tmp_path / str(step), *make(), data=data, resume=cut, **options)
        compare(whole, watch, resumed, rest, step)
    cursors = {step: read_state(folder / f"checkpoint-{step}")["cursor"]["index"] for step in (3, 12, 20, 25, 36)}
    # The changed mixture is made again from the last block before the first change, at draw 80.
    assert cursors == {3: 0, 12: 48, 20: 64, 25: 64, 36: 64}


@pytest.mark.resume
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_changes_with_a_stream(workers: int, tmp_path: Path) -> None:
    """A stream of 90 rows as a source: none of them twice, and resumes on both sides of a change are exact."""

    def make() -> tuple[ReplayCallback, Shift]:
        stream = alike("b", 90).to_iterable_dataset(num_shards=3)
        plugin = ReplayCallback({"a": alike("a", 20), "b": stream}, ratio=0.5, weights={"a": 1, "b": 1})
        return plugin, Shift((2, TO, 8))

    options: dict[str, Any] = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "data": alike("train", 32),
        "dataloader_num_workers": workers,
    }
    folder = tmp_path / "cut"
    whole, watch = run(folder, *make(), saves=(3, 6, 9), **options)
    assert watch.counts() == [BEFORE] * 8 + [AFTER] * 4
    # The shards of one pass follow each other, so the stream gives its rows in order.
    assert rows_of(watch, "b") == list(range(8 * 2 + 4 * 4))
    for step in (3, 9) if workers else (3, 6, 9):
        resumed, rest = run(tmp_path / str(step), *make(), resume=folder / f"checkpoint-{step}", **options)
        compare(whole, watch, resumed, rest, step)


def test_the_change_is_in_the_trace(tmp_path: Path) -> None:
    run(tmp_path, replay(), Shift((3, TO, 8), (4, {"train": 1, "a": 0, "b": 0}, 9)))
    events = [line for line in read_trace(tmp_path) if line["event"] == "mixture"]
    assert events == [
        {"event": "mixture", "step": 3, "shares": {"train": 1, "a": 3, "b": 4}, "start": 8},
        {"event": "mixture", "step": 4, "shares": {"train": 1, "a": 0, "b": 0}, "start": 9},
    ]


def test_a_changed_run_is_still_compared_with_its_plan(tmp_path: Path) -> None:
    """What changed on the way is no difference; another plan is."""
    run(tmp_path, replay(), Shift((2, TO, 4)), saves=(5,))
    other = ReplayCallback({"a": alike("a", 20), "b": alike("b", 30)}, ratio=0.5, weights={"a": 2, "b": 1})
    with pytest.raises(CheckpointError, match=r"plan\.segments\[0\]\.weights"):
        run(tmp_path, other, Shift((2, TO, 4)), resume=tmp_path / "checkpoint-5")
    _, rest = run(tmp_path, replay(), Shift((2, TO, 4)), resume=tmp_path / "checkpoint-5")
    assert rest.counts() == [AFTER] * 5
