"""A decoder layer with meta-attention in it, and what happens at each forward pass.

A layer becomes an instance of a subclass of its own class (as FSDP2 does it), for two reasons that hooks on the layer
cannot meet. Activation checkpointing wraps `forward` and runs it again in the backward pass, where hooks do not run:
the residual has to be taken inside `forward`, from the tensor that the second run is given. And where the meta-tokens
are has to travel with the call, as an argument: another forward pass may have come between a pass and its backward.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_pretrain_ext.meta_tokens.attention import (
    MetaAttention,
    MetaContext,
    documents_of,
    gather_rotary,
    meta_context,
    positions_of,
)
from hf_pretrain_ext.meta_tokens.memory import MetaMemory, cache_given, cache_made, hang_memory, memory_of
from hf_pretrain_ext.meta_tokens.places import MetaPlace
from hf_pretrain_ext.values import shown

__all__ = ["DOCUMENTS", "POSITIONS", "MetaSite", "Passes", "put_in", "take_out", "unadapted"]

POSITIONS, DOCUMENTS = "meta_positions", "meta_documents"
"""Names of the two tensors of a batch that say where its meta-tokens are."""

CHILD = "meta_attention"
"""Name of the sub-layer in its decoder layer."""

_SITE = "_meta_tokens_site"


class Passes:
    """
    What the forward pass that is running knows: where the meta-tokens are, and of which documents.

    Two hooks before a pass bring it: one on the whole model, which takes `meta_positions` and `meta_documents` out of
    the batch, and one on the module that holds the layers, which knows the cache.
    """

    def __init__(self, token_id: int, decoder: nn.Module, config: Any, attention: bool):
        self.token_id, self.config, self.attention = token_id, config, attention
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.given: dict[str, Any] = {}
        self.context: MetaContext | None = None
        self.memory: MetaMemory | None = None  # of a pass that was given no cache, for the one that it returns

    def listen(self, model: nn.Module, decoder: nn.Module) -> list[Any]:
        """Registers the hooks; returns their handles."""
        handles = [
            decoder.register_forward_pre_hook(self.enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self.leave_decoder, always_call=True),
        ]
        if model is not decoder:
            handles.append(model.register_forward_pre_hook(self.enter_model, with_kwargs=True))
            handles.append(model.register_forward_hook(self.leave_model, always_call=True))
        return handles

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the whole model: keeps what the batch says, and hides it from the model's own forward."""
        self.given = {name: kwargs.pop(name) for name in (POSITIONS, DOCUMENTS) if name in kwargs}
        self.given["input_ids"] = args[0] if args else kwargs.get("input_ids")
        return args, kwargs

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given = {}

    def enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the layers: makes the context of this pass."""
        given = {**self.given, **{name: kwargs.pop(name) for name in (POSITIONS, DOCUMENTS) if name in kwargs}}
        if self.attention:
            call = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
            self.context = self._context(module, call, given)
        return args, kwargs

    def leave_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the layers: a cache that the model made itself takes the memory along."""
        memory, self.memory, self.context = self.memory, None, None
        if memory is None:
            return
        cache = cache_made(output)
        if cache is not None:
            hang_memory(cache, memory)

    def _context(self, module: nn.Module, call: dict[str, Any], given: dict[str, Any]) -> MetaContext:
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        batch, length = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
        ids = given.get("input_ids") if ids is None else ids
        memory, past = self._memory(module, call)
        positions, documents = given.get(POSITIONS), given.get(DOCUMENTS)
        if positions is None:
            if ids is None:
                raise ValueError(
                    "the model was given inputs_embeds only, which do not show where its meta-tokens are. Pass "
                    f"{POSITIONS} with them: (batch, meta), −1 at the end of rows that have fewer"
                )
            positions = positions_of(ids, self.token_id)
        else:
            _check(positions, documents, batch)
        if not positions.shape[1] and module.training and torch.is_grad_enabled():
            # Room for one, empty: every parameter takes part in every step, as DDP asks.
            positions = positions.new_full((batch, 1), -1)
            documents = None if documents is None else documents.new_full((batch, 1), -1)
        order = call.get("position_ids")
        if documents is None and not past and isinstance(order, Tensor) and order.dim() == 2 and positions.shape[1]:
            documents = documents_of(order, positions)
        return meta_context(positions, length, documents, memory, past)

    def _memory(self, module: nn.Module, call: dict[str, Any]) -> tuple[MetaMemory | None, int]:
        """The memory of this pass, if it can have a cache, and the tokens before it."""
        cache, wanted = cache_given(call), call.get("use_cache")
        past = 0 if cache is None else int(cache.get_seq_length())
        if module.training and torch.is_grad_enabled():
            if past:
                raise ValueError(
                    f"the cache holds {past} tokens in training, where meta-attention keeps nothing from one "
                    "pass to the next. Train on whole rows, or call model.eval()"
                )
            return None, 0
        if cache is not None:
            return memory_of(cache, past), past
        wanted = getattr(self.config, "use_cache", False) if wanted is None else wanted
        self.memory = MetaMemory() if wanted else None
        return self.memory, 0


def _check(positions: Any, documents: Any, batch: int) -> None:
    for name, value in ((POSITIONS, positions), (DOCUMENTS, documents)):
        if name == DOCUMENTS and value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
            seen = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"{name} must be a tensor of integers of shape (batch, meta), got {seen}")
        if len(value) != batch or value.shape != positions.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} for a batch of {batch} rows and {POSITIONS} of shape "
                f"{tuple(positions.shape)}: one row a row of the batch, of equal shapes"
            )


@dataclass
class _Open:
    """The call of a layer that is running."""

    hidden: Tensor
    context: MetaContext
    rotary: tuple[Tensor, Tensor] | None


class MetaSite:
    """Meta-attention in one layer: what the layer is given, and the hook on the child where it joins."""

    def __init__(self, layer: nn.Module, place: MetaPlace, passes: Passes, rotates: bool):
        self.layer, self.place, self.passes = layer, place, passes
        self.rotary = place.rotary if rotates else None
        self.open: _Open | None = None

    @property
    def attention(self) -> Any:
        # Looked up at each call: PEFT may have put a wrapper there.
        return getattr(self.layer, CHILD)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: MetaContext | None) -> _Open | None:
        if context is None:
            raise RuntimeError(
                f"layer {self.place.layer} was called by itself, so it does not know where the meta-tokens are. Call "
                "the model, or its decoder"
            )
        if not context.count:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        context = context.on(hidden.device)
        return _Open(hidden, context, self._turns(args, kwargs, context))

    def _turns(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: MetaContext) -> Any:
        rotary = self.rotary
        if rotary is None:
            return None
        given: Any = args if isinstance(rotary.argument, int) else kwargs
        if rotary.table is not None:
            table = getattr(getattr(self.layer, self.place.child), rotary.table)
            places = kwargs["position_ids"].expand(len(context.positions), -1).gather(1, context.positions)
            sin, cos = table.to(places.device)[places].chunk(2, dim=-1)
        elif rotary.sines_first:
            sin, cos = gather_rotary(given[rotary.argument][0], given[rotary.argument][1], context)
        else:
            turns = given[rotary.argument]
            cos, sin = (turns.real, turns.imag) if isinstance(turns, Tensor) else turns
            return gather_rotary(cos, sin, context)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)

    def join(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the child: o + Meta(x + c·o)/c at the meta-tokens, o at all others."""
        call = self.open
        if call is None:
            return None
        own = output[0] if isinstance(output, tuple) else output
        context, c = call.context, self.place.multiplier
        residual = context.gather(own)
        if not self.place.adds_residual:
            residual = context.gather(call.hidden) + c * residual
        update = self.attention(residual, context.mask, call.rotary, context.memory)
        joined = context.add(own, update if c == 1 else update / c)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined


def unadapted(module: Any) -> Any:
    """The module inside what PEFT put around it: a layer of an adapter, or a module that is saved with one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            saved = getattr(module, "modules_to_save", {})
            active = [] if module.disable_adapters else [name for name in module.active_adapters if name in saved]
            module = saved[active[0]] if active else module.original_module
        else:
            return module


_CLASSES: dict[type, type] = {}
"""By the class of a layer: the same with meta-attention."""


def _layer_class(base: Any) -> Any:
    if base in _CLASSES:
        return _CLASSES[base]

    class Layer(base):
        _meta_tokens_base = base

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            context = getattr(self, _SITE).passes.context
            return super().__call__(*args, meta_context=context, **kwargs)

        @functools.wraps(base.forward)
        def forward(self, *args: Any, meta_context: MetaContext | None = None, **kwargs: Any) -> Any:
            site = getattr(self, _SITE)
            outer = site.open
            site.open = site.begin(args, kwargs, meta_context)
            try:
                return super().forward(*args, **kwargs)
            finally:
                site.open = outer

        def __reduce_ex__(self, protocol: Any) -> Any:
            # This class is made here, so nothing could find it by its name.
            _, _, *state = super().__reduce_ex__(protocol)
            return (_new, (base,), *state)

    # FSDP, device maps and checkpoints go by the names of layer classes.
    Layer.__name__, Layer.__qualname__, Layer.__module__ = base.__name__, base.__qualname__, base.__module__
    _CLASSES[base] = Layer
    return Layer


def _new(base: type) -> Any:
    made = _layer_class(base)
    return made.__new__(made)


def put_in(layer: nn.Module, site: MetaSite, attention: MetaAttention) -> Any:
    """Gives a layer its sub-layer; returns the handle of its hook."""
    base = type(layer)
    layer.add_module(CHILD, attention)
    setattr(layer, _SITE, site)
    _become(layer, base, _layer_class(base))
    return getattr(layer, site.place.child).register_forward_hook(site.join)


def take_out(layer: nn.Module) -> None:
    """Undoes [`put_in`]; the hook is removed by its handle."""
    _become(layer, type(layer), type(layer)._meta_tokens_base)  # type: ignore[attr-defined]
    delattr(layer, _SITE)
    delattr(layer, CHILD)


def _become(layer: nn.Module, old: type, new: type) -> None:
    # accelerate's hooks (device maps, offloading) keep the class's forward, bound, in the instance.
    for name in ("forward", "_old_forward"):
        bound = vars(layer).get(name)
        if getattr(bound, "__func__", None) is old.forward:  # type: ignore[attr-defined]
            setattr(layer, name, new.forward.__get__(layer))  # type: ignore[attr-defined]
    layer.__class__ = new
