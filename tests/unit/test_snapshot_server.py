"""lazyfs-snapshotter as a process: its socket, its locks, its end, and what a kill in the middle of work leaves."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest

from lazyfs.config import Settings
from lazyfs.errors import StoreLocked, UsageError
from snapshotter.model import Kind
from snapshotter.server import build
from tests.helpers.daemon import until
from tests.helpers.snapshotter import Client, Node, Refused, serving


@pytest.fixture
def settings(scratch: Path) -> Settings:
    return Settings(scratch / "r", scratch / "run")


# -- one process -----------------------------------------------------------------------------------------------------


def test_it_starts_tells_systemd_answers_and_ends_well(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(scratch / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(scratch / "notify"))
        with Node(scratch) as node:
            assert systemd.recv(100) == b"READY=1"
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (node.address, node.run, node.root)]
            assert modes == [0o600, 0o700, 0o700]
            node.client.prepare("k")
            assert "in use" in node.refused()
            assert "in use" in node.refused("--root", scratch / "other")
            assert node.client.stat("k").kind is Kind.ACTIVE
            assert node.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"
    assert not node.address.exists()


def test_a_signal_that_another_thread_gets_ends_it_too(scratch: Path) -> None:
    """The kernel chooses the thread, and seldom another one than the first."""
    with Node(scratch) as node:
        assert node.stop_by_another_thread() == 0


def test_a_database_that_can_not_be_used_is_one_sentence(scratch: Path) -> None:
    node = Node(scratch)
    node.root.mkdir(mode=0o700)
    (node.root / "snapshots.db").write_bytes(b"x" * 10000)
    assert "is damaged" in node.refused()


def test_kills_lose_nothing_that_was_answered_and_leave_nothing(scratch: Path) -> None:
    """Snapshots are made, committed and removed all the time while the process is killed, and started again."""
    chance = random.Random(7)
    with Node(scratch) as node:
        kept: set[str] = set()
        gone: set[str] = set()
        for turn in range(2):
            client, stop = node.client, threading.Event()

            def work(number: int, turn: int = turn, client=client, stop=stop) -> None:  # type: ignore[no-untyped-def]
                try:
                    for count in range(10**6):
                        if stop.is_set():
                            return
                        name = f"{turn}-{number}-{count}"
                        client.prepare(f"{name}-a")
                        client.commit(name, f"{name}-a")
                        kept.add(name)
                        if count % 2:
                            kept.discard(name)
                            client.remove(name)
                            gone.add(name)
                except Refused:
                    return

            threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.2, 0.5))
            assert node._process is not None
            os.kill(node._process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
            stop.set()
            node.kill()
            node.start()
            found = set(node.client.list())
            assert kept <= found and not gone & found
        assert len(kept) > 3 and gone
        # What is left of work that was under way goes by itself; everything that is recorded has its directory.
        top = node.root / "s"

        def numbers() -> set[str]:
            with sqlite3.connect(f"file:{node.root}/snapshots.db?mode=ro", uri=True) as connection:
                found = {str(number) for (number,) in connection.execute("SELECT number FROM snapshots")}
            connection.close()
            return found

        until(lambda: set(os.listdir(top)) == numbers(), "strays are collected")


# -- in this process -------------------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(scratch: Path, settings: Settings) -> None:
    settings.snapshotter_address.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(settings.snapshotter_address))
    with serving(scratch) as client:
        assert client.list() == {}


def test_a_socket_on_which_somebody_listens_is_left_alone(settings: Settings) -> None:
    settings.snapshotter_address.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.snapshotter_address))
        listener.listen()
        with pytest.raises(StoreLocked, match="is in use"):
            build(settings)
    assert settings.snapshotter_address.exists()
    build(settings).close()  # the failed attempt holds no lock


def test_addresses_that_can_not_be(scratch: Path) -> None:
    (scratch / "file").write_text("")
    (scratch / "open").mkdir()
    (scratch / "open").chmod(0o777)
    for address in (scratch / "file", scratch / "open" / "s.sock", scratch / ("x" * 100) / "s.sock"):
        with pytest.raises(UsageError):
            build(Settings(scratch / "r", scratch / "run", snapshotter_socket=address))
    assert (scratch / "file").exists()


def test_calls_under_way_are_finished_at_the_end(settings: Settings) -> None:
    entered, release = threading.Event(), threading.Event()
    one = build(settings)
    cleanup = one.snapshotter.cleanup

    def slow() -> None:
        entered.set()
        release.wait(20)
        cleanup()

    one.snapshotter.cleanup = slow  # type: ignore[method-assign]
    one.start()
    client = Client(settings.snapshotter_address)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            client.cleanup()
        except BaseException as error:
            failed.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    assert entered.wait(20)
    closer = threading.Thread(target=one.close)
    closer.start()
    release.set()
    closer.join(20)
    asker.join(20)
    client.close()
    assert not closer.is_alive() and not failed
