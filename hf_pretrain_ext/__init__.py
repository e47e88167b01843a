"""Plug-ins for continuing the pre-training of Hugging Face models.

Importing the package costs nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_pretrain_ext._version import __version__

if TYPE_CHECKING:
    from hf_pretrain_ext.continuing import anneal, continue_from
    from hf_pretrain_ext.packing import PackedCollator, check_isolation, pack
    from hf_pretrain_ext.plan import SamplePlan, Source
    from hf_pretrain_ext.plugin import PluginError, Problem, Setup, TrainerPlugin
    from hf_pretrain_ext.stages import read_stages
    from hf_pretrain_ext.trace import read_trace
    from hf_pretrain_ext.trainer import PlanConfig, PluginTrainerMixin, extend

__all__ = [
    "PackedCollator",
    "PlanConfig",
    "PluginError",
    "PluginTrainerMixin",
    "Problem",
    "SamplePlan",
    "Setup",
    "Source",
    "TrainerPlugin",
    "__version__",
    "anneal",
    "check_isolation",
    "continue_from",
    "extend",
    "pack",
    "read_stages",
    "read_trace",
]

_HOMES = {
    "PackedCollator": "packing",
    "PlanConfig": "trainer",
    "PluginError": "plugin",
    "PluginTrainerMixin": "trainer",
    "Problem": "plugin",
    "SamplePlan": "plan",
    "Setup": "plugin",
    "Source": "plan",
    "TrainerPlugin": "plugin",
    "anneal": "continuing",
    "check_isolation": "packing",
    "continue_from": "continuing",
    "extend": "trainer",
    "pack": "packing",
    "read_stages": "stages",
    "read_trace": "trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
