"""The whole line without a GPU: checkpoint → ONNX → INT8 → TensorRT-RTX plan → passport → verdict."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from repvgg_deploy.build import build as build_module
from repvgg_deploy.build.build import build_plan
from repvgg_deploy.build.judge import check_plan
from repvgg_deploy.build.library import GpuSearch
from repvgg_deploy.build.options import BuildOptions
from repvgg_deploy.cli.trt import main
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.files.plan_place import Compatible, Incompatible
from repvgg_deploy.precision.int8 import FAST
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.specs.values import BuildConfig
from tests.precision.rtx import needs_rtx

pytestmark = needs_rtx


def test_trained_checkpoint_becomes_an_int8_plan_whose_passport_tells_its_story(
    tmp_path: Path,
    exported_sample: Path,
    sample_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_module, "look_for_gpu", lambda: GpuSearch(None, "no driver"))
    onnx = Path(shutil.copy(exported_sample, tmp_path))
    quantize = QuantizeOptions("int8", sample_dir / "calib.npz", images=16, int8=FAST)
    options = BuildOptions(BuildConfig("int8"), backend="rtx", quantize=quantize)
    result = build_plan(onnx, options=options)
    passport, exported = result.passport, read_metadata(onnx)

    assert [entry.stage for entry in passport.history] == ["export", "int8", "build"]
    assert passport.history[1].parent_sha256 == hashlib.sha256(onnx.read_bytes()).hexdigest()
    assert passport.history[2].parent_sha256 == passport.onnx_sha256
    assert passport.variant == exported.variant is not None
    assert (
        passport.certificate.passed
        and passport.certificate.checks[: len(exported.certificate.checks)] == exported.certificate.checks
    )
    assert "int8 against fp32" in passport.certificate.checks[-1].name
    assert (passport.spec.labels, passport.spec.preprocessing) == (exported.spec.labels, exported.spec.preprocessing)
    assert (passport.config.precision, passport.precision, passport.gpu_name) == ("int8", "not_inspected", None)

    version = passport.tensorrt_version
    assert isinstance(check_plan(result.output.target, {"gpu": "rtx 4090", "rtx": version}).verdict, Compatible)
    assert isinstance(check_plan(result.output.target, {"gpu": "t4", "rtx": version}).verdict, Incompatible)
    assert main(["check", str(result.output.target), "--target", f"gpu=a10,rtx={version}"]) == 0
    assert "verdict    it will run" in capsys.readouterr().out
