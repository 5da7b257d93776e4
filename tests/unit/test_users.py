"""Users of images: docker's rules, and files that try to lead out of the root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.container.rooted import read_in_root
from lazyfs.container.users import User, choose, resolve
from lazyfs.errors import ContainerFailed

PASSWD = b"root:x:0:0:root:/root:/bin/sh\n# none\n\nweb:x:33:34:w:/srv:/bin/sh\n1234:x:99:98::/n:/bin/sh\nodd:x:12\n"
GROUP = b"root:x:0:\nweb:x:34:web\nlogs:x:77:other,web\ndisk:x:6:root\nbad:x:-1:web\n"


@pytest.mark.parametrize(
    ("spec", "user"),
    [
        ("", User(0, 0, (6,), "/root")),
        ("root", User(0, 0, (6,), "/root")),
        ("0", User(0, 0, (6,), "/root")),
        ("web", User(33, 34, (77,), "/srv")),
        ("33", User(33, 34, (77,), "/srv")),
        ("web:logs", User(33, 77, (), "/srv")),
        ("web:5", User(33, 5, (), "/srv")),
        ("1000", User(1000, 0, (), "/")),
        ("1000:1001", User(1000, 1001, (), "/")),
        ("1234", User(99, 98, (), "/n")),
        (":web", User(0, 34, (), "/root")),
    ],
)
def test_docker_rules(spec: str, user: User) -> None:
    assert choose(spec, PASSWD, GROUP) == user


@pytest.mark.parametrize("spec", ["nobody", "web:nogroup", "-1", "4294967295", "²", "odd", "1e3"])
def test_unknown_names_are_told(spec: str) -> None:
    with pytest.raises(ContainerFailed, match="is not in the image's /etc/"):
        choose(spec, PASSWD, GROUP)


def test_image_without_files() -> None:
    assert choose("root:root", b"", b"") == User(0, 0, (), "/root")
    assert choose("7:8", b"", b"") == User(7, 8, (), "/")


@given(st.binary(max_size=300), st.binary(max_size=300), st.sampled_from(["", "0", "a", "a:b", "5:5"]))
def test_any_bytes_give_a_user_or_a_sentence(passwd: bytes, group: bytes, spec: str) -> None:
    try:
        user = choose(spec, passwd, group)
    except ContainerFailed:
        return
    assert 0 <= user.uid < 1 << 31 and 0 <= user.gid < 1 << 31


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(b"of the host")
    root = tmp_path / "root"
    (root / "etc/deep").mkdir(parents=True)
    (root / "etc/file").write_bytes(b"inside")
    return root


@pytest.mark.parametrize(
    ("link", "content"),
    [
        ("file", b"inside"),
        ("/etc/file", b"inside"),
        ("../../../../../etc/file", b"inside"),
        ("deep/../file", b"inside"),
        ("/../secret", None),
        ("../../secret", None),
        ("/proc/self/environ", None),
        ("link", None),
        ("missing", None),
        ("deep", None),
        ("file/..", None),
    ],
)
def test_links_stay_inside(root: Path, link: str, content: bytes | None) -> None:
    (root / "etc/link").symlink_to(link)
    assert read_in_root(str(root), b"/etc/link", 100) == content


def test_linked_directories(root: Path) -> None:
    (root / "usr").mkdir()
    (root / "usr/etc").symlink_to("../etc")
    assert read_in_root(str(root), b"/usr/etc/file", 100) == b"inside"


def test_only_regular_files_are_read_and_only_so_much(root: Path) -> None:
    os.mkfifo(root / "etc/fifo")
    assert read_in_root(str(root), b"/etc/fifo", 100) is None
    with pytest.raises(ContainerFailed, match="longer than 5 bytes"):
        read_in_root(str(root), b"/etc/file", 5)


def test_no_descriptor_is_left_open(root: Path) -> None:
    (root / "etc/link").symlink_to("/etc/deep/../../etc/file")
    before = len(os.listdir("/proc/self/fd"))
    read_in_root(str(root), b"/etc/link", 100)
    read_in_root(str(root), b"/etc/none/file", 100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_resolve_reads_the_image(root: Path) -> None:
    (root / "etc/passwd").write_bytes(PASSWD)
    (root / "etc/group").symlink_to("../../secret")
    assert resolve(str(root), "web") == User(33, 34, (), "/srv")
