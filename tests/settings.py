"""One row a plug-in: the generic matrices run over these rows, so a new plug-in gets all of them by adding its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from peft import LoraConfig, get_peft_model

from hf_pretrain_ext import PackedCollator, TrainerPlugin
from hf_pretrain_ext.callbacks import (
    BenchmarkCallback,
    BufferCallback,
    ForgettingCallback,
    GradNormLoRPCallback,
    L2InitCallback,
    MetadataCallback,
    MetaTokensCallback,
    ReplayCallback,
    ReptileCallback,
    RewarmCallback,
    SelfDistillationCallback,
)
from hf_pretrain_ext.metadata import ControlTokens


@dataclass(frozen=True)
class Row:
    """How the matrices use a plug-in.

    Args:
        name: of the row.
        make: the plug-in at work.
        neutral: the plug-in at settings that change nothing, or None if it never changes anything.
        neutral_arguments: TrainingArguments that the neutral comparison needs.
        wraps_plan: whether it decides the data order.
        observer: whether it only measures.
        varied: the plug-in at other settings, which must give another result; empty for observers.
        trainer: what `tiny.trainer` needs for it, where that is not its tokenized rows.
    """

    name: str
    make: Callable[[], TrainerPlugin]
    neutral: Callable[[], TrainerPlugin] | None = None
    neutral_arguments: dict[str, Any] = field(default_factory=dict)
    wraps_plan: bool = False
    observer: bool = False
    varied: tuple[Callable[[], TrainerPlugin], ...] = ()
    trainer: Callable[[], dict[str, Any]] = dict


LM_EVAL_TASKS = Path(__file__).parent / "lm_eval_tasks"


def old_data() -> Any:
    return tiny.rows(50, seed=9)


def padded_data() -> Any:
    """Blocks with a column that says how many of their tokens count, as rows padded beforehand have it."""
    return old_data().add_column("length", [1 + 7 * number % 16 for number in range(50)])


def stream(seed: int = 9) -> Any:
    return tiny.rows(50, seed=seed).to_iterable_dataset(num_shards=4)


def raw_documents(number: int = 40) -> dict[str, Any]:
    return {
        "data": tiny.documents(number),
        "processing_class": tiny.tokenizer(),
        "data_collator": PackedCollator(),
    }


def scored_documents(number: int = 40, lacking: bool = False) -> Any:
    """Raw documents with a score each; every fifth lacks it if `lacking`."""
    scores = [None if lacking and row % 5 == 0 else 7 * row % 10 / 10 for row in range(number)]
    return tiny.documents(number).add_column("score", scores)


def thirds(text: str) -> list[str]:
    """A text in segments of three letters."""
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def scored(rows: int) -> dict[str, Any]:
    return {**raw_documents(), "data": scored_documents(), "model": tiny.model(0.1, vocabulary=rows)}


def control(template: str | None = None, tokens: dict[str, Any] | None = None, **given: Any) -> MetadataCallback:
    made = ControlTokens(**{"thresholds": 0.5, "drop": 0.2, **(tokens or {})})
    return MetadataCallback(template, **{"block_size": 16, "cooldown": "34%", "control": made, **given})


def metadata(template: str = "{domain} ", **given: Any) -> MetadataCallback:
    return MetadataCallback(template, **{"block_size": 16, "cooldown": "34%", **given})


def full_tokenizer() -> dict[str, Any]:
    """A tokenizer with a token for every embedding of the tiny model: a new one needs a new row."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<u{number}>" for number in range(tiny.VOCABULARY - len(tokenizer))])
    return {"processing_class": tokenizer}


def meta_tokens(**given: Any) -> MetaTokensCallback:
    return MetaTokensCallback(**{"fraction": 0.25, **given})


def adapted() -> dict[str, Any]:
    """A model with a LoRA adapter."""
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    return {**full_tokenizer(), "model": get_peft_model(tiny.model(0.1), config)}


def dora() -> LoraConfig:
    return LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=True)


ROWS = [
    Row(
        "rewarm",
        make=lambda: RewarmCallback(peak_lr=1e-2, warmup=2),
        neutral=lambda: RewarmCallback(peak_lr=1e-2, warmup=0, min_lr="100%", allow_no_effect=True),
        neutral_arguments={"lr_scheduler_type": "constant"},
        varied=(
            lambda: RewarmCallback(peak_lr=5e-3, warmup=2),
            lambda: RewarmCallback(peak_lr=1e-2, warmup=3),
            lambda: RewarmCallback(peak_lr=1e-2, warmup=2, min_lr="50%"),
        ),
    ),
    Row(
        "replay",
        make=lambda: ReplayCallback(old_data(), ratio=0.25),
        neutral=lambda: ReplayCallback(old_data(), ratio=0, allow_no_effect=True),
        wraps_plan=True,
        varied=(
            lambda: ReplayCallback(old_data(), ratio=0.5),
            lambda: ReplayCallback(old_data(), ratio=0.25, order="original"),
            lambda: ReplayCallback(tiny.rows(50, seed=10), ratio=0.25),
        ),
    ),
    Row(
        "replay-additional",
        make=lambda: ReplayCallback(old_data(), ratio=0.2, mode="additional", order="original"),
        wraps_plan=True,
        varied=(lambda: ReplayCallback(old_data(), ratio=0.4, mode="additional", order="original"),),
    ),
    Row(
        "replay-mixture",
        make=lambda: ReplayCallback(
            {"old": old_data(), "older": tiny.rows(7, seed=11)},
            ratio=0.25,
            weights={"old": 2, "older": 1},
            ratio_changes={1: 0.5, "60%": 0.125},
        ),
        neutral=lambda: ReplayCallback(
            {"old": old_data(), "older": tiny.rows(7, seed=11)}, ratio=0, allow_no_effect=True
        ),
        wraps_plan=True,
        varied=(
            lambda: ReplayCallback(
                {"old": old_data(), "older": tiny.rows(7, seed=11)},
                ratio=0.25,
                weights={"old": 1, "older": 2},
                ratio_changes={1: 0.5, "60%": 0.125},
            ),
            lambda: ReplayCallback(
                {"old": old_data(), "older": tiny.rows(7, seed=11)},
                ratio=0.25,
                weights={"old": 2, "older": 1},
                ratio_changes={1: 0.375, "60%": 0.125},
            ),
        ),
    ),
    Row(
        "replay-tokens",
        make=lambda: ReplayCallback(padded_data(), ratio=0.25, unit="tokens"),
        wraps_plan=True,
        varied=(lambda: ReplayCallback(padded_data(), ratio=0.25),),
    ),
    Row(
        "replay-stream",
        make=lambda: ReplayCallback(stream(), ratio=0.25),
        neutral=lambda: ReplayCallback(stream(), ratio=0, allow_no_effect=True),
        wraps_plan=True,
        varied=(lambda: ReplayCallback(stream(seed=10), ratio=0.25),),
    ),
    Row(
        "replay-shuffled-stream",
        make=lambda: ReplayCallback(stream().shuffle(seed=1, buffer_size=6), ratio=0.25),
        wraps_plan=True,
        varied=(lambda: ReplayCallback(stream().shuffle(seed=2, buffer_size=6), ratio=0.25),),
    ),
    Row(
        "reptile",
        make=lambda: ReptileCallback(every=2, epsilon=0.5),
        neutral=lambda: ReptileCallback(every=2, epsilon=1, allow_no_effect=True),
        varied=(
            lambda: ReptileCallback(every=3, epsilon=0.5),
            lambda: ReptileCallback(every=2, epsilon=0.25),
        ),
    ),
    Row(
        "gradnormlorp",
        make=lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2),
        varied=(
            lambda: GradNormLoRPCallback(rank=5, update_proj_gap=2),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=3),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, scale=0.5),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, norm="in"),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, norm=None),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, on_refresh="keep"),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, on_refresh="reset"),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, tangential=True),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, projector_bits=32),
            lambda: GradNormLoRPCallback(rank=4, update_proj_gap=2, target_modules=["q_proj", "down_proj"]),
        ),
    ),
    Row(
        "gradnormlorp-dora",
        make=lambda: GradNormLoRPCallback(rank=2, update_proj_gap=2, adapter=dora()),
        varied=(lambda: GradNormLoRPCallback(rank=3, update_proj_gap=2, adapter=dora()),),
    ),
    Row(
        "metadata",
        make=metadata,
        wraps_plan=True,
        trainer=raw_documents,
        varied=(
            lambda: metadata(cooldown=1),
            lambda: metadata(cooldown=0),
            lambda: metadata("{url_suffix} "),
            lambda: metadata(drop=0.5),
            lambda: metadata(overflow="discard"),
            lambda: metadata(isolate=False),
            lambda: metadata(block_size=17),
        ),
    ),
    Row(
        "metadata-mixed",
        make=lambda: metadata(schedule="mixed", cooldown=0.25),
        wraps_plan=True,
        trainer=raw_documents,
        varied=(metadata, lambda: metadata(schedule="mixed", cooldown=0.5)),
    ),
    Row(
        "metadata-stream",
        make=metadata,
        wraps_plan=True,
        trainer=lambda: {**raw_documents(), "data": tiny.documents(80).to_iterable_dataset(num_shards=4)},
        varied=(lambda: metadata(cooldown=1), lambda: metadata(drop=0.5)),
    ),
    Row(
        # Of the tokenizer's 43 tokens the model has rows for 64.
        "metadata-control",
        make=control,
        wraps_plan=True,
        trainer=lambda: scored(64),
        varied=(
            lambda: control(cooldown=0),
            lambda: control("{domain} "),
            lambda: control(tokens={"thresholds": 0.3}),
            lambda: control(tokens={"thresholds": [0.3, 0.5], "tokens": ["<|a|>", "<|b|>", "<|c|>"]}),
            lambda: control(tokens={"drop": 0.0}),
            lambda: control(tokens={"segments": thirds}),
            lambda: control("{domain} ", tokens={"loss": True}),
        ),
    ),
    Row(
        # Of the tokenizer's 43 tokens the model has rows for no more.
        "metadata-segments",
        make=lambda: control("{domain} ", tokens={"segments": thirds}),
        wraps_plan=True,
        trainer=lambda: scored(43),
        varied=(lambda: control("{domain} "), lambda: control(tokens={"segments": thirds})),
    ),
    Row(
        "meta_tokens",
        make=meta_tokens,
        neutral=lambda: meta_tokens(fraction=0, allow_no_effect=True),
        wraps_plan=True,
        trainer=full_tokenizer,
        varied=(
            lambda: meta_tokens(fraction=0.5),
            lambda: meta_tokens(attention=False),
            lambda: meta_tokens(rope="off"),
            lambda: meta_tokens(positions="every_n"),
            lambda: meta_tokens(positions="boundaries"),
            lambda: meta_tokens(positions="boundaries", boundaries=["a", "<u5>"]),
            lambda: meta_tokens(length="fixed"),
            lambda: meta_tokens(train="meta"),
            lambda: meta_tokens(meta_attention={"init": "normal"}),
            lambda: meta_tokens(meta_attention={"seed": 7}),
        ),
    ),
    Row("meta_tokens-row", make=lambda: meta_tokens(attention=False, train="meta"), trainer=full_tokenizer),
    Row("meta_tokens-meta", make=lambda: meta_tokens(train="meta", length="fixed"), trainer=full_tokenizer),
    Row("meta_tokens-lora", make=lambda: meta_tokens(train="meta"), trainer=adapted),
    Row(
        "l2_init",
        make=lambda: L2InitCallback(strength=2.0),
        neutral=lambda: L2InitCallback(strength=0, allow_no_effect=True),
        varied=(lambda: L2InitCallback(strength=3.0),),
    ),
    Row(
        "self_distillation",
        make=lambda: SelfDistillationCallback(weight=2.0),
        neutral=lambda: SelfDistillationCallback(weight=0, allow_no_effect=True),
        varied=(
            lambda: SelfDistillationCallback(weight=1.0),
            lambda: SelfDistillationCallback(weight=2.0, match="features"),
            lambda: SelfDistillationCallback(weight=2.0, teacher=tiny.model(seed=5)),
        ),
    ),
    Row(
        "self_distillation-features",
        make=lambda: SelfDistillationCallback(match="features"),
        varied=(lambda: SelfDistillationCallback(match="features", weight=0.5),),
    ),
    Row("buffer", make=lambda: BufferCallback(max_bytes="1 MiB"), observer=True),
    Row(
        "benchmarks",
        make=lambda: BenchmarkCallback("letters", include_path=LM_EVAL_TASKS),
        observer=True,
        trainer=lambda: {"processing_class": tiny.tokenizer()},
    ),
    Row("forgetting", make=lambda: ForgettingCallback({"old": tiny.rows(10, seed=9)}, every=2), observer=True),
]

# Beside "metadata", which makes blocks of their documents.
BESIDE_METADATA = [
    Row("replay-documents", make=lambda: ReplayCallback(tiny.documents(30, seed=9), ratio=0.25)),
    Row("forgetting-documents", make=lambda: ForgettingCallback({"old": tiny.documents(9, seed=8)}, every=2)),
]

TOGETHER = ("rewarm", "replay", "forgetting")


def by_name(name: str) -> Row:
    return next(row for row in [*ROWS, *BESIDE_METADATA] if row.name == name)


def make(names: tuple[str, ...]) -> list[TrainerPlugin]:
    return [by_name(name).make() for name in names]


def trainer_for(names: tuple[str, ...]) -> dict[str, Any]:
    """What `tiny.trainer` needs for these plug-ins together."""
    return {key: value for name in names for key, value in by_name(name).trainer().items()}
