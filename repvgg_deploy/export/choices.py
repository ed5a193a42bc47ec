"""Outputs that hang on a choice (TopK, ArgMax, NonMaxSuppression): what is compared there, and how to cut them off.

A choice jumps where two values are as good as equal: two right networks may name different boxes, or the same ones in
another order. So the tensors that are read by choices, and by all that comes after them, are compared as numbers; the
outputs behind are compared as sets of items. An item without a partner is a fault, unless the choice was a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..errors import InputError, ParityError
from ..graph.edit import GraphView, attributes, infer_values, read_in_subgraphs
from ..model.tolerance import allow_float32, compare, largest, relative_error
from ..specs.values import Check
from .verify import Arrays

RAW = "raw"
"""In place of names of outputs: what choices, and all that comes after them, read."""
_ONE_OF_ALL = ("ArgMax", "ArgMin")
_KINDS = ("TopK", *_ONE_OF_ALL, "NonMaxSuppression", "NonZero")
_ROUNDING = float(np.finfo(np.float32).eps)
_JUMP = 0.01
"""An item that moves by more than this share, where weights move by one rounding, is another item."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A node that chooses.

    Attributes:
        data: The tensor whose values decide.
        result: Its first output.
        axis: Along which it chooses.
        sign: 1 where the largest win, −1 where the smallest do.
    """

    kind: str
    data: str
    result: str
    axis: int
    sign: int

    def tied(self, arrays: Arrays, allowed: float) -> float:
        """The share of choices where the last that was taken and the first that was not are as good as equal."""
        if self.kind not in ("TopK", *_ONE_OF_ALL) or self.data not in arrays:
            return 0.0  # nothing says what it would have taken
        values = np.moveaxis(self.sign * arrays[self.data].astype(np.float64), self.axis, -1)
        count = 1 if self.kind in _ONE_OF_ALL else arrays[self.result].shape[self.axis]
        if not 0 < count < values.shape[-1]:
            return 0.0
        ordered = -np.sort(-values, axis=-1)
        gaps = ordered[..., count - 1] - ordered[..., count]
        return float(np.mean(gaps <= 2 * allowed * largest(values)))


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of a graph.

    Attributes:
        before: Float tensors that choices, and what comes after them, read, and that hang on no choice themselves.
        raw: Those of them that do not follow from the others.
        outputs: By an output that hangs on choices, these.
    """

    before: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    outputs: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    @property
    def inner(self) -> tuple[str, ...]:
        """Tensors of the reference that must be known to judge: `before`, and what each choice was made of."""
        ranked = [one for found in self.outputs.values() for one in found if one.kind in ("TopK", *_ONE_OF_ALL)]
        made = [name for one in ranked for name in (one.data, one.result)]
        return tuple(dict.fromkeys([*self.before, *made]))

    def counts(self, output: str) -> bool:
        """Whether the values decide how many items an output has."""
        return any(one.kind in ("NonMaxSuppression", "NonZero") for one in self.outputs.get(output, ()))

    def describe(self) -> str:
        """What is compared how, for a certificate; empty without choices."""
        if not self.outputs:
            return ""
        kinds = dict.fromkeys(one.kind for found in self.outputs.values() for one in found)
        return (
            f"; {', '.join(self.outputs)} behind {', '.join(kinds)}: compared as sets, and the tensors before them "
            "as numbers"
        )


def find_choices(model: onnx.ModelProto) -> Choices:
    """Looks for choices in a graph with topologically ordered nodes, as ONNX demands."""
    graph = model.graph
    varying = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    images, behind = frozenset(varying), dict[str, frozenset[int]]()
    nodes: list[Choice] = []
    read: list[str] = []
    for node in graph.node:
        needs = [*node.input, *read_in_subgraphs(node)]
        hangs = frozenset().union(*(behind.get(name, frozenset()) for name in needs))
        if node.op_type in _KINDS and node.domain in ("", "ai.onnx"):
            nodes.append(_read_choice(node))
            hangs |= {len(nodes) - 1}
        if hangs:
            read += [name for name in needs if name in varying - images and name not in behind]
        if varying.intersection(needs):
            varying |= set(node.output)
        behind |= {name: hangs for name in node.output if hangs}
    if not nodes:
        return Choices()
    known = infer_values(model)
    floats = {name for name, value in known.items() if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    before = tuple(dict.fromkeys(name for name in read if name in floats))
    outputs = {
        value.name: tuple(nodes[i] for i in sorted(behind[value.name]))
        for value in graph.output
        if value.name in behind
    }
    return Choices(before, tuple(_independent(model, before)), outputs) if outputs else Choices()


def _read_choice(node: onnx.NodeProto) -> Choice:
    named = attributes(node)
    data = node.input[1] if node.op_type == "NonMaxSuppression" else node.input[0]
    smallest = node.op_type == "ArgMin" or not named.get("largest", 1)
    axis = int(named.get("axis", -1 if node.op_type == "TopK" else 0))
    return Choice(node.op_type, data, next(filter(None, node.output)), axis, -1 if smallest else 1)


def _independent(model: onnx.ModelProto, names: Sequence[str]) -> Iterator[str]:
    """Those of some tensors that do not follow from the others."""
    view = GraphView(model)
    images = {value.name for value in model.graph.input}
    for name in names:
        stack, seen = [name], {*names}
        while stack:
            node = view.made_by.get(stack.pop())
            needs = [] if node is None else [*node.input, *read_in_subgraphs(node)]
            stack += (new := [need for need in needs if need not in seen])
            seen.update(new)
        if seen & images:
            yield name


def choose_outputs(model: onnx.ModelProto, wanted: Sequence[str], choices: Choices) -> tuple[str, ...]:
    """The tensors that are to be the outputs: names, or `raw` for what comes before all choices.

    Raises:
        InputError: No tensor has such a name, or there is no choice.
    """
    if list(wanted) == [RAW]:
        if not choices.raw:
            raise InputError(
                f"no output hangs on {', '.join(_KINDS)}, so that there is nothing to cut off",
                remedy=f"leave {RAW} out, or name tensors of the graph",
            )
        return choices.raw
    made = {name for node in model.graph.node for name in node.output} & set(infer_values(model))
    unknown = [name for name in wanted if name not in made]
    if unknown or len(set(wanted)) != len(wanted):
        known = ", ".join(value.name for value in model.graph.output)
        raise InputError(
            f"outputs {', '.join(wanted)}: {f'{unknown[0]} is no tensor' if unknown else 'a name stands twice'}",
            remedy=f"give outputs ({known}), names of tensors as Netron shows them, or {RAW}",
        )
    return tuple(wanted)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph with these tensors as its outputs, in this order; what leads to none of them goes."""
    if [value.name for value in model.graph.output] == list(names):
        return model
    known = infer_values(model) | {value.name: value for value in model.graph.output}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(known[name] for name in names)
    view = GraphView(copy)
    return view.rebuild(view.nodes, [])


@dataclass(frozen=True, slots=True)
class Trial:
    """One batch, and what was made of it.

    Attributes:
        name: Of the batch.
        images: How many there are in it.
        found: Outputs of the folded graph, and `Choices.before`.
        wanted: Outputs of the reference.
        given: Outputs, and `Choices.inner`, of the graph before it was folded.
        nudged: The same with each weight moved by one rounding, which is the noise of that graph.
    """

    name: str
    images: int
    found: Arrays
    wanted: Arrays
    given: Arrays
    nudged: Arrays


def judge_outputs(
    choices: Choices, trials: Sequence[Trial], *, kept: Sequence[str], error: float = 0.0
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Compares what a folded graph gives with its references: as numbers, and behind choices as sets.

    Args:
        choices: Of the graph.
        trials: Batches that were run.
        kept: Outputs that the file has; of others that hang on choices it only counts that they can be equal.
        error: Relative float32 error of the model that gave the references, where it is not the graph itself.

    Returns:
        The checks, and sentences about what was left out.

    Raises:
        ParityError: An output hangs on ties in every batch, so that nothing is known of it.
    """
    stable = [[*choices.before, *(name for name in trial.wanted if name not in choices.outputs)] for trial in trials]
    noise = [
        relative_error(trial.nudged[name], trial.given[name])
        for trial, names in zip(trials, stable, strict=True)
        for name in names
        if name in trial.nudged and trial.given[name].dtype.kind == "f"
    ]
    allowed = allow_float32(max([error, *noise]))
    checks, notes = [], []
    judged: set[str] = set()
    for trial, names in zip(trials, stable, strict=True):
        for name in names:
            array = (trial.given if name in choices.before else trial.wanted)[name]
            label, result = f"ONNX, {name}, {trial.name}", trial.found[name]
            checks.append(compare(label, result.astype(np.float64), array.astype(np.float64), allowed))
        for group in _groups(trial, choices):
            check = _judge_group(trial, group, choices, allowed)
            if check is None or not (check.passed or set(group) & set(kept)):
                notes.append(
                    f"{' + '.join(group)}, {trial.name}: not compared: values that choose are as good as equal"
                )
            else:
                checks.append(check)
                judged.update(group)
    lost = [name for name in choices.outputs if name in kept and name not in judged]
    if lost and all(check.passed for check in checks):
        raise ParityError(
            f"{', '.join(lost)}: behind choices between values as good as equal in every image, so that it cannot be "
            "compared",
            remedy=f"cut it off with output {RAW} (--output {RAW}), or give a trained model",
        )
    return tuple(checks), tuple(notes)


def _judge_group(trial: Trial, names: Sequence[str], choices: Choices, allowed: float) -> Check | None:
    """The check of outputs whose items belong together; None where they differ because a choice is a tie."""
    made = dict.fromkeys(one for name in names for one in choices.outputs[name])
    ties = max(one.tied(trial.given, allowed) for one in made)
    label = f"ONNX, {' + '.join(names)}, {trial.name}"
    found, wanted = [trial.found[name] for name in names], [trial.wanted[name] for name in names]
    if all(one.kind in _ONE_OF_ALL for one in made):
        # Where a choice is a tie its position may differ, and one beside it where the result was enlarged.
        share, limit = _differing(found, wanted, allowed), max(2 * ties, _ROUNDING)
        return Check(f"{label}, share of positions that differ", share, limit, 1.0)
    same = [[arrays[name] for name in names] for arrays in (trial.nudged, trial.given)]
    own = _distance(same[0], same[1], trial.images, 0.0)
    limit = max(allowed, allow_float32(own)) if own <= _JUMP else allowed
    away = _distance(found, wanted, trial.images, limit)
    if away > limit and (ties or own > _JUMP):
        return None
    return Check(f"{label}, as a set", min(away, float(np.finfo(np.float64).max)), limit, 1.0)


def _groups(trial: Trial, choices: Choices) -> list[list[str]]:
    """Outputs whose items belong together: as many of each image, behind choices of the same kind."""
    groups: dict[object, list[str]] = {}
    for name, array in trial.wanted.items():
        if name in choices.outputs:
            single = all(one.kind in _ONE_OF_ALL for one in choices.outputs[name])
            items = array.shape[: 2 if array.ndim > 1 and len(array) == trial.images else 1]
            groups.setdefault(name if single else items, []).append(name)
    return list(groups.values())


def _differing(found: Sequence[NDArray[np.generic]], wanted: Sequence[NDArray[np.generic]], allowed: float) -> float:
    """The largest share of positions that differ."""
    shares = [1.0]
    if all(one.shape == other.shape for one, other in zip(found, wanted, strict=True)):
        pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(found, wanted, strict=True)]
        shares = [float(np.mean(~(np.abs(a - b) <= allowed * largest(b)))) for a, b in pairs]
    return max(shares)


def _distance(
    found: Sequence[NDArray[np.generic]], wanted: Sequence[NDArray[np.generic]], images: int, allowed: float
) -> float:
    """How far the items of two sets are apart, in units of each array's largest value; integers must be equal.

    Items are rows of all arrays together: of an image, or of all where the first axis does not count images. Each is
    paired with the nearest that is left.
    """
    if any(one.shape != other.shape for one, other in zip(found, wanted, strict=True)):
        return math.inf
    per_image = wanted[0].ndim > 1 and len(wanted[0]) == images
    parts = []
    for one, other in zip(found, wanted, strict=True):
        scale = max(largest(other.astype(np.float64)), 1e-30) if other.dtype.kind == "f" else 1.0
        shape = (*other.shape[:2], -1) if per_image else (1, len(other), -1)
        parts.append([array.astype(np.float64).reshape(shape) / scale for array in (one, other)])
    mine, theirs = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    return max((_pair(a, b, allowed) for a, b in zip(mine, theirs, strict=True)), default=0.0)


def _pair(mine: NDArray[np.float64], theirs: NDArray[np.float64], allowed: float) -> float:
    """The largest distance of rows (K, D) that are paired."""
    if not mine.size:
        return 0.0
    in_place = np.max(np.abs(mine - theirs), axis=1)
    stays = in_place <= allowed
    worst = float(np.max(in_place[stays], initial=0.0))
    left = list(mine[~stays])
    for row in theirs[~stays]:
        distances = [float(np.max(np.abs(other - row))) for other in left]
        nearest = int(np.argmin(distances))
        worst = max(worst, distances[nearest]) if math.isfinite(distances[nearest]) else math.inf
        left.pop(nearest)
    return worst
