"""After training: checkpoints merged (averages, LiNeS, instruction residuals) and adapters looked into."""

from hf_pretrain_ext.merging.blocks import Blocks, find_blocks
from hf_pretrain_ext.merging.checkpoints import MergeError
from hf_pretrain_ext.merging.formulas import (
    average_tensors,
    instruction_residual_tensors,
    lines_tensors,
    multi_task_alpha,
)
from hf_pretrain_ext.merging.intruders import (
    IntruderReport,
    MatrixIntruders,
    intruder_cosines,
    intruder_dimensions,
)
from hf_pretrain_ext.merging.merge import MERGE_NAME, Options, average, instruction_residual, lines
from hf_pretrain_ext.merging.mergekit import TASK_METHODS, average_yaml, instruction_residual_yaml, lines_yaml
from hf_pretrain_ext.merging.state_dicts import (
    average_state_dicts,
    instruction_residual_state_dict,
    lines_state_dict,
)

__all__ = [
    "MERGE_NAME",
    "TASK_METHODS",
    "Blocks",
    "IntruderReport",
    "MatrixIntruders",
    "MergeError",
    "Options",
    "average",
    "average_state_dicts",
    "average_tensors",
    "average_yaml",
    "find_blocks",
    "instruction_residual",
    "instruction_residual_state_dict",
    "instruction_residual_tensors",
    "instruction_residual_yaml",
    "intruder_cosines",
    "intruder_dimensions",
    "lines",
    "lines_state_dict",
    "lines_tensors",
    "lines_yaml",
    "multi_task_alpha",
]
