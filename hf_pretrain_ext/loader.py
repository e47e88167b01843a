"""From plan to batches: a dataset that looks rows up in the plan, a batch sampler of ranges, a counting collator.

Only integers cross into workers: the sampler yields ranges of global sample indices and each worker asks its own copy
of the plan what they mean.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset

from hf_pretrain_ext.plan import Draws, SamplePlan, Segment
from hf_pretrain_ext.plan.counter import derive_key
from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.streams import StreamMark, StreamReader

__all__ = [
    "COUNTS",
    "MARKS",
    "DrawnFeatures",
    "PlanBatchSampler",
    "PlanCollator",
    "PlanDataset",
    "Span",
    "loss_tokens",
    "private_copy",
]

COUNTS = "hf_pretrain_ext_counts"
"""Key of the counts in a batch: int64 `(sources, 5)`: samples; tokens, samples whose tokens are not known;
loss-bearing tokens, samples whose loss-bearing tokens are not known."""
MARKS = "hf_pretrain_ext_marks"
"""Key in a batch of where its streams stand after it: `StreamMark` by source name."""


class DrawnFeatures(list[Any]):
    """The features of a micro-batch; `draws` says which draw of the plan each is, `marks` where its streams stand."""

    def __init__(self, features: Sequence[Any], draws: Draws, marks: dict[str, StreamMark] | None = None):
        super().__init__(features)
        self.draws = draws
        self.marks = marks or {}


@dataclass(frozen=True)
class Span:
    """A micro-batch by its indices, with the segments that were added to the plan while it ran."""

    indices: range
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.indices)


class PlanDataset(Dataset[Any]):
    """Map-style dataset of a plan: item i is the row that draw i names.

    Args:
        plan ([`SamplePlan`]): what is seen when.
        datasets (`Sequence`): one dataset a source: map-style, or a stream where the source has no `num_rows`.
        marks (`dict[str, StreamMark]`, *optional*): where streams go on, by source name.
    """

    def __init__(self, plan: SamplePlan, datasets: Sequence[Any], marks: Mapping[str, StreamMark] | None = None):
        # Workers get the rows once: through `datasets`, stripped of unused columns, and not with the plan again.
        bare = tuple(dataclasses.replace(source, dataset=None) for source in plan.sources)
        self.plan = dataclasses.replace(plan, sources=bare)
        self.datasets = list(datasets)
        self.readers: dict[int, StreamReader] = {}
        for k, source in enumerate(plan.sources):
            if source.num_rows is None:
                mark = (marks or {}).get(source.name)
                self.readers[k] = StreamReader(datasets[k], source.name, plan.seed, mark)

    def go_on_from(self, marks: Mapping[str, StreamMark]) -> None:
        """For workers that start at a new epoch: where streams that were read in other processes stand."""
        for reader in self.readers.values():
            reader.go_on_from(marks.get(reader.name))

    def __len__(self) -> int:
        return self.plan.epoch

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__(range(index, index + 1))[0]

    def __getitems__(self, indices: range | Span) -> DrawnFeatures:
        if isinstance(indices, Span):
            if indices.segments != self.plan.segments:
                self.plan = self.plan.with_segments(indices.segments)
            indices = indices.indices
        draws = self.plan.draws(indices.start, indices.stop)
        features: list[Any] = [None] * len(draws)
        # Transforms that draw at random draw by position, as random collators do.
        with rng_guard(int(draws.seed[0])):
            for k in np.unique(draws.source).tolist():
                places = np.flatnonzero(draws.source == k)
                rows = draws.row[places].tolist()
                read = self.readers[k].rows(rows) if k in self.readers else _rows(self.datasets[k], rows)
                for place, item in zip(places, read, strict=True):
                    features[place] = item
        return DrawnFeatures(features, draws, {reader.name: reader.mark() for reader in self.readers.values()})


def _rows(dataset: Any, rows: list[int]) -> Any:
    return dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]


class PlanBatchSampler(BatchSampler):
    """Ranges of global sample indices, one a micro-batch over all ranks; the host shards them over ranks.

    Micro-batch m of step s on rank r holds the indices from ((s·A + m)·R + r)·B on, for R ranks and A accumulated
    micro-batches of B, so that step s holds the same samples for every R and A with the same product.

    Args:
        batch_size (`int`): B, samples a rank and micro-batch.
        batches (`int`): ranges an epoch, over all ranks; a multiple of R·A.
        start (`Callable[[], int]`): the global index at which the epoch about to be iterated begins.
        segments (`tuple[Segment, ...]`, *optional*): of a plan whose mixture may change while it runs. Set anew, they
            reach the workers with the next batch that is handed out; `handed_out` is where that begins.
    """

    def __init__(
        self, batch_size: int, batches: int, start: Callable[[], int], segments: tuple[Segment, ...] | None = None
    ):
        self.segments = segments
        self.handed_out = 0
        self.batch_size = batch_size
        # Every batch is whole, so the host's sharding need not loop back to the epoch's first samples.
        self.drop_last = True
        self.batches = batches
        self.start = start

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[range]:  # type: ignore[override]  # ranges, where torch's annotation says lists
        first, size = self.start(), self.batch_size
        starts = range(first, first + self.batches * size, size)
        # A map of a built-in over ranges: the host skips to step 1,000,000 by taking a million of these.
        ranges = map(range, starts, range(first + size, first + (self.batches + 1) * size, size))
        return ranges if self.segments is None else self._with_segments(ranges)

    def _with_segments(self, ranges: Iterable[range]) -> Iterator[Any]:
        for indices in ranges:
            self.handed_out = indices.stop
            yield Span(indices, self.segments or ())


class PlanCollator:
    """Collates the features of a micro-batch as the wrapped collator does, checks their ids and counts their sources.

    Random collators (masking, noise) draw from a generator keyed by the batch's first sample, so that what they do
    depends on the position in the run and neither on workers nor on what ran before.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        sources: Sequence[str],
        vocabulary: int | None,
        shifts_labels: bool,
    ):
        self.collator = collator
        self.sources = list(sources)
        self.vocabulary = vocabulary
        self.shifts_labels = shifts_labels

    def __call__(self, features: list[Any]) -> Any:
        if not isinstance(features, DrawnFeatures):
            raise TypeError(f"a plan's collator takes the features that a PlanDataset returns, got {type(features)}")
        draws, marks = features.draws, features.marks
        lengths = [_length(feature) for feature in features]
        seed = int(draws.seed[0])
        with rng_guard(seed):
            _rekey(self.collator, seed)
            batch = self.collator(features)
        if not isinstance(batch, Mapping):
            return batch
        self._check_ids(batch.get("input_ids"), draws)
        counts = np.zeros((len(self.sources), 5), dtype=np.int64)
        np.add.at(counts[:, 0], draws.source, 1)
        read = np.array([-1 if length is None else length for length in lengths])
        np.add.at(counts[:, 1], draws.source, np.maximum(read, 0))
        np.add.at(counts[:, 2], draws.source, read < 0)
        bearing = loss_tokens(batch, lengths, self.shifts_labels)
        if bearing is None:
            counts[:, 4] = counts[:, 0]
        else:
            np.add.at(counts[:, 3], draws.source, bearing)
        added: dict[str, Any] = {COUNTS: torch.from_numpy(counts)}
        if marks:
            added[MARKS] = marks
        batch.update(added)  # type: ignore[attr-defined]  # collators return dicts or UserDicts
        return batch

    def _check_ids(self, ids: Any, draws: Draws) -> None:
        if self.vocabulary is None or not isinstance(ids, torch.Tensor) or not ids.numel():
            return
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= self.vocabulary:
            wrong = np.arange(len(draws))
            if len(ids) == len(draws):
                wrong = np.flatnonzero(((ids < 0) | (ids >= self.vocabulary)).flatten(1).any(dim=1).numpy())
            names = ", ".join(self.sources[k] for k in np.unique(draws.source[wrong]))
            rows = ", ".join(str(row) for row in draws.row[wrong[:8]])
            raise ValueError(
                f"a batch holds token id {low if low < 0 else high}, but the model has {self.vocabulary} embeddings. "
                f"It was drawn from {names}, rows {rows}: tokenize that data with the model's own tokenizer."
            )


def private_copy(collator: Any, seed: int = 0) -> Any:
    """A collator for looks and probes: what it draws leaves the generator of the one in training alone."""
    made = copy.copy(collator)
    if hasattr(made, "data_collator"):
        made.data_collator = private_copy(made.data_collator, seed)
    if getattr(made, "generator", None) is not None:
        made.generator = None
    _rekey(made, seed)
    return made


def _rekey(collator: Any, seed: int) -> None:
    """Seeds a generator that a collator keeps for itself, as transformers' masking collators do when given a seed."""
    while hasattr(collator, "data_collator"):
        collator = collator.data_collator
    if getattr(collator, "seed", None) is None or not hasattr(collator, "create_rng"):
        return
    if collator.generator is None:
        collator.create_rng()
    key = derive_key(int(collator.seed), seed)
    if isinstance(collator.generator, torch.Generator):
        collator.generator.manual_seed(key % (1 << 63))
    else:
        collator.generator = np.random.default_rng(key)


def _length(feature: Any) -> int | None:
    ids = feature.get("input_ids") if isinstance(feature, Mapping) else None
    return None if ids is None or not hasattr(ids, "__len__") else len(ids)


def loss_tokens(batch: Mapping[str, Any], lengths: Sequence[int | None], shifts: bool) -> np.ndarray | None:
    """Loss-bearing tokens of each feature of a collated batch, or None where that cannot be told.

    Args:
        batch (`Mapping`): with `labels` or `shift_labels` of shape `(batch, sequence)`, or `(1, sequence)` for
            features flattened one after the other.
        lengths (`Sequence[int]`): tokens of each feature before collation.
        shifts (`bool`): whether the model predicts label t + 1 at position t, so that the first label bears no loss.

    Example:

    >>> labels = torch.tensor([[1, 2, 3, -100], [4, 5, 6, 7]])
    >>> loss_tokens({"labels": labels}, [3, 4], shifts=True).tolist()
    [2, 3]
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        return None
    bearing = labels.ne(-100)
    if shifts and "shift_labels" not in batch:
        bearing = bearing.clone()
        bearing[:, 0] = False
    if len(bearing) == len(lengths):
        return bearing.sum(dim=1).numpy()
    known = [length for length in lengths if length]
    if len(bearing) == 1 and len(known) == len(lengths) and sum(known) == bearing.shape[1]:
        return np.add.reduceat(bearing[0].numpy().astype(np.int64), np.cumsum([0, *known[:-1]]))
    return None
