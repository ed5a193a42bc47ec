"""The committed sample is what its card says, and its script would train it again."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.images.decode import default_preprocessing, load_image, normalize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import Preprocessing, VariantSpec
from repvgg_deploy.specs.variants import count_macs, count_parameters, load_variant


@pytest.fixture(scope="module")
def sample() -> Path:
    return Path(__file__).resolve().parents[2] / "models" / "sample"


@pytest.fixture(scope="module")
def checkpoint(sample: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(sample / "repvgg-sample.pth", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def model(sample: Path, checkpoint: dict[str, Any]) -> RepVGG:
    built = RepVGG(load_variant(sample / "variant.toml"))
    built.load_state_dict(checkpoint["state_dict"], strict=True)
    return built.eval()


@pytest.fixture(scope="module")
def splits(sample: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    found = {}
    for name in ("eval", "calib"):
        with np.load(sample / f"{name}.npz", allow_pickle=False) as file:
            found[name] = (file["images"], file["labels"])
    return found


@pytest.fixture(scope="module")
def script(sample: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_train", sample / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def card(sample: Path) -> str:
    return (sample / "README.md").read_text(encoding="utf-8")


def test_sample_checkpoint_says_what_it_is(sample: Path, checkpoint: dict[str, Any]) -> None:
    note = checkpoint["repvgg_deploy"]
    assert codec.decode(VariantSpec, note["variant"]) == load_variant(sample / "variant.toml")
    assert codec.decode(Preprocessing, note["preprocessing"]) == default_preprocessing(32, 32)
    assert note["labels"] == list("0123456789")


def test_sample_is_small_enough_to_commit(sample: Path) -> None:
    assert (sample / "repvgg-sample.pth").stat().st_size < 4_000_000
    assert (
        sum(path.stat().st_size for path in sample.rglob("*") if path.is_file() and path.suffix != ".pyc") < 6_000_000
    )


def test_sample_card_states_hash_and_counts(sample: Path) -> None:
    spec, text = load_variant(sample / "variant.toml"), card(sample)
    assert sha256_file(sample / "repvgg-sample.pth") in text
    assert f"{(sample / 'repvgg-sample.pth').stat().st_size:,} bytes" in text
    assert (
        f"{count_parameters(spec, 'training'):,} parameters in training form, "
        f"{count_parameters(spec, 'deploy'):,} in deploy form" in text
    )
    assert f"{count_macs(spec, 32, 32) / 1e6:.1f} M multiply-accumulates" in text


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("eval", r"\*\*([\d.]+) %\*\* on the 400 evaluation"), ("calib", r"([\d.]+) % on the 256 calibration")],
)
def test_sample_top1_is_the_cards(model: RepVGG, sample: Path, splits: dict[str, Any], name: str, pattern: str) -> None:
    images, labels = splits[name]
    with torch.inference_mode():
        predicted = model(torch.from_numpy(normalize(images, default_preprocessing(32, 32)))).argmax(1).numpy()
    stated = re.search(pattern, card(sample))
    assert stated is not None
    # Another processor may round the other way at a tie: one image more or less.
    assert np.mean(predicted == labels) * 100 == pytest.approx(float(stated[1]), abs=100 / len(labels) + 0.005)


def test_sample_batchnorm_statistics_come_from_training(model: RepVGG) -> None:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    assert len(layers) == 13 * 2 + 8, "two branches a layer, and an identity where channels and size stay"
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        assert layer.running_mean.abs().max() > 1e-3 and (layer.running_var - 1).abs().max() > 1e-2, name
        assert (layer.weight - 1).abs().max() > 1e-3, name


def test_sample_splits_are_labelled_and_balanced(splits: dict[str, Any]) -> None:
    for name, count in (("eval", 400), ("calib", 256)):
        images, labels = splits[name]
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64
        assert np.bincount(labels, minlength=10).min() >= 0.9 * count / 10


@pytest.fixture(scope="module")
def made(script: ModuleType) -> Any:
    """The splits as the script makes them."""
    pytest.importorskip("sklearn", reason="the images are scikit-learn's")
    return script.load_splits()


def test_sample_splits_share_no_image(made: Any, splits: dict[str, Any]) -> None:
    train = {image.tobytes() for image in made["train"].images}
    evaluation, calibration = ({image.tobytes() for image in splits[name][0]} for name in ("eval", "calib"))
    assert len(train) == 1141
    assert not train & evaluation and not train & calibration and not evaluation & calibration


def test_sample_splits_are_what_the_script_makes(made: Any, splits: dict[str, Any]) -> None:
    for name, (images, labels) in splits.items():
        # Pillow's filter may round the other way in another version: one level.
        assert np.abs(made[name].images.astype(int) - images).max() <= 1
        np.testing.assert_array_equal(made[name].labels, labels)


@pytest.mark.parametrize("label", range(10))
def test_sample_image_is_the_first_of_its_class(sample: Path, splits: dict[str, Any], label: int) -> None:
    images, labels = splits["eval"]
    loaded = load_image(sample / "images" / f"digit-{label}.png", default_preprocessing(32, 32))
    np.testing.assert_array_equal(loaded, images[np.flatnonzero(labels == label)[0]])


def test_sample_script_with_equal_seeds_gives_equal_weights(
    script: ModuleType, sample: Path, splits: dict[str, Any]
) -> None:
    spec = VariantSpec("thin", (1, 1, 1, 1), (8, 8, 8, 8, 8), (1, 1, 1, 1, 1), num_classes=10)
    few = script.Split(splits["calib"][0][:16], splits["calib"][1][:16])
    options = [script.Options(sample, epochs=1, batch=8, seed=seed) for seed in (0, 0, 1)]
    states = [script.train(spec, few, option).state_dict() for option in options]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["linear.weight"], states[2]["linear.weight"])


def test_sample_augmentation_keeps_the_paper_and_moves_the_ink(script: ModuleType, splits: dict[str, Any]) -> None:
    images, _ = script.Split(splits["eval"][0][:8], splits["eval"][1][:8]).tensors()
    changed = script.augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert (changed != images).flatten(1).any(1).all()
    torch.testing.assert_close(changed.amin((2, 3)), images.amin((2, 3)))
