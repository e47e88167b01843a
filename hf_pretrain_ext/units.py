"""Lengths and rates as users write them: one rule for every setting.

An int is steps, a float below 1 is a fraction of the run, a string says its unit (`"500 steps"`, `"2%"`,
`"2B tokens"`). A rate as a float is absolute, as a string with `%` it is relative to the peak rate.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

__all__ = ["to_point", "to_rate", "to_steps"]

_LENGTH = re.compile(r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(%|steps?|[kKMBT]?\s*tokens?)?\s*")
_TOKENS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RATE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%)?\s*")


def to_steps(value: int | float | str, total_steps: int, name: str, tokens_per_step: float | None = None) -> int:
    """Steps meant by the setting `name` in a run of `total_steps` steps, rounded to the nearest step.

    Lengths in tokens need `tokens_per_step`, the tokens of an optimizer step.

    Raises:
        `ValueError`: a negative length, a fraction of 1 or more, an unknown unit, or tokens without `tokens_per_step`.

    Example:

    >>> to_steps(0.01, 1000, "warmup"), to_steps(25, 1000, "warmup"), to_steps("2%", 1000, "warmup")
    (10, 25, 20)
    >>> to_steps("2M tokens", 1000, "warmup", tokens_per_step=2048)
    977
    """
    steps, fraction = to_point(value, name, tokens_per_step)
    return steps + math.floor(float(fraction) * total_steps + 0.5)


def to_point(value: int | float | str, name: str, tokens_per_step: float | None = None) -> tuple[int, Fraction]:
    """The same before the length of the run is known: a number of steps, or a fraction of the run; the other is 0.

    Example:

    >>> to_point(25, "warmup"), to_point("2%", "warmup")
    ((25, Fraction(0, 1)), (0, Fraction(1, 50)))
    """
    advice = f'{name} must be an int (steps), a float in [0, 1) (fraction of the run) or a string such as "500 steps"'
    if isinstance(value, str):
        match = _LENGTH.fullmatch(value)
        if match is None:
            raise ValueError(f'{advice}, "2%" or "1B tokens", got {value!r}')
        number, unit = match.groups()
        if unit is not None and "token" in unit:
            if tokens_per_step is None:
                raise ValueError(
                    f"{name}={value!r} is in tokens, but the tokens of a step are not known here: use "
                    "`extend(trainer)` and data with input_ids, or give the length in steps"
                )
            tokens = float(number) * _TOKENS[unit.split("t", 1)[0].strip()]
            return math.floor(tokens / tokens_per_step + 0.5), Fraction(0)
        if unit == "%":
            if float(number) >= 100:
                raise ValueError(f"{advice}; {match.group(0).strip()!r} is not below 100%")
            return 0, Fraction(number.replace("_", "")) / 100
        if unit is None and not number.replace("_", "").isdigit():
            value = float(number)
        elif number.replace("_", "").isdigit():
            value = int(number)
        else:
            raise ValueError(f"{advice}; a number of steps is whole, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{advice}, got {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{advice}, got {value}")
        return value, Fraction(0)
    if not 0 <= value < 1:
        raise ValueError(f"{advice}, got {value}: write {value:g} steps as an int")
    # In decimals, as typed.
    return 0, Fraction(repr(value))


def to_rate(value: float | str, peak_lr: float, name: str) -> float:
    """The learning rate meant by the setting `name`: absolute, or a percentage of `peak_lr`.

    Raises:
        `ValueError`: a negative, infinite or unreadable rate.

    Example:

    >>> to_rate("10%", 3e-4, "min_lr"), to_rate(1e-5, 3e-4, "min_lr")
    (3e-05, 1e-05)
    """
    advice = f'{name} must be a learning rate such as 3e-5, or a share of the peak such as "10%"'
    relative = False
    if isinstance(value, str):
        match = _RATE.fullmatch(value)
        if match is None:
            raise ValueError(f"{advice}, got {value!r}")
        value, relative = float(match.group(1)), match.group(2) is not None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{advice}, got {value!r}")
    if relative:
        # In decimals, as typed: in floats 10 % of 3e-4 is not 3e-5.
        return float(Fraction(repr(float(value))) * Fraction(repr(float(peak_lr))) / 100)
    return float(value)
