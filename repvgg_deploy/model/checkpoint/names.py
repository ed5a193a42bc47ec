"""Names in a file → official names, which are also ours: which family, which prefix, which of several models.

A family is one `Naming`, in `_FAMILIES` behind those that tell more. A name that no rule translates is an extra tensor:
refused later or, where it is known to stand beside a model, noted.
Source: DingXiaoH/RepVGG (repvgg.py, repvggplus.py), huggingface/pytorch-image-models (byobnet.py),
open-mmlab/mmpretrain (repvgg.py), PaddlePaddle/PaddleClas (repvgg.py), cxxgtxy/QARepVGG (repvgg.py),
DingXiaoH/RepOptimizers (repoptvgg_model.py), all on https://github.com.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from .lazy import listing, printable


@dataclass(frozen=True, slots=True)
class Naming:
    """How one implementation names its parts.

    Attributes:
        name: For people and for `Checkpoint.family`.
        stem: Prefix of the stem.
        stage: Pattern of a block's prefix; groups `stage` and `index`.
        telling: Pattern of names that no other implementation has; behind the prefix of the model.
        parts: Prefix within a block → official prefix.
        head: Prefix of the classifier.
    """

    name: str
    stem: str
    stage: str
    telling: str
    parts: Mapping[str, str]
    head: str = "linear"


_STAGE = r"stage(?P<stage>[1-4])\.(?P<index>\d{1,5})\."
_BLOCK = rf"(?:stage0\.|{_STAGE})"
_BRANCH = r"rbr_(?:dense|reparam|1x1|identity)\."
_OFFICIAL_PARTS = {
    **{f"{part}.{sub}.": f"{part}.{sub}." for part in ("rbr_dense", "rbr_1x1") for sub in ("conv", "bn")},
    **{part: part for part in ("rbr_1x1.weight", "rbr_identity.", "rbr_reparam.", "bn.")},
    **{f"{se}.{half}.": f"{se}.{half}." for se in ("se", "post_se") for half in ("down", "up")},
}
_OFFICIAL = Naming("official", "stage0.", _STAGE, _BLOCK + _BRANCH, _OFFICIAL_PARTS)
_PLUS_STAGE = r"stage(?P<stage>[124]|3_first|3_second)\.blocks\.(?P<index>\d{1,5})\."
_PLUS = Naming("repvggplus", "stage0.", _PLUS_STAGE, _PLUS_STAGE + _BRANCH, _OFFICIAL_PARTS)
_TIMM_STAGE = r"stages\.(?P<stage>[0-3])\.(?P<index>\d{1,5})\."
_TIMM = Naming(
    "timm", "stem.", _TIMM_STAGE, rf"(?:stem\.|{_TIMM_STAGE})(?:conv_kxk\.(?:conv|bn)|conv_1x1\.conv|reparam_conv)\.",
    {
        "conv_kxk.conv.": "rbr_dense.conv.",
        "conv_kxk.bn.": "rbr_dense.bn.",
        "conv_1x1.conv.": "rbr_1x1.conv.",
        "conv_1x1.bn.": "rbr_1x1.bn.",
        "identity.": "rbr_identity.",
        "reparam_conv.": "rbr_reparam.",
        "attn.fc1.": "se.down.",
        "attn.fc2.": "se.up.",
    },
    "head.fc",
)  # fmt: skip
_MMPRETRAIN_STAGE = r"stage_(?P<stage>[1-4])\.(?P<index>\d{1,5})\."
_MMPRETRAIN = Naming(
    "mmpretrain", "stem.", _MMPRETRAIN_STAGE, rf"(?:stem\.|{_MMPRETRAIN_STAGE})branch_(?:3x3|reparam|1x1)\.",
    {
        "branch_3x3.conv.": "rbr_dense.conv.",
        "branch_3x3.norm.": "rbr_dense.bn.",
        "branch_1x1.conv.": "rbr_1x1.conv.",
        "branch_1x1.norm.": "rbr_1x1.bn.",
        "branch_norm.": "rbr_identity.",
        "branch_reparam.": "rbr_reparam.",
        "se_layer.conv1.conv.": "se.down.",
        "se_layer.conv2.conv.": "se.up.",
    },
    "head.fc",
)  # fmt: skip
# RepOpt-VGG. `_ADDED` are its training-only modes: constant scales between convolutions and one BatchNorm.
_ADDED = Naming("repopt (csla or hyper-search)", "stage0.", _STAGE, _BLOCK + r"scale_(?:conv|1x1|identity)\.", parts={})
_POST_SE = {"post_se.down.": "post_se.down.", "post_se.up.": "post_se.up."}
_BRANCHED_PARTS = {
    "conv_3x3.": "rbr_dense.conv.",
    "bn_3x3.": "rbr_dense.bn.",
    "conv_1x1.": "rbr_1x1.conv.",
    "bn_1x1.": "rbr_1x1.bn.",
    "bn_identity.": "rbr_identity.",
    **_POST_SE,
}
_PLAIN_PARTS = {"conv.": "rbr_dense.conv.", "bn.": "rbr_dense.bn.", **_POST_SE}
_FAMILIES = (
    _PLUS,
    _OFFICIAL,
    _TIMM,
    _MMPRETRAIN,
    _ADDED,
    Naming("repopt", "stage0.", _STAGE, _BLOCK + r"(?:conv|bn)_3x3\.", _BRANCHED_PARTS),
    Naming("repopt", "stage0.", _STAGE, _BLOCK + r"bn\.(?:running_mean|weight)", _PLAIN_PARTS),
    Naming("repopt", "stage0.", _STAGE, _BLOCK + r"conv\.weight", {"conv.": "rbr_reparam.", **_POST_SE}),
)
_ANCHORS = tuple(re.compile(rf"(?P<prefix>(?:[^.]+\.)*?){naming.telling}") for naming in _FAMILIES)
_MAX_MODELS = 16
_EMA_PREFIX = re.compile(r"(^|\.)(ema|model_ema|ema_model|averaged_model|teacher)\.")
_IGNORED = re.compile(
    r"(^|\.)(n_averaged|total_ops|total_params|StructuredToParameterName@@)$"
    r"|(^|\.)(data_preprocessor|normalize)\.(mean|std)$"
)
_LEAVES = {"_mean": "running_mean", "_variance": "running_var"}
_OTHER_NETWORKS = (
    (r"rbr_dense|rbr_reparam|conv_kxk|branch_3x3", "a bigger network with RepVGG blocks, or a MobileOne"),
    (r"(^|\.)layer[1-4]\.\d+\.(conv1|bn1)\.", "a ResNet"),
    (r"blocks\.\d+\.attn\.qkv|encoder\.layer\.\d+|class_token|cls_token", "a vision transformer"),
    (r"features\.(denseblock|norm)", "a DenseNet"),
    (r"features\.\d+\.conv\.\d+|blocks\.\d+\.\d+\.conv_(pw|dw)", "a MobileNet or EfficientNet"),
    (r"(^|\.)features\.\d+\.weight", "a plain VGG"),
    (r"(^|\.)(downsample_layers|stages\.\d+\.blocks)\.", "a ConvNeXt or Swin"),
)


@dataclass(frozen=True, slots=True)
class Translation:
    """A state dict under official names.

    Attributes:
        family: Which implementation wrote it.
        names: Official name → name in the file.
        extra: Names in the file that belong to no part of a RepVGG.
        split: Blocks of RepVGGplus's `stage3_first`, else 0.
        notes: What was set aside, in sentences.
        averaged: The prefix is that of an exponential moving average.
    """

    family: str
    names: dict[str, str]
    extra: tuple[str, ...]
    split: int = 0
    notes: tuple[str, ...] = ()
    averaged: bool = False


def translate(names: Iterable[str], *, numpy: bool = False) -> list[Translation]:
    """Official names for the names of a state dict. One translation for each model: averaged first, then the larger.

    Args:
        names: As in the file, prefixes included.
        numpy: The file holds NumPy arrays, as PaddlePaddle writes them.

    Raises:
        CheckpointError: No family has such names, or it is one whose weights cannot be used.
    """
    every = list(names)
    models = _find_models(every)
    if not models:
        raise _unknown_network(every)
    if len(models) > _MAX_MODELS:
        remedy = "save the state dict of one model in a file of its own"
        raise CheckpointError(f"holds {len(models)} models, expected one or two", remedy=remedy)

    def precedence(prefix: str) -> tuple[bool, int, str]:
        return _EMA_PREFIX.search(prefix) is None, -sum(name.startswith(prefix) for name in every), prefix

    order = sorted(models, key=precedence)
    return [_translate(every, prefix, models[prefix], others=set(models) - {prefix}, numpy=numpy) for prefix in order]


def _find_models(names: list[str]) -> dict[str, Naming]:
    """Prefix → naming of every RepVGG among the names."""
    ranks: dict[str, int] = {}
    for name in names:
        for rank, pattern in enumerate(_ANCHORS):
            match = pattern.match(name)
            if match:
                ranks[match["prefix"]] = min(rank, ranks.get(match["prefix"], rank))
                break
    return {prefix: _FAMILIES[rank] for prefix, rank in ranks.items()}


def _translate(names: list[str], prefix: str, naming: Naming, *, others: set[str], numpy: bool) -> Translation:
    if naming is _ADDED:
        raise CheckpointError(
            "is a RepOpt-VGG in its csla or hyper-search mode: scaled convolutions are added, which only serves to "
            "find the optimizer's scales",
            remedy="give the checkpoint of the target model (mode 'target'), trained with RepOptimizer",
        )
    first_half = re.compile(re.escape(prefix) + r"stage3_first\.blocks\.(\d{1,5})\.")
    halves = [int(match[1]) for match in map(first_half.match, names) if match] if naming is _PLUS else []
    split = 1 + max(halves, default=-1)
    head = _find_head(names, prefix, naming)
    found: dict[str, str] = {}
    extra: list[str] = []
    dropped: list[str] = []
    for name in names:
        official = head.get(name) or _official_name(name, prefix, naming, split=split)
        if official is not None and official not in found:
            found[official] = name
        elif _IGNORED.search(name) or any(other and name.startswith(other) for other in others):
            dropped.append(name)
        else:
            extra.append(name)
    family = _refine(naming, found, numpy=numpy)
    notes = [f"the prefix {printable(prefix)!r} was removed from every name"] if prefix else []
    notes += [f"beside the model, not used: {listing(dropped)}"] if dropped else []
    notes += _drop_cached_kernels(found) if family == "paddleclas" else []
    averaged = _EMA_PREFIX.search(prefix) is not None
    return Translation(family, found, tuple(extra), split, tuple(notes), averaged)


def _official_name(name: str, prefix: str, naming: Naming, *, split: int) -> str | None:
    """The official name, or None for a name that no part of a RepVGG has."""
    if not name.startswith(prefix):
        return None
    rest = name[len(prefix) :]
    # Under official names, too: a RepVGGplus that was trained with this project's own network has them, its third stage
    # being whole.
    if naming in (_PLUS, _OFFICIAL) and re.match(r"(stage1|stage2|stage3_first)_aux\.[03]\.", rest):
        return rest
    match = re.match(naming.stage, rest)
    if rest.startswith(naming.stem):
        block, part = "stage0", rest[len(naming.stem) :]
    elif match is not None:
        stage = int(match["stage"][0]) + (1 if naming is _TIMM else 0)  # timm counts from 0
        index = int(match["index"]) + (split if match["stage"] == "3_second" else 0)
        block, part = f"stage{stage}.{index}", rest[match.end() :]
    else:
        return None
    for theirs, ours in naming.parts.items():
        if part.startswith(theirs):
            leaf = part[len(theirs) :]
            return f"{block}.{ours}{_LEAVES.get(leaf, leaf)}"
    return None


def _find_head(names: list[str], prefix: str, naming: Naming) -> dict[str, str]:
    """The classifier's names → official names. It may stand beside the backbone: the nearest prefix around it first."""
    parts, known = prefix.split(".")[:-1], set(names)
    for count in range(len(parts), -1, -1):
        head = ".".join([*parts[:count], naming.head])
        if f"{head}.weight" in known or f"{head}.bias" in known:
            return {f"{head}.{leaf}": f"linear.{leaf}" for leaf in ("weight", "bias")}
    return {}


def _refine(naming: Naming, found: Mapping[str, str], *, numpy: bool) -> str:
    """The family's name: implementations that share the official names differ in a few tensors."""
    if naming is not _OFFICIAL:
        return naming.name
    if numpy or any(name.endswith("._mean") for name in found.values()):
        return "paddleclas"
    if any(name.endswith(".rbr_1x1.weight") for name in found):
        return "qarepvgg_v2"
    if any(re.fullmatch(r"stage[\d.]+\.bn\.\w+", name) for name in found):
        return "qarepvgg_v1"
    return naming.name


def _drop_cached_kernels(found: dict[str, str]) -> list[str]:
    """PaddleClas keeps the folded kernel of its last evaluation beside the branches, which are what was trained."""
    folded = [name for name in found if ".rbr_reparam." in name]
    cached = [name for name in folded if f"{name.split('.rbr_reparam.')[0]}.rbr_dense.conv.weight" in found]
    for name in cached:
        del found[name]
    return [f"{len(cached)} folded tensors that PaddleClas keeps beside the branches were not used"] if cached else []


def _unknown_network(names: list[str]) -> CheckpointError:
    kinds = (what for pattern, what in _OTHER_NETWORKS if any(re.search(pattern, name) for name in names))
    return CheckpointError(
        f"is no RepVGG but {next(kinds, 'another network')}: expected names such as stage0.rbr_dense.conv.weight "
        f"(official, RepVGGplus, PaddleClas, QARepVGG), stem.conv_kxk.conv.weight (timm), "
        f"backbone.stem.branch_3x3.conv.weight (mmpretrain) or stage0.conv.weight (RepOpt-VGG); "
        f"found {len(names)} tensors: {listing(names)}",
        remedy="give the checkpoint of a RepVGG classifier; load a bigger network with its own code, then "
        "reparameterize(model) and export_module(model, example_inputs)",
    )
