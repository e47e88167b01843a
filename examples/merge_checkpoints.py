"""After continued pre-training: choose how much of what was learned to keep, block by block (LiNeS), and merge

    python examples/merge_checkpoints.py --base BASE --tuned out --old old.jsonl --new new.jsonl --output_dir merged

Without --base and --tuned it makes two toys first: a small model of English prose, trained further on Python sources.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.merging import lines, lines_state_dict


@dataclass
class ScriptArguments:
    output_dir: str = field(metadata={"help": "Folder for the merged model, and for the toys."})
    base: str | None = field(default=None, metadata={"help": "The model before: a name on the Hub, or a folder."})
    tuned: str | None = field(default=None, metadata={"help": "The model after continued pre-training."})
    old: str | None = field(default=None, metadata={"help": "JSONL file with held-out texts of what it knew before."})
    new: str | None = field(default=None, metadata={"help": "JSONL file with held-out texts of what it has learned."})
    alphas: list[float] = field(default_factory=lambda: [1.0, 0.75, 0.5, 0.25, 0.0], metadata={"help": "To try."})
    new_weight: float = field(default=2.0, metadata={"help": "Of the new loss in the choice, against 1 of the old."})


def texts_of(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text("utf-8").splitlines()]


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: list[Tensor]) -> float:
    """Mean loss a token, over rows of token ids."""
    losses = [(float(model(input_ids=row[None], labels=row[None]).loss), len(row) - 1) for row in rows]
    return sum(loss * number for loss, number in losses) / sum(number for _, number in losses)


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    if script.base is None:
        make_toys(script)
    tokenizer = AutoTokenizer.from_pretrained(script.base)
    held_out = {
        name: [torch.tensor(tokenizer(text)["input_ids"][:256]) for text in texts_of(path)]
        for name, path in (("old", script.old), ("new", script.new))
    }
    model = AutoModelForCausalLM.from_pretrained(script.base, dtype=torch.float32).eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = AutoModelForCausalLM.from_pretrained(script.tuned, dtype=torch.float32).state_dict()

    print("alpha    old    new   chosen by")
    scores = {}
    for alpha in script.alphas:
        # In memory, from state dicts: what a small model or a search needs.
        model.load_state_dict(lines_state_dict(base, tuned, alpha))
        old, new = (loss_of(model, held_out[name]) for name in ("old", "new"))
        scores[alpha] = (old + script.new_weight * new) / (1 + script.new_weight)
        print(f"{alpha:5.2f}  {old:5.3f}  {new:5.3f}  {scores[alpha]:10.3f}")
    best = min(scores, key=lambda alpha: scores[alpha])
    # From folder to folder, in memory that does not grow with the model.
    output = lines(script.base, script.tuned, alpha=best, output=Path(script.output_dir) / "merged")
    print(f"alpha {best} in {output}")


def make_toys(script: ScriptArguments) -> None:
    """A tiny model that learns prose, and what becomes of it on Python sources; texts held out of both."""
    prose = list(pydoc_data.topics.topics.values())
    sources = [inspect.getsource(value) for value in vars(argparse).values() if inspect.isclass(value)]
    tokenizer = train_tokenizer([*prose[:20], *sources], 500)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4, tie_word_embeddings=True))
    folder = Path(script.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts, rate in (("old", prose[:20], 1e-2), ("new", sources, 3e-3)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[-4:]), "utf-8")
        setattr(script, name, str(path))
        rows = torch.tensor([token for text in texts[:-4] for token in tokenizer(text)["input_ids"]])
        rows = rows[: len(rows) // 64 * 64].view(-1, 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        for step in range(60):
            batch = rows[torch.arange(step * 8, step * 8 + 8) % len(rows)]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        place = folder / {"old": "base", "new": "tuned"}[name]
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    script.base, script.tuned = str(folder / "base"), str(folder / "tuned")


if __name__ == "__main__":
    main()
