"""New control tokens: in the tokenizer, and as rows of a model's embeddings.

A raw loop calls both functions before it makes its optimizer; plug-ins call `add_tokens` when data is prepared and
`fit_embeddings` in `wrap_model`. `fit_embeddings` records in the model's config what it did, so that it never does it
twice: not in a second training, not with a model that was loaded.
"""

from __future__ import annotations

import copy
import importlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import is_whole, shown

__all__ = [
    "Init",
    "RECORD",
    "add_tokens",
    "check_embeddings",
    "fit_embeddings",
    "ids_without_rows",
    "is_fitted",
    "special_tokens",
    "trains_rows",
]

Init = Literal["mean", "zero"]

RECORD = "fitted_tokens"
"""In a model's config: the tokens whose rows were initialised here, with their ids."""

MULTIPLE = 128
"""Rows that were padded stay a multiple of the largest power of two that divided them, at most of this."""

_ADDED: Any = weakref.WeakKeyDictionary()
"""By tokenizer: the tokens that `add_tokens` gave it in this process, so that no model has trained their rows."""

CHUNK = 1 << 14
"""Rows that are summed at a time: a table of 2^17 rows by 2^12 in float32 would take 2 GiB."""


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer by their text, with their ids."""
    found = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """
    Adds special tokens to a tokenizer; those that are special already stay as they are.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): changed in place; a processor's tokenizer is taken.
        tokens (`Sequence[str]`): such as `["<|good|>", "<|bad|>"]`.

    Returns:
        `list[int]`: their ids, in the order given; also of those that were there, whose rows the model may have
        trained: leave them out of [`fit_embeddings`] then.

    Raises:
        `ValueError`: an empty text, a token given twice, or one that the tokenizer has as an ordinary token: text that
            contains it would become the control token. The tokenizer is then left as it was.

    Example:

    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> add_tokens(tokenizer, ["<|good|>", "<|endoftext|>"])
    [257, 0]
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    given = checked_tokens(tokens)
    special, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
    if ordinary := [token for token in given if token in vocabulary and token not in special]:
        raise ValueError(
            f"tokens has {shown(ordinary)}, which the tokenizer knows as ordinary text. Choose another name, such as "
            "'<|good|>'"
        )
    if fresh := [token for token in given if token not in special]:
        taken = set(vocabulary.values())
        # Backends count tokens to find the next id; where a vocabulary has gaps, that id may be somebody's.
        if max(taken) >= len(taken) and taken.intersection(_add(copy.deepcopy(tokenizer), fresh)):
            raise ValueError(
                f"the tokenizer would give {shown(fresh)} ids of others: its vocabulary of {len(taken):,} tokens "
                f"has gaps (largest id {max(taken):,}). Choose tokens that it has: {shown(list(special))}"
            )
        _add(tokenizer, fresh)
        _ADDED.setdefault(tokenizer, set()).update(fresh)
    return list(tokenizer.convert_tokens_to_ids(given))


def _add(tokenizer: Any, tokens: list[str]) -> list[int]:
    from transformers import AddedToken

    made = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens({"extra_special_tokens": made}, replace_extra_special_tokens=False)
    return list(tokenizer.convert_tokens_to_ids(tokens))


def checked_tokens(tokens: Any) -> list[str]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise ValueError(f"tokens must be a list of texts such as ['<|good|>', '<|bad|>'], got {shown(tokens)}")
    if not tokens:
        raise ValueError("tokens is empty. Name at least one, such as '<|good|>'")
    for token in tokens:
        if not isinstance(token, str) or not token.strip() or token != token.strip():
            raise ValueError(
                f"tokens must be texts without white space at their ends, such as '<|good|>', got {shown(token)}"
            )
    if twice := sorted({token for token in tokens if list(tokens).count(token) > 1}):
        raise ValueError(f"tokens has {shown(twice)} more than once. Give every token a name of its own")
    return list(tokens)


def fit_embeddings(model: Any, tokenizer: Any, ids: Sequence[int], init: Init = "mean") -> None:
    """
    Gives the tokens `ids` rows in a model's input and output embeddings, before the optimizer is made.

    Tables grow only where an id does not fit; `config.vocab_size` then follows. A model whose tables had rows that no
    token used keeps them a multiple of the largest power of two, at most 128, that divided them. Tied weights stay
    tied. No other row changes, hence no logit of another token, and no random number is drawn. What was done is
    recorded in `model.config.fitted_tokens`, and tokens that are recorded there are left alone: rows that were trained
    are not initialised again.

    Args:
        model ([`~transformers.PreTrainedModel`]): changed in place; ZeRO-3 partitions are gathered.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer, the new tokens added.
        ids (`Sequence[int]`): what [`add_tokens`] returned.
        init (`str`, *optional*, defaults to `"mean"`): the new rows, and biases of the head: `"mean"` of those of the
            tokenizer's other tokens, computed in float32, or `"zero"` (both ours).

    Raises:
        `ValueError`: ids that the tokenizer does not have, or a model that cannot take rows: one with an adapter, with
            quantised, sharded, offloaded or adapted embeddings, or with none.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> fit_embeddings(model, tokenizer, add_tokens(tokenizer, ["<|good|>"]))
    >>> table = model.get_input_embeddings().weight
    >>> len(table), bool(torch.allclose(table[257], table[:257].mean(0))), model.config.fitted_tokens
    (258, True, {'<|good|>': 257})
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {get_args(Init)}, got {shown(init)}")
    vocabulary = tokenizer.get_vocab()
    names = {number: token for token, number in vocabulary.items()}
    if isinstance(ids, int | str) or not all(is_whole(number) and number in names for number in ids):
        raise ValueError(f"ids must be token ids that the tokenizer has, as add_tokens returns them, got {shown(ids)}")
    ids = [number for number in dict.fromkeys(map(int, ids)) if not is_fitted(model, names[number], number)]
    if not ids:
        return
    check_embeddings(model, max(ids) + 1)
    others = sorted(set(names) - set(ids))
    before, after = _grow(model, max(ids) + 1, max(others, default=-1) + 1)
    others = [number for number in others if number < before]
    if not others:
        raise ValueError("the tokenizer has no other token than the new ones, so there is no mean to begin with")
    # Rows that only pad have no token of their own to keep.
    rows = [*ids, *(number for number in range(before, after) if number not in ids)]
    parameters = _tables(model)
    with _whole(parameters), torch.no_grad():
        for parameter in parameters:
            parameter[rows] = _mean(parameter, others) if init == "mean" else 0
    fitted = {**getattr(model.config, RECORD, {}), **{names[number]: number for number in ids}}
    setattr(model.config, RECORD, fitted)


def is_fitted(model: Any, token: str, number: int) -> bool:
    """Whether the rows of `token` were initialised by [`fit_embeddings`], in this process or before it was saved."""
    known = getattr(getattr(model, "config", None), RECORD, None) or {}
    return known.get(token) == number


def ids_without_rows(model: Any, tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """
    Of `ids`, those for [`fit_embeddings`]: what is left out has rows already, initialised by it or trained elsewhere.

    A token that the tokenizer came with, and for which the model has rows, is taken for trained.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    rows = min(map(_rows, _tables(model)), default=0)
    names = dict(zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True))
    added = _ADDED.get(tokenizer, set())
    return [
        number
        for number, token in names.items()
        if not is_fitted(model, token, number) and (token in added or number >= rows)
    ]


def trains_rows(model: Any, ids: Sequence[int], fitted: bool = True) -> bool:
    """Whether training can tell the tokens `ids` apart: their rows get gradients, or differ already."""
    table = _end(model, "get_input_embeddings")
    # Adapters that train single rows hold them beside the table, in a module around it.
    if any(parameter.requires_grad for parameter in table.parameters()):
        return True
    if not fitted:
        return False  # rows that are still to come will be the same
    with _whole([table.weight]):
        return not bool((table.weight[ids[1:]] == table.weight[ids[0]]).all())


def check_embeddings(model: Any, needed: int) -> None:
    """
    Raises `ValueError` for a model whose tables cannot be given rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        needed (`int`): rows that they are to have. A table in an adapter can be written to where it has that many.
    """
    advice = "before that, with hf_pretrain_ext.vocabulary.fit_embeddings(model, tokenizer, ids)"
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has an adapter, and embeddings beside it are neither trained nor saved. Give the base model "
            f"its rows {advice}, save it, and train them with LoraConfig(trainable_token_indices=ids)"
        )
    table = _end(model, "get_input_embeddings")
    if table is None or getattr(table, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no input embeddings to give rows to")
    for module in (table, _end(model, "get_output_embeddings")):
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        kind = None
        wrapped = type(module).__module__.partition(".")[0] == "peft"
        if wrapped and _rows(weight) < needed:
            kind = "wrapped by an adapter"
        elif type(weight).__name__ == "DTensor" or hasattr(weight, "device_mesh"):
            kind = "sharded"
        elif weight.is_meta:
            kind = "offloaded"
        elif not weight.is_floating_point() or type(weight) is not torch.nn.Parameter:
            kind = "wrapped by an adapter" if wrapped else "quantised"
        if kind:
            raise ValueError(
                f"the embeddings of the model are {kind} ({type(module).__name__} of {weight.dtype}), and rows cannot "
                f"be added to them. Give the model its rows {advice}, save it, and load that"
            )


def _end(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _tables(model: Any) -> list[Any]:
    """Parameters with a row for each token: input embeddings, head and its bias, each once though it be tied."""
    modules = [_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")]
    found = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    distinct: dict[Any, Any] = {id(parameter): parameter for parameter in found if parameter is not None}
    return list(distinct.values())


def _rows(parameter: Any) -> int:
    # Under ZeRO-3 a partitioned parameter has no elements of its own.
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def _grow(model: Any, needed: int, used: int) -> tuple[int, int]:
    """Makes room for `needed` rows where `used` had a token; returns the rows before and after."""
    rows = [_rows(parameter) for parameter in _tables(model)]
    before = min(rows)
    if before >= needed:
        return before, before
    largest = max(rows)
    # 2^k divides n where n and -n share their lowest bit.
    multiple = min(largest & -largest, MULTIPLE) if largest > used else 1
    wanted = max(-(-needed // multiple) * multiple, largest)
    with rng_guard():
        # New rows come out random, and are then written over.
        model.resize_token_embeddings(wanted, mean_resizing=False)
    after = {_rows(parameter) for parameter in _tables(model)}
    if after != {wanted}:
        raise ValueError(f"the embeddings of {type(model).__name__} came out with {sorted(after)} rows, not {wanted}")
    return before, wanted


def _mean(parameter: torch.Tensor, rows: list[int]) -> torch.Tensor:
    total = torch.zeros(parameter.shape[1:], dtype=torch.float32, device=parameter.device)
    for start in range(0, len(rows), CHUNK):
        total += parameter[rows[start : start + CHUNK]].float().sum(0)
    return (total / len(rows)).to(parameter.dtype)


@contextmanager
def _whole(parameters: list[Any]) -> Iterator[None]:
    """Inside, partitions of ZeRO-3 are whole; what is written into them goes back to their owners."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        deepspeed: Any = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield
