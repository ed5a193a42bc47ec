"""Every tensor that the model has, and no other: a load is complete or refused."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import CheckpointError, InputError
from ..specs.values import Form, VariantSpec
from .lazy_tensor import listing
from .network import RepVGG
from .structure import INCOMPLETE, Shape, Shapes, Structure


def expected_shapes(spec: VariantSpec, form: Form) -> dict[str, Shape]:
    """Name → shape of every tensor in the state dict of `RepVGG(spec, form)`, in order.

    Raises:
        CheckpointError: No such model can be built.
    """
    try:
        with torch.device("meta"):
            model = RepVGG(spec, form)
    except InputError as error:
        raise CheckpointError(error.message, remedy=error.remedy) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_complete(shapes: Shapes, expected: Shapes, extra: tuple[str, ...] = ()) -> None:
    """Compares name by name and shape by shape. BatchNorm's step counter may be missing: it has no part in inference.

    Raises:
        CheckpointError: Something is missing, extra, or of another shape.
    """
    missing = [name for name in expected if name not in shapes and not name.endswith(".num_batches_tracked")]
    if missing:
        raise CheckpointError(f"is incomplete: {len(missing)} of {len(expected)} tensors are missing, first {missing[0]}", remedy=INCOMPLETE)
    surplus = [*extra, *(name for name in shapes if name not in expected)]
    if surplus:
        raise CheckpointError(
            f"has {len(surplus)} tensors that a RepVGG of this form does not have: {listing(surplus)}",
            remedy="a bigger network: load it with its own code, then reparameterize(model); otherwise remove these tensors and save it again",
        )
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape and not name.endswith(".num_batches_tracked"):
            raise CheckpointError(f"{name} has the shape {list(shapes[name])}, expected {list(shape)}", remedy=INCOMPLETE)


def match_architecture(shapes: Shapes, found: Structure, arch: VariantSpec) -> VariantSpec:
    """The architecture that was asked for, with what only the tensors tell: class count, block kind, auxiliary heads.

    Args:
        shapes: By official name.
        found: What the tensors are of.
        arch: What they should be of; its strides count, because tensors do not tell them.

    Raises:
        CheckpointError: They are of another; the message names the first tensor that differs and the variant that fits.
    """
    spec, form = found.spec, found.form
    block = spec.block if form == "training" else arch.block
    wanted = dataclasses.replace(arch, num_classes=spec.num_classes, block=block, auxiliary_heads=spec.auxiliary_heads)
    if block.startswith("qarepvgg") and wanted.se != "none":
        raise CheckpointError(
            f"is asked for as {arch.name}, a QARepVGG with SE blocks: its last BatchNorm follows the SE block and cannot be folded",
            remedy="train with blocks of kind 'repvgg', or QARepVGG without SE",
        )
    difference = _first_difference(shapes, expected_shapes(wanted, form))
    if difference is None:
        return wanted
    published = spec.name != "custom"
    remedy = f"give --arch {spec.name}, or leave --arch out" if published else "leave --arch out, or give a TOML file that defines this variant"
    fitting = spec.name if published else describe_custom(spec)
    raise CheckpointError(f"is not of the architecture {arch.name}: {difference}; the tensors fit {fitting}", remedy=remedy)


def describe_custom(spec: VariantSpec) -> str:
    """A variant without a published name, in words."""
    groups = "" if max(spec.groups) == 1 else f", groups up to {max(spec.groups)}"
    se = "" if spec.se == "none" else f", SE {spec.se.replace('_', ' ')} 1/{spec.se_reduction}"
    return f"a custom variant (depths {list(spec.depths)}, widths {list(spec.widths)}{groups}{se})"


def _first_difference(shapes: Shapes, expected: Shapes) -> str | None:
    for name, shape in expected.items():
        if name.endswith(".num_batches_tracked"):
            continue
        if name not in shapes:
            return f"{name} is expected with the shape {list(shape)}, found none"
        if shapes[name] != shape:
            return f"{name} is expected with the shape {list(shape)}, found {list(shapes[name])}"
    surplus = next((name for name in shapes if name not in expected), None)
    return None if surplus is None else f"{surplus} is not expected, found with the shape {list(shapes[surplus])}"
