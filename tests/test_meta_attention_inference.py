"""Generation with meta-tokens: with and without a cache, in beams, in padded batches; prompts with them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from meta_attention_reference import FAMILIES, META, build, ids
from torch import Tensor

from hf_pretrain_ext.demo.tokenizer import train_tokenizer
from hf_pretrain_ext.meta_tokens import (
    add_meta_tokens,
    allow_meta_tokens,
    attached,
    generate,
    insert_in_prompts,
    load_meta_tokens,
    meta_prompt_ids,
    remove_meta_tokens,
)
from hf_pretrain_ext.meta_tokens import memory as memories
from hf_pretrain_ext.vocabulary import add_tokens

QUICK = ("Llama", "Gemma 2", "GPT-2", "GPT-NeoX", "Mistral", "BLOOM", "GPT-J")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def families() -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]


def eager_model(name: str) -> Any:
    """One that likes to write meta-tokens, at about half of all steps, where it may."""
    model = build(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 20)  # so that there is a choice

    def like(module: Any, args: Any, logits: Tensor) -> Tensor:
        free = logits[..., META] > -1e4
        wanted = torch.where(torch.sin(9 * logits[..., 20:40].sum(-1)) > 0, logits.amax(-1) + 0.5, logits.amin(-1))
        return logits.index_copy(-1, torch.tensor([META]), torch.where(free, wanted, logits[..., META]).unsqueeze(-1))

    head.register_forward_hook(like)
    return model


@pytest.mark.parametrize("name", families())
def test_cache_and_padding_change_nothing(name: str) -> None:
    """Greedy text with the cache, without it, and in a batch with left padding; meta-tokens are written too."""
    model = eager_model(name)
    long, short = ids(1, 10, seed=1, at=(2, 5, 9)), ids(1, 6, seed=2, at=(1,))
    pad = torch.zeros(1, 4, dtype=torch.long)
    both = {
        "input_ids": torch.cat([long, torch.cat([pad, short], dim=1)]),
        "attention_mask": torch.tensor([[1] * 10, [0] * 4 + [1] * 6]),
    }

    def alone(tokens: Tensor, **more: Any) -> Tensor:
        made: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY, **more)
        return made

    with allow_meta_tokens(model):
        written = alone(long), alone(short)
        assert torch.equal(written[0], alone(long, use_cache=False))
        assert torch.equal(written[1], alone(short, use_cache=False))
        padded = model.generate(**both, **GREEDY)
        assert torch.equal(padded[0], written[0][0]) and torch.equal(padded[1, 4:], written[1][0])
        beams = [model.generate(**both, **GREEDY, num_beams=4, use_cache=use) for use in (True, False)]
        assert torch.equal(*beams)
        if name != "MPT":  # whose prompts transformers does not cut
            assert torch.equal(alone(long, prefill_chunk_size=3), written[0])
    for use in (True, False):
        forbidden = model.generate(**both, **GREEDY, num_beams=2, use_cache=use)
        assert not bool((forbidden[:, 10:] == META).any())


@pytest.mark.parametrize("name", [name for name in QUICK if name != "BLOOM"])  # whose beams repeat one token
def test_meta_tokens_are_written_in_beams_where_that_is_allowed(name: str) -> None:
    """Else the test above would show nothing of the cache that follows the beams."""
    model = eager_model(name)
    rows = ids(4, 10, seed=7)
    settings = {**GREEDY, "max_new_tokens": 12, "attention_mask": torch.ones_like(rows)}
    with allow_meta_tokens(model):
        made = model.generate(rows, num_beams=4, **settings)[:, 10:]
        greedy = model.generate(rows, **settings)[:, 10:]
        assert torch.equal(model.generate(rows, num_beams=4, use_cache=False, **settings)[:, 10:], made)
    counts = (made == META).sum(1)
    assert bool((counts > 0).any()) and bool((counts < 12).any()), counts
    assert not torch.equal(made, greedy)
    assert not bool((model.generate(rows, **settings)[:, 10:] == META).any())


def test_a_memory_that_did_not_follow_the_beams_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = eager_model("Llama"), ids(4, 10, seed=7)
    settings: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 12, "attention_mask": torch.ones_like(rows)}
    with allow_meta_tokens(model):
        right = model.generate(rows, output_scores=True, return_dict_in_generate=True, **settings)
        monkeypatch.setattr(memories.MetaMemory, "change_rows", lambda self, change: None)
        wrong = model.generate(rows, output_scores=True, return_dict_in_generate=True, **settings)
    assert not torch.equal(right.sequences_scores, wrong.sequences_scores)


def test_sampled_and_assisted_text_use_the_cache_too() -> None:
    """Assisted generation crops the cache back to what was accepted."""
    model, rows = eager_model("Llama"), ids(1, 10)
    mask = torch.ones_like(rows)
    with allow_meta_tokens(model):
        samples = []
        for use in (True, False):
            torch.manual_seed(0)
            samples.append(
                model.generate(
                    rows, attention_mask=mask, do_sample=True, max_new_tokens=8, num_return_sequences=3, use_cache=use
                )
            )
        assert torch.equal(*samples)
        greedy = model.generate(rows, attention_mask=mask, **GREEDY)
        looked_up = model.generate(rows, attention_mask=mask, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(looked_up, greedy)
        assistant = eager_model("Qwen2")
        with allow_meta_tokens(assistant):
            assisted = model.generate(rows, attention_mask=mask, assistant_model=assistant, **GREEDY)
        assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded"])
def test_kinds_of_caches(implementation: str) -> None:
    if implementation == "offloaded" and not torch.cuda.is_available():
        pytest.skip("the offloaded cache of transformers copies on a stream, which needs an accelerator")
    model, rows = eager_model("Llama"), ids(2, 10)
    mask = torch.ones_like(rows)
    with allow_meta_tokens(model):
        expected = model.generate(rows, attention_mask=mask, use_cache=False, **GREEDY)
        made = model.generate(rows, attention_mask=mask, cache_implementation=implementation, **GREEDY)
    assert torch.equal(made, expected)


def test_a_loop_of_ones_own_may_crop_repeat_and_copy_the_cache() -> None:
    import copy

    model, rows = build("Llama"), ids(2, 12, at=(1, 4, 8, 10))
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
        start = model(rows[:, :7], use_cache=True)
        cache = start.past_key_values
        kept = copy.deepcopy(cache)
        step = model(rows[:, 7:], past_key_values=cache, use_cache=True)
        assert torch.allclose(torch.cat([start.logits, step.logits], 1), whole, atol=2e-6)
        step.past_key_values.crop(-3)
        again = model(rows[:, 9:], past_key_values=cache, use_cache=True)
        assert torch.allclose(again.logits, whole[:, 9:], atol=2e-6)
        kept.batch_repeat_interleave(2)
        repeated = model(rows[:, 7:].repeat_interleave(2, 0), past_key_values=kept, use_cache=True).logits
        assert torch.allclose(repeated, whole[:, 7:].repeat_interleave(2, 0), atol=2e-6)
        kept.crop(-5)
        kept.batch_select_indices(torch.tensor([3, 0]))
        picked = model(rows[[1, 0], 7:], past_key_values=kept, use_cache=True).logits
        assert torch.allclose(picked, whole[[1, 0], 7:], atol=2e-6)


def test_a_cache_filled_without_meta_attention_is_refused() -> None:
    from transformers import DynamicCache

    model, bare, rows = build("Llama"), tiny.model().eval(), ids(1, 8, at=(3, 7))
    with torch.no_grad():
        cache = bare(rows, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="of 8 tokens that this model did not see with its meta-attention"):
            model(rows[:, :1], past_key_values=cache)
        empty = DynamicCache(config=model.config)
        made = model(rows, past_key_values=empty).logits
        assert torch.equal(made, model(rows, use_cache=False).logits)
        with pytest.raises(ValueError, match="of 1 rows, and input_ids has 2"):
            model(torch.full((2, 1), META), past_key_values=empty)


def test_meta_tokens_are_suppressed_through_the_generation_config(tmp_path: Any) -> None:
    model = eager_model("Llama")
    assert model.generation_config.suppress_tokens == [META]
    with allow_meta_tokens(model):
        assert model.generation_config.suppress_tokens is None
        assert attached(model).masked is False  # type: ignore[union-attr]
    assert model.generation_config.suppress_tokens == [META]
    other = build("Llama", mask_logits=False)
    other.generation_config.suppress_tokens = [7, META]
    with torch.no_grad():
        assert bool((other(ids()).logits[..., META] > -100).all())
    with allow_meta_tokens(other):
        assert other.generation_config.suppress_tokens == [7]
    assert other.generation_config.suppress_tokens == [7, META]
    with pytest.raises(ValueError, match="has no meta-tokens"), allow_meta_tokens(tiny.model()):
        pass


@pytest.mark.parametrize("beams", [1, 4])
def test_a_saved_and_loaded_model_may_write_them_where_that_is_allowed(beams: int, tmp_path: Any) -> None:
    """Its generation_config names the token from the file on."""
    from transformers import AutoModelForCausalLM

    model, reader = tiny.model(), tiny.tokenizer()
    number, prompt = add_meta_tokens(model, reader), torch.tensor([[5, 6, 7]])
    with torch.no_grad():  # the head is tied: its logit is then the largest
        state = model.eval().model(prompt).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[number] = 10 * state / state.norm()
    model.generation_config.suppress_tokens = [7, number]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    load_meta_tokens(loaded, tmp_path)
    settings = {**GREEDY, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    for each in (model, loaded):
        with allow_meta_tokens(each):
            assert each.generation_config.suppress_tokens == [7]
            assert number in each.generate(prompt, **settings)[0, 3:]
        assert each.generation_config.suppress_tokens == [7, number]
        assert number not in each.generate(prompt, **settings)[0, 3:]
    remove_meta_tokens(loaded)
    assert loaded.generation_config.suppress_tokens == [7]


# Prompts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["ab"], vocab_size=257)
    add_tokens(made, ["<|meta|>"])
    return made


@pytest.mark.parametrize(
    ("rules", "written"),
    [
        ({"every": 3}, "abc*def*g"),
        ({"every": 7}, "abcdefg*"),
        ({"end": 2}, "abcdefg**"),
        ({"marks": "d"}, "abc*efg"),
        ({"marks": ["bc", "b", "g"]}, "a*def*"),
        ({"marks": "d", "every": 3, "end": 1}, "abc**efg**"),
    ],
)
def test_rules_for_prompts(tokenizer: Any, rules: dict[str, Any], written: str) -> None:
    made = meta_prompt_ids(tokenizer, "abcdefg", **rules)
    number = tokenizer.convert_tokens_to_ids("<|meta|>")
    assert "".join("*" if each == number else tokenizer.decode([each]) for each in made) == written


def test_text_never_becomes_a_meta_token(tokenizer: Any) -> None:
    number = tokenizer.convert_tokens_to_ids("<|meta|>")
    made = meta_prompt_ids(tokenizer, "a<|meta|>b<|endoftext|>", end=1)
    assert made.count(number) == 1 and made[-1] == number and tokenizer.eos_token_id not in made
    assert meta_prompt_ids(tokenizer, "a<|meta|>b", marks="<|meta|>").count(number) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no rule says where"),
        ({"every": 0}, "every must be an integer from 1"),
        ({"end": -1}, "end must be an integer from 0"),
        ({"marks": [""]}, "marks must be pieces of text"),
        ({"end": 1, "token": "<|none|>"}, r"has no token '<\|none\|>'"),
        ({"end": 1, "prompt": 7}, "prompt must be a string"),
    ],
)
def test_rules_that_cannot_be(tokenizer: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta_prompt_ids(tokenizer, **{"prompt": "abc", **given})


def test_rules_for_batches_of_ids() -> None:
    rows = torch.tensor([[0, 0, 5, 6, 7], [5, 5, 8, 9, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    made = insert_in_prompts(rows, mask, token_id=60, every=2, after=[7], end=1, pad_token_id=1)
    assert made["input_ids"].tolist() == [[1, 1, 5, 6, 60, 7, 60, 60], [5, 5, 60, 8, 9, 60, 6, 60]]
    assert made["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]
    # A mark at the end of a stretch counts for both rules.
    assert insert_in_prompts(rows[1:], token_id=60, every=5, after=[6])["input_ids"].tolist() == [
        [5, 5, 8, 9, 6, 60, 60]
    ]
    with pytest.raises(ValueError, match="no rule"):
        insert_in_prompts(rows, token_id=60)
    with pytest.raises(ValueError, match="after must be token ids"):
        insert_in_prompts(rows, token_id=60, after=["x"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="input_ids must be a tensor of shape"):
        insert_in_prompts(rows[0], token_id=60, end=1)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        insert_in_prompts(rows, mask[:1], token_id=60, end=1)
    with pytest.raises(ValueError, match="pad_token_id must be an integer from 0 on, got None"):
        insert_in_prompts(rows, token_id=60, end=1, pad_token_id=None)  # type: ignore[arg-type]


def test_text_is_generated_from_text() -> None:
    model, reader = tiny.model(), tiny.tokenizer()
    number = add_meta_tokens(model, reader)
    model.eval()
    prompts = ["a long prompt", "ab"]
    several = generate(model, reader, prompts, every=4, end=1, eos_token_id=None, **GREEDY)
    for prompt, text in zip(prompts, several, strict=True):
        tokens = torch.tensor([meta_prompt_ids(reader, prompt, every=4, end=1)])
        assert number in tokens
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), eos_token_id=None, pad_token_id=0, **GREEDY
        )
        assert reader.decode(made[0, tokens.shape[1] :], skip_special_tokens=True) == text
        assert generate(model, reader, prompt, every=4, end=1, eos_token_id=None, **GREEDY) == text
    assert generate(model, reader, ["ab"], end=1, **GREEDY) == [generate(model, reader, "ab", end=1, **GREEDY)]
    other = tiny.tokenizer()
    with pytest.raises(ValueError, match="has no token"):
        generate(model, other, "ab", end=1)
    add_tokens(other, ["<|first|>", "<|meta|>"])
    with pytest.raises(ValueError, match="Load the tokenizer that was saved with the model"):
        generate(model, other, "ab", end=1)
    with pytest.raises(ValueError, match="prompts has none"):
        generate(model, reader, [], end=1)
    with pytest.raises(ValueError, match="return_dict_in_generate=True asks for more than text"):
        generate(model, reader, "ab", end=1, return_dict_in_generate=True)
    model.generation_config.return_dict_in_generate = True
    assert generate(model, reader, prompts, every=4, end=1, eos_token_id=None, **GREEDY) == several
    with pytest.raises(ValueError, match="has no meta-tokens"):
        generate(tiny.model(), reader, "ab", end=1)


def test_what_ends_a_text_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = tiny.model(), tiny.tokenizer()
    add_meta_tokens(model, reader)
    plain, seen = type(model).generate, []

    def listening(*args: Any, **inputs: Any) -> Any:
        seen.append(inputs.get("eos_token_id", "its own"))
        return plain(*args, **inputs)

    monkeypatch.setattr(type(model), "generate", listening)
    cases: list[Any] = [([0, 9], {}), ([0, 9], {"eos_token_id": 5}), (None, {}), (None, {"eos_token_id": None})]
    for own, given in cases:
        model.generation_config.eos_token_id = own
        generate(model, reader, "abc", end=1, **GREEDY, **given)
    assert seen == ["its own", 5, reader.eos_token_id, None]


def test_settings_of_generate_keep_meta_tokens_out_unless_asked() -> None:
    model, reader = tiny.model(), tiny.tokenizer()
    number = add_meta_tokens(model, reader)
    with torch.no_grad():  # tied: what is written is what agrees with the state, which this row always does
        model.model.norm.weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
        model.get_input_embeddings().weight[number] = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 30
    seen: list[Tensor] = []
    plain = type(model).generate

    def listening(**inputs: Any) -> Tensor:
        seen.append(plain(model, **inputs))
        return seen[-1]

    model.generate = listening
    settings = {**GREEDY, "eos_token_id": None, "max_new_tokens": 20}
    for write, more in ((False, {}), (False, {"suppress_tokens": [3]}), (True, {})):
        generate(model, reader, ["abc", "hello"], end=3, write_meta_tokens=write, **settings, **more)
    written = [bool((made[:, 8:] == number).any()) for made in seen]
    assert written == [False, False, True]
