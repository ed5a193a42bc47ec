"""What KServe's own Python package says of its resources: their fields and types, as the schema in a cluster has them.

The package is fetched and not installed: its tables are read from its source. What is Kubernetes' own, as most of an
InferenceService is, goes to the schemas of kubernetes-validate.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.serving.prepare_triton import FOLDER

VERSION = "0.21.0"
KUBERNETES = "1.37.0"
_SIMPLE = {"str": str, "int": int, "bool": bool}


def find_kserve() -> Path | None:
    """The wheel of KServe's package; None where it cannot be had."""
    folder = FOLDER / "kserve"
    if not list(folder.glob(f"kserve-{VERSION}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, f"kserve=={VERSION}"], capture_output=True, check=False, timeout=300)
    return next(folder.glob(f"kserve-{VERSION}-*.whl"), None)


class KServe:
    """The tables of a wheel."""

    def __init__(self, wheel: Path) -> None:
        self._types: dict[str, dict[str, str]] = {}
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(r"kserve/models/v1beta1_\w+\.py", name):
                    self._read(ast.parse(archive.read(name)))

    def _read(self, module: ast.Module) -> None:
        for owner in (node for node in module.body if isinstance(node, ast.ClassDef)):
            tables = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in owner.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id in ("openapi_types", "attribute_map")
            }
            if tables:
                names = tables["attribute_map"]
                self._types[owner.name] = {names[name]: kind for name, kind in tables["openapi_types"].items()}

    def problems(self, value: Any, kind: str = "V1beta1InferenceService", where: str = "") -> list[str]:
        """What is wrong with a value of this type, each with its place."""
        if kind in _SIMPLE:
            return [] if type(value) is _SIMPLE[kind] else [f"{where}: expected {kind}, found {value!r}"]
        if of := re.fullmatch(r"list\[(\w+)\]", kind):
            items = enumerate(value) if isinstance(value, list) else ()
            found = [] if isinstance(value, list) else [f"{where}: expected a list, found {value!r}"]
            return found + [text for index, item in items for text in self.problems(item, of[1], f"{where}[{index}]")]
        if kind in self._types and isinstance(value, dict):
            fields = self._types[kind]
            found = [f"{where}.{name}: {kind} has no such field" for name in value.keys() - fields.keys()]
            known = [name for name in value if name in fields]
            return found + [
                text for name in known for text in self.problems(value[name], fields[name], f"{where}.{name}")
            ]
        if kind == "dict(str, str)":
            whole = isinstance(value, dict) and all(type(text) is str for pair in value.items() for text in pair)
            return [] if whole else [f"{where}: expected texts by name, found {value!r}"]
        return [f"{where}: {text}" for text in kubernetes_problems(value, kind)]


@cache
def _definitions() -> dict[str, Any]:
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    text = (schemas / f"v{KUBERNETES}-local-strict/_definitions.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["$defs"]
    return found


def kubernetes_problems(value: Any, kind: str) -> list[str]:
    """The same, of a type of Kubernetes: `V1Container` is io.k8s.api.core.v1.Container."""
    name = kind.removeprefix("V1")
    spaces = ("io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1")
    full = next(f"{space}.{name}" for space in spaces if f"{space}.{name}" in _definitions())
    schema = {"$id": "https://kubernetes.io/api/_definitions.json", "$ref": f"#/$defs/{full}", "$defs": _definitions()}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]
