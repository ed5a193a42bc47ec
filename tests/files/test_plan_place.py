"""Verdicts on a plan in an environment: every documented rule, from both sides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.files import plan_place
from repvgg_deploy.files.plan_place import Compatible, Environment, Incompatible, find_gpu, judge_plan, parse_version
from tests.files.make_passport import make_passport

RTX: dict[str, Any] = {
    "flavour": "tensorrt_rtx",
    "tensorrt_version": "1.7.1.116",
    "gpu_name": None,
    "compute_capabilities": ("8.6", "8.9", "12.0"),
    "driver_version": None,
}


def environment(**changes: Any) -> Environment:
    """Where the documented example was built: TensorRT 11.4.0.106 on an L4."""
    same: dict[str, Any] = {
        "flavour": "tensorrt",
        "tensorrt_version": "11.4.0.106",
        "gpu_name": "NVIDIA L4",
        "compute_capability": "8.9",
        "driver_version": "580.95.05",
        "platform": None,
    }
    return Environment(**{**same, **changes})


def rtx_environment(**changes: Any) -> Environment:
    return environment(**{"flavour": "tensorrt_rtx", "tensorrt_version": "1.7.1.116", **changes})


def refusal(passport: Any, where: Environment) -> str:
    found = judge_plan(passport, where)
    assert isinstance(found, Incompatible), found
    assert found.remedy
    return f"{found.reason} / {found.remedy}"


def test_plan_where_it_was_built_is_compatible_without_a_warning() -> None:
    assert judge_plan(make_passport(platform="linux-x86_64"), environment(platform="linux-x86_64")) == Compatible(())


@pytest.mark.parametrize(
    ("version", "flexible", "runs"), [("11.4.0.106", True, True), ("11.5.0.1", True, True), ("11.3.0.1", True, False)]
)
def test_lean_runtime_runs_the_versions_that_the_whole_one_would(version: str, flexible: bool, runs: bool) -> None:
    passport = make_passport(version_compatible=flexible)
    assert isinstance(judge_plan(passport, environment(tensorrt_version=version, lean=True)), Compatible) == runs
    assert "and the plan is not version-compatible" in refusal(
        make_passport(), environment(tensorrt_version=version, lean=True)
    )


@pytest.mark.parametrize(("plan", "here"), [("tensorrt", "tensorrt_rtx"), ("tensorrt_rtx", "tensorrt")])
def test_plan_of_the_other_flavour_is_refused(plan: str, here: str) -> None:
    passport = make_passport(**(RTX if plan == "tensorrt_rtx" else {}))
    assert "neither reads the other's plans" in refusal(passport, environment(flavour=here))


def test_plan_of_another_platform_is_refused() -> None:
    assert "do not cross platforms" in refusal(
        make_passport(platform="linux-x86_64"), environment(platform="linux-aarch64")
    )


@pytest.mark.parametrize("version", ["11.4.0.107", "11.4.1.5", "11.3.0.1", "10.16.1.11", "8.6.1"])
def test_plan_needs_its_very_version(version: str) -> None:
    text = refusal(make_passport(), environment(tensorrt_version=version))
    assert "11.4.0.106" in text and version in text
    assert ("--version-compatible" in text) == (parse_version(version) > (11, 4, 0, 106))


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("10.9.0.34", "10.16.1.11", True),
        ("10.9.0.34", "10.9", True),
        ("10.9.0.34", "10.8.0.43", False),
        ("10.9.0.34", "11.4.0.106", True),
        ("8.6.1", "10.9.0.34", True),
        ("8.6.1", "11.4.0.106", False),
        ("11.0.0.1", "12.0.0.1", False),
        ("10.9.0.34", "8.6.1", False),
    ],
)
def test_version_compatible_plan_runs_on_later_versions(built: str, here: str, runs: bool) -> None:
    found = judge_plan(
        make_passport(version_compatible=True, tensorrt_version=built), environment(tensorrt_version=here)
    )
    assert isinstance(found, Compatible if runs else Incompatible), found


def test_version_compatible_plan_in_another_major_version_warns() -> None:
    found = judge_plan(make_passport(version_compatible=True, tensorrt_version="10.9.0.34"), environment())
    assert isinstance(found, Compatible) and "known issues" in found.warnings[0]


def test_part_of_a_version_is_compared_as_far_as_it_goes() -> None:
    found = judge_plan(make_passport(), environment(tensorrt_version="11.4"))
    assert isinstance(found, Compatible) and found.warnings == (
        "TensorRT 11.4 is only a part of a version: the plan needs 11.4.0.106 exactly",
    )
    assert "runs plans of its own version only" in refusal(make_passport(), environment(tensorrt_version="11.3"))


def test_rtx_plan_runs_on_its_release_only_whatever_was_asked_for() -> None:
    for flexible in (False, True):
        passport = make_passport(**RTX, version_compatible=flexible)
        assert isinstance(judge_plan(passport, rtx_environment()), Compatible)
        assert "of its own version only" in refusal(passport, rtx_environment(tensorrt_version="1.8.0.1"))


def test_rtx_plan_runs_on_the_capabilities_in_its_list() -> None:
    passport = make_passport(**RTX)
    for capability in ("8.6", "8.9", "12.0"):
        assert judge_plan(passport, rtx_environment(compute_capability=capability, gpu_name="another")) == Compatible(
            ()
        )
    text = refusal(passport, rtx_environment(compute_capability="9.0", gpu_name="NVIDIA H100 PCIe"))
    assert "NVIDIA H100 PCIe (compute capability 9.0)" in text and "8.6, 8.9, 12.0" in text


def test_plan_for_another_capability_is_refused_and_says_what_would_help() -> None:
    text = refusal(make_passport(), environment(compute_capability="8.6", gpu_name="NVIDIA A10"))
    assert (
        "compute capability 8.9 (NVIDIA L4)" in text
        and "NVIDIA A10 (compute capability 8.6)" in text
        and "--hardware-compatible" in text
    )


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("7.5", False), ("8.0", True), ("8.6", True), ("9.0", True), ("12.0", True), ("8.7", False)],
)
def test_hardware_compatible_plan_runs_from_ampere_on_but_not_on_jetson(capability: str, runs: bool) -> None:
    found = judge_plan(
        make_passport(hardware_compatible=True), environment(compute_capability=capability, gpu_name="x")
    )
    assert isinstance(found, Compatible if runs else Incompatible), found


@pytest.mark.parametrize(
    ("built", "here", "warns"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", False),
        ("Tesla T4", "NVIDIA T4", False),
        ("NVIDIA GeForce RTX 3080", "NVIDIA GeForce RTX 3080 Ti", True),
        ("NVIDIA L4", "NVIDIA L40", True),
        ("NVIDIA L4", None, False),
    ],
)
def test_other_gpu_of_the_same_capability_is_a_warning(built: str, here: str | None, warns: bool) -> None:
    found = judge_plan(make_passport(gpu_name=built), environment(gpu_name=here))
    assert isinstance(found, Compatible) and any("was tuned on" in line for line in found.warnings) == warns


def test_what_is_not_known_is_not_judged_and_said() -> None:
    found = judge_plan(make_passport(), Environment(None, None, None, None, None))
    assert isinstance(found, Compatible) and len(found.warnings) == 2
    assert "version of TensorRT was not judged" in found.warnings[0] and "GPU was not judged" in found.warnings[1]


def test_older_driver_is_a_warning() -> None:
    found = judge_plan(make_passport(), environment(driver_version="535.10"))
    assert isinstance(found, Compatible) and "driver 535.10 is older than 580.95.05" in found.warnings[0]
    assert judge_plan(make_passport(), environment(driver_version="595.10")) == Compatible(())


@pytest.mark.parametrize(
    ("text", "name", "capability"),
    [
        ("a10", "A10", "8.6"),
        ("A100", "A100", "8.0"),
        ("t4", "T4", "7.5"),
        ("Tesla T4", "T4", "7.5"),
        ("l4", "L4", "8.9"),
        ("L40S", "L40S", "8.9"),
        ("h100", "H100", "9.0"),
        ("b200", "B200", "10.0"),
        ("rtx4090", "RTX 4090", "8.9"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", "12.0"),
        ("orin", "Orin", "8.7"),
        ("8.6", None, "8.6"),
        ("86", None, "8.6"),
        ("sm_120", None, "12.0"),
    ],
)
def test_gpu_is_found_by_name_or_capability(text: str, name: str | None, capability: str) -> None:
    assert find_gpu(text) == (name, capability)


@pytest.mark.parametrize("text", ["", "a11", "rtx", "9.9", "voodoo2"])
def test_gpu_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no GPU is known"):
        find_gpu(text)


def test_names_of_gpus_are_told_apart() -> None:
    names = [name for names in plan_place._NAMES.values() for name in names]
    assert len(names) == len({find_gpu(name)[0] for name in names}) > 60


@pytest.mark.parametrize(
    ("precision", "capability", "warned"), [("int8", "10.3", True), ("int8", "10.0", False), ("fp8", "10.3", False)]
)
def test_int8_on_a_gpu_that_hardly_has_it_is_a_warning_that_names_fp8(
    precision: Any, capability: str, warned: bool
) -> None:
    passport = make_passport(compute_capabilities=(capability,), gpu_name=None)
    passport = dataclasses.replace(passport, config=dataclasses.replace(passport.config, precision=precision))
    found = judge_plan(passport, environment(compute_capability=capability, gpu_name="NVIDIA B300"))
    assert isinstance(found, Compatible)
    assert [("B300 and GB300" in text, "--fp8" in text) for text in found.warnings] == [(True, True)] * warned
