"""From a recipe to an extended Trainer: model, tokenizer and data are loaded, text is packed, plug-ins are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def build(recipe: Recipe) -> Any:
    """The extended Trainer of a recipe; see [`~hf_pretrain_ext.recipe.Recipe.build`]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from hf_pretrain_ext import extend

    args = arguments_class(recipe.trainer)(**recipe.training)
    set_seed(args.seed)
    spec = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer or spec.name_or_path, revision=_revision(recipe))
    options = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    model = AutoModelForCausalLM.from_pretrained(
        spec.name_or_path, revision=spec.revision, dtype=spec.dtype, **options
    )
    # One rank prepares, the others read what it cached.
    with args.main_process_first(desc="loading and packing"):
        train = _rows(recipe, recipe.data, tokenizer)
        held_out = _rows(recipe, recipe.eval_data, tokenizer) if recipe.eval_data else None
        callbacks = _callbacks(recipe, tokenizer)
    trainer = _trainer_class(recipe)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        **_collator(recipe, train, tokenizer, model),
    )
    return extend(trainer, *callbacks, plan=recipe.plan_config(), on_nonfinite=recipe.on_nonfinite)


def _revision(recipe: Recipe) -> str | None:
    return None if recipe.model.tokenizer else recipe.model.revision


def _trainer_class(recipe: Recipe) -> Any:
    if recipe.trainer == "sft":
        from trl import SFTTrainer

        return SFTTrainer
    from transformers import Trainer

    return Trainer


def _rows(recipe: Recipe, spec: DataConfig, tokenizer: Any) -> Any:
    from datasets import load_dataset

    from hf_pretrain_ext.packing import pack
    from hf_pretrain_ext.recipe import RecipeError

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
    if recipe.pack is None:
        raise RecipeError(
            f"the rows of {spec.path} hold {rows.column_names or 'no known columns'} and no input_ids: add a section "
            "`pack: {block_size: 1024}` to tokenize and cut them, or use `trainer: sft`"
        )
    settings = recipe.pack
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


def _collator(recipe: Recipe, train: Any, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Packed rows need a collator that keeps their form; ids without labels one that makes labels."""
    import inspect

    from transformers import DataCollatorForLanguageModeling

    from hf_pretrain_ext.packing import PackedCollator

    if recipe.trainer == "sft":
        return {}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if recipe.pack is not None and (recipe.pack.isolate or takes_positions):
        return {"data_collator": PackedCollator()}
    if "labels" in (train.column_names or ()):
        return {}
    return {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}


def _callbacks(recipe: Recipe, tokenizer: Any) -> list[Any]:
    from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
    from hf_pretrain_ext.registry import installed_plugins

    made: list[Any] = []
    if recipe.rewarm:
        made.append(RewarmCallback(**recipe.rewarm))
    if recipe.replay is not None:
        settings = dict(recipe.replay)
        weights = {name: spec.weight for name, spec in recipe.replay_sources.items() if spec.weight is not None}
        if weights:
            settings["weights"] = weights
        sources = {name: _rows(recipe, spec, tokenizer) for name, spec in recipe.replay_sources.items()}
        made.append(ReplayCallback(sources, **settings))
    if recipe.forgetting is not None:
        sets = {name: _rows(recipe, spec, tokenizer) for name, spec in recipe.forgetting_sets.items()}
        made.append(ForgettingCallback(sets, **recipe.forgetting))
    known = installed_plugins()
    made += [known[name](**settings) for name, settings in recipe.plugins.items()]
    return made
