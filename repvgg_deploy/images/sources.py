"""Where the images of a set lie: files, .npz archives and .npy arrays; listed first, read one by one.

An image that cannot be read does not end the reading: an error is given in its place, and the caller decides.
"""

from __future__ import annotations

import contextlib
import logging
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError
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
_NPZ_REMEDY = (
    "write it with numpy.savez(file, images=…, labels=…): one C-ordered array uint8 (N, H, W, 3), and integers (N,)"
)
_NPZ_ERRORS = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, zlib.error, zipfile.BadZipFile
)  # fmt: skip
"""What zipfile and NumPy raise on damaged archives."""


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
        self._path = path
        with _explain_damage(path):
            self._is_bare = path.suffix.lower() == ".npy" or read_head(path).startswith(NUMPY_MAGIC)
        with self._open("images") as file:
            self.shape, self.dtype, fortran = _read_header(file)
        if len(self.shape) != 4 or self.dtype not in ("uint8", "float32") or fortran:
            order = "Fortran order, " if fortran else ""
            what = "arrays of mixed shapes (objects)" if self.dtype == "object" else f"{order}{self.dtype} {self.shape}"
            raise InputError(
                f"{path}: images: expected uint8 (N, H, W, 3) in C order, found {what}", remedy=_NPZ_REMEDY
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
        size = int(np.prod(row)) * np.dtype(self.dtype).itemsize
        with self._open("images") as file:
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
        with _explain_damage(self._path), np.load(self._path, allow_pickle=False) as archive:
            if "labels" not in archive.files:
                return None
            labels = archive["labels"]
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
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self._is_bare:
            with _explain_damage(self._path), self._path.open("rb") as file:
                yield file
            return
        with _explain_damage(self._path), zipfile.ZipFile(self._path) as archive:
            if f"{name}.npy" not in archive.namelist():
                found = ", ".join(archive.namelist()).replace(".npy", "") or "nothing"
                raise InputError(f"{self._path}: expected an array {name}, found {found}", remedy=_NPZ_REMEDY)
            with archive.open(f"{name}.npy") as file:
                yield file


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _NPZ_ERRORS as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as {path.suffix.lower()}: {said}", remedy=_NPZ_REMEDY) from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], str, bool]:
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return tuple(shape), dtype.name if dtype.isnative else dtype.str, bool(fortran)


ImageSource: TypeAlias = "FileSource | NpzSource"
