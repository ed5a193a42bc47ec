"""How far a build is, and how it is stopped: TensorRT's IProgressMonitor (from 10 on), and a thread to wait for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..files.plan_place import Library

logger = logging.getLogger(__name__)
T = TypeVar("T")
_WAIT_SECONDS = 0.05


class PhaseTree:
    """Phases inside phases, as TensorRT announces them, and what share of the whole is done.

    A phase runs during one step of its parent; it is counted as that step's part.
    """

    def __init__(self) -> None:
        self._steps: dict[str, tuple[str | None, int, int]] = {}  # by name: parent, steps, steps done
        self._highest = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._steps[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, index: int) -> None:
        """Step `index` of a phase, counted from 0, is done."""
        if name in self._steps:
            parent, steps, _ = self._steps[name]
            self._steps[name] = (parent, steps, min(index + 1, steps))

    def finish(self, name: str) -> None:
        """A phase ends."""
        if name not in self._steps:
            return
        parent, steps, _ = self._steps.pop(name)
        if parent is None:
            self._steps[name] = (None, steps, steps)  # stays, as done, though TensorRT does not tell its last step

    def share(self) -> float:
        """What is done of the outermost phase, 0 to 1; it never falls."""
        outermost = [name for name, (parent, _, _) in self._steps.items() if parent is None]
        self._highest = max(self._highest, max((self._share(name, 0) for name in outermost), default=0.0))
        return min(self._highest, 1.0)

    def _share(self, name: str, depth: int) -> float:
        _, steps, done = self._steps[name]
        inner = [child for child, (parent, _, _) in self._steps.items() if parent == name and child != name]
        part = (
            max((self._share(child, depth + 1) for child in inner), default=0.0) if depth < 16 and done < steps else 0.0
        )
        return (done + min(part, 1.0)) / steps


@dataclass(slots=True)
class BuildState:
    """How far a build is, and whether it is to stop; shared by TensorRT's threads and the one that waits for them.

    Attributes:
        share: 0 to 1; it never falls.
        cancelled: Once set, the next step stops the build.
    """

    share: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)


def make_monitor(trt: Any, state: BuildState) -> Any:
    """An object of TensorRT's monitor class, which keeps `state` up to date; None where this version has no monitor."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tree, self.lock = PhaseTree(), threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # TensorRT may call from several threads; whatever is raised here would end the process.
            with self.lock:
                self.tree.step(phase_name, step)
                state.share = self.tree.share()
            return not state.cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.tree.finish(phase_name)
                state.share = self.tree.share()

    return Monitor()


def run_cancellable(library: Library, work: Callable[[], T], state: BuildState, *, poll: Callable[[], None]) -> T:
    """Runs `work` in a thread of its own and waits, so that signals are heard while TensorRT's C++ code runs.

    An interruption cancels the build, waits until TensorRT has stopped, and is raised then. TensorRT 8 cannot be
    stopped: the wait lasts until its build ends, and a second interruption does not wait. What `work` raises is raised
    here; `poll` is called again and again by the thread that waits.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []
    begun, done = threading.Event(), threading.Event()

    def target() -> None:
        # `begun` is set before `cancelled` is looked at, and the other thread does it the other way round: one of them
        # sees the other.
        begun.set()
        try:
            if not state.cancelled.is_set():
                outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="repvgg-build", daemon=True)
    try:
        thread.start()
        # Not thread.join: before Python 3.13, a join that a signal interrupts takes the thread for ended, and no later
        # one waits for it.
        while not done.wait(_WAIT_SECONDS):
            poll()
        poll()
    except BaseException:
        state.cancelled.set()
        if not hasattr(library.trt, "IProgressMonitor"):
            logger.warning(
                "%s cannot be stopped: waiting for its build to end; interrupt again to leave at once", library.name
            )
        if begun.is_set():
            done.wait()
        raise
    finally:
        if done.is_set():
            thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
