"""What a check of a repository finds. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: `error`: Triton would not load the model, or would answer wrongly; `warning`: it loads, and probably not as meant.
        model: Folder of the model.
        message: What is wrong, where.
        remedy: What to do.
    """

    severity: Literal["error", "warning"]
    model: str
    message: str
    remedy: str
