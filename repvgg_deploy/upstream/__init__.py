"""The entry points of the original RepVGG code under their own names: the public path for those who come from it.

`from repvgg_deploy.upstream import create_RepVGG_A0, repvgg_model_convert` replaces `from repvgg import …`. State dicts
have the same keys, so that published checkpoints, and yours, load as before. Where the original fails or misleads, this
differs, and says so below. Its `tools/verify.py`, `tools/convert.py` and `example_pspnet.py` run with the import
swapped: blocks have `switch_to_deploy`, `get_equivalent_kernel_bias` and `get_custom_L2`, and follow convolutions whose
stride and dilation were changed in place.

Source: names, signatures, key names and behaviour of https://github.com/DingXiaoH/RepVGG (MIT); the code is this
project's own.
"""

from __future__ import annotations

import copy
from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import CheckpointError, InputError, explain_missing

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise (explain_missing(error) or error) from error

from ..files.output import atomic_output
from ..model.block import BlockSpec, DeployBlock, TrainingBlock
from ..model.checkpoint.names import plus_prefixes
from ..model.fold import reparameterize
from ..model.foreign import read_block
from ..model.network import RepVGG
from ..specs.variants import PUBLISHED

M = TypeVar("M", bound=nn.Module)


class RepVGGBlock(ABC):  # noqa: B024 - a name for two classes, not a base
    """The original's block: every block of this project is an instance of it, in training form and in deploy form.

    Calling it makes a `TrainingBlock` or a `DeployBlock` with the arguments of the original: `in_channels`,
    `out_channels`, `kernel_size`, `stride=1`, `padding=0`, `dilation=1`, `groups=1`, `padding_mode="zeros"`,
    `deploy=False`, `use_se=False`.

    Raises:
        InputError: A kernel other than 3×3, other padding than zeros as wide as the dilation, or a subclass.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return _BlockArguments(*args, **kwargs).build()

    def __init_subclass__(cls) -> None:
        raise InputError(
            "RepVGGBlock stands for two classes and has no subclasses of its own",
            remedy="subclass repvgg_deploy.model.block.TrainingBlock, or write the block as a module that holds one",
        )


RepVGGBlock.register(TrainingBlock)
RepVGGBlock.register(DeployBlock)


@dataclass(frozen=True, slots=True)
class _BlockArguments:
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    deploy: bool = False
    use_se: bool = False

    def build(self) -> TrainingBlock | DeployBlock:
        found, expected = (self.kernel_size, self.padding, self.padding_mode), (3, self.dilation, "zeros")
        if found != expected:
            raise InputError(
                f"kernel size, padding and padding mode of a RepVGGBlock: expected {expected}, found {found}",
                remedy="a block is a 3×3 convolution that keeps the size at stride 1",
            )
        spec = BlockSpec(
            self.in_channels,
            self.out_channels,
            self.stride,
            self.dilation,
            self.groups,
            has_identity=self.in_channels == self.out_channels and self.stride == 1,
            se="before_relu" if self.use_se else "none",
            se_channels=self.out_channels // 16,
        )
        return DeployBlock(spec) if self.deploy else TrainingBlock(spec)


class RepVGGplus(RepVGG):
    """RepVGGplus under its original key names (`stage1.blocks.0`, `stage3_first.blocks.0`, …).

    In `train()` the training form returns the original's dict: `main`, `stage1_aux`, `stage2_aux`, `stage3_first_aux`.
    In `eval()` and in deploy form it returns logits. The original returns the dict in `eval()` too, which exports as
    four outputs, and in deploy form raises AttributeError.
    """

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:  # type: ignore[override]
        """Logits float (N, classes), or in training a dict of them, of normalised RGB float (N, 3, H, W)."""
        if self.training and self.form == "training":
            return self.forward_with_auxiliary(x)
        return super().forward(x)

    def switch_repvggplus_to_deploy(self) -> None:
        """Converts this object: its blocks, and no auxiliary heads and no gradient checkpointing any more.

        Raises:
            CheckpointError: A block cannot be folded.
        """
        for block in self.blocks().values():
            block.switch_to_deploy()
        for name in [name for name in self._modules if name.endswith("_aux")]:
            delattr(self, name)
        self.gradient_checkpointing = False

    # Methods, not hooks: a hook is bound to one object, and repvgg_model_convert moves what a model holds into another.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As `nn.Module.state_dict`, under the original key names."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix: str = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        _rename(state, prefix, plus_prefixes(self.spec.depths))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename(state_dict, prefix, {theirs: ours for ours, theirs in plus_prefixes(self.spec.depths).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rename(state: dict[str, Any], prefix: str, blocks: dict[str, str]) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        old = next((old for old in blocks if name.startswith(old)), None)
        value = state.pop(key)  # put back in any case, so that the order of keys stays
        state[key if old is None else prefix + blocks[old] + name[len(old) :]] = value


class Factory(Protocol):
    """The type of each `create_RepVGG_*`."""

    __name__: str

    def __call__(self, deploy: bool = False, use_checkpoint: bool = False) -> RepVGG:
        """Builds the network.

        Args:
            deploy: Deploy form instead of training form.
            use_checkpoint: Gradient checkpointing: less memory in training, about a third slower.
        """


def _factory(variant: str) -> Factory:
    spec = PUBLISHED[variant]
    kind = RepVGGplus if spec.se == "after_relu" else RepVGG

    def create(deploy: bool = False, use_checkpoint: bool = False) -> RepVGG:
        model = kind(spec, "deploy" if deploy else "training")
        model.gradient_checkpointing = use_checkpoint
        return model

    create.__name__ = create.__qualname__ = _factory_name(variant)
    create.__doc__ = f"{variant} with 1,000 classes and random weights, as the original's function; see `Factory`."
    return create


def _factory_name(variant: str) -> str:
    return f"create_{variant.replace('-', '_')}" if variant.startswith("RepVGG") else f"create_RepVGG_{variant}"


create_RepVGG_A0 = _factory("A0")
create_RepVGG_A1 = _factory("A1")
create_RepVGG_A2 = _factory("A2")
create_RepVGG_B0 = _factory("B0")
create_RepVGG_B1 = _factory("B1")
create_RepVGG_B1g2 = _factory("B1g2")
create_RepVGG_B1g4 = _factory("B1g4")
create_RepVGG_B2 = _factory("B2")
create_RepVGG_B2g2 = _factory("B2g2")
create_RepVGG_B2g4 = _factory("B2g4")
create_RepVGG_B3 = _factory("B3")
create_RepVGG_B3g2 = _factory("B3g2")
create_RepVGG_B3g4 = _factory("B3g4")
create_RepVGG_D2se = _factory("D2se")
create_RepVGGplus_L2pse = _factory("RepVGGplus-L2pse")


def get_RepVGG_func_by_name(name: str) -> Factory:
    """The factory of a name such as `RepVGG-A0` (`RepVGGplus-L2pse` too).

    Raises:
        InputError: No such name; the original raises a bare KeyError.
    """
    variants = {("" if variant.startswith("RepVGG") else "RepVGG-") + variant: variant for variant in PUBLISHED}
    if name not in variants:
        raise InputError(f"unknown model {name!r}", remedy=f"choose one of {', '.join(variants)}")
    factory: Factory = globals()[_factory_name(variants[name])]
    return factory


def create_RepVGGplus_by_name(name: str, deploy: bool = False, use_checkpoint: bool = False) -> RepVGG:
    """The network of a name, `RepVGGplus-L2pse` or one of RepVGG's; see `Factory`.

    Raises:
        InputError: No such name.
    """
    return get_RepVGG_func_by_name(name)(deploy=deploy, use_checkpoint=use_checkpoint)


def repvgg_model_convert(model: M, save_path: str | Path | None = None, do_copy: bool = True) -> M:
    """Converts a RepVGG, or a bigger model that contains RepVGG blocks, to deploy form.

    As in the original, a model in deploy form passes unchanged, `train()` or `eval()` stays as it was, and the result
    can be trained further. Folding is done in float64. Unlike the original, auxiliary heads are dropped, and a model
    without any RepVGG block is an error, not a no-op.

    Args:
        model: In training form.
        save_path: Where to write the state dict with `torch.save`. An existing file is replaced as a whole.
        do_copy: False converts `model` itself: it and the modules inside it stay the same objects, except blocks of
            other projects that have no deploy path of their own.

    Raises:
        CheckpointError: There is no RepVGG block in it, or one that cannot be folded.
        ArtifactError: `save_path` cannot be written.
    """
    result = _convert(model)
    if not do_copy and (type(result) is type(model) or isinstance(model, TrainingBlock)):
        _move(result, model)
        result = model
    if save_path is not None:
        with atomic_output(Path(save_path), force=True) as output, output.partial.open("wb") as file:
            torch.save(result.state_dict(), file)  # through a file object: a full disk is an OSError then
    return result


def _convert(model: M) -> M:
    try:
        result = reparameterize(model)
    except CheckpointError:
        found = [(module, read_block(module, name)) for name, module in model.named_modules()]
        training = any(isinstance(m, TrainingBlock) or (block is not None and block.certain) for m, block in found)
        if training or not any(hasattr(module, "rbr_reparam") for module, _ in found):
            raise
        return copy.deepcopy(model)  # in deploy form already
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, module in result.named_modules():
        module.training = modes.get(name, model.training)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    return result


def _move(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` all that `source` holds; its children of the same class, and our blocks, stay the same objects."""
    kept = dict(target._modules)
    target.__class__ = type(source)
    target.__dict__.clear()
    target.__dict__.update(source.__dict__)
    for name, child in source._modules.items():
        own = kept.get(name)
        same = type(own) is type(child) or (isinstance(own, TrainingBlock) and isinstance(child, DeployBlock))
        if own is not None and child is not None and same:
            _move(child, own)
            target._modules[name] = own
