"""Networks in training form before and after folding by algebra: speed in ONNX Runtime, work, size, and its own time.

Networks: four of each block of the tests (`tests/export/make_modules.py`) in a row, 64 channels at 56×56, each behind a
SiLU; RepVGG-A0; the trained sample. Before: what torch's exporter writes, simplified by onnxsim without its merging of
BatchNorm into convolutions, which ONNX Runtime does itself when it opens a file. After: the same file through
`fold_branches`. Both run in turns, one thread, one image; figures are medians of
CPU time, which other load on the machine disturbs least.

The aim: folding and its proof take no more CPU time than tracing and simplifying. The exit code says whether it is met.

    python benchmarks/fold.py --repeats 30
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fold.json"
SIDE, DEPTH, CHANNELS, OPSET, SAMPLE_SIDE = 56, 4, 64, 17, 32
sys.path.insert(0, str(ROOT))

from benchmarks.reparameterize import processor_name  # noqa: E402
from repvgg_deploy.export.graph import simplify, trace  # noqa: E402
from repvgg_deploy.graph.fold import FoldReport, fold_branches  # noqa: E402
from repvgg_deploy.model import build_model, load_checkpoint  # noqa: E402
from repvgg_deploy.model.network import RepVGG  # noqa: E402
from repvgg_deploy.specs.values import TensorSpec  # noqa: E402
from repvgg_deploy.specs.variants import get_variant  # noqa: E402
from tests.export import make_modules  # noqa: E402
from tests.model.random_blocks import randomise  # noqa: E402


def make_networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module in `eval()` and an image."""
    make_modules.CHANNELS = CHANNELS
    for name, (block, _) in make_modules.BLOCKS.items():
        torch.manual_seed(0)
        parts = [nn.Sequential(block(), nn.SiLU()) for _ in range(1 if "stride" in name else DEPTH)]
        yield name, randomised(nn.Sequential(*parts)), torch.randn(1, CHANNELS, SIDE, SIDE)
    yield "RepVGG-A0", randomised(RepVGG(get_variant("A0"))), torch.randn(1, 3, 224, 224)
    sample = build_model(load_checkpoint(ROOT / "models" / "sample" / "repvgg-sample.pth"))
    yield "sample", sample.eval(), torch.randn(1, 3, SAMPLE_SIDE, SAMPLE_SIDE)


def randomised(module: nn.Module) -> nn.Module:
    """With random BatchNorm, in `eval()`."""
    randomise(module)
    return module.eval()


def fold(module: nn.Module, x: Tensor) -> tuple[onnx.ModelProto, onnx.ModelProto, FoldReport, dict[str, float]]:
    """The graph before and after, what was folded, and CPU seconds by stage."""
    with torch.no_grad():
        image = TensorSpec("input", "float32", tuple(x.shape), "NCHW")
        result = TensorSpec("output", "float32", tuple(module(x).shape), "other")
        marks = [time.process_time()]
        traced = trace(module, x, opset=OPSET, tensors=(image, result), with_weights=True)
        marks.append(time.process_time())
        before = simplify(traced, keep_batchnorm=True)
        marks.append(time.process_time())
        after, report = fold_branches(before)
        marks.append(time.process_time())
    seconds = {name: marks[i + 1] - marks[i] for i, name in enumerate(("trace", "simplify", "fold and proof"))}
    return before, after, report, seconds


def time_pair(models: tuple[onnx.ModelProto, onnx.ModelProto], x: Tensor, repeats: int) -> tuple[list[float], float]:
    """Median CPU milliseconds of both in ONNX Runtime, run in turns, and how far their results are apart."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for model in models
    ]
    feed = {"input": x.numpy()}
    results = [session.run(None, feed)[0] for session in sessions]
    spent: list[list[float]] = [[], []]
    for _ in range(repeats):
        for session, found in zip(sessions, spent, strict=True):
            start = time.process_time()
            session.run(None, feed)
            found.append(1e3 * (time.process_time() - start))
    error = float(np.max(np.abs(results[0] - results[1])) / np.max(np.abs(results[0])))
    return [statistics.median(found) for found in spent], error


def measure(name: str, module: nn.Module, x: Tensor, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    before, after, report, seconds = fold(module, x)
    (slow, fast), error = time_pair((before, after), x, repeats)
    kernels = list(dict.fromkeys(one.kernels for one in report.folds))
    counts = [sum(node.op_type == "Conv" for node in model.graph.node) for model in (before, after)]
    return {
        "network": name,
        "regions_folded": len(report.folds),
        "kernels": kernels[:3],
        "sums_left": [reason for _, reason in report.left],
        "convolutions": counts,
        "macs_share": float(sum(f.macs_after for f in report.folds) / sum(f.macs_before for f in report.folds)),
        "bytes": [model.ByteSize() for model in (before, after)],
        "cpu_milliseconds": [slow, fast],
        "relative_difference": error,
        "cpu_seconds": seconds,
    }


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    (many, few), (slow, fast), (large, small) = row["convolutions"], row["cpu_milliseconds"], row["bytes"]
    spent = row["cpu_seconds"]
    print(
        f"{row['network']:<22}{f'{many} → {few}':>10}{row['macs_share'] - 1:>+9.0%}{small / large - 1:>+8.0%}"
        f"{f'{slow:.2f} → {fast:.2f}':>17}{slow / fast:>7.2f} ×"
        f"{spent['trace'] + spent['simplify']:>9.2f}{spent['fold and proof']:>7.2f}",
        flush=True,
    )


def main() -> int:
    """Measures, prints a table, and writes `results/fold.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"{'network':<22}{'convs':>10}{'MACs':>9}{'bytes':>8}{'CPU ms':>17}{'faster':>9}{'trace+s':>9}{'fold':>7}",
        flush=True,
    )
    rows = []
    for name, module, x in make_networks():
        rows.append(measure(name, module, x, args.repeats))
        print_row(rows[-1])
    late = [
        row["network"]
        for row in rows
        if row["cpu_seconds"]["fold and proof"] > row["cpu_seconds"]["trace"] + row["cpu_seconds"]["simplify"]
    ]
    print(f"folding took longer than tracing and simplifying: {', '.join(late) or 'nowhere'}")
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "command": f"python benchmarks/fold.py --repeats {args.repeats}",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "results": rows}, indent=1, ensure_ascii=False) + "\n")
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
