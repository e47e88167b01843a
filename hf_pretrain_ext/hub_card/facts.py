"""What a run recorded, as a card shows it; what was not recorded is None or empty, never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pretrain_ext.checkpoint import STATE_FOLDER
from hf_pretrain_ext.forgetting import summarise
from hf_pretrain_ext.hub_card.asking import licence_text
from hf_pretrain_ext.report.reading import Benchmark, RunRecord, finite, mapping, number
from hf_pretrain_ext.stages import STAGES_NAME, Stage, read_stages
from hf_pretrain_ext.trace import TRACE_NAME, read_trace, scrubbed
from hf_pretrain_ext.values import shown

__all__ = ["CardFacts", "SourceFacts", "read_facts"]


@dataclass(frozen=True)
class SourceFacts:
    """A source of one stage. `samples` and `tokens` are what was read; None where that is not known."""

    stage: str
    name: str
    repository: str | None
    revision: str | None
    rows: int | None
    samples: int | None
    tokens: float | None
    tokens_exact: bool
    replayed: bool


@dataclass(frozen=True)
class CardFacts:
    """All that a card says of the training."""

    base_model: str | None
    relation: str
    stages: tuple[Stage, ...]
    sources: tuple[SourceFacts, ...]
    plugins: dict[str, Any]
    steps: int
    total_steps: int | None
    global_batch: int | None
    seed: int | None
    rates: tuple[float, float, float] | None
    """First, highest and last learning rate that were logged."""
    forgetting: dict[str, dict[str, Any]]
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
    folder = Path(folder)
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
    known = next((stage.base for stage in stages if stage.base), None) or {}
    counts = mapping(record.end.get("counts")) if record is not None and record.end else {}
    return CardFacts(
        base_model=base_model or _on_the_hub(known.get("path")),
        relation="adapter" if adapter else "finetune",
        stages=stages,
        sources=_sources(stages),
        plugins=dict(record.plugins) if record is not None else dict(last.plugins if last else {}),
        steps=record.last_step if record is not None else (last.steps or 0 if last else 0),
        total_steps=record.total_steps if record is not None else (last.total_steps if last else None),
        global_batch=_whole(record.identity.get("global_batch")) if record is not None else None,
        seed=last.seed if last else None,
        rates=_rates(record),
        forgetting=_forgetting(record),
        benchmarks=tuple(record.benchmarks) if record is not None else (),
        tokens=_total(counts),
        seconds=_seconds(record),
        memory=_memory(record),
        peaks=_peaks(record),
        base_licence=licence_text(mapping(known.get("card")).get("license")),
        versions={str(k): str(v) for k, v in mapping(record.start.get("versions")).items()} if record else {},
        arguments=dict(record.arguments) if record is not None else {},
        command=scrubbed(str(record.start["command"])) if record is not None and record.start.get("command") else None,
        description=[str(line) for line in record.start.get("describe", [])] if record is not None else [],
        record=record,
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _on_the_hub(path: Any) -> str | None:
    """A name on the Hub; paths of the machine that trained are nobody's business."""
    if isinstance(path, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not Path(path).exists():
        return path
    return None


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
        )
        for stage in stages
        for source in stage.sources
    )


def _rates(record: RunRecord | None) -> tuple[float, float, float] | None:
    rates = [rate for _, rate in record.scalars("learning_rate")] if record is not None else []
    return (rates[0], max(rates), rates[-1]) if rates else None


def _forgetting(record: RunRecord | None) -> dict[str, dict[str, Any]]:
    """The figures of each held-out set; of one that was not measured from step 0 on, none."""
    found = {}
    for name, points in (record.probes if record is not None else {}).items():
        if points and points[0][0] == 0 and all(finite(loss) is not None for _, loss in points):
            found[name] = summarise([step for step, _ in points], [loss for _, loss in points])
    return found


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
    return {key: events[-1].get(key) for key in ("state", "planned", "peak")} if events else {}
