"""What `config.json` says beside the weights of a repository: classes, labels, and how images are prepared.

Source: `save_config_for_hf` and `load_model_config_from_hf` of timm
(https://github.com/huggingface/pytorch-image-models); `id2label` of https://github.com/huggingface/transformers.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, InputError
from ...specs.values import Interpolation, Preprocessing
from .lazy import printable

_MOST_BYTES = 8 << 20
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes
_IMAGENET_TAG = re.compile(r"(?:.*_)?in1k(?:_\d+)?")
_REMEDY = "fetch the weights yourself, give the file, and state it with --mean, --std, --image-size and --labels"


@dataclass(frozen=True, slots=True)
class Told:
    """What was told, and by whom.

    Attributes:
        who: Such as `config.json of timm/repvgg_a0.rvgg_in1k`.
        classes: How many; None where it says nothing of it, or of a backbone.
        preprocessing: How images are prepared; None where it says nothing of it.
        stated: Which parts of it were said (`mean`, `std`, `crop`, `interpolation`, `resize`); the rest is the usual.
        labels: Names of the classes.
        notes: What it says and we do not take, in sentences.
    """

    who: str
    classes: int | None = None
    preprocessing: Preprocessing | None = None
    stated: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def say(self, preprocessing: Preprocessing | None, labels: tuple[str, ...] | None) -> tuple[str, ...]:
        """The fact for a certificate: what of it a model has; nothing where it has none of it."""
        taken = [f"{self.classes} classes"] if self.classes is not None else []
        if preprocessing is not None and self.preprocessing is not None:
            theirs, ours = _parts(self.preprocessing), _parts(preprocessing)
            taken += [text for name, text in theirs.items() if name in self.stated and ours[name] == text]
        taken += ["the labels"] if labels is not None and labels == self.labels else []
        return (f"told by {self.who}: {', '.join(taken)}",) if taken else ()


def _parts(how: Preprocessing) -> dict[str, str]:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
    size = "×".join(map(str, how.box or ()))
    resized = {
        "stretch": f"stretched to {size}",
        "letterbox": "letterboxed",
        "cover": f"resized to cover {size}" if how.box else f"resized to {how.resize_short}",
    }
    return {
        "mean": f"mean ({mean})",
        "std": f"standard deviation ({std})",
        "crop": f"crop {how.crop[0]}×{how.crop[1]}",
        "interpolation": how.interpolation,
        "resize": resized[how.fit],
    }


def read_config(path: Path, repository: str) -> Told:
    """Reads a `config.json` of timm's or transformers' format; what it does not say is left open.

    Args:
        path: The file.
        repository: Whose it is, such as `timm/repvgg_a0.rvgg_in1k`.

    Raises:
        CheckpointError: It is no JSON object, or says what cannot be.
    """
    who = f"config.json of {repository}"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{who}: is larger than 8 MiB", remedy=_REMEDY)
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise CheckpointError(f"{who}: is no JSON object", remedy=_REMEDY)
        nested = config.get("pretrained_cfg")
        cfg = {**config, **nested} if isinstance(nested, dict) else config  # files of old timm have one level
        preprocessing, stated, notes = _read_preprocessing(cfg)
        classes, (labels, more) = _read_classes(config, cfg), _read_labels(config, cfg)
        if labels is not None and classes is not None and len(labels) != classes:
            raise InputError(f"names {len(labels)} classes and says that there are {classes}", remedy=_REMEDY)
    except InputError as error:
        raise CheckpointError(f"{who}: {error.message}", remedy=_REMEDY) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{who}: cannot be read: {printable(str(error))}", remedy=_REMEDY) from error
    said = tuple(f"{who} {note}" for note in (*notes, *more))
    return Told(who, classes, preprocessing, stated, labels, said)


def _read_classes(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> int | None:
    count = config.get("num_classes", cfg.get("num_classes"))
    if count is None or count == 0:
        return None
    if type(count) is not int or count < 0:
        raise InputError(f"num_classes must be a whole number, found {printable(str(count))}", remedy=_REMEDY)
    return count


def _read_preprocessing(cfg: Mapping[str, Any]) -> tuple[Preprocessing | None, tuple[str, ...], list[str]]:
    """How images are prepared, which parts of it were said, and what is not taken."""
    from ...images.decode import default_preprocessing

    stated, notes = [], []
    size = cfg.get("input_size")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)):
            raise InputError(f"input_size must be [3, height, width], found {printable(str(size))}", remedy=_REMEDY)
        stated.append("crop")
    height, width = size[1:] if size else (224, 224)
    found = default_preprocessing(height, width)
    if cfg.get("mean") is not None:
        found = replace(found, mean=_triple("mean", cfg["mean"]))
        stated.append("mean")
    if cfg.get("std") is not None:
        found = replace(found, std=_triple("std", cfg["std"]))
        stated.append("std")
    named: Any = cfg.get("interpolation")
    if named in typing.get_args(Interpolation):
        found = replace(found, interpolation=named)
        stated.append("interpolation")
    elif named is not None:
        notes.append(f"says interpolation {printable(str(named))}, which is none of ours: bilinear is taken")
    found, more = _read_resizing(cfg, found)
    notes += more
    stated += ["resize"] if cfg.get("crop_pct") is not None and not more else []
    if not stated:
        return None, (), notes
    usual = {
        "mean": "ImageNet's mean", "std": "ImageNet's standard deviation", "crop": "224×224",
        "interpolation": "bilinear", "resize": f"the short side resized to {found.resize_short}",
    }  # fmt: skip
    assumed = [text for name, text in usual.items() if name not in stated]
    if assumed:
        notes.append(f"does not say all of how images are prepared; assumed: {', '.join(assumed)}")
    return found, tuple(stated), notes


def _read_resizing(cfg: Mapping[str, Any], found: Preprocessing) -> tuple[Preprocessing, list[str]]:
    """With what is said of the resize, and what is not taken."""
    share, mode = cfg.get("crop_pct"), cfg.get("crop_mode") or "center"
    if share is None:
        return found, []
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.01 <= share <= 1:
        raise InputError(f"crop_pct must be a share of 0.01 to 1, found {printable(str(share))}", remedy=_REMEDY)
    box = (math.floor(found.crop[0] / share), math.floor(found.crop[1] / share))
    if mode == "center":
        return replace(found, resize_short=min(box), box=None if box[0] == box[1] else box), []
    if mode == "squash":
        return replace(found, resize_short=min(box), box=box, fit="stretch"), []
    return found, [f"says crop_mode {printable(str(mode))}, which is none of ours: the centre is cropped"]


def _triple(name: str, values: object) -> tuple[float, float, float]:
    """Three numbers in 0–1 units → 0–255, without the noise that 0.485 · 255 has in its last digit."""
    sound = isinstance(values, list) and len(values) == 3
    numbers = [v for v in values if type(v) in (int, float) and math.isfinite(v)] if isinstance(values, list) else []
    if not sound or len(numbers) != 3 or max(map(abs, numbers)) > 2:
        raise InputError(
            f"{name} must be three numbers in units of 0–1, found {printable(str(values))}", remedy=_REMEDY
        )
    red, green, blue = (float(f"{255 * value:.12g}") for value in numbers)
    return red, green, blue


def _read_labels(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, list[str]]:
    names: Any = next(
        (source[key] for key in ("label_names", "labels") for source in (config, cfg) if source.get(key)), None
    )
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        described = config.get("label_descriptions") or cfg.get("label_descriptions")
        if isinstance(described, dict) and all(isinstance(described.get(name), str) for name in names):
            names = [described[name] for name in names]  # timm's names are WordNet ids where it describes them
        return tuple(names), []
    by_index = config.get("id2label")
    if isinstance(by_index, dict) and by_index:
        named = [by_index.get(str(index)) for index in range(len(by_index))]
        if not all(isinstance(name, str) for name in named):
            return None, [f"has an id2label whose keys are not 0 to {len(by_index) - 1}: it is not taken"]
        if not all(_UNNAMED.fullmatch(str(name)) for name in named):
            return tuple(map(str, named)), []
    if cfg.get("num_classes") == 1000 and _IMAGENET_TAG.fullmatch(str(cfg.get("tag") or "")):
        from ...images.classes import imagenet_labels

        return imagenet_labels(), []
    return None, []
