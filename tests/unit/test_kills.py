"""`perf.kills`: what its container says is what it has read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from perf import kills


def said(sums: str, rounds: int) -> str:
    """Return what the container's loop says on this machine, which has the files too, until so many lines have come."""
    with subprocess.Popen(["sh", "-c", kills._LOOP, "sh", sums], stdout=subprocess.PIPE, text=True) as loop:
        assert loop.stdout is not None
        try:
            return "".join(loop.stdout.readline() for _ in range(rounds))
        finally:
            loop.kill()


def test_files_that_are_right_are_counted() -> None:
    assert kills.judged(said(kills.digests(Path("/")), 2)) == {"compared": 2 * kills._EACH, "wrong": 0, "failed": 0}


def test_a_byte_that_is_not_its_file_s_is_told() -> None:
    digest, rest = kills.digests(Path("/")).split(maxsplit=1)
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    found = kills.judged(said(f"{other}  {rest}", 6))
    assert found["wrong"] >= 1 and found["failed"] >= 1 and found["compared"] == 0


def test_a_file_that_cannot_be_read_is_told() -> None:
    found = kills.judged(said(f"{'0' * 64}  /does/not/exist", 6))
    assert found["failed"] >= 1 and (found["wrong"], found["compared"]) == (0, 0)


@pytest.mark.parametrize(("lines", "good"), [({}, True), ({"wrong": 1}, False), ({"failed": 1}, False),
                                             ({"compared": 0}, False)])  # fmt: skip
def test_the_end_is_1_when_the_container_read_anything_wrong(
    lines: dict[str, int], good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"what": "container", "compared": 20, "wrong": 0, "failed": 0, "words": "", **lines}
    monkeypatch.setattr(kills, "measure", lambda *_: [told])
    monkeypatch.setattr("sys.argv", ["kills"])
    assert kills.main() == (0 if good else 1)
    assert '"what": "container"' in capsys.readouterr().out
