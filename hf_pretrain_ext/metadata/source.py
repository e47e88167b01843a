"""Raw documents, tokenized: texts and metadata apart, so that another template does not tokenize texts again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa

from hf_pretrain_ext.metadata.blocks import Bodies, Documents
from hf_pretrain_ext.metadata.control import ControlTokens
from hf_pretrain_ext.metadata.layout import NONE, SHORTEST, Overflow
from hf_pretrain_ext.metadata.marking import Marked, joined_texts, mark, segment_texts
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import (
    CHUNK,
    check_sizes,
    checked_tokenizer,
    document_column,
    document_lengths,
    lists,
    opening,
    rows_within,
    text_encoder,
    text_ids,
    tokenized,
)
from hf_pretrain_ext.say import say
from hf_pretrain_ext.values import is_number, shown

__all__ = ["Source", "check_head", "checked_condition", "checked_drop", "checked_overflow", "checked_template"]

REVISION = 3
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""


def checked_overflow(overflow: Any) -> Overflow:
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow must be one of {get_args(Overflow)}, got {shown(overflow)}")
    return overflow


def checked_drop(drop: Any) -> float:
    if not is_number(drop) or not 0 <= drop < 1:
        raise ValueError(
            f"drop must be the share of documents that go without metadata, at least 0 and below 1, got {shown(drop)}"
        )
    return float(drop)


def checked_template(template: Any) -> Template:
    if isinstance(template, str):
        return Template(template)
    if template is not None and not isinstance(template, Template):
        raise ValueError(f"template must be a string or a Template, got {shown(template)}")
    return template or Template()


def checked_condition(template: Any, control: Any) -> tuple[Template | None, ControlTokens | None]:
    """Metadata and control tokens as given; metadata by default only where there are no control tokens."""
    if control is not None and not isinstance(control, ControlTokens):
        raise ValueError(f"control must be ControlTokens, got {shown(control)}")
    return (None if template is None and control is not None else checked_template(template)), control


class Source:
    """A dataset of raw documents, looked through; `documents` tokenizes what is needed of it."""

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        block_size: Any,
        template: Any,
        control: Any,
        text_column: str,
        seed: int | None,
        num_proc: int | None,
    ):
        self.template, self.control = checked_condition(template, control)
        self.of_segments = self.control is not None and isinstance(self.control.segments, str)
        _check_documents(dataset, text_column, self.control if self.of_segments else None)
        self.dataset, self.text_column = dataset, text_column
        self.tokenizer = checked_tokenizer(tokenizer)
        check_sizes(block_size, seed, num_proc)
        self.block_size, self.seed, self.num_proc = block_size, seed or 0, num_proc
        if block_size > self.tokenizer.model_max_length:
            limit = f"the tokenizer's model_max_length={self.tokenizer.model_max_length:,}"
            say(f"block_size={block_size:,} is above {limit}: see that the model has the positions", logging.WARNING)

    def documents(self, conditioned: bool, plain: bool) -> Documents:
        dataset, tokenizer, template, control = self.dataset, self.tokenizer, self.template, self.control
        if conditioned:
            self._check_columns()
        # First of all: what the tokenizer has decides what is text.
        ids = control.add_to(tokenizer) if conditioned and control is not None else []
        bos = len(opening(tokenizer, text_encoder(tokenizer)[0]))
        one_segment = control is None or control.segments is None
        told = Bodies.of(self._texts(), bos) if plain or one_segment else None
        marked = None
        if conditioned and control is not None:
            texts = told.texts if one_segment and told is not None else self._segments(control)
            marked = mark(dataset, texts, control, ids, bos, self.seed, self.num_proc)
            if not (marked.tokens != NONE).any():
                raise ValueError(
                    f"no text of the dataset gets a control token: the column {control.column!r} holds no scores. "
                    "Name the right one in ControlTokens(column=...)"
                )
        some = told.length if told is not None else cast(Marked, marked).body
        if not some.any():
            column = control.segments if control is not None and self.of_segments else self.text_column
            raise ValueError(f"the column {column!r} holds no text at all. Pass documents with text")
        metadata, size, missing = None, np.zeros(len(some), dtype=np.int64), np.zeros(len(some), dtype=bool)
        if conditioned and template is not None:
            metadata = _metadata(dataset, tokenizer, template, self.num_proc)
            size = document_lengths(metadata)
            tables = metadata.select_columns(["missing"]).with_format("arrow").iter(batch_size=100_000)
            missing = np.concatenate([table["missing"].to_numpy().astype(bool) for table in tables])
        longest = int(np.argmax(size * (some > 0)))
        row = dataset[longest] if size[longest] else {}
        check_head(int(size[longest]), bos, marked is not None, self.block_size, f"row {longest}", template, row)
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Documents(told, marked, metadata, size, missing, tokenizer.bos_token_id if bos else None, padding)

    def _texts(self) -> Any:
        column = self.text_column
        dataset = self.dataset
        if self.of_segments and self.control is not None:
            dataset, column = joined_texts(dataset, str(self.control.segments), self.num_proc), "text"
        return tokenized(dataset, column, self.tokenizer, self.num_proc)[0]

    def _segments(self, control: ControlTokens) -> Any:
        return segment_texts(self.dataset, self.tokenizer, control, self.text_column, self.num_proc)

    def _check_columns(self) -> None:
        names = self.dataset.column_names
        made = self.template
        roots = made.roots(names) if made is not None else []
        if made is not None and (absent := [name for name in roots if name not in names]):
            raise ValueError(
                f"the template {shown(made.text)} takes the columns {roots}, but the dataset has no {absent}, "
                f"only {names}. Name the right ones in columns={{field: column}}"
            )
        if self.control is not None and (absent := [name for name in self.control.roots if name not in names]):
            raise ValueError(
                f"the control tokens take the columns {self.control.roots}, but the dataset has no {absent}, only "
                f"{names}. Name the right ones in ControlTokens(column=..., segments=...)"
            )


def _check_documents(dataset: Any, text_column: Any, control: ControlTokens | None) -> None:
    """Raises for what holds no documents; `control` where its segments are the documents."""
    from datasets import Dataset

    if control is None or not isinstance(dataset, Dataset):
        column = document_column(dataset, text_column)
        if column != text_column:
            raise ValueError(
                f"text_column={shown(text_column)} is no column of the dataset, which has {dataset.column_names}. "
                "Metadata goes before raw text: name the column that holds it"
            )
        return
    if control.segments not in dataset.column_names:
        raise ValueError(
            f"segments={shown(control.segments)} is no column of the dataset, which has {dataset.column_names}. Name "
            "the one that holds lists of texts"
        )
    kind = dataset.features.arrow_schema.field(control.segments).type
    inner = getattr(kind, "value_type", None)
    if inner is None or not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise ValueError(f"the column {control.segments!r} must hold lists of texts, got {kind}. Name the right one")
    if not len(dataset):
        raise ValueError("dataset has no rows. Pass one with at least one document")


def check_head(
    tokens: int,
    bos: int,
    controls: bool,
    block_size: int,
    which: str,
    template: Template | None,
    row: Mapping[str, Any],
) -> None:
    """Raises `ValueError` for metadata that, with BOS and a control token, leaves too little to the text."""
    # A cut may have to move by one token for the text's sake, and by one more for a control token's.
    if tokens + bos + controls <= min(block_size // 2, block_size - SHORTEST - 1 - controls):
        return
    if template is None or not tokens:
        raise ValueError(
            f"a block of {block_size:,} tokens is too short for {bos + controls} before each text and some of it. "
            "Use a larger block_size"
        )
    raise ValueError(
        f"the metadata of {which} takes {tokens:,} tokens, more than half of a block of {block_size:,} "
        f"({shown(template.render(row))}). Use a larger block_size, or a lower max_characters than "
        f"{template.max_characters}"
    )


def _metadata(dataset: Any, tokenizer: Any, template: Template, num_proc: int | None) -> Any:
    from datasets import Features, List, Value

    encoder, control = text_encoder(tokenizer)
    columns = template.roots(dataset.column_names)
    source = dataset.select_columns(columns).with_format("arrow")
    return source.map(
        _encode_metadata,
        desc="Metadata",
        batched=True,
        batch_size=rows_within(64 * CHUNK, source.data.nbytes / source.data.num_rows, 10_000),
        num_proc=num_proc,
        remove_columns=columns,
        features=Features({"input_ids": List(Value("int32")), "missing": Value("bool")}),
        with_indices=True,
        fn_kwargs={"revision": REVISION, "template": template, "encoder": encoder, "control": control},
    )


def _encode_metadata(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    template: Template,
    encoder: Any,
    control: dict[int, str],
) -> pa.Table:
    made: list[str | None] = []
    missing: list[bool] = []
    for number, row in zip(rows, batch.to_pylist(), strict=True):
        values = template.values(row)
        missing.append(None in values.values())
        made.append(template.fill(values, f"row {number}"))
    distinct = list(dict.fromkeys(text for text in made if text))
    known = dict(zip(distinct, text_ids(encoder, distinct, control), strict=True)) if distinct else {}
    ids = [known[text] if text else [] for text in made]
    flat = np.array([token for row in ids for token in row], dtype=np.int32)
    return lists(input_ids=(flat, [len(row) for row in ids])).append_column("missing", pa.array(missing, pa.bool_()))
