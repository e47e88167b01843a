"""What lies on disk: chunks of rows that never change, and `buffer.json`, which says which of them count.

`buffer.json` is replaced in one stroke after the chunks that it names are synced, so that a kill at any byte leaves
the state before a commit or the one after it. Rows at or above its bound lie in chunks until those are written anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_pretrain_ext.buffer.rows import row_bytes
from hf_pretrain_ext.buffer.sampling import NO_BOUND, priorities
from hf_pretrain_ext.values import is_whole, reason, shown

__all__ = ["MANIFEST", "NUMBER", "ReplayBuffer", "ReplayBufferError"]

FORMAT = 1
MANIFEST = "buffer.json"
NUMBER = "hf_pretrain_ext_number"
"""Column of the row numbers in chunks."""
PART = ".hpe-part"
TRIES = 100
"""How often a reader looks for a state whose files are all there, while a run goes on writing."""

_CHUNK = r"chunk-\d{8,}\.arrow"
_WRITTEN = re.compile(rf"(?:{_CHUNK}|{re.escape(MANIFEST)})(?:\.[0-9a-f]+)?{re.escape(PART)}")


class ReplayBufferError(ValueError):
    """A buffer that cannot be read, written or gone on with; the message says why and what can be done."""


@dataclass(frozen=True)
class Chunk:
    """One file of rows: its size and hash."""

    file: str
    rows: int
    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Stage:
    """One run that added rows, from number `start` on; `seen` rows, whether it came to its end, and which it was."""

    start: int
    seen: int = 0
    finished: bool = False
    run: str = ""


@dataclass(frozen=True)
class Manifest:
    """`buffer.json`. Every row numbered below `through` was looked at; `too_long` were refused."""

    seed: int
    max_bytes: int
    bound: int = NO_BOUND
    through: int = 0
    too_long: int = 0
    serial: int = 0
    stages: tuple[Stage, ...] = field(default=())
    chunks: tuple[Chunk, ...] = field(default=())

    def to_json(self) -> str:
        # 64-bit words as text: many readers of JSON hold numbers as doubles.
        return json.dumps({"format": FORMAT, **asdict(self), "bound": str(self.bound)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        held = json.loads(text)
        if held.pop("format") != FORMAT:
            raise ValueError(f"it has another format than {FORMAT}, which this version reads")
        stages = tuple(Stage(**stage) for stage in held.pop("stages"))
        chunks = tuple(Chunk(**chunk) for chunk in held.pop("chunks"))
        made = cls(**{**held, "bound": int(held["bound"])}, stages=stages, chunks=chunks)
        numbers = [made.max_bytes, made.bound, made.through, made.too_long, made.serial]
        numbers += [number for stage in stages for number in (stage.start, stage.seen)]
        numbers += [number for chunk in chunks for number in (chunk.rows, chunk.size)]
        if not is_whole(made.seed) or not all(is_whole(number) and number >= 0 for number in numbers):
            raise ValueError(f"it holds {shown(numbers)}, which are no counts")
        if any(os.path.basename(chunk.file) != chunk.file for chunk in chunks):
            raise ValueError("it names a file outside the buffer")
        return made


def read_manifest(folder: Path) -> Manifest | None:
    """None where nothing was ever committed."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReplayBufferError(
            f"{path} cannot be read ({reason(error, 200)}). It was damaged or is none of a replay buffer's: take it "
            "from a backup, or use another folder"
        ) from error


def schema_of(folder: Path, manifest: Manifest) -> pa.Schema | None:
    """Columns and types of the rows that a buffer holds; None while it holds none."""
    for chunk in manifest.chunks[:1]:
        try:
            with pa.OSFile(str(folder / chunk.file)) as file, pa.ipc.open_stream(file) as stream:
                return pa.schema([field for field in stream.schema if field.name != NUMBER])
        except (OSError, pa.ArrowException) as error:
            raise ReplayBufferError(f"{folder / chunk.file} cannot be read ({reason(error, 200)})") from error
    return None


def chunk_name(serial: int) -> str:
    return f"chunk-{serial:08d}.arrow"


def is_ours(name: str) -> bool:
    """Whether a file of that name, which no manifest names, is what a commit that was killed left behind."""
    return re.fullmatch(_CHUNK, name) is not None or _WRITTEN.fullmatch(name) is not None


def in_the_way(folder: Path) -> str | None:
    """Why a new buffer cannot be made in a folder: it holds files of others, hidden ones aside."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    # Before the first commit there is one chunk at most. More of them are a buffer that lost its manifest.
    others = [name for name in names if name[0] != "." and name != chunk_name(0) and not _WRITTEN.fullmatch(name)]
    if not others or MANIFEST in names:
        return None
    return f"{folder} holds {shown(others[0])} and no {MANIFEST}: a new buffer would lie among files not its own"


def write_file(path: Path, content: Any) -> None:
    """Under a temporary name of its own, synced and renamed: afterwards there is the old file or the whole new one."""
    part = path.with_name(f"{path.name}.{uuid4().hex}{PART}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: Any) -> str:
    import xxhash

    return xxhash.xxh3_128(content).hexdigest()


def read_chunk(path: Path) -> pa.Table:
    """The rows of a chunk, mapped into memory."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def map_chunk(folder: Path, chunk: Chunk) -> pa.Buffer:
    """
    The bytes of a chunk, which stay what they are when its file is removed.

    Raises:
        [`ReplayBufferError`]: there is no such file, or it has another size.
    """
    path = folder / chunk.file
    try:
        size = path.stat().st_size
        if size != chunk.size:
            raise _damaged(path, f"has {size} bytes instead of {chunk.size}")
        with pa.memory_map(str(path)) as source:
            return source.read_buffer()
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error


def check_hash(folder: Path, chunk: Chunk, content: pa.Buffer) -> None:
    """
    Raises:
        [`ReplayBufferError`]: the content of the file is not the one that was written.
    """
    if digest(content) != chunk.xxh3_128:
        raise _damaged(folder / chunk.file, "was altered (its hash differs)")


def _damaged(path: Path, fault: str) -> ReplayBufferError:
    return ReplayBufferError(
        f"{path} {fault}: the replay buffer is damaged. Take the folder from a backup, or use another one"
    )


def numbers_of(table: pa.Table) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *(part.to_numpy() for part in table[NUMBER].chunks)])


class ReplayBuffer:
    """
    The rows of a replay buffer as they were last committed, to be read; made by [`ReplayBuffer.open`].

    Attributes:
        folder (`Path`): where it lies.
        seen (`int`): rows that were added, over all stages, kept or not.
        nbytes (`int`): bytes of the rows kept.
        share (`float`): the share of all rows that was kept in expectation: its inverse is the weight that makes sums
            over kept rows unbiased, whatever their lengths.

    Example:

    >>> import tempfile
    >>> from hf_pretrain_ext.buffer import BufferWriter
    >>> folder = tempfile.mkdtemp()
    >>> with BufferWriter(folder, "1 MiB") as writer:
    ...     writer.add([{"input_ids": [number, 0]} for number in range(5)])
    >>> ReplayBuffer.open(folder).dataset()["input_ids"][4]
    [4, 0]
    """

    def __init__(self, folder: Path, manifest: Manifest, contents: Sequence[pa.Buffer]):
        self.folder, self.manifest = folder, manifest
        self._kept: list[NDArray[np.int64]] = []
        self._numbers: list[NDArray[np.int64]] = []
        self.nbytes = 0
        for content in contents:
            with pa.ipc.open_stream(content) as reader:
                table = reader.read_all()
            numbers = numbers_of(table)
            kept = np.flatnonzero(below(priorities(manifest.seed, numbers), manifest.bound))
            self._kept.append(kept)
            self._numbers.append(numbers[kept])
            self.nbytes += int(row_bytes(table)[kept].sum())

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> ReplayBuffer:
        """
        Opens the last committed state, also while a run adds rows.

        Args:
            folder (`str`): where it lies.
            verify (`bool`, *optional*, defaults to `True`): compare the hash of every file, which reads them all.

        Raises:
            [`ReplayBufferError`]: there is no buffer, or files are missing, cut short or altered.
        """
        where = Path(folder)
        for _ in range(TRIES):
            manifest = read_manifest(where)
            if manifest is None:
                raise ReplayBufferError(
                    f"{shown(os.fspath(folder))} holds no replay buffer (no {MANIFEST}). One is made by "
                    "BufferCallback or BufferWriter"
                )
            try:
                contents = [map_chunk(where, chunk) for chunk in manifest.chunks]
            except ReplayBufferError:
                if read_manifest(where) == manifest:
                    raise
                # A writer put others in the place of these files since the manifest was read.
                continue
            if verify:
                for chunk, content in zip(manifest.chunks, contents, strict=True):
                    check_hash(where, chunk, content)
            return cls(where, manifest, contents)
        raise ReplayBufferError(
            f"{where} is being written to, and changed {TRIES} times while it was opened. Open it again, or when the "
            "run that writes to it is over"
        )

    @property
    def seen(self) -> int:
        return sum(stage.seen for stage in self.manifest.stages)

    @property
    def share(self) -> float:
        return self.manifest.bound / NO_BOUND

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._kept)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers of the rows, in the order of `dataset()`: rising."""
        return np.sort(np.concatenate([np.zeros(0, np.int64), *self._numbers]))

    def __repr__(self) -> str:
        return f"ReplayBuffer({str(self.folder)!r}: {len(self):,} of {self.seen:,} rows, {self.nbytes / 1e6:.2f} MB)"

    def dataset(self, start: int = 0, stop: int | None = None) -> Any:
        """
        The rows as a map-style `datasets.Dataset`, mapped from disk, in the order in which they were seen.

        Args:
            start (`int`, *optional*, defaults to 0), stop (`int`, *optional*): rows numbered from `start` up to `stop`
                alone. Row number n of the buffer is sample n of its first stage; those of the next one follow.

        Raises:
            [`ReplayBufferError`]: there are none, or a run has replaced files since the buffer was opened.
        """
        from datasets import Dataset, concatenate_datasets

        if not len(self):
            raise ReplayBufferError(f"the replay buffer {self.folder} holds no rows yet")
        parts, found = [], []
        for chunk, kept, numbers in zip(self.manifest.chunks, self._kept, self._numbers, strict=True):
            wanted = (numbers >= start) & (numbers < (np.iinfo(np.int64).max if stop is None else stop))
            if wanted.any():
                try:
                    part = Dataset.from_file(str(self.folder / chunk.file))
                except FileNotFoundError as error:
                    raise ReplayBufferError(
                        f"{self.folder / chunk.file} is gone: a run that adds rows has put another in its place. "
                        "Open the buffer again; rows of its copy(folder) stay as they are"
                    ) from error
                parts.append(part.select(kept[wanted]))
                found.append(numbers[wanted])
        if not parts:
            end = "on" if stop is None else f"to {stop:,}"
            raise ReplayBufferError(f"the replay buffer {self.folder} holds no rows from number {start:,} {end}")
        order = np.argsort(np.concatenate(found))
        return concatenate_datasets(parts).select(order).remove_columns(NUMBER)

    def copy(self, folder: str | os.PathLike[str]) -> ReplayBuffer:
        """
        A copy that stays as it is while a run goes on adding rows here; by hard links where the disk has them.

        A stage that replays from a buffer and adds to it replays from a copy. Where `folder` holds one already, that
        one is opened: a resume finds the rows that its run began with.

        Several processes may ask for the same copy at once: one of them makes it. Where a run went on writing since
        this buffer was opened, and its files are gone, the copy is of what was committed last.

        Raises:
            [`ReplayBufferError`]: `folder` holds a buffer of another seed or other files, cannot be written, or is
                this one.
        """
        where = Path(folder)
        if where.resolve() == self.folder.resolve():
            raise ReplayBufferError(
                f"folder must be another one than the buffer's own, got {shown(os.fspath(folder))}"
            )
        there = read_manifest(where) or self._copy_to(where)
        if there.seed != self.manifest.seed:
            raise ReplayBufferError(
                f"{where} holds a copy of another buffer (seed {there.seed}, not {self.manifest.seed}): use "
                "another folder"
            )
        return ReplayBuffer.open(where)

    def _copy_to(self, where: Path) -> Manifest:
        """A copy made beside its place and put there in one stroke; returns the manifest of the one that is there."""
        home = where.resolve()
        part = home.with_name(f".{home.name}.{uuid4().hex}{PART}")
        try:
            part.mkdir(parents=True)
            manifest = self._fill(part)
            os.rename(part, home)
            sync_folder(home.parent)
        except OSError as error:
            faster = read_manifest(where)
            if faster is None:
                raise ReplayBufferError(
                    f"{self.folder} could not be copied to {where} ({type(error).__name__}: {error}). Pass a folder "
                    "that can be written, a new or an empty one"
                ) from error
            return faster
        finally:
            shutil.rmtree(part, ignore_errors=True)
        # Of copies that were killed; one that is under way finds this one in its place.
        for left in home.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(home.name)}\.[0-9a-f]{{32}}{re.escape(PART)}", left.name):
                shutil.rmtree(left, ignore_errors=True)
        return manifest

    def _fill(self, part: Path) -> Manifest:
        """Files and manifest of a copy, of the last state whose files are there."""
        manifest = self.manifest
        for _ in range(TRIES):
            try:
                for chunk in manifest.chunks:
                    _link(self.folder / chunk.file, part / chunk.file)
                break
            except FileNotFoundError as error:
                newer = read_manifest(self.folder) if part.is_dir() else None
                if newer is None:
                    raise
                if newer == manifest:
                    raise _damaged(Path(error.filename), "is missing") from error
                manifest = newer
        else:
            raise ReplayBufferError(
                f"{self.folder} is being written to, and changed {TRIES} times while it was copied. Copy it again, or "
                "when the run that writes to it is over"
            )
        named = {chunk.file for chunk in manifest.chunks}
        for path in part.iterdir():
            if path.name not in named:
                path.unlink()
        write_file(part / MANIFEST, manifest.to_json().encode())
        return manifest


def _link(source: Path, target: Path) -> None:
    """A hard link where the disk has them, else a copy."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        write_file(target, source.read_bytes())


def below(words: NDArray[np.uint64], bound: int) -> NDArray[np.bool_]:
    return np.ones(len(words), dtype=bool) if bound >= NO_BOUND else words < np.uint64(bound)
