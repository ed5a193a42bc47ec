"""Checks of what goes in: batches (`BatchCheck`), specifications, and what a library made of a model file.

Checking a batch costs microseconds. The explanation, with every step that mends the batch, is written for a wrong one.
"""

from __future__ import annotations

import importlib
import math
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError, ModelError
from ..specs.values import ModelSpec

RUN_REMEDY = (
    "if memory ran out, give EngineOptions(max_batch=…) a smaller number; else check that the model accepts this "
    "image size"
)
"""Where a library fails on a batch that was checked."""
_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
_SWAPPED = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 2, 3, 1)}  # transposition from the other layout


class BatchCheck:
    """The check of one model's batches.

    Args:
        spec: The model's specification.
        finite: Whether numbers are looked at.
    """

    def __init__(self, spec: ModelSpec, *, finite: bool = True) -> None:
        self._spec = spec
        self._dtype = np.dtype(spec.input.dtype)
        self._sizes = tuple(size if isinstance(size, int) else None for size in spec.input.shape[1:])
        self._has_floats = self._dtype.kind == "f"
        self._narrows = self._dtype == np.float16
        self._finite = finite and self._has_floats

    def check(self, batch: object) -> NDArray[Any]:
        """The batch as a plain array, not copied; of a float16 model, float32 is rounded to float16.

        Raises:
            InputError: It is not what the model expects. The message says what was expected and found, the remedy
                every step to get there.
        """
        array = self.check_form(batch)
        if self._finite and not _is_finite(array):
            raise _explain_values(_plain_array(batch))
        return array

    def check_form(self, batch: object) -> NDArray[Any]:
        """`check`, without a look at the numbers."""
        array = _plain_array(batch)
        shape = array.shape
        if self._narrows and array.dtype == np.float32:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
        # The dtype of a big-endian array differs from the native one of the same name.
        if array.dtype != self._dtype or len(shape) != len(self._sizes) + 1:
            raise self._explain(array)
        for have, want in zip(shape[1:], self._sizes, strict=True):
            if have != want and want is not None:
                raise self._explain(array)
        if array.size == 0:
            raise self._explain(array)
        return array

    def _explain(self, array: NDArray[Any]) -> InputError:
        source, dtype = self._spec.input, array.dtype
        problems, steps = self._compare(array)
        expected = f"{self._dtype} {show_shape(('N', *source.shape[1:]))}, {source.layout}"
        name = dtype.name if dtype.isnative else f"{'big' if dtype.str[0] == '>' else 'little'}-endian {dtype.name}"
        return InputError(
            f"batch: {' and '.join(problems)}: expected {expected}, found {name} {show_shape(array.shape)}",
            remedy="; then ".join(steps),
        )

    def _compare(self, array: NDArray[Any]) -> tuple[list[str], list[str]]:
        """What is wrong with a batch, and the steps that mend it."""
        problems, steps = [], []
        shape, rank = array.shape, len(self._sizes) + 1
        if 0 in shape:
            return ["it is empty"], ["give at least one image, none of them without pixels"]
        if len(shape) == rank - 1:
            problems.append("the batch dimension is missing")
            steps.append("add it: batch[np.newaxis]")
            shape = (1, *shape)
        elif len(shape) != rank:
            return [f"its rank is {len(shape)}, not {rank}"], [f"give {rank} dimensions, the first one counting images"]
        layout = self._spec.input.layout
        axis = _CHANNEL_AXIS.get(layout, -1)
        channels = self._sizes[axis - 1] if layout in _SWAPPED else None
        swapped = tuple(shape[index] for index in _SWAPPED.get(layout, ()))
        transposed = channels is not None and shape[axis] != channels == swapped[axis]
        if transposed:
            problems.append(f"the layout is not {layout}")
            if array.dtype != np.uint8 or self._dtype == np.uint8:  # normalize(), named below, does that too
                steps.append(f"transpose it: batch.transpose{_SWAPPED[layout]}")
            shape = swapped
        wrong = {index for index, want in enumerate(self._sizes, start=1) if want is not None and shape[index] != want}
        if axis in wrong:
            problems.append(f"it has {shape[axis]} channels")
            steps.append(f"give {channels} channels, red, green, blue: repeat a grey one, drop an alpha channel")
        if wrong - {axis}:
            sizes = [str(want or "any") for index, want in enumerate(self._sizes, start=1) if index != axis]
            problems.append("the size differs")
            steps.append(
                f"resize or crop the images to {'×'.join(sizes)} (infer_images does), or export the model with "
                "another --image-size"
            )
        if array.dtype != self._dtype:
            problems.append("the dtype differs")
            steps.append(self._fix_dtype(array.dtype))
        return problems, steps

    def _fix_dtype(self, dtype: np.dtype[Any]) -> str:
        if dtype == np.uint8 and self._has_floats and self._spec.preprocessing is not None:
            return (
                "normalise it: repvgg_deploy.images.decode.normalize(images, engine.spec.preprocessing), or export "
                "the model with --input uint8"
            )
        if self._dtype == np.uint8:
            return (
                "give the bytes of the images as they are, RGB 0-255 of dtype uint8: this model normalises them itself"
            )
        if dtype.kind in "fiu":
            return f"convert it: batch.astype(np.{self._dtype.name})"
        return f"give an array of real numbers of dtype {self._dtype.name}"


def _plain_array(batch: object) -> NDArray[Any]:
    if type(batch) is np.ndarray:
        return batch
    if isinstance(batch, np.ma.MaskedArray):
        raise InputError(
            "batch: is a masked array, and a model cannot leave pixels out", remedy="give batch.filled(value)"
        )
    if isinstance(batch, np.ndarray):
        return batch.view(np.ndarray)  # a memmap, say
    kind = f"{type(batch).__module__}.{type(batch).__qualname__}".removeprefix("builtins.")
    if kind.startswith("torch."):
        remedy = "call infer(batch.detach().cpu().numpy())"
    elif kind.startswith("PIL.") or isinstance(batch, (str, bytes)) or hasattr(batch, "__fspath__"):
        remedy = "for image files call infer_images([path, …])"
    elif isinstance(batch, (list, tuple)):
        remedy = "make it one array first: np.stack(images)"
    else:
        remedy = "convert it first: np.asarray(batch)"
    raise InputError(f"batch: expected a NumPy array, found {kind}", remedy=remedy)


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite, in one pass where that is so: beside INT8 with AMX a second one shows."""
    flat = array.ravel("K")
    if flat.dtype == np.float16:
        return bool((flat.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    # NaN and infinity do not leave a sum. Unlike `sum`, `einsum` keeps to one pass of vector additions and never warns.
    return math.isfinite(np.einsum("i->", flat)) or bool(np.isfinite(flat).all())


def _explain_values(array: NDArray[Any]) -> InputError:
    """What is wrong with a batch that has numbers which are not finite, or not in float16, which it is rounded to."""
    finite = np.isfinite(array)
    if finite.all():
        return InputError(
            f"batch: expected numbers that float16 holds, at most 65504, found {np.abs(array).max():.6g}",
            remedy="normalise the images as engine.spec.preprocessing says, or use the float32 model",
        )
    count = array.size - int(np.count_nonzero(finite))
    first = tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), array.shape))
    return InputError(
        f"batch: expected finite numbers, found {count} of {array.size} NaN or infinite, the first at {first}: "
        f"{array[first]}",
        remedy=f"look at how image {first[0]} of the batch was made",
    )


def require_rows(spec: ModelSpec, consequence: str, *, remedy: str) -> None:
    """Refuses to take outputs apart or put them together by images where one is of the batch as a whole.

    Raises:
        InputError: An output has no row per image; `consequence` says what cannot be done then.
    """
    for output in spec.outputs:
        if not output.shape or output.shape[0] != spec.input.shape[0]:
            raise InputError(
                f"batch: the output {output.name} {show_shape(output.shape)} has no row per image, so {consequence}",
                remedy=remedy,
            )


def usual_shape(spec: ModelSpec) -> tuple[int, ...]:
    """One image, or the fixed batch, of the size in the specification.

    Raises:
        InputError: The model accepts any size.
    """
    sizes = [spec.batch if spec.batch is not None else 1, *spec.input.shape[1:]]
    for axis, size in zip(spec.input.image_axes or (), spec.image_size or (), strict=False):
        sizes[axis] = size
    known = tuple(size for size in sizes if isinstance(size, int))
    if len(known) != len(sizes):
        raise InputError(
            f"the model accepts any size: {show_shape(spec.input.shape)}",
            remedy="give warm_up the shape of your batches",
        )
    return known


def require_shape(shape: object, usual: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """A batch's shape, as its caller may say it: whole, or as a number of images of the usual shape.

    Raises:
        InputError: It is neither, or there is no usual shape.
    """
    given: list[Any] = list(shape) if isinstance(shape, (tuple, list)) else [shape]
    if not given or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in given):
        raise InputError(
            f"shape: expected a number of images, or positive sizes, found {reprlib.repr(shape)}",
            remedy="give 32, or (32, 3, 224, 224), say",
        )
    return (*given, *usual()[1:]) if isinstance(shape, int) else tuple(given)


def show_shape(shape: Sequence[int | str]) -> str:
    """A shape for people, such as `(batch, 3, 224, 224)`."""
    return f"({', '.join(map(str, shape))})"


GraphTensor: TypeAlias = "tuple[str, str, tuple[int | str | None, ...]]"
"""Name, dtype and shape of an input or output, as a library reports them. Anything but a number means any size."""


def check_graph(path: Path, spec: ModelSpec, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> None:
    """Refuses a graph whose input and outputs are not those of its metadata, against which batches are checked.

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


def _agree(expected: GraphTensor, found: GraphTensor) -> bool:
    """Same name, dtype and rank, and no dimension that is one number here and another there."""
    if expected[:2] != found[:2] or len(expected[2]) != len(found[2]):
        return False
    sizes = [(want, have) for want, have in zip(expected[2], found[2], strict=True) if want != have]
    return not any(isinstance(want, int) and isinstance(have, int) for want, have in sizes)


def import_backend(name: str, need: str, *, remedy: str) -> Any:
    """Imports the package of a backend; `need` begins the message, as in "running an ONNX model needs ONNX Runtime".

    Raises:
        MissingDependencyError: It is not installed or does not load.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "is not installed" if missing else f"cannot be loaded: {error}"
        raise MissingDependencyError(f"{need}, which {reason}", remedy=remedy) from error


def one_line(error: Exception) -> str:
    """An error's text for a message of ours."""
    return " ".join(str(error).split())
