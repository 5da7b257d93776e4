"""The daemon as the snapshotter sees it, over a real control socket: away, hung, dying, coming back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lazyfs import control_client
from lazyfs.config import Settings
from lazyfs.errors import DaemonFault, DaemonUnreachable, FuseUnavailable, LazyfsError, RegistryUnreachable
from snapshotter import remote as module
from snapshotter.model import LazyImage, LazyLayer, LazyPlace
from snapshotter.remote import Remote
from tests.helpers.control_daemon import ControlDaemon
from tests.helpers.daemon import until

PATIENCE = 10.0  # seconds that a test's own waits take at most


def sha(number: int) -> str:
    return f"sha256:{number:04x}" + "0" * 60


def place(*numbers: int, host: str = "fine.test") -> LazyPlace:
    layers = tuple(LazyLayer(sha(one), 9, "m", {"a": "b"}, sha(one), sha(one)) for one in numbers)
    return LazyPlace(LazyImage(1, f"docker://{host}/app:1", sha(99), layers), len(layers) - 1)


@pytest.fixture
def settings(scratch: Path) -> Settings:
    return Settings(root=scratch / "root", run=scratch / "run", prepare_timeout=5, chain_timeout=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIN_TOLD_TIMEOUT", 0.1)
    monkeypatch.setattr(module, "_RETRY", (0.02,))
    monkeypatch.setattr(control_client, "GREETING_TIMEOUT", 0.3)


@pytest.fixture
def daemon(settings: Settings) -> Iterator[ControlDaemon]:
    with ControlDaemon(settings.socket) as one:
        yield one


def waiting(settings: Settings, in_use: Sequence[LazyPlace] = (), **more: Any) -> Remote:
    """A Remote that starts no daemon."""
    return Remote(settings, start=False, in_use=lambda: in_use, **more)


def test_a_chain_is_asked_for_as_it_is_recorded(settings: Settings, daemon: ControlDaemon) -> None:
    shown = waiting(settings).show(place(1, 2))
    assert (shown.lowerdirs, shown.mode) == (("/trees/0001-0002",), 0o755)
    (asked,) = daemon.named("mount_chain")
    assert (asked["image"], asked["manifest_digest"], asked["access"]) == ("docker://fine.test/app:1", sha(99), None)
    assert asked["layers"][1] == {
        "digest": sha(2), "size": 9, "media_type": "m", "annotations": {"a": "b"}, "diff_id": sha(2)
    }  # fmt: skip
    assert asked["deadline"] == settings.chain_timeout


def test_after_a_death_chains_come_back_side_by_side_and_logins_first(settings: Settings) -> None:
    gone = [place(number, host="gone.test") for number in range(1, 9)]
    fine = place(20)
    over = threading.Event()

    def mount(args: dict[str, Any]) -> dict[str, Any]:
        if "gone.test" in args["image"]:
            over.wait(PATIENCE)
            raise RegistryUnreachable("gone.test", "nobody is there")
        return {"chain": "c", "lowerdirs": ["/c"], "root": {"mode": 0o755, "uid": 0, "gid": 0}}

    remote = waiting(settings, [*gone, fine], greet=lambda remote: remote.set_logins([{"host": "h"}]))
    with ControlDaemon(settings.socket) as first:
        remote.start()
        until(lambda: len(first.chains) == 9, "all chains in use are shown", PATIENCE)
    with ControlDaemon(settings.socket) as second:
        second.answers["mount_chain"] = mount
        # Eight chains hang, more than are asked for at once of one registry: that of another one is not behind them.
        until(lambda: [one for one in second.named("mount_chain") if "fine" in one["image"]], "again", PATIENCE)
        assert len([one for one in second.named("mount_chain") if "gone" in one["image"]]) < len(gone)
        assert second.calls[0] == ("set_logins", {"logins": [{"host": "h"}]})
        assert remote.restarts == 1
        over.set()
        remote.close()


def test_who_needs_a_login_waits_for_the_greeting(
    settings: Settings, daemon: ControlDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIN_TOLD_TIMEOUT", PATIENCE)
    greeting, told = threading.Event(), threading.Event()

    def logins(args: dict[str, Any]) -> dict[str, Any]:
        greeting.set()
        told.wait(PATIENCE)
        return {}

    daemon.answers["set_logins"] = logins
    daemon.answers["resolve_chain"] = lambda args: {"image": "i", "manifest_digest": "m", "layers": []}
    remote = waiting(settings, greet=lambda remote: remote.set_logins([]))
    with ThreadPoolExecutor(1) as pool:
        remote.start()
        greeting.wait(PATIENCE)
        asked = pool.submit(remote.resolve, "i", "m", "")
        assert daemon.named("resolve_chain") == []
        told.set()
        assert asked.result(PATIENCE).layers == ()
    assert [name for name, _ in daemon.calls] == ["set_logins", "resolve_chain"]
    remote.close()


def test_one_who_says_nothing_is_given_up_and_no_second_one_is_started(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a daemon runs already")

    monkeypatch.setattr(module, "reach_daemon", never)
    with ControlDaemon(settings.socket, greets=False) as hung:
        remote = Remote(settings, start=True, in_use=list)
        with ThreadPoolExecutor(20) as pool:
            for asked in [pool.submit(remote.show, place(number)) for number in range(20)]:
                with pytest.raises(DaemonUnreachable, match="lazyfsd does not answer"):
                    asked.result(PATIENCE)
        # What can do without it does not wait for it.
        remote._greeted.set()
        before = hung.connections
        with pytest.raises(DaemonUnreachable):
            remote.usage([sha(1)])
        assert hung.connections == before


def test_one_that_answers_too_late(settings: Settings, daemon: ControlDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    daemon.answers["mount_chain"] = lambda args: {"late": over.wait(PATIENCE)}
    monkeypatch.setattr(module, "DEADLINE_SLACK", -4.9)
    with pytest.raises(DaemonUnreachable, match="did not answer mount_chain within"):
        waiting(settings).show(place(1))
    over.set()
    assert len(daemon.named("mount_chain")) == 1, "what is slow is not asked a second time"


def test_the_next_daemon_is_asked_when_one_dies_in_mid_call(settings: Settings) -> None:
    with ControlDaemon(settings.socket) as first, ThreadPoolExecutor(1) as pool:
        asked = threading.Event()

        def die(args: dict[str, Any]) -> dict[str, Any]:
            asked.set()
            first.die()
            return {}

        first.answers["mount_chain"] = die
        shown = pool.submit(waiting(settings).show, place(3))
        assert asked.wait(PATIENCE)
        until(lambda: not settings.socket.exists(), "it is gone", PATIENCE)
        with ControlDaemon(settings.socket):
            assert shown.result(PATIENCE).lowerdirs == ("/trees/0003",)


def test_who_is_not_to_start_one_waits_for_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = waiting(settings)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(remote.show, place(1))
        with ControlDaemon(settings.socket):
            assert asked.result(PATIENCE).chain == "0001"
    monkeypatch.setattr(module, "RETURN_TIMEOUT", 0.05)
    with pytest.raises(DaemonUnreachable, match="no lazyfsd listens on"):
        remote.show(place(1))
    with pytest.raises(DaemonUnreachable):
        remote.usage([sha(1)])


def test_one_start_for_all_and_one_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(8)
    starts: list[int] = []

    def nobody(path: Path) -> Any:
        together.wait(PATIENCE)
        raise DaemonUnreachable("no lazyfsd listens")

    def fails(settings: Settings) -> Any:
        starts.append(1)
        threading.Event().wait(0.05)
        raise FuseUnavailable("there is no /dev/fuse")

    monkeypatch.setattr(module, "connect", nobody)
    monkeypatch.setattr(module, "reach_daemon", fails)
    remote = Remote(settings, start=True, in_use=list)
    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(remote.show, place(1)) for _ in range(8)]:
            with pytest.raises(FuseUnavailable, match="no /dev/fuse"):
                asked.result(PATIENCE)
    assert len(starts) == 1


def test_a_chain_is_never_hidden_under_who_asks_for_it(
    settings: Settings, daemon: ControlDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, one = waiting(settings), place(1)
    layers = (sha(1),)
    asked, answer = threading.Event(), threading.Event()
    mount = daemon._answer

    def slow(args: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        answer.wait(PATIENCE)
        del daemon.answers["mount_chain"]
        return mount("mount_chain", args)

    daemon.answers["mount_chain"] = slow
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(remote.show, one)
        assert asked.wait(PATIENCE)
        assert not remote.hide("0001", layers), "it is being asked for"
        answer.set()
        chain = shown.result(PATIENCE).chain
        assert not remote.hide(chain, layers), "it was asked for a moment ago"
    monkeypatch.setattr(module, "_SETTLE", 0.0)
    hiding, hidden = threading.Event(), threading.Event()

    def slow_too(args: dict[str, Any]) -> dict[str, Any]:
        hiding.set()
        hidden.wait(PATIENCE)
        daemon.chains.pop(args["chain"])
        return {}

    daemon.answers["unmount_chain"] = slow_too
    with ThreadPoolExecutor(2) as pool:
        gone = pool.submit(remote.hide, chain, layers)
        assert hiding.wait(PATIENCE)
        again = pool.submit(remote.show, one)
        assert remote.show(place(2)).chain == "0002", "other chains don't wait"
        assert len(daemon.named("mount_chain")) == 2
        hidden.set()
        assert gone.result(PATIENCE) and again.result(PATIENCE).chain == chain
    assert set(daemon.chains) == {"0001", "0002"}


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("mount_chain", {"chain": "c"}),
        ("resolve_chain", {"image": "i", "manifest_digest": "m", "layers": [{"digest": "d"}]}),
        ("chains", {"chains": [{"chain": "c"}]}),
        ("layer_usage", {"usage": {"d": {"size": "x"}}}),
        ("remove_layers", {"freed": "x"}),
    ],
)
def test_answers_that_lack_something(
    settings: Settings, daemon: ControlDaemon, call: str, answer: dict[str, Any]
) -> None:
    remote = waiting(settings)
    remote._greeted.set()
    daemon.answers[call] = lambda args: answer
    ask: dict[str, Any] = {
        "mount_chain": lambda: remote.show(place(1)),
        "resolve_chain": lambda: remote.resolve("i", "", ""),
        "chains": remote.shown,
        "layer_usage": lambda: remote.usage([sha(1)]),
        "remove_layers": lambda: remote.remove_layers([sha(1)]),
    }
    with pytest.raises(DaemonFault, match=f"lazyfsd's answer to {call} lacks something"):
        ask[call]()


def test_its_errors_are_ours(settings: Settings, daemon: ControlDaemon) -> None:
    def refuse(args: dict[str, Any]) -> dict[str, Any]:
        raise FuseUnavailable("there is no /dev/fuse", hint="load it")

    daemon.answers["mount_chain"] = refuse
    with pytest.raises(LazyfsError) as raised:
        waiting(settings).show(place(1))
    assert isinstance(raised.value, FuseUnavailable) and str(raised.value) == "there is no /dev/fuse (load it)"
