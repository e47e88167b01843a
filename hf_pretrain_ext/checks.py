"""Pure functions over a list of plug-ins: what is wrong with it, and in which order it takes effect."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from hf_pretrain_ext import _host
from hf_pretrain_ext.data import columns, is_map_style, is_stream, sample_rows
from hf_pretrain_ext.loading import ABOUT_NATIVE, is_native
from hf_pretrain_ext.packing import PackedCollator, check_isolation
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin, overrides
from hf_pretrain_ext.row_checks import faults_of_rows, looked_up, sample_size
from hf_pretrain_ext.values import is_number, is_whole, shown

__all__ = ["argument_faults", "find_problems", "in_order", "isolation_problems", "list_problems", "stream_problems"]

_OWNED = {
    "schedule": "the learning-rate schedule",
    "optimizer": "the optimizer",
    "prepare_data": "the training data",
}


def in_order(plugins: Sequence[TrainerPlugin]) -> list[TrainerPlugin]:
    """The plug-ins by declared need (`after`), then by name: the order in which they were typed does not matter.

    Raises:
        `ValueError`: the needs contradict each other.

    Example:

    >>> class A(TrainerPlugin): name, after = "a", ("b",)
    >>> class B(TrainerPlugin): name = "b"
    >>> [plugin.name for plugin in in_order([A(), B()])]
    ['b', 'a']
    """
    waiting = sorted(plugins, key=lambda plugin: plugin.name)
    ordered: list[TrainerPlugin] = []
    while waiting:
        names = {plugin.name for plugin in waiting}
        free = next((plugin for plugin in waiting if not names.intersection(plugin.after)), None)
        if free is None:
            raise ValueError(f"plug-ins wait for each other: {sorted(names)}")
        waiting.remove(free)
        ordered.append(free)
    return ordered


_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda value: is_whole(value) and value >= 1, "an int of at least 1"),
    "per_device_eval_batch_size": (lambda value: is_whole(value) and value >= 1, "an int of at least 1"),
    "gradient_accumulation_steps": (lambda value: is_whole(value) and value >= 1, "an int of at least 1"),
    "max_steps": (lambda value: is_whole(value) and (value == -1 or value >= 1), "at least 1, or -1 to go by epochs"),
    "num_train_epochs": (lambda value: is_number(value) and value > 0, "above 0"),
    "learning_rate": (lambda value: is_number(value) and value >= 0, "a finite rate of at least 0"),
}


def argument_faults(given: Mapping[str, Any]) -> list[str]:
    """What no run can be made of among training arguments by name: the host would find out late, or never.

    Example:

    >>> argument_faults({"max_steps": -7, "learning_rate": 1e-3})
    ['max_steps must be at least 1, or -1 to go by epochs, got -7']
    """
    faults = []
    for name, (fits, allowed) in _ARGUMENTS.items():
        # A run of max_steps does not look at epochs.
        unused = name == "num_train_epochs" and is_whole(steps := given.get("max_steps", -1)) and steps > 0
        if name in given and not unused and not fits(given[name]):
            faults.append(f"{name} must be {allowed}, got {shown(given[name])}")
    return faults


def argument_problems(args: Any) -> list[Problem]:
    """The same of a Trainer's arguments."""
    given = {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)}
    return [Problem("arguments", fault, "Change it in the TrainingArguments.") for fault in argument_faults(given)]


def find_problems(setup: Setup) -> list[Problem]:
    """Every problem of the set-up, notes included, from the list as a whole and from each plug-in's own `check`."""
    problems = [*list_problems(setup.plugins), *_host_problems(setup), *_training_data_problems(setup)]
    for plugin in setup.plugins:
        problems.extend(plugin.check(setup))
    return problems


def list_problems(plugins: Sequence[TrainerPlugin]) -> list[Problem]:
    """What is wrong with the list by itself: names, owners, conflicts, order."""
    problems = []
    names = [plugin.name for plugin in plugins]
    for plugin in plugins:
        if not plugin.name:
            problems.append(Problem(type(plugin).__name__, "has no name", "Set the class attribute `name`."))
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        problems.append(
            Problem(name, f"is there {names.count(name)} times", "Keep one; concatenate_datasets joins data.")
        )
    for method, what in _OWNED.items():
        owners = [plugin.name for plugin in plugins if overrides(plugin, method)]
        if len(set(owners)) > 1:
            problems.append(Problem(" and ".join(owners), f"both own {what}", "Keep one of them."))
    for plugin in plugins:
        for other in plugin.conflicts:
            if other in names:
                problems.append(Problem(plugin.name, f"cannot run together with {other}", "Remove one of the two."))
    try:
        in_order(plugins)
    except ValueError as error:
        problems.append(Problem("order", str(error), "Report this to the authors of these plug-ins."))
    return problems


def _host_problems(setup: Setup) -> list[Problem]:
    problems = []
    trainer, args = setup.trainer, setup.args
    hooks = ("schedule", "optimizer", "wrap_optimizer", "wrap_plan")
    names = {method: _owner_names(setup.plugins, method) for method in hooks}
    if names["schedule"] and _host.has_own_scheduler(trainer):
        problems.append(
            Problem(
                names["schedule"],
                f"the Trainer was given its own scheduler ({type(trainer.lr_scheduler).__name__}), which would win",
                "Build the Trainer with `optimizers=(optimizer, None)` or without `optimizers`.",
            )
        )
    if names["optimizer"] and setup.given_optimizer:
        problems.append(
            Problem(
                names["optimizer"],
                "the Trainer was built with its own optimizer, which would win",
                "Build the Trainer without `optimizers`, or set trainer.optimizer = None if a train() left it there.",
            )
        )
    made_by_host = not names["optimizer"] and not setup.given_optimizer
    if names["wrap_optimizer"] and made_by_host and _host.updates_in_backward(args):
        problems.append(
            Problem(
                names["wrap_optimizer"],
                f"optim={_host.optimizer_name(args)!r} updates the weights in the backward pass, before any step that "
                "could be wrapped: it would change nothing",
                "Choose one that updates in step(), such as optim='adamw_torch'.",
            )
        )
    if setup.plugins and args.auto_find_batch_size:
        who = ", ".join(plugin.name for plugin in setup.plugins)
        problems.append(
            Problem(who, "auto_find_batch_size would change the run under its feet", "Set a batch size that fits.")
        )
    for method, hook in (("get_train_dataloader", "wrap_plan"), ("create_scheduler", "schedule")):
        owner = _overriding_class(trainer, method)
        if names.get(hook) and owner is not None:
            problems.append(
                Problem(
                    names[hook],
                    f"{owner.__name__} has a {method} of its own, which would not be called",
                    f"Remove that method, or the plug-in that needs {method}.",
                )
            )
    problems.extend(_model_problems(setup))
    problems.extend(_distributed_problems(setup))
    problems.extend(_packing_problems(setup))
    asked = processes_asked_for() if setup.args.world_size == 1 else 1
    if asked > 1:
        problems.append(
            Problem(
                "launch",
                f"accelerate was asked for {asked} processes and started one, as it does with --cpu",
                f"Use torchrun --nproc_per_node {asked}.",
                level="note",
            )
        )
    if names["wrap_plan"]:
        problems.extend(_plan_problems(names["wrap_plan"], trainer, args))
    return problems


def _model_problems(setup: Setup) -> list[Problem]:
    """A model of which nothing is trained, or whose adapter no resume would find."""
    trainer, model = setup.trainer, setup.model
    if not setup.plugins or trainer.model_init is not None or not isinstance(model, nn.Module):
        return []
    if is_native(model):
        message, _, fix = ABOUT_NATIVE.partition(". ")
        return [Problem("model", message, f"{fix}.")]
    parameters = list(model.parameters())
    wraps = any(overrides(plugin, "wrap_model") for plugin in setup.plugins)
    if parameters and not wraps and not any(each.requires_grad for each in parameters):
        return [
            Problem(
                "model",
                f"all of its {len(parameters):,} parameters are frozen, so that nothing would be trained",
                "Call model.requires_grad_(True), or load an adapter with is_trainable=True.",
            )
        ]
    return []


_ISOLATION: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
"""What the look at a model found: two forward passes, once a model."""


def _packing_problems(setup: Setup) -> list[Problem]:
    """Rows that were packed to be isolated, and a model that would let their documents see each other."""
    trainer = setup.trainer
    if not isinstance(trainer.data_collator, PackedCollator) or trainer.is_deepspeed_enabled:
        return []
    dataset = setup.train_dataset
    if not is_map_style(dataset) or "position_ids" not in columns(dataset):
        return []
    rows = [dataset[row]["position_ids"] for row in sample_rows(len(dataset), 8)]
    # Padding is stretches of one token; where there are two of more, there are two documents.
    if all(list(positions).count(1) < 2 for positions in rows):
        return []
    return isolation_problems(trainer.model)


def isolation_problems(model: Any) -> list[Problem]:
    """A look at whether a model lets the documents of a packed row influence each other."""
    if model not in _ISOLATION:
        kept, model.config.use_cache = getattr(model.config, "use_cache", None), False
        try:
            check_isolation(model)
            _ISOLATION[model] = None
        except ValueError as error:
            _ISOLATION[model] = str(error)
        finally:
            model.config.use_cache = kept
    found = _ISOLATION[model]
    return [Problem("packing", found.rstrip("."), "Isolation cannot be had with this model.")] if found else []


def _training_data_problems(setup: Setup) -> list[Problem]:
    """A look at the training data, unless it is a stream: those are read where a plug-in needs them."""
    dataset, who = setup.train_dataset, "train_dataset"
    own_loader = _overriding_class(setup.trainer, "get_train_dataloader") is not None
    if not setup.plugins or dataset is None or own_loader or is_stream(dataset) or not hasattr(dataset, "__len__"):
        return []
    if len(dataset) == 0:
        return [Problem(who, "the train_dataset is empty", "Pass a dataset with at least one row.")]
    fault = looked_up(dataset)
    if fault is not None:
        return [Problem(who, *fault[:2])]
    try:
        (stripped,), collate = setup.stripped([dataset])
    except ValueError:  # raw data of a trainer that prepares it as it trains
        return []
    found = faults_of_rows(setup, stripped, collate, sample_rows(len(dataset), sample_size(dataset)))
    return [Problem(who, message, fix, level="error" if fatal else "note") for message, fix, fatal in found]


def _overriding_class(trainer: Any, method: str) -> type | None:
    """The class nearest to the trainer, neither ours nor transformers', that defines `method`."""
    for cls in type(trainer).__mro__:
        if method in vars(cls) and cls.__module__.split(".")[0] not in ("transformers", "hf_pretrain_ext"):
            return cls
    return None


def _distributed_problems(setup: Setup) -> list[Problem]:
    trainer, problems = setup.trainer, []
    who = ", ".join(plugin.name for plugin in setup.plugins)
    for part, hooks in (("scheduler", ("schedule",)), ("optimizer", ("optimizer", "wrap_optimizer"))):
        owners = [plugin.name for plugin in setup.plugins if any(overrides(plugin, hook) for hook in hooks)]
        if owners and _host.deepspeed_owns(trainer, part):
            problems.append(
                Problem(
                    ", ".join(owners),
                    f"the DeepSpeed settings have a {part!r} of their own, which would win",
                    f"Remove {part!r} from them: the Trainer's own works under ZeRO.",
                )
            )
    if setup.args.world_size <= 1 or not setup.plugins:
        return problems
    if _host.splits_batches_or_layers(trainer):
        problems.append(
            Problem(
                who,
                "under tensor, context and sequence parallelism several ranks read the same rows, and plug-ins give "
                "every rank rows of its own",
                "Use data parallelism: DDP, FSDP2, ZeRO.",
            )
        )
        return problems
    where = _host.sharding(trainer)
    if where == "fsdp2" and setup.args.save_strategy != "no":
        problems.append(
            Problem(
                who,
                "the host saves a model that is sharded while it is loaded without its optimizer state, so that this "
                "run cannot be resumed",
                "DDP and ZeRO can.",
                level="note",
            )
        )
    for plugin in setup.plugins:
        declared = plugin.distributed.get("zero2" if where in ("zero0", "zero1") else where, "untested")
        if declared.startswith("refused"):
            problems.append(Problem(plugin.name, f"{declared} ({where})", "Train without it, or on one process."))
        elif declared == "untested":
            problems.append(
                Problem(plugin.name, f"has not been tested under {where}", "Compare a short run.", level="note")
            )
    return problems


def _owner_names(plugins: Sequence[TrainerPlugin], method: str) -> str:
    return ", ".join(plugin.name for plugin in plugins if overrides(plugin, method))


def _plan_problems(who: str, trainer: Any, args: Any) -> list[Problem]:
    problems = []

    def add(message: str, fix: str) -> None:
        problems.append(Problem(who, message, fix))

    dataset = trainer.train_dataset
    if dataset is None:
        add("the Trainer has no train_dataset", "Pass `train_dataset=` to the Trainer.")
    elif is_stream(dataset):
        for message, fix in stream_problems(dataset):
            add(f"the train_dataset {message}", fix)
        if args.max_steps <= 0:
            add("the train_dataset is a stream, whose length nobody knows", "Set `max_steps`.")
    elif not hasattr(dataset, "__len__"):
        add(
            f"the train_dataset is a {type(dataset).__name__}, neither map-style nor a stream",
            "Use a `datasets.Dataset` or `datasets.IterableDataset`.",
        )
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy != "random":
        fix = "Set `train_sampling_strategy='random'`"
        if strategy == "sequential":
            fix += " and pass `plan=PlanConfig(order='original')` to `extend` to keep the rows in order"
        add(f"train_sampling_strategy={strategy!r} would reorder what the sample plan decides", fix + ".")
    if args.dataloader_num_workers > 1 and not args.dataloader_in_order:
        add(
            "dataloader_in_order=False hands batches over as workers end them: their order would be another each "
            "time, and a resume would read some twice and others never",
            "Set it to True.",
        )
    accelerator_config = args.accelerator_config
    if getattr(accelerator_config, "split_batches", False):
        add("accelerator_config.split_batches=True changes which rank sees which sample", "Set it to False.")
    if getattr(accelerator_config, "dispatch_batches", None):
        add("accelerator_config.dispatch_batches=True reads all data on one rank", "Leave it at None.")
    return problems


def stream_problems(stream: Any) -> list[tuple[str, str]]:
    """Why a stream cannot be a source of a plan, with what to do."""
    if isinstance(stream, Iterator):
        return [
            (
                f"is a {type(stream).__name__}, which can be read only once",
                "Pass something that starts anew at every `iter`, such as a `datasets.IterableDataset`.",
            )
        ]
    if _host.split_over_ranks(stream):
        return [
            (
                "was split over ranks (`split_dataset_by_node`)",
                "Pass the whole stream: the sample plan gives every rank its own rows.",
            )
        ]
    return []


def processes_asked_for() -> int:
    """The processes that `accelerate launch --cpu` was asked for by the command that started this one; else 1."""
    if "ACCELERATE_USE_CPU" not in os.environ:
        return 1
    try:
        # Only on Linux, and only where accelerate is our parent: elsewhere nothing tells.
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes") and (value or following).isdigit():
            return int(value or following)
    return 1
