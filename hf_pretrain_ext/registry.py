"""Plug-ins that are installed, ours and other packages', found through the entry points `hf_pretrain_ext.plugins`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

__all__ = ["GROUP", "installed_plugins"]

GROUP = "hf_pretrain_ext.plugins"


def installed_plugins(points: Iterable[EntryPoint] | None = None) -> dict[str, type]:
    """Plug-in classes by the name of their entry point.

    Args:
        points (`Iterable[EntryPoint]`, *optional*): defaults to those of the group in this environment.

    Raises:
        `ValueError`: two packages offer a plug-in of one name, or one that is not a `TrainerPlugin` of that name.

    Example:

    >>> {"forgetting", "replay", "rewarm"} <= set(installed_plugins())
    True
    """
    from hf_pretrain_ext.plugin import TrainerPlugin

    found: dict[str, type] = {}
    origin: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda point: point.name):
        package = f"{point.dist.name} ({point.value})" if point.dist else point.value
        if point.name in found and origin[point.name] != package:
            raise ValueError(
                f"two installed packages offer a plug-in named {point.name!r}: {origin[point.name]} and {package}. "
                "Uninstall one of them."
            )
        loaded = point.load()
        if not isinstance(loaded, type) or not issubclass(loaded, TrainerPlugin) or loaded.name != point.name:
            raise ValueError(f"the entry point {point.name!r} of {package} is not a TrainerPlugin of that name")
        found[point.name], origin[point.name] = loaded, package
    return found
