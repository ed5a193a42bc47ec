"""What is on disk: whole outputs, our reader of ONNX, what a file is, passports, where a plan runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .onnx import read_metadata as read_metadata
    from .passport import read_passport as read_passport
    from .plan_place import Compatible as Compatible
    from .plan_place import Environment as Environment
    from .plan_place import Incompatible as Incompatible

__getattr__ = find_lazily(
    __name__,
    {"onnx": "read_metadata", "passport": "read_passport", "plan_place": "Compatible Environment Incompatible"},
)
