"""What a passport says of a plan: all that is known when it is built."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Literal

from .. import __version__
from ..builder.build import BuiltPlan
from ..builder.precision_check import PrecisionReport
from ..files.plan_place import platform_here
from ..specs.values import PASSPORT_SCHEMA, HistoryEntry, ModelSpec, PlanPassport
from .build_request import PlanRequest
from .build_source import Source


def make_passport(source: Source, request: PlanRequest, built: BuiltPlan, seconds: float) -> PlanPassport:
    """Of a plan that was built now.

    Args:
        source: The typed ONNX.
        request: What was asked for.
        built: What came of it.
        seconds: That it took.
    """
    metadata, library, gpu = source.metadata, request.library, request.gpu
    entry = HistoryEntry("build", {"repvgg-deploy": __version__, library.flavour: library.version}, request.build_options(), source.sha256)
    return PlanPassport(
        schema=PASSPORT_SCHEMA,
        plan_sha256=hashlib.sha256(memoryview(built.data)).hexdigest(),
        onnx_sha256=source.sha256,
        spec=_with_types(metadata.spec, built.output_types),
        certificate=metadata.certificate,
        precision=_seen(built.report),
        config=request.config,
        flavour=library.flavour,
        tensorrt_version=library.version,
        gpu_name=None if gpu is None else gpu.name,
        compute_capabilities=request.capabilities,
        driver_version=None if gpu is None else gpu.driver_version,
        build_seconds=round(seconds, 2),
        history=(*metadata.history, entry),
        precision_shares={} if built.report is None else built.report.shares,
        platform=platform_here(),
        variant=metadata.variant,
    )


def _seen(report: PrecisionReport | None) -> Literal["fp32", "fp16", "int8", "not_inspected"]:
    known: dict[str, Literal["fp32", "fp16", "int8"]] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    return "not_inspected" if report is None else known.get(report.precision, "not_inspected")


def _with_types(spec: ModelSpec, types: Mapping[str, str]) -> ModelSpec:
    """The specification as the plan has it: TensorRT 8 gives class numbers as int32."""
    changed = [dataclasses.replace(output, dtype="int32") if types.get(output.name) == "int32" else output for output in spec.outputs]
    return dataclasses.replace(spec, outputs=tuple(changed))


def complete_passport(passport: PlanPassport, source: Source) -> PlanPassport:
    """With the architecture, which passports of before do not name.

    Args:
        passport: Of a plan that was built of `source`, or of what that was quantized to.
        source: An ONNX.
    """
    return passport if passport.variant is not None else dataclasses.replace(passport, variant=source.metadata.variant)
