"""What the methods do to what a model knows: English prose, then German manual pages, then Python sources.

`python benchmarks/continual.py run|report [--scale small|full] [--output FOLDER] [--seeds N] [--only SECTION ...]`
`python benchmarks/continual.py report --runs benchmarks/results/continual.jsonl`

    run      what FOLDER lacks of all arms and seeds, on as many processes as there are cores; a kill loses the runs
             that were under way
    report   what FOLDER holds, as docs/evidence.md with its plots (small: into FOLDER); the runs of the committed page
             are benchmarks/results/continual.jsonl

Sections: replay, rewarm, lives, reptile, gap, lowrank, datafree. Arms are shared between them. German manual pages
need the Debian packages groff and manpages-de.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from hf_pretrain_ext.demo.study import interval

VOCABULARY, BLOCK = 2048, 128
HIDDEN, LAYERS, INTERMEDIATE = 128, 3, 352
PEAK, FLOOR = 3e-3, "10%"
DOMAINS = ("english", "german", "python")


@dataclass(frozen=True)
class Scale:
    """Steps of an arm (the pre-training has twice as many), blocks a step, blocks of a domain that a probe reads."""

    steps: int
    batch: int
    held_out: int
    seeds: int


SCALES = {"small": Scale(48, 8, 16, 2), "full": Scale(488, 16, 64, 3)}
"""488 steps are 1M tokens. The small one shows that all of it runs, and little else."""

RANK = 32
SWEEP = (1e-3, 3e-3, 1e-2, 3e-2)
"""Peak rates that the low-rank arms are tried at, on the first seed."""


@dataclass(frozen=True)
class Run:
    """One training: of `parent`'s weights (None: from scratch) on `domain`, for `length` times the steps of an arm.

    `plugins` holds the settings of plug-ins by a short name; `keep` says that others start from its weights.
    """

    name: str
    parent: str | None
    domain: str
    plugins: tuple[tuple[str, Any], ...] = ()
    length: float = 1.0
    adapter: str | None = None
    subset: float | None = None
    """Only this share of as many blocks as an arm reads, drawn at random, in as many passes as it takes."""

    weight_decay: float = 0.1
    keep: bool = False


def _rewarm(peak: float = PEAK, **given: Any) -> tuple[str, Any]:
    return "rewarm", {"peak_lr": peak, "min_lr": FLOOR, **given}


def _replay(ratio: float, **given: Any) -> tuple[str, Any]:
    return "replay", {"ratio": ratio, **given}


def replay_arm(ratio: float) -> str:
    return f"replay {100 * ratio:g} %"


RATIOS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
FULL = replay_arm(0.0)
PEAKS = (3e-4, 1.5e-3, 3e-3, 6e-3)
WARMUPS = (0.0, 0.005, 0.01, 0.02)
EPSILONS = (0.1, 0.5, 0.9)
FROZEN = "LoRA, all else frozen"
"""Others train embeddings, norms and head in full, as the papers of GaLore's family compare them."""

LOWRANK = ("GradNormLoRP", "LoRA", "DoRA", FROZEN)
L2_STRENGTHS, DISTILL_WEIGHT = (1.0, 3.0), 1.0
HELD = 0.85
"""Share of the third stage of the infinite life before its anneal."""

OLD_SHARE = 0.18
"""What is left of the old mixture beside the new data (Guo et al.)."""


SUBSET, SUBSET_AND_OLD = "a quarter, 4 epochs", f"a fifth, 4 epochs, {100 * OLD_SHARE:g} % old"


def rewarm_arm(peak: float, shape: str, warmup: float = 0.01) -> str:
    if (peak, shape, warmup) == (PEAK, "cosine", 0.01):
        return FULL
    return f"{shape} {peak:g}, {100 * warmup:g} % warm-up"


def l2_arm(strength: float) -> str:
    return f"L2 to the start, λ = {strength:g}"


def lowrank_arm(kind: str, rate: float) -> str:
    return f"{kind} at {rate:g}"


BASES = [
    Run("base", None, "english", (_rewarm(),), length=2, keep=True),
    Run(
        "base, infinite",
        None,
        "english",
        (("infinite", PEAK),),
        length=2,
        keep=True,
    ),
]

CONSTANT = (3e-3 + 3e-4) / 2
"""Rate of the constant phase: half-way between peak and floor."""

SECTIONS: dict[str, list[Run]] = {
    "replay": [
        *(
            Run(
                replay_arm(ratio),
                "base",
                "german",
                (_rewarm(), *([_replay(ratio)] if ratio else [])),
                keep=ratio == 0.05,
            )
            for ratio in RATIOS
        ),
        Run("union", None, "german", (_rewarm(), _replay(2 / 3)), length=3),
    ],
    "rewarm": [
        *(
            Run(
                rewarm_arm(peak, shape),
                "base",
                "german",
                (_rewarm(peak) if shape == "cosine" else _rewarm(peak, min_lr="100%"),),
            )
            for peak in PEAKS
            for shape in ("constant", "cosine")
        ),
        *(Run(rewarm_arm(PEAK, "cosine", warmup), "base", "german", (_rewarm(warmup=warmup),)) for warmup in WARMUPS),
    ],
    "lives": [
        Run("cosine, third stage", replay_arm(0.05), "python", (_rewarm(), _replay(0.05, old=("english", "german")))),
        Run("infinite, second stage", "base, infinite", "german", (("constant", CONSTANT), _replay(0.05)), keep=True),
        Run(
            "infinite, third stage",
            "infinite, second stage",
            "python",
            (("hold and anneal", CONSTANT), _replay(0.05, old=("english", "german"))),
        ),
    ],
    "reptile": [
        *(
            Run(
                f"replay 25 %, Reptile {epsilon:g}",
                "base",
                "german",
                (_rewarm(), _replay(0.25), ("reptile", {"every": 1 / 24, "epsilon": epsilon})),
            )
            for epsilon in EPSILONS
        ),
        Run("Reptile 0.1 alone", "base", "german", (_rewarm(), ("reptile", {"every": 1 / 24, "epsilon": 0.1}))),
    ],
    "gap": [
        Run(replay_arm(OLD_SHARE), "base", "german", (_rewarm(), _replay(OLD_SHARE))),
        Run(SUBSET, "base", "german", (_rewarm(),), subset=0.25),
        Run(SUBSET_AND_OLD, "base", "german", (_rewarm(), _replay(OLD_SHARE)), subset=0.25 * (1 - OLD_SHARE)),
    ],
    "lowrank": [
        *(
            Run(
                lowrank_arm("GradNormLoRP", rate),
                "base",
                "german",
                (_rewarm(rate), ("gradnormlorp", {"rank": RANK, "update_proj_gap": 100})),
            )
            for rate in SWEEP
        ),
        *(
            Run(lowrank_arm(kind, rate), "base", "german", (_rewarm(rate),), adapter=kind)
            for kind in LOWRANK[1:]
            for rate in SWEEP
        ),
    ],
    "datafree": [
        *(
            Run(l2_arm(strength), "base", "german", (_rewarm(), ("l2", {"strength": strength})), weight_decay=0.0)
            for strength in L2_STRENGTHS
        ),
        Run("self-distillation", "base", "german", (_rewarm(), ("distill", {"weight": DISTILL_WEIGHT}))),
    ],
}


def remedies() -> list[str]:
    """Arms whose stability gap is shown: only these are probed at each of the first steps."""
    others = (rewarm_arm(3e-4, "constant"), *map(replay_arm, (0.05, OLD_SHARE, 0.25)))
    return [FULL, *others, SUBSET, SUBSET_AND_OLD]


def all_runs(sections: Iterable[str]) -> dict[str, Run]:
    """Every run of these sections and of those that they start from or are compared with, parents first."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.parent is not None:
            add(KNOWN[run.parent])
        found.setdefault(run.name, run)

    add(KNOWN[FULL])
    for section in sections:
        for run in SECTIONS[section]:
            add(KNOWN[run.name])
    return found


# Data


def corpora(folder: Path) -> dict[str, Any]:
    """Token blocks of each domain to train on, and held out, in the tokens of the first domain."""
    import numpy as np

    path = folder / "tokens.npz"
    if not path.exists():
        from hf_pretrain_ext.demo.corpora import english_prose, german_manuals, python_sources
        from hf_pretrain_ext.demo.tokenizer import blocks, encode_documents, train_tokenizer

        english, german = english_prose(folder / "cache"), german_manuals(folder / "cache")
        if german is None:
            raise SystemExit("German manual pages are needed. On Debian and Ubuntu: apt-get install groff manpages-de")
        tokenizer = train_tokenizer((document.text for document in english.train), VOCABULARY)
        made = {}
        for name, corpus in zip(DOMAINS, (english, german, python_sources()), strict=True):
            for part in ("train", "heldout"):
                documents = [document.text for document in getattr(corpus, part)]
                ids = blocks(encode_documents(tokenizer, documents), BLOCK)["input_ids"]
                made[f"{name}_{part}"] = np.array(ids[:], dtype=np.uint16)
        np.savez(folder / "partial.npz", **made)
        (folder / "partial.npz").replace(path)
    return dict(np.load(path))


def digest(data: dict[str, Any]) -> str:
    """Of all tokens: packages of other versions bring other text."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(data):
        found.update(data[name].tobytes())
    return found.hexdigest()


def dataset(ids: Any) -> Any:
    import numpy as np
    from datasets import Dataset

    rows = ids.astype(np.int64)
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("numpy")


# One run


def build_model(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HIDDEN // 32,
            num_key_value_heads=HIDDEN // 32,
            max_position_embeddings=BLOCK,
            use_cache=False,
        )
    )


def adapted(model: Any, kind: str) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", use_dora=kind == "DoRA")
    model = get_peft_model(model, adapter)
    if kind != FROZEN:
        for name, param in model.named_parameters():
            param.requires_grad_("base_layer" not in name)
    return model


def make_plugins(run: Run, data: dict[str, Any], steps: int) -> list[Any]:
    from hf_pretrain_ext import callbacks

    made: list[Any] = []
    for name, given in run.plugins:
        if name == "rewarm":
            # A short run has no warm-up of 1 %, and a constant rate is the host's own then.
            made.append(callbacks.RewarmCallback(**given, allow_no_effect=True))
        elif name == "infinite":
            # The run stops at the end of the constant phase: the schedule is longer, and its anneal never comes.
            longer = {"schedule": "infinite_cosine", "min_lr": FLOOR, "total_steps": round(steps / 0.86)}
            made.append(callbacks.RewarmCallback(given, **longer))
        elif name == "constant":
            made.append(callbacks.RewarmCallback(given, warmup=0, min_lr="100%"))
        elif name == "hold and anneal":
            # The constant phase goes on, then comes the last one of an infinite schedule.
            floor = PEAK * float(FLOOR.rstrip("%")) / 100
            made.append(callbacks.RewarmCallback(schedule=HoldAndAnneal(given, floor, round(HELD * steps), steps)))
        elif name == "replay":
            given = dict(given)
            old = given.pop("old", ("english",))
            if run.parent is None:
                sources: Any = dataset(data["english_train"])
            else:
                sources = {each: dataset(data[f"{each}_train"]) for each in old}
            # Of two, by tokens seen: English in two stages' length and a twentieth of the second's.
            weights = {"weights": {"english": 2.05, "german": 0.95}} if len(old) == 2 else {}
            made.append(callbacks.ReplayCallback(sources, **given, **weights))
        elif name == "reptile":
            made.append(callbacks.ReptileCallback(**given))
        elif name == "gradnormlorp":
            made.append(callbacks.GradNormLoRPCallback(**given))
        elif name == "l2":
            made.append(callbacks.L2InitCallback(**given))
        elif name == "distill":
            made.append(callbacks.SelfDistillationCallback(**given))
        else:
            raise ValueError(f"no plug-in is named {name!r} here")
    return made


@dataclass(frozen=True)
class HoldAndAnneal:
    first: float
    last: float
    held: int
    steps: int

    def __call__(self, step: int) -> float:
        way = (min(step, self.steps) - self.held) / (self.steps - self.held)
        return self.first * (self.last / self.first) ** max(way, 0.0)


def train(task: tuple[Run, int, str, str]) -> dict[str, Any]:
    """One run of one seed; returns its figures."""
    import torch

    run, seed, scale, output = task
    torch.set_num_threads(1)
    from safetensors.torch import load_file, save_file
    from transformers import ProgressCallback, Trainer, TrainingArguments, default_data_collator, set_seed

    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import ForgettingCallback

    folder = Path(output)
    data = corpora(folder)
    size = SCALES[scale]
    steps = round(size.steps * run.length)
    set_seed(seed)
    model = build_model(seed)
    if run.parent is not None:
        model.load_state_dict(load_file(weights_path(folder, scale, KNOWN[run.parent], seed)))
    if run.adapter is not None:
        model = adapted(model, run.adapter)
    rows = data[f"{run.domain}_train"]
    if run.subset is not None:
        rows = rows[torch.randperm(len(rows))[: round(steps * size.batch * run.subset)].numpy()]
    plugins = make_plugins(run, data, steps)
    peak = next((given["peak_lr"] for name, given in run.plugins if name == "rewarm"), PEAK)
    sets = {name: dataset(data[f"{name}_heldout"]) for name in DOMAINS}
    first = "dense" if run.name in remedies() else "sparse"
    # One schedule has a point of its own at which losses are wanted.
    every = 0.05 if "hold and anneal" in dict(run.plugins) else 0.1
    probe = ForgettingCallback(sets, every=every, max_samples=size.held_out, first_steps=first)
    with tempfile.TemporaryDirectory() as there:
        arguments = TrainingArguments(
            there,
            per_device_train_batch_size=size.batch,
            per_device_eval_batch_size=size.held_out,
            max_steps=steps,
            learning_rate=peak,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=run.weight_decay,
            use_cpu=True,
            seed=seed,
            logging_steps=max(steps // 20, 1),
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset(rows), data_collator=default_data_collator)
        trainer.remove_callback(ProgressCallback)
        began = time.perf_counter()
        extend(trainer, probe, *plugins).train()
        seconds = time.perf_counter() - began
    figures: dict[str, Any] = probe.history.summary()
    if not all(math.isfinite(figures[name]["final"]) for name in DOMAINS):
        raise FloatingPointError(f"{run.name}, seed {seed}: a loss is not finite")
    if run.keep:
        path = weights_path(folder, scale, run, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return {
        "run": run.name,
        "seed": seed,
        "scale": scale,
        "steps": steps,
        "seconds": round(seconds, 1),
        "losses": {name: figures[name]["final"] for name in DOMAINS},
        "before": {name: figures[name]["initial"] for name in DOMAINS},
        "gap": {name: figures[name]["gap_depth"] for name in DOMAINS},
        "recovery": {name: figures[name]["recovery_step"] for name in DOMAINS},
        "course": {name: probe.history.to_json()["sets"][name] for name in DOMAINS},
        "threads": 1,
        "date": date.today().isoformat(),
        "machine": machine(),
        "corpus": digest(data),
        "setting": setting(run, scale),
    }


def machine() -> str:
    """Processor and cores, as the page names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        found = []
    name = found[0] if found else platform.processor() or platform.machine()
    return f"{name} ({platform.machine()}), {len(os.sched_getaffinity(0))} cores"


KNOWN = {run.name: run for run in [*(run for runs in SECTIONS.values() for run in runs), *BASES]}
"""Every run by its name; one that stands in two sections is the same in both."""


def setting(run: Run, scale: str) -> str:
    """A digest of all that decides a run, but for text and seed: a run of other settings is made again."""
    parts = {key: value for key, value in dataclasses.asdict(run).items() if key not in ("name", "keep")}
    size = SCALES[scale]
    sizes = (VOCABULARY, BLOCK, size.batch, HIDDEN, LAYERS, INTERMEDIATE)
    model = (*sizes, PEAK, FLOOR, RANK, size.held_out, size.steps)
    parent = None if run.parent is None else setting(KNOWN[run.parent], scale)
    text = json.dumps([parts, model, parent], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def weights_path(folder: Path, scale: str, run: Run, seed: int) -> Path:
    return folder / "models" / f"{setting(run, scale)}-{seed}.safetensors"


# All runs


class Results:
    """Finished runs, one JSON line each."""

    def __init__(self, folder: Path, scale: str, path: Path | None = None):
        self.folder, self.scale, self.path = folder, scale, path or folder / "runs.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        if text and not text.endswith("\n"):
            # A kill tore the last line: that run is made again.
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text)
        runs = [run for run in map(json.loads, text.splitlines()) if run["scale"] == scale]
        self.done: dict[tuple[str, int], dict[str, Any]] = {(run["run"], run["seed"]): run for run in runs}

    def leave_out(self, wanted: list[tuple[Run, int]], text: str) -> None:
        """Runs of other settings; and of other text than this, of a seed of which some are still to come: they could
        not be compared."""
        for run, seed in wanted:
            made = self.done.get((run.name, seed))
            if made is not None and made.get("setting") != setting(run, self.scale):
                del self.done[run.name, seed]
                print(f"{run.name}, seed {seed}, was made with other settings, and is made again", flush=True)
        keys = [(run.name, seed) for run, seed in wanted]
        if all(key in self.done for key in keys):
            return
        others = [key for key in keys if key in self.done and self.done[key]["corpus"] != text]
        for key in others:
            del self.done[key]
        if others:
            print(f"{len(others)} finished runs of seed {keys[0][1]} read other text, and are made again", flush=True)

    def make(self, wanted: list[tuple[Run, int]]) -> None:
        """Those that are missing, each as soon as its parent is there."""
        for run, seed in reversed(wanted):
            # Parents are made again where others wait for weights of which only the figures are left.
            waiting = any(
                other.parent == run.name and (other.name, n) not in self.done for other, n in wanted if n == seed
            )
            if run.keep and waiting and not weights_path(self.folder, self.scale, run, seed).exists():
                self.done.pop((run.name, seed), None)
        left = [(run, seed) for run, seed in wanted if (run.name, seed) not in self.done]
        total, finished, began = len(left), 0, time.perf_counter()
        cores, spawn = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
        # Without max_tasks_per_child: with it, Python 3.11 stops handing out tasks once a worker was replaced.
        with ProcessPoolExecutor(cores, mp_context=spawn, initializer=end_with_parent) as pool:
            working: set[Future[dict[str, Any]]] = set()
            while left or working:
                ready = [(run, seed) for run, seed in left if run.parent is None or (run.parent, seed) in self.done]
                left = [task for task in left if task not in ready]
                working |= {pool.submit(train, (run, seed, self.scale, str(self.folder))) for run, seed in ready}
                ended, working = wait(working, return_when=FIRST_COMPLETED)
                for future in ended:
                    if future.exception() is not None:
                        # Now, and not when all the others are through.
                        pool.shutdown(wait=False, cancel_futures=True)
                    figures = future.result()
                    finished += 1
                    self.done[figures["run"], figures["seed"]] = figures
                    with self.path.open("a") as file:
                        file.write(json.dumps(figures) + "\n")
                    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in figures["losses"].items())
                    print(
                        f"{finished:3} of {total}, {(time.perf_counter() - began) / 60:5.1f} min  "
                        f"{figures['run']:32} seed {figures['seed']}  {losses}  ({figures['seconds']:.0f} s)",
                        flush=True,
                    )


def end_with_parent() -> None:
    """In a worker: a kill of the parent alone would leave it at work, for nobody."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def best_rate(results: Results, kind: str) -> float | None:
    """Of a low-rank arm: the lowest loss on the new domain, on the first seed."""
    tried = {rate: results.done.get((lowrank_arm(kind, rate), 0)) for rate in SWEEP}
    losses = {rate: run["losses"]["german"] for rate, run in tried.items() if run}
    return min(losses, key=losses.__getitem__) if len(losses) == len(SWEEP) else None


def run_all(results: Results, sections: list[str], seeds: int) -> None:
    results.folder.mkdir(parents=True, exist_ok=True)
    text = digest(corpora(results.folder))
    runs = all_runs(sections)
    rates = {lowrank_arm(kind, rate): (kind, rate) for kind in LOWRANK for rate in SWEEP}
    for seed in range(seeds):
        # The sweep is of the first seed; the others have its best rate alone.
        chosen = {lowrank_arm(kind, rate) for kind in LOWRANK if (rate := best_rate(results, kind)) is not None}
        wanted = [(run, seed) for run in runs.values() if seed == 0 or run.name not in rates or run.name in chosen]
        results.leave_out(wanted, text)
        results.make(wanted)


def best_peak(results: Results) -> float:
    """Of full training, likewise; 3e-3 until all were tried."""
    losses = {peak: results.done.get((rewarm_arm(peak, "cosine"), 0)) for peak in PEAKS}
    found = {peak: run["losses"]["german"] for peak, run in losses.items() if run}
    return min(found, key=found.__getitem__) if len(found) == len(PEAKS) else PEAK


def expected(scale: str) -> int:
    """Runs of all sections and seeds."""
    first = len(all_runs(SECTIONS))
    return first + (SCALES[scale].seeds - 1) * (first - len(LOWRANK) * (len(SWEEP) - 1))


# The page


def _cell(values: list[float], digits: int = 3, signed: bool = False) -> str:
    if not values:
        return ""
    text = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {interval(values)['half']:.{digits}f}"


class Page:
    def __init__(self, results: Results):
        self.results = results
        self.seeds = sorted({seed for _, seed in results.done})
        self.claims: list[tuple[str, str, str, str]] = []

    def runs(self, name: str) -> list[dict[str, Any]]:
        return [self.results.done[name, seed] for seed in self.seeds if (name, seed) in self.results.done]

    def values(self, name: str, what: str, domain: str) -> list[float]:
        return [run[what][domain] for run in self.runs(name)]

    def difference(self, name: str, other: str, domain: str, what: str = "losses") -> list[float]:
        """Within each seed: what the runs of a seed share is not in its interval."""
        both = [seed for seed in self.seeds if {(name, seed), (other, seed)} <= set(self.results.done)]
        done = self.results.done
        return [done[name, seed][what][domain] - done[other, seed][what][domain] for seed in both]

    def at(self, name: str, share: float, domain: str) -> list[float]:
        """Losses at the last probe in the first `share` of a run."""
        found = []
        for run in self.runs(name):
            course = run["course"][domain]
            found.append([loss for step, loss in self._course(course) if step <= share * run["steps"]][-1])
        return found

    def early_depth(self, name: str) -> list[float]:
        """The highest rise of the old loss within the first tenth of a run: what comes later need be no transient."""
        found = []
        for run in self.runs(name):
            course = self._course(run["course"]["english"])
            found.append(max(loss for step, loss in course if step <= 0.1 * run["steps"] + 1) - course[0][1])
        return found

    @staticmethod
    def _course(course: dict[str, Any]) -> list[tuple[int, float]]:
        return list(zip(course["steps"], course["losses"], strict=True))

    def paired(self, name: str, other: str, what: Callable[[str], list[float]]) -> list[float]:
        """Differences of any figure, within each seed."""
        seeds = [{run["seed"]: value for run, value in zip(self.runs(n), what(n), strict=True)} for n in (name, other)]
        return [seeds[0][seed] - seeds[1][seed] for seed in seeds[0] if seed in seeds[1]]

    def forgotten(self, name: str, beside: str) -> list[float]:
        """How far an arm took the old loss up, in the seeds that have both arms."""
        both = [seed for seed in self.seeds if {(name, seed), (beside, seed)} <= set(self.results.done)]
        runs = [self.results.done[name, seed] for seed in both]
        return [run["losses"]["english"] - run["before"]["english"] for run in runs]

    def row(self, name: str, label: str | None = None, against: str = FULL) -> str:
        old, new = self.values(name, "losses", "english"), self.values(name, "losses", "german")
        mean = [(a + b) / 2 for a, b in zip(old, new, strict=True)]
        cells = [_cell(old), _cell(new), _cell(mean)]
        cells += [
            "" if name == against else _cell(self.difference(name, against, domain), signed=True)
            for domain in ("english", "german")
        ]
        return f"| {label or name} | {' | '.join(cells)} | {len(old)} |"

    def claim(self, card: str, label: str, paper: str, seen: str, verdict: str) -> list[str]:
        """What a paper says against what was seen; all but its words are for README and method card too."""
        if ONE_SEED in verdict and not any(told in verdict for told in ("Agrees", "Does not agree", HOLDS_0, WIDE)):
            verdict = ONE_SEED  # once, and not for each part
        self.claims.append((card, label, seen, verdict))
        return [f"- **Claim**: {paper}", f"- **Seen**: {seen}", f"- **{verdict}**", ""]

    def table(
        self, names: Iterable[str], labels: dict[str, str] | None = None, against: str = FULL, called: str = "0 %"
    ) -> list[str]:
        labels = labels or {}
        return [
            f"| arm | old (English) | new (German) | mean | old, minus {called} | new, minus {called} | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(self.row(name, labels.get(name), against) for name in names if self.runs(name)),
            "",
        ]


ONE_SEED, HOLDS_0 = "One seed only: no verdict", "Not to be told here: the interval holds 0"
WIDE = "Not to be told here: the interval is wider than that"
MARGIN = 0.1
"""Nats within which two losses count as alike (ours): a tenth to a fiftieth of what arms differ by."""


def _verdict(values: list[float], expected: float) -> str:
    """Whether a mean over seeds has the sign of `expected`, and its interval too."""
    if len(values) < 2:
        return ONE_SEED
    found = interval(values)
    if abs(found["mean"]) <= found["half"]:
        return HOLDS_0
    return "Agrees" if found["mean"] * expected > 0 else "Does not agree"


def _answer(values: list[float], expected: float) -> str:
    """The same where no paper claims it."""
    return {"Agrees": "yes", "Does not agree": "no"}.get(found := _verdict(values, expected), found)


def _within(values: list[float], low: float = -math.inf, high: float = math.inf) -> str:
    """Whether the interval of a mean over seeds lies inside `low` to `high`, or outside."""
    if len(values) < 2:
        return ONE_SEED
    found = interval(values)
    least, most = found["mean"] - found["half"], found["mean"] + found["half"]
    if low <= least and most <= high:
        return "Agrees"
    return "Does not agree" if most < low or least > high else WIDE


def unfinished(results: Results) -> str:
    """A sentence for whoever reads a page of which runs are still to come."""
    done, whole = len(results.done), expected(results.scale)
    if done >= whole:
        return ""
    return f"**Not finished: {done} of {whole} runs so far.** Arms and claims of runs that are to come are left out."


def write_page(results: Results, path: Path) -> Page:
    page = Page(results)
    d = page.difference
    size = SCALES[results.scale]
    tokens = size.steps * size.batch * BLOCK
    command = f"python benchmarks/continual.py run --scale {results.scale}"
    spent = statistics.median(run["seconds"] for run in results.done.values())
    days = sorted({run["date"] for run in results.done.values()})
    machines = sorted({run["machine"] for run in results.done.values()})
    texts = {run["corpus"] for run in results.done.values()}
    where = f"{'; '.join(machines)}; {' to '.join(sorted({*days[:1], *days[-1:]}))}"
    lines = [
        "# Evidence",
        "",
        f"Made by `make evidence` (`{command}`, then `report`): {len(results.done)} runs, each on one core, in the "
        f"median {spent:.0f} s of the clock (with pauses and whatever else the machine did), on {where}.",
        "",
        "A Llama of 1.1M parameters is pre-trained on English prose about computers and goes on with German manual "
        f"pages, then Python sources: {tokens / 1e6:.2f}M tokens an arm, twice as many for the pre-training, blocks "
        f"of {BLOCK}, batches of {size.batch}; AdamW (0.9, 0.95), weight decay 0.1, peak {PEAK:g}, floor 10 %, 1 % "
        "warm-up unless said. Held-out losses in nats a token, mean and half of a 95 % interval over seeds "
        "(Student's); differences are taken within a seed. **A model of this size on this much text shows the "
        "mechanism, not the size of the effect in yours.** Claims are the papers' own, at their sizes.",
        "",
        "![losses of the arms](evidence.png)",
        "",
    ]
    if state := unfinished(results):
        lines += [state, ""]
    if len(texts) > 1:
        lines += ["Not all seeds read the same text: packages were of other versions. Within a seed all arms did.", ""]
    if page.runs("base"):
        before = ", ".join(f"{name} {_cell(page.values('base', 'losses', name))}" for name in DOMAINS)
        lines += [f"The base, after its pre-training: {before}.", ""]

    lines += ["## 1. Replay (Ibrahim et al., table 2)", ""]
    lines += page.table([*map(replay_arm, RATIOS), "union"])
    less, cost = d(FULL, replay_arm(0.05), "english"), d(replay_arm(0.05), FULL, "german")
    lost = page.forgotten(FULL, replay_arm(0.05))
    if less:
        undone = [a / b for a, b in zip(less, lost, strict=True)]
        lines += page.claim(
            "replay",
            "A few per cent of replay undo most of the forgetting, at little cost (Ibrahim et al.)",
            "5 % of replay undo 71 % of the forgetting (Pile to German: from 2.17 to 3.56 without, 2.57 with), and "
            "the new loss goes from 1.11 to 1.12; even 1 % undo more than half.",
            f"5 % undo {_cell(undone, 2)} of the forgetting, of which there is {_cell(lost)}; the new loss moves by "
            f"{_cell(cost, signed=True)}.",
            f"Most (more than half): {_within(undone, low=0.5)}. Little cost (at most a twentieth of what is kept): "
            f"{_within([c - r / 20 for c, r in zip(cost, less, strict=True)], high=0)}",
        )

    lines += ["## 2. Re-warming (Gupta et al.; Ibrahim et al.)", ""]
    lines += page.table(
        [rewarm_arm(peak, shape) for peak in PEAKS for shape in ("constant", "cosine")]
        + [rewarm_arm(PEAK, "cosine", warmup) for warmup in WARMUPS if warmup != 0.01],
        {FULL: "cosine 0.003, 1 % warm-up (0 % replay)"},
    )
    high, low, constant = (rewarm_arm(6e-3, "cosine"), rewarm_arm(3e-4, "cosine"), rewarm_arm(3e-4, "constant"))
    if page.runs(high) and page.runs(low):
        steps = "; ".join(
            f"{b:g} − {a:g}: new {_cell(d(rewarm_arm(b, 'cosine'), rewarm_arm(a, 'cosine'), 'german'), signed=True)}, "
            f"old {_cell(d(rewarm_arm(b, 'cosine'), rewarm_arm(a, 'cosine'), 'english'), signed=True)}"
            for a, b in itertools.pairwise(PEAKS)
        )
        lines += page.claim(
            "rewarm",
            "A higher peak learns more and forgets more (Gupta et al.; Ibrahim et al.)",
            "the higher the peak, the better the new data is learned (German 1.13, 1.11, 1.11 at 1.5e-4, 3e-4, 6e-4) "
            "and the more of the old is lost (3.47, 3.56, 3.63).",
            f"Between neighbouring cosines, {steps}.",
            f"Highest minus lowest, new: {_verdict(d(high, low, 'german'), -1)}; old: "
            f"{_verdict(d(high, low, 'english'), 1)}",
        )
    if page.runs(constant):
        lines += page.claim(
            "rewarm",
            "A constant low rate forgets less and never learns the new as well (Gupta et al.; Ibrahim et al.)",
            "staying at the rate that pre-training ended with forgets less (3.22 against 3.56, from 2.17), and the "
            "new data is never learned as well (1.21 against 1.11).",
            f"constant 3e-4 minus re-warming to 3e-3: old {_cell(d(constant, FULL, 'english'), signed=True)}, new "
            f"{_cell(d(constant, FULL, 'german'), signed=True)}.",
            f"Old: {_verdict(d(constant, FULL, 'english'), -1)}. New: {_verdict(d(constant, FULL, 'german'), 1)}",
        )
    warm = {
        w: [d(rewarm_arm(PEAK, "cosine", w), FULL, domain) for domain in DOMAINS[:2]] for w in WARMUPS if w != 0.01
    }
    if all(old and new for old, new in warm.values()):
        lines += page.claim(
            "rewarm",
            "0 to 2 % of warm-up make no difference (Gupta et al.)",
            "warm-up of 0, 0.5, 1 or 2 % has no significant effect on the final loss of either data set.",
            "; ".join(
                f"{100 * w:g} %: old {_cell(old, signed=True)}, new {_cell(new, signed=True)}"
                for w, (old, new) in warm.items()
            )
            + ", minus 1 %.",
            f"Within {MARGIN} nats: "
            + "; ".join(
                f"{100 * w:g} %, old: {_within(old, -MARGIN, MARGIN)}, new: {_within(new, -MARGIN, MARGIN)}"
                for w, (old, new) in warm.items()
            ),
        )

    lines += ["## 3. Infinite schedules over three stages (Ibrahim et al.; Beyond Cosine Decay)", ""]
    lines += [
        "Each stage with 5 % replay of all before it and fresh moments. The infinite life is warmed up and cooled "
        f"down in the first stage alone, and annealed in the last {1 - HELD:.0%} of the third.",
        "",
        "| life | english | german | python | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, label, share in (
        ("base", "cosine, after stage 1", 1),
        (replay_arm(0.05), "cosine, after stage 2", 1),
        ("cosine, third stage", "cosine, after stage 3", 1),
        ("base, infinite", "infinite, after stage 1", 1),
        ("infinite, second stage", "infinite, after stage 2", 1),
        ("infinite, third stage", "infinite, before its anneal", HELD),
        ("infinite, third stage", "infinite, annealed", 1),
    ):
        if page.runs(name):
            cells = " | ".join(_cell(page.at(name, share, domain)) for domain in DOMAINS)
            lines.append(f"| {label} | {cells} | {len(page.runs(name))} |")
    lines.append("")
    if page.runs("infinite, third stage"):
        pairs = {domain: d("infinite, third stage", "cosine, third stage", domain) for domain in DOMAINS}
        seen = (
            "; ".join(f"{domain} {_cell(v, signed=True)}" for domain, v in pairs.items()) + " (infinite minus cosine)."
        )
        lines += page.claim(
            "rewarm",
            "Infinite schedules end about as well as cosines (Ibrahim et al.)",
            "an infinite schedule over three parts of the same data ends about where one cosine over all of it does. "
            "(No shift of distribution there, and one cosine; here there is one, and the cosine is repeated.)",
            seen,
            f"No worse by more than {MARGIN} nats: "
            + ". ".join(f"{domain.capitalize()}: {_within(v, high=MARGIN)}" for domain, v in pairs.items()),
        )
        kept = {domain: pairs[domain] for domain in DOMAINS[:2]}
        lines += page.claim(
            "rewarm",
            "Re-warming is itself a source of forgetting: infinite beats repeated cosine (Beyond Cosine Decay)",
            "under a shift of distribution infinite schedules beat repeated cosines, because re-warming makes forget.",
            seen,
            "Better on what came before: "
            + ". ".join(f"{domain.capitalize()}: {_verdict(v, -1)}" for domain, v in kept.items()),
        )

    lines += ["## 4. Reptile (Abbes et al.)", ""]
    lines += [
        "Replay takes the place of new data here, as in section 1; Abbes et al. read replayed rows besides all of it.",
        "",
    ]
    lines += page.table(
        [replay_arm(0.25), *(f"replay 25 %, Reptile {e:g}" for e in EPSILONS), FULL, "Reptile 0.1 alone"],
        {FULL: "neither"},
    )
    if page.runs("replay 25 %, Reptile 0.1"):
        seen = {e: d(f"replay 25 %, Reptile {e:g}", replay_arm(0.25), "english") for e in EPSILONS}
        learned = {e: d(f"replay 25 %, Reptile {e:g}", replay_arm(0.25), "german") for e in EPSILONS}
        lines += page.claim(
            "reptile",
            "Reptile besides replay improves on replay (Abbes et al.)",
            "at 560M, an average of 67.5 over three tasks with 25 % replay and Reptile, 66.4 with replay; at 1B, 61.5 "
            "with and without it beside 25 %, 63.8 with and 64.0 without it beside 50 %. ε is 0.1.",
            "minus 25 % replay alone: "
            + "; ".join(
                f"ε {e:g}: old {_cell(seen[e], signed=True)}, new {_cell(learned[e], signed=True)}" for e in EPSILONS
            )
            + ".",
            ". ".join(f"ε {e:g}, old: {_verdict(seen[e], -1)}, new: {_verdict(learned[e], -1)}" for e in EPSILONS),
        )

    lines += ["## 5. The stability gap (Guo et al.)", ""]
    lines += [
        "Guo et al. saw the gap in scores of tasks; here it is the old loss: how far it rises in the first tenth of "
        "the run, and at worst. Quarter and fifth are drawn at random from the pages: theirs are chosen for quality.",
        "",
        "| remedy | rise in the first tenth | worst rise | steps to recover | old at the end | new (German) | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in remedies():
        if runs := page.runs(name):
            recovered = [run["recovery"]["english"] for run in runs]
            told = ", ".join("never" if step is None else str(step) for step in recovered)
            cells = [page.early_depth(name), page.values(name, "gap", "english")]
            ends = [page.values(name, "losses", domain) for domain in DOMAINS[:2]]
            told = " | ".join([*map(_cell, cells), told, *map(_cell, ends)])
            lines.append(f"| {name} | {told} | {len(runs)} |")
    lines.append("")
    if page.runs(SUBSET_AND_OLD) and page.runs(replay_arm(OLD_SHARE)):
        against = {FULL: "one pass without", replay_arm(OLD_SHARE): f"one pass with {100 * OLD_SHARE:g} %"}
        rises = {name: page.paired(SUBSET_AND_OLD, name, page.early_depth) for name in against}
        learned = {name: d(SUBSET_AND_OLD, name, "german") for name in against}
        lines += page.claim(
            "replay",
            "Epochs on a subset with the old mixture rate close the gap and learn more (Guo et al.)",
            "four epochs on a tenth of the data, chosen for quality, with the old mixture rate: an average of 40.7 "
            "over four medical tasks, against 37.4 for one pass over all of it and 37.5 for one with 10 % replay, and "
            "no gap.",
            "; ".join(
                f"minus {label}: rise in the first tenth {_cell(rises[name], signed=True)}, new "
                f"{_cell(learned[name], signed=True)}"
                for name, label in against.items()
            )
            + ".",
            ". ".join(
                f"Against {label}, smaller gap: {_verdict(rises[name], -1)}, learns more: "
                f"{_verdict(learned[name], -1)}"
                for name, label in against.items()
            ),
        )

    lines += ["## 6. Low rank: what is learned against what is forgotten", ""]
    rates = {kind: best_rate(results, kind) for kind in LOWRANK}
    full = rewarm_arm(best_peak(results), "cosine")
    names = {lowrank_arm(kind, rate): f"{kind} (peak {rate:g})" for kind, rate in rates.items() if rate is not None}
    lines += [
        f"Rank {RANK}, each at the best of the peak rates {', '.join(map('{:g}'.format, SWEEP))} for the new loss of "
        f"the first seed (full training: of {', '.join(map('{:g}'.format, PEAKS))}). But for the last, all train "
        "embeddings, norms and head in full.",
        "",
    ]
    labels = {full: f"full, AdamW (peak {best_peak(results):g})", **names}
    lines += page.table([full, *names], labels, against=full, called="full")
    edges = [kind for kind, rate in rates.items() if rate in (SWEEP[0], SWEEP[-1])]
    if edges:
        lines += [f"Best rate at the edge of the sweep: {', '.join(edges)}.", ""]
    frozen, lora, ours = (lowrank_arm(kind, rates[kind] or 0) for kind in (FROZEN, "LoRA", "GradNormLoRP"))
    if page.runs(frozen):
        lines += page.claim(
            "gradnormlorp",
            "LoRA learns less and forgets less (D. Biderman et al.)",
            "LoRA learns less and forgets less than full training (D. Biderman et al., 2024; adapters alone).",
            f"{FROZEN}, minus full: new {_cell(d(frozen, full, 'german'), signed=True)}, old "
            f"{_cell(d(frozen, full, 'english'), signed=True)}.",
            f"Learns less: {_verdict(d(frozen, full, 'german'), 1)}. Forgets less: "
            f"{_verdict(d(frozen, full, 'english'), -1)}",
        )
    if page.runs(lora) and page.runs(ours):
        lines += page.claim(
            "gradnormlorp",
            "GradNormLoRP does better than LoRA at the same rank (Huang et al.)",
            "GradNormLoRP does better than LoRA at the same rank (Huang et al., 2024: 80.65 against 79.23 on GLUE; "
            "nothing is said of what is forgotten).",
            f"minus LoRA: new {_cell(d(ours, lora, 'german'), signed=True)}, old "
            f"{_cell(d(ours, lora, 'english'), signed=True)}.",
            f"New: {_verdict(d(ours, lora, 'german'), -1)}",
        )

    if any(page.runs(run.name) for run in SECTIONS["datafree"]):
        lines += ["## 7. Without any old data", ""]
        lines += ["The pull takes the place of weight decay: its arms have none.", ""]
        lines += page.table([FULL, *(run.name for run in SECTIONS["datafree"]), replay_arm(0.01)])
        for card, label, paper, tried in (
            (
                "l2_init",
                "A pull towards the start: is the old loss kept? (a question of ours)",
                "a pull towards the start beats weight decay when a model is fine-tuned (Li et al., 2018), with which "
                "nothing is said of the old loss: that is asked here.",
                [l2_arm(strength) for strength in L2_STRENGTHS],
            ),
            (
                "self_distillation",
                "Self-distillation: is the old loss kept? (a question of ours)",
                "a student of the further pre-trained model does better downstream (Lee et al., 2023), with which "
                "nothing is said of the old loss: that is asked here, of the model itself as the teacher.",
                ["self-distillation"],
            ),
        ):
            found = {name: (d(name, FULL, "english"), d(name, FULL, "german")) for name in tried if page.runs(name)}
            if found:
                lines += page.claim(
                    card,
                    label,
                    paper,
                    "; ".join(
                        f"{name}: old {_cell(old, signed=True)}, new {_cell(new, signed=True)}"
                        for name, (old, new) in found.items()
                    )
                    + ".",
                    ". ".join(
                        f"{name}, keeps more of the old: {_answer(old, -1)}; learns less: {_answer(new, 1)}"
                        for name, (old, new) in found.items()
                    ),
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    plot(page, path.with_name("evidence.png"))
    print(f"written: {path}")
    return page


MARKS = "<!-- evidence: made by `make evidence` -->\n", "<!-- evidence: end -->\n"


def between_marks(text: str, lines: list[str], where: str) -> str:
    """`text` with what stands between the marks made anew; the rest of it stays as it is."""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{where} has no place between {MARKS[0].strip()!r} and {MARKS[1].strip()!r}")
    return before + begin + "\n".join([*lines, ""]) + end + after


def into_readme(page: Page, text: str) -> str:
    """The README with its table of claims."""
    rows = [f"| {label} | {seen} | {verdict} |" for _, label, seen, verdict in page.claims]
    state = unfinished(page.results)
    table = ["| claim | seen here, nats a token | verdict |", "|---|---|---|", *rows]
    return between_marks(text, [*([state, ""] if state else []), *table], "the README")


def into_card(page: Page, name: str, text: str) -> str:
    """A method card with what was seen of its method."""
    many = f"{len(page.seeds)} seed{'s' * (len(page.seeds) != 1)}"
    state = ", not all runs of which are made yet" if unfinished(page.results) else ""
    lines = [
        f"English prose, then German manual pages, a Llama of 1.1M parameters, {many}{state}; losses in nats a token "
        "([the page](../../docs/evidence.md), made by `make evidence`):",
        "",
        *(f"- *{label}* {seen} **{verdict}**" for card, label, seen, verdict in page.claims if card == name),
    ]
    return between_marks(text, lines, f"the card of {name}")


def plot(page: Page, path: Path) -> None:
    """Old against new loss of every arm of the German stage, and the course of the old loss of some."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {
        "replay": [*map(replay_arm, RATIOS)],
        "re-warming": [rewarm_arm(p, s) for p in PEAKS for s in ("constant", "cosine")],
        "Reptile": [run.name for run in SECTIONS["reptile"]],
        "low rank": [lowrank_arm(k, r) for k in LOWRANK if (r := best_rate(page.results, k)) is not None],
        "data-free": [run.name for run in SECTIONS["datafree"]],
        "subset": [run.name for run in SECTIONS["gap"]],
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for marker, (label, names) in zip("osD^vP", groups.items(), strict=True):
        points = [
            (
                statistics.fmean(page.values(n, "losses", "german")),
                statistics.fmean(page.values(n, "losses", "english")),
            )
            for n in names
            if page.runs(n)
        ]
        if points:
            left.plot(*zip(*points, strict=True), marker, label=label, linestyle="-" if label == "replay" else "")
    left.set(xlabel="new loss (German)", ylabel="old loss (English)", title="learned against forgotten")
    left.legend()
    for name in (FULL, replay_arm(0.05), replay_arm(0.25), rewarm_arm(3e-4, "constant")):
        runs = page.runs(name)
        if runs:
            courses = [run["course"]["english"] for run in runs]
            losses = [statistics.fmean(values) for values in zip(*(c["losses"] for c in courses), strict=True)]
            right.plot([step + 1 for step in courses[0]["steps"]], losses, label=name)
    right.set(xscale="log", xlabel="step + 1", ylabel="old loss (English)", title="the stability gap")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--output", default="evidence", help="folder of what is finished")
    parser.add_argument("--runs", help="with report: another file of finished runs than FOLDER/runs.jsonl")
    parser.add_argument("--seeds", type=int, help="how many; of the scale by default")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="some sections")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before workers import torch: each has a core.
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(given.output)
    if given.runs and given.what == "run":
        parser.error("--runs is for report; a run appends to FOLDER/runs.jsonl")
    results = Results(folder, given.scale, Path(given.runs) if given.runs else None)
    if given.what == "report" and not results.done:
        parser.error(f"{results.path} holds no finished run of --scale {given.scale}: run first")
    if given.what == "run":
        run_all(results, given.only or list(SECTIONS), given.seeds or SCALES[given.scale].seeds)
    root = Path(__file__).parents[1]
    if given.what == "report" and given.scale == "full":
        page = write_page(results, root / "docs" / "evidence.md")
        readme = root / "README.md"
        readme.write_text(into_readme(page, readme.read_text("utf-8")), "utf-8")
        for name in sorted({card for card, *_ in page.claims}):
            card = root / "model_cards" / "methods" / f"{name}.md"
            card.write_text(into_card(page, name, card.read_text("utf-8")), "utf-8")
    else:
        write_page(results, folder / "evidence.md")


if __name__ == "__main__":
    main()
