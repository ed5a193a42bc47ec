"""What REPVGG_PAGES=1 adds for people: a page that classifies an image, and what the routes take and give (OpenAPI).

The files of `page/` work without a network, and their policy lets the browser load nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from .core import Service
from .openapi import describe_api

Get = Callable[..., Callable[[Callable[..., Any]], None]]
FOLDER = Path(__file__).with_name("page")
KINDS = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
HEADERS = {
    # blob: is the image that was chosen.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(get: Get, service: Service) -> None:
    """Adds the routes `/`, its files, and `/openapi.json`.

    Args:
        get: Makes routes of one answer to GET, HEAD and OPTIONS.
        service: What they are about.
    """
    limit = service.settings.max_body_bytes
    size = f"{limit / 2**20:.3g} MB" if limit >= 2**20 else f"{limit / 2**10:.3g} kB"
    values = {"{model}": html.escape(service.name), "{max_bytes}": str(limit), "{max_size}": size}
    files = {name: (FOLDER / name).read_text(encoding="utf-8") for name in KINDS}
    files["index.html"] = re.sub(r"\{\w+\}", lambda found: values[found[0]], files["index.html"])
    description = describe_api(service)

    async def show(request: Request) -> Response:
        name = request.url.path.removeprefix("/") or "index.html"
        return Response(files[name], media_type=KINDS[name], headers=HEADERS)

    get("/", *(f"/{name}" for name in KINDS if name != "index.html"))(show)

    @get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(description)
