"""From what a data set calls a class (a folder, a name, a number) to the index that the model gives it.

Names of the 1,000 ImageNet-1k classes, in the order in which every published checkpoint scores them. Scores of classes
→ probabilities and the best classes.

One short name a class: the first name of its WordNet synset, or its second where two classes share the first; the two
cranes have `(bird)` and `(machine)` added. The order is that of the WordNet ids. Source: Russakovsky et al. 2015,
https://arxiv.org/abs/1409.0575.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

IMAGENET_CLASSES = 1000


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
    """The names by class index: `tench` is 0, `toilet tissue` 999."""
    labels = tuple(
        resources.files("repvgg_deploy").joinpath("data/imagenet1k.txt").read_text(encoding="utf-8").splitlines()
    )
    assert len(labels) == len(set(labels)) == IMAGENET_CLASSES, f"data/imagenet1k.txt holds {len(labels)} names"
    return labels


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """WordNet ids by class index, the folder names of the data set: `n01440764` is 0. Source: synsets.txt of ILSVRC 2012, sorted."""
    names = tuple(
        resources.files("repvgg_deploy").joinpath("data/imagenet1k_wordnet.txt").read_text(encoding="utf-8").split()
    )
    assert len(set(names)) == IMAGENET_CLASSES, f"data/imagenet1k_wordnet.txt holds {len(names)} ids"
    return names


_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model.

    Attributes:
        labels: Names in the order of the classes, or None.
        count: How many, or None where a model gives only its best five and no names.
    """

    labels: tuple[str, ...] | None
    count: int | None

    def names(self) -> dict[str, int]:
        """Index by each name that means one class only: whole labels, their comma-separated parts, WordNet ids."""
        found: dict[str, int | None] = {}
        for index, label in enumerate(self.labels or ()):
            parts = {_plain(part) for part in (label, *label.split(","), *_WORDNET_ID.findall(label))}
            for part in parts - {""}:
                found[part] = index if found.get(part, index) == index else None
        # A whole label means its class, though it may be a part of another's.
        found |= {_plain(label): index for index, label in enumerate(self.labels or ()) if self._is_unique(label)}
        if self.labels == imagenet_labels() or (self.labels is None and self.count == IMAGENET_CLASSES):
            found |= {name: index for index, name in enumerate(imagenet_wordnet_ids())}
        return {name: index for name, index in found.items() if index is not None}

    def _is_unique(self, label: str) -> bool:
        return bool(label.strip()) and sum(_plain(other) == _plain(label) for other in self.labels or ()) == 1

    def require_index(self, index: int, where: str) -> int:
        """Refuses an index that the model does not have.

        Raises:
            InputError: It is so.
        """
        if index < 0 or (self.count is not None and index >= self.count):
            last = "" if self.count is None else f" to {self.count - 1}"
            raise InputError(
                f"{where}: label {index} is out of range: expected 0{last}",
                remedy="labels count from 0, in the order of the model's classes (repvgg-trt inspect); or give class "
                "names",
            )
        return index


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]", " ", name).casefold().split())


def index_labels(texts: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of labels that are all numbers, or all names.

    Args:
        texts: As the CSV or archive has them.
        classes: Of the model.
        where: Names the file, for messages.

    Returns:
        The indices, and in words how they were found.

    Raises:
        InputError: A label is out of range or no class of the model.
    """
    if all(re.fullmatch(r"[+-]?\d+", text) for text in texts):
        return [classes.require_index(int(text), where) for text in texts], "labels are class indices"
    names = classes.names()
    unknown = [text for text in texts if _plain(text) not in names]
    if unknown:
        raise _unknown(f"{where}: the label {unknown[0]!r}", classes)
    return [names[_plain(text)] for text in texts], "labels are names of the model's classes"


def index_folders(folders: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of an ImageNet-style data set's folders: by name, else by number, else by their sorted order where each class has one.

    Args:
        folders: Names, sorted.
        classes: Of the model.
        where: Names the data set, for messages.

    Returns:
        The indices, and in words how they were found.

    Raises:
        InputError: They are not classes of the model.
    """
    names = classes.names()
    known = [names.get(_plain(folder)) for folder in folders]
    if None not in known:
        return [
            index for index in known if index is not None
        ], "folder names are the model's labels or their WordNet ids"
    unknown = folders[known.index(None)]
    if any(index is not None for index in known):
        raise _unknown(f"{where}: the folder {unknown!r}", classes)
    if all(re.fullmatch(r"\d+", folder) for folder in folders):
        return [classes.require_index(int(folder), where) for folder in folders], "folder names are class indices"
    if classes.count is None or len(folders) == classes.count:
        return list(
            range(len(folders))
        ), f"folders in sorted order, {folders[0]!r} being class 0: none is a label of the model"
    raise _unknown(f"{where}: {len(folders)} folders for {classes.count} classes, and {unknown!r}", classes)


def _unknown(what: str, classes: Classes) -> InputError:
    some = f" ({', '.join(classes.labels[:3])}, …)" if classes.labels else ": it has no labels"
    return InputError(
        f"{what} is no class of the model{some}",
        remedy="use the model's labels (repvgg-trt inspect), WordNet ids or indices; or export it with --labels",
    )


def readable_name(folder: str) -> str:
    """A folder's name; of a WordNet id of ImageNet-1k, the class's name."""
    names = imagenet_wordnet_ids()
    return imagenet_labels()[names.index(folder)] if folder in names else folder


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities (…, classes) in float64 of logits (…, classes)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    total: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return total


def best_classes(scores: NDArray[Any], top: int) -> NDArray[np.int64]:
    """int64 (N, K), the best classes of scores (N, classes), best first; of equal scores, the lower class first.

    Args:
        scores: Logits or probabilities.
        top: K, where there are so many classes.
    """
    order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :top]
    return order.astype(np.int64, copy=False)
