"""Outputs behind TopK, ArgMax and NonMaxSuppression: compared as sets, cut off, refused where nothing can be said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from repvgg_deploy import Engine, export_module
from repvgg_deploy.errors import InputError, ParityError
from repvgg_deploy.export import fold
from repvgg_deploy.export import module as pipeline
from repvgg_deploy.export.choices import Choice, Choices, Trial, find_choices, judge_outputs, with_outputs
from repvgg_deploy.export.fold import FoldOptions, fold_onnx
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.model.tolerance import require_passed
from tests.export.make_modules import CHANNELS, Sum, conv_bn, make_module
from tests.graph.make_blocks import BLOCKS, Draw
from tests.model.random_blocks import randomise

CLASSES, KEPT = 5, 20


class Detector(nn.Module):
    """A re-parameterizable block, boxes and scores of every position."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.body = make_module(Sum(conv_bn(3), conv_bn(1), nn.BatchNorm2d(CHANNELS)))
        self.boxes, self.scores = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(CHANNELS, CLASSES, 1)
        self.flat = flat

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        boxes, scores = (head(features).flatten(2).transpose(1, 2) for head in (self.boxes, self.scores))
        scores = scores.sigmoid()
        return boxes, scores * 0 if self.flat else scores


class Best(Detector):
    """As YOLOv10 does: the best positions, then the best classes of these."""

    def forward(self, x: Tensor) -> Tensor:
        boxes, scores = self.predict(x)
        index = scores.amax(2).topk(KEPT, 1)[1].unsqueeze(2)
        boxes, scores = boxes.gather(1, index.expand(-1, -1, 4)), scores.gather(1, index.expand(-1, -1, CLASSES))
        best, flat = scores.flatten(1).topk(KEPT, 1)
        boxes = boxes.gather(1, (flat // CLASSES).unsqueeze(2).expand(-1, -1, 4))
        return torch.cat([boxes, best.unsqueeze(2), (flat % CLASSES).unsqueeze(2).float()], 2)


class Queries(Detector):
    """As RT-DETR does: the best positions look at one another, so that each depends on which were chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, scores = self.predict(x)
        best, index = scores.amax(2).topk(KEPT, 1)
        boxes = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        weights = torch.softmax(boxes @ boxes.transpose(1, 2), 2)
        return {"boxes": boxes + self.mix(weights @ boxes), "best": best}


class Segments(Detector):
    """The best class of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.body(x)).argmax(1)


def make_detector(kind: type[Detector], **more: Any) -> Detector:
    torch.manual_seed(0)
    model = kind(**more)
    randomise(model)
    return model.eval()


IMAGE = torch.randn(2, 3, 17, 15, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "names"), [(Best, "output"), (Queries, "boxes, best")])
def test_export_module_outputs_behind_topk_are_compared_as_sets(
    kind: type[Detector], names: str, tmp_path: Path
) -> None:
    result = export_module(make_detector(kind), IMAGE, tmp_path / "m.onnx")
    certificate = read_metadata(tmp_path / "m.onnx").certificate
    assert certificate.passed
    assert certificate.reference.endswith(
        f"1 region folded; {names} behind TopK: compared as sets, and the tensors before them as numbers"
    )
    labels = [check.name for check in certificate.checks]
    label = names.replace(", ", " + ")
    assert f"ONNX, {label}, another batch, as a set" in labels
    # boxes, scores, and their largest, as numbers, in each of four batches
    assert sum(name.startswith("ONNX, /") for name in labels) >= 8
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output] == names.split(", ")
    assert result.metadata.spec.outputs[0].shape[:2] == ("batch", KEPT)


def test_export_module_argmax_is_compared_position_by_position(tmp_path: Path) -> None:
    model = make_detector(Segments)
    export_module(model, IMAGE, tmp_path / "m.onnx")
    metadata = read_metadata(tmp_path / "m.onnx")
    assert "output behind ArgMax" in metadata.certificate.reference
    shares = [check for check in metadata.certificate.checks if "share of positions that differ" in check.name]
    assert [check.error for check in shares] == [0.0] * 4 and max(check.tolerance for check in shares) < 0.01
    with Engine(tmp_path / "m.onnx") as engine, torch.no_grad():
        found = engine.infer(IMAGE.numpy())
        assert isinstance(found, np.ndarray)
        assert np.mean(found != model(IMAGE).numpy()) < 0.01  # rounding decides where two classes are as likely


def spoil_attribute(kind: str, name: str, value: int) -> Any:
    def spoil(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == kind][-1]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute(name, value))

    return spoil


def spoil_count(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "TopK"][-1]
    count = next(t for t in model.graph.initializer if t.name == node.input[1])
    count.CopyFrom(numpy_helper.from_array(np.array([KEPT - 1]), count.name))


def spoil_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (Best, spoil_attribute("TopK", "largest", 0)),
        (Best, spoil_weight),
        (Queries, spoil_attribute("TopK", "largest", 0)),
        (Queries, spoil_attribute("Softmax", "axis", 1)),
        (Segments, spoil_attribute("ArgMax", "select_last_index", 1)),
        (Segments, spoil_weight),
    ],
)
def test_export_module_wrong_post_processing_is_caught(
    kind: type[Detector], spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline._fold

    def wrong(graph: onnx.ModelProto) -> Any:
        folded, report = original(graph)
        spoil(folded)
        return folded, report

    monkeypatch.setattr(pipeline, "_fold", wrong)
    with pytest.raises(ParityError):
        export_module(make_detector(kind), IMAGE, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Best, Queries])
def test_export_module_output_raw_cuts_post_processing_off(kind: type[Detector], tmp_path: Path) -> None:
    model = make_detector(kind)
    options = ModuleOptions(output="raw", dynamic_size=kind is Best)
    result = export_module(model, IMAGE, tmp_path / "m.onnx", options=options)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "TopK" not in {node.op_type for node in graph.node}
    # The largest scores are read by the first choice; where all scores are read, too, they follow from these.
    ranks = [len(output.shape) for output in result.metadata.spec.outputs]
    assert sorted(ranks) == ([3, 3] if kind is Best else [2, 3])
    positions = result.metadata.spec.outputs[0].shape[1]
    assert isinstance(positions, str) if kind is Best else positions == 17 * 15
    labels = [check.name for check in result.metadata.certificate.checks]
    assert any(name.endswith("as a set") for name in labels)  # the whole network was compared with the module, too
    with Engine(tmp_path / "m.onnx") as engine, torch.no_grad():
        found = list(engine.infer(IMAGE.numpy()).values())  # type: ignore[union-attr]
        boxes, scores = model.predict(IMAGE)
        wanted = [boxes, scores] if kind is Best else [boxes, scores.amax(2)]
        for expected in wanted:
            array = next(array for array in found if array.shape == tuple(expected.shape))
            np.testing.assert_allclose(array, expected.numpy(), atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_export_module_output_by_name_keeps_these(tmp_path: Path) -> None:
    export_module(make_detector(Queries), IMAGE, tmp_path / "m.onnx", options=ModuleOptions(output="best"))
    assert [output.name for output in read_metadata(tmp_path / "m.onnx").spec.outputs] == ["best"]


@pytest.mark.parametrize(("output", "match"), [("raw", "no output hangs on TopK"), ("nothing", "nothing is no tensor")])
def test_export_module_output_that_is_none_is_refused(output: str, match: str, tmp_path: Path) -> None:
    model = make_module(conv_bn(3))
    with pytest.raises(InputError, match=match):
        export_module(model, IMAGE, tmp_path / "m.onnx", options=ModuleOptions(output=output))


def test_export_module_choice_among_equals_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = make_detector(Best, flat=True)
    with pytest.raises(ParityError, match="behind choices between values as good as equal") as caught:
        export_module(_Shuffled(model), IMAGE, tmp_path / "m.onnx")
    assert "--output raw" in caught.value.remedy
    export_module(model, IMAGE, tmp_path / "m.onnx", options=ModuleOptions(output="raw"))


class _Shuffled(nn.Module):
    """Scores that differ by rounding only, so that torch chooses others than the ONNX."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        boxes, scores = self.model.predict(x)
        noise = torch.sin(1e4 * boxes) * 1e-7
        index = (scores.amax(2) + noise.amax(2) + 1).topk(KEPT, 1)[1].unsqueeze(2)
        return boxes.gather(1, index.expand(-1, -1, 4))


def make_nms() -> onnx.ModelProto:
    """Boxes and scores of a folded block, NonMaxSuppression, and the boxes that it leaves."""
    draw = Draw()
    body = draw.node("Relu", [BLOCKS["RepVGG"][0](draw, draw.node("Relu", ["x"]))])
    draw.constants += [
        numpy_helper.from_array(np.array(shape), name)
        for name, shape in (("as_rows", [0, 0, -1]), ("one", [1]), ("two", [2]), ("three", [3]))
    ]
    draw.constants += [numpy_helper.from_array(np.array([10]), "most"), numpy_helper.from_array(np.array([3]), "last")]
    centres = draw.conv(body, 2, kernel=1)
    sizes = draw.node("Abs", [draw.conv(body, 2, kernel=1)])
    corners = draw.node("Concat", [draw.node("Sub", [centres, sizes]), draw.node("Add", [centres, sizes])], 4, axis=1)
    rows = draw.node("Transpose", [draw.node("Reshape", [corners, "as_rows"])], perm=[0, 2, 1])
    large = draw.node("Reshape", [draw.conv(body, 3, kernel=1), "as_rows"])
    scores = draw.node("Sigmoid", [draw.node("Mul", [large, draw.constant([0.01])])])
    chosen = draw.node("NonMaxSuppression", [rows, scores, "most", draw.constant([0.3]), draw.constant([0.5])])
    places = draw.node("Slice", [chosen, "two", "three", "one"])
    image = draw.node("Slice", [chosen, draw_zero(draw), "one", "one"])
    boxes = draw.node("GatherND", [rows, draw.node("Concat", [image, places], axis=1)])
    model = draw.model(chosen, boxes)
    for value, kind, columns in zip(model.graph.output, (TensorProto.INT64, TensorProto.FLOAT), (3, 4), strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, ["m", columns]))
    return model


def draw_zero(draw: Draw) -> str:
    draw.constants.append(numpy_helper.from_array(np.array([0]), "zero"))
    return "zero"


def test_fold_onnx_behind_non_maximum_suppression_is_compared_as_a_set_of_all_images(tmp_path: Path) -> None:
    model = make_nms()
    onnx.save(model, tmp_path / "given.onnx")
    result = fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")
    assert result.metadata is not None and len(result.report.folds) == 1
    assert "behind NonMaxSuppression: compared as sets" in result.metadata.certificate.reference
    names = " + ".join(value.name for value in model.graph.output)
    assert f"ONNX, {names}, image 1, as a set" in [check.name for check in result.checks]
    # how many boxes there are is no size of the batch
    assert all(isinstance(output.shape[0], str) for output in result.metadata.spec.outputs)
    assert {output.shape[0] for output in result.metadata.spec.outputs}.isdisjoint({"n"})


def test_fold_onnx_output_raw_and_by_name(tmp_path: Path) -> None:
    model = make_nms()
    onnx.save(model, tmp_path / "given.onnx")
    raw = fold_onnx(tmp_path / "given.onnx", tmp_path / "raw.onnx", options=FoldOptions(output=("raw",)))
    assert raw.metadata is not None and [output.shape[0] for output in raw.metadata.spec.outputs] == ["n", "n"]
    assert "NonMaxSuppression" not in {node.op_type for node in onnx.load(tmp_path / "raw.onnx").graph.node}
    name = model.graph.output[0].name
    fold_onnx(tmp_path / "given.onnx", tmp_path / "one.onnx", options=FoldOptions(output=(name,)))
    assert [value.name for value in onnx.load(tmp_path / "one.onnx").graph.output] == [name]
    for wrong, match in ((("no such",), "no such is no tensor"), ((name, name), "stands twice")):
        with pytest.raises(InputError, match=match):
            fold_onnx(tmp_path / "given.onnx", tmp_path / "o.onnx", options=FoldOptions(output=wrong))


def test_fold_onnx_wrong_fold_before_a_choice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(make_nms(), tmp_path / "given.onnx")
    original = fold.fold_branches

    def wrong(graph: onnx.ModelProto) -> Any:
        folded, report = original(graph)
        spoil_weight(folded)
        return folded, report

    monkeypatch.setattr(fold, "fold_branches", wrong)
    with pytest.raises(ParityError, match="comparisons failed"):
        fold_onnx(tmp_path / "given.onnx", tmp_path / "out.onnx")


def test_choices_of_a_graph_are_found_with_what_is_read_before_and_behind() -> None:
    model = make_nms()
    choices = find_choices(model)
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    assert {made[name] for name in choices.before} == {"Transpose", "Sigmoid"} and choices.raw == choices.before
    assert list(choices.outputs) == [value.name for value in model.graph.output]
    assert find_choices(with_outputs(model, choices.before)) == Choices()


TOP = Choice("TopK", "data", "values", 1, 1)
RANKED = np.array([[9.0, 7.0, 5.0, 3.0]])


def make_trial(found: Any, wanted: Any, data: np.ndarray = RANKED, **more: Any) -> Trial:
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    known = {"data": data, "values": -np.sort(-data)[:, :2], "y": more.pop("given", wanted)}
    nudged = {**known, "y": more.pop("nudged", wanted)}
    return Trial("one", 1, {"y": found}, {"y": wanted}, known, nudged)


def judge(*trials: Trial, choice: Choice = TOP) -> tuple[Any, ...]:
    checks, notes = judge_outputs(Choices((), (), {"y": (choice,)}), trials, kept=("y",))
    require_passed(checks, "a test")
    return notes


ITEMS = [[[1.0, 2.0], [3.0, 4.0]]]


@pytest.mark.parametrize("found", [ITEMS, [ITEMS[0][::-1]], [[[1.0, 2.0000002], [3.0, 4.0]]]])
def test_same_items_in_any_order_are_equal(found: Any) -> None:
    assert judge(make_trial(found, ITEMS)) == ()


@pytest.mark.parametrize("found", [[[[1.0, 2.0], [1.0, 2.0]]], [[[1.0, 4.0], [3.0, 2.0]]], [[[1.0, 2.0]]]])
def test_other_items_are_a_fault_where_the_choice_is_clear(found: Any) -> None:
    with pytest.raises(ParityError, match="comparisons failed; worst: ONNX, y, one, as a set"):
        judge(make_trial(found, ITEMS))


def test_other_items_are_left_out_where_the_choice_is_a_tie_and_refused_where_all_are_ties() -> None:
    tied = make_trial([[[1.0, 2.0], [1.0, 2.0]]], ITEMS, np.array([[9.0, 7.0, 7.0, 3.0]]))
    assert judge(tied, make_trial(ITEMS, ITEMS)) == ("y, one: not compared: values that choose are as good as equal",)
    with pytest.raises(ParityError, match="in every image"):
        judge(tied)


def test_tie_that_only_another_rounding_shows_is_one() -> None:
    choice = Choice("NonMaxSuppression", "data", "values", -1, 1)
    other = np.array([[[1.0, 2.0]]], np.float32)
    assert judge(make_trial(other, ITEMS, nudged=other), make_trial(ITEMS, ITEMS), choice=choice)
    with pytest.raises(ParityError, match="comparisons failed"):
        judge(make_trial(other, ITEMS), make_trial(ITEMS, ITEMS), choice=choice)


@pytest.mark.parametrize(
    ("kind", "axis", "sign", "data", "tied"),
    [
        ("TopK", 1, 1, [[9, 7, 5, 3]], 0.0),
        ("TopK", -1, 1, [[9, 7, 7, 3], [9, 8, 2, 1]], 0.5),
        ("TopK", 1, -1, [[1, 2, 2, 9]], 1.0),
        ("TopK", 1, 1, [[7, 7]], 0.0),  # all are taken
        ("ArgMax", 0, 1, [[4, 4], [4, 1]], 0.5),
        ("ArgMin", 1, -1, [[1, 2], [3, 3]], 0.5),
        ("NonZero", 0, 1, [[4, 4], [4, 4]], 0.0),
    ],
)
def test_ties_are_counted_where_the_last_taken_and_the_first_left_are_equal(
    kind: str, axis: int, sign: int, data: Any, tied: float
) -> None:
    arrays = {"data": np.array(data, np.float32), "values": np.zeros((len(data), 2))}
    assert Choice(kind, "data", "values", axis, sign).tied(arrays, 1e-6) == tied
