"""Deploy form → simplified ONNX graph without its weights, with names that a person can read.

The exporter is told not to write parameters: it emits the graph with each weight as a named input, a few kilobytes
whatever the model's size. Simplification and the contract work on that; the weights go from the model's memory straight
to the file (`writer`).

For the same reason a narrow twin is traced, with the same layers and a few channels each: the exporter infers shapes by
copying every weight, twice, which takes two seconds and 640 MB for B2. The shapes of the real weights are put in
afterwards, and the contract checks each of them.

Why the TorchScript exporter: it writes the operators that the plain chain consists of (GlobalAveragePool, Flatten,
Gemm) at the operator set that is asked for. The newer one starts at 18, writes ReduceMean and Reshape instead, and
needs six seconds where this needs half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator
from typing import cast

import onnx
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ExportError, MissingDependencyError, SimplifyError, say_install
from ..model.network import RepVGG
from ..specs.values import ModelSpec, Preprocessing, TensorSpec
from .options import IR_VERSIONS, TOP_K, GraphOptions

# The graph does not depend on the image size (`stamp` sets the sizes), and a small one is traced faster.
_TRACE_SIZE = (32, 32)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as a new process has it, whatever the caller set; undone at the end.

    Default dtype float32 and device CPU, no autocast, no inference mode, gradients on. Under another default dtype, the
    modules and constants that are made here would not fit the weights; under autocast, the reference would be rounded.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def to_onnx(network: RepVGG, options: GraphOptions, spec: ModelSpec) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """Traces the graph.

    Args:
        network: In deploy form, `eval()`.
        options: What to export.
        spec: Inputs and outputs that `options` lead to (`options.model_spec`).

    Returns:
        The model, its weights being graph inputs, and those weights by name.

    Raises:
        ExportError: torch's exporter failed.
    """
    assert spec.preprocessing is not None
    variant = network.spec
    width = math.lcm(*variant.groups) * (variant.se_reduction if variant.se != "none" else 1)
    narrow = dataclasses.replace(variant, widths=(width,) * 5)
    twin = _DeployGraph(RepVGG(narrow, "deploy"), options, spec.preprocessing).eval()
    batch = options.batch or 1
    if options.input == "uint8":
        x = torch.zeros((batch, *_TRACE_SIZE, 3), dtype=torch.uint8)
    else:
        x = torch.zeros((batch, 3, *_TRACE_SIZE))
    values = (spec.input, *spec.outputs)
    model = trace(twin, x, opset=options.opset, tensors=values)
    full = _DeployGraph(network, options, spec.preprocessing)
    tensors = {name: tensor.detach() for name, tensor in (*full.named_parameters(), *full.named_buffers())}
    for value in model.graph.input:
        if value.name in tensors:
            _set_shape(value, tuple(tensors[value.name].shape))
    stamp(model, options.opset, values)
    return model, tensors


class _DeployGraph(nn.Module):
    """What is exported: preprocessing (of uint8 input only), network, output."""

    def __init__(self, network: RepVGG, options: GraphOptions, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.options = options
        if options.input == "uint8":
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(preprocessing.std).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs in the order of `ModelSpec.outputs`."""
        if self.options.input == "uint8":
            # Cast comes first, because TensorRT takes uint8 into no other operator. Subtract, then divide: the same
            # roundings as `preprocess`.
            x = (x.to(torch.float32).permute(0, 3, 1, 2) - self.mean) / self.std
        stages = self.network.stage_outputs(x)
        if self.options.features:
            return tuple(stages.values())
        logits = self.network.classify(stages["stage4"])
        if self.options.output == "logits":
            return logits
        probabilities = torch.softmax(logits, dim=1)
        if self.options.output == "probabilities":
            return probabilities
        scores, classes = torch.topk(probabilities, min(TOP_K, logits.shape[1]), dim=1)
        return scores, classes


def trace(
    module: nn.Module, x: Tensor, *, opset: int, tensors: tuple[TensorSpec, ...], with_weights: bool = False
) -> onnx.ModelProto:
    """Runs torch's exporter.

    Args:
        module: In `eval()`.
        x: An example of its one input.
        opset: Operator set.
        tensors: The input, then the outputs; names and dynamic sizes are taken from them.
        with_weights: Write the weights into the graph; otherwise they are graph inputs.

    Raises:
        ExportError: It failed.
    """
    names = [tensor.name for tensor in tensors]
    axes = {t.name: {axis: size for axis, size in enumerate(t.shape) if isinstance(size, str)} for t in tensors}
    buffer = io.BytesIO()
    try:
        # On an error torch prints the whole graph.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Deprecated in favour of the exporter that cannot write this graph (see above); tracer warnings about
            # constants are checked by parity.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (x,), buffer, dynamo=False,  # type: ignore[arg-type]  # a file object is documented
                export_params=with_weights, do_constant_folding=with_weights, opset_version=opset,
                # Else it would merge BatchNorm into weights in place, wrongly where two layers share them.
                training=torch.onnx.TrainingMode.PRESERVE, input_names=names[:1], output_names=names[1:],
                dynamic_axes={name: sizes for name, sizes in axes.items() if sizes},
            )  # fmt: skip
    except (RuntimeError, TypeError, ValueError, AssertionError, torch.onnx.OnnxExporterError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch {torch.__version__} cannot export the model at opset {opset}: {first}",
            remedy="replace the operator that it names",
        ) from error
    return onnx.load_from_string(buffer.getvalue())


def stamp(model: onnx.ModelProto, opset: int, tensors: tuple[TensorSpec, ...]) -> None:
    """Sets producer, IR version and graph name, the same on every machine, and the shapes of input and outputs.

    Args:
        model: Changed in place.
        opset: Its operator set.
        tensors: The input, then the outputs in the order of the graph.
    """
    model.producer_name, model.producer_version = "repvgg-deploy", __version__
    model.ir_version = IR_VERSIONS[opset]
    model.graph.name = "repvgg"
    model.graph.doc_string = model.doc_string = ""
    image = next(value for value in model.graph.input if value.name == tensors[0].name)
    for value, tensor in zip((image, *model.graph.output), tensors, strict=True):
        _set_shape(value, tensor.shape)


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[int | str, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in shape:
        dim = dims.add()
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size


def simplify(model: onnx.ModelProto, *, keep_batchnorm: bool = False) -> onnx.ModelProto:
    """Simplifies a graph with onnxsim.

    Args:
        model: Its weights may be graph inputs.
        keep_batchnorm: Do not merge BatchNorm into convolutions, which onnxsim does in float32.

    Returns:
        A new model with the same inputs and outputs.

    Raises:
        MissingDependencyError: onnxsim is not installed.
        SimplifyError: It failed.
    """
    try:
        import onnxsim
    except ImportError as error:
        raise MissingDependencyError("onnxsim is not installed", remedy=say_install("export")) from error
    remedy = "report the model; the graph that torch wrote is not touched by it"
    try:
        simplified, valid = onnxsim.simplify(model, skip_fuse_bn=keep_batchnorm)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise SimplifyError(f"onnxsim {onnxsim.__version__} failed: {error}", remedy=remedy) from error
    if not valid:
        raise SimplifyError(
            f"onnxsim {onnxsim.__version__} says that its result differs from the original", remedy=remedy
        )
    before, after = ([v.name for v in m.graph.output] for m in (model, simplified))
    if before != after:
        raise SimplifyError(
            f"onnxsim {onnxsim.__version__} changed the outputs: expected {before}, found {after}", remedy=remedy
        )
    return cast(onnx.ModelProto, simplified)


def rename(model: onnx.ModelProto) -> dict[str, str]:
    """Gives weights, nodes and tensors of a RepVGG graph short names, in place.

    A block's convolution becomes `stage1.0.conv` with `stage1.0.weight` and `stage1.0.bias`, its result before the ReLU
    `stage1.0.conv`, after it `stage1.0`; parts of an SE block keep their own.

    Returns:
        New name of each weight by old name.
    """
    graph = model.graph
    fixed = {value.name for value in graph.output} | {"input"}
    weights = {value.name: _weight_name(value.name) for value in graph.input if value.name not in fixed}
    tensors = dict(weights)
    counts: dict[str, int] = {}
    for node in graph.node:
        node.name = _unique(_node_name(node), counts)
        for index, output in enumerate(node.output):
            if output not in fixed:
                tensors[output] = node.name if index == 0 else f"{node.name}.{index}"
    for tensor in graph.initializer:  # the k of a TopK
        tensors[tensor.name] = tensor.name = _unique("constant", counts)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = tensors.get(name, name)
    for value in graph.input:
        value.name = tensors.get(value.name, value.name)
    del graph.value_info[:]
    return weights


def _weight_name(name: str) -> str:
    return name.removeprefix("network.").replace("rbr_reparam.", "")


def _node_name(node: onnx.NodeProto) -> str:
    """From the weight, if there is one, else from torch's path, such as `/network/stage1/stage1.0/se/Sigmoid`."""
    if node.op_type in ("Conv", "Gemm"):
        owner = _weight_name(node.input[1]).removesuffix(".weight")
        return f"{owner}.conv" if node.op_type == "Conv" else owner
    parts = [part for part in node.name.split("/") if part not in ("", "network", "nonlinearity")]
    scope, operator = parts[:-1], node.op_type
    path = [
        part
        for index, part in enumerate(scope)
        if not any(later.startswith(part + ".") for later in scope[index + 1 :])
    ]
    owner = ".".join(path)
    of_block = operator == "Relu" and not owner.endswith("se")
    return owner if of_block or owner == "gap" else ".".join([*path, operator.lower()])


def _unique(name: str, counts: dict[str, int]) -> str:
    counts[name] = counts.get(name, 0) + 1
    return name if counts[name] == 1 else f"{name}_{counts[name]}"
