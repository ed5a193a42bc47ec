"""What reparameterization gains: training form against deploy form in speed and memory, and the time by operator.

    python benchmarks/reparameterize.py --variants A0 B0 B1g4 --batches 1 8

Both forms of a variant run interleaved in one process, so that a busy machine slows both alike; figures are medians.
One thread by default: then the CPU time is that of the form alone, however busy the machine is (two threads that share
their cores with another program mostly wait for each other). Peak memory is measured in a process of its own for each
form.

The profile answers why one branch is about twice as fast although the 3×3 convolution, nearly all of the
multiply-accumulates, stays. Beside the times stand the counts that do not depend on this machine: operator calls
(kernel launches on a GPU), bytes moved, and multiply-accumulates. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is loaded: its profiler logs two lines a pass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from repvgg_deploy.model.block import DeployBlock, SEBlock, TrainingBlock
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import Form
from repvgg_deploy.specs.variants import get_variant

RESULTS = Path(__file__).resolve().parent / "results" / "reparameterize.json"
GROUPS = ("3×3 conv", "1×1 conv", "BatchNorm", "add", "ReLU", "SE, pool, linear", "copies, other")
REMOVED = ("1×1 conv", "BatchNorm", "add")  # a deploy form has none of these
FORMS: tuple[Form, Form] = ("training", "deploy")
EXPLANATION = """\
The 3×3 convolution stays, and with it nine tenths of the multiply-accumulates. What goes is traffic and calls: each
branch writes a map of the output's size, its BatchNorm reads it and writes another, and each addition reads two and
writes a third. What that costs depends on the machine. Where arithmetic is short, the 1×1 convolution is most of it: it
does little with each number it reads."""


@dataclass(slots=True)
class Work:
    """The work of a group of operators for one batch, counted from shapes; bytes read and written, with weights."""

    calls: int = 0
    macs: int = 0
    bytes_moved: int = 0


@dataclass(slots=True)
class FormResult:
    """One form of one variant at one batch size.

    Attributes:
        latency_ms: Median wall time of a forward pass.
        cpu_ms: Median CPU time of all threads.
        latencies_ms: All wall times, in the order measured.
        peak_rss_mb: Largest resident memory of a process that builds this form and runs it, beyond that of PyTorch
            itself.
        parameters: Learned parameters.
        time_ms: Self time by group of operators, from the profiler: each call's shortest of a few passes.
        work: Counts by group of operators.
    """

    latency_ms: float
    cpu_ms: float
    latencies_ms: list[float]
    peak_rss_mb: float
    parameters: int
    time_ms: dict[str, float] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)


def main() -> int:
    args = parse_args()
    if args.measure_memory:
        return print_peak_memory(*args.measure_memory, image_size=args.image_size)
    torch.set_num_threads(args.threads)
    pairs = []
    for name in args.variants:
        forms = build_forms(name)
        for batch in args.batches:
            x = torch.rand(batch, 3, args.image_size, args.image_size)
            pair = measure_pair(name, forms, x, args)
            pairs.append((name, batch, pair))
            print_pair(name, batch, pair)
    print_answer(pairs)
    results = [
        {"variant": name, "batch": batch, "forms": {form: asdict(r) for form, r in pair.items()}}
        for name, batch, pair in pairs
    ]
    report = {"machine": describe_machine(args), "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.out}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["A0", "B0", "B1g4"], metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="measurements of each form (default: 15)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--measure-memory", nargs=3, metavar=("VARIANT", "FORM", "BATCH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build_forms(name: str) -> dict[Form, RepVGG]:
    """Training form in `eval()` and its deploy form."""
    torch.manual_seed(0)
    training = RepVGG(get_variant(name)).eval()
    for module in training.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return {"training": training, "deploy": reparameterize(training)}


@torch.inference_mode()
def measure_pair(name: str, forms: dict[Form, RepVGG], x: Tensor, args: argparse.Namespace) -> dict[Form, FormResult]:
    wall: dict[Form, list[float]] = {form: [] for form in FORMS}
    cpu: dict[Form, list[float]] = {form: [] for form in FORMS}
    for form in FORMS:
        forms[form](x)
    for _ in range(args.repeats):
        for form in FORMS:
            start, cpu_start = time.perf_counter(), time.process_time()
            forms[form](x)
            cpu[form].append(1e3 * (time.process_time() - cpu_start))
            wall[form].append(1e3 * (time.perf_counter() - start))
    profiles = profile_by_group(forms, x)
    return {
        form: FormResult(
            latency_ms=statistics.median(wall[form]),
            cpu_ms=statistics.median(cpu[form]),
            latencies_ms=[round(value, 3) for value in wall[form]],
            peak_rss_mb=measure_peak_memory(name, form, len(x), args),
            parameters=sum(parameter.numel() for parameter in forms[form].parameters()),
            time_ms=profiles[form],
            work=count_work(forms[form], x),
        )
        for form in FORMS
    }


def measure_peak_memory(name: str, form: Form, batch: int, args: argparse.Namespace) -> float:
    options = ["--image-size", str(args.image_size), "--measure-memory", name, form, str(batch)]
    command = [sys.executable, __file__, *options]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@torch.inference_mode()
def print_peak_memory(name: str, form: Form, batch: str, *, image_size: int) -> int:
    torch.set_num_threads(1)
    before = peak_rss_mb()
    model = RepVGG(get_variant(name), form).eval()
    model(torch.rand(int(batch), 3, image_size, image_size))
    print(peak_rss_mb() - before)
    return 0


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far."""
    try:
        # Not ru_maxrss where it can be helped: on Linux a child process begins with its parent's.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def profile_by_group(forms: dict[Form, RepVGG], x: Tensor, passes: int = 9) -> dict[Form, dict[str, float]]:
    """Self time of a forward pass in ms by group of operators.

    It adds up each call's shortest time of a few passes, because disturbances only make a call longer.
    """
    calls: dict[Form, list[tuple[str, float]]] = {}
    for _ in range(passes):
        for form in FORMS:
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
                forms[form](x)
            # A pass makes the same calls in the same order every time.
            found = [
                (group_of_operator(event.name, event.input_shapes), event.self_cpu_time_total / 1e3)
                for event in recorded.events()
            ]
            calls[form] = [
                (group, min(spent, least))
                for (group, spent), (_, least) in zip(found, calls.get(form, found), strict=True)
            ]
    return {
        form: {group: sum(spent for owner, spent in found if owner == group) for group in GROUPS}
        for form, found in calls.items()
    }


def group_of_operator(key: str, shapes: list[Any]) -> str:
    kernel = tuple(shapes[1][2:]) if len(shapes) > 1 and len(shapes[1]) == 4 else ()
    if "conv" in key and kernel in ((3, 3), (1, 1)):
        squeezed = len(shapes[0]) == 4 and shapes[0][2:] == [1, 1] and kernel == (1, 1)
        return "SE, pool, linear" if squeezed else f"{kernel[0]}×{kernel[1]} conv"
    for part, group in (("batch_norm", "BatchNorm"), ("add", "add"), ("relu", "ReLU"), ("clamp_min", "ReLU")):
        if part in key and "addmm" not in key:
            return group
    return (
        "SE, pool, linear"
        if any(part in key for part in ("mean", "pool", "linear", "addmm", "sigmoid", "mul"))
        else "copies, other"
    )


def count_work(model: RepVGG, x: Tensor) -> dict[str, Work]:
    """Counts by group from the shapes of a forward pass, as if nothing were fused or kept in a cache."""
    work = {group: Work() for group in GROUPS}

    def count(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(block, (TrainingBlock, DeployBlock))
        count_block(work, block, inputs[0].numel(), output)

    handles = [block.register_forward_hook(count) for block in model.blocks().values()]
    features = model.stage_outputs(x)["stage4"]
    for handle in handles:
        handle.remove()
    head = model.linear
    add_work(work["SE, pool, linear"], 1, 0, features.numel())
    add_work(work["SE, pool, linear"], 1, len(x) * head.weight.numel(), head.weight.numel())
    return work


def add_work(entry: Work, calls: int, macs: int, elements: int) -> None:
    entry.calls += calls
    entry.macs += macs
    entry.bytes_moved += 4 * elements


def count_block(work: dict[str, Work], block: TrainingBlock | DeployBlock, read: int, output: Tensor) -> None:
    """Adds the work of one block with `read` input elements; every operator reads and writes memory."""
    out, positions = output.numel(), output.numel() // output.shape[1]
    kernels = (
        [block.rbr_reparam.weight]
        if isinstance(block, DeployBlock)
        else [b.kernel for b in block.branches() if b.kernel is not None]
    )
    for kernel in kernels:
        size = kernel.shape[-1]
        add_work(work[f"{size}×{size} conv"], 1, positions * kernel.numel(), read + out + kernel.numel())
    if isinstance(block, TrainingBlock):
        branches = block.branches()
        normalised = sum(branch.bn is not None for branch in branches) + (block.post_bn is not None)
        add_work(work["BatchNorm"], normalised, 0, normalised * (2 * out + 4 * output.shape[1]))
        add_work(work["add"], len(branches) - 1, 0, (len(branches) - 1) * 3 * out)
    add_work(work["ReLU"], 1, 0, 2 * out)
    for se in (block.se, block.post_se):
        if isinstance(se, SEBlock):
            weights = sum(parameter.numel() for parameter in se.parameters())
            add_work(work["SE, pool, linear"], 6, len(output) * weights, 3 * out + weights)


def print_pair(name: str, batch: int, pair: dict[Form, FormResult]) -> None:
    training, deploy = pair["training"], pair["deploy"]
    ratio, cpu_ratio = training.latency_ms / deploy.latency_ms, training.cpu_ms / deploy.cpu_ms
    print(
        f"\n{name}, batch {batch}: {arrow(training.latency_ms, deploy.latency_ms, '.1f')} ms, {ratio:.2f} × as fast; ",
        end="",
    )
    print(f"CPU {arrow(training.cpu_ms, deploy.cpu_ms, '.1f')} ms, {cpu_ratio:.2f} ×; ", end="")
    print(f"memory {arrow(training.peak_rss_mb, deploy.peak_rss_mb, '.0f')} MB; ", end="")
    print(f"parameters {arrow(training.parameters / 1e6, deploy.parameters / 1e6, '.2f')} M")
    print(f"  {'':<18}{'self time, ms':>18}{'calls':>14}{'GMACs':>16}{'MB moved':>18}")
    for group in GROUPS:
        t, d = training.work[group], deploy.work[group]
        print_row(group, (training.time_ms[group], deploy.time_ms[group]), t, d)
    print_row("all", (sum(training.time_ms.values()), sum(deploy.time_ms.values())), total(training), total(deploy))


def print_row(name: str, times: tuple[float, float], before: Work, after: Work) -> None:
    macs = arrow(before.macs / 1e9, after.macs / 1e9, ".2f")
    moved = arrow(before.bytes_moved / 1e6, after.bytes_moved / 1e6, ".0f")
    calls = arrow(before.calls, after.calls, "d")
    print(f"  {name:<18}{arrow(*times, '.1f'):>18}{calls:>14}{macs:>16}{moved:>18}")


def arrow(before: float, after: float, form: str) -> str:
    return f"{before:{form}} → {after:{form}}"


def total(result: FormResult) -> Work:
    works = result.work.values()
    return Work(sum(w.calls for w in works), sum(w.macs for w in works), sum(w.bytes_moved for w in works))


def print_answer(pairs: list[tuple[str, int, dict[Form, FormResult]]]) -> None:
    """Prints why one branch is faster although the 3×3 convolution stays: how the training form's time is spent."""
    print(f"\nShares of the training form's time; how much `faster` it is without {', '.join(REMOVED)}; counts left")
    groups = "".join(f"{group:>18}" for group in GROUPS)
    print(f"  {'':<16}{groups}{'faster':>10}{'MACs':>7}{'bytes':>7}{'calls':>7}")
    for name, batch, pair in pairs:
        training, deploy = pair["training"], pair["deploy"]
        spent = sum(training.time_ms.values())
        shares = "".join(f"{training.time_ms[group] / spent:>18.0%}" for group in GROUPS)
        faster = spent / (spent - sum(training.time_ms[group] for group in REMOVED))
        before, after = total(training), total(deploy)
        ratios = (after.macs / before.macs, after.bytes_moved / before.bytes_moved, after.calls / before.calls)
        kept = "".join(f"{ratio:>7.0%}" for ratio in ratios)
        print(f"  {f'{name}, batch {batch}':<16}{shares}{faster:>8.2f} ×{kept}")
    print(EXPLANATION)
    for name, batch, pair in pairs:
        training = pair["training"]
        costs = [
            f"{group} {training.time_ms[group] / (training.work[group].macs / 1e9):.1f} ms per GMAC"
            for group in ("3×3 conv", "1×1 conv")
        ]
        print(f"  {f'{name}, batch {batch}':<16}{', '.join(costs)}")


def describe_machine(args: argparse.Namespace) -> dict[str, object]:
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "image_size": args.image_size,
        "repeats": args.repeats,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    raise SystemExit(main())
