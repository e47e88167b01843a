"""`stages.json`: the life of a model, stage by stage, and what follows from it for the next one. Knows no Trainer.

The file lies in `hf_pretrain_ext/` of every checkpoint and, once a stage has ended, in its `output_dir`:

    {"format": 1, "stages": [...]}     from the first stage to the one that wrote the file; each is a `Stage`.
                                       `older_weights` besides, where it was written as training ended: size and hash
                                       of weight files that lay there already, by name

    number, name, kind        0 for a base whose training is not known; "unknown", "stage" or "anneal"
    begun_by                  "train" or "continue_from"
    base                      of "unknown": path, revision and what its config and card say
    parent                    checkpoint or model that the stage began with: path, step (null where that is not known)
    carry, anneal             what came along besides the weights; of "anneal": steps, shape, first and last rate
    steps, total_steps        optimizer steps made, and planned
    global_batch, seed        samples an optimizer step; seed of the data order
    samples, tokens           read in this stage, padding left out; null where not known
    schedule                  name, identity (its phases), rate of the next update, phase of the last update (`phase`)
                              and of the one that would follow (`next`, null at the end), `peak` and `const` rate
    optimizer, tokenizer      class name; fingerprint of the vocabulary
    sources                   what was read: see `SeenSource`
    plugins                   settings by plug-in
    recorded                  what plug-ins keep for later stages: forgetting: baseline, best and last loss by set
    versions, dates           of the libraries; `started`, `saved` (UTC)

`~` stands for the home folder. Keys that a reader does not know are left alone; those that are missing have their
defaults.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pretrain_ext.checkpoint import STAGES_NAME, STATE_FOLDER, CheckpointError, file_digest, write_json
from hf_pretrain_ext.home import with_home, without_home
from hf_pretrain_ext.schedules import LRPhase, LRSchedule
from hf_pretrain_ext.values import reason, shown

__all__ = [
    "STAGES_NAME",
    "Beginning",
    "LifeSource",
    "SeenSource",
    "Stage",
    "annealing",
    "check_name",
    "going_on",
    "is_ahead",
    "life_of",
    "of_state",
    "rate_line",
    "read_stages",
    "schedule_record",
    "stages_json",
    "write_stages",
]

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DECAYS = ("anneal", "decay")
_HOLDS = ("constant", "stable")
LOW = 0.1
"""A schedule of the host's own, of which only rates are known, counts as annealed at this share of its peak (ours)."""


@dataclass(frozen=True)
class SeenSource:
    """What a stage read of one source.

    `name` is the stage's own for its training data. `samples` and `tokens` are what was really read (None: not
    known; `tokens_exact` tells counts from estimates), `fingerprint` is that of [`~hf_pretrain_ext.data.fingerprint`],
    `hub` repository and revision, `place` the files it can be opened from again. `order` and `key` are those of the
    plan's [`Source`], with which the stage's seed says which rows were read (None: there was no plan).
    """

    name: str
    rows: int | None = None
    fingerprint: str | None = None
    replayed: bool = False
    samples: int | None = None
    tokens: int | float | None = None
    tokens_exact: bool = True
    loss_tokens: int | None = None
    hub: dict[str, str] | None = None
    place: dict[str, Any] | None = None
    order: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a model's life, as `stages.json` holds it; the fields are explained at the module's head."""

    number: int
    name: str
    kind: str = "stage"
    begun_by: str = "train"
    base: dict[str, Any] | None = None
    parent: dict[str, Any] | None = None
    carry: tuple[str, ...] = ()
    anneal: dict[str, Any] | None = None
    steps: int | None = None
    total_steps: int | None = None
    global_batch: int | None = None
    seed: int | None = None
    samples: int | None = None
    tokens: int | float | None = None
    schedule: dict[str, Any] | None = None
    optimizer: str | None = None
    tokenizer: str | None = None
    sources: tuple[SeenSource, ...] = ()
    plugins: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dates: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Stage:
        """Raises `ValueError` or `TypeError` for what is no stage."""
        values = {name: found[name] for name in _names(cls) if name in found}
        if not isinstance(values.get("number"), int) or not isinstance(values.get("name"), str):
            raise ValueError("a stage without a number or a name")
        if not all(isinstance(values.get(name) or {}, dict) for name in ("schedule", "parent", "base", "recorded")):
            raise TypeError(f"stage {values['name']!r} holds a part that is no object")
        sources = [{name: each[name] for name in _names(SeenSource) if name in each} for each in found["sources"]]
        values["sources"] = tuple(SeenSource(**each) for each in sources)
        values["carry"] = tuple(values.get("carry", ()))
        return cls(**values)

    # How it ended

    @property
    def rate(self) -> float | None:
        """The learning rate that its next update would have had."""
        rate = (self.schedule or {}).get("rate")
        return None if rate is None else float(rate)

    @property
    def peak(self) -> float | None:
        """The highest rate of the schedule that it ended in; of a stage that went on, of where that began."""
        peak = (self.schedule or {}).get("peak")
        return None if peak is None else float(peak)

    @property
    def phase(self) -> str | None:
        """The phase of its last update."""
        return (self.schedule or {}).get("phase")

    @property
    def constant_rate(self) -> float | None:
        """The rate that a next stage goes on at without re-warming: it ended in an infinite schedule's constant phase.

        An update on either side of the end is enough: a run may stop just where the phase begins or ends.
        """
        held = self.schedule or {}
        constant = "constant" in (held.get("phase"), held.get("next"))
        return self.rate if constant and str(held.get("name")).startswith("infinite") else None

    @property
    def annealed(self) -> bool:
        """Whether its learning rate had come down to its end."""
        held = self.schedule
        if held is None:
            return False
        low = self.rate is not None and bool(self.peak) and self.rate <= LOW * (self.peak or 0) * (1 + 1e-2)
        if held.get("identity") is None or held.get("phase") == "callable":
            return low
        return held.get("phase") in _DECAYS and (low or held.get("next") is None)

    @property
    def anneal_start(self) -> int | None:
        """The step at which its rate left a constant phase to come down for good; None if there was no such phase."""
        phases = ((self.schedule or {}).get("identity") or {}).get("phases", [])
        names = [phase["name"] for phase in phases]
        for number, name in enumerate(names):
            if name in _DECAYS and number and names[number - 1] in _HOLDS:
                return sum(int(phase["steps"]) for phase in phases[:number])
        return None


def _names(cls: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(cls)]


@dataclass(frozen=True)
class Beginning:
    """How a stage begins: after which others (`earlier`), as what, from where.

    `told` is whether `continue_from` or `anneal` began it: only then do plug-ins act on what came before.
    """

    earlier: tuple[Stage, ...] = ()
    kind: str = "stage"
    given_name: str | None = None
    parent: dict[str, Any] | None = None
    carry: tuple[str, ...] = ()
    anneal: dict[str, Any] | None = None
    told: bool = False

    @property
    def history(self) -> tuple[Stage, ...]:
        """The stages before this one, as far as it was told of them."""
        return self.earlier if self.told else ()

    @property
    def last(self) -> Stage | None:
        return self.history[-1] if self.history else None

    @property
    def number(self) -> int:
        return 1 + max((stage.number for stage in self.earlier), default=0)

    @property
    def name(self) -> str:
        """Of the stage, hence of its training data in later ones; no two stages of a life have the same."""
        if self.given_name is not None:
            return self.given_name
        taken = {stage.name for stage in self.earlier} | {s.name for stage in self.earlier for s in stage.sources}
        word = "anneal" if self.kind == "anneal" else "stage"
        number = self.number
        while f"{word}-{number}" in taken:
            number += 1
        return f"{word}-{number}"

    @property
    def schedule(self) -> LRSchedule | None:
        """The learning rate of an annealing branch."""
        return annealing(**self.anneal) if self.anneal else None

    def identity(self) -> dict[str, Any] | None:
        """What a resume must find as it was: None for a stage that nothing was told of."""
        if not self.told:
            return None
        earlier = [
            {"name": s.name, "kind": s.kind, "steps": s.steps, "tokens": s.tokens, "rate": s.rate}
            for s in self.earlier
        ]
        mine = {"name": self.name, "kind": self.kind, "carry": list(self.carry), "anneal": self.anneal}
        return {**mine, "earlier": earlier}

    def describe(self) -> str:
        """One line: what this stage is, and after what it comes."""
        origin = (self.parent or {}).get("path") or "the model as it is"
        carried = " and ".join(self.carry) or "history alone"
        line = f"stage {self.number} ({self.name}): {carried} of {origin}"
        last = self.last
        if last is None or last.kind == "unknown":
            return f"{line}, whose training is not known"
        steps = "" if last.steps is None else f" {last.steps:,} steps"
        tokens = "" if last.tokens is None else f", {last.tokens:,} tokens"
        return f"{line}, after{steps} of stage {last.number} ({last.name}){tokens}"

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> Beginning:
        """The beginning of the last of `stages`: what a resume in a new process goes by."""
        last = stages[-1]
        return cls(
            earlier=tuple(stages[:-1]),
            kind=last.kind,
            given_name=last.name,
            parent=last.parent,
            carry=last.carry,
            anneal=last.anneal,
            told=last.begun_by == "continue_from",
        )


# Files


def stages_json(stages: Iterable[Stage], older: Iterable[Path] = ()) -> dict[str, Any]:
    """What `stages.json` holds."""
    told = {path.name: file_digest(path) for path in older}
    content = {"format": _FORMAT, **({"older_weights": told} if told else {})}
    return without_home({**content, "stages": [stage.to_json() for stage in stages]})


def write_stages(folder: str | Path, stages: Iterable[Stage], older: Iterable[Path] = ()) -> None:
    """Writes `folder`/stages.json: afterwards there is the old file or the whole new one.

    `older` are files of weights that lie there, of before the last stage.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / STAGES_NAME, stages_json(stages, older))


def is_ahead(folder: str | Path, weights: Sequence[Path]) -> bool:
    """Whether `folder`/stages.json tells of training after which `weights`, beside it, were not saved."""
    path = Path(folder) / STAGES_NAME
    if not path.is_file():
        return False
    older = json.loads(path.read_text(encoding="utf-8")).get("older_weights") or {}
    return any(each.name in older and older[each.name] == file_digest(each) for each in weights)


def read_stages(folder: str | Path) -> tuple[Stage, ...] | None:
    """The stages that a checkpoint, or a folder of a model, tells of; None if it tells of none.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: the file is there and cannot be read.
    """
    for path in (Path(folder) / STATE_FOLDER / STAGES_NAME, Path(folder) / STAGES_NAME):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError(f"it has format {shown(found['format'])}; this version reads format {_FORMAT}")
            stages = tuple(Stage.from_json(with_home(each)) for each in found["stages"])
            if not stages:
                raise ValueError("it holds no stage")
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({reason(error, 300)}). It was altered, or written by a newer version: get it "
                "back, or remove it to go on without the history that it held"
            ) from error
        return stages
    return None


def of_state(state: Mapping[str, Any], name: str = "stage-1") -> Stage:
    """What the `state.json` of a checkpoint tells that is older than `stages.json`.

    Raises:
        `KeyError`, `TypeError` or `ValueError`: it is not one.
    """
    identity = state["identity"]
    planned = [each["name"] for each in (identity["plan"] or {"sources": []})["sources"]]
    replayed = {each["name"]: bool(each["replayed"]) for each in (identity["plan"] or {"sources": []})["sources"]}
    rows = {each["name"]: each["num_rows"] for each in (identity["plan"] or {"sources": []})["sources"]}
    sources = [
        SeenSource(
            name=name if source == "train" else source,
            rows=rows[source],
            fingerprint=identity["data"].get(source),
            replayed=replayed[source],
            samples=int(counts[0]),
            tokens=None if counts[2] else int(counts[1]),
            loss_tokens=None if counts[4] else int(counts[3]),
        )
        for source, counts in zip(planned, state["counts"], strict=True)
    ]
    found = identity["schedule"]
    schedule = LRSchedule.from_identity(found) if found else None
    tokens = [each.tokens for each in sources]
    return Stage(
        number=1,
        name=name,
        steps=int(state["step"]),
        total_steps=int(identity["total_steps"]),
        global_batch=int(identity["global_batch"]),
        samples=sum(each.samples or 0 for each in sources) if sources else None,
        tokens=None if None in tokens or not tokens else sum(t for t in tokens if t is not None),
        schedule=schedule_record(schedule, int(state["step"])) if schedule else None,
        sources=tuple(sources),
        plugins=dict(identity["plugins"]),
    )


# Learning rates


def schedule_record(
    schedule: LRSchedule | None, step: int, rate: float = 0.0, peak: float | None = None, host: str = ""
) -> dict[str, Any]:
    """How a schedule stood after `step` updates; for one of the host's own, its name, next rate and peak are given."""
    if schedule is None:
        return {
            "name": f"host: {host}",
            "identity": None,
            "rate": rate,
            "phase": None,
            "next": None,
            "peak": peak,
            "const": None,
        }
    held = [phase.first for phase in schedule.phases if phase.name == "constant"]
    return {
        "name": schedule.name,
        "identity": schedule.identity(),
        "rate": schedule(step),
        "phase": _phase_at(schedule, max(step - 1, 0)),
        "next": None if step >= schedule.total_steps else _phase_at(schedule, step),
        "peak": max(max(phase.first, phase.last) for phase in schedule.phases) if peak is None else peak,
        "const": held[-1] if held else None,
    }


def _phase_at(schedule: LRSchedule, step: int) -> str:
    for phase in schedule.phases:
        if step < phase.steps:
            return phase.name
        step -= phase.steps
    return schedule.phases[-1].name


def going_on(name: str, rate: float, total_steps: int) -> LRSchedule:
    """A stage at the constant rate that the last one ended with: no warm-up, no cool-down, no anneal.

    Example:

    >>> going_on("infinite_cosine", 1.65e-4, 100)(57)
    0.000165
    """
    return LRSchedule(name, (LRPhase("constant", total_steps, "constant", rate, rate),))


def annealing(steps: int, shape: str, first: float, last: float) -> LRSchedule:
    """A branch that takes the rate from `first` to `last` in `steps` steps.

    Example:

    >>> schedule = annealing(10, "exponential", 1e-3, 1e-5)
    >>> schedule(0), round(schedule(5), 7), schedule(10)
    (0.001, 0.0001, 1e-05)
    """
    return LRSchedule("anneal", (LRPhase("anneal", steps, shape, first, last),))


def rate_line(began: Beginning, schedule: LRSchedule | None, host_rate: float, host: str) -> str:
    """One line on how the learning rate of a stage goes on from that of the stage before."""
    last = began.last
    if began.anneal is not None:
        return "rate: {first:.4g} → {last:.4g} in {steps:,} steps ({shape}): a branch to deploy".format(**began.anneal)
    if last is None or last.rate is None:
        before = "how the base's learning rate ended is not known"
    else:
        phase = f" ({last.phase})" if last.phase else ""
        before = f"the stage before ended at {last.rate:.4g}{phase}"
    if schedule is None:
        return f"rate: {before}; this one begins with learning_rate={host_rate:.4g} of the arguments ({host})"
    if last is not None and last.constant_rate is not None and [p.name for p in schedule.phases] == ["constant"]:
        return f"rate: goes on at {schedule(0):.4g}, where the stage before ended: no re-warming"
    top = max(max(phase.first, phase.last) for phase in schedule.phases)
    return f"rate: {before}; this one goes from {schedule(0):.4g} to a peak of {top:.4g}"


# Sources over a life


@dataclass(frozen=True)
class LifeSource:
    """What a model's life has read of one source: `samples` and `tokens` are sums over stages (None: not known).

    `visits` holds order, key, seed and draws for each stage that read it, replays of its rows apart (None: not known).
    `kept` holds the replay buffers to which stages that read it added its rows: folder, name of the run there, first
    number and the one after the last.
    """

    name: str
    rows: int | None
    fingerprint: str | None
    place: dict[str, Any] | None
    hub: dict[str, str] | None
    samples: int | None
    tokens: int | float | None
    stages: tuple[str, ...]
    visits: tuple[tuple[str, str, int, int], ...] | None = None
    kept: tuple[tuple[str, str, int, int], ...] = ()


def life_of(stages: Sequence[Stage]) -> dict[str, LifeSource]:
    """What earlier stages read, by name and in order of their first visit: the same source under two names is one.

    Replayed by `ReplayCallback(from_history=True)`, a source keeps the name that it has here, whatever rows stood in
    for it; others are the same if their fingerprints are. The tokens of each are the shares that Ibrahim et al.
    (2024) replay it in.

    Example:

    >>> pile = Stage(1, "pile", sources=(SeenSource("pile", tokens=300, samples=300),))
    >>> slim = Stage(2, "slim", sources=(SeenSource("slim", tokens=95, samples=95),
    ...     SeenSource("pile", tokens=5, samples=5)), recorded={"replay": {"from_history": ["pile"]}})
    >>> {name: source.tokens for name, source in life_of([pile, slim]).items()}
    {'pile': 305, 'slim': 95}
    """
    found: dict[str, LifeSource] = {}
    for stage in stages:
        known = (stage.recorded.get("replay") or {}).get("from_history") or ()
        for source in stage.sources:
            if source.samples == 0:
                continue
            again = source.name in known
            name = _known_name(found, source, stage, again)
            before, visit, kept = found.get(name), _visit(source, stage), _kept(source, stage)
            if before is None:
                where = (source.rows, source.fingerprint, source.place, source.hub)
                found[name] = LifeSource(name, *where, source.samples, source.tokens, (stage.name,), visit, kept)
                continue
            found[name] = dataclasses.replace(
                before,
                samples=_sum(before.samples, source.samples),
                tokens=_sum(before.tokens, source.tokens),
                # The newest place of the same rows: an older one may be gone.
                place=(source.place if source.fingerprint == before.fingerprint else None) or before.place,
                stages=(*before.stages, stage.name),
                visits=before.visits if again else _sum(before.visits, visit),
                kept=(*before.kept, *kept),
            )
    return found


def _visit(source: SeenSource, stage: Stage) -> tuple[tuple[str, str, int, int], ...] | None:
    if None in (source.order, source.key, source.samples, stage.seed) or source.rows is None:
        return None
    return ((str(source.order), str(source.key), int(stage.seed or 0), int(source.samples or 0)),)


def _kept(source: SeenSource, stage: Stage) -> tuple[tuple[str, str, int, int], ...]:
    """Rows that a stage replays are not added to its buffer again; those with metadata in them are not replayed."""
    buffer = stage.recorded.get("buffer") or {}
    alone = sum(not each.replayed for each in stage.sources) == 1
    if source.replayed or not alone or not buffer.get("run") or "metadata" in stage.plugins:
        return ()
    if stage.steps is None or stage.global_batch is None:
        return ()
    start = int(buffer["start"])
    return ((str(buffer["folder"]), str(buffer["run"]), start, start + stage.steps * stage.global_batch),)


def _known_name(found: Mapping[str, LifeSource], source: SeenSource, stage: Stage, replayed: bool) -> str:
    if replayed and source.name in found:
        return source.name
    for name, other in found.items():
        if source.fingerprint is not None and source.fingerprint == other.fingerprint:
            return name
    if source.name not in found:
        return source.name
    if source.fingerprint is None and found[source.name].fingerprint is None:
        # Streams have no fingerprint: their names are all there is.
        return source.name
    return f"{source.name}-{stage.name}"


def _sum(first: Any, second: Any) -> Any:
    return None if first is None or second is None else first + second


def check_name(name: Any, earlier: Sequence[Stage]) -> None:
    """Raises `ValueError` where a stage cannot be called `name` after the stages `earlier`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must hold letters, digits, '_', '.' and '-', such as 'german', got {shown(name)}")
    taken = dict.fromkeys([*(stage.name for stage in earlier), *life_of(earlier), "train"])
    if name in taken:
        raise ValueError(
            f"name={name!r} is taken: earlier stages and their data are called {list(taken)}. Choose another"
        )
