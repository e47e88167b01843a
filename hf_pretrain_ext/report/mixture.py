"""What a run really saw of each source: the report's section on the mixture, from the counts in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.drawing import data_uri
from hf_pretrain_ext.report.figures import mixture_figure, planned_shares, thinned
from hf_pretrain_ext.report.reading import Count, RunRecord, mapping, sequence
from hf_pretrain_ext.report.tables import (
    Cell,
    Details,
    Figure,
    Section,
    Table,
    Text,
    count,
    missing,
    percent,
    run_cell,
)

__all__ = ["mixture", "replay_ratio"]

SHOWN_LOGS = 12
"""Lines of a table over the steps; a longer run shows evenly spaced ones."""


def replay_ratio(run: RunRecord) -> float | None:
    """The replayed share of all samples, from the counts, or as it was logged last."""
    if run.counts:
        counts = run.counts[-1][1].values()
        total = sum(c.samples for c in counts)
        if total and any(c.replayed for c in counts):
            return sum(c.samples for c in counts if c.replayed) / total
    logged = run.scalars("replay_ratio")
    return logged[-1][1] if logged else None


def mixture(runs: Sequence[RunRecord]) -> Section:
    lead = "What was really seen of each source, counted at each log. Grey bands are the plan."
    blocks: list[Any] = []
    figure = mixture_figure(runs)
    if figure is not None:
        alt = f"Share of each source in all samples so far, seen and planned: {', '.join(run.label for run in runs)}."
        blocks.append(Figure(data_uri(figure), alt, "Share of each source in all samples seen so far."))
    rows = [row for index in range(len(runs)) if (row := _ratio_row(runs, index))]
    if rows:
        head = [
            "Run",
            "Replayed, planned",
            "seen, samples",
            "seen, tokens read",
            "seen, tokens bearing loss",
            "Counted at step",
        ]
        blocks.append(Table(head, rows, "Replayed share"))
    for run in runs:
        if len(run.counts) > 1:
            blocks.append(Details(f"Counts over the steps: {run.label}", [_counts_table(run)]))
        elif not run.counts:
            blocks.append(Text(f"{run.label}: nothing was counted, since no plug-in decided the order."))
    return Section("mixture", "Mixture", lead, blocks)


def _share(counts: dict[str, Count], unit: str) -> float | None:
    values = [(getattr(c, unit), c.replayed) for c in counts.values()]
    if not values or any(value is None for value, _ in values) or not sum(value for value, _ in values):
        return None
    return float(sum(value for value, replayed in values if replayed) / sum(value for value, _ in values))


def _ratio_row(runs: Sequence[RunRecord], index: int) -> list[Cell] | None:
    run = runs[index]
    replayed = {str(source["name"]) for source in run.sources if source.get("replayed")}
    logged = run.scalars("replay_ratio")
    if not run.counts and not logged:
        return None
    if not run.counts:
        cells = [percent(logged[-1][1]), missing("not known"), missing("not known"), count(logged[-1][0])]
        return [run_cell(runs, index), missing("not known"), *cells]
    step, counts = run.counts[-1]
    shares = planned_shares(run, step)
    by_tokens = any(mapping(entry).get("unit") == "tokens" for entry in sequence(run.preview.get("mixture")))
    planned = sum(share for name, share in shares.items() if name in replayed) if shares else None
    cell = percent(planned, "not known")
    if by_tokens:
        cell = Cell(f"{cell.text} of tokens", cell.value)
    units = ("samples", "tokens", "loss_tokens")
    return [run_cell(runs, index), cell, *(percent(_share(counts, unit), "not known") for unit in units), count(step)]


def _counts_table(run: RunRecord) -> Table:
    names = list(dict.fromkeys(name for _, counts in run.counts for name in counts))
    shown = thinned(run.counts, SHOWN_LOGS)
    rows = []
    for step, counts in shown:
        found = [counts.get(name) for name in names]
        cells = [count(c.samples if c else None) for c in found] + [
            count(c.tokens if c else None, "not known") for c in found
        ]
        rows.append([count(step), *cells, percent(_share(counts, "samples"))])
    head = ["Step", *(f"{name}: samples" for name in names), *(f"{name}: tokens" for name in names), "Replayed"]
    note = f"{len(shown)} of {len(run.counts)} counts, evenly spaced." if len(shown) < len(run.counts) else ""
    return Table(head, rows, note=note)
