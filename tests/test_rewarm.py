"""RewarmCallback: with `extend`, in a plain Trainer, with several parameter groups, and its lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, default_data_collator

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.callbacks import RewarmCallback


def expected(step: int, peak: float, low: float, warmup: int, total: int) -> float:
    """The paper's equations (Ibrahim et al., 2024), written out again."""
    if step <= warmup:
        return peak * step / warmup
    return low + (peak - low) / 2 * (math.cos(math.pi * (step - warmup) / (total - warmup)) + 1)


def rates(trainer: Trainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.mark.parametrize("plain", [False, True])
def test_logged_rates_are_the_papers(plain: bool, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup=4, min_lr="10%"), max_steps=20)
    (trainer if plain else extend(trainer)).train()
    assert rates(trainer) == pytest.approx([expected(s, 1e-2, 1e-3, 4, 20) for s in range(20)], rel=1e-12)


def test_plain_and_extended_train_alike(tmp_path: Path) -> None:
    plain = tiny.trainer(tmp_path / "a", RewarmCallback(peak_lr=1e-2, warmup=2), dropout=0.1)
    plain.train()
    extended = extend(tiny.trainer(tmp_path / "b", RewarmCallback(peak_lr=1e-2, warmup=2), dropout=0.1))
    extended.train()
    assert tiny.same_weights(plain, extended)


def test_a_plain_trainer_resumes_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> Trainer:
        return tiny.trainer(
            tmp_path, RewarmCallback(peak_lr=1e-2, warmup=2), save_strategy="steps", save_steps=3, dropout=0.1
        )

    whole = build()
    whole.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rates(resumed) == rates(whole)
    assert tiny.same_weights(whole, resumed)
    said = capsys.readouterr().err
    assert said.count("a plain Trainer does not tell callbacks what it resumes") == 1
    assert "warm-up   steps       0 –         2  learning rate 0 → 0.01 (linear)" in said


@pytest.mark.parametrize("plain", [False, True])
def test_groups_keep_their_ratio(plain: bool, tmp_path: Path) -> None:
    """A group at a tenth of `learning_rate` gets a tenth of the schedule."""

    class Groups(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                parameters = list(self.model.parameters())
                self.optimizer = torch.optim.SGD(
                    [{"params": parameters[:2], "lr": 1e-3}, {"params": parameters[2:]}], lr=1e-2
                )
            return self.optimizer

    seen: list[list[float]] = []

    class Watch(RewarmCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    trainer = tiny.trainer(tmp_path, Watch(peak_lr=2e-2, warmup=2), cls=Groups)
    (trainer if plain else extend(trainer)).train()
    wanted = [expected(s, 2e-2, 2e-3, 2, 6) for s in range(6)]
    assert [main for _, main in seen] == pytest.approx(wanted, rel=1e-12)
    assert [small for small, _ in seen] == pytest.approx([rate / 10 for rate in wanted], rel=1e-12)


def test_epoch_runs_and_fractions(tmp_path: Path) -> None:
    """40 rows, batches of 4, 2 epochs: 20 steps, of which 10 % warm up."""
    trainer = extend(
        tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup=0.1), max_steps=-1, num_train_epochs=2)
    )
    trainer.train()
    assert rates(trainer) == pytest.approx([expected(s, 1e-2, 1e-3, 2, 20) for s in range(20)], rel=1e-12)


def test_a_longer_schedule_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = extend(tiny.trainer(tmp_path, RewarmCallback(peak_lr=1e-2, warmup=2, total_steps=12)))
    assert "the schedule has 12 steps, the run 6: it stops at a learning rate of" in capsys.readouterr().err
    trainer.train()
    assert rates(trainer) == pytest.approx([expected(s, 1e-2, 1e-3, 2, 12) for s in range(6)], rel=1e-12)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"peak_lr": 0}, "peak_lr must be a positive learning rate such as 3e-4, got 0"),
    ({"peak_lr": "fast"}, "peak_lr must be a positive learning rate such as 3e-4, got 'fast'"),
    ({"peak_lr": math.nan}, "peak_lr must be a positive learning rate such as 3e-4, got nan"),
    ({"peak_lr": 1e-3, "schedule": "cosin"}, "schedule must be one of ['cosine', 'infinite_cosine', "),
    ({"peak_lr": 1e-3, "const_lr": 1e-4}, "const_lr is an option of schedule infinite_cosine or infinite_linear or"),
    ({"peak_lr": 1e-3, "schedule": "infinite_rsqrt", "decay": 5}, "decay is an option of schedule wsd, not of"),
    ({"peak_lr": 1e-3, "schedule": "infinite_rsqrt", "min_lr": 0}, "0 < min_lr <= const_lr <= peak_lr"),
    ({"peak_lr": 1e-3, "schedule": "infinite_rsqrt", "const_lr": 2e-3}, "0 < min_lr <= const_lr <= peak_lr"),
    ({"peak_lr": 1e-3, "schedule": "infinite_linear", "cooldown": 0.8}, "warmup, cooldown and constant of 1060000000"),
    ({"peak_lr": 1e-3, "warmup": "5 parsecs"}, "got '5 parsecs'"),
    ({"peak_lr": 1e-3, "warmup": -1}, "warmup must be an int (steps)"),
    ({"peak_lr": 1e-3, "warmup": 1.0}, "got 1.0: write 1 steps as an int"),
    ({"peak_lr": 1e-3, "warmup": "10 minutes"}, "got '10 minutes'"),
    ({"peak_lr": 1e-3, "min_lr": 2e-3}, "min_lr 0.002 is above peak_lr 0.001"),
    ({"peak_lr": 1e-3, "min_lr": "-10%"}, "min_lr must be a learning rate such as 3e-5, or a share of the peak"),
    (
        {"peak_lr": 1e-3, "total_steps": 10, "warmup": 10},
        "warmup of 10 steps leaves nothing of a schedule",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings_fail_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RewarmCallback(**settings)
    assert message in str(error.value)


def test_a_scheduler_of_the_users_own_is_a_problem(tmp_path: Path) -> None:
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model=model,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(40),
        data_collator=default_data_collator,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(PluginError, match=r"its own scheduler \(ConstantLR\)"):
        extend(trainer, RewarmCallback(peak_lr=1e-2))


@pytest.mark.parametrize("plain", [False, True])
def test_an_optimizer_at_another_rate_is_refused(plain: bool, tmp_path: Path) -> None:
    """`learning_rate` is what peak_lr stands for: with no group at that rate, every rate would be off by a factor."""
    model = tiny.model()
    trainer = Trainer(
        model=model,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(40),
        data_collator=default_data_collator,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
        callbacks=[RewarmCallback(peak_lr=1e-2, warmup=2)],
    )
    with pytest.raises(ValueError, match=r"have the rates \[0\.5\], none of them learning_rate=0\.01"):
        (trainer if plain else extend(trainer)).train()


def test_a_plain_trainer_with_another_scheduler_says_what_to_do(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, RewarmCallback(peak_lr=1e-2, warmup=2), lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps", eval_steps=2, eval_dataset=tiny.rows(4),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"needs a LambdaLR scheduler, got ReduceLROnPlateau.*extend\(trainer\)"):
        trainer.train()
