"""What comes nearest to a wish that nothing meets. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .advise import Advice, Choice, Wish


@dataclass(frozen=True, slots=True)
class Nearest:
    """What comes nearest: of each variant, image size and precision the best batch size.

    Attributes:
        fast_enough: Within the latency, the most accurate first; of all where no latency is asked for.
        accurate_enough: With the accuracy, the fastest first; of all where no accuracy is asked for.
        fastest: Of all.
        most_accurate: Of all, the fastest first where several are.
    """

    fast_enough: tuple[Choice, ...]
    accurate_enough: tuple[Choice, ...]
    fastest: tuple[Choice, ...]
    most_accurate: tuple[Choice, ...]


def find_nearest(answer: Advice, wish: Wish, count: int = 3) -> Nearest:
    """Looks among what does not fit.

    Args:
        answer: Of `advise`.
        wish: What was asked for.
        count: Of each kind at most.
    """
    fast = [choice for choice in answer.others if wish.slo_ms is None or choice.latency_ms <= wish.slo_ms]
    accurate = [choice for choice in answer.others if wish.min_top1 is None or choice.top1 >= wish.min_top1]
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
