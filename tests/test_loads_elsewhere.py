"""What training leaves loads with transformers and peft alone.

In a process that cannot import this package; with ELSEWHERE_PYTHON, in that interpreter, whose environment has none
(`make release-check` makes one).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import torch
import warm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import GradNormLoRPCallback
from hf_pretrain_ext.hub_card import write_card
from hf_pretrain_ext.meta_tokens import load_meta_tokens

IDS = torch.tensor([[5, 9, 2, 33, 17, 8, 40, 3]])

LOADER = """
import sys
sys.modules["hf_pretrain_ext"] = None  # an import of it raises
import json
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, base, ids, output = sys.argv[1:]
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
    merged = model
ids = torch.tensor(json.loads(ids))
with torch.no_grad():
    found = {"logits": model.eval()(ids).logits, "merged": merged.eval()(ids).logits}
save_file({name: value.float().contiguous() for name, value in found.items()}, output)
try:
    print("tokens", len(AutoTokenizer.from_pretrained(folder)))
except Exception as error:
    print("no tokenizer", type(error).__name__)
assert not [name for name in sys.modules if name.startswith("hf_pretrain_ext.")]
"""


def elsewhere(folder: Path, base: Path | None, output: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Logits of what lies in `folder`, by a process without this package; and what it says."""
    other = os.environ.get("ELSEWHERE_PYTHON")
    command = [
        *([other] if other else warm.python()),
        "-c",
        LOADER,
        str(folder),
        str(base or ""),
        json.dumps(IDS.tolist()),
        str(output),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output), done.stdout + done.stderr


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def trained(folder: Path, *plugins: Any, **given: Any) -> Any:
    trainer = extend(tiny.trainer(folder / "run", *plugins, **{"learning_rate": 0.01, **given}))
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    write_card(folder / "run", output=folder / "saved" / "README.md", figures=False)
    return trainer


@pytest.mark.parametrize("names", [settings.TOGETHER, ("gradnormlorp",), ("l2_init", "reptile", "self_distillation")])
def test_full_models(names: tuple[str, ...], tmp_path: Path) -> None:
    trainer = trained(tmp_path, *settings.make(names))
    found, _ = elsewhere(tmp_path / "saved", None, tmp_path / "logits.safetensors")
    assert torch.equal(found["logits"], logits(trainer.model))


@pytest.mark.parametrize("name", ["metadata", "metadata-control"])
def test_conditioned_models_come_with_their_tokenizer(name: str, tmp_path: Path) -> None:
    row = settings.by_name(name)
    trainer = trained(tmp_path, row.make(), **row.trainer())
    found, said = elsewhere(tmp_path / "saved", None, tmp_path / "logits.safetensors")
    assert torch.equal(found["logits"], logits(trainer.model))
    assert f"tokens {len(trainer.processing_class)}" in said


def test_dora_adapters_of_gradnormlorp(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = trained(tmp_path, GradNormLoRPCallback(adapter=settings.dora(), rank=2), model=base)
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "saved" / "README.md").read_text()
    # What PEFT leaves to be filled in is gone, and so is the folder of the base.
    assert "more information needed" not in card.lower() and "Model ID" not in card and str(tmp_path) not in card
    assert "An adapter: it needs its base model" in card and "### Framework versions" in card
    found, _ = elsewhere(tmp_path / "saved", tmp_path / "base", tmp_path / "logits.safetensors")
    torch.testing.assert_close(found["logits"], logits(trainer.model), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["merged"], found["logits"], rtol=0, atol=1e-5)


def test_meta_attention_needs_this_package_and_the_card_says_so(tmp_path: Path) -> None:
    """Plain transformers loads the rest, and says which weights it leaves out."""
    row = settings.by_name("meta_tokens")
    trainer = trained(tmp_path, row.make(), **row.trainer())
    _, said = elsewhere(tmp_path / "saved", None, tmp_path / "logits.safetensors")
    assert "meta" in said and "UNEXPECTED" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    load_meta_tokens(model, tmp_path / "saved")
    assert torch.equal(logits(model), logits(trainer.model))
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "hf_pretrain_ext.meta_tokens.load_meta_tokens" in text
    assert "vLLM and GGUF converters cannot carry it" in text
