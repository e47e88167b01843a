"""What a run recorded, as a card shows it; what was not recorded is None or empty, never guessed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pretrain_ext.checkpoint import STATE_FOLDER
from hf_pretrain_ext.forgetting import summarise
from hf_pretrain_ext.hub_card.asking import licence_text
from hf_pretrain_ext.report.reading import Benchmark, RunRecord, finite, mapping, number, sequence
from hf_pretrain_ext.sources import is_of_the_hub
from hf_pretrain_ext.stages import STAGES_NAME, Stage, read_stages
from hf_pretrain_ext.trace import TRACE_NAME, read_trace, scrubbed
from hf_pretrain_ext.values import shown

__all__ = ["CardFacts", "SourceFacts", "Use", "read_facts"]


@dataclass(frozen=True)
class SourceFacts:
    """A source of one stage. `samples` and `tokens` are what was read; None where that is not known.

    `elsewhere`: its rows lie in files that are known, and not of the Hub.
    """

    stage: str
    name: str
    repository: str | None
    revision: str | None
    rows: int | None
    samples: int | None
    tokens: float | None
    tokens_exact: bool
    replayed: bool
    elsewhere: bool = False


ASIDE = ("reptile", "rewarm")
"""Plug-ins that stand aside in an annealing branch."""


@dataclass(frozen=True)
class Use:
    """A plug-in with its settings, and the stages that it was used in with them."""

    plugin: str
    settings: dict[str, Any]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class CardFacts:
    """All that a card says of the training."""

    base_model: str | None
    base_revision: str | None
    """Commit of `base_model`."""
    local_base: str | None
    """Folder that training began with, where that was no model of the Hub."""
    relation: str
    stages: tuple[Stage, ...]
    sources: tuple[SourceFacts, ...]
    uses: tuple[Use, ...]
    """Of plug-ins over all stages, the last stage's first."""
    steps: int
    """Of the last stage, up to the weights that are published."""
    reached: int | None
    """The step that training had gone on to when the best checkpoint was loaded; None where none was."""
    total_steps: int | None
    global_batch: int | None
    seed: int | None
    rates: tuple[float, float, float] | None
    """First, highest and last learning rate that were logged."""
    forgetting: dict[str, dict[str, Any]]
    not_finite: tuple[str, ...]
    """Held-out sets of which a loss was not finite."""
    benchmarks: tuple[Benchmark, ...]
    tokens: int | None
    seconds: float | None
    memory: dict[str, Any]
    peaks: dict[str, float]
    """Bytes at the highest, where they were recorded: `resident` of the first process, `device`."""
    base_licence: str | None
    """As the card of the base says."""
    versions: dict[str, str]
    arguments: dict[str, Any]
    command: str | None
    description: list[str]
    record: RunRecord | None = field(repr=False, default=None)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def plugins(self) -> list[str]:
        """Their names, over all stages."""
        return list(dict.fromkeys(use.plugin for use in self.uses))

    @property
    def trained(self) -> list[Stage]:
        """The stages whose training is known."""
        return [stage for stage in self.stages if stage.kind != "unknown"]

    @property
    def datasets(self) -> list[str]:
        """Repositories of the Hub that were trained on, in the order of their first use."""
        return list(dict.fromkeys(source.repository for source in self.sources if source.repository))


def read_facts(folder: str | Path, *, adapter: bool | None = None, base_model: str | None = None) -> CardFacts:
    """
    What the run in `folder` recorded.

    Args:
        folder (`str` or `Path`): of a run (`output_dir`), or of one of its checkpoints, whose run lies beside it.
        adapter (`bool`, *optional*): whether what is published is an adapter; by default, whether the folder holds
            one.
        base_model (`str`, *optional*): what training began with, by its name on the Hub; by default, as the run's
            first stage recorded it.

    Raises:
        `FileNotFoundError`: the folder holds neither trace nor stages.
        `ValueError`: either cannot be read.
    """
    folder = Path(folder).absolute()
    run = next((place for place in (folder, folder.parent) if (place / TRACE_NAME).is_file()), None)
    held = [folder / STAGES_NAME, folder / STATE_FOLDER / STAGES_NAME]
    place = next((path.parent for path in held if path.is_file()), None)
    if run is None and place is None:
        raise FileNotFoundError(
            f"{shown(str(folder))} holds neither {TRACE_NAME} nor {STAGES_NAME}: no run of a Trainer with plug-ins "
            "ended there. Pass its output_dir, or one of its checkpoints"
        )
    record = RunRecord(folder.name, str(folder), read_trace(run)) if run is not None else None
    stages = (read_stages(place) or ()) if place is not None else ()
    if adapter is None:
        adapter = (folder / "adapter_config.json").is_file()
    last = stages[-1] if stages else None
    reached = None
    if record is not None and run is not None and (step := _step_of_weights(record, run, folder, last)) is not None:
        reached = record.last_step if run == folder else None
        record = _until(record, step, best=reached is not None)
    known = next((stage.base for stage in stages if stage.base), None) or {}
    recorded = _on_the_hub(known)
    return CardFacts(
        base_model=base_model or recorded,
        base_revision=known.get("revision") if recorded and base_model in (None, recorded) else None,
        local_base=known["path"] if known.get("local") else None,
        relation="adapter" if adapter else "finetune",
        stages=stages,
        sources=_sources(stages),
        uses=_uses(record, stages),
        steps=record.last_step if record is not None else (last.steps or 0 if last else 0),
        reached=reached,
        total_steps=record.total_steps if record is not None else (last.total_steps if last else None),
        global_batch=_whole(record.identity.get("global_batch")) if record is not None else None,
        seed=last.seed if last else None,
        rates=_rates(record),
        forgetting=_forgetting(record, last),
        not_finite=_not_finite(record),
        benchmarks=tuple(record.benchmarks) if record is not None else (),
        tokens=_tokens(record, last),
        seconds=_seconds(record),
        memory=_memory(record),
        peaks=_peaks(record),
        base_licence=licence_text(mapping(known.get("card")).get("license")),
        versions={str(k): str(v) for k, v in mapping(record.start.get("versions")).items()} if record else {},
        arguments=dict(record.arguments) if record is not None else {},
        command=scrubbed(str(record.start["command"])) if record is not None and record.start.get("command") else None,
        description=[str(line) for line in sequence(record.start.get("describe"))] if record is not None else [],
        record=record,
    )


def _step_of_weights(record: RunRecord, run: Path, folder: Path, last: Stage | None) -> int | None:
    """The step that the weights in `folder` are of, where the run went on after it; None where it did not."""
    if run != folder and (found := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
        return int(found[1])
    # Beside the best weights, loaded at the end, lie the stages of their checkpoint. Before the end, those in the
    # run's own folder may be of an earlier run.
    over = run != folder or record.end is not None
    steps = last.steps if last is not None and over else None
    return steps if steps is not None and steps < record.last_step else None


def _until(record: RunRecord, step: int, best: bool) -> RunRecord:
    """What the trace says up to `step`; benchmarks after training are of the `best` weights, loaded before them."""
    events = [
        event
        for event in record.events
        if (best if event["event"] == "benchmarks" and event.get("when") == "after" else event["step"] <= step)
        and event["event"] not in ("end", "forgetting")
    ]
    # Steps are counted by events: those of benchmarks come last.
    return RunRecord(record.label, record.folder, [{**each, "step": min(each["step"], step)} for each in events])


def _uses(record: RunRecord | None, stages: tuple[Stage, ...]) -> tuple[Use, ...]:
    last = stages[-1] if stages else None
    told = [(stage.name, stage.kind, stage.plugins) for stage in stages[:-1]]
    latest = (record.plugins if record else {}) or (last.plugins if last else {})
    told.append((last.name if last else "", last.kind if last else "", latest))
    found: dict[tuple[str, str], Use] = {}
    for stage, kind, plugins in reversed(told):
        for name, settings in plugins.items():
            if kind == "anneal" and name in ASIDE:
                continue
            key = (name, json.dumps(settings, sort_keys=True, default=str))
            before = found[key].stages if key in found else ()
            found[key] = Use(name, mapping(settings), (stage, *before))
    return tuple(found.values())


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _on_the_hub(base: dict[str, Any]) -> str | None:
    """A name on the Hub; paths of the machine that trained are nobody's business."""
    path, local = base.get("path"), base.get("local")
    if local is None and isinstance(path, str):
        local = Path(path).exists()  # older records do not say
    return path if not local and isinstance(path, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else None


def _sources(stages: tuple[Stage, ...]) -> tuple[SourceFacts, ...]:
    return tuple(
        SourceFacts(
            stage=stage.name,
            name=source.name,
            repository=(source.hub or {}).get("path"),
            revision=(source.hub or {}).get("revision"),
            rows=source.rows,
            samples=source.samples,
            tokens=source.tokens,
            tokens_exact=source.tokens_exact,
            replayed=source.replayed,
            elsewhere=source.place is not None and not any(is_of_the_hub(file) for file in source.place["files"]),
        )
        for stage in stages
        for source in stage.sources
    )


def _rates(record: RunRecord | None) -> tuple[float, float, float] | None:
    rates = [rate for _, rate in record.scalars("learning_rate")] if record is not None else []
    return (rates[0], max(rates), rates[-1]) if rates else None


def _forgetting(record: RunRecord | None, last: Stage | None) -> dict[str, dict[str, Any]]:
    """The figures of each held-out set: from the probes since step 0, else those that the stage recorded of it."""
    found: dict[str, dict[str, Any]] = {}
    for name, points in (record.probes if record is not None else {}).items():
        if points and points[0][0] == 0 and all(finite(loss) is not None for _, loss in points):
            found[name] = summarise([step for step, _ in points], [loss for _, loss in points])
    for name, entry in mapping(last.recorded.get("forgetting") if last else None).items():
        first, best, final = (finite(mapping(entry).get(key)) for key in ("baseline", "best", "last"))
        if name in found or first is None or best is None or final is None:
            continue
        found[name] = {
            "initial": first,
            "final": final,
            "final_step": entry.get("last_step"),
            "gain": first - final,
            "forgetting": final - best,
            "gap_depth": None,
        }
    return found


def _not_finite(record: RunRecord | None) -> tuple[str, ...]:
    probes = record.probes if record is not None else {}
    return tuple(name for name, points in probes.items() if any(finite(loss) is None for _, loss in points))


def _tokens(record: RunRecord | None, last: Stage | None) -> int | None:
    if record is None:
        return None
    if record.end:
        return _total(mapping(record.end.get("counts")))
    counted = last is not None and last.steps == record.last_step and all(each.tokens_exact for each in last.sources)
    return _whole(last.tokens) if last is not None and counted else None


def _total(counts: dict[str, Any]) -> int | None:
    tokens = [_whole(mapping(entry).get("tokens")) for entry in counts.values()]
    return sum(each for each in tokens if each) if tokens and None not in tokens else None


def _seconds(record: RunRecord | None) -> float | None:
    """Of a run that was not resumed: the host's time is of its last call alone."""
    if record is None or record.of("resume"):
        return None
    found = [number(mapping(event.get("scalars")).get("train_runtime")) for event in record.of("log")]
    return next((value for value in reversed(found) if value), None)


def _peaks(record: RunRecord | None) -> dict[str, float]:
    named = {"resident": "peak_resident", "device": "device_peak"}
    found = {name: record.highest(key) for name, key in named.items()} if record is not None else {}
    return {name: value for name, value in found.items() if value is not None}


def _memory(record: RunRecord | None) -> dict[str, Any]:
    events = record.of("memory") if record is not None else []
    found = {key: finite(events[-1].get(key)) for key in ("state", "planned")} if events else {}
    return found if None not in found.values() else {}
