"""Plots as PNG files. Figures are built without pyplot, so nothing global is touched and no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["forgetting_plot", "have_matplotlib", "study_plot"]

_TICKS = [0, 5, 10, 20, *(digit * 10**power for power in range(1, 8) for digit in (5, 10, 20))]


def have_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def forgetting_plot(runs: dict[str, dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Loss of every held-out set over the steps, one panel a set, one line a run.

    Args:
        runs (`dict`): by label, what `forgetting.json` holds.
        path (`str` or `Path`): the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(name for run in runs.values() for name in run["sets"]))
    figure = Figure(figsize=(5.2 * len(sets), 3.8), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for panel, name in zip(panels, sets, strict=True):
        for label, run in runs.items():
            entry = run["sets"].get(name)
            if entry:
                panel.plot(entry["steps"], entry["losses"], marker=".", markersize=4, linewidth=1.4, label=label)
        first = next(run["sets"][name] for run in runs.values() if name in run["sets"])
        panel.axhline(first["losses"][0], color="grey", linewidth=0.8, linestyle=":", label="before training")
        # Symmetric-log steps: the first twenty, where the stability gap is, get as much room as the rest.
        last = max(run["sets"][name]["steps"][-1] for run in runs.values() if name in run["sets"])
        panel.set_xscale("symlog", linthresh=20)
        panel.set_xlim(-0.5, max(last * 1.05, 1))
        panel.set_xticks(
            [tick for tick in _TICKS if tick <= last], [f"{t:,}" for t in _TICKS if t <= last], fontsize=8
        )
        panel.set_xticks([], minor=True)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("held-out loss (nats/token)")
        panel.set_title(name)
        panel.grid(alpha=0.25)
    panels[-1].legend(fontsize=8)
    if title:
        figure.suptitle(title)
    figure.savefig(path)


def study_plot(results: dict[str, Any], path: str | Path) -> None:
    """What replay keeps and costs: loss on old and new data over the steps, and one against the other at the end.

    Lines and points are means over the seeds, bands and bars their intervals. Every number is from `results`.

    Args:
        results (`dict`): what the `results.json` of a demo of scale `full` holds.
        path (`str` or `Path`): the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # 10 inches are shown on 850 pixels or so in a README: 9 points are then 10 pixels high.
    figure = Figure(figsize=(10, 4.1), layout="constrained", dpi=170)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    colours = _study_colours(results)
    for panel, name in ((left, "old"), (middle, "new")):
        _study_curves(panel, results, name, colours)
    _study_trade_off(right, results, colours)
    for panel in (left, middle, right):
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.suptitle(
        f"Share of old data in continued pre-training: {len(results['seeds'])} seeds, mean and 95 % interval",
        fontsize=10,
    )
    figure.savefig(path)


def _study_colours(results: dict[str, Any]) -> dict[str, Any]:
    """Orange to dark blue with the ratio, an order that colour-blind eyes and grey prints keep; the others apart."""
    from matplotlib import colormaps

    ratios = [row["arm"] for row in results["arms"] if row["ratio"] is not None]
    steps = {arm: 0.78 - 0.78 * k / max(len(ratios) - 1, 1) for k, arm in enumerate(ratios)}
    palette = colormaps["plasma"]
    return {
        row["arm"]: palette(steps[row["arm"]]) if row["arm"] in steps else "#777777" for row in results["arms"]
    } | {"joint": "black"}


def _study_curves(panel: Any, results: dict[str, Any], name: str, colours: dict[str, Any]) -> None:
    """The course of one held-out set, a line an arm; joint training, which starts elsewhere, as its last level."""
    labels = []
    last = 1
    for row in results["arms"]:
        colour, curve = colours[row["arm"]], row["curves"][name]
        if row["arm"] == "joint":
            panel.axhline(row[name]["mean"], color=colour, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        else:
            low = [mean - half for mean, half in zip(curve["mean"], curve["half"], strict=True)]
            high = [mean + half for mean, half in zip(curve["mean"], curve["half"], strict=True)]
            dashes = ":" if row["ratio"] is None else "-"
            panel.plot(curve["steps"], curve["mean"], color=colour, linewidth=1.6, linestyle=dashes)
            panel.fill_between(curve["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
            last = max(last, curve["steps"][-1])
        labels.append((row[name]["mean"], row["arm"], colour))
    panel.set_xlim(0, last)
    if name == "old":
        # Symmetric-log steps: the first twenty, where the stability gap is, get as much room as the rest.
        panel.set_xscale("symlog", linthresh=20)
        ticks = [tick for tick in (0, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000) if tick <= last]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.set_xticks([], minor=True)
    else:
        # All arms learn nats in the first steps; the axis is cut where the arms differ, by tenths of them.
        finals = [value for value, _, _ in labels]
        spread = max(finals) - min(finals)
        panel.set_ylim(min(finals) - 0.25 * spread, max(finals) + 1.2 * spread)
    panel.set_xlabel("optimizer step on the new domain", fontsize=9)
    panel.set_ylabel("held-out loss (nats/token)", fontsize=9)
    panel.set_title(f"{name} domain" + ("" if name == "old" else " (axis cut)"), fontsize=10)
    _labels_at_the_edge(panel, labels)


def _labels_at_the_edge(panel: Any, labels: list[tuple[float, str, Any]]) -> None:
    """Names at the right end of their lines, pushed apart where they would overlap, with a leader to their value."""
    low, high = panel.get_ylim()
    gap = (high - low) * 0.052
    labels = sorted(labels, key=lambda label: label[0])
    heights = [value for value, _, _ in labels]
    for _ in range(100):  # neighbours that are too close move apart by equal parts; the others stay
        for k in range(len(heights) - 1):
            overlap = max(gap - (heights[k + 1] - heights[k]), 0) / 2
            heights[k], heights[k + 1] = heights[k] - overlap, heights[k + 1] + overlap
    for height, (value, text, colour) in zip(heights, labels, strict=True):
        panel.annotate(
            text,
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.06, height),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def _study_trade_off(panel: Any, results: dict[str, Any], colours: dict[str, Any]) -> None:
    """Final loss on the old data against that on the new: down is kept, left is learned."""
    line = [row for row in results["arms"] if row["ratio"] is not None]
    panel.plot(
        [row["new"]["mean"] for row in line],
        [row["old"]["mean"] for row in line],
        color="#bbbbbb",
        linewidth=1,
        zorder=1,
    )
    for row in results["arms"]:
        new, old = row["new"], row["old"]
        marker = "*" if row["arm"] == "joint" else "s" if row["ratio"] is None else "o"
        panel.errorbar(
            new["mean"],
            old["mean"],
            xerr=new["half"],
            yerr=old["half"],
            color=colours[row["arm"]],
            marker=marker,
            markersize=10 if marker == "*" else 5.5,
            linewidth=1.1,
            capsize=2,
        )
        # Beside the bars, where the line of the ratios does not pass; the references, off that line, above and below.
        place = {
            "joint": (new["mean"], old["mean"] - old["half"]),
            "constant": (new["mean"], old["mean"] + old["half"]),
        }
        offset = {"joint": (0, -3), "constant": (0, 3)}.get(row["arm"], (3, 1))
        panel.annotate(
            row["arm"],
            place.get(row["arm"], (new["mean"] + new["half"], old["mean"])),
            xytext=offset,
            textcoords="offset points",
            ha="center" if row["arm"] in place else "left",
            va={"joint": "top", "constant": "bottom"}.get(row["arm"], "bottom"),
            color=colours[row["arm"]],
            fontsize=8,
        )
    panel.margins(x=0.16, y=0.1)
    panel.set_xlabel("final new loss (left: more learned)", fontsize=9)
    panel.set_ylabel("final old loss (down: more kept)", fontsize=9)
    panel.set_title("old against new, at the end", fontsize=10)
