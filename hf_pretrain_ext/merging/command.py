"""`hf-pretrain-ext merge average | lines | residual | intruders`."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["main"]

_FORMS = {
    "average": "the weighted mean of checkpoints",
    "lines": "a base with the changes of a tuned checkpoint, or of several, scaled by depth (LiNeS)",
    "residual": "a base trained further, and what instruction tuning had changed in the base, added",
    "intruders": "count the intruder dimensions of a LoRA adapter, or of a tuned checkpoint; merges nothing",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-pretrain-ext merge",
        description=textwrap.fill(
            "Merges two or three checkpoints into one, in memory that does not grow with the model. Each is a folder "
            "or a name on the Hub (owner/name, owner/name@revision); weights are safetensors.",
            78,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms = parser.add_subparsers(dest="form", metavar="FORM", required=True)
    made = {
        name: forms.add_parser(name, help=text, description=text.capitalize() + ".") for name, text in _FORMS.items()
    }

    made["average"].add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    made["average"].add_argument(
        "--weights", type=float, nargs="+", help="one a checkpoint, divided by their sum (default: equal)"
    )
    made["lines"].add_argument("base")
    made["lines"].add_argument("tuned", nargs="+")
    made["lines"].add_argument("--alpha", type=float, help="share of the change kept by the first block")
    made["lines"].add_argument("--beta", type=float, help="what the last keeps beyond it (default for one: 1 - alpha)")
    made["lines"].add_argument("--blocks", help="text before a block's number in the names (default: found)")
    for name in ("base", "instruct", "adapted"):
        made["residual"].add_argument(name)
    for form in ("average", "lines", "residual"):
        _add_options(made[form])
    made["lines"].add_argument(
        "--merge-method", default="task_arithmetic", help="mergekit's, for --mergekit (default: %(default)s)"
    )
    made["lines"].add_argument("--density", type=float, help="mergekit's, for merge methods that drop entries")

    made["intruders"].add_argument("base")
    made["intruders"].add_argument("tuned", help="a PEFT adapter (LoRA, DoRA), or a whole checkpoint")
    made["intruders"].add_argument("--k", type=int, default=10, help="top singular vectors (default: %(default)s)")
    made["intruders"].add_argument("--eps", type=float, default=0.5, help="cosine (default: %(default)s)")
    made["intruders"].add_argument("--target-modules", nargs="+", metavar="NAME", help="ends of modules' names")
    made["intruders"].add_argument("--device", default="cpu", help="for the decompositions (default: %(default)s)")
    made["intruders"].add_argument("--json", metavar="FILE", help="write all cosines there")
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FOLDER", help="to write; must be new or empty")
    parser.add_argument("--donor", help="the input that gives config, tokenizer and data types")
    parser.add_argument("--dtype", help="of all floats: float32, bfloat16, float16 or float64 (default: the donor's)")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument(
        "--ignore-config", nargs="+", default=[], metavar="FIELD", help="fields of the config that may differ"
    )
    parser.add_argument("--allow-other-tokenizer", action="store_true", help="merge although tokens have other ids")
    parser.add_argument("--mergekit", metavar="FILE", help="write a configuration of mergekit instead of merging")
    parser.add_argument("--tokenizer-source", help="mergekit's, for --mergekit: union, base or a model")


def main(arguments: list[str]) -> int:
    """Runs `hf-pretrain-ext merge`; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.form == "intruders":
            return _intruders(options)
        if (options.output is None) == (options.mergekit is None):
            parser.error("give --output FOLDER to merge, or --mergekit FILE for a configuration of mergekit")
        return _mergekit(options, parser) if options.mergekit else _merge(options, parser)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")


def _merge(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from hf_pretrain_ext import merging

    if options.tokenizer_source or getattr(options, "density", None) is not None:
        parser.error("--tokenizer-source and --density are mergekit's: they go with --mergekit")
    if getattr(options, "merge_method", "task_arithmetic") != "task_arithmetic":
        parser.error("--merge-method is mergekit's: it goes with --mergekit")
    common: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("donor", "dtype", "max_shard_size", "overwrite", "ignore_config", "allow_other_tokenizer")
    }
    if options.form == "average":
        merging.average(options.checkpoints, options.weights, output=options.output, **common)
    elif options.form == "lines":
        rates = {"alpha": options.alpha, "beta": options.beta, "blocks": options.blocks}
        merging.lines(options.base, _one_or_all(options.tuned), output=options.output, **rates, **common)
    else:
        three = (options.base, options.instruct, options.adapted)
        merging.instruction_residual(*three, output=options.output, **common)
    return 0


def _one_or_all(tuned: list[str]) -> str | list[str]:
    return tuned[0] if len(tuned) == 1 else tuned


def _mergekit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from hf_pretrain_ext import merging

    for name, default in (("donor", None), ("overwrite", False), ("ignore_config", []), ("max_shard_size", "5GB")):
        if getattr(options, name) != default or options.allow_other_tokenizer:
            parser.error("with --mergekit, only the formula's options, --dtype and --tokenizer-source mean something")
    common = {"out_dtype": options.dtype, "tokenizer_source": options.tokenizer_source}
    if options.form == "average":
        text = merging.average_yaml(options.checkpoints, options.weights, **common)
    elif options.form == "lines":
        text = merging.lines_yaml(
            options.base,
            _one_or_all(options.tuned),
            options.alpha,
            options.beta,
            blocks=options.blocks,
            merge_method=options.merge_method,
            density=options.density,
            **common,
        )
    else:
        text = merging.instruction_residual_yaml(options.base, options.instruct, options.adapted, **common)
    with Path(options.mergekit).open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"mergekit's configuration in {options.mergekit}; mergekit-yaml {options.mergekit} FOLDER merges by it")
    return 0


def _intruders(options: argparse.Namespace) -> int:
    from hf_pretrain_ext.merging import intruder_dimensions

    report = intruder_dimensions(
        options.base,
        options.tuned,
        options.k,
        options.eps,
        target_modules=options.target_modules,
        device=options.device,
    )
    print(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0
