"""What strangers could make grow without end does not: hosts, ways of talking TLS, remarks, calls that wait."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from lazyfs import child
from lazyfs.chunks import schedule
from lazyfs.chunks.host import Priority
from lazyfs.chunks.schedule import Scheduler
from lazyfs.registry.endpoints import Tls
from lazyfs.registry.hops import Hop
from lazyfs.registry.http import rate_limits, tls
from lazyfs.registry.http.environment import Authorities
from lazyfs.registry.http.rate_limits import LimitTeller
from lazyfs.registry.http.tls import TlsContexts
from snapshotter import server
from snapshotter.collaborators import Collaborators
from snapshotter.model import REF_LABEL
from tests.helpers.snapshotter import Refused, serving
from tests.unit.test_snapshot_calls import CHAINS, Others, others

__all__ = ["others"]  # a fixture
CERTIFICATE = Path(__file__).parents[1] / "data/tls/cert.pem"


async def test_hosts_of_which_nothing_is_under_way_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MAX_LINK_HOSTS", 5)
    scheduler = Scheduler(4)

    async def ask(host: str) -> None:
        await scheduler.run(scheduler.ticket(host, Priority.DEMAND), lambda: None, 10)

    with scheduler.mount_waits("mounting"):
        for number in range(50):
            await ask(f"cdn{number}")
            assert "mounting" in scheduler.statistics() and len(scheduler.statistics()) <= 5
    assert "cdn49" in scheduler.statistics()


def test_ways_of_talking_tls_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MAX_TLS_CONTEXTS", 3)
    contexts = TlsContexts(Authorities())
    ways = [Tls(ca=(tmp_path / f"{number}.pem",)) for number in range(5)]
    for way in ways:
        shutil.copy(CERTIFICATE, way.ca[0])
    first = contexts.context(ways[0])
    assert contexts.context(ways[0]) is first
    for way in ways:
        contexts.context(way)
    assert len(contexts._loaded) == 3
    assert contexts.context(ways[0]) is not first  # it was loaded again


def test_few_hosts_that_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry may redirect to any number of them."""
    monkeypatch.setattr(rate_limits, "MAX_LIMITS_TOLD", 3)
    said: list[str] = []
    teller = LimitTeller(lambda hop: None, said.append)
    for number in range(20):
        teller(Hop("blob", f"h{number % 10}", "it", 429, 0.0, 0.0, 0, retry_after=number * 100))
    assert len(said) + len(teller.remarks) == 3


def test_calls_that_wait_are_bounded(scratch: Path, others: Others, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> Collaborators:
        return Collaborators(others, others, others)

    monkeypatch.setattr(server, "MAX_CALLS", 2)
    release, there = threading.Event(), threading.Semaphore(0)

    def meanwhile() -> None:
        there.release()
        release.wait(20)

    others.meanwhile = meanwhile
    with serving(scratch, connect) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.prepare, key, "", {REF_LABEL: CHAINS[0]}) for key in ("one", "two")]
        try:
            assert there.acquire(timeout=20) and there.acquire(timeout=20)
            with pytest.raises(Refused) as caught:
                client.stat("x")
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        finally:
            release.set()
        for one in waiting:
            with pytest.raises(Refused):  # the layer is there already, as it should be
                one.result(20)


def test_a_process_that_not_even_a_kill_ends_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs in the kernel, for a disk that does not answer."""
    monkeypatch.setattr(child, "END_TIMEOUT", 0.05)
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        try:
            monkeypatch.setattr(one, "kill", lambda: None)
            assert child._end(one) == (b"", -signal.SIGKILL)
        finally:
            os.kill(one.pid, signal.SIGKILL)
