"""What a connection may cost before its request is whole, and while nobody reads its answer.

uvicorn limits neither: a client that sends half a head, or nothing, keeps its file descriptor for ever.
"""

from __future__ import annotations

import asyncio
import resource
from asyncio import TimerHandle
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_RESERVED_FILES = 256  # the model, the log, what is accepted in one round of the loop, and health in any case
_STATUS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of each connection, and of all together.

    Attributes:
        head_bytes: Of a request before its body: the line and all headers.
        headers: Their number.
        head_seconds: From the connection, or the first byte of a request, to the end of its head.
        answer_seconds: How long a client may leave an answer unread.
        connections: Beyond it, the one that has waited longest without a whole request is closed.
    """

    head_bytes: int = 65536
    headers: int = 100
    head_seconds: float = 10.0
    answer_seconds: float = 30.0
    connections: int = 768


def most_connections() -> int:
    """As many as the process may open files, but for those that are kept for the model and for health."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(1 << 14, files - _RESERVED_FILES))


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits.

    Args:
        limits: The limits.
        idle: All connections of the server that have no whole request, the one that has waited longest first.
        arguments: As uvicorn gives them.
    """

    def __init__(self, *, limits: ConnectionLimits, idle: dict[Connection, None], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits, self._idle = limits, idle
        self._head_open = True
        self._begin_head()
        self._head_timer: TimerHandle | None = None
        self._answer_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._arm()
        if len(self.connections) > self._limits.connections:
            others = [connection for connection in self._idle if connection is not self]
            # Not one whose last answer is still being sent, where there is another.
            chosen = next(
                (one for one in others if not one.transport.get_write_buffer_size()), next(iter(others), None)
            )
            if chosen is None:
                self._refuse(503, "too many connections; try again")
            else:
                chosen.transport.abort()
                self._idle.pop(chosen)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        for timer in (self._head_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_open:
            self._arrived += len(data)
            self._arm()
        super().data_received(data)
        if self._head_open and self._arrived > self._limits.head_bytes:  # a header that does not end is not parsed yet
            self._refuse(431, "the head of the request is too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_open = True
        self._begin_head()
        self._arm()

    def _begin_head(self) -> None:
        self._arrived, self._head_bytes, self._head_count = 0, 0, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value), 1)

    def _count(self, size: int, headers: int) -> None:
        self._head_bytes += size
        self._head_count += headers
        if self._head_bytes > self._limits.head_bytes or self._head_count > self._limits.headers:
            raise ValueError("too much in a head")  # the parser stops, and `send_400_response` is called

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > self._limits.head_bytes or self._head_count > self._limits.headers:
            self._refuse(431, "the head of the request is too large")
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._idle.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._has_request():
            self._head_open = True
            self._idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(self._limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _has_request(self) -> bool:
        cycle = cast("Any", self.cycle)
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete)

    def _arm(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self._end_head)

    def _end_head(self) -> None:
        self._head_timer = None
        if self._has_request():
            self._arm()  # the next request has begun while an answer is under way: it waits for that, not we for it
        else:
            self._refuse(408, f"the head of the request did not arrive within {self._limits.head_seconds:g} s")

    def _refuse(self, status: int, why: str) -> None:
        if not self.transport.is_closing():
            body = f'{{"error": "{why}"}}'.encode()
            head = f"HTTP/1.1 {status} {_STATUS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()
