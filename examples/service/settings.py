"""The settings of the service, from its environment: each field is the variable REPVGG_ and its name in capitals."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields

from repvgg_deploy.errors import InputError

logger = logging.getLogger(__name__)
PREFIX = "REPVGG_"
# What the package, the images of docker/ and the tests read.
_OF_OTHERS = frozenset(
    {"REPVGG_DEPLOY_CACHE", "REPVGG_ENGINES", "REPVGG_BUILD", "REPVGG_TRITON", "REPVGG_SERVE", "REPVGG_GPU_MODELS",
     "REPVGG_FUZZ_CASES", "REPVGG_SOAK_FACTOR", "REPVGG_EVERY_KILL"}
)  # fmt: skip
# With 0 of these, every request would be refused.
_POSITIVE = frozenset(
    {
        "max_body_bytes",
        "max_buffered_bytes",
        "max_requests",
        "max_pixels",
        "body_seconds",
        "decoders",
        "decode_seconds",
        "head_seconds",
        "max_head_bytes",
        "answer_seconds",
    }
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
        decoders: Processes that decode images.
        decode_seconds: Of a processor, that decoding an image may take; then 400.
        head_seconds: How long a client may take from its connection, or the first byte of a request, to the end of its
            headers; then 408.
        max_head_bytes: The largest request line with all headers; then 431.
        max_connections: Beyond it, the connection is closed that has waited longest without a whole request; 0: as many
            as the process may open files, less 256.
        answer_seconds: How long a client may leave an answer unread; then its connection is closed.
        retry_after_seconds: When a refused client is asked to try again.
        grace_seconds: How long requests are still answered after SIGTERM, while readiness is off: longer than a load
            balancer takes to notice.
        drain_seconds: How long requests that are under way after that may take.
        pages: 1: also a page at `/` that classifies an image, and the routes as OpenAPI at `/openapi.json`.
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
    decode_seconds: float = 5.0
    head_seconds: float = 10.0
    max_head_bytes: int = 65536
    max_connections: int = 0
    answer_seconds: float = 30.0
    retry_after_seconds: int = 1
    grace_seconds: float = 10.0
    drain_seconds: float = 20.0
    pages: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]") or "127.0.0.1", int(port)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads and checks the environment.

    A variable that begins like ours and is none is logged: it is a slip, or nobody reads it.

    Raises:
        InputError: REPVGG_MODEL is missing, a number is none or out of range, or REPVGG_LISTEN has no port.
    """
    for name, value in environment.items():
        said = _doubt(name, value)
        if said is not None:
            logger.warning("%s: %s", name, said)
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


def _doubt(name: str, value: str) -> str | None:
    """What is wrong with a variable that begins like ours; None where nothing is.

    Kubernetes sets variables for each service of a namespace; beside one named `repvgg` or `repvgg-b2` they begin so.
    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    known = [PREFIX + field.name.upper() for field in fields(Settings)]
    if not name.startswith(PREFIX) or name in known or name in _OF_OTHERS:
        return None
    link = re.fullmatch(
        r"REPVGG(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)", name
    )
    if link is not None and (name != f"{PREFIX}PORT" or "://" in value):
        return None
    near = (
        [f"{PREFIX}LISTEN"] if name in (f"{PREFIX}PORT", f"{PREFIX}HOST") else difflib.get_close_matches(name, known, 1)
    )
    return "is no setting and is ignored" + (f"; did you mean {near[0]}?" if near else "")


def describe_settings() -> str:
    """Every variable with its default, for `--help`."""
    rows = []
    for field in fields(Settings):
        default = "" if field.default is MISSING or field.default in ("", 0) else f"  (default: {field.default})"
        rows.append(f"  {PREFIX}{field.name.upper()}{default}")
    return "\n".join(rows)


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
