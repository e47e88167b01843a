"""What was forgotten: the report's sections on held-out losses and on the stability gap, from the probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.drawing import data_uri
from hf_pretrain_ext.report.figures import forgetting_figure, gap_figure
from hf_pretrain_ext.report.reading import RunRecord, number
from hf_pretrain_ext.report.sections import named
from hf_pretrain_ext.report.tables import (
    Cell,
    Definitions,
    Figure,
    Section,
    Table,
    Text,
    count,
    loss,
    missing,
    run_cell,
    signed,
    text,
)

__all__ = ["forgetting", "stability_gap"]

UNMEASURED = "No run measured held-out sets, so it is not known what was forgotten: ForgettingCallback does that."


def _summary(points: list[tuple[int, float]]) -> dict[str, Any]:
    """From the probes and not from the run's own summary, which an interrupted run does not have."""
    from hf_pretrain_ext.forgetting import summarise

    figures: dict[str, Any] = summarise([step for step, _ in points], [value for _, value in points])
    figures["best_step"] = min(points, key=lambda point: (math.isnan(point[1]), point[1], point[0]))[0]
    if points[0][0] != 0:
        figures |= dict.fromkeys(("initial", "gap_depth", "gain", "recovery_step"))
    return figures


def forgetting(runs: Sequence[RunRecord]) -> Section:
    lead = "Loss on held-out sets, probed before the first step, densely in the first steps and regularly after."
    figure = forgetting_figure(runs)
    if figure is None:
        return Section("forgetting", "Forgetting", lead, [Text(UNMEASURED)])
    alt = f"Held-out loss of each set over the steps, from before the first step: {named(runs)}."
    caption = "The first 20 steps take as much room as those after. Dotted: the loss before training."
    blocks: list[Any] = [Figure(data_uri(figure), alt, caption)]
    rows = [row for index in range(len(runs)) for row in _forgetting_rows(runs, index)]
    head = ["Run", "Set", "Initial", "Lowest", "at step", "Final", "at step", "Forgetting", "Gain", "Probes"]
    terms = [
        ("Initial", "the loss before the first step"),
        ("Lowest", "the lowest loss of all probes"),
        ("Final", "the loss of the last probe"),
        (
            "Forgetting",
            "final − lowest: how far the set has come away from its best, never below zero (after Abbes et al., 2025, "
            "2508.01908, who subtract the best of the past)",
        ),
        ("Gain", "initial − final: above zero the set was learned, below zero it was lost"),
    ]
    blocks += [Table(head, rows, of="Forgetting of each set"), Definitions(terms)]
    blocks += _over_the_life(runs)
    seconds = [f"{run.label} {taken:,.1f} s" for run in runs if (taken := _probe_seconds(run))]
    if seconds:
        blocks.append(Text(f"Time that the probes took in all: {', '.join(seconds)}."))
    blocks += [Text(f"{run.label}: no held-out sets were measured.") for run in runs if not run.probes]
    return Section("forgetting", "Forgetting", lead, blocks)


def _forgetting_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    rows = []
    for name, points in runs[index].probes.items():
        figures = _summary(points)
        rows.append([
            run_cell(runs, index),
            text(name),
            loss(figures["initial"], "not measured"),
            loss(figures["best"]),
            count(figures["best_step"]),
            loss(figures["final"]),
            count(figures["final_step"]),
            loss(figures["forgetting"]),
            signed(figures["gain"], "not known"),
            count(len(points)),
        ])  # fmt: skip
    return rows


def _over_the_life(runs: Sequence[RunRecord]) -> list[Any]:
    """What runs logged of sets that stages before them had measured."""
    rows, transfers = [], []
    for index, run in enumerate(runs):
        for name in run.probes:
            lost, gained = (run.scalars(f"life_{what}_{name}") for what in ("forgetting", "gain"))
            if lost or gained:
                cells = [signed(points[-1][1]) if points else missing() for points in (lost, gained)]
                rows.append([run_cell(runs, index), text(name), *cells])
        if transfer := run.scalars("backward_transfer"):
            transfers.append(f"{run.label} {signed(transfer[-1][1]).text}")
    if not rows:
        return []
    words = [
        ("Life forgetting", "last loss − the lowest loss of all earlier stages: below zero, better known than ever"),
        ("Life gain", "the first loss of the first stage that measured the set − last loss"),
        (
            "Backward transfer",
            "mean over these sets of (last loss of the stage before − last loss): above zero, this stage helped",
        ),
    ]
    blocks: list[Any] = [
        Table(["Run", "Set", "Life forgetting", "Life gain"], rows, "Over the stages"),
        Definitions(words),
    ]
    return blocks + ([Text(f"Backward transfer: {', '.join(transfers)}.")] if transfers else [])


def _probe_seconds(run: RunRecord) -> float:
    found = [number(event.get("seconds")) for event in run.of("probe")]
    return sum(seconds for seconds in found if seconds is not None and math.isfinite(seconds))


# The stability gap


def stability_gap(runs: Sequence[RunRecord]) -> Section:
    from hf_pretrain_ext.forgetting import RECOVERY_MARGIN

    lead = "How far each held-out loss first rose above where it began, and when it had come back."
    if not any(run.probes for run in runs):
        return Section("gap", "Stability gap", lead, [Text(UNMEASURED)])
    blocks: list[Any] = []
    figure = gap_figure(runs)
    if figure is not None:
        alt = f"Change of each held-out loss since before the first step, over the steps: {named(runs)}."
        caption = "Nats since step 0. Triangles: the worst probe; rings: the recovery. "
        caption += f"The grey band reaches {RECOVERY_MARGIN} nats above step 0."
        blocks.append(Figure(data_uri(figure), alt, caption))
    rows = [row for index in range(len(runs)) for row in _gap_rows(runs, index)]
    head = ["Run", "Set", "Initial", "Worst", "at step", "Gap depth", "Recovery step", "Steps to recover"]
    terms = [
        ("Worst", "the highest loss of all probes"),
        ("Gap depth", "worst − initial: how deep the stability gap is (Guo et al., 2024, 2406.14833); zero, no gap"),
        ("Recovery step", f"the first step after the worst with a loss of at most initial + {RECOVERY_MARGIN} (ours)"),
        ("Steps to recover", "recovery step − step of the worst"),
    ]
    return Section(
        "gap", "Stability gap", lead, [*blocks, Table(head, rows, of="Gap of each set"), Definitions(terms)]
    )


def _gap_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    rows, run = [], runs[index]
    for name, points in run.probes.items():
        figures = _summary(points)
        recovered = figures["recovery_step"]
        unrecovered = "not known" if points[0][0] else "never" if run.end else "not so far"
        if figures["gap_depth"] == 0:
            # At its worst before the first step: nothing to come back from.
            recovered, unrecovered = None, "no gap"
        rows.append([
            run_cell(runs, index),
            text(name),
            loss(figures["initial"], "not measured"),
            loss(figures["worst"]),
            count(figures["worst_step"]),
            loss(figures["gap_depth"], "not known"),
            count(recovered, unrecovered),
            count(None if recovered is None else recovered - figures["worst_step"]),
        ])  # fmt: skip
    return rows
