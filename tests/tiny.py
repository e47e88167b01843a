"""Tiny models, data and trainers for the tests: the kit's own, and raw documents with a tokenizer for them."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TrainingArguments, default_data_collator

from hf_pretrain_ext.testing import (
    LENGTH,
    VOCABULARY,
    Seen,
    arguments,
    history,
    model,
    rows,
    same_weights,
    trainer,
    weights,
)

__all__ = [
    "CHECKPOINTING",
    "LENGTH",
    "VOCABULARY",
    "Seen",
    "arguments",
    "checkpoint_activations",
    "default_data_collator",
    "documents",
    "history",
    "model",
    "rows",
    "same_weights",
    "tokenizer",
    "trainer",
    "weights",
]


# Newer releases of transformers warn of the older name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """From here on, layers are computed again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, below `VOCABULARY`; the end of a text is 0."""
    signs = string.ascii_lowercase + string.digits + " .:/-"
    backend = Tokenizer(
        models.BPE({"<eos>": 0, "<unk>": 1, **{c: n for n, c in enumerate(signs, 2)}}, [], unk_token="<unk>")
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def documents(number: int, seed: int = 0) -> Dataset:
    """Raw documents of 1 to 20 letters with the address that each is from."""
    draw = random.Random(seed)
    return Dataset.from_dict(
        {
            "text": ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 20))) for _ in range(number)],
            "url": [f"https://{draw.choice('abc')}.io/{n}" for n in range(number)],
        }
    )
