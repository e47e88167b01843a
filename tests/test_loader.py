"""From plan to batches: what ranks, workers and skipping make of the order, and what collation counts and checks.

Ranks need no processes here: accelerate's own `BatchSamplerShard` cuts the sampler as it does in every process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_pretrain_ext.loader import COUNTS, DrawnFeatures, PlanBatchSampler, PlanCollator, PlanDataset, loss_tokens
from hf_pretrain_ext.plan import SamplePlan, Segment, Source

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


class Rows:
    """A source whose row r is `{"at": (name, r)}`, and which counts what is read."""

    def __init__(self, name: str, number: int):
        self.name, self.number, self.reads = name, number, 0

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.number:
            raise IndexError(row)
        self.reads += 1
        return {"at": (self.name, row)}


class FetchingRows(Rows):
    """The same, fetched a batch at a time, as `datasets` does."""

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        assert all(type(row) is int for row in rows)  # no NumPy integers reach a user's dataset
        return [self[row] for row in rows]


NEW, OLD = 50, 17


def plan_of(window: int = 8, weights: tuple[int, int] = (3, 1)) -> SamplePlan:
    return SamplePlan((Source("new", NEW), Source("old", OLD)), (Segment(0, weights),), seed=5, window=window)


def expected(plan: SamplePlan, start: int, stop: int) -> list[tuple[str, int]]:
    """What samples start..stop − 1 are, one look-up at a time."""
    draws = [plan[i] for i in range(start, stop)]
    return [(plan.sources[draw.source].name, draw.row) for draw in draws]


def places(features: Sequence[Any]) -> list[tuple[str, int]]:
    return [feature["at"] for feature in features]


def identity(features: list[Any]) -> Any:
    return features


def batches_of_ranks(
    plan: SamplePlan, ranks: int, size: int, batches: int, start: int = 0, workers: int = 0
) -> list[list[list[tuple[str, int]]]]:
    """What every rank's DataLoader yields: for each rank its batches of (source, row)."""
    found = []
    for rank in range(ranks):
        sampler = BatchSamplerShard(PlanBatchSampler(size, batches, lambda: start), ranks, rank)
        dataset = PlanDataset(plan, [Rows("new", NEW), FetchingRows("old", OLD)])
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=identity)
        found.append([places(batch) for batch in loader])
    return found


# --- order ------------------------------------------------------------------------------------------


def test_items_are_what_the_plan_says() -> None:
    plan = plan_of()
    dataset = PlanDataset(plan, [Rows("new", NEW), FetchingRows("old", OLD)])
    assert len(dataset) == plan.epoch == NEW
    assert [dataset[i]["at"] for i in range(200)] == expected(plan, 0, 200)
    features = dataset.__getitems__(range(37, 90))
    assert isinstance(features, DrawnFeatures) and places(features) == expected(plan, 37, 90)
    assert features.draws.index.tolist() == list(range(37, 90))
    assert [(plan.sources[k].name, row) for k, row in zip(features.draws.source, features.draws.row, strict=True)] == (
        places(features)
    )


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_workers_see_the_plan_in_order(ranks: int, workers: int) -> None:
    """Micro-batch m belongs to rank m mod R: interleaved, the ranks' batches are the plan, nothing twice."""
    plan, size, batches = plan_of(), 2, 24
    found = batches_of_ranks(plan, ranks, size, batches, workers=workers)
    assert all(len(mine) == batches // ranks for mine in found)
    in_order = [place for turn in zip(*found, strict=True) for batch in turn for place in batch]
    assert in_order == expected(plan, 0, batches * size)


@pytest.mark.parametrize("window", [1, 8, 24])
def test_a_step_holds_the_same_samples_for_every_split(window: int) -> None:
    """A global batch of 8 as ranks × accumulated micro-batches × batch: 8×1 to 1×8, and mixed with both."""
    plan, steps = plan_of(window), 6
    by_step = [sorted(expected(plan, 8 * step, 8 * step + 8)) for step in range(steps)]
    for ranks, accumulation, size in [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)]:
        found = batches_of_ranks(plan, ranks, size, steps * accumulation * ranks)
        for step in range(steps):
            mine = slice(step * accumulation, (step + 1) * accumulation)
            seen = sorted(place for rank in found for batch in rank[mine] for place in batch)
            assert seen == by_step[step], (ranks, accumulation, size, step)


def test_order_within_ranks_does_differ_between_splits() -> None:
    """Negative control: what is equal above is the step, not what each rank gets."""
    plan = plan_of()
    assert batches_of_ranks(plan, 2, 1, 16)[0] != batches_of_ranks(plan, 4, 1, 16)[0]


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_epochs_neither_overlap_nor_leave_gaps(
    size: int, ranks: int, accumulation: int, steps: int, epochs: int
) -> None:
    """The epoch's start follows the steps done; over epochs the indices are 0, 1, 2, ... to the end."""
    done = {"steps": 0}
    sampler = PlanBatchSampler(size, steps * accumulation * ranks, lambda: done["steps"] * size * accumulation * ranks)
    indices: list[int] = []
    for _ in range(epochs):
        epoch = list(sampler)
        assert len(epoch) == len(sampler) and all(len(batch) == size for batch in epoch)
        indices += [index for batch in epoch for index in batch]
        done["steps"] += steps
    assert indices == list(range(epochs * steps * accumulation * ranks * size))


def test_an_epoch_is_padded_with_new_samples_not_repeated_ones() -> None:
    """accelerate loops back to the first samples to fill the last round of batches; whole batches leave it nothing."""
    plan = plan_of(window=1, weights=(1, 0))
    found = batches_of_ranks(plan, 2, 4, 14)  # 56 samples for 50 rows: rounded up to whole steps of 8
    seen = [place for rank in found for batch in rank for place in batch]
    assert sorted(seen) == sorted(expected(plan, 0, 56))
    assert len(set(expected(plan, 0, 50))) == 50  # the pass itself is complete first
    # Nor does it loop back where a loader is short of a batch: the odd one is dropped, nothing is repeated.
    found = batches_of_ranks(plan, 2, 2, 15)
    assert sorted(place for rank in found for batch in rank for place in batch) == sorted(expected(plan, 0, 28))


# --- skipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "skipped"), [(1, 100_000), (1, 1_000_000), (2, 500_000)])
def test_skipping_reads_no_rows(ranks: int, skipped: int) -> None:
    """accelerate skips a million batches on the sampler alone, for every rank, and goes on at the right sample."""
    plan, size = plan_of(), 4
    new, old = Rows("new", NEW), Rows("old", OLD)
    sampler = PlanBatchSampler(size, ranks * (skipped + 3), lambda: 0)
    for rank in range(ranks):
        loader = DataLoader(PlanDataset(plan, [new, old]), batch_sampler=sampler, collate_fn=torch_free)
        prepared = prepare_data_loader(
            loader, device=torch.device("cpu"), num_processes=ranks, process_index=rank, put_on_device=False
        )
        new.reads = old.reads = 0
        found = [batch["at"] for batch in skip_first_batches(prepared, skipped)]
        assert new.reads + old.reads == 3 * size
        starts = [(ranks * (skipped + m) + rank) * size for m in range(3)]
        assert found == [expected(plan, start, start + size) for start in starts]


def torch_free(features: list[Any]) -> dict[str, Any]:
    return {"at": places(features)}


def test_a_resumed_epoch_goes_on_where_it_stopped() -> None:
    """Starting the third epoch at its beginning and skipping two of its batches: the rest of that epoch."""
    plan, size, batches = plan_of(), 4, 6
    loader = DataLoader(
        PlanDataset(plan, [Rows("new", NEW), Rows("old", OLD)]),
        batch_sampler=PlanBatchSampler(size, batches, lambda: 2 * size * batches),
        collate_fn=torch_free,
    )
    rest = [place for batch in skip_first_batches(loader, 2) for place in batch["at"]]
    assert rest == expected(plan, 2 * size * batches + 2 * size, 3 * size * batches)


# --- counting loss-bearing tokens -------------------------------------------------------------------


def brute_force(labels: list[list[int]], shifts: bool) -> list[int]:
    """Labels that are not −100, the first of each row aside where the model shifts: it has no position before it."""
    return [sum(label != -100 for label in row[1 if shifts else 0 :]) for row in labels]


LABEL_ROWS = st.lists(
    st.lists(st.one_of(st.just(-100), st.integers(0, 9)), min_size=1, max_size=9), min_size=1, max_size=6
)


@PROPERTY
@given(LABEL_ROWS, st.booleans(), st.booleans())
def test_loss_tokens_of_padded_rows(rows: list[list[int]], shifts: bool, left: bool) -> None:
    """(batch, sequence), padded with −100 on either side."""
    width = max(map(len, rows))
    padded = [[-100] * (width - len(row)) + row if left else row + [-100] * (width - len(row)) for row in rows]
    found = loss_tokens({"labels": torch.tensor(padded)}, [len(row) for row in rows], shifts)
    assert found is not None
    # Left padding: the first real token has a padding position before it, from which the model does predict it.
    assert found.tolist() == brute_force(padded, shifts)


@PROPERTY
@given(LABEL_ROWS, st.booleans())
def test_loss_tokens_of_flattened_rows(rows: list[list[int]], shifts: bool) -> None:
    """(1, N) from transformers' own flattening collator, which puts −100 where a feature begins."""
    features = [{"input_ids": [1] * len(row), "labels": row} for row in rows]
    batch = DataCollatorWithFlattening()(features)
    assert batch["labels"].shape == (1, sum(map(len, rows)))
    found = loss_tokens(batch, [len(row) for row in rows], shifts)
    assert found is not None and found.tolist() == brute_force(rows, shifts=True)


@PROPERTY
@given(LABEL_ROWS)
def test_loss_tokens_of_shifted_labels(rows: list[list[int]]) -> None:
    """`shift_labels` are the labels one place earlier: nothing more is dropped, and they come before `labels`."""
    width = max(map(len, rows))
    padded = [row + [-100] * (width - len(row)) for row in rows]
    shifted = [[*row[1:], -100] for row in padded]
    batch = {"shift_labels": torch.tensor(shifted), "labels": torch.zeros(len(rows), width, dtype=torch.long)}
    for shifts in (True, False):
        found = loss_tokens(batch, [len(row) for row in rows], shifts)
        assert found is not None and found.tolist() == brute_force(padded, shifts=True)


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        ({}, [3]),
        ({"labels": [[1, 2, 3]]}, [3]),
        ({"labels": torch.tensor([0, 1])}, [3, 3]),
        ({"labels": torch.zeros(1, 7, dtype=torch.long)}, [3, 3]),
        ({"labels": torch.zeros(1, 6, dtype=torch.long)}, [3, None]),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, [3, 0]),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, [4, 4]),
    ],
    ids=["no labels", "no tensor", "classes", "padded flat row", "unknown length", "empty feature", "other rows"],
)
def test_loss_tokens_unknown(batch: dict[str, Any], lengths: list[int | None]) -> None:
    """Where tokens cannot be told apart the answer is None, not a guess."""
    assert loss_tokens(batch, lengths, shifts=True) is None


# --- collating --------------------------------------------------------------------------------------

VOCABULARY = 64
DATA = [{"input_ids": [5 + (r * 7 + j) % 50 for j in range(4 + r % 5)]} for r in range(NEW)]
OTHER = [{"input_ids": [10 + r] * (3 + r % 4)} for r in range(OLD)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate([*special, *(f"w{k}" for k in range(5, VOCABULARY))])}
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        **dict(zip(names, special, strict=True)),
    )


def dataset_of(plan: SamplePlan, new: Any = DATA, old: Any = OTHER) -> PlanDataset:
    return PlanDataset(plan, [new, old])


def collator_of(
    collator: Callable[..., Any], shifts: bool = True, vocabulary: int | None = VOCABULARY
) -> PlanCollator:
    return PlanCollator(collator, ["new", "old"], vocabulary, shifts)


def noisy(features: list[Any]) -> dict[str, Any]:
    """A collator that draws from all three global generators."""
    return {
        "input_ids": torch.tensor([feature["input_ids"][:3] for feature in features]),
        "noise": torch.rand(len(features), 3),
        "more": [random.random(), float(np.random.rand())],
    }


def test_counts_are_those_of_the_plan(tokenizer: PreTrainedTokenizerFast) -> None:
    """Samples, tokens and loss-bearing tokens of each source, worked out from the rows."""
    plan = plan_of()
    for collator, shifts in (
        (DataCollatorForLanguageModeling(tokenizer, mlm=False), True),
        (DataCollatorForLanguageModeling(tokenizer, mlm=False), False),
        (DataCollatorWithFlattening(), True),
    ):
        batch = collator_of(collator, shifts)(dataset_of(plan).__getitems__(range(30, 70)))
        by_hand = [[0] * 5, [0] * 5]
        for i in range(30, 70):
            row = (DATA, OTHER)[plan[i].source][plan[i].row]["input_ids"]
            by_hand[plan[i].source][0] += 1
            by_hand[plan[i].source][1] += len(row)
            by_hand[plan[i].source][3] += len(row) - shifts
        assert batch[COUNTS].dtype == torch.int64 and batch[COUNTS].tolist() == by_hand


def test_unknown_tokens_are_counted_as_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    plan = plan_of()
    batch = collator_of(DataCollatorWithPadding(tokenizer))(dataset_of(plan).__getitems__(range(0, 24)))
    assert isinstance(batch, BatchEncoding)
    read = [
        sum(len((DATA, OTHER)[k][plan[i].row]["input_ids"]) for i in range(24) if plan[i].source == k) for k in (0, 1)
    ]
    assert batch[COUNTS].tolist() == [[18, read[0], 0, 0, 18], [6, read[1], 0, 0, 6]]


def test_ids_beyond_the_embeddings_are_refused_with_source_and_rows() -> None:
    """One bad row in the old data: the message names its source, the row, the id and the number of embeddings."""
    plan = plan_of()
    bad = [dict(row) for row in OTHER]
    at = next(i for i in range(100) if plan[i].source == 1)
    bad[plan[at].row] = {"input_ids": [1, 99, 2]}
    collate = collator_of(DataCollatorWithFlattening())
    with pytest.raises(ValueError) as caught:
        collate(dataset_of(plan, old=bad).__getitems__(range(at, at + 1)))
    for part in ("token id 99", f"{VOCABULARY} embeddings", "old", f"rows {plan[at].row}", "tokenizer"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="token id 99") as caught:
        collate(dataset_of(plan, old=bad).__getitems__(range(at, at + 8)))
    for i in range(at, at + 8):
        assert plan.sources[plan[i].source].name in str(caught.value) and str(plan[i].row) in str(caught.value)


@pytest.mark.parametrize(("token", "refused"), [(-1, True), (0, False), (VOCABULARY - 1, False), (VOCABULARY, True)])
def test_the_range_of_ids_is_exact(token: int, refused: bool) -> None:
    plan = plan_of()
    rows = [{"input_ids": [3, token], "labels": [3, 3]}] * NEW
    features = dataset_of(plan, rows, rows).__getitems__(range(4))
    if refused:
        with pytest.raises(ValueError, match=f"token id {token},"):
            collator_of(default_data_collator)(features)
    else:
        assert collator_of(default_data_collator)(features)["input_ids"].max() == max(token, 3)
    assert collator_of(default_data_collator, vocabulary=None)(features)["input_ids"].shape == (4, 2)


def test_collators_that_return_no_mapping_and_features_of_no_plan() -> None:
    plan = plan_of()
    assert collator_of(lambda features: "anything")(dataset_of(plan).__getitems__(range(2))) == "anything"
    with pytest.raises(TypeError, match="PlanDataset"):
        collator_of(default_data_collator)([{"input_ids": [1]}])


@pytest.mark.parametrize("kind", ["mlm", "noisy"])
def test_random_collators_depend_on_the_position_alone(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Masks and noise of a batch: the same whatever ran before, others at another place or under another seed."""

    def made() -> Callable[..., Any]:
        return noisy if kind == "noisy" else DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5)

    def collated(plan: SamplePlan, start: int, collator: PlanCollator) -> str:
        batch = collator(dataset_of(plan).__getitems__(range(start, start + 6)))
        values = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in dict(batch).items()}
        return repr({k: values[k] for k in values if k != "input_ids" or kind == "mlm"})

    plan, shared = plan_of(), collator_of(made())
    in_order = [collated(plan, start, shared) for start in range(0, 60, 6)]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert [collated(plan, start, shared) for start in range(54, -6, -6)] == in_order[::-1]
    assert collated(plan, 30, collator_of(made())) == in_order[5]  # a new process has a new collator
    assert len(set(in_order)) == len(in_order)
    # The same rows (`original` keeps them) under another seed of the plan.
    twins = [
        SamplePlan((Source("new", NEW, order="original"), Source("old", OLD)), seed=seed, window=8) for seed in (1, 2)
    ]
    assert collated(twins[0], 0, collator_of(made())) != collated(twins[1], 0, collator_of(made()))


def test_a_collator_with_a_generator_of_its_own_is_not_let_through(tokenizer: PreTrainedTokenizerFast) -> None:
    """`DataCollatorForLanguageModeling(seed=...)` draws from a generator that goes on from batch to batch: after a
    resume it would mask other tokens. It must be made a function of position, or refused."""
    plan = plan_of()
    features = dataset_of(plan).__getitems__(range(6))
    try:
        collate = collator_of(DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5, seed=3))
        first, again = collate(features), collate(features)
    except (ValueError, TypeError):
        return
    assert torch.equal(first["labels"], again["labels"]) and torch.equal(first["input_ids"], again["input_ids"])


def test_collating_leaves_the_global_generators_alone() -> None:
    plan = plan_of()
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    collator_of(noisy)(dataset_of(plan).__getitems__(range(6)))
    with pytest.raises(KeyError):
        collator_of(lambda features: {torch.rand(1): features[0]["absent"]})(dataset_of(plan).__getitems__(range(6)))
    after = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    assert after[0] == states[0]
    assert after[1][0] == states[1][0] and np.array_equal(after[1][1], states[1][1]) and after[1][2:] == states[1][2:]
    assert torch.equal(after[2], states[2])


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_workers_collate_alike(workers: int) -> None:
    """Noise, counts and order through worker processes: equal to collating here, batch by batch."""
    plan, collate = plan_of(), collator_of(noisy)
    loader = DataLoader(
        dataset_of(plan),
        batch_sampler=PlanBatchSampler(4, 8, lambda: 100),
        num_workers=workers,
        collate_fn=collate,
    )
    for number, batch in enumerate(loader):
        here = collate(dataset_of(plan).__getitems__(range(100 + 4 * number, 104 + 4 * number)))
        assert torch.equal(batch["noise"], here["noise"]) and batch["more"] == here["more"]
        assert torch.equal(batch["input_ids"], here["input_ids"]) and torch.equal(batch[COUNTS], here[COUNTS])
    assert number == 7
