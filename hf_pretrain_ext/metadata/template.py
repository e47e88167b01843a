"""A template: the line of metadata before a document, from named columns of its row."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from hf_pretrain_ext.metadata.extract import EXTRACTORS, MAX_CHARACTERS, clean
from hf_pretrain_ext.values import reason, shown

__all__ = ["FILE", "MISSING", "Missing", "MissingMetadata", "Template", "read_saved"]

MISSING = "unknown"
"""Stands for a value that is not there, unless another text is given."""

FILE = "metadata_template.json"
"""Beside a model: the template that it was trained with."""

SECTION = "metadata_template"
"""The same in a model's config."""

Missing = Literal["constant", "plain", "error"]


class MissingMetadata(ValueError):
    """A row has no value for a field of the template, and `missing="error"`."""


@dataclass(frozen=True)
class Template:
    """How metadata becomes text.

    Args:
        text (`str`, *optional*, defaults to `"URL: {domain}\\n\\n"`): with fields in braces (MeCo).
        columns (`dict`, *optional*): where a field comes from: a column (`"meta.url"` for a nested one, or one that
            is called so), or a pair of a column and what makes the value of it: a function, or the name of an
            extractor (`"domain"`, `"registered_domain"`, `"url_suffix"`, `"hashed_url"`, `"url"`). By default a field
            that is named like an extractor takes the column `url` through it, any other the column of its name. A
            `ClassLabel` is its number; its name is `("topic", dataset.features["topic"].int2str)`.
        missing (`str`, *optional*, defaults to `"constant"`): for a row without a value (no such key, None, empty, or
            an extractor that finds none): `"constant"` writes `constant`, `"plain"` leaves the whole metadata out,
            `"error"` raises.
        constant (`str`, *optional*, defaults to `"unknown"`).
        max_characters (`int`, *optional*, defaults to 256): of one value; the rest is cut off.

    Raises:
        `ValueError`: for a template without fields, columns of fields that it does not have, and the like.

    Example:

    >>> template = Template("URL: {domain}\\n\\n")
    >>> template.render({"url": "https://en.wikipedia.org/wiki/A"})
    'URL: en.wikipedia.org\\n\\n'
    >>> Template("{topic}, {meta.year}: ", missing="plain").render({"topic": "law", "meta": {"year": None}}) is None
    True
    """

    text: str = "URL: {domain}\n\n"
    columns: Mapping[str, Any] = field(default_factory=dict)
    missing: Missing = "constant"
    constant: str = MISSING
    max_characters: int = MAX_CHARACTERS
    _parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)
    _sources: dict[str, tuple[tuple[str, ...], Callable[[Any], Any] | None]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ValueError(f"template must be a string, got {shown(self.text)}")
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(
                f"template {shown(self.text)}: {error}. Write a brace that is meant as {{{{ or }}}}"
            ) from None
        for _, name, form, conversion in parsed:
            if name is not None and (not name.strip() or form or conversion or "[" in name):
                raise ValueError(
                    f"template {shown(self.text)}: a field is a name in braces, such as {{domain}}, got "
                    f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
                )
        fields = list(dict.fromkeys(name for _, name, _, _ in parsed if name is not None))
        if not fields:
            raise ValueError(f"template {shown(self.text)} has no field in braces, such as {{domain}}")
        if self.missing not in get_args(Missing):
            raise ValueError(f"missing must be one of {get_args(Missing)}, got {shown(self.missing)}")
        if not isinstance(self.constant, str) or clean(self.constant) != self.constant or not self.constant:
            raise ValueError(f"constant must be a short line of text, got {shown(self.constant)}")
        if (
            isinstance(self.max_characters, bool)
            or not isinstance(self.max_characters, int)
            or self.max_characters < 1
        ):
            raise ValueError(f"max_characters must be an integer of at least 1, got {shown(self.max_characters)}")
        if not isinstance(self.columns, Mapping):
            raise ValueError(f"columns must be a dict of fields, got {shown(self.columns)}")
        if unknown := sorted(set(self.columns) - set(fields)):
            raise ValueError(f"columns has {unknown}, but the fields of the template are {fields}")
        object.__setattr__(self, "_parts", tuple((literal, name) for literal, name, _, _ in parsed))
        object.__setattr__(self, "_sources", {name: self._source(name) for name in fields})

    def _source(self, name: str) -> tuple[tuple[str, ...], Callable[[Any], Any] | None]:
        """Path of the column that a field comes from, and what makes its value."""
        given = self.columns.get(name)
        if given is None:
            return (("url",), EXTRACTORS[name]) if name in EXTRACTORS else (tuple(name.split(".")), None)
        column, made = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, None)
        if isinstance(made, str):
            if made not in EXTRACTORS:
                raise ValueError(f"columns[{name!r}]: the extractors are {sorted(EXTRACTORS)}, got {shown(made)}")
            made = EXTRACTORS[made]
        if not isinstance(column, str) or not column or not (made is None or callable(made)):
            raise ValueError(
                f"columns[{name!r}] must be a column, or a pair of a column and an extractor, got {shown(given)}"
            )
        return tuple(column.split(".")), made

    @property
    def fields(self) -> list[str]:
        return list(self._sources)

    def roots(self, names: Iterable[str]) -> list[str]:
        """The columns that the fields come from, of a dataset that has `names`."""
        known = set(names)
        columns = {name: self._column(name) for name in self._sources}
        return list(
            dict.fromkeys(
                columns[name] if columns[name] in known else path[0] for name, (path, _) in self._sources.items()
            )
        )

    def _column(self, name: str) -> str:
        return ".".join(self._sources[name][0])

    def values(self, row: Mapping[str, Any]) -> dict[str, str | None]:
        """The fields of a row as clean text; None for what is missing."""
        found = {}
        for name, (path, make) in self._sources.items():
            value: Any = row
            # A flattened dataset has columns with dots in their names.
            for key in path if (literal := self._column(name)) not in row else (literal,):
                value = value.get(key) if isinstance(value, Mapping) else None
            found[name] = self._text(make(value) if value is not None and make is not None else value)
        return found

    def _text(self, value: Any) -> str | None:
        """A value as clean text, the items of a list joined; None for what is missing."""
        # Of tensors and arrays.
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value if item is not None)
        return (clean(value, self.max_characters) or None) if value is not None else None

    def render(self, row: Mapping[str, Any]) -> str | None:
        """The metadata of a row; None where it goes without.

        Raises:
            `MissingMetadata`: a value is missing, and `missing="error"`.
        """
        return self.fill(self.values(row))

    def fill(self, values: Mapping[str, str | None], which: str = "a row") -> str | None:
        """The same of the row's [`values`](Template.values); an error calls it `which`."""
        lacking = [name for name, value in values.items() if value is None]
        if lacking and self.missing == "plain":
            return None
        if lacking and self.missing == "error":
            raise MissingMetadata(
                f"{which} has no value for {lacking} (columns {[self._column(name) for name in lacking]}). "
                "Fill them in, or pass missing='constant' or missing='plain'"
            )
        return self._line(values)

    def _line(self, values: Mapping[str, str | None]) -> str:
        return "".join(
            literal + ("" if name is None else values[name] or self.constant) for literal, name in self._parts
        )

    def format(self, /, **values: Any) -> str:
        """The template with given values, which become text as those of a row do; for `condition` at inference.

        A field of None, or of which nothing is left, is `constant`, as in training, where rows that lack it are given
        that. Extractors are not applied: pass what they make.

        Raises:
            `ValueError`: for a field that is left out or unknown, or without a value where training has none for that.
        """
        if set(values) != set(self._sources):
            raise ValueError(f"the fields of the template are {self.fields}, got {sorted(values)}")
        made = {name: self._text(value) for name, value in values.items()}
        lacking = [name for name, value in made.items() if value is None]
        if lacking and self.missing != "constant":
            raise ValueError(
                f"{', '.join(lacking)} must have a value, got {values[lacking[0]]!r}. Pass one, or the prompt "
                "as it is, without metadata"
            )
        return self._line(made)

    def to_json(self) -> dict[str, Any]:
        """The template as JSON types; a function of the user's only by name: values are given at inference."""
        names = {function: name for name, function in EXTRACTORS.items()}
        columns = {
            name: [
                ".".join(path),
                names.get(make, f"function {getattr(make, '__qualname__', make)}") if make else None,
            ]
            for name, (path, make) in self._sources.items()
        }
        return {
            "text": self.text,
            "columns": columns,
            "missing": self.missing,
            "constant": self.constant,
            "max_characters": self.max_characters,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Template:
        """What [`to_json`](Template.to_json) gave; a column that a function of the user's read is taken as it is."""
        columns = {
            name: (column, made) if made in EXTRACTORS else column for name, (column, made) in saved["columns"].items()
        }
        return cls(**{**saved, "columns": columns})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the template into `folder`, beside a model."""
        Path(folder, FILE).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Template:
        """The template that the model in `folder` was trained with, from its file or from the model's config.

        Raises:
            `ValueError`: there is none, or it cannot be read.
        """
        return cast(Template, read_saved(folder, FILE, SECTION, "template", cls.from_json))


def read_saved(
    folder: str | os.PathLike[str], file: str, section: str, what: str, read: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """What `read` makes of `file` in `folder`, or of the `section` of the config there.

    Raises:
        `ValueError`: there is neither, or it cannot be read.
    """
    for name, key in ((file, None), ("config.json", section)):
        path = Path(folder, name)
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text("utf-8"))
            found = found if key is None else found.get(key)
            if found is not None:
                return read(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no {what} that can be read ({reason(error)})") from error
    raise ValueError(
        f"{shown(os.fspath(folder))} holds no {what}: neither {file} nor {section!r} in a config.json. Pass the "
        "folder of a model that was trained with MetadataCallback"
    )
