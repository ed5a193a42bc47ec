"""Lists of images as people write them: understood, or named."""

from __future__ import annotations

from pathlib import Path

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.lists import read_list
from tests.images.make_images import save_images

PATHS = ["a.png", "my photos/b c.png", "my photos/d.png"]
UNDERSTOOD = {
    "spaces, as in Caffe": ("a.png 2\nmy photos/b c.png 0\nmy photos/d.png 1\n", ["2", "0", "1"]),
    "spaces and names": ("a.png dog\nmy photos/b c.png cat\nmy photos/d.png cow\n", ["dog", "cat", "cow"]),
    "spaces, quoted": ('"a.png" 2\n"my photos/b c.png" 0\n"my photos/d.png" 1\n', ["2", "0", "1"]),
    "paths alone": ("\n".join(PATHS), None),
    "backslashes": ("a.png,2\nmy photos\\b c.png,0\nmy photos\\d.png,1\n", ["2", "0", "1"]),
    "backslashes and spaces": ("a.png 2\nmy photos\\b c.png 0\nmy photos\\d.png 1\n", ["2", "0", "1"]),
    "floats": ("path,label\na.png,2.0\nmy photos/b c.png,0.0\nmy photos/d.png,1.0\n", ["2.0", "0.0", "1.0"]),
    "tabs and commas": ("a.png\ttench, b\nmy photos/b c.png\tcat\nmy photos/d.png\tcow\n", ["tench, b", "cat", "cow"]),
    "semicolons": ("a.png;2\nmy photos/b c.png;0\nmy photos/d.png;1\n", ["2", "0", "1"]),
    "one-hot": ("a.png,0,0,1\nmy photos/b c.png,1,0,0\nmy photos/d.png,0,1,0\n", ["2", "0", "1"]),
    "one-hot, spaces": ("a.png 0 0 1\nmy photos/b c.png 1 0 0\nmy photos/d.png 0 1 0\n", ["2", "0", "1"]),
    "one-hot, named": (
        "image,cat,cow,dog\na.png,0.0,0.0,1.0\nmy photos/b c.png,1.0,0.0,0.0\nmy photos/d.png,0.0,1.0,0.0\n",
        ["dog", "cat", "cow"],
    ),
    "columns that say more": (
        "id,image,width,label\n7,a.png,9,dog\n8,my photos/b c.png,9,cat\n9,my photos/d.png,9,cow\n",
        ["dog", "cat", "cow"],
    ),
    "header and spaces": ("path label\na.png dog\nmy photos/b c.png cat\nmy photos/d.png cow\n", ["dog", "cat", "cow"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNDERSTOOD)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_list_is_understood(kind: str, encoding: str, tmp_path: Path) -> None:
    files = save_images(tmp_path, PATHS)
    text, labels = UNDERSTOOD[kind]
    (tmp_path / "list.txt").write_text(text, encoding=encoding)
    found = read_list(tmp_path / "list.txt")
    assert list(found.paths) == files
    assert found.labels == labels


def test_name_with_a_space_and_a_number_is_one_path(tmp_path: Path) -> None:
    files = save_images(tmp_path, ["photo 1.png", "photo 2.png"])
    (tmp_path / "list.txt").write_text("photo 1.png\nphoto 2.png\n")
    assert read_list(tmp_path / "list.txt").paths == tuple(files)


REFUSED = {
    "JSON": ('[{"file": "a.png", "label": 1}]', "is JSON"),
    "several classes": ("image,cat,dog\na.png,1,1\n", "line 2: 2 of 2 classes are 1"),
    "no class": ("image,cat,dog\na.png,0,0\n", "line 2: 0 of 2 classes are 1"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "Git LFS pointer"),
    "other columns": ("a.png,dog,big\n", "expected the columns path,label"),
    "absent": ("a.png 1\nb.png 2\n", "1 of 2 files do not exist, the first on line 2: .*b.png"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_list_that_is_not_understood_is_named(kind: str, tmp_path: Path) -> None:
    save_images(tmp_path, ["a.png"])
    text, message = REFUSED[kind]
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_list(tmp_path / "list.txt")
    assert caught.value.remedy
