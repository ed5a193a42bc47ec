"""The published variants, their counts, and variants from files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg_deploy.errors import InputError
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import (
    PUBLISHED,
    architecture_of,
    count_macs,
    count_parameters,
    get_variant,
    load_variant,
    name_variant,
)

# Layers, millions of parameters in training and in deploy form, 10⁹ multiply-accumulates and the image size that they
# hold for. Source: the model table of https://github.com/DingXiaoH/RepVGG and the paper's tables 2 to 4,
# https://arxiv.org/abs/2101.03697.
PUBLISHED_NUMBERS = {
    "A0": (22, 9.11, 8.31, 1.36, 224),
    "A1": (22, 14.09, 12.79, 2.36, 224),
    "A2": (22, 28.21, 25.50, 5.12, 224),
    "B0": (28, 15.82, 14.34, 3.06, 224),
    "B1": (28, 57.42, 51.83, 11.82, 224),
    "B1g2": (28, 45.78, 41.36, 8.81, 224),
    "B1g4": (28, 39.97, 36.13, 7.31, 224),
    "B2": (28, 89.02, 80.32, 18.38, 224),
    "B2g2": (28, 70.85, 63.96, 13.68, 224),
    "B2g4": (28, 61.76, 55.78, 11.33, 224),
    "B3": (28, 123.09, 110.96, 26.21, 224),
    "B3g2": (28, 96.91, 87.40, 19.45, 224),
    "B3g4": (28, 83.83, 75.63, 16.06, 224),
    "D2se": (48, 133.33, 120.39, 32.83, 224),
    "RepVGGplus-L2pse": (48, 140.10, 127.15, 67.00, 320),
}
MINE = """
name = "mine"
depths = [1, 2, 3, 1]
width_multipliers = [0.5, 0.5, 0.25, 0.5]
groups = 2
num_classes = 7
"""


def test_published_names_are_those_of_the_table() -> None:
    assert list(PUBLISHED) == list(PUBLISHED_NUMBERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_table_to_its_digits(name: str) -> None:
    layers, training, deploy, gmacs, size = PUBLISHED_NUMBERS[name]
    spec = PUBLISHED[name]
    assert len(spec.layers()) == layers
    assert f"{count_parameters(spec, 'training') / 1e6:.2f}" == f"{training:.2f}"
    assert f"{count_parameters(spec, 'deploy') / 1e6:.2f}" == f"{deploy:.2f}"
    assert f"{count_macs(spec, size, size) / 1e9:.2f}" == f"{gmacs:.2f}"


def test_macs_of_d2se_at_320_pixels_equal_the_published_number() -> None:
    assert f"{count_macs(PUBLISHED['D2se'], 320, 320) / 1e9:.2f}" == "66.99"


def test_macs_of_a_small_network_equal_a_count_by_hand() -> None:
    spec = VariantSpec("hand", (1, 1, 1, 1), (4, 4, 8, 8, 16), (1, 1, 2, 1, 1), "before_relu", 4, num_classes=3)
    # 10 × 6 pixels, halved and rounded up five times: 5×3, 3×2, 2×1, 1×1, 1×1.
    convolutions = 9 * (3 * 4 * 15 + 4 * 4 * 6 + 4 * 8 // 2 * 2 + 8 * 8 * 1 + 8 * 16 * 1)
    squeeze = 2 * (4 * 1 + 4 * 1 + 8 * 2 + 8 * 2 + 16 * 4)
    assert count_macs(spec, 10, 6) == convolutions + squeeze + 16 * 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_get_variant_by_any_spelling_finds_the_published_one(name: str) -> None:
    plain = name.removeprefix("RepVGGplus-")
    for spelling in (name, f"RepVGG-{plain}", f"repvgg_{plain.lower()}", plain.upper()):
        assert get_variant(spelling) == PUBLISHED[name]


def test_get_variant_with_class_count_changes_nothing_else() -> None:
    assert get_variant("RepVGG-B1g4", num_classes=10) == dataclasses.replace(PUBLISHED["B1g4"], num_classes=10)


@pytest.mark.parametrize("name", ["", "C1", "RepVGG", "B1g3", "A0 ", "RepVGG-A0-train"])
def test_get_variant_with_an_unknown_name_names_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="unknown variant") as caught:
        get_variant(name)
    assert "A0, A1" in caught.value.remedy


def test_groups_stand_on_the_even_layers_up_to_26() -> None:
    groups = PUBLISHED["B2g4"].groups
    assert [index for index, count in enumerate(groups) if count == 4] == list(range(2, 27, 2))
    assert set(groups) == {1, 4}


def test_stem_is_narrow_only_in_a0() -> None:
    assert {spec.widths[0] for name, spec in PUBLISHED.items() if name != "A0"} == {64}
    assert PUBLISHED["A0"].widths == (48, 48, 96, 192, 1280)


@pytest.mark.parametrize("name", PUBLISHED)
def test_name_variant_knows_each_with_another_class_count(name: str) -> None:
    assert name_variant(dataclasses.replace(PUBLISHED[name], num_classes=3, bn_eps=1e-3, name="x")) == name


def test_architectures_of_published_variants_all_differ() -> None:
    assert len({architecture_of(spec) for spec in PUBLISHED.values()}) == len(PUBLISHED)
    assert name_variant(dataclasses.replace(PUBLISHED["A0"], strides=(1, 2, 2, 2, 2))) is None


def test_variant_file_gives_the_spec_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE, encoding="utf-8")
    expected = VariantSpec("mine", (1, 2, 3, 1), (32, 32, 64, 64, 256), (1, 1, 2, 1, 2, 1, 2, 1), num_classes=7)
    assert load_variant(path) == get_variant(str(path)) == expected
    assert get_variant(str(path), num_classes=2).num_classes == 2


def test_variant_file_with_all_fields_given_as_lists_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.TOML"
    fields = dataclasses.asdict(dataclasses.replace(PUBLISHED["D2se"], strides=(1, 2, 2, 2, 2), num_classes=5))
    lines = [
        f"{key} = "
        f"{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else repr(value)}"
        for key, value in fields.items()
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert get_variant(str(path)) == dataclasses.replace(PUBLISHED["D2se"], strides=(1, 2, 2, 2, 2), num_classes=5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depths", "depth", "mine.toml"),
        ("[1, 2, 3, 1]", "[1, 2, 3]", "mine.toml"),
        ("[1, 2, 3, 1]", "[1, 2, 3, '1']", "four numbers"),
        ("[1, 2, 3, 1]", "7", "four numbers"),
        ("[1, 2, 3, 1]", "[1, 2, 1000000000000, 1]", "depths of 1,000,000,000,004 blocks"),
        ("[0.5, 0.5, 0.25, 0.5]", "[0.5, 0.5, 0.25]", "four numbers"),
        ("[0.5, 0.5, 0.25, 0.5]", "[0.5, 0.5, inf, 0.5]", "four numbers"),
        ("[0.5, 0.5, 0.25, 0.5]", "[0.5, 0.5, nan, 0.5]", "four numbers"),
        ("[0.5, 0.5, 0.25, 0.5]", "[0.5, 0.5, 0.001, 0.5]", "at least 1"),
        ("groups = 2", "groups = true", "mine.toml"),
        ("groups = 2", "groups = 5", "5 groups do not divide"),
        ("groups = 2", "groups = [1, 1]", "expected 8 groups"),
        ("num_classes = 7", "num_classes = 7.0", "num_classes: expected a int"),
        ("num_classes = 7", "classes = 7", "classes"),
        ("num_classes = 7", "se = 'after'", "se: expected one of"),
        ("num_classes = 7", "widths = [1, 2, 3, 4, 5]", "both widths and width_multipliers"),
        ('name = "mine"', "name = mine", "cannot be read as a variant"),
    ],
)
def test_variant_file_with_a_mistake_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    assert old in MINE
    path.write_text(MINE.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_variant(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_variant_file_that_is_missing_or_binary_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a variant"):
        get_variant(str(path))


def test_sample_variant_file_loads(sample_dir: Path) -> None:
    spec = load_variant(sample_dir / "variant.toml")
    assert name_variant(spec) is None
    assert count_parameters(spec, "training") < 1.0e6


@given(st.integers(1, 4), st.integers(1, 4), st.integers(8, 64), st.integers(1, 3))
def test_deploy_form_never_has_more_parameters_than_training_form(
    first: int, second: int, width: int, classes: int
) -> None:
    spec = VariantSpec("any", (first, second, 1, 1), (width,) * 5, (1,) * (3 + first + second), num_classes=classes)
    assert count_parameters(spec, "deploy") < count_parameters(spec, "training")
