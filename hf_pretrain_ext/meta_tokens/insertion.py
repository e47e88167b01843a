"""Where meta-tokens go, and putting them there: pure functions over whole batches, for raw loops and collators.

A sample of l tokens gets M = ⌊k·l⌋ meta-tokens. With the causal loss of transformers, in which position t predicts
label t + 1, two rules make the loss of the paper, cross-entropy without the indices whose target is a meta-token:

    a meta-token's own label is −100         so that nothing predicts it
    every other label goes with its token    so that what stands in front of a token, text or meta, predicts it

    text       a     b     c             labels   −     b     c
    inserted   a  *  b  *  *  c          labels   −  −  b  −  −  c     predicted: b by the first *, c by the last

So the tokens that bear a loss are those that do without meta-tokens, each once. The first of a row is none of them,
also behind a meta-token. A meta-token is of the document of the token that it stands in front of, and behind the last
token of that one's.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.values import is_number, shown

__all__ = ["IGNORED", "Positions", "checked_fraction", "document_numbers", "draw_positions", "insert", "meta_counts"]

IGNORED = -100
"""The label that bears no loss."""

Positions = Literal["uniform", "every_n", "boundaries"]
"""Where meta-tokens go; see [`draw_positions`]."""

LARGEST = 0.5
"""The largest fraction: beyond, a sample of fixed length would hold more meta-tokens than text."""

_SLOT_BITS = 26
"""Bits of a key that say which place it is of: 2^26 places, far more than a sample has."""

_KEYS = derive_key("meta-tokens", "rows"), derive_key("meta-tokens", "places")


def checked_fraction(fraction: Any) -> Fraction:
    """`fraction` as the decimal number that was written, so that 0.29 of 100 tokens is 29.

    Raises:
        `ValueError`: no number from 0 to 0.5.

    Example:

    >>> checked_fraction(0.29) * 100
    Fraction(29, 1)
    """
    if not is_number(fraction) or not 0 <= fraction <= LARGEST:
        raise ValueError(
            f"fraction must be meta-tokens per token of text, from 0 to {LARGEST}, got {shown(fraction)}. Pass 0.1, "
            "say, for one to ten tokens"
        )
    return Fraction(repr(float(fraction)))  # NumPy's numbers have a repr of their own


def meta_counts(fraction: float | Fraction, lengths: ArrayLike) -> NDArray[np.int64]:
    """M = ⌊k·l⌋ for samples of `lengths` tokens, computed without rounding.

    Example:

    >>> meta_counts(0.1, [1024, 9, 30]).tolist()
    [102, 0, 3]
    """
    share = fraction if isinstance(fraction, Fraction) else checked_fraction(fraction)
    distinct, which = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True)
    made = [int(length) * share.numerator // share.denominator for length in distinct]
    return np.array(made, dtype=np.int64)[which].reshape(np.shape(lengths))


def draw_positions(
    seeds: ArrayLike,
    text: ArrayLike,
    counts: ArrayLike,
    how: Positions = "uniform",
    boundaries: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The places of meta-tokens in samples, a function of each sample's seed, length and count alone.

    Args:
        seeds (`ArrayLike` of `int`): shape `(batch,)`; a sample plan's `draws.seed`, or any numbers of one's own.
        text (`ArrayLike` of `int`): tokens of text in each sample: one number, or shape `(batch,)`.
        counts (`ArrayLike` of `int`): meta-tokens for each sample; likewise.
        how (`str`, *optional*, defaults to `"uniform"`): `"uniform"`: of the text + count places of the sample with
            its meta-tokens, every set of `count` is as likely as any other (the paper's). `"every_n"`: one behind
            every ⌊text/count⌋ tokens of text, counted from the sample's begin; seeds play no part (ours).
            `"boundaries"`: at most one behind a token; behind tokens that end something first, drawn among them if
            they are more than `count`, the rest behind others, drawn too (ours).
        boundaries (`torch.Tensor`, *optional*): shape `(batch, width)`, true for tokens of text that end something.

    Returns:
        `torch.Tensor`: int64, shape `(batch, largest count)`: places in the sample as it will be, rising, −1 behind
        the last of a sample with fewer.

    Raises:
        `ValueError`: numbers that do not fit together.

    Example:

    >>> draw_positions([0, 1], 8, 2, "every_n").tolist()
    [[4, 9], [4, 9]]
    >>> drawn = draw_positions([7, 8], 100, 10)
    >>> drawn.shape, bool((drawn.diff(dim=1) > 0).all()), int(drawn.max()) < 110
    (torch.Size([2, 10]), True, True)
    """
    if how not in get_args(Positions):
        raise ValueError(f"how must be one of {get_args(Positions)}, got {shown(how)}")
    rows = np.atleast_1d(np.asarray(seeds, dtype=np.int64)).astype(np.uint64)
    tokens, wanted = (np.broadcast_to(np.asarray(n, dtype=np.int64), rows.shape) for n in (text, counts))
    gapped = how != "uniform"
    if rows.size and (tokens.min() < 0 or wanted.min() < 0 or (gapped and (wanted > tokens).any())):
        raise ValueError(
            f"counts must lie from 0 on{', at most the tokens of text' * gapped}, got {shown(counts)} for "
            f"{shown(text)} tokens"
        )
    if (boundaries is None) == (how == "boundaries"):
        raise ValueError(f"boundaries are needed with how='boundaries' and of no use else, got how={how!r}")
    most = int(wanted.max(initial=0))
    drawn = np.full((len(rows), most), -1, dtype=np.int64)
    if not drawn.size:
        return torch.from_numpy(drawn)
    filled = np.arange(most) < wanted[:, None]
    if how == "every_n":
        found = (np.arange(1, most + 1) * (tokens // np.maximum(wanted, 1))[:, None])[filled]
    else:
        keys = _keys(rows, tokens if gapped else tokens + wanted, None if boundaries is None else boundaries.numpy())
        smallest = np.partition(keys, sorted(set((wanted[wanted > 0] - 1).tolist())), axis=1)
        last = smallest[np.arange(len(rows)), np.maximum(wanted, 1) - 1]
        chosen = np.flatnonzero((keys <= last[:, None]) & (wanted > 0)[:, None])
        found = chosen % keys.shape[1] + gapped
    drawn[filled] = found
    # Behind a gap come the meta-tokens of the gaps before it, and the tokens.
    return torch.from_numpy(drawn + np.arange(most) * filled if gapped else drawn)


def _keys(seeds: NDArray[np.uint64], places: NDArray[np.int64], first: NDArray[Any] | None) -> NDArray[np.uint64]:
    """A key for every place of every row, no two of a row alike: places with the smallest keys are drawn.

    `first` says which places (gaps behind tokens of text) come before others; the last place then comes last.
    """
    width = int(places.max())
    if width > 1 << _SLOT_BITS:
        raise ValueError(f"samples of {width:,} tokens are longer than the {1 << _SLOT_BITS:,} that can be drawn from")
    numbers = np.arange(width, dtype=np.uint64)
    keys = random_words(_KEYS[1], random_words(_KEYS[0], seeds)[:, None] + numbers)
    # The place in the low bits makes keys distinct; the two high bits are for what comes later.
    keys >>= np.uint64(2 + _SLOT_BITS)
    keys <<= np.uint64(_SLOT_BITS)
    keys |= numbers
    if first is not None:
        ends = np.zeros(keys.shape, dtype=bool)
        ends[:, : first.shape[1]] = first[:, :width]
        keys[~ends] |= np.uint64(1 << 62)
        keys[numbers == (places[:, None] - 1).astype(np.uint64)] |= np.uint64(1 << 63)
    if places.min() < width:
        keys[numbers >= places[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    return keys


def insert(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None,
    positions: torch.Tensor,
    meta_id: int,
    *,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Puts meta-tokens into a batch; rows become longer by the largest number of them.

    Args:
        input_ids (`torch.Tensor`): text, shape `(batch, sequence)`.
        labels (`torch.Tensor`, *optional*): of the same shape, unshifted; defaults to the text, but for the first
            token of each document, and padding.
        positions (`torch.Tensor`): int64, shape `(batch, meta)`: where they stand in the rows as they will be,
            rising, −1 behind the last, as [`draw_positions`] returns them.
        meta_id (`int`): the token.
        position_ids (`torch.Tensor`, *optional*): where they restart, another document begins; they go on to count
            the tokens of each, meta-tokens among them.
        attention_mask (`torch.Tensor`, *optional*): 1 for text, 0 for padding behind it. Without it, all rows must
            get the same number of meta-tokens.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `labels`, `position_ids` and `attention_mask` if given, and, shape
        `(batch, meta)`, `meta_positions` (the positions) and `meta_documents` (the number in its row of the document
        that each is in, −1 for none). The last two are taken by [`attach_meta_attention`]'s hook, not by the model.

    Raises:
        `ValueError`: shapes or positions that do not fit.

    Example:

    >>> made = insert(torch.tensor([[5, 6, 7]]), None, torch.tensor([[1, 4]]), meta_id=9)
    >>> made["input_ids"].tolist(), made["labels"].tolist()
    ([[5, 9, 6, 7, 9]], [[-100, -100, 6, 7, -100]])
    """
    _check_shapes(input_ids, positions, labels=labels, position_ids=position_ids, attention_mask=attention_mask)
    # NumPy: its calls cost half of torch's, and batches are small.
    ids, drawn = _array(input_ids), _array(positions)
    _check_rising(drawn)
    (rows, width), most = ids.shape, drawn.shape[1]
    total, there = width + most, drawn >= 0
    counts, begins = there.sum(1), np.arange(rows) * (width + most)
    at = drawn + begins[:, None]
    taken = np.zeros(rows * total, dtype=bool)
    taken[at[there]] = True
    mask = None if attention_mask is None else _array(attention_mask)
    filled = None if mask is None else _filled(mask, counts, total, taken)
    if (counts < most).any():
        if mask is None:
            raise ValueError(
                f"positions are of {counts.min()} to {counts.max()} meta-tokens a row: without an attention_mask all "
                "rows must get as many. Pass the mask, or rows of one length"
            )
        # Rows that get fewer are filled up behind their last token.
        extra = (np.arange(total) >= width + counts[:, None]).reshape(-1)
        taken |= extra
    else:
        extra = None
    # Where each token of text goes, in all rows one behind the other.
    places = np.flatnonzero(~taken)
    if len(places) != rows * width:
        raise ValueError("positions hold a place of a row twice. Draw them without repetition, as draw_positions does")
    made = {"input_ids": _placed(ids, places, rows * total, meta_id)}
    if extra is not None:
        made["input_ids"][extra] = np.repeat(ids[:, -1], most - counts)
    starts = None if position_ids is None else _starts(_array(position_ids), mask)
    if labels is None:
        targets = ids if starts is None else np.where(starts, IGNORED, ids)
        targets = targets if mask is None else np.where(mask != 0, targets, IGNORED)
    else:
        targets = _array(labels)
    made["labels"] = _placed(targets, places, rows * total, IGNORED)
    made["labels"][places[::width]] = IGNORED
    documents = np.zeros_like(drawn)
    if starts is not None:
        first = np.flatnonzero(starts)
        # A document begins behind the last token of the one before it, or with its row.
        begin = places[first - 1] + 1
        opens = first % width == 0
        begin[opens] = begins
        old = _array(position_ids).reshape(-1)
        offset = np.repeat(begin - old[first], np.diff(begin, append=rows * total))
        made["position_ids"] = (np.arange(rows * total) - offset).astype(old.dtype)
        if filled is not None:
            made["position_ids"][~filled] = 0
        documents = np.searchsorted(begin, at, side="right") - 1 - np.flatnonzero(opens)[:, None]
    found = {name: array.reshape(rows, total) for name, array in made.items()}
    if filled is not None:
        found["attention_mask"] = filled.reshape(rows, total).astype(_array(attention_mask).dtype)
    found["meta_documents"] = np.where(there, documents, -1)
    return {
        **{name: torch.from_numpy(array).to(input_ids.device) for name, array in found.items()},
        "meta_positions": positions,
    }


def _array(tensor: torch.Tensor | None) -> NDArray[Any]:
    return np.zeros(0) if tensor is None else tensor.cpu().numpy()


def _placed(tokens: NDArray[Any], places: NDArray[np.int64], size: int, filler: int) -> NDArray[Any]:
    """`tokens` at their places, and `filler` at all others."""
    made = np.full(size, filler, dtype=tokens.dtype)
    made[places] = tokens.reshape(-1)
    return made


def _starts(position_ids: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Whether a token is the first of its document; padding is of the last."""
    starts = np.ones(position_ids.shape, dtype=bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if mask is not None:
        starts[:, 1:] &= mask[:, 1:] != 0
    return starts


def document_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """The number in its row of the document that each token is in."""
    restarts = torch.zeros_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids.diff(dim=1) != 1
    return restarts.cumsum(1)


def _check_shapes(input_ids: torch.Tensor, positions: torch.Tensor, **others: torch.Tensor | None) -> None:
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must have the shape (batch, sequence), got {tuple(input_ids.shape)}")
    if positions.ndim != 2 or len(positions) != len(input_ids):
        raise ValueError(
            f"positions must have the shape (batch, meta) with a batch of {len(input_ids)}, got "
            f"{tuple(positions.shape)}"
        )
    width = input_ids.shape[1] + positions.shape[1]
    lowest, highest = (int(value) for value in torch.aminmax(positions)) if positions.numel() else (0, 0)
    if lowest < -1 or highest >= width:
        raise ValueError(
            f"positions must lie below {width}, the tokens and meta-tokens of a row, or be -1, got {lowest} to "
            f"{highest}"
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
            )


def _check_rising(drawn: NDArray[Any]) -> None:
    # Meta-attention takes the order in which they are given for their order in the row. Unsigned, -1 is the largest;
    # the same place twice is told later.
    places = drawn.view(np.uint64) if drawn.dtype == np.int64 else drawn.astype(np.uint64)
    falling = places[:, 1:] < places[:, :-1]
    if falling.any():
        row = int(falling.any(1).argmax())
        raise ValueError(
            f"positions must rise in each row, -1 behind the last, got {shown(drawn[row].tolist())}. Sort them, or "
            "draw them with draw_positions"
        )


def _filled(mask: NDArray[Any], counts: NDArray[np.int64], total: int, taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which places are no padding, after a look at the mask and at the meta-tokens."""
    lengths = mask.sum(1, dtype=np.int64)[:, None]
    if ((np.arange(mask.shape[1]) < lengths) != (mask != 0)).any():
        raise ValueError("attention_mask must be ones and then zeros in each row: padding goes behind the text")
    filled: NDArray[np.bool_] = (np.arange(total) < lengths + counts[:, None]).reshape(-1)
    if (taken & ~filled).any():
        raise ValueError(
            "positions lie in the padding of a row. Draw them for the rows' own lengths, attention_mask.sum(1)"
        )
    return filled
