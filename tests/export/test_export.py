"""Checkpoint → verified ONNX, whole: every variant, every option, and every mutation caught."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repvgg_deploy import Engine
from repvgg_deploy.errors import (
    ArtifactError,
    CheckpointError,
    ContractError,
    InputError,
    ParityError,
    RepVGGDeployError,
)
from repvgg_deploy.export import export as pipeline
from repvgg_deploy.export.export import DEPLOY_REFERENCE, TRAINING_REFERENCE, ExportOptions, export_checkpoint
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.export.synthesize import SynthesisOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.calibration import load_calibration_file
from repvgg_deploy.model.checkpoint.load import load_checkpoint
from repvgg_deploy.model.fold import reparameterize
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED
from tests.model.generated import CASES, Case, random_model, stated, write_case
from tests.model.random_blocks import small_variant

GRAPH = GraphOptions(image_size=(64, 64))
STRIDES = (2, 2, 2, 2, 2)
# The float32 error of two nine-layer networks, in units of the largest logit.
FLOAT32 = 1e-5


@torch.no_grad()
def set_gain(model: RepVGG, gain: float) -> None:
    """Scales BatchNorms and opens SE gates: random weights alone amplify through 48 layers until float32 is noise."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight *= gain
        elif name.endswith("se.up") and isinstance(module, nn.Conv2d) and module.bias is not None:
            module.weight *= 0.1
            module.bias += 3.0


def save(folder: Path, variant: VariantSpec, *, gain: float = 1.0) -> tuple[Path, RepVGG]:
    model = random_model(variant)
    set_gain(model, gain)
    path = folder / "model.pth"
    torch.save(stated(model), path)
    return path, model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_export_every_family_and_form_equals_the_source_model(tmp_path: Path, case: Case) -> None:
    model = random_model(case.spec, case.form)
    path = write_case(case, model, tmp_path)
    calibration = SynthesisOptions(images=2, steps=2) if case.form == "training" else None
    result = export_checkpoint(
        path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, calibration=calibration, strides=STRIDES)
    )
    certificate = result.metadata.certificate
    assert certificate.passed
    assert certificate.reference == (TRAINING_REFERENCE if case.form == "training" else DEPLOY_REFERENCE)
    x = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)).numpy()
    with Engine(tmp_path / "m.onnx") as engine:
        np.testing.assert_allclose(engine.infer(x), expected, atol=FLOAT32 * np.abs(expected).max(), rtol=0)
    if calibration is not None:
        images, provenance = load_calibration_file(tmp_path / "m.calib.npz")
        assert images.shape == (2, 64, 64, 3) and np.isfinite(provenance.loss)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "A0" else pytest.mark.slow) for name in PUBLISHED]
)
def test_export_published_variant_at_full_width(tmp_path: Path, name: str) -> None:
    spec = PUBLISHED[name]
    path, model = save(tmp_path, spec, gain=0.6)
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)).numpy()
    del model
    result = export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    assert result.metadata.variant == spec
    with Engine(tmp_path / "m.onnx") as engine:
        np.testing.assert_allclose(engine.infer(x), expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    for file in (path, tmp_path / "m.onnx"):  # half a gigabyte each, and pytest would keep them
        file.unlink()


def test_export_certificate_history_and_statistics_are_in_the_file(tmp_path: Path) -> None:
    path, _ = save(tmp_path, small_variant())
    result = export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, labels=tuple("abcde")))
    metadata = read_metadata(tmp_path / "m.onnx")
    assert metadata == dataclasses.replace(result.metadata, content_sha256=metadata.content_sha256)
    assert metadata.source is not None and metadata.source.sha256 == load_checkpoint(path).sha256
    assert metadata.spec.labels == tuple("abcde")
    outputs = {name for name in metadata.statistics if not name.endswith(".input")}
    assert len(outputs) == 9 and all(name.endswith(".conv") for name in outputs)
    assert {name.removesuffix(".input") + ".conv" for name in metadata.statistics if name.endswith(".input")} == outputs
    assert metadata.history[0].stage == "export" and "torch" in metadata.certificate.versions
    kinds = {check.name.split(" ")[0] for check in metadata.certificate.checks}
    assert kinds == {"weights", "convolution", "block", "network,", "ONNX,"}
    assert [entry.key for entry in onnx.load(tmp_path / "m.onnx").metadata_props] == ["repvgg_deploy"]


def test_export_uint8_model_equals_the_float_model_on_the_same_pixels(tmp_path: Path) -> None:
    path, _ = save(tmp_path, small_variant())
    export_checkpoint(path, tmp_path / "f.onnx", options=ExportOptions(GRAPH))
    export_checkpoint(path, tmp_path / "u.onnx", options=ExportOptions(dataclasses.replace(GRAPH, input="uint8")))
    from repvgg_deploy.images.decode import normalize

    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with Engine(tmp_path / "f.onnx") as floats, Engine(tmp_path / "u.onnx") as bytes_:
        assert floats.spec.preprocessing is not None
        expected = floats.infer(normalize(pixels, floats.spec.preprocessing))
        np.testing.assert_allclose(bytes_.infer(pixels), expected, rtol=1e-5, atol=1e-5)


def test_export_identical_output_is_up_to_date_and_different_needs_force(tmp_path: Path) -> None:
    path, _ = save(tmp_path, small_variant())
    out = tmp_path / "m.onnx"
    assert export_checkpoint(path, out, options=ExportOptions(GRAPH)).output.status == "written"
    stamp = out.stat().st_mtime_ns
    assert export_checkpoint(path, out, options=ExportOptions(GRAPH)).output.status == "up to date"
    assert out.stat().st_mtime_ns == stamp
    other = ExportOptions(dataclasses.replace(GRAPH, opset=18))
    with pytest.raises(ArtifactError, match="exists and differs"):
        export_checkpoint(path, out, options=other)
    assert export_checkpoint(path, out, options=dataclasses.replace(other, force=True)).output.status == "written"
    assert files(tmp_path) == ["m.onnx", "model.pth"]


def test_export_save_deploy_round_trips_to_the_same_onnx(tmp_path: Path) -> None:
    path, _ = save(tmp_path, small_variant(se="before_relu"))
    result = export_checkpoint(
        path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, save_deploy=tmp_path / "deploy.pth")
    )
    assert result.deploy_output is not None and result.deploy_output.status == "written"
    state = torch.load(tmp_path / "deploy.pth", weights_only=True)["state_dict"]
    assert "stage1.0.rbr_reparam.weight" in state and "stage1.0.se.down.weight" in state
    export_checkpoint(tmp_path / "deploy.pth", tmp_path / "again.onnx", options=ExportOptions(GRAPH))
    weights = [
        {t.name: t.raw_data for t in onnx.load(tmp_path / name).graph.initializer} for name in ("m.onnx", "again.onnx")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("labels", [("a",), tuple("abcdef")])
def test_export_wrong_number_of_labels_is_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    path, _ = save(tmp_path, small_variant())
    with pytest.raises(InputError, match="labels for 5 classes"):
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, labels=labels))
    assert files(tmp_path) == ["model.pth"]


# A mutated export must be caught. First: mutations of the deploy form, which the comparison of the forms catches.


def _eps(model: RepVGG) -> RepVGG:
    wrong = copy.deepcopy(model)
    for module in wrong.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return reparameterize(wrong)


def _drop_se(model: RepVGG) -> RepVGG:
    deploy = reparameterize(model)
    se = deploy.get_submodule("stage2.1.se")
    with torch.no_grad():
        se.up.weight.zero_()  # type: ignore[union-attr, operator]
        se.up.bias.fill_(20.0)  # type: ignore[union-attr, operator]  # sigmoid(20) = 1: the block is there and does nothing
    return deploy


def _shift_groups(model: RepVGG) -> RepVGG:
    deploy = reparameterize(model)
    conv = deploy.get_submodule("stage3.2.rbr_reparam")
    assert isinstance(conv, nn.Conv2d) and conv.groups == 4
    with torch.no_grad():
        conv.weight.copy_(conv.weight.roll(conv.out_channels // 4, dims=0))
    return deploy


def _half(model: RepVGG) -> RepVGG:
    deploy = reparameterize(model)
    deploy.get_submodule("stage3")[1] = model.blocks()["stage3.1"]  # type: ignore[index]
    return deploy


@pytest.mark.parametrize("mutate", [_eps, _drop_se, _shift_groups, _half], ids=lambda f: f.__name__.strip("_"))
def test_export_mutated_deploy_form_is_caught_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any
) -> None:
    path, _ = save(tmp_path, small_variant(se="before_relu"))
    monkeypatch.setattr(pipeline, "reparameterize", mutate)
    with pytest.raises(ParityError):
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    assert files(tmp_path) == ["model.pth"]


# Then the same after the forms were compared: only the run of the file in ONNX Runtime, or the contract, is left to see
# them.


def _weights_eps(name: str, array: Any) -> Any:
    return array * np.sqrt((1 + 1e-5) / (1 + 1e-3)) if name == "stage3.1.weight" else array


def _weights_group(name: str, array: Any) -> Any:
    return np.roll(array, array.shape[0] // 4, axis=0) if name == "stage3.2.weight" else array


def _weights_se(name: str, array: Any) -> Any:
    return np.full_like(array, 20.0) if name == "stage2.1.se.up.bias" else array


def _weights_classes(name: str, array: Any) -> Any:
    return array[::-1] if name.startswith("linear.") else array


def _weights_std(name: str, array: Any) -> Any:
    return np.float32([58.624, 57.12, 57.375]).reshape(array.shape) if name == "std" else array  # Open Model Zoo's typo


def _weights_colours(name: str, array: Any) -> Any:
    return array[:, ::-1] if name == "stage0.weight" else array


@pytest.mark.parametrize(
    "change",
    [_weights_eps, _weights_group, _weights_se, _weights_classes, _weights_std, _weights_colours],
    ids=lambda f: f.__name__.strip("_"),
)
def test_export_mutated_file_is_caught_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    path, _ = save(tmp_path, small_variant(se="before_relu"))
    original = pipeline.write_model
    touched: list[str] = []

    def write(target: Path, model: Any, weights: Any) -> Any:
        changed = {name: np.ascontiguousarray(change(name, array), np.float32) for name, array in weights.items()}
        touched.extend(name for name in weights if not np.array_equal(changed[name], weights[name]))
        return original(target, model, changed)

    monkeypatch.setattr(pipeline, "write_model", write)
    with pytest.raises(ParityError, match="against the ONNX"):
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(dataclasses.replace(GRAPH, input="uint8")))
    assert touched
    assert files(tmp_path) == ["model.pth"]


def test_export_wrong_graph_is_caught_by_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = save(tmp_path, small_variant())
    original = pipeline.simplify

    def add_identity(model: Any) -> Any:
        model = original(model)
        model.graph.node.append(onnx.helper.make_node("Identity", ["input"], ["unused"], name="/unused/Identity"))
        return model

    monkeypatch.setattr(pipeline, "simplify", add_identity)
    with pytest.raises(ContractError, match="Identity"):
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    assert files(tmp_path) == ["model.pth"]


def test_export_deploy_checkpoint_mutated_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(stated(random_model(small_variant(), "deploy")), tmp_path / "deploy.pth")
    original = pipeline.write_model
    monkeypatch.setattr(
        pipeline, "write_model", lambda p, m, w: original(p, m, {n: a * np.float32(1.001) for n, a in w.items()})
    )
    with pytest.raises(ParityError, match="deploy form against the ONNX"):
        export_checkpoint(tmp_path / "deploy.pth", tmp_path / "m.onnx", options=ExportOptions(GRAPH))


@pytest.mark.parametrize("stage", ["load_checkpoint", "reparameterize", "to_onnx", "verify_onnx"])
def test_export_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    path, _ = save(tmp_path, small_variant())

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    assert files(tmp_path) == ["model.pth"]


@pytest.mark.parametrize(
    ("name", "values", "remedy"),
    [
        ("mean", (0.485, 0.456, 0.406), "--mean 123.675,116.28,103.53"),
        ("std", (0.229, 0.224, 0.225), "--std 58.395,57.12,57.375"),
    ],
)
def test_export_normalisation_in_units_of_0_to_1_is_refused_with_what_was_meant(
    name: str, values: tuple[float, ...], remedy: str
) -> None:
    with pytest.raises(InputError, match=f"{name} .* is in units of 0–1") as caught:
        ExportOptions(**{name: values})  # type: ignore[arg-type]
    assert remedy in caught.value.remedy


def test_export_raw_pixels_need_no_normalisation() -> None:
    assert ExportOptions(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).std == (1.0, 1.0, 1.0)


def test_export_bad_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ArtifactError, match="does not exist"):  # what the file is was not even looked at
        export_checkpoint(tmp_path / "x.pth", tmp_path / "no" / "m.onnx")


def test_export_missing_checkpoint_is_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.pth: there is no such file"):
        export_checkpoint(tmp_path / "missing.pth", tmp_path / "no" / "m.onnx")


def test_export_backbone_without_classifier_gives_its_features_only(tmp_path: Path) -> None:
    model = random_model(small_variant())
    path = tmp_path / "model.pth"
    torch.save({name: tensor for name, tensor in model.state_dict().items() if "linear" not in name}, path)
    with pytest.raises(CheckpointError, match="holds no classifier") as caught:
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, strides=STRIDES))
    assert "--features" in caught.value.remedy and files(tmp_path) == ["model.pth"]
    options = ExportOptions(dataclasses.replace(GRAPH, features=True), strides=STRIDES, save_deploy=tmp_path / "d.pth")
    export_checkpoint(path, tmp_path / "m.onnx", options=options)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.stage_outputs(x)["stage4"].numpy()
    with Engine(tmp_path / "m.onnx") as engine:
        found = engine.infer(x.numpy())
    np.testing.assert_allclose(found["stage4"], expected, atol=FLOAT32 * np.abs(expected).max(), rtol=0)  # type: ignore[index,call-overload]
    assert not any("linear" in name for name in torch.load(tmp_path / "d.pth")["state_dict"])


def test_export_records_who_said_what_tensors_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(random_model(small_variant()).state_dict(), path)
    with pytest.raises(CheckpointError, match="does not tell the strides") as caught:
        export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH))
    assert f"repvgg-export --ckpt {path} --out {tmp_path / 'model.onnx'} --strides 2,2,2,2,2" in caught.value.remedy
    export_checkpoint(path, tmp_path / "m.onnx", options=ExportOptions(GRAPH, strides=STRIDES))
    (fact,) = read_metadata(tmp_path / "m.onnx").certificate.facts
    assert fact.startswith("stated by the user: strides 2,2,2,2,2; with them, as in every RepVGG: ReLU")
    variant = dataclasses.replace(small_variant(), strides=(1, 2, 2, 2, 1), name="mine")
    export_checkpoint(path, tmp_path / "n.onnx", options=ExportOptions(GRAPH, arch=variant))
    (fact,) = read_metadata(tmp_path / "n.onnx").certificate.facts
    assert fact.startswith("stated by the user: the architecture 'mine'")


def test_export_takes_the_weights_that_are_asked_for_and_says_which(tmp_path: Path) -> None:
    raw, averaged = random_model(small_variant()), random_model(small_variant(), seed=1)
    path = tmp_path / "model.pth"
    torch.save({"model": raw.state_dict(), "model_ema": averaged.state_dict()}, path)
    for weights, chosen in ((None, "model_ema"), ("model", "model")):
        options = ExportOptions(GRAPH, strides=STRIDES, weights=weights, force=True)
        result = export_checkpoint(path, tmp_path / "m.onnx", options=options)
        assert result.metadata.source is not None and result.metadata.source.weights == chosen
        assert any(f"'{chosen}' was taken; also complete in the file" in note for note in result.metadata.notes)


def test_export_every_error_of_a_bad_checkpoint_is_ours(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint" * 100)
    with pytest.raises(RepVGGDeployError) as caught:
        export_checkpoint(tmp_path / "x.pth", tmp_path / "m.onnx")
    assert caught.value.remedy
    assert files(tmp_path) == ["x.pth"]


def test_export_trained_a0_agrees_with_its_training_form_on_photos(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "repvgg-a0-imagenette.pth"
    options = ExportOptions(GraphOptions(image_size=(128, 128)))
    export_checkpoint(path, tmp_path / "a0.onnx", options=options)
    from io import BytesIO

    from PIL import Image

    from repvgg_deploy.images.decode import normalize

    data = np.load(shared_data / "imagenette128.npz")
    chosen = np.flatnonzero(data["split"] == 1)[:64]
    images = np.stack(
        [
            np.asarray(
                Image.open(BytesIO(data["blob"][data["offset"][i] : data["offset"][i + 1]].tobytes())).convert("RGB")
            )
            for i in chosen
        ]
    )
    with Engine(tmp_path / "a0.onnx") as engine:
        assert engine.spec.preprocessing is not None
        batch = normalize(images, engine.spec.preprocessing)
        logits = engine.infer(batch)
    from repvgg_deploy.model.checkpoint.load import build_model

    model = build_model(load_checkpoint(path))
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    top1 = float((logits.argmax(1) == data["label"][chosen]).mean())
    assert top1 > 0.75  # 85.85 % on all 2,000; four standard errors below that for 64


GOLDEN = Path(__file__).parent.parent / "golden" / "sample_logits.json"


def test_export_sample_gives_the_golden_logits(exported_sample: Path, sample_dir: Path) -> None:
    """The committed sample on its images, as its training form gave it in float64 (`tests/golden/record.py`)."""
    golden = json.loads(GOLDEN.read_text())
    with Engine(exported_sample) as engine:
        images = [sample_dir / "images" / name for name in golden]
        assert len(images) == 10
        # float32 error of 14 layers, in units of the logits, which are about 10
        np.testing.assert_allclose(engine.infer_images(images), np.array(list(golden.values())), atol=1e-4, rtol=0)
