"""A bare ONNX Runtime session on the same file, as anybody would open it: what an Engine is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from ..errors import MissingDependencyError, ModelError

_ERRORS_ONLY = 3
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class BareSession:
    """See the module.

    Args:
        path: The ONNX.
        device: Where.
        threads: That share one batch on the CPU; None for the default.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelError: It refuses the file, or does not run on the device.
    """

    def __init__(self, path: Path, *, device: Literal["cpu", "cuda"] = "cpu", threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(f"--compare onnxruntime needs ONNX Runtime: {error}", remedy="pip install 'repvgg-deploy[cpu]'") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = _PROVIDERS[device]
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[wanted])
        except Exception as error:
            message = " ".join(str(error).split())
            raise ModelError(f"{path}: a bare ONNX Runtime session refuses it: {message}", remedy="leave out --compare onnxruntime") from error
        if self._session.get_providers()[0] != wanted:
            raise ModelError(f"{path}: ONNX Runtime does not run on {device} here", remedy="leave out --compare onnxruntime, or give --device cpu")
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {wanted}, the file as it stands"

    def make_call(self, batch: NDArray[Any]) -> Callable[[], object]:
        """What runs this batch.

        Args:
            batch: As the model's input.
        """
        feed = {self._session.get_inputs()[0].name: batch}
        return lambda: self._session.run(None, feed)
