"""Compute capabilities of GPUs by name, for a verdict on a GPU that is not here. Standard library only.

Source: https://developer.nvidia.com/cuda-gpus and https://developer.nvidia.com/cuda/gpus/legacy, NVIDIA's published lists.
"""

from __future__ import annotations

import re

from ..errors import InputError

_NAMES: dict[str, tuple[str, ...]] = {
    "7.0": ("V100", "TITAN V", "Quadro GV100"),
    "7.2": ("Jetson AGX Xavier", "Jetson Xavier NX", "Xavier"),
    "7.5": ("T4", "TITAN RTX", "Quadro RTX 4000", "Quadro RTX 5000", "Quadro RTX 6000", "Quadro RTX 8000", "T1000", "RTX 2060", "RTX 2070",
            "RTX 2080", "RTX 2080 Ti", "GTX 1650", "GTX 1660", "GTX 1660 Ti"),
    "8.0": ("A100", "A30"),
    "8.6": ("A10", "A10G", "A16", "A2", "A40", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A6000", "RTX 3050", "RTX 3060",
            "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti", "RTX 3080", "RTX 3080 Ti", "RTX 3090", "RTX 3090 Ti"),
    "8.7": ("Jetson AGX Orin", "Jetson Orin NX", "Jetson Orin Nano", "Orin"),
    "8.9": ("L4", "L40", "L40S", "RTX 2000 Ada", "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada", "RTX 4050", "RTX 4060",
            "RTX 4060 Ti", "RTX 4070", "RTX 4070 Super", "RTX 4070 Ti", "RTX 4080", "RTX 4080 Super", "RTX 4090"),
    "9.0": ("H100", "H200", "H20", "GH200"),
    "10.0": ("B200", "GB200"),
    "10.3": ("B300", "GB300"),
    "11.0": ("Jetson AGX Thor", "Jetson T5000", "Jetson T4000", "Thor"),
    "12.0": ("RTX 5050", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090", "RTX PRO 4000 Blackwell",
             "RTX PRO 4500 Blackwell", "RTX PRO 5000 Blackwell", "RTX PRO 6000 Blackwell"),
    "12.1": ("GB10", "DGX Spark"),
}  # fmt: skip
JETSON = frozenset({"7.2", "8.7", "11.0"})
"""Compute capabilities of boards with an Arm processor: TensorRT's hardware compatibility does not reach them."""


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))


_BY_NAME = {_squeeze(name): (name, capability) for capability, names in _NAMES.items() for name in names}


def find_gpu(text: str) -> tuple[str | None, str]:
    """Name and compute capability of what a person wrote: `a10`, `RTX 4090`, `sm_86` or `8.6` (these two name no GPU).

    Raises:
        InputError: No such GPU is known.
    """
    number = re.fullmatch(r"(?:sm_?|cc)?(\d{1,2})\.?(\d)", text.strip().lower())
    if number is not None and f"{int(number[1])}.{number[2]}" in known_capabilities():
        return None, f"{int(number[1])}.{number[2]}"
    found = _BY_NAME.get(_squeeze(text))
    if found is None:
        raise InputError(
            f"no GPU is known by the name {text!r}",
            remedy="give its compute capability from https://developer.nvidia.com/cuda-gpus, such as gpu=8.6, or a name such as gpu=a10",
        )
    return found


def known_capabilities() -> frozenset[str]:
    """Every compute capability in the table, and 8.8 of boards without a name here."""
    return frozenset({*_NAMES, "8.8"})


def gpu_names() -> dict[str, str]:
    """Compute capability by name."""
    return dict(_BY_NAME.values())
