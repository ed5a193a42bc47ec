"""Somebody's ONNX, folded and verified against itself; what cannot be folded is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, version_converter

from repvgg_deploy import Engine
from repvgg_deploy.errors import ArtifactError, InputError, ModelError, ParityError
from repvgg_deploy.export import fold
from repvgg_deploy.export.fold import FoldOptions, describe_folding, fold_onnx
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.graph.fold import FoldReport
from tests.contract.source_tree import ROOT
from tests.graph.make_blocks import BLOCKS, Draw, make_block
from tests.runtime.make_model import make_onnx


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.onnx"
    onnx.save(make_block("RepVGG"), path)
    return path


def operators(path: Path) -> Counter[str]:
    """How many of each kind are in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    with Engine(path) as engine:
        found = engine.infer(x)
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_fold_onnx_block_of_any_network_is_verified_and_carries_a_certificate(name: str, tmp_path: Path) -> None:
    onnx.save(make_block(name), tmp_path / "given.onnx")
    result = fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")
    assert operators(tmp_path / "out.onnx") == {"Conv": 1, "Relu": 2}
    metadata = read_metadata(tmp_path / "out.onnx")
    assert replace(metadata, content_sha256="") == result.metadata and metadata.certificate.passed
    assert metadata.certificate.reference == "the file as it was given: 1 region folded"
    assert [check.name.partition(", ")[2] for check in metadata.certificate.checks[1:]] == [
        f"t{len(make_block(name).graph.node) - 1}, {batch}"
        for batch in ("image 1", "image 2", "another batch", "another size")
    ]
    assert metadata.spec.input.shape == ("n", 8, "h", "w") and metadata.spec.outputs[0].shape[0] == "n"
    assert metadata.history[0].stage == "fold" and metadata.history[0].options["regions_folded"] == 1
    assert run(tmp_path / "out.onnx", np.zeros((2, 8, 9, 7), np.float32)).shape[0] == 2


def make_picky(path: Path) -> Path:
    """RGB of 0 to 1 in; what is outside is cut off, so that normally distributed numbers would show little."""
    draw = Draw()
    draw.channels["x"] = 3
    low, high = draw.constant(0.0), draw.constant(1.0)
    body = draw.conv_bn(draw.node("Clip", ["x", low, high]), 8)
    model = draw.model(draw.node("Relu", [body]))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], (24, 24), strict=True):
        dim.dim_value = size
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [
        (None, None, None, None),
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), 0.0, 1.0),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.0, 255.0),
        ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5), -1.0, 1.0),
    ],
)
def test_fold_onnx_is_verified_on_what_the_network_sees(
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    low: float,
    high: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[np.ndarray] = []
    original = fold.run_onnx

    def watch(path: Path, feeds: Any, **more: Any) -> Any:
        seen.extend(feed["x"] for feed in feeds.values())
        return original(path, feeds, **more)

    monkeypatch.setattr(fold, "run_onnx", watch)
    fold_onnx(make_picky(tmp_path / "m.onnx"), tmp_path / "o.onnx", options=FoldOptions(mean, std))
    if mean is None:  # either may be right: normalised, or shares
        assert {bool(array.min() >= 0) for array in seen} == {True, False}
        assert all(array.max() <= 1 for array in seen if array.min() >= 0)
    else:
        assert all(low <= array.min() < array.max() <= high for array in seen)
        assert max(float(np.ptp(array)) for array in seen) > 0.8 * (high - low)


def test_fold_onnx_without_out_only_describes(given: Path) -> None:
    result = fold_onnx(given)
    assert (len(result.report.folds), result.output, result.metadata, result.checks) == (1, None, None, ())
    assert [path.name for path in given.parent.iterdir()] == ["given.onnx"]


@pytest.mark.parametrize(("before", "after"), [(11, 17), (13, 17), (17, 17), (18, 18), (20, 20), (21, 20), (22, 20)])
def test_fold_onnx_operator_set_becomes_one_that_is_exported_to(before: int, after: int, given: Path) -> None:
    model = make_block("QARepVGG v2")
    if before < 17:  # what the block consists of was written alike
        model.opset_import[0].version = before
    else:
        model = version_converter.convert_version(model, before)
    onnx.save(model, given)
    result = fold_onnx(given, given.with_name("out.onnx"))
    assert onnx.load(given.with_name("out.onnx")).opset_import[0].version == after
    assert result.notes == (() if before == after else (f"operator set {before} became {after}",))
    assert operators(given.with_name("out.onnx"))["Conv"] == 1


@pytest.mark.parametrize("opset", [10, 23])
def test_fold_onnx_other_operator_set_is_refused(opset: int, given: Path) -> None:
    model = onnx.load(given)
    model.opset_import[0].version = opset
    if opset == 10:  # what was no attribute yet
        del model.graph.node[0].attribute[:]
    onnx.save(model, given)
    with pytest.raises(ModelError, match=rf"expected operator set 11 to 22, found {opset}"):
        fold_onnx(given)


def test_fold_onnx_external_data_is_read_and_one_file_written(given: Path, tmp_path: Path) -> None:
    plain = fold_onnx(given, tmp_path / "plain.onnx")
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(given), apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    fold_onnx(apart, tmp_path / "out.onnx")
    assert plain.output is not None and not any(
        t.external_data for t in onnx.load(tmp_path / "out.onnx").graph.initializer
    )
    x = np.random.default_rng(1).standard_normal((1, 8, 9, 7)).astype(np.float32)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", x), run(tmp_path / "plain.onnx", x))
    (tmp_path / "apart.data").unlink()
    with pytest.raises(ModelError, match="external data cannot be read"):
        fold_onnx(apart)


def test_fold_onnx_too_large_is_refused_before_it_is_read(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "_MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="an ONNX file holds"):
        fold_onnx(given)


def halve(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def quantize(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "step"))
    model.graph.node[0].input[0] = "xq"
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["xi", "step"], ["xq"]))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "step"], ["xi"]))


@pytest.mark.parametrize(("spoil", "found"), [(halve, "FLOAT16"), (quantize, "QuantizeLinear")])
def test_fold_onnx_typed_file_is_refused(spoil: object, found: str, given: Path) -> None:
    model = onnx.load(given)
    assert callable(spoil)
    spoil(model)
    onnx.save(model, given)
    with pytest.raises(InputError, match=f"expected an FP32 graph, found {found}") as caught:
        fold_onnx(given)
    assert "fold the FP32 file first" in caught.value.remedy


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "truncated"])
def test_fold_onnx_what_is_no_onnx_is_refused(content: bytes | str | None, given: Path) -> None:
    data = given.read_bytes()
    if content is None:
        given.unlink()
    else:
        given.write_bytes(data[: len(data) // 2] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"given\.onnx"):
        fold_onnx(given)


def test_fold_onnx_weights_among_the_inputs_are_constants(given: Path, tmp_path: Path) -> None:
    model = onnx.load(given)
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    onnx.save(model, given)
    result = fold_onnx(given, tmp_path / "out.onnx")
    assert "could have replaced" in result.notes[0] and len(result.report.folds) == 1
    assert len(onnx.load(tmp_path / "out.onnx").graph.input) == 1


def test_fold_onnx_of_two_inputs_and_an_if_keeps_them_and_has_no_metadata(tmp_path: Path) -> None:
    draw = Draw()
    inner = draw.sum(draw.conv_bn("x"), draw.conv_bn("x", kernel=1))
    branch = [
        helper.make_graph([helper.make_node(kind, [inner], [kind])], kind, [], [
            helper.make_tensor_value_info(kind, TensorProto.FLOAT, ["n", 8, None, None])
        ])
        for kind in ("Relu", "Sigmoid")
    ]  # fmt: skip
    name = draw.node("If", ["flag"], 8, then_branch=branch[0], else_branch=branch[1])
    model = draw.model(name)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    onnx.save(model, tmp_path / "given.onnx")
    result = fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")
    assert operators(tmp_path / "out.onnx") == {"Conv": 1, "If": 1}
    assert result.metadata is None and "2 inputs, expected one image" in result.notes[0]
    with pytest.raises(ModelError, match=r"2 inputs, x, flag, expected one image"):
        Engine(tmp_path / "out.onnx")


def test_fold_onnx_that_does_not_run_itself_is_refused_with_what_may_be_wrong(given: Path, tmp_path: Path) -> None:
    model = onnx.load(given)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 8, 9, 7), np.float32), "fixed"))
    last = model.graph.node[-1]
    output, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("Add", ["before", "fixed"], [output]))
    onnx.save(model, given)
    with pytest.raises(ParityError, match=r"does not run on \{'x': \(1, 8, 128, 192\)\}") as caught:
        fold_onnx(given, tmp_path / "out.onnx")
    assert "where tracing fixed a size" in caught.value.remedy


def test_fold_onnx_of_fixed_sizes_is_verified_on_these(tmp_path: Path) -> None:
    model = make_block("RepVGG")
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (2, 8, 9, 11), strict=True):
        dim.dim_value = size
    onnx.save(model, tmp_path / "given.onnx")
    result = fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")
    assert len(result.checks) == 3 and result.metadata is not None
    assert result.metadata.spec.input.shape == (2, 8, 9, 11)


def test_fold_onnx_of_ours_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    source = make_onnx(tmp_path / "ours.onnx")
    before = read_metadata(source)
    result = fold_onnx(source, tmp_path / "out.onnx")
    after = read_metadata(tmp_path / "out.onnx")
    assert result.report == FoldReport((), ()) and describe_folding(result.report) == "nothing to fold"
    assert (after.spec, after.variant, after.source) == (before.spec, before.variant, before.source)
    assert [entry.stage for entry in after.history][-1] == "fold"
    assert after.certificate.checks[: len(before.certificate.checks)] == before.certificate.checks


def test_fold_onnx_sum_that_remains_is_told(tmp_path: Path) -> None:
    draw = Draw()
    onnx.save(draw.model(draw.sum(draw.pool("x", count_include_pad=0), draw.conv("x"))), tmp_path / "given.onnx")
    result = fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")
    assert result.metadata is not None
    assert "nothing to fold; sums of branches that remain: t2 (" in result.metadata.certificate.reference


def test_fold_onnx_that_is_wrong_is_not_written(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fold.fold_branches

    def spoiled(model: onnx.ModelProto) -> tuple[onnx.ModelProto, FoldReport]:
        folded, report = honest(model)
        kernel = next(t for t in folded.graph.initializer if len(t.dims) == 4)
        # a hundred times the rounding of a weight
        kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(1 + 1e-5), kernel.name))
        return folded, report

    monkeypatch.setattr(fold, "fold_branches", spoiled)
    with pytest.raises(ParityError, match="against the folded file"):
        fold_onnx(given, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["given.onnx"]


def test_fold_onnx_never_replaces_its_input_nor_another_file(given: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would replace"):
        fold_onnx(given, given, options=FoldOptions(force=True))
    (tmp_path / "out.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="exists and differs"):
        fold_onnx(given, tmp_path / "out.onnx")
    assert fold_onnx(given, tmp_path / "out.onnx", options=FoldOptions(force=True)).output is not None
    again = fold_onnx(given, tmp_path / "out.onnx").output
    assert again is not None and again.status == "up to date"


def test_fold_onnx_dead_network_is_refused(tmp_path: Path) -> None:
    draw = Draw()
    onnx.save(draw.model(draw.node("Mul", ["x", draw.constant(0.0)])), tmp_path / "given.onnx")
    with pytest.raises(ParityError, match="all the same"):
        fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")


def test_fold_onnx_what_is_stated_and_does_not_fit_is_refused(given: Path, tmp_path: Path) -> None:
    half = (127.5, 127.5, 127.5)
    with pytest.raises(InputError, match="belong together"):
        FoldOptions(mean=half)
    with pytest.raises(InputError, match="says no size of RGB images"):
        fold_onnx(given, tmp_path / "out.onnx", options=FoldOptions(mean=half, std=half))
    with pytest.raises(InputError, match="2 labels for the outputs t8"):
        fold_onnx(given, tmp_path / "out.onnx", options=FoldOptions(labels=("a", "b")))


def test_fold_onnx_loads_no_torch(given: Path) -> None:
    code = (
        f"from repvgg_deploy.export import fold_onnx\nfold_onnx({str(given)!r}, {str(given) + '.out.onnx'!r})\n"
        "import sys; assert not {'torch', 'onnxsim'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
