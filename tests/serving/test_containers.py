from __future__ import annotations

import re

import pytest

from repvgg_deploy.serving.options import CONTAINERS, describe_container, find_container


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("8.6.1.2", "23.05"),
        ("8.6.3.1", "24.04"),
        ("10.7.0.23", "24.12"),
        ("10.5.0.18", "24.10"),
        ("10.0.1.6", "24.05"),
        ("10.7.0", "24.12"),
        ("10.0.1", "24.05"),
    ],
)
def test_find_container_of_a_listed_version_names_its_image(version: str, release: str) -> None:
    assert find_container(version) == f"nvcr.io/nvidia/tritonserver:{release}-py3"


@pytest.mark.parametrize("version", ["8.6.1.6", "10.7.0.24", "10.50.0.1", "11.4.0.106", "8.6.1", "10.7", "10", ""])
def test_find_container_of_another_version_guesses_nothing(version: str) -> None:
    assert find_container(version) is None
    assert version in describe_container(version)
    assert "support-matrix" in describe_container(version)


def test_containers_are_releases_and_versions() -> None:
    assert all(
        re.fullmatch(r"2\d\.(0[1-9]|1[0-2])", release) and re.fullmatch(r"\d+(\.\d+){1,3}", v)
        for release, v in CONTAINERS.items()
    )
