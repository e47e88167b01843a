"""What meta-tokens do in a model: who attends to them, how sure of the next token they make it, what if they had no
position.

The paper reports that meta-tokens lower the entropy of the next token (by about 1.40 nats) and raise logits (by about
1.26). How exactly it measured is in no source found; the definitions here are ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_pretrain_ext.meta_tokens.attach import required, unwrapped
from hf_pretrain_ext.meta_tokens.attention import positions_of
from hf_pretrain_ext.meta_tokens.places import survey
from hf_pretrain_ext.meta_tokens.probe import quiet
from hf_pretrain_ext.values import shown

__all__ = [
    "AttentionFigures",
    "EntropyFigures",
    "attention_figures",
    "entropy_figures",
    "plot_diagnostics",
    "zeroed_positions",
]


@dataclass(frozen=True)
class AttentionFigures:
    """
    Who attends to meta-tokens.

    Attributes:
        positions (`Tensor`): `(batch, meta)`, where they stand, −1 at the end of rows that have fewer.
        among (`Tensor`): `(layers, batch, heads, meta, meta)`, meta-attention: rows attend to columns. 0 for rows
            that are none. Without layers where the model has no meta-attention.
        received (`Tensor`, *optional*): `(layers, heads)`, share of the attention of text tokens that goes to
            meta-tokens in the model's own self-attention, over those that see one. None where the model does not
            return its attention.
        chance (`float`): the share that they would get if attention were even.
    """

    positions: Tensor
    among: Tensor
    received: Tensor | None
    chance: float


@dataclass(frozen=True)
class EntropyFigures:
    """
    How the next token of text is predicted with meta-tokens in front of it, and by the same text without any.

    Means over predictions, in nats; each for all predictions and for those made at a meta-token (`..._at_meta`, NaN
    if there are none). The meta-token itself is no candidate.

    Attributes:
        predictions, predictions_at_meta (`int`): how many.
        entropy_with, entropy_without (`float`): of the distribution over the next token. The paper's drop in entropy
            is taken to be the second less the first.
        loss_with, loss_without (`float`): −log p of the token that came.
        logit_boost (`float`): largest logit with meta-tokens less largest logit without.
    """

    predictions: int
    predictions_at_meta: int
    entropy_with: float
    entropy_without: float
    loss_with: float
    loss_without: float
    logit_boost: float
    entropy_with_at_meta: float
    entropy_without_at_meta: float
    loss_with_at_meta: float
    loss_without_at_meta: float
    logit_boost_at_meta: float

    @property
    def entropy_drop(self) -> float:
        return self.entropy_without - self.entropy_with

    @property
    def entropy_drop_at_meta(self) -> float:
        return self.entropy_without_at_meta - self.entropy_with_at_meta


def _checked(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Any, Tensor, Tensor]:
    """The model unwrapped, and ids and mask of equal shape."""
    required(model)
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be a tensor of shape (batch, length), got {shown(input_ids)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, and input_ids {tuple(input_ids.shape)}")
    return unwrapped(model), input_ids, mask


def attention_figures(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> AttentionFigures:
    """
    Attention to meta-tokens, from one forward pass in evaluation mode.

    Args:
        model ([`~transformers.PreTrainedModel`]): one with meta-tokens.
        input_ids (`Tensor`): `(batch, length)`, with meta-tokens in them.
        attention_mask (`Tensor`, *optional*): the same, 0 where padding stands.

    Returns:
        [`AttentionFigures`]

    Raises:
        `ValueError`: the model has no meta-tokens, or `input_ids` holds none.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, attach_meta_attention
    >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> attach_meta_attention(model, MetaAttentionConfig(token_id=31))
    >>> attention_figures(model, torch.tensor([[31, 3, 31, 4]])).among[0, 0, :, 0].tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    inner, ids, mask = _checked(model, input_ids, attention_mask)
    tokens = required(model)
    positions = positions_of(ids, tokens.passes.token_id)
    if not positions.shape[1]:
        raise ValueError(f"input_ids holds no meta-token ({tokens.passes.token_id}). Insert some first")
    maps: dict[int, Tensor] = {}

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        hidden, seen, rotary = args[:3]
        query, key, _ = module.heads(hidden, rotary)
        scores = query.float() @ module.repeat(key).float().transpose(2, 3) / module.head_dim**0.5
        count = scores.shape[-1]
        allowed = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril() if seen is None else seen
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        maps[module.layer] = (weights * (positions >= 0).to(weights.device)[:, None, :, None]).cpu()

    handles = [site.attention.register_forward_pre_hook(keep) for site in tokens.sites]
    try:
        with quiet(inner, training=False), _eager(inner) as visible:
            more = {"output_attentions": True} if visible else {}
            found = inner(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    finally:
        for handle in handles:
            handle.remove()
    among = torch.stack([maps[layer] for layer in sorted(maps)]) if maps else torch.zeros(0, len(ids), 0, 0, 0)
    meta, text = (ids == tokens.passes.token_id) & mask.bool(), (ids != tokens.passes.token_id) & mask.bool()
    chance = meta.cumsum(1) / mask.cumsum(1).clamp(min=1)
    counted = text & (meta.cumsum(1) > 0)
    received = [
        (each.float() * meta[:, None, None].to(each)).sum(-1).transpose(1, 2)[counted.to(each.device)].mean(0).cpu()
        for each in (getattr(found, "attentions", None) or ())
        if each is not None
    ]
    return AttentionFigures(
        positions.cpu(),
        among,
        torch.stack(received) if received else None,
        float(chance[counted].mean()) if bool(counted.any()) else float("nan"),
    )


@contextmanager
def _eager(model: Any) -> Iterator[bool]:
    """The attention that returns its weights, for the time being; whether there is one."""
    kept = getattr(model.config, "_attn_implementation", None)
    try:
        model.set_attn_implementation("eager")
        visible = True
    except (AttributeError, ValueError, ImportError):
        visible = False
    try:
        yield visible
    finally:
        if visible and kept is not None:
            model.set_attn_implementation(kept)


def entropy_figures(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> EntropyFigures:
    """
    Entropy, loss and logits of the next token with the meta-tokens of `input_ids`, and with none of them.

    Each row is run twice, by itself. A token of text is predicted by whatever stands in front of it: with meta-tokens
    that may be one of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): one with meta-tokens.
        input_ids (`Tensor`): `(batch, length)`, with meta-tokens in them.
        attention_mask (`Tensor`, *optional*): the same, 0 where padding stands.

    Returns:
        [`EntropyFigures`]

    Raises:
        `ValueError`: the model has no meta-tokens, or there is nothing to predict.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, attach_meta_attention
    >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> attach_meta_attention(model, MetaAttentionConfig(token_id=31))
    >>> figures = entropy_figures(model, torch.tensor([[5, 31, 3, 31, 4]]))
    >>> figures.predictions, figures.predictions_at_meta
    (2, 2)
    """
    inner, ids, mask = _checked(model, input_ids, attention_mask)
    number = required(model).passes.token_id
    kept: list[tuple[Tensor, Tensor]] = []
    for tokens, real in zip(ids, mask.bool(), strict=True):
        row = tokens[real]
        text = (row != number).nonzero().flatten()[1:]  # nothing stands in front of the first
        text = text[text > 0]
        plain = row[row != number]
        if not len(text):
            continue
        with quiet(inner, training=False):
            with_meta = inner(input_ids=row[None], use_cache=False).logits[0, text - 1].float()
            without = inner(input_ids=plain[None], use_cache=False).logits[0, :-1].float()
        measured = torch.stack([_measure(logits, row[text], number) for logits in (with_meta, without)])
        kept.append((measured.double().cpu(), (row[text - 1] == number).cpu()))
    if not kept:
        raise ValueError("input_ids holds no token of text behind another, so nothing is predicted. Pass longer rows")
    figures, at_meta = torch.cat([each for each, _ in kept], dim=1), torch.cat([each for _, each in kept])
    every, there = figures.mean(1), figures[:, at_meta].mean(1)
    return EntropyFigures(
        len(at_meta),
        int(at_meta.sum()),
        *_told(every),
        *_told(there),
    )


def _measure(logits: Tensor, targets: Tensor, number: int) -> Tensor:
    """Entropy, loss and largest logit of each prediction: `(predictions, 3)`."""
    logits = logits.index_fill(-1, torch.tensor([number], device=logits.device), -torch.inf)
    logs = logits.log_softmax(-1)
    entropy = torch.special.entr(logs.exp()).sum(-1)
    return torch.stack([entropy, -logs.gather(1, targets[:, None])[:, 0], logits.amax(-1)], dim=-1)


def _told(means: Tensor) -> tuple[float, float, float, float, float]:
    (entropy, loss, largest), (plain_entropy, plain_loss, plain_largest) = means.tolist()
    return entropy, plain_entropy, loss, plain_loss, largest - plain_largest


def plot_diagnostics(path: Any, attention: AttentionFigures, entropy: EntropyFigures) -> None:
    """
    Draws meta-attention (mean over layers, rows and heads), the attention that meta-tokens receive, and the entropies.

    Args:
        path (`str` or `PathLike`): of the PNG file.
        attention ([`AttentionFigures`]), entropy ([`EntropyFigures`]): what was measured.

    Raises:
        `ImportError`: matplotlib is missing (`pip install "hf-pretrain-ext[report]"`).
    """
    from hf_pretrain_ext.report.drawing import COLOURS, new_figure, save_png, style

    with style():
        figure = new_figure(height=3.2)
        left, middle, right = figure.subplots(1, 3)
        if attention.among.numel():
            image = left.imshow(attention.among.mean((0, 1, 2)).numpy(), vmin=0, vmax=1, cmap="viridis")
            figure.colorbar(image, ax=left, shrink=0.8)
            left.grid(False)
        left.set(title="Meta-attention, mean", xlabel="to meta-token", ylabel="of meta-token")
        if attention.received is not None:
            for layer, heads in enumerate(attention.received):
                middle.plot([layer] * len(heads), heads.numpy(), "o", color=COLOURS[0], alpha=0.6)
            middle.axhline(attention.chance, color=COLOURS[1], linestyle="--", label="if it were even")
            middle.legend()
        middle.set(title="Self-attention to meta-tokens, a head a dot", xlabel="layer", ylabel="share")
        bars = {
            "all": (entropy.entropy_without, entropy.entropy_with),
            "at a meta-token": (entropy.entropy_without_at_meta, entropy.entropy_with_at_meta),
        }
        for place, (label, index) in enumerate((("without", 0), ("with meta-tokens", 1))):
            heights = [0.0 if each[index] != each[index] else each[index] for each in bars.values()]
            right.bar([n + 0.4 * place for n in range(2)], heights, width=0.38, color=COLOURS[place], label=label)
        right.set_xticks([0.2, 1.2], list(bars))
        right.set(title="Entropy of the next token", ylabel="nats")
        right.legend()
        save_png(figure, path)


@contextmanager
def zeroed_positions(model: Any) -> Iterator[None]:
    """
    Inside, meta-tokens have no position: an analysis, not a way to use the model.

    With learned positions their rows are zero; with rotary embeddings they are not turned, as if at position 0, in
    self-attention and meta-attention alike. (The paper zeroes the encoding of meta-tokens at inference; what that
    means for rotations is our reading.)

    Args:
        model ([`~transformers.PreTrainedModel`]): one with meta-tokens, called with `input_ids`.

    Raises:
        `ValueError`: the model has no meta-tokens, or positions that are not encoded in tokens (ALiBi).

    Example:

    ```python
    with zeroed_positions(model):
        figures = entropy_figures(model, input_ids)
    ```
    """
    tokens, inner = required(model), unwrapped(model)
    meta: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("zeroed_positions looks for meta-tokens in input_ids. Call the model with them")
        meta["here"] = ids == tokens.passes.token_id

    def at_origin(args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None) -> Any:
        def zero(positions: Tensor) -> Tensor:
            here = meta["here"].to(positions.device)
            return torch.where(here, 0, positions.expand(len(here), -1))

        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": zero(kwargs["position_ids"])}
        if index is not None and index < len(args):
            return (*args[:index], zero(args[index]), *args[index + 1 :]), kwargs
        raise ValueError("a rotary embedding was called without position_ids, so positions cannot be zeroed")

    def blank(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * ~meta["here"].to(output.device).unsqueeze(-1)

    handles = [inner.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        for module, kind, index in _encodings(inner, tokens.places):
            if kind == "learned":
                handles.append(module.register_forward_hook(blank))
            else:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, index=index: at_origin(args, kwargs, index), with_kwargs=True
                    )
                )
        if len(handles) == 1:
            raise ValueError(
                f"{type(inner).__name__} encodes no positions in its tokens (ALiBi biases attention by distance), so "
                "there is nothing to zero"
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encodings(model: Any, places: Any) -> Iterator[tuple[nn.Module, str, int | None]]:
    """Modules that positions come from: tables, rotary embeddings, or layers that turn by a table of their own."""
    found = survey(model) if not places else None
    places = places if found is None else found.places
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", 0)
    layers = found.layers if found is not None else [site.layer for site in required(model).sites]
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        names = list(inspect.signature(module.forward).parameters)
        if isinstance(module, nn.Embedding):
            if module is not model.get_input_embeddings() and module.num_embeddings >= limit > 0:
                yield module, "learned", None
        elif "position_ids" in names and not list(module.parameters()):
            yield module, "rotary", names.index("position_ids")
    for layer, place in zip(layers, places, strict=True):
        if place.rotary is not None and place.rotary.table is not None:
            yield layer, "rotary", None
