"""Triton's own schema of `config.pbtxt`: what it does not know, Triton would refuse.

The schema is the generated module that the package tritonclient brings. It is loaded by its file, because importing it as a part of tritonclient
would import grpc, too, which nothing here calls.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, MissingDependencyError

_NAME = "repvgg_deploy.serving._model_config_pb2"
_INSTALL = "pip install 'repvgg-deploy[serving]'"


def load_schema() -> ModuleType:
    """The generated module with `ModelConfig`.

    Raises:
        MissingDependencyError: tritonclient or protobuf is not installed, or they do not go together.

    Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    package = importlib.util.find_spec("tritonclient")
    places = list(package.submodule_search_locations or ()) if package is not None else []
    path = Path(places[0]) / "grpc" / "model_config_pb2.py" if places else None
    spec = importlib.util.spec_from_file_location(_NAME, path) if path is not None and path.is_file() else None
    if spec is None or spec.loader is None:
        raise MissingDependencyError("tritonclient, which holds Triton's schema of config.pbtxt, is not installed", remedy=_INSTALL)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        text = " ".join(str(error).split())
        raise MissingDependencyError(f"Triton's schema cannot be loaded with the protobuf that is here: {text}", remedy=_INSTALL) from error
    sys.modules[_NAME] = module
    return module


def print_config(config: Any) -> str:
    """A ModelConfig as the text of a `config.pbtxt`; equal messages give equal text."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config, as_utf8=True))


def parse_config(text: str, where: Path) -> Any:
    """The ModelConfig that a `config.pbtxt` states.

    Args:
        text: Of the file.
        where: For the message.

    Raises:
        InputError: A field, type or value is not in the schema, or it is no text of a message; the message says the line.
        MissingDependencyError: The schema is not installed.
    """
    schema = load_schema()
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{where}: Triton cannot parse it: line {error}", remedy="correct that line, or write the repository again") from error
