"""A model in production: Triton's repository, KServe, Prometheus, tables of scores. The entry is `write_triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .kserve import InferRequest as InferRequest
    from .kserve import WantedOutput as WantedOutput
    from .kserve import decompress as decompress
    from .kserve import describe_model as describe_model
    from .kserve import parse_request as parse_request
    from .kserve import render_answer as render_answer
    from .options import RepositoryOptions as RepositoryOptions
    from .options import Servable as Servable
    from .options import ServedFile as ServedFile
    from .options import describe_container as describe_container
    from .options import find_container as find_container
    from .prometheus import make_collector as make_collector
    from .ray import ImageScorer as ImageScorer
    from .repository import Stale as Stale
    from .repository import WrittenModel as WrittenModel
    from .repository import WrittenVersion as WrittenVersion
    from .repository import find_stale as find_stale
    from .repository import remove_models as remove_models
    from .scoring import ScoringOptions as ScoringOptions
    from .triton import TritonResult as TritonResult
    from .triton import write_triton as write_triton
    from .validate import Finding as Finding
    from .validate import validate_repository as validate_repository

__getattr__ = find_lazily(
    __name__,
    {
        "kserve": "InferRequest WantedOutput decompress describe_model parse_request render_answer",
        "options": "RepositoryOptions Servable ServedFile describe_container find_container",
        "prometheus": "make_collector",
        "ray": "ImageScorer",
        "repository": "Stale WrittenModel WrittenVersion find_stale remove_models",
        "scoring": "ScoringOptions",
        "triton": "TritonResult write_triton",
        "validate": "Finding validate_repository",
    },
)
