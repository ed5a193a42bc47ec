"""`repvgg-trt advise`: which variant, batch size and precision to take."""

from __future__ import annotations

import argparse
import math
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, say_install
from .bench import add_batch_option
from .common import Command, Output, parse_names, parse_number, parse_whole
from .terminal import format_pairs, format_table

if TYPE_CHECKING:
    from ..measure.advice import Advice, Assumptions, Choice, Measured, Nearest, Wish
    from ..measure.roofline import Ceiling

EXAMPLES = """examples:
  repvgg-trt advise --slo-ms 2 --min-top1 77 --gpu t4
  repvgg-trt advise --min-top1 77 --batch 1 --precision fp16 --gpu a10
  repvgg-trt advise --slo-ms 20 --measured a0.json b0.json
"""
_PRECISIONS = ("fp32", "fp16", "int8")
_NOTE_COLUMNS = 68  # beside the names of the notes, within 80
_GROUPED = (
    "variants with groups (…g2, …g4) lose at batch 1, although they have fewer multiply-accumulates: each group is a "
    "small product of its own that does not fill a GPU. TensorRT 8.0 in FP32 on a V100 (PaddleClas): B1g4 takes "
    "{0:.2f} ms where B1 takes {1:.2f} at batch 1, but {2:.2f} where B1 takes {3:.2f} at batch 8"
)


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """What is asked for, of which device, and what estimates rest on."""
    milliseconds = partial(parse_number, least=1e-3, most=1e6, what="milliseconds from 0.001 on")
    percent = partial(parse_number, least=0, most=100, what="a percentage from 0 to 100")
    share = partial(parse_number, least=0.01, most=1.0, what="a share from 0.01 to 1")
    names = partial(parse_names, known=_PRECISIONS)
    amount = partial(parse_number, least=0, most=1e4, what="a number from 0 to 10000")
    parser.add_argument("--slo-ms", type=milliseconds, metavar="MS",
                        help="the longest that a batch may take (default: any time)")
    parser.add_argument("--min-top1", type=percent, metavar="PERCENT",
                        help="the least top-1 on ImageNet-1k (default: any)")
    parser.add_argument("--gpu", metavar="NAME",
                        help="estimate for this GPU what was not measured: t4, a10, rtx4090… (default: the GPU that is "
                             "here)")
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE",
                        help="files of repvgg-trt bench --out; they win over estimates")
    add_batch_option(parser)
    parser.add_argument("--precision", type=names, default=_PRECISIONS, metavar="NAME,…",
                        help="of fp32, fp16, int8 (default: all)")
    parser.add_argument("--top", type=parse_whole, default=10, metavar="N",
                        help="rows to print (default: %(default)s)")
    group = parser.add_argument_group("what estimates rest on")
    group.add_argument("--efficiency", type=share, metavar="SHARE",
                       help="share of the peak that a layer reaches (default: 0.9 in FP32, fitted to published times; "
                            "0.4 in FP16 and INT8, assumed)")
    group.add_argument("--overhead-us", type=amount, default=50.0, metavar="US",
                       help="microseconds that every layer adds, once for each group of its convolution "
                            "(default: %(default)g, fitted)")
    group.add_argument("--int8-drop", type=amount, default=0.5, metavar="POINTS",
                       help="top-1 that INT8 is expected to lose, in percentage points (default: %(default)g)")
# fmt: on


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if args.slo_ms is None and args.min_top1 is None:
        return "give --slo-ms, --min-top1, or both: without them every row fits"
    return None


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the answer rests on."""

    device: str
    ceiling: Ceiling | None
    measured: tuple[Measured, ...]
    warnings: tuple[str, ...]


def execute(args: argparse.Namespace) -> Output:
    """Ranks what meets the wish; where nothing does, says what comes nearest, as an error of the output."""
    from ..measure.advice import EFFICIENCY, PUBLISHED_V100_MS, Assumptions, Nearest, Wish, advise, find_nearest

    wish = Wish(args.slo_ms, args.min_top1, args.batch, args.precision, args.int8_drop)
    assumptions = Assumptions({name: args.efficiency or value for name, value in EFFICIENCY.items()}, args.overhead_us)
    ground = _find_ground(args)
    answer = advise(wish, ceiling=ground.ceiling, measured=ground.measured, assumptions=assumptions)
    shown = answer.fitting[: args.top]
    grouped = _GROUPED.format(*(PUBLISHED_V100_MS[name][batch] for batch in (0, 1) for name in ("B1g4", "B1")))
    head = [
        ("device", ground.device),
        ("asked for", _show_wish(wish)),
        ("fitting", f"{len(answer.fitting)} of {len(answer.fitting) + len(answer.others)}, most images a second first"),
    ]
    lines, nearest = [format_pairs(head)], Nearest((), (), (), ())
    errors: tuple[InputError, ...] = ()
    if answer.fitting:
        lines.append(_table(shown))
    else:
        nearest = find_nearest(answer, wish)
        lines += _nearest_lines(wish, nearest)
        errors = (InputError(f"nothing meets {_show_wish(wish)} on {ground.device}", remedy=_remedy(nearest)),)
    notes = [*_notes(wish, assumptions, answer), *_backend_notes(ground.measured), ("* grouped", grouped)]
    folded = [(name, textwrap.fill(text, _NOTE_COLUMNS, break_on_hyphens=False)) for name, text in notes]
    lines.append(format_pairs([*folded, *(("warning", text) for text in ground.warnings)]))
    data = {
        "device": ground.device,
        "wish": wish,
        "fitting": answer.fitting,
        "nearest": nearest,
        "assumptions": assumptions if ground.ceiling is not None else None,
        "grouped": grouped,
        "warnings": ground.warnings,
    }
    follow = _next(shown[0]) if shown and ground.ceiling is not None else None
    return Output(data=data, text="\n".join(lines), next_command=follow, errors=errors)


def _find_ground(args: argparse.Namespace) -> _Ground:
    from ..build.library import look_for_gpu
    from ..measure.advice import Measured, choose_files, unused_models
    from ..measure.peaks import find_gpu_peaks, look_up_gpu
    from ..measure.records import read_benchmark

    measured = tuple(Measured(path.name, read_benchmark(path)) for path in args.measured)
    device = args.gpu or (measured[0].benchmark.device.name if measured else None)
    if device is None:
        found = look_for_gpu()
        if found.gpu is None:
            raise InputError(
                f"there is no GPU here to advise on: {found.reason}",
                remedy="give --gpu t4 or another, or --measured FILE of repvgg-trt bench",
            )
        device = found.gpu.name
    gpu = find_gpu_peaks(device) if args.gpu or not measured else look_up_gpu(device)
    kept, left_out = choose_files(measured, device)
    warnings = [*left_out, *unused_models(kept)]
    if gpu is None:
        return _Ground(device, None, kept, tuple(warnings))
    ceiling = gpu.ceiling()
    for name in args.precision:
        if name not in ceiling.operations_per_second:
            warnings.append(f"{name} is not estimated: its peak on {gpu.names[0]} is not known")
    return _Ground(gpu.names[0], ceiling, kept, tuple(warnings))


def _show_wish(wish: Wish) -> str:
    parts = [] if wish.slo_ms is None else [f"a batch in at most {wish.slo_ms:g} ms"]
    parts += [] if wish.min_top1 is None else [f"top-1 of at least {wish.min_top1:g} %"]
    return " and ".join(parts)


def _table(choices: Sequence[Choice]) -> str:
    rows = [["variant", "px", "precision", "batch", "top-1 %", "ms", "images/s", "GMACs", "latency"]]
    for choice in choices:
        name = choice.variant + ("*" if choice.grouped else "")
        speed = [f"{choice.latency_ms:.2f}", f"{choice.images_per_second:,.0f}", f"{choice.gmacs:.2f}"]
        origin = f"measured, {choice.detail}" if choice.origin == "measured" else "estimated"
        what = [name, str(choice.image_size), choice.precision, str(choice.batch), f"{choice.top1:.2f}"]
        rows.append([*what, *speed, origin])
    return format_table(rows, "<><>>>>><")


def _nearest_lines(wish: Wish, nearest: Nearest) -> list[str]:
    """For each part of the wish the candidates that keep it; where none does, those that come nearest to it."""
    lines: list[str] = []
    if wish.slo_ms is not None:
        slo = f"{wish.slo_ms:g} ms"
        if nearest.fast_enough:
            lines += [f"the most accurate within {slo}", _table(nearest.fast_enough)]
        else:
            lines += [f"none takes {slo} or less; the fastest", _table(nearest.fastest)]
    if wish.min_top1 is not None:
        top1 = f"{wish.min_top1:g} %"
        if nearest.accurate_enough:
            lines += [f"the fastest with at least {top1}", _table(nearest.accurate_enough)]
        else:
            lines += [f"none has {top1} or more; the most accurate", _table(nearest.most_accurate)]
    return lines


def _remedy(nearest: Nearest) -> str:
    parts = []
    for choice in nearest.accurate_enough[:1]:
        latency_ms = math.ceil(100 * choice.latency_ms) / 100
        parts.append(f"--slo-ms {latency_ms:g}, for {choice.variant} in {choice.precision}")
    for choice in nearest.fast_enough[:1]:
        top1 = math.floor(100 * choice.top1 + 1e-6) / 100
        parts.append(f"--min-top1 {top1:g}, for {choice.variant} in {choice.precision}")
    return f"give {' or '.join(parts)}" if parts else "ask for less of both, as the tables show, or give a faster --gpu"


def _notes(wish: Wish, assumptions: Assumptions, answer: Advice) -> list[tuple[str, str]]:
    top1 = (
        f"as published for FP32 on ImageNet-1k; counted for FP16 too, and less {wish.int8_drop:g} points for INT8 "
        "(--int8-drop), which nobody published: measure yours with repvgg-trt eval"
    )
    shares = ", ".join(f"{100 * assumptions.efficiency[name]:.0f} % in {name}" for name in wish.precisions)
    estimated = (
        f"each layer takes the longer of its arithmetic at a share of the peak ({shares}) and its bytes at full "
        f"bandwidth, and {assumptions.overhead_us:g} µs a group; copies to and from the GPU are not counted. The FP32 "
        "constants were fitted to TensorRT 8.0 on a V100, the others are assumed: measure before you decide "
        "(repvgg-trt bench --out FILE, then --measured FILE)"
    )
    guessed = any(choice.origin == "estimated" for choice in (*answer.fitting, *answer.others))
    return [("top-1", top1), *([("estimated", estimated)] if guessed else [])]


def _backend_notes(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Where OpenVINO is worth its installation, if INT8 was measured on a CPU and not with it."""
    on_cpu = [each.benchmark for each in measured if each.benchmark.device.kind == "cpu"]
    int8 = [model for benchmark in on_cpu for model in benchmark.models if model.precision == "int8"]
    if not int8 or any(point.backend.startswith("OpenVINO") for model in int8 for point in model.points):
        return []
    text = (
        "INT8 was measured in ONNX Runtime only. OpenVINO gives 1.4 times as many images a second on a processor with "
        f"VNNI, two to four times as many with AMX: {say_install('openvino')}; repvgg-trt bench --backend openvino"
    )
    return [("backend", text)]


def _next(first: Choice) -> str:
    flag = "" if first.precision == "fp32" else f" --{first.precision}"
    name = shlex.quote(f"{first.variant.lower()}.onnx")
    return f"repvgg-trt build {name}{flag} --opt-batch {first.batch} --max-batch {first.batch}"


COMMAND = Command(
    "advise",
    "rank variants, batch sizes and precisions by accuracy and latency",
    "Ranks variant, batch size and precision by throughput among those that meet a latency and an accuracy: published "
    "top-1, measured latency where there is a file of repvgg-trt bench, else an estimate from multiply-accumulates and "
    "bytes. Exit code 1: none meets both.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)
