"""The content of a file → every state dict in it: under any key, nested, in lists, in pickled modules, folded.

What a state dict is, is decided by content: named tensors that stand together. Nothing is chosen here (see `resolve`).
Source: `torch.nn.Module` for pickled modules; torch/nn/utils/prune.py, weight_norm.py, spectral_norm.py and
parametrizations.py (https://github.com/pytorch/pytorch) for weights that are kept as parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...specs.values import METADATA_KEY
from .lazy import LazyTensor, MalformedError, printable
from .objects import ArrayObject, ForeignObject, attributes_of

if TYPE_CHECKING:
    import torch

_MAX_DEPTH = 8
_MAX_VISITS = 500_000
_MAX_LOOKS = 20_000_000
_LETTERS = 32  # of a name are paid as one visit
_MAX_NAME = 512
_MAX_PATH = 100


@dataclass(frozen=True, slots=True)
class Candidate:
    """One state dict that a file holds.

    Attributes:
        where: Path of keys to it, such as `state_dict`; empty for the file itself.
        tensors: By name, as in the file; weights that the file keeps as parts are whole.
        modules: Of a pickled module: itself (under the empty name) and its submodules by path; else None.
        merged: Whether it is several dicts of tensors side by side, taken as one.
        notes: What was folded, in sentences.
    """

    where: str
    tensors: dict[str, LazyTensor]
    modules: Mapping[str, ForeignObject] | None = None
    merged: bool = False
    notes: tuple[str, ...] = ()


def find_candidates(root: object) -> list[Candidate]:
    """Every state dict of a file; what can be read as one only side by side comes last.

    Raises:
        MalformedError: The objects are nested or shared beyond reason.
    """
    search = _Search()
    search.visit(root, ())
    return [*search.found, *search.merged]


class _Search:
    """Walks the objects of a file; each once, with bounded work on what objects share or contain."""

    def __init__(self) -> None:
        self._left = _MAX_VISITS
        self._looks = _MAX_LOOKS
        self._seen: set[int] = set()
        self.found: list[Candidate] = []
        self.merged: list[Candidate] = []

    def _spend(self, visits: int) -> None:
        self._left -= visits
        if self._left < 0 or self._looks < 0:
            raise MalformedError("the objects in the file are nested or shared beyond reason")

    def visit(self, node: object, path: tuple[str, ...]) -> None:
        """Looks for state dicts in one object and in what it holds."""
        if id(node) in self._seen or len(path) > _MAX_DEPTH:
            return
        self._seen.add(id(node))
        where = ".".join(path)
        if isinstance(node, ForeignObject) and _module_parts(node) is not None:
            tensors, modules = self._walk_module(node)
            self._add(where, tensors, modules)
            return
        children = self._children(node)
        tensors = {name: tensor for name, value in children.items() if (tensor := _tensor_of(value)) is not None}
        self._add(where, tensors)
        first = len(self.found)
        for key, child in children.items():
            if key != METADATA_KEY and isinstance(child, (dict, list, tuple, ForeignObject)):
                self.visit(child, (*path, printable(key)))
        parts = [part for part in self.found[first:] if part.modules is None]
        if len(parts) > 1 or (parts and tensors):
            whole = dict(tensors)
            for part in parts:
                inner = part.where[len(where) :].lstrip(".")
                whole |= {f"{inner}.{name}": tensor for name, tensor in part.tensors.items()}
            self._spend(sum(1 + len(name) // _LETTERS for name in whole))
            self.merged.append(Candidate(where, whole, merged=True))

    def _add(
        self, where: str, tensors: dict[str, LazyTensor], modules: Mapping[str, ForeignObject] | None = None
    ) -> None:
        if tensors:
            folded, notes = fold_parts(tensors)
            self.found.append(Candidate(where, folded, modules, notes=notes))

    def _children(self, node: object) -> dict[str, object]:
        """The named values in a dict, a list (by index, or of pairs), or a foreign object: attributes and items."""
        items: Iterable[object] = ()
        attributes = attributes_of(node) if isinstance(node, ForeignObject) else {}
        held_items = node.items if isinstance(node, ForeignObject) else node
        self._looks -= 1 + len(attributes) + (len(held_items) if isinstance(held_items, (dict, list, tuple)) else 0)
        self._spend(1)
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, ForeignObject):
            items = [*attributes.items(), *node.items]
        elif isinstance(node, (list, tuple)):
            held = (list, tuple, dict, ForeignObject, LazyTensor, ArrayObject)
            pairs = all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in node)
            kept = ((str(index), item) for index, item in enumerate(node) if isinstance(item, held))
            items = list(node if pairs else kept)
        named = {}
        for item in items:
            if isinstance(item, tuple) and len(item) == 2:
                key = item[0].decode("utf-8", "replace") if isinstance(item[0], bytes) else item[0]
                numbered = isinstance(key, int) and abs(key) < 1 << 63
                if numbered and isinstance(item[1], (dict, list, tuple, ForeignObject)):
                    key = str(key)  # epochs are counted; so are the states of an optimizer, which no family names
                if isinstance(key, str) and len(key) <= _MAX_NAME:
                    named[key] = item[1]
        self._spend(len(named))
        return named

    def _walk_module(self, root: ForeignObject) -> tuple[dict[str, LazyTensor], dict[str, ForeignObject]]:
        """Parameters and persistent buffers of a pickled module, named as in its state dict; all modules by path."""
        tensors: dict[str, LazyTensor] = {}
        found: dict[str, ForeignObject] = {}
        stack = [("", root)]
        while stack:
            prefix, module = stack.pop()
            found[prefix.rstrip(".")] = module
            parameters, buffers, modules = _module_parts(module) or ({}, {}, {})
            transient = attributes_of(module).get("_non_persistent_buffers_set")
            self._looks -= len(transient) if isinstance(transient, list) else 0
            self._spend(1 + len(prefix) // _LETTERS + len(parameters) + len(buffers) + len(modules))
            skipped = {name for name in transient if isinstance(name, str)} if isinstance(transient, list) else set()
            for name, value in (*parameters.items(), *buffers.items()):
                tensor = _tensor_of(value)
                if tensor is None or not isinstance(name, str) or name in skipped:
                    continue
                if len(prefix) + len(name) <= _MAX_PATH:
                    tensors[prefix + name] = tensor
            for name, child in reversed(modules.items()):
                # A cycle ends where the prefix becomes too long.
                if isinstance(child, ForeignObject) and isinstance(name, str) and len(prefix) + len(name) < _MAX_PATH:
                    stack.append((f"{prefix}{name}.", child))
        return tensors, found


def _tensor_of(value: object) -> LazyTensor | None:
    """The tensor that a value of a state dict is, if it is one; PaddlePaddle writes (name, array) pairs too."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if isinstance(value, ArrayObject):
        return value.tensor
    return value if isinstance(value, LazyTensor) else None


def _module_parts(node: ForeignObject) -> tuple[dict[object, object], ...] | None:
    """(parameters, buffers, modules) of a pickled `torch.nn.Module`, or None."""
    attributes = attributes_of(node)
    parts = [attributes.get(name) for name in ("_parameters", "_buffers", "_modules")]
    dicts = tuple(part for part in parts if isinstance(part, dict))
    return dicts if len(dicts) == len(parts) else None


def fold_parts(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Weights that torch keeps as parts, whole: what their module computes with in `eval()`.

    Pruned (`weight_orig` · `weight_mask`), weight-normed (`weight_g` · `weight_v` / ‖`weight_v`‖) and spectrally normed
    (`weight_orig` / (uᵀ·W·v)) ones, in both ways that torch names them.

    Returns:
        The tensors, and what was done, in sentences.
    """
    whole: dict[str, LazyTensor] = {}
    used: set[str] = set()
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name in used:
            continue
        for kind, names, combine in _ways_to_fold(name):
            if all(part in tensors for part in names):
                parts = [tensors[part] for part in names]
                base = name.replace("parametrizations.", "").removesuffix(".original").removesuffix(".original0")
                base = base.removesuffix("_orig").removesuffix("_g")
                largest = max(parts, key=lambda part: (bool(part.unusable), part.nbytes))
                views = tuple(view for part in parts for view in part.views)
                whole[base] = replace(largest, load=_combine(parts, combine), views=views)
                used |= set(names)
                counts[kind] = counts.get(kind, 0) + 1
                break
        else:
            whole[name] = tensor
    # Parts that stand before the first one of their weight.
    kept = {name: tensor for name, tensor in whole.items() if name not in used}
    return kept, tuple(f"{count} {kind} weights were folded into plain ones" for kind, count in counts.items())


_Combination = Callable[..., "torch.Tensor"]


def _ways_to_fold(name: str) -> list[tuple[str, tuple[str, ...], _Combination]]:
    """(kind, names of the parts, their combination) for the name of a first part; none for any other name."""
    if name.endswith("_orig"):
        base = name.removesuffix("_orig")
        return [
            ("pruned", (name, f"{base}_mask"), _mask),
            ("spectrally normed", (name, f"{base}_u", f"{base}_v"), _norm_spectrally),
        ]
    if name.endswith("_g"):
        return [("weight-normed", (name, f"{name.removesuffix('_g')}_v"), _norm_weight)]
    if ".parametrizations." in f".{name}" and name.endswith(".original0"):
        return [("weight-normed", (name, f"{name[:-1]}1"), _norm_weight)]
    if ".parametrizations." in f".{name}" and name.endswith(".original"):
        base = name.removesuffix(".original")
        return [("spectrally normed", (name, f"{base}.0._u", f"{base}.0._v"), _norm_spectrally)]
    return []


def _combine(parts: list[LazyTensor], combine: _Combination) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        values = [part.load() for part in parts]
        try:
            return combine(*(value.double() for value in values)).to(values[0].dtype)
        except (RuntimeError, IndexError) as error:
            raise MalformedError("the parts of a weight do not fit together") from error

    return load


def _mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weight * mask.view(weight.shape)  # not of any other shape: their product could have any size


def _norm_weight(size: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    axes = [axis for axis in range(direction.dim()) if axis >= size.dim() or size.shape[axis] == 1]
    norm = direction.square().sum(dim=axes, keepdim=True).sqrt()
    return direction * (size.reshape(norm.shape) / norm)


def _norm_spectrally(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return weight / left.dot(weight.flatten(1).mv(right))
