"""What of the site is made: a page a method from its card, the API from docstrings, links into the repository."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards" / "methods"


def on_files(files: Files, config: Any) -> Files:
    cards = sorted(CARDS.glob("*.md"))
    for path in cards:
        files.append(File.generated(config, f"methods/{path.name}", content=method_page(path)))
    files.append(File.generated(config, "methods/index.md", content=method_index(cards)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return inside(API_LINE.sub(lambda found: api_entry(found[1]), markdown))


# Links


def inside(markdown: str) -> str:
    """Links to files of the repository that are no pages become their names: the site knows no address of it."""

    def named(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if target.startswith("../") and not target.endswith(".md"):
            path = re.sub(r"^(\.\./)+", "", target)
            return text if path in text else f"{text} (`{path}`)"
        return found[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", named, markdown)


# Methods


def _parts(card: Path) -> tuple[dict[str, Any], str]:
    _, head, body = card.read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def _arxiv(paper: dict[str, Any]) -> str:
    number = paper.get("arxiv")
    return f" ([{number}](https://arxiv.org/abs/{number}))" if number else ""


def _facts(card: dict[str, Any]) -> str:
    """The front matter as a table."""
    papers = "; ".join(f"{paper['authors']}: {paper['title']}{_arxiv(paper)}" for paper in card["papers"])
    rows = {
        "class": f"`{card['callback']}`",
        "functional": f"`{card['functional']}`",
        "papers": papers or "none",
        "needs `extend`": "yes" if card["needs_extend"] else "no",
        "changes": ", ".join(card["changes"]) or "nothing",
        "resume": card["resume"],
        "distributed": "; ".join(f"{where}: {what}" for where, what in card["distributed"].items()),
        "memory": card["memory"],
        "conflicts": ", ".join(card["conflicts"]) or "none",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def method_page(card: Path) -> str:
    head, body = _parts(card)
    title, _, rest = body.lstrip().partition("\n")
    # Links of a card are relative to its folder in the repository; those to other cards hold here too.
    rest = rest.replace("](../../docs/", "](../")
    return f"{title}\n\n{_facts(head)}\n{rest}"


def method_index(cards: list[Path]) -> str:
    lines = ["# Methods", "", "| plug-in | what it does | papers |", "|---|---|---|"]
    for path in cards:
        head, _ = _parts(path)
        authors = ", ".join(paper["authors"] for paper in head["papers"])
        lines.append(f"| [`{head['callback'].rsplit('.', 1)[-1]}`]({path.name}) | {head['title']} | {authors} |")
    return "\n".join(lines) + "\n"


# API

API_LINE = re.compile(r"^::: (\S+)$", re.MULTILINE)
"""A line `::: module.name` stands for what the docstring of that object says."""


def api_entry(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(module), name)
    if inspect.ismodule(found):
        names = [each for each in found.__all__ if callable(getattr(found, each))]
        return "\n".join([markdown_of(inspect.getdoc(found) or ""), *(_entry(getattr(found, n), n) for n in names)])
    return _entry(found, name)


def _entry(found: Any, name: str) -> str:
    try:
        signature = str(inspect.signature(found))
    except (TypeError, ValueError):
        signature = ""
    signature = re.sub(r"\bself(, )?", "", signature)
    lines = [f"### {name}", "", "```python", f"{name}{signature}", "```", "", markdown_of(inspect.getdoc(found) or "")]
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and inspect.isfunction(value) and value.__doc__:
                lines += ["", f"#### {name}.{member}", "", markdown_of(inspect.getdoc(value) or "")]
    return "\n".join([*lines, ""])


def markdown_of(docstring: str) -> str:
    """A docstring in the Hugging Face format as Markdown: arguments as a list, examples as code."""
    lines: list[str] = []
    section, console, fenced = "", False, False
    for line in docstring.splitlines():
        text = line.strip()
        if text.startswith("```"):
            fenced = not fenced
        elif not fenced and text.startswith(">>>") and not console:
            lines += ["", "```pycon"]
            console = True
        elif console and not text:
            lines.append("```")
            console = False
        if fenced or console or text.startswith("```"):
            lines.append(line.removeprefix("    ") if section else line)
            continue
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Example|Examples|Class attributes):", text):
            section = text.rstrip(":")
            lines += ["", f"**{section}**", ""]
        elif section in ("Args", "Attributes", "Class attributes") and re.match(r"    \S", line):
            lines.append(f"- {text}")
        elif section and line.startswith("    "):
            lines.append(f"  {text}" if section in ("Args", "Attributes", "Class attributes") else text)
        elif line.startswith("    "):
            # An equation.
            lines.append(line)
        else:
            section = "" if text and not line.startswith(" ") else section
            lines.append(line)
    if console:
        lines.append("```")
    # Links between docstrings lead to names, not to pages.
    return re.sub(r"\[(`[^`]+`)\](\([^)]*\))?", r"\1", "\n".join(lines)).replace("`~", "`")
