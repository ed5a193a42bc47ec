"""FP32 ONNX → FP16 ONNX, strongly typed: weights and everything between the image and the logits are FP16.

FP16 ends at 65504, and loses digits below 6e-5. Where the range of a channel, with a margin, or its weights come near
either end, the channel is rescaled by a power of two along the network: exact, and never a clipping. The ranges are
measured on images, or, without any, stated by the BatchNorm layers and tried on drawn images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..errors import CalibrationError, ModelError
from ..graph.batchnorm import INPUT_SUFFIX, decode_channels
from ..graph.edit import GraphView
from ..images.decode import normalize
from ..specs.values import ChannelStatistics, ModelSpec
from .answers import ACTIVATIONS, MOVES, POOLS, find_answers, find_types
from .check import check_halves
from .equalize import encode, rescale
from .halves import LARGEST, SMALLEST_NORMAL, Io, half_spec, write_halves
from .network import Float64, Network, read_weights
from .ranges import require_finite, widen_ranges
from .run_onnx import count_images, run_tensors, split_batches
from .typed_model import Parent, StrPath, TypedModel, extend, load_parent

RangeSource: TypeAlias = Literal["images", "statistics", "synthetic"]
"""What ranges are known from. `images`: measured on the caller's. `statistics`: of the BatchNorm layers, |mean| + 256σ,
where they speak (every 3×3 convolution), and 32 times what drawn images gave elsewhere (SE, classifier). `synthetic`:
32 times what drawn images gave, everywhere."""
DEVIATIONS = 256.0
"""Standard deviations that a channel may reach. A trained A0 reaches 130 on 64 photographs: tails are long, and a
block's branches, whose variances the statistics add as if they were independent, rise together. Too much does no harm:
FP16 has digits to spare below, and rescaling is exact."""
UNSEEN = 32.0
"""How much further real images may reach than drawn ones, where nothing else is known. The same A0: 12 times."""
_BOUNDED = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Clip", "Erf")
_UNBOUNDED = ("Relu", "LeakyRelu", "PRelu", "HardSwish")
_COMFORTABLE = 16.0  # where the values of a channel that must be moved are moved to
_HIGHEST = 4096.0  # where they may lie if its weights would otherwise be subnormal
_TINY = SMALLEST_NORMAL * 64  # a row whose largest weight is smaller loses digits that matter
_LOWEST = SMALLEST_NORMAL * 256  # where such a row is moved to


@dataclass(frozen=True, slots=True)
class Fp16Options:
    """How a graph becomes FP16.

    Attributes:
        margin: Other images may give values this many times as large as the ranges say.
        io: Type of the floating-point input and outputs; uint8 images and class numbers stay what they are.
    """

    margin: float = 8.0
    io: Io = "fp32"

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= 1024:
            raise CalibrationError(
                f"the margin must lie between 1 and 1024, found {self.margin}", remedy="give 8, or leave it out"
            )
        if self.io not in ("fp32", "fp16"):
            raise CalibrationError(
                f"inputs and outputs can be fp32 or fp16, found {self.io!r}", remedy="give fp32, or leave it out"
            )


@dataclass(frozen=True, slots=True)
class Fp16Report:
    """What was found and done.

    Attributes:
        source: What the ranges are known from; see `RangeSource`.
        images: How many images were run.
        largest: By layer: the largest absolute value that its output may have in FP32, before any rescaling and without
            the margin.
        rescaled: By layer: how many of its output channels were rescaled; layers without any are left out.
        factors: By layer, of the same layers: smallest and largest power of two that a channel was divided by.
        islands: Tensors that are made in FP32, because FP16 does not hold them or what they are made of.
    """

    source: RangeSource
    images: int
    largest: dict[str, float]
    rescaled: dict[str, int]
    factors: dict[str, tuple[float, float]]
    islands: tuple[str, ...] = ()


def to_fp16(
    source: StrPath | onnx.ModelProto | Parent,
    batches: Sequence[NDArray[Any]] | None = None,
    options: Fp16Options | None = None,
) -> tuple[TypedModel, Fp16Report]:
    """Makes the FP16 graph of an FP32 ONNX of ours; `typed_model.write_typed` writes it.

    Args:
        source: File, the model in memory, or what `load_parent` read.
        batches: Images as the model takes them, in a list: what the ranges are measured on. None: the ranges are taken
            from the BatchNorm statistics that an export of a training form keeps, and from drawn images.
        options: Margin, type of inputs and outputs.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, or a tensor that cannot be rescaled does not
            fit FP16.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Fp16Options()
    parent = load_parent(source)
    ranges, known_from, images = find_ranges(parent, batches)
    fitted, factors, beyond = fit_ranges(parent.network, ranges, options)
    tried = draw_batches(parent.metadata.spec) if batches is None else batches
    margin = options.margin * (UNSEEN if batches is None else 1)
    islands = find_islands(fitted, [*beyond, *find_large(fitted, tried, LARGEST / margin)])
    typed = write_halves(fitted.model, io=options.io, full=islands)
    full = islands.union(*(node.output for node in find_answers(fitted.model)))
    check_halves(typed, full={node.name for node in typed.graph.node if full.intersection(node.output)})
    rescaled = {name: int((factor != 1).sum()) for name, factor in factors.items()}
    said: dict[str, str | int | float | bool | None] = {
        "margin": options.margin,
        "io": options.io,
        "ranges": known_from,
        "images": images,
        "rescaled_channels": sum(rescaled.values()),
    } | ({"fp32": ", ".join(sorted(islands))} if islands else {})
    report = Fp16Report(
        known_from,
        images,
        {layer.name: float(ranges[layer.output].max()) for layer in parent.network.layers},
        rescaled,
        {name: (float(factor.min()), float(factor.max())) for name, factor in factors.items()},
        tuple(sorted(islands)),
    )
    return extend(parent, typed, stage="fp16", options=said, spec=half_spec(parent.metadata.spec, options.io)), report


def fit_ranges(
    network: Network, ranges: Mapping[str, Float64], options: Fp16Options
) -> tuple[Network, dict[str, Float64], list[str]]:
    """Rescales channels by powers of two, first layer to last, where FP16 cannot hold them or what makes them.

    Takes ranges by name of a layer's output, (C,). Gives the same function, and by layer what the output channels of
    each rescaled one were divided by, (C,); and the outputs of layers that cannot be rescaled and do not fit.
    """
    weights, factors = read_weights(network), network.ones()
    for interface in (interface for interface in network.interfaces if interface.blocked_by is None):
        tops, rows = network.ones() * 0, np.full(network.count, np.inf)
        for layer in network.layers:
            if np.isin(layer.result, interface.variables).any():
                weight, bias = weights[layer.weight], np.abs(weights[layer.bias])
                largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
                values = ranges[layer.output] * options.margin
                np.maximum.at(tops, layer.result, np.maximum(np.maximum(values, largest), bias))
                np.minimum.at(rows, layer.result, np.where(largest > 0, largest, np.inf))
        wanted = network.ones()
        wanted[interface.variables] = _factors(tops[interface.variables], rows[interface.variables])
        if np.any(wanted != 1):
            rescale(weights, network, wanted)
            factors *= wanted
    beyond = []
    for layer in network.layers:
        largest = max(float(np.abs(weights[name]).max()) for name in (layer.weight, layer.bias))
        if network.blocked_by(layer) != "Sigmoid":  # which makes 1 of infinity, as it makes of 65504
            largest = max(largest, float((ranges[layer.output] * options.margin / factors[layer.result]).max()))
        if largest > LARGEST:
            beyond.append(layer.output)
    return network.with_weights(weights), encode(network, factors), beyond


def find_large(network: Network, batches: Sequence[NDArray[Any]], limit: float) -> list[str]:
    """Tensors between the layers that exceed a limit on these images, of operators that can give more than they read.

    Also sums with a constant that FP16 does not hold as a normal number, such as the ε of a normalisation.
    """
    view, answers = GraphView(network.model), {node.output[0] for node in find_answers(network.model)}
    floats = {name for name, kind in find_types(network.model).items() if kind == TensorProto.FLOAT}
    names = {layer.name for layer in network.layers}
    made_by_layers = {layer.output for layer in network.layers}
    made_by_layers |= {node.output[0] for node in view.nodes if node.name in names}
    asked, found = [], []
    for node in view.nodes:
        name = node.output[0]
        if name not in floats - answers - made_by_layers or node.op_type in (*MOVES, *ACTIVATIONS, *POOLS, "Softmax"):
            continue
        makers = [view.made_by.get(read) for read in node.input]
        if node.op_type == "Mul" and any(maker is not None and maker.op_type in _BOUNDED for maker in makers):
            continue
        if all(maker is None for maker in makers):
            continue  # what is made of the image alone stays FP32
        constants = [value for value in map(view.constant, node.input) if value is not None and value.size]
        if any(0 < np.abs(value).max() < SMALLEST_NORMAL for value in constants):
            found.append(name)
        else:
            asked.append(name)
    ranges = dict.fromkeys(asked, 0.0)
    small = split_batches(network.model, batches, 4)
    for values in run_tensors(network.model, asked, small) if asked else ():
        for name, value in values.items():
            ranges[name] = max(ranges[name], float(np.abs(value).max(initial=0.0)))
    return found + [name for name, largest in ranges.items() if not largest <= limit]


def find_islands(network: Network, beyond: Sequence[str]) -> set[str]:
    """The outputs of the nodes that compute in FP32, so that tensors which FP16 does not hold stay in FP32.

    What makes such a tensor does, and what reads it; of those, what only moves it gives another one.
    """
    view, found, queue = GraphView(network.model), set[str](), list(beyond)
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        makers = [view.made_by[name]] if name in view.made_by else []
        makers += [m for m in map(view.made_by.get, makers[0].input if makers else ()) if m and m.op_type == "MatMul"]
        for node in (*makers, *view.readers.get(name, [])):
            found.add(node.output[0])
        grown = (node for node in view.readers.get(name, []) if node.op_type in (*MOVES, *POOLS, *_UNBOUNDED))
        queue += [node.output[0] for node in grown]
    return found


def _factors(top: Float64, rows: Float64) -> Float64:
    """Powers of two to divide channels by; 1 where FP16 holds them as they are.

    `top` is the largest value that has to do with a channel, `rows` the largest weight of its row, infinite for a row
    of zeros. Of a row only that matters: what is a thousand times smaller changes nothing that FP16 shows.
    """
    move = (top > LARGEST) | (rows < _TINY)
    top, rows = np.where(move, top, 1.0), np.where(move, rows, np.inf)
    wanted = np.maximum(np.minimum(top / _COMFORTABLE, rows / _LOWEST), top / _HIGHEST)
    return np.where(move, np.exp2(np.round(np.log2(wanted))), 1.0)


def find_ranges(parent: Parent, batches: Sequence[NDArray[Any]] | None) -> tuple[dict[str, Float64], RangeSource, int]:
    """Measures the ranges, or bounds them where there are no images (`batches` is None).

    Gives the largest absolute value of each output channel of every layer before its ReLU, float64 (C,), by tensor;
    what they are known from; and how many images were run.

    Raises:
        CalibrationError: The images do not do, or there are none and it is not known how an image becomes the input.
        ModelError: The metadata's statistics are of another graph.
    """
    if batches is not None:
        return measure_ranges(parent.network, batches), "images", count_images(batches)
    drawn = draw_batches(parent.metadata.spec)
    found = {name: value * UNSEEN for name, value in measure_ranges(parent.network, drawn).items()}
    stated = stated_ranges(parent.metadata.statistics)
    for name, value in stated.items():
        if name not in found:
            continue  # such as of a convolution of one dimension, which is no layer here
        if found[name].shape != value.shape:
            raise ModelError(
                f"the metadata states BatchNorm statistics of {value.size} channels of {name}, which has "
                f"{found[name].size}",
                remedy="export the model again",
            )
        # A channel that drawn images drive beyond that must fit, too.
        found[name] = np.maximum(found[name] / UNSEEN, value)
    return found, "statistics" if stated else "synthetic", count_images(drawn)


def measure_ranges(network: Network, batches: Iterable[NDArray[Any]]) -> dict[str, Float64]:
    """Largest absolute value of each output channel of every layer, by tensor; float64 (C,).

    Raises:
        CalibrationError: There are no images, or they hold or give NaN or infinite values.
    """
    found: dict[str, Float64] = {}
    axes = network.axes()
    for values in run_tensors(network.model, [layer.output for layer in network.layers], batches):
        widen_ranges(found, values, axes)
    if not found:
        raise CalibrationError(
            "there are no images to measure ranges on", remedy="give some images of the training split"
        )
    require_finite(found, "the images give", "look for NaN in the images and in the checkpoint")
    return found


def stated_ranges(statistics: Mapping[str, ChannelStatistics]) -> dict[str, Float64]:
    """|mean| + 256σ of each channel of every layer's output as the BatchNorm layers state them, by tensor."""
    outputs = {name: value for name, value in statistics.items() if not name.endswith(INPUT_SUFFIX)}
    return {
        name: np.abs(decode_channels(value.mean)) + DEVIATIONS * decode_channels(value.std)
        for name, value in outputs.items()
    }


def draw_batches(spec: ModelSpec, draw: Callable[[int, int], NDArray[np.uint8]] | None = None) -> list[NDArray[Any]]:
    """Drawn images as the model takes them; the same every time.

    `draw` gives images, uint8 (N, height, width, 3), of a height and a width; without it there are eight images: four
    smooth ones, noise, a chequerboard, black and white.

    Raises:
        CalibrationError: It is not known how an image becomes the input.
    """
    if spec.preprocessing is None:
        raise CalibrationError(
            "there are no images, and none can be drawn: how an image becomes this model's input is not known",
            remedy="give some batches as the model takes them",
        )
    last = spec.input.layout == "NHWC" or spec.input.dtype == "uint8"
    sizes = zip(spec.input.shape[1:3] if last else spec.input.shape[2:4], spec.preprocessing.crop, strict=True)
    height, width = (size if isinstance(size, int) else usual for size, usual in sizes)
    images: NDArray[Any] = (draw or _draw_images)(height, width)
    if spec.batch is not None:
        images = np.resize(images, (-(-len(images) // spec.batch) * spec.batch, *images.shape[1:]))
    if spec.input.dtype != "uint8":
        images = normalize(images, spec.preprocessing)
    size = spec.batch or len(images)
    return [images[start : start + size] for start in range(0, len(images), size)]


def _draw_images(height: int, width: int) -> NDArray[Any]:
    """uint8 (8, H, W, 3), with a power spectrum that falls with frequency, as natural images have (Field 1987)."""
    random = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    images = np.zeros((8, height, width, 3))
    for index, frequency in np.ndindex(4, 5):
        direction, phase = random.uniform(0, 2 * np.pi, (2, 3))
        along = np.cos(direction) * x[..., None] + np.sin(direction) * y[..., None]
        images[index] += np.sin(2 * np.pi * 2**frequency * along + phase) / 2**frequency
    images[:4] += random.normal(0, 0.1, images[:4].shape)
    images[4] = random.uniform(-1, 1, images[4].shape)
    images[5] = np.where((np.indices((height, width)) // 8).sum(0) % 2, 1.0, -1.0)[..., None]
    images[6], images[7] = -1.0, 1.0
    return np.clip(np.rint(127.5 + 127.5 * images), 0, 255).astype(np.uint8)
