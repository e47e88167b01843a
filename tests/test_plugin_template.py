"""The template of a third-party plug-in: its own tests pass, and it is found once it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import warm

TEMPLATE = Path(__file__).resolve().parents[1] / "examples" / "plugin_template"


def test_its_tests_pass_and_it_is_found(tmp_path: Path) -> None:
    """Installed into a folder of its own, which a path adds to this environment."""
    site, copied = tmp_path / "site", shutil.copytree(TEMPLATE, tmp_path / "template")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    done = subprocess.run([*install, str(copied)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    listed = subprocess.run(
        [*warm.python(), "-m", "hf_pretrain_ext", "plugins"], capture_output=True, text=True, env=environment
    )
    assert "zloss        hpe_zloss.ZLossCallback" in listed.stdout, listed.stderr[-2000:]
    tests = [*warm.python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(copied / "tests")]
    done = subprocess.run(tests, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout, done.stdout[-500:]
