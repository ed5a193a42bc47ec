"""Repositories, and plans that are none but have a passport."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.serving.config import parse_config, print_config
from repvgg_deploy.specs import codec
from tests.files.make_passport import make_passport

needs_schema = pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason="tritonclient, Triton's schema, is not installed"
)


def write_plan(path: Path, content: bytes = b"ftrt plan", **changes: Any) -> Path:
    """Bytes that look like a plan, with the passport of the documented example, changed."""
    path.write_bytes(content)
    passport = make_passport(plan_sha256=hashlib.sha256(content).hexdigest(), **changes)
    path.with_name(f"{path.name}.json").write_text(codec.dumps(passport), encoding="utf-8")
    return path


def read_config(folder: Path) -> Any:
    path = folder / "config.pbtxt"
    return parse_config(path.read_text(encoding="utf-8"), path)


def edit_config(folder: Path, edit: Any) -> None:
    """Applies a function to the message of a `config.pbtxt`, and writes it back."""
    config = read_config(folder)
    edit(config)
    (folder / "config.pbtxt").write_text(print_config(config), encoding="utf-8")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
