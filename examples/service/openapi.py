"""The routes as OpenAPI 3.1 for the model that is open: what FastAPI would make of them knows no body of bytes."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import quote

from repvgg_deploy import __version__
from repvgg_deploy.serving import kserve

from .core import Service

_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
# Statuses of what a request itself may have wrong, and of a service that is busy, ends, or has failed.
_REFUSALS = {
    "400": "Correct the request: the text says what was expected",
    "408": "The headers or the body did not arrive in time",
    "413": "The body is too large",
    "431": "The headers are too many or too large",
    "500": "The model failed; the service's log says why",
    "503": "Nothing was run: send the same request again, after Retry-After seconds or to another server",
    "504": "It waited until its deadline, and was not run",
}


def describe_api(service: Service) -> dict[str, Any]:
    """The document.

    Args:
        service: Whose model and limits it names.
    """
    model = f"/v2/models/{quote(service.name, safe='')}"
    health = {"200": _bare("Yes"), "503": _bare("No")}
    paths = {
        "/predict": {"post": _describe_predict(service)},
        "/v2/health/live": _describe_get("Whether the process can still serve; if not, only a new one helps", health),
        "/v2/health/ready": _describe_get("Whether requests are to be sent here", health),
        "/v2": _describe_get("The server", {"200": _json("Its name, version and extensions", _SERVER)}),
        "/metrics": _describe_get("What Prometheus reads", {"200": _bare("Metrics", "text/plain", _TEXT)}),
        "/": _describe_get("A page that classifies an image", {"200": _bare("The page", "text/html", _TEXT)}),
        "/openapi.json": _describe_get("This document", {"200": _json("OpenAPI 3.1", {"type": "object"})}),
    }
    for path in (model, f"{model}/versions/{kserve.ONLY_VERSION}"):
        paths[path] = _describe_get("The model's inputs and outputs", {"200": _json("Its metadata", _METADATA)})
        paths[f"{path}/ready"] = _describe_get("Whether the model is ready", health)
        paths[f"{path}/infer"] = {"post": _describe_infer(service)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{service.name} on repvgg-deploy",
            "version": __version__,
            "description": "One model over HTTP: images as files, and tensors in the KServe v2 protocol.",
        },
        "paths": paths,
    }


def _describe_get(summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    """A route of GET, which also answers HEAD and OPTIONS."""
    heads = {status: {"description": answer["description"]} for status, answer in responses.items()}
    allowed = {"Allow": {"description": "GET, HEAD, OPTIONS", "schema": _TEXT}}
    return {
        "get": {"summary": summary, "responses": responses},
        "head": {"summary": f"{summary}; no body", "responses": heads},
        "options": {"summary": "The methods", "responses": {"204": {"description": "No body", "headers": allowed}}},
    }


def _describe_predict(service: Service) -> dict[str, Any]:
    settings = service.settings
    file = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    prediction = _object({"class": _COUNT, "label": {"type": ["string", "null"]}, "score": {"type": "number"}})
    predictions = {"type": "array", "items": prediction, "maxItems": 5}
    return {
        "summary": "The five best classes of an image",
        "description": f"The body is a file of at most {settings.max_body_bytes:,} bytes and {settings.max_pixels:,} "
        "pixels, and no form. `score` is the softmax of logits, else what the model gives.",
        "requestBody": {
            "required": True,
            "content": dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), file),
        },
        "responses": {
            "200": _json("Best first", _object({"model": _TEXT, "predictions": predictions})),
            **_describe_refusals(),
            "415": _json("A form, in place of the bytes of a file", _ERROR),
        },
    }


def _describe_infer(service: Service) -> dict[str, Any]:
    described = kserve.describe_model(service.spec, service.name, service.platform)
    (images,) = described["inputs"]
    batch = service.batcher.options.max_batch
    sizes = [{"type": "integer", "minimum": 1, "maximum": batch}]
    sizes += [{"type": "integer", "minimum": 1} if size < 0 else {"const": size} for size in images["shape"][1:]]
    kind = {"type": "integer", "minimum": 0, "maximum": 255} if images["datatype"] == "UINT8" else {"type": "number"}
    most = {"maxItems": batch * math.prod(images["shape"][1:])} if min(images["shape"][1:]) > 0 else {}
    tensor = {
        "name": {"const": images["name"]},
        "datatype": {"const": images["datatype"]},
        "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)},
    }
    numbers = {"type": "array", "items": kind, "minItems": 1, **most}
    names = {"enum": [output["name"] for output in described["outputs"]]}
    wanted = _object({"name": names, "parameters": {"type": "object"}}, optional=("parameters",))
    request = _object(
        {
            "id": _TEXT,
            "parameters": {"type": "object", "properties": {"timeout": {**_COUNT, "description": "microseconds"}}},
            "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _object({**tensor, "data": numbers})},
            "outputs": {"type": "array", "items": wanted, "maxItems": len(described["outputs"])},
        },
        optional=("id", "parameters", "outputs"),
    )
    output = {"name": names, "datatype": _TEXT, "shape": {"type": "array", "items": _COUNT}}
    more = {"data": {"type": "array"}, "parameters": {"type": "object"}}
    answer = {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT}
    outputs = {"type": "array", "items": _object({**output, **more}, optional=tuple(more))}
    answered = _json("The outputs", _object({**answer, "outputs": outputs}, optional=("id",)))
    answered["content"]["application/octet-stream"] = {}
    binary = f"Or as bytes after the JSON, whose length the header {kserve.HEADER} says."
    return {
        "summary": "Runs the model on a batch (KServe v2)",
        "description": f"`data` may be nested. {binary} Requests may be compressed with gzip or deflate.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {"200": answered, **_describe_refusals()},
    }


def _describe_refusals() -> dict[str, Any]:
    found = {status: _json(why, _ERROR) for status, why in _REFUSALS.items()}
    found["503"]["headers"] = {"Retry-After": {"description": "seconds", "schema": _COUNT}}
    return found


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": needed}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return _bare(description, "application/json", schema)


def _bare(description: str, kind: str | None = None, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description, **({"content": {kind: {"schema": schema}}} if kind else {})}


_ERROR = _object({"error": _TEXT})
_SERVER = _object({"name": _TEXT, "version": _TEXT, "extensions": {"type": "array", "items": _TEXT}})
_TENSORS = {
    "type": "array",
    "items": _object({"name": _TEXT, "datatype": _TEXT, "shape": {"type": "array", "items": {"type": "integer"}}}),
}
_METADATA = _object(
    {
        "name": _TEXT,
        "versions": {"type": "array", "items": _TEXT},
        "platform": _TEXT,
        "inputs": _TENSORS,
        "outputs": _TENSORS,
    }
)
