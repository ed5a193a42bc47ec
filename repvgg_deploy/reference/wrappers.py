"""What a file holds → candidate state dicts: wrappers are opened, modules walked, averaged weights put first.

Source: `main.py` of https://github.com/DingXiaoH/RepVGG (`model`, `ema`), timm (`state_dict_ema`), mmengine (`state_dict`; its `ema_state_dict`
holds the weights that are *not* averaged, because mmengine swaps the two on saving), `torch.nn.Module` for pickled modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from .lazy_tensor import LazyTensor, MalformedError, printable
from .pickle_values import ArrayObject, ForeignObject

METADATA_KEY = "repvgg_deploy"
EMA_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_model", "model_ema_state_dict")
PLAIN_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
_SKIPPED_KEYS = frozenset(["optimizer", "optimizers", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler", "scaler", "amp", "callbacks",
                           "loops", "hyper_parameters", "config", "args", "meta", "message_hub", "ema_state_dict", METADATA_KEY])  # fmt: skip
_MAX_DEPTH = 6
_MAX_VISITS = 500_000
_MAX_NAME = 512


class _Budget:
    """Bounds the work on objects that share or contain each other."""

    def __init__(self) -> None:
        self._left = _MAX_VISITS
        self.seen: set[int] = set()

    def spend(self, visits: int) -> None:
        self._left -= visits
        if self._left < 0:
            raise MalformedError("the objects in the file are nested or shared beyond reason")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One state dict that a file holds.

    Attributes:
        where: Path of keys to it, such as `state_dict`; empty for the file itself.
        tensors: By name, as in the file.
        averaged: Whether it is an exponential moving average.
        module: Whether it was a pickled module rather than a state dict.
    """

    where: str
    tensors: dict[str, LazyTensor]
    averaged: bool = False
    module: bool = False


def find_candidates(root: object) -> list[Candidate]:
    """State dicts in the order in which they should be tried: averaged weights, known wrappers, the file itself, anything else.

    Raises:
        MalformedError: The objects are nested or shared beyond reason.
    """
    found: list[Candidate] = []
    _search(root, (), found, budget=_Budget())
    found.sort(key=lambda candidate: not candidate.averaged)
    return found


def tensor_of(value: object) -> LazyTensor | None:
    """The tensor that a value of a state dict is, if it is one; PaddlePaddle writes (name, array) pairs too."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if isinstance(value, ArrayObject):
        return value.tensor
    return value if isinstance(value, LazyTensor) else None


def _search(node: object, path: tuple[str, ...], found: list[Candidate], *, budget: _Budget) -> None:
    if id(node) in budget.seen or len(path) > _MAX_DEPTH:
        return
    budget.seen.add(id(node))
    averaged = any(key in EMA_KEYS for key in path)
    if isinstance(node, ForeignObject) and _module_parts(node) is not None:
        tensors = _walk_module(node, budget)
        if tensors:
            found.append(Candidate(".".join(path), tensors, averaged, module=True))
        return
    children = _children(node, budget)
    for key in (*EMA_KEYS, *PLAIN_KEYS):
        if key in children:
            _search(children[key], (*path, key), found, budget=budget)
    tensors = {name: tensor for name, value in children.items() if (tensor := tensor_of(value)) is not None}
    if tensors:
        found.append(Candidate(".".join(path), tensors, averaged))
    for key, child in children.items():
        if key not in _SKIPPED_KEYS and isinstance(child, (dict, ForeignObject)):
            _search(child, (*path, printable(key)), found, budget=budget)


def _children(node: object, budget: _Budget) -> dict[str, object]:
    """The named values in a dict, or in a foreign object: its attributes and, where it acts as a dict, its items."""
    items: list[object] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, ForeignObject):
        items = [*_attributes(node).items(), *node.items]
    budget.spend(1 + len(items))
    pairs = (item for item in items if isinstance(item, tuple) and len(item) == 2)
    return {key: value for key, value in pairs if isinstance(key, str) and len(key) <= _MAX_NAME}


def _attributes(node: ForeignObject) -> dict[object, object]:
    state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
    return state if isinstance(state, dict) else {}


def _module_parts(node: ForeignObject) -> tuple[dict[object, object], ...] | None:
    """(parameters, buffers, modules) of a pickled `torch.nn.Module`, or None."""
    attributes = _attributes(node)
    parts = tuple(attributes.get(name) for name in ("_parameters", "_buffers", "_modules"))
    return tuple(part for part in parts if isinstance(part, dict)) if all(isinstance(part, dict) for part in parts) else None


def _walk_module(root: ForeignObject, budget: _Budget) -> dict[str, LazyTensor]:
    """Parameters and persistent buffers of a pickled module and its submodules, named as in its state dict."""
    tensors: dict[str, LazyTensor] = {}
    stack = [("", root)]
    while stack:
        prefix, module = stack.pop()
        parameters, buffers, modules = _module_parts(module) or ({}, {}, {})
        budget.spend(1 + len(parameters) + len(buffers) + len(modules))
        transient = _attributes(module).get("_non_persistent_buffers_set")
        skipped = {name for name in transient if isinstance(name, str)} if isinstance(transient, list) else set()
        for name, value in (*parameters.items(), *buffers.items()):
            tensor = tensor_of(value)
            if tensor is not None and isinstance(name, str) and name not in skipped and len(prefix) + len(name) <= _MAX_NAME:
                tensors[prefix + name] = tensor
        for name, child in reversed(modules.items()):
            # A cycle ends where the prefix becomes too long.
            if isinstance(child, ForeignObject) and isinstance(name, str) and len(prefix) + len(name) < _MAX_NAME:
                stack.append((f"{prefix}{name}.", child))
    return tensors
