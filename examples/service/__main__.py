"""Runs the service.

    REPVGG_MODEL=sample.onnx python -m examples.service

SIGTERM: readiness goes off; requests are answered for REPVGG_GRACE_SECONDS more; then it listens no longer, finishes
what is under way, and exits with 0. Ctrl-C leaves the grace time out. A second signal ends the waiting.
"""

from __future__ import annotations

import asyncio
import logging
import select
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from repvgg_deploy import RepVGGDeployError

from .app import create_app
from .core import Service
from .settings import read_settings

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

    async def main_loop(self) -> None:
        """Serves until a signal arrives, and then until the last answer is sent."""
        await super().main_loop()
        settings, service = self._service.settings, self._service
        service.leave("leaving")
        await self._wait(settings.grace_seconds if self._has_grace else 0.0, lambda: False)
        await self._linger(lambda: not self._has_unaccepted())
        for server in self.servers:
            server.close()
        service.leave("refusing")
        await asyncio.sleep(0.1)  # what was accepted last is not among the connections yet
        await self._linger(lambda: not self.server_state.connections)
        await self._wait(settings.drain_seconds, lambda: not service.active)

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


def main() -> int:
    """Serves until it is told to stop; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        service = Service(settings := read_settings())
    except RepVGGDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    host, port = settings.address
    with service:
        config = uvicorn.Config(
            create_app(service),
            host,
            port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            ws="none",
        )
        config.timeout_graceful_shutdown = max(1, round(settings.drain_seconds))
        DrainingServer(config, service).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
