"""A real Prometheus: that of the system, or Debian's package, unpacked into `.triton/` and not installed."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serving.prepare_triton import FOLDER
from tests.serving.real_server import free_ports
from tests.waiting import PATIENCE_SECONDS, wait_until


def find_prometheus(name: str = "prometheus") -> str | None:
    """The program `prometheus` or `promtool`; None where it cannot be had."""
    found = shutil.which(name)
    if found or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return found
    folder = FOLDER / "prometheus"
    program = folder / "usr/bin" / name
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(subprocess.TimeoutExpired):  # as apt-get does for minutes where there is no network
            subprocess.run(
                ["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, check=False, timeout=120
            )
        for package in folder.glob("prometheus_*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, check=False)
    return str(program) if program.exists() else None


@dataclass(frozen=True)
class Prometheus:
    """One that runs.

    Attributes:
        url: Its address.
        at: The moment that is asked for, in seconds since 1970; None for now.
    """

    url: str
    at: float | None = None

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression. Raises HTTPError where it is none."""
        question = {"query": expression, **({} if self.at is None else {"time": self.at})}
        with urllib.request.urlopen(
            f"{self.url}/api/v1/query?{urllib.parse.urlencode(question)}", timeout=PATIENCE_SECONDS
        ) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result

    def value(self, expression: str) -> float:
        """Of an expression with one series."""
        (series,) = self.ask(expression)
        return float(series["value"][1])


@contextlib.contextmanager
def run_prometheus(program: str, config: Path) -> Iterator[Prometheus]:
    port = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (config.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def is_ready() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_until(lambda: process.poll() is not None or is_ready(), "Prometheus to be ready")
        assert process.poll() is None, (config.parent / "prometheus.log").read_text(errors="replace")[-2000:]
        yield Prometheus(url)
    finally:
        process.kill()
        process.wait()
