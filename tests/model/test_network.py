"""The whole network: counts, both forms, dilation, gradient checkpointing, auxiliary heads, parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from repvgg_deploy.errors import InputError
from repvgg_deploy.model.block import DeployBlock, TrainingBlock
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG, weight_decay_groups
from repvgg_deploy.specs.values import BlockKind, Form, SePosition
from repvgg_deploy.specs.variants import PUBLISHED, count_macs, count_parameters
from tests.model.random_blocks import KINDS, randomise, relative_error, small_variant

# Float64 over ten layers of up to 9 · 16 products; the largest seen is 3e-15.
FLOAT64_TOLERANCE = 1e-12


def build(kind: BlockKind = "repvgg", se: SePosition = "none", *, output_stride: int = 32, **changes: object) -> RepVGG:
    torch.manual_seed(0)
    model = RepVGG(small_variant(kind, se, **changes), output_stride=output_stride).double().eval()
    randomise(model)
    return model


def images(height: int = 64, width: int = 64, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def count_by_hooks(model: RepVGG, height: int, width: int) -> int:
    """Multiply-accumulates of every convolution and linear layer that really runs."""
    total = 0

    def add_macs(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += output[0].numel() * weight[0].numel()

    handles = [m.register_forward_hook(add_macs) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(torch.empty(1, 3, height, width, device="meta"))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_equals_that_of_the_real_network(name: str, form: Form) -> None:
    spec = PUBLISHED[name]
    with torch.device("meta"):
        model = RepVGG(spec, form)
    auxiliary = sum(p.numel() for n, p in model.named_parameters() if "_aux." in n)
    assert sum(p.numel() for p in model.parameters()) - auxiliary == count_parameters(spec, form)
    assert (auxiliary > 0) == (spec.auxiliary_heads and form == "training")


@pytest.mark.parametrize(("height", "width"), [(224, 224), (75, 130)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_equal_a_count_by_hooks_on_the_real_network(name: str, height: int, width: int) -> None:
    with torch.device("meta"):
        model = RepVGG(PUBLISHED[name], "deploy").eval()
    assert count_by_hooks(model, height, width) == count_macs(PUBLISHED[name], height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count_of_every_block_kind_equals_that_of_the_real_network(kind: BlockKind) -> None:
    for form in ("training", "deploy"):
        with torch.device("meta"):
            model = RepVGG(small_variant(kind), form)
        assert sum(p.numel() for p in model.parameters()) == count_parameters(model.spec, form)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "se"),
    [*((kind, "none") for kind in KINDS), ("repvgg", "before_relu"), ("repvgg", "after_relu"), ("plain", "after_relu")],
)
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (96, 32)])
def test_deploy_form_equals_training_form(kind: BlockKind, se: SePosition, size: tuple[int, int]) -> None:
    model, x = build(kind, se), images(*size)
    deploy = reparameterize(model)
    expected, found = model.stage_outputs(x), deploy.stage_outputs(x)
    assert {type(block) for block in deploy.blocks().values()} == {DeployBlock}
    assert deploy.form == "deploy"
    for name, stage in expected.items():
        assert relative_error(found[name], stage) < FLOAT64_TOLERANCE
    assert relative_error(deploy(x), model(x)) < FLOAT64_TOLERANCE
    # The outputs move from image to image by a million tolerances (nine SE blocks halve the signal each), or equality
    # shows nothing.
    assert float(model(x).std(0).max()) > 1e6 * FLOAT64_TOLERANCE * float(model(x).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_dilated_network_takes_the_same_weights_and_folds(output_stride: int) -> None:
    plain, dilated, x = build(), build(output_stride=output_stride), images(64, 96)
    dilated.load_state_dict(plain.state_dict())
    deploy = reparameterize(dilated)
    outputs = dilated.stage_outputs(x)
    strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    assert [tuple(t.shape[2:]) for t in outputs.values()] == [(64 // s, 96 // s) for s in strides]
    assert relative_error(deploy.stage_outputs(x)["stage4"], outputs["stage4"]) < FLOAT64_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilated_network_computes_what_the_strided_one_does_at_its_positions(output_stride: int) -> None:
    """Where a stride became a dilation, every second output of the dense map is the strided network's output."""
    plain, dilated, x = build(), build(output_stride=output_stride), images(64, 64)
    dilated.load_state_dict(plain.state_dict())
    step = 32 // output_stride
    strided, dense = plain.stage_outputs(x)["stage4"], dilated.stage_outputs(x)["stage4"]
    assert relative_error(dense[:, :, ::step, ::step], strided) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("output_stride", [0, 4, 64])
def test_network_with_another_output_stride_is_refused(output_stride: int) -> None:
    with pytest.raises(InputError, match="output_stride must be 8, 16 or 32"):
        RepVGG(small_variant(), output_stride=output_stride)


@pytest.mark.parametrize("kind", ["qarepvgg_v1", "qarepvgg_v2"])
def test_qarepvgg_with_se_is_refused_in_training_form_by_its_reason(kind: BlockKind) -> None:
    with pytest.raises(InputError, match="last BatchNorm after the SE block"):
        RepVGG(small_variant(kind, "before_relu"))


@pytest.mark.parametrize("classes", [1, 2, 10, 21_841])
def test_network_has_as_many_outputs_as_classes(classes: int) -> None:
    with torch.device("meta"):
        model = RepVGG(small_variant(num_classes=classes))
        assert model(torch.empty(3, 3, 64, 64)).shape == (3, classes)


def test_gradient_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    plain = build(se="after_relu").train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing = True
    for model in (plain, saving):
        (model(images()) ** 2).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)  # the same operations in the same order
    assert all(bool(parameter.grad.any()) for parameter in plain.parameters() if parameter.grad is not None)


def test_gradient_checkpointing_recomputes_only_in_training() -> None:
    model, calls = build(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.stage0.register_forward_pre_hook(count)  # before: the recomputation ends as soon as it has what it needs
    model.gradient_checkpointing = True
    model.train()(images()).sum().backward()
    assert calls == 2
    model.eval()(images()).sum().backward()
    assert calls == 3
    with torch.no_grad():
        model.train()(images())
    assert calls == 4


def test_auxiliary_heads_exist_in_training_form_only_and_learn() -> None:
    model = build(se="after_relu", auxiliary_heads=True).train()
    outputs = model.forward_with_auxiliary(images())
    assert list(outputs) == ["main", "stage1_aux", "stage2_aux", "stage3_first_aux"]
    assert {tuple(t.shape) for t in outputs.values()} == {(2, 5)}
    sum(t.sum() for t in outputs.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in model.parameters())
    deploy = reparameterize(model)
    assert not [name for name in deploy.state_dict() if "aux" in name]
    with pytest.raises(InputError, match="no auxiliary heads"):
        deploy.forward_with_auxiliary(images())
    with pytest.raises(InputError, match="no auxiliary heads"):
        build().forward_with_auxiliary(images())


@torch.no_grad()
def test_auxiliary_heads_leave_the_main_output_as_it_is() -> None:
    model = build(se="after_relu", auxiliary_heads=True)
    assert torch.equal(model.forward_with_auxiliary(images())["main"], model(images()))


def test_stage3_auxiliary_head_stands_in_the_middle_of_the_stage() -> None:
    model = build(se="after_relu", auxiliary_heads=True)
    model.forward_with_auxiliary(images())["stage3_first_aux"].sum().backward()
    reached = {name for name, block in model.blocks().items() if next(block.parameters()).grad is not None}
    assert reached == {"stage0", "stage1.0", "stage2.0", "stage2.1", "stage3.0", "stage3.1"}


@pytest.mark.parametrize("custom_l2", [True, False])
def test_weight_decay_groups_hold_every_parameter_once_and_decay_kernels_only(custom_l2: bool) -> None:
    model = build(se="before_relu", auxiliary_heads=True)
    decayed, plain = weight_decay_groups(model, 1e-4, custom_l2=custom_l2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, plain)]  # type: ignore[attr-defined]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == set(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    assert not [name for name in groups[0] if name.endswith(".bias") or ".bn." in name or "rbr_identity" in name]
    branch = {name for name in names.values() if name.endswith(("rbr_dense.conv.weight", "rbr_1x1.conv.weight"))}
    assert branch <= groups[1 if custom_l2 else 0]
    assert {"linear.weight", "stage1_aux.0.conv.weight", "stage1.0.se.down.weight"} <= groups[0]
    torch.optim.SGD([decayed, plain], lr=0.1)


def test_custom_l2_of_the_network_is_the_sum_of_its_blocks_and_trains_them() -> None:
    model = build()
    total = model.custom_l2()
    blocks = [block for block in model.blocks().values() if isinstance(block, TrainingBlock)]
    assert total.item() == pytest.approx(
        sum(block.custom_l2().item() for block in blocks), rel=1e-12
    )  # two orders of summation
    total.backward()
    assert all(block.rbr_dense.conv.weight.grad is not None for block in blocks)
    assert reparameterize(model).custom_l2().item() == 0


def test_network_trains_on_a_small_task() -> None:
    """A few steps with the custom L2 must lower the loss; then the deploy form must still agree."""
    model = build(num_classes=2).float().train()
    x, y = images(32, 32, 16).float(), torch.arange(16) % 2
    x[y == 1] += 0.5
    optimiser = torch.optim.SGD(weight_decay_groups(model, 1e-4), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimiser.zero_grad()
        (loss + 0.5e-4 * model.custom_l2()).backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        # Float32 over ten layers: the largest seen is 4e-7.
        assert relative_error(reparameterize(model)(x), model(x)) < 1e-5
