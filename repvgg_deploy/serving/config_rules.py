"""What Triton would refuse in a configuration that its schema allows. Pure: nothing is read.

Source: https://github.com/triton-inference-server/core/blob/main/src/model_config_utils.cc for what is refused; a test shows each to a real server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .findings import Finding

BACKENDS = {"tensorrt_plan": "tensorrt", "onnxruntime_onnx": "onnxruntime"}
"""Backend by platform, of the platforms that are written here."""
OTHER_PLATFORMS = ("ensemble", "pytorch_libtorch", "tensorflow_graphdef", "tensorflow_savedmodel")
"""What else Triton knows by this name."""
DEFAULT_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "python": "model.py"}
"""What a backend looks for in a version folder where the configuration names no file."""
Rule = Callable[[Any], "Iterator[tuple[str, str]]"]


def check_config(config: Any, model: str) -> list[Finding]:
    """The rules that a configuration breaks.

    Args:
        config: A ModelConfig.
        model: Name of the model's folder.
    """
    errors = [Finding("error", model, *found) for rule in _RULES for found in rule(config)]
    return errors + _check_name(config, model) + [Finding("warning", model, *found) for found in _find_oddities(config)]


def backend_of(config: Any) -> str:
    """The backend that a configuration names, by itself or through its platform; `ensemble` for an ensemble, else empty."""
    if config.platform == "ensemble":
        return "ensemble"
    return str(config.backend or BACKENDS.get(config.platform, ""))


def _check_name(config: Any, model: str) -> list[Finding]:
    if config.name in ("", model):
        return []
    return [Finding("error", model, f"config.pbtxt names the model {config.name!r}, and its folder is {model!r}", "make the two names the same")]


def _find_oddities(config: Any) -> Iterator[tuple[str, str]]:
    """What Triton loads, and what is hardly meant."""
    if not config.platform and not config.backend:
        yield "config.pbtxt names neither platform nor backend: Triton guesses it from the file's name", f"set platform, to {' or '.join(BACKENDS)}"
    if not config.output:
        yield "config.pbtxt has no output, so that nothing can be answered", "name every output of the model"
    if config.max_batch_size == 0 and config.HasField("dynamic_batching"):
        yield "dynamic_batching with max_batch_size 0: there is nothing that could be put together", "give max_batch_size, or leave it out"


def _check_backend(config: Any) -> Iterator[tuple[str, str]]:
    if config.platform in BACKENDS and config.backend not in ("", BACKENDS[config.platform]):
        yield f"platform {config.platform!r} and backend {config.backend!r} contradict each other", "leave one of the two out"
    if config.platform not in ("", *BACKENDS, *OTHER_PLATFORMS) and _is_of_ours(config):
        yield f"Triton knows no platform {config.platform!r}", f"set it to {' or '.join(BACKENDS)}"


def _is_of_ours(config: Any) -> bool:
    """Whether a backend that is judged here would be taken whatever the platform is called: the python backend takes any name."""
    return config.backend in BACKENDS.values() or (not config.backend and config.default_model_filename.endswith((".onnx", ".plan")))


def _check_tensors(config: Any) -> Iterator[tuple[str, str]]:
    if not config.input:
        yield "config.pbtxt has no input", "name every input of the model"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names = [tensor.name for tensor in tensors]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{kind} {name!r} stands there twice", "leave one of them out"
        for tensor in tensors:
            yield from _check_tensor(kind, tensor)


def _check_tensor(kind: str, tensor: Any) -> Iterator[tuple[str, str]]:
    if not tensor.name:
        yield f"an {kind} has no name", "name it as the model does"
    if tensor.data_type == 0:
        yield f"{kind} {tensor.name!r} has no data_type", "give one such as TYPE_FP32"
    if not tensor.dims and not tensor.HasField("reshape"):
        yield f"{kind} {tensor.name!r} has no dims", "give its shape without the batch, such as [ 3, 224, 224 ]"
    wrong = [size for size in tensor.dims if size < 1 and size != -1]
    if wrong:
        yield f"{kind} {tensor.name!r} has a dimension of {wrong[0]}", "give sizes of at least 1, or -1 for any"


def _check_batching(config: Any) -> Iterator[tuple[str, str]]:
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}", "give 0 for a model that takes one size only, else its largest batch"
    if not config.HasField("dynamic_batching"):
        return
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if size < 1 or size > max(config.max_batch_size, 0):
            yield f"preferred batch {size} lies outside 1 to max_batch_size {config.max_batch_size}", "leave it out, or raise max_batch_size"


def _check_instances(config: Any) -> Iterator[tuple[str, str]]:
    for group in config.instance_group:
        if group.kind == type(group).KIND_CPU and group.gpus:
            yield "an instance_group of KIND_CPU names GPUs", "leave gpus out, or make it KIND_GPU"
        if group.kind == type(group).KIND_CPU and backend_of(config) == "tensorrt":
            yield "a TensorRT plan in an instance_group of KIND_CPU: plans run on a GPU only", "make it KIND_GPU"


def _check_warm_up(config: Any) -> Iterator[tuple[str, str]]:
    names = {tensor.name for tensor in config.input if not tensor.optional}
    for warm_up in config.model_warmup:
        if names - set(warm_up.inputs):
            missing = ", ".join(sorted(names - set(warm_up.inputs)))
            yield f"warm-up {warm_up.name!r} lacks the input {missing}", "give every input of the model"
        if warm_up.batch_size > max(config.max_batch_size, 1):
            yield (
                f"warm-up {warm_up.name!r} has a batch of {warm_up.batch_size}, above max_batch_size {config.max_batch_size}",
                "give a batch that the model takes",
            )
        for name, value in warm_up.inputs.items():
            if any(size < 1 for size in value.dims):
                yield f"warm-up {warm_up.name!r}: input {name!r} has a dimension that is no number of at least 1", "give a whole shape"


def _check_ensemble(config: Any) -> Iterator[tuple[str, str]]:
    if config.platform != "ensemble":
        return
    steps = config.ensemble_scheduling.step
    if not steps:
        yield "the ensemble has no step", "name its models under ensemble_scheduling"
    known = {tensor.name for tensor in config.input} | {name for step in steps for name in step.output_map.values()}
    for step in steps:
        for name in sorted(set(step.input_map.values()) - known):
            yield f"step {step.model_name!r} reads the tensor {name!r}, which neither the request nor another step gives", "correct its input_map"
    for tensor in config.output:
        if tensor.name not in known:
            yield f"no step gives the output {tensor.name!r}", "map it in an output_map"


_RULES: tuple[Rule, ...] = (_check_backend, _check_tensors, _check_batching, _check_instances, _check_warm_up, _check_ensemble)
