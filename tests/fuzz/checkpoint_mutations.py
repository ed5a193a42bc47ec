"""Mutated checkpoints for the fuzz test, and the program that loads them.

`python -m tests.fuzz.checkpoint_mutations CASES FIRST FOLDER`.
Every case follows from its number alone, so that a failure is repeated by its number. The program limits its own
address space and the time of each case, and prints one JSON object: how many cases ended how, and every one that ended
in anything but a checkpoint or one of our errors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickletools
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import VariantSpec
from tests.model.generated import random_model, rename, write_paddle

TINY = VariantSpec("tiny", (1, 1, 2, 1), (4, 4, 4, 8, 8), (1, 1, 2, 1, 2, 1), num_classes=3)
CASE_SECONDS = 10  # of the processor's time: however busy the machine is
HEADROOM_BYTES = 1 << 30


def make_seeds(folder: Path) -> list[bytes]:
    """Valid checkpoints of every container."""
    from safetensors.torch import save

    training, deploy = random_model(TINY), random_model(TINY, "deploy")
    own = {"variant": codec.encode(TINY), "labels": ["a", "b", "c"]}
    wrapped = {
        "state_dict": training.state_dict(),
        "ema": deploy.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "repvgg_deploy": own,
    }
    seeds = [
        _torch(content, modern=modern)
        for content in (training.state_dict(), wrapped, nn.DataParallel(deploy))
        for modern in (True, False)
    ]
    seeds.append(save(deploy.state_dict(), metadata={"repvgg_deploy": json.dumps(own)}))
    for protocol in (0, 2, 4):
        path = folder / "seed.pdparams"
        write_paddle(rename(training.state_dict(), "paddleclas"), path, protocol=protocol)
        seeds.append(path.read_bytes())
    return seeds


def _torch(content: object, *, modern: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=modern)
    return file.getvalue()


def mutate(seeds: list[bytes], number: int, marker: Path) -> bytes:
    """The file of a case."""
    chance = random.Random(number)
    data = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 1, 1, 2, 4))):
        data = chance.choice(_MUTATIONS)(data, chance, seeds, marker)
    return data


def _flip_bits(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_head(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    changed = bytearray(data)
    for _ in range(3):
        changed[chance.randrange(min(len(changed), 2000))] = chance.choice(
            (0, 1, 0x2E, 0x7F, 0x80, 0xFF, chance.randrange(256))
        )
    return bytes(changed)


def _truncate(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    return data[: chance.randrange(1, len(data))] if len(data) > 1 else data


def _splice(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    other = chance.choice(seeds)
    return data[: chance.randrange(1, len(data) + 1)] + other[chance.randrange(len(other)) :]


def _move_piece(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    start, size, target = chance.randrange(len(data)), chance.choice((1, 4, 64, 1000)), chance.randrange(len(data))
    piece = data[start : start + size]
    kept = data if chance.random() < 0.5 else data[:start] + data[start + size :]
    return kept[:target] + piece + kept[target:] or data


def _edit_number(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    """A little-endian field somewhere, for lengths and offsets."""
    form, limit = chance.choice((("<H", 16), ("<I", 32), ("<Q", 64)))
    value = chance.choice((0, 1, 2**limit - 1, 2 ** (limit - 1), chance.randrange(2**limit), len(data)))
    position = chance.randrange(max(1, len(data) - 8))
    return data[:position] + struct.pack(form, value % 2**limit) + data[position + struct.calcsize(form) :]


def _edit_directory(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    """A field of a zip's central directory or end record."""
    starts = [
        position
        for magic in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04")
        for position in _find_all(data, magic)
    ]
    if not starts:
        return _edit_number(data, chance, seeds, marker)
    position = chance.choice(starts) + chance.choice((4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 42))
    value = chance.choice(
        (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", struct.pack("<I", chance.randrange(2 * len(data))))
    )
    return data[:position] + value + data[position + 4 :]


def _find_all(data: bytes, needle: bytes) -> list[int]:
    found, position = [], data.find(needle)
    while position >= 0:
        found.append(position)
        position = data.find(needle, position + 1)
    return found


def _edit_pickle(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    """Opcodes removed, repeated, moved or added; inside a zip, which is written anew so that its checksums hold."""
    if data[:4] != b"PK\x03\x04":
        return _edit_opcodes(data, chance, marker)
    target = io.BytesIO()
    try:
        with (
            zipfile.ZipFile(io.BytesIO(data)) as old,
            zipfile.ZipFile(target, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new,
        ):
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, _edit_opcodes(content, chance, marker) if name.endswith("data.pkl") else content)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError):
        return data
    return target.getvalue()


def _edit_opcodes(data: bytes, chance: random.Random, marker: Path) -> bytes:
    positions = []
    with contextlib.suppress(ValueError, IndexError, OverflowError):
        positions = [position for _, _, position in pickletools.genops(data) if position is not None]
    if len(positions) < 4:
        return data
    command = f"touch {marker}".encode()
    hostile = [
        b"cposix\nsystem\n(X" + struct.pack("<I", len(command)) + command + b"tR",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n)R",
        *(bytes([code]) for code in b"(0120abdeghijloqrstuRQ}])\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94\x97\x98"),
        b"K\xff",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
        b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"N",
        b"X\x01\x00\x00\x00a",
    ]
    for _ in range(chance.choice((1, 1, 4))):
        first, second = sorted(chance.sample(positions[:-1], 2))
        last = positions[positions.index(first) + 1]
        piece = data[first:last]
        data = chance.choice(
            (
                data[:first] + data[last:],
                data[:last] + piece + data[last:],
                data[:first] + chance.choice(hostile) + data[first:],
                data[:first] + chance.choice(hostile) + data[last:],
                data[:second] + piece + data[second:],
            )
        )
        positions = [position for position in positions if position < first] or positions
        if len(positions) < 4:
            break
    return data


def _edit_header(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    """The JSON header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or size > len(data):
        return _edit_pickle(data, chance, seeds, marker)
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data
    name = chance.choice(list(header))
    value: object = chance.choice(
        (None, -1, 2**63, 2**70, "F16", "I64", [], [0, 8], [2**40, 2**40], {}, "x" * 1000, 1.5)
    )
    if isinstance(header[name], dict) and chance.random() < 0.8:
        header[name][chance.choice(("dtype", "shape", "data_offsets", "more", "repvgg_deploy"))] = value
    else:
        header[chance.choice((name, "stage0.extra", "__metadata__"))] = value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


_WORDS = (
    b"stage0 stage1 stage2 stage3 stage4 rbr_dense rbr_1x1 rbr_identity rbr_reparam running_mean running_var weight "
    b"bias linear FloatStorage".split()
)


def _edit_name(data: bytes, chance: random.Random, seeds: list[bytes], marker: Path) -> bytes:
    """One word of a tensor's name or type becomes another of the same length: another model in a sound container."""
    word = chance.choice(_WORDS)
    positions = _find_all(data, word)
    if not positions:
        return data
    position = chance.choice(positions)
    others = [other for other in (*_WORDS, b"HalfStorage") if other != word]
    return data[:position] + chance.choice(others)[: len(word)].ljust(len(word), b"_") + data[position + len(word) :]


_Mutation = Callable[[bytes, random.Random, list[bytes], Path], bytes]
_MUTATIONS: tuple[_Mutation, ...] = (
    _flip_bits,
    _flip_head,
    _truncate,
    _splice,
    _move_piece,
    _edit_number,
    _edit_directory,
    _edit_directory,
    _edit_pickle,
    _edit_pickle,
    _edit_pickle,
    _edit_header,
    *[_edit_name] * 4,
)


class TooSlowError(BaseException):
    """A case took longer than CASE_SECONDS. Not an Exception, so that nothing catches it on the way."""


def _interrupt(signum: int, frame: object) -> None:
    raise TooSlowError


def run_case(data: bytes, path: Path) -> str:
    """How loading a file ended: `loaded`, or the first words of our error; anything else is raised."""
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    try:
        checkpoint = load_checkpoint(path, strides=(2, 2, 2, 2, 2))
        with torch.no_grad():
            assert build_model(checkpoint)(torch.zeros(1, 3, 32, 32)).shape == (1, checkpoint.spec.num_classes)
        return "loaded"
    except RepVGGDeployError as error:
        message = error.message
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert message.startswith(f"{path}: "), f"the message does not name the file: {message}"
    assert len(message) < 2000, "the message is endless"
    assert message.isprintable(), "the message has control characters"
    return " ".join(message.removeprefix(f"{path}: ").split()[:3])


def main(cases: int, first: int, folder: Path) -> dict[str, object]:
    """Runs the cases and says how they ended."""
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    seeds = make_seeds(folder)
    warnings.simplefilter("error")
    signal.signal(signal.SIGPROF, _interrupt)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM_BYTES, size + HEADROOM_BYTES))
    ends: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    marker = folder / "ran"
    for number in range(first, first + cases):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns about the duplicate names that a mutation makes
            data = mutate(seeds, number, marker)
        started = time.process_time()
        try:
            ends[run_case(data, folder / "case.pth")] += 1
        except BaseException as error:  # noqa: BLE001 (whatever escapes is what we look for)
            failures.append(f"case {number}: {type(error).__name__}: {str(error)[:300]}")
        slowest = max(slowest, time.process_time() - started)
    return {"ends": ends, "failures": failures, "slowest_s": slowest, "ran": marker.exists()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))

__all__ = ["TINY", "main", "make_seeds", "mutate", "run_case"]
