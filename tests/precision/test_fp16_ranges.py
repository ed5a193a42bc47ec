"""What is bounded without images, against what photographs really give."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.export.export import ExportOptions, export_checkpoint
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.images.decode import normalize
from repvgg_deploy.precision.fp16 import UNSEEN, draw_batches, find_ranges, measure_ranges, to_fp16
from repvgg_deploy.precision.typed_model import Parent, load_parent
from tests.precision.compare import sqnr, values


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Parent:
    path = tmp_path_factory.mktemp("a0") / "a0.onnx"
    export_checkpoint(
        shared_data / "repvgg-a0-imagenette.pth", path, options=ExportOptions(graph=GraphOptions(image_size=(128, 128)))
    )
    return load_parent(path)


@pytest.fixture(scope="module")
def photographs(shared_data: Path, trained: Parent) -> list[np.ndarray]:
    with np.load(shared_data / "imagenette128.npz") as data:
        blob, offset = data["blob"], data["offset"]
        split = data["split"]
    files = [blob[offset[index] : offset[index + 1]].tobytes() for index in np.flatnonzero(split == 0)[::300]]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return [normalize(images, trained.metadata.spec.preprocessing)]


def test_find_ranges_without_images_bound_what_photographs_give(trained: Parent, photographs: list[np.ndarray]) -> None:
    measured = measure_ranges(trained.network, photographs)
    bounds, known_from, _ = find_ranges(trained, None)
    assert known_from == "statistics"
    assert len([name for name in trained.metadata.statistics if name.endswith(".conv")]) == 22
    # Every single channel, before the margin of 8 that to_fp16 adds.
    assert all((measured[name] <= bound).all() for name, bound in bounds.items())
    drawn = measure_ranges(trained.network, draw_batches(trained.metadata.spec))
    assert all(measured[name].max() <= UNSEEN * value.max() for name, value in drawn.items())


def test_fp16_trained_network_is_the_same_with_and_without_images(
    trained: Parent, photographs: list[np.ndarray]
) -> None:
    truth = values(trained.network.model, photographs)[0]
    for batches in (photographs, None):
        typed, report = to_fp16(trained, batches)
        found = values(typed.model, photographs)[0]
        assert report.rescaled == {}  # nothing in it comes near either end
        # 22 layers, each rounding to 2⁻¹²: measured 63 dB.
        assert sqnr([found], [truth]) > 55
        assert np.array_equal(found.argmax(1), truth.argmax(1))
