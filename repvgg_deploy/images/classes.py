"""Classes: the scores that a model gives them, and their index from what a data set calls them.

Names match as people see them: in Unicode's composed form on both sides, with `_` and `-` for a space, and case as it
is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(?:\.0*)?")


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
    if all(_WHOLE.fullmatch(text) for text in texts):
        return _check_indices(texts, classes, where), "labels are class indices"
    names = _index_by_name(classes)
    unknown = [text for text in texts if _plain(text) not in names]
    if unknown:
        raise _unknown(f"{where}: the label {unknown[0][:80]!r}", unknown[0], classes)
    return [names[_plain(text)] for text in texts], "labels are names of the model's classes"


def index_folders(folders: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of the folders of a data set: by name, else by number; never by order.

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
    if len(unknown) == len(folders) and all(_NUMBER.fullmatch(folder) for folder in folders):
        how = "folder names are class indices"
        if sorted(folders) != sorted(folders, key=int):
            how += " (not their order as texts, 1, 10, 2, which ImageFolder counts by: that is --sorted-folders)"
        return _check_indices(folders, classes, where), how
    error = _unknown(f"{where}: the folder {unknown[0]!r}", unknown[0], classes)
    if len(unknown) == len(folders):
        sorting = f"or give --sorted-folders if {folders[0]!r} is class 0 and so on in sorted order"
        raise InputError(error.message, remedy=f"{error.remedy}; {sorting}")
    raise error


def index_sorted(folders: Sequence[str], empty: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """Indices of folders by their sorted order, as torchvision's `ImageFolder` counts them: folders without images too.

    Args:
        folders: Names of those with images.
        empty: Names of those without.
        classes: The classes of the model.
        where: Names the data set, for messages.

    Returns:
        The indices of `folders`, and in words how they were found.

    Raises:
        InputError: Their number is not that of the classes, or their names say something else.
    """
    ordered = sorted({*folders, *empty})
    if classes.count is not None and len(ordered) != classes.count:
        raise InputError(
            f"{where}: {len(ordered)} folders for {classes.count} classes, so that their order says nothing",
            remedy="give one folder for each class, or name the folders after the classes and leave --sorted-folders "
            "out",
        )
    names = _index_by_name(classes)
    other = next((name for at, name in enumerate(ordered) if names.get(_plain(name), at) != at), None)
    if other is not None:
        at, index = ordered.index(other), names[_plain(other)]
        raise InputError(
            f"{where}: the folder {other!r} is {at} in sorted order, and class {index} of the model by its name",
            remedy="leave --sorted-folders out: the folders' names are the model's labels",
        )
    return [ordered.index(name) for name in folders], f"folders in sorted order, {ordered[0]!r} being class 0"


def _check_indices(texts: Sequence[str], classes: Classes, where: str) -> list[int]:
    indices = [int(text.partition(".")[0]) for text in texts]
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
    for name, index in _wordnet_indices(classes).items():
        found.setdefault(name, index)
    return {name: index for name, index in found.items() if index is not None}


def _wordnet_indices(classes: Classes) -> dict[str, int]:
    """Index by WordNet id, of a model whose labels are ImageNet's names, whatever their order and number.

    Of a thousand classes without labels, or with labels of which most stand where ImageNet's do (others call a few
    otherwise), the order is ImageNet's.
    """
    labels, ids = classes.labels, imagenet_wordnet_ids()
    if labels is None:
        return {name: index for index, name in enumerate(ids)} if classes.count == IMAGENET_CLASSES else {}
    known = {_plain(name).casefold(): index for index, name in enumerate(imagenet_labels())}
    known |= {_plain(name): index for index, name in enumerate(imagenet_labels())}  # Cardigan is a dog, cardigan is not
    owners = []
    for label in labels:
        forms = [_plain(part) for part in (label, label.partition(",")[0])]
        owners.append(next((known[form] for f in forms for form in (f, f.casefold()) if form in known), None))
    if len(labels) == IMAGENET_CLASSES and 2 * sum(owner == at for at, owner in enumerate(owners)) > len(labels):
        return {name: index for index, name in enumerate(ids)}
    if None in owners or len(set(owners)) < len(owners):
        return {}
    return {ids[owner]: index for index, owner in enumerate(owners) if owner is not None}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]", " ", unicodedata.normalize("NFC", name)).split())


def _unknown(what: str, name: str, classes: Classes) -> InputError:
    near = [label for label in classes.labels or () if _plain(label).casefold() == _plain(name).casefold()]
    if near:
        return InputError(f"{what} is no class of the model", remedy=f"did you mean {near[0]!r}? Case counts")
    some = f" ({', '.join(classes.labels[:3])}, …)" if classes.labels else ": it has no labels"
    return InputError(
        f"{what} is no class of the model{some}",
        remedy="use the model's labels (repvgg-trt inspect), WordNet ids or indices; or export it with --labels",
    )
