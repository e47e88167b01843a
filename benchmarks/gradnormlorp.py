"""GradNormLoRP beside what one would use instead: loss, bytes of state and speed.

`python benchmarks/gradnormlorp.py all [--output FOLDER]` makes everything (the runs of the page took 6.5 hours of one
shared core); or one of pretrain, options, shift, speed, throughput, refresh, memory, report.

    pretrain   a Llama of 1.3M parameters on Python's standard library, 1M tokens an arm: AdamW, AdamW8bit
               (bitsandbytes), GaLore (galore-torch), APOLLO (apollo-torch), LoRA, DoRA (PEFT), ours. Each at its
               published settings, at the best of its learning rates, which is not at the edge of its sweep, then on
               more seeds
    options    the same for settings of ours, one changed at a time
    shift      the demo's shift, English prose to Python sources: what some of these arms learn and forget
    speed      seconds a step of the optimizer alone, arms interleaved
    throughput tokens a second of whole training steps, arms interleaved
    refresh    a new basis against `torch.linalg.svd`, on gradients of a trained model and on white noise
    memory     bytes at LLaMA-7B's shapes
    report     what FOLDER holds, as docs/gradnormlorp.md

`pip install --no-deps galore-torch apollo-torch` for those two. Every finished run is kept in FOLDER and not made
again, so that the command goes on after a kill.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

VOCABULARY, LENGTH, BATCH = 2048, 256, 8
HIDDEN, LAYERS, INTERMEDIATE = 128, 4, 352
RANK = 32
"""A quarter of the hidden size, as the GaLore-family tables have it for the larger models (512 of 2048)."""

TOKENS = 1_000_000
STEPS = TOKENS // (LENGTH * BATCH)
WARMUP, FLOOR = 0.1, 0.1
"""Share of the steps that warm up, and of the peak that a cosine ends at: GaLore's pre-training schedule."""

SEEDS = (0, 1, 2)
LADDER = tuple(1e-4 * 10 ** (step / 4) for step in range(13))
"""Learning rates tried: four a decade, 1e-4 to 0.1."""


def corpus(folder: Path) -> dict[str, np.ndarray]:
    """Blocks to train on and held out: `library`, which is Python's sources whole, and the two domains of `shift`."""
    path = folder / "tokens.npz"
    if not path.exists():
        from hf_pretrain_ext.demo.corpora import Document, english_prose, python_sources, split
        from hf_pretrain_ext.demo.tokenizer import blocks, encode_documents, train_tokenizer

        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in sorted(root.rglob("*.py")) if not {"site-packages", "test"} & set(file.parts)]
        library = split(Document(file.read_text("utf-8", "ignore"), str(file.relative_to(root))) for file in files)
        prose, sources = english_prose(folder), python_sources()
        made = {}
        for domains in (
            {"library": library},
            {"prose": (prose.train, prose.heldout), "sources": (sources.train, sources.heldout)},
        ):
            first = next(iter(domains.values()))[0]
            tokenizer = train_tokenizer((document.text for document in first), vocab_size=VOCABULARY)
            for name, parts in domains.items():
                for part, documents in zip(("train", "held"), parts, strict=True):
                    ids = blocks(encode_documents(tokenizer, [each.text for each in documents]), LENGTH)["input_ids"]
                    made[f"{name}_{part}"] = np.array(ids[:], dtype=np.uint16)
        np.savez(path, **{key: value if "train" in key else value[:256] for key, value in made.items()})
    return dict(np.load(path))


def llama(seed: int, hidden: int, layers: int, vocabulary: int, inner: int, head: int, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head,
            **settings,
        )
    )


def build_model(seed: int) -> Any:
    return llama(seed, HIDDEN, LAYERS, VOCABULARY, INTERMEDIATE, 32, max_position_embeddings=LENGTH, use_cache=False)


# The arms: a model, and its optimizer at a learning rate.


def linear_weights(model: Any, rank: int) -> list[Any]:
    from hf_pretrain_ext.gradnormlorp import projected_modules

    return [module.weight for module in projected_modules(model, rank).values()]


def others(model: Any, weights: list[Any]) -> list[Any]:
    chosen = {id(weight) for weight in weights}
    return [param for param in model.parameters() if id(param) not in chosen and param.requires_grad]


def ours(model: Any, lr: float, rank: int = RANK, **settings: Any) -> tuple[Any, Any]:
    from hf_pretrain_ext.gradnormlorp import GradNormLoRP, param_groups

    return model, GradNormLoRP(param_groups(model, rank), lr=lr, **settings)


def adamw(model: Any, lr: float) -> tuple[Any, Any]:
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def adamw_quarter(model: Any, lr: float) -> tuple[Any, Any]:
    """The control that the low-rank tables lack: they train the matrices at `scale` 0.25 of the others' rate."""
    weights = linear_weights(model, RANK)
    groups = [{"params": others(model, weights)}, {"params": weights, "lr": 0.25 * lr}]
    return model, torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)


def adamw8bit(model: Any, lr: float) -> tuple[Any, Any]:
    import bitsandbytes

    return model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0)


def galore(model: Any, lr: float, rank: int = RANK) -> tuple[Any, Any]:
    from galore_torch import GaLoreAdamW

    weights = linear_weights(model, rank)
    projected = {"params": weights, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return model, GaLoreAdamW([{"params": others(model, weights)}, projected], lr=lr, weight_decay=0.0)


def apollo(model: Any, lr: float) -> tuple[Any, Any]:
    from apollo_torch import APOLLOAdamW

    weights = linear_weights(model, RANK)
    projected = {"params": weights, "rank": RANK, "proj": "random", "scale_type": "channel", "scale": 1.0}
    projected |= {"update_proj_gap": 200, "proj_type": "std"}
    return model, APOLLOAdamW([{"params": others(model, weights)}, projected], lr=lr, weight_decay=0.0)


def lora(model: Any, lr: float, use_dora: bool = False) -> tuple[Any, Any]:
    """Adapters on the linear layers, all else trained: what the GaLore-family tables call LoRA."""
    from peft import LoraConfig, get_peft_model

    from hf_pretrain_ext.gradnormlorp import projected_modules

    names = sorted({name.rsplit(".", 1)[-1] for name in projected_modules(model, RANK)})
    adapter = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=names, use_dora=use_dora)
    model = get_peft_model(model, adapter)
    for name, param in model.named_parameters():
        param.requires_grad_("base_layer" not in name)
    trained = [param for param in model.parameters() if param.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def dora(model: Any, lr: float) -> tuple[Any, Any]:
    return lora(model, lr, use_dora=True)


Arm = Callable[..., tuple[Any, Any]]

ARMS: dict[str, tuple[Arm, dict[str, Any], float]] = {
    "AdamW": (adamw, {}, 3e-3),
    "AdamW8bit": (adamw8bit, {}, 3e-3),
    "AdamW, matrices at a quarter": (adamw_quarter, {}, 1e-2),
    "GaLore": (galore, {}, 1e-2),
    "APOLLO": (apollo, {}, 1e-2),
    "LoRA": (lora, {}, 3e-3),
    "DoRA": (dora, {}, 3e-3),
    "ours": (ours, {}, 3e-3),
    "ours, norm=None": (ours, {"norm": None}, 1.8e-2),
    "ours, 4-bit projector": (ours, {"projector_bits": 4}, 3e-3),
    "ours, 4-bit": (ours, {"projector_bits": 4, "bits": 4}, 3e-3),
}
"""What makes an arm, its settings, and the rate that its sweep starts from: GaLore's and APOLLO's published one."""

OPTION_RATE = LADDER[6]
"""Of all options, which share it."""

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "norm=in": {"norm": "in"},
    "norm=None": {"norm": None},
    "tangential": {"tangential": True},
    "reset": {"on_refresh": "reset"},
    "keep": {"on_refresh": "keep"},
    "32 bits": {"bits": 32, "projector_bits": 32},
    "projector 4": {"projector_bits": 4},
    "moments 4": {"bits": 4, "projector_bits": 4},
    "gap 50": {"update_proj_gap": 50},
}


def tensor_bytes(optimizer: Any) -> int:
    """What the storages of the optimizer's state hold."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__"):
            # Projectors of GaLore and APOLLO are objects in the state.
            visit(vars(value))

    for state in optimizer.state.values():
        visit(state)
    return sum(seen.values())


def learn(model: Any, optimizer: Any, blocks: np.ndarray, seed: int, steps: int) -> float:
    """Trains on `steps` batches of `blocks`; returns seconds."""
    order = np.random.default_rng(seed).permutation(len(blocks))[: steps * BATCH].reshape(steps, BATCH)
    rates = [group["lr"] for group in optimizer.param_groups]
    warm = round(WARMUP * steps)
    began = time.perf_counter()
    for step, rows in enumerate(order):
        cosine = FLOOR + (1 - FLOOR) / 2 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        factor = (step + 1) / warm if step < warm else cosine
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        ids = torch.from_numpy(blocks[rows].astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(float(loss.detach())):
            break
    return time.perf_counter() - began


@torch.no_grad()
def held_out(model: Any, blocks: np.ndarray) -> float:
    model.eval()
    batches = torch.from_numpy(blocks.astype(np.int64)).split(BATCH)
    return statistics.mean(float(model(input_ids=ids, labels=ids).loss) for ids in batches)


SHIFT_STEPS = STEPS // 2


def train(task: tuple[str, str, dict[str, Any], float, int, str]) -> dict[str, Any]:
    """One run: `(name, arm, settings, learning rate, seed, folder)`; one named `shift ...` starts from the base."""
    name, arm, settings, lr, seed, folder = task
    torch.set_num_threads(1)
    data, shift = corpus(Path(folder)), name.startswith("shift")
    model = build_model(seed)
    if shift:
        model.load_state_dict(load_file(Path(folder) / "base.safetensors"))
    model, optimizer = ARMS[arm][0](model, lr, **settings)
    steps = SHIFT_STEPS if shift else STEPS
    seconds = learn(model, optimizer, data["sources_train" if shift else "library_train"], seed, steps)
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "loss": held_out(model, data["sources_held" if shift else "library_held"]),
        **({"old": held_out(model, data["prose_held"])} if shift else {}),
        "state_bytes": tensor_bytes(optimizer),
        "seconds": seconds,
        "tokens_per_second": steps * BATCH * LENGTH / seconds,
    }


class Runs:
    """Finished runs, one JSON line each; others are made by as many processes as there are cores."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "runs.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        corpus(folder)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {self.key(run["name"], run["lr"], run["seed"]): run for run in map(json.loads, lines)}

    @staticmethod
    def key(name: str, lr: float, seed: int) -> tuple[str, str, int]:
        return name, f"{lr:.3g}", seed

    def make(self, wanted: list[tuple[str, str, dict[str, Any], float, int]]) -> None:
        left = [(*task, str(self.folder)) for task in wanted if self.key(task[0], task[3], task[4]) not in self.done]
        if not left:
            return
        processes = min(len(left), len(os.sched_getaffinity(0)))
        with (
            multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool,
            self.path.open("a") as file,
        ):
            for run in pool.imap_unordered(train, left):
                self.done[self.key(run["name"], run["lr"], run["seed"])] = run
                file.write(json.dumps(run) + "\n")
                file.flush()
                print(f"{run['name']:24} lr {run['lr']:.2e} seed {run['seed']}  loss {run['loss']:.4f}", flush=True)

    def sweep(self, arms: dict[str, tuple[str, dict[str, Any], float]]) -> dict[str, float]:
        """Each arm's best rate of `LADDER` on the first seed: those beside it were tried too, and are worse."""
        starts = {
            name: min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / lr)))
            for name, (_, _, lr) in arms.items()
        }
        tried = {name: {start - 1, start, start + 1} for name, start in starts.items()}
        while True:
            self.make([(name, *arms[name][:2], LADDER[i], SEEDS[0]) for name in arms for i in sorted(tried[name])])
            best, grown = {}, False
            for name, indices in tried.items():
                losses = {i: self.done[self.key(name, LADDER[i], SEEDS[0])]["loss"] for i in indices}
                at = min(losses, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
                best[name] = LADDER[at]
                for beside in (at - 1, at + 1):
                    if 0 <= beside < len(LADDER) and beside not in indices:
                        indices.add(beside)
                        grown = True
            if not grown:
                return best


def pretrain(
    runs: Runs, arms: dict[str, tuple[str, dict[str, Any], float]], seeds: tuple[int, ...]
) -> list[dict[str, Any]]:
    options = next(iter(arms)).startswith("option ")
    best = dict.fromkeys(arms, OPTION_RATE) if options else runs.sweep(arms)
    runs.make([(name, *arms[name][:2], best[name], seed) for seed in seeds for name in arms])
    rows = []
    for name in arms:
        found = [runs.done[runs.key(name, best[name], seed)] for seed in seeds]
        losses = [run["loss"] for run in found]
        rows.append(
            {
                "arm": name,
                "lr": best[name],
                "loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(seeds) > 1 else 0.0,
                "seeds": len(seeds),
                "state_bytes": found[0]["state_bytes"],
                "tokens_per_second": statistics.median(run["tokens_per_second"] for run in found),
            }
        )
    print(f"\n{'arm':24} {'rate':>9} {'held-out loss':>16} {'state':>9} {'tokens/s':>9}")
    for row in sorted(rows, key=lambda row: row["loss"]):
        print(
            f"{row['arm']:24} {row['lr']:9.2e} {row['loss']:8.4f} ± {row['spread']:.4f} "
            f"{row['state_bytes'] / 1e6:6.2f} MB {row['tokens_per_second']:9.0f}"
        )
    return rows


def shift(runs: Runs) -> list[dict[str, Any]]:
    """A base on English prose, then Python sources at three rates an arm: losses of both domains."""
    path, data = runs.folder / "base.safetensors", corpus(runs.folder)
    if not path.exists():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model, optimizer = adamw(build_model(0), 3e-3)
        learn(model, optimizer, data["prose_train"], 0, STEPS)
        save_file(model.state_dict(), path)
    model = build_model(0)
    model.load_state_dict(load_file(path))
    before = {
        "arm": "before",
        "loss": held_out(model, data["sources_held"]),
        "old": held_out(model, data["prose_held"]),
    }
    arms = {"AdamW": 1e-3, "LoRA": 3e-3, "ours": 3e-3}
    tasks = [
        (f"shift {name}", name, {}, rate * factor, 0) for name, rate in arms.items() for factor in (0.32, 1.0, 3.2)
    ]
    runs.make(tasks)
    found = [runs.done[runs.key(name, rate, seed)] for name, _, _, rate, seed in tasks]
    rows = [before, *({**run, "arm": run["name"].removeprefix("shift ")} for run in found)]
    for row in rows:
        print(f"{row['arm']:8} lr {row.get('lr', 0):.2e}  old {row['old']:.4f}  new {row['loss']:.4f}")
    return rows


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and bootstrap 95 % interval."""
    draws = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


SIZES = {"8M": (256, 8, 4096, 688), "40M": (512, 10, 8192, 1376)}
"""Hidden size, layers, vocabulary and feed-forward size of the models whose optimizer steps are timed."""


def speed(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Seconds of `optimizer.step()` alone, one step of every arm a round; ratios are those of one round."""
    rows = []
    for size, sizes in SIZES.items():
        rank = sizes[0] // 4
        makers: dict[str, Callable[[Any, float], tuple[Any, Any]]] = {
            "AdamW8bit": adamw8bit,
            "AdamW": adamw,
            "GaLore": functools.partial(galore, rank=rank),
            "ours": functools.partial(ours, rank=rank),
        }
        arms = {}
        for name, make in makers.items():
            model, optimizer = make(llama(0, *sizes, 64), 1e-4)
            for param in model.parameters():
                param.grad = torch.randn_like(param) * 1e-3
            optimizer.step()
            arms[name] = optimizer
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(pairs + 2):
            for name in list(arms)[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                arms[name].step()
                if turn >= 2:
                    times[name].append(time.perf_counter() - began)
        for name, seconds in times.items():
            ratio = interval([mine / its for mine, its in zip(times["ours"], seconds, strict=True)])
            rows.append(
                {
                    "model": size,
                    "arm": name,
                    "milliseconds": statistics.median(seconds) * 1e3,
                    "slowest": max(seconds) * 1e3,
                    "ours_to_it": ratio,
                    "state_bytes": tensor_bytes(arms[name]),
                }
            )
            row = rows[-1]
            print(
                f"{size:5} {name:10} {row['milliseconds']:8.1f} ms a step (slowest {row['slowest']:.0f}), "
                f"ours/it {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}], state {row['state_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
    return rows


def throughput(pairs: int) -> list[dict[str, Any]]:
    """Tokens a second of whole training steps on the model of `pretrain`, one step of every arm a round."""
    arms = {name: make(build_model(0), 1e-4, **settings) for name, (make, settings, _) in ARMS.items()}
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(pairs + 2):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            model, optimizer = arms[name]
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    rows = []
    for name, seconds in times.items():
        ratio = interval([its / plain for its, plain in zip(seconds, times["AdamW"], strict=True)])
        rows.append({"arm": name, "tokens_per_second": BATCH * LENGTH / statistics.median(seconds), "ratio": ratio})
        print(f"{name:30} {rows[-1]['tokens_per_second']:8.0f} tokens/s, {ratio[0]:.2f} of AdamW's time", flush=True)
    return rows


def trained_gradients(folder: Path, steps: int = 60) -> dict[str, torch.Tensor]:
    """Gradients of a model after some steps, of all its projected matrices."""
    from hf_pretrain_ext.gradnormlorp import projected_modules

    blocks = corpus(folder)["library_train"]
    model, optimizer = adamw(build_model(0), 1e-3)
    for step in range(steps + 1):
        ids = torch.from_numpy(blocks[step * BATCH : (step + 1) * BATCH].astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if step < steps:
            optimizer.step()
    return {name: module.weight.grad.float() for name, module in projected_modules(model, RANK).items()}


def like(gradient: torch.Tensor, side: int) -> torch.Tensor:
    """A `side` × `side` matrix with the singular values of `gradient`, interpolated, in random directions."""
    values = torch.linalg.svdvals(gradient).log().clamp_min(-40)
    at = torch.linspace(0, len(values) - 1, side)
    low = at.long().clamp_max(len(values) - 2)
    spectrum = torch.lerp(values[low], values[low + 1], at - low).exp()
    left, right = (torch.linalg.qr(torch.randn(side, side)).Q for _ in range(2))
    return left * spectrum @ right


def refresh(folder: Path, side: int = 4096, rank: int = 128, pairs: int = 3) -> list[dict[str, Any]]:
    """A basis by the range finder against one by a full SVD: seconds, and energy captured as a share of the SVD's."""
    from hf_pretrain_ext.gradnormlorp import captured_energy, leading_basis

    torch.manual_seed(0)
    gradients = trained_gradients(folder)
    print("gradients of a trained model, rank 24, energy captured as a share of the SVD's:")
    shares = []
    for gradient in gradients.values():
        left = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        # Below twice the columns tried the basis is an exact one; fewer are tried here, so that it is not.
        found = leading_basis(left, 24, torch.Generator().manual_seed(0), oversampling=16)
        best = torch.linalg.svd(left, full_matrices=False).U[:, :24]
        shares.append(captured_energy(left, found) / captured_energy(left, best))
    print(f"  {len(shares)} matrices: worst {min(shares):.4f}, median {statistics.median(shares):.4f}")
    kept = {name: gradients[name] for name in ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj")}
    cases = {f"spectrum of {name}": like(gradient, side) for name, gradient in kept.items()}
    cases["white noise"] = torch.randn(side, side)
    rows: list[dict[str, Any]] = [
        {"case": "small gradients", "worst": min(shares), "median": statistics.median(shares)}
    ]
    for name, matrix in cases.items():
        times: dict[str, list[float]] = {"range finder": [], "svd": []}
        for _ in range(pairs):
            began = time.perf_counter()
            found = leading_basis(matrix, rank, torch.Generator().manual_seed(0))
            between = time.perf_counter()
            best = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
            times["range finder"].append(between - began)
            times["svd"].append(time.perf_counter() - between)
        share = captured_energy(matrix, found) / captured_energy(matrix, best)
        ratio = statistics.median(b / a for a, b in zip(times["range finder"], times["svd"], strict=True))
        rows.append({"case": name, "share": share, "times_cheaper": ratio, **times})
        print(
            f"{side} × {side}, rank {rank}, {name}: {statistics.median(times['range finder']):.2f} s against "
            f"{statistics.median(times['svd']):.2f} s, {ratio:.0f} times cheaper, energy {share:.4f} of the SVD's",
            flush=True,
        )
    return rows


def memory_table() -> list[dict[str, Any]]:
    """LLaMA-7B at rank 1024, and one of its layers really allocated, whose bytes the planner must meet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_pretrain_ext.gradnormlorp import GradNormLoRP, comparison_table, measured_state, memory, param_groups

    print("\n".join(comparison_table(LlamaConfig(), 1024)), "\n")
    rows = []
    for bits, projector_bits in ((8, 16), (8, 8), (8, 4), (4, 4)):
        plan = memory(LlamaConfig(), 1024, bits, projector_bits, dtype=torch.bfloat16)
        # A whole 7B does not fit everywhere; its layers are alike.
        config = LlamaConfig(num_hidden_layers=1, vocab_size=512)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        settings = {"bits": bits, "projector_bits": projector_bits}
        optimizer = GradNormLoRP(param_groups(model, 1024), lr=1e-3, **settings)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        held, planned = measured_state(optimizer), memory(model, 1024, **settings).state
        saved = 1 - plan.state / (8 * plan.parameters)
        rows.append({**settings, "state": plan.state, "saved": saved, "layer_held": held, "layer_planned": planned})
        print(
            f"moments {bits:2} bits, projectors {projector_bits:2}: {plan.state / 1e9:.3f} GB of state, {saved:.1%} "
            f"less than FP32 Adam; one layer: {held / 1e6:.3f} MB allocated, {planned / 1e6:.3f} MB planned",
            flush=True,
        )
    return rows


def rows_of(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Each of `names` that was run, at its best rate, over the seeds that are there."""
    path = folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = []
    for name in names:
        found = [run for run in runs if run["name"] == name and math.isfinite(run["loss"])]
        first = [run for run in found if run["seed"] == SEEDS[0]]
        if not first:
            continue
        rate = min(first, key=lambda run: run["loss"])["lr"]
        losses = [run["loss"] for run in found if math.isclose(run["lr"], rate)]
        rows.append(
            {
                "arm": name,
                "lr": rate,
                "loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "seeds": len(losses),
                "state_bytes": first[0]["state_bytes"],
            }
        )
    return rows


def against_the_goal(rows: list[dict[str, Any]]) -> list[str]:
    """The goal in words: a lower loss than GaLore and LoRA at equal rank, in fewer bytes."""
    by_name = {row["arm"]: row for row in rows}
    peers = [by_name[name] for name in ("GaLore", "LoRA", "DoRA", "APOLLO") if name in by_name]
    lines = ["The goal was a lower loss than GaLore's and LoRA's at equal rank, in fewer bytes of state:", ""]
    for name in ("ours", "ours, norm=None"):
        if name in by_name:
            row = by_name[name]
            told = [
                f"{peer['arm']} {row['loss'] - peer['loss']:+.4f} nats in "
                f"{row['state_bytes'] / peer['state_bytes']:.0%} of the bytes"
                for peer in peers
            ]
            lines.append(f"- *{name}* against {', '.join(told)}.")
    return [*lines, ""] if len(lines) > 2 else []


def page(folder: Path) -> str:
    """The results as Markdown; a section whose results are missing says how to make them."""

    def section(name: str, title: str, header: str, line: Callable[[dict[str, Any]], str], text: str) -> list[str]:
        path = folder / f"{name}.json"
        rows: list[dict[str, Any]] = []
        if name == "pretrain":
            rows = rows_of(folder, list(ARMS))
        elif name == "options":
            rows = rows_of(folder, [f"option {option}" for option in OPTIONS])
        elif path.exists():
            rows = json.loads(path.read_text())
        if not rows:
            return [f"## {title}", "", f"Not measured yet: `python benchmarks/gradnormlorp.py {name}`.", ""]
        rule = "|".join("---" if not cell.strip().endswith(":") else "---:" for cell in header.split("|"))
        return [f"## {title}", "", text, "", f"| {header.replace(':', '')} |", f"|{rule}|", *map(line, rows), ""]

    def run(row: dict[str, Any]) -> str:
        spread = f" ± {row['spread']:.4f}" if row["seeds"] > 1 else ""
        return (
            f"| {row['arm'].removeprefix('option ')} | {row['lr']:.2e} | {row['loss']:.4f}{spread} | "
            f"{row['state_bytes'] / 1e6:.2f} MB | {row['seeds']} |"
        )

    lines = [
        "# GradNormLoRP, measured",
        "",
        "Written by `python benchmarks/gradnormlorp.py report`, on CPU.",
        "",
        *section(
            "pretrain",
            "Pre-training",
            "optimizer | best rate: | held-out loss: | state: | seeds:",
            run,
            f"A Llama of hidden size {HIDDEN}, {LAYERS} layers, {VOCABULARY} tokens, on the Python standard library, "
            f"{TOKENS / 1e6:.0f}M tokens an arm in {STEPS} steps, rank {RANK}; mean and deviation over seeds, "
            "each at the best of a sweep of four rates a decade whose neighbours are worse on the first seed. State: "
            "bytes of the optimizer's tensors. *AdamW, matrices at a quarter*: the low-rank optimizers train the "
            "matrices at a quarter (`scale`) of the rate of embeddings and norms, which is most of what sets them "
            "apart from AdamW here; this arm does the same in full rank. LoRA and DoRA train embeddings, norms and "
            "head in full, as in the tables of the GaLore family; galore-torch and apollo-torch keep their moments in "
            "32 bits on a CPU.",
        ),
        *against_the_goal(rows_of(folder, list(ARMS))),
        *section(
            "options",
            "Options",
            "option | rate: | held-out loss: | state: | seeds:",
            run,
            "The same run, with one setting of ours changed at a time, all at one rate.",
        ),
        *section(
            "shift",
            "What is forgotten",
            "optimizer | rate: | old domain (English prose): | new domain (Python sources):",
            lambda row: (
                f"| {row['arm']} | " + (f"{row['lr']:.2e}" if "lr" in row else "") + f" | {row['old']:.3f} | "
                f"{row['loss']:.3f} |"
            ),
            f"A base trained on English prose for {TOKENS / 1e6:.0f}M tokens goes on with Python sources for "
            f"{SHIFT_STEPS * BATCH * LENGTH / 1e6:.1f}M, without replay; held-out losses, one seed.",
        ),
        *section(
            "speed",
            "Seconds of an optimizer step",
            "model | optimizer | ms: | slowest: | ours ÷ it: | state:",
            lambda row: (
                f"| {row['model']} | {row['arm']} | {row['milliseconds']:.1f} | {row['slowest']:.0f} | "
                f"{row['ours_to_it'][0]:.2f} ({row['ours_to_it'][1]:.2f} to {row['ours_to_it'][2]:.2f}) | "
                f"{row['state_bytes'] / 1e6:.1f} MB |"
            ),
            "`optimizer.step()` alone on two cores, interleaved; median, and the bootstrap 95 % interval of the ratio "
            "in one round. bitsandbytes is weak on a CPU. *Slowest* are rounds in which others had the cores: every "
            "optimizer has such.",
        ),
        *section(
            "throughput",
            "Tokens a second",
            "optimizer | tokens a second: | seconds ÷ AdamW's:",
            lambda row: (
                f"| {row['arm']} | {row['tokens_per_second']:.0f} | {row['ratio'][0]:.2f} "
                f"({row['ratio'][1]:.2f} to {row['ratio'][2]:.2f}) |"
            ),
            "Whole training steps of the model of the first table, interleaved; the ratio in one round, with the "
            "bootstrap 95 % interval of its median. New bases are made in some of these steps.",
        ),
        *section(
            "refresh",
            "A new basis",
            "matrix | range finder: | full SVD: | times cheaper: | energy, of the SVD's:",
            lambda row: (
                f"| {row['case']} | | | | {row['worst']:.4f} (worst), {row['median']:.4f} (median) |"
                if "worst" in row
                else f"| {row['case']} | {statistics.median(row['range finder']):.2f} s | "
                f"{statistics.median(row['svd']):.2f} s | {row['times_cheaper']:.0f} | {row['share']:.4f} |"
            ),
            "4096 × 4096 at rank 128, with the singular values of gradients of a trained model, and white noise.",
        ),
        *section(
            "memory",
            "LLaMA-7B at rank 1024",
            "moments | projectors | state: | less than FP32 Adam: | one layer, allocated: | one layer, planned:",
            lambda row: (
                f"| {row['bits']} bits | {row['projector_bits']} bits | {row['state'] / 1e9:.3f} GB | "
                f"{row['saved']:.1%} | {row['layer_held'] / 1e6:.3f} MB | {row['layer_planned'] / 1e6:.3f} MB |"
            ),
            "Scales, maxima and norms included; one layer of those shapes really allocated.",
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = ["memory", "refresh", "speed", "throughput", "pretrain", "options", "shift", "report"]
    parser.add_argument("what", choices=["all", *whats])
    parser.add_argument("--output", default="gradnormlorp_benchmark", help="folder of what is finished")
    parser.add_argument("--arms", nargs="*", help="some arms only")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, at the best rate")
    parser.add_argument("--pairs", type=int, default=20, help="rounds of `speed` and `throughput`")
    given = parser.parse_args()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    for what in whats if given.what == "all" else [given.what]:
        make(what, folder, given)


def make(what: str, folder: Path, given: argparse.Namespace) -> None:
    if what == "report":
        path = Path(__file__).parents[1] / "docs" / "gradnormlorp.md"
        path.write_text(page(folder))
        print(f"written: {path}")
        return
    if what == "speed":
        rows = speed(folder, given.pairs)
    elif what == "throughput":
        rows = throughput(given.pairs)
    elif what == "shift":
        rows = shift(Runs(folder))
    elif what == "refresh":
        rows = refresh(folder)
    elif what == "memory":
        rows = memory_table()
    else:
        if what == "pretrain":
            arms = {name: (name, settings, lr) for name, (_, settings, lr) in ARMS.items()}
        else:
            arms = {f"option {name}": ("ours", settings, OPTION_RATE) for name, settings in OPTIONS.items()}
        wanted = {
            name: arm for name, arm in arms.items() if not given.arms or name.removeprefix("option ") in given.arms
        }
        rows = pretrain(Runs(folder), wanted, SEEDS[: given.seeds])
    (folder / f"{what}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
