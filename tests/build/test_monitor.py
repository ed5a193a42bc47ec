"""Progress and interruption of a build."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg_deploy.build.compile import _compile, compile_plan
from repvgg_deploy.build.monitor import BuildState, PhaseTree, run_cancellable
from repvgg_deploy.build.options import BuildRequest
from repvgg_deploy.build.source import read_source
from repvgg_deploy.errors import BuildError
from repvgg_deploy.files.plan_place import Library
from tests.build.fake_trt import FakeTrt, Faults
from tests.build.make_typed import A10, make_request, make_typed


def request(version: str, path: Path, faults: Faults) -> BuildRequest:
    source = read_source(path)
    return make_request(Library("tensorrt", FakeTrt(version, path, source.spec, faults), version), source, gpu=A10)


def test_share_counts_a_phase_as_part_of_its_parents_step() -> None:
    tree, shares = PhaseTree(), []
    tree.start("build", None, 2)
    shares.append(tree.share())
    tree.start("tactics", "build", 4)
    for step in range(4):
        tree.step("tactics", step)
        shares.append(tree.share())
    tree.finish("tactics")
    tree.step("build", 0)
    shares.append(tree.share())
    tree.step("build", 1)
    shares.append(tree.share())
    assert shares == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 1.0]


def test_share_never_falls_and_survives_what_tensorrt_should_not_say() -> None:
    tree = PhaseTree()
    tree.step("unknown", 3)
    tree.finish("unknown")
    tree.start("a", None, 0)
    tree.step("a", 7)
    assert tree.share() == 1.0
    tree.start("a", "a", 2)  # its own parent
    tree.start("b", None, 2)
    assert tree.share() == 1.0


_NAMES = st.sampled_from(["a", "b", "c", "d"])
_EVENTS = st.one_of(
    st.tuples(st.just("start"), _NAMES, st.one_of(st.none(), _NAMES), st.integers(-1, 5)),
    st.tuples(st.just("step"), _NAMES, st.integers(0, 9)),
    st.tuples(st.just("finish"), _NAMES),
)


@given(st.lists(_EVENTS, max_size=40))
def test_share_stays_between_0_and_1_and_never_falls_whatever_is_announced(events: list[tuple[Any, ...]]) -> None:
    tree, last = PhaseTree(), 0.0
    for kind, *values in events:
        getattr(tree, kind)(*values)
        assert last <= tree.share() <= 1.0
        last = tree.share()


@pytest.mark.parametrize("version", ["10.9.0.34", "8.6.1"])
def test_interruption_waits_for_tensorrt_and_is_raised(tmp_path: Path, version: str) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    def during() -> None:
        entered.set()
        assert cancelled.wait(300)

    def report(_: float) -> None:
        if entered.is_set():
            threading.Timer(0.01, cancelled.set).start()  # TensorRT goes on until its next step
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_plan(request(version, make_typed(tmp_path, "fp32"), Faults(during=during)), report=report)
    assert cancelled.is_set() and not [thread for thread in threading.enumerate() if thread.name == "repvgg-build"]


class Stoppable:
    """Work that ends some time after it was told to, as TensorRT's does at its next step."""

    def __init__(self) -> None:
        self.state, self.entered, self.ended = BuildState(), threading.Event(), threading.Event()

    def work(self) -> None:
        self.entered.set()
        assert self.state.cancelled.wait(300)
        time.sleep(0.2)
        self.ended.set()

    def run(self) -> None:
        trt = SimpleNamespace(IProgressMonitor=None)
        run_cancellable(Library("tensorrt", trt, "10.9.0.34"), self.work, self.state, poll=lambda: None)


def test_signal_in_the_midst_of_waiting_waits_for_tensorrt_too() -> None:
    """Not from `report`, which runs between two waits: a real signal nearly always meets the wait itself."""
    build = Stoppable()

    def interrupt() -> None:
        assert build.entered.wait(300)
        time.sleep(0.2)  # by now the main thread waits
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        build.run()
    assert build.ended.is_set()
    sender.join()


def test_signal_while_the_thread_starts_waits_for_what_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    build, start = Stoppable(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "repvgg-build":
            assert build.entered.wait(300)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.run()
    assert build.ended.is_set()


def test_signal_before_the_thread_begins_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    build, late = Stoppable(), []

    def interrupted(thread: threading.Thread) -> None:
        late.append(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        build.run()
    late[0].start()
    late[0].join()
    assert not build.entered.is_set()


def test_cancelled_build_stops_at_the_next_step(tmp_path: Path) -> None:
    state = BuildState()
    state.cancelled.set()
    with pytest.raises(BuildError, match="was stopped"):
        _compile(request("10.9.0.34", make_typed(tmp_path, "fp32"), Faults()), state)


def test_error_of_the_worker_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise BuildError("no", remedy="none at all")

    with pytest.raises(BuildError, match="no"):
        run_cancellable(Library("tensorrt", None, "8.6.1"), fail, BuildState(), poll=lambda: None)
