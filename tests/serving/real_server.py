"""A running tritonserver, and requests to it with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.serving.prepare_triton import BACKENDS, SERVER, server_environment
from tests.waiting import PATIENCE_SECONDS, Gate, wait_until


@dataclass
class RealServer:
    """A server under test.

    Attributes:
        process: Its process.
        port: Of HTTP; gRPC is one above, metrics two.
        log: What it printed.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str, *, port: int | None = None) -> tuple[int, bytes]:
        return request("GET", port or self.port, path)

    def post(self, path: str, body: object = None) -> tuple[int, Any]:
        status, data = request("POST", self.port, path, json.dumps(body if body is not None else {}).encode())
        return status, json.loads(data) if data else None

    def load(self, model: str) -> tuple[int, Any]:
        return self.post(f"/v2/repository/models/{model}/load")

    def metric(self, name: str, model: str) -> float:
        """Sum over all versions."""
        lines = self.get("/metrics", port=self.port + 2)[1].decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"{name}{{") and f'model="{model}"' in line
        )

    def wait_for_queue(self, model: str, count: int) -> None:
        """Until so many requests wait besides those that are being run."""
        wait_until(
            lambda: self.metric("nv_inference_pending_request_count", model) == count, f"{count} requests to wait"
        )

    def stop(self) -> int:
        """SIGTERM, as an orchestrator stops it; gives its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """Ends it and what it started, if it still runs, and frees the shared memory of its python backend."""
        shared = _shared_memory(self.process.pid)
        # The whole session: the interpreters of its python backend would outlive a server that is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for path in shared:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def start(repository: Path, models: Sequence[str], *options: str) -> Iterator[RealServer]:
    """A server that is ready, with these models of a repository; killed at the end if it still runs."""
    port = free_ports(3)
    log = repository.parent / f"server-{port}.log"
    addresses = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
    ports = [f"--{kind}-port={port + index}" for index, kind in enumerate(("http", "grpc", "metrics"))]
    loads = [f"--load-model={name}" for name in models]
    command = [
        str(SERVER),
        f"--model-repository={repository}",
        f"--backend-directory={BACKENDS}",
        *addresses,
        *ports,
        *loads,
    ]
    command += ["--model-control-mode=explicit", "--exit-timeout-secs=120", "--metrics-interval-ms=100", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=server_environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = RealServer(process, port, log)
    try:
        wait_until(lambda: process.poll() is not None or _is_ready(server), "the server to be ready")
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        yield server
    finally:
        server.kill()


def _shared_memory(process: int) -> set[Path]:
    """The files in /dev/shm that a process has mapped."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
        return {
            Path(line[line.index("/dev/shm/") :])
            for line in lines
            if "/dev/shm/" in line and not line.endswith("(deleted)")
        }
    return set()


def _is_ready(server: RealServer) -> bool:
    """Triton opens gRPC first, then HTTP, then the metrics: the last says that all three answer."""
    with contextlib.suppress(OSError):
        return server.get("/v2/health/ready")[0] == 200 and server.get("/metrics", port=server.port + 2)[0] == 200
    return False


def free_ports(count: int) -> int:
    """The first of so many consecutive ports that are free, and that the system gives to no outgoing connection."""
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        end = 32768
    first = 10_000 if end > 12_000 else 1024
    chance = random.SystemRandom()  # two runs of the tests at once must not choose the same
    while True:
        port = chance.randrange(first, max(end, first + 10_000) - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for index in range(count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + index))
            return port


def request(
    method: str, port: int, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def infer(port: int, model: str, batch: np.ndarray[Any, Any]) -> tuple[int, Any]:
    """One request with the binary tensors of the protocol; the status, and the output `logits` or the error's text."""
    datatype = {"float32": "FP32", "uint8": "UINT8"}[batch.dtype.name]
    tensor = {
        "name": "images",
        "shape": batch.shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": batch.nbytes},
    }
    head = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", head + batch.tobytes(), headers)
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    if response.status != 200:
        return response.status, data.decode(errors="replace")
    size = int(response.headers["Inference-Header-Content-Length"])
    shape = json.loads(data[:size])["outputs"][0]["shape"]
    return 200, np.frombuffer(data[size:], np.float32).reshape(shape)


class TritonGate(Gate):
    """Before the model `tiny`: its backend looks for the file."""

    @contextlib.contextmanager
    def hold(self, port: int, batches: Sequence[np.ndarray[Any, Any]]) -> Iterator[list[Future[tuple[int, Any]]]]:
        """Requests from a thread each, none of which is answered before the gate is opened; at the end all are."""
        self.close()
        with ThreadPoolExecutor(len(batches)) as pool:
            try:
                yield [pool.submit(infer, port, "tiny", batch) for batch in batches]
            finally:
                self.open()


@dataclass
class Load:
    """Requests one after the other from several threads, while the block runs; then what came of each.

    Attributes:
        answers: Status and output of each request, or 0 and the error where the connection failed.
    """

    port: int
    model: str
    batch: np.ndarray[Any, Any]
    threads: int = 4
    answers: list[tuple[int, Any]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _pool: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._pool = [threading.Thread(target=self._send) for _ in range(self.threads)]
        for thread in self._pool:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._pool:
            thread.join(PATIENCE_SECONDS)

    def wait_for(self, count: int) -> None:
        """Until so many more requests were answered."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, f"{count} answers")

    def _send(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(infer(self.port, self.model, self.batch))
            except (OSError, http.client.HTTPException) as error:
                self.answers.append((0, repr(error)))
