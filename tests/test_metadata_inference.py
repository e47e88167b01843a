"""Conditioned prompts where others take them: `pipeline` of transformers, and lm-eval, with a trained model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from test_metadata_callback import run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_pretrain_ext.callbacks import MetadataCallback
from hf_pretrain_ext.metadata import ControlTokens, Template, condition, generate

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["aaa", "bbb"]
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that read a's from a.io, scored low, and b's from b.io, scored high: by metadata, by token."""
    made = tmp_path_factory.mktemp("conditioned")
    draw = random.Random(0)
    signs = [draw.choice("ab") for _ in range(400)]
    data = Dataset.from_dict(
        {
            "text": [sign * 12 for sign in signs],
            "url": [f"https://{sign}.io/" for sign in signs],
            "score": [float(sign == "b") for sign in signs],
        }
    )
    for name, given in {
        "metadata": {"template": "{domain} "},
        "control": {"control": ControlTokens(0.5, drop=0.0)},
    }.items():
        settings: dict[str, Any] = {"block_size": 32, "cooldown": 0, **given}
        trained = run(
            made / f"{name}-run",
            MetadataCallback(**settings),
            data=data,
            processing_class=tiny.tokenizer(),
            model=tiny.model(vocabulary=len(tiny.tokenizer())),
            max_steps=60,
            learning_rate=2e-2,
        )
        trained.train()
        trained.save_model(str(made / name))
    return made


def prompts(folder: Path, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """What brings each letter out: as text, and as arguments of `generate`."""
    if name == "metadata":
        template = Template.load(folder / name)
        return {
            sign: (
                condition("", template, domain=f"{sign}.io"),
                {"template": template, "values": {"domain": f"{sign}.io"}},
            )
            for sign in "ab"
        }
    tokens = ControlTokens.load(folder / name).tokens
    return {sign: (condition("", control=token), {"control": token}) for sign, token in zip("ab", tokens, strict=True)}


@pytest.mark.parametrize("name", ["metadata", "control"])
def test_pipeline(name: str, folder: Path) -> None:
    """From the folder alone: it writes what it was conditioned on, as `generate` does with the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    write = pipeline("text-generation", model=str(folder / name), device="cpu")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    for sign, (text, given) in prompts(folder, name).items():
        [found] = write(text, return_full_text=False, add_special_tokens=False, **settings)
        assert found["generated_text"].strip() == sign * 6
        template = given.pop("template", None)
        assert generate(model, tokenizer, "", template, **given, **settings) == sign * 6


@pytest.mark.parametrize("name", ["metadata", "control"])
def test_lm_eval_takes_the_prefix_as_system_instruction(name: str, folder: Path, tmp_path: Path) -> None:
    """Without a chat template it stands before the prompt as it is, few-shot examples between."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"q": "", "label": label}) + "\n" for label in (0, 1)))
    (tmp_path / "letters.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    for number, (_sign, (text, _given)) in enumerate(prompts(folder, name).items()):
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder / name}",
            tasks=["letters"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            system_instruction=text,
            log_samples=True,
            batch_size=1,
            device="cpu",
        )
        for sample in found["samples"]["letters"]:
            assert sample["arguments"][0] == (text, "aaa")
            likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert likelihoods[number] > likelihoods[1 - number] + 3
