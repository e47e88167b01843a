"""What the notebooks run on under `HPE_SMOKE=1`: a tiny model and texts that Python brings along; no network.

On Colab nothing of this is used. Texts are JSONL files that `load_dataset` reads as it reads data sets from the Hub,
and the model is a folder, so that the notebooks differ in names and sizes alone.
"""

from __future__ import annotations

import itertools
import json
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_pretrain_ext.demo.tokenizer import encode_documents, train_tokenizer

LENGTH, WIDTH, ROWS, STEPS = 1_500, 48, 16, 80


def make(folder: str, *names: str) -> list:
    """The model's folder, and arguments of `load_dataset` for each of `names`: old, new, later, web.

    old: Python's help texts, on which the model was trained for a moment; new: sources of its standard library;
    later: its tables of characters; web: old and new in turn. Every document has a `text` and a `url`.
    """
    place = Path(folder)
    if not (place / "model" / "config.json").is_file():
        texts = {name: list(_documents(name)) for name in ("old", "new", "later")}
        texts["web"] = list(itertools.chain.from_iterable(zip(texts["old"], texts["new"], strict=False)))
        place.mkdir(parents=True, exist_ok=True)
        for name, documents in texts.items():
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), "utf-8")
        _train([row["text"] for row in texts["old"]], place / "model")
    return [str(place / "model"), *({"path": "json", "data_files": str(place / f"{name}.jsonl")} for name in names)]


def _documents(name: str) -> Iterable[dict[str, str]]:
    library = Path(pydoc_data.topics.__file__).parents[1]
    if name == "old":
        for topic, text in sorted(pydoc_data.topics.topics.items()):
            yield {"text": text[:LENGTH], "url": f"https://docs.python.org/3/reference/{topic}.html"}
        return
    for path in sorted(library.glob({"new": "[a-s]*.py", "later": "encodings/cp*.py"}[name])):
        text = path.read_text("utf-8")[-LENGTH:]
        yield {"text": text, "url": f"https://github.com/python/cpython/blob/main/Lib/{path.name}"}


def _train(texts: list[str], place: Path) -> None:
    tokenizer = train_tokenizer(texts, 600)
    stream = torch.tensor(list(itertools.chain.from_iterable(encode_documents(tokenizer, texts))))
    rows = stream[: len(stream) // 64 * 64].view(-1, 64)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS) + 3e-4  # it ends low, as a pre-training does
        batch = rows[torch.randint(len(rows), (ROWS,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
