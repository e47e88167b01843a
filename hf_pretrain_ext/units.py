"""Lengths and rates as users write them: one rule for every setting.

An int is steps, a float below 1 is a fraction of the run, a string says its unit (`"500 steps"`, `"2%"`,
`"2B tokens"`). A rate as a float is absolute, as a string with `%` it is relative to the peak rate.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from hf_pretrain_ext.values import MAX_STEPS, is_number, shown

__all__ = ["to_point", "to_rate", "to_steps"]

# At most 40 digits and an exponent of two: the fraction 1e-999999999 would fill the memory.
_NUMBER = r"(?=[0-9._]{1,40}(?![0-9._]))[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
_LENGTH = re.compile(rf"\s*({_NUMBER})\s*(%|steps?|[kKMBT]?\s*tokens?)?\s*")
_TOKENS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RATE = re.compile(r"\s*((?=[0-9.]{1,40}(?![0-9.]))[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*(%)?\s*")


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
            raise ValueError(f'{advice}, "2%" or "1B tokens", got {shown(value)}')
        number, unit = match.groups()
        if unit is not None and "token" in unit:
            if tokens_per_step is None:
                raise ValueError(
                    f"{name}={value!r} is in tokens, but the tokens of a step are not known here: use "
                    "`extend(trainer)` and data with input_ids, or give the length in steps"
                )
            tokens = float(number) * _TOKENS[unit.split("t", 1)[0].strip()]
            return _in_range(math.floor(tokens / tokens_per_step + 0.5), value, advice), Fraction(0)
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
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value, value, advice), Fraction(0)
    if not is_number(value) or value < 0:
        raise ValueError(f"{advice}, got {shown(value)}")
    if value >= 1:
        raise ValueError(f"{advice}, got {value}: write {value:g} steps as an int")
    # In decimals, as typed.
    return 0, Fraction(repr(value))


def _in_range(steps: int, value: int | str, advice: str) -> int:
    if steps < 0:
        raise ValueError(f"{advice}, got {shown(value)}")
    if steps > MAX_STEPS:
        raise ValueError(f"{advice}, at most {MAX_STEPS:.0e} steps, got {shown(value)}")
    return steps


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
            raise ValueError(f"{advice}, got {shown(value)}")
        value, relative = float(match.group(1)), match.group(2) is not None
    if not is_number(value) or value < 0:
        raise ValueError(f"{advice}, got {shown(value)}")
    if relative:
        try:
            # In decimals, as typed: in floats 10 % of 3e-4 is not 3e-5.
            return float(Fraction(repr(float(value))) * Fraction(repr(float(peak_lr))) / 100)
        except OverflowError as error:
            raise ValueError(f"{advice}, got {value:g}% of {peak_lr:g}, which is no finite rate") from error
    return float(value)
