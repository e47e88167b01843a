"""Prompts with meta-tokens in them, and text that a model writes behind them.

`model.generate` needs nothing of this: it finds meta-tokens in `input_ids`, keeps their keys beside its cache and
writes none itself. Where fine-tuned models want theirs is a matter of the task; the paper places them on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.meta_tokens.attach import allow_meta_tokens, required, unwrapped
from hf_pretrain_ext.packing import checked_tokenizer, opening, text_encoder, text_ids
from hf_pretrain_ext.values import check_flag, check_integers, is_whole, shown

__all__ = ["generate", "insert_in_prompts", "meta_prompt_ids"]


def meta_prompt_ids(
    tokenizer: Any,
    prompt: str,
    *,
    token: str = "<|meta|>",
    every: int | None = None,
    marks: str | Sequence[str] = (),
    end: int = 0,
) -> list[int]:
    """
    Token ids of a prompt with meta-tokens in it.

    Text is tokenized as text: what looks like a control token in it, the meta-token included, becomes the tokens of
    its characters. A mark parts the text, and both sides are tokenized apart.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): one that has the token.
        prompt (`str`): the text.
        token (`str`, *optional*, defaults to `"<|meta|>"`): the meta-token.
        every (`int`, *optional*): one behind every so many tokens of text. A token that the tokenizer begins texts
            with is not counted; [`insert_in_prompts`], which cannot tell it from text, counts it.
        marks (`str` or `Sequence[str]`, *optional*): pieces of text that each become a meta-token.
        end (`int`, *optional*, defaults to 0): so many at the end.

    Raises:
        `ValueError`: no rule is given, or one that cannot be; the tokenizer lacks the token.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> from hf_pretrain_ext.vocabulary import add_tokens
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> number = add_tokens(tokenizer, ["<|meta|>"])
    >>> tokenizer.decode(meta_prompt_ids(tokenizer, "list: abc [] def", every=6, marks="[]", end=1))
    'list: <|meta|>abc <|meta|> d<|meta|>ef<|meta|>'
    """
    marks = [marks] if isinstance(marks, str) else list(marks)
    _check_rules(every=every, end=end, others=bool(marks))
    if not all(isinstance(mark, str) and mark for mark in marks):
        raise ValueError(f"marks must be pieces of text, got {shown(marks)}")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {shown(prompt)}")
    tokenizer = checked_tokenizer(tokenizer)
    number = _number(tokenizer, token)
    encoder, control = text_encoder(tokenizer)
    # The longest first: a mark may begin with another.
    parts = re.split("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), prompt) if marks else [prompt]
    ids, seen = opening(tokenizer, encoder), 0
    for index, part in enumerate(text_ids(encoder, parts, control)):
        ids += [number] * (index > 0)
        for each in part:
            ids.append(each)
            seen += 1
            if every is not None and seen % every == 0:
                ids.append(number)
    return ids + [number] * end


def _number(tokenizer: Any, token: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"the tokenizer has no token {shown(token)}. Load the one that was saved with the model, or add it with "
            "add_meta_tokens(model, tokenizer)"
        )
    return int(number)


def _check_rules(every: Any, end: Any, others: bool) -> None:
    check_integers(every=(every, 1, None, True), end=(end, 0, None, False))
    if every is None and not end and not others:
        raise ValueError("no rule says where meta-tokens go. Pass every=16, end=1 or marks")


def insert_in_prompts(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    token_id: int,
    every: int | None = None,
    after: Sequence[int] = (),
    end: int = 0,
    pad_token_id: int = 0,
) -> dict[str, Tensor]:
    """
    A batch of tokenized prompts with meta-tokens in them, padded on the left, as `model.generate` takes it.

    Args:
        input_ids (`Tensor`): `(batch, length)`.
        attention_mask (`Tensor`, *optional*): the same, 0 where padding stands, on either side.
        token_id (`int`): the meta-token.
        every (`int`, *optional*): one behind every so many tokens, a first one such as `<bos>` among them (unlike
            [`meta_prompt_ids`]).
        after (`Sequence[int]`, *optional*): one behind each of these tokens.
        end (`int`, *optional*, defaults to 0): so many at the end.
        pad_token_id (`int`, *optional*, defaults to 0): what pads; it is left out of attention.

    Returns:
        `dict[str, Tensor]`: `input_ids` and `attention_mask`.

    Raises:
        `ValueError`: no rule is given, or one that cannot be.

    Example:

    >>> made = insert_in_prompts(torch.tensor([[5, 6, 7], [8, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]),
    ...                          token_id=9, after=[5], end=1)
    >>> made["input_ids"].tolist(), made["attention_mask"].tolist()
    ([[5, 9, 6, 7, 9], [0, 8, 5, 9, 9]], [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    """
    if isinstance(after, int) or not all(is_whole(each) for each in after):
        raise ValueError(f"after must be token ids, got {shown(after)}")
    _check_rules(every=every, end=end, others=len(after) > 0)
    check_integers(token_id=(token_id, 0, None, False), pad_token_id=(pad_token_id, 0, None, False))
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(f"input_ids must be a tensor of shape (batch, length), got {shown(input_ids)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: pass "
            "those that the tokenizer returned together"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for tokens, real in zip(input_ids.tolist(), mask.tolist(), strict=True):
        row: list[int] = []
        text = [each for each, kept in zip(tokens, real, strict=True) if kept]
        for place, each in enumerate(text, start=1):
            row += [each] + [token_id] * ((each in after) + (every is not None and place % every == 0))
        rows.append(row + [token_id] * end)
    return _left_padded(rows, pad_token_id, input_ids.device)


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    length = max(map(len, rows), default=0)
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    real = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long, device=device).view(len(rows), length),
        "attention_mask": torch.tensor(real, dtype=torch.long, device=device).view(len(rows), length),
    }


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    every: int | None = None,
    marks: str | Sequence[str] = (),
    end: int = 0,
    write_meta_tokens: bool = False,
    **settings: Any,
) -> Any:
    """
    What the model writes behind prompts with meta-tokens in them.

    Args:
        model ([`~transformers.PreTrainedModel`]): one with meta-tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`str` or `Sequence[str]`): several are run as one batch, padded on the left.
        every, marks, end: where meta-tokens go; see [`meta_prompt_ids`]. At least one.
        write_meta_tokens (`bool`, *optional*, defaults to `False`): let the model write meta-tokens itself.
        settings: passed on to `model.generate`, such as `max_new_tokens`.

    Returns:
        `str` or `list[str]`: the new text alone, without special tokens.

    Raises:
        `ValueError`: the model or tokenizer has no meta-tokens, no rule says where they go, or more than text is asked
            for.

    Example:

    ```python
    generate(model, tokenizer, "List: a b c. Recall item 2:", end=2, max_new_tokens=5)
    ```
    """
    check_flag("write_meta_tokens", write_meta_tokens)
    if settings.get("return_dict_in_generate"):
        raise ValueError(
            "return_dict_in_generate=True asks for more than text, which is what generate returns. Call "
            "model.generate(**insert_in_prompts(...), return_dict_in_generate=True)"
        )
    tokens, tokenizer = required(model), checked_tokenizer(tokenizer)
    if _number(tokenizer, tokens.config.token) != tokens.passes.token_id:
        raise ValueError(
            f"the tokenizer has {shown(tokens.config.token)} as {_number(tokenizer, tokens.config.token)}, and the "
            f"model as {tokens.passes.token_id}. Load the tokenizer that was saved with the model"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rules: dict[str, Any] = {"every": every, "marks": marks, "end": end}
    rows = [meta_prompt_ids(tokenizer, text, token=tokens.config.token, **rules) for text in texts]
    if not rows or not all(rows):
        raise ValueError("prompts has none, or an empty one: there is nothing to go on with")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = {"pad_token_id": pad, **settings}
    # The model's own list of what ends a text may be longer than the tokenizer's one token.
    if getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None) is None:
        settings.setdefault("eos_token_id", tokenizer.eos_token_id)
    if not write_meta_tokens and settings.get("suppress_tokens") is not None:
        settings["suppress_tokens"] = sorted({*settings["suppress_tokens"], tokens.passes.token_id})
    inputs = _left_padded(rows, pad, model.device)
    with allow_meta_tokens(model) if write_meta_tokens else nullcontext():
        made = model.generate(**inputs, **settings)
    new = getattr(made, "sequences", made)[:, inputs["input_ids"].shape[1] :]
    written = [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    several = len(written) > 1 or not isinstance(prompts, str)
    return written if several else written[0]
