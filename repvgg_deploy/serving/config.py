"""A model → its `config.pbtxt`, as a message of Triton's schema; and the models of an ensemble that takes JPEG files.

The schema is the generated module that the package tritonclient brings: what it does not know, Triton would refuse. A
JPEG is a thirtieth of the float tensor that it becomes, and a client needs neither Pillow nor the normalisation
constants; a model of Triton's python backend decodes it.

Source: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, MissingDependencyError, say_install
from ..specs import codec
from .options import DATATYPES, RepositoryOptions, Servable, ServedFile, require_name, wire_shape

LABELS_FILE = "labels.txt"
PREFIX = "repvgg_deploy."
"""Of the parameters that this project writes; all others are the user's."""
WRITTEN_BY, WRITTEN_VERSIONS = f"{PREFIX}written_by", f"{PREFIX}written_versions"
"""Who wrote a model, and which of its versions: others may have put more beside them."""
_IMAGE = "image"  # the ensemble's input: one JPEG file a row
_PLACEMENT: tuple[tuple[str, str, list[int]], ...] = (("image_size", "int32", [2]), ("to_image", "float32", [4]))
"""What the ensemble gives besides, where the model's outputs may hold boxes, a row an image: height and width of the
image; scale x, scale y, shift x, shift y of `images.Placement.affine`, which map a box of the input to the image."""
_ONNX_MAX_BATCH = 32
_ANY_SIDE = 224  # of a warm-up image where any size is taken and none is the model's own
_SCHEMA = "repvgg_deploy.serving._model_config_pb2"
_INSTALL = say_install("serving")


def make_config(model: Servable, options: RepositoryOptions) -> Any:
    """The configuration, a ModelConfig.

    Raises:
        InputError: A batch size that was asked for does not fit the model.
        MissingDependencyError: The schema is not installed.
    """
    config = load_schema().ModelConfig(name=model.name, platform=model.platform)
    config.version_policy.latest.num_versions = 2
    config.max_batch_size = _choose_max_batch(model, options)
    batched, source = config.max_batch_size > 0, model.spec.input
    config.input.add(name=source.name, data_type=data_type(source.dtype), dims=wire_shape(source, batched=batched))
    for tensor in model.spec.outputs:
        dims = wire_shape(tensor, batched=batched)
        output = config.output.add(name=tensor.name, data_type=data_type(tensor.dtype), dims=dims)
        if has_labels(model):
            output.label_filename = LABELS_FILE
    group = config.instance_group.add(count=options.instances)
    group.kind = type(group).KIND_AUTO
    if model.platform == "tensorrt_plan":
        group.kind = type(group).KIND_GPU
        # Triton takes the one with the nearest usual batch of those that hold the request; it uses no other than these.
        below = [batch for batch in model.profile_batches if batch < config.max_batch_size]
        group.profile.extend(map(str, range(len(below) + 1)))
        if options.cuda_graphs:
            config.optimization.cuda.graphs = True
    if batched:
        _add_batching(config, options, _choose_preferred(model, options, config.max_batch_size))
    elif options.preferred_batch:
        raise InputError(
            f"{model.name}: takes one batch size only, so that Triton cannot put requests together",
            remedy="leave --preferred-batch out",
        )
    for capability, name in sorted(model.capability_files.items()):
        config.cc_model_filenames[capability] = name
    if not model.capability_files:
        config.default_model_filename = model.files[0].name
    for batch in dict.fromkeys((1, max(1, config.max_batch_size))):
        warm_up = config.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=1)
        value = warm_up.inputs[source.name]
        value.data_type = config.input[0].data_type
        value.dims.extend(_warm_up_dims(model)[1 if batched else 0 :])
        value.zero_data = True
    for name, value in sorted(model.provenance.items()):
        config.parameters[f"{PREFIX}{name}"].string_value = value
    return config


def data_type(dtype: str) -> str:
    """The schema's name of a NumPy type."""
    return f"TYPE_{DATATYPES[dtype]}"


def _choose_max_batch(model: Servable, options: RepositoryOptions) -> int:
    """`max_batch_size`: 0 where Triton may not put requests together."""
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


def _choose_preferred(model: Servable, options: RepositoryOptions, largest: int) -> tuple[int, ...]:
    if options.preferred_batch is not None:
        over = [size for size in options.preferred_batch if size > largest]
        if over:
            raise InputError(
                f"{model.name}: preferred batch {over[0]} is above the largest, {largest}",
                remedy=f"give at most {largest}",
            )
        return tuple(sorted(set(options.preferred_batch)))
    if model.profile_batches:
        return tuple(sorted({largest, *(batch for batch in model.profile_batches if 1 < batch < largest)}))
    return tuple(sorted({min(model.opt_batch, largest), largest})) if model.opt_batch is not None else ()


def _add_batching(config: Any, options: RepositoryOptions, preferred: tuple[int, ...]) -> None:
    """Dynamic batching with a queue that refuses what it cannot serve in time."""
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = options.max_queue_delay_us
    batching.preferred_batch_size.extend(preferred)
    policy = batching.default_queue_policy
    policy.timeout_action = type(policy).REJECT
    policy.default_timeout_microseconds = options.queue_timeout_us
    policy.allow_timeout_override = True
    policy.max_queue_size = options.max_queue or 8 * config.max_batch_size


def has_labels(model: Servable) -> bool:
    """Whether Triton's classification extension can name the classes: one score a class."""
    return model.spec.labels is not None and model.spec.kind in ("logits", "probabilities")


def _warm_up_dims(model: Servable) -> list[int]:
    """The input's dimensions with a number for each that is dynamic: the usual height and width, if they are known."""
    image, preprocessing = model.spec.input, model.spec.preprocessing
    usual = model.opt_size or ((_ANY_SIDE, _ANY_SIDE) if preprocessing is None else preprocessing.crop)
    sides = dict(zip(image.image_axes or (), usual, strict=False))
    return [size if isinstance(size, int) else sides.get(axis, 1) for axis, size in enumerate(image.shape)]


def make_jpeg_models(
    model: Servable, options: RepositoryOptions, config: Any
) -> list[tuple[Any, tuple[ServedFile, ...]]]:
    """Configuration and version folder of `NAME_decode` and of the ensemble `NAME_jpeg`.

    Args:
        model: What is behind them.
        options: How the model is to be served.
        config: The model's own configuration.

    Raises:
        InputError: The model does not say how an image becomes its input, or takes no batches.
    """
    preprocessing = model.spec.preprocessing
    if preprocessing is None or not config.max_batch_size or model.spec.input.layout not in ("NCHW", "NHWC"):
        raise InputError(
            f"{model.name}: --ensemble jpeg needs a model that says how an image becomes its input, and that "
            f"takes any batch",
            remedy="export it with repvgg-export and a dynamic batch, or leave --ensemble out",
        )
    row = [*preprocessing.crop, 3] if model.spec.input.layout == "NHWC" else [3, *preprocessing.crop]
    decoder = _decoder_config(model, options, config.max_batch_size, row)
    settings = json.dumps(codec.encode(preprocessing), indent=2)
    files = (ServedFile("model.py", make_jpeg_code()), ServedFile("preprocessing.json", settings.encode() + b"\n"))
    return [(decoder, files), (_ensemble_config(model, decoder, config), ())]


def make_jpeg_code() -> bytes:
    """The decoder of the package, and behind it the lines that Triton's python backend calls: one file, UTF-8."""
    package = resources.files("repvgg_deploy")
    parts = (package.joinpath(name).read_bytes() for name in ("images/pixels.py", "data/triton_jpeg.py.txt"))
    return b"\n\n".join(parts)


def _decoder_config(model: Servable, options: RepositoryOptions, max_batch: int, row: list[int]) -> Any:
    config = load_schema().ModelConfig(
        name=require_name(f"{model.name}_decode"), backend="python", max_batch_size=max_batch
    )
    config.default_model_filename = "model.py"
    config.input.add(name=_IMAGE, data_type="TYPE_STRING", dims=[1])
    config.output.add(name=model.spec.input.name, data_type=data_type(model.spec.input.dtype), dims=row)
    for name, kind, dims in _PLACEMENT if model.spec.kind == "module" else ():
        config.output.add(name=name, data_type=data_type(kind), dims=dims)
    group = config.instance_group.add(count=options.instances)
    group.kind = type(group).KIND_CPU
    _add_batching(config, options, ())
    # Nothing is gained by decoding together what can be decoded at once: requests wait for company once, in front of
    # the model.
    config.dynamic_batching.max_queue_delay_microseconds = 0
    return config


def _ensemble_config(model: Servable, decoder: Any, config: Any) -> Any:
    ensemble = load_schema().ModelConfig(
        name=require_name(f"{model.name}_jpeg"), platform="ensemble", max_batch_size=config.max_batch_size
    )
    ensemble.input.add(name=_IMAGE, data_type="TYPE_STRING", dims=[1])
    for output in config.output:
        ensemble.output.add(
            name=output.name,
            data_type=output.data_type,
            dims=output.dims,
            label_filename=output.label_filename and LABELS_FILE,
        )
    decode = ensemble.ensemble_scheduling.step.add(model_name=decoder.name, model_version=-1)
    decode.input_map[_IMAGE] = _IMAGE
    decode.output_map[decoder.output[0].name] = "pixels"
    for output in decoder.output[1:]:
        ensemble.output.add(name=output.name, data_type=output.data_type, dims=output.dims)
        decode.output_map[output.name] = output.name
    run = ensemble.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
    run.input_map[model.spec.input.name] = "pixels"
    for tensor in model.spec.outputs:
        run.output_map[tensor.name] = tensor.name
    return ensemble


def load_schema() -> ModuleType:
    """The generated module with `ModelConfig`.

    Raises:
        MissingDependencyError: tritonclient or protobuf is not installed, or they do not go together.

    Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    if _SCHEMA in sys.modules:
        return sys.modules[_SCHEMA]
    package = importlib.util.find_spec("tritonclient")
    places = list(package.submodule_search_locations or ()) if package is not None else []
    path = Path(places[0]) / "grpc" / "model_config_pb2.py" if places else None
    spec = importlib.util.spec_from_file_location(_SCHEMA, path) if path is not None and path.is_file() else None
    if spec is None or spec.loader is None:
        raise MissingDependencyError(
            "tritonclient, which holds Triton's schema of config.pbtxt, is not installed", remedy=_INSTALL
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        text = " ".join(str(error).split())
        raise MissingDependencyError(
            f"Triton's schema cannot be loaded with the protobuf that is here: {text}", remedy=_INSTALL
        ) from error
    sys.modules[_SCHEMA] = module
    return module


def print_config(config: Any) -> str:
    """A ModelConfig as the text of a `config.pbtxt`; equal messages give equal text."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config, as_utf8=True))


def parse_config(text: str, where: Path) -> Any:
    """The ModelConfig that a `config.pbtxt` states.

    Args:
        text: The content of the file.
        where: For the message.

    Raises:
        InputError: A field, type or value is not in the schema, or it is no text of a message; the message says the
            line.
        MissingDependencyError: The schema is not installed.
    """
    schema = load_schema()
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(
            f"{where}: Triton cannot parse it: line {error}", remedy="correct that line, or write the repository again"
        ) from error
