"""Estimates against published times, and the choice of variant, batch size and precision."""

from __future__ import annotations

import dataclasses

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.measure.advice import (
    FITTED,
    PUBLISHED_V100_MS,
    Assumptions,
    Choice,
    Measured,
    Wish,
    advise,
    choose_files,
    estimate_ms,
    find_nearest,
    published_accuracy,
    unused_models,
)
from repvgg_deploy.measure.peaks import find_gpu_peaks
from repvgg_deploy.measure.roofline import count_costs
from repvgg_deploy.specs.values import Precision
from repvgg_deploy.specs.variants import get_variant
from tests.measure.make_benchmark import make_benchmark, make_model, make_point

V100, T4 = (find_gpu_peaks(name).ceiling() for name in ("v100", "t4"))


def estimate(
    name: str, batch: int, precision: Precision = "fp32", ceiling=V100, assumptions: Assumptions = FITTED
) -> float:
    found = estimate_ms(count_costs(get_variant(name), (224, 224), lambda _: precision), ceiling, batch, assumptions)
    assert found is not None
    return found


@pytest.mark.parametrize("name", PUBLISHED_V100_MS)
def test_estimate_is_near_the_published_time(name: str) -> None:
    # B3's published times are hardly longer than B2's, which has two thirds of its work; the others were what the
    # constants were fitted to.
    tolerance = 0.5 if name == "B3" else 0.17
    for batch, published in zip((1, 8), PUBLISHED_V100_MS[name], strict=True):
        assert estimate(name, batch) == pytest.approx(published, rel=tolerance)


def test_grouped_variant_loses_at_batch_one_and_wins_at_batch_eight() -> None:
    for plain, grouped in (("B1", "B1g4"), ("B2", "B2g4")):
        assert estimate(grouped, 1) > estimate(plain, 1)
        assert estimate(grouped, 8) < estimate(plain, 8)


def test_estimate_follows_its_constants() -> None:
    free = Assumptions({"fp32": 1.0}, 0.0)
    assert estimate("B1", 128, assumptions=free) == pytest.approx(2 * 11.8154e9 * 128 / 15.7e12 * 1e3, rel=0.01)
    assert estimate("A0", 1, assumptions=Assumptions({"fp32": 1.0}, 100.0)) - estimate(
        "A0", 1, assumptions=free
    ) == pytest.approx(23 * 0.1)
    assert estimate("B1", 128, assumptions=Assumptions({"fp32": 0.5}, 0.0)) == pytest.approx(
        2 * estimate("B1", 128, assumptions=free), rel=0.01
    )
    assert (
        estimate_ms(count_costs(get_variant("A0"), (224, 224), lambda _: "int8"), V100, 1) is None
    )  # no INT8 tensor cores


def test_published_accuracy_is_that_of_the_cards() -> None:
    found = {(variant.name, size): top1 for variant, size, top1 in published_accuracy()}
    assert found["A0", 224] == 72.41 and found["B2g4", 224] == 79.38
    assert (found["D2se", 224], found["D2se", 320], found["RepVGGplus-L2pse", 320]) == (81.82, 83.55, 84.06)
    assert not any(name in ("sample", "B2g2", "B3g2") for name, _ in found)


def test_what_fits_meets_the_wish_and_is_ordered_by_throughput() -> None:
    wish = Wish(slo_ms=10, min_top1=77)
    answer = advise(wish, ceiling=T4, measured=())
    assert answer.fitting
    assert all(
        choice.latency_ms <= 10 and choice.top1 >= 77 and choice.origin == "estimated" for choice in answer.fitting
    )
    rates = [choice.images_per_second for choice in answer.fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(choice.latency_ms > 10 or choice.top1 < 77 for choice in answer.others)
    # Every published variant and size, three precisions, four batch sizes.
    assert len(answer.fitting) + len(answer.others) == len(published_accuracy()) * 3 * 4
    assert {choice.batch for choice in answer.others} == {1, 8, 32, 128}


def test_int8_loses_what_the_wish_says() -> None:
    def accuracies(drop: float) -> dict[str, float]:
        answer = advise(Wish(min_top1=0, batches=(1,), int8_drop=drop), ceiling=T4, measured=())
        return {choice.precision: choice.top1 for choice in answer.fitting if choice.variant == "B1"}

    assert accuracies(1.5) == {"fp32": 78.37, "fp16": 78.37, "int8": pytest.approx(76.87)}
    assert accuracies(0) == dict.fromkeys(("fp32", "fp16", "int8"), 78.37)


def test_measurement_takes_the_place_of_its_estimate_and_of_no_other() -> None:
    file = Measured("b1.json", make_benchmark(make_model("B1", "fp16", (make_point(8, 3.5), make_point(64, 20.0)))))
    answer = advise(Wish(min_top1=0), ceiling=T4, measured=[file])
    rows = {choice.batch: choice for choice in answer.fitting if (choice.variant, choice.precision) == ("B1", "fp16")}
    assert {batch: choice.origin for batch, choice in rows.items()} == {
        1: "estimated",
        8: "measured",
        32: "estimated",
        128: "estimated",
    }
    assert (rows[8].latency_ms, rows[8].images_per_second, rows[8].detail) == (
        3.5,
        pytest.approx(8 / 0.0035),
        "b1.json",
    )
    assert all(choice.origin == "estimated" for choice in answer.fitting if choice.variant != "B1")


def test_points_of_several_clients_and_of_others_are_no_latency_of_the_engine() -> None:
    shared, rival = (
        dataclasses.replace(make_point(1, 9.0), clients=4),
        dataclasses.replace(make_point(8, 9.0), way="torch"),
    )
    file = Measured("b1.json", make_benchmark(make_model("B1", "fp32", (shared, rival))))
    with pytest.raises(InputError, match="nothing to choose from"):
        advise(Wish(min_top1=0), ceiling=None, measured=[file])


def test_measurements_alone_are_enough() -> None:
    file = Measured("a0.json", make_benchmark(make_model("A0"), ceiling=None))
    answer = advise(Wish(slo_ms=1.5), ceiling=None, measured=[file])
    assert [(choice.batch, choice.origin) for choice in answer.fitting] == [(1, "measured")]
    assert [(choice.batch, choice.latency_ms) for choice in answer.others] == [(8, 2.0)]


def test_files_of_another_device_are_left_out_by_name() -> None:
    files = [
        Measured("t4.json", make_benchmark(device="Tesla T4")),
        Measured("a10.json", make_benchmark(device="NVIDIA A10")),
    ]
    kept, left_out = choose_files(files, "t4")
    assert [file.name for file in kept] == ["t4.json"]
    assert left_out == ("a10.json is left out: it was measured on NVIDIA A10, not on t4",)
    assert choose_files(files, "cpu, 2 cores")[0] == ()


def test_models_without_published_accuracy_are_named() -> None:
    models = (
        make_model("A0", size=128),
        make_model("A0", published=False),
        dataclasses.replace(make_model("A1"), classes=10),
        make_model("B2g2"),
    )
    said = unused_models([Measured("x.json", make_benchmark(*models))])
    assert len(said) == 4
    for text, words in zip(
        said, ("128×128 px", "no published variant", "although it has 10", "no accuracy of B2g2"), strict=True
    ):
        assert words in text


def test_nearest_are_the_most_accurate_in_time_and_the_fastest_accurate_ones() -> None:
    wish = Wish(slo_ms=1.6, min_top1=83)
    answer = advise(wish, ceiling=T4, measured=())
    assert answer.fitting == ()
    nearest = find_nearest(answer, wish)
    fast, accurate = nearest.fast_enough, nearest.accurate_enough
    assert len(fast) == len(accurate) == 3
    assert all(choice.latency_ms <= 1.6 for choice in fast) and all(choice.top1 >= 83 for choice in accurate)
    assert fast[0].top1 == max(choice.top1 for choice in answer.others if choice.latency_ms <= 1.6)
    assert accurate[0].latency_ms == min(choice.latency_ms for choice in answer.others if choice.top1 >= 83)
    assert isinstance(accurate[0], Choice)


def test_nearest_to_what_is_out_of_reach_are_the_fastest_and_the_most_accurate_of_all() -> None:
    wish = Wish(slo_ms=0.01, min_top1=99)
    answer = advise(wish, ceiling=T4, measured=())
    nearest = find_nearest(answer, wish, count=5)
    assert nearest.fast_enough == nearest.accurate_enough == ()
    assert nearest.fastest[0].latency_ms == min(choice.latency_ms for choice in answer.others)
    assert nearest.most_accurate[0].top1 == max(choice.top1 for choice in answer.others)
    for choices in (nearest.fastest, nearest.most_accurate):
        assert (
            len({(choice.variant, choice.image_size, choice.precision) for choice in choices}) == 5
        )  # no batch sizes of the same in their place
    latencies = [choice.latency_ms for choice in nearest.fastest]
    assert latencies == sorted(latencies)


@pytest.mark.parametrize("wish", [Wish(slo_ms=0.01), Wish(min_top1=99)])
def test_nearest_of_one_wish_are_those_that_come_nearest_to_it(wish: Wish) -> None:
    nearest = find_nearest(advise(wish, ceiling=T4, measured=()), wish)
    kept, missed = (
        (nearest.accurate_enough, nearest.fast_enough)
        if wish.min_top1 is None
        else (nearest.fast_enough, nearest.accurate_enough)
    )
    assert missed == ()
    assert kept == (nearest.fastest if wish.min_top1 is None else nearest.most_accurate)
