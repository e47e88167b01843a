"""Offline, single-threaded and quiet, before any test imports torch."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    # accelerate collects garbage at the end of each training, which goes over every object of every imported library:
    # 0.6 s each time, a third of all test time, if they are not set apart. Between two modules no test's objects live.
    gc.collect()
    gc.freeze()
