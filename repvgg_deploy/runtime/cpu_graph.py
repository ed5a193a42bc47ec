"""What a CPU backend is given of a file with Q/DQ pairs: the same function in a form that it computes fast, or the file as it stands."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from typing import Literal

from ..errors import ModelError
from .cpu_features import explain_inexact_products
from .editable_graph import GraphError
from .unsigned_activations import Options, rewrite

logger = logging.getLogger(__name__)


def prepare(path: Path, target: Literal["onnxruntime", "openvino"]) -> bytes | str:
    """The rewritten graph, or the path where it must be run as it stands; which and why is logged.

    Args:
        path: An ONNX with Q/DQ pairs.
        target: Who is to run it.

    Raises:
        ModelError: The file cannot be read.
    """
    inexact = explain_inexact_products()
    try:
        graph = _rewrite(path, Options(target, unsigned=inexact is None))
    except GraphError as error:
        logger.warning("%s: run as it stands, which is slow on a CPU: %s", path, error)
        return str(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read") from error
    logger.info("%s: activations are %s", path, "unsigned for speed" if inexact is None else f"signed, and slow: {inexact}")
    return graph


def _rewrite(path: Path, options: Options) -> bytes:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return rewrite(memoryview(mapped), options)  # unmapped with the last view of it
