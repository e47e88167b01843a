"""The contract: a plug-in is a `TrainerCallback` that may also wrap what a run is made of.

A plug-in overrides what it needs and nothing else; what it overrides is what it may change.

    check(setup)              pure look at the run before anything is touched: yield a `Problem` for all that is wrong
    prepare_data(setup)       the rows that training reads in place of the Trainer's train_dataset (one owner)
    prepare_beside(dataset, setup)  the same for data of other plug-ins: replayed, held out
    new_rows(setup)           rows that the embeddings will have at least once `wrap_model` was called
    wrap_model(model)         the model, before a checkpoint is loaded into it and before the optimizer sees it
    wrap_plan(plan, setup)    the sample plan: which row of which source is sample i
    wrap_collator(collator)   the collator; its features carry `features.draws` when a plan is in force
    optimizer(model, args)    the optimizer (one owner)
    wrap_optimizer(optimizer) the optimizer that came out, or that the Trainer was given
    schedule(args, steps)     the learning rate as a function of the step (one owner)
    wrap_loss(compute_loss)   `compute_loss(model, inputs, return_outputs, num_items_in_batch)`
    see_batches(batches)      the micro-batches of the step about to be made, before the model has them
    before_save()             called on all ranks before a checkpoint is written by one
    on_...                    the events of `TrainerCallback` (call `super().on_train_begin` where you override it)
    training_data(setup)      datasets that it trains on besides the trainer's own
    settings()                what a resume must find unchanged
    begin()                   called once a `train()`, before state is loaded and before the first event
    eval_metrics()            metrics that stand in the host's evaluations
    describe()                lines about what this run will do, for the terminal, trace and card
    marks(total_steps)        the steps at which it acts (probes, say), for preview and report
    state() / load_state()    the few numbers that its behaviour depends on, beyond settings, seed and step
    recorded()                what later stages of the model's life should know of this one

Inside a run `self.run` (a `PluginRun`) is what a plug-in may use of its host: the plan, `log`, `trace`, `say`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import datasets as hf_datasets
import pyarrow as pa
from transformers import TrainerCallback

from hf_pretrain_ext import _host
from hf_pretrain_ext.data import is_stream, mean_tokens
from hf_pretrain_ext.lengths import window_for
from hf_pretrain_ext.loader import private_copy
from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.stages import Beginning
from hf_pretrain_ext.streams import first_rows

if TYPE_CHECKING:
    from hf_pretrain_ext.run import PluginRun
    from hf_pretrain_ext.schedules import LRSchedule
    from hf_pretrain_ext.trainer import PlanConfig

__all__ = ["PluginError", "Problem", "Setup", "TrainerPlugin", "overrides"]

STREAM_SAMPLE = 64
"""Rows of a stream that a check looks at."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a set-up: who says so, what was seen, how to mend it. A note is shown, an error raised."""

    plugin: str
    message: str
    fix: str
    level: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        return f"{self.plugin}: {self.message}. {self.fix}"


class PluginError(ValueError):
    """All problems of a set-up at once; `problems` holds them."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        plural = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n".join([f"{plural} with the plug-ins of this Trainer (nothing was changed):", *lines]))

    def __reduce__(self) -> tuple[type[PluginError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Setup:
    """What `check` may look at. `total_steps` is None where it cannot be known before training.

    `global_batch` is samples an optimizer step, over all ranks and micro-batches; `given_optimizer` whether the user
    built the Trainer with an optimizer; `beginning` how this stage begins, and after which others.
    """

    trainer: Any
    plugins: tuple[TrainerPlugin, ...]
    global_batch: int
    total_steps: int | None
    given_optimizer: bool
    plan_config: PlanConfig
    beginning: Beginning = field(default_factory=Beginning)

    @property
    def args(self) -> Any:
        return self.trainer.args

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def processing_class(self) -> Any:
        return self.trainer.processing_class

    @property
    def train_dataset(self) -> Any:
        """The rows that training reads: the Trainer's own, unless a plug-in makes them of those."""
        owner = self._data_owner
        return self.trainer.train_dataset if owner is None else owner.prepare_data(self)

    @property
    def _data_owner(self) -> TrainerPlugin | None:
        return next((plugin for plugin in self.plugins if overrides(plugin, "prepare_data")), None)

    @property
    def seed(self) -> int:
        """Of the sample plan: of the `PlanConfig`, else `data_seed`, else `seed` of the arguments."""
        given = (self.plan_config.seed, self.args.data_seed, self.args.seed)
        return int(next(seed for seed in given if seed is not None))

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens an optimizer step, from the mean length of sampled training rows; None where they hold no ids."""
        mean = mean_tokens(self.sample(self.train_dataset)) if self.train_dataset is not None else None
        return mean * self.global_batch if mean else None

    def new_plan(self) -> SamplePlan:
        """The plan of the training data alone, as the first plug-in that wraps it finds it."""
        args, config, dataset = self.args, self.plan_config, self.train_dataset
        streamed = is_stream(dataset)
        return SamplePlan(
            sources=(Source("train", None if streamed else len(dataset), order=config.order, dataset=dataset),),
            seed=self.seed,
            epoch=args.max_steps * self.global_batch if streamed else 0,
            window=config.window or window_for(self.global_batch),
        )

    def sample(self, dataset: Any) -> Any:
        """`dataset` itself where its rows can be looked up by number; of a stream, its first rows."""
        if not is_stream(dataset):
            return dataset
        rows = first_rows(dataset, STREAM_SAMPLE)
        try:
            return hf_datasets.Dataset.from_list(rows)
        except (TypeError, ValueError, pa.ArrowException):
            return rows

    @property
    def embeddings(self) -> int | None:
        """Rows of the model's input embedding, those to come counted: token ids must lie below."""
        return self._with_new_rows(_host.embeddings(self.model))

    @property
    def outputs(self) -> int | None:
        """Classes that a language model's loss chooses among, those to come counted: labels must lie below."""
        return self._with_new_rows(_host.output_vocabulary(self.model))

    def _with_new_rows(self, rows: int | None) -> int | None:
        return rows and max([rows, *(plugin.new_rows(self) for plugin in self.plugins)])

    def prepare(self, dataset: Any, name: str, training: bool = True) -> Any:
        """`dataset` as the trainer prepares its own (TRL tokenizes and packs; a plain Trainer changes nothing)."""
        owner = self._data_owner
        if owner is not None:
            return owner.prepare_beside(dataset, self)
        return _host.prepare_dataset(self.trainer, dataset, name, training)

    def stripped(self, datasets: list[Any]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        """`datasets` without the columns that the model does not take, and the collator that they go through."""
        stripped, collator = _host.strip_columns(self.trainer, datasets, self.trainer.data_collator)
        return stripped, private_copy(collator)


class TrainerPlugin(TrainerCallback):
    """Base class of all plug-ins; see the module's text for what may be overridden.

    Class attributes:
        name (`str`): short, unique among the plug-ins of a run; keys its state and its lines in the trace.
        needs_extend (`bool`): False if the plug-in also works as a bare callback of a plain Trainer.
        resume (`str`): `"exact"` or `"approximate"`.
        distributed (`dict[str, str]`): what is known of `"ddp"`, `"fsdp2"`, `"zero2"`, `"zero3"`: `"exact"` (tested),
            `"exact, without resume"`, `"refused: reason"` or `"untested"`.
        conflicts (`tuple[str, ...]`): names of plug-ins that it cannot run with.
        after (`tuple[str, ...]`): names of plug-ins that come before it when both are present.
        changes_mixture (`bool`): whether it calls `run.change_mixture`.
    """

    name: ClassVar[str] = ""
    needs_extend: ClassVar[bool] = True
    resume: ClassVar[Literal["exact", "approximate"]] = "exact"
    distributed: ClassVar[dict[str, str]] = {}
    conflicts: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    changes_mixture: ClassVar[bool] = False

    run: PluginRun | None = None

    def check(self, setup: Setup) -> Iterable[Problem]:
        return ()

    def prepare_data(self, setup: Setup) -> Any:
        """A map-style dataset, of which `wrap_plan` then makes what it will. Called often: keep what was made.

        Raises:
            [`PluginError`]: what is wrong with the Trainer's data.
        """
        raise TypeError(f"{type(self).__name__} does not prepare the training data")

    def prepare_beside(self, dataset: Any, setup: Setup) -> Any:
        return dataset

    def new_rows(self, setup: Setup) -> int:
        """Rows that the model's embeddings will have at least, where the plug-in gives it new tokens; else 0."""
        return 0

    def wrap_model(self, model: Any) -> Any:
        return model

    def wrap_plan(self, plan: SamplePlan, setup: Setup) -> SamplePlan:
        return plan

    def wrap_collator(self, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        return collator

    def optimizer(self, model: Any, args: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not own the optimizer")

    def wrap_optimizer(self, optimizer: Any) -> Any:
        return optimizer

    def schedule(self, args: Any, total_steps: int) -> LRSchedule:
        raise TypeError(f"{type(self).__name__} does not own the schedule")

    def wrap_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        return compute_loss

    def see_batches(self, batches: Sequence[Any]) -> None:
        """This rank's micro-batches as they were collated; what a plug-in's collator put in, it takes out here."""

    def before_save(self) -> None:
        """What the plug-in does on all ranks together before a checkpoint; `state()` is then asked of one."""

    def training_data(self, setup: Setup) -> dict[str, Any]:
        """Datasets that the plug-in trains on besides the trainer's own, by name, prepared as the trainer's."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings as JSON types: recorded in trace and checkpoint, compared on resume."""
        return {}

    def describe(self) -> list[str]:
        return []

    def marks(self, total_steps: int) -> list[int]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name}: the checkpoint holds state {sorted(state)} that this plug-in cannot read")

    def recorded(self) -> dict[str, Any]:
        """JSON types for this stage's entry in `stages.json`; later stages find them in `run.beginning.history`."""
        return {}

    def eval_metrics(self) -> dict[str, float]:
        """Metrics to stand in the host's evaluation, under keys that start with `eval_`."""
        return {}

    def begin(self) -> None:
        """Called once a `train()`, after settings and state are in place and before the first event."""

    def end(self) -> None:
        """Called once a `train()` when it is over, also by an exception: what must not outlive it is undone here."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None and self.run.trainer.state is not state:
            # Left over from another Trainer, which was extended; this one was not.
            self.run = None
        if self.run is None and self.needs_extend:
            raise RuntimeError(
                f"{type(self).__name__} needs more than a bare callback can do. Add one line before training:\n"
                "    from hf_pretrain_ext import extend\n"
                "    extend(trainer).train()"
            )


def overrides(plugin: TrainerPlugin, method: str) -> bool:
    """Whether `plugin` defines `method` itself, hence may change what that method wraps."""
    return getattr(type(plugin), method) is not getattr(TrainerPlugin, method)
