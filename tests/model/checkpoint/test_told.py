"""What `config.json` says of classes, labels and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.images.classes import imagenet_labels
from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.model.checkpoint.told import Told, read_config

TIMM: dict[str, Any] = {
    "architecture": "repvgg_a0",
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "tag": "rvgg_in1k",
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
    },
}


def read(tmp_path: Path, config: object) -> Told:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return read_config(path, "org/name")


def test_timms_own_weights_are_prepared_as_the_original_and_have_the_labels_of_imagenet(tmp_path: Path) -> None:
    told = read(tmp_path, TIMM)
    assert told.preprocessing == default_preprocessing(224, 224)
    assert told.labels == imagenet_labels() and told.classes == 1000 and told.notes == ()
    assert told.say(told.preprocessing, told.labels) == (
        "told by config.json of org/name: 1000 classes, mean (123.675, 116.28, 103.53), "
        "standard deviation (58.395, 57.12, 57.375), crop 224×224, bilinear, resized to 256, the labels",
    )


def test_file_of_old_timm_has_one_level(tmp_path: Path) -> None:
    flat = {**TIMM["pretrained_cfg"], "architecture": "repvgg_a0", "input_size": [3, 96, 128], "crop_pct": 0.8}
    how = read(tmp_path, flat).preprocessing
    assert how is not None and (how.crop, how.box, how.resize_short) == ((96, 128), (120, 160), 120)


def test_squashed_images_are_stretched_and_other_modes_are_named(tmp_path: Path) -> None:
    cfg = {**TIMM["pretrained_cfg"], "crop_pct": 1.0, "crop_mode": "squash"}
    how = read(tmp_path, {"pretrained_cfg": cfg}).preprocessing
    assert how is not None and (how.fit, how.box) == ("stretch", (224, 224))
    told = read(tmp_path, {"pretrained_cfg": {**cfg, "crop_mode": "border", "interpolation": "random"}})
    assert "interpolation" not in told.stated and "resize" not in told.stated
    assert "crop_mode border, which is none of ours" in str(told.notes) and "interpolation random" in str(told.notes)


def test_what_is_not_said_of_images_is_noted(tmp_path: Path) -> None:
    told = read(tmp_path, {"mean": [0.5, 0.5, 0.5]})
    assert told.notes == (
        "config.json of org/name does not say all of how images are prepared; assumed: ImageNet's standard deviation, "
        "224×224, bilinear, the short side resized to 256",
    )
    assert read(tmp_path, {}) == Told("config.json of org/name")


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"label_names": ["a", "b"]}, ("a", "b")),
        ({"labels": ["a", "b"]}, ("a", "b")),
        ({"pretrained_cfg": {"label_names": ["a", "b"]}}, ("a", "b")),
        ({"label_names": ["a", "b"], "label_descriptions": {"a": "an A"}}, ("a", "b")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "a", "2": "b"}}, None),
        ({"num_classes": 1000, "pretrained_cfg": {"tag": "rvgg_in1k"}}, imagenet_labels()),
        ({"num_classes": 1000, "pretrained_cfg": {"tag": "my_data"}}, None),
        ({"num_classes": 0}, None),
    ],
)
def test_labels_are_found_in_each_format(
    tmp_path: Path, config: dict[str, Any], labels: tuple[str, ...] | None
) -> None:
    assert read(tmp_path, config).labels == labels


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("[1]", "is no JSON object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ({"mean": [0.5, 0.5]}, "mean must be three numbers in units of 0–1"),
        ({"mean": [123.675, 116.28, 103.53]}, "mean must be three numbers in units of 0–1"),
        ({"std": [0.0, 0.1, 0.1]}, "standard deviation must be positive"),
        ({"input_size": [3, 224]}, "input_size must be"),
        ({"input_size": [3, 1 << 20, 1 << 20]}, "pixels"),
        ({"crop_pct": 0}, "crop_pct must be a share"),
        ({"num_classes": "10"}, "num_classes must be a whole number"),
        ({"num_classes": 3, "label_names": ["a", "b"]}, "names 2 classes and says that there are 3"),
    ],
)
def test_config_that_cannot_be_is_refused(tmp_path: Path, config: object, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read(tmp_path, config)
    assert "config.json of org/name" in caught.value.message and "--mean" in caught.value.remedy
