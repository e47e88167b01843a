"""Continue the pre-training of a causal language model on new text, and see what it forgets meanwhile.

    python examples/continual_pretraining.py --model_name_or_path MODEL --new new.jsonl --old old.jsonl \
        --held_out held_out.jsonl --output_dir out --learning_rate 3e-4 --num_train_epochs 1 --bf16
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Model and tokenizer: a name on the Hub, or a folder."})
    new: list[str] = field(metadata={"help": "Files to learn: .txt (a document each), or JSONL with a column text."})
    old: list[str] = field(metadata={"help": "Files to replay, like what the model was trained on before."})
    held_out: list[str] = field(metadata={"help": "Old files that are trained on nowhere, to measure forgetting."})
    replay_ratio: float = field(default=0.05, metadata={"help": "Replayed samples out of all samples."})
    block_size: int = field(default=1024, metadata={"help": "Tokens a sample."})


def load_blocks(files, tokenizer, block_size):
    """Documents, each closed by the end-of-text token, joined and cut into blocks of one length."""
    if files[0].endswith(".txt"):
        texts = load_dataset("text", data_files=files, split="train", sample_by="document")
    else:
        texts = load_dataset("json", data_files=files, split="train")

    def cut(batch):
        # split_special_tokens: a document that quotes "<|endoftext|>" gets ordinary tokens for it.
        documents = tokenizer(batch["text"], split_special_tokens=True, verbose=False)["input_ids"]
        ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
        rows = [ids[at : at + block_size] for at in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": rows, "labels": rows}

    return texts.map(cut, batched=True, remove_columns=texts.column_names)


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    old = load_blocks(script.old, tokenizer, script.block_size)
    held_out = load_blocks(script.held_out, tokenizer, script.block_size)

    trainer = Trainer(
        # Weights in float32 even where they are stored in bfloat16, which would round small updates away.
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32"),
        args=args,
        train_dataset=load_blocks(script.new, tokenizer, script.block_size),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[
            RewarmCallback(peak_lr=args.learning_rate),
            ReplayCallback(old, ratio=script.replay_ratio),
            ForgettingCallback({"old": held_out}),
        ],
    )
    extend(trainer).train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
