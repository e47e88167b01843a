"""Texts that a model writes itself: samples of its own distribution, against its logits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from test_recipe import text
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_pretrain_ext import pack
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.recall import generate_texts

TOKENIZER = train_tokenizer(text(50, 0), vocab_size=300)
END = TOKENIZER.eos_token_id


def model(scale: float = 30.0) -> LlamaForCausalLM:
    """One whose distribution is far from flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight.mul_(scale)
    return made


def test_texts_are_draws_of_the_models_own_distribution() -> None:
    """The first token of 4,000 texts against the softmax; the model's own taste in sampling stands aside."""
    made = model()
    made.generation_config = taste = GenerationConfig(top_k=1, repetition_penalty=5.0, temperature=0.1, do_sample=True)
    texts = generate_texts(made, TOKENIZER, 4000, max_tokens=2, batch_size=500)["text"][:]
    with torch.no_grad():
        chances = made(torch.tensor([[END]])).logits[0, -1].softmax(-1).tolist()
    expected: Counter[str] = Counter()
    for token, chance in enumerate(chances):
        said = TOKENIZER.decode([token], skip_special_tokens=True)
        if said.strip():
            expected[said] += chance
    common = [word for word, _ in expected.most_common(12)]
    share = sum(expected.values())
    counts = Counter(texts)
    seen = [counts[word] for word in common]
    wanted = [expected[word] / share * len(texts) for word in common]
    rest, rest_wanted = len(texts) - sum(seen), len(texts) - sum(wanted)
    statistic = sum((o - e) ** 2 / e for o, e in zip([*seen, rest], [*wanted, rest_wanted], strict=True))
    # Of chi-square with 12 degrees of freedom, one draw in 10,000 is above.
    assert statistic < 39.1
    assert made.generation_config is taste


def test_at_a_temperature_of_nothing_it_is_what_argmax_says() -> None:
    """Prompts of three lengths in one batch, each continued by hand without a cache."""
    made, prompts = model(), ["the", "a longer beginning of it", "x"]
    found = generate_texts(made, TOKENIZER, 3, prompts=prompts, max_tokens=24, temperature=1e-4)
    for prompt, said, tokens in zip(prompts, found["text"][:], found["tokens"][:], strict=True):
        ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            while len(ids) < 24:
                ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == END:
                    ids.pop()
                    break
        assert said == TOKENIZER.decode(ids) and tokens == len(ids)


def test_a_text_ends_at_its_end_and_control_tokens_stay_text() -> None:
    made = model()
    with torch.no_grad():
        made.lm_head.weight.zero_()
        # Flat but for the end, which comes every third time or so.
        made.lm_head.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)))
        made.lm_head.bias[END] = float(torch.tensor(len(TOKENIZER) / 2.0).log())
    found = generate_texts(made, TOKENIZER, 200, prompts=[TOKENIZER.eos_token], max_tokens=64, batch_size=64)
    prompt = len(TOKENIZER(TOKENIZER.eos_token, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert prompt > 1 and all(said.startswith(TOKENIZER.eos_token) for said in found["text"][:])
    mean = sum(found["tokens"]) / 200 - prompt
    # A geometric distribution: n / 2 of n / 2 + n − 1.
    assert mean == pytest.approx(2, abs=0.6)


def test_prompts_of_unlike_lengths_stay_within_the_positions() -> None:
    """GPT-2 has a learned position for each place and none behind the last."""
    torch.manual_seed(0)
    made = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None)
    )
    made.generation_config.eos_token_id = made.config.eos_token_id = None
    with torch.no_grad():
        made.transformer.wte.weight[END] = 0  # seldom ends
    prompts = ["a", "zq" * 25, "something of a length between them"]
    found = generate_texts(made, TOKENIZER, 30, prompts=prompts, max_tokens=64)
    assert all(text.startswith(prompts[place % 3]) for place, text in enumerate(found["text"][:]))
    assert max(found["tokens"][:]) == 64


def test_a_configurations_own_default_is_no_beginning() -> None:
    """`LlamaConfig` says that BOS is token 1 unless told otherwise; here it is an ordinary sign."""
    made = model()
    told = generate_texts(made, TOKENIZER, 20, max_tokens=8)["text"][:]
    made.config.bos_token_id = 1
    assert 1 not in TOKENIZER.all_special_ids
    assert generate_texts(made, TOKENIZER, 20, max_tokens=8)["text"][:] == told


def test_nothing_else_is_changed() -> None:
    made = model().train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = generate_texts(made, TOKENIZER, 5, max_tokens=16)["text"][:]
    assert torch.equal(torch.rand(2), expected) and made.training
    assert first == generate_texts(made, TOKENIZER, 5, max_tokens=16)["text"][:]
    assert first != generate_texts(made, TOKENIZER, 5, max_tokens=16, seed=1)["text"][:]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_texts": 0}, "num_texts must be an integer from 1 on"),
        ({"max_tokens": 65}, "max_tokens=65 is more than the model has positions for, 64"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"top_p": 1.1}, "top_p must be a number above 0 and up to 1"),
        ({"prompts": "one text"}, "prompts must be texts, at least one"),
        ({"prompts": [""]}, "a prompt must have a token"),
        ({"prompts": ["word " * 80]}, "leave room in max_tokens=16"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate_texts(model(), TOKENIZER, **{"num_texts": 2, "max_tokens": 16, **given})


def test_what_cannot_be_begun() -> None:
    with pytest.raises(TypeError, match="model must be a causal language model that generates, got Linear"):
        generate_texts(torch.nn.Linear(1, 1), TOKENIZER, 2)
    ended = model()
    with torch.no_grad():
        ended.lm_head.weight.zero_()
        ended.lm_head.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)))
        ended.lm_head.bias[END] = 1e4
    with pytest.raises(ValueError, match=r"are empty: it ends them at once\. Pass prompts"):
        generate_texts(ended, TOKENIZER, 2, max_tokens=8)


def test_the_command_writes_what_pack_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = model()
    made.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the\nä beginning\n")
    output = tmp_path / "recalled.jsonl"
    command = ["recall", str(tmp_path / "model"), "--texts", "9", "--output", str(output), "--max-tokens", "32"]
    assert main([*command, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    rows = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 9 and rows[0].startswith("the") and rows[1].startswith("ä beginning")
    assert "9 texts of" in capsys.readouterr().out
    assert pack(load_dataset("json", data_files=str(output), split="train"), TOKENIZER, 16).num_rows > 5
    with pytest.raises(SystemExit, match="is there already: name another file"):
        main(command)
    with pytest.raises(SystemExit, match="num_texts must be"):
        main([*command[:2], "--texts", "0", "--output", str(tmp_path / "other.jsonl")])
