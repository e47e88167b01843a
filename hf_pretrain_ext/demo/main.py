"""The main job on real text: a small model, pre-trained on one domain, goes on to another in several arms.

The arms differ only in plug-ins; the report says what each learned and what it forgot. Here is the quick scale; the
full one, with more arms, seeds and intervals, is [`hf_pretrain_ext.demo.study`] and trains with the functions below.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_pretrain_ext import TrainerPlugin, extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.corpora import Corpus, english_prose, new_domain
from hf_pretrain_ext.demo.precision import fast_bf16
from hf_pretrain_ext.demo.tokenizer import blocks, encode_documents, train_tokenizer
from hf_pretrain_ext.hub_card import write_card
from hf_pretrain_ext.report.plots import forgetting_plot, have_matplotlib
from hf_pretrain_ext.say import say
from hf_pretrain_ext.trace import versions

__all__ = ["DemoConfig", "Domain", "build_model", "load_domains", "pretrain", "run_demo", "train_arm"]

MAX_SEEDS = 10


@dataclass
class DemoConfig:
    """Settings of the demo, readable by `HfArgumentParser`. The defaults train 1.7 million parameters."""

    scale: Literal["quick", "full"] = field(
        default="quick",
        metadata={
            "help": "quick: four arms, one seed; full: the ratios of a paper's table, seeds, intervals, an hour."
        },
    )
    output: str = field(default="demo_output", metadata={"help": "Folder for the results."})
    domain: Literal["auto", "python", "german"] = field(
        default="auto",
        metadata={"help": "New domain: Python sources, or German manual pages (auto: where they are installed)."},
    )
    pretrain_steps: int = field(default=1_000, metadata={"help": "Optimizer steps on the old domain."})
    steps: int = field(default=500, metadata={"help": "Optimizer steps on the new domain, in every arm."})
    batch_size: int = field(default=16, metadata={"help": "Blocks an optimizer step."})
    block_size: int = field(default=128, metadata={"help": "Tokens a block."})
    vocabulary: int = field(default=2_048, metadata={"help": "Tokens of the byte-level BPE tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the model."})
    layers: int = field(default=3, metadata={"help": "Decoder layers."})
    peak_lr: float = field(default=3e-3, metadata={"help": "Peak learning rate, of pre-training and of re-warming."})
    heldout_rows: int = field(default=64, metadata={"help": "Blocks of each held-out set that a probe reads."})
    seed: int = field(default=0, metadata={"help": "Seed of models and plans; of the full scale, the first one."})
    seeds: int = field(default=3, metadata={"help": "Seeds of the full scale, from `seed` on."})
    limit: int | None = field(default=None, metadata={"help": "Files a corpus, for quick looks; all by default."})

    def __post_init__(self) -> None:
        if self.scale not in ("quick", "full"):
            raise ValueError(f"scale must be 'quick' or 'full', got {self.scale!r}")
        if not 2 <= self.seeds <= MAX_SEEDS:
            raise ValueError(f"seeds must be 2 to {MAX_SEEDS}: an interval needs two; got {self.seeds!r}")


@dataclass
class Domain:
    """A corpus as blocks of token ids."""

    corpus: Corpus
    train: Dataset
    heldout: Dataset


class _Bar(ProgressCallback):
    """The host's progress bar without a line of numbers at every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        return None


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo into `config.output`, at the scale of `config.scale`, and returns what `results.json` holds."""
    if config.scale == "full":
        from hf_pretrain_ext.demo.study import run_study  # here: the study is built from this module's functions

        return run_study(config)
    return run_quick(config)


def run_quick(config: DemoConfig) -> dict[str, Any]:
    """Four arms of one seed.

    Writes `report.html`, `results.json`, `table.md`, `forgetting.json` and `forgetting.png` (all arms), a folder an
    arm with its own `forgetting.json`, `trace.jsonl` and plot, and the adapted model, its tokenizer and card in
    `model/`.
    """
    began = time.perf_counter()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, old, new = load_domains(config, folder)
    base, base_lr = pretrain(config, folder / "base", old, tokenizer)
    arms: dict[str, Callable[[], list[TrainerPlugin]]] = {
        "constant": list,
        "re-warm": lambda: [RewarmCallback(config.peak_lr)],
        "re-warm + 5 % replay": lambda: [RewarmCallback(config.peak_lr), ReplayCallback(old.train, ratio=0.05)],
        "re-warm + 25 % replay": lambda: [RewarmCallback(config.peak_lr), ReplayCallback(old.train, ratio=0.25)],
    }
    rows = []
    for number, (label, plugins) in enumerate(arms.items(), start=1):
        say(f"arm {number} of {len(arms)}: {label}")
        output = folder / "arms" / "".join(c if c.isalnum() else "-" for c in label).strip("-").replace("---", "-")
        model = AutoModelForCausalLM.from_pretrained(base)
        # The arm without plug-ins goes on at the rate that the pre-training ended with.
        made = plugins()
        figures = train_arm(config, output, model, made, (old, new), lr=config.peak_lr if made else base_lr)
        model.save_pretrained(output / "model")
        rows.append({"arm": label, "folder": output.relative_to(folder).as_posix(), **figures})
        del model
        gc.collect()
    best = min(rows[1:], key=lambda row: row["mean"])
    _keep(folder, best, tokenizer)
    results = {
        "config": asdict(config),
        "versions": versions(),
        "bf16": fast_bf16(),
        "old": old.corpus.description,
        "new": new.corpus.description,
        "tokens": {"old": old.train.num_rows * config.block_size, "new": new.train.num_rows * config.block_size},
        "before": {"old": rows[0]["old_before"], "new": rows[0]["new_before"]},
        "arms": rows,
        "kept": best["arm"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    _write(folder, results)
    return results


def load_domains(config: DemoConfig, folder: Path) -> tuple[PreTrainedTokenizerFast, Domain, Domain]:
    """A tokenizer made from the old domain, and the old and the new domain in its tokens."""
    cache = folder / "cache"
    say("reading the old domain: English prose")
    old = english_prose(cache, config.limit)
    new = new_domain(config.domain, cache, config.limit)
    say(f"the new domain: {new.description}")
    tokenizer = train_tokenizer((document.text for document in old.train), config.vocabulary)

    def cut(corpus: Corpus) -> Domain:
        train = blocks(encode_documents(tokenizer, [d.text for d in corpus.train]), config.block_size)
        heldout = blocks(encode_documents(tokenizer, [d.text for d in corpus.heldout]), config.block_size)
        return Domain(corpus, train, heldout)

    return tokenizer, cut(old), cut(new)


def _arguments(config: DemoConfig, output: Path, steps: int, lr: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        bf16=fast_bf16(),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )


def _trainer(arguments: TrainingArguments, model: Any, train: Dataset, plugins: list[Any]) -> Any:
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=default_data_collator)
    trainer.remove_callback(ProgressCallback)
    return extend(trainer, _Bar(), *plugins)


def build_model(config: DemoConfig, vocabulary: int, end: int | None) -> LlamaForCausalLM:
    """A small Llama, initialised by `config.seed`, for `vocabulary` tokens of which `end` ends a document."""
    set_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=8 * config.hidden_size // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=max(config.hidden_size // 64, 1),
            max_position_embeddings=config.block_size,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
        )
    )


def pretrain(config: DemoConfig, output: Path, old: Domain, tokenizer: Any) -> tuple[Path, float]:
    """The base model's folder, in `output`, and the learning rate that its pre-training ended with."""
    model = build_model(config, len(tokenizer), tokenizer.eos_token_id)
    say(f"pre-training {model.num_parameters():,} parameters on the old domain for {config.pretrain_steps:,} steps")
    (output / "trace.jsonl").unlink(missing_ok=True)
    arguments = _arguments(config, output, config.pretrain_steps, config.peak_lr)
    trainer = _trainer(arguments, model, old.train, [RewarmCallback(config.peak_lr)])
    trainer.train()
    trainer.save_model(str(output / "model"))
    schedule = trainer.plugin_run.lr_schedule
    return output / "model", schedule(config.pretrain_steps)


def train_arm(
    config: DemoConfig,
    output: Path,
    model: Any,
    plugins: list[TrainerPlugin],
    domains: tuple[Domain, Domain],
    *,
    lr: float,
    steps: int | None = None,
    first_steps: str = "dense",
) -> dict[str, Any]:
    """Trains `model` on the new one of `domains` (old, new) with `plugins`, and measures it on both.

    Args:
        output (`Path`): folder for the trace and the figures; an earlier trace there is removed.
        steps (`int`, *optional*, defaults to `config.steps`): optimizer steps.
        first_steps (`str`, *optional*, defaults to `"dense"`): as of [`ForgettingCallback`].
    """
    old, new = domains
    steps = config.steps if steps is None else steps
    (output / "trace.jsonl").unlink(missing_ok=True)
    sets = {"old": old.heldout, "new": new.heldout}
    probe = ForgettingCallback(sets, every=0.1, first_steps=first_steps, max_samples=config.heldout_rows)
    trainer = _trainer(_arguments(config, output, steps, lr), model, new.train, [probe, *plugins])
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    figures: dict[str, Any] = probe.history.summary()
    final = {name: figures[name]["final"] for name in ("old", "new")}
    if not all(math.isfinite(loss) for loss in final.values()):
        raise FloatingPointError(f"{output} ended with a loss that is not finite: {final}")
    return {
        **final,
        "mean": (final["old"] + final["new"]) / 2,
        "old_before": figures["old"]["initial"],
        "new_before": figures["new"]["initial"],
        "gap_depth": figures["old"]["gap_depth"],
        "tokens": steps * config.batch_size * config.block_size,
        "counts": trainer.plugin_run.realised(),
        "seconds": round(seconds, 1),
        "forgetting": probe.history.to_json(),
    }


def _keep(folder: Path, row: dict[str, Any], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / row["folder"] / "model")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    try:
        write_card(folder / row["folder"], output=folder / "model" / "README.md", model_name="hf-pretrain-ext-demo")
    except ImportError as error:
        say(f"no card: {error}")


def write_page(folder: Path, runs: dict[str, str]) -> None:
    """`report.html`: the runs side by side, folders below `folder` by label; without the extra, a line says so."""
    from hf_pretrain_ext.report.html import report

    try:
        report([folder / run for run in runs.values()], folder / "report.html", list(runs))
    except ImportError as error:
        say(f"no report.html: {error}")


LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
prompt = tokenizer("The file", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]))
"""


def table(results: dict[str, Any]) -> list[str]:
    """The results as a Markdown table, losses in nats a token."""
    lines = [
        "| arm | old loss | new loss | mean | deepest gap (old) | tokens | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    before = results["before"]
    mean = (before["old"] + before["new"]) / 2
    lines.append(f"| before | {before['old']:.3f} | {before['new']:.3f} | {mean:.3f} | | | |")
    for row in results["arms"]:
        lines.append(
            f"| {row['arm']} | {row['old']:.3f} | {row['new']:.3f} | {row['mean']:.3f} | {row['gap_depth']:.3f} | "
            f"{row['tokens']:,} | {row['seconds']:.0f} |"
        )
    return lines


def _write(folder: Path, results: dict[str, Any]) -> None:
    histories = {row["arm"]: row.pop("forgetting") for row in results["arms"]}
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "forgetting.json").write_text(json.dumps(histories, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = table(results)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if have_matplotlib():
        forgetting_plot(histories, folder / "forgetting.png", title=f"{results['new']}")
    write_page(folder, {row["arm"]: row["folder"] for row in results["arms"]})
    loading = LOADING.format(folder=folder / "model")
    (folder / "load.py").write_text(loading, encoding="utf-8")
    print("\n" + "\n".join(lines))
    print(f"\nheld-out losses in nats per token; {results['seconds']:.0f} s in all")
    print(f"results in {folder}/: report.html (open it in a browser), table.md, forgetting.png, results.json")
    print(f"the arm kept in {folder}/model, with its card: {results['kept']}. To load it:\n\n{loading}")
