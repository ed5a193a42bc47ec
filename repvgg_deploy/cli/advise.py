"""`repvgg-trt advise`: which variant, batch size and precision to take."""

from __future__ import annotations

import argparse
import math
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..build.build import look_for_gpu
from ..errors import InputError
from ..measure.roofline import Ceiling
from .common import Output, format_pairs, format_table

if TYPE_CHECKING:
    from ..measure.advice import Advice, Assumptions, Choice, Measured, Nearest, Wish

_NOTE_COLUMNS = 68  # beside the names of the notes, within 80
_GROUPED = """variants with groups (…g2, …g4) lose at batch 1, although they have fewer multiply-accumulates: each group is a small
product of its own that does not fill a GPU. TensorRT 8.0 in FP32 on a V100 (PaddleClas): B1g4 takes {0:.2f} ms where
B1 takes {1:.2f} at batch 1, but {2:.2f} where B1 takes {3:.2f} at batch 8"""


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the answer rests on."""

    device: str
    ceiling: Ceiling | None
    measured: tuple[Measured, ...]
    warnings: tuple[str, ...]


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A file cannot be read, the GPU is not known, or there is nothing to choose from.
    """
    from ..measure.advice import EFFICIENCY, Assumptions, Nearest, Wish, advise, find_nearest

    wish = Wish(args.slo_ms, args.min_top1, args.batch, args.precision, args.int8_drop)
    assumptions = Assumptions({name: args.efficiency or value for name, value in EFFICIENCY.items()}, args.overhead_us)
    ground = _find_ground(args)
    answer = advise(wish, ceiling=ground.ceiling, measured=ground.measured, assumptions=assumptions)
    nearest = None if answer.fitting else find_nearest(answer, wish)
    shown = answer.fitting[: args.top]
    lines = [format_pairs(_head(wish, ground, answer))]
    lines += [_table(shown)] if nearest is None else _nearest_lines(wish, nearest)
    lines.append(format_pairs([*_notes(wish, assumptions, answer), *(("warning", text) for text in ground.warnings)]))
    data = {
        "device": ground.device,
        "wish": wish,
        "fitting": answer.fitting,
        "nearest": nearest or Nearest((), (), (), ()),
        "assumptions": assumptions if ground.ceiling is not None else None,
        "grouped": _grouped(),
        "warnings": ground.warnings,
    }
    errors = (
        ()
        if nearest is None
        else (InputError(f"nothing meets {_show_wish(wish)} on {ground.device}", remedy=_remedy(nearest)),)
    )
    return Output(
        data=data,
        text="\n".join(lines),
        next_command=_next(shown) if ground.ceiling is not None else None,
        errors=errors,
    )


def _find_ground(args: argparse.Namespace) -> _Ground:
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
    if gpu is None:
        return _Ground(device, None, kept, (*left_out, *unused_models(kept)))
    ceiling = gpu.ceiling()
    unknown = [
        f"{name} is not estimated: its peak on {gpu.names[0]} is not known"
        for name in args.precision
        if name not in ceiling.operations_per_second
    ]
    return _Ground(gpu.names[0], ceiling, kept, (*left_out, *unused_models(kept), *unknown))


_HEADER = ["variant", "px", "precision", "batch", "top-1 %", "ms", "images/s", "GMACs", "latency is"]
_ALIGN = "<><>>>>><"


def _row(choice: Choice) -> list[str]:
    grouped = " (grouped)" if choice.grouped else ""
    origin = f"measured, {choice.detail}" if choice.origin == "measured" else "estimated"
    numbers = [
        f"{choice.top1:.2f}",
        f"{choice.latency_ms:.2f}",
        f"{choice.images_per_second:,.0f}",
        f"{choice.gmacs:.2f}",
    ]
    return [choice.variant + grouped, str(choice.image_size), choice.precision, str(choice.batch), *numbers, origin]


def _head(wish: Wish, ground: _Ground, answer: Advice) -> list[tuple[str, str]]:
    count = len(answer.fitting) + len(answer.others)
    return [
        ("device", ground.device),
        ("asked for", _show_wish(wish)),
        ("fitting", f"{len(answer.fitting)} of {count}, most images a second first"),
    ]


def _show_wish(wish: Wish) -> str:
    parts = [] if wish.slo_ms is None else [f"a batch in at most {wish.slo_ms:g} ms"]
    parts += [] if wish.min_top1 is None else [f"top-1 of at least {wish.min_top1:g} %"]
    return " and ".join(parts)


def _table(choices: Sequence[Choice]) -> str:
    return format_table([_HEADER, *map(_row, choices)], _ALIGN)


def _nearest_lines(wish: Wish, nearest: Nearest) -> list[str]:
    """For each part of the wish the candidates that keep it; where none does, those that come nearest to it."""
    lines = []
    if wish.slo_ms is not None:
        kept = f"the most accurate within {wish.slo_ms:g} ms"
        lines += (
            [kept, _table(nearest.fast_enough)]
            if nearest.fast_enough
            else [f"none takes {wish.slo_ms:g} ms or less; the fastest", _table(nearest.fastest)]
        )
    if wish.min_top1 is not None:
        kept = f"the fastest with at least {wish.min_top1:g} %"
        missed = [f"none has {wish.min_top1:g} % or more; the most accurate", _table(nearest.most_accurate)]
        lines += [kept, _table(nearest.accurate_enough)] if nearest.accurate_enough else missed
    return lines


def _remedy(nearest: Nearest) -> str:
    fast, accurate = nearest.fast_enough, nearest.accurate_enough
    parts = (
        [
            f"--slo-ms {math.ceil(100 * accurate[0].latency_ms) / 100:g}, for {accurate[0].variant} in "
            f"{accurate[0].precision}"
        ]
        if accurate
        else []
    )
    parts += (
        [f"--min-top1 {math.floor(100 * fast[0].top1 + 1e-6) / 100:g}, for {fast[0].variant} in {fast[0].precision}"]
        if fast
        else []
    )
    return f"give {' or '.join(parts)}" if parts else "ask for less of both, as the tables show, or give a faster --gpu"


def _notes(wish: Wish, assumptions: Assumptions, answer: Advice) -> list[tuple[str, str]]:
    top1 = f"""as published for FP32 on ImageNet-1k; counted for FP16 too, and less {wish.int8_drop:g} points for INT8 (--int8-drop),
which nobody published: measure yours with repvgg-trt eval"""
    shares = ", ".join(f"{100 * assumptions.efficiency[name]:.0f} % in {name}" for name in wish.precisions)
    estimated = f"""each layer takes the longer of its arithmetic at a share of the peak ({shares})
and its bytes at full bandwidth, and {assumptions.overhead_us:g} µs a group; copies to and from the GPU are not counted.
The FP32 constants were fitted to TensorRT 8.0 on a V100, the others are assumed: measure before you decide
(repvgg-trt bench --out FILE, then --measured FILE)"""
    guessed = any(choice.origin == "estimated" for choice in (*answer.fitting, *answer.others))
    notes = [("top-1", top1), *([("estimated", estimated)] if guessed else []), ("grouped", _grouped())]
    return [(name, textwrap.fill(text, _NOTE_COLUMNS, break_on_hyphens=False)) for name, text in notes]


def _grouped() -> str:
    from ..measure.advice import PUBLISHED_V100_MS

    return _GROUPED.format(
        PUBLISHED_V100_MS["B1g4"][0],
        PUBLISHED_V100_MS["B1"][0],
        PUBLISHED_V100_MS["B1g4"][1],
        PUBLISHED_V100_MS["B1"][1],
    )


def _next(shown: Sequence[Choice]) -> str | None:
    if not shown:
        return None
    first = shown[0]
    flag = "" if first.precision == "fp32" else f" --{first.precision}"
    name = shlex.quote(f"{first.variant.lower()}.onnx")
    return f"repvgg-trt build {name}{flag} --opt-batch {first.batch} --max-batch {first.batch}"
