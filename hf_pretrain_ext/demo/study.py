"""The full scale of the demo: what replay keeps and costs, over several seeds, with intervals.

The arms are the columns of table 2 of Ibrahim et al. (2024, 2403.08763) for a strong shift: re-warming with 0, 1, 5,
10, 25 and 50 % replay, and joint training as the reference: a model from scratch on old and new data together, for the
steps of both stages, with as many old samples as the pre-training had and as many new ones as the 0 % arm. Besides
them, the arm that stays at the constant rate with which the pre-training ended.

A seed decides the model's initial weights, the order of the data and the plans, so each has a pre-training of its own;
tokenizer, data and held-out rows are shared. An interval is Student's, over the seeds; the difference from 0 % replay
is taken within each seed first, so what the arms of a seed share is not in it.

What is finished is kept in the output folder together with the settings that made it: a study that was killed goes on
with the first model that is missing, and one with other settings is trained again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_pretrain_ext
from hf_pretrain_ext import TrainerPlugin
from hf_pretrain_ext.callbacks import ReplayCallback, RewarmCallback
from hf_pretrain_ext.demo.main import DemoConfig, Domain, build_model, load_domains, pretrain, train_arm, write_page
from hf_pretrain_ext.demo.precision import fast_bf16
from hf_pretrain_ext.report.plots import have_matplotlib, study_plot
from hf_pretrain_ext.say import say
from hf_pretrain_ext.trace import versions

__all__ = ["ARMS", "Arm", "interval", "remembered", "run_study", "study_table"]

# 97.5 % quantiles of Student's t by degrees of freedom: two-sided 95 % intervals of 2 to 10 seeds.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# Where the results go and how many seeds there are changes no model; which files the data came from is in its digest.
NOT_IN_SETTINGS = ("scale", "output", "seed", "seeds", "domain", "limit")
ONLY_AFTER_PRETRAINING = ("steps", "heldout_rows")


@dataclass(frozen=True)
class Arm:
    """One column of the study.

    Args:
        label (`str`): its name in tables and plots.
        folder (`str`): the name of its folder.
        ratio (`float`, *optional*): share of old samples; none for the constant rate and for joint training.
    """

    label: str
    folder: str
    ratio: float | None = None


BASELINE = "0 %"
CONSTANT, JOINT = Arm("constant", "constant"), Arm("joint", "joint")
RATIOS = tuple(Arm(f"{percent} %", f"replay-{percent}", percent / 100) for percent in (0, 1, 5, 10, 25, 50))
ARMS = (CONSTANT, *RATIOS, JOINT)


# --- figures over seeds ---------------------------------------------------------------------------


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The values, their mean, and half the width of Student's 95 % interval of the mean.

    Example:

    >>> figures = interval([1.0, 2.0, 3.0])
    >>> figures["mean"], round(figures["half"], 3)
    (2.0, 2.484)
    """
    half = STUDENT_T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half": half, "values": list(values)}


def _curves(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and half interval of each held-out set's loss at each probed step."""
    curves = {}
    for name in ("old", "new"):
        entries = [run["forgetting"]["sets"][name] for run in runs]
        points = [interval(losses) for losses in zip(*(entry["losses"] for entry in entries), strict=True)]
        curves[name] = {
            "steps": entries[0]["steps"],
            "mean": [point["mean"] for point in points],
            "half": [point["half"] for point in points],
        }
    return curves


def _summary(arm: Arm, runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds: losses, paired differences from the baseline, and each run's own figures."""
    row: dict[str, Any] = {"arm": arm.label, "ratio": arm.ratio}
    for key in ("old", "new", "mean", "gap_depth"):
        row[key] = interval([run[key] for run in runs])
    row["minus_baseline"] = {
        key: interval([run[key] - base[key] for run, base in zip(runs, baseline, strict=True)])
        for key in ("old", "new", "mean")
    }
    row["curves"] = _curves(runs)
    row["runs"] = [{key: value for key, value in run.items() if key != "forgetting"} for run in runs]
    return row


# --- what is finished is kept ---------------------------------------------------------------------


def remembered(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]], what: str) -> dict[str, Any]:
    """
    The result kept in `path` if it was made with these very `settings`; else that of `make`, which is then kept.

    Args:
        settings (`dict`): everything that decides the result, in JSON types.
        what (`str`): what is made, for the line that says which of the two it was.
    """
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            say(f"{what}: finished before with these settings, skipped")
            return known["result"]
        before = known["settings"]
        changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        say(f"{what}: kept result is of other settings ({', '.join(changed)}), made again")
        path.unlink()
    else:
        say(what)
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # renamed when whole: a kill leaves no half result
    partial.write_text(json.dumps({"settings": settings, "result": result}, indent=1), encoding="utf-8")
    partial.replace(path)
    return result


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _data_digest(datasets: Sequence[Dataset]) -> str:
    """Of every token id of the data, in order: other pages, packages or tokenizers give another one."""
    digest = hashlib.blake2b(digest_size=8)
    for dataset in datasets:
        ids = dataset.with_format("numpy")["input_ids"][:]
        digest.update(repr(ids.shape).encode() + ids.tobytes())
    return digest.hexdigest()


def _source_digest() -> str:
    """Of this package's source files, read when the study starts."""
    digest = hashlib.blake2b(digest_size=8)
    root = Path(hf_pretrain_ext.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


# --- training -------------------------------------------------------------------------------------


@dataclass
class _Study:
    """What all seeds share."""

    config: DemoConfig
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    old: Domain
    new: Domain
    settings: dict[str, Any]
    source: str


def run_study(config: DemoConfig) -> dict[str, Any]:
    """Trains what is missing, and returns what `results.json` holds.

    Writes into `config.output`: `results.json`, `table.md`, `study.png`, `report.html` (the arms of the first seed),
    and a folder a seed with a folder a model, which holds its `trace.jsonl`, `forgetting.json` and `result.json`
    (figures and settings). Losses are of the last probe.
    """
    began = time.perf_counter()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    study = _prepare(config, folder)
    seeds = range(config.seed, config.seed + config.seeds)
    by_seed = [_one_seed(study, dataclasses.replace(config, seed=seed)) for seed in seeds]
    runs = {arm.label: [rows[arm.label] for rows in by_seed] for arm in ARMS}
    _check_sources(runs)
    continued = runs[BASELINE]
    results = {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "device": study.settings["device"],
        "old": study.old.corpus.description,
        "new": study.new.corpus.description,
        "tokens": {
            name: domain.train.num_rows * config.block_size
            for name, domain in (("old", study.old), ("new", study.new))
        },
        "seeds": list(seeds),
        "interval": f"Student's 95 % interval of the mean over {config.seeds} seeds",
        "baseline": BASELINE,
        "before": {name: interval([run[f"{name}_before"] for run in continued]) for name in ("old", "new")},
        "arms": [_summary(arm, runs[arm.label], continued) for arm in ARMS],
        "training_seconds": round(sum(run["seconds"] for arm in runs.values() for run in arm), 1),
        "seconds": round(time.perf_counter() - began, 1),  # of this session, which may have skipped models
    }
    _write(folder, results)
    return results


def _prepare(config: DemoConfig, folder: Path) -> _Study:
    tokenizer, old, new = load_domains(config, folder)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IN_SETTINGS}
    settings["data"] = _data_digest([old.train, old.heldout, new.train, new.heldout])
    settings |= {"versions": versions(), "bf16": fast_bf16()}
    settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return _Study(config, folder, tokenizer, old, new, settings, _source_digest())


def _one_seed(study: _Study, config: DemoConfig) -> dict[str, dict[str, Any]]:
    """Every arm of one seed, by label, from the pre-training on."""
    folder = study.folder / f"seed-{config.seed}"
    name = f"seed {config.seed} ({config.seed - study.config.seed + 1} of {study.config.seeds})"
    settings = {**study.settings, "seed": config.seed}
    base = _base(study, config, folder / "base", settings, f"{name}, pre-training")
    rows = {}
    for number, arm in enumerate(ARMS, start=1):
        # Joint training starts from scratch, so another pre-training is no other joint training.
        start = {} if arm is JOINT else {"base": base}
        rows[arm.label] = remembered(
            folder / arm.folder / "result.json",
            {**settings, **start, "ratio": arm.ratio, "arm": arm.folder},
            lambda arm=arm: _train(study, config, folder, arm, base["lr"]),  # type: ignore[misc]
            f"{name}, arm {number} of {len(ARMS)}: {arm.label}",
        )
    return rows


def _base(study: _Study, config: DemoConfig, folder: Path, settings: dict[str, Any], what: str) -> dict[str, Any]:
    """The pre-trained model of a seed: the rate it ended with and a digest of its weights."""
    weights = folder / "model" / "model.safetensors"

    def make() -> dict[str, Any]:
        _, lr = pretrain(config, folder, study.old, study.tokenizer)
        return {"lr": lr, "weights": _file_digest(weights)}

    result = folder / "result.json"
    if not weights.exists():
        result.unlink(missing_ok=True)
    kept = {key: value for key, value in settings.items() if key not in ONLY_AFTER_PRETRAINING}
    base = remembered(result, kept, make, what)
    if _file_digest(weights) != base["weights"]:
        raise ValueError(f"{weights} is not the model that {result} is about; remove {folder} to train it again")
    return base


def _train(study: _Study, config: DemoConfig, folder: Path, arm: Arm, base_lr: float) -> dict[str, Any]:
    output = folder / arm.folder
    domains = (study.old, study.new)
    plugins: list[TrainerPlugin] = [] if arm is CONSTANT else [RewarmCallback(config.peak_lr)]
    lr = base_lr if arm is CONSTANT else config.peak_lr
    if arm is JOINT:
        steps = config.pretrain_steps + config.steps
        plugins.append(ReplayCallback(study.old.train, ratio=config.pretrain_steps / steps))
        model: Any = build_model(config, len(study.tokenizer), study.tokenizer.eos_token_id)
        figures = train_arm(config, output, model, plugins, domains, lr=lr, steps=steps, first_steps="sparse")
        _check_joint(config, figures["counts"])
    else:
        if arm.ratio:
            plugins.append(ReplayCallback(study.old.train, ratio=arm.ratio))
        model = AutoModelForCausalLM.from_pretrained(folder / "base" / "model")
        figures = train_arm(config, output, model, plugins, domains, lr=lr)
    return {
        "seed": config.seed,
        "folder": output.relative_to(study.folder).as_posix(),
        "source": study.source,
        "old_samples": figures["counts"].get("replay", {}).get("samples", 0),
        **figures,
    }


def _check_joint(config: DemoConfig, counts: dict[str, Any]) -> None:
    """A share is rounded to a multiple of 1/65536, which a run of very many samples would show."""
    seen = {name: entry["samples"] for name, entry in counts.items()}
    wanted = {"train": config.steps * config.batch_size, "replay": config.pretrain_steps * config.batch_size}
    if seen != wanted:
        raise ValueError(
            f"joint training saw {seen} samples, not those of both stages, {wanted}; choose pretrain_steps and steps "
            "with a simple proportion"
        )


def _check_sources(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Says when results were made by different states of this package, which its version may not tell."""
    sources = [run["source"] for arm in runs.values() for run in arm]
    if len(set(sources)) > 1:
        shares = ", ".join(f"{source}: {sources.count(source)}" for source in dict.fromkeys(sources))
        say(f"note: these results were made by {len(set(sources))} states of this package's source ({shares})")


# --- report ---------------------------------------------------------------------------------------


def study_table(results: dict[str, Any]) -> list[str]:
    """The results as a Markdown table: mean ± half of the interval, in nats a token."""
    baseline = results["baseline"]
    lines = [
        f"| arm | old loss | new loss | mean | deepest gap (old) | old, minus {baseline} | new, minus {baseline} |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| before | {_pm(results['before']['old'])} | {_pm(results['before']['new'])} | | | | |",
    ]
    for row in results["arms"]:
        joint = row["arm"] == JOINT.label
        gap = "" if joint else _pm(row["gap_depth"])  # from scratch, there is nothing to fall from
        difference = {
            key: "" if row["arm"] == baseline else _pm(row["minus_baseline"][key], signed=True)
            for key in ("old", "new")
        }
        losses = " | ".join(_pm(row[key]) for key in ("old", "new", "mean"))
        lines.append(f"| {row['arm']} | {losses} | {gap} | {difference['old']} | {difference['new']} |")
    return lines


def _pm(figures: dict[str, Any], signed: bool = False) -> str:
    mean = f"{figures['mean']:+.3f}".replace("-", "−") if signed else f"{figures['mean']:.3f}"
    return f"{mean} ± {figures['half']:.3f}"


def _write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = study_table(results)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if have_matplotlib():
        study_plot(results, folder / "study.png")
    else:
        say("no study.png without matplotlib; pip install 'hf-pretrain-ext[report]', and run this again to draw it")
    write_page(folder, {arm["arm"]: arm["runs"][0]["folder"] for arm in results["arms"]})
    print("\n" + "\n".join(lines))
    print(f"\nheld-out losses in nats per token, mean ± {results['interval']}")
    print(f"{results['seconds']:.0f} s in this session; results, table and figure in {folder}/")
