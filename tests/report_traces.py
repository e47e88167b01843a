"""Traces as files, written by hand, and pages taken apart: what the tests of the report share."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "img", "br", "hr", "link", "input"}

MIB = 1 << 20
TOTAL, BATCH, WARM = 40, 8, 4
PEAK, LOW = 1e-2, 1e-3
GENERAL = {0: 2.0, 1: 2.1, 2: 2.5, 3: 2.25, 4: 2.005, 20: 1.9, 40: 1.95}
DOMAIN = {0: 4.0, 1: 3.9, 2: 3.7, 3: 3.5, 4: 3.25, 20: 2.5, 40: 2.25}


def rate(step: int) -> float:
    """The planned rate, from the formula in the README and not from the package."""
    if step <= WARM:
        return PEAK * step / WARM
    return LOW + (PEAK - LOW) / 2 * (1 + math.cos(math.pi * (step - WARM) / (TOTAL - WARM)))


def counts(step: int) -> dict[str, Any]:
    """A quarter of the samples replayed; 16 tokens a row of the new data and 12 of the old, all but one with loss."""
    old = step * BATCH // 4
    new = step * BATCH - old
    return {
        "train": {"samples": new, "tokens": new * 16, "loss_tokens": new * 15, "replayed": False},
        "replay": {"samples": old, "tokens": old * 12, "loss_tokens": old * 11, "replayed": True},
    }


def loss(step: int) -> float:
    return 3.0 + 1.0 / (1 + step)


def start(**changes: Any) -> dict[str, Any]:
    rewarm = {"peak_lr": PEAK, "schedule": "cosine", "warmup": "4", "min_lr": "10%", "decay": None}
    replay = {"ratio": 0.25, "mode": "equivalent", "order": "shuffled"}
    phases = [
        {"name": "warm-up", "steps": WARM, "shape": "linear", "first": 0.0, "last": PEAK},
        {"name": "decay", "steps": TOTAL - WARM, "shape": "cosine", "first": PEAK, "last": LOW},
    ]
    plan = {
        "seed": 11,
        "window": 8,
        "epoch": 200,
        "sources": [
            {"name": "train", "num_rows": 160, "order": "shuffled", "replayed": False},
            {"name": "replay", "num_rows": 400, "order": "original", "replayed": True},
        ],
        "segments": [{"start": 0, "weights": [3, 1]}],
        "phases": [],
    }
    event = {
        "event": "start",
        "step": 0,
        "plugins": {"forgetting": {}, "replay": replay, "rewarm": rewarm},
        "identity": {
            "plugins": {"replay": replay, "rewarm": rewarm},
            "plan": plan,
            "schedule": {"name": "cosine", "phases": phases},
            "data": {"train": "aaaa", "replay": "bbbb"},
            "global_batch": BATCH,
            "total_steps": TOTAL,
            "arguments": {"seed": 11, "data_seed": None, "weight_decay": 0.01, "optim": "adamw_torch", "bf16": False},
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "describe": ["replay: 80 of 320 samples (25.00%)", "rewarm: warm-up   steps  0 – 4"],
        "preview": preview(),
    }
    return {**event, **changes}


def preview(**changes: Any) -> dict[str, Any]:
    steps = list(range(TOTAL + 1))
    plan = {
        "total_steps": TOTAL,
        "steps_per_epoch": 25,
        "global_batch": BATCH,
        "learning_rate": {
            "steps": steps,
            "rates": [rate(step) for step in steps],
            "phases": [{"name": "warm-up", "start": 0, "stop": WARM}, {"name": "decay", "start": WARM, "stop": TOTAL}],
        },
        "sources": [
            {"name": "train", "rows": 160, "replayed": False, "order": "shuffled", "samples": 240}
            | {"tokens": 3840.0, "tokens_exact": True, "passes": 1.5},
            {"name": "replay", "rows": 400, "replayed": True, "order": "original", "samples": 80}
            | {"tokens": 961.5, "tokens_exact": False, "passes": 0.2},
        ],
        "mixture": [{"step": 0, "shares": {"train": 0.75, "replay": 0.25}, "unit": "samples"}],
        "phases": [{"name": "cooldown", "start": 30, "stop": 40}],
        "marks": {"forgetting": sorted(GENERAL)},
        "tokens": 4801.5,
        "tokens_exact": False,
    }
    return {**plan, **changes}


def session(step: int = 0, **changes: Any) -> dict[str, Any]:
    where = {"system": "Linux 6.1", "architecture": "x86_64", "processors": 16, "memory": 1 << 37}
    where |= {"device": "cuda", "device_name": "A GPU", "device_memory": 1 << 36}
    found = {"event": "session", "step": step, "time": "2026-03-04T05:06:07+00:00", "machine": where, "ranks": 2}
    return {**found, "command": "train.py --fast", "notes": ["replay: the old rows are few. Add some."], **changes}


def usage(step: int) -> dict[str, Any]:
    """Two steps a second; main memory falls back from its peak, the device's peak grows by a MiB a step."""
    held = {"resident": 300 * MIB, "peak_resident": 512 * MIB, "device_peak": (1024 + step) * MIB}
    return {"event": "usage", "step": step, **held, "seconds": step / 2}


def events(until: int = TOTAL, **changes: Any) -> list[dict[str, Any]]:
    """A run of `TOTAL` steps that logs every 4, saves every 10; changes are those of its start."""
    found = [start(**changes), session()]
    for step in range(until + 1):
        if step in GENERAL:
            losses = {"eval_general_loss": GENERAL[step], "eval_domain_loss": DOMAIN[step]}
            losses |= {key.replace("loss", "perplexity"): math.exp(value) for key, value in losses.items()}
            found.append({"event": "probe", "step": step, "losses": losses, "seconds": 0.25})
            found.append({"event": "log", "step": step, "scalars": losses, "counts": counts(step)})
        if step and step % 4 == 0:
            found.append(usage(step))
            scalars = {"loss": loss(step), "learning_rate": rate(step - 1), "grad_norm": 0.5, "epoch": step / 25}
            found.append({"event": "log", "step": step, "scalars": scalars, "counts": counts(step)})
        if step and step % 10 == 0:
            found.append(
                {"event": "log", "step": step, "scalars": {"eval_loss": 5 - step / 100}, "counts": counts(step)}
            )
            found.append({"event": "save", "step": step, "folder": f"checkpoint-{step}"})
        if step == 2:
            found.append({"event": "alert", "step": 2, "set": "general", "rise": 0.5, "threshold": 0.125})
    if until == TOTAL:
        found.append({"event": "log", "step": until, "scalars": {"train_loss": 3.0625}, "counts": counts(until)})
        found.append(usage(until))
        found.append({"event": "end", "step": until, "counts": counts(until)})
    return found


def write(folder: Path, found: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.jsonl").write_text("".join(json.dumps(event) + "\n" for event in found), encoding="utf-8")
    return folder


def cheap(monkeypatch: Any) -> None:
    """Figures are made but not written, which is most of the time of a page."""
    for module in ("sections", "mixture", "forgotten", "memory"):
        monkeypatch.setattr(f"hf_pretrain_ext.report.{module}.data_uri", lambda figure: "data:,")


class Page(HTMLParser):
    """A page taken apart: elements, text, tables by section. Tags that are not balanced are an error."""

    def __init__(self, source: str | Path):
        super().__init__(convert_charrefs=True)
        self.source = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.tables: dict[str, list[list[list[tuple[str, float | str | None, str]]]]] = {}
        self.section = ""
        self.cell: list[Any] | None = None
        self.feed(self.source)
        self.close()
        if self.open:
            raise AssertionError(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if len(given) != len(attrs):
            raise AssertionError(f"an attribute twice: {attrs}")
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"] or ""
            self.tables[self.section] = []
        elif tag == "table":
            self.tables[self.section].append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.cell = ["", None, given.get("class") or ""]
        elif tag == "data" and self.cell is not None:
            self.cell[1] = float(given["value"] or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            raise AssertionError(f"</{tag}> at {self.getpos()} while {self.open[-3:]} are open")
        self.open.pop()
        if tag in ("td", "th") and self.cell is not None:
            self.tables[self.section][-1][-1].append(tuple(self.cell))
            self.cell = None
        elif tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        where = self.section or ("style" if "style" in self.open else "title" if "title" in self.open else "head")
        self.texts[where] = self.texts.get(where, "") + data
        if self.cell is not None:
            self.cell[0] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, section: str, *first: str, table: int = 0) -> list[float | str]:
        """The cells after those that read `first`: numbers unrounded, other cells as their text."""
        for row in self.tables[section][table]:
            if tuple(cell[0] for cell in row[: len(first)]) == first:
                return [cell[0] if cell[1] is None else cell[1] for cell in row[len(first) :]]
        raise AssertionError(f"no row {first} in {section}: {self.tables[section][table]}")

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())
