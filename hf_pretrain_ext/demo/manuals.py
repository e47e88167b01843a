"""Manual pages of the machine as plain text, one line a paragraph: found by package, rendered by groff, cached."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from hf_pretrain_ext.demo.sampling import sample

__all__ = ["MAN", "english_manuals", "german_manuals"]

MAN = Path("/usr/share/man")
# English pages of these Debian packages only: what else lies in the folder differs from machine to machine. Section 3
# (library functions) is left out: half of the pages, hence of the seconds, for a quarter of the prose.
ENGLISH_PACKAGES = ("manpages", "manpages-dev")
ENGLISH_PAGE = re.compile(rf"{MAN}/man[124-8]/.*\.gz")
DPKG_LISTS = Path("/var/lib/dpkg/info")
RENDER_PROCESSES = 2


def clean_page(rendered: str) -> str:
    """A rendered page without header, footer, terminal escapes, overstrikes, typographic hyphens and table rules."""
    text = re.sub(r"\x1b\[[0-9;]*m|\x1b\]8;[^\x1b\x07]*(?:\x1b\\|\x07)|.\x08", "", rendered)
    text = unicodedata.normalize("NFC", text)
    text = text.translate({0x2010: "-", 0x2011: "-", 0x2212: "-", 0x00AD: None, 0x00A0: " "})
    lines = ["" if re.search(r"[\u2500-\u257f]", line) else line.rstrip() for line in text.strip("\n").split("\n")]
    return "\n".join(lines[1:-1])


def render_page(path: Path) -> str:
    """A manual page as text, one line a paragraph; `""` for a page that only points to another or does not render."""
    source = gzip.decompress(path.read_bytes())
    if source.lstrip().startswith(b".so "):
        return ""
    # HY=0: no hyphenation. LL: lines of 4,000 columns, so that next to no paragraph is folded or adjusted.
    # -P-cbu: plain text, neither colours nor overstrikes. -t: the page may hold tables.
    command = ["groff", "-t", "-Kutf8", "-Tutf8", "-mandoc", "-rHY=0", "-rLL=4000n", "-P-cbu"]
    settings = {key: value for key, value in os.environ.items() if not key.startswith("GROFF")}
    try:
        done = subprocess.run(command, input=source, capture_output=True, timeout=60, env=settings, check=True)
    except subprocess.SubprocessError:
        return ""
    return clean_page(done.stdout.decode("utf-8", "replace"))


def render(name: str, pages: list[tuple[str, Path]], cache_dir: Path | None) -> list[tuple[str, str]]:
    """Rendered pages by name, from the cache when it holds these pages at these sizes as made by this very code."""
    key = json.dumps([[page, path.stat().st_size] for page, path in pages]).encode() + Path(__file__).read_bytes()
    cache = Path(cache_dir, f"{name}-{hashlib.blake2b(key, digest_size=8).hexdigest()}.json") if cache_dir else None
    if cache is not None and cache.exists():
        return [tuple(row) for row in json.loads(cache.read_text(encoding="utf-8"))]
    with ThreadPoolExecutor(RENDER_PROCESSES) as pool:  # a thread waits for a groff process
        texts = pool.map(render_page, [path for _, path in pages])
        bar = tqdm(texts, desc=name, total=len(pages), unit="page")
        rows = [(page, text) for (page, _), text in zip(pages, bar, strict=True)]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")  # renamed when whole: an interrupted run leaves no half cache
        partial.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        partial.replace(cache)
    return rows


def named_pages(paths: Iterable[Path], limit: int | None) -> list[tuple[str, Path]]:
    """Page name (`"de/man1/tar.1"`) and path; links are other names of pages and left out."""
    named = ((str(path.relative_to(MAN)).removesuffix(".gz"), path) for path in paths)
    return sample(((name, path) for name, path in named if path.is_file() and not path.is_symlink()), limit)


def english_manuals(cache_dir: Path | None = None, limit: int | None = None) -> list[tuple[str, str]]:
    """
    Manual pages of the Debian packages `manpages` and `manpages-dev` (sections 1, 2, 4 to 8), rendered, not filtered.

    Args:
        cache_dir (`Path`, *optional*): folder that keeps the rendered text.
        limit (`int`, *optional*): at most this many pages, always the same ones.

    Returns:
        `list[tuple[str, str]]`: page name and text; empty without groff or without the pages.
    """
    lists = [DPKG_LISTS / f"{package}.list" for package in ENGLISH_PACKAGES]
    files = [line for path in lists if path.exists() for line in path.read_text().splitlines()]
    pages = named_pages((Path(file) for file in files if ENGLISH_PAGE.fullmatch(file)), limit)
    return render("english-manuals", pages, cache_dir) if pages and shutil.which("groff") else []


def german_manuals(cache_dir: Path | None = None, limit: int | None = None) -> list[tuple[str, str]]:
    """
    All German manual pages (`/usr/share/man/de`), rendered, not filtered; arguments and result as above.

    They come with the Debian package `manpages-de`; rendering needs `groff`.
    """
    pages = named_pages((MAN / "de").glob("man*/*.gz"), limit)
    return render("german-manuals", pages, cache_dir) if pages and shutil.which("groff") else []
