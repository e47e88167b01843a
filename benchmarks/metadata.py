"""Metadata conditioning on real text with true sources: what it costs, and what a small model learns.

`python benchmarks/metadata.py speed|steps|study|report [--output FOLDER]`

    speed    seconds to prepare documents with metadata against plain packing, in interleaved pairs
    steps    seconds of a training step on blocks with metadata against plain ones of the same size
    study    plain training against MeCo, without cooldown and mixed, at equal tokens read: losses on held-out
             documents with no, right and wrong metadata, and what the model writes under each kind of source
    report   what FOLDER holds, as docs/metadata.md

Sources: modules of Python's standard library by package, manual pages by language and section (where `groff` and the
pages are installed). Every finished run is kept in FOLDER and not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_caching
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_pretrain_ext import PackedCollator, extend, pack, packing
from hf_pretrain_ext.callbacks import MetadataCallback
from hf_pretrain_ext.demo.manuals import english_manuals, german_manuals
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.metadata import generate, prepare
from hf_pretrain_ext.metadata import source as metadata_source

TEMPLATE = "Source: {source}\n\n"
BLOCK, BATCH, VOCABULARY = 256, 4, 2048
HELD_OUT = 40
"""Documents of every kind that no run reads."""

PAGES = 600
"""Manual pages of a language, at most."""

LEFT_OUT = {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "MeCo": {"cooldown": 0.1},
    "no cooldown": {"cooldown": 0},
    "mixed 90/10": {"cooldown": 0.1, "schedule": "mixed"},
    "same for all": {"cooldown": 0.1},
}
CONTROL = "same for all"
"""Behind metadata that say nothing: what a line before the text does by itself."""

PROMPTS = ("The ", "This ", "Use ", "\n")
SAMPLES, WRITTEN = 8, 64
"""Texts a prompt and kind of source, and tokens of each."""


def modules() -> Dataset:
    """The modules of packages of the standard library, tests left out, each with the package that it is from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {"text": [], "source": [], "kind": []}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) < 2 or LEFT_OUT & set(parts):
            continue
        found["text"].append(path.read_text("utf-8", errors="replace"))
        found["source"].append(f"python/{parts[0]}")
        found["kind"].append("python")
    return Dataset.from_dict(found)


def manuals(folder: Path) -> Dataset:
    """Manual pages, each with its language and section."""
    found: dict[str, list[str]] = {"text": [], "source": [], "kind": []}
    for kind, pages in (("english", english_manuals), ("german", german_manuals)):
        for name, text in pages(folder, PAGES):
            if text:
                # "man2/open.2" and "de/man1/tar.1"
                section = name.removeprefix("de/").split("/")[0].removeprefix("man")
                found["text"].append(text)
                found["source"].append(f"manual/{kind}/{section}")
                found["kind"].append(kind)
    return Dataset.from_dict(found)


def documents(folder: Path) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets([modules(), manuals(folder)]).shuffle(seed=0)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and bootstrap 95 % interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return statistics.median(ratios), float(low), float(high)


def speed(pairs: int) -> dict[str, Any]:
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        modules().save_to_disk(folder)
        rows = Dataset.load_from_disk(folder)
        rows = rows.select([row for _ in range(3) for row in range(len(rows))])
        tokenizer = train_tokenizer(rows["text"][::20], VOCABULARY)
        ratios, shares = [], []
        for number in range(pairs):
            seconds, rest = {}, {}
            for name in ("pack", "prepare") if number % 2 else ("prepare", "pack"):
                with timed_tokenization() as spent:
                    start = time.perf_counter()
                    if name == "pack":
                        pack(rows, tokenizer, 1024)
                    else:
                        prepare(rows, tokenizer, 1024, TEMPLATE)
                    seconds[name] = time.perf_counter() - start
                rest[name] = seconds[name] - sum(spent)
            ratios.append(seconds["prepare"] / seconds["pack"])
            shares.append((rest["prepare"] - rest["pack"]) / seconds["pack"])
    return {"pairs": pairs, "ratio": interval(ratios), "share": interval(shares)}


@contextmanager
def timed_tokenization() -> Iterator[list[float]]:
    """Seconds in the function that turns the documents' texts into ids, which both ways of preparing call."""
    spent: list[float] = []
    real = packing.tokenized

    def timed(*args: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args, **settings)
        finally:
            spent.append(time.perf_counter() - start)

    packing.tokenized = metadata_source.tokenized = timed
    try:
        yield spent
    finally:
        packing.tokenized = metadata_source.tokenized = real


def build_model(vocabulary: int) -> Any:
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=BLOCK, use_cache=False, **shape)
    )


def steps_of(pairs: int) -> dict[str, Any]:
    """Forward and backward of a batch of blocks with metadata, and of one of plain blocks."""
    rows = modules().select(range(200))
    tokenizer = train_tokenizer(rows["text"][::10], VOCABULARY)
    views = {
        "conditioned": prepare(rows, tokenizer, BLOCK, TEMPLATE),
        "plain": prepare(rows, tokenizer, BLOCK, conditioned=False),
    }
    model, collate = build_model(len(tokenizer)), PackedCollator()
    ratios = []
    for number in range(pairs + 2):
        seconds = {}
        for name in ("conditioned", "plain") if number % 2 else ("plain", "conditioned"):
            at = number * BATCH % (len(views[name]) - BATCH)
            batch = collate([views[name][row] for row in range(at, at + BATCH)])
            start = time.perf_counter()
            model(**batch).loss.backward()
            seconds[name] = time.perf_counter() - start
        if number >= 2:
            ratios.append(seconds["conditioned"] / seconds["plain"])
    return {"pairs": pairs, "ratio": interval(ratios)}


@torch.no_grad()
def loss_of(model: Any, rows: Any) -> float:
    """Mean loss over the tokens of text and EOS, in nats."""
    model.eval()
    collate, total, tokens = PackedCollator(), 0.0, 0
    for start in range(0, len(rows), 32):
        batch = collate([rows[row] for row in range(start, min(start + 32, len(rows)))])
        bearing = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * bearing
        tokens += bearing
    return total / tokens


class Judge:
    """Which kind of source a text is from, by its tokens alone: naive Bayes on counts in the training documents."""

    def __init__(self, rows: Dataset, tokenizer: Any):
        self.tokenizer = tokenizer
        self.kinds = sorted(set(rows["kind"]))
        counts = {kind: Counter[int]() for kind in self.kinds}
        for row in rows:
            counts[row["kind"]].update(self._ids(row["text"]))
        size = len(tokenizer)
        self.logs = {}
        for kind, count in counts.items():
            total = sum(count.values()) + size
            self.logs[kind] = [math.log((count[token] + 1) / total) for token in range(size)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def __call__(self, text: str) -> str:
        ids = self._ids(text)
        return max(self.kinds, key=lambda kind: sum(self.logs[kind][token] for token in ids))

    def accuracy(self, rows: Dataset) -> float:
        """On held-out texts of the length that the model writes."""
        right = [
            self(self.tokenizer.decode(self._ids(row["text"])[100 : 100 + WRITTEN])) == row["kind"] for row in rows
        ]
        return statistics.mean(right)


def written(model: Any, tokenizer: Any, judge: Judge, sources: dict[str, str], metadata: bool) -> dict[str, Any]:
    """Of what the model writes under the most frequent source of each kind: the share that is of that kind."""
    shares, examples = {}, {}
    for kind, source in sources.items():
        texts = []
        for prompt in PROMPTS:
            for sample in range(SAMPLES):
                torch.manual_seed(sample)
                given: tuple[Any, ...] = (TEMPLATE,) if metadata else ()
                values = {"values": {"source": source}} if metadata else {}
                settings = {"max_new_tokens": WRITTEN, "do_sample": True, "top_k": 50, **values}
                texts.append(generate(model, tokenizer, prompt, *given, **settings))
        shares[kind] = statistics.mean(judge(text) == kind for text in texts)
        examples[kind] = texts[0]
    return {"shares": shares, "examples": examples}


def study(seeds: int, steps: int, output: Path) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "documents").exists():
        documents(output).save_to_disk(output / "documents")
    # From disk, so that what one arm prepared the next finds in the cache.
    everything = Dataset.load_from_disk(str(output / "documents"))
    taken: Counter[str] = Counter()
    held: list[int] = []
    for number, kind in enumerate(everything["kind"]):
        if taken[kind] < HELD_OUT:
            taken[kind] += 1
            held.append(number)
    kept = sorted(set(range(len(everything))) - set(held))
    held_out, training = everything.select(held), everything.select(kept)
    # The sources that were seen in training: of others there is nothing to know.
    known = Counter(training["source"])
    held_out = held_out.filter(lambda row: row["source"] in known)
    tokenizer = train_tokenizer(training["text"][::10], VOCABULARY)
    judge = Judge(training, tokenizer)
    kinds = dict(zip(training["source"], training["kind"], strict=True))
    frequent = {
        kind: max((source for source in known if kinds[source] == kind), key=known.__getitem__) for kind in judge.kinds
    }
    draw = np.random.default_rng(0)
    # Wrong in kind as well where there are several, else in its package.
    wrong = []
    for own in held_out["source"]:
        others = [s for s in sorted(known) if s != own and (len(judge.kinds) == 1 or kinds[s] != kinds[own])]
        wrong.append(others[draw.integers(len(others))])
    sets = {
        "none": prepare(held_out, tokenizer, BLOCK, conditioned=False),
        "right": prepare(held_out, tokenizer, BLOCK, TEMPLATE),
        "wrong": prepare(held_out.remove_columns("source").add_column("source", wrong), tokenizer, BLOCK, TEMPLATE),
    }
    sets = {name: rows.select(range(0, len(rows), max(len(rows) // 150, 1))) for name, rows in sets.items()}
    plain = prepare(training, tokenizer, BLOCK, conditioned=False)
    silent = training.remove_columns("source").add_column("source", ["document"] * len(training))
    path = output / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["arm"], run["seed"], run["steps"]) for run in runs}
    for seed in range(seeds):
        for arm, given in ARMS.items():
            if (arm, seed, steps) in done:
                continue
            set_seed(seed)
            model = build_model(len(tokenizer))
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    folder,
                    per_device_train_batch_size=BATCH,
                    max_steps=steps,
                    learning_rate=1e-3,
                    adam_beta2=0.95,
                    lr_scheduler_type="cosine",
                    warmup_steps=0.1,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to=[],
                    seed=seed,
                    disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available(),
                )
                trainer = Trainer(
                    model,
                    arguments,
                    train_dataset=plain if given is None else silent if arm == CONTROL else training,
                    processing_class=tokenizer,
                    data_collator=PackedCollator(),
                    callbacks=[] if given is None else [MetadataCallback(TEMPLATE, block_size=BLOCK, **given)],
                )
                extend(trainer).train()
            model = model.cpu()
            run = {
                "arm": arm,
                "seed": seed,
                "steps": steps,
                **{name: loss_of(model, rows) for name, rows in sets.items()},
            }
            model.config.use_cache = True
            run["written"] = written(model, tokenizer, judge, frequent, metadata=given is not None)
            runs.append(run)
            with path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps({key: value for key, value in run.items() if key != "written"}), flush=True)
            print("   of that kind:", run["written"]["shares"], flush=True)
    return {
        "steps": steps,
        "seeds": seeds,
        "documents": {kind: training["kind"].count(kind) for kind in judge.kinds},
        "judge": judge.accuracy(held_out),
        "sources": frequent,
        "runs": [run for run in runs if run["steps"] == steps and run["seed"] < seeds],
    }


def half(values: list[float]) -> float:
    """Half of a 95 % interval by Student's t, for up to 5 runs."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), float("nan"))
    return t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def page(output: Path) -> str:
    def read(name: str) -> Any:
        path = output / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def cell(values: list[float], digits: int = 3) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {half(values):.{digits}f}"

    lines = ["# Metadata conditioning, measured", "", "Written by `python benchmarks/metadata.py report`, on CPU.", ""]
    if found := read("study"):
        tokens = found["steps"] * BATCH * BLOCK
        of = ", ".join(f"{number} {kind}" for kind, number in found["documents"].items())
        lines += [
            "## What is learned",
            "",
            f"A Llama of 1.3M parameters, {tokens / 1e6:.1f}M tokens an arm in {found['steps']} steps, metadata "
            f"included, blocks of {BLOCK}; documents: {of}; {found['seeds']} seeds, mean and half of a 95 % interval. "
            "AdamW (0.9, 0.95) at 1e-3, cosine, a tenth of warm-up. Loss in nats on held-out documents, of text and "
            "EOS alone, behind no, the right and a wrong source. *same for all* is a control that the paper lacks: "
            "MeCo behind `Source: document`, a line that says nothing. "
            "**This is the scale of a mechanism, not of the paper's gains downstream**, which are of models from 600M "
            "parameters on and tens of billions of tokens.",
            "",
            "| arm | none | right | wrong | wrong − right |",
            "|---|---:|---:|---:|---:|",
        ]
        arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for run in found["runs"]:
            arms[run["arm"]].append(run)
        for arm, runs in arms.items():
            losses = [[run[name] for run in runs] for name in ("none", "right", "wrong")]
            gap = [run["wrong"] - run["right"] for run in runs]
            lines.append(f"| {arm} | {' | '.join(cell(values) for values in (*losses, gap))} |")
        kinds = list(found["sources"])
        named = ", ".join(f"`{source}`" for source in found["sources"].values())
        lines += [
            "",
            "## What is written",
            "",
            f"{len(PROMPTS) * SAMPLES} texts of {WRITTEN} tokens under each of the sources {named} (`plain`: "
            "without), and the share that is of that kind, as judged by a naive Bayes of token counts, which tells "
            f"{found['judge']:.0%} of the held-out texts of that length.",
            "",
            f"| arm | {' | '.join(kinds)} |",
            f"|---|{'---:|' * len(kinds)}",
        ]
        for arm, runs in arms.items():
            shares = [[run["written"]["shares"][kind] for run in runs] for kind in kinds]
            lines.append(f"| {arm} | {' | '.join(cell(values, 2) for values in shares)} |")
        lines.append("")
    for name, title, text in (
        ("speed", "Preparation", "Seconds of `prepare` with metadata ÷ those of `pack`, same documents and block"),
        ("steps", "Training step", "Seconds of forward and backward on blocks with metadata ÷ those on plain blocks"),
    ):
        if found := read(name):
            middle, low, high = found["ratio"]
            lines += [
                f"## {title}",
                "",
                f"{text}: {middle:.3f}, 95 % interval {low:.3f} to {high:.3f} ({found['pairs']} interleaved pairs).",
                "",
            ]
            if share := found.get("share"):
                lines[-2] += (
                    " Most of both is one function that tokenizes the same texts, and its noise; what `prepare` does "
                    f"besides takes {share[0]:.1%} of `pack`'s time ({share[1]:.1%} to {share[2]:.1%})."
                )
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "steps", "study", "report"])
    parser.add_argument("--output", default="metadata_benchmark", help="folder of what is finished")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    given = parser.parse_args()
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    if given.what == "report":
        path = Path(__file__).parents[1] / "docs" / "metadata.md"
        path.write_text(page(output))
        print(f"written: {path}")
        return
    if given.what == "study":
        found = study(given.seeds, given.steps, output)
    else:
        found = (speed if given.what == "speed" else steps_of)(given.pairs)
        print(f"{given.what}: ratio {found['ratio'][0]:.3f}, 95 % {found['ratio'][1]:.3f} to {found['ratio'][2]:.3f}")
    (output / f"{given.what}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
