"""What is left of a sequence of entries: held against a real unpack, and every refusal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lazyfs.errors import TarInvalid
from lazyfs.format import namespace
from lazyfs.format.entry import Entry, Kind
from lazyfs.format.namespace import Live, Namespace
from tests.helpers.entries import BASE_LAYERS, entry, numbered
from tests.helpers.unpack import IMPLICIT, Ambiguous, Refused, Seen, Unpacker, seen_on_disk

LIMIT = 8.0  # seconds for 40,000 hostile entries; a quadratic step takes many minutes


def survivors(*entries: Entry) -> list[Live[int]]:
    space: Namespace[int] = Namespace()
    for number, one in enumerate(entries):
        space.add(one, number)
    return space.finish()


def paths(lives: list[Live[int]]) -> dict[bytes, Live[int]]:
    return {live.entry.path: live for live in lives}


def seen(lives: list[Live[int]]) -> dict[bytes, Seen]:
    """Lay survivors out as names, parents included."""
    of_path = paths(lives)
    groups: dict[bytes, list[bytes]] = {}
    for path, live in of_path.items():
        groups.setdefault(live.entry.link if live.entry.kind is Kind.HARDLINK else path, []).append(path)
    out = {b"": Seen(Kind.DIR, 0o755, IMPLICIT, b"", (b"",))}
    for path, live in of_path.items():
        above = path.rpartition(b"/")[0]
        while above and above not in of_path:
            out[above] = Seen(Kind.DIR, 0o755, IMPLICIT, b"", (above,))
            above = above.rpartition(b"/")[0]
        inode = of_path[live.entry.link].entry if live.entry.kind is Kind.HARDLINK else live.entry
        names = tuple(sorted(groups[inode.path]))
        link = inode.link if inode.kind is Kind.SYMLINK else b""
        mode = 0 if inode.kind is Kind.SYMLINK else inode.mode
        out[path] = Seen(inode.kind, mode, inode.uid, link, names)
    return out


def unpacked(entries: list[Entry]) -> dict[bytes, Seen]:
    with TemporaryDirectory() as name:
        root = os.path.join(os.fsencode(name), b"root")
        os.mkdir(root)
        os.chmod(root, 0o755)
        Unpacker(root).layer(entries)
        return seen_on_disk(root)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BASE_LAYERS)
def test_survivors_are_what_a_real_unpack_leaves(entries: list[Entry]) -> None:
    (entries,) = numbered([entries])
    try:
        expected = unpacked(entries)
    except Refused:
        event("refused")
        try:
            survivors(*entries)  # may bind hard links that come before their target, as a TOC may hold them
        except TarInvalid:
            event("refused by both")
        return
    assert seen(survivors(*entries)) == expected


@settings(max_examples=200, deadline=None)
@given(BASE_LAYERS, st.randoms(use_true_random=False))
def test_survivors_leave_themselves(entries: list[Entry], random: object) -> None:
    """A TOC holds survivors; the table is made by the same rules again."""
    (entries,) = numbered([entries])
    try:
        first = survivors(*entries)
    except TarInvalid:
        return
    again = survivors(*(live.entry for live in first))
    assert seen(again) == seen(first)
    assert [live.entry for live in again] == [live.entry for live in first]


def test_tags_stay_with_their_content() -> None:
    lives = paths(survivors(entry(b"a"), entry(b"b", Kind.HARDLINK, b"a"), entry(b"a"), entry(b"c")))
    assert lives[b"b"].entry.kind is Kind.REG
    assert (lives[b"b"].tag, lives[b"a"].tag, lives[b"c"].tag) == (0, 2, 3)


def test_survivors_come_in_the_order_of_their_content() -> None:
    """Chunks must stay in blob order when the name that carries them is a later hard link."""
    lives = survivors(entry(b"a"), entry(b"b"), entry(b"c", Kind.HARDLINK, b"a"), entry(b"a"))
    assert [live.entry.path for live in lives] == [b"c", b"b", b"a"]
    assert [live.tag for live in lives] == [0, 1, 3]


def test_links_lead_to_a_living_name() -> None:
    lives = paths(
        survivors(
            entry(b"d/a"),
            entry(b"x", Kind.HARDLINK, b"d/a"),
            entry(b"y", Kind.HARDLINK, b"x"),
            entry(b"d", Kind.SYMLINK, b"elsewhere"),
        )
    )
    assert lives[b"x"].entry.kind is Kind.REG
    assert lives[b"y"].entry.link == b"x"
    assert b"d/a" not in lives


def test_links_before_their_target_are_bound_at_the_end() -> None:
    lives = paths(
        survivors(entry(b"x", Kind.HARDLINK, b"y"), entry(b"y", Kind.HARDLINK, b"d/z"), entry(b"d/z", mode=0o600))
    )
    assert lives[b"x"].entry.link == lives[b"y"].entry.link == b"d/z"
    assert lives[b"d/z"].entry.kind is Kind.REG


def test_a_missing_part_of_a_symlink_that_is_left_again_is_not_made() -> None:
    lives = survivors(entry(b"l", Kind.SYMLINK, b"missing/../real"), entry(b"l/x"))
    assert sorted(live.entry.path for live in lives) == [b"l", b"real/x"]


def test_dangling_symlinks_are_parents_inside_the_root() -> None:
    lives = survivors(entry(b"d/l", Kind.SYMLINK, b"/../../x/y"), entry(b"d/l/z"))
    assert sorted(live.entry.path for live in lives) == [b"d/l", b"x/y/z"]


@pytest.mark.parametrize(
    ("entries", "name", "reason"),
    [
        ([entry(b"a", Kind.HARDLINK, b"a")], b"a", "to itself"),
        ([entry(b"a"), entry(b"a", Kind.HARDLINK, b"a")], b"a", "to itself"),
        ([entry(b"a", Kind.HARDLINK, b"nothing")], b"a", "'nothing', which is not in this layer"),
        ([entry(b"a", Kind.HARDLINK, b"no/parent")], b"a", "'no/parent', which is not in this layer"),
        ([entry(b"a", Kind.HARDLINK, b"b"), entry(b"b", Kind.HARDLINK, b"a")], b"a", "cycle of hard links"),
        ([entry(b"d", Kind.DIR), entry(b"a", Kind.HARDLINK, b"d")], b"a", "hard link to a directory"),
        ([entry(b"a", Kind.HARDLINK, b"d"), entry(b"d/x")], b"a", "hard link to a directory"),
        ([entry(b"d/x"), entry(b"d", Kind.HARDLINK, b"d/x")], b"d", "below the directory that it replaces"),
        ([entry(b".wh.x"), entry(b"a", Kind.HARDLINK, b".wh.x")], b"a", "hard link to a whiteout"),
        ([entry(b"a", Kind.HARDLINK, b".wh.x"), entry(b".wh.x")], b"a", "hard link to a whiteout"),
        ([entry(b"f"), entry(b"f/x")], b"f/x", "lies below b'f', which is not a directory"),
        ([entry(b"l", Kind.SYMLINK, b"f"), entry(b"f"), entry(b"l/x")], b"l/x", "not a directory"),
        ([entry(b"p", Kind.FIFO), entry(b"p/x")], b"p/x", "not a directory"),
        ([entry(b"l", Kind.SYMLINK, b"n" * 256), entry(b"l/x")], b"l/x", "a name longer than a file system takes"),
        ([entry(b"l", Kind.SYMLINK, b"l"), entry(b"l/x")], b"l/x", "cycle of symbolic links"),
        (
            [entry(b"l", Kind.SYMLINK, b"m"), entry(b"m", Kind.SYMLINK, b"/l"), entry(b"l/x")],
            b"l/x",
            "cycle of symbolic links",
        ),
        ([entry(b".wh.d/x")], b".wh.d/x", "below a whiteout"),
        ([entry(b".wh.d", Kind.DIR), entry(b".wh.d/x")], b".wh.d/x", "below a whiteout"),
        ([entry(b"d/.wh.")], b"d/.wh.", "whiteout of nothing"),
        ([entry(b"d/.wh..")], b"d/.wh..", "whiteout of nothing"),
        ([entry(b".wh...")], b".wh...", "whiteout of nothing"),
        ([entry(b"")], b"/", "the root is not a directory"),
        ([entry(b"", Kind.SYMLINK, b"x")], b"/", "the root is not a directory"),
    ],
)
def test_refusals_name_the_entry(entries: list[Entry], name: bytes, reason: str) -> None:
    with pytest.raises(TarInvalid) as caught:
        survivors(*entries)
    assert caught.value.entry == name
    assert reason in str(caught.value)


def test_real_paths_are_bounded() -> None:
    """Each symlink makes the path a little longer; a real unpack stops where the kernel does."""
    long = b"/".join([b"n" * 200] * 20)
    with pytest.raises(TarInvalid, match="deeper than a file system takes"):
        survivors(entry(b"l", Kind.SYMLINK, long), entry(b"l/" + long + b"/x"))
    with pytest.raises(TarInvalid, match="deeper than a file system takes"):
        survivors(entry(long, Kind.DIR), entry(b"l", Kind.SYMLINK, long), entry(b"l/" + b"x" * 250))


def test_the_number_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "MAX_NAMES", 100)
    with pytest.raises(TarInvalid, match="more than 100 entries"):
        survivors(*(entry(b"%d" % i) for i in range(101)))
    with pytest.raises(TarInvalid, match="more than 100 entries"):
        survivors(*(entry(b"%d/a/b/c" % i) for i in range(40)))


def _replaced(count: int) -> list[Entry]:
    out = []
    for i in range(count // 4):
        out += [entry(b"d", Kind.DIR), entry(b"d/sub/%d" % i), entry(b"d/sub", Kind.FIFO), entry(b"d", Kind.FIFO)]
    return out


def _unbound(count: int) -> list[Entry]:
    links = [entry(b"%d" % i, Kind.HARDLINK, b"%d" % (i + 1)) for i in range(count - 1)]
    return [*links, entry(b"%d" % (count - 1))]


def _bound_to_one(count: int) -> list[Entry]:
    return [entry(b"f"), *(entry(b"%d" % i, Kind.HARDLINK, b"f") for i in range(count - 1))]


def _one_big_cycle(count: int) -> list[Entry]:
    return [entry(b"%d" % i, Kind.HARDLINK, b"%d" % ((i + 1) % count)) for i in range(count)]


def _symlink_chain(count: int) -> list[Entry]:
    """Parents forty symlinks away, the way there forgotten each time."""
    links = [entry(b"l%d" % i, Kind.SYMLINK, b"l%d" % (i + 1)) for i in range(39)]
    out = [*links, entry(b"l39", Kind.DIR)]
    for i in range(count // 2):
        out += [entry(b"l0/%d" % i), entry(b"s", Kind.SYMLINK, b"%d" % i)]
    return out


def _dotted_symlinks(count: int) -> list[Entry]:
    """Two thousand steps that lead nowhere, on each way."""
    out = [entry(b"d", Kind.DIR), entry(b"l", Kind.SYMLINK, b"d/../" * 800 + b"d")]
    for i in range(count // 2):
        out += [entry(b"l/%d" % i), entry(b"s", Kind.SYMLINK, b"%d" % i)]
    return out


def _deep(count: int) -> list[Entry]:
    """Two thousand directories deep, in a tree that is thrown away now and then."""
    deep = b"/".join([b"d"] * 1900)
    out = []
    for i in range(count // 100):
        out += [entry(deep + b"/%d" % i), entry(b"x", Kind.DIR), entry(b"x", Kind.FIFO)]
    return out


@pytest.mark.parametrize(
    "make", [_replaced, _unbound, _bound_to_one, _one_big_cycle, _symlink_chain, _dotted_symlinks, _deep]
)
def test_hostile_layers_take_time_in_proportion(make: Callable[[int], list[Entry]]) -> None:
    entries = make(40_000)
    before = time.process_time()
    try:
        survivors(*entries)
    except TarInvalid as error:
        assert "cycle" in str(error) or "too many" in str(error)
    assert time.process_time() - before < LIMIT


def test_the_reference_itself(tmp_path: Path) -> None:
    """The measure must not be bent: it refuses and it follows."""
    with pytest.raises(Refused):
        unpacked([entry(b"f"), entry(b"f/x")])
    with pytest.raises(Refused):
        unpacked([entry(b"a", Kind.HARDLINK, b"b")])
    found = unpacked([entry(b"l", Kind.SYMLINK, b"/d"), entry(b"l/x")])
    assert found.keys() == {b"", b"l", b"d", b"d/x"}
    root = os.path.join(os.fsencode(tmp_path), b"root")
    os.mkdir(root)
    unpacker = Unpacker(root)
    unpacker.layer([entry(b"d/x")])
    with pytest.raises(Ambiguous):
        unpacker.layer([entry(b"d"), entry(b"d", Kind.DIR)])
