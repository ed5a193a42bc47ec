"""Bigger models with RepVGG inside: a small PSPNet-like segmentation network, and blocks of other projects."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import Engine, export_checkpoint, export_module, reparameterize
from repvgg_deploy.errors import CheckpointError, ContractError, ExportError, InputError, ParityError
from repvgg_deploy.export import module as pipeline
from repvgg_deploy.export.contract import check_module_contract
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.model.network import RepVGG
from tests.export.make_modules import BLOCKS, CHANNELS, Gate, Sum, conv_bn, make_module
from tests.model.checkpoint import own_modules
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


def operators(path: Path) -> Counter[str]:
    """How many of each kind are in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


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
    # the backbone's 9 blocks, 2 pyramid levels and the head's first convolution with its BatchNorm
    assert "in eval mode: 12 regions folded" in result.metadata.certificate.reference
    assert result.folded is not None and result.folded.left == ()
    assert result.metadata.history[0].options["regions_folded"] == 12
    ops = operators(tmp_path / "psp.onnx")
    # 9 blocks with 2 SE convolutions each, the stages' 2 pyramid, 2 head and 1 auxiliary convolutions: nothing is left
    # of the branches
    assert ops["Conv"] == 9 * 3 + 5
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
    assert alone.metadata.certificate.reference.startswith("the module as it was given, in eval mode: ")
    both = export_module(deploy, (image,), tmp_path / "both.onnx", options=ModuleOptions(reference=network))
    assert both.metadata.certificate.reference.startswith("the training form in eval mode: ")
    assert read_metadata(tmp_path / "both.onnx").history[0].stage == "export_module"


def test_export_module_wrong_reference_is_caught(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.backbone.blocks()["stage3.1"].get_submodule("rbr_1x1.conv").weight.mul_(1.01)  # type: ignore[operator, union-attr]
    with pytest.raises(ParityError, match="comparisons failed"):
        export_module(reparameterize(network), image, tmp_path / "m.onnx", options=ModuleOptions(reference=other))
    assert list(tmp_path.iterdir()) == []


def test_export_module_block_that_goes_wrong_when_converted_is_folded_as_it_is(image: Tensor, tmp_path: Path) -> None:
    """A block whose own forward skips its SE once it is converted, as two public projects have it."""

    class Forgetful(OfficialBlock):
        def forward(self, x: Tensor) -> Tensor:
            return (
                super().forward(x)
                if hasattr(self, "rbr_reparam")
                else super().forward(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))
            )

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Forgetful(4))
    randomise(model)
    result = export_module(model.eval(), image, tmp_path / "m.onnx")
    ops = operators(tmp_path / "m.onnx")
    assert (ops["Conv"], ops["Sigmoid"], ops["BatchNormalization"]) == (2, 2, 0)  # its SiLU and its gate
    assert result.metadata.certificate.passed


def test_export_module_blocks_of_other_projects(image: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), OfficialBlock(4, post_bn=True), OfficialBlock(4), nn.Conv2d(4, 2, 1))
    randomise(model)
    export_module(model.eval(), image, tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx")["Conv"] == 4


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


class TracedSize(nn.Module):
    """Runs at any size, but torch's trace keeps the example's height as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1, 1, int(x.shape[2]), 1)


def test_export_module_whose_graph_holds_for_one_size_only_is_refused_with_what_helps(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), TracedSize()).eval(), torch.randn(1, 3, 16, 16)
    with pytest.raises(ParityError, match="another size") as caught:
        export_module(model, x, tmp_path / "m.onnx", options=ModuleOptions(dynamic_size=True))
    assert caught.value.remedy is not None and "fixed size" in caught.value.remedy
    assert export_module(model, x, tmp_path / "m.onnx").metadata.certificate.passed


def test_export_module_identical_file_is_up_to_date(network: SmallPSPNet, image: Tensor, tmp_path: Path) -> None:
    assert export_module(network, image, tmp_path / "m.onnx").output.status == "written"
    assert export_module(network, image, tmp_path / "m.onnx").output.status == "up to date"


def test_export_module_lone_batchnorm_stays(image: Tensor, tmp_path: Path) -> None:
    """Behind a ReLU and before another it can go nowhere: the graph is right, and nobody could do more."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OfficialBlock(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    randomise(model)
    result = export_module(model.eval(), image, tmp_path / "m.onnx")
    ops = operators(tmp_path / "m.onnx")
    assert (ops["Conv"], ops["BatchNormalization"], ops["Add"]) == (2, 1, 0)
    assert result.folded is not None and result.folded.left == ()


def test_export_module_what_torch_cannot_export_is_refused(image: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ExportError, match="cannot export the model"):
        export_module(model.eval(), image, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("kind", "attributes", "remedy"),
    [
        ("Loop", {}, "torch.jit.script"),
        ("Dropout", {}, "self.training"),
        ("BatchNormalization", {"training_mode": 1}, "track_running_stats"),
    ],
)
def test_module_contract_refuses_training_mode_and_control_flow_with_what_helps(
    kind: str, attributes: dict[str, int], remedy: str
) -> None:
    graph = onnx.helper.make_graph([onnx.helper.make_node(kind, ["x"], ["y"], name="one", **attributes)], "g", [], [])
    with pytest.raises(ContractError, match=f"1 nodes are left .* {kind} one") as caught:
        check_module_contract(onnx.helper.make_model(graph))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", BLOCKS)
def test_export_module_block_of_any_network_is_one_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block, kernel = BLOCKS[name]
    model = make_module(block())
    randomise(model)
    result = export_module(model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx") == {"Conv": 2, "Relu": 1, "Sigmoid": 1, "Mul": 1}
    assert result.folded is not None and result.folded.folds[-1].kernel_after == kernel
    certificate = result.metadata.certificate
    assert certificate.passed and "folded" in certificate.reference and result.folded.left == ()
    assert [check.name for check in certificate.checks if check.name.endswith(f"→ {kernel}")]


@pytest.mark.parametrize("name", ["PP-YOLOE+", "MobileOne depthwise"])
def test_export_module_block_of_dynamic_size_is_one_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_module(BLOCKS[name][0]())
    randomise(model)
    options = ModuleOptions(dynamic_size=True, opset=20)
    export_module(model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx", options=options)
    assert operators(tmp_path / "m.onnx")["Conv"] == 2


def test_export_module_block_with_a_gate_keeps_the_gate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_module(nn.Sequential(Sum(conv_bn(3), conv_bn(1), nn.BatchNorm2d(8)), Gate()))
    randomise(model)
    export_module(model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx")
    ops = operators(tmp_path / "m.onnx")
    assert (ops["Conv"], ops["Sigmoid"], ops["Add"], ops["BatchNormalization"]) == (4, 2, 0, 0)


def test_export_module_sum_that_remains_is_told_with_its_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_module(Sum(conv_bn(3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)))
    randomise(model)
    result = export_module(model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx")
    reference = result.metadata.certificate.reference
    assert "sums of branches that remain: /module/" in reference and "count_include_pad=0" in reference
    assert result.metadata.history[0].options["sums_left"] == 1


class Float32Only(nn.Module):
    """A block whose result is made float32 whatever the model's dtype: a float64 copy of it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = make_module(BLOCKS["yolov7"][0]()), nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(x).float())
        return y


def test_export_module_that_runs_in_float32_only_is_folded_and_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Float32Only().eval(), torch.randn(1, 3, 17, 15)
    model(x)
    randomise(model)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).double()(x.double())
    result = export_module(model, x, tmp_path / "m.onnx")
    assert result.folded is not None and len(result.folded.folds) == 1
    assert all(check.passed for check in result.metadata.certificate.checks)


class Stacked(Sum):
    """Branches of one input, stacked, and summed or averaged over the stack."""

    def __init__(self, *branches: nn.Module, mean: bool = False) -> None:
        super().__init__(*branches)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        stack = torch.stack([part(x) for part in self.parts], dim=1)
        return stack.mean(1) if self.mean else stack.sum(1)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("opset", [17, 18])
def test_export_module_branches_that_are_stacked_are_one_convolution(mean: bool, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_module(Stacked(conv_bn(3), conv_bn(1), nn.Identity(), mean=mean))
    randomise(model)
    result = export_module(
        model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx", options=ModuleOptions(opset=opset)
    )
    assert result.folded is not None and result.folded.left == ()
    ops = operators(tmp_path / "m.onnx")
    assert ops.keys() & {"Concat", "Unsqueeze", "ReduceSum", "ReduceMean", "Sum", "Add"} == set()
    assert ops["Mul"] == ops["Sigmoid"]  # of SiLU


def test_export_module_in_training_mode_is_exported_in_eval_and_not_changed(tmp_path: Path) -> None:
    model = make_module(BLOCKS["yolov7"][0]())
    randomise(model)
    before = copy.deepcopy(model.train().state_dict())
    export_module(model, torch.randn(2, 3, 17, 15), tmp_path / "m.onnx")
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_export_module_reference_in_training_mode_is_compared_in_eval_and_not_changed(tmp_path: Path) -> None:
    model = make_module(BLOCKS["yolov7"][0]())
    randomise(model)
    reference = copy.deepcopy(model).train()
    before = copy.deepcopy(reference.state_dict())
    options = ModuleOptions(reference=reference)
    export_module(model.eval(), torch.randn(2, 3, 17, 15), tmp_path / "m.onnx", options=options)
    assert reference.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())


class Fixed(nn.Module):
    """Works on one batch, or one size, only."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.conv, self.axis = conv_bn(3), axis
        self.first = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.first(x)))
        return x * torch.ones([2, 1, 17, 15][self.axis]).reshape([-1 if i == self.axis else 1 for i in range(4)])


@pytest.mark.parametrize(("axis", "option"), [(0, "dynamic_batch"), (3, "dynamic_size")])
def test_export_module_that_does_not_run_on_another_batch_or_size_is_refused_with_what_helps(
    axis: int, option: str, tmp_path: Path
) -> None:
    model, image = Fixed(axis), torch.randn(2, 3, 17, 15)
    randomise(model)
    with pytest.raises(InputError, match=r"but not on another (batch|size)") as caught:
        export_module(model.eval(), image, tmp_path / "m.onnx", options=ModuleOptions(dynamic_size=axis == 3))
    assert f"{option}=False" in caught.value.remedy
    export_module(model.eval(), image, tmp_path / "m.onnx", options=ModuleOptions(dynamic_batch=axis == 3))


def test_export_module_of_dynamic_size_names_what_varies(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_module(conv_bn(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.body(x)
            return {"rows": x.flatten(2), "mean": x.mean((2, 3), keepdim=True), "all": x.mean((0, 2, 3))}

    model = Rows()
    randomise(model)
    options = ModuleOptions(dynamic_size=True)
    export_module(model.eval(), torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", options=options)
    shapes = {output.name: output.shape for output in read_metadata(tmp_path / "m.onnx").spec.outputs}
    assert shapes == {"rows": ("batch", 8, "rows_2"), "mean": ("batch", 8, 1, 1), "all": (8,)}
    with Engine(tmp_path / "m.onnx") as engine:
        assert engine.infer(np.ones((1, 3, 9, 7), np.float32))["rows"].shape == (1, 8, 63)  # type: ignore[call-overload, index]


def test_export_module_convolution_of_two_batchnorms_is_right(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = conv_bn(3)[0], nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.one(self.conv(x))) + torch.sigmoid(self.two(self.conv(x)))

    model = make_module(Shared())
    randomise(model)
    assert export_module(model.eval(), torch.randn(1, 3, 17, 15), tmp_path / "m.onnx").metadata.certificate.passed


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


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("state", _STATES)
def test_export_is_the_same_whatever_state_torch_is_in_and_leaves_it(state: str, tmp_path: Path) -> None:
    module = nn.Sequential(conv_bn(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 2))
    image = torch.randn(1, CHANNELS, 16, 16)
    sample = Path(__file__).parents[2] / "models" / "sample" / "repvgg-sample.pth"
    export_module(module, image, tmp_path / "plain.onnx")
    export_checkpoint(sample, tmp_path / "sample.onnx")
    with _STATES[state]():
        before = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.empty(1).device
        # An identical file: the same graph, weights and certificate.
        assert export_module(module, image, tmp_path / "plain.onnx").output.status == "up to date"
        assert export_checkpoint(sample, tmp_path / "sample.onnx").output.status == "up to date"
        assert (torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.empty(1).device) == before


class Constant(nn.Module):
    """Gives one value, whatever it is given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x.mean((2, 3)), self.value)


@pytest.mark.parametrize("kind", ["dead", "NaN", "another reference"])
def test_parity_errors_name_no_option_that_a_module_does_not_have(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(conv_bn(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    given = {"dead": Constant(1.0), "NaN": Constant(float("nan")), "another reference": module}[kind]
    other = copy.deepcopy(module)
    nn.init.normal_(next(other.parameters()))
    options = ModuleOptions(reference=other if kind == "another reference" else None)
    with pytest.raises(ParityError) as caught:
        export_module(given, torch.randn(1, CHANNELS, 16, 16), tmp_path / "m.onnx", options=options)
    for command in ("--arch", "--ckpt", "--strides", "repvgg-export"):
        assert command not in str(caught.value)


def test_a_module_that_its_checkpoint_sends_to_export_module_is_exported_there(tmp_path: Path) -> None:
    model = own_modules.randomise(own_modules.OwnRepVGG(act=nn.SiLU))
    torch.save(model, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(tmp_path / "m.pth", tmp_path / "c.onnx")
    assert "export_module" in caught.value.remedy
    export_module(model, torch.randn(1, 3, 32, 32), tmp_path / "m.onnx")
