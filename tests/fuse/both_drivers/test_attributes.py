"""Names and attributes through the mount: what a full unpack would show, down to devices, setuid and capabilities."""

from __future__ import annotations

import os
import stat

from tests.helpers import odd
from tests.helpers.blobs import without_sparse, zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import capability, char, dir_, fifo, file, hardlink, symlink, tar_of

LSTAT = """
found = os.lstat(a[0])
print(json.dumps([found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns, found.st_nlink,
                  found.st_rdev, found.st_blocks]))
"""


def test_large_directory_is_complete_and_sorted(node: Node, registry: FakeRegistry) -> None:
    names = [f"name-{i:05}-{'x' * (i % 60)}" for i in range(3000)]
    tree = node.mount(add(registry, "wide", zstd_chunked_layer(tar_of(*(file(f"d/{name}") for name in names)))))
    code = "print(json.dumps(os.listdir(a[0])))"
    assert node.python(code, tree / "d") == sorted(names)
    assert node.python(code, tree / "d") == sorted(names)  # and from the kernel's cache
    halves = """
fd = os.open(a[0], os.O_RDONLY)
first = os.listdir(fd)
again = os.listdir(fd)
print(json.dumps([first == again, len(first)]))
"""
    assert node.python(halves, tree / "d") == [True, 3000]


def test_attributes(node: Node, registry: FakeRegistry, driver: str) -> None:
    layer = zstd_chunked_layer(
        tar_of(
            file("f", b"12345", mode=0o2751, uid=3_000_000, gid=7, mtime_ns=1_500_000_000_123_456_789),
            hardlink("again", "f"),
            dir_("d", mode=0o1777),
            symlink("l", "d/nowhere"),
            char("null", 1, 3, mode=0o666),
            fifo("pipe", mode=0o600),
        )
    )
    tree = node.mount(add(registry, "attributes", layer))
    mode, uid, gid, size, mtime, nlink, _, blocks = node.python(LSTAT, tree / "f")
    assert (stat.S_IMODE(mode), uid, gid, size, nlink, blocks) == (
        0o2751,
        3_000_000,
        7,
        5,
        2,
        8 if driver == "erofs" else 1,
    )
    assert mtime == 1_500_000_000_123_456_789
    assert stat.S_IMODE(node.python(LSTAT, tree / "d")[0]) == 0o1777
    assert node.python("print(json.dumps(os.readlink(a[0])))", tree / "l") == "d/nowhere"
    found = node.python(LSTAT, tree / "null")
    assert stat.S_ISCHR(found[0]) and found[6] == os.makedev(1, 3)
    assert stat.S_ISFIFO(node.python(LSTAT, tree / "pipe")[0])
    same = "print(json.dumps(os.path.samefile(*a)))"
    assert node.python(same, tree / "f", tree / "again")


def test_devices_open(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "devices", zstd_chunked_layer(tar_of(char("zero", 1, 5, mode=0o666)))))
    assert node.tool("head", "-c", "4", tree / "zero").stdout == bytes(4)


def test_setuid_program_gets_its_owners_rights(node: Node, registry: FakeRegistry) -> None:
    with open("/usr/bin/id", "rb") as handle:
        program = handle.read()
    tree = node.mount(add(registry, "setuid", zstd_chunked_layer(tar_of(file("id", program, mode=0o4755, uid=1234)))))
    done = node.tool("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", tree / "id", "-u")
    assert done.stdout.strip() == b"1234", done.stderr


def test_xattrs_and_capabilities(node: Node, registry: FakeRegistry) -> None:
    layer = zstd_chunked_layer(
        tar_of(
            file("f", b"x", xattrs={"user.note": b"kept", "security.capability": capability()}),
            file("bare", b"x"),
            file("sly", b"x", xattrs={"trusted.overlay.opaque": b"y", "user.overlay.metacopy": b"x"}),
        )
    )
    tree = node.mount(add(registry, "xattrs", layer))
    code = "print(json.dumps({name: os.getxattr(a[0], name).hex() for name in os.listxattr(a[0])}))"
    assert node.python(code, tree / "f") == {
        "security.capability": capability().hex(),
        "user.note": b"kept".hex(),
    }
    assert node.python(code, tree / "bare") == {}
    assert node.python(code, tree / "sly") == {}  # an image could steer overlayfs with them
    assert node.layer(mount=-1)["dropped_xattrs"] == 2
    missing = """
try:
    os.getxattr(a[0], "user.nothing")
except OSError as error:
    print(error.errno == errno.ENODATA and "true" or "false")
"""
    assert node.python(missing, tree / "f") is True


def test_statfs(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "statfs", zstd_chunked_layer(tar_of(file("f", bytes(100_000))))))
    code = """
found = os.statvfs(a[0])
print(json.dumps([found.f_frsize * found.f_blocks, found.f_bfree, found.f_namemax, found.f_flag & os.ST_RDONLY != 0,
                  found.f_flag & (os.ST_NOSUID | os.ST_NODEV)]))
"""
    size, free, longest, read_only, cut = node.python(code, tree)
    assert size >= 100_000
    assert (free, longest, read_only, cut) == (0, 255, True, 0)


def test_nothing_can_be_changed(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "fixed", zstd_chunked_layer(tar_of(file("f", b"x"), dir_("d")))))
    code = """
def attempt(call, *words):
    try:
        call(*words)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
f, d = os.path.join(a[0], "f"), os.path.join(a[0], "d")
print(json.dumps([attempt(open, f, "wb"), attempt(os.unlink, f), attempt(os.rmdir, d), attempt(os.mkdir, d + "x"),
                  attempt(os.chmod, f, 0), attempt(os.rename, f, f + "x"), attempt(os.link, f, f + "x")]))
"""
    assert set(node.python(code, tree)) == {"EROFS"}


def test_names_that_are_not_there(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "absent", zstd_chunked_layer(tar_of(file("f", b"x")))))
    code = """
for path in (a[0] + "/no", a[0] + "/f/below"):
    try:
        os.lstat(path)
    except OSError as error:
        print(json.dumps(errno.errorcode[error.errno]) if path.endswith("below") else "", end="")
"""
    assert node.python(code, tree) == "ENOTDIR"
    node.tool("test", "-e", tree / "no")
    before = node.fuse_calls()["lookup"]
    for _ in range(3):
        assert node.tool("test", "-e", tree / "no").returncode == 1
    assert node.fuse_calls()["lookup"] == before  # an absence is remembered too


def test_everything_odd_at_once(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "odd", zstd_chunked_layer(without_sparse(odd.odd_tar()))))
    walk = """
count = 0
for path, directories, names in os.walk(os.fsencode(a[0])):
    for name in directories + names:
        whole = os.path.join(path, name)
        found = os.lstat(whole)
        count += 1
        if stat.S_ISREG(found.st_mode):
            with open(whole, "rb") as handle:
                assert len(handle.read()) == found.st_size, whole
        elif stat.S_ISLNK(found.st_mode):
            assert len(os.readlink(whole)) == found.st_size, whole
        os.listxattr(whole, follow_symlinks=False)
print(count)
"""
    assert node.python(walk, tree, timeout=60) > 150
    assert node.read(tree / "twice") == b"second and last"
    assert node.read(tree / "sparse" / "only-a-hole") == bytes(50_000)
