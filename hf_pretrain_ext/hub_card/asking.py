"""What the Hub says of data sets and base that a card names: licences, and whether access has to be asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_pretrain_ext.say import say
from hf_pretrain_ext.values import reason

__all__ = ["HubAnswer", "ask_the_hub"]


@dataclass(frozen=True)
class HubAnswer:
    """`gated` is "auto" or "manual", as the Hub names how access is granted; None where access is open."""

    gated: str | None = None
    licence: str | None = None


def ask_the_hub(
    datasets: Iterable[str], models: Iterable[str] = (), *, timeout: float = 10.0, token: str | None = None
) -> dict[str, HubAnswer | None]:
    """
    Looks up repositories on the Hub, one request each.

    Args:
        datasets (`Iterable[str]`): names of data sets.
        models (`Iterable[str]`, *optional*): names of models.
        timeout (`float`, *optional*, defaults to 10): seconds a request may take.
        token (`str`, *optional*): of the Hub; by default the one that is logged in.

    Returns:
        `dict[str, HubAnswer | None]`: by name; None for one that the Hub did not tell of. Empty if the Hub is off
        (`HF_HUB_OFFLINE`).

    Example:

    >>> ask_the_hub([])
    {}
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return {}
    api = HfApi(token=token)
    wanted = [(api.dataset_info, name) for name in datasets] + [(api.model_info, name) for name in models]
    return {name: _asked(ask, name, timeout) for ask, name in wanted}


def _asked(ask: Any, name: str, timeout: float) -> HubAnswer | None:
    try:
        told = ask(name, timeout=timeout, expand=["cardData", "gated"])
    except Exception as error:  # whatever the Hub's client raises: a card does not fail for what it could not look up
        say(f"the Hub tells nothing of {name} for the card ({reason(error, 200)})", logging.WARNING)
        return None
    return HubAnswer(gated=told.gated or None, licence=licence_text(getattr(told.card_data, "license", None)))


def licence_text(value: Any) -> str | None:
    """One licence or several, as cards state them.

    Example:

    >>> licence_text("mit"), licence_text(["mit", "cc-by-4.0"]), licence_text([])
    ('mit', 'mit, cc-by-4.0', None)
    """
    names = value if isinstance(value, list) else [value]
    return ", ".join(name for name in names if isinstance(name, str) and name) or None
