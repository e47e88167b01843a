"""Meta-tokens: what inserting them costs.

`python benchmarks/meta_tokens.py speed [--rounds 30] [--output FILE]`

    speed    million tokens of text a second, drawing and inserting, on one core, batches of 8, k = 0.1

Figures are medians over rounds, with their 10 % and 90 % quantiles, of the seconds that the process had the core
(`time.process_time`): others on the machine change them little. "draw and insert" is what a raw loop calls for each
batch; "packed" with the positions of two documents in every row, "padded" with an attention mask that is not all ones.
"Insertion" is what the collator of `MetaTokensCallback` calls, with its checks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_pretrain_ext.meta_tokens.batches import Insertion
from hf_pretrain_ext.meta_tokens.insertion import draw_positions, insert, meta_counts

BATCH, FRACTION, META = 8, 0.1, 50_000
BLOCKS = (512, 1024, 4096)
CALLS = 20
"""Calls timed together: one alone is shorter than what a clock shows."""


def arms(block: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on batches of `block` tokens a row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, META, (BATCH, block), generator=generator)
    halves = torch.cat([torch.arange(block // 2), torch.arange(block - block // 2)]).repeat(BATCH, 1)
    mask = torch.ones_like(ids)
    mask[1, -1:] = 0
    seeds, count = np.arange(BATCH), int(meta_counts(FRACTION, block))
    lengths = mask.sum(1).numpy()
    counts = meta_counts(FRACTION, lengths)
    ends = torch.rand(ids.shape, generator=generator) < 0.05
    drawn = draw_positions(seeds, block, count)
    batch = {"input_ids": ids, "labels": ids}
    packed = {**batch, "position_ids": halves}
    insertion = Insertion(META, FRACTION)
    return {
        "draw": lambda: draw_positions(seeds, block, count),
        "draw at boundaries": lambda: draw_positions(seeds, block, count, "boundaries", ends),
        "insert": lambda: insert(ids, ids, drawn, META),
        "draw and insert": lambda: insert(ids, ids, draw_positions(seeds, block, count), META),
        "draw and insert, packed": lambda: insert(
            ids, ids, draw_positions(seeds, block, count), META, position_ids=halves
        ),
        "draw and insert, padded": lambda: insert(
            ids, ids, draw_positions(seeds, lengths, counts), META, attention_mask=mask
        ),
        "Insertion": lambda: insertion(batch, seeds),
        "Insertion, packed": lambda: insertion(packed, seeds),
    }


def speed(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for block in BLOCKS:
        made = arms(block)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(rounds + 1):
            for name, call in made.items():
                began = time.process_time()
                for _ in range(CALLS):
                    call()
                if turn:  # the first round warms up
                    seconds[name].append((time.process_time() - began) / CALLS)
        for name, each in seconds.items():
            rates = BATCH * block / np.array(each) / 1e6
            low, middle, high = np.quantile(rates, [0.1, 0.5, 0.9])
            entry = {"median": round(float(middle), 1), "10 %": round(float(low), 1), "90 %": round(float(high), 1)}
            found.setdefault(name, {})[str(block)] = entry
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["speed"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = speed(arguments.rounds)
    print(f"million tokens of text a second, batches of {BATCH}, k = {FRACTION}")
    print(f"{'':<26}" + "".join(f"{f'blocks of {block:,}':>24}" for block in BLOCKS))
    for name, entries in found.items():
        cells = (f"{e['median']:.1f} ({e['10 %']:.1f} to {e['90 %']:.1f})" for e in entries.values())
        print(f"{name:<26}" + "".join(f"{cell:>24}" for cell in cells))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
