"""Dataclasses to and from JSON: the schemas' examples, and everything that is not exactly right is refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.tools.json_schemas import ARTIFACTS
from repvgg_deploy.errors import InputError, clean_text
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import BuildConfig, ModelMetadata, PlanPassport

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
FREE = (
    "versions",
    "options",
    "statistics",
    "scales",
    "factors",
    "exponents",
    "precision_shares",
    "operations_per_second",
)  # tables whose keys are free


@dataclass(frozen=True, slots=True)
class Inner:
    """A part."""

    size: float
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Outer:
    """One field of each kind that the codec knows."""

    version: Literal[1]
    kind: Literal["a", "b"]
    count: int
    flag: bool
    shape: tuple[int | str, ...]
    pair: tuple[float, float]
    inner: Inner | None
    table: dict[str, Inner] = field(default_factory=dict)
    anything: object = None


GOOD: dict[str, Any] = {
    "version": 1,
    "kind": "a",
    "count": 2,
    "flag": True,
    "shape": ["batch", 3],
    "pair": [1, 2.5],
    "inner": {"size": 3},
}


def example(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))


def test_schemas_folder_holds_exactly_the_known_examples() -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(ARTIFACTS)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_example_decoded_and_encoded_is_the_example(name: str) -> None:
    data = example(name)
    assert codec.encode(codec.decode(ARTIFACTS[name], data)) == data
    assert json.loads(codec.dumps(codec.decode(ARTIFACTS[name], data))) == data


def objects(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every object of a JSON value that is a dataclass: free-form tables are left out."""
    if isinstance(data, dict):
        if not path or path[-1] not in FREE:
            yield path
        for key, item in data.items():
            yield from objects(item, (*path, key))
    elif isinstance(data, list):
        for index, item in enumerate(data):
            yield from objects(item, (*path, index))


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        data = data[part]
    return data


PLACES = [
    pytest.param(name, path, id=".".join(map(str, (name, *path))))
    for name in ARTIFACTS
    for path in objects(example(name))
]


def test_passport_of_before_plans_had_several_profiles_is_read() -> None:
    text = (SCHEMAS / "plan-passport.json").read_text()
    data = json.loads(text)
    assert data["config"]["profile"].pop("batches") == []
    assert codec.decode(PlanPassport, data) == codec.loads(PlanPassport, text)


@pytest.mark.parametrize(("name", "path"), PLACES)
def test_example_with_an_unknown_field_anywhere_is_refused(name: str, path: tuple[str | int, ...]) -> None:
    data = example(name)
    at(data, path)["surprise"] = 1
    with pytest.raises(InputError, match="surprise"):
        codec.decode(ARTIFACTS[name], data)


@pytest.mark.parametrize(("name", "path"), PLACES)
def test_example_with_a_mistyped_field_anywhere_is_refused(name: str, path: tuple[str | int, ...]) -> None:
    for key in at(example(name), path):
        if key in FREE:
            continue
        data = copy.deepcopy(example(name))
        at(data, path)[key] = {"not": ["this"]}
        with pytest.raises(InputError, match=key):
            codec.decode(ARTIFACTS[name], data)


OPTIONAL_FIELDS: dict[str, set[str]] = {
    "onnx-metadata": {"notes", "content_sha256"},
    "plan-passport": {"history", "precision_shares", "platform", "variant"},
    "calibration": set(),
    "scales": {"factors", "exponents", "left_out", "target", "format"},
    "benchmark": set(),
}


@pytest.mark.parametrize("name", OPTIONAL_FIELDS)
def test_example_without_a_required_field_or_of_another_schema_is_refused(name: str) -> None:
    for key in example(name):
        data = {other: value for other, value in example(name).items() if other != key}
        if key in OPTIONAL_FIELDS[name]:
            codec.decode(ARTIFACTS[name], data)
            continue
        with pytest.raises(InputError, match=rf"{key}: expected a value, found 'nothing'"):
            codec.decode(ARTIFACTS[name], data)
    with pytest.raises(InputError, match="schema: expected one of 1, found '2'"):
        codec.decode(ARTIFACTS[name], {**example(name), "schema": 2})


def test_decode_of_a_full_value_gives_typed_fields() -> None:
    value = codec.decode(Outer, {**GOOD, "table": {"x": {"size": 1, "name": "n"}}, "anything": [1, {"k": None}]})
    assert value == Outer(
        1, "a", 2, True, ("batch", 3), (1.0, 2.5), Inner(3.0), {"x": Inner(1.0, "n")}, [1, {"k": None}]
    )
    assert isinstance(value.pair[0], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": True}, "version: expected one of 1"),
        ({"version": 1.0}, "version: expected one of 1"),
        ({"kind": "c"}, "kind: expected one of 'a', 'b', found 'c'"),
        ({"kind": None}, "kind"),
        ({"count": True}, "count: expected a int, found 'True'"),
        ({"count": 2.0}, "count: expected a int"),
        ({"count": "2"}, "count: expected a int"),
        ({"flag": 1}, "flag: expected a bool"),
        ({"shape": "batch"}, "shape: expected a list"),
        ({"shape": [True]}, r"shape\[0\]"),
        ({"shape": [None]}, r"shape\[0\]"),
        ({"pair": [1]}, "pair: expected 2 items, found '1 items'"),
        ({"pair": [1, "2"]}, r"pair\[1\]: expected a float"),
        ({"pair": [1, False]}, r"pair\[1\]: expected a float"),
        ({"pair": [1, float("nan")]}, r"pair\[1\]: expected a finite number"),
        ({"pair": [float("-inf"), 1]}, r"pair\[0\]: expected a finite number"),
        ({"pair": [10**400, 1]}, r"pair\[0\]: expected a finite number"),
        ({"inner": []}, "inner: expected an object"),
        ({"inner": {"size": 1, "name": 5}}, "inner.name: expected a str"),
        ({"inner": {"size": 1, "name": "\ud800"}}, "inner.name: expected text"),
        ({"table": [1]}, "table: expected an object"),
        ({"table": {"x": None}}, "table.x: expected an object"),
        ({"table": {"\udfff": {"size": 1}}}, "table: expected text"),
    ],
)
def test_decode_of_a_wrong_value_names_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        codec.decode(Outer, {**GOOD, **change})


@pytest.mark.parametrize("data", [None, [], "text", 1, True])
def test_decode_of_something_else_than_an_object_is_refused(data: object) -> None:
    with pytest.raises(InputError, match="Outer: expected an object"):
        codec.decode(Outer, data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nothing",
        "[" * 100_000,
        '{"size": NaN}',
        '{"size": Infinity}',
        '{"size": 1e999}',
        '{"size": ' + "9" * 5000 + "}",
    ],
)
def test_loads_of_text_that_is_not_our_json_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        codec.loads(Inner, text)


def test_message_about_a_huge_value_stays_short() -> None:
    with pytest.raises(InputError) as caught:
        codec.loads(Inner, json.dumps({"size": "x" * 100_000}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_encode_of_a_number_that_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        codec.encode(Inner(value))


json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(clean_text)
inners = st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.none() | json_text)
outers = st.builds(
    Outer,
    st.just(1),
    st.sampled_from(["a", "b"]),
    st.integers(),
    st.booleans(),
    st.lists(st.integers() | json_text, max_size=4).map(tuple),
    st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    st.none() | inners,
    st.dictionaries(json_text, inners, max_size=3),
)


@given(outers)
def test_any_value_written_and_read_is_the_same_and_written_alike(value: Outer) -> None:
    text = codec.dumps(value)
    assert codec.loads(Outer, text) == value
    assert codec.dumps(codec.loads(Outer, text)) == text
    text.encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner),
)


@given(json_values)
def test_decode_of_any_json_is_a_value_or_an_input_error(data: object) -> None:
    for kind in (Outer, ModelMetadata, BuildConfig):
        with contextlib.suppress(InputError):
            assert isinstance(codec.decode(kind, data), kind)


def test_text_with_controls_is_read_without_them() -> None:
    assert codec.loads(Inner, json.dumps({"size": 1.0, "name": "a\x1b[2J\u202eb"})) == Inner(1.0, "a?[2J?b")


def test_json_of_too_many_values_is_refused_before_it_is_read() -> None:
    with pytest.raises(InputError, match="more than 1,048,576 values"):
        codec.loads(Inner, "[" + "[]," * (1 << 20) + "[]]")
