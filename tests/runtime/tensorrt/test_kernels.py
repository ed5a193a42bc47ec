"""Kernels that TensorRT-RTX compiles: shared by the contexts of an engine, and kept for the next process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fakes import tensorrt as fakes
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world
from tests.runtime.tensorrt.machines import batch_of

RTX = Setting(version="1.7.1.116", rtx=True)


def kept(world: World) -> list[Path]:
    folder = world.plan.parent / "cache" / "kernels"
    return sorted(folder.iterdir()) if folder.exists() else []


def run(world: World, *counts: int) -> list[tuple[int, ...]]:
    """The shapes that an Engine compiles for these batches, in two contexts, without those of CUDA graphs."""
    world.trt.seen.compiled.clear()
    with world.open(contexts=2, cuda_graphs=False) as engine:
        for count in counts:
            engine.warm_up((count, *engine.spec.input.shape[1:]))
            assert_answers(world, engine, batch_of(count))
    return list(world.trt.seen.compiled)


def test_contexts_share_one_cache_which_the_next_process_reads(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    assert [shape[0] for shape in run(world, 1, 4)] == [1, 4] and len(world.trt.seen.caches) == 1
    assert len(kept(world)) == 1
    next_process = make_world(tmp_path, monkeypatch, RTX)
    assert [shape[0] for shape in run(next_process, 4, 1, 7)] == [7]  # and what is new is added
    assert run(make_world(tmp_path, monkeypatch, RTX), 1, 4, 7) == []
    assert len(kept(world)) == 1 and world.cuda.leaks() == {}


def test_contexts_of_graphs_share_it_too(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    with world.open(contexts=2) as engine:
        engine.warm_up()
    assert sorted(shape[0] for shape in world.trt.seen.compiled) == [1, 2, 4, 8] and len(world.trt.seen.caches) == 1


def test_warm_up_keeps_what_it_compiled_before_the_engine_ends(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    with world.open() as engine:
        assert_answers(world, engine, batch_of(3))
        assert kept(world) == []
        engine.warm_up()
        assert len(kept(world)) == 1


@pytest.mark.parametrize("damage", [b"no kernels", b'["1.6.0", []]', b""], ids=["damaged", "another release", "empty"])
def test_kernels_that_cannot_be_used_are_replaced(tmp_path: Path, monkeypatch, damage: bytes) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    run(world, 1)
    [file] = kept(world)
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert [shape[0] for shape in run(make_world(tmp_path, monkeypatch, RTX), 1)] == [1]
    assert file.read_bytes() == whole


def test_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    (tmp_path / "cache").write_text("a file, not a folder")
    assert [shape[0] for shape in run(world, 2)] == [2]
    assert "compiled kernels are not kept" in caplog.text and world.cuda.leaks() == {}


def test_other_plans_and_releases_have_files_of_their_own_and_tensorrt_has_none(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, RTX)
    run(world, 1)
    for setting in (Setting(version="1.8.0.1", rtx=True), Setting(version="1.7.1.116", rtx=True, profile=(1, 2, 4))):
        assert len(run(make_world(tmp_path, monkeypatch, setting), 1)) == 1
    assert len(kept(world)) == 3
    assert run(make_world(tmp_path, monkeypatch, Setting()), 1) == [] and len(kept(world)) == 3


def test_fakes_have_the_names_of_the_real_classes() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    import tensorrt_rtx as trt

    for fake, real in ((fakes._RuntimeConfig, trt.IRuntimeConfig), (fakes.RuntimeCache, trt.IRuntimeCache)):
        names = {name for name in vars(fake) if not name.startswith("_")}
        assert names and all(hasattr(real, name) for name in names)
