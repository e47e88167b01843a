"""The one process that adds rows to a replay buffer."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_pretrain_ext.buffer.rows import row_bytes, to_table
from hf_pretrain_ext.buffer.sampling import LARGEST_SHARE, cut, parse_bytes, priorities
from hf_pretrain_ext.buffer.storage import (
    MANIFEST,
    NUMBER,
    Chunk,
    Manifest,
    ReplayBufferError,
    Stage,
    below,
    check_hash,
    chunk_name,
    digest,
    in_the_way,
    is_ours,
    map_chunk,
    numbers_of,
    read_chunk,
    read_manifest,
    sync_folder,
    write_file,
)
from hf_pretrain_ext.values import check_integers, shown

__all__ = ["BufferWriter", "Unfinished"]

Unfinished = Literal["error", "keep", "drop"]
"""What a new stage does about one before it that did not come to its end."""
PARTS = 24
"""Of `max_bytes`, 16 are for rows, 6 for rows that were dropped and lie in files yet, 1 for a chunk that is being
added and 1 for one that is being written anew."""
LARGEST_CHUNK = 64 << 20

_OPEN: weakref.WeakValueDictionary[str, BufferWriter] = weakref.WeakValueDictionary()


@dataclass
class _Index:
    """Random words and bytes of the rows of a chunk."""

    words: NDArray[np.uint64]
    sizes: NDArray[np.int64]


class BufferWriter:
    """
    Adds rows to a replay buffer, and keeps a uniform sample of them within `max_bytes` (`hf_pretrain_ext.buffer`).

    After a kill at any byte, all rows up to some number (`through`) were added and none of those after it. One process
    at a time writes; others may read. All files together stay within `max_bytes`: rows take up to two thirds of it,
    and the rest is room for rows that were dropped and not cleared away yet.

    Args:
        folder (`str`): made if absent; gone on with if it holds a buffer.
        max_bytes (`int` or `str`): bytes of all its files: an int, or `"500 MB"`, `"2 GiB"`. It may be another one
            than before: rows that were dropped do not come back, and the sample stays uniform.
        seed (`int`, *optional*, defaults to 0): of the random words.

    Raises:
        `ValueError`: a setting out of range.
        [`ReplayBufferError`]: the folder is damaged, of another seed, holds files of others and no buffer, or is
            being written to by another process.

    Example:

    >>> import tempfile
    >>> with BufferWriter(tempfile.mkdtemp(), "1 MiB") as writer:
    ...     for _ in range(3):
    ...         writer.add([{"input_ids": list(range(100))}] * 1000)
    ...     writer.seen, writer.rows < 1000
    (3000, True)
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int | str, seed: int = 0):
        limit = parse_bytes(max_bytes)
        check_integers(seed=(seed, -(1 << 63), (1 << 63) - 1, False))
        self.folder = Path(folder)
        if (fault := in_the_way(self.folder)) is not None:
            raise ReplayBufferError(f"{fault}. Pass another folder, a new or an empty one")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._busy = threading.RLock()
        self._lock: int | None = None
        # One that this process left open: of a run that was interrupted, say.
        earlier = _OPEN.get(key := str(self.folder.resolve()))
        if earlier is not None:
            earlier.close()
        self._lock = _lock(self.folder)
        _OPEN[key] = self
        try:
            known = read_manifest(self.folder)
            if known is not None and known.seed != seed:
                raise ReplayBufferError(
                    f"{self.folder} holds a replay buffer of seed {known.seed}, got seed={seed}: pass "
                    f"seed={known.seed}, or use another folder"
                )
            self.manifest = replace(known or Manifest(seed, limit), max_bytes=limit)
            self._clear()
            self._index: dict[str, _Index] = {}
            self._schema: pa.Schema | None = None
            for chunk in self.manifest.chunks:
                check_hash(self.folder, chunk, map_chunk(self.folder, chunk))
                self._take_in(chunk, read_chunk(self.folder / chunk.file))
            self._shrink()
        except BaseException:
            self.close()
            raise

    closed = False

    def __enter__(self) -> BufferWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process write. Whatever was added is on disk already."""
        with self._busy:
            self.closed = True
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _check_open(self) -> None:
        if self.closed:
            raise ReplayBufferError(f"this writer of the replay buffer {self.folder} was closed: make another")

    def _clear(self) -> None:
        """Removes what a commit that was killed left behind."""
        named = {chunk.file for chunk in self.manifest.chunks}
        for path in self.folder.iterdir():
            if is_ours(path.name) and path.name not in named:
                path.unlink()

    def _shrink(self) -> None:
        """Drops rows where `max_bytes` is less than before."""
        held = list(self._index.values())
        if held:
            words, sizes = (np.concatenate([getattr(index, of) for index in held]) for of in ("words", "sizes"))
            kept = below(words, self.bound)
            bound = cut(words[kept], sizes[kept], self.limit, self.bound)
            if bound != self.bound:
                self._commit(replace(self.manifest, bound=bound))
                self._make_room()

    # What it holds

    @property
    def limit(self) -> int:
        """Bytes that rows may take."""
        return rows_bytes(self.manifest.max_bytes)

    @property
    def chunk_bytes(self) -> int:
        return chunk_bytes(self.manifest.max_bytes)

    @property
    def bound(self) -> int:
        """Rows whose random word is no lower are not kept."""
        return self.manifest.bound

    @property
    def through(self) -> int:
        """Rows numbered below were added; from here on they are new."""
        return self.manifest.through

    @property
    def seen(self) -> int:
        return sum(stage.seen for stage in self.manifest.stages)

    @property
    def rows(self) -> int:
        return sum(int(below(index.words, self.bound).sum()) for index in self._index.values())

    # Stages

    def begin_stage(self, unfinished: Unfinished = "error", run: str = "") -> int:
        """
        Begins a run whose rows are new, and returns the number of its first row.

        Args:
            unfinished (`str`, *optional*, defaults to `"error"`): where the last stage did not come to its end:
                refuse; `"keep"` its rows, where training goes on from its weights; or `"drop"` them, where it does
                not. What remains is uniform over the stages that count, either way.
            run (`str`, *optional*): names a run that always has the same rows. The last stage, unfinished and of that
                name, is gone on with: rows that it added already are left out.

        Raises:
            [`ReplayBufferError`]: the last stage is unfinished.
        """
        if unfinished not in get_args(Unfinished):
            raise ValueError(f"unfinished must be one of {get_args(Unfinished)}, got {shown(unfinished)}")
        stages = self.manifest.stages
        if stages and not stages[-1].finished:
            last = stages[-1]
            if run and last.run == run:
                return last.start
            if unfinished == "error" and last.seen:
                raise ReplayBufferError(
                    f"the last run that added rows to {self.folder} did not come to its end ({last.seen:,} rows, from "
                    f"number {last.start:,} on). Resume it with resume_from_checkpoint; or pass unfinished='keep' "
                    "where this run goes on from its weights, unfinished='drop' where its rows are not to count"
                )
            if unfinished == "drop":
                self._drop_stage(last)
            elif not last.seen:
                self._commit(replace(self.manifest, stages=stages[:-1]))
            else:
                self._commit(replace(self.manifest, stages=(*stages[:-1], replace(last, finished=True))))
        self._commit(replace(self.manifest, stages=(*self.manifest.stages, Stage(self.through, run=run))))
        return self.through

    def _drop_stage(self, stage: Stage) -> None:
        kept: list[Chunk] = []
        dropped: list[Chunk] = []
        for chunk in self.manifest.chunks:
            table = read_chunk(self.folder / chunk.file)
            numbers = numbers_of(table)
            if (numbers >= stage.start).any():
                dropped.append(chunk)
                rest = table.filter(pa.array(numbers < stage.start))
                kept += [self._write(rest)] if rest.num_rows else []
            else:
                kept.append(chunk)
        earlier = self.manifest.stages[:-1]
        # `through` stays: those numbers are used up.
        self._commit(replace(self.manifest, stages=earlier, chunks=tuple(kept)))
        self._remove(dropped)

    def resume_stage(self, start: int, through: int) -> None:
        """
        Goes on with the stage that began at `start`, of a run resumed where it had added rows up to `through`.

        Rows that were added after that point are the ones that the run will add again: they are left out then.

        Raises:
            [`ReplayBufferError`]: the buffer lags behind, or another stage began since.
        """
        stages = self.manifest.stages
        if not stages or stages[-1].start != start:
            found = f"its last stage began at row {stages[-1].start:,}" if stages else "it holds no rows"
            raise ReplayBufferError(
                f"{self.folder} is not the replay buffer of the run to be resumed, whose stage began at row "
                f"{start:,}: {found}. Pass the folder that the run wrote to, or start a new run"
            )
        if self.through < through:
            raise ReplayBufferError(
                f"{self.folder} holds rows up to number {self.through:,}, but the checkpoint was made at {through:,}: "
                "the rows between are lost. Resume from an earlier checkpoint, or take the folder from a backup"
            )

    def finish(self) -> None:
        """Says that the stage came to its end."""
        stages = self.manifest.stages
        if stages and not stages[-1].finished:
            self._commit(replace(self.manifest, stages=(*stages[:-1], replace(stages[-1], finished=True))))

    # Rows

    def add(
        self,
        rows: Sequence[Mapping[str, Any]] | pa.Table,
        numbers: Sequence[int] | NDArray[np.integer] | None = None,
        *,
        through: int | None = None,
        seen: int | None = None,
    ) -> None:
        """
        Adds rows; those whose numbers lie below `through` already are left out. Best a few thousand at a time.

        Args:
            rows (`Sequence[Mapping]` or `pyarrow.Table`): all of one set of columns.
            numbers (`Sequence[int]`, *optional*): their numbers, no two alike; from `through` on if left out.
            through (`int`, *optional*): all rows numbered below it have been added, with these; defaults to one above
                the largest number.
            seen (`int`, *optional*): how many rows the stage has had, with these, where some were left out before
                because their words lie above the bound.

        Raises:
            [`ReplayBufferError`]: columns or types that differ from what the buffer holds, or files that cannot be
                written.
        """
        first = self.through
        given = np.arange(first, first + len(rows)) if numbers is None else np.asarray(numbers, dtype=np.int64)
        if given.shape != (len(rows),):
            raise ValueError(f"numbers must hold one number for each of the {len(rows)} rows, got {given.shape}")
        with self._busy:
            self._check_open()
            places = np.flatnonzero(given >= first)
            places = places[np.argsort(given[places], kind="stable")]
            given = given[places]
            words = priorities(self.manifest.seed, given)
            wanted = np.flatnonzero(below(words, self.bound))
            if len(wanted):
                table = self._as_table(rows, places[wanted], given[wanted])
                sizes = row_bytes(table)
                # Each part is a commit of its own: in the order of their numbers, files within their share of room.
                parts = np.cumsum(sizes) // self.chunk_bytes
                for begin, end in pairwise([0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(wanted)]):
                    part = slice(begin, end)
                    stop = len(given) if end == len(wanted) else int(wanted[end])
                    state = self._counted(int(given[stop - 1]) + 1, given[:stop] >= self.through)
                    self._merge(state, table.slice(begin, end - begin), words[wanted[part]], sizes[part])
            state = self._counted(0, given >= self.through)
            last = state.stages[-1]
            last = replace(last, seen=max(last.seen, seen or 0))
            end = max(through or 0, int(given[-1]) + 1 if len(given) else 0, first)
            state = replace(state, stages=(*state.stages[:-1], last), through=end)
            if state != self.manifest:
                self._commit(state)

    def _counted(self, through: int, new: NDArray[np.bool_]) -> Manifest:
        """What the manifest says once `new` rows were added, up to number `through`."""
        stages = self.manifest.stages or (Stage(0),)
        stages = (*stages[:-1], replace(stages[-1], seen=stages[-1].seen + int(new.sum())))
        return replace(self.manifest, stages=stages, through=max(through, self.through))

    def _as_table(self, rows: Any, chosen: NDArray[np.intp], numbers: NDArray[np.int64]) -> pa.Table:
        try:
            if isinstance(rows, pa.Table):
                table = rows.take(pa.array(chosen))
                if self._schema is not None:
                    if set(table.column_names) != set(self._schema.names):
                        raise ValueError(f"they have the columns {table.column_names}, others {self._schema.names}")
                    table = table.select(self._schema.names).cast(self._schema)
            else:
                table = to_table([rows[int(place)] for place in chosen], self._schema)
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise ReplayBufferError(f"rows cannot be added to the replay buffer {self.folder}: {error}") from error
        if self._schema is None:
            self._schema = table.schema
        return table.append_column(NUMBER, pa.array(numbers))

    def _merge(self, state: Manifest, table: pa.Table, words: NDArray[np.uint64], sizes: NDArray[np.int64]) -> None:
        """Adds up to a chunk of rows, and commits."""
        short = sizes <= self.limit // LARGEST_SHARE
        held = list(self._index.values())
        bound = cut(
            np.concatenate([*(index.words for index in held), words[short]]),
            np.concatenate([*(index.sizes for index in held), sizes[short]]),
            self.limit,
            state.bound,
        )
        kept = short & below(words, bound)
        state = replace(state, bound=bound, too_long=state.too_long + int((~short).sum()))
        if not kept.any():
            self._commit(state)
        else:
            table, old = table.filter(pa.array(kept)), []
            if state.chunks:
                last = state.chunks[-1]
                if self._live_bytes(last, bound) + int(sizes[kept].sum()) <= self.chunk_bytes:
                    old, table = [last], pa.concat_tables([self._survivors(last, bound), table])
            self._put(state, table, old)
        self._make_room()

    def _put(self, state: Manifest, table: pa.Table, old: list[Chunk]) -> None:
        """Writes a chunk in the place of others, and commits."""
        chunk = self._write(table)
        self._commit(replace(state, chunks=(*(c for c in state.chunks if c not in old), chunk)))
        self._remove(old)

    def _make_room(self) -> None:
        """Writes chunks anew while rows that were dropped take more than their share."""
        while True:
            chunks = self.manifest.chunks
            dead = {chunk: chunk.size - self._live_bytes(chunk, self.bound) for chunk in chunks}
            room = self.manifest.max_bytes * 6 // PARTS
            if sum(dead.values()) <= room:
                return
            worst = sorted(chunks, key=lambda chunk: dead[chunk] / chunk.size, reverse=True)
            # Survivors of several fill one chunk.
            chosen, total = [worst[0]], self._live_bytes(worst[0], self.bound)
            for chunk in worst[1:]:
                if total + self._live_bytes(chunk, self.bound) > self.chunk_bytes:
                    break
                chosen.append(chunk)
                total += self._live_bytes(chunk, self.bound)
            left = [table for chunk in chosen if (table := self._survivors(chunk, self.bound)).num_rows]
            if left:
                self._put(self.manifest, pa.concat_tables(left), chosen)
            else:
                self._commit(replace(self.manifest, chunks=tuple(c for c in chunks if c not in chosen)))
                self._remove(chosen)
            if sum(chunk.size - self._live_bytes(chunk, self.bound) for chunk in self.manifest.chunks) >= sum(
                dead.values()
            ):
                return

    def _live_bytes(self, chunk: Chunk, bound: int) -> int:
        index = self._index[chunk.file]
        return int(index.sizes[below(index.words, bound)].sum())

    def _survivors(self, chunk: Chunk, bound: int) -> pa.Table:
        mask = below(self._index[chunk.file].words, bound)
        return read_chunk(self.folder / chunk.file).filter(pa.array(mask))

    # Files

    def _take_in(self, chunk: Chunk, table: pa.Table) -> None:
        words = priorities(self.manifest.seed, numbers_of(table))
        self._index[chunk.file] = _Index(words, row_bytes(table))
        self._schema = self._schema or table.drop_columns([NUMBER]).schema

    def _write(self, table: pa.Table) -> Chunk:
        """A chunk on disk that no manifest names yet."""
        serial = self.manifest.serial
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        content = sink.getvalue()
        chunk = Chunk(chunk_name(serial), table.num_rows, content.size, digest(content))
        with self._writing():
            write_file(self.folder / chunk.file, content)
        self.manifest = replace(self.manifest, serial=serial + 1)
        self._take_in(chunk, table)
        return chunk

    def _commit(self, manifest: Manifest) -> None:
        manifest = replace(manifest, serial=self.manifest.serial)
        try:
            with self._writing():
                write_file(self.folder / MANIFEST, manifest.to_json().encode())
        except ReplayBufferError:
            there = read_manifest(self.folder) == manifest
            if there:
                # Renamed, and not synced: readers find it from here on, and after a crash perhaps the one before.
                self.manifest = manifest
            for name in set(self._index) - {chunk.file for chunk in self.manifest.chunks}:
                del self._index[name]
                if not there:
                    with suppress(OSError):
                        (self.folder / name).unlink(missing_ok=True)
            raise
        self.manifest = manifest

    def _remove(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            (self.folder / chunk.file).unlink(missing_ok=True)
            self._index.pop(chunk.file, None)
        if chunks:
            sync_folder(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReplayBufferError(
                f"the replay buffer {self.folder} could not be written ({type(error).__name__}: {error}). What was "
                "committed before is intact. Make room there, or pass a folder that can be written"
            ) from error


def rows_bytes(max_bytes: int) -> int:
    """Bytes that rows may take."""
    return max_bytes * 16 // PARTS


def chunk_bytes(max_bytes: int) -> int:
    """Bytes of rows in one file."""
    return min(max_bytes // PARTS, LARGEST_CHUNK)


def _lock(folder: Path) -> int | None:
    """Held until it is closed, or the process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Not flock: data workers that outlive a killed process would go on holding it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ReplayBufferError(
            f"another process adds rows to the replay buffer {folder}: one at a time, or another folder"
        ) from error
    return handle
