"""Scores a folder of images, or a Parquet file with a column of them, on Ray: one Engine in each worker.

    pip install '.[ray,cpu]'
    python examples/score_on_ray.py sample.onnx models/sample/images --out scores

Writes Parquet files into a folder. A worker that dies is replaced, and its batches are computed again. On a cluster
give --address, and paths that all of its machines see.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import ray

from repvgg_deploy.runtime import EngineOptions
from repvgg_deploy.serving.ray import ImageScorer
from repvgg_deploy.serving.scoring import ScoringOptions


def start_ray(address: str | None, workers: int) -> None:
    """Joins a cluster, or starts one here with a core for each worker and one for what reads and writes."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if address is not None:
        ray.init(address=address)
    else:
        ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)


def read(source: Path) -> Any:
    """A dataset with a column `bytes` and, of a folder, `path`."""
    if source.suffix == ".parquet":
        return ray.data.read_parquet(str(source))
    return ray.data.read_binary_files(str(source), include_paths=True)


def score(model: Path, source: Path, out: Path, *, workers: int, batch_size: int, top: int) -> float:
    """Writes the scores; gives the seconds that it took."""
    start = time.perf_counter()
    # One core for each worker: where many run at once, more threads would only wait for each other.
    keywords = {"options": ScoringOptions(top=top), "engine": EngineOptions(intra_op_threads=1)}
    scores = read(source).map_batches(
        ImageScorer,
        fn_constructor_args=[str(model.resolve())],
        fn_constructor_kwargs=keywords,
        batch_size=batch_size,
        concurrency=workers,
    )
    scores.write_parquet(str(out.resolve()))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "source", type=Path, help="a folder of images, or a .parquet with a column bytes, image or path"
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for Parquet files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--address", help="of a cluster; else one is started on this machine")
    args = parser.parse_args()
    start_ray(args.address, args.workers)
    sizes = {"workers": args.workers, "batch_size": args.batch_size, "top": args.top}
    seconds = score(args.model, args.source, args.out, **sizes)
    rows = ray.data.read_parquet(str(args.out.resolve())).count()
    print(f"{args.out}: {rows:,} rows, {seconds:.1f} s")


if __name__ == "__main__":
    main()
