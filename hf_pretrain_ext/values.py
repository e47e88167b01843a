"""Values that users gave: what kind of number one is, and a short text of it or of an error for messages."""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np

__all__ = ["MAX_STEPS", "check_flag", "check_integers", "is_number", "is_whole", "reason", "shown"]

MAX_STEPS = 10**15
"""No length in steps is longer: beyond lie typing errors, and integers that no float holds."""


class _Short(reprlib.Repr):
    """A repr that ends soon, whatever it is given: aliases of aliases, endless integers, whole data frames."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print more than 4,300 digits.
        return repr(x) if x.bit_length() < 128 else f"an int of {int(x.bit_length() * math.log10(2)) + 1:,} digits"

    def repr_instance(self, x: object, level: int) -> str:
        return " ".join(super().repr_instance(x, level).split())


_SHORT = _Short()


def shown(value: Any, most: int = 200) -> str:
    """`repr(value)`, shortened to about `most` characters.

    Example:

    >>> shown([1, "two"]), shown(10**9999), len(shown("x" * 10**6))
    ("[1, 'two']", 'an int of 10,000 digits', 100)
    """
    text = _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason(error: BaseException, most: int = 600) -> str:
    """An error of another library as one text, with the one behind it, where it says what there was.

    Example:

    >>> reason(KeyError("text"))
    "KeyError: 'text'"
    """
    lines = " ".join(f"{type(error).__name__}: {error}".split())
    if error.__cause__ is not None:
        lines = f"{lines[: most // 2]} ({reason(error.__cause__, most // 2)})"
    return lines if len(lines) <= most else f"{lines[: most - 3]}..."


def is_number(value: Any) -> bool:
    """Whether `value` is an int or float, finite also as a float, and no flag."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer, NumPy's included, and no flag."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> bool:
    """`value` if it is True or False; raises `ValueError`, which names the setting, if not."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_integers(**settings: tuple[Any, int, int | None, bool]) -> None:
    """Each setting by name: its value, the smallest and the largest (None: any) allowed, and whether None is too.

    Raises:
        `ValueError`: it is another; the message names the setting.

    Example:

    >>> check_integers(num_proc=(0, 1, 64, True))
    Traceback (most recent call last):
    ValueError: num_proc must be an integer from 1 on or None, got 0
    """
    for name, (value, least, most, optional) in settings.items():
        if value is None and optional:
            continue
        large = is_whole(value) and most is not None and value > most
        if not is_whole(value) or value < least or large:
            allowed = f"from {least} {f'to {most:,}' if large else 'on'}{' or None' * optional}"
            raise ValueError(f"{name} must be an integer {allowed}, got {shown(value)}")
