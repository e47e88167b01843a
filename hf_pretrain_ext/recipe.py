"""Recipes: a whole run as a YAML file, made of the dataclasses that Python code uses.

    model: my-org/my-model          # a name on the Hub, or a folder
    data: {path: json, data_files: new.jsonl}
    pack: {block_size: 1024}
    training: {output_dir: runs/first, num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 3e-4}
    rewarm: {peak_lr: 3e-4}
    replay: {sources: {general: {path: json, data_files: old.jsonl}}, ratio: 0.05}
    forgetting: {sets: {general: {path: json, data_files: held_out.jsonl}}}

With `metadata: {template: "URL: {domain}\\n\\n", block_size: 1024}` in place of `pack`, all data are raw documents;
`control: {thresholds: 0.5}` there puts control tokens before them.

A later stage of a model's life: `continue_from: runs/first/checkpoint-1000` begins it, `model` left out is that of the
checkpoint, and `replay: {from_history: true, ratio: 0.05}` replays what earlier stages read. `anneal: {checkpoint:
runs/first/checkpoint-1000, steps: 150}` makes a branch to deploy.

A key that nobody knows is an error that names the nearest one. Nothing in a recipe or a dataset is executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import torch
import yaml

from hf_pretrain_ext.checks import argument_faults
from hf_pretrain_ext.forgetting import ForgettingConfig
from hf_pretrain_ext.nonfinite import Action
from hf_pretrain_ext.packing import check_sizes
from hf_pretrain_ext.plan.plan import Order
from hf_pretrain_ext.replay import ReplayConfig
from hf_pretrain_ext.schedules import RewarmConfig
from hf_pretrain_ext.values import is_number, is_whole, reason, shown

if TYPE_CHECKING:
    from hf_pretrain_ext.trainer import PlanConfig

__all__ = ["DataConfig", "ModelConfig", "PackConfig", "Recipe", "RecipeError", "load_recipe"]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, the value and what is allowed."""


@dataclass
class ModelConfig:
    """The model to go on with."""

    name_or_path: str = field(metadata={"help": "A name on the Hub, or a folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights in training; bf16 autocast is `bf16`."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    tokenizer: str | None = field(default=None, metadata={"help": "Defaults to the model's own."})

    def __post_init__(self) -> None:
        if not self.name_or_path:
            raise ValueError("name_or_path is empty: give a name on the Hub, or a folder")
        dtype = getattr(torch, self.dtype, None)
        if self.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"dtype must be 'auto' or a float type of torch such as bfloat16, got {shown(self.dtype)}"
            )


@dataclass
class DataConfig:
    """Rows for `datasets.load_dataset`."""

    path: str = field(metadata={"help": "A dataset on the Hub, a folder, or a format: json, text, parquet, csv."})
    name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": 'One split, slices allowed: "train[:10%]".'})
    data_files: str | list[str] | None = field(default=None, metadata={"help": "Files, with a format as path."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    streaming: bool = field(default=False, metadata={"help": "Read as a stream; the run then needs max_steps."})
    text_column: str = field(default="text", metadata={"help": "Column of raw text, for `pack` and `metadata`."})
    weight: float | None = field(default=None, metadata={"help": "Of a replay source: its share in what is replayed."})

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: give a dataset on the Hub, a folder, or a format such as json")


@dataclass
class PackConfig:
    """How raw text becomes blocks; see `hf_pretrain_ext.packing.pack`."""

    block_size: int = field(metadata={"help": "Tokens a block."})
    isolate: bool = field(default=True, metadata={"help": "Keep documents of a block from attending to each other."})
    remainder: Literal["drop", "pad"] = field(default="drop", metadata={"help": "The last, incomplete block."})
    seed: int | None = field(default=None, metadata={"help": "Shuffle documents first; None keeps their order."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes to tokenize and cut with."})

    def __post_init__(self) -> None:
        check_sizes(self.block_size, self.seed, self.num_proc)


@dataclass
class ContinueConfig:
    """A stage after others; see `hf_pretrain_ext.continue_from`."""

    checkpoint: str = field(metadata={"help": "A checkpoint of a run with plug-ins, a folder, or a name on the Hub."})
    carry: list[str] = field(default_factory=lambda: ["weights"], metadata={"help": "weights, optimizer."})
    name: str | None = field(default=None, metadata={"help": "Of the new stage."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty: give a checkpoint folder, or a name on the Hub")
        from hf_pretrain_ext.continuing import checked_carry

        checked_carry(self.carry)


@dataclass
class AnnealConfig:
    """A branch to deploy; see `hf_pretrain_ext.anneal`."""

    checkpoint: str = field(metadata={"help": "A checkpoint of a run with plug-ins, in its constant phase, say."})
    steps: str = field(metadata={"help": "Length of the branch: steps, or text such as 1B tokens."})
    shape: Literal["exponential", "linear", "cosine"] = field(default="exponential", metadata={"help": "Of the rate."})
    min_lr: str = field(default="10%", metadata={"help": "The last rate, absolute or relative to the peak."})
    name: str | None = field(default=None, metadata={"help": "Of the branch."})

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty: give a checkpoint folder")


@dataclass
class Recipe:
    """A run: what is in the file, checked as far as it can be without loading model and data."""

    model: ModelConfig
    data: DataConfig
    training: dict[str, Any]
    trainer: Literal["trainer", "sft"] = "trainer"
    eval_data: DataConfig | None = None
    pack: PackConfig | None = None
    plan: dict[str, Any] | None = None
    rewarm: dict[str, Any] | None = None
    replay: dict[str, Any] | None = None
    replay_sources: dict[str, DataConfig] = field(default_factory=dict)
    forgetting: dict[str, Any] | None = None
    forgetting_sets: dict[str, DataConfig] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_nonfinite: Action = "report"
    continue_from: ContinueConfig | None = None
    anneal: AnnealConfig | None = None
    text: str = ""
    """The YAML that it is from, with the changes applied."""

    def build(self) -> Any:
        """The extended Trainer of this recipe: model, tokenizer and data are loaded here.

        Raises:
            [`RecipeError`]: model, tokenizer or data cannot be loaded or packed; it names the section.
            [`~hf_pretrain_ext.PluginError`]: all that is wrong with plug-ins and data.
        """
        from hf_pretrain_ext.recipe_build import build

        return build(self)

    def plan_config(self) -> PlanConfig | None:
        from hf_pretrain_ext.trainer import PlanConfig

        return PlanConfig(**self.plan) if self.plan else None


LONGEST = 1 << 20
"""Bytes of a recipe; more is another kind of file, or one that never ends."""
MERGED = 10_000
"""Settings that `<<` may bring into a section: merges of merges grow without end."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with numbers as everybody writes them and no key given twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except RecipeError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # What YAML's constructors raise where a value does not fit its tag: 2001-02-30, !!int x, !!map [a].
            what = shown(node.value) if isinstance(node, yaml.ScalarNode) else "what stands there"
            kind, why = node.tag.rpartition(":")[2], reason(error, 120)
            raise RecipeError(f"{_line(node)}: {what} cannot be read as {kind} ({why})") from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MERGED:
            raise RecipeError(f"{_line(node)}: more than {MERGED:,} settings in one section")


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


# YAML 1.1 takes 3e-4 for a string: it wants 3.0e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise RecipeError(f"{_line(key_node)}: a key must be a name or a number, got {shown(key)}")
        if key in found:
            raise RecipeError(f"{_line(key_node)}: {shown(key)} is given twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path (`str` or `Path`): a YAML file.
        changes (`Sequence[str]`): settings that replace the file's: `"training.max_steps=100"`.

    Raises:
        [`RecipeError`]: not a file of YAML, an unknown or missing key, a value of the wrong kind or out of range.
        `FileNotFoundError`: no such file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise RecipeError(f"{path} has more than {LONGEST:,} bytes: it is not a recipe")
        text = content.decode("utf-8")
    except (FileNotFoundError, RecipeError):
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown(str(path))} cannot be read as a recipe ({reason(error, 200)})") from error
    given = _read(text, str(path))
    if not isinstance(given, dict):
        raise RecipeError(f"{path} must hold settings by name, got {type(given).__name__}")
    for change in changes:
        _apply(given, change)
    try:
        recipe = _recipe(given)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    # Comments and order are worth keeping where the file is what was trained.
    recipe.text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True) if changes else text
    return recipe


def _read(text: str, name: str) -> Any:
    """What a text of YAML says; `name` is what errors call it."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecipeError as error:
        raise RecipeError(f"{name}, {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name} goes too deep: lists in lists, or sections in sections, without end") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecipeError(f"{name} is not YAML that settings can be made of ({reason(error, 200)})") from error


def _apply(given: dict[str, Any], change: str) -> None:
    name, sign, value = change.partition("=")
    if not sign or not name:
        raise RecipeError(f"a change reads KEY=VALUE, such as training.max_steps=100; got {shown(change)}")
    *sections, last = name.split(".")
    for section in sections:
        inner = given.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{shown(change)}: {section} holds {shown(inner)}, not settings by name")
        given = inner
    given[last] = _read(value, f"the change {shown(change)}")


_SECTIONS = (
    *("model", "data", "eval_data", "trainer", "training", "pack", "plan", "on_nonfinite"),
    *("rewarm", "replay", "forgetting", "metadata", "continue_from", "anneal"),
)


_OPTIONAL = tuple(name for name in _SECTIONS if name not in ("model", "data", "trainer", "training", "on_nonfinite"))


def _recipe(given: dict[str, Any]) -> Recipe:
    plugins = {name: given[name] for name in given if name not in _SECTIONS}
    if plugins:
        from hf_pretrain_ext.registry import installed_plugins

        _known(plugins, {*_SECTIONS, *installed_plugins()}, "the recipe")
    # A name with nothing behind it is as good as none.
    given = {name: value for name, value in given.items() if value is not None or name not in _OPTIONAL}
    stage = _stage(given)
    if "model" not in given and stage:
        begun = next(iter(stage.values()))
        given["model"] = {"name_or_path": begun.checkpoint, "revision": getattr(begun, "revision", None)}
    for name in ("model", "data", "training"):
        if name not in given:
            raise RecipeError(f"{name} is missing")
    model = given["model"]
    actions = get_args(Action)
    if given.get("on_nonfinite", "report") not in actions:
        raise RecipeError(f"on_nonfinite must be one of {actions}, got {shown(given['on_nonfinite'])}")
    recipe = Recipe(
        on_nonfinite=given.get("on_nonfinite", "report"),
        model=_made(ModelConfig, {"name_or_path": model} if isinstance(model, str) else model, "model"),
        data=_made(DataConfig, given["data"], "data"),
        training=_training(given["training"], given.get("trainer", "trainer")),
        trainer=given.get("trainer", "trainer"),
        eval_data=_made(DataConfig, given["eval_data"], "eval_data") if "eval_data" in given else None,
        pack=_made(PackConfig, given["pack"], "pack") if "pack" in given else None,
        plugins={name: _plugin(name, {} if values is None else values) for name, values in plugins.items()},
        **stage,
    )
    for name, spec in (("data", recipe.data), ("eval_data", recipe.eval_data)):
        _without_weight(spec, name)
    if "plan" in given:
        from hf_pretrain_ext.trainer import PlanConfig

        recipe.plan = dataclasses.asdict(_made(PlanConfig, given["plan"], "plan"))
    if "rewarm" in given:
        from hf_pretrain_ext.callbacks import RewarmCallback

        recipe.rewarm = _with_flags(given["rewarm"], "rewarm", RewarmConfig, ("go_on", "allow_no_effect"))
        _tried(RewarmCallback, recipe.rewarm, "rewarm")
    if "replay" in given:
        from hf_pretrain_ext.callbacks import ReplayCallback

        past = isinstance(given["replay"], Mapping) and given["replay"].get("from_history") is True
        if past and not stage:
            raise RecipeError("replay.from_history: there is no history without `continue_from` or `anneal`")
        recipe.replay, recipe.replay_sources = _with_data(
            given["replay"], "replay", "sources", ReplayConfig, ("from_history", "allow_no_effect"), optional=past
        )
        weights = {name: spec.weight for name, spec in recipe.replay_sources.items() if spec.weight is not None}
        if weights:
            if recipe.replay.get("weights") is not None:
                raise RecipeError("replay: weights are given there and with the sources: keep one of the two")
            recipe.replay["weights"] = weights
        if past and weights:
            raise RecipeError(
                "replay: with from_history, the shares of sources follow from what was read, and a source has no "
                "weight of its own. To set them all, give replay.weights: {name: number, ...}"
            )
        sources = dict.fromkeys(recipe.replay_sources, ())
        _tried(ReplayCallback, {"data" if past else "dataset": sources, **recipe.replay}, "replay")
    if "forgetting" in given:
        from hf_pretrain_ext.callbacks import ForgettingCallback

        recipe.forgetting, recipe.forgetting_sets = _with_data(
            given["forgetting"], "forgetting", "sets", ForgettingConfig, ("alert_if", "stop_if")
        )
        for name, spec in recipe.forgetting_sets.items():
            _without_weight(spec, f"forgetting.sets.{name}")
        sets = dict.fromkeys(recipe.forgetting_sets, ())
        _tried(ForgettingCallback, {"datasets": sets, **recipe.forgetting}, "forgetting")
    if "metadata" in given:
        recipe.metadata = _metadata(given["metadata"], recipe)
    if recipe.trainer == "sft" and recipe.pack:
        raise RecipeError("pack: SFTTrainer packs by itself; set training.packing and training.max_length instead")
    return recipe


def _stage(given: Mapping[str, Any]) -> dict[str, Any]:
    """`continue_from` or `anneal`, as far as a recipe holds one."""
    found: dict[str, Any] = {}
    if "continue_from" in given:
        value = given["continue_from"]
        found["continue_from"] = _made(
            ContinueConfig, {"checkpoint": value} if isinstance(value, str) else value, "continue_from"
        )
    if "anneal" in given:
        found["anneal"] = _made(AnnealConfig, given["anneal"], "anneal", numbers_as_text=True)
    if len(found) == 2:
        raise RecipeError("continue_from and anneal: a stage is one or the other; leave one out")
    return found


def _metadata(given: Any, recipe: Recipe) -> dict[str, Any]:
    """The settings of a MetadataCallback, which makes blocks of all data of the recipe."""
    from hf_pretrain_ext.callbacks import MetadataCallback
    from hf_pretrain_ext.metadata import ControlTokens

    settings = dict(_settings(given, "metadata"))
    _known(settings, set(inspect.signature(MetadataCallback).parameters), "metadata")
    if "block_size" not in settings:
        raise RecipeError("metadata.block_size is missing: Tokens a block.")
    if settings.get("control") is not None:
        settings["control"] = _made(ControlTokens, settings["control"], "metadata.control")
    settings.setdefault("text_column", recipe.data.text_column)
    _tried(MetadataCallback, settings, "metadata")
    if recipe.pack:
        raise RecipeError("pack: metadata makes blocks of its own, of metadata.block_size tokens. Leave pack out")
    if recipe.trainer == "sft":
        raise RecipeError("trainer: metadata takes raw documents, and SFTTrainer tokenizes them. Use trainer: trainer")
    others = {"eval_data": recipe.eval_data}
    others |= {f"replay.sources.{name}": spec for name, spec in recipe.replay_sources.items()}
    others |= {f"forgetting.sets.{name}": spec for name, spec in recipe.forgetting_sets.items()}
    for section, spec in others.items():
        if spec is not None and spec.streaming:
            raise RecipeError(f"{section}.streaming: only the data of the run can be a stream of raw documents")
    return settings


def _tried(plugin: Callable[..., Any], settings: Mapping[str, Any], section: str) -> None:
    """Makes the plug-in of a section, so that what is wrong with its settings comes up before data is loaded."""
    try:
        plugin(**settings)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise RecipeError(f"{section}: {error}") from error


def _plugin(name: str, given: Any) -> dict[str, Any]:
    """Settings of a plug-in that has no section of its own: its constructor says what is wrong with them."""
    from hf_pretrain_ext.registry import installed_plugins

    settings = dict(_settings(given, name))
    _tried(installed_plugins()[name], settings, name)
    return settings


def _without_weight(spec: DataConfig | None, section: str) -> None:
    if spec is not None and spec.weight is not None:
        raise RecipeError(f"{section}.weight means nothing there: only replay.sources have weights. Leave it out")


def _with_flags(given: Any, section: str, config: type, flags: tuple[str, ...]) -> dict[str, Any]:
    """A section of the settings of `config` and of `flags`, which only the plug-in takes."""
    settings = dict(_settings(given, section))
    _known(settings, {f.name for f in dataclasses.fields(config)} | set(flags), section)
    _made(
        config, {name: value for name, value in settings.items() if name not in flags}, section, numbers_as_text=True
    )
    return settings


def _with_data(
    given: Any, section: str, key: str, config: type, more: tuple[str, ...], optional: bool = False
) -> tuple[dict[str, Any], dict[str, DataConfig]]:
    """A section that holds datasets by name under `key` beside the settings of `config` and `more`."""
    settings = _with_flags(given, section, config, (key, *more))
    if settings.get(key) is None or settings[key] == {}:
        if not optional:
            raise RecipeError(f"{section}.{key} is missing: name at least one dataset")
        settings[key] = {}
    data = {}
    for name, values in _settings(settings.pop(key), f"{section}.{key}").items():
        text = name if isinstance(name, str) else shown(name)
        if text in data:
            raise RecipeError(f"{section}.{key}: {text!r} is given twice, as text and as a number")
        data[text] = _made(DataConfig, values, f"{section}.{key}.{text}")
    return settings, data


def _training(given: Any, trainer: Any) -> dict[str, Any]:
    settings = dict(_settings(given, "training"))
    if trainer not in ("trainer", "sft"):
        raise RecipeError(f"trainer must be 'trainer' or 'sft', got {shown(trainer)}")
    from hf_pretrain_ext.recipe_build import arguments_class

    cls = arguments_class(trainer)
    _known(settings, {f.name for f in dataclasses.fields(cls) if f.init}, "training")
    if "output_dir" not in settings:
        raise RecipeError("training.output_dir is missing: it says where checkpoints, trace and model go")
    hints = typing.get_type_hints(cls)
    fitting = {name: _fitting(value, hints[name], f"training.{name}") for name, value in settings.items()}
    if not fitting["output_dir"]:
        raise RecipeError("training.output_dir is empty: it says where checkpoints, trace and model go")
    for fault in argument_faults(fitting):
        raise RecipeError(f"training.{fault}")
    return fitting


def _settings(given: Any, section: str) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{section} must hold settings by name, got {shown(given)}")
    return given


def _known(given: Mapping[Any, Any], names: set[str], section: str) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key if isinstance(key, str) else shown(key), names, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
            raise RecipeError(f"{section} has no setting {shown(key)}: {advice}")


def _made(cls: Any, given: Any, section: str, numbers_as_text: bool = False) -> Any:
    """`cls` from settings, with every key known, every value of a fitting kind, and what is needed there.

    Lengths and rates are typed as text, the only form that holds both 0.01 and 500 steps: `numbers_as_text`.
    """
    settings = _settings(given, section)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _known(settings, set(fields), section)
    for name, described in fields.items():
        needed = described.default is dataclasses.MISSING and described.default_factory is dataclasses.MISSING
        if needed and name not in settings:
            raise RecipeError(f"{section}.{name} is missing: {described.metadata.get('help', 'it is needed')}")
    hints = typing.get_type_hints(cls, localns={"Order": Order})
    if numbers_as_text:
        hints = {name: hint | int | float if hint in (str, str | None) else hint for name, hint in hints.items()}
    values = {name: _fitting(value, hints[name], f"{section}.{name}") for name, value in settings.items()}
    try:
        return cls(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise RecipeError(f"{section}: {error}") from error


def _fitting(value: Any, hint: Any, name: str) -> Any:
    """`value` if it is of the kind `hint`; an int where a float is asked for becomes one."""
    options = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if option is Any or (option is types.NoneType and value is None):
            return value
        if kind is Literal:
            if value in get_args(option):
                return value
        elif kind is float and is_whole(value) and is_number(value) and int not in options:
            return float(value)
        elif kind is list and isinstance(value, list) and get_args(option):
            return [_fitting(item, get_args(option)[0], f"{name}[{k}]") for k, item in enumerate(value)]
        elif kind is int:
            if is_whole(value) and abs(value) < 1 << 63:
                return value
        elif isinstance(kind, type) and (
            isinstance(value, kind) or (hasattr(kind, "__members__") and isinstance(value, str))
        ):
            return value
    allowed = " or ".join(_kind_name(option) for option in options)
    raise RecipeError(f"{name} must be {allowed}, got {shown(value)}")


def _kind_name(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(value) for value in get_args(option))
    return "none" if option is types.NoneType else str(getattr(option, "__name__", option))
