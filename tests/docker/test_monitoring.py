"""The triton image's command with a real tritonserver, watched by a real Prometheus: every panel shows something."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse", reason="dockerfile-parse, of the extra dev, is not installed")

from tests.docker.dashboard import GPU_METRICS, expressions, metric_names
from tests.docker.dockerfiles import parse
from tests.docker.prometheus import Prometheus, find_prometheus, run_prometheus
from tests.docker.test_first_start import PROGRAM, ROOT, Container
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.serving.make_repository import needs_schema
from tests.serving.prepare_triton import BACKENDS, SERVER, CannotPrepareError, prepare, server_environment
from tests.serving.real_server import Load, RealServer, free_ports, infer
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = [pytest.mark.slow, needs_schema, pytest.mark.timeout(1200)]
CLIENTS = 8
TRITON = expressions("repvgg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitoring")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    """What the container does from its start on, with the ports and the backend of the tests."""
    try:
        prepare()
    except CannotPrepareError as error:
        pytest.skip(f"no tritonserver: {error}")
    port = free_ports(3)
    options = [
        f"--{kind}-address=127.0.0.1 --{kind}-port={port + index}"
        for index, kind in enumerate(("http", "grpc", "metrics"))
    ]
    script = folder / "bin/tritonserver"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\nexec "{SERVER}" "$@" --backend-directory="{BACKENDS}" {" ".join(options)}\n', encoding="utf-8"
    )
    script.chmod(0o755)
    # A path without spaces, as in the image: the processes of Triton's python backend (2.51) cannot be started below
    # one that has them.
    engines = str(folder / "engines")
    container = Container(
        folder, REPVGG_ENGINES=engines, REPVGG_SERVE="onnx", REPVGG_TRITON="--ensemble jpeg --max-queue-delay-us 20000"
    )
    make_onnx(container.models / "tiny.onnx")
    command = next(i.words for i in reversed(parse("triton")) if i.name == "CMD")
    environment = {
        **server_environment(),
        **{k: v for k, v in container.environment.items() if k.startswith(("REPVGG", "XDG"))},
    }
    environment["PATH"] = f"{script.parent}{os.pathsep}{environment['PATH']}"
    # first_start.py needs this project and not the server's packages, so it sets the server's own path back for it.
    environment["SERVER_PYTHONPATH"], environment["PYTHONPATH"] = environment["PYTHONPATH"], str(ROOT)
    script.write_text(
        script.read_text().replace("exec ", 'export PYTHONPATH="$SERVER_PYTHONPATH"\nexec '), encoding="utf-8"
    )
    log = folder / "server.log"
    with log.open("wb") as file:
        line = [sys.executable, str(PROGRAM), "--triton", *command]
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    running = RealServer(process, port, log)
    check = next(i.value for i in parse("triton") if i.name == "HEALTHCHECK").partition("CMD ")[2]
    healthy = [sys.executable, *[word.replace(":8000/", f":{port}/") for word in json.loads(check)[1:]]]
    try:
        wait_until(
            lambda: (
                process.poll() is not None or not subprocess.run(healthy, capture_output=True, check=False).returncode
            ),
            "the healthcheck",
        )
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def prometheus(folder: Path, server: RealServer) -> Iterator[Prometheus]:
    program = find_prometheus()
    if program is None:
        pytest.skip("no Prometheus on PATH, and Debian's package cannot be had")
    config = folder / "prometheus/prometheus.yml"
    config.parent.mkdir()
    text = (ROOT / "docker/prometheus/prometheus.yml").read_text(encoding="utf-8")
    assert "scrape_interval: 5s\n  scrape_timeout: 4s\n" in text
    text, found, _ = text.partition(
        "    dns_sd_configs:"
    )  # the job triton, which no name leads to here; the service does not run
    assert found and text.endswith("  - job_name: triton\n")
    text = text.replace(
        "scrape_interval: 5s\n  scrape_timeout: 4s\n", "scrape_interval: 1s\n  scrape_timeout: 1s\n"
    )  # so that the test is short
    shutil.copy(ROOT / "docker/prometheus/alerts.yml", config.parent)
    config.write_text(f'{text}    static_configs: [{{ targets: ["127.0.0.1:{server.port + 2}"] }}]\n', encoding="utf-8")
    with run_prometheus(program, config) as running:
        wait_until(lambda: bool(running.ask('up{job="triton"} == 1')), "the first scrape")
        with Load(server.port, "tiny", random_batch(ModelOptions(), 1), threads=CLIENTS) as load:
            wait_until(
                lambda: bool(running.ask("count_over_time(nv_inference_request_success{model='tiny'}[1h]) >= 12")),
                "twelve scrapes of the load",
            )
        assert {status for status, _ in load.answers} == {200}
        scraped = "nv_inference_request_success{model='tiny'}"
        wait_until(
            lambda: running.value(scraped) == server.metric("nv_inference_request_success", "tiny"),
            "a scrape of all of it",
        )
        yield replace(running, at=time.time())  # what the panels showed then, however long the tests take


def test_configuration_is_one_for_promtool() -> None:
    promtool = find_prometheus("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH, and Debian's package cannot be had")
    done = subprocess.run(
        [promtool, "check", "config", ROOT / "docker/prometheus/prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_the_dashboard_exists_in_a_real_server_or_needs_a_gpu(server: RealServer) -> None:
    text = server.get("/metrics", port=server.port + 2)[1].decode()
    real = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert metric_names("repvgg") - {"up"} - real == GPU_METRICS


@pytest.mark.parametrize("expression", [e for e in TRITON.values() if "nv_gpu" not in e])
def test_every_panel_shows_a_number(expression: str, prometheus: Prometheus) -> None:
    """Of the model that had requests; the ensemble had none, so that its latency is no number."""
    series = [one for one in prometheus.ask(expression) if one["metric"].get("model", "tiny") == "tiny"]
    assert series
    assert all(math.isfinite(float(one["value"][1])) for one in series)


@pytest.mark.parametrize(
    "expression",
    [
        *(e for e in TRITON.values() if "nv_gpu" in e),
        *(e for title, e in expressions("service").items() if title != "Server A"),
    ],
)
def test_panels_of_what_is_not_here_are_expressions_that_prometheus_understands(
    expression: str, prometheus: Prometheus
) -> None:
    assert prometheus.ask(expression) == []


def test_alerts_are_evaluated_and_none_goes_off_under_a_load_that_is_answered(prometheus: Prometheus) -> None:
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/rules", timeout=PATIENCE_SECONDS) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= {"ServerDown", "TritonQueueFull"}
    assert [
        (rule["name"], rule["health"], rule["state"]) for rule in rules if rule["health"] == "err" or rule["alerts"]
    ] == []


def test_numbers_of_the_panels_are_what_was_sent(prometheus: Prometheus) -> None:
    """Eight clients at once, one image each, all answered: Triton puts more than one in a batch, and at most eight."""
    assert prometheus.value(TRITON["Server A"]) == 1
    assert prometheus.value(TRITON["Failed A"]) == 0
    # Up to a scrape between the two counters of one batch, a few in a hundred of what 8 s bring.
    assert 1 < prometheus.value(TRITON["Mean batch A"]) <= 1.1 * CLIENTS
    # Of a request: queue, input, inference and output are no more than the whole, which Triton measures by itself; both
    # in microseconds.
    parts = sum(prometheus.value(e) for title, e in TRITON.items() if title.startswith("Where a request's time goes"))
    whole = prometheus.value(
        "sum(rate(nv_inference_request_duration_us[20s])) / sum(rate(nv_inference_request_success[20s]))"
    )
    assert 0.5 * whole < parts <= 1.001 * whole
    assert prometheus.value(f"sum({TRITON['Images a second A']})") == pytest.approx(
        prometheus.value(TRITON["Requests a second A"]), rel=0.05
    )


def test_sigterm_lets_requests_under_way_be_answered(server: RealServer) -> None:
    """Last in this file: it ends the server."""
    assert infer(server.port, "tiny", random_batch(ModelOptions(), 1))[0] == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_SECONDS) == 0
