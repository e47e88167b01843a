"""Conditional training: a control token before each document or segment, chosen by its score (arXiv 2302.08582)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from hf_pretrain_ext.metadata.layout import NONE
from hf_pretrain_ext.metadata.template import MissingMetadata, read_saved
from hf_pretrain_ext.plan.counter import derive_key, random_words
from hf_pretrain_ext.values import check_flag, is_number, shown
from hf_pretrain_ext.vocabulary import add_tokens, checked_tokens

__all__ = ["ControlTokens", "assemble", "drop_key", "texts_of"]

FILE = "control_tokens.json"
"""Beside a model: the control tokens that it was trained with."""

SECTION = "control_tokens"
"""The same in a model's config."""

MissingScore = Literal["plain", "error"]

Splitter = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class ControlTokens:
    """
    Which control token stands before which text (conditional training of Pretraining with Human Preferences).

    A text of score s gets the first token if s ≤ `thresholds[0]`, the second if s ≤ `thresholds[1]`, and so on; the
    last if s is above all of them. Control tokens bear no loss, unless `loss` says so, and a piece of a document that
    goes on in another block repeats the token of its segment. Text that spells a token's name stays text.

    Args:
        thresholds (`float` or `Sequence[float]`): rising. Published with two tokens: 5.6e-4 for toxicity, 0 for
            personal data and for violations of PEP 8.
        tokens (`Sequence[str]`, *optional*, defaults to `("<|good|>", "<|bad|>")`): one more than thresholds. Those
            that the tokenizer does not have are added to it as special tokens when data is prepared.
        column (`str`, *optional*, defaults to `"score"`): of scores, `"meta.score"` for a nested one: a number for a
            document, or a list with one for each segment.
        segments (`str` or `Callable`, *optional*): what a token stands before: the whole document if None; else each
            of its segments (published: sentences), from the column of that name, whose lists of texts joined are the
            document, or as a function splits the text, which loses nothing.
        drop (`float`, *optional*, defaults to `0.01`): share of control tokens, in [0, 1), that are left out, by key
            (published: .01; .1 for PEP 8).
        missing (`str`, *optional*, defaults to `"plain"`): for a score that is None or NaN: `"plain"` leaves the token
            out, `"error"` raises.
        loss (`bool`, *optional*, defaults to `False`): whether a loss is asked of control tokens.

    Raises:
        `ValueError`: settings that do not fit each other.

    Example:

    >>> control = ControlTokens(0.5, ["<|short|>", "<|long|>"], column="length")
    >>> control.choose([0.5, 0.6, None]).tolist()
    [0, 1, -1]
    """

    thresholds: float | Sequence[float]
    tokens: Sequence[str] = ("<|good|>", "<|bad|>")
    column: str = "score"
    segments: str | Splitter | None = None
    drop: float = 0.01
    missing: MissingScore = "plain"
    loss: bool = False

    def __post_init__(self) -> None:
        given: Any = [self.thresholds] if is_number(self.thresholds) else self.thresholds
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"thresholds must be a number or a list of them, got {shown(self.thresholds)}")
        if not all(map(is_number, given)) or not all(low < high for low, high in pairwise(given)):
            raise ValueError(f"thresholds must be finite numbers, each above the one before, got {shown(given)}")
        tokens = checked_tokens(self.tokens)
        if len(tokens) != len(given) + 1:
            raise ValueError(
                f"tokens must be one more than thresholds: {len(given) + 1} for {shown(list(given))}, got "
                f"{shown(tokens)}"
            )
        if not isinstance(self.column, str) or not self.column:
            raise ValueError(f"column must be the name of a column of scores, got {shown(self.column)}")
        if (
            self.segments is not None
            and not callable(self.segments)
            and not (isinstance(self.segments, str) and self.segments)
        ):
            raise ValueError(
                f"segments must be the name of a column, a function that splits texts, or None, got "
                f"{shown(self.segments)}"
            )
        if not is_number(self.drop) or not 0 <= self.drop < 1:
            raise ValueError(
                "drop of ControlTokens must be the share of control tokens that are left out, at least 0 and below 1, "
                f"got {shown(self.drop)}"
            )
        if self.missing not in get_args(MissingScore):
            raise ValueError(
                f"missing of ControlTokens must be one of {get_args(MissingScore)}, got {shown(self.missing)}"
            )
        check_flag("loss", self.loss)
        object.__setattr__(self, "thresholds", tuple(float(value) for value in given))
        object.__setattr__(self, "tokens", tuple(tokens))

    @property
    def roots(self) -> list[str]:
        """The columns of the dataset that scores and segments come from."""
        own = [self.segments] if isinstance(self.segments, str) else []
        return list(dict.fromkeys([self.column.split(".")[0], *own]))

    def add_to(self, tokenizer: Any) -> list[int]:
        """The ids of the tokens, which `tokenizer` has from now on.

        Raises:
            `ValueError`: a token that is ordinary text to the tokenizer, or has another role there.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        roles = {str(token): role for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        chat = str(getattr(tokenizer, "chat_template", None) or "")
        for token in self.tokens:
            if (role := roles.get(token, "part of the chat template" if token in chat else None)) is not None:
                raise ValueError(
                    f"tokens has {token!r}, which the tokenizer has as its {role}. Choose names of their own, such as "
                    "'<|good|>'"
                )
        return add_tokens(tokenizer, self.tokens)

    def choose(self, scores: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.int64]:
        """The number of the token for each score; NONE where it is missing."""
        values = np.array(scores, dtype=np.float64)
        chosen = np.searchsorted(np.array(self.thresholds), values, side="left")
        return np.where(np.isnan(values), NONE, chosen)

    def split(self, row: Mapping[str, Any], text_column: str, which: str) -> list[str]:
        """The texts of a row that each have a score."""
        if isinstance(self.segments, str):
            return texts_of(row[self.segments], self.segments, which)
        text = row[text_column] or ""
        if self.segments is None:
            return [text]
        parts = list(self.segments(text))
        if any(not isinstance(part, str) for part in parts) or "".join(parts) != text:
            raise ValueError(
                f"segments split {which} into {shown(parts)}, which joined are not its text {shown(text)}. Let the "
                "function keep white space and separators with the segments"
            )
        return parts

    def scores(self, row: Mapping[str, Any], segments: int, which: str) -> list[float]:
        """A score for each of the row's segments, NaN where it is missing.

        Raises:
            `ValueError`: something else than numbers, or another number of them.
            `MissingMetadata`: a score is missing, and `missing="error"`.
        """
        value: Any = row
        for key in self.column.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, list | tuple | np.ndarray):
            if self.segments is None:
                raise ValueError(
                    f"column {self.column!r} of {which} holds {len(value):,} scores for one document. Say what they "
                    "are scores of, in segments"
                )
            if len(value) != segments:
                raise ValueError(
                    f"column {self.column!r} of {which} holds {len(value):,} scores for {segments:,} segments. Score "
                    "the segments that the document is split into"
                )
            found = [_number(item, self.column, which) for item in value]
        else:
            found = [_number(value, self.column, which)] * segments
        if self.missing == "error" and any(map(math.isnan, found)):
            raise MissingMetadata(
                f"{which} has no score (column {self.column!r}). Fill it in, or pass missing='plain' to ControlTokens"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types; a function only by name: it is not needed at inference."""
        made = self.segments
        return {
            "thresholds": list(cast(Sequence[float], self.thresholds)),
            "tokens": list(self.tokens),
            "column": self.column,
            "segments": f"function {getattr(made, '__qualname__', made)}" if callable(made) else made,
            "drop": float(self.drop),
            "missing": self.missing,
            "loss": self.loss,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> ControlTokens:
        """What [`to_json`](ControlTokens.to_json) gave; a function of the user's is left out."""
        segments = saved["segments"]
        return cls(**{**saved, "segments": None if str(segments).startswith("function ") else segments})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the settings into `folder`, beside a model."""
        Path(folder, FILE).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ControlTokens:
        """The control tokens that the model in `folder` was trained with, from their file or from the model's config.

        Raises:
            `ValueError`: there are none, or they cannot be read.
        """
        return cast(ControlTokens, read_saved(folder, FILE, SECTION, "control tokens", cls.from_json))

    def drops(self, key: int, counters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the tokens numbered `counters` are left out."""
        words = random_words(key, counters) >> np.uint64(11)
        return words.astype(np.float64) < self.drop * 2**53


def drop_key(seed: int) -> int:
    return derive_key(seed, "control drop")


def _number(value: Any, column: str, which: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"column {column!r} of {which} holds {shown(value)}, and a score is a number")
    return float(value)


def texts_of(value: Any, column: str, which: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str) or not all(isinstance(part, str | None) for part in value):
        raise ValueError(f"column {column!r} of {which} holds {shown(value)}, and segments are a list of texts")
    return [part or "" for part in value]


def assemble(
    parts: Sequence[list[int]], chosen: Sequence[int], ids: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Segments behind their control tokens as one body, where each starts, and its token; empty ones are left out.

    Example:

    >>> assemble([[5, 6], [], [7]], [1, 0, NONE], ids=[90, 91])
    ([91, 5, 6, 7], [0, 3], [1, -1])
    """
    body: list[int] = []
    starts, tokens = [], []
    for part, token in zip(parts, chosen, strict=True):
        if part:
            starts.append(len(body))
            tokens.append(int(token))
            body += part if token == NONE else [ids[token], *part]
    return body, starts, tokens
