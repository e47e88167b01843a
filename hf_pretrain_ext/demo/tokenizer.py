"""A small byte-level tokenizer for the demo, and texts made into blocks of tokens with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain_ext.say import say

__all__ = ["END_OF_TEXT", "blocks", "encode_documents", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer: the same texts in the same order give the same tokenizer.

    Every text can be encoded and decodes to itself, byte by byte if need be. `<|endoftext|>` is the end of a document
    and the padding; there is no token for its beginning. The tokenizer never makes a control token out of text
    (`split_special_tokens=True`, which `save_pretrained` keeps).

    Args:
        texts (`Iterable[str]`): texts of the domain the model is pre-trained on first, and of no other.
        vocab_size (`int`, *optional*, defaults to `2048`): number of tokens, among them 256 bytes and one control
            token; fewer come out when the texts have fewer pairs to merge.

    Example:

    >>> tokenizer = train_tokenizer(["the cat sat on the mat", "the hat"], vocab_size=260)
    >>> len(tokenizer), tokenizer.decode(tokenizer.encode("the ☃"))
    (260, 'the ☃')
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is less than 257: 256 bytes and {END_OF_TEXT}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """
    Encode documents, each followed by the end-of-sequence token, which occurs nowhere else.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): any tokenizer with an `eos_token`.
        texts (`Sequence[str]`): documents. One that holds the string `"<|endoftext|>"` gets ordinary tokens for it.

    Returns:
        `list[list[int]]`: token ids of each document.

    Raises:
        `ValueError`: no end-of-sequence token, or a tokenizer that makes it out of text all the same.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token to end documents with")
    if not texts:
        return []
    # Said at each call: for a tokenizer that was not made here, the default is to read control tokens out of text.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    for number, ids in enumerate(encoded):
        if end in ids:
            raise ValueError(f"document {number} has the end-of-sequence token {tokenizer.eos_token!r} inside")
        ids.append(end)
    return encoded


def blocks(documents_ids: Iterable[Sequence[int]], block_size: int) -> Dataset:
    """
    Join documents and cut them into blocks of equal length; the remainder is dropped and said on stderr.

    Args:
        documents_ids (`Iterable[Sequence[int]]`): token ids of each document, as made by [`encode_documents`].
        block_size (`int`): tokens in a block.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids` and `labels`, equal, `block_size` ids of type int32 a row.

    Raises:
        `ValueError`: fewer tokens than one block.

    Example:

    >>> blocks([[5, 6, 0], [7, 8, 9, 0]], block_size=3)["input_ids"][:]
    [[5, 6, 0], [7, 8, 9]]
    """
    ids = np.fromiter(itertools.chain.from_iterable(documents_ids), dtype=np.int32)
    if block_size < 1 or len(ids) < block_size:
        raise ValueError(f"{len(ids)} tokens do not fill a block of block_size={block_size}")
    count, remainder = divmod(len(ids), block_size)
    say(f"{count:,} blocks of {block_size} tokens; {remainder} tokens left over at the end are dropped")
    starts = np.arange(0, (count + 1) * block_size, block_size, dtype=np.int32)
    rows = pa.ListArray.from_arrays(pa.array(starts), pa.array(ids[: count * block_size]))
    return Dataset(pa.table({"input_ids": rows, "labels": rows}))  # one array in memory serves both columns
