"""Bigger models with RepVGG inside: a small PSPNet-like segmentation network, and blocks of other projects."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import Engine, export_module, reparameterize
from repvgg_deploy.errors import ContractError, InputError, ParityError
from repvgg_deploy.export import module as pipeline
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.model.network import RepVGG
from tests.model.random_blocks import randomise, small_variant
from tests.model.test_fold import OfficialBlock


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling (Zhao et al. 2017): means over 1×1 and 2×2 cells, projected, enlarged, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4))
            for size in (1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        pooled = [
            nn.functional.interpolate(torch.relu(level(x)), (height, width), mode="bilinear", align_corners=False)
            for level in self.levels
        ]
        return torch.cat([x, *pooled], dim=1)


class SmallPSPNet(nn.Module):
    """A RepVGG backbone with output stride 8, pyramid pooling, a segmentation head and an auxiliary one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RepVGG(small_variant(se="before_relu"), output_stride=8)
        self.pyramid = PyramidPooling(20)
        self.head = nn.Sequential(
            nn.Conv2d(28, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)
        )
        self.auxiliary = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = self.backbone.stage_outputs(x)
        size = (64, 96)
        outputs = {"classes": self.head(self.pyramid(stages["stage4"])), "auxiliary": self.auxiliary(stages["stage3"])}
        return {
            name: nn.functional.interpolate(out, size, mode="bilinear", align_corners=False)
            for name, out in outputs.items()
        }


@pytest.fixture
def network() -> SmallPSPNet:
    torch.manual_seed(0)
    model = SmallPSPNet()
    randomise(model)
    return model.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_export_module_pspnet_equals_its_training_form_in_the_engine(
    network: SmallPSPNet, image: Tensor, tmp_path: Path
) -> None:
    before = copy.deepcopy(network.state_dict())
    result = export_module(network, image, tmp_path / "psp.onnx", options=ModuleOptions(opset=18))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert result.metadata.certificate.passed
    assert "training form" in result.metadata.certificate.reference
    ops = [node.op_type for node in onnx.load(tmp_path / "psp.onnx").graph.node]
    # 9 blocks with 2 SE convolutions each, the stages' 2 pyramid, 2 head and 1 auxiliary convolutions: nothing is left
    # of the branches
    assert ops.count("Conv") == 9 * 3 + 5
    assert "BatchNormalization" not in ops
    with torch.no_grad():
        expected = {name: tensor.numpy() for name, tensor in network(image).items()}
    with Engine(tmp_path / "psp.onnx") as engine:
        assert engine.spec.kind == "module"
        found = engine.infer(image.numpy())
        assert isinstance(found, dict)
        assert set(found) == {"classes", "auxiliary"}
        for name, array in expected.items():
            # float32 rounding of some fifteen layers
            np.testing.assert_allclose(found[name], array, atol=2e-5 * np.abs(array).max(), rtol=0)
        assert engine.infer(image.numpy()[:1])["classes"].shape == (1, 6, 64, 96)  # type: ignore[call-overload, index]


def test_export_module_after_reparameterize_with_reference(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    deploy = reparameterize(network)
    alone = export_module(deploy, (image,), tmp_path / "alone.onnx")
    assert "no training form was given" in alone.metadata.certificate.reference
    both = export_module(deploy, (image,), tmp_path / "both.onnx", options=ModuleOptions(reference=network))
    assert "training form" in both.metadata.certificate.reference
    assert read_metadata(tmp_path / "both.onnx").history[0].stage == "export_module"


def test_export_module_wrong_reference_is_caught(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.backbone.blocks()["stage3.1"].get_submodule("rbr_1x1.conv").weight.mul_(1.01)  # type: ignore[operator, union-attr]
    with pytest.raises(ParityError, match="comparisons failed"):
        export_module(reparameterize(network), image, tmp_path / "m.onnx", options=ModuleOptions(reference=other))
    assert list(tmp_path.iterdir()) == []


def test_export_module_wrong_conversion_is_caught(
    network: SmallPSPNet, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block whose own forward skips its SE once it is converted, as two public projects have it."""

    class Forgetful(OfficialBlock):
        def forward(self, x: Tensor) -> Tensor:
            return (
                super().forward(x)
                if hasattr(self, "rbr_reparam")
                else super().forward(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))
            )

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Forgetful(4))
    randomise(model)
    with pytest.raises(ParityError, match="comparisons failed"):
        export_module(model.eval(), image, tmp_path / "m.onnx")


def test_export_module_blocks_of_other_projects(image: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), OfficialBlock(4, post_bn=True), OfficialBlock(4), nn.Conv2d(4, 2, 1))
    randomise(model)
    export_module(model.eval(), image, tmp_path / "m.onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("Conv") == 4


def test_export_module_dynamic_size_runs_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = RepVGG(small_variant())
    randomise(backbone)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.backbone.stage_outputs(x).values())

    names = ("c2", "c3", "c4", "c5")
    export_module(
        Features().eval(),
        torch.randn(1, 3, 64, 64),
        tmp_path / "f.onnx",
        options=ModuleOptions(dynamic_size=True, output_names=names),
    )
    with Engine(tmp_path / "f.onnx") as engine:
        found = engine.infer(np.zeros((1, 3, 96, 33), np.float32))
        assert isinstance(found, dict)
        assert [array.shape[2:] for array in found.values()] == [(24, 9), (12, 5), (6, 3), (3, 2)]


def test_export_module_identical_file_is_up_to_date(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    assert export_module(network, image, tmp_path / "m.onnx").output.status == "written"
    assert export_module(network, image, tmp_path / "m.onnx").output.status == "up to date"


def test_export_module_lone_batchnorm_is_refused_unless_allowed(image: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OfficialBlock(4), nn.ReLU(), nn.BatchNorm2d(4))
    randomise(model)
    with pytest.raises(ContractError, match="BatchNormalization"):
        export_module(model.eval(), image, tmp_path / "m.onnx")
    export_module(model.eval(), image, tmp_path / "m.onnx", options=ModuleOptions(allow_batchnorm=True))
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (torch.zeros(3, 64, 96), "one float32 tensor"),
        (torch.zeros(1, 3, 64, 96, dtype=torch.float64), "one float32 tensor"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), "one float32 tensor"),
        ((), "one float32 tensor"),
    ],
)
def test_export_module_bad_inputs_are_refused(network: SmallPSPNet, tmp_path: Path, inputs: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        export_module(network, inputs, tmp_path / "m.onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_export_module_bad_outputs_and_options_are_refused(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "no tensor"

    with pytest.raises(InputError, match="no tensors"):
        export_module(Text(), image, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="output_names"):
        export_module(network, image, tmp_path / "m.onnx", options=ModuleOptions(output_names=("one",)))
    with pytest.raises(InputError, match="opset"):
        export_module(network, image, tmp_path / "m.onnx", options=ModuleOptions(opset=12))


def test_export_module_mutated_file_is_caught(
    network: SmallPSPNet, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.write_model

    def write(path: Path, model: onnx.ModelProto) -> object:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.001)).tobytes()
        return original(path, model)

    monkeypatch.setattr(pipeline, "write_model", write)
    with pytest.raises(ParityError, match="against its ONNX"):
        export_module(network, image, tmp_path / "m.onnx")
