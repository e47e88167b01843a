"""Merging checkpoints: from folders or the Hub into a folder, in memory that does not grow with the model."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from hf_pretrain_ext.merging.blocks import find_blocks
from hf_pretrain_ext.merging.checkpoints import Checkpoint, MergeError, Spec, open_checkpoint, pieces, read_json
from hf_pretrain_ext.merging.compare import check_checkpoints, drop_tied_copies, same
from hf_pretrain_ext.merging.formulas import (
    average_tensors,
    instruction_residual_tensors,
    lines_rates,
    lines_tensors,
    shares_of,
)
from hf_pretrain_ext.merging.state_dicts import several
from hf_pretrain_ext.merging.writer import check_output, new_folder, size_of, write_json, write_shards
from hf_pretrain_ext.say import say
from hf_pretrain_ext.trace import versions
from hf_pretrain_ext.values import check_flag, shown

__all__ = ["MERGE_NAME", "Options", "average", "instruction_residual", "lines"]

MERGE_NAME = "merge.json"
"""How a merged checkpoint was made: method, settings, inputs and outputs with their hashes."""

OUTPUT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# What belongs to a model besides its weights and config, at the top of its folder.
_COPIED = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "preprocessor_config.json processor_config.json LICENSE LICENSE.txt NOTICE"
).split()

Combine = Callable[[str, list[Tensor], torch.dtype], Tensor]


class Options(TypedDict, total=False):
    """What all ways of merging checkpoints take.

    Attributes:
        donor (`str`): The input, named as it was given, whose config, tokenizer, generation config and data types
            the result has.
        dtype (`str`): `"float32"`, `"bfloat16"`, `"float16"` or `"float64"` for all floats; by default each tensor has
            the donor's type.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Bytes of tensors in a file.
        overwrite (`bool`, defaults to `False`): Replace a folder that is not empty.
        ignore_config (`list[str]`): Fields of the config that may differ, such as `"rope_parameters"`.
        allow_other_tokenizer (`bool`, defaults to `False`): Merge although tokens have other ids.
    """

    donor: str | os.PathLike[str]
    dtype: str | None
    max_shard_size: int | str
    overwrite: bool
    ignore_config: Sequence[str]
    allow_other_tokenizer: bool


def average(
    checkpoints: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    output: str | os.PathLike[str],
    **options: Unpack[Options],
) -> Path:
    """Writes the weighted mean of checkpoints: Σ wᵢ θᵢ / Σ wᵢ.

    Args:
        checkpoints (`list[str]`): Two or more folders, or names on the Hub (`owner/name`, `owner/name@revision`).
        weights (`list[float]`, *optional*): One a checkpoint; they are divided by their sum. Equal by default.
        output (`str`): The folder to write; it appears when it is complete.
        **options: See [`Options`]. The donor is the first checkpoint by default.

    Returns:
        `Path`: The folder, with `merge.json` in it.

    Raises:
        [`~hf_pretrain_ext.merging.MergeError`]: the checkpoints do not fit together (all reasons are listed), one
            cannot be read, or the folder cannot be written.
    """
    given = several("checkpoints", checkpoints, 2)
    shares = shares_of(weights, len(given))
    named = {f"checkpoints[{number}]": source for number, source in enumerate(given)}

    def prepared(inputs: Sequence[Checkpoint]) -> tuple[dict[str, Any], Combine]:
        return {"weights": shares}, lambda key, tensors, dtype: average_tensors(tensors, weights, dtype)

    return _merge("average", named, "checkpoints[0]", prepared, output, **options)


def lines(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    alpha: float | None = None,
    beta: float | None = None,
    *,
    output: str | os.PathLike[str],
    blocks: str | None = None,
    **options: Unpack[Options],
) -> Path:
    """Writes `base` with the changes of `tuned` scaled by depth (LiNeS, Wang et al., 2024).

    The change of block l of L is multiplied by alpha + beta · l / (L − 1), what is outside the blocks (embeddings, the
    last norm, the head) by alpha: shallow blocks go back towards the base, deep ones stay.

    Args:
        base (`str`): The checkpoint before tuning: a folder, or a name on the Hub.
        tuned (`str` or `list[str]`): The checkpoint after it; the changes of several are summed.
        alpha (`float`, *optional*): Share of the change that the first block keeps. Must be given for one tuned
            checkpoint; for N, the paper's 1/N by default. (The paper's (‖Σ τᵢ‖ / ‖τ_merged‖) / N, where the merged
            vector is the sum.)
        beta (`float`, *optional*): What the last block keeps beyond it. For one tuned checkpoint the paper's
            1 − alpha by default; must be given for several.
        output (`str`): The folder to write; it appears when it is complete.
        blocks (`str`, *optional*): What stands before a block's number in the names (`"model.layers"`); found where
            it is not given.
        **options: See [`Options`]. The donor is the tuned checkpoint by default, the base where there are several.

    Returns:
        `Path`: The folder, with `merge.json` in it.
    """
    one = isinstance(tuned, str | os.PathLike)
    given = [tuned] if one else several("tuned", tuned)
    rates = lines_rates(len(given), alpha, beta)
    names = ["tuned"] if one else [f"tuned[{number}]" for number in range(len(given))]
    named = {"base": base, **dict(zip(names, given, strict=True))}

    def prepared(inputs: Sequence[Checkpoint]) -> tuple[dict[str, Any], Combine]:
        stack = find_blocks(inputs[0].specs, blocks, inputs[0].number_of_blocks)

        def combine(key: str, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
            return lines_tensors(tensors[0], tensors[1:], stack.scale(key, *rates), dtype)

        settings = {"alpha": rates[0], "beta": rates[1], "blocks": stack.prefix, "number_of_blocks": stack.number}
        return settings, combine

    return _merge("lines", named, names[0] if len(names) == 1 else "base", prepared, output, **options)


def instruction_residual(
    base: str | os.PathLike[str],
    instruct: str | os.PathLike[str],
    adapted: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    **options: Unpack[Options],
) -> Path:
    """Writes θ_adapted + (θ_instruct − θ_base): a base model trained further, made to follow instructions again.

    Instruction tuning is not repeated: what it had changed in the base is added to the base trained further
    (arXiv 2410.10739).

    Args:
        base (`str`): The checkpoint that both others were trained from: a folder, or a name on the Hub.
        instruct (`str`): The base after instruction tuning.
        adapted (`str`): The base after continued pre-training.
        output (`str`): The folder to write; it appears when it is complete.
        **options: See [`Options`]. The donor is `instruct` by default: its chat template is what the result follows.

    Returns:
        `Path`: The folder, with `merge.json` in it.
    """

    def prepared(inputs: Sequence[Checkpoint]) -> tuple[dict[str, Any], Combine]:
        return {}, lambda key, tensors, dtype: instruction_residual_tensors(tensors[0], tensors[1], tensors[2], dtype)

    named = {"base": base, "instruct": instruct, "adapted": adapted}
    return _merge("instruction_residual", named, "instruct", prepared, output, **options)


def _merge(
    method: str,
    named: Mapping[str, Any],
    default_donor: str,
    prepared: Callable[[Sequence[Checkpoint]], tuple[dict[str, Any], Combine]],
    output: Any,
    *,
    donor: Any = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    ignore_config: Sequence[str] = (),
    allow_other_tokenizer: bool = False,
) -> Path:
    most = size_of(max_shard_size, "max_shard_size")
    check_flag("overwrite", overwrite)
    check_flag("allow_other_tokenizer", allow_other_tokenizer)
    if dtype is not None and (not isinstance(dtype, str) or dtype not in OUTPUT_DTYPES):
        raise MergeError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, or None, got {shown(dtype)}")
    if not isinstance(ignore_config, Sequence) or isinstance(ignore_config, str):
        raise MergeError(f"ignore_config must be a list of names of config fields, got {shown(ignore_config)}")
    giver = _donor(named, default_donor, donor)
    # Before anything is fetched.
    local = [Path(source) for source in named.values() if isinstance(source, str | os.PathLike)]
    path = check_output(output, overwrite, [folder for folder in local if folder.is_dir()])
    inputs: list[Checkpoint] = []
    try:
        for name, source in named.items():
            inputs.append(open_checkpoint(source, name))
        drop_tied_copies(inputs)
        check_checkpoints(inputs, ignore_config, allow_other_tokenizer)
        settings, combine = prepared(inputs)
        kept = next(each for each in inputs if each.name == giver)
        specs = _output_specs(kept, None if dtype is None else OUTPUT_DTYPES[dtype])
        _check_integers(inputs, kept)
        merging = _Merging(inputs, kept, specs, combine)
        with new_folder(path, sum(spec.bytes for spec in specs.values())) as folder:
            files = write_shards(folder, specs, merging.pieces_of, most)
            copied = _copy(kept, folder, dtype)
            record = {
                "format": 1,
                "method": method,
                "settings": settings,
                "donor": giver,
                "dtype": dtype,
                "arithmetic": "float32 (float64 for float64 inputs), rounded once to the nearest, ties to even",
                "ignored_config": list(ignore_config),
                "allow_other_tokenizer": allow_other_tokenizer,
                "inputs": [each.record() for each in inputs],
                "output": {
                    "files": files,
                    "copied": copied,
                    "tensors": len(specs),
                    "parameters": sum(spec.elements for spec in specs.values()),
                    "tensors_equal_in_all_inputs": merging.equal,
                },
                "versions": versions(),
            }
            write_json(folder / MERGE_NAME, record)
    finally:
        for each in inputs:
            each.close()
    say(f"{method}: {len(inputs)} checkpoints merged in {path}; how is in {path / MERGE_NAME}")
    return path


def _donor(named: Mapping[str, Any], default: str, donor: Any) -> str:
    if donor is None:
        return default
    if isinstance(donor, str | os.PathLike):
        for name, source in named.items():
            if os.fspath(donor) == name or (
                isinstance(source, str | os.PathLike) and os.fspath(donor) == os.fspath(source)
            ):
                return name
    told = ", ".join(f"{name} ({shown(source)})" for name, source in named.items())
    raise MergeError(f"donor must be one of the inputs, got {shown(donor)}; there are {told}")


def _output_specs(donor: Checkpoint, dtype: torch.dtype | None) -> dict[str, Spec]:
    return {
        key: Spec(dtype, spec.shape) if dtype is not None and spec.dtype.is_floating_point else spec
        for key, spec in donor.specs.items()
    }


def _check_integers(inputs: Sequence[Checkpoint], donor: Checkpoint) -> None:
    """Raises unless integers and flags, which no formula holds for, are the same in all inputs."""
    unlike = [
        key
        for key, spec in donor.specs.items()
        if not spec.dtype.is_floating_point
        and not all(
            torch.equal(donor.read(key, *place), each.read(key, *place))
            for each in inputs
            for place in pieces(spec.elements)
        )
    ]
    if unlike:
        more = f" and {len(unlike) - 10} more" if len(unlike) > 10 else ""
        raise MergeError(
            f"integers cannot be merged, and these are not the same in all inputs: {', '.join(unlike[:10])}{more}. "
            "Save the inputs again with equal buffers"
        )


class _Merging:
    """Makes the tensors of the result, one piece after another, and counts those that were equal in all inputs."""

    def __init__(self, inputs: Sequence[Checkpoint], donor: Checkpoint, specs: Mapping[str, Spec], combine: Combine):
        self.inputs, self.donor, self.specs, self.combine = inputs, donor, specs, combine
        self.equal = 0

    def pieces_of(self, key: str) -> Iterator[Tensor]:
        spec, equal = self.specs[key], True
        for place in pieces(spec.elements):
            if not spec.dtype.is_floating_point:
                yield self.donor.read(key, *place)
                continue
            tensors = [each.read(key, *place) for each in self.inputs]
            first = tensors[0]
            equal = equal and all(same(each, first) for each in tensors[1:])
            result = self.combine(key, tensors, spec.dtype)
            # Both are NaN if any element is; twenty times as fast as looking at each.
            if not all(math.isfinite(bound) for bound in torch.aminmax(result)):
                self._explain(key, tensors, result, place[0])
            yield result
        self.equal += equal

    def _explain(self, key: str, tensors: Sequence[Tensor], result: Tensor, start: int) -> None:
        """Raises, unless what is not finite is the same in all inputs (masks that some older models store)."""
        broken = ~torch.isfinite(result)
        sound = torch.stack([torch.isfinite(tensor) for tensor in tensors]).all(0)
        if all(same(tensor, tensors[0]) for tensor in tensors) and not (broken & sound).any():
            return
        too_large = bool((broken & sound).any())
        place = int((broken & sound if too_large else broken).nonzero()[0])
        values = ", ".join(f"{each.name} {float(t[place]):g}" for each, t in zip(self.inputs, tensors, strict=True))
        advice = "an input is broken: it holds NaN or infinities"
        if too_large:
            advice = f"it is too large for {str(result.dtype).removeprefix('torch.')}: set dtype to a wider type"
        raise MergeError(f"{key}, element {start + place}, would become {float(result[place])} ({values}): {advice}")


def _copy(donor: Checkpoint, folder: Path, dtype: str | None) -> list[str]:
    """Puts what belongs to a model besides its weights into `folder`; the names of these files."""
    config = read_json(donor.folder / "config.json")
    if dtype is None:
        shutil.copyfile(donor.folder / "config.json", folder / "config.json")
    else:
        config[("torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype")] = dtype
        write_json(folder / "config.json", config)
    copied = ["config.json"]
    for name in _COPIED:
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, folder / name)
            copied.append(name)
    templates = donor.folder / "additional_chat_templates"
    if templates.is_dir():
        (folder / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            shutil.copyfile(path, folder / templates.name / path.name)
            copied.append(f"{templates.name}/{path.name}")
    return copied
