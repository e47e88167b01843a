"""Counter-based random numbers: value i of a stream is a function of (key, i), never of what was drawn before.

The generator is SplitMix64 (Steele, Lea, Flood, 2014) read at an arbitrary position, in integer arithmetic only, so
the same key gives the same numbers on every machine and under every version of NumPy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["bounded", "derive_key", "random_words"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings, stable over processes, platforms and versions.

    Example:

    >>> derive_key(0, "source", "wiki") == derive_key(0, "source", "wiki")
    True
    >>> derive_key(0, "a", 1) == derive_key(0, "a", 2)
    False
    """
    # ascii keeps 1 and "1" apart, and the separator cannot occur unescaped in it.
    text = "\x1f".join(ascii(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_words(key: int, counters: NDArray[np.integer] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 at the given `counters` of the stream `key`: uint64 words, same shape as `counters`.

    Example:

    >>> words = random_words(7, np.arange(4))
    >>> bool(words[2] == random_words(7, np.array([2]))[0])
    True
    """
    z = counters.astype(np.uint64)
    z *= np.uint64(_GAMMA)
    z += np.uint64((key + _GAMMA) & _MASK)
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def bounded(words: NDArray[np.uint64], bound: int) -> NDArray[np.uint64]:
    """Maps 64-bit words to integers in [0, `bound`), `bound` below 2^32, by the high half of a product.

    Example:

    >>> int(bounded(random_words(0, np.arange(1000)), 10).max())
    9
    """
    high = words >> np.uint64(32)
    high *= np.uint64(bound)
    high >>= np.uint64(32)
    return high
