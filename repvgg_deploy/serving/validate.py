"""What Triton would refuse in a configuration that its schema allows. Pure: nothing is read.

Source: https://github.com/triton-inference-server/core/blob/main/src/model_config_utils.cc for what is refused; a test
shows each to a real server.

What Triton would refuse in a version folder: the files, and what they are, against the configuration.

What Triton would refuse in a repository, found without Triton, a GPU or ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from ..errors import ForeignModelError, InputError, ModelError, RepVGGDeployError
from ..files.onnx import read_metadata
from ..files.output import sha256_file
from ..specs import codec
from ..specs.values import ModelSpec, PlanPassport, TensorSpec
from .config import data_type, load_schema, parse_config
from .options import Finding
from .repository import CONFIG_FILE, PARTIAL_SUFFIX, list_versions

_REWRITE = "write the repository again with repvgg-trt triton"


def check_version(folder: Path, config: Any, model: str) -> Iterator[Finding]:
    """What is wrong with one version.

    Args:
        folder: The version folder.
        config: The model's configuration.
        model: Name of the model's folder.
    """
    backend = backend_of(config)
    names = sorted(set(config.cc_model_filenames.values()))
    if config.default_model_filename or not names:
        names.append(config.default_model_filename or DEFAULT_FILES.get(backend, ""))
    for name in filter(None, names):
        path = folder / name
        where = f"version {folder.name}: {name}"
        if not path.exists():
            yield Finding(
                "error", model, f"{where} is not there", "copy the file there, or correct its name in config.pbtxt"
            )
        elif path.is_file() and not path.stat().st_size:
            yield Finding("error", model, f"{where} is empty", "copy the file again")
        elif backend == "onnxruntime" and path.is_file():
            yield from _check_onnx(path, config, model, where)
        elif backend == "tensorrt":
            yield from _check_plan(path, config, model, where)


def check_unconfigured_version(folder: Path, model: str) -> Iterator[Finding]:
    """What is wrong with the file that Triton would take by its name where there is no configuration.

    Args:
        folder: The version folder.
        model: Name of the model's folder.
    """
    for backend in ("tensorrt", "onnxruntime"):
        path = folder / DEFAULT_FILES[backend]
        read = _read_plan if backend == "tensorrt" else _read_onnx
        if path.is_file():
            yield from read(path, model, f"version {folder.name}: {path.name}")


def _check_onnx(path: Path, config: Any, model: str, where: str) -> Iterator[Finding]:
    spec = yield from _read_onnx(path, model, where)
    if spec is not None:
        yield from _check_interface(spec, config, model, where)


def _read_onnx(path: Path, model: str, where: str) -> Generator[Finding, None, ModelSpec | None]:
    try:
        return read_metadata(path).spec
    except ForeignModelError:
        yield Finding(
            "warning",
            model,
            f"{where} is not of repvgg-export, so that it was not checked",
            "let Triton load it, or export it again",
        )
        return None
    except ModelError as error:
        yield Finding("error", model, f"{where}: {error.message}", error.remedy)
        return None


def _read_plan(path: Path, model: str, where: str) -> Generator[Finding, None, PlanPassport | None]:
    """The passport of a plan that any configuration could name."""
    passport_file = path.with_name(f"{path.name}.json")
    try:
        passport = codec.loads(PlanPassport, passport_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Finding("warning", model, f"{where} has no passport beside it, so that it was not checked", _REWRITE)
        return None
    except (OSError, UnicodeDecodeError, InputError) as error:
        yield Finding("error", model, f"{where}: its passport cannot be read: {error}", _REWRITE)
        return None
    if sha256_file(path) != passport.plan_sha256:
        yield Finding("error", model, f"{where} is truncated or changed: it is not the plan of its passport", _REWRITE)
    if passport.flavour != "tensorrt":
        yield Finding(
            "error", model, f"{where} is of TensorRT-RTX, which Triton cannot load", "build it with --backend tensorrt"
        )
    return passport


def _check_plan(path: Path, config: Any, model: str, where: str) -> Iterator[Finding]:
    passport = yield from _read_plan(path, model, where)
    if passport is None:
        return
    profile = passport.config.profile
    if config.max_batch_size > profile.max_batch:
        message = f"{where} takes batches up to {profile.max_batch}, and max_batch_size is {config.max_batch_size}"
        yield Finding(
            "error",
            model,
            message,
            f"set max_batch_size to {profile.max_batch}, or build the plan with --max-batch {config.max_batch_size}",
        )
    if config.max_batch_size and profile.min_batch > 1:
        yield Finding(
            "error",
            model,
            f"{where} takes no batch below {profile.min_batch}, and Triton sends such",
            "build it with --min-batch 1",
        )
    yield from _check_interface(passport.spec, config, model, where)


def _check_interface(spec: ModelSpec, config: Any, model: str, where: str) -> Iterator[Finding]:
    """Names, types and shapes of the file's tensors against those of the configuration."""
    batched = config.max_batch_size > 0
    if batched and spec.batch is not None:
        yield Finding(
            "error",
            model,
            f"{where} takes batches of {spec.batch} only, and max_batch_size is {config.max_batch_size}",
            _REWRITE,
        )
        return
    for kind, tensors, stated in (("input", (spec.input,), config.input), ("output", spec.outputs, config.output)):
        known = {tensor.name: tensor for tensor in tensors}
        for item in stated:
            tensor = known.get(item.name)
            if tensor is None:
                message = f"{where} has no {kind} {item.name!r}: it has {', '.join(known)}"
                yield Finding("error", model, message, "correct its name in config.pbtxt")
            else:
                yield from (
                    Finding("error", model, f"{where}: {text}", _REWRITE)
                    for text in _differences(kind, tensor, item, batched)
                )
        for name in sorted(set(known) - {item.name for item in stated}) if kind == "input" else ():
            yield Finding("error", model, f"{where}: config.pbtxt lacks the input {name!r}", _REWRITE)


def _differences(kind: str, tensor: TensorSpec, item: Any, batched: bool) -> Iterator[str]:
    stated = type(item).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[item.data_type].name
    if stated != data_type(tensor.dtype):
        yield f"{kind} {tensor.name!r} is {data_type(tensor.dtype)}, and config.pbtxt says {stated}"
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    agree = len(shape) == len(dims) and all(
        not isinstance(size, int) or size == dim for size, dim in zip(shape, dims, strict=True)
    )
    if not agree:
        yield f"{kind} {tensor.name!r} is {list(shape)}, and config.pbtxt says {dims}"


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
    return [
        Finding(
            "error",
            model,
            f"config.pbtxt names the model {config.name!r}, and its folder is {model!r}",
            "make the two names the same",
        )
    ]


def _find_oddities(config: Any) -> Iterator[tuple[str, str]]:
    """What Triton loads, and what is hardly meant."""
    if not config.platform and not config.backend:
        yield (
            "config.pbtxt names neither platform nor backend: Triton guesses it from the file's name",
            f"set platform, to {' or '.join(BACKENDS)}",
        )
    if not config.output:
        yield "config.pbtxt has no output, so that nothing can be answered", "name every output of the model"
    if config.max_batch_size == 0 and config.HasField("dynamic_batching"):
        yield (
            "dynamic_batching with max_batch_size 0: there is nothing that could be put together",
            "give max_batch_size, or leave it out",
        )


def _check_backend(config: Any) -> Iterator[tuple[str, str]]:
    if config.platform in BACKENDS and config.backend not in ("", BACKENDS[config.platform]):
        yield (
            f"platform {config.platform!r} and backend {config.backend!r} contradict each other",
            "leave one of the two out",
        )
    if config.platform not in ("", *BACKENDS, *OTHER_PLATFORMS) and _is_of_ours(config):
        yield f"Triton knows no platform {config.platform!r}", f"set it to {' or '.join(BACKENDS)}"


def _is_of_ours(config: Any) -> bool:
    """Whether a backend that is judged here would be taken whatever the platform is called: the python backend takes any name."""
    return config.backend in BACKENDS.values() or (
        not config.backend and config.default_model_filename.endswith((".onnx", ".plan"))
    )


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
        yield (
            f"max_batch_size is {config.max_batch_size}",
            "give 0 for a model that takes one size only, else its largest batch",
        )
    if not config.HasField("dynamic_batching"):
        return
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if size < 1 or size > max(config.max_batch_size, 0):
            yield (
                f"preferred batch {size} lies outside 1 to max_batch_size {config.max_batch_size}",
                "leave it out, or raise max_batch_size",
            )


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
                f"warm-up {warm_up.name!r} has a batch of {warm_up.batch_size}, above max_batch_size "
                f"{config.max_batch_size}",
                "give a batch that the model takes",
            )
        for name, value in warm_up.inputs.items():
            if any(size < 1 for size in value.dims):
                yield (
                    f"warm-up {warm_up.name!r}: input {name!r} has a dimension that is no number of at least 1",
                    "give a whole shape",
                )


def _check_ensemble(config: Any) -> Iterator[tuple[str, str]]:
    if config.platform != "ensemble":
        return
    steps = config.ensemble_scheduling.step
    if not steps:
        yield "the ensemble has no step", "name its models under ensemble_scheduling"
    known = {tensor.name for tensor in config.input} | {name for step in steps for name in step.output_map.values()}
    for step in steps:
        for name in sorted(set(step.input_map.values()) - known):
            yield (
                f"step {step.model_name!r} reads the tensor {name!r}, which neither the request nor another step gives",
                "correct its input_map",
            )
    for tensor in config.output:
        if tensor.name not in known:
            yield f"no step gives the output {tensor.name!r}", "map it in an output_map"


_RULES: tuple[Rule, ...] = (
    _check_backend,
    _check_tensors,
    _check_batching,
    _check_instances,
    _check_warm_up,
    _check_ensemble,
)


def validate_repository(repository: Path) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    """Checks every model of a repository.

    Args:
        repository: The folder that `tritonserver --model-repository` gets.

    Returns:
        The models, and what is wrong with them, errors first.

    Raises:
        InputError: It is no folder, holds no model, or may not be read.
        MissingDependencyError: The extra `serving` is not installed.
    """
    load_schema()
    try:
        return _check_repository(repository)
    except RepVGGDeployError:
        raise
    except OSError as error:
        remedy = "run it as the user that tritonserver runs as, and let that user read all of the repository"
        raise InputError(f"{error.filename or repository}: cannot be read: {error.strerror}", remedy=remedy) from error


def _check_repository(repository: Path) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    if not repository.is_dir():
        raise InputError(f"{repository}: is no folder", remedy="give the folder that holds a folder for each model")
    if (repository / CONFIG_FILE).exists():
        raise InputError(
            f"{repository}: is one model and no repository",
            remedy=f"give the folder around it: {repository.absolute().parent}",
        )
    models = tuple(
        sorted(entry.name for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    if not models:
        raise InputError(
            f"{repository}: holds no model", remedy="write one with repvgg-trt triton MODEL --out REPOSITORY"
        )
    configs = {name: _read_config(repository / name) for name in models}
    findings = [finding for name in models for finding in _check_model(repository / name, configs[name])]
    findings += [finding for name in models for finding in _check_steps(name, configs)]
    return models, tuple(sorted(findings, key=lambda finding: (finding.severity, finding.model)))


def _read_config(folder: Path) -> Any:
    """The configuration, or the Finding that stands in its place."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        if list_versions(folder):
            return Finding(
                "warning",
                folder.name,
                f"has no {CONFIG_FILE}: Triton would make one up, without batching or labels",
                "write one",
            )
        return Finding(
            "error", folder.name, f"has neither a {CONFIG_FILE} nor a version folder", "move it out of the repository"
        )
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except InputError as error:
        return Finding("error", folder.name, error.message, error.remedy)
    except (OSError, UnicodeDecodeError) as error:
        return Finding(
            "error",
            folder.name,
            f"{CONFIG_FILE} cannot be read: {error}",
            "make it a UTF-8 text file that Triton may read",
        )


def _check_model(folder: Path, config: Any) -> Iterator[Finding]:
    if isinstance(config, Finding):
        yield config
        for number in list_versions(folder)[-1:] if config.severity == "warning" else ():
            yield from check_unconfigured_version(folder / str(number), folder.name)
        return
    yield from check_config(config, folder.name)
    yield from _check_labels(folder, config)
    yield from _check_leftovers(folder)
    versions = list_versions(folder)
    if not versions:
        yield Finding(
            "error", folder.name, "has no version folder, such as 1", f"mkdir {folder / '1'} and put the model there"
        )
        return
    policy = config.version_policy
    wanted = set(policy.specific.versions) if policy.HasField("specific") else set()
    for number in sorted(wanted - set(versions)):
        yield Finding(
            "error",
            folder.name,
            f"version_policy wants version {number}, which is not there",
            "correct the policy, or add the version",
        )
    latest = policy.latest.num_versions or 1
    served = (
        sorted(wanted & set(versions))
        if wanted
        else list(versions)
        if policy.HasField("all")
        else list(versions)[-latest:]
    )
    if backend_of(config) != "ensemble":
        for number in served:
            yield from check_version(folder / str(number), config, folder.name)


def _check_labels(folder: Path, config: Any) -> Iterator[Finding]:
    for output in config.output:
        if not output.label_filename:
            continue
        path = folder / output.label_filename
        if not path.is_file():
            yield Finding(
                "error",
                folder.name,
                f"the labels {path.name} of {output.name!r} are not there",
                "add the file, or leave label_filename out",
            )
            continue
        count, classes = len(path.read_bytes().splitlines()), output.dims[-1] if output.dims else -1
        if classes not in (-1, count):
            yield Finding(
                "warning",
                folder.name,
                f"{path.name} names {count} classes, and {output.name!r} has {classes}",
                "give one line a class, in order",
            )


def _check_leftovers(folder: Path) -> Iterator[Finding]:
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith((PARTIAL_SUFFIX, ".tmp")):
            yield Finding("warning", folder.name, f"{entry.name} was left by an interrupted copy", f"rm -r {entry}")
        elif entry.is_dir() and entry.name.isdecimal() and entry.name.startswith("0"):
            yield Finding(
                "warning",
                folder.name,
                f"the folder {entry.name} is no version for Triton: it begins with 0",
                "rename it, such as to 1",
            )


def _check_steps(name: str, configs: dict[str, Any]) -> Iterator[Finding]:
    """The models of an ensemble must be there, and have the tensors that it maps."""
    config = configs[name]
    if isinstance(config, Finding) or config.platform != "ensemble":
        return
    for step in config.ensemble_scheduling.step:
        other = configs.get(step.model_name)
        if other is None:
            yield Finding(
                "error",
                name,
                f"needs the model {step.model_name!r}, which is not in the repository",
                "add it, or correct its name",
            )
            continue
        if isinstance(other, Finding):
            continue
        maps = ((step.input_map, other.input, "input"), (step.output_map, other.output, "output"))
        for mapped, tensors, kind in maps:
            for key in sorted(set(mapped) - {tensor.name for tensor in tensors}):
                yield Finding(
                    "error",
                    name,
                    f"maps the {kind} {key!r} of {step.model_name!r}, which has none of that name",
                    f"correct {kind}_map",
                )
        if 0 < other.max_batch_size < config.max_batch_size:
            message = (
                f"takes batches up to {config.max_batch_size}, and its step {step.model_name!r} only up to "
                f"{other.max_batch_size}"
            )
            yield Finding("error", name, message, "give it the smallest max_batch_size of its steps")
