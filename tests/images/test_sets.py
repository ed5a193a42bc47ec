"""Image sets: every form that labelled and calibration images come in, and every way in which one can be wrong."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.calibration import load_calibration
from repvgg_deploy.images.decode import load_image, normalize
from repvgg_deploy.images.sets import SetOptions, choose_evenly, open_images
from repvgg_deploy.images.sources import NpzSource
from tests.images.make_images import PREPROCESSING, draw, make_spec, save_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(
        tmp_path / "set", ["dog/a.png", "dog/deep/b.png", "cat/c.png", "garbage_truck/d.png", "cat/.hidden.png"]
    )
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def labels_of(images: Any) -> list[int]:
    return np.concatenate([batch.labels for batch in images]).tolist()


def test_folders_are_classes_by_label_and_images_are_as_the_model_takes_them(folder: Path) -> None:
    images = open_images(folder, make_spec(), SetOptions(batch_size=3))
    assert len(images) == 4
    batches = list(images)
    assert [batch.images.shape for batch in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert labels_of(images) == [0, 1, 1, 2]  # re-iterable
    expected = np.stack(
        [load_image(folder / name, PREPROCESSING) for name in ("cat/c.png", "dog/a.png", "dog/deep/b.png")]
    )
    assert np.array_equal(batches[0].images, normalize(expected, PREPROCESSING))
    assert "labels" in images.labels_from


def test_folders_name_the_classes_of_a_model_without_labels(tmp_path: Path) -> None:
    save_images(tmp_path, ["n01440764/a.png", "n03888257/a.png", "own/a.png"])
    sort = SetOptions(sorted_folders=True)
    assert open_images(tmp_path, make_spec(labels=None), sort).class_names == ("tench", "parachute", "own")
    save_images(tmp_path / "numbers", ["0/a.png", "2/a.png"])
    assert open_images(tmp_path / "numbers", make_spec(labels=None)).class_names == ("0", "", "2")


def test_folders_of_a_uint8_model_give_bytes(folder: Path) -> None:
    batch = next(iter(open_images(folder, make_spec(uint8=True))))
    assert batch.images.dtype == np.uint8
    assert batch.images.shape == (4, 8, 8, 3)


def test_folders_in_sorted_order_are_said_so_and_only_taken_when_complete(tmp_path: Path) -> None:
    save_images(tmp_path, ["x/a.png", "y/a.png", "z/a.png"])
    sort = SetOptions(sorted_folders=True)
    images = open_images(tmp_path, make_spec(), sort)
    assert labels_of(images) == [0, 1, 2]
    assert "sorted order" in images.labels_from
    with pytest.raises(InputError, match="3 folders for 5 classes"):
        open_images(tmp_path, make_spec(classes=5, labels=None), sort)
    with pytest.raises(InputError, match="the folder 'x' is no class of the model") as caught:
        open_images(tmp_path, make_spec())  # never as a fallback
    assert "--sorted-folders if 'x' is class 0" in caught.value.remedy


def test_sorted_folders_count_those_without_images_too(tmp_path: Path) -> None:
    save_images(tmp_path, ["x/a.png", "z/a.png"])
    (tmp_path / "y").mkdir()
    images = open_images(tmp_path, make_spec(), SetOptions(sorted_folders=True))
    assert labels_of(images) == [0, 2]
    assert images.left_out == "left out: 1 a folder without images (y)"


def test_sorted_folders_that_the_names_contradict_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, ["cat/a.png", "garbage_truck/a.png", "dog/a.png"])
    with pytest.raises(InputError, match="the folder 'cat' is 0 in sorted order, and class 1 of the model"):
        open_images(tmp_path, make_spec(labels=("dog", "cat", "garbage truck")), SetOptions(sorted_folders=True))
    with pytest.raises(InputError, match="is no folder"):
        open_images(tmp_path / "cat/a.png", make_spec(), SetOptions(sorted_folders=True, labels="none"))


def test_folders_of_numbers_are_indices_not_text_order(tmp_path: Path) -> None:
    save_images(tmp_path, ["10/a.png", "2/a.png"])
    assert labels_of(open_images(tmp_path, make_spec(classes=11, labels=None))) == [10, 2]
    with pytest.raises(InputError, match="out of range"):
        open_images(tmp_path, make_spec(classes=5, labels=None))


@pytest.mark.parametrize("header", ["path,label\n", "", "id,Label,PATH\n"])
@pytest.mark.parametrize("names", [False, True])
def test_csv_gives_paths_beside_it_and_labels(tmp_path: Path, header: str, names: bool) -> None:
    save_images(tmp_path / "photos", ["a b.png", "c, d.png"])
    labels = ["dog", "garbage-truck"] if names else ["1", "2"]
    rows = [("photos/a b.png", labels[0]), ('"photos/c, d.png"', labels[1])]
    lines = [f"7,{label},{path}" if "id" in header else f"{path},{label}" for path, label in rows]
    (tmp_path / "set.csv").write_text("\ufeff" + header + "\n\n".join(lines) + "\n", encoding="utf-8")
    images = open_images(tmp_path / "set.csv", make_spec())
    assert labels_of(images) == [1, 2]
    assert ("names" in images.labels_from) is names


CSV_FAULTS = {
    "": "names no image",
    "path,label\n": "below the header",
    "a.png\n": "has no labels",
    "a.png,dog\nb.png,dog\n": "1 of 2 files do not exist, the first on line 2",
    "name,kind,more\na.png,dog,x\n": "expected the columns path,label",
    "label,kind\ndog,a.png\n": "expected the columns path,label",
    "path,label\na.png\n": "line 2: expected 2 columns",
    "path,label\na.png,wolf\n": "'wolf' is no class of the model .cat, dog",
    "path,label\na.png,3\n": "label 3 is out of range: expected 0 to 2",
    "path,label\na.png,-1\n": "label -1 is out of range",
}


@pytest.mark.parametrize(("text", "message"), CSV_FAULTS.items())
def test_csv_that_is_wrong_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    save_images(tmp_path, ["a.png"])
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        open_images(tmp_path / "set.csv", make_spec())
    assert caught.value.remedy


def test_npz_with_names_for_labels_and_of_floats(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).uniform(-1.5, 1.5, (4, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "set.npz", images=floats, labels=np.array(["dog", "cat", "dog", "dog"]))
    images = open_images(tmp_path / "set.npz", make_spec())
    assert labels_of(images) == [1, 0, 1, 1]
    assert np.array_equal(next(iter(images)).images, floats)
    np.savez(tmp_path / "last.npz", images=floats.transpose(0, 2, 3, 1).copy())
    assert np.array_equal(load_calibration(tmp_path / "last.npz", make_spec()).batches[0], floats)
    bytes_ = load_calibration(tmp_path / "last.npz", make_spec(uint8=True)).batches[0]
    back = normalize(bytes_, PREPROCESSING)
    assert np.abs(back - floats).max() < 0.51 / 57  # half a grey level


NPZ_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"pictures": draw(2)}, "expected an array images, found pictures"),
    "rank": ({"images": draw(2)[0]}, r"found uint8 \(8, 8, 3\)"),
    "dtype": ({"images": draw(2).astype(np.int32)}, "found int32"),
    "order": ({"images": np.asfortranarray(draw(2))}, "found Fortran order"),
    "grey": ({"images": draw(2)[..., :1], "labels": [0, 1]}, "expected RGB images"),
    "size": ({"images": draw(2, size=9), "labels": [0, 1]}, "expected images of 8×8 pixels, found 9×9"),
    "empty": ({"images": draw(2)[:0], "labels": np.zeros(0, int)}, "at least one image"),
    "no labels": ({"images": draw(2)}, "has no labels"),
    "label count": ({"images": draw(2), "labels": [0, 1, 2]}, "expected 2 integers"),
    "label kind": ({"images": draw(2), "labels": [0.0, 1.5]}, "found float64"),
    "label range": ({"images": draw(2), "labels": [0, 9]}, "label 9 is out of range"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_npz_that_is_wrong_is_refused(tmp_path: Path, fault: str) -> None:
    arrays, message = NPZ_FAULTS[fault]
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(InputError, match=message):
        list(open_images(tmp_path / "set.npz", make_spec()))


def test_npz_of_mixed_shapes_needs_pickle_and_is_refused(tmp_path: Path) -> None:
    mixed = np.empty(2, object)
    mixed[0], mixed[1] = draw(1)[0], draw(1, size=9)[0]
    np.savez(tmp_path / "set.npz", images=mixed)
    with pytest.raises(InputError, match="mixed shapes"):
        open_images(tmp_path / "set.npz", make_spec())


@pytest.mark.parametrize("compress", [False, True])
def test_npz_that_is_damaged_is_refused(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / "set.npz"
    (np.savez_compressed if compress else np.savez)(path, images=draw(40), labels=np.zeros(40, int))
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole[:900] + bytes(64) + whole[964:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"set\.npz"):
            list(open_images(path, make_spec()))
    np.save(tmp_path / "plain.npy", draw(2))
    (tmp_path / "plain.npy").rename(path)
    assert len(NpzSource(path)) == 2  # what a file is, its content says


def test_folder_that_is_wrong_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_images(tmp_path / "nowhere", make_spec())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image found"):
        open_images(tmp_path / "empty", make_spec())
    save_images(tmp_path / "flat", ["a.png", "b.png"])
    with pytest.raises(InputError, match="one sub-folder a class"):
        open_images(tmp_path / "flat", make_spec())
    save_images(folder, ["wolf/a.png"])
    with pytest.raises(InputError, match="the folder 'wolf' is no class"):
        open_images(folder, make_spec())
    with pytest.raises(InputError, match="gives features, not classes"):
        open_images(folder, make_spec(kind="features"))


def test_labels_that_are_optional_are_left_out_where_there_are_none(tmp_path: Path, folder: Path) -> None:
    save_images(tmp_path / "flat", ["a.png", "b.png"])
    for path in (tmp_path / "flat", tmp_path / "flat" / "a.png"):
        images = open_images(path, make_spec(), SetOptions(labels="optional"))
        assert next(iter(images)).labels is None
        assert images.labels_from.startswith(str(path))
    assert open_images(folder, make_spec(), SetOptions(labels="optional")).labels is not None
    save_images(folder, ["wolf/a.png"])
    images = open_images(folder, make_spec(), SetOptions(labels="optional"))
    assert images.labels is None
    assert "the folder 'wolf' is no class of the model" in images.labels_from  # and not without a word
    assert open_images(folder, make_spec(), SetOptions(labels="none")).labels_from == ""


def test_unreadable_images_are_skipped_with_their_reason_and_refused_above_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"dog/{index:02}.png" for index in range(20)]
    paths = save_images(tmp_path, names)
    paths[3].write_bytes(b"broken")
    paths[19].write_bytes(b"")
    images = open_images(tmp_path, make_spec(), SetOptions(batch_size=6))
    batches = list(images)
    assert [len(batch.images) for batch in batches] == [6, 6, 6, 0]
    assert [len(batch.skipped) for batch in batches] == [1, 0, 0, 1]
    assert "03.png" in caplog.text
    paths[4].write_bytes(b"")
    with pytest.raises(InputError, match="more than 10% of 20 images cannot be read"):
        list(images)


@pytest.mark.parametrize("options", [{"limit": 0}, {"batch_size": 0}])
def test_set_options_that_cannot_hold_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        SetOptions(**options)


def test_npz_rows_are_read_lazily_in_any_subset(tmp_path: Path) -> None:
    images, labels = draw(50), np.arange(50) % 3
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", images=images, labels=labels)
        opened = open_images(tmp_path / "set.npz", make_spec(uint8=True), SetOptions(limit=20, batch_size=8, seed=3))
        chosen = list(choose_evenly(50, 20, 3))
        assert [len(batch.images) for batch in opened] == [8, 8, 4]
        assert np.array_equal(np.concatenate([batch.images for batch in opened]), images[chosen])
        assert labels_of(opened) == labels[chosen].tolist()


def test_links_in_circles_are_followed_once(folder: Path) -> None:
    (folder / "dog" / "loop").symlink_to(folder)
    assert len(open_images(folder, make_spec())) == 4


def test_folder_that_may_not_be_read_is_an_error_and_not_a_class_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    real = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"dog: cannot be read: Permission denied"):
        open_images(tmp_path, make_spec())


def write_header(path: Path, descr: str, shape: tuple[int, ...], data: bytes, name: str = "images") -> Path:
    """An .npz whose array claims what its bytes may not hold."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    images = io.BytesIO()
    np.save(images, np.zeros((2, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if name != "images":
            archive.writestr("images.npy", images.getvalue())
        archive.writestr(f"{name}.npy", file.getvalue() + data)
    return path


@pytest.mark.parametrize(
    ("descr", "shape", "name", "problem"),
    [
        ("|u1", (800_000_000, 1, 1, 3), "images", "ends before its 800,000,000 images"),
        ("|u1", (2**62, 4, 4, 3), "images", "ends before its"),  # the product of these sizes overflows in NumPy
        ("|u1", (3, 4, 4, 3), "images", "ends before its 3 images"),
        ("|u1", (-2, 4, 4, 3), "images", "ends before its -2 images"),
        ("|u1", (1, 30_000, 30_000, 3), "images", "ends before its 1 images"),
        ("<i8", (10**12,), "labels", "is not what its"),
        ("<U1000000", (2,), "labels", "is not what its"),
    ],
)
def test_header_of_an_archive_is_compared_with_its_bytes_first(
    descr: str, shape: tuple[int, ...], name: str, problem: str, tmp_path: Path
) -> None:
    path = write_header(tmp_path / "a.npz", descr, shape, bytes(100), name)
    tracemalloc.start()
    with pytest.raises(InputError, match=problem):
        open_images(path, make_spec(), SetOptions(labels="optional"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
