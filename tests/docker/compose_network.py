"""A network as Compose makes one, for Prometheus with its configuration unchanged: its DNS knows the running services.

    unshare --user --map-root-user --mount --net python compose_network.py PROMETHEUS CONFIGURATION FOLDER

In namespaces of its own, as it answers on port 53 and puts itself into /etc/resolv.conf. Starts and stops a service
called `service` and prints, as JSON, what Prometheus saw before, meanwhile and afterwards.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RUNNING: set[str] = set()
SERVERS = ('min(up{job="triton"}) or vector(0)', "min(repvgg_ready) or vector(0)")
_URL = "http://127.0.0.1:9090"
_PATIENCE_SECONDS = 60


class Metrics(BaseHTTPRequestHandler):
    """What the example service says of itself, in short."""

    def do_GET(self) -> None:  # the name is that of http.server
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"repvgg_ready 1\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as above
        """Nothing."""


def answer_names() -> None:
    """DNS: 127.0.0.1 for what runs, no such name for the rest. Source: RFC 1035, section 4.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        while True:
            query, client = server.recvfrom(512)
            end = query.index(b"\0", 12) + 5  # the name, its end, type and class
            name = query[13 : 13 + query[12]].decode()
            runs = name in RUNNING
            head = query[:2] + struct.pack(">HHHHH", 0x8180 if runs else 0x8183, 1, int(runs), 0, 0)
            record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton("127.0.0.1") if runs else b""
            server.sendto(head + query[12:end] + record, client)


def ask(path: str) -> Any:
    with urllib.request.urlopen(f"{_URL}{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def look() -> dict[str, Any]:
    """The targets, and what the panels `Server` show."""
    targets = {
        f"{t['labels']['job']} {t['labels']['instance']}": t["health"] for t in ask("/api/v1/targets")["activeTargets"]
    }
    values = [
        ask(f"/api/v1/query?{urllib.parse.urlencode({'query': query})}")["result"][0]["value"][1] for query in SERVERS
    ]
    return {"targets": targets, "servers": values}


def wait_for(targets: dict[str, str]) -> None:
    """Until Prometheus sees these targets; what comes in place of them is for `look` to tell."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        try:
            if look()["targets"] == targets:
                break
        except OSError:
            pass
        time.sleep(0.2)
    time.sleep(1)


def main(prometheus: str, configuration: str, folder: Path) -> None:
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions ndots:0\n", encoding="utf-8")
    subprocess.run(["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    threading.Thread(target=answer_names, daemon=True).start()
    command = [
        prometheus,
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:9090",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    seen = []
    try:
        wait_for({})
        time.sleep(6)  # a name that is no target now will be none later: it was asked for again
        seen.append(look())
        with ThreadingHTTPServer(("127.0.0.1", 8000), Metrics) as service:
            threading.Thread(target=service.serve_forever, daemon=True).start()
            RUNNING.add("service")
            wait_for({"service service:8000": "up"})
            seen.append(look())
            RUNNING.clear()
            service.shutdown()
        wait_for({})
        seen.append(look())
    finally:
        process.kill()
        process.wait()
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
