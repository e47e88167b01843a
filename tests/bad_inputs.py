"""What users get wrong, one row a mistake, with the error that they are to see; `test_bad_inputs.py` runs the rows.

A row's `prepare` is given an empty folder, makes there what the mistake needs (a recipe, a checkpoint, a Trainer) and
returns the mistake itself: a call that has to raise `error` with `text` in its message, raised by a line of this
package, with nothing changed outside `folder / "output"`. Where the call is `extend`, the Trainer must be untouched.

A check without a row can be lost without anybody noticing: a new check comes with its row.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import settings
import tiny
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
)

from hf_pretrain_ext import (
    PackedCollator,
    PlanConfig,
    PluginError,
    SamplePlan,
    Source,
    TrainerPlugin,
    check_isolation,
    extend,
    pack,
    read_trace,
)
from hf_pretrain_ext.buffer import BufferWriter, ReplayBuffer, ReplayBufferError
from hf_pretrain_ext.callbacks import (
    BenchmarkCallback,
    BufferCallback,
    ForgettingCallback,
    L2InitCallback,
    MetadataCallback,
    MetaTokensCallback,
    ReplayCallback,
    RewarmCallback,
    SelfDistillationCallback,
)
from hf_pretrain_ext.checkpoint import STATE_FOLDER, CheckpointError, read_state, resolve, write_state
from hf_pretrain_ext.data import sample_rows
from hf_pretrain_ext.demo.tokenizer import blocks, encode_documents, train_tokenizer
from hf_pretrain_ext.loader import PlanCollator
from hf_pretrain_ext.meta_tokens.insertion import insert
from hf_pretrain_ext.meta_tokens.rows import with_meta_tokens
from hf_pretrain_ext.metadata import ControlTokens, condition
from hf_pretrain_ext.metadata.inference import prompt_ids
from hf_pretrain_ext.plan import Phase, Segment
from hf_pretrain_ext.recipe import RecipeError, load_recipe
from hf_pretrain_ext.reload import load_converted
from hf_pretrain_ext.report.html import report
from hf_pretrain_ext.schedules import RewarmConfig, cosine
from hf_pretrain_ext.streams import StreamError, StreamMark, StreamReader
from hf_pretrain_ext.vocabulary import add_tokens, fit_embeddings

CATEGORIES = ("settings", "recipes", "datasets", "tokenizers", "checkpoints")
MANIFEST, STATE_FILE = f"{STATE_FOLDER}/manifest.json", f"{STATE_FOLDER}/state.json"

Act = Callable[[], Any]
Prepare = Callable[[Path], Act]


class Row(NamedTuple):
    category: str
    name: str
    prepare: Prepare
    error: type[Exception]
    text: str


ROWS: list[Row] = []


def add(category: str, error: type[Exception], *rows: tuple[str, Prepare, str]) -> None:
    ROWS.extend(Row(category, name, prepare, error, text) for name, prepare, text in rows)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Prepare:
    """A mistake that needs no folder."""
    return lambda folder: partial(function, *args, **kwargs)


def extending(*make: Callable[[], Any], plan: Any = None, on_nonfinite: Any = None, **arguments: Any) -> Prepare:
    """`extend` of a Trainer with `arguments`, and plug-ins made anew."""

    def prepare(folder: Path) -> Act:
        given = {name: value() if name == "data" and callable(value) else value for name, value in arguments.items()}
        trainer = tiny.trainer(folder / "output", **given)
        return partial(extend, trainer, *(each() for each in make), plan=plan, on_nonfinite=on_nonfinite)

    return prepare


def replaying(old: Any = None, *, data: Any = None, plan: Any = None, **arguments: Any) -> Prepare:
    """`extend` with a ReplayCallback; `old` and `data` are functions that give datasets."""
    own = {name: arguments.pop(name) for name in ("weights", "ratio_changes", "unit", "mode") if name in arguments}
    ratio = arguments.pop("ratio", 0.25)
    return extending(
        lambda: ReplayCallback((old or old_rows)(), ratio=ratio, **own), plan=plan, data=data or new_rows, **arguments
    )


def probing(held_out: Callable[[], Any], **arguments: Any) -> Prepare:
    """`extend` with a ForgettingCallback over the set "old"."""
    return extending(lambda: ForgettingCallback({"old": held_out()}), **arguments)


def new_rows(number: int = 40, **kwargs: Any) -> Dataset:
    return tiny.rows(number, seed=1, **kwargs)


def old_rows(number: int = 12, **kwargs: Any) -> Dataset:
    return tiny.rows(number, seed=2, **kwargs)


def stream(number: int = 12) -> Any:
    return old_rows(number).to_iterable_dataset()


# --- settings ---------------------------------------------------------------------------------------

LENGTH = 'warmup must be an int (steps), a float in [0, 1) (fraction of the run) or a string such as "500 steps"'
RATE = 'min_lr must be a learning rate such as 3e-5, or a share of the peak such as "10%"'
RATIO = "ratio must be what is replayed out of all, at least 0 and below 1, got "
INFINITE = "an infinite schedule needs 0 < min_lr <= const_lr <= peak_lr (its exponential anneal cannot reach 0), got "


def rewarm(peak_lr: Any = 1e-2, **kwargs: Any) -> Prepare:
    return call(RewarmCallback, peak_lr, **kwargs)


def forgetting(**kwargs: Any) -> Prepare:
    return call(ForgettingCallback, {"old": []}, **kwargs)


def replay(**kwargs: Any) -> Prepare:
    return call(ReplayCallback, {"wiki": [], "code": []}, **kwargs)


add(
    "settings",
    ValueError,
    ("replay None", call(ReplayCallback, None), "dataset is missing: pass old data, or from_history=True in a stage"),
    (
        "replay of a history and data",
        call(ReplayCallback, [1], from_history=True),
        "dataset and from_history=True are two ways to say what is replayed: pass data={name: ...}",
    ),
    (
        "rewarm that goes on and cannot",
        call(RewarmCallback, 1e-3, go_on=False),
        "go_on=False is a setting of the infinite_* schedules; 'cosine' always re-warms",
    ),
    ("warmup above 1", rewarm(warmup=1.5), f"{LENGTH}, got 1.5: write 1.5 steps as an int"),
    ("warmup negative", rewarm(warmup=-3), f"{LENGTH}, got -3"),
    (
        "warmup with a unit of its own",
        rewarm(warmup="2 parsecs"),
        f"""{LENGTH}, "2%" or "1B tokens", got '2 parsecs'""",
    ),
    ("warmup of parts of a step", rewarm(warmup="1.5 steps"), "a number of steps is whole, got '1.5 steps'"),
    ("warmup of all", rewarm(warmup="100%"), "'100%' is not below 100%"),
    ("warmup None", rewarm(warmup=None), f"{LENGTH}, got None"),
    ("warmup True", rewarm(warmup=True), f"{LENGTH}, got True"),
    (
        "warmup in tokens, run unknown",
        lambda folder: lambda: RewarmConfig(1e-2, warmup="2M tokens").build(100),
        "warmup='2M tokens' is in tokens, but the tokens of a step are not known here: use `extend(trainer)` and data",
    ),
    ("peak_lr zero", rewarm(0), "peak_lr must be a positive learning rate such as 3e-4, got 0"),
    ("peak_lr left out", rewarm(None), "peak_lr must be a positive learning rate such as 3e-4, got None"),
    ("peak_lr as text", rewarm("3e-4"), "peak_lr must be a positive learning rate such as 3e-4, got '3e-4'"),
    ("min_lr negative", rewarm(min_lr=-1e-5), f"{RATE}, got -1e-05"),
    ("min_lr unreadable", rewarm(min_lr="low"), f"{RATE}, got 'low'"),
    ("min_lr above the peak", rewarm(min_lr="200%"), "min_lr 0.02 is above peak_lr 0.01"),
    ("start_lr infinite", rewarm(start_lr=float("inf")), "start_lr must be a learning rate such as 3e-5"),
    ("total_steps zero", rewarm(total_steps=0), "total_steps must be a positive int (optimizer steps), got 0"),
    ("schedule unknown", rewarm(schedule="cosin"), "schedule must be one of ['cosine', 'infinite_cosine'"),
    ("schedule a number", rewarm(schedule=3), "schedule must be a name or a function of the step, got 3"),
    ("decay of a cosine", rewarm(decay=0.2), "decay is an option of schedule wsd, not of 'cosine'"),
    (
        "cooldown of a wsd",
        rewarm(schedule="wsd", cooldown=0.2),
        "cooldown is an option of schedule infinite_cosine or infinite_linear or infinite_rsqrt, not of 'wsd'",
    ),
    ("min_lr 0 of an anneal", rewarm(schedule="infinite_cosine", min_lr=0), f"{INFINITE}min_lr 0, const_lr 0.005"),
    ("const_lr too high", rewarm(schedule="infinite_rsqrt", const_lr=1), f"{INFINITE}min_lr 0.001, const_lr 1"),
    (
        "phases longer than the run",
        call(cosine, total_steps=10, peak_lr=1.0, warmup=10),
        "warmup of 10 steps leaves nothing of a schedule of 10 steps to decay over",
    ),
    ("ratio 1", replay(ratio=1.0), f"{RATIO}1.0"),
    ("ratio in percent", replay(ratio="5%"), f"{RATIO}'5%'"),
    ("ratio None", replay(ratio=None), f"{RATIO}None"),
    ("ratio tiny", replay(ratio=1e-6), "ratio must be 0 or at least 1/65536, the smallest share of a plan, got 1e-06"),
    ("mode", replay(mode="extra"), "mode must be one of ('equivalent', 'additional'), got 'extra'"),
    ("order of replay", replay(order="random"), "order must be one of ('shuffled', 'original'), got 'random'"),
    ("unit", replay(unit="words"), "unit must be one of ('samples', 'tokens'), got 'words'"),
    (
        "weight zero",
        replay(weights={"wiki": 0, "code": 1}),
        "weights['wiki'] must be a positive, finite number, got 0",
    ),
    (
        "weights of others",
        replay(weights={"wiki": 1, "books": 1}),
        "weights must name the datasets ['code', 'wiki'], got ['books', 'wiki']",
    ),
    ("later ratio", replay(ratio_changes={0.5: 2}), "ratio_changes['0.5'] must be what is replayed out of all"),
    (
        "point of a later ratio",
        replay(ratio_changes={"half": 0.1}),
        "ratio_changes must be an int (steps), a float in [0, 1)",
    ),
    (
        "later ratio at the start",
        replay(ratio_changes={0: 0.1}),
        "ratio_changes must hold points after the start, got '0': that is `ratio`",
    ),
    ("weights in a row", replay(weights=[1, 2]), "weights must be a dict, or one as JSON, got [1, 2]"),
    (
        "weights as torn JSON",
        replay(weights='{"wiki": 1'),
        "weights must be a dict, or one as JSON, got '{\"wiki\": 1'",
    ),
    ("weights of none", replay(weights={}), "weights is empty: leave it out"),
    ("later ratios a number", replay(ratio_changes=0.1), "ratio_changes must be a dict, or one as JSON, got 0.1"),
    ("every zero", forgetting(every=0), "every must be at least one step, got 0"),
    ("every unreadable", forgetting(every="often"), "every must be an int (steps), a float in [0, 1)"),
    ("first_steps", forgetting(first_steps="all"), "first_steps must be 'dense' or 'sparse', got 'all'"),
    ("max_samples", forgetting(max_samples=0), "max_samples must be a positive int (rows), got 0"),
    ("batch_size", forgetting(batch_size=2.5), "batch_size must be a positive int (rows), got 2.5"),
    ("alert_if unknown", forgetting(alert_if={"new": 1}), "alert_if: 'new' is not one of the sets ['old']"),
    (
        "stop_if negative",
        forgetting(stop_if={"old": -0.1}),
        "stop_if['old'] must be a positive rise in nats, got -0.1",
    ),
    ("warmup of endless digits", rewarm(warmup="1e-999999999%"), f"""{LENGTH}, "2%" or "1B tokens", got '1e-99"""),
    ("warmup of 5,000 digits", rewarm(warmup="9" * 5000), "got '9999"),
    ("warmup of 400 zeros", rewarm(warmup=10**400), f"{LENGTH}, at most 1e+15 steps, got an int of 401 digits"),
    ("warmup infinite", rewarm(warmup=float("inf")), f"{LENGTH}, got inf"),
    ("warmup not a number", rewarm(warmup=float("nan")), f"{LENGTH}, got nan"),
    ("warmup of endless tokens", rewarm(warmup="1e400 tokens"), "got '1e400 tokens'"),
    ("warmup of too many tokens", rewarm(warmup="1e99 tokens"), "at most 1e+15 steps, got '1e99 tokens'"),
    ("peak_lr endless", rewarm(10**400), "peak_lr must be a positive learning rate such as 3e-4, got an int of 401 d"),
    ("min_lr endless", rewarm(min_lr=10**400), f"{RATE}, got an int of 401 digits"),
    ("min_lr a share of a huge peak", rewarm(1e308, min_lr="900%"), "900% of 1e+308, which is no finite rate"),
    ("total_steps endless", rewarm(total_steps=10**400), "got an int of 401 digits: at most 1e+15"),
    ("start_lr above the peak", rewarm(start_lr=0.5), "start_lr 0.5 is above peak_lr 0.01"),
    ("rewarm.allow_no_effect", rewarm(allow_no_effect="no"), "allow_no_effect must be True or False, got 'no'"),
    (
        "a function and warmup",
        call(RewarmCallback, schedule=abs, warmup=3),
        "a function says all of the rate: leave warm",
    ),
    ("a function and min_lr", call(RewarmCallback, schedule=abs, min_lr=0), "min_lr=0 is a setting of the schedules"),
    ("a function and a peak", call(RewarmCallback, 1e-3, schedule=abs), "peak_lr=0.001 is a setting of the schedules"),
    ("replay.allow_no_effect", replay(allow_no_effect=1), "allow_no_effect must be True or False, got 1"),
    (
        "point of a later ratio, endless",
        replay(ratio_changes={"1e-999999999%": 0.1}),
        "ratio_changes must be an int (steps), a float in [0, 1)",
    ),
    (
        "weight endless",
        replay(weights={"wiki": 10**400, "code": 1}),
        "weights['wiki'] must be a positive, finite number, got an int of 401 digits",
    ),
    (
        "weight infinite",
        replay(weights={"wiki": float("inf"), "code": 1}),
        "weights['wiki'] must be a positive, finite number, got inf",
    ),
    (
        "weights by numbers and text",
        replay(weights={1: 1, "code": 1}),
        "weights must name the datasets ['code', 'wiki']",
    ),
    ("weights of nested JSON", replay(weights="[" * 9999), "weights must be a dict, or one as JSON, got '[[["),
    (
        "alert_if a number",
        forgetting(alert_if=0.3),
        "alert_if must be a dict of rises in nats by set, such as {'gener",
    ),
    ("stop_if a list", forgetting(stop_if=["old"]), "stop_if must be a dict of rises in nats by set"),
    (
        "alert_if endless",
        forgetting(alert_if={"old": 10**400}),
        "alert_if['old'] must be a positive rise in nats, got",
    ),
    ("window as text", call(PlanConfig, window="4"), "window must be an int and lie in 1..32768 draws, got '4'"),
    ("window in parts", call(PlanConfig, window=1.5), "window must be an int and lie in 1..32768 draws, got 1.5"),
    ("window a flag", call(PlanConfig, window=True), "window must be an int and lie in 1..32768 draws, got True"),
    ("seed of the plan", call(PlanConfig, seed="x"), "seed must be an int and lie in -2^63..2^63 - 1, got 'x'"),
    (
        "seed of the plan in parts",
        call(PlanConfig, seed=1.5),
        "seed must be an int and lie in -2^63..2^63 - 1, got 1.5",
    ),
    (
        "seed of the plan endless",
        call(PlanConfig, seed=10**400),
        "seed must lie in -2^63..2^63 - 1, got an int of 401",
    ),
    ("order of the plan", call(PlanConfig, order="random"), "order must be one of ('shuffled', 'original', 'host')"),
    ("window", call(PlanConfig, window=0), "window must lie in 1..32768 draws, got 0"),
    ("on_nonfinite", extending(on_nonfinite="ignore"), "on_nonfinite must be one of ('report', 'stop', 'skip'), got"),
    ("rows of a source", call(Source, "old", 0), "source 'old': num_rows must lie in 1..2^62, got 0"),
    ("order of a source", call(Source, "old", 3, order="up"), "source 'old': order must be one of ('shuffled',"),
    (
        "lengths of a source",
        call(Source, "old", 3, lengths=np.array([1, 2])),
        "source 'old': lengths must hold a number of tokens for each of its 3 rows, got shape (2,)",
    ),
    ("no sources", call(SamplePlan, ()), "a plan needs 1 to 255 sources, got 0"),
    (
        "sources of one name",
        call(SamplePlan, (Source("a", 1), Source("a", 2))),
        "names must be distinct, got ['a', 'a']",
    ),
    ("stream without an epoch", call(SamplePlan, (Source("a", None),)), "with a stream first, it must be given"),
    ("window of a plan", call(SamplePlan, (Source("a", 1),), window=0), "window must lie in 1..32768 draws, got 0"),
    ("unit of a plan", call(SamplePlan, (Source("a", 1),), unit="words"), "unit must be one of ('samples', 'tokens')"),
    (
        "tokens without lengths",
        call(SamplePlan, (Source("a", 1),), unit="tokens"),
        "source 'a': shares in tokens need `lengths` that are not all 0",
    ),
    (
        "phases that overlap",
        lambda folder: lambda: SamplePlan((Source("a", 9),)).with_phase("x", 0, 5).with_phase("y", 3, 8),
        "phases must be disjoint, in order and not empty, got",
    ),
    (
        "first segment late",
        call(SamplePlan, (Source("a", 9),), (Segment(3, (1,)),)),
        "the first segment must start at draw 0, got 3",
    ),
    (
        "segments that were not there",
        lambda folder: lambda: SamplePlan((Source("a", 9),)).with_segments((Segment(0, (2,)),)),
        "segments can be added at the end only",
    ),
    (
        "too many phases",
        call(SamplePlan, (Source("a", 9),), phases=tuple(Phase("x", n, n + 1) for n in range(256))),
        "a plan has at most 255 phases, got 256",
    ),
    (
        "segment of other sources",
        call(SamplePlan, (Source("a", 9),), (Segment(0, (1, 1)),)),
        "must hold one weight for each of the 1 sources",
    ),
    (
        "segment without weight",
        call(SamplePlan, (Source("a", 9),), (Segment(0, (0,)),)),
        "must hold non-negative weights that sum to 1..65536",
    ),
    (
        "segment inside a window",
        call(SamplePlan, (Source("a", 9),), (Segment(0, (1,)), Segment(3, (2,))), window=2),
        "must start at a multiple of the window of 2 draws",
    ),
    (
        "segments that fall",
        call(SamplePlan, (Source("a", 9),), (Segment(0, (1,)), Segment(0, (2,)))),
        "segments must have rising starts, got 0 then 0",
    ),
    (
        "share of all",
        lambda folder: lambda: SamplePlan((Source("a", 9),)).with_source(Source("b", 9), 1.0),
        "share must lie in [0, 1), one for each of 1 sources and together below 1, got [1.0] from draw 0 on",
    ),
    (
        "shares that begin late",
        lambda folder: lambda: SamplePlan((Source("a", 9),)).with_sources([Source("b", 9)], [(4, [Fraction(1, 2)])]),
        "shares must begin at draw 0, got [4]",
    ),
)


class Toy(TrainerPlugin):
    name = "toy"


class Enemy(TrainerPlugin):
    name, conflicts = "enemy", ("toy",)


class Waits(TrainerPlugin):
    name, after = "waits", ("waited-for",)


class WaitedFor(TrainerPlugin):
    name, after = "waited-for", ("waits",)


class Nameless(TrainerPlugin):
    pass


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()


def on_two_ranks(folder: Path) -> Act:
    """A plug-in that says it cannot: seen by the checks alone, without a second process."""

    class Alone(Toy):
        distributed = {"ddp": "refused: keeps a table of its own"}

    trainer = tiny.trainer(folder / "output")
    trainer.args._n_gpu, trainer.args.distributed_state = 0, SimpleNamespace(num_processes=2, process_index=0)
    return partial(extend, trainer, Alone())


def given_optimizer(rate: float, scheduler: bool = False) -> Prepare:
    def prepare(folder: Path) -> Act:
        model = tiny.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        made = Trainer(
            model=model,
            args=tiny.arguments(folder / "output"),
            train_dataset=new_rows(),
            data_collator=default_data_collator,
            callbacks=[RewarmCallback(1e-2)],
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer) if scheduler else None),
        )
        return partial(extend, made)

    return prepare


def own_optimizer_twice(folder: Path) -> Act:
    class Sgd(TrainerPlugin):
        name = "sgd"

        def optimizer(self, model: Any, args: Any) -> Any:
            return torch.optim.SGD(model.parameters(), lr=args.learning_rate)

    model = tiny.model()
    made = Trainer(
        model=model,
        args=tiny.arguments(folder / "output"),
        train_dataset=new_rows(),
        data_collator=default_data_collator,
        optimizers=(torch.optim.SGD(model.parameters(), lr=1e-2), None),
    )
    return partial(extend, made, Sgd())


def arguments_set(**given: Any) -> Prepare:
    """`extend` of a Trainer whose arguments were changed after its construction, as some loops do."""

    def prepare(folder: Path) -> Act:
        trainer = tiny.trainer(folder / "output")
        for name, value in given.items():
            setattr(trainer.args, name, value)
        return partial(extend, trainer, RewarmCallback(1e-2))

    return prepare


def control(thresholds: Any = 0.5, **given: Any) -> Prepare:
    return call(ControlTokens, thresholds, **given)


def prompting(**given: Any) -> Prepare:
    return lambda folder: partial(prompt_ids, tiny.tokenizer(), "a", **given)


add(
    "settings",
    ValueError,
    ("thresholds that are words", control("low"), "thresholds must be a number or a list of them, got 'low'"),
    (
        "thresholds that fall",
        control([1, 0]),
        "thresholds must be finite numbers, each above the one before, got [1, 0]",
    ),
    ("thresholds without end", control(float("inf")), "thresholds must be a number or a list of them, got inf"),
    (
        "fewer tokens than scores ask for",
        control([0, 1]),
        "tokens must be one more than thresholds: 3 for [0, 1], got",
    ),
    ("scores of no column", control(column=None), "column must be the name of a column of scores, got None"),
    (
        "segments of no kind",
        control(segments=3),
        "segments must be the name of a column, a function that splits texts",
    ),
    (
        "all control tokens dropped",
        control(drop=1.0),
        "drop of ControlTokens must be the share of control tokens that",
    ),
    (
        "a constant for scores",
        control(missing="constant"),
        "missing of ControlTokens must be one of ('plain', 'error')",
    ),
    ("a loss of one half", control(loss=0.5), "loss must be True or False, got 0.5"),
    (
        "control that is a number",
        call(MetadataCallback, block_size=16, control=0.5),
        "control must be ControlTokens, got 0.5",
    ),
    (
        "columns of no template",
        call(MetadataCallback, block_size=16, control=ControlTokens(0.5), columns={"a": "b"}),
        "columns without a template, of which there is none beside control. Pass one",
    ),
)


class SecondSchedule(TrainerPlugin):
    name = "second"

    def schedule(self, args: Any, total_steps: int) -> Any:
        return cosine(total_steps=total_steps, peak_lr=1.0)


add(
    "settings",
    PluginError,
    ("two of a name", extending(Toy, Toy), "toy: is there 2 times. Keep one; concatenate_datasets joins data."),
    ("no name", extending(Nameless), "Nameless: has no name. Set the class attribute `name`."),
    ("conflict", extending(Toy, Enemy), "enemy: cannot run together with toy. Remove one of the two."),
    ("circle", extending(Waits, WaitedFor), "plug-ins wait for each other: ['waited-for', 'waits']"),
    (
        "two schedules",
        extending(lambda: RewarmCallback(1e-2), SecondSchedule),
        "rewarm and second: both own the learning-rate schedule. Keep one of them.",
    ),
    ("plan without use", extending(Toy, plan=PlanConfig(order="host")), "no plug-in decides the order. Leave it out"),
    ("refused on ranks", on_two_ranks, "toy: refused: keeps a table of its own (ddp). Train without it, or on one"),
    (
        "own scheduler",
        given_optimizer(1e-2, scheduler=True),
        "was given its own scheduler (ConstantLR), which would win",
    ),
    ("own optimizer", own_optimizer_twice, "sgd: the Trainer was built with its own optimizer, which would win."),
    (
        "other rate",
        given_optimizer(0.5),
        "the optimizer's groups have the rates [0.5], none of them learning_rate=0.01",
    ),
    (
        "learning_rate zero",
        extending(lambda: RewarmCallback(1e-2), learning_rate=0.0),
        "rewarm: learning_rate=0.0 of the TrainingArguments is the rate that peak_lr scales. Set learning_rate",
    ),
    (
        "warmup longer than the run",
        extending(lambda: RewarmCallback(1e-2, warmup=20)),
        "rewarm: in a run of 6 steps, warmup of 20 steps leaves nothing of a schedule of 6 steps to decay over.",
    ),
    (
        "schedule that gives no rate",
        extending(lambda: RewarmCallback(schedule=lambda step: -1.0)),
        "schedule must give a learning rate for every step, got -1.0 for step 0",
    ),
    (
        "re-warming without effect",
        extending(lambda: RewarmCallback(1e-2, warmup=0, min_lr="100%"), lr_scheduler_type="constant"),
        "rewarm: would change nothing: the rate is 0.01 with and without it. Raise peak_lr, or pass allow_no_effect",
    ),
    ("replay without effect", replaying(ratio=0), "replay: would change nothing with ratio=0. Raise it, or pass"),
    (
        "later ratio after the end",
        replaying(ratio_changes={100: 0.1}),
        "ratio_changes: the ratio of 0.1 would start at step 100, but points must rise and lie between step 0 and the",
    ),
    (
        "later ratio after the epochs",
        replaying(mode="additional", ratio_changes={100: 0.1}, max_steps=-1, num_train_epochs=1),
        "ratio_changes: points must rise and come before the end of the run; those of the ratios 0.1 do not. Change",
    ),
    ("group_by_length", replaying(train_sampling_strategy="group_by_length"), "train_sampling_strategy='group_by_le"),
    ("sequential", replaying(train_sampling_strategy="sequential"), "plan=PlanConfig(order='original')` to `extend`"),
    (
        "batches out of order",
        replaying(dataloader_num_workers=2, dataloader_in_order=False),
        "dataloader_in_order=False hands batches over as workers end them",
    ),
    ("split_batches", replaying(accelerator_config={"split_batches": True}), "split_batches=True changes which rank"),
    ("dispatch_batches", replaying(accelerator_config={"dispatch_batches": True}), "dispatch_batches=True reads all"),
    ("auto_find_batch_size", extending(Toy, auto_find_batch_size=True), "toy: auto_find_batch_size would change the"),
    (
        "batch of nothing",
        arguments_set(per_device_train_batch_size=0),
        "per_device_train_batch_size must be an int of a",
    ),
    ("batch below nothing", arguments_set(per_device_train_batch_size=-1), "must be an int of at least 1, got -1"),
    ("no accumulation", arguments_set(gradient_accumulation_steps=0), "gradient_accumulation_steps must be an int of"),
    ("epochs below 0", arguments_set(max_steps=-1, num_train_epochs=-1), "num_train_epochs must be above 0, got -1"),
    ("steps below -1", arguments_set(max_steps=-7), "max_steps must be at least 1, or -1 to go by epochs, got -7"),
    (
        "learning_rate not a number",
        arguments_set(learning_rate=float("nan")),
        "learning_rate must be a finite rate of",
    ),
    ("own loader", replaying(cls=OwnLoader), "OwnLoader has a get_train_dataloader of its own, which would not be"),
)
add(
    "settings",
    TypeError,
    ("no Trainer", call(extend, "trainer"), "extend needs a transformers.Trainer (or a subclass), got str"),
    (
        "plan a dict",
        extending(plan={"order": "host"}),
        "plan must be a PlanConfig, got {'order': 'host'}. Pass PlanCo",
    ),
    ("no callback", extending(lambda: "rewarm"), "extend takes callbacks after the trainer, got str"),
)


def plain_trainer(folder: Path, *plugins: Any, **arguments: Any) -> Act:
    return tiny.trainer(folder / "output", *plugins, **arguments).train


add(
    "settings",
    RuntimeError,
    (
        "plug-in without extend",
        lambda folder: plain_trainer(folder, ReplayCallback(old_rows())),
        "ReplayCallback needs more than a bare callback can do. Add one line before training",
    ),
    (
        "mixture changed before training",
        lambda folder: partial(extend(tiny.trainer(folder / "output")).plugin_run.change_mixture, {"train": 1}),
        "the mixture can be changed while a run with a sample plan is training, by a plug-in with the class attribute",
    ),
)
add(
    "settings",
    TypeError,
    ("optimizer of nobody", lambda folder: partial(Toy().optimizer, None, None), "Toy does not own the optimizer"),
    ("schedule of nobody", lambda folder: partial(Toy().schedule, None, 9), "Toy does not own the schedule"),
    (
        "plain Trainer with a scheduler of its own",
        lambda folder: plain_trainer(
            folder,
            RewarmCallback(1e-2),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
            eval_dataset=new_rows(4),
        ),
        "RewarmCallback in a plain Trainer needs a LambdaLR scheduler, got ReduceLROnPlateau. Use `extend(trainer)`",
    ),
)

add(
    "settings",
    IndexError,
    (
        "draws that fall",
        lambda folder: partial(SamplePlan((Source("a", 9),)).draws, 5, 3),
        "draws(5, 3): start and stop must be non-negative and in order",
    ),
    (
        "counts before the start",
        lambda folder: partial(SamplePlan((Source("a", 9),)).counts, -1),
        "counts(-1): stop must not be negative",
    ),
)


class Changes(Toy):
    """Changes the mixture after the second step."""

    changes_mixture = True

    def __init__(self, shares: dict[str, float], step: int | None = None):
        self.shares, self.at = shares, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None and state.global_step == 2:
            self.run.change_mixture(self.shares, self.at)


def changing(shares: dict[str, float], step: int | None = None) -> Prepare:
    def prepare(folder: Path) -> Act:
        plugins = (ReplayCallback(old_rows(), ratio=0.25), Changes(shares, step))
        return extend(tiny.trainer(folder / "output", *plugins, data=new_rows())).train

    return prepare


add(
    "settings",
    ValueError,
    ("mixture of others", changing({"train": 1}), "shares must name the sources ['train', 'replay'], got ['train']"),
    ("mixture of the past", changing({"train": 1, "replay": 1}, 1), "earlier ones are handed out already; got 1"),
    (
        "plain Trainer with another rate",
        lambda folder: given_optimizer(0.5)(folder).args[0].train,
        "RewarmCallback: the optimizer's groups have the rates [0.5], none of them learning_rate=0.01",
    ),
)

# --- recipes ----------------------------------------------------------------------------------------

JSONL = {"path": "json", "data_files": "new.jsonl"}


def valid_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe that is right: nothing in it is loaded before `build`."""
    return {
        "model": "my-org/my-model",
        "data": JSONL,
        "pack": {"block_size": 16},
        "training": {"output_dir": "runs/first", "max_steps": 6, "learning_rate": 1e-3},
        "rewarm": {"peak_lr": 1e-3, "warmup": 2},
        "replay": {"sources": {"old": JSONL}, "ratio": 0.25},
        "forgetting": {"sets": {"old": JSONL}, "every": 3},
        **changes,
    }


def recipe(content: str | None = None, *set_: str, **changes: Any) -> Prepare:
    """`load_recipe` of a file with `content`, or of a right recipe with sections changed."""

    def prepare(folder: Path) -> Act:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(valid_recipe(**changes)) if content is None else content, encoding="utf-8")
        return partial(load_recipe, path, set_)

    return prepare


MINIMUM = "data: {path: json}\ntraining: {output_dir: x}"


def raw_recipe(content: bytes) -> Prepare:
    def prepare(folder: Path) -> Act:
        (folder / "recipe.yaml").write_bytes(content)
        return partial(load_recipe, folder / "recipe.yaml")

    return prepare


def with_plan(text: str) -> Prepare:
    """A right recipe with a section `plan` of any text."""
    return recipe(f"{yaml.safe_dump(valid_recipe())}plan: {text}\n")


def bomb(first: str, line: str, levels: int = 30) -> str:
    """A model of aliases of aliases: short as YAML, endless as text."""
    lines = (f"- &a{n} {line.format(n - 1, n - 1)}" for n in range(1, levels))
    return "\n".join(["model:", f"- &a0 {first}", *lines, MINIMUM])


def merges(levels: int = 40) -> str:
    """A section that brings in another twice, which brings in another twice, ..."""
    text = "{k: 1}"
    for level in range(levels):
        text = f"{{<<: [&a{level} {text}, *a{level}]}}"
    return f"plan: {text}"


MERGES_GROW = tuple(map(int, yaml.__version__.split(".")[:3])) < (6, 0, 4)
SECTION = "more than 10,000 settings in one section"


def training(**given: Any) -> Prepare:
    return recipe(training={"output_dir": "runs/first", **given})


def source(**given: Any) -> dict[str, Any]:
    return {"sources": {"old": JSONL}, **given}


add(
    "recipes",
    RecipeError,
    ("no YAML", recipe("model: ["), "recipe.yaml is not YAML: while parsing"),
    ("a list", recipe("- model\n- data"), "recipe.yaml must hold settings by name, got list"),
    ("empty", recipe(""), "recipe.yaml must hold settings by name, got NoneType"),
    ("a key twice", recipe("model: x\ndata: {path: json}\nmodel: y\n"), "recipe.yaml, line 3: 'model' is given twice"),
    (
        "code",
        recipe("model: !!python/object/apply:os.system ['true']"),
        "could not determine a constructor for the tag",
    ),
    ("a section misspelt", recipe(replya={}), "the recipe has no setting 'replya': did you mean 'replay'?"),
    ("a section of nothing", recipe(qqqqq={}), "the recipe has no setting 'qqqqq': known are "),
    ("model missing", recipe("data: {path: json}\ntraining: {output_dir: x}"), "model is missing"),
    ("data missing", recipe("model: x\ntraining: {output_dir: x}"), "data is missing"),
    ("training missing", recipe("model: x\ndata: {path: json}"), "training is missing"),
    ("model a list", recipe(model=["a"]), "model must hold settings by name, got ['a']"),
    ("model without a name", recipe(model={"revision": "main"}), "model.name_or_path is missing: A name on the Hub"),
    (
        "revision a flag",
        recipe(model={"name_or_path": "x", "revision": True}),
        "revision must be str or none, got True",
    ),
    ("data a name", recipe(data="wiki"), "data must hold settings by name, got 'wiki'"),
    (
        "data misspelt",
        recipe(data={"path": "json", "datafiles": "x"}),
        "data has no setting 'datafiles': did you mean",
    ),
    (
        "data_files a flag",
        recipe(data={"path": "json", "data_files": True}),
        "data.data_files must be str or list or no",
    ),
    ("streaming as text", recipe(data={**JSONL, "streaming": "yes"}), "data.streaming must be bool, got 'yes'"),
    ("eval_data", recipe(eval_data={"name": "x"}), "eval_data.path is missing: A dataset on the Hub"),
    ("trainer", recipe(trainer="ppo"), "trainer must be 'trainer' or 'sft', got 'ppo'"),
    (
        "on_nonfinite",
        recipe(on_nonfinite="ignore"),
        "on_nonfinite must be one of ('report', 'stop', 'skip'), got 'ign",
    ),
    ("output_dir missing", recipe(training={"max_steps": 3}), "training.output_dir is missing: it says where"),
    ("training a list", recipe(training=["max_steps"]), "training must hold settings by name, got ['max_steps']"),
    (
        "training misspelt",
        training(learning_rat=1),
        "training has no setting 'learning_rat': did you mean 'learning_ra",
    ),
    ("steps with a unit", training(max_steps="3 steps"), "training.max_steps must be int, got '3 steps'"),
    ("steps a flag", training(max_steps=True), "training.max_steps must be int, got True"),
    ("a flag as a number", training(bf16=1), "training.bf16 must be bool, got 1"),
    ("pack without a size", recipe(pack={"isolate": True}), "pack.block_size is missing: Tokens a block."),
    ("pack misspelt", recipe(pack={"blocksize": 3}), "pack has no setting 'blocksize': did you mean 'block_size'?"),
    ("block_size as text", recipe(pack={"block_size": "many"}), "pack.block_size must be int, got 'many'"),
    (
        "remainder",
        recipe(pack={"block_size": 16, "remainder": "keep"}),
        "pack.remainder must be 'drop' or 'pad', got 'keep'",
    ),
    ("pack for TRL", recipe(trainer="sft"), "pack: SFTTrainer packs by itself; set training.packing and"),
    (
        "plan.order",
        recipe(plan={"order": "random"}),
        "plan.order must be 'shuffled' or 'original' or 'host', got 'rand",
    ),
    ("plan.window", recipe(plan={"window": 100_000}), "plan: window must lie in 1..32768 draws, got 100000"),
    ("rewarm misspelt", recipe(rewarm={"peak": 1e-3}), "rewarm has no setting 'peak': did you mean 'peak_lr'?"),
    ("rewarm without a peak", recipe(rewarm={"warmup": 2}), "rewarm.peak_lr is missing: Learning rate to re-warm to"),
    ("rewarm.peak_lr", recipe(rewarm={"peak_lr": "high"}), "rewarm.peak_lr must be float, got 'high'"),
    ("rewarm.peak_lr negative", recipe(rewarm={"peak_lr": -1.0}), "rewarm: peak_lr must be a positive learning rate"),
    (
        "rewarm.schedule",
        recipe(rewarm={"peak_lr": 1e-3, "schedule": "up"}),
        "rewarm: schedule must be one of ['cosine'",
    ),
    ("rewarm.warmup", recipe(rewarm={"peak_lr": 1e-3, "warmup": 1.5}), f"rewarm: {LENGTH}, got 1.5: write 1.5 steps"),
    ("replay without sources", recipe(replay={"ratio": 0.1}), "replay.sources is missing: name at least one dataset"),
    ("replay a number", recipe(replay=0.05), "replay must hold settings by name, got 0.05"),
    ("sources a list", recipe(replay={"sources": ["old"]}), "replay.sources must hold settings by name, got ['old']"),
    ("source misspelt", recipe(replay={"sources": {"a": {"pth": "x"}}}), "replay.sources.a has no setting 'pth': did"),
    ("replay.ratio", recipe(replay=source(ratio=2)), f"replay: {RATIO}2.0"),
    (
        "replay.mode",
        recipe(replay=source(mode="more")),
        "replay.mode must be 'equivalent' or 'additional', got 'more'",
    ),
    ("replay misspelt", recipe(replay=source(ration=0.1)), "replay has no setting 'ration': did you mean 'ratio'?"),
    (
        "weight of a source",
        recipe(replay={"sources": {"a": {"path": "json", "weight": "half"}}}),
        "weight must be float",
    ),
    ("forgetting without sets", recipe(forgetting={"every": 3}), "forgetting.sets is missing: name at least one"),
    ("forgetting misspelt", recipe(forgetting={"sets": {"a": JSONL}, "evry": 3}), "did you mean 'every'?"),
    ("forgetting.every", recipe(forgetting={"sets": {"a": JSONL}, "every": 0}), "forgetting: every must be at least"),
    (
        "a change without a value",
        recipe(None, "training.max_steps"),
        "a change reads KEY=VALUE, such as training.max_st",
    ),
    ("a change of no key", recipe(None, "=3"), "a change reads KEY=VALUE, such as training.max_steps=100; got '=3'"),
    (
        "a change inside text",
        recipe(None, "model.name=y"),
        "'model.name=y': model holds 'my-org/my-model', not settings",
    ),
    (
        "bytes that are no text",
        raw_recipe(b"model: \xff\xfe"),
        "cannot be read as a recipe (UnicodeDecodeError: 'utf-8'",
    ),
    ("a folder", lambda folder: partial(load_recipe, folder), "cannot be read as a recipe (IsADirectoryError:"),
    ("NUL in its name", call(load_recipe, "a\0b"), "'a\\x00b' cannot be read as a recipe (ValueError: embedded null"),
    ("a name too long", call(load_recipe, "x" * 5000), "cannot be read as a recipe (OSError: "),
    ("what never ends", call(load_recipe, "/dev/zero"), "/dev/zero has more than 1,048,576 bytes: it is not a recipe"),
    ("an alias bomb", recipe(bomb("[x, x]", "[*a{}, *a{}]")), "model must hold settings by name, got [['x', 'x'], [["),
    # PyYAML itself brings in each setting once, as of 6.0.4.
    ("merges of merges", recipe(merges()), SECTION if MERGES_GROW else "model is missing"),
    ("a key that is a list", recipe("? [a]\n: b\n"), "line 1: a key must be a name or a number, got ['a']"),
    ("!!map of a list", with_plan("!!map [a]"), "what stands there cannot be read as map ("),
    (
        "a day that is not there",
        with_plan("2001-02-30"),
        "'2001-02-30' cannot be read as timestamp (ValueError: day is",
    ),
    ("a number that is none", with_plan("!!int x"), "'x' cannot be read as int (ValueError: invalid literal"),
    ("a flag that is none", with_plan("!!bool x"), "'x' cannot be read as bool (KeyError: 'x')"),
    ("a time that is none", with_plan("!!timestamp x"), "'x' cannot be read as timestamp ("),
    ("a list without end", recipe("[" * 20_000), "recipe.yaml goes too deep: lists in lists, or sections in sections"),
    ("an int of 5,000 digits", training(max_steps=10**4200), "training.max_steps must be int, got an int of 4,201 di"),
    (
        "more digits than Python reads",
        recipe(f"model: {'9' * 5000}\n{MINIMUM}"),
        "cannot be read as int (ValueError: Ex",
    ),
    (
        "an int too large for a float",
        training(learning_rate=10**400),
        "training.learning_rate must be float, got an i",
    ),
    ("a change that is no YAML", recipe(None, "plan=["), "the change 'plan=[' is not YAML: while parsing a flow"),
    ("plan 0", recipe(plan=0), "plan must hold settings by name, got 0"),
    ("pack 0", recipe(pack=0), "pack must hold settings by name, got 0"),
    ("rewarm of nothing", recipe(rewarm={}), "rewarm.peak_lr is missing: Learning rate to re-warm to"),
    ("replay of nothing", recipe(replay=[]), "replay must hold settings by name, got []"),
    ("forgetting switched off", recipe(forgetting=False), "forgetting must hold settings by name, got False"),
    ("eval_data empty", recipe(eval_data=""), "eval_data must hold settings by name, got ''"),
    ("model a number", recipe(model={"name_or_path": 3}), "model.name_or_path must be str, got 3"),
    ("model of no name", recipe(model=""), "model: name_or_path is empty: give a name on the Hub, or a folder"),
    ("data a number", recipe(data={"path": 3}), "data.path must be str, got 3"),
    ("data of no name", recipe(data={"path": ""}), "data: path is empty: give a dataset on the Hub, a folder, or a"),
    ("output_dir a number", recipe(training={"output_dir": 3}), "training.output_dir must be str or none, got 3"),
    ("output_dir empty", recipe(training={"output_dir": ""}), "training.output_dir is empty: it says where"),
    (
        "a file that is a number",
        recipe(data={"path": "json", "data_files": [1]}),
        "data.data_files[0] must be str, got 1",
    ),
    ("block_size 0", recipe(pack={"block_size": 0}), "pack: block_size must be an integer from 2 on, got 0"),
    (
        "pack.seed",
        recipe(pack={"block_size": 16, "seed": -1}),
        "pack: seed must be an integer from 0 on or None, got -1",
    ),
    (
        "pack.num_proc",
        recipe(pack={"block_size": 16, "num_proc": 0}),
        "pack: num_proc must be an integer from 1 on or",
    ),
    (
        "replay.weights of others",
        recipe(replay=source(weights={"new": 1})),
        "replay: weights must name the datasets ['o",
    ),
    (
        "weights twice",
        recipe(replay={"sources": {"old": {**JSONL, "weight": 1}}, "weights": {"old": 1}}),
        "keep one of",
    ),
    (
        "replay changes at 0",
        recipe(replay=source(ratio_changes={0: 0.5})),
        "replay: ratio_changes must hold points aft",
    ),
    (
        "forgetting.alert_if",
        recipe(forgetting={"sets": {"a": JSONL}, "alert_if": 0.3}),
        "forgetting: alert_if must be a",
    ),
    ("a set with a path as name", recipe(forgetting={"sets": {"../a": JSONL}}), "forgetting: datasets: a name holds"),
    (
        "weight of the new data",
        recipe(data={**JSONL, "weight": 2.0}),
        "data.weight means nothing there: only replay.sou",
    ),
    (
        "weight of a set",
        recipe(forgetting={"sets": {"a": {**JSONL, "weight": 1}}}),
        "forgetting.sets.a.weight means not",
    ),
    (
        "batch 0",
        training(per_device_train_batch_size=0),
        "training.per_device_train_batch_size must be an int of at l",
    ),
    ("accumulation 0", training(gradient_accumulation_steps=0), "training.gradient_accumulation_steps must be an int"),
    ("epochs -1", training(num_train_epochs=-1), "training.num_train_epochs must be above 0, got -1.0"),
    (
        "learning_rate nan",
        training(learning_rate=float("nan")),
        "training.learning_rate must be a finite rate of at lea",
    ),
    ("max_steps -7", training(max_steps=-7), "training.max_steps must be at least 1, or -1 to go by epochs, got -7"),
    (
        "dtype",
        recipe(model={"name_or_path": "x", "dtype": "flaot32"}),
        "model: dtype must be 'auto' or a float type of",
    ),
    ("a change misspelt", recipe(None, "rewarm.peak=1"), "rewarm has no setting 'peak': did you mean 'peak_lr'?"),
)


@cache
def saved_model() -> Path:
    """A tiny model with its tokenizer, made once."""
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer, model = words(), tiny.model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def building(content: str = '{"text": "a b a b a b a b a b"}\n', **changes: Any) -> Prepare:
    """`build` of a recipe with a model and data that are there; `{}` in text of a change is the folder."""

    def prepare(folder: Path) -> Act:
        (folder / "new.jsonl").write_text(content)
        data = {"path": "json", "data_files": str(folder / "new.jsonl")}
        arguments = {"output_dir": str(folder / "output"), "max_steps": 1, "report_to": "none", "use_cpu": True}
        recipe: dict[str, Any] = {"model": str(saved_model()), "data": data, "pack": {"block_size": 4}}
        recipe["training"] = {**arguments, **changes.pop("training", {})}
        for section, given in changes.items():
            known = {"model": {"name_or_path": str(saved_model())}, "data": data}.get(section, {})
            recipe[section] = None if given is None else {**known, **given}
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(recipe).replace("{}", str(folder)).replace("@model", str(saved_model()))
        )
        return load_recipe(folder / "recipe.yaml").build

    return prepare


add(
    "recipes",
    RecipeError,
    (
        "raw text without pack",
        building(pack=None),
        "hold ['text'] and no input_ids: add a section `pack: {block_size:",
    ),
    (
        "arguments that the host refuses",
        building(training={"lr_scheduler_type": "cosin"}),
        "training: ValueError: cosin is not a",
    ),
    ("arguments that contradict", building(training={"load_best_model_at_end": True}), "training: ValueError: "),
    (
        "a model that is not there",
        building(model={"name_or_path": "{}/nowhere", "tokenizer": "@model"}),
        "/nowhere', dtype='float32'): ",
    ),
    ("a folder without a tokenizer", building(model={"tokenizer": "{}"}), "model.tokenizer='"),
    (
        "a folder without a model",
        building(model={"name_or_path": "{}", "tokenizer": "@model"}),
        "dtype='float32'): ",
    ),
    ("attention of no kind", building(model={"attn_implementation": "falsh"}), "attn_implementation='falsh'): "),
    (
        "data that is not there",
        building(data={"data_files": "{}/nowhere.jsonl"}),
        "data (path='json', split='train'): File",
    ),
    (
        "a format of no kind",
        building(data={"path": "jsno", "data_files": None}),
        "data (path='jsno', split='train'): ",
    ),
    (
        "a split that is not there",
        building(data={"split": "test"}),
        "data (path='json', split='test'): ValueError: Unkn",
    ),
    ("JSON of nothing", building(""), "data (path='json', split='train'): "),
    (
        "no rows",
        building("text\n", data={"path": "csv"}),
        "data (path='csv', split='train'): ValueError: Instru",
    ),
    (
        "text in another column",
        building(data={"text_column": "body"}),
        "data: ValueError: text_column='body' is no colu",
    ),
    (
        "a stream of texts",
        building(data={"streaming": True}),
        "data.streaming: a stream of texts cannot be packed. Leave",
    ),
    (
        "texts too short",
        building(pack={"block_size": 99}),
        "data: ValueError: block_size=99, but all documents togeth",
    ),
)

# --- datasets ---------------------------------------------------------------------------------------


class Neither:
    """Rows by number, but nobody knows how many."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": [number], "labels": [number]}


def streamed_without_length(folder: Path) -> Act:
    trainer = tiny.trainer(folder / "output", data=stream())
    trainer.args.max_steps = -1
    return partial(extend, trainer, ReplayCallback(old_rows()))


def without_data(folder: Path) -> Act:
    trainer = tiny.trainer(folder / "output")
    trainer.train_dataset = None
    return partial(extend, trainer, ReplayCallback(old_rows()))


def unknown_kind(folder: Path) -> Act:
    trainer = tiny.trainer(folder / "output")
    trainer.train_dataset = Neither()
    return partial(extend, trainer, ReplayCallback(old_rows()))


def raw() -> Dataset:
    return Dataset.from_dict({"text": ["raw"]})


def frame(number: int = 8) -> Any:
    return old_rows(number).to_pandas()


def listed_rows(*ids: Any, **more: Any) -> Callable[[], Dataset]:
    """Rows with `ids` as they are, and labels that are the same unless given."""
    return lambda: Dataset.from_dict({"input_ids": list(ids), "labels": list(ids), **more})


def late_id(folder: Path) -> Act:
    """A token that the model does not have, in a row that no check looks at."""
    made = new_rows(1500).to_list()
    unseen = next(row for row in range(24) if row not in sample_rows(1500))
    made[unseen]["input_ids"][3] = 90
    trainer = tiny.trainer(folder / "output", data=Dataset.from_list(made))
    return extend(trainer, ReplayCallback(old_rows(), ratio=0.25), plan=PlanConfig(order="original")).train


def learned_positions(make: Callable[[], Any], **arguments: Any) -> Prepare:
    """`extend` of a GPT-2 with a table of 32 positions."""

    def prepare(folder: Path) -> Act:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
        data = arguments.get("data", new_rows)()
        made = Trainer(model, tiny.arguments(folder / "output"), default_data_collator, data)
        return partial(extend, made, make())

    return prepare


def ragged() -> Dataset:
    return Dataset.from_list([*old_rows(4).to_list(), *old_rows(4, length=9).to_list()])


def unheard() -> Dataset:
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[-100] * 3] * 4})


def shuffled_over() -> RewarmCallback:
    return RewarmCallback(1e-2)


add(
    "datasets",
    PluginError,
    (
        "training a table",
        extending(shuffled_over, data=frame),
        "train_dataset: is a DataFrame, whose rows cannot be loo",
    ),
    (
        "training of splits",
        replaying(data=lambda: DatasetDict(train=new_rows())),
        "train_dataset: is a DatasetDict, whos",
    ),
    (
        "replay a table",
        replaying(frame),
        "replay: the replay data is a DataFrame, whose rows cannot be looked up by n",
    ),
    (
        "held-out a table",
        probing(frame),
        "forgetting[old]: is a DataFrame, whose rows cannot be looked up by number. ",
    ),
    (
        "held-out a path",
        probing(lambda: "held_out.jsonl"),
        "forgetting[old]: is a str, whose rows cannot be looked up",
    ),
    (
        "training without rows, probed",
        probing(old_rows, data=lambda: new_rows().select([])),
        "the train_dataset is empt",
    ),
    (
        "training with None",
        extending(shuffled_over, data=listed_rows([1, None], [2, 3])),
        "holds None among its input_i",
    ),
    (
        "training of None",
        extending(shuffled_over, data=listed_rows(None, [2, 3])),
        "holds None instead of input_ids. T",
    ),
    (
        "training of floats",
        extending(shuffled_over, data=listed_rows([1.5, 2.0])),
        "holds input_ids of double instead",
    ),
    ("training of text", extending(shuffled_over, data=listed_rows(["a", "b"])), "holds input_ids of string instead"),
    (
        "a list of floats",
        extending(shuffled_over, data=lambda: listed_rows([1.5])().to_list()),
        "of float64 instead of",
    ),
    (
        "training of no tokens",
        extending(shuffled_over, data=listed_rows([], [])),
        "holds rows without a token only. To",
    ),
    (
        "training ids too large",
        extending(shuffled_over, data=listed_rows([1, 64])),
        "train_dataset: holds token ids 1",
    ),
    (
        "labels too large",
        extending(shuffled_over, data=listed_rows([1, 2], labels=[[1, 64]])),
        "train_dataset: holds the label 64 in row 0, but the model has 64 outputs. Labels are token ids below 64, or",
    ),
    (
        "labels of None",
        extending(shuffled_over, data=listed_rows([1, 2], labels=[[1, None]])),
        "None among its labels",
    ),
    ("replay with None", replaying(listed_rows([1, None])), "replay: the replay data holds None among its input_ids"),
    ("replay of floats", replaying(listed_rows([1.5])), "replay: the replay data holds input_ids of double instead"),
    (
        "held-out with None",
        probing(listed_rows([1, None])),
        "forgetting[old]: holds None among its input_ids. Tokenize",
    ),
    ("held-out of two lengths", probing(ragged), "forgetting[old]: its rows cannot be collated (ValueError: "),
    (
        "held-out without loss",
        probing(unheard),
        "asks for no loss: all labels of the 4 rows that a probe reads are -100",
    ),
    (
        "training longer than the positions",
        learned_positions(shuffled_over, data=lambda: new_rows(length=40)),
        "train_dataset: holds rows of 40 tokens, but the model has 32 positions. Cut it into rows of at most 32",
    ),
    (
        "held-out longer than the positions",
        learned_positions(lambda: ForgettingCallback({"old": old_rows(length=40)})),
        "forgetting[old]: holds rows of 40 tokens, but the model has 32 positions",
    ),
    ("replay empty", replaying(lambda: old_rows().select([])), "replay: the replay data is empty. Pass old data, or"),
    ("replay of splits", replaying(lambda: DatasetDict(train=old_rows())), "is a DatasetDict, whose rows cannot be"),
    ("replay a path", replaying(lambda: "old.jsonl"), "the replay data is a str, whose rows cannot be looked up by"),
    (
        "replay read once",
        replaying(lambda: iter(list(old_rows()))),
        "is a list_iterator, which can be read only once.",
    ),
    ("replay split", replaying(lambda: split_dataset_by_node(stream(), 0, 2)), "(`split_dataset_by_node`). Pass the"),
    (
        "replay stream empty",
        replaying(lambda: stream().take(0)),
        "or the training data is a stream without rows. Pass",
    ),
    ("replay named train", replaying(lambda: {"train": old_rows()}), "a source is named 'train', as the new data is."),
    ("replay raw", replaying(raw), "replay: the replay data cannot be used: No columns in the dataset match"),
    (
        "replay without labels",
        replaying(lambda: old_rows().remove_columns("labels")),
        "the replay data has the columns ['input_ids'], the training data ['input_ids', 'labels']. Prepare both",
    ),
    (
        "replay of another length",
        replaying(lambda: old_rows(length=12)),
        "replayed rows have 12 tokens, new rows 16. Cut both into blocks of one length, or use a collator that pads.",
    ),
    (
        "replay of unknown size",
        replaying(lambda: {"a": old_rows(), "b": stream()}),
        "replay: the size of the stream 'b' is not known. Pass `weights` for all datasets.",
    ),
    (
        "tokens of no rows",
        replaying(lambda: Dataset.from_dict({"input_ids": [[], []], "labels": [[], []]}), unit="tokens"),
        "replay: the replay data holds rows without a token only. Tokenize its texts.",
    ),
    (
        "no training data",
        without_data,
        "replay: the Trainer has no train_dataset. Pass `train_dataset=` to the Trainer",
    ),
    (
        "training empty",
        replaying(data=lambda: new_rows().select([])),
        "the train_dataset is empty. Pass a dataset with",
    ),
    ("training of no kind", unknown_kind, "the train_dataset is a Neither, neither map-style nor a stream. Use a"),
    (
        "training stream",
        streamed_without_length,
        "the train_dataset is a stream, whose length nobody knows. Set `max_s",
    ),
    (
        "training stream split",
        replaying(data=lambda: split_dataset_by_node(stream(), 0, 2)),
        "the train_dataset was split over ranks (`split_dataset_by_node`). Pass the whole stream",
    ),
    (
        "held-out empty",
        probing(lambda: old_rows().select([])),
        "forgetting[old]: is empty. Pass held-out rows, or leave",
    ),
    (
        "held-out stream",
        probing(stream),
        "forgetting[old]: is a IterableDataset, whose rows cannot be looked up by num",
    ),
    (
        "held-out None",
        probing(lambda: None),
        "forgetting[old]: is a NoneType, whose rows cannot be looked up by number",
    ),
    ("held-out raw", probing(raw), "forgetting[old]: cannot be used: No columns in the dataset match"),
    (
        "held-out without labels",
        probing(lambda: old_rows().remove_columns("labels")),
        "forgetting[old]: gives batches without labels, so there is no loss. Add labels, or a collator that makes",
    ),
    (
        "held-out that cannot be collated",
        probing(lambda: ["text", "more"]),
        "forgetting[old]: its rows cannot be collated (TypeError: ",
    ),
    (
        "held-out with a name of eval_dataset",
        extending(lambda: ForgettingCallback({"old": old_rows()}), eval_dataset={"old": new_rows(4)}),
        "has the name of a set in the Trainer's eval_dataset, whose metrics it would overwrite. Rename one of them.",
    ),
)


def texts(*given: str) -> Dataset:
    return Dataset.from_dict({"text": list(given) or ["a b a b"] * 9})


def packing(dataset: Callable[[], Any] = texts, tokenizer: Callable[[], Any] | None = None, **options: Any) -> Prepare:
    def prepare(folder: Path) -> Act:
        made = (tokenizer or words)()
        return partial(pack, dataset(), made, **{"block_size": 4, **options})

    return prepare


def leaking(folder: Path) -> Act:
    """Packed rows for a recurrent model, which cannot keep documents apart."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    made = Trainer(
        model=model,
        args=tiny.arguments(folder / "output"),
        train_dataset=Dataset.from_dict(
            {"input_ids": [[5, 6, 7, 8]] * 8, "position_ids": [[0, 1, 0, 1]] * 8, "seq_lengths": [[2, 2]] * 8}
        ),
        data_collator=PackedCollator(),
    )
    return partial(extend, made, RewarmCallback(1e-2))


def listed(ids: Any, kind: str = "int64") -> Callable[[], Dataset]:
    return lambda: Dataset.from_dict({"input_ids": ids}, features=Features({"input_ids": List(Value(kind))}))


class Deaf(torch.nn.Module):
    """A model that gives the same whatever it is given."""

    def __init__(self, takes_positions: bool = True):
        super().__init__()
        self.weight, self.takes_positions = torch.nn.Parameter(torch.zeros(1)), takes_positions

    def forward(self, input_ids: Any, **more: Any) -> Any:
        if more and not self.takes_positions:
            raise TypeError(f"unexpected keyword argument {sorted(more)}")
        return (torch.zeros(*input_ids.shape, 4),)


packed_row = {"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]}

add(
    "datasets",
    PluginError,
    ("documents that see each other", leaking, "MambaForCausalLM lets documents of a packed row influence each other"),
)
add(
    "datasets",
    ValueError,
    (
        "replay of nothing",
        call(ReplayCallback, {}),
        "dataset must hold at least one dataset, by names that are strings",
    ),
    (
        "replay by numbers",
        call(ReplayCallback, {1: []}),
        "dataset must hold at least one dataset, by names that are str",
    ),
    ("held-out no dict", call(ForgettingCallback, [1]), "datasets must be a dict of held-out sets by name, got [1]"),
    ("held-out nothing", call(ForgettingCallback, {}), "datasets must be a dict of held-out sets by name, got {}"),
    (
        "held-out name with a path",
        call(ForgettingCallback, {"../old": []}),
        "datasets: a name holds letters, digits, '_', '.' and '-', got '../old'",
    ),
    (
        "documents in no column",
        packing(text_column="body"),
        "text_column='body' is no column of the dataset, which has",
    ),
    (
        "documents of numbers",
        packing(lambda: Dataset.from_dict({"text": [1]})),
        "the column 'text' must hold strings, got",
    ),
    (
        "ids that are no ints",
        packing(listed([[1.5]], "float32")),
        "the column 'input_ids' must hold lists of token ids",
    ),
    ("no documents", packing(lambda: texts().select([])), "dataset has no rows. Pass one with at least one document"),
    (
        "too few tokens",
        packing(block_size=1000),
        "block_size=1,000, but all documents together have 72 tokens, which fi",
    ),
    ("block_size", packing(block_size=1), "block_size must be an integer from 2 on, got 1"),
    ("seed of packing", packing(seed=-1), "seed must be an integer from 0 on or None, got -1"),
    (
        "block_size endless",
        packing(block_size=10**12, remainder="pad"),
        "block_size must be an integer from 2 to 16,777,2",
    ),
    (
        "processes without end",
        packing(num_proc=10**6),
        "num_proc must be an integer from 1 to 1,024 or None, got 1000000",
    ),
    ("documents with None", packing(listed([[1, None]] * 4)), "column 'input_ids' has None among its token ids. Take"),
    ("isolate", packing(isolate="yes"), "isolate must be True or False, got 'yes'"),
    ("remainder", packing(remainder="keep"), "remainder must be 'drop' or 'pad', got 'keep'"),
    ("blocks of the demo", call(blocks, [[1, 2]], 5), "2 tokens do not fill a block of block_size=5"),
    (
        "packed rows of two lengths",
        call(PackedCollator(), [packed_row, {"input_ids": [5, 6], "seq_lengths": [2]}]),
        "rows of [2, 4] tokens in one batch. Pack all data with one block_size, or pass flatten=True",
    ),
    (
        "packed rows that lost a column",
        call(PackedCollator(), [{"input_ids": [5, 6]}]),
        "a packed row came with ['input_ids'] only: nothing tells its documents apart. Keep position_ids or seq_",
    ),
    (
        "packed rows that were cut",
        call(PackedCollator(), [{**packed_row, "input_ids": [5, 6]}]),
        "a packed row of 4 tokens came with 2 input_ids: something cut it. For SFTTrainer, set max_length=None",
    ),
    (
        "isolation of a batch without positions",
        lambda folder: partial(check_isolation, tiny.model(), {"input_ids": torch.ones(1, 4, dtype=torch.long)}),
        "batch has no position_ids, only ['input_ids']: nothing tells documents apart in it",
    ),
    (
        "isolation of a constant",
        call(check_isolation, Deaf()),
        "the outputs of Deaf do not depend on its input_ids (la",
    ),
    (
        "isolation without positions",
        call(check_isolation, Deaf(takes_positions=False)),
        "Deaf cannot be called with ['input_ids', 'position_ids'], so isolation cannot be shown: unexpected keyword",
    ),
    (
        "isolation of one document a row",
        lambda folder: partial(
            check_isolation,
            tiny.model(),
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.arange(4)[None]},
        ),
        "batch must hold rows of several documents: with one a row there is nothing to keep apart",
    ),
)
add(
    "datasets",
    TypeError,
    (
        "documents a path",
        packing(lambda: "new.jsonl"),
        "dataset must be a datasets.Dataset, got str. Load one with load_",
    ),
    (
        "documents of splits",
        packing(lambda: DatasetDict(train=texts())),
        "got DatasetDict. Take one split, as in datase",
    ),
    (
        "documents streamed",
        packing(lambda: texts().to_iterable_dataset()),
        "got IterableDataset. Write the stream to di",
    ),
)
add(
    "datasets",
    StreamError,
    (
        "stream without rows",
        lambda folder: partial(StreamReader([], "new").rows, [0]),
        "the stream of new holds no rows",
    ),
    (
        "another stream",
        lambda folder: partial(StreamReader([1, 2, 3], "new", mark=StreamMark(2, digests=("0", "0"))).rows, [2]),
        "the stream of new does not give the rows that it gave before: row 1 is another one. Training would go on",
    ),
)


def documents(**given: Any) -> Callable[[], Dataset]:
    """Raw documents; `given` are columns that stand in for theirs, None for one that is not there."""
    columns = {"text": ["ab", "c d"] * 20, "url": ["a.io"] * 40, "score": [0.1, 0.9] * 20, **given}
    return lambda: Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


def conditioning(
    data: Callable[[], Any] | None = None, tokens: dict[str, Any] | None = None, template: Any = None, **given: Any
) -> Prepare:
    """`extend` with a MetadataCallback that puts control tokens before the documents of `data`."""
    own = {name: given.pop(name) for name in ("cooldown", "block_size", "missing") if name in given}
    control = None if tokens is None else ControlTokens(**{"thresholds": 0.5, **tokens})
    return lambda folder: extending(
        lambda: MetadataCallback(template, **{"block_size": 16, "cooldown": "34%", **own}, control=control),
        data=data or documents(),
        **{"processing_class": tiny.tokenizer(), "data_collator": PackedCollator(), **given},
    )(folder)


def of_documents(**given: Any) -> Callable[[], Any]:
    return lambda: documents(**given)().to_iterable_dataset()


COLUMNS = "only ['text', 'url', 'score']. Name the right ones in "

add(
    "datasets",
    PluginError,
    (
        "documents without the column of a template",
        conditioning(documents(url=None)),
        "has no ['url'], only ['text', ",
    ),
    ("documents without texts", conditioning(documents(text=[""] * 40)), "the column 'text' holds no text at all"),
    (
        "documents without a cooldown's worth",
        conditioning(tokens={}, cooldown=6),
        "cooldown=6 is 6 of 6 steps. Leave",
    ),
    (
        "metadata that fills a block",
        conditioning(block_size=8),
        "the metadata of row 0 takes 11 tokens, more than half",
    ),
    (
        "missing metadata that is not allowed",
        conditioning(documents(url=[None] * 40), missing="error"),
        "row 0 has no value for ['domain'] (columns ['url'])",
    ),
    ("no column of scores", conditioning(tokens={"column": "toxicity"}), f"no ['toxicity'], {COLUMNS}ControlTokens("),
    ("no column of segments", conditioning(tokens={"segments": "parts"}), "segments='parts' is no column of the "),
    ("segments that are texts", conditioning(tokens={"segments": "text"}), "'text' must hold lists of texts, got str"),
    ("scores that are words", conditioning(documents(score=["low"] * 40), {}), "row 0 holds 'low', and a score is a"),
    ("scores of nobody knows what", conditioning(documents(score=[[0.1, 0.2]] * 40), {}), "2 scores for one document"),
    (
        "scores of other segments",
        conditioning(documents(score=[[0.1, 0.2]] * 40), {"segments": lambda text: [text]}),
        "row 0 holds 2 scores for 1 segments. Score the segments that the document is split into",
    ),
    (
        "a split that loses white space",
        conditioning(tokens={"segments": str.split}),
        "segments split row 1 into ['c', 'd'], which joined are not its text 'c d'. Let the function keep white space",
    ),
    ("scores that are all missing", conditioning(documents(score=[None] * 40), {}), "no text of the dataset gets a "),
    (
        "a missing score that is not allowed",
        conditioning(documents(score=[0.1, None] * 20), {"missing": "error"}),
        "row 1 has no score (column 'score'). Fill it in, or pass missing='plain' to ControlTokens",
    ),
    (
        "a stream without scores",
        conditioning(of_documents(score=None), {}),
        "['score'] is no column of row 0 of the stream, which has ['text', 'url']. Name the one that holds scores",
    ),
)

# --- tokenizers -------------------------------------------------------------------------------------


def chatting() -> PreTrainedTokenizerFast:
    """A token of its own that only its chat template knows."""
    made = tiny.tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    made.chat_template = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    return made


def with_gaps() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"<e>": 0, "a": 1, "c": 3, "b": 5}, [], unk_token="<e>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


def fitting(model: Callable[[], Any], tokens: Any = ("<|good|>",), more: Any = (), **given: Any) -> Prepare:
    """`fit_embeddings` of a model for tokens that a tokenizer has; `more` are ids that it does not have."""

    def prepare(folder: Path) -> Act:
        tokenizer = tiny.tokenizer()
        return partial(fit_embeddings, model(), tokenizer, [*add_tokens(tokenizer, tokens), *more], **given)

    return prepare


def adapted() -> Any:
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))


def eight_bit() -> Any:
    model = tiny.model()
    table = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.int8), requires_grad=False)
    model.get_input_embeddings().weight = table
    return model


def adding(tokens: Any, tokenizer: Callable[[], Any] = tiny.tokenizer) -> Prepare:
    return lambda folder: partial(add_tokens, tokenizer(), tokens)


add(
    "tokenizers",
    ValueError,
    (
        "a token without a name",
        adding(["<|good|>", ""]),
        "without white space at their ends, such as '<|good|>', got ''",
    ),
    ("a token twice", adding(["<|a|>", "<|a|>"]), "tokens has ['<|a|>'] more than once. Give every token a name of"),
    (
        "one text for tokens",
        adding("<|good|>"),
        "tokens must be a list of texts such as ['<|good|>', '<|bad|>'], got ",
    ),
    ("a token that is text", adding(["a"]), "tokens has ['a'], which the tokenizer knows as ordinary text. Choose"),
    ("gaps in a vocabulary", adding(["<g>", "<h>"], with_gaps), "its vocabulary of 4 tokens has gaps (largest id 5)"),
    (
        "ids that no tokenizer has",
        fitting(tiny.model, more=[999]),
        "ids must be token ids that the tokenizer has, as ",
    ),
    ("rows made of chance", fitting(tiny.model, init="normal"), "init must be one of ('mean', 'zero'), got 'normal'"),
    ("rows beside an adapter", fitting(adapted), "the model has an adapter, and embeddings beside it are neither "),
    ("rows in eight bits", fitting(eight_bit), "the embeddings of the model are quantised (Embedding of torch.int8)"),
    ("rows on no device", fitting(lambda: tiny.model().to("meta")), "the embeddings of the model are offloaded "),
    (
        "a control token that the tokenizer does not have",
        prompting(control="<|good|>"),
        "one of ['<eos>', '<unk>'], got",
    ),
    (
        "a control token that is a number",
        call(condition, "a", control=3),
        "control must be the text of a control token",
    ),
    ("nothing to condition on", call(condition, "a"), "there is neither a template nor control='<|good|>', say"),
)
add(
    "tokenizers",
    PluginError,
    (
        "the end as a control token",
        conditioning(tokens={"tokens": ["<eos>", "<|b|>"]}),
        "which the tokenizer has as its",
    ),
    (
        "a control token of the chat",
        conditioning(tokens={"tokens": ["<|user|>", "<|b|>"]}, processing_class=chatting()),
        "tokens has '<|user|>', which the tokenizer has as its part of the chat template. Choose names of their own",
    ),
    ("control tokens beside an adapter", conditioning(tokens={}, model=adapted()), "the model has an adapter, and "),
    (
        "control tokens without a tokenizer",
        conditioning(tokens={}, processing_class=None),
        "the Trainer has no tokenizer",
    ),
)


@cache
def words() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a b"], vocab_size=257)


def without_end() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=words().backend_tokenizer)


def pilcrow() -> PreTrainedTokenizerFast:
    """Its end of a document is a character that texts hold."""
    backend = Tokenizer(models.WordLevel({"a": 0, "¶": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="¶", unk_token="?")


def another(kind: str) -> Prepare:
    """Old data made with another tokenizer than the trainer's: given as object, as folder, inside a processor."""

    def prepare(folder: Path) -> Act:
        other: Any = train_tokenizer(["der Hund sah den Hund"], vocab_size=260)
        trainer = tiny.trainer(folder / "output", data=new_rows())
        trainer.processing_class = None if kind == "alone" else words()
        if kind == "nowhere":
            other = "/nowhere/tokenizer"
        elif kind == "folder":
            other.save_pretrained(folder / "tokenizer")
            other = str(folder / "tokenizer")
        elif kind == "processor":
            other = SimpleNamespace(tokenizer=other)
        return partial(extend, trainer, ReplayCallback(old_rows(), ratio=0.25, tokenizer=other))

    return prepare


def ids(*given: int) -> Callable[[], Dataset]:
    return lambda: Dataset.from_dict({"input_ids": [list(given)] * 4, "labels": [[1] * len(given)] * 4})


def one_of_two() -> dict[str, Dataset]:
    return {"wiki": old_rows(), "code": tiny.rows(4, high=100)}


MADE_BY = (
    "replay: the replay data was made by another tokenizer than the trainer's processing_class. Tokenize it again"
)
FIT = "but the model has 64 embeddings. Tokenize it with the model's own tokenizer."
LOAD = "Load it with AutoTokenizer.from_pretrained"

add(
    "tokenizers",
    PluginError,
    (
        "of old data nowhere",
        another("nowhere"),
        "replay: tokenizer='/nowhere/tokenizer' cannot be compared with the Tra",
    ),
    (
        "of old data, and none of the Trainer",
        another("alone"),
        "cannot be compared: the Trainer has no processing_class",
    ),
    ("of old data another", another("object"), MADE_BY),
    ("of old data another, from a folder", another("folder"), MADE_BY),
    ("of old data another, in a processor", another("processor"), MADE_BY),
    ("replay ids too large", replaying(ids(*[1] * 15, 64)), f"the replay data holds token ids 1..64, {FIT}"),
    ("replay ids negative", replaying(ids(*[1] * 15, -1)), f"the replay data holds token ids -1..1, {FIT}"),
    ("replay ids of one of two", replaying(one_of_two), "replay: the replay data 'code' holds token ids"),
    ("held-out ids too large", probing(ids(1, 900)), f"forgetting[old]: holds token ids 1..900, {FIT}"),
    ("held-out ids negative", probing(ids(-100, 5)), f"forgetting[old]: holds token ids -100..5, {FIT}"),
)
add(
    "tokenizers",
    TypeError,
    ("a name", packing(tokenizer=lambda: "gpt2"), f"tokenizer must be one of transformers, got str. {LOAD}"),
    ("None", packing(tokenizer=lambda: None), f"tokenizer must be one of transformers, got NoneType. {LOAD}"),
    ("a class", packing(tokenizer=lambda: PreTrainedTokenizerFast), f"one of transformers, got type. {LOAD}"),
    ("of the tokenizers library", packing(tokenizer=lambda: words().backend_tokenizer), f"got Tokenizer. {LOAD}"),
)
add(
    "tokenizers",
    ValueError,
    (
        "of old data a number",
        replay(tokenizer=5),
        "tokenizer must be a tokenizer, or the folder or name of one, got 5",
    ),
    (
        "of old data a dict",
        replay(tokenizer={"a": 0}),
        "tokenizer must be a tokenizer, or the folder or name of one, g",
    ),
    (
        "of old data no name",
        replay(tokenizer=""),
        "tokenizer must be a tokenizer, or the folder or name of one, got ''",
    ),
    (
        "without an end",
        packing(tokenizer=without_end),
        "tokenizer has eos_token=None, so nothing would close a document",
    ),
    (
        "whose end is in the text",
        packing(lambda: texts("a ¶ a"), pilcrow),
        "makes the control token '¶' of the text 'a ¶",
    ),
    (
        "of larger ids",
        packing(listed([[1, 300]] * 4)),
        "column 'input_ids' has ids from 1 to 300, but the tokenizer has",
    ),
    (
        "of negative ids",
        packing(listed([[-5, 3]] * 4)),
        "column 'input_ids' has ids from -5 to 3, but the tokenizer has",
    ),
    ("of 10 tokens", call(train_tokenizer, ["a"], vocab_size=10), "vocab_size=10 is less than 257: 256 bytes and"),
    (
        "without an end, documents",
        lambda folder: partial(encode_documents, without_end(), ["a"]),
        "the tokenizer has no eos_token to end documents with",
    ),
    (
        "whose end is in the text, documents",
        lambda folder: partial(encode_documents, pilcrow(), ["a ¶ a"]),
        "document 0 has the end-of-sequence token '¶' inside",
    ),
    (
        "of larger ids, in training",
        late_id,
        "a batch holds token id 90, but the model has 64 embeddings. It was drawn from train, rows",
    ),
)


def foreign_batch(folder: Path) -> Act:
    return partial(PlanCollator(default_data_collator, ["train"], 64, True), [{"input_ids": [1]}])


add(
    "datasets",
    TypeError,
    ("rows that no plan drew", foreign_batch, "a plan's collator takes the features that a PlanDataset returns, got"),
)

# --- checkpoints ------------------------------------------------------------------------------------

RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def run(folder: Path, *plugins: Any, **arguments: Any) -> Any:
    made = plugins or settings.make(settings.TOGETHER)
    return extend(tiny.trainer(folder, *made, **{**RUN, **arguments}))


def resumed(damage: Callable[[Path], Any] = lambda folder: None, **arguments: Any) -> Prepare:
    """A run of four steps; what happened to its checkpoint-2; and a resume from it with `arguments`."""
    first, make = arguments.pop("first", {}), arguments.pop("plugins", ())

    def prepare(folder: Path) -> Act:
        output = folder / "output"
        run(output, **first).train()
        shutil.rmtree(output / "checkpoint-4")
        damage(output / "checkpoint-2")
        return partial(
            run(output, *(each() for each in make), **arguments).train,
            resume_from_checkpoint=str(output / "checkpoint-2"),
        )

    return prepare


def saved(damage: Callable[[Path], Any] = lambda folder: None, act: Any = None) -> Prepare:
    """The same for a checkpoint of plain files, which is looked at without a Trainer."""

    def prepare(folder: Path) -> Act:
        checkpoint = folder / "output" / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
        write_state(checkpoint, {"step": 2})
        damage(checkpoint)
        return partial(resolve, str(checkpoint), folder / "output") if act is None else partial(act, checkpoint)

    return prepare


def newest(*damages: Callable[[Path], Any]) -> Prepare:
    """`resume_from_checkpoint=True` where every checkpoint was damaged."""

    def prepare(folder: Path) -> Act:
        for number, damage in enumerate(damages, start=1):
            saved(damage)(folder / str(number))
            target = folder / "output" / f"checkpoint-{number}"
            target.parent.mkdir(exist_ok=True)
            (folder / str(number) / "output" / "checkpoint-2").rename(target)
        return partial(resolve, True, folder / "output")

    return prepare


def manifest(**changes: Any) -> Callable[[Path], Any]:
    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / MANIFEST).read_text())
        files = changes.get("files", {})
        content = {**content, **changes, "files": {**content["files"], **files} if isinstance(files, dict) else files}
        for name in [name for name, entry in content["files"].items() if entry is None]:
            del content["files"][name]
        (checkpoint / MANIFEST).write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], Any]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def linked_outside(checkpoint: Path) -> None:
    """A link to something that never ends."""
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").symlink_to("/dev/zero")


def fewer_weights(folder: Path) -> Act:
    model = tiny.model()
    model.save_pretrained(folder / "saved")
    larger = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 3}))
    return partial(load_converted, larger, folder / "saved")


def foreign_weights(folder: Path) -> Act:
    tiny.model().save_pretrained(folder / "saved")
    return partial(load_converted, torch.nn.Linear(2, 2), folder / "saved")


def in_the_way(folder: Path) -> Act:
    """A file where the first checkpoint should go."""
    made = run(folder / "output")
    (folder / "output").mkdir(exist_ok=True)
    (folder / "output" / "checkpoint-2").write_text("in the way")
    return made.train


def all_saved_by_the_host(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / STATE_FOLDER)


def resuming(given: Any, output: Any = "output") -> Prepare:
    """A resume from what is no path."""
    return lambda folder: partial(resolve, given, folder / output)


def linked_in_a_circle(folder: Path) -> Act:
    (folder / "loop").symlink_to("loop")
    return partial(resolve, str(folder / "loop"), folder)


def linked_to(target: str | None) -> Callable[[Path], Any]:
    """The state is a link, or a pipe."""

    def damage(checkpoint: Path) -> None:
        (checkpoint / STATE_FILE).unlink()
        if target is None:
            os.mkfifo(checkpoint / STATE_FILE)
        else:
            (checkpoint / STATE_FILE).symlink_to(target)

    return damage


def empty_by_its_size(checkpoint: Path) -> None:
    """A link to what says that it has no bytes, and gives some: a hash of none is taken."""
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").symlink_to("/proc/self/cmdline")
    manifest(files={"optimizer.pt": {"size": 0, "xxh3_128": "0" * 32}})(checkpoint)


def vouched(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Damage before the hashes are taken: the manifest fits it."""

    def again(checkpoint: Path) -> None:
        damage(checkpoint)
        state = json.loads((checkpoint / STATE_FILE).read_text())
        write_state(checkpoint, state)

    return again


def state(**changes: Any) -> Callable[[Path], Any]:
    """Another state under a manifest that fits it."""

    def damage(checkpoint: Path) -> None:
        saved = json.loads((checkpoint / STATE_FILE).read_text())
        write_state(checkpoint, {**saved, **changes})

    return damage


WRONG_STATE = f"{STATE_FILE} of "
OUTSIDE = {"size": 7, "xxh3_128": "0" * 32}
NOT_THE_RUN = "the run would not be the one that was interrupted. Changed:\n  "

add(
    "checkpoints",
    CheckpointError,
    ("no folder", saved(lambda folder: shutil.rmtree(folder)), "there is no such folder. There is no complete checkp"),
    (
        "empty folder",
        saved(lambda folder: (shutil.rmtree(folder), folder.mkdir())),
        "the folder is empty. There is no",
    ),
    (
        "of a bare Trainer",
        saved(all_saved_by_the_host),
        "manifest.json: it was not written by a Trainer with plug-ins",
    ),
    ("half saved", saved(remove(MANIFEST)), "its save did not finish (no manifest). There is no complete checkpoint"),
    ("manifest torn", saved(write(MANIFEST, b'{"format": 1, "fi')), f"{MANIFEST} cannot be read (JSONDecodeError"),
    ("manifest of bytes", saved(write(MANIFEST, b"\xff\x00")), f"{MANIFEST} cannot be read (UnicodeDecodeError"),
    (
        "manifest without files",
        saved(write(MANIFEST, b'{"format": 1}')),
        f"{MANIFEST} cannot be read (KeyError: 'files'",
    ),
    ("manifest of another kind", saved(write(MANIFEST, b"[1]")), f"{MANIFEST} cannot be read (TypeError"),
    (
        "manifest of endless size",
        saved(manifest(files={"optimizer.pt": {"size": float("inf"), "xxh3_128": ""}})),
        "(Over",
    ),
    (
        "manifest of a later version",
        saved(manifest(format=2)),
        "its manifest has format 2; this version reads format 1",
    ),
    (
        "manifest names a parent",
        saved(manifest(files={"../x": OUTSIDE})),
        "names a file outside the checkpoint: '../x'",
    ),
    (
        "manifest names a root",
        saved(manifest(files={"/etc/passwd": OUTSIDE})),
        "outside the checkpoint: '/etc/passwd'",
    ),
    ("manifest names NUL", saved(manifest(files={"a\0b": OUTSIDE})), "is missing"),
    (
        "manifest names too long",
        saved(manifest(files={"x" * 300: OUTSIDE})),
        "is missing or cannot be read (OSError: ",
    ),
    ("manifest without state", saved(manifest(files={STATE_FILE: None})), f"its manifest does not list {STATE_FILE}"),
    ("a file deleted", saved(remove("optimizer.pt")), "checkpoint-2: optimizer.pt is missing. There is no complete"),
    ("a file cut", saved(write("optimizer.pt", b"mom")), "optimizer.pt has 3 bytes instead of 7"),
    ("a file altered", saved(write("optimizer.pt", b"MOMENTS")), "optimizer.pt was altered (its hash differs)"),
    ("a file linked to no end", saved(linked_outside), "checkpoint-2: optimizer.pt is missing. There is no complete"),
    ("state altered", saved(write(STATE_FILE, b'{\n "step": 3\n}')), f"{STATE_FILE} was altered (its hash differs)"),
    ("state no object", saved(write(STATE_FILE, b"[1]"), read_state), f"{STATE_FILE} does not hold an object"),
    (
        "a number",
        resuming(5),
        "resume_from_checkpoint must be the folder of a checkpoint, or True for the newest compl",
    ),
    ("one", resuming(1), "or True for the newest complete one, got 1"),
    ("bytes", resuming(b"x"), "or True for the newest complete one, got b'x'"),
    ("a list", resuming([]), "or True for the newest complete one, got []"),
    ("empty text", resuming(""), "or True for the newest complete one, got ''"),
    ("NUL in its name", resuming("a\0b"), "cannot resume from 'a\\x00b': there is no such folder."),
    ("a name too long", resuming("x" * 5000), "xxx': there is no such folder. There is no complete checkpoint."),
    ("a link to itself", linked_in_a_circle, "loop: there is no such folder. There is no complete checkpoint."),
    ("an output_dir too long", resuming(True, "x" * 5000), "it holds no checkpoints"),
    ("state a pipe", saved(linked_to(None), read_state), f"{WRONG_STATE}"),
    (
        "state without end",
        saved(linked_to("/dev/zero"), read_state),
        "(FileNotFoundError: there is no such file): it was",
    ),
    ("state torn", saved(write(STATE_FILE, b'{"step": 2'), read_state), "cannot be used (JSONDecodeError: Expecting"),
    ("state of bytes", saved(write(STATE_FILE, b"\xff"), read_state), "cannot be used (UnicodeDecodeError: "),
    ("more behind a link than it says", saved(empty_by_its_size), "optimizer.pt was altered (its hash differs)"),
    ("state of another step", resumed(state(step=3)), "(ValueError: it is of step 3, trainer_state.json of step 2)"),
    ("state of a step as text", resumed(state(step="2")), "it is of step '2', trainer_state.json of step 2"),
    (
        "state of fewer counts",
        resumed(state(counts=[[1, 2, 3, 4, 5]])),
        "its counts are not 5 for each source, got [[",
    ),
    ("state of counts as text", resumed(state(counts="many")), f"{WRONG_STATE}"),
    ("state without log sums", resumed(state(log_sums=None)), "cannot be used (TypeError: 'NoneType' object is not"),
    (
        "state of a torn stream",
        resumed(state(streams={"train": {"number": -1, "digests": []}})),
        "which are no row num",
    ),
    ("state of torn segments", resumed(state(segments=[[1]])), "cannot be used (ValueError: not enough values to unp"),
    ("state of torn plug-ins", resumed(state(plugins=[])), "cannot be used (AttributeError: 'list' object has no att"),
    ("junk as optimizer", resumed(vouched(write("optimizer.pt", b"junk"))), "optimizer.pt or scheduler.pt of "),
    ("junk as scheduler", resumed(vouched(write("scheduler.pt", b"junk"))), "optimizer.pt or scheduler.pt of "),
    ("junk as random state", resumed(vouched(write("rng_state.pth", b"junk"))), "rng_state.pth of "),
    ("junk as weights", resumed(vouched(write("model.safetensors", b"junk"))), "the weights of "),
    ("junk as the host's state", resumed(vouched(write("trainer_state.json", b"junk"))), "trainer_state.json of "),
    (
        "optimizer that nobody vouches for",
        resumed(manifest(files={"optimizer.pt": None})),
        "its manifest does not list optimizer.*, without which the run would not go on as it was.",
    ),
    (
        "without a schedule",
        resumed(vouched(remove("scheduler.pt"))),
        "its manifest does not list scheduler.pt, without",
    ),
    (
        "without a random state",
        resumed(vouched(remove("rng_state.pth"))),
        "its manifest does not list rng_state*.pth,",
    ),
    ("newest of none", newest(), "no complete checkpoint to resume from in "),
    (
        "newest of damaged ones",
        newest(remove("optimizer.pt"), remove(MANIFEST)),
        "\n  skipped checkpoint-2: its save did not finish (no manifest)\n  skipped checkpoint-1: optimizer.pt is",
    ),
    ("with fewer weights", fewer_weights, "does not hold the weights model.layers.2."),
    (
        "of another model",
        foreign_weights,
        "does not hold the weights bias, weight of this Linear: resuming would go on",
    ),
    ("that cannot be written", in_the_way, "checkpoint-2 could not be written ("),
    (
        "resume in a Trainer",
        resumed(remove("scheduler.pt")),
        "checkpoint-2: scheduler.pt is missing. There is no complete checkpoint. To start a new run from its weights",
    ),
    (
        "weights only",
        resumed(first={"save_only_model": True}, save_only_model=True),
        "was saved with save_only_model=True: it has no optimizer state to resume with. Load the model from that",
    ),
    (
        "resume, longer",
        resumed(max_steps=8),
        "Changed:\n  arguments.max_steps: 4 → 8\n  total_steps: 4 → 8\nlearning rate of the checkpoint:",
    ),
    ("resume, other batch", resumed(per_device_train_batch_size=2), f"{NOT_THE_RUN}global_batch: 4 → 2"),
    ("resume, other seed", resumed(seed=5), f"{NOT_THE_RUN}arguments.seed: 3 → 5\n  plan.seed: 3 → 5"),
    ("resume, other data", resumed(data=tiny.rows(40, seed=99)), f"{NOT_THE_RUN}data.train: '"),
    (
        "resume, other peak",
        resumed(plugins=(lambda: RewarmCallback(2e-2, warmup=2), settings.by_name("replay").make)),
        f"{NOT_THE_RUN}plugins.rewarm.peak_lr: 0.01 → 0.02\nlearning rate of the checkpoint:",
    ),
    (
        "resume, other ratio",
        resumed(plugins=(settings.by_name("rewarm").make, lambda: ReplayCallback(settings.old_data(), ratio=0.5))),
        "plugins.replay.ratio: 0.25 → 0.5",
    ),
    ("resume, a plug-in less", resumed(plugins=(settings.by_name("rewarm").make,)), "plugins.replay: {"),
)


def trace_of(content: bytes) -> Prepare:
    def prepare(folder: Path) -> Act:
        (folder / "trace.jsonl").write_bytes(content)
        return partial(read_trace, folder)

    return prepare


START = b'{"event": "start", "step": 0}\n'

add(
    "checkpoints",
    ValueError,
    (
        "trace torn inside",
        trace_of(START + b"{x\n" + b'{"event": "log", "step": 1}\n'),
        "line 2 is not an event of a tra",
    ),
    ("trace of others", trace_of(b'{"loss": 1}\n{"event": "log", "step": 1}\n'), "line 1 is not an event of a trace"),
    ("report of nothing", lambda folder: partial(report, [], folder / "output" / "page.html"), "no runs to report on"),
    (
        "state of another plug-in",
        lambda folder: partial(Toy().load_state, {"counts": [1]}),
        "toy: the checkpoint holds state ['counts'] that this plug-in cannot read",
    ),
)
add(
    "checkpoints",
    FileNotFoundError,
    (
        "no trace",
        lambda folder: partial(read_trace, folder),
        "a run with plug-ins writes trace.jsonl into its output_di",
    ),
)


# --- meta-tokens ------------------------------------------------------------------------------------


def meta_tokens(**given: Any) -> Prepare:
    return call(MetaTokensCallback, **given)


def inserting(data: Any = None, tokenizer: Any = settings.full_tokenizer, **arguments: Any) -> Prepare:
    """`extend` with a MetaTokensCallback; `tokenizer` gives what a Trainer has of one."""
    own = {name: arguments.pop(name) for name in ("positions", "token", "boundaries", "rope") if name in arguments}
    fraction = {"fraction": arguments.pop("fraction", 0.25)} if own.get("positions") != "given" else {}

    def prepare(folder: Path) -> Act:
        made = {name: value() if name == "model" else value for name, value in arguments.items()}
        return extending(lambda: MetaTokensCallback(**fraction, **own), data=data or new_rows, **tokenizer(), **made)(
            folder
        )

    return prepare


def held() -> Dataset:
    return tiny.rows(40, low=64, high=65)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=18))


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


PAIR = torch.tensor([[5, 6, 7]])

add(
    "settings",
    ValueError,
    (
        "meta-tokens, all of them",
        meta_tokens(fraction=1.0),
        "fraction must be meta-tokens per token of text, from 0 to",
    ),
    ("meta-tokens, fewer than none", meta_tokens(fraction=-0.1), "from 0 to 0.5, got -0.1. Pass 0.1, say, for one to"),
    ("meta-tokens of text", meta_tokens(fraction="10%"), "from 0 to 0.5, got '10%'"),
    ("meta-tokens, NaN of them", meta_tokens(fraction=float("nan")), "from 0 to 0.5, got nan"),
    ("a meta-token without a name", meta_tokens(token=" "), "token must be a text such as '<|meta|>', got ' '"),
    ("a meta-token by its id", meta_tokens(token=7), "token must be a text such as '<|meta|>', got 7"),
    ("meta-attention, maybe", meta_tokens(attention="yes"), "attention must be True or False, got 'yes'"),
    ("meta-attention rotated by a flag", meta_tokens(rope=True), "rope must be one of ('on', 'off'), got True"),
    (
        "meta-tokens anywhere",
        meta_tokens(positions="random"),
        "positions must be one of ('uniform', 'every_n', 'bound",
    ),
    (
        "meta-tokens in shorter samples",
        meta_tokens(length="short"),
        "length must be one of ('longer', 'fixed'), got '",
    ),
    ("meta-tokens, nothing trained", meta_tokens(train="none"), "train must be one of ('all', 'meta'), got 'none'"),
    (
        "boundaries that are text",
        meta_tokens(positions="boundaries", boundaries="."),
        "boundaries must be a list of to",
    ),
    (
        "boundaries of uniform places",
        meta_tokens(boundaries=["."]),
        "boundaries are for positions='boundaries', got p",
    ),
    (
        "a fraction of given places",
        meta_tokens(positions="given", fraction=0.2),
        "fraction and length are of no use with positions='given': the data has its meta-tokens",
    ),
    (
        "meta-attention that nobody knows",
        meta_tokens(meta_attention={"heads": 2}),
        "meta_attention must be a dict of bias, dropout, eps, head_dim, init, mask_logits, norm, num_heads, num_key",
    ),
    ("meta-attention with a sign", meta_tokens(meta_attention={"dropout": -1}), "dropout must be a number from 0 up"),
    (
        "inserting into one row of ids",
        call(insert, PAIR[0], None, PAIR, 9),
        "input_ids must have the shape (batch, se",
    ),
    (
        "inserting behind the end",
        call(insert, PAIR, None, PAIR, 9),
        "positions must lie below 6, the tokens and meta-",
    ),
)
add(
    "settings",
    PluginError,
    (
        "no meta-tokens",
        inserting(fraction=0),
        "meta_tokens: would change nothing with fraction=0. Raise it, or pass all",
    ),
    (
        "meta-tokens with smoothed labels",
        inserting(label_smoothing_factor=0.1),
        "label_smoothing_factor=0.1 asks every token for a share of the probability, and the meta-token's is 0",
    ),
    (
        "meta-tokens in a recurrent model",
        inserting(model=mamba),
        "meta_tokens: MambaForCausalLM is recurrent: it keeps a state",
    ),
)
add(
    "datasets",
    PluginError,
    (
        "too short for a meta-token",
        inserting(fraction=0.05),
        "would change nothing: fraction=0.05 of samples of 16 tokens is less than one meta-token. Raise fraction",
    ),
    (
        "the meta-token among the data",
        inserting(held),
        "row 0 of the train_dataset holds the id of '<|meta|>', 64, already. Tokenize text with split_special_tokens=",
    ),
    ("no meta-token among the data", inserting(positions="given"), "but none of 40 rows looked at holds '<|meta|>'"),
    (
        "no positions left for meta-tokens",
        inserting(model=gpt2),
        "a document 20 long, and the model has 18 positions. Cut samples to 15 tokens, or pass length='fixed'",
    ),
)
add(
    "datasets",
    TypeError,
    ("meta-tokens into a list", call(with_meta_tokens, [], None), "dataset must be a datasets.Dataset, got list"),
)
add(
    "tokenizers",
    PluginError,
    ("meta-tokens without one", inserting(tokenizer=dict), "meta_tokens: the Trainer has no tokenizer. Pass `process"),
    (
        "a meta-token that is a letter",
        inserting(token="a"),
        "meta_tokens: tokens has ['a'], which the tokenizer knows as ordinary text. Choose another name",
    ),
    (
        "boundaries that it does not know",
        inserting(positions="boundaries", boundaries=["¶"]),
        "meta_tokens: boundaries has ['¶'], which the tokenizer does not know as tokens. Look them up",
    ),
)


# --- what was seen, and staying near the start -------------------------------------------------------

BYTES = 'max_bytes must be a number of bytes, or a string such as "500 MB" or "2 GiB"'


def buffered(harm: Callable[[Path], Any] = lambda folder: None, **arguments: Any) -> Prepare:
    """`extend` with a BufferCallback over a folder that holds a buffer, of which `harm` makes what it will."""

    def prepare(folder: Path) -> Act:
        with BufferWriter(folder / "seen", 1 << 20) as writer:
            writer.add([{"input_ids": [1, 2], "labels": [1, 2]}])
        harm(folder / "seen")
        settings = {"max_bytes": "1 MiB", **arguments}
        trainer = tiny.trainer(folder / "output", data=settings.pop("data", new_rows)())
        return partial(extend, trainer, BufferCallback(folder / "seen", **settings))

    return prepare


def opening(harm: Callable[[Path], Any]) -> Prepare:
    def prepare(folder: Path) -> Act:
        with BufferWriter(folder / "seen", 1 << 20) as writer:
            writer.add([{"input_ids": [1, 2]}])
        harm(folder / "seen")
        return partial(ReplayBuffer.open, folder / "seen")

    return prepare


def distilling_on_two_gpus(folder: Path) -> Act:
    trainer = tiny.trainer(folder / "output")
    trainer.args._n_gpu = 2
    return partial(extend, trainer, SelfDistillationCallback())


def cut_short(folder: Path) -> None:
    chunk = next(folder.glob("*.arrow"))
    chunk.write_bytes(chunk.read_bytes()[:-1])


add(
    "settings",
    ValueError,
    ("buffer of no size", call(BufferCallback, max_bytes="some"), f"{BYTES}, got 'some'"),
    ("buffer too small", call(BufferCallback, max_bytes="10 kB"), f"{BYTES}, from 1 MiB (1048576 bytes) on, got"),
    ("buffer without a folder", call(BufferCallback, ""), "folder must be the path of a folder, or None, got ''"),
    ("buffer's seed", call(BufferCallback, seed=0.5), "seed must be an integer"),
    (
        "buffer after what",
        call(BufferCallback, unfinished="ask"),
        "unfinished must be one of ('error', 'keep', 'drop'), got 'ask'",
    ),
    ("no task", call(BenchmarkCallback, []), "tasks must be a name or a list of names, such as ['arc_easy'], got []"),
    ("a task twice", call(BenchmarkCallback, ["a", "a"]), "tasks: each may be named once, got ['a', 'a']"),
    ("half a shot", call(BenchmarkCallback, "a", num_fewshot=0.5), "num_fewshot must be a whole number from 0 on"),
    (
        "batch of none",
        call(BenchmarkCallback, "a", batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    ("draws", call(BenchmarkCallback, "a", bootstrap_iters=-1), "bootstrap_iters must be a whole number from 0 on"),
    ("limit", call(BenchmarkCallback, "a", limit=1.5), "limit must be a number of questions, such as 200, or a share"),
    ("no questions", call(BenchmarkCallback, "a", limit=0), "or a share below 1, got 0"),
    ("tasks where", call(BenchmarkCallback, "a", include_path="nowhere"), "include_path must be a folder of YAML"),
    ("when else", call(BenchmarkCallback, "a", when="during"), "when must be one of ('before', 'after', 'both')"),
    ("instruction", call(BenchmarkCallback, "a", system_instruction=1), "system_instruction must be text, got 1"),
    ("chat", call(BenchmarkCallback, "a", apply_chat_template="yes"), "apply_chat_template must be"),
    ("pull negative", call(L2InitCallback, -1), "strength must be a number from 0 on, such as 0.1, got -1"),
    ("pull to a disk", call(L2InitCallback, anchor_device="disk"), "anchor_device must be one of ('weights', 'cpu')"),
    (
        "teacher's weight",
        call(SelfDistillationCallback, "1"),
        "weight must be a number from 0 on, such as 1.0, got '1'",
    ),
    ("teacher's match", call(SelfDistillationCallback, match="cls"), "match must be one of ('kl', 'features')"),
    (
        "teacher a number",
        call(SelfDistillationCallback, teacher=7),
        "teacher must be a model, or the folder or name of one, got 7",
    ),
)
add(
    "settings",
    PluginError,
    ("buffer of another seed", buffered(seed=3), "of seed 0, got seed=3. Pass seed=0, or another folder"),
    (
        "buffer for longer rows",
        buffered(data=lambda: new_rows(length=4000)),
        "a row of 48,008 bytes is more than 1/64 of the rows that max_bytes=1,048,576 has room for",
    ),
    (
        "buffer of an epoch that begins again",
        extending(BufferCallback, ignore_data_skip=True),
        "buffer: ignore_data_skip=True begins an epoch anew where a run is resumed in it",
    ),
    (
        "task nobody knows",
        extending(
            lambda: BenchmarkCallback("letter", include_path=settings.LM_EVAL_TASKS),
            processing_class=tiny.tokenizer(),
        ),
        "lm-eval knows no task 'letter'. `lm_eval ls tasks` lists them",
    ),
    (
        "questions without a tokenizer",
        extending(lambda: BenchmarkCallback("letters", include_path=settings.LM_EVAL_TASKS)),
        "needs a tokenizer, and processing_class is NoneType. Build the Trainer with processing_class=tokenizer",
    ),
    (
        "pull beside updates in the backward pass",
        extending(lambda: L2InitCallback(), optim="adalomo"),
        "l2_init: optim='adalomo' updates the weights in the backward pass",
    ),
    ("pull of nothing", extending(lambda: L2InitCallback(0)), "would change nothing with strength=0. Raise it"),
    (
        "teacher of nothing",
        extending(lambda: SelfDistillationCallback(0)),
        "would change nothing with weight=0. Raise it, or pass allow_no_effect=True",
    ),
    ("teacher of several GPUs", distilling_on_two_gpus, "self_distillation: 2 GPUs in one process split a batch"),
    (
        "teacher of another vocabulary",
        extending(lambda: SelfDistillationCallback(teacher=tiny.model(vocabulary=80))),
        "the teacher has a vocabulary of 80, the model of 64. Use a teacher of the same vocabulary",
    ),
)
add(
    "datasets",
    PluginError,
    (
        "buffer whose manifest is another file",
        buffered(lambda folder: (folder / "buffer.json").write_text("[]")),
        "buffer.json cannot be read",
    ),
)


def elsewhere(act: Callable[[Path, Path], Act]) -> Prepare:
    """`act` on a folder that holds a saved dataset."""

    def prepare(folder: Path) -> Act:
        old_rows().save_to_disk(folder / "saved")
        return act(folder, folder / "saved")

    return prepare


IN_THE_WAY = (
    "holds 'data-00000-of-00001.arrow' and no buffer.json: a new buffer would lie among files not its own. Pass"
)

add(
    "datasets",
    PluginError,
    (
        "buffer in a dataset's folder",
        elsewhere(lambda folder, saved: partial(extend, tiny.trainer(folder / "output"), BufferCallback(saved))),
        IN_THE_WAY,
    ),
    (
        "buffer in output_dir",
        lambda folder: partial(extend, tiny.trainer(folder / "output"), BufferCallback(folder / "output")),
        "is output_dir, where the run's other files lie. Pass another folder",
    ),
)
add(
    "datasets",
    ReplayBufferError,
    ("writer in a dataset's folder", elsewhere(lambda _, saved: partial(BufferWriter, saved, "1 MiB")), IN_THE_WAY),
    ("no buffer there", lambda folder: partial(ReplayBuffer.open, folder), "holds no replay buffer (no buffer.json)"),
    ("buffer cut short", opening(cut_short), "bytes instead of"),
    (
        "buffer without a chunk",
        opening(lambda folder: next(folder.glob("*.arrow")).unlink()),
        "is missing: the replay buffer is damaged. Take the folder from a backup, or use another one",
    ),
)
