"""Meta-attention written out another way: dense, masked, in float64, one row and head at a time.

And decoder layers of several families as their papers have them, with meta-attention where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import architectures
import torch
import transformers
from torch import Tensor

from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, attach_meta_attention, attached

META = 63
"""The last token of the tiny vocabularies."""

RECURRENT = ("Mamba", "Mamba 2", "RWKV")
FAMILIES = [name for name in architectures.CAUSAL if name not in RECURRENT]
PARALLEL = ("Phi", "GPT-J", "GPT-NeoX", "CodeGen", "Falcon", "Cohere")
"""Families whose layers compute attention and feed-forward side by side."""


def scramble(model: Any, seed: int = 0, std: float = 0.5) -> Any:
    """Random weights in every sub-layer, the output projection included."""
    generator = torch.Generator().manual_seed(seed)
    tokens = attached(model)
    assert tokens is not None
    with torch.no_grad():
        for site in tokens.sites:
            for name, parameter in site.attention.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * std + (1 if name == "norm.weight" else 0))
    return model


def build(name: str, scrambled: bool = True, **settings: Any) -> Any:
    """A tiny model of a family with meta-attention in it."""
    model = architectures.build(name).eval()
    attach_meta_attention(model, MetaAttentionConfig(**{"token_id": META, **settings}))
    return scramble(model) if scrambled else model


def ids(rows: int = 2, length: int = 14, seed: int = 1, at: tuple[int, ...] = (3, 7, 9)) -> Tensor:
    """Rows without special tokens, with meta-tokens `at`; the second row lacks its first one."""
    made = torch.randint(3, META, (rows, length), generator=torch.Generator().manual_seed(seed))
    made[:, list(at)] = META
    if rows > 1:
        made[1, at[0]] = 5
    return made


def dense(
    hidden: Tensor,
    weights: dict[str, Tensor],
    meta: Tensor,
    heads: int,
    shared: int,
    documents: Tensor | None = None,
    angles: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-5,
    interleaved: bool = False,
    scaling: float = 1.0,
) -> Tensor:
    """What meta-attention adds to the residual `(batch, length, hidden)`, by softmax(Q·Kᵀ/√d + M + P)·V.

    `angles` `(batch, length, pairs)` turn pairs of dimensions of queries and keys, as complex numbers.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = hidden.double()
    if norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights["norm.weight"] + weights.get("norm.bias", 0)

    def project(name: str, rows: Tensor) -> Tensor:
        return rows @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turn(rows: Tensor, row: int) -> Tensor:
        if angles is None:
            return rows
        angle = angles[row].double()
        pairs = angle.shape[-1]
        first, second = (
            (rows[:, : 2 * pairs : 2], rows[:, 1 : 2 * pairs : 2])
            if interleaved
            else (rows[:, :pairs], rows[:, pairs : 2 * pairs])
        )
        turned = torch.complex(first, second) * scaling * torch.exp(1j * angle)
        if interleaved:
            return torch.cat([torch.view_as_real(turned).flatten(-2), rows[:, 2 * pairs :]], dim=-1)
        return torch.cat([turned.real, turned.imag, rows[:, 2 * pairs :]], dim=-1)

    query, key, value = (project(name, x) for name in ("to_query", "to_key", "to_value"))
    size = query.shape[-1] // heads
    out = torch.zeros(*hidden.shape[:2], heads * size, dtype=torch.float64)
    length = hidden.shape[1]
    for row in range(len(hidden)):
        for head in range(heads):
            group = head // (heads // shared)
            q = turn(query[row, :, head * size : (head + 1) * size], row)
            k = turn(key[row, :, group * size : (group + 1) * size], row)
            v = value[row, :, group * size : (group + 1) * size]
            scores = q @ k.T / size**0.5
            for i in range(length):
                for j in range(length):
                    same = documents is None or documents[row, i] == documents[row, j]
                    if not (meta[row, i] and meta[row, j] and j <= i and same):
                        scores[i, j] = -torch.inf
            out[row, :, head * size : (head + 1) * size] = scores.softmax(-1).nan_to_num(0) @ v
    return project("to_output", out) * meta.unsqueeze(-1)


def explicit(name: str, model: Any, tokens: Tensor) -> Tensor:
    """The last hidden states of a family, its layers written out, its attention and feed-forward modules called."""
    base = model.base_model
    batch, length = tokens.shape
    seen = torch.full((length, length), -torch.inf).triu(1)[None, None].expand(batch, 1, -1, -1)
    order = torch.arange(length)[None]
    there = attached(model)
    assert there is not None
    config, meta = there.config, tokens == META

    def add(number: int, residual: Tensor, angles: Tensor | None = None, **how: Any) -> Tensor:
        weights = dict(there.sites[number].attention.state_dict())
        made = dense(
            residual,
            weights,
            meta,
            config.num_heads or 0,
            config.num_key_value_heads or 0,
            angles=None if angles is None else angles.expand(batch, -1, -1),
            norm=config.norm,
            eps=config.eps or 0,
            **how,
        )
        return made.to(residual.dtype)

    with torch.no_grad():
        found: Tensor = _LAYERS[name](base, tokens, seen, order, add)
    return found


def _angles(rotary: Any, order: Tensor) -> Tensor:
    return order[..., None].double() * rotary.inv_freq.double()


def _llama(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.embed_tokens(tokens) * getattr(base, "embedding_multiplier", 1)
    turns, angles = base.rotary_emb(x, order), _angles(base.rotary_emb, order)
    scaling = base.rotary_emb.attention_scaling
    for number, layer in enumerate(base.layers):
        c = getattr(layer, "residual_multiplier", 1)
        made = layer.self_attn(layer.input_layernorm(x), position_embeddings=turns, attention_mask=seen)[0]
        x = x + c * made
        x = x + add(number, x, angles, scaling=scaling)
        x = x + c * layer.mlp(layer.post_attention_layernorm(x))
    return base.norm(x)


def _gemma2(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.embed_tokens(tokens)  # scales by itself, or below
    if torch.equal(x, torch.nn.functional.embedding(tokens, base.embed_tokens.weight)):
        x = x * torch.tensor(base.config.hidden_size**0.5, dtype=x.dtype)
    turns, angles = base.rotary_emb(x, order), _angles(base.rotary_emb, order)
    window = torch.ones_like(seen[0, 0]).tril(-base.config.sliding_window).bool()
    for number, layer in enumerate(base.layers):
        sliding = layer.self_attn.is_sliding if hasattr(layer.self_attn, "is_sliding") else number % 2 == 0
        mask = seen.masked_fill(window, -torch.inf) if sliding else seen
        made = layer.self_attn(layer.input_layernorm(x), position_embeddings=turns, attention_mask=mask)[0]
        x = x + layer.post_attention_layernorm(made)
        x = x + add(number, x, angles)
        x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return base.norm(x)


def _gpt2(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.wte(tokens) + base.wpe(order)
    for number, block in enumerate(base.h):
        x = x + block.attn(block.ln_1(x), attention_mask=seen)[0]
        x = x + add(number, x)
        x = x + block.mlp(block.ln_2(x))
    return base.ln_f(x)


def _opt(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    decoder = base.decoder
    x = decoder.embed_tokens(tokens) + torch.nn.functional.embedding(order + 2, decoder.embed_positions.weight)
    for number, layer in enumerate(decoder.layers):
        x = x + layer.self_attn(layer.self_attn_layer_norm(x), attention_mask=seen)[0]
        x = x + add(number, x)
        x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
    return decoder.final_layer_norm(x)


def _neox(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.embed_in(tokens)
    turns, angles = base.rotary_emb(x, order), _angles(base.rotary_emb, order)
    for number, layer in enumerate(base.layers):
        made = layer.attention(layer.input_layernorm(x), attention_mask=seen, position_embeddings=turns)[0]
        beside = layer.mlp(layer.post_attention_layernorm(x))
        x = x + made + beside + add(number, x + made, angles)
    return base.final_layer_norm(x)


def _cohere(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.embed_tokens(tokens)
    turns, angles = base.rotary_emb(x, order), _angles(base.rotary_emb, order)
    for number, layer in enumerate(base.layers):
        normed = layer.input_layernorm(x)
        made = layer.self_attn(normed, position_embeddings=turns, attention_mask=seen)[0]
        x = x + made + layer.mlp(normed) + add(number, x + made, angles, interleaved=True)
    return base.norm(x)


def _gptj(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.wte(tokens)
    dims = base.config.rotary_dim
    angles = order[..., None].double() / 10000 ** (torch.arange(0, dims, 2).double() / dims)
    # Newer releases turn queries and keys by angles made once, older ones in each layer.
    turned = {"position_embeddings": base.rotary_emb(x, order.expand(1, -1))} if hasattr(base, "rotary_emb") else {}
    for number, block in enumerate(base.h):
        normed = block.ln_1(x)
        made = block.attn(normed, attention_mask=seen, position_ids=order.expand(len(x), -1), **turned)[0]
        x = x + made + block.mlp(normed) + add(number, x + made, angles, interleaved=True)
    return base.ln_f(x)


def _bloom(base: Any, tokens: Tensor, seen: Tensor, order: Tensor, add: Callable[..., Tensor]) -> Tensor:
    x = base.word_embeddings_layernorm(base.word_embeddings(tokens))
    alibi = base.build_alibi_tensor(torch.ones_like(tokens), base.num_heads, dtype=x.dtype)
    for number, block in enumerate(base.h):
        x = block.self_attention(block.input_layernorm(x), x, alibi=alibi, attention_mask=seen)[0]
        x = x + add(number, x)
        x = block.mlp(block.post_attention_layernorm(x), x)
    return base.ln_f(x)


_LAYERS: dict[str, Callable[..., Tensor]] = {
    "Llama": _llama,
    "Granite": _llama,
    "Llama, YaRN": _llama,
    "Gemma 2": _gemma2,
    "GPT-2": _gpt2,
    "OPT": _opt,
    "GPT-NeoX": _neox,
    "Cohere": _cohere,
    "GPT-J": _gptj,
    "BLOOM": _bloom,
}
WRITTEN_OUT = tuple(_LAYERS)


def build_written_out(name: str) -> Any:
    """A family of which [`explicit`] knows the layers; Granite with its multiplier, Llama also with YaRN."""
    llama: dict[str, Any] = dict(architectures.CAUSAL["Llama"][1])
    torch.manual_seed(0)
    if name == "Granite":
        made: Any = transformers.GraniteForCausalLM(transformers.GraniteConfig(**llama, residual_multiplier=0.22))
    elif name == "Llama, YaRN":
        scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, rope_parameters=scaled))
    else:
        made = architectures.build(name)
    attach_meta_attention(made.eval(), MetaAttentionConfig(token_id=META))
    return scramble(made)
