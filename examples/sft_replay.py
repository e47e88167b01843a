"""Fine-tune with TRL while every step replays some old data, and see what is forgotten meanwhile.

    python examples/sft_replay.py --model_name_or_path MODEL --new new.jsonl --old old.jsonl \
        --held_out held_out.jsonl --output_dir out --learning_rate 2e-5 --num_train_epochs 1

Texts are packed (`bfd`); `--packing False` or `--packing_strategy wrapped` do otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Model and tokenizer: a name on the Hub, or a folder."})
    new: list[str] = field(metadata={"help": "JSONL to learn: text, messages, or prompt and completion."})
    old: list[str] = field(metadata={"help": "JSONL to replay, like what the model was trained on before."})
    held_out: list[str] = field(metadata={"help": "Old JSONL that is trained on nowhere, to measure forgetting."})
    replay_ratio: float = field(default=0.05, metadata={"help": "Replayed samples out of all samples."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, SFTConfig))
    parser.set_defaults(packing=True)
    script, args = parser.parse_args_into_dataclasses()

    trainer = SFTTrainer(
        model=script.model_name_or_path,
        args=args,
        # TRL writes the end of a text, and of a turn, as text: its tokenizer must read control tokens out of text.
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path, split_special_tokens=False),
        train_dataset=load_dataset("json", data_files=script.new, split="train"),
        callbacks=[
            RewarmCallback(peak_lr=args.learning_rate),
            # Raw, like the training data: the trainer tokenizes, truncates and packs it as its own.
            ReplayCallback(load_dataset("json", data_files=script.old, split="train"), ratio=script.replay_ratio),
            ForgettingCallback({"old": load_dataset("json", data_files=script.held_out, split="train")}),
        ],
    )
    extend(trainer).train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
