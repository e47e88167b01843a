"""Metadata conditioning, then cooldown (MeCo): documents behind a line of metadata, plain ones at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast, get_args

from transformers import DefaultDataCollator, default_data_collator

from hf_pretrain_ext import _host, data
from hf_pretrain_ext.checks import in_order, isolation_problems, stream_problems
from hf_pretrain_ext.lengths import run_length
from hf_pretrain_ext.metadata.control import SECTION as CONTROL_SECTION
from hf_pretrain_ext.metadata.control import ControlTokens
from hf_pretrain_ext.metadata.documents import MetadataReport, Views, prepare, prepare_in_order, prepare_views
from hf_pretrain_ext.metadata.extract import MAX_CHARACTERS
from hf_pretrain_ext.metadata.layout import Overflow
from hf_pretrain_ext.metadata.source import checked_condition, checked_drop, checked_overflow
from hf_pretrain_ext.metadata.stream import BlockStream, StreamReport
from hf_pretrain_ext.metadata.template import MISSING, SECTION, Missing, Template
from hf_pretrain_ext.packing import PackedCollator, check_sizes
from hf_pretrain_ext.plan import SamplePlan, Segment, Source
from hf_pretrain_ext.plan.mixture import MAX_WEIGHT, integer_weights
from hf_pretrain_ext.plugin import PluginError, Problem, Setup, TrainerPlugin
from hf_pretrain_ext.streams import StreamError, first_rows
from hf_pretrain_ext.units import to_point, to_steps
from hf_pretrain_ext.values import check_flag, shown
from hf_pretrain_ext.vocabulary import check_embeddings, fit_embeddings, ids_without_rows, is_fitted, trains_rows

__all__ = ["MetadataCallback"]

Schedule = Literal["staged", "mixed"]


@dataclass
class _Made:
    """What was made of which data for a run of which length."""

    dataset: Any
    tokenizer: Any
    key: tuple[Any, ...]
    rows: Any
    conditioned: Any
    plain: Any
    reports: dict[str, Any]


class MetadataCallback(TrainerPlugin):
    """Trains on documents behind their metadata or a control token, and at last on plain ones, in one run (MeCo).

    The Trainer is given raw documents, one a row, its tokenizer as `processing_class` and a [`PackedCollator`]; their
    text and metadata become blocks of `block_size` tokens, as [`metadata.prepare`] makes them. Documents of the
    cooldown are others than those before it. Schedule and optimizer go on across the boundary, which lies between two
    optimizer steps. Raw documents that other plug-ins replay or evaluate on become plain blocks.

    With `control`, a control token stands before each text (conditional training). The tokenizer gets the tokens at
    `extend`, the model rows for them when training begins, and checkpoints hold both; what a model was trained with is
    in its config. Tokens that the tokenizer came with keep the rows that the model has for them.

    Args:
        template ([`Template`] or `str`, *optional*): the metadata, by default `"URL: {domain}\\n\\n"` (MeCo), with
            `control` none; the values of a `Template` stand in for `columns`, `missing`, `constant` and
            `max_characters`.
        block_size (`int`): tokens a block, which is a sample.
        control ([`ControlTokens`], *optional*): control tokens before documents or segments, chosen by a score.
        columns (`dict`, *optional*): where a field of the template comes from; see [`Template`].
        cooldown (`float`, `int` or `str`, *optional*, defaults to `0.1`): the plain part of the run: a fraction, steps
            as an int, or with its unit (`"2B tokens"`); 0 for none (MeCo, 2.2: 10 %).
        schedule (`str`, *optional*, defaults to `"staged"`): `"staged"` has the plain part at the end, `"mixed"` as a
            share of every step throughout (MeCo's ablation, 90/10).
        drop (`float`, *optional*, defaults to `0.0`): share of documents that go without their metadata before the
            cooldown.
        missing (`str`, *optional*, defaults to `"constant"`): for rows without a value; see [`Template`].
        constant (`str`, *optional*, defaults to `"unknown"`): what stands for a missing value.
        max_characters (`int`, *optional*, defaults to 256): of a value.
        overflow (`str`, *optional*, defaults to `"split"`): of documents that do not fit in a block: `"split"` goes on
            in the next behind the same metadata, `"discard"` leaves the rest out (MeCo).
        isolate (`bool`, *optional*, defaults to `True`): documents of a block do not see each other.
        text_column (`str`, *optional*, defaults to `"text"`): the column of texts.
        num_proc (`int`, *optional*): processes to prepare with.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, data that does not fit; every problem is listed.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=documents, processing_class=tokenizer,
        data_collator=PackedCollator(), callbacks=[MetadataCallback("URL: {domain}\\n\\n", block_size=2048)])
    extend(trainer).train()
    ```
    """

    name = "metadata"
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "exact, without resume", "zero2": "exact", "zero3": "exact"}
    # The views divide among them whatever share is left to new data.
    after = ("replay",)

    def __init__(
        self,
        template: Template | str | None = None,
        *,
        block_size: int,
        control: ControlTokens | None = None,
        columns: Mapping[str, Any] | None = None,
        cooldown: float | int | str = 0.1,
        schedule: str = "staged",
        drop: float = 0.0,
        missing: str = "constant",
        constant: str = MISSING,
        max_characters: int = MAX_CHARACTERS,
        overflow: str = "split",
        isolate: bool = True,
        text_column: str = "text",
        num_proc: int | None = None,
    ):
        values = {"columns": columns, "missing": missing, "constant": constant, "max_characters": max_characters}
        defaults = {"columns": None, "missing": "constant", "constant": MISSING, "max_characters": MAX_CHARACTERS}
        apart = [name for name, value in values.items() if value != defaults[name]]
        self.template, self.control = checked_condition(template, control)
        if apart and isinstance(template, Template):
            raise ValueError(f"{', '.join(apart)} beside a Template, which has its own. Set them in the Template")
        if apart and self.template is None:
            raise ValueError(f"{', '.join(apart)} without a template, of which there is none beside control. Pass one")
        if self.template is not None and not isinstance(template, Template):
            text = self.template.text
            self.template = Template(text, columns or {}, cast(Missing, missing), constant, max_characters)
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {shown(schedule)}")
        check_sizes(block_size, None, num_proc)
        steps, _ = to_point(cooldown, "cooldown", tokens_per_step=1)
        if schedule == "mixed" and steps:
            raise ValueError(f"cooldown must be a fraction with schedule='mixed', such as 0.1, got {shown(cooldown)}")
        if not isinstance(text_column, str) or not text_column:
            raise ValueError(f"text_column must be the name of a column, got {shown(text_column)}")
        self.block_size = block_size
        self.cooldown = cooldown
        self.kind = cast(Schedule, schedule)
        self.drop = checked_drop(drop)
        self.overflow: Overflow = checked_overflow(overflow)
        self.isolate = check_flag("isolate", isolate)
        self.text_column = text_column
        self.num_proc = num_proc
        self._made: _Made | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "template": None if self.template is None else self.template.to_json(),
            "control": None if self.control is None else self.control.to_json(),
            "block_size": self.block_size,
            "cooldown": self.cooldown,
            "schedule": self.kind,
            "drop": self.drop,
            "overflow": self.overflow,
            "isolate": self.isolate,
            "text_column": self.text_column,
        }

    # The data

    def prepare_data(self, setup: Setup) -> Any:
        args, dataset, tokenizer = setup.args, setup.trainer.train_dataset, setup.processing_class
        key = (setup.seed, setup.global_batch, args.max_steps, args.num_train_epochs, args.dataloader_drop_last)
        if self.control is not None and tokenizer is not None:
            try:
                # Every rank has a tokenizer of its own.
                self.control.add_to(tokenizer)
            except ValueError as error:
                raise self._unfit(error) from error
        made = self._made
        if made and made.dataset is dataset and made.tokenizer is tokenizer and made.key == key:
            return made.rows
        problems = list(self._data_problems(setup))
        if problems:
            raise PluginError(problems)
        try:
            # One rank prepares, the others read what it cached.
            with args.main_process_first(desc="preparing documents"):
                self._made = self._make(setup, dataset, tokenizer, key)
        except (TypeError, ValueError) as error:
            raise self._unfit(error) from error
        return self._made.rows

    def _make(self, setup: Setup, dataset: Any, tokenizer: Any, key: tuple[Any, ...]) -> _Made:
        from datasets import concatenate_datasets

        common: dict[str, Any] = {
            "control": self.control,
            "text_column": self.text_column,
            "isolate": self.isolate,
            "overflow": self.overflow,
            "drop": self.drop,
            "num_proc": self.num_proc,
        }
        plain = any(to_point(self.cooldown, "cooldown", tokens_per_step=1))
        if data.is_stream(dataset):
            return self._streamed(setup, dataset, tokenizer, key, common, plain)
        if not plain:
            rows, report = prepare_in_order(
                dataset, tokenizer, self.block_size, self.template, seed=setup.seed, **common
            )
            return _Made(dataset, tokenizer, key, rows, rows, None, {"conditioned": report})
        views: Views = prepare_views(
            dataset,
            tokenizer,
            self.block_size,
            self.template,
            plain_blocks=lambda blocks: self._plain_blocks(setup, blocks),
            seed=setup.seed,
            **common,
        )
        reports = {"conditioned": views.conditioned_report, "plain": views.plain_report}
        both = concatenate_datasets([views.conditioned, views.plain])
        return _Made(dataset, tokenizer, key, both, views.conditioned, views.plain, reports)

    def _streamed(
        self, setup: Setup, dataset: Any, tokenizer: Any, key: tuple[Any, ...], common: dict[str, Any], plain: bool
    ) -> _Made:
        del common["num_proc"]
        share = float(to_point(self.cooldown, "cooldown", tokens_per_step=1)[1])
        if self.kind == "staged" and plain:
            draws = setup.args.max_steps * setup.global_batch
            steps, cool = self._cooldown_steps(setup.args, draws, setup.global_batch)
            share = cool / steps
        views = [
            BlockStream(
                dataset,
                tokenizer,
                self.block_size,
                self.template,
                conditioned=conditioned,
                plain=share,
                seed=setup.seed % 2**63,
                **common,
            )
            for conditioned in (True, False)
        ]
        # What is wrong with the rows comes up here, before training.
        try:
            reports = {"conditioned": views[0].report(), **({"plain": views[1].report()} if plain else {})}
        except StreamError:
            raise ValueError(
                "the train_dataset is a stream of too few documents for two views. Pass a longer one"
            ) from None
        return _Made(dataset, tokenizer, key, views[0], views[0], views[1] if plain else None, reports)

    def prepare_beside(self, dataset: Any, setup: Setup) -> Any:
        names = getattr(dataset, "column_names", None) or ()
        segments = self.control.segments if self.control is not None else None
        # Documents that come as texts may stand beside others that come in segments.
        of_segments = isinstance(segments, str) and segments in names
        if data.is_stream(dataset) or not (of_segments or self.text_column in names) or "input_ids" in names:
            return dataset
        try:
            with setup.args.main_process_first(desc="preparing documents"):
                return prepare(
                    dataset,
                    setup.processing_class,
                    self.block_size,
                    control=self.control if of_segments else None,
                    conditioned=False,
                    text_column=self.text_column,
                    isolate=self.isolate,
                    num_proc=self.num_proc,
                )
        except (TypeError, ValueError) as error:
            raise self._unfit(error) from error

    def _unfit(self, error: Exception) -> PluginError:
        message, _, fix = str(error).partition(". ")
        return PluginError([Problem(self.name, message, f"{fix or 'Change that setting'}.")])

    def _data_problems(self, setup: Setup) -> Iterable[Problem]:
        dataset, collator = setup.trainer.train_dataset, setup.trainer.data_collator
        if dataset is None:
            yield Problem(self.name, "the Trainer has no train_dataset", "Pass raw documents as `train_dataset=`.")
        elif data.is_stream(dataset) and setup.args.max_steps <= 0:
            yield Problem(self.name, "the train_dataset is a stream, whose length nobody knows", "Set `max_steps`.")
        elif data.is_stream(dataset):
            for message, fix in stream_problems(dataset):
                yield Problem(self.name, f"the train_dataset {message}", fix)
        elif "input_ids" in (names := getattr(dataset, "column_names", ())) and not self._documents_in(names):
            yield Problem(
                self.name,
                f"the train_dataset is tokenized already (columns {sorted(names)}), and metadata goes before raw text",
                "Pass the raw documents; to an SFTTrainer, which tokenizes what it is given, with "
                "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}, packing=False, max_length=None). Or pass "
                "what metadata.prepare(documents, tokenizer, block_size, template) returns, and leave "
                "MetadataCallback out.",
            )
        if setup.processing_class is None:
            yield Problem(
                self.name, "the Trainer has no tokenizer", "Pass `processing_class=tokenizer` to the Trainer."
            )
        joined = not self.isolate and (collator is default_data_collator or isinstance(collator, DefaultDataCollator))
        if not isinstance(collator, PackedCollator) and not joined:
            does = "does not keep documents apart" if self.isolate else "may make labels of its own"
            yield Problem(
                self.name,
                f"the Trainer's data_collator is a {type(collator).__name__}, which {does}",
                "Pass `data_collator=PackedCollator()` to the Trainer.",
            )

    def _documents_in(self, names: Sequence[str]) -> bool:
        segments = self.control.segments if self.control is not None else None
        return (segments if isinstance(segments, str) else self.text_column) in names

    # The model

    def new_rows(self, setup: Setup) -> int:
        if self.control is None or setup.processing_class is None:
            return 0
        return 1 + max(self._control_ids(setup.processing_class))

    def _control_ids(self, tokenizer: Any) -> list[int]:
        return [] if self.control is None else self.control.add_to(tokenizer)

    def wrap_model(self, model: Any) -> Any:
        # In the config, what the model was trained with is saved wherever the model is.
        for section, given in ((SECTION, self.template), (CONTROL_SECTION, self.control)):
            if given is not None:
                setattr(model.config, section, given.to_json())
        if self.control is not None and self._made is not None:
            tokenizer = self._made.tokenizer
            fit_embeddings(model, tokenizer, ids_without_rows(model, tokenizer, self._control_ids(tokenizer)))
        return model

    def _model_problems(self, setup: Setup) -> Iterable[Problem]:
        kind, model = getattr(setup.model, "loss_type", None), setup.model
        if kind not in (None, "ForCausalLM") or getattr(model.config, "is_encoder_decoder", False):
            yield Problem(
                self.name,
                f"{type(model).__name__} is no causal language model: it would be asked for tokens that it reads",
                "Use a ...ForCausalLM model.",
            )
            return
        if not self.isolate and self._positions_are_lost(setup):
            yield Problem(
                self.name,
                f"{type(model).__name__} takes no position_ids, without which a PackedCollator makes no batches",
                "Pass `data_collator=default_data_collator` (of transformers) to the Trainer: documents that are not "
                "isolated need nothing else.",
            )
        yield from self._control_problems(setup)

    def _positions_are_lost(self, setup: Setup) -> bool:
        rows = cast(_Made, self._made).conditioned
        (stripped,), collate = setup.stripped([rows])
        try:
            collate(first_rows(stripped, 1) if data.is_stream(rows) else [stripped[0]])
        except ValueError:
            return isinstance(setup.trainer.data_collator, PackedCollator)
        return False

    def _control_problems(self, setup: Setup) -> Iterable[Problem]:
        if self.control is None:
            return
        model, tokenizer = setup.model, setup.processing_class
        ids = self._control_ids(tokenizer)
        new = ids_without_rows(model, tokenizer, ids)
        if new:
            try:
                check_embeddings(model, max(new) + 1)
            except ValueError as error:
                yield from self._unfit(error).problems
                return
        rows = _host.embeddings(model)
        if setup.given_optimizer and rows is not None and max(ids) >= rows:
            yield Problem(
                self.name,
                "the Trainer was built with its own optimizer, which would not train the rows that the model gets for "
                "the control tokens",
                "Build the Trainer without `optimizers`, or give the model its rows before its optimizer is made: "
                "vocabulary.fit_embeddings(model, tokenizer, vocabulary.add_tokens(tokenizer, tokens)).",
            )
        kept = [
            token
            for token, number in zip(self.control.tokens, ids, strict=True)
            if number not in new and not is_fitted(model, token, number)
        ]
        if kept:
            yield Problem(
                self.name,
                f"the tokenizer came with {kept}, and the model keeps the rows that it has for them",
                "If nothing has trained those, give them a start: vocabulary.fit_embeddings(model, tokenizer, ids).",
                level="note",
            )
        if not trains_rows(model, ids, not new):
            yield Problem(
                self.name,
                "the embeddings are frozen and those of all control tokens are the same, so that the model could not "
                "tell them apart",
                "Train them: with an adapter, by LoraConfig(trainable_token_indices=ids).",
            )

    # The plan

    def _cooldown_steps(self, args: Any, epoch: int, global_batch: int) -> tuple[int, int]:
        """Optimizer steps of the run and of its cooldown."""
        steps = run_length(args, epoch, global_batch)[1]
        cool = to_steps(self.cooldown, steps, "cooldown", tokens_per_step=self.block_size * global_batch)
        if not cool < steps:
            raise ValueError(
                f"cooldown={self.cooldown!r} is {cool:,} of {steps:,} steps. Leave some of them for metadata"
            )
        if not cool and self.kind == "staged" and any(to_point(self.cooldown, "cooldown", tokens_per_step=1)):
            raise ValueError(
                f"cooldown={self.cooldown!r} is less than one of {steps:,} steps. Train longer, or pass more or 0"
            )
        return steps, cool

    def _plain_blocks(self, setup: Setup, blocks: int) -> int:
        """Plain blocks that a run over `blocks` in all sees, by passes over the data where it makes several."""
        per_epoch = run_length(setup.args, blocks, setup.global_batch)[0]
        steps, cool = self._cooldown_steps(setup.args, blocks, setup.global_batch)
        share = to_point(self.cooldown, "cooldown", tokens_per_step=1)[1] if self.kind == "mixed" else None
        wanted = cool if share is None else share * steps
        return math.ceil(wanted * setup.global_batch / max(Fraction(steps, per_epoch), Fraction(1)))

    def wrap_plan(self, plan: SamplePlan, setup: Setup) -> SamplePlan:
        self.prepare_data(setup)
        made = cast(_Made, self._made)
        train = plan.sources[0]
        count = None if train.num_rows is None else len(made.conditioned)
        views = [self._view("conditioned", train, made.conditioned, slice(count))]
        if made.plain is None:
            return dataclasses.replace(plan, sources=(*views, *plan.sources[1:]))
        views.append(self._view("plain", train, made.plain, slice(count, None)))
        steps, cool = self._cooldown_steps(setup.args, plan.epoch, setup.global_batch)
        boundary, end = (steps - cool) * setup.global_batch, steps * setup.global_batch
        staged = self.kind == "staged"
        share = Fraction(0) if staged else to_point(self.cooldown, "cooldown")[1]
        segments = []
        for start in sorted({*(segment.start for segment in plan.segments), *([boundary] if staged else [])}):
            new, *others = [segment for segment in plan.segments if segment.start <= start][-1].weights
            plain = Fraction(start >= boundary) if staged else share
            weights = integer_weights([new * (1 - plain), new * plain, *map(Fraction, others)], MAX_WEIGHT)
            segments.append(Segment(start, weights))
        made_plan = dataclasses.replace(
            plan, sources=(*views, *plan.sources[1:]), segments=tuple(segments), cursors=()
        )
        if staged:
            made_plan = made_plan.with_phase("metadata", 0, boundary).with_phase("cooldown", boundary, end)
        return made_plan

    @staticmethod
    def _view(name: str, train: Source, rows: Any, part: slice) -> Source:
        lengths = None if train.lengths is None else train.lengths[part]
        number = None if train.num_rows is None else len(rows)
        return Source(name, number, order=train.order, dataset=rows, lengths=lengths)

    def check(self, setup: Setup) -> Iterable[Problem]:
        made = cast(_Made, self._made)
        yield from self._model_problems(setup)
        if data.is_stream(made.rows) and self.isolate and not setup.trainer.is_deepspeed_enabled:
            yield from isolation_problems(setup.model)
        try:
            plan = self.wrap_plan(setup.new_plan(), setup)
        except ValueError as error:
            yield from self._unfit(error).problems
            return
        for name, report in made.reports.items():
            yield from self._missing(name, report)
        plan = self._whole_plan(plan, setup)
        draws = run_length(setup.args, plan.epoch, setup.global_batch)[1] * setup.global_batch
        for source, needed in zip(plan.sources, plan.expected_counts(draws), strict=True):
            if source.name == "plain" and source.num_rows is not None and needed > source.num_rows:
                yield Problem(
                    self.name,
                    f"plain blocks are read {needed / source.num_rows:.2f} times: {source.num_rows:,} for "
                    f"{needed:,.0f} samples",
                    "Pass more documents if each is to be seen once.",
                    level="note",
                )

    def _missing(self, name: str, report: MetadataReport | StreamReport) -> Iterable[Problem]:
        first = f" of the first {report.blocks:,} blocks" if isinstance(report, StreamReport) else ""
        if report.missing and self.template is not None and self.template.missing != "error":
            what = f"have {self.template.constant!r} for it" if self.template.missing == "constant" else "go plain"
            yield Problem(
                self.name,
                f"{report.missing:,} of {report.documents:,} {name} documents{first} lack a value and {what}",
                "Pass missing='error' to be told which.",
                level="note",
            )
        if report.missing_scores:
            yield Problem(
                self.name,
                f"{report.missing_scores:,} of {report.segments:,} {name} texts{first} lack a score and go without a "
                "control token",
                "Pass ControlTokens(missing='error') to be told which.",
                level="note",
            )

    @staticmethod
    def _whole_plan(alone: SamplePlan, setup: Setup) -> SamplePlan:
        """The plan with what other plug-ins take of it; `alone` where they cannot."""
        plan = setup.new_plan()
        try:
            for plugin in in_order(setup.plugins):
                plan = plugin.wrap_plan(plan, setup)
        except Exception:  # theirs to report
            return alone
        return plan

    # What it says

    def _boundary(self) -> int | None:
        """The step at which the cooldown begins."""
        plan = self.run.plan if self.run is not None else None
        found = [phase.start for phase in plan.phases if phase.name == "cooldown"] if plan is not None else []
        return found[0] // self.run.global_batch if found and self.run is not None else None

    def describe(self) -> list[str]:
        run, made = self.run, self._made
        if run is None or run.plan is None or made is None:
            return []
        counts = dict(
            zip(
                (source.name for source in run.plan.sources),
                run.plan.expected_counts(run.total_steps * run.global_batch),
                strict=True,
            )
        )
        boundary = self._boundary()
        when = {"conditioned": f"steps 0 to {run.total_steps - 1:,}"}
        when["plain"] = when["conditioned"]
        if boundary is not None:
            when = {
                "conditioned": f"steps 0 to {boundary - 1:,}",
                "plain": f"steps {boundary:,} to {run.total_steps - 1:,}",
            }
        lines = []
        for name in [name for name in when if name in counts]:
            tokens, report = counts[name] * self.block_size, made.reports.get(name)
            of = "from a stream"
            if isinstance(report, StreamReport):
                share = report.padded / (report.blocks * report.block_size)
                of += f", {share:.1%} of its first {report.blocks:,} blocks padded"
            elif report is not None:
                passes = f"{counts[name] / report.blocks:.2f} passes over {report.blocks:,} blocks"
                of = f"{passes} of {report.documents:,} documents"
            lines.append(f"metadata: {name} in {when[name]}: {counts[name]:,.0f} samples, {tokens:,.0f} tokens, {of}")
        return lines

    def marks(self, total_steps: int) -> list[int]:
        boundary = self._boundary()
        return [] if boundary is None else [boundary]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.run is not None and self._made is not None:
            reports = {
                name: {**dataclasses.asdict(report), "sampled": isinstance(report, StreamReport)}
                for name, report in self._made.reports.items()
            }
            self.run.trace("metadata", boundary=self._boundary(), **reports)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None and state.global_step == self._boundary():
            self.run.trace("cooldown", phase="begins")
