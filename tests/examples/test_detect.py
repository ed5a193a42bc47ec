"""The example that is copied for other detectors: its decoding, its mAP, and the way from the module to the Engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from detector import STRIDES
from PIL import Image
from scenes import LABELS, Scene, draw_scene, load_digits

from examples import detect
from examples.detect import Detections, decode, export_network, load_network, measure_map, run_scenes, suppress
from repvgg_deploy import Engine, QuantizeOptions, quantize
from repvgg_deploy.errors import ParityError
from repvgg_deploy.images.decode import fit_image, normalize
from repvgg_deploy.precision.int8 import MAX_CALIBRATION


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    export_network(load_network("silu"), path)
    return path


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    digits = load_digits("eval")
    return [draw_scene(digits, "eval", number) for number in range(24)]


def empty_maps() -> dict[str, np.ndarray]:
    maps = {}
    for stride in STRIDES:
        side = 128 // stride
        maps[f"boxes_{stride}"] = np.zeros((2, 4, side, side), np.float32)
        maps[f"scores_{stride}"] = np.full((2, len(LABELS), side, side), -20, np.float32)
    return maps


def test_decode_finds_the_box_that_a_position_states() -> None:
    maps = empty_maps()
    maps["scores_16"][1, 7, 3, 5] = 2.0  # row 3, column 5: the centre is (88, 56)
    maps["boxes_16"][1, :, 3, 5] = np.log([1.5, 2.0, 0.5, 0.25])
    maps["scores_8"][1, 2, 0, 0] = 1.0
    none, (found) = decode(maps, 0.5)
    assert len(none.boxes) == 0 and none.boxes.shape == (0, 4)
    np.testing.assert_allclose(found.boxes, [[64, 24, 96, 60], [-4, -4, 12, 12]], rtol=1e-5)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-2.0, -1.0])), rtol=1e-6)
    assert found.classes.tolist() == [7, 2]


def test_suppress_keeps_the_best_of_each_class_where_boxes_overlap() -> None:
    box = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [30, 0, 40, 10]], np.float32)
    found = suppress(Detections(box, np.array([0.5, 0.9, 0.8, 0.3], np.float32), np.array([1, 1, 2, 1])))
    assert list(zip(found.classes.tolist(), found.scores.tolist(), strict=True)) == [
        (1, pytest.approx(0.9)), (2, pytest.approx(0.8)), (1, pytest.approx(0.3)),
    ]  # fmt: skip


def test_map_is_one_for_the_truth_and_falls_with_what_is_wrong(scenes: list[Scene]) -> None:
    truth = [Detections(s.boxes, np.ones(len(s.boxes), np.float32), s.classes) for s in scenes]
    assert measure_map(truth, scenes) == pytest.approx((1.0, 1.0))
    # Half as wide: IoU 0.5, so that only the loosest of COCO's ten thresholds counts it.
    halves = [np.stack((x0, y0, (x0 + x1) / 2, y1), -1) for x0, y0, x1, y1 in (s.boxes.T for s in scenes)]
    narrow = [Detections(box, item.scores, item.classes) for box, item in zip(halves, truth, strict=True)]
    assert measure_map(narrow, scenes) == pytest.approx((0.1, 1.0))
    wrong = [Detections(item.boxes, item.scores, (item.classes + 1) % 10) for item in truth]
    assert max(measure_map(wrong, scenes)) < 0.2


def test_engine_gives_what_the_training_form_gives_and_the_certificate_says_what_was_folded(
    exported: Path, scenes: list[Scene], tmp_path: Path
) -> None:
    network = load_network("silu")
    batch = normalize(np.stack([fit_image(s.image, detect.PREPROCESSING) for s in scenes[:5]]), detect.PREPROCESSING)
    with torch.inference_mode():
        expected = {name: value.numpy() for name, value in network(torch.from_numpy(batch)).items()}
    with Engine(exported) as engine:
        outputs = engine.infer(batch)
        certificate = engine.metadata.certificate
        assert engine.spec.preprocessing == detect.PREPROCESSING
    assert certificate.passed and "22 regions folded" in certificate.reference
    assert list(outputs) == list(expected)
    for name, array in expected.items():
        # float32 through 26 layers, summed in another order: relative to the largest value.
        assert np.abs(outputs[name] - array).max() < 2e-5 * np.abs(array).max()
    import onnx

    operators = [node.op_type for node in onnx.load(exported).graph.node]
    assert operators.count("Conv") == 26 and "BatchNormalization" not in operators and "Add" not in operators


def test_images_in_files_are_found_what_scenes_in_memory_are(
    exported: Path, scenes: list[Scene], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, scene in zip(paths, scenes, strict=False):
        Image.fromarray(scene.image).save(path)
    with Engine(exported) as engine:
        from_files = detect.detect(engine, paths, least_score=0.01)
        in_memory = run_scenes(engine.infer, scenes[:6])
    for one, other, scene in zip(from_files, in_memory, scenes, strict=False):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        best = one.take(one.scores > 0.5)
        centres = (best.boxes[:, :2] + best.boxes[:, 2:]) / 2
        inside = (centres[:, None] > scene.boxes[:, :2]) & (centres[:, None] < scene.boxes[:, 2:])
        assert len(best.boxes) and inside.all(-1).any(1).mean() > 0.7


def test_example_prints_the_map_of_both_and_draws_the_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detect.run_sample(tmp_path, scenes=20)
    printed = capsys.readouterr().out
    assert "regions folded" in printed
    torch_line, engine_line = (line for line in printed.splitlines() if " % " in line)
    assert torch_line.split("%")[0].split()[-1] == engine_line.split("%")[0].split()[-1]
    with Image.open(tmp_path / "detections.png") as picture:
        assert picture.width > 1000
    assert (tmp_path / "detector-silu.onnx").is_file()


@pytest.mark.slow
def test_map_refuses_a_coarse_int8_detector_and_keeps_the_layers_that_it_takes(exported: Path, tmp_path: Path) -> None:
    """The naivest INT8 (largest values, to nearest) loses mAP; with the costliest layers in FP16 it does not."""
    digits, folder = load_digits("calib"), tmp_path / "scenes"
    folder.mkdir()
    for number in range(96):
        Image.fromarray(draw_scene(digits, "calib", number).image).save(folder / f"{number:02d}.png")
    coarse = dataclasses.replace(MAX_CALIBRATION, target="trt10")
    options = QuantizeOptions("int8", folder, images=64, int8=coarse, metric=detect.score, accept_data=True)
    free = quantize(exported, tmp_path / "free.onnx", dataclasses.replace(options, min_metric=0))
    assert free.score is not None and free.int8 is not None and free.int8.kept == ()
    lost = free.score.fp32 - free.score.found
    assert 0.05 < lost < 10  # points of mAP
    with pytest.raises(ParityError, match=r"examples\.detect:score falls from 7\d\.\d+ to 7\d\.\d+, .* cost .*\.conv"):
        quantize(exported, tmp_path / "no.onnx", dataclasses.replace(options, min_metric=free.score.fp32 - lost / 2))
    bounded = dataclasses.replace(options, int8=dataclasses.replace(coarse, max_drop=lost / 2))
    kept = quantize(exported, tmp_path / "kept.onnx", bounded)
    assert kept.score is not None and kept.int8 is not None
    assert kept.score.fp32 - kept.score.found <= lost / 2
    assert 0 < len(kept.int8.kept) < len(kept.int8.layers) and 0 < kept.int8.int8_share < 1
    assert {output.name for output in kept.verification.outputs} == {"boxes_8", "boxes_16", "scores_8", "scores_16"}
