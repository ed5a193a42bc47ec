"""Files that are small and would need much: many views of one storage in every container, and pickles that copy.

`python -m tests.model.checkpoint.crafted FILE…` loads each in a process of its own, and prints one JSON object: how it
ended and how many bytes it took at its peak, above those of the program with its imports.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.model.checkpoint.load import load_checkpoint
from tests.fuzz.checkpoint_mutations import TINY
from tests.model.generated import random_model

STORAGE_BYTES = 24 << 20
LAYOUTS = ("contiguous", "strided", "overlapping")
CONTAINERS = ("zip", "deflated", "misaligned", "big-endian", "deflated big-endian", "legacy", "legacy big-endian")


def tiny_state() -> dict[str, torch.Tensor]:
    """Floating-point tensors of a small RepVGG, by name."""
    state = random_model(TINY).state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def share_storage(state: Mapping[str, torch.Tensor], layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same tensors as views of one storage of STORAGE_BYTES: one behind the other, or each reaching through it all.

    `strided`: the elements of a tensor lie far apart; `overlapping`: the tensors lie between one another, too.
    """
    big = torch.zeros(STORAGE_BYTES // dtype.itemsize, dtype=dtype)
    views, position = {}, 0
    largest = max(tensor.numel() for tensor in state.values())
    step = 1 if layout == "contiguous" else len(big) // largest // len(state) * len(state)
    for index, (name, tensor) in enumerate(state.items()):
        start = position if layout != "overlapping" else index
        far = step if layout != "strided" else max(1, len(big) // len(state) // max(1, tensor.numel()))
        flat = big[start : start + far * tensor.numel() : far]
        flat[:] = tensor.flatten().to(dtype)
        views[name] = flat.as_strided(tensor.shape, [far * stride for stride in tensor.contiguous().stride()])
        position += tensor.numel() if layout == "contiguous" else len(big) // len(state)
    return views


def write_views(path: Path, container: str, layout: str, dtype: torch.dtype = torch.float32) -> None:
    """A small RepVGG whose tensors are views of one storage."""
    views = share_storage(tiny_state(), layout, dtype)
    file = io.BytesIO()
    torch.save(views, file, _use_new_zipfile_serialization="legacy" not in container)
    data = file.getvalue()
    if container == "legacy big-endian":
        head, storage = data[: -8 - STORAGE_BYTES], data[-STORAGE_BYTES:]
        flag = head.index(b"\x88", head.index(b"little_endian"))
        size = struct.pack(">q", STORAGE_BYTES // dtype.itemsize)
        data = head[:flag] + b"\x89" + head[flag + 1 :] + size + _swapped(storage, dtype)
    elif container not in ("zip", "legacy"):
        data = _zip_anew(data, container, dtype)
    path.write_bytes(data)


def _zip_anew(data: bytes, container: str, dtype: torch.dtype) -> bytes:
    kind = zipfile.ZIP_DEFLATED if "deflated" in container else zipfile.ZIP_STORED
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", kind) as new:
        for name in old.namelist():
            content = old.read(name)
            if "/data/" in name:
                content = _swapped(content, dtype) if "big-endian" in container else content
                if container == "misaligned":
                    used = target.tell() + 30 + len(name)
                    new.writestr("x" * ((1 - used - 30) % 4 + 4), b"")  # the storage begins one byte off
            new.writestr(name, b"big" if name.endswith("byteorder") and "big-endian" in container else content)
    return target.getvalue()


def _swapped(data: bytes, dtype: torch.dtype) -> bytes:
    return np.frombuffer(data, f"u{dtype.itemsize}").byteswap().tobytes()


def write_pickle(path: Path, body: bytes) -> None:
    """A torch zip with this pickle and no storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _repeat(made: bytes, count: int) -> bytes:
    """What is made again and again, in a list."""
    return b"](" + made * count + b"e."


def hostile_pickles(share: int = 1) -> dict[str, bytes]:
    """By name, pickles of a few megabytes (or their `share`-th part) that would take gigabytes or hours."""

    def part(count: int) -> int:
        return count // share

    pairs = b"](" + b"".join(b"J" + struct.pack("<i", index) + b"N\x86" for index in range(part(100_000))) + b"eq\x01"
    ordered = b"ccollections\nOrderedDict\nq\x00"
    many = b"(" + b"".join(b"J" + struct.pack("<i", index) for index in range(part(500_000))) + b"tq\x01"
    long_ints = b"".join(pickle.dumps(index * (2**61 - 1), 2)[2:-1] + b"N" for index in range(2, part(60_000)))
    letters = _text("a" * 60_000) + b"q\x01" + _text("latin1") + b"q\x02c_codecs\nencode\nq\x03"
    doubling = b")" + b"q\x01h\x01\x86" * 60 + b"q\x01"
    name = _text("n" * part(1_000_000)) + b"q\x01" + _text("os") + b"q\x02"
    names = b"".join(_text(f"os.{index:04d}" * 60) + b"r" + struct.pack("<I", index + 10) for index in range(300))
    get = [b"j" + struct.pack("<I", index + 10) for index in range(300)]
    label, view = _text("l" * 9_999) + b"q\x01", _text("v" * 500) + b"q\x01"
    return {
        "one list becomes many dicts": b"N" + pairs + b"00" + ordered + _repeat(b"h\x00h\x01\x85R", part(100_000)),
        "one text becomes many bytes": letters + _repeat(b"h\x03h\x01h\x02\x86R", part(200_000)),
        "long names of classes": name + _repeat(b"h\x02h\x01\x93", part(200_000)),
        "many names of few texts": names + _repeat(b"".join(a + b + b"\x93" for a in get for b in get), 1),
        "one long tuple as every key": many + b"}(" + b"h\x01N" * part(300_000) + b"u.",
        "integers that collide": b"}(" + long_ints + b"u.",
        "tuples that double": doubling + b"}(" + b"h\x01N" * part(300_000) + b"u.",
        "lists alone": b"](" + b"]" * part(4_000_000) + b"e.",
        "dicts alone": b"](" + b"}" * part(4_000_000) + b"e.",
        "marks alone": b"(" * part(4_000_000) + b".",
        "memo alone": b"N" + b"\x94" * part(4_000_000) + b".",
        "puts alone": b"N" + b"".join(b"r" + struct.pack("<I", index) for index in range(part(1_000_000))) + b".",
        "metadata of one text": label + b"}" + _text("repvgg_deploy") + _repeat(b"h\x01", part(180_000))[:-1] + b"s.",
        "long names in many dicts": view + _repeat(b"}h\x01}h\x01Nss", part(300_000)),
    }


def main(paths: list[str]) -> dict[str, tuple[str, int]]:
    """By file, how loading it ended, and the bytes that it took at its peak."""
    torch.set_num_threads(1)
    return {path: _measure(path) for path in paths}


def _measure(path: str) -> tuple[str, int]:
    """In a process that has imported all there is to import."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = _read_status("VmRSS")
        try:
            load_checkpoint(path, strides=(2, 2, 2, 2, 2))
            ended = "loaded"
        except RepVGGDeployError as error:
            ended = error.message.removeprefix(f"{path}: ")
        except BaseException as error:  # noqa: BLE001 (what escapes is what we look for)
            ended = f"escaped: {error!r}"
        os.write(writing, json.dumps((ended, _read_status("VmHWM") - before)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        ended, peak = json.loads(file.read() or b'["died", 0]')
    os.waitpid(child, 0)
    return ended, peak


def _read_status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:])))
