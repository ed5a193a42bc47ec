"""Blocks of other projects in training form, small: their names and what their forward decides by, written anew.

Facts read from the projects' sources: meituan/YOLOv6, open-mmlab/mmyolo and mmpretrain, cxxgtxy/QARepVGG,
Deci-AI/super-gradients, WongKinYiu/yolov7 and yolov9, lyuwenyu/RT-DETR, Peterande/D-FINE, ultralytics, THU-MIG/yolov10
and RepViT, apple/ml-mobileone and ml-fastvit, huggingface/pytorch-image-models, ChengpengChen/RepGhost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

C = 8


def sequence(**parts: nn.Module) -> nn.Sequential:
    """Modules in a row, by name."""
    result = nn.Sequential()
    for name, part in parts.items():
        result.add_module(name, part)
    return result


def conv(size: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    return nn.Conv2d(C, C, size, stride, size // 2, groups=groups, bias=bias)


def conv_bn(size: int, stride: int = 1, groups: int = 1, names: tuple[str, str] = ("conv", "bn")) -> nn.Sequential:
    """Convolution and BatchNorm under the names that a project gives them; "0" and "1": none."""
    return sequence(**{names[0]: conv(size, stride, groups), names[1]: nn.BatchNorm2d(C)})


class ConvNorm(nn.Module):
    """A convolution, its BatchNorm and an activation that may be missing, as detectors have it."""

    def __init__(self, size: int, norm: str, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = conv(size, stride, groups)
        self.add_module(norm, nn.BatchNorm2d(C))
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(getattr(self, "norm" if hasattr(self, "norm") else "bn")(self.conv(x)))


class SE(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.wide(torch.relu(self.narrow(x.mean((2, 3), keepdim=True)))))


class Official(nn.Module):
    """`rbr_*`: the original, YOLOv6, mmyolo with `alpha`, yolov7 without names, QARepVGG with `bn` and `rbr_avg`."""

    def __init__(self, kind: str = "", stride: int = 1) -> None:
        super().__init__()
        self.deploy, self.kind = False, kind
        self.nonlinearity, self.se = nn.SiLU() if kind == "yolov7" else nn.ReLU(), nn.Identity()
        names = ("0", "1") if kind == "yolov7" else ("conv", "bn")
        bare, same = kind in ("QARepVGG v2", "YOLOv6 v2", "GRE"), stride == 1
        self.rbr_dense = conv_bn(3, stride, names=names)
        self.rbr_1x1 = conv(1, stride, bias=kind == "GRE") if bare else conv_bn(1, stride, names=names)
        self.rbr_identity = (nn.Identity() if bare else nn.BatchNorm2d(C)) if same else None
        if kind == "YOLOv6 v2":
            self.rbr_avg = nn.AvgPool2d(3, stride, 1) if same else None
        if kind == "alpha":
            self.alpha = nn.Parameter(torch.tensor([0.6]))
        if bare or kind == "QARepVGG v1":
            self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(x)))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        if self.kind == "GRE":
            return self.nonlinearity(self.se(self.rbr_dense(x) + self.bn(self.rbr_1x1(x) + identity)))
        total = self.rbr_dense(x) + getattr(self, "alpha", 1) * self.rbr_1x1(x) + identity
        if getattr(self, "rbr_avg", None) is not None:
            total = total + self.rbr_avg(x)
        return self.nonlinearity(self.bn(self.se(total)) if hasattr(self, "bn") else self.se(total))


class Plus(Official):
    """RepVGGplus hands a loss through."""

    def forward(self, x: Tensor, L2: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # noqa: N803
        if self.deploy:
            return self.nonlinearity(self.rbr_reparam(x)), None
        return super().forward(x), L2 + (self.rbr_dense.conv.weight**2).sum()


class MmBlock(nn.Module):
    """mmpretrain's RepVGG: the deploy path of its forward leaves the SE out."""

    def __init__(self, *, se: bool = False) -> None:
        super().__init__()
        self.deploy = False
        self.branch_norm = nn.BatchNorm2d(C)
        self.branch_3x3, self.branch_1x1 = (conv_bn(size, names=("conv", "norm")) for size in (3, 1))
        self.se_layer = SE() if se else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return self.act(self.branch_reparam(x))
        out = self.branch_3x3(x) + self.branch_1x1(x) + self.branch_norm(x)
        return self.act(out if self.se_layer is None else self.se_layer(out))


class NasBlock(nn.Module):
    """YOLO-NAS's RepVGGBlock: one flag."""

    def __init__(self, alpha: bool = True) -> None:
        super().__init__()
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()
        self.no_conv_branch = nn.BatchNorm2d(C)
        self.branch_3x3, self.branch_1x1 = conv_bn(3), conv_bn(1)
        self.alpha: nn.Parameter | int = nn.Parameter(torch.tensor([0.7])) if alpha else 1
        self.build_residual_branches = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.build_residual_branches:
            return self.nonlinearity(self.se(self.rbr_reparam(x)))
        return self.nonlinearity(self.se(self.branch_3x3(x) + self.alpha * self.branch_1x1(x) + self.no_conv_branch(x)))


class Residual(nn.Module):
    """An identity of a class of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class NasQuantBlock(nn.Module):
    """YOLO-NAS's QARepVGGBlock: a post BatchNorm, two flags, a place held for the folded convolution, SE at the end."""

    def __init__(self, alpha: bool = False) -> None:
        super().__init__()
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()
        self.branch_3x3, self.branch_1x1 = conv_bn(3), conv(1, bias=True)
        self.identity = Residual()
        self.register_buffer("id_tensor", torch.zeros(C, C, 3, 3), persistent=False)
        self.alpha: nn.Parameter | float = nn.Parameter(torch.tensor([0.7])) if alpha else 1.0
        self.post_bn = nn.BatchNorm2d(C)
        self.rbr_reparam = conv(3, bias=True)
        self.partially_fused = self.fully_fused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fully_fused:
            return self.se(self.nonlinearity(self.rbr_reparam(x)))
        if self.partially_fused:
            return self.se(self.nonlinearity(self.post_bn(self.rbr_reparam(x))))
        branches = self.branch_3x3(x) + self.alpha * self.branch_1x1(x) + self.identity(x)
        return self.se(self.nonlinearity(self.post_bn(branches)))


class DetrBlock(nn.Module):
    """RT-DETR's RepVggBlock, D-FINE's VGGBlock: a path for `conv`."""

    def __init__(self, norm: str = "norm") -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = ConvNorm(3, norm), ConvNorm(1, norm), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) if hasattr(self, "conv") else self.conv1(x) + self.conv2(x))


class UltraBlock(nn.Module):
    """ultralytics' RepConv, yolov9's RepConvN: the deploy form has another method; models hang `i` and `f` on it."""

    def __init__(self, *, identity: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.bn = nn.BatchNorm2d(C) if identity else None
        self.conv1, self.conv2 = ConvNorm(3, "bn", stride=stride), ConvNorm(1, "bn", stride=stride)
        self.i, self.f = 5, -1
        self.type = "models.common.RepConvN"  # type: ignore[method-assign, assignment]

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x) + (0 if self.bn is None else self.bn(x)))


class DepthwiseBlock(nn.Module):
    """RepVGGDW: YOLOv10's (7×7 and 3×3, SiLU), RepViT's (3×3 and 1×1, identity), timm's (bare 1×1, BatchNorm last)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv: nn.Module
        self.conv1: nn.Module
        if kind == "yolov10":
            self.conv, self.conv1 = ConvNorm(7, "bn", groups=C), ConvNorm(3, "bn", groups=C)
            self.act = nn.SiLU()
        else:
            self.conv = conv_bn(3, groups=C, names=("c", "bn"))
            self.conv1 = conv(1, groups=C, bias=True) if kind == "timm" else conv_bn(1, groups=C, names=("c", "bn"))
            self.bn = nn.BatchNorm2d(C) if kind == "timm" else nn.Identity()
        self.dim = C

    def forward(self, x: Tensor) -> Tensor:
        total = self.conv(x) + self.conv1(x)
        return self.act(total) if self.kind == "yolov10" else self.bn(total + x)


class MobileOne(nn.Module):
    """Apple's MobileOneBlock, also FastViT's: lists of branches, a flag."""

    def __init__(self, size: int = 3, *, convs: int = 3, stride: int = 1, groups: int = C, act: bool = True) -> None:
        super().__init__()
        self.inference_mode = False
        self.se, self.activation = nn.Identity(), nn.GELU() if act else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(C) if stride == 1 else None
        branches = [conv_bn(size, stride, groups) for _ in range(convs)]
        self.rbr_conv = nn.ModuleList(branches) if convs else None
        self.rbr_scale = conv_bn(1, stride, groups) if size > 1 and convs else None

    def forward(self, x: Tensor) -> Tensor:
        if self.inference_mode:
            return self.activation(self.se(self.reparam_conv(x)))
        out = 0 if self.rbr_skip is None else self.rbr_skip(x)
        out = out + (0 if self.rbr_scale is None else self.rbr_scale(x))
        for branch in self.rbr_conv or ():
            out = out + branch(x)
        return self.activation(self.se(out))


class TimmMobileOne(nn.Module):
    """timm's MobileOneBlock: the folded convolution is a plain None until conversion."""

    def __init__(self, *, convs: int = 2, scale: bool = True, act: bool = True) -> None:
        super().__init__()
        self.reparam_conv = None
        self.identity = nn.BatchNorm2d(C)
        self.conv_kxk = nn.ModuleList(conv_bn(3, groups=C) for _ in range(convs)) if convs else None
        self.conv_scale = conv_bn(1, groups=C) if scale else None
        self.se, self.act = nn.Identity(), nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.act(self.se(self.reparam_conv(x)))
        out = self.identity(x) if self.conv_scale is None else self.conv_scale(x) + self.identity(x)
        for branch in self.conv_kxk or ():
            out += branch(x)
        return self.act(self.se(out))


class MmMobileOne(nn.Module):
    """mmpretrain's MobileOneBlock."""

    def __init__(self) -> None:
        super().__init__()
        self.deploy = False
        self.se, self.act = SE(), nn.ReLU()
        self.branch_norm, self.branch_scale = nn.BatchNorm2d(C), conv_bn(1, names=("conv", "norm"))
        self.branch_conv_list = nn.ModuleList(conv_bn(3, names=("conv", "norm")) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            out = self.branch_reparam(x)
        else:
            out = self.branch_norm(x) + self.branch_scale(x)
            for branch in self.branch_conv_list:
                out += branch(x)
        return self.act(self.se(out))


class AppleMixer(nn.Module):
    """FastViT's RepMixer; its `norm` is a MobileOneBlock with a BatchNorm only."""

    def __init__(self) -> None:
        super().__init__()
        self.inference_mode, self.use_layer_scale = False, True
        self.norm, self.mixer = MobileOne(convs=0, act=False), MobileOne(convs=1, act=False)
        self.layer_scale = nn.Parameter(1e-5 * torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class LayerScale(nn.Module):
    """A factor a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmMixer(nn.Module):
    """timm's RepMixer: the layer scale is a module, or an Identity."""

    def __init__(self, *, scale: bool = True) -> None:
        super().__init__()
        self.reparam_conv = None
        self.norm, self.mixer = TimmMobileOne(convs=0, scale=False, act=False), TimmMobileOne(convs=1, act=False)
        self.layer_scale = LayerScale() if scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class LargeKernel(nn.Module):
    """FastViT's ReparamLargeKernelConv: Apple's forward does not use what its activation gives."""

    def __init__(self, first: str, folded: str) -> None:
        super().__init__()
        self.activation, self.first, self.folded = nn.GELU(), first, folded
        self.add_module(first, conv_bn(7, 2, C))
        self.small_conv = conv_bn(3, 2, C)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, self.folded):
            out = getattr(self, self.folded)(x)
        else:
            out = getattr(self, self.first)(x) + self.small_conv(x)
        self.activation(out)
        return out


class Ghost(nn.Module):
    """RepGhostModule: what is folded stands behind a convolution of its own."""

    def __init__(self, *, bare: bool = False) -> None:
        super().__init__()
        self.deploy = False
        self.primary_conv = nn.Sequential(nn.Conv2d(4, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        norms = [nn.BatchNorm2d(C), *([nn.Identity()] if bare else [])]
        self.fusion_conv, self.fusion_bn = nn.Sequential(*(nn.Identity() for _ in norms)), nn.Sequential(*norms)
        self.cheap_operation = nn.Sequential(conv(3, groups=C), nn.BatchNorm2d(C))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary_conv(x)
        second = self.cheap_operation(first)
        for each, norm in zip(self.fusion_conv, self.fusion_bn, strict=True):
            second = second + norm(each(first))
        return self.relu(second)


class ScaleLayer(nn.Module):
    """YOLOv6's: a factor a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C) + 0.5), None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, C, 1, 1)


class LinearAdd(nn.Module):
    """YOLOv6's LinearAddBlock: no deploy form of its own; `relu` is registered first."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv, self.scale_conv = conv(3, stride), ScaleLayer()
        self.conv_1x1, self.scale_1x1 = conv(1, stride), ScaleLayer()
        if stride == 1:
            self.scale_identity = ScaleLayer()
        self.bn, self.se = nn.BatchNorm2d(C), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        if hasattr(self, "scale_identity"):
            out = out + self.scale_identity(x)
        return self.relu(self.se(self.bn(out)))


class Functional(nn.Module):
    """Branches in a list without names, the activation in the forward, no deploy form."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(3, names=("0", "1")), conv_bn(1, names=("0", "1")), nn.BatchNorm2d(C)])
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.activation(total)


class Asymmetric(nn.Module):
    """ACNet's block: bare convolutions, each with a BatchNorm beside it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"square": (3, 3), "ver": (3, 1), "hor": (1, 3)}
        for name, size in sizes.items():
            pads = (size[0] // 2, size[1] // 2)
            self.add_module(f"{name}_conv", nn.Conv2d(C, C, size, padding=pads, bias=False))
            self.add_module(f"{name}_bn", nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, f"{n}_bn")(getattr(self, f"{n}_conv")(x)) for n in ("square", "ver", "hor")]
        return parts[0] + parts[1] + parts[2]


class Dilated(nn.Module):
    """UniRepLKNet's DilatedReparamBlock: a large depthwise kernel and a small dilated one."""

    def __init__(self) -> None:
        super().__init__()
        self.lk_origin, self.origin_bn = conv(7, groups=C), nn.BatchNorm2d(C)
        self.dil_conv_k3_2 = nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=C, bias=False)
        self.dil_bn_k3_2 = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.origin_bn(self.lk_origin(x)) + self.dil_bn_k3_2(self.dil_conv_k3_2(x))


class Diverse(nn.Module):
    """Diverse Branch Block: among others a 1×1 before an average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.dbb_origin, self.dbb_1x1 = conv_bn(3), conv_bn(1)
        pooling = sequence(conv=conv(1), bn=nn.BatchNorm2d(C), pad=nn.ZeroPad2d(1), avg=nn.AvgPool2d(3, 1))
        self.dbb_avg = nn.Sequential(*pooling, nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.dbb_origin(x) + self.dbb_1x1(x) + self.dbb_avg(x)


# Blocks that stay as they are, and the parts by which they are listed.
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ACNet": (Asymmetric, "square_conv, ver_conv, hor_conv"),
    "UniRepLKNet": (Dilated, "lk_origin, dil_conv_k3_2"),
    "Diverse Branch Block": (Diverse, "dbb_origin, dbb_1x1"),
}
OWN, PLAIN = "own class", "Sequential"
# By the block: how it is made, its kernel, and what it is in deploy form: a block of its own class where its forward
# has a path for the folded convolution, else a plain sequence.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "original, YOLOv6, mmyolo": (Official, 3, OWN),
    "original, stride 2": (lambda: Official(stride=2), 3, OWN),
    "RepVGGplus": (Plus, 3, OWN),
    "QARepVGG v1": (lambda: Official("QARepVGG v1"), 3, OWN),
    "QARepVGG v2": (lambda: Official("QARepVGG v2"), 3, OWN),
    "YOLOv6 QARepVGGBlockV2": (lambda: Official("YOLOv6 v2"), 3, OWN),
    "YOLOv6 QARepVGGBlockV2, stride 2": (lambda: Official("YOLOv6 v2", 2), 3, OWN),
    "QARepVGG GRE": (lambda: Official("GRE"), 3, OWN),
    "QARepVGG GRE, stride 2": (lambda: Official("GRE", 2), 3, OWN),
    "PP-YOLOE+ (mmyolo with alpha)": (lambda: Official("alpha"), 3, OWN),
    "yolov7 RepConv": (lambda: Official("yolov7"), 3, OWN),
    "mmpretrain RepVGG": (MmBlock, 3, OWN),
    "mmpretrain RepVGG with SE": (lambda: MmBlock(se=True), 3, PLAIN),
    "YOLO-NAS RepVGGBlock": (NasBlock, 3, OWN),
    "YOLO-NAS RepVGGBlock without alpha": (lambda: NasBlock(alpha=False), 3, OWN),
    "YOLO-NAS QARepVGGBlock": (NasQuantBlock, 3, OWN),
    "YOLO-NAS QARepVGGBlock with alpha": (lambda: NasQuantBlock(alpha=True), 3, OWN),
    "RT-DETR RepVggBlock": (DetrBlock, 3, OWN),
    "D-FINE VGGBlock": (lambda: DetrBlock("bn"), 3, OWN),
    "ultralytics RepConv": (lambda: UltraBlock(identity=True), 3, PLAIN),
    "yolov9 RepConvN, stride 2": (lambda: UltraBlock(stride=2), 3, PLAIN),
    "YOLOv10 RepVGGDW": (lambda: DepthwiseBlock("yolov10"), 7, PLAIN),
    "RepViT RepVGGDW": (lambda: DepthwiseBlock("RepViT"), 3, PLAIN),
    "timm RepVggDw": (lambda: DepthwiseBlock("timm"), 3, PLAIN),
    "MobileOne depthwise": (MobileOne, 3, OWN),
    "MobileOne depthwise, stride 2": (lambda: MobileOne(stride=2), 3, OWN),
    "MobileOne pointwise": (lambda: MobileOne(1, convs=4, groups=1), 1, OWN),
    "timm MobileOne": (TimmMobileOne, 3, OWN),
    "mmpretrain MobileOne with SE": (MmMobileOne, 3, OWN),
    "FastViT RepMixer": (AppleMixer, 3, OWN),
    "timm RepMixer": (TimmMixer, 3, OWN),
    "timm RepMixer without layer scale": (lambda: TimmMixer(scale=False), 3, OWN),
    "FastViT large kernel": (lambda: LargeKernel("lkb_origin", "lkb_reparam"), 7, OWN),
    "timm large kernel": (lambda: LargeKernel("large_conv", "reparam_conv"), 7, OWN),
    "RepGhost": (Ghost, 3, OWN),
    "RepGhost with a bare identity": (lambda: Ghost(bare=True), 3, OWN),
    "YOLOv6 LinearAddBlock": (LinearAdd, 3, PLAIN),
    "YOLOv6 LinearAddBlock, stride 2": (lambda: LinearAdd(2), 3, PLAIN),
    "no names, SiLU in the forward": (lambda: Functional(nn.functional.silu), 3, PLAIN),
    "no names, ReLU in the forward": (lambda: Functional(torch.relu), 3, PLAIN),
}
