"""Algebra on ONNX graphs: reading and editing, linear regions, folding. The entry is `fold_branches`.

Needs onnx and NumPy, no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .fold import Fold as Fold
    from .fold import FoldReport as FoldReport
    from .fold import fold_branches as fold_branches

__getattr__ = find_lazily(__name__, {"fold": "Fold FoldReport fold_branches"})
