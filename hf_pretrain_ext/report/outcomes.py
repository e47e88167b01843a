"""What came of it: the report's sections on events, environment, and what could not be known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from hf_pretrain_ext.report.drawing import COLOURS
from hf_pretrain_ext.report.reading import RunRecord, finite, mapping, number, sequence, whole
from hf_pretrain_ext.report.tables import (
    Cell,
    Details,
    Listing,
    Section,
    Table,
    Text,
    count,
    run_cell,
    side_by_side,
    size,
    span,
    text,
)

__all__ = ["environment", "events", "unknown"]

_LISTED = 6
"""Events of one kind in a row that are listed; of more, the first and the last."""
_ROUTINE = ("start", "log", "probe", "forgetting", "usage", "memory", "buffer", "metadata", "benchmarks")
"""Events that other sections show."""
_LOUD = {
    **dict.fromkeys(("alert", "stop", "nonfinite", "interrupted", "warning"), "bad"),
    "resume": "differs",
    "end": "good",
}
_SAID = ("alert", "stop", "nonfinite")
"""Events that are said as a warning besides."""
_SEEDS = ("seed", "data_seed", "full_determinism")


# Events


def events(runs: Sequence[RunRecord]) -> Section:
    lead = "What happened besides logs and probes: saves, resumes, interruptions, warnings, and what plug-ins did."
    blocks: list[Any] = []
    sessions = [row for index in range(len(runs)) for row in _session_rows(runs, index)]
    if sessions:
        head = ["Run", "From step", "Began (UTC)", "Came to step", "Took", "How it ended"]
        blocks.append(Table(head, sessions, "Sessions: calls of train()"))
    rows = []
    for index, run in enumerate(runs):
        label = run_cell(runs, index)
        said = {event["step"] for event in run.events if event["event"] in _SAID}
        found = [
            event
            for event in run.events
            if event["event"] not in (*_ROUTINE, "session")
            and not (event["event"] == "warning" and event["step"] in said)
        ]
        rows += [
            [label, count(session.step), text("warning", "bad"), text(note)]
            for session in run.sessions[:1]
            for note in session.notes
        ]
        for name, group in groupby(found, key=lambda event: str(event["event"])):
            rows += _event_rows(label, name, list(group))
    if rows:
        note = "Many of one kind in a row stand on one line."
        blocks.append(Table(["Run", "Step", "Event", "What"], rows, "Events", note))
    return Section("events", "Events", lead, blocks or [Text("The traces hold none.")])


def _session_rows(runs: Sequence[RunRecord], index: int) -> list[list[Cell]]:
    rows = []
    for session in runs[index].sessions:
        tone = "good" if session.ended == "training ended" else "" if session.ended.startswith("no end") else "bad"
        began = str(session.time or "not known").replace("T", " ").removesuffix("+00:00")
        rows.append([
            run_cell(runs, index),
            count(session.step),
            text(began, "when"),
            count(session.last_step),
            span(session.seconds),
            text(session.ended, tone),
        ])  # fmt: skip
    return rows


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
    told = _TELL.get(event["event"], _as_json)(event) or _as_json(event)
    return told if len(told) <= 300 else told[:299] + "…"


def _as_json(event: dict[str, Any]) -> str:
    data = {key: value for key, value in event.items() if key not in ("event", "step")}
    return json.dumps(data, ensure_ascii=False) if data else ""


def _rise_words(event: dict[str, Any]) -> str:
    rise, threshold = number(event.get("rise")), number(event.get("threshold"))
    if "set" not in event or rise is None or threshold is None:
        return ""
    return f"loss on {event['set']} had risen by {rise:.4f} nats since step 0 (threshold {threshold:g})"


def _resume_words(event: dict[str, Any]) -> str:
    words = f"from {event.get('checkpoint', 'a checkpoint')}"
    reached, step = whole(event.get("reached")), event["step"]
    if reached is not None and reached > step:
        words += f"; the session before had come to step {reached:,}, what it did after step {step:,} was done again"
    return words


def _nonfinite_words(event: dict[str, Any]) -> str:
    acted = {"report": "only reported", "skip": "the update was left out", "stop": "training was ended"}
    what, rows = " and ".join(map(str, sequence(event.get("what")))), event.get("rows")
    if not what:
        return ""
    read = f"; rows read: {json.dumps(rows, ensure_ascii=False)}" if rows else ""
    return f"{what} not finite: {acted.get(str(event.get('action')), event.get('action'))}{read}"


def _mixture_words(event: dict[str, Any]) -> str:
    shares = {str(name): finite(share) for name, share in mapping(event.get("shares")).items()}
    total, start = sum(share or 0.0 for share in shares.values()), whole(event.get("start"))
    if not total or start is None or None in shares.values():
        return ""
    return f"from step {start:,}: {', '.join(f'{name} {(share or 0) / total:.1%}' for name, share in shares.items())}"


def _interrupted_words(event: dict[str, Any]) -> str:
    return ": ".join(str(event[key]) for key in ("error", "message") if event.get(key))


_TELL: dict[str, Callable[[dict[str, Any]], str]] = {
    "alert": _rise_words,
    "stop": _rise_words,
    "save": lambda event: str(event.get("folder", "")),
    "resume": _resume_words,
    "nonfinite": _nonfinite_words,
    "mixture": _mixture_words,
    "interrupted": _interrupted_words,
    "warning": lambda event: str(event.get("message", "")),
    "end": lambda event: "training ended",
}


# Environment


def environment(runs: Sequence[RunRecord]) -> Section:
    lead = "Versions, machine, command, seeds and settings that decide what a run does."
    marked = " Marked lines differ between the runs." if len(runs) > 1 else ""
    head = ["", *(run.label for run in runs)]
    blocks: list[Any] = []
    for caption, columns in (
        ("Versions", [mapping(run.start.get("versions")) for run in runs]),
        ("Machine", [_machine(run) for run in runs]),
        ("Seeds and sizes", [_seeds(run) for run in runs]),
        ("Data, as a hash of sampled rows", [mapping(run.identity.get("data")) for run in runs]),
    ):
        rows = side_by_side(dict.fromkeys(key for column in columns for key in column), columns)
        blocks.append(Table(head, rows, caption, by_run=True) if rows else Text(f"{caption}: not in the traces."))
    blocks += _command_listings(runs)
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


def _machine(run: RunRecord) -> dict[str, Any]:
    """Of the last session: a resumed run may have moved."""
    if not run.sessions:
        return {}
    found = dict(run.sessions[-1].machine)
    for name in ("memory", "device_memory"):
        if name in found:
            found[name] = size(finite(found[name])).text
    return found | ({"ranks": run.sessions[-1].ranks} if run.sessions[-1].ranks is not None else {})


def _command_listings(runs: Sequence[RunRecord]) -> list[Any]:
    found = [_commands(run) for run in runs]
    if len(runs) > 1 and found[0] and all(lines == found[0] for lines in found):
        return [Listing("Command of all runs", found[0])]
    listed = [(index, run, lines) for index, (run, lines) in enumerate(zip(runs, found, strict=True)) if lines]
    return [Listing(f"Command of {run.label}", lines, index % len(COLOURS)) for index, run, lines in listed]


def _commands(run: RunRecord) -> list[str]:
    """Of every session, each once."""
    told = [str(run.start["command"])] if run.start.get("command") else []
    return list(dict.fromkeys([*told, *(session.command for session in run.sessions if session.command)]))


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
        (not run.usage, "No memory was measured: the trace is an older one, or holds no log of a training loss."),
        (run.start and not run.sessions, "Machine and times are not recorded: the trace is an older one."),
        (
            run.end is None and not run.live,
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
