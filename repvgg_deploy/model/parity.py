"""Training form against deploy form: every block, and the whole network, in float64 and in float32.

One pass over the blocks: each is widened to float64, compared alone on random input, and carries two whole-network
chains one step further (float64 training form, float64 deploy form), so that never more than one block stands in
float64.

How large an error may be: derived from the float32 error of the training-mode model itself, never from a wish.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ParityError
from ..specs.values import Check
from .arithmetic import fold_in_float64
from .block import DeployBlock, TrainingBlock
from .network import RepVGG
from .tolerance import FLOAT32_FACTOR, allow_float32, allow_float64, compare, largest, relative_error

B = TypeVar("B", TrainingBlock, DeployBlock)
Outputs = dict[str, NDArray[np.floating]]
logger = logging.getLogger(__name__)

# The same for a single block on random input. Its training form rounds each branch once, at the branch's own size, and
# often errs by one epsilon only; the folded kernel's centre taps are larger than any branch's, and fast convolution
# algorithms mix them into all others. On the trained networks a block erred by up to 19 epsilons, 20 times its training
# form.
_BLOCK_FLOOR = 64 * float(np.finfo(np.float32).eps)
_BLOCK_INPUT = (1, 7, 6)  # images, height, width: not square, odd and even, and all borders
# Some hundred times what trained networks have; ten times as much is still allowed to the deploy form.
_MAX_TRAINING_ERROR = 1e-4
_HALF_EPSILON = 0.51 * float(np.finfo(np.float32).eps)
_SMALLEST = float(np.finfo(np.float32).tiny)  # below it float32 has fewer digits
_MOST_PIXELS = 4 * 256 * 256  # of the images that are run together
_MIN_SPREAD = 10.0  # outputs must move by ten tolerances from image to image, or agreement shows nothing


@dataclass(frozen=True, slots=True)
class FormReport:
    """What the comparison found.

    Attributes:
        checks: Every comparison.
        references: By batch name: outputs of the training-mode model (`logits`, `stage1` … `stage4`), float32 arrays.
            Kinds of stress batches on which float32 itself loses the result are left out.
        training_error: Its own float32 error, relative to the largest output: the yardstick of all whole-network
            tolerances.
    """

    checks: tuple[Check, ...]
    references: Mapping[str, Outputs]
    training_error: float


@torch.no_grad()
def compare_forms(
    training: RepVGG, deploy: RepVGG, batches: Mapping[str, NDArray[np.float32]], *, small: Sequence[str]
) -> FormReport:
    """Compares the two forms of one network.

    Args:
        training: In training form; used in `eval()`.
        deploy: Its deploy form.
        batches: By name, float32 (N, 3, H, W), normalised.
        small: Names of the batches of small images: those that are compared here. The others are only run through the
            training form, to be compared with the ONNX.

    Returns:
        The checks, passed or not; see `require_passed`.

    Raises:
        ParityError: A form gives NaN or infinity, or its output does not depend on its input.
    """
    training.eval()
    inputs = {name: torch.from_numpy(array) for name, array in batches.items()}
    few = {name: inputs[name] for name in small}
    checks, wide, exact = _compare_blocks(training, deploy, [x.double() for x in _join(few)])
    truth, other = (_separate(few, _classify64(form.linear, x)) for form, x in ((training, wide), (deploy, exact)))
    references, error = _run_reference(training, inputs, truth)
    results = {name: outputs["logits"] for name, outputs in _run(deploy, few).items()}
    _require_finite("deploy", results)
    for name in small:
        checks.append(compare(f"network, float64, {name}", other[name], truth[name], allow_float64(error)))
    for name in (name for name in small if name in references):
        logits = references[name]["logits"]
        checks.append(compare(f"network, float32, {name}", results[name], logits, allow_float32(error)))
    same = all(torch.equal(a, b) for a, b in zip(training.linear.parameters(), deploy.linear.parameters(), strict=True))
    checks.append(Check("weights linear", 0.0 if same else 1.0, _HALF_EPSILON, 1.0))
    return FormReport(tuple(checks), references, error)


@torch.no_grad()
def reference_of_deploy(
    deploy: RepVGG, batches: Mapping[str, NDArray[np.float32]], *, small: Sequence[str]
) -> FormReport:
    """As `compare_forms` for a checkpoint in deploy form: its own outputs and float32 error, and no checks.

    Raises:
        ParityError: It gives NaN or infinity, or its output does not depend on its input.
    """
    inputs = {name: torch.from_numpy(array) for name, array in batches.items()}
    few = {name: inputs[name] for name in small}
    chain = [x.double() for x in _join(few)]
    for block in deploy.blocks().values():
        assert isinstance(block, DeployBlock)  # reference_of_deploy is given deploy forms only
        wide = _widen(block)
        chain = [wide(x) for x in chain]
    truth = _separate(few, _classify64(deploy.linear, chain))
    return FormReport((), *_run_reference(deploy, inputs, truth))


def _compare_blocks(
    training: RepVGG, deploy: RepVGG, inputs: list[Tensor]
) -> tuple[list[Check], list[Tensor], list[Tensor]]:
    """Checks of every block; and what the small batches are behind the last one in float64, in either form."""
    wide_chain = exact_chain = inputs
    checks: list[Check] = []
    deploy_blocks = deploy.blocks()
    for index, (name, block) in enumerate(training.blocks().items()):
        other = deploy_blocks[name]
        if not isinstance(block, TrainingBlock) or not isinstance(other, DeployBlock):
            raise ParityError(
                f"block {name}: expected a training form and a deploy form, found {type(block).__name__} and "
                f"{type(other).__name__}",
                remedy="reparameterize the whole network; half a conversion is never written",
            )
        wide, exact = _widen(block), _exact_deploy(block, other)
        checks.append(_compare_kernels(name, block, other, exact))
        checks += _compare_block(name, (block, other), (wide, exact), seed=index)
        wide_chain = [wide(x) for x in wide_chain]
        exact_chain = [exact(x) for x in exact_chain]
        del wide, exact  # before the next block is widened
    return checks, wide_chain, exact_chain


def _widen(block: B) -> B:
    """A float64 copy, made without a float32 one."""
    with torch.device("meta"):
        wide = type(block)(block.spec)
    state = {name: t.double() if t.is_floating_point() else t for name, t in block.state_dict().items()}
    wide.load_state_dict(state, assign=True)
    for one, other in zip(wide.modules(), block.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d) and isinstance(other, nn.BatchNorm2d):
            one.eps = other.eps  # a pickled module tells it layer by layer, the block's spec has one for all
    return wide.eval()


def _exact_deploy(block: TrainingBlock, other: DeployBlock) -> DeployBlock:
    """The deploy form with its kernel folded anew and left in float64; its SE is the deploy block's own."""
    with torch.device("meta"):
        exact = DeployBlock(other.spec)
    state = {name: t.double() for name, t in other.state_dict().items() if not name.startswith("rbr_reparam.")}
    folded = fold_in_float64(block.branches(), block.post_bn, block.spec.groups, result=torch.float64)
    assert folded.bias is not None
    exact.load_state_dict({**state, "rbr_reparam.weight": folded.kernel, "rbr_reparam.bias": folded.bias}, assign=True)
    return exact.eval()


def _compare_kernels(name: str, block: TrainingBlock, other: DeployBlock, exact: DeployBlock) -> Check:
    """The weights that will be shipped against the float64 fold: each output channel in units of its own largest value.

    Half an epsilon is the rounding to float32. A channel that no input excites shows here and nowhere else.
    """
    worst = 0.0
    for part in ("weight", "bias"):
        ours, theirs = (
            getattr(each.rbr_reparam, part).detach().flatten(1 if part == "weight" else 0) for each in (exact, other)
        )
        if torch.equal(ours.to(theirs.dtype), theirs):
            continue  # rounded once, as it should be: no need of more float64 copies to see it
        size = ours.abs().amax(1, keepdim=True) if part == "weight" else ours.abs()
        worst = max(worst, float(((theirs.double() - ours).abs() / size.clamp_min(_SMALLEST)).max()))
    ours_se, theirs_se = ([*each.se.parameters(), *each.post_se.parameters()] for each in (block, other))
    same_se = all(torch.equal(a, b) for a, b in zip(ours_se, theirs_se, strict=True))
    return Check(f"weights {name}", worst if same_se and np.isfinite(worst) else 1.0, _HALF_EPSILON, 1.0)


def _compare_block(
    name: str, narrow: tuple[TrainingBlock, DeployBlock], wide: tuple[TrainingBlock, DeployBlock], *, seed: int
) -> list[Check]:
    """The linear part and the whole block on random input, in both precisions. Pairs: training form, deploy form."""
    count, height, width = _BLOCK_INPUT
    x = torch.randn((count, narrow[0].spec.in_channels, height, width), generator=torch.Generator().manual_seed(seed))
    checks = []
    narrow_outputs, wide_outputs = [block.linear(x) for block in narrow], [block.linear(x.double()) for block in wide]
    for label in ("convolution", "block"):  # the ReLU hides half of all errors; the whole block has the SE
        truth, exact = (out.numpy() for out in wide_outputs)
        reference, result = (out.numpy() for out in narrow_outputs)
        error = relative_error(reference, truth)
        checks.append(compare(f"{label} {name}, float64", exact, truth, allow_float64(error)))
        checks.append(compare(f"{label} {name}, float32", result, truth, max(FLOAT32_FACTOR * error, _BLOCK_FLOOR)))
        narrow_outputs = [block.finish(out) for block, out in zip(narrow, narrow_outputs, strict=True)]
        wide_outputs = [block.finish(out) for block, out in zip(wide, wide_outputs, strict=True)]
    return checks


def _classify64(linear: nn.Linear, features: list[Tensor]) -> list[NDArray[np.floating]]:
    weight, bias = linear.weight.double(), linear.bias.double()
    return [nn.functional.linear(x.mean((2, 3)), weight, bias).numpy() for x in features]


def _run_reference(
    model: RepVGG, inputs: Mapping[str, Tensor], truth: Mapping[str, NDArray[np.floating]]
) -> tuple[dict[str, Outputs], float]:
    """Outputs on every batch that can be verified, and its own float32 error against `truth`, its float64 logits."""
    references = _run(model, inputs)
    _require_finite(model.form, {name: outputs["logits"] for name, outputs in references.items()})
    references, error = _keep_stable(references, truth)
    _require_spread(references, allow_float32(error))
    return references, error


def _run(model: RepVGG, inputs: Mapping[str, Tensor]) -> dict[str, Outputs]:
    """By batch name, what the model gives."""
    joined = []
    for x in _join(inputs):
        stages = model.stage_outputs(x)
        outputs = {"logits": model.classify(stages["stage4"]), **stages}
        joined.append({name: t.numpy() for name, t in outputs.items()})
    apart = {name: _separate(inputs, [outputs[name] for outputs in joined]) for name in joined[0]}
    return {batch: {name: arrays[batch] for name, arrays in apart.items()} for batch in inputs}


def _group(inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the batches that are run together: those of one image size, where the images are few and small.

    A layer reads all its weights anew in each run, which takes longer than the arithmetic of a small image. Large
    images would take memory and gain nothing.
    """
    groups: list[list[str]] = []
    by_size: dict[torch.Size, list[str]] = {}
    for name, x in inputs.items():
        by_size.setdefault(x.shape[1:], []).append(name)
    for names in by_size.values():
        together = sum(inputs[name][:, 0].numel() for name in names) <= _MOST_PIXELS
        groups += [names] if together else [[name] for name in names]
    return groups


def _join(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Each group's images."""
    return [torch.cat([inputs[name] for name in names]) for names in _group(inputs)]


def _separate(inputs: Mapping[str, Tensor], joined: Sequence[NDArray[np.floating]]) -> dict[str, NDArray[np.floating]]:
    """By batch name, its rows of what was computed of each group."""
    found: dict[str, NDArray[np.floating]] = {}
    for names, array in zip(_group(inputs), joined, strict=True):
        ends = np.cumsum([len(inputs[name]) for name in names])
        found |= dict(zip(names, np.split(array, ends[:-1]), strict=True))
    return found


def _require_finite(form: str, outputs: Outputs) -> None:
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ParityError(
                f"the {form} form gives NaN or infinity on the batch {name!r}",
                remedy="look for BatchNorm variances near zero or diverged weights; such a checkpoint cannot be "
                "deployed",
            )


def _keep_stable(
    references: dict[str, Outputs], truth: Mapping[str, NDArray[np.floating]]
) -> tuple[dict[str, Outputs], float]:
    """The references on which float32 keeps the result, and the model's own float32 error on them.

    A tolerance is ten times that error; where float32 itself loses the result, everything would pass. A stress batch
    (borders, large constants) on which that happens is left out, at every size: an SE block that was never driven so
    far may well jump there. On images it is an error.

    Raises:
        ParityError: float32 loses the result on image-like batches.
    """
    errors = {name: relative_error(references[name]["logits"], t) for name, t in truth.items()}
    lost = {_kind(name): error for name, error in errors.items() if not error <= _MAX_TRAINING_ERROR}
    if any(kind.startswith("image") for kind in lost):
        raise ParityError(
            f"the model is numerically unstable: in float32 its own output is {max(lost.values()):.2g} of its size "
            f"away from float64, and up to {_MAX_TRAINING_ERROR:.0e} can be verified",
            remedy="look for BatchNorm variances near zero and activations that grow from layer to layer; an untrained "
            "deep network has them, too",
        )
    for kind, error in lost.items():
        logger.warning(
            "%s batches are left out of the verification: the model's own float32 error on them is %.2g", kind, error
        )
    kept = {name: outputs for name, outputs in references.items() if _kind(name) not in lost}
    return kept, max(error for name, error in errors.items() if name in kept)


def _kind(name: str) -> str:
    return name.rpartition(" ")[0]


def _require_spread(references: Mapping[str, Outputs], allowed: float) -> None:
    """Agreement means nothing where the output does not depend on the input."""
    # From image to image within one batch: between batches the size alone, through the padding, moves the output of a
    # dead network; and one that wakes at the large constants only would not be seen by a run on images.
    images = [outputs["logits"] for name, outputs in references.items() if _kind(name).startswith("image")]
    spread = max(float(np.ptp(logits, axis=0).max()) / max(largest(logits), 1e-30) for logits in images)
    if not spread > _MIN_SPREAD * allowed:
        raise ParityError(
            f"the training form's output does not depend on its input: it moves by {spread:.2g} of its size from "
            f"image to image, and at least {_MIN_SPREAD * allowed:.2g} is needed to see an error",
            remedy="the network is untrained or dead (all ReLUs closed, or a zero classifier): there is nothing to "
            "deploy",
        )
