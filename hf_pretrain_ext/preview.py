"""What a run will do, before it does it: learning rate, mixture, phases, probes, steps and tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_pretrain_ext import data
from hf_pretrain_ext.plan import SamplePlan, Source
from hf_pretrain_ext.plan.plan import EXACT_DRAWS
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.trace import plain

if TYPE_CHECKING:
    from hf_pretrain_ext.run import PluginRun
    from hf_pretrain_ext.schedules import LRSchedule

__all__ = ["Preview", "SourcePreview", "preview_of"]

_POINTS = 400
_MEASURED_ROWS = 1 << 26
_COUNTED_DRAWS = 1 << 22


@dataclass(frozen=True)
class SourcePreview:
    """What a run will draw from one source. `rows` and `passes` are None for a stream, `tokens` where not known."""

    name: str
    rows: int | None
    replayed: bool
    order: str
    samples: float
    tokens: float | None
    tokens_exact: bool
    passes: float | None


@dataclass(frozen=True)
class Preview:
    """A run before it begins. `print` shows it as a table, [`Preview.save`] draws it.

    Attributes:
        total_steps (`int`): optimizer steps; 0 where only the host's own loader will tell.
        steps_per_epoch (`int`): optimizer steps an epoch.
        global_batch (`int`): samples an optimizer step.
        learning_rate (`dict` or `None`): `steps` and the `rates` of the updates they make, and the schedule's
            `phases` by name, start and stop step; None where the host's own schedule is in force.
        sources (`tuple[SourcePreview, ...]`): totals over the run; empty where no plug-in decides the order.
        mixture (`tuple[dict, ...]`): `step`, `shares` by source and their `unit`, wherever the mixture changes.
        phases (`tuple[dict, ...]`): named ranges of steps: `name`, `start`, `stop`.
        marks (`dict[str, list[int]]`): steps at which plug-ins act, by plug-in (probes of forgetting).
        tokens (`float` or `None`): tokens read in the run, padding left out; `tokens_exact` says whether they were
            counted or estimated from a mean row.
    """

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    learning_rate: dict[str, Any] | None
    sources: tuple[SourcePreview, ...]
    mixture: tuple[dict[str, Any], ...]
    phases: tuple[dict[str, Any], ...]
    marks: dict[str, list[int]]
    tokens: float | None
    tokens_exact: bool

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = plain(dataclasses.asdict(self))
        return result

    def save(self, path: str | Path) -> None:
        """Draws the preview into a PNG file. Needs matplotlib: `pip install 'hf-pretrain-ext[report]'`."""
        from hf_pretrain_ext.report.plan_plot import plan_plot

        plan_plot(self.to_json(), path)

    def __str__(self) -> str:
        return "\n".join([*self._length(), "", *self._timeline(), *self._totals(), *self._marks()])

    def _length(self) -> list[str]:
        if not self.total_steps:
            return ["The length of the run is known only once training starts (the data has no length, or no steps)."]
        samples = self.total_steps * self.global_batch
        line = f"{self.total_steps:,} optimizer steps of {self.global_batch:,} samples: {samples:,} samples"
        if self.tokens is not None:
            line += f", {_number(self.tokens, self.tokens_exact)} tokens"
        epochs = self.total_steps / self.steps_per_epoch
        return [line, f"{self.steps_per_epoch:,} steps an epoch, {epochs:.4g} epochs"]

    def _timeline(self) -> list[str]:
        """What holds from which step on: one line wherever anything changes."""
        names = list(self.mixture[0]["shares"]) if self.mixture else []
        steps = {0, max(self.total_steps - 1, 0)}
        rates = self.learning_rate
        for phase in [*(rates["phases"] if rates else []), *self.phases]:
            steps |= {phase["start"], phase["stop"]}
        steps |= {change["step"] for change in self.mixture}
        rows = [["step", "learning rate", *names, "phases"]]
        for step in sorted(step for step in steps if step < max(self.total_steps, 1)):
            mixture = [change for change in self.mixture if change["step"] <= step]
            shares = [f"{mixture[-1]['shares'][name]:.2%}" for name in names]
            inside = [p["name"] for p in (rates["phases"] if rates else []) if p["start"] <= step < p["stop"]]
            inside += [phase["name"] for phase in self.phases if phase["start"] <= step < phase["stop"]]
            rate = f"{np.interp(step, rates['steps'], rates['rates']):.3g}" if rates else "the host's own"
            rows.append([f"{step:,}", rate, *shares, ", ".join(dict.fromkeys(inside))])
        return [*_columns(rows, left=(len(names) + 2,)), ""]

    def _totals(self) -> list[str]:
        if not self.sources:
            return ["No plug-in decides the order of the data: it is the Trainer's own.", ""]
        total = sum(source.samples for source in self.sources)
        rows = [["source", "rows", "samples", "share", "tokens", "share", "passes"]]
        for source in self.sources:
            share = "" if source.tokens is None or not self.tokens else f"{source.tokens / self.tokens:.2%}"
            rows.append(
                [
                    source.name + (" (replayed)" if source.replayed else ""),
                    "a stream" if source.rows is None else f"{source.rows:,}",
                    _number(source.samples, source.samples == int(source.samples)),
                    f"{source.samples / max(total, 1):.2%}",
                    "" if source.tokens is None else _number(source.tokens, source.tokens_exact),
                    share,
                    "" if source.passes is None else f"{source.passes:.2f}",
                ]
            )
        unit = self.mixture[0]["unit"] if self.mixture else "samples"
        return [*_columns(rows, left=(0,)), f"The mixture is in shares of {unit}.", ""]

    def _marks(self) -> list[str]:
        lines = []
        for name, steps in self.marks.items():
            shown = [f"{step:,}" for step in steps]
            if len(shown) > 12:
                shown[6:-3] = ["..."]
            lines.append(f"{name}: at {len(steps):,} steps: {', '.join(shown)}")
        return lines


def _number(value: float, exact: bool) -> str:
    return f"{value:,.0f}" if exact else f"about {value:,.0f}"


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def preview_of(run: PluginRun, count_tokens: bool = True) -> Preview:
    """The preview of `run` as its Trainer stands now; nothing is changed.

    Args:
        run ([`PluginRun`]): of an extended Trainer.
        count_tokens (`bool`): whether the lengths of all rows may be read to count tokens; else a sample is, and
            tokens are estimates.
    """
    with rng_guard():
        plan = run.plan if run.active else run.build_plan()
        per_epoch, total = run.length_of(plan)
        schedule = run.schedule_for(total)
        sources = _sources(run, plan, total * run.global_batch, count_tokens)
        tokens, exact = _total_tokens(run, sources, total, count_tokens)
        return Preview(
            total_steps=total,
            steps_per_epoch=per_epoch,
            global_batch=run.global_batch,
            learning_rate=_rates(schedule, total) if schedule else None,
            sources=sources,
            mixture=_mixture(plan, run.global_batch) if plan else (),
            phases=_phases(plan, run.global_batch) if plan else (),
            marks={plugin.name: steps for plugin in run.plugins if (steps := plugin.marks(total))},
            tokens=tokens,
            tokens_exact=exact,
        )


def _rates(schedule: LRSchedule, total: int) -> dict[str, Any]:
    phases: list[dict[str, Any]] = []
    start = 0
    for phase in schedule.phases:
        # A function of the user's is stored as short straight pieces, all of one name.
        if phases and phases[-1]["name"] == phase.name:
            phases[-1]["stop"] = start + phase.steps
        elif phase.steps:
            phases.append({"name": phase.name, "start": start, "stop": start + phase.steps})
        start += phase.steps
    steps = {round(k * max(total - 1, 0) / _POINTS) for k in range(_POINTS + 1)}
    edges = [p["start"] + offset for p in phases for offset in (-1, 0, 1)]
    steps |= {edge for edge in edges if 0 <= edge < total}
    ordered = sorted(steps)
    return {"steps": ordered, "rates": [schedule(step) for step in ordered], "phases": phases}


def _mixture(plan: SamplePlan, global_batch: int) -> tuple[dict[str, Any], ...]:
    names = [source.name for source in plan.sources]
    return tuple(
        {
            "step": segment.start // global_batch,
            "shares": dict(zip(names, plan.shares(segment.start).tolist(), strict=True)),
            "unit": plan.unit,
        }
        for segment in plan.segments
    )


def _phases(plan: SamplePlan, global_batch: int) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": phase.name, "start": phase.start // global_batch, "stop": -(-phase.stop // global_batch)}
        for phase in plan.phases
    )


def _sources(run: PluginRun, plan: SamplePlan | None, draws: int, count_tokens: bool) -> tuple[SourcePreview, ...]:
    if plan is None:
        return ()
    samples = plan.expected_counts(draws)
    plan = dataclasses.replace(plan, sources=tuple(_measured(run, source, count_tokens) for source in plan.sources))
    counted = _counted(plan, draws)
    found = []
    for k, source in enumerate(plan.sources):
        mean = source.mean_tokens
        tokens = float(counted[k]) if counted is not None else (samples[k] * mean if mean is not None else None)
        found.append(
            SourcePreview(
                name=source.name,
                rows=source.num_rows,
                replayed=source.replayed,
                order="as read" if source.num_rows is None else source.order,
                samples=float(samples[k]),
                tokens=tokens,
                tokens_exact=counted is not None,
                passes=float(samples[k] / source.num_rows) if source.num_rows else None,
            )
        )
    return tuple(found)


def _measured(run: PluginRun, source: Source, count: bool) -> Source:
    """The source with the lengths of its rows, or else the mean of some of them."""
    if source.lengths is not None or source.mean_tokens is not None:
        return source
    if count and source.num_rows is not None and source.num_rows <= _MEASURED_ROWS:
        lengths = data.row_lengths(source.dataset, getattr(run.trainer.args, "length_column_name", None))
        if lengths is not None:
            return dataclasses.replace(source, lengths=lengths)
    if not count and source.num_rows is None:
        # Its first rows would have to be fetched again.
        return source
    return dataclasses.replace(source, mean_tokens=data.mean_tokens(run.setup.sample(source.dataset)))


def _counted(plan: SamplePlan, draws: int) -> np.ndarray | None:
    """Tokens of each source among the first `draws`, row by row; None where lengths are unknown or draws too many."""
    if draws > (EXACT_DRAWS if plan.unit == "tokens" else _COUNTED_DRAWS) or any(
        source.lengths is None for source in plan.sources
    ):
        return None
    tokens = np.zeros(len(plan.sources), dtype=np.int64)
    for start in range(0, draws, 1 << 18):
        found = plan.draws(start, min(start + (1 << 18), draws))
        for k, source in enumerate(plan.sources):
            if source.lengths is not None:
                tokens[k] += int(source.lengths[found.row[found.source == k]].sum(dtype=np.int64))
    return tokens


def _total_tokens(
    run: PluginRun, sources: Sequence[SourcePreview], total: int, count_tokens: bool
) -> tuple[float | None, bool]:
    if sources:
        known = [source.tokens for source in sources if source.tokens is not None]
        if len(known) < len(sources):
            return None, False
        return sum(known), all(source.tokens_exact for source in sources)
    per_step = run.setup.tokens_per_step if count_tokens and total else None
    return (per_step * total if per_step else None), False
