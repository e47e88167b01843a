"""The plug-ins: what can be added to a Trainer script, one file each. Import from `hf_pretrain_ext.callbacks`."""

from __future__ import annotations

from hf_pretrain_ext.callbacks.benchmarks import BenchmarkCallback
from hf_pretrain_ext.callbacks.buffer import BufferCallback
from hf_pretrain_ext.callbacks.forgetting import ForgettingCallback
from hf_pretrain_ext.callbacks.gradnormlorp import GradNormLoRPCallback
from hf_pretrain_ext.callbacks.l2_init import L2InitCallback
from hf_pretrain_ext.callbacks.meta_tokens import MetaTokensCallback
from hf_pretrain_ext.callbacks.metadata import MetadataCallback
from hf_pretrain_ext.callbacks.replay import ReplayCallback
from hf_pretrain_ext.callbacks.reptile import ReptileCallback
from hf_pretrain_ext.callbacks.rewarm import RewarmCallback
from hf_pretrain_ext.callbacks.self_distillation import SelfDistillationCallback

__all__ = [
    "BenchmarkCallback",
    "BufferCallback",
    "ForgettingCallback",
    "GradNormLoRPCallback",
    "L2InitCallback",
    "MetaTokensCallback",
    "MetadataCallback",
    "ReplayCallback",
    "ReptileCallback",
    "RewarmCallback",
    "SelfDistillationCallback",
]
