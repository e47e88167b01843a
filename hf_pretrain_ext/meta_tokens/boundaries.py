"""Tokens that end a sentence or a line, found in a tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.values import is_whole, shown

__all__ = ["ending_tokens"]

STOPS = ".!?…。！？।؟"
"""Full stops, exclamation and question marks of Latin, Greek, Cyrillic, Chinese, Japanese, Hindi and Arabic."""

CLOSING = "\"'”’»)]}*_ \t"
"""What may stand behind a stop in the same token."""


def ending_tokens(tokenizer: Any, given: Sequence[str | int] | None = None) -> tuple[int, ...]:
    """
    Ids of the tokens behind which a sentence, a line or a document ends.

    Those whose text has a line break, or ends with a full stop, exclamation or question mark (quotes, brackets and
    spaces behind it left aside), and the tokenizer's end of text. A full stop of an abbreviation is one too: tokens do
    not tell. The rule is ours.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        given (`Sequence` of `str` or `int`, *optional*): tokens or ids to take instead.

    Raises:
        `ValueError`: tokens that the tokenizer does not have, or none.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> tokenizer.convert_ids_to_tokens(ending_tokens(tokenizer))[:5]
    ['<|endoftext|>', '!', '.', '?', 'Ċ']
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = tokenizer.get_vocab()
    if given is not None:
        return _named(vocabulary, given)
    numbers = sorted(vocabulary.values())
    found = set()
    for number, text in zip(numbers, tokenizer.batch_decode([[number] for number in numbers]), strict=True):
        if "\n" in text or text.rstrip(CLOSING)[-1:] in tuple(STOPS):
            found.add(number)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ValueError("boundaries: the tokenizer has no token that ends a sentence or a line. Name some yourself")
    return tuple(sorted(found))


def checked_boundaries(given: Any) -> tuple[str | int, ...] | None:
    """`given` if it is a list of tokens or ids, None if it is None; raises `ValueError` if not."""
    if given is None:
        return None
    known = isinstance(given, Sequence) and not isinstance(given, str | bytes) and len(given)
    if not known or not all((isinstance(token, str) and token) or (is_whole(token) and token >= 0) for token in given):
        raise ValueError(
            "boundaries must be a list of tokens or their ids, such as ['.', '!', '?'], got "
            f"{shown(given)}. Leave it out for sentences and lines"
        )
    return tuple(int(token) if is_whole(token) else token for token in given)


def _named(vocabulary: dict[str, int], given: Sequence[str | int]) -> tuple[int, ...]:
    numbers = set(vocabulary.values())
    unknown = [t for t in given if (t not in vocabulary if isinstance(t, str) else t not in numbers)]
    if unknown:
        raise ValueError(
            f"boundaries has {shown(unknown)}, which the tokenizer does not know as tokens. Look them up with "
            "tokenizer.convert_ids_to_tokens"
        )
    return tuple(sorted({vocabulary[token] if isinstance(token, str) else int(token) for token in given}))
