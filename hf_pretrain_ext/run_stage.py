"""A run as one stage of a model's life: how it began, and what is recorded of it for those that come after."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hf_pretrain_ext import checkpoint, data, sources
from hf_pretrain_ext.anchored import bare
from hf_pretrain_ext.loading import is_sharded, weight_files
from hf_pretrain_ext.regularise import weights_digest
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.stages import (
    STAGES_NAME,
    Beginning,
    SeenSource,
    Stage,
    rate_line,
    schedule_record,
    stages_json,
    write_stages,
)
from hf_pretrain_ext.trace import versions

if TYPE_CHECKING:
    from hf_pretrain_ext.run import PluginRun

__all__ = ["RunStage", "life_of_model", "remember_life", "revision_of"]


class RunStage:
    """What one [`PluginRun`] knows of the stages before it, and what it tells of its own.

    `load` is what `continue_from` leaves to be done whenever `model_init` made a new model, `fill` what it leaves to
    be done with a new optimizer; both are None where nothing is.
    """

    def __init__(self, run: PluginRun):
        self.run = run
        self.beginning = Beginning()
        self.load: Any = None
        self.fill: Any = None
        self.trained = False
        self._started: str | None = None
        self._final: Stage | None = None
        self._best: tuple[Stage, ...] | None = None
        self._dataset: Any = None
        self.warning: str | None = None
        self._looked_up: dict[str, Any] = {}

    # Beginning

    def set(self, beginning: Beginning, load: Any = None, fill: Any = None) -> None:
        """A stage that `continue_from` begins, in place of whatever this run was."""
        self.beginning, self.load, self.fill = beginning, load, fill
        self.trained, self._started, self._final, self._best = False, None, None, None

    def kept(self) -> dict[str, Any]:
        """What [`restore`](RunStage.restore) puts back, where a stage could not begin."""
        return dict(vars(self))

    def restore(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept)

    def adopt(self, stages: Sequence[Stage] | None) -> bool:
        """Takes over the stages that a checkpoint tells of, for a resume; returns whether anything changes by that.

        Where `continue_from` was called before the resume, it stays in charge: what differs is refused later.
        """
        if not stages:
            return False
        self._started = stages[-1].dates.get("started")
        if self.beginning.told:
            return False
        self.trained = False
        self.beginning = Beginning.of(stages)
        return self.beginning.told

    def begin(self, resumed: bool) -> None:
        """Called before a run is set up anew, while it still holds what an earlier `train()` left."""
        self.warning = None
        if not resumed:
            if self.trained and self.run.trainer.model_init is None:
                # A second train() goes on from the weights of the first, and knows as much of what was before.
                told = self.beginning.told
                self.beginning = Beginning(self.life(), carry=("weights",) if told else (), told=told)
                self.load = self.fill = None
                self._note_checkpoints()
            self._started = None
        # Of a resume, too, nothing is trained before the weights of the checkpoint are in the model.
        self.trained = False
        self._looked_up, self._final, self._best = {}, None, None
        self._dataset = self.run.trainer.train_dataset
        self._started = self._started or _now()
        if not self.beginning.earlier and not self.beginning.told:
            self.beginning = Beginning(tuple(_base_of(self.run.trainer.model)))

    def _note_checkpoints(self) -> None:
        there = checkpoint.checkpoints_in(self.run.output_dir)
        if there and self.run.trainer.args.save_strategy != "no":
            self.warning = (
                f"warning: {self.run.output_dir} holds {there[-1].name} of an earlier stage. A second train() counts "
                "its steps from 0 again, and its checkpoints would replace those of the same number: give it an "
                "output_dir of its own (trainer.args.output_dir) to keep both"
            )

    def lines(self) -> list[str]:
        """What this stage is, and how its learning rate goes on from that of the last."""
        run, args = self.run, self.run.trainer.args
        host = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        return [
            self.beginning.describe(),
            rate_line(self.beginning, run.lr_schedule, float(args.learning_rate), host),
        ]

    def identity(self) -> dict[str, Any] | None:
        return self.beginning.identity()

    def brief(self) -> dict[str, Any]:
        """For the head of a trace."""
        began = self.beginning
        return {
            "number": began.number,
            "name": began.name,
            "kind": began.kind,
            "parent": began.parent,
            "earlier": [
                {
                    **{
                        key: getattr(stage, key)
                        for key in ("number", "name", "kind", "steps", "tokens", "rate", "phase")
                    },
                    "sources": {source.name: source.tokens for source in stage.sources},
                }
                for stage in began.earlier
            ],
        }

    # Recording

    def all(self) -> tuple[Stage, ...]:
        """The life of the model up to now, this stage last."""
        return (*self.beginning.earlier, self.record())

    def life(self) -> tuple[Stage, ...]:
        """The same once it is over: up to the best checkpoint, where its weights were loaded at the end."""
        return self._best or (*self.beginning.earlier, self._final or self.record())

    def record(self) -> Stage:
        run, began = self.run, self.beginning
        trainer = run.trainer
        seen = self._seen()
        tokens = [source.tokens for source in seen]
        optimizer = bare(trainer.optimizer)
        reader = trainer.processing_class
        return Stage(
            number=began.number,
            name=began.name,
            kind=began.kind,
            begun_by="continue_from" if began.told else "train",
            parent=began.parent,
            carry=began.carry,
            anneal=began.anneal,
            steps=run.step,
            total_steps=run.total_steps or None,
            global_batch=run.global_batch,
            seed=run.plan.seed if run.plan else int(trainer.args.seed),
            samples=_total([source.samples for source in seen]),
            tokens=_total(tokens),
            schedule=self._schedule(),
            optimizer=type(optimizer).__name__ if optimizer is not None else None,
            tokenizer=self._once("tokenizer", lambda: _vocabulary(reader)),
            sources=tuple(seen),
            plugins={plugin.name: plugin.settings() for plugin in run.plugins},
            recorded={plugin.name: kept for plugin in run.plugins if (kept := plugin.recorded())},
            versions=versions(),
            dates={"started": self._started, "saved": _now()},
        )

    def json(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint: content by name of file."""
        self.trained = True
        return {STAGES_NAME: stages_json(self.all())}

    def end(self) -> None:
        """Every rank calls it once a stage is over and its counts are gathered."""
        self._final = self.record()
        remember_life(self.run.trainer.model, self.life())

    @property
    def ended(self) -> bool:
        return self._final is not None

    def close(self) -> None:
        """Before another stage begins: takes in what a training that was interrupted has counted. On every rank."""
        if self.trained and self._final is None:
            self.run.commit()
            self.run.gather_counts()
            self.end()

    def went_back_to(self, best: Sequence[Stage] | None) -> None:
        """The weights are those of a checkpoint that tells of these stages."""
        self._best = tuple(best) if best else None

    def write(self, folder: str | Path, with_weights: bool = True) -> None:
        """Beside the weights that training ended with, or where others may lie."""
        write_stages(folder, self.life(), () if with_weights else weight_files(Path(folder)))

    def _schedule(self) -> dict[str, Any] | None:
        run, last = self.run, self.beginning.last
        if run.lr_schedule is not None:
            went_on = last is not None and (
                self.beginning.anneal is not None or [phase.name for phase in run.lr_schedule.phases] == ["constant"]
            )
            return schedule_record(run.lr_schedule, run.step, peak=last.peak if went_on and last else None)
        scheduler, args = run.trainer.lr_scheduler, run.trainer.args
        if not hasattr(scheduler, "get_last_lr"):
            return None
        bases = list(getattr(scheduler, "base_lrs", ()))
        main = bases.index(args.learning_rate) if args.learning_rate in bases else 0
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        return schedule_record(None, run.step, float(scheduler.get_last_lr()[main]), float(args.learning_rate), name)

    def _seen(self) -> list[SeenSource]:
        run = self.run
        if run.plan is None:
            return [self._without_plan()]
        realised, sources = run.realised(), {source.name: source for source in run.plan.sources}
        # A plug-in may add sources to the training data; where there is none, these are what it was made into.
        views = [] if "train" in sources else [name for name, source in sources.items() if not source.replayed]
        found = []
        if views:
            # What a plug-in made of the training data (behind metadata, say) is no text to replay as it stands.
            found.append(
                SeenSource(
                    name=self.beginning.name,
                    rows=_total([sources[name].num_rows for name in views]),
                    **{
                        what: _total([realised[name][what] for name in views])
                        for what in ("samples", "tokens", "loss_tokens")
                    },
                    **{**self._origin("train", self._dataset), "place": None},
                )
            )
        for name, source in sources.items():
            if name in views:
                continue
            found.append(
                SeenSource(
                    name=self.beginning.name if name == "train" else name,
                    rows=source.num_rows,
                    replayed=source.replayed,
                    order=source.order,
                    key=source.key or name,
                    **{what: realised[name][what] for what in ("samples", "tokens", "loss_tokens")},
                    **self._origin(name, source.dataset),
                )
            )
        return found

    def _without_plan(self) -> SeenSource:
        """What the host's own sampler has read: samples by its epochs, tokens from the mean of rows."""
        run = self.run
        dataset = self._dataset
        samples = run.step * run.global_batch
        rows = len(dataset) if data.is_map_style(dataset) else None
        if rows and run.steps_per_epoch:
            passes, steps = divmod(run.step, run.steps_per_epoch)
            # The last batch of an epoch holds what is left.
            an_epoch = min(rows, run.steps_per_epoch * run.global_batch)
            samples = passes * an_epoch + min(steps * run.global_batch, an_epoch)
        mean, exact = self._once("mean", lambda: self._mean_tokens(dataset)) if rows else (None, False)
        tokens = None if mean is None else round(samples * mean)
        name = self.beginning.name
        origin = self._origin("train", dataset)
        return SeenSource(name, rows, samples=samples, tokens=tokens, tokens_exact=exact, **origin)

    def _mean_tokens(self, dataset: Any) -> tuple[float | None, bool]:
        with rng_guard(seed=0):
            lengths = data.row_lengths(dataset, getattr(self.run.trainer.args, "length_column_name", None))
            if lengths is not None and len(lengths):
                return float(lengths.mean()), bool(lengths.min() == lengths.max())
            return data.mean_tokens(dataset), False

    def _origin(self, name: str, dataset: Any) -> dict[str, Any]:
        """What identifies the rows of a source, and where they are."""

        def look() -> dict[str, Any]:
            known = self.run.fingerprints.get(name) or sources.identified(dataset)
            place = sources.place_of(dataset, known)
            return {"fingerprint": known, "hub": sources.hub_origin(dataset), "place": place}

        found: dict[str, Any] = self._once(f"source {name}", look)
        return found

    def _once(self, what: str, look: Callable[[], Any]) -> Any:
        """What is the same at every save of a run, and takes time to find out."""
        if what not in self._looked_up:
            self._looked_up[what] = look()
        return self._looked_up[what]


_LIVES: WeakKeyDictionary[Any, tuple[str, tuple[Stage, ...]]] = WeakKeyDictionary()
"""By model, what is known of its life, and a hash of the weights of which that is true."""


def remember_life(model: Any, stages: Sequence[Stage]) -> None:
    """For a new stage with another trainer in the same process."""
    if not is_sharded(model):
        _LIVES[model] = weights_digest(model), tuple(stages)


def life_of_model(model: Any) -> tuple[Stage, ...] | None:
    """The stages that a model went through in this process; None if its weights are not what they left behind."""
    if is_sharded(model) or model not in _LIVES:
        return None
    digest, stages = _LIVES[model]
    return stages if digest == weights_digest(model) else None


def _base_of(model: Any) -> list[Stage]:
    """The model that a first stage began with, where it has a name: what was before is not known."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return []
    # Only now: from another working folder, runs/base looks like a name on the Hub.
    local = os.path.isdir(name)
    return [Stage(0, "base", kind="unknown", base={"path": name, "revision": revision_of(model), "local": local})]


def revision_of(model: Any) -> str | None:
    """The commit of the Hub's repository that a model was loaded from."""
    name = getattr(model, "name_or_path", None)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return commit if isinstance(commit, str) and isinstance(name, str) and not os.path.isdir(name) else None


def _vocabulary(reader: Any) -> str | None:
    if reader is None or not hasattr(getattr(reader, "tokenizer", reader), "get_vocab"):
        return None
    return data.tokenizer_fingerprint(reader)


def _total(values: Sequence[Any]) -> Any:
    return None if None in values or not values else sum(values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
