"""What the trace of one run says, read with tolerance: whatever is absent or of another form is None or empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from hf_pretrain_ext.schedules import LRSchedule

__all__ = ["Benchmark", "Count", "RunRecord", "Session", "Usage", "finite", "mapping", "number", "sequence", "whole"]

POINTS = 400
"""Steps at which a schedule is drawn that the trace holds only as phases."""


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list | tuple) else []  # type: ignore[return-value]


def number(value: Any) -> float | None:
    """A number of a trace, where those that are not finite are text; None for anything else.

    Example:

    >>> number(2), number("inf"), number("two"), number(True)
    (2.0, inf, None, None)
    """
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def finite(value: Any) -> float | None:
    """A number that can be drawn."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Count:
    """What a run had seen of one source: samples, tokens read, tokens that bear loss (None: not known)."""

    samples: int
    tokens: int | None
    loss_tokens: int | None
    replayed: bool


@dataclass(frozen=True)
class Usage:
    """What a run held at a log: bytes (None: not known), and seconds since its session began."""

    step: int
    resident: float | None
    peak_resident: float | None
    device_peak: float | None
    seconds: float | None


@dataclass(frozen=True)
class Benchmark:
    """One metric of a task, before the stage and after it: value and standard error, None where not measured."""

    task: str
    metric: str
    before: tuple[float, float | None] | None
    after: tuple[float, float | None] | None
    higher_is_better: bool | None
    samples: int | None
    shots: int | None


def _with_error(figure: dict[str, Any]) -> tuple[float, float | None] | None:
    value = finite(figure.get("value"))
    return None if value is None else (value, finite(figure.get("stderr")))


@dataclass(frozen=True)
class Session:
    """One call of `train()`: the step and the time it began at, where, and how it went on as far as that counts."""

    step: int
    time: str | None
    machine: dict[str, Any]
    ranks: int | None
    command: str | None
    notes: list[str]
    last_step: int
    seconds: float | None
    ended: str


@dataclass(frozen=True)
class RunRecord:
    """One run of a report: its label, where its trace lies and the events that `read_trace` gave.

    `live`: whether the page follows it, so that a run without an end is taken to go on.
    """

    label: str
    folder: str
    events: list[dict[str, Any]]
    live: bool = False

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == name]

    @cached_property
    def start(self) -> dict[str, Any]:
        return next(iter(self.of("start")), {})

    @cached_property
    def end(self) -> dict[str, Any] | None:
        return next(reversed(self.of("end")), None)

    @cached_property
    def last_step(self) -> int:
        return max((event["step"] for event in self.events), default=0)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return mapping(self.start.get("identity"))

    @cached_property
    def plugins(self) -> dict[str, Any]:
        return mapping(self.start.get("plugins")) or mapping(self.identity.get("plugins"))

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return mapping(self.identity.get("arguments"))

    @property
    def has_preview(self) -> bool:
        return isinstance(self.start.get("preview"), dict)

    @cached_property
    def preview(self) -> dict[str, Any]:
        """The plan as the trace shows it; for older traces, made from the identity of the run."""
        return self.start["preview"] if self.has_preview else _derived_preview(self.identity)

    @cached_property
    def total_steps(self) -> int | None:
        return whole(self.preview.get("total_steps")) or whole(self.identity.get("total_steps")) or None

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """The planned sources that have a name."""
        return [mapping(s) for s in sequence(self.preview.get("sources")) if "name" in mapping(s)]

    def scalars(self, key: str) -> list[tuple[int, float]]:
        """The logged values of `key` by rising step; of two at one step, the later."""
        found = ((event["step"], number(mapping(event.get("scalars")).get(key))) for event in self.of("log"))
        return _by_step(found)

    @cached_property
    def probes(self) -> dict[str, list[tuple[int, float]]]:
        """Held-out losses by set."""
        events = self.of("probe")
        keys = dict.fromkeys(key for event in events for key in mapping(event.get("losses")))
        names = {key: key.removeprefix("eval_").removesuffix("_loss") for key in keys if _is_loss(key)}
        series = {
            name: _by_step((event["step"], number(mapping(event.get("losses")).get(key))) for event in events)
            for key, name in names.items()
        }
        return {name: points for name, points in series.items() if points}

    @cached_property
    def eval_losses(self) -> dict[str, list[tuple[int, float]]]:
        """Losses of the host's own evaluations, by their logged names; those of the probes are left out."""
        keys = dict.fromkeys(key for event in self.of("log") for key in mapping(event.get("scalars")))
        ours = {f"eval_{name}_loss" for name in self.probes}
        found = {key: self.scalars(key) for key in keys if _is_loss(key) and key not in ours}
        return {key: points for key, points in found.items() if points}

    @cached_property
    def usage(self) -> list[Usage]:
        """Memory and time at each log of a training loss, by rising step."""
        names = ("resident", "peak_resident", "device_peak", "seconds")
        return [Usage(event["step"], *(finite(event.get(name)) for name in names)) for event in self.of("usage")]

    def highest(self, name: str) -> float | None:
        """The most of one of the fields of `Usage` that is known."""
        return max((value for each in self.usage if (value := getattr(each, name)) is not None), default=None)

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """Each metric of each task, the last measurement of each kind, the first where both asked the same."""
        events = {str(event.get("when")): event for event in self.of("benchmarks")}
        before, after = events.get("before", {}), events.get("after", {})
        if before and after and before.get("asked") != after.get("asked"):
            before = {}
        sides = [mapping(event.get("found")) for event in (before, after)]
        shots = whole(mapping((after or before).get("asked")).get("num_fewshot"))
        found = []
        for task, metric in dict.fromkeys((t, m) for side in sides for t in side for m in mapping(side[t])):
            figures = [mapping(mapping(side.get(task)).get(metric)) for side in sides]
            last = figures[1] or figures[0]
            better = last.get("higher_is_better")
            found.append(
                Benchmark(
                    task=str(task),
                    metric=str(metric),
                    before=_with_error(figures[0]),
                    after=_with_error(figures[1]),
                    higher_is_better=better if isinstance(better, bool) else None,
                    samples=whole(last.get("samples")),
                    shots=shots,
                )
            )
        return [each for each in found if each.before or each.after]

    @cached_property
    def sessions(self) -> list[Session]:
        """The calls of `train()` that made the run; of one that was resumed from, what a checkpoint kept."""
        opened = [k for k, event in enumerate(self.events) if event["event"] == "session"]
        found = []
        for at, stop in pairwise([*opened, len(self.events)]):
            event, within = self.events[at], self.events[at:stop]
            told = [finite(each.get("seconds")) for each in within if each["event"] == "usage"]
            found.append(
                Session(
                    step=event["step"],
                    time=str(event["time"]) if event.get("time") else None,
                    machine=mapping(event.get("machine")),
                    ranks=whole(event.get("ranks")),
                    command=str(event["command"]) if event.get("command") else None,
                    notes=[str(note) for note in sequence(event.get("notes"))],
                    last_step=max(each["step"] for each in within),
                    seconds=max((each for each in told if each is not None), default=None),
                    ended=self._ended(within, stop == len(self.events)),
                )
            )
        return found

    def _ended(self, within: list[dict[str, Any]], last: bool) -> str:
        broken = next((each for each in reversed(within) if each["event"] in ("interrupted", "resume")), None)
        if broken is not None and broken.get("interrupted" if broken["event"] == "resume" else "error"):
            return f"interrupted: {broken.get('interrupted') or broken.get('error')}"
        if any(each["event"] == "end" for each in within):
            return "training ended"
        if last:
            return "no end so far" if self.live else "no end in the trace"
        return "killed, without a trace of why"

    @cached_property
    def counts(self) -> list[tuple[int, dict[str, Count]]]:
        """What had been seen of each source, at each log and at the end."""
        found = {
            event["step"]: counts
            for event in self.events
            if event["event"] in ("log", "end") and (counts := _counts(event.get("counts")))
        }
        return sorted(found.items())

    def planned_rate(self) -> Callable[[float], float] | None:
        """The planned learning rate as a function of the step; None with the host's own schedule."""
        schedule = mapping(self.identity.get("schedule"))
        # A function of the user's is kept as points only; the preview has more of them.
        if schedule and schedule.get("name") != "callable":
            try:
                built = LRSchedule.from_identity(schedule)
                built(0), built(built.total_steps)
                return lambda step: built(int(step))
            except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
                pass  # written by another version
        points = rate_points(self.preview)
        return _interpolated(points) if points else None

    @property
    def rate_deviation(self) -> tuple[float, int] | None:
        """The largest difference between a logged and the planned rate, and the logged step where it is.

        A log at step n holds the rate that step n was made with: the plan's at n − 1.
        """
        planned = self.planned_rate()
        if planned is None:
            return None
        differences = [(abs(rate - planned(step - 1)), step) for step, rate in self.scalars("learning_rate") if step]
        return max(differences, key=lambda pair: (pair[0], -pair[1]), default=None)


def rate_points(preview: dict[str, Any]) -> list[tuple[float, float]]:
    """The planned learning rates of a preview as (step, rate); empty with the host's own schedule."""
    rates = mapping(preview.get("learning_rate"))
    pairs = zip(sequence(rates.get("steps")), sequence(rates.get("rates")), strict=False)
    found = [(finite(step), finite(rate)) for step, rate in pairs]
    return [(s, r) for s, r in found if s is not None and r is not None]


def _is_loss(key: str) -> bool:
    return key == "eval_loss" or (key.startswith("eval_") and key.endswith("_loss"))


def _by_step(found: Iterator[tuple[int, float | None]] | Any) -> list[tuple[int, float]]:
    return sorted({step: value for step, value in found if value is not None}.items())


def _counts(value: Any) -> dict[str, Count]:
    counts = {}
    for name, entry in mapping(value).items():
        entry = mapping(entry)
        samples = whole(entry.get("samples"))
        if samples is None:
            continue
        tokens, bearing = whole(entry.get("tokens")), whole(entry.get("loss_tokens"))
        if "loss_tokens" not in entry:
            # Older traces counted only tokens that bear loss, and called them tokens.
            tokens, bearing = None, tokens
        counts[name] = Count(samples, tokens, bearing, bool(entry.get("replayed")))
    return counts


def _interpolated(points: list[tuple[float, float]]) -> Callable[[float], float]:
    points = sorted(points)

    def rate(step: float) -> float:
        step = min(max(step, points[0][0]), points[-1][0])
        for (left, low), (right, high) in pairwise(points):
            if left <= step <= right and right > left:
                return low + (high - low) * (step - left) / (right - left)
        return points[-1][1]

    return rate


def _derived_preview(identity: dict[str, Any]) -> dict[str, Any]:
    total, batch = whole(identity.get("total_steps")) or 0, whole(identity.get("global_batch")) or 0
    plan = mapping(identity.get("plan"))
    segments = _segments(plan, total * batch)
    return {
        "total_steps": total,
        "global_batch": batch,
        "learning_rate": _derived_rates(mapping(identity.get("schedule")), total),
        "sources": _derived_sources(plan, segments),
        "mixture": [
            {"step": start // batch, "shares": shares, "unit": plan.get("unit") or "samples"}
            for start, _, shares in segments
        ],
        "phases": [
            {"name": phase.get("name"), "start": (phase.get("start") or 0) / batch, "stop": stop / batch}
            for phase in map(mapping, sequence(plan.get("phases")))
            if batch and (stop := phase.get("stop") or total * batch)
        ],
        "marks": {},
        "tokens": None,
    }


def _segments(plan: dict[str, Any], samples: int) -> list[tuple[int, int, dict[str, float]]]:
    """First sample, first sample after and shares of each part of the plan with one mixture."""
    names = [str(mapping(source).get("name")) for source in sequence(plan.get("sources"))]
    found = [(whole(s.get("start")), sequence(s.get("weights"))) for s in map(mapping, sequence(plan.get("segments")))]
    kept = [(start, weights) for start, weights in found if start is not None and start < samples]
    segments = []
    for (start, weights), (stop, _) in pairwise([*kept, (samples, [])]):
        numbers = [finite(weight) or 0.0 for weight in weights]
        if total := sum(numbers):
            segments.append((start, stop, {n: w / total for n, w in zip(names, numbers, strict=False)}))
    return segments


def _derived_sources(plan: dict[str, Any], segments: list[tuple[int, int, dict[str, float]]]) -> list[dict[str, Any]]:
    sources = []
    for source in map(mapping, sequence(plan.get("sources"))):
        name, rows = str(source.get("name")), whole(source.get("num_rows"))
        samples: int | None = round(sum((stop - start) * shares.get(name, 0.0) for start, stop, shares in segments))
        if plan.get("unit") == "tokens":
            samples = None
        known = {"name": name, "rows": rows, "order": source.get("order"), "replayed": source.get("replayed")}
        sources.append(
            {
                **known,
                "samples": samples,
                "tokens": None,
                "passes": samples / rows if rows and samples is not None else None,
            }
        )
    return sources


def _derived_rates(identity: dict[str, Any], total: int) -> dict[str, Any] | None:
    if not identity:
        return None
    try:
        schedule = LRSchedule.from_identity(identity)
        phases: list[dict[str, Any]] = []
        start = 0
        for phase in schedule.phases:
            phases.append({"name": phase.name, "start": start, "stop": start + phase.steps})
            start += phase.steps
        edges = {step for phase in phases for step in (phase["start"], phase["stop"]) if step <= total}
        steps = sorted(edges | {round(total * k / POINTS) for k in range(POINTS + 1)})
        return {"steps": steps, "rates": [schedule(step) for step in steps], "phases": phases}
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
