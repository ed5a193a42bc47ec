"""Any module, such as a detector with re-parameterizable blocks → folded, verified ONNX: the stages in order."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..errors import CalibrationError, InputError, ParityError
from ..files.output import atomic_output
from ..files.versions import tool_versions
from ..graph.batchnorm import read_statistics, read_trained_on
from ..graph.fold import Fold, FoldReport, fold_branches
from ..images.decode import normalize
from ..images.drawn import draw_images
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
from .calibrate import CalibrationResult, write_module_calibration
from .choices import Choices, Trial, choose_outputs, find_choices, judge_outputs, with_outputs
from .contract import check_module_contract
from .export import TRAINING_REFERENCE, ExportResult
from .fold import FOLD_REMEDY, check_folds, count_folds, describe_folding, nudge
from .graph import plain_torch, simplify, stamp, trace
from .options import require_opset
from .synthesize import ModuleMismatch, SynthesisOptions
from .verify import Arrays, run_onnx
from .writer import append_metadata, write_model

_GIVEN_REFERENCE = "the module as it was given, in eval mode"
_FURTHER = (64, 128)  # pixels; multiples of the largest stride of usual detectors
_DTYPES = ("float32", "float16", "int64", "int32", "uint8")
_VARIATIONS = 2  # inputs besides the example: same shape, other values


@dataclass(frozen=True, slots=True)
class ModuleOptions:
    """How a module is exported.

    Attributes:
        opset: 17 to 20.
        reference: The training-mode model, where `model` is a conversion of it and the two are to be compared.
        output_names: In the order of the outputs; None takes a dict's keys, or `output` (`output_0`, … for several).
        output: Which of them the ONNX is to have, or other tensors of the graph by torch's names; `raw`: what TopK,
            ArgMax and NonMaxSuppression, and all that comes after them, read: post-processing is cut off. None: all.
        dynamic_batch: Accept any batch size.
        dynamic_size: Accept any height and width.
        preprocessing: How an image becomes the input, for `Engine.infer_images`.
        synthetic_calibration: Also make images from what the BatchNorms of the training form saw, to calibrate INT8
            with, and write them beside the ONNX: `NAME.calib.npz`. None: no.
        force: Replace different files.
    """

    opset: int = 17
    reference: nn.Module | None = None
    output_names: tuple[str, ...] | None = None
    output: str | tuple[str, ...] | None = None
    dynamic_batch: bool = True
    dynamic_size: bool = False
    preprocessing: Preprocessing | None = None
    synthetic_calibration: SynthesisOptions | None = None
    force: bool = False

    def __post_init__(self) -> None:
        require_opset(self.opset)
        if self.synthetic_calibration is not None and self.preprocessing is None:
            raise CalibrationError(
                "no images can be synthesised: how an image becomes the module's input is not known",
                remedy="give ModuleOptions.preprocessing too, such as default_preprocessing(224, 224)",
            )


@plain_torch()
@torch.no_grad()
def export_module(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    out: Path | str,
    *,
    options: ModuleOptions | None = None,
) -> ExportResult:
    """Exports, folds by algebra, simplifies and verifies a module, and writes one ONNX file.

    What becomes one convolution is decided by the graph, not by the names of classes: see `graph.fold_branches`. What
    its BatchNorms tell of each layer and of the images stays in the metadata: FP16 and INT8 without images need it.

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
        CalibrationError: Images were to be synthesised, and no BatchNorm says of what.
        ArtifactError: A file cannot be written.
    """
    options, x = options or ModuleOptions(), _single_input(example_inputs)
    with atomic_output(Path(out), force=options.force) as output:
        given = copy.deepcopy(model).eval()
        reference = given if options.reference is None else copy.deepcopy(options.reference).eval()
        _require_calibration(reference, x, options)
        names, inputs = _name_outputs(given, x, options), _vary_input(x, options)
        wanted = _run_module(reference, inputs, names)
        tensors = (_describe_input(x, options), *_describe_outputs(wanted, inputs, options))
        traced = trace(_Flat(given), x, opset=options.opset, tensors=tensors, with_weights=True)
        outputs = _choose(traced, options)
        traced, training = with_outputs(traced, list(dict.fromkeys([*names, *outputs]))), traced
        choices = find_choices(traced)
        judged, report = _fold(with_outputs(traced, list(dict.fromkeys([*names, *outputs, *choices.before]))))
        graph = with_outputs(judged, outputs)
        trials = _run_traced(output.partial, traced, inputs, wanted=wanted, choices=choices)
        arrays = {trial.name: {name: trial.wanted[name] for name in outputs} for trial in trials}
        tensors = (tensors[0], *_describe_outputs(arrays, inputs, options, choices=choices))
        stamp(graph, options.opset, tensors)
        check_module_contract(graph)
        digest = write_model(output.partial, graph)
        trials = _run_folded(output.partial, judged, trials, inputs)
        error = _float64_error(reference, inputs, trials, choices=choices)
        checks, notes = judge_outputs(choices, trials, kept=outputs, error=error)
        checks = (*check_folds(report), *checks)
        require_passed(checks, f"{type(model).__name__} against its ONNX", remedy=FOLD_REMEDY)
        against = _GIVEN_REFERENCE if options.reference is None else TRAINING_REFERENCE
        certificate = Certificate(f"{against}: {describe_folding(report)}{choices.describe()}", checks, tool_versions())
        metadata = _make_metadata(certificate, tensors, (training, graph), report=report, options=options)
        append_metadata(output.partial, digest, replace(metadata, notes=notes))
    calibration = _synthesize(reference, Path(out), options)
    return ExportResult(output, metadata, calibration=calibration, folded=report)


def _make_metadata(
    certificate: Certificate,
    tensors: Sequence[TensorSpec],
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    *,
    report: FoldReport,
    options: ModuleOptions,
) -> ModelMetadata:
    """All but the notes; `tensors` are the input and the outputs, `graphs` those before and after the folding."""
    outputs, seen = tuple(tensors[1:]), read_trained_on(graphs[0])
    spec = ModelSpec(tensors[0], outputs, "module", options.preprocessing, trained_on=seen)
    said = {"opset": options.opset, **count_folds(report)}
    entry = HistoryEntry("export_module", certificate.versions, said)
    return ModelMetadata(METADATA_SCHEMA, spec, None, None, certificate, read_statistics(*graphs), (entry,))


def _synthesize(reference: nn.Module, onnx: Path, options: ModuleOptions) -> CalibrationResult | None:
    """Calibration images, where they are asked for."""
    if options.synthetic_calibration is None or options.preprocessing is None:
        return None
    wanted = (options.preprocessing, options.synthetic_calibration)
    return write_module_calibration(reference, onnx, *wanted, force=options.force)


def _require_calibration(reference: nn.Module, x: Tensor, options: ModuleOptions) -> None:
    """Before the work: whether calibration images can be synthesised, if they are asked for."""
    if options.synthetic_calibration is None:
        return
    if x.shape[1] != 3:
        raise CalibrationError(
            f"no images can be synthesised for an input of {x.shape[1]} channels: RGB has 3",
            remedy="leave synthetic_calibration out, and calibrate with batches of your own",
        )
    ModuleMismatch(reference)


def _choose(traced: onnx.ModelProto, options: ModuleOptions) -> tuple[str, ...]:
    """The outputs that the file is to have."""
    if options.output is None:
        return tuple(value.name for value in traced.graph.output)
    wanted = (options.output,) if isinstance(options.output, str) else options.output
    return choose_outputs(traced, wanted, find_choices(traced))


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


def _name_outputs(model: nn.Module, x: Tensor, options: ModuleOptions) -> list[str]:
    """Names of the outputs as the ONNX will have them."""
    outputs = _flatten_outputs(model(x))
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
    for name, tensor in zip(names, outputs.values(), strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise InputError(
                f"output {name} is {tensor.dtype}", remedy=f"convert it to one of {', '.join(_DTYPES)} in the module"
            )
    return names


def _describe_input(x: Tensor, options: ModuleOptions) -> TensorSpec:
    batch, channels, *sides = x.shape
    sizes: list[int | str] = ["height", "width"] if options.dynamic_size else list(sides)
    return TensorSpec("input", "float32", ("batch" if options.dynamic_batch else batch, channels, *sizes), "NCHW")


def _describe_outputs(
    arrays: Mapping[str, Arrays],
    inputs: Mapping[str, Tensor],
    options: ModuleOptions,
    *,
    choices: Choices | None = None,
) -> tuple[TensorSpec, ...]:
    """Outputs by what they were like in all batches: a size that varies has a name."""
    specs = []
    for name, example in arrays["example"].items():
        found = {batch: outputs[name] for batch, outputs in arrays.items()}
        if len({array.ndim for array in found.values()}) > 1:
            raise InputError(
                f"output {name} has no fixed number of dimensions", remedy="return tensors of one shape, or pad them"
            )
        sides = {2: f"{name}_height", 3: f"{name}_width"} if example.ndim == 4 else {}
        shape: list[int | str] = []
        for axis, size in enumerate(example.shape):
            varies = len({array.shape[axis] for array in found.values()}) > 1
            shape.append(sides.get(axis, f"{name}_{axis}") if varies else size)
        if shape and options.dynamic_batch and all(len(array) == len(inputs[b]) for b, array in found.items()):
            shape[0] = "batch"
        elif shape and choices is not None and choices.counts(name):
            shape[0] = f"{name}_0"
        layout = {4: "NCHW", 2: "NC"}.get(example.ndim, "other")
        specs.append(TensorSpec(name, str(example.dtype), tuple(shape), layout))  # type: ignore[arg-type]
    return tuple(specs)


def _vary_input(x: Tensor, options: ModuleOptions) -> dict[str, Tensor]:
    """The example and further inputs by name; where dynamic, also another batch and another size.

    What the network sees: image-like pixels, normalised, where `preprocessing` says how; else random numbers of the
    example's mean and spread.
    """
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    height, width = x.shape[2:]
    others = {}
    for index in range(_VARIATIONS):
        if options.preprocessing is not None and x.shape[1] == 3:
            images = draw_images((height, width), len(x), random)
            others[f"variation {index + 1}"] = torch.from_numpy(normalize(images, options.preprocessing))
        else:
            drawn = torch.randn(x.shape, generator=generator)
            others[f"variation {index + 1}"] = drawn * x.std().clamp(min=0.1) + x.mean()
    if options.dynamic_batch:
        others["another batch"] = torch.cat([x, others["variation 1"][:1]])
    if options.dynamic_size:
        size = (height + _FURTHER[0], width + _FURTHER[1])
        others["another size"] = nn.functional.interpolate(x, size, mode="bilinear")
    return {"example": x.contiguous(), **others}


def _run_module(model: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Arrays]:
    """Outputs of a torch module by batch and name."""
    results: dict[str, Arrays] = {}
    for batch, x in inputs.items():
        try:
            outputs = _flatten_outputs(model(x))
        except (RuntimeError, IndexError, ValueError) as error:
            if batch == "example":
                raise
            what = {"another batch": "dynamic_batch", "another size": "dynamic_size"}.get(batch, "")
            raise InputError(
                f"the module runs on {tuple(inputs['example'].shape)}, but not on {batch}, {tuple(x.shape)}: "
                f"{str(error).partition(chr(10))[0]}",
                remedy=f"give ModuleOptions({what}=False)" if what else "give it inputs of any values",
            ) from error
        results[batch] = {name: t.numpy() for name, t in zip(names, outputs.values(), strict=True)}
    if not all(np.isfinite(array).all() for arrays in results.values() for array in arrays.values()):
        raise ParityError(
            "the training-mode model gives NaN or infinity",
            remedy="give an example input like those that it was trained on",
        )
    return results


def _run_traced(
    path: Path, traced: onnx.ModelProto, inputs: Mapping[str, Tensor], *, wanted: Mapping[str, Arrays], choices: Choices
) -> list[Trial]:
    """The module's outputs by batch; with choices or cut outputs, also what the graph gives before it is folded."""
    names = [value.name for value in traced.graph.output]
    plain = not choices.outputs and all(name in wanted["example"] for name in names)
    graph = with_outputs(traced, list(dict.fromkeys([*names, *choices.inner])))
    feeds = {} if plain else {batch: {"input": x.numpy()} for batch, x in inputs.items()}
    given, nudged = (
        run_onnx(path, feeds, content=model.SerializeToString()) if feeds else {} for model in (graph, nudge(graph))
    )
    trials = []
    for batch, x in inputs.items():
        own = given.get(batch, {})
        both = {name: wanted[batch][name] if name in wanted[batch] else own[name] for name in names}
        trials.append(Trial(batch, len(x), {}, both, own, nudged.get(batch, {})))
    first, second = ({**trial.given, **trial.wanted} for trial in trials[:2])
    if all(np.array_equal(first[name], second[name]) for name in first):
        raise ParityError(
            "the training-mode model's output does not depend on its input", remedy="give a trained model"
        )
    return trials


def _run_folded(
    path: Path, judged: onnx.ModelProto, trials: Sequence[Trial], inputs: Mapping[str, Tensor]
) -> list[Trial]:
    """The trials with what the file gives, and its graph with further outputs."""
    feeds = {batch: {"input": x.numpy()} for batch, x in inputs.items()}
    found = run_onnx(path, feeds)
    if any(value.name not in found["example"] for value in judged.graph.output):
        further = run_onnx(path, feeds, content=judged.SerializeToString())
        found = {batch: {**further[batch], **arrays} for batch, arrays in found.items()}
    return [replace(trial, found=found[trial.name]) for trial in trials]


def _float64_error(
    reference: nn.Module, inputs: Mapping[str, Tensor], trials: Sequence[Trial], *, choices: Choices
) -> float:
    """The module's own float32 error against a float64 copy, in outputs that hang on no choice.

    0 for a module that runs in float32 only (`x.float()` in its forward): the strictest limit then holds.
    """
    model, error = copy.deepcopy(reference).double(), 0.0
    for trial in trials:
        try:
            wide = _flatten_outputs(model(inputs[trial.name].double())).values()
        except RuntimeError:
            return 0.0
        for (name, narrow), tensor in zip(trial.wanted.items(), wide, strict=False):  # cut outputs come last
            if narrow.dtype.kind == "f" and name not in choices.outputs:
                error = max(error, relative_error(narrow, tensor.numpy()))
    return error
