"""Benchmark files with numbers that tests choose."""

from __future__ import annotations

from repvgg_deploy.measure.records import Benchmark, Device, ModelResult, Phases, Point
from repvgg_deploy.measure.roofline import Ceiling, count_costs
from repvgg_deploy.measure.times import Latency
from repvgg_deploy.specs.values import Precision
from repvgg_deploy.specs.variants import get_variant

CEILING = Ceiling("Fake GPU", {"fp32": 8e12, "fp16": 6.5e13, "int8": 1.3e14}, 3.2e11, "made for tests", measured=False)
PHASES = Phases(0.1, 0.9, 0.05, 0.2, 50)


def make_point(batch: int, median_ms: float, **changes: object) -> Point:
    latency = Latency(
        100,
        median_ms * 0.9,
        median_ms,
        median_ms * 1.1,
        median_ms * 1.2,
        median_ms * 1.5,
        median_ms * 2,
        median_ms * 1.02,
    )
    values: dict[str, object] = {"phases": None, "floor_ms": median_ms / 4, "share": 0.25, "warnings": (), **changes}
    return Point("engine", "TensorRT 10, Fake GPU", batch, 1, latency, 1e3 * batch / median_ms, **values)  # type: ignore[arg-type]


def make_model(
    variant: str = "A0",
    precision: Precision = "fp32",
    points: tuple[Point, ...] | None = None,
    *,
    size: int = 224,
    published: bool = True,
) -> ModelResult:
    costs = count_costs(get_variant(variant), (size, size), lambda _: precision)
    given = (
        points
        if points is not None
        else (make_point(1, 1.0), make_point(8, 2.0, phases=PHASES, warnings=("calls spread by 20 %",)))
    )
    return ModelResult(
        f"{variant.lower()}-{precision}.onnx", "0" * 64, variant, published, 1000, precision, (size, size), given, costs
    )


def make_benchmark(*models: ModelResult, device: str = "Fake GPU", ceiling: Ceiling | None = CEILING) -> Benchmark:
    return Benchmark(
        1, Device("gpu", device, None, "580.1"), {"repvgg-deploy": "0.1.0"}, 3.0, 1, ceiling, models or (make_model(),)
    )
