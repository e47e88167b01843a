"""Benchmarks before the first step and after the last: the report's section on them, from the trace."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pretrain_ext.benchmarks import figure_text
from hf_pretrain_ext.report.reading import RunRecord
from hf_pretrain_ext.report.tables import Cell, Section, Table, missing, run_cell, signed, text

__all__ = ["benchmarks"]


def benchmarks(runs: Sequence[RunRecord]) -> Section | None:
    """The section, or None where no run measured any."""
    rows = [row for index in range(len(runs)) for row in _rows(runs, index)]
    if not rows:
        return None
    lead = "Tasks that the model was given before the first step and after the last, with standard errors."
    note = "Where the two times asked different things, the first is left out. What is better is as the task says."
    table = Table(["Run", "Task", "Metric", "Better", "Before", "After", "Change"], rows, note=note, of="Benchmarks")
    return Section("benchmarks", "Benchmarks", lead, [table])


def _rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    words = {True: "higher", False: "lower", None: "–"}
    return [
        [
            run_cell(runs, index),
            text(each.task),
            text(each.metric),
            text(words[each.higher_is_better]),
            _figure(each.before),
            _figure(each.after),
            signed(each.after[0] - each.before[0] if each.before and each.after else None),
        ]
        for each in runs[index].benchmarks
    ]


def _figure(figure: tuple[float, float | None] | None) -> Cell:
    return missing(figure_text(None)) if figure is None else Cell(figure_text(*figure), str(figure[0]))
