"""How fast texts become packed blocks, beside TRL's `pack_dataset` on the same documents.

`python benchmarks/packing.py [--pairs 20] [--megabytes 16] [--block_size 1024] [--output FILE]` prints a table and
writes JSON. The text is Python's standard library, one document a file (6 times over for packing alone), tokenized by
a byte-level BPE of 4,096 tokens. Every arm reads memory-mapped Arrow files and writes one. Arms are interleaved, and
ratios are those of one round: their median with a bootstrap 95 % interval. Above 1 says that ours is faster.

Packing alone, by what an arm writes for a token:

    ours                     input_ids (4 bytes) and position_ids (2); documents kept apart
    ours, isolate=False      the same columns
    TRL wrapped, ids         input_ids (4); where documents begin is lost
    TRL wrapped, as SFT      input_ids (4) and labels (8), as SFTTrainer packs; where documents begin is lost
    TRL bfd_split, as SFT    the same columns; documents kept apart, and put in another order
    TRL bfd, as SFT          the same, and what is longer than a block is cut off
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arm = Callable[[], Any]

REPEATS = 6
"""How often the corpus is repeated where packing alone is timed."""


def corpus(folder: Path, megabytes: float) -> tuple[Any, Any]:
    """Texts on disk and a tokenizer."""
    from datasets import Dataset, load_from_disk

    from hf_pretrain_ext.demo.tokenizer import train_tokenizer

    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or size > megabytes * 1e6:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        size += len(text)
    tokenizer = train_tokenizer(texts[::10], vocab_size=4096)
    Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "texts"))
    return load_from_disk(str(folder / "texts")), tokenizer


def trl_tokens(texts: Any, tokenizer: Any, num_proc: int | None = None) -> Any:
    """Tokens with EOS, as one writes it by hand: a batched map (SFTTrainer tokenizes row by row, which is slower)."""
    # A copy has an empty cache of words, as in every new process, and as the copy that `pack` takes.
    tokenizer = copy.deepcopy(tokenizer)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [[*row, tokenizer.eos_token_id] for row in ids["input_ids"]]}

    return texts.map(tokenize, batched=True, remove_columns=texts.column_names, num_proc=num_proc)


def measure(arms: dict[str, Arm], tidy: Callable[[Any], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        # The order alternates, so that a drift of the machine favours none.
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            made = arms[name]()
            seconds = time.perf_counter() - began
            tidy(made)
            if turn:
                times[name].append(seconds)
    return times


def table(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    ours, *_ = times
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        row = {"million tokens/s": round(tokens / statistics.median(seconds) / 1e6, 2)}
        if name != ours:
            ratios = np.array(seconds) / np.array(times[ours])
            medians = np.median(generator.choice(ratios, (10_000, len(ratios))), axis=1)
            row["time / ours"] = round(float(np.median(ratios)), 3)
            row["95 %"] = [round(float(q), 3) for q in np.quantile(medians, (0.025, 0.975))]
        found[name] = row
    return found


def packing_alone(texts: Any, tokenizer: Any, block_size: int, rounds: int) -> dict[str, Any]:
    from datasets import Features, List, Value, concatenate_datasets, load_from_disk
    from trl import pack_dataset

    from hf_pretrain_ext.packing import pack

    folder = str(Path(texts.cache_files[0]["filename"]).parent.parent / "tokens")
    concatenate_datasets([trl_tokens(texts, tokenizer)] * REPEATS).save_to_disk(folder)
    ids = load_from_disk(folder)
    # Sees to it that documents end in EOS, once: later calls find that in the cache and only pack.
    _, report = pack(ids, tokenizer, block_size, return_report=True)
    kinds = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
    labelled = ids.map(lambda batch: {"labels": batch["input_ids"]}, batched=True, features=kinds)
    arms: dict[str, Arm] = {
        "ours": lambda: pack(ids, tokenizer, block_size),
        "ours, isolate=False": lambda: pack(ids, tokenizer, block_size, isolate=False),
        "TRL wrapped, ids": lambda: pack_dataset(ids, block_size, "wrapped"),
        "TRL wrapped, as SFT": lambda: pack_dataset(labelled, block_size, "wrapped"),
        "TRL bfd_split, as SFT": lambda: pack_dataset(labelled, block_size, "bfd_split"),
        "TRL bfd, as SFT": lambda: pack_dataset(labelled, block_size, "bfd"),
    }

    def tidy(made: Any) -> None:
        for file in made.cache_files:
            os.remove(file["filename"])

    return table(measure(arms, tidy, rounds), report.text_tokens + report.eos_tokens)


def from_text(texts: Any, tokenizer: Any, block_size: int, rounds: int, num_proc: int | None) -> dict[str, Any]:
    from trl import pack_dataset

    from hf_pretrain_ext.packing import pack

    _, report = pack(texts, tokenizer, block_size, return_report=True)
    names = {"num_proc": num_proc}
    arms: dict[str, Arm] = {
        "ours": lambda: pack(texts, tokenizer, block_size, num_proc=num_proc),
        "batched map, TRL wrapped": lambda: pack_dataset(
            trl_tokens(texts, tokenizer, num_proc), block_size, "wrapped", map_kwargs=names
        ),
        "batched map, TRL bfd_split": lambda: pack_dataset(
            trl_tokens(texts, tokenizer, num_proc), block_size, "bfd_split", map_kwargs=names
        ),
    }
    found = measure(arms, lambda made: texts.cleanup_cache_files(), rounds)
    return table(found, report.text_tokens + report.eos_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=16, help="of text for packing alone; a quarter from text")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    os.environ["HF_PRETRAIN_EXT_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core, for every arm

    import datasets

    datasets.disable_progress_bars()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts, tokenizer = corpus(Path(folder) / "all", options.megabytes)
        results["packing alone"] = packing_alone(texts, tokenizer, options.block_size, options.pairs)
        texts, tokenizer = corpus(Path(folder) / "some", options.megabytes / 4)
        for number in (None, 2):
            name = f"from text to blocks, num_proc={number}"
            results[name] = from_text(texts, tokenizer, options.block_size, options.pairs, number)
    for section, rows in results.items():
        print(section)
        for name, row in rows.items():
            print(f"  {name:<28} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
