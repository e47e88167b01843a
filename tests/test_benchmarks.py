"""lm-eval before and after a stage, on tasks that need no download (tests/lm_eval_tasks)."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import torch
from transformers import TrainerCallback

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
sys.path.insert(0, str(settings.LM_EVAL_TASKS))

from questions import ANSWERS, QUESTIONS

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.benchmarks import BenchmarkConfig, run_benchmarks
from hf_pretrain_ext.callbacks import BenchmarkCallback
from hf_pretrain_ext.hub_card import write_card
from hf_pretrain_ext.hub_card.facts import read_facts
from hf_pretrain_ext.hub_card.metadata import check_metadata, metadata_of

CHOICES = ("bbb", "ccc")


def benchmarks(tasks: Any = "letters", **given: Any) -> BenchmarkCallback:
    return BenchmarkCallback(tasks, include_path=settings.LM_EVAL_TASKS, **given)


def trainer(folder: Path, *plugins: TrainerCallback, **given: Any) -> Any:
    return tiny.trainer(folder, *plugins, processing_class=tiny.tokenizer(), **{"dropout": 0.1, **given})


@torch.no_grad()
def by_hand(model: Any) -> float:
    """The share of questions whose right answer is the likelier one."""
    tokenizer, right = tiny.tokenizer(), 0
    model.eval()
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        likelihoods = []
        for choice in CHOICES:
            context, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (question, question + choice))
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        right += likelihoods.index(max(likelihoods)) == answer
    return right / len(ANSWERS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    plugin = benchmarks(["letters", "letters_ppl"])
    made = extend(trainer(folder, plugin, learning_rate=0.05))
    start = by_hand(made.model)
    made.train()
    return folder, made, plugin, start


def test_figures_are_those_counted_by_hand(run: Any) -> None:
    folder, made, plugin, start = run
    before, after = (plugin.found[when]["letters"]["acc"] for when in ("before", "after"))
    assert before["value"] == start
    assert after["value"] == by_hand(made.model)
    # The standard error of a mean of zeros and ones, with n − 1.
    for figure in (before, after):
        share = figure["value"]
        assert figure["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(ANSWERS) - 1)))
        assert figure["higher_is_better"] is True and figure["samples"] == len(ANSWERS)
    perplexity = plugin.found["after"]["letters_ppl"]
    assert perplexity["word_perplexity"]["higher_is_better"] is False
    assert perplexity["bits_per_byte"]["value"] != plugin.found["before"]["letters_ppl"]["bits_per_byte"]["value"]
    assert json.loads((folder / "benchmarks.json").read_text())["after"] == plugin.found["after"]


def test_the_log_has_both_columns_at_their_steps(run: Any) -> None:
    _, made, plugin, _ = run
    lines = [
        (line["step"], line["benchmark_letters_acc"]) for line in tiny.history(made) if "benchmark_letters_acc" in line
    ]
    assert lines == [
        (0, plugin.found["before"]["letters"]["acc"]["value"]),
        (made.state.global_step, plugin.found["after"]["letters"]["acc"]["value"]),
    ]


def test_the_card_shows_both_columns(run: Any) -> None:
    folder, _, plugin, _ = run
    text = write_card(folder, figures=False).read_text()
    before, after = (plugin.found[when]["letters"]["acc"] for when in ("before", "after"))
    row = "| letters | acc ↑ | {:.4f} ± {:.4f} | {:.4f} ± {:.4f} | 8 |"
    assert row.format(before["value"], before["stderr"], after["value"], after["stderr"]) in text
    assert "| letters\\_ppl | bits\\_per\\_byte ↓ |" in text.replace("letters_ppl", "letters\\_ppl").replace(
        "bits_per_byte", "bits\\_per\\_byte"
    )
    assert "lm\\_eval" in text or "lm_eval" in text  # its version
    facts = read_facts(folder)
    data = metadata_of(facts, "mine", {})
    assert check_metadata(data) == []
    values = {m["type"]: m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert values["acc"] == after["value"]
    # Written twice, a result stands there once.
    again = metadata_of(facts, "mine", data)
    assert again["model-index"] == data["model-index"]


def test_a_model_is_left_as_it_was() -> None:
    model, tokenizer = tiny.model(0.1), tiny.tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state, special = torch.get_rng_state(), dict(tokenizer.special_tokens_map)
    level = logging.getLogger("lm_eval").level
    config = BenchmarkConfig("letters", include_path=str(settings.LM_EVAL_TASKS), limit=3, num_fewshot=0)
    found = run_benchmarks(model, tokenizer, config)
    assert found["letters"]["acc"]["samples"] == 3
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(tokenizer.special_tokens_map) == special and tokenizer.padding_side == tiny.tokenizer().padding_side
    assert logging.getLogger("lm_eval").level == level


class StopsAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def test_a_resumed_run_keeps_the_first_column(tmp_path: Path, run: Any) -> None:
    first = benchmarks()
    extend(trainer(tmp_path, first, StopsAt(2), learning_rate=0.05)).train()
    assert set(first.found) == {"before", "after"}  # stopped by choice: measured
    second = benchmarks()
    extend(trainer(tmp_path, second, learning_rate=0.05)).train(resume_from_checkpoint=True)
    _, _, whole, _ = run
    assert second.found["before"] == first.found["before"] == {"letters": whole.found["before"]["letters"]}
    assert second.found["after"] == {"letters": whole.found["after"]["letters"]}
    [each] = read_facts(tmp_path).benchmarks
    assert each.before and each.before[0] == second.found["before"]["letters"]["acc"]["value"]
    assert each.after and each.after[0] == second.found["after"]["letters"]["acc"]["value"]


def test_with_other_tasks_in_the_resume_there_is_no_first_column(tmp_path: Path) -> None:
    extend(trainer(tmp_path, benchmarks(), StopsAt(2))).train()
    second = benchmarks("letters_ppl")
    extend(trainer(tmp_path, second)).train(resume_from_checkpoint=True)
    assert set(second.found) == {"after"}
    assert {(each.task, each.before) for each in read_facts(tmp_path).benchmarks} == {("letters_ppl", None)}


class SavesInsideAStep(TrainerCallback):
    """What the host does on SIGTERM."""

    trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def test_a_run_that_is_about_to_be_killed_is_not_measured(tmp_path: Path) -> None:
    plugin, saves = benchmarks(), SavesInsideAStep()
    made = extend(trainer(tmp_path, plugin, saves))
    saves.trainer = made
    made.train()
    assert made.state.global_step < 4 and set(plugin.found) == {"before"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_column_alone(tmp_path: Path, when: str) -> None:
    plugin = benchmarks(when=when)
    extend(trainer(tmp_path, plugin)).train()
    assert set(plugin.found) == {when}
    text = write_card(tmp_path, figures=False).read_text()
    assert "not measured" in next(line for line in text.splitlines() if line.startswith("| letters"))


def test_a_failure_before_training_is_raised_and_one_after_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_pretrain_ext.callbacks import benchmarks as module

    calls: list[int] = []

    def fails(*args: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no such split")

    monkeypatch.setattr(module, "run_benchmarks", fails)
    with pytest.raises(RuntimeError, match="no such split"):
        extend(trainer(tmp_path / "before", benchmarks())).train()
    trained = extend(trainer(tmp_path / "after", benchmarks(when="after")))
    with caplog.at_level(logging.WARNING):
        trained.train()
    assert trained.state.global_step == trained.state.max_steps
    assert len(calls) == 2 and "no benchmarks after training (RuntimeError: no such split)" in caplog.text


def test_without_lm_eval_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PluginError, match=r"lm-eval is not installed. pip install 'hf-pretrain-ext\[eval\]'"):
        extend(trainer(tmp_path, benchmarks()))
    with pytest.raises(ImportError, match=r"pip install 'hf-pretrain-ext\[eval\]'"):
        run_benchmarks(tiny.model(), tiny.tokenizer(), BenchmarkConfig("letters"))
