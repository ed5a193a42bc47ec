"""The typed values between stages: validated once, at the border."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.specs.codec import load_build_config
from repvgg_deploy.specs.values import (
    BuildConfig,
    Certificate,
    Check,
    ModelSpec,
    Preprocessing,
    ShapeProfile,
    TensorSpec,
    VariantSpec,
)

CONFIGS = Path(__file__).resolve().parents[2] / "engines" / "configs"
VARIANT = VariantSpec("small", (1, 2, 1, 1), (16, 16, 32, 64, 128), (1, 1, 2, 1, 1, 1), num_classes=10)
IMAGENET = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 256, (224, 224))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (0, 2, 1, 1)}, "at least 1"),
        ({"widths": (16, 16, 32, 64, 0)}, "at least 1"),
        ({"num_classes": 0}, "at least 1"),
        ({"se_reduction": 0}, "at least 1"),
        ({"groups": (1, 1, 2, 1, 1, 0)}, "at least 1"),
        ({"groups": (1, 1, 2)}, r"expected 6 groups \(stem and 5 blocks\), found 3"),
        ({"groups": (1, 1, 3, 1, 1, 1)}, "3 groups do not divide 16 → 32 channels of stage2.0"),
        ({"groups": (2, 1, 1, 1, 1, 1)}, "2 groups do not divide 3 → 16 channels of stage0"),
        ({"strides": (2, 2, 2, 2, 3)}, "strides must be 1 or 2"),
        ({"strides": (0, 2, 2, 2, 2)}, "strides must be 1 or 2"),
        ({"bn_eps": 0.0}, "bn_eps"),
        ({"bn_eps": float("nan")}, "bn_eps"),
        ({"bn_eps": 1.0}, "bn_eps"),
        ({"se": "before_relu", "se_reduction": 32}, "leaves no channel of the narrowest width 16"),
    ],
)
def test_variant_with_an_impossible_field_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        dataclasses.replace(VARIANT, **change)
    assert "small" in caught.value.message
    assert "small" in caught.value.remedy


def test_variant_layers_are_named_and_shaped_in_order() -> None:
    layers = [dataclasses.astuple(layer) for layer in VARIANT.layers()]
    assert layers == [
        ("stage0", 0, 3, 16, 2, 1),
        ("stage1.0", 1, 16, 16, 2, 1),
        ("stage2.0", 2, 16, 32, 2, 2),
        ("stage2.1", 2, 32, 32, 1, 1),
        ("stage3.0", 3, 32, 64, 2, 1),
        ("stage4.0", 4, 64, 128, 2, 1),
    ]
    assert [layer.has_identity for layer in VARIANT.layers()] == [False, False, False, True, False, False]


def test_variant_with_stride_one_has_an_identity_where_channels_stay() -> None:
    spec = dataclasses.replace(VARIANT, strides=(1, 1, 2, 2, 1))
    assert [layer.has_identity for layer in spec.layers()] == [False, True, False, True, False, False]


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANT.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": (58.0, 0.0, 57.0)}, "standard deviation"),
        ({"crop": (0, 224)}, "image size"),
        ({"resize_short": 0}, "image size"),
    ],
)
def test_preprocessing_with_an_impossible_field_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(IMAGENET, **change)


@pytest.mark.parametrize(("size", "batch"), [("batch", None), (4, 4)])
def test_model_batch_is_the_fixed_size_or_none(size: int | str, batch: int | None) -> None:
    spec = ModelSpec(
        TensorSpec("input", "float32", (size, 3, 8, 8), "NCHW"),
        (TensorSpec("logits", "float32", (size, 2), "NC"),),
        "logits",
    )
    assert spec.batch == batch


@pytest.mark.parametrize(
    ("shape", "layout", "preprocessing", "size"),
    [
        (("batch", 3, 8, 6), "NCHW", IMAGENET, (8, 6)),
        (("batch", 8, 6, 3), "NHWC", None, (8, 6)),
        (("batch", 3, "height", "width"), "NCHW", IMAGENET, (224, 224)),
        (("batch", "height", 6, 3), "NHWC", IMAGENET, (224, 6)),
        (("batch", 3, "height", "width"), "NCHW", None, None),
        (("batch", 8), "other", None, None),
    ],
)
def test_model_image_size_is_the_fixed_one_else_the_usual_one(shape, layout, preprocessing, size) -> None:
    image = TensorSpec("input", "float32", shape, layout)
    assert ModelSpec(image, (), "module", preprocessing).image_size == size


@pytest.mark.parametrize(
    ("error", "passed"), [(0.5, True), (1.0, True), (1.5, False), (float("nan"), False), (float("inf"), False)]
)
def test_check_passes_within_its_tolerance_and_never_for_nan(error: float, passed: bool) -> None:
    assert Check("x", error, 1.0, 1.0).passed is passed


def test_certificate_passes_when_all_checks_do_and_never_without_one() -> None:
    good, bad = Check("good", 0.0, 1.0, 1.0), Check("bad", 2.0, 1.0, 1.0)
    assert Certificate("r", (good, good), {}).passed
    assert not Certificate("r", (good, bad), {}).passed
    assert not Certificate("r", (), {}).passed


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_profile_out_of_order_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"1 ≤ min ≤ opt ≤ max"):
        ShapeProfile(*sizes)


def test_profile_of_several_batches_is_one_for_each() -> None:
    sizes = ((8, 9), (16, 32), (64, 48))
    profile = ShapeProfile(1, 8, 32, *sizes, batches=(1, 8, 32))
    assert profile.split() == tuple(ShapeProfile(1, batch, batch, *sizes) for batch in (1, 8, 32))
    assert ShapeProfile(2, 4, 8).split() == (ShapeProfile(2, 4, 8),)


@pytest.mark.parametrize("batches", [(8, 1, 32), (1, 1, 32), (0, 32), (1, 8), (1, 64)])
def test_batches_of_a_profile_that_do_not_fit_are_refused(batches: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected ascending batches from min up to max, 32, found") as caught:
        ShapeProfile(1, 8, 32, batches=batches)
    assert "--profiles" in caught.value.remedy


@pytest.mark.parametrize(
    "sizes",
    [((1, 1), None, None), (None, (4, 4), None), ((8, 4), (4, 8), (9, 9)), ((1, 1), (4, 9), (8, 8)), ((0, 4),) * 3],
)
def test_profile_of_image_sizes_out_of_order_is_refused(sizes: tuple[Any, Any, Any]) -> None:
    with pytest.raises(InputError, match="of height and of width") as caught:
        ShapeProfile(1, 1, 1, *sizes)
    assert "--opt-size" in caught.value.remedy


@pytest.mark.parametrize(
    ("shape", "layout", "wanted"),
    [
        (("batch", 3, "height", "width"), "NCHW", [(1, 3, 8, 9), (2, 3, 16, 32), (4, 3, 64, 48)]),
        (("batch", "height", "width", 3), "NHWC", [(1, 8, 9, 3), (2, 16, 32, 3), (4, 64, 48, 3)]),
    ],
)
def test_profile_shapes_put_sizes_where_the_layout_has_them(shape: Any, layout: Any, wanted: Any) -> None:
    profile = ShapeProfile(1, 2, 4, (8, 9), (16, 32), (64, 48))
    assert list(profile.shapes(TensorSpec("input", "float32", shape, layout))) == wanted


def test_profile_without_sizes_keeps_those_of_the_model() -> None:
    image = TensorSpec("input", "float32", ("batch", 3, 16, 24), "NCHW")
    assert ShapeProfile(1, 2, 4).shapes(image) == ((1, 3, 16, 24), (2, 3, 16, 24), (4, 3, 16, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"optimization_level": -1}, "0 to 5"),
    ],
)
def test_build_config_with_an_impossible_field_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildConfig(**change)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_build_config_loads_and_says_what_it_is_for(path: Path) -> None:
    config = load_build_config(path)
    assert config.precision is not None
    assert not (config.precision == "fp32" and config.tf32)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert path.name in (CONFIGS.parent / "README.md").read_text(encoding="utf-8")


def test_committed_build_configs_are_those_that_the_documents_name() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} >= {"fp32", "fp16", "int8", "edge"}
    assert load_build_config(CONFIGS / "edge.toml").profile == ShapeProfile(1, 1, 1)
    assert load_build_config(CONFIGS / "fp32.toml") == BuildConfig("fp32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precision = 'int4'", "BuildConfig.precision: expected one of 'fp32', 'fp16', 'fp8', 'int8', found 'int4'"),
        ("workspace = 1", r"BuildConfig.workspace: expected one of .*workspace_bytes"),
        ("workspace_bytes = '4GiB'", "workspace_bytes: expected a int"),
        ("[profile]\nmin_batch = 9", "1 ≤ min"),
        ("[profile]\nbatch = 9", "profile.batch"),
        ("profile = 3", "profile: expected an object"),
        ("tf32 = 1", "tf32: expected a bool"),
        ("precision = ", "cannot be read as a build configuration"),
    ],
)
def test_build_config_file_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_build_config(path)
    assert str(path) in caught.value.message
    assert "engines/configs/fp16.toml" in caught.value.remedy


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_build_config_file_that_is_missing_or_binary_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_build_config(path)
