"""What can be known of a model that a stage begins with: its folder, its history, or else its config and card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pretrain_ext import checkpoint
from hf_pretrain_ext.checkpoint import STATE_FOLDER, CheckpointError
from hf_pretrain_ext.loading import weight_files
from hf_pretrain_ext.merging.compare import flat_config
from hf_pretrain_ext.stages import STAGES_NAME, Stage, is_ahead, of_state, read_stages
from hf_pretrain_ext.values import reason, shown

__all__ = ["FETCHED", "Base", "find_folder", "look_up", "read_life", "settings_that_differ"]

FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md", "hf_pretrain_ext/*.json")
_COMMIT = re.compile("[0-9a-f]{40}")
_CONFIG = ("model_type", "vocab_size", "max_position_embeddings", "dtype", "transformers_version")
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path")
_CARD = ("base_model", "datasets", "language", "tags", "license")


@dataclass(frozen=True)
class Base:
    """A model without a history: `config` and `card` are what its files say, None where there is none."""

    path: str
    revision: str | None = None
    config: dict[str, Any] | None = None
    card: dict[str, Any] | None = None
    fault: str | None = field(default=None, compare=False)
    looked: bool = field(default=True, compare=False)

    def stage(self) -> Stage:
        """Its entry in `stages.json`, before the first stage that is known."""
        base = {
            "path": self.path,
            "revision": self.revision,
            "local": os.path.isdir(self.path),
            "config": self.config,
            "card": self.card,
        }
        return Stage(0, "base", kind="unknown", base=base)

    def lines(self) -> list[str]:
        """What is known and what is not."""
        at = f" at revision {self.revision}" if self.revision else ""
        known = ", ".join(f"{key} {value}" for key, value in (self.config or {}).items() if key != "dtype")
        lines = [f"base: {self.path}{at}{f' ({known})' if known else ''}, without a history"]
        if self.card:
            lines.append("base: its card says " + ", ".join(f"{key} {shown(v)}" for key, v in self.card.items()))
        elif self.fault:
            lines.append(f"base: its card cannot be read ({self.fault})")
        elif self.looked:
            lines.append("base: it has no card")
        else:
            lines.append("base: its card was not looked for, since there is only the model itself")
        data = "" if self.card and self.card.get("datasets") else ", which data it was trained on"
        lines.append(
            f"base: not known: how its learning rate ended (most published models are annealed: re-warm, with "
            f"RewarmCallback and the peak of its pre-training){data}, how many tokens of it, and its losses. "
            "ReplayCallback(from_history=True, data={'base': ...}) replays what stands in for that data: "
            "public data like it, or what `hf-pretrain-ext recall` writes"
        )
        return lines


def look_up(folder: Path | None, path: str, revision: str | None, model: Any = None) -> Base:
    """Reads the config and the card of a folder, or the config of a model."""
    config: dict[str, Any] | None = None
    if model is not None and hasattr(getattr(model, "config", None), "to_dict"):
        config = model.config.to_dict()
    elif folder is not None and (folder / "config.json").is_file():
        with checkpoint.reading(folder, "config.json"):
            config = _json(folder / "config.json")
    kept = {key: str(config[key]) for key in _CONFIG if config.get(key) is not None} if config else None
    card, fault = _card(folder)
    return Base(path, revision, kept, card, fault, looked=folder is not None)


def _card(folder: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    if folder is None or not (folder / "README.md").is_file():
        return None, None
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(folder / "README.md").data.to_dict()
    except Exception as error:  # whatever is wrong with a card is no reason not to train
        return None, reason(error, 200)
    return {key: said[key] for key in _CARD if said.get(key)}, None


def find_folder(given: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder that is meant, and its revision: `given` itself, or where the Hub's files of that name are.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: neither a folder nor to be had from the Hub.
    """
    if os.path.isdir(given):
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} is for models of the Hub, and {shown(given)} is a folder")
        return Path(given), None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(given, revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # whatever the Hub's client raises is the finding here
        raise CheckpointError(
            f"{shown(given)} is no folder here, and no model that the Hub gives ({reason(error, 300)}). Name a "
            "checkpoint, a folder with a model, or a model of the Hub"
        ) from error
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else revision


def settings_that_differ(folder: Path, name: str, now: Mapping[str, Any]) -> list[str]:
    """Where `folder`/`name`, the config of a model or of an adapter, says otherwise than `now`, one text a field.

    Fields that are bookkeeping, or act in training alone, are left out; so are those that one of the two lacks.
    """
    with checkpoint.reading(folder, name):
        saved = flat_config(_with_defaults(folder) if name == "config.json" else _json(folder / name))
    ours = flat_config(json.loads(json.dumps(dict(now), default=_plain)))
    if name == "adapter_config.json":
        saved, ours = ({key: each[key] for key in _ADAPTER if key in each} for each in (saved, ours))
    return [
        f"{key} {shown(value)} there, {shown(ours[key])} here"
        for key, value in saved.items()
        if key in ours and ours[key] != value and key not in ("architectures", "auto_map")
    ]


def _with_defaults(folder: Path) -> dict[str, Any]:
    """A config is saved without what is as its class has it."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _json(folder / "config.json")  # of an architecture that the host does not know
    return dict(json.loads(json.dumps(found, default=_plain)))


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def read_life(
    folder: Path, text: str, fetched: tuple[str, ...] | None = None
) -> tuple[list[Path], tuple[Stage, ...] | None, int | None, bool]:
    """The files of its weights, the stages that a folder tells of, its step, and whether it is a checkpoint of ours.

    `fetched` are the patterns of the files that were fetched, where not all were.

    Raises:
        [`~hf_pretrain_ext.checkpoint.CheckpointError`]: a checkpoint that is not complete, or no weights to be found.
    """
    ours = (folder / STATE_FOLDER).is_dir()
    if ours and (faults := checkpoint.find_faults(folder, fetched)):
        newest, _ = checkpoint.last_complete_checkpoint(Path(os.path.realpath(folder)).parent)
        advice = f"The newest complete checkpoint is {newest}." if newest else "There is no complete checkpoint there."
        raise CheckpointError(f"cannot continue from {text}: {'; '.join(faults)}. {advice}")
    files = weight_files(folder)
    if not files:
        raise CheckpointError(_without_weights(folder, text))
    stages = read_stages(folder)
    step = None
    if ours:
        state = checkpoint.read_state(folder)
        with checkpoint.reading(folder, f"{STATE_FOLDER}/state.json"):
            step = int(state["step"])
            stages = stages or (of_state(state),)
    elif stages is not None:
        if is_ahead(folder, files):
            newest, _ = checkpoint.last_complete_checkpoint(folder)
            advice = f"Its newest complete checkpoint is {newest}" if newest else "It holds no complete checkpoint"
            raise CheckpointError(
                f"{text} holds weights that were saved before the training that its {STAGES_NAME} tells of. {advice}; "
                "to continue from the weights that training ended with, call save_model() after it"
            )
        step = stages[-1].steps
    return files, stages, step, ours


def _without_weights(folder: Path, text: str) -> str:
    newest, _ = checkpoint.last_complete_checkpoint(folder)
    if newest is not None:
        return f"{text} holds no model itself, but checkpoints: the newest complete one is {newest}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            f"{text} holds weights as pickles, which are not read. Load the model with from_pretrained and pass it, "
            "or save it again, as safetensors, with save_pretrained"
        )
    return f"{text} holds no weights in safetensors"
