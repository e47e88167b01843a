"""The same merges as configurations of mergekit, for what it does better: TIES, DARE, unequal vocabularies, devices.

mergekit is no dependency: what is written here is its documented YAML (`mergekit-yaml CONFIG OUTPUT` runs it).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_pretrain_ext.merging.blocks import Blocks, find_blocks
from hf_pretrain_ext.merging.checkpoints import MergeError, open_checkpoint
from hf_pretrain_ext.merging.formulas import lines_rates, shares_of
from hf_pretrain_ext.merging.state_dicts import several
from hf_pretrain_ext.values import is_number, shown

__all__ = ["TASK_METHODS", "average_yaml", "instruction_residual_yaml", "lines_yaml"]

TASK_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
"""mergekit's methods on task vectors to which LiNeS can be applied as its `lambda`."""

_DTYPES = ("float32", "bfloat16", "float16")


def average_yaml(
    checkpoints: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    out_dtype: str | None = None,
    tokenizer_source: str | None = None,
) -> str:
    """mergekit's configuration (`linear`) of [`average`].

    Args:
        checkpoints (`list[str]`): As for [`average`].
        weights (`list[float]`, *optional*): As for [`average`].
        out_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; mergekit computes in float32 here.
        tokenizer_source (`str`, *optional*): `"union"`, `"base"` or a model: mergekit then matches rows of the
            embeddings by token, which [`average`] does not.

    Example:

    >>> print(average_yaml(["org/one", "org/two"], [3, 1]), end="")
    merge_method: linear
    models:
    - model: org/one
      parameters:
        weight: 3.0
    - model: org/two
      parameters:
        weight: 1.0
    dtype: float32
    """
    given = several("checkpoints", checkpoints, 2)
    shares_of(weights, len(given))
    # As they were given: mergekit, too, divides by their sum, and in the same order.
    models = [
        {"model": _model(f"checkpoints[{number}]", source), "parameters": {"weight": float(weight)}}
        for number, (source, weight) in enumerate(zip(given, weights or [1] * len(given), strict=True))
    ]
    return _yaml({"merge_method": "linear", "models": models}, out_dtype, tokenizer_source)


def lines_yaml(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    alpha: float | None = None,
    beta: float | None = None,
    *,
    blocks: str | None = None,
    merge_method: str = "task_arithmetic",
    density: float | None = None,
    out_dtype: str | None = None,
    tokenizer_source: str | None = None,
) -> str:
    """mergekit's configuration of [`lines`], or of LiNeS on task vectors that mergekit merges by another method.

    Args:
        base (`str`): As for [`lines`].
        tuned (`str` or `list[str]`): As for [`lines`].
        alpha (`float`, *optional*): As for [`lines`]; must be given for methods other than `"task_arithmetic"`, where
            it depends on what the method drops (see [`multi_task_alpha`]).
        beta (`float`, *optional*): As for [`lines`].
        blocks (`str`, *optional*): What stands before a block's number in the names (`"model.layers"`). Read from
            `base` where that is a folder; must be given for a name on the Hub.
        merge_method (`str`, defaults to `"task_arithmetic"`): One of [`TASK_METHODS`].
        density (`float`, *optional*): Share of each task vector's entries that `merge_method` keeps; for methods that
            drop entries, which is all but `"task_arithmetic"`.
        out_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; mergekit computes in float32 here.
        tokenizer_source (`str`, *optional*): `"union"`, `"base"` or a model.
    """
    if merge_method not in TASK_METHODS:
        raise MergeError(f"merge_method must be one of {', '.join(TASK_METHODS)}, got {shown(merge_method)}")
    plain = merge_method == "task_arithmetic"
    if plain != (density is None) or (density is not None and (not is_number(density) or not 0 < density <= 1)):
        allowed = "left out" if plain else "a number above 0, up to 1"
        raise MergeError(f"density must be {allowed} for {merge_method}, got {shown(density)}")
    given = [tuned] if isinstance(tuned, str | os.PathLike) else several("tuned", tuned)
    if not plain and alpha is None:
        raise MergeError(
            f"alpha must be given for {merge_method}: (‖Σ τᵢ‖₁ / ‖τ_merged‖₁) / N, of which mergekit cannot tell the "
            "norms (see multi_task_alpha)"
        )
    rates = lines_rates(len(given), alpha, beta)
    prefix = _blocks(base, blocks).prefix
    kept = {} if density is None else {"density": float(density)}
    config = {
        "merge_method": merge_method,
        "base_model": _model("base", base),
        "models": [{"model": _model("tuned", source), "parameters": {"weight": 1.0, **kept}} for source in given],
        "parameters": {
            # Sums, as in the paper; mergekit would divide by the weights.
            "normalize": False,
            # Two values are an interpolation over the blocks, the first match of a filter counts.
            "lambda": [
                {"filter": f"{prefix}.", "value": [rates[0], rates[0] + rates[1]]},
                {"value": rates[0]},
            ],
        },
    }
    return _yaml(config, out_dtype, tokenizer_source)


def instruction_residual_yaml(
    base: str | os.PathLike[str],
    instruct: str | os.PathLike[str],
    adapted: str | os.PathLike[str],
    *,
    out_dtype: str | None = None,
    tokenizer_source: str | None = None,
) -> str:
    """mergekit's configuration of [`instruction_residual`]: the base and both changes, added up (`task_arithmetic`).

    Args:
        base (`str`): As for [`instruction_residual`].
        instruct (`str`): As for [`instruction_residual`].
        adapted (`str`): As for [`instruction_residual`].
        out_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; mergekit computes in float32 here.
        tokenizer_source (`str`, *optional*): `"union"`, `"base"` or a model. By default mergekit copies the base's
            tokenizer, without the chat template of `instruct`.
    """
    models = [
        {"model": _model(name, source), "parameters": {"weight": 1.0}}
        for name, source in (("instruct", instruct), ("adapted", adapted))
    ]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": _model("base", base),
        "models": models,
        "parameters": {"normalize": False},
    }
    return _yaml(config, out_dtype, tokenizer_source)


def _model(name: str, source: Any) -> str:
    """A model as mergekit names it: `+` would begin the name of an adapter, a second `@` another revision."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise MergeError(f"{name} must be a folder or a name on the Hub, got {shown(source)}")
    text = os.fspath(source)
    if "+" in text or text.count("@") > 1 or ("@" in text and Path(text).exists()):
        raise MergeError(f"{name}={text!r}: mergekit reads + and @ in a name as marks; give the folder another name")
    return text


def _blocks(base: Any, blocks: str | None) -> Blocks:
    if blocks is not None and not (isinstance(base, str | os.PathLike) and Path(base).is_dir()):
        return Blocks(blocks, 0)
    if not isinstance(base, str | os.PathLike) or not Path(base).is_dir():
        raise MergeError(
            f"blocks must be given where base is not a folder, got base={shown(base)}: the text before a block's "
            'number in the names of parameters, such as "model.layers"'
        )
    opened = open_checkpoint(base, "base")
    try:
        stack = find_blocks(opened.specs, blocks, opened.number_of_blocks)
        astray = [key for key in opened.specs if f"{stack.prefix}." in key and stack.index(key) is None]
    finally:
        opened.close()
    if astray:
        raise MergeError(
            f"mergekit's filter {stack.prefix + '.'!r} would also match {', '.join(astray[:5])}, which are outside "
            "the blocks: use lines() for this model"
        )
    return stack


def _yaml(config: dict[str, Any], out_dtype: str | None, tokenizer_source: str | None) -> str:
    import yaml

    if out_dtype is not None and (not isinstance(out_dtype, str) or out_dtype not in _DTYPES):
        raise MergeError(f"out_dtype must be one of {', '.join(_DTYPES)}, or None, got {shown(out_dtype)}")
    config["dtype"] = "float32"
    if out_dtype is not None:
        config["out_dtype"] = out_dtype
    if tokenizer_source is not None:
        if tokenizer_source not in ("union", "base"):
            tokenizer_source = _model("tokenizer_source", tokenizer_source)
        config["tokenizer_source"] = tokenizer_source
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text
