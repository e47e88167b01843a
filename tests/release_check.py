"""The wheel and the sdist as a user gets them: `python tests/release_check.py DIST WORK [--only oldest|newest|bare]`.

For the oldest releases that pyproject.toml allows, and for the newest that the index has: a new environment, the wheel
with its extras, the command, the README's ten lines, and tests that touch the host most. For a third environment with
transformers and peft alone: what training leaves loads there (tests/test_loads_elsewhere.py, run by this Python).
`make release-check` builds, asks twine, and calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ("accelerate", "datasets", "peft", "transformers", "trl")
"""Those whose lower bound is installed exactly; torch stays the pinned one, whose older builds bring CUDA along."""

TESTS = [
    "tests/test_host.py",
    "tests/test_extend.py",
    "tests/test_resume.py",
    "tests/test_matrices.py",
    "tests/test_reload.py",
    "tests/test_loads_elsewhere.py",
    "tests/test_meta_attention_attach.py",
    "tests/test_meta_attention_inference.py",
    "tests/test_meta_tokens_callback.py",
    "tests/test_metadata_inference.py",
    "tests/test_gradnormlorp_callback.py",
]
TOOLS = ["hypothesis", "psutil", "pytest", "pytest-xdist"]


def project() -> dict[str, list[str]]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {"": found["dependencies"], **found["optional-dependencies"]}


def oldest() -> list[str]:
    """`name==lower bound` of those in OLDEST."""
    declared = [line for lines in project().values() for line in lines]
    bounds = dict(found.groups() for line in declared if (found := re.match(r"([\w-]+)>=([\d.]+)", line)))
    return [f"{name}=={bounds[name]}" for name in OLDEST]


def torch_pin() -> str:
    return next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    print("$", *(Path(part).name if index == 0 else part for index, part in enumerate(command)), flush=True)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-6000:]}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def environment(folder: Path, *packages: str | Path) -> Path:
    """Python of a new environment with these."""
    if folder.exists():
        shutil.rmtree(folder)
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    # torch first and alone: everything else is resolved against its pinned release.
    run(python, "-m", "pip", "install", "-q", torch_pin())
    run(python, "-m", "pip", "install", "-q", torch_pin(), *packages)
    run(python, "-m", "pip", "check")
    return python


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    return {each["name"]: each["version"] for each in listed if each["name"] in ("torch", "huggingface_hub", *OLDEST)}


def check_wheel(which: str, wheel: Path, work: Path) -> str:
    """Installs the wheel and uses it from a folder that holds nothing of the project but its tests."""
    pins = oldest() if which == "oldest" else list(OLDEST)
    # With lm-eval, whose plug-in is one of those that the tests go through.
    python = environment(work / which, f"{wheel}[bnb,eval,metadata,report,trl]", *pins, *TOOLS)
    found = versions(python)
    away = work / f"{which}-away"
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir(parents=True)
    command = python.parent / "hf-pretrain-ext"
    listed = run(command, "plugins", cwd=away)
    missing = [name for name in ("rewarm", "replay", "metadata", "meta_tokens", "gradnormlorp") if name not in listed]
    if missing:
        raise SystemExit(f"`hf-pretrain-ext plugins` does not list {missing}")
    readme = (ROOT / "README.md").read_text("utf-8")
    ten_lines = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)[0]
    (away / "ten_lines.py").write_text(ten_lines)
    run(python, "ten_lines.py", cwd=away, OMP_NUM_THREADS="1")
    run(command, "report", "runs/readme", cwd=away)
    for part in ("tests", "pyproject.toml"):
        source = ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, away / part)
    # The tests import the installed package: the project's own folder is not here.
    where = run(python, "-c", "import hf_pretrain_ext; print(hf_pretrain_ext.__file__)", cwd=away).strip()
    if not where.startswith(str(work / which)):
        raise SystemExit(f"the tests would import {where}")
    tested = run(
        python, "-m", "pytest", "-q", "-m", "not slow and not docs", "-n", "2", "--dist", "loadfile",
        "-p", "no:cacheprovider", *TESTS, cwd=away, OMP_NUM_THREADS="1",
    )  # fmt: skip
    return f"{which}: {found}; {tested.strip().splitlines()[-1]}"


def check_bare(work: Path) -> str:
    """What training leaves, in an environment with transformers and peft alone."""
    python = environment(work / "bare", "transformers", "peft")
    tested = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_loads_elsewhere.py",
        cwd=ROOT, ELSEWHERE_PYTHON=str(python), OMP_NUM_THREADS="1",
    )  # fmt: skip
    return f"bare: {versions(python)}; {tested.strip().splitlines()[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with the wheel")
    parser.add_argument("work", type=Path, help="folder for the environments")
    parser.add_argument("--only", choices=["oldest", "newest", "bare"], help="one of the three")
    given = parser.parse_args()
    wheels = sorted(given.dist.resolve().glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{given.dist} must hold one wheel, holds {[path.name for path in wheels]}: make clean build")
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines = [
        check_bare(work) if which == "bare" else check_wheel(which, wheels[0], work)
        for which in ("oldest", "newest", "bare")
        if given.only in (None, which)
    ]
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
