"""Preprocessing that the user states, in timm's and torchvision's meaning."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.export.export import ExportOptions, export_checkpoint
from repvgg_deploy.export.options import GraphOptions, ResizeOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.decode import default_preprocessing
from tests.model.generated import CASES, random_model, write_case


@pytest.mark.parametrize(("size", "share"), [(224, 0.875), (224, 0.9), (256, 0.95), (320, 1.0), (32, 0.33)])
def test_crop_pct_is_the_crop_divided_and_rounded_down(size: int, share: float) -> None:
    found = ResizeOptions(crop_pct=share).restate(default_preprocessing(size, size))
    assert (found.resize_short, found.box) == (math.floor(size / share), None)


def test_crop_pct_of_an_oblong_crop_covers_both_sides() -> None:
    found = ResizeOptions(crop_pct=0.875).restate(default_preprocessing(224, 448))
    assert (found.box, found.fit) == ((256, 512), "cover")


def test_one_size_is_the_short_side_and_two_are_stretched_to() -> None:
    plain = default_preprocessing(224, 224)
    assert ResizeOptions(232, interpolation="bicubic").restate(plain).resize_short == 232
    assert ResizeOptions(232, interpolation="bicubic").restate(plain).interpolation == "bicubic"
    found = ResizeOptions((256, 240)).restate(plain)
    assert (found.box, found.fit, found.resize_short) == ((256, 240), "stretch", 240)
    assert ResizeOptions(232).restate(found).box is None


def test_letterbox_takes_the_place_of_every_other_size() -> None:
    plain = default_preprocessing(224, 256)
    for how in (plain, ResizeOptions((256, 300)).restate(plain), ResizeOptions(crop_pct=0.9).restate(plain)):
        found = ResizeOptions(letterbox=(0, 1, 2), interpolation="bicubic").restate(how)
        assert (found.fit, found.pad, found.box, found.crop) == ("letterbox", (0, 1, 2), None, (224, 256))
    assert ResizeOptions(240).restate(found).fit == "cover"


def test_what_is_not_stated_stays() -> None:
    plain = default_preprocessing(224, 224)
    assert ResizeOptions().restate(plain) == plain
    assert ResizeOptions(max_value=4095).restate(plain).max_value == 4095


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resize": 256, "crop_pct": 0.875}, "--resize and --crop-pct cannot both hold"),
        ({"letterbox": (0, 0, 0), "crop_pct": 0.875}, "--crop-pct and --letterbox cannot both hold"),
        ({"resize": 0}, "cannot be resized"),
        ({"resize": (256, 0)}, "cannot be resized"),
        ({"crop_pct": 1.5}, "share of the image"),
        ({"crop_pct": float("nan")}, "share of the image"),
        ({"interpolation": "random"}, "must be one of nearest"),
    ],
)
def test_what_cannot_be_stated_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ResizeOptions(**given)


@pytest.mark.parametrize("resize", [200, (256, 200)])
def test_images_smaller_than_the_crop_are_refused(resize: Any) -> None:
    with pytest.raises(InputError, match="smaller than the crop"):
        ResizeOptions(resize).restate(default_preprocessing(224, 224))


def test_assumed_preprocessing_is_noted_and_what_is_stated_is_not(tmp_path: Path) -> None:
    checkpoint = write_case(CASES[0], random_model(CASES[0].spec), tmp_path)

    def notes(**stated: Any) -> list[str]:
        graph = GraphOptions(image_size=(64, 64))
        options = ExportOptions(
            graph, CASES[0].spec, mean=stated.pop("mean", None), std=stated.pop("std", None), force=True
        )
        options = dataclasses.replace(options, resizing=ResizeOptions(**stated))
        result = export_checkpoint(checkpoint, tmp_path / "m.onnx", options=options)
        assert read_metadata(tmp_path / "m.onnx").notes == result.notes
        return [note for note in result.notes if "how images are prepared" in note]

    (note,) = notes()
    assert "resized to 64 for 64×64" in note and "bilinear" in note and "ImageNet's mean" in note
    (note,) = notes(resize=80, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    assert note.endswith("assumed: bilinear (--interpolation)")
    assert notes(crop_pct=0.8, interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)) == []
    preprocessing = read_metadata(tmp_path / "m.onnx").spec.preprocessing
    assert preprocessing is not None
    assert (preprocessing.resize_short, preprocessing.interpolation) == (80, "bicubic")
