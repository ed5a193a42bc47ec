"""Hostile requests, byte by byte: each is refused, and health answers after each, in memory that does not grow."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from itertools import chain

import fastapi
import numpy as np
import prometheus_client
import pytest
import uvicorn

from tests.examples.running_service import RunningService, serve
from tests.runtime.make_model import make_onnx
from tests.waiting import PATIENCE_SECONDS

NEEDED = (fastapi, prometheus_client, uvicorn)  # imported, so that without one this file is left out and named
INFER = "/v2/models/tiny/infer"
SHAPE = [1, 3, 16, 16]
ZEROS = bytes(768 * 4)
LENGTH = "Inference-Header-Content-Length"
GROWTH_BYTES = 256 << 20  # a body of 32 MB as it arrives, whole and decompressed, and 8 MB of JSON as objects
REFUSED = {400, 404, 405, 413, 415, 431}
_TEXTS_OF_ID = ("", "x\0", "\u202ex", "x" * 100_000, "../x", "x\r\nA: b", None)
_TEXTS: tuple[object, ...] = (
    "",
    "x\0",
    "\ud800",
    "a\udfff",
    "\u202ex",
    "x" * 100_000,
    "../x",
    "x\r\nA: b",
    None,
    1,
    True,
    [],
    {},
)


def http(body: bytes = b"", path: str = INFER, method: str = "POST", **headers: str) -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def chunks(*parts: bytes) -> bytes:
    return (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        + b"".join(parts)
    )


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "images", "shape": SHAPE, "datatype": "FP32", "data": [0] * 768, **changes}


def request(**changes: object) -> bytes:
    return http(json.dumps({"inputs": [tensor()], **changes}).encode())


def with_data(text: str) -> bytes:
    return http(json.dumps({"inputs": [tensor()]}).replace(json.dumps([0] * 768), text).encode())


def binary(payload: bytes = ZEROS, **changes: object) -> bytes:
    sized = {**tensor(parameters={"binary_data_size": len(payload)}), **changes}
    head = json.dumps({"inputs": [{name: value for name, value in sized.items() if name != "data"}]}).encode()
    return http(head + payload, **{LENGTH: str(len(head))})


def json_cases() -> Iterator[bytes]:
    for deep in (900, 100_000):
        yield http(b"[" * deep + b"]" * deep)
        yield http(b'{"a":' * deep + b"1" + b"}" * deep)
        yield with_data("[" * deep + "1" + "]" * deep)
    for number in ("NaN", "-Infinity", "1e999", "null", "true", '"1"', "{}", "9" * 400, "9" * 5000):
        yield with_data(f"[{','.join([number] * 768)}]")
        yield http(f'{{"parameters":{{"timeout":{number if number != "9" * 400 else -1}}},"inputs":1}}'.encode())
    for data in ("[]", "{}", "1", "[[1],[1,2]]", "[1,[2]]", f'["{"x" * 500_000}"]', f"[{'[],' * 500_000}[]]"):
        yield with_data(data)
    sizes: tuple[object, ...] = (
        [],
        [0],
        [-1],
        [1, 3, 16],
        [1] * 33,
        [1] * 100_000,
        [2**31] * 2,
        [2**30] * 32,
        [10**400],
        [1.0],
        ["1"],
    )
    others: tuple[object, ...] = ({}, None, "1", True)
    for shape in sizes + others:
        yield request(inputs=[tensor(shape=shape)])
        yield binary(shape=shape)
    for text in _TEXTS:
        yield request(inputs=[tensor(name=text)])
        yield request(inputs=[tensor(datatype=text)])
        yield request(outputs=[{"name": text}])
        if text not in _TEXTS_OF_ID:
            yield request(id=text)
    for key in ("name", "shape", "datatype", "data"):
        yield request(inputs=[{name: value for name, value in tensor().items() if name != key}])
    several: tuple[object, ...] = ({}, [], None, "x", [[]], [1], [{}], [tensor()] * 2, {"0": tensor()})
    for inputs in several:
        yield request(inputs=inputs)
    for outputs in ([{"name": "logits"}] * 2, [{"name": "logits"}] * 100_000, [1], "logits", {"name": "logits"}):
        yield request(outputs=outputs)
    for classes in (-1, 1.5, True, "1", [1]):
        yield request(outputs=[{"name": "logits", "parameters": {"classification": classes}}])
    for body in (
        b"",
        b"\0" * 99,
        b"1",
        b'"a"',
        b"[]",
        b"{}{}",
        b"\xef\xbb\xbf{}",
        b'{"inputs":"\xff"}',
        b"x" * (9 << 20),
    ):
        yield http(body)
    yield http(b"{" + b",".join(b'"k%d":0' % n for n in range(300_000)) + b"}")


def binary_cases() -> Iterator[bytes]:
    for size in (-1, 0, 10**30, "3072", True, [3072], 3071, 3073):
        yield binary(parameters={"binary_data_size": size})
    for value in (np.nan, np.inf, -np.inf):
        yield binary(np.full(768, value, np.float32).tobytes())
    for length in ("-1", "+5", "0", "1e3", "9" * 5000, "", " 5 5", "5,5", "1_0", "\xb2"):
        yield http(b"{}", **{LENGTH: length})
    many = zlib.compress(bytes(100_000_000))
    for encoding, body in (("gzip", gzip.compress(many)), ("gzip", b"\x1f\x8b"), ("gzip", b""), ("br", b"x"),
                           ("deflate", many), ("gzip, gzip", many), ("x" * 5000, b"x"), ("\xff", b"x"),
                           ("gzip", gzip.compress(b"{}") * 2)):  # fmt: skip
        yield http(body, Content_Encoding=encoding)


def http_cases() -> Iterator[bytes]:
    names = ("%00", "%ED%A0%80", "%ff", "..%2f..%2fetc", "a" * 60_000, "%41" * 20_000, "tiny/versions/" + "9" * 5000)
    for path in (
        "/",
        "/docs",
        "/../../etc/passwd",
        "/v2//models/tiny",
        *(f"/v2/models/{name}/infer" for name in names),
    ):
        yield http(b"{}", path)
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "GET", "BREW", "get"):
        yield http(method=method)
    for line in (b"POST / HTTP/9.9", b"\x16\x03\x01\x02\0\1\0\1\xfc\x03\x03", b"PRI * HTTP/2.0", b"GET", b"\0" * 99):
        yield line + b"\r\nHost: x\r\nConnection: close\r\n\r\n"
    for length in (b"-1", b"+2", b"9" * 30, b"2\r\nContent-Length: 3", b"2\r\nTransfer-Encoding: chunked", b"0x2"):
        yield (
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: ".encode()
            + length
            + b"\r\n\r\n{}"
        )
    for header in (
        b"A\0: b",
        b"A: \0",
        b"A : b",
        b" A: b",
        b"A: b\r\n c",
        b"A: " + b"b" * 70_000,
        b"\r\n".join([b"a: b"] * 200),
    ):
        yield b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n\r\n"
    for parts in ([b"zz\r\n"], [b"f" * 18 + b"\r\n"], [b"-1\r\n"], [b"1\r\nx\r\n" * 20_000, b"0\r\n\r\n"],
                  [b"2;", b"a" * 70_000, b"\r\n{}\r\n0\r\n\r\n"], [b"2200000\r\n", bytes(0x2200000), b"\r\n0\r\n\r\n"],
                  [b"2\r\n{}\r\n0\r\n", b"A: b\r\n" * 200, b"\r\n"]):  # fmt: skip
        yield chunks(*parts)


def image_cases() -> Iterator[bytes]:
    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    sizes = ((2**31 - 1,) * 2, (0, 0), (1, 25_000_001), (5000, 5000), (2**31, 1))
    heads = (
        b"",
        b"hello",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"%!PS",
        b"PK\3\4",
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\xff\xff\xffWEBP",
    )
    for data in (*(png(*size) for size in sizes), *(head + bytes(99) * bool(head) for head in heads)):
        yield http(data, "/predict")
    yield http(b"x", "/predict", Content_Type="multipart/form-data; boundary=x")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(make_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")) as running:
        yield running


def send(service: RunningService, raw: bytes) -> bytes:
    """All that comes back until the service closes."""
    with socket.create_connection(("127.0.0.1", service.port), PATIENCE_SECONDS) as connection:
        found = b""
        with contextlib.suppress(OSError):  # it has closed already: what it said stands
            connection.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                found += part
        return found


def test_hostile_requests_are_refused_one_by_one_and_the_service_is_as_before(service: RunningService) -> None:
    cases = list(chain(json_cases(), binary_cases(), http_cases(), image_cases()))
    assert len(cases) > 200
    before = service.metric("process_resident_memory_bytes")
    wrong = []
    for raw in cases:
        answer = send(service, raw)
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None
        if status not in REFUSED:
            wrong.append((raw[:300], answer[:300]))
        assert service.ask("GET", "/v2/health/ready").status == 200
    assert wrong == []
    assert service.metric("process_resident_memory_bytes") < before + GROWTH_BYTES
    assert service.metric("repvgg_http_active_requests") == service.metric("repvgg_http_buffered_bytes") == 0
    assert service.ask("POST", INFER, request().split(b"\r\n\r\n", 1)[1]).status == 200
    assert "Traceback" not in service.log.read_text() and "ERROR" not in service.log.read_text()
