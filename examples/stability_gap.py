"""A subset of proper size and quality, several passes over it, old sources at their old rate (Guo et al., 2024).

    python examples/stability_gap.py --output_dir runs/stability_gap

Real text, a Llama of 0.2M parameters, about a minute on a CPU. English prose of two sources is what the model
knows; Python modules are new. Two stages of equally many tokens start from the same weights: one pass over modules as
they come, and four passes over the best of them beside the old sources. `subset.jsonl`, `topics.jsonl`,
`docstrings.jsonl`, `held_out.jsonl` and the model in `base` are what `examples/stability_gap.yaml` reads:

    hf-pretrain-ext train examples/stability_gap.yaml
"""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_pretrain_ext import PackedCollator, extend, pack
from hf_pretrain_ext.advice import stability_gap
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.quality import PerplexityScorer, score_texts, select_best

REFERENCE = ("dataclasses", "statistics", "pathlib", "argparse", "textwrap", "string")
"""Modules of the quality that is wanted; the scorer learns from these and they are not trained on."""

BLOCK, BATCH, PEAK = 128, 8, 3e-3


@dataclass
class ScriptArguments:
    output_dir: str = field(default="runs/stability_gap", metadata={"help": "Folder of what is written."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps of a stage, of 1,024 tokens each."})
    seed: int = field(default=0, metadata={"help": "Of weights and data order."})


def modules() -> dict[str, str]:
    """Sources of the standard library by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = {path.stem: path.read_text("utf-8", errors="ignore") for path in sorted(folder.glob("[a-z]*.py"))}
    return {name: text for name, text in texts.items() if 2_000 < len(text) < 25_000}


def docstrings(sources: dict[str, str]) -> list[str]:
    found = []
    for text in sources.values():
        tree = ast.parse(text)
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        said = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)) and " " in doc)
        found += [said] if len(said) > 400 else []
    return found


def train(model, folder, data, steps, seed, *plugins, **settings):
    """One stage on packed rows, through the plug-ins; returns the Trainer."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=PEAK,
        weight_decay=0.01,
        adam_beta2=0.95,
        report_to=[],
        save_strategy="no",
        logging_steps=20,
        disable_tqdm=True,
        seed=seed,
        **settings,
    )
    callbacks = [RewarmCallback(peak_lr=PEAK, warmup=0.1), *plugins]
    trainer = extend(Trainer(model, args, PackedCollator(), data, callbacks=callbacks))
    trainer.train()
    return trainer


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    output, seed = Path(script.output_dir), script.seed
    output.mkdir(parents=True, exist_ok=True)

    sources = modules()
    reference = [sources.pop(name) for name in REFERENCE if name in sources]
    for name in list(sources)[::3]:
        del sources[name]  # a third is prose's: its docstrings are old, its code is trained on nowhere
    prose = docstrings({name: text for name, text in modules().items() if name not in sources})
    topics = [text for text in pydoc_data.topics.topics.values() if len(text) > 400]
    held_out = [*topics[::10], *prose[::10]]
    old = {
        "topics": [t for n, t in enumerate(topics) if n % 10],
        "docstrings": [t for n, t in enumerate(prose) if n % 10],
    }
    candidates = Dataset.from_dict({"name": list(sources), "text": list(sources.values())})

    tokenizer = train_tokenizer([*topics[::4], *prose[::4], *reference], 1024)
    packed = {name: pack(Dataset.from_dict({"text": texts}), tokenizer, BLOCK) for name, texts in old.items()}
    probes = {"old": pack(Dataset.from_dict({"text": held_out}), tokenizer, BLOCK)}

    def fresh() -> LlamaForCausalLM:
        set_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=BLOCK, tie_word_embeddings=True, **sizes
        )
        return LlamaForCausalLM(config)

    print("1. the base model: English prose alone, topics and docstrings two to one")
    mixture = {"topics": 2.0, "docstrings": 1.0}
    base = train(
        fresh(),
        output / "base_run",
        packed["topics"],
        2 * script.steps,
        seed,
        ReplayCallback({"docstrings": packed["docstrings"]}, ratio=1 / 3),
    ).model
    base.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")

    print("2. the subset: as large as advised, the best by a small model of the reference modules")
    lengths = [len(ids) for ids in tokenizer(list(candidates["text"]), verbose=False)["input_ids"]]
    budget = script.steps * BATCH * BLOCK
    advice = stability_gap(budget, corpus_tokens=sum(lengths))
    print(advice)
    rows = pack(Dataset.from_dict({"text": reference}), tokenizer, BLOCK)
    judge = train(fresh(), output / "judge_run", rows, script.steps, seed).model
    scores = score_texts(candidates, PerplexityScorer(judge, tokenizer, max_tokens=BLOCK))
    chosen = select_best(scores, tokens=advice.subset_tokens, lengths=lengths)
    subset = candidates.select(chosen)
    print(f"{len(chosen)} of {len(candidates)} modules: {', '.join(subset['name'][:8])}, ...")
    for name, texts in (*old.items(), ("subset", list(subset["text"])), ("held_out", held_out)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (output / f"{name}.jsonl").write_text("".join(lines), "utf-8")

    print("3. two stages from the base, of the same number of tokens")

    def stage(name: str, data, *plugins) -> dict[str, float]:
        model = LlamaForCausalLM.from_pretrained(output / "base")
        watch = ForgettingCallback(probes, max_samples=24)
        trained = train(model, output / name, data, script.steps, seed, watch, *plugins)
        return trained.plugin_run.owner("eval_metrics").history.summary()["old"]

    # The sources of a plan go on from pass to pass: old rows are others in every pass over the subset.
    replay = ReplayCallback(packed, ratio=advice.old_share, mode="additional", weights=mixture)
    plain = pack(candidates, tokenizer, BLOCK)
    recipe = pack(subset, tokenizer, BLOCK)
    results = {"one pass over all": stage("plain", plain), "subset, old rate": stage("recipe", recipe, replay)}
    (output / "results.json").write_text(json.dumps(results, indent=1), "utf-8")
    for name, figures in results.items():
        print(name, {key: figures[key] for key in ("gap_depth", "forgetting") if key in figures})


if __name__ == "__main__":
    main()
