"""`repvgg-trt inspect`: what a model is and what was verified of it. Needs neither NumPy nor a runtime."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common import Command, Output, show_bytes
from .terminal import format_pairs, format_table, paint

if TYPE_CHECKING:
    from pathlib import Path

    from ..files.onnx import WeightedNode
    from ..specs.values import Certificate, HistoryEntry, ModelMetadata, ModelSpec, TensorSpec, VariantSpec
    from ..specs.variants import LayerRow

_FEW_LABELS = 3
_FEW_NODES = 20
_DIGEST_LETTERS = 64
_LARGE = ((10**9, "G"), (10**6, "M"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model."""
    parser.add_argument(
        "model", metavar="MODEL", help="an .onnx of repvgg-export, fold or quantize, or a plan with its passport"
    )
    parser.add_argument("--full", action="store_true", help="every check, every layer, every stage of the history")


def execute(args: argparse.Namespace) -> Output:
    """Describes a plan from its passport, and an ONNX from its metadata and graph."""
    from ..runtime.opening import as_path, is_plan

    path = as_path(args.model)
    return _describe_plan(path, full=args.full) if is_plan(path) else _describe_onnx(path, full=args.full)


def _describe_plan(path: Path, *, full: bool) -> Output:
    """What the passport says; whether the plan runs here is what `check` finds out."""
    from ..errors import PlanError
    from ..files.passport import passport_path, read_passport
    from .check import describe_plan

    passport = read_passport(path)
    if passport is None:
        raise PlanError(
            f"{path}: a TensorRT plan without a passport: {passport_path(path).name} is not beside it",
            remedy="bring the passport along; repvgg-trt build writes both",
        )
    spec, certificate = passport.spec, passport.certificate
    built = f"{passport.build_seconds:.1f} s, {f'on {passport.gpu_name}' if passport.gpu_name else 'without a GPU'}"
    pairs = [
        ("plan", f"{path}, {show_bytes(path.stat().st_size)}, as the passport beside it says"),
        *describe_plan(passport),
        ("built", f"{built}, from the ONNX {passport.onnx_sha256[:16]}…"),
        ("variant", _describe_variant(passport.variant)),
        ("input", _describe_tensor(spec.input)),
        ("output", "\n".join(_describe_tensor(output) for output in spec.outputs)),
        ("preprocessing", _describe_preprocessing(spec)),
        ("labels", _describe_labels(spec.labels)),
        ("history", _describe_history(passport.history, full=full)),
        *(("taken as given", fact) for fact in certificate.facts),
        ("certificate", _describe_certificate(certificate, full=full)),
    ]
    return Output(
        data={"plan": str(path), "passport": passport},
        text="\n".join([format_pairs(pairs), *_check_lines(certificate, full=full)]),
        next_command=f"repvgg-trt check {path}",
    )


def _describe_onnx(path: Path, *, full: bool) -> Output:
    """Layer by layer or stage by stage, or by nodes where its variant is not known."""
    from ..files.onnx import (
        count_weights,
        describe_shares,
        precision_of,
        read_graph,
        share_by_precision,
        weighted_nodes,
    )
    from ..runtime.opening import read_model
    from ..specs.codec import encode
    from ..specs.variants import layer_rows

    metadata, graph = read_model(path), read_graph(path)
    spec, variant, certificate = metadata.spec, metadata.variant, metadata.certificate
    nodes, size = weighted_nodes(graph), spec.image_size
    rows = layer_rows(variant, size) if variant is not None else ()
    rows = tuple(dataclasses.replace(row, precision=precision_of(row.name, nodes)) for row in rows)
    counted = [row.macs for row in rows if row.macs is not None]
    macs = sum(counted) if rows and len(counted) == len(rows) else None
    precisions = [(row.precision, row.macs) for row in rows if row.precision is not None and row.macs is not None]
    by_macs = bool(rows) and len(precisions) == len(rows)
    shares = precisions if by_macs else [(node.precision, count_weights(node)) for node in nodes]
    stored = sum(math.prod(shape) for shape in graph.initializers.values())
    operators = graph.count_ops()
    known = describe_shares(shares, "multiply-accumulates" if by_macs else "weights")
    pairs = [("model", f"{path}, {show_bytes(graph.file_bytes)}, opset {graph.opset}"), ("precision", known)]
    pairs += _describe_metadata(metadata, operators, full=full)
    if rows:
        layers = _layer_lines(rows if full else _sum_stages(rows), size, macs, what="layers" if full else "stages")
    else:
        layers = _node_lines(nodes) if full or len(nodes) <= _FEW_NODES else _count_nodes(nodes)
    data = {
        "model": str(path),
        "file_bytes": graph.file_bytes,
        "opset": graph.opset,
        "spec": spec,
        "variant": variant,
        "source": metadata.source,
        "certificate": {**encode(certificate), "passed": certificate.passed},
        "history": metadata.history,
        "statistics": sorted(metadata.statistics),
        "content_sha256": metadata.content_sha256,
        "operators": operators,
        "precision": share_by_precision(shares),
        "layers": list(rows),
        "parameters": sum(row.parameters for row in rows) if rows else None,
        "macs": macs,
        "stored_numbers": stored,
    }
    numbers = f"numbers stored in the file: {stored:,}"
    numbers += f"; multiply-accumulates of an image: {macs:,}" if macs is not None else ""
    is_classifier = spec.kind in ("logits", "probabilities", "top5") and spec.preprocessing is not None
    return Output(
        data=data,
        text="\n".join([format_pairs(pairs), *_check_lines(certificate, full=full), *layers, numbers]),
        next_command=f"repvgg-trt infer {path} IMAGE…" if is_classifier else None,
    )


def _show_digest(digest: str | None, *, full: bool) -> str:
    return f"sha256 {digest if full else (digest or '?')[:16] + '…'}"


def _describe_metadata(metadata: ModelMetadata, operators: dict[str, int], *, full: bool) -> list[tuple[str, str]]:
    spec, source = metadata.spec, metadata.source
    first = metadata.history[0] if metadata.history else None
    origin = "none: weights from memory"
    if first is not None and first.stage == "fold":
        origin = f"none: an ONNX of others\n{_show_digest(first.parent_sha256, full=full)}"
    if source is not None:
        origin = f"{source.file}, {source.family} family, {source.form} form\n{_show_digest(source.sha256, full=full)}"
    return [
        ("variant", _describe_variant(metadata.variant)),
        ("input", _describe_tensor(spec.input)),
        ("output", "\n".join(_describe_tensor(output) for output in spec.outputs)),
        ("preprocessing", _describe_preprocessing(spec)),
        ("labels", _describe_labels(spec.labels)),
        ("checkpoint", origin),
        ("history", _describe_history(metadata.history, full=full)),
        ("operators", ", ".join(f"{name} {count}" for name, count in sorted(operators.items()))),
        *(("taken as given", fact) for fact in metadata.certificate.facts),
        ("certificate", _describe_certificate(metadata.certificate, full=full)),
    ]


def _describe_variant(variant: VariantSpec | None) -> str:
    if variant is None:
        return "none: a module of the user's own"
    groups = "" if max(variant.groups) == 1 else f", up to {max(variant.groups)} groups"
    se = "" if variant.se == "none" else f", squeeze-and-excitation {variant.se.replace('_', ' ')}"
    depths, widths = (" ".join(map(str, numbers)) for numbers in (variant.depths, variant.widths))
    return f"{variant.name}: depths {depths}, widths {widths}{groups}{se}, {variant.num_classes} classes"


def _describe_tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name}: {tensor.dtype} ({', '.join(map(str, tensor.shape))}) {tensor.layout}"


def _describe_preprocessing(spec: ModelSpec) -> str:
    from ..images.pixels import FULL_SCALE

    how = spec.preprocessing
    if how is None:
        return "not known"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
    where = "normalised in the graph" if how.in_graph else "normalised by the caller"
    size = f"short side to {how.resize_short}"
    if how.box is not None:
        size = f"{'stretched to' if how.fit == 'stretch' else 'resized until it covers'} {how.box[0]}×{how.box[1]}"
    resize = f"RGB, {size} ({how.interpolation}), centre crop {how.crop[0]}×{how.crop[1]}"
    if how.fit == "letterbox":
        around = ", ".join(map(str, how.pad))
        resize = f"RGB, letterboxed ({how.interpolation}) into {how.crop[0]}×{how.crop[1]}, around it {around}"
    if how.max_value != FULL_SCALE:
        resize += f"; of more than 8 bits, {how.max_value} is white"
    return f"{resize}\n{where}: mean {mean}, std {std} (0–255)"


def _describe_labels(labels: tuple[str, ...] | None) -> str:
    if labels is None:
        return "none"
    return f"{len(labels)}: {', '.join(labels[:_FEW_LABELS])}{', …' if len(labels) > _FEW_LABELS else ''}"


def _describe_stage(stage: str, options: dict[str, str | int | float | bool | None]) -> str:
    said = []
    for name, value in options.items():
        text = str(value)
        is_digest = len(text) == _DIGEST_LETTERS and set(text) <= set("0123456789abcdef")
        if value is not None:
            said.append(f"{name} {text[:16]}…" if is_digest else f"{name} {text}")
    return f"{stage}: {', '.join(said)}" if said else stage


def _describe_history(history: Sequence[HistoryEntry], *, full: bool) -> str:
    if not full:
        return " → ".join(entry.stage for entry in history) or "none"
    return "\n".join(_describe_stage(entry.stage, entry.options) for entry in history) or "none"


def _describe_certificate(certificate: Certificate, *, full: bool) -> str:
    from .export import certificate_table

    passed = sum(check.passed for check in certificate.checks)
    verdict = paint("passed", "good") if certificate.passed else paint("NOT PASSED", "bad")
    head = f"{verdict}, {passed} of {len(certificate.checks)} checks, against {certificate.reference}"
    if not full:
        return f"{head}\n{certificate_table(certificate)}" if certificate.checks else head
    versions = ", ".join(f"{name} {version}" for name, version in sorted(certificate.versions.items()))
    return f"{head}\nwith {versions}"


def _check_lines(certificate: Certificate, *, full: bool) -> list[str]:
    """Every check of the certificate; its name, which may be long, stands last, where a terminal folds it."""
    if not full or not certificate.checks:
        return []
    rows = [["error", "allowed", "scale", "check"]]
    for check in certificate.checks:
        verdict = "" if check.passed else paint("FAILED", "bad") + ": "
        rows.append([f"{check.error:.2e}", f"{check.tolerance:.2e}", f"{check.scale:.3g}", f"{verdict}{check.name}"])
    return ["checks of the certificate", format_table(rows, ">>><")]


def _node_lines(nodes: Sequence[WeightedNode]) -> list[str]:
    rows = [["operator", "weight", "precision", "node"]]
    rows += [[node.op_type, "×".join(map(str, node.weight_shape or ())), node.precision, node.name] for node in nodes]
    return ["layers", format_table(rows, "<<<<")]


def _count_nodes(nodes: Sequence[WeightedNode]) -> list[str]:
    """How many nodes there are of each operator and precision, and how many weights they hold."""
    from ..files.onnx import count_weights

    counts: dict[tuple[str, str], list[int]] = {}
    for node in nodes:
        known = counts.setdefault((node.op_type, node.precision), [0, 0])
        known[0] += 1
        known[1] += count_weights(node)
    rows = [["operator", "precision", "nodes", "weights"]]
    rows += [[*key, str(number), f"{weights:,}"] for key, (number, weights) in sorted(counts.items())]
    return ["layers by operator (--full lists each)", format_table(rows, "<<>>")]


def _sum_stages(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """One row a stage: `stage2 ×4`, from the channels that it takes to those that it gives."""
    stages: dict[str, list[LayerRow]] = {}
    for row in rows:
        stages.setdefault(row.name.partition(".")[0], []).append(row)
    summed = []
    for name, layers in stages.items():
        macs = [layer.macs for layer in layers if layer.macs is not None]
        last = [layer for layer in layers if not layer.name.endswith(".se")][-1]
        summed.append(
            dataclasses.replace(
                last,
                name=name if len(layers) == 1 else f"{name} ×{len(layers)}",
                channels=(layers[0].channels[0], last.channels[1]),
                stride=math.prod(layer.stride for layer in layers),
                groups=max(layer.groups for layer in layers),
                parameters=sum(layer.parameters for layer in layers),
                macs=sum(macs) if len(macs) == len(layers) else None,
                precision="+".join(sorted({layer.precision or "?" for layer in layers})),
            )
        )
    return summed


def _layer_lines(rows: Sequence[LayerRow], size: tuple[int, int] | None, macs: int | None, *, what: str) -> list[str]:
    grouped = any(row.groups > 1 for row in rows)  # else a column that says nothing
    head = [
        "layer",
        "channels",
        "stride",
        *(["groups"] if grouped else []),
        "output",
        "parameters",
        "MACs",
        "precision",
    ]
    table = [head]
    for row in rows:
        shape = [f"{row.channels[0]}→{row.channels[1]}", str(row.stride), *([str(row.groups)] if grouped else [])]
        numbers = [_times(row.output_size), f"{row.parameters:,}", _count(row.macs)]
        table.append([row.name, *shape, *numbers, row.precision or "?"])
    empty = [""] * (len(head) - 5)
    table.append(["total", *empty, "", f"{sum(row.parameters for row in rows):,}", _count(macs), ""])
    note = "" if what == "layers" else " (--full lists each layer)"
    title = f"{what} of the deploy form{f', one image of {_times(size)}' if size else ''}{note}"
    return [title, format_table(table, "<>>" + ">" * grouped + ">>><")]


def _times(size: tuple[int, int] | None) -> str:
    return "?" if size is None else f"{size[0]}×{size[1]}"


def _count(number: int | None) -> str:
    """Three digits, as `1,600`, `20.6 M` or `1.36 G`: a table with all of them would not fit 80 columns."""
    if number is None:
        return "?"
    size, letter = next(((size, letter) for size, letter in _LARGE if number >= size), (1, ""))
    if size == 1:
        return f"{number:,}"
    share = number / size
    return f"{share:,.{2 if share < 9.995 else 1 if share < 99.95 else 0}f} {letter}"


COMMAND = Command(
    "inspect",
    "print what a model is and what was verified of it",
    "Prints the specification, preprocessing, certificate, source checkpoint, layers, parameters and "
    "multiply-accumulates of a model, on one screen; --full says all. Of a plan it reads the passport, and needs no "
    "runtime.",
    add_options,
    execute,
)
