"""Meta-tokens in collated batches: padded on either side, packed, or one sample behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_pretrain_ext.meta_tokens.insertion import (
    IGNORED,
    Positions,
    checked_fraction,
    document_numbers,
    draw_positions,
    insert,
    meta_counts,
)
from hf_pretrain_ext.values import shown

__all__ = ["Insertion", "Length", "mark"]

Length = Literal["longer", "fixed"]
"""What gives way to meta-tokens: nothing, or as many tokens of text at the sample's end."""

_TOKENS = ("input_ids", "labels", "position_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What flash attention and linear attention are told about the documents of a batch of one row."""

_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Insertion:
    """
    Inserts meta-tokens into every sample of a collated batch.

    What a sample gets depends on its tokens and its seed alone, and neither on the samples beside it nor on how they
    are laid out. Widths depend on the width of the batch alone.

    Args:
        meta_id (`int`): the token.
        fraction (`float`): k: a sample of l tokens gets ⌊k·l⌋.
        how (`str`, *optional*, defaults to `"uniform"`): see [`draw_positions`].
        length (`str`, *optional*, defaults to `"longer"`): `"longer"`: the sample becomes one of l + ⌊k·l⌋ tokens.
            `"fixed"`: it stays as long, and its last ⌊k·l⌋ tokens are left out.
        ends (`tuple` of `int`, *optional*): with `how="boundaries"`, token ids that end something. The last token of
            a document does in any case.

    Example:

    >>> batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None]}
    >>> made = Insertion(meta_id=99, fraction=0.2, how="every_n")(batch, seeds=[0])
    >>> made["input_ids"].tolist(), made["meta_positions"].tolist()
    ([[0, 1, 2, 3, 4, 99, 5, 6, 7, 8, 9, 99]], [[5, 11]])
    """

    meta_id: int
    fraction: float
    how: Positions = "uniform"
    length: Length = "longer"
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checked_fraction(self.fraction)
        for name, value, kinds in (("how", self.how, Positions), ("length", self.length, Length)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {shown(value)}")
        if bool(self.ends) and self.how != "boundaries":
            raise ValueError(f"ends are for how='boundaries', got how={self.how!r}. Leave them out")

    def __call__(
        self, batch: Mapping[str, Any], seeds: ArrayLike, lengths: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """
        Args:
            batch (`Mapping`): `input_ids`, shape `(batch, sequence)`, and `labels`, `position_ids` and
                `attention_mask` of that shape where it has them; rows may be padded on either side, by their mask.
                Or all samples one behind the other, shape `(1, sequence)`, padding at the end or not, with
                `cu_seq_lens_q`, `max_length_q` and their like where it has them, which are made anew.
            seeds (`ArrayLike` of `int`): one for each sample.
            lengths (`Sequence[int]`, *optional*): tokens of each sample; needed where they lie one behind the other.

        Returns:
            `dict`: the batch, with `meta_positions` and `meta_documents` as [`insert`] returns them.

        Raises:
            `ValueError`: a batch of another form, or with the meta-token in it already.
        """
        ids = _checked_ids(batch)
        if bool((ids == self.meta_id).any()):
            raise ValueError(
                f"input_ids hold the meta-token {self.meta_id} already. Tokenize text so that none becomes it, with "
                "split_special_tokens=True, or see positions='given'"
            )
        number = len(np.atleast_1d(np.asarray(seeds)))
        layout: _Rows | _Joined
        if len(ids) == 1 and lengths is not None and (number > 1 or sum(lengths) < ids.shape[1]):
            layout = _Joined(batch, lengths)
        else:
            layout = _Rows(batch)
        if len(layout.sizes) != number:
            raise ValueError(f"{number} seeds for {len(layout.sizes)} samples. Pass one for each")
        share = checked_fraction(self.fraction)
        width, sizes = layout.samples["input_ids"].shape[1], layout.sizes
        counts, most = meta_counts(share, sizes), int(meta_counts(share, width))
        text = sizes - counts if self.length == "fixed" else sizes
        width -= most if self.length == "fixed" else 0
        samples = {name: tensor[:, :width] for name, tensor in layout.samples.items()}
        whole = bool((text == width).all() and (counts == most).all())
        mask = None if whole else (torch.arange(width) < _column(text)).long()
        if mask is not None and self.length == "fixed":
            # What is left out becomes padding, of which such a row has some.
            padding = {"input_ids": layout.samples["input_ids"][:, -1:], "labels": torch.tensor(IGNORED)}
            samples |= {name: samples[name].where(mask > 0, fill) for name, fill in padding.items() if name in samples}
        ends = _ends(samples, self.ends) if self.how == "boundaries" else None
        drawn = draw_positions(seeds, text, counts, self.how, ends)
        made = insert(
            samples["input_ids"],
            samples.get("labels"),
            torch.nn.functional.pad(drawn, (0, most - drawn.shape[1]), value=-1),
            self.meta_id,
            position_ids=samples.get("position_ids"),
            attention_mask=mask,
        )
        return _with_bounds(batch, {**batch, **layout.restored(made, text + counts)})


class _Rows:
    """A sample a row: apart, padding is behind it."""

    def __init__(self, batch: Mapping[str, Any]):
        self.mask = batch.get("attention_mask")
        self.names = [name for name in (*_TOKENS, "attention_mask") if name in batch]
        self.samples: _Tensors = {name: batch[name] for name in _TOKENS if name in batch}
        rows, width = batch["input_ids"].shape
        self.sizes: NDArray[np.int64] = np.full(rows, width)
        self.left: torch.Tensor | None = None
        if self.mask is None:
            return
        real = self.mask.bool()
        self.sizes = real.sum(1).numpy()
        front = real.int().argmax(1, keepdim=True)
        places = torch.arange(width)
        if bool((real != ((places >= front) & (places < front + _column(self.sizes)))).any()):
            raise ValueError("attention_mask has zeros between ones. Pass rows with padding at their ends only")
        if bool(front.any()):
            self.left = front > 0
            self.samples = {name: t.gather(1, (places + front) % width) for name, t in self.samples.items()}

    def restored(self, made: _Tensors, totals: NDArray[np.int64]) -> dict[str, Any]:
        if self.mask is not None:
            places = torch.arange(made["input_ids"].shape[1])
            made["attention_mask"] = (places < _column(totals)).to(self.mask.dtype)
            if self.left is not None:
                shift = (len(places) - _column(totals)) * self.left
                for name in self.names:
                    if name in made:
                        made[name] = made[name].gather(1, (places - shift) % len(places))
                made["meta_positions"] = (made["meta_positions"] + shift).where(made["meta_positions"] >= 0, -1)
        return {name: made[name] for name in (*self.names, "meta_positions", "meta_documents") if name in made}


class _Joined:
    """Samples one behind the other in one row, and padding behind the last."""

    def __init__(self, batch: Mapping[str, Any], lengths: Sequence[int]):
        if "attention_mask" in batch:
            raise ValueError(
                "a batch of samples one behind the other has an attention_mask, by which they would see each other. "
                "Take it out, or collate one sample a row"
            )
        self.sizes: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        whole = {name: batch[name][0] for name in _TOKENS if name in batch}
        end = int(self.sizes.sum())
        if end > len(whole["input_ids"]):
            raise ValueError(f"lengths are of {end} tokens, the batch has {len(whole['input_ids'])}. Pass its own")
        self.padding = {name: tensor[end:] for name, tensor in whole.items()}
        starts = np.cumsum(self.sizes) - self.sizes
        index = (torch.arange(int(self.sizes.max(initial=0))) + _column(starts)).clamp_(max=max(end - 1, 0))
        self.samples: _Tensors = {name: tensor[index] for name, tensor in whole.items()}

    def restored(self, made: _Tensors, totals: NDArray[np.int64]) -> dict[str, Any]:
        kept = torch.arange(made["input_ids"].shape[1]) < _column(totals)
        joined = {name: torch.cat([made[name][kept], padding])[None] for name, padding in self.padding.items()}
        positions, documents = made["meta_positions"], made["meta_documents"]
        there = positions >= 0
        positions = positions + _column(np.cumsum(totals) - totals)
        if "position_ids" in made:
            numbers = document_numbers(made["position_ids"]).masked_fill_(~kept, -1).amax(1, keepdim=True) + 1
            documents = documents + numbers.cumsum(0) - numbers
        return {**joined, "meta_positions": positions[there][None], "meta_documents": documents[there][None]}


def mark(batch: Mapping[str, Any], meta_id: int) -> dict[str, Any]:
    """
    A batch that holds meta-tokens already, with what [`Insertion`] would say about them.

    Example:

    >>> made = mark({"input_ids": torch.tensor([[9, 5, 9]]), "labels": torch.tensor([[9, 5, 9]])}, meta_id=9)
    >>> made["labels"].tolist(), made["meta_positions"].tolist()
    ([[-100, 5, -100]], [[0, 2]])
    """
    ids = _checked_ids(batch)
    found = ids == meta_id
    if "attention_mask" in batch:
        found &= batch["attention_mask"].bool()
    counts = found.sum(1)
    positions = torch.full((len(ids), int(counts.max())), -1)
    there = torch.arange(positions.shape[1]) < counts[:, None]
    positions[there] = found.nonzero()[:, 1]
    documents = torch.zeros_like(positions)
    if "position_ids" in batch:
        documents = document_numbers(batch["position_ids"]).gather(1, positions.clamp(min=0))
    made = {**batch, "meta_positions": positions, "meta_documents": documents.masked_fill(~there, -1)}
    if "labels" in batch:
        made["labels"] = batch["labels"].masked_fill(ids == meta_id, IGNORED)
    return made


def _checked_ids(batch: Mapping[str, Any]) -> torch.Tensor:
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"a batch must have input_ids of the shape (batch, sequence), got {_shape(ids)}")
    known = (*_TOKENS, "attention_mask")
    for name, value in batch.items():
        if name in known and _shape(value) != tuple(ids.shape):
            raise ValueError(f"{name} must have the shape of input_ids, {tuple(ids.shape)}, got {_shape(value)}")
        if name not in (*known, *_BOUNDS) and _shape(value)[:2] == tuple(ids.shape):
            raise ValueError(
                f"the batch has {name} of the shape {_shape(value)}, and nothing says what it is at meta-tokens. Use "
                f"a collator that gives {', '.join(known)} alone"
            )
    return ids


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _column(numbers: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(numbers)[:, None]


def _ends(samples: _Tensors, ends: tuple[int, ...]) -> torch.Tensor:
    """Tokens that end something: a sentence, by their id, or a document."""
    ids = samples["input_ids"]
    found = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype))
    if "position_ids" in samples:
        document = document_numbers(samples["position_ids"])
        found[:, :-1] |= document[:, 1:] != document[:, :-1]
    return found


def _with_bounds(batch: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Where documents begin in a batch of one row, in the forms that `batch` says it in."""
    if not any(name in batch for name in _BOUNDS):
        return made
    if len(made["input_ids"]) != 1 or "position_ids" not in made:
        raise ValueError(
            f"the batch has {', '.join(name for name in _BOUNDS if name in batch)}, which are made anew from the "
            "position_ids of one row. Collate with both, or with neither"
        )
    documents = document_numbers(made["position_ids"])[0]
    lengths = documents.bincount()
    cumulated = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    for name in _BOUNDS:
        if name in batch and name.startswith("cu_seq_lens"):
            made[name] = cumulated.to(batch[name].dtype)
        elif name in batch:
            whole = documents[None].to(batch[name].dtype) if name == "seq_idx" else int(lengths.max())
            made[name] = whole
    return made
