"""`lazyfs trace show`: any trace is drawn, within the terminal's width, and no path of an image steers its reader."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.cli import waterfall, waterfall_html, waterfall_text
from lazyfs.cli.main import main
from lazyfs.format.trace import Read, Request, Trace, encode
from lazyfs.limits import MAX_TRACE
from tests.unit.test_trace import LAYERS, MANIFEST, every

EVIL = (
    b"<script>alert(1)</script>",
    b"a\"onload='x'&lt;",
    b"red\x1b[31m\x1b]0;title\x07",
    b"\xff\xfe/line\nbreak\ttab\r",
    "日本語のとても長いファイル名です/これはもっと長い.txt".encode() * 4,
    "right\u202eto\u2066left".encode(),
    b"</title></svg></div><img src=x>",
)
START = Trace(
    MANIFEST,
    LAYERS,
    (
        Read(b"bin/sh", 0, 0, 100, 0.0, 0.1),
        Read(b"lib/libc.so.6", 0, 0, 4096, 0.1, 0.3),
        Read(b"lib/libc.so.6", 0, 4096, 4096, 0.2, 0.3),
        Read(b"etc/passwd", 1, 0, 50, 0.5, 0.0),
    ),
    (
        Request(0, 1000, 5000, 0, 0.1, 0.2, 0.4),
        Request(1, 0, 700, 1, 0.2, 0.3, 0.35),
        Request(1, 700, 10**6, 2, 5.0, 6.0, 9.0),
    ),
    1.0,
    ("sh", "-c", "true"),
)


ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "code", "table", "tr", "td", "span", "div",
    "input", "label", "svg", "text", "line", "g", "rect",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text: list[str] = []
        self.policy = self.style = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        elif ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text.append(data)


def text_of(trace: Trace, width: int = 80, *, everything: bool = False) -> list[str]:
    return list(waterfall_text.lines(trace, waterfall.summarise(trace, 10), width, everything))


def page_of(trace: Trace) -> str:
    return waterfall_html.page(trace, waterfall.summarise(trace, 10))


def written(path: Path, trace: Trace) -> str:
    path.write_bytes(encode(trace))
    return str(path)


@given(every, st.integers(1, 500), st.booleans())
@settings(max_examples=60)
def test_any_trace_is_drawn_within_the_width(trace: Trace, width: int, everything: bool) -> None:
    for line in text_of(trace, width, everything=everything):
        marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in line)  # they stand above the character before
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
        assert len(line) - marks + wide <= max(width, waterfall_text.MIN_WIDTH)
        assert line.isprintable()


@given(every)
@settings(max_examples=40)
def test_any_trace_gives_a_page_of_known_elements(trace: Trace) -> None:
    page = Page(page_of(trace))
    assert not page.open
    assert set(page.tags) <= ELEMENTS
    assert not [name for name in page.attributes if name.startswith("on") or name in ("href", "src", "style")]


def test_names_from_an_image_are_harmless_in_text_and_page() -> None:
    trace = Trace(
        MANIFEST, LAYERS, tuple(Read(path, 0, 0, 1, 0.1, 0.1) for path in EVIL), (), 1.0, ("\x1b[2J<b>", "\udcff\n")
    )
    text, raw = "\n".join(text_of(trace, 100)), page_of(trace)
    for steering in ("\x1b", "\x07", "\r", "\t", "\u202e", "\u2066"):
        assert steering not in text and steering not in raw
    page = Page(raw)
    assert "script" not in page.tags and "img" not in page.tags
    for shown in ("<script>alert(1)</script>", "a\"onload='x'&lt;", "red\\x1b[31m\\x1b]0;title\\x07"):
        assert shown in text and shown in page.text
    assert "\\xff\\xfe/line\\nbreak\\ttab\\r" in page.text
    assert "\\x1b[2J<b> \\xff\\n" in page.text


def test_the_page_allows_a_browser_nothing_but_its_own_style() -> None:
    page = Page(page_of(START))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert page.policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "prefers-color-scheme: dark" in page.style and "url(" not in page.style and "@import" not in page.style


def test_what_a_start_did_is_told() -> None:
    lines = text_of(START, 100)
    assert "command sh -c true" in lines
    assert "ready after 1.000 s" in lines
    assert "3 files, 4 chunks, 8.3 kB demanded; stalled 0.500 s by the clock, 0.700 s added up" in lines
    assert "requests: 1 demand (5.0 kB), 1 prefetch (700 B), 1 background (1.0 MB)" in lines
    assert "not drawn: 1 request that began afterwards" in lines
    rows = [line.split()[0] for line in lines if re.match(r"(bin/|lib/|etc/)", line)]
    assert rows == ["bin/sh", "lib/libc.so.6", "etc/passwd"]
    (libc,) = (line for line in lines if line.startswith("lib/"))
    assert libc.endswith("0.600 s")
    bar = libc[libc.index("#") : libc.rindex("#") + 1]
    assert set(bar) == {"#"}  # its two waits overlap
    (request,) = (line for line in lines if line.startswith("layer 0"))
    assert "layer 0 D 1000+5000" in request and re.search(r" -+=+ ", request)
    at = lines.index("files that stalled longest")
    assert [line.split() for line in lines[at + 1 :]] == [
        ["0.600", "s", "2", "of", "2", "chunks", "lib/libc.so.6"],
        ["0.100", "s", "1", "of", "1", "chunk", "bin/sh"],
    ]


def test_the_page_names_the_files_that_stalled_longest_in_order() -> None:
    more = (Read(b"usr/late", 0, 0, 9, 0.6, 0.35), Read(b"usr/short", 0, 0, 9, 0.7, 0.05))
    text = [part for part in Page(page_of(replace(START, reads=START.reads + more))).text if part.strip()]
    begin, end = text.index("Files that stalled longest"), text.index("Waterfall")
    cells = text[begin + 1 : end]
    assert [cells[at : at + 3] for at in range(0, len(cells), 3)] == [
        ["0.600 s", "2 of 2 chunks", "lib/libc.so.6"],
        ["0.350 s", "1 of 1 chunk", "usr/late"],
        ["0.100 s", "1 of 1 chunk", "bin/sh"],
        ["0.050 s", "1 of 1 chunk", "usr/short"],
    ]
    nothing = replace(START, reads=tuple(replace(read, waited=0.0) for read in START.reads))
    assert "Files that stalled longest" not in Page(page_of(nothing)).text


@given(st.integers(1, 10**6), st.integers(40, 200))
def test_the_axis_tells_whole_numbers_at_their_place(ready: int, width: int) -> None:
    lines = text_of(Trace(MANIFEST, LAYERS, (Read(b"a", 0, 0, 1),), (), ready / 1000), width)
    axis, row = lines[lines.index("") + 1 : lines.index("") + 3]
    begin, end = row.index("."), row.rindex("|")
    assert axis.index("0 s") == begin
    for told in re.finditer(r"(\S+) s", axis):
        place = begin + float(told[1]) * 1000 / ready * (end + 1 - begin)
        assert told.start() == pytest.approx(place, abs=1.01)


def test_thousands_of_reads_fit_a_terminal_and_none_is_lost() -> None:
    reads = tuple(
        Read(b"usr/lib/%d/file" % (n // 2), 0, n, 10, n / 1000, 0.5 if n in (1000, 4000) else 0.0) for n in range(5000)
    )
    trace = Trace(MANIFEST, LAYERS, reads, tuple(Request(0, n, 1, 2, n / 200, n / 200, 1) for n in range(1000)), 6.0)
    lines = text_of(trace)
    assert len(lines) < 100
    assert any(line.startswith("usr/lib/500/file") and line.endswith("0.500 s") for line in lines)
    assert any("--all" in line for line in lines)
    groups = [int(line.split()[0]) for line in lines if " files in usr/lib" in line]
    alone = [line for line in lines if line.startswith("usr/lib/")]
    assert sum(groups) + len(alone) == 2500
    everything = text_of(trace, everything=True)
    assert sum(line.startswith("usr/lib/") for line in everything) == 2500
    assert sum(line.startswith("layer 0 B") for line in everything) == 1000
    assert len(page_of(trace)) < 3_000_000


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 40))
def test_folding_keeps_all_in_order_and_the_heaviest_alone(weights: list[int], limit: int) -> None:
    pieces = waterfall.folded(weights, limit)
    assert [place for piece in pieces for place in range(piece.start, piece.stop)] == list(range(len(weights)))
    assert len(pieces) <= limit
    if len(weights) <= limit:
        assert len(pieces) == len(weights)
    if weights.count(3) == 1 and limit >= 3:
        assert slice(weights.index(3), weights.index(3) + 1) in pieces


def test_the_command_draws_as_wide_as_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = written(tmp_path / "t", START)
    for columns, width in (("120", 120), ("", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(os, "get_terminal_size", lambda fd=1: (_ for _ in ()).throw(OSError()))
        assert main(["trace", "show", name]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert width - 20 < max(map(len, lines)) <= width


def test_json_is_the_trace_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace(MANIFEST, LAYERS, (*START.reads, Read(b"\xff", 0, 0, 1)), START.requests, 1.0, START.command)
    assert main(["trace", "show", "--json", "--files", "1", written(tmp_path / "t", trace)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["manifest"] == MANIFEST and found["layers"] == list(LAYERS) and found["html"] is None
    assert [Read(os.fsencode(one.pop("path")), **one) for one in found["reads"]] == list(trace.reads)
    assert [one["priority"] for one in found["requests"]] == ["demand", "prefetch", "background"]
    assert found["summary"]["stalled"] == 0.7 and found["summary"]["stalled_by_clock"] == 0.5
    assert found["summary"]["requests"]["prefetch"] == {"count": 1, "size": 700}
    assert [one["path"] for one in found["summary"]["longest"]] == ["lib/libc.so.6"]


def test_a_page_is_written_whole_and_never_over_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = written(tmp_path / "t", START), tmp_path / "out.html"
    command = ["trace", "show", name, "--html", str(out)]
    assert main(command) == 0
    first = out.read_text("utf-8")
    assert Page(first).policy
    out.write_text("mine")
    assert main(command) == 2
    assert out.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert out.read_text("utf-8") == first
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["html"] == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "t"]


def test_a_place_for_a_page_that_is_none_is_told_before_the_trace_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "missing" / "out", tmp_path, tmp_path / "fifo", Path("/dev/null")):
        assert main(["trace", "show", str(tmp_path / "t"), "--force", "--html", str(place)]) == 2
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_is_no_trace_is_told_and_no_pipe_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("no trace")
    (tmp_path / "large").write_bytes(bytes(MAX_TRACE + 1))
    for name, code in (("fifo", 2), ("missing", 2), (".", 2), ("text", 7), ("large", 7)):
        assert main(["trace", "show", str(tmp_path / name)]) == code
        assert str(tmp_path / name).rstrip("/.") in capsys.readouterr().err
    for wrong in (["trace"], ["trace", "show"], ["trace", "show", "--files", "-1", "x"]):
        assert main(wrong) == 2
