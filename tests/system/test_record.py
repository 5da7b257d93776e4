"""lazyfs record with the real daemon and a real runc, as root: the trace of a start, and nothing of one that failed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import reference
from lazyfs.format.trace import decode
from lazyfs.registry import traces
from lazyfs.registry.open import open_repository
from tests.helpers.command import DEADLINE, Command, converted_image
from tests.helpers.daemon import until


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return converted_image(tmp_path_factory.mktemp("images"), {"Cmd": ["cat", "/etc/plain"]})


class Lazyfs(Command):
    """Its `place` is its current directory, too; stores of --cold lie in a directory of theirs."""

    stdin = subprocess.DEVNULL

    def __init__(self, place: Path) -> None:
        (place / "cold").mkdir()
        super().__init__(place, LAZYFS_CONFIG="/dev/null", TMPDIR=f"{place}/cold", PYTHONPATH=os.getcwd())
        self.directory = place

    def traces(self) -> list[str]:
        """The files in the current directory, half-written ones too."""
        return sorted(path.name for path in self.place.iterdir() if path.is_file())


@pytest.fixture
def lazyfs(scratch: Path) -> Iterator[Lazyfs]:
    command = Lazyfs(scratch)
    yield command
    command.until_nothing_is_left()
    assert list((scratch / "cold").iterdir()) == []


def test_a_start_is_recorded_and_attached(lazyfs: Lazyfs, image: str) -> None:
    script = "head -c 5 /etc/group >&2; echo; echo now ready; cat /etc/plain; sleep 60 & wait"
    words = ("--ready-when", "line:ready", image, "sh", "-c", f"trap 'exit 9' TERM; {script}")
    code, out, err = lazyfs.run("record", "--json", "--cold", *words)
    assert code == 0, err
    told = json.loads(out)
    assert told["file"] == "small.trace" and lazyfs.traces() == ["small.trace"]
    assert "now ready" in err and "now ready" not in out
    trace = decode((lazyfs.place / "small.trace").read_bytes())
    read = {each.path for each in trace.reads}
    assert {b"usr/bin/sh", b"usr/bin/head", b"etc/group"} <= read
    assert told["reads"] == len(trace.reads) and trace.manifest == told["manifest_digest"]
    assert trace.requests and 0 < trace.ready < DEADLINE
    # The file that is there stays.
    code, _, err = lazyfs.run("record", image)
    assert code == 2 and "small.trace is there already" in err

    assert lazyfs.run("optimize", image, "small.trace")[0] == 0
    repository = open_repository(reference.parse(image))
    found = traces.find(repository, trace.manifest, time.monotonic() + 10, layers=trace.layers)
    assert found is not None and {each.path for each in found.reads} == read


def test_a_port_of_the_host_and_the_nodes_own_store(lazyfs: Lazyfs, image: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        ready = f"port:{listener.getsockname()[1]}"
        words = ("-o", "t", "--ready-when", ready, image, "sh", "-c", "trap 'exit 9' TERM; echo up; sleep 60 & wait")
        process = lazyfs.start("record", *words)
        assert process.stderr is not None and process.stderr.readline() == "up\n"
        assert process.poll() is None
        listener.listen()
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert out.startswith("t: ready after ") and "next: lazyfs optimize" in err and lazyfs.traces() == ["t"]


def test_who_interrupts_it_has_no_container_and_no_file(lazyfs: Lazyfs, image: str) -> None:
    process = lazyfs.start("record", "--cold", image, "sh", "-c", "trap 'exit 9' TERM; echo up; sleep 60 & wait")
    assert process.stderr is not None and process.stderr.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and out == "" and lazyfs.traces() == []


def test_what_a_killed_one_leaves_goes_with_the_next(lazyfs: Lazyfs, image: str) -> None:
    process = lazyfs.start("record", "--cold", image, "sh", "-c", "trap 'exit 9' TERM; echo up; sleep 60 & wait")
    assert process.stderr is not None and process.stderr.readline() == "up\n"
    with process:
        process.kill()
    (left,) = (lazyfs.place / "cold").iterdir()
    until(lambda: is_free(left), "its container has ended", DEADLINE)
    code, _, err = lazyfs.run("record", "--cold", image)
    assert code == 0 and str(left) not in err, err


def is_free(place: Path) -> bool:
    """Tell whether nobody holds a cold store's lock."""
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def test_a_container_that_ends_too_soon(lazyfs: Lazyfs, image: str) -> None:
    words = ("record", "--ready-when", "line:ready", image, "sh", "-c", "echo no such table >&2; exit 3")
    code, out, err = lazyfs.run(*words)
    assert (code, out, lazyfs.traces()) == (8, "", [])
    assert "ended with status 3" in err and err.splitlines()[-1].endswith("'no such table'")
