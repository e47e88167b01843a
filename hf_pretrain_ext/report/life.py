"""A model's life in stages, as the report and the card draw it: what each stage read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_pretrain_ext.report.drawing import COLOURS, FAINT, INK, PAPER, SHADE, data_uri, name_text, new_figure
from hf_pretrain_ext.report.reading import RunRecord, finite, mapping, number, sequence
from hf_pretrain_ext.report.tables import Cell, Figure, Section, Table, count, rate, run_cell, text

__all__ = ["life", "life_figure"]

UNKNOWN = 0.12
"""Width of a stage of which no tokens are known, as a share of all that are."""
NAMED = 0.05
"""Width from which on a stage has room for its name."""
LANES = 16
"""Lives that are drawn: the table tells of all."""


def life(runs: Sequence[RunRecord]) -> Section | None:
    """The stages that came before each run, and the run as the last of them; None where no run knows of any."""
    rows = [row for index in range(len(runs)) for row in _stage_rows(runs, index)]
    if not rows:
        return None
    lead = "A model's life in stages: what each read, and the learning rate that its next update would have had."
    head = ["Run", "Stage", "Name", "Kind", "Steps", "Tokens", "Read", "Rate at end", "Phase"]
    blocks: list[Any] = []
    lives = {run.label: stages for run in runs if (stages := _stages_of(run))}
    figure = life_figure(lives)
    if figure is not None:
        blocks.append(Figure(data_uri(figure), f"What each stage read, in tokens, by source: {', '.join(lives)}."))
    blocks.append(Table(head, rows, note="The last line of a run is the run itself."))
    return Section("life", "Stages before", lead, blocks)


def _stages_of(run: RunRecord) -> list[dict[str, Any]]:
    """The stages before a run and the run itself; none where nothing came before."""
    stage = mapping(run.start.get("stage"))
    earlier = [mapping(each) for each in sequence(stage.get("earlier"))]
    if not earlier:
        return []
    seen = run.counts[-1][1] if run.counts else {}
    tokens = {str(stage.get("name")) if name == "train" else name: found.tokens for name, found in seen.items()}
    rates = run.scalars("learning_rate")
    known = [number(each) for each in tokens.values()]
    itself = {
        **{key: stage.get(key) for key in ("number", "name", "kind")},
        "steps": run.last_step,
        "tokens": sum(each for each in known if each is not None) if known and None not in known else None,
        "sources": tokens,
        "rate": rates[-1][1] if rates else None,
    }
    return [*earlier, itself]


def _stage_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    return [
        [
            run_cell(runs, index),
            count(number(each.get("number"))),
            text(each.get("name") or "–"),
            text(each.get("kind") or "–"),
            count(number(each.get("steps")), "not known"),
            count(number(each.get("tokens")), "not known"),
            text(_shares(mapping(each.get("sources"))) or "not known"),
            rate(number(each.get("rate")), "not known"),
            text(each.get("phase") or "–"),
        ]
        for each in _stages_of(runs[index])
    ]


def _shares(sources: dict[str, Any]) -> str:
    found = {name: number(tokens) for name, tokens in sources.items()}
    total = sum(tokens for tokens in found.values() if tokens)
    if not total or None in found.values():
        return ", ".join(found)
    return ", ".join(f"{name} {(tokens or 0) / total:.1%}" for name, tokens in found.items())


def life_figure(lives: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """
    The stages of each life side by side: as wide as the tokens read, split by source; to be made inside `style()`.

    Args:
        lives (`dict[str, list[dict]]`): by label, stages with `name`, `kind`, and `sources`, tokens by name. Hatched
            where those are not known.

    Returns:
        A matplotlib figure, of the first 16 lives; None where no stage of theirs has known tokens.
    """
    lives = dict(list(lives.items())[:LANES])
    widths = {label: [_tokens(stage) for stage in stages] for label, stages in lives.items()}
    if not any(width for each in widths.values() for width in each):
        return None
    colours = _colours(stage for stages in lives.values() for stage in stages)
    figure = new_figure(0.8 + (1.5 if len(lives) < 4 else 0.75) * len(lives))
    panels = figure.subplots(len(lives), 1, squeeze=False, sharex=True)[:, 0]
    longest = max(sum(each) for each in widths.values())
    furthest, drawn = 0.0, dict[str, Any]()
    for panel, (run, stages) in zip(panels, lives.items(), strict=True):
        at = 0.0
        for stage, tokens in zip(stages, widths[run], strict=True):
            width, bottom = tokens or UNKNOWN * longest, 0.0
            if not tokens:
                panel.bar(at, 1, width, align="edge", color=SHADE, edgecolor=FAINT, hatch="//", linewidth=0)
            # Those in the colour of no source come last, as one.
            parts = sorted(mapping(stage.get("sources")).items(), key=lambda part: part[0] not in colours)
            for name, part in parts if tokens else ():
                share = (finite(part) or 0.0) / tokens
                if share:
                    label, colour = (name, colours[name]) if name in colours else ("others", FAINT)
                    drawn[label] = panel.bar(at, share, width, bottom, align="edge", color=colour, linewidth=0)
                    bottom += share
            panel.axvline(at + width, color=PAPER, linewidth=2)
            if width >= NAMED * longest:
                words = name_text(stage.get("name"), 18) + (" (annealed)" if stage.get("kind") == "anneal" else "")
                panel.annotate(
                    words,
                    (at + width / 2, 1),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                    annotation_clip=False,
                    fontsize=8.5,
                )
            at += width
        furthest = max(furthest, at)
        panel.set_ylim(0, 1)
        panel.grid(False)
        panel.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"] if len(lives) < 4 else ["", "", ""])
        if len(lives) > 1:
            panel.set_ylabel(name_text(run, 24), rotation=0, ha="right", va="center")
        else:
            panel.set_ylabel("share of tokens")
    panels[-1].set_xlim(0, 1.03 * furthest)
    panels[-1].xaxis.set_major_formatter(lambda value, _: _short(value))
    panels[-1].set_xlabel("tokens read over the life of the model (hatched: not recorded, drawn at any width)")
    figure.legend(
        drawn.values(), map(name_text, drawn), loc="outside upper left", ncols=min(len(drawn), 4), fontsize=8.5
    )
    return figure


def _colours(stages: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each source, in the order of their first visit; where there are more sources, for the largest."""
    totals: dict[str, float] = {}
    for stage in stages:
        for name, part in mapping(stage.get("sources")).items():
            totals[name] = totals.get(name, 0.0) + (finite(part) or 0.0)
    largest = set(sorted(totals, key=lambda name: -totals[name])[: len(COLOURS)])
    return dict(zip([name for name in totals if name in largest], COLOURS, strict=False))


def _tokens(stage: Mapping[str, Any]) -> float:
    """0 where they are not known of every source."""
    found = [finite(each) for each in mapping(stage.get("sources")).values()]
    return 0.0 if None in found else float(sum(each for each in found if each is not None))


def _short(value: float) -> str:
    """
    >>> _short(2.5e9), _short(384), _short(1e6)
    ('2.5B', '384', '1M')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
