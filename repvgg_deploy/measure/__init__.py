"""How fast a model runs, and how fast it could. The entry is `run_benchmark`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .advice import Advice as Advice
    from .advice import Assumptions as Assumptions
    from .advice import Choice as Choice
    from .advice import Measured as Measured
    from .advice import Nearest as Nearest
    from .advice import Wish as Wish
    from .advice import advise as advise
    from .advice import choose_files as choose_files
    from .advice import estimate_ms as estimate_ms
    from .advice import find_nearest as find_nearest
    from .advice import published_accuracy as published_accuracy
    from .advice import unused_models as unused_models
    from .bench import BenchRequest as BenchRequest
    from .bench import run_benchmark as run_benchmark
    from .peaks import GpuPeaks as GpuPeaks
    from .peaks import find_gpu_peaks as find_gpu_peaks
    from .peaks import measure_cpu as measure_cpu
    from .plots import draw_benchmark as draw_benchmark
    from .records import Benchmark as Benchmark
    from .records import Device as Device
    from .records import ModelResult as ModelResult
    from .records import Phases as Phases
    from .records import Point as Point
    from .records import read_benchmark as read_benchmark
    from .records import write_benchmark as write_benchmark
    from .roofline import Ceiling as Ceiling
    from .roofline import LayerBound as LayerBound
    from .roofline import LayerCost as LayerCost
    from .roofline import bound_layers as bound_layers
    from .roofline import count_costs as count_costs
    from .roofline import total_floor_ms as total_floor_ms
    from .times import Latency as Latency
    from .times import Pace as Pace

__getattr__ = find_lazily(
    __name__,
    {
        "advice": "Advice Assumptions Choice Measured Nearest Wish advise choose_files estimate_ms find_nearest "
        "published_accuracy unused_models",
        "bench": "BenchRequest run_benchmark",
        "peaks": "GpuPeaks find_gpu_peaks measure_cpu",
        "plots": "draw_benchmark",
        "records": "Benchmark Device ModelResult Phases Point read_benchmark write_benchmark",
        "roofline": "Ceiling LayerBound LayerCost bound_layers count_costs total_floor_ms",
        "times": "Latency Pace",
    },
)
