"""`python -m repvgg_deploy` lists the programs."""

from __future__ import annotations

import sys
import textwrap

from . import __version__
from .cli.export import DESCRIPTION as EXPORT
from .cli.trt import DESCRIPTION as TRT


def main() -> int:
    """Prints the programs, with what each does."""
    sys.stdout.write(f"repvgg-deploy {__version__}\n\n")
    for name, text in (("repvgg-export", EXPORT), ("repvgg-trt", TRT)):
        sys.stdout.write(textwrap.fill(f"{name:<15}{text}", 80, subsequent_indent=" " * 15) + "\n")
    sys.stdout.write("\nEach says more with --help.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
