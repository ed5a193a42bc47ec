"""The routes: KServe v2, images, health, metrics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repvgg_deploy import __version__
from repvgg_deploy.errors import DeadlineError, EngineBusyError, InputError, RepVGGDeployError
from repvgg_deploy.images.decode import normalize
from repvgg_deploy.runtime.results import Result, rank_classes
from repvgg_deploy.serving import kserve
from repvgg_deploy.specs.values import ModelSpec

from .core import Service
from .pages import Get, add_pages

logger = logging.getLogger(__name__)

MODEL, VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
_SHORT = 1 << 16  # bytes of JSON that are read between two other requests


def create_app(service: Service) -> FastAPI:
    """The application around an open service."""
    # No generated documentation: the bodies are bytes, which it could not describe. `openapi.py` does.
    app = FastAPI(title="repvgg-deploy", version=__version__, openapi_url=None)
    app.add_middleware(Observer, service=service)
    app.add_exception_handler(AnyHTTPException, _answer_http_error)
    app.add_exception_handler(RepVGGDeployError, partial(_answer_error, service))
    get = partial(_add_get, app)
    _add_health(get, service)
    _add_inference(app, service)
    if service.settings.pages:
        add_pages(get, service)
    return app


def _add_get(app: FastAPI, *paths: str) -> Callable[[Callable[..., Any]], None]:
    """The routes of one answer to GET and HEAD; OPTIONS says so. Balancers probe with any of the three."""

    def add(answer: Callable[..., Any]) -> None:
        for path in paths:
            app.add_api_route(path, answer, methods=["GET", "HEAD"])
            app.add_api_route(path, _say_methods, methods=["OPTIONS"])

    return add


def _add_health(get: Get, service: Service) -> None:
    @get("/v2/health/live")
    async def live() -> Response:
        return Response(status_code=200 if service.phase != "broken" else 503)

    def say_ready() -> Response:
        return Response(status_code=200 if service.phase == "ready" else 503)

    @get("/v2/health/ready")
    async def ready() -> Response:
        return say_ready()

    @get(f"{MODEL}/ready", f"{VERSION}/ready")
    async def model_ready(request: Request) -> Response:
        _require_model(service, request)
        return say_ready()

    @get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "repvgg-deploy", "version": __version__, "extensions": kserve.EXTENSIONS}

    @get(MODEL, VERSION)
    async def model(request: Request) -> dict[str, Any]:
        _require_model(service, request)
        return kserve.describe_model(service.spec, service.name, service.platform)


async def _say_methods() -> Response:
    return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})


def _add_inference(app: FastAPI, service: Service) -> None:
    @app.post(f"{MODEL}/infer")
    @app.post(f"{VERSION}/infer")
    async def infer(request: Request) -> Response:
        _require_model(service, request)
        async with service.admit(request) as body:
            parse = partial(_parse, service, request, body)
            # JSON of many numbers, and what is to be decompressed, would hold up others.
            length = request.headers.get(kserve.HEADER, "")
            plain = length.isdecimal() and len(length) < 9 and int(length) <= _SHORT
            plain = plain and "content-encoding" not in request.headers
            wanted = parse() if plain else await service.in_thread(parse)
            result = await service.infer(request, wanted.batch, wanted.timeout_ms)
            render = partial(kserve.render_answer, wanted, result, service.spec, service.name)
            binary = all(output.binary and not output.classes for output in wanted.outputs)
            content, headers = render() if binary else await service.in_thread(render)
        return Response(content, headers=headers)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        async with service.admit(request) as body:
            if request.headers.get("content-type", "").startswith("multipart/"):
                raise HTTPException(
                    415, "expected the bytes of an image file as the body, and no form: curl --data-binary @photo.jpg"
                )
            image = (await service.decode(request, body))[np.newaxis]
            preprocessing = service.spec.preprocessing
            assert preprocessing is not None, "without it nothing is decoded"
            batch = image if preprocessing.in_graph else normalize(image, preprocessing)
            result = await service.infer(request, batch)
        return Json({"model": service.name, "predictions": best_classes(result, service.spec)})


def _parse(service: Service, request: Request, body: bytearray) -> kserve.InferRequest:
    encoding, limit = request.headers.get("content-encoding", "identity"), service.settings.max_body_bytes
    data = body if encoding == "identity" else kserve.decompress(body, encoding, limit)
    if len(data) > limit:
        raise HTTPException(413, f"decompressed, the body has more than {limit:,} bytes")
    return kserve.parse_request(data, request.headers.get(kserve.HEADER), service.spec)


def best_classes(result: Result, spec: ModelSpec) -> list[dict[str, Any]]:
    """The five best classes of one image, best first; for logits, `score` is the softmax over all classes."""
    classes, scores = next(rank_classes(result, spec, 5))
    pairs = zip(classes.tolist(), scores.tolist(), strict=True)
    return [
        {"class": index, "label": spec.labels[index] if spec.labels else None, "score": score} for index, score in pairs
    ]


def _require_model(service: Service, request: Request) -> None:
    name, version = request.path_params["name"], request.path_params.get("version", kserve.ONLY_VERSION)
    if name != service.name:
        raise HTTPException(404, f"no model {name[:80]!r} here, only {service.name!r}")
    if version != kserve.ONLY_VERSION:
        raise HTTPException(404, f"no version {version[:80]!r} of {name!r} here, only {kserve.ONLY_VERSION!r}")


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return Json({"error": error.detail}, error.status_code, error.headers)


async def _answer_error(service: Service, request: Request, error: Exception) -> Response:
    """An error of ours as the status that tells a client what to do: 400 correct it, 503 retry, 504 too late."""
    assert isinstance(error, RepVGGDeployError)
    if isinstance(error, EngineBusyError) or service.batcher.closed:
        return await _answer_http_error(request, service.refuse(error.message))
    if isinstance(error, (InputError, DeadlineError)):
        status = 504 if isinstance(error, DeadlineError) else 400
        return Json({"error": f"{error.message}; {error.remedy}"}, status)
    logger.error("a request failed: %s", error)
    return Json({"error": "the model failed; the log says more"}, 500)


class Json(JSONResponse):
    """JSON in ASCII: a message may quote half a surrogate pair from a request, which no UTF-8 can hold."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class Observer:
    """Counts every request, and once the server is leaving asks clients not to keep their connection."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.phase in ("leaving", "refusing"):
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # the pattern, so that a client cannot make up new ones
            self._service.metrics.requests.labels(route, str(status)).inc()
            self._service.metrics.seconds.labels(route).observe(time.perf_counter() - started)
