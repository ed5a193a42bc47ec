"""A label that is off by one is worse than none: indices known from elsewhere must have their names."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.classes import Classes, imagenet_labels, imagenet_wordnet_ids, index_folders, index_labels

KNOWN = {
    0: "tench", 1: "goldfish", 22: "bald eagle", 65: "sea snake", 88: "macaw", 107: "jellyfish", 130: "flamingo",
    134: "crane (bird)", 151: "Chihuahua", 207: "golden retriever", 217: "English springer", 235: "German shepherd",
    258: "Samoyed", 281: "tabby", 285: "Egyptian cat", 291: "lion", 309: "bee", 340: "zebra", 366: "gorilla",
    388: "giant panda", 404: "airliner", 407: "ambulance", 468: "cab", 482: "cassette player", 491: "chain saw",
    497: "church", 504: "coffee mug", 517: "crane (machine)", 566: "French horn", 569: "garbage truck",
    571: "gas pump", 574: "golf ball", 620: "laptop", 673: "mouse", 701: "parachute", 751: "racer", 779: "school bus",
    817: "sports car", 850: "teddy", 879: "umbrella", 895: "warplane", 920: "traffic light", 945: "bell pepper",
    954: "banana", 963: "pizza", 980: "volcano", 985: "daisy", 999: "toilet tissue",
}  # fmt: skip


def test_imagenet_labels_are_a_thousand_different_names() -> None:
    labels = imagenet_labels()
    assert len(set(labels)) == len(labels) == 1000
    assert all(label == label.strip() and 2 <= len(label) <= 40 for label in labels)


@pytest.mark.parametrize("index", KNOWN)
def test_imagenet_label_of_a_known_index_is_its_name(index: int) -> None:
    assert imagenet_labels()[index] == KNOWN[index]


@pytest.mark.parametrize(
    ("first", "last", "members"),
    [(151, 268, ("beagle", "pug", "Mexican hairless")), (281, 285, ("tabby", "Siamese cat"))],
)
def test_imagenet_labels_of_a_kind_stand_together(first: int, last: int, members: tuple[str, ...]) -> None:
    # Dogs are 151 to 268 and house cats 281 to 285, because the order is that of WordNet.
    labels = imagenet_labels()
    assert all(first <= labels.index(member) <= last for member in members)


def test_folders_of_wordnet_ids_are_found_in_an_imagenet_model_and_in_labels() -> None:
    imagenette = ["n01440764", "n02102040", "n03888257"]
    for labels in (imagenet_labels(), None):
        indices, how = index_folders(imagenette, Classes(labels, 1000), "set")
        assert [imagenet_labels()[index] for index in indices] == ["tench", "English springer", "parachute"]
        assert "WordNet" in how
    own = Classes(("n02102040 English springer", "n01440764 tench, Tinca tinca", "crane (n03126707)"), 3)
    assert index_folders(["n01440764", "n02102040", "n03126707"], own, "set")[0] == [1, 0, 2]
    assert index_folders(["Tinca_tinca"], own, "set")[0] == [1]
    assert list(imagenet_wordnet_ids()) == sorted(imagenet_wordnet_ids())


def test_labels_that_name_two_classes_name_none() -> None:
    classes = Classes(("crane, bird", "crane, machine", "bird"), 3)
    assert index_labels(["bird"], classes, "csv")[0] == [2]  # a whole label comes before a part of another
    with pytest.raises(InputError, match="'crane' is no class"):
        index_labels(["crane"], classes, "csv")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["Käse", "영희", "ガ", "é"])
def test_names_match_in_either_unicode_form(name: str, form: Any) -> None:
    others = ("cat", unicodedata.normalize("NFC", name)), ("cat", unicodedata.normalize("NFD", name))
    for labels in others:
        folder = unicodedata.normalize(form, name)
        assert index_folders([folder], Classes(labels, 2), "set")[0] == [1]
        assert index_labels([folder], Classes(labels, 2), "csv")[0] == [1]


def test_case_counts_and_a_name_in_another_case_is_suggested() -> None:
    letters = Classes(("a", "A"), 2)
    assert index_folders(["A", "a"], letters, "set")[0] == [1, 0]
    with pytest.raises(InputError, match="'Dog' is no class") as caught:
        index_folders(["Dog", "cat"], Classes(("cat", "dog"), 2), "set")
    assert "'dog'" in caught.value.remedy


@pytest.mark.parametrize(
    "labels",
    [
        ("parachute", "tench", "gas pump"),
        ("parachute, chute", "tench, Tinca tinca", "gas pump, gasoline pump"),
        ("parachute", "tench", "gas_pump"),
        ("Parachute", "Tench", "Gas pump"),
    ],
)
def test_wordnet_ids_are_known_of_every_model_of_imagenets_names(labels: tuple[str, ...]) -> None:
    found, how = index_folders(["n01440764", "n03425413", "n03888257"], Classes(labels, 3), "set")
    assert found == [1, 2, 0]
    assert "WordNet" in how


def test_wordnet_ids_are_not_guessed_where_a_label_is_nobodys_name() -> None:
    with pytest.raises(InputError, match="'n01440764' is no class"):
        index_folders(["n01440764"], Classes(("tench", "my own"), 2), "set")


def test_wordnet_ids_of_a_thousand_labels_that_call_some_classes_otherwise() -> None:
    others = tuple(f"{label}?" if index % 3 == 0 else label for index, label in enumerate(imagenet_labels()))
    assert index_folders(["n01440764", "n03888257"], Classes(others, 1000), "set")[0] == [0, 701]
    shuffled = tuple(reversed(imagenet_labels()))  # of another order, by their names
    assert index_folders(["n01440764"], Classes(shuffled, 1000), "set")[0] == [999]


def test_folders_of_numbers_say_that_image_folder_counts_them_as_texts() -> None:
    _, how = index_folders(["0", "1", "10", "2"], Classes(None, 11), "set")
    assert "--sorted-folders" in how
    _, how = index_folders(["00", "01", "02", "10"], Classes(None, 11), "set")
    assert "--sorted-folders" not in how


def test_labels_that_are_whole_floating_point_numbers_are_indices() -> None:
    assert index_labels(["2.0", "0.", "1"], Classes(None, 3), "csv")[0] == [2, 0, 1]
    with pytest.raises(InputError, match=r"'1\.5' is no class"):
        index_labels(["1.5"], Classes(None, 3), "csv")


@pytest.mark.parametrize("label", ["9" * 20, "9" * 400, "9" * 5000, "1" * 400 + ".0"])
def test_number_of_any_length_is_no_class(label: str) -> None:
    with pytest.raises(InputError, match="is no class of the model") as caught:
        index_labels([label, "1"], Classes(None, 10), "csv")
    assert len(str(caught.value)) < 400
