"""The program `repvgg-trt`: what is done with an exported model. Each command is a file beside this one."""

from __future__ import annotations

import argparse
import sys

from .advise import COMMAND as ADVISE
from .bench import COMMAND as BENCH
from .build import COMMAND as BUILD
from .check import COMMAND as CHECK
from .common import Command, HelpFormatter, Parser, add_completion, parent_parser, run
from .compare import COMMAND as COMPARE
from .doctor import COMMAND as DOCTOR
from .eval import COMMAND as EVAL
from .fold import COMMAND as FOLD
from .infer import COMMAND as INFER
from .inspect import COMMAND as INSPECT
from .quantize import COMMAND as QUANTIZE
from .triton import COMMAND as TRITON

DESCRIPTION = "Folds, quantizes, builds, runs, measures and describes models; repvgg-export makes them of checkpoints."
COMMANDS = (INFER, INSPECT, FOLD, QUANTIZE, BUILD, CHECK, TRITON, EVAL, COMPARE, BENCH, ADVISE, DOCTOR)


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: Arguments without the program's name; None takes the command line's.

    Returns:
        The exit code; see `common`. `--help`, `--version` and usage errors raise SystemExit, as argparse does.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help()
        return 0
    args, unknown = parser.parse_known_args(words)
    if unknown:  # said by the command's own parser, which knows what was meant
        args.usage_error(f"unrecognized arguments: {' '.join(unknown)}")
    command: Command = args.chosen
    conflict = command.find_conflict(args) if command.find_conflict is not None else None
    if conflict is not None:
        args.usage_error(conflict)
    return run(command.execute, args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="repvgg-trt", description=DESCRIPTION, parents=[parent_parser()])
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        child = commands.add_parser(
            command.name,
            parents=[parent_parser()],
            help=command.summary,
            description=command.description,
            epilog=command.examples,
            formatter_class=HelpFormatter,
            conflict_handler="resolve",  # `triton --version N` is the version of the model
        )
        command.add_options(child)
        child.set_defaults(chosen=command, usage_error=child.error)
    return parser


if __name__ == "__main__":
    sys.exit(main())
