"""A checkpoint file → the family, form, variant and weights that it holds; complete, or refused with one clear reason.

No code of the file is executed: see `tensor_pickle`. Weights stay views of the memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError, InputError
from ..files.output import PendingOutput, atomic_output, sha256_file
from ..specs import codec
from ..specs.values import Form, Preprocessing, VariantSpec
from .network import RepVGG
from .readers import read_file
from .resolve import Resolved, resolve
from .weights import load_weights
from .wrappers import METADATA_KEY


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, found out and checked.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        family: Which implementation's names it has: `official`, `repvggplus`, `timm`, `mmpretrain`, `paddleclas`, `qarepvgg_v1`,
            `qarepvgg_v2` or `repopt`. A deploy form under official names is `official`, whatever it was trained as.
        form: Training or deploy.
        spec: The architecture; named as published, or `custom`.
        state: Tensors by the names of `RepVGG(spec, form).state_dict()`, complete and in its order; float32, step counters int64. Views of the
            mapped file where it holds float32: do not change or truncate the file while they are in use.
        labels: Names of the classes, where the file has them.
        preprocessing: How images were prepared, where the file has it.
        notes: What was found, chosen or assumed, in sentences.
    """

    path: Path
    sha256: str
    family: str
    form: Form
    spec: VariantSpec
    state: Mapping[str, torch.Tensor] = field(repr=False)
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """A checkpoint and how it was packed.

    Attributes:
        checkpoint: What it holds.
        container: Such as `torch zip`.
        wrapper: Path of keys to the state dict; empty where the file is one.
    """

    checkpoint: Checkpoint
    container: str
    wrapper: str


def load_checkpoint(path: Path | str, *, arch: VariantSpec | None = None) -> Checkpoint:
    """Loads a RepVGG checkpoint of any supported family, form and container.

    Args:
        path: `.pth`, `.pt`, `.pth.tar`, `.safetensors` or `.pdparams`; the content decides, not the suffix.
        arch: What it should be of (class count and block kind aside); None takes what the tensors say. Custom strides come from here.

    Raises:
        CheckpointError: The file cannot be read, is no RepVGG, incomplete, of another architecture, or has NaN or infinite weights.
    """
    return load_file(Path(path), arch=arch).checkpoint


def load_file(path: Path, *, arch: VariantSpec | None = None) -> LoadedFile:
    """As `load_checkpoint`, with what `describe` shows beside.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    content = read_file(path)
    try:
        resolved = resolve(content, arch)
        with ThreadPoolExecutor(max_workers=1) as pool:
            digest = pool.submit(sha256_file, path)
            state, converted = load_weights(resolved.tensors, resolved.expected, transpose_classifier=resolved.transposed)
            checkpoint = _assemble(path, digest.result(), resolved, state=state, converted=converted)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", remedy="check the disk and the file's permissions") from error
    return LoadedFile(checkpoint, content.container, resolved.wrapper)


def _assemble(path: Path, sha256: str, resolved: Resolved, *, state: dict[str, torch.Tensor], converted: list[str]) -> Checkpoint:
    notes = [*resolved.notes, *converted]
    if resolved.form == "deploy" and "train" in path.name.lower():
        notes.append("the file is called a training checkpoint, but holds the deploy form (rbr_reparam): it is already reparameterized")
    return Checkpoint(
        path=path,
        sha256=sha256,
        family=resolved.family,
        form=resolved.form,
        spec=resolved.spec,
        state=state,
        labels=resolved.labels,
        preprocessing=resolved.preprocessing,
        notes=tuple(notes),
    )


def build_model(checkpoint: Checkpoint, *, output_stride: int = 32) -> RepVGG:
    """The model of a checkpoint, in `eval()`. Its weights are the checkpoint's tensors, not copies.

    Args:
        checkpoint: From `load_checkpoint`.
        output_stride: 32 for classification; 16 or 8 for dense prediction (see `RepVGG`).
    """
    with torch.device("meta"):
        model = RepVGG(checkpoint.spec, checkpoint.form, output_stride=output_stride)
    model.load_state_dict(dict(checkpoint.state), strict=True, assign=True)
    return model.eval()


def save_deploy(model: RepVGG, path: Path, *, force: bool = False) -> PendingOutput:
    """Writes the deploy checkpoint under the official key names: a plain dict of tensors, as the original `convert.py` does.

    Tensors do not tell strides. Where a variant has others than the published ones, that dict stands under `state_dict`, beside the architecture.

    Args:
        model: In deploy form.
        path: The output.
        force: Replace a different file that stands there.

    Returns:
        The output, with its status `written` or `up to date`.

    Raises:
        InputError: The model is in training form.
        ArtifactError: The file cannot be written, or exists already.
    """
    with atomic_output(path, force=force) as output:
        write_deploy(model, output.partial)
    return output


def write_deploy(model: RepVGG, partial: Path) -> None:
    """As `save_deploy`, to a file that is already open to be written: for a caller that commits it with others.

    Raises:
        InputError: The model is in training form.
        OSError: The file cannot be written.
    """
    if model.form != "deploy":
        raise InputError("the model is in training form, expected deploy form", remedy="call reparameterize(model) and save its result")
    state: dict[str, object] = {_official_name(name, model.spec): _own_storage(tensor) for name, tensor in model.state_dict().items()}
    if set(model.spec.strides) != {2}:
        state = {"state_dict": state, METADATA_KEY: {"variant": codec.encode(model.spec)}}
    with partial.open("wb") as file:
        # Through a file object: torch would else write the file's name into the archive, and equal models would differ.
        torch.save(state, file)


def _official_name(name: str, spec: VariantSpec) -> str:
    """RepVGGplus (SE after the ReLU) keeps its blocks in `stageN.blocks`, and its third stage in two halves."""
    stage, _, rest = name.partition(".")
    if spec.se != "after_relu" or stage not in ("stage1", "stage2", "stage3", "stage4") or rest.startswith("blocks."):
        return name
    index_text, _, part = rest.partition(".")
    index, half = int(index_text), spec.depths[2] // 2
    if stage == "stage3":
        stage, index = ("stage3_first", index) if index < half else ("stage3_second", index - half)
    return f"{stage}.blocks.{index}.{part}"


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where it is a part of something bigger that would be saved with it."""
    detached = tensor.detach()
    whole = detached.untyped_storage().nbytes() == detached.numel() * detached.itemsize
    return detached if whole and detached.is_contiguous() else detached.contiguous().clone()
