"""Texts that a model writes itself, to replay where its training data cannot be had. Knows no Trainer.

They are samples of the model's own distribution, not of its data: they can remind it of no more than it still says by
itself. None of the papers on replay that are followed here tries it; a public stand-in for the data, where there is
one, is the better bet (docs/stages.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import check_integers, is_number, shown

__all__ = ["generate_texts"]


def generate_texts(
    model: Any,
    tokenizer: Any,
    num_texts: int,
    *,
    prompts: Sequence[str] | None = None,
    max_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> Any:
    """
    Samples texts from a causal language model, to be packed and replayed like any other text.

    At the defaults they are draws from the model's own distribution: its `generation_config` (penalties, top-k and the
    like) is left out of it, but for which tokens end a text. Model and random state are left as they were.

    Args:
        model: a causal language model of transformers, on the device to generate on.
        tokenizer: its tokenizer.
        num_texts (`int`): texts to sample; those that come out empty are left out.
        prompts (`list[str]`, *optional*): beginnings, taken in turn, and part of the texts. By default each text
            begins with the BOS token, or where there is none with EOS, behind which documents begin in pre-training.
        max_tokens (`int`, *optional*, defaults to 512): tokens of a text with its prompt, at most; cut there if it has
            not ended.
        temperature (`float`, *optional*, defaults to 1.0), top_p (`float`, *optional*, defaults to 1.0): below 1 texts
            are cleaner and less varied (nucleus sampling, Holtzman et al., 2020).
        batch_size (`int`, *optional*, defaults to 16): texts at a time; another one draws others.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        [`~datasets.Dataset`]: columns `text` and `tokens`, the number of its tokens as the model wrote them.

    Raises:
        `TypeError`, `ValueError`: an argument out of range, a model that does not generate, nothing to begin with, or
            no text that is not empty.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["a sentence to learn letters from"], vocab_size=270)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
    ...     num_hidden_layers=1, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id))
    >>> generate_texts(model, tokenizer, 3, prompts=["a letter"], max_tokens=20).num_rows
    3
    """
    check_integers(
        num_texts=(num_texts, 1, 1 << 40, False),
        max_tokens=(max_tokens, 2, 1 << 20, False),
        batch_size=(batch_size, 1, 1 << 16, False),
        seed=(seed, 0, 1 << 32, False),
    )
    if not is_number(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be a number above 0, got {shown(temperature)}")
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number above 0 and up to 1, got {shown(top_p)}")
    if not hasattr(model, "generate") or not model.can_generate() or model.config.is_encoder_decoder:
        raise TypeError(f"model must be a causal language model that generates, got {type(model).__name__}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and max_tokens > positions:
        raise ValueError(f"max_tokens={max_tokens} is more than the model has positions for, {positions}")
    starts = _starts(model, tokenizer, prompts, max_tokens)
    from datasets import Dataset
    from transformers import set_seed

    texts, lengths = [], []
    with rng_guard():
        set_seed(seed)
        for row in _rows(model, tokenizer, starts, num_texts, (max_tokens, batch_size, temperature, top_p)):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if text.strip():
                texts.append(text)
                lengths.append(len(row))
    if not texts:
        raise ValueError(
            f"all of the {num_texts:,} texts that the model wrote are empty: it ends them at once. Pass prompts"
        )
    return Dataset.from_dict({"text": texts, "tokens": lengths})


def _starts(model: Any, tokenizer: Any, prompts: Sequence[str] | None, max_tokens: int) -> list[list[int]]:
    if prompts is None:
        configured = model.config.get_text_config().bos_token_id
        # Configurations have a default for it, which may be an ordinary token here.
        begins = configured if configured in tokenizer.all_special_ids else None
        told = (tokenizer.bos_token_id, begins, tokenizer.eos_token_id)
        first = next((token for token in told if isinstance(token, int)), None)
        if first is None:
            raise ValueError("neither tokenizer nor model have a BOS or EOS token to begin a text with: pass prompts")
        return [[first]]
    if isinstance(prompts, str) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise ValueError(f"prompts must be texts, at least one, got {shown(prompts)}")
    # Text stays text: "</s>" in a prompt is the tokens of its characters.
    ids = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    starts = [[*bos, *row] for row in ids]
    for prompt, row in zip(prompts, starts, strict=True):
        if not row or len(row) >= max_tokens:
            raise ValueError(
                f"a prompt must have a token and leave room in max_tokens={max_tokens}, got {len(row)} tokens, "
                f"{shown(prompt)}"
            )
    return starts


def _rows(
    model: Any, tokenizer: Any, starts: list[list[int]], number: int, settings: tuple[int, int, float, float]
) -> Iterator[list[int]]:
    """Token ids of one text after the other, prompt included, up to the token that ended it."""
    from transformers import GenerationConfig

    max_tokens, batch_size, temperature, top_p = settings
    kept, training = model.generation_config, model.training
    ends = _as_set(kept.eos_token_id if kept is not None else None) | _as_set(tokenizer.eos_token_id)
    # What fills rows up is masked, and cut off behind an end.
    fill = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(t, int)), 0)
    model.eval()
    try:
        for at in range(0, number, batch_size):
            rows = [list(starts[place % len(starts)]) for place in range(at, min(at + batch_size, number))]
            open_ones = list(range(len(rows)))
            while open_ones:
                # Until the longest is full: behind that it would run out of the model's positions.
                width = max(len(rows[place]) for place in open_ones)
                ids = torch.full((len(open_ones), width), fill, device=model.device)
                mask = torch.zeros((len(open_ones), width), dtype=torch.long, device=model.device)
                for line, place in enumerate(open_ones):
                    ids[line, width - len(rows[place]) :] = torch.tensor(rows[place])
                    mask[line, width - len(rows[place]) :] = 1
                model.generation_config = GenerationConfig(
                    do_sample=True,
                    temperature=float(temperature),
                    top_p=float(top_p),
                    top_k=0,
                    max_new_tokens=max_tokens - width,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=fill,
                )
                with torch.inference_mode():
                    made = model.generate(input_ids=ids, attention_mask=mask)
                still = []
                for place, new in zip(open_ones, made[:, width:].tolist(), strict=True):
                    end = next((number for number, token in enumerate(new) if token in ends), None)
                    rows[place] += new[:end]
                    if end is None and len(rows[place]) < max_tokens:
                        still.append(place)
                open_ones = still
            yield from rows
    finally:
        model.generation_config = kept
        model.train(training)


def _as_set(token: Any) -> set[int]:
    return set() if token is None else {token} if isinstance(token, int) else set(token)
