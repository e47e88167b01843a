"""A replay buffer on disk: a uniform sample, bounded in bytes, of all rows that were ever added. Knows no Trainer."""

from __future__ import annotations

from hf_pretrain_ext.buffer.rows import row_bytes, to_table
from hf_pretrain_ext.buffer.sampling import cut, parse_bytes, priorities
from hf_pretrain_ext.buffer.storage import ReplayBuffer, ReplayBufferError
from hf_pretrain_ext.buffer.writer import BufferWriter

__all__ = [
    "BufferWriter",
    "ReplayBuffer",
    "ReplayBufferError",
    "cut",
    "parse_bytes",
    "priorities",
    "row_bytes",
    "to_table",
]
