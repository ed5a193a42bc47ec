"""The Protocol Buffers wire format, against protobuf's own bytes written by hand and against any bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg_deploy.files import wire

# Source: the examples of https://protobuf.dev/programming-guides/encoding/.
TESTING = bytes([0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6E, 0x67])


def test_documented_examples_are_read_and_written_alike() -> None:
    assert list(wire.walk(b"\x08\x96\x01")) == [wire.Field(1, wire.VARINT, 0, 1, 3, 150)]
    assert list(wire.walk(TESTING)) == [wire.Field(2, wire.BYTES, 0, 2, 9, 0)]
    assert wire.varint(150) == b"\x96\x01"
    assert wire.bytes_field(2, b"testing") == TESTING


def test_all_wire_types_are_walked_in_order() -> None:
    message = b"\x08\x01" + b"\x11" + b"8" * 8 + wire.bytes_field(3, b"") + b"\x25" + b"4" * 4
    assert [(f.number, f.wire_type, f.start, f.payload, f.end) for f in wire.walk(message)] == [
        (1, wire.VARINT, 0, 1, 2),
        (2, wire.FIXED64, 2, 3, 11),
        (3, wire.BYTES, 11, 13, 13),
        (4, wire.FIXED32, 13, 14, 18),
    ]


def test_walk_of_a_part_keeps_offsets_of_the_whole() -> None:
    message = b"\xff\xff" + TESTING + b"\xff"
    assert list(wire.walk(message, 2, 11)) == [wire.Field(2, wire.BYTES, 2, 4, 11, 0)]
    with pytest.raises(wire.WireError):
        list(wire.walk(message, 2, 10))


@pytest.mark.parametrize(
    "message",
    [
        TESTING[:-1],
        TESTING[:1],
        b"\x08",  # a tag without its value
        b"\x08" + b"\x80" * 11,  # a number that never ends
        b"\x12\xff\xff\xff\xff\x0f",  # 4 GiB of text in six bytes
        b"\x11" + b"8" * 7,
        b"\x25" + b"4" * 3,
        b"\x0b",  # a group, which ONNX never uses
        b"\x00\x01",  # field number 0
        b"\x0e\x01",  # wire type 6
    ],
)
def test_walk_of_damaged_bytes_is_a_wire_error(message: bytes) -> None:
    with pytest.raises(wire.WireError):
        list(wire.walk(message))


@given(st.integers(0, 2**64 - 1))
def test_any_number_written_is_read_back(value: int) -> None:
    encoded = wire.varint(value)
    assert wire.read_varint(encoded, 0, len(encoded)) == (value, len(encoded))


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.binary(max_size=300))))
def test_any_fields_written_are_read_back(fields: list[tuple[int, bytes]]) -> None:
    message = memoryview(b"".join(wire.bytes_field(number, value) for number, value in fields))
    assert [(field.number, bytes(message[field.payload : field.end])) for field in wire.walk(message)] == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_that_cover_them_or_a_wire_error(message: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        fields = list(wire.walk(message))
        assert [field.start for field in fields] == [0, *[field.end for field in fields][:-1]][: len(fields)]
        assert not fields or fields[-1].end == len(message)
