"""One listing of folders, for every command: content decides, and nothing is left out in silence."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.decode import load_image
from repvgg_deploy.images.formats import is_read, name_unread
from repvgg_deploy.images.listing import expand, find_images, list_images
from tests.images.make_images import PREPROCESSING

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")


def encoded(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["photo", "photo.jfif", "photo.dat", "PHOTO.JPG"])
def test_image_is_found_by_its_content_whatever_it_is_called(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "deep" / "er" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded(kind))
    assert find_images(tmp_path).files == (path,)
    assert load_image(path, PREPROCESSING).shape == (8, 8, 3)


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + b"mif1"


UNREAD = {
    "photo.heic": (box(b"heic"), "a HEIC image"),
    "photo": (box(b"mif1"), "a HEIC image"),
    "iphone.jpg": (box(b"heix"), "a HEIC image"),
    "a.jxl": (b"\xff\x0a" + bytes(30), "a JPEG XL image"),
    "a.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "a.psd": (b"8BPS" + bytes(30), "a Photoshop document"),
    "a.dcm": (bytes(128) + b"DICM" + bytes(30), "a DICOM image"),
    "a.nef": (b"MM\0*" + bytes(30), "a camera's raw file"),
    "a.CR2": (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file"),
    "a.exr": (b"\x76\x2f\x31\x01" + bytes(30), "an OpenEXR image"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "page.jpg": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "an HTML or XML page"),
    "packed.jpg": (b"\x1f\x8b\x08" + bytes(30), "a gzip archive"),
    "weights.png": (b"PK\x03\x04" + bytes(30), "a zip archive"),
    "text-mode.png": (b"\x89PNG\n\x1a\n" + bytes(30), "a PNG image that was copied as text"),
    "set.png": (b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file"),
    "array.png": (b"\x93NUMPY\x01\0" + bytes(30), "a NumPy array"),
    "plan.png": (b"ftrt" + bytes(30), "a TensorRT plan"),
    "tar.png": (b"net/".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_image_that_is_not_read_here_is_listed_and_named_where_it_is_read(tmp_path: Path, name: str) -> None:
    content, what = UNREAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert find_images(tmp_path).files == (path,)
    with pytest.raises(InputError, match=what) as caught:
        load_image(path, PREPROCESSING)
    assert str(path) in caught.value.message
    remedy = caught.value.remedy
    assert remedy and not any(word in remedy for word in ("torch", "safetensors", "built from", "give the image here"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_not_named_as_something_else(kind: str) -> None:
    head = encoded(kind)[:512]
    assert is_read(head)
    assert name_unread(Path("a"), head) is None


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded())
    others = {
        ".DS_Store": b"x", "cat/._1.png": b"\0\5\x16\7", ".cache/3.png": encoded(), "@eaDir/1.jpg": encoded(),
        "notes.txt": b"BM is a brand of cars, P6 is a plan", "cat/Thumbs.db": b"\xd0\xcf\x11\xe0",
        "film.mp4": b"\0\0\0\x14ftypisom\0\0\2\0mp42", "empty": b"", "index.html": b"<html></html>",
    }  # fmt: skip
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cow").mkdir()
    found = find_images(tmp_path)
    assert [path.name for path in found.files] == ["1.png", "2.png"]
    assert found.hidden == (".DS_Store", ".cache", "@eaDir", "cat/._1.png")
    assert found.others == (
        "cat/Thumbs.db",
        "empty (empty)",
        "film.mp4 (a video)",
        "index.html (an HTML or XML page (a download that met an error or login page))",
        "notes.txt",
    )
    assert found.empty == ("cow",)
    assert "4 hidden (.DS_Store, .cache, @eaDir, …)" in found.left_out
    assert "5 no image (cat/Thumbs.db, " in found.left_out


def test_pipes_and_sockets_are_refused_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.png")  # a short name: sockets have no room for more
        found = find_images(tmp_path)
    assert [path.name for path in found.files] == ["b.png", "s.png"]
    assert found.others == ("pipe (a pipe)",)
    for name, what in (("b.png", "a pipe"), ("s.png", "a socket"), ("/dev/zero", "a device")):
        with pytest.raises(InputError, match=f"{name}: is {what}"):
            load_image(tmp_path / name, PREPROCESSING)


def test_broken_link_with_an_images_name_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    found = find_images(tmp_path)
    assert (found.files, found.others) == ((tmp_path / "a.png",), ("b (a broken link)",))
    with pytest.raises(InputError, match="no such image file"):
        load_image(found.files[0], PREPROCESSING)


class Sent:
    """Standard input with these bytes."""

    def __init__(self, data: bytes, *, terminal: bool = False) -> None:
        self.buffer, self._terminal = io.BytesIO(data), terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_one_image_comes_on_standard_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    monkeypatch.setattr("sys.stdin", Sent(encoded()))
    assert [str(path) for path in list_images([name])] == [name]
    found = load_image(name, PREPROCESSING)
    np.testing.assert_array_equal(found, load_image(tmp_path / "a.png", PREPROCESSING))
    with pytest.raises(InputError, match="standard input: the file is empty"):
        load_image(name, PREPROCESSING)
    monkeypatch.setattr("sys.stdin", Sent(b"", terminal=True))
    with pytest.raises(InputError, match="nothing is sent to it"):
        load_image(name, PREPROCESSING)
    monkeypatch.setattr("sys.stdin", Sent(box(b"heic")))
    with pytest.raises(InputError, match="standard input: is a HEIC image"):
        load_image(name, PREPROCESSING)


def test_folders_are_searched_whole_and_files_stay(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "c.webp", "sub/d.png", "sub/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded() if name != "notes.txt" else b"text")
    assert [path.name for path in list_images([tmp_path])] == ["a.JPG", "b.png", "c.webp", "d.png", "e"]
    assert [path.name for path in list_images([f"{tmp_path}/*.png", tmp_path / "absent.jpg"])] == [
        "b.png",
        "absent.jpg",
    ]
    found = expand([f"{tmp_path}/*"])
    assert [path.name for path in found.files] == ["a.JPG", "b.png", "c.webp", "d.png", "e"]
    assert found.others == (f"{tmp_path}/notes.txt",)
    assert len(list_images([f"{tmp_path}/**"])) == 5
    assert list_images([tmp_path / "notes.txt"]) == (tmp_path / "notes.txt",)  # as it is named: an error in its place


def test_folder_that_may_not_be_read_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        list_images([tmp_path])


def test_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "photo[1].png"
    path.touch()
    assert list_images([path]) == (path,)


def test_nothing_to_list_is_refused_and_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / ".hidden.png").write_bytes(encoded())
    with pytest.raises(InputError, match=r"no image found there; left out: 1 hidden \(\.hidden\.png\)"):
        list_images([tmp_path])
    for paths in ([tmp_path / "*.png"], []):
        with pytest.raises(InputError, match="image"):
            list_images(paths)
