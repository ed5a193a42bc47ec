"""Classes: the scores that a model gives them, and their index from what a data set calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities (…, classes) in float64 of logits (…, classes)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def best_classes(scores: NDArray[Any], top: int) -> NDArray[np.int64]:
    """The `top` best classes of each image, int64 (…, top), best first; of equal scores, the lower class first."""
    order = np.argsort(-scores.astype(np.float64), axis=-1, kind="stable")[..., :top]
    return order.astype(np.int64, copy=False)


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a UTF-8 text file, one a line in the classifier's order; a blank line is a class without a name.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path, which stands before it
        raise InputError(
            f"{path}: cannot be read as labels: {reason}", remedy="give a UTF-8 text file with one label a line"
        ) from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


def imagenet_labels() -> tuple[str, ...]:
    """Names of the 1,000 ImageNet classes in the order of the published checkpoints: `tench` is 0, `toilet tissue` 999.

    A name is the first of the class's WordNet synset, or the second where two classes share the first; the two cranes
    have `(bird)` and `(machine)` added. The order is that of the WordNet ids.
    Source: Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575.
    """
    return _read_names("imagenet1k.txt")


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """WordNet ids by class index, the folder names of the data set: `n01440764` is 0.

    Source: synsets.txt of ILSVRC 2012, sorted.
    """
    return _read_names("imagenet1k_wordnet.txt")


def _read_names(file: str) -> tuple[str, ...]:
    from importlib import resources  # here, because the runtime needs the scores only

    names = resources.files("repvgg_deploy").joinpath(f"data/{file}").read_text(encoding="utf-8").splitlines()
    assert len(names) == len(set(names)) == IMAGENET_CLASSES, f"data/{file} holds {len(names)} names"
    return tuple(names)


def readable_name(folder: str) -> str:
    """A folder's name; of a WordNet id of ImageNet-1k, the class's name."""
    names = imagenet_wordnet_ids()
    return imagenet_labels()[names.index(folder)] if folder in names else folder


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model.

    Attributes:
        labels: Names in the order of the classes, or None.
        count: How many, or None where a model gives only its best five and no names.
    """

    labels: tuple[str, ...] | None
    count: int | None


def index_labels(texts: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of labels that are all numbers, or all names.

    Args:
        texts: As the CSV or archive has them.
        classes: The classes of the model.
        where: Names the file, for messages.

    Returns:
        The indices, and in words how they were found.

    Raises:
        InputError: A label is out of range or no class of the model.
    """
    if all(re.fullmatch(r"[+-]?\d+", text) for text in texts):
        return _check_indices(texts, classes, where), "labels are class indices"
    names = _index_by_name(classes)
    unknown = [text for text in texts if _plain(text) not in names]
    if unknown:
        raise _unknown(f"{where}: the label {unknown[0]!r}", classes)
    return [names[_plain(text)] for text in texts], "labels are names of the model's classes"


def index_folders(folders: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of the folders of a data set: by name, else by number, else by order if each class has one.

    Args:
        folders: Names, sorted.
        classes: The classes of the model.
        where: Names the data set, for messages.

    Returns:
        The indices, and in words how they were found.

    Raises:
        InputError: They are not classes of the model.
    """
    names = _index_by_name(classes)
    unknown = [folder for folder in folders if _plain(folder) not in names]
    if not unknown:
        return [names[_plain(folder)] for folder in folders], "folder names are the model's labels or their WordNet ids"
    if len(unknown) < len(folders):
        raise _unknown(f"{where}: the folder {unknown[0]!r}", classes)
    if all(re.fullmatch(r"\d+", folder) for folder in folders):
        return _check_indices(folders, classes, where), "folder names are class indices"
    if classes.count is None or len(folders) == classes.count:
        how = f"folders in sorted order, {folders[0]!r} being class 0: none is a label of the model"
        return list(range(len(folders))), how
    raise _unknown(f"{where}: {len(folders)} folders for {classes.count} classes, and {unknown[0]!r}", classes)


def _check_indices(texts: Sequence[str], classes: Classes, where: str) -> list[int]:
    indices = [int(text) for text in texts]
    for index in indices:
        if index < 0 or (classes.count is not None and index >= classes.count):
            last = "" if classes.count is None else f" to {classes.count - 1}"
            raise InputError(
                f"{where}: label {index} is out of range: expected 0{last}",
                remedy="labels count from 0, in the order of the model's classes (repvgg-trt inspect); or give class "
                "names",
            )
    return indices


def _index_by_name(classes: Classes) -> dict[str, int]:
    """Index by each name that means one class only: whole labels, their comma-separated parts, WordNet ids."""
    labels = classes.labels or ()
    found: dict[str, int | None] = {}
    for index, label in enumerate(labels):
        parts = {_plain(part) for part in (label, *label.split(","), *_WORDNET_ID.findall(label))}
        for part in parts - {""}:
            found[part] = index if found.get(part, index) == index else None
    # A whole label means its class, though it may be a part of another's.
    whole = [_plain(label) for label in labels]
    found |= {label: index for index, label in enumerate(whole) if label.strip() and whole.count(label) == 1}
    if classes.labels == imagenet_labels() or (classes.labels is None and classes.count == IMAGENET_CLASSES):
        found |= {name: index for index, name in enumerate(imagenet_wordnet_ids())}
    return {name: index for name, index in found.items() if index is not None}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]", " ", name).casefold().split())


def _unknown(what: str, classes: Classes) -> InputError:
    some = f" ({', '.join(classes.labels[:3])}, …)" if classes.labels else ": it has no labels"
    return InputError(
        f"{what} is no class of the model{some}",
        remedy="use the model's labels (repvgg-trt inspect), WordNet ids or indices; or export it with --labels",
    )
