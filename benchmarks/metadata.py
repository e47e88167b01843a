"""Metadata conditioning on the standard library by package: what it costs to prepare, and what a small model learns.

`python benchmarks/metadata.py speed`: seconds to prepare documents with metadata against plain packing, in
interleaved pairs. `python benchmarks/metadata.py study`: plain training against MeCo, without cooldown and mixed, at
equal tokens read; loss on held-out modules with no, right and wrong metadata.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_caching
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_pretrain_ext import PackedCollator, extend, pack
from hf_pretrain_ext.callbacks import MetadataCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.metadata import prepare

TEMPLATE = "Package: {package}\n\n"
BLOCK = 128
LEFT_OUT = {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "MeCo": {"cooldown": 0.1},
    "no cooldown": {"cooldown": 0},
    "mixed 90/10": {"cooldown": 0.1, "schedule": "mixed"},
}


def modules() -> Dataset:
    """The modules of packages of the standard library, tests left out, each with the package that it is from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {"text": [], "package": []}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) < 2 or LEFT_OUT & set(parts):
            continue
        found["text"].append(path.read_text("utf-8", errors="replace"))
        found["package"].append(parts[0])
    return Dataset.from_dict(found)


def speed(pairs: int) -> None:
    """Of the whole preparation, and of what comes after the tokenizing that both share."""
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        modules().save_to_disk(folder)
        documents = Dataset.load_from_disk(folder)
        documents = documents.select([row for _ in range(3) for row in range(len(documents))])
        tokenizer = train_tokenizer(documents["text"][::20], 2048)
        ratios = []
        for number in range(pairs):
            seconds = {}
            for name in ("pack", "prepare") if number % 2 else ("prepare", "pack"):
                start = time.perf_counter()
                if name == "pack":
                    pack(documents, tokenizer, 1024)
                else:
                    prepare(documents, tokenizer, 1024, TEMPLATE)
                seconds[name] = time.perf_counter() - start
            ratios.append(seconds["prepare"] / seconds["pack"])
    draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(f"prepare / pack: median {statistics.median(ratios):.3f} of {pairs} pairs, 95 % {low:.3f} to {high:.3f}")


@torch.no_grad()
def loss_of(model: Any, rows: Any) -> float:
    """Mean loss over the tokens of text and EOS, in nats."""
    model.eval()
    collate, total, tokens = PackedCollator(), 0.0, 0
    for start in range(0, len(rows), 64):
        batch = collate([rows[row] for row in range(start, min(start + 64, len(rows)))])
        bearing = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * bearing
        tokens += bearing
    return total / tokens


def study(seeds: int, steps: int, folder: str) -> None:
    modules().shuffle(seed=0).save_to_disk(folder)
    # From disk, so that what one arm prepared the next finds in the cache.
    everything = Dataset.load_from_disk(folder)
    held_out, documents = everything.select(range(60)), everything.select(range(60, len(everything)))
    # The packages that were seen in training: of others there is nothing to know.
    known = set(documents["package"])
    held_out = held_out.filter(lambda row: row["package"] in known)
    tokenizer = train_tokenizer(documents["text"][::10], 1024)
    others = sorted(known)
    wrong = [
        next(p for p in np.random.default_rng(row).permutation(others) if p != own)
        for row, own in enumerate(held_out["package"])
    ]
    sets = {
        "none": prepare(held_out, tokenizer, BLOCK, conditioned=False),
        "right": prepare(held_out, tokenizer, BLOCK, TEMPLATE),
        "wrong": prepare(held_out.remove_columns("package").add_column("package", wrong), tokenizer, BLOCK, TEMPLATE),
    }
    sets = {name: rows.select(range(0, len(rows), max(len(rows) // 200, 1))) for name, rows in sets.items()}
    plain = prepare(documents, tokenizer, BLOCK, conditioned=False)
    found: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in sets} for arm in ARMS}
    for seed in range(seeds):
        for arm, given in ARMS.items():
            set_seed(seed)
            shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=BLOCK, **shape))
            with tempfile.TemporaryDirectory() as output:
                arguments = TrainingArguments(
                    output,
                    per_device_train_batch_size=16,
                    max_steps=steps,
                    learning_rate=3e-3,
                    lr_scheduler_type="cosine",
                    warmup_steps=0.05,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to=[],
                    seed=seed,
                    disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available(),
                )
                callbacks = [MetadataCallback(TEMPLATE, block_size=BLOCK, **given)] if given is not None else []
                trainer = Trainer(
                    model,
                    arguments,
                    train_dataset=plain if given is None else documents,
                    processing_class=tokenizer,
                    data_collator=PackedCollator(),
                    callbacks=callbacks,
                )
                extend(trainer).train()
            for name, rows in sets.items():
                found[arm][name].append(loss_of(model.cpu(), rows))
            print(json.dumps({"seed": seed, "arm": arm, **{name: found[arm][name][-1] for name in sets}}), flush=True)
    print(f"| arm | {' | '.join(sets)} | wrong − right |\n|---|{'---|' * (len(sets) + 1)}")
    for arm, losses in found.items():
        gap = [b - a for a, b in zip(losses["right"], losses["wrong"], strict=True)]
        cells = [f"{statistics.mean(values):.3f} ± {_half(values):.3f}" for values in (*losses.values(), gap)]
        print(f"| {arm} | {' | '.join(cells)} |")


def _half(values: list[float]) -> float:
    """Half of a 95 % interval by Student's t, for up to 5 seeds."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), float("nan"))
    return t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "study"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.pairs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            study(given.seeds, given.steps, folder)
