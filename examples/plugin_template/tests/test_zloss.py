from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hpe_zloss import ZLossCallback, z_loss

from hf_pretrain_ext.testing import CHECKS, PluginKit

KIT = PluginKit(
    make=lambda: ZLossCallback(weight=1e-2),
    neutral=lambda: ZLossCallback(weight=0, allow_no_effect=True),
    varied=(lambda: ZLossCallback(weight=1e-1),),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_a_plug_in(check: Any, tmp_path: Path) -> None:
    check(KIT, tmp_path)


def test_the_equation() -> None:
    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.tensor([[1, 2, -100, 3, 0], [-100] * 5])
    by_hand = sum(float(torch.log(torch.exp(logits[0, position]).sum()) ** 2) for position in (0, 1, 3, 4))
    assert float(z_loss(logits, labels)) == pytest.approx(by_hand, rel=1e-5)


def test_a_weight_that_is_none() -> None:
    with pytest.raises(ValueError, match="weight must be a number of at least 0, got -1"):
        ZLossCallback(weight=-1)
