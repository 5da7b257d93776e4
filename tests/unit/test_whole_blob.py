"""A blob over several connections: in order whatever happens to each, and one stream where ranges don't work."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from lazyfs import reference
from lazyfs.chunks.lines import Lines
from lazyfs.chunks.whole_blob import WholeBlob
from lazyfs.digest import of
from lazyfs.errors import LazyfsError
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.registry_faults import Fault

SEGMENT = 64 << 10
SLOW = 400_000  # bytes a second of one connection
HOST_CONNECTIONS = 8


@contextmanager
def blob_of(
    registry: FakeRegistry, data: bytes, lines: Lines | None = None, window: float = 0.05
) -> Iterator[WholeBlob]:
    registry.add_blob(data)
    opened = open_repository(reference.parse(f"{registry.host}/app:1"), OpenOptions())
    try:
        yield WholeBlob(opened, of(data), len(data), lines or Lines(HOST_CONNECTIONS), segment=SEGMENT, window=window)
    finally:
        opened.close()


def test_a_slow_server_is_asked_on_more_connections(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    data = os.urandom(20 * SEGMENT)
    lines = Lines(HOST_CONNECTIONS)
    with blob_of(registry, data, lines) as blob:
        assert b"".join(blob) == data
    assert 2 <= blob.connections <= HOST_CONNECTIONS
    assert registry.count("GET", of(data)) > 3


def test_a_consumer_that_is_slower_than_the_network_has_one_connection(registry: FakeRegistry) -> None:
    data = os.urandom(20 * SEGMENT)
    pause = threading.Event()
    with blob_of(registry, data) as blob:
        got = []
        for block in blob:
            got.append(block)
            pause.wait(0.1)  # what unpacking takes; far more than the network does, on a busy machine, too
    assert b"".join(got) == data
    assert (blob.connections, registry.count("GET", of(data))) == (1, 1)


def test_no_connection_is_lent_while_a_reader_waits(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    data = os.urandom(8 * SEGMENT)
    lines = Lines(HOST_CONNECTIONS)
    lines.set_readers(registry.host, waiting=True)
    with blob_of(registry, data, lines) as blob:
        assert b"".join(blob) == data
    assert blob.connections == 1


def test_connections_go_back_when_a_reader_comes(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    data = os.urandom(40 * SEGMENT)
    lines = Lines(HOST_CONNECTIONS)
    with blob_of(registry, data, lines) as blob:
        got = b""
        for block in blob:
            got += block
            if blob.connections >= 3:
                lines.set_readers(registry.host, waiting=True)
    assert got == data
    taken = 0
    lines.set_readers(registry.host, waiting=False)
    while lines.take(registry.host):
        taken += 1
    assert taken == HOST_CONNECTIONS - 2  # all of them are there again


def test_a_server_without_ranges_goes_on_with_one_stream(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    registry.fault(Fault.IGNORE_RANGE, path="/blobs/")
    data = os.urandom(12 * SEGMENT)
    with blob_of(registry, data) as blob:
        assert b"".join(blob) == data


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.TRUNCATE, Fault.STATUS, Fault.WRONG_RANGE, Fault.SHORT_RANGE])
def test_broken_ranges_are_resumed(registry: FakeRegistry, fault: Fault) -> None:
    registry.rate = SLOW
    data = os.urandom(16 * SEGMENT)
    rule = registry.fault(fault, path="/blobs/", after=2, times=3, at=1000)
    with blob_of(registry, data) as blob:
        assert b"".join(blob) == data
    assert rule.hits == 3


def test_ranges_that_always_break_are_an_error(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    data = os.urandom(16 * SEGMENT)
    registry.fault(Fault.STATUS, path="/blobs/", after=3, status=404)
    with blob_of(registry, data) as blob, pytest.raises(LazyfsError):
        for _ in blob:
            pass


def test_any_mixture_of_faults_gives_the_bytes_or_an_error(registry: FakeRegistry) -> None:
    chance = random.Random(7)
    for _ in range(6):
        registry.clear_faults()
        registry.rate = 2_000_000
        data = os.urandom(chance.randrange(1, 20 * SEGMENT))
        for _ in range(chance.randrange(4)):
            fault = chance.choice([Fault.RESET, Fault.TRUNCATE, Fault.STATUS, Fault.IGNORE_RANGE])
            registry.fault(fault, path="/blobs/", after=chance.randrange(6), times=chance.randrange(1, 3), at=5000)
        with blob_of(registry, data, window=0.01) as blob:
            try:
                assert b"".join(blob) == data
            except LazyfsError:
                assert len(data) > 5000 or registry.faults


def test_whoever_stops_leaves_no_thread_and_no_connection(registry: FakeRegistry) -> None:
    registry.rate = SLOW
    data = os.urandom(40 * SEGMENT)
    lines = Lines(HOST_CONNECTIONS)
    before = set(threading.enumerate())
    with blob_of(registry, data, lines) as blob:
        with closing(iter(blob)) as blocks:
            for _ in blocks:
                if blob.connections >= 2:
                    break
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("lazyfs-range"):
                thread.join(30)
                assert not thread.is_alive()


def test_what_waits_is_bounded(registry: FakeRegistry) -> None:
    """A consumer that stops finds no more than a few segments fetched ahead of it."""
    registry.rate = SLOW
    data = os.urandom(60 * SEGMENT)
    with blob_of(registry, data) as blob, closing(iter(blob)) as blocks:
        got = 0
        for block in blocks:
            got += len(block)
            if blob.connections >= 2 and got > 10 * SEGMENT:
                break
        registry.rate = 0
        threading.Event().wait(0.5)  # time in which everything could come
        assert len(blob._coming) <= HOST_CONNECTIONS
        held = sum(len(part) for segment in blob._coming for part in segment.blocks)
        assert held <= HOST_CONNECTIONS * SEGMENT
