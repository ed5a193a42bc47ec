"""The INT8 benchmark: mAP of resampled scenes is COCO's, and single rows are measured anew without losing others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import int8
from benchmarks.int8_parts.detection import draw_scenes, match_classes, mean_precision
from examples.detect import Detections, judge_boxes, measure_map


@pytest.mark.parametrize("repeated", [False, True])
def test_mean_precision_is_that_of_coco_with_each_scene_as_often_as_its_weight(repeated: bool) -> None:
    scenes, generator = draw_scenes("eval", 0, 12), np.random.default_rng(0)
    found = []
    for scene in scenes:  # some missed, some moved, some invented
        kept = generator.random(len(scene.boxes)) < 0.8
        boxes = np.concatenate([scene.boxes[kept], scene.boxes[:1]])
        boxes = (boxes + generator.normal(0, 2, boxes.shape)).astype(np.float32)
        classes = np.concatenate([scene.classes[kept], generator.integers(0, 10, len(boxes) - kept.sum())])
        found.append(Detections(boxes, generator.random(len(boxes)).astype(np.float32), classes))
    weights = generator.integers(0, 3, len(scenes)) if repeated else np.ones(len(scenes), np.int64)
    chosen = np.repeat(np.arange(len(scenes)), weights)
    expected, _ = measure_map([found[index] for index in chosen], [scenes[index] for index in chosen])
    matches = match_classes(judge_boxes(found, scenes), len(scenes))
    assert 0.1 < expected < 0.9
    assert mean_precision(matches, weights) == pytest.approx(expected, abs=1e-9)


def rows(*keys: str, sqnr_db: float) -> dict[str, Any]:
    return {"size": 32, "rows": [{"key": key, "sqnr_db": sqnr_db} for key in keys]}


def test_rows_that_are_measured_anew_take_the_place_of_their_own_only(tmp_path: Path) -> None:
    path = tmp_path / "int8.json"
    int8.store(path, "detector", rows("fp32", "max", "ours", sqnr_db=1.0))
    int8.store(path, "A0", rows("fp32", sqnr_db=2.0))
    int8.store(path, "detector", rows("fp32", "ours", "fast", sqnr_db=3.0))
    found = json.loads(path.read_text())["models"]
    assert list(found) == ["A0", "detector"]  # in the order of the subjects, whatever was measured last
    assert [(row["key"], row["sqnr_db"]) for row in found["detector"]["rows"]] == [
        ("fp32", 3.0),
        ("max", 1.0),
        ("fast", 3.0),
        ("ours", 3.0),
    ]
    assert [row["sqnr_db"] for row in found["A0"]["rows"]] == [2.0]
