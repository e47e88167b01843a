"""What the look at rows notes and leaves alone; what it refuses is in `bad_inputs.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    Trainer,
)

from hf_pretrain_ext import _host, extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tiny.model(), (64, False)),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=20, n_embd=8, n_layer=1, n_head=2)), (20, True)),
        (
            lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=20)),
            (20, True),
        ),
        (lambda: BertModel(BertConfig(**SMALL, intermediate_size=8, max_position_embeddings=20)), (20, True)),
        # Its table begins with rows for padding: 512 positions are 514 rows.
        (lambda: RobertaModel(RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=22)), (20, True)),
        (lambda: object(), (None, False)),
    ],
)
def test_positions_of_models(model: Any, expected: tuple[int | None, bool]) -> None:
    assert _host.positions(model()) == expected


def notes(tmp_path: Path, caplog: pytest.LogCaptureFixture, *plugins: Any, **arguments: Any) -> str:
    from hf_pretrain_ext.say import logger

    logger.addHandler(caplog.handler)
    try:
        extend(tiny.trainer(tmp_path, *plugins, **arguments))
    finally:
        logger.removeHandler(caplog.handler)
    return caplog.text


def test_rotary_models_may_be_taken_further(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More tokens than `max_position_embeddings`: a note, since such models learn longer texts by that."""
    said = notes(tmp_path, caplog, RewarmCallback(1e-2), data=tiny.rows(8, length=80))
    assert "train_dataset: holds rows of 80 tokens, more than the 64 positions that the model was made for" in said


def test_some_empty_rows_are_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [], [3, 4]], "labels": [[1, 2], [], [3, 4]]})
    assert "holds 1 rows without a token among 3 looked at (row 1)" in notes(
        tmp_path, caplog, RewarmCallback(1e-2), data=rows
    )


def test_right_data_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels that are ignored in places, held-out rows of several lengths one at a time, rows of a list."""
    masked = tiny.rows(8).map(lambda row: {"labels": [-100] * 8 + row["labels"][8:]})
    ragged = Dataset.from_list([*tiny.rows(2).to_list(), *tiny.rows(2, length=9).to_list()])
    plugins = [RewarmCallback(1e-2), ForgettingCallback({"old": ragged}, batch_size=1)]
    said = notes(tmp_path, caplog, *plugins, data=masked)
    assert "train_dataset" not in said and "positions" not in said
    caplog.clear()
    lists = ReplayCallback(tiny.rows(9, seed=5).to_list(), ratio=0.25)
    assert notes(tmp_path, caplog, lists, data=tiny.rows(30).to_list()) == ""


def test_labels_that_a_collator_replaces_are_its_own(tmp_path: Path) -> None:
    """A column of classes beside texts, and a collator that makes labels of the tokens."""
    tokenizer = train_tokenizer(["a b"], vocab_size=257)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[900] * 3] * 4})
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    extend(trainer, RewarmCallback(1e-2))
