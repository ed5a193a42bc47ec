"""Where an Engine runs, as its caller may write it. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..errors import InputError
from .backends import EngineOptions

DeviceKind = Literal["cpu", "cuda"]
DeviceChoice: TypeAlias = "str | int | None"


@dataclass(frozen=True, slots=True)
class Place:
    """A device.

    Attributes:
        kind: `cpu` or `cuda`.
        index: Which GPU.
        label: As the Engine names it: `cpu`, `cuda`, `cuda:1`.
    """

    kind: DeviceKind
    index: int
    label: str

    def choose(self, options: EngineOptions) -> EngineOptions:
        """The options with this GPU."""
        return options if options.device_id == self.index else replace(options, device_id=self.index)


def find_place(device: object, options: EngineOptions, *, default: DeviceKind) -> Place:
    """What `Engine(device=…)` means.

    Args:
        device: None for the default; `cpu`; `cuda` for the GPU of the options; `cuda:1` or 1 for that GPU.
        options: Say which GPU `cuda` is.
        default: What fits the file.

    Raises:
        InputError: It is none of these.
    """
    wanted = default if device is None else device
    if wanted == "cpu":
        return Place("cpu", options.device_id, "cpu")
    if wanted == "cuda":
        return Place("cuda", options.device_id, "cuda" if options.device_id == 0 else f"cuda:{options.device_id}")
    number = re.fullmatch(r"cuda:(\d{1,4})", wanted) if isinstance(wanted, str) else None
    index = int(number[1]) if number else wanted
    if isinstance(index, int) and not isinstance(index, bool) and index >= 0:
        return Place("cuda", index, f"cuda:{index}")
    raise InputError(
        f"device: expected cpu, cuda, cuda:N or the number of a GPU, found {device!r}",
        remedy='give device="cpu", device="cuda", or device=1 for the second GPU, as EngineOptions(device_id=1) also does',
    )
