"""The cache of plans: content-keyed, whole or absent, shared by processes."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build.cache import PlanCache, plan_key
from repvgg_deploy.build.source import read_source
from repvgg_deploy.files.cache import cache_folder
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import BuildConfig, PlanPassport
from tests.build.make_typed import A10, make_request, make_typed
from tests.files.make_passport import make_passport

KEY, OTHER = "a" * 64, "b" * 64


def entry(content: bytes = b"ftrt plan") -> tuple[bytes, PlanPassport]:
    return content, make_passport(plan_sha256=hashlib.sha256(content).hexdigest())


def test_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("REPVGG_DEPLOY_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "repvgg-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")  # its standard: a relative path is ignored
    assert cache_folder() == tmp_path / ".cache" / "repvgg-deploy"
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("REPVGG_DEPLOY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "repvgg-deploy"


def test_plan_is_found_as_it_was_stored(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    plan, passport = entry()
    assert cache.find(KEY) is None
    cache.store(KEY, plan, passport)
    assert cache.find(KEY) == (b"ftrt plan", passport)
    assert cache.find(OTHER) is None and cache.find(None) is None
    assert [path.name for path in (tmp_path / "cache" / "plans").iterdir()] == [KEY]


@pytest.mark.parametrize("damage", ["plan", "no plan", "passport", "no passport", "not text"])
def test_damaged_entry_is_removed_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(tmp_path / "cache")
    cache.store(KEY, *entry())
    folder = tmp_path / "cache" / "plans" / KEY
    if damage == "plan":
        (folder / "plan").write_bytes(b"ftrt plam")
    elif damage == "passport":
        (folder / "passport.json").write_text("{}")
    elif damage == "not text":
        (folder / "passport.json").write_bytes(b"\xff")
    else:
        (folder / {"no plan": "plan", "no passport": "passport.json"}[damage]).unlink()
    assert cache.find(KEY) is None and not folder.exists()
    assert damage.startswith("no p") or "cached plan" in caplog.text
    cache.store(KEY, *entry())
    assert cache.find(KEY) is not None


@pytest.mark.parametrize("whole", [False, True])
def test_entry_that_another_process_removes_while_it_is_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole: bool
) -> None:
    cache = PlanCache(tmp_path / "cache")
    cache.store(KEY, *entry())
    folder, real = tmp_path / "cache" / "plans" / KEY, codec.loads

    def remove(kind: type[PlanPassport], text: str) -> PlanPassport:
        shutil.rmtree(folder) if whole else (folder / "plan").unlink()
        return real(kind, text)

    monkeypatch.setattr(codec, "loads", remove)
    assert cache.find(KEY) is None and not folder.exists()
    assert caplog.text == ""  # nothing is wrong


def test_plan_that_was_found_stays_whole_when_its_entry_goes(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache", limit_bytes=10)
    cache.store(KEY, *entry())
    found = cache.find(KEY)
    cache.store(OTHER, *entry(b"ftrt a larger plan"))  # makes room
    assert not (tmp_path / "cache" / "plans" / KEY).exists()
    assert found is not None and found[0] == b"ftrt plan"


def test_cache_that_is_deleted_while_it_is_tidied_costs_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def vanish(self: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "iterdir", vanish)
    PlanCache(tmp_path / "cache").store(KEY, *entry())
    assert "No such file or directory" in caplog.text


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700)])
def test_users_who_share_the_folder_share_the_plans(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        cache = PlanCache(tmp_path / "cache")
        cache.store(KEY, *entry())
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "plans" / KEY
    files = [folder / "plan", folder / "passport.json"]
    assert folder.stat().st_mode & 0o777 == mode
    assert {path.stat().st_mode & 0o777 for path in files} == {mode & 0o666}


def test_what_was_abandoned_counts_no_more_once_it_is_gone(tmp_path: Path) -> None:
    plans = tmp_path / "cache" / "plans"
    partial = plans / ".partial-old"
    partial.mkdir(parents=True)
    (partial / "plan").write_bytes(b"x" * 50_000)
    os.utime(partial, (1, 1))
    cache = PlanCache(tmp_path / "cache", limit_bytes=50_000)
    cache.store(KEY, *entry())
    assert not partial.exists()
    partial.mkdir()
    (partial / "plan").write_bytes(b"x" * 50_000)
    os.utime(partial, (1, 1))
    cache.store(OTHER, *entry(b"2"))
    assert cache.find(KEY) is not None and cache.find(OTHER) is not None


def test_entry_whose_time_may_not_be_set_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on a disk that is only read, or of another user."""
    cache = PlanCache(tmp_path / "cache")
    cache.store(KEY, *entry())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.find(KEY) is not None and cache.find(KEY) is not None


def test_least_recently_used_plans_make_room(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache", limit_bytes=3 * 22_500)
    for index, key in enumerate("abc"):
        cache.store(key * 64, *entry(bytes([index]) * 20_000))
        os.utime(tmp_path / "cache" / "plans" / (key * 64), (index, index))
    assert cache.find("a" * 64) is not None  # used again: now b was not used for longest
    cache.store("d" * 64, *entry(b"d" * 20_000))
    assert cache.find("b" * 64) is None
    assert all(cache.find(key * 64) for key in "acd")


def test_plan_larger_than_the_limit_is_kept_alone(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache", limit_bytes=10)
    cache.store(KEY, *entry(b"1" * 100))
    cache.store(OTHER, *entry(b"2" * 100))
    assert cache.find(KEY) is None and cache.find(OTHER) is not None


def test_many_that_store_the_same_plan_leave_one_whole_entry(tmp_path: Path) -> None:
    cache, barrier, found = PlanCache(tmp_path / "cache"), threading.Barrier(8), []
    plan, passport = entry(b"x" * 100_000)

    def work() -> None:
        barrier.wait(300)
        cache.store(KEY, plan, passport)
        found.append(cache.find(KEY))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(found) == 8 and all(item is not None and item[1] == passport for item in found)
    assert [path.name for path in (tmp_path / "cache" / "plans").iterdir()] == [KEY]


def test_cache_that_cannot_be_written_costs_no_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    cache = PlanCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        cache.store(KEY, *entry())
    assert cache.find(KEY) is None and "the plan was not put into the cache" in caplog.text


def test_cache_without_a_folder_keeps_nothing() -> None:
    cache = PlanCache(None)
    cache.store(KEY, *entry())
    assert cache.find(KEY) is None


def test_key_changes_with_every_part(tmp_path: Path) -> None:
    base = make_request(Library("tensorrt", None, "10.9.0.34"), make_typed(tmp_path, "fp16"), gpu=A10)
    calibrated = replace(base, quantize=QuantizeOptions("int8", "statistics"))
    others = (
        replace(base, source=read_source(make_typed(tmp_path, "fp32"))),
        replace(base, config=BuildConfig(sparse=True)),
        replace(base, library=Library("tensorrt", None, "10.9.0.35")),
        replace(base, gpu=replace(A10, driver_version="600.1")),
        replace(base, gpu=None),
        replace(base, targets=("8.6",)),
        replace(base, tactic_libraries={"CUDNN": None}),
        calibrated,
        replace(calibrated, quantize=QuantizeOptions("int8", "statistics", min_agreement=0.5)),
    )
    assert plan_key(base) == plan_key(replace(base, timing_cache=tmp_path))  # timings are no part of a plan
    assert len({plan_key(request) for request in (base, *others)}) == 1 + len(others)


def test_key_of_a_graph_to_be_calibrated_tells_images_and_scales_apart(tmp_path: Path) -> None:
    library, model = Library("tensorrt", None, "10.9.0.34"), make_typed(tmp_path, "fp32")
    images, scales = tmp_path / "i.npz", tmp_path / "s.json"

    def key(**options: Any) -> str | None:
        quantize = QuantizeOptions("int8", **{"calibration": images, "scales": scales, **options})
        return plan_key(make_request(library, model, quantize=quantize))

    assert key() is None  # there are none: quantize says so
    images.write_bytes(b"1")
    scales.write_text("1")
    first = key()
    images.write_bytes(b"2")
    second = key()
    scales.write_text("2")
    assert len({first, second, key()} - {None}) == 3 and key() == key()
    assert key(save_scales=tmp_path / "new.json") is None  # that file is to be written, too
    assert key(calibration=None) is None  # none are beside the model
