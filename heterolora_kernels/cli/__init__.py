"""The command ``heterolora``: one file a command, each with ``add_arguments(parser)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from heterolora_kernels._version import __version__

#: ``{command: what it does}``; the file of the same name is imported when the command is used.
COMMANDS = {
    "demo": "fine-tune a small real encoder on real sentence pairs, its ranks chosen while it trains",
    "train": "fine-tune any model on any data, its ranks chosen while it trains",
    "search": "choose ranks once, as a rank pattern that PEFT reads",
    "plot": "draw what a run did",
    "info": "what runs here, and what a model would get",
    "bench": "measure the kernels against the frozen linear and PEFT",
    "compile": "compile the GPU kernels ahead of time, without a GPU, and report on each build",
    "export": "write an adapter for PEFT, vLLM, or merged into the model",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(prog="heterolora", description="Rank allocation for LoRA (HeteroLoRA, arXiv 2406.14956).")
    parser.add_argument("--version", action="version", version=f"heterolora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"heterolora_kernels.cli.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 it failed, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough; what is left in the buffer must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"heterolora {args.command}: {message} (--debug shows where)", file=sys.stderr)
        return 1
