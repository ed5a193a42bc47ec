"""The example service as a process: the real tritonclient gets what the Engine gives, and no load loses a request."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import geventhttpclient
import numpy as np
import onnxruntime
import prometheus_client
import pytest
import uvicorn
from PIL import Image

from examples.service.settings import Settings
from repvgg_deploy import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.runtime.results import TopK
from tests.contract.source_tree import ROOT
from tests.examples.running_service import Answer, RunningService, binary_request, read_tensor, serve
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.waiting import PATIENCE_SECONDS, wait_until

NEEDED = (
    fastapi,
    geventhttpclient,
    onnxruntime,
    prometheus_client,
    uvicorn,
)  # imported, so that without one this file is left out and named
PLAIN = ModelOptions()
ONE_THREAD = EngineOptions(intra_op_threads=1)  # as the service under test has it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx", PLAIN)


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[RunningService]:
    """One that all tests share that do not end it."""
    with serve(model, max_batch=8, max_body_bytes=200_000, max_pixels=1_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, options=ONE_THREAD) as opened:
        yield opened


@contextlib.contextmanager
def triton_client(running: RunningService) -> Iterator[Any]:
    from tritonclient import http

    with http.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        yield client


def send_by_triton(running: RunningService, batch: np.ndarray[Any, Any], *, binary: bool = True, **options: Any) -> Any:
    """The result of tritonclient's own `infer`."""
    from tritonclient import http

    with triton_client(running) as client:
        metadata = client.get_model_metadata(running.model)["inputs"][0]
        value = http.InferInput(metadata["name"], list(batch.shape), metadata["datatype"])
        value.set_data_from_numpy(batch, binary_data=binary)
        return client.infer(running.model, [value], **options)


def test_triton_client_sees_a_server_that_is_live_ready_and_describes_its_model(service: RunningService) -> None:
    with triton_client(service) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification", "schedule_policy"]
        metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 7]}]
    assert metadata["platform"] == "onnxruntime_onnx"


@pytest.mark.parametrize("images", [1, 5, 8])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_exactly_what_the_engine_gives(
    service: RunningService, engine: Engine, images: int, binary: bool
) -> None:
    from tritonclient import http

    batch = random_batch(PLAIN, images, seed=images)
    outputs = [http.InferRequestedOutput("logits", binary_data=binary)]
    result = send_by_triton(service, batch, binary=binary, outputs=outputs, request_id="the id")
    np.testing.assert_array_equal(result.as_numpy("logits"), engine.infer(batch))
    assert result.get_response()["id"] == "the id"
    np.testing.assert_array_equal(
        send_by_triton(service, batch).as_numpy("logits"), engine.infer(batch)
    )  # all outputs, as it asks by default


def test_triton_client_may_name_the_version_that_is_there(service: RunningService, engine: Engine) -> None:
    from tritonclient.utils import InferenceServerException

    batch = random_batch(PLAIN, 2)
    with triton_client(service) as client:
        versions = client.get_model_metadata("tiny")["versions"]
        assert [client.is_model_ready("tiny", version) for version in versions] == [True]
        assert client.get_model_metadata("tiny", versions[0]) == client.get_model_metadata("tiny")
    np.testing.assert_array_equal(
        send_by_triton(service, batch, model_version=versions[0]).as_numpy("logits"), engine.infer(batch)
    )
    with pytest.raises(InferenceServerException, match="no version '2' of 'tiny' here, only '1'"):
        send_by_triton(service, batch, model_version="2")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_client_may_compress(service: RunningService, engine: Engine, algorithm: str) -> None:
    batch = random_batch(PLAIN, 3)
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    np.testing.assert_array_equal(send_by_triton(service, batch, **options).as_numpy("logits"), engine.infer(batch))


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_classes_by_name(service: RunningService, engine: Engine, binary: bool) -> None:
    from tritonclient import http

    batch = random_batch(PLAIN, 2)
    found = send_by_triton(
        service, batch, outputs=[http.InferRequestedOutput("logits", binary_data=binary, class_count=3)]
    ).as_numpy("logits")
    texts = [[text.decode() if isinstance(text, bytes) else text for text in row] for row in found.tolist()]
    for row, logits in zip(texts, engine.infer(batch), strict=True):
        best = np.argsort(-logits)[:3]
        assert [text.split(":")[1:] for text in row] == [[str(index), f"class {index}"] for index in best]
        np.testing.assert_allclose(
            [float(text.split(":")[0]) for text in row], logits[best], atol=1e-6
        )  # six digits are sent


@pytest.mark.parametrize(
    "options",
    [ModelOptions(uint8=True), ModelOptions(kind="top5"), ModelOptions(kind="probabilities"), ModelOptions(half=True)],
    ids=str,
)
def test_service_of_any_kind_of_classifier_gives_what_the_engine_gives(tmp_path: Path, options: ModelOptions) -> None:
    path = make_onnx(tmp_path / "other.onnx", options)
    photo = jpeg(40, 30)
    (tmp_path / "photo.jpg").write_bytes(photo)
    batch = random_batch(options, 3)
    with Engine(path, options=ONE_THREAD) as engine, serve(path, name="own name") as running:
        running.model = "own%20name"
        answer = running.ask("POST", "/v2/models/own%20name/infer", *binary_request(batch))
        expected = engine.infer(batch)
        assert answer.status == 200, answer.body
        data = answer.body[int(answer.headers["Inference-Header-Content-Length"]) :]
        arrays = (expected.scores, expected.classes) if isinstance(expected, TopK) else (expected,)
        assert data == b"".join(array.tobytes() for array in arrays)
        assert_predictions(running.ask("POST", "/predict", photo), engine, tmp_path / "photo.jpg")


def jpeg(width: int, height: int, *, kind: str = "JPEG", seed: int = 0) -> bytes:
    """A picture of soft noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def assert_predictions(answer: Answer, engine: Engine, path: Path) -> None:
    """Against `Engine.infer_images` of the same file."""
    assert answer.status == 200, answer.body
    found = answer.json["predictions"]
    result = engine.infer_images([path])
    if isinstance(result, TopK):
        classes, scores = result.classes[0], result.scores[0]
    else:
        scores = result[0].astype(np.float64)
        if engine.spec.kind == "logits":
            scores = np.exp(scores) / np.exp(scores).sum()
        classes = np.argsort(-scores)[:5]
        scores = scores[classes]
    assert [item["class"] for item in found] == classes.tolist()
    assert [item["label"] for item in found] == [engine.spec.labels[index] for index in classes]
    np.testing.assert_allclose(
        [item["score"] for item in found], scores, rtol=1e-12
    )  # the softmax above subtracts no maximum


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_predict_of_an_image_is_that_of_infer_images(
    service: RunningService, engine: Engine, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "photo.img"
    path.write_bytes(jpeg(90, 61, kind=kind))
    assert_predictions(
        service.ask("POST", "/predict", path.read_bytes(), {"Content-Type": f"image/{kind.lower()}"}), engine, path
    )


def test_many_clients_get_their_own_answers(model: Path, engine: Engine) -> None:
    """Requests of several are run together: whose answer is whose?"""
    batches = [random_batch(PLAIN, 1 + seed % 3, seed=seed) for seed in range(200)]
    with serve(model, held=True, max_batch=8, max_queue=200) as running:
        with running.hold(batches[:32]) as sent:
            wait_until(lambda: running.metric("repvgg_http_active_requests") == 32, "all of them")
        with ThreadPoolExecutor(32) as pool:
            answers = [*(one.result() for one in sent), *pool.map(running.infer, batches[32:])]
        for batch, answer in zip(batches, answers, strict=True):
            # Batches of other sizes are summed up in another order.
            np.testing.assert_allclose(read_tensor(answer), engine.infer(batch), rtol=1e-5, atol=1e-5)
        assert running.metric("repvgg_batcher_batch_images_count") < 200  # some were run together


def gzip_bomb() -> bytes:
    return gzip.compress(bytes(50_000_000))


def png_bomb() -> bytes:
    """Two kilobytes that say 5000×5000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
        + chunk(b"IEND", b"")
    )


INFER_ROUTE = "/v2/models/{name}/infer"
INFER = "/v2/models/tiny/infer"
BATCH = random_batch(PLAIN, 1)
GOOD, GOOD_HEADERS = binary_request(BATCH)
REFUSED: dict[str, tuple[str, str, Any, dict[str, str], int, str]] = {
    "unknown_model": ("POST", "/v2/models/other/infer", GOOD, GOOD_HEADERS, 404, "only 'tiny'"),
    "unknown_model_ready": ("GET", "/v2/models/other/ready", None, {}, 404, "only 'tiny'"),
    "unknown_path": ("GET", "/nothing", None, {}, 404, "Not Found"),
    "wrong_method": ("GET", INFER, None, {}, 405, "Method Not Allowed"),
    "too_large": ("POST", INFER, bytes(200_001), {}, 413, "at most 200,000 bytes"),
    "too_large_in_chunks": ("POST", INFER, [bytes(1000)] * 201, {}, 413, "at most 200,000 bytes"),
    "gzip_bomb": ("POST", INFER, gzip_bomb(), {"Content-Encoding": "gzip"}, 413, "decompressed"),
    "not_gzip": ("POST", INFER, GOOD, {"Content-Encoding": "gzip"}, 400, "gzip"),
    "brotli": ("POST", INFER, GOOD, {"Content-Encoding": "br"}, 400, "expected gzip or deflate"),
    "not_json": ("POST", INFER, b"{", {}, 400, "not JSON"),
    "empty": ("POST", INFER, b"", {}, 400, "not JSON"),
    "without_header": ("POST", INFER, GOOD, {}, 400, "Inference-Header-Content-Length"),
    "wrong_size": ("POST", INFER, *binary_request(np.zeros((1, 3, 8, 8), np.float32)), 400, "the size differs"),
    "not_finite": (
        "POST",
        INFER,
        *binary_request(np.full((1, 3, 16, 16), np.nan, np.float32)),
        400,
        "expected finite numbers",
    ),
    "too_many_images": ("POST", INFER, *binary_request(random_batch(PLAIN, 9)), 400, "9 images are more than"),
    "not_an_image": ("POST", "/predict", b"GIF89a, or not", {}, 400, "not an image"),
    "no_image": ("POST", "/predict", b"", {}, 400, "no bytes"),
    "half_an_image": ("POST", "/predict", jpeg(90, 61)[:700], {}, 400, "damaged or truncated"),
    "pixel_bomb": (
        "POST",
        "/predict",
        png_bomb(),
        {},
        400,
        "5000×5000 = 25,000,000 pixels, expected at most 1,000,000",
    ),
    "tiff": ("POST", "/predict", jpeg(20, 20, kind="TIFF"), {}, 400, "JPEG, MPO, PNG, WEBP"),
    "form": ("POST", "/predict", b"--x", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "--data-binary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_request_that_cannot_be_answered_is_told_why_and_the_next_one_is_answered(
    service: RunningService, engine: Engine, name: str
) -> None:
    method, path, body, headers, status, message = REFUSED[name]
    answer = service.ask(method, path, body, headers)
    assert (answer.status, message in answer.json["error"]) == (status, True), answer.body
    batch = random_batch(PLAIN, 2)
    np.testing.assert_array_equal(read_tensor(service.infer(batch)), engine.infer(batch))


def test_triton_client_raises_what_the_service_says(service: RunningService) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="9 images are more than"):
        send_by_triton(service, random_batch(PLAIN, 9))


def test_client_that_sends_too_slowly_is_let_go(model: Path) -> None:
    with serve(model, body_seconds=1) as running:
        with socket.create_connection(("127.0.0.1", running.port), PATIENCE_SECONDS) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: not running.metric("repvgg_http_active_requests"), "its place to be free")


def test_client_that_goes_away_while_it_sends_takes_no_place(service: RunningService) -> None:
    with socket.create_connection(("127.0.0.1", service.port), PATIENCE_SECONDS) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{{{".encode())
        wait_until(lambda: service.metric("repvgg_http_active_requests") == 1, "the request to be under way")
        assert service.metric("repvgg_http_buffered_bytes") == 2
    wait_until(lambda: not service.metric("repvgg_http_active_requests"), "its place to be free")
    assert service.metric("repvgg_http_buffered_bytes") == 0


def test_metrics_count_what_was_sent(service: RunningService) -> None:
    before = service.metrics()
    photo = jpeg(50, 50)
    for images in (1, 2, 2):
        assert service.infer(random_batch(PLAIN, images)).status == 200
    assert [service.ask("POST", "/predict", body).status for body in (photo, b"x")] == [200, 400]
    assert service.ask("GET", "/v2/models/made-up").status == 404
    after = service.metrics()

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("repvgg_http_requests_total", route=INFER_ROUTE, status="200") == 3
    assert grown("repvgg_http_requests_total", route="/predict", status="200") == 1
    assert grown("repvgg_http_requests_total", route="/predict", status="400") == 1
    assert grown("repvgg_http_requests_total", route="/v2/models/{name}", status="404") == 1
    assert grown("repvgg_http_request_seconds_count", route=INFER_ROUTE) == 3
    for part in ("engine", "batcher"):
        assert grown(f"repvgg_{part}_images_total") == 6
        assert grown(f"repvgg_{part}_batch_images_sum") == 6
        assert grown(f"repvgg_{part}_batch_images_bucket", le="1") == 2
        assert grown(f"repvgg_{part}_batch_images_bucket", le="+Inf") == 4
        assert grown(f"repvgg_{part}_run_seconds_count") == grown(f"repvgg_{part}_run_seconds_bucket", le="+Inf") == 4
        assert grown(f"repvgg_{part}_run_seconds_sum") > 0
    assert grown("repvgg_batcher_requests_total") == grown("repvgg_batcher_queue_seconds_count") == 4
    assert after["repvgg_ready", frozenset()] == 1
    assert after["repvgg_http_active_requests", frozenset()] == after["repvgg_http_buffered_bytes", frozenset()] == 0
    assert after["process_resident_memory_bytes", frozenset()] > 0


def test_full_queue_refuses_with_retry_after_and_loses_nothing(model: Path, engine: Engine) -> None:
    batches = [random_batch(PLAIN, 1, seed=seed) for seed in range(24)]
    with serve(model, held=True, max_batch=1, max_queue=3, retry_after_seconds=7) as running:
        with running.hold(batches) as sent:
            # Three wait and one runs: the others must not have to wait for them.
            wait_until(lambda: sum(one.done() for one in sent) >= 20, "the refusals")
        answers = [one.result() for one in sent]
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200, 503}, statuses  # each was answered, one way or the other
        assert statuses[200] >= 3  # as many as wait; one more where the first was already taken to be run
        for batch, answer in zip(batches, answers, strict=True):
            if answer.status == 200:
                np.testing.assert_array_equal(read_tensor(answer), engine.infer(batch))
            else:
                assert answer.headers["Retry-After"] == "7" and "the queue holds 3" in answer.json["error"]
        assert running.metric("repvgg_batcher_refused_total") == statuses[503]
        assert running.metric("repvgg_batcher_requests_total") == statuses[200]
        assert running.infer(batches[0]).status == 200  # afterwards, all is well
        assert running.metric("repvgg_http_active_requests") == 0


@pytest.mark.parametrize(
    ("limit", "message"), [({"max_requests": 2}, "as many as may"), ({"max_buffered_bytes": 7000}, "too many bytes")]
)
def test_requests_or_bytes_beyond_the_limit_are_refused(model: Path, limit: dict[str, int], message: str) -> None:
    with serve(model, held=True, max_batch=1, **limit) as running:
        with running.hold([random_batch(PLAIN, 1)] * 10) as sent:
            wait_until(lambda: sum(one.done() for one in sent) >= 8, "the refusals")  # of two bodies there is room, too
        answers = [one.result() for one in sent]
        assert Counter(answer.status for answer in answers)[200] >= 1
        refused = [answer for answer in answers if answer.status == 503]
        assert refused and len(refused) + sum(answer.status == 200 for answer in answers) == 10
        assert all(answer.headers["Retry-After"] == "1" and message in answer.json["error"] for answer in refused)
        assert running.metric("repvgg_http_buffered_bytes") == 0


SIX = [random_batch(PLAIN, 1, seed=seed) for seed in range(6)]


@contextlib.contextmanager
def six_under_way(running: RunningService, engine: Engine) -> Iterator[list[Future[Answer]]]:
    """Requests that a model is busy with, until its gate is opened; afterwards, each has its answer."""
    with running.hold(SIX) as answers:
        wait_until(lambda: running.metric("repvgg_batcher_waiting_images") == 5, "one to run and five to wait")
        yield answers
    for batch, answer in zip(SIX, answers, strict=True):
        np.testing.assert_array_equal(read_tensor(answer.result()), engine.infer(batch))


def test_request_past_its_deadline_is_not_run(model: Path, engine: Engine) -> None:
    with serve(model, held=True, max_batch=1) as running:
        with ThreadPoolExecutor(1) as pool, six_under_way(running, engine):
            sent = pool.submit(running.infer, random_batch(PLAIN, 1), timeout=1000)
            wait_until(lambda: running.metric("repvgg_batcher_waiting_images") == 6, "the seventh to wait")
            time.sleep(0.01)  # by now it waits for longer than it may
            running.gate.open()
            late = sent.result()
            assert (late.status, "its deadline passed" in late.json["error"]) == (504, True)
        assert running.metric("repvgg_batcher_expired_total") == 1
        assert running.metric("repvgg_batcher_requests_total") == 6


def test_request_whose_client_is_gone_is_not_run(model: Path, engine: Engine) -> None:
    with serve(model, held=True, max_batch=1) as running:
        with six_under_way(running, engine):
            connection = running.connect()
            connection.request("POST", INFER, *binary_request(SIX[0]))
            wait_until(lambda: running.metric("repvgg_batcher_waiting_images") == 6, "the seventh to wait")
            connection.close()
            wait_until(lambda: running.metric("repvgg_http_active_requests") == 6, "the service to notice")
        wait_until(lambda: running.metric("repvgg_batcher_cancelled_total") == 1, "it to be dropped")
        assert running.metric("repvgg_batcher_requests_total") == 6
        assert running.metric("repvgg_http_active_requests") == 0


def test_sigterm_turns_readiness_off_answers_all_and_exits_with_0(model: Path, engine: Engine) -> None:
    with serve(model, held=True, max_batch=1, grace_seconds=3600) as running:
        with contextlib.closing(running.connect()) as kept, six_under_way(running, engine):
            kept.request("GET", "/v2/health/ready")
            assert kept.getresponse().read() == b""
            running.terminate()
            wait_until(lambda: running.ask("GET", "/v2/health/ready").status == 503, "readiness to be off")
            assert running.process.poll() is None and running.metric("repvgg_ready") == 0
            assert running.ask("GET", "/v2/health/live").status == 200
            running.gate.open()
            # A connection that was kept is still served, and asked not to be kept longer.
            kept.request("POST", INFER, *binary_request(SIX[0]))
            late = kept.getresponse()
            assert (late.status, late.headers["Connection"]) == (200, "close")
            late.read()
        running.end_grace()
        assert running.process.wait(PATIENCE_SECONDS) == 0
        log = running.log.read_text()
    assert (
        log.index("leaving: ")
        < log.index("refusing: ")
        < log.index("Shutting down")
        < log.index("closed after 7 requests")
    )
    assert "Traceback" not in log and "ERROR" not in log


def test_sigterm_without_grace_refuses_what_is_new_and_answers_what_is_under_way(model: Path, engine: Engine) -> None:
    with serve(model, held=True, max_batch=1, retry_after_seconds=3) as running:
        with contextlib.closing(running.connect()) as kept, six_under_way(running, engine):
            kept.connect()
            running.terminate()
            wait_until(lambda: "refusing: " in running.log.read_text(), "the drain to begin")
            with pytest.raises(ConnectionRefusedError):  # which a balancer takes elsewhere
                running.infer(SIX[0])
            kept.request("POST", INFER, *binary_request(SIX[0]))
            late = kept.getresponse()
            assert (late.status, late.headers["Retry-After"], late.headers["Connection"]) == (503, "3", "close")
            late.read()
        assert running.process.wait(PATIENCE_SECONDS) == 0


def test_sigterm_under_load_loses_no_request(model: Path) -> None:
    """Clients behind a balancer that opens no connection once readiness is off: every request gets its answer."""
    outcomes: Counter[object] = Counter()
    off = threading.Event()

    def send_until_readiness_is_off(running: RunningService) -> None:
        while not off.is_set():
            try:
                outcomes[running.infer(BATCH).status] += 1
            except OSError as error:
                outcomes[repr(error)] += 1

    def watch_readiness(running: RunningService) -> None:
        while running.ask("GET", "/v2/health/ready").status == 200:
            off.wait(0.1)
        off.set()

    with serve(model, held=True, grace_seconds=3600) as running, ThreadPoolExecutor(17) as pool:
        clients = [pool.submit(send_until_readiness_is_off, running) for _ in range(16)]
        clients.append(pool.submit(watch_readiness, running))
        wait_until(lambda: outcomes[200] > 100, "the load to build up")
        running.terminate()
        for client in clients:
            client.result(PATIENCE_SECONDS)
        running.end_grace()  # which is longer than the balancer takes to notice
        assert running.process.wait(PATIENCE_SECONDS) == 0
    assert set(outcomes) == {200}, outcomes


def test_load_on_kept_connections_through_the_end_loses_no_request(model: Path) -> None:
    """Each client sends on until it is asked to close: every request that was sent is answered, to the last."""
    outcomes: Counter[object] = Counter()
    sent: Counter[str] = Counter()

    def send_until_told_to_close(running: RunningService) -> None:
        with contextlib.closing(running.connect()) as kept:
            closing = False
            while not closing:
                sent["requests"] += 1
                try:
                    kept.request("POST", INFER, GOOD, GOOD_HEADERS)
                    answer = kept.getresponse()
                    answer.read()
                    outcomes[answer.status] += 1
                    closing = answer.headers["Connection"] == "close"
                except OSError as error:
                    outcomes[repr(error)] += 1
                    return

    with serve(model, held=True, drain_seconds=0) as running, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(send_until_told_to_close, running) for _ in range(8)]
        wait_until(lambda: outcomes[200] > 50, "the load to build up")
        running.gate.close()
        running.gate.wait_for_batch()
        running.terminate()  # with requests in the queue that are never run
        for client in clients:
            client.result(PATIENCE_SECONDS)
        running.gate.open()
        assert running.process.wait(PATIENCE_SECONDS) == 0
    assert set(outcomes) == {200, 503} and sum(outcomes.values()) == sent["requests"], outcomes


def test_sigterm_while_images_are_decoded_answers_all_and_ends_although_they_never_end(model: Path) -> None:
    with serve(model, held=True, drain_seconds=0, decoders=1) as running, ThreadPoolExecutor(3) as pool:
        running.decoding.close()
        photo = jpeg(50, 50)
        sent = [pool.submit(running.ask, "POST", "/predict", photo) for _ in range(3)]
        running.decoding.wait_for_batch()
        wait_until(lambda: running.metric("repvgg_http_active_requests") == 3, "the others to wait for the decoder")
        running.terminate()
        answers = [one.result() for one in sent]
        assert [answer.status for answer in answers] == [503] * 3
        assert "going away" in answers[0].json["error"] and answers[0].headers["Retry-After"] == "1"
        assert running.process.wait(PATIENCE_SECONDS) == 0  # the gate is still closed
        assert "it is given up" in running.log.read_text()


def test_half_sent_heads_leave_health_and_inference_alone(model: Path, engine: Engine) -> None:
    with serve(model, max_connections=20) as running, contextlib.ExitStack() as stack:
        before = running.metric("process_open_fds")
        for _ in range(100):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), PATIENCE_SECONDS))
            half.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert running.ask("GET", "/v2/health/ready").status == 200
        np.testing.assert_array_equal(read_tensor(running.infer(BATCH)), engine.infer(BATCH))
        assert running.metric("process_open_fds") <= before + 20


def test_headers_beyond_the_limit_are_a_431(service: RunningService) -> None:
    assert service.ask("GET", "/v2/health/ready", headers={f"X-{n}": "1" for n in range(90)}).status == 200
    for headers in ({f"X-{n}": "1" for n in range(101)}, {"X": "x" * 70_000}):
        answer = service.ask("GET", "/v2/health/ready", headers=headers)
        assert answer.status == 431 and answer.json["error"] == "the head of the request is too large"


def test_taken_port_is_said_before_the_model_is_loaded(model: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(AssertionError) as caught, serve(model, listen=f"127.0.0.1:{port}", model="absent.onnx"):
            pass
    assert f"REPVGG_LISTEN: 127.0.0.1:{port} cannot be had" in str(caught.value)
    assert "absent.onnx" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_help_lists_every_setting_and_needs_none() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REPVGG_")}
    done = subprocess.run(
        [sys.executable, "-m", "examples.service", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for field in Settings.__dataclass_fields__:
        assert f"REPVGG_{field.upper()}" in done.stdout


def test_second_signal_ends_the_grace_time(model: Path) -> None:
    with serve(model, grace_seconds=600) as running:
        running.terminate()
        wait_until(lambda: "leaving: " in running.log.read_text(), "the first signal to be noted")
        running.terminate()
        assert running.process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "REPVGG_MAX_BATCH: expected a whole number of at least 1"),
        ({"max_queue": 3}, "REPVGG_MAX_QUEUE: expected a whole number of at least REPVGG_MAX_BATCH"),
        ({"timeout_ms": "soon"}, "REPVGG_TIMEOUT_MS: expected a number of 0 or more, found 'soon'"),
        ({"listen": "8000x"}, "REPVGG_LISTEN: expected ADDRESS:PORT"),
        ({"listen": "127.0.0.1:65536"}, "found '127.0.0.1:65536'"),
        ({"device": "tpu"}, "REPVGG_DEVICE: expected cpu"),
        ({"model": "absent.onnx"}, "absent.onnx"),
        ({"model": ""}, "REPVGG_MODEL: not set"),
    ],
    ids=str,
)
def test_service_with_a_wrong_setting_does_not_start_and_says_which(
    model: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(AssertionError) as caught, serve(model, **settings):
        pass
    assert message in str(caught.value) and "remedy: " in str(caught.value)
    assert "Traceback" not in str(caught.value)
