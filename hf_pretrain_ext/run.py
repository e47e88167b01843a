"""One run of a Trainer with plug-ins: their order, the plan, what is counted, logged, traced and saved.

`PluginRun` is also all that a plug-in may use of its host, as `self.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerState

from hf_pretrain_ext import _host, checkpoint
from hf_pretrain_ext.checkpoint import continue_call
from hf_pretrain_ext.checks import argument_problems, find_problems, in_order, list_problems
from hf_pretrain_ext.data import fingerprint, is_map_style
from hf_pretrain_ext.identity import compare, compared_arguments
from hf_pretrain_ext.lengths import host_length, run_length
from hf_pretrain_ext.loader import COUNTS, MARKS, PlanBatchSampler, PlanDataset, private_copy
from hf_pretrain_ext.loading import base_parts
from hf_pretrain_ext.nonfinite import NonFiniteWatch
from hf_pretrain_ext.plan import SamplePlan, Segment
from hf_pretrain_ext.plan.tokens import Cursor
from hf_pretrain_ext.plugin import PluginError, Problem, Setup, TrainerPlugin, overrides
from hf_pretrain_ext.preview import preview_of
from hf_pretrain_ext.rng import get_rng_state, rng_guard, set_rng_state
from hf_pretrain_ext.run_stage import RunStage
from hf_pretrain_ext.say import say
from hf_pretrain_ext.streams import StreamMark
from hf_pretrain_ext.trace import Trace, command, plain, versions
from hf_pretrain_ext.values import is_whole, shown

if TYPE_CHECKING:
    from hf_pretrain_ext.schedules import LRSchedule
    from hf_pretrain_ext.stages import Beginning
    from hf_pretrain_ext.trainer import PlanConfig

__all__ = ["PluginRun"]


class PluginRun:
    """The plug-ins of one Trainer and what they share. Made by `extend`; plug-ins see it as `self.run`."""

    def __init__(self, trainer: Any, plan_config: PlanConfig):
        self.trainer = trainer
        self.plan_config = plan_config
        self._given_optimizer = trainer.optimizer is not None
        self.made_optimizer: Any = None
        self.plugins: tuple[TrainerPlugin, ...] = ()
        self.plan: SamplePlan | None = None
        self.lr_schedule: LRSchedule | None = None
        self._setup: Setup | None = None
        self.steps_per_epoch = 0
        self.total_steps = 0
        self.resumed_at: int | None = None
        self.eval_scalars: dict[str, float] | None = None
        self._pending: dict[str, float] = {}
        self._counts: list[list[int]] = []
        self._committed: torch.Tensor | None = None
        self._uncommitted: torch.Tensor | None = None
        self._shown: set[Problem] = set()
        self._restored: dict[str, Any] | None = None
        self._before_step: dict[str, Any] | None = None
        self._uncommitted_step = 0
        self._sums: dict[str, Any] = {}
        self.resume_from: str | None = None
        self.updated_at: int | None = None
        self.active = False
        self.fingerprints: dict[str, str] = {}
        self._marks: dict[str, StreamMark] = {}
        self._marks_ahead: dict[str, StreamMark] = {}
        self._dataset: PlanDataset | None = None
        self._sampler: PlanBatchSampler | None = None
        self._planned: SamplePlan | None = None
        self.nonfinite = NonFiniteWatch(self)
        self._opened_trace: Trace | None = None
        self.stage = RunStage(self)

    # What a plug-in may use

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step)

    @property
    def beginning(self) -> Beginning:
        """How this stage of the model's life begins: `beginning.history` holds the stages before it."""
        return self.stage.beginning

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def device(self) -> torch.device:
        return self.trainer.args.device

    @property
    def output_dir(self) -> str:
        return str(self.trainer.args.output_dir)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: one of all ranks."""
        return bool(self.trainer.is_world_process_zero())

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        accelerator = self.trainer.accelerator
        return int(accelerator.process_index), int(accelerator.num_processes)

    @property
    def shifts_labels(self) -> bool:
        """Whether the model predicts label t + 1 at position t (causal language models)."""
        return _host.shifts_labels(self.trainer)

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step, over all ranks and micro-batches."""
        return int(self.trainer.get_total_train_batch_size(self.trainer.args))

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens an optimizer step, from sampled training rows; None where they hold no ids. It reads data."""
        with rng_guard():
            return self._setup.tokens_per_step if self._setup else None

    @property
    def given_optimizer(self) -> bool:
        """Whether the Trainer's optimizer is the user's: given to it, or set since a training left one there."""
        there = self.trainer.optimizer
        if there is None:
            self._given_optimizer = False
        return there is not None and (self._given_optimizer or there is not self.made_optimizer)

    @property
    def setup(self) -> Setup:
        """The Trainer and its plug-ins as `check` sees them."""
        return self._new_setup(self.plugins)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the training step runs in."""
        return self.trainer.compute_loss_context_manager()

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.trainer.accelerator.reduce(values, reduction="sum")

    def log(self, scalars: dict[str, float]) -> None:
        """Hands scalars to be logged for this step, on a line of their own after the host's.

        Never `trainer.log` from an event: it would swallow the host's own log and evaluation of the step.
        """
        self._pending.update({key: float(value) for key, value in scalars.items()})
        if self.step == (self.resumed_at or 0):
            # Before the first step there is no host line to wait for, and waiting would give it the wrong step.
            self.flush()

    def trace(self, event: str, **data: Any) -> None:
        """Writes an event of this step to trace.jsonl."""
        self._trace.write(event, self.step, **data)

    @property
    def notes(self) -> list[str]:
        """What the checks remarked without refusing it."""
        return sorted(map(str, self._shown))

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Prints lines at the terminal, on one rank; warnings of a run under way stand in the trace too."""
        if self.is_main:
            say(message, level)
            if level >= logging.WARNING and self.active:
                self.trace("warning", message=message)

    def collate_rows(self, dataset: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Some rows as a batch, columns removed that the model does not take, by the trainer's own collator."""
        (stripped,), collator = _host.strip_columns(self.trainer, [dataset], self.trainer.data_collator)
        return dict(private_copy(collator)([stripped[row] for row in rows]))

    # Life cycle, called by the trainer

    @property
    def _trace(self) -> Trace:
        if self._opened_trace is None or self._opened_trace.path.parent != Path(self.output_dir):
            self._opened_trace = Trace(self.output_dir, enabled=self.is_main)
        return self._opened_trace

    def owner(self, method: str) -> TrainerPlugin | None:
        return next((plugin for plugin in self.plugins if overrides(plugin, method)), None)

    def with_hook(self, method: str) -> list[TrainerPlugin]:
        return [plugin for plugin in self.plugins if overrides(plugin, method)]

    def attach(self, candidates: Sequence[TrainerPlugin]) -> None:
        """Checks the list as a whole, then takes it over: on an error nothing was changed."""
        wrong = argument_problems(self.trainer.args)
        if wrong:
            # Nothing else can be looked at: the length of the run follows from these.
            raise PluginError(wrong)
        # Looking at data may run a random collator; what it draws is nobody's business in training.
        with rng_guard():
            try:
                setup = self._new_setup(candidates)
            except PluginError as unfit:
                # Of data that cannot be prepared nothing more can be said.
                raise PluginError([*list_problems(candidates), *unfit.problems]) from unfit
            problems = find_problems(setup)
        if self.plan_config != type(self.plan_config)() and not any(overrides(p, "wrap_plan") for p in candidates):
            problems.append(
                Problem("plan", "PlanConfig is given, but no plug-in decides the order", "Leave it out, or add one.")
            )
        if self.nonfinite.action != "report" and self.trainer.is_deepspeed_enabled:
            problems.append(
                Problem(
                    "on_nonfinite",
                    f"{self.nonfinite.action!r} would leave out an update that DeepSpeed makes in the backward pass",
                    "Use 'report'.",
                )
            )
        errors = [problem for problem in problems if problem.level == "error"]
        if errors:
            raise PluginError(errors)
        for problem in problems:
            if problem not in self._shown:
                self._shown.add(problem)
                self.say(f"note: {problem}", logging.WARNING)
        self._setup = setup
        self.plugins = tuple(in_order(candidates))
        for plugin in self.plugins:
            plugin.run = self

    def build_plan(self) -> SamplePlan | None:
        """The plan after every plug-in wrapped it; None if none does, and the host's own sampler stays."""
        wrapping = self.with_hook("wrap_plan")
        if not wrapping:
            return None
        setup = self.setup
        plan = setup.new_plan()
        for plugin in wrapping:
            plan = plugin.wrap_plan(plan, setup)
        return plan

    def _new_setup(self, plugins: Sequence[TrainerPlugin]) -> Setup:
        setup = Setup(
            self.trainer,
            tuple(plugins),
            self.global_batch,
            None,
            self.given_optimizer,
            self.plan_config,
            self.beginning,
        )
        return dataclasses.replace(setup, total_steps=self._host_length(setup.train_dataset)[1] or None)

    def change_mixture(self, shares: Mapping[str, float], step: int | None = None) -> int:
        """Changes the mixture from optimizer step `step` on; earlier draws stay, and per-source counts go on.

        The change is recorded: a resume makes it again at the same draw. Every rank must call it with the same values.

        Args:
            shares (`Mapping[str, float]`): a share for every source of the plan, not negative, in any scale.
            step (`int`, *optional*): defaults to the first step whose batches have not been handed out yet. Workers
                fetch ahead, so that step depends on their number; name one to be independent of it.

        Returns:
            `int`: the step.

        Raises:
            `ValueError`: other names than the sources', or a step that was handed out already.
            `RuntimeError`: no plan, or no plug-in that declares `changes_mixture`.
        """
        sampler = self._sampler if self.active else None
        if self.plan is None or sampler is None or sampler.segments is None:
            raise RuntimeError(
                "the mixture can be changed while a run with a sample plan is training, by a plug-in with the class "
                "attribute changes_mixture = True"
            )
        names = [source.name for source in self.plan.sources]
        if set(shares) != set(names):
            raise ValueError(f"shares must name the sources {names}, got {sorted(shares)}")
        handed_out = -(-max(sampler.handed_out, self.step * self.global_batch) // self.global_batch)
        planned = self.plan.segments[-1].start // self.global_batch
        first = max(handed_out, planned + 1)
        step = first if step is None else step
        if step < first:
            why = "earlier ones are handed out already" if handed_out > planned else f"one begins at step {planned}"
            raise ValueError(f"step must be at least {first}: {why}; got {step}")
        self.plan = self.plan.with_segment(step * self.global_batch, [shares[name] for name in names])
        sampler.segments = self.plan.segments
        self.trace("mixture", shares=dict(shares), start=step)
        return step

    def make_loader_parts(self, datasets: Sequence[Any], batch_size: int) -> tuple[PlanDataset, PlanBatchSampler]:
        """Dataset and batch sampler of the plan, which stay known: streams and changed mixtures go through them."""
        plan = self.plan or self.build_plan()
        if plan is None:
            raise RuntimeError("no plug-in decides the order of the data")
        per_epoch, _ = run_length(self.trainer.args, plan.epoch, self.global_batch)
        changing = any(plugin.changes_mixture for plugin in self.plugins)
        dataset = PlanDataset(plan, datasets, self._marks)
        sampler = PlanBatchSampler(
            batch_size,
            per_epoch * (self.global_batch // batch_size),
            self.epoch_start,
            plan.segments if changing else None,
        )
        if self.active and self._sampler is None:
            # The one that trains is the first that a run asks for; a callback may ask for more.
            self._dataset, self._sampler = dataset, sampler
        return dataset, sampler

    def epoch_start(self) -> int:
        """The global sample index at which the epoch about to begin starts, from the step counter alone."""
        step = self.step
        if self.resumed_at == step and not self.trainer.args.ignore_data_skip:
            # The host skips the resumed epoch's batches that were trained on; so it begins where that epoch did.
            step -= step % self.steps_per_epoch
        return step * self.global_batch

    def start(self, resume_from: str | None) -> None:
        """Everything before the host's loop: plan, schedule, comparison with the checkpoint, state, trace."""
        self.active = True
        self.stage.begin(resumed=resume_from is not None)
        self.plan = self._planned = self.build_plan()
        self._counts = [[0] * 5 for _ in range(len(self.plan.sources) if self.plan else 0)]
        self._committed = self._uncommitted = self.updated_at = None
        self.steps_per_epoch, self.total_steps = self.length_of(self.plan)
        self.fingerprints = self._data()
        self.lr_schedule = self.schedule_for(self.total_steps)
        self._marks, self._marks_ahead, self._dataset, self._sampler = {}, {}, None, None
        self._pending, self._restored, self._before_step, self.resumed_at = {}, None, None, None
        self.nonfinite.begin()
        self._below = base_parts(self.trainer.model)
        for plugin in self.plugins:
            plugin.begin()
        if resume_from is not None:
            self._restore(resume_from)
        description = [line for plugin in self.plugins for line in plugin.describe()]
        if self.beginning.told:
            description = [*self.stage.lines(), *description]
        plugins = {plugin.name: plugin.settings() for plugin in self.plugins}
        header = {"plugins": plugins, "identity": self.identity(), "versions": versions(), "describe": description}
        if told := command():
            header["command"] = told
        header["stage"] = self.stage.brief()
        if self.plugins:
            header["preview"] = preview_of(self, count_tokens=False).to_json()
        if self.resumed_at is None:
            self._trace.write("start", 0, **header)
        else:
            self._trace.write("resume", self.resumed_at, checkpoint=resume_from, versions=versions())
        if description:
            self.say("\n".join(description))
        if self.stage.warning:
            self.say(self.stage.warning, logging.WARNING)

    def set_length(self, per_epoch: int, total: int) -> None:
        """What the host counted, where it differs from what could be known before (a loader of the user's own)."""
        if (per_epoch, total) == (self.steps_per_epoch, self.total_steps):
            return
        self.steps_per_epoch, self.total_steps = per_epoch, total
        self.lr_schedule = self.schedule_for(total)

    def length_of(self, plan: SamplePlan | None) -> tuple[int, int]:
        """Optimizer steps an epoch and in all; zeros where only the host's own loader will tell."""
        if plan is not None:
            return run_length(self.trainer.args, plan.epoch, self.global_batch)
        return self._host_length(self.setup.train_dataset)

    def schedule_for(self, total_steps: int) -> LRSchedule | None:
        """The learning rate of a run of `total_steps` steps, if a plug-in owns it and the length is known."""
        if self.beginning.schedule is not None:
            # An annealing branch says it itself.
            return self.beginning.schedule
        owner = self.owner("schedule")
        return owner.schedule(self.trainer.args, total_steps) if owner and total_steps else None

    def _host_length(self, dataset: Any) -> tuple[int, int]:
        """Steps an epoch and steps in all of training data as it is; zeros where that cannot be known."""
        args = self.trainer.args
        if is_map_style(dataset):
            return host_length(args, len(dataset), _host.train_batch_size(self.trainer), self.global_batch)
        return max(args.max_steps, 0), max(args.max_steps, 0)

    def _data(self) -> dict[str, str]:
        """What the training data is, from a sample of its rows: other data of the same size is other data."""
        if not self.plugins:
            return {}
        sources = {source.name: source.dataset for source in self.plan.sources} if self.plan else {}
        found = sources or {"train": self.trainer.train_dataset}
        # A dataset may draw as it is read; the same draws give the same hash, and training does not see them.
        with rng_guard(seed=0):
            return {name: fingerprint(dataset) for name, dataset in found.items() if is_map_style(dataset)}

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the run does; a resume must have the same."""
        arguments = compared_arguments(self.trainer.args, has_plan=self.plan is not None)
        return plain(
            {
                "plugins": {plugin.name: settings for plugin in self.plugins if (settings := plugin.settings())},
                "plan": self._planned.identity() if self._planned else None,
                "schedule": self.lr_schedule.identity() if self.lr_schedule else None,
                "data": self.fingerprints,
                "global_batch": self.global_batch,
                "sharding": self._sharding(),
                "on_nonfinite": self.nonfinite.action,
                "total_steps": self.total_steps,
                "stage": self.stage.identity(),
                "arguments": arguments,
            }
        )

    def _sharding(self) -> str | None:
        """How the optimizer state of a checkpoint is split, None where it is whole: it loads only as it was saved."""
        where = _host.sharding(self.trainer)
        if where == "ddp":
            return None
        ranks = self.ranks[1]
        return f"{where} on {ranks} rank{'s' * (ranks > 1)}" if where.startswith("zero") else where

    def _restore(self, resume_from: str) -> None:
        saved = checkpoint.read_state(resume_from)
        with checkpoint.reading(resume_from, f"{checkpoint.STATE_FOLDER}/state.json"):
            self._take_over(saved, resume_from)

    def _take_over(self, saved: dict[str, Any], resume_from: str) -> None:
        if saved.get("save_only_model"):
            why = ""
            if saved["identity"].get("sharding") == "fsdp2":
                why = ", as the host saves every model that is sharded while it is loaded"
            raise checkpoint.CheckpointError(
                f"{resume_from} was saved with save_only_model=True{why}: it has no optimizer state to resume with. "
                "Load the model from that folder and call train() without resume_from_checkpoint for a new run, or "
                f"begin a new stage with its history: {continue_call(resume_from)}."
            )
        compare(resume_from, saved["identity"], self.identity())
        if saved.get("below") not in (None, self._below):
            parent = (self.beginning.parent or {}).get("path")
            raise checkpoint.CheckpointError(
                f"{resume_from} holds an adapter, and the model below it has other weights here than when it was "
                "saved. Load the model that the run began with"
                + (
                    f": continue_from(trainer, {parent!r}), and then train(resume_from_checkpoint=...)"
                    if parent
                    else ""
                )
            )
        own = ("optimizer.*", "scheduler.pt") if _host.sharding(self.trainer) == "ddp" else ()
        checkpoint.check_listed(resume_from, *own, "rng_state*.pth", "trainer_state.json")
        with checkpoint.reading(resume_from, "trainer_state.json"):
            there = TrainerState.load_from_json(os.path.join(resume_from, "trainer_state.json")).global_step
        if not is_whole(saved["step"]) or saved["step"] != there:
            raise ValueError(f"it is of step {shown(saved['step'])}, trainer_state.json of step {shown(there)}")
        self.resumed_at = there
        if there and there == self.total_steps:
            self.say(
                f"the run of {resume_from} is finished (step {there:,} of {self.total_steps:,}): there is nothing to "
                f"resume. To train its weights further, as a new stage: {continue_call(resume_from)}",
                logging.WARNING,
            )
        self._counts = [[int(number) for number in row] for row in saved["counts"]]
        if [len(row) for row in self._counts] != [5] * (len(self.plan.sources) if self.plan else 0):
            raise ValueError(f"its counts are not 5 for each source, got {shown(saved['counts'])}")
        sums = saved["log_sums"]
        self._restored = {"loss": float(sums["loss"]), "last_logged": int(sums["last_logged"])}
        self._marks = {name: StreamMark.from_json(mark) for name, mark in saved["streams"].items()}
        if self.plan is not None:
            added = tuple(Segment(start, tuple(weights)) for start, weights in saved["segments"])
            if saved["cursor"] is not None:
                cursor = Cursor.from_json(saved["cursor"])
                if {len(cursor.draws), len(cursor.tokens), len(cursor.behind)} != {len(self.plan.sources)}:
                    raise ValueError(f"its cursor is not of {len(self.plan.sources)} sources")
                self.plan = dataclasses.replace(self.plan, cursors=(cursor,))
            self.plan = self.plan.with_segments(self.plan.segments + added)
        for plugin in self.plugins:
            plugin.load_state(saved["plugins"].get(plugin.name, {}))

    def on_train_begin(self) -> None:
        """Inside the host's loop, before the first step: sums that the host does not save are put back."""
        self.stage.trained = self.resumed_at is not None
        if self._restored:
            _host.restore_log_sums(self.trainer, self._restored)

    def remember_state(self) -> None:
        """What a checkpoint made inside the coming step (on SIGTERM) must hold: a resume will make that step again."""
        self._before_step = {
            "step": self.step,
            "rng": get_rng_state(),
            "loss": _host.log_sums(self.trainer),
            "added": self._added(),
        }

    def on_epoch_begin(self) -> None:
        # At an epoch's start a resume puts the random state back before the loader draws its base seed.
        if self.step % self.steps_per_epoch == 0:
            self.remember_state()

    def on_step_begin(self) -> None:
        if self._interrupted is None or self.step % self.steps_per_epoch:
            self.remember_state()

    @property
    def _interrupted(self) -> dict[str, Any] | None:
        """The state at the beginning of the step, if that step is not made yet."""
        before = self._before_step
        return before if before and before["step"] == self.step else None

    @contextmanager
    def rng_of_step_begin(self) -> Iterator[None]:
        """Inside a step, the random state of its beginning; between steps, the state as it is."""
        if self._interrupted is None:
            yield
            return
        with rng_guard():
            set_rng_state(self._interrupted["rng"])
            yield

    def on_train_end(self) -> None:
        self.gather_counts()
        self._trace.write("end", self.step, counts=self.realised())
        self.stage.end()
        self.write_stages(self.output_dir, with_weights=False)

    def write_stages(self, folder: str, with_weights: bool = True) -> None:
        """`stages.json` beside weights that are used or pushed from there."""
        if not self.is_main:
            return
        try:
            self.stage.write(folder, with_weights)
        except (OSError, checkpoint.CheckpointError) as error:
            # Every checkpoint has it: no reason to lose the run.
            self.say(f"stages.json cannot be written into {folder} ({error})", logging.WARNING)

    # Counting

    def count(self, batches: Sequence[Any]) -> None:
        """Takes the counts and the marks of streams out of the micro-batches of the step about to run."""
        for plugin in self.with_hook("see_batches"):
            plugin.see_batches(batches)
        taken = [batch for batch in batches if hasattr(batch, "pop") and COUNTS in batch]
        if taken:
            self._uncommitted = torch.stack([batch.pop(COUNTS) for batch in taken]).sum(dim=0)
            self._uncommitted_step = self.step
        self._marks_ahead = dict(self._marks)
        for batch in taken:
            for name, mark in batch.pop(MARKS, {}).items():
                if name not in self._marks_ahead or mark.number > self._marks_ahead[name].number:
                    self._marks_ahead[name] = mark

    def commit(self) -> None:
        """Counts what the last step saw, if it was made. Stays on the device: no synchronisation."""
        if self._uncommitted is not None and self.step > self._uncommitted_step:
            self._committed = self._uncommitted + (0 if self._committed is None else self._committed)
            self._uncommitted, self._marks = None, self._marks_ahead
            if self._dataset is not None:
                # Workers that start at the next epoch are copies of this one.
                self._dataset.go_on_from(self._marks)

    def gather_counts(self) -> None:
        """Sums the counts over ranks; every rank must call it."""
        if self.plan is None:
            return
        if self._committed is None:
            self._committed = torch.zeros((len(self.plan.sources), 5), dtype=torch.int64, device=self.device)
        total = self.sum_over_ranks(self._committed)
        self._counts = (torch.tensor(self._counts) + total.cpu()).tolist()
        self._committed = None

    def realised(self) -> dict[str, Any]:
        """What was seen until the last log or save, over all ranks: samples, tokens and loss-bearing tokens a source.

        `tokens` (read, padding left out) is None where rows hold no token ids, `loss_tokens` where a collator's
        batches do not tell which of them belong to which sample.
        """
        if self.plan is None:
            return {}
        return {
            source.name: {
                "samples": samples,
                "tokens": tokens if not unread else None,
                "loss_tokens": bearing if not untold else None,
                "replayed": source.replayed,
            }
            for source, (samples, tokens, unread, bearing, untold) in zip(self.plan.sources, self._counts, strict=True)
        }

    # Logging

    def flush(self) -> None:
        """Logs what plug-ins handed over, leaving the host's decisions about this step alone."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        trainer = self.trainer
        due = trainer.control.should_log
        # The base class's log: a subclass's own (TRL's, say) would attach its running metrics to our line.
        Trainer.log(trainer, dict(pending))
        trainer.control.should_log = due
        self._trace.write("log", self.step, scalars=pending)

    def flush_unless_log_is_due(self) -> None:
        if self._pending and not _host.log_is_due(self.trainer):
            self.flush()

    # Saving

    def _log_sums(self) -> dict[str, Any]:
        """Over all ranks: the host logs their mean; every rank must call this."""
        before = self._interrupted
        sums = before["loss"] if before else _host.log_sums(self.trainer)
        mean = self.trainer.accelerator.reduce(sums["loss"].clone(), reduction="mean")
        return {"loss": mean.item(), "last_logged": sums["last_logged"]}

    def prepare_save(self) -> None:
        """What all ranks do together before a checkpoint is written by one."""
        self.commit()
        self.gather_counts()
        self._sums = self._log_sums()
        for plugin in self.with_hook("before_save"):
            plugin.before_save()

    def save(self, folder: str) -> None:
        """Writes our part of a checkpoint, last of all files."""
        trainer = self.trainer
        checkpoint.write_state(
            folder,
            {
                "step": self.step,
                "save_only_model": bool(trainer.args.save_only_model),
                "identity": self.identity(),
                "counts": self._counts,
                "log_sums": self._sums,
                "streams": {name: mark.to_json() for name, mark in self._marks.items()},
                "segments": [[segment.start, list(segment.weights)] for segment in self._added()],
                "cursor": self._cursor(),
                "below": self._below,
                "plugins": {plugin.name: plugin.state() for plugin in self.plugins},
            },
            beside=self.stage.json(),
        )
        self._trace.write("save", self.step, folder=os.path.basename(folder))

    def _added(self) -> tuple[Segment, ...]:
        """The segments by which the mixture changed while the run went on, those of a step not made yet left out."""
        if self.plan is None or self._planned is None:
            return ()
        if self._interrupted is not None and "added" in self._interrupted:
            added: tuple[Segment, ...] = self._interrupted["added"]
            return added
        return self.plan.segments[len(self._planned.segments) :]

    def _cursor(self) -> dict[str, Any] | None:
        """For shares in tokens, from where a resume computes the order."""
        if self.plan is None or self.plan.unit != "tokens":
            return None
        # Before the first change: the mixture that a resume begins with does not know of it.
        start = min([self.step * self.global_batch, *(segment.start - 1 for segment in self._added())])
        return self.plan.cursor_before(start).to_json()
