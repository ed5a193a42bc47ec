"""Pictures: they say what they must, nothing overlaps, equal data gives equal bytes, and empty data is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from repvgg_deploy.errors import ArtifactError, InputError, MissingDependencyError
from repvgg_deploy.evaluate.accuracy import ConfusionMatrix
from repvgg_deploy.evaluate.figures import open_figure, require_drawable, save_figure
from repvgg_deploy.evaluate.plots import (
    AccuracyRow,
    ChannelSpread,
    SqnrSeries,
    draw_accuracy,
    draw_confusion,
    draw_layer_sqnr,
    draw_ranges,
)

LAYERS = (
    "stage0.conv",
    *(f"stage{stage}.{index}.conv" for stage, depth in ((1, 2), (2, 4), (3, 14), (4, 1)) for index in range(depth)),
    "linear",
)
FALLING = tuple(45 - 1.2 * index for index in range(len(LAYERS)))

PICTURES: dict[str, Callable[[], Figure]] = {
    "one model": lambda: draw_layer_sqnr(
        [SqnrSeries("int8.onnx", LAYERS, FALLING)], reference="fp32.onnx", bound_db=20
    ),
    "five models": lambda: draw_layer_sqnr(
        [SqnrSeries(f"method {index}", LAYERS, tuple(value + 5 * index for value in FALLING)) for index in range(5)],
        reference="fp32",
        bound_db=20,
    ),
    "equal and negative": lambda: draw_layer_sqnr(
        [SqnrSeries("x", ("a", "b", "c"), (200.0, 3.0, -12.0))], reference="y"
    ),
    "ranges": lambda: draw_ranges(
        [ChannelSpread(name, 2.0 + index, 1.3, "output x" if index == 4 else None) for index, name in enumerate(LAYERS)]
    ),
    "one range": lambda: draw_ranges(
        [ChannelSpread("a layer with a very long name indeed, of some module.conv", 1.0, 1.0)]
    ),
    "accuracy": lambda: draw_accuracy(
        [
            AccuracyRow("FP32", 0.8585, 0.0078, True),
            AccuracyRow("a method whose name is too long for one line beside the axis", 0.76, 0.0095),
        ]
    ),
    "perfect accuracy": lambda: draw_accuracy([AccuracyRow("FP32", 1.0, 0.0)]),
    "no accuracy": lambda: draw_accuracy([AccuracyRow("FP32", 0.0, 0.0), AccuracyRow("INT8", 0.02, 0.01)]),
    "confusion": lambda: draw_confusion(
        ConfusionMatrix(
            (0, 3, 7),
            ("French horn", "a class with a name that goes on and on", None),
            ((120, 30, 50), (9, 0, 10), (0, 1, 39)),
            (0, 0, 0),
        )
    ),
    "part of a confusion": lambda: draw_confusion(
        ConfusionMatrix(tuple(range(20)), (None,) * 20, tuple((index,) * 20 for index in range(20)), (5,) * 20)
    ),
}


def drawn(places: Any, labels: Any, limits: tuple[float, float]) -> list[Any]:
    """Matplotlib keeps labels beyond the axis, too, and does not draw them."""
    return [label for place, label in zip(places, labels, strict=True) if min(limits) <= place <= max(limits)]


@pytest.mark.parametrize("name", PICTURES)
def test_picture_has_title_units_and_nothing_that_overlaps_and_is_the_same_each_time(name: str, tmp_path: Path) -> None:
    figure = PICTURES[name]()
    assert save_figure(figure, tmp_path / "p.png") == "written"
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 150
    require_readable(figure, name)
    assert save_figure(PICTURES[name](), tmp_path / "p.png") == "up to date"


def require_readable(figure: Figure, name: str) -> None:
    axes = figure.axes[0]
    assert axes.get_title(loc="left")
    assert axes.get_xlabel()
    renderer = figure.canvas.get_renderer()
    legend = [axes.get_legend().get_window_extent(renderer)] if axes.get_legend() else []
    x_labels = [
        label.get_window_extent(renderer) for label in drawn(axes.get_xticks(), axes.get_xticklabels(), axes.get_xlim())
    ]
    y_labels = [
        label.get_window_extent(renderer) for label in drawn(axes.get_yticks(), axes.get_yticklabels(), axes.get_ylim())
    ]
    notes = [text.get_window_extent(renderer) for text in axes.texts]
    title = axes._left_title.get_window_extent(renderer)
    for group in ([title, *legend, *notes], y_labels, x_labels):
        for one, two in combinations(group, 2):
            assert not (one.shrunk(0.9, 0.9)).overlaps(two.shrunk(0.9, 0.9)), name
    for box in (title, *legend, *notes, *x_labels, *y_labels):
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.width + 1, name
        assert box.y1 <= figure.bbox.height + 1


def test_picture_names_both_models_and_its_bound() -> None:
    axes = PICTURES["one model"]().axes[0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["int8.onnx against fp32.onnx", "20 dB: below it, they part"]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["stage0", "stage1.0"]


def test_axis_that_does_not_begin_at_zero_says_so() -> None:
    assert "does not begin at 0" in PICTURES["accuracy"]().axes[0].get_xlabel()
    assert "begin" not in PICTURES["no accuracy"]().axes[0].get_xlabel()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_layer_sqnr([], reference="x"),
        lambda: draw_layer_sqnr([SqnrSeries("x", (), ())], reference="x"),
        lambda: draw_ranges([]),
        lambda: draw_accuracy([]),
        lambda: draw_confusion(ConfusionMatrix((), (), (), ())),
    ],
)
def test_picture_of_nothing_is_refused(draw: Callable[[], Figure]) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        draw()


def test_picture_does_not_replace_another_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    save_figure(PICTURES["one range"](), path)
    with pytest.raises(ArtifactError, match="exists and differs"):
        save_figure(PICTURES["accuracy"](), path)
    assert save_figure(PICTURES["accuracy"](), path, force=True) == "written"


def test_picture_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_drawable(tmp_path / "p.png")
    for path in (tmp_path / "p.jpg", tmp_path / "nowhere" / "p.png"):
        with pytest.raises(InputError, match=r"ends in \.png"):
            require_drawable(path)
    with pytest.raises(InputError, match=r"ends in \.png"):
        save_figure(PICTURES["one range"](), tmp_path / "p.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="matplotlib") as caught, open_figure(1, 1):
        pass
    assert "'.[plot]'" in caught.value.remedy
    with pytest.raises(MissingDependencyError):
        require_drawable(tmp_path / "p.png")
