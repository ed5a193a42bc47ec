"""The user's own measure: for the gate, for the choice of kept layers, and what is said of one that fails."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from repvgg_deploy.errors import CalibrationError, InputError, ParityError
from repvgg_deploy.precision.gate import blame_int8, refuse_outputs
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options, quantize_graph
from repvgg_deploy.precision.metrics import Judge
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.precision.quantization import QuantizeResult, quantize
from repvgg_deploy.precision.round import RoundOptions
from repvgg_deploy.precision.score import Run, demand_score, load_metric
from tests.precision.make_chain import KINDS, make_batches, make_model, save
from tests.precision.make_graph import GRAPHS, draw

COARSE = dataclasses.replace(MAX_CALIBRATION, target="trt10")


class Same:
    """Percentage of positions whose largest channel is FP32's, at every output."""

    def __init__(self) -> None:
        self.batch = np.concatenate(make_batches(KINDS["features"], 64, seed=5))
        self.truth: dict[str, np.ndarray] | None = None

    def __call__(self, run: Run) -> float:
        sys.stdout.write("measured")  # no result of ours
        found = run(self.batch)
        self.truth = self.truth or found
        same = [found[name].argmax(axis=1) == self.truth[name].argmax(axis=1) for name in self.truth]
        return 100 * float(np.mean([np.mean(each) for each in same]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "m.onnx", make_model(KINDS["features"]))


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "i.npz", images=images)
    return tmp_path / "i.npz"


def make(model: Path, pixels: Path | str, metric: Any, steps: Int8Options = COARSE, **options: Any) -> QuantizeResult:
    return quantize(model, None, QuantizeOptions("int8", pixels, int8=steps, metric=metric, **options))


def test_gate_is_the_score_and_a_refusal_says_what_fell_and_why(
    model: Path, pixels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ParityError) as caught:
        make(model, pixels, Same(), min_metric=99.9)
    assert re.search(
        r"INT8 is too far from FP32: tests\.precision\.test_score:Same falls from 100 to 9\d\.\d+, at least 99\.9 "
        r"expected; the layers that cost .*stage\d\.conv \(",
        caught.value.message,
    )
    assert "--max-drop" in caught.value.remedy and "--min-metric" in caught.value.remedy
    assert not model.with_name("m-int8.onnx").exists()
    result = make(model, pixels, Same(), min_metric=50, min_sqnr_db=200)  # what the outputs' error is does not count
    assert result.score is not None and result.score.passed and 50 < result.score.found < 99.9
    assert result.score.fp32 == 100 and result.ungated == ""
    check = result.metadata.certificate.checks[-1]
    assert "test_score:Same: what the score fell by" in check.name
    assert (check.error, check.tolerance) == (100 - result.score.found, 50)
    printed = capsys.readouterr()
    assert "measured" in printed.err and printed.out == ""


def test_layers_are_kept_until_the_score_has_fallen_no_further_than_allowed(model: Path, pixels: Path) -> None:
    metric = Same()
    plain = make(model, pixels, metric, min_metric=0)
    assert plain.score is not None
    allowed = (100 - plain.score.found) / 4
    result = quantize(
        model,
        model.with_name("kept.onnx"),
        QuantizeOptions("int8", pixels, int8=dataclasses.replace(COARSE, max_drop=allowed), metric=metric),
    )
    report, score = result.int8, result.score
    assert report is not None and score is not None
    assert 0 < len(report.kept) < 5 and report.kept == tuple(cost.name for cost in report.costs[: len(report.kept)])
    assert score.found >= score.least == pytest.approx(100 - allowed)
    again = demand_score(metric, read_network(onnx.load(model)).model, least=0, most_lost=None, share=1.0)
    assert again.judge(onnx.load(result.output.target)).found == score.found  # of the file itself


def test_without_images_and_in_fp16_the_score_is_the_gate_too(model: Path) -> None:
    half = quantize(model, model.with_name("h.onnx"), QuantizeOptions("fp16", metric=Same()))
    assert half.score is not None and half.score.least == 97 and half.ungated == ""
    assert [check.name.split(": ")[-1] for check in half.metadata.certificate.checks[1:]] == [
        "rms error of the outputs",
        "what the score fell by",
    ]
    with pytest.raises(ParityError, match=r"FP16 is too far from FP32: .*nearly falls from 1 to 0, at least 0\.97"):
        called: list[float] = [1.0, 0.0]

        def nearly(run: Run) -> float:
            return called.pop(0)

        quantize(model, model.with_name("n.onnx"), QuantizeOptions("fp16", metric=nearly))
    assert not model.with_name("n.onnx").exists()


def test_score_judges_ranges_of_batchnorm_statistics_where_there_are_no_images(
    exported_sample: Path, tmp_path: Path
) -> None:
    batch = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)

    def size(run: Run) -> float:
        return float(np.abs(run(batch)).mean())

    options = QuantizeOptions("int8", "statistics", int8=FAST, metric=size, min_metric=0.1)
    result = quantize(exported_sample, tmp_path / "s.onnx", options)
    assert result.verification is None and result.score is not None and result.ungated == ""
    with pytest.raises(ParityError, match="INT8 is too far") as caught:
        falling = iter([1.0, 0.5])
        quantize(
            exported_sample,
            tmp_path / "t.onnx",
            dataclasses.replace(options, metric=lambda run: next(falling), min_metric=None),
        )
    assert "--keep" not in caught.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobile", "neck"])
def test_layers_are_kept_until_every_output_reaches_its_decibels(name: str) -> None:
    model, batches = GRAPHS[name](), draw(16)
    loose, before = quantize_graph(model, batches, dataclasses.replace(MAX_CALIBRATION, least_sqnr_db=5.0))
    assert before.kept == ()
    least = Judge(read_network(model), batches).compare(loose).sqnr_db + 4
    graph, report = quantize_graph(model, batches, dataclasses.replace(MAX_CALIBRATION, least_sqnr_db=least))
    found = Judge(read_network(model), batches).compare(graph)
    assert found.sqnr_db >= least
    assert 0 < len(report.kept) < len(report.layers)
    assert report.kept == tuple(cost.name for cost in report.costs[: len(report.kept)])


@pytest.mark.parametrize(
    ("good", "anew", "kept"), [({2, 3, 4, 5, 6}, True, 2), ({2, 3, 4, 5, 6}, False, 3), ({1, 5, 6}, True, 5)]
)
def test_graph_with_one_layer_fewer_was_made_and_not_accepted(good: set[int], anew: bool, kept: int) -> None:
    """`good` are the numbers of kept layers that do; without `anew` the least of them only before rounding anew."""
    asked: list[tuple[int, bool]] = []
    graphs: dict[int, bytes] = {}

    def accepts(graph: onnx.ModelProto) -> bool:
        count = 6 - sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)  # one a layer, of six
        data = graph.SerializeToString(deterministic=True)
        is_first = graphs.setdefault(count, data) == data
        asked.append((count, count in good and (anew or is_first or count > min(good))))
        return asked[-1][1]

    model, batches = make_model(KINDS["plain"]), make_batches(KINDS["plain"], 16)
    steps = dataclasses.replace(COARSE, rounding=RoundOptions("nearest", bias_correction=True), accepts=accepts)
    graph, report = quantize_graph(model, batches, steps)
    assert asked[-1] == (kept, True) and len(report.kept) == kept
    assert [holds for count, holds in asked if count == kept - 1][-1] is False
    assert report.kept == tuple(cost.name for cost in report.costs[:kept])
    assert accepts(graph)  # that very graph


def test_backbone_keeps_layers_until_its_worst_output_reaches_its_decibels(model: Path, pixels: Path) -> None:
    """What the typed file reaches on the held-out images is what was asked for."""
    steps = dataclasses.replace(COARSE, least_sqnr_db=25.0)
    result = quantize(model, None, QuantizeOptions("int8", pixels, int8=steps, min_sqnr_db=25.0))
    assert result.int8 is not None and 0 < len(result.int8.kept) < 3
    assert result.verification is not None and result.verification.sqnr_db >= 25.0
    assert result.verification.sqnr_db == min(output.sqnr_db for output in result.verification.outputs)


def test_decibels_that_fp16_does_not_reach_are_refused(model: Path) -> None:
    steps, batches = dataclasses.replace(COARSE, least_sqnr_db=150.0), make_batches(KINDS["features"], 16)
    with pytest.raises(CalibrationError, match=r"not even with every layer .* does every output reach 150 dB"):
        quantize_graph(onnx.load(model), batches, steps)
    for bounds in ({"least_sqnr_db": -1.0}, {"least_sqnr_db": 20.0, "max_drop": 0.3}):
        with pytest.raises(CalibrationError):
            Int8Options(**bounds)


def test_layers_of_a_graph_are_kept_by_name() -> None:
    model = GRAPHS["neck"]()
    names = [layer.name for layer in read_network(model).layers][3:6]
    graph, report = quantize_graph(model, draw(16), dataclasses.replace(COARSE, keep=tuple(names)))
    assert report.kept == tuple(names) and report.int8_share < 1
    made_by = {output: node.op_type for node in graph.graph.node for output in node.output}
    kept = [node for node in graph.graph.node if node.name in names]
    assert len(kept) == 3 and not any(made_by.get(name) == "DequantizeLinear" for n in kept for name in n.input)


def test_refusal_names_of_each_low_output_the_layers_that_cost_it() -> None:
    network, batches = read_network(GRAPHS["neck"]()), draw(16)
    graph, report = quantize_graph(network, batches, MAX_CALIBRATION)
    heads = [layer for layer in network.layers if layer.out_channels == 6]
    scales = report.scales.scales
    spoilt = dataclasses.replace(report.scales, scales=scales | {heads[1].input: scales[heads[1].input] * 40})
    blamed = blame_int8(network, spoilt, (), batches)
    reached = next(iter(blamed[0].outputs))
    assert (blamed[0].name, len(blamed[0].outputs)) == (heads[1].name, 1)
    found = Judge(network, batches).compare(graph)
    low = dataclasses.replace(found, outputs=tuple(one for one in found.outputs if one.name == reached))
    error = refuse_outputs(low, 90.0, blamed)
    (output,) = low.outputs
    assert output.relative == pytest.approx(10 ** (-output.sqnr_db / 20))
    said = f"{reached} {output.sqnr_db:.1f} dB (an error of {output.relative:.1%}), most of it by {heads[1].name} ("
    assert said in error.message
    assert f"--keep {heads[1].name}, or --max-drop 90dB" in error.remedy


def _explode(run: Run) -> float:
    raise KeyError("boxes")


FAULTY: dict[str, tuple[Callable[[Run], Any], str]] = {
    "error": (_explode, r"test_score:_explode failed on the FP32 graph: KeyError: 'boxes'"),
    "exit": (lambda run: sys.exit("no data"), r"failed on the FP32 graph: SystemExit: no data"),
    "none": (lambda run: None, r"gave the FP32 graph None, expected one finite number"),
    "text": (lambda run: "0.5", r"gave the FP32 graph '0.5'"),
    "truth": (lambda run: True, r"gave the FP32 graph True"),
    "two": (lambda run: (0.5, 0.7), r"gave the FP32 graph \(0.5, 0.7\)"),
    "nan": (lambda run: float("nan"), r"gave the FP32 graph nan"),
    "array": (lambda run: np.zeros(1000), r"gave the FP32 graph ndarray"),
    "batch": (lambda run: run(np.zeros((1, 3, 16, 16))), r"does not take a batch input: float64"),
    "nothing": (
        lambda run: run(np.zeros((0, 3, 16, 16), np.float32)),
        r"expected images, found shape \(0, 3, 16, 16\)",
    ),
    "negative": (lambda run: -3, r"gives the FP32 graph -3, so that a share of it is no bound"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_measure_that_fails_is_named_before_the_work(fault: str, model: Path, pixels: Path) -> None:
    metric, message = FAULTY[fault]
    stages: list[str] = []
    with pytest.raises(InputError, match=message) as caught:
        quantize(
            model,
            None,
            QuantizeOptions("int8", pixels, metric=metric),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert caught.value.remedy and set(stages) == {"score FP32"}


def test_bounds_that_fp32_itself_misses_are_refused_and_any_number_is_one(model: Path) -> None:
    reference = read_network(onnx.load(model)).model
    with pytest.raises(InputError, match=r"gives the FP32 graph itself 0\.5, and at least 0.8 is demanded"):
        demand_score(lambda run: 0.5, reference, least=0.8, most_lost=None, share=0.97)
    losses = demand_score(lambda run: np.float32(-3), reference, least=None, most_lost=0.5, share=0.97)
    assert (losses.fp32, losses.least) == (-3, -3.5)
    both = demand_score(lambda run: np.array(8).item(), reference, least=7.0, most_lost=2.0, share=0.97)
    assert both.least == 7
    with pytest.raises(InputError, match="needs a measure that gives one"):
        QuantizeOptions("int8", min_metric=0.5)


@pytest.mark.parametrize("kind", ["plain", "uint8_top5"])
def test_run_takes_any_number_of_images_of_a_fixed_batch(kind: str) -> None:
    model, seen = make_model(KINDS[kind]), []
    (batch,) = make_batches(KINDS[kind], 8)[:1]
    demand_score(lambda run: seen.append(run(batch[:7])) or 1, model, least=0, most_lost=None, share=1)  # type: ignore[func-returns-value]
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    demand_score(lambda run: seen.append(run(batch[:7])) or 1, fixed, least=0, most_lost=None, share=1)  # type: ignore[func-returns-value]
    one, other = seen
    if kind == "plain":
        assert one.shape == (7, 10)
        one, other = {"logits": one}, {"logits": other}
    assert list(one) == list(other) == [value.name for value in model.graph.output]
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in one)


MODULES = {
    "measure.py": "import beside\ndef score(run): return 1.0\nclass Deep: score = staticmethod(score)\nnumber = 3\n",
    "beside.py": "",
    "broken.py": "1 / 0\n",
    "needing.py": "import no_such_package_at_all\n",
}
UNLOADABLE = {
    "score": "expected module:function",
    "measure.py:score": "expected module:function",
    "tools/measure:score": "expected module:function",
    "measure:": "expected module:function",
    "nowhere_to_be_found:score": "there is no module nowhere_to_be_found",
    "broken:score": "importing it failed: ZeroDivisionError: division by zero",
    "needing:score": "importing it failed: ModuleNotFoundError: No module named 'no_such_package_at_all'",
    "measure:mean": r"measure\.py has no function mean",
    "measure:number": r"measure\.py has no function number",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def test_function_of_the_working_directory_is_found_and_hides_nothing(modules: Path) -> None:
    first = sys.path[0]
    assert load_metric("measure:score")(lambda batch: batch) == 1.0
    assert load_metric("measure:Deep.score")(lambda batch: batch) == 1.0
    assert sys.path[0] == first and sys.path[-1] == os.getcwd()
    for name in ("measure", "beside"):
        del sys.modules[name]


@pytest.mark.parametrize("text", UNLOADABLE)
def test_function_that_cannot_be_found_is_refused_with_the_reason(text: str, modules: Path) -> None:
    with pytest.raises(InputError, match=UNLOADABLE[text]) as caught:
        load_metric(text)
    assert caught.value.remedy
