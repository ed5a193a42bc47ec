"""RepVGG graphs with the statistics of trained ones, made layer by layer as folding makes them, with outliers injected.

Every block is the sum of a 3×3, a 1×1 and, where shapes allow, an identity branch, each with a BatchNorm whose running
statistics are those of its own output on drawn images: γ and β are drawn, and what is stored is the fused kernel. That
is where trained RepVGGs have their outliers from: an identity branch that reads a channel of tiny variance becomes one
tap that dwarfs the kernel (QARepVGG, https://arxiv.org/abs/2212.01593).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from repvgg_deploy.graph.edit import replace_weights, set_weights
from repvgg_deploy.precision.network import Layer, read_network, read_weights, scale_inputs
from repvgg_deploy.precision.ranges import columns, pick_positions
from repvgg_deploy.precision.run_onnx import LayerWalk
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import alternating_groups
from tests.precision.make_variant import make_variant

Outlier = Literal["none", "channel scales", "centre tap", "heavy weights", "grown activations"]
SIZE, CLASSES, OVERLAY, TRAINING, RIDGE = 32, 10, 0.4, 256, 1.0
DECAY = 1.0
DEPTHS, STRIDES = (2, 3, 4, 1), (1, 2, 2, 2, 1)
NETWORKS = {
    "g2": VariantSpec(
        "out-g2", DEPTHS, (16, 16, 32, 64, 128), alternating_groups(DEPTHS, 2), strides=STRIDES, num_classes=10
    ),
    "g4": VariantSpec(
        "out-g4", DEPTHS, (16, 16, 32, 64, 128), alternating_groups(DEPTHS, 4), strides=STRIDES, num_classes=10
    ),
    "se": VariantSpec(
        "out-se",
        DEPTHS,
        (16, 16, 32, 64, 128),
        alternating_groups(DEPTHS, 1),
        se="after_relu",
        strides=STRIDES,
        num_classes=10,
    ),
    "wide": VariantSpec(
        "out-wide",
        (1, 2, 3, 1),
        (32, 64, 96, 160, 192),
        alternating_groups((1, 2, 3, 1), 1),
        strides=STRIDES,
        num_classes=10,
    ),
}


@dataclass(frozen=True)
class Injection:
    """How strong each kind of outlier is.

    Attributes:
        octaves: Scales of channels span twice as many; they undo each other, and equalization can undo them.
        tap: How much less than others a quarter of the channels varies. Their means stay, and the identity branch that
            reads one divides by its deviation: one tap dwarfs a row, and carries little.
        heavy: One weight of each row, in units of the largest other; it reads an input that hardly varies.
        growth: From block to block, of what a quarter of the channels gives.
    """

    octaves: float = 3.0
    tap: float = 8.0
    heavy: float = 100.0
    growth: float = 1.7


def draw_images(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Normalised images of ten classes, (N, 3, 32, 32), and their classes.

    Each is its class's picture with another laid over it; all have the spectrum of photographs (amplitude 1/frequency).
    """
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, CLASSES, count)
    images = _pictures(CLASSES, np.random.default_rng(77))[classes] + OVERLAY * _pictures(count, generator)
    images -= images.mean(axis=(2, 3), keepdims=True)
    return (images / images.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32), classes


def _pictures(count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    frequency[0, 0] = 1 / SIZE
    grey, colour = (
        np.fft.ifft2(np.fft.fft2(generator.standard_normal((count, channels, SIZE, SIZE))) / frequency).real
        for channels in (1, 3)
    )
    pictures = grey + 0.4 * colour
    return np.asarray(pictures / pictures.std(axis=(1, 2, 3), keepdims=True), np.float64)


def batches(count: int, seed: int) -> list[NDArray[np.float32]]:
    return list(np.array_split(draw_images(count, seed)[0], max(1, count // 32)))


def make_trained_like(
    spec: VariantSpec, outlier: Outlier, *, seed: int = 0, strength: Injection = Injection()
) -> onnx.ModelProto:
    """The fused graph."""
    generator = np.random.default_rng(seed)
    model = make_variant(spec, seed=seed, size=SIZE)
    drawn, classes = draw_images(TRAINING, seed + 100)
    images = np.array_split(drawn, 8)
    network = read_network(model)
    blocks = [layer for layer in network.layers if layer.op_type == "Conv" and layer.weight_shape[2] == 3]
    walk = LayerWalk(model, images, budget_bytes=1 << 40)
    for layer in network.layers:
        x = np.concatenate(list(walk.advance(layer.input)))
        if layer.op_type == "Gemm":
            changed = dict(zip((layer.weight, layer.bias), _fit_head(x, classes), strict=True))
        elif layer in blocks:
            kernel, bias = _Block(layer, x, generator, (outlier, strength, blocks.index(layer))).fuse()
            changed = {layer.weight: kernel.astype(np.float32), layer.bias: bias.astype(np.float32)}
        else:
            changed = dict(
                zip((layer.weight, layer.bias), _fit_gate(layer, read_weights(network)[layer.weight], x), strict=True)
            )
        set_weights(model, changed)
    return _spread(model, generator, strength.octaves) if outlier == "channel scales" else model


def _fit_head(x: NDArray[np.float32], classes: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights and bias of a classifier fitted by ridge regression, so that logits are what training makes them."""
    centred = x.astype(np.float64) - x.mean(axis=0)
    wanted = 10.0 * (np.eye(CLASSES)[classes] - 1 / CLASSES)
    gram = centred.T @ centred
    weight = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ wanted).T
    return weight.astype(np.float32), (-weight @ x.mean(axis=0)).astype(np.float32)


def _fit_gate(
    layer: Layer, weight: NDArray[np.float32], x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A convolution of an SE block, scaled so that its output varies by 0.3 around 0.5: no gate is stuck."""
    given = x.reshape(x.shape[:2]).astype(np.float64) @ weight.reshape(layer.out_channels, -1).T
    scale = 0.3 / np.sqrt(given.var(axis=0) + 1e-12)
    return (weight * scale.reshape(-1, 1, 1, 1)).astype(np.float32), (0.5 - scale * given.mean(axis=0)).astype(
        np.float32
    )


class _Block:
    """One block: its input, and the branches that are summed into one kernel."""

    def __init__(
        self, layer: Layer, x: NDArray[np.float32], generator: np.random.Generator, how: tuple[Outlier, Injection, int]
    ) -> None:
        self._layer, self._generator = layer, generator
        self._outlier, self._strength, self._index = how
        self._few = generator.permutation(layer.out_channels) < layer.out_channels // 4
        self._seen = columns(x, layer, pick_positions(x, layer, 32, generator))  # (groups, positions, K)

    def fuse(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        layer, out = self._layer, self._layer.out_channels
        dense = self._draw(layer.weight_shape)
        if self._outlier == "heavy weights":
            self._make_heavy(dense.reshape(self._layer.groups, out // self._layer.groups, -1))
        point = np.zeros(layer.weight_shape)
        point[:, :, 1, 1] = self._draw(layer.weight_shape[:2])
        branches = [dense, point]
        if layer.in_channels == out and layer.strides == (1, 1):
            identity = np.zeros(layer.weight_shape)
            identity[np.arange(out), np.arange(out) % layer.weight_shape[1], 1, 1] = 1.0
            branches.append(identity)
        kernel, bias = np.zeros(layer.weight_shape), np.zeros(out)
        for branch in branches:
            scale, shift = self._normalise(branch)
            kernel += scale.reshape(-1, 1, 1, 1) * branch
            bias += shift
        return kernel, bias

    def _make_heavy(self, rows: NDArray[np.float64]) -> None:
        """In each row one weight dwarfs the others; it reads an input that hardly varies, and so carries no more."""
        for group, own in enumerate(rows):
            still = np.argsort(self._seen[group].std(axis=0))[: max(1, own.shape[1] // 10)]
            picks = self._generator.choice(still, len(own))
            own[np.arange(len(own)), picks] = self._strength.heavy * np.abs(own).max(axis=1)

    def _draw(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Random weights of a falling spectrum, as trained ones have: what a layer gives lies in few directions."""
        out, inner = shape[0] // self._layer.groups, int(np.prod(shape[1:]))
        rank = min(out, inner)
        falling = np.arange(1, rank + 1) ** -DECAY
        left, right = (
            self._generator.standard_normal((self._layer.groups, out, rank)),
            self._generator.standard_normal((rank, inner)),
        )
        return np.asarray(((left * falling) @ right).reshape(shape), np.float64)

    def _normalise(self, branch: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """γ/σ and β − γμ/σ of the branch's BatchNorm."""
        out, groups = self._layer.out_channels, self._layer.groups
        rows = branch.reshape(groups, out // groups, -1)
        given = np.concatenate([self._seen[g].astype(np.float64) @ rows[g].T for g in range(groups)], axis=1)
        mean, std = given.mean(axis=0), np.sqrt(given.var(axis=0) + 1e-5)
        gamma = np.exp(self._generator.normal(-0.5, 0.3, out))
        beta = self._generator.normal(0.3, 0.5, out) * gamma
        if self._outlier == "centre tap":
            gamma[self._few] /= self._strength.tap  # almost constant: the next block's identity branch divides by that
        if self._outlier == "grown activations":
            factor = np.where(self._few, self._strength.growth**self._index, 1.0)
            gamma, beta = gamma * factor, beta * factor
        return gamma / std, beta - gamma * mean / std


def _spread(model: onnx.ModelProto, generator: np.random.Generator, octaves: float) -> onnx.ModelProto:
    """Channels of very different scale, that equalization can undo."""
    network = read_network(model)
    weights = read_weights(network)
    for interface in (interface for interface in network.interfaces if interface.blocked_by is None):
        source = network.layer(interface.source)
        scale = np.exp2(generator.uniform(-octaves, octaves, source.out_channels))
        weights[source.weight] = (
            weights[source.weight] * scale.reshape(-1, *[1] * (len(source.weight_shape) - 1))
        ).astype(np.float32)
        weights[source.bias] = (weights[source.bias] * scale).astype(np.float32)
        for name in interface.readers:
            reader = network.layer(name)
            weights[reader.weight] = scale_inputs(
                weights[reader.weight].astype(np.float64), reader.groups, 1 / scale
            ).astype(np.float32)
    return replace_weights(model, weights)
