"""Ways through the host that a user's script may take: pushes to the Hub, a real SIGTERM, trainers of its own."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import settings
import tiny
import torch
import transformers
import warm
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_pretrain_ext import extend
from hf_pretrain_ext.checkpoint import find_faults

WITHOUT_SCHEDULE = ("replay", "forgetting")


class FakeHub:
    """Keeps what `upload_folder` would send, as it is at the moment of the call."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sent: list[str] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, folder_path: str, path_in_repo: str | None = None, **kwargs: Any) -> Future[None]:
        if path_in_repo is not None:
            shutil.copytree(folder_path, self.folder / f"{len(self.sent)}" / path_in_repo)
            self.sent.append(path_in_repo)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize(
    ("strategy", "names"),
    [("checkpoint", ["last-checkpoint"] * 3), ("all_checkpoints", ["checkpoint-2", "checkpoint-4", "checkpoint-6"])],
)
def test_a_pushed_checkpoint_is_whole_and_resumes(
    strategy: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **kwargs: None)  # the host's last, of the finished model
    saving = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "save_total_limit": 1}
    whole = extend(tiny.trainer(tmp_path / "run", *settings.make(settings.TOGETHER), **saving, **pushing))
    whole.train()
    assert hub.sent == names
    assert [find_faults(hub.folder / f"{number}" / name) for number, name in enumerate(names)] == [[], [], []]
    resumed = extend(tiny.trainer(tmp_path / "again", *settings.make(settings.TOGETHER), **saving))
    resumed.train(resume_from_checkpoint=str(hub.folder / "1" / names[1]))
    assert resumed.plugin_run.resumed_at == 4
    assert tiny.same_weights(whole, resumed)
    assert whole.plugin_run.realised() == resumed.plugin_run.realised()


class Terminated(TrainerCallback):
    """Sends SIGTERM to this process between two micro-batches of the step after `at`."""

    def __init__(self, at: int):
        self.at = at
        self.host: Any = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
            # The host asks for the checkpoint from a timer's thread.
            until = time.monotonic() + 60
            while not self.host.jit_manager.is_checkpoint_requested and time.monotonic() < until:
                time.sleep(0.01)


def test_sigterm_within_a_step_resumes_exactly(tmp_path: Path) -> None:
    """Dropout has drawn for one micro-batch of two when the signal comes."""
    accumulating = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "dropout": 0.3}

    def build(folder: Path, *callbacks: TrainerCallback) -> Any:
        plugins = settings.make(settings.TOGETHER)
        return extend(tiny.trainer(folder, *plugins, *callbacks, enable_jit_checkpoint=True, **accumulating))

    whole = build(tmp_path / "whole")
    whole.train()
    terminated = Terminated(at=3)
    stopped = build(tmp_path / "run", terminated)
    handler = next(cb for cb in stopped.callback_handler.callbacks if isinstance(cb, JITCheckpointCallback))
    terminated.host, handler.jit_manager.kill_wait = handler, 0
    stopped.train()
    saved = tmp_path / "run" / "checkpoint-3"
    assert (saved / "hf_pretrain_ext" / "state.json").is_file() and find_faults(saved) == []
    resumed = build(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plugin_run.resumed_at == 3
    assert tiny.same_weights(whole, resumed)
    assert whole.plugin_run.realised() == resumed.plugin_run.realised()
    assert tiny.history(whole)[:-1] == tiny.history(resumed)[:-1]


class UserTrainer(Trainer):
    """A user's own loss and optimizer."""

    losses = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.losses += model.training
        outputs = model(**inputs)
        loss = outputs["loss"] + 0.1 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, momentum=0.9)
        return self.optimizer


def of_the_user(folder: Path, names: tuple[str, ...], given: bool, **arguments: Any) -> Any:
    """A UserTrainer; `given`: built with `optimizers=(optimizer, scheduler)`."""
    more: dict[str, Any] = {}
    if given:
        more["model"] = tiny.model(dropout=0.1)
        optimizer = torch.optim.AdamW(more["model"].parameters(), lr=1e-2)
        optimizers = (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9))
        more["cls"] = functools.partial(UserTrainer, optimizers=optimizers)
    plugins = settings.make(names)
    saving = {"save_strategy": "steps", "save_steps": 3, "dropout": 0.1}
    return extend(tiny.trainer(folder, *plugins, **{"cls": UserTrainer, **saving, **more, **arguments}))


@pytest.mark.parametrize(("names", "given"), [(settings.TOGETHER, False), (WITHOUT_SCHEDULE, True)])
def test_a_users_trainer_resumes_exactly(names: tuple[str, ...], given: bool, tmp_path: Path) -> None:
    whole = of_the_user(tmp_path, names, given)
    mine = whole.optimizer
    whole.train()
    assert whole.losses == 6
    assert type(whole.optimizer.optimizer) is (torch.optim.AdamW if given else torch.optim.SGD)
    if given:
        assert whole.optimizer.optimizer is mine
        assert whole.lr_scheduler.get_last_lr() == pytest.approx([1e-2 * 0.9**6])
    resumed = of_the_user(tmp_path, names, given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.losses == 3 and tiny.same_weights(whole, resumed)
    assert whole.plugin_run.realised() == resumed.plugin_run.realised()
    assert tiny.history(whole)[:-1] == tiny.history(resumed)[:-1]


def test_model_init_makes_every_train_the_first(tmp_path: Path) -> None:
    """Nothing of the first run, the order of its data included, is left in the second."""

    class Dropped(Trainer):
        def __init__(self, model: Any = None, **kwargs: Any):
            super().__init__(model_init=lambda: tiny.model(dropout=0.1), **kwargs)

    trainer = extend(tiny.trainer(tmp_path, *settings.make(settings.TOGETHER), cls=Dropped))
    trainer.train()
    first = tiny.weights(trainer), trainer.plugin_run.realised(), tiny.history(trainer)
    trainer.train()
    assert all(torch.equal(first[0][name], weight) for name, weight in tiny.weights(trainer).items())
    assert (trainer.plugin_run.realised(), tiny.history(trainer)) == first[1:]


PICKLED = """
import pickle, sys
import settings, tiny, torch
from hf_pretrain_ext import extend

trainer = extend(tiny.trainer(sys.argv[1], *settings.make(settings.TOGETHER), dropout=0.1))
copy = pickle.loads(pickle.dumps(trainer))
assert all(plugin.run is copy.plugin_run is not trainer.plugin_run for plugin in copy.plugin_run.plugins)
for each in (copy, trainer):
    torch.manual_seed(0)  # of dropout, which the host seeds at construction only
    each.train()
assert tiny.same_weights(copy, trainer) and copy.plugin_run.realised() == trainer.plugin_run.realised()
assert tiny.history(copy)[:-1] == tiny.history(trainer)[:-1]
"""


def test_a_pickled_trainer_trains_the_same(tmp_path: Path) -> None:
    command = [*warm.python(), "-c", PICKLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
