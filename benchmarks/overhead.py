"""What the spine costs: draws a second, skipping on resume, import time, tokens a second with and without plug-ins.

`python benchmarks/overhead.py [--pairs 20] [--steps 12] [--output FILE]` prints a table and writes JSON. Ratios
compare interleaved pairs in one run: the median of the pairs' ratios with a bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def draws_per_second() -> dict[str, float]:
    """Million draws a second on one core, plans of 2, 5 and 20 sources with a window of 480 draws."""
    from hf_pretrain_ext.plan import SamplePlan, Segment, Source

    plans = {
        "2 sources": (("new", 10**9), ("old", 10**6)),
        "5 sources": tuple((f"s{k}", 10 ** (3 + k)) for k in range(5)),
        "20 sources": tuple((f"s{k}", 10 ** (3 + k // 3)) for k in range(20)),
    }
    found = {}
    for name, sources in plans.items():
        weights = (19, 1) if len(sources) == 2 else tuple(range(1, len(sources) + 1))
        plan = SamplePlan(tuple(Source(*s) for s in sources), (Segment(0, weights),), seed=1, window=480)
        plan.draws(0, 1000)
        times = []
        for repeat in range(5):
            began = time.perf_counter()
            plan.draws(repeat * 1_000_000, (repeat + 1) * 1_000_000)
            times.append(time.perf_counter() - began)
        found[name] = round(1 / min(times), 2)
    return found


def token_draws_per_second() -> dict[str, float]:
    """The same for shares in tokens, rows of 10 to 2,000 tokens."""
    from hf_pretrain_ext.plan import SamplePlan, Segment, Source

    found = {}
    for number in (2, 5, 20):
        draw = np.random.default_rng(0)
        sources = tuple(Source(f"s{k}", 200_000, lengths=draw.integers(10, 2_000, 200_000)) for k in range(number))
        plan = SamplePlan(sources, (Segment(0, tuple(range(1, number + 1))),), seed=1, window=480, unit="tokens")
        times = []
        for repeat in range(5):
            began = time.perf_counter()
            plan.draws(repeat * 500_000, (repeat + 1) * 500_000)
            times.append(time.perf_counter() - began)
        found[f"{number} sources"] = round(0.5 / min(times), 2)
    return found


def skipping_seconds() -> dict[str, float]:
    """Seconds until the host's loader has skipped to a step and the first batch is there, one rank and two."""
    import torch
    from accelerate.data_loader import BatchSamplerShard, skip_first_batches
    from torch.utils.data import DataLoader

    from hf_pretrain_ext.loader import PlanBatchSampler, PlanDataset
    from hf_pretrain_ext.plan import SamplePlan, Source

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, row: int) -> int:
            return row

    found = {}
    for ranks in (1, 2):
        for steps in (100_000, 1_000_000):
            plan = SamplePlan((Source("new", 10**12),), window=8)
            sampler: Any = PlanBatchSampler(8 // ranks, ranks * 2_000_000, start=lambda: 0)
            if ranks > 1:
                sampler = BatchSamplerShard(sampler, ranks, 0)
            loader = DataLoader(PlanDataset(plan, [Rows()]), batch_sampler=sampler, collate_fn=list)
            began = time.perf_counter()
            next(iter(skip_first_batches(loader, steps)))
            found[f"{ranks} rank(s), step {steps:,}"] = round(time.perf_counter() - began, 3)
    return found


def import_seconds(repeats: int = 7) -> dict[str, float]:
    """Seconds that `import hf_pretrain_ext` adds to `import transformers`, in new processes."""
    script = (
        "import time, transformers; t = time.perf_counter(); import hf_pretrain_ext; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return {"import beyond transformers": round(statistics.median(times), 4)}


def _trainer(folder: str, steps: int, plugins: list[Any], watch: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

    from hf_pretrain_ext.demo.precision import fast_bf16

    set_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    ids = torch.randint(1, 4096, (4096, 128)).numpy()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        max_steps=steps,
        learning_rate=3e-3,
        bf16=fast_bf16(),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[watch, *plugins],
    )
    return trainer, data


def throughput(pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a step of each plug-in beside a bare Trainer: 1.3M parameters, 2,048 tokens a step."""
    from transformers import PrinterCallback, TrainerCallback

    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import ForgettingCallback, GradNormLoRPCallback, ReplayCallback, RewarmCallback

    class Watch(TrainerCallback):
        """Time from the end of the second step to the end of the last: set-up and warm-up left out."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.began = time.perf_counter()
            self.seconds = (
                (time.perf_counter() - self.began) / max(state.global_step - 2, 1) if state.global_step > 2 else 0
            )

    def rewarm(data: Any) -> Any:
        return RewarmCallback(3e-3, warmup=2)

    def replay(data: Any) -> Any:
        return ReplayCallback(data, ratio=0.05)

    def forgetting(data: Any) -> Any:
        # Probes, which are forward passes, at the start and the end only: what is left is the plug-in's own.
        return ForgettingCallback({"old": data.select(range(16))}, every=steps, first_steps="sparse")

    def projected(data: Any) -> Any:
        return GradNormLoRPCallback(rank=32)

    arms: dict[str, list[Callable[[Any], Any]] | None] = {
        "bare": None,
        "extend alone": [],
        "re-warm": [rewarm],
        "replay": [replay],
        "forgetting, probes apart": [forgetting],
        "re-warm, replay, forgetting": [rewarm, replay, forgetting],
        "GradNormLoRP (for AdamW)": [projected],
    }

    def seconds(makers: list[Callable[[Any], Any]] | None, folder: str) -> float:
        watch = Watch()
        trainer, data = _trainer(folder, steps, [], watch)
        trainer.remove_callback(PrinterCallback)
        if makers is not None:
            extend(trainer, *(make(data) for make in makers))
        trainer.train()
        return watch.seconds

    times: dict[str, list[float]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(pairs + 1):
            # The order alternates, so that a drift of the machine favours none.
            for name in list(arms)[:: 1 if turn % 2 else -1]:
                took = seconds(arms[name], folder)
                if turn:
                    times[name].append(took)
    found: dict[str, Any] = {"tokens/s bare": round(2048 / statistics.median(times["bare"])), "rounds": pairs}
    generator = np.random.default_rng(0)
    for name in list(arms)[1:]:
        ratios = np.array(times[name]) / np.array(times["bare"])
        medians = np.median(generator.choice(ratios, (10_000, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        found[name] = f"{np.median(ratios):.3f} of a bare step (95 % interval {low:.3f} to {high:.3f})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a measurement")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    os.environ["HF_PRETRAIN_EXT_VERBOSITY"] = "error"
    results = {
        "million draws/s": draws_per_second(),
        "million draws/s, shares in tokens": token_draws_per_second(),
        "skipping, s": skipping_seconds(),
        "import, s": import_seconds(),
        "throughput": throughput(options.pairs, options.steps),
    }
    for section, figures in results.items():
        print(section)
        for name, value in figures.items():
            print(f"  {name:<40} {value}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
