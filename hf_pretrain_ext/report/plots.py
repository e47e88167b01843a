"""Plots as PNG files. Figures are built without pyplot, so nothing global is touched and no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["forgetting_plot", "have_matplotlib"]

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
