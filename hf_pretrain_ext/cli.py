"""The command line, `hf-pretrain-ext`: demo, plan, train, report, card, memory, merge, recall, kill-test, plugins."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_pretrain_ext.recipe import Recipe

__all__ = ["main"]

_COMMANDS = {
    "demo": "the main job on real text, about ten minutes on two cores",
    "plan": "what a recipe will do: learning rate, mixture, probes, steps and tokens, before training",
    "train": "train a recipe",
    "report": "one HTML page from the traces of runs",
    "card": "the continued-pretraining section of a model card, from a run's trace",
    "memory": "bytes that training a model takes with GradNormLoRP and with other optimizers, and what plug-ins keep",
    "merge": "average checkpoints, LiNeS, instruction residual; intruder dimensions of adapters",
    "recall": "texts that a model writes itself, to replay where its data cannot be had",
    "kill-test": "kill a recipe's run at random moments, and see that it comes to the same end",
    "plugins": "list the plug-ins that are installed, other packages' too",
}

_RECIPE = """\
A recipe is a YAML file:

  model: my-org/my-model            # a name on the Hub, or a folder
  data: {path: json, data_files: new.jsonl}
  pack: {block_size: 1024}          # for raw text
  training: {output_dir: runs/first, num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 3e-4}
  rewarm: {peak_lr: 3e-4}
  replay: {sources: {general: {path: json, data_files: old.jsonl}}, ratio: 0.05}
  forgetting: {sets: {general: {path: json, data_files: held_out.jsonl}}}

Further sections: eval_data, trainer (trainer or sft), plan (order, seed, window), on_nonfinite (report, stop or skip),
continue_from (a checkpoint, to begin the next stage of its life) or anneal (checkpoint, steps), and any installed
plug-in by its name. `training` takes all fields of TrainingArguments (of SFTConfig with `trainer: sft`).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Heavy imports wait until a command needs them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="hf-pretrain-ext",
        description="Plug-ins for continuing the pre-training of Hugging Face models.",
        epilog="'hf-pretrain-ext COMMAND --help' lists the options of a command.",
    )
    from hf_pretrain_ext._version import __version__

    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in _COMMANDS.items():
        commands.add_parser(name, add_help=False, help=help_text)
    command, rest = parser.parse_args(given[:1]).command, given[1:]
    run = {
        "demo": _demo,
        "plan": _plan,
        "train": _train,
        "report": _report,
        "card": _card,
        "memory": _memory,
        "merge": _merge,
        "recall": _recall,
        "kill-test": _kill_test,
        "plugins": _plugins,
    }[command]
    return run(rest)


def _parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"hf-pretrain-ext {command}",
        description=textwrap.fill(description, 78),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _plugins(arguments: list[str]) -> int:
    from hf_pretrain_ext.registry import installed_plugins

    _parser("plugins", "Lists the plug-ins that are installed: name, class, and what it does.").parse_args(arguments)
    for name, plugin in installed_plugins().items():
        summary = (plugin.__doc__ or "").strip().splitlines()[0]
        print(f"{name:<12} {plugin.__module__}.{plugin.__qualname__}\n{'':<12} {summary}")
    return 0


def _memory(arguments: list[str]) -> int:
    parser = _parser(
        "memory",
        "Bytes of weights, gradients and optimizer state, activations apart, of training a model: GradNormLoRP beside "
        "other optimizers; and of the copies that other plug-ins keep. Only the config is read.",
    )
    parser.add_argument("config", help="a folder or config.json, or a name on the Hub")
    parser.add_argument("--rank", type=int, help="default: a quarter of the hidden size")
    parser.add_argument("--bits", type=int, default=8, help="of the moments: 4, 8 or 32 (default: %(default)s)")
    parser.add_argument(
        "--projector-bits", type=int, default=8, help="of the projectors: 4, 8, 16 or 32 (default: %(default)s)"
    )
    parser.add_argument("--target-modules", nargs="+", help="names of the linear layers to project (default: all)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    import torch
    from transformers import AutoConfig

    from hf_pretrain_ext.footprint import copies_table
    from hf_pretrain_ext.gradnormlorp import comparison_table
    from hf_pretrain_ext.gradnormlorp.memory import on_meta

    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", options.config) and not Path(options.config).exists():
        sys.exit(f"hf-pretrain-ext: {options.config} is no folder or file, nor a name on the Hub")
    try:
        config = AutoConfig.from_pretrained(options.config)
        text = config.get_text_config()
        lines = comparison_table(
            config,
            text.hidden_size // 4 if options.rank is None else options.rank,
            options.bits,
            options.projector_bits,
            target_modules=options.target_modules or "all-linear",
            dtype=getattr(torch, options.dtype),
        )
        trained = sum(param.numel() for param in on_meta(config).parameters())
        lines += ["", *copies_table(trained, getattr(torch, options.dtype))]
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    print("\n".join(lines))
    return 0


def _merge(arguments: list[str]) -> int:
    from hf_pretrain_ext.merging.command import main as merge

    return merge(arguments)


def _recall(arguments: list[str]) -> int:
    parser = _parser(
        "recall",
        "Samples texts from a model into a file of JSON lines, for replay where its training data cannot be had: they "
        "can remind it of no more than it still says by itself.",
    )
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--texts", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--output", default="recalled.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--prompts", metavar="FILE", help="beginnings, one a line, taken in turn (default: none)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a text (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="texts at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--revision", help="of a model on the Hub")
    options = parser.parse_args(arguments)
    from hf_pretrain_ext.recall import generate_texts

    output = Path(options.output)
    if output.exists() or not output.absolute().parent.is_dir():
        what = "is there already" if output.exists() else "lies in a folder that is not there"
        sys.exit(f"hf-pretrain-ext: --output {output} {what}: name another file")
    try:
        prompts = Path(options.prompts).read_text(encoding="utf-8").splitlines() if options.prompts else None
        model, tokenizer = _load_model(options.model, options.revision)
        rows = generate_texts(
            model,
            tokenizer,
            options.texts,
            prompts=prompts,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    rows.select_columns("text").to_json(output, force_ascii=False)
    print(f"{len(rows):,} texts of {sum(rows['tokens']):,} tokens in {output}")
    return 0


def _load_model(name: str, revision: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _demo(arguments: list[str]) -> int:
    from transformers import HfArgumentParser

    from hf_pretrain_ext.demo.main import DemoConfig, run_demo

    parser = HfArgumentParser(
        DemoConfig,  # type: ignore[arg-type]  # the parser's annotation knows only generic dataclasses
        prog="hf-pretrain-ext demo",
        description="Pre-trains a small model on English prose, continues it on another domain in several arms that "
        "differ only in plug-ins, and reports what was learned against what was forgotten.",
    )
    (config,) = parser.parse_args_into_dataclasses(arguments)
    run_demo(config)
    return 0


def _recipe_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = _parser(command, description, _RECIPE)
    parser.add_argument("recipe", help="the YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="replace a setting of the file, such as training.max_steps=100; may be given again",
    )
    return parser


def _trainer(options: argparse.Namespace) -> tuple[Recipe, Any]:
    """The recipe given and its extended Trainer; what is wrong with it ends the program in one message."""
    from hf_pretrain_ext.plugin import PluginError
    from hf_pretrain_ext.recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(options.recipe, options.changes)
        return recipe, recipe.build()
    except (FileNotFoundError, PluginError, RecipeError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")


def _plan(arguments: list[str]) -> int:
    parser = _recipe_parser("plan", "Shows what a recipe will do, without training: a table, and a plot as a PNG.")
    parser.add_argument("--output", default="plan.png", metavar="FILE", help="the PNG (default: %(default)s)")
    options = parser.parse_args(arguments)
    from hf_pretrain_ext.report.plots import have_matplotlib

    _, trainer = _trainer(options)
    preview = trainer.preview(options.output if have_matplotlib() and trainer.is_world_process_zero() else None)
    if trainer.is_world_process_zero():
        print(preview)
        print(
            f"\ndrawn in {options.output}"
            if have_matplotlib()
            else "\nno plot without matplotlib: pip install 'hf-pretrain-ext[report]'"
        )
    return 0


def _train(arguments: list[str]) -> int:
    parser = _recipe_parser("train", "Trains a recipe. On several devices: torchrun -m hf_pretrain_ext train RECIPE")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint folder; without a value, from the newest complete one; 'auto': likewise, or "
        "from the start where there is none",
    )
    options = parser.parse_args(arguments)
    recipe, trainer = _trainer(options)
    from hf_pretrain_ext.checkpoint import CheckpointError, last_complete_checkpoint

    if options.resume == "auto":
        options.resume = last_complete_checkpoint(trainer.args.output_dir)[0] is not None
    try:
        trainer.train(resume_from_checkpoint=options.resume)
    except CheckpointError as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        (folder / "recipe.yaml").write_text(recipe.text, "utf-8")
        print(f"model, tokenizer and trace in {folder}{os.sep}; hf-pretrain-ext report {folder} makes a page of it")
    return 0


def _report(arguments: list[str]) -> int:
    parser = _parser(
        "report",
        "Makes one self-contained HTML page from the traces of one or several runs, side by side: plan, learning "
        "rate, losses, mixture, forgetting, stability gap, memory, events, environment. With --watch it follows runs "
        "that go on, on a page of this machine.",
        "With --watch the page is at http://127.0.0.1:PORT/ and is made anew as the traces grow; runs that have not\n"
        "begun are waited for, Ctrl-C ends it. Whoever is logged in to this machine can read it; from another one:\n"
        "ssh -L 8765:127.0.0.1:8765 MACHINE",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the output_dir of a run, or its trace.jsonl")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument(
        "--label", action="append", dest="labels", metavar="TEXT", help="what to call a run; once for each, in order"
    )
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine, and follow the runs")
    parser.add_argument("--port", type=int, metavar="N", help="with --watch; 0: any free one (default: 8765)")
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help="with --watch: between two looks at the traces (default: 5)"
    )
    options = parser.parse_args(arguments)
    given = {"port": options.port, "every": options.every}
    given = {name: value for name, value in given.items() if value is not None}
    if options.watch and options.output is not None:
        parser.error("--watch serves the page and writes no file: leave out --output, or --watch")
    if given and not options.watch:
        parser.error(f"--{next(iter(given))} is for --watch, which is not given")
    try:
        if options.watch:
            from hf_pretrain_ext.report.watch import watch

            watch(options.runs, options.labels, tell=functools.partial(print, flush=True), **given)
            return 0
        from hf_pretrain_ext.report.html import report

        page = report(options.runs, Path(options.output or "report.html"), options.labels)
    except OSError as error:
        sys.exit(f"hf-pretrain-ext: {error.strerror if options.watch and error.strerror else error}")
    except (ImportError, ValueError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    print(f"report in {page}")
    return 0


def _card(arguments: list[str]) -> int:
    parser = _parser(
        "card",
        "Writes what a run recorded into the model card in its folder: lineage, data, methods, what was learned and "
        "forgotten, cost, citation. What stands outside its markers is left alone.",
    )
    parser.add_argument("folder", help="the output_dir of a run, its trace.jsonl, or one of its checkpoints")
    parser.add_argument("--output", metavar="FILE", help="the card (default: README.md in FOLDER)")
    parser.add_argument("--base-model", metavar="NAME", help="on the Hub (default: as recorded)")
    parser.add_argument("--license", help="of the model, as the Hub names it")
    parser.add_argument("--language", action="append", metavar="CODE", help="of the text; once for each")
    parser.add_argument(
        "--data-license", action="append", default=[], metavar="SOURCE=LICENCE", help="of a source; once for each"
    )
    parser.add_argument(
        "--ask-hub", action="store_true", help="ask the Hub which data sets and base are gated, and for their licences"
    )
    options = parser.parse_args(arguments)
    from hf_pretrain_ext.hub_card import write_card
    from hf_pretrain_ext.trace import TRACE_NAME

    folder = Path(options.folder)
    if folder.name == TRACE_NAME and not folder.is_dir():
        folder = folder.parent
    pairs = [pair.partition("=") for pair in options.data_license]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        parser.error(f"--data-license takes SOURCE=LICENCE, got {wrong[0]!r}")
    try:
        card = write_card(
            folder,
            output=options.output,
            base_model=options.base_model,
            metadata={"license": options.license, "language": options.language},
            data_licences={name: licence for name, _, licence in pairs},
            ask_hub=options.ask_hub,
        )
    except OSError as error:
        # Of ours, which say it all, none has a number.
        sys.exit(f"hf-pretrain-ext: {f'no card: {error.strerror} ({error.filename})' if error.strerror else error}")
    except (ImportError, ValueError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    print(f"card in {card}")
    return 0


def _kill_test(arguments: list[str]) -> int:
    parser = _recipe_parser(
        "kill-test",
        "Trains a recipe twice: once left alone, once killed (SIGKILL) at random moments, during saves too, and "
        "resumed until it is done. Then compares weights, optimizer, schedule, counts and logs, bit for bit.",
    )
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="kills come up to this long after a start")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", default="kill_test", metavar="FOLDER", help="for both runs (default: %(default)s)")
    options = parser.parse_args(arguments)
    from hf_pretrain_ext.kill_test import CommandProcess, compare_runs, kill_until_done
    from hf_pretrain_ext.recipe import RecipeError, load_recipe

    try:
        load_recipe(options.recipe, options.changes)
    except (FileNotFoundError, RecipeError) as error:
        sys.exit(f"hf-pretrain-ext: {error}")
    folders = [Path(options.output) / name for name in ("alone", "killed")]
    if any(folder.exists() for folder in folders):
        sys.exit(f"hf-pretrain-ext: {options.output} holds an earlier test; name another --output, or remove it")
    changes = [part for change in options.changes for part in ("--set", change)]

    def start(folder: Path) -> CommandProcess:
        place = ["--set", f"training.output_dir={folder}", "--resume", "auto"]
        return CommandProcess(["train", options.recipe, *changes, *place], Path(f"{folder}.log"))

    if start(folders[0]).exit_code():
        sys.exit(f"hf-pretrain-ext: the recipe does not train; see {folders[0]}.log")
    report = kill_until_done(
        lambda: start(folders[1]), folders[1], options.kills, seed=options.seed, seconds=options.seconds
    )
    report.differences = compare_runs(*folders)
    print(report)
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
