"""`repvgg-trt advise`, as a user calls it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from repvgg_deploy.build.library import GpuSearch
from repvgg_deploy.cli.trt import main
from repvgg_deploy.measure.records import Device, write_benchmark
from repvgg_deploy.runtime.cuda import opening
from tests.fakes.cuda import FakeCuda
from tests.measure.make_benchmark import make_benchmark, make_model, make_point


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["advise", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line[:2] == "  " and line[2] in "ABDR"]


def test_rows_meet_what_was_asked_for_and_say_how_they_are_known(capsys) -> None:
    status, text, err = run(capsys, "--slo-ms", 2, "--min-top1", 77, "--gpu", "t4")
    assert status == 0
    found = rows(text)
    assert found and all(row[-1] == "estimated" for row in found)
    for row in found:
        top1, latency = float(row[-5]), float(row[-4])
        assert top1 >= 77 and latency <= 2
    assert "device     T4" in text and "next: repvgg-trt build" in err


def test_what_it_rests_on_is_said(capsys) -> None:
    _, text, _ = run(
        capsys, "--min-top1", 70, "--gpu", "a10", "--efficiency", 0.3, "--overhead-us", 7, "--int8-drop", 1.25
    )
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    assert "variants with groups (…g2, …g4) lose at batch 1" in text
    assert "4.73 ms" in text and "3.56" in text and "11.14" in text and "13.94" in text
    assert "30 % in fp32, 30 % in fp16, 30 % in int8" in text and "7 µs a group" in text and "1.25 points" in text
    assert "copies to and from the GPU are not counted" in text


def test_nothing_that_fits_is_exit_code_one_with_the_nearest(capsys) -> None:
    status, text, err = run(capsys, "--slo-ms", 1.6, "--min-top1", 83, "--gpu", "t4")
    assert status == 1
    assert "0 of" in text and "the most accurate within 1.6 ms" in text and "the fastest with at least 83 %" in text
    assert "nothing meets a batch in at most 1.6 ms and top-1 of at least 83 % on T4" in err
    assert "give --slo-ms" in err and "--min-top1" in err
    status, text, err = run(capsys, "--min-top1", 99, "--gpu", "t4")
    assert status == 1 and "for RepVGGplus-L2pse" in err


@pytest.mark.parametrize(
    ("wish", "headings"),
    [
        ({"--slo-ms": 0.01}, ["none takes 0.01 ms or less; the fastest"]),
        ({"--min-top1": 99}, ["none has 99 % or more; the most accurate"]),
        (
            {"--slo-ms": 0.3, "--min-top1": 80},
            ["none takes 0.3 ms or less; the fastest", "the fastest with at least 80 %"],
        ),
        (
            {"--slo-ms": 5, "--min-top1": 99},
            ["the most accurate within 5 ms", "none has 99 % or more; the most accurate"],
        ),
        (
            {"--slo-ms": 0.01, "--min-top1": 99},
            ["none takes 0.01 ms or less; the fastest", "none has 99 % or more; the most accurate"],
        ),
    ],
    ids=str,
)
def test_each_part_of_a_wish_that_nothing_meets_has_a_table_of_the_nearest(
    wish: dict[str, float], headings: list[str], capsys
) -> None:
    status, text, _ = run(capsys, "--gpu", "t4", *(word for pair in wish.items() for word in pair))
    assert status == 1
    lines = text.splitlines()
    places = [lines.index(heading) for heading in headings]
    assert places == sorted(places)
    for place in places:
        assert lines[place + 1].split()[:2] == ["variant", "px"]
        assert len(rows("\n".join(lines[place + 2 : place + 5]))) == 3
    assert len(rows(text)) == 3 * len(headings)


@pytest.mark.parametrize("wish", [(1.6, 83), (0.3, 80), (2.2, 79)])
def test_remedies_of_an_answer_that_failed_work(wish: tuple[float, float], capsys) -> None:
    slo, top1 = wish
    status, _, err = run(capsys, "--slo-ms", slo, "--min-top1", top1, "--gpu", "t4", "--precision", "fp16")
    assert status == 1
    slower, less = re.search(r"--slo-ms ([\d.]+), for (\S+)", err), re.search(r"--min-top1 ([\d.]+), for (\S+)", err)
    assert slower is not None
    status, text, _ = run(capsys, "--slo-ms", slower[1], "--min-top1", top1, "--gpu", "t4", "--precision", "fp16")
    assert status == 0 and slower[2] in {row[0] for row in rows(text)}
    if less is not None:
        status, text, _ = run(capsys, "--slo-ms", slo, "--min-top1", less[1], "--gpu", "t4", "--precision", "fp16")
        assert status == 0 and less[2] in {row[0] for row in rows(text)}


def test_measured_files_win_over_estimates_and_those_of_others_are_named(tmp_path: Path, capsys) -> None:
    write_benchmark(
        tmp_path / "t4.json", make_benchmark(make_model("B1", "fp16", (make_point(8, 0.01),)), device="Tesla T4")
    )
    write_benchmark(tmp_path / "a10.json", make_benchmark(make_model("B1"), device="NVIDIA A10"))
    status, text, _ = run(
        capsys, "--min-top1", 77, "--gpu", "t4", "--measured", tmp_path / "t4.json", tmp_path / "a10.json"
    )
    first = rows(text)[0]
    assert status == 0 and first[0] == "B1" and first[-2:] == ["measured,", "t4.json"]
    assert any(row[-1] == "estimated" for row in rows(text))
    assert "a10.json is left out: it was measured on NVIDIA A10, not on t4" in text


def test_measured_files_alone_say_which_gpu(tmp_path: Path, capsys) -> None:
    write_benchmark(tmp_path / "t4.json", make_benchmark(make_model("A0"), device="Tesla T4"))
    _, text, _ = run(capsys, "--min-top1", 70, "--measured", tmp_path / "t4.json")
    assert "device     T4" in text and "estimated" in text


def test_measured_files_of_a_cpu_are_not_mixed_with_estimates(tmp_path: Path, capsys) -> None:
    write_benchmark(tmp_path / "cpu.json", make_benchmark(make_model("A0"), device="AMD EPYC, 2 cores"))
    status, text, err = run(capsys, "--min-top1", 70, "--measured", tmp_path / "cpu.json")
    assert status == 0 and [row[-1] for row in rows(text)] == ["cpu.json"] * 2 and "estimated" not in text
    assert "repvgg-trt build" not in err


@pytest.mark.parametrize(
    ("backend", "precision", "kind", "said"),
    [
        ("ONNX Runtime 1.32.0, CPUExecutionProvider", "int8", "cpu", True),
        ("OpenVINO 2026.4, CPU", "int8", "cpu", False),
        ("ONNX Runtime 1.32.0, CPUExecutionProvider", "fp32", "cpu", False),  # it gains nothing there
        ("TensorRT 10.13", "int8", "gpu", False),
    ],
)
def test_int8_on_a_cpu_is_told_of_openvino(backend: str, precision, kind, said: bool, tmp_path: Path, capsys) -> None:
    points = tuple(dataclasses.replace(point, backend=backend) for point in make_model().points)
    found = make_benchmark(make_model("A0", precision, points))
    write_benchmark(tmp_path / "x.json", dataclasses.replace(found, device=Device(kind, "a processor")))
    _, text, _ = run(capsys, "--min-top1", 70, "--measured", tmp_path / "x.json")
    assert ("bench --backend openvino" in " ".join(text.split())) == said


def test_malformed_file_is_an_error_that_names_it(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.json").write_text('{"schema": 1}', encoding="utf-8")
    status, _, err = run(capsys, "--min-top1", 70, "--gpu", "t4", "--measured", tmp_path / "x.json")
    assert status == 1 and "x.json: not a benchmark of this version" in err


def test_gpu_that_is_here_is_taken_and_without_one_it_must_be_named(monkeypatch, capsys) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(opening, "open_cuda", lambda provider=None: cuda)
    cuda.info[0] = type(cuda.info[0])("NVIDIA L4", "8.9", "580.1", "13.0", 24 << 30)
    status, text, _ = run(capsys, "--min-top1", 70)
    assert status == 0 and "device     L4" in text
    monkeypatch.setattr("repvgg_deploy.build.library.look_for_gpu", lambda: GpuSearch(None, "no driver was found"))
    status, _, err = run(capsys, "--min-top1", 70)
    assert status == 1 and "no driver was found" in err and "--gpu t4" in err
    status, _, err = run(capsys, "--min-top1", 70, "--gpu", "voodoo2")
    assert status == 1 and "'voodoo2' are not known" in err and "T4" in err


def test_precision_whose_peak_is_not_known_is_named(capsys) -> None:
    status, text, _ = run(capsys, "--min-top1", 70, "--gpu", "v100")
    assert status == 0 and "int8 is not estimated: its peak on V100 is not known" in text
    assert {row[-7] for row in rows(text)} <= {"fp32", "fp16"}


def test_json_holds_the_answer_and_its_assumptions(capsys) -> None:
    _, text, _ = run(
        capsys, "--slo-ms", 5, "--min-top1", 77, "--gpu", "a10", "--precision", "fp16", "--batch", "1,8", "--json"
    )
    answer = json.loads(text)
    assert answer["device"] == "A10" and answer["assumptions"]["efficiency"]["fp16"] == 0.4
    assert {choice["precision"] for choice in answer["fitting"]} == {"fp16"} and {
        choice["batch"] for choice in answer["fitting"]
    } <= {1, 8}
    assert "lose at batch 1" in answer["grouped"]
    assert answer["nearest"] == {"fast_enough": [], "accurate_enough": [], "fastest": [], "most_accurate": []}
    answer = json.loads(run(capsys, "--slo-ms", 0.01, "--gpu", "a10", "--json")[1])
    assert answer["fitting"] == answer["nearest"]["fast_enough"] == []
    assert answer["nearest"]["fastest"][0]["variant"] == "A0" and len(answer["nearest"]["most_accurate"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "t4"], "give --slo-ms, --min-top1, or both"),
        (["--slo-ms", "0"], "milliseconds"),
        (["--min-top1", "101"], "percentage"),
        (["--min-top1", "70", "--precision", "fp8"], "expected some of fp32, fp16, int8"),
        (["--min-top1", "70", "--efficiency", "2"], "a share"),
        (["--min-top1", "70", "--top", "0"], "whole number"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["advise", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
