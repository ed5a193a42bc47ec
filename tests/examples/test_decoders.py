"""Images are decoded in processes that end where an image costs too much."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastapi
import numpy as np
import prometheus_client
import pytest
import uvicorn
from PIL import Image

from examples.service import decoders as module
from examples.service.decoders import DecodeLimits, Decoders
from repvgg_deploy.errors import EngineBusyError, InputError, ModelError
from repvgg_deploy.images.decode import decode_image, default_preprocessing
from tests.examples.running_service import serve
from tests.runtime.make_model import make_onnx
from tests.waiting import wait_until

NEEDED = (fastapi, prometheus_client, uvicorn)  # imported, so that without one this file is left out and named
PREPROCESSING = default_preprocessing(16, 16)
LIMITS = DecodeLimits(seconds=600.0, pixels=1_000_000, file_bytes=40 << 20)


def photo(kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PHOTO = photo()
# Pillow goes through what stands between two segments byte by byte: 20 s of a processor for 32 MB.
PADDED = PHOTO[:2] + b"\xff" * (32 << 20) + PHOTO[2:]
# Each segment is kept as objects: 35 bytes of memory for one of the file.
CROWDED = PHOTO[:2] + b"\xff\xe1\0\2" * (1 << 20) + PHOTO[2:]


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    opened = Decoders(1, PREPROCESSING, LIMITS)
    yield opened
    opened.close()


def process_of(decoders: Decoders) -> int:
    (process,) = decoders._running
    return process._process.pid


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_those_of_decode_image(decoders: Decoders, kind: str) -> None:
    for data in (photo(kind), bytearray(photo(kind))):
        np.testing.assert_array_equal(decoders.decode(data), decode_image(photo(kind), PREPROCESSING))


@pytest.mark.parametrize("data", [b"", b"no image", PHOTO[:200], photo("TIFF"), photo("GIF")])
def test_what_is_refused_is_refused_in_the_same_words_and_by_the_same_process(decoders: Decoders, data: bytes) -> None:
    decoders.decode(PHOTO)
    process = process_of(decoders)
    with pytest.raises(InputError) as expected:
        decode_image(data, PREPROCESSING, formats=module.FORMATS)
    with pytest.raises(InputError) as found:
        decoders.decode(data)
    assert (found.value.message, found.value.remedy) == (expected.value.message, expected.value.remedy)
    decoders.decode(PHOTO)
    assert process_of(decoders) == process


def test_image_that_takes_too_long_ends_its_decoder_and_the_next_one_is_decoded() -> None:
    decoders = Decoders(1, PREPROCESSING, DecodeLimits(0.5, LIMITS.pixels, LIMITS.file_bytes))
    try:
        with pytest.raises(InputError, match=r"takes more than 0\.5 s to decode"):
            decoders.decode(PADDED)
        assert decoders._running == set()
        assert decoders.decode(PHOTO).shape == (16, 16, 3)
    finally:
        decoders.close()


def test_image_that_takes_too_much_memory_is_refused() -> None:
    decoders = Decoders(1, PREPROCESSING, DecodeLimits(600.0, 1, 0))
    assert decoders._limits.memory_bytes < 35 * len(CROWDED)
    try:
        with pytest.raises(InputError, match="takes more memory than an image may"):
            decoders.decode(CROWDED)
    finally:
        decoders.close()


def test_decoder_that_somebody_kills_costs_no_image(decoders: Decoders) -> None:
    decoders.decode(PHOTO)
    before = process_of(decoders)
    os.kill(before, signal.SIGKILL)
    assert decoders.decode(PHOTO).shape == (16, 16, 3)
    second = process_of(decoders)
    assert second != before
    os.kill(second, signal.SIGSTOP)  # killed while it decodes
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(decoders.decode, PHOTO)
        wait_until(sent.running, "the thread to run")
        os.kill(second, signal.SIGKILL)
        assert sent.result().shape == (16, 16, 3)


def test_image_that_ends_two_decoders_is_refused(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Process, "ask", lambda process, _: process.kill())
    with pytest.raises(InputError, match=r"ends its decoder \(-9\)"):
        decoders.decode(PHOTO)


def test_close_ends_what_is_decoded_and_is_said(decoders: Decoders) -> None:
    decoders.decode(PHOTO)
    os.kill(process_of(decoders), signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(decoders.decode, PHOTO)
        wait_until(sent.running, "the thread to run")
        decoders.close()
        with pytest.raises(EngineBusyError, match="going away"):
            sent.result()
    with pytest.raises(EngineBusyError, match="going away"):
        decoders.decode(PHOTO)


def test_decoder_that_cannot_start_is_an_error_of_the_server(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match="could not be started"):
        decoders.decode(PHOTO)
    monkeypatch.undo()
    assert decoders.decode(PHOTO).shape == (16, 16, 3)


def test_service_answers_504_where_no_decoder_is_free_and_its_decoders_end_with_it(tmp_path: Path) -> None:
    with serve(make_onnx(tmp_path / "tiny.onnx"), held=True, decoders=1, timeout_ms=300) as running:
        running.decoding.close()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(running.ask, "POST", "/predict", PHOTO)
            running.decoding.wait_for_batch()
            late = running.ask("POST", "/predict", PHOTO)
            assert (late.status, "no decoder was free within 300 ms" in late.json["error"]) == (504, True)
            running.decoding.open()
            assert first.result().status in (200, 504)  # a busy machine may keep the model from it
        tasks = Path(f"/proc/{running.process.pid}/task")
        if tasks.exists():  # Linux tells who the decoders are
            decoders = [int(n) for task in tasks.iterdir() for n in (task / "children").read_text().split()]
            assert decoders
            running.process.kill()
            wait_until(lambda: not any(map(runs, decoders)), "the decoders to end")


def runs(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for has no command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False
