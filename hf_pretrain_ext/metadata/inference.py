"""A prompt behind the line of metadata that a model was trained with ("conditional inference", MeCo, 4)."""

from __future__ import annotations

from typing import Any

from hf_pretrain_ext.metadata.documents import checked_template
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import checked_tokenizer, opening, text_encoder, text_ids
from hf_pretrain_ext.values import shown

__all__ = ["condition", "generate", "prompt_ids"]


def condition(prompt: str, template: Template | str, /, **values: Any) -> str:
    """
    The prompt with the template's line in front, as text: for `pipeline`, or as a prefix of an evaluation.

    A tokenizer that is given text may join the line's last character with the prompt's first, which never happened in
    training; [`prompt_ids`] and [`generate`] tokenize the two apart.

    Args:
        prompt (`str`): what the model is to go on with.
        template ([`Template`] or `str`): the trained one; [`Template.load`] reads it from the model's folder.
        values: by field of the template; cleaned, as in training.

    Raises:
        `ValueError`: a field that is left out or unknown.

    Example:

    >>> condition("The capital of", "URL: {domain}\\n\\n", domain="en.wikipedia.org")
    'URL: en.wikipedia.org\\n\\nThe capital of'
    """
    return checked_template(template).format(**values) + prompt


def prompt_ids(tokenizer: Any, prompt: str, template: Template | str | None = None, /, **values: Any) -> list[int]:
    """Token ids of a prompt as training would have them: BOS where the tokenizer has it, the line, the prompt.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> tokenizer.decode(prompt_ids(tokenizer, "ab", "at {place}: ", place="home<|endoftext|>"))
    'at home<|endoftext|>: ab'
    """
    tokenizer = checked_tokenizer(tokenizer)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {shown(prompt)}")
    encoder, control = text_encoder(tokenizer)
    texts = [prompt] if template is None else [checked_template(template).format(**values), prompt]
    ids = [number for part in text_ids(encoder, texts, control) for number in part]
    return [*opening(tokenizer, encoder), *ids]


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    template: Template | str | None = None,
    /,
    *,
    values: dict[str, Any] | None = None,
    forbid_control_tokens: bool = True,
    **settings: Any,
) -> str:
    """
    What the model writes behind a prompt with metadata.

    Args:
        model ([`~transformers.PreTrainedModel`]): the trained model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompt (`str`): may be empty if there is metadata or a BOS token.
        template ([`Template`] or `str`, *optional*): the trained one; without it there is no metadata.
        values (`dict`, *optional*): by field of the template.
        forbid_control_tokens (`bool`, *optional*, defaults to `True`): never write a special token, other than the
            end of the text.
        settings: passed on to `model.generate`, such as `max_new_tokens`.

    Returns:
        `str`: the new text alone, without special tokens.

    Raises:
        `ValueError`: a field that is left out or unknown, or nothing to go on with.

    Example:

    ```python
    template = Template.load("my-model")
    generate(model, tokenizer, "The capital of", template, values={"domain": "en.wikipedia.org"}, max_new_tokens=50)
    ```
    """
    import torch

    ids = prompt_ids(tokenizer, prompt, template, **(values or {}))
    if not ids:
        raise ValueError("prompt is empty, and there is neither metadata nor a BOS token to begin with")
    tokenizer = checked_tokenizer(tokenizer)
    if forbid_control_tokens:
        control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        control |= set(tokenizer.all_special_ids)
        given = settings.pop("suppress_tokens", None) or []
        settings["suppress_tokens"] = sorted({*given, *(control - {tokenizer.eos_token_id})})
    if tokenizer.eos_token_id is not None:
        settings.setdefault("eos_token_id", tokenizer.eos_token_id)
        settings.setdefault("pad_token_id", tokenizer.eos_token_id)
    inputs = torch.tensor([ids], device=model.device)
    made = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    return str(tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True))
