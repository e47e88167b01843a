"""MetaTokensCallback in a Trainer: data, loss, counts, saved files, adapters, TRL, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import settings
import tiny
import torch
import warm
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from hf_pretrain_ext import PackedCollator, PlanConfig, PluginError, continue_from, extend, pack, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, MetaTokensCallback, ReplayCallback
from hf_pretrain_ext.checkpoint import CheckpointError, find_faults
from hf_pretrain_ext.meta_tokens import MetaAttentionConfig, MetaTraining, add_meta_tokens, attached, load_meta_tokens
from hf_pretrain_ext.meta_tokens.batches import Insertion
from hf_pretrain_ext.meta_tokens.rows import with_meta_tokens

META = 64


class Watch(TrainerCallback):
    """The batches of every optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[dict[str, torch.Tensor]]] = {}
        self.evaluated: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, inputs: Any, named: Any) -> None:
            if module.training:
                kept = {key: value.clone() for key, value in named.items() if isinstance(value, torch.Tensor)}
                self.steps.setdefault(state.global_step, []).append(kept)
            else:
                self.evaluated.append(named["input_ids"].clone())

        # Before the hook that takes them out of the batch.
        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True, prepend=True)

    def ids(self, step: int) -> torch.Tensor:
        return torch.cat([batch["input_ids"] for batch in self.steps[step]])


def build(folder: Path, *plugins: Any, plan: Any = None, **given: Any) -> Any:
    return extend(tiny.trainer(folder, *plugins, **{**settings.full_tokenizer(), **given}), plan=plan)


def trained(folder: Path, *plugins: Any, **given: Any) -> Any:
    trainer = build(folder, *plugins, **given)
    trainer.train()
    return trainer


def meta(**given: Any) -> MetaTokensCallback:
    return MetaTokensCallback(**{"fraction": 0.25, **given})


# The token


def test_the_token_comes_with_extend_and_its_row_with_training(tmp_path: Path) -> None:
    reader = settings.full_tokenizer()["processing_class"]
    trainer = tiny.trainer(tmp_path, meta(), processing_class=reader)
    assert len(reader) == 64
    extend(trainer)
    assert reader.convert_tokens_to_ids("<|meta|>") == META and "<|meta|>" in reader.all_special_tokens
    assert len(trainer.model.get_input_embeddings().weight) == 64
    trainer.train()
    assert len(trainer.model.get_input_embeddings().weight) == 65
    assert trainer.model.generation_config.suppress_tokens == [META]


def test_a_refused_trainer_leaves_the_tokenizer_alone(tmp_path: Path) -> None:
    reader = settings.full_tokenizer()["processing_class"]
    with pytest.raises(PluginError, match="label_smoothing_factor"):
        extend(tiny.trainer(tmp_path, meta(), processing_class=reader, label_smoothing_factor=0.1))
    assert len(reader) == 64


def test_no_text_becomes_the_token(tmp_path: Path) -> None:
    """Packed text is characters; text that was tokenized with control tokens is refused, before training and in it."""
    texts = Dataset.from_dict({"text": ["a<|meta|>b " * 20] * 8})
    trainer = build(tmp_path, meta())
    reader = trainer.processing_class
    rows = pack(texts, reader, 24)
    assert not any(META in row for row in rows["input_ids"])
    assert trained(tmp_path, meta(), processing_class=reader, data=rows, data_collator=PackedCollator())

    held = Dataset.from_dict({"input_ids": [reader("a<|meta|>b c d")["input_ids"]] * 8})
    assert META in held["input_ids"][0]
    for known in (reader, settings.full_tokenizer()["processing_class"]):
        with pytest.raises(PluginError, match=r"row 0 of the train_dataset holds the id of '<\|meta\|>', 64, already"):
            build(tmp_path, meta(), processing_class=known, data=held, data_collator=PackedCollator())

    class Late(torch.utils.data.Dataset):  # seen by no check
        def __len__(self) -> int:
            return 2000

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            ids = torch.full((16,), META if number == 1234 else 5)
            return {"input_ids": ids, "labels": ids}

    late = build(tmp_path, meta(), data=Late(), plan=PlanConfig(order="original"), max_steps=400, logging_steps=400)
    with pytest.raises(ValueError, match=r"rows 1234 hold the id of '<\|meta\|>', 64, already"):
        late.train()


# Data and loss


def test_a_sample_gets_its_share_at_places_of_its_own(tmp_path: Path) -> None:
    watch = Watch()
    trained(tmp_path, meta(), watch, max_steps=-1, num_train_epochs=2)
    rows = torch.cat([watch.ids(step) for step in range(20)])
    assert rows.shape == (80, 20) and rows.eq(META).sum(1).eq(4).all()
    texts = [tuple(row[row != META].tolist()) for row in rows]
    assert set(texts) == {tuple(row) for row in tiny.rows(40)["input_ids"]}
    places = {row.eq(META).nonzero().flatten().tolist().__repr__() for row in rows}
    assert len(places) > 70
    # In another epoch, the same text has them elsewhere.
    first, second = (
        {text: row.tolist() for text, row in zip(texts[half], rows[half], strict=True)}
        for half in (slice(40), slice(40, 80))
    )
    assert sum(first[text] != second[text] for text in first) > 35


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("length", ["longer", "fixed"])
def test_the_loss_is_the_papers(batch: int, accumulation: int, length: str, tmp_path: Path) -> None:
    """Mean over all text but the first token of a sample, of a softmax without the token, in float64.

    Meta-attention starts as nothing.
    """
    watch = Watch()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, meta(length=length), watch, max_steps=1, **sizes)
    reference = tiny.model().double().eval()
    reference.resize_token_embeddings(65, mean_resizing=False)
    with torch.no_grad():
        table = reference.get_input_embeddings().weight
        table[64] = table[:64].mean(0)
    total, number = 0.0, 0
    for row in watch.ids(0):
        logits = reference(input_ids=row[None], use_cache=False).logits[0, :, :64].detach()
        for place in range(len(row) - 1):
            if row[place + 1] != META and row[: place + 1].ne(META).any():
                total += float(functional.cross_entropy(logits[place], row[place + 1]))
                number += 1
    assert number == (4 * 15 if length == "longer" else 4 * 11)
    assert tiny.history(trainer)[0]["loss"] == pytest.approx(total / number, rel=1e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_a_model_from_the_hub_is_what_it_was(attention: bool, tmp_path: Path) -> None:
    """Losses on plain text before the first step, by a probe and by the host, are those of a bare run, bit for bit."""
    held_out = tiny.rows(10, seed=5)
    losses = []
    for plugins in ((), (meta(attention=attention),)):
        trainer = trained(
            tmp_path / str(len(plugins)),
            *plugins,
            ForgettingCallback({"old": held_out}),
            eval_dataset=held_out,
            eval_on_start=True,
            eval_strategy="no",
            max_steps=1,
        )
        lines = tiny.history(trainer)
        losses.append([line[key] for line in lines for key in ("eval_loss", "eval_old_loss") if key in line][:2])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_evaluation_stays_plain_unless_its_data_has_them(tmp_path: Path) -> None:
    watch, reader = Watch(), settings.full_tokenizer()["processing_class"]
    held_out = tiny.rows(8, seed=5)
    inserted = with_meta_tokens(held_out, reader, fraction=0.25)
    trainer = trained(
        tmp_path,
        meta(),
        watch,
        processing_class=reader,
        eval_dataset={"plain": held_out, "inserted": inserted},
        eval_strategy="steps",
        eval_steps=6,
    )
    seen = {tuple(ids.shape): int(ids.eq(META).sum()) for ids in watch.evaluated}
    assert seen == {(4, 16): 0, (4, 20): 16}
    final = {key: value for line in tiny.history(trainer) for key, value in line.items() if key.startswith("eval_")}
    model = trainer.model.eval()
    batch = {name: torch.tensor(inserted[name][:]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1, :64].double()
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert final["eval_inserted_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("positions", ["uniform", "every_n", "boundaries"])
def test_layouts_train_alike(positions: str, tmp_path: Path) -> None:
    """Ragged samples padded on either side or one behind the other are the same samples, hence the same losses."""
    reader = settings.full_tokenizer()["processing_class"]
    reader.pad_token = "<u20>"  # which no row holds: the collator masks labels by it
    rows = tiny.rows(40, high=63)["input_ids"]
    data = Dataset.from_dict({"input_ids": [row[: 5 + n % 11] for n, row in enumerate(rows)]})
    losses = {}
    for name in ("right", "left", "joined"):
        reader.padding_side = "left" if name == "left" else "right"
        padded = DataCollatorForLanguageModeling(reader, mlm=False)
        trainer = trained(
            tmp_path / name,
            meta(positions=positions),
            processing_class=reader,
            data=data,
            data_collator=DataCollatorWithFlattening() if name == "joined" else padded,
        )
        losses[name] = [line["loss"] for line in tiny.history(trainer) if "loss" in line]
    assert losses["left"] == pytest.approx(losses["right"], rel=1e-5)
    assert losses["joined"] == pytest.approx(losses["right"], rel=1e-5)
    assert len(set(losses["right"])) == 6


def test_packed_documents_stay_apart(tmp_path: Path) -> None:
    """What meta-tokens of a document see: changing another document of the block changes no loss of it."""
    watch = Watch()
    rows = pack(tiny.documents(80), tiny.tokenizer(), 24)
    trainer = trained(
        tmp_path,
        meta(meta_attention={"init": "normal"}),
        watch,
        data=rows,
        data_collator=PackedCollator(),
        max_steps=3,
    )
    batch = watch.steps[2][0]
    assert batch["input_ids"].shape == (4, 30) and "attention_mask" not in batch
    positions = batch["position_ids"]
    documents = positions.eq(0).cumsum(1) - 1
    assert torch.equal(documents.gather(1, batch["meta_positions"]), batch["meta_documents"])
    assert batch["input_ids"].gather(1, batch["meta_positions"]).eq(META).all()
    model = trainer.model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "meta_positions", "meta_documents")}
    changed = documents % 2 == 0
    other = torch.where(changed & inputs["input_ids"].ne(META), (inputs["input_ids"] + 7) % 60, inputs["input_ids"])
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits
        theirs = model(**{**inputs, "input_ids": other}, use_cache=False).logits
    difference = (ours - theirs)[..., :64].abs().amax(-1)
    assert float(difference[~changed].max()) == 0 and float(difference[changed].max()) > 0
    # The first token of a document bears no loss, be there a meta-token in front of it or not.
    starts = positions.eq(0)
    text = batch["input_ids"].ne(META)
    first = text & (torch.cat([torch.ones(4, 1).bool(), documents.diff(dim=1) > 0], 1) | (starts & text))
    assert batch["labels"][first].eq(-100).all() and batch["labels"][~text].eq(-100).all()


def test_where_the_data_has_them(tmp_path: Path) -> None:
    """`positions="given"`, for tasks that place them: nothing is inserted, none is a target."""
    watch = Watch()
    ids = torch.tensor(tiny.rows(40)["input_ids"][:])
    ids[:, [3, 9]] = META
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = trained(tmp_path, MetaTokensCallback(positions="given"), watch, data=rows)
    batch = watch.steps[0][0]
    assert batch["input_ids"].shape == (4, 16) and batch["meta_positions"].tolist() == [[3, 9]] * 4
    assert batch["labels"].eq(-100).sum(0).nonzero().flatten().tolist() == [3, 9]
    assert not any("meta_tokens" in line for line in tiny.history(trainer))
    with pytest.raises(PluginError, match=r"positions='given', but none of 40 rows looked at holds '<\|meta\|>'"):
        build(tmp_path, MetaTokensCallback(positions="given"))


def test_a_stream_gets_them_too(tmp_path: Path) -> None:
    watches = Watch(), Watch()
    rows = tiny.rows(40)
    trained(tmp_path / "a", meta(), watches[0], data=rows.to_iterable_dataset(num_shards=2), max_steps=3)
    trained(tmp_path / "b", meta(), watches[1], data=rows, max_steps=3, plan=PlanConfig(order="original"))
    for step in range(3):
        assert torch.equal(watches[0].ids(step), watches[1].ids(step))


def test_the_collator_goes_to_workers_that_are_spawned(tmp_path: Path) -> None:
    trainer = build(tmp_path, meta(positions="boundaries"))
    plugin = trainer.plugin_run.plugins[0]
    made = plugin.wrap_collator(PackedCollator())
    assert isinstance(pickle.loads(pickle.dumps(made)).insertion, Insertion)


def test_what_bears_a_loss_is_what_does_without(tmp_path: Path) -> None:
    counts = [trained(tmp_path / str(n), *plugins).plugin_run.realised() for n, plugins in enumerate(
        ((ReplayCallback(settings.old_data(), ratio=0.25),), (ReplayCallback(settings.old_data(), ratio=0.25), meta()))
    )]  # fmt: skip
    assert counts[0] == counts[1] and counts[0]["train"]["loss_tokens"] == 18 * 15


# Counts


def lengths_of(rows: Dataset) -> list[int]:
    return [len(ids) for ids in rows["input_ids"]]


@pytest.mark.parametrize("length", ["longer", "fixed"])
def test_what_was_inserted_and_left_out_is_counted(length: str, tmp_path: Path) -> None:
    """Rows of 1 to 16 tokens, replay beside them: the counts of the log are those of the batches, step by step."""
    watch = Watch()
    ragged = Dataset.from_dict({"input_ids": [row[: 1 + n % 16] for n, row in enumerate(tiny.rows(40)["input_ids"])]})
    collator = DataCollatorForLanguageModeling(settings.full_tokenizer()["processing_class"], mlm=False)
    trainer = trained(
        tmp_path,
        meta(length=length),
        ReplayCallback(ragged.select(range(20)), ratio=0.25),
        watch,
        data=ragged,
        data_collator=collator,
    )
    counted = np.cumsum([int(watch.ids(step).eq(META).sum()) for step in range(6)])
    lines = [line for line in tiny.history(trainer) if "meta_tokens" in line]
    assert [line["meta_tokens"] for line in lines] == counted.tolist()
    assert [line.get("meta_text_cut") for line in lines] == (counted.tolist() if length == "fixed" else [None] * 6)
    assert all("replay_ratio" in line for line in lines)
    end = [event for event in read_trace(tmp_path) if event["event"] == "meta_tokens"][-1]
    assert end["inserted"] == counted[-1] and end["text_cut"] == (counted[-1] if length == "fixed" else 0)
    if length == "fixed":
        read = trainer.plugin_run.realised()
        text = sum(int((batch["attention_mask"].bool() & batch["input_ids"].ne(META)).sum())
                   for step in range(6) for batch in watch.steps[step])  # fmt: skip
        assert sum(entry["tokens"] for entry in read.values()) - text == counted[-1]


def test_what_cannot_be_counted_is_not(tmp_path: Path) -> None:
    trainer = trained(tmp_path, meta(), data=tiny.rows(40).to_iterable_dataset(), max_steps=2)
    assert not any("meta_tokens" in line for line in tiny.history(trainer))


def test_it_says_what_it_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, meta(length="fixed", positions="every_n"), max_steps=1)
    said = capfd.readouterr().err
    assert "meta_tokens: '<|meta|>' is token 64; meta-attention in 2 layers" in said
    assert "meta_tokens: 4 in a sample of 16 tokens, the last 4 of them left out; every_n" in said
    [begin, end] = [event for event in read_trace(tmp_path) if event["event"] == "meta_tokens"]
    assert begin["config"]["token_id"] == META and len(begin["places"]) == 2
    assert (end["inserted"], end["text_cut"]) == (16, 16)


# The model


def test_it_leaves_the_model_as_it_came(tmp_path: Path) -> None:
    """Nothing is frozen afterwards, the row is in the table, and a second training begins where the first ended."""
    trainer = build(tmp_path, meta(train="meta"), weight_decay=0.5)
    before = tiny.weights(trainer)
    trainer.train()
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in trainer.model.named_parameters()} and len(names) == 21 - 1 + 2 * 5
    after = tiny.weights(trainer)
    for name, weight in before.items():
        assert torch.equal(after[name][: len(weight)], weight), name
    assert not torch.equal(after["model.embed_tokens.weight"][64], before["model.embed_tokens.weight"].mean(0))
    trainer.train()
    again = tiny.weights(trainer)
    assert all(torch.equal(again[name][: len(weight)], weight) for name, weight in before.items())
    assert not torch.equal(again["model.embed_tokens.weight"][64], after["model.embed_tokens.weight"][64])


def test_a_training_that_was_broken_off_can_be_begun_again(tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = build(tmp_path, meta(train="meta"), breaking := Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(breaking)
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_saved_model_is_loaded_with_them(tmp_path: Path) -> None:
    trainer = trained(tmp_path, meta())
    trainer.save_model(str(tmp_path / "model"))
    ids = torch.tensor(tiny.rows(2)["input_ids"][:])
    ids[:, ::5] = META
    model = type(trainer.model).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        plain = model(ids).logits
        load_meta_tokens(model, tmp_path / "model")
        assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
        assert not torch.equal(model(ids).logits, plain)
    # Training goes on from it; without its meta-attention, it is not taken.
    assert trained(tmp_path / "more", meta(), model=model, max_steps=1)
    lost = type(trainer.model).from_pretrained(tmp_path / "model")
    with pytest.raises(PluginError, match=r"saved with meta-attention, which is not in the model.*load_meta_tokens"):
        build(tmp_path / "lost", meta(), model=lost)


def test_a_model_that_has_others_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path, meta(rope="off"), max_steps=1).model
    with pytest.raises(
        PluginError, match=r"the model has meta-tokens with rope='off', not 'on'\. Pass these settings"
    ):
        build(tmp_path, meta(), model=model)


def test_settings_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """Those that were passed: what is left to the model, and how its weights began, is the model's."""
    model = trained(tmp_path, meta(meta_attention={"num_heads": 1, "eps": 1e-5}), max_steps=1).model
    for more in ({}, {"num_heads": 1, "norm": "rmsnorm"}, {"norm": "model", "head_dim": None, "init": "normal"}):
        assert build(tmp_path, meta(meta_attention=more), model=model)
    asked = {"num_heads": 2, "norm": "layernorm", "dropout": 0.5, "mask_logits": False}
    with pytest.raises(
        PluginError,
        match=r"num_heads=1, not 2, norm='rmsnorm', not 'layernorm', dropout=0.0, not 0.5, mask_logits=True, not F",
    ):
        build(tmp_path, meta(meta_attention=asked), model=model)


def test_evaluation_before_training(tmp_path: Path) -> None:
    """The model has no row then: plain rows are those of a bare run, others an error that says so."""
    reader, held_out = settings.full_tokenizer()["processing_class"], tiny.rows(8, seed=5)
    trainer = build(tmp_path, meta(), processing_class=reader, eval_dataset=held_out)
    bare = tiny.trainer(tmp_path, eval_dataset=held_out)
    assert trainer.evaluate()["eval_loss"] == bare.evaluate()["eval_loss"]
    inserted = with_meta_tokens(held_out, reader, fraction=0.25)
    with pytest.raises(
        ValueError, match=r"holds '<\|meta\|>' \(id 64\), and the model, of 64 rows, gets one .* after"
    ):
        trainer.evaluate(inserted)
    trainer.train()
    assert np.isfinite(trainer.evaluate(inserted)["eval_loss"])


def test_losses_without_logits_are_refused(tmp_path: Path) -> None:
    for masks in (True, False):
        trainer = tiny.trainer(tmp_path, meta(meta_attention={"mask_logits": masks}), **settings.full_tokenizer())
        trainer.args.use_liger_kernel = True
        if masks:
            with pytest.raises(PluginError, match="use_liger_kernel=True computes the loss without logits"):
                extend(trainer)
        else:
            extend(trainer)


@pytest.mark.parametrize("train", ["meta", "all"])
def test_meta_parts_in_half_precision_are_noted(train: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, meta(train=train), model=tiny.model().bfloat16())
    assert ("the model is in bfloat16, and so are the meta parts" in capfd.readouterr().err) == (train == "meta")


def test_models_with_learned_positions_need_room(tmp_path: Path) -> None:
    def gpt2(positions: int) -> Any:
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=positions))

    with pytest.raises(
        PluginError, match=r"samples of up to 16 tokens get 4 meta-tokens.*20 long.*has 18 positions.*15"
    ):
        build(tmp_path, meta(), model=gpt2(18))
    assert trained(tmp_path, meta(), model=gpt2(20), max_steps=1)
    assert trained(tmp_path, meta(length="fixed"), model=gpt2(16), max_steps=1)
    # Of packed rows, a document can get all of its row.
    rows = Dataset.from_dict({"input_ids": tiny.rows(8)["input_ids"][:], "seq_lengths": [[15, 1]] * 8})
    packed = {"data": rows, "data_collator": PackedCollator(), "remove_unused_columns": False}
    with pytest.raises(PluginError, match=r"a document 19 long, and the model has 18 positions"):
        build(tmp_path, meta(), model=gpt2(18), **packed)
    assert trained(tmp_path, meta(), model=gpt2(19), max_steps=1, **packed)


# Adapters


def lora(**given: Any) -> Any:
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", **given))


@pytest.mark.parametrize("dora", [False, True])
def test_beside_an_adapter_every_save_holds_the_meta_parts(dora: bool, tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, meta(train="meta"), model=lora(use_dora=dora), save_strategy="steps", save_steps=3, weight_decay=0.5
    )
    for folder in ("checkpoint-3", "checkpoint-6"):
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert {"adapter_model.safetensors", "meta_tokens.safetensors", "meta_tokens_config.json"} <= files
        assert find_faults(tmp_path / folder) == []
        manifest = json.loads((tmp_path / folder / "hf_pretrain_ext" / "manifest.json").read_text())
        assert {"meta_tokens.safetensors", "meta_tokens_config.json"} <= set(manifest["files"])
    base = trainer.model.get_base_model().get_input_embeddings().weight
    assert torch.equal(base[:64], tiny.model().get_input_embeddings().weight)
    start = tiny.model()
    load_meta_tokens(start, tmp_path / "checkpoint-6")
    loaded = PeftModel.from_pretrained(start, tmp_path / "checkpoint-6").eval()
    ids = torch.tensor(tiny.rows(2)["input_ids"][:])
    ids[:, ::5] = META
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


TABLES: Any = [
    ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding"),
    ({"target_modules": ["q_proj", "lm_head"]}, "Linear"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "TrainableTokensWrapper"),
]


def untied() -> Any:
    model = tiny.model()
    return type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False}))


@pytest.mark.parametrize(("given", "kind"), TABLES)
def test_an_adapter_on_the_embeddings_is_in_the_way_of_a_new_row(given: Any, kind: str, tmp_path: Path) -> None:
    model = get_peft_model(untied(), LoraConfig(r=2, **given))
    with pytest.raises(PluginError, match=rf"a row for .* in an adapter \({kind}\)\. Give the base its row first"):
        build(tmp_path, meta(train="meta"), model=model)
    assert len(model.get_base_model().get_input_embeddings().weight) == 64
    # As it says: the row first.
    base, reader = untied(), settings.full_tokenizer()["processing_class"]
    add_meta_tokens(base, reader)
    before = base.get_input_embeddings().weight[META].clone()
    if "trainable_token_indices" in given:
        lacks = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **given))
        with pytest.raises(PluginError, match=r"and not that of '<\|meta\|>'\. Name it among them.*\[\.\.\., 64\]"):
            build(tmp_path, meta(train="meta"), model=lacks, processing_class=reader)
        with pytest.raises(ValueError, match="trains single rows of the embedding, and not that of"):
            MetaTraining(lacks, reader, MetaAttentionConfig())
    own = {**given, "trainable_token_indices": [5, META]} if "trainable_token_indices" in given else given
    model = get_peft_model(base, LoraConfig(r=2, **own))
    trained(tmp_path, meta(train="meta"), model=model, processing_class=reader, max_steps=2)
    assert not torch.equal(model.get_base_model().get_input_embeddings().weight[META], before)
    # A row to spare is enough, unless single rows are trained.
    spare = {"model": get_peft_model(untied(), LoraConfig(r=2, **given)), "data": tiny.rows(40, high=40)}
    if kind == "TrainableTokensWrapper":
        with pytest.raises(PluginError, match=kind):
            build(tmp_path, meta(train="meta"), processing_class=tiny.tokenizer(), **spare)
    else:
        assert trained(tmp_path, meta(train="meta"), processing_class=tiny.tokenizer(), max_steps=2, **spare)


def test_an_adapter_of_transformers_own_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:
        # transformers 5.24 asks for a PEFT that was not released when it was.
        pytest.skip(str(error))
    with pytest.raises(PluginError, match=r"has an adapter of model\.add_adapter.*peft\.get_peft_model"):
        build(tmp_path, meta(), model=model)


def test_a_resume_beside_an_adapter_needs_them(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, meta(), model=lora(), **arguments)
    saved = tmp_path / "checkpoint-3"
    (saved / "meta_tokens.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"meta_tokens\.safetensors is missing"):
        build(tmp_path, meta(), model=lora(), **arguments).train(resume_from_checkpoint=str(saved))
    # Whoever makes the folder whole again by its manifest gets the error of what reads it.
    manifest = saved / "hf_pretrain_ext" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["meta_tokens.safetensors"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"the meta-tokens of .*checkpoint-3 cannot be loaded: .*is missing"):
        build(tmp_path, meta(), model=lora(), **arguments).train(resume_from_checkpoint=str(saved))


@pytest.mark.parametrize("row", ["meta_tokens", "meta_tokens-row", "meta_tokens-lora"])
def test_a_new_stage_begins_with_them(row: str, tmp_path: Path) -> None:
    """All weights of the old stage, the token's row and meta-attention among them; a second training goes on."""

    def stage(folder: str, **given: Any) -> Any:
        return extend(
            tiny.trainer(tmp_path / folder, *settings.make((row,)), **{**settings.trainer_for((row,)), **given})
        )

    first = stage("first", save_strategy="steps", save_steps=6)
    first.train()
    second = continue_from(stage("second"), str(tmp_path / "first" / "checkpoint-6"))
    seen: list[dict[str, torch.Tensor]] = []

    class See(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(tiny.weights(second))

    second.add_callback(See())
    second.train()
    end = tiny.weights(second)
    second.train()
    for found, wanted in zip(seen, (tiny.weights(first), end), strict=True):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_best_model_beside_an_adapter_has_its_own(tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """Step 2 is the best."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_loss"] = abs(state.global_step - 2)

    trainer = trained(
        tmp_path,
        meta(),
        Worse(),
        model=lora(),
        eval_dataset=tiny.rows(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoint-2" / "meta_tokens.safetensors")
    last = load_file(tmp_path / "checkpoint-6" / "meta_tokens.safetensors")
    table = trainer.model.get_base_model().get_input_embeddings().weight
    assert torch.equal(table[META], best["input_embedding"]) and not torch.equal(table[META], last["input_embedding"])


# TRL


def sft(folder: Path, plugin: MetaTokensCallback, **given: Any) -> Any:
    texts = Dataset.from_dict({"text": ["the cat sat on a mat. it " + "x" * n for n in range(3, 40)]})
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        **{tiny.CHECKPOINTING: False, **given},
    )
    trainer = extend(
        SFTTrainer(
            model=tiny.model(),
            args=arguments,
            train_dataset=texts,
            callbacks=[plugin, watch := Watch()],
            **settings.full_tokenizer(),
        )
    )
    trainer.train()
    return trainer, watch


def test_trl_padded_and_without_padding_are_the_same_training(tmp_path: Path) -> None:
    padded, _ = sft(tmp_path / "padded", meta(), max_length=None)
    free, watch = sft(tmp_path / "free", meta(), max_length=None, padding_free=True)
    losses = [[line["loss"] for line in tiny.history(each) if "loss" in line] for each in (padded, free)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][1]
    batch = watch.steps[0][0]
    starts = batch["position_ids"][0].eq(0).nonzero().flatten()
    assert len(batch["input_ids"]) == 1 and len(starts) == 4
    if "cu_seq_lens_q" in batch:  # TRL 1.8 gives position ids alone
        assert batch["cu_seq_lens_q"].tolist() == [*starts.tolist(), batch["input_ids"].shape[1]]


def test_the_loss_of_trl_leaves_the_token_out(tmp_path: Path) -> None:
    """Its head is fused: the loss is that of a softmax without the token, computed from the batch."""
    trainer, watch = sft(tmp_path, meta(), max_length=None)
    reference = tiny.model().double().eval()
    reference.resize_token_embeddings(65, mean_resizing=False)
    with torch.no_grad():
        table = reference.get_input_embeddings().weight
        table[64] = table[:64].mean(0)
    batch = watch.steps[0][0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = reference(**inputs, use_cache=False).logits[:, :-1, :64].detach()
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert tiny.history(trainer)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.model.lm_head.bias is None


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packings_of_trl(strategy: str, tmp_path: Path) -> None:
    trainer, watch = sft(tmp_path, meta(), packing=True, packing_strategy=strategy, max_length=32)
    for batches in watch.steps.values():
        for batch in batches:
            ids = batch["input_ids"]
            assert batch["labels"][ids == META].eq(-100).all()
            assert torch.equal(batch["meta_positions"], ids.eq(META).nonzero()[:, 1].view(len(ids), -1))
    if strategy == "wrapped":
        assert batch["input_ids"].shape == (4, 40)
    assert all(np.isfinite(line["loss"]) for line in tiny.history(trainer) if "loss" in line)


def test_an_sft_trainer_with_an_adapter(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["the cat sat on a mat"] * 8})
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules="all-linear")
    trainer = extend(
        SFTTrainer(
            tiny.model(),
            arguments,
            train_dataset=texts,
            callbacks=[meta(train="meta")],
            peft_config=adapter,
            **settings.full_tokenizer(),
        )
    )
    trainer.train()
    there = attached(trainer.model)
    assert there is not None and float(there.sites[0].attention.to_output.weight.abs().max()) > 0
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "meta_tokens.safetensors").is_file()


# Other plug-ins


def test_beside_metadata_and_replay(tmp_path: Path) -> None:
    watch = Watch()
    raw = settings.raw_documents(80)
    trainer = extend(
        tiny.trainer(
            tmp_path,
            settings.metadata(),
            settings.by_name("replay-documents").make(),
            meta(),
            watch,
            cls=Trainer,
            **{**raw, **settings.full_tokenizer()},
        )
    )
    trainer.train()
    for step in range(6):
        batch = watch.steps[step][0]
        assert batch["input_ids"].shape == (4, 20) and batch["input_ids"].eq(META).sum(1).eq(4).all()
        # Metadata stays without a loss, and so do meta-tokens.
        bearing = batch["labels"] != -100
        assert torch.equal(batch["labels"][bearing], batch["input_ids"][bearing])
    assert [line["meta_tokens"] for line in tiny.history(trainer) if "meta_tokens" in line] == [
        16 * n for n in range(1, 7)
    ]


# The example


@pytest.mark.docs
def test_the_example_runs(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "examples" / "meta_tokens.py"
    command = [*warm.python(), str(script), "--output_dir", str(tmp_path / "out"), "--max_steps", "4"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "meta_tokens: 12 in a sample of 128 tokens, 140 in all; uniform" in done.stderr
    assert done.stdout.splitlines()[-1].startswith(("'", '"'))


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    """Their threads would share the hooks; the count is set by hand, as no such machine is needed to refuse it."""
    reader = settings.full_tokenizer()["processing_class"]
    trainer = tiny.trainer(tmp_path, meta(), processing_class=reader)
    trainer.args._n_gpu = 2
    with pytest.raises(PluginError, match="2 GPUs in one process are threads"):
        extend(trainer)
