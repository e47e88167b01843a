"""How much data, how many passes, how much weight decay: what two papers found best, applied to a run's budget.

Advice is a starting point. Whatever lies outside what a paper tried is said in `notes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hf_pretrain_ext.values import is_number, shown

__all__ = ["DataConstrainedAdvice", "SubsetAdvice", "data_constrained", "stability_gap"]

OLD_SHARE = 0.18
"""Of the tokens: what Guo et al. keep of the old mixture, whose 82 % of web text the new domain takes the place of."""
EPOCHS = 4
"""Guo et al.: best around the fourth pass over 5B tokens; 7 over 11B in general continued pre-training."""
MOST_EPOCHS = 7
SMALLEST, LARGEST = 1e9, 10e9
"""Tokens of a subset: at 1B a model of 3B parameters overfitted, at 10B the gap was back (Guo et al.)."""

TUNED = (
    (150e6, 3e-3, 16, 0.8),
    (300e6, 3e-3, 16, 1.6),
    (600e6, 1e-3, 8, 3.2),
    (1.4e9, 1e-3, 8, 3.2),
)
"""Parameters, learning rate, passes, weight decay: tuned together on 200M tokens ("Pre-training under infinite
compute", 2025)."""
TUNED_TOKENS = 200e6


@dataclass(frozen=True)
class SubsetAdvice:
    """
    A subset of proper size for several passes.

    `subset_tokens` of the new domain are kept, the same in every pass, and read `epochs` times; `old_tokens` of the
    old sources besides, others in every pass; `old_share` is their share of all tokens. `share` is that of the subset
    in the tokens of the new domain that there are, where these are known.
    """

    subset_tokens: int
    epochs: int
    old_tokens: int
    old_share: float
    share: float | None
    notes: tuple[str, ...]


def stability_gap(
    budget_tokens: float,
    *,
    corpus_tokens: float | None = None,
    old_share: float = OLD_SHARE,
    epochs: int | None = None,
) -> SubsetAdvice:
    """
    Size of the subset and passes over it, for a run that reads `budget_tokens` in all (Guo et al., 2024).

    They keep 5B of 50B tokens, the best by quality, for 4 passes in place of one pass over all, and the old sources at
    the rate of the original mixture (18 %), resampled in every pass: 20B tokens read. Whether their 5B are all of a
    pass or its new tokens alone, the paper does not say; here they are all of it, 4.1B new and 0.9B old. The subset is
    what fits a run's budget so; that it may be read so for other sizes is an extrapolation.

    Args:
        budget_tokens (`float`): tokens that the run reads, old ones included.
        corpus_tokens (`float`, *optional*): tokens of the new domain that there are to choose from.
        old_share (`float`, *optional*, defaults to 0.18): of the tokens: the share that the sources which are kept
            had in the original mixture (Guo et al.: 18 %, everything but CommonCrawl and C4).
        epochs (`int`, *optional*): passes; 4 if None, more where the corpus is too small for that.

    Raises:
        `ValueError`: a number out of range.

    Example:

    >>> advice = stability_gap(20e9, corpus_tokens=50e9)
    >>> advice.epochs, round(advice.subset_tokens / 1e9, 1), round(advice.old_tokens / 1e9, 1), advice.notes
    (4, 4.1, 3.6, ())
    """
    _check_positive(budget_tokens=budget_tokens)
    if corpus_tokens is not None:
        _check_positive(corpus_tokens=corpus_tokens)
    if not is_number(old_share) or not 0 <= old_share < 1:
        raise ValueError(f"old_share must be a share from 0 on and below 1, got {shown(old_share)}")
    if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        raise ValueError(f"epochs must be an integer from 1 on or None, got {shown(epochs)}")
    new = budget_tokens * (1 - old_share)
    passes, notes = epochs or EPOCHS, []
    if corpus_tokens is not None and new / passes > corpus_tokens:
        if epochs is None:
            passes = math.ceil(new / corpus_tokens * (1 - 1e-9))
            share = new / passes / corpus_tokens
            left = "nothing can be chosen" if share > 0.995 else f"only the worst {1 - share:.0%} can be left out"
            notes.append(
                f"the corpus is smaller than a subset for {EPOCHS} passes: {min(share, 1):.0%} of it is read, in "
                f"{passes} passes, and {left}"
            )
        else:
            notes.append(
                f"the corpus lasts for {new / corpus_tokens:.1f} passes, not for {passes}: the run is shorter"
            )
    subset = new / passes if corpus_tokens is None else min(new / passes, corpus_tokens)
    if passes > MOST_EPOCHS:
        notes.append(f"{passes} passes are more than the {MOST_EPOCHS} that the paper tried")
    if subset <= SMALLEST:
        notes.append(
            f"a subset of {subset:.3g} tokens is not more than 1B, at which their model of 3B parameters overfitted: "
            "watch the held-out loss of the new domain, and stop when it rises"
        )
    if subset >= LARGEST:
        notes.append(
            f"a subset of {subset:.3g} tokens is not less than 10B, at which the gap was back: more passes over less"
        )
    return SubsetAdvice(
        subset_tokens=round(subset),
        epochs=passes,
        old_tokens=round(subset * passes * old_share / (1 - old_share)),
        old_share=float(old_share),
        share=None if corpus_tokens is None else subset / corpus_tokens,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class DataConstrainedAdvice:
    """
    Settings for many passes over little data under strong weight decay.

    `grid` are the settings to try around them, rate, passes and decay together; `notes` what is extrapolated.
    """

    learning_rate: float
    epochs: int
    weight_decay: float
    grid: tuple[dict[str, float], ...]
    notes: tuple[str, ...]


def data_constrained(parameters: float, tokens: float, *, ensemble: bool = False) -> DataConstrainedAdvice:
    """
    Learning rate, passes and weight decay where compute is plenty and data is not ("Pre-training under
    infinite compute", 2025).

    They tune the three together for models of 150M to 1.4B parameters on 200M tokens, and find weight decay of 0.8 to
    3.2 best: 8 to 32 times the usual 0.1. The advice is that of the size nearest in ratio. Passes and decay **must be
    tuned together**: `grid` holds half, once and twice of each.

    Args:
        parameters (`float`): of the model.
        tokens (`float`): of the data that there are, read once.
        ensemble (`bool`, *optional*, defaults to `False`): whether several models are trained for the mean of their
            logits; their rule for members is twice the passes at half the decay.

    Raises:
        `ValueError`: a number out of range.

    Example:

    >>> advice = data_constrained(300e6, 200e6)
    >>> advice.learning_rate, advice.epochs, advice.weight_decay, len(advice.grid), advice.notes
    (0.003, 16, 1.6, 9, ())
    >>> data_constrained(300e6, 200e6, ensemble=True).weight_decay
    0.8
    """
    _check_positive(parameters=parameters, tokens=tokens)
    if not isinstance(ensemble, bool):
        raise ValueError(f"ensemble must be True or False, got {shown(ensemble)}")
    size, rate, epochs, decay = min(TUNED, key=lambda row: abs(math.log(row[0] / parameters)))
    if ensemble:
        epochs, decay = 2 * epochs, decay / 2
    notes = []
    if not TUNED[0][0] <= parameters <= TUNED[-1][0]:
        notes.append(
            f"{parameters:.3g} parameters lie outside their 150M to 1.4B: the settings of {size:.3g} are given"
        )
    if not 0.5 <= tokens / TUNED_TOKENS <= 2:
        notes.append(
            f"their data are 200M tokens, yours {tokens:.3g}: how passes and decay move with it they do not say for "
            "each size, so tune them"
        )
    # Ours: of their sizes, 150M has the most data for its size, 1.3 tokens a parameter.
    if tokens / parameters > 20:
        notes.append(
            f"{tokens / parameters:.0f} tokens a parameter are no shortage of data: the usual single pass with weight "
            "decay 0.1 may do as well"
        )
    grid = tuple(
        {"learning_rate": rate, "num_train_epochs": passes, "weight_decay": strength}
        for passes in (epochs // 2, epochs, 2 * epochs)
        for strength in (decay / 2, decay, 2 * decay)
    )
    return DataConstrainedAdvice(rate, epochs, decay, grid, tuple(notes))


def _check_positive(**given: Any) -> None:
    for name, value in given.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a number above 0, such as 20e9, got {shown(value)}")
