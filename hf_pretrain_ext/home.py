"""Paths in files that may be published: `~` in place of the home folder, which has somebody's name in it."""

from __future__ import annotations

import os
import re
from typing import Any

__all__ = ["with_home", "without_home"]


def without_home(value: Any) -> Any:
    """A text, or a list or dict of such, with `~` for the home folder wherever a path begins with it.

    Example:

    >>> home = os.path.expanduser("~")
    >>> without_home({"files": [f"{home}/a.arrow", "/data/b.arrow"], "rows": 3})
    {'files': ['~/a.arrow', '/data/b.arrow'], 'rows': 3}
    >>> without_home(f"--out {home}/runs"), with_home(without_home(f"{home}/runs")) == f"{home}/runs"
    ('--out ~/runs', True)
    >>> without_home(f"/mnt{home}/a {home}work") == f"/mnt{home}/a {home}work"  # other folders
    True
    """
    if isinstance(value, str):
        home = os.path.expanduser("~")
        # Where the root is home (some containers), its name tells nothing.
        return re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", value) if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: without_home(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_home(each) for each in value]
    return value


def with_home(value: Any) -> Any:
    """What [`without_home`] was given, on the same machine."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, dict):
        return {key: with_home(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_home(each) for each in value]
    return value
