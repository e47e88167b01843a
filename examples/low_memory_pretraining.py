"""Continue the pre-training of all weights in little memory: bfloat16 weights, 8-bit projected Adam, no gradients kept

    python examples/low_memory_pretraining.py --model_name_or_path MODEL --texts new.jsonl --rank 1024 \
        --output_dir out --learning_rate 1e-3 --max_grad_norm 0 --gradient_checkpointing --bf16
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_pretrain_ext import PackedCollator, extend, pack
from hf_pretrain_ext.callbacks import GradNormLoRPCallback, RewarmCallback


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Model and tokenizer: a name on the Hub, or a folder."})
    texts: list[str] = field(metadata={"help": "JSONL files to learn, with a column text."})
    rank: int = field(metadata={"help": "Dimensions of the gradient's subspace: a quarter of the hidden size, say."})
    block_size: int = field(default=1024, metadata={"help": "Tokens a sample."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    texts = load_dataset("json", data_files=script.texts, split="train")

    trainer = Trainer(
        # Half the bytes of float32: the optimizer rounds stochastically, so that small updates are not lost.
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="bfloat16"),
        args=args,
        train_dataset=pack(texts, tokenizer, block_size=script.block_size),
        processing_class=tokenizer,
        data_collator=PackedCollator(),
        callbacks=[
            RewarmCallback(peak_lr=args.learning_rate),
            # Layer-wise: each gradient is used and freed inside backward. It needs --max_grad_norm 0.
            GradNormLoRPCallback(rank=script.rank, layerwise=True, max_matrix_norm=1.0),
        ],
    )
    extend(trainer).train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
