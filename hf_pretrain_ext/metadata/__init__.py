"""Texts behind what is known of them: a line of metadata (MeCo), or a control token by score (conditional training).

template      the line, made of columns of a row
extract       values for it out of a column: domains, suffixes, hashes
control       control tokens, chosen by a score, before documents or segments
marking       control tokens put into the documents of a dataset
source        raw documents to tokens
layout        which piece of a document goes into which block
blocks        tokens to blocks
documents     raw documents to blocks, conditioned or plain, and to both over disjoint documents
stream        the same blocks of a stream
inference     a prompt behind what the model was trained with
"""

from hf_pretrain_ext.metadata.control import ControlTokens
from hf_pretrain_ext.metadata.documents import MetadataReport, Views, prepare, prepare_views
from hf_pretrain_ext.metadata.extract import EXTRACTORS
from hf_pretrain_ext.metadata.inference import condition, generate
from hf_pretrain_ext.metadata.stream import BlockStream
from hf_pretrain_ext.metadata.template import MissingMetadata, Template

__all__ = [
    "EXTRACTORS",
    "BlockStream",
    "ControlTokens",
    "MetadataReport",
    "MissingMetadata",
    "Template",
    "Views",
    "condition",
    "generate",
    "prepare",
    "prepare_views",
]
