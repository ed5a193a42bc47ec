"""Names in a file → official names, which are also ours: which family, which prefix, which of several models.

A family is one `Naming`, in `_FAMILIES` behind those that tell more. A name that no rule translates is an extra tensor:
refused later or, where it is known to stand beside a model, noted.
Source: DingXiaoH/RepVGG (repvgg.py, repvggplus.py), huggingface/pytorch-image-models (byobnet.py),
open-mmlab/mmpretrain (repvgg.py), PaddlePaddle/PaddleClas (repvgg.py), cxxgtxy/QARepVGG (repvgg.py),
DingXiaoH/RepOptimizers (repoptvgg_model.py), all on https://github.com.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    # The original's `tools/insert_bn.py` gives the folded convolution a BatchNorm again.
    **{f"rbr_reparam.{part}.": f"rbr_dense.{part}." for part in ("conv", "bn")},
    **{part: part for part in ("rbr_1x1.weight", "rbr_dense.weight", "rbr_dense.bias")},
    **{part: part for part in ("rbr_identity.", "rbr_reparam.", "bn.")},
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
_WRAPPERS = frozenset(["module", "wrapped_module"])
_MAX_MODELS = 64
_MAX_NAMES = 20_000
_IGNORED = re.compile(
    r"(^|\.)(n_averaged|decay|num_updates|initted|step|steps|total_ops|total_params|StructuredToParameterName@@)$"
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
        blocks: Official name of each block → its prefix in the file, wrappers left out.
        split: Blocks of RepVGGplus's `stage3_first`, else 0.
        notes: What was set aside, in sentences.
        prefix: Of the model in the file, wrappers left out; empty or ending in a dot.
    """

    family: str
    names: dict[str, str]
    extra: tuple[str, ...]
    blocks: Mapping[str, str]
    split: int = 0
    notes: tuple[str, ...] = ()
    prefix: str = ""


def plus_prefixes(depths: tuple[int, int, int, int]) -> dict[str, str]:
    """Prefix of each block behind the stem → in RepVGGplus, whose third stage stands in two halves."""
    half = depths[2] // 2
    result = {}
    for stage, depth in enumerate(depths, start=1):
        for index in range(depth):
            if stage == 3:
                theirs = f"stage3_first.blocks.{index}." if index < half else f"stage3_second.blocks.{index - half}."
            else:
                theirs = f"stage{stage}.blocks.{index}."
            result[f"stage{stage}.{index}."] = theirs
    return result


def unwrap(name: str) -> str:
    """A name without what wrappers put into it, wherever they do.

    Such are `module` (DataParallel), `_orig_mod` (torch.compile), `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`:
    no part of a RepVGG is called so, and none begins with an underscore but PaddlePaddle's statistics, which come last.
    """
    *path, leaf = name.split(".")
    return ".".join([part for part in path if part not in _WRAPPERS and not part.startswith("_")] + [leaf])


def translate(shapes: Mapping[str, tuple[int, ...]], *, numpy: bool = False) -> list[Translation]:
    """Official names for the names of a state dict: one translation for each model, the larger first.

    Args:
        shapes: By name, as in the file, prefixes and wrappers included.
        numpy: The file holds NumPy arrays, as PaddlePaddle writes them.

    Raises:
        CheckpointError: No family has such names, or it is one whose weights cannot be used.
    """
    plain = {unwrap(name): name for name in shapes}
    if len(plain) != len(shapes):  # the wrappers tell models apart
        plain = {name: name for name in shapes}
    models = _find_models(list(plain))
    if not models:
        raise _unknown_network(list(shapes))
    if len(models) > _MAX_MODELS:
        remedy = "save the state dict of one model in a file of its own"
        raise CheckpointError(f"holds {len(models)} models, expected one or two", remedy=remedy)
    order = sorted(models, key=lambda prefix: (-sum(name.startswith(prefix) for name in plain), prefix))
    claimed = {prefix: _claim(list(plain), prefix, naming) for prefix, naming in models.items()}
    translations = []
    for prefix in order:
        others = [claimed[other] for other in models if other != prefix]
        theirs = {name for claim in others for name in claim}
        translations.append(_translate(_Names(plain, shapes, numpy), prefix, naming=models[prefix], theirs=theirs))
    return translations


def _claim(names: list[str], prefix: str, naming: Naming) -> set[str]:
    """The names that belong to a model: under its prefix, or its parts."""
    head = _find_head(names, prefix, naming)
    if prefix:
        return {name for name in names if name.startswith(prefix) or name in head}
    return {name for name in names if name in head or _official_name(name, prefix, naming, split=0)[2]}


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


class _Names(NamedTuple):
    """The names of a state dict: without wrappers → as in the file, and their shapes by the latter."""

    plain: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    numpy: bool


def _translate(names: _Names, prefix: str, *, naming: Naming, theirs: set[str]) -> Translation:
    """One model of a file; `theirs` are names of its other models."""
    plain, shapes, numpy = names
    if naming is _ADDED:
        raise CheckpointError(
            "is a RepOpt-VGG in its csla or hyper-search mode: scaled convolutions are added, which only serves to "
            "find the optimizer's scales",
            remedy="give the checkpoint of the target model (mode 'target'), trained with RepOptimizer",
        )
    first_half = re.compile(re.escape(prefix) + r"stage3_first\.blocks\.(\d{1,5})\.")
    halves = [int(match[1]) for match in map(first_half.match, plain) if match] if naming is _PLUS else []
    split = 1 + max(halves, default=-1)
    head = _find_head(list(plain), prefix, naming)
    found: dict[str, str] = {}
    blocks: dict[str, str] = {}
    extra: list[str] = []
    dropped: list[str] = []
    for name, original in plain.items():
        block, end, official = _official_name(name, prefix, naming, split=split)
        official = head.get(name) or official
        if official and official not in found:
            found[official] = original
            blocks.setdefault(block, name[:end])
        elif _IGNORED.search(name) or name in theirs:
            dropped.append(original)
        else:
            extra.append(original)
    if len(found) > _MAX_NAMES:
        remedy = "give the checkpoint of a RepVGG: the deepest that is published has 47 blocks"
        raise CheckpointError(f"has {len(found):,} tensors of {len(blocks):,} blocks", remedy=remedy)
    notes = _note_wrappers(found, prefix, plain)
    if "linear.weight" not in found:
        notes += _take_only_classifier(found, extra, shapes, numpy=numpy)
    family = _refine(naming, found, numpy=numpy)
    notes += [f"beside the model, not used: {listing(dropped)}"] if dropped else []
    notes += _drop_cached_kernels(found) if family == "paddleclas" else []
    return Translation(family, found, tuple(extra), blocks, split, tuple(notes), prefix)


def _note_wrappers(found: Mapping[str, str], prefix: str, plain: Mapping[str, str]) -> list[str]:
    """What was removed from the names: the same prefix from every one, or wrappers here and there."""
    short = {original: name for name, original in plain.items()}
    removed = {name.removesuffix(short[name].removeprefix(prefix)) for name in found.values() if name in short}
    if removed <= {""}:
        return []
    if len(removed) == 1:
        return [f"the prefix {printable(removed.pop())!r} was removed from every name"]
    parts = {part for name in found.values() for part in name.split(".")[:-1]}
    wrappers = sorted(part for part in parts if part in _WRAPPERS or part.startswith("_"))
    notes = [f"the prefix {printable(prefix)!r} was removed from every name"] if prefix else []
    return [*notes, f"names of wrappers were removed: {listing(wrappers)}"] if wrappers else notes


def _take_only_classifier(
    found: dict[str, str], extra: list[str], shapes: Mapping[str, tuple[int, ...]], *, numpy: bool
) -> list[str]:
    """A classifier under another name, where exactly one fits: a matrix for the last layer's channels, and its bias."""
    kernels = ("rbr_dense.conv.weight", "rbr_dense.weight", "rbr_reparam.weight")
    last = next((name for name in found if name.startswith("stage4.") and name.endswith(kernels)), None)
    width = shapes[found[last]][:1] if last is not None else ()
    fitting = []
    for name in (name for name in extra if name.endswith(".weight")):
        shape = shapes[name]
        turned = shape[::-1] if numpy and len(shape) == 2 else shape
        bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
        if turned[1:] in (width, (*width, 1, 1)) and width and bias == turned[:1]:
            fitting.append(name.removesuffix(".weight"))
    if len(fitting) > 1:
        raise CheckpointError(
            f"has {len(fitting)} classifiers that fit its last layer, expected one: {listing(fitting)}",
            remedy="save a state dict with the one that is wanted, its tensors called linear.weight and linear.bias",
        )
    for head in fitting:
        for leaf in ("weight", "bias"):
            found[f"linear.{leaf}"] = f"{head}.{leaf}"
            extra.remove(f"{head}.{leaf}")
    return [f"the classifier is {printable(head)!r}, the only one that fits the last layer" for head in fitting]


def _official_name(name: str, prefix: str, naming: Naming, *, split: int) -> tuple[str, int, str]:
    """(official block, where its prefix ends in the name, official name); empty for a name that no RepVGG has."""
    if not name.startswith(prefix):
        return "", 0, ""
    rest = name[len(prefix) :]
    # Under official names, too: a RepVGGplus that was trained with this project's own network has them, its third stage
    # being whole.
    if naming in (_PLUS, _OFFICIAL) and re.match(r"(stage1|stage2|stage3_first)_aux\.[03]\.", rest):
        return "", 0, rest
    match = re.match(naming.stage, rest)
    if rest.startswith(naming.stem):
        block, part = "stage0", rest[len(naming.stem) :]
    elif match is not None:
        stage = int(match["stage"][0]) + (1 if naming is _TIMM else 0)  # timm counts from 0
        index = int(match["index"]) + (split if match["stage"] == "3_second" else 0)
        block, part = f"stage{stage}.{index}", rest[match.end() :]
    else:
        return "", 0, ""
    for theirs, ours in naming.parts.items():
        if part.startswith(theirs):
            leaf = part[len(theirs) :]
            return block, len(name) - len(part), f"{block}.{ours}{_LEAVES.get(leaf, leaf)}"
    return "", 0, ""


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
    if any(name.endswith(".rbr_dense.weight") for name in found):
        return "qarepvgg"
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
        remedy="give the checkpoint of a RepVGG classifier; load a bigger network with its own code and export it: "
        "export_module(model, example_inputs, 'model.onnx')",
    )
