"""The example service as a process of its own, and requests to it with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.contract.source_tree import ROOT
from tests.examples.held_service import GATE, GRACE_IS_OVER
from tests.waiting import PATIENCE_SECONDS, Gate, wait_until


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RunningService:
    """A service under test.

    Attributes:
        process: Its process.
        port: Where it listens.
        log: What it printed.
        model: What clients call its model.
        gate: Holds up its batches, if it was started for that.
        decoding: Holds up its decoders likewise.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    model: str
    gate: Gate
    decoding: Gate

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request on a connection of its own; a body that is an iterable of bytes is sent in chunks."""
        connection = self.connect()
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def infer(self, batch: np.ndarray[Any, Any], **parameters: object) -> Answer:
        """One request with binary tensors, to a model whose input is called images."""
        return self.ask("POST", f"/v2/models/{self.model}/infer", *binary_request(batch, **parameters))

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by name and labels, as Prometheus's own parser reads it."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.ask("GET", "/metrics").body.decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics().get((name, frozenset(labels.items())), 0.0)

    @contextlib.contextmanager
    def hold(self, batches: Sequence[np.ndarray[Any, Any]]) -> Iterator[list[Future[Answer]]]:
        """Requests from a thread each, none of which is run before the gate is opened; at the end all are answered."""
        self.gate.close()
        with ThreadPoolExecutor(len(batches)) as pool:
            try:
                yield [pool.submit(self.infer, batch) for batch in batches]
            finally:
                self.gate.open()

    def end_grace(self) -> None:
        """As if its time were over."""
        _grace(self.gate).touch()

    def terminate(self) -> None:
        """SIGTERM, as an orchestrator sends it."""
        self.process.send_signal(signal.SIGTERM)


def binary_request(batch: np.ndarray[Any, Any], **parameters: object) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    datatype = {"float32": "FP32", "uint8": "UINT8"}[batch.dtype.name]
    tensor = {
        "name": "images",
        "shape": list(batch.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": batch.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return head + batch.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def read_tensor(answer: Answer) -> np.ndarray[Any, Any]:
    """The one float32 output of a binary answer."""
    assert answer.status == 200, answer.body
    size = int(answer.headers["Inference-Header-Content-Length"])
    return np.frombuffer(answer.body[size:], np.float32).reshape(json.loads(answer.body[:size])["outputs"][0]["shape"])


@contextlib.contextmanager
def serve(path: Path, *, held: bool = False, **settings: object) -> Iterator[RunningService]:
    """A service that answers; killed at the end if it still runs.

    `held`: its batches go through a gate, which is open, and its grace can be ended.
    One thread computes, and nothing is too late, unless the settings say otherwise: tests share few cores with others.
    """
    usual = {"threads": 1, "grace_seconds": 0, "drain_seconds": 600, "timeout_ms": 600_000, "body_seconds": 600}
    given = {f"REPVGG_{name.upper()}": str(value) for name, value in {**usual, **settings}.items()}
    log = path.with_suffix(f".{time.monotonic_ns()}.log")
    gate = Gate(log.with_suffix(".gate"))
    environment = {**os.environ, "REPVGG_MODEL": str(path), "REPVGG_LISTEN": "127.0.0.1:0", **given}
    environment |= {GATE: str(gate.path), GRACE_IS_OVER: str(_grace(gate))}
    program = "tests.examples.held_service" if held else "examples.service"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", program], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        port = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
        wait_until(lambda: process.poll() is not None or port.search(log.read_text()), "the service to listen")
        found = port.search(log.read_text())
        assert found, log.read_text()
        yield RunningService(process, int(found[1]), log, path.stem, gate, Gate(Path(f"{gate.path}.decode")))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _grace(gate: Gate) -> Path:
    return gate.path.with_suffix(".over")
