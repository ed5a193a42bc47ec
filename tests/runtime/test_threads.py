"""The resource is freed once: at close when idle, else when the last user is done."""

from __future__ import annotations

import gc
import threading
import weakref

from repvgg_deploy.runtime.threads import Lease


def test_lease_closed_while_idle_frees_once() -> None:
    freed: list[str] = []
    lease = Lease(lambda: freed.append("freed"))
    assert lease.acquire()
    lease.release()
    assert freed == []
    lease.close()
    lease.close()
    assert freed == ["freed"]
    assert not lease.acquire()


def test_lease_closed_while_used_frees_after_the_last_user() -> None:
    freed: list[str] = []
    lease = Lease(lambda: freed.append("freed"))
    assert lease.acquire()
    assert lease.acquire()
    lease.close()
    assert lease.closed
    assert not lease.acquire()
    lease.release()
    lease.close()
    assert freed == []
    lease.release()
    assert freed == ["freed"]


def test_wait_returns_when_the_resource_is_freed_and_not_before() -> None:
    freed: list[str] = []
    lease = Lease(lambda: freed.append("freed"))
    assert lease.acquire()
    lease.close()
    waiting = threading.Thread(target=lease.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and freed == []
    lease.release()
    waiting.join(300)
    assert not waiting.is_alive() and freed == ["freed"]
    lease.wait()


class Thing:
    def __init__(self) -> None:
        self.freed = 0

    def free(self) -> None:
        self.freed += 1


def test_abandoned_lease_frees_nothing_and_lets_nobody_in() -> None:
    thing = Thing()
    lease = Lease(thing.free)
    assert lease.acquire()
    lease.abandon()
    assert lease.closed and not lease.acquire()
    lease.wait()
    lease.release()
    lease.close()
    seen = weakref.ref(thing)
    del lease, thing
    gc.collect()
    kept = seen()
    assert kept is not None and kept.freed == 0  # nor does the garbage collector free it
