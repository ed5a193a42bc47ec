"""ONNX Runtime behind the Backend protocol. The package is imported when a model is opened."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...errors import CudaError, MissingDependencyError, ModelError
from ...files.onnx import is_quantized
from ...specs.values import ModelSpec
from ..checks import RUN_REMEDY, Interface, check_interface, one_line
from ..options import Device, EngineOptions
from .int8 import prepare

logger = logging.getLogger(__name__)
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL = {
    "cpu": "pip install 'repvgg-deploy[cpu]', or 'repvgg-deploy[gpu]' on a machine with an NVIDIA GPU; never both",
    "cuda": "pip uninstall onnxruntime, then pip install 'repvgg-deploy[gpu]': the two share one folder",
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_WRONG_WITH_PAIRS = ("WeightBiasQuantization",)
"""Optimizers that change what a Q/DQ graph computes. This one quantizes the biases of an INT8 graph with FP16 between its pairs, wrongly: in 1.32 its
logits have cosine 0.47 with those of the graph as it stands, and 0.9999 without it."""
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

    def __init__(self, path: Path, spec: ModelSpec, device: Device, options: EngineOptions) -> None:
        runtime = _import_onnxruntime(device)
        self._session: Any = (
            _open_cuda(runtime, path, spec, options) if device == "cuda" else _open_cpu(runtime, path, options)
        )
        check_interface(
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
                f"ONNX Runtime failed on a batch of {batch.dtype} {batch.shape}: {one_line(error)}",
                remedy=RUN_REMEDY,
            ) from error
        return outputs

    def close(self) -> None:
        """Frees the session."""
        self._session = None


def _import_onnxruntime(device: Device) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        reason = (
            "is not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
            else f"cannot be loaded: {error}"
        )
        raise MissingDependencyError(
            f"running an ONNX model needs ONNX Runtime, which {reason}", remedy=_INSTALL[device]
        ) from error


def _open_cpu(runtime: Any, path: Path, options: EngineOptions) -> Any:
    quantized = is_quantized(path)
    source = prepare(path, "onnxruntime") if quantized else str(path)
    # The provider is named even so: a GPU build would otherwise choose for itself, and installing a package must not
    # change answers.
    try:
        return runtime.InferenceSession(
            source, sess_options=_session_options(runtime, options), providers=[_CPU], **_without_optimizers(quantized)
        )
    except Exception as error:
        raise ModelError(
            f"{path}: ONNX Runtime {runtime.__version__} refuses it: {one_line(error)}",
            remedy="upgrade onnxruntime, or export the model again with a lower --opset",
        ) from error


def _open_cuda(runtime: Any, path: Path, spec: ModelSpec, options: EngineOptions) -> Any:
    available = runtime.get_available_providers()
    if _CUDA not in available:
        raise CudaError(
            f'{path}: device="cuda" was asked for, but this ONNX Runtime {runtime.__version__} offers only '
            f"{', '.join(available)}",
            remedy=_INSTALL["cuda"],
        )
    # TF32 is on by default in this provider; FP32 means FP32 here unless the user says otherwise.
    settings = {"device_id": str(options.device_id), "use_tf32": str(int(options.tf32))}
    session_options, extras = _session_options(runtime, options), _without_optimizers(is_quantized(path))
    if (
        spec.kind != "module"
    ):  # a module of the user's own may hold shape arithmetic, which belongs on the CPU; ours never does
        session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = runtime.InferenceSession(
            str(path), sess_options=session_options, providers=[(_CUDA, settings)], enable_fallback=False, **extras
        )
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


def _session_options(runtime: Any, options: EngineOptions) -> Any:
    session_options = runtime.SessionOptions()
    if options.intra_op_threads is not None:
        session_options.intra_op_num_threads = options.intra_op_threads
    if not logger.isEnabledFor(logging.DEBUG):
        session_options.log_severity_level = _FATAL_ONLY
    return session_options


def _without_optimizers(quantized: bool) -> dict[str, list[str]]:
    """What a session is opened with besides: a graph with Q/DQ pairs is to be computed as it stands."""
    return {"disabled_optimizers": list(_WRONG_WITH_PAIRS)} if quantized else {}


def _describe(node: Any) -> Interface:
    return node.name, _DTYPES.get(node.type, node.type), tuple(node.shape)
