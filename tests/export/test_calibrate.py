"""`--synthetic-calibration`: written beside the ONNX, bound to it, all or nothing, and worth as much as real images."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import Engine, QuantizeOptions, export_module, quantize
from repvgg_deploy.cli.export import main
from repvgg_deploy.errors import ArtifactError, CalibrationError, InputError
from repvgg_deploy.export import calibrate as pipeline
from repvgg_deploy.export.calibrate import hash_module, write_calibration
from repvgg_deploy.export.export import ExportOptions, export_checkpoint
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.export.synthesize import ModuleMismatch, SynthesisOptions, SynthesisPlan
from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.images.calibration import find_calibration_file, load_calibration_file
from repvgg_deploy.images.decode import default_preprocessing, normalize
from repvgg_deploy.images.drawn import draw_images
from repvgg_deploy.model.checkpoint.load import load_checkpoint
from repvgg_deploy.precision.int8 import Int8Options, to_int8
from repvgg_deploy.precision.typed_model import write_typed
from tests.model.generated import random_model, stated
from tests.model.random_blocks import small_variant, train_on

GRAPH = GraphOptions(image_size=(32, 32))
QUICK = SynthesisOptions(images=6, steps=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its ONNX, made once and copied by each test."""
    folder = tmp_path_factory.mktemp("calibrate")
    torch.save(stated(random_model(small_variant())), folder / "model.pth")
    export_checkpoint(folder / "model.pth", folder / "m.onnx", options=ExportOptions(GRAPH))
    return folder


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(folder / "model.pth", tmp_path))


@pytest.fixture
def exported(folder: Path, checkpoint: Path) -> Path:
    return Path(shutil.copy(folder / "m.onnx", checkpoint.parent))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_export_with_calibration_writes_images_bound_to_the_onnx(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = export_checkpoint(
        checkpoint,
        tmp_path / "m.onnx",
        options=ExportOptions(GRAPH, calibration=QUICK),
        calibration_progress=lambda done, total: seen.append((done, total)),
    )
    assert files(tmp_path) == ["m.calib.npz", "m.onnx", "model.pth"]
    assert result.calibration is not None and result.calibration.output.status == "written"
    images, provenance = load_calibration_file(tmp_path / "m.calib.npz", sha256_file(tmp_path / "m.onnx"))
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert provenance == result.calibration.provenance
    assert provenance.checkpoint_sha256 == load_checkpoint(checkpoint).sha256
    assert (provenance.images, provenance.steps, provenance.seed) == (6, 5, 0)
    assert provenance.loss > 0 and "torch" in provenance.versions
    assert seen[-1] == (5, 5)


def test_calibration_again_is_up_to_date_without_work_and_other_needs_force(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = exported.with_name("model.pth"), exported.with_name("m.calib.npz")
    assert write_calibration(checkpoint, exported, options=QUICK).output.status == "written"
    stamp, content = out.stat().st_mtime_ns, out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "synthesize_images", None)
        assert write_calibration(checkpoint, exported, options=QUICK).output.status == "up to date"
    assert out.stat().st_mtime_ns == stamp
    other = SynthesisOptions(images=6, steps=5, seed=1)
    with pytest.raises(ArtifactError, match="exists and differs") as caught:
        write_calibration(checkpoint, exported, options=other)
    assert "--force" in caught.value.remedy
    assert write_calibration(checkpoint, exported, options=other, force=True).output.status == "written"
    assert out.read_bytes() != content
    out.write_bytes(b"something else")
    with pytest.raises(ArtifactError, match="exists and differs"):
        write_calibration(checkpoint, exported, options=QUICK)
    assert write_calibration(checkpoint, exported, options=QUICK, force=True).output.status == "written"
    assert out.read_bytes() == content
    assert files(exported.parent) == ["m.calib.npz", "m.onnx", "model.pth"]


@pytest.mark.parametrize("stop_at", [0, 7, 15])
def test_calibration_interrupted_leaves_nothing_and_begins_anew(
    exported: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setattr(pipeline, "plan_synthesis", lambda *_, **__: SynthesisPlan((2, 2, 2), 5))
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if done >= stop_at:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_calibration(exported.with_name("model.pth"), exported, progress=interrupt)
        assert files(exported.parent) == ["m.onnx", "model.pth"]
    assert seen.count(0) == 2 and seen[-1] == stop_at


def test_calibration_of_deploy_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.save(stated(random_model(small_variant(), "deploy")), tmp_path / "deploy.pth")
    with pytest.raises(CalibrationError, match="deploy form") as caught:
        export_checkpoint(tmp_path / "deploy.pth", tmp_path / "m.onnx", options=ExportOptions(GRAPH, calibration=QUICK))
    assert "training-form checkpoint" in caught.value.remedy
    assert files(tmp_path) == ["deploy.pth"]
    export_checkpoint(tmp_path / "deploy.pth", tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    with pytest.raises(CalibrationError, match="deploy form"):
        write_calibration(tmp_path / "deploy.pth", tmp_path / "m.onnx")
    assert find_calibration_file(tmp_path / "m.onnx") is None


def test_calibration_for_the_onnx_of_another_checkpoint_is_refused(exported: Path) -> None:
    other = exported.with_name("other.pth")
    torch.save(stated(random_model(small_variant(), seed=1)), other)
    with pytest.raises(InputError, match="exported from a checkpoint with sha256"):
        write_calibration(other, exported, options=QUICK)


def test_calibration_that_does_not_fill_the_fixed_batch_is_refused_before_the_export(
    checkpoint: Path, tmp_path: Path
) -> None:
    options = ExportOptions(GraphOptions(image_size=(32, 32), batch=4), calibration=QUICK)
    with pytest.raises(InputError, match="fixed batch of 4"):
        export_checkpoint(checkpoint, tmp_path / "m.onnx", options=options)
    assert files(tmp_path) == ["model.pth"]


def test_calibration_that_would_replace_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    odd = checkpoint.rename(tmp_path / "m.calib.npz")
    with pytest.raises(InputError, match="would replace"):
        export_checkpoint(odd, tmp_path / "m.onnx", options=ExportOptions(GRAPH, calibration=QUICK))


def test_program_writes_says_and_repeats(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--ckpt",
        str(checkpoint),
        "--image-size",
        "32",
        "--synthetic-calibration",
        "4",
        "--calibration-steps",
        "3",
        "--calibration-seed",
        "7",
    ]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "4 images, 3 steps a batch, seed 7" in printed.out
    assert printed.err.endswith(f"next: repvgg-trt quantize {checkpoint.with_name('model.onnx')} --int8\n")
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["status"] == data["calibration"]["status"] == "up to date"
    assert data["calibration"]["out"].endswith("model.calib.npz") and data["calibration"]["provenance"]["seed"] == 7


@pytest.mark.parametrize(
    "wrong",
    [
        ["--synthetic-calibration", "0"],
        ["--synthetic-calibration", "-3"],
        ["--synthetic-calibration", "x"],
        ["--calibration-seed", "1"],
        ["--calibration-steps", "9"],
    ],
)
def test_program_with_an_option_that_cannot_hold_is_a_usage_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--ckpt", str(checkpoint), *wrong])
    assert caught.value.code == 2
    capsys.readouterr()


def test_sample_int8_from_synthetic_images_agrees_as_well_as_from_real_ones(
    exported_sample: Path, sample_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(exported_sample, tmp_path))
    write_calibration(sample_dir / "repvgg-sample.pth", path, options=SynthesisOptions(images=64))
    with Engine(path) as engine:
        assert engine.spec.preprocessing is not None
        preprocessing = engine.spec.preprocessing
        evaluation = normalize(np.load(sample_dir / "eval.npz")["images"], preprocessing)
        truth = engine.infer(evaluation)
    found = {}
    real = np.load(sample_dir / "calib.npz")["images"][::4]
    for name, images in (("real", real), ("synthetic", load_calibration_file(path.with_name("sample.calib.npz"))[0])):
        batch = normalize(images, preprocessing)
        # Without the search for an exponent, which takes half of the time: the images are compared, not the methods.
        typed, _ = to_int8(path, [batch[start : start + 32] for start in (0, 32)], Int8Options(search=None))
        write_typed(tmp_path / f"{name}.onnx", typed)
        with Engine(tmp_path / f"{name}.onnx") as engine:
            logits = engine.infer(evaluation)
        error = 10 * np.log10(np.square(truth).sum() / np.square(truth - logits).sum())
        found[name] = (error, (truth.argmax(1) == logits.argmax(1)).mean())
    # 37.5 and 36.3 dB when this was written. Half a decibel or so is the choice of images, real or not; 2 dB are no
    # chance.
    assert found["synthetic"][0] > found["real"][0] - 2, found
    assert found["synthetic"][0] > 33 and found["synthetic"][1] >= 0.995, found


class Pyramid(nn.Module):
    """Two scales, joined, with SiLU, and a head with a BatchNorm of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.deeper = nn.Sequential(nn.Conv2d(16, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.head = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        coarse = nn.functional.interpolate(self.deeper(fine), scale_factor=2.0)
        return {"boxes": self.head(torch.cat((fine, coarse), 1))}


def train_pyramid(images: np.ndarray) -> Pyramid:
    """Its running statistics are those of these images."""
    torch.manual_seed(0)
    return train_on(Pyramid(), torch.from_numpy(images), draw_affine=True)


SEEN = default_preprocessing(32, 32)


@pytest.fixture(scope="module")
def pyramid() -> Pyramid:
    images = draw_images((32, 32), 32, np.random.default_rng(0))
    return train_pyramid(normalize(images, SEEN))


def test_module_with_calibration_is_quantized_without_an_image(pyramid: Pyramid, tmp_path: Path) -> None:
    onnx = tmp_path / "pyramid.onnx"
    options = ModuleOptions(preprocessing=SEEN, synthetic_calibration=SynthesisOptions(images=16, steps=12, seed=3))
    result = export_module(pyramid, torch.zeros(1, 3, 32, 32), onnx, options=options)
    assert files(tmp_path) == ["pyramid.calib.npz", "pyramid.onnx"]
    images, provenance = load_calibration_file(tmp_path / "pyramid.calib.npz", sha256_file(onnx))
    assert result.calibration is not None and result.calibration.provenance == provenance
    assert (images.shape, images.dtype, provenance.seed, provenance.steps) == ((16, 32, 32, 3), np.uint8, 3, 12)
    with ModuleMismatch(copy.deepcopy(pyramid)) as mismatch, torch.no_grad():
        left = float(mismatch(torch.from_numpy(normalize(images, SEEN))))
        noise = float(mismatch(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert left == pytest.approx(provenance.loss, rel=1e-3)
    assert left < noise / 5
    # Again, it is up to date; from another training form, the file is another.
    again = export_module(pyramid, torch.zeros(1, 3, 32, 32), onnx, options=options)
    assert again.calibration is not None and again.calibration.output.status == "up to date"
    made = quantize(onnx, None, QuantizeOptions("int8", images=8))
    assert made.images is not None and made.images.synthetic and made.verification is not None
    assert made.verification.sqnr_db > 24
    assert made.metadata.history[-1].options["calibration"] == "synthetic"


def test_module_in_a_conversion_is_calibrated_with_its_reference(pyramid: Pyramid, tmp_path: Path) -> None:
    onnx, folded = tmp_path / "p.onnx", copy.deepcopy(pyramid)
    for part in (folded.stem, folded.deeper, folded.head):
        conv = part[0]
        assert isinstance(conv, nn.Conv2d)
        part[0], part[1] = nn.utils.fuse_conv_bn_eval(conv, part[1]), nn.Identity()
    options = ModuleOptions(preprocessing=SEEN, synthetic_calibration=SynthesisOptions(images=4, steps=1))
    with pytest.raises(CalibrationError, match="Pyramid has no BatchNorm"):
        export_module(folded, torch.zeros(1, 3, 32, 32), onnx, options=options)
    assert files(tmp_path) == []
    result = export_module(
        folded, torch.zeros(1, 3, 32, 32), onnx, options=dataclasses.replace(options, reference=pyramid)
    )
    assert result.calibration is not None
    assert result.calibration.provenance.checkpoint_sha256 == hash_module(pyramid) != hash_module(folded)
    assert all(not parameter.grad_fn and parameter.requires_grad for parameter in pyramid.parameters())


def test_module_whose_images_are_not_known_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="how an image becomes the module's input is not known"):
        ModuleOptions(synthetic_calibration=QUICK)
    options = ModuleOptions(preprocessing=SEEN, synthetic_calibration=QUICK)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(CalibrationError, match="an input of 4 channels"):
        export_module(model, torch.zeros(1, 4, 32, 32), tmp_path / "m.onnx", options=options)
    assert files(tmp_path) == []
