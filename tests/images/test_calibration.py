"""Calibration images: drawn from any set, divided, and read strictly from `NAME.calib.npz`."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.errors import CalibrationError, InputError
from repvgg_deploy.images.calibration import (
    Images,
    calibration_path,
    find_calibration_file,
    load_calibration,
    load_calibration_file,
    split_held_out,
)
from repvgg_deploy.images.decode import normalize
from repvgg_deploy.images.sets import SetOptions
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import CalibrationProvenance
from tests.images.make_images import PREPROCESSING, draw, make_spec, save_images

PROVENANCE = CalibrationProvenance(
    1, "e" * 64, "a" * 64, "bn_statistics", images=3, seed=0, steps=9, loss=0.5, versions={"torch": "2"}
)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)


def write(path: Path, **changes: Any) -> Path:
    arrays = {"images": IMAGES, "provenance": np.array(codec.dumps(PROVENANCE))} | changes
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("onnx", "expected"),
    [
        ("b2.onnx", "b2.calib.npz"),
        ("b2.v1.onnx", "b2.v1.calib.npz"),
        ("B2.ONNX", "B2.calib.npz"),
        ("model", "model.calib.npz"),
    ],
)
def test_calibration_file_stands_beside_its_onnx(tmp_path: Path, onnx: str, expected: str) -> None:
    assert calibration_path(tmp_path / onnx) == tmp_path / expected
    assert find_calibration_file(tmp_path / onnx) is None
    write(tmp_path / expected)
    assert find_calibration_file(tmp_path / onnx) == tmp_path / expected
    assert find_calibration_file(str(tmp_path / onnx)) == tmp_path / expected


def test_calibration_folder_of_that_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "m.calib.npz").mkdir()
    assert find_calibration_file(tmp_path / "m.onnx") is None


def test_load_gives_images_and_provenance(tmp_path: Path) -> None:
    images, provenance = load_calibration_file(write(tmp_path / "m.calib.npz"), "e" * 64)
    np.testing.assert_array_equal(images, IMAGES)
    assert images.dtype == np.uint8 and provenance == PROVENANCE
    floats = np.random.default_rng(0).standard_normal((3, 3, 8, 6), np.float32)
    images, _ = load_calibration_file(str(write(tmp_path / "f.calib.npz", images=floats)))
    np.testing.assert_array_equal(images, floats)


def test_load_file_of_another_onnx_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.calib.npz")
    with pytest.raises(CalibrationError, match="made for another ONNX: expected sha256 ffff") as caught:
        load_calibration_file(path, "f" * 64)
    assert "--synthetic-calibration" in caught.value.remedy


def test_load_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.calib.npz", tmp_path):
        with pytest.raises(InputError, match="no such file") as caught:
            load_calibration_file(path)
        assert "--synthetic-calibration" in caught.value.remedy


class Evil:
    def __reduce__(self) -> object:
        return (sys.exit, ("the pickle was executed",))


def provenance(**changes: object) -> np.ndarray:
    return np.array(codec.dumps({**codec.encode(PROVENANCE), **changes}))


WRONG = {
    "no images": {"images": None},
    "no provenance": {"provenance": None},
    "another array": {"labels": np.arange(3)},
    "pickled images": {"images": np.array([Evil(), Evil(), Evil()], object)},
    "pickled provenance": {"provenance": np.array(Evil(), object)},
    "provenance as numbers": {"provenance": np.arange(3)},
    "provenance as two texts": {"provenance": np.array(["{}", "{}"])},
    "provenance is not JSON": {"provenance": np.array("{")},
    "unknown schema": {"provenance": provenance(schema=2)},
    "unknown field": {"provenance": provenance(clock="now")},
    "images of another count": {"provenance": provenance(images=4)},
    "images grey": {"images": IMAGES[..., :1]},
    "images of three dimensions": {"images": IMAGES[0]},
    "images channels first in bytes": {"images": np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))},
    "images of int64": {"images": IMAGES.astype(np.int64)},
    "images of float64": {"images": np.zeros((3, 3, 8, 6))},
    "images none": {"images": IMAGES[:0], "provenance": provenance(images=0)},
    "images NaN": {"images": np.full((3, 3, 8, 6), np.nan, np.float32)},
}


@pytest.mark.parametrize("name", WRONG)
def test_load_file_with_wrong_content_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.calib.npz", **WRONG[name])
    with pytest.raises(CalibrationError) as caught:
        load_calibration_file(path)
    assert str(path) in caught.value.message and "--synthetic-calibration" in caught.value.remedy


def test_load_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    data = write(tmp_path / "m.calib.npz").read_bytes()
    path = tmp_path / "t.calib.npz"
    for length in (*range(0, len(data), 37), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CalibrationError):
            load_calibration_file(path)


def test_load_file_with_a_changed_byte_is_refused_or_reads_the_same(tmp_path: Path) -> None:
    """The archive's checksums cover the arrays; a byte between them (a date, a gap) is not read."""
    data = write(tmp_path / "m.calib.npz").read_bytes()
    path = tmp_path / "t.calib.npz"
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.integers(0, len(data), 150):
        changed = bytearray(data)
        changed[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        try:
            images, found = load_calibration_file(path)
        except CalibrationError:
            refused += 1
        else:
            np.testing.assert_array_equal(images, IMAGES)
            assert found == PROVENANCE
    assert refused > 75


@pytest.mark.parametrize("kind", ["npy", "text", "empty", "zip of text"])
def test_load_foreign_file_is_refused(tmp_path: Path, kind: str) -> None:
    import zipfile

    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, IMAGES)
    elif kind == "text":
        buffer.write(b"not an archive" * 99)
    elif kind == "zip of text":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("images.npy", "text")
            archive.writestr("provenance.npy", "text")
    path = tmp_path / "m.calib.npz"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CalibrationError, match="no calibration file"):
        load_calibration_file(path)


def test_load_sample_images_without_provenance_are_refused(sample_dir: Path) -> None:
    with pytest.raises(CalibrationError, match="expected the arrays images and provenance, found images, labels"):
        load_calibration_file(sample_dir / "calib.npz")


def test_provenance_example_of_the_documents_is_one(tmp_path: Path, sample_dir: Path) -> None:
    text = (sample_dir.parents[1] / "docs" / "schemas" / "calibration.json").read_text(encoding="utf-8")
    example = dataclasses.replace(codec.loads(CalibrationProvenance, text), images=3)
    _, found = load_calibration_file(write(tmp_path / "m.calib.npz", provenance=np.array(codec.dumps(example))))
    assert found == example


def flatten(images: Images) -> NDArray[Any]:
    return np.concatenate(images.batches)


def test_calibration_images_are_chosen_by_seed_and_found_recursively(tmp_path: Path) -> None:
    save_images(tmp_path, [f"{index % 3}/{index:02}.png" for index in range(40)])
    one, same, other = (load_calibration(tmp_path, make_spec(), options=SetOptions(20, 8, seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch in one.batches] == [8, 8, 4]
    assert one.images == 20
    assert np.array_equal(flatten(one), flatten(same))
    assert not np.array_equal(flatten(one), flatten(other))


def test_calibration_of_a_list_or_an_archive_gives_the_same_images(tmp_path: Path, sample_dir: Path) -> None:
    paths = save_images(tmp_path / "a", [f"{index:02}.png" for index in range(18)])
    (tmp_path / "list.txt").write_text("".join(f"a/{path.name}\n" for path in paths))
    (tmp_path / "list.csv").write_text("label,path\n" + "".join(f"unknown,a/{path.name}\n" for path in paths))
    np.savez(tmp_path / "set.npz", images=draw(18))
    expected = normalize(draw(18), PREPROCESSING)
    for name in ("a", "list.txt", "list.csv", "set.npz"):
        assert np.array_equal(flatten(load_calibration(tmp_path / name, make_spec())), expected)


def test_calibration_respects_a_fixed_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "set.npz", images=draw(22))
    images = load_calibration(tmp_path / "set.npz", make_spec(batch=4, uint8=True))
    assert [batch.shape for batch in images.batches] == [(4, 8, 8, 3)] * 5
    assert "last 2 images" in caplog.text
    few = load_calibration(tmp_path / "set.npz", make_spec(batch=32), options=SetOptions(3))
    assert few.batches[0].shape == (32, 3, 8, 8)
    assert "repeated to fill" in caplog.text
    divided = split_held_out(images, share=0.4)
    assert [batch.shape for batch in (*divided.batches, *divided.held_out)] == [(4, 8, 8, 3)] * 5
    assert len(divided.held_out) == 2


def test_calibration_that_cannot_be_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        load_calibration(tmp_path / "nowhere", make_spec())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no image found"):
        load_calibration(tmp_path / "empty", make_spec())
    np.savez(tmp_path / "alike.npz", images=np.repeat(draw(1), 30, axis=0))
    with pytest.raises(CalibrationError, match="all 30 images are alike"):
        load_calibration(tmp_path / "alike.npz", make_spec())
    np.savez(tmp_path / "nan.npz", images=np.full((20, 3, 8, 8), np.nan, np.float32))
    with pytest.raises(CalibrationError, match="NaN"):
        load_calibration(tmp_path / "nan.npz", make_spec())
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_calibration(tmp_path / "broken.png", make_spec())
    np.savez(tmp_path / "bytes.npz", images=draw(20))
    with pytest.raises(CalibrationError, match="does not say how"):
        load_calibration(tmp_path / "bytes.npz", dataclasses.replace(make_spec(), preprocessing=None))


def test_calibration_with_few_or_unreadable_images_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    paths = save_images(tmp_path, [f"{index:02}.png" for index in range(12)])
    paths[0].write_bytes(b"")
    images = load_calibration(tmp_path, make_spec())
    assert (images.images, images.skipped) == (11, 1)
    assert "1 of 12 images could not be read" in caplog.text
    assert "11 images are few" in caplog.text


@pytest.mark.parametrize(
    ("count", "share", "held"), [(40, 0.2, 8), (40, 0.5, 20), (7, 0.1, 1), (2, 0.9, 1), (33, 0.99, 32)]
)
def test_held_out_share_is_spread_evenly_and_nothing_is_lost(
    tmp_path: Path, count: int, share: float, held: int
) -> None:
    np.savez(tmp_path / "set.npz", images=draw(count))
    images = load_calibration(tmp_path / "set.npz", make_spec(uint8=True), options=SetOptions(batch_size=16))
    divided = split_held_out(images, share=share)
    out = np.concatenate(divided.held_out)
    assert (divided.images, len(out)) == (count - held, held)
    whole = {image.tobytes() for image in flatten(images)}
    assert {image.tobytes() for image in flatten(divided)} | {image.tobytes() for image in out} == whole
    again = split_held_out(images, share=share)
    assert np.array_equal(np.concatenate(again.held_out), out)


def test_held_out_share_that_cannot_be_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=draw(1))
    images = load_calibration(tmp_path / "set.npz", make_spec())
    with pytest.raises(CalibrationError, match="one image cannot be divided"):
        split_held_out(images)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        split_held_out(images, share=1.0)
