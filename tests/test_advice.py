"""Advice against the papers' own numbers, scorers against a model and by hand, the stability-gap example."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import warm
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM

from hf_pretrain_ext.advice import TUNED, data_constrained, stability_gap
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.quality import KenLMScorer, PerplexityScorer, column_scores, score_texts, select_best
from hf_pretrain_ext.recipe import load_recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# Size and passes


def test_the_papers_own_run_comes_out() -> None:
    """Guo et al.: 20B tokens of a corpus of 50B are 4 passes over 5B, old sources counted."""
    advice = stability_gap(20e9, corpus_tokens=50e9)
    read = advice.subset_tokens * advice.epochs + advice.old_tokens
    assert advice.epochs == 4 and read == pytest.approx(20e9, rel=1e-6)
    assert (advice.subset_tokens + advice.old_tokens / 4) == pytest.approx(5e9, rel=1e-6)
    assert advice.old_tokens / read == pytest.approx(0.18, rel=1e-6) and advice.notes == ()
    assert advice.share == pytest.approx(0.082)


@pytest.mark.parametrize(
    ("given", "subset", "epochs", "note"),
    [
        ({"budget_tokens": 2e9}, 0.41e9, 4, "not more than 1B"),
        ({"budget_tokens": 100e9}, 20.5e9, 4, "not less than 10B"),
        (
            {"budget_tokens": 20e9, "corpus_tokens": 3e9},
            16.4e9 / 6,
            6,
            "91% of it is read, in 6 passes, and only the worst 9%",
        ),
        (
            {"budget_tokens": 20e9, "corpus_tokens": 3.28e9},
            3.28e9,
            5,
            "100% of it is read, in 5 passes, and nothing can",
        ),
        ({"budget_tokens": 20e9, "corpus_tokens": 1.5e9}, 16.4e9 / 11, 11, "11 passes are more than the 7"),
        ({"budget_tokens": 20e9, "corpus_tokens": 3e9, "epochs": 4}, 3e9, 4, "lasts for 5.5 passes, not for 4"),
        ({"budget_tokens": 20e9, "old_share": 0, "epochs": 2}, 10e9, 2, "not less than 10B"),
        ({"budget_tokens": 20e9, "old_share": 0, "epochs": 3}, 20e9 / 3, 3, None),
    ],
)
def test_other_budgets_are_scaled_and_say_so(given: Any, subset: float, epochs: int, note: str | None) -> None:
    advice = stability_gap(**given)
    assert advice.epochs == epochs and advice.subset_tokens == pytest.approx(subset, rel=1e-6)
    assert any(note in line for line in advice.notes) if note else advice.notes == ()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"budget_tokens": 0}, "budget_tokens must be a number above 0"),
        ({"budget_tokens": "20B"}, "budget_tokens must be a number above 0, such as 20e9, got '20B'"),
        ({"budget_tokens": 1e9, "corpus_tokens": -1}, "corpus_tokens must be a number above 0"),
        ({"budget_tokens": 1e9, "old_share": 1}, "old_share must be a share from 0 on and below 1, got 1"),
        ({"budget_tokens": 1e9, "epochs": 1.5}, "epochs must be an integer from 1 on or None, got 1.5"),
        ({"budget_tokens": 1e9, "epochs": True}, "epochs must be an integer from 1 on or None, got True"),
    ],
)
def test_wrong_budgets_are_named(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        stability_gap(**given)


@pytest.mark.parametrize(("parameters", "rate", "epochs", "decay"), TUNED)
def test_the_tuned_sizes_are_given_as_they_are(parameters: float, rate: float, epochs: int, decay: float) -> None:
    advice = data_constrained(parameters, 200e6)
    assert (advice.learning_rate, advice.epochs, advice.weight_decay) == (rate, epochs, decay)
    assert advice.notes == () and len({tuple(sorted(point.items())) for point in advice.grid}) == 9
    assert {"learning_rate": rate, "num_train_epochs": epochs, "weight_decay": decay} in advice.grid
    twice = data_constrained(parameters, 200e6, ensemble=True)
    assert (twice.epochs, twice.weight_decay) == (2 * epochs, decay / 2)


def test_what_is_extrapolated_is_said() -> None:
    assert data_constrained(250e6, 200e6).weight_decay == 1.6  # nearer to 300M in ratio
    notes = data_constrained(7e9, 1e9).notes
    assert "outside their 150M to 1.4B" in notes[0] and "their data are 200M tokens, yours 1e+09" in notes[1]
    assert "no shortage of data" in data_constrained(150e6, 10e9).notes[-1]
    with pytest.raises(ValueError, match="parameters must be a number above 0"):
        data_constrained(0, 1e9)
    with pytest.raises(ValueError, match="ensemble must be True or False"):
        data_constrained(1e9, 1e9, ensemble=1)  # type: ignore[arg-type]


# Scores


def test_perplexity_is_the_models_own_loss() -> None:
    """Against the loss that the model gives for each text alone; texts of all lengths, batches of all sizes."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = ["a", "", "hello there", "zz" * 60, "the cat sat", "q9:/ x"]
    scores = PerplexityScorer(model.train(), tokenizer, max_tokens=40, batch_size=2)(texts)
    assert model.training and math.isnan(scores[0]) and math.isnan(scores[1])
    for text, score in zip(texts[2:], scores[2:], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:40]])
        with torch.no_grad():
            assert score == pytest.approx(float(model.eval()(input_ids=ids, labels=ids).loss), rel=1e-5)
    again = PerplexityScorer(model, tokenizer, max_tokens=40, batch_size=6)(texts)
    np.testing.assert_allclose(scores, again, rtol=1e-5)


def test_texts_are_cut_to_the_models_positions() -> None:
    small = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="model must be a causal language model, got BertForMaskedLM"):
        PerplexityScorer(BertForMaskedLM(small), tiny.tokenizer())
    scorer = PerplexityScorer(tiny.model(), tiny.tokenizer(), max_tokens=10_000)
    assert scorer.max_tokens == 64 and math.isfinite(scorer(["ab" * 500])[0])


def test_a_trained_scorer_prefers_what_it_was_trained_on() -> None:
    """A model overfitted to one alphabet puts texts of it before texts of another."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.tensor([tokenizer("abcabcabcabcabc")["input_ids"]] * 4)
    for _ in range(60):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data = Dataset.from_dict({"text": ["xyzxyzxyz", "abcabcabc", "zyxzyxzyx", "cabcabcab", "x"]})
    scores = score_texts(data, PerplexityScorer(model, tokenizer), batch_size=3)
    assert select_best(scores, share=0.4) == [1, 3]
    # One that has no score is not chosen even where all are wanted.
    assert select_best(scores, share=1.0) == [0, 1, 2, 3]


def test_without_kenlm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ImportError, match=r"needs the package kenlm: pip install .*, or use PerplexityScorer"):
        KenLMScorer("model.arpa")


def test_kenlm(tmp_path: Path) -> None:
    pytest.importorskip("kenlm", reason="kenlm is not installed: pip install 'hf-pretrain-ext[kenlm]'")
    arpa = tmp_path / "model.arpa"
    arpa.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n"
        "\n\\1-grams:\n-1\t<unk>\t0\n0\t<s>\t0\n-1\t</s>\t0\n-0.5\tgood\t-0.3\n-2\tbad\t0\n"
        "\n\\2-grams:\n-0.2\tgood good\n\n\\end\\\n",
        "utf-8",
    )
    # By hand: log10 of good after the start, good after good, the end after good (by its back-off); a line's end is a
    # space.
    good, bad, nothing = KenLMScorer(arpa)(["good\ngood", "bad bad", "  "])
    assert good == pytest.approx(10 ** ((0.5 + 0.2 + 1.3) / 3), rel=1e-5)
    assert bad == pytest.approx(10 ** ((2 + 2 + 1) / 3), rel=1e-5)
    assert math.isnan(nothing)
    (tmp_path / "odd").write_text("nothing")
    with pytest.raises(ValueError, match="is no model of KenLM"):
        KenLMScorer(tmp_path / "odd")


@pytest.mark.parametrize("make", [np.float32, np.int64, np.array, torch.tensor, tuple])
def test_scores_of_any_kind_of_number(make: Any) -> None:
    """One by one as NumPy's scalars, or all as an array."""

    def scorer(texts: Any) -> Any:
        lengths = [len(text) for text in texts]
        return [make(each) for each in lengths] if isinstance(make, type) and make is not tuple else make(lengths)

    assert score_texts([{"text": "aa"}, {"text": "a"}], scorer).tolist() == [2.0, 1.0]


def test_columns() -> None:
    data = Dataset.from_dict({"score": [0.5, None, 2.0], "text": ["a", "b", "c"]})
    assert select_best(column_scores(data, "score", highest=True), share=0.3) == [2]
    assert select_best(column_scores(data, "score"), share=1.0) == [0, 2]
    for kind in ("numpy", "torch", "arrow"):
        ordered = Dataset.from_dict({"whole": [3, 1], "part": [0.5, 0.25]}).with_format(kind)
        assert column_scores(ordered, "whole").tolist() == [3, 1] and column_scores(ordered, "part").tolist() == [
            0.5,
            0.25,
        ]
    with pytest.raises(ValueError, match=r"column must be one of \['score', 'text'\], got 'scores'"):
        column_scores(data, "scores")
    with pytest.raises(ValueError, match="column 'text' must hold numbers, got 'a'"):
        column_scores(data, "text")


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_that_of_a_plain_loop(seed: int) -> None:
    """Rows by score, then number, until there are tokens enough; many scores are equal."""
    draw = np.random.default_rng(seed)
    scores, lengths = draw.integers(0, 8, 200).astype(float), draw.integers(0, 50, 200)
    expected, total = [], 0
    for row in sorted(range(200), key=lambda n: (scores[n], n)):
        if total >= 1500:
            break
        expected.append(row)
        total += int(lengths[row])
    assert select_best(scores, tokens=1500, lengths=lengths) == sorted(expected)
    assert select_best(scores, share=1500 / int(lengths.sum()), lengths=lengths) == sorted(expected)


@pytest.mark.parametrize(("share", "rows"), [(0.07, 7), (0.14, 14), (0.28, 28), (0.55, 55), (0.56, 56), (0.561, 57)])
def test_a_share_is_that_many_rows(share: float, rows: int) -> None:
    """Just enough rows to hold it: of 100, their float products with 100 are above whole numbers."""
    assert len(select_best(list(range(100)), share=share)) == rows


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: select_best([]), "scores must hold a number for each row"),
        (lambda: select_best([1.0]), "give share or tokens, one of the two"),
        (lambda: select_best([1.0], share=0.5, tokens=5, lengths=[1]), "give share or tokens, one of the two"),
        (lambda: select_best([1.0], share=0), "share must be above 0 and at most 1, got 0"),
        (lambda: select_best([1.0], tokens=5), "tokens needs lengths"),
        (lambda: select_best([1.0], tokens=-5, lengths=[1]), "tokens must be a number above 0, got -5"),
        (
            lambda: select_best([1.0, 2.0], share=0.5, lengths=[1]),
            "lengths must hold the tokens of each of the 2 rows",
        ),
        (lambda: select_best([math.nan], share=0.5), "no row has a score"),
        (lambda: score_texts([{"text": "a"}], lambda texts: []), "scorer must give one number for each of 1 texts"),
        (lambda: score_texts([{"text": "a"}], lambda texts: ["1"]), "scorer must give one number for each of 1 texts"),
        (
            lambda: score_texts([{"text": "a"}], lambda texts: np.ones((1, 2))),
            "scorer must give one number for each of 1",
        ),
        (
            lambda: score_texts([{"text": "a"}], lambda texts: np.float64(1)),
            "scorer must give one number for each of 1",
        ),
        (lambda: score_texts([{"text": None}], len), "row 0 holds no text in the column 'text'"),
        (lambda: score_texts([], len), "dataset must have rows by number, and at least one, got list"),
        (
            lambda: PerplexityScorer(tiny.model(), tiny.tokenizer(), max_tokens=1),
            "max_tokens must be an integer from 2",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


# The example and the recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example leaves, run as a user runs it with fewer steps."""
    folder = tmp_path_factory.mktemp("stability_gap")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [*warm.python(), str(EXAMPLES / "stability_gap.py"), "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_example_makes_what_it_says(made: Path) -> None:
    output = made / "runs" / "stability_gap"
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["one pass over all", "subset, old rate"]
    assert all("gap_depth" in figures for figures in results.values())
    trace = [json.loads(line) for line in (output / "recipe" / "trace.jsonl").read_text().splitlines()]
    (end,) = [line for line in trace if line["event"] == "end"]
    counts = end["counts"]
    total = sum(entry["samples"] for entry in counts.values())
    replayed = {name: entry["samples"] for name, entry in counts.items() if entry["replayed"]}
    assert total == 12 * 8 and abs(sum(replayed.values()) - 0.18 * total) <= 1
    assert abs(replayed["topics"] - 2 * replayed["docstrings"]) <= 2


def test_the_recipe_is_accepted_and_trains(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, from the files of the example: four passes over the subset, old rows others in each."""
    monkeypatch.chdir(made)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", made / "cache")
    recipe = str(EXAMPLES / "stability_gap.yaml")
    assert load_recipe(recipe).training["num_train_epochs"] == 4
    assert main(["plan", recipe]) == 0
    capsys.readouterr()
    small = ["training.use_cpu=true", "forgetting.first_steps=sparse", "training.save_strategy='no'"]
    trainer = load_recipe(recipe, small).build()
    trainer.train()
    counts, plan = trainer.plugin_run.realised(), trainer.plugin_run.plan
    rows = len(trainer.train_dataset)
    steps = trainer.state.global_step
    draws = plan.draws(0, steps * 8)
    new = draws.row[draws.source == 0]
    # An epoch is rounded up to whole steps.
    assert 4 * rows <= counts["train"]["samples"] <= 4 * (rows + 8)
    # Every row of the subset in every pass, each pass in an order of its own.
    assert all(sorted(new[turn * rows : (turn + 1) * rows]) == list(range(rows)) for turn in range(4))
    replayed = sum(entry["samples"] for entry in counts.values() if entry["replayed"])
    assert replayed / (steps * 8) == pytest.approx(0.18, abs=0.01)
    # Old rows go on from pass to pass: none comes again before its source is through.
    for k, source in enumerate(plan.sources[1:], start=1):
        old = draws.row[draws.source == k]
        assert len(set(old[: source.num_rows].tolist())) == min(len(old), source.num_rows or 0)
