"""The example scripts, run as a user runs them, and what TRL's ways of preparing and batching do to replay."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
import warm
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_pretrain_ext import extend, read_stages, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.tokenizer import END_OF_TEXT, train_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def tiny_llama(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Documents of the standard library: sources to learn, prose to replay, other prose to hold out."""
    prose = list(pydoc_data.topics.topics.values())
    code = [inspect.getsource(value) for value in vars(argparse).values() if inspect.isclass(value)]
    return {"new": code, "old": prose[:30], "held_out": prose[30:34]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, list[str]]) -> Path:
    """A tiny model and tokenizer as they come from the Hub: in bfloat16, reading control tokens out of text."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(texts["old"][:10], 400)
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write(folder: Path, texts: dict[str, list[str]], suffix: str) -> dict[str, str]:
    """One file a set, for the arguments of a script: documents as JSONL, or all of them as one text."""
    paths = {}
    for name, documents in texts.items():
        path = folder / f"{name}{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps({"id": 0, "text": text}) + "\n" for text in documents), "utf-8")
        else:
            path.write_text("\n".join(documents), "utf-8")
        paths[f"--{name}"] = str(path)
    return paths


def command_line(model: Path, output: Path, files: dict[str, str], **more: Any) -> list[str]:
    settings = {
        "--model_name_or_path": model,
        "--output_dir": output,
        **files,
        "--replay_ratio": 0.25,
        "--per_device_train_batch_size": 4,
        "--max_steps": 8,
        "--logging_steps": 4,
        "--learning_rate": 1e-2,
        "--use_cpu": True,
        "--report_to": "none",
        "--disable_tqdm": True,
        **{f"--{name}": value for name, value in more.items()},
    }
    return [str(part) for pair in settings.items() for part in pair]


def run_script(name: str, arguments: list[str], cache: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(
        [*warm.python(), str(EXAMPLES / name), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name.removesuffix('.py')}", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # HfArgumentParser looks the module up to read the types of its dataclass.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_run(output: Path, start: Path, steps: int, batch: int, ratio: float) -> list[dict[str, Any]]:
    """What every run with the three plug-ins leaves behind; returns its trace."""
    trained, before = AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(start)
    assert before.dtype == torch.bfloat16 and trained.dtype == torch.float32
    assert not torch.equal(trained.get_input_embeddings().weight, before.get_input_embeddings().weight.float())
    assert all(bool(weight.isfinite().all()) for weight in trained.parameters())
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(start).get_vocab()
    figures = json.loads((output / "forgetting.json").read_text("utf-8"))["sets"]["old"]
    assert figures["steps"] == list(range(steps + 1)) and len(figures["losses"]) == steps + 1
    assert figures["losses"][-1] < figures["losses"][0]
    trace = read_trace(output)
    assert trace[0]["event"] == "start"
    (end,) = [line for line in trace if line["event"] == "end"]
    counts = end["counts"]
    assert end["step"] == steps and counts["replay"]["replayed"] and not counts["train"]["replayed"]
    assert counts["replay"]["samples"] == round(ratio * steps * batch)
    assert counts["train"]["samples"] == steps * batch - counts["replay"]["samples"]
    logged = [line["scalars"]["replay_ratio"] for line in trace if "replay_ratio" in line.get("scalars", {})]
    assert logged == [ratio] * 2
    rates = [line["scalars"]["learning_rate"] for line in trace if "learning_rate" in line.get("scalars", {})]
    assert len(rates) == 2 and 1e-2 > rates[0] > rates[1] > 1e-3
    return trace


# Continual pre-training


def test_continual_pretraining(model_dir: Path, texts: dict[str, list[str]], tmp_path: Path) -> None:
    files = write(tmp_path, texts, ".txt")
    output = tmp_path / "out"
    run_script("continual_pretraining.py", command_line(model_dir, output, files, block_size=32), tmp_path / "cache")
    trace = check_run(output, model_dir, steps=8, batch=4, ratio=0.25)
    (end,) = [line for line in trace if line["event"] == "end"]
    # Blocks of one length: the share in tokens is exact too. The first token of a block is predicted from nothing.
    assert end["counts"]["replay"]["loss_tokens"] == 8 * 31 and end["counts"]["train"]["loss_tokens"] == 24 * 31


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_never_becomes_control_tokens(model_dir: Path, tmp_path: Path, suffix: str) -> None:
    documents = [f"one {END_OF_TEXT} two", f"{END_OF_TEXT}three {END_OF_TEXT}{END_OF_TEXT}", "four"] * 10
    path = write(tmp_path, {"new": documents}, suffix)["--new"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    end = tokenizer.eos_token_id
    assert end in tokenizer(documents[0])["input_ids"]  # what the script must not do
    script = load_script("continual_pretraining.py")
    rows = script.load_blocks([path], tokenizer, 8)
    ids = [token for row in rows["input_ids"] for token in row]
    assert rows.column_names == ["input_ids", "labels"] and rows["labels"][:] == rows["input_ids"][:]
    assert all(len(row) == 8 for row in rows["input_ids"])
    # Every document gives back its text and one end, up to the remainder that fills no block.
    expected = "".join(text + "\0" for text in (["\n".join(documents)] if suffix == ".txt" else documents))
    found = "".join("\0" if token == end else tokenizer.decode([token]) for token in ids)
    assert expected.startswith(found) and len(found) > 0.8 * len(expected)


def test_a_tokenizer_that_begins_documents_itself(model_dir: Path, tmp_path: Path) -> None:
    """Llama's and others' tokenizers put a token before each document; the script leaves that to them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    path = write(tmp_path, {"new": ["a <s> b", "c"]}, ".jsonl")["--new"]
    ids = load_script("continual_pretraining.py").load_blocks([path], tokenizer, 1)["input_ids"][:]
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    assert ids.count(begin) == 2 and ids.count(end) == 2
    assert ids[0] == begin and ids[-1] == end and ids[ids.index(end) + 1] == begin


# Low memory


def test_low_memory_pretraining(model_dir: Path, texts: dict[str, list[str]], tmp_path: Path) -> None:
    """bfloat16 weights, updated inside backward: what is saved has moved, and the trace holds bytes as planned."""
    files = {"--texts": write(tmp_path, {"new": texts["new"]}, ".jsonl")["--new"]}
    output = tmp_path / "out"
    settings = {"rank": 4, "block_size": 32, "max_grad_norm": 0, "bf16": True, "gradient_checkpointing": True}
    arguments = command_line(model_dir, output, files, **settings)
    at = arguments.index("--replay_ratio")
    del arguments[at : at + 2]
    run_script("low_memory_pretraining.py", arguments, tmp_path / "cache")
    trained, before = AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(model_dir)
    assert trained.dtype == before.dtype == torch.bfloat16
    for (name, after), weight in zip(trained.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(after, weight) and bool(after.isfinite().all()), name
    trace = read_trace(output)
    (memory,) = [line for line in trace if line["event"] == "memory"]
    assert memory["state"] == memory["planned"] > 0
    losses = [line["scalars"]["loss"] for line in trace if "loss" in line.get("scalars", {})]
    norms = [line["scalars"]["grad_norm"] for line in trace if "grad_norm" in line.get("scalars", {})]
    assert losses[-1] < losses[0] and all(norm > 0 for norm in norms)


# SFT


def test_sft_replay(model_dir: Path, texts: dict[str, list[str]], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    files = write(tmp_path, {name: [text[:200] for text in found] for name, found in texts.items()}, ".jsonl")
    output = tmp_path / "out"
    arguments = command_line(model_dir, output, files, max_length=128, bf16=False)
    run_script("sft_replay.py", arguments, tmp_path / "cache")
    check_run(output, model_dir, steps=8, batch=4, ratio=0.25)


@pytest.mark.parametrize("settings", [{"packing": False}, {"packing_strategy": "wrapped"}])
def test_sft_replay_packs_as_told(
    model_dir: Path,
    texts: dict[str, list[str]],
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trl = pytest.importorskip("trl")
    made: list[Any] = []

    class Noted(trl.SFTTrainer):  # type: ignore[misc, name-defined]  # found at run time
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            made.append(self)

    script = load_script("sft_replay.py")
    monkeypatch.setattr(script, "SFTTrainer", Noted)
    files = write(tmp_path, {name: [text[:100] for text in found] for name, found in texts.items()}, ".jsonl")
    arguments = command_line(model_dir, tmp_path / "out", files, max_length=128, bf16=False, **settings)
    monkeypatch.setattr(sys, "argv", ["sft_replay.py", *arguments])
    script.main()
    (trainer,) = made
    assert trainer.args.packing is settings.get("packing", True)
    assert trainer.args.packing_strategy == settings.get("packing_strategy", "bfd")
    assert trainer.plugin_run.realised()["replay"]["samples"] == 8
    # TRL ends a text by writing so; the control token must come of it.
    rows = trainer.train_dataset["input_ids"]
    assert sum(list(row).count(trainer.processing_class.eos_token_id) for row in rows) == len(texts["new"])


# What reaches the model through TRL: three kinds of text in three alphabets, told apart by their tokens alone.

ALPHABETS = {"train": "abcdefg", "replay": "0123456", "held": "UVWXYZ"}


def words(alphabet: str, number: int, seed: int) -> list[str]:
    generator = random.Random(seed)

    def word() -> str:
        return "".join(generator.choices(alphabet, k=generator.randint(1, 4)))

    return [" ".join(word() for _ in range(generator.randint(4, 30))) for _ in range(number)]


class Kinds:
    """Texts of each kind, a tokenizer that they share, and whose tokens are whose."""

    def __init__(self) -> None:
        self.texts = {name: words(alphabet, 60, seed) for seed, (name, alphabet) in enumerate(ALPHABETS.items())}
        self.tokenizer = train_tokenizer([text for found in self.texts.values() for text in found], 400)
        self.tokenizer.split_special_tokens = False
        self.of_token: dict[int, str] = {}
        for token in range(len(self.tokenizer)):
            decoded = set(self.tokenizer.decode([token], skip_special_tokens=True))
            for name, alphabet in ALPHABETS.items():
                if decoded & set(alphabet):
                    self.of_token[token] = name

    def of(self, ids: Any) -> str | None:
        """The kind of a row of tokens: one, or None for padding alone."""
        found = {self.of_token[token] for token in torch.as_tensor(ids).tolist() if token in self.of_token}
        assert len(found) <= 1, f"a row mixes {found}"
        return found.pop() if found else None

    def dataset(self, name: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": self.texts[name]})

    def prompts(self, name: str) -> datasets.Dataset:
        middle = [text.index(" ") for text in self.texts[name]]
        return datasets.Dataset.from_dict(
            {
                "prompt": [text[:at] for text, at in zip(self.texts[name], middle, strict=True)],
                "completion": [text[at:] for text, at in zip(self.texts[name], middle, strict=True)],
            }
        )


@pytest.fixture(scope="module")
def kinds() -> Kinds:
    return Kinds()


class Watch:
    """Counts by hand: samples of each kind as they are collated, loss-bearing tokens as the model gets them."""

    def __init__(self, kinds: Kinds, trainer: Any):
        self.kinds = kinds
        self.batches: list[list[str | None]] = []
        self.tokens = {"train": 0, "replay": 0}
        self.predicted = 0
        self.collator: Callable[[Any], Any] = trainer.data_collator
        trainer.data_collator = self.collate
        trainer.model.register_forward_pre_hook(self.before, with_kwargs=True)
        trainer.model.register_forward_hook(self.after, with_kwargs=True)

    def collate(self, features: Any) -> Any:
        if hasattr(features, "draws"):  # of the plan, not of a check or a probe
            self.batches.append([self.kinds.of(feature["input_ids"]) for feature in features])
        return self.collator(features)

    def before(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        if not model.training:
            return
        ids, labels = inputs["input_ids"], inputs["labels"]
        for row in range(len(ids)):
            starts = [0]
            if "position_ids" in inputs:
                starts = inputs["position_ids"][row].eq(0).nonzero().flatten().tolist()
            for first, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                kind = self.kinds.of(ids[row, first:stop])
                # Label t is predicted at t − 1, so the first of a row never is.
                bearing = int(labels[row, max(first, 1) : stop].ne(-100).sum())
                if kind is not None:
                    self.tokens[kind] += bearing
                else:
                    assert bearing == 0

    def after(self, model: Any, args: Any, inputs: dict[str, Any], outputs: Any) -> None:
        if model.training:
            self.predicted += int(outputs.label_mask.sum())


STEPS, MICRO_BATCHES, BATCH = 5, 2, 4

PREPARED: dict[str, dict[str, Any]] = {
    "no packing": {"packing": False},
    "no packing, padding-free": {"packing": False, "padding_free": True, "max_length": None},
    "no packing, padded to a multiple": {"packing": False, "pad_to_multiple_of": 32},
    "bfd": {"packing": True},
    "bfd, evaluation not packed": {"packing": True, "eval_packing": False},
    "bfd, shuffled": {"packing": True, "shuffle_dataset": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "wrapped, padding-free": {"packing": True, "packing_strategy": "wrapped", "padding_free": True},
    "bfd, one sample a batch": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "prompts, no packing": {"packing": False},
    "prompts, bfd": {"packing": True},
    "bfd, padded to a multiple": {"packing": True, "pad_to_multiple_of": 32},
}


def sft_run(kinds: Kinds, output: Path, name: str) -> tuple[Any, ForgettingCallback, Watch]:
    trl = pytest.importorskip("trl")
    settings = {
        "output_dir": str(output),
        "max_length": 80,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "per_device_eval_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **PREPARED[name],
    }
    probe = ForgettingCallback({"held": kinds.dataset("held")}, first_steps="sparse", every=STEPS)
    trainer = trl.SFTTrainer(
        model=tiny_llama(kinds.tokenizer),
        processing_class=kinds.tokenizer,
        args=trl.SFTConfig(**settings),
        train_dataset=kinds.prompts("train") if name.startswith("prompts") else kinds.dataset("train"),
        callbacks=[RewarmCallback(1e-2), ReplayCallback(kinds.dataset("replay"), ratio=0.25), probe],
    )
    watch = Watch(kinds, trainer)
    extend(trainer).train()
    return trainer, probe, watch


@pytest.mark.parametrize("name", PREPARED)
def test_replay_reaches_the_model_through_trl(kinds: Kinds, tmp_path: Path, name: str) -> None:
    trainer, probe, watch = sft_run(kinds, tmp_path, name)
    realised = trainer.plugin_run.realised()
    # One batch may be fetched ahead of the last step.
    micro_batches = STEPS * trainer.args.gradient_accumulation_steps
    size = BATCH * MICRO_BATCHES
    seen = [kind for batch in watch.batches[:micro_batches] for kind in batch]
    assert len(seen) == STEPS * size
    for step in range(STEPS):
        assert seen[step * size : (step + 1) * size].count("replay") == size // 4
    assert {kind: entry["samples"] for kind, entry in realised.items()} == {
        "train": seen.count("train"),
        "replay": seen.count("replay"),
    }
    tokens = {kind: entry["loss_tokens"] for kind, entry in realised.items()}
    # Flattened rows with padding behind them do not tell where one ends: unknown is right, and so is the number.
    if name != "bfd, padded to a multiple" or None not in tokens.values():
        assert tokens == watch.tokens
    assert sum(watch.tokens.values()) == watch.predicted > 0
    last = [line for line in trainer.state.log_history if "replay_ratio" in line][-1]
    assert last["replay_ratio"] == 0.25
    # Tokens read are the loss-bearing ones and, of every document or row, the first.
    read = {kind: entry["tokens"] for kind, entry in realised.items()}
    assert last["replay_ratio_tokens"] == read["replay"] / sum(read.values())
    assert all(read[kind] >= watch.tokens[kind] + seen.count(kind) for kind in read)
    assert sum(kind == "replay" for kind in seen) and all(count > 0 for count in watch.tokens.values())
    check_heldout_loss(kinds, trainer, probe, wrapped="wrapped" in name, split="split" in name)


def check_heldout_loss(kinds: Kinds, trainer: Any, probe: ForgettingCallback, wrapped: bool, split: bool) -> None:
    """The last probe against one forward pass a document: packing and padding must not change what is measured."""
    if wrapped or split:
        # Their rows are not whole documents: each prepared row, or piece of one, by itself.
        pieces = [
            piece
            for row in probe._prepared["held"]
            for piece in torch.tensor(row["input_ids"]).split(row.get("seq_lengths") or [len(row["input_ids"])])
        ]
    else:
        end = torch.tensor([kinds.tokenizer.eos_token_id])
        pieces = [
            torch.cat([kinds.tokenizer(text, return_tensors="pt")["input_ids"][0], end])
            for text in kinds.texts["held"]
        ]
    model = trainer.model.eval()
    loss, number = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            logits = model(input_ids=piece[None]).logits[0, :-1].double()
            loss += float(functional.cross_entropy(logits, piece[1:], reduction="sum")) if len(piece) > 1 else 0.0
            number += len(piece) - 1
    entry = probe.history.sets["held"]
    assert entry["steps"] == [0, STEPS] and entry["tokens"] == number
    assert entry["losses"][-1] == pytest.approx(loss / number, rel=2e-6)


# A life of many stages


@pytest.mark.slow
def test_many_stages(tmp_path: Path) -> None:
    """Three stages at one constant rate, each replaying all before it by what was seen, and a branch that anneals."""
    run_script("many_stages.py", ["--output_dir", str(tmp_path / "life"), "--steps", "16"], tmp_path / "cache")
    stages = read_stages(tmp_path / "life" / "deploy")
    assert stages is not None
    assert [(stage.name, stage.kind, stage.steps) for stage in stages] == [
        ("stage-1", "stage", 16),
        ("code", "stage", 16),
        ("tables", "stage", 16),
        ("anneal-4", "anneal", 4),
    ]
    shares = [{source.name: (source.tokens or 0) / 64 for source in stage.sources} for stage in stages]
    assert shares[:2] == [{"stage-1": 256}, {"code": 192, "stage-1": 64}]
    # 320 to 192 of 64: the tokens that the life had seen of each.
    assert shares[2] == {"tables": 192, "stage-1": 40, "code": 24}
    assert [stage.rate for stage in stages[:3]] == [pytest.approx(1.65e-3)] * 3 and stages[3].annealed
    for before, after in itertools.pairwise(stages):
        # Weights and held-out sets go from one to the next: where a stage ends, the next begins.
        for name, held in before.recorded["forgetting"].items():
            assert after.recorded["forgetting"][name]["baseline"] == pytest.approx(held["last"], rel=1e-5)
    assert stages[2].recorded["forgetting"]["tables"]["last"] < stages[1].recorded["forgetting"]["tables"]["last"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "life" / "deploy")
