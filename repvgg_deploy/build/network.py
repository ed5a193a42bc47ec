"""ONNX bytes → TensorRT network, with the parser's own words where it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import BuildError
from ..files.onnx import GraphSummary
from ..files.plan_place import Library, quote
from ..specs.values import ModelSpec, ShapeProfile
from .library import BuildLog
from .source import Source

_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""NumPy's names of TensorRT's number types."""
_REMEDY = (
    "build the file that repvgg-export or repvgg-trt quantize wrote; if it is one, please report this with the lines "
    "above"
)


def parse(library: Library, network: Any, *, log: BuildLog, source: Source) -> Any:
    """Fills `network`. The parser that is returned must outlive it: it owns the weights.

    Raises:
        BuildError: The parser refuses the graph (the message names the node), or finds other inputs and outputs than
            the metadata, which the passport will hold.
    """
    parser = library.trt.OnnxParser(network, log.trt_logger)
    if not parser.parse(source.data):
        errors = [_describe(parser.get_error(index), source.graph) for index in range(parser.num_errors)]
        raise BuildError(
            f"{library.name}'s parser refuses the graph:{quote(errors or log.errors)}",
            remedy=_remedy(errors, source.graph),
        )
    found = (
        [network.get_input(i).name for i in range(network.num_inputs)],
        [network.get_output(i).name for i in range(network.num_outputs)],
    )
    wanted = ([source.spec.input.name], [output.name for output in source.spec.outputs])
    if found != wanted:
        raise BuildError(
            f"the network has inputs and outputs {found}, and the model's metadata speaks of {wanted}", remedy=_REMEDY
        )
    return parser


def _describe(error: Any, graph: GraphSummary) -> str:
    name, operator = _call(error, "node_name"), _call(error, "node_operator")
    index = error.node()
    if not name and 0 <= index < len(graph.nodes):  # TensorRT 8 says only which of the nodes it was
        name, operator = graph.nodes[index].name or graph.nodes[index].outputs[0], graph.nodes[index].op_type
    where = f"node {name} ({operator}): " if name else ""
    return f"{where}{error.desc()}"


def _call(error: Any, name: str) -> str:
    method = getattr(error, name, None)
    return str(method() or "") if method is not None else ""


def _remedy(errors: Sequence[str], graph: GraphSummary) -> str:
    text = " ".join(errors).lower()
    if "plugin" in text or "no importer" in text:
        return (
            "TensorRT does not know this operator: leave it out of the model, or run the ONNX with Engine, which "
            "uses ONNX Runtime"
        )
    if "opset" in text or "operator set" in text:
        return (
            f"the graph is of operator set {graph.opset}: export it with a lower repvgg-export --opset, or install a "
            f"later TensorRT"
        )
    return _REMEDY


def output_types(library: Library, network: Any) -> dict[str, str]:
    """Number type of each output by name, in NumPy's names. TensorRT 8 makes class numbers INT32."""
    data_type = library.trt.DataType
    known = {getattr(data_type, name): text for name, text in _NAMES.items() if hasattr(data_type, name)}
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: known[tensor.dtype] for tensor in outputs if tensor.dtype in known}


def tensor_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of what every layer puts out, by tensor name; −1 is dynamic, and a shape of unknown rank is empty."""
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for place in range(layer.num_outputs):
            tensor = layer.get_output(place)
            if tensor is not None:
                try:
                    found[tensor.name] = tuple(tensor.shape)
                except ValueError:  # its rank is unknown
                    found[tensor.name] = ()
    return found


def add_profiles(builder: Any, settings: Any, spec: ModelSpec, profile: ShapeProfile) -> None:
    """Tells TensorRT the batch sizes, and the image sizes where they vary.

    Raises:
        BuildError: TensorRT refuses a profile.
    """
    batches = "--profiles" if profile.batches else "--min-batch, --opt-batch, --max-batch"
    for one in profile.split():
        shapes = one.shapes(spec.input)
        trt_profile = builder.create_optimization_profile()
        trt_profile.set_shape(spec.input.name, *shapes)
        if settings.add_optimization_profile(trt_profile) < 0:
            raise BuildError(
                f"TensorRT refuses the shapes {', '.join(map(str, shapes))}",
                remedy=f"give other {batches}"
                + (", or other --min-size, --opt-size, --max-size" if profile.opt_size else ""),
            )
