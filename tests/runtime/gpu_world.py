"""An Engine on the fake GPU, for tests."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.files.passport import passport_path
from repvgg_deploy.runtime.cuda import opening
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import PlanPassport
from tests.fakes.cuda import FakeCuda
from tests.fakes.tensorrt import Faults, make_module, make_plan, open_session
from tests.files.make_passport import make_passport
from tests.runtime.make_model import ModelOptions, make_onnx


@dataclass
class World:
    """A fake GPU machine with a plan."""

    cuda: FakeCuda
    trt: Any
    onnx: Path
    plan: Path

    def open(self, device: Any = None, backend: Any = None, **options: Any) -> Engine:
        return Engine(self.plan, device=device, backend=backend, options=EngineOptions(**options))

    def expect(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
        """What ONNX Runtime gives, an image at a time."""
        session = open_session(self.onnx.read_bytes())
        source = session.get_inputs()[0]
        return session.run(None, {source.name: batch})


@dataclass(frozen=True)
class Setting:
    """What the machine and the plan are like."""

    model: ModelOptions = field(default_factory=ModelOptions)
    profile: tuple[int, int, int] = (1, 4, 8)
    devices: int = 1
    memory_bytes: int = 1 << 30
    version: str = "10.16.1.11"
    rtx: bool = False
    eager: bool = False
    passport: bool = True
    faults: Faults | None = None
    header: tuple[tuple[str, Any], ...] = ()


def make_world(folder: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting = Setting()) -> World:
    """Puts a fake driver and a fake TensorRT where the runtime looks for real ones."""
    cuda = FakeCuda(devices=setting.devices, memory_bytes=setting.memory_bytes, eager=setting.eager)
    name = "tensorrt_rtx" if setting.rtx else "tensorrt"
    trt = make_module(cuda, version=setting.version, name=name, faults=setting.faults)
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(folder / "cache"))
    monkeypatch.setattr(opening, "open_cuda", lambda provider=None: cuda)
    monkeypatch.setitem(sys.modules, name, trt)
    onnx = make_onnx(folder / "m.onnx", setting.model)
    header: dict[str, Any] = {"version": setting.version, "rtx": setting.rtx, **dict(setting.header)}
    plan = make_plan(folder / "m.plan", onnx, profile=setting.profile, **header)
    if setting.passport:
        write_passport(plan, onnx, flavour=name, tensorrt_version=setting.version)
    return World(cuda, trt, onnx, plan)


def write_passport(plan: Path, onnx: Path, **changes: Any) -> PlanPassport:
    """The passport beside a plan."""
    known = {"compute_capabilities": ("8.6",), "platform": None, "gpu_name": "Fake GPU 0"}
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    passport = replace(make_passport(), plan_sha256=digest, spec=read_metadata(onnx).spec, **{**known, **changes})
    passport_path(plan).write_text(codec.dumps(passport), encoding="utf-8")
    return passport


def assert_answers(world: World, engine: Engine, batch: NDArray[Any]) -> None:
    """The Engine gives what ONNX Runtime gives."""
    np.testing.assert_allclose(engine.infer(batch), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
