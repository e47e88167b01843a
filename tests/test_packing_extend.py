"""Packed rows in an extended Trainer: a model that cannot keep documents apart is refused before training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, MambaConfig, MambaForCausalLM, Trainer

from hf_pretrain_ext import PackedCollator, PluginError, extend, pack
from hf_pretrain_ext.callbacks import ReplayCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer

TEXTS = [" ".join(random.Random(n).choices(["the", "cat", "sat", "on", "a", "mat"], k=5 + n % 7)) for n in range(60)]


def trainer(folder: Path, model: Any, isolate: bool) -> Trainer:
    tokenizer = train_tokenizer(TEXTS, vocab_size=270)
    model.resize_token_embeddings(len(tokenizer))
    rows = pack(Dataset.from_dict({"text": TEXTS}), tokenizer, 16, isolate)
    return Trainer(
        model=model,
        args=tiny.arguments(folder),
        train_dataset=rows,
        data_collator=PackedCollator(),
        callbacks=[ReplayCallback(rows.select(range(8)), ratio=0.25)],
    )


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def test_a_model_that_isolates_trains(tmp_path: Path) -> None:
    trained = extend(trainer(tmp_path, tiny.model(), isolate=True))
    trained.train()
    assert trained.plugin_run.realised()["replay"] == {
        "samples": 6,
        "tokens": 96,
        "loss_tokens": trained.plugin_run.realised()["replay"]["loss_tokens"],
        "replayed": True,
    }
    # A document's first token bears no loss.
    assert 0 < trained.plugin_run.realised()["replay"]["loss_tokens"] < 6 * 15


def test_a_model_that_leaks_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, mamba(), isolate=True)
    with pytest.raises(
        PluginError, match="packing: MambaForCausalLM lets documents of a packed row influence each other"
    ):
        extend(made)
    assert type(made) is Trainer


def test_without_isolation_it_may(tmp_path: Path) -> None:
    """Its forward takes no position_ids, so the rows go through the host's own collator."""
    made = trainer(tmp_path, mamba(), isolate=False)
    made.data_collator = DataCollatorForLanguageModeling(train_tokenizer(TEXTS, vocab_size=270), mlm=False)
    extend(made).train()
    assert made.state.global_step == 6
