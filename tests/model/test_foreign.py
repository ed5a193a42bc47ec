"""Blocks of other projects: each is one convolution in deploy form, and what reads them refuses what is no sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy.errors import CheckpointError, ParityError
from repvgg_deploy.model import beside
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.foreign import Reading, fold_reading, read_block
from tests.model.other_projects import (
    BLOCKS,
    LEFT,
    OWN,
    DetrBlock,
    Ghost,
    MobileOne,
    Official,
    Plus,
    UltraBlock,
    conv_bn,
)
from tests.model.random_blocks import randomise, relative_error

# One layer of up to 72 products against as many branches: a few float32 roundings.
FLOAT32 = 2e-6
# An exact fold: rounding of float64, of as many products.
FLOAT64 = 1e-13


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name][0]()
    randomise(block)
    return block.to(dtype).eval()


def run(block: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of an input whose sizes are no multiples of a stride."""
    x = torch.randn(
        2, 4 if isinstance(block, Ghost) else 8, 13, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    with torch.no_grad():
        return block(x, 0.0)[0] if isinstance(block, Plus) else block(x)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_one_convolution_in_deploy_form(name: str, dtype: torch.dtype, allowed: float) -> None:
    block, (_, size, kind) = make(name, dtype), BLOCKS[name]
    deploy = reparameterize(block)
    assert relative_error(run(deploy, dtype), run(block, dtype)) < allowed
    assert type(deploy) is (type(block) if kind == OWN else nn.Sequential)
    spatial = [m for m in deploy.modules() if isinstance(m, nn.Conv2d) and m.bias is not None and m.out_channels == 8]
    assert size in {conv.kernel_size[0] for conv in spatial}
    # what remains is the fold, an SE of two convolutions, and what stands before the sum of a RepGhost
    others = 2 * ("SE" in name) + ("Ghost" in name)
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 1 + others
    assert sum(isinstance(m, nn.BatchNorm2d) for m in deploy.modules()) == ("Ghost" in name)
    assert all(conv.weight.dtype == dtype for conv in spatial)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_not_changed_and_shares_nothing(name: str) -> None:
    block = make(name).train()
    before = copy.deepcopy(block.state_dict())
    state = torch.get_rng_state()
    deploy = reparameterize(nn.Sequential(block))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in block.modules())
    with torch.no_grad():
        for parameter in deploy.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())


def shift(conv: nn.Conv2d) -> Tensor:
    return conv.weight.roll(1, 3) if conv.kernel_size[0] > 1 else conv.weight.roll(1, 0)


MUTATIONS = {
    "sign": lambda conv: -conv.weight,
    "shifted kernel": shift,
    "a channel": lambda conv: torch.cat([conv.weight[:1] * 1.001, conv.weight[1:]]),
    "epsilon": lambda conv: conv.weight * (1 + 1e-5) ** 0.5,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_fold_that_is_wrong_is_caught(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(name)

    def wrong(reading: Reading, dtype: torch.dtype) -> nn.Conv2d:
        conv = fold_reading(reading, dtype)
        conv.weight = nn.Parameter(MUTATIONS[mutation](conv))
        return conv

    monkeypatch.setattr(beside, "fold_reading", wrong)
    candidate = read_block(block, "")
    assert candidate is not None
    with pytest.raises(ParityError if candidate.certain else CheckpointError, match=r"differs|no RepVGG block"):
        reparameterize(block)


@pytest.mark.parametrize("name", [n for n in BLOCKS if "stride" not in n and "LinearAdd" not in n])
def test_reading_without_one_of_its_branches_is_caught(name: str) -> None:
    block = make(name)
    candidate = read_block(block, "")
    assert candidate is not None
    trial = beside.Trial(block, [4, 8], 3)
    right = next(reading for reading in candidate.readings if trial.find_deploy_form([reading])[0] is not None)
    for left_out in range(1, len(right.branches)):
        fewer = right.branches[:left_out] + right.branches[left_out + 1 :]
        assert trial.find_deploy_form([right._replace(branches=fewer)])[0] is None


def test_half_precision_is_compared_in_float64_and_as_it_runs() -> None:
    block = make("original, YOLOv6, mmyolo").half()
    deploy = reparameterize(block)
    assert deploy.rbr_reparam.weight.dtype == torch.float16
    # half a unit of the last place of float16 is 5e-4; the training form itself rounds at each branch
    assert relative_error(run(deploy, torch.float16).float(), run(block, torch.float16).float()) < 5e-3


def test_plain_deploy_block_keeps_what_a_model_hangs_on_its_layers() -> None:
    block = make("ultralytics RepConv")
    deploy = reparameterize(block)
    assert (deploy.i, deploy.f, deploy.type) == (5, -1, "models.common.RepConvN")
    assert [name for name, _ in deploy.named_children()] == ["conv", "act"]


@pytest.mark.parametrize("name", ["MobileOne depthwise", "YOLO-NAS QARepVGGBlock with alpha", "timm RepMixer"])
def test_own_class_has_nothing_of_the_branches_left(name: str) -> None:
    deploy = reparameterize(make(name))
    folded = {n for n, _ in deploy.named_parameters()}
    assert {n.partition(".")[0] for n in folded} <= {"reparam_conv", "rbr_reparam"}
    assert not dict(deploy.named_buffers())
    assert not hasattr(deploy, "rbr_conv")


@pytest.mark.parametrize("name", LEFT)
def test_block_that_is_more_than_a_sum_of_plain_parts_is_listed(name: str) -> None:
    block, parts = LEFT[name]
    with pytest.raises(CheckpointError, match=rf"that may have branches: 1 \(\w+: {parts}\)"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 8, 1), block()))


def test_one_convolution_with_its_batchnorm_is_no_block() -> None:
    """YOLOv6's RealVGGBlock."""
    with pytest.raises(CheckpointError) as caught:
        reparameterize(nn.Sequential(conv_bn(3), nn.ReLU()))
    assert caught.value.message == "Sequential holds no RepVGG block in training form"


def test_wrong_forward_of_a_nameless_block_leaves_it_and_of_a_known_one_is_an_error() -> None:
    """yolov7's Sequentials have no names: they only nominate. `conv`, `bn` do."""

    class Halved(Official):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if hasattr(self, "rbr_reparam") else super().forward(0.5 * x)

    for kind in ("yolov7", ""):
        model = nn.Sequential(Halved(kind), Official())
        randomise(model)
        if kind:
            deploy = reparameterize(model)
            assert isinstance(deploy[0].rbr_dense, nn.Sequential)
            assert hasattr(deploy[1], "rbr_reparam")
        else:
            with pytest.raises(ParityError, match=r"^0: its folded form differs"):
                reparameterize(model)


def test_block_behind_the_sum_of_another_is_folded_too() -> None:
    class Nested(UltraBlock):
        def __init__(self) -> None:
            super().__init__()
            self.act = MobileOne()  # type: ignore[assignment]

    torch.manual_seed(0)
    block = Nested()
    randomise(block)
    deploy = reparameterize(block.eval())
    assert relative_error(run(deploy), run(block)) < FLOAT32
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 2


def test_block_inside_one_that_is_no_sum_is_folded() -> None:
    """As RT-DETR's CSPRepLayer, whose `conv1` and `conv2` are no branches."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.bottlenecks = conv_bn(1), conv_bn(1), nn.Sequential(DetrBlock(), DetrBlock())

        def forward(self, x: Tensor) -> Tensor:
            return self.bottlenecks(self.conv1(x)) + self.conv2(x)

    torch.manual_seed(0)
    block = Layer()
    randomise(block)
    deploy = reparameterize(block.eval())
    assert relative_error(run(deploy), run(block)) < 2 * FLOAT32
    assert isinstance(deploy.conv1, nn.Sequential)
    assert all(isinstance(each.conv, nn.Conv2d) for each in deploy.bottlenecks)
