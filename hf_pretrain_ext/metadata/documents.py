"""Raw documents to blocks of tokens, each document behind its metadata; and to two views of disjoint documents.

What of a document goes into which block is settled on lengths alone, in the calling process; blocks are then written
in parallel, by whichever process holds the document that they begin with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.packing import (
    CHUNK,
    IGNORED,
    block_features,
    block_table,
    check_sizes,
    checked_tokenizer,
    document_column,
    document_lengths,
    flat_values,
    list_lengths,
    lists,
    rows_within,
    text_encoder,
    text_ids,
    tokenized,
)
from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.say import say
from hf_pretrain_ext.values import check_flag, is_number, shown

__all__ = ["MetadataReport", "Overflow", "Views", "prepare", "prepare_views"]

REVISION = 1
"""To be raised with every change of what is written: the cache knows our functions by name and not by their code."""

SHORTEST = 2
"""Tokens of a document that a piece of it holds at least: one to predict from, one to predict."""

Overflow = Literal["split", "discard"]


@dataclass(frozen=True)
class MetadataReport:
    """
    Where every token went: text + EOS = kept + dropped, and blocks · block_size = kept + BOS + metadata + padded.

    Args:
        documents (`int`): documents, the empty ones among them.
        empty_documents (`int`): documents without a token; they leave nothing in the blocks.
        conditioned_documents (`int`): documents that go with metadata.
        missing (`int`): documents that lack a value of the template; `Template.missing` says what became of them.
        without_metadata (`int`): documents whose metadata `drop` took away.
        text_tokens (`int`): tokens of text.
        eos_tokens (`int`): end-of-sequence tokens that close documents, one each.
        bos_tokens (`int`): beginning-of-sequence tokens in the blocks, one a piece of a document.
        metadata_tokens (`int`): tokens of metadata in the blocks, repeated with every piece.
        pieces (`int`): pieces that the documents were put into the blocks in.
        blocks (`int`): rows of the dataset.
        block_size (`int`): tokens a block.
        kept (`int`): tokens of text and EOS in the blocks.
        dropped (`int`): tokens of text and EOS that `overflow="discard"` left out.
        padded (`int`): tokens that fill blocks up where no piece would fit, and the last one.
    """

    documents: int
    empty_documents: int
    conditioned_documents: int
    missing: int
    without_metadata: int
    text_tokens: int
    eos_tokens: int
    bos_tokens: int
    metadata_tokens: int
    pieces: int
    blocks: int
    block_size: int
    kept: int
    dropped: int
    padded: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents ({self.empty_documents:,} empty, {self.conditioned_documents:,} with "
            f"metadata, {self.missing:,} lack a value, {self.without_metadata:,} had theirs dropped) in "
            f"{self.blocks:,} blocks of {self.block_size:,} tokens: {self.kept:,} of text and EOS, "
            f"{self.bos_tokens:,} BOS, {self.metadata_tokens:,} of metadata, {self.padded:,} padded; "
            f"{self.dropped:,} dropped"
        )


@dataclass(frozen=True)
class Views:
    """Two datasets of blocks over disjoint documents, each with its report; see [`prepare_views`]."""

    conditioned: Any
    plain: Any
    conditioned_report: MetadataReport
    plain_report: MetadataReport


def prepare(
    dataset: Any,
    tokenizer: Any,
    block_size: int,
    template: Template | str | None = None,
    *,
    conditioned: bool = True,
    text_column: str = "text",
    isolate: bool = True,
    overflow: Overflow = "split",
    drop: float = 0.0,
    seed: int | None = None,
    num_proc: int | None = None,
    return_report: bool = False,
) -> Any:
    """
    Tokenize documents, put their metadata in front and cut them into blocks (MeCo, arXiv 2501.01956).

    A document is `[BOS] metadata text EOS`, BOS where the tokenizer by itself begins texts so. Labels are the tokens
    of text and EOS; BOS, metadata and padding bear no loss. Metadata is tokenized apart from the text, so that no
    token spans both, and each of them as text: `"<|endoftext|>"` becomes the tokens of its characters. Every block
    begins with a document, or with a piece of one behind the same BOS and metadata. What is left of a block and could
    not hold them and two more tokens is padded. The blocks do not depend on `num_proc`, and `Dataset.map` caches them.

    Args:
        dataset ([`~datasets.Dataset`]): one document a row: text in `text_column`, metadata in other columns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own; it needs an `eos_token`.
        block_size (`int`): tokens a block.
        template ([`Template`] or `str`, *optional*): the metadata; `"URL: {domain}\\n\\n"` from the column `url` if
            none (MeCo).
        conditioned (`bool`, *optional*, defaults to `True`): `False` leaves all metadata out: the same layout for
            plain data, to be replayed or evaluated on.
        text_column (`str`, *optional*, defaults to `"text"`): the column of texts; a `None` there is an empty text.
        isolate (`bool`, *optional*, defaults to `True`): restart `position_ids` at each document, so that none sees
            another. `False`: positions and attention run through the block.
        overflow (`str`, *optional*, defaults to `"split"`): what becomes of a document that does not fit in what is
            left of a block: `"split"` goes on in the next with BOS and metadata repeated (ours), `"discard"` leaves
            the rest out (MeCo).
        drop (`float`, *optional*, defaults to `0.0`): share of documents, in [0, 1), that go without their metadata,
            chosen by key.
        seed (`int`, *optional*): shuffles the documents, and keys `drop`; by default they keep their order.
        num_proc (`int`, *optional*): processes to work with; by default only the calling one.
        return_report (`bool`, *optional*, defaults to `False`): whether to return a [`MetadataReport`] too.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids`, `labels` and `position_ids`, each `(block_size,)`, and
        `seq_lengths`, to be collated by [`PackedCollator`]. With `return_report=True` a pair of it and a
        [`MetadataReport`].

    Raises:
        `TypeError`: `dataset` or `tokenizer` is something else.
        `ValueError`: a missing column, an empty dataset, metadata of more than half a block, missing metadata where
            the template does not allow it, or a value out of its range.

    Example:

    >>> from datasets import Dataset
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> documents = Dataset.from_dict({"text": ["abcd", "e"], "at": ["x", "y"]})
    >>> rows = prepare(documents, tokenizer, 8, "{at}:")
    >>> [tokenizer.decode(row).replace("<|endoftext|>", "$") for row in rows["input_ids"]]
    ['x:abcd$$', 'y:e$$$$$']
    >>> rows["labels"][1][:5], rows["position_ids"][1]
    ([-100, -100, 69, 0, -100], [0, 1, 2, 3, 0, 0, 0, 0])
    """
    check_flag("conditioned", conditioned)
    check_flag("return_report", return_report)
    documents = _documents(dataset, tokenizer, block_size, template, conditioned, text_column, seed, num_proc)
    layout = _Settings(block_size, check_flag("isolate", isolate), checked_overflow(overflow), num_proc)
    order = np.arange(len(documents.body))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(order))
    rows, report = documents.blocks(order, layout, conditioned, checked_drop(drop), seed or 0)
    say(str(report))
    return (rows, report) if return_report else rows


def prepare_views(
    dataset: Any,
    tokenizer: Any,
    block_size: int,
    template: Template | str | None = None,
    *,
    plain_blocks: Callable[[int], int],
    text_column: str = "text",
    isolate: bool = True,
    overflow: Overflow = "split",
    drop: float = 0.0,
    seed: int = 0,
    num_proc: int | None = None,
) -> Views:
    """
    Two views of disjoint documents: blocks with metadata, and plain blocks for the cooldown.

    Which documents are plain follows from `seed`; each view keeps the documents in their order. How many are follows
    from their lengths, before anything is packed: as few as fill `plain_blocks(n)` blocks, n being the blocks of both
    views together.

    Args:
        plain_blocks (`Callable`): the plain blocks that are wanted out of n.
        seed (`int`, *optional*, defaults to `0`): keys the choice of plain documents and `drop`.

    The others are those of [`prepare`].

    Raises:
        `ValueError`: as [`prepare`], and where there are too few documents for two views.

    Example:

    >>> from datasets import Dataset
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> documents = Dataset.from_dict({"text": ["abc"] * 20, "at": ["x"] * 20})
    >>> views = prepare_views(documents, tokenizer, 12, "{at}:", plain_blocks=lambda blocks: blocks // 4)
    >>> len(views.conditioned), len(views.plain), views.plain_report.documents
    (7, 2, 6)
    """
    layout = _Settings(block_size, check_flag("isolate", isolate), checked_overflow(overflow), num_proc)
    documents = _documents(dataset, tokenizer, block_size, template, True, text_column, seed, num_proc)
    plain = documents.reserve(plain_blocks, layout, checked_drop(drop), seed)
    chosen = np.zeros(len(documents.body), dtype=bool)
    chosen[plain] = True
    conditioned = documents.blocks(np.flatnonzero(~chosen), layout, True, drop, seed)
    kept = documents.blocks(np.flatnonzero(chosen), layout, False, 0.0, seed)
    return Views(conditioned[0], kept[0], conditioned[1], kept[1])


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


@dataclass(frozen=True)
class _Settings:
    block_size: int
    isolate: bool
    overflow: Overflow
    num_proc: int | None


@dataclass(frozen=True)
class _Pieces:
    """Pieces of documents in the order of the blocks, int64 `(pieces,)`: tokens `start` to `start + length` of the
    text and EOS of document `document` are in block `block`."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    block: NDArray[np.int64]

    @property
    def blocks(self) -> int:
        return int(self.block[-1]) + 1 if len(self.block) else 0


def lay_out(heads: Sequence[int], bodies: Sequence[int], block_size: int, overflow: Overflow) -> _Pieces:
    """Where each document goes, by the tokens of its head (BOS, metadata) and of its body (text, EOS).

    A piece holds at least [`SHORTEST`] tokens of the body, so that there is a loss in every one.

    Example:

    >>> pieces = lay_out([2, 2], [9, 3], block_size=8, overflow="split")
    >>> pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), pieces.block.tolist()
    ([0, 0, 1], [0, 6, 0], [6, 3, 3], [0, 1, 2])
    """
    table = np.array(list(pieces_of(zip(heads, bodies, strict=True), block_size, overflow)), dtype=np.int64)
    return _Pieces(*(np.ascontiguousarray(column) for column in table.reshape(-1, 4).T))


def pieces_of(
    documents: Iterable[tuple[int, int]], block_size: int, overflow: Overflow
) -> Iterator[tuple[int, int, int, int]]:
    """The same one by one, from pairs of a head and a body: document, start, length, block."""
    discards = overflow == "discard"
    block, left = -1, 0
    for document, (head, rest) in enumerate(documents):
        start = 0
        while rest:
            room = left - head
            if rest <= room:
                take = rest
            else:
                # One token alone would have nothing to be predicted from where there is no head.
                take = room - (rest - room < SHORTEST and not discards)
                if take < SHORTEST:
                    block, left = block + 1, block_size
                    continue
            yield document, start, take, block
            left -= head + take
            start += take
            rest = 0 if discards else rest - take


def _documents(
    dataset: Any,
    tokenizer: Any,
    block_size: Any,
    template: Any,
    conditioned: bool,
    text_column: str,
    seed: int | None,
    num_proc: int | None,
) -> _Documents:
    """Checks and tokenizes: texts and metadata apart, so that another template does not tokenize texts again."""
    made = checked_template(template)
    column = document_column(dataset, text_column)
    if column != text_column:
        raise ValueError(
            f"text_column={shown(text_column)} is no column of the dataset, which has {dataset.column_names}. "
            "Metadata goes before raw text: name the column that holds it"
        )
    tokenizer = checked_tokenizer(tokenizer)
    check_sizes(block_size, seed, num_proc)
    if block_size > tokenizer.model_max_length:
        limit = f"the tokenizer's model_max_length={tokenizer.model_max_length:,}"
        say(f"block_size={block_size:,} is above {limit}: see that the model has the positions", logging.WARNING)
    if conditioned and (absent := [name for name in made.roots if name not in dataset.column_names]):
        raise ValueError(
            f"the template {shown(made.text)} takes the columns {made.roots}, but the dataset has no {absent}, only "
            f"{dataset.column_names}. Name the right ones in columns={{field: column}}"
        )
    texts, bos = tokenized(dataset, column, tokenizer, num_proc)
    body = document_lengths(texts)
    if not body.any():
        raise ValueError(f"the column {text_column!r} holds no text at all. Pass documents with text")
    body = np.where(body > 0, body - bos, 0)
    metadata, size, missing = None, np.zeros(len(body), dtype=np.int64), np.zeros(len(body), dtype=bool)
    if conditioned:
        metadata = _metadata(dataset, tokenizer, made, num_proc)
        size = document_lengths(metadata)
        tables = metadata.select_columns(["missing"]).with_format("arrow").iter(batch_size=100_000)
        missing = np.concatenate([table["missing"].to_numpy().astype(bool) for table in tables])
    longest = int(np.argmax(size * (body > 0)))
    check_head(int(size[longest]), bos, block_size, f"row {longest}", made, dataset[longest] if conditioned else {})
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _Documents(texts, metadata, body, size, missing, tokenizer.bos_token_id if bos else None, padding)


def check_head(tokens: int, bos: int, block_size: int, which: str, template: Template, row: Mapping[str, Any]) -> None:
    """Raises `ValueError` for metadata that leaves too little of a block to its document."""
    if bos + tokens > min(block_size // 2, block_size - SHORTEST - 1):
        text = shown(template.render(row)) if tokens else "there is none"
        raise ValueError(
            f"the metadata of {which} takes {tokens:,} tokens, more than half of a block of {block_size:,} ({text}). "
            f"Use a larger block_size, or a lower max_characters than {template.max_characters}"
        )


def _metadata(dataset: Any, tokenizer: Any, template: Template, num_proc: int | None) -> Any:
    from datasets import Features, List, Value

    encoder, control = text_encoder(tokenizer)
    source = dataset.select_columns(template.roots).with_format("arrow")
    return source.map(
        _encode_metadata,
        desc="Metadata",
        batched=True,
        batch_size=rows_within(64 * CHUNK, source.data.nbytes / source.data.num_rows, 10_000),
        num_proc=num_proc,
        remove_columns=template.roots,
        features=Features({"input_ids": List(Value("int32")), "missing": Value("bool")}),
        fn_kwargs={"revision": REVISION, "template": template, "encoder": encoder, "control": control},
    )


def _encode_metadata(
    batch: pa.Table, revision: int, template: Template, encoder: Any, control: dict[int, str]
) -> pa.Table:
    made: list[str | None] = []
    missing: list[bool] = []
    for row in batch.to_pylist():
        values = template.values(row)
        missing.append(None in values.values())
        made.append(template.fill(values))
    distinct = list(dict.fromkeys(text for text in made if text))
    known = dict(zip(distinct, text_ids(encoder, distinct, control), strict=True)) if distinct else {}
    ids = [known[text] if text else [] for text in made]
    flat = np.array([number for row in ids for number in row], dtype=np.int32)
    return lists(input_ids=(flat, [len(row) for row in ids])).append_column("missing", pa.array(missing, pa.bool_()))


@dataclass(frozen=True)
class _Documents:
    """Tokenized documents: `texts` with BOS and EOS, `metadata` (None: there is none), and their lengths by row."""

    texts: Any
    metadata: Any
    body: NDArray[np.int64]
    metadata_tokens: NDArray[np.int64]
    missing: NDArray[np.bool_]
    bos: int | None
    padding: int

    def _kept_metadata(self, rows: NDArray[np.int64], conditioned: bool, drop: float, seed: int) -> NDArray[np.bool_]:
        if not conditioned:
            return np.zeros(len(rows), dtype=bool)
        if not drop:
            return np.ones(len(rows), dtype=bool)
        words = random_words(derive_key(seed, "metadata drop"), rows) >> np.uint64(11)
        return words.astype(np.float64) >= drop * 2**53

    def _lay_out(
        self, rows: NDArray[np.int64], layout: _Settings, conditioned: bool, drop: float, seed: int
    ) -> tuple[_Pieces, NDArray[np.int64], NDArray[np.bool_]]:
        kept = self._kept_metadata(rows, conditioned, drop, seed)
        metadata = self.metadata_tokens[rows] * kept
        heads = metadata + (self.bos is not None)
        pieces = lay_out(heads.tolist(), self.body[rows].tolist(), layout.block_size, layout.overflow)
        return pieces, metadata, kept

    def reserve(self, wanted: Callable[[int], int], layout: _Settings, drop: float, seed: int) -> NDArray[np.int64]:
        """Rows, chosen by key, that fill `wanted(n)` blocks without metadata out of n in all."""
        order = np.argsort(
            random_words(derive_key(seed, "metadata cooldown"), np.arange(len(self.body))), kind="stable"
        )
        order = order[self.body[order] > 0]
        tokens = np.cumsum(self.body[order] + (self.bos is not None))
        rows, blocks = order[:0], 0
        # What is wanted depends on how many blocks there are, and those a little on what is wanted.
        for _ in range(8):
            rest = np.setdiff1d(np.arange(len(self.body)), rows, assume_unique=True)
            plain = self._lay_out(rows, layout, False, 0.0, seed)[0].blocks
            total = plain + self._lay_out(rest, layout, True, drop, seed)[0].blocks
            if total == blocks:
                break
            blocks = total
            rows = self._filling(wanted(blocks), order, tokens, layout)
        if len(rows) == len(order) or not len(rows):
            raise ValueError(
                f"{len(order):,} documents in {blocks:,} blocks are too few for two views, conditioned and plain, of "
                "documents of their own. Pass more documents, or a smaller block_size"
            )
        return rows

    def _filling(
        self, target: int, order: NDArray[np.int64], tokens: NDArray[np.int64], layout: _Settings
    ) -> NDArray[np.int64]:
        """The first of `order` that fill `target` blocks, in rising order."""
        budget = target * layout.block_size
        while True:
            count = min(int(np.searchsorted(tokens, budget)) + 1, len(order))
            rows = np.sort(order[:count])
            lacking = target - self._lay_out(rows, layout, False, 0.0, 0)[0].blocks
            if lacking <= 0 or count == len(order):
                return rows
            budget += lacking * layout.block_size

    def blocks(
        self, rows: NDArray[np.int64], layout: _Settings, conditioned: bool, drop: float, seed: int
    ) -> tuple[Any, MetadataReport]:
        pieces, metadata, kept = self._lay_out(rows, layout, conditioned, drop, seed)
        report = self._account(rows, pieces, metadata, kept, layout, conditioned)
        whole = len(rows) == len(self.body) and bool((np.diff(rows) > 0).all())
        texts = self.texts if whole else self.texts.select(rows)
        heads = self.metadata if whole or self.metadata is None else self.metadata.select(rows)
        # The document that each block begins with.
        begins = pieces.document[np.flatnonzero(np.diff(pieces.block, prepend=-1))]
        made = texts.map(
            _cut,
            desc="Cutting blocks",
            with_indices=True,
            batched=True,
            batch_size=rows_within(CHUNK, float(self.body[rows].mean()), 100_000),
            num_proc=layout.num_proc,
            features=block_features(layout.block_size, "input_ids", "labels"),
            fn_kwargs={
                "revision": REVISION,
                "texts": texts,
                "metadata": heads,
                "kept": kept,
                "pieces": pieces,
                "begins": begins,
                "bos": self.bos,
                "padding": self.padding,
                "block_size": layout.block_size,
                "isolate": layout.isolate,
            },
        )
        return made.with_format(None), report

    def _account(
        self,
        rows: NDArray[np.int64],
        pieces: _Pieces,
        metadata: NDArray[np.int64],
        kept: NDArray[np.bool_],
        layout: _Settings,
        conditioned: bool,
    ) -> MetadataReport:
        full = self.body[rows] > 0
        tokens, eos = int(self.body[rows].sum()), int(full.sum())
        placed, bos = int(pieces.length.sum()), len(pieces.document) * (self.bos is not None)
        repeated = int(metadata[pieces.document].sum())
        return MetadataReport(
            documents=len(rows),
            empty_documents=len(rows) - eos,
            conditioned_documents=int((full & (metadata > 0)).sum()),
            missing=int((full & self.missing[rows]).sum()) if conditioned else 0,
            without_metadata=int((full & ~kept).sum()) if conditioned else 0,
            text_tokens=tokens - eos,
            eos_tokens=eos,
            bos_tokens=bos,
            metadata_tokens=repeated,
            pieces=len(pieces.document),
            blocks=pieces.blocks,
            block_size=layout.block_size,
            kept=placed,
            dropped=tokens - placed,
            padded=pieces.blocks * layout.block_size - placed - bos - repeated,
        )


def _cut(
    batch: pa.Table,
    rows: Sequence[int],
    revision: int,
    texts: Any,
    metadata: Any,
    kept: NDArray[np.bool_],
    pieces: _Pieces,
    begins: NDArray[np.int64],
    bos: int | None,
    padding: int,
    block_size: int,
    isolate: bool,
) -> pa.Table:
    """The blocks that begin with a document of the batch; they may end with documents behind it."""
    first, last = np.searchsorted(begins, [rows[0], rows[-1] + 1])
    chosen = slice(*np.searchsorted(pieces.block, [first, last]))
    document, start, length = pieces.document[chosen], pieces.start[chosen], pieces.length[chosen]
    total = int(last - first) * block_size
    ids = np.full(total, padding, dtype=np.int32)
    labels = np.full(total, IGNORED, dtype=np.int32)
    if not total:
        return block_table(block_size, np.zeros(0, dtype=np.int64), input_ids=ids, labels=labels)
    low, high = int(document[0]), int(document[-1]) + 1
    opened = int(bos is not None)
    body = texts[low:high]["input_ids"]
    pool = [np.array([padding if bos is None else bos], dtype=np.int32), flat_values(body)]
    size = np.zeros(high - low, dtype=np.int64)
    head_at = size
    if metadata is not None:
        heads = metadata[low:high]["input_ids"]
        found = list_lengths(heads)
        head_at = 1 + len(pool[1]) + np.cumsum(found) - found
        size = found * kept[low:high]
        pool.append(flat_values(heads))
    text_at = 1 + np.cumsum(list_lengths(body)) - list_lengths(body) + opened
    own = document - low
    # Each piece is copied from three places: BOS, its metadata, its part of the text.
    sources = np.stack([np.zeros_like(own), head_at[own], text_at[own] + start], axis=1).ravel()
    parts = np.stack([np.full_like(own, opened), size[own], length], axis=1)
    whole = parts.sum(axis=1)
    offsets = np.cumsum(whole) - whole
    block = pieces.block[chosen] - first
    opens = np.flatnonzero(np.diff(block, prepend=-1))
    places = block * block_size + offsets - offsets[opens][block]
    from_ = _ranges(sources, parts.ravel())
    to = _ranges(places, whole)
    ids[to] = np.concatenate(pool)[from_]
    of_text = np.repeat(np.tile([False, False, True], len(own)), parts.ravel())
    # A first token without a head has nothing to be predicted from, unless documents see each other.
    if isolate:
        of_text[offsets] = False
    labels[to[of_text]] = ids[to[of_text]]
    labels[::block_size] = IGNORED
    filled = np.zeros(total, dtype=bool)
    filled[to] = True
    # Every token of padding is a stretch of its own, as in `pack`.
    restarts = [np.arange(0, total, block_size), np.flatnonzero(~filled), places if isolate else places[:0]]
    return block_table(block_size, np.concatenate(restarts), input_ids=ids, labels=labels)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from each start on, as many as its length says, one after the other.

    Example:

    >>> _ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
