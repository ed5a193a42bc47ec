"""A model file → what runs it, chosen by the file's content and the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..specs.values import ModelMetadata
from .backends import Backend, BackendName, EngineOptions, SplittingBackend, open_backend, open_plan_backend
from .devices import DeviceChoice, find_place
from .model_files import is_plan, read_model


@dataclass(frozen=True, slots=True)
class OpenModel:
    """An opened model.

    Attributes:
        metadata: All that is known of it.
        backend: What runs it.
        splitting: The same backend, if it takes any number of images itself.
        device: As the Engine names it.
    """

    metadata: ModelMetadata
    backend: Backend
    splitting: SplittingBackend | None
    device: str


def open_model(path: Path, device: DeviceChoice, backend: BackendName | None, options: EngineOptions) -> OpenModel:
    """Opens an ONNX or a plan.

    Raises:
        RepVGGDeployError: As Engine says.
    """
    if is_plan(path):
        place = find_place(device, options, default="cuda")
        if place.kind == "cpu":
            raise InputError(f"{path}: is a TensorRT plan, which runs on a GPU only", remedy="give the .onnx that it was built from")
        plan = open_plan_backend(path, place.choose(options), backend=backend)
        return OpenModel(plan.metadata, plan, plan, place.label)
    place = find_place(device, options, default="cpu")
    metadata = read_model(path)
    return OpenModel(metadata, open_backend(path, metadata.spec, place.kind, place.choose(options), backend=backend), None, place.label)
