"""The published JSON Schemas say what the codec does: both take the examples and refuse all else."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.specs import codec
from tests.contract.source_tree import ROOT

if not all(importlib.util.find_spec(name) for name in ("griffe", "jsonschema")):
    pytest.skip("griffe and jsonschema, of the extras docs and dev, are not installed", allow_module_level=True)

from jsonschema import Draft202012Validator

from docs.tools.json_schemas import ARTIFACTS, make_schema, write_schemas


def example(name: str) -> Any:
    return json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text(encoding="utf-8"))


def changes(data: Any) -> Iterator[Any]:
    """What a value must not be: each field left out, mistyped, and beside an unknown one, at every depth."""
    if isinstance(data, dict):
        yield {**data, "surprise": object}
        for key in data:
            yield {other: value for other, value in data.items() if other != key}
            yield {**data, key: {"not": ["this"]}}
            yield {**data, key: [[1]]}
            yield {**data, key: None}
            for changed in changes(data[key]):
                yield {**data, key: changed}
    elif isinstance(data, list):
        yield [*data, None]
        for index, item in enumerate(data):
            for changed in changes(item):
                yield [*data[:index], changed, *data[index + 1 :]]


def is_read(kind: type, data: Any) -> bool:
    """By types: what a dataclass says of its values is no matter of a schema."""
    try:
        codec.decode(kind, data)
    except InputError as error:
        return "expected" not in error.message
    return True


@pytest.mark.parametrize("name", ARTIFACTS)
def test_schema_of_an_artifact_is_one_and_takes_its_example(name: str) -> None:
    schema = json.loads(write_schemas()[f"{name}.schema.json"])
    Draft202012Validator.check_schema(schema)
    assert list(Draft202012Validator(schema).iter_errors(example(name))) == []
    assert schema["title"] == ARTIFACTS[name].__name__
    for field in (*schema["properties"].values(), *schema.get("$defs", {}).values()):
        assert field  # nothing is left open


@pytest.mark.parametrize("name", ARTIFACTS)
def test_schema_refuses_exactly_what_the_codec_refuses_of_types(name: str) -> None:
    validator = Draft202012Validator(make_schema(ARTIFACTS[name]))
    tried = 0
    for changed in changes(example(name)):
        data = json.loads(json.dumps(copy.deepcopy(changed), default=lambda _: 1))
        assert validator.is_valid(data) == is_read(ARTIFACTS[name], data), data
        tried += 1
    assert tried > 20
