"""The meta parts of a model as files beside it, in PEFT's manner: one of JSON, one of safetensors.

    meta_tokens_config.json   settings (MetaAttentionConfig)
    meta_tokens.safetensors   layers.<number>.<parameter>, input_embedding, output_embedding (where it is not tied)

A model that was saved whole (`save_pretrained`, a checkpoint of the Trainer) holds the same tensors in its own files
and the settings in its config; `load_meta_tokens` reads either.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.meta_tokens.attach import (
    MetaTokens,
    attach_meta_attention,
    attached,
    detach_meta_attention,
    keep_tables,
    required,
    unwrapped,
)
from hf_pretrain_ext.meta_tokens.config import KEY, SECTION, MetaAttentionConfig
from hf_pretrain_ext.meta_tokens.layers import CHILD, unadapted
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import reason, shown
from hf_pretrain_ext.vocabulary import RECORD, add_tokens

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "load_meta_tokens",
    "meta_parameters",
    "meta_state",
    "remove_meta_tokens",
    "save_meta_tokens",
]

CONFIG_FILE = "meta_tokens_config.json"
WEIGHTS_FILE = "meta_tokens.safetensors"

_LAYER = re.compile(rf"(?:^|\.)(\d+)\.{CHILD}\.(?:modules_to_save\.[^.]+\.)?(\w+\.\w+)$")
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_ADAPTER_FILE = "adapter_model.safetensors"


def meta_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """
    The parameters of meta-attention by name, `layers.<number>.<parameter>`: what `train="meta"` trains besides the
    token's row. What an adapter of PEFT put there is left out: its own files have it.

    Raises:
        `ValueError`: the model has no meta-tokens.
    """
    return {
        f"layers.{site.place.layer}.{name}": parameter
        for site in required(model).sites
        for name, parameter in _own(site.attention)
    }


def _own(module: Any, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a module, under the names that they have without an adapter."""
    module = unadapted(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from _own(child, f"{prefix}{name}.")


def meta_state(model: Any) -> dict[str, Tensor]:
    """
    All that [`save_meta_tokens`] writes: [`meta_parameters`] and the token's rows, as copies on the CPU.

    Raises:
        `ValueError`: the model has no meta-tokens.
    """
    tokens, inner = required(model), unwrapped(model)
    state = {name: parameter.detach() for name, parameter in meta_parameters(model).items()}
    for name, (table, part) in _rows(inner).items():
        state[name] = getattr(table, part).detach()[tokens.passes.token_id]
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _rows(model: Any) -> dict[str, tuple[Any, str]]:
    """Tensors with a row for each token, by the name under which the token's is saved."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {"input_embedding": (table, "weight")}
    if head is not None and head.weight is not table.weight:
        rows["output_embedding"] = (head, "weight")
    if getattr(head, "bias", None) is not None:
        rows["output_bias"] = (head, "bias")
    return rows


def save_meta_tokens(model: Any, path: str | os.PathLike[str]) -> None:
    """
    Writes the meta parts of a model into a folder: settings, meta-attention, the token's rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): one with meta-tokens, wrapped or not.
        path (`str` or `PathLike`): a folder, made if need be; an adapter of PEFT may be in it too.

    Raises:
        `ValueError`: the model has no meta-tokens.

    Example:

    ```python
    model.save_pretrained("run/final")  # of a PeftModel, its adapter alone
    save_meta_tokens(model, "run/final")
    ```
    """
    from safetensors.torch import save_file

    settings = asdict(required(model).config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(meta_state(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def load_meta_tokens(model: Any, path: str | os.PathLike[str], tokenizer: Any = None) -> int:
    """
    Puts saved meta parts into a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base model of what was saved, or the saved model itself as
            `from_pretrained` gives it (it warns that it leaves out `meta_attention` weights; they come here). A model
            that has meta-tokens with the same settings gets the weights alone. From the folder of a whole model,
            the token's row comes too, and nothing else of it.
        path (`str` or `PathLike`): a folder: of [`save_meta_tokens`], of `save_pretrained`, or a checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): gets the token too, if it lacks it.

    Returns:
        `int`: the id of the meta-token.

    Raises:
        `ValueError`: there are no meta parts, or they do not fit the model; the message says which.

    Example:

    ```python
    model = AutoModelForCausalLM.from_pretrained("base")
    tokenizer = AutoTokenizer.from_pretrained("run/final")
    load_meta_tokens(model, "run/final")
    ```
    """
    folder = Path(path)
    config = _read_config(folder)
    number = config.token_id
    if number is None:
        raise ValueError(f"{folder} names no token_id, so it was not written by this package. Save it again")
    if tokenizer is not None:
        [known] = add_tokens(tokenizer, [config.token])
        if known != number:
            raise ValueError(
                f"the tokenizer has {shown(config.token)} as {known}, but {folder} was trained with {number}. Load "
                "the tokenizer that was saved with it"
            )
    inner, tokens = unwrapped(model), attached(model)
    state = _read_weights(folder, inner, number)
    came = KEY in (getattr(inner.config, SECTION, None) or {}) if tokens is None else tokens.came
    if came and not set(_rows(inner)) <= set(state):
        # The model came from such files, and has its rows from there.
        state = {name: tensor for name, tensor in state.items() if name not in _rows(inner)}
    elif "input_embedding" not in state:
        raise ValueError(
            f"{folder} holds no row for {shown(config.token)} (id {number}) that could be told to be one of "
            f"{type(inner).__name__}'s embeddings. Load the model itself from this folder first"
        )
    if tokens is None:
        _check_adapter(inner, folder)
        before = keep_tables(inner, number)
        _make_room(inner, config, state)
        attach_meta_attention(model, config)
        required(model).before = before
    elif _shape(tokens.config) != _shape(config):
        ours, theirs = _shape(tokens.config), _shape(config)
        differ = {name: (theirs[name], ours[name]) for name in ours if ours[name] != theirs[name]}
        raise ValueError(
            f"{folder} has other settings than the model: {shown(differ)} (there, here). Call "
            "remove_meta_tokens(model) first, or load into a fresh model"
        )
    _fill(model, inner, number, state, folder)
    return number


def _shape(config: MetaAttentionConfig) -> dict[str, Any]:
    """The settings that decide what the weights are and mean."""
    loose = ("seed", "init", "dropout", "mask_logits", "token")
    return {name: value for name, value in asdict(config).items() if name not in loose}


def _read_config(folder: Path) -> MetaAttentionConfig:
    for name in (CONFIG_FILE, "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text("utf-8"))
            if name != CONFIG_FILE:
                found = (found.get(SECTION) or {}).get(KEY)
            if found is not None:
                known = {each.name for each in fields(MetaAttentionConfig)}
                if unknown := sorted(set(found) - known):
                    raise ValueError(f"settings {unknown} that this version does not know")
                return MetaAttentionConfig(**found)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} holds no settings of meta-tokens that can be read ({reason(error)})") from error
    raise ValueError(
        f"{shown(os.fspath(folder))} holds no meta-tokens: neither {CONFIG_FILE} nor {SECTION!r} with {KEY!r} in a "
        "config.json. Pass a folder that save_meta_tokens wrote, or one of a model that was trained with them"
    )


def _check_adapter(model: Any, folder: Path) -> None:
    """Weights of an adapter that was put in before the sub-layers that they are of are lost."""
    path = folder / _ADAPTER_FILE
    if getattr(model, "peft_config", None) and path.is_file():
        with _opened(path) as file:
            adapted = any(f".{CHILD}." in name for name in file.keys())
        if adapted:
            raise ValueError(
                f"the adapter in {folder} is also of meta-attention, which the model did not have when the adapter "
                "was put in. Call load_meta_tokens(base, folder) first, then PeftModel.from_pretrained(base, folder)"
            )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder holds the settings of meta-tokens, but not their weights")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}). Copy or save it again") from error


def _read_weights(folder: Path, model: Any, number: int) -> dict[str, Tensor]:
    """The tensors under the names of [`meta_state`]; from a whole model, the token's rows where they are found."""
    own, index = folder / WEIGHTS_FILE, folder / "model.safetensors.index.json"
    state: dict[str, Tensor] = {}
    if own.is_file():
        with _opened(own) as file:
            # An adapter on meta-attention has files of its own; earlier versions wrote it here too.
            for name in file.keys():
                if ".lora_" not in name:
                    state[name.replace(".base_layer", "")] = file.get_tensor(name)
        return state
    if index.is_file():
        held = {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    else:
        path = folder / "model.safetensors"
        with _opened(path) as file:
            held = dict.fromkeys(file.keys(), path)
    layers = {name: f"layers.{found[1]}.{found[2]}" for name in held if (found := _LAYER.search(name))}
    tables = {name: getattr(table, part) for name, (table, part) in _rows(model).items()}
    rows = {called: name for name, table in tables.items() if (called := _held_as(model, table, held))}
    for path in sorted({held[name] for name in (*layers, *rows)}):
        with _opened(path) as file:
            for name in file.keys():
                if name in layers:
                    state[layers[name]] = file.get_tensor(name)
                elif name in rows:
                    table = file.get_slice(name)
                    length, *sizes = table.get_shape()
                    if number < length and sizes == list(tables[rows[name]].shape[1:]):
                        state[rows[name]] = table[number : number + 1][0]
    return state


def _held_as(model: Any, parameter: Tensor, held: Iterable[str]) -> str | None:
    """The name in the files of a whole model of what is a parameter of this one; None if it is not clear."""
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is parameter]
    names = [_WRAPPED.sub("", name) for name in names]
    if same := [name for name in names if name in held]:
        return same[0]
    # Some files have another prefix than the model.
    ends = [".".join(name.split(".")[-2:]) for name in names[:1]]
    alike = [name for name in held for end in ends if f".{name}".endswith(f".{end}")]
    return alike[0] if len(alike) == 1 else None


def _make_room(model: Any, config: MetaAttentionConfig, state: Mapping[str, Tensor]) -> None:
    """Rows for the token in the embeddings of a base model that ends before it."""
    number, table = int(config.token_id or 0), model.get_input_embeddings()
    if number < table.weight.shape[0]:
        return
    if "input_embedding" not in state:
        raise ValueError(
            f"token_id={number}, and the model has embeddings for the ids below {table.weight.shape[0]}. Load the "
            "model itself from this folder first"
        )
    with rng_guard():
        # Rows between, if any, belong to tokens that the base model never had.
        model.resize_token_embeddings(number + 1, mean_resizing=False)


@torch.no_grad()
def _fill(model: Any, inner: Any, number: int, state: Mapping[str, Tensor], folder: Path) -> None:
    targets: dict[str, Tensor] = dict(meta_parameters(model))
    rows = {name: getattr(table, part) for name, (table, part) in _rows(inner).items()}
    if "input_embedding" in state:
        # Saved from a model with a tied head, and loaded into one whose head is not.
        state = {"output_embedding": state["input_embedding"], **state} if "output_embedding" in rows else state
        targets |= {name: table[number] for name, table in rows.items()}
    missing, unknown = sorted(set(targets) - set(state)), sorted(set(state) - set(targets))
    if missing or unknown:
        raise ValueError(
            f"{folder} does not fit the model: it lacks {shown(missing)} and holds {shown(unknown)} besides. Load it "
            "into the model that it was trained with"
        )
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise ValueError(
                f"{folder} does not fit the model: {name} has shape {tuple(state[name].shape)}, here "
                f"{tuple(target.shape)}. Load it into the model that it was trained with"
            )
    for name, target in targets.items():
        target.copy_(state[name])
    if "input_embedding" in state:
        fitted = {**getattr(inner.config, RECORD, {}), required(model).config.token: number}
        setattr(inner.config, RECORD, fitted)


def remove_meta_tokens(model: Any) -> None:
    """
    Takes everything out of a model again: sub-layers, hooks, settings, the token's row.

    The model then computes what it did, bit for bit, unless its own weights were trained meanwhile, and has the state
    dict and config that it had. A row that the token took over from another is put back if meta-tokens were added or
    loaded in this process; of a model that was loaded whole with it, the trained row stays. The tokenizer keeps the
    token, since tokenizers cannot give one up: load it anew.

    Raises:
        `ValueError`: the model has no meta-tokens.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> from hf_pretrain_ext.meta_tokens import add_meta_tokens
    >>> sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> before = set(model.state_dict())
    >>> number = add_meta_tokens(model, train_tokenizer(["ab"], vocab_size=257))
    >>> remove_meta_tokens(model)
    >>> set(model.state_dict()) == before, model.config.vocab_size
    (True, 257)
    """
    tokens, inner = required(model), unwrapped(model)
    detach_meta_attention(model)
    before, number = tokens.before, tokens.passes.token_id
    if not before:
        _forget(inner, tokens)
        return
    if before["rows"] < inner.get_input_embeddings().weight.shape[0]:
        with rng_guard():
            inner.resize_token_embeddings(before["rows"], mean_resizing=False)
    with torch.no_grad():
        for name, (table, part) in _rows(inner).items():
            if name in before["row"]:
                getattr(table, part)[number] = before["row"][name].to(table.weight.device)
    if before["fitted"] is None:
        if hasattr(inner.config, RECORD):
            delattr(inner.config, RECORD)
    else:
        setattr(inner.config, RECORD, before["fitted"])
    _forget(inner, tokens)


def _forget(model: Any, tokens: MetaTokens) -> None:
    """What the files of the model say of the token's row: meta-tokens that are added later begin anew."""
    fitted = getattr(model.config, RECORD, None) or {}
    if tokens.came and fitted.get(tokens.config.token) == tokens.passes.token_id:
        left = {token: number for token, number in fitted.items() if token != tokens.config.token}
        if left:
            setattr(model.config, RECORD, left)
        else:
            delattr(model.config, RECORD)
