"""Checkpoints of every public family, of seeded models with random BatchNorm, in the names and containers it uses.

The renaming stands here a second time, as regular expressions from our names to theirs, so that a mistake in `names`
cannot hide in its mirror.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from repvgg_deploy.model.checkpoint.load import Checkpoint, load_checkpoint
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import Form, VariantSpec
from repvgg_deploy.specs.variants import alternating_groups

State = dict[str, Tensor]

SMALL = VariantSpec("small", (1, 2, 3, 1), (8, 8, 16, 24, 32), alternating_groups((1, 2, 3, 1), 2), num_classes=7)
SMALL_SE = VariantSpec(
    "small-se", (1, 2, 2, 1), (16, 16, 32, 48, 64), (1,) * 7, se="before_relu", se_reduction=16, num_classes=5
)
SMALL_PLUS = VariantSpec(
    "small-plus",
    (2, 2, 4, 1),
    (8, 8, 16, 24, 32),
    (1,) * 10,
    se="after_relu",
    se_reduction=4,
    num_classes=5,
    auxiliary_heads=True,
)
SQUARE = replace(SMALL, name="square", num_classes=32)
"""As many classes as features: PaddlePaddle's transposed classifier has the same shape as ours."""


@dataclass(frozen=True)
class Case:
    """One family in one form.

    Attributes:
        family: As `Checkpoint.family` must say.
        spec: Of the model.
        form: Of the checkpoint.
        suffix: Of the file.
        read_as: The family that is found, where the tensors cannot tell.
    """

    family: str
    spec: VariantSpec
    form: Form
    suffix: str = ".pth"
    read_as: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.spec.name}-{self.form}{self.suffix}"


def _cases() -> list[Case]:
    forms: tuple[Form, ...] = ("training", "deploy")
    cases = []
    for form in forms:
        cases += [Case("official", spec, form) for spec in (SMALL, SMALL_SE)]
        cases += [Case("official", SMALL, form, ".safetensors"), Case("repvggplus", SMALL_PLUS, form)]
        cases += [Case(family, spec, form) for family in ("timm", "mmpretrain") for spec in (SMALL, SMALL_SE)]
        cases += [Case("timm", SMALL, form, ".safetensors"), Case("mmpretrain", SMALL, form, ".pth.tar")]
        cases += [Case("paddleclas", spec, form, ".pdparams") for spec in (SMALL, SMALL_SE, SQUARE)]
        for kind in ("qarepvgg_v1", "qarepvgg_v2"):
            spec = replace(SMALL, block=kind)
            cases.append(Case(kind, spec, form, read_as="official" if form == "deploy" else kind))
        plain = replace(SMALL, name="plain", block="plain", groups=(1,) * 8)
        cases += [
            Case("repopt", plain, form),
            Case("repopt", replace(SMALL_PLUS, name="plain-plus", block="plain", auxiliary_heads=False), form),
        ]
    return [*cases, Case("repopt-repvgg", replace(SMALL, groups=(1,) * 8), "training", read_as="repopt")]


CASES = _cases()


def random_model(spec: VariantSpec, form: Form = "training", *, seed: int = 0) -> RepVGG:
    """A model in `eval()` whose BatchNorm statistics, affine parameters and weights are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    model = RepVGG(spec, form).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int64:
            tensor.fill_(1000 + seed)
        elif name.endswith("running_var") or (name.endswith(".weight") and tensor.ndim == 1):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim == 1:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        else:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
    return model


_Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
_TIMM: _Rules = [
    (r"^stage0\.", "stem."),
    (r"^stage([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"\.rbr_dense\.", ".conv_kxk."),
    (r"\.rbr_1x1\.", ".conv_1x1."),
    (r"\.rbr_identity\.", ".identity."),
    (r"\.rbr_reparam\.", ".reparam_conv."),
    (r"\.se\.down\.", ".attn.fc1."),
    (r"\.se\.up\.", ".attn.fc2."),
    (r"^linear\.", "head.fc."),
]
_MMPRETRAIN: _Rules = [
    (r"^stage0\.", "backbone.stem."),
    (r"^stage([1-4])\.", r"backbone.stage_\1."),
    (r"\.rbr_dense\.conv\.", ".branch_3x3.conv."),
    (r"\.rbr_dense\.bn\.", ".branch_3x3.norm."),
    (r"\.rbr_1x1\.conv\.", ".branch_1x1.conv."),
    (r"\.rbr_1x1\.bn\.", ".branch_1x1.norm."),
    (r"\.rbr_identity\.", ".branch_norm."),
    (r"\.rbr_reparam\.", ".branch_reparam."),
    (r"\.se\.down\.", ".se_layer.conv1.conv."),
    (r"\.se\.up\.", ".se_layer.conv2.conv."),
    (r"^linear\.", "head.fc."),
]
_PADDLE: _Rules = [(r"\.running_mean$", "._mean"), (r"\.running_var$", "._variance")]
_REPOPT: _Rules = [(r"\.rbr_dense\.", "."), (r"\.rbr_reparam\.", ".conv.")]
_REPOPT_REPVGG: _Rules = [
    (r"\.rbr_dense\.conv\.", ".conv_3x3."),
    (r"\.rbr_dense\.bn\.", ".bn_3x3."),
    (r"\.rbr_1x1\.conv\.", ".conv_1x1."),
    (r"\.rbr_1x1\.bn\.", ".bn_1x1."),
    (r"\.rbr_identity\.", ".bn_identity."),
]
_RULES: Mapping[str, _Rules] = {
    "official": [],
    "qarepvgg_v1": [],
    "qarepvgg_v2": [],
    "repvggplus": [(r"^stage([1-4])\.(\d+)\.", r"stage\1.blocks.\2.")],
    "timm": _TIMM,
    "mmpretrain": _MMPRETRAIN,
    "paddleclas": _PADDLE,
    "repopt": _REPOPT,
    "repopt-repvgg": _REPOPT_REPVGG,
}


def rename(state: Mapping[str, Tensor], family: str, *, half: int = 0) -> State:
    """Our state dict under the names of a family.

    Args:
        state: By our names.
        family: As in `Case.family`.
        half: Blocks of RepVGGplus's `stage3_first`.
    """
    renamed: State = OrderedDict()
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _RULES[family]:
            new = re.sub(pattern, replacement, new)
        match = re.match(r"stage3\.blocks\.(\d+)(\..*)", new)
        if match:
            index = int(match[1])
            new = (
                f"stage3_first.blocks.{index}{match[2]}"
                if index < half
                else f"stage3_second.blocks.{index - half}{match[2]}"
            )
        renamed[new] = tensor.clone()
    return renamed


def family_state(case: Case, model: RepVGG) -> State:
    """The state dict that the family's own code would save."""
    return rename(model.state_dict(), case.family, half=case.spec.depths[2] // 2)


def write_case(case: Case, model: RepVGG, folder: Path) -> Path:
    """Writes the checkpoint of a case as the family's own code would."""
    path = folder / f"model{case.suffix}"
    state = family_state(case, model)
    if case.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, str(path))
    elif case.suffix == ".pdparams":
        write_paddle(state, path)
    elif case.family == "mmpretrain":
        torch.save({"meta": {"epoch": 120, "config": "model = dict(...)"}, "state_dict": state}, path)
    else:
        torch.save(state, path)
    return path


def write_paddle(state: Mapping[str, Tensor], path: Path, *, protocol: int = 4, named: bool = False) -> None:
    """As `paddle.save`: a pickled dict of arrays, the classifier transposed, no step counters.

    Args:
        state: By PaddleClas's names.
        path: The output.
        protocol: Of the pickle.
        named: Values are (name, array) pairs, as `paddle.save` writes parameters since 2.1.
    """
    arrays: dict[str, object] = {}
    for index, (name, tensor) in enumerate(
        (name, tensor) for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    ):
        array = np.ascontiguousarray(tensor.numpy().T) if name == "linear.weight" else tensor.numpy()
        arrays[name] = (f"conv2d_{index}.w_0", array) if named else array
    arrays["StructuredToParameterName@@"] = {name: f"conv2d_{index}.w_0" for index, name in enumerate(list(arrays))}
    with path.open("wb") as file:
        pickle.dump(arrays, file, protocol=protocol)


def stated(model: RepVGG) -> dict[str, object]:
    """A checkpoint that says its architecture itself, as our own training script writes it."""
    return {"state_dict": model.state_dict(), "repvgg_deploy": {"variant": codec.encode(model.spec)}}


def load(path: Path, *, weights: str | None = None) -> Checkpoint:
    """Loads as one who states the usual strides, which the tensors of these variants do not tell."""
    return load_checkpoint(path, strides=(2, 2, 2, 2, 2), weights=weights)


def images(seed: int = 1, *, size: int = 64) -> Tensor:
    """float32 (2, 3, size, size): random input."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    """Logits of a model."""
    with torch.no_grad():
        result: Tensor = model(images() if batch is None else batch)
    return result
