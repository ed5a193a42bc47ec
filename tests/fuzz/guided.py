"""Coverage-guided fuzzing of what reads foreign files: any input ends in a value or in one of our errors.

    python -m tests.fuzz.guided checkpoint --minutes 60 --corpus FOLDER
    python -m tests.fuzz.guided onnx --minutes 60 --corpus FOLDER
    python -m tests.fuzz.guided passport --minutes 60 --corpus FOLDER     (and the other formats of `small_files`)

Needs atheris (Linux, `pip install atheris`). Inputs that reached new code stay in the corpus; an input that ends in
another exception, in more than 2 GB or in more than 30 s is left beside the corpus as `crash-…`, `oom-…`, `timeout-…`,
and the program exits with another code than 0. `make long` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["repvgg_deploy"]):
    from repvgg_deploy.errors import RepVGGDeployError
    from repvgg_deploy.files import onnx as onnx_file
    from repvgg_deploy.model.checkpoint.load import load_checkpoint
    from tests.fuzz.small_files import FORMATS

from tests.fuzz.checkpoint_mutations import make_seeds
from tests.runtime.make_model import make_onnx


def read_checkpoint(path: Path) -> None:
    """What an export reads first."""
    load_checkpoint(path)


def read_onnx(path: Path) -> None:
    """What every command and the Engine read first."""
    with contextlib.suppress(RepVGGDeployError):
        onnx_file.read_graph(path)
    onnx_file.read_metadata(path)


def read_small(name: str, path: Path) -> None:
    """One of the formats of `small_files`."""
    FORMATS[name].read(path.parent, path.read_bytes())


READERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": read_checkpoint,
    "onnx": read_onnx,
    **{name: partial(read_small, name) for name in FORMATS},
}


def main() -> None:
    """Fuzzes one reader for some minutes; atheris ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--corpus", type=Path, required=True)
    args = parser.parse_args()
    args.corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.reader == "checkpoint":
            seeds = make_seeds(folder)
        elif args.reader in FORMATS:
            seeds = [FORMATS[args.reader].make()]
        else:
            seeds = [make_onnx(folder / "m.onnx").read_bytes()]
        for index, seed in enumerate(seeds):
            (args.corpus / f"seed-{index}").write_bytes(seed)
        file = folder / "input"

        def one(data: bytes) -> None:
            file.write_bytes(data)
            with contextlib.suppress(RepVGGDeployError):
                READERS[args.reader](file)

        found = f"-artifact_prefix={args.corpus.parent}/"
        limits = [
            found,
            f"-max_total_time={round(60 * args.minutes)}",
            "-max_len=65536",
            "-rss_limit_mb=2048",
            "-timeout=30",
        ]
        atheris.Setup([sys.argv[0], str(args.corpus), *limits, "-verbosity=0", "-print_final_stats=1"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
