"""`repvgg-trt inspect`, as a user calls it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from repvgg_deploy.cli import inspect
from repvgg_deploy.cli.terminal import fold_lines
from repvgg_deploy.cli.trt import main
from repvgg_deploy.specs.variants import PUBLISHED, count_macs, count_parameters, layer_rows
from tests.runtime.make_model import ModelOptions, make_onnx, tiny_variant
from tests.serving.make_repository import write_plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "m.onnx")


def test_inspect_prints_specification_certificate_and_layers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    printed = capsys.readouterr()
    for part in (
        "images: float32 (batch, 3, 16, 16) NCHW",
        "logits: float32 (batch, 7) NC",
        "centre crop 16×16",
        "mean 123.675, 116.28, 103.53",
        "7: class 0, class 1, class 2, …",
        "tiny.pth, official family, training form",
        "stated by the user: strides 2,2,2,2,2",
        "passed, 1 of 1 checks",
        "ONNX in ONNX Runtime      1      1.0e-07  1.0e-05",
        "Conv 1, Flatten 1, Gemm 1, GlobalAveragePool 1, Relu 1",
        "opset 17",
    ):
        assert part in printed.out
    parameters, macs = count_parameters(tiny_variant(), "deploy"), count_macs(tiny_variant(), 16, 16)
    assert re.search(rf"^  total +{parameters:,} ", printed.out, re.MULTILINE)
    assert f"; multiply-accumulates of an image: {macs:,}\n" in printed.out
    assert printed.err == f"next: repvgg-trt infer {model} IMAGE…\n"


def test_inspect_in_full_lists_every_check_and_layer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    short = capsys.readouterr().out
    assert main(["inspect", str(model), "--full"]) == 0
    full = capsys.readouterr().out
    assert re.search(r"^  1\.00e-07  1\.00e-05 +\d\S*  training form against ONNX Runtime$", full, re.M)
    assert len(short.splitlines()) <= 40
    names = [row.name for row in layer_rows(tiny_variant(), (16, 16))]
    assert all(re.search(rf"^  {re.escape(name)} ", full, re.M) for name in names)
    total = re.compile(r"^  total.*$", re.M)
    assert total.search(short)[0].split() == total.search(full)[0].split()


def test_inspect_of_a_plan_reads_its_passport(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_plan(tmp_path / "a.plan")
    assert main(["inspect", str(plan)]) == 0
    printed = capsys.readouterr()
    assert "as the passport beside it says" in printed.out
    assert "runs on" in printed.out
    assert printed.err == f"next: repvgg-trt check {plan}\n"
    plan.with_name(plan.name + ".json").unlink()
    assert main(["inspect", str(plan)]) == 1
    assert "without a passport" in capsys.readouterr().err


def test_inspect_with_json_prints_one_object(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"] == model.stat().st_size
    assert found["certificate"]["passed"] is True
    assert found["certificate"]["checks"][0]["tolerance"] == 1e-5
    assert found["parameters"] == count_parameters(tiny_variant(), "deploy")
    assert found["macs"] == count_macs(tiny_variant(), 16, 16)
    assert found["precision"] == {"fp32": 1.0}
    assert found["stored_numbers"] == 8 * 3 * 9 + 8 + 7 * 8 + 7
    assert len(found["layers"]) == 7
    assert found["spec"]["input"]["shape"] == ["batch", 3, 16, 16]


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(kind="module"),
        ModelOptions(kind="features", labels=False),
        ModelOptions(size=("height", "width"), preprocessing=False),
    ],
    ids=str,
)
def test_inspect_of_model_with_less_to_say_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: ModelOptions
) -> None:
    assert main(["inspect", str(make_onnx(tmp_path / "m.onnx", options))]) == 0
    printed = capsys.readouterr()
    assert "images: float32" in printed.out
    assert ("8×3×3×3" in printed.out) == (options.kind == "module")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert "certificate" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_of_published_variant_fit_80_columns(name: str) -> None:
    for size in ((224, 224), (640, 640)):
        rows = tuple(replace(row, precision="fp16") for row in layer_rows(PUBLISHED[name], size))
        rows = (replace(rows[0], precision="int8"), *rows[1:-1], replace(rows[-1], precision="int8"))
        for what, some in (("stages", inspect._sum_stages(rows)), ("layers", rows)):
            macs = sum(row.macs or 0 for row in rows)
            assert max(map(len, "\n".join(inspect._layer_lines(some, size, macs, what=what)).splitlines())) <= 80


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_inspect_fits_80_columns(exported_sample: Path, capsys: pytest.CaptureFixture[str], full: list[str]) -> None:
    assert main(["inspect", str(exported_sample), *full]) == 0
    lines = fold_lines(capsys.readouterr().out, 80).splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("number", "text"), [(1_600, "1,600"), (20_645_440, "20.6 M"), (9_996_000, "10.0 M"), (1_363_000_000, "1.36 G")]
)
def test_large_counts_have_three_digits(number: int, text: str) -> None:
    assert inspect._count(number) == text


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_rows_of_published_variant_sum_to_its_counts(name: str) -> None:
    spec = PUBLISHED[name]
    rows = layer_rows(spec, (224, 192))
    assert sum(row.parameters for row in rows) == count_parameters(spec, "deploy")
    assert sum(row.macs or 0 for row in rows) == count_macs(spec, 224, 192)
    assert [row.output_size for row in rows if row.name == "stage4.0"] == [(7, 6)]
