"""Metadata conditioning without a Trainer: blocks written out by hand, hostile values, layouts, prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_pretrain_ext.demo.tokenizer import END_OF_TEXT, train_tokenizer
from hf_pretrain_ext.metadata import (
    EXTRACTORS,
    BlockStream,
    ControlTokens,
    MissingMetadata,
    Template,
    condition,
    generate,
    prepare,
    prepare_views,
)
from hf_pretrain_ext.metadata.extract import clean
from hf_pretrain_ext.metadata.inference import _continued, prompt_ids
from hf_pretrain_ext.metadata.layout import lay_out
from hf_pretrain_ext.packing import pack

_ = None  # a label that bears no loss


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(["ab"], vocab_size=257)


def with_bos() -> PreTrainedTokenizerFast:
    """A token a character, and what Llama's does: BOS in front of every text."""
    tokens = ["<s>", "</s>", "<pad>", "<unk>", *"abcdefghpu:</s>x "]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def unigram() -> PreTrainedTokenizerFast:
    """As SentencePiece: a word mark in front of every text, control tokens among the words."""
    words = ["<unk>", "</s>", "▁x", "▁ab", "ab", "▁", *"abcx:</s>", "▁a", "c▁"]
    backend = Tokenizer(models.Unigram([(w, -float(n > 1)) for n, w in enumerate(dict.fromkeys(words))], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def rows_of(tokenizer: Any, documents: list[dict[str, Any]], size: int, template: Any, **given: Any) -> list[Any]:
    """Blocks as tokens, as tokens that bear a loss (else None), and as lengths of stretches."""
    rows = prepare(Dataset.from_list(documents), tokenizer, size, template, **given)
    assert all(
        p == [n for length in lengths for n in range(length)]
        for p, lengths in zip(rows["position_ids"], rows["seq_lengths"], strict=True)
    )
    found = []
    for row in rows:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        labels = [None if label == -100 else tokenizer.convert_ids_to_tokens(label) for label in row["labels"]]
        found.append((tokens, labels, row["seq_lengths"]))
    return found


def flat(rows: Dataset) -> list[int]:
    return [number for ids in rows["input_ids"] for number in ids]


def test_oracle_byte_level_without_bos() -> None:
    """Split with the metadata repeated; a last token alone is held back; what does not fit is padded."""
    documents = [
        {"text": "abcdefghijkl", "url": "http://x.org/p"},
        {"text": "mn", "url": "y.org"},
        {"text": "", "url": "z.org"},
        {"text": None, "url": "z.org"},
    ]
    end, head = END_OF_TEXT, ["x", ".", "o", "r", "g", "Ċ"]
    assert rows_of(byte_level(), documents, 12, "{domain}\n") == [
        ([*head, *"abcdef"], [_, _, _, _, _, _, *"abcdef"], [12]),
        ([*head, *"ghijk", end], [_, _, _, _, _, _, *"ghijk", _], [11, 1]),
        ([*head, "l", end, *[end] * 4], [_, _, _, _, _, _, "l", end, _, _, _, _], [8, 1, 1, 1, 1]),
        (["y", *head[1:], "m", "n", end, *[end] * 3], [_, _, _, _, _, _, "m", "n", end, _, _, _], [9, 1, 1, 1]),
    ]
    # The paper's rule: what does not fit is left out.
    assert rows_of(byte_level(), documents, 12, "{domain}\n", overflow="discard") == [
        ([*head, *"abcdef"], [_, _, _, _, _, _, *"abcdef"], [12]),
        (["y", *head[1:], "m", "n", end, *[end] * 3], [_, _, _, _, _, _, "m", "n", end, _, _, _], [9, 1, 1, 1]),
    ]
    # Plain: without BOS nothing predicts a first token.
    assert rows_of(byte_level(), documents, 12, "{domain}\n", conditioned=False) == [
        ([*"abcdefghijk", end], [_, *"bcdefghijk", _], [11, 1]),
        (["l", end, "m", "n", end, *[end] * 7], [_, end, _, "n", end, *[_] * 7], [2, 3, *[1] * 7]),
    ]


def test_oracle_with_bos() -> None:
    documents = [{"text": "ab", "at": "p"}, {"text": "cdefgh", "at": None}]
    template = Template("{at}:", constant="u")
    first = ["<s>", "p", ":", "a", "b", "</s>"]
    assert rows_of(with_bos(), documents, 10, template) == [
        ([*first, *["<pad>"] * 4], [_, _, _, "a", "b", "</s>", _, _, _, _], [6, 1, 1, 1, 1]),
        (["<s>", "u", ":", *"cdefgh", "</s>"], [_, _, _, *"cdefgh", "</s>"], [10]),
    ]
    # Without metadata for the second, its first three tokens fit behind the first document.
    plain = dataclasses.replace(template, missing="plain")
    assert rows_of(with_bos(), documents, 10, plain) == [
        ([*first, "<s>", *"cde"], [_, _, _, "a", "b", "</s>", _, *"cde"], [6, 4]),
        (["<s>", *"fgh", "</s>", *["<pad>"] * 5], [_, *"fgh", "</s>", *[_] * 5], [5, 1, 1, 1, 1, 1]),
    ]
    # Documents that see each other: one stretch a block, and the same labels.
    assert rows_of(with_bos(), documents, 10, plain, isolate=False)[0] == (
        [*first, "<s>", *"cde"],
        [_, _, _, "a", "b", "</s>", _, *"cde"],
        [10],
    )


def test_oracle_unigram() -> None:
    """The word mark stands before both parts; what looks like EOS in either becomes its characters."""
    documents = [{"text": "ab c", "at": "x"}, {"text": "</s>a", "at": "</s>"}]
    # Cut in its middle, each part of it is a text of its own, with a mark of its own.
    escaped = ["▁", "<", "▁", "/", "s", ">"]
    assert rows_of(unigram(), documents, 18, "{at}:") == [
        (
            ["▁x", ":", "▁ab", "▁", "c", "</s>", *escaped, ":", *escaped[:5]],
            [_, _, "▁ab", "▁", "c", "</s>", *[_] * 7, *escaped[:5]],
            [6, 12],
        ),
        (
            [*escaped, ":", ">", "a", *["</s>"] * 9],
            [*[_] * 7, ">", "a", "</s>", *[_] * 8],
            [10, *[1] * 8],
        ),
    ]


def test_plain_documents_are_those_of_pack() -> None:
    """The same tokens in the same documents; only where blocks begin differs."""
    documents = tiny.documents(50)
    plain = prepare(documents, byte_level(), 64, conditioned=False)
    packed = pack(documents, byte_level(), 64, remainder="pad")
    assert sum(label != -100 for row in plain["labels"] for label in row) == sum(
        position > 0 for row in plain["position_ids"] for position in row
    )
    texts = ["".join(byte_level().decode(ids).split(END_OF_TEXT)) for ids in (flat(plain), flat(packed))]
    assert texts[0] == texts[1] == "".join(documents["text"])


HOSTILE = [
    "<|endoftext|>",
    "a\n\nURL: b",
    "\u202ea\u2066b\u200f",
    "x" * 10**6,
    "\r\n\t",
    "\x00\x07\x1b[31m",
    "https://[::1",
    "https://user:pass@h.org:80<|endoftext|>/",
    "{domain}{0}%s",
    "URL: URL: ",
    "\ud800",
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "field", ["{url}", "{domain}", "{registered_domain}", "{url_suffix}", "{hashed_url}", "{raw}"]
)
def test_metadata_is_data(value: str, field: str) -> None:
    """Whatever stands in a column comes out as one short line without control signs, never as a control token."""
    tokenizer = byte_level()
    template = Template(f"at {field}\n", {"raw": "url"} if field == "{raw}" else {}, max_characters=40)
    line = template.render({"url": value})
    assert line is not None and line.startswith("at ") and line.endswith("\n") and len(line) <= 44
    inner = line[3:-1]
    assert "\n" not in inner and inner == clean(inner) and inner
    if value != "\ud800":  # Arrow holds no lone surrogates
        rows = prepare(Dataset.from_list([{"text": "a<|endoftext|>b", "url": value}]), tokenizer, 128, template)
        ids = rows[0]["input_ids"][: rows[0]["seq_lengths"][0]]
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == f"{line}a<|endoftext|>b"


ADDRESSES = [
    # url, domain, registered domain, suffix
    ("https://en.wikipedia.org/wiki/A?b=c#d", "en.wikipedia.org", "wikipedia.org", "org"),
    ("HTTP://WWW.BBC.co.uk./news", "www.bbc.co.uk", "bbc.co.uk", "co.uk"),
    ("news.bbc.co.uk", "news.bbc.co.uk", "bbc.co.uk", "co.uk"),
    ("//cdn.example.com/x", "cdn.example.com", "example.com", "com"),
    ("example.com:8080/a:b", "example.com", "example.com", "com"),
    ("ftp://user:secret@files.example.com:21/", "files.example.com", "example.com", "com"),
    ("https://bücher.example/ä", "xn--bcher-kva.example", "xn--bcher-kva.example", "example"),
    ("https://127.0.0.1:80/", "127.0.0.1", "127.0.0.1", None),
    ("http://[2001:db8::1]/x", "2001:db8::1", "2001:db8::1", None),
    ("example.com:8080/a//b", "example.com", "example.com", "com"),
    ("example.com:8080/?u=http://other.org/", "example.com", "example.com", "com"),
    ("user:secret@example.com//x", "example.com", "example.com", "com"),
    ("https:/example.com/x", None, None, None),
    ("", None, None, None),
    ("https://", None, None, None),
    (None, None, None, None),
]


@pytest.mark.parametrize(("address", "domain", "registered", "suffix"), ADDRESSES)
def test_extractors(address: str | None, domain: str | None, registered: str | None, suffix: str | None) -> None:
    assert EXTRACTORS["domain"](address) == domain
    assert EXTRACTORS["registered_domain"](address) == registered
    assert EXTRACTORS["url_suffix"](address) == suffix
    hashed = EXTRACTORS["hashed_url"](address)
    assert (hashed is None) == (domain is None)
    assert hashed is None or (
        len(hashed) == 16 and hashed == EXTRACTORS["hashed_url"](domain if ":" not in str(domain) else address)
    )


def test_addresses_without_a_scheme() -> None:
    full = EXTRACTORS["url"]
    assert full("//a.org/x") == full("https://a.org/x") == "a.org/x" and full("a.org:80//x") == "a.org:80//x"


def test_columns_with_dots_and_with_labels_and_fields_named_as_arguments() -> None:
    documents = Dataset.from_dict({"text": ["ab"], "meta": [{"u": "x"}], "topic": [1]})
    documents = documents.cast_column("topic", ClassLabel(names=["law", "tax"]))
    names = {"topic": ("topic", documents.features["topic"].int2str)}
    for given_ in (documents, documents.flatten()):
        for template, line in (
            (Template("{meta.u}: "), "x: "),
            (Template("{topic}: "), "1: "),
            (Template("{topic}: ", names), "tax: "),
        ):
            tokens = prepare(given_, byte_level(), 24, template)["input_ids"][0]
            assert byte_level().decode(tokens).startswith(f"{line}ab{END_OF_TEXT}")
    assert Template("{self} ").render({"self": "y"}) == Template("{self} ").format(self="y") == "y "
    assert condition("ab", "{self} ", self="y") == "y ab"
    assert Template("{control} ").render({"control": "y"}) == "y "
    with pytest.raises(ValueError, match=r"a field called control.*Pass values=\{'control': \.\.\.\} to generate"):
        condition("ab", "{control} ", control="y")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_format_of_the_stream_changes_nothing(kind: str) -> None:
    rows = {"text": ["abc"] * 9, "year": [2019] * 9, "score": [0.1] * 9}
    stream = Dataset.from_dict(rows).to_iterable_dataset()
    for given_ in ({"template": "{year}: "}, {"control": ControlTokens(0.5, drop=0.0)}):
        plain, other = (
            next(iter(BlockStream(each, byte_level(), 24, **given_))) for each in (stream, stream.with_format(kind))
        )
        assert plain == other


def test_templates_take_nested_columns_functions_and_several_fields() -> None:
    template = Template(
        "{site} {{{topic}}} {meta.year}\n",
        {"site": ("meta.url", "domain"), "topic": ("tags", lambda tags: tags[0].upper())},
    )
    row = {"meta": {"url": "https://a.org/b", "year": 2024}, "tags": ["law", "eu"]}
    assert template.render(row) == "a.org {LAW} 2024\n"
    documents = Dataset.from_list([{"text": "ab", **row}])
    tokens = prepare(documents, byte_level(), 64, template)["input_ids"][0]
    assert byte_level().decode(tokens[:23]) == "a.org {LAW} 2024\nab" + END_OF_TEXT * 4
    assert Template("{tags}: ").render(row) == "law, eu: "


def test_missing_metadata(tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": ["ab", "cd", "ef"], "at": ["x", None, " "]})
    _, report = prepare(documents, byte_level(), 16, "{at}:", return_report=True)
    assert (report.missing, report.conditioned_documents) == (2, 3)
    _, report = prepare(documents, byte_level(), 16, Template("{at}:", missing="plain"), return_report=True)
    assert (report.missing, report.conditioned_documents) == (2, 1)
    strict = Template("{at}:", missing="error")
    with pytest.raises(MissingMetadata, match=r"row 1 has no value for \['at'\] \(columns \['at'\]\)"):
        prepare(documents, byte_level(), 16, strict)
    with pytest.raises(MissingMetadata, match="row 1 has no value"):
        list(BlockStream(documents.to_iterable_dataset(), byte_level(), 16, strict))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(2, 70)), min_size=1, max_size=30),
    st.integers(16, 40),
    st.sampled_from(["split", "discard"]),
)
def test_layout(documents: list[tuple[int, int]], size: int, overflow: Any) -> None:
    heads, bodies = [head for head, _ in documents], [body for _, body in documents]
    pieces = lay_out(heads, bodies, size, overflow)
    filled = [0] * pieces.blocks
    at = [0] * len(documents)
    for document, start, length, block in zip(
        pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), pieces.block.tolist(), strict=True
    ):
        assert length >= 2 and start == at[document]
        at[document] += length
        filled[block] += heads[document] + length
    assert all(2 <= used <= size for used in filled)
    assert (pieces.document[1:] >= pieces.document[:-1]).all() and (pieces.block[1:] >= pieces.block[:-1]).all()
    if overflow == "split":
        assert at == bodies
    else:
        assert all(0 < placed <= body for placed, body in zip(at, bodies, strict=True))
        assert len(pieces.document) == len(documents)
    # A block is closed only where the next piece would not fit.
    for block in range(pieces.blocks - 1):
        following = int(pieces.document[pieces.block > block][0])
        assert size - filled[block] < heads[following] + 3


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(24, 60), st.sampled_from(["split", "discard"]), st.sampled_from([0.0, 0.5]))
def test_every_token_is_accounted_for(seed: int, size: int, overflow: Any, drop: float) -> None:
    rows, report = prepare(
        tiny.documents(30, seed),
        tiny.tokenizer(),
        size,
        "{domain} ",
        overflow=overflow,
        drop=drop,
        seed=seed,
        return_report=True,
    )
    assert report.text_tokens + report.eos_tokens == report.kept + report.dropped
    assert report.blocks * size == report.kept + report.bos_tokens + report.metadata_tokens + report.padded
    assert report.conditioned_documents + report.without_metadata + report.empty_documents == report.documents
    assert (overflow == "discard") or not report.dropped
    assert (drop > 0) or not report.without_metadata
    assert len(rows) == report.blocks
    # Never a block without loss: a batch of them would be 0/0.
    assert all(any(label != -100 for label in labels[1:]) for labels in rows["labels"])
    bearing = sum(label != -100 for labels in rows["labels"] for label in labels)
    headless = sum(
        1
        for row in rows
        for p, label in zip(row["position_ids"], row["labels"], strict=True)
        if p == 0 and label == -100
    )
    assert report.kept - headless <= bearing <= report.kept


@pytest.mark.parametrize("overflow", ["split", "discard"])
def test_blocks_do_not_depend_on_processes(overflow: Any, tmp_path: Path) -> None:
    tiny.documents(500, 3).save_to_disk(tmp_path / "documents")
    documents = load_from_disk(tmp_path / "documents")
    given: dict[str, Any] = {"template": "{domain} ", "overflow": overflow, "drop": 0.3, "seed": 5}
    one = prepare(documents, tiny.tokenizer(), 32, **given)
    three = prepare(documents, tiny.tokenizer(), 32, num_proc=3, **given)
    assert one.to_dict() == three.to_dict()
    again = prepare(documents, tiny.tokenizer(), 32, **given)
    assert [file["filename"] for file in again.cache_files] == [file["filename"] for file in one.cache_files] != []


def test_dropping_is_keyed() -> None:
    documents = tiny.documents(400)
    reports = [
        prepare(documents, tiny.tokenizer(), 64, "{domain} ", drop=0.25, seed=seed, return_report=True)[
            1
        ].without_metadata
        for seed in (1, 1, 2)
    ]
    assert reports[0] == reports[1] != reports[2]
    assert all(60 < number < 140 for number in reports)


def test_views_are_of_disjoint_documents() -> None:
    documents = Dataset.from_dict({"text": [f"{n:04d}abcdef" for n in range(300)], "url": ["a.io"] * 300})
    tokenizer = tiny.tokenizer()
    views = prepare_views(documents, tokenizer, 64, "{domain} ", plain_blocks=lambda blocks: blocks // 10, seed=4)
    found = []
    for view in (views.conditioned, views.plain):
        text = "".join(tokenizer.convert_ids_to_tokens(flat(view)))
        found.append({part for part in text.split("<eos>") if part})
    numbers = [
        {part[-10:-6] for part in found[0] if len(part) >= 10},
        {part[-10:-6] for part in found[1] if len(part) >= 10},
    ]
    assert not numbers[0] & numbers[1] and len(numbers[0]) > 200 and len(numbers[1]) > 20
    assert views.conditioned_report.documents + views.plain_report.documents == 300
    assert abs(len(views.plain) - (len(views.plain) + len(views.conditioned)) // 10) <= 1
    assert views.plain_report.metadata_tokens == 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"template": "{nothing} "}, r"takes the columns \['nothing'\], but the dataset has no \['nothing'\]"),
    ({"template": 7}, "template must be a string or a Template, got 7"),
    ({"template": "no field"}, "has no field in braces"),
    ({"template": "{a!r}"}, "a field is a name in braces"),
    ({"template": "{a"}, "Write a brace that is meant"),
    ({"block_size": 1}, "block_size must be an integer from 2 on, got 1"),
    ({"block_size": 7}, "the metadata of row 0 takes 4 tokens, more than half of a block of 7"),
    ({"overflow": "cut"}, "overflow must be one of .'split', 'discard'., got 'cut'"),
    ({"drop": 1}, "drop must be the share of documents .* below 1, got 1"),
    ({"isolate": 1}, "isolate must be True or False, got 1"),
    ({"conditioned": "no"}, "conditioned must be True or False, got 'no'"),
    ({"text_column": "body"}, "text_column='body' is no column of the dataset"),
    ({"num_proc": 0}, "num_proc must be an integer from 1 on or None, got 0"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_input_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(
            **{
                "dataset": tiny.documents(9),
                "tokenizer": tiny.tokenizer(),
                "block_size": 32,
                "template": "{domain}",
                **given,
            }
        )


def test_other_data_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dataset must be a datasets\.Dataset, got IterableDataset"):
        prepare(IterableDataset.from_generator(lambda: iter([{"text": "a"}])), tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match="Metadata goes before raw text"):
        prepare(tiny.rows(3), tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match="holds no text at all"):
        prepare(Dataset.from_dict({"text": ["", None], "url": ["a", "b"]}), tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match="too few for two views"):
        prepare_views(tiny.documents(1), tiny.tokenizer(), 32, "{domain} ", plain_blocks=lambda blocks: 1)


# Inference


def test_prompts_begin_as_training_did() -> None:
    for tokenizer in (byte_level(), with_bos(), unigram()):
        template = Template("{at}:")
        rows = prepare(Dataset.from_list([{"text": "ab c", "at": "</s>x"}]), tokenizer, 40, template)
        ids = prompt_ids(tokenizer, "ab c", template, at="</s>x")
        assert rows[0]["input_ids"][: len(ids) + 1] == [*ids, tokenizer.eos_token_id]
    assert condition("ab", template, at="x\ny") == "x y:ab"
    with pytest.raises(ValueError, match=r"fields of the template are \['at'\], got \['on'\]"):
        condition("ab", template, on="x")


@pytest.mark.parametrize(
    "value", [None, "", " ", "\u202e", "\u200b\n", "a \u200b b", ["law", None, "tax"], ("a",), [], 7, 0.5], ids=repr
)
def test_values_are_cleaned_as_in_training(value: Any) -> None:
    template = Template("{at}: ")
    line = template.render({"at": value})
    assert line is not None and condition("x", template, at=value) == f"{line}x"
    assert line == f"{clean(line[:-2])}: " and "  " not in line
    if line == "unknown: ":
        for missing in ("plain", "error"):
            with pytest.raises(ValueError, match="at must have a value, got"):
                condition("x", Template("{at}: ", missing=missing), at=value)  # type: ignore[arg-type]  # one of them


def test_what_is_written_joins_the_prompt() -> None:
    """SentencePiece has the space before a word in the word's token."""
    model = tiny.model()
    model.lm_head.weight.data.zero_()
    word = unigram().convert_tokens_to_ids("▁ab")
    bias = torch.eye(tiny.VOCABULARY)[word] * 9
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    given: dict[str, Any] = {"values": {"at": "x"}, "max_new_tokens": 2, "do_sample": False}
    assert generate(model, unigram(), "ab", "{at}:", **given) == " ab ab"
    # The text itself begins here, without a space as in training.
    assert generate(model, unigram(), "", "{at}:", **given) == "ab ab"
    # A prompt may end amid a character, as this é.
    whole = prompt_ids(byte_level(), "é")
    assert len(whole) == 2 and _continued(byte_level(), whole[:1], whole[1:]) == "\ufffd"


def test_generation_gives_one_text() -> None:
    model = tiny.model()
    for several in (
        {"num_return_sequences": 3},
        {"return_dict_in_generate": True},
        {"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
    ):
        with pytest.raises(ValueError, match="asks for more than the one text that generate returns"):
            generate(model, byte_level(), "ab", max_new_tokens=1, **several)  # type: ignore[arg-type]  # one of them
    with pytest.raises(ValueError, match="values must be a dict by field of the template, got 'x'"):
        generate(model, byte_level(), "ab", "{at}:", values="x")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match=r"prompt must be a string, got \['a', 'b'\]"):
        condition(["a", "b"], "{at}:", at="x")  # type: ignore[arg-type]  # on purpose


def test_tokens_that_are_suppressed_stay_so() -> None:
    """As an argument, in a generation_config and in the model's; an end of the text given there holds too."""
    model, tokenizer = tiny.model(vocabulary=257), byte_level()
    model.lm_head.weight.data.zero_()
    first, second = (tokenizer.convert_tokens_to_ids(sign) for sign in "ab")
    bias = torch.zeros(257)
    bias[first], bias[second] = 9.0, 5.0
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    given: dict[str, Any] = {"max_new_tokens": 2}
    config = GenerationConfig(suppress_tokens=[first], do_sample=False)
    assert generate(model, tokenizer, "b", do_sample=False, **given) == "aa"
    assert generate(model, tokenizer, "b", do_sample=False, suppress_tokens=[first], **given) == "bb"
    assert generate(model, tokenizer, "b", generation_config=config, **given) == "bb"
    end = GenerationConfig(eos_token_id=first, do_sample=False)
    assert generate(model, tokenizer, "b", generation_config=end, **given) == "a"
    model.generation_config.suppress_tokens = [first]
    assert generate(model, tokenizer, "b", do_sample=False, **given) == "bb"


def test_generation_can_forbid_control_tokens() -> None:
    """With a model that would write nothing but the padding token."""
    tokenizer = with_bos()
    model = tiny.model()
    model.lm_head.weight.data.zero_()
    head = model.get_output_embeddings()
    bias = [0.0] * tiny.VOCABULARY
    bias[tokenizer.pad_token_id], bias[tokenizer.convert_tokens_to_ids("c")] = 9.0, 5.0
    head.register_forward_hook(lambda module, args, output: output + output.new_tensor(bias))
    given: dict[str, Any] = {"values": {"at": "p"}, "max_new_tokens": 4, "do_sample": False}
    assert generate(model, tokenizer, "ab", "{at}:", **given) == " c c c c"
    assert generate(model, tokenizer, "ab", "{at}:", forbid_control_tokens=False, **given) == ""
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, byte_level(), "", max_new_tokens=1)


def test_a_template_is_saved_beside_a_model(tmp_path: Path) -> None:
    template = Template("{domain} {year}\n", {"domain": ("meta.url", "domain"), "year": ("date", lambda d: d[:4])})
    template.save(tmp_path)
    loaded = Template.load(tmp_path)
    assert loaded.text == template.text and loaded.fields == template.fields
    assert loaded.format(domain="a.org", year="2024") == template.format(domain="a.org", year="2024")
    assert loaded.render({"meta": {"url": "https://a.org/x"}, "date": "2024"}) == "a.org 2024\n"
    (tmp_path / "metadata_template.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no template that can be read"):
        Template.load(tmp_path)
    with pytest.raises(ValueError, match="Pass the folder of a model"):
        Template.load(tmp_path / "nowhere")
