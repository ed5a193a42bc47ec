"""Mutated passports, calibration files, saved scales, cached plans and timings, and the program that reads them.

`python -m tests.fuzz.small_files CASES FIRST FOLDER` prints one JSON object: by format, how many cases ended how, and
every one that ended in anything but a value or one of our errors. Every case follows from its number alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import resource
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.build.cache import PlanCache
from repvgg_deploy.build.compile import TimingFile
from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.files.passport import passport_path, read_passport
from repvgg_deploy.files.plan_place import Environment, judge_plan
from repvgg_deploy.images.calibration import load_calibration, load_calibration_file
from repvgg_deploy.images.labels import read_labels
from repvgg_deploy.images.sets import SetOptions, open_images
from repvgg_deploy.precision.scales import read_scales
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import CalibrationProvenance
from tests.files.make_passport import EXAMPLE, make_passport
from tests.images.make_images import make_spec

CASE_SECONDS = 10  # of the processor's time
HEADROOM_BYTES = 768 << 20
_PLAN = b"ftrt plan"
_KEY = "a" * 64
_PROVENANCE = CalibrationProvenance(1, "e" * 64, "a" * 64, "bn_statistics", 3, 0, 9, 0.5, {"torch": "2"})


class _Timings:
    """As much of TensorRT's timing cache as the file of timings asks of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: _Timings, ignore_mismatch: bool) -> bool:
        self.data += other.data
        return True

    def serialize(self) -> bytes:
        return self.data


class _Settings:
    """As much of an IBuilderConfig; it takes what begins as its own timings do."""

    def __init__(self) -> None:
        self.timings = _Timings(b"")

    def create_timing_cache(self, data: bytes) -> _Timings | None:
        return _Timings(data) if data[:4] in (b"", b"TIME") else None

    def set_timing_cache(self, cache: _Timings, ignore_mismatch: bool) -> bool:
        self.timings = cache
        return True

    def get_timing_cache(self) -> _Timings:
        return self.timings


def _read_passport(folder: Path, data: bytes) -> object:
    plan = folder / "m.plan"
    plan.write_bytes(_PLAN)
    passport_path(plan).write_bytes(data)
    passport = read_passport(plan)
    assert passport is not None
    return judge_plan(passport, Environment("tensorrt", "10.9", "NVIDIA A10", "8.6", "580.1", "linux-x86_64"))


def _read_cache(folder: Path, data: bytes) -> object:
    entry = folder / "cache" / "plans" / _KEY
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "plan").write_bytes(_PLAN)
    (entry / "passport.json").write_bytes(data)
    found = PlanCache(folder / "cache").find(_KEY)
    assert found is not None or not entry.exists(), "what cannot be used is still there"
    assert found is None or found[0] == _PLAN
    if found is None:
        raise RepVGGDeployError("a cached plan was not used", remedy="none is needed")
    return found


def _read_timings(folder: Path, data: bytes) -> object:
    path = folder / "t.timing"
    path.write_bytes(data)
    timings = TimingFile(path, _Settings(), is_ours=False)
    timings.store()
    assert path.read_bytes().startswith(data), "timings that cannot be used were replaced"
    if data[:4] not in (b"", b"TIME"):
        raise RepVGGDeployError("the timings were not used", remedy="none is needed")
    return timings


def _read_calibration(folder: Path, data: bytes) -> object:
    path = folder / "m.calib.npz"
    path.write_bytes(data)
    found = load_calibration_file(path)
    load_calibration(path, make_spec(), accept_data=True)
    return found


def _read_set(folder: Path, data: bytes) -> object:
    path = folder / "set.npz"
    path.write_bytes(data)
    return list(open_images(path, make_spec(), SetOptions(labels="optional")))


def _read_scales(folder: Path, data: bytes) -> object:
    (folder / "s.json").write_bytes(data)
    return read_scales(folder / "s.json").channel_factors()


def _read_labels(folder: Path, data: bytes) -> object:
    (folder / "l.txt").write_bytes(data)
    return read_labels(folder / "l.txt")


def _make_npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _make_calibration() -> bytes:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    return _make_npz(images=images, provenance=np.array(codec.dumps(_PROVENANCE)))


def _make_set() -> bytes:
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return _make_npz(images=images, labels=np.arange(4) % 3)


def _make_cached() -> bytes:
    return codec.dumps(make_passport(plan_sha256=hashlib.sha256(_PLAN).hexdigest())).encode()


@dataclass(frozen=True)
class Format:
    """A kind of file: a sound one, and what reads it."""

    make: Callable[[], bytes]
    read: Callable[[Path, bytes], object]


FORMATS = {
    "passport": Format(EXAMPLE.read_bytes, _read_passport),
    "plan cache": Format(_make_cached, _read_cache),
    "timings": Format(lambda: b"TIME" + bytes(range(256)), _read_timings),
    "calibration": Format(_make_calibration, _read_calibration),
    "images": Format(_make_set, _read_set),
    "scales": Format((EXAMPLE.parent / "scales.json").read_bytes, _read_scales),
    "labels": Format(lambda: json.dumps({str(i): f"class {i}" for i in range(9)}).encode(), _read_labels),
}


def mutate(data: bytes, number: int) -> bytes:
    """The file of a case."""
    chance = random.Random(number)
    kinds = [_flip, _flip, _cut, _repeat, _insert]
    if data[:2] == b"PK":
        kinds += [_edit_header] * 6
    if data[:1] == b"{":
        kinds += [_edit_json] * 8
    for _ in range(chance.choice((1, 1, 2))):
        data = chance.choice(kinds)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data or b" ")
    for _ in range(chance.choice((1, 1, 4))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    piece = data[start : start + chance.choice((1, 9, 200))]
    return data[:start] + piece * chance.choice((2, 50)) + data[start:]


_PIECES = (
    b"[" * 3000, b'{"a":' * 3000, b"NaN", b"1e999", b"-Infinity", b'"\\ud800"', b"\\u0000", b"\xff\xfe",
    b"\xef\xbb\xbf", b"9" * 5000, b"null", b"[" + b"[]," * 2000 + b"[]]", b"\x00",
    "\u202e\x1b[2J".encode(), b"(" * 300, b"{[]:1}",
)  # fmt: skip


def _insert(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(_PIECES) + data[chance.choice((place, place + 5)) :]


def _edit_json(data: bytes, chance: random.Random) -> bytes:
    """Another value somewhere."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return data
    place = whole
    for _ in range(30):
        if not isinstance(place, (dict, list)) or not place:
            return data
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.2:
            break
        place = place[key]
    place[key] = chance.choice(
        [None, 0, -1, 1, 2**31, 10**30, 10**400, 0.5, 1e308, -0.0, "", "x" * 5000, "\ud800", "a\x1b[2J\u202e", "8.6",
         "10.9.0.34", "AAAA", "AAAAAAAA8D8=", "AAAAAAAA+H8=", [], {}, [1] * 500, {"a": {}}, True, "int8", [9**9] * 4]
    )  # fmt: skip
    return json.dumps(whole).encode()


_HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (900000000, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-3, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 99999, 99999, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (3.0, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': 3, }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (3, 8, 8, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<U900000000', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 3, 8, 8), }",
    "{'descr': [('a', '|u1'), ('a', '<i8')], 'fortran_order': False, 'shape': (4,), }",
    "{'descr': ('|u1', (4, 4)), 'fortran_order': False, 'shape': (4,), }",
    "{'descr': 'M8[99Y]', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': {'names': 1}, 'fortran_order': False, 'shape': (4,), }",
    "{'descr': None, 'fortran_order': 7, 'shape': (4L,), }",
    "(" * 5000,
    "{'a" * 50,
    "{1: 2}",
    "-" * 9000 + "1",
    "\\",
    "",
)


def _edit_header(data: bytes, chance: random.Random) -> bytes:
    """Another header of one array, in an archive whose checksums hold."""
    target = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", chance.choice((0, 8))) as new:
            names = old.namelist()
            chosen = chance.choice(names)
            for name in names:
                content = old.read(name)
                if name == chosen:
                    text = chance.choice(_HEADERS).encode() + b"\n"
                    head = b"\x93NUMPY" + chance.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\x09"))
                    length = len(text).to_bytes(2 if head[6] == 1 else 4, "little")
                    rest = content[10 + int.from_bytes(content[8:10], "little") :]
                    content = head + length + text + rest
                # Without the time of day, which would make each run another.
                entry = zipfile.ZipInfo(name if chance.random() > 0.02 else f"x/{name}")
                new.writestr(entry, content, new.compression)
    except Exception:  # noqa: BLE001 (zipfile, zlib and lzma raise anything at an archive that is damaged already)
        return data
    return target.getvalue()


def run_case(kind: Format, folder: Path, data: bytes) -> str:
    """How reading a file ended: `read` or `refused`; anything else is raised."""
    try:
        kind.read(folder, data)
    except RepVGGDeployError as error:
        message = error.message
    else:
        return "read"
    assert len(message) < 2000, "the message is endless"
    assert message.isprintable(), f"the message has control characters: {message!r}"
    return "refused"


def main(cases: int, first: int, folder: Path) -> dict[str, Any]:
    """Runs the cases of every format and says how they ended."""
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM_BYTES, size + HEADROOM_BYTES))
    ends: dict[str, Counter[str]] = {}
    failures: list[str] = []
    slowest = 0.0
    for name, kind in FORMATS.items():
        seed = kind.make()
        assert run_case(kind, folder, seed) == "read", name
        ends[name] = Counter()
        for number in range(first, first + cases):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns about what a mutation makes
                data = mutate(seed, number)
            started = time.process_time()
            try:
                ends[name][run_case(kind, folder, data)] += 1
            except BaseException as error:  # noqa: BLE001 (whatever escapes is what we look for)
                failures.append(f"{name}, case {number}: {type(error).__name__}: {str(error)[:300]}")
            slowest = max(slowest, time.process_time() - started)
    return {"ends": ends, "failures": failures, "slowest_s": slowest}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
