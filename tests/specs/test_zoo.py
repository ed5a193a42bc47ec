"""The cards agree with the variants, with the known hashes, and with the sample that stands here."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.specs.variants import PUBLISHED, get_variant
from repvgg_deploy.specs.zoo import CheckpointCard, find_card, find_card_by_name, load_cards

MODELS = Path(__file__).resolve().parents[2] / "models"
CARDS = load_cards()


@pytest.fixture(params=CARDS, ids=lambda card: card.file)
def card(request: pytest.FixtureRequest) -> CheckpointCard:
    found: CheckpointCard = request.param
    return found


def test_zoo_in_models_is_the_packages_own() -> None:
    # A link in the repository, a copy in a source distribution.
    own = MODELS.parent / "repvgg_deploy" / "data" / "zoo.toml"
    assert (MODELS / "zoo.toml").read_bytes() == own.read_bytes()


def test_zoo_holds_every_variant_with_a_published_file_once() -> None:
    variants = [card.variant for card in CARDS]
    assert sorted(variants) == sorted({*PUBLISHED, "sample"} - {"B2g2", "B3g2"})


def test_card_names_a_known_variant_and_an_accuracy_at_its_input_size(card: CheckpointCard) -> None:
    spec = get_variant(str(MODELS / "sample" / "variant.toml") if card.variant == "sample" else card.variant)
    assert spec.num_classes == card.classes
    assert card.input_size in [entry.image_size for entry in card.accuracy]
    assert all(70 < entry.top1_percent < 100 for entry in card.accuracy)
    assert card.licence and card.source


def test_card_states_size_and_hash_together_with_who_says_so(card: CheckpointCard) -> None:
    known = [value is not None for value in (card.bytes, card.sha256, card.hash_source)]
    assert all(known) or not any(known)
    assert card.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", card.sha256)


def test_card_size_is_that_of_its_variants_float32_tensors(card: CheckpointCard) -> None:
    if card.bytes is None:
        pytest.skip("no size is known")
    import torch

    from repvgg_deploy.model.network import RepVGG

    spec = get_variant(str(MODELS / "sample" / "variant.toml") if card.variant == "sample" else card.variant)
    with torch.device("meta"):
        state = RepVGG(dataclasses.replace(spec, auxiliary_heads=False)).state_dict()
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # What torch.save adds: names, alignment and a zip entry, less than 1 KiB a tensor.
    assert 0 < card.bytes - tensors < 1024 * len(state)


def test_find_card_by_hash_gives_its_card(card: CheckpointCard) -> None:
    if card.sha256 is None:
        pytest.skip("no hash is known")
    assert find_card(card.sha256) == card
    assert find_card(card.sha256.upper()) == card
    assert find_card_by_name(card.file) == card


def test_find_card_of_an_unknown_hash_or_name_is_none() -> None:
    assert find_card("0" * 64) is None
    assert find_card_by_name("resnet50.pth") is None


def test_card_summary_names_file_variant_and_accuracy() -> None:
    card = find_card_by_name("RepVGG-D2se-200epochs-train.pth")
    assert card is not None
    assert (
        card.summary()
        == "RepVGG-D2se-200epochs-train.pth (D2se, 1000 classes; published top-1 81.82 % at 224 px, 83.55 % at 320 px)"
    )


def test_card_of_the_sample_is_that_of_the_committed_file(sample_dir: Path) -> None:
    card = find_card(sha256_file(sample_dir / "repvgg-sample.pth"))
    assert card is not None and card.variant == "sample"
    assert card.bytes == (sample_dir / "repvgg-sample.pth").stat().st_size


def test_cards_agree_with_the_list_of_published_checkpoints(shared_data: Path) -> None:
    with (shared_data / "published_checkpoints.csv").open(encoding="utf-8") as file:
        rows = {row["file"]: (int(row["bytes"]), row["sha256"]) for row in csv.DictReader(file)}
    assert {card.file: (card.bytes, card.sha256) for card in CARDS if card.sha256 and card.variant != "sample"} == rows
