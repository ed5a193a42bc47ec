"""Sets of images, labelled to evaluate on or not: listed first, then decoded batch by batch, so that memory does not grow with their number.

Every set is deterministic: the same files and options give the same images in the same order.

Single images, as a set stores them → the batch that a model takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..specs.values import ModelSpec, Preprocessing
from .classes import Classes, index_folders, index_labels, readable_name
from .decode import StrPath, normalize
from .sources import FileSource, ImageSource, NpzSource, find_images, read_list

_RESIZE = "give image files, which are resized and cropped, or store images of the size that the model takes"


def to_input(images: Sequence[NDArray[Any]], spec: ModelSpec, name: str) -> NDArray[Any]:
    """Stacks images to a batch as the model takes it.

    Args:
        images: All uint8 (H, W, 3) or (3, H, W), RGB, 0–255; or all float32 of either layout, normalised. None give a
            batch of none.
        spec: Of the model. Its input is uint8 NHWC, or floating-point NCHW.
        name: Of the set, for messages.

    Returns:
        uint8 (N, H, W, 3) where the model normalises itself, else float32 (N, 3, H, W).

    Raises:
        InputError: The images are of another size or not RGB, or the model does not say how they are normalised.
    """
    takes_bytes = spec.input.dtype == "uint8"
    if not images:
        return np.empty((0, 0, 0, 3) if takes_bytes else (0, 3, 0, 0), np.uint8 if takes_bytes else np.float32)
    _require_size(images[0], spec, name)
    batch = np.stack([_channels_last(image) for image in images])
    if takes_bytes:
        return batch if batch.dtype == np.uint8 else _to_bytes(batch, spec, name)
    if batch.dtype == np.uint8:
        return normalize(batch, _byte_preprocessing(spec, name))
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def _is_planar(image: NDArray[Any]) -> bool:
    """Whether the channels stand first. Where both ends are 3 long: bytes have them last, floating-point numbers first."""
    return image.shape[0] == 3 and (image.shape[2] != 3 or image.dtype != np.uint8)


def _channels_last(image: NDArray[Any]) -> NDArray[Any]:
    return image.transpose(1, 2, 0) if _is_planar(image) else image


def _require_size(image: NDArray[Any], spec: ModelSpec, name: str) -> None:
    height, width, channels = _channels_last(image).shape
    wanted = spec.input.shape[1:3] if spec.input.dtype == "uint8" else spec.input.shape[2:4]
    if channels != 3:
        raise InputError(
            f"{name}: expected RGB images (H, W, 3), found {image.shape}",
            remedy="repeat a grey channel three times, drop an alpha channel",
        )
    if any(isinstance(want, int) and want != have for want, have in zip(wanted, (height, width), strict=False)):
        raise InputError(
            f"{name}: expected images of {wanted[0]}×{wanted[1]} pixels, found {height}×{width}", remedy=_RESIZE
        )


def _to_bytes(batch: NDArray[np.float32], spec: ModelSpec, name: str) -> NDArray[np.uint8]:
    """Normalised float32 (N, H, W, 3) back to RGB bytes, rounded."""
    preprocessing = _byte_preprocessing(spec, name)
    mean, std = (np.asarray(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    return np.asarray(np.clip(np.rint(batch * std + mean), 0, 255), np.uint8)


def _byte_preprocessing(spec: ModelSpec, name: str) -> Preprocessing:
    if spec.preprocessing is None:
        raise InputError(
            f"{name}: the model does not say how bytes are normalised",
            remedy="store float32 images (N, 3, H, W) as the model takes them",
        )
    return spec.preprocessing


logger = logging.getLogger(__name__)
MAX_UNREADABLE_SHARE = 0.1
"""A set with a larger share of unreadable images is refused: what is left of it may be a biased choice."""
_LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
LabelUse: TypeAlias = Literal["required", "optional", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Images that are run together.

    Attributes:
        images: As the model takes them: uint8 (N, H, W, 3) or float32 (N, 3, H, W), normalised; N is 0 where none could
            be read.
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
        source: Where they lie.
        spec: Whose input they become.
        chosen: Ascending indices into `source`.
        labels: Class of each image of `source`, or None.
        labels_from: How the classes were found, in words; empty without labels.
        batch_size: Of every batch but the last.
        name: For messages and reports.
        class_names: What the folders call the classes, by index; None where the set is no folder of folders.
    """

    source: ImageSource
    spec: ModelSpec
    chosen: tuple[int, ...]
    labels: tuple[int, ...] | None
    labels_from: str
    batch_size: int
    name: str
    class_names: tuple[str, ...] | None = None

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
                unreadable += 1
                skipped.append(image.message)
                self._require_few(unreadable, image)
                continue
            images.append(image)
            classes.append(self.labels[index] if self.labels is not None else 0)
            if len(images) == self.batch_size:
                yield self._batch(images, classes, skipped)
                images, classes, skipped = [], [], []
        if images or skipped:
            yield self._batch(images, classes, skipped)

    def _require_few(self, unreadable: int, error: InputError) -> None:
        logger.warning("skipped: %s", error.message)
        if unreadable > MAX_UNREADABLE_SHARE * len(self):
            raise InputError(
                f"{self.name}: more than {MAX_UNREADABLE_SHARE:.0%} of {len(self)} images cannot be read; "
                f"{error.message}",
                remedy=error.remedy,
            ) from error

    def _batch(self, images: list[NDArray[Any]], classes: list[int], skipped: list[str]) -> ImageBatch:
        array = to_input(images, self.spec, self.name)
        return ImageBatch(array, np.array(classes, np.int64) if self.labels is not None else None, tuple(skipped))


@dataclass(frozen=True, slots=True)
class SetOptions:
    """Which images of a set are taken.

    Attributes:
        limit: At most so many, chosen evenly at random; None takes all.
        batch_size: Images in a batch; the Engine splits and pads them where a model has a fixed one.
        seed: Of the choice.
        labels: `required` refuses a set without labels; `none` does not look for any.
    """

    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    labels: LabelUse = "required"

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
            searched recursively, a list of paths, one image.
        spec: Of the model that they are for: its classes, labels and input.
        options: Limit, batch size, seed and whether labels are needed.

    Raises:
        InputError: There is nothing there, or it has no labels, wrong ones, or names files that are missing.
    """
    options = options or SetOptions()
    where = Path(path)
    source, labels, how, names = _open(where, spec, options.labels)
    if not len(source):
        raise InputError(
            f"{where}: expected at least one image, found none", remedy="name a folder, list or .npz that holds some"
        )
    return ImageSet(
        source,
        spec,
        choose_evenly(len(source), options.limit, options.seed),
        labels,
        how,
        options.batch_size,
        str(where),
        names,
    )


def choose_evenly(count: int, limit: int | None, seed: int) -> tuple[int, ...]:
    """At most `limit` of the indices 0 … count − 1, drawn at random without repetition, ascending."""
    if limit is None or limit >= count:
        return tuple(range(count))
    return tuple(sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist()))


_Labels: TypeAlias = "tuple[tuple[int, ...] | None, str, tuple[str, ...] | None]"
_Opened: TypeAlias = "tuple[ImageSource, tuple[int, ...] | None, str, tuple[str, ...] | None]"


def _open(path: Path, spec: ModelSpec, use: LabelUse) -> _Opened:
    if path.is_dir():
        return _open_folder(path, spec, use)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file or folder", remedy="check the path; relative paths start at the current folder"
        )
    if path.suffix.lower() == ".npz":
        archive = NpzSource(path)
        return archive, *_find_labels(None if use == "none" else archive.labels(), spec, path, use)
    if path.suffix.lower() in _LIST_SUFFIXES:
        found = read_list(path)
        return FileSource(found.paths, _preprocessing(spec)), *_find_labels(
            None if use == "none" else found.labels, spec, path, use
        )
    return FileSource((path,), _preprocessing(spec)), *_find_labels(None, spec, path, use)


def _open_folder(path: Path, spec: ModelSpec, use: LabelUse) -> _Opened:
    files = find_images(path)
    if not files:
        raise InputError(
            f"{path}: no image found there or in its sub-folders", remedy="name a folder that holds images"
        )
    parts = [file.relative_to(path).parts for file in files]
    loose = next((file for file, part in zip(files, parts, strict=True) if len(part) == 1), None)
    if use == "none" or (use == "optional" and loose is not None):
        return FileSource(files, _preprocessing(spec)), None, "", None
    if loose is not None:
        raise InputError(
            f"{path}: expected one sub-folder a class, found the image {loose.name} outside of any",
            remedy="sort the images into folders named after the classes, or give a CSV of path,label",
        )
    names = sorted({part[0] for part in parts})
    try:
        indices, how = index_folders(names, classes_of(spec), str(path))
    except InputError:
        if use == "required":
            raise
        return FileSource(files, _preprocessing(spec)), None, "", None
    by_name = dict(zip(names, indices, strict=True))
    by_index = {index: readable_name(name) for name, index in by_name.items()}
    called = tuple(by_index.get(index, "") for index in range(max(indices) + 1))
    return FileSource(files, _preprocessing(spec)), tuple(by_name[part[0]] for part in parts), how, called


def _find_labels(texts: Sequence[str] | None, spec: ModelSpec, path: Path, use: LabelUse) -> _Labels:
    if texts is None:
        if use == "required":
            raise InputError(
                f"{path}: has no labels",
                remedy="give path,label lines, an .npz with labels, or a folder with one sub-folder a class",
            )
        return None, "", None
    indices, how = index_labels(texts, classes_of(spec), str(path))
    return tuple(indices), how, None


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


def _preprocessing(spec: ModelSpec) -> Preprocessing:
    if spec.preprocessing is None:
        raise InputError(
            "the model does not say how an image becomes its input",
            remedy="give an .npz with float32 images as the model takes them",
        )
    return spec.preprocessing
