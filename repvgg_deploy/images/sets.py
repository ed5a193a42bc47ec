"""Sets of images, with labels or without: listed first, then decoded batch by batch, whatever their number.

Every set is deterministic: the same files and options give the same images in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files.signatures import NUMPY_MAGIC
from ..specs.values import ModelSpec, Preprocessing
from .classes import Classes, index_folders, index_labels, index_sorted, readable_name
from .decode import StrPath, normalize
from .formats import IMAGE_SUFFIXES, RAW_SUFFIXES, is_read, name_special, name_unread, read_head
from .listing import STANDARD_INPUT, Listing, find_images
from .lists import LIST_SUFFIXES, read_list
from .pixels import MAX_PIXELS
from .sources import FileSource, ImageSource, NpzSource

logger = logging.getLogger(__name__)
MAX_UNREADABLE_SHARE = 0.1
"""A set with a larger share of unreadable images is refused: what is left of it may be a biased choice."""
LabelUse: TypeAlias = Literal["required", "optional", "none"]
_Indices: TypeAlias = "tuple[int, ...] | None"


@dataclass(frozen=True, slots=True)
class SetOptions:
    """Which images of a set are taken.

    Attributes:
        limit: At most so many, chosen evenly at random; None takes all.
        batch_size: Images in a batch; the Engine splits and pads them where a model has a fixed one.
        seed: Chooses the images.
        labels: `required` refuses a set without labels; `none` does not look for any.
        sorted_folders: The folders' names say nothing: the first in sorted order is class 0, as torchvision's
            `ImageFolder` counts them.
        max_value: What is white in images of more than 8 bits; None: what the model states.
    """

    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    labels: LabelUse = "required"
    sorted_folders: bool = False
    max_value: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(
                    f"{name}: expected at least 1, found {value}",
                    remedy=f"give a positive {name.replace('_', ' ')}, or leave it out",
                )


def open_images(path: StrPath, spec: ModelSpec, options: SetOptions | None = None) -> ImageSet:
    """Lists the images of a set; they are read when it is iterated over.

    Args:
        path: A folder with one sub-folder a class (as ImageNet's); a CSV or text file of `path,label` lines, paths
            relative to it; an .npz with `images`, uint8 (N, H, W, 3), and `labels`; or without labels: a folder that is
            searched recursively, a list of paths, an .npy, one image (`-`: from standard input).
        spec: The specification of the model that they are for.
        options: Limit, batch size, seed and whether labels are needed.

    Raises:
        InputError: There is nothing there, or it has no labels, wrong ones, or names files that are missing.
    """
    options = options or SetOptions()
    where = Path(path)
    source: ImageSource
    names: tuple[str, ...] | None = None
    left_out = ""
    if options.max_value is not None and spec.preprocessing is not None:
        spec = replace(spec, preprocessing=replace(spec.preprocessing, max_value=options.max_value))
    if where.is_dir():
        listing = find_images(where)
        left_out = listing.left_out
        source, labels, how, names = _open_folder(where, listing, spec, options)
    else:
        if options.sorted_folders:
            raise InputError(
                f"{where}: is no folder, so that there are no folders to sort", remedy="leave --sorted-folders out"
            )
        source, texts = _open_file(where, spec, with_labels=options.labels != "none")
        labels, how = _index_texts(texts, spec, where, options.labels)
    if not len(source):
        raise InputError(
            f"{where}: expected at least one image, found none", remedy="name a folder, list or .npz that holds some"
        )
    chosen = choose_evenly(len(source), options.limit, options.seed)
    return ImageSet(source, spec, chosen, labels, how, options.batch_size, str(where), names, left_out)


def _open_folder(
    path: Path, listing: Listing, spec: ModelSpec, options: SetOptions
) -> tuple[ImageSource, _Indices, str, tuple[str, ...] | None]:
    """The images of a folder, the class of each, how that was found or why not, and what the folders call them."""
    files, use = listing.files, options.labels
    if not files:
        beside = f"; {listing.left_out}" if listing.left_out else ""
        raise InputError(
            f"{path}: no image found there or in its sub-folders{beside}", remedy="name a folder that holds images"
        )
    source = FileSource(files, _preprocessing_of(spec, str(path)))
    parts = [file.relative_to(path).parts for file in files]
    loose = next((file for file, part in zip(files, parts, strict=True) if len(part) == 1), None)
    if use == "none":
        return source, None, "", None
    names = sorted({part[0] for part in parts})
    try:
        if loose is not None:
            raise InputError(
                f"{path}: expected one sub-folder a class, found the image {loose.name} outside of any",
                remedy="sort the images into folders named after the classes, or give a CSV of path,label",
            )
        if options.sorted_folders:
            indices, how = index_sorted(names, listing.empty, classes_of(spec), str(path))
        else:
            indices, how = index_folders(names, classes_of(spec), str(path))
    except InputError as error:
        if use == "required":
            raise
        return source, None, error.message, None
    by_name = dict(zip(names, indices, strict=True))
    by_index = {index: readable_name(name) for name, index in by_name.items()}
    called = tuple(by_index.get(index, "") for index in range(max(indices) + 1))
    return source, tuple(by_name[part[0]] for part in parts), how, called


def _open_file(path: Path, spec: ModelSpec, *, with_labels: bool) -> tuple[ImageSource, Sequence[str] | None]:
    """The images of an .npz, a list or an image file, and the text of each label where there are any."""
    if str(path) in STANDARD_INPUT:
        return FileSource((path,), _preprocessing_of(spec, str(path))), None
    special = name_special(path)
    if special is not None:
        raise InputError(f"{path}: is {special}, expected images", remedy="write what it gives to files first")
    if not path.is_file():
        raise InputError(
            f"{path}: no such file or folder", remedy="check the path; relative paths start at the current folder"
        )
    suffix, head = path.suffix.lower(), _head_of(path)
    if suffix in (".npz", ".npy") or head.startswith(NUMPY_MAGIC):
        archive = NpzSource(path)
        if len(archive):  # before any is read: a row of a few bytes may be said to be an image of gigabytes
            _require_size(np.broadcast_to(np.zeros((), archive.dtype), archive.shape[1:]), spec, str(path))
        return archive, archive.labels() if with_labels else None
    is_text = b"\0" not in head and suffix not in IMAGE_SUFFIXES | RAW_SUFFIXES and name_unread(path, head) is None
    if suffix in LIST_SUFFIXES or (is_text and not is_read(head)):
        found = read_list(path)
        source = FileSource(found.paths, _preprocessing_of(spec, str(path)))
        return source, found.labels if with_labels else None
    return FileSource((path,), _preprocessing_of(spec, str(path))), None


def _head_of(path: Path) -> bytes:
    try:
        return read_head(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", remedy="make it readable") from error


def _index_texts(texts: Sequence[str] | None, spec: ModelSpec, path: Path, use: LabelUse) -> tuple[_Indices, str]:
    if texts is not None:
        indices, how = index_labels(texts, classes_of(spec), str(path))
        return tuple(indices), how
    why = f"{path}: has no labels"
    if use == "required":
        raise InputError(
            why, remedy="give path,label lines, an .npz with labels, or a folder with one sub-folder a class"
        )
    return None, "" if use == "none" else why


def choose_evenly(count: int, limit: int | None, seed: int) -> tuple[int, ...]:
    """At most `limit` of the indices 0 … count − 1, drawn at random without repetition, ascending."""
    if limit is None or limit >= count:
        return tuple(range(count))
    return tuple(sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist()))


def classes_of(spec: ModelSpec) -> Classes:
    """The classes of a classifier.

    Raises:
        InputError: The model is no classifier.
    """
    if spec.kind not in ("logits", "probabilities", "top5"):
        raise InputError(
            f"the model gives {spec.kind}, not classes, so labels cannot be compared", remedy="evaluate a classifier"
        )
    columns = spec.outputs[0].shape[-1]
    count = len(spec.labels) if spec.labels else None
    if spec.kind != "top5" and isinstance(columns, int):
        count = columns
    return Classes(spec.labels, count)


def _preprocessing_of(spec: ModelSpec, name: str) -> Preprocessing:
    if spec.preprocessing is None:
        raise InputError(
            f"{name}: the model does not say how an image becomes its input",
            remedy="give an .npz with float32 images (N, 3, H, W) as the model takes them",
        )
    return spec.preprocessing


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Images that are run together.

    Attributes:
        images: As the model takes them: uint8 (N, H, W, 3) or float32 (N, 3, H, W), normalised; N may be 0.
        labels: int64 (N,), or None where the set has none.
        skipped: What could not be read since the batch before, and why.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64] | None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images that are decoded as they are iterated over, from the first again each time; one batch is in memory.

    Attributes:
        source: All images of the set.
        spec: The specification of the model whose input they become.
        chosen: Ascending indices into `source`.
        labels: Class of each image of `source`, or None.
        labels_from: How the classes were found, or why there are none, in words; empty where none were looked for.
        batch_size: Images in every batch but the last.
        name: For messages and reports.
        class_names: What the folders call the classes, by index; None where the set is no folder of folders.
        left_out: What stands in the folder and is no image, counted and named; empty where nothing is.
    """

    source: ImageSource
    spec: ModelSpec
    chosen: tuple[int, ...]
    labels: tuple[int, ...] | None
    labels_from: str
    batch_size: int
    name: str
    class_names: tuple[str, ...] | None = None
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batches in order.

        Raises:
            InputError: More than MAX_UNREADABLE_SHARE of the images cannot be read, or none can, or an image is not
                what the model takes.
        """
        images: list[NDArray[Any]] = []
        classes: list[int] = []
        skipped: list[str] = []
        unreadable = 0
        for index, image in zip(self.chosen, self.source.read(self.chosen), strict=True):
            if isinstance(image, InputError):
                logger.warning("skipped: %s", image.message)
                unreadable += 1
                skipped.append(image.message)
                if unreadable > MAX_UNREADABLE_SHARE * len(self):
                    raise InputError(
                        f"{self.name}: more than {MAX_UNREADABLE_SHARE:.0%} of {len(self)} images cannot be read; "
                        f"{image.message}",
                        remedy=image.remedy,
                    ) from image
                continue
            images.append(image)
            classes.append(self.labels[index] if self.labels is not None else 0)
            if len(images) == self.batch_size:
                yield self._batch(images, classes, skipped)
                images, classes, skipped = [], [], []
        if images or skipped:
            yield self._batch(images, classes, skipped)

    def _batch(self, images: list[NDArray[Any]], classes: list[int], skipped: list[str]) -> ImageBatch:
        array = _to_input(images, self.spec, self.name)
        return ImageBatch(array, np.array(classes, np.int64) if self.labels is not None else None, tuple(skipped))


def _to_input(images: Sequence[NDArray[Any]], spec: ModelSpec, name: str) -> NDArray[Any]:
    """Stacks images, uint8 RGB or normalised float32 of either layout, to a batch as the model takes it."""
    takes_bytes = spec.input.dtype == "uint8"
    if not images:
        return np.empty((0, 0, 0, 3) if takes_bytes else (0, 3, 0, 0), np.uint8 if takes_bytes else np.float32)
    _require_size(images[0], spec, name)
    batch = np.stack([channels_last(image) for image in images])
    if takes_bytes == (batch.dtype == np.uint8):
        return batch if takes_bytes else np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    preprocessing = _preprocessing_of(spec, name)
    if not takes_bytes:
        return normalize(batch, preprocessing)
    mean, std = (np.asarray(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    return np.asarray(np.clip(np.rint(batch * std + mean), 0, 255), np.uint8)


def channels_last(image: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 3). Where both ends are 3 long, bytes have the channels last, floating-point numbers first."""
    is_planar = image.shape[0] == 3 and (image.shape[2] != 3 or image.dtype != np.uint8)
    return image.transpose(1, 2, 0) if is_planar else image


def _require_size(image: NDArray[Any], spec: ModelSpec, name: str) -> None:
    height, width, channels = channels_last(image).shape
    if channels != 3:
        raise InputError(
            f"{name}: expected RGB images (H, W, 3), found {image.shape}",
            remedy="repeat a grey channel three times, drop an alpha channel",
        )
    if height * width > MAX_PIXELS:
        remedy = "store smaller images, or give image files, which are resized"
        raise InputError(f"{name}: an image of {height}×{width} has more than {MAX_PIXELS:,} pixels", remedy=remedy)
    wanted = [spec.input.shape[axis] for axis in spec.input.image_axes or ()]
    if any(isinstance(want, int) and want != have for want, have in zip(wanted, (height, width), strict=False)):
        raise InputError(
            f"{name}: expected images of {wanted[0]}×{wanted[1]} pixels, found {height}×{width}",
            remedy="give image files, which are resized and cropped, or store images of the size that the model takes",
        )
