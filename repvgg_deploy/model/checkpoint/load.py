"""A checkpoint file → the family, form, variant and weights that it holds; complete, or refused with one clear reason.

`load_checkpoint` is the entry: it opens the container, finds the model in it and reads its weights. `build_model` makes
a network of the result; `write_deploy` writes one back; `describe_checkpoint` says in words what any file is, for
`repvgg-export --describe`. No code of a file is executed (see `pickle`), and weights stay views of the mapped file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError, InputError, explain_missing, say_install
from ...files.output import sha256_file
from ...specs import codec
from ...specs.values import METADATA_KEY, Form, Preprocessing, VariantSpec
from ...specs.variants import count_parameters, name_variant
from .containers import open_checkpoint, read_file
from .hub import Located, default_onnx, locate
from .identify import Asked, Resolved
from .lazy import (
    BFLOAT16,
    COMPLEX64,
    COMPLEX128,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    Dtype,
    LazyTensor,
    MalformedError,
    count_held,
    load_each,
)
from .names import plus_prefixes
from .resolve import resolve
from .structure import describe_custom
from .told import Told

if TYPE_CHECKING:
    import torch

    from ..network import RepVGG

_CHUNK = 1 << 20
_COUNTER = ".num_batches_tracked"
_UNREAD = f"the numbers were not looked at (NaN, infinities), because PyTorch is not installed: {say_install('export')}"
_FLOATS = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, found out and checked.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        family: Which implementation's names it has: `official`, `repvggplus`, `timm`, `mmpretrain`, `paddleclas`,
            `qarepvgg_v1`, `qarepvgg_v2`, `qarepvgg` (its other blocks) or `repopt`. A deploy form under official names
            is `official`, whatever it was trained as.
        form: Training or deploy.
        spec: The architecture; named as published, or `custom`.
        state: Tensors by the names of `RepVGG(spec, form).state_dict()`, complete and in its order; float32, step
            counters int64. Views of the mapped file where it holds float32: do not change or truncate the file while
            they are in use.
        labels: Names of the classes, where the file has them.
        preprocessing: How images were prepared, where the file has it.
        notes: What was found, chosen or assumed, in sentences.
        container: How it is packed, such as `torch zip`.
        wrapper: Path of keys to the state dict in the file; empty where the file is one.
        weights: Which weights of the file these are, as `load_checkpoint` takes it; `.` for the file's only ones.
        others: What else `weights` can choose in the file.
        facts: What tensors do not tell (strides, activation, pooling, epsilon), and who said it, in sentences.
        untold: What nobody said: `build_model` and exports refuse the checkpoint until it is stated.
        bn_eps: Name of a BatchNorm → its epsilon, where it is not that of `spec`.
        headless: There is no classifier; `state` has the mean of the features in its place, as one class.
        origin: The name that it was fetched by, pinned (see `hub.Located`); None where it was given as a file.
        told: What stands beside it on the hub. `labels` and `preprocessing` are of it where the file has none.
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
    container: str = ""
    wrapper: str = ""
    weights: str = "."
    others: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    bn_eps: Mapping[str, float] = field(default_factory=dict)
    headless: bool = False
    origin: str | None = None
    told: Told | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether every BatchNorm has seen data: none is one that completes a branch without BatchNorm (epsilon 0)."""
        return self.form == "training" and 0.0 not in self.bn_eps.values()


def load_checkpoint(
    path: Path | str | Located,
    *,
    arch: VariantSpec | None = None,
    strides: tuple[int, int, int, int, int] | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Loads a RepVGG checkpoint of any supported family, form and container.

    Args:
        path: `.pth`, `.pt`, `.pth.tar`, `.safetensors` or `.pdparams`, the index of a sharded `.safetensors` or one of
            its shards; the content decides, not the suffix. Or a name: `hf-hub:ORG/NAME`, `https://…` (see
            `repvgg_deploy.model.checkpoint.hub.locate`).
        arch: What it should be of (class count and block kind aside); None takes what the tensors say.
        strides: Of the stem and of the first block of stages 1 to 4: tensors do not tell them.
        weights: Which of several complete sets of weights in the file: the path of keys to it, such as `model_ema`.
            None takes the only one, or the only average of the others (EMA, SWA).

    Raises:
        CheckpointError: The file cannot be read, is no RepVGG, incomplete, of another architecture, has NaN or
            infinite weights, or holds several sets of weights (epochs; teacher and student) of which none is asked for;
            what is given by name cannot be fetched, or is another than it should be.
        MissingDependencyError: torch is not installed, or, for `hf-hub:`, huggingface_hub.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise (explain_missing(error) or error) from error
    return _load(locate(path), Asked(arch, strides, weights), read=True)


def _load(located: Located, asked: Asked, *, read: bool) -> Checkpoint:
    """`load_checkpoint`; where it does not `read` numbers, `state` is empty, and torch is not needed."""
    path, told = located.path, located.told
    content = read_file(path)  # the container, and in it a pickle read as data: tensors are described, not loaded
    try:
        # State dicts → official names → architectures, and the one to take.
        found = resolve(content, asked)
        _check_overlap([lazy for name, lazy in found.tensors.items() if lazy is not None and _is_read(name, lazy)])
        with ThreadPoolExecutor(max_workers=1) as pool:
            digest = pool.submit(_digest, content.files or (path,))
            state, converted = _load_weights(found) if read else ({}, [_UNREAD])
            sha256 = digest.result()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error
    except OSError as error:
        remedy = "check the disk and the file's permissions"
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", remedy=remedy) from error
    notes = list(found.notes)
    if found.untold:
        notes.append(
            f"it is none of the published models, and the file does not tell {', '.join(found.untold)}: state the "
            f"strides to build or export it"
        )
    notes += [*converted, *(() if told is None else told.notes)]
    if found.form == "deploy" and "train" in path.name.lower():
        notes.append(
            "the file is called a training checkpoint, but holds the deploy form (rbr_reparam): it is already "
            "reparameterized"
        )
    labels, preprocessing = found.labels, found.preprocessing
    if told is not None:
        if not found.headless and told.classes not in (None, found.spec.num_classes):
            message = f"{path}: has {found.spec.num_classes} classes, {told.who} says {told.classes}"
            raise CheckpointError(message, remedy="name another revision or file, or give the file alone")
        labels = labels if labels is not None or found.headless else told.labels
        preprocessing = preprocessing or told.preprocessing
    return Checkpoint(
        path=path,
        sha256=sha256,
        family=found.family,
        form=found.form,
        spec=found.spec,
        state=state,
        labels=labels,
        preprocessing=preprocessing,
        notes=tuple(notes),
        container=content.container,
        wrapper=found.wrapper,
        weights=found.key,
        others=found.others,
        facts=found.facts,
        untold=found.untold,
        bn_eps=found.bn_eps,
        headless=found.headless,
        origin=located.origin,
        told=told,
    )


def _digest(files: tuple[Path, ...]) -> str:
    """sha256 of a file; of several, that of their digests in order."""
    digests = [sha256_file(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _load_weights(found: Resolved) -> tuple[dict[str, torch.Tensor], list[str]]:
    """float32 tensors (step counters int64), views of the mapped file where it holds float32; notes on conversions."""
    import torch

    state: dict[str, torch.Tensor] = {}
    converted: dict[Dtype, int] = {}
    loaded = load_each([lazy for name, lazy in found.tensors.items() if lazy is not None and _is_read(name, lazy)])
    for name, lazy in found.tensors.items():
        if name.endswith(_COUNTER):
            # Old files and PaddlePaddle have none; inference never looks at it.
            read = lazy is not None and _is_read(name, lazy)
            state[name] = _next(name, loaded).clone() if read else torch.zeros((), dtype=torch.int64)
            continue
        if lazy is None and found.headless and name.startswith("linear."):
            # In place of a classifier the mean of the features, by which they are compared with one another.
            width = found.spec.widths[4]
            state[name] = torch.full((1, width), 1 / width) if name.endswith("weight") else torch.zeros(1)
            continue
        assert lazy is not None, name  # `resolve` refuses a file without it
        if lazy.dtype not in _FLOATS:
            message = f"{name} has the dtype {lazy.dtype.name}, expected float32 (or float16, bfloat16, float64)"
            remedy = "give the checkpoint before quantization, with floating-point weights"
            if lazy.dtype in (COMPLEX64, COMPLEX128):
                remedy = "no RepVGG has complex weights: give the checkpoint of a RepVGG"
            raise CheckpointError(message, remedy=remedy)
        if lazy.dtype != FLOAT32:
            converted[lazy.dtype] = converted.get(lazy.dtype, 0) + 1
        tensor = _next(name, loaded).to(torch.float32)
        # Row-major: a 1×1 kernel saved as channels_last is contiguous either way, but its strides alone would choose
        # another algorithm.
        state[name] = tensor.contiguous().flatten().view(tensor.shape)
        _check_numbers(name, state[name])
    return state, [f"{count} tensors were converted from {dtype.name} to float32" for dtype, count in converted.items()]


def _check_overlap(tensors: list[LazyTensor]) -> None:
    """A few bytes must not pose as many weights: they would take more memory and time than the file's size tells."""
    needed, held = sum(tensor.nbytes for tensor in tensors), count_held(tensors)
    if needed > held:
        raise CheckpointError(
            f"its tensors share memory: they need {needed:,} bytes, the file holds {held:,} for them",
            remedy="save it again with tensors of their own: {name: tensor.clone() for name, tensor in state.items()}",
        )


def _is_read(name: str, lazy: LazyTensor) -> bool:
    """Whether the file's numbers are used: of step counters only where they are one number."""
    return not name.endswith(_COUNTER) or (lazy.shape == () and lazy.dtype == INT64)


def _next(name: str, loaded: Iterator[torch.Tensor]) -> torch.Tensor:
    try:
        return next(loaded)
    except MalformedError as error:
        remedy = "download the checkpoint again and compare its sha256; where it is your own, save it again"
        raise CheckpointError(f"{name} cannot be read: {error}", remedy=remedy) from error


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    import torch

    # One pass without a temporary: the smallest and largest value are NaN if any value is.
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        flat = tensor.flatten()
        parts = (flat[start : start + _CHUNK] for start in range(0, flat.numel(), _CHUNK))
        wrong = sum(int((~torch.isfinite(part)).sum().item()) for part in parts)
        raise CheckpointError(
            f"{name} has {wrong} values of {tensor.numel()} that are NaN or infinite",
            remedy="the training diverged, or float16 overflowed: give an earlier checkpoint",
        )
    if name.endswith(".running_var") and low < 0:
        remedy = "give an undamaged checkpoint: a variance is never negative"
        raise CheckpointError(f"{name} has a negative variance ({low:g})", remedy=remedy)


def build_model(checkpoint: Checkpoint, *, output_stride: int = 32) -> RepVGG:
    """The model of a checkpoint, in `eval()`. Its weights are the checkpoint's tensors, not copies.

    Args:
        checkpoint: As `load_checkpoint` gives it.
        output_stride: 32 for classification; 16 or 8 for dense prediction (see `RepVGG`).

    Raises:
        CheckpointError: The variant is not a published one, and nobody said what tensors do not tell.
    """
    import torch

    from ..network import RepVGG

    require_told(checkpoint)
    with torch.device("meta"):
        model = RepVGG(checkpoint.spec, checkpoint.form, output_stride=output_stride)
    model.load_state_dict(dict(checkpoint.state), strict=True, assign=True)
    for name, eps in checkpoint.bn_eps.items():
        norm = model.get_submodule(name)
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.eps = eps
    return model.eval()


def require_told(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint of which nobody said what tensors do not tell.

    Raises:
        CheckpointError: The remedy is the command that states it.
    """
    if checkpoint.untold:
        guess = ",".join(map(str, checkpoint.spec.strides))
        known = (
            "the module's own" if "the strides" not in checkpoint.untold else "the usual ones; compare with its code"
        )
        raise CheckpointError(
            f"{checkpoint.path}: it is none of the published models, and the file does not tell "
            f"{', '.join(checkpoint.untold)}",
            remedy=f"where it is a RepVGG (ReLU, global average pooling), state its strides ({guess} are {known}): "
            f"{export_command(checkpoint)}; or give --arch FILE.toml; otherwise export_module(model, example_inputs, "
            f"'model.onnx')",
        )


def export_command(checkpoint: Checkpoint) -> str:
    """The command that exports a checkpoint, with what has to be stated."""
    given = checkpoint.origin or str(checkpoint.path)
    words = ["repvgg-export", "--ckpt", given, "--out", str(default_onnx(given))]
    if checkpoint.untold:
        words += ["--strides", ",".join(map(str, checkpoint.spec.strides))]
    if checkpoint.others:
        words += ["--weights", checkpoint.weights]
    if checkpoint.headless:
        words.append("--features")
    return shlex.join(words)


def write_deploy(model: RepVGG, path: Path, *, headless: bool = False) -> None:
    """Writes the deploy checkpoint under official names: a plain dict of tensors, as the original `convert.py` does.

    Tensors do not tell strides. Where the variant is not a published one, that dict stands under `state_dict`, beside
    the architecture.

    Args:
        model: In deploy form.
        path: Written as it is: who must not leave half a file gives the partial file of an `atomic_output`.
        headless: Leave the classifier out, which stands in for the one that the checkpoint lacks.

    Raises:
        InputError: The model is in training form.
        OSError: The file cannot be written.
    """
    import torch

    if model.form != "deploy":
        remedy = "call reparameterize(model) and save its result"
        raise InputError("the model is in training form, expected deploy form", remedy=remedy)
    named = [item for item in model.state_dict().items() if not (headless and item[0].startswith("linear."))]
    state: dict[str, object] = {_official_name(name, model.spec): _own_storage(tensor) for name, tensor in named}
    if name_variant(model.spec) is None:
        spec = replace(model.spec, auxiliary_heads=False)  # they serve training only
        state = {"state_dict": state, METADATA_KEY: {"variant": codec.encode(spec)}}
    with path.open("wb") as file:
        # Through a file object: torch would else write the file's name into the archive, and equal models would differ.
        torch.save(state, file)


def _official_name(name: str, spec: VariantSpec) -> str:
    """As the original has it: RepVGGplus (SE after the ReLU) calls its blocks otherwise."""
    prefixes = plus_prefixes(spec.depths) if spec.se == "after_relu" else {}
    ours = next((ours for ours in prefixes if name.startswith(ours)), "")
    return prefixes.get(ours, "") + name.removeprefix(ours)


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where it is a part of something bigger that would be saved with it."""
    detached = tensor.detach()
    whole = detached.untyped_storage().nbytes() == detached.numel() * detached.itemsize
    return detached if whole and detached.is_contiguous() else detached.contiguous().clone()


def all_facts(
    checkpoint: Checkpoint, preprocessing: Preprocessing | None, labels: tuple[str, ...] | None
) -> tuple[str, ...]:
    """What was said of a checkpoint, and by whom; of what stands beside it on the hub, what a model has of it."""
    told = checkpoint.told
    return checkpoint.facts if told is None else (*checkpoint.facts, *told.say(preprocessing, labels))


@dataclass(frozen=True, slots=True)
class Description:
    """What a file is. What has no line below is as in `Checkpoint`, or None where the file cannot be exported.

    Attributes:
        file: The path as given.
        container: Such as `torch zip`; None where it is none that we read.
        variant: Published name, or a custom variant in words.
        classes: Rows of the classifier.
        parameters: Learned parameters in this form, auxiliary heads aside.
        problem: Why it cannot be exported; None where it can.
        remedy: What to do about the problem.
        command: The command that exports it.
        origin: The name that it was fetched by, pinned (see `hub.Located`); None for a file.
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
    facts: tuple[str, ...] = ()
    weights: str = "."
    others: tuple[str, ...] = ()
    problem: str | None = None
    remedy: str | None = None
    command: str | None = None
    origin: str | None = None

    @property
    def loadable(self) -> bool:
        """Whether it can be exported."""
        return self.problem is None


def describe_checkpoint(
    path: Path | str | Located,
    *,
    arch: VariantSpec | None = None,
    strides: tuple[int, int, int, int, int] | None = None,
    weights: str | None = None,
) -> Description:
    """Says what a file is, whether or not it is a RepVGG checkpoint; without torch, all but if its numbers are sound.

    The arguments are those of `load_checkpoint`.

    Raises:
        CheckpointError: There is no such file, it is a folder, empty, or cannot be opened; or, of a name, as
            `load_checkpoint`.
    """
    located = locate(path)
    target, shown = located.path, located.origin or str(located.path)
    open_checkpoint(target).close()
    size = target.stat().st_size
    try:
        asked = Asked(arch, strides, weights)
        checkpoint = _load(located, asked, read=importlib.util.find_spec("torch") is not None)
    except CheckpointError as error:
        problem = error.message.removeprefix(f"{target}: ")
        container = None
        with contextlib.suppress(CheckpointError):
            container = read_file(target).container
        return Description(shown, size, sha256_file(target), container, problem=problem, remedy=error.remedy)
    spec = checkpoint.spec
    return Description(
        file=shown,
        bytes=size,
        sha256=checkpoint.sha256,
        container=checkpoint.container,
        wrapper=checkpoint.wrapper,
        family=checkpoint.family,
        form=checkpoint.form,
        variant=describe_custom(spec) if spec.name == "custom" else spec.name,
        classes=spec.num_classes,
        parameters=count_parameters(spec, checkpoint.form),
        spec=spec,
        labels=checkpoint.labels,
        notes=checkpoint.notes,
        facts=all_facts(checkpoint, checkpoint.preprocessing, checkpoint.labels),
        weights=checkpoint.weights,
        others=checkpoint.others,
        command=export_command(checkpoint),
        origin=checkpoint.origin,
    )
