"""Averages of weights beside a model: which keys mean one, and those that are kept in other shapes than a state dict.

An average that a trainer keeps of a model's weights is what it evaluates with. Many keep parameters only: their own
code puts them into the model and leaves its BatchNorm statistics as they are, and so does this.
Source: LitEma of https://github.com/CompVis/latent-diffusion (names without dots), EMAHook of
https://github.com/open-mmlab/mmcv (buffers `ema_…`, dots as underscores), EMAHook of
https://github.com/open-mmlab/mmengine (swaps `state_dict` and `ema_state_dict` on saving),
https://github.com/fadel/pytorch_ema (`shadow_params`, a list), https://github.com/lucidrains/ema-pytorch
(`online_model`, `ema_model`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .candidates import Candidate
from .lazy import LazyTensor
from .names import Translation

_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
_AVERAGES = frozenset(["ema", "swa", "ewma", "averaged", "average", "avg", "shadow", "polyak"])
_JOINED = re.compile(r"{0}*(?:ema|swa){0}*".format("(?:model|net|network|weights?|params?|state|dict)"))
_MAX_LEADS = 64
_ROLES = frozenset(["teacher", "student"])
_BACKUP = re.compile(r"(^|\.)(collected_params|backup)(\.|$)")  # the raw weights, put aside while the average serves


@dataclass(frozen=True, slots=True)
class Average:
    """An average of a model's parameters.

    Attributes:
        key: Where it stands in the file.
        tensors: By the model's own names in the file.
        spent: Names that it has in the model's own state dict.
        note: What it is, in a sentence.
        unclear: Whether it and the model may have been swapped when the file was saved, which the file does not tell.
    """

    key: str
    tensors: Mapping[str, LazyTensor]
    spent: frozenset[str]
    note: str
    unclear: bool = False


def is_average(key: str) -> bool:
    """Whether a path of keys says that what stands there is an average of a model's own weights."""
    words = _words(key)
    return not _ROLES & set(words) and any(word in _AVERAGES or _JOINED.fullmatch(word) for word in words)


def is_role(key: str) -> bool:
    """Whether a path of keys says teacher or student: neither is an average of the other."""
    return bool(_ROLES & set(_words(key)))


def _words(key: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key)
    return [word.lower() for word in re.split(r"[^A-Za-z]+", spaced) if word]


def is_openmmlab(root: object) -> bool:
    """Whether mmcv or mmengine saved the file."""
    return isinstance(root, dict) and isinstance(root.get("meta"), dict)


def swapped_by_mmengine(root: object) -> bool:
    """Whether `state_dict` is the average and `ema_state_dict` the raw weights, as mmengine saves them."""
    if not isinstance(root, dict) or not isinstance(root.get("ema_state_dict"), dict) or "state_dict" not in root:
        return False
    return is_openmmlab(root) or "message_hub" in root or "steps" in root["ema_state_dict"]


def find_averages(
    model: Candidate,
    translation: Translation,
    parts: Iterable[tuple[str, Mapping[str, LazyTensor], Mapping[str, str]]],
    others: Iterable[Candidate],
    *,
    openmmlab: bool = False,
) -> list[Average]:
    """Averages of a model's parameters that are no complete state dicts.

    Args:
        model: Where the model stands.
        translation: Its parts.
        parts: Of each incomplete state dict under official names: its key, its tensors, official name → its own.
        others: Every state dict of the file, `model` too.
        openmmlab: Whether mmcv saved the file, whose hook may have swapped the two.
    """
    wanted = {name: official for official, name in translation.names.items() if not official.endswith(_BUFFERS)}
    buffers = [name for official, name in translation.names.items() if official.endswith(_BUFFERS)]
    found = []
    for key, tensors, parts_of in parts:
        theirs = {name: parts_of[official] for name, official in wanted.items() if official in parts_of}
        if is_average(key) and len(theirs) == len(wanted):
            found.append(_make(key, {name: tensors[their] for name, their in theirs.items()}, frozenset()))
    for other in {id(other): other for other in others}.values():
        own = other is model
        names = list(translation.extra) if own else list(other.tensors)
        if is_average(other.where) and not own and not _BACKUP.search(other.where):
            listed = [other.tensors[name] for name in names if name.isdecimal()]
            if len(listed) == len(names) == len(wanted):
                found.append(_make(other.where, dict(zip(wanted, listed, strict=True)), frozenset()))
        for lead, squashed in _find_undotted(names, list(wanted), translation.prefix, buffers):
            key = ".".join(part for part in (other.where, lead) if part)
            if is_average(key):
                tensors = {name: other.tensors[their] for name, their in squashed.items()}
                spent = frozenset(squashed.values()) if own else frozenset()
                found.append(_make(key, tensors, spent, unclear=openmmlab and own and lead == "ema"))
    theirs_fit = (all(t.shape == model.tensors[name].shape for name, t in one.tensors.items()) for one in found)
    return [average for average, fits in zip(found, theirs_fit, strict=True) if fits]


def _make(key: str, tensors: Mapping[str, LazyTensor], spent: frozenset[str], *, unclear: bool = False) -> Average:
    note = f"the average in {key!r} holds BatchNorm statistics of its own"
    if not any(name.endswith(_BUFFERS) for name in tensors):
        note = (
            f"the average in {key!r} holds parameters only; the BatchNorm statistics are those of the raw weights, as "
            f"its own code leaves them"
        )
    return Average(key, tensors, spent, note, unclear)


def _find_undotted(
    names: list[str], wanted: list[str], prefix: str, buffers: list[str]
) -> list[tuple[str, dict[str, str]]]:
    """Averages whose names are the model's without dots, or with underscores: (what stands before, wanted → name).

    `buffers` are taken, too, where they are there.
    """
    squashed = {_squash(name): name for name in names}
    found: list[tuple[str, dict[str, str]]] = []
    for cut in {0, len(prefix)}:
        every = [*wanted, *buffers]
        short = {name: _squash(name[cut:] if name.startswith(prefix) else name) for name in every}
        probe = short[wanted[0]] if wanted else ""
        endings = [name for name in squashed if probe and name.endswith(probe) and name != probe]
        for ending in endings[:_MAX_LEADS]:
            lead = ending.removesuffix(probe)
            matched = {name: squashed.get(lead + text) for name, text in short.items()}
            whole = {name: their for name, their in matched.items() if their is not None}
            if whole.keys() >= set(wanted) and not any(lead in done for done, _ in found):
                original = squashed[ending]
                end = next(end for end in range(len(original) + 1) if _squash(original[:end]) == lead)
                found.append((original[:end], whole))
    return found


def _squash(name: str) -> str:
    return re.sub(r"[._]", "", name)
