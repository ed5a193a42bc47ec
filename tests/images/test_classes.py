"""A label that is off by one is worse than none: indices known from elsewhere must have their names."""

from __future__ import annotations

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
    assert index_folders(["tinca_tinca"], own, "set")[0] == [1]
    assert list(imagenet_wordnet_ids()) == sorted(imagenet_wordnet_ids())


def test_labels_that_name_two_classes_name_none() -> None:
    classes = Classes(("crane, bird", "crane, machine", "bird"), 3)
    assert index_labels(["bird"], classes, "csv")[0] == [2]  # a whole label comes before a part of another
    with pytest.raises(InputError, match="'crane' is no class"):
        index_labels(["crane"], classes, "csv")
