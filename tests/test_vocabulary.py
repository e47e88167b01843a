"""New control tokens in tokenizers, and their rows in models of many families."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_metadata import byte_level, unigram, with_bos
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers import logging as hf

from hf_pretrain_ext.vocabulary import add_tokens, fit_embeddings, is_fitted

NAMES = ["<|good|>", "<|bad|>"]


def llama(rows: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=rows, num_attention_heads=2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, **sizes
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(rows: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(30).view(2, 15) + 3, **more).logits
    return found


def heads(model: Any) -> list[torch.Tensor]:
    """Every parameter with a row a token, as copies."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, head.bias]
    return [parameter.detach().clone() for parameter in found if parameter is not None]


def assert_fitted(model: Any, ids: list[int], before: list[torch.Tensor], old: int) -> None:
    """New rows are the mean of the first `old` ones, by float64; all others are what they were, bit for bit."""
    for now, then in zip(heads(model), before, strict=True):
        kept = [number for number in range(len(then)) if number not in ids]
        assert torch.equal(now[kept], then[kept])
        expected = then[:old].double().mean(0)
        error = torch.finfo(now.dtype).eps * (1 + expected.abs())
        assert all(((now[number].double() - expected).abs() <= error).all() for number in ids)


# Tokenizers


@pytest.mark.parametrize("make", [byte_level, with_bos, unigram, tiny.tokenizer])
def test_tokens_are_special_and_survive_a_save(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    old, plain = dict(tokenizer.get_vocab()), tokenizer("abc")["input_ids"]
    ids = add_tokens(tokenizer, NAMES)
    assert ids == [len(old), len(old) + 1]
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert {k: v for k, v in found.get_vocab().items() if k not in NAMES} == old
        assert found.convert_tokens_to_ids(NAMES) == ids and set(ids) <= set(found.all_special_ids)
        token = found.added_tokens_decoder[ids[0]]
        assert (token.special, token.normalized, token.lstrip, token.rstrip) == (True, False, False, False)
        assert found("abc")["input_ids"] == plain
        assert found.decode([*plain, ids[0]], skip_special_tokens=True) == found.decode(
            plain, skip_special_tokens=True
        )
        assert add_tokens(found, [NAMES[1], "<|new|>", NAMES[0]]) == [ids[1], len(old) + 2, ids[0]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("<|good|>", r"tokens must be a list of texts .*got '<\|good\|>'"),
        (None, "tokens must be a list"),
        ([], "tokens is empty"),
        ([""], "got ''"),
        ([" <a>"], "without white space at their ends"),
        ([3], "got 3"),
        (["<a>", "<b>", "<a>"], r"tokens has \['<a>'\] more than once"),
        (["<a>", "ab"], r"tokens has \['ab'\], which the tokenizer knows as ordinary text. Choose another name"),
    ],
)
def test_wrong_tokens(tokens: Any, message: str) -> None:
    tokenizer = unigram()
    size = len(tokenizer)
    with pytest.raises(ValueError, match=message):
        add_tokens(tokenizer, tokens)
    assert len(tokenizer) == size


def test_a_token_that_was_added_as_ordinary_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["good"])
    with pytest.raises(ValueError, match="knows as ordinary text"):
        add_tokens(tokenizer, ["good"])


def test_a_vocabulary_with_gaps_gives_no_token_the_id_of_another() -> None:
    """The backend counts tokens: of 4 with ids up to 5 it gives the second new one the id 5."""
    vocabulary = {"<e>": 0, "a": 1, "c": 3, "b": 5}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<e>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    with pytest.raises(ValueError, match=r"ids of others: .* of 4 tokens has gaps \(largest id 5\)"):
        add_tokens(tokenizer, NAMES)
    assert tokenizer.get_vocab() == vocabulary
    assert add_tokens(tokenizer, NAMES[:1]) == [4]


# Models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: llama(257), lambda: llama(257, tied=True), lambda: gpt2(257)])
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_rows_are_the_mean_and_nothing_else_moves(make: Any, spare: int, dtype: torch.dtype) -> None:
    model, tokenizer = make().to(dtype), byte_level()
    if spare:
        model.resize_token_embeddings(257 + spare, mean_resizing=False)
    before, seen, state = heads(model), logits(model), torch.get_rng_state()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = add_tokens(tokenizer, NAMES)
    fit_embeddings(model, tokenizer, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert_fitted(model, ids, before, old=257)
    assert torch.equal(logits(model)[..., :257], seen[..., :257])
    rows = len(model.get_input_embeddings().weight)
    # 258 rows are 2 · 129: with one spare row they stay even; 264 = 8 · 33 have room.
    assert rows == {0: 259, 1: 260, 7: 264}[spare] == model.config.vocab_size == len(before[0]) + (rows - 257 - spare)
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert all(parameter.dtype == dtype for parameter in heads(model))


@pytest.mark.parametrize("name", [*architectures.CAUSAL, "RoBERTa", "T5"])
def test_families(name: str, tmp_path: Path) -> None:
    """Tables of 64 rows for a tokenizer of 63 tokens: grown, biases too, saved and loaded; logits stay."""
    special = {"RoBERTa": architectures.masked, "T5": architectures.encoder_decoder}
    model = special[name]() if name in special else architectures.build(name)
    more = {"decoder_input_ids": torch.arange(30).view(2, 15)} if name == "T5" else {}
    model.eval()
    with torch.no_grad():
        bias = model.get_output_embeddings().bias
        if bias is not None:
            bias.uniform_(-1, 1)  # made as zeros
    tokenizer = tiny.tokenizer()
    add_tokens(tokenizer, [f"<{number}>" for number in range(63 - len(tokenizer))])
    before, seen = heads(model), logits(model, **more)
    ids = add_tokens(tokenizer, NAMES)
    assert ids == [63, 64]
    fit_embeddings(model, tokenizer, ids)
    assert_fitted(model, ids, before, old=63)
    now = logits(model, **more)
    assert torch.equal(now[..., :63], seen[..., :63])
    assert (
        now.shape[-1] == len(model.get_input_embeddings().weight) == model.config.get_text_config().vocab_size == 128
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, **more), now)
    assert loaded.config.fitted_tokens == {"<|good|>": 63, "<|bad|>": 64}


def test_rows_that_only_pad_are_the_mean_too() -> None:
    """They take part in the softmax and are never a label: random ones would change the loss."""
    model, tokenizer = llama(264), byte_level()
    then = heads(model)
    ids = add_tokens(tokenizer, [f"<{number}>" for number in range(9)])
    fit_embeddings(model, tokenizer, ids)
    assert len(heads(model)[0]) == 272 and ids[-1] == 265
    for table, old in zip(heads(model), then, strict=True):
        expected = old[:257].double().mean(0)
        assert torch.allclose(table[257:].double(), expected.expand(15, -1), atol=1e-7)


def test_rows_that_were_fitted_are_left_alone(tmp_path: Path) -> None:
    model, tokenizer = llama(257), byte_level()
    ids = add_tokens(tokenizer, NAMES)
    fit_embeddings(model, tokenizer, ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = torch.tensor([[1.0], [2.0]])
    trained = heads(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    more = add_tokens(tokenizer, ["<|new|>"])
    for each in (model, loaded):
        fit_embeddings(each, tokenizer, ids)
        assert all(torch.equal(now, then) for now, then in zip(heads(each), trained, strict=True))
        fit_embeddings(each, tokenizer, [*ids, *more])
        assert is_fitted(each, "<|new|>", 259) and not is_fitted(each, "<|new|>", 258)
        # The mean for the third is over all other tokens, the first two among them.
        assert_fitted(each, more, trained, old=259)


def test_the_same_id_of_another_token_is_fitted() -> None:
    model = llama(257)
    fit_embeddings(model, tokenizer := byte_level(), add_tokens(tokenizer, ["<|other|>"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[257] = 5.0
    then = heads(model)
    fit_embeddings(model, tokenizer := byte_level(), add_tokens(tokenizer, ["<|good|>"]))
    assert_fitted(model, [257], then, old=257)


def test_zero() -> None:
    model, tokenizer = llama(257), byte_level()
    fit_embeddings(model, tokenizer, ids := add_tokens(tokenizer, NAMES), init="zero")
    assert all((table[ids] == 0).all() for table in heads(model))


def test_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = llama(257), byte_level()
    hf.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        fit_embeddings(model, tokenizer, add_tokens(tokenizer, NAMES))
    assert not caplog.records


def test_training_moves_the_new_rows_in_a_raw_loop() -> None:
    model, tokenizer = llama(257, tied=True), byte_level()
    ids = add_tokens(tokenizer, NAMES)
    fit_embeddings(model, tokenizer, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = heads(model)[0]
    rows = torch.tensor([[ids[0], 5, 6, 7], [ids[1], 7, 6, 5]])
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    assert ((heads(model)[0] != before).any(1))[ids].all()


# What cannot be given rows


def test_a_model_with_an_adapter_is_refused_until_its_base_has_the_rows() -> None:
    base, tokenizer = llama(257), byte_level()
    ids = add_tokens(tokenizer, NAMES)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids)
    with pytest.raises(ValueError, match=r"the model has an adapter.*trainable_token_indices"):
        fit_embeddings(get_peft_model(llama(257), LoraConfig(r=2, target_modules=["q_proj"])), tokenizer, ids)
    fit_embeddings(base, tokenizer, ids)
    adapted = get_peft_model(base, lora)
    fit_embeddings(adapted, tokenizer, ids)
    assert len(heads(adapted)[1]) == 259


def test_what_has_no_rows_to_give_is_refused() -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NAMES)
    with pytest.raises(ValueError, match="Linear has no input embeddings"):
        fit_embeddings(torch.nn.Linear(2, 2), tokenizer, ids)
    with pytest.raises(ValueError, match=r"are offloaded \(Embedding of torch.float32\)"):
        fit_embeddings(llama(257).to("meta"), tokenizer, ids)
    quantised = llama(257)
    table = torch.nn.Parameter(torch.zeros(257, 16, dtype=torch.int8), requires_grad=False)
    quantised.get_input_embeddings().weight = table
    with pytest.raises(ValueError, match=r"are quantised \(Embedding of torch.int8\)"):
        fit_embeddings(quantised, tokenizer, ids)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    inside = get_peft_model(llama(257), lora).get_base_model()
    del inside.peft_config
    with pytest.raises(ValueError, match=r"are wrapped by an adapter \(TrainableTokensWrapper"):
        fit_embeddings(inside, tokenizer, ids)
    # A wrapped table is written to where it has the row, and is not made longer.
    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    for rows in (max(ids), max(ids) + 1):
        inside = get_peft_model(llama(rows), lora).get_base_model()
        del inside.peft_config
        if rows == max(ids):
            with pytest.raises(ValueError, match=r"are wrapped by an adapter \(Embedding"):
                fit_embeddings(inside, tokenizer, ids)
        else:
            fit_embeddings(inside, tokenizer, ids)
            table = inside.get_input_embeddings().weight
            assert torch.allclose(table[ids[0]], table[: min(ids)].mean(0), atol=1e-6)


def test_linear_layers_in_four_bits_beside_plain_embeddings_are_fitted() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, tokenizer = llama(257), byte_level()
    attention: Any = model.model.layers[0].self_attn
    attention.q_proj = bnb.nn.Linear4bit(16, 16, bias=False)
    before = heads(model)
    ids = add_tokens(tokenizer, NAMES)
    fit_embeddings(model, tokenizer, ids)
    assert_fitted(model, ids, before, old=257)


def test_sharded_embeddings_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, tokenizer = llama(257), byte_level()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="are sharded"):
            fit_embeddings(model, tokenizer, add_tokens(tokenizer, NAMES))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ids", "init", "message"),
    [
        ([999], "mean", r"ids must be token ids that the tokenizer has.*got \[999\]"),
        (["a"], "mean", "ids must be token ids"),
        (3, "mean", "ids must be token ids"),
        ([257], "random", r"init must be one of \('mean', 'zero'\), got 'random'"),
    ],
)
def test_wrong_ids(ids: Any, init: Any, message: str) -> None:
    model, tokenizer = llama(257), byte_level()
    add_tokens(tokenizer, NAMES)
    with pytest.raises(ValueError, match=message):
        fit_embeddings(model, tokenizer, ids, init)
    assert len(heads(model)[0]) == 257
