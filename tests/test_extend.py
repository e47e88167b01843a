"""`extend`, the mixin and the contract: what plug-ins can reach, and what is refused before anything is touched."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import warm
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_pretrain_ext import PlanConfig, PluginError, PluginTrainerMixin, Problem, SamplePlan, TrainerPlugin, extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.plugin import Setup
from hf_pretrain_ext.schedules import LRSchedule, cosine


class UserTrainer(Trainer):
    """A user's own subclass with a loss and an optimizer of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = 2 * outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


def plugins() -> list[Any]:
    return [
        RewarmCallback(peak_lr=1e-2, warmup=2),
        ReplayCallback(tiny.rows(30, seed=9), ratio=0.25),
        ForgettingCallback({"old": tiny.rows(8, seed=9)}, every=3),
    ]


@pytest.mark.parametrize("cls", [Trainer, Seq2SeqTrainer, UserTrainer])
def test_same_object_and_class_relations(cls: type[Trainer], tmp_path: Path) -> None:
    if cls is Seq2SeqTrainer:
        from transformers import Seq2SeqTrainingArguments, default_data_collator

        arguments = Seq2SeqTrainingArguments(**tiny.arguments(tmp_path).to_dict() | {"report_to": []})
        trainer: Trainer = Seq2SeqTrainer(
            model=tiny.model(), args=arguments, train_dataset=tiny.rows(40), data_collator=default_data_collator
        )
    else:
        trainer = tiny.trainer(tmp_path, cls=cls)
    extended = extend(trainer, *plugins())
    assert extended is trainer
    assert isinstance(trainer, cls) and isinstance(trainer, PluginTrainerMixin)
    before = type(trainer)
    assert extend(extend(trainer)) is trainer and type(trainer) is before
    assert [type(cb) for cb in trainer.callback_handler.callbacks].count(ReplayCallback) == 1
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.plugin_run.realised()["replay"]["samples"] == 6
    if cls is UserTrainer:
        assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    # Nothing global was patched: a bare Trainer is as it was.
    assert Trainer.train is not type(trainer).train
    assert not isinstance(tiny.trainer(tmp_path), PluginTrainerMixin)


def test_spelled_out_subclass_is_the_same_thing(tmp_path: Path) -> None:
    class Mine(PluginTrainerMixin, Trainer):
        pass

    ours = tiny.trainer(tmp_path / "a", *plugins(), cls=Mine)
    ours.train()
    theirs = extend(tiny.trainer(tmp_path / "b", *plugins()))
    theirs.train()
    assert tiny.same_weights(ours, theirs)


def test_callbacks_given_to_extend_equal_callbacks_given_to_the_trainer(tmp_path: Path) -> None:
    ours = extend(tiny.trainer(tmp_path / "a"), *plugins())
    theirs = extend(tiny.trainer(tmp_path / "b", *reversed(plugins())))
    assert [p.name for p in ours.plugin_run.plugins] == [p.name for p in theirs.plugin_run.plugins]
    ours.train()
    theirs.train()
    assert tiny.same_weights(ours, theirs)


def test_all_problems_in_one_error_and_nothing_touched(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        ReplayCallback(tiny.rows(5, high=500), ratio=0.1),
        ForgettingCallback({"gone": tiny.rows(5, high=900)}),
        train_sampling_strategy="group_by_length",
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(trainer.model.parameters(), lr=0.1))
    before, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    with pytest.raises(PluginError) as error:
        extend(trainer, RewarmCallback(peak_lr=1e-2, warmup=20))
    text = str(error.value)
    for part in (
        "its own scheduler (ConstantLR)",
        "train_sampling_strategy='group_by_length'",
        "replay: the replay data holds token ids",
        "forgetting[gone]: holds token ids",
        "rewarm: in a run of 6 steps, warmup of 20 steps",
    ):
        assert part in text
    assert len(error.value.problems) == 5
    assert type(trainer) is before and trainer.callback_handler.callbacks == callbacks
    assert not hasattr(trainer, "_plugin_run")
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems


class Toy(TrainerPlugin):
    name = "toy"


class OwnsSchedule(TrainerPlugin):
    name = "second"

    def schedule(self, args: Any, total_steps: int) -> LRSchedule:
        return cosine(total_steps=total_steps, peak_lr=1.0)


def test_problems_of_the_list(tmp_path: Path) -> None:
    class Enemy(TrainerPlugin):
        name = "enemy"
        conflicts = ("toy",)

    with pytest.raises(PluginError, match="both own the learning-rate schedule"):
        extend(tiny.trainer(tmp_path), RewarmCallback(peak_lr=1e-2), OwnsSchedule())
    with pytest.raises(PluginError, match="toy: is there 2 times"):
        extend(tiny.trainer(tmp_path), Toy(), Toy())
    with pytest.raises(PluginError, match="enemy: cannot run together with toy"):
        extend(tiny.trainer(tmp_path), Toy(), Enemy())
    with pytest.raises(PluginError, match="has no name"):
        extend(tiny.trainer(tmp_path), type("Nameless", (TrainerPlugin,), {})())
    with pytest.raises(TypeError, match=r"needs a transformers\.Trainer .* got int"):
        extend(3)  # type: ignore[type-var]  # the mistake under test
    with pytest.raises(TypeError, match="callbacks after the trainer, got str"):
        extend(tiny.trainer(tmp_path), "rewarm")  # type: ignore[arg-type]  # the mistake under test


def test_order_follows_declared_needs(tmp_path: Path) -> None:
    class Late(TrainerPlugin):
        name, after = "a-late", ("z-early",)

    class Early(TrainerPlugin):
        name = "z-early"

    for given in ([Late(), Early()], [Early(), Late()]):
        trainer = extend(tiny.trainer(tmp_path), *given)
        assert [plugin.name for plugin in trainer.plugin_run.plugins] == ["z-early", "a-late"]

    class Circular(TrainerPlugin):
        name, after = "z-early", ("a-late",)

    with pytest.raises(PluginError, match="wait for each other"):
        extend(tiny.trainer(tmp_path), Late(), Circular())


class Everything(TrainerPlugin):
    """Overrides every hook and notes what it was handed."""

    name = "everything"

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def wrap_model(self, model: Any) -> Any:
        self.seen["model"] = model
        model.config.touched = True
        return model

    def wrap_plan(self, plan: SamplePlan, setup: Setup) -> SamplePlan:
        self.seen["plan"] = plan
        return plan.with_phase("start", 0, 8)

    def wrap_collator(self, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def collate(features: Any) -> Any:
            self.seen.setdefault("phases", []).append(features.draws.phase.tolist())
            return collator(features)

        return collate

    def optimizer(self, model: Any, args: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=args.learning_rate)

    def wrap_optimizer(self, optimizer: Any) -> Any:
        self.seen["optimizer"] = type(optimizer)
        return optimizer

    def schedule(self, args: Any, total_steps: int) -> LRSchedule:
        return cosine(total_steps=total_steps, peak_lr=args.learning_rate, warmup=0, min_lr=0.0)

    def wrap_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            self.seen["loss"] = self.seen.get("loss", 0) + 1
            return compute_loss(*args, **kwargs)

        return compute

    def eval_metrics(self) -> dict[str, float]:
        return {"eval_extra": 1.5}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.run is not None
        self.run.log({"toy_step": state.global_step})
        self.run.trace("toy", value=2)


def test_every_hook_of_the_contract_is_called(tmp_path: Path) -> None:
    plugin = Everything()
    trainer = extend(
        tiny.trainer(tmp_path, plugin, eval_strategy="steps", eval_steps=3, eval_dataset=tiny.rows(6, seed=4))
    )
    trainer.train()
    assert plugin.seen["model"] is trainer.model and trainer.model.config.touched
    assert plugin.seen["plan"].window == 4
    # The loader looks one batch ahead; the phases of the first six are those of draws 0 to 23.
    assert plugin.seen["phases"][:6] == [[1] * 4, [1] * 4, [0] * 4, [0] * 4, [0] * 4, [0] * 4]
    assert plugin.seen["optimizer"] is torch.optim.SGD
    assert plugin.seen["loss"] == 6 + 2 * 2  # six steps, two evaluations of two batches
    lines = trainer.state.log_history
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    schedule = cosine(total_steps=6, peak_lr=1e-2, warmup=0, min_lr=0.0)
    assert rates == pytest.approx([schedule(step) for step in range(6)], rel=1e-12)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert all(line["eval_extra"] == 1.5 for line in evaluations)
    assert [line["toy_step"] for line in lines if "toy_step" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "toy_step" in line] == [1, 2, 3, 4, 5, 6]


def test_logging_from_a_plugin_leaves_the_hosts_lines_alone(tmp_path: Path) -> None:
    """As many host lines, evaluations and saves with a plug-in that logs at every step as without."""

    class Talks(TrainerPlugin):
        name = "talks"

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.run is not None
            self.run.log({"said": 1.0})

    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    histories = []
    for number, callbacks in enumerate(([], [Talks()])):
        held_out = tiny.rows(6, seed=4)
        trainer = extend(tiny.trainer(tmp_path / str(number), *callbacks, eval_dataset=held_out, **arguments))
        trainer.train()
        histories.append(tiny.history(trainer))
        assert sorted(path.name for path in (tmp_path / str(number)).glob("checkpoint-*")) == [
            "checkpoint-3",
            "checkpoint-6",
        ]
    without, with_lines = histories
    assert [line for line in with_lines if "said" not in line] == without
    assert [line["step"] for line in with_lines if "said" in line] == [1, 2, 3, 4, 5, 6]


def test_model_init_and_wrap_model(tmp_path: Path) -> None:
    """`model_init` makes a new model inside every `train()`; it is wrapped each time, before the optimizer sees it."""
    plugin = Everything()
    from transformers import default_data_collator

    trainer = extend(
        Trainer(
            model_init=lambda trial=None: tiny.model(),
            args=tiny.arguments(tmp_path),
            train_dataset=tiny.rows(40),
            data_collator=default_data_collator,
            callbacks=[plugin],
        )
    )
    trainer.train()
    first = plugin.seen["model"]
    assert first is trainer.model
    trainer.train()
    assert plugin.seen["model"] is trainer.model is not first


PICKLED = """
import pickle, sys
import tiny
from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import RewarmCallback

pickle.dumps(tiny.trainer(sys.argv[1]))
trainer = extend(tiny.trainer(sys.argv[1], RewarmCallback(peak_lr=1e-2, warmup=2)))
copy = pickle.loads(pickle.dumps(trainer))
assert type(copy) is type(trainer) and copy.plugin_run.trainer is copy
assert [plugin.name for plugin in copy.plugin_run.plugins] == ["rewarm"]
copy.train()
trainer.train()
assert tiny.same_weights(copy, trainer)
"""


def test_an_extended_trainer_pickles_as_before(tmp_path: Path) -> None:
    """In a new process: once any Trainer has trained, accelerate's shared state keeps bare ones from pickling too."""
    done = subprocess.run(
        [*warm.python(), "-c", PICKLED, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_train_inherits_no_moments(tmp_path: Path) -> None:
    trainer = extend(tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup=0), max_steps=2))
    trainer.train()
    first = trainer.optimizer.optimizer
    trainer.train()
    assert trainer.optimizer.optimizer is not first
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {2.0}


def test_an_optimizer_given_by_the_user_stays(tmp_path: Path) -> None:
    from transformers import default_data_collator

    model = tiny.model()
    given = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model=model,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(40),
        data_collator=default_data_collator,
        optimizers=(given, None),
    )
    extend(trainer, RewarmCallback(peak_lr=1e-2, warmup=2)).train()
    trainer.train()
    assert trainer.optimizer.optimizer is given
    with pytest.raises(PluginError, match="its own optimizer"):
        extend(trainer, Everything())


def test_a_plugin_left_over_from_another_trainer_is_not_attached(tmp_path: Path) -> None:
    """One callback object in two Trainers, the second not extended: it says so, or works as a bare callback."""
    replay, rewarm = ReplayCallback(tiny.rows(30, seed=9), ratio=0.25), RewarmCallback(peak_lr=1e-2, warmup=2)
    extend(tiny.trainer(tmp_path / "a", replay, rewarm)).train()
    with pytest.raises(RuntimeError, match=r"extend\(trainer\)"):
        tiny.trainer(tmp_path / "b", replay).train()
    plain = tiny.trainer(tmp_path / "c", rewarm)
    plain.train()
    rates = [line["learning_rate"] for line in plain.state.log_history if "learning_rate" in line]
    schedule = cosine(total_steps=6, peak_lr=1e-2, warmup=2)
    assert rates == pytest.approx([schedule(step) for step in range(6)], rel=1e-12)


def test_wrap_model_may_return_another_module(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        calls = 0

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            Wrapper.calls += 1
            return self.inner(input_ids=input_ids, labels=labels, **kwargs)

    class Wraps(TrainerPlugin):
        name = "wraps"

        def wrap_model(self, model: Any) -> Any:
            return model if isinstance(model, Wrapper) else Wrapper(model)

    trainer = extend(tiny.trainer(tmp_path, Wraps()))
    trainer.train()
    assert isinstance(trainer.model, Wrapper) and Wrapper.calls == 6


class OwnLoader(Trainer):
    """A user's subclass that makes its own loader and scheduler."""

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(num_training_steps, optimizer)


def test_methods_of_the_users_own_are_not_bypassed_silently(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, *plugins(), cls=OwnLoader)
    with pytest.raises(PluginError) as error:
        extend(trainer)
    assert "OwnLoader has a get_train_dataloader of its own" in str(error.value)
    assert "OwnLoader has a create_scheduler of its own" in str(error.value)
    with pytest.raises(PluginError, match="auto_find_batch_size would change the run"):
        extend(tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2), auto_find_batch_size=True))
    with pytest.raises(PluginError, match="PlanConfig is given, but no plug-in decides the order"):
        extend(tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2)), plan=PlanConfig(order="original"))
    with pytest.raises(ValueError, match="order must be one of"):
        PlanConfig(order="sorted")  # type: ignore[arg-type]  # the mistake under test


def test_lengths_that_only_the_users_loader_knows(tmp_path: Path) -> None:
    """No train_dataset, epochs of a loader of the user's own: the schedule spans what the host counts."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(tiny.rows(20), batch_size=4, collate_fn=default_data_collator)
            return self.accelerator.prepare(loader)

    trainer = Own(
        model=tiny.model(),
        args=tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=2),
        callbacks=[RewarmCallback(peak_lr=1e-2, warmup=2), ForgettingCallback({"old": tiny.rows(4)}, every=0.5)],
    )
    extend(trainer).train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    schedule = cosine(total_steps=10, peak_lr=1e-2, warmup=2)
    assert rates == pytest.approx([schedule(step) for step in range(10)], rel=1e-12)


def test_a_stop_asked_for_on_our_line_is_kept(tmp_path: Path) -> None:
    class StopsOnOurLine(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "eval_old_loss" in (logs or {}) and state.global_step == 2:
                control.should_training_stop = True

    trainer = extend(tiny.trainer(tmp_path, ForgettingCallback({"old": tiny.rows(4)}), StopsOnOurLine()))
    trainer.train()
    assert trainer.state.global_step < 6


def test_plan_config_reaches_the_plan(tmp_path: Path) -> None:
    trainer = extend(
        tiny.trainer(tmp_path, ReplayCallback(tiny.rows(9, seed=1), ratio=0.25)),
        plan=PlanConfig(order="original", seed=11, window=8),
    )
    plan = trainer.plugin_run.build_plan()
    assert plan is not None
    assert (plan.sources[0].order, plan.seed, plan.window) == ("original", 11, 8)
    extend(trainer)
    assert trainer.plugin_run.plan_config.seed == 11


def test_problem_reads_well() -> None:
    assert str(Problem("replay", "is empty", "Pass data.")) == "replay: is empty. Pass data."


def test_a_callback_that_only_listens_is_welcome(tmp_path: Path) -> None:
    class Listens(TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1

    listener = Listens()
    extend(tiny.trainer(tmp_path), listener).train()
    assert listener.steps == 6
