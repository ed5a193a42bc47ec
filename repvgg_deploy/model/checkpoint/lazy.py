"""A tensor of a file that was not read yet: its dtype and shape are known, its bytes stay on disk until `load()`.

Only `load` and what it calls need torch: what a file holds can be told without it.
"""

from __future__ import annotations

import bisect
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from ...errors import clean_text

if TYPE_CHECKING:
    import torch

Range: TypeAlias = tuple[int, int]
"""First byte and the one behind the last."""
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1 << 40
_MAX_NAME = 100


class Dtype(NamedTuple):
    """A dtype by torch's name of it, such as `float32`, and the bytes of an element."""

    name: str
    itemsize: int

    def to_torch(self) -> torch.dtype:
        """The same as torch has it."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


FLOAT32, FLOAT64 = Dtype("float32", 4), Dtype("float64", 8)
FLOAT16, BFLOAT16 = Dtype("float16", 2), Dtype("bfloat16", 2)
INT64, INT32, INT16, INT8 = Dtype("int64", 8), Dtype("int32", 4), Dtype("int16", 2), Dtype("int8", 1)
UINT8, BOOL = Dtype("uint8", 1), Dtype("bool", 1)
COMPLEX64, COMPLEX128 = Dtype("complex64", 8), Dtype("complex128", 16)
DTYPES = {"DoubleStorage": FLOAT64, "FloatStorage": FLOAT32, "HalfStorage": FLOAT16, "BFloat16Storage": BFLOAT16,
          "LongStorage": INT64, "IntStorage": INT32, "ShortStorage": INT16, "CharStorage": INT8, "ByteStorage": UINT8,
          "BoolStorage": BOOL, "ComplexFloatStorage": COMPLEX64, "ComplexDoubleStorage": COMPLEX128,
          "UntypedStorage": UINT8, "QInt8Storage": Dtype("qint8", 1), "QUInt8Storage": Dtype("quint8", 1),
          "QInt32Storage": Dtype("qint32", 4)}  # fmt: skip
"""torch's storage classes by name."""


def named_dtype(name: str) -> Dtype:
    """A dtype by torch's name of it; one that is not known here, such as `float8_e4m3fn`, counts as one byte."""
    widths = {"uint16": 2, "uint32": 4, "uint64": 8}
    known = next((dtype for dtype in DTYPES.values() if dtype.name == name), None)
    return known or Dtype(name, widths.get(name, 1))


class MalformedError(ValueError):
    """The bytes are not what their format demands. The readers turn it into a CheckpointError with path and remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor of a file: dtype and shape as stored.

    Attributes:
        backing: The bytes it is a view of, compared by identity: tensors may share them.
        backing_bytes: How many bytes the file really holds for `backing`.
        load: Gives the tensor: a view of the mapped file where that is possible. Call it once.
        unusable: What it is where it holds no plain numbers, such as `a sparse tensor`; it is never loaded then.
        views: The ranges of storages that `load` reads; empty where `backing` is not a storage.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    backing: object
    backing_bytes: int
    load: Callable[[], torch.Tensor]
    unusable: str = ""
    views: tuple[tuple[Storage, Range], ...] = ()

    @property
    def nbytes(self) -> int:
        """Size as a dense tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def placeholder(dtype: Dtype, shape: tuple[int, ...], unusable: str) -> LazyTensor:
    """A tensor that cannot be used, so that it can be named where it is needed."""

    def load() -> torch.Tensor:
        raise MalformedError(f"it is {unusable}")

    return LazyTensor(dtype, shape, object(), 0, load, unusable)


@dataclass(slots=True, eq=False)
class _Part:
    """A range of a storage that tensors to be loaded view: how many do, and its bytes once they were read."""

    start: int
    end: int
    waiting: int = 1
    data: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Storage:
    """A flat run of numbers of one dtype, which tensors are views of.

    Attributes:
        dtype: Of the numbers; a view may take them as another.
        nbytes: Its size.
        read: Gives the bytes of ranges that ascend and do not overlap, uint8 (n,) each, aligned to its second argument
            and in native byte order: views of the mapped file where that is possible.
    """

    dtype: Dtype
    nbytes: int
    read: Callable[[Sequence[Range], int], list[torch.Tensor]]
    _parts: list[_Part] = field(default_factory=list, repr=False)

    def view(
        self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: Dtype | None = None
    ) -> LazyTensor:
        """A strided view, in elements.

        Raises:
            MalformedError: It reaches outside the storage.
        """
        kind = dtype or self.dtype
        available = self.nbytes // kind.itemsize
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if not math.prod(shape):
            return LazyTensor(kind, shape, self, self.nbytes, lambda: _empty(shape, kind))
        if last >= available:
            raise MalformedError(f"a tensor of shape {list(shape)} reaches element {last} of a storage of {available}")
        span = (offset * kind.itemsize, (last + 1) * kind.itemsize)

        def load() -> torch.Tensor:
            return self._take(*span, kind.itemsize).view(kind.to_torch()).as_strided(shape, strides)

        return LazyTensor(kind, shape, self, self.nbytes, load, views=((self, span),))

    def expect(self, ranges: Iterable[Range]) -> None:
        """Says what will be loaded: it is then read at once, and each part let go with the last view of it."""
        self._parts = []
        for start, end in sorted(ranges):
            last = self._parts[-1] if self._parts else None
            if last is not None and start < last.end:
                last.end, last.waiting = max(end, last.end), last.waiting + 1
            else:
                self._parts.append(_Part(start, end))

    def _take(self, start: int, end: int, itemsize: int) -> torch.Tensor:
        """The bytes of a range, uint8 (end − start,)."""
        alignment = max(itemsize, self.dtype.itemsize)
        index = bisect.bisect_right(self._parts, start, key=lambda part: part.start) - 1
        part = self._parts[index] if index >= 0 else None
        if part is None or end > part.end or not part.waiting:
            return self.read([(start, end)], alignment)[0]
        if part.data is None:
            for each, data in zip(
                self._parts, self.read([(p.start, p.end) for p in self._parts], alignment), strict=True
            ):
                each.data = data
        assert part.data is not None
        taken = part.data[start - part.start : end - part.start]
        part.waiting -= 1
        if not part.waiting:
            part.data = None
        # Views of several dtypes: what begins within an element of another is none of its view.
        return taken if (start - part.start) % itemsize == 0 else taken.clone()


def _empty(shape: tuple[int, ...], dtype: Dtype) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=dtype.to_torch())


def load_each(tensors: Sequence[LazyTensor]) -> Iterator[torch.Tensor]:
    """The tensors in order, each storage unpacked once, however many of them view it.

    Raises:
        MalformedError: The bytes of one are damaged.
    """
    ranges: dict[int, tuple[Storage, list[Range]]] = {}
    for tensor in tensors:
        for storage, span in tensor.views:
            ranges.setdefault(id(storage), (storage, []))[1].append(span)
    for storage, spans in ranges.values():
        storage.expect(spans)
    try:
        for tensor in tensors:
            yield tensor.load()
    finally:
        for storage, _ in ranges.values():
            storage.expect(())


def count_held(tensors: Iterable[LazyTensor]) -> int:
    """Bytes of the file's content, unpacked, that tensors view; what several view counts once."""
    backings: dict[int, int] = {}
    ranges: dict[int, list[Range]] = {}
    for tensor in tensors:
        if not tensor.views:
            backings[id(tensor.backing)] = tensor.backing_bytes
        for storage, span in tensor.views:
            ranges.setdefault(id(storage), []).append(span)
    held = sum(backings.values())
    for spans in ranges.values():
        reached = 0
        for start, end in sorted(spans):
            held += max(0, end - max(start, reached))
            reached = max(reached, end)
    return held


def as_shape(value: object) -> tuple[int, ...]:
    """A tuple or list of sizes, checked: a MalformedError if it is something else, or absurdly large."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        raise MalformedError("the shape of a tensor is not a short list of numbers")
    sizes = tuple(as_count(size) for size in value)
    if math.prod(sizes) > _MAX_ELEMENTS:
        raise MalformedError("a tensor claims more than 2^40 elements")
    return sizes


def as_count(value: object) -> int:
    """A number of elements, checked: a MalformedError if it is no integer, negative, or absurdly large."""
    if type(value) is not int or not 0 <= value <= _MAX_ELEMENTS:
        raise MalformedError("a size, stride or offset of a tensor is not a number between 0 and 2^40")
    return value


def read_bytes(buffer: mmap.mmap, start: int, ranges: Iterable[Range], *, alignment: int) -> list[torch.Tensor]:
    """uint8 (n,) of each range behind the byte `start` of a private map: views where they are aligned, else copies."""
    import torch

    found = []
    for first, end in ranges:
        view = torch.frombuffer(buffer, dtype=torch.uint8, count=end - first, offset=start + first)
        if (start + first) % alignment:
            view = view.clone()
            if hasattr(mmap, "MADV_DONTNEED"):
                # The pages just read would else stay resident beside the copy; they are unchanged, so that they can be
                # read again.
                page = (start + first) // mmap.PAGESIZE * mmap.PAGESIZE
                buffer.madvise(mmap.MADV_DONTNEED, page, start + end - page)
        found.append(view)
    return found


def gather_bytes(pieces: Iterable[bytes | memoryview], ranges: Sequence[Range]) -> list[torch.Tensor]:
    """uint8 (n,) of each range, ascending and apart, of bytes that come in pieces, of which nothing else is kept."""
    import torch

    found = [torch.empty(end - start, dtype=torch.uint8) for start, end in ranges]
    arrays = [tensor.numpy() for tensor in found]
    first = position = 0
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)
        behind = position + len(data)
        for index in range(first, len(ranges)):
            start, end = ranges[index]
            if start >= behind:
                break
            low, high = max(start, position), min(end, behind)
            arrays[index][low - start : high - start] = data[low - position : high - position]
            first = index + (end <= behind)
        position = behind
    return found


def swap_bytes(tensors: Iterable[torch.Tensor], itemsize: int) -> None:
    """Turns the bytes of each element around, in place."""
    for tensor in tensors:
        if itemsize > 1:
            tensor.numpy().view(f"u{min(itemsize, 8)}").byteswap(inplace=True)


def array_tensor(
    data: bytes | bytearray | memoryview | str, dtype: np.dtype[np.generic], *, shape: tuple[int, ...], fortran: bool
) -> LazyTensor | None:
    """A NumPy array as a lazy tensor; None for a dtype that torch does not have.

    Args:
        data: The elements; a str holds them as Latin-1 (how Python 3 writes bytes at protocol 2).
        dtype: With byte order.
        shape: Size of each dimension.
        fortran: Whether the first index varies fastest.

    Raises:
        MalformedError: The data does not fill the shape.
    """
    kinds = {"f2": FLOAT16, "f4": FLOAT32, "f8": FLOAT64, "c8": COMPLEX64, "c16": COMPLEX128, "i1": INT8, "i2": INT16,
             "i4": INT32, "i8": INT64, "u1": UINT8, "b1": BOOL}  # fmt: skip
    kind = kinds.get(dtype.str[1:])
    if kind is None:
        return None
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise MalformedError(f"an array of shape {list(shape)} needs {expected} bytes, found {len(data)}")

    def load() -> torch.Tensor:
        import torch

        try:
            raw = bytearray(data, "latin-1") if isinstance(data, str) else data
        except UnicodeEncodeError as error:
            raise MalformedError("the elements of an array are text that is not Latin-1") from error
        array = np.frombuffer(raw, dtype=dtype).reshape(shape, order="F" if fortran else "C")
        # One copy at most, and none of a mapped file in native order; torch needs an aligned, writable array.
        return torch.from_numpy(np.require(array, dtype=dtype.newbyteorder("="), requirements=["C", "A", "W"]))

    return LazyTensor(kind, shape, data, len(data), load)


def printable(name: object) -> str:
    """A name from a file as it may be shown at a terminal: short, without control characters."""
    text = name if isinstance(name, str) else type(name).__name__
    shown = clean_text(text[:_MAX_NAME])
    return shown if len(text) <= _MAX_NAME else shown + "…"


def listing(names: Iterable[object], limit: int = 4) -> str:
    """The first few names, for a message."""
    shown = list(names)
    text = ", ".join(printable(name) for name in shown[:limit])
    return text if len(shown) <= limit else f"{text}, … ({len(shown)} in all)"
