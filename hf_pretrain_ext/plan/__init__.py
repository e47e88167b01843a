"""The sample plan: which row of which source is sample i, for every i, in integer arithmetic."""

from __future__ import annotations

from hf_pretrain_ext.plan.mixture import MAX_WEIGHT, integer_weights, quota_schedule
from hf_pretrain_ext.plan.plan import Draw, Draws, Phase, SamplePlan, Segment, Source

__all__ = [
    "MAX_WEIGHT",
    "Draw",
    "Draws",
    "Phase",
    "SamplePlan",
    "Segment",
    "Source",
    "integer_weights",
    "quota_schedule",
]
