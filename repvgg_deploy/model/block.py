"""One RepVGG block, in training form and in deploy form.

A training-form block sums linear branches (3×3 Conv+BatchNorm, 1×1 Conv+BatchNorm, identity BatchNorm); a deploy-form
block is the one 3×3 convolution that they are equal to. They are two classes, because they are two states: neither asks
which one it is. Names of modules are the official ones (`rbr_dense`, `rbr_1x1`, `rbr_identity`, `rbr_reparam`, `se`,
`post_se`), so that state dicts are too, and of the methods that the original's scripts look for (`switch_to_deploy`,
`get_equivalent_kernel_bias`, `get_custom_L2`).

Source: Ding et al. 2021, https://arxiv.org/abs/2101.03697, section 3.2 and 3.3; Chu et al. 2024 for QARepVGG,
https://arxiv.org/abs/2212.01593.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..specs.values import BlockKind, SePosition
from .arithmetic import Branch, KernelBias, fold_branches, fold_in_float64


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What a block is made of.

    Attributes:
        stride: Pixels from one output to the next, the same in the 3×3 and the 1×1 convolution.
        dilation: Pixels between two taps of the 3×3 convolution; its padding is the same number.
        groups: Of both convolutions.
        has_identity: Whether the training form has an identity branch.
        kind: Which branches and BatchNorms the training form has.
        se: Where a squeeze-and-excitation block stands.
        se_channels: Its hidden channels.
    """

    in_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    has_identity: bool = False
    kind: BlockKind = "repvgg"
    se: SePosition = "none"
    se_channels: int = 0
    bn_eps: float = 1e-5

    def conv(self, kernel_size: int, *, bias: bool) -> nn.Conv2d:
        """A convolution of this block: 3×3 dilated and padded, or 1×1."""
        dilation, padding = (self.dilation, self.dilation) if kernel_size == 3 else (1, 0)
        shape = (self.in_channels, self.out_channels, kernel_size)
        return nn.Conv2d(*shape, self.stride, padding, dilation, self.groups, bias)

    def bn(self) -> nn.BatchNorm2d:
        """A BatchNorm over the output channels."""
        return nn.BatchNorm2d(self.out_channels, eps=self.bn_eps)


class ConvBN(nn.Module):
    """A convolution without bias, then BatchNorm."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) → float (N, C', H', W')."""
        out: Tensor = self.bn(self.conv(x))
        return out

    def as_branch(self) -> Branch:
        """This convolution and BatchNorm as data."""
        return Branch(self.conv.weight, self.conv.bias, self.bn)


class SEBlock(nn.Module):
    """Squeeze-and-excitation: global average → 1×1 Conv → ReLU → 1×1 Conv → sigmoid, times the input.

    The average is over the whole map whatever its size; the original code pools with a window as wide as the map, which
    fails where height and width differ. Source: Hu et al. 2018, https://arxiv.org/abs/1709.01507.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) → the same shape."""
        gate = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(torch.relu(self.down(gate))))


class _Block(nn.Module, ABC):
    """What both forms share: SE, ReLU, SE behind a `linear` of their own. The SE modules come last in a state dict."""

    deploy: bool

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.nonlinearity: nn.Module = nn.ReLU()

    def _add_se(self) -> None:
        spec = self.spec
        self.se = SEBlock(spec.out_channels, spec.se_channels) if spec.se == "before_relu" else nn.Identity()
        self.post_se = SEBlock(spec.out_channels, spec.se_channels) if spec.se == "after_relu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) → float (N, C', H', W')."""
        return self.finish(self.linear(x))

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """What stands before SE and ReLU: the part that reparameterization folds."""

    def finish(self, x: Tensor) -> Tensor:
        """SE, ReLU, SE: what follows `linear`."""
        out: Tensor = self.post_se(self.nonlinearity(self.se(x)))
        return out

    def switch_to_deploy(self) -> None:
        """Turns this object into a `DeployBlock`; one that is already passes."""


class TrainingBlock(_Block):
    """Training form: branches are summed, then (QARepVGG) one more BatchNorm, SE, ReLU, SE."""

    deploy = False

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.rbr_dense = ConvBN(spec.conv(3, bias=False), spec.bn())
        self.rbr_1x1: nn.Module | None = None
        self.rbr_identity: nn.BatchNorm2d | None = None
        if spec.kind == "qarepvgg_v2":
            self.rbr_1x1 = spec.conv(1, bias=False)
        elif spec.kind != "plain":
            self.rbr_1x1 = ConvBN(spec.conv(1, bias=False), spec.bn())
            self.rbr_identity = spec.bn() if spec.has_identity else None
        self.bn = spec.bn() if spec.kind.startswith("qarepvgg") else nn.Identity()
        self._add_se()

    def linear(self, x: Tensor) -> Tensor:
        """The sum of the branches, and (QARepVGG) its BatchNorm.

        QARepVGG with SE applies its last BatchNorm after the SE block; such a block is never built (see `network`).
        """
        out: Tensor = self.rbr_dense(x)
        if self.rbr_1x1 is not None:
            out = out + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + self.rbr_identity(x)
        elif self._bare_identity:
            out = out + x
        out = self.bn(out)
        return out

    @property
    def _bare_identity(self) -> bool:
        return self.spec.kind == "qarepvgg_v2" and self.spec.has_identity

    def equivalent_kernel_bias(self) -> KernelBias:
        """The 3×3 kernel (C', C/groups, 3, 3) and bias (C') that this block is equal to in `eval()`; differentiable."""
        dtype = self.rbr_dense.conv.weight.dtype
        return fold_branches(self.branches(), self.post_bn, groups=self.spec.groups, dtype=dtype)

    get_equivalent_kernel_bias = equivalent_kernel_bias

    def switch_to_deploy(self) -> None:
        """Turns this object into the `DeployBlock` that it equals in `eval()`; mode and trainability stay.

        Raises:
            CheckpointError: See `fold_block`.
        """
        folded = fold_block(self)
        folded.rbr_reparam.requires_grad_(self.rbr_dense.conv.weight.requires_grad)
        self.__class__ = DeployBlock  # type: ignore[assignment]
        self.spec = folded.spec
        own = {name: self._modules[name] for name in folded._modules if name in self._modules}
        self._modules = folded._modules | own

    def branches(self) -> tuple[Branch, ...]:
        """The linear branches as data, the 3×3 one first."""
        result = [self.rbr_dense.as_branch()]
        if isinstance(self.rbr_1x1, ConvBN):
            result.append(self.rbr_1x1.as_branch())
        elif isinstance(self.rbr_1x1, nn.Conv2d):
            result.append(Branch(self.rbr_1x1.weight, self.rbr_1x1.bias))
        if self.rbr_identity is not None or self._bare_identity:
            result.append(Branch(None, bn=self.rbr_identity))
        return tuple(result)

    @property
    def post_bn(self) -> nn.BatchNorm2d | None:
        """The BatchNorm after the sum (QARepVGG), or None."""
        return None if isinstance(self.bn, nn.Identity) else self.bn  # BatchNorm2d, or SyncBatchNorm after a conversion

    def custom_l2(self) -> Tensor:
        """The L2 of the equivalent kernel, () float: the penalty that replaces weight decay on the 3×3 and 1×1 kernels.

        The eight outer taps of the 3×3 kernel are penalised as they are; the centre tap as the fused one, divided by
        the sum of the squared BatchNorm scales so that the coefficient means what it does for plain L2. Scales carry no
        gradient.
        Source: Ding et al. 2021, section 4.1 and https://github.com/DingXiaoH/RepVGG (`get_custom_L2`). Defined for the
        `repvgg` kind; other kinds give the plain L2 of their kernels.
        """
        kernel = self.rbr_dense.conv.weight
        if not isinstance(self.rbr_1x1, ConvBN):
            one = kernel.new_zeros(()) if self.rbr_1x1 is None else (self.rbr_1x1.weight**2).sum()  # type: ignore[operator]
            return (kernel**2).sum() + one
        scale3, scale1 = (_bn_scale(branch.bn).detach().reshape(-1, 1) for branch in (self.rbr_dense, self.rbr_1x1))
        centre = kernel[:, :, 1, 1].flatten(1)
        fused = centre * scale3 + self.rbr_1x1.conv.weight.flatten(1) * scale1
        return (kernel**2).sum() - (centre**2).sum() + (fused**2 / (scale3**2 + scale1**2)).sum()

    get_custom_L2 = custom_l2  # noqa: N815


def _bn_scale(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_var is not None
    return bn.weight / torch.sqrt(bn.running_var + bn.eps)


class DeployBlock(_Block):
    """Deploy form: one 3×3 convolution with bias, SE, ReLU, SE."""

    deploy = True

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.rbr_reparam = spec.conv(3, bias=True)
        self._add_se()

    def linear(self, x: Tensor) -> Tensor:
        """The convolution."""
        out: Tensor = self.rbr_reparam(x)
        return out


def fold_block(block: TrainingBlock) -> DeployBlock:
    """A block in deploy form, in its dtype and on its device; what follows the convolution is copied.

    Stride and dilation are those that its convolutions have now: for dense prediction, people change them in place.

    Raises:
        CheckpointError: Its convolutions were changed so that they are no longer one.
    """
    conv = block.rbr_dense.conv
    spec = replace(block.spec, stride=conv.stride[0], dilation=conv.dilation[0])
    with torch.device("meta"):
        result = DeployBlock(spec)
        expected = {"rbr_dense": spec.conv(3, bias=False), "rbr_1x1": spec.conv(1, bias=False)}
    for name, like in expected.items():
        part = getattr(block, name)
        found = part.conv if isinstance(part, ConvBN) else part
        facts = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        for fact in facts if found is not None else ():
            if getattr(found, fact) != getattr(like, fact):
                raise CheckpointError(
                    f"{name}: {fact}: expected {getattr(like, fact)}, found {getattr(found, fact)}",
                    remedy="change 3×3 and 1×1 convolutions alike, and padding with dilation; else deploy the training "
                    "form",
                )
    folded = fold_in_float64(block.branches(), block.post_bn, spec.groups, result=conv.weight.dtype)
    assert folded.bias is not None
    result.rbr_reparam.weight = nn.Parameter(folded.kernel, requires_grad=False)
    result.rbr_reparam.bias = nn.Parameter(folded.bias, requires_grad=False)
    for name in ("nonlinearity", "se", "post_se"):
        setattr(result, name, copy.deepcopy(getattr(block, name)))
    return result.train(block.training)
