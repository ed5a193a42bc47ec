"""Configurations that Triton refuses, each made from a good one by one change: for validator and real server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Broken:
    """A change, and what our own check must say of it."""

    name: str
    edit: Callable[[Any], object]
    message: str


def _twice(config: Any) -> None:
    config.output.add().CopyFrom(config.output[0])


def _add_dim(config: Any) -> None:
    config.input[0].dims[0] = 0


def _warm_up_lacks_input(config: Any) -> None:
    config.model_warmup[0].inputs["imagse"].CopyFrom(config.model_warmup[0].inputs["images"])
    del config.model_warmup[0].inputs["images"]


def _warm_up_any_size(config: Any) -> None:
    config.model_warmup[0].inputs["images"].dims[1] = -1


def _gpus_of_a_cpu(config: Any) -> None:
    group = config.instance_group[0]
    group.kind = type(group).KIND_CPU
    group.gpus.append(0)


BROKEN = (
    Broken("two backends", lambda config: setattr(config, "backend", "tensorrt"), "contradict each other"),
    Broken(
        "unknown platform",
        lambda config: setattr(config, "platform", "onnxruntime_onx"),
        "no platform 'onnxruntime_onx'",
    ),
    Broken("other name", lambda config: setattr(config, "name", "other"), "names the model 'other'"),
    Broken("no input", lambda config: config.ClearField("input"), "has no input"),
    Broken("output twice", _twice, "stands there twice"),
    Broken("unnamed input", lambda config: config.input[0].ClearField("name"), "has no name"),
    Broken("no type", lambda config: config.input[0].ClearField("data_type"), "has no data_type"),
    Broken("no dims", lambda config: config.input[0].ClearField("dims"), "has no dims"),
    Broken("dimension of 0", _add_dim, "a dimension of 0"),
    Broken("negative batch", lambda config: setattr(config, "max_batch_size", -2), "max_batch_size is -2"),
    Broken(
        "preferred above largest",
        lambda config: config.dynamic_batching.preferred_batch_size.append(64),
        "preferred batch 64",
    ),
    Broken("preferred 0", lambda config: config.dynamic_batching.preferred_batch_size.append(0), "preferred batch 0"),
    Broken("GPUs of a CPU group", _gpus_of_a_cpu, "names GPUs"),
    Broken(
        "warm-up above largest", lambda config: setattr(config.model_warmup[0], "batch_size", 64), "has a batch of 64"
    ),
    Broken("warm-up lacks an input", _warm_up_lacks_input, "lacks the input images"),
    Broken("warm-up of any size", _warm_up_any_size, "no number of at least 1"),
    Broken("no labels", lambda config: setattr(config.output[0], "label_filename", "nowhere.txt"), "nowhere.txt"),
    Broken(
        "wrong file",
        lambda config: setattr(config, "default_model_filename", "nowhere.onnx"),
        "nowhere.onnx is not there",
    ),
)
