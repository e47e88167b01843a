"""Benchmarks before the first step and after the last: the report's section on them, from the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.reading import RunRecord, finite, mapping
from hf_pretrain_ext.report.tables import Cell, Section, Table, missing, run_cell, signed, text

__all__ = ["benchmarks"]


def benchmarks(runs: Sequence[RunRecord]) -> Section | None:
    """The section, or None where no run measured any."""
    rows = [row for index in range(len(runs)) for row in _rows(runs, index)]
    if not rows:
        return None
    lead = "Tasks that the model was given before the first step and after the last, with standard errors."
    note = "A change is shown where both times asked the same. Whether more is better is as the task says it."
    table = Table(["Run", "Task", "Metric", "Better", "Before", "After", "Change"], rows, note=note, of="Benchmarks")
    return Section("benchmarks", "Benchmarks", lead, [table])


def _rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    """The last measurement of each kind."""
    events = {str(event.get("when")): event for event in runs[index].of("benchmarks")}
    sides = [events.get("before", {}), events.get("after", {})]
    same = all(sides) and sides[0].get("asked") == sides[1].get("asked")
    found = [mapping(side.get("found")) for side in sides]
    named = dict.fromkeys((task, metric) for side in found for task in side for metric in mapping(side[task]))
    rows = []
    for task, metric in named:
        figures = [mapping(mapping(side.get(task)).get(metric)) for side in found]
        values = [finite(figure.get("value")) for figure in figures]
        better = next((figure["higher_is_better"] for figure in figures if "higher_is_better" in figure), None)
        change = values[1] - values[0] if same and values[0] is not None and values[1] is not None else None
        words = {True: "higher", False: "lower"}.get(better, "–") if isinstance(better, bool) else "–"
        rows.append(
            [run_cell(runs, index), text(task), text(metric), text(words), *map(_figure, figures), signed(change)]
        )
    return rows


def _figure(figure: dict[str, Any]) -> Cell:
    value, error = finite(figure.get("value")), finite(figure.get("stderr"))
    if value is None:
        return missing("not measured")
    return Cell(f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"), str(value))
