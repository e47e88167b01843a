"""What earlier stages read, found again for replay: opened from its files, or taken from what the user passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from hf_pretrain_ext.buffer import ReplayBuffer, ReplayBufferError
from hf_pretrain_ext.buffer.storage import read_manifest
from hf_pretrain_ext.plan.plan import Order, Source, first_rows
from hf_pretrain_ext.sources import identified, reopen
from hf_pretrain_ext.stages import Beginning, LifeSource, life_of
from hf_pretrain_ext.values import is_number, shown

__all__ = ["ReplayedHistory", "copies_of_buffers"]

COPIES = "_replayed"
"""Folder in `output_dir`; pushes to the Hub leave out what begins with `_`."""

Finding = tuple[str, str, bool]
"""What there is to say, what to do, and whether it is in the way."""


class ReplayedHistory:
    """The sources of a model's life with rows for each and their weights.

    Args:
        given (`dict[str, dataset]`): rows by the name of a source, in place of those that it had.

    Attributes:
        datasets: rows by source, once [`find`](ReplayedHistory.find) was called.
        weights: by source, in tokens seen; in samples where tokens of one are not known (then `in_tokens` is False).
        found_for: for its user, to say what they were found for.
    """

    def __init__(self, given: dict[str, Any]):
        self.given = given
        self.datasets: dict[str, Any] = {}
        self.weights: dict[str, float] = {}
        self.in_tokens = True
        self.found_for: Any = None

    def find(
        self,
        beginning: Beginning,
        weights: Any = None,
        prepared: Mapping[str, Any] | None = None,
        training: str | None = None,
        in_order: bool = False,
        buffers: Callable[[str], ReplayBuffer] = ReplayBuffer.open,
    ) -> list[Finding]:
        """Looks for the rows of every source; nothing is read but a sample of those that are opened from files.

        Args:
            beginning ([`~hf_pretrain_ext.stages.Beginning`]): of the stage that replays.
            weights (`dict[str, float]`, *optional*): by source, in place of the tokens seen.
            prepared (`dict[str, dataset]`, *optional*): `given`, as they are trained on.
            training (`str`, *optional*): fingerprint of the training data: what is read anyway is not replayed too.
            in_order (`bool`): whether the order of rows matters, which is then that of their first visit. Otherwise a
                source that was read to its end is left in the order of its files.
            buffers (`Callable[[str], ReplayBuffer]`, *optional*): opens a replay buffer by its folder, for sources
                that are not to be had from files.
        """
        given = self.given if prepared is None else prepared
        unknown = [stage.name for stage in beginning.history if stage.kind == "unknown"]
        # What stood in for the data of a base says nothing of how much of that data there was.
        life = {name: source for name, source in life_of(beginning.history).items() if name not in unknown}
        again = [name for name, source in life.items() if training is not None and source.fingerprint == training]
        findings = [
            (f"{name!r} is the training data itself and is not replayed beside it", "Nothing has to be done.", False)
            for name in again
        ]
        findings += self._misnamed(life, unknown)
        for name in again:
            del life[name]
        found: dict[str, Any] = {}
        lost: list[tuple[LifeSource, str]] = []
        for name, source in life.items():
            if name in given:
                found[name] = given[name]
                findings += _stand_in(source, given[name])
                continue
            try:
                found[name] = _reopened(source, in_order)
            except ValueError as error:
                try:
                    found[name], faults = _buffered(source, buffers)
                except ValueError as second:
                    lost.append((source, f"{error}, and {second}"))
                    continue
                kept = f"{name!r} is replayed from its replay buffer: {len(found[name]):,} of its rows ({error})"
                findings.append(("; ".join([kept, *faults]), "Nothing has to be done.", False))
        findings += [_lost(lost)] if lost else []
        findings += self._base(unknown)
        self.datasets = {**found, **{name: given[name] for name in unknown if name in given}}
        if not self.datasets and not lost:
            findings.append(_nothing(again))
        return [*findings, *self._weigh(life, weights)]

    def _misnamed(self, life: Mapping[str, LifeSource], unknown: list[str]) -> Iterator[Finding]:
        for name in self.given:
            if name not in life and name not in unknown:
                yield (
                    f"data has {name!r}, which no earlier stage read",
                    f"Their sources are {[*unknown, *life]}.",
                    True,
                )

    def _base(self, unknown: list[str]) -> Iterator[Finding]:
        for name in unknown:
            if name not in self.given:
                yield (
                    f"nothing is replayed of what {name!r} was trained on, which is not known",
                    f"Pass data={{{name!r}: ...}} with public data like it, or text that the model generated.",
                    False,
                )

    def _weigh(self, life: Mapping[str, LifeSource], weights: Any) -> Iterator[Finding]:
        if isinstance(weights, dict):
            self.in_tokens = True
            if set(weights) != set(self.datasets):
                names = sorted(self.datasets)
                yield f"weights must name the sources {names}, got {sorted(weights, key=str)}", "Name them all.", True
                return
            self.weights = {name: float(weight) for name, weight in weights.items()}
            return
        seen = {name: life[name].tokens for name in self.datasets if name in life}
        self.in_tokens = all(is_number(tokens) for tokens in seen.values())
        if not self.in_tokens:
            seen = {name: life[name].samples for name in seen}
            if not all(is_number(samples) for samples in seen.values()):
                names = [name for name, samples in seen.items() if not is_number(samples)]
                yield f"how much was seen of {names} is not known", "Pass weights for all sources.", True
                return
            if len(seen) > 1:
                yield (
                    "tokens seen are not known of all sources, so shares go by samples",
                    "Pass weights where rows differ in length.",
                    False,
                )
        self.weights = {name: float(amount) for name, amount in seen.items() if amount is not None}
        for name in self.datasets:
            if name not in seen and len(self.datasets) > 1:
                example = {name: 3e11, **{other: self.weights[other] for other in list(self.weights)[:1]}}
                yield (
                    f"how many tokens {name!r} was trained on is not known, so it has no share",
                    f"Pass weights for all sources, in tokens: weights={shown(example)}.",
                    True,
                )


def _nothing(again: list[str]) -> Finding:
    if again:
        return (
            f"all that earlier stages read is the training data itself ({', '.join(map(repr, again))}), so there is "
            "nothing to replay beside it",
            "Leave ReplayCallback out of this stage, or pass old data as `dataset`.",
            True,
        )
    return "found nothing that earlier stages read", "Pass old data as `dataset`.", True


def _stand_in(source: LifeSource, dataset: Any) -> Iterator[Finding]:
    found = identified(dataset)
    if found is not None and source.fingerprint is not None and found != source.fingerprint:
        yield (
            f"data[{source.name!r}] has other rows than stage {source.stages[0]!r} read",
            "That is as it should be for rows that stand in for them.",
            False,
        )


def _reopened(source: LifeSource, in_order: bool) -> Any:
    """Raises `ValueError` that says why the rows of a source are not to be had."""
    if source.place is None:
        if source.rows is None:
            raise ValueError("it was a stream")
        raise ValueError(
            "it was not read from files of its own (made in memory, a slice out of the middle, or what a plug-in made "
            "of them)"
        )
    dataset = reopen(source.place)
    if source.fingerprint is not None and identified(dataset) != source.fingerprint:
        raise ValueError(f"{source.place['files'][0]} holds other rows than it did")
    return _visited(source, dataset, in_order)


def _buffered(source: LifeSource, buffers: Callable[[str], ReplayBuffer]) -> tuple[Any, list[str]]:
    """The rows of a source that buffers hold, and why some hold none; raises `ValueError` where none does."""
    from datasets import concatenate_datasets

    if not source.kept:
        raise ValueError("no replay buffer has its rows")
    parts, faults = [], []
    for folder, run, start, stop in source.kept:
        try:
            buffer = buffers(folder)
            if all((stage.run, stage.start) != (run, start) for stage in buffer.manifest.stages):
                raise ReplayBufferError(f"the replay buffer {folder} was made anew since")
            parts.append(buffer.dataset(start, stop))
        except ReplayBufferError as error:
            faults.append(str(error))
    if not parts:
        raise ValueError("; ".join(faults))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts), faults


def copies_of_buffers(beginning: Beginning, output_dir: str) -> Callable[[str], ReplayBuffer]:
    """
    Opens replay buffers by way of copies in `output_dir`, which stay as they are while this or another run adds rows.

    A copy has the name of what the model's life added to the buffer until this stage: all ranks, a resume, and a stage
    that is begun again after a failure find the same one, and with it the rows that they began with.
    """
    opened: dict[str, ReplayBuffer] = {}

    def copied(folder: str) -> ReplayBuffer:
        if folder not in opened:
            added = sorted(
                part for source in life_of(beginning.history).values() for part in source.kept if part[0] == folder
            )
            named = json.dumps([beginning.number, added])
            name = f"{Path(folder).name}-{hashlib.blake2b(named.encode(), digest_size=6).hexdigest()}"
            where = Path(output_dir).absolute() / COPIES / name
            if read_manifest(where) is not None:
                opened[folder] = ReplayBuffer.open(where)
            else:
                opened[folder] = ReplayBuffer.open(folder, verify=False).copy(where)
        return opened[folder]

    return copied


def _visited(source: LifeSource, dataset: Any, in_order: bool) -> Any:
    """The rows that were read, in the order of their first visit; all of them where that is not known."""
    rows = len(dataset)
    if source.visits is None or (not in_order and any(draws >= rows for *_, draws in source.visits)):
        return dataset
    read = [
        first_rows(Source(source.name, rows, order=cast(Order, order), key=key), seed, draws)
        for order, key, seed, draws in source.visits
    ]
    if len(read) == 1:
        # Within one pass no row comes twice.
        return dataset.select(read[0])
    numbers, first = np.unique(np.concatenate(read), return_index=True)
    return dataset.select(numbers[np.argsort(first)])


def _lost(lost: list[tuple[LifeSource, str]]) -> Finding:
    parts = []
    for source, why in lost:
        hub = f"; it came from {source.hub['path']} at revision {source.hub['revision']}" if source.hub else ""
        parts.append(f"{source.name!r} of stage {source.stages[0]!r}: {why}{hub}")
    names = ", ".join(f"{source.name!r}: ..." for source, _ in lost)
    return (
        f"the rows of {len(lost)} earlier source{'s' * (len(lost) > 1)} cannot be found again: {'; '.join(parts)}",
        f"Pass them by name, data={{{names}}}: the same data again; or, where it is not to be had, public data like "
        "it, or text that the model generated (hf-pretrain-ext recall; see docs/stages.md). In stages to come, "
        "BufferCallback keeps a sample of what is read. Or leave from_history out and pass `dataset`.",
        True,
    )
