"""The options of `repvgg-trt bench` and `repvgg-trt advise`. Standard library only: `--help` must be quick."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_RIVALS = ("onnxruntime", "torch")
_PRECISIONS = ("fp32", "fp16", "int8")

BENCH_EXAMPLES = """examples:
  repvgg-trt bench a0.onnx a0-int8.onnx --batch 1,8 --out a0.json --plot a0.png
  repvgg-trt bench a0.onnx --compare torch,onnxruntime --cpu-threads 1
  repvgg-trt bench b2.plan --threads 4 --duration 10    (four clients at once)
"""
ADVISE_EXAMPLES = """examples:
  repvgg-trt advise --slo-ms 2 --min-top1 77 --gpu t4
  repvgg-trt advise --min-top1 77 --batch 1 --precision fp16 --gpu a10
  repvgg-trt advise --slo-ms 20 --measured a0.json b0.json
"""


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The models, how long, and what they are compared with."""
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="an .onnx of ours, or a .plan with its passport beside it")
    parser.add_argument("--batch", type=parse_counts, default=(1, 8, 32, 128), metavar="N,…", help="batch sizes (default: 1,8,32,128)")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="clients that call one Engine at once (default: %(default)s)")
    parser.add_argument("--duration", type=_seconds, default=3.0, metavar="S",
                        help="seconds for each model, batch size and way, in up to eight turns (default: %(default)g)")  # fmt: skip
    parser.add_argument("--warm-up", type=_seconds, default=0.5, metavar="S", help="seconds before, and at least three calls (default: %(default)g)")
    parser.add_argument("--compare", type=_rivals, default=(), metavar="NAME,…",
                        help="in turn with torch (the deploy form in float32) and onnxruntime (a bare session on the same file)")  # fmt: skip
    parser.add_argument("--image-size", type=_size, default=None, metavar="SIZE", help="for a model that takes any: 224 or 512x1024")
    parser.add_argument("--layers", action="store_true", help="print the roofline of every layer; JSON always has it")
    place = parser.add_argument_group("where")
    place.add_argument("--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda for a plan, else cpu)")
    place.add_argument("--backend", choices=("onnxruntime", "openvino", "fastest"), default=None,
                       help="what runs an ONNX model (default: onnxruntime)")  # fmt: skip
    place.add_argument("--cpu-threads", type=_positive, default=None, metavar="N", help="CPU threads that share one batch (default: one a core)")
    place.add_argument("--gpu", metavar="NAME", help="which known GPU this one is, for the roofline (default: what the driver says)")
    place.add_argument("--no-peak", action="store_true", help="do not measure what the CPU can do at most: no roofline, some seconds less")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON, which repvgg-trt advise reads")
    files.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw latency against throughput, and the roofline, as a .png (needs matplotlib)"
    )
    files.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(usage_error=parser.error)


def add_advise_options(parser: argparse.ArgumentParser) -> None:
    """What is asked for, of which device, and what estimates rest on."""
    parser.add_argument("--slo-ms", type=_milliseconds, default=None, metavar="MS", help="a batch may take so long (default: any time)")
    parser.add_argument("--min-top1", type=_percent, default=None, metavar="PERCENT", help="top-1 at least, on ImageNet-1k (default: any)")
    parser.add_argument(
        "--gpu", metavar="NAME", help="estimate for this GPU what was not measured: t4, a10, rtx4090… (default: the GPU that is here)"
    )
    parser.add_argument(
        "--measured", type=Path, nargs="+", default=[], metavar="FILE", help="files of repvgg-trt bench --out; they win over estimates"
    )
    parser.add_argument("--batch", type=parse_counts, default=(1, 8, 32, 128), metavar="N,…", help="batch sizes (default: 1,8,32,128)")
    parser.add_argument("--precision", type=_precisions, default=_PRECISIONS, metavar="NAME,…", help="of fp32, fp16, int8 (default: all)")
    parser.add_argument("--top", type=_positive, default=10, metavar="N", help="rows to print (default: %(default)s)")
    group = parser.add_argument_group("what estimates rest on")
    group.add_argument("--efficiency", type=_share, default=None, metavar="SHARE",
                       help="of the peak that a layer reaches (default: 0.9 in FP32, fitted to published times; 0.4 in FP16 and INT8, "
                            "assumed)")  # fmt: skip
    group.add_argument("--overhead-us", type=_count, default=50.0, metavar="US",
                       help="microseconds of every layer besides, once a group of its convolution (default: %(default)g, fitted)")  # fmt: skip
    group.add_argument("--int8-drop", type=_count, default=0.5, metavar="POINTS",
                       help="top-1 that INT8 is expected to lose, in percentage points (default: %(default)g)")  # fmt: skip
    parser.set_defaults(usage_error=parser.error)


def find_bench_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    names = [path.resolve() for path in args.models]
    if len(set(names)) < len(names):
        return "a MODEL is given twice"
    if args.out is not None and args.out == args.plot:
        return "--out and --plot must be two files"
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return "--plot takes a name that ends in .png"
    if args.gpu is not None and args.device == "cpu":
        return "--gpu is for a GPU's roofline: it cannot hold with --device cpu"
    return None


def find_advise_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if args.slo_ms is None and args.min_top1 is None:
        return "give --slo-ms, --min-top1, or both: without them every row fits"
    return None


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers, each once, in order."""
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _positive(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal()) or not 1 <= int(text.strip()[:10]) < 1 << 20:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0.01, 3600, "seconds from 0.01 to 3600")


def _milliseconds(text: str) -> float:
    return _number(text, 1e-3, 1e6, "milliseconds from 0.001 on")


def _percent(text: str) -> float:
    return _number(text, 0, 100, "a percentage from 0 to 100")


def _share(text: str) -> float:
    return _number(text, 0.01, 1.0, "a share from 0.01 to 1")


def _count(text: str) -> float:
    return _number(text, 0, 1e4, "a number from 0 to 10000")


def _choices(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, apart by commas, found {text!r}")
    return names


def _rivals(text: str) -> tuple[str, ...]:
    return _choices(text, _RIVALS)


def _precisions(text: str) -> tuple[str, ...]:
    return _choices(text, _PRECISIONS)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    if found is None or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise argparse.ArgumentTypeError(f"expected an image size such as 224 or 512x1024 (height x width), found {text!r}")
    return int(found[1]), int(found[2] or found[1])
