"""Somebody's ONNX in training form → the same network folded by algebra and verified against the file. Needs no torch.

What was folded is told here in words, too, for this and for the export of modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from ..errors import ForeignModelError, InputError, ModelError, ParityError
from ..files.onnx import read_graph, read_metadata
from ..files.output import PendingOutput, atomic_output, require_distinct, sha256_file
from ..files.versions import installed_versions
from ..graph.batchnorm import read_statistics, read_trained_on
from ..graph.edit import GraphView, resolve_sizes
from ..graph.fold import FoldReport, fold_branches
from ..graph.prove import TOLERANCE
from ..images.decode import normalize
from ..images.drawn import draw_images
from ..model.tolerance import require_passed
from ..specs.values import (
    METADATA_SCHEMA,
    Certificate,
    Check,
    HistoryEntry,
    ModelMetadata,
    ModelSpec,
    Preprocessing,
    TensorSpec,
)
from .choices import Choices, Trial, choose_outputs, find_choices, judge_outputs, with_outputs
from .options import IR_VERSIONS, ResizeOptions, require_units_of_255
from .verify import run_onnx
from .writer import append_metadata, write_model

_OLDEST_OPSET, _NEWEST_OPSET = 11, 22
_MAX_BYTES = (1 << 31) - 1
_FOLD_FIRST = "fold the FP32 file first, then quantize the result"
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGER = ("Quantize", "Dequantize", "DynamicQuantize", "QLinear", "ConvInteger", "MatMulInteger")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
_FREE_SIZES = ((128, 192), (192, 128))  # multiples of 64, the largest stride of usual detectors
_BATCH = 3
_TOOLS = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
_FEW = 3
_AS_SHARES = ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
FOLD_REMEDY = (
    "nothing was written; if only what is behind TopK, ArgMax or NonMaxSuppression differs, cut it off with output raw "
    "(--output raw); else report the model"
)
"""Where a folded network differs from what was given."""
_Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What `fold_onnx` did.

    Attributes:
        report: What was folded, and what remains.
        checks: The folds and the whole network against the file; empty where nothing was written.
        notes: What else became of the file, in sentences.
        output: The folded file; None where it was only described.
        metadata: What the file carries; None where it is none that the Engine takes (`notes` says why).
        macs: Multiply-accumulates of the folded regions before and after, for one image of `image_size`; None where
            ONNX cannot tell the sizes in between.
        image_size: (height, width) in pixels: the file's own, or one that was taken.
    """

    report: FoldReport
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    output: PendingOutput | None = None
    metadata: ModelMetadata | None = None
    macs: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class FoldOptions:
    """What is stated of a file that does not say it itself.

    Attributes:
        mean: Per RGB channel, 0–255 units, as the caller must normalise images.
        std: Likewise.
        resizing: How images are resized before the centre crop; where it says nothing, the short side becomes the
            crop's own, bilinear.
        labels: Names of the classes.
        output: The outputs that the result is to have, in place of the file's: names of tensors, or `raw` alone for
            what TopK, ArgMax and NonMaxSuppression, and all that comes after them, read.
        force: Replace a different file.

    Raises:
        InputError: `mean` or `std` is in units of 0–1, or one is given without the other.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resizing: ResizeOptions = field(default_factory=ResizeOptions)
    labels: tuple[str, ...] | None = None
    output: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        require_units_of_255(self.mean, self.std)
        if (self.mean is None) != (self.std is None) or (self.mean is None and self.resizing != ResizeOptions()):
            raise InputError("mean and std belong together, and resize to them", remedy="give --mean and --std")


def fold_onnx(model: Path | str, out: Path | str | None = None, *, options: FoldOptions | None = None) -> FoldResult:
    """Folds an ONNX file by algebra, verifies the result against the file and writes it as one file.

    Args:
        model: An FP32 ONNX of anybody, operator set 11 to 22; external data is read.
        out: The `.onnx`; None writes nothing and only says what would be folded.
        options: What the file does not say.

    Raises:
        ModelError: The file cannot be read, is too large, or of another operator set.
        InputError: It is typed (FP16, Q/DQ), `out` is `model`, or what is stated does not fit it.
        ParityError: The folded file does not give what the file gives, or ONNX Runtime cannot run it.
        ArtifactError: The result cannot be written.
    """
    path, options = Path(model), options or FoldOptions()
    given = original = _read(path)
    _require_float32(path, given)
    parent = _read_own_metadata(path)
    if options.output:
        given = with_outputs(given, choose_outputs(given, options.output, find_choices(given)))
    choices, outputs = find_choices(given), [value.name for value in given.graph.output]
    graph, notes = _set_opset(path, given)
    notes += _free_inputs(graph)
    graph = resolve_sizes(with_outputs(graph, [*outputs, *choices.before]))
    judged, report = fold_branches(graph)
    folded = with_outputs(judged, outputs)
    macs, size = _count_macs(graph, report)
    if out is None:
        return FoldResult(report, notes=tuple(notes), macs=macs, image_size=size)
    require_distinct([Path(out)], [path])
    with atomic_output(Path(out), force=options.force) as output:
        _name_dimensions(folded)
        folded.producer_name, folded.producer_version = "repvgg-deploy", installed_versions(())["repvgg-deploy"]
        folded.ir_version = IR_VERSIONS[_opset(folded)]
        digest = write_model(output.partial, folded)
        feeds = dict(_draw_feeds(given, parent, options))
        references, checks, said = _verify(
            path, original, folded=(output.partial, judged), choices=choices, feeds=feeds
        )
        checks = (*check_folds(report), *checks)
        require_passed(checks, f"{path.name} against the folded file", remedy=FOLD_REMEDY)
        spec = _describe(folded, references, parent, options)
        metadata = None
        if isinstance(spec, str):
            said = (*said, f"no metadata for the Engine: {spec}")
        else:
            done = {"opset": _opset(folded), **count_folds(report)}
            entry = HistoryEntry("fold", installed_versions(_TOOLS), done, sha256_file(path))
            reference = f"the file as it was given: {describe_folding(report)}{choices.describe()}"
            spec = replace(spec, trained_on=spec.trained_on or read_trained_on(graph))
            metadata = _extend(parent, spec, Certificate(reference, checks, entry.versions), entry)
            metadata = replace(metadata, statistics=metadata.statistics or read_statistics(graph, folded))
            append_metadata(output.partial, digest, metadata)
    return FoldResult(report, checks, (*notes, *said), output, metadata, macs, size)


def _extend(
    parent: ModelMetadata | None, spec: ModelSpec, certificate: Certificate, entry: HistoryEntry
) -> ModelMetadata:
    """The metadata of the folded file; of a file of ours, its own with what is new."""
    if parent is None:
        return ModelMetadata(METADATA_SCHEMA, spec, None, None, certificate, {}, (entry,))
    both = replace(parent.certificate, checks=(*parent.certificate.checks, *certificate.checks))
    history = (*parent.history, entry)
    return replace(parent, spec=spec, certificate=both, history=history, content_sha256="")


def _count_macs(graph: onnx.ModelProto, report: FoldReport) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Multiply-accumulates of all folded regions before and after, and the size of the one image that they are for."""
    sized = onnx.ModelProto()
    sized.CopyFrom(graph)
    size = None
    for value in sized.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, usual in zip(dims, (1, 3, *_FREE_SIZES[0]), strict=False):
            if len(dims) == 4 and not dim.dim_value:
                dim.dim_value = usual
        if len(dims) == 4:
            dims[0].dim_value, size = 1, (dims[2].dim_value, dims[3].dim_value)
    shapes = GraphView(sized).shape
    pixels = [(shapes(fold.source) or (None,))[2:] for fold in report.folds]
    if size is None or any(len(sides) != 2 or None in sides for sides in pixels):
        return None, None
    areas = [math.prod(side for side in sides if side is not None) for sides in pixels]
    folds = list(zip(report.folds, areas, strict=True))
    before, after = (sum(area * getattr(f, name) for f, area in folds) for name in ("macs_before", "macs_after"))
    return (round(before), round(after)), size


def describe_folding(report: FoldReport) -> str:
    """What was folded and which sums of branches remain, with a few reasons, such as `2 regions folded`."""
    count = len(report.folds)
    text = f"{count} region{'s' if count > 1 else ''} folded" if count else "nothing to fold"
    if report.left:
        few = ", ".join(f"{name} ({reason})" for name, reason in report.left[:_FEW])
        more = f" and {len(report.left) - _FEW} more" if len(report.left) > _FEW else ""
        text += f"; sums of branches that remain: {few}{more}"
    return text


def check_folds(report: FoldReport) -> tuple[Check, ...]:
    """Each fold's own proof as a check of a certificate."""
    return tuple(Check(f"fold {f.output}: {f.kernels}", f.error, TOLERANCE, 1.0) for f in report.folds)


def count_folds(report: FoldReport) -> dict[str, str | int | float | bool | None]:
    """What the history says of a folding."""
    return {
        "regions_folded": len(report.folds),
        "sums_left": len(report.left),
        "weight_bytes_saved": sum(fold.bytes_saved for fold in report.folds),
    }


def _read(path: Path) -> onnx.ModelProto:
    """The model with all its weights."""
    size = read_graph(path).file_bytes  # says what is wrong with a file that is no ONNX
    model = onnx.ModelProto()
    if size <= _MAX_BYTES:
        try:
            model = onnx.load_model(path, load_external_data=False)
        except Exception as error:  # protobuf's own class, of a package that is not ours to import
            raise ModelError(f"{path}: is damaged: {error}", remedy="export or copy it again") from error
    outside = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    size += sum(int(np.prod(t.dims)) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in outside)
    if size > _MAX_BYTES:
        raise ModelError(
            f"{path}: {size / 1e9:.1f} GB of weights, and an ONNX file holds 2.1 GB", remedy="fold a smaller model"
        )
    try:
        load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"{path}: is no valid ONNX, or its external data cannot be read: {' '.join(str(error).split())}",
            remedy="put the data files that came with it into the same folder, or export it again",
        ) from error
    return model


def _require_float32(path: Path, model: onnx.ModelProto) -> None:
    """Refuses what is typed already: its scales belong to the graph that they were made for."""
    found = [
        node.op_type for node in model.graph.node if node.op_type.startswith(("Quantize", "Dequantize", "QLinear"))
    ]
    values = (*model.graph.input, *model.graph.output)
    kinds = {t.data_type for t in model.graph.initializer} | {value.type.tensor_type.elem_type for value in values}
    found += [TensorProto.DataType.Name(kind) for kind in _HALVES if kind in kinds]
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    found += ["DOUBLE" for t in model.graph.initializer if t.name in weights and t.data_type == TensorProto.DOUBLE]
    if found:
        raise InputError(f"{path}: expected an FP32 graph, found {found[0]} in it", remedy=_FOLD_FIRST)


def _read_own_metadata(path: Path) -> ModelMetadata | None:
    try:
        return read_metadata(path)
    except ForeignModelError:
        return None


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _set_opset(path: Path, model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model at an operator set from 17 to 20, and what was done to it."""
    opset, wanted = _opset(model), min(max(_opset(model), min(IR_VERSIONS)), max(IR_VERSIONS))
    remedy = f"export the model at an operator set from {min(IR_VERSIONS)} to {max(IR_VERSIONS)}"
    if not _OLDEST_OPSET <= opset <= _NEWEST_OPSET:
        raise ModelError(
            f"{path}: expected operator set {_OLDEST_OPSET} to {_NEWEST_OPSET}, found {opset}", remedy=remedy
        )
    if opset == wanted:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, []
    try:
        return version_converter.convert_version(model, wanted), [f"operator set {opset} became {wanted}"]
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"{path}: onnx {onnx.__version__} cannot convert operator set {opset} to {wanted}: "
            f"{' '.join(str(error).split())}",
            remedy=remedy,
        ) from error


def _free_inputs(model: onnx.ModelProto) -> list[str]:
    """Makes constants of weights that old exporters list among the inputs, in place."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    count = len(model.graph.input) - len(inputs)
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return [f"{count} weights that a caller could have replaced are constants now"] if count else []


def _name_dimensions(model: onnx.ModelProto) -> None:
    """Gives the dynamic dimensions of images names, in place."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims, ("batch", "channels", "height", "width"), strict=False):
            if len(dims) == 4 and not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = name


def _verify(
    path: Path,
    given: onnx.ModelProto,
    *,
    folded: tuple[Path, onnx.ModelProto],
    choices: Choices,
    feeds: Mapping[str, _Arrays],
) -> tuple[dict[str, _Arrays], tuple[Check, ...], tuple[str, ...]]:
    """What the file gives on drawn inputs, how far from it the folded file is, and what could not be compared.

    `folded` are the file that was written and its graph with `choices.before` as further outputs; `feeds` go in.
    """
    outputs = [value.name for value in folded[1].graph.output if value.name not in choices.before]
    reference = with_outputs(given, list(dict.fromkeys([*outputs, *choices.inner])))
    content = None if reference is given else reference.SerializeToString()
    inner: dict[str, _Arrays] = {}
    notes = []
    for name, feed in feeds.items():
        try:
            inner |= run_onnx(path, {name: feed}, content=content)
        except ParityError as error:
            if name.startswith("image"):
                shapes = {key: array.shape for key, array in feed.items()}
                raise ParityError(
                    f"{path}: as it was given it does not run on {shapes}: {error.message}",
                    remedy="check it in ONNX Runtime; where tracing fixed a size that it calls free, export it so",
                ) from error
            notes.append(f"the file as it was given does not run {name}: not verified")
    used = {name: feeds[name] for name in inner}
    references = {batch: {name: arrays[name] for name in outputs} for batch, arrays in inner.items()}
    first, second = ([inner[batch][name] for name in (*outputs, *choices.before)] for batch in ("image 1", "image 2"))
    finite = all(np.isfinite(array).all() for arrays in references.values() for array in arrays.values())
    if not finite or all(map(np.array_equal, first, second)):
        raise ParityError(
            f"{path}: its outputs on drawn inputs are {'all the same' if finite else 'not finite'}, so that nothing "
            "can be verified",
            remedy="give a trained model",
        )
    nudged = run_onnx(path, used, content=nudge(reference).SerializeToString())
    found = run_onnx(folded[0], used)
    if choices.before:
        further = run_onnx(folded[0], used, content=folded[1].SerializeToString())
        found = {batch: {**further[batch], **arrays} for batch, arrays in found.items()}
    images = {batch: len(next((a for a in feed.values() if a.ndim == 4), [])) for batch, feed in used.items()}
    trials = [
        Trial(batch, images[batch], found[batch], wanted, inner[batch], nudged[batch])
        for batch, wanted in references.items()
    ]
    checks, ties = judge_outputs(choices, trials, kept=outputs)
    return references, checks, (*notes, *ties)


def nudge(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every weight moved to a float32 beside it.

    A fold rounds each weight once more and changes the order of sums, which is as much. How far such a step moves the
    outputs is the file's own float32 noise, the yardstick of the comparison (`model.tolerance.allow_float32`).
    """
    nudged = onnx.ModelProto()
    nudged.CopyFrom(model)
    weights = {name for node in model.graph.node if node.op_type in _WEIGHTED for name in node.input[1:]}
    constants = [n.attribute[0].t for n in nudged.graph.node if n.op_type == "Constant" and n.output[0] in weights]
    random = np.random.default_rng(0)
    for tensor in (*(t for t in nudged.graph.initializer if t.name in weights), *constants):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            towards = np.where(random.random(array.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.nextafter(array, towards), tensor.name))
    return nudged


def _draw_feeds(
    model: onnx.ModelProto, parent: ModelMetadata | None, options: FoldOptions
) -> Iterator[tuple[str, _Arrays]]:
    """Inputs by batch name: two images; where dynamic, also another batch and another size.

    Where mean and standard deviation are stated, the network sees image-like pixels normalised so; where they are not,
    normally distributed numbers, or pixels as numbers from 0 to 1.
    """
    known = None if parent is None else parent.spec.preprocessing
    seen = None if known is None else (known.mean, known.std)
    if options.mean is not None and options.std is not None:
        seen = (options.mean, options.std)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    free = {axis for v in inputs for axis, d in enumerate(_dims(v)) if len(_dims(v)) == 4 and not isinstance(d, int)}
    plans = {"image 1": (1, 0), "image 2": (1, 0)}
    plans |= {"another batch": (_BATCH, 0)} if 0 in free else {}
    plans |= {"another size": (1, 1)} if free & {2, 3} else {}
    for seed, (name, (batch, size)) in enumerate(plans.items()):
        random = np.random.default_rng(seed)
        feed: _Arrays = {}
        for value in inputs:
            usual = (batch, 3, *_FREE_SIZES[size])
            shape = [
                dim if isinstance(dim, int) else usual[axis] if len(_dims(value)) == 4 or axis == 0 else 1
                for axis, dim in enumerate(_dims(value))
            ]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if len(shape) == 4 and shape[1] == 3 and dtype == np.float32 and (seen or seed % 2):
                mean, std = seen or _AS_SHARES
                images = draw_images((shape[2], shape[3]), shape[0], random)
                feed[value.name] = normalize(images, Preprocessing(mean, std, 1, (1, 1)))
            elif dtype.kind == "f":
                feed[value.name] = random.standard_normal(shape).astype(dtype)
            else:
                feed[value.name] = random.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
        yield name, feed


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    """Sizes of a tensor; an empty text for a dimension without size or name."""
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def _describe(
    model: onnx.ModelProto, results: Mapping[str, _Arrays], parent: ModelMetadata | None, options: FoldOptions
) -> ModelSpec | str:
    """Input and outputs: of a file of ours its own, else as they were found; and what is stated of them."""
    if parent is not None and not options.output:
        spec: ModelSpec | str = parent.spec
    else:
        spec = _read_spec(model, results)
    if parent is not None and not isinstance(spec, str):
        spec = replace(spec, preprocessing=parent.spec.preprocessing, labels=parent.spec.labels)
    return spec if options.mean is None and options.labels is None else _state(spec, model, options)


def _read_spec(model: onnx.ModelProto, results: Mapping[str, _Arrays]) -> ModelSpec | str:
    """Input and outputs as the metadata state them, or why they cannot."""
    if len(model.graph.input) != 1:
        return f"it has {len(model.graph.input)} inputs, expected one image"
    image = model.graph.input[0]
    shape, kind = tuple(_dims(image)), image.type.tensor_type.elem_type
    if len(shape) != 4 or kind != TensorProto.FLOAT or not isinstance(shape[1], int):
        return f"its input {image.name} is no float32 image (N, C, H, W) with a known number of channels"
    outputs = []
    for value in model.graph.output:
        array = results["image 1"][value.name]
        dims = _dims(value) if len(_dims(value)) == array.ndim else [""] * array.ndim
        if len({arrays[value.name].ndim for arrays in results.values()}) > 1 or not array.ndim:
            return f"its output {value.name} has no fixed number of dimensions"
        sizes = [size or f"{value.name}_{axis}" for axis, size in enumerate(dims)]
        if isinstance(sizes[0], str) and len(results.get("another batch", results["image 1"])[value.name]) == _BATCH:
            sizes[0] = shape[0]  # a row an image
        if array.dtype.name not in ("float32", "float16", "int64", "int32", "uint8"):
            return f"its output {value.name} is {array.dtype}"
        layout = {4: "NCHW", 2: "NC"}.get(array.ndim, "other")
        outputs.append(TensorSpec(value.name, array.dtype.name, tuple(sizes), layout))  # type: ignore[arg-type]
    return ModelSpec(TensorSpec(image.name, "float32", shape, "NCHW"), tuple(outputs), "module")


def _state(spec: ModelSpec | str, model: onnx.ModelProto, options: FoldOptions) -> ModelSpec:
    """The specification with what is stated of a classifier."""
    if isinstance(spec, str):
        raise InputError(f"nothing can be stated of this file: {spec}", remedy="leave --mean, --std and --labels out")
    size, scores = spec.input.shape[2:], spec.outputs[0]
    preprocessing = spec.preprocessing
    if options.mean is not None and options.std is not None:
        if not isinstance(size[0], int) or not isinstance(size[1], int) or spec.input.shape[1] != 3:
            raise InputError(
                f"the input {spec.input.shape} says no size of RGB images",
                remedy="give a file with a fixed height and width, or leave --mean and --std out",
            )
        plain = Preprocessing(options.mean, options.std, min(size[0], size[1]), (size[0], size[1]))
        preprocessing = options.resizing.restate(plain)
    if options.labels is not None and [len(options.labels)] != [output.shape[-1] for output in spec.outputs]:
        raise InputError(
            f"{len(options.labels)} labels for the outputs {', '.join(f'{o.name} {o.shape}' for o in spec.outputs)}",
            remedy="give --labels a file with one line a class, in the classifier's order",
        )
    kind = spec.kind
    if len(spec.outputs) == 1 and scores.layout == "NC" and scores.dtype == "float32" and kind == "module":
        maker = next((node.op_type for node in model.graph.node if scores.name in node.output), "")
        kind = "probabilities" if maker == "Softmax" else "logits"
    return replace(spec, kind=kind, preprocessing=preprocessing, labels=options.labels or spec.labels)
