"""The plug-ins: what can be added to a Trainer script, one file each. Import from `hf_pretrain_ext.callbacks`."""

from __future__ import annotations

from hf_pretrain_ext.callbacks.forgetting import ForgettingCallback
from hf_pretrain_ext.callbacks.gradnormlorp import GradNormLoRPCallback
from hf_pretrain_ext.callbacks.metadata import MetadataCallback
from hf_pretrain_ext.callbacks.replay import ReplayCallback
from hf_pretrain_ext.callbacks.rewarm import RewarmCallback

__all__ = ["ForgettingCallback", "GradNormLoRPCallback", "MetadataCallback", "ReplayCallback", "RewarmCallback"]
