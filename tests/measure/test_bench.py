"""Whole benchmarks of small models: on the CPU, beside others, and of plans on the fake GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import pytest

from repvgg_deploy.errors import InputError, MissingDependencyError, ModelError
from repvgg_deploy.measure.bench import BenchRequest, count_steps, run_benchmark
from repvgg_deploy.measure.roofline import Ceiling, bound_layers, count_costs, total_floor_ms
from repvgg_deploy.measure.times import Pace
from repvgg_deploy.specs.values import BuildConfig, VariantSpec
from tests.precision.make_chain import metadata_of
from tests.precision.make_variant import SMALL_G4, make_variant
from tests.runtime.gpu_world import Setting, make_world, write_passport
from tests.runtime.make_model import ModelOptions, make_onnx, tiny_variant, write_bound

QUICK = Pace(duration_s=0.02, warm_up_s=0.0)


def write_model(path: Path, *, seed: int = 0) -> Path:
    """A classifier of a small architecture with groups, as repvgg-export writes it, without torch."""
    graph = make_variant(SMALL_G4, size=32, seed=seed)
    metadata = metadata_of(graph)
    spec = dataclasses.replace(
        metadata.spec, kind="logits", input=dataclasses.replace(metadata.spec.input, layout="NCHW")
    )
    del graph.metadata_props[:]
    return write_bound(path, graph.SerializeToString(), dataclasses.replace(metadata, spec=spec, variant=SMALL_G4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.onnx")


def request(*models: Path, **changes) -> BenchRequest:
    return BenchRequest(models, **{"batches": (1, 3), "pace": QUICK, "peak_s": 0.0, **changes})


def test_model_is_measured_at_every_batch_and_bound_to_its_file(model: Path) -> None:
    told: list[str] = []
    found = run_benchmark(request(model), progress=told.append)
    result = found.models[0]
    assert (result.file, result.sha256) == ("small.onnx", hashlib.sha256(model.read_bytes()).hexdigest())
    assert (result.precision, result.image_size, result.published) == ("fp32", (32, 32), False)
    assert [(point.way, point.batch, point.clients) for point in result.points] == [("engine", 1, 1), ("engine", 3, 1)]
    for point in result.points:
        assert 0 < point.latency.min_ms <= point.latency.median_ms <= point.latency.p99_ms <= point.latency.max_ms
        assert point.phases is None and point.share is None
        # Calls follow one another, so their mean and the throughput say the same, the loop's own time apart.
        assert point.images_per_second <= 1e3 * point.batch / point.latency.mean_ms * (1 + 1e-9)
    assert found.device.kind == "cpu" and found.ceiling is None and {"numpy", "onnxruntime"} <= set(found.versions)
    assert set(told) == {"small.onnx, engine, batch 1", "small.onnx, engine, batch 3"}
    assert len(told) <= count_steps(request(model))


def test_share_is_the_rooflines_least_time_by_the_median(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = Ceiling("cpu", {"fp32": 1e11, "fp16": 1e11, "int8": 4e11}, 1e10, "made", measured=True)
    monkeypatch.setattr("repvgg_deploy.measure.bench.measure_cpu", lambda **_: ceiling)
    found = run_benchmark(request(model, peak_s=0.01, cpu_threads=1))
    assert found.ceiling == ceiling and found.device.cpu_threads == 1
    variant = found.models[0]
    for point in variant.points:
        bounds = bound_layers(variant.layers, found.ceiling, point.batch)
        assert bounds is not None and point.floor_ms == pytest.approx(total_floor_ms(bounds))
        assert point.share == pytest.approx(point.floor_ms / point.latency.median_ms)


@pytest.mark.parametrize(
    ("clients", "cpu_threads", "expected"),
    [(1, None, None), (3, None, None), (1, 1, 1), (2, 1, 2), (9, 1, 4), (2, 3, 4), (2, 6, 6)],
)
def test_peak_is_that_of_all_threads_that_compute_at_once(
    model: Path, clients: int, cpu_threads: int | None, expected, monkeypatch
) -> None:
    """Of one client's threads alone, several clients at once would exceed it."""
    asked = []
    monkeypatch.setattr("repvgg_deploy.measure.bench.count_cores", lambda: 4)
    monkeypatch.setattr("repvgg_deploy.measure.bench.measure_cpu", lambda *, threads, **_: asked.append(threads))
    run_benchmark(
        request(model, batches=(1,), peak_s=0.01, cpu_threads=cpu_threads, pace=Pace(0.01, 0.0, clients=clients))
    )
    assert asked == [expected, expected]


def test_peaks_before_and_after_that_differ_are_told(model: Path, monkeypatch, caplog) -> None:
    ceilings = [
        Ceiling("cpu", {"fp32": rate, "fp16": rate, "int8": rate}, 1e10, "made", measured=True) for rate in (1e11, 2e11)
    ]
    monkeypatch.setattr("repvgg_deploy.measure.bench.measure_cpu", lambda **_: ceilings.pop(0))
    found = run_benchmark(request(model, peak_s=0.01))
    assert found.ceiling is not None and found.ceiling.operations_per_second["fp32"] == 2e11
    assert "100 and 200 Gop/s in fp32 before and after" in caplog.text


def test_rivals_run_beside_the_engine_and_torch_once_for_each_architecture(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    other = write_model(tmp_path / "other.onnx", seed=1)
    found = run_benchmark(request(model, other, batches=(2,), compare=("onnxruntime", "torch")))
    ways = [[point.way for point in result.points] for result in found.models]
    assert ways == [["engine", "onnxruntime", "torch"], ["engine", "onnxruntime"]]
    assert "PyTorch" in found.models[0].points[2].backend and "as it stands" in found.models[0].points[1].backend


def test_missing_rival_is_said_before_anything_is_measured(model: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    told: list[str] = []
    with pytest.raises(MissingDependencyError, match="needs PyTorch"):
        run_benchmark(request(model, compare=("torch",)), progress=told.append)
    assert told == []


def test_clients_share_one_engine(model: Path) -> None:
    found = run_benchmark(request(model, batches=(1,), pace=Pace(0.05, 0.0, clients=3)))
    point = found.models[0].points[0]
    assert (point.clients, found.clients) == (3, 3)


@pytest.mark.parametrize(
    "options",
    [ModelOptions(uint8=True), ModelOptions(batch=2), ModelOptions(kind="top5"), ModelOptions(kind="features")],
    ids=str,
)
def test_every_kind_of_model_can_be_measured(tmp_path: Path, options: ModelOptions) -> None:
    found = run_benchmark(request(make_onnx(tmp_path / "m.onnx", options)))
    result = found.models[0]
    names = [layer.name for layer in result.layers]
    assert len(result.points) == 2 and names[0] == "stage0"
    assert ("linear" in names) == (options.kind != "features")
    expected = count_costs(
        tiny_variant(), (16, 16), lambda _: "fp32", input_dtype="uint8" if options.uint8 else "float32"
    )
    assert result.layers[0] == expected[0]


def test_module_of_the_users_own_has_no_roofline_and_no_torch(tmp_path: Path) -> None:
    found = run_benchmark(request(make_onnx(tmp_path / "m.onnx", ModelOptions(kind="module")), compare=("torch",)))
    result = found.models[0]
    assert result.variant is None and result.layers == () and {point.way for point in result.points} == {"engine"}
    assert any("not compared with torch" in note for note in result.notes) and any(
        "no roofline" in note for note in result.notes
    )


def test_model_of_any_image_size_needs_one(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(size=("height", "width"), preprocessing=False))
    with pytest.raises(InputError, match="which is usual is not known") as caught:
        run_benchmark(request(path))
    assert "--image-size" in caught.value.remedy
    assert run_benchmark(request(path, image_size=(24, 16))).models[0].image_size == (24, 16)


def test_gpu_for_models_on_the_cpu_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="the models run on the CPU"):
        run_benchmark(request(model, gpu="t4"))


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        run_benchmark(request(tmp_path / "none.onnx"))


def test_plan_has_phases_and_the_peaks_of_the_gpu_that_is_named(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 2, 4)))
    write_passport(world.plan, world.onnx, tensorrt_version="10.16.1.11", variant=tiny_variant(), precision="fp16")
    found = run_benchmark(request(world.plan, batches=(1, 4, 6), gpu="t4"))
    result = found.models[0]
    assert (found.device.kind, found.device.name, found.device.driver) == ("gpu", "Fake GPU 0", "580.95.05")
    assert found.ceiling is not None and (found.ceiling.device, found.ceiling.measured) == ("T4", False)
    assert (result.variant, result.precision, result.classes) == ("tiny", "fp16", 7)
    one, four, six = result.points
    assert one.phases is not None and four.phases is not None and six.phases is None
    assert any("batch 6 runs in pieces of 4, the largest of the plan" in note for note in result.notes)
    assert one.floor_ms is not None and one.share == pytest.approx(one.floor_ms / one.phases.compute_ms)
    assert six.floor_ms is not None and six.share == pytest.approx(six.floor_ms / six.latency.median_ms)
    assert world.cuda.leaks() == {}


def test_fp32_plan_in_tf32_is_judged_by_the_tensor_cores(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    for tf32, peak in ((False, 31.2e12), (True, 62.5e12)):
        config = BuildConfig("fp32", tf32=tf32)
        write_passport(
            world.plan,
            world.onnx,
            tensorrt_version="10.16.1.11",
            variant=tiny_variant(),
            precision="not_inspected",
            config=config,
        )
        found = run_benchmark(request(world.plan, batches=(1,), gpu="a10"))
        assert found.ceiling is not None and found.ceiling.operations_per_second["fp32"] == peak
        assert found.models[0].precision == "fp32"


def test_onnx_batch_above_what_an_engine_runs_at_once_is_noted(tmp_path: Path) -> None:
    found = run_benchmark(request(make_onnx(tmp_path / "m.onnx"), batches=(64, 65)))
    assert [note for note in found.models[0].notes if "pieces" in note] == [
        "batch 65 runs in pieces of 64, the largest that an Engine runs at once"
    ]


def test_plan_of_an_unknown_gpu_or_without_passport_has_no_roofline(tmp_path: Path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    found = run_benchmark(request(world.plan, batches=(2,), compare=("onnxruntime",)))
    assert "the peaks of Fake GPU 0 are not in the table" in caplog.text
    result = found.models[0]
    assert result.precision is None and result.points[0].share is None and result.points[0].phases is not None
    assert any("it does not run plans" in note for note in result.notes) and any(
        "no roofline" in note for note in result.notes
    )


def test_models_of_two_devices_are_no_one_table(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="run on cpu and cuda, expected one device"):
        run_benchmark(request(world.plan, world.onnx))


def test_plan_tells_the_architecture_that_its_passport_holds(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    variant: VariantSpec = dataclasses.replace(tiny_variant(), name="mine")
    write_passport(world.plan, world.onnx, tensorrt_version="10.16.1.11", variant=variant)
    with world.open() as engine:
        assert engine.metadata.variant == variant
