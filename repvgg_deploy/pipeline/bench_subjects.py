"""A model file → what is to be measured of it: an Engine, its layers' costs, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError
from ..files.onnx import WeightedNode, graph_precision, precision_of, read_graph, weighted_nodes
from ..files.output import sha256_file
from ..files.passport import read_passport
from ..measure.costs import ITEM_BYTES, LayerCost, count_costs
from ..runtime.engine import Engine
from ..runtime.opening import is_plan
from ..specs.values import PlanPassport, Precision, VariantSpec
from ..specs.variants import image_size, name_variant

Rival = Literal["onnxruntime", "torch"]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        engine: Open.
        plan: Whether it is a TensorRT plan.
        variant: Its architecture; None where it is not known.
        precision: The lowest of its layers; None where it is not known.
        size: (height, width) of the images.
        costs: Of the layers; empty where architecture or precision are not known.
        tf32: Whether a plan was built to round the inputs of FP32 convolutions to TF32.
    """

    path: Path
    sha256: str
    engine: Engine
    plan: bool
    variant: VariantSpec | None
    precision: Precision | None
    size: tuple[int, int]
    costs: tuple[LayerCost, ...]
    tf32: bool = False

    @property
    def variant_name(self) -> str | None:
        """The published name of the architecture, or its own."""
        return None if self.variant is None else name_variant(self.variant) or self.variant.name

    def make_batch(self, count: int) -> NDArray[Any]:
        """Drawn images of the input's kind."""
        source, generator = self.engine.spec.input, np.random.default_rng(0)
        shape = (count, *self.size, 3) if source.layout == "NHWC" else (count, 3, *self.size)
        if source.dtype == "uint8":
            return generator.integers(0, 256, shape, np.uint8)
        return generator.standard_normal(shape, np.float32).astype(source.dtype)


def describe_subject(path: Path, engine: Engine, size: tuple[int, int] | None) -> Subject:
    """What is known of an opened model.

    Args:
        path: The file.
        engine: Of it.
        size: (height, width) in place of the model's own, for one that accepts any.

    Raises:
        InputError: The image size is not known, or not one that the model accepts.
    """
    found = size or image_size(engine.spec)
    if found is None or engine.spec.input.layout not in ("NCHW", "NHWC"):
        raise InputError(f"{path}: takes images of any size, and which is usual is not known", remedy="give --image-size, such as 224")
    plan, variant = is_plan(path), engine.metadata.variant
    nodes = () if plan else weighted_nodes(read_graph(path))
    passport = read_passport(path) if plan else None
    precision = _plan_precision(passport) if plan else graph_precision(nodes)
    costs: tuple[LayerCost, ...] = ()
    if variant is not None and precision is not None and engine.spec.kind != "module":
        choose = (lambda _: precision) if plan else _layer_precision(nodes)
        costs = count_costs(variant, found, choose, input_dtype=engine.spec.input.dtype)  # type: ignore[arg-type]
        costs = costs[:-1] if engine.spec.kind == "features" else costs  # a backbone has no classifier
    tf32 = passport is not None and passport.config.tf32
    return Subject(path, sha256_file(path), engine, plan, variant, precision, found, costs, tf32)


def _plan_precision(passport: PlanPassport | None) -> Precision | None:
    if passport is None:
        return None
    return passport.config.precision if passport.precision == "not_inspected" else passport.precision


def _layer_precision(nodes: tuple[WeightedNode, ...]) -> Callable[[str], Precision]:
    known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}

    def find(name: str) -> Precision:
        parts = (precision_of(name, nodes) or "").split("+")
        return next((known[part] for part in parts if part in ITEM_BYTES), "fp32")

    return find


class TorchRival:
    """The deploy form of the same variant in PyTorch, float32, with weights of a seed: speed does not depend on them.

    Args:
        variant: The architecture.
        device: `cpu`, `cuda` or `cuda:1`.
        threads: That share one batch on the CPU; None for PyTorch's default.

    Raises:
        MissingDependencyError: torch is not installed.
    """

    def __init__(self, variant: VariantSpec, *, device: str, threads: int | None) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                "--compare torch needs PyTorch, which is not installed", remedy="pip install 'repvgg-deploy[export]'"
            ) from error
        from ..model.network import RepVGG

        self._torch: Any = torch
        self._threads = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._device = device
        self._model = RepVGG(variant, "deploy").eval().to(device)
        self.name = f"PyTorch {torch.__version__}, {device}, float32"

    def make_call(self, count: int, size: tuple[int, int]) -> Callable[[], object]:
        """What runs so many images of a size, from host memory to host memory."""
        torch, model, device = self._torch, self._model, self._device
        images = torch.randn(count, 3, *size)

        def call() -> object:
            with torch.inference_mode():
                return model(images.to(device)).cpu()

        return call

    def close(self) -> None:
        """Gives PyTorch the threads that it had."""
        self._torch.set_num_threads(self._threads)
