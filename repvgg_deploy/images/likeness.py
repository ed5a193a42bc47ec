"""Are these images like those that a model was trained on? Told from the mean and deviation of what reaches its stem.

The export keeps what the stem's BatchNorm saw (`ModelSpec.trained_on`). A sample of a set is compared with it under
several readings: as it is, as pixels of 0 to 1 or of 0 to 255, normalised otherwise, with the channels swapped. Each
reading is a factor and an offset for each channel, so that the moments of each image tell all.

A set is refused where it is implausible, and another reading is plausible and fits it better than chance allows.
Implausible: in some channel the mean is off by more than 2 (1 + 2/√n) deviations, or the deviation is so many times
larger or smaller, of n images; the pictures of one class of a data set are within half of that. Better: the mean over
the images of the difference in log-likelihood, under a normal distribution with the statistics of training, exceeds
four of its standard errors.

Source: Vuong 1989, Econometrica 57, 307, for the comparison of two models by paired differences of log-likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..specs.values import InputStatistics, Preprocessing
from .decode import IMAGENET_MEAN, IMAGENET_STD
from .sets import ImageSet, channels_last, choose_evenly

SAMPLE = 128
"""At most so many images are looked at."""
_ERRORS = 4.0
_PLAUSIBLE = 2.0
_LEAST_IMAGES = 4  # fewer have no spread to tell chance from
_ROUNDING = 1e-9  # a gain below it is of float64: of gray images, blue first is the very same
_FLOOR = 1 / 255  # of a deviation, in units of the deviation in training: below it an image is of one colour
_Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What came of the comparison.

    Attributes:
        verdict: `differs`: a note; `refused` only where it was accepted all the same.
        said: The verdict in words.
        images: How many were looked at.
        mean: Of what reaches the stem, per RGB channel, normalised; None where nothing was compared.
        std: Likewise.
        better: The reading that fits better, in words, if one does.
        remedy: What would make it so.
    """

    verdict: Literal["alike", "differs", "refused", "not checked"]
    said: str
    images: int = 0
    mean: _Triple | None = None
    std: _Triple | None = None
    better: str | None = None
    remedy: str | None = None


class _Reading(NamedTuple):
    """x' = factor · x[order] + offset for each channel: what would reach the stem if `what` were true."""

    what: str
    remedy: str
    factor: NDArray[np.float64]
    offset: NDArray[np.float64]
    order: tuple[int, ...] = (0, 1, 2)


class _Scale(NamedTuple):
    """Numbers that are pixels · 1/std − mean/std, per RGB channel, in 0–255 units."""

    what: str
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def require_like(images: ImageSet, *, accept: bool = False) -> Likeness:
    """Compares a sample of a set with what its model was trained on.

    Args:
        images: The set; up to SAMPLE of its images are read, evenly chosen.
        accept: Do not refuse.

    Raises:
        InputError: Another reading of the images fits, and this one does not; or nothing can be read.
    """
    found = compare(images)
    if found.verdict == "refused" and accept:
        return replace(found, said=f"accepted all the same: {found.said}")
    if found.verdict == "refused":
        raise InputError(f"{images.name}: {found.said}", remedy=f"{found.remedy}; or --accept-data to go on as it is")
    return found


def compare(images: ImageSet) -> Likeness:
    """The comparison itself; refuses nothing."""
    trained, how = images.spec.trained_on, images.spec.preprocessing
    if trained is None or how is None:
        return Likeness(
            "not checked",
            "not checked: the model keeps no statistics of its training images (its first convolution had no BatchNorm "
            "that tells them, as in deploy form)",
        )
    sample = _take_sample(images, trained, how)
    if sample is None:
        return Likeness("not checked", "not checked: of the images that were looked at none can be read, or not as RGB")
    count, mean, std = len(sample.means), sample.mean, sample.std
    as_given = _Reading("", "", np.ones(3), np.zeros(3))
    given = sample.measure_likelihood(as_given)
    best, gain = None, _ROUNDING
    for reading in _readings(how, sample.values):
        differences = sample.measure_likelihood(reading) - given
        error = differences.std(ddof=1) / math.sqrt(count) if count >= _LEAST_IMAGES else math.inf
        if differences.mean() > max(gain, _ERRORS * error):
            best, gain = reading, float(differences.mean())
    seen = (count, _triple(mean), _triple(std), *((None, None) if best is None else (best.what, best.remedy)))
    numbers = (
        f"mean {_show(mean)}, deviation {_show(std)} of {count} images, in training {_show(np.array(trained.mean))} "
        f"and {_show(np.array(trained.std))}"
    )
    if sample.is_plausible(as_given):
        if best is not None:
            return Likeness("differs", f"plausible, though it fits better as {best.what}: {numbers}", *seen)
        return Likeness("alike", f"like that of training: {numbers}", *seen)
    if best is not None and sample.is_plausible(best):
        said = f"unlike what the model was trained on, but like it as {best.what}: {numbers}"
        return Likeness("refused", said, *seen)
    return Likeness("differs", f"far from what the model was trained on: {numbers}", *seen)


class _Sample(NamedTuple):
    """Moments of what reaches the stem of each image, float64 (N, 3), and what they are compared with.

    Attributes:
        values: The least and the largest of all numbers where somebody prepared them; None of pixels.
    """

    means: NDArray[np.float64]
    variances: NDArray[np.float64]
    values: tuple[float, float] | None
    trained: InputStatistics

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of all pixels of all images, float64 (3,)."""
        return np.asarray(self.means.mean(0))

    @property
    def std(self) -> NDArray[np.float64]:
        """Likewise: within the images and between them."""
        return np.asarray(np.sqrt(self.variances.mean(0) + self.means.var(0)))

    def measure_likelihood(self, reading: _Reading) -> NDArray[np.float64]:
        """Of each image, mean over pixels and sum over channels, up to a constant; float64 (N,)."""
        order = list(reading.order)
        centre = (reading.factor * self.means[:, order] + reading.offset - self.trained.mean) / self.trained.std
        spread = np.square(reading.factor / self.trained.std) * self.variances[:, order]
        return np.asarray((np.log(np.abs(reading.factor)) - (np.square(centre) + spread) / 2).sum(1))

    def is_plausible(self, reading: _Reading) -> bool:
        """Whether the mean and the deviation lie as near to those of training as of so many images is to be asked."""
        allowed, order = _PLAUSIBLE * (1 + 2 / math.sqrt(len(self.means))), list(reading.order)
        off = (reading.factor * self.mean[order] + reading.offset - self.trained.mean) / self.trained.std
        ratio = np.maximum(np.abs(reading.factor) * self.std[order] / self.trained.std, _FLOOR)
        return bool(np.abs(off).max() <= allowed and np.abs(np.log(ratio)).max() <= math.log(allowed))


def _take_sample(images: ImageSet, trained: InputStatistics, how: Preprocessing) -> _Sample | None:
    chosen = [images.chosen[at] for at in choose_evenly(len(images.chosen), SAMPLE, 0)]
    means, variances, ends = [], [], []
    are_floats = False
    for image in images.source.read(chosen):
        if isinstance(image, InputError):
            continue
        pixels = channels_last(image).astype(np.float64)
        if pixels.shape[-1] != 3 or not np.isfinite(pixels).all():
            return None
        are_floats = image.dtype != np.uint8
        ends += [float(pixels.min()), float(pixels.max())]
        means.append(pixels.mean((0, 1)))
        variances.append(pixels.var((0, 1)))
    if not means:
        return None
    if are_floats:
        return _Sample(np.stack(means), np.stack(variances), (min(ends), max(ends)), trained)
    return _Sample((np.stack(means) - how.mean) / how.std, np.stack(variances) / np.square(how.std), None, trained)


def _readings(how: Preprocessing, values: tuple[float, float] | None) -> Iterator[_Reading]:
    """What the images, or the preprocessing that the model states, could be in place of what they are taken for.

    Args:
        how: The model's own.
        values: The least and the largest of numbers that somebody prepared, which rule out what cannot be so; None of
            pixels.
    """
    own = _Scale("", np.array(how.mean), np.array(how.std))
    none, ones = np.zeros(3), np.ones(3)
    others = [
        _Scale("pixels of 0 to 1", none, 255 * ones),
        _Scale("pixels of 0 to 255", none, ones),
        _Scale("pixels of -1 to 1", 127.5 * ones, 127.5 * ones),
        _Scale("pixels normalised as ImageNet's", np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)),
    ]
    others = [s for s in others if not (np.allclose(s.mean, own.mean) and np.allclose(s.std, own.std))]
    pairs = [(own, own), *((own, other) for other in others)]
    if values is not None:
        pairs += [(other, own) for other in others if _can_be(other, *values)]
    for source, target in pairs:
        for is_swapped in (False, True):
            if source is target and not is_swapped:
                continue  # as it is given
            order = [2, 1, 0] if is_swapped else [0, 1, 2]
            whats, remedies = [], []
            if source is not own:
                whats.append(source.what)
                made = _formula(source, own)
                remedies.append(f"give images = {made}")
            if is_swapped:
                whats.append("blue first")
                remedies.append("give red first: images[:, ::-1] of (N, 3, H, W), images[..., ::-1] of bytes")
            if target is not own:
                whats.append(f"input of a model that was trained on {target.what}, not normalised as this one states")
                named = (",".join(f"{value:g}" for value in values) for values in (target.mean, target.std))
                remedies.append("export the checkpoint again with --mean {} --std {}".format(*named))
            factor, offset = source.std[order] / target.std, (source.mean[order] - target.mean) / target.std
            yield _Reading(", ".join(whats), "; ".join(remedies), factor, offset, (order[0], 1, order[2]))


def _formula(source: _Scale, own: _Scale) -> str:
    """What makes numbers of one scale those that the model takes."""
    if np.ptp(source.std) > 0:
        pixels = f"images * ({_show(source.std)}) + ({_show(source.mean)})"
    else:
        pixels = "images" if source.std[0] == 1 else f"{source.std[0]:g} * images"
        pixels += f" + {source.mean[0]:g}" if source.mean[0] else ""
    return f"({pixels} - mean) / std with mean {_show(own.mean)}, std {_show(own.std)}"


def _can_be(scale: _Scale, low: float, high: float) -> bool:
    """Whether numbers from `low` to `high` can be of this scale; of a small part of it they are not taken for it."""
    ends = ((0 - scale.mean) / scale.std).min(), ((255 - scale.mean) / scale.std).max()
    room = (ends[1] - ends[0]) / 50  # a filter overshoots
    return bool(ends[0] - room <= low and high <= ends[1] + room and 100 * (high - low) > ends[1] - ends[0])


def _show(values: NDArray[Any]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _triple(values: NDArray[np.float64]) -> _Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third
