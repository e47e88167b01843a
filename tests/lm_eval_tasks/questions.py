"""Tasks for lm-eval that need no download."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

QUESTIONS = ["aaa", "aa", "baa", "caa", "xyz", "da", "aaaa", "bca"]
ANSWERS = [0, 1, 0, 0, 1, 0, 0, 1]


def letters(**kwargs: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_dict({"question": QUESTIONS, "answer": ANSWERS})}


def texts(**kwargs: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_dict({"text": ["aaa bbb", "abcabc", "xyz"]})}
