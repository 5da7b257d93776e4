"""When a recorded start counts as ready, and what becomes of one that never is. The daemon is a stand-in."""

from __future__ import annotations

import signal
import socket
import time
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.cli.main import Terminated
from lazyfs.cli.recording import Ready, Recording, parse_ready
from lazyfs.control_client import Daemon
from lazyfs.errors import ContainerFailed, DaemonFault, UsageError


class StandIn:
    """Answers trace_end."""

    def __init__(self, answer: dict[str, Any] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answer = {"path": "/trace"} if answer is None else answer

    def call(self, name: str, **args: Any) -> dict[str, Any]:
        assert name == "trace_end"
        self.calls.append(args)
        return self.answer


def begun(ready: Ready, patience: float = 60.0, daemon: StandIn | None = None) -> Recording:
    recording = Recording(ready, patience)
    recording.begin(cast("Daemon", daemon or StandIn()))
    recording.mounted({"mount": "7", "manifest_digest": "sha256:x"})
    return recording


@pytest.mark.parametrize(
    ("text", "ready"),
    [
        ("line:ready: port 80", Ready(line=b"ready: port 80")),
        ("line: ", Ready(line=b" ")),
        ("port:8000", Ready(port=8000)),
        ("time:1m", Ready(span=60.0)),
        ("time:0.5", Ready(span=0.5)),
    ],
)
def test_what_ready_may_be(text: str, ready: Ready) -> None:
    assert parse_ready(text) == ready


@given(st.text(max_size=20) | st.sampled_from(["line:", "port:0", "port:65536", "port:x", "time:0", "time:9d", ""]))
def test_what_it_may_not_be_is_a_sentence(text: str) -> None:
    try:
        found = parse_ready(text)
    except UsageError:
        return
    assert text.startswith(("line:", "port:", "time:")) and (found.line or found.port or found.span)


@given(st.binary(min_size=1, max_size=6), st.binary(max_size=30), st.binary(max_size=30), st.data())
def test_a_text_is_found_however_the_output_is_cut(
    text: bytes, before: bytes, after: bytes, data: st.DataObject
) -> None:
    recording = begun(Ready(line=text))
    said = before + text + after
    at = 0
    while at < len(said):
        size = data.draw(st.integers(1, len(said) - at))
        recording.wrote(1, said[at : at + size])
        recording.wrote(2, b"something else"[: size - 1])
        at += size
    assert recording.enough() and recording.answer is not None


def test_a_text_that_was_not_written_is_not_found() -> None:
    recording = begun(Ready(line=b"ready"))
    recording.wrote(1, b"rea")
    recording.wrote(2, b"dy")  # on another stream
    recording.wrote(1, b"d")
    assert not recording.enough()
    recording.wrote(1, b"-y")
    assert not recording.enough()


def test_the_trace_ends_when_the_line_was_written_and_once() -> None:
    daemon = StandIn()
    recording = begun(Ready(line=b"up"), daemon=daemon)
    recording.wrote(1, b"up\n")
    written = time.monotonic() - recording._began
    assert recording.enough() and recording.enough()
    recording.ended(143)
    recording.finish(143)
    assert len(daemon.calls) == 1 and daemon.calls[0]["mount"] == "7"
    assert 0 <= daemon.calls[0]["ready"] <= written + 0.001


def test_ready_in_its_last_moment_is_ready() -> None:
    recording = begun(Ready(line=b"up"))
    recording.ended(0)  # its last words come after its end
    recording.wrote(1, b"up\n")
    recording.finish(0)
    assert recording.answer is not None


def test_a_port_that_accepts() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        recording = begun(Ready(port=listener.getsockname()[1]))
        assert not recording.enough()
        listener.listen()
        assert recording.enough()
        with pytest.raises(UsageError, match="is answered before"):
            begun(Ready(port=listener.getsockname()[1]))


def test_a_span_that_is_over() -> None:
    assert not begun(Ready(span=60.0)).enough()
    short = begun(Ready(span=0.000001))
    time.sleep(0.001)
    assert short.enough()


@pytest.mark.parametrize(
    ("ready", "status"), [(Ready(line=b"up"), 0), (Ready(span=9.0), 0), (Ready(span=9, ends=True), 3)]
)
def test_an_end_before_it_is_ready_tells_the_last_words(ready: Ready, status: int) -> None:
    daemon = StandIn()
    recording = begun(ready, daemon=daemon)
    recording.wrote(2, b"first\nno such\x1b[31m table\n")
    recording.ended(status)
    with pytest.raises(ContainerFailed, match=f"ended with status {status}.*no such") as caught:
        recording.finish(status)
    assert "\x1b" not in caught.value.message and "first" not in caught.value.message
    assert not daemon.calls


def test_a_command_that_ends_well_was_ready_then() -> None:
    recording = begun(Ready(span=30.0, ends=True))
    recording.ended(0)
    recording.finish(0)
    assert recording.answer is not None


def test_patience_has_an_end() -> None:
    recording = begun(Ready(line=b"up"), patience=0.0)
    assert recording.enough()
    with pytest.raises(ContainerFailed, match="not yet a line with 'up'; it said nothing"):
        recording.finish(143)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_who_cancels_gets_no_trace(number: int, error: type[BaseException]) -> None:
    daemon = StandIn()
    recording = begun(Ready(span=30.0, ends=True), daemon=daemon)
    recording.cancelled(number)
    recording.ended(0)
    with pytest.raises(error):
        recording.finish(0)
    assert not daemon.calls


def test_an_answer_that_breaks_the_protocol() -> None:
    with pytest.raises(DaemonFault, match="no path"):
        begun(Ready(span=0.000001), daemon=StandIn({})).enough()
