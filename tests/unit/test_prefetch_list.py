"""The list of `--prefetch`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.options import ConvertOptions, OutputForm
from indexer.prefetch import parse_prefetch, read_prefetch
from lazyfs.digest import EMPTY
from lazyfs.errors import UsageError
from lazyfs.format.trace import Read, Trace, encode


def test_paths_in_order_each_once(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# what the start reads\n/usr/bin/python3\n\n  ./etc/hosts  \r\nusr/bin/python3\nlib/x y\n")
    assert read_prefetch(path) == (b"usr/bin/python3", b"etc/hosts", b"lib/x y")


def test_record_files_of_the_optimizer() -> None:
    raw = (
        b'{"path":"usr/bin/caf\xc3\xa9","manifestDigest":"sha256:00","layerIndex":1}\n'
        b'{"path":"etc/passwd","manifestDigest":"sha256:00","layerIndex":0}\n'
    )
    assert parse_prefetch(raw, "record") == ("usr/bin/café".encode(), b"etc/passwd")


def test_a_trace_is_a_list_of_the_files_that_it_read_first(tmp_path: Path) -> None:
    reads = (Read(b"usr/bin/app", 1, 0, 9), Read(b"etc/caf\xe9", 0, 0, 9), Read(b"usr/bin/app", 1, 9, 9))
    (tmp_path / "start").write_bytes(encode(Trace(EMPTY, (EMPTY, EMPTY), reads)))
    assert read_prefetch(tmp_path / "start") == (b"usr/bin/app", b"etc/caf\xe9")
    with pytest.raises(UsageError, match="start begins like a trace and is none"):
        parse_prefetch((tmp_path / "start").read_bytes()[:-1], "start")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"../etc/shadow", "leads out"),
        (b"a\0b", "NUL"),
        (b"x" * 300, "longer"),
        (b"/", "the root"),
        (b"{not json", "not JSON"),
        (b'{"name": "x"}', '"path"'),
        (b'{"path": 3}', '"path"'),
        (b'{"path": "../x"}', "leads out"),
    ],
)
def test_a_bad_line_is_named(line: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_prefetch(b"good\n#\n" + line + b"\n", "my.list")
    assert "line 3 of my.list" in caught.value.message


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 20 << 20)
    for name, reason in (("none", "No such file"), ("fifo", "regular"), ("huge", "bytes"), ("", "regular|directory")):
        with pytest.raises(UsageError, match=reason):
            read_prefetch(tmp_path / name)
    with pytest.raises(UsageError, match="more than"):
        parse_prefetch(b"\n".join(b"%d" % n for n in range(100_001)), "long")


def test_podmans_form_has_no_prefetch_list() -> None:
    with pytest.raises(UsageError, match="prefetch"):
        ConvertOptions(form=OutputForm.PODMAN, prefetch=(b"a",)).check()


def test_levels_are_the_forms() -> None:
    assert ConvertOptions(form=OutputForm.ESTARGZ).compression == 6
    assert ConvertOptions().compression == 3
    with pytest.raises(UsageError, match="1 to 9"):
        ConvertOptions(form=OutputForm.ESTARGZ, level=10).check()


@given(st.binary(max_size=400))
def test_any_bytes_give_paths_or_a_sentence(raw: bytes) -> None:
    try:
        paths = parse_prefetch(raw, "any")
    except UsageError as error:
        assert error.message.startswith(("line ", "any begins like a trace"))
    else:
        assert len(set(paths)) == len(paths)
        assert all(path and not path.startswith(b"/") and b".." not in path.split(b"/") for path in paths)
