"""The KServe v2 inference protocol: requests → batches, results → answers, as JSON and as binary tensors.

Source: https://github.com/kserve/open-inference-protocol (REST), and Triton's extensions `binary_tensor_data`,
`classification` and `schedule_policy` (its `timeout`),
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..images.classes import best_classes
from ..specs.values import ModelSpec, TensorSpec
from .options import DATATYPES, wire_shape

if TYPE_CHECKING:
    from ..runtime.results import Result

ONLY_VERSION = "1"
EXTENSIONS = ("binary_tensor_data", "classification", "schedule_policy")
HEADER = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 8 << 20
"""While JSON is read, its numbers take many times their size in memory; a tensor that is larger is sent as bytes."""
_MAX_LISTS, _MAX_QUOTES = 100_000, 10_000
"""Lists and objects, and quotes around names and texts, in the JSON of a request. They cost Python most: 8 MB of
empty lists held up all other threads for more than a second. The nested rows of a 224×224 image in channels-last
order are 50,401 lists."""
_REMEDY = "compare the request with the KServe v2 protocol, or send it with tritonclient"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """One output that a client asks for.

    Attributes:
        name: Its name.
        binary: Whether its bytes follow the JSON; else its numbers stand in it.
        classes: How many `score:index:label` are wanted in place of the tensor; 0: the tensor.
    """

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, and how it is to be answered.

    Attributes:
        batch: (N, …) of the model's dtype and this machine's byte order; its shape is for the Engine to judge.
        outputs: What is wanted, in order.
        id: Comes back with the answer.
        timeout_ms: How long the client would wait; None: as long as the service lets it.
    """

    batch: NDArray[Any]
    outputs: tuple[WantedOutput, ...]
    id: str | None
    timeout_ms: float | None


def decompress(body: bytes | bytearray, encoding: str, limit: int) -> bytes:
    """Undoes Content-Encoding; of more than `limit` bytes, the first limit + 1.

    Args:
        body: The request as it came, compressed.
        encoding: What its header `Content-Encoding` says.
        limit: Bytes that a request may have.

    Raises:
        InputError: Another encoding than gzip and deflate, or damaged.
    """
    if encoding not in _WINDOW_BITS:
        raise InputError(
            f"Content-Encoding: expected gzip or deflate, found {encoding!r}", remedy="send the body uncompressed"
        )
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise InputError(f"the body is not valid {encoding}: {error}", remedy="send it uncompressed") from error
    if len(data) <= limit and (not stream.eof or stream.unused_data):
        raise InputError(f"the {encoding} body ends too early, or something follows it", remedy="send it uncompressed")
    return data


def parse_request(body: bytes | bytearray, json_bytes: str | None, spec: ModelSpec) -> InferRequest:
    """Reads a request.

    Args:
        body: The request, uncompressed. The batch of a binary request is a view of it.
        json_bytes: What the header `Inference-Header-Content-Length` says; None: all of it is JSON.
        spec: What the model takes and gives.

    Raises:
        InputError: It is malformed, or not of this model.
    """
    length = len(body) if json_bytes is None else _length(json_bytes, len(body))
    head = _read_json(body, length)
    inputs: Any = head.get("inputs")
    _require(
        isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], dict),
        "inputs: expected a list of one tensor",
    )
    parameters = _parameters(head)
    timeout_us = parameters.get("timeout", 0)
    _require(_is_count(timeout_us) and timeout_us < 1 << 53, "timeout: expected a whole number of microseconds")
    identity = head.get("id")
    _require(identity is None or (isinstance(identity, str) and _is_text(identity)), "id: expected a text")
    return InferRequest(
        batch=_read_tensor(inputs[0], body, length, spec.input),
        outputs=_read_outputs(head, spec, all_binary=parameters.get("binary_data_output") is True),
        id=identity or None,
        timeout_ms=timeout_us / 1e3 or None,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message, remedy=_REMEDY)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON may spell and no UTF-8 can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _length(text: str, most: int) -> int:
    _require(
        text.isdecimal() and len(text) < 12 and int(text) <= most,
        f"{HEADER}: expected at most {most}, the body's bytes, found {text[:20]!r}",
    )
    return int(text)


def _read_json(body: bytes | bytearray, length: int) -> dict[str, Any]:
    _require(
        length <= MAX_JSON_BYTES,
        f"{length:,} bytes of JSON, expected at most {MAX_JSON_BYTES:,}: large tensors are sent as binary data",
    )
    text = body[:length]
    lists, quotes = text.count(b"[") + text.count(b"{"), text.count(b'"')
    _require(
        lists <= _MAX_LISTS and quotes <= _MAX_QUOTES,
        f"JSON of {lists:,} lists or objects and {quotes // 2:,} texts, expected at most {_MAX_LISTS:,} and "
        f"{_MAX_QUOTES // 2:,}: large tensors are sent flat, or as binary data",
    )
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise InputError(
            f"the request is not JSON: {error}",
            remedy=f"{_REMEDY}; where binary data follows, the header {HEADER} is needed",
        ) from error
    _require(isinstance(head, dict), "expected a JSON object")
    found: dict[str, Any] = head
    return found


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    found = of.get("parameters")
    return found if isinstance(found, dict) else {}


def _read_tensor(tensor: Mapping[str, Any], body: bytes | bytearray, offset: int, spec: TensorSpec) -> NDArray[Any]:
    _require(
        tensor.get("name") == spec.name, f"input {str(tensor.get('name'))[:80]!r}: this model's is called {spec.name!r}"
    )
    datatype = tensor.get("datatype")
    # A model of float16 takes float32, too: the Engine rounds it.
    dtype = np.dtype("float32" if spec.dtype == "float16" and datatype == "FP32" else spec.dtype)
    _require(
        datatype == DATATYPES[dtype.name],
        f"{spec.name}: datatype: expected {DATATYPES[spec.dtype]}, found {str(datatype)[:80]}",
    )
    shape: Any = tensor.get("shape")
    whole = (
        isinstance(shape, list)
        and 0 < len(shape) <= 32
        and all(_is_count(size) and 0 < size < 1 << 31 for size in shape)
    )
    _require(whole, f"{spec.name}: shape: expected a list of sizes of 1 or more")
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        _require(offset == len(body), f"{spec.name}: binary data without binary_data_size")
        return _read_numbers(tensor.get("data"), spec.name, dtype, shape)
    expected = math.prod(shape) * dtype.itemsize
    _require(
        size == expected,
        f"{spec.name}: binary_data_size: expected {expected} bytes for this shape, found {str(size)[:80]}",
    )
    _require(
        len(body) - offset == expected,
        f"{spec.name}: expected {expected} bytes after the JSON, found {len(body) - offset}",
    )
    array = np.frombuffer(body, dtype.newbyteorder("<"), math.prod(shape), offset).reshape(shape)
    return np.require(array, dtype, "A")  # the JSON before it is of any length, so that it may lie askew


def _read_numbers(data: object, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> NDArray[Any]:
    # Level by level, before NumPy sees it: NumPy would pad texts to the longest, and make arrays of what is ragged.
    level: list[Any] = [data]
    while level and isinstance(level[0], list):
        _require(set(map(type, level)) == {list}, f"{name}: data: expected numbers, or lists of equal length")
        _require(len(set(map(len, level))) == 1, f"{name}: data: expected lists of equal length")
        level = list(chain.from_iterable(level))
    kinds = {int} if dtype.kind == "u" else {int, float}
    _require(
        isinstance(data, list) and set(map(type, level)) <= kinds,
        f"{name}: data: expected numbers of datatype {DATATYPES[dtype.name]}",
    )
    _require(
        len(level) == math.prod(shape),
        f"{name}: data: expected {math.prod(shape)} numbers, as the shape says, found {len(level)}",
    )
    largest = 255 if dtype.kind == "u" else int(np.finfo(np.float64).max)
    _require(
        max(level) <= largest and (dtype.kind != "u" or min(level) >= 0) and min(level) >= -largest,
        f"{name}: data: expected numbers of datatype {DATATYPES[dtype.name]}",
    )
    with np.errstate(over="ignore"):  # what becomes infinite is refused by the Engine
        return np.array(level, dtype).reshape(shape)


def _read_outputs(head: Mapping[str, Any], spec: ModelSpec, *, all_binary: bool) -> tuple[WantedOutput, ...]:
    known = [output.name for output in spec.outputs]
    wanted = head.get("outputs")
    if not wanted:
        return tuple(WantedOutput(name, all_binary) for name in known)
    _require(
        isinstance(wanted, list) and len(wanted) <= len(known) and all(isinstance(output, dict) for output in wanted),
        f"outputs: expected a list of at most {len(known)} objects, each output once: {', '.join(known)}",
    )
    found: list[WantedOutput] = []
    for output in wanted:
        name, parameters = output.get("name"), _parameters(output)
        _require(name in known, f"output {str(name)[:80]!r}: this model has {', '.join(known)}")
        _require(all(other.name != name for other in found), f"output {name!r} is asked for twice")
        classes = parameters.get("classification", 0)
        _require(
            _is_count(classes) and (not classes or spec.kind in ("logits", "probabilities")),
            f"{name}: it has no classes, or not so many",
        )
        found.append(WantedOutput(name, parameters.get("binary_data", all_binary) is True, classes))
    return tuple(found)


def render_answer(request: InferRequest, result: Result, spec: ModelSpec, model: str) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers.

    Args:
        request: What it answers.
        result: Of `Engine.infer`.
        spec: What the model takes and gives.
        model: What clients call it.
    """
    arrays = _by_name(result, spec)
    outputs, tail = [], []
    for wanted in request.outputs:
        array = _classify(arrays[wanted.name], wanted.classes, spec.labels) if wanted.classes else arrays[wanted.name]
        texts = array.dtype.kind == "S"
        output: dict[str, Any] = {
            "name": wanted.name,
            "datatype": "BYTES" if texts else DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        values = array.ravel().tolist() if texts or not wanted.binary else []
        if not wanted.binary:
            output["data"] = [text.decode() for text in values] if texts else values
        elif texts:
            tail.append(b"".join(struct.pack("<I", len(text)) + text for text in values))
        else:
            tail.append(array.astype(array.dtype.newbyteorder("<"), "C", copy=False).tobytes())
        if wanted.binary:
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        outputs.append(output)
    head = {
        "model_name": model,
        "model_version": ONLY_VERSION,
        **({"id": request.id} if request.id else {}),
        "outputs": outputs,
    }
    data = json.dumps(head).encode()
    if not tail:
        return data, {"Content-Type": "application/json"}
    return b"".join([data, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(data))}


def _by_name(result: Result, spec: ModelSpec) -> dict[str, NDArray[Any]]:
    """What `Engine.infer` gives, by output name."""
    if isinstance(result, dict):
        return result
    if isinstance(result, np.ndarray):
        return {spec.outputs[0].name: result}
    return dict(zip((output.name for output in spec.outputs), (result.scores, result.classes), strict=True))


def _classify(scores: NDArray[Any], classes: int, labels: Sequence[str] | None) -> NDArray[np.bytes_]:
    """(N, K) of `score:index:label`, best first."""
    order = best_classes(scores, classes)
    rows = [
        [f"{row[i]:f}:{i}" + (f":{labels[i]}" if labels else "") for i in best]
        for row, best in zip(scores, order, strict=True)
    ]
    return np.array([[text.encode() for text in row] for row in rows])


def describe_model(spec: ModelSpec, name: str, platform: str) -> dict[str, Any]:
    """The model's metadata: what tritonclient's `get_model_metadata` shows.

    Args:
        spec: What the model takes and gives.
        name: What clients call it.
        platform: What runs it, in the protocol's words: `onnxruntime_onnx` or `tensorrt_plan`.
    """
    return {
        "name": name,
        "versions": [ONLY_VERSION],
        "platform": platform,
        "inputs": [_describe(spec.input)],
        "outputs": [_describe(o, widened=True) for o in spec.outputs],
    }


def _describe(tensor: TensorSpec, *, widened: bool = False) -> dict[str, Any]:
    dtype = "float32" if widened and tensor.dtype == "float16" else tensor.dtype
    return {"name": tensor.name, "datatype": DATATYPES[dtype], "shape": wire_shape(tensor)}
