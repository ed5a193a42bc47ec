"""The service without its routes: the model, which requests are admitted, and the phases in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import numpy as np
from fastapi import HTTPException, Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from repvgg_deploy import Engine, __version__
from repvgg_deploy.errors import CudaContextError, DeadlineError, InputError
from repvgg_deploy.runtime.opening import is_plan
from repvgg_deploy.runtime.options import BackendName, EngineOptions
from repvgg_deploy.runtime.results import Result

from .decoders import DecodeLimits, Decoders
from .metrics import RequestMetrics, make_registry
from .settings import Settings, name_variable

logger = logging.getLogger(__name__)

Phase = Literal["ready", "leaving", "refusing", "broken"]
"""`leaving`: not ready any more, requests are still answered. `refusing`: only those under way are. `broken`: the GPU
failed, and only a new process helps."""
_T = TypeVar("_T")
CLIENT_IS_GONE = 499
_THREADS = 1  # that reads and writes long JSON: more would only take turns, and take them from the event loop


class Service:
    """An open Engine, its batcher, and the processes that decode; a context manager.

    Args:
        settings: The model, its limits and times.

    Raises:
        RepVGGDeployError: The model cannot be opened, or a setting is out of range.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            self._open(settings)
        except InputError as error:
            raise name_variable(error) from error

    def _open(self, settings: Settings) -> None:
        self.settings = settings
        self.phase: Phase = "ready"
        self.active = 0
        self._buffered = 0
        self._ended, self._endings = False, set[asyncio.Future[None]]()
        options = EngineOptions(intra_op_threads=settings.threads or None)
        # An unknown name is refused by the Engine.
        backend = cast("BackendName", settings.backend) if settings.backend else None
        self.engine = Engine(settings.model, device=settings.device or None, backend=backend, options=options)
        try:
            self.name = settings.name or self.engine.path.stem
            self.platform = "tensorrt_plan" if is_plan(self.engine.path) else "onnxruntime_onnx"
            self.spec = self.engine.spec
            self._open_batcher()
        except BaseException:
            self.engine.close()
            raise

    def _open_batcher(self) -> None:
        settings = self.settings
        largest = min(settings.max_batch, self.spec.batch or settings.max_batch)
        self.batcher = self.engine.batcher(
            largest,
            max_delay_ms=settings.max_delay_ms,
            max_queue=settings.max_queue or None,
            timeout_ms=settings.timeout_ms,
            concurrency=settings.concurrency or None,
        )
        sizes = [size for size in self.spec.input.shape[1:] if isinstance(size, int)]
        if len(sizes) == 3:  # a model of any image size has no usual one
            for images in {1, largest}:
                self.engine.warm_up((images, *sizes))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="worker")
        self._open_decoders()
        about = {"version": __version__, "backend": self.engine.backend_name, "platform": self.platform}
        self.registry = make_registry(self.engine.statistics, self.batcher.statistics, about)
        self.metrics = RequestMetrics(self.registry)
        self.metrics.active.set_function(lambda: self.active)
        self.metrics.buffered.set_function(lambda: self._buffered)
        self.metrics.ready.set_function(lambda: self.phase == "ready")

    def _open_decoders(self) -> None:
        settings = self.settings
        self._decoding = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decoder")
        self._decoders = None
        if self.spec.preprocessing is not None and self.spec.kind in ("logits", "probabilities", "top5"):
            limits = DecodeLimits(settings.decode_seconds, settings.max_pixels, settings.max_body_bytes)
            self._decoders = Decoders(settings.decoders, self.spec.preprocessing, limits)

    def __enter__(self) -> Service:
        logger.info("%r as %r with %s", self.engine, self.name, dataclasses.asdict(self.settings))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.batcher.close(drain=False)  # nobody waits for an answer any more
        for pool in (self._threads, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._decoders is not None:
            self._decoders.close()
        self.engine.close()
        logger.info("closed after %d requests", self.batcher.statistics().requests)

    @contextlib.asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[bytearray]:
        """Counts the request among those under way, and gives its body.

        Raises:
            HTTPException: 503 when too many are under way, 413 when the body is too large, 408 when it takes too long
                to arrive.
        """
        limit = self.settings.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise self._too_large()
        if self.active >= self.settings.max_requests:
            raise self.refuse(f"{self.active} requests are under way, as many as may")
        self.active += 1
        body = bytearray()
        try:
            await self._receive(request, body)
            # Only now: an answer before the body has been read would be lost with the connection.
            if self.phase == "refusing":
                raise self.refuse("this server is going away")
            if self.phase == "broken":
                raise self.refuse("the GPU of this server failed")
            yield body
        finally:
            self.active -= 1
            self._buffered -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        async def collect() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                self._buffered += len(chunk)
                if len(body) > self.settings.max_body_bytes:
                    raise self._too_large()
                if self._buffered > self.settings.max_buffered_bytes:
                    raise self.refuse("too many bytes are being received")

        try:
            whole = asyncio.ensure_future(asyncio.wait_for(collect(), self.settings.body_seconds))
            await self._or_end(whole)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"the request did not arrive within {self.settings.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(CLIENT_IS_GONE) from error

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413,
            f"expected a body of at most {self.settings.max_body_bytes:,} bytes; send fewer images, or smaller ones",
        )

    def refuse(self, why: str) -> HTTPException:
        """An answer 503 that says when to try again."""
        return HTTPException(503, f"{why}; try again", {"Retry-After": str(self.settings.retry_after_seconds)})

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Runs in another thread what would hold up other requests.

        Raises:
            HTTPException: 503, the service ends before it is done.
        """
        return await self._or_end(asyncio.get_running_loop().run_in_executor(self._threads, work))

    async def decode(self, request: Request, body: bytearray) -> NDArray[np.uint8]:
        """One image file as a model's input, uint8 (H, W, 3) RGB, as `Engine.infer_images` makes it.

        Raises:
            InputError: It is no usable image, or takes too long; or the model does not take images as files.
            DeadlineError: No decoder was free within `timeout_ms`.
            HTTPException: 499, the client has gone; 503, the service ends before it is done.
        """
        if self._decoders is None:
            raise InputError(
                "this model does not classify images as files", remedy=f"send tensors to /v2/models/{self.name}/infer"
            )
        late = False

        def give_up() -> None:
            nonlocal late
            late = future.cancel()  # what has begun has a limit of its own

        future = self._decoding.submit(self._decoders.decode, body)
        timer = asyncio.get_running_loop().call_later(self.settings.timeout_ms / 1e3, give_up)
        try:
            return await self._or_end(asyncio.wrap_future(future), asyncio.ensure_future(_wait_until_gone(request)))
        except asyncio.CancelledError:
            if not late:
                raise
            raise DeadlineError(
                f"no decoder was free within {self.settings.timeout_ms:g} ms", remedy="try again later, or elsewhere"
            ) from None
        finally:
            timer.cancel()

    async def infer(self, request: Request, batch: NDArray[Any], timeout_ms: float | None = None) -> Result:
        """Runs a batch together with those of others. Where the client has gone, it leaves the queue.

        Raises:
            RepVGGDeployError: What `Batcher.infer` raises.
            HTTPException: 499, the client has gone.
        """
        limit = min(timeout_ms or self.settings.timeout_ms, self.settings.timeout_ms)
        answer: asyncio.Future[Any] = asyncio.wrap_future(self.batcher.submit(batch, timeout_ms=limit))
        try:
            gone: asyncio.Future[Any] = asyncio.ensure_future(_wait_until_gone(request))
            result: Result = await self._or_end(answer, gone)
            return result
        except CudaContextError:
            self.phase = "broken"
            raise

    async def _or_end(self, wanted: asyncio.Future[_T], gone: asyncio.Future[Any] | None = None) -> _T:
        """What is wanted; 503 where the service ends first, 499 where the client is gone first."""
        ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._endings.add(ending)
        if self._ended:
            ending.set_result(None)
        waited: set[asyncio.Future[Any]] = {wanted, ending, *([gone] if gone is not None else [])}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
            raise self.refuse("this server is going away") if ending.done() else HTTPException(CLIENT_IS_GONE)
        finally:
            self._endings.discard(ending)
            for future in waited:
                future.cancel()

    def leave(self, phase: Phase) -> None:
        """Enters `leaving` or `refusing`; `broken` stays."""
        self.phase = phase if self.phase != "broken" else "broken"
        logger.info("%s: %d requests under way", self.phase, self.active)

    def end(self) -> None:
        """Answers with 503 whatever is still under way: no request that was let in stays without an answer."""
        if self.active:
            logger.warning("%d requests are still under way, and are refused", self.active)
        self._ended = True
        if self._decoders is not None:
            self._decoders.end()
        for ending in self._endings:
            if not ending.done():
                ending.set_result(None)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
