"""What became of raw documents: the report's section on metadata and control tokens, from the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_pretrain_ext.report.reading import RunRecord, mapping, number
from hf_pretrain_ext.report.tables import Cell, Section, Table, count, percent, run_cell, text

__all__ = ["documents"]

_VIEWS = ("conditioned", "plain")

_OF_DOCUMENTS = {
    "Documents": "documents",
    "empty": "empty_documents",
    "with metadata": "conditioned_documents",
    "lack a value": "missing",
    "metadata left out": "without_metadata",
    "Texts for control tokens": "segments",
    "lack a score": "missing_scores",
    "control token left out": "without_control",
}

_OF_TOKENS = {
    "Blocks": "blocks",
    "Tokens a block": "block_size",
    "Text and EOS": "kept",
    "dropped": "dropped",
    "BOS": "bos_tokens",
    "Metadata": "metadata_tokens",
    "Control tokens": "control_tokens",
    "Padded": "padded",
}


def documents(runs: Sequence[RunRecord]) -> Section | None:
    """The section, or None where no run made blocks of documents."""
    found = [(index, *view) for index, run in enumerate(runs) for view in _views(run)]
    if not found:
        return None
    counted = [[*_label(runs, index, name, view), *_counts(view, _OF_DOCUMENTS)] for index, name, view in found]
    tokens = [
        [*_label(runs, index, name, view), *_counts(view, _OF_TOKENS), _padded(view)] for index, name, view in found
    ]
    note = "Text and EOS is what the blocks hold of the documents, dropped what did not fit and was left out. "
    note += "Of a stream only the first blocks were counted, before training."
    return Section(
        "documents",
        "Documents",
        "What was made of raw documents: who had metadata and control tokens, and where every token went.",
        [
            Table(["Run", "View", *_OF_DOCUMENTS], counted, "Documents and texts"),
            Table(["Run", "View", *_OF_TOKENS, "padded, share"], tokens, "Tokens", note),
        ],
    )


def _views(run: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    # A resumed run says it once a session.
    last = mapping(next(reversed(run.of("metadata")), None))
    return [(name, view) for name in _VIEWS if (view := mapping(last.get(name)))]


def _label(runs: Sequence[RunRecord], index: int, name: str, view: dict[str, Any]) -> list[Cell]:
    blocks = number(view.get("blocks"))
    first = f" (first {blocks:,.0f} blocks of a stream)" if view.get("sampled") and blocks is not None else ""
    return [run_cell(runs, index), text(name + first)]


def _counts(view: dict[str, Any], names: dict[str, str]) -> list[Cell]:
    return [count(number(view.get(key)), "not known") for key in names.values()]


def _padded(view: dict[str, Any]) -> Cell:
    padded, blocks, size = (number(view.get(key)) for key in ("padded", "blocks", "block_size"))
    total = blocks * size if blocks is not None and size is not None else None
    return percent(padded / total if padded is not None and total else None, "not known")
