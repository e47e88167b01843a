"""What stands in a template: values made of metadata columns, as one short line of plain text each."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["EXTRACTORS", "clean", "domain", "hashed", "registered_domain", "url", "url_suffix"]

MAX_CHARACTERS = 256
"""Of a value: a DNS name has at most 253."""

# Without the slashes `example.org:80/x` would have a scheme, but `https:/a.org` has no host `https`.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*:)?//|https?:", re.IGNORECASE)


def clean(value: Any, max_characters: int = MAX_CHARACTERS) -> str:
    """`value` as one line: runs of white space become a space, control and format characters go, the rest is cut off.

    Line breaks separate a template from the document, and right-to-left marks turn what follows around: neither can
    come out of a column. What looks like a control token (`<|endoftext|>`) stays text; it is tokenized as text.

    Example:

    >>> clean("a\\n\\nURL: b\\u202e.org  ")
    'a URL: b.org'
    """
    # Cut first: a value may be as long as a document. Marks that go leave room for what stands behind them.
    text = str(value)[: 16 * max_characters]
    # Then marks, or two spaces around one would stay two. White space like a line break is a control character.
    text = "".join(sign for sign in text if sign.isspace() or unicodedata.category(sign)[0] != "C")
    return " ".join(text.split())[:max_characters].strip()


def _host(address: str) -> str | None:
    """The host of an address in lower case and ASCII, without user, port and a final dot; None if there is none."""
    address = address.strip()
    if not _SCHEME.match(address):
        address = "//" + address
    try:
        host = urlsplit(address).hostname
    except ValueError:
        return None
    host = unquote(host or "").rstrip(".").lower()
    if not host or re.search(r"[\s/@\\]", host):
        return None
    if host.isascii():
        return host
    import idna

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except idna.IDNAError:
        return None


def domain(address: Any) -> str | None:
    """The absolute domain of an address, as MeCo conditions on: its host, `www.` and all (arXiv 2501.01956).

    Args:
        address (`str`): a URL, its scheme present or not. Names beyond ASCII become their IDNA form.

    Returns:
        `str`, or None for what has no host.

    Example:

    >>> domain("https://user@EN.wikipedia.org:443/wiki/Meco"), domain("bücher.example/a"), domain("")
    ('en.wikipedia.org', 'xn--bcher-kva.example', None)
    """
    return _host(str(address)) if address is not None else None


@functools.cache
def _public_suffixes() -> Any:
    try:
        from publicsuffixlist import PublicSuffixList
    except ImportError as error:
        raise ImportError(
            "registered_domain and url_suffix need the list of public suffixes: pip install "
            "'hf-pretrain-ext[metadata]', or take the extractor 'domain'"
        ) from error
    return PublicSuffixList()


def _has_suffix(host: str | None) -> bool:
    """Whether a host is a name: IP addresses have no suffix."""
    return host is not None and not re.fullmatch(r"[\d.]+|.*:.*", host)


def registered_domain(address: Any) -> str | None:
    """The part of the host that somebody registered, by the list of public suffixes; the host of a bare IP address.

    Example:

    >>> registered_domain("https://news.bbc.co.uk/1/hi")
    'bbc.co.uk'
    """
    host = domain(address)
    return (_public_suffixes().privatesuffix(host) or host) if _has_suffix(host) else host


def url_suffix(address: Any) -> str | None:
    """The public suffix of the host (`org`, `co.uk`): the "URL suffix" of MeCo's ablations.

    Example:

    >>> url_suffix("news.bbc.co.uk")
    'co.uk'
    """
    host = domain(address)
    return _public_suffixes().publicsuffix(host) if _has_suffix(host) else None


def hashed(address: Any) -> str | None:
    """The domain as 16 hexadecimal digits (BLAKE2b): MeCo's "hashed URL", which tells sources apart without a name.

    Example:

    >>> hashed("https://en.wikipedia.org/wiki/A") == hashed("en.wikipedia.org")
    True
    """
    host = domain(address)
    return None if host is None else hashlib.blake2b(host.encode(), digest_size=8).hexdigest()


def url(address: Any) -> str | None:
    """The whole address without its scheme and without a user's name and password: MeCo's "full URL".

    Example:

    >>> url("https://en.wikipedia.org/wiki/A?b=c"), url("https://user:secret@a.org/x@y"), url("a.org?to=b@c.org")
    ('en.wikipedia.org/wiki/A?b=c', 'a.org/x@y', 'a.org?to=b@c.org')
    """
    if address is None:
        return None
    text = re.sub(r"^([a-z][a-z0-9+.-]*:)?//", "", str(address).strip(), flags=re.IGNORECASE)
    return re.sub(r"^[^/?#]*@", "", text) or None


EXTRACTORS: dict[str, Callable[[Any], str | None]] = {
    "domain": domain,
    "registered_domain": registered_domain,
    "url_suffix": url_suffix,
    "hashed_url": hashed,
    "url": url,
}
"""By the name of a template's field, of a column `url`."""
