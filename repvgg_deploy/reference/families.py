"""The key names of each public implementation of RepVGG → the official ones, which are also ours.

Source: DingXiaoH/RepVGG (repvgg.py, repvggplus.py), huggingface/pytorch-image-models (byobnet.py), open-mmlab/mmpretrain (repvgg.py),
PaddlePaddle/PaddleClas (repvgg.py), cxxgtxy/QARepVGG (repvgg.py), DingXiaoH/RepOptimizers (repoptvgg_model.py), all on https://github.com.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


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
REPOPT_TARGET = Naming("repopt", "stage0.", _OFFICIAL_STAGE, {"conv.": "rbr_dense.conv.", "bn.": "rbr_dense.bn.", **_POST_SE})
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
