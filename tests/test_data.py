"""Looking at data before training: samples of rows, ids, tokenizer identity and overlap, against brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_pretrain_ext.data import (
    columns,
    copied_rows,
    id_range,
    ngram_hashes,
    sample_rows,
    token_rows,
    tokenizer_fingerprint,
)

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in rows]


# --- sample_rows ------------------------------------------------------------------------------------


@PROPERTY
@given(st.one_of(st.integers(0, 3000), st.integers(0, 2**62)), st.integers(1, 1500), st.integers(0, 2**40))
def test_sampled_rows_are_distinct_sorted_and_in_range(num_rows: int, size: int, seed: int) -> None:
    rows = sample_rows(num_rows, size, seed)
    assert len(rows) == len(set(rows)) == min(num_rows, size)
    assert rows == sorted(rows) and all(type(row) is int and 0 <= row < num_rows for row in rows)
    assert rows == sample_rows(num_rows, size, seed)


def test_sampled_rows_follow_the_seed_and_default_to_a_thousand() -> None:
    assert len(sample_rows(10**9)) == 1000 and sample_rows(10**9) == sample_rows(10**9, seed=0)
    assert sample_rows(10**9, seed=1) != sample_rows(10**9)
    assert sample_rows(1000) == list(range(1000)) and sample_rows(1001) != list(range(1000))
    # Written down once: a probe must read the same rows under every version.
    assert sample_rows(10**6, 4) == [56473, 192172, 403631, 946184]


@pytest.mark.parametrize(("num_rows", "size"), [(40, 10), (1500, 300), (100_000, 50)])
def test_every_row_is_sampled_alike(num_rows: int, size: int) -> None:
    """Over seeds, each tenth of the rows gets its share (chi-square, five standard deviations)."""
    chosen = np.concatenate([sample_rows(num_rows, size, seed) for seed in range(400)])
    observed = np.bincount(chosen * 10 // num_rows, minlength=10)
    expected = len(chosen) / 10
    assert ((observed - expected) ** 2 / expected).sum() < 9 + 5 * math.sqrt(18) + 5


# --- columns, token_rows, id_range ------------------------------------------------------------------


def test_columns() -> None:
    assert columns(Dataset.from_dict({"input_ids": [[1]], "text": ["a"]})) == {"input_ids", "text"}
    assert columns([{"input_ids": [1], "labels": [1]}]) == {"input_ids", "labels"}
    assert columns([(1, 2)]) == set()


@PROPERTY
@given(st.lists(st.lists(st.integers(0, 2**40), max_size=6), min_size=1, max_size=8), st.data())
def test_token_rows_are_the_rows(rows: list[list[int]], data: st.DataObject) -> None:
    """Ragged or not, empty rows included, from `datasets` and from plain lists, in the order asked for."""
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    plain: list[dict[str, Any]] = [{"input_ids": row, "text": "x"} for row in rows]
    for dataset in (Dataset.from_dict({"input_ids": rows, "text": ["x"] * len(rows)}), plain):
        found = token_rows(dataset, wanted)
        assert [ids.tolist() for ids in found] == [rows[row] for row in wanted]
        assert all(ids.dtype == np.int64 and ids.ndim == 1 for ids in found)


def test_token_rows_of_data_without_ids() -> None:
    assert token_rows([{"text": "a"}, {"input_ids": [3]}], [0, 1])[0].tolist() == [3]
    assert token_rows(Dataset.from_dict({"text": ["a"]}), [0]) == []
    assert token_rows([("a", "b")], [0]) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([[]], None),
        ([[], [5]], (5, 5)),
        ([[3, 9, 4], [7]], (3, 9)),
        ([[0], [-1, 2]], (-1, 2)),
        ([[2**40, 1]], (1, 2**40)),
    ],
)
def test_id_range(rows: list[list[int]], expected: tuple[int, int] | None) -> None:
    assert id_range(arrays(rows)) == expected


# --- overlap ----------------------------------------------------------------------------------------


def brute_force(held_out: list[list[int]], other: list[list[int]], n: int, share: float) -> tuple[int, int]:
    """Rows found whole, and rows of which one other row has `share` of the n-grams, by comparing lists."""

    def grams(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[at : at + n]) for at in range(len(row) - n + 1)}

    whole = [bool(row) and row in other for row in held_out]
    near = [
        len(ours) >= n and any(len(ours & grams(theirs)) >= share * len(ours) for theirs in other)
        for ours in map(grams, held_out)
    ]
    return sum(whole), sum(there and not copy for there, copy in zip(near, whole, strict=True))


FEW_IDS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6)


@PROPERTY
@given(FEW_IDS, FEW_IDS, st.integers(1, 5), st.sampled_from([0.25, 0.5, 1.0]))
def test_copied_rows_are_what_comparing_finds(
    held_out: list[list[int]], other: list[list[int]], n: int, share: float
) -> None:
    assert copied_rows(arrays(held_out), arrays(other), n, share) == brute_force(held_out, other, n, share)
    assert len(ngram_hashes(arrays(held_out), n)) == len(
        {tuple(row[at : at + n]) for row in held_out for at in range(len(row) - n + 1)}
    )


def test_copied_rows_at_thirteen_grams() -> None:
    """Blocks of 128 of a text, held out and trained on at offsets that differ: 116 13-grams a block."""
    text = np.random.default_rng(0).integers(0, 50_000, 128 * 40)
    blocks = list(text[: 128 * 20].reshape(20, 128))
    for offset in range(1, 128):
        # Of the two blocks that a copy lies in, the larger part has at least 64 tokens, so 52 13-grams: 45 %.
        held_out = [text[at + offset : at + offset + 128] for at in range(0, 128 * 10, 128)]
        assert copied_rows(held_out, blocks) == (0, 10)
    assert copied_rows(blocks[:7], blocks) == (7, 0)
    assert copied_rows(blocks, list(text[128 * 20 :].reshape(20, 128))) == (0, 0)
    assert copied_rows(blocks, [row[::-1] for row in blocks]) == (0, 0)


def test_what_every_row_has_is_no_copy() -> None:
    """A licence of 40 tokens that begins every row of 128: 28 of 116 13-grams. And rows of nothing but padding."""
    generator = np.random.default_rng(0)
    licence = generator.integers(0, 50_000, 40)
    rows = [np.concatenate([licence, generator.integers(0, 50_000, 88)]) for _ in range(40)]
    assert copied_rows(rows[:20], rows[20:]) == (0, 0)
    assert copied_rows([np.zeros(64, dtype=np.int64)], [np.zeros(65, dtype=np.int64)]) == (0, 0)


def test_ngrams_of_many_ids_do_not_collide() -> None:
    """Every 3-gram of 60 ids next to each other and far apart: as many hashes as n-grams."""
    ids = [*range(40), *(2**31 + k for k in range(10)), *(10**9 * k for k in range(1, 11))]
    grams = [np.array([a, b, c]) for a in ids for b in ids[::4] for c in ids[::6]]
    assert len(ngram_hashes(grams, 3)) == len(grams)


# --- tokenizers -------------------------------------------------------------------------------------


def tokenizer_of(words: list[str], **settings: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **settings)


WORDS = ["[UNK]", "alpha", "beta", "gamma", "größe", "δ"]


def test_fingerprints_of_equal_vocabularies_are_equal(tmp_path: Path) -> None:
    """Made again, saved and loaded, as a path, in a processor, and by entries in another order."""
    tokenizer = tokenizer_of(WORDS, model_max_length=64)
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint == tokenizer_fingerprint(tokenizer_of(WORDS))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint
    assert tokenizer_fingerprint(str(tmp_path)) == fingerprint
    assert tokenizer_fingerprint(SimpleNamespace(tokenizer=tokenizer)) == fingerprint
    backwards = dict(reversed(list(tokenizer.get_vocab().items())))
    assert tokenizer_fingerprint(SimpleNamespace(get_vocab=lambda: backwards)) == fingerprint
    assert json.dumps(fingerprint)  # goes into settings


def test_fingerprints_of_other_vocabularies_differ() -> None:
    """Two ids swapped, a word more, a word less, another word, an added special token, an id left out."""
    swapped = [*WORDS[:2], WORDS[3], WORDS[2], *WORDS[4:]]
    renamed = [*WORDS[:-1], "ε"]
    added = tokenizer_of(WORDS)
    added.add_special_tokens({"pad_token": "[PAD]"})
    others = [tokenizer_of(words) for words in (WORDS, swapped, [*WORDS, "more"], WORDS[:-1], renamed)]
    gap = {word: number + (number > 2) for number, word in enumerate(WORDS)}
    apart = SimpleNamespace(get_vocab=lambda: gap)
    assert len({tokenizer_fingerprint(each) for each in [*others, added, apart]}) == 7
