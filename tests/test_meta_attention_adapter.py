"""The meta parts of a model saved, loaded and removed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import architectures
import meta_attention_reference as reference
import pytest
import tiny
import torch
from meta_attention_reference import FAMILIES, META, build, ids, scramble
from safetensors import safe_open
from torch import Tensor

from hf_pretrain_ext.meta_tokens import (
    MetaAttentionConfig,
    add_meta_tokens,
    attach_meta_attention,
    attached,
    load_meta_tokens,
    meta_parameters,
    meta_state,
    remove_meta_tokens,
    save_meta_tokens,
)

QUICK = ("Llama", "Gemma 2", "GPT-2", "GPT-NeoX", "Mixtral", "BLOOM")


def families() -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.eval()(ids() if tokens is None else tokens).logits
    return made


def with_token(tied: bool = True, vocabulary: int = 43) -> tuple[Any, Any, int]:
    """A model that grew by the token's row, with a sub-layer and a row that are trained."""
    model, tokenizer = base(tied, vocabulary), tiny.tokenizer()
    number = add_meta_tokens(model, tokenizer)
    scramble(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[number] = torch.arange(16.0) / 16
    return model, tokenizer, number


def base(tied: bool = True, vocabulary: int = 43) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**architectures.CAUSAL["Llama"][1], "vocab_size": vocabulary, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("name", families())
def test_a_model_saved_whole_is_loaded_again(name: str, tmp_path: Path) -> None:
    """Also the families whose files use other names than the model."""
    model = build(name)
    expected, names = logits(model), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_pretrain_ext"]["meta_tokens"]["token_id"] == META
    loaded = type(model).from_pretrained(tmp_path)
    assert attached(loaded) is None
    assert load_meta_tokens(loaded, tmp_path) == META
    assert torch.equal(logits(loaded), expected) and list(loaded.state_dict()) == names
    assert loaded.config.to_dict()["hf_pretrain_ext"] == model.config.to_dict()["hf_pretrain_ext"]


@pytest.mark.parametrize("name", families())
def test_parts_saved_beside_are_loaded_into_the_base(name: str, tmp_path: Path) -> None:
    model = build(name)
    expected = logits(model)
    save_meta_tokens(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["meta_tokens.safetensors", "meta_tokens_config.json"]
    fresh = architectures.build(name)
    before = logits(fresh)
    load_meta_tokens(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected)
    remove_meta_tokens(fresh)
    assert torch.equal(logits(fresh), before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_that_the_base_lacks_comes_with_its_row(tied: bool, tmp_path: Path) -> None:
    model, _, number = with_token(tied)
    tokens = torch.randint(3, 40, (2, 12))
    tokens[:, 4] = number
    expected = logits(model, tokens)
    save_meta_tokens(model, tmp_path)
    with safe_open(tmp_path / "meta_tokens.safetensors", "pt") as file:
        held = set(file.keys())
    assert {"input_embedding", "output_embedding"} & held == (
        {"input_embedding"} if tied else {"input_embedding", "output_embedding"}
    )
    fresh, plain = base(tied), base(tied)
    reader = tiny.tokenizer()
    assert load_meta_tokens(fresh, tmp_path, reader) == number
    assert reader.convert_tokens_to_ids("<|meta|>") == number
    assert torch.equal(logits(fresh, tokens), expected)
    assert torch.equal(fresh.get_input_embeddings().weight[number], torch.arange(16.0) / 16)
    assert fresh.config.vocab_size == model.config.vocab_size == 44
    assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == tied
    remove_meta_tokens(fresh)
    same(fresh, plain)


def same(model: Any, plain: Any) -> None:
    """Bit for bit what it was: weights, outputs, config, classes, hooks."""
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.randint(3, 40, (2, 12))
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        plain.lm_head.weight is plain.get_input_embeddings().weight
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [43, 50, 64])
def test_removing_restores_the_original(tied: bool, vocabulary: int) -> None:
    """Whether the table grew by the row, or the token took a row that padded it."""
    model, _, number = with_token(tied, vocabulary)
    assert not torch.equal(
        model.get_input_embeddings().weight[number], base(tied, 64).get_input_embeddings().weight[0]
    )
    remove_meta_tokens(model)
    same(model, base(tied, vocabulary))
    add_meta_tokens(model, tiny.tokenizer())
    remove_meta_tokens(model)
    same(model, base(tied, vocabulary))


@pytest.mark.parametrize("name", families())
def test_removing_restores_every_family(name: str) -> None:
    model, plain = architectures.build(name), architectures.build(name)
    add_meta_tokens(model, tiny.tokenizer())
    scramble(model)
    remove_meta_tokens(model)
    assert torch.equal(logits(model), logits(plain)) and list(model.state_dict()) == list(plain.state_dict())
    assert model.config.to_dict() == plain.config.to_dict()


def test_the_state_is_what_the_meta_parts_are() -> None:
    model, _, number = with_token(tied=False)
    parameters, state = meta_parameters(model), meta_state(model)
    assert len(parameters) == 2 * 5 and set(state) - set(parameters) == {"input_embedding", "output_embedding"}
    assert all(torch.equal(state[name], parameter) for name, parameter in parameters.items())
    assert torch.equal(state["output_embedding"], model.lm_head.weight[number])
    with torch.no_grad():
        parameters["layers.1.to_query.weight"].fill_(7)
    assert not bool((state["layers.1.to_query.weight"] == 7).any())
    assert bool((attached(model).sites[1].attention.to_query.weight == 7).all())  # type: ignore[union-attr]


def test_loading_into_a_model_that_has_them_loads_the_weights(tmp_path: Path) -> None:
    model = build("Llama")
    save_meta_tokens(model, tmp_path)
    expected = logits(model)
    scramble(model, seed=3)
    assert not torch.equal(logits(model), expected)
    load_meta_tokens(model, tmp_path)
    assert torch.equal(logits(model), expected)
    other = build("Llama", rope="off")
    with pytest.raises(ValueError, match=r"other settings than the model: \{'rope': \('on', 'off'\)\}"):
        load_meta_tokens(other, tmp_path)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    model = build("Llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    load_meta_tokens(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_without_meta_attention(tmp_path: Path) -> None:
    model = base()
    number = add_meta_tokens(model, tiny.tokenizer(), MetaAttentionConfig(attention=False))
    tokens = torch.randint(3, 40, (2, 12))
    tokens[:, 4] = number
    expected = logits(model, tokens)
    assert bool((expected.softmax(-1)[..., number] == 0).all())
    save_meta_tokens(model, tmp_path / "parts")
    copy.deepcopy(model).save_pretrained(tmp_path / "whole")  # which enters more in the config
    for fresh, folder in ((base(), "parts"), (type(model).from_pretrained(tmp_path / "whole"), "whole")):
        load_meta_tokens(fresh, tmp_path / folder)
        assert torch.equal(logits(fresh, tokens), expected)
    remove_meta_tokens(model)
    same(model, base())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [43, 50])
@pytest.mark.parametrize("size", ["8KB", "1GB"])
def test_a_whole_model_gives_its_row_to_a_base(tied: bool, vocabulary: int, size: str, tmp_path: Path) -> None:
    """Whether the base has a row to spare for the token, which nothing trained, or has none."""
    model, _, number = with_token(tied, vocabulary)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[number] = -torch.arange(16.0)
    model.save_pretrained(tmp_path, max_shard_size=size)
    tokens = torch.randint(3, 40, (2, 12))
    tokens[:, 4] = number
    for fresh in (base(tied, vocabulary), type(model).from_pretrained(tmp_path)):
        load_meta_tokens(fresh, tmp_path)
        assert torch.equal(logits(fresh, tokens), logits(model, tokens))
        ours, theirs = meta_state(fresh), meta_state(model)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_removed_from_a_loaded_model_nothing_is_left_but_its_row(tmp_path: Path) -> None:
    model, reader, number = with_token()
    model.config.fitted_tokens["<|other|>"] = 7
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    load_meta_tokens(loaded, tmp_path)
    remove_meta_tokens(loaded)
    assert loaded.config.fitted_tokens == {"<|other|>": 7} and loaded.generation_config.suppress_tokens is None
    table = loaded.get_input_embeddings().weight
    assert torch.equal(table[number], torch.arange(16.0) / 16)
    add_meta_tokens(loaded, reader)
    assert torch.allclose(table[number], table[:number].mean(0))


def test_beside_an_adapter_of_peft(tmp_path: Path) -> None:
    """The adapter in its files, the meta parts in theirs; loaded in either order."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, _, number = with_token()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    tokens = torch.randint(3, 40, (2, 12))
    tokens[:, 4] = number
    expected = logits(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    save_meta_tokens(adapted, tmp_path)
    first = base()
    load_meta_tokens(first, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(first, tmp_path), tokens), expected)
    second = PeftModel.from_pretrained(base(), tmp_path)
    load_meta_tokens(second, tmp_path)
    assert torch.equal(logits(second, tokens), expected)
    third = PeftModel.from_pretrained(base(), tmp_path)
    plain = logits(third, tokens[:, :4])
    load_meta_tokens(third, tmp_path)
    remove_meta_tokens(third)
    assert torch.equal(logits(third, tokens[:, :4]), plain) and third.get_base_model().config.vocab_size == 43
    merged = second.merge_and_unload()
    assert torch.allclose(logits(merged, tokens), expected, atol=1e-5)
    save_meta_tokens(merged, tmp_path / "merged")
    assert (tmp_path / "merged" / "meta_tokens.safetensors").read_bytes() == (
        tmp_path / "meta_tokens.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("given", [{"use_dora": True}, {"modules_to_save": ["meta_attention", "lm_head"]}])
def test_below_an_adapter_of_peft(given: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that came later and is of meta-attention too: its weights are in its own file alone."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, _, number = with_token(tied=False)
    plain = set(meta_state(model))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, **given))
    assert any(p.requires_grad and "meta_attention" in name for name, p in adapted.named_parameters())
    tokens = torch.randint(3, 40, (2, 12))
    tokens[:, 4] = number
    expected = logits(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    save_meta_tokens(adapted, tmp_path)
    assert set(meta_state(adapted)) == plain
    first = base(tied=False)
    load_meta_tokens(first, tmp_path)
    loaded = PeftModel.from_pretrained(first, tmp_path)
    assert torch.equal(logits(loaded, tokens), expected)
    load_meta_tokens(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens), expected)
    with pytest.raises(ValueError, match=r"is also of meta-attention.* Call load_meta_tokens\(base, folder\) first"):
        load_meta_tokens(get_peft_model(base(tied=False), LoraConfig(target_modules=["q_proj"])), tmp_path)


def test_trained_saved_reloaded_and_generating(tmp_path: Path) -> None:
    """The whole way with a plain loop: only the meta parts trained, the base as it was."""
    model, tokenizer = base(), tiny.tokenizer()
    number = add_meta_tokens(model, tokenizer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = list(meta_parameters(model).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    tokens = torch.randint(3, 40, (8, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 3::4] = number
    labels = tokens.masked_fill(tokens == number, -100)
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.03
    prompt = {"input_ids": tokens[:2, :9], "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.eval().generate(**prompt, **settings)
    model.save_pretrained(tmp_path / "whole")
    save_meta_tokens(model, tmp_path / "parts")
    for fresh, folder in ((type(model).from_pretrained(tmp_path / "whole"), "whole"), (base(), "parts")):
        load_meta_tokens(fresh, tmp_path / folder)
        assert torch.equal(fresh.eval().generate(**prompt, **settings), written)
    bare = base().eval()
    remove_meta_tokens(model)
    assert torch.equal(logits(model, tokens[:, :3]), logits(bare, tokens[:, :3]))


def break_json(folder: Path) -> None:
    (folder / "meta_tokens_config.json").write_text("{")


def unknown_setting(folder: Path) -> None:
    file = folder / "meta_tokens_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "depth": 3}))


def no_token(folder: Path) -> None:
    file = folder / "meta_tokens_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "token_id": None}))


def no_weights(folder: Path) -> None:
    (folder / "meta_tokens.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "meta_tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def fewer_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "meta_tokens.safetensors"
    held = load_file(file)
    held["layers.7.norm.weight"] = held.pop("layers.1.norm.weight")
    save_file(held, file)


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (nothing, "holds no meta-tokens: neither meta_tokens_config.json nor"),
        (break_json, "holds no settings of meta-tokens that can be read"),
        (unknown_setting, r"settings \['depth'\] that this version does not know"),
        (no_token, "names no token_id"),
        (no_weights, "is missing: the folder holds the settings"),
        (cut_weights, "meta_tokens.safetensors cannot be read"),
        (fewer_weights, r"it lacks \['layers.1.norm.weight'\] and holds \['layers.7.norm.weight'\]"),
    ],
)
def test_harmed_folders_are_named(harm: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    save_meta_tokens(build("Llama"), folder)
    harm(folder)
    with pytest.raises(ValueError, match=message):
        load_meta_tokens(architectures.build("Llama"), folder)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_meta_tokens(build("Llama"), tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(**{**architectures.CAUSAL["Llama"][1], "hidden_size": 32, "head_dim": 8}))
    with pytest.raises(ValueError, match=r"has shape .*Load it into the model that it was trained with"):
        load_meta_tokens(wide, tmp_path)
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match=r"has '<\|meta\|>' as \d+, but .* was trained with 63"):
        load_meta_tokens(architectures.build("Llama"), tmp_path, tokenizer)
    with pytest.raises(ValueError, match="no meta-tokens"):
        save_meta_tokens(tiny.model(), tmp_path)
    model = base(vocabulary=64)
    attach_meta_attention(model, MetaAttentionConfig(token_id=META))
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"no row for '<\|meta\|>' \(id 63\) that .* Load the model itself"):
        load_meta_tokens(architectures.build("GPT-2"), tmp_path / "whole")


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    save_meta_tokens(build("Llama"), tmp_path)
    settings = json.loads((tmp_path / "meta_tokens_config.json").read_text())
    assert MetaAttentionConfig(**settings) == attached(build("Llama")).config  # type: ignore[union-attr]
    with safe_open(tmp_path / "meta_tokens.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "layers.0.to_output.weight" in file.keys()


def test_written_out_families_are_those_of_the_reference() -> None:
    assert set(reference.WRITTEN_OUT) - {"Llama, YaRN"} <= set(FAMILIES)
