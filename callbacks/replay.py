"""Replay: keep a share of every step for old data, so that the model does not forget it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, cast

import numpy as np

from hf_pretrain_ext import data
from hf_pretrain_ext.checks import stream_problems
from hf_pretrain_ext.lengths import run_length
from hf_pretrain_ext.past_data import ReplayedHistory, copies_of_buffers
from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.plan.plan import Unit
from hf_pretrain_ext.plugin import PluginError, Problem, Setup, TrainerPlugin
from hf_pretrain_ext.replay import Change, Mode, ReplayConfig, realised_ratio, stage_draws, with_replay
from hf_pretrain_ext.row_checks import Fault, faults_of_rows, looked_up
from hf_pretrain_ext.sources import identified
from hf_pretrain_ext.units import to_point
from hf_pretrain_ext.values import check_flag, reason, shown

__all__ = ["ReplayCallback"]


class ReplayCallback(TrainerPlugin):
    """Mixes old data into training at an exact ratio: what is replayed ÷ all that is read.

    With `unit="samples"` every step of G samples replays ⌊G·ratio⌋ or ⌈G·ratio⌉ of them, and over the run the count
    never strays from the ratio by a whole sample. With `unit="tokens"` the tokens replayed stay within a longest
    row of their share where row lengths are known (a `datasets.Dataset` with `input_ids`, or a column named by
    `length_column_name`); where they are not (streams, other datasets) the share is an expected value, from sampled
    rows, and said to be. What was realised is logged in samples (`replay_ratio`) and in tokens read
    (`replay_ratio_tokens`), with several sources also by source (`share_<name>`, `share_<name>_tokens`).

    Args:
        dataset (dataset or `dict[str, dataset]`, *optional*): old data, prepared like the training data: the same
            columns, the same tokenizer. One dataset, or several by name. Map-style, or a stream
            (`datasets.IterableDataset`), whose rows come in the stream's order. For an `SFTTrainer`, raw data will do:
            the trainer prepares it as its own. Left out only with `from_history`.
        ratio (`float`, *optional*, defaults to `0.05`): the recipe of Ibrahim et al. (2024): 5 % for a weak shift
            of domain, 25 % for a strong one.
        mode (`str`, *optional*, defaults to `"equivalent"`): `"equivalent"` keeps the length of the run and sees less
            new data (Ibrahim et al.); `"additional"` sees all new data and replay besides: an epoch becomes
            len(new)/(1 − ratio) samples. Abbes et al. (2025) enlarge the batch instead: their setting is
            `"additional"` with a larger `per_device_train_batch_size`.
        order (`str`, *optional*, defaults to `"shuffled"`): `"shuffled"`, or `"original"` to replay in the order in
            which the old data was first visited, as Ibrahim et al. do.
        unit (`str`, *optional*, defaults to `"samples"`): what `ratio` and `weights` are shares of: `"samples"` or
            `"tokens"`. For blocks of one length the two are the same.
        weights (`dict[str, float]`, *optional*): with several datasets, the share of each in what is replayed, in any
            scale. Defaults to their sizes (rows, or tokens with `unit="tokens"`); needed where one is a stream. With
            `from_history` in tokens, by default those that were seen.
        ratio_changes (`dict`, *optional*): later ratios by the point of the run from which they hold: an int is a
            step, a float below 1 a fraction of the run, a string says its unit: `{0.5: 0.1, "2B tokens": 0.05}`.
        from_history (`bool`, *optional*, defaults to `False`): in a stage begun with `continue_from`, replay what all
            earlier stages read, under the names of `stages.json`: of a stage with a plan the very rows. Each source
            has a share in what is replayed in proportion to the tokens that the model's life has seen of it, which
            gives the weights of the released multi-stage configurations of Ibrahim et al. (2024). Rows are opened
            again from their cache files, and where that cannot be (streams), from the buffer that a
            [`BufferCallback`] kept, of which a copy is put into `_replayed` in `output_dir`.
        data (`dict[str, dataset]`, *optional*): with `from_history`: rows for sources by name, prepared like
            `dataset`: those that cannot be opened again, those that something else is to stand in for (public data
            like it, text that the model generated), and `"base"` for what a base without history was trained on, which
            needs `weights`.
        tokenizer (tokenizer or `str`, *optional*): what the old data was tokenized with, to be compared with the
            trainer's own.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept a ratio of 0 all along.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, data that does not fit; every problem is listed.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=domain, callbacks=[
        ReplayCallback({"wiki": wiki, "code": code}, ratio=0.25, weights={"wiki": 3, "code": 1}),
    ])
    extend(trainer).train()
    ```
    """

    name = "replay"
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "exact, without resume", "zero2": "exact", "zero3": "exact"}

    def __init__(
        self,
        dataset: Any = None,
        ratio: float = 0.05,
        mode: str = "equivalent",
        order: str = "shuffled",
        *,
        unit: str = "samples",
        weights: Mapping[str, float] | None = None,
        ratio_changes: Mapping[int | float | str, float] | None = None,
        from_history: bool = False,
        data: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        allow_no_effect: bool = False,
    ):
        self.config = ReplayConfig(
            ratio=ratio,
            mode=cast(Mode, mode),
            order=cast(Any, order),
            unit=cast(Unit, unit),
            weights=cast(Any, weights),
            ratio_changes=_by_text(ratio_changes),
        )
        for point in self.config.changes:
            if to_point(point, "ratio_changes", tokens_per_step=1) == (0, 0):
                raise ValueError(
                    f"ratio_changes must hold points after the start, got {shown(point)}: that is `ratio`"
                )
        self.from_history = check_flag("from_history", from_history)
        self.past = _past(self.from_history, dataset, data)
        self.datasets = {} if self.past is not None else _named(dataset)
        if self.past is None and self.config.weights and set(self.config.weights) != set(self.datasets):
            raise ValueError(
                f"weights must name the datasets {sorted(self.datasets)}, got {sorted(self.config.weights, key=str)}"
            )
        self.tokenizer = _checked(tokenizer)
        self.allow_no_effect = check_flag("allow_no_effect", allow_no_effect)
        self._prepared: dict[str, Any] = {}
        self._prepared_for: Any = None
        self._lengths: list[tuple[Any, Any, float | None]] = []

    def settings(self) -> dict[str, Any]:
        given = dataclasses.asdict(self.config)
        # Left out where it is as in checkpoints that do not know of it.
        return {**given, "from_history": True} if self.from_history else given

    def recorded(self) -> dict[str, Any]:
        return {} if self.past is None else {"from_history": sorted(self.datasets)}

    # Checks

    def check(self, setup: Setup) -> Iterable[Problem]:
        ratio = self.config.largest_ratio
        if ratio == 0 and not self.allow_no_effect:
            yield Problem(self.name, "would change nothing with ratio=0", "Raise it, or pass allow_no_effect=True.")
        fit = True
        if self.past is not None:
            for problem in self._check_history(setup, self.past):
                fit = fit and problem.level != "error"
                yield problem
            fit = fit and bool(self.datasets)
        for name, dataset in self.datasets.items():
            for problem in self._check_kind(name, dataset):
                fit = False
                yield problem
        if fit and (data.is_map_style(setup.train_dataset) or data.is_stream(setup.train_dataset)):
            for name, prepared in self._data(setup).items():
                if data.is_stream(prepared) or len(prepared):
                    found = list(self._check_rows(setup, name, prepared))
                    fit = fit and not any(problem.level == "error" for problem in found)
                    yield from found
                else:
                    fit = False
                    yield Problem(
                        self.name,
                        f"nothing is left of {self._what(name)} once the trainer prepared it",
                        "Pass longer texts.",
                    )
            if fit:
                yield from self._check_plan(setup)

    def _check_history(self, setup: Setup, past: ReplayedHistory) -> Iterable[Problem]:
        """The sources of earlier stages: found, found by name, or not."""
        if not setup.beginning.history:
            self.datasets = {}
            fix = "Call continue_from(trainer, checkpoint) before train()."
            yield Problem(self.name, "from_history=True knows of no earlier stage yet", fix, level="note")
            return
        training = identified(setup.train_dataset)
        if self.datasets and past.found_for == (setup.trainer, setup.beginning, training):
            return
        self.datasets = {}
        problems = [problem for name, given in past.given.items() for problem in self._check_kind(name, given)]
        yield from problems
        if problems:
            return
        # What an earlier stage read from files was prepared then.
        prepared = {name: setup.prepare(given, name) for name, given in past.given.items()}
        in_order = self.config.order == "original"
        copies = copies_of_buffers(setup.beginning, setup.args.output_dir)
        findings = past.find(setup.beginning, self.config.weights, prepared, training, in_order, copies)
        if not any(fatal for _, _, fatal in findings):
            self.datasets = dict(past.datasets)
            past.found_for = (setup.trainer, setup.beginning, training)
        for message, fix, fatal in findings:
            yield Problem(self.name, message, fix, level="error" if fatal else "note")

    def _what(self, name: str) -> str:
        return "the replay data" if name == self.name else f"the replay data {name!r}"

    def _check_kind(self, name: str, dataset: Any) -> Iterable[Problem]:
        what = self._what(name)
        if name == "train":
            yield Problem(self.name, "a source is named 'train', as the new data is", "Give it another name.")
        if data.is_stream(dataset):
            for message, fix in stream_problems(dataset):
                yield Problem(self.name, f"{what} {message}", fix)
            return
        if (
            not hasattr(dataset, "__len__")
            or not hasattr(dataset, "__getitem__")
            or isinstance(dataset, Mapping | str | bytes)
        ):
            yield Problem(
                self.name,
                f"{what} is a {type(dataset).__name__}, whose rows cannot be looked up by number",
                "Use a `datasets.Dataset` or a stream; of a DatasetDict, one split.",
            )
        elif len(dataset) == 0:
            yield Problem(self.name, f"{what} is empty", "Pass old data, or leave it out.")
        elif fault := looked_up(dataset):
            yield self._problem(what, fault)

    def _problem(self, what: str, fault: Fault) -> Problem:
        message, fix, fatal = fault
        return Problem(self.name, f"{what} {message}", fix, level="error" if fatal else "note")

    def _check_rows(self, setup: Setup, name: str, prepared: Any) -> Iterable[Problem]:
        what = self._what(name)
        looked_at = [setup.sample(prepared), setup.sample(setup.train_dataset)]
        if not all(len(rows) for rows in looked_at):
            yield Problem(self.name, f"{what} or the training data is a stream without rows", "Pass one with rows.")
            return
        try:
            (ours, theirs), collate = setup.stripped(looked_at)
        except ValueError as error:
            yield Problem(self.name, f"{what} cannot be used: {error}", "Tokenize it like the training data.")
            return
        if data.columns(ours) != data.columns(theirs):
            yield Problem(
                self.name,
                f"{what} has the columns {sorted(data.columns(ours))}, the training data "
                f"{sorted(data.columns(theirs))}",
                "Prepare both in the same way.",
            )
            return
        fatal = False
        for fault in faults_of_rows(setup, ours, collate, data.sample_rows(len(ours))):
            fatal |= fault[2]
            yield self._problem(what, fault)
        if data.is_stream(setup.train_dataset):
            # The rows of others are looked at for every plug-in.
            for fault in faults_of_rows(setup, theirs, collate, data.sample_rows(len(theirs))):
                fatal |= fault[2]
                yield self._problem("the training data", fault)
        if fatal:
            return
        if self.tokenizer is not None:
            yield from self._check_tokenizer(setup, what)
        rows = data.token_rows(ours, data.sample_rows(len(ours)))
        new_rows = data.token_rows(theirs, data.sample_rows(len(theirs)))
        if rows and new_rows:
            old_lengths, new_lengths = _lengths(rows), _lengths(new_rows)
            features = [ours[0], theirs[0], ours[_longest(rows, len(ours))], theirs[_longest(new_rows, len(theirs))]]
            try:
                collate(features)
            except Exception as error:  # whatever a user's collator raises is the finding here
                yield Problem(
                    self.name,
                    f"replayed and new rows cannot be collated together ({type(error).__name__}: {error}); replayed "
                    f"rows have {old_lengths} tokens, new rows {new_lengths}",
                    "Cut both into blocks of one length, or use a collator that pads.",
                )
                return
            ratio = float(np.mean([len(r) for r in rows]) / np.mean([len(r) for r in new_rows]))
            if self.config.unit == "samples" and not 0.8 <= ratio <= 1.25:
                yield Problem(
                    self.name,
                    f"rows of {what} have {old_lengths} tokens, new rows {new_lengths}: a ratio of "
                    f"{self.config.ratio:g} in samples is about "
                    f"{self.config.ratio * ratio / (self.config.ratio * ratio + 1 - self.config.ratio):.3g} in tokens",
                    "Pass unit='tokens' if the share in tokens matters.",
                    level="note",
                )

    def _check_tokenizer(self, setup: Setup, what: str) -> Iterable[Problem]:
        if setup.processing_class is None:
            yield Problem(
                self.name,
                f"the tokenizer of {what} cannot be compared: the Trainer has no processing_class",
                "Pass `processing_class=` to the Trainer, or leave `tokenizer` out.",
            )
            return
        try:
            same = data.tokenizer_fingerprint(self.tokenizer) == data.tokenizer_fingerprint(setup.processing_class)
        except Exception as error:  # whatever comes up on the way to a tokenizer is the finding here
            yield Problem(
                self.name,
                f"tokenizer={shown(self.tokenizer)} cannot be compared with the Trainer's ({reason(error)})",
                "Pass a tokenizer, or the folder or name of one.",
            )
            return
        if not same:
            yield Problem(
                self.name,
                f"{what} was made by another tokenizer than the trainer's processing_class",
                "Tokenize it again with the trainer's own.",
            )

    def _check_plan(self, setup: Setup) -> Iterable[Problem]:
        """The plan as it will be, and what is to be known about it."""
        config = self.config
        missing = [name for name, dataset in self._data(setup).items() if data.is_stream(dataset)]
        if len(self.datasets) > 1 and not config.weights and missing:
            yield Problem(
                self.name, f"the size of the stream {missing[0]!r} is not known", "Pass `weights` for all datasets."
            )
            return
        try:
            plan = self.wrap_plan(setup.new_plan(), setup)
        except ValueError as error:
            yield Problem(self.name, str(error), "Change that setting.")
            return
        if config.unit == "tokens" and plan.unit == "samples" and len({s.mean_tokens for s in plan.sources}) > 1:
            unknown = ", ".join(source.name for source in plan.sources if source.lengths is None)
            yield Problem(
                self.name,
                f"row lengths of {unknown} are not known, so the share in tokens is an expected value, from the mean "
                f"of sampled rows ({', '.join(f'{s.name} {s.mean_tokens:,.0f}' for s in plan.sources)})",
                "Use `datasets.Dataset` with input_ids for an exact one; what is realised is logged.",
                level="note",
            )
        if config.mode == "additional" and setup.args.max_steps > 0:
            yield Problem(
                self.name,
                f"mode='additional' lengthens an epoch, but max_steps={setup.args.max_steps} fixes the run",
                f"Use num_train_epochs, or set max_steps to {round(setup.args.max_steps / (1 - config.ratio))} "
                "to see as much new data as without replay.",
                level="note",
            )
        yield from self._check_amounts(setup, plan)

    def _check_amounts(self, setup: Setup, plan: SamplePlan) -> Iterable[Problem]:
        ratios = [self.config.ratio, *self.config.changes.values()]
        kept = [sum(segment.weights[-len(self.datasets) :]) / sum(segment.weights) for segment in plan.segments]
        # Expected shares in tokens are other numbers in samples, and other plug-ins may add segments.
        comparable = plan.unit == self.config.unit and len(kept) == len(ratios)
        for ratio, realised in zip(ratios, kept, strict=True) if comparable else ():
            if abs(realised - ratio) > 1e-3 * ratio:
                yield Problem(
                    self.name,
                    f"ratio={ratio:g} is rounded to {realised:g}, a multiple of 1/65536",
                    "Use a larger ratio if that is too coarse.",
                    level="note",
                )
        draws = run_length(setup.args, plan.epoch, setup.global_batch)[1] * setup.global_batch
        needed = plan.expected_counts(draws)
        for k, source in enumerate(plan.sources):
            if source.replayed and source.num_rows is not None and needed[k] > source.num_rows:
                yield Problem(
                    self.name,
                    f"{self._what(source.name)} is too small for its share: {source.num_rows:,} rows for "
                    f"{needed[k]:,.0f} samples, {needed[k] / source.num_rows:.1f} passes",
                    "Pass more old data if you have it; a few passes are common.",
                    level="note",
                )

    # The plan

    def _data(self, setup: Setup) -> dict[str, Any]:
        if self.past is not None:
            problems = list(self._check_history(setup, self.past))
            if not self.datasets:
                raise PluginError(problems)
            return self.datasets
        if not self._prepared or self._prepared_for is not setup.trainer:
            self._prepared = {name: setup.prepare(dataset, name) for name, dataset in self.datasets.items()}
            self._prepared_for = setup.trainer
        return self._prepared

    def training_data(self, setup: Setup) -> dict[str, Any]:
        try:
            prepared = self._data(setup) if self.past is not None else {}
        except PluginError:  # what is wrong is said by `check`
            return {}
        fit = all(data.is_map_style(dataset) or data.is_stream(dataset) for dataset in self.datasets.values())
        return (prepared or self._data(setup)) if fit else {}

    def wrap_plan(self, plan: SamplePlan, setup: Setup) -> SamplePlan:
        config, args, new = self.config, setup.args, plan.sources[0]
        sources = [
            Source(
                name,
                None if data.is_stream(dataset) else len(dataset),
                order=config.order,
                replayed=True,
                dataset=dataset,
                # Small shares would read the same rows in every stage.
                key=None if self.past is None else f"{name}, in stage {setup.beginning.number}",
            )
            for name, dataset in self._data(setup).items()
        ]
        if config.unit == "tokens":
            sources = [self._with_lengths(source, setup) for source in sources]
            plan = dataclasses.replace(plan, sources=tuple(self._with_lengths(s, setup) for s in plan.sources))
            new = plan.sources[0]
        weights = self._weights(sources, setup)
        changes = self._changes(setup)
        epoch, epochs = plan.epoch, Fraction(1)
        if new.num_rows is not None:
            # A run of max_steps is as long as it is; what an epoch is in it follows from the first ratio.
            fixed = args.max_steps > 0
            epochs = epochs if fixed else Fraction(repr(float(args.num_train_epochs)))
            stage = changes[:1] if fixed else changes
            draws = stage_draws(new, sources, weights, stage, config.mode, config.unit, epochs) / epochs
            epoch = -(-draws.numerator // draws.denominator)
        while True:
            steps = run_length(args, epoch, setup.global_batch)[1]
            starts = _starts(changes, steps, setup.global_batch)
            made = with_replay(plan, sources, weights, starts, epoch, config.unit)
            if config.mode == "equivalent" or new.num_rows is None or args.max_steps > 0:
                return made
            # Changes fall on whole steps, which may cost a few new rows: a little longer, then.
            seen = made.expected_counts(steps * setup.global_batch)[0]
            lacking = math.ceil(Fraction(new.num_rows) * epochs) - math.floor(seen)
            if lacking <= 0 or config.unit == "tokens":
                return made
            epoch += max(math.ceil(lacking / epochs), 1)

    def _with_lengths(self, source: Source, setup: Setup) -> Source:
        """The source with what can be known about the lengths of its rows."""
        for dataset, lengths, mean in self._lengths:
            if dataset is source.dataset:
                return dataclasses.replace(source, lengths=lengths, mean_tokens=mean)
        lengths = None
        if not data.is_stream(source.dataset):
            lengths = data.row_lengths(source.dataset, getattr(setup.args, "length_column_name", None))
        mean = data.mean_tokens(setup.sample(source.dataset)) if lengths is None else None
        self._lengths.append((source.dataset, lengths, mean))
        return dataclasses.replace(source, lengths=lengths, mean_tokens=mean)

    def _weights(self, sources: list[Source], setup: Setup) -> list[float]:
        if self.past is not None:
            return self._weights_of_history(sources, self.past, setup)
        if isinstance(self.config.weights, dict):
            return [self.config.weights[source.name] for source in sources]
        if len(sources) == 1:
            return [1.0]
        mean = [source.mean_tokens or 1.0 if self.config.unit == "tokens" else 1.0 for source in sources]
        return [float(source.num_rows or 0) * tokens for source, tokens in zip(sources, mean, strict=True)]

    def _weights_of_history(self, sources: list[Source], past: ReplayedHistory, setup: Setup) -> list[float]:
        """Weights in what `ratio` is counted in, of which tokens come out as they were seen."""
        if len(sources) == 1:
            return [1.0]
        seen = [past.weights[source.name] for source in sources]
        if self.config.unit == "tokens" or not past.in_tokens:
            return seen
        means = [self._with_lengths(source, setup).mean_tokens for source in sources]
        if any(mean is None for mean in means) or len(set(means)) == 1:
            return seen
        return [tokens / mean for tokens, mean in zip(seen, means, strict=True) if mean]

    def _changes(self, setup: Setup) -> list[Change]:
        changes = [Change(self.config.ratio)]
        for point, ratio in self.config.changes.items():
            per_step = setup.tokens_per_step if "token" in point else None
            steps, fraction = to_point(point, "ratio_changes", per_step)
            changes.append(Change(ratio, steps * setup.global_batch, fraction))
        return changes

    def describe(self) -> list[str]:
        if self.run is None or self.run.plan is None:
            return []
        run, plan = self.run, self.run.plan
        end = run.total_steps * run.global_batch
        counts = plan.expected_counts(end)
        old = [k for k, source in enumerate(plan.sources) if source.replayed]
        replayed = sum(counts[k] for k in old)
        lines = [
            f"replay: {_about(replayed)} of {end:,} samples ({replayed / max(end, 1):.2%})"
            + ("" if len(old) > 1 else f", {_passes(plan.sources[old[0]], counts[old[0]])}")
        ]
        if len(old) > 1:
            lines += [
                f"replay: {plan.sources[k].name} {_about(counts[k])} samples, {_passes(plan.sources[k], counts[k])}"
                for k in old
            ]
        ratios = [f"{self.config.ratio:g}", *(f"{r:g} from {p}" for p, r in self.config.changes.items())]
        if len(ratios) > 1 or self.config.unit == "tokens":
            known = self.config.unit == "samples" or all(source.lengths is not None for source in plan.sources)
            exact = "" if known else " (expected)"
            lines.append(f"replay: ratio {', '.join(ratios)} in {self.config.unit}{exact}")
        return lines

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_ratio(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_ratio(control)

    def _log_ratio(self, control: Any) -> None:
        if self.run is not None and control.should_log:
            self.run.log(realised_ratio(self.run.realised()))


def _past(from_history: bool, dataset: Any, given: Any) -> ReplayedHistory | None:
    if not from_history:
        if dataset is None:
            raise ValueError("dataset is missing: pass old data, or from_history=True in a stage after others")
        if given is not None:
            raise ValueError("data belongs to from_history=True; otherwise old data by name is the first argument")
        return None
    if dataset is not None:
        raise ValueError("dataset and from_history=True are two ways to say what is replayed: pass data={name: ...}")
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(n, str) and n for n in given)):
        raise ValueError(f"data must be a dict of datasets by the names of sources, got {shown(given)}")
    return ReplayedHistory(dict(given or {}))


def _named(dataset: Any) -> dict[str, Any]:
    """Sources by name; what `datasets` calls a DatasetDict is refused later, with the other data that does not fit."""
    from datasets import DatasetDict, IterableDatasetDict

    if isinstance(dataset, Mapping) and not isinstance(dataset, DatasetDict | IterableDatasetDict):
        if not dataset or not all(isinstance(name, str) and name for name in dataset):
            raise ValueError(
                f"dataset must hold at least one dataset, by names that are strings, got {shown(list(dataset))}"
            )
        return dict(dataset)
    return {ReplayCallback.name: dataset}


def _checked(tokenizer: Any) -> Any:
    holds_vocabulary = hasattr(getattr(tokenizer, "tokenizer", tokenizer), "get_vocab")
    if tokenizer is None or holds_vocabulary or (isinstance(tokenizer, str | os.PathLike) and os.fspath(tokenizer)):
        return tokenizer
    raise ValueError(f"tokenizer must be a tokenizer, or the folder or name of one, got {shown(tokenizer)}")


def _by_text(changes: Any) -> Any:
    """Points as text, as a command line has them: settings are compared on resume, wherever they come from."""
    return {str(point): ratio for point, ratio in changes.items()} if isinstance(changes, Mapping) else changes


def _starts(changes: list[Change], steps: int, global_batch: int) -> list[tuple[int, float]]:
    """Start draw and ratio of every change, on whole steps of a run of `steps` steps."""
    starts: list[tuple[int, float]] = []
    for number, change in enumerate(changes):
        step = change.draws // global_batch + math.floor(change.fraction * steps + Fraction(1, 2))
        last = starts[-1][0] // global_batch if starts else -1
        # Fractions so close that they fall on one step of a short run: the later ratio holds from there.
        if number > 1 and step == last and not change.draws and not changes[number - 1].draws:
            starts.pop()
        elif number and not last < step < steps:
            raise ValueError(
                f"ratio_changes: the ratio of {change.ratio:g} would start at step {step}, but points must rise and "
                f"lie between step {last} and the run's end at step {steps}"
            )
        starts.append((step * global_batch, change.ratio))
    return starts


def _about(count: float) -> str:
    return f"{count:,.0f}" if float(count).is_integer() else f"about {count:,.0f}"


def _passes(source: Source, count: float) -> str:
    if source.num_rows is None:
        return "from a stream"
    return f"{count / source.num_rows:.2f} passes over {source.num_rows:,} old rows"


def _lengths(rows: list[Any]) -> str:
    shortest, longest = min(len(row) for row in rows), max(len(row) for row in rows)
    return f"{shortest}" if shortest == longest else f"{shortest} to {longest}"


def _longest(rows: list[Any], num_rows: int) -> int:
    return data.sample_rows(num_rows)[int(np.argmax([len(row) for row in rows]))]
