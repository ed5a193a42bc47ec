"""What BatchNorms tell of a folded graph is what its layers read and give, and what the images were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import export_module
from repvgg_deploy.export.fold import fold_onnx
from repvgg_deploy.export.graph import trace
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.graph.batchnorm import decode_channels, name_input, read_statistics, read_trained_on
from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.precision.fp16 import to_fp16
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.specs.values import ChannelStatistics, TensorSpec
from tests.export.test_statistics import photos
from tests.model.random_blocks import train_on


class Block(nn.Module):
    """3×3, 1×1 and identity, each with a BatchNorm, then SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.square = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.point = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.square(x) - self.point(x)
        return nn.functional.silu(total if self.skip is None else total + self.skip(x))


class Small(nn.Module):
    """Two blocks, a layer without BatchNorm, and a sequence without activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(3, 16), Block(16, 16)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16))
        self.wide = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24))
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.wide(self.deep(self.two(self.one(x))))))


def train(images: Tensor) -> Small:
    """Its running statistics are those of these images."""
    torch.manual_seed(0)
    return train_on(Small(), images, draw_affine=True)


def decode(statistics: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
    return decode_channels(statistics.mean), decode_channels(statistics.std)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photos(8, 64)


@pytest.fixture(scope="module")
def exported(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained network as `export_module` writes it, and as torch itself does, with its BatchNorms."""
    folder, model = tmp_path_factory.mktemp("batchnorm"), train(images)
    export_module(model, images[:1], folder / "ours.onnx")
    shapes = (TensorSpec("x", "float32", ("batch", 3, 64, 64), "NCHW"), TensorSpec("y", "float32", ("batch",), "other"))
    onnx.save(trace(model, images[:1], opset=17, tensors=shapes, with_weights=True), folder / "theirs.onnx")
    return folder


def test_statistics_of_a_module_are_what_its_layers_read_and_give(exported: Path, images: Tensor) -> None:
    path, model = exported / "ours.onnx", train(images)
    stated = export_module(model, images[:1], path, options=ModuleOptions(force=True)).metadata.statistics
    layers = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    names = {name_input(node.output[0]): node.input[0] for node in layers}
    names |= {node.output[0]: node.output[0] for node in layers}
    (values,) = run_tensors(onnx.load(path), sorted({names[key] for key in stated}), [images.numpy()])
    # Of each layer but the last its output; what the identity's BatchNorm reads; what is summed without activation.
    assert len(layers) == 5 and len(stated) == 6
    sums = 0
    for key, statistics in stated.items():
        mean, std = decode(statistics)
        truth = values[names[key]].astype(np.float64)
        np.testing.assert_allclose(mean, truth.mean((0, 2, 3)), atol=2e-3)
        block = model.one if "one" in key else model.two
        if key.startswith(("/module/one/", "/module/two/")) and not key.endswith(".input"):
            # Of a sum, deviations are those of independent branches, which they are not quite.
            norms = [norm for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)]
            expected = torch.stack([norm.weight for norm in norms]).square().sum(0).sqrt().detach().numpy()
            np.testing.assert_allclose(std, expected, rtol=1e-6)
            sums += 1
        else:
            np.testing.assert_allclose(std, truth.std((0, 2, 3)), rtol=0.01)
    assert sums == 2


def test_fold_keeps_the_same_statistics_without_torch(exported: Path, images: Tensor, tmp_path: Path) -> None:
    ours = export_module(train(images), images[:1], tmp_path / "ours.onnx").metadata
    theirs = fold_onnx(exported / "theirs.onnx", tmp_path / "folded.onnx").metadata
    assert theirs is not None and len(theirs.statistics) == len(ours.statistics)
    assert list(theirs.statistics.values()) == list(ours.statistics.values())
    assert theirs.spec.trained_on == ours.spec.trained_on
    assert ours.spec.trained_on is not None
    np.testing.assert_allclose(ours.spec.trained_on.mean, images.mean((0, 2, 3)), atol=0.1)
    np.testing.assert_allclose(ours.spec.trained_on.std, images.std((0, 2, 3)), rtol=0.05)
    # What is folded already says no more, and keeps what it said.
    again = fold_onnx(tmp_path / "folded.onnx", tmp_path / "again.onnx").metadata
    assert again is not None and again.statistics == theirs.statistics
    folded = onnx.load(tmp_path / "folded.onnx")
    assert read_statistics(folded, folded) == {} and read_trained_on(folded) is None


class Sequential1d(nn.Module):
    """A layer of two dimensions, and one of one."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.line = nn.Sequential(nn.Conv1d(8, 8, 3, bias=False), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.flat(x).flatten(2))


def test_statistics_of_what_is_no_layer_of_fp16_are_left_aside(tmp_path: Path) -> None:
    options = ModuleOptions(preprocessing=default_preprocessing(16, 16))
    result = export_module(Sequential1d().eval(), torch.randn(1, 3, 16, 16), tmp_path / "m.onnx", options=options)
    typed, report = to_fp16(tmp_path / "m.onnx")
    assert report.source == "statistics" and len(report.largest) < len(result.metadata.statistics)
    (layer,) = report.largest
    # BatchNorms as they are made: mean 0 and deviation 1, so that 256 deviations are stated.
    assert report.largest[layer] == pytest.approx(256, rel=0.5)
    assert typed.metadata.history[-1].options["ranges"] == "statistics"
