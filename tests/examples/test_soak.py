"""A service under load whose decoders are killed again and again holds its memory, its threads and its files."""

from __future__ import annotations

import io
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import prometheus_client
import pytest
import uvicorn
from PIL import Image

from tests.examples.running_service import RunningService, serve
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.runtime.test_soak import long
from tests.waiting import wait_until

NEEDED = (fastapi, prometheus_client, uvicorn)  # imported, so that without one this file is left out and named
GROWTH_BYTES = 48 << 20  # allocators keep some of what threads freed
IMAGE = random_batch(ModelOptions(), 1)


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "JPEG")
    return file.getvalue()


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(number) for task in tasks for number in (task / "children").read_text().split()]


def count(running: RunningService) -> tuple[int, int, int]:
    """Bytes of memory, threads and open files."""
    own = Path(f"/proc/{running.process.pid}")
    pages = int((own / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list((own / "task").iterdir())), len(list((own / "fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
@pytest.mark.parametrize("requests", [400, long(10_000)])
def test_service_whose_decoders_are_killed_answers_all_and_grows_in_nothing(
    tmp_path: Path, requests: Any, record_property: Callable[[str, object], None]
) -> None:
    body = photo()
    with serve(make_onnx(tmp_path / "tiny.onnx"), max_queue=256) as running, ThreadPoolExecutor(64) as pool:

        def ask(number: int) -> int:
            if number % 2:
                return running.infer(IMAGE).status
            return running.ask("POST", "/predict", body).status

        def round_of(number: int) -> None:
            assert set(pool.map(ask, range(number))) == {200}

        round_of(200)
        assert len(children(running.process.pid)) == 2
        memory, threads, files = count(running)
        killed = 0
        for _ in range(requests // 200):
            sent = [pool.submit(ask, number) for number in range(200)]
            decoders = children(running.process.pid)
            if decoders:
                os.kill(random.choice(decoders), signal.SIGKILL)
                killed += 1
            assert {one.result() for one in sent} == {200}
        assert killed
        wait_until(lambda: count(running)[2] <= files, "connections to be closed")
        after = count(running)
        record_property(
            "counted",
            f"{requests // 200 * 200} requests, {killed} decoders killed; memory {memory >> 20} → {after[0] >> 20} MB, "
            f"threads {threads} → {after[1]}, files {files} → {after[2]}",
        )
        assert after[0] < memory + GROWTH_BYTES and after[1] <= threads, (memory, threads, after)
        assert running.infer(IMAGE).status == 200
