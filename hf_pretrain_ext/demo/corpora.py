"""Two text domains for a continual pre-training demo, made from what is already on the machine: no downloads.

The **old** domain is English prose ([`english_prose`]). The **new** one ([`new_domain`]) is German manual pages, the
strong shift, or Python sources where no German pages are installed. Only files are read; nothing is imported.

What is filtered, everywhere but in the sources: a paragraph stays when it reads as prose, that is when it has at least
`MIN_WORDS` words and at least `WORD_SHARE` of its blank-separated pieces are plain words. That drops doctests, code,
signatures, option synopses, tables and headings. Parameter lists (Google, NumPy and reST style), reST directives, C
declarations, fenced code and paragraphs with e-mail addresses are dropped by their form, and a paragraph seen once is
never kept again.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from hf_pretrain_ext.demo import manuals
from hf_pretrain_ext.demo.sampling import rank, sample

__all__ = [
    "Corpus",
    "Document",
    "english_prose",
    "german_manuals",
    "new_domain",
    "python_sources",
    "split",
    "strip_docstrings",
]

# Packages that transformers, datasets and torch bring along, with the cleanest and densest docstrings. torch and
# transformers themselves are left out: 15 s each to parse, and 60 % of the transformers docstrings are repeats.
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "networkx", "numpy", "pandas")
SKIPPED_FOLDERS = frozenset({"__pycache__", "_vendor", "dist-packages", "idle_test", "site-packages"}) | frozenset(
    {"test", "testing", "tests"}
)
# Generated: character tables, the text of `help()` (it is in the old domain) and the settings of this very build.
TABLES = re.compile(r"(encodings|html\.entities|pydoc_data|stringprep)\b|_sysconfigdata")

MIN_WORDS = 6
WORD_SHARE = 0.75
MIN_DOCUMENT_BYTES = 300
HELDOUT_SHARE = 0.04
HELDOUT_MIN_BYTES = 60_000
HELDOUT_MAX_BYTES = 300_000  # evaluated many times in a demo

ENGLISH = frozenset("the of and to is for this that with are be or by not from".split())
GERMAN = frozenset(
    "alle als auf aus bei das dass dem den der des die diese dieser durch ein eine einem einen einer eines er es falls"
    " für gibt im ist kann kein keine mit muss nach nicht nur oder sich sie sind soll über um und unter vom von vor"
    " wenn werden wie wird zu zum zur".split()
)

ITEM = re.compile(r"([-*+•·]|\d+[.)])\s+|(:param|:type|:return|:raises)\b")
PARAMETER = re.compile(r"(\*{0,2}[a-z_][\w.]*\s*(\([^)]*\))?:\s)|(:param|:type|:return|:raises)\b")
TYPED_NAME = re.compile(r"\*{0,2}\w+(\s*,\s*\*{0,2}\w+)*\s+:(\s|$)")
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.\w")
UNDERLINE = re.compile(r"[-=~^*#]{3,}$")
FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Args:
        text (`str`): the text, lines ended by `\\n`.
        name (`str`): module (`"email.message"`), help topic (`"topics/assert"`) or page (`"de/man1/tar.1"`), unique
            in its corpus.
    """

    text: str
    name: str


@dataclass(frozen=True)
class Corpus:
    """A domain, split by document.

    Args:
        name (`str`): short name, for file names and tables.
        description (`str`): one sentence on what it is made of.
        train (`list[Document]`): documents to train on, sorted by name.
        heldout (`list[Document]`): documents never trained on, sorted by name.
    """

    name: str
    description: str
    train: list[Document]
    heldout: list[Document]


# --- splitting ------------------------------------------------------------------------------------


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """
    Split documents into train and held-out by a stable hash of their names.

    About 4 % of the documents are held out, those of lowest hash: more until they hold 60 KB (or a quarter of the
    text, for tiny corpora), fewer once they hold 300 KB. Adding a document therefore seldom moves another one across.
    Documents whose text repeats an earlier one are dropped, so that no text is on both sides.

    Args:
        documents (`Iterable[Document]`): documents with unique names.

    Returns:
        `tuple[list[Document], list[Document]]`: train and held-out, each sorted by name.

    Example:

    >>> train, heldout = split(Document(text=f"text {i} " * 50, name=f"page {i}") for i in range(100))
    >>> len(train) + len(heldout)
    100
    """
    unique: dict[str, Document] = {}
    for document in sorted(documents, key=lambda d: d.name):
        unique.setdefault(document.text, document)
    minimum = min(HELDOUT_MIN_BYTES, sum(len(text.encode()) for text in unique) // 4)
    train: list[Document] = []
    heldout: list[Document] = []
    held_bytes = 0
    ranked = sorted((rank(document.name, b"split"), document.name, document) for document in unique.values())
    for place, _, document in ranked:
        wanted = held_bytes < minimum or (place < HELDOUT_SHARE and held_bytes < HELDOUT_MAX_BYTES)
        (heldout if wanted else train).append(document)
        held_bytes += len(document.text.encode()) if wanted else 0
    return sorted(train, key=lambda d: d.name), sorted(heldout, key=lambda d: d.name)


# --- prose ----------------------------------------------------------------------------------------


def _items(paragraph: str) -> Iterator[str]:
    """The parts of a paragraph, unfolded: a change of indentation, a bullet or a parameter starts a new one."""
    parts: list[str] = []
    start = indent = 0
    for line in paragraph.splitlines():
        text = " ".join(line.split())
        indent = len(line) - len(line.lstrip())
        if UNDERLINE.match(text):  # a heading's underline: the heading goes with it
            parts = []
            continue
        opens = ITEM.match(text) or PARAMETER.match(text)
        hanging = parts and indent > start and (ITEM.match(parts[0]) or PARAMETER.match(parts[0]))
        if parts and (opens or TYPED_NAME.match(text) or not (indent == start or hanging)):
            yield " ".join(parts)
            parts = []
        if not parts:
            start = indent
        parts.append(text)
        if TYPED_NAME.match(text):  # NumPy style, "axis : int, optional": the description that follows may stay
            parts = []
    if parts:
        yield " ".join(parts)


def _is_prose(text: str) -> bool:
    """Whether a paragraph reads as sentences in some language written with spaces."""
    if ">>>" in text or text.startswith("..") or text.endswith(";") or PARAMETER.match(text) or ADDRESS.search(text):
        return False
    pieces = text.split()
    plain = sum(
        piece.strip(".,;:!?()[]\"'`*„“”»«‚‘’…").replace("-", "").replace("'", "").isalpha() for piece in pieces
    )
    return len(pieces) >= MIN_WORDS and plain >= WORD_SHARE * len(pieces)


def _prose(text: str, seen: set[str], keep: Callable[[str], bool] = _is_prose) -> str:
    """The prose of a text, unfolded, without the paragraphs in `seen`, to which those kept are added."""
    paragraphs = []
    for paragraph in re.split(r"\n[ \t]*\n", FENCE.sub("", text.expandtabs())):
        items = [item for item in _items(paragraph) if keep(item) and item not in seen]
        items = list(dict.fromkeys(items))
        seen.update(items)
        if items:
            paragraphs.append("\n".join(items))
    return "\n\n".join(paragraphs)


def _documents(texts: Iterable[tuple[str, str]], keep: Callable[[str], bool] = _is_prose) -> list[Document]:
    """Named raw texts as prose documents; the first of equal paragraphs wins, documents left short are dropped."""
    seen: set[str] = set()
    documents = (Document(text=_prose(text, seen, keep), name=name) for name, text in texts)
    return [d for d in documents if len(d.text.encode()) >= MIN_DOCUMENT_BYTES]


# --- Python files ---------------------------------------------------------------------------------


def _modules(root: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Module name and path of the Python files below a folder, test packages and vendored code left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name.isidentifier() and name not in SKIPPED_FOLDERS]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if path.stem.isidentifier():
                yield ".".join([prefix, *parts]).removeprefix(".").removesuffix(".__init__"), path


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Source and syntax tree of a file, or None where it is not valid Python (templates, deliberate errors)."""
    try:
        with tokenize.open(path) as file:  # honours coding cookies
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            return source, ast.parse(source)
    except (OSError, SyntaxError, UnicodeError, ValueError):
        return None


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes that may have a docstring, in the order of the source."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        # Statements only: `ast.walk` goes through expressions too, and takes longer than the parser.
        fields = ("body", "handlers", "orelse", "finalbody", "cases")
        nodes += reversed([child for field in fields for child in getattr(node, field, ())])


def _docstrings(tree: ast.Module) -> str:
    return "\n\n".join(ast.get_docstring(node) or "" for node in _documented(tree))


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def strip_docstrings(source: str, tree: ast.Module | None = None) -> str:
    """
    Remove the docstrings of a module, its classes and functions; comments and layout stay.

    Args:
        source (`str`): source of a module.
        tree (`ast.Module`, *optional*): its syntax tree, when at hand.

    Returns:
        `str`: source that compiles to the same program without docstrings.

    Example:

    >>> print(strip_docstrings('def f():\\n    "Doc."  # why\\n    return 1\\n'))
    def f():
        pass  # why
        return 1
    <BLANKLINE>
    """
    lines = source.encode().split(b"\n")  # `ast` counts columns in bytes of UTF-8
    edits = []
    for node in _documented(tree or ast.parse(source)):
        # Every leading string goes: with the first one gone, a second would become the docstring.
        for string in itertools.takewhile(_is_string, node.body):
            end_line, end = string.end_lineno or string.lineno, string.end_col_offset
            edits.append((string.lineno - 1, string.col_offset, end_line, end, string is node.body[-1]))
    for first, start, last, end, only in sorted(edits, reverse=True):  # from the end: earlier positions stay valid
        before, after = lines[first][:start], lines[last - 1][end:]
        alone = not before.strip() and not after.strip()
        lines[first:last] = [] if alone and not only else [before + b"pass" + after]
    return b"\n".join(lines).decode().lstrip("\n")


@lru_cache(maxsize=2)
def _standard_library(limit: int | None) -> tuple[tuple[str, str, str], ...]:
    """Module name, docstrings and source without docstrings of each standard module, parsed once for both domains."""
    modules = []
    files = (item for item in _modules(Path(sysconfig.get_path("stdlib"))) if not TABLES.match(item[0]))
    for name, path in tqdm(sample(files, limit), desc="standard library", unit="file"):
        if parsed := _parse(path):
            modules.append((name, _docstrings(parsed[1]), strip_docstrings(*parsed)))
    return tuple(modules)


def _package_docstrings(limit: int | None) -> Iterator[tuple[str, str]]:
    """Module name and docstrings of the modules of `PACKAGES` that are installed; found, not imported."""
    files = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            files += sample(_modules(Path(spec.origin).parent, package), limit)
    for name, path in tqdm(files, desc="docstrings of packages", unit="file"):
        if parsed := _parse(path):
            yield name, _docstrings(parsed[1])


def _help_topics(limit: int | None) -> Iterator[tuple[str, str]]:
    """The text of Python's `help("...")` topics, read as a literal: the module is a dictionary and nothing else."""
    parsed = _parse(Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py"))
    if parsed is None:
        return
    for node in parsed[1].body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            yield from sorted((f"topics/{topic}", text) for topic, text in topics.items())[:limit]


# --- the domains ----------------------------------------------------------------------------------


def _is_german(text: str) -> bool:
    """Whether a paragraph is prose and not one that the translators left in English."""
    words = set(text.lower().split())
    return _is_prose(text) and len(words & GERMAN) > len(words & ENGLISH)


def german_manuals(cache_dir: Path | None = None, limit: int | None = None) -> Corpus | None:
    """
    A new domain: German manual pages (all of `/usr/share/man/de`), rendered by groff and reduced to German prose.

    Args:
        cache_dir (`Path`, *optional*): folder that keeps the rendered text, keyed by the pages and their sizes.
        limit (`int`, *optional*): at most this many pages, always the same ones.

    Returns:
        `Corpus` or `None`: None without groff or without the pages (Debian packages `groff` and `manpages-de`).
    """
    pages = manuals.german_manuals(cache_dir, limit)
    if not pages:
        return None
    train, heldout = split(_documents(pages, _is_german))
    return Corpus("german-manuals", f"German prose of {len(pages)} manual pages.", train, heldout)


def english_prose(cache_dir: Path | None = None, limit: int | None = None) -> Corpus:
    """
    The old domain: English prose about computers.

    Made of Python's help topics, the docstrings of the standard library and of `PACKAGES` (one document a module), and
    English manual pages when there are any; reduced to prose as the module's docstring says.

    Args:
        cache_dir (`Path`, *optional*): folder that keeps the rendered manual pages.
        limit (`int`, *optional*): at most this many files of the standard library, of each package and of the manual,
            and help topics; always the same ones. For tests and quick looks.
    """
    pages = manuals.english_manuals(cache_dir, limit)
    library = ((name, text) for name, text, _ in _standard_library(limit))
    texts = itertools.chain(_help_topics(limit), library, _package_docstrings(limit), pages)
    train, heldout = split(_documents(texts))
    made_of = "Python's help topics and the docstrings of the standard library, " + ", ".join(PACKAGES)
    return Corpus("english-prose", made_of + f"; {len(pages)} manual pages.", train, heldout)


def python_sources(limit: int | None = None) -> Corpus:
    """
    A new domain: the standard library's sources without their docstrings, which are in the old domain.

    Test packages and generated tables are left out. One document a file; comments stay.

    Args:
        limit (`int`, *optional*): at most this many files, always the same ones.
    """
    documents = (Document(text=source, name=name) for name, _, source in _standard_library(limit))
    train, heldout = split(d for d in documents if len(d.text.encode()) >= MIN_DOCUMENT_BYTES)
    return Corpus("python-sources", "Sources of the Python standard library without docstrings.", train, heldout)


def new_domain(
    prefer: Literal["auto", "python", "german"] = "auto", cache_dir: Path | None = None, limit: int | None = None
) -> Corpus:
    """
    The domain to continue on: German manual pages where they can be had, else Python sources.

    Args:
        prefer (`str`, *optional*, defaults to `"auto"`): `"german"` and `"python"` ask for that domain and no other.
        cache_dir (`Path`, *optional*): folder that keeps rendered manual pages.
        limit (`int`, *optional*): at most this many files, always the same ones.

    Raises:
        `ValueError`: `prefer` is none of the three.
        `RuntimeError`: German was asked for and is not there; the message says what to install.
    """
    if prefer not in ("auto", "python", "german"):
        raise ValueError(f"prefer={prefer!r} is not one of 'auto', 'python', 'german'")
    german = german_manuals(cache_dir, limit) if prefer != "python" else None
    if prefer == "german" and german is None:
        raise RuntimeError(
            f"German manual pages need the program groff and pages in {manuals.MAN / 'de'}. On Debian and Ubuntu:"
            " apt-get install groff manpages-de. Without them, take prefer='auto' or prefer='python'."
        )
    return german or python_sources(limit)
