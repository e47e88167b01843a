"""What came of it: the report's sections on forgetting, events, environment, and what could not be known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from hf_pretrain_ext.report.drawing import data_uri
from hf_pretrain_ext.report.figures import forgetting_figure
from hf_pretrain_ext.report.reading import RunRecord, mapping, number, whole
from hf_pretrain_ext.report.sections import named
from hf_pretrain_ext.report.tables import (
    Cell,
    Definitions,
    Details,
    Figure,
    Section,
    Table,
    Text,
    count,
    loss,
    run_cell,
    side_by_side,
    signed,
    text,
)

__all__ = ["environment", "events", "forgetting", "unknown"]

_LISTED = 6
"""Events of one kind in a row that are listed; of more, the first and the last."""
_ROUTINE = ("start", "log", "probe", "forgetting")
"""Events that other sections show."""
_LOUD = {"alert": "bad", "stop": "bad", "resume": "differs", "end": "good"}
_SEEDS = ("seed", "data_seed", "full_determinism")


def forgetting(runs: Sequence[RunRecord]) -> Section:
    lead = "Loss on held-out sets, probed before the first step, densely in the first steps and regularly after."
    blocks: list[Any] = []
    figure = forgetting_figure(runs)
    if figure is None:
        words = "No run measured held-out sets, so it is not known what was forgotten: ForgettingCallback does that."
        return Section("forgetting", "Forgetting", lead, [Text(words)])
    alt = f"Held-out loss of each set over the steps, from before the first step: {named(runs)}."
    caption = "The first 20 steps take as much room as those after. Dotted: the loss before training."
    blocks.append(Figure(data_uri(figure), alt, caption))
    rows = [row for index in range(len(runs)) for row in _figure_rows(runs, index)]
    head = ["Run", "Set", "Initial", "Worst", "at step", "Gap depth", "Recovery step", "Final", "at step"]
    head += ["Forgetting", "Gain", "Probes"]
    blocks += [Table(head, rows), Definitions(_definitions())]
    seconds = [f"{run.label} {taken:,.1f} s" for run in runs if (taken := _probe_seconds(run))]
    if seconds:
        blocks.append(Text(f"Time that the probes took in all: {', '.join(seconds)}."))
    blocks += [Text(f"{run.label}: no held-out sets were measured.") for run in runs if not run.probes]
    return Section("forgetting", "Forgetting", lead, blocks)


def _probe_seconds(run: RunRecord) -> float:
    found = [number(event.get("seconds")) for event in run.of("probe")]
    return sum(seconds for seconds in found if seconds is not None and math.isfinite(seconds))


def _figure_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    from hf_pretrain_ext.forgetting import summarise

    rows, run = [], runs[index]
    for name, points in run.probes.items():
        # From the probes and not from the run's own summary, which an interrupted run does not have.
        figures: dict[str, Any] = summarise([step for step, _ in points], [value for _, value in points])
        if points[0][0] != 0:
            figures |= dict.fromkeys(("initial", "gap_depth", "gain", "recovery_step"))
        unrecovered = "not known" if points[0][0] else "never" if run.end else "not so far"
        rows.append([
            run_cell(runs, index),
            text(name),
            loss(figures["initial"], "not measured"),
            loss(figures["worst"]),
            count(figures["worst_step"]),
            loss(figures["gap_depth"], "not known"),
            count(figures["recovery_step"], unrecovered),
            loss(figures["final"]),
            count(figures["final_step"]),
            loss(figures["forgetting"]),
            signed(figures["gain"], "not known"),
            count(len(points)),
        ])  # fmt: skip
    return rows


def _definitions() -> list[tuple[str, str]]:
    from hf_pretrain_ext.forgetting import RECOVERY_MARGIN

    return [
        ("Initial", "the loss before the first step"),
        ("Worst", "the highest loss of all probes"),
        ("Gap depth", "worst − initial: how deep the stability gap is"),
        ("Recovery step", f"the first step after the worst with a loss of at most initial + {RECOVERY_MARGIN}"),
        ("Final", "the loss of the last probe"),
        ("Forgetting", "final − the lowest loss of all probes: how far the set has come away from its best"),
        ("Gain", "initial − final: above zero the set was learned, below zero it was lost"),
    ]


# Events


def events(runs: Sequence[RunRecord]) -> Section:
    lead = "What happened besides logs and probes. Many of one kind in a row stand on one line."
    rows = []
    for index, run in enumerate(runs):
        found = [event for event in run.events if event["event"] not in _ROUTINE]
        for name, group in groupby(found, key=lambda event: str(event["event"])):
            rows += _event_rows(run_cell(runs, index), name, list(group))
    if not rows:
        return Section("events", "Events", lead, [Text("The traces hold none.")])
    return Section("events", "Events", lead, [Table(["Run", "Step", "Event", "What"], rows)])


def _event_rows(label: Cell, name: str, group: list[dict[str, Any]]) -> list[list[Cell]]:
    tone = _LOUD.get(name, "")
    if name == "save" or len(group) > _LISTED:
        first, last = group[0]["step"], group[-1]["step"]
        told = [_event_words(event) for event in (group if len(group) <= _LISTED else [group[0], group[-1]])]
        words = (" … " if len(group) > _LISTED else ", ").join(told)
        step = count(first) if first == last else text(f"{first:,} – {last:,}", "number")
        return [[label, step, text(name if len(group) == 1 else f"{name} × {len(group)}", tone), text(words)]]
    return [[label, count(event["step"]), text(name, tone), text(_event_words(event))] for event in group]


def _event_words(event: dict[str, Any]) -> str:
    name = event["event"]
    if name in ("alert", "stop") and "set" in event:
        rise, threshold = number(event.get("rise")), number(event.get("threshold"))
        if rise is not None and threshold is not None:
            return f"loss on {event['set']} had risen by {rise:.4f} nats since step 0 (threshold {threshold:g})"
    if name == "save":
        return str(event.get("folder", ""))
    if name == "resume":
        return f"from {event.get('checkpoint', 'a checkpoint')}"
    if name == "end":
        return "training ended"
    data = {key: value for key, value in event.items() if key not in ("event", "step")}
    told = json.dumps(data, ensure_ascii=False) if data else ""
    return told if len(told) <= 300 else told[:299] + "…"


# Environment


def environment(runs: Sequence[RunRecord]) -> Section:
    lead = "Versions, seeds and settings that decide what a run does."
    marked = " Marked lines differ between the runs." if len(runs) > 1 else ""
    head = ["", *(run.label for run in runs)]
    blocks: list[Any] = []
    for caption, columns in (
        ("Versions", [mapping(run.start.get("versions")) for run in runs]),
        ("Seeds and sizes", [_seeds(run) for run in runs]),
        ("Data, as a hash of sampled rows", [mapping(run.identity.get("data")) for run in runs]),
    ):
        rows = side_by_side(dict.fromkeys(key for column in columns for key in column), columns)
        blocks.append(Table(head, rows, caption, by_run=True) if rows else Text(f"{caption}: not in the traces."))
    arguments = [run.arguments for run in runs]
    names = sorted({name for column in arguments for name in column})
    rows = side_by_side(names, arguments, "not in this trace", known_only=True)
    differing = [row for row in rows if "differs" in row[0].tone]
    if differing:
        blocks.append(Table(head, differing, "Training arguments that differ", by_run=True))
    elif names and len(runs) > 1:
        blocks.append(Text("The training arguments in the traces are the same in all runs."))
    if names:
        note = (
            "Arguments that do not decide what is trained (folders, logging, evaluation, saving, workers, the split "
        )
        note += "of a batch over devices) are not in a trace."
        blocks.append(Details(f"All {len(names)} training arguments", [Table(head, rows, note=note, by_run=True)]))
    return Section("environment", "Environment", lead + marked, blocks)


def _seeds(run: RunRecord) -> dict[str, Any]:
    found = {name: run.arguments[name] for name in _SEEDS if name in run.arguments}
    plan = mapping(run.identity.get("plan"))
    found |= {f"plan: {name}": plan[name] for name in ("seed", "window", "epoch") if name in plan}
    sizes = {"global_batch": "samples a step", "total_steps": "steps"}
    return found | {words: run.identity[name] for name, words in sizes.items() if name in run.identity}


# What could not be known


def unknown(runs: Sequence[RunRecord]) -> Section:
    lead = "What this page cannot tell, because the trace does not."
    rows = [[run_cell(runs, index), text(words)] for index, run in enumerate(runs) for words in _gaps(run)]
    if not rows:
        return Section(
            "unknown", "What could not be known", lead, [Text("Nothing that this page looks for is missing.")]
        )
    return Section("unknown", "What could not be known", lead, [Table(["Run", "What is missing"], rows)])


def _gaps(run: RunRecord) -> list[str]:
    if not run.events:
        return ["The trace holds no event at all."]
    found = (
        (not run.start, "The trace does not begin with a start: settings, plan and versions are not known."),
        (
            run.start and not run.has_preview,
            "The trace was written before plans were recorded. The plan shown is worked out from the identity of "
            "the run, with samples rounded, without tokens and without the steps of probes.",
        ),
        (run.start and not run.sources, "No plug-in decided the order: what was seen of the data is not counted."),
        (
            run.planned_rate() is None,
            "The learning rate followed the host's own schedule, whose plan is not recorded; logs show it afterwards.",
        ),
        (not run.scalars("learning_rate"), "No learning rate was logged: whether the plan was followed is not known."),
        (not run.scalars("loss"), "No training loss was logged."),
        (not run.eval_losses, "The Trainer logged no evaluation of its own (eval_loss)."),
        (not run.probes, "No held-out sets were probed: forgetting is not known."),
        (
            run.end is None,
            f"The trace has no end: what happened after step {run.last_step:,} is not known, and samples seen since "
            "the last log are not counted.",
        ),
        (
            run.counts and any(c.tokens is None for c in run.counts[-1][1].values()),
            "Tokens read are not known for every source: the trace is an older one, or the collator's batches do not "
            "tell which tokens belong to which sample.",
        ),
        (
            any(whole(source.get("rows")) is None for source in run.sources),
            "A source is a stream: how many rows it has, and so how many passes are made, is not known.",
        ),
        (run.of("mixture"), "The mixture was changed during the run; the plan shown is the one it began with."),
    )
    return [words for is_so, words in found if is_so] + _gaps_of_resumes(run)


def _gaps_of_resumes(run: RunRecord) -> list[str]:
    resumes = run.of("resume")
    if not resumes:
        return []
    times = "once" if len(resumes) == 1 else f"{len(resumes)} times"
    gaps = [
        f"Resumed {times}: what an interrupted session wrote beyond the step resumed from is left out, and train_loss "
        "is as the last session logged it."
    ]
    changed = [event for event in resumes if mapping(event.get("versions")) != mapping(run.start.get("versions"))]
    if changed and run.start:
        gaps.append(f"Versions differed when it was resumed: {'; '.join(_version_changes(run, e) for e in changed)}.")
    return gaps


def _version_changes(run: RunRecord, event: dict[str, Any]) -> str:
    then, now = mapping(run.start.get("versions")), mapping(event.get("versions"))
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    told = ", ".join(f"{name} {then.get(name, 'absent')} → {now.get(name, 'absent')}" for name in names)
    return f"at step {event['step']:,} {told}"
