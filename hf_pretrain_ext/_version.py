"""The version of hf-pretrain-ext, in the one place that packaging, checkpoints and traces read it from."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
