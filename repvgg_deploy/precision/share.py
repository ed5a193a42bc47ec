"""One scale for what meets in a Concat, where it costs next to nothing: then each tensor is quantized once.

A map that a layer reads, and a Concat for another layer, has two scales: it would be written in floating point and
quantized twice. With one scale the layer before it writes integers, and nothing else is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from .metrics import Judge
from .qdq import find_meetings, insert_pairs
from .round_network import Prepared
from .run_onnx import Tell, spread_images, tell_nobody

MOST_LOST_DB = 0.5
"""What all of it may cost every output, measured with the inputs of layers quantized and their weights in FP32, whose
own error would hide a part of it."""
_IMAGES = 16


def share_scales(prepared: Prepared, batches: Sequence[NDArray[Any]], *, progress: Tell = tell_nobody) -> Prepared:
    """The network with one scale, the largest, for tensors that meet: for all of them if that costs less than 0.5 dB.

    Else for as many groups as do together, those with the most alike scales first; others keep their own.
    """
    scales, network = prepared.scales, prepared.network

    def spread(group: Sequence[str]) -> float:
        return max(scales[name] for name in group) / min(scales[name] for name in group)

    groups = sorted((g for g in find_meetings(network, prepared.kept) if spread(g) > 1), key=spread)
    if not groups:
        return prepared
    judge = Judge(network, spread_images(network.model, batches, _IMAGES))

    def measure(chosen: Mapping[str, float]) -> dict[str, float]:
        found = judge.compare(insert_pairs(network, chosen, kept=prepared.kept, grid=prepared.grid))
        return {output.name: output.sqnr_db for output in found.outputs}

    own = measure(scales)
    taken, left = scales, [groups, *([group] for group in groups if len(groups) > 1)]
    for index, tried in enumerate(left):
        changed = {**taken, **{name: max(scales[other] for other in group) for group in tried for name in group}}
        found = measure(changed)
        progress(index + 1, len(left))
        if all(own[name] - found[name] < MOST_LOST_DB for name in own):
            taken = changed
            if index == 0:  # all of them
                break
    progress(len(left), len(left))
    return dataclasses.replace(prepared, scales=taken)
