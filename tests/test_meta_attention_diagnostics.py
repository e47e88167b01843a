"""What is told of meta-tokens in a model, against the same computed another way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from meta_attention_reference import META, build, ids
from torch import Tensor

from hf_pretrain_ext.meta_tokens import (
    MetaAttentionConfig,
    attach_meta_attention,
    attached,
    attention_figures,
    detach_meta_attention,
    entropy_figures,
    plot_diagnostics,
    zeroed_positions,
)


def by_hand(attention: Any, hidden: Tensor, positions: list[int], angle: Tensor | None) -> Tensor:
    """Weights `(heads, meta, meta)` of one row, head by head."""
    rows = hidden[positions]
    normed = attention.norm(rows)
    size, shared = attention.head_dim, attention.num_heads // attention.num_key_value_heads
    made = torch.zeros(attention.num_heads, len(positions), len(positions))
    for head in range(attention.num_heads):
        query = normed @ attention.to_query.weight[head * size : (head + 1) * size].T
        group = head // shared
        key = normed @ attention.to_key.weight[group * size : (group + 1) * size].T
        if angle is not None:
            turn = torch.polar(torch.ones_like(angle[positions]), angle[positions])
            query, key = (
                torch.view_as_real(torch.complex(*each.chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2)
                for each in (query, key)
            )
        for i in range(len(positions)):
            scores = torch.stack([query[i] @ key[j] / math.sqrt(size) for j in range(i + 1)])
            made[head, i, : i + 1] = scores.exp() / scores.exp().sum()
    return made


def test_meta_attention_is_what_it_computes() -> None:
    model, tokens = build("Llama"), ids(1, 12)
    figures = attention_figures(model, tokens)
    assert figures.positions.tolist() == [[3, 7, 9]] and figures.among.shape == (2, 1, 2, 3, 3)
    with torch.no_grad():
        layer, site = model.model.layers[0], attached(model).sites[0]  # type: ignore[union-attr]
        x = model.model.embed_tokens(tokens)
        order = torch.arange(12)[None]
        turns = model.model.rotary_emb(x, order)
        seen = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        residual = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=turns, attention_mask=seen)[0]
        angle = order[0, :, None] * model.model.rotary_emb.inv_freq
        expected = by_hand(site.attention, residual[0], [3, 7, 9], angle)
    assert torch.allclose(figures.among[0, 0], expected, atol=1e-5)
    assert torch.allclose(figures.among.sum(-1), torch.ones(2, 1, 2, 3), atol=1e-6)


def test_attention_of_rows_with_fewer_and_of_padding() -> None:
    model = build("Llama")
    tokens = ids(2, 12)
    mask = torch.ones_like(tokens)
    figures = attention_figures(model, tokens, mask)
    assert figures.positions.tolist() == [[3, 7, 9], [7, 9, -1]]
    assert not bool(figures.among[:, 1, :, 2].any())
    alone = attention_figures(model, tokens[1:])
    assert torch.allclose(figures.among[:, 1, :, :2, :2], alone.among[:, 0], atol=1e-6)


def test_attention_that_meta_tokens_receive() -> None:
    """Even attention in a model whose queries are zero gives them their share."""
    model, tokens = build("Llama"), ids(1, 12)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    kept = model.config._attn_implementation
    figures = attention_figures(model, tokens)
    assert model.config._attn_implementation == kept
    assert figures.received is not None and figures.received.shape == (2, 2)
    shares = [sum(p < t for p in (3, 7, 9)) / (t + 1) for t in range(12) if t > 3 and t not in (7, 9)]
    assert figures.chance == pytest.approx(sum(shares) / len(shares))
    assert torch.allclose(figures.received, torch.full((2, 2), figures.chance), atol=1e-6)


def test_entropies_by_hand() -> None:
    model = build("Llama")
    row = torch.tensor([[5, META, 9, META, META, 11, 12, META]])
    plain = torch.tensor([[5, 9, 11, 12]])
    figures = entropy_figures(model, row)
    with torch.no_grad():
        with_meta = model(row).logits[0].double()
        without = model(plain).logits[0].double()

    def tell(logits: Tensor, target: int) -> tuple[float, float, float]:
        others = torch.cat([logits[:META], logits[META + 1 :]])
        p = others.softmax(0)
        return float(-(p * p.log()).sum()), -math.log(float(p[target])), float(others.max())

    # 9 is predicted by the first meta-token, 11 by the third, 12 by 11.
    ours = [tell(with_meta[1], 9), tell(with_meta[4], 11), tell(with_meta[5], 12)]
    theirs = [tell(without[0], 9), tell(without[1], 11), tell(without[2], 12)]
    assert (figures.predictions, figures.predictions_at_meta) == (3, 2)
    for index, name in enumerate(("entropy", "loss")):
        for rows, kind in ((ours, "with"), (theirs, "without")):
            values = [each[index] for each in rows]
            assert getattr(figures, f"{name}_{kind}") == pytest.approx(sum(values) / 3, rel=1e-5)
            assert getattr(figures, f"{name}_{kind}_at_meta") == pytest.approx(sum(values[:2]) / 2, rel=1e-5)
    boosts = [a[2] - b[2] for a, b in zip(ours, theirs, strict=True)]
    assert figures.logit_boost == pytest.approx(sum(boosts) / 3, rel=1e-4, abs=1e-6)
    assert figures.logit_boost_at_meta == pytest.approx(sum(boosts[:2]) / 2, rel=1e-4, abs=1e-6)
    assert figures.entropy_drop == pytest.approx(figures.entropy_without - figures.entropy_with)
    assert figures.entropy_drop_at_meta == pytest.approx(
        figures.entropy_without_at_meta - figures.entropy_with_at_meta
    )


def test_padding_and_rows_of_their_own_do_not_change_the_means() -> None:
    model, tokens = build("Llama"), ids(2, 10, at=(2, 5, 9))
    pad = torch.zeros(2, 3, dtype=torch.long)
    padded = entropy_figures(model, torch.cat([pad, tokens], 1), torch.cat([pad, torch.ones_like(tokens)], 1))
    assert padded == entropy_figures(model, tokens)
    each = [entropy_figures(model, tokens[n : n + 1]) for n in range(2)]
    total = sum(figures.predictions for figures in each)
    mean = sum(figures.loss_with * figures.predictions for figures in each) / total
    assert padded.predictions == total and padded.loss_with == pytest.approx(mean)


def test_measuring_changes_nothing() -> None:
    model, tokens = build("Llama").train(), ids()
    drawn = torch.get_rng_state()
    attention_figures(model, tokens)
    entropy_figures(model, tokens)
    with zeroed_positions(model):
        pass
    assert torch.equal(drawn, torch.get_rng_state()) and all(module.training for module in model.modules())
    assert ours(model) == ours(build("Llama"))


def ours(model: Any) -> list[str]:
    """Hooks of this package; transformers leaves some of its own for attention weights."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*_hooks(module._forward_hooks), *_hooks(module._forward_pre_hooks))
    ]
    return sorted(hook.__qualname__ for hook in hooks if hook.__module__.startswith("hf_pretrain_ext"))


def _hooks(table: dict[int, Any]) -> list[Any]:
    return [hook for hook in table.values() if hasattr(hook, "__qualname__")]


def test_what_cannot_be_measured_is_named() -> None:
    model = build("Llama")
    with pytest.raises(ValueError, match="has no meta-tokens"):
        attention_figures(tiny.model(), ids())
    with pytest.raises(ValueError, match=r"holds no meta-token \(63\)"):
        attention_figures(model, torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids must be a tensor of shape"):
        entropy_figures(model, torch.ones(5, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        entropy_figures(model, ids(), torch.ones(1, 2))
    with pytest.raises(ValueError, match="nothing is predicted"):
        entropy_figures(model, torch.tensor([[META, 5, META]]))


def test_without_meta_attention() -> None:
    model = architectures.build("Llama")
    attach_meta_attention(model, MetaAttentionConfig(token_id=META, attention=False))
    figures = attention_figures(model, ids())
    assert figures.among.numel() == 0 and figures.received is not None
    assert entropy_figures(model, ids()).predictions > 0


def test_it_is_drawn(tmp_path: Path) -> None:
    model, tokens = build("Llama"), ids()
    plot_diagnostics(tmp_path / "meta.png", attention_figures(model, tokens), entropy_figures(model, tokens))
    assert (tmp_path / "meta.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    none = entropy_figures(model, torch.tensor([[5, 6, 7]]))
    assert math.isnan(none.entropy_with_at_meta)
    plot_diagnostics(tmp_path / "none.png", attention_figures(model, tokens), none)


# Positions zeroed


def test_learned_positions_are_zero_at_meta_tokens() -> None:
    model, tokens = build("GPT-2"), ids(1, 10)
    base = model.transformer
    with torch.no_grad():
        zero = (tokens == META).unsqueeze(-1)
        embeds = base.wte(tokens) + base.wpe(torch.arange(10)[None]).masked_fill(zero, 0)
        # The table adds its rows by itself: take them off first.
        positions = (tokens[0] == META).nonzero().flatten()[None]
        without = embeds - base.wpe(torch.arange(10)[None])
        expected = model(inputs_embeds=without, meta_positions=positions).logits
        plain = model(tokens).logits
        with zeroed_positions(model):
            made = model(tokens).logits
        assert torch.allclose(made, expected, atol=2e-6) and not torch.allclose(made, plain, atol=1e-3)
        assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-NeoX", "GPT-J", "CodeGen"])
def test_rotations_are_none_at_meta_tokens(name: str) -> None:
    """As if those tokens stood at position 0, while attention still goes by their order."""
    model, tokens = build(name), ids(2, 10)
    order = torch.where(tokens == META, 0, torch.arange(10)[None])
    documents = torch.where(torch.tensor([[3, 7, 9], [7, 9, -1]]) < 0, -1, 0)
    positions = torch.tensor([[3, 7, 9], [7, 9, -1]])
    with torch.no_grad():
        plain = model(tokens).logits
        # With a mask, positions that restart do not part documents.
        expected = model(
            tokens,
            position_ids=order,
            attention_mask=torch.ones_like(tokens),
            meta_positions=positions,
            meta_documents=documents,
        ).logits
        with zeroed_positions(model):
            made = model(tokens, attention_mask=torch.ones_like(tokens)).logits
        assert torch.allclose(made, expected, atol=2e-6) and not torch.allclose(made, plain, atol=1e-4)
        assert torch.equal(model(tokens).logits, plain)


def test_zeroed_positions_hold_in_generation() -> None:
    model, tokens = build("Llama"), ids(1, 10)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with zeroed_positions(model):
        made = [
            model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=use, **settings)
            for use in (True, False)
        ]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["BLOOM", "MPT"])
def test_biases_by_distance_have_nothing_to_zero(name: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match="encodes no positions in its tokens"), zeroed_positions(model):
        pass
    detach_meta_attention(model)
    with pytest.raises(ValueError, match="has no meta-tokens"), zeroed_positions(model):
        pass


def test_zeroing_needs_the_ids() -> None:
    model = build("Llama")
    with zeroed_positions(model), pytest.raises(ValueError, match="looks for meta-tokens in input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 16), meta_positions=torch.tensor([[0]]))
