"""onnxsim, then names a person can read. Works on the graph without its weights."""

from __future__ import annotations

from typing import cast

import onnx

from ..errors import MissingDependencyError, SimplifyError


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Simplifies a graph with onnxsim.

    Args:
        model: Its weights may be graph inputs.

    Returns:
        A new model with the same inputs and outputs.

    Raises:
        MissingDependencyError: onnxsim is not installed.
        SimplifyError: It failed.
    """
    try:
        import onnxsim
    except ImportError as error:
        raise MissingDependencyError("onnxsim is not installed", remedy="pip install 'repvgg-deploy[export]'") from error
    remedy = "report the model; the graph that torch wrote is not touched by it"
    try:
        simplified, valid = onnxsim.simplify(model)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise SimplifyError(f"onnxsim {onnxsim.__version__} failed: {error}", remedy=remedy) from error
    if not valid:
        raise SimplifyError(f"onnxsim {onnxsim.__version__} says that its result differs from the original", remedy=remedy)
    before, after = ([v.name for v in m.graph.output] for m in (model, simplified))
    if before != after:
        raise SimplifyError(f"onnxsim {onnxsim.__version__} changed the outputs: expected {before}, found {after}", remedy=remedy)
    return cast(onnx.ModelProto, simplified)


def rename(model: onnx.ModelProto) -> dict[str, str]:
    """Gives weights, nodes and tensors of a RepVGG graph short names, in place.

    A block's convolution becomes `stage1.0.conv` with `stage1.0.weight` and `stage1.0.bias`, its result before the ReLU `stage1.0.conv`, after it
    `stage1.0`; parts of an SE block keep their own.

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
    """From the weight, where there is one, else from the path that torch recorded: `/network/stage1/stage1.0/se/Sigmoid`."""
    if node.op_type in ("Conv", "Gemm"):
        owner = _weight_name(node.input[1]).removesuffix(".weight")
        return f"{owner}.conv" if node.op_type == "Conv" else owner
    parts = [part for part in node.name.split("/") if part and part != "network"]
    scope, operator = parts[:-1], node.op_type
    path = [part for index, part in enumerate(scope) if not any(later.startswith(part + ".") for later in scope[index + 1 :])]
    owner = ".".join(path)
    of_block = operator == "Relu" and not owner.endswith("se")
    return owner if of_block or owner == "gap" else ".".join([*path, operator.lower()])


def _unique(name: str, counts: dict[str, int]) -> str:
    counts[name] = counts.get(name, 0) + 1
    return name if counts[name] == 1 else f"{name}_{counts[name]}"


def drop_weight_inputs(model: onnx.ModelProto, input_name: str) -> None:
    """Leaves the image as the only graph input, in place: the weights become initializers when the file is written."""
    image = next(value for value in model.graph.input if value.name == input_name)
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(image)
    del model.graph.input[:]
    model.graph.input.append(kept)
