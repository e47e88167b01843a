"""From a recipe to an extended Trainer: model, tokenizer and data are loaded, text is packed, plug-ins are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_pretrain_ext.plugin import PluginError
from hf_pretrain_ext.values import reason, shown

if TYPE_CHECKING:
    from hf_pretrain_ext.recipe import DataConfig, Recipe

__all__ = ["arguments_class", "build"]


def arguments_class(trainer: str) -> type:
    """The dataclass that holds the section `training`."""
    if trainer == "sft":
        from trl import SFTConfig

        return SFTConfig
    from transformers import TrainingArguments

    return TrainingArguments


@contextmanager
def _naming(section: str) -> Iterator[None]:
    """Errors of the libraries that a section of a recipe goes to, as errors of that section."""
    from hf_pretrain_ext.recipe import RecipeError

    try:
        yield
    except (RecipeError, PluginError):
        raise
    except Exception as error:  # whatever a library raises about what a recipe names is the finding here
        raise RecipeError(f"{section}: {reason(error)}") from error


def build(recipe: Recipe) -> Any:
    """The extended Trainer of a recipe; see [`~hf_pretrain_ext.recipe.Recipe.build`]."""
    from transformers import AutoTokenizer, set_seed

    from hf_pretrain_ext import anneal, continue_from, extend
    from hf_pretrain_ext.base_model import find_folder

    with _naming("training"):
        args = arguments_class(recipe.trainer)(**recipe.training)
        set_seed(args.seed)
    staged = recipe.continue_from or recipe.anneal
    if staged is not None:
        # First of all: where the recipe names no model, it is that of the checkpoint.
        with _naming(f"{'anneal' if recipe.continue_from is None else 'continue_from'}.checkpoint"):
            find_folder(staged.checkpoint, getattr(staged, "revision", None))
    spec = recipe.model
    with _naming(f"model.tokenizer={shown(spec.tokenizer)}" if spec.tokenizer else "the tokenizer of model"):
        tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer or spec.name_or_path, revision=_revision(recipe))
    options = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    given = {"name_or_path": spec.name_or_path, "dtype": spec.dtype, **options}
    with _naming(f"model ({', '.join(f'{name}={shown(value)}' for name, value in given.items())})"):
        model = _model(spec.name_or_path, spec.revision, dtype=spec.dtype, **options)
    # One rank prepares, the others read what it cached.
    with args.main_process_first(desc="loading and packing"):
        train = _rows(recipe, recipe.data, tokenizer, "data")
        held_out = _held_out(recipe, recipe.eval_data, tokenizer) if recipe.eval_data else None
        callbacks = _callbacks(recipe, tokenizer)
    collator = _collator(recipe, train, tokenizer, model)
    with _naming("training"):
        trainer = _trainer_class(recipe)(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            # A new stage extends the trainer once its plug-ins can be told of those before.
            callbacks=callbacks if staged else None,
            **collator,
        )
    common: dict[str, Any] = {"plan": recipe.plan_config(), "on_nonfinite": recipe.on_nonfinite}
    if recipe.continue_from is not None:
        begun = recipe.continue_from
        with _naming("continue_from"):
            return continue_from(
                trainer, begun.checkpoint, tuple(begun.carry), begun.name, revision=begun.revision, **common
            )
    if recipe.anneal is not None:
        branch = recipe.anneal
        with _naming("anneal"):
            return anneal(
                trainer,
                branch.checkpoint,
                _number(branch.steps, int),
                branch.shape,
                _number(branch.min_lr, float),
                branch.name,
                **common,
            )
    return extend(trainer, *callbacks, **common)


def _number(value: Any, kind: Callable[[str], Any]) -> Any:
    """A length or rate that a recipe or a change on the command line wrote as text, as the number that it is."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _model(path: str, revision: str | None, **options: Any) -> Any:
    """A causal language model; of an adapter, its base with the adapter around it, to be trained on."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(path, revision=revision) is None:
        return AutoModelForCausalLM.from_pretrained(path, revision=revision, **options)
    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(path, revision=revision)
    base = AutoModelForCausalLM.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision, **options)
    return PeftModel.from_pretrained(base, path, is_trainable=True, revision=revision)


def _revision(recipe: Recipe) -> str | None:
    return None if recipe.model.tokenizer else recipe.model.revision


def _trainer_class(recipe: Recipe) -> Any:
    if recipe.trainer == "sft":
        from trl import SFTTrainer

        return SFTTrainer
    from transformers import Trainer

    return Trainer


def _rows(recipe: Recipe, spec: DataConfig, tokenizer: Any, section: str) -> Any:
    from datasets import load_dataset

    from hf_pretrain_ext.packing import pack
    from hf_pretrain_ext.recipe import RecipeError

    with _naming(f"{section} (path={shown(spec.path)}, split={shown(spec.split)})"):
        rows = load_dataset(
            spec.path,
            spec.name,
            split=spec.split,
            data_files=spec.data_files,
            revision=spec.revision,
            streaming=spec.streaming,
        )
    if recipe.trainer == "sft" or "input_ids" in (rows.column_names or ()):
        return rows
    if recipe.metadata is not None:
        column = recipe.metadata["text_column"]
        # Of another corpus the texts may be called otherwise.
        renamed = spec.text_column != column and spec.text_column in (rows.column_names or ())
        return rows.rename_column(spec.text_column, column) if renamed else rows
    if recipe.pack is None:
        raise RecipeError(
            f"{section}: the rows of {spec.path} hold {rows.column_names or 'no known columns'} and no input_ids: add "
            "a section `pack: {block_size: 1024}` to tokenize and cut them, or use `trainer: sft`"
        )
    if spec.streaming:
        raise RecipeError(
            f"{section}.streaming: a stream of texts cannot be packed. Leave streaming out, or stream rows that hold "
            "input_ids"
        )
    settings = recipe.pack
    with _naming(section):
        return pack(
            rows,
            tokenizer,
            settings.block_size,
            settings.isolate,
            text_column=spec.text_column,
            remainder=settings.remainder,
            seed=settings.seed,
            num_proc=settings.num_proc,
        )


def _held_out(recipe: Recipe, spec: DataConfig, tokenizer: Any) -> Any:
    """What the Trainer evaluates on: raw documents are plain blocks there."""
    rows = _rows(recipe, spec, tokenizer, "eval_data")
    if recipe.metadata is None or "input_ids" in (rows.column_names or ()):
        return rows
    from hf_pretrain_ext.metadata import prepare

    names = ("block_size", "text_column", "isolate", "num_proc")
    settings = {name: recipe.metadata[name] for name in names if name in recipe.metadata}
    control = recipe.metadata.get("control")
    if control is not None and control.segments in rows.column_names:
        settings["control"] = control
    with _naming("eval_data"):
        return prepare(rows, tokenizer, **settings, conditioned=False)


def _collator(recipe: Recipe, train: Any, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Packed rows need a collator that keeps their form; ids without labels one that makes labels."""
    import inspect

    from transformers import DataCollatorForLanguageModeling, default_data_collator

    from hf_pretrain_ext.packing import PackedCollator

    if recipe.trainer == "sft":
        return {}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if recipe.metadata is not None and (recipe.metadata.get("isolate", True) or takes_positions):
        return {"data_collator": PackedCollator()}
    if recipe.metadata is not None:
        return {"data_collator": default_data_collator}
    if recipe.pack is not None and (recipe.pack.isolate or takes_positions):
        return {"data_collator": PackedCollator()}
    if "labels" in (train.column_names or ()):
        return {}
    return {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}


def _callbacks(recipe: Recipe, tokenizer: Any) -> list[Any]:
    from hf_pretrain_ext.callbacks import ForgettingCallback, MetadataCallback, ReplayCallback, RewarmCallback
    from hf_pretrain_ext.registry import installed_plugins

    made: list[Any] = []
    if recipe.rewarm:
        made.append(RewarmCallback(**recipe.rewarm))
    if recipe.replay is not None:
        sources = {
            name: _rows(recipe, spec, tokenizer, f"replay.sources.{name}")
            for name, spec in recipe.replay_sources.items()
        }
        past = recipe.replay.get("from_history") is True
        made.append(ReplayCallback(**{"data" if past else "dataset": sources, **recipe.replay}))
    if recipe.forgetting is not None:
        sets = {
            name: _rows(recipe, spec, tokenizer, f"forgetting.sets.{name}")
            for name, spec in recipe.forgetting_sets.items()
        }
        made.append(ForgettingCallback(sets, **recipe.forgetting))
    if recipe.metadata is not None:
        made.append(MetadataCallback(**recipe.metadata))
    known = installed_plugins()
    for name, settings in recipe.plugins.items():
        with _naming(name):
            made.append(known[name](**settings))
    return made
