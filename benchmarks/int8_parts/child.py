"""One step of the INT8 benchmark in a process of its own, which its parent measures. Ends with a line of JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["prepare", "quantize", "score", "machine"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("arguments", type=json.loads)
    args = parser.parse_args()
    print(json.dumps(answer(args.step, args.folder, args.arguments)))


def answer(step: str, folder: Path, arguments: dict[str, Any]) -> Any:
    """Runs a step; what it needs is imported here, so that no step pays for another."""
    if step == "prepare":
        from .data import prepare

        return prepare(folder=folder, **arguments)
    if step == "quantize":
        from .methods import quantize

        quantize(folder=folder, target=folder / arguments.pop("target"), **arguments)
        return {}
    if step == "score":
        from .score import score

        return score(folder, folder / arguments["graph"], arguments["subject"])
    from .report import describe_machine

    return describe_machine()


if __name__ == "__main__":
    main()
