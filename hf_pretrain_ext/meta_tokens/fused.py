"""The masked logit of the meta-token for losses that multiply with the head's weight and never call the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_pretrain_ext.meta_tokens.layers import unadapted

__all__ = ["MASKED", "masked_head"]

MASKED = -1e30
"""A logit whose probability is 0 in every type, and whose product with 0 is not NaN, scaled or not."""


@contextmanager
def masked_head(head: Any, token_id: int) -> Iterator[None]:
    """
    Inside, the head has a bias that masks the token. A forward pass keeps it for its backward pass.

    No logits are copied: the bias is one number a token. A head with a bias of its own keeps it, masked for good: at a
    logit that takes no probability there is no gradient either. Of a head that PEFT wraps, it is the head inside.

    Example:

    >>> head = nn.Linear(4, 3, bias=False)
    >>> with masked_head(head, 2):
    ...     masked = torch.nn.functional.linear(torch.ones(1, 4), head.weight, head.bias).softmax(-1)
    >>> masked[0, 2].item(), head.bias is None
    (0.0, True)
    """
    head = unadapted(head)
    own = head.bias
    if own is not None:
        with torch.no_grad():
            own[token_id] = max(torch.finfo(own.dtype).min, MASKED)
        yield
        return
    weight = head.weight
    # Under ZeRO-3 a weight outside its module's forward pass has no elements.
    bias = weight.new_zeros(getattr(weight, "ds_shape", weight.shape)[0])
    bias[token_id] = max(torch.finfo(weight.dtype).min, MASKED)
    head.bias = nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        head.bias = None
