"""Learned meta-tokens with meta-attention, for any decoder (arXiv 2509.16278).

insertion     where meta-tokens go in a sample, and putting them there
batches       the same for collated batches
rows          the same for a dataset
boundaries    tokens that end a sentence or a line
config        the settings of what is put into a model
probe         one forward pass that is listened to
places        where in a layer meta-attention joins, read off one forward pass
attention     the sub-layer, on gathered meta positions
layers        a decoder layer with it, and what happens at each forward pass
memory        its keys and values in generation
attach        put into a model, and taken out
training      what a model needs while it is trained
row           the token's row trained alone
fused         the masked logit for losses that never call the head
adapter       saved beside a model, and loaded
inference     prompts with meta-tokens in them
diagnostics   attention to meta-tokens, entropy with and without them
"""

from hf_pretrain_ext.meta_tokens.adapter import (
    load_meta_tokens,
    meta_parameters,
    meta_state,
    remove_meta_tokens,
    save_meta_tokens,
)
from hf_pretrain_ext.meta_tokens.attach import (
    MetaTokens,
    add_meta_tokens,
    allow_meta_tokens,
    attach_meta_attention,
    attached,
    detach_meta_attention,
)
from hf_pretrain_ext.meta_tokens.attention import MetaAttention
from hf_pretrain_ext.meta_tokens.config import MetaAttentionConfig
from hf_pretrain_ext.meta_tokens.diagnostics import (
    AttentionFigures,
    EntropyFigures,
    attention_figures,
    entropy_figures,
    plot_diagnostics,
    zeroed_positions,
)
from hf_pretrain_ext.meta_tokens.inference import generate, insert_in_prompts, meta_prompt_ids
from hf_pretrain_ext.meta_tokens.insertion import draw_positions, insert
from hf_pretrain_ext.meta_tokens.places import HINTS, Hint
from hf_pretrain_ext.meta_tokens.rows import with_meta_tokens
from hf_pretrain_ext.meta_tokens.training import MetaTraining

__all__ = [
    "HINTS",
    "AttentionFigures",
    "EntropyFigures",
    "Hint",
    "MetaAttention",
    "MetaAttentionConfig",
    "MetaTokens",
    "MetaTraining",
    "add_meta_tokens",
    "allow_meta_tokens",
    "attach_meta_attention",
    "attached",
    "attention_figures",
    "detach_meta_attention",
    "draw_positions",
    "entropy_figures",
    "generate",
    "insert",
    "insert_in_prompts",
    "load_meta_tokens",
    "meta_parameters",
    "meta_prompt_ids",
    "meta_state",
    "plot_diagnostics",
    "remove_meta_tokens",
    "save_meta_tokens",
    "with_meta_tokens",
    "zeroed_positions",
]
