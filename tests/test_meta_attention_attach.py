"""Meta-attention in the layers of many families: where it joins, that it is what it says, how it trains."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import meta_attention_reference as reference
import pytest
import tiny
import torch
from meta_attention_reference import FAMILIES, META, PARALLEL, build, ids, scramble
from torch import Tensor

from hf_pretrain_ext.meta_tokens import (
    HINTS,
    Hint,
    MetaAttentionConfig,
    add_meta_tokens,
    attach_meta_attention,
    attached,
    detach_meta_attention,
    places,
)
from hf_pretrain_ext.meta_tokens.places import drops_after, survey
from hf_pretrain_ext.meta_tokens.probe import LayerRecord

QUICK = ("Llama", "Gemma 2", "GPT-2", "GPT-NeoX", "Mixtral", "BLOOM")


def families(*quick: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in FAMILIES]


def gradients(model: Any, *passes: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    total: Any = 0
    for batch in passes:
        total = total + model(**batch, use_cache=False).loss
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def batch(tokens: Tensor, given: bool = True) -> dict[str, Any]:
    made = {"input_ids": tokens, "labels": tokens.masked_fill(tokens == META, -100)}
    if given:
        found = [(row == META).nonzero().flatten().tolist() for row in tokens]
        width = max(map(len, found))
        made["meta_positions"] = torch.tensor([each + [-1] * (width - len(each)) for each in found])
        made["meta_documents"] = torch.where(made["meta_positions"] < 0, -1, 0)
    return made


# Where it joins


@pytest.mark.parametrize("name", FAMILIES)
def test_attaches_as_nothing_and_comes_off_again(name: str) -> None:
    model, tokens = architectures.build(name).eval(), ids()
    names, settings = list(model.state_dict()), model.config.to_dict()
    classes = [type(module) for module in model.modules()]
    generation = model.generation_config.to_dict()
    with torch.no_grad():
        before = model(tokens).logits
        drawn = torch.get_rng_state()
        attach_meta_attention(model, MetaAttentionConfig(token_id=META))
        assert torch.equal(drawn, torch.get_rng_state())
        after = model(tokens).logits
        others = torch.arange(before.shape[-1]) != META
        assert torch.equal(after[..., others], before[..., others])
        assert bool((after.softmax(-1)[..., META] == 0).all())
        added = set(model.state_dict()) - set(names)
        layers = len(attached(model).sites)  # type: ignore[union-attr]
        assert layers == 2 and {name.split(".meta_attention.")[1] for name in added} >= {
            "to_query.weight",
            "norm.weight",
        }
        scramble(model)
        third = model(tokens).logits
        # From the first meta-token of a row on, and not before it, something changes.
        changed = (third != after).any(-1)
        assert [int(row.nonzero()[0]) for row in changed] == [3, 7]
        detach_meta_attention(model)
        assert torch.equal(model(tokens).logits, before)
    assert list(model.state_dict()) == names and model.config.to_dict() == settings
    assert [type(module) for module in model.modules()] == classes
    assert model.generation_config.to_dict() == generation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_place_is_what_the_card_says(name: str) -> None:
    found = survey(architectures.build(name))
    kinds = {place.kind for place in found.places}
    assert kinds == {"parallel" if name in PARALLEL else "sequential"}
    assert {place.child for place in found.places} == {CHILDREN.get(name, "self_attn")}
    assert all(place.multiplier == 1 for place in found.places)
    assert [place.layer for place in found.places] == [0, 1]
    assert {place.rotary is None for place in found.places} == {name in UNROTATED}
    assert {place.norm for place in found.places} == {"layernorm" if name in LAYER_NORMED else "rmsnorm"}


CHILDREN = {
    "Gemma 2": "post_attention_layernorm",
    "Gemma 3": "post_attention_layernorm",
    "OLMo 2": "post_attention_layernorm",
    "Phi-3": "resid_attn_dropout",
    "MPT": "resid_attn_dropout",
    "GPT-NeoX": "post_attention_dropout",
    "BLOOM": "self_attention",
    "Falcon": "self_attention",
    **dict.fromkeys(("GPT-2", "GPT-J", "GPT-BigCode", "CodeGen"), "attn"),
}
UNROTATED = ("GPT-2", "GPT-BigCode", "OPT", "BLOOM", "MPT")
LAYER_NORMED = (
    *UNROTATED,
    "Phi",
    "GPT-J",
    "GPT-NeoX",
    "CodeGen",
    "Falcon",
    "OLMo",
    "StableLM",
    "Starcoder2",
    "Cohere",
)


@pytest.mark.parametrize("name", reference.WRITTEN_OUT)
def test_equals_the_layers_written_out(name: str) -> None:
    model, tokens = reference.build_written_out(name), ids(length=12)
    with torch.no_grad():
        ours = model.base_model(tokens).last_hidden_state
        expected = reference.explicit(name, model, tokens)
        detach_meta_attention(model)
        without = model.base_model(tokens).last_hidden_state
    assert float((ours - expected).abs().max()) < 2e-6 < 0.1 < float((ours - without).abs().max())


def test_how_a_pair_of_angles_is_laid_out() -> None:
    """Cosines first or, as GPT-J's since transformers 5.24, sines first, each of them then for two neighbours."""
    angles = torch.arange(5.0)[:, None] / 10 ** torch.arange(0, 1, 0.25)
    cos, sin = angles.cos()[None], angles.sin()[None]

    def found(*pair: Tensor) -> Any:
        return places._rotary(torch.nn.Identity(), LayerRecord(kwargs={"odd": (sin[0, 0], cos[0, 0]), "turns": pair}))

    twice, neighbours = [torch.cat([t, t], -1) for t in (cos, sin)], [t.repeat_interleave(2, -1) for t in (cos, sin)]
    assert found(*twice) == places.Rotary("half", 8, argument="turns")
    assert found(*neighbours) == places.Rotary("interleaved", 8, argument="turns")
    assert found(cos, sin) == places.Rotary("pairs", 8, argument="turns")
    assert found(sin, cos) == places.Rotary("interleaved", 8, argument="turns", sines_first=True)
    assert found(sin, sin) is None


OTHERS: dict[str, tuple[str, dict[str, Any], str, str, float]] = {
    "GPT-NeoX, sequential": ("GPTNeoX", {"use_parallel_residual": False}, "post_attention_dropout", "sequential", 1),
    "Falcon, sequential": ("Falcon", {"parallel_attn": False}, "self_attention", "sequential", 1),
    "Falcon, new": ("Falcon", {"new_decoder_architecture": True}, "self_attention", "parallel", 1),
    "StableLM, parallel": ("StableLm", {"use_parallel_residual": True}, "self_attn", "parallel", 1),
    "OPT, norm behind": (
        "OPT",
        {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
        "self_attn",
        "sequential",
        1,
    ),
    "Granite": ("Granite", {"residual_multiplier": 0.22}, "self_attn", "sequential", 0.22),
    "GPT-OSS": ("GptOss", {"num_local_experts": 4, "head_dim": 8}, "self_attn", "sequential", 1),
    "GLM-4": ("Glm4", {"head_dim": 8}, "post_self_attn_layernorm", "sequential", 1),
    "Cohere 2": ("Cohere2", {}, "self_attn", "parallel", 1),
    "Nemotron": ("Nemotron", {}, "self_attn", "sequential", 1),
}


def other(name: str) -> Any:
    import transformers

    prefix, more, *_ = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**architectures.CAUSAL["Llama"][1], **more})
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_and_forms_of_layers(name: str) -> None:
    model, tokens = other(name), ids()
    *_, child, kind, multiplier = OTHERS[name]
    place = survey(model).places[1]
    assert (place.child, place.kind, place.multiplier) == (child, kind, multiplier)
    with torch.no_grad():
        before = model(tokens).logits[..., :META]
        attach_meta_attention(model, MetaAttentionConfig(token_id=META))
        assert torch.equal(model(tokens).logits[..., :META], before)
        assert not torch.equal(scramble(model)(tokens).logits[..., :META], before)


def test_a_multiplier_that_the_config_does_not_hold_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other("Granite")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.37
    multipliers = [place.multiplier for place in survey(model).places]
    assert multipliers == pytest.approx([0.37] * 2, rel=1e-5) and 0.37 not in model.config.to_dict().values()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_places(dtype: torch.dtype) -> None:
    for name in FAMILIES:
        model = architectures.build(name)
        expected = survey(model).places
        assert survey(model.to(dtype)).places == expected, name
    granite = other("Granite")
    assert survey(granite.to(dtype)).places[0].multiplier == 0.22
    attach_meta_attention(granite, MetaAttentionConfig(token_id=META))
    made = scramble(granite)(ids()).logits
    assert made.dtype == dtype and bool(torch.isfinite(made[..., :META]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-NeoX", "Falcon", "Cohere", "GPT-2", "BLOOM"])
def test_activations_of_trained_models_do_not_hide_the_place(name: str, dtype: torch.dtype) -> None:
    """Few dimensions a thousand times larger than others, in the residual and in what the feed-forward adds to it."""
    model = architectures.build(name)
    expected = survey(model).places
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 50
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and parameter.shape[0] == 16 and "mlp" in parameter_name:
                parameter[5] *= 3000
    assert survey(model.to(dtype)).places == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mamba", "MambaForCausalLM is recurrent"),
        ("Mamba 2", "Mamba2ForCausalLM is recurrent"),
        ("RWKV", "RwkvForCausalLM is recurrent"),
        ("RoBERTa", "RobertaForMaskedLM looks ahead"),
        ("T5", "T5ForConditionalGeneration has an encoder"),
    ],
)
def test_what_has_no_such_place_is_refused_with_the_reason(name: str, reason: str) -> None:
    makers = {"RoBERTa": architectures.masked, "T5": architectures.encoder_decoder}
    model = makers[name]() if name in makers else architectures.build(name)
    names, modes = list(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=reason):
        attach_meta_attention(model, MetaAttentionConfig(token_id=META))
    assert list(model.state_dict()) == names and not hasattr(model.config, "hf_pretrain_ext")
    assert [module.training for module in model.modules()] == modes
    if name not in makers:
        attach_meta_attention(model, MetaAttentionConfig(token_id=META, attention=False))
        made = model(input_ids=ids(), meta_positions=torch.tensor([[3, 7, 9], [7, 9, -1]])).logits
        assert list(model.state_dict()) == names and bool((made.softmax(-1)[..., META] == 0).all())


def test_a_model_that_is_recurrent_in_part_is_refused() -> None:
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {**architectures.CAUSAL["Llama"][1], "mamba_d_state": 4, "num_experts": 2, "use_mamba_kernels": False}
    made = JambaForCausalLM(JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=1))
    with pytest.raises(ValueError, match=r"recurrent in layers \[0\]"):
        survey(made)


def test_a_residual_of_another_form_is_refused_and_a_hint_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def gated(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        made, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states * (1 + made.tanh())
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", gated)
    model = architectures.build("Llama")
    with pytest.raises(ValueError, match=r"layer 0 of LlamaForCausalLM forms its residual in a way .*HINTS"):
        survey(model)
    monkeypatch.setitem(HINTS, "llama", Hint("self_attn"))
    attach_meta_attention(model, MetaAttentionConfig(token_id=META))
    assert {place.child for place in attached(model).places} == {"self_attn"}  # type: ignore[union-attr]
    monkeypatch.setitem(HINTS, "llama", Hint("attention"))
    with pytest.raises(ValueError, match="no child 'attention', which HINTS names"):
        survey(architectures.build("Llama"))


def test_bloom_needs_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(HINTS, "bloom")
    with pytest.raises(ValueError, match="forms its residual in a way that was not found"):
        survey(architectures.build("BLOOM"))


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(training: bool) -> None:
    model = tiny.model(dropout=0.5).train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    drawn, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    survey(model)
    assert torch.equal(drawn, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# Settings


def test_sizes_are_the_models_own_or_those_given() -> None:
    model = build("Qwen3")
    attention = attached(model).sites[0].attention  # type: ignore[union-attr]
    assert attention.to_query.weight.shape == (16, 16) and attention.to_key.weight.shape == (8, 16)
    assert isinstance(attention.norm, torch.nn.RMSNorm) and attention.norm.eps == 1e-6
    given = build("Qwen3", num_heads=4, num_key_value_heads=4, head_dim=10, norm="layernorm", eps=1e-3, bias=True)
    attention = attached(given).sites[0].attention  # type: ignore[union-attr]
    assert attention.to_key.weight.shape == (40, 16) and attention.to_query.bias is not None
    assert isinstance(attention.norm, torch.nn.LayerNorm) and attention.norm.eps == 1e-3
    section = given.config.hf_pretrain_ext["meta_tokens"]
    assert section == json.loads(json.dumps(section))
    assert (section["num_heads"], section["head_dim"], section["norm"], section["eps"]) == (4, 10, "layernorm", 1e-3)


def test_other_entries_of_the_config_stay() -> None:
    model = tiny.model()
    model.config.hf_pretrain_ext = {"metadata": {"text": "x"}}
    attach_meta_attention(model, MetaAttentionConfig(token_id=META))
    assert set(model.config.hf_pretrain_ext) == {"metadata", "meta_tokens"}
    detach_meta_attention(model)
    assert model.config.hf_pretrain_ext == {"metadata": {"text": "x"}}


def test_initial_weights_follow_the_seed_alone() -> None:
    def weights(seed: int, before: int) -> dict[str, Tensor]:
        torch.manual_seed(before)
        model = tiny.model()
        attach_meta_attention(model, MetaAttentionConfig(token_id=META, seed=seed))
        return {name: value for name, value in model.state_dict().items() if "meta_attention" in name}

    first, same, other = weights(1, before=5), weights(1, before=6), weights(2, before=5)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if "to_query" in name]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert 0.01 < float(first[drawn[0]].std()) < 0.03
    assert not any(bool(first[name].any()) for name in first if "to_output" in name)
    normal = build("Llama", scrambled=False, init="normal")
    assert 0.01 < float(attached(normal).sites[0].attention.to_output.weight.detach().std()) < 0.03  # type: ignore[union-attr]


def test_rope_is_a_switch() -> None:
    tokens = ids()
    on, off = build("Llama", rope="on"), build("Llama", rope="off")
    off.load_state_dict(on.state_dict())
    with torch.no_grad():
        assert not torch.equal(on(tokens).logits, off(tokens).logits)
        learned_on, learned_off = build("GPT-2", rope="on"), build("GPT-2", rope="off")
        learned_off.load_state_dict(learned_on.state_dict())
        assert torch.equal(learned_on(tokens).logits, learned_off(tokens).logits)
    lines = [attached(each).describe()[0] for each in (on, off, learned_on)]  # type: ignore[union-attr]
    assert "rotated as the model's own" in lines[0] and "rope='off'" in lines[1]
    assert "no rotary embedding" in lines[2]
    assert "beside self-attention" in attached(build("Phi")).describe()[0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": ""}, "token must be a text"),
        ({"token_id": -1}, "token_id must be an integer"),
        ({"rope": "yes"}, r"rope must be one of \('on', 'off'\), got 'yes'"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"init": "ones"}, "init must be one of"),
        ({"attention": 1}, "attention must be True or False"),
        ({"num_heads": 0}, "num_heads must be an integer"),
        ({"dropout": 1}, "dropout must be a number from 0"),
        ({"eps": 0}, "eps must be a positive number"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_settings_name_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaAttentionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_id": None}, "token_id=None, and the model has embeddings for the ids below 64"),
        ({"token_id": 64}, "token_id=64.*add_meta_tokens"),
        ({"num_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads=2 does not divide the 3 heads"),
        ({"head_dim": 4}, "head_dim=4, but the model rotates 8 dimensions"),
    ],
)
def test_settings_that_do_not_fit_the_model_change_nothing(settings: dict[str, Any], message: str) -> None:
    model = tiny.model()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach_meta_attention(model, MetaAttentionConfig(**{"token_id": META, **settings}))
    assert list(model.state_dict()) == names and attached(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_misuse_is_named() -> None:
    model = build("Llama")
    with pytest.raises(ValueError, match="has meta-tokens already"):
        attach_meta_attention(model, MetaAttentionConfig(token_id=META))
    with pytest.raises(RuntimeError, match="layer 0 was called by itself"):
        model.model.layers[0](torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="inputs_embeds only"):
        model(inputs_embeds=torch.randn(1, 3, 16))
    for wrong in (torch.tensor([1, 2]), torch.tensor([[0.5]]), [[1]]):
        with pytest.raises(ValueError, match="meta_positions must be a tensor of integers"):
            model(ids(), meta_positions=wrong)
    with pytest.raises(ValueError, match="for a batch of 2 rows"):
        model(ids(), meta_positions=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="meta_documents has shape"):
        model(ids(), meta_positions=torch.tensor([[1], [2]]), meta_documents=torch.tensor([[1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="has no meta-tokens"):
        detach_meta_attention(tiny.model())


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, tokens = build("Llama"), ids(1, 8, at=(2, 5))
    passes = attached(model).passes  # type: ignore[union-attr]
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        expected = copy.deepcopy(cache)
        head = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        norm = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        for hook in (norm, head):
            with pytest.raises(ZeroDivisionError):
                model(tokens, meta_positions=torch.tensor([[2]]))
            assert passes.context is None and passes.memory is None and not passes.given
            hook.remove()
        step = torch.tensor([[META, 7]])
        made = model(step, past_key_values=cache).logits
        assert torch.equal(made, model(step, past_key_values=expected).logits)


def test_training_through_a_cache_is_refused() -> None:
    model, tokens = build("Llama").train(), ids(1, 8, at=(2, 5))
    with torch.no_grad():
        cache = model.eval()(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 8 tokens in training"):
        model.train()(tokens[:, :1], past_key_values=cache)


def test_tuples_carry_the_cache_too() -> None:
    model, tokens = build("Llama"), ids(1, 10)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = model.model(tokens[:, :8], use_cache=True, return_dict=False)[1]
        made = model(tokens[:, 8:], past_key_values=cache, return_dict=False)[0]
    assert torch.allclose(made, whole[:, 8:], atol=2e-6)


def test_a_decoder_without_a_head() -> None:
    bare = tiny.model().model.eval()
    tokens = ids()
    with torch.no_grad():
        before = bare(tokens).last_hidden_state
        attach_meta_attention(bare, MetaAttentionConfig(token_id=META))
        assert torch.equal(bare(tokens, meta_positions=batch(tokens)["meta_positions"]).last_hidden_state, before)
        changed = scramble(bare)(tokens, use_cache=True)
        assert not torch.equal(changed.last_hidden_state, before)
        detach_meta_attention(bare)
        assert torch.equal(bare(tokens).last_hidden_state, before)


def test_wrappers_are_looked_through() -> None:
    model = tiny.model()
    compiled = torch.compile(model)
    assert attached(compiled) is None
    attach_meta_attention(compiled, MetaAttentionConfig(token_id=META))
    assert attached(compiled) is attached(model) is not None


def test_the_token_is_added_with_its_row() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    assert len(tokenizer) < 64
    before = model.get_input_embeddings().weight.detach().clone()
    number = add_meta_tokens(model, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|meta|>") == number == attached(model).config.token_id  # type: ignore[union-attr]
    table = model.get_input_embeddings().weight
    others = [n for n in range(len(before)) if n != number]
    assert torch.equal(table[others], before[others])
    assert torch.allclose(table[number], before[:number].mean(0), atol=1e-6)
    assert model.generation_config.suppress_tokens == [number]
    with pytest.raises(ValueError, match=r"token_id=3, but the tokenizer has '<\|meta\|>' as"):
        add_meta_tokens(tiny.model(), tokenizer, MetaAttentionConfig(token_id=3))


# What a batch says


def test_positions_of_the_collator_equal_those_of_the_ids() -> None:
    model, tokens = build("Llama"), ids()
    given = batch(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens, meta_positions=given["meta_positions"]).logits)
        assert torch.allclose(model(tokens).logits, model(**given).logits, atol=1e-6)
        decoder = model.model(tokens, meta_positions=given["meta_positions"]).last_hidden_state
        assert torch.equal(decoder, model.model(tokens).last_hidden_state)
        embeds = model.get_input_embeddings()(tokens)
        other = model(inputs_embeds=embeds, meta_positions=given["meta_positions"]).logits
        assert torch.allclose(other, model(tokens).logits, atol=1e-6)
        # Taken at their word: these name fewer.
        fewer = torch.tensor([[7], [9]])
        assert not torch.equal(model(tokens, meta_positions=fewer).logits, model(tokens).logits)


def test_packed_documents_equal_documents_alone() -> None:
    model = build("Llama")
    parts = [ids(1, length, seed=n, at=at) for n, (length, at) in enumerate(((6, (2, 4)), (5, (0, 3)), (8, (1, 6))))]
    packed = torch.cat(parts, dim=1)
    order = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.no_grad():
        alone = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
        derived = model(packed, position_ids=order, use_cache=False).logits
        positions = (packed[0] == META).nonzero().flatten()[None]
        owners = torch.bucketize(positions, torch.tensor([6, 11]), right=True)
        told = model(
            packed, position_ids=order, use_cache=False, meta_positions=positions, meta_documents=owners
        ).logits
        mixed = model(packed, use_cache=False).logits
    assert torch.allclose(derived, alone, atol=2e-6) and torch.allclose(told, alone, atol=2e-6)
    assert not torch.allclose(mixed[:, 6:], alone[:, 6:], atol=1e-2)


def test_rows_padded_on_either_side_equal_rows_alone() -> None:
    model, row = build("Llama"), ids(1, 9, at=(2, 5))
    pad = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        alone = model(row).logits
        for parts, place in (((pad, row), slice(3, None)), ((row, pad), slice(0, 9))):
            mask = torch.cat([torch.ones_like(part) if part is row else pad for part in parts], dim=1)
            order = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            made = model(torch.cat(parts, dim=1), attention_mask=mask, position_ids=order).logits
            assert torch.allclose(made[:, place], alone, atol=2e-6)


def test_a_batch_without_meta_tokens_is_the_bare_model() -> None:
    for name in QUICK:
        bare, model = architectures.build(name).eval(), build(name)
        tokens = torch.randint(3, META, (2, 10))
        with torch.no_grad():
            assert torch.equal(model(tokens).logits[..., :META], bare(tokens).logits[..., :META])
            same = model(tokens, meta_positions=torch.full((2, 3), -1)).logits
            assert torch.equal(same[..., :META], bare(tokens).logits[..., :META])


# Training


@pytest.mark.parametrize("name", families(*QUICK))
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """Two passes before the backward pass: each recomputes with the meta-tokens that it had."""
    passes = (batch(ids()), batch(ids(seed=2, at=(0, 2, 6, 13))), batch(ids(seed=3, at=(5,))))
    model = build(name).train()
    torch.manual_seed(0)
    expected = gradients(model, *passes)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    tiny.checkpoint_activations(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(0)
    made = gradients(model, *passes)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[each], expected[each]) for each in expected)


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """In families whose norms compute in float64 where the model does."""
    model = build(name).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given = batch(ids())
    found = gradients(model, given)
    generator = torch.Generator().manual_seed(0)
    for weight, parameter in model.named_parameters():
        if "meta_attention" not in weight and "0.mlp" not in weight:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                # Not the loss of the model, which is computed in float32.
                logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1)
                losses.append(float(torch.nn.functional.cross_entropy(logits, given["labels"][:, 1:].flatten())))
                parameter -= step * direction
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx(float((found[weight] * direction).sum()), rel=1e-4, abs=1e-8), weight


def test_autocast_to_bfloat16() -> None:
    bare, model, given = architectures.build("Llama"), build("Llama", scrambled=False).train(), batch(ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(given["input_ids"]).logits[..., :META], bare(given["input_ids"]).logits[..., :META])
    scramble(model)
    with torch.no_grad():
        exact = model(**given, use_cache=False).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, given)
        loss = model(**given, use_cache=False).loss
    assert abs(float(loss) - float(exact)) < 0.05 * float(exact)
    assert all(bool(torch.isfinite(grad).all()) and grad.dtype == torch.float32 for grad in found.values())


def test_without_meta_tokens_every_parameter_still_takes_part() -> None:
    """DDP waits for the gradient of every parameter."""
    model = build("Llama").train()
    bare = torch.randint(3, META, (2, 10))
    for more in (
        {},
        {"meta_positions": torch.zeros(2, 0, dtype=torch.long)},
        {"meta_positions": torch.full((2, 2), -1)},
    ):
        found = gradients(model, {"input_ids": bare, "labels": bare, **more})
        assert set(found) == {name for name, _ in model.named_parameters()}
        assert all(not grad.any() for name, grad in found.items() if "meta_attention" in name)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_model_compiles(checkpointing: bool) -> None:
    """Whole, as one graph; with checkpointing it breaks at the layers, or takes one setting of torch to stay whole."""
    model, given = build("Llama").train(), batch(ids())
    expected = gradients(model, given)
    torch._dynamo.reset()
    if checkpointing:
        tiny.checkpoint_activations(model)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=checkpointing):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        compiled(**given, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "host"), [("OPT", True), ("Phi", True), ("GPT-2", False), ("GPT-NeoX", False)])
def test_dropout_hits_the_output_once(name: str, host: bool) -> None:
    """Where the model drops the attention's output behind the place, meta-attention leaves dropping to it."""
    prefix, settings = architectures.CAUSAL[name]
    import transformers

    rates = {"OPT": "dropout", "Phi": "resid_pdrop", "GPT-2": "resid_pdrop", "GPT-NeoX": "hidden_dropout"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**settings, rates[name]: 0.5})
    model = getattr(transformers, f"{prefix}{'LMHeadModel' if name == 'GPT-2' else 'ForCausalLM'}")(config)
    drawn = torch.get_rng_state()
    assert drops_after(model, survey(model)) == host
    assert torch.equal(drawn, torch.get_rng_state())
    attach_meta_attention(model, MetaAttentionConfig(token_id=META, dropout=0.5))
    assert {site.attention.dropout for site in attached(model).sites} == {0.0 if host else 0.5}  # type: ignore[union-attr]


def test_dropout_of_its_own() -> None:
    model, tokens = build("Llama", dropout=0.5).train(), ids()
    torch.manual_seed(0)
    first = model(tokens).logits
    assert not torch.equal(model(tokens).logits, first)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_trains_from_scratch_on_what_only_meta_tokens_can_carry() -> None:
    """With self-attention cut to one token, what stood at the last meta-token is known by meta-attention alone."""
    from transformers import MistralConfig, MistralForCausalLM

    def accuracy(attention: bool) -> float:
        torch.manual_seed(0)
        sizes = {**architectures.CAUSAL["Llama"][1], "hidden_size": 32, "intermediate_size": 64}
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=2))
        attach_meta_attention(model, MetaAttentionConfig(token_id=META, attention=attention, init="normal"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, right = torch.Generator().manual_seed(0), 0.0
        for step in range(250):
            tokens = torch.randint(20, 60, (32, 12), generator=generator)
            secret = torch.randint(3, 11, (32,), generator=generator)
            tokens[:, 1], tokens[:, 2] = secret, META  # the meta-token sees the secret in front of it
            tokens[:, 10], tokens[:, 11] = META, secret
            labels = torch.full_like(tokens, -100)
            labels[:, 11] = secret
            out = model(tokens, labels=labels, use_cache=False)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            if step >= 240:
                right += float((out.logits[:, 10].argmax(-1) == secret).float().mean()) / 10
        return right

    assert accuracy(attention=True) > 0.95
    assert accuracy(attention=False) < 0.5


# Among other libraries


def test_copies_and_pickles_are_models_of_their_own() -> None:
    model, tokens = build("Llama"), ids()
    with torch.no_grad():
        before = model(tokens).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens).logits, before)
            scramble(other, seed=5)
            assert not torch.equal(other(tokens).logits, before) and torch.equal(model(tokens).logits, before)
            detach_meta_attention(other)
            assert torch.equal(model(tokens).logits, before)


def test_under_lora_and_with_modules_saved_by_peft() -> None:
    from peft import LoraConfig, get_peft_model

    tokens = ids()
    for before in (True, False):
        model = architectures.build("Llama")
        if before:
            attach_meta_attention(model, MetaAttentionConfig(token_id=META))
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
        if not before:
            attach_meta_attention(adapted, MetaAttentionConfig(token_id=META))
        assert attached(adapted) is attached(model) is not None
        assert not [name for name, _ in adapted.named_parameters() if "meta_attention" in name and "lora" in name]
        bare = architectures.build("Llama").eval()
        with torch.no_grad():
            plain = adapted.eval()(tokens, meta_positions=torch.tensor([[3, 7, 9], [7, 9, -1]])).logits
            assert torch.equal(plain[..., :META], bare(tokens).logits[..., :META])
            scramble(adapted)
            assert not torch.equal(adapted(tokens).logits, plain)
    model = build("Llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["meta_attention"], r=2))
    assert any(p.requires_grad for name, p in adapted.named_parameters() if "modules_to_save" in name)
    found = gradients(adapted.train(), batch(tokens))
    assert any("meta_attention" in name and bool(grad.any()) for name, grad in found.items())


def test_under_accelerates_hooks() -> None:
    """Device maps and offloading replace a layer's `forward` in the instance."""
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, tokens = build("Llama"), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        hooked = architectures.build("Llama").eval()
        for layer in hooked.model.layers:
            add_hook_to_module(layer, ModelHook())
        attach_meta_attention(hooked, MetaAttentionConfig(token_id=META))
        hooked.load_state_dict(model.state_dict())
        assert torch.equal(hooked(tokens).logits, expected)
        detach_meta_attention(hooked)
        bare = architectures.build("Llama").eval()(tokens).logits
        assert torch.equal(hooked(tokens).logits, bare)
        for layer in hooked.model.layers:
            remove_hook_from_module(layer)
        assert torch.equal(hooked(tokens).logits, bare)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(tokens).logits, expected)


def test_offloaded_layers_are_refused() -> None:
    """The weights of a sub-layer would be made where the layer's are: on the meta device."""
    from accelerate import cpu_offload

    model, reader = tiny.model(), tiny.tokenizer()
    cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"layer 1 of LlamaForCausalLM is offloaded.* Load the model with a device_map"
    ):
        add_meta_tokens(model, reader)
    assert attached(model) is None and "<|meta|>" not in reader.get_vocab()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_ranks_equal_one(kind: str, tmp_path: Path) -> None:
    """One rank has meta-tokens, the other none; the gradients are the mean of those alone. FSDP2: checkpointed too."""
    worker = Path(__file__).with_name("meta_attention_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(worker), str(tmp_path), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    model = build("Llama").train()
    alone = [gradients(model, batch(ids())), gradients(model, batch(torch.full((2, 14), 7), given=False))]
    assert ranks[0].keys() == alone[0].keys() == alone[1].keys()
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.allclose(ranks[0][name], (alone[0][name] + alone[1][name]) / 2, atol=1e-6), name
