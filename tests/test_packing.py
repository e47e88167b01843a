"""Packing: blocks against a slow reference, text that looks like control tokens, the cache, accounts and errors."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Sequence, Value, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hf_pretrain_ext import packing
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.packing import PackedCollator, PackReport, pack

CORPUS = [
    "the cat sat on the mat",
    "a dog ran away </s> now",
    "hello hello [SEP] world",
    "[CLAD <s> a[CLSEPAD]otsn",
] * 20
EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, vocab_size=300)


def documents(*ids: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": list(ids)}, features=Features({"input_ids": List(Value("int64"))}))


def texts(*rows: str | None) -> Dataset:
    return Dataset.from_dict({"text": list(rows)}, features=Features({"text": Value("string")}))


def slow_blocks(docs: list[list[int]], size: int, isolate: bool, pad: bool) -> list[tuple[list[int], list[int]]]:
    """`input_ids` and `position_ids` of every block, token by token."""
    stream = []
    for ids in docs:
        closed = ids if not ids or ids[-1] == EOS else [*ids, EOS]
        stream += [(token, place == 0) for place, token in enumerate(closed)]
    blocks = []
    for begin in range(0, len(stream), size):
        part = stream[begin : begin + size]
        position, positions = 0, []
        for place, (_, opens) in enumerate(part):
            if place == 0 or (opens and isolate):
                position = 0
            positions.append(position)
            position += 1
        missing = size - len(part)
        if not missing or pad:
            blocks.append(([token for token, _ in part] + [EOS] * missing, positions + [0] * missing))
    return blocks


# Blocks


def test_blocks_computed_by_hand(tokenizer: Any) -> None:
    docs = documents([5, 6], [], [7, 8, 9, 10], [11, EOS])
    # The stream: 5 6 . | 7 8 9 10 . | 11 .   cut into fours, 2 left over.
    rows, report = pack(docs, tokenizer, 4, return_report=True)
    assert rows["input_ids"][:] == [[5, 6, 0, 7], [8, 9, 10, 0]]
    assert rows["position_ids"][:] == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert rows["seq_lengths"][:] == [[3, 1], [4]]
    assert report == PackReport(
        documents=4,
        empty_documents=1,
        text_tokens=7,
        bos_tokens=0,
        eos_tokens=3,
        blocks=2,
        block_size=4,
        kept=8,
        dropped=2,
        padded=0,
    )
    rows, report = pack(docs, tokenizer, 4, remainder="pad", return_report=True)
    assert rows[2] == {"input_ids": [11, 0, 0, 0], "position_ids": [0, 1, 0, 0], "seq_lengths": [2, 1, 1]}
    assert (report.blocks, report.kept, report.dropped, report.padded) == (3, 10, 0, 2)
    rows = pack(docs, tokenizer, 4, isolate=False)
    assert rows["input_ids"][:] == [[5, 6, 0, 7], [8, 9, 10, 0]]
    assert rows["position_ids"][:] == [[0, 1, 2, 3]] * 2 and rows["seq_lengths"][:] == [[4]] * 2
    assert set(rows.column_names) == {"input_ids", "position_ids", "seq_lengths"} and rows.format["type"] is None


@settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    docs=st.lists(st.lists(st.integers(0, 250), max_size=12), min_size=1, max_size=30),
    size=st.integers(2, 11),
    isolate=st.booleans(),
    pad=st.booleans(),
    chunk=st.sampled_from([1, 7, 40, packing.CHUNK]),
)
def test_blocks_match_the_slow_reference(
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    docs: list[list[int]],
    size: int,
    isolate: bool,
    pad: bool,
    chunk: int,
) -> None:
    # Small chunks give the worker one document at a time: blocks then reach over many batches, and batches hold none.
    monkeypatch.setattr(packing, "CHUNK", chunk)
    expected = slow_blocks(docs, size, isolate, pad)
    arguments: dict[str, Any] = {"isolate": isolate, "remainder": "pad" if pad else "drop", "return_report": True}
    if not expected:
        with pytest.raises(ValueError, match="fill no block"):
            pack(documents(*docs), tokenizer, size, **arguments)
        return
    rows, report = pack(documents(*docs), tokenizer, size, **arguments)
    assert list(zip(rows["input_ids"][:], rows["position_ids"][:], strict=True)) == expected
    for lengths, positions in zip(rows["seq_lengths"][:], rows["position_ids"][:], strict=True):
        assert [place for length in lengths for place in range(length)] == positions
    assert report.text_tokens + report.bos_tokens + report.eos_tokens == report.kept + report.dropped
    assert report.blocks * report.block_size == report.kept + report.padded
    assert (report.documents, report.empty_documents) == (len(docs), docs.count([]))
    assert report.eos_tokens == sum(bool(ids) for ids in docs)
    assert report.text_tokens == sum(len(ids) - (ids[-1] == EOS) for ids in docs if ids)


def test_the_stream_is_that_of_trl(tokenizer: Any) -> None:
    trl = pytest.importorskip("trl")
    generator = np.random.default_rng(0)
    docs = [[*generator.integers(1, 200, generator.integers(1, 30)).tolist(), EOS] for _ in range(200)]
    theirs = trl.pack_dataset(documents(*docs), 16, strategy="wrapped")["input_ids"][:]
    ours = pack(documents(*docs), tokenizer, 16)["input_ids"][:]
    assert ours == theirs[: len(ours)] and len(theirs) - len(ours) <= 1


@pytest.mark.parametrize("seed", [None, 5])
def test_any_number_of_processes_gives_the_same_blocks(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.setattr(packing, "CHUNK", 64)
    words = ["word " * (1 + 7 * number % 40) for number in range(60)] + ["long " * 400, "", "end"]
    found = []
    for number in (None, 1, 2, 4):
        # A folder, hence a cache, each: datasets reads back what another number of processes wrote.
        texts(*words).save_to_disk(str(tmp_path / str(number)))
        docs = load_from_disk(str(tmp_path / str(number)))
        rows = pack(docs, tokenizer, 50, seed=seed, num_proc=number, remainder="pad")
        assert len(rows.cache_files) == (number or 1)
        found.append(rows[:])
    assert len(found[0]["input_ids"]) > 20
    assert all(other == found[0] for other in found[1:])


def test_a_seed_shuffles_documents_and_loses_none(tokenizer: Any) -> None:
    docs = documents(*[[number, number] for number in range(1, 100)])
    kept, first, again, other = (pack(docs, tokenizer, 3, seed=seed) for seed in (None, 0, 0, 1))
    order = [row[0] for row in kept["input_ids"][:]]
    assert order == list(range(1, 100))
    shuffled = [row[0] for row in first["input_ids"][:]]
    assert shuffled != order and sorted(shuffled) == order
    assert first[:] == again[:] != other[:]
    assert all(row[0] == row[1] and row[2] == EOS for row in first["input_ids"][:])


def test_selected_rows_formats_and_other_columns(tokenizer: Any) -> None:
    plain = texts("one", "two", "three")
    expected = pack(plain, tokenizer, 4)[:]
    table = texts("three", "no", "one", "two").add_column("meta", [1, 2, 3, 4]).select([2, 3, 0]).with_format("torch")
    assert pack(table, tokenizer, 4)[:] == expected
    renamed = plain.rename_column("text", "body")
    assert pack(renamed, tokenizer, 4, text_column="body")[:] == expected
    large = plain.cast(Features({"text": Value("large_string")}))
    assert pack(large, tokenizer, 4)[:] == expected


@pytest.mark.parametrize("kind", [List(Value("int32")), Sequence(Value("int64"), length=3), List(Value("uint16"))])
def test_token_ids_of_any_width(tokenizer: Any, kind: Any) -> None:
    docs = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 0]]}, features=Features({"input_ids": kind}))
    rows = pack(docs, tokenizer, 7)
    assert rows["input_ids"][:] == [[1, 2, 3, 0, 4, 5, 0]]


def test_positions_of_long_blocks_do_not_wrap(tokenizer: Any) -> None:
    size = (1 << 15) + 10
    rows = pack(documents([1] * (size + 5)), tokenizer, size)
    assert rows[0]["position_ids"] == list(range(size))
    rows = pack(documents([1] * (1 << 16)), tokenizer, 1 << 15)
    assert [row["position_ids"] for row in rows] == [list(range(1 << 15))] * 2


# Tokenizers


def wrapped(backend: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def byte_level() -> PreTrainedTokenizerFast:
    made = train_tokenizer(CORPUS, vocab_size=300)
    made.split_special_tokens = False  # as tokenizers come from the Hub
    return made


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    made = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, made)
    return wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return wrapped(
        backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", eos_token="[SEP]"
    )


def llama_like() -> PreTrainedTokenizerFast:
    """Begins texts with BOS and ends them with EOS by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return wrapped(backend, bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


MAKERS = [byte_level, unigram, word_piece, llama_like, byte_tokenizer]


@pytest.mark.parametrize("maker", MAKERS)
def test_control_tokens_in_text_stay_text(maker: Callable[[], Any]) -> None:
    made = maker()
    control = [token for token in made.all_special_tokens if token != made.unk_token]
    numbers = set(made.convert_tokens_to_ids(control))
    text = "the cat " + "".join(f"{token} sat{token}on {token}{token} " for token in control) + "the mat"
    # As tokenizers are usually called, they are read out of the text.
    assert numbers <= set(made(text, add_special_tokens=False)["input_ids"])
    rows, report = pack(texts(text, "a dog"), made, 2, remainder="pad", return_report=True)
    ids = [number for row in rows["input_ids"] for number in row]
    first, rest = ids[: ids.index(made.eos_token_id)], ids[ids.index(made.eos_token_id) + 1 :]
    began = maker is llama_like
    assert (first[0] == made.bos_token_id) is began
    assert not numbers & set(first[began:])
    if maker in (byte_level, llama_like):  # no vocabulary finds them by itself: the text is encoded in one piece
        assert first[began:] == made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decoded = made.decode(first[began:], skip_special_tokens=False)
    if maker in (unigram, word_piece):  # which lose spaces by themselves
        decoded, text = ("".join(line.replace("##", "").replace("▁", "").split()) for line in (decoded, text))
    assert decoded == text
    assert rest[began : len(rest) - report.padded] == [
        *made("a dog", add_special_tokens=False)["input_ids"],
        made.eos_token_id,
    ]


def test_split_special_tokens_alone_would_not_do() -> None:
    made = unigram()
    call = made("x </s> y", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert made.eos_token_id in call
    # Compatibility characters that the normalizer turns into the token's string are found as well.
    for text in ("x </s> y", "x ＜/s＞ y", "</s></s>", "</s>"):
        rows, report = pack(texts(text), made, 2, remainder="pad", return_report=True)
        ids = [number for row in rows["input_ids"] for number in row][: report.kept]
        assert ids.count(made.eos_token_id) == report.eos_tokens == 1 and ids[-1] == made.eos_token_id


def test_control_tokens_that_only_their_role_makes_such() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = wrapped(backend, unk_token="?")
    made.eos_token = "[SEP]"
    assert made("a [SEP]", split_special_tokens=True)["input_ids"] == [0, 1]
    # Also where they come first in a text, or alone: "[" and "SEP]" are unknown words here.
    rows = pack(texts("a", "[SEP] a", "a [SEP]", "[SEP]"), made, 13)
    assert rows["input_ids"][:] == [[0, 1, 2, 2, 0, 1, 0, 2, 2, 1, 2, 2, 1]]


def test_a_control_token_of_one_character_cannot_be_text() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "¶": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = wrapped(backend, eos_token="¶", unk_token="?")
    with pytest.raises(ValueError, match=r"control token '¶' of the text 'a ¶ a'. Take it out of the documents"):
        pack(texts("a", "a ¶ a"), made, 2)


@pytest.mark.parametrize("maker", MAKERS)
def test_plain_text_is_tokenized_as_by_the_tokenizer(maker: Callable[[], Any]) -> None:
    made = maker()
    lines = ["the cat sat", "a dog", "hello world on the mat"]
    rows, report = pack(texts(*lines), made, 2, remainder="pad", return_report=True)
    bos = [made.bos_token_id] if maker is llama_like else []
    expected = []
    for ids in made(lines, add_special_tokens=False)["input_ids"]:
        expected += [*bos, *ids, made.eos_token_id]
    assert [number for row in rows["input_ids"] for number in row][: report.kept] == expected
    assert report.bos_tokens == 3 * len(bos) and report.eos_tokens == 3
    assert report.text_tokens == len(expected) - report.bos_tokens - 3


def test_a_tokenizer_that_appends_eos_gets_one() -> None:
    made = llama_like()
    bos, eos = made.bos_token_id, made.eos_token_id
    assert made("a")["input_ids"][0] == bos and made("a")["input_ids"][-1] == eos
    rows = pack(texts("a", "a"), made, 3)
    assert [(row[0], row[2]) for row in rows["input_ids"][:]] == [(bos, eos)] * 2
    # Its own ids, with both, are left as they are.
    again = pack(Dataset.from_dict({"input_ids": made(["a", "a"])["input_ids"]}), made, 3)
    assert again["input_ids"][:] == rows["input_ids"][:]


def test_what_calls_left_in_the_tokenizer_cuts_nothing_and_stays() -> None:
    made = byte_level()
    expected = pack(texts("the cat sat on the mat " * 3), made, 4)[:]
    made(["a", "the cat sat"], truncation=True, max_length=2, padding="max_length")
    before = made.backend_tokenizer.to_str()
    assert pack(texts("the cat sat on the mat " * 3), made, 4)[:] == expected
    assert made.backend_tokenizer.to_str() == before and not made.backend_tokenizer.encode_special_tokens


def test_padding_is_the_pad_token_where_there_is_one() -> None:
    made = word_piece()
    assert pack(texts("the"), made, 9, remainder="pad")[0]["input_ids"][-1] == made.pad_token_id != made.eos_token_id
    made = llama_like()
    assert pack(texts("the"), made, 9, remainder="pad")[0]["input_ids"][-1] == made.eos_token_id


def test_missing_and_empty_texts_leave_nothing(tokenizer: Any) -> None:
    rows, report = pack(texts(None, "cat", "", "cat"), tokenizer, 2, return_report=True, remainder="pad")
    assert (report.documents, report.empty_documents, report.eos_tokens) == (4, 2, 2)
    assert [number for row in rows["input_ids"] for number in row][: report.kept] == 2 * [
        *tokenizer("cat")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_the_account_is_said(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pack(documents([5, 6], [], [7, 8, 9, 10]), tokenizer, 3)
    said = capsys.readouterr().err
    assert (
        "3 documents (1 empty) in 2 blocks of 3 tokens: 6 of text, 0 BOS, 2 EOS; 6 kept, 2 dropped, 0 padded" in said
    )
    made = byte_level()
    made.model_max_length = 2
    pack(documents([5, 6]), made, 3)
    assert "block_size=3 is above the tokenizer's model_max_length=2" in capsys.readouterr().err


# The cache


def test_a_second_process_finds_everything_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, names = str(tmp_path / "texts"), str(tmp_path / "tokenizer")
    texts(*["the cat sat on the mat " * 5] * 40).save_to_disk(source)
    byte_level().save_pretrained(names)

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in Path(source).glob("*.arrow")}

    made = AutoTokenizer.from_pretrained(names)
    made(["the", "the cat"], padding=True, truncation=True, max_length=1)  # what was called before must not matter
    at_first = len(files())
    rows = pack(load_from_disk(source), made, 16)
    assert len(files()) == at_first + 2  # tokens, blocks
    pack(load_from_disk(source), made, 32)
    pack(load_from_disk(source), made, 16, seed=1)
    assert len(files()) == at_first + 4  # blocks only
    pack(load_from_disk(source), made, 16, num_proc=2)
    before = files()
    script = f"""
import sys
sys.modules["trl"] = None  # an import of it would fail
from datasets import load_from_disk
from transformers import AutoTokenizer
from hf_pretrain_ext.packing import pack
made = AutoTokenizer.from_pretrained({names!r})
for settings in ({{}}, {{"seed": 1}}, {{"num_proc": 2}}):
    rows = pack(load_from_disk({source!r}), made, 16, **settings)
    print(rows.cache_files[0]["filename"])
"""
    ran = subprocess.run([*warm.python(), "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert files() == before
    assert ran.stdout.splitlines()[0] == rows.cache_files[0]["filename"]
    # Another revision of our code reads back nothing that this one wrote.
    monkeypatch.setattr(packing, "REVISION", packing.REVISION + 1)
    pack(load_from_disk(source), made, 16)
    assert len(files()) == len(before) + 2


# The collator


def test_the_collator_makes_the_form_that_isolates(tokenizer: Any) -> None:
    rows = pack(documents([5, 6], [7, 8, 9, 10], [11]), tokenizer, 4, remainder="pad")
    batch = PackedCollator()([rows[0], rows[2]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 4) for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7], [11, 0, 0, 0]]
    # A document's first token is predicted by nothing, and padding is asked of nothing.
    assert batch["labels"].tolist() == [[-100, 6, 0, -100], [-100, 0, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]


def test_the_collator_takes_what_trainers_leave(tokenizer: Any) -> None:
    rows = pack(documents([5, 6], [7, 8, 9, 10]), tokenizer, 4)
    whole = PackedCollator()(list(rows))
    for left in (rows.remove_columns("seq_lengths"), rows.remove_columns("position_ids"), rows.with_format("torch")):
        batch = PackedCollator()(list(left))
        assert all(torch.equal(batch[name], whole[name]) for name in whole) and set(batch) == set(whole)
    flat = PackedCollator(flatten=True)(list(rows))
    assert all(torch.equal(flat[name], whole[name].reshape(1, -1)) for name in whole)
    own = rows.map(lambda row: {"labels": [-100, -100, *row["input_ids"][2:]]})
    assert PackedCollator()(list(own))["labels"].tolist() == [[-100, -100, 0, -100], [-100, -100, 10, 0]]


def test_without_isolation_the_loss_crosses_documents(tokenizer: Any) -> None:
    rows = pack(documents([5, 6], [7, 8, 9, 10]), tokenizer, 4, isolate=False)
    batch = PackedCollator()(list(rows))
    assert batch["labels"].tolist() == [[-100, 6, 0, 7], [-100, 9, 10, 0]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"input_ids": [1, 2]}], r"came with \['input_ids'\] only.*remove_unused_columns=False"),
        ([{"input_ids": [1, 2], "seq_lengths": [3]}], "row of 3 tokens came with 2 input_ids.*max_length=None"),
        ([{"input_ids": [1] * n, "seq_lengths": [n]} for n in (2, 3)], r"rows of \[2, 3\] tokens.*one block_size"),
    ],
)
def test_the_collator_refuses_rows_that_would_leak(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCollator()(features)


# Errors


def no_eos() -> PreTrainedTokenizerFast:
    return wrapped(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), unk_token="?")


SPLITS = DatasetDict({"train": texts("a"), "test": texts("b")})
STREAM = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": SPLITS}, TypeError, r"got DatasetDict. Take one split, as in dataset\['train'\].*'test'"),
        ({"dataset": STREAM}, TypeError, "got IterableDataset. Write the stream to disk first.*from_generator"),
        ({"dataset": [{"text": "a"}]}, TypeError, "must be a datasets.Dataset, got list. Load one"),
        ({"dataset": texts()}, ValueError, "dataset has no rows"),
        ({"dataset": texts("", None)}, ValueError, "all documents together have 0 tokens"),
        ({"text_column": "body"}, ValueError, r"text_column='body' is no column of the dataset, which has \['text'\]"),
        ({"dataset": Dataset.from_dict({"text": [1]})}, ValueError, "column 'text' must hold strings, got int64"),
        ({"dataset": Dataset.from_dict({"input_ids": [1]})}, ValueError, "must hold lists of token ids, got int"),
        ({"dataset": Dataset.from_dict({"input_ids": [["a"]]})}, ValueError, "must hold lists of token ids, got list"),
        ({"dataset": documents([1, 999])}, ValueError, "ids from 1 to 999, but the tokenizer has [0-9]+ tokens"),
        ({"dataset": documents([-1, 2])}, ValueError, "ids from -1 to 2"),
        ({"tokenizer": "gpt2"}, TypeError, "got str. Load it with AutoTokenizer.from_pretrained"),
        ({"tokenizer": no_eos()}, ValueError, "eos_token=None.*tokenizer.eos_token ="),
        ({"block_size": 1}, ValueError, "block_size must be an integer from 2 on, got 1"),
        ({"block_size": 8.0}, ValueError, "block_size must be an integer from 2 on, got 8.0"),
        ({"block_size": None}, ValueError, "block_size must be an integer from 2 on, got None"),
        (
            {"block_size": 10_000},
            ValueError,
            "block_size=10,000, but all documents together have .* smaller block_size",
        ),
        ({"num_proc": 0}, ValueError, "num_proc must be an integer from 1 on or None, got 0"),
        ({"num_proc": True}, ValueError, "num_proc must be an integer from 1 on or None, got True"),
        ({"seed": -1}, ValueError, "seed must be an integer from 0 on or None, got -1"),
        ({"isolate": "no"}, ValueError, "isolate must be True or False, got 'no'"),
        ({"remainder": "keep"}, ValueError, "remainder must be 'drop' or 'pad', got 'keep'"),
    ],
)
def test_errors_name_the_argument_and_the_fix(
    tokenizer: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"dataset": texts("the cat sat"), "tokenizer": tokenizer, "block_size": 4, **changes}
    with pytest.raises(error, match=message):
        pack(**arguments)
