"""`python -m repvgg_deploy` lists the programs."""

from __future__ import annotations

import sys

from . import __version__
from .cli.export import DESCRIPTION as EXPORT
from .cli.trt import DESCRIPTION as TRT


def main() -> int:
    """Prints the programs, with what each does."""
    sys.stdout.write(
        f"repvgg-deploy {__version__}\n\nrepvgg-export  {EXPORT}\nrepvgg-trt     {TRT}\n\nEach says more with --help.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
