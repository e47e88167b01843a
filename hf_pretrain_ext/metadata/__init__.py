"""Metadata conditioning (MeCo): documents with a line of metadata in front, which bears no loss.

template      the line, made of columns of a row
extract       values for it out of a column: domains, suffixes, hashes
documents     raw documents to blocks, with metadata or without, and to both over disjoint documents
inference     a prompt with the line that the model was trained with
"""

from hf_pretrain_ext.metadata.documents import MetadataReport, Views, prepare, prepare_views
from hf_pretrain_ext.metadata.extract import EXTRACTORS
from hf_pretrain_ext.metadata.inference import condition, generate
from hf_pretrain_ext.metadata.stream import BlockStream
from hf_pretrain_ext.metadata.template import MissingMetadata, Template

__all__ = [
    "EXTRACTORS",
    "BlockStream",
    "MetadataReport",
    "MissingMetadata",
    "Template",
    "Views",
    "condition",
    "generate",
    "prepare",
    "prepare_views",
]
