"""Replay: keep a share of every step for old data, so that the model does not forget it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from hf_pretrain_ext import data
from hf_pretrain_ext.plan import SamplePlan, Source, integer_weights
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.replay import Mode, ReplayConfig, realised_ratio, with_replay

__all__ = ["ReplayCallback"]


class ReplayCallback(TrainerPlugin):
    """Mixes old data into training at an exact ratio: replayed samples ÷ all samples, in every optimizer step.

    Every step of G samples replays ⌊G·ratio⌋ or ⌈G·ratio⌉ of them, and over the run the count never strays from the
    ratio by a whole sample. The realised ratio is logged in samples (`replay_ratio`) and in loss-bearing tokens
    (`replay_ratio_tokens`).

    Args:
        dataset (`datasets.Dataset` or a map-style dataset): old data, prepared like the training data: the same
            columns, the same tokenizer. For an `SFTTrainer`, raw data will do: the trainer prepares it as its own.
        ratio (`float`, *optional*, defaults to `0.05`): the recipe of Ibrahim et al. (2024): 5 % for a weak shift
            of domain, 25 % for a strong one.
        mode (`str`, *optional*, defaults to `"equivalent"`): `"equivalent"` keeps the length of the run and sees less
            new data (Ibrahim et al.); `"additional"` sees all new data and replay besides: an epoch becomes
            len(new)/(1 − ratio) samples. Abbes et al. (2025) enlarge the batch instead: their setting is
            `"additional"` with a larger `per_device_train_batch_size`.
        order (`str`, *optional*, defaults to `"shuffled"`): `"shuffled"`, or `"original"` to replay in the order in
            which the old data was first visited, as Ibrahim et al. do.
        tokenizer (tokenizer or `str`, *optional*): what the old data was tokenized with, to be compared with the
            trainer's own.
        allow_no_effect (`bool`, *optional*, defaults to `False`): accept `ratio=0`.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, data that does not fit; every problem is listed.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=domain, callbacks=[ReplayCallback(general, ratio=0.25)])
    extend(trainer).train()
    ```
    """

    name = "replay"
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "untested", "zero2": "untested", "zero3": "untested"}

    def __init__(
        self,
        dataset: Any,
        ratio: float = 0.05,
        mode: str = "equivalent",
        order: str = "shuffled",
        *,
        tokenizer: Any = None,
        allow_no_effect: bool = False,
    ):
        self.config = ReplayConfig(ratio=ratio, mode=cast(Mode, mode), order=cast(Any, order))
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.allow_no_effect = allow_no_effect
        self._prepared: Any = None
        self._prepared_for: Any = None

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def check(self, setup: Setup) -> Iterable[Problem]:
        ratio = self.config.ratio
        if ratio == 0 and not self.allow_no_effect:
            yield Problem(self.name, "would change nothing with ratio=0", "Raise it, or pass allow_no_effect=True.")
        kept = integer_weights([1 - ratio, ratio])[1] / sum(integer_weights([1 - ratio, ratio])) if ratio else 0
        if abs(kept - ratio) > 1e-3 * ratio:
            yield Problem(
                self.name,
                f"ratio={ratio:g} is rounded to {kept:g}, a multiple of 1/65536",
                "Use a larger ratio if that is too coarse.",
                level="note",
            )
        sized = hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")
        if not data.is_map_style(self.dataset) and not (sized and len(self.dataset) == 0):
            yield Problem(
                self.name,
                f"the replay data is a {type(self.dataset).__name__}, whose rows cannot be looked up by number",
                "Use a map-style dataset (`datasets.Dataset`); of a DatasetDict, one split.",
            )
            return
        if len(self.dataset) == 0:
            yield Problem(self.name, "the replay data is empty", "Pass old data, or leave the callback out.")
            return
        if not data.is_map_style(setup.train_dataset):
            return  # said by the checks of the plan
        if len(self._data(setup)) == 0:
            yield Problem(
                self.name, "nothing is left of the replay data once the trainer prepared it", "Pass longer texts."
            )
            return
        yield from self._check_rows(setup)
        yield from self._check_amount(setup)

    def _check_rows(self, setup: Setup) -> Iterable[Problem]:
        try:
            (ours, theirs), collate = setup.stripped([self._prepared, setup.train_dataset])
        except ValueError as error:
            yield Problem(self.name, f"the replay data cannot be used: {error}", "Tokenize it like the training data.")
            return
        if data.columns(ours) != data.columns(theirs):
            yield Problem(
                self.name,
                f"the replay data has the columns {sorted(data.columns(ours))}, the training data "
                f"{sorted(data.columns(theirs))}",
                "Prepare both in the same way.",
            )
            return
        rows = data.token_rows(ours, data.sample_rows(len(ours)))
        found, vocabulary = data.id_range(rows), setup.embeddings
        if found and vocabulary and (found[0] < 0 or found[1] >= vocabulary):
            yield Problem(
                self.name,
                f"the replay data holds token ids {found[0]}..{found[1]}, but the model has {vocabulary} embeddings",
                "Tokenize it with the model's own tokenizer.",
            )
            return
        if self.tokenizer is not None and setup.processing_class is not None:
            if data.tokenizer_fingerprint(self.tokenizer) != data.tokenizer_fingerprint(setup.processing_class):
                yield Problem(
                    self.name,
                    "the replay data was made by another tokenizer than the trainer's processing_class",
                    "Tokenize it again with the trainer's own.",
                )
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
            if not 0.8 <= ratio <= 1.25:
                yield Problem(
                    self.name,
                    f"replayed rows have {old_lengths} tokens, new rows {new_lengths}: a ratio of "
                    f"{self.config.ratio:g} in samples is about "
                    f"{self.config.ratio * ratio / (self.config.ratio * ratio + 1 - self.config.ratio):.3g} in tokens",
                    "Use blocks of one length if the share in tokens matters.",
                    level="note",
                )

    def _check_amount(self, setup: Setup) -> Iterable[Problem]:
        if self.config.mode == "additional" and setup.args.max_steps > 0:
            yield Problem(
                self.name,
                f"mode='additional' lengthens an epoch, but max_steps={setup.args.max_steps} fixes the run",
                f"Use num_train_epochs, or set max_steps to {round(setup.args.max_steps / (1 - self.config.ratio))} "
                "to see as much new data as without replay.",
                level="note",
            )
        if setup.total_steps is None:
            return
        samples = setup.total_steps * setup.global_batch
        if self.config.mode == "additional" and setup.args.max_steps <= 0:
            samples = round(samples / (1 - self.config.ratio))
        needed = self.config.ratio * samples
        if needed > len(self._prepared):
            yield Problem(
                self.name,
                f"the replay data is too small for its share: {len(self._prepared):,} rows for {needed:,.0f} samples, "
                f"{needed / len(self._prepared):.1f} passes",
                "Pass more old data if you have it; a few passes are common.",
                level="note",
            )

    def _data(self, setup: Setup) -> Any:
        if self._prepared is None or self._prepared_for is not setup.trainer:
            self._prepared, self._prepared_for = setup.prepare(self.dataset, "replay"), setup.trainer
        return self._prepared

    def training_data(self, setup: Setup) -> dict[str, Any]:
        return {"replay": self._data(setup)} if data.is_map_style(self.dataset) else {}

    def wrap_plan(self, plan: SamplePlan) -> SamplePlan:
        source = Source("replay", len(self._prepared), order=self.config.order, replayed=True, dataset=self._prepared)
        return with_replay(plan, source, self.config.ratio, self.config.mode)

    def describe(self) -> list[str]:
        if self.run is None or self.run.plan is None:
            return []
        run, plan = self.run, self.run.plan
        end = run.total_steps * run.global_batch
        k = [source.name for source in plan.sources].index("replay")
        counts, passes = plan.counts(end), plan.passes(end)
        return [
            f"replay: {counts[k]:,} of {end:,} samples ({counts[k] / max(end, 1):.2%}), "
            f"{passes[k]:.2f} passes over {plan.sources[k].num_rows:,} old rows"
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_ratio(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_ratio(control)

    def _log_ratio(self, control: Any) -> None:
        if self.run is not None and control.should_log:
            self.run.log(realised_ratio(self.run.realised()))


def _lengths(rows: list[Any]) -> str:
    shortest, longest = min(len(row) for row in rows), max(len(row) for row in rows)
    return f"{shortest}" if shortest == longest else f"{shortest} to {longest}"


def _longest(rows: list[Any], num_rows: int) -> int:
    return data.sample_rows(num_rows)[int(np.argmax([len(row) for row in rows]))]
