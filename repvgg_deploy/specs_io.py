"""Specs from files that people write. Standard library only (and tomli below Python 3.11)."""

from __future__ import annotations

import sys
from pathlib import Path

from . import codec
from .errors import InputError
from .specs import BuildConfig


def load_build_config(path: Path) -> BuildConfig:
    """Reads what the plan builder is given from a TOML file, such as those in `engines/configs/`.

    Keys are the fields of `BuildConfig`, the profile a table of its own; what is left out keeps its default.

    Raises:
        InputError: The file cannot be read, or a key is unknown or mistyped; the message names it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    remedy = "compare it with engines/configs/fp16.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a build configuration: {error}", remedy=remedy) from error
    try:
        return codec.decode(BuildConfig, table)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", remedy=remedy) from error
