"""What a pickled module tells beside its tensors, and what of it a RepVGG cannot express.

Strides and the epsilon of each BatchNorm are taken. Activation, pooling, dilation, padding mode, normalisation and
every further module are compared with what a RepVGG computes: whatever is another, or is not known here, is refused by
name. Nothing of the module is run: classes are names, attributes are values in the pickle.
Source: `__dict__` of the modules in torch.nn (https://github.com/pytorch/pytorch), timm and mmpretrain.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import CheckpointError
from .lazy import listing, printable
from .names import Translation, unwrap
from .objects import ForeignObject, Global, attributes_of, class_of, is_graph_module

_CONVOLUTIONS = frozenset(["Conv2d"])
_NORMS = frozenset(["BatchNorm2d", "SyncBatchNorm", "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNorm2d"])
_LINEAR = frozenset(["Linear", "NonDynamicallyQuantizableLinear"])
_KNOWN_ROOTS = frozenset(
    ["torch", "timm", "torchvision", "mmcv", "mmengine", "mmcls", "mmpretrain", "apex", "detectron2"]
)
_PASSIVE = frozenset(
    ["Identity", "Flatten", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
     "DropPath", "StochasticDepth", "DropBlock2d", "QuantStub", "DeQuantStub"]
)  # fmt: skip
_LISTS = frozenset(["Sequential", "ModuleList", "ModuleDict"])
_POOLS = frozenset(["AdaptiveAvgPool2d", "FastAdaptiveAvgPool2d", "FastAdaptiveAvgPool"])
_POOL_HOLDERS = frozenset(["SelectAdaptivePool2d", "GlobalAveragePooling"])
_IDENTITY = frozenset(["Identity"])
_ACTIVATION = re.compile(r"non_?linearity|act|activation|relu")
_CONV_HOLDERS = frozenset(["ConvModule"])  # mmcv's: a convolution with its activation
_FUNCTIONS = frozenset(["torch.nn.functional", "torch._C._nn", "torch", "torch._C._VariableFunctions"])
_FACTORS = re.compile(r"((layer|res|residual|branch)_?)?(alpha|beta|gamma|scale|slope|gain|temperature)s?")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MAX_WORK = 20_000_000
_INERT_HOOKS = ("torch.nn.utils.", "torch.utils.hooks.")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a pickled module tells.

    Attributes:
        strides: Of the stem and of the first block of stages 1 to 4.
        bn_eps: The most usual epsilon; None where there is no BatchNorm.
        other_eps: Official name of a BatchNorm → its epsilon, where it is another.
        activation: Whether its blocks hold ReLU as a module; False where they hold none, so that it is not told.
        pooling: Whether it holds its global average pooling as a module.
        bare: Blocks with an identity branch that has no BatchNorm.
    """

    strides: tuple[int, int, int, int, int]
    bn_eps: float | None
    other_eps: Mapping[str, float] = field(default_factory=dict)
    activation: bool = False
    pooling: bool = False
    bare: frozenset[str] = frozenset()

    @property
    def untold(self) -> tuple[str, ...]:
        """What the module computes by functions in its code, which are not in the file."""
        missing = [] if self.activation else ["the activation"]
        return tuple(missing if self.pooling else [*missing, "the pooling"])


def read_facts(modules: Mapping[str, ForeignObject], translation: Translation) -> Facts:
    """Reads the facts of a pickled module.

    Args:
        modules: Itself and its submodules, by path.
        translation: Which tensor of it is which part of a RepVGG.

    Raises:
        CheckpointError: It is not what a RepVGG computes, or holds a module of which that is not known.
    """
    return _Reader(modules, translation).read()


class _Reader:
    def __init__(self, modules: Mapping[str, ForeignObject], translation: Translation) -> None:
        # Paths without wrappers; of a wrapper and what it wraps the inner one, which comes later, counts.
        self._modules = {unwrap(f"{path}.").rstrip("."): module for path, module in modules.items()}
        self._blocks = {block: prefix.rstrip(".") for block, prefix in translation.blocks.items() if block}
        owners: dict[str, str] = {}
        for official, name in translation.names.items():
            owners.setdefault(unwrap(name).rpartition(".")[0], official.rpartition(".")[0])
        self._owners = owners  # path of a module that holds used tensors → official name of that part
        self._problems: dict[str, list[str]] = {}

    def read(self) -> Facts:
        size = len(self._modules) * len(self._owners) + sum(map(_count_attributes, self._modules.values()))
        if size > _MAX_WORK:
            message = f"is a pickled module of {len(self._modules):,} modules: far more than a RepVGG has"
            raise CheckpointError(message, remedy="save the state dict alone: torch.save(model.state_dict(), …)")
        for path, module in self._modules.items():
            self._check_hooks(path, module)
        strides = {block: self._read_strides(block, path) for block, path in self._blocks.items()}
        epsilons = self._read_norms()
        self._check_classifier()
        activations, pooling = self._check_others()
        self._raise_problems()
        firsts = ("stage0", "stage1.0", "stage2.0", "stage3.0", "stage4.0")
        stem, *stages = (strides.get(block, 2) for block in firsts)
        usual = Counter(epsilons.values()).most_common(1)
        eps = usual[0][0] if usual else None
        identities = (
            path.rpartition(".")[0] for path, module in self._modules.items() if _is_identity_branch(path, module)
        )
        by_path = {path: block for block, path in self._blocks.items()}
        return Facts(
            strides=(stem, stages[0], stages[1], stages[2], stages[3]),
            bn_eps=eps,
            other_eps={name: value for name, value in epsilons.items() if value != eps},
            activation=activations,
            pooling=pooling,
            bare=frozenset(by_path[path] for path in identities if path in by_path),
        )

    def _refuse(self, what: str, path: str) -> None:
        self._problems.setdefault(what, []).append(path or "the module itself")

    def _raise_problems(self) -> None:
        if not self._problems:
            return
        found = "; ".join(f"{what} ({listing(paths, 2)})" for what, paths in list(self._problems.items())[:3])
        raise CheckpointError(
            f"is a pickled module with {found}, which a RepVGG does not have: as a RepVGG it would compute something "
            f"else",
            remedy="load it with its own code and export what it is: model = torch.load('FILE', weights_only=False); "
            "repvgg_deploy.export_module(model, torch.randn(1, 3, 224, 224), 'model.onnx')",
        )

    def _check_hooks(self, path: str, module: ForeignObject) -> None:
        attributes = attributes_of(module)
        if is_graph_module(module):
            self._refuse("code that torch.fx traced", path)
        for name in _HOOKS:
            hooks = attributes.get(name)
            for hook in hooks.values() if isinstance(hooks, dict) else ():
                kind = class_of(hook) if isinstance(hook, ForeignObject) else getattr(hook, "path", "an object")
                if not kind.startswith(_INERT_HOOKS):
                    self._refuse(f"a forward hook ({printable(kind)})", path)

    def _read_strides(self, block: str, path: str) -> int:
        """The stride of a block's convolutions, and whether they are what a RepVGG's are."""
        strides = set()
        for owner, part in self._owners.items():
            inner = part.removeprefix(f"{block}.")
            if inner == part or not inner.endswith(("conv", "rbr_reparam", "rbr_1x1", "rbr_dense", "down", "up")):
                continue
            attributes = self._expect(owner, _CONVOLUTIONS, "convolution")
            size = _pair(attributes.get("kernel_size"))
            dilation, stride = _pair(attributes.get("dilation")), _pair(attributes.get("stride"))
            if inner.endswith(("down", "up")):
                strides_of_se = {size, dilation, stride}
                if not strides_of_se <= {(1, 1)}:
                    self._refuse("a squeeze-and-excitation block of other than 1×1 convolutions", owner)
                continue
            if dilation != (1, 1) and size != (1, 1):
                self._refuse(f"dilation {_show(dilation)}", owner)
            if stride not in ((1, 1), (2, 2)):
                self._refuse(f"the stride {_show(stride)}", owner)
            elif stride != (1, 1) and block != "stage0" and not block.endswith(".0"):
                self._refuse(f"the stride {_show(stride)} behind the first block of a stage", owner)
            padding = attributes.get("padding")
            half = None if size is None else tuple(side // 2 for side in size)
            same = padding == "same" and stride == (1, 1)
            if not same and _pair(padding if padding != "valid" else 0) != half and dilation == (1, 1):
                self._refuse(f"padding {_show(padding)} of a {_show(size)} convolution", owner)
            if attributes.get("padding_mode", "zeros") != "zeros":
                self._refuse(f"padding mode {_show(attributes.get('padding_mode'))}", owner)
            strides.add(stride)
        if len(strides) > 1:
            self._refuse("branches of different strides", path)
        return next((stride[0] for stride in strides if stride is not None), 2)

    def _expect(self, path: str, classes: frozenset[str], what: str) -> dict[object, object]:
        """The attributes of a module that must be of one of these classes."""
        module = self._modules.get(path)
        if module is None or not _is_known(class_of(module), classes):
            named = "nothing" if module is None else _short(class_of(module))
            self._refuse(f"{named} as a {what}", path)
        return attributes_of(module) if module is not None else {}

    def _read_norms(self) -> dict[str, float]:
        epsilons = {}
        for path, part in self._owners.items():
            if part.startswith("stage") and "_aux" not in part and part.endswith((".bn", "rbr_identity")):
                attributes = self._expect(path, _NORMS, "BatchNorm")
                eps = attributes.get("eps", 1e-5)
                if attributes.get("track_running_stats", True) is not True:
                    self._refuse("a BatchNorm of batch statistics (track_running_stats=False)", path)
                if not isinstance(eps, (int, float)) or not 0 < eps < 1:
                    self._refuse(f"the epsilon {_show(eps)}", path)
                else:
                    epsilons[part] = float(eps)
        return epsilons

    def _check_classifier(self) -> None:
        for path, part in self._owners.items():
            if part == "linear":
                module = self._modules.get(path)
                is_conv = module is not None and class_of(module).endswith(".Conv2d")
                self._expect(path, _CONVOLUTIONS if is_conv else _LINEAR, "classifier")

    def _check_others(self) -> tuple[bool, bool]:
        """Every module that holds no used tensor; whether activation and pooling are told."""
        activations: dict[str, list[str]] = {block: [] for block in self._blocks}
        pools: list[str] = []
        functional: list[str] = []
        holders = {path for owner in self._owners for path in _ancestors(owner)}
        prefixes = sorted(((f"{path}.", block) for block, path in self._blocks.items()), key=lambda pair: -len(pair[0]))
        for path, module in self._modules.items():
            block = next((name for prefix, name in prefixes if f"{path}.".startswith(prefix)), "")
            if "_aux" in path and not block:
                continue  # auxiliary heads serve training only
            self._check_attributes(path, module, functional)
            if path in self._owners or path in holders:
                continue
            kind = class_of(module)
            name = kind.rpartition(".")[2]
            if self._is_passive(kind, path):
                continue
            if block and name == "ReLU" and kind.startswith("torch."):
                self._place_activation(path, block, activations)
            elif block and self._is_excitation(path, block):
                if name not in ("ReLU", "Sigmoid", *_POOLS) or not _is_known(kind, frozenset([name])):
                    self._refuse(f"{_short(kind)} in a squeeze-and-excitation block", path)
            elif not block and _is_known(kind, _POOLS) and self._pools_all(module):
                pools.append(path)
            elif not block and _is_known(kind, _POOL_HOLDERS) and self._averages(module):
                pass
            else:
                self._refuse(self._describe(kind, module), path)
        if len(pools) > 1:
            self._refuse(f"{len(pools)} global poolings", pools[0])
        return self._judge_activations(activations, functional), bool(pools)

    def _place_activation(self, path: str, block: str, activations: dict[str, list[str]]) -> None:
        inner = path[len(self._blocks[block]) + 1 :]
        branch = f"{self._blocks[block]}.{inner.partition('.')[0]}"
        owners = [part for owner, part in self._owners.items() if f"{owner}.".startswith(f"{branch}.")]
        if any(".se." in f"{part}." or ".post_se." in f"{part}." for part in owners):
            return
        alone = all(part.startswith((f"{block}.rbr_dense", f"{block}.rbr_reparam")) for part in owners)
        parts = {part for part in self._owners.values() if part.startswith(f"{block}.")}
        if owners and not (alone and not any(".rbr_1x1" in part or ".rbr_identity" in part for part in parts)):
            self._refuse("a ReLU within a branch", path)
        activations[block].append(path)

    def _judge_activations(self, activations: Mapping[str, list[str]], functional: list[str]) -> bool:
        counts = {block: len(paths) for block, paths in activations.items()}
        for block, count in counts.items():
            if count > 1:
                self._refuse(f"{count} activations in a block", self._blocks[block])
        without = [self._blocks[block] for block, count in counts.items() if count == 0]
        if without and len(without) < len(counts):
            for path in without:
                self._refuse("no activation in some blocks", path)
        for path, module in self._modules.items():
            owner, _, name = path.rpartition(".")
            if owner in without and _ACTIVATION.fullmatch(name) and _is_known(class_of(module), _IDENTITY):
                self._refuse("Identity as the activation", path)
        return not without or len(functional) == len(counts)

    def _check_attributes(self, path: str, module: ForeignObject, functional: list[str]) -> None:
        """Functions and factors that a module of the user's keeps in its attributes."""
        if class_of(module).startswith("torch.nn.modules."):
            return
        for name, kept in attributes_of(module).items():
            value = kept
            if isinstance(kept, ForeignObject) and kept.name == "functools.partial" and isinstance(kept.args, tuple):
                value = kept.args[0] if kept.args else None
            if isinstance(value, Global) and value.module in _FUNCTIONS and value.name[:1].islower():
                if value.name in ("relu", "relu_"):
                    functional.append(path)
                else:
                    self._refuse(f"the function {printable(value.name)}", f"{path}.{printable(name)}")
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            if plain and isinstance(name, str) and _FACTORS.fullmatch(name) and value != 1:
                self._refuse(f"the factor {printable(name)} = {_show(value)}", path)

    def _is_passive(self, kind: str, path: str) -> bool:
        """Whether a module does nothing in `eval()`, or no more than its submodules, which are looked at too."""
        if kind.startswith(("torch.nn.modules.loss.", "torchmetrics.")):
            return True
        return _is_known(kind, _PASSIVE | _LISTS | _CONV_HOLDERS) or self._has_loss_parent(path)

    def _has_loss_parent(self, path: str) -> bool:
        """mmpretrain keeps losses under `loss_module`, data preparation under `data_preprocessor`."""
        return any(part in ("loss_module", "data_preprocessor") for part in path.split("."))

    def _is_excitation(self, path: str, block: str) -> bool:
        inner = path[len(self._blocks[block]) + 1 :].partition(".")[0]
        prefix = f"{self._blocks[block]}.{inner}."
        parts = (part for owner, part in self._owners.items() if owner.startswith(prefix))
        return any(part.endswith((".down", ".up")) for part in parts)

    def _pools_all(self, module: ForeignObject) -> bool:
        size = attributes_of(module).get("output_size", 1)
        return _pair(size) == (1, 1)

    def _averages(self, module: ForeignObject) -> bool:
        return attributes_of(module).get("pool_type", "avg") in ("avg", "fast", "fastavg")

    def _describe(self, kind: str, module: ForeignObject) -> str:
        """A class with the values that tell what it does, such as `LeakyReLU (negative_slope 0.1)`."""
        told = ("negative_slope", "alpha", "lambd", "approximate", "output_size", "kernel_size", "p", "pool_type")
        values = attributes_of(module)
        shown = [f"{name} {_show(values[name])}" for name in told if name in values]
        return f"{_short(kind)} {', '.join(shown)}".strip()


def _is_known(kind: str, names: frozenset[str]) -> bool:
    """Whether a class is one of these, of a library whose class of that name is known."""
    return kind.partition(".")[0] in _KNOWN_ROOTS and kind.rpartition(".")[2] in names


def _is_identity_branch(path: str, module: ForeignObject) -> bool:
    return path.rpartition(".")[2] in ("rbr_identity", "identity", "branch_norm") and class_of(module).endswith(
        ".Identity"
    )


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _short(kind: str) -> str:
    root = kind.partition(".")[0]
    return printable(kind.rpartition(".")[2] if root in _KNOWN_ROOTS else kind)


def _pair(value: object) -> tuple[int, int] | None:
    """(height, width) of an attribute that is one number or two."""
    if type(value) is int:
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(item) is int for item in value):
        return (value[0], value[1])
    return None


def _count_attributes(module: ForeignObject) -> int:
    """How many values its attributes hold, those of its dicts of hooks too."""
    attributes = attributes_of(module)
    hooks = (attributes.get(name) for name in _HOOKS)
    return len(attributes) + sum(len(held) for held in hooks if isinstance(held, dict))


def _show(value: object) -> str:
    """A value for a message; of what holds others only numbers are shown."""
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return "×".join(_show(item) if not isinstance(item, (tuple, list)) else "…" for item in value)
    if isinstance(value, int) and value.bit_length() > 63:
        return "a huge number"
    return str(value) if isinstance(value, (int, float, type(None))) else printable(value)
