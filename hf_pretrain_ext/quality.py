"""Choosing a subset by quality: documents are scored, and the best are kept until there are tokens enough.

A scorer is anything that gives a number for each of a list of texts, low for good ones: `scorer(texts) -> scores`.
Guo et al. (2024) take the perplexity under a KenLM model of a reference corpus; `KenLMScorer` does that,
`PerplexityScorer` the same with a small model of transformers, and `column_scores` takes scores that the data holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_pretrain_ext.data import is_map_style
from hf_pretrain_ext.values import check_integers, is_number, reason, shown

__all__ = ["KenLMScorer", "PerplexityScorer", "Scorer", "column_scores", "score_texts", "select_best"]

Scorer = Callable[[Sequence[str]], Sequence[float]]
"""Texts to scores, one each, the lower the better; NaN for those that cannot be scored."""


class PerplexityScorer:
    """
    Mean negative log-likelihood of a text's tokens, in nats, under a causal language model of a reference corpus.

    Args:
        model: a causal language model of transformers, trained on texts of the quality that is wanted.
        tokenizer: its tokenizer.
        max_tokens (`int`, *optional*, defaults to 512): of each text, its first; at most the model's positions.
        batch_size (`int`, *optional*, defaults to 16): texts a forward pass. In another batch a score may differ in
            its last digits, so keep it for equal selections.

    Raises:
        `ValueError`: a setting out of range, or a model without logits.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int = 512, batch_size: int = 16):
        check_integers(max_tokens=(max_tokens, 2, 1 << 20, False), batch_size=(batch_size, 1, 1 << 16, False))
        config = getattr(model, "config", None)
        kinds = getattr(config, "architectures", None) or [type(model).__name__]
        if getattr(config, "is_encoder_decoder", False) or any("MaskedLM" in kind for kind in kinds):
            raise ValueError(
                f"model must be a causal language model, got {type(model).__name__}: it does not predict a token from "
                "those before it alone"
            )
        self.model, self.tokenizer = model, tokenizer
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.max_tokens = min(max_tokens, positions) if isinstance(positions, int) and positions > 1 else max_tokens
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_tokens] for text in texts]
        scores = [math.nan] * len(texts)
        # Of like lengths together: less padding. A text of one token has nothing that was predicted.
        order = sorted((n for n, row in enumerate(ids) if len(row) > 1), key=lambda n: (len(ids[n]), n))
        training = self.model.training
        self.model.eval()
        try:
            for at in range(0, len(order), self.batch_size):
                places = order[at : at + self.batch_size]
                for place, score in zip(places, self._scores([ids[place] for place in places]), strict=True):
                    scores[place] = score
        finally:
            self.model.train(training)
        return scores

    def _scores(self, rows: list[list[int]]) -> list[float]:
        device = next(self.model.parameters()).device
        width = max(map(len, rows))
        padded = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        outputs = self.model(input_ids=padded.to(device), attention_mask=mask.to(device))
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            raise ValueError("model must be a causal language model: its outputs hold no logits for every position")
        told = logits[:, :-1].float().log_softmax(dim=-1)
        picked = told.gather(-1, padded[:, 1:, None].to(device))[..., 0].double().cpu() * mask[:, 1:]
        return (-picked.sum(dim=1) / mask[:, 1:].sum(dim=1)).tolist()


class KenLMScorer:
    """
    Perplexity under a KenLM model (`.arpa` or `.binary`), as Guo et al. choose their subset. Needs the package kenlm
    (`pip install 'hf-pretrain-ext[kenlm]'`), which reads models of order 2 and higher.

    Args:
        path (`str`): the model's file.

    Raises:
        `ImportError`: kenlm is not installed. `ValueError`: the file cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str]):
        if importlib.util.find_spec("kenlm") is None:
            raise ImportError(
                "KenLMScorer needs the package kenlm: pip install 'hf-pretrain-ext[kenlm]', or use PerplexityScorer"
            )
        kenlm = importlib.import_module("kenlm")
        try:
            self.model = kenlm.Model(os.fspath(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"path={shown(os.fspath(path))} is no model of KenLM ({reason(error, 200)})") from error

    def __call__(self, texts: Sequence[str]) -> list[float]:
        # KenLM reads a sentence at a time, and takes a line's end for a space.
        return [self.model.perplexity(" ".join(text.split())) if text.strip() else math.nan for text in texts]


def column_scores(dataset: Any, column: str, *, highest: bool = False) -> NDArray[np.float64]:
    """
    The scores that a column of `dataset` holds, low for good rows.

    Args:
        dataset (`datasets.Dataset`): or another with columns by name.
        column (`str`): of numbers; None counts as no score.
        highest (`bool`, *optional*, defaults to `False`): whether high numbers are good ones.

    Raises:
        `ValueError`: no such column, or one that holds no numbers.

    Example:

    >>> from datasets import Dataset
    >>> column_scores(Dataset.from_dict({"edu": [1.5, 4.0]}), "edu", highest=True).tolist()
    [-1.5, -4.0]
    """
    names = list(getattr(dataset, "column_names", None) or ())
    if column not in names:
        raise ValueError(f"column must be one of {names}, got {shown(column)}")
    # As Python's numbers, whatever the dataset is formatted as.
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    values = [math.nan if value is None else value for value in plain[column][:]]
    wrong = next((value for value in values if not _is_score(value)), None)
    if wrong is not None:
        raise ValueError(f"column {column!r} must hold numbers, got {shown(wrong)}")
    found = np.asarray(values, dtype=np.float64)
    return -found if highest else found


def _is_score(value: Any) -> bool:
    return isinstance(value, float | np.floating | np.integer) or is_number(value)


def score_texts(dataset: Any, scorer: Scorer, *, column: str = "text", batch_size: int = 1024) -> NDArray[np.float64]:
    """
    The score of every row's text.

    Args:
        dataset: map-style, with rows that are dicts.
        scorer (`Callable`): texts to scores, the lower the better.
        column (`str`, *optional*, defaults to `"text"`): of the texts.
        batch_size (`int`, *optional*, defaults to 1024): texts that the scorer is given at a time.

    Raises:
        `ValueError`: rows without texts, or a scorer that gives something else than a number for each.

    Example:

    >>> score_texts([{"text": "aa"}, {"text": "a"}], lambda texts: [len(text) for text in texts]).tolist()
    [2.0, 1.0]
    """
    if not is_map_style(dataset):
        raise ValueError(f"dataset must have rows by number, and at least one, got {type(dataset).__name__}")
    check_integers(batch_size=(batch_size, 1, 1 << 30, False))
    parts = []
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[number] for number in range(start, min(start + batch_size, len(dataset)))]
        texts = [row.get(column) if isinstance(row, dict) else None for row in rows]
        for number, text in enumerate(texts, start):
            if not isinstance(text, str):
                raise ValueError(
                    f"row {number} holds no text in the column {column!r}, but {shown(rows[number - start])}"
                )
        given: Any = scorer(texts)  # type: ignore[arg-type]  # all are texts
        scores = given.tolist() if hasattr(given, "tolist") else list(given)
        if not isinstance(scores, list) or len(scores) != len(texts) or not all(map(_is_score, scores)):
            raise ValueError(f"scorer must give one number for each of {len(texts)} texts, got {shown(scores)}")
        parts.append(np.asarray(scores, dtype=np.float64))
    return np.concatenate(parts)


def select_best(
    scores: Sequence[float] | NDArray[np.floating],
    *,
    share: float | None = None,
    tokens: float | None = None,
    lengths: Sequence[int] | NDArray[np.integer] | None = None,
) -> list[int]:
    """
    The rows of the lowest scores, in rising order of their numbers; of equal scores the earlier row.

    Args:
        scores (`Sequence[float]`): one a row, the lower the better; rows of NaN or infinite scores are never chosen.
        share (`float`, *optional*): of the rows, or of their tokens where `lengths` are given.
        tokens (`float`, *optional*): choose until there are as many; needs `lengths`. Exactly one of the two.
        lengths (`Sequence[int]`, *optional*): tokens of each row.

    Raises:
        `ValueError`: arguments that do not fit together, or nothing to choose.

    Example:

    >>> select_best([3.0, 1.0, 2.0, 1.0], share=0.5)
    [1, 3]
    >>> select_best([3.0, 1.0, 2.0, 1.0], tokens=25, lengths=[10, 10, 10, 10])
    [1, 2, 3]
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"scores must hold a number for each row, got {shown(scores)}")
    if (share is None) == (tokens is None):
        raise ValueError(f"give share or tokens, one of the two, got share={shown(share)}, tokens={shown(tokens)}")
    if share is not None and (not is_number(share) or not 0 < share <= 1):
        raise ValueError(f"share must be above 0 and at most 1, got {shown(share)}")
    if tokens is not None and (not is_number(tokens) or tokens <= 0):
        raise ValueError(f"tokens must be a number above 0, got {shown(tokens)}")
    if lengths is None and tokens is not None:
        raise ValueError("tokens needs lengths, the tokens of each row")
    sizes = np.ones(len(found), dtype=np.int64) if lengths is None else np.asarray(lengths, dtype=np.int64)
    if sizes.shape != found.shape or (sizes < 0).any():
        raise ValueError(f"lengths must hold the tokens of each of the {len(found)} rows, got {shown(lengths)}")
    usable = np.flatnonzero(np.isfinite(found))
    if not len(usable):
        raise ValueError("no row has a score: all are NaN or infinite")
    order = usable[np.argsort(found[usable], kind="stable")]
    # As it is written: 0.07 of 100 rows are 7, and their float product is above that.
    wanted = Fraction(repr(float(share or 0))) * int(sizes.sum()) if tokens is None else Fraction(tokens)
    before = np.cumsum(sizes[order]) - sizes[order]
    # Whole numbers are below it where they are below the next whole number.
    return np.sort(order[before < math.ceil(wanted)]).tolist()
