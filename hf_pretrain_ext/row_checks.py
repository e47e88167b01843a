"""What is wrong with a sample of the rows that a model will read, be they new, replayed or held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_pretrain_ext import _host, data
from hf_pretrain_ext.values import reason

if TYPE_CHECKING:
    from hf_pretrain_ext.plugin import Setup

__all__ = ["faults_of_rows", "looked_up", "sample_size"]

IGNORED = -100

Fault = tuple[str, str, bool]
"""What is wrong, what to do, and whether training cannot go on with it."""


def looked_up(dataset: Any) -> Fault | None:
    """Whether the first row can be had: what counts rows need not give them by number."""
    why = ""
    if not hasattr(dataset, "iloc"):  # a pandas table, which looks up columns
        try:
            dataset[0]
        except Exception as error:  # whatever a dataset of the user's raises is the finding here
            why = f" ({reason(error, 200)})"
        else:
            return None
    return (
        f"is a {type(dataset).__name__}, whose rows cannot be looked up by number{why}",
        "Use a `datasets.Dataset`: load files with load_dataset, take one split of a DatasetDict, make a pandas table "
        "one with Dataset.from_pandas.",
        True,
    )


def sample_size(dataset: Any) -> int:
    """Rows to look at where nothing else reads them: fewer where reading one may mean making it."""
    return data.SAMPLE if hasattr(dataset, "with_format") or isinstance(dataset, list | tuple) else 64


def faults_of_rows(
    setup: Setup, dataset: Any, collate: Callable[[list[Any]], Any], rows: Sequence[int]
) -> Iterator[Fault]:
    """Faults of the token ids, labels and lengths in `rows` of a map-style `dataset`; none where it has no ids.

    The first fault that makes the rest unreadable ends the list.
    """
    if "input_ids" not in data.columns(dataset):
        return
    fault = data.fault_of_ids(dataset, rows)
    if fault is not None:
        yield f"holds {fault}", "Tokenize it: a row's input_ids are a list of integers.", True
        return
    ids = data.token_rows(dataset, rows)
    found, vocabulary = data.id_range(ids), setup.embeddings
    if found and vocabulary and (found[0] < 0 or found[1] >= vocabulary):
        yield (
            f"holds token ids {found[0]}..{found[1]}, but the model has {vocabulary} embeddings",
            "Tokenize it with the model's own tokenizer.",
            True,
        )
        return
    if len(ids) != len(rows):
        return
    empty = [row for row, tokens in zip(rows, ids, strict=True) if not tokens.size]
    if len(empty) == len(rows):
        yield "holds rows without a token only", "Tokenize its texts.", True
        return
    if empty:
        first = ", ".join(map(str, empty[:3]))
        yield (
            f"holds {len(empty):,} rows without a token among {len(rows):,} looked at (row {first})",
            "Filter them out: they take a place in a batch and teach nothing.",
            False,
        )
    longest = dataset[rows[int(np.argmax([tokens.size for tokens in ids]))]]
    yield from _faults_of_labels(setup, dataset, collate, rows)
    yield from _faults_of_length(setup, collate, longest)


def _faults_of_labels(
    setup: Setup, dataset: Any, collate: Callable[[list[Any]], Any], rows: Sequence[int]
) -> Iterator[Fault]:
    """Labels that a causal model's loss cannot take; those of other models may be classes or scores."""
    if not _host.shifts_labels(setup.trainer) or "labels" not in data.columns(dataset):
        return
    fault = data.fault_of_ids(dataset, rows, "labels")
    if fault is not None:
        yield f"holds {fault}", f"Labels are token ids, or {IGNORED} where no loss is asked.", True
        return
    size = setup.outputs
    labels = data.token_rows(dataset, rows, "labels")
    if not size or len(labels) != len(rows):
        return
    for row, given in zip(rows, labels, strict=True):
        wrong = given[(given != IGNORED) & ((given < 0) | (given >= size))]
        # A collator may make labels of its own.
        if wrong.size and wrong[0] in _array(_collated(collate, dataset[row]).get("labels")):
            yield (
                f"holds the label {wrong[0]} in row {row}, but the model has {size} outputs",
                f"Labels are token ids below {size}, or {IGNORED} where no loss is asked.",
                True,
            )
            return


def _faults_of_length(setup: Setup, collate: Callable[[list[Any]], Any], longest: Any) -> Iterator[Fault]:
    """Rows longer than the model has positions for, as the collator hands them over (it may cut)."""
    positions, learned = _host.positions(setup.model)
    batch = _collated(collate, longest) if positions else {}
    if not positions or "input_ids" not in batch:
        return
    given = _array(batch.get("position_ids"))
    length = int(given.max()) + 1 if given.size else _array(batch["input_ids"]).shape[-1]
    if length > positions and learned:
        yield (
            f"holds rows of {length:,} tokens, but the model has {positions:,} positions",
            f"Cut it into rows of at most {positions:,} tokens.",
            True,
        )
    elif length > positions:
        yield (
            f"holds rows of {length:,} tokens, more than the {positions:,} positions that the model was made for",
            "Cut them shorter, unless it is to learn longer texts.",
            False,
        )


def _collated(collate: Callable[[list[Any]], Any], row: Any) -> Mapping[str, Any]:
    try:
        batch = collate([row])
    except Exception:  # that rows cannot be collated is for those to say who know what they are collated with
        return {}
    return batch if isinstance(batch, Mapping) else {}


def _array(values: Any) -> np.ndarray:
    return np.zeros(0, dtype=np.int64) if values is None else np.asarray(values)
