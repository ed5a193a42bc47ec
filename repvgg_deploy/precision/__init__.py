"""FP32 ONNX → FP16 or INT8 ONNX, judged before it is written. The entry is `quantize`.

Needs onnx and ONNX Runtime, no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .equalize import EqualizeOptions as EqualizeOptions
    from .fp16 import Fp16Options as Fp16Options
    from .fp16 import Fp16Report as Fp16Report
    from .fp16 import to_fp16 as to_fp16
    from .int8 import Int8Options as Int8Options
    from .int8 import Int8Report as Int8Report
    from .int8 import LayerReport as LayerReport
    from .int8 import quantize_graph as quantize_graph
    from .int8 import to_int8 as to_int8
    from .metrics import OutputError as OutputError
    from .metrics import Verification as Verification
    from .options import QuantizeOptions as QuantizeOptions
    from .quantization import ImageUse as ImageUse
    from .quantization import QuantizeResult as QuantizeResult
    from .quantization import StageTime as StageTime
    from .quantization import default_typed_output as default_typed_output
    from .quantization import quantize as quantize
    from .round import RoundOptions as RoundOptions
    from .scales import ScaleOptions as ScaleOptions
    from .score import Score as Score
    from .search import SearchOptions as SearchOptions
    from .typed_model import write_typed as write_typed

__getattr__ = find_lazily(
    __name__,
    {
        "equalize": "EqualizeOptions",
        "fp16": "Fp16Options Fp16Report to_fp16",
        "int8": "Int8Options Int8Report LayerReport quantize_graph to_int8",
        "metrics": "OutputError Verification",
        "options": "QuantizeOptions",
        "quantization": "ImageUse QuantizeResult StageTime default_typed_output quantize",
        "round": "RoundOptions",
        "scales": "ScaleOptions",
        "score": "Score",
        "search": "SearchOptions",
        "typed_model": "write_typed",
    },
)
