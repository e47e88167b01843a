"""Forgetting, measured: token-weighted loss on held-out sets, and what its course over a run means.

Definitions, for the losses L(t) of one held-out set measured at steps t, in nats a token:

    initial          L(0), before the first step
    worst            max of L(t); the depth of the stability gap is worst − initial (Guo et al., 2024, 2406.14833)
    recovery step    the first step after the worst with L(t) ≤ L(0) + 0.01, if there is one
    final            the last L(t)
    forgetting       final − min of L(t): how far the set has come away from its best so far, never negative (Abbes et
                     al., 2025, 2508.01908, subtract the best of the past, so that theirs can be)
    gain             initial − final: positive where the set was learned, negative where it was lost

Over a life of several stages, for a set that earlier ones measured on the same rows:

    life forgetting    L(t) − the lowest loss of all earlier stages: Abbes et al.'s score, below zero where the set is
                       known better than ever before
    life gain          the first loss of the first stage − L(t)
    backward transfer  mean over these sets of (last loss of the stage before − L(t)): above zero where a stage helps
                       what was learned before it (ours, after the accuracy of that name)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional

from hf_pretrain_ext.units import to_steps
from hf_pretrain_ext.values import is_whole, shown

__all__ = [
    "ForgettingConfig",
    "History",
    "Past",
    "backward_transfer",
    "heldout_loss",
    "is_probe_step",
    "past_of",
    "probe_steps",
    "summarise",
]

RECOVERY_MARGIN = 0.01
"""Nats above the initial loss at which a set counts as recovered."""
WEIGHT = "hf_pretrain_ext_weight"
"""Key of a batch's weight among those of a probe."""
DENSE = 20
"""Steps 1 to 20 are all measured when the first steps are dense: that is where the stability gap is."""


@dataclass
class ForgettingConfig:
    """Settings of the measurement, readable by `HfArgumentParser`."""

    every: str = field(
        default="0.05", metadata={"help": "Steps between probes: an int, or a fraction of the run as a float below 1."}
    )
    first_steps: str = field(
        default="dense",
        metadata={"help": "dense: also probe steps 1 to 20 and powers of two; sparse: only every `every` steps."},
    )
    max_samples: int = field(default=256, metadata={"help": "Rows of each set that a probe reads, chosen by key."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Rows a forward pass; defaults to per_device_eval_batch_size."}
    )

    def __post_init__(self) -> None:
        if self.first_steps not in ("dense", "sparse"):
            raise ValueError(f"first_steps must be 'dense' or 'sparse', got {shown(self.first_steps)}")
        for name in ("max_samples", "batch_size"):
            value = getattr(self, name)
            if not (value is None and name == "batch_size") and (not is_whole(value) or value < 1):
                raise ValueError(f"{name} must be a positive int (rows), got {shown(value)}")
        if to_steps(self.every, 1_000_000, "every") < 1:
            raise ValueError(f"every must be at least one step, got {shown(self.every)}")


def is_probe_step(step: int, total_steps: int, every: int, dense: bool) -> bool:
    """Whether a probe is due after `step` optimizer steps: at 0, every `every`, at the end, and densely at first.

    Example:

    >>> [step for step in range(101) if is_probe_step(step, 100, 50, dense=True)][18:]
    [18, 19, 20, 32, 50, 64, 100]
    """
    if step in (0, total_steps) or step % every == 0:
        return True
    return dense and (step <= DENSE or step & (step - 1) == 0)


def probe_steps(total_steps: int, every: int, dense: bool) -> list[int]:
    """The steps of a run of `total_steps` steps that a probe is due at.

    Example:

    >>> probe_steps(40, 15, dense=False)
    [0, 15, 30, 40]
    """
    steps = {0, total_steps, *range(0, total_steps + 1, every)}
    if dense:
        steps |= set(range(1, DENSE + 1)) | {1 << power for power in range(total_steps.bit_length())}
    return sorted(step for step in steps if step <= total_steps)


def heldout_loss(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    shifts_labels: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> torch.Tensor:
    """Summed negative log-likelihood and number of predicted tokens over `batches`: float64 tensor of shape `(2,)`.

    Sums, not means of means, so the loss is token-weighted and exact for ragged last batches. Each batch may hold
    `WEIGHT` (1.0, or 0.0 for one that only keeps ranks in step). The model is put in evaluation mode and every module
    is put back as it was.

    Args:
        shifts_labels (`bool`): whether position t predicts label t + 1 (causal language models).
        autocast (`Callable`): returns the context that the training step runs its forward pass in.

    Example:

    >>> from types import SimpleNamespace
    >>> class Uniform(torch.nn.Module):
    ...     config = SimpleNamespace()
    ...     def forward(self, input_ids): return {"logits": torch.zeros(*input_ids.shape, 8)}
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> from contextlib import nullcontext
    >>> total = heldout_loss(Uniform(), [{"input_ids": ids, "labels": ids}], shifts_labels=True,
    ...                      autocast=nullcontext, device=torch.device("cpu"))
    >>> round(float(total[0] / total[1]), 4), int(total[1])  # ln 8
    (2.0794, 2)
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                weight = batch.pop(WEIGHT, 1.0)
                inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
                total += weight * _batch_loss(model, config, inputs, shifts_labels, autocast)
    finally:
        # train() on the root first: a module may do more there than set its flag (merge weights, say).
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
    return total


def _batch_loss(
    model: torch.nn.Module,
    config: Any,
    inputs: dict[str, Any],
    shifts_labels: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> torch.Tensor:
    labels = inputs.pop("shift_labels", None)
    shifted = labels is not None
    given = inputs.pop("labels", None)
    labels = given if labels is None else labels
    if getattr(config, "is_encoder_decoder", False):
        # Such models make their decoder inputs from the labels.
        inputs["labels"] = labels
    if getattr(config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    with autocast():
        outputs = model(**inputs)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    # Virtual tokens of prompt tuning stand before those that have labels.
    logits = logits[:, -labels.shape[1] :]
    if shifts_labels and not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    # Row by row: float32 logits of a whole batch can be the largest tensor of the run.
    for row_logits, row_labels in zip(logits, labels, strict=True):
        sums[0] += functional.cross_entropy(row_logits.float(), row_labels, ignore_index=-100, reduction="sum")
        sums[1] += row_labels.ne(-100).sum()
    return sums


def summarise(steps: Sequence[int], losses: Sequence[float]) -> dict[str, float | int | None]:
    """The figures defined in this module's text, from the losses of one set at rising `steps`, the first being 0.

    Example:

    >>> figures = summarise([0, 1, 2, 3], [2.0, 2.5, 2.2, 1.9])
    >>> figures["worst_step"], round(figures["gap_depth"], 2), figures["recovery_step"], round(figures["gain"], 2)
    (1, 0.5, 3, 0.1)
    """
    initial, final = losses[0], losses[-1]
    # A loss that is not a number is worse than any that is.
    at = max(range(len(losses)), key=lambda k: (math.isnan(losses[k]), losses[k], -k))
    recovered = [steps[k] for k in range(at + 1, len(losses)) if losses[k] <= initial + RECOVERY_MARGIN]
    return {
        "initial": initial,
        "worst": losses[at],
        "worst_step": steps[at],
        "gap_depth": losses[at] - initial,
        "recovery_step": recovered[0] if recovered else None,
        "final": final,
        "final_step": steps[-1],
        "best": min(losses),
        "forgetting": final - min(losses),
        "gain": initial - final,
    }


@dataclass(frozen=True)
class Past:
    """What earlier stages measured of a set: the first loss, the lowest with its stage, and the last."""

    baseline: float
    best: float
    best_stage: str
    last: float

    def life(self, loss: float) -> dict[str, float]:
        """The figures over the life, where the set stands at `loss` now.

        Example:

        >>> Past(baseline=4.0, best=2.0, best_stage="english", last=2.5).life(2.25)
        {'life_forgetting': 0.25, 'life_gain': 1.75}
        """
        return {"life_forgetting": loss - self.best, "life_gain": self.baseline - loss}


def past_of(measured: Iterable[tuple[str, Mapping[str, Any]]], fingerprint: str) -> Past | None:
    """What stages, by name and in their order, recorded of the set with that fingerprint; None if they did not.

    Example:

    >>> entry = {"fingerprint": "f", "baseline": 4.0, "best": 2.0, "last": 2.5}
    >>> past_of([("a", entry), ("b", {**entry, "best": 2.2, "last": 2.2})], "f")
    Past(baseline=4.0, best=2.0, best_stage='a', last=2.2)
    """
    same = [(name, entry) for name, entry in measured if entry.get("fingerprint") == fingerprint]
    if not same:
        return None
    # A loss that was not finite stands as text in JSON; it is no best.
    bests = [(float(entry["best"]), name) for name, entry in same]
    best, stage = min(bests, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)
    return Past(float(same[0][1]["baseline"]), best, stage, float(same[-1][1]["last"]))


def backward_transfer(pasts: Mapping[str, Past], losses: Mapping[str, float]) -> float | None:
    """Mean over sets of how far the loss has come down since the stage before; None without such sets.

    Example:

    >>> backward_transfer({"old": Past(4.0, 2.0, "english", 2.5)}, {"old": 2.25, "new": 3.0})
    0.25
    """
    changes = [past.last - losses[name] for name, past in pasts.items() if name in losses]
    return sum(changes) / len(changes) if changes else None


class History:
    """Losses of the held-out sets over a run: what is saved, resumed, summarised and drawn.

    Example:

    >>> history = History()
    >>> history.add("general", 0, 2.0, tokens=100)
    >>> history.add("general", 1, 2.3, tokens=100)
    >>> round(history.rise("general"), 2)
    0.3
    """

    def __init__(self, sets: dict[str, Any] | None = None):
        self.sets: dict[str, dict[str, Any]] = {
            # float: JSON holds a loss that was not finite as text.
            name: {
                "tokens": int(entry["tokens"]),
                "steps": list(entry["steps"]),
                "losses": [float(loss) for loss in entry["losses"]],
            }
            for name, entry in (sets or {}).items()
        }

    def add(self, name: str, step: int, loss: float, tokens: int) -> None:
        entry = self.sets.setdefault(name, {"tokens": tokens, "steps": [], "losses": []})
        entry["steps"].append(step)
        entry["losses"].append(loss)

    def last_step(self) -> int:
        """The step of the newest measurement, −1 if there is none."""
        return max((entry["steps"][-1] for entry in self.sets.values()), default=-1)

    def rise(self, name: str) -> float:
        """How far the set's loss stands above its value at step 0, in nats."""
        losses = self.sets[name]["losses"]
        return losses[-1] - losses[0]

    def scalars(self) -> dict[str, float]:
        """The newest losses under the names that an evaluation would give them."""
        scalars = {}
        for name, entry in self.sets.items():
            loss = entry["losses"][-1]
            scalars[f"eval_{name}_loss"] = loss
            scalars[f"eval_{name}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return scalars

    def recorded(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """What later stages should know of each set."""
        found = {}
        for name, entry in self.sets.items():
            losses, steps = entry["losses"], entry["steps"]
            finite = [k for k, loss in enumerate(losses) if math.isfinite(loss)]
            at = min(finite, key=lambda k: (losses[k], k)) if finite else 0
            found[name] = {
                "fingerprint": fingerprints[name],
                "baseline": losses[0],
                "best": losses[at],
                "best_step": steps[at],
                "last": losses[-1],
                "last_step": steps[-1],
            }
        return found

    def life(self, pasts: Mapping[str, Past]) -> dict[str, float]:
        """The newest figures over the life as scalars by name: `life_forgetting_<set>`, `backward_transfer`, ..."""
        now = {name: entry["losses"][-1] for name, entry in self.sets.items()}
        found = {
            f"{key}_{name}": value
            for name, past in pasts.items()
            if name in now
            for key, value in past.life(now[name]).items()
        }
        transfer = backward_transfer(pasts, now)
        return found if transfer is None else {**found, "backward_transfer": transfer}

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        return {name: summarise(entry["steps"], entry["losses"]) for name, entry in self.sets.items()}

    def to_json(self, pasts: Mapping[str, Past] | None = None) -> dict[str, Any]:
        """What `forgetting.json` holds: units, for each set its losses and figures, and those over earlier stages."""
        summary = self.summary()
        content: dict[str, Any] = {
            "unit": "nats per token; steps are optimizer steps",
            "recovery_margin": RECOVERY_MARGIN,
            "sets": {name: {**entry, "summary": summary[name]} for name, entry in self.sets.items()},
        }
        if pasts:
            content["life"] = self.life(pasts)
            for name, past in pasts.items():
                if name in content["sets"]:
                    content["sets"][name]["past"] = asdict(past)
        return content

    def table(self) -> list[str]:
        """The figures as lines of a table."""
        lines = [f"{'set':<12}{'step 0':>8}{'worst':>8}{'at':>7}{'gap':>7}{'recovered':>10}{'final':>8}{'gain':>8}"]
        for name, s in self.summary().items():
            recovered = "never" if s["recovery_step"] is None else s["recovery_step"]
            lines.append(
                f"{name:<12}{s['initial']:>8.3f}{s['worst']:>8.3f}{s['worst_step']:>7}{s['gap_depth']:>7.3f}"
                f"{recovered:>10}{s['final']:>8.3f}{s['gain']:>+8.3f}"
            )
        return lines
