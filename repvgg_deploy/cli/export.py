"""`repvgg-export`: checkpoint → verified ONNX; `--describe`: what a checkpoint is."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import typing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..specs.values import Interpolation
from .common import (
    HelpFormatter,
    Output,
    Parser,
    add_completion,
    parent_parser,
    parse_number,
    parse_size,
    parse_triple,
    parse_whole,
    run,
)
from .terminal import Progress, format_pairs, format_table

if TYPE_CHECKING:
    from ..export.export import ExportOptions, ExportResult
    from ..export.options import ResizeOptions
    from ..model.checkpoint.hub import Located
    from ..model.checkpoint.load import Description
    from ..specs.values import Certificate, Preprocessing, TensorSpec

DESCRIPTION = (
    "Reparameterizes a RepVGG checkpoint and writes it as one simplified ONNX file, if that agrees with the "
    "training-mode model."
)
EXAMPLES = """examples:
  repvgg-export --ckpt RepVGG-B2-train.pth --describe
  repvgg-export --arch B2 --ckpt RepVGG-B2-train.pth --out b2.onnx
  repvgg-export --pretrained --arch A0 --out a0.onnx
  repvgg-export --ckpt mine.pth --input uint8 --output top5 --labels names.txt
  repvgg-export --ckpt mine.pth --features --image-size 512x1024
  repvgg-export --ckpt RepVGG-B2-train.pth --out b2.onnx --synthetic-calibration
"""
_STAGES = 6


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    conflict = find_conflict(args)
    if conflict is not None:
        parser.error(conflict)
    return run(execute, args)


def build_parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = Parser(
        prog="repvgg-export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        parents=[parent_parser()],
    )
    add_options(parser)
    add_completion(parser)
    return parser


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and the files; what goes into the graph; calibration images."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="FILE|NAME",
                        help="checkpoint of any RepVGG family (.pth, .pth.tar, .safetensors, .pdparams); "
                             "hf-hub:ORG/NAME[/FILE][@REVISION] or https://... fetches it")
    source.add_argument("--pretrained", action="store_true",
                        help="timm's weights of the variant that --arch names: --ckpt "
                             "hf-hub:timm/repvgg_a0.rvgg_in1k for A0")
    parser.add_argument("--arch", metavar="NAME",
                        help="variant that it must be, such as B2, or a TOML file; found from the tensors when left "
                             "out")
    parser.add_argument("--strides", type=_strides, metavar="S,S,S,S,S",
                        help="strides of the stem and of the four stages, where the variant is not a published one: "
                             "tensors do not tell them")
    parser.add_argument("--weights", metavar="KEY",
                        help="which of several sets of weights in the file, such as model_ema (default: the only one, "
                             "or the only average)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the ONNX to write (default: beside the checkpoint, with the suffix .onnx; in this "
                             "folder where that is a name)")
    parser.add_argument("--describe", action="store_true",
                        help="say what the checkpoint is and print the command that exports it; writes nothing")
    parser.add_argument("--save-deploy", type=Path, metavar="FILE",
                        help="write the deploy-form checkpoint in the official key names, too")
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    _add_graph_options(parser.add_argument_group("graph"))
    images = parser.add_argument_group("images and classes")
    images.add_argument("--labels", type=Path, metavar="FILE|imagenet1k",
                        help="text file with one class name a line, kept in the ONNX; imagenet1k: the 1,000 names of "
                             "ImageNet")
    images.add_argument("--mean", type=parse_triple, metavar="R,G,B",
                        help="mean in 0-255 units (default: the checkpoint's own, else ImageNet's "
                             "123.675,116.28,103.53)")
    images.add_argument("--std", type=parse_triple, metavar="R,G,B",
                        help="standard deviation in 0-255 units (default: as --mean, 58.395,57.12,57.375)")
    add_resize_options(images)
    calibration = parser.add_argument_group("calibration without images (for INT8)")
    count = partial(parse_whole, most=100_000)
    calibration.add_argument("--synthetic-calibration", type=count, nargs="?", const=0, metavar="N",
                             help="synthesise N images (left out: as many as take about ten minutes, 128 at most) from "
                                  "the BatchNorm statistics of a training-form checkpoint, and write them beside the "
                                  "ONNX as NAME.calib.npz")
    calibration.add_argument("--calibration-seed", type=int, metavar="SEED",
                             help="another number gives other images (default: 0)")
    calibration.add_argument("--calibration-steps", type=count, metavar="STEPS",
                             help="optimisation steps a batch (default: by the cost of the network)")


def add_resize_options(group: argparse._ActionsContainer) -> None:
    """How images are resized before the centre crop, as timm and torchvision call it."""
    group.add_argument("--resize", type=_resize, metavar="N|HxW",
                       help="N: the short side in pixels before the centre crop; HxW: both sides, whatever the shape "
                            "(default: 256 for 224x224, else the crop's own)")
    group.add_argument("--crop-pct", type=_share, metavar="P",
                       help="in place of --resize: the share of the resized image that the crop keeps, such as 0.875")
    group.add_argument("--letterbox", type=_colour, nargs="?", const=(114, 114, 114), metavar="R,G,B",
                       help="in place of --resize: the image keeps its shape and stands in the middle of the input, "
                            "this colour around it, as detectors are trained (default: 114,114,114)")
    group.add_argument("--interpolation", choices=typing.get_args(Interpolation), metavar="FILTER",
                       help=f"filter of the resize: {', '.join(typing.get_args(Interpolation))} (default: bilinear)")
    group.add_argument("--max-value", type=partial(parse_whole, most=65535), metavar="N",
                       help="what is white in images of more than 8 bits, such as 4095 (default: 65535)")


def _add_graph_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image-size", type=parse_size, metavar="N|HxW",
                       help="height and width in pixels (default: the checkpoint's own, else 224)")
    group.add_argument("--dynamic-size", action="store_true", help="accept any height and width")
    group.add_argument("--batch", type=_batch, metavar="N|dynamic", help="fixed batch size (default: dynamic)")
    group.add_argument("--opset", type=int, default=17, choices=(17, 18, 19, 20),
                       help="ONNX operator set (default: 17)")
    group.add_argument("--input", choices=("float32", "uint8"), default="float32",
                       help="float32: normalised NCHW; uint8: NHWC RGB 0-255, normalised in the graph (default: "
                            "float32)")
    group.add_argument("--output", choices=("logits", "probabilities", "top5"), default="logits",
                       help="what the model gives (default: logits)")
    group.add_argument("--features", action="store_true",
                       help="give the outputs of the four stages, as a backbone, in place of the classifier's")
# fmt: on


def _strides(text: str) -> tuple[int, int, int, int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 5 or not all(part.strip() in ("1", "2") for part in parts):
        raise argparse.ArgumentTypeError(f"expected five numbers, each 1 or 2, such as 2,2,2,2,2; found {text!r}")
    stem, first, second, third, fourth = map(int, parts)
    return stem, first, second, third, fourth


def _batch(text: str) -> int | None:
    try:
        return None if text == "dynamic" else parse_whole(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a positive number or 'dynamic', found {text!r}") from None


def _resize(text: str) -> int | tuple[int, int]:
    height, width = parse_size(text)
    return height if text.strip().isdecimal() else (height, width)


def _share(text: str) -> float:
    return parse_number(text, least=0.01, most=1, what="a share of 0.01 to 1, such as 0.875")


def _colour(text: str) -> tuple[int, int, int]:
    red, green, blue = (int(value) if value in range(256) else -1 for value in parse_triple(text))
    if min(red, green, blue) < 0:
        raise argparse.ArgumentTypeError(f"expected three whole numbers of 0 to 255, found {text!r}")
    return red, green, blue


RESIZE_FLAGS = ("--resize", "--crop-pct", "--letterbox", "--interpolation", "--max-value")


def read_resizing(args: argparse.Namespace) -> ResizeOptions:
    """What the options of `add_resize_options` state."""
    from ..export.options import ResizeOptions

    return ResizeOptions(args.resize, args.crop_pct, args.interpolation, args.max_value, args.letterbox)


def find_resize_conflict(args: argparse.Namespace) -> str | None:
    """Which of the options of `add_resize_options` cannot hold together, or None."""
    sizes = {"--resize": args.resize, "--crop-pct": args.crop_pct, "--letterbox": args.letterbox}
    given = [name for name, value in sizes.items() if value is not None]
    return f"{given[0]} and {given[1]} cannot both hold" if len(given) > 1 else None


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if (conflict := find_resize_conflict(args)) is not None:
        return conflict
    if args.pretrained and args.arch is None:
        return "--pretrained needs --arch, such as --arch A0"
    if args.features and args.output != "logits":
        return f"--features gives stage outputs, so --output {args.output} cannot hold"
    if args.synthetic_calibration is None and (args.calibration_seed is not None or args.calibration_steps is not None):
        return "--calibration-seed and --calibration-steps need --synthetic-calibration"
    return None


def execute(args: argparse.Namespace) -> Output:
    """Exports the checkpoint, or describes it."""
    if args.pretrained:
        from ..model.checkpoint.hub import name_pretrained
        from ..specs.variants import get_variant

        args.ckpt = name_pretrained(get_variant(args.arch).name)
    return _describe(args) if args.describe else _export(args)


def _describe(args: argparse.Namespace) -> Output:
    from ..model.checkpoint.load import describe_checkpoint
    from ..specs.codec import encode
    from ..specs.variants import get_variant
    from ..specs.zoo import find_card, find_card_by_name

    arch = get_variant(args.arch) if args.arch else None
    located = _locate(args.ckpt)
    found = describe_checkpoint(located, arch=arch, strides=args.strides, weights=args.weights)
    card, named = find_card(found.sha256), find_card_by_name(located.path.name)
    published = None if card is None else card.summary()
    if card is None and named is not None and named.bytes is not None:
        expected = f"{named.bytes:,} bytes, sha256 {str(named.sha256)[:16]}…"
        published = f"no: it has the name of {named.summary()}, but that file has {expected}"
    pairs = [("file", f"{found.file} ({found.bytes:,} bytes)"), ("sha256", found.sha256)]
    pairs += _describe_content(found, 224 if card is None else card.input_size)
    if published is not None:
        pairs.append(("published", published))
    pairs += [("note", note) for note in found.notes]
    pairs += [("taken as given", fact) for fact in found.facts]
    if found.command is not None:
        given = ["--strides", ",".join(map(str, args.strides))] if args.strides else []
        given += ["--arch", args.arch] if args.arch else []
        pairs.append(("export with", " ".join([found.command, shlex.join(given)]).strip()))
    errors = () if found.problem is None else (CheckpointError(found.problem, remedy=str(found.remedy)),)
    return Output({**encode(found), "published": published}, format_pairs(pairs), errors=errors)


def _locate(ckpt: str) -> Located:
    """The checkpoint on this machine; fetched, with a bar, where it is given by name."""
    from ..model.checkpoint.hub import locate

    with Progress() as bar:
        return locate(ckpt, progress=lambda done, total: bar.show("fetch it, MB", done // 10**6, total // 10**6))


def _describe_content(found: Description, size: int) -> list[tuple[str, str]]:
    from ..specs.variants import count_macs

    pairs = []
    if found.container is not None:
        wrapper = f", state dict under {found.wrapper!r}" if found.wrapper else ""
        pairs.append(("container", found.container + wrapper))
    if found.spec is not None:
        macs = f"{count_macs(found.spec, size, size) / 1e9:.2f} G MACs at {size}×{size}"
        pairs += [
            ("family", str(found.family)),
            ("form", f"{found.form} form, {(found.parameters or 0) / 1e6:.2f} M parameters"),
            ("variant", f"{found.variant}, {found.classes} classes, {macs}"),
        ]
    return pairs


def _export(args: argparse.Namespace) -> Output:
    from ..model.checkpoint.hub import default_onnx

    # Before torch is loaded: let idle OpenMP threads sleep, not spin. On a machine that others use too, spinning
    # doubles the time of an export (B2 beside another busy program on two cores: 20 s against 39 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out, located = args.out or default_onnx(args.ckpt), _locate(args.ckpt)
    with Progress(_STAGES, "start") as bar:
        from ..export import export_checkpoint

        result = export_checkpoint(
            located,
            out,
            options=_read_options(args),
            progress=lambda stage: bar.advance(label=stage),
            calibration_progress=partial(bar.show, "synthesise calibration images"),
        )
    command = f"repvgg-trt infer {shlex.quote(str(out))} IMAGE"
    calibration = None
    if result.calibration is not None:
        command = f"repvgg-trt quantize {shlex.quote(str(out))} --int8"
        made = result.calibration
        calibration = {"out": str(made.output.target), "status": made.output.status, "provenance": made.provenance}
    elif result.metadata.spec.kind == "features":
        command = f"repvgg-trt inspect {shlex.quote(str(out))}"
    data = {
        "out": str(result.output.target),
        "status": result.output.status,
        "deploy_checkpoint": None if result.deploy_output is None else str(result.deploy_output.target),
        "calibration": calibration,
        "notes": list(result.notes),
        "metadata": dataclasses.replace(result.metadata, statistics={}),
    }
    return Output(data, _as_text(result), command)


def _read_options(args: argparse.Namespace) -> ExportOptions:
    from ..export.export import ExportOptions
    from ..export.options import GraphOptions
    from ..export.synthesize import SynthesisOptions
    from ..images.classes import imagenet_labels
    from ..images.labels import read_labels
    from ..specs.variants import get_variant

    graph = GraphOptions(
        opset=args.opset,
        batch=args.batch,
        image_size=args.image_size,
        dynamic_size=args.dynamic_size,
        input=args.input,
        output=args.output,
        features=args.features,
    )
    arch = get_variant(args.arch) if args.arch else None
    labels = None
    if args.labels:
        labels = imagenet_labels() if str(args.labels) == "imagenet1k" else read_labels(args.labels)
    calibration = None
    if args.synthetic_calibration is not None:
        images = args.synthetic_calibration or None
        calibration = SynthesisOptions(images, args.calibration_seed or 0, args.calibration_steps)
    return ExportOptions(
        graph,
        arch,
        args.mean,
        args.std,
        labels,
        args.save_deploy,
        args.force,
        calibration,
        read_resizing(args),
        strides=args.strides,
        weights=args.weights,
    )


def _as_text(result: ExportResult) -> str:
    metadata = result.metadata
    source, variant, spec = metadata.source, metadata.variant, metadata.spec
    assert source is not None and variant is not None
    kind = f"{source.family}, {source.form} form, {variant.name}, {variant.num_classes} classes"
    pairs = [
        ("checkpoint", f"{source.file}: {kind}\nsha256 {source.sha256}"),
        *([] if source.origin is None else [("fetched as", source.origin)]),
        *(("note", note) for note in result.notes),
        *(("taken as given", fact) for fact in metadata.certificate.facts),
        ("verified", f"against {metadata.certificate.reference}\n{certificate_table(metadata.certificate)}"),
        ("input", f"{_show_tensor(spec.input)} {spec.input.layout}, {_describe_pixels(spec.preprocessing)}"),
        ("output", ", ".join(map(_show_tensor, spec.outputs))),
    ]
    outputs = [result.output] if result.deploy_output is None else [result.deploy_output, result.output]
    pairs += [(output.status, _show_file(output.target)) for output in outputs]
    if result.calibration is not None:
        made = result.calibration.provenance
        images = f"{made.images} images, {made.steps} steps a batch, seed {made.seed}"
        pairs.append(("calibration", f"{images}; mismatch with the BatchNorm statistics {made.loss:.4f}"))
        pairs.append((result.calibration.output.status, _show_file(result.calibration.output.target)))
    return format_pairs(pairs)


def _show_tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _show_file(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"


def _describe_pixels(preprocessing: Preprocessing | None) -> str:
    assert preprocessing is not None
    if preprocessing.in_graph:
        return "RGB 0-255, normalised in the graph"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"RGB, (pixel - ({mean})) / ({std})"


def certificate_table(certificate: Certificate) -> str:
    """One line for each kind of comparison: how many there were, and the worst."""
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for check in certificate.checks:
        numbers = (check.error / check.tolerance, check.error, check.tolerance)
        kinds.setdefault(_kind(check.name), []).append(numbers)
    rows = [("comparison", "count", "worst error", "allowed")]
    for kind, checks in kinds.items():
        _, error, tolerance = max(checks, key=lambda numbers: numbers[0])
        rows.append((kind, str(len(checks)), f"{error:.1e}", f"{tolerance:.1e}"))
    return format_table(rows, "<>>>", indent=0)


def _kind(name: str) -> str:
    if name.startswith("weights"):
        return "each weight, against float64"
    if name.startswith(("block", "convolution")):
        what, precision = name.partition(" ")[0], name.rpartition(", ")[2]
        return f"each {what}, {precision}"
    if name.startswith("network"):
        return "whole network, " + name.split(", ")[1]
    return "ONNX in ONNX Runtime"


if __name__ == "__main__":
    sys.exit(main())
