"""What the method cards' front matter and the classes say, written where people read it: `make tables`.

The table of plug-ins in README.md, between its markers, and the section API at the end of each card. With `--check`
nothing is written; the exit status says whether something would be.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards" / "methods"
BEGIN, END = "<!-- plug-ins: made by `make tables` from the method cards -->", "<!-- plug-ins: end -->"
WIDTH = 100


def plugins() -> list[str]:
    """Ours, in the order of the project's entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return list(project["entry-points"]["hf_pretrain_ext.plugins"])


def parts(card: Path) -> tuple[dict[str, Any], str]:
    _, head, body = card.read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def table() -> str:
    lines = [
        "| plug-in | what it does | papers | in a plain `Trainer` | card |",
        "|---|---|---|---|---|",
    ]
    for name in plugins():
        head, _ = parts(CARDS / f"{name}.md")
        plain = "works"
        if head["needs_extend"]:
            # A method that is an optimizer needs no Trainer of any kind.
            itself = inspect.isclass(found := load(head["functional"])) and hasattr(found, "zero_grad")
            plain = "needs `extend`" + (" (the optimizer itself works anywhere)" if itself else "")
        cells = [
            f"`{head['callback'].rpartition('.')[2]}`",
            " ".join(head["summary"].split()),
            "; ".join(paper["authors"] for paper in head["papers"]),
            plain,
            f"[{name}](model_cards/methods/{name}.md)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def call(path: str) -> str:
    """How something is called: its arguments and defaults, a line each where one line is too short."""
    found = load(path)
    given = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in inspect.signature(found).parameters.values()
        if each.name != "self"
    ]
    texts = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(each)) for each in given]
    # The marks between kinds of arguments, which a signature alone puts in.
    for number, each in enumerate(given):
        before = given[number - 1].kind if number else each.POSITIONAL_OR_KEYWORD
        if each.kind is each.KEYWORD_ONLY and before not in (each.KEYWORD_ONLY, each.VAR_POSITIONAL):
            texts[number] = f"*, {texts[number]}"
    line = f"{path}({', '.join(texts)})"
    if len(line) <= WIDTH:
        return line
    rows, row = [], ""
    for text in texts:
        if row and len(row) + len(text) + 6 > WIDTH:
            rows.append(row)
            row = ""
        row += f"{' ' if row else ''}{text},"
    return "\n".join([f"{path}(", *(f"    {each}" for each in [*rows, row]), ")"])


def api(head: dict[str, Any]) -> str:
    name = head["callback"].rpartition(".")[2]
    source = inspect.getsourcefile(load(head["callback"])) or ""
    return "\n".join(
        [
            "## API",
            "",
            "```text",
            call(head["callback"]),
            "",
            call(head["functional"]),
            "```",
            "",
            f"Arguments, with units and sources: [`{name}`](../../callbacks/{Path(source).name}), or the site's page",
            "*API* (`make docs`).",
            "",
        ]
    )


def written() -> dict[Path, str]:
    """Each file as it should be."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    found = {readme: f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"}
    for name in plugins():
        card = CARDS / f"{name}.md"
        head, _ = parts(card)
        text = card.read_text("utf-8").partition("\n## API\n")[0].rstrip()
        found[card] = f"{text}\n\n{api(head)}"
    return found


def main() -> int:
    stale = [(path, text) for path, text in written().items() if path.read_text("utf-8") != text]
    for path, text in stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(text, "utf-8")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
