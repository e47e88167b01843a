"""The plan of a run in one picture: learning rate, mixture, phases, and where plug-ins act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hf_pretrain_ext.report.drawing import COLOURS, FAINT, INK, SHADE, name_text, new_figure, save_png, style
from hf_pretrain_ext.report.reading import finite, mapping, rate_points, sequence

__all__ = ["plan_figure", "plan_plot", "spread"]

_T = TypeVar("_T")
_CHARACTER = 0.0088
"""Width of a character of a phase's name, as a share of the figure's width: enough to see whether two names meet."""


def plan_plot(preview: dict[str, Any], path: str | Path, title: str = "") -> None:
    """Draws the plan of a run as a PNG file: what the learning rate and the mixture will be at which step.

    Args:
        preview (`dict`): the plan, as the field `preview` of the event `start` of a trace holds it.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; a folder that is missing is made.
        title (`str`, *optional*, defaults to `""`): a line above the picture.

    Raises:
        `ImportError`: matplotlib is missing; it comes with the extra `report`.

    Example:

    >>> import tempfile
    >>> rates = {"steps": [0, 10, 100], "rates": [0, 1e-3, 1e-4]}
    >>> plan_plot({"total_steps": 100, "learning_rate": rates}, tempfile.mkdtemp() + "/plan.png")
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plan_plot needs matplotlib: pip install 'hf-pretrain-ext[report]'") from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with style():
        save_png(plan_figure(mapping(preview), title), path)


def plan_figure(preview: dict[str, Any], title: str = "") -> Any:
    """The figure behind `plan_plot`; to be made and written inside `style()`."""
    rates, mixture = rate_points(preview), _mixture(preview)
    lanes = _lanes(preview)
    heights = {"rate": 2.4 if rates else 0.7, "mixture": 1.9 if mixture else 0.0, "lanes": 0.26 * len(lanes) + 0.12}
    shown = [name for name in heights if name != "mixture" or mixture]
    shown = [name for name in shown if name != "lanes" or lanes]
    figure = new_figure(sum(heights[name] for name in shown) + (1.0 if title else 0.75))
    panels = figure.subplots(
        len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [heights[n] for n in shown]}
    )[:, 0]
    last = _last_step(preview, rates)
    for name, panel in zip(shown, panels, strict=True):
        panel.set_xlim(0, last)
        _shade_phases(panel, preview)
        if name == "rate":
            _draw_rates(panel, rates, _rate_phases(preview, last), last)
        elif name == "mixture":
            _draw_mixture(panel, mixture, last, _unit(preview))
        else:
            _draw_lanes(panel, lanes, last)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if title:
        figure.suptitle(name_text(title, 90), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _last_step(preview: dict[str, Any], rates: list[tuple[float, float]]) -> float:
    return finite(preview.get("total_steps")) or max((step for step, _ in rates), default=0.0) or 1.0


# Learning rate


def _rate_phases(preview: dict[str, Any], last: float) -> list[tuple[str, float, float]]:
    """Named phases of the schedule within the run; neighbours of one name are one phase."""
    merged: list[tuple[str, float, float]] = []
    for name, start, stop in _ranges(mapping(preview.get("learning_rate")).get("phases")):
        stop = min(stop, last)
        if merged and merged[-1][0] == name:
            merged[-1] = (name, merged[-1][1], stop)
        elif start < last and stop > start:
            merged.append((name, start, stop))
    return merged


def _draw_rates(
    panel: Any, rates: list[tuple[float, float]], phases: list[tuple[str, float, float]], last: float
) -> None:
    if not rates:
        panel.text(
            0.5, 0.5, "learning rate: the host's own schedule", transform=panel.transAxes, ha="center", va="center"
        )
        panel.set_yticks([])
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.tick_params(axis="x", length=0)
        return
    panel.plot(*zip(*rates, strict=True), color=COLOURS[0], linewidth=2)
    panel.set_ylim(0, max(max(rate for _, rate in rates) * 1.3, 1e-12))
    panel.set_ylabel("learning rate")
    panel.locator_params(axis="y", nbins=6)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    for number_, (_, start, stop) in enumerate(phases):
        if number_ % 2:
            panel.axvspan(start, stop, color=SHADE, linewidth=0, zorder=-2)
    for text, x, level in _placed(phases, last):
        panel.text(x, 0.985 - 0.085 * level, text, transform=panel.get_xaxis_transform(), va="top", color=FAINT)


def _placed(phases: list[tuple[str, float, float]], last: float) -> list[tuple[str, float, int]]:
    """Names with their left end and line: a name that would run into the one before goes a line lower."""
    placed, ends = [], [-1.0, -1.0, -1.0]
    for name, start, _ in phases:
        left = start / last + 0.006
        width = _CHARACTER * len(name)
        left = max(min(left, 1 - width), 0.0)
        level = next((k for k, end in enumerate(ends) if left > end), len(ends) - 1)
        ends[level] = left + width
        placed.append((name, left * last, level))
    return placed


# Mixture


def _mixture(preview: dict[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """Shares from each step on at which they change; empty where there is one source or none."""
    found = []
    for entry in map(mapping, sequence(preview.get("mixture"))):
        shares = {str(name): finite(share) or 0.0 for name, share in mapping(entry.get("shares")).items()}
        step = finite(entry.get("step"))
        if step is not None and shares:
            found.append((step, shares))
    names = {name for _, shares in found for name, share in shares.items() if share}
    return sorted(found, key=lambda pair: pair[0]) if len(names) > 1 else []


def _unit(preview: dict[str, Any]) -> str:
    units = [mapping(entry).get("unit") for entry in sequence(preview.get("mixture"))]
    return "tokens" if units and all(unit == "tokens" for unit in units) else "samples"


def _draw_mixture(panel: Any, mixture: list[tuple[float, dict[str, float]]], last: float, unit: str) -> None:
    names = list(dict.fromkeys(name for _, shares in mixture for name in shares))
    steps = [step for step, _ in mixture] + [last]
    floor = [0.0] * len(steps)
    ends: list[tuple[float, str]] = []
    for k, name in enumerate(names):
        shares = [entry.get(name, 0.0) for _, entry in mixture]
        shares.append(shares[-1])
        top = [low + share for low, share in zip(floor, shares, strict=True)]
        colour = COLOURS[k % len(COLOURS)]
        panel.fill_between(steps, floor, top, step="post", color=colour, alpha=0.55, linewidth=0)
        panel.step(steps, top, where="post", color=colour, linewidth=1)
        for at, (low, share) in enumerate(zip(floor[:-1], shares[:-1], strict=True)):
            if share >= 0.07 and steps[at + 1] - steps[at] > 0.06 * last:
                panel.text(steps[at] + 0.006 * last, low + share / 2, f"{share:.1%}", va="center", fontsize=8.5)
        ends.append(((floor[-1] + top[-1]) / 2, name))
        floor = top
    for y, name in spread(ends):
        panel.annotate(
            name_text(name, 22),
            (1, y),
            xytext=(6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )
    panel.set_ylim(0, max(max(floor), 1e-9))
    panel.set_ylabel(f"share of {unit}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.grid(False)


def spread(ends: Sequence[tuple[float, _T]], gap: float = 0.115) -> list[tuple[float, _T]]:
    """Heights of labels, moved up where they would lie on each other."""
    placed: list[tuple[float, _T]] = []
    lowest = -math.inf
    for y, name in ends:
        y = max(y, lowest)
        placed.append((y, name))
        lowest = y + gap
    return placed


# Phases of the plan and marks of plug-ins


def _ranges(value: Any) -> list[tuple[str, float, float]]:
    found = [
        (mapping(p).get("name"), finite(mapping(p).get("start")), finite(mapping(p).get("stop")))
        for p in sequence(value)
    ]
    return [
        (name_text(name, 24), start, stop)
        for name, start, stop in found
        if start is not None and stop is not None and stop > start
    ]


def _lanes(preview: dict[str, Any]) -> list[tuple[str, Any]]:
    """Lines of the time line at the bottom: one for all named phases, one for each plug-in that acts at steps."""
    lanes: list[tuple[str, Any]] = []
    if phases := _ranges(preview.get("phases")):
        lanes.append(("phases", phases))
    for name, steps in mapping(preview.get("marks")).items():
        found = [step for step in map(finite, sequence(steps)) if step is not None]
        if found:
            lanes.append((name_text(name, 18), found))
    return lanes


def _shade_phases(panel: Any, preview: dict[str, Any]) -> None:
    for _, start, stop in _ranges(preview.get("phases")):
        for edge in (start, stop):
            panel.axvline(edge, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def _draw_lanes(panel: Any, lanes: list[tuple[str, Any]], last: float) -> None:
    panel.set_ylim(len(lanes) - 0.4, -0.6)
    panel.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    panel.tick_params(axis="y", length=0)
    panel.grid(False)
    for height, (_, content) in enumerate(lanes):
        if isinstance(content[0], tuple):
            for k, (name, start, stop) in enumerate(content):
                alpha = 0.35 if k % 2 else 0.6
                panel.barh(height, stop - start, left=start, height=0.7, color=COLOURS[4], alpha=alpha, linewidth=0)
                panel.text(min(start, last) + 0.006 * last, height, name, va="center", fontsize=8.5, clip_on=True)
        else:
            panel.vlines(content, height - 0.32, height + 0.32, color=COLOURS[0], linewidth=1, clip_on=False)
