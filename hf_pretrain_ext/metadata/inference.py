"""A prompt behind what a model was trained with: metadata ("conditional inference", MeCo, 4) and control tokens.

An evaluation harness that takes a prefix as text takes `condition("", template, ...)`; see the method card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    _check_prompt(prompt)
    return _line(_without_control(template), values) + control + prompt


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {shown(prompt)}. Give one at a time")


def _without_control(template: Any) -> Template | None:
    made = None if template is None else checked_template(template)
    if made is not None and "control" in made.fields:
        raise ValueError(
            "the template has a field called control, which is the control token here. Pass "
            "values={'control': ...} to generate, or put template.format(control=...) before the prompt"
        )
    return made


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
    head, told = _parts(checked_tokenizer(tokenizer), _line(_without_control(template), values), control, prompt)
    return [*head, *told]


def _parts(tokenizer: Any, line: str, control: str, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids of what stands before the prompt, and of the prompt."""
    _check_prompt(prompt)
    encoder, special = text_encoder(tokenizer)
    head, told = (text_ids(encoder, [text], special)[0] if text else [] for text in (line, prompt))
    return [*opening(tokenizer, encoder), *head, *_control_ids(tokenizer, control)], told


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
        `str`: the new text alone, without special tokens; joined to the prompt it is the whole.

    Raises:
        `ValueError`: a field that is left out or unknown, a control token that the tokenizer does not have, nothing
            to go on with, or settings that ask for more than one text.

    Example:

    ```python
    template = Template.load("my-model")
    generate(model, tokenizer, "The capital of", template, values={"domain": "en.wikipedia.org"}, max_new_tokens=50)
    ```
    """
    import torch

    tokenizer = checked_tokenizer(tokenizer)
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"values must be a dict by field of the template, got {shown(values)}")
    line = _line(template, dict(values or {}))
    # Not as keywords: a field may be called as an argument is.
    head, told = _parts(tokenizer, line, control, prompt)
    ids = [*head, *told]
    if not ids:
        raise ValueError("prompt is empty, and there is neither metadata nor a BOS token to begin with")
    given = _settings(model, settings)
    if (several := given("num_return_sequences") or 1) > 1 or given("return_dict_in_generate"):
        what = f"num_return_sequences={several}" if several > 1 else "return_dict_in_generate=True"
        raise ValueError(
            f"{what} asks for more than the one text that generate returns. Call it once for each, or pass prompt_ids "
            "of hf_pretrain_ext.metadata.inference to model.generate"
        )
    if forbid_control_tokens:
        forbidden = set(special_tokens(tokenizer).values()) - {tokenizer.eos_token_id}
        settings["suppress_tokens"] = sorted({*(given("suppress_tokens") or ()), *forbidden})
    for name in ("eos_token_id", "pad_token_id"):
        # The model's own configuration may say nothing, or what is not the tokenizer's.
        if tokenizer.eos_token_id is not None and getattr(settings.get("generation_config"), name, None) is None:
            settings.setdefault(name, tokenizer.eos_token_id)
    inputs = torch.tensor([ids], device=model.device)
    made = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    return _continued(tokenizer, told, made[0][len(ids) :].tolist())


def _settings(model: Any, settings: Mapping[str, Any]) -> Callable[[str], Any]:
    """What `model.generate` takes for a setting: as given, of a `generation_config`, or of the model's."""
    configs = [settings.get("generation_config"), getattr(model, "generation_config", None)]

    def of(name: str) -> Any:
        found = [settings.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in found if value is not None), None)

    return of


def _continued(tokenizer: Any, told: list[int], new: list[int]) -> str:
    """The text of `new` behind `told`: alone it would lack the space that some tokenizers have in a word's token."""
    before, whole, alone = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (told, told + new, new))
    # A prompt may end within a character, whose rest comes now.
    return whole[len(before) :] if whole.startswith(before) else alone
