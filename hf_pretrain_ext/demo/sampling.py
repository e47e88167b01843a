"""Choices among named files and documents that depend on the names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["rank", "sample"]


def rank(name: str, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the name and the purpose only (`hash` would change with every process)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=purpose).digest(), "big") / 2**64


def sample(paths: Iterable[tuple[str, Path]], limit: int | None) -> list[tuple[str, Path]]:
    """The named files sorted by name; with a limit, that many of them, always the same ones."""
    # Not the ranking that splits: the files of lowest rank are those that are held out.
    ranked = sorted(paths, key=lambda item: (rank(item[0], b"sample"), item[0]))
    return sorted(ranked[:limit])
