"""Agreement of two models against figures by hand, and layers whose channels were rescaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.evaluate.agreement import AgreementReport, compare, compare_layers, first_below
from repvgg_deploy.images.sets import ImageBatch
from repvgg_deploy.specs import codec


def logits(count: int = 60, classes: int = 7, *, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, classes)).astype(np.float32)


def batches_of(
    values: NDArray[np.float32], labels: NDArray[np.int64] | None = None, size: int = 16
) -> list[ImageBatch]:
    return [
        ImageBatch(values[start : start + size], None if labels is None else labels[start : start + size])
        for start in range(0, len(values), size)
    ]


def disturbed(batch: NDArray[Any]) -> NDArray[Any]:
    return batch + 0.3 * np.sin(40 * batch)


def test_report_is_what_a_calculation_by_hand_gives() -> None:
    truth = logits()
    labels = np.random.default_rng(1).integers(0, 7, 60)
    found = disturbed(truth)
    report = compare(lambda batch: batch, disturbed, batches_of(truth, labels))
    error = (truth.astype(np.float64) - found.astype(np.float64)).ravel()
    assert report.images == 60
    assert report.agreement == (truth.argmax(1) == found.argmax(1)).mean() < 1
    assert report.output.kind == "logits"
    assert report.output.largest == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert report.output.rms == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
    assert report.output.sqnr_db == pytest.approx(
        10 * np.log10((truth.astype(float) ** 2).sum() / (error**2).sum()), rel=1e-6
    )
    assert report.reference.top1 == (truth.argmax(1) == labels).mean()
    assert report.other.top1 == (found.argmax(1) == labels).mean()
    assert codec.loads(AgreementReport, codec.dumps(report)) == report


def test_equal_models_agree_entirely_and_labels_are_optional() -> None:
    report = compare(lambda batch: batch, lambda batch: batch, batches_of(logits()))
    assert (report.agreement, report.output.largest, report.output.sqnr_db) == (1.0, 0.0, 200.0)
    assert report.reference is None
    assert report.other is None


def test_answers_of_different_kinds_are_compared_by_class_only() -> None:
    report = compare(lambda batch: batch, np.exp, batches_of(logits()), kind=None)
    assert report.agreement == 1.0
    assert report.output is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="7 and 6 classes"):
        compare(lambda batch: batch, lambda batch: batch[:, :6], batches_of(logits()))
    with pytest.raises(InputError, match="no image could be compared"):
        compare(lambda batch: batch, lambda batch: batch, [])
    with pytest.raises(ModelError, match="NaN"):
        compare(lambda batch: batch, lambda batch: batch * np.float32(np.nan), batches_of(logits()))


def layer_values(*, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {
        "one": generator.standard_normal((8, 6, 5, 5)).astype(np.float32),
        "two": (generator.standard_normal((8, 4, 3, 3)) + 0.5).astype(np.float32),
        "linear": generator.standard_normal((8, 10)).astype(np.float32),
    }


def as_pairs(truth: dict[str, Any], found: dict[str, Any], size: int = 3) -> list[dict[str, Any]]:
    return [
        {name: (truth[name][start : start + size], found[name][start : start + size]) for name in truth}
        for start in range(0, 8, size)
    ]


def test_layers_that_are_equal_or_only_rescaled_have_no_noise() -> None:
    truth = layer_values()
    equal = compare_layers(as_pairs(truth, truth), fixed={"linear"})
    assert [layer.name for layer in equal] == ["one", "two", "linear"]
    assert all((layer.sqnr_db, layer.smallest_factor, layer.largest_factor) == (200.0, 1.0, 1.0) for layer in equal)
    scale = np.exp2(np.arange(6) - 3).astype(np.float32).reshape(1, 6, 1, 1)
    rescaled = compare_layers(as_pairs(truth, {**truth, "one": truth["one"] / scale}))[0]
    assert rescaled.sqnr_db > 140  # sums of squares in float64
    assert (rescaled.smallest_factor, rescaled.largest_factor) == (pytest.approx(1 / 8), pytest.approx(4))


def test_layers_with_noise_have_its_ratio_however_their_channels_are_scaled() -> None:
    truth = layer_values()
    noise = 0.05 * np.random.default_rng(3).standard_normal(truth["one"].shape).astype(np.float32)
    scale = np.random.default_rng(4).uniform(0.01, 30, (1, 6, 1, 1)).astype(np.float32)
    expected = 10 * np.log10((truth["one"].astype(float) ** 2).sum() / (noise.astype(float) ** 2).sum())
    layer = compare_layers(as_pairs(truth, {**truth, "one": (truth["one"] + noise) / scale}))[0]
    assert layer.sqnr_db == pytest.approx(expected, abs=0.1)  # the fitted factor takes a little of the noise with it
    fixed = compare_layers(as_pairs(truth, {**truth, "one": (truth["one"] + noise) / scale}), fixed={"one"})[0]
    assert fixed.sqnr_db < 5  # the classifier's scale is not undone


def test_layers_with_dead_or_contrary_channels_count_them_as_lost() -> None:
    truth = layer_values()
    dead = truth["one"].copy()
    dead[:, 2] = 0
    contrary = truth["one"].copy()
    contrary[:, 2] *= -1  # no positive factor undoes that
    lost = 10 * np.log10((truth["one"].astype(float) ** 2).sum() / (truth["one"][:, 2].astype(float) ** 2).sum())
    for values in (dead, contrary):
        layer = compare_layers(as_pairs(truth, {**truth, "one": values}))[0]
        assert layer.sqnr_db == pytest.approx(lost)
    nothing = compare_layers(as_pairs(truth, {**truth, "one": np.zeros_like(dead)}))[0]
    assert (nothing.sqnr_db, nothing.smallest_factor) == (0.0, 1.0)


def test_first_layer_below_a_bound_is_where_two_models_part() -> None:
    truth = layer_values()
    layers = compare_layers(as_pairs(truth, {**truth, "two": truth["two"] + 0.5 * np.sin(99 * truth["two"])}))
    assert first_below(layers, 20) == "two"
    assert first_below(layers, 1) is None
