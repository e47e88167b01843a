"""What was run, planned and seen: the first sections of the report, from the records of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.drawing import data_uri
from hf_pretrain_ext.report.figures import loss_figure, rate_figure
from hf_pretrain_ext.report.mixture import replay_ratio
from hf_pretrain_ext.report.plan_plot import plan_figure
from hf_pretrain_ext.report.reading import RunRecord, finite, mapping, number, rate_points, sequence, whole
from hf_pretrain_ext.report.tables import (
    Cell,
    Figure,
    Listing,
    Section,
    Table,
    Text,
    count,
    loss,
    missing,
    percent,
    rate,
    run_cell,
    side_by_side,
    signed,
    text,
)

__all__ = ["glance", "losses", "named", "plan", "rates", "state", "what_was_run"]

SHOWN_SETS = 4


def named(runs: Sequence[RunRecord]) -> str:
    return ", ".join(run.label for run in runs)


def state(run: RunRecord) -> tuple[str, str]:
    """In words how far the run came, and whether that is good, bad or neither."""
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    if run.end is None and run.live:
        return (f"not ended, at step {run.last_step:,}{total}" if run.events else "not begun yet"), ""
    if run.end is None:
        return f"interrupted, last seen at step {run.last_step:,}{total}", "bad"
    at = run.end["step"]
    if run.total_steps and at < run.total_steps:
        stops = [event for event in run.of("stop") if event["step"] == at]
        why = f" by {', '.join(str(e.get('set', e['event'])) for e in stops)}" if stops else ""
        return f"stopped{why} after step {at:,}{total}", "bad"
    return f"finished, {at:,}{total} steps", "good"


def glance(runs: Sequence[RunRecord]) -> Section:
    sets = list(dict.fromkeys(name for run in runs for name in run.probes))[:SHOWN_SETS]
    head = ["Run", "State", "Plug-ins", "Training loss, first", "last", "Replayed"]
    rows = []
    for index, run in enumerate(runs):
        words, tone = state(run)
        points = run.scalars("loss")
        row = [run_cell(runs, index), text(words, tone), text(", ".join(run.plugins) or "none")]
        row += [loss(points[0][1] if points else None), loss(points[-1][1] if points else None)]
        row.append(percent(replay_ratio(run), "none"))
        for name in sets:
            held = run.probes.get(name)
            row += [loss(held[-1][1]), signed(held[-1][1] - held[0][1])] if held else [missing("–"), missing("–")]
        rows.append(row)
    for name in sets:
        head += [f"Held-out {name}, last", "since start"]
    lead = (
        "One line a run. Losses are in nats a token, lower is better; “since start” is the change of a held-out loss "
    )
    return Section(
        "glance",
        "At a glance",
        lead + "since the first probe: above zero, the set was partly forgotten.",
        [Table(head, rows)],
    )


def what_was_run(runs: Sequence[RunRecord]) -> Section:
    lead = "The plug-ins of each run with their settings, and what each said that it would do."
    blocks: list[Any] = []
    names = list(dict.fromkeys(name for run in runs for name in run.plugins))
    rows = [row for name in names for row in _plugin_rows(name, runs)]
    if rows:
        note = "Settings that are none in every run are left out." + _differing_note(runs)
        blocks.append(Table(["Plug-in", *(run.label for run in runs)], rows, note=note, by_run=True))
    else:
        blocks.append(Text("No plug-in is named in the traces."))
    for index, run in enumerate(runs):
        lines = [str(line) for line in sequence(run.start.get("describe"))]
        blocks.append(Listing(run.label, lines or ["The plug-ins described nothing."], index % 6))
    return Section("run", "What was run", lead, blocks)


def _differing_note(runs: Sequence[RunRecord]) -> str:
    return " Marked lines differ between the runs." if len(runs) > 1 else ""


def _plugin_rows(name: str, runs: Sequence[RunRecord]) -> list[list[Cell]]:
    differs = len({name in run.plugins for run in runs}) > 1
    tone = "group differs" if differs else "group"
    rows = [[text(name, tone), *(text("in use" if name in run.plugins else "not used", tone) for run in runs)]]
    columns = [mapping(run.plugins[name]) if name in run.plugins else None for run in runs]
    used = [column for column in columns if column]
    keys = dict.fromkeys(key for column in used for key in column)
    kept = [key for key in keys if any(column.get(key) is not None for column in used)]
    return rows + [
        [Cell(row[0].text, tone=f"{row[0].tone} sub".strip()), *row[1:]] for row in side_by_side(kept, columns)
    ]


def plan(runs: Sequence[RunRecord]) -> Section:
    lead = "What was to happen at which step, as known before training, and how much of each source was then seen."
    blocks: list[Any] = []
    # Runs that differ in something else (a seed, say) share a picture.
    plans: dict[str, list[RunRecord]] = {}
    for run in runs:
        plans.setdefault(json.dumps(run.preview, sort_keys=True, default=str), []).append(run)
    for alike in plans.values():
        first, labels = alike[0], named(alike)
        if first.total_steps or rate_points(first.preview):
            alt = f"Plan of {labels}: learning rate, mixture of sources, phases and probes over the steps."
            words = f"{labels}: {_plan_words(first)}"
            blocks.append(Figure(data_uri(plan_figure(first.preview)), alt, words))
        else:
            blocks.append(Text(f"{labels}: the trace holds no plan and no number of steps."))
    rows = [row for index in range(len(runs)) for row in _source_rows(runs, index)]
    if rows:
        head = ["Run", "Source", "Rows", "Order", "Planned samples", "seen", "Planned tokens", "read", "bearing loss"]
        head += ["Passes planned", "Counted at step"]
        note = "Planned is over the whole run, seen and read up to the step counted last. "
        note += "A token count after ≈ is expected, from a sample of the rows."
        blocks.append(Table(head, rows, "Sources, planned and seen", note))
    for run in runs:
        if not run.sources:
            blocks.append(
                Text(f"{run.label}: no plug-in decided the order; the data came as the Trainer's own sampler gave it.")
            )
    return Section("plan", "The plan", lead, blocks)


def _plan_words(run: RunRecord) -> str:
    batch, epoch = whole(run.preview.get("global_batch")), whole(run.preview.get("steps_per_epoch"))
    tokens = finite(run.preview.get("tokens"))
    parts = [f"{run.total_steps:,} steps" if run.total_steps else "", f"{batch:,} samples a step" if batch else ""]
    parts += [f"{epoch:,} steps an epoch" if epoch else ""]
    exact = run.preview.get("tokens_exact") is not False
    parts += [f"{'' if exact else '≈ '}{tokens:,.0f} tokens in all" if tokens else ""]
    return ", ".join(part for part in parts if part) + "."


def _source_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    run, rows = runs[index], []
    seen = run.counts[-1][1] if run.counts else {}
    planned = {str(source["name"]): source for source in run.sources}
    for name in dict.fromkeys([*planned, *seen]):
        source, found = planned.get(name, {}), seen.get(name)
        label = f"{name} (replayed)" if source.get("replayed") or (found and found.replayed) else name
        exact = source.get("tokens_exact") is not False
        rows.append([
            run_cell(runs, index),
            text(label),
            count(number(source.get("rows")), "a stream" if name in planned else "–"),
            text(source.get("order") or "–"),
            count(number(source.get("samples"))),
            count(found.samples if found else None, "not known"),
            count(number(source.get("tokens")), "not known", exact),
            count(found.tokens if found else None, "not known"),
            count(found.loss_tokens if found else None, "not known"),
            rate(number(source.get("passes"))),
            count(run.counts[-1][0] if run.counts else None, "never"),
        ])  # fmt: skip
    return rows


def rates(runs: Sequence[RunRecord]) -> Section:
    lead = "Lines are the plan, dots what the Trainer logged. A log at step n holds the rate that step n was made "
    lead += "with, so it stands at n − 1, the steps made before."
    blocks: list[Any] = []
    figure = rate_figure(runs)
    if figure is not None:
        blocks.append(Figure(data_uri(figure), f"Learning rate over the steps, planned and logged: {named(runs)}."))
    rows = []
    for index, run in enumerate(runs):
        planned, logged, apart = rate_points(run.preview), run.scalars("learning_rate"), run.rate_deviation
        name = mapping(run.identity.get("schedule")).get("name")
        rows.append([
            run_cell(runs, index),
            text(name or ("of a plug-in" if planned else "the host's own schedule")),
            rate(max((r for _, r in planned), default=None), "not in the trace"),
            rate(planned[-1][1] if planned else None, "not in the trace"),
            count(len(logged)),
            rate(max((r for _, r in logged), default=None), "nothing logged"),
            rate(logged[-1][1] if logged else None, "nothing logged"),
            rate(apart[0] if apart else None, "nothing to compare"),
        ])  # fmt: skip
    head = ["Run", "Schedule", "Planned peak", "Planned at end", "Logs", "Logged peak", "Logged last"]
    head += ["Largest difference"]
    note = "The largest difference between a logged rate and the plan is zero or a rounding error if it was followed."
    blocks.append(Table(head, rows, note=note))
    return Section("rate", "Learning rate", lead, blocks)


def losses(runs: Sequence[RunRecord]) -> Section:
    lead = "As the Trainer logged them. The training loss is a mean since the log before, over all samples."
    blocks: list[Any] = []
    figure = loss_figure(runs)
    if figure is not None:
        alt = f"Training loss, and losses of evaluations where there were any, over the steps: {named(runs)}."
        blocks.append(Figure(data_uri(figure), alt))
    else:
        blocks.append(Text("No loss was logged in any run."))
    rows = []
    for index, run in enumerate(runs):
        series = {"training loss": run.scalars("loss"), **run.eval_losses}
        if not run.eval_losses:
            series["eval_loss"] = []
        for name, points in series.items():
            lowest = min(points, key=lambda point: point[1], default=None)
            cells = [count(points[0][0]), loss(points[0][1]), count(lowest[0]), loss(lowest[1])] if lowest else []
            cells += (
                [count(points[-1][0]), loss(points[-1][1])] if lowest else [missing("never logged")] + [missing()] * 5
            )
            mean = run.scalars("train_loss") if name == "training loss" else []
            rows.append([run_cell(runs, index), text(name), *cells, loss(mean[-1][1] if mean else None)])
    head = ["Run", "Loss", "First at step", "first", "Lowest at step", "lowest", "Last at step", "last", "Mean"]
    blocks.append(Table(head, rows, note="Mean: train_loss, which the Trainer logs at the end of a session."))
    return Section("losses", "Losses", lead, blocks)
