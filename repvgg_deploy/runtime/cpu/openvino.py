"""OpenVINO behind the Backend protocol: the fastest CPU path for typed INT8 graphs. The package is imported when a model is opened."""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, MissingDependencyError, ModelError
from ...files.onnx import is_quantized
from ...specs.values import ModelSpec
from ..checks import RUN_REMEDY, Interface, check_interface, one_line
from ..options import EngineOptions
from .int8 import prepare

logger = logging.getLogger(__name__)
_DTYPES = {"f32": "float32", "f16": "float16", "u8": "uint8", "i64": "int64", "i32": "int32"}


class OpenVinoBackend:
    """A compiled OpenVINO model on the CPU.

    Many threads may call `run` at once: each call takes an infer request from a pool that grows to as many as are ever
    in use together.

    Args:
        path: An ONNX whose metadata was checked.
        spec: What that metadata says of inputs and outputs.
        options: Threads.

    Raises:
        ModelError: OpenVINO refuses the file, or the graph is not what the specification says.
        MissingDependencyError: openvino is not installed or does not load.
    """

    def __init__(self, path: Path, spec: ModelSpec, options: EngineOptions) -> None:
        library = _import_openvino()
        try:
            core = library.Core()
            model = core.read_model(prepare(path, "openvino") if is_quantized(path) else str(path))
            self._compiled: Any = core.compile_model(model, "CPU", _settings(options))
        except Exception as error:
            raise ModelError(
                f"{path}: OpenVINO {_version(library)} refuses it: {one_line(error)}",
                remedy='upgrade openvino, or open it with backend="onnxruntime"',
            ) from error
        check_interface(
            path, spec, [_describe(port) for port in model.inputs], [_describe(port) for port in model.outputs]
        )
        self._count = len(spec.outputs)
        self._process = os.getpid()
        self._idle: deque[Any] = deque([self._compiled.create_infer_request()])
        self._label = f"OpenVINO {_version(library)}, CPU"
        logger.info("%s: opened with %s", path, self._label)

    @property
    def name(self) -> str:
        """OpenVINO, its version and its device."""
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
                f"OpenVINO failed on a batch of {batch.dtype} {batch.shape}: {one_line(error)}",
                remedy=RUN_REMEDY,
            ) from error
        finally:
            self._idle.append(request)

    def close(self) -> None:
        """Frees the model."""
        self._idle.clear()
        self._compiled = None


def _import_openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        reason = (
            "is not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == "openvino"
            else f"cannot be loaded: {error}"
        )
        remedy = "pip install 'repvgg-deploy[openvino]', or leave backend out to run on ONNX Runtime"
        raise MissingDependencyError(f'backend="openvino" needs OpenVINO, which {reason}', remedy=remedy) from error


def _settings(options: EngineOptions) -> dict[str, object]:
    """FP32 means FP32: by default OpenVINO computes it in bfloat16 where the CPU can, with an error of 4e-3.

    Threads are those that share one batch, as with ONNX Runtime: where that is fewer than there are cores, several
    batches run side by side.
    """
    threads, cores = options.intra_op_threads, os.cpu_count() or 1
    settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads is not None:
        streams = max(1, cores // threads)
        settings |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * threads}
    return settings


def _version(library: Any) -> str:
    return str(library.__version__).partition("-")[0]


def _describe(port: Any) -> Interface:
    kind = port.get_element_type().get_type_name()
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return port.get_any_name(), _DTYPES.get(kind, kind), shape
