"""Meta-tokens in a dataset of tokenized rows: for evaluation with them, and for loops without a collator of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_pretrain_ext.meta_tokens.batches import Insertion, Length
from hf_pretrain_ext.meta_tokens.boundaries import checked_boundaries, ending_tokens
from hf_pretrain_ext.meta_tokens.insertion import IGNORED, Positions, document_numbers
from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.values import check_integers, shown
from hf_pretrain_ext.vocabulary import add_tokens

__all__ = ["with_meta_tokens"]

REVISION = 1
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""

LOOKED_AT = 100
"""Rows that tell what a column is."""

_KNOWN = ("attention_mask", "position_ids", "seq_lengths")


def with_meta_tokens(
    dataset: Any,
    tokenizer: Any,
    fraction: float = 0.1,
    token: str = "<|meta|>",
    positions: Positions = "uniform",
    length: Length = "longer",
    *,
    boundaries: Sequence[str | int] | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> Any:
    """
    Rows with meta-tokens in them, placed as `MetaTokensCallback` places them in training.

    Args:
        dataset ([`~datasets.Dataset`]): tokenized rows without padding: `input_ids`, and `labels`, `attention_mask`,
            `position_ids` and `seq_lengths` where they have them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's; gets the token if it lacks it.
        fraction, token, positions, length, boundaries: as of `MetaTokensCallback`.
        seed (`int`, *optional*, defaults to 0): with the number of a row it decides where they go.
        num_proc (`int`, *optional*): processes to work with.

    Returns:
        [`~datasets.Dataset`]: the same columns, and `labels`, which are −100 at meta-tokens.

    Raises:
        `TypeError`: `dataset` is something else.
        `ValueError`: settings out of range, rows that hold padding or the token already, or a column with an entry for
            each token that is none of those.

    Example:

    >>> from datasets import Dataset
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> rows = Dataset.from_dict({"input_ids": [[10, 11, 12, 13], [14, 15]]})
    >>> with_meta_tokens(rows, tokenizer, fraction=0.5, positions="every_n")["labels"][:]
    [[-100, 11, -100, 12, 13, -100], [-100, 15, -100]]
    """
    from datasets import Dataset, List, Value

    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}. Take one split, say")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset has the columns {dataset.column_names}, and no input_ids. Tokenize it first")
    _check_columns(dataset)
    check_integers(seed=(seed, 0, None, False), num_proc=(num_proc, 1, 1024, True))
    if boundaries is not None and positions != "boundaries":
        raise ValueError(f"boundaries are for positions='boundaries', got positions={shown(positions)}")
    ends = ending_tokens(tokenizer, checked_boundaries(boundaries)) if positions == "boundaries" else ()
    [number] = add_tokens(tokenizer, [token])
    known = [name for name in _KNOWN if name in dataset.column_names]
    lists = List(Value("int32"))
    return dataset.with_format(None).map(
        _insert_rows,
        desc="Inserting meta-tokens",
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        features=type(dataset.features)({**dataset.features, **dict.fromkeys(["input_ids", "labels", *known], lists)}),
        fn_kwargs={
            "insertion": Insertion(number, fraction, positions, length, ends),
            "seed": seed,
            "revision": REVISION,
        },
    )


def _check_columns(dataset: Any) -> None:
    """Columns that would keep their length while the tokens become more, told by the first rows."""
    others = [name for name in dataset.column_names if name not in ("input_ids", "labels", *_KNOWN)]
    rows = dataset.with_format(None).select_columns(["input_ids", *others])[:LOOKED_AT]
    sizes = [len(ids) for ids in rows["input_ids"]]
    for name in others:
        if any(sizes) and [len(each) if isinstance(each, list) else -1 for each in rows[name]] == sizes:
            raise ValueError(
                f"dataset has the column {name}, as long as input_ids in each row, and nothing says what it is at "
                f"meta-tokens. Take it out with dataset.remove_columns({name!r}), and mask labels by it before"
            )


def _insert_rows(
    rows: dict[str, list[Any]], numbers: list[int], insertion: Insertion, seed: int, revision: int
) -> dict[str, list[Any]]:
    sizes = torch.tensor([len(ids) for ids in rows["input_ids"]])
    if "attention_mask" in rows and not all(map(all, rows["attention_mask"])):
        raise ValueError("attention_mask has zeros: rows are padded. Insert meta-tokens before they are")
    columns = {"input_ids": rows["input_ids"], "labels": rows.get("labels", rows["input_ids"])}
    if "position_ids" in rows:
        columns["position_ids"] = rows["position_ids"]
    elif "seq_lengths" in rows:
        columns["position_ids"] = [[k for n in lengths for k in range(n)] for lengths in rows["seq_lengths"]]
    batch = {
        name: pad_sequence([torch.tensor(row, dtype=torch.int64) for row in values], batch_first=True)
        for name, values in columns.items()
    }
    if "position_ids" in batch:
        # As PackedCollator has it: nothing predicts the first token of a document.
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED)
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < sizes[:, None]).long()
    seeds = random_words(derive_key(seed, "meta-tokens in rows"), np.array(numbers)).astype(np.int64)
    made = insertion(batch, seeds)
    kept = made.pop("attention_mask").bool()
    inserted = {name: [row[keep] for row, keep in zip(made[name], kept, strict=True)] for name in columns}
    found = {name: [row.tolist() for row in values] for name, values in inserted.items() if name in rows}
    found["labels"] = [row.tolist() for row in inserted["labels"]]
    if "attention_mask" in rows:
        found["attention_mask"] = [[1] * len(row) for row in inserted["input_ids"]]
    if "seq_lengths" in rows:
        positions = inserted["position_ids"]
        found["seq_lengths"] = [document_numbers(row[None])[0].bincount().tolist() for row in positions]
    return found
