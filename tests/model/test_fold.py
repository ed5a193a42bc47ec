from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy.errors import CheckpointError, InputError, ParityError
from repvgg_deploy.model.block import BlockSpec, TrainingBlock, fold_block
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import SePosition
from tests.model.random_blocks import build_block, randomise, relative_error, small_variant

# Two float32 computations of a nine-layer network: each layer rounds to 6e-8 of its largest value.
FLOAT32 = 5e-6


def build_network(**changes: object) -> RepVGG:
    torch.manual_seed(0)
    model = RepVGG(small_variant(**changes))  # type: ignore[arg-type]
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("se", ["before_relu", "after_relu"])
def test_reparameterize_se_network_keeps_the_se(se: SePosition) -> None:
    model = build_network(se=se)
    deploy = reparameterize(model)
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < FLOAT32
    names = {name for name in model.state_dict() if ".se." in name or ".post_se." in name}
    assert names
    assert {name for name in deploy.state_dict() if ".se." in name or ".post_se." in name} == names


def test_reparameterize_never_changes_or_shares_its_argument() -> None:
    model = build_network(se="before_relu").train()
    before = copy.deepcopy(model.state_dict())
    deploy = reparameterize(model)
    assert model.training
    with torch.no_grad():
        for parameter in deploy.parameters():
            parameter.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_reparameterize_drops_auxiliary_heads() -> None:
    model = build_network(se="after_relu", auxiliary_heads=True)
    deploy = reparameterize(model)
    assert not any("aux" in name for name in deploy.state_dict())
    assert RepVGG(deploy.spec, "deploy").state_dict().keys() == deploy.state_dict().keys()


def test_reparameterize_deploy_form_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no RepVGG block in training form"):
        reparameterize(reparameterize(build_network()))


def test_fold_block_in_pieces_equals_fold_at_once() -> None:
    # Wide enough for several pieces of 2^21 elements.
    spec = BlockSpec(in_channels=512, out_channels=512, has_identity=True)
    block = build_block(spec, dtype=torch.float64)
    folded = fold_block(block)
    with torch.no_grad():
        whole = block.equivalent_kernel_bias()
    assert 512 * 512 * 9 > 2**21
    assert torch.equal(folded.rbr_reparam.weight, whole.kernel)
    assert folded.rbr_reparam.bias is not None and whole.bias is not None
    assert torch.equal(folded.rbr_reparam.bias, whole.bias)


def test_fold_block_float32_rounds_once() -> None:
    block = build_block(BlockSpec(in_channels=6, out_channels=6, groups=2, has_identity=True), dtype=torch.float32)
    folded = fold_block(block)
    with torch.no_grad():
        exact = copy.deepcopy(block).double().equivalent_kernel_bias()
    assert torch.equal(folded.rbr_reparam.weight, exact.kernel.float())


class OfficialBlock(nn.Module):
    """A block of another code base: official names of parts, own forward, another activation."""

    def __init__(self, channels: int, *, post_bn: bool = False, bare: bool = False) -> None:
        super().__init__()
        self.deploy = False
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(channels, channels, 3, 1, 2, 2, 2, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(channels))
        pointwise = nn.Conv2d(channels, channels, 1, groups=2, bias=False)
        self.rbr_1x1: nn.Module = pointwise
        if not bare:
            self.rbr_1x1 = nn.Sequential()
            self.rbr_1x1.add_module("conv", pointwise)
            self.rbr_1x1.add_module("bn", nn.BatchNorm2d(channels))
        self.rbr_identity = nn.Identity() if bare else nn.BatchNorm2d(channels)
        if post_bn:
            self.bn = nn.BatchNorm2d(channels)
        self.nonlinearity = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.rbr_reparam(x))
        out = self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x)
        return self.nonlinearity(self.bn(out) if hasattr(self, "bn") else out)


class TimmBlock(nn.Module):
    """timm's names: the folded convolution is a plain None until conversion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reparam_conv = None
        self.conv_kxk, self.conv_1x1 = (self._conv_bn(channels, size) for size in (3, 1))
        self.identity = nn.BatchNorm2d(channels)

    @staticmethod
    def _conv_bn(channels: int, size: int) -> nn.Module:
        part = nn.Sequential()
        part.add_module("conv", nn.Conv2d(channels, channels, size, 1, size // 2, bias=False))
        part.add_module("bn", nn.BatchNorm2d(channels))
        return part

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return torch.relu(self.reparam_conv(x))
        return torch.relu(self.conv_kxk(x) + self.conv_1x1(x) + self.identity(x))


class MmBlock(nn.Module):
    """mmpretrain's names: `norm` in place of `bn`, and a flag."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deploy = False
        self.branch_3x3, self.branch_1x1 = (self._conv_norm(channels, size) for size in (3, 1))
        self.branch_norm = nn.BatchNorm2d(channels)

    @staticmethod
    def _conv_norm(channels: int, size: int) -> nn.Module:
        part = nn.Sequential()
        part.add_module("conv", nn.Conv2d(channels, channels, size, 1, size // 2, bias=False))
        part.add_module("norm", nn.BatchNorm2d(channels))
        return part

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return torch.relu(self.branch_reparam(x))
        return torch.relu(self.branch_3x3(x) + self.branch_1x1(x) + self.branch_norm(x))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(lambda: OfficialBlock(4), id="official"),
        pytest.param(lambda: OfficialBlock(4, post_bn=True), id="qarepvgg-v1"),
        pytest.param(lambda: OfficialBlock(4, post_bn=True, bare=True), id="qarepvgg-v2"),
        pytest.param(lambda: TimmBlock(4), id="timm"),
        pytest.param(lambda: MmBlock(4), id="mmpretrain"),
    ],
)
def test_reparameterize_blocks_of_other_projects_inside_a_bigger_model(block) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block(), nn.Upsample(scale_factor=2), block(), nn.Conv2d(4, 2, 1)
    )
    randomise(model)
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    deploy = reparameterize(model)
    x = torch.randn(2, 3, 20, 14)
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < FLOAT32
    assert sum(p.numel() for p in model.parameters()) == parameters
    inner = deploy[2]
    assert type(inner) is type(model[2])
    assert sum(isinstance(m, nn.Conv2d) for m in inner.modules()) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in inner.modules())


def test_reparameterize_one_block_gives_a_deploy_block() -> None:
    block = build_block(BlockSpec(in_channels=4, out_channels=8, stride=2), dtype=torch.float32)
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        assert relative_error(reparameterize(block)(x), block(x)) < FLOAT32
    assert isinstance(block, TrainingBlock)


def test_reparameterize_unknown_branch_is_refused() -> None:
    block = OfficialBlock(4)
    block.rbr_identity = nn.ReLU()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="expected a convolution"):
        reparameterize(nn.Sequential(block))


def test_reparameterize_qarepvgg_with_se_names_the_reason() -> None:
    block = OfficialBlock(4, post_bn=True)
    block.se = nn.Conv2d(4, 4, 1)
    with pytest.raises(CheckpointError, match="after the SE block"):
        reparameterize(nn.Sequential(block))


class OneMore(nn.Module):
    """A block of the original's names whose forward does something that the names do not tell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(4))
        self.rbr_1x1 = nn.Conv2d(4, 4, 1, bias=False)
        self.rbr_identity = nn.Identity()
        if kind == "branch":
            self.rbr_max = nn.MaxPool2d(3, 1, 1)
        if kind == "factor":
            self.beta = nn.Parameter(torch.tensor([0.6]))
        if kind == "gate":
            self.se_layer = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return torch.relu(self.rbr_reparam(x))
        total = self.rbr_dense(x) + self.rbr_identity(x)
        if self.kind == "branch":
            return torch.relu(total + self.rbr_1x1(x) + self.rbr_max(x))
        if self.kind == "factor":
            return torch.relu(total + self.beta * self.rbr_1x1(x))
        total = total + self.rbr_1x1(x)
        return torch.relu(total * torch.sigmoid(self.se_layer(total)) if self.kind == "gate" else total - 0.1 * x)


@pytest.mark.parametrize(
    ("kind", "part"), [("branch", "rbr_max"), ("factor", "beta"), ("gate", "se_layer"), ("less", "does more than")]
)
def test_reparameterize_block_that_does_more_than_its_names_tell_is_refused(kind: str, part: str) -> None:
    torch.manual_seed(0)
    block = OneMore(kind)
    randomise(block)
    with pytest.raises(ParityError, match=f"^1: its folded form differs.*{part}"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 4, 1), block))


def test_reparameterize_block_that_gives_zeros_only_is_refused() -> None:
    block = OfficialBlock(4)
    with torch.no_grad():
        for norm in (block.rbr_dense[1], block.rbr_1x1[1], block.rbr_identity):  # type: ignore[index]
            norm.weight.zero_()
    with pytest.raises(ParityError, match="nothing but zeros for random input"):
        reparameterize(nn.Sequential(block))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b.rbr_dense, "conv", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "padding mode"),
        (lambda b: setattr(b.rbr_dense, "conv", nn.Conv2d(4, 4, 3)), "padding of a branch"),
        (lambda b: setattr(b, "rbr_1x1", nn.Conv2d(4, 4, 1, 2)), "stride of a branch"),
        (lambda b: setattr(b, "rbr_1x1", nn.Conv2d(4, 4, 1, groups=2)), "groups of a branch"),
        (lambda b: setattr(b, "rbr_1x1", nn.Conv2d(4, 4, 3, padding=2, dilation=2)), "kernel and dilation"),
        (lambda b: setattr(b, "rbr_1x1", nn.Conv2d(4, 8, 1)), "channels of a branch"),
        (lambda b: setattr(b, "rbr_dense", nn.ReLU()), r"rbr_dense: expected a convolution .* found ReLU"),
        (lambda b: setattr(b.rbr_dense, "bn", nn.BatchNorm2d(4, track_running_stats=False)), "running statistics"),
        (
            lambda b: delattr(b, "rbr_1x1"),
            "has the parts rbr_dense, rbr_identity, which are not those of a known block",
        ),
    ],
    ids=str,
)
def test_reparameterize_block_of_known_names_that_is_no_sum_is_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    block = OneMore("")
    change(block)
    with pytest.raises(CheckpointError, match=f"^1.*{message}"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 4, 1), block))


class Beside(nn.Module):
    """Two branches of names that mean nothing, and what a forward makes of them."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], *more: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = (TimmBlock._conv_bn(4, size) for size in (3, 1))
        self.more = nn.Sequential(*more)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.combine(self.conv1(x), self.conv2(x)))


NO_SUMS = {
    "difference": lambda one, two: one - two,
    "concatenation": lambda one, two: torch.cat([one, two], 1),
    "gate": lambda one, two: one * torch.sigmoid(two),
    "factor": lambda one, two: one + 0.5 * two,
    "another activation": lambda one, two: torch.tanh(one + two),
    "activation of one": lambda one, two: torch.relu(one) + two,
}


@pytest.mark.parametrize("kind", NO_SUMS)
def test_reparameterize_nominated_block_that_is_no_sum_stays_and_is_listed(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Beside(NO_SUMS[kind]), nn.Conv2d(8 if kind == "concatenation" else 4, 4, 1), OfficialBlock(4))
    randomise(model)
    deploy, x = reparameterize(model.eval()), torch.randn(1, 4, 9, 8)
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < FLOAT32
    assert list(deploy[0].state_dict()) == list(model[0].state_dict())
    assert hasattr(deploy[2], "rbr_reparam")
    assert "stay as they are: 0 (Beside: conv1, conv2)" in caplog.text


class Identity(nn.Module):
    """Gives its input, whatever it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_reparameterize_one_projection_for_each_of_several_inputs_is_not_listed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As RT-DETR's decoder."""
    decoder = Identity()
    decoder.projections = nn.ModuleList(TimmBlock._conv_bn(4, 1) for _ in range(3))
    model = nn.Sequential(decoder, OfficialBlock(4))
    randomise(model)
    assert hasattr(reparameterize(model)[1], "rbr_reparam")
    assert caplog.text == ""


def test_reparameterize_sum_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Beside(torch.add), OfficialBlock(4))
    randomise(model)
    assert isinstance(reparameterize(model)[0], nn.Sequential)
    assert caplog.text == ""


def test_reparameterize_nothing_found_lists_the_modules_with_branches() -> None:
    model = nn.Sequential(*(Beside(torch.sub) for _ in range(7)), nn.ReLU())
    with pytest.raises(CheckpointError) as caught:
        reparameterize(model)
    assert "0 (Beside: conv1, conv2); 1 (Beside: conv1, conv2);" in caught.value.message
    assert "4 (Beside: conv1, conv2) and 2 more" in caught.value.message
    assert "export_module folds any branches, by algebra; convert=" in caught.value.remedy


def _holding(forward: Callable[..., Tensor], **parts: nn.Module) -> nn.Module:
    """A module of these parts."""
    block = type("Holding", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        block.add_module(name, part)
    return block


@pytest.mark.parametrize(
    ("block", "branches"),
    [
        (
            _holding(lambda self, x: self.conv3(x) + self.conv1(x), conv3=nn.Conv2d(4, 8, 3, padding=1),
                     conv1=nn.Conv2d(4, 8, 1)),
            "conv3, conv1",
        ),
        (
            _holding(lambda self, x: sum(conv(x) for conv in self.paths),
                     paths=nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))),
            "paths.0, paths.1, paths.2",
        ),
        (
            _holding(lambda self, x: self.conv(x) + self.pool(x), conv=nn.Conv2d(4, 4, 3, padding=1),
                     pool=nn.AvgPool2d(3, 1, 1)),
            "conv, pool",
        ),
        (
            _holding(lambda self, x: self.conv(x) + self.pool(x), conv=nn.Conv2d(4, 4, 2, 2), pool=nn.AvgPool2d(2)),
            "conv, pool",
        ),
    ],
    ids=["bare convolutions", "equal kernels in a list", "pooling", "pooling of a stride"],
)  # fmt: skip
def test_reparameterize_nothing_found_names_branches_of_weak_signs(block: nn.Module, branches: str) -> None:
    assert block(torch.ones(1, 4, 6, 6)).isfinite().all()
    with pytest.raises(CheckpointError) as caught:
        reparameterize(nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.ReLU()))
    assert caught.value.message.endswith(f"; modules that may have branches: 1 (Holding: {branches})")


def test_reparameterize_nothing_found_names_no_layers_that_only_follow_one_another() -> None:
    block = _holding(
        lambda self, x: self.last(self.pool(self.middle(self.first(x)))),
        first=nn.Conv2d(4, 8, 3), middle=nn.Conv2d(8, 8, 3, 2), pool=nn.AvgPool2d(3, 1, 1), last=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"holds no RepVGG block in training form\n"):
        reparameterize(nn.Sequential(block, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))


class Unknown(nn.Module):
    """A block that only its author can convert: the factor depends on a buffer's root."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("power", torch.tensor(4.0))
        self.folded: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is not None:
            return self.folded(x)
        return self.first(x) - self.power.sqrt() * self.second(x)

    def convert(self, sign: float = -1.0) -> nn.Conv2d:
        """Its one convolution."""
        conv = nn.Conv2d(4, 4, 3, padding=1)
        for part in ("weight", "bias"):
            one, two = (getattr(side, part) for side in (self.first, self.second))
            getattr(conv, part).data = one.data + sign * 2 * two.data
        return conv

    def switch(self) -> None:
        """As most projects' conversions: in place."""
        self.folded = self.convert()
        del self.first, self.second


class Child(Unknown):
    """A subclass is converted by what is given for its base."""


@pytest.mark.parametrize(
    "convert", [Unknown.convert, Unknown.switch, Child.convert], ids=["returns", "in place", "mro"]
)
def test_reparameterize_convert_is_the_users_own_conversion(convert: Callable[[nn.Module], nn.Module | None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Unknown(), OfficialBlock(4), Child())
    randomise(model)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(1, 4, 9, 8)
    deploy = reparameterize(model, convert={Unknown: convert})
    with torch.no_grad():
        assert relative_error(deploy(x), model.eval()(x)) < FLOAT32
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_reparameterize_convert_goes_before_known_names_and_what_it_leaves_is_folded() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.block = Unknown(), OfficialBlock(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.own(x))

    torch.manual_seed(0)
    model = nn.Sequential(Holder())
    randomise(model)
    deploy = reparameterize(model, convert={Holder: lambda holder: holder.own.switch()})
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 2
    with pytest.raises(ParityError, match=r"^1: its folded form differs"):
        reparameterize(
            nn.Sequential(Unknown(), OfficialBlock(4)), convert={OfficialBlock: lambda block: nn.Conv2d(4, 4, 1)}
        )


@pytest.mark.parametrize(
    ("convert", "kind", "message"),
    [
        ({Unknown: lambda block: block.convert(1.0)}, ParityError, "^0: its folded form differs.*convert= of Unknown"),
        ({Unknown: lambda block: nn.Conv2d(5, 4, 1)}, ParityError, "^0: its folded form differs.*RuntimeError"),
        ({Unknown: lambda block: block.first.weight}, InputError, "^0: convert= of Unknown returned Parameter"),
        ({TimmBlock: lambda block: None}, InputError, "names TimmBlock, of which the model holds no module"),
        ({nn.Linear: lambda block: None}, CheckpointError, "^1: Linear does not run on one random image"),
    ],
)
def test_reparameterize_convert_that_is_wrong_is_refused(convert, kind: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(Unknown(), nn.Linear(4, 4))
    randomise(model)
    with pytest.raises(kind, match=message):
        reparameterize(model, convert=convert)


def test_reparameterize_one_block_at_two_places_is_one_block_again() -> None:
    shared = OfficialBlock(4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    randomise(model)
    deploy = reparameterize(model)
    assert deploy[0] is deploy[2]
    assert deploy[0] is not shared


def test_reparameterize_half_converted_model_keeps_what_is_converted() -> None:
    model = nn.Sequential(OfficialBlock(4), TimmBlock(4))
    randomise(model)
    half = nn.Sequential(reparameterize(model[0]), model[1]).eval()
    whole, x = reparameterize(half), torch.randn(1, 4, 9, 8)
    with torch.no_grad():
        assert relative_error(whole(x), half(x)) < FLOAT32
    assert sum(isinstance(m, nn.Conv2d) for m in whole.modules()) == 2
