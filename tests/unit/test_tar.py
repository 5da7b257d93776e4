"""The tar scanner: every dialect read as Go's archive/tar reads it, any cut of the stream, nothing but TarInvalid."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import Kind
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.format.tar_headers import number, pax_records, seconds_to_ns
from tests.helpers import tars
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, hardlink, sparse, symlink, tar_of


def scan(data: bytes, step: int = 0, *, finish: bool = True) -> list[TarItem]:
    scanner = TarScanner()
    items: list[TarItem] = []
    for at in range(0, len(data), step or len(data) or 1):
        items += scanner.feed(data[at : at + (step or len(data))])
    if finish:
        scanner.finish()
    return items


def one(data: bytes) -> TarItem:
    (item,) = scan(tar_of(data))
    return item


def content(data: bytes, item: TarItem) -> bytes:
    """The expanded content of an item, straight from the stream."""
    stored = data[item.payload : item.payload + item.stored]
    if item.sparse is None:
        return stored
    out, at = bytearray(item.entry.size), 0
    for offset, size in item.sparse:
        out[offset : offset + size] = stored[at : at + size]
        at += size
    return bytes(out)


def test_a_plain_file_and_where_it_lies() -> None:
    data = tar_of(file("a/b", b"hello", mode=0o4750, uid=7, gid=8, uname="u", gname="g"), dir_("d"))
    first, second = scan(data)
    entry = first.entry
    assert (entry.path, entry.kind, entry.mode, entry.uid, entry.gid) == (b"a/b", Kind.REG, 0o4750, 7, 8)
    assert (entry.uname, entry.gname, entry.size, entry.mtime_ns) == ("u", "g", 5, tars.MTIME_NS)
    assert (first.start, first.payload, first.stored, first.end, first.sparse) == (0, 512, 5, 1024, None)
    assert (second.start, second.payload, second.stored, second.end) == (1024, 1536, 0, 1536)
    assert data[first.payload : first.payload + 5] == b"hello"


@pytest.mark.parametrize("style", ["pax", "gnu"])
def test_long_names_and_targets(style: tars.Style) -> None:
    name, target = b"n" * 120 + b"/" + b"m" * 120, b"t" * 300
    item = one(symlink(name, target, style=style))
    assert (item.entry.path, item.entry.link, item.start) == (name, target, 0)
    assert item.payload > 512


def test_prefix_of_ustar() -> None:
    name = "d" * 100 + "/" + "f" * 90
    assert one(file(name, style="ustar")).entry.path == name.encode()


def test_numbers_beyond_octal() -> None:
    item = one(file("f", uid=3_000_000, gid=4_000_000, mtime_ns=-(10**9), style="gnu"))
    assert (item.entry.uid, item.entry.gid, item.entry.mtime_ns) == (3_000_000, 4_000_000, -(10**9))
    big = scan(tars.declared("f", 9 << 30), finish=False)[0]
    assert (big.stored, big.entry.size) == (9 << 30, 9 << 30)
    big = scan(tars.declared("f", 9 << 30, style="gnu"), finish=False)[0]
    assert big.end == 512 + (9 << 30)


def test_number_fields() -> None:
    assert number(b"0000644\0") == 0o644
    assert number(b" 644 \0\0\0") == 0o644
    assert number(b"\0" * 8) == 0
    assert number(b"\x80" + b"\0" * 6 + b"\x05") == 5
    assert number(b"\xff" * 8) == -1
    for bad in (b"0o644\0\0\0", b"6_44\0\0\0\0", b"-644\0\0\0\0", b"999\0\0\0\0\0", b"\x80" + b"\xff" * 11):
        with pytest.raises(TarInvalid):
            number(bad)


@pytest.mark.parametrize(
    ("text", "ns"),
    [(b"1", 10**9), (b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"-0.25", -250_000_000),
     (b"1.0000000019", 10**9 + 1), (b"3.", 3 * 10**9)],
)  # fmt: skip
def test_pax_times(text: bytes, ns: int) -> None:
    assert seconds_to_ns(text) == ns


@pytest.mark.parametrize("ns", [0, -1, -1_500_000_000, 1_600_000_000_123_456_789, 5 * 10**18])
def test_times_survive(ns: int) -> None:
    assert one(file("f", mtime_ns=ns)).entry.mtime_ns == ns


def test_xattrs_are_bytes_and_sorted_and_empty_ones_left_out() -> None:
    xattrs = {"user.b": b"\0\xff=\n", "security.capability": tars.capability()}
    entry = one(file("f", xattrs={**xattrs, "user.empty": b""})).entry  # type: ignore[arg-type]
    assert entry.xattrs == tuple(sorted((key.encode(), value) for key, value in xattrs.items()))


def test_names_that_are_not_utf8_stay_bytes() -> None:
    first, second = scan(tar_of(file(b"\xe9\xff", b"x"), hardlink(b"l", b"./\xe9\xff")))
    assert first.entry.path == second.entry.link == b"\xe9\xff"


def test_names_are_cleaned() -> None:
    names = ["./a", "/b", "c//d/", ".", "./", "e/./f"]
    items = scan(tar_of(*(tars._entry(b"5", name, b"", {}, default_mode=0o755) for name in names)))
    assert [item.entry.path for item in items] == [b"a", b"b", b"c/d", b"", b"", b"e/f"]


def test_old_kinds() -> None:
    items = scan(
        tar_of(tars.old_file("d/", style="v7"), tars.old_file("f", b"x", style="v7"), tars.old_file("c", b"y", b"7"))
    )
    assert [item.entry.kind for item in items] == [Kind.DIR, Kind.REG, Kind.REG]
    assert [item.stored for item in items] == [0, 1, 1]


def test_devices_and_fifos() -> None:
    items = scan(tar_of(tars.char("c", 1, 3), tars.block("b", 250, 300_000), tars.fifo("p")))
    assert [(item.entry.kind, item.entry.rdev) for item in items] == [
        (Kind.CHAR, (1, 3)), (Kind.BLOCK, (250, 300_000)), (Kind.FIFO, (0, 0))]  # fmt: skip


def test_a_hard_link_has_no_payload_whatever_its_size_says() -> None:
    link = tars._entry(b"1", "l", b"", {}, default_mode=0o644, link="f", size=1000)
    items = scan(tar_of(file("f", b"x"), link, file("g", b"y")))
    assert [item.entry.path for item in items] == [b"f", b"l", b"g"]


def test_global_headers_are_passed_by_and_forget_what_came_before() -> None:
    records = [(b"path", b"changed"), (b"uid", b"5")]
    (item,) = scan(tar_of(tars.pax_header(records), tars.global_pax(records), file("f", b"x")))
    assert (item.entry.path, item.entry.uid) == (b"f", 0)
    assert item.start == 2048  # what belongs to nobody is not part of the entry


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 26, 60])
def test_sparse_files(form: tars.Sparseness, count: int) -> None:
    runs = [(3000 * i + 100, bytes([i + 1]) * (i * 7 + 1)) for i in range(count)]
    data = tar_of(sparse("s", runs, 200_000, form), file("next", b"n"))
    first, second = scan(data)
    assert (first.entry.path, first.entry.kind, first.entry.size) == (b"s", Kind.REG, 200_000)
    assert content(data, first) == tars.expand(runs, 200_000)
    assert first.sparse is not None and sum(size for _, size in first.sparse) == first.stored
    assert content(data, second) == b"n"


def test_gnu_tar_agrees_on_sparse_files(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.fail("GNU tar is needed")
    path = tmp_path / "s"
    with path.open("wb") as handle:
        for i in range(30):
            handle.seek(i * 65536)
            handle.write(b"%04096d" % i)
        handle.truncate(5_000_000)
    for options in (["--format=posix"], ["--format=gnu"], ["--format=posix", "--sparse-version=0.0"],
                    ["--format=posix", "--sparse-version=0.1"]):  # fmt: skip
        out = subprocess.run(
            ["tar", "-C", str(tmp_path), "--sparse", "--hole-detection=raw", *options, "-cf", "-", "s"],
            check=True, capture_output=True, timeout=30,
        ).stdout  # fmt: skip
        for step in (0, 700):
            (item,) = scan(out, step)
            assert item.sparse is not None, options
            assert content(out, item) == path.read_bytes(), options


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tarfile_agrees(style: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for i in range(200):
            info = tarfile.TarInfo(f"{'d' * (i % 90)}/{'f' * (i // 2 + 1)}")
            info.size, info.mode, info.uid, info.gid, info.mtime = i * 13, i % 512, i * 1000, i * 777, i * 10**6
            info.uname, info.gname = "user", "group"
            archive.addfile(info, io.BytesIO(bytes(i * 13)))
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [
            (m.name.encode().lstrip(b"/"), m.size, m.mode, m.uid, m.gid, int(m.mtime) * 10**9, m.uname, m.offset_data)
            for m in archive
        ]
    found = [
        (i.entry.path, i.entry.size, i.entry.mode, i.entry.uid, i.entry.gid, i.entry.mtime_ns, i.entry.uname, i.payload)
        for i in scan(data, 10_000)
    ]
    assert found == expected


def test_the_end_of_the_archive() -> None:
    assert len(scan(tar_of(file("a"), end=False))) == 1
    assert len(scan(tar_of(file("a"), end=False) + bytes(512))) == 1
    assert len(scan(tar_of(file("a")) + b"anything, for example another archive" * 1000)) == 1
    assert scan(b"") == []
    assert scan(bytes(10240)) == []
    assert len(scan(tar_of(file("a", b"x"), end=False)[:-511])) == 1  # padding of the last file may be missing


def test_settled_holds_back_incomplete_headers() -> None:
    data = tar_of(file("a", b"x" * 10), file("n" * 200, b"y"))
    scanner = TarScanner()
    scanner.feed(data[:1100])
    assert scanner.settled == 1024
    scanner.feed(data[1100:2200])
    assert scanner.settled == 1024
    (item,) = scanner.feed(data[2200:])
    assert item.start == 1024 and scanner.settled == len(data)


def _sum_signed(header: bytes) -> bytes:
    total = sum(b - 256 if b > 127 else b for b in header[:148] + header[156:512]) + 256
    return header[:148] + b"%06o\0 " % total + header[156:]


def test_both_checksums_hold() -> None:
    data = file(b"\xe9\xe8\xff" * 20, b"")
    assert scan(tar_of(_sum_signed(data)))[0].entry.path == b"\xe9\xe8\xff" * 20
    with pytest.raises(TarInvalid, match="checksum"):
        scan(tar_of(data[:148] + b"000001\0 " + data[156:]))


HUGE = tars.header(b"x", b"x", (1 << 20) + 512)
BAD: dict[str, tuple[bytes, str]] = {
    "leads out": (file("../etc/passwd"), "leads out"),
    "leads out inside": (file("a/../../b"), "leads out"),
    "link leads out": (hardlink("a", "../b"), "leads out"),
    "negative size": (tars._entry(b"0", "a", b"", {"style": "gnu"}, default_mode=0, size=-5), "absurd"),
    "absurd size": (tars.declared("a", (1 << 44) + 1), "absurd"),
    "name too long": (file("n" * 256), "longer"),
    "path too long": (file("n/" * 2100 + "n"), "longer"),
    "owner": (tars._entry(b"0", "a", b"", {"style": "gnu", "uid": -2}, default_mode=0), "owner"),
    "unknown kind": (tars._entry(b"V", "a", b"", {}, default_mode=0), "type"),
    "root as a file": (file("./", b"x"), "root"),
    "empty target": (symlink("a", ""), "target"),
    "device": (tars.char("c", 1 << 13, 0), "device"),
    "huge extension": (HUGE, "extension header"),
    "bad record": (tars.header(b"x", b"x", 5) + tars.pad(b"99 a="), "PAX record"),
    "NUL in a PAX path": (tars.pax_header([(b"path", b"a\0b")]) + file("x"), "malformed"),
    "xattrs": (file("a", xattrs={f"user.{i}": bytes(60_000) for i in range(3)}), "extended attributes"),
    "PAX size": (file("a", pax=[(b"size", b"-1")]), "absurd"),
    "PAX uid": (file("a", pax=[(b"uid", b"0x1")]), "owner"),
    "year 10000": (file("a", mtime_ns=253_402_300_800 * 10**9), "years"),
    "sparse overlap": (file("a", b"xx", pax=[(b"GNU.sparse.map", b"0,1,0,1"), (b"GNU.sparse.numblocks", b"2"),
                                              (b"GNU.sparse.size", b"9")]), "overlaps"),
    "sparse beyond the end": (file("a", b"xx", pax=[(b"GNU.sparse.map", b"8,2"), (b"GNU.sparse.numblocks", b"1"),
                                                     (b"GNU.sparse.size", b"9")]), "leaves the file"),
    "sparse, data left": (file("a", b"xxx", pax=[(b"GNU.sparse.map", b"0,2"), (b"GNU.sparse.numblocks", b"1"),
                                                  (b"GNU.sparse.size", b"9")]), "holds 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    data, reason = BAD[case]
    with pytest.raises(TarInvalid, match=reason):
        scan(tar_of(file("before", b"x"), data))


def test_refusals_name_the_entry() -> None:
    for data in (file("d/../../x"), tars.declared("d/../../x", 1 << 50), hardlink("d/../../x", "a")):
        with pytest.raises(TarInvalid) as caught:
            scan(tar_of(data))
        assert caught.value.entry == b"d/../../x"
    with pytest.raises(TarInvalid) as caught:
        scan(tar_of(file("long/" * 30 + "x", b"", uid=2**32 - 1)))
    assert caught.value.entry.startswith(b"long/long/")


@pytest.mark.parametrize("cut", [100, 512, 600, 1024, 1500, 1540, 2050])
def test_a_stream_that_stops_short(cut: int) -> None:
    data = tar_of(file("n" * 200, b"12345"))
    with pytest.raises(TarInvalid, match="ends"):
        scan(data[:cut])


def test_something_behind_a_single_zero_block() -> None:
    with pytest.raises(TarInvalid, match="single zero block"):
        scan(bytes(512) + file("a"))


def test_no_more_entries_than_allowed() -> None:
    scanner = TarScanner(max_entries=2)
    scanner.feed(file("a") + file("b"))
    with pytest.raises(TarInvalid, match="more than 2"):
        scanner.feed(file("c"))


def test_endless_extension_headers_are_refused() -> None:
    header = tars.pax_header([(b"comment", b"c" * 1_000_000)])
    with pytest.raises(TarInvalid, match="exceed"):
        scan(header * 5)


def test_records() -> None:
    assert pax_records(b"") == {}
    assert pax_records(b"7 a=bc\n7 a=de\n") == {b"a": b"de"}
    for bad in (
        b"7 a=bc",
        b"7 a=bcd\n",
        b"6 abc\n",
        b"5 =c\n",
        b"x a=b\n",
        b"0 a=b\n",
        b"99999999999999 a=b\n",
        b"2 \n",
    ):
        with pytest.raises(TarInvalid):
            pax_records(bad)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=60))
def test_any_cut_of_the_stream_gives_the_same_items(steps: list[int]) -> None:
    data = odd_tar()[:200_000]
    expected = scan(data, finish=False)
    scanner, items, at, turn = TarScanner(), [], 0, 0
    while at < len(data):
        step = steps[turn % len(steps)]
        items += scanner.feed(memoryview(data)[at : at + step])
        at, turn = at + step, turn + 1
    assert items == expected


def test_one_byte_at_a_time() -> None:
    data = tar_of(
        file("n" * 150, b"abc", xattrs={"user.a": b"b"}), sparse("s", [(10_000, b"x")], 20_000), symlink("l", "t")
    )
    assert scan(data, 1) == scan(data)


HEADERS: list[Callable[[], bytes]] = [
    lambda: tar_of(file("n" * 150, b"abc", xattrs={"user.a": b"b"}, uid=3_000_000, mtime_ns=1), dir_("d")),
    lambda: tar_of(sparse("s", [(i * 1000, b"x") for i in range(30)], 40_000, "gnu"), file("a", b"b")),
    lambda: tar_of(sparse("s", [(i * 1000, b"x") for i in range(30)], 40_000, "1.0"), file("a", b"b")),
    lambda: tar_of(sparse("s", [(1000, b"x")], 40_000, "0.1"), hardlink("a", "s")),
    lambda: tar_of(
        file("n" * 150, b"abc", style="gnu"), tars.old_file("d/", style="v7"), symlink("l" * 120, "t" * 120)
    ),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(HEADERS), st.data(), st.booleans())
def test_any_flipped_byte_gives_items_or_tar_invalid(
    make: Callable[[], bytes], data: st.DataObject, mend: bool
) -> None:
    """With `mend` the checksum is made right again, so that the damage reaches the fields behind it."""
    raw = bytearray(make())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    if mend:
        block = at - at % 512
        raw[block : block + 512] = tars.with_checksum(bytes(raw[block : block + 512]))
    try:
        items = scan(bytes(raw), 777)
    except TarInvalid:
        return
    for item in items:
        assert 0 <= item.start < item.payload <= item.end
        assert item.stored >= 0 and 0 <= item.entry.uid < 1 << 32


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_refused_or_empty(noise: bytes) -> None:
    try:
        items = scan(noise)
    except TarInvalid:
        return
    assert items == []


def test_items_are_independent_of_what_was_seen_before() -> None:
    """The scanner remembers owners and directories; that must never show."""
    alone = [one(file(f"d/{i}", b"x", uid=i, uname=f"u{i}")) for i in range(5)]
    together = scan(tar_of(*(file(f"d/{i}", b"x", uid=i, uname=f"u{i}") for i in range(5))))
    assert [item.entry for item in together] == [item.entry for item in alone]
    with pytest.raises(TarInvalid, match="leads out"):
        scan(tar_of(file("d/a"), file("d/..")))
    assert [item.entry.path for item in scan(tar_of(file("d/a"), dir_("d/."), file("d/.b")))] == [b"d/a", b"d", b"d/.b"]
