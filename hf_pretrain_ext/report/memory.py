"""What runs held in memory and how long they took: the report's section on measured and planned bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.drawing import data_uri
from hf_pretrain_ext.report.figures import memory_figure
from hf_pretrain_ext.report.reading import RunRecord, finite, mapping, number
from hf_pretrain_ext.report.sections import named
from hf_pretrain_ext.report.tables import (
    Cell,
    Figure,
    Section,
    Table,
    Text,
    count,
    missing,
    run_cell,
    size,
    span,
    text,
)

__all__ = ["memory"]


def memory(runs: Sequence[RunRecord]) -> Section:
    lead = "Bytes that the first process held, measured at each log of a training loss, and what plug-ins had planned."
    blocks: list[Any] = []
    if not any(run.usage for run in runs):
        blocks.append(Text("No memory was measured in any run: the traces are older ones, or hold no log yet."))
    else:
        figure = memory_figure(runs)
        if figure is not None:
            alt = f"Memory of the first process over the steps, and the peak on its device: {named(runs)}."
            blocks.append(Figure(data_uri(figure), alt))
        head = [
            "Run",
            "Device",
            "Peak on the device",
            "Main memory, peak",
            "at the last log",
            "Time",
            "Steps a second",
        ]
        note = "The peak on the device is what torch had allocated for tensors at most; main memory is that of the "
        note += "process with all its libraries, from before training on. Workers and other ranks are not in it. "
        note += "Time is that of the sessions that count, probes, evaluations and saves included."
        blocks.append(Table(head, [_measured(runs, index) for index in range(len(runs))], "Measured", note))
    blocks += _planned(runs) + _kept(runs)
    return Section("memory", "Memory and time", lead, blocks)


def _measured(runs: Sequence[RunRecord], index: int) -> list[Cell]:
    run = runs[index]
    machine = run.sessions[-1].machine if run.sessions else {}
    device = str(machine.get("device_name") or machine.get("device") or "not known")
    on_device = None if machine.get("device") == "cpu" else "not known"
    seconds, steps = _time(run)
    pace = Cell(f"{steps / seconds:,.2f}", str(steps / seconds)) if seconds and steps else missing("not known")
    return [
        run_cell(runs, index),
        text(device),
        size(run.highest("device_peak"), on_device or "trained on the CPU"),
        size(run.highest("peak_resident")),
        size(run.usage[-1].resident if run.usage else None),
        span(seconds),
        pace,
    ]


def _time(run: RunRecord) -> tuple[float | None, int]:
    """Seconds of all sessions and the steps made in them; None where one of them did not tell."""
    told = [session.seconds for session in run.sessions]
    known = [seconds for seconds in told if seconds is not None]
    if not known or len(known) != len(told):
        return None, 0
    return sum(known), max((each.step for each in run.usage), default=0) - run.sessions[0].step


def _planned(runs: Sequence[RunRecord]) -> list[Any]:
    """Of GradNormLoRP: its plan by parts, and its state as measured after the first step."""
    rows = []
    for index, run in enumerate(runs):
        for event in run.of("memory")[-1:]:
            parts = mapping(event.get("plan"))
            names = ("weights", "gradients", "moments", "projectors", "magnitudes", "temporaries")
            cells = [size(number(parts.get(name))) for name in names]
            sums = [size(number(event.get(name))) for name in ("peak", "planned", "state")]
            rows.append([run_cell(runs, index), *cells, *sums])
    if not rows:
        return []
    head = ["Run", "Weights", "Gradients", "Moments", "Projectors", "Magnitudes", "Temporaries", "Sum"]
    head += ["State, planned", "State, measured"]
    note = "Planned from the shapes of the model, activations apart; the state is moments, projectors and magnitudes, "
    note += "and was measured after the first step."
    return [Table(head, rows, "Planned by GradNormLoRP", note)]


def _kept(runs: Sequence[RunRecord]) -> list[Any]:
    rows = []
    for index, run in enumerate(runs):
        for event in run.of("buffer")[-1:]:
            found = [count(finite(event.get(name)), "not known") for name in ("rows", "seen")]
            rows.append([run_cell(runs, index), *found, size(finite(event.get("bytes")))])
    return [Table(["Run", "Rows kept", "of rows seen", "Bytes"], rows, "Buffers of old data")] if rows else []
