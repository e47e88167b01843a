"""Tiny models, data and trainers for the tests: built from configs, no downloads."""

from __future__ import annotations

import random
import string
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

VOCABULARY = 64
LENGTH = 16


def model(dropout: float = 0.0, seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def rows(number: int, seed: int = 0, length: int = LENGTH, low: int = 1, high: int = VOCABULARY) -> Dataset:
    """`number` rows of random ids in [low, high): every row is distinct, so order can be read off the ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (number, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


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


def arguments(output_dir: Any, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(
    output_dir: Any, *callbacks: Any, cls: type[Trainer] = Trainer, data: Any = None, **settings: Any
) -> Trainer:
    dropout, held_out = settings.pop("dropout", 0.0), settings.pop("eval_dataset", None)
    given = settings.pop("model", None)
    collator, reader = settings.pop("data_collator", default_data_collator), settings.pop("processing_class", None)
    return cls(
        model=model(dropout) if given is None else given,
        args=arguments(output_dir, **settings),
        train_dataset=rows(40) if data is None else data,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=reader,
        callbacks=[*callbacks, Seen()],
    )


class Seen(TrainerCallback):
    """Keeps what a run logged, without wall-clock figures."""

    TIMINGS = ("runtime", "per_second", "total_flos")

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {k: v for k, v in (logs or {}).items() if not any(part in k for part in self.TIMINGS)}
        self.logs.append({**kept, "step": state.global_step})


def weights(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.model.state_dict().items()}


def history(trained: Trainer) -> list[dict[str, Any]]:
    """The log history without wall-clock figures."""
    return [
        {k: v for k, v in line.items() if not any(part in k for part in Seen.TIMINGS)}
        for line in trained.state.log_history
    ]


def same_weights(first: Trainer, second: Trainer) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
