"""EROFS images as others see them: the kernel, which mounts them with files as devices, and the tools of EROFS."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from msgspec.structs import replace

from lazyfs.format.entry import Entry, Kind
from lazyfs.format.erofs_write import write_erofs
from tests.helpers.entries import entry
from tests.helpers.erofs_images import KEY, image_of, mounted
from tests.helpers.erofs_reader import Image
from tests.helpers.layer_tables import tree_at
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, hardlink, opaque, symlink, tar_of, whiteout
from tests.helpers.trees import Node, compare, snapshot, umoci_image, umoci_unpack

BASE = (
    dir_("./", mode=0o755),
    dir_("kept", mode=0o750, mtime_ns=1_500_000_000_000_000_001),
    file("kept/old", b"old", uid=7),
    file("kept/removed", b"x"),
    file("gone/with/all", b"x"),
    dir_("opaque", mode=0o711),
    file("opaque/hidden", b"hidden"),
    file("pair-1", b"one of three", mode=0o640),
    hardlink("pair-2", "pair-1"),
    hardlink("kept/pair-3", "pair-1"),
    symlink("to-kept", "kept"),
)
MIDDLE = (dir_("./", mode=0o755), dir_("nothing-but-names"), symlink("nothing-but-names/link", "/" + "x/" * 2000))
TOP = (
    dir_("./", mode=0o711, mtime_ns=1_600_000_000_000_000_009),
    whiteout("kept/removed"),
    file("kept/new", b"new" * 5000),
    dir_("opaque", mode=0o711),
    opaque("opaque"),
    file("opaque/shown", b"shown"),
    whiteout("gone"),
    whiteout("pair-2"),
    file("to-kept/through-a-link", b"placed by a symlink of the lower layer"),
)


def tool(*words: str | Path) -> str:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def undated(full: dict[bytes, Node], found: dict[bytes, Node]) -> set[bytes]:
    """Directories that no entry names: an unpack dates them with its own time."""
    return {b""} | {name for name, node in found.items() if node.mtime_ns == 0 and full[name].mtime_ns > 10**18}


def check_against_a_full_unpack(directory: Path, *tars: bytes) -> None:
    image, devices = image_of(directory, *tars)
    want = snapshot(umoci_unpack(umoci_image(directory, *tars), "latest", directory / "full"))
    with mounted(image, devices, directory / "mnt") as at:
        found = snapshot(at)
        assert compare(found, want, undated=undated(want, found)) == []
        numbers = [os.lstat(os.path.join(os.fsencode(at), name)).st_ino for name in found]
        assert 0 not in numbers
    options = [f"--device={device}" for device in devices]
    tool("fsck.erofs", *options, image)
    told = tool("dump.erofs", "-s", *options, image)
    assert "sb_csum mtime chunked_file device_table" in told
    assert f"inode count: {len(set(numbers))}".replace(" ", "") in told.replace(" ", "")


def test_every_odd_entry(tmp_path: Path) -> None:
    check_against_a_full_unpack(tmp_path, odd_tar())


def test_a_chain_of_layers(tmp_path: Path) -> None:
    check_against_a_full_unpack(tmp_path, tar_of(*BASE), tar_of(*MIDDLE), tar_of(*TOP))


def test_200_000_names_and_66_000_links(tmp_path: Path) -> None:
    names = [b"%06d" % number for number in range(200_000)]
    layer = [replace(entry(b"d/000000"), uid=7)]
    layer += [Entry(b"d/" + name, Kind.HARDLINK, 0, 0, 0, 0, link=b"d/000000") for name in names[1:66_000]]
    layer += [entry(b"d/" + name) for name in names[66_000:]]
    long = [b"n" * 252 + b"%03d" % number for number in range(500)]
    layer += [entry(b"long/" + name) for name in long]
    tree, tables = tree_at(tmp_path, [layer])
    write_erofs(tmp_path / "image", tree, tables, KEY)
    assert len(Image((tmp_path / "image").read_bytes()).names()) == 200_503
    with mounted(tmp_path / "image", [], tmp_path / "mnt") as at:
        assert os.listdir(os.fsencode(at / "d")) == names  # in order, as written
        assert os.listdir(os.fsencode(at / "long")) == long
        one, other = os.lstat(at / "d/000000"), os.lstat(at / "d/065999")
        assert one.st_ino == other.st_ino and one.st_nlink == 66_000 and other.st_uid == 7
        assert os.lstat(at / "d/199999").st_nlink == 1
        assert not (at / "d/200000").exists()
        assert all(os.path.lexists(os.path.join(os.fsencode(at), b"long", name)) for name in long)
