"""The YAML at the head of a card, and what must hold for the Hub to read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_pretrain_ext.hub_card.facts import CardFacts
from hf_pretrain_ext.values import is_number, shown

__all__ = ["RELATIONS", "check_metadata", "metadata_of", "without_paths"]

RELATIONS = ("adapter", "finetune", "merge", "quantized")
"""What the Hub knows as `base_model_relation`."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LISTS = ("datasets", "tags", "language")


def metadata_of(facts: CardFacts, model_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Fields for `huggingface_hub.ModelCardData`.

    Args:
        facts ([`CardFacts`]): of the run.
        model_name (`str`): of the model, for its results.
        given (`Mapping`): fields that the user or the host has set: they win, lists are joined.
    """
    tags = ["continued-pretraining", "hf-pretrain-ext", *sorted(facts.plugins)]
    found: dict[str, Any] = {
        "library_name": "peft" if facts.relation == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if facts.base_model:
        found["base_model"] = facts.base_model
    if facts.datasets:
        found["datasets"] = facts.datasets
    for key, value in given.items():
        if value is None or value == []:
            continue
        if key in ("datasets", "tags") and isinstance(value, str):
            value = [value]
        if key in found and isinstance(found[key], list) and isinstance(value, list | tuple):
            found[key] = list(dict.fromkeys([*value, *found[key]]))
        else:
            found[key] = value
    if facts.relation == "adapter" and found["library_name"] == "transformers":
        found["library_name"] = "peft"  # TRL's card says the other of adapters too
    if "base_model" in found:
        found.setdefault("base_model_relation", facts.relation)
        if facts.relation == "adapter" and found["base_model_relation"] == "finetune":
            found["base_model_relation"] = "adapter"  # a card made before the adapter was saved
    if index := _index(found.pop("model-index", None), facts, model_name):
        found["model-index"] = index
    return found


def without_paths(head: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
    """
    A card's fields without a base model that is no name on the Hub: PEFT writes the folder that it loaded from, or
    nothing, there and into a tag. `folder` is a path that may look like such a name.

    Example:

    >>> without_paths({"base_model": "/models/mine", "tags": ["lora", "base_model:adapter:/models/mine"]})
    {'tags': ['lora']}
    >>> without_paths({"base_model": "me/mine", "tags": ["base_model:adapter:me/mine"]})
    {'base_model': 'me/mine', 'tags': ['base_model:adapter:me/mine']}
    >>> without_paths({"base_model": "runs/base"}, "runs/base")
    {}
    """
    kept = dict(head)
    base = kept.get("base_model")
    if isinstance(base, str) and (base == folder or not _REPOSITORY.fullmatch(base)):
        del kept["base_model"]
    if isinstance(tags := kept.get("tags"), list):
        of_base = re.compile(r"base_model:\w+:(.*)")
        kept["tags"] = [
            tag
            for tag in tags
            if not isinstance(tag, str)
            or not (at := of_base.fullmatch(tag))
            or (at[1] != folder and _REPOSITORY.fullmatch(at[1]))
        ]
    return kept


_METRIC = "held-out loss, nats a token"
_BENCHMARK = "after continued pre-training"


def _index(given: Any, facts: CardFacts, model_name: str) -> list[dict[str, Any]]:
    """The results that stand there already, others' than ours, and ours as they are now."""
    models = [dict(each) for each in given] if isinstance(given, list) else []
    name = models[0]["name"] if models and "name" in models[0] else model_name
    kept = [result for each in models for result in each.get("results") or [] if not _is_ours(result)]
    results = [*kept, *results_of(facts)]
    return [{"name": name, "results": results}] if results else []


def _is_ours(result: Any) -> bool:
    metrics = result.get("metrics") if isinstance(result, Mapping) else None
    return bool(metrics) and all(metric.get("name") in (_METRIC, _BENCHMARK) for metric in metrics or ())


def results_of(facts: CardFacts) -> list[dict[str, Any]]:
    """`model-index` results: the loss on each held-out set, in nats a token, and benchmarks after the stage.

    A loss that was last measured before the step of the weights is not theirs, and left out.
    """
    losses = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": name, "name": f"{name} (held out)"},
            "metrics": [{"type": "loss", "name": _METRIC, "value": round(figures["final"], 6)}],
        }
        for name, figures in facts.forgetting.items()
        if figures["final_step"] in (None, facts.steps)
    ]
    benchmarks = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": each.task, "name": f"{each.task} (lm-eval)"},
            "metrics": [{"type": each.metric, "name": _BENCHMARK, "value": round(each.after[0], 6)}],
        }
        for each in facts.benchmarks
        if each.after is not None
    ]
    return losses + benchmarks


def check_metadata(data: Mapping[str, Any]) -> list[str]:
    """
    What the Hub would refuse or ignore in a card's metadata, one line a fault; empty if nothing. Needs no network.

    Example:

    >>> check_metadata({"base_model": "a b", "base_model_relation": "child", "tags": "x"})
    ["base_model must be a name on the Hub, got 'a b'", "base_model_relation must be one of ('adapter', 'finetune',
    'merge', 'quantized'), got 'child'", "tags must be a list of text, got 'x'"]
    """
    faults = []
    bases = data.get("base_model")
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else []:
        if not isinstance(base, str) or not _REPOSITORY.fullmatch(base):
            faults.append(f"base_model must be a name on the Hub, got {shown(base)}")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        faults.append(f"base_model_relation must be one of {RELATIONS}, got {shown(relation)}")
    if relation is not None and bases is None:
        faults.append("base_model_relation is there without base_model")
    for key in _LISTS:
        value = data.get(key)
        single = key == "language" and isinstance(value, str)
        if value is not None and not single and not _texts(value):
            faults.append(f"{key} must be a list of text, got {shown(value)}")
    names = data.get("datasets")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and not _REPOSITORY.fullmatch(name):
            faults.append(f"datasets must be names on the Hub, got {shown(name)}")
    for key in ("library_name", "license", "pipeline_tag"):
        if data.get(key) is not None and not isinstance(data[key], str):
            faults.append(f"{key} must be text, got {shown(data[key])}")
    faults += _index_faults(data.get("model-index"))
    return faults


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _index_faults(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list) or not all(isinstance(entry, Mapping) for entry in index):
        return [f"model-index must be a list of models, got {shown(index)}"]
    faults = []
    for entry in index:
        if not isinstance(entry.get("name"), str):
            faults.append(f"a model of model-index needs a name, got {shown(entry.get('name'))}")
        for result in entry.get("results") or []:
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                if not all(isinstance(result.get(part, {}).get(key), str) for key in keys):
                    faults.append(f"{part} of a result needs {' and '.join(keys)}, got {shown(result.get(part))}")
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not is_number(metric.get("value")):
                    faults.append(f"a metric needs a type and a number as value, got {shown(metric)}")
    return faults
