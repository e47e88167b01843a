"""The figures of the report that lay runs over each other. To be made and written inside `drawing.style()`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from hf_pretrain_ext.report.drawing import COLOURS, DASHES, FAINT, INK, SHADE, name_text, new_figure
from hf_pretrain_ext.report.plan_plot import spread
from hf_pretrain_ext.report.reading import RunRecord, finite, mapping, sequence

__all__ = [
    "forgetting_figure",
    "gap_figure",
    "loss_figure",
    "memory_figure",
    "mixture_figure",
    "planned_shares",
    "rate_figure",
]

POINTS = 60
"""Logged points that are drawn as dots of a curve; of more, evenly spaced ones."""
PARTS = 300
"""Parts of a long curve of which only the lowest and the highest point are drawn: finer than a screen shows."""
DENSE = 20
"""Steps that a symmetric-log axis shows evenly: the first ones, where probes are dense."""


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, evenly spaced, the first and the last among them.

    Example:

    >>> thinned(range(100), 3)
    [0, 50, 99]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def outline(points: Sequence[tuple[float, float]], parts: int = PARTS) -> list[tuple[float, float]]:
    """A curve of many points by the extremes of its parts, so that no peak is lost; a short one as it is.

    Example:

    >>> outline([(0, 1.0), (1, 5.0), (2, 2.0), (3, 3.0), (4, 0.0), (5, 3.0)], parts=1)
    [(0, 1.0), (1, 5.0), (4, 0.0), (5, 3.0)]
    """
    if len(points) <= 2 * parts + 2:
        return list(points)
    inner = points[1:-1]
    kept = [points[0]]
    for part in range(parts):
        some = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        if some:
            kept += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=min(len(found), 4), fontsize=8.5)


def _steps_axis(panel: Any, label: str = "optimizer step") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def rate_figure(runs: Sequence[RunRecord]) -> Any:
    """The planned learning rate as a line, what was logged as dots; None where there is neither."""
    figure, drawn = new_figure(3.2), False
    panel = figure.subplots()
    for index, run in enumerate(runs):
        look, planned = _look(index), run.planned_rate()
        if planned is not None:
            steps = _curve_steps(run)
            panel.plot(steps, [planned(s) for s in steps], label=name_text(run.label), **look)
        # The rate that was logged at step n is the one that step n was made with.
        logged = thinned([(step - 1, rate) for step, rate in _finite(run.scalars("learning_rate")) if step], POINTS)
        if logged:
            panel.plot(
                *zip(*logged, strict=True),
                "o",
                markersize=3.4,
                color=look["color"],
                label="" if planned else name_text(run.label),
                markeredgewidth=0,
            )
        drawn |= bool(planned or logged)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("learning rate")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    _steps_axis(panel, "optimizer steps made before")
    _legend(figure, [panel])
    return figure if drawn else None


def _curve_steps(run: RunRecord) -> list[float]:
    rates = mapping(run.preview.get("learning_rate"))
    steps = [step for step in map(finite, sequence(rates.get("steps"))) if step is not None]
    total = run.total_steps or run.last_step or 1
    return sorted({float(total * k // 200) for k in range(201)} | set(steps))


def loss_figure(runs: Sequence[RunRecord]) -> Any:
    """Training loss, and each loss of the host's evaluations, one panel under the other; None without any."""
    keys = ["loss", *dict.fromkeys(key for run in runs for key in run.eval_losses)]
    series = {key: [_finite(run.scalars(key)) for run in runs] for key in keys}
    series = {key: curves for key, curves in series.items() if any(curves)}
    if not series:
        return None
    figure = new_figure(0.3 + 2.5 * len(series))
    panels = figure.subplots(len(series), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (key, curves) in zip(panels, series.items(), strict=True):
        for index, (run, points) in enumerate(zip(runs, curves, strict=True)):
            if points:
                marker = "." if len(points) <= POINTS else None
                panel.plot(
                    *zip(*outline(points), strict=True),
                    label=name_text(run.label),
                    marker=marker,
                    markersize=5,
                    **_look(index),
                )
        panel.set_title("training loss" if key == "loss" else name_text(key))
        panel.set_ylabel("loss")
    _steps_axis(panels[-1])
    _legend(figure, panels)
    return figure


def planned_shares(run: RunRecord, step: float) -> dict[str, float]:
    """The planned share of each source in all that is seen up to `step`."""
    entries = [mapping(entry) for entry in sequence(run.preview.get("mixture"))]
    parts = [(finite(entry.get("step")), mapping(entry.get("shares"))) for entry in entries]
    kept = sorted(((start, shares) for start, shares in parts if start is not None), key=lambda part: part[0])
    sums: dict[str, float] = {}
    for (start, shares), (stop, _) in pairwise([*kept, (math.inf, {})]):
        length = min(stop, step) - start
        for name, share in shares.items():
            if length > 0:
                sums[name] = sums.get(name, 0.0) + (finite(share) or 0.0) * length
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def mixture_figure(runs: Sequence[RunRecord]) -> Any:
    """Share of each source in all samples so far, realised and planned, a panel a run; None without counts."""
    found = [run for run in runs if any(len(counts) > 1 for _, counts in run.counts)]
    if not found:
        return None
    figure = new_figure(0.3 + 1.9 * len(found))
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for panel, run in zip(panels, found, strict=True):
        _draw_shares(panel, run)
        panel.set_title(name_text(run.label))
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_ylabel("share of samples")
    _steps_axis(panels[-1])
    return figure


def _draw_shares(panel: Any, run: RunRecord) -> None:
    points = [(step, counts) for step, counts in run.counts if sum(c.samples for c in counts.values())]
    names = list(dict.fromkeys(name for _, counts in points for name in counts))
    by_tokens = any(mapping(entry).get("unit") == "tokens" for entry in sequence(run.preview.get("mixture")))
    ends = []
    for k, name in enumerate(names):
        shares = [
            (step, counts[name].samples / sum(c.samples for c in counts.values()))
            for step, counts in thinned(points, 2 * PARTS)
            if name in counts
        ]
        colour = COLOURS[k % len(COLOURS)]
        if not by_tokens:
            plan = [(step, planned_shares(run, step).get(name)) for step, _ in shares]
            panel.plot(
                *zip(*[(s, p if p is not None else math.nan) for s, p in plan], strict=True),
                color=FAINT,
                linewidth=3.2,
                alpha=0.35,
                solid_capstyle="butt",
            )
        panel.plot(
            *zip(*shares, strict=True), color=colour, marker="." if len(shares) <= POINTS else None, markersize=5
        )
        ends.append((shares[-1][1], (f"{name_text(name, 18)} {shares[-1][1]:.1%}", colour)))
    for y, (words, colour) in spread(sorted(ends), gap=0.13):
        # The words in ink: not every colour of a curve can be read as text.
        for at, said, shade in ((6, "●", colour), (16, words, INK)):
            panel.annotate(
                said,
                (1, y),
                xytext=(at, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=shade,
                annotation_clip=False,
            )


def forgetting_figure(runs: Sequence[RunRecord]) -> Any:
    """Held-out loss of every set over the steps, the first steps as wide as the rest; None without probes."""
    return _panels_of_sets(runs, _draw_probes)


def gap_figure(runs: Sequence[RunRecord]) -> Any:
    """How each held-out loss stood above or below its first value, up to where all had recovered; None without."""
    measured = [run for run in runs if any(points[0][0] == 0 and len(points) > 1 for points in run.probes.values())]
    return _panels_of_sets(runs, _draw_gap) if measured else None


def _panels_of_sets(runs: Sequence[RunRecord], draw: Callable[[Any, str, Sequence[RunRecord]], None]) -> Any:
    names = list(dict.fromkeys(name for run in runs for name in run.probes))
    if not names:
        return None
    columns = 2 if len(names) > 1 else 1
    lines = math.ceil(len(names) / columns)
    figure = new_figure(0.4 + 2.8 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        draw(panel, name, runs)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    _legend(figure, panels)
    return figure


def _draw_probes(panel: Any, name: str, runs: Sequence[RunRecord]) -> None:
    last = 1.0
    for index, run in enumerate(runs):
        points = _finite(run.probes.get(name, []))
        if not points:
            continue
        last = max(last, points[-1][0])
        panel.plot(
            *zip(*outline(points), strict=True), marker=".", markersize=4.5, label=name_text(run.label), **_look(index)
        )
        if points[0][0] == 0:
            panel.axhline(points[0][1], color=COLOURS[index % len(COLOURS)], linewidth=0.9, linestyle=":", alpha=0.8)
    _dense_axis(panel, last)
    panel.set_title(name_text(name))
    panel.set_ylabel("held-out loss (nats/token)")


def _draw_gap(panel: Any, name: str, runs: Sequence[RunRecord]) -> None:
    from hf_pretrain_ext.forgetting import RECOVERY_MARGIN, summarise

    last = 1.0
    panel.axhspan(0, RECOVERY_MARGIN, color=SHADE, linewidth=0, zorder=-2)
    panel.axhline(0, color=FAINT, linewidth=0.9)
    for index, run in enumerate(runs):
        points = _finite(run.probes.get(name, []))
        if len(points) < 2 or points[0][0] != 0:
            continue
        found: dict[str, Any] = summarise([int(step) for step, _ in points], [value for _, value in points])
        changes = {step: value - points[0][1] for step, value in points}
        recovered = found["recovery_step"]
        # What comes after is the course of the run, which the figure of forgetting shows.
        end = max(DENSE, 2 * recovered) if recovered is not None else points[-1][0]
        shown = outline([(step, changes[step]) for step, _ in points if step <= end])
        last = max(last, shown[-1][0])
        look = _look(index)
        panel.plot(*zip(*shown, strict=True), marker=".", markersize=4, label=name_text(run.label), **look)
        if found["gap_depth"] > 0:
            marks = [(found["worst_step"], "v", look["color"])]
            marks += [(recovered, "o", "none")] if recovered is not None else []
            for step, sign, filling in marks:
                panel.plot(
                    step,
                    changes[step],
                    sign,
                    color=look["color"],
                    markerfacecolor=filling,
                    markersize=8,
                    markeredgewidth=1.4,
                )
    _dense_axis(panel, last)
    panel.set_title(name_text(name))
    panel.set_ylabel("change since step 0 (nats/token)")


def _dense_axis(panel: Any, last: float) -> None:
    panel.set_xscale("symlog", linthresh=DENSE)
    panel.set_xlim(-0.4, last * 1.06)
    ticks = [0, 5, 10, 20, *(digit * 10**power for power in range(1, 9) for digit in (5, 10, 20))]
    panel.set_xticks(
        [t for t in dict.fromkeys(ticks) if t <= last], [f"{t:,}" for t in dict.fromkeys(ticks) if t <= last]
    )
    panel.set_xticks([], minor=True)
    panel.set_xlabel("optimizer step")


def memory_figure(runs: Sequence[RunRecord]) -> Any:
    """Main memory of the first process, and where there is one the peak on its device; None below two points."""
    names = {"resident": "main memory of the first process", "device_peak": "peak on the device so far"}
    series = {
        name: [[(use.step, value / 2**30) for use in run.usage if (value := getattr(use, name))] for run in runs]
        for name in names
    }
    series = {name: curves for name, curves in series.items() if any(len(points) > 1 for points in curves)}
    if not series:
        return None
    figure = new_figure(0.3 + 2.2 * len(series))
    panels = figure.subplots(len(series), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, curves) in zip(panels, series.items(), strict=True):
        for index, (run, points) in enumerate(zip(runs, curves, strict=True)):
            if points:
                panel.plot(*zip(*outline(points), strict=True), label=name_text(run.label), **_look(index))
        panel.set_title(names[name])
        panel.set_ylim(bottom=0)
        panel.set_ylabel("GiB")
    _steps_axis(panels[-1])
    _legend(figure, panels)
    return figure
