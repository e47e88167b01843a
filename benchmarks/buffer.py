"""What a replay buffer costs: seconds a step with and without `BufferCallback`, rows a second of the writer.

`python benchmarks/buffer.py [--pairs 24] [--steps 60] [--max_bytes "4 MB"] [--output FILE]` prints a table and writes
JSON. Ratios compare interleaved pairs in one run: the median of the pairs' ratios with a bootstrap 95 % interval, by
the clock and by the processor time of all threads, the writer's among them, which other work on the machine moves less
(with OMP_NUM_THREADS=1, so that no thread burns it in waiting).
A Llama of 1.3M parameters, 2,048 tokens a step, as in `benchmarks/overhead.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import overhead


def seconds(steps: int, max_bytes: str | None, workers: int) -> tuple[float, float]:
    """Of a step, by the clock and by the processor, from the end of the second to the end of training, with what the
    buffer does at its end."""
    from transformers import PrinterCallback, TrainerCallback

    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import BufferCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.began = time.perf_counter(), time.process_time()

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = overhead._trainer(folder, steps, [], watch)
        trainer.args.dataloader_num_workers = workers
        trainer.remove_callback(PrinterCallback)
        extend(trainer, *([] if max_bytes is None else [BufferCallback(max_bytes=max_bytes)]))
        trainer.train()
        wall, processor = (
            now - then for now, then in zip((time.perf_counter(), time.process_time()), watch.began, strict=True)
        )
        return wall / (steps - 2), processor / (steps - 2)


def compare(pairs: int, steps: int, max_bytes: str, workers: int) -> dict[str, Any]:
    """Pairs with and without, in turn first and second; the first pair warms up."""
    ratios: dict[str, list[float]] = {"by the clock": [], "by the processor": []}
    bare = []
    for turn in range(pairs + 1):
        arms = [None, max_bytes][:: 1 if turn % 2 else -1]
        took = {arm: seconds(steps, arm, workers) for arm in arms}
        if turn:
            bare.append(took[None][0])
            for found, ours, theirs in zip(ratios.values(), took[max_bytes], took[None], strict=True):
                found.append(ours / theirs)
    made: dict[str, Any] = {"ms a step without": round(1000 * statistics.median(bare), 2), "pairs": pairs}
    for name, found in ratios.items():
        drawn = np.random.default_rng(0).choice(found, (10_000, len(found)))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        made[f"ratio {name}"] = round(float(np.median(found)), 4)
        made[f"interval {name}"] = [round(float(low), 4), round(float(high), 4)]
    return made


def own_time(steps: int, max_bytes: str) -> dict[str, float]:
    """Shares of a run that go into the plug-in, timed inside so that noise cancels: of its time in the training
    thread, and of its processor time in the thread that writes, beside training."""
    from transformers import PrinterCallback

    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import BufferCallback, buffer
    from hf_pretrain_ext.callbacks.buffer import _Recording

    spent = dict.fromkeys(("see_batches", "on_step_end", "collate", "writer"), 0.0)

    def timed(function: Any, name: str, clock: Any = time.perf_counter) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += clock() - began

        return call

    served, store = _Recording._served, buffer._store
    _Recording._served = timed(served, "collate")  # type: ignore[method-assign]
    buffer._store = timed(store, "writer", time.thread_time)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plugin = BufferCallback(max_bytes=max_bytes)
            for name in ("see_batches", "on_step_end"):
                setattr(plugin, name, timed(getattr(plugin, name), name))
            trainer, _ = overhead._trainer(folder, steps, [], plugin)
            trainer.remove_callback(PrinterCallback)
            extend(trainer)
            began, used = time.perf_counter(), time.process_time()
            trainer.train()
            whole, used = time.perf_counter() - began, time.process_time() - used
    finally:
        _Recording._served, buffer._store = served, store  # type: ignore[method-assign]
    return {
        f"{name}, share of the run": round(value / (used if name == "writer" else whole), 5)
        for name, value in spent.items()
    }


def rows_per_second(rows: int = 40_000, tokens: int = 1024) -> dict[str, float]:
    """Rows of 1,024 tokens a second that the writer takes: while it fills, and once it keeps one in ten."""
    import pyarrow as pa

    from hf_pretrain_ext.buffer import BufferWriter

    ids = np.random.default_rng(0).integers(0, 32_000, rows * tokens, dtype=np.int32)
    offsets = np.arange(0, rows * tokens + 1, tokens, dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))})
    found = {}
    with tempfile.TemporaryDirectory() as folder, BufferWriter(folder, "60 MB") as writer:
        for name, (begin, end) in {"while it fills": (0, 9_000), "once it is full": (9_000, rows)}.items():
            began = time.perf_counter()
            for start in range(begin, end, 1000):
                writer.add(table.slice(start, 1000))
            found[name] = round((end - begin) / (time.perf_counter() - began))
        files = sum(path.stat().st_size for path in Path(folder).iterdir())
        found["bytes of its files over max_bytes"] = round(files / 60e6, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps a measurement")
    parser.add_argument("--max_bytes", default="1 MiB")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    os.environ["HF_PRETRAIN_EXT_VERBOSITY"] = "error"
    results = {
        "with over without": compare(options.pairs, options.steps, options.max_bytes, options.workers),
        "the plug-in's own time": own_time(max(options.steps, 40), options.max_bytes),
        "the plug-in's own time, of 1 GB": own_time(max(options.steps, 40), "1 GB"),
        "rows a second of the writer": rows_per_second(),
    }
    for section, figures in results.items():
        print(section)
        for name, value in figures.items():
            print(f"  {name:<40} {value}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
