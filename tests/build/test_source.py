"""Number types of a graph's tensors, against the onnx package's own inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from repvgg_deploy.build.source import tensor_types
from repvgg_deploy.files.onnx import read_graph, read_metadata
from tests.build.make_typed import inferred_types, make_typed


@pytest.mark.parametrize("kind", ["plain", "se_after", "uint8_top5", "probabilities", "features"])
@pytest.mark.parametrize("typing", ["fp32", "fp16", "int8", "mixed"])
def test_types_of_all_tensors_are_those_that_onnx_infers(tmp_path: Path, kind: str, typing: str) -> None:
    path = make_typed(tmp_path, typing, kind)
    found = tensor_types(read_graph(path), read_metadata(path).spec)
    wanted = inferred_types(path)
    assert {name: found.get(name) for name in wanted} == wanted
    assert ("float16" in found.values()) == (typing in ("fp16", "mixed"))
