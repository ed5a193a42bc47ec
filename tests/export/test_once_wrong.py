"""Exports that once came out wrong or destroyed something, each with what prevents it now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy import reparameterize
from repvgg_deploy.errors import ArtifactError, CheckpointError, InputError, ParityError
from repvgg_deploy.export import export as pipeline
from repvgg_deploy.export.export import ExportOptions, export_checkpoint
from repvgg_deploy.export.module import ModuleOptions, export_module
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.model.block import fold_block
from repvgg_deploy.model.parity import _compare_kernels, _exact_deploy
from repvgg_deploy.specs.values import Preprocessing
from tests.model.generated import random_model, stated
from tests.model.random_blocks import BlockSpec, build_block, randomise, relative_error, small_variant
from tests.model.test_fold import OfficialBlock, build_network

GRAPH = GraphOptions(image_size=(64, 64))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "c.pth"
    torch.save(stated(random_model(small_variant())), path)
    return path


@pytest.mark.parametrize("links", [False, True])
def test_export_never_replaces_its_own_checkpoint(checkpoint: Path, links: bool) -> None:
    before = checkpoint.read_bytes()
    target = checkpoint
    if links:
        target = checkpoint.with_name("link.onnx")
        target.hardlink_to(checkpoint)
    for options in (ExportOptions(GRAPH, force=True), ExportOptions(GRAPH, save_deploy=target, force=True)):
        out = target if options.save_deploy is None else checkpoint.with_name("m.onnx")
        with pytest.raises(InputError, match="would replace"):
            export_checkpoint(checkpoint, out, options=options)
    assert checkpoint.read_bytes() == before


def test_export_two_outputs_of_one_name_are_refused(checkpoint: Path) -> None:
    out = checkpoint.with_name("x.onnx")
    with pytest.raises(InputError, match="another output"):
        export_checkpoint(checkpoint, out, options=ExportOptions(GRAPH, save_deploy=out, force=True))
    assert not out.exists()


@pytest.mark.parametrize("taken", ["m.onnx", "d.pth"])
def test_export_both_outputs_or_none(checkpoint: Path, taken: str) -> None:
    folder = checkpoint.parent
    (folder / taken).write_text("mine")
    with pytest.raises(ArtifactError, match="exists and differs"):
        export_checkpoint(checkpoint, folder / "m.onnx", options=ExportOptions(GRAPH, save_deploy=folder / "d.pth"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(["c.pth", taken])
    assert (folder / taken).read_text() == "mine"


def test_export_gate_that_closes_leaves_no_deploy_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.parent
    original = pipeline.write_model
    monkeypatch.setattr(
        pipeline, "write_model", lambda p, m, w: original(p, m, {n: a * np.float32(1.01) for n, a in w.items()})
    )
    with pytest.raises(ParityError):
        export_checkpoint(checkpoint, folder / "m.onnx", options=ExportOptions(GRAPH, save_deploy=folder / "d.pth"))
    assert [path.name for path in folder.iterdir()] == ["c.pth"]


def test_export_onto_a_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="device"):
        export_checkpoint(checkpoint, "/dev/null", options=ExportOptions(GRAPH, force=True))


@pytest.mark.parametrize("output", ["top5", "probabilities", "logits"])
def test_export_weights_that_no_input_excites_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: Any
) -> None:
    """Of many classes only a few ever reach the top five; a permutation of the others must not pass."""
    torch.save(stated(random_model(small_variant(num_classes=100))), tmp_path / "c.pth")
    original = pipeline.write_model

    def write(path: Path, model: Any, weights: Any) -> Any:
        changed = dict(weights)
        changed["linear.weight"] = np.ascontiguousarray(weights["linear.weight"])
        changed["linear.weight"][[3, 4]] = changed["linear.weight"][[4, 3]] * np.float32(1 + 1e-6)
        return original(path, model, changed)

    monkeypatch.setattr(pipeline, "write_model", lambda p, m, w: write(p, m, {n: a.copy() for n, a in w.items()}))
    with pytest.raises(ParityError, match=r"first linear\.weight"):
        export_checkpoint(
            tmp_path / "c.pth", tmp_path / "m.onnx", options=ExportOptions(dataclasses.replace(GRAPH, output=output))
        )


def test_compare_kernels_sees_a_channel_far_smaller_than_the_others() -> None:
    block = build_block(BlockSpec(in_channels=4, out_channels=4, has_identity=True), dtype=torch.float32)
    with torch.no_grad():
        for norm in (block.rbr_dense.bn, block.rbr_1x1.bn, block.rbr_identity):  # type: ignore[union-attr]
            norm.weight[2] *= 1e-6
            norm.bias[2] *= 1e-6
        deploy = fold_block(block)
        exact = _exact_deploy(block, deploy)
        assert _compare_kernels("b", block, deploy, exact).passed
        deploy.rbr_reparam.weight[2] *= 1.0001
        assert not _compare_kernels("b", block, deploy, exact).passed


def test_export_network_dead_on_images_is_refused(tmp_path: Path) -> None:
    """Alive at the large constants of the verification, dead at every pixel: agreement on images would show nothing."""
    model = random_model(small_variant())
    with torch.no_grad():
        model.blocks()["stage0"].rbr_dense.bn.bias.fill_(-60.0)
        model.blocks()["stage0"].rbr_1x1.bn.bias.fill_(-60.0)
    torch.save(stated(model), tmp_path / "c.pth")
    with pytest.raises(ParityError, match="does not depend on its input"):
        export_checkpoint(
            tmp_path / "c.pth", tmp_path / "m.onnx", options=ExportOptions(dataclasses.replace(GRAPH, input="uint8"))
        )


@pytest.mark.parametrize("kind", ["qarepvgg_v1", "qarepvgg_v2"])
def test_reparameterize_synchronised_batchnorm_is_folded(kind: str) -> None:
    model = build_network(kind=kind)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(build_network(kind=kind)).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert relative_error(reparameterize(synchronised)(x), model(x)) < 5e-6  # float32, nine layers


def test_reparameterize_synchronised_batchnorm_of_other_projects_is_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OfficialBlock(4, post_bn=True))
    randomise(model)
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        expected = model.eval()(x)
        assert relative_error(reparameterize(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval())(x), expected) < 5e-6


def _circular(block: OfficialBlock) -> None:
    block.rbr_dense.conv.padding_mode = "circular"


def _groups(block: OfficialBlock) -> None:
    block.rbr_1x1.conv = nn.Conv2d(4, 4, 1)


def _statistics(block: OfficialBlock) -> None:
    block.rbr_dense.bn = nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize("change", [_circular, _groups, _statistics], ids=lambda f: f.__name__.strip("_"))
def test_reparameterize_block_that_is_no_3x3_is_refused(change: Any) -> None:
    block = OfficialBlock(4)
    change(block)
    with pytest.raises(CheckpointError, match=r"^0"):
        reparameterize(nn.Sequential(block))


def test_reparameterize_block_of_a_larger_kernel_is_folded() -> None:
    """It was refused, where nothing but 3×3 was known; a grouped 5×5 beside the rest is a convolution as well."""
    block = OfficialBlock(4)
    block.rbr_dense.conv = nn.Conv2d(4, 4, 5, 1, 2, groups=2, bias=False)
    block.rbr_1x1.conv = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    model = nn.Sequential(block)
    randomise(model)
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        expected = model.eval()(x)
        folded = reparameterize(model)
        assert relative_error(folded(x), expected) < 5e-6
    assert [tuple(p.shape) for p in folded.parameters() if p.ndim == 4] == [(4, 2, 5, 5)]


@pytest.mark.parametrize("output", ["probabilities", "top5"])
def test_export_probabilities_of_one_class_are_refused(tmp_path: Path, output: Any) -> None:
    torch.save(stated(random_model(small_variant(num_classes=1))), tmp_path / "c.pth")
    with pytest.raises(InputError, match="one class"):
        export_checkpoint(
            tmp_path / "c.pth", tmp_path / "m.onnx", options=ExportOptions(dataclasses.replace(GRAPH, output=output))
        )
    export_checkpoint(tmp_path / "c.pth", tmp_path / "m.onnx", options=ExportOptions(GRAPH))


def test_export_facts_that_tensors_do_not_tell_travel_with_the_file(checkpoint: Path) -> None:
    out = checkpoint.with_name("m.onnx")
    export_checkpoint(checkpoint, out, options=ExportOptions(GRAPH))
    assert any(
        fact.startswith("stated in the file: strides 2,2,2,2,2") for fact in read_metadata(out).certificate.facts
    )


def test_preprocessing_must_be_finite() -> None:
    with pytest.raises(InputError, match="finite"):
        Preprocessing(mean=(float("nan"), 0, 0), std=(1, 1, 1), resize_short=8, crop=(8, 8))
    with pytest.raises(InputError, match="finite"):
        Preprocessing(mean=(0, 0, 0), std=(float("inf"), 1, 1), resize_short=8, crop=(8, 8))


def test_export_module_size_baked_into_a_dynamic_graph_is_caught(tmp_path: Path) -> None:
    class Baked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = OfficialBlock(4)
            self.stem = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(self.block(self.stem(x)), size=(int(x.shape[2]), int(x.shape[3])))

    torch.manual_seed(0)
    model = Baked()
    randomise(model)
    with pytest.raises(ParityError):
        export_module(
            model.eval(), torch.randn(1, 3, 32, 32), tmp_path / "m.onnx", options=ModuleOptions(dynamic_size=True)
        )
    export_module(model.eval(), torch.randn(1, 3, 32, 32), tmp_path / "m.onnx")


@pytest.mark.parametrize("names", [("a", "a"), ("input", "b")])
def test_export_module_names_that_clash_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = OfficialBlock(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.block(x)
            return out, out * 2

    with pytest.raises(InputError, match="names must differ"):
        export_module(
            Two().eval(), torch.randn(1, 4, 8, 8), tmp_path / "m.onnx", options=ModuleOptions(output_names=names)
        )
