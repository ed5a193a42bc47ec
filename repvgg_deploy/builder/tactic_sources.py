"""Which of cuDNN, cuBLAS and cuBLASLt TensorRT 8 can take kernels from: what is found here decides on the plan that it builds.

TensorRT 10 and later use none of them by default.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_LIBRARIES = {
    "CUDNN": ("cudnnGetVersion", "cudnnGetProperty", ("libcudnn.so.8", "cudnn64_8.dll")),
    "CUBLAS": ("cublasCreate_v2", "cublasGetProperty", ("libcublas.so.11", "libcublas.so.12", "cublas64_11.dll", "cublas64_12.dll")),
    "CUBLAS_LT": ("cublasLtCreate", "cublasLtGetProperty", ("libcublasLt.so.11", "libcublasLt.so.12", "cublasLt64_11.dll", "cublasLt64_12.dll")),
}
"""Of each tactic source: a function that its library has, the one that tells its version, and the names of the library."""
_OTHERS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
_UNKNOWN = "unknown version"

TacticLibraries = Mapping[str, str | None]
"""By the name of a tactic source: the version of its library, or None where there is none. Empty where TensorRT uses none of them."""


def find_tactic_libraries() -> dict[str, str | None]:
    """What is here of the three libraries. Each is loaded, and neither CUDA nor a GPU is touched.

    Where a library is here for two versions of CUDA, both are named: which one TensorRT takes, it does not say.
    """
    found = {}
    for kind, (function, version, names) in _LIBRARIES.items():
        here = [read_library_version(name, function, version) for name in names]
        found[kind] = ", ".join(text for text in here if text is not None) or None
    return found


def read_library_version(library: str, function: str, version: str) -> str | None:
    """The version of a shared library; None where it cannot be loaded or is none.

    Where TensorRT 8 is packed small, empty libraries stand in for cuDNN and cuBLAS.

    Args:
        library: Its file name.
        function: That it must have.
        version: The function that tells major, minor and patch version by their index 0 to 2, as all of CUDA's libraries have it.
    """
    try:
        loaded = ctypes.CDLL(library)
    except OSError:
        return None
    if not hasattr(loaded, function):
        return None
    if not hasattr(loaded, version):
        return _UNKNOWN
    numbers = [ctypes.c_int(-1) for _ in range(3)]
    failed = [getattr(loaded, version)(index, ctypes.byref(number)) for index, number in enumerate(numbers)]
    return _UNKNOWN if any(failed) else ".".join(str(number.value) for number in numbers)


def choose_tactic_sources(trt: Any, settings: Any, libraries: TacticLibraries) -> None:
    """Leaves cuDNN and cuBLAS out of TensorRT 8's search where they are not installed: it would end with an error that names no remedy.

    Args:
        trt: The module.
        settings: Its IBuilderConfig.
        libraries: What `find_tactic_libraries` gave.
    """
    missing = [kind for kind, version in libraries.items() if version is None]
    if missing:
        kept = [kind for kind in (*libraries, *_OTHERS) if kind not in missing and hasattr(trt.TacticSource, kind)]
        settings.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, kind)) for kind in kept))
        logger.warning("TensorRT chooses kernels without %s, which cannot be loaded here", ", ".join(missing))
