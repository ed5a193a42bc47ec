"""Blocks of QARepVGG whose branches lack a BatchNorm, or its scale and shift: completed by neutral ones.

QARepVGG has many blocks of the same three branches, which differ in what is normalised. A branch without BatchNorm is
one with a neutral BatchNorm (mean 0, variance 1, epsilon 0, scale 1, shift 0), to the bit; so is an identity that is
added as it is. What is completed is a block of the kind `repvgg`, or `qarepvgg_v1` where a BatchNorm follows the sum.
Source: https://github.com/cxxgtxy/QARepVGG (repvgg.py: QARepVGGBlock, V3 to V6, V9, V10, V14, V15, M3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from .lazy import FLOAT32, LazyTensor

if TYPE_CHECKING:
    import torch

_LEAVES = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
_REPEATED = re.compile(r"stage[1-4]\.[1-9]\d*")


def complete_branches(
    tensors: Mapping[str, LazyTensor], bare: frozenset[str] | None
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Completes the branches of every block, where they need it.

    Args:
        tensors: By official name.
        bare: Blocks of which a pickled module tells that their identity has no BatchNorm; None where nothing tells.

    Returns:
        The tensors, and the names of the BatchNorms that were added.

    Raises:
        CheckpointError: No block has an identity with a BatchNorm, and nothing tells whether it has one without.
    """
    blocks = list(dict.fromkeys(m[0] for name in tensors if (m := re.match(r"stage0|stage[1-4]\.\d+", name))))
    if any(".rbr_reparam." in name for name in tensors) or not any(".rbr_1x1." in name for name in tensors):
        return dict(tensors), ()
    plain_dense = any(name.endswith(".rbr_dense.weight") for name in tensors)
    plain_pointwise = any(name.endswith(".rbr_1x1.weight") for name in tensors)
    last = any(re.fullmatch(r"stage[\d.]+\.bn\.running_mean", name) for name in tensors)
    identities = any(".rbr_identity." in name for name in tensors)
    if plain_pointwise and last and not plain_dense and not identities:
        return dict(tensors), ()  # qarepvgg_v2, which this project's network has as it is
    result, added = _add_affine(tensors)
    repeated = [block for block in blocks if _REPEATED.fullmatch(block)]
    if identities and not bare:
        places = []
    elif bare is not None:
        places = sorted(bare)
    elif plain_dense or plain_pointwise or added:
        places = repeated  # only QARepVGG has such branches, and its identities are added as they are
    else:
        places = []
    if repeated and not identities and not places:
        raise CheckpointError(
            "has no identity branch with a BatchNorm in any block: a QARepVGG that adds its input as it is (V5, V6), "
            "or blocks without an identity; " + ("it has none" if bare is not None else "tensors do not tell which"),
            remedy="give the whole module, torch.save(model, 'model.pth'), which tells; or export it: "
            "export_module(model, example_inputs, 'model.onnx')",
        )
    new: set[str] = set()
    for block in blocks:
        for branch in ("rbr_dense", "rbr_1x1"):
            if f"{block}.{branch}.weight" in result:
                kernel = result[f"{block}.{branch}.conv.weight"] = result.pop(f"{block}.{branch}.weight")
                bias = result.pop(f"{block}.{branch}.bias", None)
                new.add(_add_norm(result, f"{block}.{branch}.bn", kernel.shape[:1]))
                if bias is not None:
                    result[f"{block}.{branch}.bn.bias"] = bias
        dense = result.get(f"{block}.rbr_dense.conv.weight")  # without it the block is named as incomplete
        if dense is not None and block in places and f"{block}.rbr_identity.running_mean" not in result:
            new.add(_add_norm(result, f"{block}.rbr_identity", dense.shape[:1]))
    return result, tuple(sorted(new))


def _add_affine(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], bool]:
    """BatchNorms without scale and shift (`affine=False`), as every block of a kind has them, get neutral ones."""
    result, added = dict(tensors), False
    for branch in ("rbr_dense.bn", "rbr_1x1.bn", "rbr_identity"):
        norms = [name for name in tensors if name.endswith(f".{branch}.running_mean")]
        bases = [name.removesuffix(".running_mean") for name in norms]
        if bases and not any(f"{base}.{leaf}" in tensors for base in bases for leaf in ("weight", "bias")):
            added = True
            for base in bases:
                shape = tensors[f"{base}.running_mean"].shape
                result |= {f"{base}.{leaf}": constant(shape, _LEAVES[leaf]) for leaf in ("weight", "bias")}
    return result, added


def _add_norm(tensors: dict[str, LazyTensor], name: str, shape: tuple[int, ...]) -> str:
    for leaf, value in _LEAVES.items():
        tensors[f"{name}.{leaf}"] = constant(shape, value)
    return name


def constant(shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one value that stands in no file, float32."""

    def load() -> torch.Tensor:
        import torch

        return torch.full(shape, value)

    return LazyTensor(FLOAT32, shape, object(), math.prod(shape) * FLOAT32.itemsize, load)
