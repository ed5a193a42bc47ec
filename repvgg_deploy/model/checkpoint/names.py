"""Names in a file → official names: which family, which prefix, which of several models.

A name that no rule translates is an extra tensor: refused later or, where it is known to stand beside a model, noted.

The key names of each public implementation of RepVGG → the official ones, which are also ours.

Source: DingXiaoH/RepVGG (repvgg.py, repvggplus.py), huggingface/pytorch-image-models (byobnet.py),
open-mmlab/mmpretrain (repvgg.py), PaddlePaddle/PaddleClas (repvgg.py), cxxgtxy/QARepVGG (repvgg.py),
DingXiaoH/RepOptimizers (repoptvgg_model.py), all on https://github.com.

What a file holds → candidate state dicts: wrappers are opened, modules walked, averaged weights put first.

Source: `main.py` of https://github.com/DingXiaoH/RepVGG (`model`, `ema`), timm (`state_dict_ema`), mmengine
(`state_dict`; its `ema_state_dict` holds the weights that are *not* averaged, because mmengine swaps the two on
saving), `torch.nn.Module` for pickled modules.
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
        parts: Prefix within a block → official prefix.
        head: Prefix of the classifier.
    """

    name: str
    stem: str
    stage: re.Pattern[str]
    parts: Mapping[str, str]
    head: str = "linear"


_OFFICIAL_PARTS = {
    **{f"{part}.{sub}.": f"{part}.{sub}." for part in ("rbr_dense", "rbr_1x1") for sub in ("conv", "bn")},
    "rbr_1x1.weight": "rbr_1x1.weight",
    "rbr_identity.": "rbr_identity.",
    "rbr_reparam.": "rbr_reparam.",
    "bn.": "bn.",
    **{f"{se}.{half}.": f"{se}.{half}." for se in ("se", "post_se") for half in ("down", "up")},
}
_OFFICIAL_STAGE = re.compile(r"stage(?P<stage>[1-4])\.(?P<index>\d{1,5})\.")
_POST_SE = {"post_se.down.": "post_se.down.", "post_se.up.": "post_se.up."}
OFFICIAL = Naming("official", "stage0.", _OFFICIAL_STAGE, _OFFICIAL_PARTS)
_PLUS_STAGE = re.compile(r"stage(?P<stage>[124]|3_first|3_second)\.blocks\.(?P<index>\d{1,5})\.")
PLUS = Naming("repvggplus", "stage0.", _PLUS_STAGE, _OFFICIAL_PARTS)
TIMM = Naming(
    "timm",
    "stem.",
    re.compile(r"stages\.(?P<stage>[0-3])\.(?P<index>\d{1,5})\."),
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
)
MMPRETRAIN = Naming(
    "mmpretrain",
    "stem.",
    re.compile(r"stage_(?P<stage>[1-4])\.(?P<index>\d{1,5})\."),
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
)
REPOPT_TARGET = Naming(
    "repopt", "stage0.", _OFFICIAL_STAGE, {"conv.": "rbr_dense.conv.", "bn.": "rbr_dense.bn.", **_POST_SE}
)
REPOPT_DEPLOY = Naming("repopt", "stage0.", _OFFICIAL_STAGE, {"conv.": "rbr_reparam.", **_POST_SE})
REPOPT_REPVGG = Naming(
    "repopt",
    "stage0.",
    _OFFICIAL_STAGE,
    {
        "conv_3x3.": "rbr_dense.conv.",
        "bn_3x3.": "rbr_dense.bn.",
        "conv_1x1.": "rbr_1x1.conv.",
        "bn_1x1.": "rbr_1x1.bn.",
        "bn_identity.": "rbr_identity.",
        **_POST_SE,
    },
)
REPOPT_ADDED = Naming("repopt (csla or hyper-search)", "stage0.", _OFFICIAL_STAGE, {})
"""Its training-only modes: constant scales between convolutions and one BatchNorm."""
_ANCHOR_TEXTS = (
    (PLUS, PLUS.stage.pattern + r"rbr_(?:dense|reparam|1x1|identity)\."),
    (OFFICIAL, rf"(?:stage0\.|{_OFFICIAL_STAGE.pattern})rbr_(?:dense|reparam|1x1|identity)\."),
    (TIMM, rf"(?:stem\.|{TIMM.stage.pattern})(?:conv_kxk\.(?:conv|bn)|conv_1x1\.conv|reparam_conv)\."),
    (MMPRETRAIN, rf"(?:stem\.|{MMPRETRAIN.stage.pattern})branch_(?:3x3|reparam|1x1)\."),
    (REPOPT_ADDED, rf"(?:stage0\.|{_OFFICIAL_STAGE.pattern})scale_(?:conv|1x1|identity)\."),
    (REPOPT_REPVGG, rf"(?:stage0\.|{_OFFICIAL_STAGE.pattern})(?:conv|bn)_3x3\."),
    (REPOPT_TARGET, rf"(?:stage0\.|{_OFFICIAL_STAGE.pattern})bn\.(?:running_mean|weight)"),
    (REPOPT_DEPLOY, rf"(?:stage0\.|{_OFFICIAL_STAGE.pattern})conv\.weight"),
)
ANCHORS = tuple((naming, re.compile(rf"(?P<prefix>(?:[^.]+\.)*?){pattern}")) for naming, pattern in _ANCHOR_TEXTS)
"""Names that give a family away, the most telling first; group `prefix` is what stands before the model."""
_MAX_MODELS = 16
_EMA_PREFIX = re.compile(r"(^|\.)(ema|model_ema|ema_model|averaged_model|teacher)\.")
_IGNORED = re.compile(
    r"(^|\.)(n_averaged|total_ops|total_params|StructuredToParameterName@@)$|(^|\.)(data_preprocessor|normalize)\.(mean|std)$"
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
    """Official names for the names of a state dict, one translation a model in it: averaged weights first, then the larger.

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
        raise CheckpointError(
            f"holds {len(models)} models, expected one or two",
            remedy="save the state dict of one model in a file of its own",
        )
    order = sorted(
        models,
        key=lambda prefix: (
            _EMA_PREFIX.search(prefix) is None,
            -sum(name.startswith(prefix) for name in every),
            prefix,
        ),
    )
    return [_translate(every, prefix, models[prefix], others=set(models) - {prefix}, numpy=numpy) for prefix in order]


def _find_models(names: list[str]) -> dict[str, Naming]:
    """Prefix → naming of every RepVGG among the names."""
    ranks: dict[str, int] = {}
    for name in names:
        for rank, (_, pattern) in enumerate(ANCHORS):
            match = pattern.match(name)
            if match:
                prefix = match["prefix"]
                ranks[prefix] = min(rank, ranks.get(prefix, rank))
                break
    return {prefix: ANCHORS[rank][0] for prefix, rank in ranks.items()}


def _translate(names: list[str], prefix: str, naming: Naming, *, others: set[str], numpy: bool) -> Translation:
    if naming is REPOPT_ADDED:
        raise CheckpointError(
            "is a RepOpt-VGG in its csla or hyper-search mode: scaled convolutions are added, which only serves "
            "to find the optimizer's scales",
            remedy="give the checkpoint of the target model (mode 'target'), trained with RepOptimizer",
        )
    split = _count_first_half(names, prefix) if naming is PLUS else 0
    head = _find_head(names, prefix, naming)
    found: dict[str, str] = {}
    extra: list[str] = []
    dropped: list[str] = []
    for name in names:
        official = head.get(name) or _official_name(name, prefix, naming, split=split)
        if official is not None and official not in found:
            found[official] = name
        else:
            beside = _IGNORED.search(name) or any(other and name.startswith(other) for other in others)
            (dropped if beside else extra).append(name)
    family = _refine(naming, found, numpy=numpy)
    notes = [f"the prefix {printable(prefix)!r} was removed from every name"] if prefix else []
    notes += [f"beside the model, not used: {listing(dropped)}"] if dropped else []
    notes += _drop_cached_kernels(found) if family == "paddleclas" else []
    return Translation(
        family, found, tuple(extra), split, tuple(notes), averaged=_EMA_PREFIX.search(prefix) is not None
    )


def _count_first_half(names: list[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"stage3_first\.blocks\.(\d{1,5})\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def _official_name(name: str, prefix: str, naming: Naming, *, split: int) -> str | None:
    """The official name, or None for a name that no part of a RepVGG has."""
    if not name.startswith(prefix):
        return None
    rest = name[len(prefix) :]
    # Under official names, too: a RepVGGplus that was trained with this project's own network has them, its third stage
    # being whole.
    if naming in (PLUS, OFFICIAL) and re.match(r"(stage1|stage2|stage3_first)_aux\.[03]\.", rest):
        return rest
    if rest.startswith(naming.stem):
        block, part = "stage0", rest[len(naming.stem) :]
    else:
        match = naming.stage.match(rest)
        if match is None:
            return None
        block, part = _block_name(match, naming, split), rest[match.end() :]
    for theirs, ours in naming.parts.items():
        if part.startswith(theirs):
            leaf = part[len(theirs) :]
            return f"{block}.{ours}{_LEAVES.get(leaf, leaf)}"
    return None


def _block_name(match: re.Match[str], naming: Naming, split: int) -> str:
    stage, index = match["stage"], int(match["index"])
    if naming is TIMM:
        stage = str(int(stage) + 1)
    return f"stage{stage[0]}.{index + (split if stage == '3_second' else 0)}"


def _find_head(names: list[str], prefix: str, naming: Naming) -> dict[str, str]:
    """The classifier's names → official names. It may stand beside the backbone: under any prefix that contains it, the nearest first."""
    parts, known = prefix.split(".")[:-1], set(names)
    for count in range(len(parts), -1, -1):
        head = ".".join([*parts[:count], naming.head])
        if f"{head}.weight" in known or f"{head}.bias" in known:
            return {f"{head}.{leaf}": f"linear.{leaf}" for leaf in ("weight", "bias")}
    return {}


def _refine(naming: Naming, found: Mapping[str, str], *, numpy: bool) -> str:
    """The family's name: implementations that share the official names differ in a few tensors."""
    if naming is not OFFICIAL:
        return naming.name
    if numpy or any(name.endswith("._mean") for name in found.values()):
        return "paddleclas"
    if any(name.endswith(".rbr_1x1.weight") for name in found):
        return "qarepvgg_v2"
    if any(re.fullmatch(r"stage[\d.]+\.bn\.\w+", name) for name in found):
        return "qarepvgg_v1"
    return naming.name


def _drop_cached_kernels(found: dict[str, str]) -> list[str]:
    """PaddleClas keeps the folded kernel of its last evaluation beside the branches; the branches are what was trained."""
    cached = [
        name
        for name in found
        if ".rbr_reparam." in name and f"{name.split('.rbr_reparam.')[0]}.rbr_dense.conv.weight" in found
    ]
    for name in cached:
        del found[name]
    return [f"{len(cached)} folded tensors that PaddleClas keeps beside the branches were not used"] if cached else []


def _unknown_network(names: list[str]) -> CheckpointError:
    looks = next(
        (what for pattern, what in _OTHER_NETWORKS if any(re.search(pattern, name) for name in names)),
        "another network",
    )
    return CheckpointError(
        f"is no RepVGG but {looks}: expected names such as stage0.rbr_dense.conv.weight (official, RepVGGplus, "
        f"PaddleClas, QARepVGG), "
        f"stem.conv_kxk.conv.weight (timm), backbone.stem.branch_3x3.conv.weight (mmpretrain) or "
        f"stage0.conv.weight (RepOpt-VGG); "
        f"found {len(names)} tensors: {listing(names)}",
        remedy="give the checkpoint of a RepVGG classifier; load a bigger network with its own code, then "
        "reparameterize(model) and "
        "export_module(model, example_inputs)",
    )
