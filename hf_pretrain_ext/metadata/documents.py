"""Raw documents to blocks of tokens, each document behind its metadata; and to two views of disjoint documents.

What of a document goes into which block is settled on lengths alone, in the calling process; blocks are then written
in parallel, by whichever process holds the document that they begin with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_pretrain_ext.metadata.blocks import Layout, MetadataReport
from hf_pretrain_ext.metadata.control import ControlTokens
from hf_pretrain_ext.metadata.layout import Overflow
from hf_pretrain_ext.metadata.source import Source, checked_drop, checked_overflow
from hf_pretrain_ext.metadata.template import Template
from hf_pretrain_ext.say import say
from hf_pretrain_ext.values import check_flag

__all__ = ["MetadataReport", "Views", "prepare", "prepare_in_order", "prepare_views"]


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
    control: ControlTokens | None = None,
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

    With `control`, a control token chosen by a score stands before each text, or before each of its segments, which
    are then tokenized apart (conditional training, arXiv 2302.08582).

    Args:
        dataset ([`~datasets.Dataset`]): one document a row: text in `text_column`, metadata in other columns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own; it needs an `eos_token`. It gets the
            control tokens that it lacks, for which the model needs rows: [`vocabulary.fit_embeddings`].
        block_size (`int`): tokens a block.
        template ([`Template`] or `str`, *optional*): the metadata; `"URL: {domain}\\n\\n"` from the column `url` if
            none (MeCo), but no metadata with `control`.
        control ([`ControlTokens`], *optional*): control tokens before texts.
        conditioned (`bool`, *optional*, defaults to `True`): `False` leaves all metadata and control tokens out: the
            same layout for plain data, to be replayed or evaluated on.
        text_column (`str`, *optional*, defaults to `"text"`): the column of texts; a `None` there is an empty text.
        isolate (`bool`, *optional*, defaults to `True`): restart `position_ids` at each document, so that none sees
            another. `False`: positions and attention run through the block.
        overflow (`str`, *optional*, defaults to `"split"`): what becomes of a document that does not fit in what is
            left of a block: `"split"` goes on in the next with BOS and metadata repeated (ours), `"discard"` leaves
            the rest out (MeCo).
        drop (`float`, *optional*, defaults to `0.0`): share of documents, in [0, 1), that go without their metadata,
            chosen by key.
        seed (`int`, *optional*): shuffles the documents, and keys both `drop`; by default they keep their order.
        num_proc (`int`, *optional*): processes to work with; by default only the calling one.
        return_report (`bool`, *optional*, defaults to `False`): whether to return a [`MetadataReport`] too.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids`, `labels` and `position_ids`, each `(block_size,)`, and
        `seq_lengths`, to be collated by [`PackedCollator`]. With `return_report=True` a pair of it and a
        [`MetadataReport`].

    Raises:
        `TypeError`: `dataset` or `tokenizer` is something else.
        `ValueError`: a missing column, an empty dataset, metadata of more than half a block, missing metadata or
            scores where they are not allowed, a control token that the tokenizer has for something else, or a value
            out of its range.

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
    source = Source(dataset, tokenizer, block_size, template, control, text_column, seed, num_proc)
    documents = source.documents(conditioned, not conditioned)
    layout = Layout(block_size, check_flag("isolate", isolate), checked_overflow(overflow), num_proc)
    order = np.arange(len(dataset))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(order))
    rows, report = documents.blocks(order, layout, conditioned, checked_drop(drop), seed or 0)
    say(str(report))
    return (rows, report) if return_report else rows


def prepare_in_order(
    dataset: Any,
    tokenizer: Any,
    block_size: int,
    template: Template | None = None,
    *,
    control: ControlTokens | None,
    text_column: str,
    isolate: bool,
    overflow: Overflow,
    drop: float,
    seed: int,
    num_proc: int | None,
) -> tuple[Any, MetadataReport]:
    """[`prepare`] without shuffling: `seed` only says which metadata and control tokens are left out."""
    source = Source(dataset, tokenizer, block_size, template, control, text_column, seed, num_proc)
    layout = Layout(block_size, isolate, overflow, num_proc)
    return source.documents(True, False).blocks(np.arange(len(dataset)), layout, True, drop, seed)


def prepare_views(
    dataset: Any,
    tokenizer: Any,
    block_size: int,
    template: Template | str | None = None,
    *,
    plain_blocks: Callable[[int], int],
    control: ControlTokens | None = None,
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
        seed (`int`, *optional*, defaults to `0`): keys the choice of plain documents and both `drop`.

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
    layout = Layout(block_size, check_flag("isolate", isolate), checked_overflow(overflow), num_proc)
    source = Source(dataset, tokenizer, block_size, template, control, text_column, seed, num_proc)
    documents = source.documents(True, True)
    plain = documents.reserve(plain_blocks, layout, checked_drop(drop), seed)
    chosen = np.zeros(len(dataset), dtype=bool)
    chosen[plain] = True
    conditioned = documents.blocks(np.flatnonzero(~chosen), layout, True, drop, seed)
    kept = documents.blocks(np.flatnonzero(chosen), layout, False, 0.0, seed)
    return Views(conditioned[0], kept[0], conditioned[1], kept[1])
