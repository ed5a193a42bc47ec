"""The settings of the service, from its environment: each field is the variable REPVGG_ and its name in capitals."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from repvgg_deploy.errors import InputError

PREFIX = "REPVGG_"
# With 0 of these, every request would be refused.
_POSITIVE = frozenset(
    {"max_body_bytes", "max_buffered_bytes", "max_requests", "max_pixels", "body_seconds", "decoders"}
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the service.

    Attributes:
        model: An ONNX of repvgg-export, or a plan.
        name: What clients call it; empty: the file's name without its suffix.
        listen: Address and port. (It is not called `port`: beside a service named repvgg, Kubernetes sets REPVGG_PORT.)
        device: `cpu`, `cuda` or `cuda:1`; empty: what the file is for.
        backend: As in `Engine(backend=…)`; empty: its default.
        threads: CPU threads that compute a batch; 0: one a core.
        max_batch: The largest number of images that run together.
        max_delay_ms: How long an image waits for others.
        max_queue: Images that may wait; 0: eight batches.
        timeout_ms: A request that waited so long is not run and is answered with 504; it may ask for less.
        concurrency: Batches that run at once; 0: two where a plan has two contexts, else one.
        max_body_bytes: The largest body of a request, compressed or not; a larger one is answered with 413.
        max_buffered_bytes: Bytes of all bodies in memory at once; beyond it, 503.
        max_requests: Requests under way at once, those in the queue included; beyond it, 503.
        max_pixels: The largest image that is decoded.
        body_seconds: How long a client may take to send a request; then 408.
        decoders: Threads that decode images.
        retry_after_seconds: When a refused client is asked to try again.
        grace_seconds: How long requests are still answered after SIGTERM, while readiness is off: longer than a load
            balancer takes to notice.
        drain_seconds: How long requests that are under way after that may take.
    """

    model: str
    name: str = ""
    listen: str = "127.0.0.1:8000"
    device: str = ""
    backend: str = ""
    threads: int = 0
    max_batch: int = 32
    max_delay_ms: float = 2.0
    max_queue: int = 0
    timeout_ms: float = 2000.0
    concurrency: int = 0
    max_body_bytes: int = 32 << 20
    max_buffered_bytes: int = 512 << 20
    max_requests: int = 512
    max_pixels: int = 25_000_000
    body_seconds: float = 10.0
    decoders: int = 2
    retry_after_seconds: int = 1
    grace_seconds: float = 10.0
    drain_seconds: float = 20.0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]") or "127.0.0.1", int(port)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads and checks the environment.

    Raises:
        InputError: REPVGG_MODEL is missing, a number is none or out of range, or REPVGG_LISTEN has no port.
    """
    values: dict[str, str | int | float] = {}
    for field in fields(Settings):
        text = environment.get(PREFIX + field.name.upper())
        if text is not None:
            values[field.name] = _parse(field.name, text, str(field.type))
    if not values.get("model"):
        raise InputError(
            f"{PREFIX}MODEL: not set, expected the path of an ONNX or a plan", remedy=f"set it: {PREFIX}MODEL=b2.onnx"
        )
    settings = Settings(**values)  # type: ignore[arg-type]  # _parse saw to it
    port = settings.listen.rpartition(":")[2]
    # The event loop would take a larger port modulo 65536.
    if not (port.isascii() and port.isdecimal() and int(port[:6]) < 1 << 16):
        raise InputError(
            f"{PREFIX}LISTEN: expected ADDRESS:PORT, found {settings.listen!r}", remedy="give it such as 0.0.0.0:8000"
        )
    return settings


def name_variable(error: InputError) -> InputError:
    """An error about a parameter of the Engine as one about the variable that set it; another error as it is."""
    variables = {field.name: PREFIX + field.name.upper() for field in fields(Settings)}
    parameter, _, text = (
        error.message.removeprefix("batcher: ").removeprefix("EngineOptions: intra_op_").partition(": ")
    )
    if parameter not in variables:
        return error
    text = text.replace("max_batch", variables["max_batch"])  # a queue must hold so many
    return InputError(f"{variables[parameter]}: {text}", remedy="correct it, or leave it out")


def _parse(field: str, text: str, kind: str) -> str | int | float:
    if kind == "str":
        return text
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        number = -1
    if not 0 <= number < math.inf or (number == 0 and field in _POSITIVE):
        expected = "a whole number" if kind == "int" else "a number"
        least = "above 0" if field in _POSITIVE else "of 0 or more"
        raise InputError(
            f"{PREFIX}{field.upper()}: expected {expected} {least}, found {text!r}",
            remedy="correct it, or leave it out",
        )
    return number
