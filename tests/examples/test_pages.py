"""What REPVGG_PAGES=1 adds: the page's files, and routes that are what /openapi.json says of them."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import onnxruntime
import prometheus_client
import pytest
from PIL import Image

from examples.service import pages
from examples.service.app import create_app
from examples.service.core import Service
from examples.service.settings import Settings
from tests.examples.running_service import binary_request, serve
from tests.examples.test_app import ask
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch

NEEDED = (fastapi, onnxruntime, prometheus_client)  # imported, so that without one this file is left out and named
NAME = 'a<b>&"c{model}'


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    path = make_onnx(tmp_path / "tiny.onnx", ModelOptions(size=(4, 4)))
    with Service(Settings(str(path), name=NAME, threads=1, pages=1, max_body_bytes=3 << 20)) as opened:
        yield opened


def test_pages_are_off_unless_they_are_asked_for(tmp_path: Path) -> None:
    with Service(Settings(str(make_onnx(tmp_path / "tiny.onnx")), threads=1)) as service:
        assert {ask(service, "GET", path)[0] for path in ("/", "/page.js", "/openapi.json")} == {404}
        assert ask(service, "GET", "/v2/health/ready")[0] == 200


def test_page_holds_its_files_only_and_lets_the_browser_load_nothing_else(service: Service) -> None:
    status, headers, body = ask(service, "GET", "/")
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and not re.search(r"unsafe|https?:|\*|data:", " ".join(policy.values()))
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'", "'self'", "'self'")
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script>|//", page.replace("<!doctype html>", ""))
    loaded = set(re.findall(r'(?:src|href)="([^"]+)"', page)) - {"openapi.json", "metrics"}
    assert loaded == {"page.js", "page.css", "icon.svg"}
    for name in loaded:
        status, headers, body = ask(service, "GET", f"/{name}")
        assert (status, headers["content-type"].partition(";")[0]) == (200, pages.KINDS[name])
        assert body == (pages.FOLDER / name).read_bytes()
    assert not re.search("innerHTML|insertAdjacentHTML|document.write|eval", (pages.FOLDER / "page.js").read_text())


def test_page_names_the_model_and_the_limit_as_text(service: Service) -> None:
    page = ask(service, "GET", "/")[2].decode()
    assert page.count("a&lt;b&gt;&amp;&quot;c{model}") == 2 and "a<b>" not in page
    assert f'data-max-bytes="{3 << 20}"' in page and "up to 3 MB" in page
    assert not re.search(r"\{max_\w+\}", page)


def test_openapi_names_every_route_and_no_other(service: Service) -> None:
    described = json.loads(ask(service, "GET", "/openapi.json")[2])["paths"]
    found = {(path, method.upper()) for path, methods in described.items() for method in methods}
    there = {
        (route.path.format(name="a%3Cb%3E%26%22c%7Bmodel%7D", version="1"), method)
        for route in create_app(service).routes
        for method in route.methods
    }
    assert there - found == {(f"/{name}", method) for name in pages.KINDS for method in ("GET", "HEAD", "OPTIONS")} - {
        ("/index.html", method) for method in ("GET", "HEAD", "OPTIONS")
    }
    assert found <= there


def test_openapi_has_the_statuses_of_the_readme(service: Service) -> None:
    table = (pages.FOLDER.parent / "README.md").read_text(encoding="utf-8").partition("## When it refuses")[2]
    refused = set(re.findall(r"\d{3}", " ".join(re.findall(r"^\| ([\d, ]+)[ |]", table, re.M))))
    described = json.loads(ask(service, "GET", "/openapi.json")[2])["paths"]["/predict"]["post"]["responses"]
    assert refused - {"404", "405"} == set(described) - {"200"}  # those are of no route that is described


@pytest.mark.parametrize("options", [ModelOptions(), ModelOptions(kind="top5"), ModelOptions(uint8=True, labels=False)])
def test_answers_are_what_openapi_says(options: ModelOptions, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, of the extra dev, is not installed")
    with Service(Settings(str(make_onnx(tmp_path / "tiny.onnx", options)), threads=1, pages=1)) as service:
        described = json.loads(ask(service, "GET", "/openapi.json")[2])["paths"]

        def check(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> int:
            status, found, content = ask(service, method.upper(), path, body, headers)
            answer = described[path][method]["responses"][str(status)]
            kind = found.get("content-type", "").partition(";")[0]
            if kind == "application/json":
                jsonschema.validate(json.loads(content), answer["content"][kind]["schema"])
            else:
                assert kind in answer.get("content", {"": None})
            return status

        assert {check("get", path) for path, methods in described.items() if "get" in methods} == {200}
        photo = io.BytesIO()
        Image.new("RGB", (20, 20), "red").save(photo, "PNG")
        assert [check("post", "/predict", body) for body in (photo.getvalue(), b"nonsense")] == [200, 400]
        assert check("post", "/predict", b"x", {"content-type": "multipart/form-data; boundary=x"}) == 415
        batch = random_batch(options, 2)
        infer, schema = "/v2/models/tiny/infer", "application/json"
        assert check("post", infer, *binary_request(batch)) == 200
        tensor = {"name": "images", "shape": [*batch.shape], "data": batch.ravel().tolist()}
        tensor["datatype"] = "UINT8" if options.uint8 else "FP32"
        wanted = [{"name": service.spec.outputs[0].name, "parameters": {"binary_data": False}}]
        request: dict[str, Any] = {"id": "a", "inputs": [tensor], "outputs": wanted, "parameters": {"timeout": 10**9}}
        said = described[infer]["post"]["requestBody"]["content"][schema]["schema"]
        jsonschema.validate(request, said)
        assert check("post", infer, json.dumps(request).encode()) == 200
        for wrong in ({**tensor, "name": "x"}, {**tensor, "shape": [0, 3]}, {**tensor, "data": []}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({**request, "inputs": [wrong]}, said)
            assert check("post", infer, json.dumps({**request, "inputs": [wrong]}).encode()) == 400


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing_that_openapi_does_not_say(tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis, of the extra dev, is not installed")
    path = make_onnx(tmp_path / "tiny.onnx", ModelOptions(size=(2, 2)))
    with serve(path, pages=1) as service:
        # Left out: what the schema allows is not all accepted. It cannot say that `data` has as many numbers as `shape`
        # says, nor that a body is an image.
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{service.port}/openapi.json"]
        options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "50", "--seed", "1", "--no-color"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tested: 32" in done.stdout
        assert service.ask("GET", "/v2/health/ready").status == 200
