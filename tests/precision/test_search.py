from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.graph.edit import replace_weights
from repvgg_deploy.precision.equalize import EqualizeOptions
from repvgg_deploy.precision.int8 import Int8Options, quantize_graph
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.ranges import collect
from repvgg_deploy.precision.search import SearchOptions, choose_exponents
from tests.precision.compare import judge
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model

EXPONENTS = (0.0, 0.3, 0.5, 0.7, 1.0)
SMALL = SearchOptions(EXPONENTS, images=32, positions=1024)


def choose(model: onnx.ModelProto, batches: list[np.ndarray], options: SearchOptions = SMALL) -> dict[str, float]:
    network = read_network(model)
    return choose_exponents(network, batches, collect(network, batches), options)


def two_layers(spread: float, generator: np.random.Generator) -> onnx.ModelProto:
    """The first layer copies the image's colours into channels of different size; the second weighs them alike."""
    model = make_model(ChainOptions(widths=(12, 16), groups=(1, 1), outliers=0.0))
    copies = np.zeros((12, 3, 3, 3), np.float32)
    copies[np.arange(12), np.arange(12) % 3, 1, 1] = np.exp2(generator.uniform(-spread, spread, 12))
    signs = generator.choice(np.float32([-1.0, 1.0]), (16, 12, 3, 3))
    return replace_weights(
        model, {"stage0.weight": copies, "stage0.bias": np.zeros(12, np.float32), "stage1.weight": signs}
    )


@pytest.mark.parametrize("seed", range(4))
def test_choose_exponents_where_activations_differ_and_weights_do_not_makes_activations_alike(seed: int) -> None:
    """Pixels of 0 and 1: with channels alike every activation is exact, and in three colours the weights have room."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 2, (64, 3, 8, 8)).repeat(2, 2).repeat(2, 3).astype(np.float32)
    found = choose(
        two_layers(3.0, generator), np.split(pixels, 4), dataclasses.replace(SMALL, exponents=(0.0, 0.1, 0.9, 1.0))
    )
    assert found["stage0.conv"] >= 0.9, found


@pytest.mark.parametrize("kind", KINDS)
def test_choose_exponents_every_open_interface_gets_a_candidate_every_time_the_same(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 48)
    seen: list[tuple[int, int]] = []
    network = read_network(model)
    found = choose_exponents(
        network, batches, collect(network, batches), SMALL, progress=lambda done, total: seen.append((done, total))
    )
    open_ = [
        interface.source
        for interface in network.interfaces
        if interface.blocked_by is None and not set(interface.readers) <= set(network.gates)  # SE stays as it is
    ]
    assert sorted(found) == sorted(open_)
    assert set(found.values()) <= set(EXPONENTS)
    assert found == choose(model, batches)
    assert seen == [(index + 1, len(open_)) for index in range(len(open_))]
    assert set(choose(model, batches, dataclasses.replace(SMALL, exponents=(0.85,))).values()) == {0.85}


@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_choose_exponents_are_about_as_good_as_the_best_of_all(kind: str) -> None:
    """On other images, by the logits. In so narrow layers the candidates lie 2 to 5 dB apart; a small trial errs."""
    model, batches, others = (
        make_model(KINDS[kind]),
        make_batches(KINDS[kind], 128),
        make_batches(KINDS[kind], 128, seed=9),
    )
    options = Int8Options(target="trt8", search=SMALL)
    fixed = [dataclasses.replace(options, search=None, equalize=EqualizeOptions(exponent)) for exponent in EXPONENTS]
    ours, *each = (judge(model, quantize_graph(model, batches, one)[0], others).sqnr_db for one in (options, *fixed))
    assert ours > min(each), (ours, each)
    assert ours > max(each) - 3, (ours, each)


def test_choose_exponents_one_image_and_dead_channels_give_an_answer() -> None:
    model = make_model()
    dead = replace_weights(
        model, {"stage1.weight": np.zeros((16, 8, 3, 3), np.float32), "stage1.bias": np.zeros(16, np.float32)}
    )
    assert set(choose(dead, make_batches(count=1))) == {f"stage{index}.conv" for index in range(5)}


@pytest.mark.parametrize(
    "fields", [{"exponents": ()}, {"exponents": (1.2,)}, {"images": 0}, {"channels": 0}, {"positions": 3}], ids=str
)
def test_search_options_that_cannot_hold_are_refused(fields) -> None:
    with pytest.raises(CalibrationError, match="search"):
        SearchOptions(**fields)
