"""What crosses a stage: validated frozen dataclasses, JSON, the variants, the cards of published checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .codec import load_build_config as load_build_config
    from .values import METADATA_KEY as METADATA_KEY
    from .values import BuildConfig as BuildConfig
    from .values import CalibrationProvenance as CalibrationProvenance
    from .values import Certificate as Certificate
    from .values import ChannelStatistics as ChannelStatistics
    from .values import Check as Check
    from .values import CheckpointSource as CheckpointSource
    from .values import HistoryEntry as HistoryEntry
    from .values import LayerSpec as LayerSpec
    from .values import ModelMetadata as ModelMetadata
    from .values import ModelSpec as ModelSpec
    from .values import PlanPassport as PlanPassport
    from .values import Preprocessing as Preprocessing
    from .values import ShapeProfile as ShapeProfile
    from .values import TensorSpec as TensorSpec
    from .values import VariantSpec as VariantSpec
    from .variants import get_variant as get_variant
    from .variants import load_variant as load_variant
    from .zoo import CheckpointCard as CheckpointCard
    from .zoo import load_cards as load_cards

__getattr__ = find_lazily(
    __name__,
    {
        "codec": "load_build_config",
        "values": "BuildConfig CalibrationProvenance Certificate ChannelStatistics Check CheckpointSource HistoryEntry "
        "LayerSpec METADATA_KEY ModelMetadata ModelSpec PlanPassport Preprocessing ShapeProfile TensorSpec "
        "VariantSpec",
        "variants": "get_variant load_variant",
        "zoo": "CheckpointCard load_cards",
    },
)
