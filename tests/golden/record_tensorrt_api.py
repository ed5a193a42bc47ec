"""Records which names the runtime classes of a real TensorRT have: prints JSON of one module.

Run it with the module's folder on PYTHONPATH.

    pip install --no-deps --target lean tensorrt-lean-cu13-bindings==11.4.0.106 tensorrt-lean-cu13-libs==11.4.0.106
    PYTHONPATH=lean python tests/golden/record_tensorrt_api.py tensorrt_lean_bindings
    pip install tensorrt==8.5.3.1 && python3.10 tests/golden/record_tensorrt_api.py tensorrt    # cuDNN and cuBLAS, or
    empty libraries, must be there

The bindings import without a driver; nothing of them is called here, for without one that would end the process.
`tensorrt_api.json` holds what it printed for each version, and `cuda_api.json` the same of cuda.bindings.driver.
"""

from __future__ import annotations

import importlib
import json
import sys

CLASSES = (
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "TensorIOMode",
    "ExecutionContextAllocationStrategy",
    "DataType",
)

BUILDER = (
    "Builder", "BuilderFlag", "ComputeCapability", "EngineInspector", "HardwareCompatibilityLevel", "IBuilderConfig",
    "ILayer", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache",
    "LayerInformationFormat", "LayerType", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity", "TacticSource",
)  # fmt: skip
"""What a build uses besides; the lean runtime, which cannot build, has some of the enumerations only."""


def record(name: str) -> dict[str, list[str]]:
    """Public names of the module and of the classes that an Engine and a build use."""
    module = importlib.import_module(name)
    found = {"module": sorted(n for n in dir(module) if not n.startswith("_"))}
    if name == "cuda.bindings.driver":
        return {
            "module": [
                n
                for n in found["module"]
                if n.startswith("cu") or n in ("CUresult", "CUdevice_attribute", "CUstreamCaptureMode")
            ]
        }
    kinds = (*CLASSES, *BUILDER) if hasattr(module, "Builder") else CLASSES
    for kind in kinds:
        if hasattr(module, kind):
            found[kind] = sorted(n for n in dir(getattr(module, kind)) if not n.startswith("_"))
    keep = {*kinds, "init_libnvinfer_plugins"}
    found["module"] = [n for n in found["module"] if n in keep]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(record(sys.argv[1])) + "\n")
