"""Whether checkpoints can be merged element by element: every reason against it, in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_pretrain_ext.merging.checkpoints import Checkpoint, MergeError, Spec, pieces
from hf_pretrain_ext.values import shown

__all__ = ["check_checkpoints", "check_specs", "drop_tied_copies", "same"]

_MOST = 10

# What may differ between checkpoints of one model: bookkeeping, generation, and what acts in training alone.
_FREE = frozenset(
    "_name_or_path transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id initializer_range output_attentions "
    "output_hidden_states return_dict id2label label2id problem_type task_specific_params "
    "chunk_size_feed_forward auto_map".split()
)
_FREE_ENDINGS = ("dropout", "dropout_prob", "pdrop", "_drop", "layerdrop", "_std")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns as integers, by which NaN equals itself and −0 is not 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.dtype.itemsize])


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same bit for bit, and of the same type."""
    if first.dtype is not second.dtype:
        return False
    # Few tensors that differ begin alike; comparing whole ones costs as much as merging them.
    start, other = (tensor.reshape(-1)[:64] for tensor in (first, second))
    return torch.equal(bits(start), bits(other)) and torch.equal(bits(first), bits(second))


def _some(lines: Iterable[str]) -> str:
    found = list(lines)
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return ", ".join(found[:_MOST]) + more


def check_specs(named: Mapping[str, Mapping[str, Spec]]) -> list[str]:
    """Why tensors of these names, types and shapes cannot be merged, one line a reason; empty if they can.

    Args:
        named (`dict[str, dict[str, Spec]]`): By the name of the input, data type and shape of its tensors.
    """
    problems = []
    everything = list(dict.fromkeys(key for specs in named.values() for key in specs))
    for name, specs in named.items():
        missing = [key for key in everything if key not in specs]
        if missing:
            problems.append(
                f"{name} lacks {len(missing)} of the {len(everything)} tensors that others hold: {_some(missing)}"
            )
    common = [key for key in everything if all(key in specs for specs in named.values())]
    if not common:
        problems.append("the inputs have no tensor in common")
    shapes = {key: {name: list(specs[key].shape) for name, specs in named.items()} for key in common}
    other = [key for key in common if len({tuple(shape) for shape in shapes[key].values()}) > 1]
    if other:
        listed = [f"{key} ({'; '.join(f'{name} {shape}' for name, shape in shapes[key].items())})" for key in other]
        problems.append(
            f"shapes differ: {_some(listed)}. Embeddings of another size can be brought to one with "
            "resize_token_embeddings if the tokens have the same ids; else mergekit can merge vocabularies "
            "(average_yaml and the others, tokenizer_source)"
        )
    kinds = {key: {specs[key].dtype.is_floating_point for specs in named.values()} for key in common}
    mixed = [key for key in common if len(kinds[key]) > 1]
    if mixed:
        problems.append(f"floats in some inputs, integers in others: {_some(mixed)}")
    other = [
        key for key in common if kinds[key] == {False} and len({specs[key].dtype for specs in named.values()}) > 1
    ]
    if other:
        problems.append(f"integers of different types: {_some(other)}")
    return problems


def drop_tied_copies(checkpoints: Sequence[Checkpoint]) -> None:
    """Leaves out a stored output embedding that is a copy of the input embedding, where only some inputs store it.

    Earlier hosts wrote tied embeddings twice, others once. What goes is a tensor that some inputs lack, whose configs
    tie the embeddings, and that equals, bit for bit, another one in every input that has it.
    """
    common = set.intersection(*(set(each.specs) for each in checkpoints))
    for key in dict.fromkeys(key for each in checkpoints for key in each.specs if key not in common):
        having = [each for each in checkpoints if key in each.specs]
        if not all(each.tied for each in checkpoints):
            continue
        likes = [
            other for other in common if all(each.specs[other] == each.specs[key] for each in having)
        ]  # fmt: skip
        for other in sorted(likes):
            if len(having[0].specs[key].shape) == 2 and all(_equal(each, key, other) for each in having):
                for each in having:
                    each.drop(key, other)
                break


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    return all(
        same(checkpoint.read(first, *place), checkpoint.read(second, *place))
        for place in pieces(checkpoint.specs[first].elements)
    )


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What of a config decides what weights compute, nested fields as `outer.inner`."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FREE or str(key).endswith(_FREE_ENDINGS):
            continue
        if isinstance(value, Mapping) and value:
            fields.update(flat_config(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def _config_problems(checkpoints: Sequence[Checkpoint], ignored: Sequence[str]) -> list[str]:
    filled = [each.full_config for each in checkpoints]
    known = [config for config in filled if config is not None]
    # Defaults are compared only where the host can fill them in for all.
    configs = known if len(known) == len(checkpoints) else [each.config for each in checkpoints]
    fields = [flat_config(config) for config in configs]
    keys = dict.fromkeys(key for each in fields for key in each)
    absent = [name for name in ignored if not any(key == name or key.startswith(f"{name}.") for key in keys)]
    lines = []
    for key in keys:
        values = [each.get(key) for each in fields]
        if any(value != values[0] for value in values):
            if any(key == name or key.startswith(f"{name}.") for name in ignored):
                continue
            told = "; ".join(f"{each.name} {shown(value)}" for each, value in zip(checkpoints, values, strict=True))
            lines.append(f"{key} ({told})")
    problems = []
    if absent:
        problems.append(f"ignore_config names fields that no config has: {_some(absent)}")
    if lines:
        problems.append(
            f"configs differ in {_some(lines)}. Where that is meant (another model_type never is), name the fields in "
            "ignore_config; the donor's values are kept"
        )
    quantised = [each.name for each in checkpoints if each.config.get("quantization_config")]
    if quantised:
        problems.append(f"{_some(quantised)} quantised: dequantise and save first")
    return problems


def _tokenizer_problems(checkpoints: Sequence[Checkpoint]) -> list[str]:
    having = [each for each in checkpoints if each.fingerprint is not None]
    first, problems = having[0] if having else None, []
    for each in having[1:]:
        if first is None or each.fingerprint == first.fingerprint:
            continue
        ours, theirs = first.vocabulary or {}, each.vocabulary or {}
        other = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        told = [f"{token!r} ({first.name} {ours.get(token)}; {each.name} {theirs.get(token)})" for token in other]
        problems.append(
            f"the tokenizers of {first.name} and {each.name} give {len(other)} tokens other ids: {_some(told)}. Rows "
            "of the embeddings would be mixed that mean different tokens: if you know that they do not (reserved "
            "tokens given a name, say), allow_other_tokenizer=True keeps the donor's"
        )
    return problems


def check_checkpoints(
    checkpoints: Sequence[Checkpoint], ignore_config: Sequence[str] = (), allow_other_tokenizer: bool = False
) -> None:
    """Raises [`~hf_pretrain_ext.merging.MergeError`] with everything that speaks against merging these checkpoints."""
    types = {each.name: each.config.get("model_type") for each in checkpoints}
    problems = []
    if len(set(types.values())) > 1:
        problems.append(f"different model types: {', '.join(f'{name} {kind}' for name, kind in types.items())}")
    else:
        problems += _config_problems(checkpoints, ignore_config)
    problems += check_specs({each.name: each.specs for each in checkpoints})
    if not allow_other_tokenizer:
        problems += _tokenizer_problems(checkpoints)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise MergeError(f"these checkpoints cannot be merged:\n{lines}")
