"""What a real process cannot be made to do: a GPU that is lost, a model that fails."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fastapi
import onnxruntime
import prometheus_client
import pytest
from PIL import Image

from examples.service import settings as settings_module
from examples.service.app import create_app
from examples.service.core import Service
from examples.service.settings import Settings, read_settings
from repvgg_deploy.errors import CudaContextError, InputError, ModelError, RepVGGDeployError
from repvgg_deploy.serving import kserve
from tests.contract.source_tree import ROOT
from tests.examples.running_service import binary_request
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch

NEEDED = (fastapi, onnxruntime, prometheus_client)  # imported, so that without one this file is left out and named


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(Settings(str(make_onnx(tmp_path / "tiny.onnx")), threads=1)) as opened:
        yield opened


def ask(
    service: Service, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request to the application, without a server."""
    sent: list[dict[str, Any]] = []
    given = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": given,
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # a client that stays
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(create_app(service)(scope, receive, send))  # type: ignore[arg-type]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def let_fail(service: Service, monkeypatch: pytest.MonkeyPatch, error: RepVGGDeployError) -> None:
    """From now on the backend fails."""

    def submit(*_: object, **__: object) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future

    monkeypatch.setattr(service.batcher, "submit", submit)


INFER = "/v2/models/tiny/infer"


def test_lost_gpu_ends_liveness_and_readiness_and_refuses_what_comes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, headers = binary_request(random_batch(ModelOptions(), 1))
    assert ask(service, "POST", INFER, body, headers)[0] == 200
    let_fail(service, monkeypatch, CudaContextError("illegal address", remedy="restart the process"))
    status, _, content = ask(service, "POST", INFER, body, headers)
    assert (status, json.loads(content)) == (500, {"error": "the model failed; the log says more"})
    assert [ask(service, "GET", f"/v2/health/{what}")[0] for what in ("live", "ready")] == [
        503,
        503,
    ]  # live: so that it is restarted
    status, found, content = ask(service, "POST", INFER, body, headers)
    assert (status, found["retry-after"], "GPU" in json.loads(content)["error"]) == (503, "1", True)


@pytest.mark.parametrize(
    "path", ["/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready", "/v2"]
)
def test_health_answers_head_and_options(service: Service, path: str) -> None:
    assert ask(service, "HEAD", path)[0] == 200
    status, headers, body = ask(service, "OPTIONS", path)
    assert (status, headers["allow"], body) == (204, "GET, HEAD, OPTIONS", b"")


def test_half_a_surrogate_pair_in_a_request_is_answered_with_400(service: Service) -> None:
    head = {"inputs": [{"name": "\ud800", "shape": [1], "datatype": "FP32", "data": [1]}]}
    for changed in (head, {"inputs": [{**head["inputs"][0], "name": "images", "datatype": "\udfff"}]}):
        status, _, content = ask(service, "POST", INFER, json.dumps(changed).encode())
        assert status == 400 and "error" in json.loads(content)
    assert ask(service, "POST", INFER, json.dumps({**head, "id": "\ud800"}).encode())[0] == 400


def test_metadata_and_metrics_speak_the_protocols_words(service: Service) -> None:
    assert json.loads(ask(service, "GET", "/v2/models/tiny")[2])["platform"] == "onnxruntime_onnx"
    text = ask(service, "GET", "/metrics")[2].decode()
    assert "_created" not in text
    assert re.search(r'repvgg_build_info\{backend="ONNX Runtime[^}]*platform="onnxruntime_onnx",version="', text)
    helps = re.findall(r"# HELP (repvgg_\w+) (.*)", text)
    assert len(helps) > 25 and [name for name, said in helps if not re.fullmatch(r"[A-Z0-9][^:]+", said)] == []


def test_what_is_rendered_as_text_leaves_the_event_loop(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    render = kserve.render_answer

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return render(*arguments)

    monkeypatch.setattr(kserve, "render_answer", note)
    batch = random_batch(ModelOptions(), 1)
    for binary in (True, False):
        assert ask(service, "POST", INFER, *binary_request(batch, binary_data_output=binary))[0] == 200
    main, other = threads
    assert main == "MainThread" and other.startswith("worker")


def test_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    photo = buffer.getvalue()
    scan = photo[photo.rindex(b"\xff\xda") : -2]  # the last one, once more and once more
    assert ask(service, "POST", "/predict", photo)[0] == 200
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    status, _, content = ask(service, "POST", "/predict", photo[:-2] + scan * 8000 + photo[-2:])
    assert status == 400 and "JPEG of 80" in json.loads(content)["error"]


def test_end_answers_what_is_under_way(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is being decoded, one that waits for its batch, and one whose body does not come."""

    def submit(*_: object, **__: object) -> Future[Any]:
        service.end()  # the batch is never run
        return Future()

    monkeypatch.setattr(service.batcher, "submit", submit)
    status, headers, _ = ask(service, "POST", INFER, *binary_request(random_batch(ModelOptions(), 1)))
    assert (status, headers["retry-after"]) == (503, "1")
    assert ask(service, "POST", "/predict", b"\xff\xd8")[0] == 503
    assert service.active == 0


def test_failure_of_one_batch_leaves_the_service_ready(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body, headers = binary_request(random_batch(ModelOptions(), 1))
    with monkeypatch.context() as patch:
        let_fail(service, patch, ModelError("node Conv_7 failed at /secret/path", remedy="look at the model"))
        status, _, content = ask(service, "POST", INFER, body, headers)
    assert status == 500 and b"secret" not in content
    assert "node Conv_7 failed" in caplog.text
    assert [ask(service, "GET", f"/v2/health/{what}")[0] for what in ("live", "ready")] == [200, 200]
    assert ask(service, "POST", INFER, body, headers)[0] == 200


def test_unforeseen_failure_is_counted_and_takes_no_place(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service.batcher, "submit", fail)
    with pytest.raises(ZeroDivisionError):  # for the server's log
        ask(service, "POST", INFER, *binary_request(random_batch(ModelOptions(), 1)))
    assert service.active == 0
    labels = {"route": "/v2/models/{name}/infer", "status": "500"}
    assert service.registry.get_sample_value("repvgg_http_requests_total", labels) == 1


def test_settings_are_read_by_name_and_kind() -> None:
    found = read_settings(
        {
            "REPVGG_MODEL": "a.onnx",
            "REPVGG_MAX_BATCH": "8",
            "REPVGG_MAX_DELAY_MS": "0.5",
            "REPVGG_LISTEN": "[::]:80",
            "PATH": "x",
        }
    )
    assert found == Settings("a.onnx", max_batch=8, max_delay_ms=0.5, listen="[::]:80")
    assert found.address == ("::", 80)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e999", "", "1.5"])
def test_setting_that_is_no_count_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"REPVGG_MAX_BATCH: expected a whole number of 0 or more"):
        read_settings({"REPVGG_MODEL": "a.onnx", "REPVGG_MAX_BATCH": text})


@pytest.mark.parametrize(
    "name",
    [
        "MAX_BODY_BYTES",
        "MAX_BUFFERED_BYTES",
        "MAX_REQUESTS",
        "MAX_PIXELS",
        "BODY_SECONDS",
        "DECODERS",
        "DECODE_SECONDS",
        "HEAD_SECONDS",
        "MAX_HEAD_BYTES",
        "ANSWER_SECONDS",
    ],
)
def test_setting_with_which_all_would_be_refused_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match=rf"REPVGG_{name}: expected a (whole )?number above 0, found '0'"):
        read_settings({"REPVGG_MODEL": "a.onnx", f"REPVGG_{name}": "0"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threads": 5000}, "REPVGG_THREADS: expected at most 1024, found 5000"),
        ({"max_queue": 5}, "REPVGG_MAX_QUEUE: expected a whole number of at least REPVGG_MAX_BATCH, 32, found 5"),
        ({"max_batch": 0}, "REPVGG_MAX_BATCH: expected a whole number of at least 1, found 0"),
        ({"timeout_ms": 0.0}, "REPVGG_TIMEOUT_MS: expected a positive number, found 0.0"),
        ({"device": "gpu"}, "REPVGG_DEVICE: expected cpu, cuda, cuda:N or the number of a GPU, found 'gpu'"),
        ({"backend": "onnx"}, "REPVGG_BACKEND: expected one of onnxruntime"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_that_the_engine_refuses_is_named_as_its_variable(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        Service(Settings(str(make_onnx(tmp_path / "tiny.onnx")), **{"threads": 1, **setting}))
    assert refused.value.message.startswith(message)
    assert refused.value.remedy == "correct it, or leave it out"


def test_model_that_cannot_be_opened_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Service(Settings(str(tmp_path / "missing.onnx")))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("REPVGG_MAX_BATCHES", "8", "is no setting and is ignored; did you mean REPVGG_MAX_BATCH?"),
        ("REPVGG_TIMEOUT", "5", "did you mean REPVGG_TIMEOUT_MS?"),
        ("REPVGG_PORT", "9000", "did you mean REPVGG_LISTEN?"),
        ("REPVGG_ZZZZZZZZ", "1", "is no setting and is ignored"),
        ("REPVGG_PORT", "tcp://10.0.0.1:8000", None),
        ("REPVGG_PORT_8000_TCP_ADDR", "10.0.0.1", None),
        ("REPVGG_SERVICE_HOST", "10.0.0.1", None),
        ("REPVGG_SERVICE_PORT_HTTP", "8000", None),
        ("REPVGG_B2_SERVICE_PORT", "8000", None),
        ("REPVGG_B2_PORT", "tcp://10.0.0.1:8000", None),
        ("REPVGG_DEPLOY_CACHE", "/cache", None),
        ("REPVGG_ENGINES", "/engines", None),
        ("REPVGG_MAX_QUEUE", "64", None),
    ],
)
def test_unknown_variable_is_warned_of_and_those_of_others_are_known(
    caplog: pytest.LogCaptureFixture, name: str, value: str, said: str | None
) -> None:
    read_settings({"REPVGG_MODEL": "a.onnx", name: value})
    assert [record.message for record in caplog.records] == [] if said is None else f"{name}: " in caplog.text
    assert said is None or said in caplog.text


def test_variables_that_the_images_set_are_known_to_the_service() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docker").glob("*.[DcRp]*") if path.is_file())
    named = set(re.findall(r"REPVGG_[A-Z_]+", text))
    assert "REPVGG_TRITON" in named
    assert named <= settings_module._OF_OTHERS | {f"REPVGG_{name.upper()}" for name in Settings.__dataclass_fields__}


def test_readme_names_every_setting_and_its_default() -> None:
    readme = (ROOT / "examples/service/README.md").read_text(encoding="utf-8")
    for name, value in ((field.name, field.default) for field in Settings.__dataclass_fields__.values()):
        shown = "" if name == "model" or value in ("", 0) else f"{value:g}" if isinstance(value, float) else str(value)
        assert f"| `REPVGG_{name.upper()}` | {shown} |".replace("|  |", "| |") in readme, name
