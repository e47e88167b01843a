"""Blocks of a page: tables, figures, lists and sentences, as data that the template lays out.

A cell that shows a number also carries it unrounded, so that what is read by eye and by a program is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
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
    "size",
    "span",
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
    of: str = ""
    """What to call it for those who hear the page, where it has no caption."""

    @property
    def groups(self) -> list[list[Sequence[Cell]]]:
        """The rows, those of one run together."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row[0].text if self.of_runs else "")]

    @property
    def of_runs(self) -> bool:
        """Whether each row belongs to a run, so that paper is cut between the runs."""
        return bool(self.rows) and all("run" in row[0].tone.split() for row in self.rows)

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


def size(value: float | None, absent: str = "not known") -> Cell:
    """A number of bytes in the unit that leaves at most four digits before the point.

    Example:

    >>> size(3 * 2**30).text, size(1536).text, size(12).text
    ('3.00 GiB', '1.50 KiB', '12 B')
    """
    if value is None or not math.isfinite(value):
        return missing(absent)
    power = next((k for k in (4, 3, 2, 1) if abs(value) >= 1024**k), 0)
    shown = f"{value / 1024**power:,.2f}" if power else f"{value:,.0f}"
    return Cell(f"{shown} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}", str(value))


def span(seconds: float | None, absent: str = "not known") -> Cell:
    """A length of time.

    Example:

    >>> span(3.25).text, span(75.5).text, span(7260).text
    ('3.2 s', '1 min 16 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return missing(absent)
    whole = round(seconds)
    if whole < 60:
        return Cell(f"{seconds:.1f} s", str(seconds))
    if whole < 3600:
        return Cell(f"{whole // 60} min {whole % 60} s", str(seconds))
    return Cell(f"{whole // 3600:,} h {whole % 3600 // 60} min", str(seconds))


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
