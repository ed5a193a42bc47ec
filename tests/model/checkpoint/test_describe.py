"""A description says what a file is and how to export it, or why it cannot be."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import replace

import pytest
import torch

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.load import describe_checkpoint
from repvgg_deploy.specs.variants import count_parameters, get_variant
from tests.model.generated import SMALL, Case, random_model, write_case


def test_description_of_a_published_variant_is_complete(tmp_path):
    spec = get_variant("A0", num_classes=10)
    path = tmp_path / "best model.pth.tar"
    torch.save({"state_dict": random_model(spec).state_dict(), "epoch": 3}, path)
    found = describe_checkpoint(path)
    assert found.loadable
    assert (found.variant, found.family, found.form, found.classes, found.wrapper) == (
        "A0",
        "official",
        "training",
        10,
        "state_dict",
    )
    assert (found.container, found.bytes) == ("torch zip", path.stat().st_size)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.parameters == count_parameters(spec, "training")
    assert found.spec == spec
    assert found.problem is None
    assert found.command is not None
    assert shlex.split(found.command) == [
        "repvgg-export",
        "--ckpt",
        str(path),
        "--out",
        str(tmp_path / "best model.onnx"),
    ]


def test_description_of_a_custom_variant_says_its_shape(tmp_path):
    spec = replace(SMALL, se="after_relu", se_reduction=4)
    found = describe_checkpoint(write_case(Case("repvggplus", spec, "deploy"), random_model(spec, "deploy"), tmp_path))
    assert (
        found.variant
        == "a custom variant (depths [1, 2, 3, 1], widths [8, 8, 16, 24, 32], groups up to 2, SE after relu 1/4)"
    )
    assert found.form == "deploy"
    assert any("strides" in note for note in found.notes)


@pytest.mark.parametrize(
    ("content", "container", "problem"),
    [
        (b"<!doctype html><html></html>", None, "is an HTML or XML page"),
        (
            {"fc.weight": torch.ones(3, 3), "layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)},
            "torch zip",
            "is no RepVGG but a ResNet",
        ),
        ({"stage0.rbr_dense.conv.weight": torch.ones(8, 3, 3, 3)}, "torch zip", "is incomplete"),
        ({"epoch": 3}, "torch zip", "holds no tensors"),
    ],
)
def test_description_of_something_else_says_what_it_is_and_what_to_do(content, container, problem, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    found = describe_checkpoint(path)
    assert not found.loadable
    assert found.container == container
    assert found.problem is not None
    assert found.problem.startswith(problem)
    assert str(path) not in found.problem
    assert found.remedy
    assert found.command is None
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_description_of_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        describe_checkpoint(tmp_path / "x.pth")


def test_description_of_the_really_trained_model(shared_data):
    found = describe_checkpoint(shared_data / "repvgg-a0-imagenette.pth")
    assert (found.variant, found.classes, found.form) == ("A0", 10, "training")
