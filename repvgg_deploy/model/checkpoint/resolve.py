"""The content of a file → one model in it: which state dict, family, form and architecture, and what the file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError, InputError
from ...specs import codec
from ...specs.values import Form, Preprocessing, VariantSpec
from ...specs.variants import architecture_of
from .containers import Content
from .lazy import LazyTensor, MalformedError, listing, printable
from .names import METADATA_KEY, Candidate, Translation, find_candidates, translate
from .pickle import ForeignObject
from .structure import (
    AUXILIARY,
    STRIDES_ASSUMED,
    Shape,
    Structure,
    check_complete,
    expected_shapes,
    infer_structure,
    match_architecture,
)

_MAX_PLAIN_DEPTH = 8
_MAX_PLAIN_ITEMS = 200_000
_MAX_PLAIN_TEXT = 10_000
_RESAVE = "save it again with the script that wrote it"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One model of a file, complete, its weights not read yet.

    Attributes:
        family: Which implementation's names it has.
        form: Training or deploy.
        spec: The architecture.
        tensors: By official name.
        expected: Shape by name of every tensor of the model.
        transposed: `linear.weight` is stored as (features, classes).
        wrapper: Path of keys to the state dict.
        labels: Names of the classes, where the file has them.
        preprocessing: How images were prepared, where the file has it.
        notes: What was found, chosen or assumed.
    """

    family: str
    form: Form
    spec: VariantSpec
    tensors: Mapping[str, LazyTensor]
    expected: Mapping[str, Shape]
    transposed: bool
    wrapper: str
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Embedded:
    """What our own training script writes beside the state dict."""

    variant: VariantSpec | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def resolve(content: Content, arch: VariantSpec | None) -> Resolved:
    """Chooses and identifies the model: averaged weights if they are complete, else the state dict.

    Args:
        content: Of the file.
        arch: What it should be of, or None.

    Raises:
        CheckpointError: No RepVGG is in the file, or it is incomplete or of another architecture.
    """
    try:
        candidates = find_candidates(content.root)
    except MalformedError as error:
        raise CheckpointError(
            f"cannot be read: {error}", remedy="save the state dict alone: torch.save(model.state_dict(), …)"
        ) from error
    if not candidates:
        raise _no_tensors(content)
    try:
        return _resolve(content, candidates, arch)
    except CheckpointError as error:
        if not content.suspicious:
            raise
        # Whoever is told only that a tensor is missing may go on to open the file with a program that runs what is in
        # it.
        remedy = (
            f"do not open it elsewhere: it may be made to run code on your machine; where you trust its source, "
            f"{error.remedy}"
        )
        raise CheckpointError(f"{error.message}; {_security_notes(content)[0]}", remedy=remedy) from error


def _resolve(content: Content, candidates: list[Candidate], arch: VariantSpec | None) -> Resolved:
    embedded = _read_embedded(content)
    notes = _security_notes(content)
    attempts = _find_attempts(candidates, numpy=content.numpy)
    for index, (candidate, translation) in enumerate(attempts):
        try:
            return _identify(candidate, translation, arch, embedded=embedded, notes=notes)
        except CheckpointError as error:
            if not (candidate.averaged or translation.averaged) or index + 1 == len(attempts):
                raise
            notes = (*notes, f"the averaged weights in {candidate.where or 'the file'} were not used: {error.message}")
    raise AssertionError("every attempt returns or raises")


def _find_attempts(candidates: list[Candidate], *, numpy: bool) -> list[tuple[Candidate, Translation]]:
    """Every state dict whose names are those of a RepVGG, in the order in which to try them."""
    attempts: list[tuple[Candidate, Translation]] = []
    first: CheckpointError | None = None
    for candidate in candidates:
        try:
            attempts += [(candidate, translation) for translation in translate(candidate.tensors, numpy=numpy)]
        except CheckpointError as error:
            first = first or error
    if not attempts and first is not None:
        raise first
    return attempts


def _identify(
    candidate: Candidate,
    translation: Translation,
    arch: VariantSpec | None,
    *,
    embedded: _Embedded,
    notes: tuple[str, ...],
) -> Resolved:
    tensors = {official: candidate.tensors[name] for official, name in translation.names.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    transposed = translation.family == "paddleclas" and _transpose_classifier(shapes)
    found = infer_structure(shapes, split=translation.split)
    stated = arch is not None or embedded.variant is not None
    more = [
        *_source_notes(candidate, translation),
        *(note for note in found.notes if not (stated and note == STRIDES_ASSUMED)),
    ]
    if found.form == "deploy" and any(AUXILIARY.match(name) for name in shapes):
        shapes = {name: shape for name, shape in shapes.items() if not AUXILIARY.match(name)}
        more.append("the auxiliary heads were dropped: the deploy form has none")
    spec = _choose_spec(shapes, found, arch, embedded=embedded)
    expected = expected_shapes(spec, found.form)
    check_complete(shapes, expected, translation.extra)
    if embedded.labels is not None and len(embedded.labels) != spec.num_classes:
        raise CheckpointError(
            f"names {len(embedded.labels)} classes, its classifier has {spec.num_classes}", remedy=_RESAVE
        )
    return Resolved(
        family=translation.family,
        form=found.form,
        spec=spec,
        tensors=tensors,
        expected=expected,
        transposed=transposed,
        wrapper=candidate.where,
        labels=embedded.labels,
        preprocessing=embedded.preprocessing,
        notes=(*notes, *more),
    )


def _transpose_classifier(shapes: dict[str, Shape]) -> bool:
    """Turns the shape of PaddlePaddle's `linear.weight` (features, classes) around; whether it did.

    A square one is turned too, because the family says so. Only where the other way alone fits the last layer, the file
    is not Paddle's.
    """
    shape = shapes.get("linear.weight", ())
    last = [
        name
        for name in shapes
        if name.startswith("stage4.") and name.endswith(("rbr_dense.conv.weight", "rbr_reparam.weight"))
    ]
    width = shapes[last[0]][:1] if last else ()
    if len(shape) != 2 or (shape[:1] != width and shape[1:] == width):
        return False
    shapes["linear.weight"] = shape[::-1]
    return True


def _choose_spec(
    shapes: Mapping[str, Shape], found: Structure, arch: VariantSpec | None, *, embedded: _Embedded
) -> VariantSpec:
    spec = found.spec if arch is None else match_architecture(shapes, found, arch)
    own = embedded.variant
    if own is None:
        return spec
    try:
        stated = match_architecture(shapes, found, own)
    except CheckpointError as error:
        raise CheckpointError(
            f"states an architecture that its tensors contradict: it {error.message}", remedy=_RESAVE
        ) from error
    if own.num_classes != found.spec.num_classes or (found.form == "training" and own.block != found.spec.block):
        raise CheckpointError(
            f"states {own.num_classes} classes and blocks of kind {own.block}, found {found.spec.num_classes} "
            f"and {found.spec.block}",
            remedy=_RESAVE,
        )
    if arch is not None and architecture_of(arch) != architecture_of(stated):
        raise CheckpointError(
            f"states the strides {list(stated.strides)}, --arch {arch.name} has {list(arch.strides)}",
            remedy="leave --arch out",
        )
    return stated


def _source_notes(candidate: Candidate, translation: Translation) -> list[str]:
    notes = [f"the state dict was found under {candidate.where!r}"] if candidate.where else []
    notes += (
        ["the file holds a pickled module; its tensors were read, its class was not needed"] if candidate.module else []
    )
    averaged = candidate.averaged or translation.averaged
    notes += ["these are the averaged weights (EMA); the others in the file were not used"] if averaged else []
    return [*notes, *translation.notes]


def _security_notes(content: Content) -> tuple[str, ...]:
    if not content.suspicious:
        return ()
    return (
        f"WARNING: ordinary unpickling of this file would reach for {listing(sorted(content.suspicious))}; "
        f"nothing was called here",
    )


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
    return CheckpointError(
        f"holds no tensors: it is {what}", remedy="save the state dict: torch.save(model.state_dict(), 'model.pth')"
    )


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
