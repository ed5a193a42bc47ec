"""OpenVINO behind the Backend protocol: the fastest way to run typed INT8 graphs on a CPU.

The package is imported when a model is opened.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, ModelError, say_install
from ...files.onnx import is_quantized
from ...specs.values import ModelSpec
from ..checks import RUN_REMEDY, GraphTensor, check_graph, import_backend, one_line
from ..options import EngineOptions
from .int8 import prepare
from .processor import require_bfloat16

logger = logging.getLogger(__name__)
_DTYPES = {"f32": "float32", "f16": "float16", "u8": "uint8", "i64": "int64", "i32": "int32"}


class OpenVinoBackend:
    """A compiled OpenVINO model on the CPU.

    Many threads may call `run` at once: each call takes an infer request from a pool that grows to as many as are ever
    in use together.

    Args:
        path: An ONNX whose metadata was checked.
        spec: What that metadata says of inputs and outputs.
        options: Threads, bfloat16.

    Raises:
        InputError: `bfloat16` is asked for, and this processor does not compute in it.
        ModelError: OpenVINO refuses the file, or the graph is not what the specification says.
        MissingDependencyError: openvino is not installed or does not load.
    """

    def __init__(self, path: Path, spec: ModelSpec, options: EngineOptions) -> None:
        library = import_backend(
            "openvino",
            'backend="openvino" needs OpenVINO',
            remedy=f"{say_install('openvino')}, or leave backend out to run on ONNX Runtime",
        )
        version = str(library.__version__).partition("-")[0]
        # FP32 means FP32: by default OpenVINO computes it in bfloat16 where the CPU can, with an error of 4e-3.
        if options.bfloat16:
            require_bfloat16()
        settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": "bf16" if options.bfloat16 else "f32",
            "NUM_STREAMS": 1,
        }
        if options.intra_op_threads is not None:
            # These share one batch, as with ONNX Runtime; with more cores than that, several batches run side by side.
            streams = max(1, (os.cpu_count() or 1) // options.intra_op_threads)
            settings |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * options.intra_op_threads}
        try:
            core = library.Core()
            model = core.read_model(prepare(path, "openvino") if is_quantized(path) else str(path))
            self._compiled: Any = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise ModelError(
                f"{path}: OpenVINO {version} refuses it: {one_line(error)}",
                remedy='upgrade openvino, or open it with backend="onnxruntime"',
            ) from error
        check_graph(path, spec, [_describe(port) for port in model.inputs], [_describe(port) for port in model.outputs])
        self._count = len(spec.outputs)
        self._process = os.getpid()
        self._idle: deque[Any] = deque([self._compiled.create_infer_request()])
        self._label = f"OpenVINO {version}, CPU{' in bfloat16' if options.bfloat16 else ''}"
        logger.info("%s: opened with %s", path, self._label)

    @property
    def name(self) -> str:
        """OpenVINO, its version, its device, and bfloat16 where it computes in that."""
        return self._label

    def run(self, batch: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Runs one batch; see Backend.

        Raises:
            InputError: The process forked after the model was opened.
            ModelError: OpenVINO failed.
        """
        if self._process != os.getpid():  # it would wait for its threads for ever
            raise InputError(
                "this Engine was opened before a fork, and threads do not follow",
                remedy="open the Engine in each worker process",
            )
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            # The batch is read where it lies; the answers lie in the request's memory, which the next batch overwrites.
            request.infer([batch], share_inputs=True, share_outputs=True)
            return [np.array(request.get_output_tensor(index).data) for index in range(self._count)]
        except Exception as error:
            raise ModelError(
                f"OpenVINO failed on a batch of {batch.dtype} {batch.shape}: {one_line(error)}", remedy=RUN_REMEDY
            ) from error
        finally:
            self._idle.append(request)

    def close(self) -> None:
        """Frees the model."""
        self._idle.clear()
        self._compiled = None


def _describe(port: Any) -> GraphTensor:
    kind = port.get_element_type().get_type_name()
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return port.get_any_name(), _DTYPES.get(kind, kind), shape
