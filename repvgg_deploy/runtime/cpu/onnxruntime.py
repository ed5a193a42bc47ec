"""ONNX Runtime behind the Backend protocol. The package is imported when a model is opened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...errors import CudaError, ModelError, say_install
from ...files.onnx import is_quantized
from ...specs.values import ModelSpec
from ..checks import RUN_REMEDY, GraphTensor, check_graph, import_backend, one_line
from ..options import DeviceKind, EngineOptions
from .int8 import prepare

logger = logging.getLogger(__name__)
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL = {
    "cpu": f"{say_install('cpu')}, or '.[gpu]' on a machine with an NVIDIA GPU; never both",
    "cuda": f"pip uninstall onnxruntime, then {say_install('gpu')}: the two share one folder",
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_WRONG_WITH_PAIRS = ("WeightBiasQuantization",)
"""Optimizers that change what a graph with Q/DQ pairs computes. This one wrongly quantizes the biases of an INT8 graph
with FP16 between its pairs: in 1.32 its logits have cosine 0.47 with those of the graph as it stands, 0.9999 else."""
_FATAL_ONLY = 4  # ONNX Runtime writes errors to standard error and raises them too; we only need them once


class OnnxRuntimeBackend:
    """An ONNX Runtime session on the CPU, or on one GPU and never silently elsewhere.

    Args:
        path: An ONNX whose metadata was checked.
        spec: What that metadata says of inputs and outputs.
        device: `cpu` or `cuda`.
        options: Threads, GPU, TF32.

    Raises:
        ModelError: ONNX Runtime refuses the file, or the graph is not what the specification says.
        CudaError: `cuda` was asked for and ONNX Runtime would run elsewhere.
        MissingDependencyError: onnxruntime is not installed or does not load.
    """

    def __init__(self, path: Path, spec: ModelSpec, device: DeviceKind, options: EngineOptions) -> None:
        runtime = import_backend("onnxruntime", "running an ONNX model needs ONNX Runtime", remedy=_INSTALL[device])
        quantized = is_quantized(path)
        session_options = runtime.SessionOptions()
        if options.intra_op_threads is not None:
            session_options.intra_op_num_threads = options.intra_op_threads
        if not logger.isEnabledFor(logging.DEBUG):
            session_options.log_severity_level = _FATAL_ONLY
        arguments: dict[str, Any] = {"sess_options": session_options}
        if quantized:
            arguments["disabled_optimizers"] = list(_WRONG_WITH_PAIRS)
        if device == "cuda":
            if spec.kind != "module":  # a user's own module may hold shape arithmetic, which belongs on the CPU
                session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            self._session: Any = _open_cuda(runtime, path, options, arguments)
        else:
            self._session = _open_cpu(runtime, path, arguments, quantized=quantized)
        check_graph(
            path,
            spec,
            [_describe(node) for node in self._session.get_inputs()],
            [_describe(node) for node in self._session.get_outputs()],
        )
        self._device = device
        self._input_name = spec.input.name
        self._output_names = [output.name for output in spec.outputs]
        self._label = f"ONNX Runtime {runtime.__version__}, {self._session.get_providers()[0]}"
        logger.info("%s: opened with %s", path, self._label)

    @property
    def name(self) -> str:
        """ONNX Runtime, its version and its execution provider."""
        return self._label

    def run(self, batch: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Runs one batch; see Backend.

        Raises:
            ModelError: ONNX Runtime failed on the CPU.
            CudaError: ONNX Runtime failed on the GPU.
        """
        try:
            outputs: Sequence[NDArray[Any]] = self._session.run(self._output_names, {self._input_name: batch})
        except Exception as error:
            kind = CudaError if self._device == "cuda" else ModelError
            raise kind(
                f"ONNX Runtime failed on a batch of {batch.dtype} {batch.shape}: {one_line(error)}", remedy=RUN_REMEDY
            ) from error
        return outputs

    def close(self) -> None:
        """Frees the session."""
        self._session = None


def _open_cpu(runtime: Any, path: Path, arguments: dict[str, Any], *, quantized: bool) -> Any:
    source = prepare(path, "onnxruntime") if quantized else str(path)
    try:
        # The provider is named: a GPU build would choose for itself, and installing a package must not change answers.
        return runtime.InferenceSession(source, providers=[_CPU], **arguments)
    except Exception as error:
        raise ModelError(
            f"{path}: ONNX Runtime {runtime.__version__} refuses it: {one_line(error)}",
            remedy="upgrade onnxruntime, or export the model again with a lower --opset",
        ) from error


def _open_cuda(runtime: Any, path: Path, options: EngineOptions, arguments: dict[str, Any]) -> Any:
    available = runtime.get_available_providers()
    if _CUDA not in available:
        raise CudaError(
            f'{path}: device="cuda" was asked for, but this ONNX Runtime {runtime.__version__} offers only '
            f"{', '.join(available)}",
            remedy=_INSTALL["cuda"],
        )
    # TF32 is on by default in this provider; FP32 means FP32 here unless the user says otherwise.
    settings = {"device_id": str(options.device_id), "use_tf32": str(int(options.tf32))}
    try:
        session = runtime.InferenceSession(str(path), providers=[(_CUDA, settings)], enable_fallback=False, **arguments)
    except Exception as error:
        raise CudaError(
            f"{path}: cannot be opened on GPU {options.device_id}: {one_line(error)}",
            remedy="check nvidia-smi, the driver's version and EngineOptions(device_id=…)",
        ) from error
    session.disable_fallback()  # else a failing run() prints a line and goes on on the CPU
    providers = session.get_providers()
    if not providers or providers[0] != _CUDA:
        raise CudaError(
            f'{path}: device="cuda" was asked for, but ONNX Runtime fell back to {", ".join(providers) or "nothing"}',
            remedy="check nvidia-smi, and that CUDA and cuDNN are those this onnxruntime-gpu was built for; or ask for "
            'device="cpu"',
        )
    return session


def _describe(node: Any) -> GraphTensor:
    return node.name, _DTYPES.get(node.type, node.type), tuple(node.shape)
