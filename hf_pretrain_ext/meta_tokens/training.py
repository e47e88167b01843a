"""What a model needs while its meta-tokens are trained, in a Trainer or a loop of one's own, and no longer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_args

from torch import nn

from hf_pretrain_ext.meta_tokens.adapter import load_meta_tokens, save_meta_tokens
from hf_pretrain_ext.meta_tokens.attach import add_meta_tokens, attached, required, unwrapped
from hf_pretrain_ext.meta_tokens.config import MetaAttentionConfig, differences
from hf_pretrain_ext.meta_tokens.row import left_out, release_row, reload_row, sync_row, train_row
from hf_pretrain_ext.values import shown

__all__ = ["MetaTraining", "Train", "is_adapted", "is_causal"]

Train = Literal["all", "meta"]
"""What is trained: what is trainable and the meta parts, or the meta parts alone."""


class MetaTraining:
    """
    Gives a model its meta-tokens, unless it has them, and decides what of it is trained.

    A frozen embedding stays frozen: the token's row is trained alone (see `row`), so every other row stays bit for
    bit, weight decay or not. Beside an adapter of PEFT, `save_pretrained` writes the meta parts into the same folder.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`): changed in place; before the optimizer is made.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): gets the token, if it lacks it.
        config ([`MetaAttentionConfig`]): the settings; a model that has its meta-tokens must have them with those that
            are not the defaults.
        train (`str`, *optional*, defaults to `"all"`): `"all"`: what is trainable stays so. `"meta"`: the model is
            frozen but for the token's row and meta-attention, and its adapter if it has one.

    Raises:
        `ValueError`: a model that cannot take them, or that has them with other settings.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_pretrain_ext.demo.tokenizer import train_tokenizer
    >>> sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> training = MetaTraining(model, train_tokenizer(["ab"], vocab_size=257), MetaAttentionConfig(), train="meta")
    >>> [name.rpartition("layers.0.")[2] for name, p in model.named_parameters() if p.requires_grad][:3]
    ['model.embed_tokens.meta_row', 'meta_attention.norm.weight', 'meta_attention.to_query.weight']
    >>> training.step()  # behind every step of the optimizer
    >>> training.finish()
    """

    def __init__(self, model: Any, tokenizer: Any, config: MetaAttentionConfig, train: Train = "all"):
        if train not in get_args(Train):
            raise ValueError(f"train must be one of {get_args(Train)}, got {shown(train)}")
        self.model = model
        inner, there = unwrapped(model), attached(model)
        if there is None:
            with _rows_beside_adapter(inner):
                add_meta_tokens(model, tokenizer, config)
        else:
            given = [each.name for each in fields(config) if getattr(config, each.name) != each.default]
            if other := differences(there.config, config, given):
                raise ValueError(
                    f"the model has meta-tokens with {other}. Pass these settings, or take them out with "
                    "remove_meta_tokens(model)"
                )
            if left_out(inner, there.passes.token_id):
                raise ValueError(
                    f"the adapter trains single rows of the embedding, and not that of {shown(there.config.token)}. "
                    f"Name it among them, LoraConfig(trainable_token_indices=[..., {there.passes.token_id}])"
                )
        tokens = required(model)
        modules = [site.attention for site in tokens.sites]
        meta = [parameter for module in modules for parameter in module.parameters()]
        self.handles = [module.register_load_state_dict_pre_hook(_keep_own) for module in modules]
        self.frozen: list[nn.Parameter] = []
        if train == "meta" and not is_adapted(model):
            kept = {id(parameter) for parameter in meta}
            self.frozen = [p for p in inner.parameters() if p.requires_grad and id(p) not in kept]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for parameter in meta:
            parameter.requires_grad_(True)
        if not inner.get_input_embeddings().weight.requires_grad:
            train_row(inner, tokens.passes.token_id)
        if is_adapted(model) and not isinstance(vars(model).get("save_pretrained"), functools.partial):
            model.save_pretrained = functools.partial(_save_beside, model, model.save_pretrained)

    def step(self) -> None:
        """Behind a step of the optimizer: the trained row into its table, for whoever reads or saves that."""
        sync_row(unwrapped(self.model))

    def load(self, folder: str) -> None:
        """The meta parts that lie in a folder; see [`load_meta_tokens`]."""
        load_meta_tokens(self.model, folder)
        reload_row(unwrapped(self.model))

    def finish(self) -> None:
        """Leaves the model as it came, but for what was put in: nothing frozen, the trained row in its table."""
        release_row(unwrapped(self.model))
        for handle in self.handles:
            handle.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.handles, self.frozen = [], []


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter of PEFT around it."""
    return hasattr(model, "peft_config")


def is_causal(model: Any) -> bool:
    """Whether a model is a decoder that predicts the next token, by its class or its loss."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model.config
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    # A class of the user's own is as good as its loss.
    return (isinstance(model, known) or getattr(model, "loss_type", None) == "ForCausalLM") and not getattr(
        config, "is_encoder_decoder", False
    )


@contextmanager
def _rows_beside_adapter(model: Any) -> Iterator[None]:
    """Inside, a model with an adapter can be given rows.

    `fit_embeddings` refuses, because nothing would train or save them. Here both is done.
    """
    adapter = vars(model).pop("peft_config", None)
    try:
        yield
    finally:
        if adapter is not None:
            model.peft_config = adapter


def _keep_own(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before weights are loaded: a file of the plain model leaves meta-attention as it is.

    The weights of some families are loaded once more on resume, by way of a plain model of their class.
    """
    for name, parameter in module.named_parameters():
        state_dict.setdefault(f"{prefix}{name}", parameter.detach())


def _save_beside(model: Any, save: Callable[..., Any], save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The adapter, and beside it what it does not hold: the token's row and meta-attention."""
    saved = save(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and attached(model) is not None:
        sync_row(unwrapped(model))
        save_meta_tokens(model, save_directory)
    return saved
