"""Kernels that TensorRT-RTX compiles when a context is made and when a shape runs first: one cache of an engine.

Its contexts share it, and it is kept in the cache folder, `kernels/`, so that the next process compiles nothing anew.
TensorRT-RTX itself refuses what another release, GPU or driver has made.
Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
"""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, InputError
from ...files.cache import cache_folder
from ...files.output import atomic_output
from ...files.plan_place import Library
from ..cuda.port import DeviceInfo

logger = logging.getLogger(__name__)
_LARGEST_BYTES = 1 << 30


class KernelCache:
    """See the module. Whatever goes wrong with the file is logged, and costs time only.

    Args:
        path: The file; it need not exist. None keeps the kernels in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache: Any | None = None
        self._known = b""

    def attach(self, settings: Any) -> None:
        """Makes a context use it.

        Args:
            settings: The IRuntimeConfig that the context will be made with; the first one also makes the cache.
        """
        with self._lock:
            if self._cache is None:
                self._cache = settings.create_runtime_cache()
                data = self._read()
                if data and self._cache.deserialize(data):
                    self._known = data
                elif data:
                    logger.info("%s: kernels of another TensorRT-RTX, GPU or driver: compiled again", self._path)
            if not settings.set_runtime_cache(self._cache):
                logger.warning("TensorRT-RTX takes no runtime cache: each context compiles its own kernels")

    def save(self) -> None:
        """Writes what is new. Nothing runs on the engine meanwhile."""
        with self._lock:
            if self._cache is None or self._path is None:
                return
            found = self._cache.serialize()
            data = b"" if found is None else bytes(memoryview(found))
            if not data or data == self._known:
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_output(self._path, force=True) as output:
                    output.partial.write_bytes(data)
                self._known = data
            except (ArtifactError, OSError) as error:
                logger.warning("compiled kernels are not kept: %s", error)

    def release(self) -> None:
        """Lets the cache go, after the contexts and before the engine."""
        with self._lock:
            self._cache = None

    def _read(self) -> bytes:
        try:
            if self._path is not None and self._path.stat().st_size <= _LARGEST_BYTES:
                return self._path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("%s: compiled kernels cannot be read: %s", self._path, error.strerror)
        return b""


def open_kernels(library: Library, device: DeviceInfo, plan: bytes) -> KernelCache | None:
    """The cache of a plan on a GPU; None where nothing is compiled when it runs."""
    if not hasattr(library.trt, "IRuntimeCache"):
        return None
    try:
        folder = cache_folder() / "kernels"
    except InputError as error:
        logger.warning("compiled kernels are not kept: %s", error.message)
        return KernelCache(None)
    capability = device.compute_capability.replace(".", "")
    digest = hashlib.sha256(plan).hexdigest()
    return KernelCache(folder / f"{digest[:32]}-{library.version}-cuda{device.cuda_version}-sm{capability}.kernels")
