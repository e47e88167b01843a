"""Train a small model with meta-tokens and meta-attention on real text, then load it again and let it write.

    python examples/meta_tokens.py [--output_dir out] [--max_steps 120]

About a minute on two CPU cores. The text is the language reference that comes with Python; take your own model in
place of the small one (`AutoModelForCausalLM.from_pretrained`): meta-attention starts as nothing, so nothing is lost.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pretrain_ext import PackedCollator, extend, pack
from hf_pretrain_ext.callbacks import ForgettingCallback, MetaTokensCallback
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.meta_tokens import generate, load_meta_tokens
from hf_pretrain_ext.meta_tokens.rows import with_meta_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/meta_tokens")
    parser.add_argument("--max_steps", type=int, default=120)
    arguments = parser.parse_args()

    texts = list(pydoc_data.topics.topics.values())
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    blocks = pack(Dataset.from_dict({"text": texts[10:]}), tokenizer, block_size=128)
    held_out = pack(Dataset.from_dict({"text": texts[:10]}), tokenizer, block_size=128)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            arguments.output_dir,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=20,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=blocks,
        processing_class=tokenizer,
        data_collator=PackedCollator(),
        callbacks=[
            # From scratch, meta-attention may as well begin like the other layers ("init"); leave it out for a model
            # that is trained already.
            MetaTokensCallback(fraction=0.1, meta_attention={"init": "normal"}),
            # Evaluation data stays as it is; here it is read both without and with meta-tokens.
            ForgettingCallback(
                {"plain": held_out, "inserted": with_meta_tokens(held_out, tokenizer, fraction=0.1)},
                first_steps="sparse",
                every=0.25,
            ),
        ],
    )
    extend(trainer).train()
    trainer.save_model()

    # from_pretrained leaves meta-attention out, with a warning; load_meta_tokens puts it in.
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    load_meta_tokens(model, arguments.output_dir)
    # One meta-token behind every tenth token of the prompt; the model writes none itself.
    set_seed(0)
    print(repr(generate(model, tokenizer, "The statement is ", every=10, max_new_tokens=40, do_sample=True)))


if __name__ == "__main__":
    main()
