"""JSON Schemas (draft 2020-12) of the artifacts, from the dataclasses that `specs.codec` reads and writes them with.

What `codec.decode` refuses by its type the schema refuses, too; what a dataclass checks of its values (digests,
ranges, one field against another) stands in the descriptions only.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from repvgg_deploy.measure.records import Benchmark
from repvgg_deploy.precision.scales import ScaleFile
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import BuildConfig, CalibrationProvenance, ModelMetadata, PlanPassport, VariantSpec

ARTIFACTS: dict[str, type] = {
    "onnx-metadata": ModelMetadata,
    "plan-passport": PlanPassport,
    "calibration": CalibrationProvenance,
    "build-config": BuildConfig,
    "variant": VariantSpec,
    "scales": ScaleFile,
    "benchmark": Benchmark,
}
"""By the name of the example in docs/schemas."""

_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}


def write_schemas() -> dict[str, str]:
    """By file name, the text of each artifact's schema."""
    return {
        f"{name}.schema.json": json.dumps(make_schema(kind), indent=2, ensure_ascii=False) + "\n"
        for name, kind in ARTIFACTS.items()
    }


def make_list() -> str:
    """Links to the schemas, as they stand beside the page."""
    return " · ".join(f"[{name}.schema.json](schemas/{name}.schema.json)" for name in ARTIFACTS)


def make_schema(kind: type) -> dict[str, Any]:
    """The schema of a dataclass; those that it holds stand under `$defs`."""
    definitions: dict[str, Any] = {}
    root = _describe_dataclass(kind, definitions)
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.__name__}
    return {**draft, **root, **({"$defs": dict(sorted(definitions.items()))} if definitions else {})}


def _describe_dataclass(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(kind), _field_texts(kind)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        schema = _describe(hints[field.name], definitions)
        if text := texts.get(field.name):
            schema = {**schema, "description": text}
        if field.default is not dataclasses.MISSING:
            schema = {**schema, "default": codec.encode(field.default)}
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        properties[field.name] = schema
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return {
        "description": about,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _describe(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in (Any, object):
        return {}
    if kind is type(None):
        return {"type": "null"}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if dataclasses.is_dataclass(kind):
        name = typing.cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # a dataclass that holds itself refers to it
            definitions[name] = _describe_dataclass(kind, definitions)
        return {"$ref": f"#/$defs/{name}"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_describe(argument, definitions) for argument in arguments]}
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return {"type": "array", "items": _describe(arguments[0], definitions)}
    if origin is tuple:
        items = [_describe(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _describe(arguments[1], definitions)}
    raise TypeError(f"codec reads no {kind}")


def _field_texts(kind: type) -> dict[str, str]:
    """What the docstring's section Attributes says of each field."""
    import griffe  # of the extra docs; the list above needs none

    sections = griffe.Docstring(kind.__doc__ or "", parser="google").parse(warn_unknown_params=False, warnings=False)
    return {
        field.name: " ".join(field.description.split())
        for section in sections
        if section.kind.value == "attributes"
        for field in section.value
    }
