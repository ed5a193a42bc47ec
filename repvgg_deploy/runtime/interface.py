"""Is what a library made of a file the model that its metadata describes?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ..errors import ModelError
from ..specs.values import ModelSpec

RUN_REMEDY = "if memory ran out, give EngineOptions(max_batch=…) a smaller number; else check that the model accepts this image size"
"""Where a library fails on a batch that was checked."""
Interface: TypeAlias = "tuple[str, str, tuple[int | str | None, ...]]"
"""Name, dtype and shape of an input or output; what is not a number in the shape is a dimension of any size."""


def check_interface(path: Path, spec: ModelSpec, inputs: Sequence[Interface], outputs: Sequence[Interface]) -> None:
    """The graph's input and outputs must be those of the metadata, or batches would be checked against the wrong thing.

    Raises:
        ModelError: They differ.
    """
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in (spec.input, *spec.outputs)]
    found = [*inputs, *outputs]
    if len(inputs) != 1 or len(found) != len(expected) or not all(map(_agree, expected, found)):
        raise ModelError(
            f"{path}: its metadata and its graph disagree on its input and outputs: expected {expected}, found {found}",
            remedy="export it again with repvgg-export",
        )


def _agree(expected: Interface, found: Interface) -> bool:
    """Same name, dtype and rank, and no dimension that is one number here and another there."""
    sizes = [not isinstance(want, int) or not isinstance(have, int) or want == have for want, have in zip(expected[2], found[2], strict=False)]
    return expected[:2] == found[:2] and len(expected[2]) == len(found[2]) and all(sizes)


def one_line(error: Exception) -> str:
    """An error's text for a message of ours."""
    return " ".join(str(error).split())
