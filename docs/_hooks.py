"""Pages of the site that are made: one a method, from its card, and their index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

CARDS = Path(__file__).resolve().parents[1] / "model_cards" / "methods"


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


def _page(card: Path) -> str:
    head, body = _parts(card)
    title, _, rest = body.lstrip().partition("\n")
    # Links of a card are relative to its folder in the repository; those to other cards hold here too.
    rest = re.sub(r"\]\(\.\./\.\./docs/([^)]+)\)", r"](../\1)", rest)
    return f"{title}\n\n{_facts(head)}\n{rest}"


def _index(cards: list[Path]) -> str:
    lines = ["# Methods", "", "| plug-in | what it does | papers |", "|---|---|---|"]
    for path in cards:
        head, _ = _parts(path)
        authors = ", ".join(paper["authors"] for paper in head["papers"])
        lines.append(f"| [`{head['callback'].rsplit('.', 1)[-1]}`]({path.name}) | {head['title']} | {authors} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: Any) -> Files:
    cards = sorted(CARDS.glob("*.md"))
    for path in cards:
        files.append(File.generated(config, f"methods/{path.name}", content=_page(path)))
    files.append(File.generated(config, "methods/index.md", content=_index(cards)))
    return files
