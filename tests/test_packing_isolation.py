"""Packed documents stay apart: perturbed models of many families, losses document by document, trainers' batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
)

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.packing import PackedCollator, check_isolation, pack

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NARROW: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}

ISOLATE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, max_position_embeddings=64),
    "qwen3": lambda: Qwen3Config(**NARROW),
    "gpt2": lambda: GPT2Config(**GPT2_SIZES),
}
LEAK: dict[str, Callable[[], PretrainedConfig]] = {
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "bert": lambda: BertConfig(**SIZES, is_decoder=True),
    "qwen3_next": lambda: Qwen3NextConfig(
        **NARROW,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}
LENGTHS = [5, 4, 7]


def model_of(config: PretrainedConfig, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config.use_cache = False  # as the Trainer sets it
    if type(config) is MambaConfig:
        return AutoModelForCausalLM.from_config(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def row(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, VOCABULARY, (sum(LENGTHS),), generator=generator).tolist(),
        "seq_lengths": LENGTHS,
    }


def influence(model: Any, batch: dict[str, Any], document: int) -> tuple[float, float]:
    """Largest change of logits (of other documents, of its own) when one token of a document changes."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, starts[document]] = (inputs["input_ids"][:, starts[document]] + 7) % VOCABULARY
    model.eval()
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**changed).logits).abs()
    own = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    own[starts[document] : starts[document + 1]] = True
    return float(difference[:, ~own].max()), float(difference[:, own].max())


@contextmanager
def calls(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What the model is called with."""
    seen: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


# Models


@pytest.mark.architectures
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ISOLATE)
def test_no_token_influences_another_document(family: str, attention: str) -> None:
    model = model_of(ISOLATE[family](), attention)
    batch: dict[str, Any] = PackedCollator()([row(1), row(2)])
    for document in range(len(LENGTHS)):
        others, own = influence(model, batch, document)
        assert others <= 1e-6 and own > 1e-2
    # The probe would see it: without restarts, with a mask of ones, with a cache.
    loose = {**batch, "position_ids": torch.arange(sum(LENGTHS)).expand(2, -1)}
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    for leaking in (loose, masked, {**batch, "use_cache": True}):
        assert influence(model, leaking, 0)[0] > 1e-3
    flat: dict[str, Any] = PackedCollator(flatten=True)([row(1), row(2)])
    with torch.no_grad():
        rows, one = (model(input_ids=b["input_ids"], position_ids=b["position_ids"]).logits for b in (batch, flat))
    torch.testing.assert_close(one.view_as(rows), rows, atol=1e-5, rtol=1e-5)


@pytest.mark.architectures
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ISOLATE)
def test_the_check_passes_what_isolates(family: str, attention: str) -> None:
    model = model_of(ISOLATE[family](), attention)
    assert check_isolation(model) == 0.0
    assert check_isolation(model.to(torch.bfloat16)) == 0.0


@pytest.mark.architectures
@pytest.mark.parametrize("family", LEAK)
def test_the_check_refuses_what_leaks(family: str) -> None:
    model = model_of(LEAK[family](), "eager")
    batch: dict[str, Any] = PackedCollator()([row(1), row(2)])
    if family == "falcon" and max(influence(model, batch, document)[0] for document in range(len(LENGTHS))) == 0:
        # As of transformers 5.24.
        assert check_isolation(model) == 0.0
        return
    with pytest.raises(ValueError, match=r"influence each other.*carry state past a restart.*isolate=False"):
        check_isolation(model)
    assert check_isolation(model, tolerance=10.0) > 1e-3


def test_the_check_names_the_switch_that_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(ISOLATE["llama"]())
    batch: dict[str, Any] = PackedCollator()([row(1), row(2)])
    assert check_isolation(model, batch) == 0.0
    with pytest.raises(ValueError, match=r"attention_mask, which switches isolation off.*PackedCollator"):
        check_isolation(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    model.config.use_cache = True
    with pytest.raises(ValueError, match=r"makes a cache.*model.config.use_cache = False"):
        check_isolation(model)
    uncached = {**batch, "use_cache": False}
    assert check_isolation(model, uncached) == 0.0
    leaking = model_of(LEAK["opt"]())
    leaking.config.use_cache = True
    with pytest.raises(ValueError, match="carry state"):
        check_isolation(leaking, uncached)
    leaking = model_of(LEAK["opt"]())
    # Flash attention runs on no CPU; what its name makes of the advice can be seen.
    monkeypatch.setattr(type(leaking.config), "_attn_implementation", "flash_attention_2", raising=False)
    monkeypatch.setattr(leaking, "forward", lambda input_ids, **_: (input_ids.flip(-1).float()[..., None],))
    with pytest.raises(ValueError, match=r"batches of 1.*flatten=True"):
        check_isolation(leaking, batch)


def test_the_check_says_what_it_cannot_tell() -> None:
    batch: dict[str, Any] = PackedCollator()([row(1)])
    model = model_of(ISOLATE["llama"]())
    with pytest.raises(ValueError, match=r"no position_ids, only \['input_ids'\]"):
        check_isolation(model, {"input_ids": batch["input_ids"]})
    alone = {**batch, "position_ids": torch.arange(sum(LENGTHS))[None]}
    with pytest.raises(ValueError, match="rows of several documents"):
        check_isolation(model, alone)
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration cannot be called with .*'position_ids'"):
        check_isolation(encoder)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="do not depend on its input_ids"):
        check_isolation(model)


def test_the_check_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ISOLATE["gpt2"]()
    config.attn_pdrop = config.resid_pdrop = 0.5
    model = model_of(config)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    during = []
    hook = model.register_forward_pre_hook(lambda module, _: during.append(module.training))
    assert check_isolation(model) == 0.0
    hook.remove()
    assert during == [False, False]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())

    def fail(**inputs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        check_isolation(model)
    assert [module.training for module in model.modules()] == modes


# Losses


def alone(model: Any, ids: list[int]) -> tuple[torch.Tensor, int]:
    """Sum of the losses of a document by itself, and how many tokens bear one."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    targets = torch.tensor(ids[1:])
    return torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"), len(targets)


@pytest.mark.parametrize("family", ISOLATE)
def test_the_loss_is_that_of_documents_one_by_one(family: str) -> None:
    model = model_of(ISOLATE[family](), dtype=torch.float64).eval()
    tokenizer = train_tokenizer(["a"], 257)
    docs = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19]]
    rows = pack(Dataset.from_dict({"input_ids": docs}), tokenizer, 8, remainder="pad")
    # The stream: 5 6 7 . | 8 . | 9 10   then   11 ... 17 .   then   18 19 . and padding.
    parts = [[5, 6, 7, 0], [8, 0], [9, 10], [11, 12, 13, 14, 15, 16, 17, 0], [18, 19, 0]]
    batch = PackedCollator()(list(rows))
    with torch.no_grad():
        sums, counts = zip(*[alone(model, part) for part in parts], strict=True)
        output = model(**batch)
    expected = float(sum(sums)) / sum(counts)
    bearing = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(bearing) == pytest.approx(expected, rel=1e-12)
    assert float(output.loss) == pytest.approx(expected, rel=1e-6)  # transformers computes it in float32
    # Across boundaries there is more loss to ask, and context to use.
    through = PackedCollator()(list(pack(Dataset.from_dict({"input_ids": docs}), tokenizer, 8, isolate=False)))
    with torch.no_grad():
        found, plain = model(**through).loss, model(input_ids=through["input_ids"], labels=through["input_ids"]).loss
    assert float(found) == float(plain) and abs(float(found) - expected) > 1e-4


# Trainers


def packed_rows(number: int = 24, seed: int = 0, **settings: Any) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    docs = [
        torch.randint(1, VOCABULARY, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 12, (4 * number,), generator=generator)
    ]
    made = pack(Dataset.from_dict({"input_ids": docs}), train_tokenizer(["a"], 257), 16, **settings)
    return made.select(range(number))


def isolated_calls(seen: list[dict[str, Any]]) -> bool:
    """Whether every call was in the form that transformers isolates, with documents to isolate."""
    return bool(seen) and all(
        call.get("attention_mask") is None
        and not call.get("use_cache")
        and int((call["position_ids"] == 0).sum()) > len(call["position_ids"])
        and bool((call["labels"][call["position_ids"] == 0] == -100).all())
        for call in seen
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_trainer_passes_packed_rows_on(tmp_path: Path, family: str) -> None:
    config = ISOLATE[family]()
    config.use_cache = True  # as configurations come
    torch.manual_seed(0)
    trainer: Any = Trainer(
        AutoModelForCausalLM.from_config(config),
        tiny.arguments(tmp_path, max_steps=2),
        PackedCollator(),
        packed_rows(),
        packed_rows(8, seed=1),
    )
    assert trainer.args.remove_unused_columns and trainer.model.config.use_cache is False
    assert check_isolation(trainer.model, next(iter(trainer.get_train_dataloader()))) == 0.0
    with calls(trainer.model) as seen:
        trainer.train()
        assert len(seen) == 2 and isolated_calls(seen)
        del seen[:]
        loss = trainer.evaluate()["eval_loss"]
        assert len(seen) == 2 and isolated_calls(seen)
    batch = PackedCollator()(list(trainer.eval_dataset))
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        means = [
            torch.nn.functional.cross_entropy(logits[rows, :-1].flatten(0, 1), batch["labels"][rows, 1:].flatten())
            for rows in (slice(0, 4), slice(4, 8))
        ]
    assert loss == pytest.approx(float(sum(means)) / 2, rel=1e-5)


def test_the_default_collator_cannot_be_used_unnoticed(tmp_path: Path) -> None:
    trainer = Trainer(
        model_of(ISOLATE["llama"]()), tiny.arguments(tmp_path, max_steps=1), default_data_collator, packed_rows()
    )
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()


def test_replay_passes_packed_rows_on(tmp_path: Path) -> None:
    new, old = packed_rows(), packed_rows(8, seed=1)
    trainer = Trainer(model_of(ISOLATE["llama"]()), tiny.arguments(tmp_path, max_steps=3), PackedCollator(), new)
    extend(trainer, ReplayCallback(old, ratio=0.5))
    with calls(trainer.model) as seen:
        assert check_isolation(trainer.model, next(iter(trainer.get_train_dataloader()))) == 0.0
    assert [set(call) for call in seen] == [{"input_ids", "position_ids"}] * 2
    positions = {
        name: {tuple(ids): places for ids, places in zip(data["input_ids"][:], data["position_ids"][:], strict=True)}
        for name, data in (("new", new), ("old", old))
    }
    with calls(trainer.model) as seen:
        trainer.train()
    assert len(seen) == 3 and isolated_calls(seen)
    for call in seen:
        drawn = [tuple(ids) for ids in call["input_ids"].tolist()]
        assert sorted(ids in positions["old"] for ids in drawn) == [False, False, True, True]
        expected = {**positions["new"], **positions["old"]}
        assert call["position_ids"].tolist() == [expected[ids] for ids in drawn]


def sft_trainer(folder: Path, data: Dataset, collator: Any = None, **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    tokenizer = train_tokenizer(["some words of the text"], 300)
    tokenizer.split_special_tokens = False
    config = ISOLATE["llama"]()
    config.vocab_size = 300
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        tiny.CHECKPOINTING: False,
    }
    return trl.SFTTrainer(
        model=model_of(config),
        args=trl.SFTConfig(**{**defaults, **settings}),
        data_collator=collator,
        processing_class=tokenizer,
        train_dataset=data,
    )


OURS: dict[str, Any] = {"packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}


def test_trl_keeps_apart_what_it_packs(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["some words " * (1 + number % 5) for number in range(60)]})
    trainer = sft_trainer(tmp_path, texts, packing=True, max_length=32)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and "attention_mask" not in batch
    assert check_isolation(trainer.model, batch) == 0.0
    with calls(trainer.model) as seen:
        trainer.train()
    assert isolated_calls(seen)
    # Its other strategy makes a mask of ones and no positions: documents see each other, and nothing can tell.
    wrapped = sft_trainer(tmp_path, texts, packing=True, max_length=32, packing_strategy="wrapped")
    batch = next(iter(wrapped.get_train_dataloader()))
    assert bool(batch["attention_mask"].all())
    with pytest.raises(ValueError, match="no position_ids"):
        check_isolation(wrapped.model, batch)


@pytest.mark.parametrize("way", ["our collator", "padding_free", "prepared again"])
def test_trl_keeps_apart_what_we_packed(tmp_path: Path, way: str) -> None:
    data = packed_rows()
    if way == "padding_free":
        trainer = sft_trainer(tmp_path, data, **OURS, padding_free=True)
    elif way == "our collator":
        trainer = sft_trainer(tmp_path, data, PackedCollator(), **OURS)
    else:
        trainer = sft_trainer(tmp_path, data, PackedCollator(), packing=False, max_length=None)
    batch = next(iter(trainer.get_train_dataloader()))
    assert check_isolation(trainer.model, batch) == 0.0
    with calls(trainer.model) as seen:
        trainer.train()
        assert len(seen) == 2 and isolated_calls(seen)
        del seen[:]
        trainer.evaluate(packed_rows(4, seed=1))
        assert isolated_calls(seen)
    known = {tuple(ids): places for ids, places in zip(data["input_ids"][:], data["position_ids"][:], strict=True)}
    for ids, places in zip(batch["input_ids"].view(-1, 16), batch["position_ids"].view(-1, 16), strict=True):
        assert known[tuple(ids.tolist())] == places.tolist()


def test_trl_left_to_itself_is_found_out(tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path, packed_rows(), **OURS)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="no position_ids"):
        check_isolation(trainer.model, batch)
    cut = sft_trainer(tmp_path, packed_rows(), PackedCollator(), packing=False, max_length=10)
    with pytest.raises(ValueError, match="max_length=None"):
        next(iter(cut.get_train_dataloader()))
