"""The resource is freed once: at close when idle, else when the last user is done."""

from __future__ import annotations

from repvgg_deploy.runtime.lease import Lease


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
