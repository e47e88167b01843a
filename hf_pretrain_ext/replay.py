"""Replay: a fixed share of what is read comes from old data. Pure functions over the sample plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from hf_pretrain_ext.plan import MAX_WEIGHT, SamplePlan, Source
from hf_pretrain_ext.plan.plan import Unit
from hf_pretrain_ext.values import is_number, shown

__all__ = ["Change", "ReplayConfig", "realised_ratio", "stage_draws", "with_replay"]

Mode = Literal["equivalent", "additional"]


@dataclass
class ReplayConfig:
    """Settings of replay, readable by `HfArgumentParser`."""

    ratio: float = field(
        default=0.05,
        metadata={"help": "Replayed out of all, in [0, 1). 0.05 for a weak shift of domain, 0.25 for a strong."},
    )
    mode: Mode = field(
        default="equivalent",
        metadata={
            "help": "equivalent: the stage keeps its length and sees less new data; additional: it sees all new data "
            "and gets longer."
        },
    )
    order: Literal["shuffled", "original"] = field(
        default="shuffled", metadata={"help": "Order of the replayed rows: shuffled anew every pass, or as stored."}
    )
    unit: Unit = field(default="samples", metadata={"help": "What ratio and weights are shares of."})
    # A str too: the parser hands over JSON from a command line as text.
    weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Share of each source of old data in what is replayed, as JSON; by their sizes if none."},
    )
    ratio_changes: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'Later ratios by the point from which they hold, as JSON: {"0.5": 0.1, "2B tokens": 0.05}.'},
    )

    def __post_init__(self) -> None:
        _check_ratio(self.ratio, "ratio")
        for name, allowed in (("mode", get_args(Mode)), ("order", ("shuffled", "original")), ("unit", get_args(Unit))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {shown(getattr(self, name))}")
        self.weights = _mapping(self.weights, "weights")
        self.ratio_changes = _mapping(self.ratio_changes, "ratio_changes")
        for point, ratio in self.changes.items():
            _check_ratio(ratio, f"ratio_changes[{shown(point)}]")
        for name, weight in (self.weights if isinstance(self.weights, dict) else {}).items():
            if not is_number(weight) or weight <= 0:
                raise ValueError(f"weights[{shown(name)}] must be a positive, finite number, got {shown(weight)}")

    @property
    def changes(self) -> dict[str, float]:
        """`ratio_changes`, empty where there are none."""
        return self.ratio_changes if isinstance(self.ratio_changes, dict) else {}

    @property
    def largest_ratio(self) -> float:
        return max([self.ratio, *self.changes.values()])


def _mapping(given: Any, name: str) -> dict[str, float] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} must be a dict, or one as JSON, got {shown(given)}") from error
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a dict, or one as JSON, got {shown(given)}")
    if given is not None and not given:
        raise ValueError(f"{name} is empty: leave it out")
    return None if given is None else dict(given)


def _check_ratio(ratio: Any, name: str) -> None:
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"{name} must be what is replayed out of all, at least 0 and below 1, got {shown(ratio)}")
    if 0 < ratio < 1 / MAX_WEIGHT:
        raise ValueError(f"{name} must be 0 or at least 1/{MAX_WEIGHT}, the smallest share of a plan, got {ratio}")


@dataclass(frozen=True)
class Change:
    """`ratio` of all is replayed from a point of the run on, which is `fraction` of it plus `draws` draws."""

    ratio: float
    draws: int = 0
    fraction: Fraction = Fraction(0)

    def at(self, total: Fraction) -> Fraction:
        return self.draws + self.fraction * total


def with_replay(
    plan: SamplePlan,
    sources: Sequence[Source],
    weights: Sequence[float],
    ratios: Sequence[tuple[int, float]],
    epoch: int,
    unit: Unit = "samples",
) -> SamplePlan:
    """`plan` with a share of its draws taken from `sources`, in the proportion of `weights` among each other.

    With `unit="tokens"` shares are exact to about half a row of each source where all sources have `lengths`, exact
    to a sample where all rows are equally long, and expected values from `mean_tokens` elsewhere.

    Args:
        plan ([`SamplePlan`]): with the new data.
        sources (`Sequence[Source]`): old data.
        weights (`Sequence[float]`): one a source.
        ratios (`Sequence[tuple[int, float]]`): start draw and replayed share, in order, the first from 0.
        epoch (`int`): draws in an epoch; see [`stage_draws`].
        unit (`str`): what shares are counted in.

    Example:

    >>> plan = SamplePlan((Source("new", 100),))
    >>> with_replay(plan, [Source("old", 100)], [1], [(0, 0.2), (50, 0.1)], epoch=100).segments
    (Segment(start=0, weights=(4, 1)), Segment(start=50, weights=(9, 1)))
    """
    parts = [Fraction(repr(float(weight))) for weight in weights]
    exact = [(start, _exact(ratio), [_exact(ratio) * part / sum(parts) for part in parts]) for start, ratio in ratios]
    everything = (*plan.sources, *sources)
    if unit == "tokens" and not _alike(everything):
        if all(source.lengths is not None for source in everything):
            return dataclasses.replace(
                plan.with_sources(sources, [(start, shares) for start, _, shares in exact], epoch), unit="tokens"
            )
        exact = [(start, ratio, _in_samples(plan, start, sources, shares)) for start, ratio, shares in exact]
    return plan.with_sources(sources, [(start, shares) for start, _, shares in exact], epoch)


def _exact(value: float) -> Fraction:
    # repr is the shortest decimal that gives the same float, hence what the user typed: 0.05 means 1/20.
    return Fraction(repr(float(value)))


def _alike(sources: Sequence[Source]) -> bool:
    """Whether all rows of all sources are known to be equally long: then tokens and samples are the same."""
    if any(source.lengths is None for source in sources):
        return False
    ends = {int(end) for s in sources if s.lengths is not None for end in (s.lengths.min(), s.lengths.max())}
    return len(ends) == 1


def _mean(source: Source) -> Fraction:
    if not source.mean_tokens:
        raise ValueError(f"source {source.name!r}: shares in tokens need to know how many tokens a row holds")
    return Fraction(source.mean_tokens)


def _in_samples(plan: SamplePlan, start: int, sources: Sequence[Source], shares: Sequence[Fraction]) -> list[Fraction]:
    """Shares in samples that are expected to give `shares` in tokens, from mean lengths."""
    mixture = plan.shares(start)
    mean_new = sum(
        (_exact(s) * _mean(source) for s, source in zip(mixture, plan.sources, strict=True) if s), Fraction()
    )
    old = [share / _mean(source) for share, source in zip(shares, sources, strict=True)]
    total = (1 - sum(shares)) / mean_new + sum(old)
    return [part / total for part in old]


def stage_draws(
    new: Source,
    sources: Sequence[Source],
    weights: Sequence[float],
    changes: Sequence[Change],
    mode: Mode,
    unit: Unit = "samples",
    epochs: Fraction = Fraction(1),
) -> Fraction:
    """Draws of a stage of `epochs` passes over `new`, before rounding to whole steps.

    In mode `"equivalent"` the stage is as long as without replay, in samples or, with `unit="tokens"`, in tokens
    (Ibrahim et al., 2024, compute-equivalent replay). In mode `"additional"` it is as long as it takes to see all of
    the new data: len(new)/(1 − ratio) samples where the ratio is fixed (the arithmetic of Abbes et al., 2025, who
    enlarge the batch instead).

    Raises:
        `ValueError`: a change that comes after the end of the stage.

    Example:

    >>> stage_draws(Source("new", 100), [Source("old", 9)], [1], [Change(0.2)], "additional")
    Fraction(125, 1)
    """
    if new.num_rows is None:
        raise ValueError("how long a stage over a stream is can only be said by max_steps")
    if mode == "equivalent" and unit == "samples":
        return new.num_rows * epochs
    target = Fraction(new.num_rows) * epochs
    parts = [Fraction(repr(float(weight))) for weight in weights]
    gains = []
    for change in changes:
        shares = [_exact(change.ratio) * part / sum(parts) for part in parts]
        drawn = _in_samples(SamplePlan((new,)), 0, sources, shares) if unit == "tokens" else shares
        seen = 1 - sum(drawn)
        if mode == "equivalent":
            seen *= _mean(new)
            seen += sum((share * _mean(source) for share, source in zip(drawn, sources, strict=True)), Fraction())
        gains.append(seen)
    if mode == "equivalent":
        target *= _mean(new)
    # What is gained up to draw D is linear in D, as the points of change are: intercept + slope · D.
    slope, intercept = gains[-1], Fraction(0)
    for before, after, change in zip(gains, gains[1:], changes[1:], strict=False):
        slope += (before - after) * change.fraction
        intercept += (before - after) * change.draws
    total = (target - intercept) / slope if slope > 0 else Fraction(0)
    points = [change.at(total) for change in changes]
    if total <= 0 or any(before >= after for before, after in zip(points, [*points[1:], total], strict=True)):
        raise ValueError(
            "ratio_changes: points must rise and come before the end of the run; those of the ratios "
            f"{', '.join(f'{change.ratio:g}' for change in changes[1:])} do not"
        )
    return total


def realised_ratio(counts: Mapping[str, Any]) -> dict[str, float]:
    """Replayed out of all, in samples and in tokens read, of the counts that a run keeps.

    Where more than one source is replayed, the share of each source of the run stands beside them.

    Example:

    >>> new = {"samples": 75, "tokens": 700, "replayed": False}
    >>> old = {"samples": 25, "tokens": 300, "replayed": True}
    >>> realised_ratio({"new": new, "old": old})
    {'replay_ratio': 0.25, 'replay_ratio_tokens': 0.3}
    """
    scalars = {}
    several = sum(entry["replayed"] for entry in counts.values()) > 1
    for suffix, unit in (("", "samples"), ("_tokens", "tokens")):
        values = [entry[unit] for entry in counts.values()]
        if None in values or not sum(values):
            continue
        total = sum(values)
        scalars[f"replay_ratio{suffix}"] = sum(e[unit] for e in counts.values() if e["replayed"]) / total
        if several:
            scalars.update({f"share_{name}{suffix}": entry[unit] / total for name, entry in counts.items()})
    return scalars
