"""The RepVGG network: stem, four stages, global average pooling, classifier; in training form or deploy form.

State dict keys are the official ones (`stage0.…`, `stage1.0.…`, `linear.…`), RepVGGplus's split third stage excepted
(see `checkpoint/names.py`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import InputError
from ..specs.values import Form, VariantSpec
from .block import BlockSpec, DeployBlock, TrainingBlock

STAGE_NAMES = ("stage1", "stage2", "stage3", "stage4")


class RepVGG(nn.Module):
    """A RepVGG classifier.

    Args:
        spec: The variant.
        form: `training` or `deploy`.
        output_stride: 32 as published; 16 or 8 replace the last strides by dilation, for dense prediction. Weights stay
            valid.

    Attributes:
        gradient_checkpointing: Recompute block activations in the backward pass instead of keeping them: less memory,
            about a third slower.
    """

    def __init__(self, spec: VariantSpec, form: Form = "training", *, output_stride: int = 32) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise InputError(
                f"output_stride must be 8, 16 or 32, found {output_stride}",
                remedy="choose 32 for classification, 8 or 16 for dense prediction",
            )
        if form == "training" and spec.se != "none" and spec.block.startswith("qarepvgg"):
            raise InputError(
                f"{spec.name}: QARepVGG with SE applies its last BatchNorm after the SE block, which no convolution "
                f"can absorb",
                remedy="train with a block of kind 'repvgg', or without SE",
            )
        self.spec = spec
        self.output_stride = output_stride
        self.gradient_checkpointing = False
        kind = TrainingBlock if form == "training" else DeployBlock
        blocks = [kind(block) for block in _block_specs(spec, output_stride)]
        self.stage0 = blocks[0]
        start = 1
        for name, depth in zip(STAGE_NAMES, spec.depths, strict=True):
            self.add_module(name, nn.Sequential(*blocks[start : start + depth]))
            start += depth
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear: nn.Linear = nn.Linear(spec.widths[4], spec.num_classes)
        if spec.auxiliary_heads and form == "training":
            _add_auxiliary_heads(self, spec)

    @property
    def form(self) -> Form:
        """The form that its blocks have."""
        return "deploy" if isinstance(self.stage0, DeployBlock) else "training"

    def blocks(self) -> dict[str, TrainingBlock | DeployBlock]:
        """Blocks in order, by their official names (`stage0`, `stage1.0`, …)."""
        found: dict[str, TrainingBlock | DeployBlock] = {"stage0": self.stage0}
        for name in STAGE_NAMES:
            for index, block in enumerate(self._stage(name)):
                found[f"{name}.{index}"] = cast("TrainingBlock | DeployBlock", block)
        return found

    def _stage(self, name: str) -> nn.Sequential:
        return cast(nn.Sequential, self.get_submodule(name))

    def stage_outputs(self, x: Tensor) -> dict[str, Tensor]:
        """The output of each stage for float (N, 3, H, W), normalised RGB.

        Returns:
            `stage1` … `stage4`, each float (N, C, H/s, W/s) with s = 4, 8, 16, 32 (less with a smaller output stride).
        """
        outputs = {}
        x = self._run(self.stage0, x)
        for name in STAGE_NAMES:
            for block in self._stage(name):
                x = self._run(block, x)
            outputs[name] = x
        return outputs

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, recompute(block, x, use_reentrant=False))
        return cast(Tensor, block(x))

    def classify(self, features: Tensor) -> Tensor:
        """Global average pooling and the classifier: float (N, C, H, W) → float (N, classes) logits."""
        # flatten(1), because view(size(0), -1) would leave shape arithmetic in a graph with dynamic batch.
        logits: Tensor = self.linear(torch.flatten(self.gap(features), 1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits: float (N, 3, H, W), normalised RGB → float (N, classes)."""
        return self.classify(self.stage_outputs(x)["stage4"])

    def forward_with_auxiliary(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of the main head (`main`) and of the three auxiliary heads of RepVGGplus, for a training loss.

        Raises:
            InputError: The variant has none, or the model is in deploy form.
        """
        if not hasattr(self, "stage1_aux"):
            raise InputError(f"{self.spec.name} in {self.form} form has no auxiliary heads", remedy="call forward()")
        first, second, third, _ = self.spec.depths
        heads = {
            f"stage1.{first - 1}": "stage1_aux",
            f"stage2.{second - 1}": "stage2_aux",
            f"stage3.{third // 2 - 1}": "stage3_first_aux",
        }
        outputs: dict[str, Tensor] = {}
        for name, block in self.blocks().items():
            x = self._run(block, x)
            if name in heads:
                outputs[heads[name]] = self.get_submodule(heads[name])(x)
        return {"main": self.classify(x), **outputs}

    def custom_l2(self) -> Tensor:
        """The sum of every block's `custom_l2`, () float.

        Add `0.5 * weight_decay * model.custom_l2()` to the loss and exempt the kernels of 3×3 and 1×1 branches from the
        optimiser's weight decay (`weight_decay_groups`).
        """
        total = self.linear.weight.new_zeros(())
        for block in self.blocks().values():
            if isinstance(block, TrainingBlock):
                total = total + block.custom_l2()
        return total


def weight_decay_groups(model: RepVGG, weight_decay: float, *, custom_l2: bool = True) -> list[dict[str, object]]:
    """Parameter groups for an optimiser: weight decay on kernels, none on biases and BatchNorm.

    Args:
        model: In training form.
        weight_decay: For example 1e-4.
        custom_l2: Exempt the branch kernels too, because `RepVGG.custom_l2` penalises them.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        branch = ".rbr_dense.conv." in name or ".rbr_1x1." in name
        exempt = parameter.ndim <= 1 or (custom_l2 and branch)
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _block_specs(spec: VariantSpec, output_stride: int) -> list[BlockSpec]:
    """Blocks in order. Where a stride would exceed `output_stride` it becomes dilation of all layers after it."""
    result, reached, dilation = [], 1, 1
    for layer in spec.layers():
        stride, inherited = layer.stride, dilation
        if stride == 2 and reached >= output_stride:
            stride, dilation = 1, dilation * 2
        reached *= stride
        # The first layer after a removed stride still sees a dense grid, as in dilated ResNets (Yu et al. 2017): it
        # keeps the old dilation.
        block = BlockSpec(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            stride=stride,
            dilation=inherited if layer.stride == 2 else dilation,
            groups=layer.groups,
            has_identity=layer.has_identity,
            kind=spec.block,
            se=spec.se,
            se_channels=layer.out_channels // spec.se_reduction,
            bn_eps=spec.bn_eps,
        )
        result.append(block)
    return result


def _add_auxiliary_heads(model: RepVGG, spec: VariantSpec) -> None:
    for name, width in zip(("stage1_aux", "stage2_aux", "stage3_first_aux"), spec.widths[1:4], strict=True):
        downsample = nn.Sequential()
        downsample.add_module("conv", nn.Conv2d(width, width, 3, 2, 1, bias=False))
        downsample.add_module("bn", nn.BatchNorm2d(width, eps=spec.bn_eps))
        downsample.add_module("relu", nn.ReLU())
        model.add_module(
            name, nn.Sequential(downsample, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, spec.num_classes))
        )
