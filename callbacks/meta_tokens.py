"""Meta-tokens with meta-attention: tokens of their own among the text, which attend to each other once more."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch

from hf_pretrain_ext import _host, data
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.meta_tokens.adapter import CONFIG_FILE
from hf_pretrain_ext.meta_tokens.attach import attached, unwrapped
from hf_pretrain_ext.meta_tokens.batches import Insertion, Length, mark
from hf_pretrain_ext.meta_tokens.boundaries import checked_boundaries, ending_tokens
from hf_pretrain_ext.meta_tokens.config import KEY, SECTION, MetaAttentionConfig, differences
from hf_pretrain_ext.meta_tokens.fused import masked_head
from hf_pretrain_ext.meta_tokens.insertion import Positions, checked_fraction, meta_counts
from hf_pretrain_ext.meta_tokens.layers import unadapted
from hf_pretrain_ext.meta_tokens.places import survey
from hf_pretrain_ext.meta_tokens.row import left_out
from hf_pretrain_ext.meta_tokens.training import MetaTraining, Train, is_adapted, is_causal
from hf_pretrain_ext.plan import SamplePlan
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.values import check_flag, shown
from hf_pretrain_ext.vocabulary import add_tokens, special_tokens

if TYPE_CHECKING:
    from hf_pretrain_ext.run import PluginRun

__all__ = ["MetaTokensCallback"]

Where = Literal["uniform", "every_n", "boundaries", "given"]
FRACTION = 0.1
CHUNK = 1 << 18
"""Draws that are looked up at a time to count what was inserted."""


class MetaTokensCallback(TrainerPlugin):
    """Inserts meta-tokens into every training sample, and puts meta-attention into the model (Shah et al.).

    A sample of l tokens gets ⌊`fraction`·l⌋ meta-tokens, at places drawn from the sample plan's seed of that sample.
    Nothing predicts them; they predict the next token of text. In every layer they attend to each other once more,
    behind its self-attention. The token is added to the tokenizer at `extend` and to the model in `train()`;
    meta-attention starts as nothing. Works on tokenized rows of any collator for causal language models, packed
    ([`PackedCollator`], TRL's) or padded. Evaluation data stays as it is; [`with_meta_tokens`] inserts into it.

    Args:
        fraction (`float`, *optional*, defaults to `0.1`): meta-tokens per token of a sample, at most 0.5 (the paper's
            k). A sample of fewer than 1/k tokens gets none.
        token (`str`, *optional*, defaults to `"<|meta|>"`): its text, which no text is tokenized to.
        attention (`bool`, *optional*, defaults to `True`): with meta-attention; False for the tokens alone.
        rope (`str`, *optional*, defaults to `"on"`): whether meta-attention rotates queries and keys; see
            [`MetaAttentionConfig`].
        positions (`str`, *optional*, defaults to `"uniform"`): `"uniform"` (the paper's), `"every_n"` (one behind
            every ⌊text/count⌋ tokens), `"boundaries"` (behind tokens that end a sentence, a line or a document first,
            then behind others), or `"given"`: where the data has them, for fine-tuning on tasks that place them.
        length (`str`, *optional*, defaults to `"longer"`): `"longer"`: a sample of l tokens becomes one of
            l + ⌊k·l⌋, and no text is lost. `"fixed"`: it stays as long, and its last ⌊k·l⌋ tokens are left out; how
            many is logged.
        boundaries (list of `str` or `int`, *optional*): with `positions="boundaries"`, the tokens behind which
            something ends; see [`ending_tokens`] for the default.
        train (`str`, *optional*, defaults to `"all"`): `"all"`: what is trainable stays so. `"meta"`: only the
            token's row and meta-attention, and the adapter where the model has one of PEFT's.
        meta_attention (`dict`, *optional*): more settings of [`MetaAttentionConfig`]: `num_heads`, `norm`, `init`,
            `dropout`, ...; its `seed` is the Trainer's by default.
        allow_no_effect (`bool`, *optional*, defaults to `False`): allow `fraction=0`.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, a model or data that does not fit; every problem is listed.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=blocks, processing_class=tokenizer,
        data_collator=PackedCollator(), callbacks=[MetaTokensCallback(fraction=0.1)])
    extend(trainer).train()
    ```
    """

    name = "meta_tokens"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": "refused: what is put into a model that is sharded already would not be sharded",
        "zero2": "exact",
        "zero3": "exact",
    }
    # Adapters freeze what is in the model when they come.
    after = ("gradnormlorp",)

    def __init__(
        self,
        fraction: float = FRACTION,
        token: str = "<|meta|>",
        attention: bool = True,
        rope: str = "on",
        positions: str = "uniform",
        length: str = "longer",
        *,
        boundaries: Sequence[str | int] | None = None,
        train: str = "all",
        meta_attention: Mapping[str, Any] | None = None,
        allow_no_effect: bool = False,
    ):
        checked_fraction(fraction)
        for name, value, kinds in (
            ("positions", positions, Where),
            ("length", length, Length),
            ("train", train, Train),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {shown(value)}")
        self.config = _configured(meta_attention, token=token, attention=attention, rope=rope)
        self.given = ("token", "attention", "rope", *(meta_attention or {}))
        self.own_seed = "seed" in self.given
        self.boundaries = checked_boundaries(boundaries)
        if boundaries is not None and positions != "boundaries":
            raise ValueError(f"boundaries are for positions='boundaries', got positions={positions!r}. Leave them out")
        if positions == "given" and (fraction, length) != (FRACTION, "longer"):
            raise ValueError("fraction and length are of no use with positions='given': the data has its meta-tokens")
        self.fraction = fraction
        self.positions, self.length = cast(Where, positions), cast(Length, length)
        self.kind = cast(Train, train)
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        self._run: PluginRun | None = None
        self._surveyed: Any = None
        self._ahead: tuple[Any, int] = (None, 0)
        self._training: MetaTraining | None = None
        self._began: Any = None
        self._counted = (0, 0)
        self._tables: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in asdict(self.config).items() if name != "seed" or self.own_seed},
            "fraction": self.fraction,
            "positions": self.positions,
            "length": self.length,
            "boundaries": None if self.boundaries is None else list(self.boundaries),
            "train": self.kind,
        }

    @property
    def off(self) -> bool:
        return self.fraction == 0

    # The token

    @property
    def run(self) -> PluginRun | None:
        return self._run

    @run.setter
    def run(self, run: PluginRun | None) -> None:
        """Set by `extend` once every check has passed: from then on the tokenizer has the token."""
        self._run = run
        if run is not None and not self.off:
            add_tokens(run.trainer.processing_class, [self.config.token])

    def _number(self, tokenizer: Any) -> int | None:
        return special_tokens(getattr(tokenizer, "tokenizer", tokenizer)).get(self.config.token)

    def _insertion(self, tokenizer: Any) -> Insertion:
        ends = ending_tokens(tokenizer, self.boundaries) if self.positions == "boundaries" else ()
        number = self._number(tokenizer)
        return Insertion(cast(int, number), self.fraction, cast(Positions, self.positions), self.length, ends)

    # Checks

    def check(self, setup: Setup) -> Iterable[Problem]:
        if self.off:
            if not self.allow_no_effect:
                yield Problem(
                    self.name, "would change nothing with fraction=0", "Raise it, or pass allow_no_effect=True."
                )
            return
        fit = True
        for problem in (*self._check_tokenizer(setup.processing_class), *self._check_model(setup)):
            fit = fit and problem.level != "error"
            yield problem
        if setup.args.n_gpu > 1:
            yield Problem(
                self.name,
                f"{setup.args.n_gpu} GPUs in one process are threads that would share where the meta-tokens stand",
                "Start one process a GPU, with torchrun, or show this one a single GPU.",
            )
        if setup.args.label_smoothing_factor:
            yield Problem(
                self.name,
                f"label_smoothing_factor={setup.args.label_smoothing_factor} asks every token for a share of the "
                "probability, and the meta-token's is 0",
                "Set label_smoothing_factor=0.",
            )
        if self._masks(setup.model) and getattr(setup.args, "use_liger_kernel", False):
            yield Problem(
                self.name,
                "use_liger_kernel=True computes the loss without logits, in which the meta-token's is masked",
                "Leave the kernel out, or pass meta_attention={'mask_logits': False}.",
            )
        kind = getattr(unwrapped(setup.model), "dtype", None)
        if self.kind == "meta" and kind in (torch.bfloat16, torch.float16):
            yield Problem(
                self.name,
                f"the model is in {str(kind).removeprefix('torch.')}, and so are the meta parts, which alone are "
                "trained: small steps are lost to rounding",
                "Load it in float32 and pass bf16=True to the arguments, or raise the learning rate.",
                level="note",
            )
        alone = self.kind == "meta" or not unwrapped(setup.model).get_input_embeddings().weight.requires_grad
        if fit and alone and _host.sharding(setup.trainer) == "zero3":
            yield Problem(
                self.name,
                "the embedding is frozen, and ZeRO-3 splits the token's row, which is trained alone, and its table",
                "Pass train='all' with an embedding that is trained, or use ZeRO-2 or DDP.",
            )
        dataset = setup.train_dataset
        if fit and (data.is_map_style(dataset) or data.is_stream(dataset)):
            yield from self._check_rows(setup, setup.sample(dataset))

    def _masks(self, model: Any) -> bool:
        there = attached(model)
        return (self.config if there is None else there.config).mask_logits

    def _check_tokenizer(self, tokenizer: Any) -> Iterable[Problem]:
        if tokenizer is None:
            yield Problem(
                self.name, "the Trainer has no tokenizer", "Pass `processing_class=tokenizer` to the Trainer."
            )
            return
        try:
            self._number_ahead(tokenizer)
            if self.positions == "boundaries":
                ending_tokens(tokenizer, self.boundaries)
        except (AttributeError, ValueError) as error:
            yield self._unfit(error)

    def _number_ahead(self, tokenizer: Any) -> int:
        """The number that the token has, or will have."""
        number = self._number(tokenizer)
        if number is None and self._ahead[0] is not tokenizer:
            self._ahead = tokenizer, add_tokens(copy.deepcopy(tokenizer), [self.config.token])[0]
        return self._ahead[1] if number is None else number

    def new_rows(self, setup: Setup) -> int:
        if self.off:
            return 0
        try:
            return self._number_ahead(setup.processing_class) + 1
        except (AttributeError, ValueError):  # for `check` to say
            return 0

    def _unfit(self, error: Exception) -> Problem:
        message, _, fix = str(error).partition(". ")
        return Problem(self.name, message.rstrip("."), f"{fix.rstrip('.') or 'Change that setting'}.")

    def _check_model(self, setup: Setup) -> Iterable[Problem]:
        model = unwrapped(setup.model)
        if not is_causal(model):
            yield Problem(
                self.name,
                f"{type(model).__name__} is no causal language model",
                "Meta-tokens are for decoders: use a ...ForCausalLM model.",
            )
            return
        there = attached(model)
        if there is not None:
            if other := differences(there.config, self.config, self.given):
                yield Problem(
                    self.name,
                    f"the model has meta-tokens with {other}",
                    "Pass these settings, or take them out with remove_meta_tokens(model).",
                )
            if left_out(model, there.passes.token_id):
                yield Problem(
                    self.name,
                    f"the adapter trains single rows of the embedding, and not that of {self.config.token!r}",
                    f"Name it among them, LoraConfig(trainable_token_indices=[..., {there.passes.token_id}]).",
                )
            return
        saved = (getattr(model.config, SECTION, None) or {}).get(KEY) or {}
        if saved.get("attention"):
            yield Problem(
                self.name,
                "the config of the model says that it was saved with meta-attention, which is not in the model: "
                "from_pretrained leaves it out",
                "Call load_meta_tokens(model, folder) before making the Trainer.",
            )
        yield from self._check_tables(setup, model)
        sharded = _host.sharding(setup.trainer).startswith("fsdp")  # refused, and not to be probed
        if self.config.attention and self._surveyed is not model and not sharded:
            try:
                survey(model)
                self._surveyed = model
            except ValueError as error:
                yield self._unfit(error)

    def _check_tables(self, setup: Setup, model: Any) -> Iterable[Problem]:
        """Where an adapter is in the way of the token's row."""
        if getattr(model, "_hf_peft_config_loaded", False):
            yield Problem(
                self.name,
                "the model has an adapter of model.add_adapter, beside which no row is given, trained or saved",
                "Put the adapter around the model with peft.get_peft_model(model, config) instead.",
            )
            return
        try:
            number = self._number_ahead(setup.processing_class)
        except (AttributeError, ValueError):  # for `_check_tokenizer` to say
            return
        tables = [
            table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None
        ]
        wrapped = [type(table).__name__ for table in tables if unadapted(table) is not table]
        rows = min(map(_rows, tables))
        # One that trains single rows takes no new values for others.
        if wrapped and (number >= rows or "TrainableTokensWrapper" in wrapped):
            yield Problem(
                self.name,
                f"the model needs a row for {self.config.token!r} (id {number}; it has {rows:,}), and its embeddings "
                f"are in an adapter ({', '.join(wrapped)})",
                "Give the base its row first, with add_meta_tokens(base, tokenizer), then put the adapter around it.",
            )

    def _check_rows(self, setup: Setup, rows: Any) -> Iterable[Problem]:
        chosen = data.sample_rows(len(rows))
        tokens = data.token_rows(rows, chosen) if "input_ids" in data.columns(rows) else []
        if not tokens:
            return
        number = self._number_ahead(setup.processing_class)
        holding = [row for row, ids in zip(chosen, tokens, strict=True) if number in ids]
        if self.positions == "given":
            if not holding:
                yield Problem(
                    self.name,
                    f"positions='given', but none of {len(chosen):,} rows looked at holds {self.config.token!r}",
                    "Place them in the data: add_tokens(tokenizer, [token]) says their id.",
                )
            return
        if holding:
            yield Problem(
                self.name,
                f"row {holding[0]} of the train_dataset holds the id of {self.config.token!r}, {number}, already",
                "Tokenize text with split_special_tokens=True, so that none becomes it, or pass positions='given'.",
            )
            return
        lengths = np.array([len(ids) for ids in tokens])
        counts = meta_counts(self.fraction, lengths)
        if not counts.any():
            yield Problem(
                self.name,
                f"would change nothing: fraction={self.fraction:g} of samples of {lengths.max():,} tokens is less "
                "than one meta-token",
                "Raise fraction, or pass longer samples.",
            )
        most, learned = _host.positions(setup.model)
        if most is None or self.length == "fixed":
            return
        # All meta-tokens of a row may fall into one of its documents.
        spans = _spans(rows, chosen, lengths)
        longest = int((spans + counts).max())
        if spans.max() <= most < longest:
            yield Problem(
                self.name,
                f"samples of up to {lengths.max():,} tokens get {counts.max():,} meta-tokens, which may make a "
                f"document {longest:,} long, and the model has {most:,} positions",
                f"Cut samples to {self._text_for(most):,} tokens, or pass length='fixed'.",
                level="error" if learned else "note",
            )

    def _text_for(self, positions: int) -> int:
        """The longest sample that fits with its meta-tokens."""
        lengths = np.arange(positions + 1)
        return int(lengths[lengths + meta_counts(self.fraction, lengths) <= positions].max())

    # The model

    def wrap_model(self, model: Any) -> Any:
        if self.off or self.run is None:
            return model
        args = self.run.trainer.args
        config = self.config if self.own_seed else dataclasses.replace(self.config, seed=args.seed)
        if self._training is not None:  # of a training that was broken off
            self._training.finish()
        self._training = MetaTraining(model, self.run.trainer.processing_class, config, self.kind)
        return model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.step()

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.run is not None and self.run.resume_from is not None:
            self._load_beside_adapter(self.run.resume_from)

    def _load_beside_adapter(self, folder: str) -> None:
        """The host saves and loads whole models, and of adapted ones the adapter."""
        if self._training is None or not is_adapted(self._training.model):
            return
        try:
            self._training.load(folder)
        except ValueError as error:
            raise CheckpointError(f"the meta-tokens of {folder} cannot be loaded: {error}") from error

    def wrap_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        run, trl = self.run, sys.modules.get("trl")
        if self.off or run is None:
            return compute_loss
        there = attached(run.model)
        if there is None:  # an evaluation before training, which gives the model its row
            return functools.partial(self._plain_loss, compute_loss)
        if not there.config.mask_logits or trl is None or not isinstance(run.trainer, trl.SFTTrainer):
            return compute_loss
        number = there.passes.token_id

        def masked(*args: Any, **kwargs: Any) -> Any:
            with masked_head(unwrapped(run.model).get_output_embeddings(), number):
                return compute_loss(*args, **kwargs)

        return masked

    def _plain_loss(self, compute_loss: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows, ids = _rows(unwrapped(model).get_input_embeddings()), inputs.get("input_ids")
        number = self._number(cast(Any, self.run).trainer.processing_class)
        if number is not None and number >= rows and ids is not None and bool((ids == number).any()):
            raise ValueError(
                f"the batch holds {self.config.token!r} (id {number}), and the model, of {rows:,} rows, gets one for "
                "it in train(). Evaluate rows with meta-tokens after that, or call add_meta_tokens(model, tokenizer) "
                "before making the Trainer"
            )
        return compute_loss(model, inputs, *args, **kwargs)

    # The data

    def wrap_plan(self, plan: SamplePlan, setup: Setup) -> SamplePlan:
        # As it is: with a plan in force every sample has a seed.
        return plan

    def wrap_collator(self, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        if self.off or self.run is None:
            return collator
        tokenizer = self.run.trainer.processing_class
        if self.positions == "given":
            return _Marks(collator, cast(int, self._number(tokenizer)))
        return _Inserts(collator, self._insertion(tokenizer), self.config.token)

    # What is told

    def begin(self) -> None:
        self._counted, self._tables = (0, 0), {}
        if self.run is None:
            return
        began, again = self.run.beginning, self.run.trainer.model_init is not None
        # A new stage from a checkpoint of an adapter begins with what lies beside it.
        if began.told and "weights" in began.carry and (self._began is not began or again):
            folder = str((began.parent or {}).get("path") or "")
            if os.path.isfile(os.path.join(folder, CONFIG_FILE)):
                self._load_beside_adapter(folder)
        self._began = began

    def describe(self) -> list[str]:
        run = self.run
        there = None if run is None else attached(run.model)
        if self.off or run is None or there is None:
            return []
        number = self._number(run.trainer.processing_class)
        lines = [f"meta_tokens: {self.config.token!r} is token {number}; {line}" for line in there.describe()]
        if self.positions == "given":
            return [*lines, "meta_tokens: where the data has them"]
        sample = run.setup.sample(run.setup.train_dataset)
        tokens = data.token_rows(sample, data.sample_rows(len(sample))) if "input_ids" in data.columns(sample) else []
        for length in sorted({min(map(len, tokens)), max(map(len, tokens))}) if tokens else ():
            count = int(meta_counts(self.fraction, length))
            text = f"{length + count:,} in all" if self.length == "longer" else f"the last {count:,} of them left out"
            lines.append(f"meta_tokens: {count:,} in a sample of {length:,} tokens, {text}; {self.positions}")
        return lines

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        there = attached(self.run.model) if self.run is not None and not self.off else None
        if self.run is not None and there is not None:
            places = [{"layer": place.layer, "child": place.child, "kind": place.kind} for place in there.places]
            self.run.trace("meta_tokens", config=asdict(there.config), places=places)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log(control)

    def _log(self, control: Any) -> None:
        if self.run is None or self.off or not control.should_log or self.positions == "given":
            return
        inserted = self._inserted(self.run)
        if inserted is not None:
            cut = {"meta_text_cut": inserted} if self.length == "fixed" else {}
            self.run.log({"meta_tokens": inserted, **cut})

    def _inserted(self, run: PluginRun) -> int | None:
        """Meta-tokens of all samples so far, over all ranks: as the order of samples, a function of the step.

        None where the lengths of rows are not known.
        """
        plan, end = run.plan, run.step * run.global_batch
        if plan is None:
            return None
        for source in plan.sources:
            if source.name not in self._tables:
                lengths = None if source.num_rows is None else data.row_lengths(source.dataset)
                self._tables[source.name] = None if lengths is None else meta_counts(self.fraction, lengths)
        start, total = self._counted
        for first in range(start, end, CHUNK):
            draws = plan.draws(first, min(first + CHUNK, end))
            for k in np.unique(draws.source).tolist():
                table = self._tables[plan.sources[k].name]
                if table is None:
                    return None
                total += int(table[draws.row[draws.source == k]].sum())
        self._counted = (end, total)
        return total

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is None or self._training is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_beside_adapter(state.best_model_checkpoint)
        self._training.finish()
        self._training = None
        inserted = None if self.positions == "given" else self._inserted(self.run)
        self.run.trace("meta_tokens", inserted=inserted, text_cut=inserted if self.length == "fixed" else 0)


class _Inserts:
    """Inserts into what the collator made; samples are those of the plan's draws."""

    def __init__(self, data_collator: Callable[[list[Any]], Any], insertion: Insertion, token: str):
        self.data_collator = data_collator
        self.insertion = insertion
        self.token = token

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = self.data_collator(features)
        number, draws = self.insertion.meta_id, cast(Any, features).draws
        rows = [feature["input_ids"] for feature in features]
        if bool((batch["input_ids"] == number).any()):
            held = [str(row) for row, ids in zip(draws.row, rows, strict=True) if number in list(ids)]
            raise ValueError(
                f"rows {', '.join(held)} hold the id of {self.token!r}, {number}, already. Tokenize text with "
                "split_special_tokens=True, so that none becomes it, or pass positions='given'"
            )
        return self.insertion(batch, draws.seed, [len(ids) for ids in rows])


class _Marks:
    """Says where the meta-tokens are that the data has."""

    def __init__(self, data_collator: Callable[[list[Any]], Any], meta_id: int):
        self.data_collator = data_collator
        self.meta_id = meta_id

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        return mark(self.data_collator(features), self.meta_id)


def _configured(more: Any, **own: Any) -> MetaAttentionConfig:
    given = {} if more is None else more
    known = {field.name for field in fields(MetaAttentionConfig)} - {*own, "token_id"}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ValueError(f"meta_attention must be a dict of {', '.join(sorted(known))}, got {shown(more)}")
    return MetaAttentionConfig(**own, **given)


def _rows(table: Any) -> int:
    weight = unadapted(table).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # of ZeRO-3, a part has no elements


def _spans(rows: Any, chosen: Sequence[int], lengths: Any) -> Any:
    """Tokens of the longest document in each row."""
    names = data.columns(rows)
    if "position_ids" in names:
        return np.array([max(each) + 1 for each in data.token_rows(rows, chosen, "position_ids")])
    if "seq_lengths" in names:
        return np.array([max(each) for each in data.token_rows(rows, chosen, "seq_lengths")])
    return lengths
