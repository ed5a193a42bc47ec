"""Frozen dataclasses to and from JSON, and from TOML: an unknown, missing or mistyped field is an error."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError, clean_text
from .values import BuildConfig

if TYPE_CHECKING:
    from importlib.abc import Traversable

T = TypeVar("T")
_SHOWN = 200  # letters of the place in a message
_MOST_VALUES = 1 << 20


def encode(value: object) -> Any:
    """The JSON value (dict, list, str, int, float, bool, None) of a dataclass tree.

    Raises:
        InputError: A number is NaN or infinite, which JSON cannot hold.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{value} cannot be written as JSON",
            remedy="find the stage that produced it: a report holds finite numbers only",
        )
    return value


def dumps(value: object) -> str:
    """The canonical text: sorted keys, no spaces. Equal values give equal text, so that its sha256 means something."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def loads(kind: type[T], text: str) -> T:
    """Reads `kind` from JSON text.

    Raises:
        InputError: The text is not JSON, or not a `kind`; the message names the field.
    """
    # A value of two letters takes a hundred bytes: what is no such file is not made into one first.
    if sum(map(text.count, "[{,")) > _MOST_VALUES:
        remedy = "regenerate the file with the command that wrote it"
        raise InputError(f"holds more than {_MOST_VALUES:,} values", remedy=remedy)
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", remedy="regenerate the file with the command that wrote it") from error
    return decode(kind, data)


def _refuse_constant(name: str) -> object:
    raise InputError(f"{name} is not JSON", remedy="regenerate the file with the command that wrote it")


def decode(kind: type[T], data: object) -> T:
    """Reads `kind` (a dataclass) from a JSON value.

    Raises:
        InputError: A field is unknown, missing or of another type.
    """
    result: T = _decode(kind, data, kind.__name__)
    return result


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind in (Any, object):
        return data
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        # By type too, for True == 1 == 1.0.
        known = any(type(data) is type(choice) and data == choice for choice in arguments)
        return data if known else _fail(where, f"one of {', '.join(map(repr, arguments))}", data)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is tuple:
        return _decode_tuple(arguments, data, where)
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            _fail(where, "an object", data)
        return {_decode(str, key, where): _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    return _decode_scalar(kind, data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        _fail(where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        _fail(f"{where}.{unknown[0]}", f"one of {', '.join(fields)}", unknown[0])
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not optional and name not in data:
            _fail(f"{where}.{name}", "a value", "nothing")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _decode_union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    *others, last = (argument for argument in arguments if argument is not type(None))
    for argument in others:
        try:
            return _decode(argument, data, where)
        except InputError:
            continue
    return _decode(last, data, where)


def _decode_tuple(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if not isinstance(data, (list, tuple)):
        _fail(where, "a list", data)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(data) != len(arguments):
        _fail(where, f"{len(arguments)} items", f"{len(data)} items")
    return tuple(_decode(kind, data[i], f"{where}[{i}]") for i, kind in enumerate(arguments))


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        # Not float(data) at once: an integer may be too large for it.
        return float(data) if abs(data) <= sys.float_info.max else _fail(where, "a finite number", data)
    if not isinstance(data, kind) or (kind is not bool and isinstance(data, bool)):
        _fail(where, f"a {kind.__name__}", data)
    if kind is str and not data.isascii() and any("\ud800" <= character <= "\udfff" for character in data):
        _fail(where, "text", ascii(data))  # half a surrogate pair, which no file can hold
    return clean_text(data) if kind is str else data


def _fail(where: str, expected: str, found: object) -> Any:
    raise InputError(
        f"{where[:_SHOWN]}: expected {expected}, found {_show(found)[:80]!r}",
        remedy="compare the file with the example in docs/schemas",
    )


def _show(found: object) -> str:
    return found if isinstance(found, str) else reprlib.repr(found)


def load_build_config(path: Path) -> BuildConfig:
    """Reads what the plan builder is given from a TOML file, such as those in `engines/configs/`.

    Keys are the fields of `BuildConfig`, the profile a table of its own; what is left out keeps its default.

    Raises:
        InputError: The file cannot be read, or a key is unknown or mistyped; the message names it.
    """
    remedy = "compare it with engines/configs/fp16.toml"
    table = read_toml(path, "a build configuration", remedy=remedy)
    try:
        return decode(BuildConfig, table)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", remedy=remedy) from error


def read_toml(path: Path | Traversable, what: str, *, remedy: str) -> dict[str, Any]:
    """Reads a TOML file; `what` says in the message what it should be.

    Raises:
        InputError: It cannot be read, or is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as {what}: {error}", remedy=remedy) from error
    return table
