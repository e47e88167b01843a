"""Where meta-attention joins a decoder layer: read off the numbers of one forward pass, not off names.

In the pass, a layer takes the residual x, and some child's output o reaches the residual as x + c·o: that is what a
later child is given (the norm before the feed-forward, say), or in parallel layers, with the feed-forward's output f
added, what the layer returns. Meta-attention is to be added there: the child returns o + Meta(x + c·o)/c instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_pretrain_ext.meta_tokens.attention import Layout
from hf_pretrain_ext.meta_tokens.memory import cache_given
from hf_pretrain_ext.meta_tokens.probe import Call, LayerRecord, probe
from hf_pretrain_ext.values import shown

__all__ = ["HINTS", "Hint", "MetaPlace", "Rotary", "Survey", "drops_after", "survey"]


@dataclass(frozen=True)
class Hint:
    """A child that cannot be found: its name, c of x + c·o, and whether its output has the residual in it already."""

    child: str
    adds_residual: bool = False
    multiplier: float = 1.0


HINTS: dict[str, Hint] = {
    # Its attention is given the residual and returns the sum.
    "bloom": Hint("self_attention", adds_residual=True),
}
"""By `config.model_type`; a family of your own that is refused can be entered here."""


@dataclass(frozen=True)
class Rotary:
    """How a layer comes by its cosines and sines, and how they are laid out.

    `argument` is the name or number of the argument that is the pair, or one complex tensor; `table` the attribute of
    the child that holds `(positions, sines and cosines)`, to be read at the `position_ids` that the layer is given.
    `sines_first` says that the pair is one of sines and cosines, each for two neighbours, as such a table has them.
    """

    layout: Layout
    dims: int
    argument: str | int | None = None
    table: str | None = None
    sines_first: bool = False


@dataclass(frozen=True)
class MetaPlace:
    """
    The place in one layer.

    Attributes:
        layer (`int`): number of the layer.
        child (`str`): name of the child whose output is changed.
        kind (`str`): `"sequential"` (before the feed-forward) or `"parallel"` (beside it).
        multiplier (`float`): c of x + c·o.
        adds_residual (`bool`): whether o has x in it already.
        rotary ([`Rotary`], *optional*): None where the model rotates nothing.
        norm (`str`): `"layernorm"` or `"rmsnorm"`, the kind of the layer's own.
        eps (`float`): its epsilon.
    """

    layer: int
    child: str
    kind: Literal["sequential", "parallel"]
    multiplier: float = 1.0
    adds_residual: bool = False
    rotary: Rotary | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    eps: float = 1e-5


@dataclass(frozen=True)
class Survey:
    """What the probe found: the module that holds the layers, its list of them, and the place in each."""

    decoder: nn.Module
    layers: nn.ModuleList
    places: tuple[MetaPlace, ...]
    hidden_size: int


def survey(model: Any) -> Survey:
    """
    The places in every layer of a decoder, from one forward pass of three short rows.

    Modes, gradients and random state are left alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): a decoder-only language model, unwrapped.

    Raises:
        `ValueError`: an architecture that has no such place: recurrent, with an encoder, bidirectional, or one whose
            residual is formed in another way. The message says which.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model must be a model of transformers, got {shown(name)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder: meta-tokens are for decoder-only models. Take such a one")
    text = config.get_text_config(decoder=True)
    lists = _layer_lists(model, getattr(text, "num_hidden_layers", None))
    if not lists:
        raise ValueError(
            f"{name} has no list of {getattr(text, 'num_hidden_layers', None)} layers, which meta-attention is put "
            "into. Take a decoder-only model of transformers"
        )
    away = next(
        (n for each in lists for n, layer in enumerate(each) if any(p.is_meta for p in layer.parameters())), None
    )
    if away is not None:
        raise ValueError(
            f"layer {away} of {name} is offloaded: its weights are on no device, and those of a sub-layer put there "
            "would be lost. Load the model with a device_map that keeps every layer on a device"
        )
    records: dict[nn.ModuleList, list[LayerRecord]] = {layers: [LayerRecord() for _ in layers] for layers in lists}
    outputs = probe(model, records)
    layers = next((each for each in lists if all(record.times == 1 for record in records[each])), None)
    if layers is None:
        raise ValueError(f"the layers of {name} are not each called once in a pass, so residuals cannot be followed")
    _check_kind(name, outputs)
    hint = HINTS.get(str(getattr(text, "model_type", None)))
    scales = _numbers(text)
    decoder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    places: list[MetaPlace] = []
    for number, record in enumerate(records[layers]):
        first = places[0] if places else None
        places.append(_place(name, number, layers[number], record, hint, scales, first))
    given = records[layers][0].given
    return Survey(decoder, layers, tuple(places), 0 if given is None else given.shape[-1])


def drops_after(model: Any, found: Survey) -> bool:
    """
    Whether training drops part of the self-attention's output after the place where meta-attention joins it.

    Then the output of meta-attention is dropped there with it, and must not be dropped before. Told by a pass in
    training mode, in which what the next child is given is no longer x + c·o.
    """
    records = [LayerRecord() for _ in found.layers]
    probe(model, {found.layers: records}, training=True)
    for place, record in zip(found.places, records, strict=True):
        if place.adds_residual or record.given is None or record.returned is None:
            continue  # Its sum is formed inside the child; or the layer was left out (LayerDrop).
        if place.kind == "sequential":
            holds = _sequential(record, record.given, [place.multiplier], place.child)
        else:
            holds = _parallel(record, record.given, record.returned, [place.multiplier], place.child)
        if holds is None:
            return True
    return False


def _layer_lists(model: nn.Module, number: int | None) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number]


def _numbers(config: Any) -> list[float]:
    """The floats of a config: a multiplier of the residual is one of them, more exact than what is measured."""
    return [value for value in config.to_dict().values() if isinstance(value, float) and value]


def _check_kind(name: str, outputs: Any) -> None:
    """Raises `ValueError` for a model that is recurrent, in part or whole, or that looks ahead."""
    from transformers import Cache
    from transformers.utils import ModelOutput

    # What is None is not among the items. Both older names are properties of all outputs in newer releases, and warn.
    held = dict(outputs.items()) if isinstance(outputs, ModelOutput) else {}
    cache = cache_given(held)
    recurrent = "state" in held or "cache_params" in held
    linear = [n for n, each in enumerate(cache.is_linear) if each] if isinstance(cache, Cache) else []
    if recurrent or linear:
        which = "" if recurrent or len(linear) == len(cache.is_linear) else f" in layers {linear}"
        raise ValueError(
            f"{name} is recurrent{which}: it keeps a state instead of keys and values, so there is no self-attention "
            "for meta-attention to follow. Take a decoder with attention in every layer, or train with "
            "attention=False (meta-tokens without meta-attention)"
        )
    logits = getattr(outputs, "logits", None)
    logits = outputs[0] if logits is None else logits
    ahead, scale = (logits[0, :-1] - logits[2, :-1]).abs().max(), logits.abs().max()
    # Mixtures of experts add up in another order when other rows change; that is rounding.
    if float(ahead) > min(100 * torch.finfo(logits.dtype).eps, 1e-2) * float(scale):
        raise ValueError(
            f"{name} looks ahead: its last token changes the outputs before it. Meta-tokens are for causal language "
            "models. Take a ...ForCausalLM model, with is_decoder=True where the family has both"
        )
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"{name} returns {shown(type(cache).__name__)} as its cache, not a Cache of transformers, so "
            "meta-attention could not follow it in generation. Take a decoder-only model of transformers"
        )


def _place(
    name: str,
    number: int,
    layer: nn.Module,
    record: LayerRecord,
    hint: Hint | None,
    scales: list[float],
    first: MetaPlace | None,
) -> MetaPlace:
    given, returned = record.given, record.returned
    if given is None or returned is None or given.shape != returned.shape or given.dim() != 3:
        raise ValueError(f"layer {number} of {name} does not turn one residual into the next. {_ADVICE}")
    norm, eps = _norm(record.calls)
    about: dict[str, Any] = {"norm": norm, "eps": eps}
    if hint is not None:
        child = getattr(layer, hint.child, None)
        if child is None:
            raise ValueError(f"layer {number} of {name} has no child {hint.child!r}, which HINTS names for it")
        about |= {"kind": "sequential", "adds_residual": hint.adds_residual, "multiplier": hint.multiplier}
        return MetaPlace(number, hint.child, rotary=_rotary(child, record), **about)
    found = _sequential(record, given, scales)
    if found is None:
        found = _parallel(record, given, returned, scales, None if first is None else first.child)
        about["kind"] = "parallel"
    else:
        about["kind"] = "sequential"
    if found is None:
        raise ValueError(
            f"layer {number} of {name} forms its residual in a way that was not found: no child's output o comes back "
            f"as x + c·o, among {[call.name for call in record.calls]}. {_ADVICE}"
        )
    call, multiplier = found
    return MetaPlace(number, call.name, multiplier=multiplier, rotary=_rotary(call.module, record), **about)


_ADVICE = (
    "Enter the child that ends its self-attention in hf_pretrain_ext.meta_tokens.HINTS under its model_type, or train "
    "with attention=False (meta-tokens without meta-attention)"
)


def _single(calls: list[Call], shape: torch.Size) -> list[Call]:
    """Calls that return a residual's shape, by modules that are called once: a hook on others would act twice."""
    names = [call.name for call in calls]
    return [
        call
        for call in calls
        if names.count(call.name) == 1 and call.returned is not None and call.returned.numel() == shape.numel()
    ]


def _sequential(
    record: LayerRecord, given: Tensor, scales: list[float], known: str | None = None
) -> tuple[Call, float] | None:
    """The last child whose output o makes x + c·o of what a later child is given, and c.

    A sum that comes out to the last bit is taken before one that only fits: a norm's output, too, is nearly the
    residual times a number.
    """
    pairs = []
    for candidate in reversed(_single(record.calls, given.shape)):
        for call in record.calls[record.calls.index(candidate) + 1 :]:
            if known in (None, candidate.name) and call.given is not None and call.given.numel() == given.numel():
                own = candidate.returned.reshape(given.shape) if candidate.returned is not None else given
                sum_ = call.given.reshape(given.shape)
                if not torch.equal(sum_, given):
                    pairs.append((candidate, own, sum_))
    for factor in (1.0, *scales):
        for candidate, own, sum_ in pairs:
            if torch.equal(given + own * factor, sum_):
                return candidate, factor
    for candidate, own, sum_ in pairs:
        multipliers = None if torch.equal(own, sum_) else _solve(sum_ - given, [own], scales)
        if multipliers is not None:
            return candidate, multipliers[0]
    return None


def _parallel(
    record: LayerRecord, given: Tensor, returned: Tensor, scales: list[float], known: str | None
) -> tuple[Call, float] | None:
    """The child that mixes positions and whose output o makes x + c·o + d·f of what the layer returns, and c."""
    candidates = _single(record.calls, given.shape)
    mixing = [call for call in candidates if (call.name == known if known else _mixes(call, given))]
    pairs = [
        (attention, attention.returned.reshape(given.shape), other.returned.reshape(given.shape))
        for attention in reversed(mixing)
        for other in record.calls
        if other is not attention and other.returned is not None and other.returned.numel() == given.numel()
        if attention.returned is not None
    ]
    for attention, own, beside in pairs:
        if any(
            torch.equal(returned, sum_) for sum_ in (own + beside + given, given + own + beside, given + beside + own)
        ):
            return attention, 1.0
    for attention, own, beside in pairs:
        multipliers = _solve(returned - given, [own, beside], scales)
        if multipliers is not None:
            return attention, multipliers[0]
    return None


def _mixes(call: Call, given: Tensor) -> bool:
    """Whether a child of the first layer lets the first token change what stands at others."""
    made = call.returned.reshape(given.shape) if call.returned is not None else given
    return bool((made[0, 1:-1] - made[1, 1:-1]).abs().max() > 1e-6 * made.abs().max())


def _solve(change: Tensor, parts: list[Any], scales: list[float]) -> list[float] | None:
    """The factors with which `parts` sum up to `change`; None if they do not, or one of them plays no part."""
    dtype = change.dtype
    target = change.double().flatten()
    columns = torch.stack([part.double().flatten() for part in parts], dim=1)
    sizes = columns.norm(dim=0)
    if not bool((sizes > 0).all()) or not float(target.norm()) > 0:
        return None
    solution = torch.linalg.lstsq((columns / sizes).cpu(), target.cpu().unsqueeze(1)).solution.flatten() / sizes.cpu()
    left = target.cpu() - columns.cpu() @ solution
    # Half precision rounds the sum to steps that are large beside a small output.
    bound = 1e-3 if torch.finfo(dtype).bits >= 32 else 0.1
    shares = solution.abs() * sizes.cpu() / target.norm().cpu()
    if float(left.norm() / target.norm()) > bound or bool((shares < 1e-2).any()):
        return None
    return [_exact(float(value), scales, bound) for value in solution]


def _exact(value: float, scales: list[float], bound: float) -> float:
    """A measured factor, or the number of the config that it must be."""
    near = [scale for scale in (1.0, *scales) if abs(value - scale) <= bound / 2 * abs(scale)]
    return min(near, key=lambda scale: abs(value - scale)) if near else value


def _norm(calls: list[Call]) -> tuple[Literal["layernorm", "rmsnorm"], float]:
    """Kind and epsilon of the layer's first norm: what does not change when its input is scaled."""
    for call in calls:
        if call.given is None or call.returned is None or call.given.shape != call.returned.shape:
            continue
        eps = next(
            (getattr(call.module, name) for name in ("eps", "variance_epsilon") if hasattr(call.module, name)), None
        )
        if not isinstance(eps, float):
            continue
        wide = call.given.float()
        wide = (wide / wide.std() * 1e2).to(call.given.dtype)
        with torch.no_grad():
            once, scaled, shifted = (call.module(each) for each in (wide, wide * 4, wide + 64))
        if torch.allclose(once, scaled, rtol=1e-2, atol=1e-2):
            centred = torch.allclose(once, shifted, rtol=5e-2, atol=5e-2)
            return ("layernorm" if centred else "rmsnorm"), eps
    return "layernorm", 1e-5


def _rotary(child: nn.Module, record: LayerRecord) -> Rotary | None:
    """Where a layer has its cosines from: an argument that is a pair with cos² + sin² constant, or a table."""
    arguments: list[tuple[str | int, Any]] = [*enumerate(record.args), *record.kwargs.items()]
    for argument, value in arguments:
        if isinstance(value, Tensor) and value.is_complex() and _is_turn(value.real, value.imag):
            return Rotary("pairs", value.shape[-1] * 2, argument=argument)
        if (
            not isinstance(value, tuple | list)
            or len(value) != 2
            or not all(isinstance(each, Tensor) and each.dim() > 1 for each in value)
        ):
            continue
        if bool((value[0][..., 0, :] == 0).all()):  # Nothing is turned at position 0, where cosines are not 0.
            if _is_turn(value[1], value[0]):
                return Rotary("interleaved", value[0].shape[-1] * 2, argument=argument, sines_first=True)
            continue
        layout = _layout(*value)
        if layout is not None:
            return Rotary(layout, value[0].shape[-1] * (2 if layout == "pairs" else 1), argument=argument)
    for name, table in [*child.named_buffers(recurse=False), *vars(child).items()]:
        if (
            isinstance(table, Tensor)
            and table.dim() == 2
            and table.shape[-1] % 2 == 0
            and "position_ids" in _names(child)
        ):
            sin, cos = table.chunk(2, dim=-1)
            if _is_turn(cos, sin):
                return Rotary("interleaved", table.shape[-1], table=name)
    return None


def _names(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _is_turn(cos: Tensor, sin: Tensor) -> bool:
    if cos.shape != sin.shape or not cos.is_floating_point() or cos.shape[-2] < 2:
        return False
    square = cos.double() ** 2 + sin.double() ** 2
    varied = bool((sin[..., 0, :] != sin[..., 1, :]).any())
    # Scaled rotations (YaRN) have another constant than 1; half precision rounds.
    return varied and bool((square - square.mean()).abs().max() < 2e-2 * square.mean())


def _layout(cos: Tensor, sin: Tensor) -> Layout | None:
    if not _is_turn(cos, sin):
        return None
    if cos.shape[-1] % 2 == 0 and torch.equal(*cos.chunk(2, dim=-1)) and torch.equal(*sin.chunk(2, dim=-1)):
        return "half"
    if cos.shape[-1] % 2 == 0 and torch.equal(cos[..., ::2], cos[..., 1::2]):
        return "interleaved"
    return "pairs"
