"""Benchmarks before and after a stage, by lm-eval, for the card and the report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from hf_pretrain_ext.benchmarks import (
    BenchmarkConfig,
    Figures,
    figure_text,
    have_lm_eval,
    run_benchmarks,
    unknown_tasks,
)
from hf_pretrain_ext.plugin import Problem, Setup, TrainerPlugin
from hf_pretrain_ext.trace import plain
from hf_pretrain_ext.values import shown

__all__ = ["BenchmarkCallback"]

WHEN = {"before": ("before",), "after": ("after",), "both": ("before", "after")}
_SHARDS = "the model is in shards, and lm-eval asks it on one rank; run lm_eval on what was saved"


class BenchmarkCallback(TrainerPlugin):
    """Runs tasks of lm-eval before the first step and after the last; changes nothing that is trained.

    Both columns, with standard errors, stand in `benchmarks.json` in `output_dir`, in the trace, in the card
    (`create_model_card`, `hf-pretrain-ext card`) and, as `benchmark_<task>_<metric>`, in the log. A resumed run keeps
    what was found before its first step; a run that is interrupted has no second column yet.

    One rank measures while the others wait: give `ddp_timeout` more than a measurement takes.

    Args:
        tasks (`str` or `list[str]`): names of tasks or groups, as `lm_eval ls tasks` lists them.
        when (`str`, *optional*, defaults to `"both"`): `"before"` the first step, `"after"` the last, or `"both"`.
            After `load_best_model_at_end`, it is the best model that is measured.
        num_fewshot, limit, batch_size, include_path, system_instruction, apply_chat_template, bootstrap_iters: as
            those of [`~hf_pretrain_ext.benchmarks.BenchmarkConfig`], with its defaults.

    Raises:
        `ValueError`: at construction, settings out of range.
        [`PluginError`]: at `extend`, lm-eval is missing, tasks it does not know, no tokenizer, a model in shards.

    Example:

    ```python
    BenchmarkCallback(["arc_easy", "lambada_openai"], limit=500)
    ```
    """

    name = "benchmarks"
    resume = "exact"
    distributed = {
        "ddp": "exact",
        "fsdp2": f"refused: {_SHARDS}",
        "zero2": "untested",
        "zero3": f"refused: {_SHARDS}",
    }

    def __init__(
        self,
        tasks: str | Sequence[str],
        *,
        when: str = "both",
        num_fewshot: int | None = None,
        limit: int | float | None = None,
        batch_size: int = 8,
        include_path: str | Path | None = None,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        bootstrap_iters: int = 1000,
    ):
        if when not in WHEN:
            raise ValueError(f"when must be one of {tuple(WHEN)}, got {shown(when)}")
        self.config = BenchmarkConfig(
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            include_path=None if include_path is None else str(include_path),
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=bootstrap_iters,
        )
        self.when = WHEN[when]
        self.found: dict[str, Figures] = {}
        self._save_is_open = False

    def check(self, setup: Setup) -> Iterable[Problem]:
        if not have_lm_eval():
            yield Problem(self.name, "lm-eval is not installed", "pip install 'hf-pretrain-ext[eval]'.")
            return
        if not callable(getattr(setup.processing_class, "encode", None)):
            yield Problem(
                self.name,
                f"needs a tokenizer, and processing_class is {type(setup.processing_class).__name__}",
                "Build the Trainer with processing_class=tokenizer.",
            )
        if unknown := unknown_tasks(self.config):
            yield Problem(
                self.name,
                f"lm-eval knows no task {', '.join(map(repr, unknown))}",
                "`lm_eval ls tasks` lists them; tasks of your own are found in include_path.",
            )

    def describe(self) -> list[str]:
        said = {"before": "before the first step", "after": "after the last"}
        return [f"benchmarks: {', '.join(self.config.tasks)}, {' and '.join(said[when] for when in self.when)}"]

    def marks(self, total_steps: int) -> list[int]:
        return [{"before": 0, "after": total_steps}[when] for when in self.when]

    def begin(self) -> None:
        self.found = {}
        self._save_is_open = False

    def before_save(self) -> None:
        self._save_is_open = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save_is_open = False

    def state(self) -> dict[str, Any]:
        return {"asked": plain(self.config.to_json()), "found": self.found}

    def load_state(self, state: dict[str, Any]) -> None:
        # Tasks may change between a run and its resume; then there is nothing to compare with.
        if state["asked"] == plain(self.config.to_json()):
            self.found = dict(state["found"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if "before" in self.when and state.global_step == 0 and "before" not in self.found:
            self._measure("before")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is None or "after" not in self.when:
            return
        if self._save_is_open and state.global_step < self.run.total_steps:
            # The host's checkpoint on SIGTERM is followed by no `on_save`: the process is about to be killed.
            return
        self._measure("after")
        if "after" not in self.found:
            return
        before = self.found.get("before", {})
        lines = [
            f"{task} {metric}: {_shown(before.get(task, {}).get(metric))} -> {_shown(figure)}"
            for task, metrics in self.found["after"].items()
            for metric, figure in metrics.items()
        ]
        self.run.say("\n".join(lines))

    def _measure(self, when: str) -> None:
        run = self.run
        if run is None:
            return
        began = time.perf_counter()
        trainer = run.trainer
        held: list[Any] = [{}, None]
        if run.is_main:
            model = trainer.accelerator.unwrap_model(run.model)
            try:
                held[0] = run_benchmarks(model, trainer.processing_class, self.config)
            except Exception as error:  # the other ranks wait: they must hear of it
                held[1] = error
        found, fault = broadcast_object_list(held)
        if fault is not None:
            if when == "before":
                raise fault
            # What was trained is worth more than its figures.
            run.say(f"no benchmarks after training ({type(fault).__name__}: {fault})", logging.WARNING)
            return
        self.found[when] = found
        figures = [(f"{task}_{metric}", each) for task, metrics in found.items() for metric, each in metrics.items()]
        run.log({f"benchmark_{name}": each["value"] for name, each in figures})
        seconds = round(time.perf_counter() - began, 3)
        run.trace("benchmarks", when=when, found=found, asked=self.config.to_json(), seconds=seconds)
        if run.is_main:
            self._write()

    def _write(self) -> None:
        assert self.run is not None
        path = Path(self.run.output_dir) / "benchmarks.json"
        content = json.dumps(plain({"asked": self.config.to_json(), **self.found}), indent=1, allow_nan=False)
        temporary = path.with_name(f"_{path.name}.tmp")  # pushes leave such names out
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            # The figures are in the trace: no reason to lose the run.
            self.run.say(f"{path} cannot be written ({error})", logging.WARNING)


def _shown(figure: dict[str, Any] | None) -> str:
    return figure_text(None) if figure is None else figure_text(figure["value"], figure["stderr"])
