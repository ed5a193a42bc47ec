"""Accuracy on labelled batches: against a count by hand, with ties, skipped images, and answers that are no numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.evaluate.accuracy import AccuracyReport, evaluate, rank, standard_error
from repvgg_deploy.images.sets import ImageBatch
from repvgg_deploy.specs import codec

NAMES = tuple(f"class {index}" for index in range(8))


@dataclass
class TopK:
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


def make_batches(
    count: int = 100, classes: int = 8, size: int = 16
) -> tuple[list[ImageBatch], NDArray[np.float32], NDArray[np.int64]]:
    """Batches whose images are the logits themselves."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    logits = generator.standard_normal((count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    batches = [
        ImageBatch(logits[start : start + size], labels[start : start + size]) for start in range(0, count, size)
    ]
    return batches, logits, labels


def test_report_is_what_a_count_by_hand_gives() -> None:
    batches, logits, labels = make_batches()
    report = evaluate(lambda batch: batch, batches, labels=NAMES, worst=3)
    best = logits.argmax(axis=1)
    right = best == labels
    above = (logits > logits[np.arange(100), labels][:, None]).sum(axis=1)
    assert report.images == 100
    assert report.top1 == right.mean()
    assert report.top5 == (above < 5).mean()
    assert report.top1_standard_error == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 100))
    shares = {index: right[labels == index].mean() for index in range(8)}
    assert [item.top1 for item in report.worst] == sorted(shares.values())[:3]
    for item in report.worst:
        assert item.label == NAMES[item.index]
        assert item.images == (labels == item.index).sum()
        assert item.top1 == shares[item.index]
        wrong = best[(labels == item.index) & ~right]
        counts = sorted(np.bincount(wrong, minlength=8).tolist(), reverse=True)[:3]
        assert [other.images for other in item.confused_with] == [count for count in counts if count]
        assert all((wrong == other.index).sum() == other.images for other in item.confused_with)


def test_report_of_a_ranked_answer_is_that_of_its_scores() -> None:
    batches, _, _ = make_batches()

    def ranked(batch: NDArray[Any]) -> TopK:
        classes = np.argsort(-batch, axis=1)[:, :5]
        return TopK(np.take_along_axis(batch, classes, axis=1), classes.astype(np.int64))

    one, two = evaluate(lambda batch: batch, batches), evaluate(ranked, batches)
    assert (one.top1, one.top5, one.worst) == (two.top1, two.top5, two.worst)
    assert one.worst[0].label is None


def test_report_round_trips_as_json() -> None:
    report = evaluate(lambda batch: batch, make_batches()[0], labels=NAMES)
    assert codec.loads(AccuracyReport, codec.dumps(report)) == report


def test_perfect_model_has_no_worst_class_and_few_classes_have_full_top5() -> None:
    batches = [ImageBatch(np.eye(3, dtype=np.float32), np.arange(3))]
    report = evaluate(lambda batch: batch, batches)
    assert (report.top1, report.top5, report.worst, report.top1_standard_error) == (1.0, 1.0, (), 0.0)


def test_equal_scores_rank_the_lower_class_first() -> None:
    assert rank(np.zeros((1, 7), np.float32)).tolist() == [[0, 1, 2, 3, 4]]


def test_skipped_images_count_nowhere_else_and_progress_sees_them() -> None:
    empty = ImageBatch(np.empty((0, 3), np.float32), np.empty(0, np.int64), ("c.png: damaged",))
    first = ImageBatch(np.eye(3, dtype=np.float32), np.array([0, 1, 0]), ("a.png: damaged", "b.png: damaged"))
    seen: list[int] = []
    report = evaluate(lambda batch: batch, [first, empty], progress=seen.append)
    assert (report.images, report.skipped, report.top1) == (3, 3, pytest.approx(2 / 3))
    assert seen == [5, 1]


def test_time_is_split_into_decoding_and_inference() -> None:
    def slow_batches():
        for batch in make_batches(32)[0]:
            time.sleep(0.03)
            yield batch

    def slow_run(batch: NDArray[Any]) -> NDArray[Any]:
        time.sleep(0.01)
        return batch

    report = evaluate(slow_run, slow_batches())
    assert report.decode_seconds >= 0.06
    assert 0.02 <= report.inference_seconds
    assert report.decode_images_per_second == pytest.approx(32 / report.decode_seconds)
    assert report.inference_images_per_second == pytest.approx(32 / report.inference_seconds)


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(InputError, match="no labels"):
        evaluate(lambda batch: batch, [ImageBatch(np.eye(3, dtype=np.float32), None)])
    with pytest.raises(InputError, match="no image could be evaluated, 1 could not be read"):
        evaluate(lambda batch: batch, [ImageBatch(np.empty((0, 3)), None, ("a.png: damaged",))])
    for value in (np.nan, np.inf):
        with pytest.raises(ModelError, match="NaN or infinities"):
            evaluate(lambda batch, value=value: batch * np.float32(value), make_batches()[0])


def test_standard_error_is_that_of_a_binomial_share() -> None:
    draws = np.random.default_rng(0).binomial(400, 0.8, 20000) / 400
    assert standard_error(0.8, 400) == pytest.approx(draws.std(), rel=0.02)
