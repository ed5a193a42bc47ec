"""One state dict under official names → its architecture, and who said what tensors do not tell.

Strides, activation, pooling and epsilon come from a pickled module (`facts`), the file's own metadata, the published
variant or the user; what nobody said is `untold`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...errors import CheckpointError, InputError
from ...specs import codec
from ...specs.values import METADATA_KEY, Form, Preprocessing, VariantSpec
from ...specs.variants import architecture_of, name_variant
from .branches import complete_branches, constant
from .candidates import Candidate
from .containers import Content
from .facts import Facts, read_facts
from .lazy import LazyTensor, listing, printable
from .names import Translation
from .structure import (
    AUXILIARY,
    Shapes,
    Structure,
    check_complete,
    expected_shapes,
    infer_structure,
    match_architecture,
)

_MAX_PLAIN_DEPTH = 8
_MAX_PLAIN_ITEMS = 200_000
_MAX_PLAIN_TEXT = 10_000
_MAX_PIXELS = 1 << 22  # 2048 × 2048: an export runs such images
_MAX_JSON = 4 << 20
_SE_KEPT = (
    "the SE blocks are kept: the model was trained with them; mmpretrain's own deploy form leaves them out and "
    "computes something else"
)
_RESAVE = "save it again with the script that wrote it"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller says of a checkpoint: `arch`, `strides`, `weights` as `load.load_checkpoint` takes them."""

    arch: VariantSpec | None = None
    strides: tuple[int, int, int, int, int] | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """One model of a file, complete, its weights not read yet.

    Attributes:
        tensors: By official name, in the model's order; None for a step counter that the file lacks.
        wrapper: Path of keys to the state dict; empty where the file is one.
        key: What `weights` takes to choose it.
        facts: What tensors do not tell, and who said it, in sentences.
        untold: What nobody said.
        bn_eps: Official name of a BatchNorm → its epsilon, where it is not that of `spec`.
        headless: It has no classifier; the tensors hold None in its place.
        others: What `weights` takes to choose what else is complete in the file.
    """

    family: str
    form: Form
    spec: VariantSpec
    tensors: Mapping[str, LazyTensor | None]
    wrapper: str
    key: str
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]
    facts: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    bn_eps: Mapping[str, float] = field(default_factory=dict)
    headless: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedded:
    """What our own training script writes beside the state dict."""

    variant: VariantSpec | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def identify(candidate: Candidate, translation: Translation, asked: Asked, *, embedded: Embedded, key: str) -> Resolved:
    """One state dict under official names → its architecture, complete.

    Args:
        candidate: Where it stands.
        translation: Which of its tensors is which part.
        asked: What the caller says of it.
        embedded: What the file says of itself.
        key: What `Asked.weights` takes to choose it.

    Raises:
        CheckpointError: It is incomplete, of another architecture, or a pickled module of another network.
    """
    tensors = {official: candidate.tensors[name] for official, name in translation.names.items()}
    _refuse_unusable(tensors, translation)
    if translation.family == "paddleclas":
        _turn_classifier(tensors)
    more = _complete_classifier(tensors)
    told = None if candidate.modules is None else read_facts(candidate.modules, translation)
    tensors, added = complete_branches(tensors, None if told is None else told.bare)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = infer_structure(shapes, split=translation.split)
    more += [f"the state dict was found under {candidate.where!r}"] if candidate.where else []
    if candidate.modules is not None:
        more.append(
            "the file holds a pickled module; its tensors and what it says of itself were read, no code was run"
        )
    more += [*candidate.notes, *translation.notes, *found.notes]
    more += [f"{len(added)} neutral BatchNorms complete the branches of QARepVGG that have none"] if added else []
    if found.form == "deploy" and any(AUXILIARY.match(name) for name in shapes):
        shapes = {name: shape for name, shape in shapes.items() if not AUXILIARY.match(name)}
        more.append("the auxiliary heads were dropped: the deploy form has none")
    spec = _choose_spec(shapes, found, asked, own=embedded.variant, told=told)
    expected = expected_shapes(spec, found.form)
    check_complete(shapes, expected, translation.extra, headless=found.headless)
    if embedded.labels is not None and len(embedded.labels) != spec.num_classes:
        message = f"names {len(embedded.labels)} classes, its classifier has {spec.num_classes}"
        raise CheckpointError(message, remedy=_RESAVE)
    # RepOpt-VGG's builder takes strides as an argument, and its published models are those of ImageNet.
    published = name_variant(spec) if translation.family != "repopt" or spec.num_classes == 1000 else None
    facts, untold = _who_said(spec, asked, own=embedded.variant, told=told, published=published)
    untold = _check_bare_identities(spec, told, untold)
    more += [_SE_KEPT] if translation.family == "mmpretrain" and found.form == "deploy" and spec.se != "none" else []
    return Resolved(
        family=translation.family,
        form=found.form,
        spec=spec,
        tensors={name: tensors.get(name) for name in expected},
        wrapper=candidate.where,
        key=key,
        labels=embedded.labels,
        preprocessing=embedded.preprocessing,
        notes=tuple(more),
        facts=facts,
        untold=untold,
        bn_eps={**(told.other_eps if told is not None else {}), **dict.fromkeys(added, 0.0)},
        headless=found.headless,
    )


def _check_bare_identities(spec: VariantSpec, told: Facts | None, untold: tuple[str, ...]) -> tuple[str, ...]:
    """A qarepvgg_v2 adds its input where it can: a pickled module tells whether it does so in every block."""
    if told is None or spec.block != "qarepvgg_v2":
        return untold
    without = [layer.name for layer in spec.layers() if layer.has_identity and layer.name not in told.bare]
    if without and told.bare:
        message = (
            f"is a pickled module of QARepVGG without an identity in {listing(without)}, expected one in each block"
        )
        raise CheckpointError(message, remedy="export it: export_module(model, example_inputs, 'model.onnx')")
    return (*untold, "the identity branches") if without and untold else untold


def _refuse_unusable(tensors: Mapping[str, LazyTensor], translation: Translation) -> None:
    """Refuses a model whose weights are there by name only, saying what they are."""
    wrong = [(name, tensor) for name, tensor in tensors.items() if tensor.unusable]
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if len(empty) > len(tensors) // 2:
        raise CheckpointError(
            f"has placeholders of the shape [0] in place of {len(empty)} tensors, first "
            f"{printable(translation.names[empty[0]])}: DeepSpeed's ZeRO stage 3 keeps the weights in the files of its "
            f"ranks",
            remedy="in the folder of the checkpoint: python zero_to_fp32.py . model.pth",
        )
    if not wrong:
        return
    name, tensor = wrong[0]
    remedies = {
        "a meta": "save the state dict of the model after its weights were loaded",
        "a sparse": "torch.save({k: v.to_dense() if v.is_sparse else v for k, v in state.items()}, 'model.pth')",
        "a quantized": "give the checkpoint before quantization, with floating-point weights",
        "a DTensor": "on every rank: full = {k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k, v in "
        "state.items()}; then on rank 0: torch.save(full, 'model.pth')",
    }
    remedy = next((text for start, text in remedies.items() if tensor.unusable.startswith(start)), None)
    raise CheckpointError(
        f"names all its weights, but {len(wrong)} of {len(tensors)} are not plain numbers, first "
        f"{printable(translation.names[name])}: {tensor.unusable}",
        remedy=remedy or "save a state dict of plain tensors: torch.save(model.state_dict(), 'model.pth')",
    )


def _complete_classifier(tensors: dict[str, LazyTensor]) -> list[str]:
    """A 1×1 convolution behind the global pooling is the same matrix, and no bias the same as zeros; gives notes."""
    stored = tensors.get("linear.weight")
    if stored is not None and len(stored.shape) == 4 and stored.shape[2:] == (1, 1):
        load = stored.load
        tensors["linear.weight"] = replace(stored, shape=stored.shape[:2], load=lambda: load().flatten(1))
    if stored is None or "linear.bias" in tensors:
        return []
    tensors["linear.bias"] = constant(stored.shape[:1], 0.0)
    return ["the classifier has no bias: zeros stand for it"]


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


def _choose_spec(
    shapes: Shapes, found: Structure, asked: Asked, *, own: VariantSpec | None, told: Facts | None
) -> VariantSpec:
    """What the caller asks for, the file states or a pickled module tells, where the tensors fit it."""
    arch, spec = asked.arch, found.spec
    if asked.strides is not None:
        stated = replace(arch or spec, strides=asked.strides)
        arch = stated if asked.arch is not None else replace(stated, name=name_variant(stated) or "custom")
    elif told is not None and arch is None and own is None:
        arch = replace(spec, strides=told.strides)
        arch = replace(arch, name=name_variant(arch) or "custom")
    if arch is not None:
        try:
            spec = match_architecture(shapes, found, arch)
        except CheckpointError as error:
            if asked.arch is not None:
                raise
            remedy = "load it with its own code, then export_module(model, example_inputs, 'model.onnx')"
            if asked.strides is not None:
                remedy = (
                    "give the strides of its code" if told is None else "leave --strides out: the module tells them"
                )
            raise CheckpointError(error.message, remedy=remedy) from error
    if own is not None:
        spec = _check_own(shapes, found, own, arch=arch)
    if told is None:
        return spec
    if spec.strides != told.strides:
        message = f"is a pickled module with the strides {list(told.strides)}, asked for are {list(spec.strides)}"
        raise CheckpointError(message, remedy="leave --arch and --strides out: the module tells them")
    return replace(spec, bn_eps=told.bn_eps or spec.bn_eps)


def _check_own(shapes: Shapes, found: Structure, own: VariantSpec, *, arch: VariantSpec | None) -> VariantSpec:
    """What the file states of itself, where its tensors and the caller agree."""
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
        raise CheckpointError(message, remedy="leave --arch and --strides out")
    return stated


def _who_said(
    spec: VariantSpec, asked: Asked, *, own: VariantSpec | None, told: Facts | None, published: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tensors do not tell, and who said it; and what nobody said."""
    strides = ",".join(map(str, spec.strides))
    by_user = [f"strides {strides}"] if asked.strides is not None else []
    by_user += [f"the architecture {printable(asked.arch.name)!r}"] if asked.arch is not None else []
    usual = "ReLU, global average pooling"
    if told is not None:
        eps = f"BatchNorm epsilon {spec.bn_eps:g}" + (" (others in some layers)" if told.other_eps else "")
        known = [name for name, held in (("ReLU", told.activation), ("average pooling", told.pooling)) if held]
        facts = [f"told by the pickled module: {', '.join([f'strides {strides}', eps, *known])}"]
        untold = list(told.untold)
    else:
        facts, untold = [], ["the strides", "the activation", "the pooling", "the epsilon of BatchNorm"]
    stated = f"stated by the user: {' and '.join(by_user)}" if by_user else ""
    if own is not None:
        facts.append(f"stated in the file: strides {strides}, BatchNorm epsilon {spec.bn_eps:g}; with them, {usual}")
    elif stated:
        rest = f"; with them, as in every RepVGG: {usual}" + ("" if told else f", BatchNorm epsilon {spec.bn_eps:g}")
        facts.append(stated + (rest if untold else ""))
    elif published is not None:
        if untold:
            taken = ", ".join(item.removeprefix("the ") for item in untold)
            facts.append(f"as in the published {published}: {taken}")
    else:
        return tuple(facts), tuple(untold)
    return tuple(facts), ()


def read_embedded(content: Content) -> Embedded:
    """What the file says of itself, as our own training script writes it.

    Raises:
        CheckpointError: It is not what that script writes.
    """
    value: object = content.root.get(METADATA_KEY) if isinstance(content.root, dict) else None
    if METADATA_KEY in content.metadata:
        text = content.metadata[METADATA_KEY]
        try:
            value = json.loads(text) if len(text) <= _MAX_JSON else None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"its metadata {METADATA_KEY!r} is not JSON", remedy=_RESAVE) from error
        if len(text) > _MAX_JSON:
            raise CheckpointError(f"its metadata {METADATA_KEY!r} is larger than 4 MiB", remedy=_RESAVE)
    if value is None:
        return Embedded()
    try:
        found = codec.decode(Embedded, _plain(value, [_MAX_PLAIN_ITEMS], 0))
    except InputError as error:
        raise CheckpointError(f"its value {METADATA_KEY!r} is wrong: {error.message}", remedy=_RESAVE) from error
    how = found.preprocessing
    if how is not None and math.prod(how.crop) > _MAX_PIXELS:
        message = f"states images of {how.crop[0]}×{how.crop[1]} pixels, far more than a RepVGG was ever trained on"
        raise CheckpointError(message, remedy="correct the sizes that stand beside the state dict, and save it again")
    return found


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
        if len(value) > _MAX_PLAIN_TEXT:
            raise InputError(f"it holds a text of {len(value):,} letters", remedy=_RESAVE)
        return value
    if isinstance(value, (bool, float, type(None))) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return printable(value)
