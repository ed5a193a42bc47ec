"""From outputs to answers: which classes are best, and with which scores."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.runtime.results import TopK, rank_classes
from repvgg_deploy.specs.values import ModelSpec
from tests.runtime.make_model import ModelOptions, make_metadata

SCORES = np.array([[1, 3, 3, 0], [2, 0, 0, 0]], np.float32)
BEST = [[1, 2, 0], [0, 1, 2]]  # of equal scores, the lower class first


def spec_of(kind: str) -> ModelSpec:
    return make_metadata(ModelOptions(kind=kind)).spec


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_rank_of_scores_is_best_first_and_the_lower_class_first_of_equal_ones(kind: str) -> None:
    ranked = list(rank_classes(SCORES, spec_of(kind), 3))
    assert [classes.tolist() for classes, _ in ranked] == BEST
    scores = np.exp(SCORES) / np.exp(SCORES).sum(1, keepdims=True) if kind == "logits" else SCORES
    expected = np.take_along_axis(scores, np.array(BEST), 1)
    np.testing.assert_allclose([found for _, found in ranked], expected, rtol=1e-6)  # NumPy's exp of float32 here


def test_rank_of_ranked_answers_keeps_their_order_and_takes_the_first() -> None:
    answer = TopK(np.array([[0.5, 0.25, 0.125]], np.float32), np.array([[7, 3, 1]]))
    ((classes, scores),) = rank_classes(answer, spec_of("top5"), 2)
    assert (classes.tolist(), scores.tolist(), scores.dtype) == ([7, 3], [0.5, 0.25], np.float64)


def test_rank_of_few_classes_gives_all_of_them() -> None:
    assert [len(classes) for classes, _ in rank_classes(SCORES, spec_of("probabilities"), 9)] == [4, 4]
