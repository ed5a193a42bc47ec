"""Names of the 1,000 ImageNet-1k classes, in the order in which every published checkpoint scores them. Standard library only.

One short name a class: the first name of its WordNet synset, or its second where two classes share the first; the two cranes have `(bird)` and
`(machine)` added. The order is that of the WordNet ids. Source: Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from .errors import InputError

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
        raise InputError(f"{path}: cannot be read as labels: {reason}", remedy="give a UTF-8 text file with one label a line") from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


def imagenet_labels() -> tuple[str, ...]:
    """The names by class index: `tench` is 0, `toilet tissue` 999."""
    labels = tuple(resources.files("repvgg_deploy").joinpath("data/imagenet1k.txt").read_text(encoding="utf-8").splitlines())
    assert len(labels) == len(set(labels)) == IMAGENET_CLASSES, f"data/imagenet1k.txt holds {len(labels)} names"
    return labels


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """WordNet ids by class index, the folder names of the data set: `n01440764` is 0. Source: synsets.txt of ILSVRC 2012, sorted."""
    names = tuple(resources.files("repvgg_deploy").joinpath("data/imagenet1k_wordnet.txt").read_text(encoding="utf-8").split())
    assert len(set(names)) == IMAGENET_CLASSES, f"data/imagenet1k_wordnet.txt holds {len(names)} ids"
    return names
