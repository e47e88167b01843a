"""The report's section on raw documents: the counts of the trace, by hand and from runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_traces as traces
import settings
import tiny
from report_traces import Page
from test_metadata_callback import run

from hf_pretrain_ext import read_trace
from hf_pretrain_ext.metadata import BlockStream, ControlTokens, prepare
from hf_pretrain_ext.report.html import report

COUNTS = {
    "documents": 90,
    "empty_documents": 1,
    "conditioned_documents": 80,
    "missing": 7,
    "without_metadata": 9,
    "text_tokens": 3000,
    "eos_tokens": 89,
    "bos_tokens": 100,
    "metadata_tokens": 500,
    "control_tokens": 60,
    "segments": 70,
    "without_control": 4,
    "missing_scores": 6,
    "pieces": 100,
    "blocks": 4,
    "block_size": 1000,
    "kept": 3040,
    "dropped": 49,
    "padded": 300,
}


def page_of(folder: Path, *events: dict[str, Any]) -> Page:
    start, *rest = traces.events()
    traces.write(folder, [start, *events, *rest])
    return Page(report([folder], folder / "report.html", ["one"]))


def test_counts_are_those_of_the_trace(tmp_path: Path) -> None:
    view = {**COUNTS, "sampled": False}
    known = {name: count for name, count in COUNTS.items() if name not in ("empty_documents", "text_tokens")}
    stream = {**known, "documents": 33, "blocks": 2, "sampled": True}
    early = {"event": "metadata", "step": 0, "boundary": 30, "conditioned": {**view, "documents": 1}}
    last = {"event": "metadata", "step": 3, "boundary": 30, "conditioned": view, "plain": stream}
    page = page_of(tmp_path, early, last)
    assert page.row("documents", "one", "conditioned") == [90, 1, 80, 7, 9, 70, 6, 4]
    assert page.row("documents", "one", "plain (first 2 blocks of a stream)")[:3] == [33, "not known", 80]
    tokens = [4, 1000, 3040, 49, 100, 500, 60, 300, 0.075]
    assert page.row("documents", "one", "conditioned", table=1) == tokens
    assert page.row("documents", "one", "plain (first 2 blocks of a stream)", table=1)[-1] == 0.15


def test_without_documents_there_is_no_such_section(tmp_path: Path) -> None:
    assert "documents" not in page_of(tmp_path).tables


def test_a_trace_of_another_form_is_read_with_tolerance(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"event": "metadata", "step": 0, "conditioned": {"blocks": "many"}, "plain": 3})
    assert page.row("documents", "one", "conditioned", table=1) == ["not known"] * 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_tells_it(stream: bool, tmp_path: Path) -> None:
    """Dropped tokens, missing values and padding of a run with both, from the trace that it wrote."""
    data = settings.scored_documents(120, lacking=True)
    made = settings.control("{domain} ", overflow="discard", drop=0.2, cooldown=0)
    trained = run(
        tmp_path,
        made,
        data=data.to_iterable_dataset() if stream else data,
        processing_class=tiny.tokenizer(),
    )
    trained.train()
    event = next(event for event in read_trace(tmp_path) if event["event"] == "metadata")["conditioned"]
    rows = trained.plugin_run.plan.sources[0].dataset
    blocks = [row for row, _ in zip(rows, range(event["blocks"]), strict=False)]
    ids = [number for row in blocks for number in row["input_ids"]]
    control = trained.processing_class.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert event["sampled"] is stream and event["blocks"] > 20
    assert event["control_tokens"] == sum(number in control for number in ids)
    kinds = ("kept", "bos_tokens", "metadata_tokens", "control_tokens", "padded")
    assert sum(event[name] for name in kinds) == event["blocks"] * 16
    assert min(event[name] for name in ("dropped", "missing_scores", "without_metadata", "without_control")) > 0
    page = Page(report([tmp_path], tmp_path / "report.html", ["one"]))
    view = f"conditioned (first {event['blocks']} blocks of a stream)" if stream else "conditioned"
    assert page.row("documents", "one", view, table=1)[2:4] == [event["kept"], event["dropped"]]


@pytest.mark.parametrize("overflow", ["split", "discard"])
def test_a_stream_read_to_its_end_counts_as_the_dataset_does(overflow: Any) -> None:
    """All figures that both know, with every kind of lack among the documents; drops are keyed otherwise there."""
    data = settings.scored_documents(150, lacking=True)
    urls = [None if row % 7 == 0 else url for row, url in enumerate(data["url"])]
    data = data.remove_columns("url").add_column("url", urls)
    given: dict[str, Any] = {
        "control": ControlTokens(0.5, segments=settings.thirds, drop=0.0),
        "overflow": overflow,
    }
    _rows, whole = prepare(data, tiny.tokenizer(), 32, "{domain} ", return_report=True, **given)
    stream = BlockStream(data.to_iterable_dataset(), tiny.tokenizer(), 32, "{domain} ", **given)
    found = vars(stream.report(10**6))
    assert found == {name: count for name, count in vars(whole).items() if name in found}
    assert found["missing"] > 10 and found["missing_scores"] > 20 and (overflow == "split") == (not found["dropped"])
    assert vars(stream.report(3))["blocks"] == 3 and vars(stream.report(3))["padded"] <= found["padded"]
