"""What is trained: the token's row alone, meta-attention, adapters beside them; the masked logit of fused heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import architectures
import pytest
import settings
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import Gemma3ForCausalLM, LlamaForCausalLM

from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, attached, load_meta_tokens, meta_state, remove_meta_tokens
from hf_pretrain_ext.meta_tokens.fused import masked_head
from hf_pretrain_ext.meta_tokens.row import release_row, reload_row, row_of, sync_row, train_row
from hf_pretrain_ext.meta_tokens.training import MetaTraining

TOKEN = 63


def batches(number: int = 4) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        ids = torch.randint(1, 60, (3, 10), generator=generator)
        ids[:, ::4] = TOKEN
        yield ids


def train(model: Any, optimizer: torch.optim.Optimizer, after: Any = lambda: None) -> None:
    for ids in batches():
        model(input_ids=ids, labels=ids.masked_fill(ids == TOKEN, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


# The row


@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "GPT-2", "OPT"])
def test_the_row_is_trained_as_in_the_whole_table(family: str) -> None:
    """Against the table with a gradient that a hook sets to zero but for the row, weight decay only on the row."""
    reference = architectures.build(family).requires_grad_(False).eval()  # without dropout
    ours = copy.deepcopy(reference)
    table = reference.get_input_embeddings().weight.requires_grad_(True)
    kept = torch.zeros(len(table), 1).index_fill_(0, torch.tensor([TOKEN]), 1)
    table.register_hook(lambda gradient: gradient * kept)
    head, frozen = reference.get_output_embeddings(), table.detach().clone()
    if head.weight is table:
        # Tied, the head's share would reach the row too; ours is of the input alone, the logit being masked.
        head.weight = torch.nn.Parameter(frozen.clone(), requires_grad=False)
    train(reference, torch.optim.AdamW([table], lr=1e-2, weight_decay=0.0))

    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    head = ours.get_output_embeddings()
    if head.weight is ours.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(frozen.clone(), requires_grad=False)
    row = train_row(ours, TOKEN)
    train(ours, torch.optim.AdamW([row], lr=1e-2, weight_decay=0.0), lambda: sync_row(ours))
    torch.testing.assert_close(row[0], table[TOKEN], rtol=0, atol=1e-6)
    assert float((row.detach()[0] - frozen[TOKEN]).abs().max()) > 1e-3
    after = ours.state_dict()
    assert after.keys() == before.keys()
    rest = torch.arange(len(frozen)) != TOKEN
    for name, weight in before.items():
        same = torch.equal(after[name], weight) or torch.equal(after[name][rest], weight[rest])
        assert same, name


def test_weight_decay_leaves_all_other_rows_bit_for_bit() -> None:
    model = tiny.model().requires_grad_(False)
    frozen = model.get_input_embeddings().weight.clone()
    train(model, torch.optim.AdamW([train_row(model, TOKEN)], lr=1e-2, weight_decay=0.5), lambda: sync_row(model))
    table = model.get_input_embeddings().weight
    assert torch.equal(table[:TOKEN], frozen[:TOKEN]) and not torch.equal(table[TOKEN], frozen[TOKEN])


def test_files_hold_the_table_and_no_row(tmp_path: Any) -> None:
    """Saved in the middle of training: the table has the newest row; loaded, the row to go on from is the table's."""
    model = tiny.model().requires_grad_(False)
    row = train_row(model, TOKEN)
    with torch.no_grad():
        row.fill_(7)
    assert "model.embed_tokens.meta_row" not in model.state_dict()
    assert model.state_dict()["model.embed_tokens.weight"][TOKEN].eq(7).all()
    model.save_pretrained(tmp_path)
    plain, found = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert plain.get_input_embeddings().weight[TOKEN].eq(7).all()
    assert not found["unexpected_keys"] and not found["missing_keys"]

    fresh = tiny.model(seed=1).requires_grad_(False)
    other = train_row(fresh, TOKEN)
    assert fresh.load_state_dict(plain.state_dict()) and other.eq(7).all()
    # A shard without the table.
    fresh.load_state_dict({"model.norm.weight": torch.ones(16)}, strict=False)
    assert other.eq(7).all()
    with torch.no_grad():
        fresh.get_input_embeddings().weight[TOKEN] = 8
    reload_row(fresh)
    assert other.eq(8).all()


def test_what_was_put_in_is_taken_out() -> None:
    model = tiny.model()
    ids = next(batches())
    before = model(ids).logits
    row = train_row(model, TOKEN)
    assert train_row(model, TOKEN) is row and row_of(model) is row
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        row += 1
    assert not torch.equal(model(ids).logits, before)
    trained = model(ids).logits[..., :TOKEN]
    release_row(model)
    release_row(model)  # again is harmless
    # The head is tied: the token's own logit follows its row once that is in the table.
    assert row_of(model) is None and torch.equal(model(ids).logits[..., :TOKEN], trained)
    assert not any("meta_row" in name for name, _ in model.named_parameters())


def test_an_embedding_that_does_more_is_refused() -> None:
    class Odd(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    model = tiny.model()
    model.set_input_embeddings(Odd(64, 16))
    with pytest.raises(ValueError, match=r"Odd does not give it as it is in the table\. Train the whole embedding"):
        train_row(model, TOKEN)
    assert row_of(model) is None


def test_beside_an_adapter_on_the_embedding() -> None:
    """LoRA on the table adds to the row as to any other, and its wrapper stays in place."""
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    base = model.get_base_model()
    ids = next(batches())
    before = model(ids).logits
    row = train_row(base, TOKEN)
    assert torch.equal(model(ids).logits, before) and row.shape == (1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    assert row.grad is not None and float(row.grad.abs().max()) > 0


# What is trained


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tokens(**given: Any) -> MetaAttentionConfig:
    return MetaAttentionConfig(**given)


def reader() -> Any:
    return settings.full_tokenizer()["processing_class"]


def test_all_trains_all() -> None:
    model = tiny.model()
    before = trainable(model)
    training = MetaTraining(model, reader(), tokens())
    assert before < trainable(model) and row_of(model) is None
    assert {name.split(".")[-3] for name in trainable(model) - before} == {"meta_attention"}
    training.finish()
    assert before < trainable(model)


def test_meta_trains_the_row_and_meta_attention() -> None:
    model = tiny.model()
    before = trainable(model)
    training = MetaTraining(model, reader(), tokens(), train="meta")
    assert all("meta_attention" in name or name.endswith("meta_row") for name in trainable(model))
    assert len(trainable(model)) == 1 + 2 * 5
    training.finish()
    assert before < trainable(model) and row_of(model) is None
    # A model that came with parameters frozen keeps those.
    model.model.norm.requires_grad_(False)
    MetaTraining(model, reader(), tokens(), train="meta").finish()
    assert "model.norm.weight" not in trainable(model)
    with pytest.raises(ValueError, match=r"train must be one of \('all', 'meta'\), got 'some'"):
        MetaTraining(model, reader(), tokens(), train="some")  # type: ignore[arg-type]


def test_other_settings_than_the_models_are_refused() -> None:
    model = tiny.model()
    MetaTraining(model, reader(), tokens(rope="off", num_heads=1)).finish()
    MetaTraining(model, reader(), tokens(num_heads=1, init="normal", seed=3)).finish()
    with pytest.raises(ValueError, match=r"meta-tokens with num_heads=1, not 2, dropout=0.0, not 0.5\. Pass these"):
        MetaTraining(model, reader(), tokens(num_heads=2, dropout=0.5))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_beside_an_adapter(dora: bool, tied: bool, tmp_path: Any) -> None:
    """Adapter, row and meta-attention are trained, nothing else; saved together, loaded into the base model again."""
    base = tiny.model()
    if not tied:
        base = LlamaForCausalLM(base.config.__class__(**{**base.config.to_dict(), "tie_word_embeddings": False}))
    start = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, use_dora=dora, target_modules="all-linear"))
    adapter = trainable(model)
    training = MetaTraining(model, reader(), tokens(), train="meta")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert adapter < trainable(model)
    assert all("meta_" in name for name in trainable(model) - adapter) and row_of(base) is not None
    assert len(base.get_input_embeddings().weight) == 65 and base.peft_config is model.peft_config
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches(3):
        inputs = ids.masked_fill(ids == TOKEN, 64)
        model(input_ids=inputs, labels=inputs.masked_fill(inputs == 64, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            rows = slice(64) if len(parameter) == 65 else slice(None)
            assert torch.equal(parameter[rows], frozen[name][rows]), name
    model.save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "meta_tokens.safetensors", "meta_tokens_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    training.finish()

    load_meta_tokens(start, tmp_path)
    loaded = PeftModel.from_pretrained(start, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model.eval()(inputs).logits)
    saved = meta_state(model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in meta_state(loaded).items())
    # Without meta-tokens the folder is an adapter alone.
    remove_meta_tokens(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "meta_tokens.safetensors").exists()


def test_a_plain_checkpoint_leaves_meta_attention_as_it_is() -> None:
    model = tiny.model()
    training = MetaTraining(model, reader(), tokens(init="normal"))
    kept = {name: tensor.clone() for name, tensor in meta_state(model).items() if name.startswith("layers")}
    plain = tiny.model(seed=5)
    plain.resize_token_embeddings(65)
    assert not model.load_state_dict(plain.state_dict()).missing_keys
    assert all(torch.equal(meta_state(model)[name], tensor) for name, tensor in kept.items())
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight)
    training.finish()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain.state_dict())


def test_gemma_scales_its_embeddings_and_the_row_with_them() -> None:
    model = architectures.build("Gemma 3")
    assert isinstance(model, Gemma3ForCausalLM) and float(model.model.embed_tokens.embed_scale) == 4
    ids = next(batches())
    before = model(ids).logits
    train_row(model.requires_grad_(False), TOKEN)
    assert torch.equal(model(ids).logits, before)


# The masked logit


@pytest.mark.parametrize("bias", [False, True])
def test_fused_heads_give_the_token_no_probability(bias: bool) -> None:
    """What TRL computes from weight and bias equals a cross-entropy without that column; its gradient there is 0."""
    from trl.kernels import ChunkedLogProbFunction

    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 20, bias=bias), torch.randn(6, 8, requires_grad=True)
    targets = torch.randint(0, 19, (6,))
    expected = functional.cross_entropy(head(hidden)[:, :19].double(), targets, reduction="none")
    wanted = torch.autograd.grad(expected.sum(), hidden)[0]
    with masked_head(head, 19):
        found = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, 1.0, 1024, None, 1.0, ("log_probs", "entropy", "is_top1")
        )
    assert (head.bias is not None) == bias
    torch.testing.assert_close(-found[0].double(), expected, rtol=0, atol=1e-5)
    assert torch.isfinite(found[1]).all()
    (-found[0]).sum().backward()
    torch.testing.assert_close(hidden.grad, wanted, rtol=0, atol=1e-5)
    assert head.weight.grad is not None and head.weight.grad[19].abs().max() == 0


def test_a_head_that_peft_wraps_or_zero3_splits_is_masked() -> None:
    model = tiny.model()
    untied = LlamaForCausalLM(model.config.__class__(**{**model.config.to_dict(), "tie_word_embeddings": False}))
    adapted = get_peft_model(untied, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = adapted.get_base_model().get_output_embeddings()
    with masked_head(head, TOKEN):
        logits = functional.linear(torch.ones(1, 16), head.weight, head.bias)
        assert logits.softmax(-1)[0, TOKEN] == 0 and torch.equal(head(torch.ones(1, 16)), logits)
    assert head.bias is None
    split = torch.nn.Linear(4, 64, bias=False)
    split.weight.ds_shape, split.weight.data = split.weight.shape, torch.empty(0)  # as outside a forward pass
    with masked_head(split, TOKEN):
        assert split.bias.shape == (64,) and split.bias.argmin() == TOKEN


def test_the_loss_of_the_model_leaves_the_token_out() -> None:
    """The mask is written into the logits that the head made: no second tensor of that size, and no gradient."""
    model = tiny.model()
    training = MetaTraining(model, reader(), tokens())
    ids = next(batches())
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected = tiny.model()(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.equal(loss, expected)
    there = attached(model)
    assert there is not None and there.config.mask_logits
    training.finish()
