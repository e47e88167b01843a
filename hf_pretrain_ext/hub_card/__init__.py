"""The continued-pretraining section of a model's card, from what the run recorded.

facts       what trace.jsonl and stages.json say, in one place
metadata    the card's YAML: base model and relation, data sets, tags, results; and a check of it that needs no network
writing     the section between its markers, in a README that may be there already
"""

from hf_pretrain_ext.hub_card.facts import CardFacts, read_facts
from hf_pretrain_ext.hub_card.metadata import check_metadata
from hf_pretrain_ext.hub_card.writing import BEGIN, END, write_card

__all__ = ["BEGIN", "END", "CardFacts", "check_metadata", "read_facts", "write_card"]
