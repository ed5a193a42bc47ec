"""Runs the service.

    REPVGG_MODEL=sample.onnx python -m examples.service          # --help lists the settings

SIGTERM: readiness goes off; requests are answered for REPVGG_GRACE_SECONDS more; then it listens no longer, finishes
what is under way, refuses what is not done after REPVGG_DRAIN_SECONDS with 503, and exits with 0. Ctrl-C leaves the
grace time out. A second signal ends the waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from repvgg_deploy import RepVGGDeployError
from repvgg_deploy.errors import InputError, clean_text

from .app import create_app
from .connections import Connection, ConnectionLimits, most_connections
from .core import Service
from .settings import describe_settings, read_settings

logger = logging.getLogger(__name__)
_PORT = "REPVGG_LISTEN"
_BACKLOG = 128  # connections that the kernel keeps; they are accepted in one round, and need files
_LATE_SECONDS = 4.5  # beyond grace and drain time: an orchestrator is told to give five
# How long it waits for requests that are on their way, on connections that were accepted or wait to be. In rounds of
# the loop, of 10 ms or more, not in seconds: a process that was held up for a second has accepted nothing meanwhile.
_LINGER_ROUNDS = 100
# Longer than load balancers keep an idle connection: if the service closed first, the next request could be lost.
_IDLE_SECONDS = 75


class DrainingServer(uvicorn.Server):
    """uvicorn that loses no request when it stops.

    On a signal uvicorn itself closes at once: connections that wait to be accepted, and those whose next request has
    not been read.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._has_grace = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes the signal, no more: this runs between two instructions of the main thread.

        It replaces uvicorn's own handler, after which the exit code would be the signal's.
        """
        if self.should_exit:
            self.force_exit = True
        elif self._service.phase == "ready":
            self._service.phase = "leaving"  # at once: the loop below looks only ten times a second
        self._has_grace = sig == signal.SIGTERM
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            logger.info("running on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def main_loop(self) -> None:
        """Serves until a signal arrives, and then until the last answer is sent."""
        await super().main_loop()
        settings, service = self._service.settings, self._service
        service.leave("leaving")
        grace = settings.grace_seconds if self._has_grace else 0.0
        _exit_after(grace + settings.drain_seconds + _LATE_SECONDS)
        await self._wait(grace, lambda: False)
        await self._linger(lambda: not self._has_unaccepted())
        for server in self.servers:
            server.close()
        service.leave("refusing")
        await asyncio.sleep(0.1)  # what was accepted last is not among the connections yet
        await self._linger(lambda: not self.server_state.connections)
        await self._wait(settings.drain_seconds, lambda: not service.active)
        service.end()
        await self._linger(lambda: not service.active)

    async def _wait(self, seconds: float, over: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not (over() or self.force_exit) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def _linger(self, over: Callable[[], bool]) -> None:
        for _ in range(_LINGER_ROUNDS):
            if over() or self.force_exit:
                return
            await asyncio.sleep(0.01)

    def _has_unaccepted(self) -> bool:
        """Whether a connection waits to be accepted: closing the socket would reset it."""
        poll = select.poll()
        for server in self.servers:
            for listener in server.sockets:
                poll.register(listener.fileno(), select.POLLIN)
        return bool(poll.poll(0))


class _CleanFormatter(logging.Formatter):
    """What a model or a request names stays text in the log: no controls of a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_text(super().format(record), lines=True)


def main() -> int:
    """Serves until it is told to stop; returns the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(_CleanFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    parser = argparse.ArgumentParser(
        prog="python -m examples.service",
        description="Serves one model over HTTP. It has no options: its settings are variables of the environment, and "
        "README.md says what each means.",
        epilog=f"settings:\n{describe_settings()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        settings = read_settings()
        host, port = settings.address
        listener = _bind(host, port)
        service = Service(settings)
    except RepVGGDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    limits = ConnectionLimits(
        head_bytes=settings.max_head_bytes,
        head_seconds=settings.head_seconds,
        answer_seconds=settings.answer_seconds,
        connections=settings.max_connections or most_connections(),
    )
    with service:
        config = uvicorn.Config(
            create_app(service),
            host,
            port,
            http=partial(Connection, limits=limits, idle={}),  # type: ignore[arg-type]  # uvicorn calls it, no more
            backlog=_BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            ws="none",
        )
        config.timeout_graceful_shutdown = 1  # all have their answer by then
        try:
            DrainingServer(config, service).run([listener])
        except OSError as error:  # another process listens there since
            print(f"error: {_PORT}: {host}:{port}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet: a taken port is found before the model is loaded.

    Raises:
        InputError: It cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"{_PORT}: {host}:{port} cannot be had: {error.strerror}",
            remedy="end what listens there, or give another address, such as 0.0.0.0:8001",
        ) from error
    return listener


def _exit_after(seconds: float) -> None:
    """Ends the process then, whatever a thread still computes: an orchestrator kills what is late."""

    def end() -> None:
        logger.warning("%g s after the signal something still runs: it is given up", seconds)
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
