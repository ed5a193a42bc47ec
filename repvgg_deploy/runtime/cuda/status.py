"""What a status of CUDA means: one function through which each passes. Standard library only.

Source: CUDA driver API, CUresult (https://docs.nvidia.com/cuda/cuda-driver-api).
"""

from __future__ import annotations

from ...errors import CudaContextError, CudaError, CudaMemoryError

_NO_DRIVER = "install the NVIDIA driver (in a container: start it with --gpus all and the NVIDIA container toolkit), then check nvidia-smi"
_REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "check nvidia-smi and CUDA_VISIBLE_DEVICES: the driver shows this process no GPU",
    "CUDA_ERROR_INVALID_DEVICE": "give the index of a GPU that nvidia-smi lists, counted within CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_STUB_LIBRARY": "remove the CUDA toolkit's lib64/stubs from LD_LIBRARY_PATH: that libcuda is for linking only",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "restart the machine or reload the kernel module: driver and kernel module are of different versions",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start the GPU's system services (nvidia-fabricmanager on machines with NVSwitch)",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "remove the cuda-compat package from LD_LIBRARY_PATH, or update the driver",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU alone: end it, or set nvidia-smi -c DEFAULT",
    "CUDA_ERROR_NOT_INITIALIZED": "open the Engine in the process that uses it: CUDA does not survive a fork; start workers with spawn",
    "CUDA_ERROR_UNSUPPORTED_LIMIT": "update the NVIDIA driver",
    "CUDA_ERROR_OUT_OF_MEMORY": "free GPU memory (nvidia-smi shows who has it), build the plan with a smaller --max-batch, or lower "
    "EngineOptions(contexts=…)",
}
_LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE",
        "INVALID_PC", "ASSERT", "LAUNCH_TIMEOUT", "ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE", "CONTEXT_IS_DESTROYED", "TENSOR_MEMORY_LEAK",
        "MPS_CLIENT_TERMINATED", "CONTAINED",
    )
)  # fmt: skip
"""After one of these every call in the process fails with the same status."""


def make_error(call: str, name: str, text: str) -> CudaError:
    """The error of a call that did not succeed.

    Args:
        call: Such as `cuMemAlloc(4096 bytes)`.
        name: CUDA's own name of the status, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        text: CUDA's own words for it.
    """
    message = f"{call} failed: {name}: {text}"
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        return CudaMemoryError(message, remedy=_REMEDIES[name])
    if name in _LOST:
        return CudaContextError(
            message,
            remedy="restart the process: after this error CUDA refuses every further call in it; if it comes again, look for Xid lines in dmesg",
        )
    return CudaError(message, remedy=_REMEDIES.get(name, "check nvidia-smi and the driver's version; set CUDA_LAUNCH_BLOCKING=1 to find the cause"))


def no_driver(reason: str) -> CudaError:
    """The error where libcuda is not there."""
    return CudaError(f"no NVIDIA driver was found: {reason}", remedy=_NO_DRIVER)


def driver_too_old(package: str, needed: int, found: str) -> CudaError:
    """The error where the driver knows an older CUDA than the package was made for."""
    return CudaError(
        f"the NVIDIA driver is too old: {package} needs one for CUDA {needed}, found one for CUDA {found} (cudaErrorInsufficientDriver)",
        remedy=f"update the driver, or install a {package} (and a TensorRT) made for CUDA {found.split('.', maxsplit=1)[0]}",
    )


def no_such_device(index: int, count: int) -> CudaError:
    """The error where a GPU was asked for that is not there."""
    known = "no GPU is" if count == 0 else "only GPU 0 is" if count == 1 else f"GPUs 0 to {count - 1} are"
    return CudaError(f"GPU {index} was asked for (CUDA_ERROR_INVALID_DEVICE), and {known} there", remedy=_REMEDIES["CUDA_ERROR_INVALID_DEVICE"])
