"""The keys and values of meta-tokens that generation has passed, beside the cache of the model's own attention.

They hang on the `Cache` that the model is given or returns: such a cache becomes an instance of a subclass of its own
class whose reordering, repetition and selection of rows reach them too. What is cropped away needs no message: what
the cache has forgotten by the next pass is forgotten here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["MetaMemory", "hang_memory", "memory_of"]

_ATTRIBUTE = "_meta_tokens_memory"


class MetaMemory:
    """
    Keys and values of the meta-tokens so far, by layer: `(batch, heads, columns, head_dim)`.

    A column is one place for each row. Rows that had no meta-token when others had one hold nothing there.
    """

    def __init__(self) -> None:
        self.places: Tensor | None = None  # (batch, columns): index in the whole sequence, −1 for nothing
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        """Columns."""
        return 0 if self.places is None else self.places.shape[1]

    @property
    def valid(self) -> Tensor:
        """`(batch, columns)`: whether there is a meta-token."""
        if self.places is None:
            raise RuntimeError("the memory is empty")
        return self.places >= 0

    def check(self, batch: int) -> None:
        """Raises `ValueError` if the memory is not of so many rows."""
        if self.places is not None and len(self.places) != batch:
            raise ValueError(
                f"the cache holds meta-tokens of {len(self.places)} rows, and input_ids has {batch}. Change the "
                "rows of a cache with its own methods: reorder_cache, batch_repeat_interleave, batch_select_indices"
            )

    def append(self, places: Tensor) -> None:
        """Columns for new meta-tokens, whose keys and values [`extend`](MetaMemory.extend) brings."""
        self.places = places if self.places is None else torch.cat([self.places, places], dim=1)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values of a layer, and returns all that it has."""
        if layer in self.layers:
            earlier_key, earlier_value = self.layers[layer]
            key, value = torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)
        self.layers[layer] = key, value
        return key, value

    def forget(self, length: int) -> None:
        """Leaves only what stands before `length`: the rest was cropped from the cache."""
        if self.places is None or not bool((self.places >= length).any()):
            return
        self.places = torch.where(self.places < length, self.places, -1)
        kept = (self.places >= 0).any(0).nonzero().flatten()
        self.places = self.places[:, kept]
        self.layers = {
            number: (key.index_select(2, kept.to(key.device)), value.index_select(2, kept.to(key.device)))
            for number, (key, value) in self.layers.items()
        }

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change`, which picks or repeats rows, to everything."""
        if self.places is None:
            return
        self.places = change(self.places)
        self.layers = {number: (change(key), change(value)) for number, (key, value) in self.layers.items()}


class _Remembers:
    """What the caches of transformers do with their rows, done to the memory too."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made here, so nothing could find it by its name.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_new, (type(self).__mro__[2],), *state)

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        getattr(self, _ATTRIBUTE).change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        getattr(self, _ATTRIBUTE).change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        getattr(self, _ATTRIBUTE).change_rows(
            lambda rows: rows[indices.to(rows.device) if isinstance(indices, Tensor) else indices]
        )
        return super().batch_select_indices(indices)  # type: ignore[misc]


_CLASSES: dict[type, Any] = {}
"""By the class of a cache: the same with a memory."""


def _class_of(base: Any) -> Any:
    if base not in _CLASSES:
        own = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _CLASSES[base] = type(base.__name__, (_Remembers, base), own)
    return _CLASSES[base]


def _new(base: type) -> Any:
    made = _class_of(base)
    return made.__new__(made)


def hang_memory(cache: Any, memory: MetaMemory) -> None:
    """Makes `memory` follow what is done to the rows of `cache`."""
    if not isinstance(cache, _Remembers):
        cache.__class__ = _class_of(type(cache))
    setattr(cache, _ATTRIBUTE, memory)


def cache_given(call: dict[str, Any]) -> Any:
    """The cache among arguments or outputs of a forward: `cache` since transformers 5.24, `past_key_values` before."""
    cache = call.get("cache")
    return call.get("past_key_values") if cache is None else cache


def cache_made(outputs: Any) -> Any:
    """The cache among a model's outputs, a tuple's too; None if there is none, or if the pass failed."""
    # By what it can do: reading it by its older name warns in newer releases, the newer is missing in older ones.
    made = outputs.values() if isinstance(outputs, dict) else outputs or ()
    return next((each for each in made if hasattr(each, "get_seq_length")), None)


def memory_of(cache: Any, length: int) -> MetaMemory:
    """
    The memory that hangs on a cache of `length` tokens, without what was cropped; a new one on an empty cache.

    Raises:
        `ValueError`: the cache was filled by something else, so its meta-tokens are not known.
    """
    memory = getattr(cache, _ATTRIBUTE, None)
    if memory is None:
        if length:
            raise ValueError(
                f"the cache is a {type(cache).__name__} of {length} tokens that this model did not see with its "
                "meta-attention, whose keys are missing for them. Pass an empty cache, or one that this model returned"
            )
        memory = MetaMemory()
        hang_memory(cache, memory)
    memory.forget(length)
    return memory
