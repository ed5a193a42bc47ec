"""The program `repvgg-trt`: what is done with an exported model. A subcommand is one parser here and one module beside it.

The module of a subcommand (`infer`, `inspect`, …) is imported after parsing, and offers `execute(args) -> Output`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from .bench import (
    ADVISE_EXAMPLES,
    BENCH_EXAMPLES,
    add_advise_options,
    add_bench_options,
    find_advise_conflict,
    find_bench_conflict,
)
from .build import BUILD_EXAMPLES, CHECK_EXAMPLES, add_build_options, add_check_options, find_build_conflict
from .common import HelpFormatter, Output, parent_parser, run
from .quantize import add_quantize_options, find_conflict
from .triton import TRITON_EXAMPLES, add_triton_options, find_triton_conflict

if TYPE_CHECKING:
    from collections.abc import Callable

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
DESCRIPTION = "Quantizes, builds, runs, measures and describes models that repvgg-export wrote."
_QUANTIZE_EXAMPLES = """examples:
  repvgg-trt quantize b2.onnx --fp16
  repvgg-trt quantize b2.onnx --int8                    (b2.calib.npz is there)
  repvgg-trt quantize b2.onnx --int8 --calib train/ --max-drop 0.3 --plot b2.png
  repvgg-trt quantize b2.onnx --int8 --calib statistics    (no images at all)
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: Arguments without the program's name; None takes the command line's.

    Returns:
        The exit code; see `common`. `--help`, `--version` and usage errors raise SystemExit, as argparse does.
    """
    args = build_parser().parse_args(argv)
    rules = {
        "quantize": find_conflict,
        "build": find_build_conflict,
        "triton": find_triton_conflict,
        "bench": find_bench_conflict,
        "advise": find_advise_conflict,
    }
    conflict = rules.get(args.command, lambda _: None)(args)
    if conflict is not None:
        args.usage_error(conflict)
    return run(_execute, args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="repvgg-trt", description=DESCRIPTION, parents=[parent_parser()])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (
        _add_infer,
        _add_inspect,
        _add_quantize,
        _add_build,
        _add_check,
        _add_triton,
        _add_eval,
        _add_compare,
        _add_bench,
        _add_advise,
    ):
        add(commands)
    return parser


def _execute(args: argparse.Namespace) -> Output:
    module = importlib.import_module(f".{args.command}", __package__)
    execute: Callable[[argparse.Namespace], Output] = module.execute
    return execute(args)


def _add_infer(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "infer",
        parents=[parent_parser()],
        help="print the best classes of images",
        description="Prints the best classes of each image with their probabilities. An image that cannot be read "
        "is named, "
        "the others are "
        "answered all the same, and the exit code is 1.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="an .onnx that repvgg-export wrote, or a plan with its passport beside it"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, folders of them, or quoted patterns")
    parser.add_argument(
        "--top", type=_positive, default=None, metavar="N", help="how many classes to print (default: 5)"
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes, one a line; in place of those in the model"
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="DEVICE",
        help="cpu, cuda or cuda:1; a GPU never falls back to the CPU (default: cuda for a plan, else cpu)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="images decoded and run at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=_positive, default=None, metavar="N", help="CPU threads (default: one a core)"
    )
    _add_backend(parser)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "openvino", "fastest"),
        default=None,
        help="what runs an ONNX model; openvino is the fastest for INT8 on a CPU, fastest chooses it where it is "
        "installed (default: onnxruntime)",
    )


def _add_inspect(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[parent_parser()],
        help="print what a model is and what was verified of it",
        description="Prints the specification, preprocessing, certificate, source checkpoint, layers, parameters and "
        "multiply-accumulates of "
        "a model. Needs no runtime.",
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx that repvgg-export wrote")


def _add_quantize(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "quantize",
        parents=[parent_parser()],
        help="make a typed ONNX: FP16 that cannot overflow, INT8 that keeps its accuracy",
        description="Makes an FP16 or INT8 ONNX of an FP32 one: calibrates, compares the result with FP32 on images "
        "that "
        "took no part, and writes "
        "it only if they agree. Needs neither a GPU nor TensorRT.",
        epilog=_QUANTIZE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_quantize_options(parser)


def _add_build(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "build",
        parents=[parent_parser()],
        help="build a TensorRT plan, with a passport that says what it is and where it runs",
        description="Builds a TensorRT or TensorRT-RTX plan of an ONNX. The precision is the graph's, on every "
        "version; an "
        "FP32 graph is typed "
        "first where --fp16 or --int8 asks for it. A plan that computes in a wider type than its graph says is "
        "an error.",
        epilog=BUILD_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_build_options(parser)


def _add_check(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "check",
        parents=[parent_parser()],
        help="say whether a plan will run here, or on another GPU and TensorRT",
        description="Compares a plan's passport with this machine, or with another that --target describes. Needs "
        "no GPU. "
        "Exit code 0: it will run; "
        "1: it will not, and why.",
        epilog=CHECK_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_check_options(parser)


def _add_triton(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "triton",
        parents=[parent_parser()],
        help="write a model repository for Triton Inference Server, or check one",
        description="Writes a model repository that Triton serves as it is: configuration, labels, warm-up, "
        "dynamic batching. Needs no server and no GPU. --validate says what Triton would refuse; exit code 1 then.",
        epilog=TRITON_EXAMPLES,
        conflict_handler="resolve",
        formatter_class=HelpFormatter,
    )
    add_triton_options(parser)


def _add_eval(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "eval",
        parents=[parent_parser()],
        help="measure top-1, top-5 and speed on labelled images",
        description="Runs a classifier on labelled images and prints top-1, top-5, images a second and the worst "
        "classes "
        "with what they are "
        "taken for. An image that cannot be read is skipped and counted; above 10 % it is an error.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an .onnx that repvgg-export or quantize wrote, or a plan with its passport beside it",
    )
    parser.add_argument(
        "--worst",
        type=_positive,
        default=5,
        metavar="N",
        help="how many of the worst classes to print (default: %(default)s)",
    )
    _add_data_options(parser)


def _add_compare(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "compare",
        parents=[parent_parser()],
        help="compare two models on the same images, layer by layer",
        description="Runs two models of the same classes on the same images and prints how often their best classes "
        "are the "
        "same, how far apart "
        "their outputs are, their accuracy where the images have labels, and the signal-to-quantization-noise "
        "ratio of every layer. Channels that "
        "equalization rescaled are scaled back first.",
    )
    parser.add_argument("reference", metavar="A", help="the reference, usually the FP32 .onnx")
    parser.add_argument("other", metavar="B", help="the other, usually the typed .onnx")
    parser.add_argument(
        "--layer-images",
        type=_count,
        default=64,
        metavar="N",
        help="images for the comparison of layers, 0 for none (default: %(default)s)",
    )
    _add_data_options(parser)


def _add_bench(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[parent_parser()],
        help="measure latency, throughput and the share of the roofline",
        description="Measures models in turn within one run: latency, throughput, and on a GPU the copies, "
        "computing and "
        "launch apart; says when "
        "the times were not stable; and what share of the device's limits that is, layer by layer.",
        epilog=BENCH_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_bench_options(parser)


def _add_advise(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "advise",
        parents=[parent_parser()],
        help="rank variants, batch sizes and precisions by accuracy and latency",
        description="Ranks variant, batch size and precision by throughput among those that meet a latency and an "
        "accuracy: "
        "published top-1, "
        "measured latency where there is a file of repvgg-trt bench, else an estimate from multiply-accumulates "
        "and bytes. Exit code 1: none "
        "meets both.",
        epilog=ADVISE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add_advise_options(parser)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `compare` share."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="images: a folder with a sub-folder a class; a CSV of path,label (paths relative to it); an .npz with "
        "images and labels",
    )
    parser.add_argument(
        "--limit", type=_positive, default=None, metavar="N", help="only so many images, drawn evenly (default: all)"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=32,
        metavar="N",
        help="images decoded and run at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="DEVICE",
        help="cpu, cuda or cuda:1; a GPU never falls back to the CPU (default: cuda for a plan, else cpu)",
    )
    parser.add_argument(
        "--threads", type=_positive, default=None, metavar="N", help="CPU threads (default: one a core)"
    )
    _add_backend(parser)
    parser.add_argument("--plot", metavar="FILE", help="also draw the result as a .png (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="replace a picture that differs")


def _count(text: str) -> int:
    return 0 if text.strip() == "0" else _positive(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
