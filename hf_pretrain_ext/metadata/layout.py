"""Which piece of which document goes into which block, settled on lengths alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["NONE", "Overflow", "Pieces", "SHORTEST", "Segments", "lay_out", "pieces_of"]

SHORTEST = 2
"""Tokens of a document that a piece of it holds at least: one to predict from, one to predict."""

NONE = -1
"""Stands for the number of a control token where there is none."""

Overflow = Literal["split", "discard"]

Segments = tuple[Sequence[int], Sequence[int]]
"""Of a document's body: where its segments start, and which control token each begins with, or NONE."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in the order of the blocks, int64 `(pieces,)`: tokens `start` to `start + length` of the
    body of document `document` are in block `block`, behind the control token `repeated` where it goes on."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    block: NDArray[np.int64]
    repeated: NDArray[np.int64]

    @property
    def blocks(self) -> int:
        return int(self.block[-1]) + 1 if len(self.block) else 0


def lay_out(
    heads: Iterable[int],
    bodies: Iterable[int],
    block_size: int,
    overflow: Overflow,
    segments: Iterable[Segments] | None = None,
) -> Pieces:
    """Where each document goes, by the tokens of its head (BOS, metadata) and of its body (text, EOS).

    A piece holds at least [`SHORTEST`] tokens of the body, the last of them no control token, so that there is a loss
    in every one. A piece that begins inside a segment repeats its control token.

    Example:

    >>> pieces = lay_out([2, 2], [9, 3], block_size=8, overflow="split")
    >>> pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), pieces.block.tolist()
    ([0, 0, 1], [0, 6, 0], [6, 3, 3], [0, 1, 2])
    >>> lay_out([1], [12], 8, "split", [([0, 9], [0, NONE])]).repeated.tolist()
    [-1, 0]
    """
    each: Iterable[tuple[int, int, Segments | None]]
    if segments is None:
        each = ((head, body, None) for head, body in zip(heads, bodies, strict=True))
    else:
        each = zip(heads, bodies, segments, strict=True)
    table = np.array(list(pieces_of(each, block_size, overflow)), dtype=np.int64)
    return Pieces(*(np.ascontiguousarray(column) for column in table.reshape(-1, 5).T))


def pieces_of(
    documents: Iterable[tuple[int, int, Segments | None]], block_size: int, overflow: Overflow
) -> Iterator[tuple[int, int, int, int, int]]:
    """The same one by one, from triples of head, body and segments: document, start, length, block, repeated."""
    discards = overflow == "discard"
    block, left = -1, 0
    for document, (head, rest, segments) in enumerate(documents):
        start, repeated = 0, NONE
        while rest:
            before = head + (repeated != NONE)
            room = left - before
            following = NONE
            if rest <= room:
                take = rest
            else:
                # One token alone would have nothing to be predicted from where there is no head.
                take = room - (rest - room < SHORTEST and not discards)
                if segments is not None and take > 0:
                    take, following = _seam(segments, start, take)
                if take < SHORTEST:
                    block, left = block + 1, block_size
                    continue
            yield document, start, take, block, repeated
            left -= before + take
            start, repeated = start + take, following
            rest = 0 if discards else rest - take


def _seam(segments: Segments, start: int, take: int) -> tuple[int, int]:
    """Tokens to take so that no control token comes last, and the one to repeat behind the cut."""
    starts, tokens = segments
    place = bisect_right(starts, start + take) - 1
    at, token = starts[place], tokens[place]
    if token == NONE or at == start + take:
        return take, NONE
    if at == start + take - 1:
        return take - 1, NONE
    return take, token
