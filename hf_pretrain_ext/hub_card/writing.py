"""The section, rendered, and put into a README between markers: what stands outside them is the user's."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_pretrain_ext.benchmarks import figure_text
from hf_pretrain_ext.hub_card.asking import HubAnswer, ask_the_hub
from hf_pretrain_ext.hub_card.facts import CardFacts, read_facts
from hf_pretrain_ext.hub_card.metadata import check_metadata, metadata_of, without_paths
from hf_pretrain_ext.say import say
from hf_pretrain_ext.trace import scrubbed
from hf_pretrain_ext.values import shown

__all__ = ["BEGIN", "END", "section", "with_section", "write_card"]

BEGIN = "<!-- hf-pretrain-ext: made from the run's trace; changes between these markers are lost -->"
END = "<!-- hf-pretrain-ext: end -->"
FOLDER = "continued_pretraining"
"""Of the figures, beside the README."""


def write_card(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    model_name: str | None = None,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    data_licences: Mapping[str, str] | None = None,
    figures: bool = True,
    ask_hub: bool = False,
    token: str | None = None,
) -> Path:
    """
    Writes the card of the model in `folder`, or its section in the card that is there.

    Args:
        folder (`str` or `Path`): of the run (`output_dir`), or one of its checkpoints.
        output (`str` or `Path`, *optional*): the file; defaults to `README.md` in `folder`.
        model_name (`str`, *optional*): defaults to the name of the folder.
        base_model (`str`, *optional*): name on the Hub; defaults to what the run recorded.
        metadata (`Mapping`, *optional*): more fields of the card's YAML, `license` and `language` say; they win.
        data_licences (`Mapping[str, str]`, *optional*): licence by source, for the table of data.
        figures (`bool`, *optional*, defaults to `True`): draw them, where matplotlib is installed.
        ask_hub (`bool`, *optional*, defaults to `False`): ask the Hub which of the data sets and the base are gated,
            and for their licences. Pushes do.
        token (`str`, *optional*): to ask with; by default the one that is logged in.

    Returns:
        `Path`: the file.

    Raises:
        `FileNotFoundError`: no run was recorded in `folder`.
        `ImportError`: jinja2 is missing; it comes with the extra `report`.
        `ValueError`: metadata that the Hub would not read, or a README whose markers or YAML are broken.

    Example:

    ```python
    write_card("runs/domain", base_model="my-org/my-base", metadata={"license": "apache-2.0", "language": "de"})
    ```
    """
    folder = Path(folder)
    output = Path(output) if output is not None else folder / "README.md"
    # The card may stand beside the model, away from the run.
    adapter = True if (output.parent / "adapter_config.json").is_file() else None
    facts = read_facts(folder, adapter=adapter, base_model=base_model)
    name = model_name or folder.resolve().name
    head, body = _split(output.read_text("utf-8")) if output.exists() else ({}, f"# {name}\n")
    data = metadata_of(facts, name, {**without_paths(head), **(metadata or {})})
    if faults := check_metadata(data):
        raise ValueError(f"the metadata of {output} cannot be used: {'; '.join(faults)}. Pass others in `metadata`")
    drawn = _figures(facts, output.parent) if figures else []
    asked = ask_the_hub(facts.datasets, _names(data.get("base_model")), token=token) if ask_hub else {}
    text = with_section(filled_only(body, name), section(facts, data, data_licences or {}, drawn, asked))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{text}", "utf-8")
    partial.replace(output)
    return output


def with_section(body: str, made: str) -> str:
    """
    `body` with the section in place of the one that it holds, or at its end.

    Raises:
        `ValueError`: one marker without the other, or more than one section.

    Example:

    >>> text = with_section("# Mine\\n", "first")
    >>> with_section(text, "second") == with_section(with_section("# Mine\\n", "third"), "second")
    True
    """
    begins, ends = body.count(BEGIN), body.count(END)
    if begins != ends or begins > 1 or (begins and body.index(END) < body.index(BEGIN)):
        raise ValueError(
            f"the card holds {begins} opening and {ends} closing markers of hf-pretrain-ext. Remove them all, with "
            "what stands between"
        )
    block = f"{BEGIN}\n\n{made.strip()}\n\n{END}"
    if begins:
        before, _, rest = body.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{body.rstrip()}\n\n{block}\n"


_UNFILLED = "More Information Needed"
_FORM = "# Model Card for Model ID"


def filled_only(body: str, name: str) -> str:
    """
    A card's text without what stands unfilled in the form that PEFT and the Hub's client write: their hints, the lines
    and headings that say "More Information Needed". A text with a title of its own is the user's and stays as it is.

    Example:

    >>> form = "# Model Card for Model ID\\n\\n## Uses\\n\\n[More Information Needed]\\n\\n## Framework\\n\\n- PEFT"
    >>> filled_only(form, "mine")
    '# mine\\n\\n## Framework\\n\\n- PEFT\\n'
    """
    if not body.lstrip().startswith(_FORM):
        return body
    text = re.sub(r"<!--(?! hf-pretrain-ext).*?-->", "", body.replace(_FORM, f"# {name}", 1), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if _UNFILLED.lower() not in line.lower()]
    kept: list[str] = []
    for line in reversed(lines):
        # From the end: a heading with nothing below it, or only a heading of its own level or above, holds nothing.
        level = len(line) - len(line.lstrip("#")) if re.match(r"#+ ", line) else 0
        below = next((each for each in reversed(kept) if each.strip()), None)
        depth = len(below) - len(below.lstrip("#")) if below is not None and re.match(r"#+ ", below) else 0
        if level > 1 and (below is None or 0 < depth <= level):
            continue
        kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(reversed(kept))).strip() + "\n"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card."""
    if not text.startswith("---"):
        return {}, text
    _, _, rest = text.partition("---")
    head, found, body = rest.partition("\n---")
    try:
        data = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise ValueError(f"the card's YAML cannot be read ({error}). Mend it, or remove the card") from error
    if not found or not isinstance(data, dict | None):
        raise ValueError(
            "the card's YAML is not closed by a line of ---, or holds no fields. Mend it, or remove the card"
        )
    return data or {}, body.lstrip("\n")


def section(
    facts: CardFacts,
    data: Mapping[str, Any],
    licences: Mapping[str, str],
    figures: Sequence[tuple[str, str]] = (),
    asked: Mapping[str, HubAnswer | None] | None = None,
) -> str:
    """The section as Markdown; `figures` are pairs of a file's name and its text, `asked` is what the Hub told."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a model card needs jinja2: pip install 'hf-pretrain-ext[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )
    told = {name: answer for name, answer in (asked or {}).items() if answer is not None}
    bases = _names(data.get("base_model"))
    environment.filters |= {
        "licence": lambda source: licences.get(source.name) or licence_of(told, source.repository) or "not stated",
        "cell": cell,
        "count": count,
        "rate": lambda value: f"{value:.4g}",
        "measured": lambda figure: figure_text(*(figure or (None,))),
    }
    return environment.get_template("continued_pretraining.md.j2").render(
        facts=facts,
        data={"base_model": None, **data},
        licences=licences,
        figures=figures,
        base_licence=facts.base_licence or licence_of(told, *bases),
        access=access([*bases, *facts.datasets], told),
        methods=_methods(facts),
        limits=limits(facts),
    )


def cell(value: Any) -> str:
    """Text for a table of Markdown: names come from users and data, and make no markup of their own.

    Example:

    >>> cell("a|b\\n<script>")
    'a\\\\|b &lt;script&gt;'
    """
    if value is None:
        return "not recorded"
    text = html.escape(scrubbed(" ".join(str(value).split())), quote=False)
    for mark in "\\`*[]|":
        text = text.replace(mark, f"\\{mark}")
    return text


def count(value: Any, exact: bool = True) -> str:
    return "not recorded" if value is None else f"{'' if exact else '≈ '}{value:,.0f}"


_GRANTED = {"auto": "granted at once", "manual": "granted by its authors"}


def access(names: Sequence[str], told: Mapping[str, HubAnswer]) -> list[str]:
    """Which of the repositories are gated, and of which that is not known.

    Example:

    >>> access(["org/text", "org/more", "org/base"], {"org/text": HubAnswer("manual"), "org/base": HubAnswer()})
    ['Gated on the Hub, so that access has to be asked for: org/text (granted by its authors).',
    'Whether access has to be asked for was not looked up on the Hub: org/more.']
    """
    how = {name: told[name].gated for name in names if name in told}
    gated = [f"{cell(name)} ({_GRANTED.get(gate, gate)})" for name, gate in how.items() if gate]
    unknown = [cell(name) for name in names if name not in told]
    lines = []
    if gated:
        lines.append(f"Gated on the Hub, so that access has to be asked for: {', '.join(gated)}.")
    if unknown:
        lines.append(f"Whether access has to be asked for was not looked up on the Hub: {', '.join(unknown)}.")
    return lines


def licence_of(told: Mapping[str, HubAnswer], *names: str | None) -> str | None:
    """Of the first of the repositories that states one."""
    answers = (told.get(name) for name in names if name is not None)
    return next((answer.licence for answer in answers if answer is not None and answer.licence), None)


def _names(value: Any) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if each]


def _template(name: str) -> str:
    return (files("hf_pretrain_ext") / "model_cards" / "templates" / name).read_text("utf-8")


def _methods(facts: CardFacts) -> list[dict[str, Any]]:
    """Card of each plug-in's method, where it is one of ours: title and papers."""
    found = []
    for name, settings in facts.plugins.items():
        path = files("hf_pretrain_ext") / "model_cards" / "methods" / f"{name}.md"
        head: dict[str, Any] = {"title": name, "papers": []}
        if path.is_file():
            head = yaml.safe_load(path.read_text("utf-8").split("---\n", 2)[1])
        found.append({**head, "name": name, "settings": settings})
    return found


def limits(facts: CardFacts) -> list[str]:
    """What does not go with the model elsewhere."""
    found = []
    if "meta_tokens" in facts.plugins:
        found.append(
            "Meta-attention is a part of its own: load the model with `hf_pretrain_ext.meta_tokens.load_meta_tokens`. "
            "Plain transformers leaves it out; vLLM and GGUF converters cannot carry it."
        )
    if "metadata" in facts.plugins:
        found.append(
            "Trained behind a line of metadata for a part of the run: it works without; with it, use the template in "
            "the config (`hf_pretrain_ext.metadata.generate`). The template is no chat template."
        )
    if facts.relation == "adapter":
        found.append("An adapter: it needs its base model, at the revision that it was trained on.")
    if not facts.forgetting:
        found.append("What was forgotten was not measured.")
    return found


def _figures(facts: CardFacts, folder: Path) -> list[tuple[str, str]]:
    """Plan and forgetting as PNG files, those that there is something to draw for."""
    from hf_pretrain_ext.report.plots import have_matplotlib

    if facts.record is None or not have_matplotlib():
        return []
    from hf_pretrain_ext.hub_card.drawing import draw_forgetting, draw_plan

    drawn = []
    for name, text, draw in (
        ("plan.png", "Learning rate and mixture over the run", draw_plan),
        ("forgetting.png", "Held-out losses over the run", draw_forgetting),
    ):
        path = folder / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if draw(facts, path):
            drawn.append((f"{FOLDER}/{name}", text))
    return drawn


def note_failure(error: Exception) -> None:
    """A card is not worth the push that it goes with."""
    say(f"no continued-pretraining section in the card: {shown(str(error), 500)}", logging.WARNING)
