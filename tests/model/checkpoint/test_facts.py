"""A pickled module tells more than its tensors: what a RepVGG can express is used, all else is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint
from tests.model.checkpoint.own_modules import InstanceNorm, OwnConv, OwnRepVGG, PyramidPool, conv_bn, randomise
from tests.model.generated import SMALL, SMALL_PLUS, SMALL_SE, outputs, random_model


def save(module: object, folder: Path, *, modern: bool = True) -> Path:
    torch.save(module, folder / "m.pth", _use_new_zipfile_serialization=modern)
    return folder / "m.pth"


def assert_computes_the_same(path: Path, module: nn.Module) -> None:
    got, wanted = outputs(build_model(load_checkpoint(path))), outputs(module)
    # The same float32 operations; other kernels may be chosen for them.
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 1e-3}, {"strides": (1, 2, 2, 2, 1)}, {"strides": (2, 1, 2, 1, 2)}, {"strides": (1, 1, 1, 1, 1)}],
    ids=str,
)
def test_strides_and_epsilon_of_a_pickled_module_are_used(options, modern, tmp_path):
    module = randomise(OwnRepVGG(**options))
    assert_computes_the_same(save(module, tmp_path, modern=modern), module)


def test_epsilon_of_each_layer_is_used(tmp_path):
    module = randomise(OwnRepVGG())
    for index, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = (1e-5, 1e-3, 3e-2)[index % 3]
    assert_computes_the_same(save(module, tmp_path), module)


def test_other_strides_than_the_module_tells_are_refused_whether_the_tensors_fit_them_or_not(tmp_path):
    for strides in [(2, 1, 1, 2, 2), (2, 2, 2, 1, 2)]:
        path = save(randomise(OwnRepVGG(strides=strides)), tmp_path)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, strides=(2, 2, 2, 2, 2))
        assert "--strides out: the module tells them" in caught.value.remedy
        assert load_checkpoint(path).spec.strides == strides  # the remedy followed


def test_facts_say_who_told_them(tmp_path):
    checkpoint = load_checkpoint(save(randomise(OwnRepVGG(strides=(1, 2, 2, 2, 1), eps=1e-3)), tmp_path))
    assert checkpoint.spec.strides == (1, 2, 2, 2, 1) and checkpoint.spec.bn_eps == 1e-3
    (fact,) = checkpoint.facts
    assert fact.startswith("told by the pickled module: strides 1,2,2,2,1, BatchNorm epsilon 0.001")
    assert checkpoint.untold == ()


@pytest.mark.parametrize("spec", [SMALL, SMALL_SE, SMALL_PLUS], ids=lambda spec: spec.name)
def test_module_of_this_project_pickled_tells_everything(spec, tmp_path):
    module = random_model(replace(spec, strides=(1, 2, 2, 2, 2)))
    checkpoint = load_checkpoint(save({"model": nn.DataParallel(module)}, tmp_path))
    assert checkpoint.untold == () and checkpoint.spec.strides == (1, 2, 2, 2, 2)
    assert torch.equal(outputs(build_model(checkpoint)), outputs(module))


_ACTIVATIONS: list[tuple[Callable[[], nn.Module], str]] = [
    (nn.SiLU, "SiLU"),
    (nn.Identity, "Identity as the activation"),
    (functools.partial(nn.LeakyReLU, 0.1), r"LeakyReLU negative_slope 0\.1"),
    (nn.GELU, "GELU"),
    (nn.ReLU6, "ReLU6"),
    (nn.Hardswish, "Hardswish"),
    (nn.Mish, "Mish"),
    (nn.ELU, "ELU"),
    (nn.Softplus, "Softplus"),
    (nn.Tanh, "Tanh"),
]


@pytest.mark.parametrize(("act", "named"), _ACTIVATIONS, ids=[name for _, name in _ACTIVATIONS])
def test_another_activation_is_refused_by_name(act, named, tmp_path):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(save(randomise(OwnRepVGG(act=act)), tmp_path), strides=(2, 2, 2, 2, 2))
    assert "export_module(" in caught.value.remedy


def _with(change: Callable[[nn.Module], object]) -> nn.Module:
    module = randomise(OwnRepVGG())
    change(module)
    return module.eval()


def _set(path: str, value: nn.Module) -> Callable[[nn.Module], object]:
    parent, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(parent), name, value)


def _note(path: str, name: str, value: object) -> Callable[[nn.Module], object]:
    return lambda module: setattr(module.get_submodule(path), name, value)


def _hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("stage2.1.nonlinearity", nn.SiLU()), r"SiLU \(stage2\.1\.nonlinearity\)"),
        (_set("stage2.1.nonlinearity", nn.Identity()), r"no activation in some blocks \(stage2\.1\)"),
        (_set("stage1.0.more", nn.ReLU()), r"2 activations in a block"),
        (_set("stage1.0.rbr_dense.relu", nn.ReLU()), r"a ReLU within a branch \(stage1\.0\.rbr_dense\.relu\)"),
        (_note("stage1.0", "act", functional.silu), r"the function silu \(stage1\.0\.act\)"),
        (_note("stage1.0", "act", functools.partial(functional.leaky_relu, negative_slope=0.1)), "leaky_relu"),
        (_note("stage1.0", "residual_scale", 0.5), r"the factor residual_scale = 0\.5 \(stage1\.0\)"),
        (_set("gap", nn.AdaptiveMaxPool2d(1)), r"AdaptiveMaxPool2d output_size 1 \(gap\)"),
        (_set("gap", nn.AvgPool2d(2)), r"AvgPool2d kernel_size 2 \(gap\)"),
        (_set("gap", nn.AdaptiveAvgPool2d(2)), r"AdaptiveAvgPool2d output_size 2"),
        (_set("gap", PyramidPool()), r"own_modules\.PyramidPool \(gap\)"),
        (_set("stem_pool", nn.MaxPool2d(2)), r"MaxPool2d kernel_size 2 \(stem_pool\)"),
        (_set("head_act", nn.Softmax(1)), r"Softmax \(head_act\)"),
        (_set("stage1.0.rbr_dense", conv_bn(8, 8, 3, 2, padding=2, dilation=2)), r"dilation 2×2 \(stage1\.0"),
        (_set("stage1.0.rbr_dense", conv_bn(8, 8, 3, 2, padding_mode="reflect")), r"padding mode reflect"),
        (_set("stage1.0.rbr_dense", conv_bn(8, 8, 3, 2, padding=0)), r"padding 0×0 of a 3×3"),
        (_set("stage1.0.rbr_dense.conv", OwnConv(8, 8, 3, 2, 1, bias=False)), r"own_modules\.OwnConv as a convolution"),
        (_set("stage1.0.rbr_dense.bn", InstanceNorm(8)), r"own_modules\.InstanceNorm as a BatchNorm"),
        (_set("stage1.0.rbr_1x1", conv_bn(8, 8, 1, 1)), r"branches of different strides \(stage1\.0\)"),
        (_set("stage1.0.rbr_dense", conv_bn(8, 8, 3, (2, 1))), r"the stride 2×1"),  # type: ignore[arg-type]
        (lambda module: module.get_submodule("stage1").register_forward_hook(_hook), r"a forward hook"),
    ],
)
def test_what_a_repvgg_does_not_have_is_refused_naming_it_and_its_place(change, named, tmp_path):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(save(_with(change), tmp_path), strides=(2, 2, 2, 2, 2))
    assert "export_module(" in caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        _set("stage1.0.drop_path", nn.Dropout2d(0.1)),
        _set("drop", nn.Dropout(0.5)),
        _set("criterion", nn.CrossEntropyLoss()),
        _set("stage1.0.se", nn.Identity()),
        _set("gap", nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())),
        _set("stage1.0.rbr_dense.bn", nn.SyncBatchNorm(8)),
        _note("stage1.0", "act", functional.relu),
    ],
)
def test_what_changes_nothing_in_eval_is_taken(change, tmp_path):
    module = _with(change)
    for norm in module.modules():  # a fresh BatchNorm has its initial statistics
        if isinstance(norm, nn.SyncBatchNorm) and norm.running_var is not None:
            norm.running_var.fill_(0.5)
    checkpoint = load_checkpoint(save(module, tmp_path))
    assert torch.equal(checkpoint.state["linear.weight"], module.state_dict()["linear.weight"])
    assert checkpoint.untold == ()


def test_activation_as_a_function_is_not_told(tmp_path):
    module = randomise(OwnRepVGG(act=lambda: None, strides=(1, 2, 2, 2, 1)))
    path = save(module, tmp_path)
    with pytest.raises(CheckpointError, match="does not tell the activation") as caught:
        build_model(load_checkpoint(path))
    assert "--strides 1,2,2,2,1" in caught.value.remedy
    checkpoint = load_checkpoint(path, strides=(1, 2, 2, 2, 1))
    assert "stated by the user: strides 1,2,2,2,1" in " ".join(checkpoint.facts)
    assert torch.allclose(outputs(build_model(checkpoint)), outputs(module), rtol=1e-4)


def test_strides_that_a_pickled_module_contradicts_are_refused(tmp_path):
    path = save(randomise(OwnRepVGG(strides=(1, 2, 2, 2, 1))), tmp_path)
    with pytest.raises(CheckpointError, match=r"strides \[1, 2, 2, 2, 1\], asked for are \[2, 2, 2, 2, 2\]"):
        load_checkpoint(path, strides=(2, 2, 2, 2, 2))


def test_stride_behind_the_first_block_is_refused(tmp_path):
    module = randomise(OwnRepVGG())
    block = module.get_submodule("stage2.1")
    for name in ("rbr_dense.conv", "rbr_1x1.conv"):
        conv = block.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        conv.stride = (2, 2)
    with pytest.raises(CheckpointError, match=r"the stride 2×2 behind the first block of a stage"):
        load_checkpoint(save(module, tmp_path))


def test_wrapped_pickled_module_tells_its_facts(tmp_path):
    module = randomise(OwnRepVGG(strides=(1, 2, 2, 2, 1)))
    wanted = outputs(module)
    module.add_module("stage2", nn.DataParallel(module.get_submodule("stage2")))
    checkpoint = load_checkpoint(save(nn.DataParallel(module), tmp_path))
    assert checkpoint.spec.strides == (1, 2, 2, 2, 1)
    assert torch.allclose(outputs(build_model(checkpoint)), wanted, rtol=1e-4)
