"""Limits of a connection, on a loop and a transport of the test's own: its clock is the test."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import fastapi
import prometheus_client
import pytest
import uvicorn
from uvicorn.server import ServerState

from examples.service.connections import Connection, ConnectionLimits, most_connections

NEEDED = (fastapi, prometheus_client, uvicorn)  # imported, so that without one this file is left out and named
LIMITS = ConnectionLimits(head_bytes=1000, headers=10, head_seconds=7.0, answer_seconds=9.0, connections=3)
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Timer:
    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.cancelled = seconds, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Notes what is to be called later; tasks are never run, so that a request stays under way."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.tasks: list[Any] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, call))
        return self.timers[-1]

    def create_task(self, coroutine: Any, **_: object) -> Any:
        self.tasks.append(coroutine)
        coroutine.close()

        class Task:
            def add_done_callback(self, call: object) -> None:
                pass

        return Task()

    def armed(self, seconds: float) -> list[Timer]:
        return [timer for timer in self.timers if timer.seconds == seconds and not timer.cancelled]


class Transport:
    def __init__(self) -> None:
        self.written, self.closing, self.aborted, self.unsent = b"", False, False, 0

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def no_app(scope: object, receive: object, send: object) -> None:
    pass


class Server:
    def __init__(self) -> None:
        self.config = uvicorn.Config(no_app, log_config=None, access_log=False, ws="none", lifespan="off")
        self.config.load()
        self.state, self.loop, self.idle = ServerState(), Loop(), dict[Connection, None]()

    def connect(self) -> tuple[Connection, Transport]:
        connection = Connection(
            limits=LIMITS, idle=self.idle, config=self.config, server_state=self.state, app_state={}, _loop=self.loop
        )
        transport = Transport()
        connection.connection_made(transport)
        return connection, transport


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_head_that_does_not_end_is_given_up_at_its_time(sent: bytes) -> None:
    server = Server()
    connection, transport = server.connect()
    if sent:
        connection.data_received(sent)
    (timer,) = server.loop.armed(7.0)
    assert not transport.closing
    timer.call()
    assert transport.closing and transport.written.startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_time_does_not_begin_anew_with_each_byte() -> None:
    server = Server()
    connection, _ = server.connect()
    for byte in b"GET / HTTP/1.1":
        connection.data_received(bytes([byte]))
    assert len(server.loop.armed(7.0)) == 1


def test_whole_head_ends_the_time_and_the_next_request_has_its_own() -> None:
    server = Server()
    connection, transport = server.connect()
    connection.data_received(REQUEST)
    assert server.loop.armed(7.0) == [] and len(server.loop.tasks) == 1 and connection not in server.idle
    connection.data_received(b"GET / HT")  # sent on while the first has no answer
    (timer,) = server.loop.armed(7.0)
    timer.call()
    assert not transport.closing and len(server.loop.armed(7.0)) == 2  # it waits for our answer, and is asked again
    connection.cycle.response_complete = True
    connection.on_response_complete()
    assert connection in server.idle
    server.loop.armed(7.0)[-1].call()
    assert transport.written.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "head",
    [
        [b"GET /" + b"x" * 1000 + b" HTTP/1.1\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nName: " + b"x" * 1000 + b"\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nName: ", *[b"x" * 300] * 4],
        [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 11, b"\r\n"],
        [b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 11 + b"\r\n"],
    ],
    ids=["line", "header", "endless_header", "many_in_pieces", "many"],
)
def test_head_that_is_too_large_is_refused_and_starts_nothing(head: list[bytes]) -> None:
    server = Server()
    connection, transport = server.connect()
    for part in head:
        if not transport.closing:
            connection.data_received(part)
    assert transport.closing and transport.written.startswith(b"HTTP/1.1 431 ")
    assert server.loop.tasks == []


def test_head_within_the_limits_is_served_and_what_is_no_http_is_a_400() -> None:
    server = Server()
    connection, transport = server.connect()
    connection.data_received(b"GET /" + b"x" * 500 + b" HTTP/1.1\r\n" + b"a: b\r\n" * 10 + b"\r\n")
    assert len(server.loop.tasks) == 1 and not transport.closing
    other, refused = server.connect()
    other.data_received(b"\x16\x03\x01 TLS")
    assert refused.written.startswith(b"HTTP/1.1 400 ")


def test_beyond_the_limit_the_connection_goes_that_waits_longest() -> None:
    server = Server()
    busy, first, second = (server.connect() for _ in range(3))
    busy[0].data_received(REQUEST)
    third = server.connect()
    assert first[1].aborted and not (busy[1].closing or second[1].closing or third[1].closing)
    first[0].connection_lost(None)
    second[1].unsent = 10  # its answer is still being sent
    server.connect()
    assert third[1].aborted and not second[1].closing
    third[0].connection_lost(None)
    assert server.loop.armed(7.0)


def test_where_all_are_busy_a_new_connection_is_refused() -> None:
    server = Server()
    for connection, _ in [server.connect() for _ in range(3)]:
        connection.data_received(REQUEST)
    assert server.connect()[1].written.startswith(b"HTTP/1.1 503 ")


def test_answer_that_nobody_reads_is_given_up_at_its_time() -> None:
    server = Server()
    connection, transport = server.connect()
    connection.data_received(REQUEST)
    connection.pause_writing()
    (timer,) = server.loop.armed(9.0)
    connection.resume_writing()
    assert timer.cancelled
    connection.pause_writing()
    server.loop.armed(9.0)[0].call()
    assert transport.aborted


def test_lost_connection_leaves_no_timer_and_no_trace() -> None:
    server = Server()
    connection, _ = server.connect()
    connection.pause_writing()
    connection.connection_lost(None)
    assert server.loop.armed(7.0) == server.loop.armed(9.0) == []
    assert server.idle == {} and server.state.connections == set()


@pytest.mark.parametrize(("files", "connections"), [(1024, 768), (64, 16), (1 << 20, 1 << 14)])
def test_connections_leave_files_for_the_model_and_for_health(
    monkeypatch: pytest.MonkeyPatch, files: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert most_connections() == connections
