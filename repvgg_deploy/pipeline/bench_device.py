"""What a benchmark runs on, and what that can do at most."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..build.build import look_for_gpu
from ..errors import InputError
from ..measure.cpu_peaks import cpu_name
from ..measure.gpu_peaks import find_gpu_peaks, look_up_gpu
from ..measure.records import Device
from ..measure.roofline import Ceiling
from ..runtime.engine import Engine

logger = logging.getLogger(__name__)


def describe_device(engines: Sequence[Engine], *, threads: int | None) -> Device:
    """The device that all engines run on.

    Args:
        engines: At least one.
        threads: That share one batch on a CPU.

    Raises:
        InputError: They run on several.
    """
    places = sorted({engine.device for engine in engines})
    if len(places) > 1:
        raise InputError(
            f"the models run on {' and '.join(places)}, expected one device: their figures would stand in one table",
            remedy="give --device, or run repvgg-trt bench once for each device",
        )
    if places[0] == "cpu":
        return Device("cpu", cpu_name(), threads)
    found = look_for_gpu(int(places[0].partition(":")[2] or 0))
    if found.gpu is None:
        logger.warning("the name of the GPU is not known: %s", found.reason)
        return Device("gpu", "GPU")
    return Device("gpu", found.gpu.name, None, found.gpu.driver_version)


def choose_ceiling(device: Device, name: str | None, *, tf32: bool) -> Ceiling | None:
    """The peaks of a GPU from the table; None for a CPU, which is measured, and for a GPU that is not in it.

    Args:
        device: As the driver names it.
        name: In its place, where the user says which one it is.
        tf32: Whether FP32 convolutions may run in TF32.

    Raises:
        InputError: The user's name is not in the table, or the models run on a CPU.
    """
    if device.kind == "cpu":
        if name is not None:
            raise InputError(
                f"--gpu {name} is for the roofline of a GPU, and the models run on the CPU", remedy="leave out --gpu, or give --device cuda"
            )
        return None
    gpu = find_gpu_peaks(name) if name is not None else look_up_gpu(device.name)
    if gpu is None:
        logger.warning("the peaks of %s are not in the table: no roofline; --gpu says which known GPU it is", device.name)
        return None
    return gpu.ceiling(tf32=tf32)
