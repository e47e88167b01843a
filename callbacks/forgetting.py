"""Forgetting: measure what the model loses and gains on held-out sets, from before the first step on."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hf_pretrain_ext import _host, data
from hf_pretrain_ext.forgetting import (
    WEIGHT,
    ForgettingConfig,
    History,
    Past,
    heldout_loss,
    is_probe_step,
    past_of,
    probe_steps,
)
from hf_pretrain_ext.loader import loss_tokens
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.report.plots import forgetting_plot, have_matplotlib
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.row_checks import faults_of_rows, looked_up
from hf_pretrain_ext.sources import identified
from hf_pretrain_ext.stages import Beginning
from hf_pretrain_ext.trace import plain
from hf_pretrain_ext.units import to_steps
from hf_pretrain_ext.values import is_number, shown

__all__ = ["ForgettingCallback"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ForgettingCallback(TrainerPlugin):
    """Measures token-weighted loss and perplexity on held-out sets of old and new domains; changes nothing.

    Probes run before the first step, densely in the first steps (1 to 20, then powers of two: where the stability gap
    is), then regularly and after the last. Each is logged as `eval_<set>_loss` and `eval_<set>_perplexity`, which
    `metric_for_best_model`, `load_best_model_at_end` and early stopping can use. At the end `forgetting.json` and
    `forgetting.png` lie in `output_dir`, with the figures defined in `hf_pretrain_ext.forgetting`.

    In a stage begun with `continue_from`, a set that earlier stages measured on the same rows has figures over the
    whole life besides, logged as `life_forgetting_<set>` (loss now − lowest of earlier stages), `life_gain_<set>`
    (first loss of the life − now) and, over all such sets, `backward_transfer`.

    Training is bit-identical with and without it. Cost: one forward pass over `max_samples` rows a set and probe.

    Args:
        datasets (`dict[str, Dataset]`): held-out sets by name, prepared like the evaluation data.
        every (`int`, `float` or `str`, *optional*, defaults to `0.05`): steps between probes, or a share of the run.
        first_steps (`str`, *optional*, defaults to `"dense"`): `"dense"` or `"sparse"` (only every `every`).
        max_samples (`int`, *optional*, defaults to `256`): rows of each set that a probe reads, chosen once, by key.
        batch_size (`int`, *optional*): rows a forward pass; defaults to `per_device_eval_batch_size`.
        alert_if (`dict[str, float]`, *optional*): warn once when a set's loss has risen by this many nats over step 0.
        stop_if (`dict[str, float]`, *optional*): stop training, after a save if saving is on, likewise.

    Raises:
        `ValueError`: at construction, settings out of range or thresholds for unknown sets.
        [`PluginError`]: at `extend`, sets that are empty or do not fit the model.

    Example:

    ```python
    ForgettingCallback({"general": general_eval, "domain": domain_eval}, stop_if={"general": 0.3})
    ```
    """

    name = "forgetting"
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "exact, without resume", "zero2": "exact", "zero3": "exact"}

    def __init__(
        self,
        datasets: Mapping[str, Any],
        *,
        every: int | float | str = 0.05,
        first_steps: str = "dense",
        max_samples: int = 256,
        batch_size: int | None = None,
        alert_if: Mapping[str, float] | None = None,
        stop_if: Mapping[str, float] | None = None,
    ):
        if not isinstance(datasets, Mapping) or not datasets:
            raise ValueError(f"datasets must be a dict of held-out sets by name, got {shown(datasets)}")
        for name in datasets:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"datasets: a name holds letters, digits, '_', '.' and '-', got {shown(name)}")
        self.config = ForgettingConfig(
            every=cast(str, every), first_steps=first_steps, max_samples=max_samples, batch_size=batch_size
        )
        self.datasets = dict(datasets)
        self.alert_if = _thresholds("alert_if", alert_if, datasets)
        self.stop_if = _thresholds("stop_if", stop_if, datasets)
        self.history = History()
        self._prepared: dict[str, Any] = {}
        self._prepared_for: Any = None
        self._fingerprints: dict[str, str] = {}
        self._pasts: dict[str, Past] = {}
        self._alerted: list[str] = []
        self._stopped = False

    def settings(self) -> dict[str, Any]:
        # What is measured may change between a run and its resume; what may end the run may not.
        return {"stop_if": self.stop_if} if self.stop_if else {}

    def check(self, setup: Setup) -> Iterable[Problem]:
        known = setup.trainer.eval_dataset
        for name, dataset in self.datasets.items():
            who = f"{self.name}[{name}]"
            if not data.is_map_style(dataset) and (isinstance(dataset, Mapping) or not _is_empty(dataset)):
                yield Problem(
                    who,
                    f"is a {type(dataset).__name__}, whose rows cannot be looked up by number",
                    "Use a map-style dataset; of a DatasetDict, one split.",
                )
                continue
            if _is_empty(dataset):
                yield Problem(who, "is empty", "Pass held-out rows, or leave the set out.")
                continue
            if fault := looked_up(dataset):
                yield Problem(who, *fault[:2])
                continue
            if isinstance(known, Mapping) and name in known:
                yield Problem(
                    who,
                    "has the name of a set in the Trainer's eval_dataset, whose metrics it would overwrite",
                    "Rename one of them.",
                )
            if self._prepared_for is not setup.trainer:
                self._prepared, self._fingerprints, self._prepared_for = {}, {}, setup.trainer
            if name not in self._prepared:
                self._prepared[name] = setup.prepare(dataset, name, training=False)
            yield from self._check_set(who, self._prepared[name], setup)
            yield from self._check_past(who, name, setup)

    def _check_set(self, who: str, dataset: Any, setup: Setup) -> Iterable[Problem]:
        try:
            (stripped,), collate = setup.stripped([dataset])
        except ValueError as error:
            yield Problem(who, f"cannot be used: {error}", "Tokenize it like the evaluation data.")
            return
        sampled = data.sample_rows(len(stripped), self.config.max_samples)
        fatal = False
        for message, fix, stops in faults_of_rows(setup, stripped, collate, sampled):
            fatal |= stops
            yield Problem(who, message, fix, level="error" if stops else "note")
        if fatal:
            return
        rows = data.token_rows(stripped, sampled)
        problem = self._check_batches(who, stripped, rows, sampled, collate, setup)
        if problem is not None:
            yield problem
            return
        for label, trained in self._trained_on(setup).items():
            sampled = data.sample_rows(len(trained))
            whole, near = data.copied_rows(rows, data.token_rows(trained, sampled))
            # What was found in a sample of the training rows is a lower bound; scaled up, it decides whether to speak.
            if (whole + near) * len(trained) / len(sampled) > 0.01 * len(rows):
                looked = "" if len(sampled) == len(trained) else f"{len(sampled):,} of the {len(trained):,} rows of "
                yield Problem(
                    who,
                    f"{whole} of its {len(rows)} rows are in {looked}the {label} data, and {near} more share 40 % or "
                    "more of their 13-grams with one row there",
                    "Hold out whole documents, or its loss says little about what was learned.",
                    level="note",
                )

    def _check_past(self, who: str, name: str, setup: Setup) -> Iterable[Problem]:
        """A set of a name that earlier stages know, and of other rows."""
        measured = _measured(setup.beginning, name)
        if measured and past_of(measured, self._fingerprint(name)) is None:
            yield Problem(
                who,
                f"is not the set of that name in stage {measured[-1][0]!r} (other rows): its figures over the life of "
                "the model start anew",
                "Pass the same rows, with the same max_samples, to go on with them.",
                level="note",
            )

    def _fingerprint(self, name: str) -> str:
        """Of the rows that probes read."""
        if name not in self._fingerprints:
            dataset = self._prepared[name]
            rows = min(len(dataset), self.config.max_samples)
            self._fingerprints[name] = f"{identified(dataset)}-{rows}"
        return self._fingerprints[name]

    def _check_batches(
        self, who: str, dataset: Any, rows: list[Any], sampled: list[int], collate: Any, setup: Setup
    ) -> Problem | None:
        """Batches as a probe makes them: of rows that fit each other, with labels that bear a loss."""
        size = self.config.batch_size or setup.args.per_device_eval_batch_size
        batches = [sampled[at : at + size] for at in range(0, len(sampled), size)]
        if size > 1 and len(rows) == len(sampled):
            lengths = [len(row) for row in rows]
            batches.insert(0, [sampled[lengths.index(min(lengths))], sampled[lengths.index(max(lengths))]])
        for chosen in batches:
            try:
                batch = collate([dataset[row] for row in chosen])
            except Exception as error:  # whatever a user's collator raises is the finding here
                return Problem(
                    who,
                    f"its rows cannot be collated ({type(error).__name__}: {error})",
                    "Prepare it like the evaluation data: rows of one length, or a collator that pads.",
                )
            if not isinstance(batch, Mapping) or not {"labels", "shift_labels"} & set(batch):
                return Problem(
                    who,
                    "gives batches without labels, so there is no loss",
                    "Add labels, or a collator that makes them.",
                )
            bearing = loss_tokens(batch, [None] * len(chosen), _host.shifts_labels(setup.trainer))
            if bearing is None or bearing.any():
                return None
        return Problem(
            who,
            f"asks for no loss: all labels of the {len(sampled):,} rows that a probe reads are -100",
            "Keep the labels of what the model should know.",
        )

    def _trained_on(self, setup: Setup) -> dict[str, Any]:
        """Everything that the run trains on and that can be looked up."""
        found = {"training": setup.train_dataset}
        for plugin in setup.plugins:
            found.update(plugin.training_data(setup))
        return {label: dataset for label, dataset in found.items() if data.is_map_style(dataset)}

    def describe(self) -> list[str]:
        if self.run is None:
            return []
        probes = self.marks(self.run.total_steps)
        lines = [f"forgetting: {len(probes)} probes of {', '.join(self.datasets)} ({self._rows_text()})"]
        if not have_matplotlib():
            lines.append("forgetting: no forgetting.png without matplotlib; pip install 'hf-pretrain-ext[report]'")
        return lines

    def marks(self, total_steps: int) -> list[int]:
        return probe_steps(total_steps, self._every(total_steps), dense=self.config.first_steps == "dense")

    def _rows_text(self) -> str:
        return ", ".join(f"{min(len(d), self.config.max_samples):,} rows" for d in self._prepared.values())

    # Life cycle

    def begin(self) -> None:
        began = self.run.beginning if self.run else Beginning()
        found = {name: past_of(_measured(began, name), self._fingerprint(name)) for name in self._prepared}
        self._pasts = {name: past for name, past in found.items() if past is not None}
        self.history = History()
        self._alerted = []
        self._stopped = False

    def state(self) -> dict[str, Any]:
        return {"sets": self.history.sets, "alerted": self._alerted, "stopped": self._stopped}

    def recorded(self) -> dict[str, Any]:
        return self.history.recorded({name: self._fingerprint(name) for name in self.history.sets})

    def load_state(self, state: dict[str, Any]) -> None:
        # Sets may be added and removed between a run and its resume; those that are gone are not carried along.
        self.history = History({name: entry for name, entry in state["sets"].items() if name in self.datasets})
        self._alerted = list(state["alerted"])
        self._stopped = bool(state["stopped"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # Also on a resume, where SIGTERM came between the step and its probe.
        if self.history.last_step() < 0 or self._is_due(state.global_step):
            self._probe(control)
        if self._stopped and self.run is not None:
            control.should_training_stop = True
            self.run.say(
                "this run was stopped (stop_if): there is nothing to resume; continue_from(trainer, checkpoint) "
                "begins a new stage",
                logging.WARNING,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due(state.global_step) or control.should_training_stop:
            self._probe(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is None or not self.run.is_main:
            return
        self._write()
        self.run.trace("forgetting", summary=self.history.summary())
        life = [f"{name} {value:+.3f}" for name, value in self.history.life(self._pasts).items()]
        self.run.say("\n".join([*self.history.table(), *([f"over the life: {', '.join(life)}"] if life else [])]))
        self._draw()

    def eval_metrics(self) -> dict[str, float]:
        if self.run is not None:
            self._probe(self.run.trainer.control)
        return self.history.scalars()

    def _is_due(self, step: int) -> bool:
        if self.run is None:
            return False
        total = self.run.total_steps
        return is_probe_step(step, total, self._every(total), dense=self.config.first_steps == "dense")

    def _every(self, total_steps: int) -> int:
        return max(to_steps(self.config.every, total_steps or 1, "every"), 1)

    def _probe(self, control: Any) -> None:
        run = self.run
        if run is None or self.history.last_step() == run.step:
            return
        began = time.perf_counter()
        # A fixed seed inside: collators that mask at random mask the same tokens at every probe.
        with rng_guard(seed=0):
            for name, dataset in self._prepared.items():
                sums = heldout_loss(
                    run.model,
                    self._batches(dataset),
                    shifts_labels=run.shifts_labels,
                    autocast=run.autocast,
                    device=run.device,
                )
                nll, tokens = run.sum_over_ranks(sums).tolist()
                self.history.add(name, run.step, nll / tokens if tokens else math.nan, int(tokens))
        run.log({**self.history.scalars(), **self.history.life(self._pasts)})
        run.trace("probe", losses=self.history.scalars(), seconds=round(time.perf_counter() - began, 3))
        if run.is_main:
            self._write()
        self._judge(control)

    def _batches(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """This rank's part of the set; ranks that have fewer batches repeat one with no weight, to keep in step."""
        run = self.run
        if run is None:
            return
        rank, ranks = run.ranks
        rows = data.sample_rows(len(dataset), self.config.max_samples)
        size = self.config.batch_size or run.trainer.args.per_device_eval_batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        for turn in range(-(-len(batches) // ranks)):
            number = turn * ranks + rank
            batch = run.collate_rows(dataset, batches[min(number, len(batches) - 1)])
            batch[WEIGHT] = 1.0 if number < len(batches) else 0.0
            yield batch

    def _judge(self, control: Any) -> None:
        run = self.run
        if run is None:
            return
        for name, threshold in self.alert_if.items():
            # Not "rise > threshold": a loss that is not a number has risen too.
            if not self.history.rise(name) <= threshold and name not in self._alerted:
                self._alerted.append(name)
                run.trace("alert", set=name, rise=self.history.rise(name), threshold=threshold)
                run.say(
                    f"alert: the loss on {name} has risen by {self.history.rise(name):.3f} nats since step 0 "
                    f"(alert_if: {threshold:g})",
                    logging.WARNING,
                )
        for name, threshold in self.stop_if.items():
            if not self.history.rise(name) <= threshold and not control.should_training_stop:
                control.should_training_stop = self._stopped = True
                control.should_save = control.should_save or run.trainer.args.save_strategy != "no"
                run.trace("stop", set=name, rise=self.history.rise(name), threshold=threshold)
                run.say(
                    f"stopping: the loss on {name} has risen by {self.history.rise(name):.3f} nats since step 0 "
                    f"(stop_if: {threshold:g})",
                    logging.WARNING,
                )

    def _write(self) -> None:
        if self.run is None:
            return
        folder = Path(self.run.output_dir)
        content = json.dumps(plain(self.history.to_json(self._pasts)), indent=1, allow_nan=False)
        temporary = folder / "_forgetting.json.tmp"  # pushes leave such names out
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / "forgetting.json")
        except OSError as error:
            # The figures are in memory and in every checkpoint: no reason to lose the run.
            self.run.say(f"forgetting.json cannot be written ({error})", logging.WARNING)

    def _draw(self) -> None:
        if self.run is None or not have_matplotlib():
            return
        path = Path(self.run.output_dir) / "forgetting.png"
        try:
            forgetting_plot({"this run": self.history.to_json()}, path)
        except OSError as error:
            self.run.say(f"{path} cannot be written ({error})", logging.WARNING)


def _measured(began: Beginning, name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What earlier stages recorded of the set `name`, by stage."""
    found = [(stage.name, (stage.recorded.get(ForgettingCallback.name) or {}).get(name)) for stage in began.history]
    return [(stage, entry) for stage, entry in found if isinstance(entry, Mapping)]


def _is_empty(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset) == 0


def _thresholds(name: str, given: Mapping[str, float] | None, sets: Mapping[str, Any]) -> dict[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"{name} must be a dict of rises in nats by set, such as {{'general': 0.3}}, got {shown(given)}"
        )
    for key, value in (given or {}).items():
        if key not in sets:
            raise ValueError(f"{name}: {shown(key)} is not one of the sets {sorted(sets)}")
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name}[{key!r}] must be a positive rise in nats, got {shown(value)}")
    return {key: float(value) for key, value in (given or {}).items()}
