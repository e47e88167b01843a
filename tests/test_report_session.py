"""What a trace says of each call of `train()`: machine, memory, time, warnings, and how it ended."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_pretrain_ext import extend
from hf_pretrain_ext.callbacks import ForgettingCallback, RewarmCallback
from hf_pretrain_ext.checkpoint import CheckpointError
from hf_pretrain_ext.session import machine, memory_use
from hf_pretrain_ext.trace import read_trace
from tests import tiny


class Break(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error


def trained(
    folder: Path, *callbacks: TrainerCallback, resume: bool | None = None, **given: Any
) -> list[dict[str, Any]]:
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, **given}
    trainer = extend(tiny.trainer(folder, RewarmCallback(peak_lr=1e-2, warmup=2), *callbacks, **given))
    trainer.train(resume_from_checkpoint=resume)
    return read_trace(folder)


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def test_a_session_from_start_to_end(tmp_path: Path) -> None:
    events = trained(tmp_path)
    assert [event["event"] for event in events[:2]] == ["start", "session"] and events[-1]["event"] == "end"
    used = of(events, "usage")
    assert [event["step"] for event in used] == [2, 4, 6, 6]  # at each log of a loss, and at the end
    seconds = [event["seconds"] for event in used]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < 600
    (session,) = of(events, "session")
    assert session["step"] == 0 and session["ranks"] == 1 and session["command"]
    assert session["machine"]["device"] == "cpu" and all(event["device_peak"] is None for event in used)


def test_memory_is_that_of_this_process() -> None:
    """Against the kernel's own count of pages, and against what is allocated."""
    before = memory_use(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    during = memory_use(torch.device("cpu"))
    pages = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert during["resident"] == pytest.approx(pages, rel=0.05)
    assert during["resident"] - before["resident"] > 48 << 20
    assert during["peak_resident"] >= max(before["peak_resident"], during["resident"] - (1 << 20))
    assert held.sum() == 64 << 20


def test_memory_of_a_device_is_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a device's module; one that does not count (Apple's) is not known."""
    asked: list[torch.device] = []
    counting = SimpleNamespace(max_memory_allocated=lambda device: asked.append(device) or 12345)
    monkeypatch.setattr(torch, "get_device_module", lambda device: counting)
    assert memory_use(torch.device("cuda", 1))["device_peak"] == 12345 and asked == [torch.device("cuda", 1)]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert memory_use(torch.device("mps"))["device_peak"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_cuda_device() -> None:
    device = torch.device("cuda", 0)
    held = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    del held
    assert (memory_use(device)["device_peak"] or 0) >= 64 << 20
    assert machine(device)["device_name"] == torch.cuda.get_device_name(0)


def test_the_machine_is_told_without_its_name() -> None:
    import platform

    found = machine(torch.device("cpu"))
    assert 1 <= found["processors"] <= 4096 and found["memory"] > 1 << 28
    name = platform.node()
    assert not name or name not in str(found)


@pytest.mark.parametrize("error", [RuntimeError("out of <memory>\nand more lines"), KeyboardInterrupt()])
def test_an_exception_is_recorded_and_goes_on(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        trained(tmp_path, Break(5, error))
    last, broken = read_trace(tmp_path)[-2:]
    assert (last["event"], last["step"]) == ("usage", 5)
    message = str(error).split("\n")[0]
    assert broken == {"event": "interrupted", "step": 5, "error": type(error).__name__, "message": message}


def test_a_resume_tells_what_was_lost(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        trained(tmp_path, Break(5, RuntimeError("broken")))
    events = trained(tmp_path, resume=True)
    (resume,) = of(events, "resume")
    assert (resume["step"], resume["reached"], resume["interrupted"]) == (4, 5, "RuntimeError")
    assert of(events, "interrupted") == [] and [event["step"] for event in of(events, "session")] == [0, 4]
    assert events[-1]["event"] == "end" and events[-1]["step"] == 6


def test_what_fails_before_training_leaves_the_trace_alone(tmp_path: Path) -> None:
    trained(tmp_path)
    before = (tmp_path / "trace.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="total_steps"):
        trained(tmp_path, resume=True, max_steps=8)
    assert (tmp_path / "trace.jsonl").read_bytes() == before


def test_warnings_of_the_set_up_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Held-out rows that are training rows too: as it was said at `extend`, so it stands in the trace."""
    plain = tiny.trainer(tmp_path, max_steps=2)
    trainer = extend(plain, ForgettingCallback({"seen": plain.train_dataset}))
    said = [line.partition("note: ")[2] for line in capfd.readouterr().err.splitlines() if "note: " in line]
    assert said
    trainer.train()
    (session,) = of(read_trace(tmp_path), "session")
    assert session["notes"] == sorted(said)
