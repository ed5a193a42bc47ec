"""The content of a file → one model in it: its state dict under official names, its architecture, what is said of it.

`resolve` finds the state dicts (wrappers are opened, pickled modules walked), gives each official names (`names`) and
an architecture (`structure`), and takes the first that is complete, averaged weights before others.
Source: `main.py` of https://github.com/DingXiaoH/RepVGG (`model`, `ema`), timm (`state_dict_ema`), mmengine
(`state_dict`; its `ema_state_dict` holds the weights that are *not* averaged, because mmengine swaps the two on
saving), `torch.nn.Module` for pickled modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import CheckpointError, InputError
from ...specs import codec
from ...specs.values import Form, Preprocessing, VariantSpec
from ...specs.variants import architecture_of
from .containers import Content
from .lazy import LazyTensor, MalformedError, listing, printable
from .names import Translation, translate
from .pickle import ArrayObject, ForeignObject
from .structure import (
    AUXILIARY,
    STRIDES_ASSUMED,
    Shapes,
    Structure,
    check_complete,
    expected_shapes,
    infer_structure,
    match_architecture,
)

METADATA_KEY = "repvgg_deploy"
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_model", "model_ema_state_dict")
_PLAIN_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
)  # fmt: skip
_SKIPPED_KEYS = frozenset(["optimizer", "optimizers", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler",
                           "scaler", "amp", "callbacks", "loops", "hyper_parameters", "config", "args", "meta",
                           "message_hub", "ema_state_dict", METADATA_KEY])  # fmt: skip
_MAX_DEPTH = 6
_MAX_VISITS = 500_000
_MAX_NAME = 512
_MAX_PLAIN_DEPTH = 8
_MAX_PLAIN_ITEMS = 200_000
_MAX_PLAIN_TEXT = 10_000
_RESAVE = "save it again with the script that wrote it"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One model of a file, complete, its weights not read yet.

    Attributes:
        tensors: By official name, in the model's order; None for a step counter that the file lacks.
        wrapper: Path of keys to the state dict; empty where the file is one.
    """

    family: str
    form: Form
    spec: VariantSpec
    tensors: Mapping[str, LazyTensor | None]
    wrapper: str
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


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


@dataclass(frozen=True, slots=True)
class _Embedded:
    """What our own training script writes beside the state dict."""

    variant: VariantSpec | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def resolve(content: Content, arch: VariantSpec | None) -> Resolved:
    """Chooses and identifies the model: averaged weights if they are complete, else the state dict.

    Args:
        content: As `containers.read_file` gives it.
        arch: What it should be of, or None.

    Raises:
        CheckpointError: No RepVGG is in the file, or it is incomplete or of another architecture.
    """
    try:
        candidates = find_candidates(content.root)
    except MalformedError as error:
        remedy = "save the state dict alone: torch.save(model.state_dict(), …)"
        raise CheckpointError(f"cannot be read: {error}", remedy=remedy) from error
    if not candidates:
        raise _no_tensors(content)
    try:
        return _take_first_complete(content, candidates, arch)
    except CheckpointError as error:
        if not content.suspicious:
            raise
        # Whoever is told only that a tensor is missing may go on to open the file with a program that runs its code.
        raise CheckpointError(
            f"{error.message}; {_security_notes(content)[0]}",
            remedy="do not open it elsewhere: it may be made to run code on your machine; where you trust its source, "
            f"{error.remedy}",
        ) from error


def _take_first_complete(content: Content, candidates: list[Candidate], arch: VariantSpec | None) -> Resolved:
    embedded = _read_embedded(content)
    attempts: list[tuple[Candidate, Translation]] = []
    first: CheckpointError | None = None
    for candidate in candidates:
        try:
            attempts += [(candidate, found) for found in translate(candidate.tensors, numpy=content.numpy)]
        except CheckpointError as error:
            first = first or error
    if not attempts and first is not None:
        raise first
    notes = _security_notes(content)
    for index, (candidate, translation) in enumerate(attempts):
        try:
            return _identify(candidate, translation, arch, embedded=embedded, notes=notes)
        except CheckpointError as error:
            if not (candidate.averaged or translation.averaged) or index + 1 == len(attempts):
                raise
            notes = (*notes, f"the averaged weights in {candidate.where or 'the file'} were not used: {error.message}")
    raise AssertionError("every attempt returns or raises")


def _identify(
    candidate: Candidate,
    translation: Translation,
    arch: VariantSpec | None,
    *,
    embedded: _Embedded,
    notes: tuple[str, ...],
) -> Resolved:
    """One state dict under official names → its architecture; complete, or a CheckpointError."""
    tensors = {official: candidate.tensors[name] for official, name in translation.names.items()}
    if translation.family == "paddleclas":
        _turn_classifier(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = infer_structure(shapes, split=translation.split)
    stated = arch is not None or embedded.variant is not None
    more = [f"the state dict was found under {candidate.where!r}"] if candidate.where else []
    if candidate.module:
        more.append("the file holds a pickled module; its tensors were read, its class was not needed")
    if candidate.averaged or translation.averaged:
        more.append("these are the averaged weights (EMA); the others in the file were not used")
    more += translation.notes
    more += [note for note in found.notes if not (stated and note == STRIDES_ASSUMED)]
    if found.form == "deploy" and any(AUXILIARY.match(name) for name in shapes):
        shapes = {name: shape for name, shape in shapes.items() if not AUXILIARY.match(name)}
        more.append("the auxiliary heads were dropped: the deploy form has none")
    spec = _choose_spec(shapes, found, arch, own=embedded.variant)
    expected = expected_shapes(spec, found.form)
    check_complete(shapes, expected, translation.extra)
    if embedded.labels is not None and len(embedded.labels) != spec.num_classes:
        message = f"names {len(embedded.labels)} classes, its classifier has {spec.num_classes}"
        raise CheckpointError(message, remedy=_RESAVE)
    return Resolved(
        family=translation.family,
        form=found.form,
        spec=spec,
        tensors={name: tensors.get(name) for name in expected},
        wrapper=candidate.where,
        labels=embedded.labels,
        preprocessing=embedded.preprocessing,
        notes=(*notes, *more),
    )


def _turn_classifier(tensors: dict[str, LazyTensor]) -> None:
    """Turns PaddlePaddle's `linear.weight` (features, classes) around, unless that way alone fits the last layer.

    A square one is turned too, because the family says so.
    """
    ends = ("rbr_dense.conv.weight", "rbr_reparam.weight")
    last = next(
        (tensor for name, tensor in tensors.items() if name.startswith("stage4.") and name.endswith(ends)), None
    )
    width = last.shape[:1] if last is not None else ()
    stored = tensors.get("linear.weight")
    if stored is None or len(stored.shape) != 2 or (stored.shape[:1] != width and stored.shape[1:] == width):
        return
    load = stored.load
    tensors["linear.weight"] = replace(stored, shape=stored.shape[::-1], load=lambda: load().t())


def _choose_spec(shapes: Shapes, found: Structure, arch: VariantSpec | None, *, own: VariantSpec | None) -> VariantSpec:
    """What the caller asks for or the file states, where the tensors fit it; else what the tensors say."""
    spec = found.spec if arch is None else match_architecture(shapes, found, arch)
    if own is None:
        return spec
    try:
        stated = match_architecture(shapes, found, own)
    except CheckpointError as error:
        message = f"states an architecture that its tensors contradict: it {error.message}"
        raise CheckpointError(message, remedy=_RESAVE) from error
    if own.num_classes != found.spec.num_classes or (found.form == "training" and own.block != found.spec.block):
        raise CheckpointError(
            f"states {own.num_classes} classes and blocks of kind {own.block}, found {found.spec.num_classes} "
            f"and {found.spec.block}",
            remedy=_RESAVE,
        )
    if arch is not None and architecture_of(arch) != architecture_of(stated):
        message = f"states the strides {list(stated.strides)}, --arch {arch.name} has {list(arch.strides)}"
        raise CheckpointError(message, remedy="leave --arch out")
    return stated


def _security_notes(content: Content) -> tuple[str, ...]:
    if not content.suspicious:
        return ()
    named = listing(sorted(content.suspicious))
    return (f"WARNING: ordinary unpickling of this file would reach for {named}; nothing was called here",)


def _no_tensors(content: Content) -> CheckpointError:
    if content.suspicious:
        return CheckpointError(
            f"is a pickle without tensors that would reach for {listing(sorted(content.suspicious))} when it is "
            f"unpickled; nothing was called",
            remedy="delete it: it is made to run code on your machine, or it is no checkpoint",
        )
    root = content.root
    what = f"an object of {printable(root.name)}" if isinstance(root, ForeignObject) else f"a {type(root).__name__}"
    what += f" with {listing(root)}" if isinstance(root, dict) and root else ""
    remedy = "save the state dict: torch.save(model.state_dict(), 'model.pth')"
    return CheckpointError(f"holds no tensors: it is {what}", remedy=remedy)


class _Budget:
    """Bounds the work on objects that share or contain each other."""

    def __init__(self) -> None:
        self._left = _MAX_VISITS
        self.seen: set[int] = set()

    def spend(self, visits: int) -> None:
        self._left -= visits
        if self._left < 0:
            raise MalformedError("the objects in the file are nested or shared beyond reason")


def find_candidates(root: object) -> list[Candidate]:
    """State dicts in the order to try them: averaged weights, known wrappers, the file itself, anything else.

    Raises:
        MalformedError: The objects are nested or shared beyond reason.
    """
    found: list[Candidate] = []
    _search(root, (), found, budget=_Budget())
    found.sort(key=lambda candidate: not candidate.averaged)
    return found


def _search(node: object, path: tuple[str, ...], found: list[Candidate], *, budget: _Budget) -> None:
    if id(node) in budget.seen or len(path) > _MAX_DEPTH:
        return
    budget.seen.add(id(node))
    averaged = any(key in _EMA_KEYS for key in path)
    if isinstance(node, ForeignObject) and _module_parts(node) is not None:
        tensors = _walk_module(node, budget)
        if tensors:
            found.append(Candidate(".".join(path), tensors, averaged, module=True))
        return
    children = _children(node, budget)
    for key in (*_EMA_KEYS, *_PLAIN_KEYS):
        if key in children:
            _search(children[key], (*path, key), found, budget=budget)
    tensors = {name: tensor for name, value in children.items() if (tensor := _tensor_of(value)) is not None}
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


def _tensor_of(value: object) -> LazyTensor | None:
    """The tensor that a value of a state dict is, if it is one; PaddlePaddle writes (name, array) pairs too."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if isinstance(value, ArrayObject):
        return value.tensor
    return value if isinstance(value, LazyTensor) else None


def _attributes(node: ForeignObject) -> dict[object, object]:
    """What a pickled object has in its `__dict__`: the place to read a further fact of a module from."""
    state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
    return state if isinstance(state, dict) else {}


def _module_parts(node: ForeignObject) -> tuple[dict[object, object], ...] | None:
    """(parameters, buffers, modules) of a pickled `torch.nn.Module`, or None."""
    attributes = _attributes(node)
    parts = [attributes.get(name) for name in ("_parameters", "_buffers", "_modules")]
    dicts = tuple(part for part in parts if isinstance(part, dict))
    return dicts if len(dicts) == len(parts) else None


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
            tensor = _tensor_of(value)
            if tensor is None or not isinstance(name, str) or name in skipped:
                continue
            if len(prefix) + len(name) <= _MAX_NAME:
                tensors[prefix + name] = tensor
        for name, child in reversed(modules.items()):
            # A cycle ends where the prefix becomes too long.
            if isinstance(child, ForeignObject) and isinstance(name, str) and len(prefix) + len(name) < _MAX_NAME:
                stack.append((f"{prefix}{name}.", child))
    return tensors


def _read_embedded(content: Content) -> _Embedded:
    value: object = content.root.get(METADATA_KEY) if isinstance(content.root, dict) else None
    if METADATA_KEY in content.metadata:
        try:
            value = json.loads(content.metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"its metadata {METADATA_KEY!r} is not JSON", remedy=_RESAVE) from error
    if value is None:
        return _Embedded()
    try:
        return codec.decode(_Embedded, _plain(value, [_MAX_PLAIN_ITEMS], 0))
    except InputError as error:
        raise CheckpointError(f"its value {METADATA_KEY!r} is wrong: {error.message}", remedy=_RESAVE) from error


def _plain(value: object, left: list[int], depth: int) -> object:
    """A copy as JSON would hold it: no cycle, no sharing beyond reason, nothing but plain values."""
    left[0] -= 1
    if left[0] < 0 or depth > _MAX_PLAIN_DEPTH:
        raise InputError("it is nested or shared beyond reason", remedy=_RESAVE)
    if isinstance(value, dict):
        return {printable(key): _plain(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, left, depth + 1) for item in value]
    if isinstance(value, str):
        return value[:_MAX_PLAIN_TEXT]
    if isinstance(value, (bool, float, type(None))) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return printable(value)
