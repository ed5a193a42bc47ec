"""The original code's entry points, against a small independent implementation of the original's behaviour."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import upstream
from repvgg_deploy.errors import ArtifactError, CheckpointError, InputError
from repvgg_deploy.model.block import DeployBlock, TrainingBlock
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint, write_deploy
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.variants import PUBLISHED
from repvgg_deploy.upstream import (
    create_RepVGG_A0,
    create_RepVGG_D2se,
    create_RepVGGplus_L2pse,
    get_RepVGG_func_by_name,
    repvgg_model_convert,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name if name.startswith("RepVGG") else f"RepVGG-{name}" for name in PUBLISHED]
# Float32, another order of summation over up to 48 layers; the largest seen is 8e-7 of the largest output (A0, D2se,
# RepVGGplus).
FLOAT32_TOLERANCE = 1e-5


class OriginalBlock(nn.Module):
    """What the original's block does, written from its description: one object for both forms."""

    def __init__(self, channels: tuple[int, int], stride: int, groups: int = 1, post_se: int = 0, se: int = 0) -> None:
        super().__init__()
        before, after = self.channels = channels
        self.stride, self.groups, self.deploy = stride, groups, False
        self.se = OriginalSE(after, se) if se else nn.Identity()
        self.post_se = OriginalSE(after, post_se) if post_se else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(before) if before == after and stride == 1 else None
        self.rbr_dense = conv_bn(nn.Conv2d(before, after, 3, stride, 1, groups=groups, bias=False))
        self.rbr_1x1 = conv_bn(nn.Conv2d(before, after, 1, stride, 0, groups=groups, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            total = self.rbr_reparam(x)
        else:
            total = self.rbr_dense(x) + self.rbr_1x1(x) + (0 if self.rbr_identity is None else self.rbr_identity(x))
        result: Tensor = self.post_se(self.se(total).relu())
        return result

    def switch_to_deploy(self) -> None:
        """By probing: an affine block answers unit impulses with its kernel, and zero with its bias."""
        width = self.channels[0] // self.groups
        conv = nn.Conv2d(*self.channels, 3, self.stride, 1, groups=self.groups).double()
        probe = copy.deepcopy(self).double().eval()
        probe.se, probe.post_se = nn.Identity(), nn.Identity()

        def linear(x: Tensor) -> Tensor:
            identity = 0 if probe.rbr_identity is None else probe.rbr_identity(x)
            out: Tensor = probe.rbr_dense(x) + probe.rbr_1x1(x) + identity
            return out

        at = 2 if self.stride == 2 else 1
        zero = torch.zeros(1, width * self.groups, 3 + 2 * (at - 1), 3 + 2 * (at - 1), dtype=torch.float64)
        bias = linear(zero)[0, :, 1, 1]
        for group in range(self.groups):
            rows = slice(group * conv.out_channels // self.groups, (group + 1) * conv.out_channels // self.groups)
            for channel in range(width):
                for i in range(3):
                    for j in range(3):
                        x = zero.clone()
                        x[0, group * width + channel, at + i - 1, at + j - 1] = 1
                        conv.weight.data[rows, channel, i, j] = (linear(x)[0, :, 1, 1] - bias)[rows]
        assert conv.bias is not None
        conv.bias.data = bias
        self.rbr_reparam = conv.float()
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class OriginalSE(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.avg_pool2d(x, kernel_size=x.size(3))  # as the original: for square maps only
        result: Tensor = x * self.up(self.down(gate).relu()).sigmoid().view(-1, x.size(1), 1, 1)
        return result


def conv_bn(conv: nn.Conv2d) -> nn.Sequential:
    result = nn.Sequential()
    result.add_module("conv", conv)
    result.add_module("bn", nn.BatchNorm2d(conv.out_channels))
    return result


def original(name: str) -> nn.Module:
    """The original's network of that name, by its documented depths, multipliers and key names."""
    depths, multipliers = {"A": ((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)), "D": ((8, 14, 24, 1), (2.5, 2.5, 2.5, 5.0))}[
        name[0]
    ]
    widths = [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
    model, before = nn.Sequential(), min(64, widths[0])
    se = {"D2se": lambda c: c // 16}.get(name, lambda c: 0)
    model.add_module("stage0", OriginalBlock((3, before), 2, se=se(before)))
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        blocks = []
        for index in range(depth):
            blocks.append(OriginalBlock((before, width), 2 if index == 0 else 1, se=se(width)))
            before = width
        model.add_module(f"stage{stage}", nn.Sequential(*blocks))
    model.add_module("gap", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(before, 1000))
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random BatchNorm statistics and affine parameters: the initial ones are the identity, and prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.4, 1.2, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def small_net() -> nn.Sequential:
    """A model of someone's own around two of the original's blocks and two of ours."""
    torch.manual_seed(1)
    ours = [m for m in create_small().modules() if isinstance(m, TrainingBlock)][:2]
    model = nn.Sequential(
        OriginalBlock((3, 8), 2),
        OriginalBlock((8, 8), 1, groups=2, post_se=2),
        nn.Dropout(0.5),
        nn.Conv2d(8, 3, 1),
        *ours,
    )
    randomise(model)
    return model


def create_small() -> RepVGG:
    from repvgg_deploy.specs.values import VariantSpec

    return RepVGG(VariantSpec("small", (1, 1, 2, 1), (8, 8, 8, 16, 16), (1,) * 6, num_classes=5))


@pytest.mark.parametrize("name", NAMES)
def test_factory_of_each_published_name_has_upstreams_signature(name: str) -> None:
    with torch.device("meta"):
        training = get_RepVGG_func_by_name(name)()
        deploy = get_RepVGG_func_by_name(name)(deploy=True, use_checkpoint=True)
    function = getattr(upstream, f"create_{name.replace('-', '_')}")
    assert function is get_RepVGG_func_by_name(name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert training.spec == deploy.spec == PUBLISHED[name if "plus" in name else name.removeprefix("RepVGG-")]
    assert (training.form, deploy.form) == ("training", "deploy")
    assert (training.gradient_checkpointing, deploy.gradient_checkpointing) == (False, True)


def test_get_func_by_name_with_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'RepVGG-C1'[\s\S]*RepVGG-A0.*RepVGGplus-L2pse"):
        get_RepVGG_func_by_name("RepVGG-C1")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "create"), [("A0", create_RepVGG_A0), pytest.param("D2se", create_RepVGG_D2se, marks=pytest.mark.slow)]
)
def test_factory_with_upstreams_weights_gives_upstreams_output(name: str, create: upstream.Factory) -> None:
    theirs, ours = original(name), create()
    randomise(theirs)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    assert relative_error(ours.eval()(x), theirs.eval()(x)) < FLOAT32_TOLERANCE
    converted = repvgg_model_convert(ours)
    assert relative_error(converted(x), theirs(x)) < FLOAT32_TOLERANCE
    assert set(converted.state_dict()) == set(create(deploy=True).state_dict())


def test_d2se_keys_equal_upstreams() -> None:
    with torch.device("meta"):
        theirs, ours = original("D2se"), create_RepVGG_D2se()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@torch.no_grad()
def test_convert_of_a_bigger_model_equals_upstreams_conversion() -> None:
    model = small_net().eval()
    expected = copy.deepcopy(model[:4])
    for module in list(expected.modules()):
        if isinstance(module, OriginalBlock):
            module.switch_to_deploy()
    x = torch.randn(2, 3, 16, 16)
    converted: Any = repvgg_model_convert(model)
    # One order of summation against another over two blocks of 72 products: a few float32 roundings.
    assert relative_error(converted[:4](x), expected(x)) < 1e-6
    assert relative_error(converted[:4](x), model[:4](x)) < 1e-6
    assert list(converted[:4].state_dict()) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)


def test_convert_with_copy_leaves_the_argument_as_it_was() -> None:
    model = small_net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    converted = repvgg_model_convert(model)
    assert converted is not model
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not set(map(id, model.modules())) & set(map(id, converted.modules()))


@torch.no_grad()
def test_convert_in_place_converts_the_same_objects() -> None:
    model = small_net().eval()
    inner, tail = model[1], model[3]
    x = torch.randn(2, 3, 16, 16)
    expected = model[:4](x)
    result = repvgg_model_convert(model, do_copy=False)
    assert result is model
    assert model[1] is inner
    assert model[3] is tail
    assert hasattr(inner, "rbr_reparam")
    assert not hasattr(inner, "rbr_dense")
    assert isinstance(model[4], DeployBlock)
    assert relative_error(model[:4](x), expected) < 1e-6


@torch.no_grad()
def test_convert_in_place_of_our_network_keeps_the_object_and_its_output() -> None:
    model = create_small().eval()
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    expected, stage = model(x), model.get_submodule("stage3")
    result = repvgg_model_convert(model, do_copy=False)
    assert result is model
    assert model.form == "deploy"
    assert model.get_submodule("stage3") is stage
    assert relative_error(model(x), expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("training", [True, False])
def test_convert_keeps_mode_and_trainability(training: bool) -> None:
    model = small_net().train(training)
    model[3].weight.requires_grad_(False)
    model[2].train(not training)
    converted: Any = repvgg_model_convert(model)
    assert converted.training is training
    assert converted[2].training is not training
    assert not converted[3].weight.requires_grad
    assert converted[0].rbr_reparam.weight.requires_grad


@torch.no_grad()
def test_convert_of_a_deploy_form_passes_it_unchanged() -> None:
    once = repvgg_model_convert(small_net())
    twice = repvgg_model_convert(once)
    assert twice is not once
    assert repvgg_model_convert(once, do_copy=False) is once
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_convert_of_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no RepVGG block"):
        repvgg_model_convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


def test_convert_with_save_path_writes_a_state_dict_that_upstream_loads(tmp_path: Path) -> None:
    path = tmp_path / "deploy.pth"
    path.write_bytes(b"an older file, which upstream replaces")
    converted = repvgg_model_convert(small_net(), save_path=str(path))
    state = torch.load(path, weights_only=True)
    assert list(state) == list(converted.state_dict())
    theirs = copy.deepcopy(small_net()[:4])
    for module in list(theirs.modules()):
        if isinstance(module, OriginalBlock):
            module.switch_to_deploy()
    theirs.load_state_dict({key: tensor for key, tensor in state.items() if key[0] in "0123"})
    assert [item.name for item in tmp_path.iterdir()] == ["deploy.pth"]


def test_convert_with_save_path_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        repvgg_model_convert(small_net(), save_path=tmp_path / "nowhere" / "deploy.pth")


def test_convert_with_save_path_on_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    """The kernel refuses the write, in another process, because the limit cannot be lifted again."""
    path = tmp_path / "deploy.pth"
    path.write_bytes(b"older")
    code = (
        "import resource, signal, sys\nfrom tests.upstream.test_upstream import repvgg_model_convert, small_net\n"
        "model = small_net(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "repvgg_model_convert(model, sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )
    assert result.returncode == 1
    assert "ArtifactError" in result.stderr
    assert path.read_bytes() == b"older"
    assert [item.name for item in tmp_path.iterdir()] == ["deploy.pth"]


class TinyPlus(upstream.RepVGGplus):
    """RepVGGplus at a size for tests."""

    def __init__(self) -> None:
        from repvgg_deploy.specs.values import VariantSpec

        super().__init__(
            VariantSpec(
                "tiny", (1, 2, 4, 1), (8, 8, 8, 12, 16), (1,) * 9, "after_relu", 4, num_classes=6, auxiliary_heads=True
            )
        )
        randomise(self)


def test_repvggplus_keys_equal_upstreams() -> None:
    keys = list(TinyPlus().state_dict())
    assert "stage0.rbr_dense.conv.weight" in keys
    assert "stage3_first.blocks.1.rbr_identity.running_var" in keys
    assert "stage3_second.blocks.0.post_se.down.weight" in keys
    assert "stage4.blocks.0.rbr_1x1.bn.weight" in keys
    assert "stage1_aux.0.conv.weight" in keys
    assert not [key for key in keys if key.startswith(("stage1.0", "stage3.", "stage4.0"))]
    with torch.device("meta"):
        full = create_RepVGGplus_L2pse().state_dict()
    assert len({key.split(".")[2] for key in full if key.startswith("stage3_second.blocks.")}) == 12
    assert full["stage4.blocks.0.post_se.up.weight"].shape == (2560, 640, 1, 1)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_repvggplus_state_dict_loads_again_strictly_also_as_a_part(prefix: str) -> None:
    source, target = TinyPlus(), TinyPlus()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    holders = [nn.ModuleDict({"backbone": model}) if prefix else model for model in (source, target)]
    state = holders[0].state_dict()
    assert prefix + "stage2.blocks.1.rbr_dense.conv.weight" in state
    holders[1].load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    del state[prefix + "stage3_first.blocks.0.rbr_dense.conv.weight"]
    state[prefix + "stage9.weight"] = torch.zeros(1)
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*stage3\.0\.rbr_dense\.conv\.weight.*Unexpected key.*stage9"
    ):
        holders[1].load_state_dict(state)


def test_repvggplus_in_training_returns_upstreams_dict_and_logits_in_eval() -> None:
    model, x = TinyPlus(), torch.randn(2, 3, 64, 64)
    outputs = model.train()(x)
    assert set(outputs) == {"main", "stage1_aux", "stage2_aux", "stage3_first_aux"}
    assert {tuple(tensor.shape) for tensor in outputs.values()} == {(2, 6)}
    assert model.eval()(x).shape == (2, 6)


@torch.no_grad()
@pytest.mark.parametrize("do_copy", [True, False])
def test_repvggplus_converted_runs_and_equals_its_training_form(do_copy: bool) -> None:
    model, x = TinyPlus().eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = repvgg_model_convert(model, do_copy=do_copy)
    assert relative_error(converted(x), expected) < FLOAT32_TOLERANCE
    assert converted.train()(x).shape == (2, 6)
    keys = list(converted.state_dict())
    assert "stage3_second.blocks.1.rbr_reparam.bias" in keys
    assert not [key for key in keys if "aux" in key or "rbr_dense" in key]


def test_repvggplus_checkpoints_of_both_forms_are_read_as_what_they_are(tmp_path: Path) -> None:
    model = TinyPlus().eval()
    torch.save(model.state_dict(), tmp_path / "training.pth")
    deploy = repvgg_model_convert(model, tmp_path / "deploy.pth")
    write_deploy(deploy, tmp_path / "saved.pth")
    x = torch.randn(1, 3, 64, 64)
    for name, form in (("training", "training"), ("deploy", "deploy"), ("saved", "deploy")):
        checkpoint = load_checkpoint(tmp_path / f"{name}.pth", arch=model.spec)
        assert checkpoint.form == form
        with torch.no_grad():
            assert relative_error(build_model(checkpoint).eval()(x), model(x)) < FLOAT32_TOLERANCE
