"""A model → its `config.pbtxt`, as a message of Triton's schema. Pure: nothing is read or written.

Source: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..specs.values import TensorSpec
from .options import RepositoryOptions, Servable
from .schema import load_schema

LABELS_FILE = "labels.txt"
PREFIX = "repvgg_deploy."
"""Of the parameters that this project writes; all others are the user's."""
WRITTEN_BY, WRITTEN_VERSIONS = f"{PREFIX}written_by", f"{PREFIX}written_versions"
"""Who wrote a model, and which of its versions: others may have put more beside them."""
_ONNX_MAX_BATCH = 32
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
_ANY_SIDE = 224  # of a warm-up image where any size is taken and none is the model's own


def data_type(dtype: str) -> str:
    """Triton's name of a NumPy type."""
    return _TYPES[dtype]


def make_config(model: Servable, options: RepositoryOptions) -> Any:
    """The configuration.

    Raises:
        InputError: A batch size that was asked for does not fit the model.
        MissingDependencyError: The schema is not installed.
    """
    schema = load_schema()
    config = schema.ModelConfig(name=model.name, platform=model.platform)
    config.version_policy.latest.num_versions = 2
    config.max_batch_size = choose_max_batch(model, options)
    _add_tensors(config, model)
    _add_instances(config, model, options)
    if config.max_batch_size:
        add_batching(config, options, _preferred(model, options, config.max_batch_size))
    elif options.preferred_batch:
        raise InputError(
            f"{model.name}: takes one batch size only, so that Triton cannot put requests together", remedy="leave --preferred-batch out"
        )
    _add_files(config, model)
    for batch in dict.fromkeys((1, max(1, config.max_batch_size))):
        _add_warm_up(config, model, batch)
    if options.cuda_graphs and model.platform == "tensorrt_plan":
        config.optimization.cuda.graphs = True
    for name, value in sorted(model.provenance.items()):
        config.parameters[f"{PREFIX}{name}"].string_value = value
    return config


def choose_max_batch(model: Servable, options: RepositoryOptions) -> int:
    """`max_batch_size`: 0 where Triton may not put requests together.

    Raises:
        InputError: More is asked for than the model takes.
    """
    wanted = options.max_batch
    if not model.batches:
        if wanted is not None:
            raise InputError(
                f"{model.name}: takes batches of {model.spec.batch or 'one size'} only, found --max-batch {wanted}",
                remedy="leave --max-batch out, or export it with a dynamic batch",
            )
        return 0
    largest = model.max_batch
    if wanted is not None and largest is not None and wanted > largest:
        raise InputError(
            f"{model.name}: the plan takes batches up to {largest}, found --max-batch {wanted}",
            remedy=f"give at most {largest}, or build the plan with --max-batch {wanted}",
        )
    return wanted or largest or _ONNX_MAX_BATCH


def _preferred(model: Servable, options: RepositoryOptions, largest: int) -> tuple[int, ...]:
    if options.preferred_batch is not None:
        over = [size for size in options.preferred_batch if size > largest]
        if over:
            raise InputError(f"{model.name}: preferred batch {over[0]} is above the largest, {largest}", remedy=f"give at most {largest}")
        return tuple(sorted(set(options.preferred_batch)))
    return tuple(sorted({min(model.opt_batch, largest), largest})) if model.opt_batch is not None else ()


def _dims(tensor: TensorSpec, batched: bool) -> list[int]:
    shape = tensor.shape[1:] if batched else tensor.shape
    return [size if isinstance(size, int) else -1 for size in shape]


def _add_tensors(config: Any, model: Servable) -> None:
    batched = config.max_batch_size > 0
    source = model.spec.input
    config.input.add(name=source.name, data_type=_TYPES[source.dtype], dims=_dims(source, batched))
    for tensor in model.spec.outputs:
        output = config.output.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor, batched))
        if has_labels(model):
            output.label_filename = LABELS_FILE


def has_labels(model: Servable) -> bool:
    """Whether Triton's classification extension can name the classes: one score a class."""
    return model.spec.labels is not None and model.spec.kind in ("logits", "probabilities")


def _add_instances(config: Any, model: Servable, options: RepositoryOptions) -> None:
    group = config.instance_group.add(count=options.instances)
    if model.platform == "tensorrt_plan":
        group.kind = type(group).KIND_GPU
        group.profile.append("0")
    else:
        group.kind = type(group).KIND_AUTO


def add_batching(config: Any, options: RepositoryOptions, preferred: tuple[int, ...]) -> None:
    """Dynamic batching with a queue that refuses what it cannot serve in time."""
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = options.max_queue_delay_us
    batching.preferred_batch_size.extend(preferred)
    policy = batching.default_queue_policy
    policy.timeout_action = type(policy).REJECT
    policy.default_timeout_microseconds = options.queue_timeout_us
    policy.allow_timeout_override = True
    policy.max_queue_size = options.max_queue or 8 * config.max_batch_size


def _add_files(config: Any, model: Servable) -> None:
    if model.capability_files:
        for capability, name in sorted(model.capability_files.items()):
            config.cc_model_filenames[capability] = name
    else:
        config.default_model_filename = model.files[0].name


def _add_warm_up(config: Any, model: Servable, batch: int) -> None:
    warm_up = config.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=1)
    tensor = model.spec.input
    value = warm_up.inputs[tensor.name]
    value.data_type = config.input[0].data_type
    value.dims.extend(_warm_up_dims(model, config.max_batch_size > 0))
    value.zero_data = True


def _warm_up_dims(model: Servable, batched: bool) -> list[int]:
    """The input's dimensions with a number for each that is dynamic: the crop's height and width, where it is known."""
    tensor, preprocessing = model.spec.input, model.spec.preprocessing
    sides = list(preprocessing.crop if preprocessing is not None else (_ANY_SIDE, _ANY_SIDE))
    result = []
    for index, size in enumerate(tensor.shape):
        if isinstance(size, int):
            result.append(size)
        else:
            result.append(1 if index == 0 else sides.pop(0) if sides else 1)
    return result[1:] if batched else result
