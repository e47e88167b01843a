"""What the package keeps in a checkpoint: `checkpoint-N/hf_pretrain_ext/`, state in JSON and a manifest written last.

The manifest lists size and hash of every file of the checkpoint, the host's own included, so that a checkpoint cut
short, truncated or altered is recognised before anything is loaded from it. Knows files, not the Trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_pretrain_ext.trace import plain, versions
from hf_pretrain_ext.values import reason, shown

__all__ = [
    "STAGES_NAME",
    "STATE_FOLDER",
    "CheckpointError",
    "file_digest",
    "find_faults",
    "last_complete_checkpoint",
    "read_state",
    "write_json",
    "write_state",
]

STATE_FOLDER = "hf_pretrain_ext"
STAGES_NAME = "stages.json"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_FORMAT = 1
_PART = ".hpe-part"
# The SIGTERM checkpoint keeps this file while it saves and removes it afterwards.
_SENTINEL = "checkpoint-is-incomplete.txt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed; the message says why and what can be done."""


def write_json(path: Path, content: Any) -> None:
    """Writes to a temporary name, syncs and renames: afterwards there is the old file or the whole new one."""
    temporary = path.with_suffix(_PART)
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(plain(content), file, ensure_ascii=False, allow_nan=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hash(path: Path, size: int) -> str:
    """Of the first `size` bytes: what lies behind a link may have no end, whatever size it says."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(min(size, 1 << 22)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def file_digest(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as a manifest has them."""
    size = path.stat().st_size
    return {"size": size, "xxh3_128": _hash(path, size)}


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name not in (_SENTINEL, f"{STATE_FOLDER}/{_MANIFEST}") and path.suffix != _PART:
            yield name, path


def invalidate(checkpoint: str | Path) -> None:
    """Removes the manifest of a checkpoint that is about to be written again: until the new one, it is incomplete."""
    folder = Path(checkpoint) / STATE_FOLDER
    (folder / _MANIFEST).unlink(missing_ok=True)
    for left in folder.glob(f"*{_PART}"):
        left.unlink()


def write_state(
    checkpoint: str | Path, state: dict[str, Any], beside: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Writes `state` (JSON types), more files of the same kind by name, and then the manifest of the checkpoint."""
    folder = Path(checkpoint) / STATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    invalidate(checkpoint)
    for name, content in (beside or {}).items():
        write_json(folder / name, content)
    write_json(folder / _STATE, state)
    sizes = {name: (path, path.stat().st_size) for name, path in _files(Path(checkpoint))}
    files = {name: {"size": size, "xxh3_128": _hash(path, size)} for name, (path, size) in sizes.items()}
    write_json(folder / _MANIFEST, {"format": _FORMAT, "versions": versions(), "files": files})


def find_faults(checkpoint: str | Path, only: tuple[str, ...] | None = None) -> list[str]:
    """Why a checkpoint is not complete, one line a fault; empty if it is.

    Files added later (a model card, say) are no fault; missing, truncated or altered ones are. With `only`, those are
    looked at whose names fit one of these patterns.
    """
    if not _is_folder(checkpoint):
        return ["there is no such folder"]
    checkpoint = Path(checkpoint)
    manifest_path = checkpoint / STATE_FOLDER / _MANIFEST
    if not manifest_path.is_file():
        if not any(checkpoint.iterdir()):
            return ["the folder is empty"]
        if (checkpoint / STATE_FOLDER).is_dir():
            return ["its save did not finish (no manifest)"]
        return [f"it has no {STATE_FOLDER}/{_MANIFEST}: it was not written by a Trainer with plug-ins"]
    try:
        form, expected = _manifest(checkpoint)
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError) as error:
        return [f"{STATE_FOLDER}/{_MANIFEST} cannot be read ({reason(error, 200)})"]
    if form != _FORMAT:
        return [f"its manifest has format {shown(form)}; this version reads format {_FORMAT}"]
    asked = {n: e for n, e in expected.items() if only is None or any(fnmatch(n, pattern) for pattern in only)}
    faults = [fault for name, entry in asked.items() if (fault := _fault(checkpoint, name, *entry))]
    if f"{STATE_FOLDER}/{_STATE}" not in expected:
        faults.append(f"its manifest does not list {STATE_FOLDER}/{_STATE}")
    return faults


def _manifest(checkpoint: Path) -> tuple[Any, dict[str, tuple[int, str]]]:
    """Format of a manifest, and size and hash of every file that it lists."""
    manifest = json.loads((checkpoint / STATE_FOLDER / _MANIFEST).read_text(encoding="utf-8"))
    files = dict(manifest["files"])
    form = manifest["format"]
    return form, {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in files.items()}


def _is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; empty text, which Python takes for the working folder, names none."""
    try:
        return os.fspath(path) != "" and Path(path).is_dir()
    except (OSError, ValueError):  # longer than any path can be, or with NUL inside
        return False


def _fault(checkpoint: Path, name: str, size: int, digest: str) -> str | None:
    """What is wrong with one file that a manifest lists, None if it is as it was written."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"its manifest names a file outside the checkpoint: {name!r}"
    path = checkpoint / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None if _hash(path, size) == digest else f"{name} was altered (its hash differs)"
    except (OSError, ValueError) as error:
        return f"{name[:80]} is missing or cannot be read ({type(error).__name__}: {str(error)[:80]})"


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete checkpoint in `output_dir`, and those newer than it with the fault that ruled them out.

    Of several stages, which count their steps from 0 each, those of the last are the newest.
    """
    skipped: list[tuple[Path, str]] = []
    if not _is_folder(output_dir):
        return None, skipped
    numbered = {p: int(m.group(1)) for p in Path(output_dir).iterdir() if (m := _CHECKPOINT.fullmatch(p.name))}
    stages = {path: _stage_number(path) for path in numbered}
    # What does not tell was cut short as it was written: by the last stage, as a rule.
    last = max((stage for stage in stages.values() if stage is not None), default=0)
    place = {path: (last if (stage := stages[path]) is None else stage, step) for path, step in numbered.items()}
    for path in sorted(numbered, key=place.__getitem__, reverse=True):
        faults = find_faults(path)
        if not faults:
            return path, skipped
        skipped.append((path, faults[0]))
    return None, skipped


def _stage_number(checkpoint: Path) -> int | None:
    """Of the stage that a checkpoint is of; None where it does not tell."""
    path = checkpoint / STATE_FOLDER / STAGES_NAME
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["stages"][-1]["number"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None


def is_writing_failure(error: BaseException) -> bool:
    """Whether an error says that files could not be written, whichever library says it."""
    import safetensors

    text = str(error)
    by_name = isinstance(error, RuntimeError) and any(
        part in text for part in ("PytorchStreamWriter", "inline_container", "iostream")
    )
    return isinstance(error, OSError | safetensors.SafetensorError) or by_name


def writing_failure(folder: str | Path, error: BaseException) -> str:
    """What to say when the checkpoint `folder` could not be written."""
    folder = Path(folder)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    newest, _ = last_complete_checkpoint(folder.parent)
    kept = f"The newest complete checkpoint is {newest}, which is intact" if newest else "There is no complete one yet"
    return (
        f"the checkpoint {folder} could not be written ({type(error).__name__}: {error}); {free / 1e9:.3g} GB are "
        f"free there. Training stops here. {kept}. Make room, or set output_dir to a place that can be written, and "
        "resume with resume_from_checkpoint=True."
    )


def resolve(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The folder to resume from, or None, and lines that say what was skipped.

    Raises:
        `CheckpointError`: no complete checkpoint to be found, an explicit path that is not complete, or no path.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None, []
    if resume_from_checkpoint is True:
        newest, skipped = last_complete_checkpoint(output_dir)
        lines = [f"skipped {path.name}: {fault}" for path, fault in skipped]
        if newest is None:
            found = "\n".join(f"  {line}" for line in lines) or "  it holds no checkpoints"
            raise CheckpointError(f"no complete checkpoint to resume from in {output_dir}:\n{found}")
        return str(newest), lines
    if not isinstance(resume_from_checkpoint, str | os.PathLike) or not os.fspath(resume_from_checkpoint):
        raise CheckpointError(
            "resume_from_checkpoint must be the folder of a checkpoint, or True for the newest complete one, got "
            f"{shown(resume_from_checkpoint)}"
        )
    faults = find_faults(resume_from_checkpoint)
    if faults:
        # The folder beside the one named is where its run kept the others.
        follow = os.path.realpath if _is_folder(resume_from_checkpoint) else os.path.abspath
        beside, _ = last_complete_checkpoint(Path(follow(resume_from_checkpoint)).parent)
        newest = beside or last_complete_checkpoint(output_dir)[0]
        advice = f"The newest complete checkpoint is {newest}." if newest else "There is no complete checkpoint."
        raise CheckpointError(
            f"cannot resume from {_named(resume_from_checkpoint)}: {'; '.join(faults)}. {advice} To start a new run "
            "from its weights instead, load the model from that folder and call train() without "
            f"resume_from_checkpoint{_or_continue(resume_from_checkpoint, faults)}."
        )
    return str(resume_from_checkpoint), []


def continue_call(checkpoint: str | os.PathLike[str]) -> str:
    """What to type to train on from the weights of `checkpoint` as a new stage.

    Example:

    >>> continue_call("runs/first/checkpoint-100")
    "continue_from(trainer, 'runs/first/checkpoint-100').train()"
    """
    return f"continue_from(trainer, {shown(os.fspath(checkpoint))}).train()"


def _or_continue(checkpoint: str | os.PathLike[str], faults: list[str]) -> str:
    """Offered for a whole folder that is not ours; what is damaged is not a place to go on from."""
    whole = len(faults) == 1 and faults[0].startswith(f"it has no {STATE_FOLDER}")
    return f", or {continue_call(checkpoint)}" if whole else ""


def _named(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if len(text) < 1000 and text.isprintable() else shown(text)


@contextmanager
def reading(checkpoint: str | Path, what: str) -> Iterator[None]:
    """Inside, whatever goes wrong with a part of a checkpoint is a `CheckpointError` that names the part."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever a library raises about a file is the finding here
        raise CheckpointError(
            f"{what} of {checkpoint} cannot be used ({reason(error)}): it was damaged or altered before its hash was "
            "taken, or it belongs to another run or version. Resume from another checkpoint"
        ) from error


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state that `write_state` saved in a complete checkpoint.

    Raises:
        `CheckpointError`: there is none, or it cannot be read.
    """
    path = Path(checkpoint) / STATE_FOLDER / _STATE
    with reading(checkpoint, f"{STATE_FOLDER}/{_STATE}"):
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint}/{STATE_FOLDER}/{_STATE} does not hold an object")
    return state


def checkpoint_step(checkpoint: str | Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for other names.

    Example:

    >>> checkpoint_step("runs/first/checkpoint-100"), checkpoint_step("runs/first")
    (100, None)
    """
    match = _CHECKPOINT.fullmatch(Path(checkpoint).name)
    return int(match.group(1)) if match else None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder whose saves finished; their files are not looked through."""
    if not _is_folder(folder):
        return []
    there = [path for path in Path(folder).iterdir() if checkpoint_step(path) is not None]
    return sorted(path for path in there if (path / STATE_FOLDER / _MANIFEST).is_file())


def check_listed(checkpoint: str | Path, *patterns: str, what: str = "resume from") -> None:
    """Raises `CheckpointError` unless the manifest vouches for a file of each pattern.

    The host goes on without those that are not there, with fresh moments or another learning rate.
    """
    _, listed = _manifest(Path(checkpoint))
    missing = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in listed)]
    if missing:
        raise CheckpointError(
            f"cannot {what} {checkpoint}: its manifest does not list {', '.join(missing)}, without which the run "
            "would not go on as it was. To start a new run from its weights instead, load the model from that folder "
            f"and call train() without resume_from_checkpoint, or {continue_call(checkpoint)}."
        )


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line a place: `path: saved → now`.

    Example:

    >>> differences({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 3]})
    ['b[1]: 2 → 3']
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        lines = []
        for key in sorted({*saved, *now}):
            place = f"{path}.{key}" if path else str(key)
            if key not in saved:
                lines.append(f"{place}: absent → {now[key]!r}")
            elif key not in now:
                lines.append(f"{place}: {saved[key]!r} → absent")
            else:
                lines.extend(differences(saved[key], now[key], place))
        return lines
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [
            line
            for number, pair in enumerate(zip(saved, now, strict=True))
            for line in differences(*pair, f"{path}[{number}]")
        ]
    return [] if saved == now else [f"{path}: {saved!r} → {now!r}"]
