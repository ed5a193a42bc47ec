"""Files of class names as people have them: read rightly, or refused by the name of what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.labels import read_labels, require_printable

NAMES = ("tench", "great white shark", "crane, bird")
READ = {
    "lines": "tench\ngreat white shark\ncrane, bird\n",
    "lines with Windows's ends": "tench\r\ngreat white shark\r\ncrane, bird",
    "class_index.json": json.dumps({str(i): [f"n0000000{i}", name] for i, name in enumerate(NAMES)}),
    "class_index.json out of order": json.dumps({str(i): NAMES[i] for i in (2, 0, 1)}),
    "id2label in a config.json": json.dumps({"model_type": "x", "id2label": {str(i): n for i, n in enumerate(NAMES)}}),
    "label2id": json.dumps({"label2id": {name: index for index, name in enumerate(NAMES)}}),
    "class_to_idx": json.dumps({NAMES[1]: 1, NAMES[2]: 2, NAMES[0]: 0}),
    "JSON list": json.dumps(NAMES),
    "categories of COCO": json.dumps({"categories": [{"id": i, "name": NAMES[i]} for i in (1, 0, 2)]}),
    "Python dict": "{0: 'tench',\n 1: 'great white shark',\n 2: 'crane, bird'}\n",
    "Python list": "['tench', 'great white shark', 'crane, bird',]",
    "Python dict of names": "{'tench': 0, 'crane, bird': 2, 'great white shark': 1}",
    "number first": "0 tench\n1 great white shark\n2 crane, bird\n",
    "number first, out of order": "2: crane, bird\n0: tench\n1: great white shark\n",
    "number first, comma": '0,tench\n1,great white shark\n2,"crane, bird"\n',
    "number first, header": 'id,name\n0,tench\n1,great white shark\n2,"crane, bird"\n',
    "number first, tab": "0\ttench\n1\tgreat white shark\n2\tcrane, bird\n",
    "number first, dot": "0. tench\n1. great white shark\n2. crane, bird\n",
    "number last": "tench: 0\ncrane, bird: 2\ngreat white shark: 1\n",
    "number last, space": "tench 0\ngreat white shark 1\ncrane, bird 2\n",
}


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "labels.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_are_read_in_the_order_of_the_classes(kind: str, encoding: str, tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, READ[kind].encode(encoding))) == NAMES


KEPT = {
    "numbers that tell the names apart": "digit 0\ndigit 1\ndigit 2",
    "ratings": "1 star\n2 stars\n3 stars",
    "measures": "0.2 mm\n1.5 mm",
    "WordNet's lines": "n01440764 tench, Tinca tinca\nn01443537 goldfish",
    "numbers alone": "0\n1\n2",
    "numbers that are not the classes'": "7 tench\n9 shark",
    "numbers too long for a class": f"{'9' * 5000} tench\n1 shark",
    "models": "Audi 100\nVolvo 240",
    "a name in brackets": "[background]\ncat\n[other]",
    "no name in between": "cat\n\ndog",
}


@pytest.mark.parametrize("kind", KEPT)
def test_lines_that_are_names_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, KEPT[kind])) == tuple(KEPT[kind].split("\n"))


REFUSED = {
    "YAML": ("names:\n  - tench\n  - shark\n", "YAML"),
    "YAML of Ultralytics": ("names:\n  0: tench\n  1: shark\n", "YAML"),
    "protobuf text": ("item {\n id: 1\n name: 'tench'\n}\n", "protobuf"),
    "Python program": ("names = ['tench',\n 'shark']\n", "program"),
    "JSON that is cut off": ('{"0": "tench",\n "1": "sha', "cut off"),
    "JSON of something else": ('{"images": {"a": [3]}}', "no list of names"),
    "JSON from 1": ('{"1": "tench", "2": "shark"}', "from 1 to 2, expected 0 to 1"),
    "JSON with a gap": ('{"0": "tench", "2": "shark"}', "from 0 to 2"),
    "JSON with a key twice": ('{"0": "tench", "0": "shark"}', "key twice"),
    "numbers from 1": ("1 tench\n2 shark\n", "do not count the classes from 0"),
    "numbers from 1 behind": ("tench: 1\nshark: 2\n", "do not count the classes from 0"),
    "numbers from 1 out of order": ("2 shark\n1 tench\n", "do not count the classes from 0"),
    "numbers from 1 in another order than those from 0": ("0 a 2\n1 b 1\n", "do not count the classes from 0"),
    "numbers from 1 with gaps": ("1 person\n3 car\n90 brush\n", "do not count the classes from 0"),
    "numbers from 0 with gaps": ("0,tench\n2,shark\n", "do not count the classes from 0"),
    "numbers that are all 0": ("0 tench\n0 shark\n0 crane\n", "do not count the classes from 0"),
    "numbers that are all 0, header": ("id,name\n0,tench\n0,shark\n", "do not count the classes from 0"),
    "JSON with a number too long": ('{"' + "9" * 5000 + '": "tench"}', "no list of names"),
    "two numbers": ("0 a 1\n1 b 0\n", "two numbers"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "Git LFS pointer"),
    "web page": ("<!DOCTYPE html>\n<html></html>\n", "HTML"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(30), "an image"),
    "Latin-1": ("tench\nKäse".encode("latin-1"), r"line 2 is not in UTF-8 \(byte 0xe4\)"),
    "escape sequence": ("tench\n\x1b[31mshark\n", r"class 1 holds a control character, U\+001B"),
    "NUL": ("tench\nsha\0rk\n", r"U\+0000"),
    "form feed": ("tench\x0cshark\n", r"class 0 holds a control character, U\+000C"),
    "line separator": ("tench\u2028shark\n", r"U\+2028"),
    "text turned around": ("tench\u202eshark\n", r"U\+202E"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_rightly_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    text, message = REFUSED[kind]
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["0 stage 1\n1 stage 2", '["stage 1", "stage 2"]'])
def test_names_that_end_with_numbers_of_their_own_are_read(text: str, tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, text)) == ("stage 1", "stage 2")


def test_labels_that_cannot_be_read_are_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be read as labels"):
            read_labels(path)


def test_deep_json_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cut off"):
        read_labels(write(tmp_path, "[" * 100_000 + "]" * 100_000))


def test_letters_of_every_script_may_be_printed() -> None:
    labels = ("Käse", "치즈", "می‌خواهم", "👩‍🔬", "שלום")
    assert require_printable(labels, "x") == labels
