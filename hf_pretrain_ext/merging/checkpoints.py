"""Checkpoints as folders of safetensors files, read in pieces: no tensor, let alone a shard, is whole in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_pretrain_ext.values import reason, shown

__all__ = ["DTYPES", "Checkpoint", "MergeError", "Spec", "open_checkpoint", "resolve", "sha256"]

PIECE = 1 << 19
"""Elements of a tensor that are in memory at once, of each input: 2 MB in float32."""

_RENEW = 1 << 24
"""Bytes read through one opening of a file. What was read stays mapped, and counts as resident, until it is closed."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Data types by their name in the safetensors format: those that can be merged (floats) or compared (the rest)."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Everything of a repository but weights, code and documents.
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9._-]+)(@(?P<revision>[^@\s]+))?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class MergeError(ValueError):
    """Checkpoints that cannot be merged or compared; the message lists every reason, each with what can be done."""


class Spec(NamedTuple):
    """Data type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def sha256(path: Path) -> str:
    """The hash that the Hub shows for a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(source: Any, name: str) -> tuple[Path, str | None]:
    """The folder that `source` (the argument `name`) means, and the commit of the Hub that it holds.

    Of a repository of the Hub only safetensors, JSON and tokenizer files are fetched: no code and no pickles.
    """
    advice = f"{name} must be a folder, or a name on the Hub (owner/name or owner/name@revision)"
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise MergeError(f"{advice}, got {shown(source)}")
    text = os.fspath(source)
    if not isinstance(text, str) or "\0" in text or len(text) > 4096:
        raise MergeError(f"{advice}, got {shown(source)}")
    if Path(text).is_dir():
        return Path(text), None
    match = _HUB_NAME.fullmatch(text)
    if match is None or Path(text).exists() or isinstance(source, os.PathLike):
        raise MergeError(f"{advice}; there is no folder {text}")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=_SMALL_FILES))
        weights = [ADAPTER_WEIGHTS, *_weight_files(folder)]
        snapshot_download(match["name"], revision=folder.name, allow_patterns=weights)
    except MergeError:
        raise
    except Exception as error:  # whatever the Hub's client raises means that the name leads nowhere now
        raise MergeError(f"{advice}; {text} is no folder, and the Hub did not give it: {reason(error)}") from error
    return folder, folder.name


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights: of the index, or the single one there may be."""
    if not (folder / _INDEX).is_file() or (folder / _SINGLE).is_file():
        return [_SINGLE]  # the host prefers it too
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    found = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise MergeError(f"{folder / _INDEX} has no weight_map: write the checkpoint again with save_pretrained")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise MergeError(f"{folder / _INDEX} names {shown(file)}, which is no file of its folder")
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path} holds no JSON object")
    return content


@dataclass
class _Opening:
    handle: Any
    read: int = 0


class SafetensorsFile:
    """One file, whose tensors are read as flat pieces that own their memory."""

    def __init__(self, path: Path):
        self.path = path
        self._opening: _Opening | None = None
        self.specs: dict[str, Spec] = {}
        handle = self._open().handle
        for name in handle.offset_keys():
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise MergeError(
                    f"{path}: {name} is stored as {part.get_dtype()}, with which this cannot compute; allowed are "
                    f"{', '.join(DTYPES)}. Quantised weights must be dequantised first"
                )
            self.specs[name] = Spec(DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def _open(self) -> _Opening:
        from safetensors import SafetensorError, safe_open

        if self._opening is None:
            try:
                self._opening = _Opening(safe_open(self.path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise MergeError(f"{self.path} cannot be read: {reason(error)}") from error
        return self._opening

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of a tensor, flat."""
        spec = self.specs[name]
        stop = spec.elements if stop is None else stop
        opening = self._open()
        piece: Tensor = opening.handle.get_tensor(name).reshape(-1)[start:stop].clone()
        opening.read += (stop - start) * spec.dtype.itemsize
        if opening.read >= _RENEW:
            self.close()
        return piece

    def close(self) -> None:
        self._opening = None


class Checkpoint:
    """A folder with safetensors weights and `config.json`.

    Args:
        folder (`Path`): The folder.
        name (`str`): The argument that it was given for, for messages.
        source (`str`): What was given.
        revision (`str`, *optional*): The commit, where it came from the Hub.

    Attributes:
        specs (`dict[str, Spec]`): Data type and shape of every tensor, in the order of the files.
    """

    def __init__(self, folder: Path, name: str, source: str, revision: str | None = None):
        self.folder, self.name, self.source, self.revision = folder, name, source, revision
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER_CONFIG).is_file():
                raise MergeError(
                    f"{name}={source} is an adapter: load it on its base with PeftModel.from_pretrained, then "
                    "merge_and_unload() and save_pretrained(), and give that folder"
                )
            raise MergeError(f"{name}={source} has no config.json: give a folder that save_pretrained wrote")
        self.config = read_json(folder / "config.json")
        files = _weight_files(folder)
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            pickled = any(folder.glob("*.bin"))
            advice = " (pickled weights are not read: load the model and save it again)" if pickled else ""
            raise MergeError(f"{name}={source} lacks {', '.join(missing[:5])} ({len(missing)} files){advice}")
        self.files = {file: SafetensorsFile(folder / file) for file in files}
        self._home = {key: file for file, opened in self.files.items() for key in opened.specs}
        if files != [_SINGLE]:
            listed = _weight_map(folder)
            if unlisted := sorted(self._home.keys() - listed.keys()):
                raise MergeError(
                    f"{name}={source}: its files hold tensors that its index does not list, and that the host loads "
                    f"all the same: {', '.join(unlisted[:5])} ({len(unlisted)} in all). Load the model and save it "
                    "again with save_pretrained"
                )
            astray = sorted(key for key, file in listed.items() if key not in self.files[file].specs)
            if astray:
                raise MergeError(
                    f"{name}={source}: its index lists tensors that are not in the files it names: "
                    f"{', '.join(astray[:5])} ({len(astray)} in all)"
                )
            self._home = dict(listed)
        self.specs = {
            key: spec for file, opened in self.files.items() for key, spec in opened.specs.items()
            if self._home.get(key) == file
        }  # fmt: skip
        self.dropped: dict[str, str] = {}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of the tensor `key`, flat, in memory of their own."""
        return self.files[self._home[key]].read(key, start, stop)

    def matrix(self, key: str) -> Tensor:
        """A whole tensor, in its shape."""
        return self.read(key).reshape(self.specs[key].shape)

    def drop(self, key: str, tied_to: str) -> None:
        """Leaves a stored copy of another tensor out of `specs`."""
        del self.specs[key]
        self.dropped[key] = tied_to

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    @cached_property
    def full_config(self) -> dict[str, Any] | None:
        """The config with the host's defaults filled in; None for architectures that the host does not know."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return dict(AutoConfig.from_pretrained(self.folder, trust_remote_code=False).to_dict())
        except StrictDataclassError as error:
            raise MergeError(
                f"{self.name}={self.source}: its config.json holds what no config may ({reason(error, 200)})"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one, as the config says."""
        config = self.full_config or self.config
        text = config.get("text_config")
        inner = text if isinstance(text, Mapping) else {}
        return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))

    @property
    def number_of_blocks(self) -> int | None:
        """Blocks of the text model, as the config says."""
        config = self.full_config or self.config
        text = config.get("text_config")
        for found in (text if isinstance(text, Mapping) else {}, config):
            for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                if isinstance(found.get(key), int):
                    return int(found[key])
        return None

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token to id; None where there is no tokenizer in the folder."""
        if not any((self.folder / file).is_file() for file in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return dict(AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False).get_vocab())
        except Exception as error:  # tokenizers raise a bare Exception for files that they cannot read
            raise MergeError(
                f"{self.name}={self.source}: its tokenizer cannot be loaded ({reason(error)}); with "
                "allow_other_tokenizer=True it is not looked at"
            ) from error

    @cached_property
    def fingerprint(self) -> str | None:
        """[`~hf_pretrain_ext.data.tokenizer_fingerprint`] of the tokenizer, None where there is none."""
        from hf_pretrain_ext.data import tokenizer_fingerprint

        return None if self.vocabulary is None else tokenizer_fingerprint(_Vocabulary(self.vocabulary))

    def record(self) -> dict[str, Any]:
        """What `merge.json` says of an input: its files with their hashes, for which all of it is read once."""
        try:
            tokenizer = self.fingerprint
        except MergeError:
            tokenizer = "cannot be loaded"
        return {
            "argument": self.name,
            "source": self.source,
            "revision": self.revision,
            "files": {
                file: {"size": (self.folder / file).stat().st_size, "sha256": sha256(self.folder / file)}
                for file in ["config.json", *self.files]
            },
            "tokenizer": tokenizer,
            "dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in self.specs.values()}),
            "tied_copies_left_out": self.dropped,
        }


@dataclass
class _Vocabulary:
    tokens: dict[str, int]

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def open_checkpoint(source: Any, name: str) -> Checkpoint:
    """Opens the checkpoint that was given as the argument `name`: a folder, or a name on the Hub.

    Raises:
        [`MergeError`]: there is none, it holds no safetensors, or files of it are missing or damaged.
    """
    folder, revision = resolve(source, name)
    return Checkpoint(folder, name, os.fspath(source), revision)


def pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Bounds of the pieces that a tensor is read in.

    Example:

    >>> list(pieces(1_200_000))
    [(0, 524288), (524288, 1048576), (1048576, 1200000)]
    """
    for start in range(0, elements, PIECE):
        yield start, min(start + PIECE, elements)
