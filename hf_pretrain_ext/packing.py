"""Packing: documents, each closed by EOS, joined in order and cut into blocks of one length, and kept apart there.

A row of a packed dataset has three columns. `input_ids` are the tokens. `position_ids` restart at 0 with every
document and every block; transformers' masks let no token look past such a restart, provided that there is no
attention mask and no cache. `seq_lengths` are the lengths of the stretches between restarts, under TRL's name for
them: its SFTTrainer keeps that column and drops `position_ids`, where the Trainer does the opposite.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike, NDArray

from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.say import say
from hf_pretrain_ext.values import check_integers, shown

__all__ = ["PackReport", "PackedCollator", "check_isolation", "pack"]

IGNORED = -100
"""The label that bears no loss."""

CHUNK = 1 << 18
"""Tokens that a process packs in one go, and 1/64 of the bytes it tokenizes: memory does not grow with the corpus."""

MAX_BLOCK = 1 << 24
"""Tokens of the longest block: several times the longest context of a model, and what one batch of `map` can hold."""

MAX_PROCESSES = 1024

REVISION = 1
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""


@dataclass(frozen=True)
class PackReport:
    """
    Where every token went: text + BOS + EOS = kept + dropped, and blocks · block_size = kept + padded.

    Args:
        documents (`int`): documents, the empty ones among them.
        empty_documents (`int`): documents without a token; they leave nothing in the blocks, not even an EOS.
        text_tokens (`int`): tokens of text; of documents that came as `input_ids`, all but the closing EOS.
        bos_tokens (`int`): beginning-of-sequence tokens put before documents.
        eos_tokens (`int`): end-of-sequence tokens that close documents, one each.
        blocks (`int`): rows of the packed dataset.
        block_size (`int`): tokens a block.
        kept (`int`): tokens of documents that are in the blocks.
        dropped (`int`): tokens of documents left over behind the last block.
        padded (`int`): tokens that fill up the last block.
    """

    documents: int
    empty_documents: int
    text_tokens: int
    bos_tokens: int
    eos_tokens: int
    blocks: int
    block_size: int
    kept: int
    dropped: int
    padded: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents ({self.empty_documents:,} empty) in {self.blocks:,} blocks of "
            f"{self.block_size:,} tokens: {self.text_tokens:,} of text, {self.bos_tokens:,} BOS, {self.eos_tokens:,} "
            f"EOS; {self.kept:,} kept, {self.dropped:,} dropped, {self.padded:,} padded"
        )


def pack(
    dataset: Any,
    tokenizer: Any,
    block_size: int,
    isolate: bool = True,
    *,
    text_column: str = "text",
    remainder: Literal["drop", "pad"] = "drop",
    seed: int | None = None,
    num_proc: int | None = None,
    return_report: bool = False,
) -> Any:
    """
    Tokenize documents, close each with EOS, join them and cut the stream into blocks of `block_size` tokens.

    The blocks do not depend on `num_proc`: each is cut by the process that holds its first token and reads on into
    the documents of the next. `Dataset.map` writes them to disk and caches them, tokenizing and packing apart, so that
    another `block_size` or `seed` does not tokenize again. (`datasets` caches nothing for rows that were made in
    memory: save them to disk and load them.)

    Text stays text: `"</s>"` in a document becomes the tokens of its characters. A document gets BOS in front if the
    tokenizer by itself begins texts so, and one EOS behind, also if the tokenizer appends one. Other control tokens
    (`[CLS]`) are not added.

    Args:
        dataset ([`~datasets.Dataset`]): one document a row, as text in `text_column` or, if there is no such column,
            as token ids in `input_ids`, which are taken as they are but for the closing EOS.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own; it needs an `eos_token`.
        block_size (`int`): tokens a block, at least 2 and at most what the model has positions for.
        isolate (`bool`, *optional*, defaults to `True`): restart `position_ids` at each document, so that none sees
            another and no loss is asked across the boundary. `False`: positions run through the block, attention and
            loss cross documents, as in GPT-3 (Brown et al., 2020, appendix B).
        text_column (`str`, *optional*, defaults to `"text"`): the column of texts; a `None` there is an empty text.
        remainder (`str`, *optional*, defaults to `"drop"`): what becomes of the last tokens, fewer than a block:
            `"drop"`, or `"pad"`, which fills them up with tokens that nothing sees and that bear no loss.
        seed (`int`, *optional*): shuffles the documents before they are joined; by default they keep their order.
        num_proc (`int`, *optional*): processes to work with; by default only the calling one.
        return_report (`bool`, *optional*, defaults to `False`): whether to return a [`PackReport`] too.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids` and `position_ids`, both `(block_size,)`, and `seq_lengths`, to be
        collated by [`PackedCollator`]. With `return_report=True` a pair of it and a [`PackReport`].

    Raises:
        `TypeError`: `dataset` or `tokenizer` is something else.
        `ValueError`: a missing column, an empty dataset, fewer tokens than a block, ids that the tokenizer does not
            have, no `eos_token`, or a value out of its range.

    Example:

    >>> from datasets import Dataset
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab", "ab c"], vocab_size=258)
    >>> documents = Dataset.from_dict({"text": ["ab c", "", "c ab"]})
    >>> rows, report = pack(documents, tokenizer, block_size=5, remainder="pad", return_report=True)
    >>> rows["position_ids"][:], rows["seq_lengths"][:]
    ([[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]], [[4, 1], [3, 1, 1]])
    >>> report.text_tokens, report.eos_tokens, report.kept, report.padded
    (6, 2, 8, 2)
    """
    column = document_column(dataset, text_column)
    tokenizer = checked_tokenizer(tokenizer)
    check_sizes(block_size, seed, num_proc)
    if not isinstance(isolate, bool):
        raise ValueError(f"isolate must be True or False, got {shown(isolate)}")
    if remainder not in ("drop", "pad"):
        raise ValueError(f"remainder must be 'drop' or 'pad', got {shown(remainder)}")
    if block_size > tokenizer.model_max_length:
        limit = f"the tokenizer's model_max_length={tokenizer.model_max_length:,}"
        say(f"block_size={block_size:,} is above {limit}: see that the model has the positions", logging.WARNING)

    documents, bos = tokenized(dataset, column, tokenizer, num_proc)
    lengths = document_lengths(documents)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(documents))
        documents, lengths = documents.select(order), lengths[order]
    report = _account(lengths, bos, block_size, remainder)
    say(str(report))
    packed = documents.map(
        _cut,
        desc="Packing",
        with_indices=True,
        batched=True,
        batch_size=rows_within(CHUNK, lengths.mean(), 100_000),
        num_proc=num_proc,
        features=block_features(block_size, "input_ids"),
        fn_kwargs={
            "revision": REVISION,
            "documents": documents,
            "starts": np.concatenate([[0], np.cumsum(lengths)]),
            "report": report,
            "isolate": isolate,
            "padding": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        },
    ).with_format(None)
    return (packed, report) if return_report else packed


def document_column(dataset: Any, text_column: str) -> str:
    """The column that holds the documents."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        fix = "Load one with load_dataset(..., split='train')"
        if isinstance(dataset, Mapping):
            fix = f"Take one split, as in dataset[{next(iter(dataset), 'train')!r}], or pack each of {list(dataset)}"
        elif hasattr(dataset, "__iter__") and hasattr(dataset, "features"):
            fix = "Write the stream to disk first, with Dataset.from_generator(lambda: iter(stream))"
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}. {fix}")
    names = dataset.column_names
    column = text_column if text_column in names else "input_ids"
    if column not in names:
        raise ValueError(
            f"text_column={shown(text_column)} is no column of the dataset, which has {names}. Name the one "
            "that holds the documents"
        )
    kind = dataset.features.arrow_schema.field(column).type
    if column == text_column:
        right, wanted = pa.types.is_string(kind) or pa.types.is_large_string(kind), "strings"
    else:
        right, wanted = (
            pa.types.is_integer(getattr(kind, "value_type", kind)) and kind.num_fields,
            "lists of token ids",
        )
    if not right:
        raise ValueError(f"the column {column!r} must hold {wanted}, got {kind}. Name the right one in text_column")
    if not len(dataset):
        raise ValueError("dataset has no rows. Pass one with at least one document")
    return column


def checked_tokenizer(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer must be one of transformers, got {type(tokenizer).__name__}. Load it with "
            "AutoTokenizer.from_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer has eos_token=None, so nothing would close a document. Set the token that the model knows as "
            "the end, as in tokenizer.eos_token = '[SEP]'"
        )
    return tokenizer


def check_sizes(block_size: Any, seed: Any, num_proc: Any) -> None:
    """Raises `ValueError` for what [`pack`] cannot work with; `seed` and `num_proc` may be None."""
    check_integers(
        block_size=(block_size, 2, MAX_BLOCK, False),
        seed=(seed, 0, None, True),
        num_proc=(num_proc, 1, MAX_PROCESSES, True),
    )


def rows_within(budget: int, row: float, most: int) -> int:
    return int(np.clip(budget / max(row, 1), 1, most))


def tokenized(dataset: Any, column: str, tokenizer: Any, num_proc: int | None = None) -> tuple[Any, int]:
    """The documents in `column` as `input_ids`, each closed by EOS, and how many BOS tokens open each: 0 or 1."""
    from datasets import Features, List, Value

    source = dataset.select_columns([column]).with_format("arrow")
    as_ids = dataset.features.arrow_schema.field(column).type.num_fields > 0
    work = _closing(tokenizer) if as_ids else _tokenizing(tokenizer)
    documents = source.map(
        **work,
        batched=True,
        batch_size=rows_within(64 * CHUNK, source.data.nbytes / source.data.num_rows, 1_000),
        num_proc=num_proc,
        features=Features({"input_ids": List(Value("int32"))}),
    )
    return documents, len(work["fn_kwargs"].get("prefix", ()))


def _tokenizing(tokenizer: Any) -> dict[str, Any]:
    """Arguments of the `map` that makes documents of texts."""
    encoder, control = text_encoder(tokenizer)
    settings = {
        "revision": REVISION,
        "encoder": encoder,
        "prefix": opening(tokenizer, encoder),
        "eos": tokenizer.eos_token_id,
        "control": control,
    }
    return {"function": _tokenize, "fn_kwargs": settings, "desc": "Tokenizing"}


def opening(tokenizer: Any, encoder: Any) -> list[int]:
    """What the tokenizer by itself begins texts with: BOS, or nothing."""
    empty = encoder.encode("", add_special_tokens=True)
    first = list(getattr(empty, "ids", empty))[:1]
    return first if first == [tokenizer.bos_token_id] else []


def text_encoder(tokenizer: Any) -> tuple[Any, dict[int, str]]:
    """What [`text_ids`] encodes with, and the control tokens that no text becomes, by id."""
    encoder = tokenizer
    if tokenizer.is_fast:
        # The Rust tokenizer alone is faster than its wrapper, and is pickled alike in every process, as the cache
        # needs. What calls of the wrapper leave behind in it would cut texts.
        encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        encoder.no_truncation()
        encoder.no_padding()
    control = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control.update(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        control.pop(tokenizer.unk_token_id, None)
    return encoder, control


def text_ids(encoder: Any, texts: list[str], control: dict[int, str]) -> list[list[int]]:
    """Token ids of texts as text: what looks like a control token becomes the tokens of its characters."""
    encoded = _encode(encoder, texts)
    ends = np.cumsum([len(ids) for ids in encoded])
    found = np.flatnonzero(np.isin(_flat(encoded), list(control)))
    for place in np.unique(np.searchsorted(ends, found, side="right")):
        encoded[place] = _plain(encoder, texts[place], control)
    return encoded


def _tokenize(
    batch: pa.Table, revision: int, encoder: Any, prefix: list[int], eos: int, control: dict[int, str]
) -> pa.Table:
    encoded = text_ids(encoder, [text or "" for text in batch[0].to_pylist()], control)
    whole = [[*prefix, *ids, eos] if ids else ids for ids in encoded]
    return lists(input_ids=(_flat(whole), [len(ids) for ids in whole]))


def _encode(encoder: Any, texts: list[str]) -> list[list[int]]:
    if hasattr(encoder, "encode_batch_fast"):
        encoder.encode_special_tokens = True  # as split_special_tokens below; not pickled with the rest
        return [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]
    return encoder(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]


def _plain(encoder: Any, text: str, control: dict[int, str]) -> list[int]:
    """Ids of a text that is encoded in pieces, cut inside whatever comes out as a control token.

    Unigram and WordPiece vocabularies hold their control tokens among the words, and find them in text even where the
    tokenizer was told to split special tokens.
    """
    ids = _encode(encoder, [text])[0]
    seen = control.keys() & set(ids)
    if not seen:
        return ids
    if hasattr(encoder, "encode_batch_fast"):
        encoding = encoder.encode(text, add_special_tokens=False)
        spans = [span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number in seen]
    else:
        spans = [match.span() for match in re.finditer("|".join(re.escape(control[number]) for number in seen), text)]
    cuts = sorted({start + 1 for start, end in spans if end - start > 1})
    if not cuts:
        raise ValueError(
            f"the tokenizer makes the control token {control[min(seen)]!r} of the text {text[:80]!r}. Take it out of "
            "the documents"
        )
    pieces = itertools.pairwise([0, *cuts, len(text)])
    return [number for start, end in pieces for number in _plain(encoder, text[start:end], control)]


def _closing(tokenizer: Any) -> dict[str, Any]:
    """Arguments of the `map` that closes documents which came as token ids."""
    settings = {"revision": REVISION, "eos": tokenizer.eos_token_id, "vocabulary": len(tokenizer)}
    return {"function": _close, "fn_kwargs": settings, "desc": "Closing documents"}


def _close(batch: pa.Table, revision: int, eos: int, vocabulary: int) -> pa.Table:
    if pc.list_flatten(batch[0]).null_count:
        raise ValueError("column 'input_ids' has None among its token ids. Take those rows out, or tokenize again")
    ids, lengths = flat_values(batch[0]), list_lengths(batch[0])
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(
            f"column 'input_ids' has ids from {ids.min()} to {ids.max()}, but the tokenizer has {vocabulary} tokens. "
            "Pass the tokenizer that made them"
        )
    ends = np.cumsum(lengths)
    bare = lengths > 0
    bare[bare] = ids[ends[bare] - 1] != eos
    return lists(input_ids=(np.insert(ids.astype(np.int32), ends[bare], eos), lengths + bare))


def _flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32)


def flat_values(column: pa.ChunkedArray) -> NDArray[Any]:
    return pc.list_flatten(column).to_numpy()


def list_lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def lists(**columns: tuple[NDArray[Any], ArrayLike]) -> pa.Table:
    """A table of lists, each column given by its values one after the other and by the lengths of the lists."""
    made = {}
    for name, (values, lengths) in columns.items():
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        made[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.table(made)


def document_lengths(documents: Any) -> NDArray[np.int64]:
    return np.concatenate([list_lengths(table["input_ids"]) for table in documents.iter(batch_size=100_000)])


def _account(lengths: NDArray[np.int64], bos: int, block_size: int, remainder: str) -> PackReport:
    tokens, full = int(lengths.sum()), int(np.count_nonzero(lengths))
    blocks, rest = divmod(tokens, block_size)
    pads = rest > 0 and remainder == "pad"
    if not blocks + pads:
        raise ValueError(
            f"block_size={block_size:,}, but all documents together have {tokens:,} tokens, which fill no block. Pass "
            "more text, a smaller block_size or remainder='pad'"
        )
    return PackReport(
        documents=len(lengths),
        empty_documents=len(lengths) - full,
        text_tokens=tokens - full * (1 + bos),
        bos_tokens=full * bos,
        eos_tokens=full,
        blocks=blocks + pads,
        block_size=block_size,
        kept=tokens - rest * (not pads),
        dropped=rest * (not pads),
        padded=(block_size - rest) * pads,
    )


def _cut(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    documents: Any,
    starts: NDArray[np.int64],
    report: PackReport,
    isolate: bool,
    padding: int,
) -> pa.Table:
    """The blocks whose first token lies in a batch of documents; `starts` are where documents begin in the stream."""
    size, first, last = report.block_size, rows[0], rows[-1] + 1
    begin, end = np.clip(-(-starts[[first, last]] // size), 0, report.blocks) * size
    stop = min(end, max(begin, report.kept))
    behind = max(last, int(np.searchsorted(starts, stop))) if end > begin else last
    parts = [flat_values(batch["input_ids"])[begin - starts[first] : stop - starts[first]]]
    if behind > last:
        parts.append(flat_values(documents[last:behind]["input_ids"])[: stop - starts[last]])
    ids = np.concatenate([*parts, np.full(end - stop, padding, dtype=np.int32)])
    inside = starts[first:behind][(starts[first:behind] >= begin) & (starts[first:behind] < stop)] - begin
    # Every token of padding is a stretch of its own, so that its position, 0, tells the collator to ask no loss there.
    places = [np.arange(0, end - begin, size), inside if isolate else inside[:0], np.arange(stop, end) - begin]
    return block_table(size, np.concatenate(places), input_ids=ids)


def block_features(block_size: int, *columns: str) -> Any:
    """The features of what [`block_table`] makes, for blocks with the token `columns`."""
    from datasets import Features, List, Value

    # Positions take two bytes where they fit: every epoch reads them from disk.
    position = Value("int16" if block_size <= 1 << 15 else "int32")
    tokens = List(Value("int32"))
    return Features({**dict.fromkeys(columns, tokens), "position_ids": List(position), "seq_lengths": tokens})


def block_table(size: int, restarts: NDArray[np.int64], **tokens: NDArray[np.int32]) -> pa.Table:
    """Blocks of `size` tokens, given by columns of all their tokens and by the places where positions restart."""
    restarts = np.unique(restarts)
    total = len(next(iter(tokens.values())))
    lengths = np.diff(restarts, append=total)
    counts = np.diff(np.searchsorted(restarts, np.arange(0, total + 1, size)))
    whole = np.full(total // size, size)
    positions = _positions(lengths, np.int16 if size <= 1 << 15 else np.int32)
    return lists(
        **{name: (values, whole) for name, values in tokens.items()},
        position_ids=(positions, whole),
        seq_lengths=(lengths.astype(np.int32), counts),
    )


def _positions(lengths: ArrayLike, dtype: type[np.signedinteger[Any]] = np.int64) -> NDArray[Any]:
    """Positions that restart at 0 with every stretch, given the stretches' lengths.

    Example:

    >>> _positions([3, 1, 2]).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    # Both terms wrap around in 16 bits and their difference is right all the same, at a seventh of the time.
    return np.arange(lengths.sum()).astype(dtype) - np.repeat((ends - lengths).astype(dtype), lengths)


class PackedCollator:
    """
    Collates packed rows in the one form that transformers isolates: with `position_ids` and without `attention_mask`.

    An attention mask, even one of ones, or a cache lets all documents of a row see each other, without a warning. The
    Trainer and SFTTrainer run without a cache; a loop of one's own calls the model with `use_cache=False`. Labels are
    the tokens (or the row's own `labels`), ignored where a position is 0: nothing predicts a document's first token.

    Args:
        flatten (`bool`, *optional*, defaults to `False`): put all rows one behind the other, in a batch of 1: what
            flash attention needs, since it looks for restarts in batches of 1 only. Other attention would pay for a
            mask of the squared length.

    Raises:
        `ValueError`: a row without `position_ids` and `seq_lengths`, which something removed, or of another length.

    Example:

    >>> batch = PackedCollator()([{"input_ids": [5, 6, 0, 7], "seq_lengths": [3, 1]}])
    >>> batch["position_ids"].tolist(), batch["labels"].tolist(), "attention_mask" in batch
    ([[0, 1, 2, 0]], [[-100, 6, 0, -100]], False)
    """

    def __init__(self, flatten: bool = False):
        self.flatten = flatten

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        positions = [self._row_positions(feature) for feature in features]
        sizes = sorted({len(row) for row in positions})
        if len(sizes) > 1 and not self.flatten:
            raise ValueError(
                f"rows of {sizes} tokens in one batch. Pack all data with one block_size, or pass flatten=True"
            )
        columns = {
            "input_ids": [feature["input_ids"] for feature in features],
            "labels": [feature.get("labels", feature["input_ids"]) for feature in features],
            "position_ids": positions,
        }
        batch = {
            name: torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
            for name, rows in columns.items()
        }
        batch = {name: tensor.view(1 if self.flatten else len(features), -1) for name, tensor in batch.items()}
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch

    @staticmethod
    def _row_positions(feature: Mapping[str, Any]) -> NDArray[np.int64]:
        if "position_ids" not in feature and "seq_lengths" not in feature:
            raise ValueError(
                f"a packed row came with {sorted(feature)} only: nothing tells its documents apart. Keep position_ids "
                "or seq_lengths, with remove_unused_columns=False if need be"
            )
        found = feature.get("position_ids")
        positions = _positions(feature["seq_lengths"]) if found is None else np.asarray(found, dtype=np.int64)
        if len(positions) != len(feature["input_ids"]):
            raise ValueError(
                f"a packed row of {len(positions)} tokens came with {len(feature['input_ids'])} input_ids: something "
                "cut it. For SFTTrainer, set max_length=None"
            )
        return positions


def check_isolation(model: Any, batch: Mapping[str, Any] | None = None, tolerance: float = 1e-4) -> float:
    """
    Change every other document of packed rows and see that the model's outputs for the rest stay as they are.

    Two forward passes in evaluation mode, otherwise called as in training; modes, gradients and random state are left
    alone. The architectures that isolate give exactly 0 in float32. Those that do not are, among others, recurrent
    (Mamba), bidirectional (BERT), without positions (ALiBi), or build a mask of their own (OPT, Falcon).

    Args:
        model ([`~transformers.PreTrainedModel`]): what will be trained, on any device, wrapped or not.
        batch (`Mapping`, *optional*): what the model will be called with, such as
            `next(iter(trainer.get_train_dataloader()))`; with it the collator is tested too. By default two rows of
            16 tokens as [`PackedCollator`] makes them.
        tolerance (`float`, *optional*, defaults to `1e-4`): largest change allowed of the outputs for the unchanged
            documents, relative to that of the changed ones: far above rounding, and far below the smallest leak
            measured, 1e-3.

    Returns:
        `float`: the change found, relative.

    Raises:
        `ValueError`: documents influence each other, or that cannot be told.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, use_cache=False))
    >>> check_isolation(model)
    0.0
    """
    if batch is None:
        rows = np.arange(16)
        batch = PackedCollator()(
            [{"input_ids": rows, "seq_lengths": [5, 3, 8]}, {"input_ids": rows[::-1], "seq_lengths": [4, 12]}]
        )
    if "position_ids" not in batch:
        raise ValueError(f"batch has no position_ids, only {sorted(batch)}: nothing tells documents apart in it")
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels" and not name.startswith("hf_pretrain_ext")  # what a plan counts beside the batch
    }
    ids = inputs["input_ids"]
    changed = inputs["position_ids"].eq(0).cumsum(-1) % 2 == 1
    if changed.all() or not changed.any():
        raise ValueError("batch must hold rows of several documents: with one a row there is nothing to keep apart")
    other = torch.where(changed, (ids + 1) % (ids.max() + 1), ids)
    difference = (_outputs(model, inputs) - _outputs(model, {**inputs, "input_ids": other})).abs().amax(-1)
    own, leak = float(difference[changed].max()), float(difference[~changed].max())
    if not own > 0:
        raise ValueError(
            f"the outputs of {type(model).__name__} do not depend on its input_ids (largest change {own})"
        )
    if not leak <= tolerance * own:
        raise ValueError(
            f"{type(model).__name__} lets documents of a packed row influence each other: changing one changes the "
            f"outputs for others by {leak / own:.1e} of what it changes its own. {_remedy(model, inputs)}"
        )
    return leak / own


def _outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), rng_guard():
            found = model.eval()(**inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with {sorted(inputs)}, so isolation cannot be shown: {error}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
            if hasattr(module, "reshard"):
                # FSDP2 leaves the root whole after a forward pass: an optimizer made then would update a copy.
                module.reshard()
    return getattr(found, "logits", found[0]).float()


def _remedy(model: Any, inputs: dict[str, Any]) -> str:
    config = getattr(model, "config", None)
    if inputs.get("attention_mask") is not None:
        return "The batch has an attention_mask, which switches isolation off: collate with PackedCollator()"
    if getattr(config, "use_cache", False) and inputs.get("use_cache") is not False:
        return (
            "It makes a cache, which switches isolation off: set model.config.use_cache = False, as the Trainer does"
        )
    if "flash" in str(getattr(config, "_attn_implementation", "")) and len(inputs["input_ids"]) > 1:
        return "Flash attention isolates in batches of 1: collate with PackedCollator(flatten=True)"
    return "Its layers carry state past a restart of position_ids: pack with isolate=False, or do not pack"
