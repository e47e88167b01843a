"""The command line: `hf-pretrain-ext demo` and `hf-pretrain-ext plugins`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


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
    commands.add_parser("demo", add_help=False, help="the main job on real text, about ten minutes on two cores")
    commands.add_parser("plugins", add_help=False, help="list the plug-ins that are installed, other packages' too")
    command, rest = parser.parse_args(given[:1]).command, given[1:]
    return {"demo": _demo, "plugins": _plugins}[command](rest)


def _plugins(arguments: list[str]) -> int:
    from hf_pretrain_ext.registry import installed_plugins

    argparse.ArgumentParser(
        prog="hf-pretrain-ext plugins",
        description="Lists the plug-ins that are installed: name, class, and what it does.",
    ).parse_args(arguments)
    for name, plugin in installed_plugins().items():
        summary = (plugin.__doc__ or "").strip().splitlines()[0]
        print(f"{name:<12} {plugin.__module__}.{plugin.__qualname__}\n{'':<12} {summary}")
    return 0


def _demo(arguments: list[str]) -> int:
    from transformers import HfArgumentParser

    from hf_pretrain_ext.demo.main import DemoConfig, run_demo

    parser = HfArgumentParser(
        DemoConfig,  # type: ignore[arg-type]  # the parser's annotation knows only generic dataclasses
        prog="hf-pretrain-ext demo",
        description="Pre-trains a small model on English prose, continues it on another domain in four arms that "
        "differ only in plug-ins, and reports what was learned against what was forgotten.",
    )
    (config,) = parser.parse_args_into_dataclasses(arguments)
    run_demo(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
