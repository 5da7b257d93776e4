"""What a command prints: results, remarks, progress; on a terminal and without one."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest

from lazyfs.cli.output import Output, printable
from lazyfs.errors import StoreBroken


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def streams(json: bool = False) -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(json, stdout=stdout, stderr=stderr), stdout, stderr


def test_results_go_to_stdout_and_the_rest_to_stderr() -> None:
    out, stdout, stderr = streams()
    out.line("result")
    out.note("remark")
    out.warn("careful")
    out.json({"not": "asked for"})
    assert stdout.getvalue() == "result\n"
    assert stderr.getvalue() == "lazyfs: remark\nlazyfs: warning: careful\n"


def test_json_is_the_only_thing_on_stdout() -> None:
    out, stdout, stderr = streams(json=True)
    out.line("result")
    out.warn("careful")
    out.json({"a": [1, "ü\udcff"]})
    assert json.loads(stdout.getvalue()) == {"a": [1, "ü\udcff"]}
    assert stdout.getvalue().isascii()
    assert stderr.getvalue() == "lazyfs: warning: careful\n"


def test_quiet_keeps_results_and_warnings() -> None:
    clock = Clock()
    stdout, stderr = io.StringIO(), Terminal()
    out = Output(quiet=True, stdout=stdout, stderr=stderr, clock=clock)
    out.note("remark")
    out.warn("careful")
    out.line("result")
    with out.progress("layer", 10) as item:
        clock.now += 60
        item.advance(5)
    assert stdout.getvalue() == "result\n"
    assert stderr.getvalue() == "lazyfs: warning: careful\n"


def test_without_a_terminal_an_item_speaks_at_most_once_in_five_seconds() -> None:
    clock = Clock()
    stderr = io.StringIO()
    out = Output(stdout=io.StringIO(), stderr=stderr, clock=clock)
    with out.progress("layer 1", 1_000_000) as item:
        for _ in range(40):
            clock.now += 0.25
            item.advance(25_000)
    assert stderr.getvalue().splitlines() == [
        "lazyfs: layer 1   50 %  500.0 kB of 1.0 MB",
        "lazyfs: layer 1  100 %  1.0 MB of 1.0 MB",
    ]


def test_an_item_of_unknown_size_tells_what_is_done() -> None:
    clock = Clock()
    stderr = io.StringIO()
    out = Output(stdout=io.StringIO(), stderr=stderr, clock=clock)
    with out.progress("layer 1") as item:
        clock.now += 6
        item.advance(1500)
    assert stderr.getvalue() == "lazyfs: layer 1  1.5 kB\n"


def screen(text: str) -> list[str]:
    """Play cursor-up and erase-below, as a terminal would, and return the lines that stay."""
    lines: list[str] = []
    while text:
        if text.startswith("\x1b["):
            end = min(i for i, c in enumerate(text) if c in "AJ")
            if text[end] == "A":
                lines = lines[: len(lines) - int(text[2:end])]
            text = text[end + 1 :]
            continue
        line, _, text = text.partition("\n")
        lines.append(line)
    return lines


def test_bars_side_by_side_stay_below_what_is_printed_and_vanish_at_the_end() -> None:
    clock = Clock()
    stderr = Terminal()
    out = Output(stdout=stderr, stderr=stderr, clock=clock)
    with out.progress("one", 100) as one, out.progress("two", 100) as two:
        one.advance(25)
        clock.now += 1
        two.advance(50)
        out.line("a result in between")
        assert screen(stderr.getvalue()) == [
            "a result in between",
            "one  [######..................]  25 %  25 B of 100 B",
            "two  [############............]  50 %  50 B of 100 B",
        ]
    assert screen(stderr.getvalue()) == ["a result in between"]


def test_bars_are_drawn_ten_times_a_second_at_most() -> None:
    clock = Clock()
    stderr = Terminal()
    out = Output(stdout=io.StringIO(), stderr=stderr, clock=clock)
    with out.progress("one", 10_000) as item:
        before = stderr.tell()
        for _ in range(1000):
            item.advance(1)
        assert stderr.tell() == before
        clock.now += 0.2
        item.advance(1)
        assert stderr.tell() > before


def test_threads_lose_no_byte() -> None:
    out, _, _ = streams()
    with out.progress("layer", 80_000) as item:

        def work() -> None:
            for _ in range(10_000):
                item.advance(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert item.done == 80_000


def test_names_out_of_images_cannot_steer_the_terminal() -> None:
    out, stdout, _ = streams()
    out.line("evil \x1b]0;title\x07 \udcff name")
    assert stdout.getvalue() == "evil \\x1b]0;title\\x07 \\udcff name\n"
    assert printable("plain ü\tand\nlines") == "plain ü\tand\nlines"


def test_a_full_disk_behind_stdout_is_a_sentence() -> None:
    if not os.path.exists("/dev/full"):
        pytest.fail("this system has no /dev/full")
    stream = open("/dev/full", "w")
    out = Output(stdout=stream, stderr=io.StringIO())
    with pytest.raises(StoreBroken, match="No space left"):
        out.line("result")
    with pytest.raises(OSError, match="No space left"):
        stream.close()
