"""A prompt behind what a model was trained with: metadata ("conditional inference", MeCo, 4) and control tokens.

An evaluation harness that takes a prefix as text takes `condition("", template, ...)`; see the method card.
"""

from __future__ import annotations

from typing import Any

from hf_pretrain_ext.metadata.source import checked_template
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import checked_tokenizer, opening, text_encoder, text_ids
from hf_pretrain_ext.values import shown
from hf_pretrain_ext.vocabulary import special_tokens

__all__ = ["condition", "generate", "prompt_ids"]


def condition(prompt: str, template: Template | str | None = None, /, *, control: str = "", **values: Any) -> str:
    """
    The prompt behind the template's line and a control token, as text: for `pipeline`, or to prefix an evaluation.

    A tokenizer that is given text may join the line's last character with the prompt's first, which never happened in
    training; [`prompt_ids`] and [`generate`] tokenize the two apart. It makes a control token of whatever text spells
    one, in the prompt too.

    Args:
        prompt (`str`): what the model is to go on with.
        template ([`Template`] or `str`, *optional*): the trained one, if any; [`Template.load`] reads it from the
            model's folder.
        control (`str`, *optional*): a trained control token, such as `"<|good|>"`; [`ControlTokens.load`] reads them.
        values: by field of the template; cleaned, as in training.

    Raises:
        `ValueError`: a field that is left out or unknown, or neither a template nor a control token.

    Example:

    >>> condition("The capital of", "URL: {domain}\\n\\n", domain="en.wikipedia.org")
    'URL: en.wikipedia.org\\n\\nThe capital of'
    >>> condition("The capital of", control="<|good|>")
    '<|good|>The capital of'
    """
    if not isinstance(control, str):
        raise ValueError(f"control must be the text of a control token, such as '<|good|>', got {shown(control)}")
    if template is None and not control:
        raise ValueError("there is neither a template nor control='<|good|>', say, to condition on")
    return _line(template, values) + control + prompt


def _line(template: Template | str | None, values: dict[str, Any]) -> str:
    if template is not None:
        return checked_template(template).format(**values)
    if values:
        raise ValueError(f"there are values for {sorted(values)}, but no template that has such fields")
    return ""


def prompt_ids(
    tokenizer: Any, prompt: str, template: Template | str | None = None, /, *, control: str = "", **values: Any
) -> list[int]:
    """Token ids of a prompt as training would have them: BOS where the tokenizer has it, line, control token, prompt.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> tokenizer.decode(prompt_ids(tokenizer, "ab", "at {place}: ", place="home<|endoftext|>"))
    'at home<|endoftext|>: ab'
    """
    return _joined(checked_tokenizer(tokenizer), _line(template, values), control, prompt)


def _joined(tokenizer: Any, line: str, control: str, prompt: str) -> list[int]:
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {shown(prompt)}")
    encoder, special = text_encoder(tokenizer)
    head, told = (text_ids(encoder, [text], special)[0] if text else [] for text in (line, prompt))
    return [*opening(tokenizer, encoder), *head, *_control_ids(tokenizer, control), *told]


def _control_ids(tokenizer: Any, control: Any) -> list[int]:
    if control == "":
        return []
    known = special_tokens(tokenizer)
    if control not in known:
        raise ValueError(
            f"control must be a special token of the tokenizer, one of {shown(sorted(known))}, got {shown(control)}"
        )
    return [known[control]]


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    template: Template | str | None = None,
    /,
    *,
    control: str = "",
    values: dict[str, Any] | None = None,
    forbid_control_tokens: bool = True,
    **settings: Any,
) -> str:
    """
    What the model writes behind a prompt with metadata or a control token.

    Args:
        model ([`~transformers.PreTrainedModel`]): the trained model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompt (`str`): may be empty if there is metadata, a control token or a BOS token.
        template ([`Template`] or `str`, *optional*): the trained one; without it there is no metadata.
        control (`str`, *optional*): a trained control token, such as `"<|good|>"`, before the prompt.
        values (`dict`, *optional*): by field of the template.
        forbid_control_tokens (`bool`, *optional*, defaults to `True`): never write a special token, other than the
            end of the text (published with control tokens).
        settings: passed on to `model.generate`, such as `max_new_tokens`.

    Returns:
        `str`: the new text alone, without special tokens.

    Raises:
        `ValueError`: a field that is left out or unknown, a control token that the tokenizer does not have, or nothing
            to go on with.

    Example:

    ```python
    template = Template.load("my-model")
    generate(model, tokenizer, "The capital of", template, values={"domain": "en.wikipedia.org"}, max_new_tokens=50)
    ```
    """
    import torch

    tokenizer = checked_tokenizer(tokenizer)
    line = _line(template, values or {})
    # Not as keywords: a field may be called as an argument is.
    ids = _joined(tokenizer, line, control, prompt)
    if not ids:
        raise ValueError("prompt is empty, and there is neither metadata nor a BOS token to begin with")
    if forbid_control_tokens:
        forbidden = set(special_tokens(tokenizer).values()) - {tokenizer.eos_token_id}
        given = settings.pop("suppress_tokens", None) or []
        settings["suppress_tokens"] = sorted({*given, *forbidden})
    if tokenizer.eos_token_id is not None:
        settings.setdefault("eos_token_id", tokenizer.eos_token_id)
        settings.setdefault("pad_token_id", tokenizer.eos_token_id)
    inputs = torch.tensor([ids], device=model.device)
    made = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    return str(tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True))
