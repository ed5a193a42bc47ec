"""The outer layers of an ONNX file, read without the onnx package, against files that the onnx package wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.files import wire
from repvgg_deploy.files.onnx import read_graph, read_metadata, weighted_nodes
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY, ModelMetadata

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "onnx-metadata.json"
METADATA = codec.decode(ModelMetadata, json.loads(EXAMPLE.read_text(encoding="utf-8")))


def build() -> onnx.ModelProto:
    """Conv, Relu, Flatten, Gemm as the onnx package makes them; a foreign metadata entry too."""
    rng = np.random.default_rng(0)
    weights = {
        "stage0.weight": (4, 3, 3, 3),
        "stage0.bias": (4,),
        "linear.weight": (2, 256),
        "linear.bias": (2,),
        "scalar": (),
    }
    initializers = [
        numpy_helper.from_array(np.asarray(rng.standard_normal(shape), np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node(
            "Conv", ["input", "stage0.weight", "stage0.bias"], ["stage0"], "stage0_conv", pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["stage0"], ["stage0_relu"]),
        helper.make_node("Flatten", ["stage0_relu"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear.weight", "linear.bias"], ["logits"], "classifier", transB=1),
    ]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "sample", [image], [logits], initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8
    )
    model.metadata_props.add(key="author", value="someone")
    return model


def write_ours(path: Path, metadata: ModelMetadata = METADATA) -> bytes:
    """Writes `build()` with our metadata behind it, as the exporter does; returns the bytes."""
    body = build().SerializeToString()
    parts = hashlib.sha256()
    for item in wire.walk(body):
        if item.number != 14:
            parts.update(body[item.start : item.end])
    data = body + onnx_file.metadata_field(parts, metadata)
    path.write_bytes(data)
    return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_metadata_written_is_read_back_and_bound(path: Path) -> None:
    write_ours(path)
    found = read_metadata(path)
    assert found.content_sha256 != METADATA.content_sha256
    assert codec.encode(found) == {**codec.encode(METADATA), "content_sha256": found.content_sha256}
    assert len(found.content_sha256) == 64


def test_file_with_our_metadata_is_an_onnx_for_the_onnx_package(path: Path) -> None:
    write_ours(path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert set(entries) == {"author", METADATA_KEY}
    assert codec.loads(ModelMetadata, entries[METADATA_KEY]) == read_metadata(path)


def test_graph_summary_equals_what_the_onnx_package_says(path: Path) -> None:
    data, model = write_ours(path), build()
    graph = read_graph(path)
    assert [(n.op_type, n.name, n.inputs, n.outputs) for n in graph.nodes] == [
        (n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node
    ]
    assert graph.initializers == {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert graph.types == dict.fromkeys(graph.initializers, "float32")
    assert [node.weight_shape for node in weighted_nodes(graph)] == [(4, 3, 3, 3), (2, 256)]
    assert (graph.opset, graph.file_bytes) == (17, len(data))
    assert graph.count_ops() == {"Conv": 1, "Relu": 1, "Flatten": 1, "Gemm": 1}


def test_every_changed_byte_of_the_graph_is_noticed(path: Path) -> None:
    data = write_ours(path)
    ours = len(data) - next(field.end - field.start for field in wire.walk(data) if field.end == len(data))
    author = next(field for field in wire.walk(data) if field.number == 14)
    rng = np.random.default_rng(1)
    for position in rng.choice([p for p in range(ours) if not author.start <= p < author.end], 300, replace=False):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(ModelError):
            read_metadata(path)


def test_every_changed_character_of_the_metadata_is_noticed(path: Path) -> None:
    data = write_ours(path)
    start = data.rindex(b'{"certificate"')
    for position in range(start, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 2
        path.write_bytes(changed)
        with pytest.raises(ModelError):
            read_metadata(path)


def test_every_truncation_is_noticed(path: Path) -> None:
    data = write_ours(path)
    for length in [*range(200), *range(200, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError) as caught:
            read_metadata(path)
        assert str(path) in caught.value.message


def test_appended_bytes_are_noticed(path: Path) -> None:
    data = write_ours(path)
    for tail in (b"\x00", b"\x08\x08", b"x" * 100, data):
        path.write_bytes(data + tail)
        with pytest.raises(ModelError):
            read_metadata(path)


def test_foreign_metadata_may_be_added_without_losing_the_certificate(path: Path) -> None:
    data = write_ours(path)
    path.write_bytes(data + wire.bytes_field(14, wire.bytes_field(1, b"service") + wire.bytes_field(2, b"cats")))
    assert read_metadata(path).certificate == METADATA.certificate


def test_onnx_that_we_did_not_write_is_refused_by_that_reason(path: Path) -> None:
    path.write_bytes(build().SerializeToString())
    with pytest.raises(ModelError, match="was not written by repvgg-export") as caught:
        read_metadata(path)
    assert f"repvgg-trt fold {path.name} --out" in caught.value.remedy
    assert read_graph(path).opset == 17


def test_onnx_of_several_inputs_that_we_did_not_write_is_refused_by_their_names(path: Path) -> None:
    model = build()
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        for name in ("scale", model.graph.initializer[0].name)
    )
    path.write_bytes(model.SerializeToString())
    names = f"{model.graph.input[0].name}, scale"  # a weight among the inputs is none
    with pytest.raises(ModelError, match=rf"2 inputs, {names}, expected one image"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "another version"),
        ("not json", "another version"),
        ('{"schema": 2}', "another version"),
        ("\ud800", "damaged"),
    ],
)
def test_metadata_of_another_form_is_refused(path: Path, text: str, message: str) -> None:
    entry = wire.bytes_field(1, METADATA_KEY.encode()) + wire.bytes_field(2, text.encode("utf-8", "surrogatepass"))
    path.write_bytes(build().SerializeToString() + wire.bytes_field(14, entry))
    with pytest.raises(ModelError, match=message):
        read_metadata(path)


def test_metadata_with_half_a_surrogate_pair_escaped_is_refused(path: Path) -> None:
    data = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    data["certificate"]["reference"] = "\ud800"
    entry = wire.bytes_field(1, METADATA_KEY.encode()) + wire.bytes_field(2, json.dumps(data).encode())
    path.write_bytes(build().SerializeToString() + wire.bytes_field(14, entry))
    with pytest.raises(ModelError, match="reference"):
        read_metadata(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 50,
        b"PK\x03\x04" + b"\x00" * 50,
        b"hello world",
        b"\x80\x02}q\x00.",
        wire.bytes_field(7, b"") * 2,
        b"\x08\x07",
    ],
)
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for read in (read_metadata, read_graph):
        with pytest.raises(ModelError, match=r"not an ONNX file|expected an ONNX file"):
            read(path)


def test_missing_empty_or_folder_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_metadata(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        read_metadata(path)
    with pytest.raises(ModelError, match="is a folder, expected an ONNX file"):
        read_metadata(tmp_path)


def test_graph_with_damaged_inside_is_refused(path: Path) -> None:
    path.write_bytes(b"\x08\x08" + wire.bytes_field(7, wire.bytes_field(1, b"\xff\xff")))
    with pytest.raises(ModelError, match="its graph is damaged"):
        read_graph(path)
    path.write_bytes(b"\x08\x08" + wire.bytes_field(7, wire.bytes_field(1, wire.bytes_field(4, b"\xff\xfe"))))
    with pytest.raises(ModelError, match="its graph is damaged"):
        read_graph(path)


def test_sizes_of_a_tensor_are_read_packed_as_well(path: Path) -> None:
    """proto3 packs repeated numbers: one field of bytes in place of a field each; other writers do so."""
    tensor = wire.bytes_field(1, b"\x04\x83\x01") + b"\x10\x01" + wire.bytes_field(8, b"w")  # dims, float32, name
    path.write_bytes(b"\x08\x08" + wire.bytes_field(7, wire.bytes_field(5, tensor)))
    graph = read_graph(path)
    assert (graph.initializers, graph.types) == ({"w": (4, 131)}, {"w": "float32"})


def test_path_below_a_file_cannot_be_read(path: Path) -> None:
    write_ours(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_graph(path / "m.onnx")


def test_graph_with_two_initializers_of_one_name_is_refused(path: Path) -> None:
    model = build()
    model.graph.initializer.append(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="two initializers have one name"):
        read_graph(path)


def test_metadata_holding_nan_is_never_written(path: Path) -> None:
    check = METADATA.certificate.checks[0]
    broken = dataclasses.replace(METADATA.certificate, checks=(dataclasses.replace(check, error=float("nan")),))
    with pytest.raises(InputError, match="nan cannot be written"):
        write_ours(path, dataclasses.replace(METADATA, certificate=broken))


def test_other_file_than_an_onnx_is_named_with_what_to_do_about_it(path: Path) -> None:
    path.write_bytes(b"ftrt" + bytes(200))
    for read in (read_metadata, read_graph):
        with pytest.raises(ModelError, match=r"model.onnx: is a TensorRT plan, expected an ONNX file") as caught:
            read(path)
        assert "the .onnx that it was built from" in caught.value.remedy


EMPTY = wire.bytes_field(1, b"")
TINY_FIELDS = {
    "outer": b" " * 60_000,
    "metadata": wire.bytes_field(7, b"") + wire.bytes_field(14, b"") * 30_000,
    "nodes": wire.bytes_field(7, EMPTY * 30_000),
    "inputs": wire.bytes_field(7, wire.bytes_field(1, EMPTY * 30_000)),
    "sizes": wire.bytes_field(7, wire.bytes_field(5, wire.bytes_field(1, b"\1" * 60_000))),
    "single sizes": wire.bytes_field(7, wire.bytes_field(5, b"\x08\1" * 30_000)),
}


@pytest.mark.parametrize("kind", TINY_FIELDS)
def test_file_of_tiny_fields_is_refused_in_the_memory_that_its_size_allows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field of two bytes takes a hundred times that as an object. Everything here is a fiftieth of what it may be."""
    monkeypatch.setattr(wire, "_MOST_FIELDS", wire._MOST_FIELDS // 50)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x08" + TINY_FIELDS[kind])
    tracemalloc.start()
    try:
        for read in (read_graph, read_metadata):
            with pytest.raises(ModelError):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + 100_000_000 // 50
    finally:
        tracemalloc.stop()
