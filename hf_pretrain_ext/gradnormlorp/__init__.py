"""GradNormLoRP: low-rank projected, 8-bit Adam on weights split into magnitude and direction."""

from hf_pretrain_ext.gradnormlorp.groups import adapter_groups, param_groups, projected_modules
from hf_pretrain_ext.gradnormlorp.memory import Memory, compare, comparison_table, measured_state, memory, memory_of
from hf_pretrain_ext.gradnormlorp.optimizer import GradNormLoRP
from hf_pretrain_ext.gradnormlorp.projector import captured_energy, leading_basis

__all__ = [
    "GradNormLoRP",
    "Memory",
    "adapter_groups",
    "captured_energy",
    "compare",
    "comparison_table",
    "leading_basis",
    "measured_state",
    "memory",
    "memory_of",
    "param_groups",
    "projected_modules",
]
