"""Meta-tokens and meta-attention put into a model, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_pretrain_ext.meta_tokens.attention import MetaAttention
from hf_pretrain_ext.meta_tokens.config import KEY, SECTION, MetaAttentionConfig
from hf_pretrain_ext.meta_tokens.fused import MASKED
from hf_pretrain_ext.meta_tokens.layers import MetaSite, Passes, put_in, take_out
from hf_pretrain_ext.meta_tokens.places import MetaPlace, Survey, drops_after, survey
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import shown
from hf_pretrain_ext.vocabulary import RECORD, add_tokens, fit_embeddings

__all__ = [
    "MetaTokens",
    "add_meta_tokens",
    "allow_meta_tokens",
    "attach_meta_attention",
    "attached",
    "detach_meta_attention",
    "keep_tables",
    "required",
    "unwrapped",
]


@dataclass
class MetaTokens:
    """What is in a model, and how to take it out. [`attached`] finds it."""

    config: MetaAttentionConfig
    places: tuple[MetaPlace, ...]
    passes: Passes
    sites: list[MetaSite]
    handles: list[Any]
    masked: bool
    suppressed: bool = False
    came: bool = False  # with the model's files: what these entered for the token is to go with it
    before: dict[str, Any] = field(default_factory=dict)

    def mask(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the output embedding: the meta-token's logit, in place."""
        if self.masked and isinstance(output, Tensor):
            # Unrecorded: its probability is 0, and so is its gradient; recorded, the backward pass would copy the
            # gradient of all logits for it.
            with torch.no_grad():
                output.select(-1, self.passes.token_id).fill_(max(torch.finfo(output.dtype).min, MASKED))

    def mask_again(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model: models that squash their logits (Gemma 2) have made a number of it again."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and not torch.is_grad_enabled():
            self.mask(module, args, logits)

    def describe(self) -> list[str]:
        """What was found, for people."""
        if not self.places:
            return ["meta-tokens without meta-attention"]
        first = self.places[0]
        kinds = sorted({place.kind for place in self.places})
        beside = (
            "after self-attention, before the feed-forward"
            if kinds == ["sequential"]
            else "beside self-attention and feed-forward, which the layers compute in parallel"
        )
        if any(site.rotary is not None for site in self.sites):
            turned = "rotated as the model's own queries and keys"
        elif first.rotary is None:
            turned = "not rotated: the model has no rotary embedding"
        else:
            turned = "not rotated (rope='off')"
        number = sum(parameter.numel() for site in self.sites for parameter in site.attention.parameters())
        return [
            f"meta-attention in {len(self.places)} layers ({number:,} parameters), {beside} "
            f"(on the output of {first.child}); {turned}"
        ]


_ATTRIBUTE = "_meta_tokens"


def unwrapped(model: Any) -> Any:
    """The model of transformers inside wrappers: of DDP, `torch.compile`, DeepSpeed, PEFT."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def attached(model: Any) -> MetaTokens | None:
    """What [`attach_meta_attention`] put into `model`, wrapped or not; None if nothing."""
    return getattr(unwrapped(model), _ATTRIBUTE, None)


def add_meta_tokens(model: Any, tokenizer: Any, config: MetaAttentionConfig | None = None) -> int:
    """
    Gives tokenizer and model the meta-token and meta-attention: all that training and generation need.

    The token's row starts as the mean of the others' (see [`~hf_pretrain_ext.vocabulary.fit_embeddings`]);
    meta-attention starts as nothing, so the model computes what it did.

    Args:
        model ([`~transformers.PreTrainedModel`]): a decoder-only model, changed in place, before the optimizer is
            made.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): changed in place.
        config ([`MetaAttentionConfig`], *optional*): the settings.

    Returns:
        `int`: the id of the meta-token.

    Raises:
        `ValueError`: a model that cannot take it; the message says why. Neither is then changed, but for the token in
            the tokenizer.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> add_meta_tokens(model, train_tokenizer(["ab"], vocab_size=257))
    257
    >>> print(*attached(model).describe())
    meta-attention in 1 layers (1,040 parameters), after self-attention, before the feed-forward (on the output of
    self_attn); rotated as the model's own queries and keys
    """
    config = config or MetaAttentionConfig()
    inner = _fresh(model)
    if config.attention:
        survey(inner)  # What cannot be attached to is refused before anything is changed.
    [number] = add_tokens(tokenizer, [config.token])
    if config.token_id not in (None, number):
        raise ValueError(
            f"token_id={config.token_id}, but the tokenizer has {shown(config.token)} as {number}. Leave token_id out"
        )
    before = keep_tables(inner, number)
    fit_embeddings(inner, tokenizer, [number])
    attach_meta_attention(inner, MetaAttentionConfig(**{**asdict(config), "token_id": number}))
    required(inner).before = before
    return number


def keep_tables(model: Any, number: int) -> dict[str, Any]:
    """What the embeddings of a model are before the token `number` comes: for `remove_meta_tokens`."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {"input_embedding": table.weight}
    if head is not None:
        if head.weight is not table.weight:
            parts["output_embedding"] = head.weight
        if getattr(head, "bias", None) is not None:
            parts["output_bias"] = head.bias
    return {
        "rows": table.weight.shape[0],
        "row": {name: part[number].detach().clone() for name, part in parts.items() if number < len(part)},
        "fitted": getattr(model.config, RECORD, None),
    }


def _fresh(model: Any) -> Any:
    """`model` without wrappers, if nothing was put into it and it can be changed."""
    inner = unwrapped(model)
    if getattr(inner, _ATTRIBUTE, None) is not None:
        raise ValueError("the model has meta-tokens already. Take them out with remove_meta_tokens(model) first")
    sharded = [
        name for name, each in inner.named_parameters() if hasattr(each, "device_mesh") or hasattr(each, "ds_id")
    ]
    if sharded:
        raise ValueError(
            f"the model is sharded ({sharded[0]} and {len(sharded) - 1} more), and what is put in now would not be. "
            "Attach before the model is sharded, or train with DDP"
        )
    return inner


def attach_meta_attention(model: Any, config: MetaAttentionConfig) -> None:
    """
    Puts a meta-attention sub-layer into every layer of a decoder, behind its self-attention.

    The place is found by one forward pass (see [`~hf_pretrain_ext.meta_tokens.places.survey`]). From then on the model
    takes two more arguments in its batches, `meta_positions` and `meta_documents`, both `(batch, meta)`; without them
    it looks for the token in `input_ids`. Its output stays bit for bit what it was until the sub-layers are trained,
    but for the logit of the meta-token, which is masked. The token is also entered in
    `generation_config.suppress_tokens`.

    Args:
        model ([`~transformers.PreTrainedModel`]): changed in place, wrapped or not (DDP, PEFT); not yet sharded. Its
            embeddings must have a row for the token.
        config ([`MetaAttentionConfig`]): the settings, with `token_id`.

    Raises:
        `ValueError`: an architecture without such a place, or settings that do not fit it; nothing is changed then.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    >>> ids = torch.randint(0, 31, (2, 10))
    >>> before = model(ids).logits
    >>> attach_meta_attention(model, MetaAttentionConfig(token_id=31))
    >>> torch.equal(model(ids).logits[..., :31], before[..., :31])
    True
    """
    inner = _fresh(model)
    number, rows = config.token_id, inner.get_input_embeddings().weight.shape[0]
    if number is None or number >= rows:
        raise ValueError(
            f"token_id={number}, and the model has embeddings for the ids below {rows}. Use add_meta_tokens(model, "
            "tokenizer), which adds the token and its row"
        )
    handles: list[Any] = []
    settings: dict[str, Any] = {}
    sites: list[MetaSite] = []
    places: tuple[MetaPlace, ...] = ()
    text, decoder = inner.config.get_text_config(decoder=True), inner
    if config.attention:
        found = survey(inner)
        decoder, places = found.decoder, found.places
        settings = _resolved(text, config, found)
        modules = _modules(inner, replace(config, **settings), found)
    passes = Passes(number, decoder, text, config.attention)
    if config.attention:
        for layer, place, attention in zip(found.layers, places, modules, strict=True):
            sites.append(MetaSite(layer, place, passes, rotates=config.rope == "on"))
            handles.append(put_in(layer, sites[-1], attention))
    tokens = MetaTokens(replace(config, **settings), places, passes, sites, handles, masked=config.mask_logits)
    handles += passes.listen(inner, decoder)
    head = inner.get_output_embeddings()
    if head is not None and config.mask_logits:
        handles.append(head.register_forward_hook(tokens.mask))
        handles.append(inner.register_forward_hook(tokens.mask_again))
    setattr(inner, _ATTRIBUTE, tokens)
    others = getattr(inner.config, SECTION, None) or {}
    tokens.came = KEY in others
    _suppress(inner, tokens)
    setattr(inner.config, SECTION, {**others, KEY: asdict(tokens.config)})


def _resolved(text: Any, config: MetaAttentionConfig, found: Survey) -> dict[str, Any]:
    """The settings that the model decides, as numbers."""
    heads = config.num_heads or next(
        int(getattr(text, name)) for name in ("num_attention_heads", "n_heads", "n_head") if hasattr(text, name)
    )
    own = getattr(text, "num_key_value_heads", None) or heads
    shared = config.num_key_value_heads or (own if heads % own == 0 else heads)
    if heads % shared:
        raise ValueError(
            f"num_key_value_heads={shared} does not divide the {heads} heads of queries. Take a divisor of {heads}"
        )
    head_dim = config.head_dim or getattr(text, "head_dim", None) or found.hidden_size // heads
    turned = max((place.rotary.dims for place in found.places if place.rotary is not None), default=0)
    if config.rope == "on" and head_dim < turned:
        raise ValueError(
            f"head_dim={head_dim}, but the model rotates {turned} dimensions of a head. Take head_dim={turned} or "
            "more, or rope='off'"
        )
    norm = found.places[0].norm if config.norm == "model" else config.norm
    eps = found.places[0].eps if config.eps is None else config.eps
    return {"num_heads": heads, "num_key_value_heads": shared, "head_dim": head_dim, "norm": norm, "eps": eps}


def _modules(model: Any, config: MetaAttentionConfig, found: Survey) -> list[MetaAttention]:
    """One sub-layer a layer, where the layer is, initialised from the seed alone."""
    own = 0.0 if config.dropout and drops_after(model, found) else config.dropout
    std = float(getattr(model.config.get_text_config(decoder=True), "initializer_range", None) or 0.02)
    made = []
    with rng_guard(config.seed):
        for layer, place in zip(found.layers, found.places, strict=True):
            weight = next((each for each in layer.parameters() if each.is_floating_point()), None)
            module = MetaAttention(
                found.hidden_size,
                config.num_heads,  # type: ignore[arg-type]
                config.num_key_value_heads,  # type: ignore[arg-type]
                config.head_dim,  # type: ignore[arg-type]
                norm=config.norm,  # type: ignore[arg-type]
                eps=config.eps,  # type: ignore[arg-type]
                bias=config.bias,
                dropout=own,
                layout=place.rotary.layout if place.rotary is not None and config.rope == "on" else None,
                layer=place.layer,
            )
            # Drawn on the CPU in float32: the same weights on every device and in every type.
            module.initialise(std, zero_output=config.init == "zero")
            made.append(module.to(device=None if weight is None else weight.device, dtype=model.dtype))
            made[-1].train(layer.training)
    return made


def _suppress(model: Any, tokens: MetaTokens) -> None:
    """Enters the token among those that `generate` never writes."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    if tokens.passes.token_id in (settings.suppress_tokens or []):
        # Saved files hold what was entered here before; else it is the user's.
        tokens.suppressed = tokens.came
        return
    settings.suppress_tokens = [*(settings.suppress_tokens or []), tokens.passes.token_id]
    tokens.suppressed = True


def _release(model: Any, tokens: MetaTokens) -> None:
    """Undoes [`_suppress`]."""
    if tokens.suppressed:
        _leave_out(model.generation_config, tokens.passes.token_id)
        tokens.suppressed = False


def _leave_out(settings: Any, number: int) -> None:
    left = [each for each in settings.suppress_tokens or [] if each != number]
    settings.suppress_tokens = left or None


@contextmanager
def allow_meta_tokens(model: Any) -> Iterator[None]:
    """
    Inside, the model may write meta-tokens of its own accord: their logit is what it is, and they are not suppressed.

    Raises:
        `ValueError`: the model has no meta-tokens.

    Example:

    ```python
    with allow_meta_tokens(model):
        model.generate(**inputs, num_beams=4)
    ```
    """
    tokens = required(model)
    settings, masked = getattr(unwrapped(model), "generation_config", None), tokens.masked
    # Whoever entered it: this package, the files of the model, the user.
    before = getattr(settings, "suppress_tokens", None)
    try:
        tokens.masked = False
        if before:
            _leave_out(settings, tokens.passes.token_id)
        yield
    finally:
        tokens.masked = masked
        if settings is not None and before:
            settings.suppress_tokens = before


def required(model: Any) -> MetaTokens:
    """What [`attached`] finds; raises `ValueError` where there is nothing."""
    tokens = attached(model)
    if tokens is None:
        raise ValueError(
            f"{type(model).__name__} has no meta-tokens. Call add_meta_tokens(model, tokenizer), or "
            "load_meta_tokens(model, path) to load trained ones"
        )
    return tokens


def detach_meta_attention(model: Any) -> None:
    """
    Takes sub-layers, hooks and settings out of the model; its embeddings keep the row of the token.

    Raises:
        `ValueError`: the model has none.
    """
    tokens, inner = required(model), unwrapped(model)
    for handle in tokens.handles:
        handle.remove()
    for site in tokens.sites:
        take_out(site.layer)
    _release(inner, tokens)
    delattr(inner, _ATTRIBUTE)
    others = {name: value for name, value in getattr(inner.config, SECTION, {}).items() if name != KEY}
    if others:
        setattr(inner.config, SECTION, others)
    else:
        delattr(inner.config, SECTION)
