"""Benchmark files: written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import ArtifactError, InputError
from repvgg_deploy.measure.records import Benchmark, read_benchmark, require_free, write_benchmark
from repvgg_deploy.specs import codec
from tests.measure.make_benchmark import make_benchmark, make_model


def test_file_reads_as_it_was_written(tmp_path: Path) -> None:
    result = make_benchmark(make_model(), make_model("B1g4", "int8"))
    write_benchmark(tmp_path / "b.json", result)
    assert read_benchmark(tmp_path / "b.json") == result


def test_file_that_stands_there_is_not_replaced_without_force(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    require_free(path, force=False)
    write_benchmark(path, make_benchmark())
    with pytest.raises(ArtifactError, match="exists, and a new measurement would replace it"):
        require_free(path, force=False)
    require_free(path, force=True)
    with pytest.raises(ArtifactError, match="exists and differs"):
        write_benchmark(path, make_benchmark(make_model("A1")))
    write_benchmark(path, make_benchmark(make_model("A1")), force=True)
    assert read_benchmark(path).models[0].variant == "A1"


def change(data: Any, *path: Any, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


POINT = ("models", 0, "points", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "schema: expected one of 1"),
        (("models", 0, "precision"), "int4", "precision"),
        (("models", 0, "layers", 3, "macs"), "many", "macs"),
        ((*POINT, "way"), "tea leaves", "way"),
        ((*POINT, "latency", "p99_ms"), 0.1, "latencies that no measurement gives"),
        ((*POINT, "latency", "min_ms"), -1.0, "latencies that no measurement gives"),
        ((*POINT, "latency", "calls"), 0, "latencies that no measurement gives"),
        ((*POINT, "images_per_second"), 0.0, "latencies that no measurement gives"),
        ((*POINT, "batch"), 0, "latencies that no measurement gives"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_malformed_file_is_refused_with_the_field(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    data = json.loads(codec.dumps(make_benchmark()))
    change(data, *path, value=value)
    (tmp_path / "b.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_benchmark(tmp_path / "b.json")
    assert "b.json" in caught.value.message and "repvgg-trt bench --out" in caught.value.remedy


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}', codec.dumps(make_benchmark()).encode()[:-40], b"NaN"]
)
def test_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(InputError, match="not a benchmark"):
        read_benchmark(tmp_path / "b.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_benchmark(tmp_path / "none.json")


def test_result_with_infinite_numbers_cannot_be_written(tmp_path: Path) -> None:
    result = make_benchmark()
    broken = codec.decode(Benchmark, {**codec.encode(result), "duration_s": 3.0})
    object.__setattr__(broken, "duration_s", float("inf"))
    with pytest.raises(InputError, match="cannot be written as JSON"):
        write_benchmark(tmp_path / "b.json", broken)
    assert list(tmp_path.iterdir()) == []
