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

__all__ = ["BEGIN", "END", "kept_card", "put_back", "section", "with_section", "write_card"]

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
        base_model (`str`, *optional*): name on the Hub; defaults to what the card or else the run says.
        metadata (`Mapping`, *optional*): more fields of the card's YAML, `license` and `language` say; they win over
            those that are there, and those that are None leave them.
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
        `ValueError`: metadata that the Hub would not read, a licence for a source that there is not, or a README whose
            markers or YAML are broken.

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
    sources = list(dict.fromkeys(source.name for source in facts.sources))
    if unknown := [source for source in data_licences or {} if source not in sources]:
        raise ValueError(
            f"data_licences names {shown(unknown[0])}, and the run's sources are {sources}. Name one of these"
            if sources
            else f"data_licences names {shown(unknown[0])}, and no sources were recorded. Leave it out"
        )
    name = model_name or folder.resolve().name
    head, body = _split(output.read_text("utf-8")) if output.exists() else ({}, f"# {name}\n")
    given = {key: value for key, value in {"base_model": base_model, **(metadata or {})}.items() if value is not None}
    data = metadata_of(facts, name, {**without_paths(head, facts.local_base), **given})
    if faults := check_metadata(data):
        raise ValueError(f"the metadata of {output} cannot be used: {'; '.join(faults)}. Pass others in `metadata`")
    drawn = _figures(facts, output.parent) if figures else []
    named = _names(data.get("datasets")), _names(data.get("base_model"))
    asked = ask_the_hub(*named, token=token) if ask_hub else {}
    text = with_section(filled_only(body, name), section(facts, data, data_licences or {}, drawn, asked))
    _write(output, _joined(data, text))
    return output


def kept_card(path: Path) -> str | None:
    """The text of the card in `path`, if it must outlive the host, which writes its draft over it; None if not.

    A draft that was left as the host wrote it is none; one with our section in it may be anything by now.
    """
    if not path.is_file():
        return None
    text = path.read_text("utf-8")
    return None if BEGIN not in text and _is_draft(text) else text


def put_back(path: Path, kept: str, asked_for: Sequence[str] = ()) -> None:
    """
    Puts a card of before in place of the one that the host has written over it. Of the host's it takes the fields that
    were missing, what its lists have more, and those in `asked_for`.

    Raises:
        `ValueError`: the YAML of a card cannot be read; then the one of before stands as it was.
    """
    written = path.read_text("utf-8")
    _write(path, kept)
    head, body = _split(kept)
    for key, value in _split(written)[0].items():
        if key in asked_for or head.get(key) is None:
            head[key] = value
        elif key in ("datasets", "tags"):
            head[key] = list(dict.fromkeys([*_names(head[key]), *_names(value)]))
    _write(path, _joined(head, body))


def _joined(head: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


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
_LEADS = ("Use the code below to get started with the model.", "**BibTeX:**", "**APA:**")
_OF_THE_TRAINER = re.compile(r"<!-- This model card has been generated automatically.*?-->\n*", re.DOTALL)
_OF_TRL = "It has been trained using [TRL](https://github.com/huggingface/trl)."
_NAMELESS = r"This model is a fine-tuned version of \[(?:None)?\]\(https://huggingface\.co/(?:None)?\)"
_SENTENCES = (
    # Without a name of base or data, the host's sentence says nothing, or that a base in a folder was none.
    (rf"^(?:{_NAMELESS}|This model was trained from scratch)(?: on (?:the None|an unknown) dataset)?\.\n?", ""),
    (rf"^{_NAMELESS} on the ", "This model was trained on the "),
    (r"^(This model is a fine-tuned version of .*) on (?:the None|an unknown) dataset\.", r"\1."),
)


def filled_only(body: str, name: str) -> str:
    """
    A card's text without what stands unfilled in the form that PEFT and the Hub's client write, in the Trainer's draft
    and in TRL's: hints, lines and headings that say "More Information Needed", sentences about None. Any other text is
    the user's and stays as it is.

    Example:

    >>> form = "# Model Card for Model ID\\n\\n## Uses\\n\\n[More Information Needed]\\n\\n## Framework\\n\\n- PEFT"
    >>> filled_only(form, "mine")
    '# mine\\n\\n## Framework\\n\\n- PEFT\\n'
    """
    if body.lstrip().startswith(_FORM):
        text = re.sub(r"<!--(?! hf-pretrain-ext).*?-->", "", body.replace(_FORM, f"# {name}", 1), flags=re.DOTALL)
        lines = [line for line in text.splitlines() if _UNFILLED.lower() not in line.lower()]
    elif _OF_THE_TRAINER.search(body) or (_OF_TRL in body and "None" in body):
        text = re.sub(r"\A\s*# Model Card for None$", f"# {name}", _OF_THE_TRAINER.sub("", body), flags=re.MULTILINE)
        text = text.replace('pipeline("text-generation", model="None"', f'pipeline("text-generation", model="{name}"')
        for pattern, put in _SENTENCES:
            text = re.sub(pattern, put, text, flags=re.MULTILINE)
        lines = [line for line in text.splitlines() if line.strip().lower() != _UNFILLED.lower()]
    else:
        return body
    kept: list[str] = []
    for line in reversed(lines):
        # From the end: a heading with nothing below it, or only a heading of its own level or above, holds nothing.
        level = _level(line)
        below = next((each for each in reversed(kept) if each.strip()), None)
        if level > 1 and (below is None or 0 < _level(below) <= level):
            continue
        kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(reversed(kept))).strip() + "\n"


def _level(line: str) -> int:
    """Of a heading; 0 for text. What the form says before something to fill in stands below all headings."""
    if line.strip() in _LEADS or line.startswith("Carbon emissions can be estimated using the [Machine Learning"):
        return 7
    if line.strip() == "### Framework versions":
        return 2  # PEFT puts it below the form's last heading, whatever that is
    return len(line) - len(line.lstrip("#")) if re.match(r"#+ ", line) else 0


_HEADINGS = {"Training procedure", "Training hyperparameters", "Training results", "Framework versions"}
_HOSTS = re.compile(
    r"- .+|\|.*|This model (is a fine-tuned version|was trained) .*|It achieves the following results .*"
    r"|The following hyperparameters were used .*|"
)


def _is_draft(text: str) -> bool:
    """Whether a card is the Trainer's draft, or PEFT's form, in which nobody has written."""
    try:
        _, body = _split(text)
    except ValueError:
        return False
    lines = filled_only(body, "draft").splitlines()
    if not (body.lstrip().startswith(_FORM) or _OF_THE_TRAINER.search(body)) or not lines:
        return False
    headings = {line.lstrip("# ") for line in lines[1:] if line.startswith("##")}
    return headings <= _HEADINGS and all(_HOSTS.fullmatch(line) for line in lines[1:] if not line.startswith("##"))


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
        licences=licences,
        figures=figures,
        bases=bases,
        base_licence=facts.base_licence or licence_of(told, *bases),
        access=access([*bases, *_names(data.get("datasets", facts.datasets))], told),
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
    for use in facts.uses:
        path = files("hf_pretrain_ext") / "model_cards" / "methods" / f"{use.plugin}.md"
        head: dict[str, Any] = {"title": use.plugin, "papers": []}
        if path.is_file():
            head = yaml.safe_load(path.read_text("utf-8").split("---\n", 2)[1])
        found.append({**head, "name": use.plugin, "settings": use.settings, "stages": ", ".join(use.stages)})
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
    if facts.not_finite:
        found.append(
            f"Held-out losses were not finite at times: {', '.join(cell(name) for name in facts.not_finite)}."
        )
    elif not facts.forgetting:
        found.append(_unmeasured(facts))
    return found


def _unmeasured(facts: CardFacts) -> str:
    if facts.record is not None and facts.record.probes:
        return "Held-out losses were not measured from the first step on: what was forgotten is not known."
    if any(stage.recorded.get("forgetting") for stage in facts.stages[:-1]):
        return "What was forgotten in the last stage was not measured; it was in earlier ones."
    return "What was forgotten was not measured."


def _figures(facts: CardFacts, folder: Path) -> list[tuple[str, str]]:
    """Plan, forgetting and stages as PNG files, those that there is something to draw for."""
    from hf_pretrain_ext.report.plots import have_matplotlib

    if not have_matplotlib():
        return []
    from hf_pretrain_ext.hub_card.drawing import draw_forgetting, draw_life, draw_plan

    drawn, place = [], folder / FOLDER
    new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    for name, text, draw in (
        ("plan.png", "Learning rate and mixture over the run", draw_plan),
        ("forgetting.png", "Held-out losses over the run", draw_forgetting),
        ("stages.png", "What each stage of the model's life read, in tokens, by source", draw_life),
    ):
        if draw(facts, place / name):
            drawn.append((f"{FOLDER}/{name}", text))
    if new and not drawn:
        place.rmdir()
    return drawn


def note_failure(error: Exception) -> None:
    """A card is not worth the push that it goes with."""
    say(f"no continued-pretraining section in the card: {shown(str(error), 500)}", logging.WARNING)
