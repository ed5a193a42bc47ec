"""The protocol without a server: what is malformed is said to be so, whatever it is."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.errors import InputError
from repvgg_deploy.runtime.results import TopK
from repvgg_deploy.serving import kserve
from repvgg_deploy.specs.values import ModelSpec, TensorSpec

LOGITS = TensorSpec("logits", "float32", ("batch", 4), "NC")
SPEC = ModelSpec(
    TensorSpec("images", "float32", ("batch", 3, 2, 2), "NCHW"),
    (LOGITS,),
    "logits",
    labels=("ant", "bee", "cat", "dög"),
)
BYTES = ModelSpec(TensorSpec("images", "uint8", ("batch", 2, 2, 3), "NHWC"), (LOGITS,), "logits")
HALF = ModelSpec(TensorSpec("images", "float16", ("batch", 3, 2, 2), "NCHW"), (LOGITS,), "logits")
BATCH = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7


def tensor(**changes: object) -> dict[str, Any]:
    fields = {"name": "images", "datatype": "FP32", "shape": [2, 3, 2, 2], "data": BATCH.ravel().tolist(), **changes}
    return {name: value for name, value in fields.items() if value is not None}


def as_json(*, spec: ModelSpec = SPEC, inputs: object = None, **fields: object) -> kserve.InferRequest:
    return kserve.parse_request(
        json.dumps({"inputs": [tensor()] if inputs is None else inputs, **fields}).encode(), None, spec
    )


def as_binary(head: dict[str, Any], data: bytes, *, spec: ModelSpec = SPEC) -> kserve.InferRequest:
    text = json.dumps(head).encode()
    return kserve.parse_request(bytearray(text + data), str(len(text)), spec)


def binary_tensor(**changes: object) -> dict[str, Any]:
    return tensor(data=None, parameters={"binary_data_size": BATCH.nbytes}, **changes)


@pytest.mark.parametrize("padding", range(8))
def test_binary_tensor_is_read_exactly_and_aligned_wherever_it_begins(padding: int) -> None:
    request = as_binary({"inputs": [binary_tensor()], "id": "x" * padding}, BATCH.tobytes())
    np.testing.assert_array_equal(request.batch, BATCH)
    assert request.batch.dtype == np.float32 and request.batch.flags.aligned


@pytest.mark.parametrize("data", [BATCH.ravel().tolist(), BATCH.tolist()], ids=["flat", "nested"])
def test_json_tensor_is_read_exactly(data: object) -> None:
    np.testing.assert_array_equal(as_json(inputs=[tensor(data=data)]).batch, BATCH)


def test_bytes_and_half_precision_are_read_as_the_model_takes_them() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    request = as_json(spec=BYTES, inputs=[tensor(datatype="UINT8", shape=[2, 2, 2, 3], data=pixels.ravel().tolist())])
    np.testing.assert_array_equal(request.batch, pixels)
    assert as_json(spec=HALF).batch.dtype == np.float32  # the Engine rounds it
    half = BATCH.astype(np.float16)
    head = {"inputs": [tensor(data=None, datatype="FP16", parameters={"binary_data_size": half.nbytes})]}
    np.testing.assert_array_equal(as_binary(head, half.tobytes(), spec=HALF).batch, half)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no_inputs": ({"inputs": []}, "a list of one tensor"),
    "two_inputs": ({"inputs": [tensor(), tensor()]}, "a list of one tensor"),
    "input_is_text": ({"inputs": ["images"]}, "a list of one tensor"),
    "other_name": ({"inputs": [tensor(name="image")]}, "this model's is called 'images'"),
    "other_datatype": ({"inputs": [tensor(datatype="FP64")]}, "datatype: expected FP32, found FP64"),
    "shape_is_text": ({"inputs": [tensor(shape="2,3,2,2")]}, "shape"),
    "shape_is_negative": ({"inputs": [tensor(shape=[-2, 3, 2, 2])]}, "shape"),
    "shape_holds_nothing": ({"inputs": [tensor(shape=[0, 3, 2, 2], data=[])]}, "shape"),
    "shape_is_huge": ({"inputs": [tensor(shape=[10**9, 10**9])]}, "expected 1" + 18 * "0" + " numbers"),
    "shape_is_endless": ({"inputs": [tensor(shape=[10**4000] * 32)]}, "shape"),
    "shape_is_boolean": ({"inputs": [tensor(shape=[True, 3, 2, 4])]}, "shape"),
    "data_is_missing": ({"inputs": [tensor(data=None)]}, "data: expected numbers"),
    "data_is_short": ({"inputs": [tensor(data=[1.0])]}, "expected 24 numbers, as the shape says, found 1"),
    "data_is_ragged": ({"inputs": [tensor(data=[[1.0, 2.0], [3.0]])]}, "lists of equal length"),
    "data_is_mixed": ({"inputs": [tensor(data=[[1.0], 2.0])]}, "expected numbers, or lists of equal length"),
    "data_is_true": ({"inputs": [tensor(data=[True] * 24)]}, "data: expected numbers"),
    "data_is_one_number": ({"inputs": [tensor(data=1.0)]}, "data: expected numbers"),
    "data_is_endless": ({"inputs": [tensor(data=[10**4000] * 24)]}, "data: expected numbers"),
    "data_is_text": ({"inputs": [tensor(data=["1"] * 24)]}, "data: expected numbers"),
    "size_without_bytes": ({"inputs": [binary_tensor()]}, "expected 96 bytes after the JSON, found 0"),
    "id_is_half_a_pair": ({"inputs": [tensor()], "id": "\ud800"}, "id"),
    "output_twice": ({"inputs": [tensor()], "outputs": [{"name": "logits"}] * 2}, "each output once"),
    "id_is_number": ({"inputs": [tensor()], "id": 1}, "id"),
    "timeout_is_text": ({"inputs": [tensor()], "parameters": {"timeout": "1"}}, "timeout"),
    "timeout_is_huge": ({"inputs": [tensor()], "parameters": {"timeout": 10**400}}, "timeout"),
    "unknown_output": ({"inputs": [tensor()], "outputs": [{"name": "boxes"}]}, "this model has logits"),
    "outputs_are_texts": ({"inputs": [tensor()], "outputs": ["logits"]}, "outputs"),
    "classes_are_text": (
        {"inputs": [tensor()], "outputs": [{"name": "logits", "parameters": {"classification": "3"}}]},
        "classes",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_an_input_error_that_says_what(name: str) -> None:
    head, message = MALFORMED[name]
    with pytest.raises(InputError, match=message):
        kserve.parse_request(json.dumps(head).encode(), None, SPEC)


@pytest.mark.parametrize("value", [-1, 256, 1.5])
def test_json_number_that_is_no_byte_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="datatype UINT8"):
        as_json(spec=BYTES, inputs=[tensor(datatype="UINT8", shape=[1, 2, 2, 3], data=[value] * 12)])


@pytest.mark.parametrize("data", [b"", BATCH.tobytes()[:-1], BATCH.tobytes() + b"\0"], ids=["none", "short", "long"])
def test_binary_data_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="expected 96 bytes after the JSON"):
        as_binary({"inputs": [binary_tensor()]}, data)


def test_binary_size_that_is_not_the_shapes_is_refused() -> None:
    with pytest.raises(InputError, match="binary_data_size: expected 192 bytes for this shape, found 96"):
        as_binary({"inputs": [binary_tensor(shape=[4, 3, 2, 2])]}, BATCH.tobytes())


@pytest.mark.parametrize("header", ["-1", "", "abc", "9999", "1e2", "٣", "9" * 5000])
def test_header_length_that_cannot_be_is_refused(header: str) -> None:
    with pytest.raises(InputError, match=r"Inference-Header-Content-Length|not JSON"):
        kserve.parse_request(b"{}", header, SPEC)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b'{"inputs": ' + b"9" * 5000 + b"}", b"null"]
)
def test_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        kserve.parse_request(body, None, SPEC)


def test_json_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(InputError, match="large tensors are sent as binary data"):
        kserve.parse_request(b"[" * (kserve.MAX_JSON_BYTES + 1), None, SPEC)


def test_output_that_is_named_twice_is_refused_where_the_model_has_several() -> None:
    several = dataclasses.replace(SPEC, outputs=(LOGITS, dataclasses.replace(LOGITS, name="other")))
    with pytest.raises(InputError, match="output 'logits' is asked for twice"):
        as_json(spec=several, outputs=[{"name": "logits"}, {"name": "logits"}])


@pytest.mark.parametrize(
    "data",
    [["x" * 500_000, *["y"] * 4_000], [[["x" * 500_000], *[["y"]] * 4_000]], [[1.0] * 100_000, [1.0]]],
    ids=["texts", "nested", "ragged"],
)
def test_memory_of_data_follows_the_body_and_is_not_padded(data: object) -> None:
    body = json.dumps({"inputs": [tensor(data=data)]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="data: expected"):
            kserve.parse_request(body, None, SPEC)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The body as text, and an object of 24 to 60 bytes for each number or letter. Padded it would be two gigabytes.
    assert peak < 32 * len(body)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["images", "FP32", "logits", 96, 24]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "shape", "parameters", "binary_data_size", "x"]), inner)
    ),
    max_leaves=12,
)


@given(st.sampled_from(["inputs", "outputs", "parameters", "id"]), VALUES, st.binary(max_size=100))
@settings(max_examples=300)
def test_fuzz_any_field_of_any_kind_is_read_or_an_input_error(field: str, value: object, tail: bytes) -> None:
    for head in (
        {"inputs": [tensor()], field: value},
        {"inputs": [tensor(**{field: value, "name": value})]},
        {"inputs": [{**tensor(), "shape": value}]},
    ):
        with contextlib.suppress(InputError):
            assert as_binary(head, tail).batch.dtype == np.float32


@pytest.mark.parametrize(("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_decompress_gives_the_bytes_and_never_more_than_the_limit(encoding: str, squeeze: Any) -> None:
    data = bytes(1000)
    assert kserve.decompress(squeeze(data), encoding, 1000) == data
    assert len(kserve.decompress(squeeze(bytes(10**7)), encoding, 1000)) == 1001
    for damaged in (squeeze(data)[:-1], squeeze(data) + b"x", b"", b"x" * 30):
        with pytest.raises(InputError, match=encoding):
            kserve.decompress(damaged, encoding, 1000)
    with pytest.raises(InputError, match="expected gzip or deflate, found 'br'"):
        kserve.decompress(data, "br", 1000)


RESULT = np.array([[0.1, 3, -1, 2], [5, 4, 3, 2]], np.float32)


def read_answer(request: kserve.InferRequest, result: Any, spec: ModelSpec = SPEC) -> tuple[dict[str, Any], bytes]:
    body, headers = kserve.render_answer(request, result, spec, "tiny")
    size = int(headers.get(kserve.HEADER, len(body)))
    return json.loads(body[:size]), body[size:]


def test_answer_as_json_holds_every_bit() -> None:
    head, tail = read_answer(as_json(id="seven"), RESULT)
    output = head.pop("outputs")[0]
    assert head == {"model_name": "tiny", "model_version": "1", "id": "seven"} and tail == b""
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 4])
    np.testing.assert_array_equal(np.array(output["data"], np.float32), RESULT.ravel())


def test_answer_in_binary_is_what_was_asked_for_output_by_output() -> None:
    spec = ModelSpec(
        SPEC.input,
        (TensorSpec("scores", "float32", ("n", 2), "NK"), TensorSpec("classes", "int64", ("n", 2), "NK")),
        "top5",
    )
    result = TopK(RESULT[:, :2], np.array([[1, 2], [3, 4]], np.int64))
    request = as_json(spec=spec, outputs=[{"name": "classes", "parameters": {"binary_data": True}}, {"name": "scores"}])
    head, tail = read_answer(request, result, spec)
    assert [output["name"] for output in head["outputs"]] == ["classes", "scores"]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 32} and "data" not in head["outputs"][0]
    np.testing.assert_array_equal(np.frombuffer(tail, np.int64).reshape(2, 2), result.classes)
    assert head["outputs"][1]["data"] == result.scores.ravel().tolist()


def test_answer_with_classification_names_the_best_first() -> None:
    request = as_json(outputs=[{"name": "logits", "parameters": {"classification": 2}}])
    output = read_answer(request, RESULT)[0]["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["3.000000:1:bee", "2.000000:3:dög", "5.000000:0:ant", "4.000000:1:bee"]


def test_timeout_is_microseconds() -> None:
    assert as_json(parameters={"timeout": 1500}).timeout_ms == 1.5
    assert as_json(parameters={"timeout": 0}).timeout_ms is None


def test_described_model_has_minus_one_for_a_dynamic_size() -> None:
    described = kserve.describe_model(HALF, "tiny", "fake")
    assert described["inputs"] == [{"name": "images", "datatype": "FP16", "shape": [-1, 3, 2, 2]}]
    assert described["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 4]}]
