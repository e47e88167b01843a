"""Replay buffer: keep a uniform sample of the rows that training saw, for a stage that will replay them."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain_ext import _host, data
from hf_pretrain_ext.buffer import (
    BufferWriter,
    ReplayBuffer,
    ReplayBufferError,
    parse_bytes,
    priorities,
    row_bytes,
    to_table,
)
from hf_pretrain_ext.buffer.sampling import LARGEST_SHARE
from hf_pretrain_ext.buffer.storage import below, in_the_way, read_manifest, schema_of
from hf_pretrain_ext.buffer.writer import Unfinished, chunk_bytes, rows_bytes
from hf_pretrain_ext.loader import DrawnFeatures
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin, overrides
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import check_integers, reason, shown

__all__ = ["BufferCallback"]

SERVED = "hf_pretrain_ext_served"
"""Key in a batch of the rows that it was made of."""
LONGEST = 200
"""Steps between two commits, at most."""


class BufferCallback(TrainerPlugin):
    """Keeps a uniform sample of the rows that training sees in a buffer on disk; changes nothing.

    For data that cannot be read again: in a later stage, `ReplayCallback(from_history=True)` replays from the buffer
    what is not to be had from its files. Every row that is read for the first time has the same chance to be in it,
    over all stages that write to the folder (`hf_pretrain_ext.buffer` says which rows are kept, and how far rows of
    other lengths are from that). Rows are kept as the collator gets them: tokenized columns that the model takes. Rows
    of later passes and replayed rows are not added again.

    Training is bit-identical with and without it. Rows go to disk from a thread, in chunks, and before every
    checkpoint; what a resume adds again is left out.

    Args:
        folder (`str`, *optional*): of the buffer; made if absent, gone on with if there is one. Defaults to
            `_replay_buffer` in `output_dir`; pushes to the Hub leave out what begins with `_`.
        max_bytes (`int` or `str`, *optional*, defaults to `"1 GB"`): of all its files: an int, or `"500 MB"`,
            `"2 GiB"`; from 1 MiB on. Rows take up to two thirds. (The default is ours.)
        seed (`int`, *optional*, defaults to 0): of the sample.
        unfinished (`str`, *optional*, defaults to `"error"`): what a new run does where the last one that wrote to the
            folder did not come to its end and was another: refuse; `"keep"` its rows, where this run goes on from its
            weights; or `"drop"` them. The same run, started again from its beginning, adds nothing twice.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, rows that cannot be kept, or a folder that does not fit.
        [`ReplayBufferError`]: in training, a folder that is damaged, is another run's, or cannot be written.

    Example:

    ```python
    extend(trainer, BufferCallback("seen", max_bytes="10 GB")).train()
    # The next stage, of another script, has both among its callbacks:
    callbacks = [ReplayCallback(from_history=True, ratio=0.25), BufferCallback("seen", max_bytes="10 GB")]
    continue_from(Trainer(model, args, collator, stream, callbacks=callbacks), "runs/first/checkpoint-1000").train()
    ```
    """

    name = "buffer"
    resume = "exact"
    distributed = {"ddp": "exact", "fsdp2": "exact, without resume", "zero2": "exact", "zero3": "exact"}

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int | str = "1 GB",
        seed: int = 0,
        unfinished: Unfinished = "error",
    ):
        if folder is not None and (not isinstance(folder, str | os.PathLike) or not os.fspath(folder)):
            raise ValueError(f"folder must be the path of a folder, or None, got {shown(folder)}")
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = parse_bytes(max_bytes)
        check_integers(seed=(seed, -(1 << 63), (1 << 63) - 1, False))
        self.seed = int(seed)
        if unfinished not in get_args(Unfinished):
            raise ValueError(f"unfinished must be one of {get_args(Unfinished)}, got {shown(unfinished)}")
        self.unfinished = unfinished
        self._writer: BufferWriter | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.begin()

    def _where(self, output_dir: str) -> Path:
        return self.folder or Path(output_dir) / "_replay_buffer"

    # Checks

    def check(self, setup: Setup) -> Iterable[Problem]:
        where = self._where(setup.args.output_dir)
        if getattr(setup.args, "auto_find_batch_size", False):
            yield Problem(
                self.name,
                "auto_find_batch_size starts a run again with another batch, whose rows have other numbers",
                "Set per_device_train_batch_size.",
            )
        planned = any(overrides(plugin, "wrap_plan") for plugin in setup.plugins)
        if setup.args.ignore_data_skip and data.is_map_style(setup.train_dataset) and not planned:
            yield Problem(
                self.name,
                "ignore_data_skip=True begins an epoch anew where a run is resumed in it: rows that were seen would "
                "be added again, in the place of others",
                "Set it to False.",
            )
        if data.is_stream(setup.train_dataset) and not planned and setup.args.world_size > 1:
            if setup.trainer.accelerator.dispatch_batches is not False:
                yield Problem(
                    self.name,
                    "a stream is read on one rank, which sends the others tensors and no rows",
                    "Pass accelerator_config={'dispatch_batches': False}.",
                )
        if setup.args.push_to_hub and _is_pushed(where, Path(setup.args.output_dir)):
            yield Problem(
                self.name,
                f"{where} lies in output_dir, which push_to_hub uploads: rows of the training data would be published",
                "Keep it elsewhere, or in a folder whose name begins with '_', which pushes leave out.",
            )
        fault = in_the_way(where)
        if fault is None and where.resolve() == Path(setup.args.output_dir).resolve():
            fault = f"folder={shown(os.fspath(where))} is output_dir, where the run's other files lie"
        if fault is not None:
            yield Problem(self.name, fault, "Pass another folder, a new or an empty one.")
        try:
            known = read_manifest(where)
        except ReplayBufferError as error:
            yield Problem(self.name, str(error), "Mend it, or pass another folder.")
            known = None
        if known is not None and known.seed != self.seed:
            yield Problem(
                self.name,
                f"{where} holds a replay buffer of seed {known.seed}, got seed={self.seed}",
                f"Pass seed={known.seed}, or another folder.",
            )
        held = None
        if known is not None:
            try:
                held = schema_of(where, known)
            except ReplayBufferError as error:
                yield Problem(self.name, str(error), "Mend it, or pass another folder.")
        yield from self._check_rows(setup, where, held)
        yield from self._check_sources(setup, where)

    def _check_rows(self, setup: Setup, where: Path, held: pa.Schema | None) -> Iterable[Problem]:
        if not data.is_map_style(setup.train_dataset) and not data.is_stream(setup.train_dataset):
            return
        try:
            (rows,), _ = setup.stripped([setup.sample(setup.train_dataset)])
            served = [rows[number] for number in data.sample_rows(len(rows))]
        except ValueError:
            # Of data that the host itself cannot read it speaks.
            return
        if not served:
            return
        try:
            table = _as_table(served, _schema_of(setup.train_dataset))
            longest = int(row_bytes(table).max())
        except (ValueError, AttributeError) as error:
            yield Problem(self.name, f"the training rows cannot be kept: {error}", "Tokenize them before training.")
            return
        if held is not None and (why := _misfit(table, held)):
            yield Problem(
                self.name,
                f"rows cannot be added to {where}: {why}",
                "Bring the training data to those columns and types, or pass another folder.",
            )
        if longest > rows_bytes(self.max_bytes) // LARGEST_SHARE:
            yield Problem(
                self.name,
                f"a row of {longest:,} bytes is more than 1/{LARGEST_SHARE} of the rows that max_bytes="
                f"{self.max_bytes:,} has room for: such rows would not be kept",
                f"Pass at least max_bytes={2 * longest * LARGEST_SHARE:,}.",
            )

    def _check_sources(self, setup: Setup, where: Path) -> Iterable[Problem]:
        home = where.resolve()
        for plugin in setup.plugins:
            for label, dataset in plugin.training_data(setup).items():
                files = getattr(dataset, "cache_files", None) or ()
                if any(home in Path(file["filename"]).resolve().parents for file in files):
                    yield Problem(
                        self.name,
                        f"{plugin.name} reads {label!r} from the buffer to which this run adds rows",
                        "Read from a copy: ReplayBuffer.open(folder).copy(another_folder).dataset().",
                    )

    # Life cycle

    def begin(self) -> None:
        self._close()
        self._resumed: dict[str, int] | None = None
        self._start = self._seen = self._total = self._through = 0
        self._bound = 0
        self._name = ""
        self._epochs = -1
        self._coming: list[_Served] = []
        self._coming_step = -1
        self._pending: list[_Served] = []
        self._handed_over, self._interval = 0, 1
        self._written: Future[None] | None = None

    def state(self) -> dict[str, Any]:
        return {"start": self._start, "seen": self._total, "run": self._name}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            self._resumed = {"start": int(state["start"]), "seen": int(state["seen"])}
            self._name = str(state.get("run", ""))

    def recorded(self) -> dict[str, Any]:
        if self.run is None:
            return {}
        # A later stage may look for it from another working folder.
        return {"folder": os.path.abspath(self._where(self.run.output_dir)), **self.state()}

    def describe(self) -> list[str]:
        if self.run is None:
            return []
        where = self._where(self.run.output_dir)
        return [f"buffer: a sample of the rows of this run goes to {where}, at most {self.max_bytes / 1e6:,.1f} MB"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        run = self.run
        if run is None:
            return
        self._handed_over = run.step
        if self._resumed is None:
            self._name = self._identity()
        told = torch.zeros(4, dtype=torch.int64, device=run.device)
        failure: ReplayBufferError | None = None
        if run.is_main:
            try:
                self._open()
                assert self._writer is not None
                told = told.new_tensor([1, self._start, *divmod(self._writer.bound, 1 << 32)])
            except ReplayBufferError as error:
                failure = error
        told = run.sum_over_ranks(told)
        if failure is not None:
            raise failure
        if not int(told[0]):
            raise ReplayBufferError("the replay buffer could not be opened: see the message of the first rank")
        self._start, self._bound = int(told[1]), (int(told[2]) << 32) + int(told[3])
        if self._resumed is not None:
            self._total = self._resumed["seen"]

    def _open(self) -> None:
        run = self.run
        assert run is not None
        self._writer = BufferWriter(self._where(run.output_dir), self.max_bytes, self.seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replay-buffer")
        if self._resumed is not None:
            self._start = self._resumed["start"]
            self._writer.resume_stage(self._start, self._start + run.step * run.global_batch)
            return
        earlier, stages = self._writer.seen, len(self._writer.manifest.stages)
        self._start = self._writer.begin_stage(self.unfinished, self._name)
        if len(self._writer.manifest.stages) == stages > 0:
            run.say("buffer: this run was begun before: rows that it added then are not added again")
        elif earlier:
            run.say(f"buffer: the rows of this run join a sample of {self._writer.seen:,} rows seen before")

    def _identity(self) -> str:
        """A hash of all that decides which rows the run sees: one that is started again is known by it."""
        run = self.run
        assert run is not None
        with rng_guard(seed=0):
            sampled = run.setup.sample(run.setup.train_dataset)
            rows = data.fingerprint(sampled) if data.is_map_style(sampled) else ""
        text = json.dumps([run.identity(), run.step, rows], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epochs += 1
        # Data workers start here, as copies of this process: better of one whose other thread is at rest.
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        if run is None:
            return
        self._take_over()
        if run.step - self._handed_over >= self._interval:
            self._hand_over()
        if control.should_log:
            new = run.sum_over_ranks(torch.tensor(self._seen, device=run.device))
            run.log({"buffer_seen": self._total + int(new)})

    def before_save(self) -> None:
        self._take_over()
        self._hand_over()
        self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        if run is None:
            return
        self.before_save()
        writer = self._writer
        if writer is not None:
            if state.global_step >= state.max_steps:
                writer.finish()
            self._close()
            kept = ReplayBuffer.open(writer.folder, verify=False)
            run.trace("buffer", rows=len(kept), seen=kept.seen, bytes=kept.nbytes, share=kept.share)
            run.say(f"buffer: {len(kept):,} of {kept.seen:,} rows seen are kept in {kept.folder}")
            if too_long := kept.manifest.too_long:
                run.say(f"buffer: {too_long:,} rows were left out, each too long for max_bytes={self.max_bytes:,}")
        # What comes next on any rank finds the buffer whole.
        run.sum_over_ranks(torch.zeros(1, dtype=torch.int64, device=run.device))

    def end(self) -> None:
        # Of a training that was broken off: the lock goes to the next, once what is being written is written.
        written, self._written = self._written, None
        self._close()
        error = None if written is None else written.exception()
        if error is not None and self.run is not None:
            self.run.say(f"buffer: the last rows could not be written ({reason(error)})", logging.WARNING)

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # Rows

    def wrap_collator(self, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        run = self.run
        plan = None if run is None else run.plan or run.build_plan()
        sources = [] if plan is None else plan.sources
        passes = [_Source(source.name, source.num_rows, source.replayed) for source in sources]
        return _Recording(collator, passes)

    def see_batches(self, batches: Sequence[Any]) -> None:
        run = self.run
        if run is None:
            return
        rank, ranks = run.ranks
        size = _host.train_batch_size(run.trainer)
        repeated = run.plan is None and max(self._epochs, run.step // max(run.steps_per_epoch, 1)) > 0
        dataset = run.trainer.train_dataset
        rows = len(dataset) if data.is_map_style(dataset) else sys.maxsize
        self._coming, self._coming_step = [], run.step
        for number, batch in enumerate(batches):
            served = batch.pop(SERVED, None) if hasattr(batch, "pop") else None
            if repeated:
                continue
            if served is None:
                raise ReplayBufferError(
                    "the batches of this Trainer are made by another collator than the one that plug-ins wrapped, so "
                    "that none of its rows would be kept. Let its get_train_dataloader call "
                    "super().get_train_dataloader() or take self.data_collator as collate_fn, or train without "
                    "BufferCallback"
                )
            if served.numbers is None:
                # As the host deals them out: micro-batch after micro-batch, in each rank after rank.
                first = run.step * run.global_batch + (number * ranks + rank) * size
                # Of several ranks, the host fills up the last batches of an epoch with the epoch's first rows.
                new = max(0, min(len(served.rows), rows - first))
                served = _Served(served.rows[:new], np.arange(first, first + new))
            self._coming.append(served)

    def _take_over(self) -> None:
        """The rows of the last step, if it was made: those that the buffer may keep."""
        if self.run is None or self.run.step <= self._coming_step:
            return
        for served in self._coming:
            assert served.numbers is not None
            self._seen += len(served.rows)
            numbers = served.numbers + self._start
            wanted = np.flatnonzero(below(priorities(self.seed, numbers), self._bound))
            if len(wanted):
                self._pending.append(_Served([served.rows[place] for place in wanted], numbers[wanted]))
        self._coming = []

    def _hand_over(self) -> None:
        """Gives what was taken over to the writer; every rank must call it at the same steps."""
        run = self.run
        assert run is not None
        self._wait()
        rows = [row for served in self._pending for row in served.rows]
        numbers = np.concatenate([np.zeros(0, np.int64), *(served.numbers for served in self._pending)])
        steps, self._pending = run.step - self._handed_over, []
        self._handed_over = run.step
        schema = _schema_of(run.setup.train_dataset) if rows else None
        parts: list[tuple[Any, NDArray[np.int64]]] = [(rows, numbers)] if rows else []
        if run.ranks[1] > 1:
            table = _as_table(rows, schema).append_column(_NUMBER, pa.array(numbers)) if rows else None
            parts = [(part.drop_columns([_NUMBER]), part[_NUMBER].to_numpy()) for part in self._gathered(table)]
        else:
            self._total, self._seen = self._total + self._seen, 0
        size = sum(_size(part) for part, _ in parts)
        if steps > 0:
            self._interval = max(1, min(LONGEST, chunk_bytes(self.max_bytes) * steps // max(size, 1)))
        writer, thread = self._writer, self._thread
        if writer is None or thread is None:
            return
        self._bound = writer.bound
        through = self._start + run.step * run.global_batch
        self._written = thread.submit(_store, writer, parts, schema, through, self._total)

    def _gathered(self, table: pa.Table | None) -> list[pa.Table]:
        """The tables of all ranks; with them, how many rows were seen, and the bound of the one that writes."""
        run = self.run
        assert run is not None
        content = b""
        if table is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            content = sink.getvalue().to_pybytes()
        bound = self._writer.bound if self._writer is not None else 0
        head = [len(content), self._seen, *divmod(bound, 1 << 32)]
        gather = run.trainer.accelerator.gather
        heads = gather(torch.tensor([head], dtype=torch.int64, device=run.device)).cpu()
        self._total, self._seen = self._total + int(heads[:, 1].sum()), 0
        # Only the rank that writes knows one.
        self._bound = (int(heads[:, 2].sum()) << 32) + int(heads[:, 3].sum())
        most = int(heads[:, 0].max())
        if not most:
            return []
        padded = torch.zeros((1, most), dtype=torch.uint8)
        if content:
            padded[0, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        every = gather(padded.to(run.device)).cpu()
        found = []
        for line, length in zip(every, heads[:, 0].tolist(), strict=True):
            if length:
                with pa.ipc.open_stream(pa.py_buffer(line[:length].numpy())) as reader:
                    found.append(reader.read_all())
        return found

    def _wait(self) -> None:
        """Until the thread is done; what went wrong there is raised here."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()


_NUMBER = "hf_pretrain_ext_number"


@dataclass
class _Served:
    """The rows that a micro-batch was made of, and their numbers in the stage, where a plan gives them."""

    rows: list[dict[str, Any]]
    numbers: NDArray[np.int64] | None


@dataclass(frozen=True)
class _Source:
    """What of a plan's source says whether a row is new."""

    name: str
    num_rows: int | None
    replayed: bool


class _Recording:
    """Collates as the wrapped collator does and adds the rows that it was given to the batch."""

    def __init__(self, collator: Callable[[list[Any]], Any], sources: list[_Source]):
        # Under this name the plan finds collators that draw at random.
        self.data_collator = collator
        self.sources = sources
        self.columns: list[str] | None = None
        inner: Any = collator
        while inner is not None and self.columns is None:
            self.columns = getattr(inner, "signature_columns", None)
            inner = getattr(inner, "data_collator", None)

    def __call__(self, features: list[Any]) -> Any:
        served = self._served(features)
        batch = self.data_collator(features)
        if not isinstance(batch, Mapping):
            raise TypeError(f"BufferCallback needs a collator whose batches are dicts, got {type(batch).__name__}")
        batch[SERVED] = served  # type: ignore[index]  # collators return dicts or UserDicts
        return batch

    def _served(self, features: list[Any]) -> _Served:
        numbers, new = None, np.ones(len(features), dtype=bool)
        if isinstance(features, DrawnFeatures):
            draws, numbers = features.draws, features.draws.index
            for k, source in enumerate(self.sources):
                of_source = draws.source == k
                if source.replayed:
                    new &= ~of_source
                elif source.num_rows is not None:
                    new &= ~(of_source & (draws.number >= source.num_rows))
                elif (mark := features.marks.get(source.name)) is not None and mark.turn:
                    # Where a stream that is shorter than a batch began several passes in it, none of it is new.
                    new &= ~(of_source & ((draws.row >= mark.turn_start) | (mark.turn > 1)))
        places = np.flatnonzero(new)
        rows = [self._kept(features[place]) for place in places]
        return _Served(rows, None if numbers is None else numbers[places])

    def _kept(self, feature: Any) -> dict[str, Any]:
        if not isinstance(feature, Mapping):
            raise TypeError(f"BufferCallback keeps rows that are dicts of columns, got {type(feature).__name__}")
        kept = {key: value for key, value in feature.items() if self.columns is None or key in self.columns}
        if get_worker_info() is not None:
            # From worker to trainer: vectors travel faster than lists, and tensors would each open a file.
            return {key: _vector(value) for key, value in kept.items()}
        # A collator may write into what it is given.
        return {key: copy.copy(value) if isinstance(value, list) else value for key, value in kept.items()}


def _vector(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, list) and value and isinstance(value[0], int) and not isinstance(value[0], bool):
        made = np.asarray(value)
        return made if made.dtype.kind == "i" else value
    return value


def _schema_of(dataset: Any) -> pa.Schema | None:
    """The types of a dataset's columns, with what `datasets` keeps beside them; None where it has none."""
    features = getattr(dataset, "features", None)
    return getattr(features, "arrow_schema", None)


def _as_table(rows: Any, schema: pa.Schema | None) -> pa.Table:
    """Rows under the types of the dataset that they are from, where those are known."""
    if isinstance(rows, pa.Table) or not rows:
        return rows
    names = list(rows[0])
    if schema is None or not set(names) <= set(schema.names):
        return to_table(rows)
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    return to_table(rows, Features({name: features[name] for name in names}).arrow_schema)


def _misfit(table: pa.Table, held: pa.Schema) -> str | None:
    """Why rows do not fit those of a buffer, by their columns and types."""
    if set(table.column_names) != set(held.names):
        return f"they have the columns {sorted(table.column_names)}, those that it holds {sorted(held.names)}"
    try:
        table.select(held.names).cast(held)
    except (pa.ArrowException, ValueError) as error:
        return reason(error, 200)
    return None


def _size(rows: Any) -> int:
    """About how many bytes rows take."""
    if isinstance(rows, pa.Table):
        return int(rows.nbytes)
    return sum(8 * len(value) if hasattr(value, "__len__") else 8 for row in rows for value in row.values())


def _store(writer: BufferWriter, parts: list[Any], schema: pa.Schema | None, through: int, seen: int) -> None:
    try:
        tables = [(_as_table(rows, schema), numbers) for rows, numbers in parts]
    except ValueError as error:
        raise ReplayBufferError(f"rows cannot be added to the replay buffer {writer.folder}: {error}") from error
    if tables:
        numbers = np.concatenate([numbers for _, numbers in tables])
        writer.add(pa.concat_tables([table for table, _ in tables]), numbers, through=through, seen=seen)
    else:
        writer.add([], through=through, seen=seen)


def _is_pushed(folder: Path, output_dir: Path) -> bool:
    """Whether the host's push of `output_dir` takes `folder` along."""
    folder, output_dir = folder.resolve(), output_dir.resolve()
    if not folder.is_relative_to(output_dir):
        return False
    first = folder.relative_to(output_dir).parts[:1]
    return not first or not first[0].startswith(("_", f"{PREFIX_CHECKPOINT_DIR}-"))
