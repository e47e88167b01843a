"""Streams as sources of a plan: rows that come as they come, read by a cursor that can be put back exactly.

A stream is anything that can be iterated again and again: a `datasets.IterableDataset`, a torch `IterableDataset`,
a list-like object without row numbers. Row number n of a source is the n-th row read, passes counted through. Every
process that needs rows reads the whole stream and keeps its own, so the order depends neither on workers nor on ranks.

A [`StreamMark`] says where a stream stands and how to get back there: the stream's own `state_dict` of a little
earlier, where it has one, and the hashes of the rows read since. A reader put back reads those rows again and compares
them. Where the state does not lead back (a shuffle buffer is not in it, say), the pass is read again from its start;
where that does not either, the stream is not the same one and training refuses to go on with other data.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_pretrain_ext import _host
from hf_pretrain_ext.plan.counter import derive_key
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import is_whole, shown

__all__ = ["StreamError", "StreamMark", "StreamReader", "first_rows", "row_digest"]

logger = logging.getLogger(__name__)

ANCHOR = 64
"""Rows between two looks at a stream's `state_dict`."""
COMPARED = 16
"""Rows that a reader put back compares, at least (fewer where the pass has only begun)."""


class StreamError(RuntimeError):
    """A stream that cannot be read on: empty, or not the one that it was."""


@dataclass(frozen=True)
class StreamMark:
    """Where a stream stands: `number` rows read in all, in pass `turn`, which began at row `turn_start`.

    `state` is the stream's own state at row `anchor` (None: to be counted to from the pass's start), and `digests` are
    the hashes of the last rows before `number`, those from `anchor` on where there is a state.
    """

    number: int = 0
    turn: int = 0
    turn_start: int = 0
    anchor: int = 0
    state: Any = None
    digests: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "digests": list(self.digests)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> StreamMark:
        mark = cls(**{**saved, "digests": tuple(saved["digests"])})
        numbers = (mark.number, mark.turn, mark.turn_start, mark.anchor)
        if not all(is_whole(number) and number >= 0 for number in numbers):
            raise ValueError(f"the mark of a stream holds {shown(numbers)}, which are no row numbers")
        return mark


def row_digest(row: Any) -> str:
    """A short hash of the beginning of a row: token ids where it has them, else its plain values."""
    if isinstance(row, Mapping) and "input_ids" in row:
        ids = row["input_ids"]
        content = repr((len(ids), np.asarray(ids[:64]).tolist())) if hasattr(ids, "__len__") else repr(ids)
    else:
        values = sorted(row.items()) if isinstance(row, Mapping) else [("", row)]
        content = repr([(k, v[:256] if isinstance(v, str) else v) for k, v in values if isinstance(v, _PLAIN)])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


_PLAIN = (str, int, float, bool)
_END = object()


class StreamReader:
    """Reads the rows of a stream by rising numbers, pass after pass.

    Args:
        stream: an iterable of rows that starts anew at every `iter`.
        name (`str`): of the source, for messages.
        seed (`int`): transforms of the stream that draw at random draw from a generator keyed by it and the row.
        mark ([`StreamMark`], *optional*): where to go on.

    Raises:
        [`StreamError`]: the stream is empty, or does not give the rows again that the mark names.

    Example:

    >>> reader = StreamReader([{"x": 0}, {"x": 1}, {"x": 2}], "numbers")
    >>> reader.rows([1, 4])  # row 4 is the second of the second pass
    [{'x': 1}, {'x': 1}]
    >>> mark = reader.mark()
    >>> StreamReader([{"x": 0}, {"x": 1}, {"x": 2}], "numbers", mark=mark).rows([5])
    [{'x': 2}]
    """

    def __init__(self, stream: Any, name: str, seed: int = 0, mark: StreamMark | None = None):
        self.stream = stream
        self.name = name
        self.key = derive_key(seed, "stream", name)
        self.wanted = mark or StreamMark()
        self._iterator: Iterator[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # An open iterator neither pickles nor belongs to another process: there the reader goes on from its mark.
        return {**self.__dict__, "wanted": self.mark(), "_iterator": None}

    def go_on_from(self, mark: StreamMark | None) -> None:
        """Takes another process's mark, unless this one reads the stream itself."""
        if self._iterator is None and mark is not None:
            self.wanted = mark

    def rows(self, numbers: Sequence[int]) -> list[Any]:
        """The rows `numbers` (rising); those in between are read and left out."""
        if not len(numbers):
            return []
        if self._iterator is not None and numbers[0] < self.number:
            self._iterator, self.wanted = None, StreamMark()
        if self._iterator is None:
            if numbers[0] < self.wanted.number:
                self.wanted = StreamMark()
            self._return_to(self.wanted)
        found = []
        for number in numbers:
            while self.number < number:
                self._next()
            found.append(self._next())
        return found

    def mark(self) -> StreamMark:
        """Where the reader stands now."""
        if self._iterator is None:
            return self.wanted
        # The state must lie a few rows back, so that going on from it can be checked.
        behind = [anchor for anchor in self._anchors if self.number - anchor[0] >= COMPARED]
        anchor, state = behind[-1] if behind else self._anchors[0]
        kept = self.number - (anchor if state is not None else max(self.turn_start, self.number - COMPARED))
        digests = list(self._digests)[len(self._digests) - kept :]
        return StreamMark(self.number, self.turn, self.turn_start, anchor, state, tuple(digests))

    # Internals

    def _return_to(self, mark: StreamMark) -> None:
        if mark.state is not None:
            try:
                self._open(mark, mark.anchor, mark.state)
                if self._leads_to(mark):
                    return
            except Exception as error:  # a stream may fail in any way on a state that is not its own
                logger.warning("the state of the stream %s cannot be loaded (%r)", self.name, error)
            logger.warning(
                "the state of the stream %s does not lead back to row %s (a shuffle buffer is not part of it): "
                "reading %s rows again",
                self.name,
                f"{mark.number:,}",
                f"{mark.number - mark.turn_start:,}",
            )
        self._open(mark, mark.turn_start, None)
        if not self._leads_to(mark):
            raise StreamError(
                f"the stream of {self.name} does not give the rows that it gave before: row {mark.number - 1:,} is "
                "another one. Training would go on with other data. Pass the stream that the run began with (the "
                "same files, shuffling and seed, and no transform that draws at random), or start a new run."
            )

    def _leads_to(self, mark: StreamMark) -> bool:
        try:
            while self.number < mark.number:
                self._next()
        except StreamError:
            return False
        if self.turn != mark.turn:
            return False
        compared = list(self._digests)[len(self._digests) - len(mark.digests) :]
        return compared == list(mark.digests)

    def _open(self, mark: StreamMark, number: int, state: Any) -> None:
        self.number, self.turn, self.turn_start = number, mark.turn, mark.turn_start
        self._digests: deque[str] = deque(maxlen=2 * ANCHOR + COMPARED)
        self._anchors: deque[tuple[int, Any]] = deque(maxlen=3)
        self._begin(state)
        self._anchors.append((number, state))

    def _begin(self, state: Any = None) -> None:
        """A new iterator over the stream: from `state`, or from the beginning of pass `turn`."""
        # A copy: datasets keeps the number of the pass in memory that all workers share.
        stream = self._opened = _private(self.stream)
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(self.turn)
        if state is not None:
            stream.load_state_dict(copy.deepcopy(state))
        with _host.whole_stream():
            self._iterator = _iterate(stream)
        self._stateful = hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")

    def _next(self) -> Any:
        if self._iterator is None:
            raise StreamError(f"the stream of {self.name} is not open")
        if self._stateful and self.number - self._anchors[-1][0] >= ANCHOR:
            self._anchors.append((self.number, self._state()))
        with rng_guard(derive_key(self.key, self.number) >> 1), _host.whole_stream():
            row = next(self._iterator, _END)
        if row is _END:
            if self.number == self.turn_start:
                raise StreamError(f"the stream of {self.name} holds no rows")
            self.turn, self.turn_start = self.turn + 1, self.number
            self._begin()
            self._digests.clear()
            self._anchors.clear()
            self._anchors.append((self.number, None))
            return self._next()
        self._digests.append(row_digest(row))
        self.number += 1
        return row

    def _state(self) -> Any:
        state = self._opened.state_dict()
        try:
            return json.loads(json.dumps(state))
        except (TypeError, ValueError):
            # Checkpoints hold JSON: what is not goes back by counting.
            self._stateful = False
            return None


def _private(stream: Any) -> Any:
    return copy.deepcopy(stream) if hasattr(stream, "set_epoch") else stream


def _iterate(stream: Any) -> Iterator[Any]:
    import datasets as hf_datasets

    if isinstance(stream, hf_datasets.IterableDataset):
        # Unlike its plain iteration, this does not split the shards over the workers of a DataLoader.
        return ({key: values[0] for key, values in batch.items()} for batch in stream.iter(batch_size=1))
    return iter(stream)


def first_rows(stream: Any, size: int) -> list[Any]:
    """The first `size` rows of a stream, leaving the stream as it was."""
    reader = StreamReader(stream, "stream")
    found: list[Any] = []
    try:
        while len(found) < size:
            found += reader.rows([len(found)])
            if reader.turn:
                return found[:-1]
    except StreamError:
        return found
    return found
