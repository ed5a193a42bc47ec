"""`repvgg-trt inspect`: what a model is and what was verified of it. Needs neither NumPy nor a runtime."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ..files.onnx import (
    GraphSummary,
    WeightedNode,
    count_weights,
    describe_shares,
    precision_of,
    read_graph,
    share_by_precision,
    weighted_nodes,
)
from ..specs import codec
from ..specs.values import Certificate, ModelMetadata, ModelSpec, TensorSpec, VariantSpec
from ..specs.variants import LayerRow, image_size, layer_rows
from .common import Output, format_pairs, format_table, show_bytes

_FEW_LABELS = 3
_DIGEST_LETTERS = 64


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        ModelError: The file is not a complete, unchanged model of ours.
    """
    from ..runtime.opening import as_path, read_model

    path = as_path(args.model)
    metadata, graph = read_model(path), read_graph(path)
    size = image_size(metadata.spec)
    nodes = weighted_nodes(graph)
    rows = layer_rows(metadata.variant, size) if metadata.variant is not None else ()
    rows = tuple(dataclasses.replace(row, precision=precision_of(row.name, nodes)) for row in rows)
    is_classifier = (
        metadata.spec.kind in ("logits", "probabilities", "top5") and metadata.spec.preprocessing is not None
    )
    return Output(
        data=_as_json(path, metadata, graph, rows),
        text="\n".join([_summary(path, metadata, graph, rows), *_layer_lines(rows, size, graph)]),
        next_command=f"repvgg-trt infer {path} IMAGE…" if is_classifier else None,
    )


def _summary(path: Path, metadata: ModelMetadata, graph: GraphSummary, rows: Sequence[LayerRow]) -> str:
    spec, source = metadata.spec, metadata.source
    pairs = [
        ("model", f"{path}, {show_bytes(graph.file_bytes)}, opset {graph.opset}"),
        ("precision", describe_shares(*_precisions(rows, weighted_nodes(graph)))),
        ("variant", _describe_variant(metadata.variant)),
        ("input", _describe_tensor(spec.input)),
        ("output", "\n".join(_describe_tensor(output) for output in spec.outputs)),
        ("preprocessing", _describe_preprocessing(spec)),
        ("labels", _describe_labels(spec.labels)),
        (
            "checkpoint",
            f"{source.file}, {source.family} family, {source.form} form\nsha256 {source.sha256}"
            if source
            else "none: weights from memory",
        ),
        ("history", "\n".join(_describe_options(entry.stage, entry.options) for entry in metadata.history) or "none"),
        ("operators", ", ".join(f"{name} {count}" for name, count in sorted(graph.count_ops().items()))),
        ("certificate", _describe_certificate(metadata.certificate)),
    ]
    return format_pairs(pairs)


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
    how = spec.preprocessing
    if how is None:
        return "not known"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
    where = "normalised in the graph" if how.in_graph else "normalised by the caller"
    resize = f"RGB, short side to {how.resize_short} ({how.interpolation}), centre crop {how.crop[0]}×{how.crop[1]}"
    return f"{resize}\n{where}: mean {mean}, std {std} (0–255)"


def _describe_labels(labels: tuple[str, ...] | None) -> str:
    if labels is None:
        return "none"
    return f"{len(labels)}: {', '.join(labels[:_FEW_LABELS])}{', …' if len(labels) > _FEW_LABELS else ''}"


def _precisions(rows: Sequence[LayerRow], nodes: Sequence[WeightedNode]) -> tuple[list[tuple[str, int]], str]:
    """Precision and size of each layer, and what the sizes count."""
    known = [(row.precision, row.macs) for row in rows if row.precision is not None and row.macs is not None]
    if known and len(known) == len(rows):
        return known, "multiply-accumulates"
    return [(node.precision, count_weights(node)) for node in nodes], "weights"


def _describe_options(stage: str, options: dict[str, str | int | float | bool | None]) -> str:
    said = [f"{name} {_shorten_digest(value)}" for name, value in options.items() if value is not None]
    return f"{stage}: {', '.join(said)}" if said else stage


def _shorten_digest(value: str | float | bool) -> str:
    text = str(value)
    return f"{text[:16]}…" if len(text) == _DIGEST_LETTERS and set(text) <= set("0123456789abcdef") else text


def _describe_certificate(certificate: Certificate) -> str:
    passed = sum(check.passed for check in certificate.checks)
    verdict = "passed" if certificate.passed else "NOT PASSED"
    rows = [["check", "error", "allowed", "scale", ""]]
    rows += [
        [c.name, f"{c.error:.2e}", f"{c.tolerance:.2e}", f"{c.scale:.3g}", "" if c.passed else "FAILED"]
        for c in certificate.checks
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(certificate.versions.items()))
    head = f"{verdict}, {passed} of {len(certificate.checks)} checks, against {certificate.reference}\nwith {versions}"
    return f"{head}\n{format_table(rows, '<>>><', indent=0)}"


def _layer_lines(rows: Sequence[LayerRow], size: tuple[int, int] | None, graph: GraphSummary) -> list[str]:
    stored = sum(math.prod(shape) for shape in graph.initializers.values())
    if not rows:
        table = [
            [node.name, node.op_type, "×".join(map(str, node.weight_shape or ())), node.precision]
            for node in weighted_nodes(graph)
        ]
        return [
            "layers",
            format_table([["node", "operator", "weight", "precision"], *table], "<<<<"),
            f"numbers stored in the file: {stored:,}",
        ]
    table = [["layer", "channels", "stride", "groups", "output", "parameters", "MACs", "precision"]]
    table += [_layer_line(row) for row in rows]
    table.append(["total", "", "", "", "", f"{sum(row.parameters for row in rows):,}", _count(_total_macs(rows)), ""])
    title = f"layers of the deploy form, one image of {_times(size)}" if size else "layers of the deploy form"
    return [title, format_table(table, "<>>>>>><"), f"numbers stored in the file: {stored:,}"]


def _layer_line(row: LayerRow) -> list[str]:
    channels = f"{row.channels[0]} → {row.channels[1]}"
    numbers = [str(row.stride), str(row.groups), _times(row.output_size), f"{row.parameters:,}", _count(row.macs)]
    return [row.name, channels, *numbers, row.precision or "?"]


def _times(size: tuple[int, int] | None) -> str:
    return "?" if size is None else f"{size[0]}×{size[1]}"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _total_macs(rows: Sequence[LayerRow]) -> int | None:
    known = [row.macs for row in rows if row.macs is not None]
    return sum(known) if len(known) == len(rows) else None


def _as_json(path: Path, metadata: ModelMetadata, graph: GraphSummary, rows: Sequence[LayerRow]) -> dict[str, object]:
    certificate = metadata.certificate
    return {
        "model": str(path),
        "file_bytes": graph.file_bytes,
        "opset": graph.opset,
        "spec": metadata.spec,
        "variant": metadata.variant,
        "source": metadata.source,
        "certificate": {**codec.encode(certificate), "passed": certificate.passed},
        "history": metadata.history,
        "statistics": sorted(metadata.statistics),
        "content_sha256": metadata.content_sha256,
        "operators": graph.count_ops(),
        "precision": share_by_precision(_precisions(rows, weighted_nodes(graph))[0]),
        "layers": list(rows),
        "parameters": sum(row.parameters for row in rows) if rows else None,
        "macs": _total_macs(rows) if rows else None,
        "stored_numbers": sum(math.prod(shape) for shape in graph.initializers.values()),
    }
