"""As much of the Protocol Buffers wire format as it takes to read and write an ONNX file without loading its weights.

The onnx package would hold an 80 M parameter model three times over, and a runtime machine need not have it.
Source: https://protobuf.dev/programming-guides/encoding/ and the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_MOST_FIELDS = 250_000  # two bytes may be a field, and a field takes a hundred times that in memory
_MOST_NUMBERS = 1000


class WireError(ValueError):
    """The bytes are not a Protocol Buffers message."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        wire_type: VARINT, FIXED64, BYTES or FIXED32.
        start: Offset of the field, its tag included.
        payload: Offset of the value (after the length, for BYTES).
        end: Offset after the value.
        value: The value of a VARINT; 0 for others.
    """

    number: int
    wire_type: int
    start: int
    payload: int
    end: int
    value: int


def walk(buffer: bytes | memoryview, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in buffer[start:end]; values of BYTES fields are not touched.

    Raises:
        WireError: The bytes are truncated or not a message, or one of more fields than any graph needs.
    """
    limit = len(buffer) if end is None else end
    position = start
    for _ in range(_MOST_FIELDS):
        if position >= limit:
            return
        begin = position
        tag, position = read_varint(buffer, position, limit)
        number, wire_type = tag >> 3, tag & 7
        value, payload = 0, position
        if wire_type == VARINT:
            value, position = read_varint(buffer, position, limit)
        elif wire_type == BYTES:
            length, payload = read_varint(buffer, position, limit)
            position = payload + length
        elif wire_type in (FIXED64, FIXED32):
            position += 8 if wire_type == FIXED64 else 4
        else:
            raise WireError(f"unknown wire type {wire_type} at byte {begin}")
        if number == 0 or position > limit:
            raise WireError(f"field {number} at byte {begin} reaches to byte {position} of {limit}")
        yield Field(number, wire_type, begin, payload, position, value)
    if position < limit:
        raise WireError(f"a message of more than {_MOST_FIELDS:,} fields")


def read_numbers(buffer: bytes | memoryview, field: Field) -> list[int]:
    """What a field of a short list of numbers holds, such as the sizes of a tensor: one of them, or all, packed.

    Raises:
        WireError: They are truncated, or too many.
    """
    if field.wire_type == VARINT:
        return [field.value]
    found: list[int] = []
    position = field.payload
    while position < field.end and len(found) < _MOST_NUMBERS:
        value, position = read_varint(buffer, position, field.end)
        found.append(value)
    if position < field.end:
        raise WireError(f"more than {_MOST_NUMBERS:,} sizes")
    return found


def read_varint(buffer: bytes | memoryview, position: int, limit: int) -> tuple[int, int]:
    """An unsigned varint and the offset after it.

    Raises:
        WireError: It is truncated or longer than 10 bytes.
    """
    result = shift = 0
    while position < limit and shift < 70:
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise WireError(f"truncated number at byte {position}")


def varint(value: int) -> bytes:
    """The encoding of an unsigned number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def bytes_header(number: int, length: int) -> bytes:
    """Tag and length of a BYTES field."""
    return varint(number << 3 | BYTES) + varint(length)


def bytes_field(number: int, value: bytes) -> bytes:
    """A whole BYTES field."""
    return bytes_header(number, len(value)) + value
