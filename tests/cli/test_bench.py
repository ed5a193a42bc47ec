"""`repvgg-trt bench`, as a user calls it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.cli.trt import main
from repvgg_deploy.measure.plots import draw_benchmark
from repvgg_deploy.measure.records import Benchmark, read_benchmark
from repvgg_deploy.specs import codec
from tests.measure.make_benchmark import make_benchmark, make_model, make_point
from tests.measure.test_bench import write_model
from tests.runtime.gpu_world import make_world, write_passport
from tests.runtime.make_model import tiny_variant

QUICK = ("--duration", "0.02", "--warm-up", "0.01")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "small.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table_json_file_and_picture_tell_of_the_same_run(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("repvgg_deploy.cli.bench._PEAK_SECONDS", 0.05)
    out, plot = tmp_path / "b.json", tmp_path / "b.png"
    status, text, err = run(
        capsys, model, "--batch", "4,1,1", *QUICK, "--cpu-threads", 1, "--out", out, "--plot", plot, "--layers"
    )
    assert status == 0, err
    result = read_benchmark(out)
    assert [point.batch for point in result.models[0].points] == [1, 4]
    table = text.partition("latency of one call, ms\n")[2].splitlines()
    assert " ".join(table[0].split()) == "way batch min median p90 p99 max img/s roofline"
    assert table[1] == "  small (fp32)"
    assert f"{result.models[0].points[1].images_per_second:,.1f}" in table[3]
    assert "roofline of" in text and "small.onnx, batch 4" in text  # --layers
    assert sum(line.split()[0].startswith("stage") for line in text.splitlines() if line.strip()) == 2 * 8
    assert "copies to a device, computing and launches are not told apart" in text
    assert (
        f"written  {out}" in text and "repvgg-trt advise" not in err
    )  # there is no published accuracy of this architecture
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 20_000


def test_json_holds_the_whole_run(model: Path, capsys) -> None:
    status, text, _ = run(capsys, model, "--batch", "2", *QUICK, "--no-peak", "--compare", "onnxruntime", "--json")
    result = codec.decode(Benchmark, json.loads(text)["benchmark"])
    assert status == 0
    assert [point.way for point in result.models[0].points] == ["engine", "onnxruntime"] and result.ceiling is None


def test_times_that_were_not_stable_are_marked_and_explained(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("repvgg_deploy.measure.bench.run_benchmark", lambda *_, **__: make_benchmark(make_model()))
    status, text, _ = run(capsys, model)
    lines = text.splitlines()
    assert status == 0 and "engine " in lines[6] and "engine!" in lines[7]  # batch 1 was stable, batch 8 was not
    explained = next(index for index, line in enumerate(lines) if line.startswith("! not stable"))
    assert lines[explained + 1] == "  a0-fp32 (fp32), engine, batch 8: calls spread by 20 %"
    monkeypatch.setattr(
        "repvgg_deploy.measure.bench.run_benchmark",
        lambda *_, **__: make_benchmark(make_model(points=(make_point(1, 1.0),))),
    )
    _, text, _ = run(capsys, model)
    assert "!" not in text and "p99 of fewer" not in text
    few = dataclasses.replace(make_point(1, 1.0), latency=dataclasses.replace(make_point(1, 1.0).latency, calls=99))
    monkeypatch.setattr(
        "repvgg_deploy.measure.bench.run_benchmark",
        lambda *_, **__: make_benchmark(make_model(points=(few, make_point(8, 2.0)))),
    )
    _, text, _ = run(capsys, model)
    assert "p99 of fewer than 100 calls is the largest of them, as in 1 of 2 rows" in text and "!" not in text


def test_tables_of_long_names_and_times_fit_80_columns(model: Path, monkeypatch, capsys) -> None:
    points = [make_point(batch, 1234.5) for batch in (1, 128)]
    points += [dataclasses.replace(point, way="onnxruntime") for point in points]
    result = make_benchmark(
        dataclasses.replace(make_model(points=tuple(points)), file="models/repvgg-b2g4-imagenette-int8.onnx")
    )
    monkeypatch.setattr("repvgg_deploy.measure.bench.run_benchmark", lambda *_, **__: result)
    _, text, _ = run(capsys, model)
    tables = [line for line in text.splitlines() if line.startswith("    ") or "repvgg-b2g4" in line]
    assert len(tables) >= 5 and max(map(len, tables)) <= 80


def test_next_command_reads_what_was_written(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    result = make_benchmark(make_model("B1"), device="Tesla T4")
    monkeypatch.setattr("repvgg_deploy.measure.bench.run_benchmark", lambda *_, **__: result)
    status, _, err = run(capsys, model, "--out", tmp_path / "b 1.json")
    command = shlex.split(err.strip().removeprefix("next: repvgg-trt "))
    assert status == 0 and command[0] == "advise" and main(command) == 0
    assert "measured, b 1.json" in capsys.readouterr().out


def test_no_advice_is_offered_on_an_image_size_that_nobody_published(
    model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    # What was offered ended with "there is nothing to choose from".
    result = make_benchmark(dataclasses.replace(make_model("B1"), image_size=(128, 128)), device="Tesla T4")
    monkeypatch.setattr("repvgg_deploy.measure.bench.run_benchmark", lambda *_, **__: result)
    assert run(capsys, model, "--out", tmp_path / "b.json")[::2] == (0, "")


def test_device_without_a_known_peak_has_no_roofline(model: Path, capsys) -> None:
    status, text, _ = run(capsys, model, "--batch", "1", *QUICK, "--no-peak")
    assert status == 0 and "roofline  none: the device's peak is not known" in text


def test_plan_shows_its_parts(tmp_path: Path, monkeypatch, capsys) -> None:
    world = make_world(tmp_path, monkeypatch)
    write_passport(world.plan, world.onnx, tensorrt_version="10.16.1.11", variant=tiny_variant(), precision="fp16")
    status, text, err = run(capsys, world.plan, "--batch", "1,8", *QUICK, "--gpu", "T4", "--threads", 2)
    assert status == 0, err
    parts = text.partition("parts of a call, ms")[2].splitlines()
    assert "host→device" in parts[1] and "enqueue (CPU)" in parts[1]
    assert [line.split()[0] for line in parts[3:5]] == ["1", "8"]
    assert "2 clients" in text and "Fake GPU 0" in text and "fp16 65,000 Gop/s, memory 320.0 GB/s" in text


def test_files_that_are_there_are_refused_before_the_work(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("repvgg_deploy.measure.bench.run_benchmark", lambda *_, **__: pytest.fail("it measured"))
    for option, name in (("--out", "b.json"), ("--plot", "b.png")):
        path = tmp_path / name
        path.write_text("mine", encoding="utf-8")
        status, _, err = run(capsys, model, option, path)
        assert status == 1 and "exists" in err and "--force" in err and path.read_text(encoding="utf-8") == "mine"
    status, _, err = run(capsys, model, "--out", tmp_path / "no" / "b.json")
    assert status == 1 and "does not exist" in err
    status, _, err = run(capsys, model, "--out", model, "--force")
    assert status == 1 and "would replace" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onnx", "--batch", "0"], "expected a whole number"),
        (["m.onnx", "--batch", "1,x"], "expected a whole number"),
        (["m.onnx", "--threads", "0"], "expected a whole number"),
        (["m.onnx", "--duration", "0"], "expected seconds"),
        (["m.onnx", "--duration", "nan"], "expected seconds"),
        (["m.onnx", "--compare", "tensorflow"], "expected some of onnxruntime, torch"),
        (["m.onnx", "--image-size", "0"], "expected an image size"),
        (["m.onnx", "./m.onnx"], "given twice"),
        (["m.onnx", "--out", "x.png", "--plot", "x.png"], "two files"),
        (["m.onnx", "--plot", "x.jpg"], "ends in .png"),
        (["m.onnx", "--gpu", "t4", "--device", "cpu"], "cannot hold with --device cpu"),
        ([], "MODEL"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_model_that_is_not_there_is_an_error_of_ours(tmp_path: Path, capsys) -> None:
    status, _, err = run(capsys, tmp_path / "none.onnx")
    assert status == 1 and "no such file" in err


def axes_of(result: Benchmark) -> list[Any]:
    return draw_benchmark(result).axes


def test_picture_has_every_point_and_every_layer() -> None:
    pytest.importorskip("matplotlib")
    models = make_model("A0", "fp32"), make_model("A0", "int8", (make_point(1, 0.5), make_point(32, 6.0)))
    latency, roofline = axes_of(make_benchmark(*models))
    lines = [line for line in latency.get_lines() if line.get_label().endswith("engine")]
    assert [line.get_xdata().tolist() for line in lines] == [[1.0, 2.0], [0.5, 6.0]]
    assert [text.get_text() for text in latency.texts] == ["batch 1", "batch 8", "batch 1", "batch 32"]
    dots = [len(group.get_offsets()) for group in roofline.collections]
    assert (
        dots.count(23) == 4 and dots.count(1) == 4
    )  # 22 layers and the classifier, and the whole, at the smallest and largest batch of each
    said = [text.get_text() for text in roofline.texts]
    assert "batch 32: 25 %" in said and "fp32: 8 Top/s" in said and "int8: 130 Top/s" in said
    assert "Fake GPU" in latency.get_title(loc="left") and "Fake GPU" in roofline.get_title(loc="left")


def test_picture_without_a_roofline_is_latency_alone() -> None:
    pytest.importorskip("matplotlib")
    assert len(axes_of(make_benchmark(ceiling=None))) == 1
    assert len(axes_of(make_benchmark(make_model("A0", points=(make_point(1, 1.0, floor_ms=None, share=None),))))) == 2
