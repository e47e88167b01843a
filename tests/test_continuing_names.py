"""Stages from files whose names are not the model's own, and from folders that do not fit: loaded, or nothing changed.

The oracle for what is loaded is `from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import settings
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_pretrain_ext import PluginError, continue_from, extend
from hf_pretrain_ext.callbacks import GradNormLoRPCallback, MetaTokensCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.loading import weight_files
from hf_pretrain_ext.stages import read_stages
from hf_pretrain_ext.structure import Structure

WRAPPING = {
    "meta": lambda: MetaTokensCallback(fraction=0.25),
    "lora": lambda: GradNormLoRPCallback(rank=2, adapter=settings.dora()),
}


def model(name: str, seed: int = 0) -> Any:
    """Of another seed, other weights; `build` has one of its own."""
    made, draw = architectures.build(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return made


def wide() -> Any:
    config = tiny.model().config.to_dict()
    return LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 32, "head_dim": 16}))


def saved(name: str, folder: Path) -> Path:
    """As the Hub has it: GPT-2's files lack the prefix, those of the others have other names altogether."""
    model(name, 1).save_pretrained(folder)
    if name == "GPT-2":
        path = folder / "model.safetensors"
        bare = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
        save_file(bare, path, metadata={"format": "pt"})
    return folder


def trainer(folder: Path, kind: str, **given: Any) -> Any:
    common = {**settings.full_tokenizer(), "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    return tiny.trainer(folder, RewarmCallback(1e-2, warmup=1), WRAPPING[kind](), **{**common, **given})


def state(trained: Any) -> dict[str, torch.Tensor]:
    """Under the names of the model inside an adapter."""
    return {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for key, value in trained.state_dict().items()
    }


def holds(trained: Any, expected: dict[str, torch.Tensor]) -> bool:
    """Whether all of `expected` is there; embeddings may have got rows."""
    found = state(trained)
    return all(torch.equal(found[key][: len(value)], value) for key, value in expected.items())


# PEFT has no DoRA for experts.
@pytest.mark.parametrize(
    ("name", "kind"),
    [("GPT-2", "meta"), ("GPT-NeoX", "meta"), ("Mixtral", "meta"), ("GPT-2", "lora"), ("GPT-NeoX", "lora")],
)
def test_a_base_under_other_names_and_a_plug_in_that_wraps(name: str, kind: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    begun = trainer(tmp_path / "one", kind, model=model(name))
    continue_from(begun, str(base))
    right = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert holds(begun.model, right) and not holds(model(name), right)
    begun.train()
    later = trainer(tmp_path / "two", kind, model=model(name, 2))
    if kind == "meta":
        later.processing_class = AutoTokenizer.from_pretrained(tmp_path / "one" / "checkpoint-4")
    else:
        later.model.load_state_dict(right)
    continue_from(later, str(tmp_path / "one" / "checkpoint-4"))
    assert holds(later.model, state(begun.model)) and len(state(later.model)) == len(state(begun.model))


def shape_of(trained: Any) -> tuple[Any, ...]:
    inner = trained.model
    return (
        {
            name: (type(module), sorted(vars(module)), len(module._forward_hooks))
            for name, module in inner.named_modules()
        },
        {name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in inner.named_parameters()},
        inner.config.to_dict(),
        inner.generation_config.to_dict(),
    )


@pytest.mark.parametrize("kind", WRAPPING)
def test_a_refused_folder_leaves_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    """The right folder is taken after that, and trains as if it had been the first, bit for bit."""
    wide().save_pretrained(tmp_path / "wrong")
    base = saved("Llama", tmp_path / "right")
    begun = trainer(tmp_path / "one", kind, model=model("Llama"))
    before = shape_of(begun)
    with pytest.raises(CheckpointError, match="does not fit this"):
        continue_from(begun, str(tmp_path / "wrong"))
    assert shape_of(begun) == before
    continue_from(begun, str(base)).train()
    straight = trainer(tmp_path / "two", kind, model=model("Llama"))
    continue_from(straight, str(base)).train()
    assert tiny.same_weights(begun, straight) and tiny.history(begun)[:-1] == tiny.history(straight)[:-1]


def test_structure_puts_back_hooks_classes_and_configs() -> None:
    made = model("Llama")
    made(torch.tensor([[1, 2]]))
    calls: list[int] = []
    handle = made.register_forward_hook(lambda *_: calls.append(1))
    before, kept = {name: value.clone() for name, value in made.state_dict().items()}, Structure(made)
    made.resize_token_embeddings(80, mean_resizing=False)
    made.register_forward_hook(lambda *_: calls.append(2))
    get_peft_model(made, LoraConfig(r=2, target_modules="all-linear"))
    assert made.config.vocab_size == 80 and hasattr(made, "peft_config")
    kept.put_back()
    assert made.config.vocab_size == 64 and not hasattr(made, "peft_config")
    assert list(made.state_dict()) == list(before) and all(p.requires_grad for p in made.parameters())
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made(torch.tensor([[1, 2]]))
    handle.remove()
    made(torch.tensor([[1, 2]]))
    assert calls == [1]


# A single file and the index of former shards


def test_a_single_file_goes_before_an_index_that_was_left(tmp_path: Path) -> None:
    """Saved in shards once, and whole later, which leaves the index; the host reads the single file as well."""
    folder, first, second = tmp_path / "run", tiny.model(), tiny.model(seed=5)
    first.save_pretrained(folder, max_shard_size="5KB")
    second.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    begun = tiny.trainer(tmp_path / "one", RewarmCallback(1e-2, warmup=1))
    continue_from(begun, str(folder))
    right = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, right[name]) for name, value in begun.model.state_dict().items())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in right.items())


def test_damaged_weights_in_the_output_folder_do_not_lose_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    trained = extend(tiny.trainer(tmp_path, RewarmCallback(1e-2, warmup=1)))
    trained.train()
    assert trained.state.global_step == 6 and "stages.json cannot be written into" in caplog.text
    trained.save_model(str(tmp_path / "whole"))
    assert read_stages(tmp_path / "whole") is not None


# What a refusal advises


def test_another_width_is_no_other_vocabulary(tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="Build the model with the configuration of that folder") as refused:
        continue_from(tiny.trainer(tmp_path / "one"), str(tmp_path / "wide"))
    assert "vocabulary" not in str(refused.value)


def test_a_whole_model_is_loaded_below_an_adapter_by_the_user(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "whole")
    adapted = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear"))
    begun = tiny.trainer(tmp_path / "one", model=adapted)
    with pytest.raises(CheckpointError, match=r"It holds a whole model, and this one has an adapter: load the base"):
        continue_from(begun, str(tmp_path / "whole"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    begun = tiny.trainer(tmp_path / "one", model=get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")))
    continue_from(begun, str(tmp_path / "whole"), carry=()).train()


def test_an_adapter_of_other_targets_is_named(tmp_path: Path) -> None:
    get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    adapted = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(CheckpointError, match=r"Give the model an adapter of the configuration of that folder"):
        continue_from(tiny.trainer(tmp_path / "one", model=adapted), str(tmp_path / "adapter"))


def test_an_adapter_that_the_host_put_in_is_refused(tmp_path: Path) -> None:
    """It comes frozen, and no Trainer loads it again: PEFT's own class does both."""
    tiny.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in native.parameters())
    with pytest.raises((CheckpointError, PluginError), match=r"AutoPeftModelForCausalLM\.from_pretrained\(folder"):
        continue_from(tiny.trainer(tmp_path / "one", model=native), str(tmp_path / "adapter"))
    with pytest.raises(PluginError, match=r"model: the model's own from_pretrained or add_adapter put its adapter"):
        extend(tiny.trainer(tmp_path / "two", RewarmCallback(1e-2, warmup=1), model=native))


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    """Not where there are no plug-ins: nothing changes then."""
    extend(tiny.trainer(tmp_path, model=tiny.model().requires_grad_(False)))
    with pytest.raises(PluginError, match="all of its 20 parameters are frozen, so that nothing would be trained"):
        extend(tiny.trainer(tmp_path, RewarmCallback(1e-2, warmup=1), model=tiny.model().requires_grad_(False)))
