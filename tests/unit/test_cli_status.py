"""`lazyfs status`: what daemons tell, for people and machines, one or several of them or none."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazyfs import __version__
from lazyfs.cli.main import main
from lazyfs.cli.status import duration, lines, merge, store_facts

DIGEST = "sha256:" + "a" * 64


def status(pid: int = 7, image: str = "docker://r.test/app:1") -> dict[str, Any]:
    return {
        "daemon": {
            "version": __version__, "pid": pid, "uptime": 200.0, "memory": 45_000_000, "driver": "fuse",
            "reason": "erofs is not built in", "root": "/s",
        },
        "mounts": [
            {
                "mount": "1", "image": image, "manifest_digest": DIGEST, "dir": "/mnt", "kind": "ro",
                "size": 62_000_000, "share": 0.125,
                "layers": [
                    {"digest": DIGEST, "size": 60_000_000, "lazy": True, "reason": "", "present": 5_000_000,
                     "complete": False, "verified": False, "quarantine": ""},
                    {"digest": DIGEST, "size": 2_000_000, "lazy": False, "reason": "it has no TOC", "present": 1,
                     "complete": True, "verified": True, "quarantine": ""},
                    {"digest": DIGEST, "size": 1, "lazy": True, "reason": "", "present": 0, "complete": False,
                     "verified": False, "quarantine": "it was tampered with"},
                ],
            }
        ],
        "bytes": {"demand": 1000, "prefetch": 2000, "background": 0, "from_store": 3000, "from_memory": 0},
        "cache": {"memory": {"size": 1, "bound": 16}, "store": {"size": 10, "bound": 20, "damaged": 2, "passed_by": 1}},
        "requests": {"count": 4, "errors": 1, "by_host": {"r.test": {"requests": 4, "errors": 1, "ms": 40.0}}},
        "errors": {"RegistryFault": 1},
        "fuse": {"lookup": 5, "read": 6},
    }  # fmt: skip


@contextmanager
def daemon(path: Path, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Speak the control protocol on a socket: greeting, then one answer a request."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._say({"lazyfsd": __version__, "protocol": 1, "pid": 7})
            for line in self.rfile:
                request = json.loads(line)
                self._say({"id": request["id"], **answer(request)})

        def _say(self, value: dict[str, Any]) -> None:
            self.wfile.write(json.dumps(value).encode() + b"\n")

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("LAZYFS_RUN", str(run))
    monkeypatch.setenv("LAZYFS_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))
    return run


def test_without_a_daemon_it_tells_what_the_store_holds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = run_dir.parent / "root" / "layers" / "sha256" / ("a" * 64)
    layer.mkdir(parents=True)
    (layer / "data").write_bytes(b"x" * 100_000)
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("no daemon is running; the store ") and "holds 1 layer, " in text
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["daemon"], told["mounts"], told["cache"]["store"]["layers"]) == (None, [], 1)
    assert 100_000 <= told["cache"]["store"]["size"] < 200_000


def test_a_killed_daemons_socket_is_no_daemon(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(run_dir / "lazyfsd.sock", lambda request: {"ok": {}}):
        pass
    assert (run_dir / "lazyfsd.sock").exists()
    assert main(["status"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("no daemon is running") and printed.err == ""


def test_json_is_the_daemons_object(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        calls.append(request["call"])
        return {"ok": status()}

    with daemon(run_dir / "lazyfsd.sock", answer):
        assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status()
    assert calls == ["status"]


def test_the_text_tells_what_matters(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(run_dir / "lazyfsd.sock", lambda request: {"ok": status()}):
        assert main(["status"]) == 0
    text = capsys.readouterr().out
    for words in ("pid 7, up 3 min, 45.0 MB of memory, driver fuse (erofs is not built in), store /s",
                  "docker://r.test/app:1 on /mnt, ro, 62.0 MB, 12.5 % fetched", "1 mount:",
                  "5.0 MB here, lazy", "complete, in full: it has no TOC, verified whole",
                  "QUARANTINED: it was tampered with", "demand 1.0 kB, prefetch 2.0 kB, from store 3.0 kB",
                  "4, 1 failed (r.test: 4 at 10 ms)", "RegistryFault 1", "2 damaged chunks", "PASSED BY"):  # fmt: skip
        assert words in text, words


def test_a_running_container_is_told_by_its_name(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = status()
    told["mounts"][0] |= {"kind": "container", "dir": "/s/containers/web"}
    with daemon(run_dir / "lazyfsd.sock", lambda request: {"ok": told}):
        assert main(["status"]) == 0
    assert "docker://r.test/app:1 in container web, 62.0 MB" in capsys.readouterr().out


def test_an_error_of_the_daemon_is_a_warning_beside_the_others(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"class": "DaemonFault", "message": "no such call", "hint": ""}
    with (
        daemon(run_dir / "lazyfsd.sock", lambda request: {"error": error}),
        daemon(run_dir / "solo-b.sock", lambda request: {"ok": status()}),
    ):
        assert main(["status", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["daemon"]["pid"] == 7
    assert printed.err == "lazyfs: warning: no such call\n"


def test_the_daemons_of_a_users_mounts_are_added_up(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        for number in (1, 2, 3):
            told = status(number, f"docker://r.test/app:{number}")
            stack.enter_context(daemon(run_dir / f"solo-{number}.sock", lambda request, told=told: {"ok": told}))  # type: ignore[misc]
        assert main(["status", "--json"]) == 0
        merged = json.loads(capsys.readouterr().out)
        assert main(["status"]) == 0
    assert [each["pid"] for each in merged["daemons"]] == [1, 2, 3]
    assert [mount["image"][-1] for mount in merged["mounts"]] == ["1", "2", "3"]
    assert merged["bytes"]["demand"] == 3000
    assert merged["requests"] == {
        "count": 12, "errors": 3, "by_host": {"r.test": {"requests": 12, "errors": 3, "ms": 120.0}},
    }  # fmt: skip
    assert merged["errors"] == {"RegistryFault": 3}
    assert merged["fuse"] == {"lookup": 15, "read": 18}
    assert capsys.readouterr().out.count("lazyfsd ") == 3


def test_one_daemons_object_stays_as_it_is() -> None:
    assert merge([status()]) == status()


def test_a_store_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert store_facts(tmp_path / "none") == {"layers": 0, "size": 0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (180, "3 min"), (7200, "2 h"), (86400 * 3, "3 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_hosts_with_trouble_are_told() -> None:
    well = {"state": "ok", "for": 0.0, "lies": 0, "slow": 0, "remaining": None, "last_error": ""}
    told = status()
    told["sources"] = {
        "well.test": well,
        "limit.test": {**well, "state": "rate limited", "for": 90.0, "last_error": "it was asked too often"},
        "dead.test": {**well, "state": "left alone", "for": 4.0, "slow": 2},
        "liar.test": {**well, "lies": 1},
        "few.test": {**well, "remaining": 3},
        "many.test": {**well, "remaining": 90},
    }
    text = "\n".join(line for line in lines(told))
    assert "source    limit.test: rate limited for 90 s more (last error: it was asked too often)" in text
    assert "a login or a mirror may be allowed more" in text
    assert "source    dead.test: left alone for 4 s more, too slow 2 times" in text
    assert "source    liar.test: 1 wrong answer" in text
    assert "source    few.test: 3 requests left before its rate limit" in text
    assert "well.test" not in text and "many.test" not in text
