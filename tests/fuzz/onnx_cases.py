"""Mutated models, one per seed, and a worker that opens each: a program of its own, so that a crash or a hang is seen.

python -m tests.fuzz.onnx_cases MODEL FIRST LAST
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.files import wire
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY, ModelMetadata
from tests.runtime.make_model import ModelOptions, make_metadata, random_batch

_HANG_SECONDS = 200.0
_METADATA_PROPS = 14


def mutate(data: bytes, seed: int) -> tuple[str, bytes]:
    """The name of the mutation that this seed stands for, and the mutated file."""
    chance = random.Random(seed)
    name = chance.choice([*_MUTATIONS])
    return name, _MUTATIONS[name](data, chance)


def _flip_bits(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_in_header(data: bytes, chance: random.Random) -> bytes:
    """Tags and lengths of the top level, where the file's structure is."""
    field = chance.choice(list(wire.walk(data)))
    changed = bytearray(data)
    changed[chance.randrange(field.start, min(field.payload + 1, field.end))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_in_metadata(data: bytes, chance: random.Random) -> bytes:
    field = next(field for field in wire.walk(data) if field.number == _METADATA_PROPS)
    changed = bytearray(data)
    changed[chance.randrange(field.start, field.end)] = chance.randrange(256)
    return bytes(changed)


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.choice((1, 2, 3, 17, 1000)))


def _append_field(data: bytes, chance: random.Random) -> bytes:
    return data + wire.bytes_field(chance.randrange(1, 30), chance.randbytes(chance.randrange(20)))


def _append_metadata(data: bytes, chance: random.Random) -> bytes:
    key = chance.choice((b"repvgg_deploy", b"other", b"", chance.randbytes(4)))
    return data + wire.bytes_field(_METADATA_PROPS, wire.bytes_field(1, key) + wire.bytes_field(2, chance.randbytes(9)))


def _splice(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randrange(len(data)) for _ in range(2))
    target = chance.randrange(len(data))
    return data[:target] + data[start:end] + data[chance.choice((target, min(len(data), target + end - start))) :]


def _delete(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 64) :]


def _reorder(data: bytes, chance: random.Random) -> bytes:
    fields = [data[field.start : field.end] for field in wire.walk(data)]
    chance.shuffle(fields)
    return b"".join(fields)


def _repeat_field(data: bytes, chance: random.Random) -> bytes:
    field = chance.choice(list(wire.walk(data)))
    return data + data[field.start : field.end]


def _edit_metadata(data: bytes, chance: random.Random) -> bytes:
    """Another number or word in the JSON, its length unchanged."""
    field = next(field for field in wire.walk(data) if field.number == _METADATA_PROPS)
    places = [index for index in range(field.payload, field.end) if chr(data[index]).isalnum()]
    changed = bytearray(data)
    changed[chance.choice(places)] = chance.choice(b"0123456789aeLN-")
    return bytes(changed)


def _rebind_metadata(data: bytes, chance: random.Random) -> bytes:
    """Another value somewhere in the JSON, and the digest made to fit: no accident, but no traceback either."""
    fields = list(wire.walk(data))
    graph = b"".join(data[field.start : field.end] for field in fields if field.number != _METADATA_PROPS)
    value = codec.encode(make_metadata(ModelOptions()))
    place = value["spec"]
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.2:
            break
        place = place[key]
    place[key] = chance.choice([
        None, 0, -1, 1, 2, 5, 10**30, 0.5, "", "batch", "NHWC", "uint8", "top5", "module", "features", "logits", [], {},
        [1, 2],
    ])  # fmt: skip
    try:
        metadata = codec.decode(ModelMetadata, value)
    except RepVGGDeployError:
        return graph + wire.bytes_field(
            _METADATA_PROPS,
            wire.bytes_field(1, METADATA_KEY.encode()) + wire.bytes_field(2, json.dumps(value).encode()),
        )
    return graph + onnx_file.metadata_field(hashlib.sha256(graph), metadata)


def _noise(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(len(data)))


_MUTATIONS = {
    "flip bits": _flip_bits,
    "flip in header": _flip_in_header,
    "flip in metadata": _flip_in_metadata,
    "truncate": _truncate,
    "append bytes": _append,
    "append field": _append_field,
    "append metadata": _append_metadata,
    "splice": _splice,
    "delete": _delete,
    "reorder": _reorder,
    "repeat field": _repeat_field,
    "edit metadata": _edit_metadata,
    "rebind metadata": _rebind_metadata,
    "noise": _noise,
}


def run_case(path: Path, batch: np.ndarray, expected: np.ndarray) -> str:
    """`refused`, `identical`, or what is wrong."""
    try:
        with contextlib.suppress(RepVGGDeployError):
            onnx_file.read_graph(path)  # which does not look at the digest first
        with Engine(path, options=EngineOptions(intra_op_threads=1)) as engine:
            result = engine.infer(batch)
    except RepVGGDeployError as error:
        return "refused" if error.message and error.remedy else f"an empty message: {error!r}"
    except Exception as error:  # noqa: BLE001 - this is what the worker looks for
        return f"traceback: {error!r}"
    return "identical" if isinstance(result, np.ndarray) and np.array_equal(result, expected) else "another answer"


def main(arguments: list[str]) -> int:
    """Prints one JSON object: how many cases ended how, by mutation, and the seeds of those that ended wrongly."""
    model, first, last = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    data = model.read_bytes()
    batch = random_batch(ModelOptions(), 2)
    with Engine(model) as engine:
        expected = engine.infer(batch)
    assert isinstance(expected, np.ndarray)
    outcomes: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        for seed in range(first, last):
            sys.stderr.write(f"{seed}\n")
            name, changed = mutate(data, seed)
            path.write_bytes(changed)
            faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
            outcome = run_case(path, batch, expected)
            faulthandler.cancel_dump_traceback_later()
            outcomes[f"{name}: {outcome}"] += 1
            if outcome not in ("refused", "identical") and (name, outcome) != ("rebind metadata", "another answer"):
                wrong[seed] = f"{name}: {outcome}"
    sys.stdout.write(json.dumps({"outcomes": dict(sorted(outcomes.items())), "wrong": wrong}))
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(sys.argv[1:]))
