"""`repvgg-export`: checkpoint → verified ONNX. Stages are imported after the arguments are parsed, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..files.output import default_output
from .common import HelpFormatter, Output, Progress, format_pairs, format_table, parent_parser, run

if TYPE_CHECKING:
    from ..export.calibrate import CalibrationResult
    from ..export.export import ExportOptions, ExportResult
    from ..model.checkpoint.load import Description
    from ..specs.values import Certificate, Check, Preprocessing

_STAGES = 6
_EPILOG = """examples:
  repvgg-export --ckpt RepVGG-B2-train.pth --describe
  repvgg-export --arch B2 --ckpt RepVGG-B2-train.pth --out b2.onnx
  repvgg-export --ckpt mine.pth --input uint8 --output top5 --labels names.txt
  repvgg-export --ckpt mine.pth --features --image-size 512x1024
  repvgg-export --ckpt RepVGG-B2-train.pth --out b2.onnx --synthetic-calibration
"""

DESCRIPTION = (
    "Reparameterizes a RepVGG checkpoint and writes it as one simplified ONNX file, proven equal to the "
    "training-mode model."
)


def build_parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = argparse.ArgumentParser(
        prog="repvgg-export",
        description=DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        parents=[parent_parser()],
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        type=Path,
        metavar="FILE",
        help="checkpoint of any RepVGG family (.pth, .pth.tar, .safetensors, .pdparams)",
    )
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="variant that it must be, such as B2, or a TOML file; found from the tensors when left out",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the ONNX to write (default: beside the checkpoint, with the suffix .onnx)",
    )
    parser.add_argument(
        "--describe",
        action="store_true",
        help="say what the checkpoint is and print the command that exports it; writes nothing",
    )
    parser.add_argument(
        "--save-deploy",
        type=Path,
        metavar="FILE",
        help="write the deploy-form checkpoint in the official key names, too",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    _add_graph_options(parser.add_argument_group("graph"))
    _add_image_options(parser.add_argument_group("images and classes"))
    _add_calibration_options(parser.add_argument_group("calibration without images (for INT8)"))
    return parser


def _add_graph_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-size",
        type=_size,
        metavar="N|HxW",
        help="height and width in pixels (default: the checkpoint's own, else 224)",
    )
    group.add_argument("--dynamic-size", action="store_true", help="accept any height and width")
    group.add_argument(
        "--batch", type=_batch, default=None, metavar="N|dynamic", help="fixed batch size (default: dynamic)"
    )
    group.add_argument(
        "--opset", type=int, default=17, choices=(17, 18, 19, 20), help="ONNX operator set (default: 17)"
    )
    group.add_argument("--input", choices=("float32", "uint8"), default="float32",
                       help="float32: normalised NCHW; uint8: NHWC RGB 0-255, normalised in the graph (default: " "float32)")  # fmt: skip
    group.add_argument(
        "--output",
        choices=("logits", "probabilities", "top5"),
        default="logits",
        help="what the model gives (default: logits)",
    )
    group.add_argument(
        "--features",
        action="store_true",
        help="give the outputs of the four stages, as a backbone, in place of the classifier's",
    )


def _add_image_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--labels", type=Path, metavar="FILE|imagenet1k",
                       help="text file with one class name a line, kept in the ONNX; imagenet1k: the 1,000 names of " "ImageNet")  # fmt: skip
    group.add_argument(
        "--mean",
        type=_triple,
        metavar="R,G,B",
        help="mean in 0-255 units (default: the checkpoint's own, else ImageNet's 123.675,116.28,103.53)",
    )
    group.add_argument(
        "--std",
        type=_triple,
        metavar="R,G,B",
        help="standard deviation in 0-255 units (default: likewise 58.395,57.12,57.375)",
    )


def _add_calibration_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--synthetic-calibration", type=_count, nargs="?", const=0, metavar="N",
                       help="synthesise N images (left out: as many as take about ten minutes, 128 at most) from the " "BatchNorm statistics of a "
                            "training-form checkpoint, and write them beside the ONNX as NAME.calib.npz; the " "same command resumes")  # fmt: skip
    group.add_argument("--calibration-seed", type=int, metavar="SEED", help="other images (default: 0)")
    group.add_argument(
        "--calibration-steps",
        type=_count,
        metavar="STEPS",
        help="optimisation steps a batch (default: by the cost of the network)",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= 100_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 100000, found {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})(?:[xX×]([0-9]{1,5}))?", text)
    if not match or 0 in (int(match[1]), int(match[2] or 1)):
        raise argparse.ArgumentTypeError(
            f"expected a number or HEIGHTxWIDTH in pixels, from 1 to 99999, found {text!r}"
        )
    return int(match[1]), int(match[2] or match[1])


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number or 'dynamic', found {text!r}")
    return int(text)


def _triple(text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers separated by commas, found {text!r}") from None
    return first, second, third


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.features and args.output != "logits":
        parser.error(f"--features gives stage outputs, so --output {args.output} cannot hold")
    if args.synthetic_calibration is None and (args.calibration_seed is not None or args.calibration_steps is not None):
        parser.error("--calibration-seed and --calibration-steps need --synthetic-calibration")
    return run(_describe if args.describe else _export, args)


def _describe(args: argparse.Namespace) -> Output:
    from ..model.checkpoint.load import describe_checkpoint
    from ..specs.codec import encode
    from ..specs.zoo import find_card, find_card_by_name

    description = describe_checkpoint(args.ckpt)
    card, named = find_card(description.sha256), find_card_by_name(args.ckpt.name)
    published = None if card is None else card.summary()
    if card is None and named is not None and named.bytes is not None:
        expected = f"{named.bytes:,} bytes, sha256 {str(named.sha256)[:16]}…"
        published = f"no: it has the name of {named.summary()}, but that file has {expected}"
    data = {**encode(description), "published": published}
    errors = (
        () if description.problem is None else (CheckpointError(description.problem, remedy=str(description.remedy)),)
    )
    return Output(
        data, _description_text(description, published, 224 if card is None else card.input_size), errors=errors
    )


def _description_text(description: Description, published: str | None, size: int) -> str:
    from ..specs.variants import count_macs

    spec = description.spec
    pairs = [("file", f"{description.file} ({description.bytes:,} bytes)"), ("sha256", description.sha256)]
    if description.container is not None:
        pairs.append(
            (
                "container",
                description.container + (f", state dict under {description.wrapper!r}" if description.wrapper else ""),
            )
        )
    if spec is not None:
        megabytes = f"{(description.parameters or 0) / 1e6:.2f} M parameters"
        pairs += [
            ("family", str(description.family)),
            ("form", f"{description.form} form, {megabytes}"),
            (
                "variant",
                f"{description.variant}, {description.classes} classes, {count_macs(spec, size, size) / 1e9:.2f} "
                f"G MACs at {size}×{size}",
            ),
        ]
    if published is not None:
        pairs.append(("published", published))
    pairs += [("note", note) for note in description.notes]
    if description.command is not None:
        pairs.append(("export with", description.command))
    return format_pairs(pairs)


def _export(args: argparse.Namespace) -> Output:
    # Before torch is loaded: let idle OpenMP threads sleep, not spin. On a machine that others use too, spinning
    # doubles the time of an export (B2 beside another busy program on two cores: 20 s against 39 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = args.out or default_output(args.ckpt)
    with _Bars() as bars:
        from ..export.export import export_checkpoint

        result = export_checkpoint(
            args.ckpt, out, options=_options(args), progress=bars.stage, calibration_progress=bars.steps
        )
    return Output(_data(result), _text(result), _next_command(result, shlex.quote(str(out))))


def _next_command(result: ExportResult, out: str) -> str:
    if result.calibration is not None:
        return f"repvgg-trt quantize {out} --int8"
    return f"repvgg-trt inspect {out}" if result.metadata.spec.kind == "features" else f"repvgg-trt infer {out} IMAGE"


class _Bars:
    """The export's progress, and after it that of the calibration images, which takes minutes."""

    def __init__(self) -> None:
        self._bar = Progress(_STAGES, "start")
        self._done: int | None = None

    def __enter__(self) -> _Bars:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(None, None, None)

    def stage(self, name: str) -> None:
        """A stage of the export begins."""
        self._bar.advance(label=name)

    def steps(self, done: int, total: int) -> None:
        """So many steps of the synthesis are done."""
        if self._done is None:
            self._bar.__exit__(None, None, None)
            self._bar, self._done = Progress(total, "synthesise calibration images"), 0
        self._bar.advance(done - self._done)
        self._done = done


def _options(args: argparse.Namespace) -> ExportOptions:
    from ..export.export import ExportOptions
    from ..export.options import GraphOptions
    from ..export.synthesize import SynthesisOptions
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
    labels = _read_labels(args.labels) if args.labels else None
    calibration = None
    if args.synthetic_calibration is not None:
        calibration = SynthesisOptions(
            args.synthetic_calibration or None, args.calibration_seed or 0, args.calibration_steps
        )
    return ExportOptions(graph, arch, args.mean, args.std, labels, args.save_deploy, args.force, calibration)


def _read_labels(path: Path) -> tuple[str, ...]:
    from ..images.classes import imagenet_labels, read_labels

    if str(path) == "imagenet1k":
        return imagenet_labels()
    return read_labels(path)


def _data(result: ExportResult) -> dict[str, object]:
    return {
        "out": str(result.output.target),
        "status": result.output.status,
        "deploy_checkpoint": None if result.deploy_output is None else str(result.deploy_output.target),
        "calibration": None if result.calibration is None else _calibration_data(result.calibration),
        "notes": list(result.notes),
        "metadata": dataclasses.replace(result.metadata, statistics={}),
    }


def _calibration_data(calibration: CalibrationResult) -> dict[str, object]:
    return {
        "out": str(calibration.output.target),
        "status": calibration.output.status,
        "provenance": calibration.provenance,
    }


def _text(result: ExportResult) -> str:
    metadata = result.metadata
    source, variant, spec = metadata.source, metadata.variant, metadata.spec
    assert source is not None and variant is not None
    pairs = [
        (
            "checkpoint",
            f"{source.file}: {source.family}, {source.form} form, {variant.name}, {variant.num_classes} "
            f"classes\nsha256 {source.sha256}",
        ),
        *(("note", note) for note in result.notes),
        ("verified", f"against {metadata.certificate.reference}\n{_certificate_table(metadata.certificate)}"),
        (
            "input",
            f"{spec.input.name} {spec.input.dtype} {_shape(spec.input.shape)} {spec.input.layout}, "
            f"{_pixels(spec.preprocessing)}",
        ),
        ("output", ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in spec.outputs)),
    ]
    for output in filter(None, (result.deploy_output, result.output)):
        pairs.append((output.status, _size_of(output.target)))
    if result.calibration is not None:
        made = result.calibration.provenance
        pairs.append(
            (
                "calibration",
                f"{made.images} images, {made.steps} steps a batch, seed {made.seed}; mismatch with the "
                f"BatchNorm statistics {made.loss:.4f}",
            )
        )
        pairs.append((result.calibration.output.status, _size_of(result.calibration.output.target)))
    return format_pairs(pairs)


def _size_of(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _pixels(preprocessing: Preprocessing | None) -> str:
    assert preprocessing is not None
    if preprocessing.in_graph:
        return "RGB 0-255, normalised in the graph"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"RGB, (pixel - ({mean})) / ({std})"


def _certificate_table(certificate: Certificate) -> str:
    """One line for each kind of comparison: how many there were, and the worst."""
    kinds: dict[str, list[Check]] = {}
    for check in certificate.checks:
        kinds.setdefault(_kind(check.name), []).append(check)
    rows = [("comparison", "count", "worst error", "allowed")]
    for kind, checks in kinds.items():
        worst = max(checks, key=lambda check: check.error / check.tolerance)
        rows.append((kind, str(len(checks)), f"{worst.error:.1e}", f"{worst.tolerance:.1e}"))
    return format_table(rows, "<>>>", indent=0)


def _kind(name: str) -> str:
    if name.startswith("weights"):
        return "each weight, against the float64 fold"
    if name.startswith(("block", "convolution")):
        what, precision = name.partition(" ")[0], name.rpartition(", ")[2]
        return f"each {what}, {precision}"
    if name.startswith("network"):
        return "whole network, " + name.split(", ")[1]
    return "ONNX in ONNX Runtime"


if __name__ == "__main__":
    sys.exit(main())
