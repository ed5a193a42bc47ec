"""The fewest layers that stay in floating point, so that a quantized graph is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .metrics import QuantizationCost, fewest_kept
from .round import RoundedLayer, RoundOptions
from .round_network import Prepared, round_weights


@dataclass(slots=True, eq=False)
class Bound:
    """What is asked of a graph, and how one is made of a network and its rounded layers.

    Attributes:
        accepts: Says of a typed graph whether it is what was asked for.
        asked: That in words, after "not even with every layer in floating point".
        finish: Makes the typed graph: the very one that will be written.
        batches: Calibration images.
        tell: Called with what is being done, steps done and steps in all.
    """

    accepts: Callable[[onnx.ModelProto], bool]
    asked: str
    finish: Callable[[Prepared, Mapping[str, RoundedLayer]], onnx.ModelProto]
    batches: Sequence[NDArray[Any]]
    tell: Callable[[str, int, int], None]
    tried: int = 0

    def meet(
        self,
        prepared: Prepared,
        rounded: dict[str, RoundedLayer],
        costs: Sequence[QuantizationCost],
        rounding: RoundOptions,
    ) -> tuple[Prepared, dict[str, RoundedLayer]]:
        """The network with as few further layers kept, the costliest first, and the others' weights.

        With one of these layers fewer the graph was made, too, and not accepted. Far fewer might do where a layer that
        is kept makes it worse: halving does not try every number.

        Raises:
            CalibrationError: No graph is accepted.
        """
        names = [cost.name for cost in costs]
        found = fewest_kept(costs, lambda kept: self._holds(prepared.keeping(kept), rounded, len(names)))
        for count in range(len(names) + 1 if found is None else len(found), len(names) + 1):
            # The weights after a kept layer are rounded anew: they saw what its quantized form gave.
            larger, final = prepared.keeping(names[:count]), rounded
            if count:
                final = round_weights(larger, self.batches, rounding, progress=partial(self.tell, "round"))
            if self._holds(larger, final, len(names)):
                return larger, final
        raise CalibrationError(f"not even with every layer in floating point {self.asked}", remedy="ask for less")

    def _holds(self, prepared: Prepared, rounded: Mapping[str, RoundedLayer], layers: int) -> bool:
        halvings = layers.bit_length() + 1  # `fewest_kept` halves what is left; more are rare
        self.tried += 1
        self.tell("meet the bound", min(self.tried, halvings) - 1, halvings)
        return self.accepts(self.finish(prepared, rounded))
