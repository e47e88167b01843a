"""A test kit for plug-ins: tiny models and trainers, and the checks that every plug-in of ours passes.

In a package of your own, with pytest:

```python
KIT = PluginKit(make=lambda: MyCallback(strength=1.0), neutral=lambda: MyCallback(strength=0, allow_no_effect=True))

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_my_callback(check, tmp_path):
    check(KIT, tmp_path)
```
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_pretrain_ext.plan import SamplePlan
from hf_pretrain_ext.plugin import TrainerPlugin, overrides
from hf_pretrain_ext.trainer import PlanConfig, extend

__all__ = [
    "CHECKS",
    "LENGTH",
    "VOCABULARY",
    "PluginKit",
    "Seen",
    "arguments",
    "history",
    "model",
    "rows",
    "same_weights",
    "trainer",
    "weights",
]

VOCABULARY = 64
LENGTH = 16


# Tiny things to test with


def model(dropout: float = 0.0, seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A Llama of two layers and 16 dimensions, the same for the same seed."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def rows(number: int, seed: int = 0, length: int = LENGTH, low: int = 1, high: int = VOCABULARY) -> Dataset:
    """`number` rows of random ids in [low, high): every row is distinct, so order can be read off the ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (number, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(output_dir: Any, **settings: Any) -> TrainingArguments:
    """Of a run of six steps of four rows, logged at each; `settings` change them."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(
    output_dir: Any, *callbacks: Any, cls: type[Trainer] = Trainer, data: Any = None, **settings: Any
) -> Trainer:
    """A Trainer of the tiny model on 40 rows; `settings` are TrainingArguments and parts of the Trainer, by name."""
    dropout, held_out = settings.pop("dropout", 0.0), settings.pop("eval_dataset", None)
    given = settings.pop("model", None)
    collator, reader = settings.pop("data_collator", default_data_collator), settings.pop("processing_class", None)
    return cls(
        model=model(dropout) if given is None else given,
        args=arguments(output_dir, **settings),
        train_dataset=rows(40) if data is None else data,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=reader,
        callbacks=[*callbacks, Seen()],
    )


class Seen(TrainerCallback):
    """Keeps what a run logged, without wall-clock figures."""

    TIMINGS = ("runtime", "per_second", "total_flos")

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {k: v for k, v in (logs or {}).items() if not any(part in k for part in self.TIMINGS)}
        self.logs.append({**kept, "step": state.global_step})


def weights(trained: Trainer) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = trained.model.state_dict()  # type: ignore[union-attr]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def history(trained: Trainer) -> list[dict[str, Any]]:
    """The log history without wall-clock figures."""
    return [
        {k: v for k, v in line.items() if not any(part in k for part in Seen.TIMINGS)}
        for line in trained.state.log_history
    ]


def same_weights(first: Trainer, second: Trainer) -> bool:
    """Whether two trained models are the same, bit for bit."""
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The checks


@dataclass(frozen=True)
class PluginKit:
    """How the checks use a plug-in.

    Args:
        make: the plug-in at work.
        neutral: the plug-in at settings that change nothing; None for one that only measures.
        varied: the plug-in at other settings, each of which must give another result.
        trainer: parts of the Trainer and TrainingArguments that it needs, by name.
    """

    make: Callable[[], TrainerPlugin]
    neutral: Callable[[], TrainerPlugin] | None = None
    varied: tuple[Callable[[], TrainerPlugin], ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def observer(self) -> bool:
        return self.neutral is None


def _train(kit: PluginKit, folder: Path, plugin: TrainerPlugin, **changed: Any) -> Trainer:
    resume_from, plan = changed.pop("resume_from", None), changed.pop("plan", None)
    trained = extend(trainer(folder, plugin, **{"dropout": 0.1, **kit.trainer, **changed}), plan=plan)
    trained.train(resume_from_checkpoint=resume_from)
    return trained


def declares_what_it_can(kit: PluginKit, folder: Path) -> None:
    """A name, and words of the contract for resume and every way of distributing."""
    plugin = kit.make()
    assert plugin.name, "the class attribute `name` is missing"
    assert plugin.resume in ("exact", "approximate")
    assert set(plugin.distributed) == {"ddp", "fsdp2", "zero2", "zero3"}, "distributed has other keys"
    words = ("exact", "exact, without resume", "untested")
    assert all(v in words or v.startswith("refused: ") for v in plugin.distributed.values())


def settings_and_state_are_json(kit: PluginKit, folder: Path) -> None:
    """What is recorded and compared on resume survives JSON."""
    plugin: Any = _train(kit, folder, kit.make()).plugin_run.plugins[0]  # type: ignore[attr-defined]
    for content in (plugin.settings(), plugin.state()):
        assert json.loads(json.dumps(content)) == content


def says_what_to_add_without_extend(kit: PluginKit, folder: Path) -> None:
    """In a plain Trainer it works, or the error names the line to add."""
    plugin = kit.make()
    plain = trainer(folder, plugin, **kit.trainer)
    if not plugin.needs_extend:
        plain.train()
        return
    try:
        plain.train()
    except RuntimeError as error:
        assert "extend(trainer)" in str(error)
    else:
        raise AssertionError("it needs `extend`, and trained without")


def neutral_is_a_no_op(kit: PluginKit, folder: Path) -> None:
    """An observer at work, and any other at neutral settings, gives the weights of a bare Trainer, bit for bit."""
    neutral = kit.make if kit.neutral is None else kit.neutral
    plan = PlanConfig(order="host") if overrides(neutral(), "wrap_plan") else None
    ours = _train(kit, folder / "ours", neutral(), plan=plan)
    bare = trainer(folder / "bare", **{"dropout": 0.1, **kit.trainer})
    bare.train()
    assert same_weights(ours, bare)


def has_an_effect(kit: PluginKit, folder: Path) -> None:
    """The same settings twice give the same weights; other settings, and none, give others."""
    first, again = (_train(kit, folder / name, kit.make()) for name in ("first", "again"))
    assert same_weights(first, again)
    if kit.observer:
        return
    bare = trainer(folder / "bare", **{"dropout": 0.1, **kit.trainer})
    bare.train()
    assert not same_weights(first, bare)
    for number, varied in enumerate(kit.varied):
        assert not same_weights(first, _train(kit, folder / str(number), varied())), f"varied[{number}] has no effect"


def resume_is_exact(kit: PluginKit, folder: Path) -> None:
    """From a checkpoint in the middle, by new objects: weights, and where declared exact, the log too."""
    saving = {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": 0}
    whole = _train(kit, folder / "whole", kit.make(), **saving)
    resumed = _train(kit, folder / "resumed", kit.make(), **saving, resume_from=str(folder / "whole" / "checkpoint-3"))
    if kit.make().resume == "exact":
        assert same_weights(whole, resumed)
        summary = "train_loss"
        assert [line for line in history(whole) if summary not in line] == [
            line for line in history(resumed) if summary not in line
        ]


def a_second_train_is_a_run_of_its_own(kit: PluginKit, folder: Path) -> None:
    """Steps and counts of a second `train()` are those of a run, not of two."""
    trained: Any = _train(kit, folder, kit.make(), max_steps=4)
    first = trained.plugin_run.realised(), [line["step"] for line in history(trained)]
    trained.train()
    assert (trained.plugin_run.realised(), [line["step"] for line in history(trained)]) == first


def accumulation_changes_nothing(kit: PluginKit, folder: Path) -> None:
    """One batch of 8 against four micro-batches of 2: the same weights up to rounding."""
    found = []
    for batch in (8, 2):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "dropout": 0.0}
        found.append(weights(_train(kit, folder / str(batch), kit.make(), **sizes)))
    gaps = torch.cat([(found[0][name] - each).abs().flatten() for name, each in found[1].items()])
    assert float(gaps.max()) < 1e-3 and float(gaps.mean()) < 1e-5, f"largest difference {float(gaps.max()):.1e}"


def its_plan_is_one(kit: PluginKit, folder: Path) -> None:
    """What it makes of the sample plan is a plan, and the same each time."""
    plugin = kit.make()
    if not overrides(plugin, "wrap_plan"):
        return
    trained: Any = extend(trainer(folder, plugin, **kit.trainer))
    plans = [trained.plugin_run.build_plan() for _ in range(2)]
    assert all(isinstance(plan, SamplePlan) for plan in plans)
    assert plans[0].identity() == plans[1].identity()


CHECKS: tuple[Callable[[PluginKit, Path], None], ...] = (
    declares_what_it_can,
    settings_and_state_are_json,
    says_what_to_add_without_extend,
    neutral_is_a_no_op,
    has_an_effect,
    resume_is_exact,
    a_second_train_is_a_run_of_its_own,
    accumulation_changes_nothing,
    its_plan_is_one,
)
"""What a plug-in must pass: each is called with a [`PluginKit`] and an empty folder, and raises `AssertionError`."""
