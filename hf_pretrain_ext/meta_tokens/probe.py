"""One forward pass of a model in which every child of its decoder layers is listened to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import reason

__all__ = ["Call", "LayerRecord", "probe", "quiet"]

LENGTH = 12
"""Tokens of a probe row: enough for attention to mix, and for cosines to differ."""


@dataclass
class Call:
    """One call of a child: first tensor that it was given, first that it returned, in the order of the layer."""

    name: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None


@dataclass
class LayerRecord:
    """What one layer did in the probe."""

    given: Tensor | None = None
    returned: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    times: int = 0


def probe(model: Any, records: dict[nn.ModuleList, list[LayerRecord]], training: bool = False) -> Any:
    """Runs three rows: the second differs from the first in its first token, the third in its last."""
    config = model.config.get_text_config(decoder=True)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    if vocabulary < 4:
        raise ValueError(f"{type(model).__name__} has a vocabulary of {vocabulary}: too few tokens to probe it with")
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        # It may be left out of attention, and rows have to differ in what is seen.
        ids[ids == pad] = next(number for number in range(4) if number != pad)
    for row, column in ((1, 0), (2, length - 1)):
        ids[row, column] = next(number for number in range(4) if number not in (pad, int(ids[0, column])))
    handles = [
        handle
        for layers, found in records.items()
        for layer, record in zip(layers, found, strict=True)
        for handle in _listen(layer, record)
    ]
    try:
        with quiet(model, training):
            return model(input_ids=ids.to(_device(model)), use_cache=not training)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be probed: a forward pass of {length} tokens failed with "
            f"{reason(error)}. Attach meta-attention to a whole model, before it is sharded or compiled"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _device(model: Any) -> torch.device:
    table = model.get_input_embeddings()
    return table.weight.device if table is not None else next(model.parameters()).device


@contextmanager
def quiet(model: nn.Module, training: bool) -> Iterator[None]:
    """One mode, no gradients, no autocast; modes and random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    kind = next(model.parameters()).device.type
    try:
        model.train(training)
        with torch.no_grad(), rng_guard(), torch.autocast(kind, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _listen(layer: nn.Module, record: LayerRecord) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.given, record.args, record.kwargs = _copy(_first(args, kwargs)), args, kwargs

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        record.returned, record.times = _copy(_first_of(output)), record.times + 1

    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after, with_kwargs=True)
    for name, child in layer.named_children():
        yield from _overhear(name, child, record)


def _overhear(name: str, child: nn.Module, record: LayerRecord) -> Iterator[Any]:
    waiting: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies: Falcon adds to the feed-forward's output in place.
        waiting.append(_copy(_first(args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        record.calls.append(Call(name, child, waiting.pop(), _copy(_first_of(output))))

    yield child.register_forward_pre_hook(before, with_kwargs=True)
    yield child.register_forward_hook(after, with_kwargs=True)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = [*args, *(kwargs[name] for name in ("hidden_states", "x") if name in kwargs)]
    return next((value for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)


def _first_of(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
