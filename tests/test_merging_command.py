"""`hf-pretrain-ext merge`, and the example script."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_pretrain_ext import merging
from hf_pretrain_ext.cli import main
from tests.merging_checkpoints import make_checkpoints, same_bits, state_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
    return {name: str(folder) for name, folder in made.items()}


def test_commands_do_what_the_functions_do(folders: dict[str, str], tmp_path: Path) -> None:
    base, instruct, adapted, wide = folders.values()
    here, there = tmp_path / "commands", tmp_path / "functions"
    commands = {
        "a": ["average", base, adapted, "--weights", "1", "3", "--max-shard-size", "3KB"],
        "b": ["lines", base, adapted, "--alpha", "0.25", "--donor", base],
        "c": ["lines", base, instruct, adapted, "--alpha", "0.3", "--beta", "0.4", "--blocks", "model.layers"],
        "d": ["residual", base, instruct, adapted, "--dtype", "float32"],
        "e": ["average", base, wide, "--donor", wide],
    }
    for name, command in commands.items():
        assert main(["merge", *command, "--output", str(here / name)]) == 0
    merging.average([base, adapted], [1, 3], output=there / "a", max_shard_size="3KB")
    merging.lines(base, adapted, 0.25, output=there / "b", donor=base)
    merging.lines(base, [instruct, adapted], 0.3, 0.4, output=there / "c")
    merging.instruction_residual(base, instruct, adapted, output=there / "d", dtype="float32")
    merging.average([base, wide], output=there / "e", donor=wide)
    for name in commands:
        assert same_bits(state_of(here / name), state_of(there / name)), name
        ours, theirs = (json.loads((folder / name / "merge.json").read_text()) for folder in (here, there))
        assert ours == theirs
        assert sorted(path.name for path in (here / name).iterdir()) == sorted(
            path.name for path in (there / name).iterdir()
        )


def test_a_configuration_instead_of_a_merge(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct, adapted, _ = folders.values()
    commands = {
        "a": ["average", base, adapted, "--weights", "1", "3", "--dtype", "bfloat16"],
        "b": ["lines", base, instruct, adapted, "--alpha", "0.3", "--beta", "0.4", "--merge-method", "ties"],
        "c": ["residual", base, instruct, adapted, "--tokenizer-source", "union"],
    }
    commands["b"] += ["--density", "0.2"]
    for name, command in commands.items():
        assert main(["merge", *command, "--mergekit", str(tmp_path / f"{name}.yaml")]) == 0
    assert "mergekit-yaml" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml", "c.yaml"]
    found = {name: yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in commands}
    assert found["a"] == yaml.safe_load(merging.average_yaml([base, adapted], [1, 3], out_dtype="bfloat16"))
    assert found["b"]["parameters"]["lambda"][0] == {"filter": "model.layers.", "value": [0.3, 0.7]}
    assert found["b"]["models"][1] == {"model": adapted, "parameters": {"weight": 1.0, "density": 0.2}}
    assert found["c"]["tokenizer_source"] == "union"
    before = (tmp_path / "a.yaml").read_text()
    with pytest.raises(SystemExit, match="File exists"):
        main(["merge", "average", base, instruct, "--mergekit", str(tmp_path / "a.yaml")])
    assert (tmp_path / "a.yaml").read_text() == before


def test_intruders(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=40, target_modules=["q_proj", "up_proj"]),
    )
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.normal_()
    adapter.save_pretrained(tmp_path / "adapter")
    command = ["merge", "intruders", folders["base"], str(tmp_path / "adapter"), "--k", "4", "--eps", "0.9"]
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
    report = merging.intruder_dimensions(folders["base"], tmp_path / "adapter", 4, 0.9)
    assert capsys.readouterr().out == f"{report}\n"
    assert json.loads((tmp_path / "found.json").read_text()) == report.to_dict()
    assert report.total > 0 and len(report.matrices) == 4
    assert main([*command, "--target-modules", "q_proj"]) == 0
    assert "of 2 matrices (k=4, eps=0.9)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("average {base}", "give --output FOLDER to merge, or --mergekit FILE"),
        (
            "average {base} {base} --output {out} --mergekit x.yaml",
            "give --output FOLDER to merge, or --mergekit FILE",
        ),
        ("average {base} --output {out}", "hf-pretrain-ext: checkpoints must be a list of 2 or more"),
        ("average {base} nowhere --output {out}", r"hf-pretrain-ext: checkpoints\[1\] must be a folder"),
        ("lines {base} {base} --output {out}", "hf-pretrain-ext: alpha must be given for one tuned model"),
        ("lines {base} {base} --alpha 1 --density 0.5 --output {out}", "--density are mergekit's"),
        ("lines {base} {base} --alpha 1 --merge-method ties --output {out}", "--merge-method is mergekit's"),
        (
            "average {base} {base} --tokenizer-source union --output {out}",
            "--tokenizer-source and --density are merge",
        ),
        ("average {base} {base} --donor {base} --mergekit {out}", "with --mergekit, only the formula's options"),
        ("average {base} {base} --allow-other-tokenizer --mergekit {out}", "with --mergekit, only the formula's"),
        ("intruders {base} {base} --k 0", "hf-pretrain-ext: k must be an integer from 1 on, got 0"),
        ("intruders {base} {base} --device nowhere", "hf-pretrain-ext: device must be one of torch"),
        ("residual {base} {base}", "the following arguments are required: adapted"),
        ("sum", "invalid choice: 'sum'"),
    ],
)
def test_mistakes_end_in_one_line(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    filled = [part.format(base=folders["base"], out=tmp_path / "out") for part in command.split()]
    with pytest.raises(SystemExit) as caught:
        main(["merge", *filled])
    assert caught.value.code not in (0, None)
    text = f"{caught.value.code}\n{capsys.readouterr().err}"
    assert re.search(message, text), text
    assert "Traceback" not in text and list(tmp_path.iterdir()) == []


def test_help_lists_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["merge", "--help"])
    text = capsys.readouterr().out
    assert all(form in text for form in ("average", "lines", "residual", "intruders"))
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "merge" in capsys.readouterr().out


# The document and the example


@pytest.mark.docs
def test_the_document_runs(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, with checkpoints where it says that they are."""
    text = (ROOT / "docs" / "merging.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    places = {"org/base": "base", "org/instruct": "instruct", "runs/adapted": "adapted", "runs/a": "base"}
    places |= {"runs/b": "adapted", "runs/law": "instruct", "runs/code": "adapted"}
    for place, name in places.items():
        shutil.copytree(folders[name], place)
    model = AutoModelForCausalLM.from_pretrained("org/base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("runs/adapter")
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    exec(second, names)
    out = capsys.readouterr().out
    assert "0 intruder dimensions among" in out and "merge_method: ties" in out
    (commands,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for command in commands.splitlines():
        assert main(shlex.split(command)[1:]) == 0
    for ours, theirs in (("average", "a"), ("lines", "b"), ("residual", "c")):
        assert same_bits(state_of(Path("merged") / ours), state_of(Path("merged") / theirs))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.docs
def test_the_example_chooses_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, toys = ROOT / "examples" / "merge_checkpoints.py", tmp_path / "toys"
    done = subprocess.run(
        [*warm.python(), str(script), "--output_dir", str(toys)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = [[float(part) for part in line.split()] for line in done.stdout.splitlines()[1:-1]]
    assert [row[0] for row in table] == [1.0, 0.75, 0.5, 0.25, 0.0]
    # What was learned is lost from row to row, and the base has lost all of it.
    assert table[0][2] < table[2][2] < table[4][2] and table[4][1] < table[0][1]
    assert all(row[3] == pytest.approx((row[1] + 2 * row[2]) / 3, abs=2e-3) for row in table)
    best = min(table, key=lambda row: row[3])[0]
    record = json.loads((toys / "merged" / "merge.json").read_text())
    assert record["settings"] == {"alpha": best, "beta": 1 - best, "blocks": "model.layers", "number_of_blocks": 4}
    assert AutoModelForCausalLM.from_pretrained(toys / "merged").num_parameters() == record["output"]["parameters"]

    # With models and texts of one's own.
    files = {"base": "base", "tuned": "tuned", "old": "old.jsonl", "new": "new.jsonl"}
    given = [part for name, file in files.items() for part in (f"--{name}", str(toys / file))]
    more = ["--output_dir", str(tmp_path / "own"), "--alphas", "0.5", "--new_weight", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *given, *more])
    runpy.run_path(str(script), run_name="__main__")
    row = [float(part) for part in capsys.readouterr().out.splitlines()[1].split()]
    assert row[:3] == table[2][:3] and row[3] == pytest.approx((row[1] + row[2]) / 2, abs=1e-3)
    own = json.loads((tmp_path / "own" / "merged" / "merge.json").read_text())
    assert own["settings"]["alpha"] == 0.5 and own["inputs"][0]["source"] == str(toys / "base")
