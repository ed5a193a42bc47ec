"""Prints the build arguments with which an image gets the TensorRT that a plan's passport names.

docker build -f docker/triton.Dockerfile $(python docker/match_versions.py b2.plan) -t repvgg-triton .
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repvgg_deploy.errors import InputError, PlanError, RepVGGDeployError
from repvgg_deploy.files.passport import passport_path, read_passport
from repvgg_deploy.runtime.opening import is_plan
from repvgg_deploy.serving.options import find_container
from repvgg_deploy.specs.values import PlanPassport


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="match_versions.py", description="prints the build arguments that match a plan's passport"
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    try:
        plan = parser.parse_args(argv).plan
        passport = read_passport(plan)  # the plan itself need not be here
        if passport is None:
            raise explain_missing_passport(plan)
        print(" ".join(f"--build-arg {name}={value}" for name, value in match(passport).items()))
    except RepVGGDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def explain_missing_passport(plan: Path) -> RepVGGDeployError:
    """Whether only the passport is missing, or what was given is no plan at all.

    Raises:
        ModelError: There is no such file.
    """
    if is_plan(plan):
        return PlanError(
            f"{plan}: has no passport {passport_path(plan).name} beside it", remedy="copy it together with the plan"
        )
    return InputError(
        f"{plan}: is no TensorRT plan", remedy="give the .plan that repvgg-trt build wrote, with its passport beside it"
    )


def match(passport: PlanPassport) -> dict[str, str]:
    """Build argument → value; without TRITON_RELEASE where no release is known to have this TensorRT.

    Raises:
        InputError: Neither Dockerfile installs this TensorRT.
    """
    version = passport.tensorrt_version
    if passport.flavour == "tensorrt_rtx":
        return {"TENSORRT": f"tensorrt-rtx-cu13=={version}", "CUDA_MAJOR": "13"}
    major, minor, *_ = (int(part) for part in version.split("."))
    if major < 10:
        raise InputError(
            f"TensorRT {version} is not one of the packages for CUDA 12 or 13",
            remedy="build the plan with TensorRT 10 or later",
        )
    # The packages have three numbers before 10.8, though the library has four.
    package = version if (major, minor) >= (10, 8) else ".".join(version.split(".")[:3])
    arguments = {"TENSORRT_VERSION": package, "CUDA_MAJOR": "12" if major == 10 else "13"}
    container = find_container(version)
    if container is not None:
        arguments["TRITON_RELEASE"] = container.rpartition(":")[2].removesuffix("-py3")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
