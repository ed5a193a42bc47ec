"""A service under load whose decoders are killed holds its memory, threads and files; one that is ended answers all."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import prometheus_client
import pytest
import uvicorn
from PIL import Image

from tests.examples.running_service import RunningService, binary_request, serve
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.runtime.test_soak import long
from tests.waiting import PATIENCE_SECONDS, wait_until

NEEDED = (fastapi, prometheus_client, uvicorn)  # imported, so that without one this file is left out and named
GROWTH_BYTES = 48 << 20  # allocators keep some of what threads freed
IMAGE = random_batch(ModelOptions(), 1)


def photo(width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 64).convert("RGB").save(file, "JPEG", progressive=True)
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


@pytest.mark.parametrize("rounds", [long(2)])
def test_sigterm_under_mixed_load_answers_all_that_was_sent(
    tmp_path: Path, rounds: int, record_property: Callable[[str, object], None]
) -> None:
    """16 clients send photos that take a decoder long, and tensors, until nobody listens; the times are recorded."""
    model, photo_of_3_megapixels = make_onnx(tmp_path / "tiny.onnx"), photo(2000, 1500)
    tensor, headers = binary_request(IMAGE)
    total, seconds = Counter[object](), []

    def send_until_nobody_listens(running: RunningService, number: int, ended: threading.Event) -> None:
        while True:
            connection, new = running.connect(), ended.is_set()
            try:
                connection.connect()
            except OSError:
                return
            with contextlib.closing(connection):
                closing = False
                while not closing:
                    total["sent"] += 1
                    try:
                        if number % 2:
                            connection.request("POST", "/predict", photo_of_3_megapixels)
                        else:
                            connection.request("POST", f"/v2/models/{running.model}/infer", tensor, headers)
                        answer = connection.getresponse()
                        answer.read()
                    except (OSError, http.client.HTTPException) as error:
                        # A connection may lie in the kernel's queue when the listening socket is closed: not accepted.
                        total["not accepted" if new else repr(error)] += 1
                        break
                    total[answer.status] += 1
                    closing, new = answer.headers["Connection"] == "close", False

    for _ in range(rounds):
        ended, before = threading.Event(), total[200]
        settings = {"grace_seconds": 1, "drain_seconds": 2, "timeout_ms": 2000, "body_seconds": 10}
        with serve(model, **settings) as running, ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(send_until_nobody_listens, running, number, ended) for number in range(16)]
            wait_until(lambda: total[200] > before + 60, "the load to build up")  # noqa: B023 - it is called at once
            ended.set()
            started = time.monotonic()
            running.terminate()
            assert running.process.wait(PATIENCE_SECONDS) == 0
            seconds.append(round(time.monotonic() - started, 1))
            for client in clients:
                client.result(PATIENCE_SECONDS)
    record_property("counted", f"{dict(total)}; ended after {sorted(seconds)} s, to be within 1 + 2 + 5 s")
    sent = total.pop("sent")
    assert set(total) <= {200, 503, 504, "not accepted"} and sum(total.values()) == sent, total
