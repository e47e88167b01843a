"""Meta-attention: causal attention among the meta-tokens of a document, and nobody else (arXiv 2509.16278).

    P[i, j] = 0 if i and j are both meta positions, else −∞
    MetaAttn = softmax(Q·Kᵀ/√d_k + M + P)·V,  M the causal mask

Written so, a row of a token that is no meta-token has no key at all, and its softmax is NaN. Here the meta positions
are gathered first: M = k·n of n rows go through norm, projections and attention (cost k²n²), and what comes out is
added at those rows; all others keep the residual that they had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_pretrain_ext.meta_tokens.memory import MetaMemory

__all__ = ["MetaAttention", "MetaContext", "documents_of", "gather_rotary", "meta_context", "positions_of"]

Layout = Literal["half", "interleaved", "pairs"]
"""How a model lays out cosines: `(f, f)` for halves, `(f0, f0, f1, f1, ...)` for neighbours, `f` alone."""


@dataclass(frozen=True)
class MetaContext:
    """
    Where the meta-tokens of a batch stand and who sees whom: made once a forward pass, used by every layer.

    Attributes:
        positions (`Tensor`): `(batch, meta)`, index of each in its row; 0 where a row has fewer.
        valid (`Tensor`): `(batch, meta)`, whether there is one.
        rows (`Tensor`): `(batch · meta)`, the same as rows of a `(batch · length, hidden)` view.
        mask (`Tensor`, *optional*): `(batch, 1, meta, keys)`, True where a query sees a key; None for plain causal.
        memory ([`MetaMemory`], *optional*): keys and values of earlier passes, in generation.
    """

    positions: Tensor
    valid: Tensor
    rows: Tensor
    mask: Tensor | None
    memory: MetaMemory | None = None

    @property
    def count(self) -> int:
        """Columns: meta-tokens of the row that has most of them, or what the collator made room for."""
        return self.positions.shape[1]

    def on(self, device: torch.device) -> MetaContext:
        """The same on the device of a layer, where a model is spread over several."""
        if self.positions.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("positions", "valid", "rows")}
        return replace(self, **moved, mask=None if self.mask is None else self.mask.to(device))

    def gather(self, hidden_bnd: Tensor) -> Tensor:
        """`(batch, meta, hidden)`: the rows of the meta-tokens."""
        flat = hidden_bnd.reshape(-1, hidden_bnd.shape[-1])
        return flat.index_select(0, self.rows).view(*self.positions.shape, -1)

    def add(self, hidden_bnd: Tensor, update_bmd: Tensor) -> Tensor:
        """`hidden_bnd` with `update_bmd` added at the meta-tokens; all other rows stay bit for bit."""
        update = torch.where(self.valid.unsqueeze(-1), update_bmd, 0).to(hidden_bnd.dtype)
        flat = hidden_bnd.reshape(-1, hidden_bnd.shape[-1])
        return flat.index_add(0, self.rows, update.reshape(-1, update.shape[-1])).view_as(hidden_bnd)


def meta_context(
    positions: Tensor, length: int, documents: Tensor | None = None, memory: MetaMemory | None = None, past: int = 0
) -> MetaContext:
    """
    The context of a batch; nothing here waits for a device.

    Args:
        positions (`Tensor`): `(batch, meta)`, index of every meta-token in its row, ascending, −1 at the end of rows
            that have fewer.
        length (`int`): tokens of a row.
        documents (`Tensor`, *optional*): `(batch, meta)`, number of the document that each is in; those of different
            documents do not see each other. Without it a row is one document.
        memory ([`MetaMemory`], *optional*): of the `past` tokens before these, and of these from now on.
        past (`int`, *optional*, defaults to 0): tokens before the first of these.

    Example:

    >>> context = meta_context(torch.tensor([[1, 3], [2, -1]]), length=4)
    >>> context.valid.tolist(), context.rows.tolist()
    ([[True, True], [True, False]], [1, 3, 6, 4])
    """
    if memory is not None:
        memory.check(len(positions))
    valid = positions >= 0
    index = positions.clamp(min=0)
    rows = index + torch.arange(len(index), device=index.device).unsqueeze(1) * length
    count = index.shape[1]
    earlier = 0 if memory is None else memory.count
    mask = None
    if documents is not None or earlier:
        order = torch.arange(count, device=index.device)
        seen = (order.unsqueeze(1) >= order) & valid.unsqueeze(1)
        if documents is not None:
            seen = seen & (documents.unsqueeze(2) == documents.unsqueeze(1))
        # Where there is no meta-token there is no key either: it sees itself, and what comes out is dropped.
        seen = seen | (order.unsqueeze(1) == order)
        if memory is not None and earlier:
            seen = torch.cat([memory.valid.unsqueeze(1).expand(-1, count, -1), seen], dim=-1)
        mask = seen.unsqueeze(1)
    if memory is not None and count:
        memory.append(torch.where(valid, index + past, -1))
    return MetaContext(index, valid, rows.flatten(), mask, memory)


def positions_of(input_ids: Tensor, token_id: int) -> Tensor:
    """
    `(batch, meta)`: where `token_id` stands in each row, −1 at the end of rows that have fewer.

    How many there are must be known to the host, so this waits for the device: in training the collator hands the
    positions over.

    Example:

    >>> positions_of(torch.tensor([[9, 5, 9], [5, 5, 9]]), 9).tolist()
    [[0, 2], [2, -1]]
    """
    found = input_ids == token_id
    most = int(found.sum(1).max()) if found.numel() else 0
    length = input_ids.shape[1]
    index = torch.where(found, torch.arange(length, device=input_ids.device), length)
    first = index.sort(dim=1).values[:, :most]
    return torch.where(first < length, first, -1)


def documents_of(position_ids: Tensor, positions: Tensor) -> Tensor:
    """
    `(batch, meta)`: the document of each meta-token, told by where `position_ids` does not go on by one.

    Example:

    >>> documents_of(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 2, 4, -1]])).tolist()
    [[0, 0, 1, -1]]
    """
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    number = starts.cumsum(-1).expand(len(positions), -1)
    return torch.where(positions >= 0, number.gather(1, positions.clamp(min=0)), -1)


def gather_rotary(cos: Tensor, sin: Tensor, context: MetaContext) -> tuple[Tensor, Tensor]:
    """Rows `(batch, meta, dims)` of a model's cosines and sines `(1 or batch, length, dims)` at the meta-tokens."""

    def rows(table: Tensor) -> Tensor:
        table = table if table.dim() == 3 else table.unsqueeze(0)
        if table.shape[0] == 1:
            return table[0][context.positions]
        return table.gather(1, context.positions.unsqueeze(-1).expand(-1, -1, table.shape[-1]))

    return rows(cos), rows(sin)


def rotate(heads_bhmd: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """The first dimensions of every head turned by its position, as many as there are cosines; the rest as it was."""
    cos, sin = cos.unsqueeze(1).to(heads_bhmd.dtype), sin.unsqueeze(1).to(heads_bhmd.dtype)
    if layout == "pairs":
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    dims = cos.shape[-1]
    turned, rest = heads_bhmd[..., :dims], heads_bhmd[..., dims:]
    if layout == "interleaved":
        quarter = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        quarter = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos + quarter * sin, rest], dim=-1)


class MetaAttention(nn.Module):
    """
    The sub-layer: norm, attention among the rows that it is given, output projection.

    Args:
        hidden_size (`int`): of the model.
        num_heads (`int`): of queries.
        num_key_value_heads (`int`): of keys and values; a divisor of `num_heads`.
        head_dim (`int`): of a head.
        norm (`str`, *optional*, defaults to `"layernorm"`): in front, `"layernorm"` (the paper's) or `"rmsnorm"`.
        eps (`float`, *optional*, defaults to 1e-5): of the norm.
        bias (`bool`, *optional*, defaults to `False`): of the projections.
        dropout (`float`, *optional*, defaults to 0.0): share of the output that training drops (0 in the paper).
        layout (`str`, *optional*): of the cosines that [`forward`](MetaAttention.forward) is given; None for no
            rotation.
        layer (`int`, *optional*, defaults to 0): number of the layer, by which its keys are kept in generation.

    The submodules are not named as those of any model, so that adapters which name `q_proj` or `query` pass them by.

    Example:

    >>> attention = MetaAttention(hidden_size=8, num_heads=2, num_key_value_heads=1, head_dim=4)
    >>> attention(torch.randn(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        eps: float = 1e-5,
        bias: bool = False,
        dropout: float = 0.0,
        layout: Layout | None = None,
        layer: int = 0,
        **factory: Any,
    ):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.dropout, self.layout, self.layer = dropout, layout, layer
        self.norm = (nn.LayerNorm if norm == "layernorm" else nn.RMSNorm)(hidden_size, eps=eps, **factory)
        self.to_query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **factory)
        self.to_key = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias, **factory)
        self.to_value = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias, **factory)
        self.to_output = nn.Linear(num_heads * head_dim, hidden_size, bias=bias, **factory)

    @torch.no_grad()
    def initialise(self, std: float, zero_output: bool = True) -> None:
        """Projections from N(0, std²), biases zero, and the output zero, so that the sub-layer starts as nothing."""
        for linear in (self.to_query, self.to_key, self.to_value, self.to_output):
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if zero_output:
            nn.init.zeros_(self.to_output.weight)

    def heads(self, hidden_bmd: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(batch, heads, meta, head_dim)` of the rows, rotated."""
        normed = self.norm(hidden_bmd)

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        query = split(self.to_query(normed), self.num_heads)
        key = split(self.to_key(normed), self.num_key_value_heads)
        value = split(self.to_value(normed), self.num_key_value_heads)
        if rotary is not None and self.layout is not None:
            query, key = rotate(query, *rotary, self.layout), rotate(key, *rotary, self.layout)
        return query, key, value

    def repeat(self, keys: Tensor) -> Tensor:
        """Every head of keys or values once for each query head that shares it."""
        shared = self.num_heads // self.num_key_value_heads
        return keys if shared == 1 else keys.repeat_interleave(shared, dim=1)

    def forward(
        self,
        hidden_bmd: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        memory: MetaMemory | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_bmd (`Tensor`): `(batch, meta, hidden)`, the residual at the meta-tokens.
            mask (`Tensor`, *optional*): `(batch, 1, meta, keys)`, True where a query sees a key; None for causal.
            rotary (pair of `Tensor`, *optional*): cosines and sines `(batch, meta, dims)`.
            memory ([`MetaMemory`], *optional*): keeps the keys and values, and gives those of earlier passes.

        Returns:
            `Tensor`: `(batch, meta, hidden)`, what is to be added to the residual.
        """
        query, key, value = self.heads(hidden_bmd, rotary)
        if memory is not None:
            key, value = memory.extend(self.layer, key, value)
        mixed = F.scaled_dot_product_attention(
            query, self.repeat(key), self.repeat(value), attn_mask=mask, is_causal=mask is None
        )
        output = self.to_output(mixed.transpose(1, 2).flatten(2))
        return F.dropout(output, self.dropout, self.training) if self.dropout else output
