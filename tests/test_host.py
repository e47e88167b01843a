"""What the package leans on in transformers, TRL and accelerate beyond their public interfaces.

A failure here means that upstream renamed or reshaped something, and says what; the rest of the tests may then fail
in ways that are harder to read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler, skip_first_batches
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
    trainer_callback,
    trainer_jit_checkpoint,
)

from hf_pretrain_ext import SamplePlan, Source, _host, extend
from hf_pretrain_ext.callbacks import ReplayCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import _SENTINEL as SENTINEL
from hf_pretrain_ext.checkpoint import STATE_FOLDER, find_faults
from hf_pretrain_ext.loader import PlanBatchSampler
from hf_pretrain_ext.schedules import cosine
from hf_pretrain_ext.trainer import PluginTrainerMixin, lambda_lr

PACKAGE = Path(_host.__file__).parent

# Parameters after self, as we call them or pass them on.
SIGNATURES = {
    "Trainer._maybe_log_save_evaluate": [
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "Trainer._get_grad_norm": ["model", "grad_norm"],
    "Trainer._hp_search_setup": ["trial"],
    "Trainer._load_best_model": [],
    "Trainer._load_optimizer_and_scheduler": ["checkpoint"],
    "Trainer._load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "Trainer._load_rng_state": ["checkpoint"],
    "Trainer._save_checkpoint": ["model", "trial"],
    "Trainer._save": ["output_dir", "state_dict"],
    "Trainer._save_rng_state": ["output_dir"],
    "Trainer._remove_unused_columns": ["dataset", "description"],
    "Trainer._get_collator_with_removed_columns": ["data_collator", "description"],
    "Trainer._get_output_dir": ["trial"],
    "SFTTrainer._prepare_dataset": [
        "dataset",
        "processing_class",
        "args",
        "packing",
        "formatting_func",
        "dataset_name",
    ],
}
ATTRIBUTES = {
    "Trainer": {
        "_loss_shifts_labels",
        "_created_lr_scheduler",
        "_eval_dataloaders",
        "_globalstep_last_logged",
        "_tr_loss",
        "_train_batch_size",
    },
    "SFTTrainer": {"_formatting_func", "_skip_prepare_dataset"},
}


def host_class(name: str) -> type[Trainer]:
    if name == "SFTTrainer":
        return pytest.importorskip("trl").SFTTrainer
    return getattr(transformers, name)


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# Names and signatures


def test_the_tables_here_are_the_module_s_own() -> None:
    """Every private name in `_host` is looked at below, be it in its table or in its text."""
    listed = {f"{owner}.{name}" for owner, names in _host.PRIVATE.items() for name in names}
    assert listed == SIGNATURES.keys()
    told: set[str] = set()
    owner = ""
    for found, name in re.findall(r"(\w*Trainer)?\.(_[a-z]\w*)", _host.__doc__ or ""):
        owner = found or owner
        told.add(f"{owner}.{name}")
    assert told == listed | {f"{owner}.{name}" for owner, names in ATTRIBUTES.items() for name in names}


def test_nothing_private_is_used_that_is_not_looked_at_here() -> None:
    known = {name.partition(".")[2] for name in SIGNATURES} | set().union(*ATTRIBUTES.values())
    used = set()
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r"\b(?:trainer|super\(\))\.(_[a-z]\w*)", path.read_text("utf-8")))
    own = {name for name in vars(PluginTrainerMixin) if re.match("_[a-z]", name)} | {"_plugin_run"}
    assert used - own - known == set()
    assert (own - known) & set(dir(Trainer)) == set(), "the host has a private part of a name that we use"


@pytest.mark.parametrize("name", SIGNATURES)
def test_private_methods_exist_and_take_what_we_give(name: str) -> None:
    owner, _, method = name.partition(".")
    function = getattr(host_class(owner), method)
    assert parameters(function) == SIGNATURES[name]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("call_model_init", ["trial"]),
        ("get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        ("create_optimizer", ["model"]),
        ("create_scheduler", ["num_training_steps", "optimizer"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("log", ["logs", "start_time"]),
        ("evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("get_total_train_batch_size", ["args"]),
        ("compute_loss_context_manager", []),
        ("_get_output_dir", ["trial"]),
    ],
)
def test_methods_that_we_override_or_call(method: str, expected: list[str]) -> None:
    assert parameters(getattr(Trainer, method)) == expected


def test_attributes_of_a_trainer(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, gradient_accumulation_steps=2)
    made_later = {"_globalstep_last_logged", "_tr_loss", "_eval_dataloaders"}
    for name in ATTRIBUTES["Trainer"] - made_later:
        assert hasattr(trainer, name), name
    # Made where workers are to outlive an evaluation, which would start some here.
    assert "self._eval_dataloaders[" in inspect.getsource(Trainer)
    assert hasattr(DataLoader([1]), "_iterator")
    assert _host.train_batch_size(trainer) == 4 and trainer.get_total_train_batch_size(trainer.args) == 8
    assert isinstance(trainer.callback_handler.callbacks, list)
    assert trainer.control.should_log is False and trainer.is_in_train is False
    seen: dict[str, Any] = {}

    class AtTheStart(TrainerCallback):
        """What is put back on a resume must be there by now, and must not be reset later."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(loss=trainer._tr_loss.item(), logged=trainer._globalstep_last_logged)
            trainer._tr_loss += 6.0

    trainer.add_callback(AtTheStart())
    other = tiny.trainer(tmp_path, gradient_accumulation_steps=2, logging_steps=3)
    trainer.args.logging_steps = trainer.state.logging_steps = 3
    trainer.train()
    other.train()
    assert seen == {"loss": 0.0, "logged": 0}
    first, second = (tiny.history(run)[0] for run in (trainer, other))
    assert first["step"] == second["step"] == 3
    assert first["loss"] == pytest.approx(second["loss"] + 6.0 / 3, rel=1e-6)
    assert trainer._globalstep_last_logged == 6


def test_whose_the_scheduler_is(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    assert not _host.has_own_scheduler(trainer)
    trainer.train()
    assert trainer._created_lr_scheduler is True and not _host.has_own_scheduler(trainer)
    # Marked as its own, it is made anew by the next train(); not marked, it stays.
    first = trainer.lr_scheduler
    trainer.train()
    assert trainer.lr_scheduler is not first
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = Trainer(
        model,
        tiny.arguments(tmp_path, max_steps=1),
        default_data_collator,
        tiny.rows(8),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    assert _host.has_own_scheduler(given)
    given.train()
    assert _host.has_own_scheduler(given)


def test_attributes_of_an_sft_trainer(tmp_path: Path) -> None:
    from datasets import Dataset as Table

    from hf_pretrain_ext.demo.tokenizer import train_tokenizer

    trl = pytest.importorskip("trl")
    tokenizer = train_tokenizer(["some text of a few words"], 300)
    tokenizer.split_special_tokens = False

    def format_text(row: dict[str, str]) -> str:
        return "so: " + row["words"]

    raw = Table.from_dict({"words": ["one two three"] * 5})
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "max_length": 64}
    trainer = trl.SFTTrainer(
        model=tiny.model(vocabulary=len(tokenizer)),
        args=trl.SFTConfig(**arguments, packing=True),
        processing_class=tokenizer,
        train_dataset=raw,
        formatting_func=format_text,
    )
    assert trainer._formatting_func is format_text and trainer._skip_prepare_dataset is False
    assert trainer.args.eval_packing is None
    packed = _host.prepare_dataset(trainer, raw, "replay", True)
    assert packed[:] == trainer.train_dataset[:] and "seq_lengths" in packed.column_names
    trainer.args.eval_packing = False
    plain = _host.prepare_dataset(trainer, raw, "held", False)
    assert len(plain) == 5 and tokenizer.decode(plain[0]["input_ids"]) == "so: one two three<|endoftext|>"
    # Preparing what is prepared changes nothing that is trained on.
    assert _host.prepare_dataset(trainer, plain, "held", False)["input_ids"][:] == plain["input_ids"][:]
    # What stands besides input_ids and labels is stripped but for what TRL's collator reads.
    (kept,), _ = _host.strip_columns(trainer, [packed], trainer.data_collator)
    assert set(kept.column_names) == {"input_ids", "labels", "seq_lengths"}
    skipping = trl.SFTTrainer(
        model=tiny.model(vocabulary=len(tokenizer)),
        args=trl.SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        processing_class=tokenizer,
        train_dataset=tiny.rows(4),
    )
    assert skipping._skip_prepare_dataset is True
    assert _host.prepare_dataset(skipping, raw, "replay", True) is raw


# Behaviour


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def test_which_models_shift_their_labels(tmp_path: Path) -> None:
    causal = tiny.trainer(tmp_path)
    aligned = Trainer(tiny_t5(), tiny.arguments(tmp_path), default_data_collator, tiny.rows(4))
    assert causal._loss_shifts_labels is True and _host.shifts_labels(causal) is True
    assert aligned._loss_shifts_labels is False and _host.shifts_labels(aligned) is False
    # And what the name says is so: the first label bears loss in the one alone. (Nothing else in T5 reads the last.)
    for trainer, label, matters in ((causal, 0, False), (aligned, 0, True), (aligned, -1, True)):
        batch = default_data_collator([tiny.rows(1)[0]])
        other = {**batch, "labels": (batch["labels"] + torch.eye(tiny.LENGTH, dtype=torch.int64)[label]) % 64}
        with torch.no_grad():
            losses = [trainer.model.eval()(**inputs).loss.item() for inputs in (batch, other)]
        assert (losses[0] != losses[1]) is matters


def test_columns_are_removed_as_relied_on(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    dataset = tiny.rows(3).add_column("note", ["a", "b", "c"])
    stripped = trainer._remove_unused_columns(dataset, description="training")
    assert set(stripped.column_names) == {"input_ids", "labels"} and "note" in dataset.column_names
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        trainer._remove_unused_columns(dataset.select_columns(["note"]))

    seen: list[Any] = []
    collate = trainer._get_collator_with_removed_columns(lambda rows: seen.append(rows) or rows, "training")
    row = {"input_ids": [1], "labels": [1], "note": "a"}
    assert collate([row]) == [{"input_ids": [1], "labels": [1]}] and "note" in row
    assert collate(["not a dict"]) == ["not a dict"]
    assert len(seen) == 2

    trainer = tiny.trainer(tmp_path, remove_unused_columns=False)
    assert trainer._remove_unused_columns(dataset) is dataset
    assert trainer._get_collator_with_removed_columns(default_data_collator) is default_data_collator


@pytest.mark.parametrize("tensors", ["pt", "np"])
def test_masking_collators_keep_a_generator_as_we_reseed_it(tmp_path: Path, tensors: str) -> None:
    """`loader` puts such a generator to the position in the run; it must be there, and be what is drawn from."""
    from hf_pretrain_ext.demo.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some text"], 260)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    collator = DataCollatorForLanguageModeling(tokenizer, seed=3, return_tensors=tensors)
    wrapped = tiny.trainer(tmp_path)._get_collator_with_removed_columns(collator)
    assert wrapped.data_collator is collator and collator.seed == 3 and collator.generator is None
    collator.create_rng()
    assert isinstance(collator.generator, torch.Generator if tensors == "pt" else np.random.Generator)

    def draw(seed: int) -> list[list[int]]:
        if tensors == "pt":
            collator.generator.manual_seed(seed)
        else:
            collator.generator = np.random.default_rng(seed)
        return wrapped([{"input_ids": list(range(1, 200))}])["input_ids"].tolist()

    assert draw(1) == draw(1) != draw(2)
    assert DataCollatorForLanguageModeling(tokenizer).seed is None


class Recording(Trainer):
    """Notes in which order a checkpoint is made."""

    events: list[str]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.events.append("optimizer")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.events.append("rng")

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)
        self.events.append("model")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.events.append("push")
        if (Path(checkpoint_folder) / STATE_FOLDER).exists():
            assert find_faults(checkpoint_folder) == []
            self.events.append("ours was complete")


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    def record(*callbacks: Any) -> list[str]:
        events: list[str] = []

        class AtSave(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                events.append("on_save")

        def patched(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def noted(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                events.append(name)
                return result

            monkeypatch.setattr(owner, name, noted)

        patched(trainer_callback.TrainerState, "save_to_json")
        patched(transformers.trainer, "rotate_checkpoints")
        trainer: Any = tiny.trainer(
            tmp_path, *callbacks, AtSave(), cls=Recording, max_steps=2, save_strategy="steps", save_steps=2
        )
        trainer.events = events
        if callbacks:
            extend(trainer)
        # Only now: at construction it would ask the Hub for a repository.
        trainer.args.push_to_hub = True
        monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
        trainer.train()
        return events

    return record


ORDER = ["model", "optimizer", "rng", "save_to_json", "push", "rotate_checkpoints", "on_save"]


def test_order_of_a_checkpoint(recorded: Callable[..., list[str]]) -> None:
    """`state.save_to_json` comes after all other files and before push, rotation and `on_save`."""
    assert recorded() == ORDER


def test_our_files_come_between_the_state_and_the_push(recorded: Callable[..., list[str]]) -> None:
    events = recorded(RewarmCallback(peak_lr=1e-2, warmup=1))
    assert events == [*ORDER[:5], "ours was complete", *ORDER[5:]]


def test_the_sigterm_checkpoint_calls_the_method_that_we_override() -> None:
    source = inspect.getsource(trainer_jit_checkpoint.CheckpointManager.execute_jit_checkpoint)
    assert "self.trainer._save_checkpoint(self.trainer.model, trial=None)" in source
    assert SENTINEL in inspect.getsource(trainer_jit_checkpoint)


def test_a_step_ends_before_its_log_line_and_save(tmp_path: Path) -> None:
    """Ours are counted and logged between the two; the host's log line comes before its evaluation and its save."""
    events: list[str] = []

    class Noted(Trainer):
        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            events.append("host's turn")
            super()._maybe_log_save_evaluate(*args, **kwargs)

    class Events(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append(f"step end {state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("log")

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("evaluate")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("save")

    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    tiny.trainer(tmp_path, Events(), cls=Noted, eval_dataset=tiny.rows(2), **settings).train()
    # The second line is the evaluation's; after the epoch there is a turn too.
    assert events[:6] == ["step end 1", "host's turn", "log", "log", "evaluate", "save"]


def test_lambda_lr_saves_numbers_only(tmp_path: Path) -> None:
    trainer = extend(
        tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup=2), save_strategy="steps", save_steps=3)
    )
    trainer.train()
    state = torch.load(tmp_path / "checkpoint-3" / "scheduler.pt", weights_only=True)
    assert not any(state["lr_lambdas"]) and state["last_epoch"] == 3
    # So the settings at hand decide, not those of the file; given the object itself, it would be the file's.
    schedule = cosine(total_steps=6, peak_lr=2e-2, warmup=0, min_lr=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    assert LambdaLR(optimizer, schedule).state_dict()["lr_lambdas"] != [{}]
    scheduler = lambda_lr(optimizer, schedule, base_lr=1e-2)
    scheduler.load_state_dict({**state, "lr_lambdas": state["lr_lambdas"][:1], "base_lrs": [1e-2]})
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(schedule(4))]


@pytest.mark.parametrize("data_seed", [None, 11])
def test_the_host_s_order_is_the_plan_s(tmp_path: Path, data_seed: int | None) -> None:
    """Two epochs of the Trainer's own loader against `order="host"`, ragged batches and all."""
    data = tiny.rows(13)
    number = {tuple(ids): row for row, ids in enumerate(data["input_ids"])}
    order: list[int] = []

    class Noted(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            order.extend(number[tuple(ids)] for ids in inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    settings = {"max_steps": -1, "num_train_epochs": 2, "data_seed": data_seed}
    trainer = tiny.trainer(tmp_path, cls=Noted, data=data, **settings)
    trainer.train()
    seed = trainer.args.seed if data_seed is None else data_seed
    plan = SamplePlan((Source("train", 13, order="host"),), seed=seed)
    assert order == plan.draws(0, 26).row.tolist()
    assert sorted(order[:13]) == sorted(order[13:]) == list(range(13)) and order[:13] != order[13:]


class Asked(Dataset[Any]):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        self.indices: list[Any] = []

    def __len__(self) -> int:
        return 1000

    def __getitems__(self, indices: Any) -> list[int]:
        self.indices.append(indices)
        return list(indices)


def loaders() -> Iterator[tuple[Asked, PlanBatchSampler, Any]]:
    for workers in (0, 1):
        dataset, sampler = Asked(), PlanBatchSampler(4, 10, lambda: 100)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=torch.tensor, num_workers=workers)
        yield dataset, sampler, Accelerator(cpu=True).prepare(loader)


def test_accelerate_keeps_our_batch_sampler() -> None:
    for dataset, sampler, prepared in loaders():
        assert isinstance(prepared, DataLoaderShard) and prepared.batch_sampler is sampler and len(prepared) == 10
        whole = [batch.tolist() for batch in prepared]
        assert whole == [list(range(100 + 4 * k, 104 + 4 * k)) for k in range(10)]
        skipped = skip_first_batches(prepared, 3)
        assert isinstance(skipped.batch_sampler, SkipBatchSampler)
        assert skipped.batch_sampler.batch_sampler is sampler and len(skipped) == 7
        assert [batch.tolist() for batch in skipped] == whole[3:]
        # Ranges go through as they are, a whole batch at a time.
        assert all(isinstance(indices, range) for indices in dataset.indices)
        assert len(dataset.indices) in (0, 17)  # workers keep theirs to themselves


def test_sharding_over_ranks_deals_our_ranges_in_turn() -> None:
    ours = PlanBatchSampler(4, 10, lambda: 0)
    shards = [BatchSamplerShard(ours, num_processes=2, process_index=rank) for rank in (0, 1)]
    dealt = [list(shard) for shard in shards]
    assert [batch for pair in zip(*dealt, strict=True) for batch in pair] == list(ours)
    assert all(isinstance(batch, range) for batch in dealt[0] + dealt[1])
    assert [list(SkipBatchSampler(shard, 2)) for shard in shards] == [batches[2:] for batches in dealt]


def test_a_resume_skips_whole_micro_batches_of_the_epoch(tmp_path: Path) -> None:
    """`skip_first_batches` is what the host resumes with, on the loader that we made."""
    asked: list[int] = []
    original = transformers.trainer.skip_first_batches

    def noted(loader: Any, number: int = 0) -> Any:
        asked.append(number)
        assert isinstance(loader.batch_sampler, PlanBatchSampler)
        return original(loader, number)

    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "max_steps": 4}
    extend(tiny.trainer(tmp_path, ReplayCallback(tiny.rows(20, seed=9), ratio=0.25), **settings)).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "skip_first_batches", noted)
        resumed = extend(tiny.trainer(tmp_path, ReplayCallback(tiny.rows(20, seed=9), ratio=0.25), **settings))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert asked == [6]


def test_random_state_is_one_file_of_one_process(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    folder = tmp_path / "state"
    folder.mkdir()
    trainer._save_rng_state(str(folder))
    assert [path.name for path in folder.iterdir()] == ["rng_state.pth"]
