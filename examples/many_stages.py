"""A model's life in three stages: prose, Python, tables of characters; then a branch to deploy.

    python examples/many_stages.py --output_dir runs/life

The rate is warmed up once and then held. Every later stage goes on at the constant rate, replays all that was read
before, and measures what is forgotten of the whole life; the annealing branch leaves the last stage as it is. Text and
model are what Python itself brings along and what a CPU trains in a minute: put your own in their place.
"""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_pretrain_ext import PackedCollator, anneal, continue_from, extend, pack, read_stages
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer


@dataclass
class ScriptArguments:
    output_dir: str = field(default="runs/life", metadata={"help": "Where each stage gets a folder."})
    steps: int = field(default=50, metadata={"help": "Optimizer steps a stage."})
    replay_ratio: float = field(default=0.25, metadata={"help": "Replayed samples out of all, from the second stage."})


def corpora() -> dict[str, list[str]]:
    library = Path(pydoc_data.topics.__file__).parents[1]
    return {
        "prose": list(pydoc_data.topics.topics.values()),
        "code": [path.read_text("utf-8") for path in sorted(library.glob("asyncio/*.py"))],
        "tables": [path.read_text("utf-8") for path in sorted(library.glob("encodings/cp*.py"))],
    }


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    folder, texts = Path(script.output_dir), corpora()
    tokenizer = train_tokenizer([text for documents in texts.values() for text in documents[:20]], 1000)

    rows, held_out = {}, {}
    for name, documents in texts.items():
        texts_held_out = datasets.Dataset.from_dict({"text": documents[::10]})  # whole documents
        texts_read = datasets.Dataset.from_dict({"text": [t for n, t in enumerate(documents) if n % 10]})
        held_out[name] = pack(texts_held_out, tokenizer, block_size=64)
        # On disk: later stages open the rows of earlier ones from there.
        pack(texts_read, tokenizer, block_size=64).save_to_disk(str(folder / "rows" / name))
        rows[name] = datasets.load_from_disk(str(folder / "rows" / name))

    def trainer(name: str, data: datasets.Dataset, replays: bool) -> Trainer:
        set_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        return Trainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size)),
            args=TrainingArguments(
                str(folder / name),
                max_steps=script.steps,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                save_strategy="steps",
                save_steps=script.steps,
                logging_steps=script.steps,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=data,
            data_collator=PackedCollator(),
            processing_class=tokenizer,
            callbacks=[
                # One schedule for the whole life: in the second stage it goes on where it stood.
                RewarmCallback(
                    3e-3,
                    schedule="infinite_cosine",
                    warmup=0.05,
                    cooldown=script.steps // 2,
                    constant=4 * script.steps,
                    total_steps=5 * script.steps,
                ),
                *([ReplayCallback(from_history=True, ratio=script.replay_ratio)] if replays else []),
                ForgettingCallback(held_out, every=0.25, first_steps="sparse", max_samples=48),
            ],
        )

    before = None
    for name in texts:
        stage = trainer(name, rows[name], replays=before is not None)
        stage = extend(stage) if before is None else continue_from(stage, before, name=name)
        stage.train()
        before = str(folder / name / f"checkpoint-{script.steps}")

    branch = trainer("deploy", rows["tables"], replays=True)
    anneal(branch, before, steps=max(script.steps // 4, 1)).train()
    branch.save_model()

    for stage in read_stages(folder / "deploy"):
        losses = {name: round(entry["last"], 3) for name, entry in stage.recorded["forgetting"].items()}
        shares = {source.name: f"{source.tokens / stage.tokens:.1%}" for source in stage.sources}
        print(f"{stage.number} {stage.name} ({stage.kind}): read {shares}, rate {stage.rate:.2e}, losses {losses}")


if __name__ == "__main__":
    main()
