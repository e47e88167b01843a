"""The settings of meta-tokens and meta-attention, and where a model's config keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

from hf_pretrain_ext.values import check_flag, check_integers, is_number, shown

__all__ = ["KEY", "SECTION", "MetaAttentionConfig", "differences"]

SECTION = "hf_pretrain_ext"
"""Attribute of a model's config that holds what this package put into the model."""

KEY = "meta_tokens"

Rope = Literal["on", "off"]
Norm = Literal["model", "layernorm", "rmsnorm"]
Init = Literal["zero", "normal"]


@dataclass(frozen=True)
class MetaAttentionConfig:
    """
    What is put into a model.

    Args:
        token (`str`, *optional*, defaults to `"<|meta|>"`): text of the meta-token.
        token_id (`int`, *optional*): its id; [`add_meta_tokens`] finds it, [`attach_meta_attention`] needs it.
        attention (`bool`, *optional*, defaults to `True`): put meta-attention in; without it the model only has the
            token.
        rope (`str`, *optional*, defaults to `"on"`): `"on"` turns queries and keys by the model's own rotary embedding
            at the meta positions, scaling (YaRN and others) included; `"off"` leaves them. Which of the two the paper
            did is in no source found; the default is ours. Models without rotary embedding (learned positions, ALiBi)
            have nothing to rotate: there the two are the same, and meta-attention knows positions from the residual.
        num_heads (`int`, *optional*): heads of queries; as many as the model's by default.
        num_key_value_heads (`int`, *optional*): heads of keys and values; as many as the model's by default.
        head_dim (`int`, *optional*): of a head; the model's by default.
        norm (`str`, *optional*, defaults to `"model"`): in front of the sub-layer. `"layernorm"` is the paper's,
            and also what its GPT-2 has; `"model"` takes the kind of the layer's own norms (torch's `LayerNorm` or
            `RMSNorm`, weights of one).
        eps (`float`, *optional*): of the norm; the layer's own by default.
        bias (`bool`, *optional*, defaults to `False`): of the four projections (ours).
        dropout (`float`, *optional*, defaults to 0.0): share of the output dropped in training (0 in the paper). In
            models that drop the attention's output after the place where meta-attention joins it, theirs acts alone.
        init (`str`, *optional*, defaults to `"zero"`): of the output projection. `"zero"` changes no output before
            training; `"normal"` draws it like the others from N(0, `initializer_range`²), for training from scratch.
        mask_logits (`bool`, *optional*, defaults to `True`): set the meta-token's logit to a number so low that it
            takes no probability. Losses that do not call the output embedding as a module do not see the mask: TRL's
            needs [`~hf_pretrain_ext.meta_tokens.fused.masked_head`], which `MetaTokensCallback` sets.
        seed (`int`, *optional*, defaults to 0): of the initial weights.

    Raises:
        `ValueError`: for a setting that cannot be; the message names it.
    """

    token: str = field(default="<|meta|>", metadata={"help": "Text of the meta-token."})
    token_id: int | None = field(default=None, metadata={"help": "Id of the meta-token; found from its text."})
    attention: bool = field(default=True, metadata={"help": "Put meta-attention in."})
    rope: Rope = field(default="on", metadata={"help": "Rotate queries and keys as the model does: on or off."})
    num_heads: int | None = field(default=None, metadata={"help": "Heads of queries; the model's by default."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Heads of keys and values; the model's by default."}
    )
    head_dim: int | None = field(default=None, metadata={"help": "Dimensions of a head; the model's by default."})
    norm: Norm = field(default="model", metadata={"help": "Norm in front: model, layernorm or rmsnorm."})
    eps: float | None = field(default=None, metadata={"help": "Epsilon of the norm; the model's by default."})
    bias: bool = field(default=False, metadata={"help": "Biases in the projections."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the output that training drops."})
    init: Init = field(default="zero", metadata={"help": "Output projection at the start: zero or normal."})
    mask_logits: bool = field(default=True, metadata={"help": "Give the meta-token no probability."})
    seed: int = field(default=0, metadata={"help": "Of the initial weights."})

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not self.token.strip():
            raise ValueError(f"token must be a text such as '<|meta|>', got {shown(self.token)}")
        for name, kind in (("rope", Rope), ("norm", Norm), ("init", Init)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {shown(getattr(self, name))}")
        for name in ("attention", "bias", "mask_logits"):
            check_flag(name, getattr(self, name))
        check_integers(
            token_id=(self.token_id, 0, None, True),
            num_heads=(self.num_heads, 1, None, True),
            num_key_value_heads=(self.num_key_value_heads, 1, None, True),
            head_dim=(self.head_dim, 1, None, True),
            seed=(self.seed, 0, None, False),
        )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number from 0 up to but not 1, got {shown(self.dropout)}")
        if self.eps is not None and (not is_number(self.eps) or self.eps <= 0):
            raise ValueError(f"eps must be a positive number or None, got {shown(self.eps)}")


def differences(there: MetaAttentionConfig, asked: MetaAttentionConfig, names: Iterable[str]) -> str:
    """
    What a model has and what it is asked to have, of the settings `names`; empty where they agree.

    What a setting leaves to the model, and what is past once the model has its weights, agrees with all.

    Example:

    >>> differences(MetaAttentionConfig(rope="off", norm="rmsnorm"), MetaAttentionConfig(), ["rope", "norm", "eps"])
    "rope='off', not 'on'"
    """
    past = {"token_id", "init", "seed"}
    if not there.attention:
        past |= {each.name for each in fields(MetaAttentionConfig)} - {"token", "attention", "mask_logits"}
    ours, theirs = asdict(asked), asdict(there)
    differ = [
        name
        for name in dict.fromkeys(names)
        if name not in past and ours[name] not in (None, theirs[name]) and (name, ours[name]) != ("norm", "model")
    ]
    return ", ".join(f"{name}={theirs[name]!r}, not {ours[name]!r}" for name in differ)
