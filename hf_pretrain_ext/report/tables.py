"""Blocks of a page: tables, figures, lists and sentences, as data that the template lays out.

A cell that shows a number also carries it unrounded, so that what is read by eye and by a program is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_pretrain_ext.report.drawing import COLOURS
from hf_pretrain_ext.report.reading import RunRecord

__all__ = [
    "Cell",
    "Definitions",
    "Details",
    "Figure",
    "Listing",
    "Section",
    "Table",
    "Text",
    "count",
    "loss",
    "missing",
    "percent",
    "rate",
    "run_cell",
    "setting",
    "side_by_side",
    "signed",
    "text",
]


@dataclass(frozen=True)
class Cell:
    """`text` as shown; `value`, the number behind it in full, None for words; `tone`, how it is set."""

    text: str
    value: str | None = None
    tone: str = ""


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    note: str = ""
    by_run: bool = False
    """Whether each column after the first is a run, so that words and numbers mix in it."""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and so stand to the right."""
        if self.by_run:
            return [False] * len(self.head)
        return [any(row[k].value is not None for row in self.rows if k < len(row)) for k in range(len(self.head))]


@dataclass(frozen=True)
class Figure:
    kind: ClassVar[str] = "figure"
    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Listing:
    """Lines under a title, set as they were written."""

    kind: ClassVar[str] = "listing"
    title: str
    lines: Sequence[str]
    number: int = -1


@dataclass(frozen=True)
class Definitions:
    kind: ClassVar[str] = "definitions"
    terms: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    lead: str
    blocks: list[Any] = field(default_factory=list)


# Cells


def text(value: Any, tone: str = "") -> Cell:
    return Cell(str(value), tone=tone)


def run_cell(runs: Sequence[RunRecord], index: int) -> Cell:
    """The label of a run, with the colour that it has in the figures."""
    return text(runs[index].label, f"run run-{index % len(COLOURS)}")


def missing(words: str = "–") -> Cell:
    return Cell(words, tone="absent")


def _shown(value: float | None, form: str, absent: str) -> Cell:
    if value is None:
        return missing(absent)
    if not math.isfinite(value):
        return Cell("not a number" if math.isnan(value) else f"{value:+}", str(value), "bad")
    return Cell(
        format(value, form).replace("-", "−") if "e" not in format(value, form) else format(value, form), str(value)
    )


def loss(value: float | None, absent: str = "–") -> Cell:
    return _shown(value, ".4f", absent)


def signed(value: float | None, absent: str = "–") -> Cell:
    return _shown(value, "+.4f", absent)


def rate(value: float | None, absent: str = "–") -> Cell:
    return _shown(value, ".4g", absent)


def percent(value: float | None, absent: str = "–") -> Cell:
    return _shown(value, ".2%", absent)


def count(value: float | None, absent: str = "–", exact: bool = True) -> Cell:
    """A number of things; one that is an estimate is marked."""
    if value is None or not math.isfinite(value):
        return missing(absent)
    return Cell(("" if exact else "≈ ") + f"{value:,.0f}", str(value))


def setting(value: Any) -> Cell:
    """A setting as JSON shows it, words without quotes."""
    if isinstance(value, str):
        return text(value if value else "(empty)")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text("none" if value is None else json.dumps(value, ensure_ascii=False))
    return Cell(f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value), str(value))


def side_by_side(
    names: Iterable[str], columns: Sequence[dict[str, Any] | None], absent: str = "–", known_only: bool = False
) -> list[list[Cell]]:
    """One row a name, one column a run; rows in which the runs differ are marked.

    Columns that are None, and with `known_only` cells that are absent, do not count as differing.
    """
    rows = []
    for name in names:
        values = [column.get(name, _ABSENT) for column in columns if column is not None]
        values = [value for value in values if not known_only or value is not _ABSENT]
        tone = "differs" if any(value != values[0] for value in values) else ""
        cells = [setting(column[name]) if column and name in column else missing(absent) for column in columns]
        rows.append(
            [text(name, tone), *(Cell(cell.text, cell.value, f"{cell.tone} {tone}".strip()) for cell in cells)]
        )
    return rows


_ABSENT = object()
