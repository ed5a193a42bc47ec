"""Where the images of a set lie: files, .npz archives and .npy arrays; listed first, read one by one.

An image that cannot be read does not end the reading: an error is given in its place, and the caller decides.
"""

from __future__ import annotations

import contextlib
import logging
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError, clean_text
from ..files.signatures import NUMPY_MAGIC
from ..specs.values import Preprocessing
from .decode import read_image
from .formats import read_head

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image: TypeAlias = "NDArray[np.uint8] | NDArray[np.float32]"
_CHUNK_BYTES = 1 << 20
logger = logging.getLogger(__name__)
_FEW_NOTES = 3
_QUOTED = 300
_SHOWN = 40  # letters of a name in a message
_NPZ_REMEDY = (
    "write it with numpy.savez(file, images=…, labels=…): one C-ordered array uint8 (N, H, W, 3), and integers (N,)"
)
_NPZ_ERRORS = (
    OSError, ValueError, EOFError, LookupError, RuntimeError, SyntaxError, TypeError, AttributeError, OverflowError,
    MemoryError, SystemError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile
)  # fmt: skip
"""What zipfile and NumPy raise on damaged archives; NumPy reads a header with Python's own parser."""
_FEW_ROWS = 1 << 16
_INFLATED_FLOOR, _INFLATED_RATIO = 64 << 20, 20


@dataclass(frozen=True, slots=True)
class FileSource:
    """Image files in order, and how each becomes a crop uint8 (H, W, 3)."""

    paths: tuple[Path, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, chosen: Sequence[int]) -> Iterator[Image | InputError]:
        """The images at the ascending indices `chosen`, or an error in the place of one that cannot be read."""
        noted = 0
        for index in chosen:
            try:
                found = read_image(self.paths[index], self.preprocessing)
            except InputError as error:
                yield error
                continue
            noted += bool(found.notes)
            if noted <= _FEW_NOTES:
                for note in found.notes:
                    logger.warning("%s: %s", self.paths[index], note)
            yield found.pixels
        if noted > _FEW_NOTES:
            logger.warning("the like holds for %d of %d images", noted, len(chosen))


class NpzSource:
    """The array `images` of an .npz, or the one of an .npy, read row by row: it may be larger than memory.

    Raises:
        InputError: It is no such file, or its `images` are not uint8 or float32 of rank 4.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        self._path = path
        with explain_damage(path):
            self._is_bare = path.suffix.lower() == ".npy" or read_head(path).startswith(NUMPY_MAGIC)
        with self._open("images") as (file, size):
            self.shape, self.dtype, fortran = _read_header(file)
            held = size - file.tell()
        if len(self.shape) != 4 or self.dtype not in ("uint8", "float32") or fortran:
            order = "Fortran order, " if fortran else ""
            what = "arrays of mixed shapes (objects)" if self.dtype == "object" else f"{order}{self.dtype} {self.shape}"
            raise InputError(
                f"{path}: images: expected uint8 (N, H, W, 3) in C order, found {what}", remedy=_NPZ_REMEDY
            )
        needed = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if min(self.shape) < 0 or needed > held or self.shape[0] > _FEW_ROWS + path.stat().st_size:
            raise InputError(
                f"{path}: images: ends before its {self.shape[0]:,} images of {self.shape[1:]}: damaged or truncated",
                remedy="copy the file again from its source",
            )

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, chosen: Sequence[int]) -> Iterator[Image | InputError]:
        """The rows at the ascending indices `chosen`, as they are stored.

        Raises:
            InputError: The archive is damaged.
        """
        import numpy as np

        row = self.shape[1:]
        size = math.prod(row) * np.dtype(self.dtype).itemsize
        with self._open("images") as (file, _):
            _read_header(file)
            position = 0
            for index in chosen:
                left = (index - position) * size
                while left > 0 and (passed := len(file.read(min(left, _CHUNK_BYTES)))):
                    left -= passed
                data = file.read(size)
                position = index + 1
                if len(data) != size:
                    raise InputError(
                        f"{self._path}: images: ends after {index} of {len(self)} images",
                        remedy="copy the file again from its source",
                    )
                yield np.frombuffer(data, self.dtype).reshape(row)

    def labels(self) -> list[str] | None:
        """The array `labels` as texts, or None where there is none.

        Whole numbers may be of any type; a row of one 1 and else 0 for each image is the class of the 1.

        Raises:
            InputError: It is damaged, or not one whole number or name for each image.
        """
        import numpy as np

        if self._is_bare:
            return None
        with explain_damage(self._path), zipfile.ZipFile(self._path) as archive:
            if "labels.npy" not in archive.namelist():
                return None
        labels = read_array(self._path, "labels")
        if labels.ndim == 2 and labels.dtype.kind in "biuf" and labels.shape[1] > 1:
            is_one_hot = np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()
            labels = labels.argmax(1) if is_one_hot else labels
        if labels.ndim == 1 and labels.dtype.kind in "bf" and (labels == np.rint(labels)).all():
            labels = labels.astype(np.int64)
        if labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(labels) != len(self):
            raise InputError(
                f"{self._path}: labels: expected {len(self)} integers, found {labels.dtype} {labels.shape}",
                remedy=_NPZ_REMEDY,
            )
        return [str(label) for label in labels.tolist()]

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """The array's file, and how many bytes it is said to have."""
        if self._is_bare:
            with explain_damage(self._path), self._path.open("rb") as file:
                yield file, self._path.stat().st_size
            return
        with explain_damage(self._path), _open_entry(self._path, name) as opened:
            yield opened


def read_array(path: Path, name: str) -> NDArray[Any]:
    """An array of an .npz, whole. What its header claims is compared with the bytes that are there first.

    Raises:
        InputError: It is not there, damaged, of Python objects, or far larger than its file.
    """
    import numpy as np
    from numpy.lib import format as npy

    with explain_damage(path), _open_entry(path, name) as (file, size):
        shape, fortran, dtype = _read_any_header(file, npy.read_magic(file))
        needed = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or needed != size - file.tell():
            raise _damaged(path, f"{name}: {dtype} {shape} is not what its {size:,} bytes can hold")
        if needed > _INFLATED_FLOOR + _INFLATED_RATIO * path.stat().st_size:
            raise _damaged(path, f"{name}: would inflate to {needed:,} bytes, more than an array of such a file can")
        data = file.read(needed)
        if file.read(1) or len(data) != needed:  # the end is where zipfile looks at the checksum
            raise _damaged(path, f"{name}: ends early")
        array = np.frombuffer(data, dtype) if needed else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def _open_entry(path: Path, name: str) -> Iterator[tuple[IO[bytes], int]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if f"{name}.npy" not in names:
            found = ", ".join(clean_text(other.removesuffix(".npy")[:_SHOWN]) for other in names[:9]) or "nothing"
            raise InputError(f"{path}: expected an array {name}, found {found}", remedy=_NPZ_REMEDY)
        with archive.open(f"{name}.npy") as file:
            yield file, archive.getinfo(f"{name}.npy").file_size


@contextlib.contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turns what zipfile and NumPy raise on a damaged file into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except _NPZ_ERRORS as error:
        said = " ".join(str(error)[:_QUOTED].split())
        raise _damaged(path, said) from error


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path}: cannot be read as {path.suffix.lower()}: {why}", remedy=_NPZ_REMEDY)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], str, bool]:
    from numpy.lib import format as npy

    shape, fortran, dtype = _read_any_header(file, npy.read_magic(file))
    return shape, dtype.name if dtype.isnative else dtype.str, fortran


def _read_any_header(file: IO[bytes], version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file that Python 2 wrote, which is read all the same
        shape, fortran, dtype = read(file)
    return tuple(int(size) for size in shape), bool(fortran), dtype


ImageSource: TypeAlias = "FileSource | NpzSource"
