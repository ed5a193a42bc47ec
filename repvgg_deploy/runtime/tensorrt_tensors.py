"""Inputs and outputs of a plan: what the engine says of them, and whether that is what the passport says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..errors import PlanError
from ..specs.values import ModelSpec, TensorSpec

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}
"""By TensorRT's names. `trt.nptype` fails with NumPy 1.24 and newer in TensorRT 8.5."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """One input or output as the engine has it; −1 is a dynamic dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape

    def count_bytes(self, shape: Shape) -> int:
        """Size of the tensor in a shape."""
        size = self.dtype.itemsize
        for dimension in shape:
            size *= dimension
        return size


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out.

    Attributes:
        source: The input.
        outputs: In the order of the specification.
        profile: Index of the optimization profile in use.
        smallest: Input shape, the profile's minimum.
        usual: The shape that the plan is fastest at.
        largest: The profile's maximum.
    """

    source: PlanTensor
    outputs: tuple[PlanTensor, ...]
    profile: int
    smallest: Shape
    usual: Shape
    largest: Shape


def read_interface(trt: Any, engine: Any, path: Path) -> Interface:
    """Asks the engine.

    Raises:
        PlanError: There is not exactly one input, or a tensor is of a kind that NumPy does not know or without a batch.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1 or len(names) < 2:
        raise PlanError(
            f"{path}: expected one input and at least one output, found {len(inputs)} of {names}", remedy="build a plan of one image input"
        )
    source = _read_tensor(engine, inputs[0], path)
    if not source.shape:
        raise PlanError(f"{path}: the input {source.name} has no dimension that counts images", remedy="build a plan whose input has a batch")
    outputs = tuple(_read_tensor(engine, name, path) for name in names if name != inputs[0])
    if min(source.shape) > 0:
        return Interface(source, outputs, 0, source.shape, source.shape, source.shape)
    profiles = [_read_profile(engine, source.name, index) for index in range(engine.num_optimization_profiles)]
    best = max(range(len(profiles)), key=lambda index: profiles[index][2])
    return Interface(source, outputs, best, *profiles[best])


def _read_profile(engine: Any, name: str, index: int) -> tuple[Shape, Shape, Shape]:
    smallest, usual, largest = (tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape(name, index))
    return smallest, usual, largest


def _read_tensor(engine: Any, name: str, path: Path) -> PlanTensor:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise PlanError(
            f"{path}: the tensor {name} is {kind}, and NumPy arrays of that kind are not supported here",
            remedy=f"build the plan with inputs and outputs of {', '.join(_DTYPES.values())}",
        )
    return PlanTensor(name, np.dtype(_DTYPES[kind]), tuple(int(size) for size in engine.get_tensor_shape(name)))


def describe_interface(interface: Interface) -> ModelSpec:
    """The specification of a plan without a passport, as far as the engine knows it."""
    source = interface.source
    return ModelSpec(
        input=_describe(source, _guess_layout(source.shape)),
        outputs=tuple(_describe(output, "NC" if len(output.shape) == 2 else "other") for output in interface.outputs),
        kind="module",
    )


def _describe(tensor: PlanTensor, layout: str) -> TensorSpec:
    shape = tuple(size if size >= 0 else "batch" if axis == 0 else f"{tensor.name}_{axis}" for axis, size in enumerate(tensor.shape))
    return TensorSpec(
        tensor.name,
        cast('Literal["float32", "float16", "uint8", "int64", "int32"]', tensor.dtype.name),
        shape,
        cast('Literal["NCHW", "NHWC"]', layout),
    )


def _guess_layout(shape: Shape) -> str:
    if len(shape) != 4:
        return "other"
    return "NCHW" if shape[1] == 3 or shape[3] != 3 else "NHWC"


def order_interface(interface: Interface, spec: ModelSpec, path: Path) -> Interface:
    """The interface with the outputs in the order of the specification.

    Raises:
        PlanError: The engine has other tensors than the specification says.
    """
    by_name = {tensor.name: tensor for tensor in (interface.source, *interface.outputs)}
    for tensor in (spec.input, *spec.outputs):
        found = by_name.get(tensor.name)
        if found is None or not _agree(tensor, found):
            raise PlanError(
                f"{path}: the passport and the plan disagree: expected {tensor.name} {tensor.dtype} {tensor.shape}, "
                f"found {f'{found.dtype} {found.shape}' if found else f'only {sorted(by_name)}'}",
                remedy="build the plan again with repvgg-trt build",
            )
    outputs = tuple(by_name[output.name] for output in spec.outputs)
    return Interface(interface.source, outputs, interface.profile, interface.smallest, interface.usual, interface.largest)


def _agree(expected: TensorSpec, found: PlanTensor) -> bool:
    """Same dtype (TensorRT 8.5 gives int32 for the int64 of class numbers) and rank, and no dimension of two sizes."""
    same_dtype = expected.dtype == found.dtype.name or (expected.dtype, found.dtype.name) == ("int64", "int32")
    sizes = (not isinstance(want, int) or have < 0 or want == have for want, have in zip(expected.shape, found.shape, strict=False))
    return same_dtype and len(expected.shape) == len(found.shape) and all(sizes)
