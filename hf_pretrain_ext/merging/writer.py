"""Safetensors files written tensor by tensor, and a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.merging.checkpoints import DTYPES, MergeError, Spec
from hf_pretrain_ext.values import is_whole, shown

__all__ = ["new_folder", "size_of", "write_json", "write_shards"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def size_of(value: Any, name: str) -> int:
    """Bytes that the setting `name` means.

    Example:

    >>> size_of("5GB", "max_shard_size"), size_of("2 KiB", "max_shard_size"), size_of(1000, "max_shard_size")
    (5000000000, 2048, 1000)
    """
    advice = f'{name} must be a number of bytes from 1 on, or a text such as "5GB" or "500MiB", got {shown(value)}'
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(advice)
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if not is_whole(value) or value < 1:
        raise ValueError(advice)
    return int(value)


def _shards(specs: Mapping[str, Spec], most: int) -> list[dict[str, Spec]]:
    """Tensors in their order, in files of at most `most` bytes; a larger tensor has a file of its own."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and size + spec.bytes > most:
            shards.append({})
            size = 0
        shards[-1][key] = spec
        size += spec.bytes
    return shards


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, spec in specs.items():
        offsets = [start, start + spec.bytes]
        entries[key] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        start += spec.bytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    # The format aligns the data to 8 bytes by blanks behind the header.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path, specs: Mapping[str, Spec], pieces_of: Callable[[str], Iterable[Tensor]], max_shard_size: int
) -> dict[str, dict[str, Any]]:
    """Writes `model.safetensors`, or several files and their index, holding one piece of one tensor at a time.

    Args:
        folder (`Path`): Where to.
        specs (`dict[str, Spec]`): Data type and shape of every tensor, in the order that they are divided into files.
        pieces_of (`Callable`): Gives the flat pieces of the tensor of a name, in order.
        max_shard_size (`int`): Bytes of tensors in a file.

    Returns:
        `dict`: By file name, its size in bytes and its SHA-256.
    """
    shards = _shards(specs, max_shard_size)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    written, homes = {}, {}
    for name, shard in zip(names, shards, strict=True):
        # Wide types first, so that each tensor is aligned; the library that reads them orders them so, too.
        ordered = dict(sorted(shard.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        written[name] = _write_file(folder / name, ordered, pieces_of)
        homes.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = {"total_parameters": sum(s.elements for s in specs.values())}
        total["total_size"] = sum(s.bytes for s in specs.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": total, "weight_map": dict(sorted(homes.items()))}
        )
    return written


def _write_file(path: Path, specs: Mapping[str, Spec], pieces_of: Callable[[str], Iterable[Tensor]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(block: Any) -> None:
            file.write(block)
            digest.update(block)

        put(_header(specs))
        for key, spec in specs.items():
            left = spec.bytes
            for piece in pieces_of(key):
                if piece.dtype is not spec.dtype:
                    raise TypeError(f"{key} came as {piece.dtype} where {spec.dtype} was announced")
                left -= piece.numel() * piece.element_size()
                put(piece.reshape(-1).contiguous().view(torch.uint8).numpy().data)
            if left:
                raise ValueError(f"{key} came with {-left} bytes more than its shape has")
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, allow_nan=False, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def check_output(output: Any, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """`output` as a path that may be written, before anything is read."""
    if not isinstance(output, str | os.PathLike) or not os.fspath(output) or "\0" in str(output):
        raise MergeError(f"output must be the path of a folder, got {shown(output)}")
    path = Path(os.path.abspath(output))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise MergeError(f"output={output} is a file or a link: name a folder that is not there yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise MergeError(f"output={output} is not empty: name another folder, or set overwrite=True to replace it")
    # A link may be anywhere on the way to either.
    real = path.resolve()
    for folder in inputs:
        if real in (folder.resolve(), *folder.resolve().parents):
            raise MergeError(f"output={output} is, or holds, the input {folder}: name another folder")
    return path


@contextmanager
def new_folder(path: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name, and its place, when the block ends without an error.

    Args:
        path (`Path`): The folder to be.
        size (`int`): Bytes that will be written; without room for them nothing is begun.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise MergeError(f"output={path} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        yield part
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        if path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
