"""MetadataCallback in a Trainer: boundary, disjoint documents, loss, schedule, replay beside it, streams, TRL."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    DataCollatorForLanguageModeling,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from hf_pretrain_ext import PackedCollator, PlanConfig, PluginError, extend, read_trace
from hf_pretrain_ext.callbacks import MetadataCallback, ReplayCallback
from hf_pretrain_ext.metadata import BlockStream, Template, prepare
from hf_pretrain_ext.streams import StreamError

TOKENIZER = tiny.tokenizer()
HEAD = "a.io "


def numbered(count: int, seed: int = 0) -> Dataset:
    """Documents that begin with their number, so that each can be told from its tokens."""
    draw = random.Random(seed)
    texts = [f"{n:03d}{''.join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 40)))}" for n in range(count)]
    return Dataset.from_dict({"text": texts, "url": [f"https://a.io/{n}" for n in range(count)]})


class Watch(TrainerCallback):
    """The batches of every optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[dict[str, torch.Tensor]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(module: Any, inputs: Any, named: Any) -> None:
            if module.training:
                kept = {key: named[key].clone() for key in ("input_ids", "labels", "position_ids")}
                self.steps.setdefault(state.global_step, []).append(kept)

        kwargs["model"].register_forward_pre_hook(see, with_kwargs=True)

    def texts(self, step: int) -> list[str]:
        """The documents, or pieces of them, of a step."""
        found = []
        for batch in self.steps[step]:
            for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
                text = ""
                for token, position in zip(TOKENIZER.convert_ids_to_tokens(ids), positions.tolist(), strict=True):
                    if not position and text:
                        found.append(text)
                        text = ""
                    text += token
                found.append(text)
        return [text for text in found if text != "<eos>"]


def run(
    folder: Path, *plugins: Any, data: Any = None, cls: type[Trainer] = Trainer, plan: Any = None, **given: Any
) -> Any:
    given = {"data_collator": PackedCollator(), "processing_class": TOKENIZER, **given}
    return extend(
        tiny.trainer(folder, *plugins, data=numbered(200) if data is None else data, cls=cls, **given), plan=plan
    )


def callback(**given: Any) -> MetadataCallback:
    return MetadataCallback(**{"template": "{domain} ", "block_size": 32, "cooldown": 0.25, **given})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_boundary_lies_between_two_steps(workers: int, tmp_path: Path) -> None:
    """12 steps, a quarter of them plain: metadata in every document up to step 8, in none from step 9 on."""
    watch = Watch()
    trainer = run(tmp_path, callback(), watch, max_steps=12, dataloader_num_workers=workers)
    trainer.train()
    pieces = {step: watch.texts(step) for step in range(12)}
    assert all(text.startswith(HEAD) for step in range(9) for text in pieces[step])
    assert not any(text.startswith(HEAD) for step in range(9, 12) for text in pieces[step])
    numbers = [
        {
            text.removeprefix(HEAD)[:3]
            for step in steps
            for text in pieces[step]
            if text.removeprefix(HEAD)[:3].isdigit()
        }
        for steps in (range(9), range(9, 12))
    ]
    assert len(numbers[0]) > 20 and len(numbers[1]) > 5 and not numbers[0] & numbers[1]
    counts = trainer.plugin_run.realised()
    assert {name: entry["samples"] for name, entry in counts.items()} == {"conditioned": 36, "plain": 12}
    # The pool is as large as it must be.
    plain = next(source for source in trainer.plugin_run.plan.sources if source.name == "plain")
    assert 12 <= plain.num_rows <= 13
    assert trainer.plugin_run.plugins[0].marks(12) == [9]


def test_documents_are_disjoint_over_all_epochs(tmp_path: Path) -> None:
    """Sizes are solved on one epoch's tokens: over three epochs, each view is read about three times."""
    watch = Watch()
    trainer = run(tmp_path, callback(), watch, max_steps=-1, num_train_epochs=3)
    trainer.train()
    plan, steps = trainer.plugin_run.plan, trainer.state.max_steps
    boundary = steps - int(0.25 * steps + 0.5)
    assert [(p.name, p.start, p.stop) for p in plan.phases] == [
        ("metadata", 0, boundary * 4),
        ("cooldown", boundary * 4, steps * 4),
    ]
    passes = dict(zip((s.name for s in plan.sources), plan.passes(steps * 4), strict=True))
    assert 2.8 < passes["conditioned"] < 3.2 and 2.8 < passes["plain"] < 3.2
    before = {t.removeprefix(HEAD)[:3] for step in range(boundary) for t in watch.texts(step)}
    after = {t[:3] for step in range(boundary, steps) for t in watch.texts(step)}
    known = {f"{n:03d}" for n in range(200)}
    # A block may end inside a number.
    assert len(before & known | after & known) > 190 and not before & after & known


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_loss_is_the_papers(batch: int, accumulation: int, tmp_path: Path) -> None:
    """The mean over tokens of text and EOS of the step, metadata left out, computed by hand document by document."""
    watch = Watch()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = run(tmp_path, callback(), watch, max_steps=4, **sizes)
    reference = tiny.model().double().eval()
    trainer.train()
    total, tokens = 0.0, 0
    for text in watch.texts(0):
        pieces = [*text.removesuffix("<eos>"), *(["<eos>"] if text.endswith("<eos>") else [])]
        ids = torch.tensor([TOKENIZER.convert_tokens_to_ids(pieces)])
        logits = reference(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for place in range(len(HEAD), len(pieces)):
            total -= float(logits[place - 1, ids[0, place]].detach())
            tokens += 1
    assert tiny.history(trainer)[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    bearing = sum(int((b["labels"][:, 1:] != -100).sum()) for b in watch.steps[0])
    assert bearing == tokens


def test_schedule_and_optimizer_go_on_across_the_boundary(tmp_path: Path) -> None:
    trainer = run(tmp_path, callback(), max_steps=12, lr_scheduler_type="linear")
    trainer.train()
    rates = [line["learning_rate"] for line in tiny.history(trainer) if "learning_rate" in line]
    assert rates == pytest.approx([1e-2 * (1 - step / 12) for step in range(12)])
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {12}


def test_replay_keeps_its_share_in_both_phases(tmp_path: Path) -> None:
    """Raw old documents become plain blocks; one sample of every step of four is replayed, before and after."""
    old = numbered(60, seed=7)
    trainer = run(tmp_path, callback(), ReplayCallback(old, ratio=0.25), max_steps=-1, num_train_epochs=1)
    trainer.train()
    plan, steps = trainer.plugin_run.plan, trainer.state.max_steps
    names = [source.name for source in plan.sources]
    assert names == ["conditioned", "plain", "replay"]
    boundary = next(phase.start for phase in plan.phases if phase.name == "cooldown")
    source = plan.draws(0, steps * 4).source.reshape(steps, 4)
    assert ((source == 2).sum(axis=1) == 1).all()
    assert (source[: boundary // 4] != 1).all() and (source[boundary // 4 :] != 0).all()
    counts = trainer.plugin_run.realised()
    assert counts["replay"]["samples"] == steps and counts["plain"]["samples"] == 3 * (steps - boundary // 4)
    # Compute-equivalent replay leaves a part of the pool over: no plain document is seen twice.
    assert max(plan.passes(steps * 4)[:2]) <= 1


@pytest.mark.parametrize("mode", ["equivalent", "additional"])
@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_replay_at_other_ratios(mode: str, ratio: float, tmp_path: Path) -> None:
    """Counts of the run stay within a sample and a half of their share, where a third source comes in on the way."""
    replay = ReplayCallback(numbered(60, seed=7), ratio=ratio, mode=mode)
    plan = run(tmp_path, callback(), replay, max_steps=-1, num_train_epochs=1).plugin_run.build_plan()
    replayed = plan.draws(0, plan.epoch // 4 * 4).source == 2
    for end in range(4, len(replayed), 4):
        assert abs(replayed[:end].sum() - ratio * end) < 1.5


def test_mixed_throughout(tmp_path: Path) -> None:
    watch = Watch()
    trainer = run(tmp_path, callback(schedule="mixed"), watch, max_steps=8)
    trainer.train()
    for step in range(8):
        plain = sum(
            not TOKENIZER.decode(ids[:5]).replace(" ", "").startswith("a.io")
            for b in watch.steps[step]
            for ids in b["input_ids"]
        )
        assert plain == 1
    assert trainer.plugin_run.plan.phases == ()


def test_no_cooldown(tmp_path: Path) -> None:
    trainer = run(tmp_path, callback(cooldown=0), max_steps=4)
    trainer.train()
    assert list(trainer.plugin_run.realised()) == ["conditioned"]


@pytest.mark.parametrize(("cooldown", "steps"), [(3, 3), ("25%", 3), ("2 steps", 2), ("384 tokens", 3)])
def test_the_cooldown_as_a_length(cooldown: Any, steps: int, tmp_path: Path) -> None:
    plan = run(tmp_path, callback(cooldown=cooldown), max_steps=12).plugin_run.build_plan()
    assert plan.phases[-1].start == (12 - steps) * 4


def test_resume_inside_the_cooldown_in_the_same_process(tmp_path: Path) -> None:
    """Bit for bit, also from a checkpoint before the boundary."""
    whole = run(tmp_path / "whole", callback(), max_steps=8, dropout=0.1, save_strategy="steps", save_steps=5)
    whole.train()
    for step in (5,):
        again = run(tmp_path / "again", callback(), max_steps=8, dropout=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert tiny.same_weights(whole, again)
    other = run(tmp_path / "other", callback(cooldown=0.5), max_steps=8, dropout=0.1)
    with pytest.raises(ValueError, match=r"plugins.metadata.cooldown: 0.25 → 0.5"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))


def test_the_template_is_saved_with_the_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, callback(), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        template = Template.load(folder)
        assert template.format(domain="a.io") == HEAD
    config = AutoConfig.from_pretrained(tmp_path / "final")
    assert config.metadata_template["text"] == "{domain} "


def test_the_trace_tells_what_was_done(tmp_path: Path) -> None:
    trainer = run(tmp_path, callback(), max_steps=12)
    trainer.train()
    events = list(read_trace(tmp_path))
    report = next(event for event in events if event["event"] == "metadata")
    assert report["boundary"] == 9 and report["conditioned"]["documents"] + report["plain"]["documents"] == 200
    assert next(event["step"] for event in events if event["event"] == "cooldown") == 9
    lines = "\n".join(trainer.plugin_run.plugins[0].describe())
    assert "conditioned in steps 0 to 8: 36 samples, 1,152 tokens" in lines and "plain in steps 9 to 11" in lines
    assert "cooldown" in str(trainer.preview()) and json.dumps(trainer.plugin_run.plugins[0].settings())


# Streams


def test_a_stream_gives_the_blocks_of_a_dataset() -> None:
    documents = numbered(50)
    for given in ({}, {"overflow": "discard"}, {"isolate": False}, {"conditioned": False, "plain": 1}):
        stream = BlockStream(documents.to_iterable_dataset(), TOKENIZER, 32, "{domain} ", **given)
        found = []
        with pytest.raises(StreamError, match="ran dry after"):
            found.extend(stream)
        given.pop("plain", None)
        rows = prepare(documents, TOKENIZER, 32, "{domain} ", **given)
        blocks = []
        with pytest.raises(StreamError):
            for block in stream:
                blocks.append(block)
        assert {key: [block[key] for block in blocks] for key in rows.column_names} == rows.to_dict()


def test_a_stream_is_split_by_text(tmp_path: Path) -> None:
    watch = Watch()
    data = numbered(300).to_iterable_dataset(num_shards=3)
    trainer = run(tmp_path, callback(), watch, data=data, max_steps=12)
    trainer.train()
    pieces = {step: watch.texts(step) for step in range(12)}
    assert all(text.startswith(HEAD) for step in range(9) for text in pieces[step])
    numbers = [
        {n for step in steps for text in pieces[step] if (n := text.removeprefix(HEAD)[:3]).isdigit()}
        for steps in (range(9), range(9, 12))
    ]
    assert min(map(len, numbers)) > 5 and not numbers[0] & numbers[1]


def test_a_stream_that_runs_dry_is_an_error(tmp_path: Path) -> None:
    trainer = run(tmp_path, callback(), data=numbered(30).to_iterable_dataset(), max_steps=12)
    with pytest.raises(StreamError, match=r"ran dry after \d+ conditioned blocks.*Pass a longer stream"):
        trainer.train()


# SFTTrainer


def sft(folder: Path, data: Any, *callbacks: Any, collator: Any = None, **given: Any) -> SFTTrainer:
    arguments = {
        **{k: v for k, v in tiny.arguments(folder).to_dict().items() if k in ("max_steps", "learning_rate", "seed")},
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        tiny.CHECKPOINTING: False,
    }
    return SFTTrainer(
        model=tiny.model(),
        args=SFTConfig(**{**arguments, **given}),
        train_dataset=data,
        processing_class=TOKENIZER,
        data_collator=collator or PackedCollator(),
        callbacks=list(callbacks),
    )


SKIP: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "max_length": None}


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_sft_trains_on_prepared_blocks(tmp_path: Path) -> None:
    """The columns that survive there are input_ids, labels and seq_lengths; losses are the Trainer's."""
    rows = prepare(numbered(200), TOKENIZER, 32, "{domain} ")
    theirs = sft(tmp_path / "sft", rows, **SKIP)
    batch = next(iter(theirs.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids"} and (batch["labels"] == -100).any()
    theirs.train()
    ours = tiny.trainer(tmp_path / "ours", data=rows, data_collator=PackedCollator(), processing_class=TOKENIZER)
    ours.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-5)


def test_sft_with_the_callback(tmp_path: Path) -> None:
    theirs = extend(
        sft(tmp_path / "sft", numbered(200), callback(), ReplayCallback(numbered(60, 7), ratio=0.25), **SKIP)
    )
    theirs.train()
    ours = run(tmp_path / "ours", callback(), ReplayCallback(numbered(60, 7), ratio=0.25))
    ours.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-5)
    assert theirs.plugin_run.realised() == ours.plugin_run.realised()


def test_sft_that_packed_already_is_refused_with_advice(tmp_path: Path) -> None:
    packed = SFTTrainer(
        model=tiny.model(),
        args=SFTConfig(output_dir=str(tmp_path), packing=True, max_length=32, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=numbered(50),
        processing_class=TOKENIZER,
        callbacks=[callback()],
    )
    with pytest.raises(PluginError, match=r"tokenized already.*skip_prepare_dataset.*metadata\.prepare") as refusal:
        extend(packed)
    assert "data_collator=PackedCollator()" in str(refusal.value)


# What is refused


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )


def test_a_model_that_leaks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="lets documents of a packed row influence each other"):
        run(tmp_path, callback(), model=opt())
    with pytest.raises(PluginError, match="lets documents of a packed row influence each other"):
        run(tmp_path, callback(), model=opt(), data=numbered(100).to_iterable_dataset())
    run(tmp_path, callback(isolate=False), model=opt(), max_steps=4).train()


def bert() -> RobertaForMaskedLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return RobertaForMaskedLM(RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=66))


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_positions_trains_on_documents_that_are_not_isolated(stream: bool, tmp_path: Path) -> None:
    rows = numbered(200).to_iterable_dataset() if stream else numbered(200)
    given: dict[str, Any] = {"model": mamba(), "data": rows}
    with pytest.raises(PluginError, match=r"MambaForCausalLM takes no position_ids.*default_data_collator"):
        run(tmp_path, callback(isolate=False), **given)
    watched: list[tuple[str, ...]] = []
    trainer = run(tmp_path, callback(isolate=False), **given, data_collator=default_data_collator)
    trainer.model.register_forward_pre_hook(lambda m, a, k: watched.append(tuple(k)) or None, with_kwargs=True)
    trainer.train()
    assert {"input_ids", "labels"} <= set(watched[-1]) and "position_ids" not in watched[-1]


def test_a_model_that_reads_what_it_is_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="RobertaForMaskedLM is no causal language model"):
        run(tmp_path, callback(isolate=False), model=bert())


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"processing_class": None}, "the Trainer has no tokenizer"),
    ({}, {"data_collator": default_data_collator}, "data_collator is a function, which does not keep documents"),
    (
        {"isolate": False},
        {"data_collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=False)},
        "data_collator is a DataCollatorForLanguageModeling, which may make labels of its own",
    ),
    ({}, {"data": tiny.rows(40)}, r"tokenized already \(columns \['input_ids', 'labels'\]\)"),
    ({}, {"data": [{"text": "a", "url": "b"}]}, r"dataset must be a datasets\.Dataset, got list"),
    ({}, {"data": Dataset.from_dict({"text": ["a"]})}, r"takes the columns \['url'\]"),
    ({}, {"data": numbered(1)}, "too few for two views"),
    ({}, {"data": Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()}, r"row 0 of the stream has no \['url'\]"),
    ({"text_column": "body"}, {}, "text_column='body' is no column"),
    ({"cooldown": 6}, {}, "cooldown=6 is 6 of 6 steps. Leave some"),
    ({"cooldown": 0.01}, {}, "cooldown=0.01 is less than one of 6 steps"),
    ({"missing": "error"}, {"data": Dataset.from_dict({"text": ["ab"] * 9, "url": [None] * 9})}, "has no value for"),
    ({"block_size": 7}, {}, "more than half of a block of 7"),
]


@pytest.mark.parametrize(("settings_", "given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_said_before_training(
    settings_: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=message):
        run(tmp_path, callback(**settings_), **given)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "late"}, "schedule must be one of .*, got 'late'"),
    ({"cooldown": -1}, "cooldown must be an int"),
    ({"cooldown": 1.0}, "cooldown must be an int .*got 1.0"),
    ({"cooldown": 3, "schedule": "mixed"}, "cooldown must be a fraction with schedule='mixed'"),
    ({"drop": 1.5}, "drop must be the share"),
    ({"overflow": None}, "overflow must be one of"),
    ({"missing": "skip"}, "missing must be one of"),
    ({"constant": "a\nb"}, "constant must be a short line"),
    ({"template": 3}, "template must be a string or a Template, got 3"),
    ({"template": Template("{a}"), "missing": "plain"}, "missing beside a Template"),
    ({"block_size": 0}, "block_size must be an integer"),
    ({"text_column": 3}, "text_column must be the name of a column, got 3"),
    ({"columns": {"other": "x"}}, r"columns has \['other'\]"),
    ({"isolate": None}, "isolate must be True or False"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**given)


def test_a_plan_of_another_seed_reserves_other_documents(tmp_path: Path) -> None:
    pools = []
    for seed in (1, 2):
        trainer = run(tmp_path / str(seed), callback(), plan=PlanConfig(seed=seed), max_steps=12)
        pools.append(trainer.plugin_run.build_plan().sources[1].dataset["input_ids"])
    assert pools[0] != pools[1]


def test_held_out_documents_become_plain_blocks(tmp_path: Path) -> None:
    plugins = settings.make(("metadata", "forgetting-documents"))
    trainer = extend(tiny.trainer(tmp_path, *plugins, **settings.trainer_for(("metadata",))))
    trainer.train()
    assert any("eval_old_loss" in line for line in tiny.history(trainer))
