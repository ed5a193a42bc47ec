"""The committed detector is what its card says, its scenes are the same everywhere, and its script trains."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from detector import Activation, Detector
from scenes import INK, LABELS, Digits, Scene, draw_scene, load_digits
from train import Options, assign, draw_batch, flatten, loss_of, overlap, train

from examples.detect import load_network, measure_map, run_scenes
from repvgg_deploy.files.output import sha256_file

FOLDER = Path(__file__).resolve().parents[2] / "models" / "sample-detector"
ACTIVATIONS = get_args(Activation)


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits("eval")


# --- scenes


def test_scene_is_decided_by_its_split_and_number(digits: Digits) -> None:
    one, again = draw_scene(digits, "eval", 3), draw_scene(digits, "eval", 3)
    assert np.array_equal(one.image, again.image) and np.array_equal(one.boxes, again.boxes)
    for other in (draw_scene(digits, "eval", 4), draw_scene(digits, "calib", 3)):
        assert one.image.shape != other.image.shape or not np.array_equal(one.image, other.image)


def test_scenes_are_those_that_the_card_was_measured_on(digits: Digits, card: str) -> None:
    digest = hashlib.sha256()
    for number in range(20):
        scene = draw_scene(digits, "eval", number)
        for array in (scene.image, scene.boxes.astype("<f4"), scene.classes.astype("<i8")):
            digest.update(array.tobytes())
    assert digest.hexdigest() in card


def test_boxes_of_a_scene_lie_in_it_and_enclose_their_digit(digits: Digits) -> None:
    for number in range(60):
        scene = draw_scene(digits, "eval", number)
        height, width = scene.image.shape[:2]
        left, top, right, bottom = scene.boxes.T
        assert scene.image.dtype == np.uint8 and len(scene.classes) == len(scene.boxes) >= 1
        assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
        assert ((right - left) >= 3).all() and ((bottom - top) >= 8).all()


def test_box_is_as_tight_as_the_ink() -> None:
    ink = np.zeros((1, 32, 32), np.uint8)
    ink[0, 8:24, 12:20] = 255  # half of the height, a quarter of the width
    digits = Digits(ink, np.array([7]))
    for number in range(20):
        scene = draw_scene(digits, "eval", number)
        ratio = (scene.boxes[:, 3] - scene.boxes[:, 1]) / (scene.boxes[:, 2] - scene.boxes[:, 0])
        # 16 × 8 cells of a digit that is 0.75 to 1.1 times as wide as tall, and up to two pixels of soft edge.
        assert (scene.classes == 7).all() and (ratio > 1.2).all() and (ratio < 3.2).all()
    assert 0 < INK < 255


def test_training_scenes_have_other_digits_than_those_for_evaluation(digits: Digits) -> None:
    from train import training_digits

    known = {ink.tobytes() for ink in training_digits().ink}
    assert len(known) > 1100 and not known & {ink.tobytes() for ink in digits.ink}
    assert not known & {ink.tobytes() for ink in load_digits("calib").ink}


# --- training


def test_overlap_is_intersection_over_union_and_its_generalisation() -> None:
    one = torch.tensor([[0.0, 0, 4, 4]])
    iou, generalised = overlap(one, torch.tensor([[2.0, 0, 6, 4], [0, 0, 4, 4], [8, 0, 12, 4]]))
    torch.testing.assert_close(iou, torch.tensor([8 / 24, 1.0, 0.0]))
    torch.testing.assert_close(generalised, torch.tensor([8 / 24, 1.0, 0.0 - (48 - 32) / 48]))


def test_positions_that_answer_for_a_box_lie_in_it_and_the_best_gets_the_best_score() -> None:
    torch.manual_seed(0)
    model = Detector()
    boxes, classes = torch.tensor([[16.0, 16, 48, 56], [80.0, 90, 84, 94]]), torch.tensor([3, 5])
    with torch.no_grad():
        found, logits, centres = flatten(model(torch.rand(1, 3, 128, 128)))
    answers, score = assign(found[0], logits[0], centres, boxes, classes)
    large = centres[answers == 0]
    assert 1 <= len(large) <= 10 and ((large > boxes[0, :2]) & (large < boxes[0, 2:])).all()
    assert (answers == 1).sum() >= 1  # smaller than a cell, and answered for all the same
    assert set(answers.tolist()) <= {-1, 0, 1} and (score[answers < 0] == 0).all()
    aligned = logits[0].sigmoid()[:, 3].sqrt() * overlap(boxes[:1], found[0])[0] ** 6
    assert score[answers == 0].argmax() == aligned[answers == 0].argmax()


def test_batch_of_scenes_has_the_boxes_where_the_digits_are(digits: Digits) -> None:
    images, boxes, classes = draw_batch(digits, 0, 8)
    assert images.shape == (8, 3, 128, 128) and images.dtype == torch.float32 and 0 <= images.min() < images.max() <= 1
    for image, box, label in zip(images, boxes, classes, strict=True):
        assert len(box) == len(label) and (box >= 0).all() and (box <= 128).all()
        for left, top, right, bottom in box.round().int().tolist():
            # Ink against ground, or the other way: what lies in a box varies more than the grey around the scene.
            assert image[:, top:bottom, left:right].std() > 0.02


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_lowers_the_loss_and_gives_a_network_in_eval(digits: Digits, activation: Activation) -> None:
    model = train(digits, Options(activation, steps=12, batch=4))
    untrained = Detector(activation=activation)
    torch.manual_seed(0)
    batch, boxes, classes = draw_batch(digits, 0, 16)
    with torch.no_grad():
        before, after = (loss_of(m.train()(batch), boxes, classes) for m in (untrained, model))
    assert after < before


# --- what is committed


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_detector_card_states_hash_and_size(card: str, activation: str) -> None:
    path = FOLDER / f"detector-{activation}.pth"
    assert path.stat().st_size < 2_000_000
    assert f"{path.stat().st_size:,} bytes" in card and sha256_file(path) in card
    parameters = sum(p.numel() for p in load_network(activation).parameters())
    assert parameters < 1_000_000 and f"{parameters:,} parameters in training form" in card


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_detector_reaches_the_map_of_its_card(digits: Digits, card: str, activation: Any) -> None:
    stated = re.search(rf"\| {activation} \| \*\*([\d.]+) %\*\*", card)
    assert stated is not None
    scenes: list[Scene] = [draw_scene(digits, "eval", number) for number in range(160)]
    network = load_network(activation)

    def run(batch: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in network(torch.from_numpy(batch)).items()}

    strict, loose = measure_map(run_scenes(run, scenes), scenes)
    # 160 of the 2,000 scenes: the standard error of mAP on so many is about a point.
    assert abs(100 * strict - float(stated[1])) < 4 and loose > strict
    assert len(LABELS) == 10
