"""Every RepVGG variant and blocks of other projects, folded by algebra: a second opinion on `reparameterize`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import Engine, reparameterize
from repvgg_deploy.export.fold import fold_onnx
from repvgg_deploy.export.graph import trace
from repvgg_deploy.export.module import _fold
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import TensorSpec, VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED
from tests.export import make_modules
from tests.model.other_projects import BLOCKS, Ghost, Plus
from tests.model.random_blocks import randomise, small_variant

IMAGE = TensorSpec("input", "float32", ("batch", 3, 64, 96), "NCHW")
LOGITS = TensorSpec("logits", "float32", ("batch", 10), "NC")


def narrow(variant: VariantSpec) -> VariantSpec:
    """The same layers of a few channels each."""
    width = math.lcm(*variant.groups) * (4 * variant.se_reduction if variant.se != "none" else 2)
    return dataclasses.replace(variant, widths=(width,) * 5, num_classes=10)


VARIANTS = {
    "small": small_variant(num_classes=10),
    "small QARepVGG v1": small_variant("qarepvgg_v1", num_classes=10),
    "small QARepVGG v2": small_variant("qarepvgg_v2", num_classes=10),
    "small with SE": small_variant(se="before_relu", num_classes=10),
}
SLOW = {name: narrow(variant) for name, variant in PUBLISHED.items()} | {
    "A0 of full width": dataclasses.replace(PUBLISHED["A0"], num_classes=10)
}


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)  # fmt: skip
def test_fold_onnx_of_a_variant_in_training_form_has_the_kernels_of_reparameterize(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = RepVGG({**VARIANTS, **SLOW}[name], "training").eval()
    with torch.no_grad():
        randomise(network)
        given = trace(Logits(network), torch.zeros(2, 3, 64, 96), opset=17, tensors=(IMAGE, LOGITS), with_weights=True)
        onnx.save(given, tmp_path / "training.onnx")
        result = fold_onnx(tmp_path / "training.onnx", tmp_path / "deploy.onnx")
        deploy = reparameterize(network)
        x = torch.randn(3, 3, 64, 96)
        expected = deploy(x).numpy()
    blocks = deploy.blocks()
    assert len(result.report.folds) == len(blocks) and result.report.left == ()
    graph = onnx.load(tmp_path / "deploy.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and len(stored[node.input[1]][0, 0]) == 3]
    for node, (where, block) in zip(convolutions, blocks.items(), strict=True):
        for input_name, ours in zip(node.input[1:], block.rbr_reparam.parameters(), strict=True):  # type: ignore[union-attr, operator]
            # Both are sums in float64, in another order, rounded once.
            np.testing.assert_allclose(stored[input_name], ours.detach().numpy(), rtol=2e-7, atol=1e-10, err_msg=where)
    with Engine(tmp_path / "deploy.onnx") as engine:
        np.testing.assert_allclose(engine.infer(x.numpy()), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_fold_of_a_block_of_another_project_has_the_kernel_of_reparameterize(name: str) -> None:
    torch.manual_seed(0)
    block, size = BLOCKS[name][0](), BLOCKS[name][1]
    randomise(block)
    deploy = reparameterize(block)
    (ours,) = [
        m for m in deploy.modules() if isinstance(m, nn.Conv2d) and (m.kernel_size[0], m.out_channels) == (size, 8)
    ][-1:]
    shape = ("batch", 4 if isinstance(block, Ghost) else 8, 16, 16)
    tensors = (
        TensorSpec("input", "float32", shape, "NCHW"),
        TensorSpec("output", "float32", ("batch", 8, 16, 16), "NCHW"),
    )
    graph, report = _fold(
        trace(First(block.eval()), torch.zeros(2, *shape[1:]), opset=17, tensors=tensors, with_weights=True)
    )
    assert report.left == ()
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    folds = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(folds) == sum(isinstance(m, nn.Conv2d) for m in deploy.modules())
    (node,) = [node for node in folds if stored[node.input[1]].shape == ours.weight.shape]
    assert ours.bias is not None
    for theirs, mine in zip(node.input[1:], (ours.weight, ours.bias), strict=True):
        # Both are sums in float64, in another order, rounded once; of terms of up to 10.
        np.testing.assert_allclose(stored[theirs], mine.numpy(), rtol=2e-7, atol=1e-7)


class First(nn.Module):
    """A block's first output alone; RepVGGplus's takes a loss, too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.block(x, 0.0)[0] if isinstance(self.block, Plus) else self.block(x),)


class Logits(nn.Module):
    """The classifier's output alone."""

    def __init__(self, network: RepVGG) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.network.classify(self.network.stage_outputs(x)["stage4"]),)


@pytest.mark.slow
@pytest.mark.parametrize("name", make_modules.BLOCKS)
@pytest.mark.parametrize(("exporter", "opset"), [("legacy", 11), ("legacy", 20), ("dynamo", 18), ("dynamo", 22)])
def test_block_is_one_convolution_whichever_exporter_wrote_it(
    name: str, exporter: str, opset: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make_modules.make_module(make_modules.BLOCKS[name][0]())
    randomise(model)
    given, mode = tmp_path / "given.onnx", torch.onnx.TrainingMode
    options: dict[str, Any] = {"dynamo": True, "external_data": False}
    if exporter == "legacy":  # with BatchNorm as it is, and merged
        options = {"dynamo": False, "training": mode.PRESERVE if opset == 11 else mode.EVAL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.randn(1, 3, 17, 15),), given, opset_version=opset, **options)
    result = fold_onnx(given, tmp_path / "out.onnx")
    assert sum(node.op_type == "Conv" for node in onnx.load(tmp_path / "out.onnx").graph.node) == 2
    assert result.report.left == () and result.metadata is not None
