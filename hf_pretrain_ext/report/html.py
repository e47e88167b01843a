"""The report: one self-contained HTML page from the traces of one run or several, side by side."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pretrain_ext.report.drawing import clean, style
from hf_pretrain_ext.report.reading import RunRecord
from hf_pretrain_ext.trace import TRACE_NAME, read_trace

__all__ = ["Live", "labels_of", "need_extra", "render", "report"]

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Live:
    """What a page that follows its runs holds besides: seconds between looks, its ETag, and what there is to say."""

    every: float
    tag: str
    notice: str = ""


def report(runs: Sequence[str | Path], output: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Writes what happened in some runs as one HTML page: plans, rates, losses, forgetting, memory, events.

    Every figure comes from the traces. The page needs nothing else: no network, no scripts, no files beside it.

    Args:
        runs (`list` of `str` or `Path`): folders of runs, or their `trace.jsonl`.
        output (`str` or `Path`): the page to write, or an existing folder for `report.html`; a missing folder is made.
        labels (`list[str]`, *optional*): what to call the runs; defaults to the names of their folders. Where two are
            the same, folders are added.

    Returns:
        `Path`: the page.

    Raises:
        `FileNotFoundError`: a folder without a trace.
        `ImportError`: jinja2 or matplotlib is missing; they come with the extra `report`.
        `ValueError`: no runs, another number of labels than of runs, or a trace that cannot be read.

    Example:

    ```python
    report(["runs/plain", "runs/replay"], "report.html", labels=["plain", "with 5 % replay"])
    ```
    """
    need_extra()
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    records = [
        RunRecord(clean(label), clean(run), read_trace(run))
        for run, label in zip(runs, labels_of([Path(run) for run in runs], labels), strict=True)
    ]
    output = Path(output)
    output = output / "report.html" if output.is_dir() else output
    page, _ = render(records)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)
    return output


def need_extra() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the report needs jinja2 and matplotlib: pip install 'hf-pretrain-ext[report]'") from error


def labels_of(paths: list[Path], labels: Sequence[str] | None) -> list[str]:
    """A label for each run, no two the same."""
    if not paths:
        raise ValueError("no runs to report on: give at least one folder that holds a trace.jsonl")
    if labels is None:
        return _distinct([_folder(path).name for path in paths], [_tail(path, paths) for path in paths])
    labels = [labels] if isinstance(labels, str) else [str(label) for label in labels]
    if len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} runs: give one label a run, or none at all")
    return _distinct(labels, [f"{label} ({_tail(path, paths)})" for label, path in zip(labels, paths, strict=True)])


def _distinct(labels: list[str], longer: list[str]) -> list[str]:
    """`labels`, the longer form of those that occur twice, and a number where even that does."""
    seen = Counter(labels)
    chosen = [label if seen[label] == 1 else other for label, other in zip(labels, longer, strict=True)]
    taken: Counter[str] = Counter()
    unique = []
    for label in chosen:
        taken[label] += 1
        unique.append(label if taken[label] == 1 else f"{label} ({taken[label]})")
    return unique


def _folder(path: Path) -> Path:
    path = path.resolve()
    return path.parent if path.name == TRACE_NAME and not path.is_dir() else path


def _tail(path: Path, paths: list[Path]) -> str:
    """The last parts of a folder's path, as many as tell it from the folders of the other runs."""
    folder = _folder(path)
    others = [other for other in map(_folder, paths) if other != folder]
    for parts in range(1, len(folder.parts)):
        tail = folder.parts[-parts:]
        if all(other.parts[-parts:] != tail for other in others):
            return "/".join(tail)
    return str(folder)


def _sections(records: list[RunRecord]) -> list[Any]:
    from hf_pretrain_ext.report import benchmarks, documents, forgotten, life, memory, mixture, outcomes, sections

    parts = (
        *(sections.glance, sections.what_was_run, sections.plan, sections.rates, sections.losses, mixture.mixture),
        documents.documents,  # only where there were raw documents
        life.life,  # only where stages came before
        *(forgotten.forgetting, forgotten.stability_gap),
        benchmarks.benchmarks,  # only where some were run
        memory.memory,
        *(outcomes.events, outcomes.environment, outcomes.unknown),
    )
    with style():
        made = [part(records) for part in parts]
    return [section for section in made if section is not None]


def render(records: list[RunRecord], live: Live | None = None) -> tuple[str, str]:
    """The page and its content security policy. Only one that follows its runs (`live`) holds a script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Before escaping: what an HTML page cannot hold.
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    css = environment.get_template("report.css.j2").render()
    script = environment.get_template("live.js.j2").render() if live else ""
    # Style sheet and script are allowed by their hashes; others that came in with a name would not run.
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(css)}'; base-uri 'none'; form-action 'none'"
    policy += f"; script-src '{_digest(script)}'; connect-src 'self'" if live else ""
    begun = any(record.events for record in records)
    page = environment.get_template("report.html.j2").render(
        runs=records,
        sections=_sections(records) if begun or not live else [],
        style=css,
        policy=policy,
        live=live,
        script=script,
    )
    return page, policy


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
