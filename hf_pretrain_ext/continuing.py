"""`continue_from` and `anneal`: a new stage of a model's life, from where an earlier one left it."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from hf_pretrain_ext import _host, checkpoint
from hf_pretrain_ext.base_model import FETCHED, Base, look_up, settings_that_differ
from hf_pretrain_ext.checkpoint import STATE_FOLDER, CheckpointError
from hf_pretrain_ext.data import tokenizer_fingerprint
from hf_pretrain_ext.loading import (
    carry_optimizer,
    fits,
    is_adapter,
    is_sharded,
    load_weights,
    missing_names,
    others_below,
    state_of,
)
from hf_pretrain_ext.nonfinite import Action
from hf_pretrain_ext.rng import get_rng_state, set_rng_state
from hf_pretrain_ext.run import PluginRun
from hf_pretrain_ext.run_stage import life_of_model, remember_life, revision_of
from hf_pretrain_ext.stages import STAGES_NAME, Beginning, Stage, check_name, read_stages
from hf_pretrain_ext.structure import Structure
from hf_pretrain_ext.trainer import PlanConfig, extend
from hf_pretrain_ext.units import to_point, to_rate
from hf_pretrain_ext.values import reason, shown

__all__ = ["anneal", "continue_from"]

T = TypeVar("T", bound=Trainer)

CARRIED = ("weights", "optimizer")
SHAPES = ("exponential", "linear", "cosine")


def continue_from(
    trainer: T,
    checkpoint_or_model: Any,
    carry: Iterable[str] = ("weights",),
    name: str | None = None,
    *,
    revision: str | None = None,
    plan: PlanConfig | None = None,
    on_nonfinite: Action | None = None,
) -> T:
    """
    Begins a new stage: old weights, new data, counters, schedule and plan of its own. Returns the trainer, extended.

    The trainer's optimizer, scheduler and counters are dropped. Plug-ins are told of the stages before: a
    `RewarmCallback` of an infinite schedule goes on at the constant rate that the last stage ended with,
    `ReplayCallback(from_history=True)` replays what earlier stages read, and `ForgettingCallback` measures over the
    whole life. What is known of that life lies in `stages.json` of checkpoints and output folders.

    To go on with an interrupted run is something else: `train(resume_from_checkpoint=...)`. A script that begins with
    `continue_from` and then resumes does the right thing.

    Args:
        trainer (`transformers.Trainer`): with the data and plug-ins of the new stage, extended or not. Its
            `output_dir` is another one than that of the stage before, whose checkpoints would mix with its own.
        checkpoint_or_model (`str`, `Path` or `torch.nn.Module`): a checkpoint of a run with plug-ins (verified as a
            resume does), any other folder with a model in safetensors, the name of one on the Hub, or a model. Of
            those without a history, config and card are read, and what is not known is said.
        carry (`tuple[str, ...]`, *optional*, defaults to `("weights",)`): what comes along: `"weights"`, and
            `"optimizer"` for the moments (not its rates or other settings). Ibrahim et al. (2024) reset Adam's states
            at every boundary. `()` takes the history alone, for a model that was loaded from there already.
        name (`str`, *optional*): of the new stage, and of its data in later ones; `"stage-2"` and so on by default.
        revision (`str`, *optional*): of a model on the Hub.
        plan ([`PlanConfig`], *optional*), on_nonfinite (`str`, *optional*): as those of [`extend`], which cannot come
            before where a plug-in needs the history (`from_history=True`).

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: an incomplete checkpoint, weights that do not fit, another
            vocabulary.
        [`PluginError`]: all that is wrong with the plug-ins in this stage.
        `ValueError` or `TypeError`: an argument out of range.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=german, callbacks=[
        RewarmCallback(3e-4, schedule="infinite_cosine"), ReplayCallback(from_history=True, ratio=0.25),
    ])
    continue_from(trainer, "runs/english/checkpoint-1000", name="german").train()
    ```
    """
    carry = checked_carry(carry)
    origin = _origin(trainer, checkpoint_or_model, revision)
    if name is not None:
        check_name(name, origin.stages)
    began = Beginning(origin.stages, given_name=name, parent=origin.parent, carry=carry, told=True)
    _begin(trainer, origin, began, plan, on_nonfinite)
    last = origin.stages[-1]
    lines = origin.base.lines() if origin.base else []
    if last.annealed:
        lines.append(_about_annealed(last, origin))
    _say(trainer, lines, logging.WARNING if last.annealed else logging.INFO)
    return trainer


def anneal(
    trainer: T,
    checkpoint: Any,
    steps: int | str,
    shape: str = "exponential",
    min_lr: float | str = "10%",
    name: str | None = None,
    *,
    plan: PlanConfig | None = None,
    on_nonfinite: Action | None = None,
) -> T:
    """
    Begins a branch to deploy: weights and moments of a checkpoint, its last learning rate taken down in `steps` steps.

        lr(t) = last · (min/last)^(t/steps)        exponential, as in infinite schedules (Ibrahim et al., 2024)

    The checkpoint is only read, so that the run that wrote it can still be resumed or continued from there. The branch
    is recorded as one in `stages.json`; to train on, continue from the checkpoint and not from the branch.

    Args:
        trainer (`transformers.Trainer`): with the data of the branch and an `output_dir` of its own. Its `max_steps`
            becomes `steps`; a `RewarmCallback` among its plug-ins leaves the rate to the branch.
        checkpoint (`str` or `Path`): of a run with plug-ins, such as one in the constant phase.
        steps (`int` or `str`): length of the branch, also as `"500 steps"` or `"1B tokens"`.
        shape (`str`, *optional*, defaults to `"exponential"`): `"exponential"`, `"linear"` or `"cosine"`.
        min_lr (`float` or `str`, *optional*, defaults to `"10%"`): the last rate, absolute or relative to the peak of
            the schedule that the checkpoint stood in.
        name (`str`, *optional*): of the branch; `"anneal-2"` and so on by default.
        plan ([`PlanConfig`], *optional*), on_nonfinite (`str`, *optional*): as those of [`extend`].

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`], [`PluginError`], `ValueError`, `TypeError`: as
            [`continue_from`]; also a rate that is at its end already or not known.

    Example:

    ```python
    branch = Trainer(model=model, args=args, train_dataset=german)
    anneal(branch, "runs/german/checkpoint-1000", steps=150).train()
    ```
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}, got {shown(shape)}")
    _check_trainer(trainer)
    if not trainer.args.learning_rate > 0:
        raise ValueError(f"learning_rate of the arguments must be positive, got {shown(trainer.args.learning_rate)}")
    length = _length(trainer, steps)
    origin = _origin(trainer, checkpoint, None)
    if _host.has_own_scheduler(trainer) or _host.deepspeed_owns(trainer, "scheduler"):
        raise ValueError("the trainer has a scheduler of its own, which would win. Build it without one")
    if name is not None:
        check_name(name, origin.stages)
    last = origin.stages[-1]
    if last.rate is None or last.kind == "unknown":
        raise ValueError(
            f"at which learning rate {origin.text} stopped is not known. Use continue_from and "
            "RewarmCallback(peak_lr=..., schedule='linear', warmup=0) instead"
        )
    low = to_rate(min_lr, last.peak or last.rate, "min_lr")
    if low >= last.rate or (shape == "exponential" and low <= 0):
        before = _before_anneal(last, origin)
        advice = f" A checkpoint before its anneal is {before}." if before else ""
        least = "above 0 and " if shape == "exponential" else ""
        raise ValueError(
            f"min_lr={shown(min_lr)} is a rate of {low:.4g}, which must be {least}below the last one, "
            f"{last.rate:.4g}: there is nothing to anneal.{advice}"
        )
    began = Beginning(
        origin.stages,
        kind="anneal",
        given_name=name,
        parent=origin.parent,
        carry=CARRIED,
        anneal={"steps": length, "shape": shape, "first": last.rate, "last": low},
        told=True,
    )
    kept, trainer.args.max_steps = trainer.args.max_steps, length
    try:
        _begin(trainer, origin, began, plan, on_nonfinite)
    except BaseException:
        trainer.args.max_steps = kept
        raise
    return trainer


def _length(trainer: Any, steps: Any) -> int:
    in_tokens = isinstance(steps, str) and "token" in steps
    per_step = PluginRun(trainer, PlanConfig()).setup.tokens_per_step if in_tokens else None
    length, fraction = to_point(steps, "steps", per_step)
    if fraction or length < 1:
        raise ValueError(f"steps must be at least one step, such as 500 or '500 steps', got {shown(steps)}")
    return length


def checked_carry(carry: Any) -> tuple[str, ...]:
    given = (carry,) if isinstance(carry, str) or not isinstance(carry, Iterable) else tuple(carry)
    unknown = [part for part in given if part not in CARRIED]
    if unknown or len(set(given)) != len(given) or given == ("optimizer",):
        raise ValueError(
            f"carry must be ('weights',), ('weights', 'optimizer') or (), got {shown(carry)}: moments belong to "
            "weights"
        )
    return tuple(part for part in CARRIED if part in given)


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer (or a subclass), got {type(trainer).__name__}")


# Where it comes from


@dataclass
class Origin:
    """What a stage begins with. `state` is that of a model object, `base` what is known where there is no history."""

    text: str
    folder: Path | None
    files: list[Path]
    stages: tuple[Stage, ...]
    parent: dict[str, Any]
    base: Base | None = None
    model: Any = None
    ours: bool = False


def _origin(trainer: Any, given: Any, revision: str | None) -> Origin:
    _check_trainer(trainer)
    if isinstance(given, torch.nn.Module):
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} is for a name on the Hub, and a model was passed")
        return _from_model(trainer, given)
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise TypeError(
            f"checkpoint_or_model must be a folder, the name of a model on the Hub or a model, got {shown(given)}"
        )
    # One rank looks and hashes, all agree.
    found: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        try:
            found[0] = _from_folder(os.fspath(given), revision)
        except Exception as error:  # the other ranks wait for what this one found, whatever it is
            ours = type(error) in (CheckpointError, ValueError)
            found[1] = error if ours else CheckpointError(f"{os.fspath(given)} cannot be read ({reason(error)})")
            with suppress(Exception):
                found[1] = _or_resume(found[1], trainer)
    origin, refusal = broadcast_object_list(found)
    if refusal is not None:
        raise refusal
    there = origin.folder is None or origin.folder.is_dir()
    if lacking := [rank for rank, is_there in enumerate(_gathered(trainer, there)) if not is_there]:
        raise CheckpointError(
            f"{origin.text} is {origin.folder} on the first rank, and not to be seen by rank {lacking[0]}: put it "
            "where all nodes see it, or under the same path on each"
        )
    return cast(Origin, origin)


def _or_resume(error: Exception, trainer: Any) -> Exception:
    """A stage under way needs the checkpoint that it began with no more."""
    newest, _ = checkpoint.last_complete_checkpoint(trainer.args.output_dir or "")
    if newest is None or read_stages(newest) is None:
        return error
    return type(error)(
        f"{error}. To finish the stage that {newest} is of, leave continue_from out: extend(trainer), then "
        "train(resume_from_checkpoint=True)"
    )


def _from_model(trainer: Any, model: Any) -> Origin:
    run = getattr(trainer, "_plugin_run", None)
    text = getattr(model, "name_or_path", None) or type(model).__name__
    if model is trainer.model and run is not None:
        run.stage.close()
    stages = life_of_model(model)
    if stages is not None:
        return Origin(text, None, [], stages, {"path": None, "step": stages[-1].steps}, model=model)
    folder = Path(text) if os.path.isdir(text) else None
    base = look_up(folder, str(text), revision_of(model), model)
    histories = (STAGES_NAME, f"{STATE_FOLDER}/{STAGES_NAME}")
    if folder is not None and any((folder / name).is_file() for name in histories):
        advice = f"continue_from(trainer, {text!r}, carry=())"
        _say(trainer, [f"{text} has a history, which a model object does not bring: {advice}"], logging.WARNING)
    return Origin(text, None, [], (base.stage(),), {"path": text, "step": None}, base, model)


def _from_folder(given: str, revision: str | None) -> Origin:
    from hf_pretrain_ext.base_model import find_folder, read_life

    folder, found_revision = find_folder(given, revision)
    # train() may find itself in another working folder.
    folder = folder.absolute()
    fetched = None if os.path.isdir(given) else FETCHED
    files, stages, step, ours = read_life(folder, given, fetched)
    base = None
    if stages is None:
        base = look_up(folder, given, found_revision)
        stages = (base.stage(),)
    parent: dict[str, Any] = {"path": given, "step": step}
    if fetched is None and not os.path.isabs(given):
        # Another process may look for it from another working folder.
        parent["folder"] = str(folder)
    return Origin(given, folder, files, stages, parent, base, ours=ours)


def _before_anneal(last: Stage, origin: Origin) -> str | None:
    """The newest checkpoint of a rate that had not come down yet, if there is one."""
    if last.kind == "anneal":
        parent = last.parent or {}
        return next((each for key in ("folder", "path") if (each := parent.get(key)) and Path(each).is_dir()), None)
    start = last.anneal_start
    if start is None or origin.folder is None:
        return None
    for folder in (origin.folder, origin.folder.parent):
        numbered = [(int(p.name.rpartition("-")[2]), p) for p in checkpoint.checkpoints_in(folder)]
        before = [pair for pair in numbered if pair[0] <= start]
        if before:
            return str(max(before)[1])
    return None


def _about_annealed(last: Stage, origin: Origin) -> str:
    before = _before_anneal(last, origin)
    line = f"warning: stage {last.number} ({last.name}) ended annealed, at a rate of {last.rate:.4g}: to learn on, "
    line += "the rate has to be re-warmed. "
    if before:
        return f"{line}The newest checkpoint before its anneal is {before}: continue_from(trainer, {before!r})"
    was = (last.parent or {}).get("path") if last.kind == "anneal" else None
    if was:
        return f"{line}The checkpoint that it branched from, {was}, is not there"
    return f"{line}No checkpoint from before its anneal is left"


# Beginning


def _begin(
    trainer: Any, origin: Origin, began: Beginning, plan: PlanConfig | None, on_nonfinite: Action | None
) -> None:
    """Checks the whole, then loads, then drops what an earlier training left; on an error nothing was changed."""
    _check_output_dir(trainer, origin, began)
    _check_vocabulary(trainer, origin)
    _check_leftovers(trainer, began)
    fill = _filling(trainer, origin, began)
    known = getattr(trainer, "_plugin_run", None)
    run = known or PluginRun(trainer, PlanConfig())
    kept = run.stage.kept()
    load = functools.partial(_load, trainer, origin, began.carry)
    run.stage.set(began, fill=fill)
    trainer._plugin_run = run
    try:
        extend(trainer, plan=plan, on_nonfinite=on_nonfinite)
        _check_sources(run, began)
        if trainer.model_init is None:
            model = load(trainer.model)
            if model is not trainer.model:
                trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
        else:
            # The model is made anew by every train().
            run.stage.load = load
            if origin.model is not None:
                origin.model = state_of(origin.model)
    except BaseException:
        run.stage.restore(kept)
        if known is None and not hasattr(type(trainer), "plugin_run"):
            del trainer._plugin_run
        raise
    if not run.given_optimizer:
        trainer.optimizer = trainer.callback_handler.optimizer = None
    if not _host.has_own_scheduler(trainer):
        trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
    trainer.state = TrainerState(
        is_local_process_zero=trainer.is_local_process_zero(),
        is_world_process_zero=trainer.is_world_process_zero(),
        stateful_callbacks=[
            cast(Any, each)
            for each in [*trainer.callback_handler.callbacks, trainer.control]
            if isinstance(each, ExportableState)
        ],
    )


def _check_sources(run: PluginRun, began: Beginning) -> None:
    """The training data is called as the stage is."""
    labels = [label for plugin in run.plugins for label in plugin.training_data(run.setup)]
    if began.name in labels:
        raise ValueError(
            f"name={began.name!r} is also that of data that the stage replays, and later stages could not tell them "
            "apart. Call one of them otherwise"
        )


def _check_output_dir(trainer: Any, origin: Origin, began: Beginning) -> None:
    if not trainer.args.output_dir:
        return
    _check_no_other_stage(trainer, began)
    if origin.folder is None:
        return
    output = os.path.realpath(trainer.args.output_dir)
    folder = os.path.realpath(origin.folder)
    if output in (folder, os.path.dirname(folder) if checkpoint.checkpoint_step(folder) is not None else folder):
        raise ValueError(
            f"output_dir={shown(trainer.args.output_dir)} is where {origin.text} lies: steps are counted from 0 "
            "again, so that checkpoints of the two stages would mix and replace each other. Give the new stage an "
            "output_dir of its own"
        )


def _check_no_other_stage(trainer: Any, began: Beginning) -> None:
    """A script that resumes a stage begins it again, in the same folder; another stage belongs in another."""
    for folder in reversed(checkpoint.checkpoints_in(trainer.args.output_dir)):
        held = read_stages(folder)
        if held is None:
            continue
        if Beginning.of(held).identity() != json.loads(json.dumps(began.identity())):
            other = held[-1].name
            which = f"the stage {other!r}" if other != began.name else f"another stage {other!r}, begun otherwise"
            raise ValueError(
                f"output_dir={shown(trainer.args.output_dir)} holds {folder.name} of {which}, with whose checkpoints "
                f"those of {began.name!r} would mix. Give the new stage an output_dir of its own"
            )


def _check_vocabulary(trainer: Any, origin: Origin) -> None:
    """Other texts for the same ids would be other data to the weights."""
    reader, last = trainer.processing_class, origin.stages[-1]
    if reader is None or not hasattr(getattr(reader, "tokenizer", reader), "get_vocab"):
        return
    ours = tokenizer_fingerprint(reader)
    if ours == last.tokenizer:
        return
    theirs = _vocabulary(origin.folder)
    if theirs is None and last.tokenizer is None:
        return
    mine = getattr(reader, "tokenizer", reader).get_vocab()
    if theirs is not None:
        moved = [token for token, number in theirs.items() if mine.get(token) != number]
        if not moved:
            if len(mine) > len(theirs):
                _say(
                    trainer, [f"the tokenizer has {len(mine) - len(theirs):,} tokens that {origin.text} did not know"]
                )
            return
        example = f" ({shown(moved[0])} was {theirs[moved[0]]} and is {mine.get(moved[0], 'not there')})"
        what = f"{len(moved):,} of {len(theirs):,} tokens have another id{example}"
    else:
        what = "its fingerprint differs"
    raise CheckpointError(
        f"{origin.text} was trained with another tokenizer than the trainer's processing_class: {what}, so that the "
        "weights would read other texts. Use the tokenizer that it was trained with; new tokens may be added to it "
        "(`fit_embeddings`)"
    )


def _vocabulary(folder: Path | None) -> dict[str, int] | None:
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab())
    except Exception:  # a tokenizer of a class that is not known here says nothing
        return None


def _check_leftovers(trainer: Any, began: Beginning) -> None:
    """Moments, counts and engines of an earlier training that cannot be dropped."""
    run = getattr(trainer, "_plugin_run", None)
    given = run.given_optimizer if run is not None else trainer.optimizer is not None
    holds = given and any(getattr(trainer.optimizer, "optimizer", trainer.optimizer).state.values())
    if holds and "optimizer" not in began.carry:
        raise ValueError(
            "the trainer's optimizer was given to it, or made before it was extended, and holds the moments of an "
            "earlier training. Make a new Trainer for the new stage"
        )
    scheduler = trainer.lr_scheduler
    if _host.has_own_scheduler(trainer) and getattr(scheduler, "last_epoch", 0) > 0:
        raise ValueError(
            f"the scheduler that the trainer was given has counted {scheduler.last_epoch:,} steps. Make a new Trainer "
            "for the new stage"
        )
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise ValueError("DeepSpeed keeps weights of its own of an earlier train(). Make a new Trainer")


def _filling(trainer: Any, origin: Origin, began: Beginning) -> Callable[[Any], None] | None:
    """What puts the moments into the new optimizer, once there is one."""
    if "optimizer" not in began.carry:
        return None
    branch = began.kind == "anneal"
    stage = "begin a stage from its weights: continue_from, with RewarmCallback(schedule='linear', warmup=0)"
    without = stage if branch else "leave 'optimizer' out of carry"
    if not origin.ours or origin.folder is None:
        raise CheckpointError(
            f"{origin.text} is no checkpoint of a run with plug-ins, so that it has no moments to carry. Name one "
            f"(checkpoint-N), or {without}"
        )
    if _host.sharding(trainer) != "ddp":
        raise ValueError(
            f"moments cannot be carried under {_host.sharding(trainer)}, whose optimizer states are split over ranks. "
            f"Train with DDP, or {without}"
        )
    checkpoint.check_listed(origin.folder, "optimizer.pt", what="carry the moments of")
    if not (origin.folder / "optimizer.pt").is_file():
        raise CheckpointError(
            f"of {origin.text} the Hub's files were fetched without its moments. Fetch it whole with "
            "huggingface_hub.snapshot_download and pass that folder"
        )
    return functools.partial(carry_optimizer, folder=origin.folder, was=origin.stages[-1].optimizer)


def _load(trainer: Any, origin: Origin, carry: tuple[str, ...], model: Any) -> Any:
    """Loads weights into a model, on all ranks or none; returns it, wrapped where it had to be to fit."""
    if "weights" not in carry or (origin.model is not None and origin.model is model):
        return model
    before, drawn = Structure(model, *trainer.plugin_run.with_hook("wrap_model")), get_rng_state()
    wrapped, notes = model, list[str]()
    error = None
    try:
        wrapped, notes = _loaded(trainer, origin, model)
    except CheckpointError as refusal:
        error = str(refusal)
    # The first rank that could not says why, for all.
    failed = [text for text in _gathered(trainer, error) if text is not None]
    if failed:
        before.put_back()
        set_rng_state(drawn)  # a new adapter is drawn
        raise CheckpointError(failed[0])
    remember_life(wrapped, origin.stages)
    _say(trainer, notes)
    return wrapped


def _loaded(trainer: Any, origin: Origin, model: Any) -> tuple[Any, list[str]]:
    if is_sharded(model):
        raise CheckpointError(
            f"the model is split over ranks, and {origin.text} cannot be loaded into it. Load the model with "
            "from_pretrained from there, which splits as it reads, and pass carry=(), which takes the history alone"
        )
    source: Any = origin.files
    if origin.model is not None:
        source = origin.model if isinstance(origin.model, dict) else origin.model.state_dict()
    if not fits(model, source):
        if (renamed := _renamed(model, source, origin)) is not None:
            return model, [*renamed, *_other_settings(model, origin)]
        # Adapters and modules that plug-ins give a model are there once it is wrapped.
        model = trainer._wrap_plugin_model(model)
    named = [name for name in origin.stages[-1].plugins if name not in {p.name for p in trainer.plugin_run.plugins}]
    hint = f"It was trained with the plug-ins {', '.join(named)}, which this trainer does not have." if named else ""
    notes = load_weights(model, source, origin.text, hint)
    _check_below_adapter(model, origin)
    return model, [*notes, *_other_settings(model, origin)]


def _renamed(model: Any, source: Any, origin: Origin) -> list[str] | None:
    """Loads the files of a model whose names in them are not its own, or nothing; what is to be known of it."""
    if not isinstance(source, list) or is_adapter(source) or not missing_names(model, source):
        return None
    try:
        return load_weights(model, source, origin.text)
    except CheckpointError:
        return None  # for the wrapped model to say


def _check_below_adapter(model: Any, origin: Origin) -> None:
    """An adapter's file holds nothing of the weights below it, which an earlier stage may have trained."""
    if not origin.ours or origin.folder is None or not is_adapter(origin.files):
        return
    others = others_below(model, checkpoint.read_state(origin.folder).get("below") or {})
    if not others:
        return
    below = next((s.parent for s in reversed(origin.stages) if s.parent and s.parent.get("path")), None)
    where = f"that stage began with {below['path']}" if below else "it is the model that the stage began with"
    raise CheckpointError(
        f"{origin.text} holds an adapter alone, and the weights below it are others here than when it was saved "
        f"({len(others):,} of them, {others[0]} for one): {where}. Build the trainer with the model of there, "
        "from_pretrained(...), before the adapter is put on it. Where other weights are meant, load the adapter with "
        "PeftModel.from_pretrained(model, folder, is_trainable=True) and pass carry=(), which takes the history alone"
    )


def _other_settings(model: Any, origin: Origin) -> list[str]:
    """Weights of the same shapes under another configuration are another function: that is meant, or it is a slip."""
    lines = []
    for name, now in (("config.json", getattr(model, "config", None)), ("adapter_config.json", _adapter_of(model))):
        if origin.folder is None or now is None or not (origin.folder / name).is_file():
            continue
        differ = settings_that_differ(origin.folder, name, now.to_dict())
        if differ:
            lines.append(
                f"warning: {name} of {origin.text} says otherwise than the model, so that the same weights compute "
                f"something else: {'; '.join(differ)}. Build the model with from_pretrained({str(origin.folder)!r}) "
                "unless that is meant"
            )
    return lines


def _adapter_of(model: Any) -> Any:
    found, active = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    return found.get(active) if isinstance(found, dict) and isinstance(active, str) else None


def _gathered(trainer: Any, value: Any) -> list[Any]:
    if trainer.accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def _say(trainer: Any, lines: list[str], level: int = logging.INFO) -> None:
    from hf_pretrain_ext.say import say

    if lines and trainer.is_world_process_zero():
        say("\n".join(lines), level)
