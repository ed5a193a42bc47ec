"""A checkpoint file → the family, form, variant and weights that it holds; complete, or refused with one clear reason.

No code of the file is executed: see `tensor_pickle`. Weights stay views of the memory-mapped file.

Lazy tensors → the float32 tensors of a state dict, checked: no overlap, no integers, no NaN, no infinity.

What a file is, in words: for `repvgg-export --describe`. Also says what a file is that cannot be loaded.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import CheckpointError, InputError
from ...files.output import PendingOutput, atomic_output, default_output, sha256_file
from ...specs import codec
from ...specs.values import Form, Preprocessing, VariantSpec
from ...specs.variants import count_parameters
from ..network import RepVGG
from .containers import check_file, open_binary, read_file
from .lazy import LazyTensor, MalformedError
from .names import METADATA_KEY
from .resolve import Resolved, resolve
from .structure import Shapes, describe_custom

_CHUNK = 1 << 20
_COUNTER = ".num_batches_tracked"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def load_weights(
    tensors: Mapping[str, LazyTensor], expected: Shapes, *, transpose_classifier: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Loads what `expected` names, in its order.

    Args:
        tensors: By official name; complete but for BatchNorm's step counters.
        expected: Shape by name.
        transpose_classifier: `linear.weight` is stored as (features, classes), as PaddlePaddle does.

    Returns:
        float32 tensors (counters int64) that are views of the mapped file where the file holds float32, and notes on
        what was converted.

    Raises:
        CheckpointError: A weight is no real number, or NaN or infinite, or tensors share memory.
    """
    chosen = {name: tensors[name] for name in expected if name in tensors}
    _check_overlap(chosen)
    state: dict[str, torch.Tensor] = {}
    converted: dict[torch.dtype, int] = {}
    for name in expected:
        if name.endswith(_COUNTER):
            state[name] = _load_counter(name, chosen.get(name))
            continue
        lazy = chosen[name]
        if lazy.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has the dtype {_dtype_name(lazy.dtype)}, expected float32 (or float16, " f"bfloat16, float64)",
                                  remedy="give the checkpoint before quantization, with floating-point weights")  # fmt: skip
        if lazy.dtype != torch.float32:
            converted[lazy.dtype] = converted.get(lazy.dtype, 0) + 1
        tensor = _load(name, lazy).to(torch.float32)
        state[name] = _plain_strides(tensor.t() if transpose_classifier and name == "linear.weight" else tensor)
        _check_numbers(name, state[name])
    return state, [
        f"{count} tensors were converted from {_dtype_name(dtype)} to float32" for dtype, count in converted.items()
    ]


def _plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """Row-major. A 1×1 kernel saved as channels_last is contiguous either way; its strides alone would choose another algorithm."""
    return tensor.contiguous().flatten().view(tensor.shape)


def _load(name: str, lazy: LazyTensor) -> torch.Tensor:
    try:
        return lazy.load()
    except MalformedError as error:
        raise CheckpointError(
            f"{name} cannot be read: {error}", remedy="download the checkpoint again and compare its sha256"
        ) from error


def _load_counter(name: str, lazy: LazyTensor | None) -> torch.Tensor:
    """BatchNorm's step counter, int64 (). Old files and PaddlePaddle have none; inference never looks at it."""
    if lazy is None or lazy.shape != () or lazy.dtype != torch.int64:
        return torch.zeros((), dtype=torch.int64)
    return _load(name, lazy).clone()


def _check_overlap(tensors: Mapping[str, LazyTensor]) -> None:
    """A few bytes must not pose as many weights: it would take memory and time that the file's size does not announce."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    held = sum({id(tensor.backing): tensor.backing_bytes for tensor in tensors.values()}.values())
    if needed > held:
        raise CheckpointError(f"its tensors share memory: they need {needed:,} bytes, the file holds {held:,} for them",
                              remedy="save it again with tensors of their own: {name: tensor.clone() for name, tensor " "in state.items()}")  # fmt: skip


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    # One pass without a temporary: the smallest and largest value are NaN if any value is.
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        flat = tensor.flatten()
        wrong = sum(
            int((~torch.isfinite(flat[start : start + _CHUNK])).sum().item())
            for start in range(0, flat.numel(), _CHUNK)
        )
        raise CheckpointError(f"{name} has {wrong} values of {tensor.numel()} that are NaN or infinite",
                              remedy="the training diverged, or float16 overflowed: give an earlier checkpoint")  # fmt: skip
    if name.endswith(".running_var") and low < 0:
        raise CheckpointError(
            f"{name} has a negative variance ({low:g})",
            remedy="give an undamaged checkpoint: a variance is never negative",
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Description:
    """What a file is.

    Attributes:
        file: The path as given.
        bytes: Its size.
        sha256: Of its bytes.
        container: Such as `torch zip`; None where it is none that we read.
        wrapper: Path of keys to the state dict; empty where the file is one; None where none was found.
        family: Which implementation's names it has.
        form: Training or deploy.
        variant: Published name, or a custom variant in words.
        classes: Rows of the classifier.
        parameters: Learned parameters in this form, auxiliary heads aside.
        spec: The architecture.
        labels: Names of the classes, where the file has them.
        notes: What was found, chosen or assumed.
        problem: Why it cannot be exported; None where it can.
        remedy: What to do about it.
        command: The command that exports it; None where it cannot be exported.
    """

    file: str
    bytes: int
    sha256: str
    container: str | None = None
    wrapper: str | None = None
    family: str | None = None
    form: Form | None = None
    variant: str | None = None
    classes: int | None = None
    parameters: int | None = None
    spec: VariantSpec | None = None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None
    remedy: str | None = None
    command: str | None = None

    @property
    def loadable(self) -> bool:
        """Whether it can be exported."""
        return self.problem is None


def describe_checkpoint(path: Path | str) -> Description:
    """Says what a file is, whether or not it is a RepVGG checkpoint.

    Raises:
        CheckpointError: There is no such file, it is a folder, empty, or cannot be opened.
    """
    target = Path(path)
    check_file(target)
    open_binary(target).close()
    try:
        loaded = load_file(target)
    except CheckpointError as error:
        problem = error.message.removeprefix(f"{target}: ")
        return Description(
            str(path),
            target.stat().st_size,
            sha256_file(target),
            _container(target),
            problem=problem,
            remedy=error.remedy,
        )
    checkpoint = loaded.checkpoint
    spec = checkpoint.spec
    return Description(
        file=str(path),
        bytes=target.stat().st_size,
        sha256=checkpoint.sha256,
        container=loaded.container,
        wrapper=loaded.wrapper,
        family=checkpoint.family,
        form=checkpoint.form,
        variant=describe_custom(spec) if spec.name == "custom" else spec.name,
        classes=spec.num_classes,
        parameters=count_parameters(spec, checkpoint.form),
        spec=spec,
        labels=checkpoint.labels,
        notes=checkpoint.notes,
        command=export_command(target),
    )


def export_command(path: Path) -> str:
    """The command that exports a checkpoint to an ONNX beside it."""
    return shlex.join(["repvgg-export", "--ckpt", str(path), "--out", str(default_output(path))])


def _container(path: Path) -> str | None:
    try:
        return read_file(path).container
    except CheckpointError:
        return None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, found out and checked.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        family: Which implementation's names it has: `official`, `repvggplus`, `timm`, `mmpretrain`, `paddleclas`,
            `qarepvgg_v1`, `qarepvgg_v2` or `repopt`. A deploy form under official names is `official`, whatever it was
            trained as.
        form: Training or deploy.
        spec: The architecture; named as published, or `custom`.
        state: Tensors by the names of `RepVGG(spec, form).state_dict()`, complete and in its order; float32, step
            counters int64. Views of the mapped file where it holds float32: do not change or truncate the file while
            they are in use.
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
        arch: What it should be of (class count and block kind aside); None takes what the tensors say. Custom strides
            come from here.

    Raises:
        CheckpointError: The file cannot be read, is no RepVGG, incomplete, of another architecture, or has NaN or
            infinite weights.
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
            state, converted = load_weights(
                resolved.tensors, resolved.expected, transpose_classifier=resolved.transposed
            )
            checkpoint = _assemble(path, digest.result(), resolved, state=state, converted=converted)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", remedy="check the disk and the file's permissions"
        ) from error
    return LoadedFile(checkpoint, content.container, resolved.wrapper)


def _assemble(
    path: Path, sha256: str, resolved: Resolved, *, state: dict[str, torch.Tensor], converted: list[str]
) -> Checkpoint:
    notes = [*resolved.notes, *converted]
    if resolved.form == "deploy" and "train" in path.name.lower():
        notes.append(
            "the file is called a training checkpoint, but holds the deploy form (rbr_reparam): it is already "
            "reparameterized"
        )
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

    Tensors do not tell strides. Where a variant has others than the published ones, that dict stands under
    `state_dict`, beside the architecture.

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
        raise InputError(
            "the model is in training form, expected deploy form",
            remedy="call reparameterize(model) and save its result",
        )
    state: dict[str, object] = {
        _official_name(name, model.spec): _own_storage(tensor) for name, tensor in model.state_dict().items()
    }
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
