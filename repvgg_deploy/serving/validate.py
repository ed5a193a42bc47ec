"""What Triton would refuse in a repository, found without Triton, a GPU or ONNX Runtime.

Three things are judged: the configuration by itself, the files of the versions that would be served against it, and the
models of an ensemble against one another.

Source: https://github.com/triton-inference-server/core/blob/main/src/model_config_utils.cc for what is refused; a test
shows each to a real server.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import ForeignModelError, InputError, ModelError, PlanError, RepVGGDeployError
from ..files.onnx import read_metadata
from ..files.output import sha256_file
from ..files.passport import read_passport
from ..specs.values import ModelSpec, PlanPassport, TensorSpec
from .config import data_type, load_schema, parse_config
from .repository import CONFIG_FILE, PARTIAL_SUFFIX, list_models, list_versions

_REWRITE = "write the repository again with repvgg-trt triton"
_BACKENDS = {"tensorrt_plan": "tensorrt", "onnxruntime_onnx": "onnxruntime"}  # by platform, of those written here
_OTHER_PLATFORMS = ("ensemble", "pytorch_libtorch", "tensorflow_graphdef", "tensorflow_savedmodel")
# What a backend looks for in a version folder where the configuration names no file.
_DEFAULT_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "python": "model.py"}
Severity: TypeAlias = Literal["error", "warning"]
_Fault: TypeAlias = tuple[Severity, str, str]  # of one model: severity, message, remedy


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: `error`: Triton would not load the model, or would answer wrongly; `warning`: it loads, and probably
            not as meant.
        model: Folder of the model.
        message: What is wrong, where.
        remedy: What to do.
    """

    severity: Severity
    model: str
    message: str
    remedy: str


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
        models = _list_models(repository)
        configs = {name: _read_config(repository / name) for name in models}
        faults = [(name, fault) for name in models for fault in _check_model(repository / name, configs[name])]
        faults += [(name, ("error", *found)) for name in models for found in _check_steps(name, configs)]
    except RepVGGDeployError:
        raise
    except OSError as error:
        remedy = "run it as the user that tritonserver runs as, and let that user read all of the repository"
        raise InputError(f"{error.filename or repository}: cannot be read: {error.strerror}", remedy=remedy) from error
    findings = [Finding(severity, name, message, remedy) for name, (severity, message, remedy) in faults]
    return models, tuple(sorted(findings, key=lambda finding: (finding.severity, finding.model)))


def _list_models(repository: Path) -> tuple[str, ...]:
    """All folders: Triton takes hidden ones for models, too."""
    if not repository.is_dir():
        raise InputError(f"{repository}: is no folder", remedy="give the folder that holds a folder for each model")
    if (repository / CONFIG_FILE).exists():
        remedy = f"give the folder around it: {repository.absolute().parent}"
        raise InputError(f"{repository}: is one model and no repository", remedy=remedy)
    if not list_models(repository):
        remedy = "write one with repvgg-trt triton MODEL --out REPOSITORY"
        raise InputError(f"{repository}: holds no model", remedy=remedy)
    return tuple(sorted(entry.name for entry in repository.iterdir() if entry.is_dir()))


def _read_config(folder: Path) -> Any:
    """The configuration, or the fault that stands in its place."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        if list_versions(folder):
            message = f"has no {CONFIG_FILE}: Triton would make one up, without batching or labels"
            return "warning", message, "write one"
        return "error", f"has neither a {CONFIG_FILE} nor a version folder", "move it out of the repository"
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except InputError as error:
        return "error", error.message, error.remedy
    except (OSError, UnicodeDecodeError) as error:
        return "error", f"{CONFIG_FILE} cannot be read: {error}", "make it a UTF-8 text file that Triton may read"


def _check_model(folder: Path, config: Any) -> Iterator[_Fault]:
    versions = list_versions(folder)
    if isinstance(config, tuple):
        yield config
        for number in versions[-1:] if config[0] == "warning" else ():
            yield from _check_unconfigured_version(folder / str(number))
        return
    for rule in (_check_backend, _check_tensors, _check_batching, _check_instances, _check_warm_up, _check_ensemble):
        for message, remedy in rule(config):
            yield "error", message, remedy
    if config.name not in ("", folder.name):
        message = f"config.pbtxt names the model {config.name!r}, and its folder is {folder.name!r}"
        yield "error", message, "make the two names the same"
    for message, remedy in _find_oddities(config):
        yield "warning", message, remedy
    yield from _check_labels(folder, config)
    yield from _check_leftovers(folder)
    if not versions:
        yield "error", "has no version folder, such as 1", f"mkdir {folder / '1'} and put the model there"
        return
    policy = config.version_policy
    wanted = set(policy.specific.versions) if policy.HasField("specific") else set()
    for number in sorted(wanted - set(versions)):
        message = f"version_policy wants version {number}, which is not there"
        yield "error", message, "correct the policy, or add the version"
    if wanted:
        versions = tuple(sorted(wanted & set(versions)))
    elif not policy.HasField("all"):
        versions = versions[-(policy.latest.num_versions or 1) :]
    if _backend_of(config) != "ensemble":
        for number in versions:
            yield from _check_version(folder / str(number), config)


# -- the configuration by itself: message and remedy of each error


def _find_oddities(config: Any) -> Iterator[tuple[str, str]]:
    """What Triton loads, and what is hardly meant."""
    if not config.platform and not config.backend:
        message = "config.pbtxt names neither platform nor backend: Triton guesses it from the file's name"
        yield message, f"set platform, to {' or '.join(_BACKENDS)}"
    if not config.output:
        yield "config.pbtxt has no output, so that nothing can be answered", "name every output of the model"
    if config.max_batch_size == 0 and config.HasField("dynamic_batching"):
        message = "dynamic_batching with max_batch_size 0: there is nothing that could be put together"
        yield message, "give max_batch_size, or leave it out"


def _backend_of(config: Any) -> str:
    """The backend that is named, directly or by the platform; `ensemble` for an ensemble, else empty."""
    if config.platform == "ensemble":
        return "ensemble"
    return str(config.backend or _BACKENDS.get(config.platform, ""))


def _check_backend(config: Any) -> Iterator[tuple[str, str]]:
    if config.platform in _BACKENDS and config.backend not in ("", _BACKENDS[config.platform]):
        message = f"platform {config.platform!r} and backend {config.backend!r} contradict each other"
        yield message, "leave one of the two out"
    # The python backend takes any name: only where one of ours would be taken is another platform an error.
    named = config.backend in _BACKENDS.values()
    guessed = not config.backend and config.default_model_filename.endswith((".onnx", ".plan"))
    if config.platform not in ("", *_BACKENDS, *_OTHER_PLATFORMS) and (named or guessed):
        yield f"Triton knows no platform {config.platform!r}", f"set it to {' or '.join(_BACKENDS)}"


def _check_tensors(config: Any) -> Iterator[tuple[str, str]]:
    if not config.input:
        yield "config.pbtxt has no input", "name every input of the model"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names = [tensor.name for tensor in tensors]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{kind} {name!r} stands there twice", "leave one of them out"
        for tensor in tensors:
            which = f"{kind} {tensor.name!r}"
            if not tensor.name:
                yield f"an {kind} has no name", "name it as the model does"
            if tensor.data_type == 0:
                yield f"{which} has no data_type", "give one such as TYPE_FP32"
            if not tensor.dims and not tensor.HasField("reshape"):
                yield f"{which} has no dims", "give its shape without the batch, such as [ 3, 224, 224 ]"
            wrong = [size for size in tensor.dims if size < 1 and size != -1]
            if wrong:
                yield f"{which} has a dimension of {wrong[0]}", "give sizes of at least 1, or -1 for any"


def _check_batching(config: Any) -> Iterator[tuple[str, str]]:
    if config.max_batch_size < 0:
        message = f"max_batch_size is {config.max_batch_size}"
        yield message, "give 0 for a model that takes one size only, else its largest batch"
    for size in config.dynamic_batching.preferred_batch_size:
        if size < 1 or size > max(config.max_batch_size, 0):
            message = f"preferred batch {size} lies outside 1 to max_batch_size {config.max_batch_size}"
            yield message, "leave it out, or raise max_batch_size"


def _check_instances(config: Any) -> Iterator[tuple[str, str]]:
    for group in config.instance_group:
        if group.kind == type(group).KIND_CPU and group.gpus:
            yield "an instance_group of KIND_CPU names GPUs", "leave gpus out, or make it KIND_GPU"
        if group.kind == type(group).KIND_CPU and _backend_of(config) == "tensorrt":
            yield "a TensorRT plan in an instance_group of KIND_CPU: plans run on a GPU only", "make it KIND_GPU"


def _check_warm_up(config: Any) -> Iterator[tuple[str, str]]:
    names = {tensor.name for tensor in config.input if not tensor.optional}
    for warm_up in config.model_warmup:
        if names - set(warm_up.inputs):
            missing = ", ".join(sorted(names - set(warm_up.inputs)))
            yield f"warm-up {warm_up.name!r} lacks the input {missing}", "give every input of the model"
        if warm_up.batch_size > max(config.max_batch_size, 1):
            largest = f"above max_batch_size {config.max_batch_size}"
            message = f"warm-up {warm_up.name!r} has a batch of {warm_up.batch_size}, {largest}"
            yield message, "give a batch that the model takes"
        for name, value in warm_up.inputs.items():
            if any(size < 1 for size in value.dims):
                message = f"warm-up {warm_up.name!r}: input {name!r} has a dimension that is no number of at least 1"
                yield message, "give a whole shape"


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


# -- the files of a version


def _check_version(folder: Path, config: Any) -> Iterator[_Fault]:
    backend = _backend_of(config)
    names = sorted(set(config.cc_model_filenames.values()))
    if config.default_model_filename or not names:
        names.append(config.default_model_filename or _DEFAULT_FILES.get(backend, ""))
    for name in filter(None, names):
        path = folder / name
        where = f"version {folder.name}: {name}"
        spec = None
        if not path.exists():
            yield "error", f"{where} is not there", "copy the file there, or correct its name in config.pbtxt"
        elif path.is_file() and not path.stat().st_size:
            yield "error", f"{where} is empty", "copy the file again"
        elif backend == "onnxruntime" and path.is_file():
            spec = yield from _read_onnx(path, where)
        elif backend == "tensorrt":
            passport = yield from _read_plan(path, where)
            if passport is not None:
                spec = passport.spec
                yield from _check_profile(passport, config, where)
        if spec is not None:
            yield from _check_interface(spec, config, where)


def _check_unconfigured_version(folder: Path) -> Iterator[_Fault]:
    """The file that Triton would take by its name where there is no configuration."""
    for backend, read in (("tensorrt", _read_plan), ("onnxruntime", _read_onnx)):
        path = folder / _DEFAULT_FILES[backend]
        if path.is_file():
            yield from read(path, f"version {folder.name}: {path.name}")


def _read_onnx(path: Path, where: str) -> Generator[_Fault, None, ModelSpec | None]:
    try:
        return read_metadata(path).spec
    except ForeignModelError:
        message = f"{where} is not of repvgg-export, so that it was not checked"
        yield "warning", message, "let Triton load it, or export it again"
    except ModelError as error:
        yield "error", f"{where}: {error.message}", error.remedy
    return None


def _read_plan(path: Path, where: str) -> Generator[_Fault, None, PlanPassport | None]:
    """The passport of a plan that any configuration could name."""
    try:
        passport = read_passport(path)
    except PlanError as error:
        yield "error", f"{where}: its passport cannot be read: {error.message}", _REWRITE
        return None
    if passport is None:
        yield "warning", f"{where} has no passport beside it, so that it was not checked", _REWRITE
        return None
    if sha256_file(path) != passport.plan_sha256:
        yield "error", f"{where} is truncated or changed: it is not the plan of its passport", _REWRITE
    if passport.flavour != "tensorrt":
        yield "error", f"{where} is of TensorRT-RTX, which Triton cannot load", "build it with --backend tensorrt"
    return passport


def _check_profile(passport: PlanPassport, config: Any, where: str) -> Iterator[_Fault]:
    profile, largest = passport.config.profile, config.max_batch_size
    if largest > profile.max_batch:
        message = f"{where} takes batches up to {profile.max_batch}, and max_batch_size is {largest}"
        remedy = f"set max_batch_size to {profile.max_batch}, or build the plan with --max-batch {largest}"
        yield "error", message, remedy
    if largest and profile.min_batch > 1:
        message = f"{where} takes no batch below {profile.min_batch}, and Triton sends such"
        yield "error", message, "build it with --min-batch 1"
    count = max(1, len(profile.batches))
    used = {name for group in config.instance_group for name in group.profile or ["0"]}
    wrong = sorted(name for name in used if not (name.isdecimal() and int(name) < count))
    if wrong:
        message = (
            f"{where} has {count} optimization profile{'s' * (count > 1)}, counted from 0, and none is {wrong[0]!r}"
        )
        yield "error", message, "correct profile in instance_group"
    elif count > 1 and largest > max(profile.batches[int(name)] for name in used or {"0"}):
        message = f"{where}: none of its optimization profiles that are in use takes a batch of {largest}"
        yield "error", message, "list all of them in instance_group, as --out writes it"
    smallest, _, most = profile.shapes(passport.spec.input)
    for warm_up in config.model_warmup if profile.opt_size else ():
        dims = list(warm_up.inputs[passport.spec.input.name].dims) if passport.spec.input.name in warm_up.inputs else []
        low, high = smallest[-len(dims) :], most[-len(dims) :]
        if dims and not all(least <= size <= limit for least, size, limit in zip(low, dims, high, strict=False)):
            message = f"{where} takes images from {low} to {high}, and the warm-up {warm_up.name!r} sends {dims}"
            yield "error", message, _REWRITE


def _check_interface(spec: ModelSpec, config: Any, where: str) -> Iterator[_Fault]:
    """Names, types and shapes of the file's tensors against those of the configuration."""
    batched = config.max_batch_size > 0
    if batched and spec.batch is not None:
        message = f"{where} takes batches of {spec.batch} only, and max_batch_size is {config.max_batch_size}"
        yield "error", message, _REWRITE
        return
    for kind, tensors, stated in (("input", (spec.input,), config.input), ("output", spec.outputs, config.output)):
        known = {tensor.name: tensor for tensor in tensors}
        for item in stated:
            if item.name in known:
                for text in _differences(kind, known[item.name], item, batched):
                    yield "error", f"{where}: {text}", _REWRITE
            else:
                message = f"{where} has no {kind} {item.name!r}: it has {', '.join(known)}"
                yield "error", message, "correct its name in config.pbtxt"
        for name in sorted(set(known) - {item.name for item in stated}) if kind == "input" else ():
            yield "error", f"{where}: config.pbtxt lacks the input {name!r}", _REWRITE


def _differences(kind: str, tensor: TensorSpec, item: Any, batched: bool) -> Iterator[str]:
    stated = load_schema().DataType.Name(item.data_type)
    if stated != data_type(tensor.dtype):
        yield f"{kind} {tensor.name!r} is {data_type(tensor.dtype)}, and config.pbtxt says {stated}"
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    fixed = [(size, dim) for size, dim in zip(shape, dims, strict=False) if isinstance(size, int)]
    if len(shape) != len(dims) or any(size != dim for size, dim in fixed):
        yield f"{kind} {tensor.name!r} is {list(shape)}, and config.pbtxt says {dims}"


def _check_labels(folder: Path, config: Any) -> Iterator[_Fault]:
    for output in config.output:
        if not output.label_filename:
            continue
        path = folder / output.label_filename
        if not path.is_file():
            message = f"the labels {path.name} of {output.name!r} are not there"
            yield "error", message, "add the file, or leave label_filename out"
            continue
        count = len(path.read_bytes().splitlines())
        classes = output.dims[-1] if output.dims else -1
        if classes not in (-1, count):
            message = f"{path.name} names {count} classes, and {output.name!r} has {classes}"
            yield "warning", message, "give one line a class, in order"


def _check_leftovers(folder: Path) -> Iterator[_Fault]:
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith((PARTIAL_SUFFIX, ".tmp")):
            yield "warning", f"{entry.name} was left by an interrupted copy", f"rm -r {entry}"
        elif entry.is_dir() and entry.name.isdecimal() and entry.name.startswith("0"):
            message = f"the folder {entry.name} is no version for Triton: it begins with 0"
            yield "warning", message, "rename it, such as to 1"


def _check_steps(name: str, configs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Message and remedy of each error: the models of an ensemble must be there, with the tensors that it maps."""
    config = configs[name]
    if isinstance(config, tuple) or config.platform != "ensemble":
        return
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            message = f"needs the model {step.model_name!r}, which is not in the repository"
            yield message, "add it, or correct its name"
            continue
        other = configs[step.model_name]
        if isinstance(other, tuple):
            continue
        maps = ((step.input_map, other.input, "input"), (step.output_map, other.output, "output"))
        for mapped, tensors, kind in maps:
            for key in sorted(set(mapped) - {tensor.name for tensor in tensors}):
                message = f"maps the {kind} {key!r} of {step.model_name!r}, which has none of that name"
                yield message, f"correct {kind}_map"
        if 0 < other.max_batch_size < config.max_batch_size:
            step_takes = f"its step {step.model_name!r} only up to {other.max_batch_size}"
            message = f"takes batches up to {config.max_batch_size}, and {step_takes}"
            yield message, "give it the smallest max_batch_size of its steps"
