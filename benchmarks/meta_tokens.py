"""Meta-tokens: what they cost, and what they do on the synthetic tasks of the paper that fit a small machine.

`python benchmarks/meta_tokens.py speed|overhead|study|report [--output FOLDER] [--rounds 30] [--seeds 3]`

    speed     million tokens of text a second, drawing and inserting, on one core, batches of 8, k = 0.1
    overhead  a training step with meta-attention against one with a plain extra attention layer, and against none
    study     list recall, copying, parity, segment counting: four arms of equal parameter count, at the length that
              was trained on and at twice that; resumable: every finished run is kept in FOLDER
    report    what FOLDER holds, as docs/meta_tokens.md

Figures are medians over rounds, with their 10 % and 90 % quantiles, of the seconds that the process had the core
(`time.process_time`): others on the machine change them little. "draw and insert" is what a raw loop calls for each
batch; "packed" with the positions of two documents in every row, "padded" with an attention mask that is not all ones.
"Insertion" is what the collator of `MetaTokensCallback` calls, with its checks.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, attach_meta_attention
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


# What a step costs


def llama(hidden: int, layers: int, vocabulary: int, inner: int, length: int, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=length,
            use_cache=False,
        )
    )


def every_position(batch: int, length: int) -> torch.Tensor:
    """Meta positions that are all positions: the sub-layer is then a plain attention layer over the whole text."""
    return torch.arange(length).expand(batch, -1).contiguous()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and bootstrap 95 % interval."""
    draws = np.random.default_rng(0).choice(ratios, (5_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return statistics.median(ratios), float(low), float(high)


def overhead(rounds: int, hidden: int = 256, layers: int = 4, length: int = 512) -> dict[str, Any]:
    """Seconds of forward and backward at equal lengths of the input, one step of every arm a round."""
    batch, vocabulary = 4, 1024
    ids = torch.randint(0, vocabulary - 1, (batch, length))
    count = int(meta_counts(FRACTION, length))
    drawn = torch.from_numpy(np.asarray(draw_positions(np.arange(batch), length - count, count)))
    given: dict[str, dict[str, Any]] = {
        "bare": {},
        "meta-attention": {"meta_positions": drawn},
        "extra attention": {"meta_positions": every_position(batch, length)},
    }
    models = {name: llama(hidden, layers, vocabulary, 2 * hidden, length) for name in given}
    for name, model in models.items():
        if name != "bare":
            attach_meta_attention(model, MetaAttentionConfig(token_id=vocabulary - 1, init="normal"))
    seconds: dict[str, list[float]] = {name: [] for name in given}
    for turn in range(rounds + 2):
        for name in list(given)[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            models[name](input_ids=ids, labels=ids, **given[name]).loss.backward()
            if turn >= 2:
                seconds[name].append(time.process_time() - began)
    bare, meta, extra = (seconds[name] for name in given)
    shares = [(m - b) / (e - b) for b, m, e in zip(bare, meta, extra, strict=True) if e > b]
    return {
        "milliseconds": {name: 1e3 * statistics.median(each) for name, each in seconds.items()},
        "share_of_extra": interval(shares),
        "to_bare": interval([m / b for b, m in zip(bare, meta, strict=True)]),
        "model": f"{layers} layers of {hidden}, {length} tokens, batches of {batch}",
        "rounds": rounds,
    }


# The tasks. Symbols are 0 to 31; the answer alone bears a loss.

SYMBOLS, BEGIN, SEPARATOR, QUERY, DELIMITER, META_ID, VOCABULARY = 32, 32, 33, 34, 35, 39, 40
ITEMS, SEGMENT = 4, 8
HIDDEN, LAYERS, INNER = 64, 2, 128
TASK_BATCH, TASK_STEPS, RATE = 64, 1500, 2e-3
LENGTHS = {"copying": 24, "list recall": 48, "parity": 16, "segment counting": 54}
"""Of the input that is trained on; tested at these and at twice these."""

PHASES = 5
"""Of the curriculum: lengths grow in as many steps (the paper's fine-tuning has five)."""

Batch = tuple[torch.Tensor, torch.Tensor]


def _labelled(parts: list[torch.Tensor], answer: torch.Tensor) -> Batch:
    ids = torch.cat([*parts, answer], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -answer.shape[1] :] = answer
    return ids, labels


def _mark(rows: int, token: int) -> torch.Tensor:
    return torch.full((rows, 1), token)


def copying(rows: int, length: int, draw: torch.Generator) -> Batch:
    """A string, and the same string again."""
    text = torch.randint(0, SYMBOLS, (rows, length), generator=draw)
    return _labelled([_mark(rows, BEGIN), text, _mark(rows, SEPARATOR)], text)


def list_recall(rows: int, length: int, draw: torch.Generator) -> Batch:
    """Named lists, then a name: the items of that list."""
    lists = max(length // (ITEMS + 2), 1)
    names = torch.rand(rows, SYMBOLS, generator=draw).argsort(1)[:, :lists]
    items = torch.randint(0, SYMBOLS, (rows, lists, ITEMS), generator=draw)
    ends = torch.full((rows, lists, 1), DELIMITER)
    text = torch.cat([names.unsqueeze(-1), items, ends], dim=-1).flatten(1)
    asked = torch.randint(0, lists, (rows, 1), generator=draw)
    answer = items.gather(1, asked.unsqueeze(-1).expand(-1, -1, ITEMS)).squeeze(1)
    return _labelled([_mark(rows, BEGIN), text, _mark(rows, QUERY), names.gather(1, asked)], answer)


def parity(rows: int, length: int, draw: torch.Generator) -> Batch:
    """Bits, then whether their sum is odd."""
    bits = torch.randint(0, 2, (rows, length), generator=draw)
    return _labelled([_mark(rows, BEGIN), bits, _mark(rows, SEPARATOR)], bits.sum(1, keepdim=True) % 2)


def segment_counting(rows: int, length: int, draw: torch.Generator) -> Batch:
    """Segments of four kinds of symbols, then a segment's number and a symbol: how often it is in that segment."""
    segments = max(length // (SEGMENT + 1), 1)
    text = torch.randint(0, 4, (rows, segments, SEGMENT), generator=draw)
    ends = torch.full((rows, segments, 1), DELIMITER)
    number = torch.randint(0, segments, (rows, 1), generator=draw)
    symbol = torch.randint(0, 4, (rows, 1), generator=draw)
    chosen = text.gather(1, number.unsqueeze(-1).expand(-1, -1, SEGMENT)).squeeze(1)
    count = (chosen == symbol).sum(1, keepdim=True)
    flat = torch.cat([text, ends], dim=-1).flatten(1)
    return _labelled([_mark(rows, BEGIN), flat, _mark(rows, QUERY), number + 16, symbol], count)


TASKS: dict[str, Callable[[int, int, torch.Generator], Batch]] = {
    "copying": copying,
    "list recall": list_recall,
    "parity": parity,
    "segment counting": segment_counting,
}
ARMS = ("no meta-tokens", "tokens alone", "meta-attention", "extra attention")


def build(arm: str, seed: int) -> Any:
    """A model of the arm. Those without a sub-layer have a wider feed-forward instead, of as many parameters."""
    # A sub-layer is four square projections and a norm; a unit of the feed-forward three rows.
    wider = round((4 * HIDDEN * HIDDEN + HIDDEN) / (3 * HIDDEN))
    attention = arm in ("meta-attention", "extra attention")
    model = llama(HIDDEN, LAYERS, VOCABULARY, INNER + (0 if attention else wider), 512, seed)
    settings = {"attention": attention, "init": "normal", "seed": seed}
    if arm != "no meta-tokens":
        attach_meta_attention(model, MetaAttentionConfig(token_id=META_ID, **settings))
    return model


def inputs_of(arm: str, batch: Batch, first_seed: int) -> dict[str, torch.Tensor]:
    ids, labels = batch
    rows, length = ids.shape
    if arm == "extra attention":
        return {"input_ids": ids, "labels": labels, "meta_positions": every_position(rows, length)}
    count = int(meta_counts(FRACTION, length))
    if arm == "no meta-tokens" or not count:
        return {"input_ids": ids, "labels": labels}
    drawn = draw_positions(np.arange(first_seed, first_seed + rows), length, count)
    return insert(ids, labels, torch.from_numpy(np.asarray(drawn)), META_ID)


@torch.no_grad()
def accuracy(model: Any, arm: str, task: str, length: int, rows: int = 512) -> float:
    """Share of the answer's tokens that are the most likely ones, the answer before each being given."""
    model.eval()
    draw = torch.Generator().manual_seed(10_000 + length)
    right = total = 0
    for start in range(0, rows, 128):
        given = inputs_of(arm, TASKS[task](128, length, draw), 1_000_000 + start)
        labels = given.pop("labels")
        best = model(**given).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        asked = wanted != -100
        right += int((best == wanted)[asked].sum())
        total += int(asked.sum())
    model.train()
    return right / total


def train_task(job: tuple[str, str, int, int]) -> dict[str, Any]:
    task, arm, seed, steps = job
    torch.set_num_threads(1)
    model = build(arm, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw, longest = torch.Generator().manual_seed(seed), LENGTHS[task]
    began = time.perf_counter()
    for step in range(steps):
        phase = min(step * PHASES // steps, PHASES - 1) + 1
        length = max(longest * phase // PHASES, 2)
        warm, rest = min((step + 1) / (0.05 * steps), 1.0), step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * rest)))
        given = inputs_of(arm, TASKS[task](TASK_BATCH, length, draw), step * TASK_BATCH)
        model(**given).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "at_length": accuracy(model, arm, task, longest),
        "at_twice": accuracy(model, arm, task, 2 * longest),
        "seconds": round(time.perf_counter() - began, 1),
    }


def study(folder: Path, seeds: int, steps: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["task"], run["arm"], run["seed"], run["steps"]) for run in runs}
    jobs = [(task, arm, seed, steps) for seed in range(seeds) for task in TASKS for arm in ARMS]
    left = [job for job in jobs if job not in done]
    if left:
        processes = min(len(left), len(os.sched_getaffinity(0)))
        with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool, path.open("a") as file:
            for run in pool.imap_unordered(train_task, left):
                runs.append(run)
                file.write(json.dumps(run) + "\n")
                file.flush()
                print(
                    f"{run['task']:18} {run['arm']:16} seed {run['seed']}  at length {run['at_length']:.3f}, at twice "
                    f"{run['at_twice']:.3f}  ({run['seconds']:.0f} s)",
                    flush=True,
                )
    return {"steps": steps, "runs": [run for run in runs if run["steps"] == steps and run["seed"] < seeds]}


# The page


def half(values: list[float]) -> float:
    """Half of a 95 % interval by Student's t, for up to 5 runs."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), float("nan"))
    return t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def page(folder: Path) -> str:
    def read(name: str) -> Any:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    lines = ["# Meta-tokens, measured", "", "Written by `python benchmarks/meta_tokens.py report`, on CPU.", ""]
    if (path := folder / "runs.jsonl").exists():
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        steps = max(run["steps"] for run in runs)
        runs = [run for run in runs if run["steps"] == steps]
        sizes = {arm: next((r["parameters"] for r in runs if r["arm"] == arm), 0) for arm in ARMS}
        named = ", ".join(f"{arm} {size:,}" for arm, size in sizes.items())
        lines += [
            "## Synthetic tasks",
            "",
            f"Llamas of {LAYERS} layers of {HIDDEN}, from scratch, {steps} steps of {TASK_BATCH} samples, lengths "
            f"growing in {PHASES} phases; a tenth of meta-tokens at random places, in training and in tests. "
            f"Parameters: {named}: arms without a sub-layer have a wider feed-forward. *Extra attention* is the same "
            "sub-layer over all tokens, the control that the paper lacks. Share of the answer's tokens that are "
            "right, mean and half of a 95 % interval over seeds (by chance: 0.03, 0.03, 0.5 and, always saying 2, "
            f"0.31). {len(runs)} runs, {sum(run['seconds'] for run in runs) / 3600:.1f} hours of one shared core; "
            "each is a line of benchmarks/results/meta_tokens.jsonl.",
            "",
            "| task | arm | at the trained length | at twice that | seeds |",
            "|---|---|---:|---:|---:|",
        ]
        for task in TASKS:
            for arm in ARMS:
                found = [run for run in runs if run["task"] == task and run["arm"] == arm]
                if found:
                    cells = []
                    for key in ("at_length", "at_twice"):
                        values = [run[key] for run in found]
                        spread = f" ± {half(values):.3f}" if len(values) > 1 else ""
                        cells.append(f"{statistics.fmean(values):.3f}{spread}")
                    lines.append(f"| {task} ({LENGTHS[task]}) | {arm} | {' | '.join(cells)} | {len(found)} |")
        lines += [
            "",
            "The paper (a model of 152M parameters against one of 124M, fine-tuned): list recall 98.7 to 99.3 % "
            "against 3.6 %, parity 100 against 60, copying 98.5 to 98.9 against 7.8.",
            "",
        ]
    if found := read("overhead"):
        middle, low, high = found["share_of_extra"]
        ratio, least, most = found["to_bare"]
        lines += [
            "## A training step",
            "",
            f"{found['model']}, k = {FRACTION}, forward and backward, {found['rounds']} interleaved rounds: the "
            f"sub-layer takes {middle:.2f} ({low:.2f} to {high:.2f}) of what a plain extra attention layer takes, and "
            f"a step {ratio:.3f} ({least:.3f} to {most:.3f}) times that of the bare model on as many tokens.",
            "",
        ]
    if found := read("speed"):
        lines += [
            "## Insertion",
            "",
            f"Million tokens of text a second of one core's time, batches of {BATCH}, k = {FRACTION}.",
            "",
            f"| | {' | '.join(f'blocks of {block:,}' for block in BLOCKS)} |",
            f"|---|{'---:|' * len(BLOCKS)}",
        ]
        for name, entries in found.items():
            lines.append(f"| {name} | {' | '.join(str(entry['median']) for entry in entries.values())} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["speed", "overhead", "study", "report"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=TASK_STEPS)
    parser.add_argument("--output", type=Path, default=Path("meta_tokens_benchmark"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.section == "report":
        path = Path(__file__).parents[1] / "docs" / "meta_tokens.md"
        path.write_text(page(given.output), "utf-8")
        print(f"written: {path}")
        return
    found: Any
    if given.section == "speed":
        found = speed(given.rounds)
        print(f"million tokens of text a second, batches of {BATCH}, k = {FRACTION}")
        print(f"{'':<26}" + "".join(f"{f'blocks of {block:,}':>24}" for block in BLOCKS))
        for name, entries in found.items():
            cells = (f"{e['median']:.1f} ({e['10 %']:.1f} to {e['90 %']:.1f})" for e in entries.values())
            print(f"{name:<26}" + "".join(f"{cell:>24}" for cell in cells))
    elif given.section == "overhead":
        found = overhead(given.rounds)
        print(json.dumps(found, indent=1))
    else:
        found = study(given.output, given.seeds, given.steps)
    (given.output / f"{given.section}.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
