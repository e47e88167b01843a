"""Control tokens without a Trainer: blocks written out by hand and by a plain loop, hostile text, inference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metadata import byte_level, rows_of, unigram, with_bos
from transformers import ByT5Tokenizer

from hf_pretrain_ext.demo.tokenizer import END_OF_TEXT
from hf_pretrain_ext.metadata import (
    BlockStream,
    ControlTokens,
    MissingMetadata,
    Template,
    condition,
    generate,
    prepare,
    prepare_views,
)
from hf_pretrain_ext.metadata.inference import prompt_ids
from hf_pretrain_ext.packing import pack
from hf_pretrain_ext.vocabulary import fit_embeddings

_ = None  # a label that bears no loss
G, B = "<|good|>", "<|bad|>"


def control(thresholds: Any = 0.5, **given: Any) -> ControlTokens:
    return ControlTokens(thresholds, **{"drop": 0.0, **given})


def words(text: str) -> list[str]:
    """Splits behind spaces and loses nothing."""
    return [part + " " for part in text.split(" ")[:-1]] + [text.split(" ")[-1]]


# Oracles


def test_oracle_documents() -> None:
    """Byte-level, no BOS: the token is repeated where a document goes on; without a score there is none."""
    documents = [{"text": "abcdef", "score": 0.1}, {"text": "gh", "score": 0.9}, {"text": "ij", "score": None}]
    end = END_OF_TEXT
    assert rows_of(byte_level(), documents, 6, None, control=control()) == [
        ([G, *"abcde"], [_, *"abcde"], [6]),
        ([G, "f", end, B, "g", end], [_, "f", end, _, "g", _], [3, 2, 1]),
        ([B, "h", end, "i", "j", end], [_, "h", end, _, "j", end], [3, 3]),
    ]
    # A loss of control tokens too, where something stands before them: here nothing does.
    assert rows_of(byte_level(), documents[:1], 6, None, control=control(loss=True))[0][1] == [_, *"abcde"]
    assert rows_of(byte_level(), documents[:2], 6, None, control=control(), overflow="discard") == [
        ([G, *"abcde"], [_, *"abcde"], [6]),
        ([B, "g", "h", end, end, end], [_, "g", "h", end, _, _], [4, 1, 1]),
    ]


def test_oracle_segments_from_a_column_behind_metadata() -> None:
    documents = [
        {"parts": ["ab", "", "c"], "score": [0.0, 0.0, 1.0], "at": "p"},
        {"parts": ["defgh", "ab"], "score": [2.0, None], "at": "u"},
        {"parts": None, "score": None, "at": "p"},
    ]
    given: dict[str, Any] = {"control": control(segments="parts")}
    first = ["<s>", "p", ":", G, "a", "b", B, "c", "</s>"]
    assert rows_of(with_bos(), documents, 12, "{at}:", **given) == [
        ([*first, *["<pad>"] * 3], [_, _, _, _, "a", "b", _, "c", "</s>", _, _, _], [9, 1, 1, 1]),
        (["<s>", "u", ":", B, *"defghab", "</s>"], [_, _, _, _, *"defghab", "</s>"], [12]),
    ]
    # The second part lacks a score: what goes on in it repeats none.
    assert rows_of(with_bos(), documents, 10, "{at}:", **given)[1:] == [
        (["<s>", "u", ":", B, *"defgha"], [_, _, _, _, *"defgha"], [10]),
        (["<s>", "u", ":", "b", "</s>", *["<pad>"] * 5], [_, _, _, "b", "</s>", *[_] * 5], [5, *[1] * 5]),
    ]
    # Asked for, a loss on control tokens of the text.
    with_loss = rows_of(with_bos(), documents, 12, "{at}:", control=control(segments="parts", loss=True))
    assert with_loss[0][1] == [_, _, _, G, "a", "b", B, "c", "</s>", _, _, _]
    # Plain: the parts joined and tokenized as one text.
    assert rows_of(with_bos(), documents, 12, "{at}:", **given, conditioned=False) == [
        (["<s>", *"abc", "</s>", "<s>", *"defgha"], [_, *"abc", "</s>", _, *"defgha"], [5, 7]),
        (["<s>", "b", "</s>", *["<pad>"] * 9], [_, "b", "</s>", *[_] * 9], [3, *[1] * 9]),
    ]


def test_a_control_token_never_ends_a_block() -> None:
    documents = [{"parts": ["abc", "def"], "score": [0.0, 1.0]}]
    given: dict[str, Any] = {"control": control(segments="parts")}
    # G a b c | B d e f E: five tokens would end with the token of the second part.
    assert [tokens for tokens, _labels, _lengths in rows_of(byte_level(), documents, 6, None, **given)] == [
        [G, *"abc", B, "d"],
        [B, "e", "f", END_OF_TEXT, END_OF_TEXT, END_OF_TEXT],
    ]
    parts = [{"parts": ["abcd", "efg"], "score": [0.0, 1.0]}]
    assert [tokens for tokens, _labels, _lengths in rows_of(byte_level(), parts, 6, None, **given)] == [
        [G, *"abcd", END_OF_TEXT],
        [B, *"efg", END_OF_TEXT, END_OF_TEXT],
    ]


def test_oracle_a_function_that_splits_and_a_number_for_all() -> None:
    """Each segment is a text of its own, with a word mark; text that spells a token becomes its characters."""
    documents = [{"text": "ab c", "score": 0.0}, {"text": "</s>a", "score": 3.0}]
    escaped = ["▁", "<", "▁", "/", "s", ">"]
    assert rows_of(unigram(), documents, 16, None, control=control(segments=words)) == [
        (
            [G, "▁ab", "▁", G, "▁", "c", "</s>", B, *escaped, "a", "</s>"],
            [_, "▁ab", "▁", _, "▁", "c", "</s>", _, *escaped, "a", "</s>"],
            [7, 9],
        )
    ]


# A plain loop over tokens


def reference(
    documents: list[tuple[list[int], list[tuple[int | None, list[int]]]]], size: int, overflow: str, eos: int, pad: int
) -> list[tuple[list[int], list[int]]]:
    """Documents (head, segments) to blocks of ids and labels, a token at a time."""
    blocks: list[tuple[list[int], list[int]]] = []
    for head, segments in documents:
        stream: list[tuple[int, bool, int | None]] = []  # id, whether it is a control token, that of its segment
        for token, ids in segments:
            if ids:
                stream += [(token, True, None)] if token is not None else []
                stream += [(number, False, token) for number in ids]
        if not stream:
            continue
        stream.append((eos, False, stream[-1][2]))
        while stream:
            own = [*head, *([stream[0][2]] if stream[0][2] is not None and at_middle(stream, segments) else [])]
            room = size - len(blocks[-1][0]) - len(own) if blocks else 0
            taken = stream[: max(room, 0)]
            if len(stream) - len(taken) == 1 and overflow == "split" and taken:
                taken = taken[:-1]
            if taken and len(taken) < len(stream) and taken[-1][1]:
                taken = taken[:-1]
            if len(taken) < min(2, len(stream)) or not taken:
                blocks.append(([], []))
                continue
            ids, labels = blocks[-1]
            first = len(ids)
            ids += [*own, *(number for number, _control, _segment in taken)]
            labels += [-100] * len(own) + [-100 if is_control else number for number, is_control, _ in taken]
            labels[first] = -100
            stream = [] if overflow == "discard" else stream[len(taken) :]
    return [(ids + [pad] * (size - len(ids)), labels + [-100] * (size - len(labels))) for ids, labels in blocks]


def at_middle(stream: list[tuple[int, bool, int | None]], segments: list[tuple[int | None, list[int]]]) -> bool:
    """Whether what is left of a document begins inside a segment: then its control token is not among it."""
    left = len(stream) - 1  # without EOS
    whole = 0
    for token, ids in reversed([segment for segment in segments if segment[1]]):
        whole += len(ids) + (token is not None)
        if left <= whole:
            return left < whole or (left == whole and token is None)
    raise AssertionError


PARTS = st.lists(st.tuples(st.text("abcde", max_size=9), st.sampled_from([0.0, 1.0, 2.0, None])), max_size=5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(PARTS, min_size=1, max_size=8),
    st.integers(0, 12),
    st.sampled_from(["split", "discard"]),
    st.booleans(),
    st.booleans(),
)
def test_blocks_are_those_of_a_plain_loop(parts: list[Any], more: int, overflow: Any, bos: bool, line: bool) -> None:
    size = more + {0: 5, 1: 6, 2: 7, 3: 8}[bos + 2 * line]  # the shortest that are allowed
    tokenizer = with_bos() if bos else byte_level()
    if not any(text and score is not None for document in parts for text, score in document):
        return
    documents = Dataset.from_list(
        [{"parts": [text for text, _s in part], "score": [score for _t, score in part], "at": "x"} for part in parts]
    ).cast_column("parts", Dataset.from_dict({"a": [["b"]]}).features["a"])
    given: dict[str, Any] = {"control": control([0.5, 1.0], tokens=[G, B, "<|worse|>"], segments="parts")}
    template = "{at}:" if line else None
    rows, report = prepare(documents, tokenizer, size, template, overflow=overflow, return_report=True, **given)
    ids = tokenizer.convert_tokens_to_ids([G, B, "<|worse|>"])
    chosen = {0.0: ids[0], 1.0: ids[1], 2.0: ids[2], None: None}

    def encoded(text: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(sign) for sign in text]

    head = ([tokenizer.bos_token_id] if bos else []) + (encoded("x:") if line else [])
    expected = reference(
        [(head, [(chosen[score], encoded(text)) for text, score in document]) for document in parts],
        size,
        overflow,
        tokenizer.eos_token_id,
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    assert [(row["input_ids"], row["labels"]) for row in rows] == expected
    # Nothing is lost, and every token is of one kind.
    assert report.text_tokens + report.eos_tokens == report.kept + report.dropped
    parts_of = report.kept + report.bos_tokens + report.metadata_tokens + report.control_tokens + report.padded
    assert parts_of == report.blocks * size and report.blocks == len(rows)
    assert report.control_tokens == sum(number in ids for row in rows["input_ids"] for number in row)
    full = [(text, score) for document in parts for text, score in document if text]
    assert (report.segments, report.missing_scores) == (len(full), sum(score is None for _t, score in full))
    assert not any(label in ids for row in rows["labels"] for label in row)
    assert all(any(label != -100 for label in labels[1:]) for labels in rows["labels"])
    # The same blocks of a stream.
    stream = BlockStream(documents.to_list(), tokenizer, size, template, overflow=overflow, **given)
    streamed = iter(stream)
    assert [next(streamed) for _row in rows] == rows.to_list()


def test_scores_choose_tokens_with_the_threshold_on_the_lower_side() -> None:
    chosen = control([-1.0, 0.0], tokens=["<a>", "<b>", "<c>"]).choose
    scores = [-2.0, -1.0, -0.999, 0.0, 1e-9, float("inf"), float("-inf"), float("nan"), None]
    assert chosen(scores).tolist() == [0, 0, 1, 1, 2, 2, 0, -1, -1]


# Dropping


def scored(number: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    documents = tiny.documents(number, seed)
    return documents.add_column("score", [draw.random() for _row in range(number)])


@pytest.mark.parametrize("segments", [None, words])
def test_tokens_are_dropped_by_key(segments: Any) -> None:
    documents = scored(2000)
    found = []
    for seed in (1, 1, 2):
        tokenizer = tiny.tokenizer()
        made = control(drop=0.1, segments=segments)
        rows, report = prepare(documents, tokenizer, 64, None, control=made, seed=seed, return_report=True)
        found.append(rows["input_ids"][:])
        assert 150 < report.without_control < 250 and report.segments == 2000  # 200, and a standard deviation of 13
        assert report.padded + report.kept + report.control_tokens == 64 * report.blocks
    assert found[0] == found[1] != found[2]


def test_a_stream_drops_as_many() -> None:
    tokenizer = tiny.tokenizer()
    stream = BlockStream(scored(2000), tokenizer, 64, None, control=control(drop=0.1), seed=3, overflow="discard")
    ids = tokenizer.convert_tokens_to_ids([G, B])
    blocks = []
    with pytest.raises(Exception, match="ran dry"):
        blocks.extend(iter_into(blocks, stream))
    count = sum(number in ids for block in blocks for number in block["input_ids"])
    assert 1750 < count < 1850


def iter_into(kept: list[Any], stream: BlockStream) -> Any:
    for block in stream:
        kept.append(block)
    return []


def test_views_of_disjoint_documents() -> None:
    """The plain view has neither metadata nor control tokens, and texts that the other does not have."""
    documents, tokenizer = scored(300), tiny.tokenizer()
    made = control(segments=words, drop=0.2)
    views = prepare_views(
        documents, tokenizer, 32, "{domain} ", plain_blocks=lambda blocks: blocks // 3, control=made, seed=4
    )
    ids = set(tokenizer.convert_tokens_to_ids([G, B]))
    assert not any(ids & set(row) for row in views.plain["input_ids"])
    assert sum(bool(ids & set(row)) for row in views.conditioned["input_ids"]) > 0.9 * len(views.conditioned)
    assert views.plain_report.documents + views.conditioned_report.documents == 300
    assert views.plain_report.control_tokens == views.plain_report.segments == 0
    assert views.conditioned_report.without_control > 0


def test_blocks_do_not_depend_on_processes(tmp_path: Path) -> None:
    scored(500, 3).save_to_disk(tmp_path / "documents")
    documents = load_from_disk(tmp_path / "documents")
    for segments in (None, words):
        given: dict[str, Any] = {"control": control(drop=0.3, segments=segments), "seed": 5}
        one = prepare(documents, tiny.tokenizer(), 32, "{domain} ", **given)
        three = prepare(documents, tiny.tokenizer(), 32, "{domain} ", num_proc=3, **given)
        assert one.to_dict() == three.to_dict()
        again = prepare(documents, tiny.tokenizer(), 32, "{domain} ", **given)
        assert [file["filename"] for file in again.cache_files] == [file["filename"] for file in one.cache_files] != []


# Text stays text


def slow() -> ByT5Tokenizer:
    """Written in Python: what is added to it comes before all else."""
    return ByT5Tokenizer(extra_ids=0)


@pytest.mark.parametrize("make", [byte_level, with_bos, unigram, slow])
def test_text_that_spells_a_control_token_stays_text(make: Any) -> None:
    """In documents, segments and metadata, alone, cut in two by segments, and in a token that was added before."""
    tokenizer = make()
    spelled = "a<|good|><|bad|>b<|good|>"
    documents = Dataset.from_list(
        [
            {"text": spelled, "at": "<|bad|>", "parts": [spelled, "<|good", "|>"], "score": 0.0},
            {"text": "<|good|>", "at": "x", "parts": ["<|bad|>"], "score": 1.0},
        ]
    )
    for segments in (None, "parts"):
        rows = prepare(documents, tokenizer, 256, "{at}:", control=control(segments=segments))
        ids = tokenizer.convert_tokens_to_ids([G, B])
        found = [number for row in rows["input_ids"] for number in row if number in ids]
        assert found == ([ids[0]] * 3 + [ids[1]] if segments else ids)
        assert not any(label in ids for row in rows["labels"] for label in row)
    byte = byte_level()
    rows = prepare(documents, byte, 256, None, control=control())
    assert byte.decode(rows[0]["input_ids"]).startswith(f"{G}{spelled}{END_OF_TEXT}{B}{G}{END_OF_TEXT}")
    # Plain data of the same corpus, with the tokens in the tokenizer by now.
    ids = byte.convert_tokens_to_ids([G, B])
    for plain in (prepare(documents, byte, 64, conditioned=False), pack(documents, byte, 64, remainder="pad")):
        assert not any(number in ids for row in plain["input_ids"] for number in row)


# What is refused


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"thresholds": "a"}, "thresholds must be a number or a list of them, got 'a'"),
    ({"thresholds": []}, "thresholds must be a number or a list"),
    ({"thresholds": None}, "thresholds must be a number or a list"),
    ({"thresholds": [1, 1]}, r"each above the one before, got \[1, 1\]"),
    ({"thresholds": [float("nan")]}, "thresholds must be finite numbers"),
    ({"thresholds": [0, 1]}, r"tokens must be one more than thresholds: 3 for \[0, 1\], got \['<\|good\|>'"),
    ({"tokens": [G, G]}, "more than once"),
    ({"tokens": [G, ""]}, "without white space at their ends"),
    ({"tokens": "<a>"}, "tokens must be a list of texts"),
    ({"column": ""}, "column must be the name of a column of scores, got ''"),
    ({"segments": 3}, "segments must be the name of a column, a function"),
    ({"segments": ""}, "segments must be the name of a column, a function"),
    ({"drop": 1}, "drop of ControlTokens must be the share .* below 1, got 1"),
    ({"drop": True}, "drop of ControlTokens must be the share"),
    ({"missing": "constant"}, r"missing of ControlTokens must be one of \('plain', 'error'\), got 'constant'"),
    ({"loss": 1}, "loss must be True or False, got 1"),
]


@pytest.mark.parametrize(("settings_", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_settings_are_named(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control(**settings_)


UNFIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"score": [None, float("nan")]}, "no text of the dataset gets a control token: the column 'score' holds no"),
    ({"column": "toxicity"}, {}, r"take the columns \['toxicity'\], but the dataset has no \['toxicity'\]"),
    ({}, {"score": ["high", "low"]}, "column 'score' of row 0 holds 'high', and a score is a number"),
    ({}, {"score": [True, False]}, "column 'score' of row 0 holds True, and a score is a number"),
    ({}, {"score": [[1.0, 2.0], [1.0]]}, "row 0 holds 2 scores for one document. Say what they are scores of"),
    ({"segments": words}, {"score": [[1.0], [1.0]]}, "row 1 holds 1 scores for 2 segments"),
    ({"segments": "parts"}, {}, r"segments='parts' is no column of the dataset, which has \['text', 'score'\]"),
    ({"segments": "text"}, {}, "the column 'text' must hold lists of texts, got string"),
    ({"segments": str.split}, {}, r"split row 1 into \['c', 'd'\], which joined are not its text 'c d'"),
    ({"segments": lambda text: [text, 3]}, {}, "which joined are not its text 'ab'"),
    ({"missing": "error"}, {"score": [1.0, None]}, r"row 1 has no score \(column 'score'\). Fill it in"),
    ({"tokens": [G, END_OF_TEXT]}, {}, "tokens has '<|endoftext|>', which the tokenizer has as its pad_token"),
    ({"tokens": [G, "a"]}, {}, r"tokens has \['a'\], which the tokenizer knows as ordinary text"),
]


@pytest.mark.parametrize(("settings_", "columns", "message"), UNFIT, ids=range(len(UNFIT)))
def test_data_that_does_not_fit_is_named(settings_: dict[str, Any], columns: dict[str, Any], message: str) -> None:
    documents = Dataset.from_dict({"text": ["ab", "c d"], "score": [0.0, 1.0], **columns})
    tokenizer = byte_level()
    error = MissingMetadata if "no score" in message else ValueError
    with pytest.raises(error, match=message.replace("|", r"\|") if "endoftext" in message else message):
        prepare(documents, tokenizer, 16, None, control=control(**settings_))


def test_what_streams_lack_is_named() -> None:
    def read(row: dict[str, Any], **given: Any) -> None:
        next(iter(BlockStream([row], byte_level(), 16, None, control=control(**given))))

    with pytest.raises(ValueError, match=r"\['score'\] is no column of row 0 of the stream.*scores or segments"):
        read({"text": "ab"})
    with pytest.raises(ValueError, match=r"\['parts'\] is no column of row 0"):
        read({"text": "ab", "score": 1}, segments="parts")
    with pytest.raises(ValueError, match="text_column='text' is no column of row 0"):
        read({"body": "ab", "score": 1})
    with pytest.raises(ValueError, match="row 0 holds 'ab', and segments are a list of texts"):
        read({"parts": "ab", "score": 1}, segments="parts")


def test_small_blocks_and_other_kinds_are_refused() -> None:
    documents = scored(5)
    with pytest.raises(ValueError, match="a block of 4 tokens is too short for 1 before each text"):
        prepare(documents, byte_level(), 4, None, control=control())
    with pytest.raises(ValueError, match=r"control must be ControlTokens, got 0\.5"):
        prepare(documents, byte_level(), 16, None, control=0.5)  # type: ignore[arg-type]


def test_a_token_of_the_chat_template_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="which the tokenizer has as its part of the chat template"):
        prepare(scored(5), tokenizer, 16, None, control=control(tokens=["<|im_start|>", B]))


# Saved and loaded


def test_settings_are_saved_with_a_model(tmp_path: Path) -> None:
    given = control([0.5, 2], tokens=["<a>", "<b>", "<c>"], column="meta.score", segments="parts", drop=0.2, loss=True)
    given.save(tmp_path)
    assert ControlTokens.load(tmp_path) == given
    assert json.loads((tmp_path / "control_tokens.json").read_text()) == given.to_json()
    (tmp_path / "control_tokens.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds no control tokens: neither control_tokens\.json nor 'control_tokens'"
    ):
        ControlTokens.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"control_tokens": given.to_json()}))
    assert ControlTokens.load(tmp_path) == given
    # A function is not saved: at inference nothing is split.
    assert ControlTokens.from_json(control(segments=words).to_json()) == control()
    (tmp_path / "control_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no control tokens that can be read"):
        ControlTokens.load(tmp_path)


# Inference


def test_prompts() -> None:
    tokenizer = with_bos()
    prepare(Dataset.from_list([{"text": "ab", "score": 1.0}]), tokenizer, 16, None, control=control())
    ids = prompt_ids(tokenizer, "ab<|bad|>", "{at}:", control=G, at="p")
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["<s>", "p", ":", G, "a", "b"]
    assert tokenizer.convert_tokens_to_ids(B) not in ids
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "", control=B)) == ["<s>", B]
    text = condition("ab", "{at}:", control=G, at="p")
    assert text == "p:<|good|>ab" and tokenizer(text)["input_ids"] == prompt_ids(
        tokenizer, "ab", "{at}:", control=G, at="p"
    )
    with pytest.raises(
        ValueError, match=r"control must be a special token of the tokenizer, one of \['</s>', .*'<x>'"
    ):
        prompt_ids(tokenizer, "ab", control="<x>")
    with pytest.raises(ValueError, match="neither a template nor control="):
        condition("ab")
    with pytest.raises(ValueError, match=r"values for \['at'\], but no template"):
        condition("ab", control=G, at="p")
    with pytest.raises(ValueError, match="control must be the text of a control token"):
        condition("ab", control=3)  # type: ignore[arg-type]


def test_generation_with_and_without_control_tokens_in_the_output() -> None:
    tokenizer = byte_level()
    prepare(Dataset.from_list([{"text": "ab", "score": 1.0}]), tokenizer, 16, None, control=control())
    ids = tokenizer.convert_tokens_to_ids([G, B])
    model = tiny.model(vocabulary=257)
    fit_embeddings(model, tokenizer, ids)
    seen: list[list[int]] = []

    def prefer(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        seen.append(kwargs["input_ids"][0].tolist())
        output.logits[..., ids[1]] = 100.0  # would always be written
        return output

    model.register_forward_hook(prefer, with_kwargs=True)
    told = generate(model, tokenizer, "ab", control=G, max_new_tokens=4, do_sample=False)
    assert seen[0] == [ids[0], *tokenizer("ab")["input_ids"]]
    assert B not in tokenizer.decode(tokenizer(told)["input_ids"]) and not {ids[1]} & {row[-1] for row in seen[1:]}
    seen.clear()
    generate(model, tokenizer, "ab", control=G, max_new_tokens=4, do_sample=False, forbid_control_tokens=False)
    assert [row[-1] for row in seen[1:]] == [ids[1]] * 3


def test_the_reports_say_it(caplog: pytest.LogCaptureFixture) -> None:
    documents = Dataset.from_dict({"text": ["ab", "cd", "ef"], "score": [0.1, None, 0.9]})
    _rows, report = prepare(documents, byte_level(), 16, None, control=control(), return_report=True)
    assert str(report).endswith("; 2 control tokens for 3 texts (1 lack a score, 0 had theirs dropped)")


def test_iterable_datasets_and_nested_scores() -> None:
    rows = [{"text": "ab", "meta": {"score": 0.1}}, {"text": "cd", "meta": {"score": 0.9}}]
    tokenizer = byte_level()
    made = control(column="meta.score")
    stream = BlockStream(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, 8, None, control=made)
    block = next(iter(stream))
    assert tokenizer.decode(block["input_ids"]) == f"{G}ab{END_OF_TEXT}{B}cd{END_OF_TEXT}"
    assert prepare(Dataset.from_list(rows), tokenizer, 8, None, control=made)[0] == block


def test_metadata_by_default_only_without_control_tokens() -> None:
    documents = scored(20).remove_columns("url")
    prepare(documents, tiny.tokenizer(), 32, control=control())
    with pytest.raises(ValueError, match=r"takes the columns \['url'\]"):
        prepare(documents, tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match=r"takes the columns \['url'\]"):
        prepare(documents, tiny.tokenizer(), 32, Template(), control=control())


def test_layout_arrays_are_compact() -> None:
    """What the calling process holds of a segment: where it starts, and its token."""
    from hf_pretrain_ext.metadata.marking import mark
    from hf_pretrain_ext.packing import tokenized

    documents, tokenizer = scored(10), tiny.tokenizer()
    ids = control().add_to(tokenizer)
    marked = mark(documents, tokenized(documents, "text", tokenizer)[0], control(), ids, 0, 0, None)
    assert (marked.starts.dtype, marked.tokens.dtype) == (np.int32, np.int16)
    assert torch.equal(torch.tensor(marked.body), torch.tensor([len(text) + 2 for text in documents["text"]]))
