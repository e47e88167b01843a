"""The data of the demo: what the two domains hold and do not hold, and that a tokenizer loses nothing of them.

Most tests read a fixed sample of the files (`limit`); the last one reads all files but the manual pages.
"""

from __future__ import annotations

import ast
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_pretrain_ext.demo import corpora, manuals, sampling
from hf_pretrain_ext.demo.corpora import Corpus, Document, split, strip_docstrings
from hf_pretrain_ext.demo.tokenizer import END_OF_TEXT, blocks, encode_documents, train_tokenizer

LIMIT = 30
HAS_GROFF = shutil.which("groff") is not None
needs_groff = pytest.mark.skipif(not HAS_GROFF, reason="NOT TESTED: no groff (Debian package groff)")
needs_german = pytest.mark.skipif(
    not HAS_GROFF or not any((manuals.MAN / "de").glob("man*/*.gz")),
    reason="NOT TESTED: German manual pages need groff and pages (Debian packages groff and manpages-de)",
)


@pytest.fixture(scope="module")
def english() -> Corpus:
    return corpora.english_prose(limit=LIMIT)


@pytest.fixture(scope="module")
def python() -> Corpus:
    return corpora.python_sources(limit=LIMIT)


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = corpora.german_manuals(tmp_path_factory.mktemp("cache"), limit=LIMIT)
    assert corpus is not None
    return corpus


@pytest.fixture(scope="module")
def tokenizer(english: Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in english.train], vocab_size=512)


def everything(corpus: Corpus) -> list[Document]:
    return corpus.train + corpus.heldout


def paragraphs(documents: list[Document]) -> list[str]:
    return [line for document in documents for line in document.text.splitlines() if line]


# --- split ------------------------------------------------------------------------------------------


def pages(count: int, size: int = 1000) -> list[Document]:
    return [Document(text=f"{i} ".ljust(size, "."), name=f"page {i}") for i in range(count)]


def test_split_shares_out_every_document_once() -> None:
    train, heldout = split(pages(5000))
    assert sorted(d.name for d in train + heldout) == sorted(d.name for d in pages(5000))
    assert 0.03 < len(heldout) / 5000 < 0.05
    assert train == sorted(train, key=lambda d: d.name)
    assert split(reversed(pages(5000))) == (train, heldout)  # the order of arrival is of no account


def test_split_keeps_documents_on_their_side_when_others_come() -> None:
    before, after = ({d.name for d in split(pages(n))[1]} for n in (4000, 5000))
    assert before <= after


def test_split_holds_out_enough_and_not_too_much() -> None:
    def held_bytes(count: int, size: int) -> int:
        return sum(len(d.text) for d in split(pages(count, size))[1])

    assert 60_000 <= held_bytes(500, 1000) < 62_000  # 4 % would be 20 kB
    assert 300_000 <= held_bytes(5000, 10_000) <= 310_000  # 4 % would be 2 MB
    assert held_bytes(40, 1000) == 10_000  # a corpus of 40 kB gives a quarter


def test_a_sample_has_both_sides() -> None:
    paths = [(document.name, Path(document.name)) for document in pages(5000)]
    sampled = {name for name, _ in sampling.sample(paths, 200)}
    assert {name for name, _ in sampling.sample(paths, 100)} < sampled and len(sampled) == 200
    assert len(sampled & {d.name for d in split(pages(5000))[1]}) < 20  # not the 200 that are held out


def test_split_drops_repeated_texts() -> None:
    repeated = [Document(text=d.text, name=f"copy of {d.name}") for d in pages(50)]
    train, heldout = split(pages(50) + repeated)
    assert len({d.text for d in train + heldout}) == len(train) + len(heldout) == 50


# --- old domain -------------------------------------------------------------------------------------


def test_english_holds_each_source_and_no_repeats(english: Corpus) -> None:
    names = [document.name for document in everything(english)]
    assert len(set(names)) == len(names)
    assert english.train and english.heldout
    for beginning in ("topics/", "numpy.", "pandas."):
        assert any(name.startswith(beginning) for name in names), beginning
    found = paragraphs(everything(english))
    assert len(set(found)) == len(found)  # hence none in train and in held-out


def test_english_is_prose(english: Corpus) -> None:
    for paragraph in paragraphs(everything(english)):
        assert ">>>" not in paragraph and "```" not in paragraph
        assert len(paragraph.split()) >= corpora.MIN_WORDS
    words = " ".join(paragraphs(everything(english))).split()
    assert sum(word in corpora.ENGLISH for word in words) / len(words) > 0.15


def test_prose_keeps_sentences_and_drops_the_rest() -> None:
    docstring = """
    Return the sum of two numbers,
    however large they may be.

    Parameters
    ----------
    a : int or float or complex, optional
        The first of the two numbers
        that will be added.

    Args:
        b (`int`, *optional*, defaults to 0): The second of the numbers that are added.
        c: The third of the numbers, and it is not used.
    :param d: the fourth of the numbers that are added up

    >>> add(1, 2)  # this is how one adds up two numbers
    3

    - A bullet that speaks of numbers, and goes on
      to a second line.
    - Another bullet that speaks of other numbers.

    double complex add(double complex a); float complex addf(float complex a);

    Written by somebody whose address is somebody@example.org for all to see.

    ```
    this is a fenced block that has a sentence in it
    ```
    """
    seen: set[str] = set()
    assert corpora._prose(docstring, seen).split("\n\n") == [
        "Return the sum of two numbers, however large they may be.",
        "The first of the two numbers that will be added.",
        "- A bullet that speaks of numbers, and goes on to a second line.\n"
        "- Another bullet that speaks of other numbers.",
    ]
    assert corpora._prose(docstring, seen) == ""  # a paragraph once seen is not kept again


# --- Python sources ---------------------------------------------------------------------------------


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def without_docstrings(source: str) -> str:
    """What `strip_docstrings` has to mean, said on the syntax tree: `pass` counts for nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            while isinstance(node, DOCUMENTED) and body and corpora._is_string(body[0]):
                body.pop(0)
            body[:] = [child for child in body if not isinstance(child, ast.Pass)]
    return ast.dump(tree)


def comments(source: str) -> list[str]:
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]


SOURCES = {
    "module": '#!/usr/bin/python\n"""Doc\nstring."""\n# kept\nx = 1\n',
    "only the docstring": 'class A:\n    """Doc."""\n\n\nclass B(A): "Doc."\n',
    "one line": 'def f(): "Doc."; return 1  # kept\n',
    "two strings": 'def f():\n    "Doc."\n    "More."\n    """Still\n    more."""\n    return "kept"\n',
    "two strings, one line": 'def f():\n    "Doc."; "More."\n    return 1\n',
    "only strings": 'def f():\n    "Doc."\n    "More."\n',
    "joined": 'def f():\n    ("Doc"\n     "string.")\n    return 1\n',
    "not ascii": 'def f():\n    "Größe"; größe = "Größe"  # Größe\n    return größe\n',
    "nested": 'class A:\n    "Doc."\n    async def f(x):\n        r"""Doc\\s."""\n        def g(): u"Doc."\n',
    "no docstring": 'def f():\n    x = "kept"\n    f"kept {x}"\n    b"kept"\n',
    "future": '"""Doc."""\nfrom __future__ import annotations\n',
    "carriage returns": 'def f():\r\n    """Doc\r\n    string."""\r\n    return 1\r\n',
    "empty": "",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_strip_docstrings(source: str) -> None:
    stripped = strip_docstrings(source)
    compile(stripped, "stripped", "exec")
    assert ast.dump(ast.parse(stripped)).count("Doc") == 0
    assert without_docstrings(stripped) == without_docstrings(source)
    assert comments(stripped) == comments(source)
    assert strip_docstrings(stripped) == stripped


def test_sources_compile_and_have_no_docstrings(python: Corpus) -> None:
    originals = {name: path for name, path in corpora._modules(Path(ast.__file__).parent)}
    assert len(everything(python)) > LIMIT // 2
    for document in everything(python):
        compile(document.text, document.name, "exec")
        tree = ast.parse(document.text)
        assert not [n for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and ast.get_docstring(n)]
        with tokenize.open(originals[document.name]) as file:
            original = file.read()
        assert comments(document.text) == comments(original)
        assert without_docstrings(document.text) == without_docstrings(original)


def test_domains_share_no_text(english: Corpus, python: Corpus) -> None:
    for corpus in (english, python):
        assert not {d.text for d in corpus.train} & {d.text for d in corpus.heldout}
        assert not {d.name for d in corpus.train} & {d.name for d in corpus.heldout}
    assert not {d.text for d in everything(english)} & {d.text for d in everything(python)}
    assert not set(paragraphs(everything(english))) & set(paragraphs(everything(python)))


# --- manual pages -----------------------------------------------------------------------------------

PARAGRAPH = (
    "Die Geschwindigkeitsbegrenzungseinrichtung wird nach dem Einschalten der Datenverarbeitungsanlage ausgewertet,"
    " und alle Konfigurationsdateien werden danach nicht mehr gelesen, sondern nur noch vom Protokoll benutzt."
)
TH = '.TH SEITE 1 "Mai 2024" "Fußzeile 1.0" "Kopfzeile"\n'


def write_page(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(source.encode()))
    return path


@needs_groff
def test_rendered_page_is_unfolded_plain_text(tmp_path: Path) -> None:
    table = ".TS\nallbox;\nl l.\nWert\tBedeutung\n.TE\n"
    source = (
        TH + f".SH BEZEICHNUNG\n\\fBseite\\fP \\- kurz\n.SH BESCHREIBUNG\n{PARAGRAPH}\n.PP\nsiehe man-pages\n{table}"
    )
    text = manuals.render_page(write_page(tmp_path / "seite.1.gz", source))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines == ["BEZEICHNUNG", "seite - kurz", "BESCHREIBUNG", PARAGRAPH, "siehe man-pages"]


@needs_groff
def test_redirection_renders_to_nothing(tmp_path: Path) -> None:
    assert manuals.render_page(write_page(tmp_path / "other.1.gz", ".so man1/seite.1\n")) == ""


def test_clean_page_undoes_overstrikes_and_escapes() -> None:
    rendered = "LS(1)  Handbuch  LS(1)\n\nB\bBE\bEZ\bZ _\bo\x1b[1md\x1b[0mer man\u2010page\n\nGNU  2024  LS(1)\n"
    assert manuals.clean_page(rendered).strip() == "BEZ oder man-page"


@needs_groff
def test_rendered_pages_are_cached_by_list_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [("seite.1", write_page(tmp_path / "man" / "seite.1.gz", TH + f".SH A\n{PARAGRAPH}\n"))]
    rows = manuals.render("pages", pages, tmp_path / "cache")
    calls: list[Path] = []

    def render_again(path: Path) -> str:
        calls.append(path)
        return "again"

    monkeypatch.setattr(manuals, "render_page", render_again)
    assert manuals.render("pages", pages, tmp_path / "cache") == rows and not calls
    write_page(pages[0][1], TH + f".SH A\n{PARAGRAPH} Etwas ist dazugekommen.\n")
    assert manuals.render("pages", pages, tmp_path / "cache") == [("seite.1", "again")]
    assert calls == [pages[0][1]]


def test_paragraphs_left_in_english_are_not_german() -> None:
    assert corpora._is_german(PARAGRAPH)
    assert not corpora._is_german("This is free software: you are free to change and redistribute it.")
    assert not corpora._is_german("nonblocking nondefault nonempty noninteractive nonnegative nonportable")


@needs_german
def test_german_is_german(german: Corpus, english: Corpus) -> None:
    assert german.train and german.heldout
    found = paragraphs(everything(german))
    assert len(set(found)) == len(found)
    assert not set(found) & set(paragraphs(everything(english)))
    text = "\n".join(found)
    assert not re.search("[\x08\x1b\u00ad\u2010\u2500-\u257f]", text)
    # No word is cut at the end of a line; comments in code may break behind a hyphen of their own, before a noun.
    assert not re.search(r"\w-\n[a-zäöüß]", text)
    assert not re.search(r"(?m)^(\S+\(\d\w*\)).*\1$", text)  # no page header
    words = text.split()
    german_share, english_share = (
        sum(w in known for w in words) / len(words) for known in (corpora.GERMAN, corpora.ENGLISH)
    )
    assert german_share > 0.2 > 0.02 > english_share


def test_without_groff_auto_is_python_and_german_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manuals.shutil, "which", lambda program: None)
    assert corpora.german_manuals(limit=1) is None
    assert manuals.english_manuals(limit=1) == []
    assert corpora.new_domain(limit=LIMIT).name == "python-sources"
    with pytest.raises(RuntimeError, match="apt-get install groff manpages-de"):
        corpora.new_domain("german")


@needs_german
def test_auto_is_german_where_there_are_pages() -> None:
    assert corpora.new_domain(limit=2).name == "german-manuals"
    assert corpora.new_domain("python", limit=2).name == "python-sources"


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="'klingon' is not one of"):
        corpora.new_domain("klingon")  # type: ignore[arg-type]


# --- tokens -----------------------------------------------------------------------------------------

HARD = [
    "",
    " ",
    "\n\n\tx = 1  \r\n",
    "Größe 10 µm, naïve – ☃ 🦜",
    "\x00\x7f\u200b",
    "don't . , ?",
    "  two  spaces ",
    "e\u0301",
]


def test_tokens_decode_to_the_text(tokenizer: PreTrainedTokenizerFast, english: Corpus, python: Corpus) -> None:
    texts = HARD + [d.text for d in english.heldout + python.heldout]
    for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


def test_text_never_becomes_the_control_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n{END_OF_TEXT}"]
    tokenizer.save_pretrained(tmp_path)
    careless = PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=False)
    end = tokenizer.eos_token_id
    assert end in careless(END_OF_TEXT)["input_ids"]  # else the rest would show nothing
    for candidate in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path), careless):
        for text, ids in zip(texts, encode_documents(candidate, texts), strict=True):
            assert ids.count(end) == 1 and ids[-1] == end
            assert candidate.decode(ids[:-1]) == text
        if candidate is not careless:
            assert all(end not in ids for ids in candidate(texts)["input_ids"])
    assert end in careless(END_OF_TEXT)["input_ids"]  # encode_documents left its setting alone


def test_text_with_the_control_token_trains_to_nothing_special() -> None:
    tokenizer = train_tokenizer([END_OF_TEXT * 50] * 50, vocab_size=400)
    assert len(tokenizer) < 400
    [ids] = encode_documents(tokenizer, [END_OF_TEXT])
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == END_OF_TEXT


class Disobedient:
    eos_token, eos_token_id = END_OF_TEXT, 0

    def __call__(self, texts: list[str], **settings: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[5, 6], [5, 0, 6]]}


def test_encode_documents_refuses_what_it_cannot_guarantee(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="document 1 has the end-of-sequence token"):
        encode_documents(Disobedient(), ["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no eos_token"):
        encode_documents(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), ["a"])
    assert encode_documents(tokenizer, []) == []


def test_tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == tokenizer.pad_token_id and tokenizer.bos_token is None
    with pytest.raises(ValueError, match="less than 257"):
        train_tokenizer(["a"], vocab_size=256)


def test_blocks_lose_only_the_remainder(tokenizer: PreTrainedTokenizerFast, english: Corpus) -> None:
    ids = encode_documents(tokenizer, [document.text for document in english.heldout])
    flat = [token for document in ids for token in document]
    dataset = blocks(ids, block_size=64)
    rows = dataset["input_ids"][:]
    assert len(rows) == len(flat) // 64 and {len(row) for row in rows} == {64}
    assert [token for row in rows for token in row] == flat[: len(rows) * 64]
    assert dataset["labels"][:] == rows
    assert {feature.feature.dtype for feature in dataset.features.values()} == {"int32"}
    batch = default_data_collator([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 64) and batch["labels"].equal(batch["input_ids"])


def test_blocks_exact_fit_and_too_short() -> None:
    assert blocks([[1, 2], [3, 4]], block_size=2)["input_ids"][:] == [[1, 2], [3, 4]]
    for documents, size in (([[1, 2], [3]], 4), ([], 1), ([[1]], 0)):
        with pytest.raises(ValueError, match="do not fill a block"):
            blocks(documents, block_size=size)


# --- the whole ----------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys
from hf_pretrain_ext.demo import corpora
old, new = corpora.english_prose(limit=5), corpora.python_sources(limit=5)
assert not {"numpy", "networkx", "pandas", "datasets"} & set(sys.modules), "corpora are read, not imported"
from hf_pretrain_ext.demo.tokenizer import encode_documents, train_tokenizer
tokenizer = train_tokenizer((d.text for d in old.train), vocab_size=600)
ids = encode_documents(tokenizer, [d.text for d in new.train + new.heldout])
print(hashlib.sha256(repr((old, new, tokenizer.backend_tokenizer.to_str(), ids)).encode()).hexdigest())
"""


def test_same_in_every_process() -> None:
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


@pytest.mark.slow
def test_full_size_without_manual_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manuals.shutil, "which", lambda program: None)
    old, new = corpora.english_prose(), corpora.python_sources()
    for corpus in (old, new):
        train, heldout = (sum(len(d.text.encode()) for d in part) for part in (corpus.train, corpus.heldout))
        assert 4_000_000 < train + heldout < 12_000_000
        assert 60_000 < heldout < 500_000
    names = {document.name for document in everything(new)}
    assert {"email.message", "asyncio.events", "textwrap"} <= names
    left_out = re.compile(r"(test|encodings|pydoc_data|idlelib\.idle_test|lib2to3\.tests|site-packages)\b|_sysconfig")
    assert not [name for name in names if left_out.match(name)]
