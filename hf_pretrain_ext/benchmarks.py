"""Benchmarks by lm-eval (the EleutherAI Language Model Evaluation Harness), on a model that is being trained."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_pretrain_ext.rng import rng_guard
from hf_pretrain_ext.values import check_flag, is_number, is_whole, shown

__all__ = ["BenchmarkConfig", "Figures", "figure_text", "have_lm_eval", "run_benchmarks", "unknown_tasks"]

Figures = dict[str, dict[str, dict[str, Any]]]
"""By task and metric: `value`, `stderr` (None where lm-eval gives none), `higher_is_better` and `samples`."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """
    Which benchmarks, and how. The defaults are lm-eval's own, but for `batch_size` and `bootstrap_iters`.

    Args:
        tasks (`str` or `list[str]`): names of tasks or groups, as `lm_eval ls tasks` lists them.
        num_fewshot (`int`, *optional*): examples before each question; defaults to each task's own number.
        limit (`int` or `float`, *optional*): questions a task, or a share of them below 1; defaults to all. Standard
            errors grow accordingly.
        batch_size (`int`, *optional*, defaults to 8): requests a forward pass.
        include_path (`str`, *optional*): folder of YAML files with tasks of your own.
        system_instruction (`str`, *optional*): text before each prompt, such as trained metadata.
        apply_chat_template (`bool`, *optional*, defaults to `False`): ask through the tokenizer's chat template.
        bootstrap_iters (`int`, *optional*, defaults to 1000): draws for standard errors that have no formula (lm-eval:
            100,000); 0 for none of those.

    Raises:
        `ValueError`: a setting out of range.
    """

    tasks: str | Sequence[str]
    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int = 8
    include_path: str | None = None
    system_instruction: str | None = None
    apply_chat_template: bool = False
    bootstrap_iters: int = 1000

    def __post_init__(self) -> None:
        tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        if not isinstance(tasks, Sequence) or not tasks or not all(isinstance(t, str) and t for t in tasks):
            raise ValueError(f"tasks must be a name or a list of names, such as ['arc_easy'], got {shown(self.tasks)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks: each may be named once, got {shown(list(tasks))}")
        object.__setattr__(self, "tasks", list(tasks))
        for name, low in (("num_fewshot", 0), ("batch_size", 1), ("bootstrap_iters", 0)):
            value = getattr(self, name)
            if not (value is None and name == "num_fewshot") and (not is_whole(value) or value < low):
                raise ValueError(f"{name} must be a whole number from {low} on, got {shown(value)}")
        if self.limit is not None and (
            not is_number(self.limit) or self.limit <= 0 or (self.limit >= 1 and not is_whole(self.limit))
        ):
            raise ValueError(
                f"limit must be a number of questions, such as 200, or a share below 1, got {shown(self.limit)}"
            )
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path must be a folder of YAML files with tasks, got {shown(self.include_path)}")
        if self.system_instruction is not None and not isinstance(self.system_instruction, str):
            raise ValueError(f"system_instruction must be text, got {shown(self.system_instruction)}")
        check_flag("apply_chat_template", self.apply_chat_template)

    def to_json(self) -> dict[str, Any]:
        """What was asked, without the path of this machine."""
        return {key: value for key, value in asdict(self).items() if key not in ("include_path", "batch_size")}


def figure_text(value: float | None, stderr: float | None = None) -> str:
    """A figure as people read it.

    Example:

    >>> figure_text(0.5, 0.125), figure_text(0.5), figure_text(None)
    ('0.5000 ± 0.1250', '0.5000', 'not measured')
    """
    if value is None:
        return "not measured"
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def have_lm_eval() -> bool:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _task_manager(tasks: frozenset[str], include_path: str | None) -> Any:
    """Of the user's own tasks where these are all that is asked: lm-eval's own are thousands of files to read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if tasks <= set(own.all_tasks):
            return own
    return TaskManager(include_path=include_path)


def unknown_tasks(config: BenchmarkConfig) -> list[str]:
    """The names that lm-eval does not know."""
    with _quiet():
        known = set(_task_manager(frozenset(config.tasks), config.include_path).all_tasks)
    return [task for task in config.tasks if task not in known]


def run_benchmarks(model: Any, tokenizer: Any, config: BenchmarkConfig) -> Figures:
    """
    What lm-eval finds of `model`, which is left as it was: mode, settings, random state.

    Args:
        model (`PreTrainedModel` or `PeftModel`): on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; a copy is used.
        config ([`BenchmarkConfig`]): what to ask.

    Returns:
        `dict`: by task (and subtask of a group) and metric, `value`, `stderr`, `higher_is_better` and `samples`.

    Raises:
        `ImportError`: lm-eval is missing; it comes with the extra `eval`.

    Example:

    ```python
    found = run_benchmarks(model, tokenizer, BenchmarkConfig(["arc_easy"], limit=200))
    found["arc_easy"]["acc"]["value"], found["arc_easy"]["acc"]["stderr"]
    ```
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("benchmarks need lm-eval: pip install 'hf-pretrain-ext[eval]'") from error
    modes = {module: module.training for module in model.modules()}
    try:
        with rng_guard(seed=0), _quiet():
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=config.batch_size),
                tasks=list(config.tasks),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                system_instruction=config.system_instruction,
                apply_chat_template=config.apply_chat_template,
                bootstrap_iters=config.bootstrap_iters,
                task_manager=_task_manager(frozenset(config.tasks), config.include_path),
                log_samples=False,
            )
    finally:
        for module, training in modes.items():
            module.training = training
    return _figures(found)


def _figures(found: Mapping[str, Any]) -> Figures:
    figures: Figures = {}
    for task, results in found["results"].items():
        better = found.get("higher_is_better", {}).get(task) or {}
        samples = found.get("n-samples", {}).get(task) or {}
        for key, value in results.items():
            # "acc,none" and "acc_stderr,none"; "alias" and the like carry no comma.
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            figures.setdefault(task, {})[name] = {
                "value": float(value),
                "stderr": float(error) if is_number(error) and math.isfinite(error) else None,
                "higher_is_better": better.get(metric),
                "samples": samples.get("effective"),
            }
    return figures


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's lines about each task, and about a model that it is given ready made."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
