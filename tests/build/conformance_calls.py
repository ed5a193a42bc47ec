"""The calls of the builder and the runtime, made on one TensorRT's own bindings; a program, started by the test.

Usage: conformance_calls.py BINDINGS SCRATCH MODEL. Prints the version, how many calls reached C++, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.build import compile as compile_module
from repvgg_deploy.build import network as network_module
from repvgg_deploy.build.library import BuildLog, Gpu, choose_tactic_sources, is_strongly_typed
from repvgg_deploy.build.monitor import BuildState, make_monitor
from repvgg_deploy.build.options import BuildRequest
from repvgg_deploy.build.recipes import configure, create_network, resolve_targets
from repvgg_deploy.build.source import read_source
from repvgg_deploy.errors import BuildError, PlanError
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.runtime.cuda.port import DeviceInfo
from repvgg_deploy.runtime.tensorrt import plan as plan_module
from repvgg_deploy.runtime.tensorrt.context import Lane, count_scratch_bytes, make_context
from repvgg_deploy.runtime.tensorrt.kernels import KernelCache
from repvgg_deploy.specs.values import BuildConfig, ShapeProfile
from tests.fakes.tensorrt_stub import load

STREAM, MEMORY = 0x7FFFDEADBEEF, 0x7F0000000000


def main(bindings: Path, scratch: Path, model: Path) -> None:
    trt, calls = load(bindings, scratch)
    problems: list[str] = []

    def attempt(what: str, call: Callable[[], Any], *expected: type[Exception]) -> Any:
        """Makes calls; `expected` is what the meaningless answers lead to."""
        try:
            return call()
        except expected:
            return None
        except Exception as error:  # noqa: BLE001 - whatever the bindings raise is the finding
            problems.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
            return None

    name = trt.__name__
    library = Library("tensorrt_rtx" if "rtx" in name else "tensorrt", trt, trt.__version__, "lean" in name)
    if not library.is_lean:
        _build(library, scratch, model, attempt)
    _run(library, scratch, model, attempt)
    found = {"version": library.version, "calls": calls.value, "problems": problems}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the objects must not be freed


def _build(library: Library, scratch: Path, model: Path, attempt: Callable[..., Any]) -> None:
    trt, log, source = library.trt, BuildLog(library.trt), read_source(model)
    newer = library.number >= (8, 6) and not library.is_rtx
    config = BuildConfig(
        optimization_level=3 if library.number >= (8, 6) or library.is_rtx else None,
        version_compatible=newer, hardware_compatible=newer, sparse=True, profile=ShapeProfile(1, 4, 4, batches=(1, 4)),
    )  # fmt: skip
    targets = resolve_targets(library, (), None) if library.is_rtx else ("8.6",)
    request = BuildRequest(source, config, library, Gpu("NVIDIA A10", "8.6", None), targets)
    builder = attempt("Builder", lambda: trt.Builder(log.trt_logger))
    network = attempt("create_network", lambda: create_network(library, builder))
    attempt("parse", lambda: network_module.parse(library, network, log=log, source=source), BuildError)
    parser = attempt("OnnxParser", lambda: trt.OnnxParser(network, log.trt_logger))
    attempt("parser error", lambda: network_module._describe(parser.get_error(0), source.graph))
    attempt("tensor_shapes", lambda: network_module.tensor_shapes(network))
    attempt("output_types", lambda: network_module.output_types(library, network))
    settings = attempt("create_builder_config", builder.create_builder_config)
    for precision in ("fp16", "int8"):
        for tf32 in (False, True):
            asked = replace(request, source=replace(source, precision=precision), config=replace(config, tf32=tf32))
            attempt(f"configure {precision}", lambda asked=asked: configure(asked, network, settings))
    if not is_strongly_typed(library):
        none = dict.fromkeys(("CUDNN", "CUBLAS", "CUBLAS_LT"))
        attempt("tactic sources", lambda: choose_tactic_sources(trt, settings, none))
    attempt("profile", lambda: network_module.add_profiles(builder, settings, source.spec, config.profile))
    if not library.is_rtx:
        (scratch / "t.timing").write_bytes(b"x" * 64)
        for file in ("none.timing", "t.timing"):
            attempt("timings", lambda file=file: compile_module.TimingFile(scratch / file, settings, is_ours=True))
        timings = attempt("get_timing_cache", settings.get_timing_cache)
        attempt("combine", lambda: timings.combine(settings.create_timing_cache(b"abc"), False))
        attempt("serialize", lambda: timings.serialize())
    monitor = attempt("monitor", lambda: make_monitor(trt, BuildState()))
    if monitor is not None:
        attempt("progress_monitor", lambda: setattr(settings, "progress_monitor", monitor))
    plan = attempt("build", lambda: builder.build_serialized_network(network, settings))
    attempt("memoryview", lambda: memoryview(plan).nbytes)
    attempt("inspect", lambda: compile_module._inspect(request, log, plan, ()), BuildError)


def _run(library: Library, scratch: Path, model: Path, attempt: Callable[..., Any]) -> None:
    trt, log, path = library.trt, plan_module.TrtLog(library.trt), Path("x.plan")
    device = DeviceInfo("NVIDIA A10", "8.6", "580.95.05", "13.0", 1 << 34)
    code = library.number >= (8, 6)
    runtime = attempt("Runtime", lambda: plan_module._start_runtime(library, log, device, carries_code=code))
    engine = attempt("deserialize", lambda: plan_module._deserialize(library, log, runtime, b"plan", path=path))
    attempt("interface", lambda: plan_module._read_interface(trt, engine, path), PlanError)
    attempt("tensor", lambda: plan_module._read_tensor(engine, "input", path), PlanError)
    attempt("profile shape", lambda: [tuple(one) for one in engine.get_tensor_profile_shape("input", 0)])
    attempt("profiles", lambda: engine.num_optimization_profiles)
    attempt("scratch", lambda: count_scratch_bytes(engine))
    floats = np.dtype(np.float32)
    source = plan_module.PlanTensor("input", floats, (-1, 3, 8, 8))
    output = plan_module.PlanTensor("logits", floats, (-1, 10))
    sizes = (1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8)
    interface = plan_module.PlanInterface(source, (output,), (plan_module.PlanProfile(0, *sizes),))
    (scratch / "k").write_bytes(b"kernels")
    kernels = KernelCache(scratch / "k") if library.is_rtx else None
    spec: Any = None
    plan = plan_module.OpenPlan(library, log, runtime, engine, interface, spec, None, kernels)
    for one_shape in (False, True):
        # Not the profile that the stub says is active, so that the context changes to it.
        how: dict[str, Any] = {"profile": 1, "stream_handle": STREAM, "one_shape": one_shape}
        context = attempt("context", lambda how=how: make_context(plan, (MEMORY, 1 << 33), **how))
        lane = Lane(context, plan, keeps_kernels=True)
        attempt("set_shape", lambda lane=lane: lane.set_shape((2, 3, 8, 8)))
        attempt("enqueue", lambda lane=lane: lane.enqueue((MEMORY, MEMORY + 256), STREAM))
        attempt("can_capture", lambda lane=lane: lane.can_capture(STREAM))
    if kernels is not None:
        attempt("kernels", lambda: kernels._cache.serialize())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
