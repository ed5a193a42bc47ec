"""Images and specifications for the tests of image sets."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repvgg_deploy.specs.values import ModelSpec, Preprocessing, TensorSpec

LABELS = ("cat", "dog", "garbage truck")
PREPROCESSING = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 8, (8, 8))


def make_spec(
    *,
    uint8: bool = False,
    batch: int | str = "batch",
    labels: tuple[str, ...] | None = LABELS,
    kind: Any = "logits",
    classes: int = 3,
) -> ModelSpec:
    source = (
        TensorSpec("x", "uint8", (batch, 8, 8, 3), "NHWC")
        if uint8
        else TensorSpec("x", "float32", (batch, 3, 8, 8), "NCHW")
    )
    preprocessing = dataclasses.replace(PREPROCESSING, in_graph=uint8)
    return ModelSpec(source, (TensorSpec(kind, "float32", (batch, classes), "NC"),), kind, preprocessing, labels)


def draw(count: int = 12, *, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_images(folder: Path, names: list[str], *, seed: int = 0) -> list[Path]:
    paths = []
    for name, image in zip(names, draw(len(names), seed=seed), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths


def make_jpegs() -> dict[str, bytes]:
    """JPEG files as cameras, programs and networks leave them; those called `bad …` are of no use to anybody."""
    noise = np.random.default_rng(7).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((44, 28))

    def encode(image: Image.Image = picture, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "JPEG", **options)
        return stream.getvalue()

    def with_exif(block: bytes) -> bytes:
        plain = encode()
        return plain[:2] + b"\xff\xe1" + (len(block) + 8).to_bytes(2, "big") + b"Exif\0\0" + block + plain[2:]

    def tags(*entries: bytes) -> bytes:
        return b"MM\0*\0\0\0\x08" + len(entries).to_bytes(2, "big") + b"".join(entries) + bytes(4)

    turned = bytes.fromhex("0112 0003 00000001 00060000")  # orientation 6
    files = {"plain": encode(), "progressive": encode(progressive=True), "4:4:4": encode(subsampling=0)}
    files |= {mode: encode(picture.convert(mode)) for mode in ("L", "CMYK")}
    for orientation in (*range(10), 0xFFFF):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"orientation {orientation}"] = encode(exif=exif)
    stream = io.BytesIO()
    picture.save(stream, "MPO", save_all=True, append_images=[picture])
    files["MPO"] = stream.getvalue()
    files |= {
        "turned": with_exif(tags(turned)),
        "a text for a number beside it": with_exif(tags(turned, bytes.fromhex("011a 0005 00000001 00fffff0"))),
        "a tag of no known type beside it": with_exif(tags(turned, bytes.fromhex("0131 00ff 00000009 00000000"))),
        "a tag longer than the file beside it": with_exif(tags(turned, bytes.fromhex("0131 0002 7fffffff 00000010"))),
        "an EXIF folder that lies outside": with_exif(tags(turned, bytes.fromhex("8769 0004 00000001 7ffffff0"))),
        "an orientation that is a text": with_exif(tags(bytes.fromhex("0112 0002 00000002 36000000"))),
        "an EXIF block that is cut off": with_exif(tags(turned)[:13]),
        "an EXIF block of noise": with_exif(bytes(range(64))),
        "an EXIF block without content": with_exif(b""),
        "bytes behind the end": encode() + b"PK and more",
        "bad: cut off": encode()[:300],
        "bad: the head alone": encode()[:20],
        "bad: empty": b"",
        "bad: a web page": b"<html><body>404</body></html>",
    }
    return files
