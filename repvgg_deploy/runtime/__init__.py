"""A model file → answers. The entry is `Engine`. Never imports torch or onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .answers import Answer as Answer
    from .answers import Prediction as Prediction
    from .batcher import Batcher as Batcher
    from .cuda.arrays import DeviceArray as DeviceArray
    from .cuda.arrays import DeviceArrays as DeviceArrays
    from .engine import Engine as Engine
    from .options import BatcherOptions as BatcherOptions
    from .options import EngineOptions as EngineOptions
    from .results import TopK as TopK
    from .results import rank_classes as rank_classes
    from .statistics import Histogram as Histogram
    from .statistics import Statistics as Statistics

__getattr__ = find_lazily(
    __name__,
    {
        "answers": "Answer Prediction",
        "batcher": "Batcher",
        "cuda.arrays": "DeviceArray DeviceArrays",
        "engine": "Engine",
        "options": "BatcherOptions EngineOptions",
        "results": "TopK rank_classes",
        "statistics": "Histogram Statistics",
    },
)
