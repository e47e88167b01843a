"""One row of an embedding trained alone: the new token's, while the table stays frozen, bit for bit.

A gradient for the table would be as large as the table, and so would the optimizer's moments. Here the row is a
parameter of its own, which stands in for the table's in the forward pass; the table's follows it, so that whoever
reads or saves the table finds the trained row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAME", "left_out", "release_row", "reload_row", "row_of", "sync_row", "train_row"]

NAME = "meta_row"
"""Of the parameter, in the embedding; no file holds it."""

_HANDLES = "_meta_row_handles"


def row_of(model: Any) -> nn.Parameter | None:
    """The row that [`train_row`] made, if it is there."""
    found: nn.Parameter | None = getattr(_table(model), NAME, None)
    return found


def train_row(model: Any, token_id: int) -> nn.Parameter:
    """
    Makes the row `token_id` of a model's input embedding a parameter of its own.

    Args:
        model ([`~transformers.PreTrainedModel`]): with or without an adapter; changed until [`release_row`].
        token_id (`int`): the row.

    Returns:
        `torch.nn.Parameter`: shape `(1, hidden)`, of the table's type, already in the model.

    Raises:
        `ValueError`: an embedding that does more than look rows up and scale them.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).requires_grad_(False)
    >>> row, table = train_row(model, 7), model.get_input_embeddings().weight
    >>> model(torch.tensor([[1, 7, 2]]), labels=torch.tensor([[1, 7, 2]])).loss.backward()
    >>> row.grad.shape, table.grad is None
    (torch.Size([1, 4]), True)
    """
    table = _table(model)
    row = getattr(table, NAME, None)
    if row is not None:
        return row
    row = nn.Parameter(table.weight[token_id : token_id + 1].detach().clone())
    with torch.no_grad():
        looked_up = table(torch.tensor([token_id], device=row.device))
        if not torch.equal(looked_up, _scaled(table, row)):
            raise ValueError(
                f"the row of the meta-token cannot be trained alone: {type(table).__name__} does not give it as it "
                "is in the table. Train the whole embedding, with requires_grad or modules_to_save"
            )
    table.register_parameter(NAME, row)
    handles = [
        table.register_forward_hook(functools.partial(_replace, token_id)),
        table.register_state_dict_pre_hook(functools.partial(_before_saving, token_id)),
        table.register_state_dict_post_hook(_after_saving),
        table.register_load_state_dict_pre_hook(functools.partial(_before_loading, token_id)),
    ]
    setattr(table, _HANDLES, (token_id, handles))
    return row


def left_out(model: Any, token_id: int) -> bool:
    """Whether an adapter trains single rows of the embedding, and this is none of them.

    Such an adapter does not call the table, so a row could not stand in for the table's.
    """
    from peft.utils import TrainableTokensWrapper

    table = model.get_input_embeddings()
    if not isinstance(table, TrainableTokensWrapper):
        return False
    return not any(token_id in rows for rows in table.token_adapter.token_indices.values())


@torch.no_grad()
def reload_row(model: Any) -> None:
    """The table's row, which something was loaded into, as the one to go on from."""
    table = _table(model)
    if hasattr(table, _HANDLES):
        getattr(table, NAME)[0] = table.weight[getattr(table, _HANDLES)[0]]


@torch.no_grad()
def sync_row(model: Any) -> None:
    """The trained row into the table."""
    table = _table(model)
    if hasattr(table, _HANDLES):
        table.weight[getattr(table, _HANDLES)[0]] = getattr(table, NAME)[0]


def release_row(model: Any) -> None:
    """Undoes [`train_row`]; the trained row stays in the table."""
    table = _table(model)
    if hasattr(table, _HANDLES):
        sync_row(model)
        for handle in getattr(table, _HANDLES)[1]:
            handle.remove()
        delattr(table, _HANDLES)
        delattr(table, NAME)


def _table(model: Any) -> Any:
    table = model.get_input_embeddings()
    # An adapter's wrapper looks rows up in the table that it wraps.
    return table.get_base_layer() if hasattr(table, "get_base_layer") else table


def _scaled(table: Any, row: Tensor) -> Tensor:
    scale = getattr(table, "embed_scale", None)  # Gemma and others
    if scale is None:
        return row
    return row * (scale.to(row.dtype) if isinstance(scale, Tensor) else scale)


def _replace(token_id: int, table: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.where((args[0] == token_id).unsqueeze(-1), _scaled(table, getattr(table, NAME)), output)


def _before_saving(token_id: int, table: Any, prefix: str, keep_vars: bool) -> None:
    with torch.no_grad():
        table.weight[token_id] = getattr(table, NAME)[0]


def _after_saving(table: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(f"{prefix}{NAME}", None)


def _before_loading(token_id: int, table: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    # A shard without the table leaves the row as it is.
    loaded = getattr(table, NAME) if weight is None else weight[token_id : token_id + 1]
    state_dict[f"{prefix}{NAME}"] = loaded.detach().clone()
