"""Plans or an ONNX → a Triton model repository: what is read, and what of it goes together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, PlanError
from ..files.onnx import graph_precision, read_graph, weighted_nodes
from ..files.output import sha256_file
from ..files.passport import passport_path, read_passport, require_unchanged
from ..runtime.opening import is_plan, read_model
from ..specs.values import PlanPassport
from .options import RepositoryOptions, Servable, ServedFile, describe_container, require_name
from .repository import WrittenModel, write_repository

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TritonResult:
    """What was written.

    Attributes:
        models: The plan's or ONNX's first; with an ensemble, the two before it.
        servable: What is served.
        container: The image that can serve it, or how to find it.
    """

    models: tuple[WrittenModel, ...]
    servable: Servable
    container: str


def write_triton(
    models: Sequence[Path | str], out: Path | str, options: RepositoryOptions | None = None, *, force: bool = False
) -> TritonResult:
    """Writes a repository that Triton serves as it is.

    Args:
        models: One ONNX, or one plan for each GPU type, with their passports beside them.
        out: The repository; made if it is not there.
        options: How the model is served.
        force: Replace what is there and differs.

    Raises:
        InputError: The models do not go together, or the options do not fit them.
        ModelError: An ONNX cannot be read.
        PlanError: A plan or its passport is missing, damaged, or they do not belong together.
        ArtifactError: It cannot be written, or something else stands there.
        MissingDependencyError: The extra `serving` is not installed.
    """
    paths, options = [Path(model) for model in models], options if options is not None else RepositoryOptions()
    if not paths:
        raise InputError("expected a model, found none", remedy="give an .onnx, or a .plan for each GPU type")
    kinds = [is_plan(path) for path in paths]
    if not all(kinds) and len(paths) > 1:
        raise InputError(
            f"several models must be plans of one network for several GPU types, found {', '.join(map(str, paths))}",
            remedy="write each model by itself; one repository holds any number of them",
        )
    servable = _read_plans(paths, options) if all(kinds) else _read_onnx(paths[0], options)
    if options.ensemble is not None and " " in str(Path(out).absolute()):
        logger.warning(
            "%s: has a space in its path, below which Triton's python backend, which decodes the images, may not start",
            out,
        )
    written = write_repository(servable, Path(out), options, force=force)
    container = servable.provenance.get("container", "any tritonserver image with the ONNX Runtime backend")
    return TritonResult(written, servable, container)


def _name(path: Path, options: RepositoryOptions) -> str:
    return options.name if options.name is not None else require_name(path.stem)


def _read_onnx(path: Path, options: RepositoryOptions) -> Servable:
    metadata = read_model(path)
    precision = graph_precision(weighted_nodes(read_graph(path)))
    if precision == "int8":
        logger.warning(
            "%s: ONNX Runtime computes INT8 graphs as they stand slowly, and Triton gives them to it so: serve a "
            "plan instead",
            path,
        )
    provenance = {"source": path.name, "source_sha256": sha256_file(path), "precision": precision}
    if metadata.source is not None:
        provenance["checkpoint_sha256"] = metadata.source.sha256
    files = (ServedFile("model.onnx", path),)
    return Servable(_name(path, options), "onnxruntime_onnx", metadata.spec, files, None, None, {}, provenance)


def _read_plans(paths: Sequence[Path], options: RepositoryOptions) -> Servable:
    passports = [_read_passport(path) for path in paths]
    first = passports[0]
    _require_one_network(paths, passports)
    capability_files = _capability_files(paths, passports) if len(paths) > 1 else {}
    names = list(dict.fromkeys(capability_files.values())) or ["model.plan"]
    files = [ServedFile(name, path) for name, path in zip(names, paths, strict=True)]
    files += [ServedFile(f"{name}.json", passport_path(path)) for name, path in zip(names, paths, strict=True)]
    largest = min(passport.config.profile.max_batch for passport in passports)
    usual = min(passport.config.profile.opt_batch for passport in passports)
    capabilities = dict.fromkeys(name for passport in passports for name in passport.compute_capabilities)
    seen = None if first.precision == "not_inspected" else first.precision
    provenance = {
        "source_sha256": first.onnx_sha256,
        "plan_sha256": ",".join(passport.plan_sha256 for passport in passports),
        "precision": seen or first.config.precision or "as its graph",
        "tensorrt_version": first.tensorrt_version,
        "compute_capabilities": ",".join(capabilities),
        "container": describe_container(first.tensorrt_version),
    }
    return Servable(
        name=_name(paths[0], options),
        platform="tensorrt_plan",
        spec=first.spec,
        files=tuple(files),
        max_batch=largest,
        opt_batch=min(usual, largest),
        capability_files=capability_files,
        provenance=provenance,
        opt_size=first.config.profile.opt_size,
        profile_batches=first.config.profile.batches,
    )


def _read_passport(path: Path) -> PlanPassport:
    passport = read_passport(path)
    if passport is None:
        raise PlanError(
            f"{path}: has no passport {passport_path(path).name} beside it, so its batches and its TensorRT are "
            f"not known",
            remedy="copy the passport together with the plan, or build the plan with repvgg-trt build",
        )
    require_unchanged(path, sha256_file(path), passport)
    if passport.flavour != "tensorrt":
        raise InputError(
            f"{path}: is a plan of TensorRT-RTX, which Triton's TensorRT backend cannot load",
            remedy="build it with --backend tensorrt on the GPU that serves, or serve the .onnx",
        )
    if passport.config.profile.min_batch > 1 and passport.spec.batch is None:
        raise InputError(
            f"{path}: takes batches from {passport.config.profile.min_batch} on, and Triton sends single requests, too",
            remedy="build it with --min-batch 1",
        )
    return passport


def _require_one_network(paths: Sequence[Path], passports: Sequence[PlanPassport]) -> None:
    """Plans of several GPU types stand for one model: same network, same TensorRT, because one server loads them."""
    for path, passport in zip(paths[1:], passports[1:], strict=True):
        for what in ("onnx_sha256", "spec", "tensorrt_version"):
            if getattr(passport, what) != getattr(passports[0], what):
                found = f": {getattr(passports[0], what)!r} and {getattr(passport, what)!r}" if what != "spec" else ""
                raise InputError(
                    f"{path}: differs from {paths[0]} in {what}{found}",
                    remedy="build all plans of one model from the same ONNX with the same TensorRT, one for each GPU "
                    "type",
                )
        batches = [one.config.profile.batches for one in (passports[0], passport)]
        if batches[0] != batches[1]:
            raise InputError(
                f"{path}: has optimization profiles for {_show(batches[1])}, and {paths[0]} for {_show(batches[0])}",
                remedy="build all plans of one model with the same --profiles",
            )
        sizes = [(p.min_size, p.opt_size, p.max_size) for p in (passports[0].config.profile, passport.config.profile)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{path}: is for images from {sizes[1][0]} to {sizes[1][2]}, and {paths[0]} from {sizes[0][0]} to "
                f"{sizes[0][2]}",
                remedy="build all plans of one model with the same --min-size, --opt-size and --max-size",
            )


def _show(batches: tuple[int, ...]) -> str:
    return f"batches of {', '.join(map(str, batches))}" if batches else "all batches in one"


def _capability_files(paths: Sequence[Path], passports: Sequence[PlanPassport]) -> dict[str, str]:
    """File by compute capability: `{"8.9": "model_sm89.plan"}`."""
    result: dict[str, str] = {}
    for path, passport in zip(paths, passports, strict=True):
        if not passport.compute_capabilities:
            raise InputError(
                f"{path}: its passport names no compute capability", remedy="build it again with repvgg-trt build"
            )
        name = f"model_sm{passport.compute_capabilities[0].replace('.', '')}.plan"
        for capability in passport.compute_capabilities:
            if capability in result:
                raise InputError(
                    f"{path}: is for compute capability {capability}, as another of the plans is",
                    remedy="give one plan a GPU type",
                )
            result[capability] = name
    return result
