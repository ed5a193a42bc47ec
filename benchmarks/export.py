"""Wall time and peak memory of an export, beside the plain recipe, in one run.

The plain recipe is what people write today: build the training form, load the checkpoint, fold every block,
`torch.onnx.export`, `onnxsim.simplify`, save, and compare one random batch in ONNX Runtime with the deploy model. Ours
compares every block and the whole network in float64 and float32 with the training form, checks the graph contract, and
compares the file with the training-mode model on several batches.

Each runs in a process of its own, imports included, and they take turns; figures are medians. The checkpoint has the
real size and random weights.

    python benchmarks/export.py --variant B2 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "export.json"


def make_checkpoint(variant: str, path: Path) -> None:
    """A training-form checkpoint with He-initialised kernels and random BatchNorm statistics."""
    import torch
    from torch import nn

    from repvgg_deploy.model.network import RepVGG
    from repvgg_deploy.specs.variants import get_variant

    torch.manual_seed(0)
    model = RepVGG(get_variant(variant))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    torch.save(model.state_dict(), path)


def run_plain(variant: str, checkpoint: Path, out: Path, dynamo: bool) -> None:
    """Exports as people do without this project."""
    import numpy as np
    import onnx
    import onnxruntime
    import onnxsim
    import torch

    from repvgg_deploy.model.network import RepVGG
    from repvgg_deploy.specs.variants import get_variant
    from repvgg_deploy.upstream import repvgg_model_convert

    model = RepVGG(get_variant(variant))
    model.load_state_dict(torch.load(checkpoint, weights_only=True))  # noqa: TID251 - what the plain recipe does
    deploy = repvgg_model_convert(model.eval())
    x = torch.randn(1, 3, 224, 224)
    if dynamo:
        options: dict[str, Any] = {"external_data": False, "opset_version": 18}
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    else:
        options = {"opset_version": 17, "dynamic_axes": {"input": {0: "batch"}, "logits": {0: "batch"}}}
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(deploy, (x,), str(out), dynamo=dynamo, **names, **options)
    simplified, valid = onnxsim.simplify(onnx.load(out))
    assert valid
    onnx.save(simplified, out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], deploy(x).numpy(), rtol=1e-3, atol=1e-3)


def run_ours(variant: str, checkpoint: Path, out: Path) -> None:
    """Exports with repvgg-export."""
    from repvgg_deploy.cli.export import main

    status = main(["--arch", variant, "--ckpt", str(checkpoint), "--out", str(out), "--force"])
    assert status == 0, status


def measure(arguments: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident megabytes of a child process."""
    start = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, __file__, *arguments])
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} failed with status {status}")
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def compare(variant: str, repeats: int, recipes: list[str]) -> dict[str, dict[str, float]]:
    """Medians by recipe; the recipes take turns, so that other load on the machine slows all alike."""
    runs: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in recipes}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint.pth")
        # In a child as well: on Linux a child's peak starts at its parent's size, so the parent must stay small.
        measure(["--child", "make", "--variant", variant, "--checkpoint", str(checkpoint)])
        for _ in range(repeats):
            for recipe in recipes:
                out = Path(folder, f"{recipe}.onnx")
                out.unlink(missing_ok=True)  # or ours would compare it with the file of the turn before
                files = ["--checkpoint", str(checkpoint), "--out", str(out)]
                spent = measure(["--child", recipe, "--variant", variant, *files])
                runs[recipe].append(spent)
                print(f"  {recipe:8} {spent['seconds']:6.1f} s {spent['peak_mb']:6.0f} MB", file=sys.stderr)
    return {
        recipe: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for recipe, found in runs.items()
    }


def main() -> None:
    """Measures, prints a table, and writes `results/export.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["plain", "ours"], choices=["plain", "dynamo", "ours"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "make":
        make_checkpoint(args.variant, args.checkpoint)
    elif args.child == "ours":
        run_ours(args.variant, args.checkpoint, args.out)
    elif args.child:
        run_plain(args.variant, args.checkpoint, args.out, args.child == "dynamo")
    else:
        report(args)


def report(args: argparse.Namespace) -> None:
    """Runs the comparison and writes what it found."""
    medians = compare(args.variant, args.repeats, args.recipes)
    print(f"\n{args.variant}, median of {args.repeats}\n{'recipe':10}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}")
    for recipe, row in medians.items():
        print(f"{recipe:10}{row['seconds']:8.1f}{row['cpu_seconds']:8.1f}{row['peak_mb']:9.0f}")
    RESULTS.parent.mkdir(exist_ok=True)
    from repvgg_deploy.measure.peaks import cpu_name

    machine = f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}"
    RESULTS.write_text(
        json.dumps({"variant": args.variant, "repeats": args.repeats, "machine": machine, "medians": medians}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
