"""Replay buffer: what is kept against a reference written out, its uniformity, its files under kills, its limits."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_pretrain_ext.buffer import (
    BufferWriter,
    ReplayBuffer,
    ReplayBufferError,
    cut,
    parse_bytes,
    priorities,
    row_bytes,
    storage,
    to_table,
)
from hf_pretrain_ext.buffer.sampling import NO_BOUND
from hf_pretrain_ext.plan.counter import derive_key

MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves to the disk what was written, synced or not; syncing takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def word(seed: int, number: int) -> int:
    """SplitMix64 written out, in Python's integers."""
    z = (derive_key(seed, "replay buffer") + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def reference(seed: int, sizes: list[int], limit: int) -> list[int]:
    """The rule, one row after the other: a sorted list, cut where it exceeds the limit."""
    kept: list[tuple[int, int, int]] = []
    bound = 1 << 64
    for number, size in enumerate(sizes):
        if word(seed, number) < bound:
            bisect.insort(kept, (word(seed, number), number, size))
        while sum(size for _, _, size in kept) > limit:
            bound = kept.pop()[0]
    return sorted(number for _, number, _ in kept)


def row(number: int, length: int) -> dict[str, list[int]]:
    return {"input_ids": [number, *range(length - 1)]}


def bytes_of(length: int) -> int:
    """Of int64 ids, the list's offset, and the row's number."""
    return 8 * length + 4 + 8


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# The sample


def test_words_are_those_of_the_generator_written_out() -> None:
    assert priorities(7, np.arange(50)).tolist() == [word(7, number) for number in range(50)]


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_that_of_the_reference_in_any_batches_and_order(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 40) for _ in range(300)]
    numbers = list(range(300))
    if seed % 2:
        draw.shuffle(numbers)
    words, all_sizes = priorities(seed, np.arange(300)), np.array(sizes)
    bound, kept = NO_BOUND, np.zeros(0, dtype=int)
    while numbers:
        batch = np.array([numbers.pop() for _ in range(min(draw.randint(1, 60), len(numbers)))])
        kept = np.concatenate([kept, batch[[int(w) < bound for w in words[batch]]]])
        bound = cut(words[kept], all_sizes[kept], 700, bound)
        kept = kept[[int(w) < bound for w in words[kept]]]
    assert sorted(kept.tolist()) == reference(seed, sizes, 700)


def test_every_set_of_equal_rows_is_as_likely_as_any_other() -> None:
    """9 rows of which 3 fit: the 84 sets over 30,000 seeds, by χ² (83 degrees of freedom: 99.9 % lie below 132)."""
    found: dict[tuple[int, ...], int] = {}
    runs, sizes = 30_000, np.full(9, 5)
    for seed in range(runs):
        words = priorities(seed, np.arange(9))
        chosen = tuple(np.flatnonzero([int(w) < cut(words, sizes, 17) for w in words]).tolist())
        found[chosen] = found.get(chosen, 0) + 1
    assert len(found) == 84 and all(len(chosen) == 3 for chosen in found)
    expected = runs / 84
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 132


def test_inclusion_of_unequal_rows_is_what_is_documented() -> None:
    """Probabilities from all 5,040 orders of 7 rows, against 20,000 seeds: each within four standard errors."""
    sizes, limit, runs = [1, 2, 3, 4, 5, 6, 7], 13, 20_000
    exact = np.zeros(7)
    for order in itertools.permutations(range(7)):
        total = 0
        for number in order:
            total += sizes[number]
            if total > limit:
                break
            exact[number] += 1 / 5040
    seen, weighed = np.zeros(7), 0.0
    for seed in range(runs):
        words = priorities(seed, np.arange(7))
        bound = cut(words, np.array(sizes), limit)
        kept = np.array([int(w) < bound for w in words])
        seen += kept
        # Kept bytes over the share: the bytes of all rows, in expectation.
        weighed += (kept * sizes).sum() / (bound / NO_BOUND) / runs
    errors = np.sqrt(exact * (1 - exact) / runs)
    assert (np.abs(seen / runs - exact) < 4 * errors).all()
    assert exact[0] > exact[-1]
    assert weighed == pytest.approx(sum(sizes), rel=0.05)


def test_long_rows_are_short_by_their_share_of_the_limit() -> None:
    """The documented factor 1 − b/limit, for the longest rows that are taken beside short ones."""
    limit, sizes = 6400, np.array([100] * 40 + [10] * 1600)
    kept = np.zeros(len(sizes))
    for seed in range(1500):
        words = priorities(seed, np.arange(len(sizes)))
        kept += words < np.uint64(cut(words, sizes, limit))
    ratio = kept[:40].mean() / kept[40:].mean()
    assert ratio == pytest.approx(1 - 100 / limit, abs=0.02)


# The files


@pytest.mark.parametrize("seed", range(4))
def test_what_is_on_disk_is_the_reference(seed: int, tmp_path: Path) -> None:
    """Rows of 1 to 600 tokens, far more than fit, in batches; closed and opened again on the way."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 600) for _ in range(1200)]
    number = 0
    while number < len(lengths):
        with BufferWriter(tmp_path, 1 << 20, seed) as writer:
            for _ in range(3):
                size = draw.randint(1, 150)
                batch = range(number, min(number + size, len(lengths)))
                writer.add([row(n, lengths[n]) for n in batch])
                number = batch.stop
                assert disk(tmp_path) <= 1 << 20
    found = ReplayBuffer.open(tmp_path)
    limit = (1 << 20) * 2 // 3
    expected = reference(seed, [bytes_of(length) for length in lengths], limit)
    assert found.numbers.tolist() == expected and 100 < len(expected) < 400
    assert found.seen == 1200 and found.nbytes == sum(bytes_of(lengths[n]) for n in expected) <= limit
    assert found.dataset()["input_ids"][:] == [row(n, lengths[n])["input_ids"] for n in expected]
    assert found.share == pytest.approx(len(expected) / 1200, rel=0.2)


def test_files_stay_within_their_bytes_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a commit, with one large addition, and with many small ones."""
    largest, real = 0, storage.write_file

    def watched(path: Path, content: Any) -> None:
        nonlocal largest
        real(path, content)
        largest = max(largest, disk(tmp_path))

    monkeypatch.setattr("hf_pretrain_ext.buffer.writer.write_file", watched)
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(n, 200) for n in range(3000)])
        for start in range(3000, 9000, 7):
            writer.add([row(n, 50 + n % 400) for n in range(start, start + 7)])
        assert writer.manifest.too_long == 0 and len(writer.manifest.chunks) < 60
    assert 0.8 * (1 << 20) < largest <= 1 << 20
    assert ReplayBuffer.open(tmp_path).nbytes > 0.95 * (1 << 20) * 2 / 3


class Killed(Exception):
    pass


def failing_after(operations: int, cut_at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies in file operation number `operations`: a write then stops after a part of its bytes."""
    done = itertools.count()
    real_open, real_replace, real_unlink = Path.open, os.replace, Path.unlink

    def dies() -> bool:
        return next(done) == operations

    class File:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, content: Any) -> None:
            if dies():
                self.file.write(memoryview(content)[: int(len(memoryview(content)) * cut_at)])
                self.file.flush()
                raise Killed
            self.file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        return File(file) if mode == "wb" else file

    def replaced(*args: Any) -> None:
        if dies():
            raise Killed
        real_replace(*args)

    def unlinked(path: Path, *args: Any, **kwargs: Any) -> None:
        if dies():
            raise Killed
        real_unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)


LENGTHS = [100 + 37 * n % 1100 for n in range(150)]


def fill(folder: Path) -> None:
    """Adds what is not there yet, so that a killed run goes on where it was."""
    with BufferWriter(folder, 1 << 20, seed=5) as writer:
        while writer.through < len(LENGTHS):
            start = writer.through
            writer.add([row(n, LENGTHS[n]) for n in range(start, min(start + 25, len(LENGTHS)))])


def test_killed_in_any_file_operation_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """A write is cut off before its first byte, in the middle, and after its last."""
    fill(tmp_path / "whole")
    whole = ReplayBuffer.open(tmp_path / "whole")
    rows, died = whole.dataset()["input_ids"][:], 0
    for operations in range(10_000):
        folder = tmp_path / f"at-{operations}"
        with pytest.MonkeyPatch.context() as patch:
            failing_after(operations, operations % 3 / 2, patch)
            try:
                fill(folder)
            except Killed:
                died += 1
            else:
                break
        if (folder / storage.MANIFEST).exists():
            # What was committed: the sample of all rows up to a number.
            there = ReplayBuffer.open(folder)
            through = there.manifest.through
            sizes = [bytes_of(length) for length in LENGTHS[:through]]
            assert there.numbers.tolist() == reference(5, sizes, (1 << 20) * 2 // 3)
        fill(folder)
        ended = ReplayBuffer.open(folder)
        assert ended.numbers.tolist() == whole.numbers.tolist() and ended.seen == whole.seen
        assert operations % 10 or ended.dataset()["input_ids"][:] == rows
        assert {p.name for p in folder.iterdir()} == {
            ".lock",
            storage.MANIFEST,
            *(c.file for c in ended.manifest.chunks),
        }
    assert died > 40


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_buffer
print("ready", flush=True)
test_buffer.LENGTHS = test_buffer.LENGTHS * 200
test_buffer.fill(Path({str(tmp_path)!r}))
"""
    draw, kills = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        if (tmp_path / storage.MANIFEST).exists():
            there = ReplayBuffer.open(tmp_path)
            sizes = [bytes_of(length) for length in (LENGTHS * 200)[: there.manifest.through]]
            assert there.numbers.tolist() == reference(5, sizes, (1 << 20) * 2 // 3)
    assert kills >= 1


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes instead of"),
        (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), "was altered"),
    ],
)
def test_damaged_chunks_are_named(harm: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    fill(tmp_path)
    harm(sorted(tmp_path.glob("*.arrow"))[0])
    with pytest.raises(ReplayBufferError, match=text):
        ReplayBuffer.open(tmp_path)
    with pytest.raises(ReplayBufferError, match=text):
        BufferWriter(tmp_path, 1 << 20, seed=5)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b'{"format": 9}', None],
)
def test_a_damaged_manifest_is_named(content: bytes | None, tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / storage.MANIFEST
    if content is None:
        held = json.loads(path.read_text())
        held["chunks"][0]["file"] = "../elsewhere.arrow"
        content = json.dumps(held).encode()
    path.write_bytes(content)
    with pytest.raises(ReplayBufferError, match=r"buffer.json cannot be read"):
        ReplayBuffer.open(tmp_path)


def test_one_process_writes_and_others_read(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(0, 5)])
        script = f"from hf_pretrain_ext.buffer import *; print(len(ReplayBuffer.open({str(tmp_path)!r}))); "
        script += f"BufferWriter({str(tmp_path)!r}, 1 << 20)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout == "1\n" and "another process adds rows" in done.stderr
        # In one process, the newer takes over.
        with BufferWriter(tmp_path, 1 << 20) as newer:
            newer.add([row(1, 5)])
            with pytest.raises(ReplayBufferError, match="was closed"):
                writer.add([row(2, 5)])


def test_stages_are_one_sample(tmp_path: Path) -> None:
    """Two runs over one buffer: the sample of the rows of both, numbered on."""
    with BufferWriter(tmp_path, 1 << 20) as writer:
        for stage in range(2):
            start = writer.begin_stage()
            assert start == 600 * stage
            writer.add([row(n, 300) for n in range(start, start + 600)])
            writer.finish()
    found = ReplayBuffer.open(tmp_path)
    assert found.numbers.tolist() == reference(0, [bytes_of(300)] * 1200, (1 << 20) * 2 // 3)
    assert [stage.seen for stage in found.manifest.stages] == [600, 600]


@pytest.mark.parametrize("unfinished", ["keep", "drop"])
def test_an_unfinished_stage_is_asked_about(unfinished: Any, tmp_path: Path) -> None:
    with BufferWriter(tmp_path, 1 << 20) as writer:
        for count in (500, 400):
            start = writer.begin_stage()
            writer.add([row(n, 300) for n in range(start, start + count)])
            if count == 500:
                writer.finish()
    with BufferWriter(tmp_path, 1 << 20) as writer:
        with pytest.raises(ReplayBufferError, match=r"400 rows, from number 500 on.*resume_from_checkpoint"):
            writer.begin_stage()
        assert writer.begin_stage(unfinished) == 900
    found = ReplayBuffer.open(tmp_path)
    both = reference(0, [bytes_of(300)] * 900, (1 << 20) * 2 // 3)
    assert found.numbers.tolist() == (both if unfinished == "keep" else [n for n in both if n < 500])
    assert found.seen == (900 if unfinished == "keep" else 500)


def test_a_resumed_stage_takes_nothing_twice(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, 1 << 20) as writer:
        start = writer.begin_stage()
        writer.add([row(n, 300) for n in range(400)])
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.resume_stage(start, 250)
        writer.add([row(n, 300) for n in range(250, 700)], range(250, 700))
        assert writer.seen == 700
        with pytest.raises(ReplayBufferError, match="is not the replay buffer of the run"):
            writer.resume_stage(3, 250)
        with pytest.raises(ReplayBufferError, match="the rows between are lost"):
            writer.resume_stage(start, 701)
    expected = reference(0, [bytes_of(300)] * 700, (1 << 20) * 2 // 3)
    assert ReplayBuffer.open(tmp_path).numbers.tolist() == expected


def test_a_copy_stays_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "buffer")
    copy = ReplayBuffer.open(tmp_path / "buffer").copy(tmp_path / "copy")
    before = copy.dataset()["input_ids"][:]
    with BufferWriter(tmp_path / "buffer", 1 << 20, seed=5) as writer:
        writer.add([row(n, 400) for n in range(150, 2000)])
    assert ReplayBuffer.open(tmp_path / "buffer").numbers.tolist() != copy.numbers.tolist()
    again = ReplayBuffer.open(tmp_path / "buffer").copy(tmp_path / "copy")
    assert again.dataset()["input_ids"][:] == before == ReplayBuffer.open(tmp_path / "copy").dataset()["input_ids"][:]
    with pytest.raises(ReplayBufferError, match="another one than the buffer's own"):
        copy.copy(tmp_path / "copy")
    with BufferWriter(tmp_path / "other", 1 << 20, seed=6) as other:
        other.add([row(0, 3)])
    with pytest.raises(ReplayBufferError, match="a copy of another buffer"):
        ReplayBuffer.open(tmp_path / "other").copy(tmp_path / "copy")


def test_several_processes_make_one_copy(tmp_path: Path) -> None:
    """Three at once, eight times: each has the rows, from one copy, and nothing is left beside it."""
    fill(tmp_path / "buffer")
    script = f"""
import sys
from hf_pretrain_ext.buffer import ReplayBuffer
buffer = ReplayBuffer.open({str(tmp_path / "buffer")!r})
for number in range(8):
    sys.stdin.read(1)
    print(len(buffer.copy(f"{tmp_path}/copies/{{number}}").dataset()), flush=True)
"""
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    rows = len(ReplayBuffer.open(tmp_path / "buffer"))
    for _ in range(8):
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("x")
            rank.stdin.flush()
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == f"{rows}\n"
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == [str(number) for number in range(8)]


@pytest.mark.parametrize("linked", [True, False])
def test_who_is_slower_opens_the_copy_of_who_was_faster(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts its copy in place after the first file, the middle one, the last."""
    fill(tmp_path / "buffer")
    buffer = ReplayBuffer.open(tmp_path / "buffer")
    real = storage._link
    for number in (0, len(buffer.manifest.chunks) // 2, len(buffer.manifest.chunks) - 1):
        done = itertools.count()

        def link(source: Path, target: Path, number: int = number, done: Any = done) -> None:
            real(source, target)
            if next(done) == number:
                buffer.copy(tmp_path / f"copy-{number}")

        monkeypatch.setattr(storage, "_link", link)
        if not linked:
            monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "no hard links"))
        assert buffer.copy(tmp_path / f"copy-{number}").dataset()[:] == buffer.dataset()[:]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_copy_of_a_buffer_that_changes_meanwhile(tmp_path: Path) -> None:
    """Its files are gone: the copy is of what was committed since. Lost altogether, they are named."""
    fill(tmp_path / "buffer")
    stale = ReplayBuffer.open(tmp_path / "buffer")
    with BufferWriter(tmp_path / "buffer", 1 << 20, seed=5) as writer:
        writer.add([row(n, 400) for n in range(150, 2000)])
    now = ReplayBuffer.open(tmp_path / "buffer")
    assert not (tmp_path / "buffer" / stale.manifest.chunks[0].file).exists()
    assert stale.copy(tmp_path / "copy").dataset()[:] == now.dataset()[:]
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        storage.MANIFEST,
        *(chunk.file for chunk in now.manifest.chunks),
    }
    (tmp_path / "buffer" / now.manifest.chunks[-1].file).unlink()
    with pytest.raises(ReplayBufferError, match=r"is missing: the replay buffer is damaged"):
        now.copy(tmp_path / "another")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ReplayBufferError, match=r"could not be copied to .*full .*a new or an empty one"):
        ReplayBuffer.open(tmp_path / "copy").copy(tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer", "copy", "full"]


def test_rows_that_a_run_has_replaced_since_are_named(tmp_path: Path) -> None:
    """Opened, then written to; a copy stays as it was."""
    writer = BufferWriter(tmp_path / "buffer", 1 << 20)
    writer.add([row(n, 60) for n in range(200)])
    opened = ReplayBuffer.open(tmp_path / "buffer")
    copied = opened.copy(tmp_path / "copy")
    writer.add([row(200, 60)])
    with pytest.raises(
        ReplayBufferError, match=r"is gone: a run that adds rows .*Open the buffer again; rows of its c"
    ):
        opened.dataset()
    assert len(copied.dataset()) == 200 and len(ReplayBuffer.open(tmp_path / "buffer").dataset()) == 201


@pytest.mark.parametrize(("commits", "fits"), [(1, True), (5, True), (storage.TRIES, False)])
def test_opened_while_a_run_writes(commits: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run commits between the manifest and the files, as often as said, and while hashes are taken."""
    writer = BufferWriter(tmp_path, 1 << 20)
    writer.add([row(n, 60) for n in range(200)])
    left, read, digest = commits, storage.read_manifest, storage.digest

    def commit() -> None:
        # It replaces the last chunk.
        writer.add([row(writer.through, 60)])

    def reading(folder: Path) -> Any:
        nonlocal left
        found = read(folder)
        if left:
            left -= 1
            commit()
        return found

    def hashing(content: Any) -> str:
        monkeypatch.setattr(storage, "digest", digest)
        commit()
        return digest(content)

    monkeypatch.setattr(storage, "read_manifest", reading)
    monkeypatch.setattr(storage, "digest", hashing)
    if fits:
        assert 200 + commits - 1 <= len(ReplayBuffer.open(tmp_path)) <= 200 + commits
    else:
        left = 2 * commits
        with pytest.raises(ReplayBufferError, match=r"is being written to, and changed 100 times"):
            ReplayBuffer.open(tmp_path)
    writer.close()


def test_a_smaller_limit_cuts_and_a_larger_one_brings_nothing_back(tmp_path: Path) -> None:
    lengths = [300] * 4000
    with BufferWriter(tmp_path, 4 << 20) as writer:
        writer.add([row(n, 300) for n in range(2000)])
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(2000, 300)])
        small = (1 << 20) * 2 // 3
    expected = reference(0, [bytes_of(300)] * 2001, small)
    assert ReplayBuffer.open(tmp_path).numbers.tolist() == expected
    with BufferWriter(tmp_path, 4 << 20) as writer:
        bound = writer.bound
        writer.add([row(n, 300) for n in range(2001, 4000)])
    found = ReplayBuffer.open(tmp_path).numbers.tolist()
    assert found == [n for n in range(len(lengths)) if word(0, n) < bound]


# Rows


def test_bytes_of_rows_are_those_of_arrow() -> None:
    """Against the sizes of Arrow's own buffers, which hold one more offset a column."""
    table = pa.table(
        {
            "ids": pa.array([[1, 2, 3], [], [4]], pa.list_(pa.int32())),
            "long": pa.array([[1], [2, 3], []], pa.large_list(pa.int64())),
            "nested": pa.array([[[1.5]], [[], [2.5, 3.5]], []], pa.list_(pa.list_(pa.float64()))),
            "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int16(), 2)),
            "text": ["a", "bcd", ""],
            "pair": pa.array([{"x": 1, "y": [1]}, {"x": 2, "y": []}, {"x": 3, "y": [2, 3]}]),
            "number": pa.array([1, 2, 3], pa.int8()),
        }
    )
    sizes = row_bytes(table)
    by_hand = [16 + 12 + (4 + 4 + 8) + 4 + 5 + (8 + 12) + 1, 4 + 20 + (4 + 8 + 16) + 4 + 7 + (8 + 4) + 1]
    assert sizes[:2].tolist() == by_hand
    assert row_bytes(table.slice(1, 2)).tolist() == sizes[1:].tolist()
    buffers = sum(b.size for name in ("ids", "fixed", "number") for b in table[name].chunk(0).buffers() if b)
    assert row_bytes(table.select(["ids", "fixed", "number"])).sum() == buffers - 4


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """Lists, arrays, tensors, text, flags; types of the dataset kept, with its features."""
    features = Features(
        {"input_ids": List(Value("int32")), "label": ClassLabel(names=["a", "b"]), "text": Value("string")}
    )
    rows = [{"input_ids": [1, 2], "label": 1, "text": "x"}, {"input_ids": [], "label": 0, "text": None}]
    given = Dataset.from_list(rows, features=features)
    with BufferWriter(tmp_path / "dataset", 1 << 20) as writer:
        writer.add(given.data.table)
    back = ReplayBuffer.open(tmp_path / "dataset").dataset()
    assert back.features == features and back[:] == given[:]
    odd = [
        {"x": torch.tensor([1, 2]), "y": np.ones((2, 2)), "z": True},
        {"x": np.array([3]), "y": [[0.5]], "z": False},
    ]
    with BufferWriter(tmp_path / "odd", 1 << 20) as writer:
        writer.add(odd)
    back = ReplayBuffer.open(tmp_path / "odd").dataset()
    assert back[:] == {"x": [[1, 2], [3]], "y": [[[1.0, 1.0], [1.0, 1.0]], [[0.5]]], "z": [True, False]}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"input_ids": [1]}, {"ids": [1]}], r"has the columns \['ids'\], others have \['input_ids'\]"),
        ([{"input_ids": ["a"]}], "column 'input_ids' holds values that cannot be kept as list"),
        ([{"input_ids": [1.5]}], "column 'input_ids' holds values that cannot be kept as list"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows: Any, text: str, tmp_path: Path) -> None:
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(0, 3)])
        with pytest.raises(ReplayBufferError, match=text):
            writer.add(rows)
        with pytest.raises(ValueError, match="numbers must hold one number for each of the 1 rows"):
            writer.add([row(0, 3)], [1, 2])
    assert len(ReplayBuffer.open(tmp_path)) == 1


def test_rows_that_are_too_long_are_counted_and_left_out(tmp_path: Path) -> None:
    """One of them would otherwise empty the buffer, where its word is low."""
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(n, 10_000 if n % 2 else 10) for n in range(100)])
        assert writer.manifest.too_long == 50 and writer.rows == 50 and writer.seen == 100


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """A folder without a manifest that holds any is refused; beside a manifest, they stay."""
    saved = Dataset.from_list([row(n, 3) for n in range(10)])
    saved.save_to_disk(tmp_path / "dataset")
    before = {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()}
    with pytest.raises(ReplayBufferError, match=r"holds 'data-00000-of-00001.arrow' and no buffer.json.*an empty one"):
        BufferWriter(tmp_path / "dataset", 1 << 20)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()} == before
    fill(tmp_path / "buffer")
    foreign = ("data-00000-of-00001.arrow", "chunk-1.arrow", "notes.hpe-part", "chunk.arrow.hpe-part")
    ours = ("chunk-00009999.arrow", "buffer.json.hpe-part", "chunk-00000001.arrow.0a1b.hpe-part")
    for name in foreign + ours:
        (tmp_path / "buffer" / name).write_bytes(b"x")
    fill(tmp_path / "buffer")
    assert all((tmp_path / "buffer" / name).read_bytes() == b"x" for name in foreign)
    assert not [name for name in ours if (tmp_path / "buffer" / name).exists()]


def test_chunks_that_lost_their_manifest_are_not_thrown_away(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / storage.MANIFEST).unlink()
    chunks = sorted(path.name for path in tmp_path.glob("*.arrow"))
    with pytest.raises(ReplayBufferError, match=r"and no buffer\.json"):
        fill(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.arrow")) == chunks


@pytest.mark.parametrize("value", ["lots", 0, "10 kB", 1.5, True, None, "-1 GB", 1 << 62])
def test_bytes_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes must be a number of bytes"):
        parse_bytes(value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReplayBufferError, match="holds no replay buffer"):
        ReplayBuffer.open(tmp_path)
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.begin_stage()
        with pytest.raises(ReplayBufferError, match="holds a replay buffer of seed 0, got seed=1"):
            BufferWriter(tmp_path, 1 << 20, seed=1)
    with pytest.raises(ReplayBufferError, match="holds no rows yet"):
        ReplayBuffer.open(tmp_path).dataset()


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BufferWriter(tmp_path, 1 << 20) as writer:
        writer.add([row(0, 3)])

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ReplayBufferError, match=r"could not be written \(OSError: .*No space left"):
            writer.add([row(1, 3)])
    monkeypatch.undo()
    assert len(ReplayBuffer.open(tmp_path)) == 1


@pytest.mark.parametrize("renamed", [False, True], ids=["not there", "not synced"])
def test_a_writer_goes_on_after_a_commit_that_failed(
    renamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at every manifest of a run; the caller tries the same rows again, and what is there is the reference."""
    real, manifests = storage.write_file, itertools.count()

    def failing(path: Path, content: Any) -> None:
        if path.name == storage.MANIFEST and next(manifests) % 2 == 0:
            if renamed:
                real(path, content)
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr("hf_pretrain_ext.buffer.writer.write_file", failing)
    failed = 0
    with BufferWriter(tmp_path, 1 << 20, seed=5) as writer:
        for start in range(0, len(LENGTHS), 25):
            numbers = range(start, start + 25)
            while writer.through < numbers.stop:
                try:
                    writer.add([row(n, LENGTHS[n]) for n in numbers], numbers)
                except ReplayBufferError:
                    failed += 1
                there = ReplayBuffer.open(tmp_path) if (tmp_path / storage.MANIFEST).exists() else None
                assert writer.rows == (0 if there is None else len(there))
                chunks = {chunk.file for chunk in there.manifest.chunks} if there is not None else set()
                assert renamed or {path.name for path in tmp_path.glob("*.arrow")} == chunks
    assert failed > 6
    expected = reference(5, [bytes_of(length) for length in LENGTHS], (1 << 20) * 2 // 3)
    assert ReplayBuffer.open(tmp_path).numbers.tolist() == expected and there is not None and there.seen == 150


def test_nothing_written_is_pickled(tmp_path: Path) -> None:
    fill(tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix == ".arrow":
            assert to_table([row(0, 3)]).schema == storage.read_chunk(path).drop_columns([storage.NUMBER]).schema
        else:
            assert path.name == ".lock" or json.loads(path.read_text())
