"""Which Triton container holds which TensorRT. Standard library only.

A plan runs on the TensorRT that built it, so the container must have that very version; tags of releases whose TensorRT could be confirmed are
listed, and for every other version the user is told where NVIDIA publishes it.
"""

from __future__ import annotations

CONTAINERS = {
    "22.11": "8.5.1",  # release notes of Triton
    "23.04": "8.6.1.2",  # issue 5812
    "23.05": "8.6.1.2",  # issue 5975
    "24.02": "8.6.3",  # issues 6959 and 7221
    "24.03": "8.6.3",  # issue 7221
    "24.04": "8.6.3",  # issue 7221
    "24.05": "10.0.1.6",  # issue 7374
    "24.08": "10.3.0.26",  # release notes of the containers that share its base image, as those below
    "24.10": "10.5",
    "24.12": "10.7.0.23",
    "25.06": "10.11.0.33",
}
"""TensorRT by release of the container `RELEASE-py3`, each with its source. Not complete: no others could be confirmed.

Issues are those of https://github.com/triton-inference-server/server/issues, whose reporters saw the version in that very container. The `trtllm`
containers of the same releases hold other versions (docs/introduction/compatibility.md there), and so may the TensorRT containers (issue 5975).
"""
MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"


def find_container(tensorrt_version: str) -> str | None:
    """The newest listed image whose TensorRT is this one, such as `nvcr.io/nvidia/tritonserver:24.12-py3`; None where none is listed.

    Args:
        tensorrt_version: Such as `10.7.0.23`. Where a release is only known as `10.5`, the numbers that are known must agree. The Python packages
            of 10.0 to 10.7 call themselves `10.7.0`, and each was built once: the three numbers are enough.
    """
    wanted = tensorrt_version.split(".")
    for release, version in sorted(CONTAINERS.items(), reverse=True):
        known = version.split(".")
        if wanted[: len(known)] == known or (len(wanted) == 3 and wanted[0] == "10" and known[:3] == wanted):
            return f"nvcr.io/nvidia/tritonserver:{release}-py3"
    return None


def describe_container(tensorrt_version: str) -> str:
    """The image to use, or how to find it."""
    found = find_container(tensorrt_version)
    return found or f"the tritonserver image with TensorRT {tensorrt_version} (not listed here; see {MATRIX})"
