"""Replay: a fixed share of the samples comes from old data. Pure functions over the sample plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from hf_pretrain_ext.plan import MAX_WEIGHT, SamplePlan, Source

__all__ = ["ReplayConfig", "realised_ratio", "with_replay"]

Mode = Literal["equivalent", "additional"]
MODES = ("equivalent", "additional")


@dataclass
class ReplayConfig:
    """Settings of replay, readable by `HfArgumentParser`."""

    ratio: float = field(
        default=0.05,
        metadata={"help": "Replayed samples out of all samples, in [0, 1). 0.05 for a weak shift, 0.25 for a strong."},
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

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio must be replayed samples out of all samples, at least 0 and below 1, got {self.ratio!r}"
            )
        if 0 < self.ratio < 1 / MAX_WEIGHT:
            raise ValueError(
                f"ratio must be 0 or at least 1/{MAX_WEIGHT}, the smallest share of a plan, got {self.ratio}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.order not in ("shuffled", "original"):
            raise ValueError(f"order must be 'shuffled' or 'original', got {self.order!r}")


def with_replay(plan: SamplePlan, source: Source, ratio: float, mode: Mode) -> SamplePlan:
    """`plan` with the share `ratio` of its draws taken from `source`.

    In mode `"equivalent"` an epoch stays as many draws (Ibrahim et al., 2024, compute-equivalent replay); in mode
    `"additional"` it grows to epoch / (1 − ratio), so that all the new data is still seen (the arithmetic of Abbes et
    al., 2025, who enlarge the batch instead).

    Example:

    >>> plan = SamplePlan((Source("new", 100),))
    >>> with_replay(plan, Source("old", 100), 0.2, "equivalent").epoch
    100
    >>> with_replay(plan, Source("old", 100), 0.2, "additional").epoch
    125
    """
    epoch = plan.epoch
    if mode == "additional":
        epoch = math.ceil(epoch / (1 - Fraction(repr(float(ratio)))))
    return plan.with_source(source, ratio, epoch=epoch)


def realised_ratio(counts: dict[str, Any]) -> dict[str, float]:
    """Replayed out of all, in samples and in loss-bearing tokens, of the counts that a run keeps.

    Example:

    >>> new = {"samples": 75, "tokens": 700, "replayed": False}
    >>> old = {"samples": 25, "tokens": 300, "replayed": True}
    >>> realised_ratio({"new": new, "old": old})
    {'replay_ratio': 0.25, 'replay_ratio_tokens': 0.3}
    """
    scalars = {}
    for key, unit in (("replay_ratio", "samples"), ("replay_ratio_tokens", "tokens")):
        values = [entry[unit] for entry in counts.values()]
        if None in values or not sum(values):
            continue
        scalars[key] = sum(entry[unit] for entry in counts.values() if entry["replayed"]) / sum(values)
    return scalars
