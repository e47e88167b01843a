"""Pushing to a Hub on loopback by the real client, in processes of their own: card, checkpoints, breaks, tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from loopback_hub import Hub

from hf_pretrain_ext.checkpoint import find_faults
from hf_pretrain_ext.hub_card import BEGIN

TRAIN = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from datasets import Dataset, DatasetInfo
from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback


def of_the_hub(name, seed):
    urls = {{f"hf://datasets/{{name}}@{commit}/a.parquet": {{"num_bytes": 1}}}}
    return Dataset.from_dict(tiny.rows(20, seed=seed)[:], info=DatasetInfo(download_checksums=urls))


old = {{name: of_the_hub("org/" + name, seed) for seed, name in enumerate(("text", "open", "hidden"), start=3)}}
plugins = [
    RewarmCallback(peak_lr=1e-2, warmup=2),
    ReplayCallback(old, ratio=0.5),
    ForgettingCallback({{"old": tiny.rows(8, seed=3)}}),
]
trainer = extend(
    tiny.trainer(
        {folder!r}, *plugins, save_strategy="steps", save_steps=3, push_to_hub=True, hub_model_id="me/toy",
        hub_strategy="all_checkpoints", hub_always_push=True, hub_token={token!r}, logging_steps=1,
    )
)
trainer.train()
trainer.push_to_hub(license="mit")
"""

PUSH = """
from huggingface_hub import HfApi
print(HfApi().upload_folder(repo_id="me/toy", folder_path={folder!r}, ignore_patterns=["checkpoint-*"]).oid)
"""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as started:
        started.datasets = {
            "org/text": {"gated": "manual", "cardData": {"license": "cc-by-4.0"}},
            "org/open": {"gated": False, "cardData": {"license": ["mit", "apache-2.0"]}},
        }
        yield started


def run(script: str, hub: Hub, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
    environment = {
        **kept,
        **given,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **variables,
    }
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def pushed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pushed")
    script = TRAIN.format(tests=str(Path(__file__).parent), folder=str(folder / "out"), token=hub.token, commit=COMMIT)
    done = run(script, hub, folder / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_card_goes_along(hub: Hub, pushed: Any) -> None:
    card = ModelCard(hub.files["me/toy"]["README.md"].decode())
    assert card.content.count(BEGIN) == 1 and "### What was learned and forgotten" in card.content
    assert card.data.license == "mit" and {"hf-pretrain-ext", "replay"} <= set(card.data.tags)
    for figure in ("plan.png", "forgetting.png"):
        assert hub.files["me/toy"][f"continued_pretraining/{figure}"].startswith(b"\x89PNG")


def test_the_card_names_what_is_gated_and_licences(hub: Hub, pushed: Any) -> None:
    card = ModelCard(hub.files["me/toy"]["README.md"].decode())
    rows = {cells[1].strip(): cells for line in card.content.splitlines() if len(cells := line.split("|")[1:-1]) == 8}
    for name, licence in (("text", "cc-by-4.0"), ("open", "mit, apache-2.0"), ("hidden", "not stated")):
        cells = rows[f"{name} (replayed)"]
        assert [cells[place].strip() for place in (2, 3, 7)] == [f"org/{name}", COMMIT, licence]
    said = "Gated on the Hub, so that access has to be asked for: org/text (granted by its authors)."
    assert said in card.content
    assert "Whether access has to be asked for was not looked up on the Hub: org/hidden." in card.content
    assert card.data.datasets == ["org/text", "org/open", "org/hidden"]
    assert "the Hub tells nothing of org/hidden" in pushed[1].stderr


def test_a_pushed_checkpoint_verifies_after_download(hub: Hub, pushed: Any, tmp_path: Path) -> None:
    """With the real client, by another process's cache; then as a resume would look at it."""
    script = f"""
from huggingface_hub import snapshot_download
print(snapshot_download("me/toy", local_dir={str(tmp_path / "down")!r}))
"""
    done = run(script, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    for step in (3, 6):
        there = tmp_path / "down" / f"checkpoint-{step}"
        assert (there / "hf_pretrain_ext" / "manifest.json").is_file()
        assert find_faults(there) == []
    (there / "hf_pretrain_ext" / "state.json").write_text("{}")
    assert find_faults(there) != []


def test_the_token_is_nowhere(hub: Hub, pushed: Any) -> None:
    folder, done = pushed
    assert hub.token not in done.stdout + done.stderr
    written = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert any(path.name == "trace.jsonl" for path in written)
    # The host pickles its arguments, the token among them: there too it is left out.
    assert any(path.name == "training_args.bin" for path in written)
    for path in written:
        assert hub.token.encode() not in path.read_bytes(), path
    for name, data in hub.files["me/toy"].items():
        assert hub.token.encode() not in data, name


def test_an_interrupted_push_is_taken_up_again(hub: Hub, pushed: Any, tmp_path: Path) -> None:
    """The connection breaks in the middle of a large file; nothing is committed half; what is up there stays."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(3):
        (folder / f"part-{number}.bin").write_bytes(os.urandom(20_000))
    before, commits, already = dict(hub.files["me/toy"]), len(hub.commits), len(hub.objects)
    hub.uploads, hub.break_after = 0, 1
    script = PUSH.format(folder=str(folder))
    broken = """
import huggingface_hub.utils._http as http
import huggingface_hub.lfs as lfs
real = http.http_backoff
def once(*args, **kwargs):
    return real(*args, **{**kwargs, "max_retries": 0})
lfs.http_backoff = once
"""
    first = run(broken + script, hub, tmp_path / "home")
    assert first.returncode != 0 and hub.token not in first.stderr
    assert len(hub.commits) == commits and hub.files["me/toy"] == before
    kept, hub.uploads = len(hub.objects) - already, 0
    assert 0 < kept < 3
    second = run(script, hub, tmp_path / "home")
    assert second.returncode == 0, second.stderr[-2000:]
    assert hub.uploads == 3 - kept
    for number in range(3):
        assert hub.files["me/toy"][f"part-{number}.bin"] == (folder / f"part-{number}.bin").read_bytes()


def test_a_wrong_token_is_an_error_that_does_not_show_it(hub: Hub, tmp_path: Path) -> None:
    wrong = "hf_" + "WrongToken" * 3
    script = TRAIN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"), token=wrong, commit=COMMIT)
    done = run(script, hub, tmp_path / "home", HF_TOKEN=wrong)
    assert done.returncode != 0
    assert "401" in done.stderr or "Invalid" in done.stderr
    assert wrong not in done.stdout + done.stderr
