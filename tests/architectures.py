"""Tiny models of many families, built from their configs: what every plug-in is tried on."""

from __future__ import annotations

from typing import Any

VOCABULARY = 64

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
_OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def _llama(**more: Any) -> dict[str, Any]:
    return {**_LLAMA, **more}


CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _llama()),
    "Mistral": ("Mistral", _llama(sliding_window=8)),
    "Qwen2": ("Qwen2", _llama()),
    "Qwen3": ("Qwen3", _llama(head_dim=8)),
    "Gemma": ("Gemma", _llama(head_dim=8)),
    "Gemma 2": ("Gemma2", _llama(head_dim=8, sliding_window=8)),
    "Gemma 3": ("Gemma3", _llama(head_dim=8, sliding_window=8)),
    "Phi": ("Phi", _llama()),
    "Phi-3": ("Phi3", _llama()),
    "GPT-2": ("GPT2", {**_OLD, "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-J": ("GPTJ", {**_OLD, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-NeoX": ("GPTNeoX", _llama()),
    "GPT-BigCode": ("GPTBigCode", {**_OLD, "bos_token_id": 1, "eos_token_id": 2}),
    "CodeGen": ("CodeGen", {**_OLD, "n_head": 4, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "OPT": ("OPT", _llama(ffn_dim=32, word_embed_proj_dim=16)),
    "BLOOM": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Falcon": ("Falcon", _llama(new_decoder_architecture=False, bias=False)),
    "MPT": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    "OLMo": ("Olmo", _llama()),
    "OLMo 2": ("Olmo2", _llama()),
    "StableLM": ("StableLm", _llama()),
    "Starcoder2": ("Starcoder2", _llama()),
    "Cohere": ("Cohere", _llama()),
    "Granite": ("Granite", _llama()),
    "SmolLM3": ("SmolLM3", _llama()),
    "GLM": ("Glm", _llama(head_dim=8)),
    "DeepSeek-V3": (
        "DeepseekV3",
        _llama(
            num_key_value_heads=2,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
    ),
    "Mixtral": ("Mixtral", _llama(**_MOE)),
    "Qwen2-MoE": (
        "Qwen2Moe",
        _llama(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    ),
    "Qwen3-MoE": ("Qwen3Moe", _llama(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
    "OLMoE": ("Olmoe", _llama(num_experts=4, num_experts_per_tok=2)),
    "Mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "Mamba 2": (
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "head_dim": 8,
            "num_heads": 4,
            "n_groups": 1,
            "chunk_size": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "RWKV": (
        "Rwkv",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    ),
}


def build(name: str) -> Any:
    """The causal language model of a family, from a fixed seed; its text part where the family sees images too."""
    import torch
    import transformers

    prefix, settings = CAUSAL[name]
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForCausalLM", None) or getattr(transformers, f"{prefix}LMHeadModel")
    torch.manual_seed(0)
    return model_class(config_class(**settings))


def masked() -> Any:
    """A masked language model: RoBERTa."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    settings = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**{**settings, "max_position_embeddings": 66}))


def encoder_decoder() -> Any:
    """An encoder-decoder: T5."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def table(results: dict[str, dict[str, str]]) -> str:
    """The page of the docs, from what a test run found: plug-ins by family."""
    plugins = sorted({plugin for row in results.values() for plugin in row})
    lines = [
        "# Architectures",
        "",
        "Made by `make test-architectures`: a tiny model of each family is built from its config, trained for three "
        "steps with each plug-in, saved, reloaded and resumed; *exact* means that the resumed run equals an "
        "uninterrupted one bit for bit, *refused* that `extend` says why it cannot be.",
        "",
        f"| family | {' | '.join(plugins)} |",
        f"|---|{'---|' * len(plugins)}",
    ]
    lines += [f"| {name} | {' | '.join(row.get(plugin, '') for plugin in plugins)} |" for name, row in results.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import json
    import sys
    from pathlib import Path

    found: dict[str, dict[str, str]] = {}
    for line in Path(sys.argv[1]).read_text().splitlines():
        family, plugin, outcome = json.loads(line)
        found.setdefault(family, {})[plugin] = outcome
    order = [name for name in [*CAUSAL, "RoBERTa", "T5"] if name in found]
    Path(sys.argv[2]).write_text(table({name: found[name] for name in order}))
