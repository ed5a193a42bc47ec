"""Labelled images → accuracy; two models side by side; the pictures of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .accuracy import AccuracyReport as AccuracyReport
    from .accuracy import ClassAccuracy as ClassAccuracy
    from .accuracy import Confusion as Confusion
    from .accuracy import evaluate as evaluate
    from .agreement import AgreementReport as AgreementReport
    from .agreement import LayerAgreement as LayerAgreement
    from .agreement import ModelAccuracy as ModelAccuracy
    from .agreement import OutputError as OutputError
    from .agreement import compare as compare
    from .agreement import compare_layers as compare_layers

__getattr__ = find_lazily(
    __name__,
    {
        "accuracy": "AccuracyReport ClassAccuracy Confusion evaluate",
        "agreement": "AgreementReport LayerAgreement ModelAccuracy OutputError compare compare_layers",
    },
)
