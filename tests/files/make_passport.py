"""Passports as the builder writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import PlanPassport

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "plan-passport.json"


def make_passport(**changes: Any) -> PlanPassport:
    """The documented example with some fields changed; `version_compatible` and the like are fields of its `config`."""
    example = codec.loads(PlanPassport, EXAMPLE.read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(example.config)}
    config = {name: changes.pop(name) for name in list(changes) if name in names and name != "precision"}
    return dataclasses.replace(example, config=dataclasses.replace(example.config, **config), **changes)
