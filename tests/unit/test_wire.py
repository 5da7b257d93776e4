"""FUSE's messages: what is written has the kernel's layout, what was asked for is taken from the right place."""

from __future__ import annotations

import ast
import errno
import os
import stat
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import errors, limits, notify, units
from lazyfs.mount import children, deaths, greeting, holder, premises, wire
from lazyfs.mount.forest import Attributes, NoSuchName
from lazyfs.mount.wire import Listing

U64 = st.integers(0, (1 << 64) - 1)
ATTRIBUTES = st.builds(
    Attributes,
    node=st.integers(1, (1 << 63) - 1),
    mode=st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o600]),
    nlink=st.integers(1, 1 << 20),
    uid=st.integers(0, (1 << 32) - 1),
    gid=st.integers(0, (1 << 32) - 1),
    size=st.integers(0, 1 << 50),
    mtime_ns=st.integers(-(1 << 60), 1 << 62),
    rdev=st.builds(os.makedev, st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
)
NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name)


def request(opcode: int, body: bytes, node: int = 5, unique: int = 9) -> memoryview:
    return memoryview(struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 77, 0, 0) + body)


@given(unique=U64, node=U64)
def test_a_header_is_taken_apart(unique: int, node: int) -> None:
    assert wire.decode_header(request(15, b"", node, unique)) == (15, unique, node, 77)


@given(found=ATTRIBUTES)
def test_attributes_lie_where_the_kernel_looks(found: Attributes) -> None:
    raw = wire.entry_out(found, 10, 20)
    assert len(raw) == 128 and len(wire.attr_out(found, 20)) == 104
    assert struct.unpack_from("=QQQQII", raw) == (found.node, 0, 10, 20, 0, 0)
    ino, size, _, _, mtime, _, _, nanoseconds, _, mode, nlink, uid, gid, rdev = struct.unpack_from("=6QIII6I", raw, 40)[
        :14
    ]
    assert (ino, size, mode, nlink, uid, gid) == (
        found.node, found.size, found.mode, found.nlink, found.uid, found.gid
    )  # fmt: skip
    seconds = mtime - (1 << 64) if mtime >> 63 else mtime
    assert seconds * 1_000_000_000 + nanoseconds == found.mtime_ns
    # the kernel's new_decode_dev
    assert ((rdev & 0xFFF00) >> 8, rdev & 0xFF | (rdev >> 12) & 0xFFF00) == (os.major(found.rdev), os.minor(found.rdev))


@given(entries=st.lists(st.tuples(NAMES, ATTRIBUTES), max_size=20), room=st.integers(0, 4096), plus=st.booleans())
def test_a_listing_holds_whole_entries_and_no_more_than_its_room(
    entries: list[tuple[bytes, Attributes]], room: int, plus: bool
) -> None:
    listing = Listing(room, plus=plus)
    added = 0
    for number, (name, found) in enumerate(entries):
        if not listing.add(name, found, number + 1, 3, 4):
            break
        added += 1
    raw = listing.encode()
    assert len(raw) <= room and len(raw) % 8 == 0
    at = 0
    for number, (name, found) in enumerate(entries[:added]):
        at += 128 * plus
        ino, cookie, length, kind = struct.unpack_from("=QQII", raw, at)
        assert (ino, cookie, kind) == (found.node, number + 1, stat.S_IFMT(found.mode) >> 12)
        assert raw[at + 24 : at + 24 + length] == name
        at += 24 + length + -(24 + length) % 8
    assert at == len(raw)


@given(value=st.binary(max_size=100), room=st.integers(0, 100))
def test_a_value_is_whole_or_refused(value: bytes, room: int) -> None:
    if room and len(value) > room:
        with pytest.raises(NoSuchName) as caught:
            wire.value_out(value, room)
        assert caught.value.errno == errno.ERANGE
    else:
        assert wire.value_out(value, room) == (value if room else struct.pack("=II", len(value), 0))


@given(name=NAMES, handle=U64, offset=U64, size=st.integers(0, (1 << 32) - 1))
def test_bodies_are_taken_apart(name: bytes, handle: int, offset: int, size: int) -> None:
    assert wire.name_in(memoryview(name + b"\0")) == name
    assert wire.xattr_in(memoryview(struct.pack("=II", size, 0) + name + b"\0")) == (size, name)
    assert wire.read_in(memoryview(struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0))) == (handle, offset, size)
    assert wire.interrupted_in(memoryview(struct.pack("=Q", handle))) == handle


def test_init_is_answered_with_what_both_can() -> None:
    flags = (1 << 64) - 1
    body = struct.pack("=IIIII44x", 7, 99, 1 << 17, flags & 0xFFFFFFFF, flags >> 32)
    found = greeting.decode(bytes(request(26, body)))
    assert len(found.raw) == 104 and found.can_resend and found.is_known
    answer = greeting.answer(found)
    length, error, unique = struct.unpack_from("=IiQ", answer)
    assert (length, error, unique) == (len(answer), 0, 9) and length == 16 + 64
    major, minor, _, low, background, congestion, max_write, _, pages, _, high = struct.unpack_from(
        "=IIIIHHIIHHI", answer, 16
    )
    assert (major, minor, background, congestion, max_write, pages) == (7, 39, 16384, 12288, 4096, 256)
    assert not (low | high << 32) & ~greeting._WANTED
    old = greeting.decode(bytes(request(26, struct.pack("=IIII", 7, 31, 1 << 17, 1))))
    assert not old.can_resend and struct.unpack_from("=II", greeting.answer(old), 16) == (7, 31)
    with pytest.raises(ValueError, match="began with request 15"):
        greeting.decode(bytes(request(15, body)))


def test_the_holder_imports_nothing_that_can_break() -> None:
    for module in (holder, greeting, children, deaths, premises, limits, units, errors, notify):
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = {(node.module, alias.name) for node in froms for alias in node.names if node.module.startswith("lazyfs")}  # type: ignore[union-attr]
        looked_at = {"errors", "limits", "units", "mount.children", "mount.deaths", "mount.premises"}
        assert {name for name, _ in ours} <= {f"lazyfs.{name}" for name in looked_at} | {"lazyfs", "lazyfs.mount"}
        assert {name for where, name in ours if where in ("lazyfs", "lazyfs.mount")} <= {"greeting", "notify"}
        foreign = {name.partition(".")[0] for name in [*names, *(node.module or "" for node in froms)]} - {"lazyfs"}
        assert foreign <= sys.stdlib_module_names
