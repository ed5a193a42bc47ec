"""Which variant, batch size and precision to take: published accuracy beside measured or estimated latency.

An estimate adds up, over the layers, the longer of operations ÷ (peak · efficiency) and bytes ÷ bandwidth, and then a
fixed time for a layer's start, its end, and a GPU that one image does not fill. A grouped convolution pays that once a
group: each group is a small product of its own.

The constants for FP32 were chosen to meet published times of TensorRT 8.0 on a V100 (`PUBLISHED_V100_MS`): ten of the
twelve estimates are within 17 %; B3, whose published times are hardly longer than those of the smaller B2, is 21 % and
47 % too long. For FP16 and INT8 no published times were at hand: that tensor cores reach 40 % of their peak is an
assumption. Copies to and from the GPU are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import InputError
from ..specs.values import Precision, VariantSpec
from ..specs.variants import PUBLISHED, get_variant
from ..specs.zoo import load_cards
from .peaks import look_up_gpu
from .records import Benchmark
from .roofline import Ceiling, LayerCost, count_costs

EFFICIENCY: dict[str, float] = {"fp32": 0.9, "fp16": 0.4, "int8": 0.4}
OVERHEAD_US = 50.0
PUBLISHED_V100_MS: dict[str, tuple[float, float]] = {
    "A0": (1.38, 2.81),
    "B0": (1.99, 4.67),
    "B1": (3.56, 13.94),
    "B1g4": (4.73, 11.14),
    "B2": (4.45, 19.13),
    "B3": (4.28, 21.14),
}
"""Batch 1 and 8 at 224 px, FP32.
Source: PaddleClas, documentation of its RepVGG models (https://github.com/PaddlePaddle/PaddleClas)."""
BATCHES = (1, 8, 32, 128)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
INT8_DROP = 0.5
"""Percentage points that INT8 is expected to lose. Nobody published top-1 of INT8 RepVGG by this project's method. On
ten classes of photographs A0 lost 0.2 with a standard error of 0.8 (`benchmarks/results/int8.json`): this is more, on
purpose."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Attributes:
        slo_ms: A batch may take so long; None for any time.
        min_top1: In percent; None for any.
        batches: Sizes to look at.
        precisions: Precisions to look at.
        int8_drop: Percentage points that INT8 loses.
    """

    slo_ms: float | None = None
    min_top1: float | None = None
    batches: tuple[int, ...] = BATCHES
    precisions: tuple[Precision, ...] = PRECISIONS
    int8_drop: float = INT8_DROP

    def is_fast(self, choice: Choice) -> bool:
        """Whether it takes no longer than asked for."""
        return self.slo_ms is None or choice.latency_ms <= self.slo_ms

    def is_accurate(self, choice: Choice) -> bool:
        """Whether it has the accuracy asked for."""
        return self.min_top1 is None or choice.top1 >= self.min_top1

    def is_met_by(self, choice: Choice) -> bool:
        """Whether it is both."""
        return self.is_fast(choice) and self.is_accurate(choice)


@dataclass(frozen=True, slots=True)
class Choice:
    """One variant, image size, batch size and precision.

    Attributes:
        variant: Its name.
        image_size: Height and width in pixels, of the published accuracy.
        precision: Precision of the graph.
        batch: Images of one call.
        top1: Percent; published for FP32, less the expected drop for INT8.
        latency_ms: Of one batch; the median where it was measured.
        images_per_second: With one call at a time.
        origin: How the latency is known.
        detail: The file, or nothing.
        gmacs: 1e9 multiply-accumulates of one image.
        grouped: Whether it has grouped convolutions.
    """

    variant: str
    image_size: int
    precision: Precision
    batch: int
    top1: float
    latency_ms: float
    images_per_second: float
    origin: Literal["measured", "estimated"]
    detail: str
    gmacs: float
    grouped: bool

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What a measurement and an estimate of the same have in common."""
        return self.variant, self.image_size, self.precision, self.batch


@dataclass(frozen=True, slots=True)
class Measured:
    """A benchmark file that was read, and its name."""

    name: str
    benchmark: Benchmark


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What an estimate rests on.

    Attributes:
        efficiency: By precision: share of the peak that a layer short of arithmetic reaches.
        overhead_us: Microseconds of a layer besides, once a group.
    """

    efficiency: dict[str, float] = field(default_factory=lambda: dict(EFFICIENCY))
    overhead_us: float = OVERHEAD_US


FITTED = Assumptions()
"""The defaults."""


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer.

    Attributes:
        fitting: What meets the wish: most images a second first.
        others: The rest.
    """

    fitting: tuple[Choice, ...]
    others: tuple[Choice, ...]


def advise(
    wish: Wish, *, ceiling: Ceiling | None, measured: Sequence[Measured], assumptions: Assumptions = FITTED
) -> Advice:
    """Looks at every published variant with published accuracy.

    Args:
        wish: What is asked for.
        ceiling: The GPU, to estimate what was not measured; None looks at measurements only.
        measured: Files of the same device.
        assumptions: What estimates rest on.

    Raises:
        InputError: There is neither a GPU nor a measurement of a published variant.
    """
    known: dict[tuple[str, int, str, int], Choice] = {}
    for choice in (choice for file in measured for choice in _measured_choices(file, wish)):
        # With several backends, the faster one.
        if choice.key not in known or choice.images_per_second > known[choice.key].images_per_second:
            known[choice.key] = choice
    choices = list(known.values())
    if ceiling is not None:
        choices += [choice for choice in _estimated_choices(wish, ceiling, assumptions) if choice.key not in known]
    if not choices:
        raise InputError(
            "there is nothing to choose from: no GPU whose peaks are known, and no measurement of a published "
            "variant at its image size",
            remedy="give --gpu t4 or another, or --measured FILE of repvgg-trt bench with --batch, --precision as "
            "asked for here",
        )
    fits = [choice for choice in choices if wish.is_met_by(choice)]
    fits.sort(key=lambda choice: (-choice.images_per_second, -choice.top1))
    return Advice(tuple(fits), tuple(choice for choice in choices if not wish.is_met_by(choice)))


def published_accuracy() -> tuple[tuple[VariantSpec, int, float], ...]:
    """Variant, image size and the highest top-1 published for it, in percent."""
    best: dict[tuple[str, int], float] = {}
    for card in load_cards():
        if card.variant in PUBLISHED:
            for entry in card.accuracy:
                key = (card.variant, entry.image_size)
                best[key] = max(entry.top1_percent, best.get(key, 0.0))
    return tuple((get_variant(name), size, top1) for (name, size), top1 in best.items())


def _measured_choices(file: Measured, wish: Wish) -> Iterable[Choice]:
    accuracy = {(variant.name, size): top1 for variant, size, top1 in published_accuracy()}
    for model in file.benchmark.models:
        size, precision = model.image_size[0], model.precision
        top1 = accuracy.get((model.variant or "", size))
        if top1 is None or not model.published or model.image_size != (size, size) or precision not in wish.precisions:
            continue
        variant = get_variant(model.variant or "")
        for point in model.points:
            # With several clients, what the others take is not the latency of one call.
            if point.way == "engine" and point.clients == 1 and point.batch in wish.batches:
                yield Choice(
                    variant.name, size, precision, point.batch, _expected_top1(top1, precision, wish),
                    point.latency.median_ms, point.images_per_second, "measured",
                    f"{file.name}, bfloat16" if "bfloat16" in point.backend else file.name,
                    _count_gmacs(_costs(variant, size, precision)), max(variant.groups) > 1,
                )  # fmt: skip


def _estimated_choices(wish: Wish, ceiling: Ceiling, assumptions: Assumptions) -> Iterable[Choice]:
    for variant, size, top1 in published_accuracy():
        for precision in wish.precisions:
            costs = _costs(variant, size, precision)
            for batch in wish.batches:
                latency_ms = estimate_ms(costs, ceiling, batch, assumptions)
                if latency_ms is not None:
                    yield Choice(
                        variant.name, size, precision, batch, _expected_top1(top1, precision, wish),
                        latency_ms, 1e3 * batch / latency_ms, "estimated", "",
                        _count_gmacs(costs), max(variant.groups) > 1,
                    )  # fmt: skip


def _expected_top1(published: float, precision: Precision, wish: Wish) -> float:
    """Percent: FP16 as FP32, INT8 less the drop that the wish expects."""
    return published - wish.int8_drop if precision == "int8" else published


def _costs(variant: VariantSpec, size: int, precision: Precision) -> tuple[LayerCost, ...]:
    return count_costs(variant, (size, size), lambda _: precision)


def _count_gmacs(costs: Sequence[LayerCost]) -> float:
    return sum(cost.macs for cost in costs) / 1e9


def estimate_ms(
    costs: Sequence[LayerCost], ceiling: Ceiling, batch: int, assumptions: Assumptions = FITTED
) -> float | None:
    """Milliseconds of one batch; None where the peak of a precision is not known.

    Args:
        costs: The layers.
        ceiling: The peaks of the device.
        batch: Images of the batch.
        assumptions: The constants.
    """
    total = 0.0
    for cost in costs:
        peak = ceiling.operations_per_second.get(cost.precision)
        if peak is None:
            return None
        computing = cost.count_operations(batch) / (peak * assumptions.efficiency[cost.precision])
        moving = cost.count_bytes(batch) / ceiling.bytes_per_second
        total += max(computing, moving) + 1e-6 * assumptions.overhead_us * cost.groups
    return 1e3 * total


@dataclass(frozen=True, slots=True)
class Nearest:
    """What comes nearest to a wish that nothing meets: of each variant, image size and precision the best batch size.

    Attributes:
        fast_enough: Those within the latency, the most accurate first; all where no latency is asked for.
        accurate_enough: Those with the accuracy, the fastest first; all where no accuracy is asked for.
        fastest: The fastest of all.
        most_accurate: The most accurate of all, the fastest first where several are.
    """

    fast_enough: tuple[Choice, ...]
    accurate_enough: tuple[Choice, ...]
    fastest: tuple[Choice, ...]
    most_accurate: tuple[Choice, ...]


def find_nearest(answer: Advice, wish: Wish, count: int = 3) -> Nearest:
    """Looks among what does not fit.

    Args:
        answer: From `advise`.
        wish: What was asked for.
        count: How many of each kind at most.
    """
    fast = [choice for choice in answer.others if wish.is_fast(choice)]
    accurate = [choice for choice in answer.others if wish.is_accurate(choice)]
    return Nearest(
        fast_enough=_best(fast, _by_accuracy, count),
        accurate_enough=_best(accurate, _by_latency, count),
        fastest=_best(answer.others, _by_latency, count),
        most_accurate=_best(answer.others, _by_accuracy, count),
    )


def _by_latency(choice: Choice) -> tuple[float, float]:
    return choice.latency_ms, -choice.top1


def _by_accuracy(choice: Choice) -> tuple[float, float]:
    return -choice.top1, choice.latency_ms


def _best(choices: Iterable[Choice], order: Callable[[Choice], tuple[float, float]], count: int) -> tuple[Choice, ...]:
    found: dict[tuple[str, int, str], Choice] = {}
    for choice in sorted(choices, key=order):
        found.setdefault((choice.variant, choice.image_size, choice.precision), choice)
    return tuple(found.values())[:count]


def choose_files(measured: Iterable[Measured], device: str) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """Files that were measured on a device, and sentences about the others.

    Args:
        measured: All files.
        device: Name of a CPU, or of a GPU as a person or the driver writes it.
    """
    kept, left_out = [], []
    for file in measured:
        found = file.benchmark.device.name
        if _canonical(found) == _canonical(device):
            kept.append(file)
        else:
            left_out.append(f"{file.name} is left out: it was measured on {found}, not on {device}")
    return tuple(kept), tuple(left_out)


def _canonical(device: str) -> str:
    gpu = look_up_gpu(device)
    return device if gpu is None else gpu.names[0]


def unused_models(measured: Sequence[Measured]) -> tuple[str, ...]:
    """Models of the files that no choice can come from, with the reason, in sentences."""
    accuracy = {(variant.name, size) for variant, size, _ in published_accuracy()}
    found = []
    for file in measured:
        for model in file.benchmark.models:
            size = "×".join(map(str, model.image_size))
            where = f"{file.name}: {model.file}"
            if model.variant is None or not model.published:
                found.append(f"{where} is left out: no published variant, so that its accuracy is not known")
            elif (model.variant, model.image_size[0]) not in accuracy or model.image_size[0] != model.image_size[1]:
                found.append(
                    f"{where} is left out: it was measured at {size} px, for which no accuracy of "
                    f"{model.variant} is published"
                )
            elif model.classes not in (None, get_variant(model.variant).num_classes):
                found.append(f"{where} counts as {model.variant} of 1,000 classes, although it has {model.classes}")
    return tuple(found)
