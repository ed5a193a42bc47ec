"""What Triton would refuse in a version folder: the files, and what they are, against the configuration."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from ..errors import ForeignModelError, InputError, ModelError
from ..files.onnx import read_metadata
from ..files.output import sha256_file
from ..specs import codec
from ..specs.values import ModelSpec, PlanPassport, TensorSpec
from .config import data_type
from .config_rules import DEFAULT_FILES, backend_of
from .findings import Finding

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
            yield Finding("error", model, f"{where} is not there", "copy the file there, or correct its name in config.pbtxt")
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
        yield Finding("warning", model, f"{where} is not of repvgg-export, so that it was not checked", "let Triton load it, or export it again")
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
        yield Finding("error", model, f"{where} is of TensorRT-RTX, which Triton cannot load", "build it with --backend tensorrt")
    return passport


def _check_plan(path: Path, config: Any, model: str, where: str) -> Iterator[Finding]:
    passport = yield from _read_plan(path, model, where)
    if passport is None:
        return
    profile = passport.config.profile
    if config.max_batch_size > profile.max_batch:
        message = f"{where} takes batches up to {profile.max_batch}, and max_batch_size is {config.max_batch_size}"
        yield Finding(
            "error", model, message, f"set max_batch_size to {profile.max_batch}, or build the plan with --max-batch {config.max_batch_size}"
        )
    if config.max_batch_size and profile.min_batch > 1:
        yield Finding("error", model, f"{where} takes no batch below {profile.min_batch}, and Triton sends such", "build it with --min-batch 1")
    yield from _check_interface(passport.spec, config, model, where)


def _check_interface(spec: ModelSpec, config: Any, model: str, where: str) -> Iterator[Finding]:
    """Names, types and shapes of the file's tensors against those of the configuration."""
    batched = config.max_batch_size > 0
    if batched and spec.batch is not None:
        yield Finding("error", model, f"{where} takes batches of {spec.batch} only, and max_batch_size is {config.max_batch_size}", _REWRITE)
        return
    for kind, tensors, stated in (("input", (spec.input,), config.input), ("output", spec.outputs, config.output)):
        known = {tensor.name: tensor for tensor in tensors}
        for item in stated:
            tensor = known.get(item.name)
            if tensor is None:
                message = f"{where} has no {kind} {item.name!r}: it has {', '.join(known)}"
                yield Finding("error", model, message, "correct its name in config.pbtxt")
            else:
                yield from (Finding("error", model, f"{where}: {text}", _REWRITE) for text in _differences(kind, tensor, item, batched))
        for name in sorted(set(known) - {item.name for item in stated}) if kind == "input" else ():
            yield Finding("error", model, f"{where}: config.pbtxt lacks the input {name!r}", _REWRITE)


def _differences(kind: str, tensor: TensorSpec, item: Any, batched: bool) -> Iterator[str]:
    stated = type(item).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[item.data_type].name
    if stated != data_type(tensor.dtype):
        yield f"{kind} {tensor.name!r} is {data_type(tensor.dtype)}, and config.pbtxt says {stated}"
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    agree = len(shape) == len(dims) and all(not isinstance(size, int) or size == dim for size, dim in zip(shape, dims, strict=True))
    if not agree:
        yield f"{kind} {tensor.name!r} is {list(shape)}, and config.pbtxt says {dims}"
