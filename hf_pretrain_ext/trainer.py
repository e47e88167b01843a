"""`extend` and `PluginTrainerMixin`: a Trainer that plug-ins can reach into, by subclassing alone."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import seed_worker

from hf_pretrain_ext import _host, checkpoint
from hf_pretrain_ext.loader import PlanCollator
from hf_pretrain_ext.nonfinite import Action, NonFiniteWatch
from hf_pretrain_ext.plan.plan import MAX_WINDOW, Order
from hf_pretrain_ext.plugin import TrainerPlugin
from hf_pretrain_ext.preview import Preview, preview_of
from hf_pretrain_ext.reload import load_converted
from hf_pretrain_ext.run import PluginRun
from hf_pretrain_ext.schedules import LRSchedule
from hf_pretrain_ext.session import Session
from hf_pretrain_ext.stages import Stage, read_stages
from hf_pretrain_ext.trace import TRACE_NAME
from hf_pretrain_ext.values import is_whole, shown

__all__ = ["PlanConfig", "PluginTrainerMixin", "extend", "lambda_lr"]

T = TypeVar("T", bound=Trainer)

if TYPE_CHECKING:
    _Base = Trainer
else:
    # At run time it stands before any Trainer class, the user's own included.
    _Base = object


@dataclass
class PlanConfig:
    """Settings of the sample plan, readable by `HfArgumentParser`. In force when a plug-in wraps the plan."""

    order: Order = field(
        default="shuffled",
        metadata={
            "help": "Order of training rows: shuffled (by key, every pass), original, or host (the Trainer's own)."
        },
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the plan; defaults to data_seed, then seed."})
    window: int | None = field(
        default=None,
        metadata={"help": "Draws within which sources are permuted; defaults to the global batch."},
    )

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {shown(self.order)}")
        for name, least, most, unit in (("seed", -(1 << 63), (1 << 63) - 1, ""), ("window", 1, MAX_WINDOW, " draws")):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and least <= value <= most):
                kind = "" if is_whole(value) else "be an int and "
                limits = f"{least}..{most}" if unit else "-2^63..2^63 - 1"
                raise ValueError(f"{name} must {kind}lie in {limits}{unit}, got {shown(value)}")


def relative_rate(step: int, schedule: LRSchedule, base_lr: float) -> float:
    """What `LambdaLR` multiplies each group's rate with: groups at `base_lr` get the schedule, others scale."""
    return schedule(step) / base_lr


def lambda_lr(optimizer: Any, schedule: LRSchedule, base_lr: float) -> LambdaLR:
    """The schedule as torch's scheduler.

    A partial, because `LambdaLR` saves a callable object's attributes and puts them back on load: a partial has none,
    so the file holds plain numbers and the settings, which a resume compares, stay in charge.
    """
    return LambdaLR(optimizer, functools.partial(relative_rate, schedule=schedule, base_lr=base_lr))


class _Conductor(TrainerCallback):
    """Before all plug-ins: counts what the step saw, puts back what the host does not save, closes the trace."""

    def __init__(self, run: PluginRun):
        self.run = run
        self.session = Session(run)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.begin(self.run.notes)
        self.run.on_train_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.on_step_begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.on_epoch_begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.nonfinite.before_update(kwargs["model"], control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.commit()
        self.run.stage.trained = True
        if control.should_log:
            self.run.gather_counts()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:
            self.run.gather_counts()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.session.use()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.end()
        self.run.on_train_end()


class PluginTrainerMixin(_Base):
    """Makes a Trainer class honour what plug-ins wrap: `class MyTrainer(PluginTrainerMixin, SFTTrainer): ...`.

    Takes the Trainer's arguments, `plan` ([`PlanConfig`], *optional*) and `on_nonfinite`. `extend` gives the same to a
    Trainer that exists already.
    """

    _plugin_run: PluginRun
    _pushing_with: str | None = None
    """The token of the push that is under way; empty for the one that is logged in."""
    _kept_card: str | None = None
    """The card of before that push, where it is more than a draft of the host's."""
    _given: tuple[Any, Any] | None = None
    """An optimizer that the Trainer was given, as plug-ins wrapped it and as it came."""

    def __init__(self, *args: Any, plan: PlanConfig | None = None, on_nonfinite: Action = "report", **kwargs: Any):
        _check_plan_config(plan)
        super().__init__(*args, **kwargs)
        self._plugin_run = PluginRun(self, plan or PlanConfig())
        self._plugin_run.nonfinite = NonFiniteWatch(self._plugin_run, on_nonfinite)
        self._plugin_run.attach(_plugins(self))

    @property
    def plugin_run(self) -> PluginRun:
        """The plug-ins of this Trainer with their plan, counts and trace."""
        return self._plugin_run

    def preview(self, path: str | os.PathLike[str] | None = None) -> Preview:
        """What `train()` would do now: learning rate, mixture, phases, probes, steps and tokens. Changes nothing.

        Args:
            path (`str`, *optional*): a PNG file to draw it into.

        Example:

        ```python
        print(extend(trainer).preview("plan.png"))
        ```
        """
        self._plugin_run.attach(_plugins(self))
        preview = preview_of(self._plugin_run)
        if path is not None:
            preview.save(os.fspath(path))
        return preview

    # The life cycle

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        run = self._plugin_run
        run.stage.close()
        run.attach(_plugins(self))
        run.resume_from, skipped = self._resolve(resume_from_checkpoint)
        for line in skipped:
            run.say(line)
        kept, given = run.stage.kept(), run.given_optimizer
        try:
            if run.resume_from is not None and run.stage.adopt(self._read_stages(run.resume_from)):
                # In a new process, what was told of earlier stages is known from here on.
                run.attach(_plugins(self))
            if self.model_init is None:
                wrapped = self._wrap_plugin_model(self.model)
                if wrapped is not self.model:
                    self.model = self.model_wrapped = wrapped.to(self.args.device)
            if (run.plugins or run.beginning.told) and not given:
                # The host would go on with the last train()'s optimizer, moments and all.
                self.optimizer = None
            result = super().train(run.resume_from, *args, **kwargs)
            run.flush()
            return result
        except BaseException as error:
            if not run.stage.trained:
                # What did not begin is no stage: the next train() begins from what was before.
                run.stage.restore(kept)
            elif run.ranks[1] == 1:
                # Now, while data and plug-ins are those that it was trained with; several ranks may not all be here.
                run.stage.close()
            if conductor := self._conductor():
                conductor.session.interrupted(error)
            raise
        finally:
            if not given:
                # As accelerate wrapped it.
                run.made_optimizer = self.optimizer
            run.active = False
            for plugin in run.plugins:
                plugin.end()
            _host.end_workers(self)

    def _hp_search_setup(self, trial: Any) -> None:
        # Called by every train(), after model_init and before weights are loaded: here the arguments are settled.
        super()._hp_search_setup(trial)
        run = self._plugin_run
        if trial is not None:
            run.attach(_plugins(self))
        self._order_callbacks()
        run.start(run.resume_from)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        values = super().set_initial_training_values(*args, **kwargs)
        if self._plugin_run.active:
            self._plugin_run.set_length(int(values[1]), int(values[6]))
        return values

    def _resolve(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, list[str]]:
        """The checkpoint to resume from, looked through and hashed on one rank for all."""
        found: list[Any] = [None, [], None]
        if self.is_world_process_zero():
            try:
                found[:2] = checkpoint.resolve(resume_from_checkpoint, self._plugin_run.output_dir)
            except checkpoint.CheckpointError as error:
                found[2] = str(error)
        folder, skipped, refusal = broadcast_object_list(found)
        if refusal is not None:
            raise checkpoint.CheckpointError(refusal)
        return folder, skipped

    def _read_stages(self, folder: str) -> tuple[Stage, ...] | None:
        """What a checkpoint tells of its life, read on one rank for all."""
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                found[0] = read_stages(folder)
            except checkpoint.CheckpointError as error:
                found[1] = str(error)
        stages, refusal = broadcast_object_list(found)
        if refusal is not None:
            raise checkpoint.CheckpointError(refusal)
        return cast("tuple[Stage, ...] | None", stages)

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        run = getattr(self, "_plugin_run", None)
        if run is not None and run.stage.load is not None:
            # On a resume too: a checkpoint of an adapter holds the adapter alone.
            model = run.stage.load(model)
        return self._wrap_plugin_model(model)

    def _wrap_plugin_model(self, model: Any) -> Any:
        run = getattr(self, "_plugin_run", None)
        # Trainer.__init__ also calls model_init, before there are plug-ins; train() calls it again.
        for plugin in run.with_hook("wrap_model") if run else ():
            model = plugin.wrap_model(model)
        return model

    def _conductor(self) -> _Conductor | None:
        return next((cb for cb in self.callback_handler.callbacks if isinstance(cb, _Conductor)), None)

    def _order_callbacks(self) -> None:
        run = self._plugin_run
        conductors = [cb for cb in self.callback_handler.callbacks if isinstance(cb, _Conductor)]
        for callback in [*conductors, *run.plugins]:
            self.pop_callback(callback)
        for callback in [_Conductor(run), *run.plugins]:
            self.add_callback(callback)

    # Data

    def get_train_dataloader(self) -> Any:
        run = self._plugin_run
        plan = run.plan or run.build_plan()
        collator_hooks = run.with_hook("wrap_collator")
        if plan is None:
            if not collator_hooks:
                return super().get_train_dataloader()
            kept = self.data_collator
            self.data_collator = functools.reduce(lambda c, plugin: plugin.wrap_collator(c), collator_hooks, kept)
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = kept
        args = self.args
        datasets, collator = _host.strip_columns(self, [source.dataset for source in plan.sources], self.data_collator)
        collator = functools.reduce(lambda c, plugin: plugin.wrap_collator(c), collator_hooks, collator)
        dataset, sampler = run.make_loader_parts(datasets, _host.train_batch_size(self))
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=PlanCollator(
                collator, [source.name for source in plan.sources], run.setup.embeddings, run.shifts_labels
            ),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        run = self._plugin_run
        over = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        if run.active and run.resumed_at == run.step and over:
            # The host asks whether training is over only after a step: a finished run would make one more.
            self.control.should_training_stop = True
            return [], None
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._plugin_run.count(batches)
        return batches, items

    # Optimizer, schedule, loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        run = self._plugin_run
        wrapping = run.with_hook("wrap_optimizer")
        if self.optimizer is None:
            owner = run.owner("optimizer")
            if owner is not None:
                self.optimizer = owner.optimizer(args[0] if args and args[0] is not None else self.model, self.args)
            else:
                super().create_optimizer(*args, **kwargs)
            for plugin in wrapping:
                self.optimizer = plugin.wrap_optimizer(self.optimizer)
            run.made_optimizer = self.optimizer
        elif run.given_optimizer and (wrapping or self._given is not None):
            there = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
            # A second train() finds it as the first one wrapped it, with what that kept of its beginning.
            bare = self._given[1] if self._given is not None and there is self._given[0] else there
            self.optimizer = functools.reduce(lambda made, plugin: plugin.wrap_optimizer(made), wrapping, bare)
            self._given = (self.optimizer, bare) if wrapping else None
        if run.active and run.stage.fill is not None and run.resume_from is None:
            run.stage.fill(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = self._plugin_run.schedule_for(num_training_steps)
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = lambda_lr(
                self.optimizer if optimizer is None else optimizer, schedule, self.args.learning_rate
            )
            _host.claim_scheduler(self)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        in_backward = self.is_deepspeed_enabled and self.accelerator.sync_gradients
        if in_backward or getattr(self._bare_optimizer(), "updated_in_backward", False):
            # DeepSpeed and layer-wise optimizers update the weights in the backward pass.
            self._plugin_run.updated_at = self.state.global_step
        self._plugin_run.nonfinite.loss(loss)
        return loss

    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        optimizer = self._bare_optimizer()
        if getattr(optimizer, "updated_in_backward", False):
            # It leaves no gradients behind to look at, and tells their norm itself.
            norm = optimizer.gradient_norm()
        self._plugin_run.nonfinite.gradient_norm(norm)
        return norm

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        compute: Callable[..., Any] = super().compute_loss
        for plugin in self._plugin_run.with_hook("wrap_loss"):
            compute = plugin.wrap_loss(compute)
        return compute(*args, **kwargs)

    # Logging, evaluation, saving

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT sets fields of the card anew whenever the adapter is saved, which a push does first.
        self._kept_card = self._card_of_before()
        # The card of a push says what the Hub alone knows.
        token = kwargs.get("token", args[2] if len(args) > 2 else None)
        self._pushing_with = token or self.args.hub_token or ""
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._pushing_with = self._kept_card = None

    def _card_of_before(self) -> str | None:
        folder = Path(str(self.args.output_dir))
        if not self.is_world_process_zero() or not (folder / TRACE_NAME).is_file():
            return None
        from hf_pretrain_ext.hub_card.writing import kept_card

        return kept_card(folder / "README.md")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        kept = self._card_of_before() if self._kept_card is None else self._kept_card
        create = super().create_model_card
        create(*args, **kwargs)
        folder = Path(str(self.args.output_dir))
        if not self.is_world_process_zero() or not (folder / TRACE_NAME).is_file():
            return
        from hf_pretrain_ext.hub_card.writing import note_failure, put_back, write_card

        given = {**inspect.signature(create).bind(*args, **kwargs).arguments, **kwargs}
        fields = {"language": "language", "license": "license", "finetuned_from": "base_model"}
        try:
            if kept is not None:
                put_back(folder / "README.md", kept, [field for name, field in fields.items() if given.get(name)])
            write_card(folder, ask_hub=self._pushing_with is not None, token=self._pushing_with or None)
        except (ImportError, OSError, ValueError) as error:
            note_failure(error)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        run = self._plugin_run
        if run.eval_scalars:
            logs.update(run.eval_scalars)
        super().log(logs, *args, **kwargs)
        run.trace("log", scalars=logs, **({"counts": run.realised()} if run.plan else {}))
        run.flush()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        run = self._plugin_run
        run.flush_unless_log_is_due()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        run.flush()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        run = self._plugin_run
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        # Not in a search: its default objective is the sum of all metrics.
        search = self.state.is_hyper_param_search
        if prefix != "eval" or not run.active or search or run.eval_scalars is not None:
            return super().evaluate(*args, **kwargs)
        run.eval_scalars = {key: value for plugin in run.plugins for key, value in plugin.eval_metrics().items()}
        try:
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, **run.eval_scalars}
        finally:
            run.eval_scalars = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        run = getattr(self, "_plugin_run", None)
        if run is not None and run.stage.trained and not _internal_call:
            # The history goes where the weights go. Several ranks sum their counts only where all of them must be.
            if run.ranks[1] == 1 and not run.stage.ended:
                run.commit()
                run.gather_counts()
            run.write_stages(output_dir or run.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with checkpoint.reading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_converted(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        with checkpoint.reading(str(checkpoint_folder), "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint_folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None:
            self._load_converted(best)
            try:
                self._plugin_run.stage.went_back_to(self._read_stages(best))
            except checkpoint.CheckpointError as error:
                # Training is over, and its weights are worth more than their history.
                self._plugin_run.say(f"warning: {error}", logging.WARNING)

    def _load_converted(self, folder: str) -> None:
        if _host.sharding(self) == "ddp":
            load_converted(self.model, folder)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        with checkpoint.reading(str(checkpoint_folder), "rng_state.pth"):
            super()._load_rng_state(checkpoint_folder)
        self._plugin_run.remember_state()

    def _save_rng_state(self, output_dir: str) -> None:
        with self._plugin_run.rng_of_step_begin():
            super()._save_rng_state(output_dir)
        # The last file that every rank writes: after this, the manifest finds them all.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The host pickles its arguments beside the weights, and pushes them.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = self._plugin_run
        if run.updated_at == self.state.global_step:
            # On SIGTERM, inside a step whose update cannot be undone: what is saved is that step's end.
            self.control.should_save = True
            return
        run.prepare_save()
        folder = _host.checkpoint_folder(self, trial)
        write = self.state.save_to_json

        def write_with_ours(path: str) -> None:
            write(path)
            run.save(os.path.dirname(path))

        # The one moment after all of the host's files and before its push and its rotation of old checkpoints.
        cast(Any, self.state).save_to_json = write_with_ours
        try:
            if self.args.should_save:
                checkpoint.invalidate(folder)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not checkpoint.is_writing_failure(error):
                raise
            raise checkpoint.CheckpointError(checkpoint.writing_failure(folder, error)) from error
        finally:
            del self.state.save_to_json


def _plugins(trainer: Any) -> list[TrainerPlugin]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainerPlugin)]


_EXTENDED: dict[type, type] = {}


def _extended(base: type) -> type:
    """The subclass of `base` that plug-ins can reach into; one for each `base`."""

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__dict__

    if base not in _EXTENDED:
        body = {"__module__": __name__, "__reduce_ex__": reduce}
        _EXTENDED[base] = type(f"Plugin{base.__name__}", (PluginTrainerMixin, base), body)
    return _EXTENDED[base]


def _rebuild(base: type) -> Any:
    # The class is made at run time, so a pickle names the class it was made from.
    return object.__new__(_extended(base))


def extend(
    trainer: T,
    *callbacks: TrainerCallback | type[TrainerCallback],
    plan: PlanConfig | None = None,
    on_nonfinite: Action | None = None,
) -> T:
    """Lets the plug-ins among a Trainer's callbacks do more than a callback can. Returns the same object.

    The trainer is given a subclass of its own class; nothing is patched globally, and `isinstance` still holds. All
    problems of the set-up are reported in one error, before anything is touched. Calling it again is harmless, and
    adds the callbacks given.

    Args:
        trainer (`transformers.Trainer`): or a subclass: `Seq2SeqTrainer`, TRL's `SFTTrainer`, one of your own.
        callbacks (`TrainerCallback`): more callbacks to add.
        plan ([`PlanConfig`], *optional*): order, seed and window of the sample plan.
        on_nonfinite (`str`, *optional*, defaults to `"report"`): what to do about a loss or gradients that are NaN or
            infinite. They are always reported and traced, with the step and the rows that were read; `"skip"` leaves
            that update out, `"stop"` leaves it out, saves if saving is on, and ends training.

    Raises:
        [`PluginError`]: all that is wrong with the plug-ins in this set-up.
        `TypeError`: `trainer` is not a Trainer, a callback not a callback, or `plan` not a [`PlanConfig`].

    Example:

    >>> from hf_pretrain_ext import extend
    >>> extend("not a trainer")
    Traceback (most recent call last):
    TypeError: extend needs a transformers.Trainer (or a subclass), got str
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"extend needs a transformers.Trainer (or a subclass), got {type(trainer).__name__}")
    _check_plan_config(plan)
    made = list(_instances(callbacks))
    there = trainer.callback_handler.callbacks
    fresh = [callback for callback in made if not any(callback is other for other in there)]
    known = getattr(trainer, "_plugin_run", None)
    run = known or PluginRun(trainer, PlanConfig())
    kept = run.plan_config, run.nonfinite
    run.plan_config = plan or run.plan_config
    try:
        if on_nonfinite is not None:
            run.nonfinite = NonFiniteWatch(run, on_nonfinite)
        run.attach([*_plugins(trainer), *(callback for callback in fresh if isinstance(callback, TrainerPlugin))])
    except Exception:
        run.plan_config, run.nonfinite = kept
        raise
    if not isinstance(trainer, PluginTrainerMixin):
        trainer.__class__ = _extended(type(trainer))
    cast(Any, trainer)._plugin_run = run
    for callback in fresh:
        trainer.add_callback(callback)
    return trainer


def _check_plan_config(plan: Any) -> None:
    if plan is not None and not isinstance(plan, PlanConfig):
        fix = "PlanConfig(**plan)" if isinstance(plan, dict) else "PlanConfig(order='original'), say"
        raise TypeError(f"plan must be a PlanConfig, got {shown(plan)}. Pass {fix}")


def _instances(callbacks: tuple[Any, ...]) -> Iterator[TrainerCallback]:
    for callback in callbacks:
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise TypeError(f"extend takes callbacks after the trainer, got {type(made).__name__}")
        yield made
