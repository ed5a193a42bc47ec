"""Any module, such as a detector with re-parameterizable blocks → folded, verified ONNX: the stages in order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError, ParityError
from ..files.output import atomic_output
from ..files.versions import tool_versions
from ..graph.fold import Fold, FoldReport, fold_branches
from ..model.tolerance import relative_error, require_passed
from ..specs.values import (
    METADATA_SCHEMA,
    Certificate,
    HistoryEntry,
    ModelMetadata,
    ModelSpec,
    Preprocessing,
    TensorSpec,
)
from .contract import check_module_contract
from .export import TRAINING_REFERENCE, ExportResult
from .fold import FOLD_REMEDY, check_folds, count_folds, describe_folding
from .graph import simplify, stamp, trace
from .options import require_opset
from .verify import compare_outputs, run_onnx
from .writer import append_metadata, write_model

_GIVEN_REFERENCE = "the module as it was given, in eval mode"
_VARIATIONS = 2  # inputs besides the example: same shape, other values


@dataclass(frozen=True, slots=True)
class ModuleOptions:
    """How a module is exported.

    Attributes:
        opset: 17 to 20.
        reference: The training-mode model, where `model` is a conversion of it and the two are to be compared.
        output_names: In the order of the outputs; None takes a dict's keys, or `output` (`output_0`, … for several).
        dynamic_batch: Accept any batch size.
        dynamic_size: Accept any height and width.
        preprocessing: How an image becomes the input, for `Engine.infer_images`.
        force: Replace a different file.
    """

    opset: int = 17
    reference: nn.Module | None = None
    output_names: tuple[str, ...] | None = None
    dynamic_batch: bool = True
    dynamic_size: bool = False
    preprocessing: Preprocessing | None = None
    force: bool = False

    def __post_init__(self) -> None:
        require_opset(self.opset)


@torch.no_grad()
def export_module(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    out: Path | str,
    *,
    options: ModuleOptions | None = None,
) -> ExportResult:
    """Exports, folds by algebra, simplifies and verifies a module, and writes one ONNX file.

    What becomes one convolution is decided by the graph, not by the names of classes: see `graph.fold_branches`.

    Args:
        model: In training form (or its own conversion, see `ModuleOptions.reference`); used in `eval()` and not
            changed.
        example_inputs: One float32 tensor (N, C, H, W) (or a tuple of one), as the module is called.
        out: The `.onnx`.
        options: How it is exported.

    Returns:
        The file, its metadata and what was folded; `Engine(out)` runs it.

    Raises:
        InputError: The inputs or outputs are of a kind that cannot be exported.
        ExportError: torch, onnxsim or the graph contract refuse the graph.
        ParityError: The ONNX does not give what the module, or its reference, gives.
        ArtifactError: The file cannot be written.
    """
    options = options or ModuleOptions()
    x = _single_input(example_inputs)
    with atomic_output(Path(out), force=options.force) as output:
        given = copy.deepcopy(model).eval()
        spec = _module_spec(given, x, options)
        tensors = (spec.input, *spec.outputs)
        graph, report = _fold(trace(_Flat(given), x, opset=options.opset, tensors=tensors, with_weights=True))
        stamp(graph, options.opset, tensors)
        check_module_contract(graph)
        digest = write_model(output.partial, graph)
        inputs = _vary_input(x, options)
        references, training_error = _reference_outputs(options.reference or given, inputs, spec)
        results = run_onnx(output.partial, {name: {spec.input.name: value.numpy()} for name, value in inputs.items()})
        checks = (*check_folds(report), *compare_outputs(results, references, training_error=training_error))
        require_passed(checks, f"{type(model).__name__} against its ONNX", remedy=FOLD_REMEDY)
        against = _GIVEN_REFERENCE if options.reference is None else TRAINING_REFERENCE
        certificate = Certificate(f"{against}: {describe_folding(report)}", checks, tool_versions())
        said = {"opset": options.opset, **count_folds(report)}
        metadata = ModelMetadata(
            schema=METADATA_SCHEMA,
            spec=spec,
            variant=None,
            source=None,
            certificate=certificate,
            statistics={},
            history=(HistoryEntry("export_module", certificate.versions, said),),
        )
        append_metadata(output.partial, digest, metadata)
    return ExportResult(output, metadata, folded=report)


def _fold(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, FoldReport]:
    """Simplifies, so that constants and sizes are known, and folds; until nothing is left to fold."""
    folds: list[Fold] = []
    while True:
        graph, report = fold_branches(simplify(graph, keep_batchnorm=True))
        folds += report.folds
        if not report.folds:
            return graph, FoldReport(tuple(folds), report.left)


class _Flat(nn.Module):
    """Gives a module's outputs as a tuple, whatever it nests them in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_flatten_outputs(self.module(x)).values())


def _flatten_outputs(outputs: object) -> dict[str, Tensor]:
    """Tensors of a module's result by name: a dict's keys, or `output`, or `output_0` and so on."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        named = {str(key): value for key, value in outputs.items()}
    elif isinstance(outputs, (tuple, list)):
        named = {f"output_{index}": value for index, value in enumerate(outputs)}
    else:
        named = {"output": outputs}
    wrong = [f"{name} ({type(value).__name__})" for name, value in named.items() if not isinstance(value, Tensor)]
    if wrong or not named:
        raise InputError(
            f"the module returns no tensors but {', '.join(wrong) or 'nothing'}",
            remedy="wrap it in a module that returns tensors only",
        )
    return named


def _single_input(example_inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4 or inputs[0].dtype != torch.float32:
        raise InputError(
            f"expected one float32 tensor (N, C, H, W), found "
            f"{[getattr(i, 'shape', type(i).__name__) for i in inputs]}",
            remedy="wrap a module with several inputs in one that takes the image only",
        )
    return inputs[0].detach()


def _module_spec(deploy: nn.Module, x: Tensor, options: ModuleOptions) -> ModelSpec:
    """Input and outputs of a module as its ONNX will have them."""
    outputs = _flatten_outputs(deploy(x))
    names = list(options.output_names or outputs)
    if len(set(names)) != len(names) or "input" in names:
        raise InputError(
            f"output names must differ from one another and from 'input', found {names}", remedy="give output_names"
        )
    if len(names) != len(outputs):
        raise InputError(
            f"{len(outputs)} outputs, but {len(names)} output_names",
            remedy=f"name them in the order {', '.join(outputs)}",
        )
    image = TensorSpec("input", "float32", _shape(x, "input", options), "NCHW")
    tensors = tuple(_output_spec(name, tensor, options) for name, tensor in zip(names, outputs.values(), strict=True))
    return ModelSpec(image, tensors, "module", options.preprocessing)


def _shape(tensor: Tensor, name: str, options: ModuleOptions) -> tuple[int | str, ...]:
    shape: list[int | str] = list(tensor.shape)
    if options.dynamic_batch and shape:
        shape[0] = "batch"
    if options.dynamic_size and len(shape) == 4:
        prefix = "" if name == "input" else f"{name}_"
        shape[2:] = [f"{prefix}height", f"{prefix}width"]
    return tuple(shape)


def _output_spec(name: str, tensor: Tensor, options: ModuleOptions) -> TensorSpec:
    dtype, known = str(tensor.dtype).removeprefix("torch."), ("float32", "float16", "int64", "int32", "uint8")
    if dtype not in known:
        raise InputError(
            f"output {name} is {tensor.dtype}", remedy=f"convert it to one of {', '.join(known)} in the module"
        )
    layout = {4: "NCHW", 2: "NC"}.get(tensor.ndim, "other")
    return TensorSpec(name, dtype, _shape(tensor, name, options), layout)  # type: ignore[arg-type]


def _vary_input(x: Tensor, options: ModuleOptions) -> dict[str, Tensor]:
    """The example and random inputs of its mean and spread, by name; where dynamic, also another batch and size."""
    generator = torch.Generator().manual_seed(0)
    others = {
        f"variation {i + 1}": torch.randn(x.shape, generator=generator) * x.std().clamp(min=0.1) + x.mean()
        for i in range(_VARIATIONS)
    }
    if options.dynamic_batch:
        others["another batch"] = torch.cat([x, others["variation 1"][:1]])
    if options.dynamic_size:
        height, width = x.shape[2:]
        others["another size"] = nn.functional.interpolate(x, (height + 32, width + 64), mode="bilinear")
    return {"example": x.contiguous(), **others}


def _reference_outputs(
    reference: nn.Module, inputs: Mapping[str, Tensor], spec: ModelSpec
) -> tuple[dict[str, dict[str, NDArray[np.generic]]], float]:
    """Outputs of the training-mode model by batch and name, and its own float32 error against a float64 copy."""
    names = [tensor.name for tensor in spec.outputs]
    narrow = {name: [t.numpy() for t in _flatten_outputs(reference(x)).values()] for name, x in inputs.items()}
    wide_model = copy.deepcopy(reference).double()
    error = 0.0
    for name, x in inputs.items():
        wide = [t.numpy() for t in _flatten_outputs(wide_model(x.double())).values()]
        pairs = [(n, w) for n, w in zip(narrow[name], wide, strict=True) if n.dtype.kind == "f"]
        error = max([error, *(relative_error(n, w) for n, w in pairs)])
    if not all(np.isfinite(array).all() for arrays in narrow.values() for array in arrays):
        raise ParityError(
            "the training-mode model gives NaN or infinity",
            remedy="give an example input like those that it was trained on",
        )
    first, second = (narrow[name] for name in list(narrow)[:2])
    if all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        raise ParityError(
            "the training-mode model's output does not depend on its input", remedy="give a trained model"
        )
    return {name: dict(zip(names, arrays, strict=True)) for name, arrays in narrow.items()}, error
