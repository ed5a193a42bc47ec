"""The original code's entry points, against a small independent implementation of the original's behaviour."""

from __future__ import annotations

import copy
import os
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
from tests.model.other_projects import NasQuantBlock

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
    inner, tail, ours = model[1], model[3], model[4]
    x = torch.randn(2, 3, 16, 16)
    expected = model[:4](x)
    result = repvgg_model_convert(model, do_copy=False)
    assert result is model
    assert model[1] is inner
    assert model[3] is tail
    assert hasattr(inner, "rbr_reparam")
    assert not hasattr(inner, "rbr_dense")
    assert isinstance(model[4], DeployBlock)
    assert model[4] is ours
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


def shake(model: nn.Module) -> None:
    """BatchNorm as in the original's tools/verify.py: small variances, so that the network's outputs are large."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0, 0.1)


@torch.no_grad()
def test_loop_over_switch_to_deploy_converts_as_in_upstreams_verify_script() -> None:
    torch.manual_seed(0)
    model, x = create_RepVGG_A0(deploy=False).eval(), torch.randn(1, 3, 64, 64)
    shake(model)
    before, blocks = model(x), list(model.blocks().values())
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
    assert list(model.blocks().values()) == blocks
    assert all(isinstance(block, DeployBlock) for block in blocks)
    assert model.form == "deploy"
    assert set(model.state_dict()) == set(create_RepVGG_A0(deploy=True).state_dict())
    difference = relative_error(model(x), before)
    assert 0 < difference < FLOAT32_TOLERANCE  # nothing converted would be no difference
    model.stage0.switch_to_deploy()  # a block in deploy form passes
    assert relative_error(model(x), before) == difference


def test_switch_to_deploy_keeps_object_hooks_mode_and_trainability() -> None:
    block = next(iter(create_small().blocks().values()))
    seen: list[str] = []
    block.register_forward_hook(lambda *_: seen.append("hook"))
    block.rbr_dense.conv.weight.requires_grad_(False)  # type: ignore[union-attr]
    se = block.se
    block.train().switch_to_deploy()
    block(torch.randn(1, 3, 8, 8))
    assert seen == ["hook"]
    assert block.training
    assert block.deploy
    assert block.se is se
    assert not any(parameter.requires_grad for parameter in block.rbr_reparam.parameters())  # type: ignore[union-attr]
    assert list(block.state_dict()) == ["rbr_reparam.weight", "rbr_reparam.bias"]


CONVERT = """
import argparse, torch
from repvgg_deploy.upstream import create_RepVGGplus_by_name, repvgg_model_convert

parser = argparse.ArgumentParser()
parser.add_argument("load")
parser.add_argument("save")
parser.add_argument("-a", "--arch", default="RepVGG-A0")
args = parser.parse_args()
model = create_RepVGGplus_by_name(args.arch, deploy=False)
state = torch.load(args.load)
state = state.get("state_dict", state)
model.load_state_dict({key.replace("module.", ""): value for key, value in state.items()})
if "plus" in args.arch:
    model.switch_repvggplus_to_deploy()
    torch.save(model.state_dict(), args.save)
else:
    repvgg_model_convert(model, save_path=args.save)
"""


@torch.no_grad()
def test_script_that_does_what_upstreams_convert_does_writes_the_deploy_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = create_RepVGG_A0().eval(), torch.randn(1, 3, 64, 64)
    shake(model)
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "train.pth")
    (tmp_path / "convert.py").write_text(CONVERT)
    command = [sys.executable, "convert.py", "train.pth", "deploy.pth", "-a", "RepVGG-A0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
    deploy = create_RepVGG_A0(deploy=True).eval()
    deploy.load_state_dict(torch.load(tmp_path / "deploy.pth"))
    assert 0 < relative_error(deploy(x), model(x)) < FLOAT32_TOLERANCE


@torch.no_grad()
def test_switch_repvggplus_to_deploy_converts_the_object_itself() -> None:
    model, x = TinyPlus().eval(), torch.randn(2, 3, 64, 64)
    model.gradient_checkpointing = True
    expected = model(x)
    model.switch_repvggplus_to_deploy()
    assert 0 < relative_error(model(x), expected) < FLOAT32_TOLERANCE
    assert not model.gradient_checkpointing
    keys = list(model.state_dict())
    assert "stage3_second.blocks.1.rbr_reparam.bias" in keys
    assert not [key for key in keys if "aux" in key or "rbr_dense" in key]
    assert model.train()(x).shape == (2, 6)


@pytest.mark.parametrize("name", NAMES)
def test_create_plus_by_name_gives_every_network(name: str) -> None:
    with torch.device("meta"):
        model = upstream.create_RepVGGplus_by_name(name, deploy=True, use_checkpoint=True)
    assert model.spec == PUBLISHED[name if "plus" in name else name.removeprefix("RepVGG-")]
    assert model.form == "deploy"
    assert model.gradient_checkpointing


@torch.no_grad()
def test_strides_and_dilation_changed_in_place_are_folded_as_in_upstreams_pspnet() -> None:
    """The original's example sets stride, dilation and padding of the convolutions of its last two stages."""
    torch.manual_seed(0)
    training, deploy = create_small(), RepVGG(create_small().spec, "deploy")
    for model in (training, deploy):
        for stage, dilation in ((model.stage3, 2), (model.stage4, 4)):  # type: ignore[union-attr]
            for name, module in stage.named_modules():  # type: ignore[union-attr]
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if "rbr_dense" in name or "rbr_reparam" in name:
                        module.dilation = module.padding = (dilation, dilation)
    randomise(training)
    training, x = training.eval(), torch.randn(1, 3, 65, 65)
    expected = training.stage_outputs(x)["stage4"]
    assert expected.shape[2:] == (9, 9)
    by_function = copy.deepcopy(training)
    for module in training.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
    deploy.eval().load_state_dict(training.state_dict())
    for converted in (training, deploy, repvgg_model_convert(by_function)):
        assert 0 < relative_error(converted.stage_outputs(x)["stage4"], expected) < FLOAT32_TOLERANCE
    wrong = create_small()
    wrong.stage0.rbr_dense.conv.dilation = (2, 2)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"padding: expected \(2, 2\), found \(1, 1\)"):
        wrong.stage0.switch_to_deploy()


def test_block_by_upstreams_name_is_made_with_its_arguments_and_is_every_block_of_ours() -> None:
    training = upstream.RepVGGBlock(16, 16, 3, padding=1, groups=2, use_se=True)
    deploy = upstream.RepVGGBlock(3, 8, kernel_size=3, stride=2, padding=1, deploy=True)
    theirs = OriginalBlock((16, 16), 1, groups=2, se=1)
    assert set(training.state_dict()) == set(theirs.state_dict())
    assert (deploy.rbr_reparam.stride, deploy.deploy, training.deploy) == ((2, 2), True, False)
    model = create_small()
    assert sum(isinstance(module, upstream.RepVGGBlock) for module in model.modules()) == 6
    assert sum(isinstance(module, upstream.RepVGGBlock) for module in repvgg_model_convert(model).modules()) == 6
    assert not isinstance(nn.Conv2d(1, 1, 1), upstream.RepVGGBlock)
    with pytest.raises(InputError, match="expected"):
        upstream.RepVGGBlock(3, 8, 5, padding=2)
    with pytest.raises(InputError, match="no subclasses"):
        type("Mine", (upstream.RepVGGBlock,), {})


@torch.no_grad()
def test_blocks_have_what_upstreams_training_scripts_look_for() -> None:
    model = create_small().eval()
    randomise(model)
    losses = [module.get_custom_L2() for module in model.modules() if hasattr(module, "get_custom_L2")]
    assert len(losses) == 6
    torch.testing.assert_close(torch.stack(losses).sum(), model.custom_l2())
    kernel, bias = model.stage0.get_equivalent_kernel_bias()
    model.stage0.switch_to_deploy()
    torch.testing.assert_close(model.stage0.rbr_reparam.weight, kernel)
    torch.testing.assert_close(model.stage0.rbr_reparam.bias, bias)
    assert not hasattr(model.stage0, "get_custom_L2")


@torch.no_grad()
def test_activation_that_is_replaced_in_place_is_followed_in_both_forms() -> None:
    model, x = create_small().eval(), torch.randn(1, 3, 32, 32)
    randomise(model)
    relu = model(x)
    for block in model.blocks().values():
        block.nonlinearity = nn.SiLU()
    silu = model(x)
    assert relative_error(silu, relu) > 0.01
    assert relative_error(repvgg_model_convert(model)(x), silu) < FLOAT32_TOLERANCE


def test_convert_of_a_model_half_of_whose_blocks_are_converted_converts_the_rest() -> None:
    """YOLO-NAS's blocks hold a place for the folded convolution from the beginning."""
    model = nn.Sequential(repvgg_model_convert(small_net()[:1]), NasQuantBlock())
    randomise(model)
    converted: Any = repvgg_model_convert(model)
    assert converted[1].fully_fused
    assert not hasattr(converted[1], "branch_3x3")
