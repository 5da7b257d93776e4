"""What the erofs driver promises by itself: warm data is the kernel's alone, and a page is right or it is an error."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.container import mounts
from lazyfs.limits import MAX_WAITING_REQUESTS
from lazyfs.mount.erofs_probe import Verdict, probe
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SMALL = {f"d{i % 5}/f{i}": pattern(9000 + i, i) for i in range(40)}
BIG = pattern(3_000_001, 99)

WALK = """
for path, _, names in os.walk(a[0]):
    os.lstat(path)
    for name in names:
        whole = os.path.join(path, name)
        os.lstat(whole)
        os.listxattr(whole)
        with open(whole, "rb") as handle:
            handle.read()
    try:
        os.lstat(os.path.join(path, "no-such-name"))
    except FileNotFoundError:
        pass
"""
DROP = """
for path, _, names in os.walk(a[0]):
    for name in names:
        os.posix_fadvise(os.open(os.path.join(path, name), os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""
READERS = """
import os, sys, threading, time
top, names = sys.argv[1], sys.argv[2:]
begun = []
def read(name):
    fd = os.open(os.path.join(top, name), os.O_RDONLY)
    begun.append(name)
    print(len(os.read(fd, 1 << 20)), flush=True)
threads = [threading.Thread(target=read, args=(name,)) for name in names]
for thread in threads:
    thread.start()
while len(begun) < len(names):
    time.sleep(0.01)
time.sleep(0.5)
print("all of them wait", flush=True)
for thread in threads:
    thread.join()
"""
# what each page of a file is: the right one, an error, or anything else
PAGES = """
wanted = open(a[1], "rb").read()
fd = os.open(a[0], os.O_RDONLY)
found = {"right": 0, "error": 0, "wrong": 0}
for at in range(0, len(wanted), 4096):
    try:
        found["right" if os.pread(fd, 4096, at) == wanted[at : at + 4096] else "wrong"] += 1
    except OSError as error:
        found["error" if error.errno == errno.EIO else "wrong"] += 1
print(json.dumps(found))
"""


@pytest.fixture
def driver() -> str:
    return "erofs"


def layer() -> LayerBlob:
    files = [file(name, data) for name, data in SMALL.items()]
    return zstd_chunked_layer(tar_of(*files, file("big", BIG)), chunk_size=64 << 10, frame_size=0)


def pages(node: Node, path: Path, wanted: bytes) -> dict[str, int]:
    known = node.place / "wanted"
    known.write_bytes(wanted)
    found: dict[str, int] = node.python(PAGES, path, known, timeout=60)
    return found


def test_warm_names_and_bytes_reach_no_daemon(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "warm", layer()))
    shown = mounts.top_at(os.fsencode(tree))
    assert shown is not None and shown.kind == "erofs"
    node.python(WALK, tree)
    for _ in range(5):  # other tests drop the machine's caches: what they took is not warm
        before: dict[str, int] = {}
        later = node.fuse_calls()
        while before != later:  # what the kernel read ahead may still be on its way
            before = later
            time.sleep(0.5)
            later = node.fuse_calls()
        node.python(WALK, tree)
        if node.fuse_calls() == before:
            return
    pytest.fail("every walk over what was read just now had the daemon asked for something")


@pytest.mark.parametrize("end", ["answered", "killed"])
def test_a_thousand_readers_of_a_silent_registry_stop_no_other_image(
    node: Node, registry: FakeRegistry, end: str
) -> None:
    count = MAX_WAITING_REQUESTS + 200
    node.settings["READ_TIMEOUT"] = "60"
    names = [f"f{i}" for i in range(count)]
    image = add(registry, "app", zstd_chunked_layer(tar_of(*(file(n, pattern(5000)) for n in names)), frame_size=0))
    tree = node.mount(image)
    with FakeRegistry() as elsewhere:
        beside = node.mount(add(elsewhere, "other", zstd_chunked_layer(tar_of(file("f", b"other")))))
        registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}")
        readers = node.spawn([sys.executable, "-I", "-S", "-c", READERS, str(tree), *names])
        assert readers.stdout is not None and readers.stdout.readline() == b"all of them wait\n"
        assert node.read(beside / "f") == b"other"
        assert readers.poll() is None, "they wait still"
        if end == "killed":
            readers.kill()
            node.finish(readers, 20)
            node.umount(tree)  # while the registry is silent
            registry.clear_faults()
            return
        registry.clear_faults()
        done = node.finish(readers, 60)
        assert (done.returncode, done.stdout.split()) == (0, [b"5000"] * count), done.stderr


def test_choice_is_told(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "choice", layer())
    tree, other = node.mount(image), node.mount(image, "--driver", "fuse")
    kinds = [found.kind for path in (tree, other) if (found := mounts.top_at(os.fsencode(path)))]
    assert kinds == ["erofs", "fuse.lazyfs"]
    status = node.status()
    assert (status["daemon"]["driver"], status["daemon"]["reason"]) == ("erofs", "its self-test passed")
    assert [mount["driver"] for mount in status["mounts"]] == ["erofs", "fuse"]
    assert status["mounts"][1]["reason"] == "it was asked for"
    assert node.read(tree / "big") == node.read(other / "big") == BIG


def test_tampered_chunk_is_an_error_of_its_pages_and_no_more(node: Node, registry: FakeRegistry) -> None:
    blob = layer()
    tree = node.mount(add(registry, "tampered", blob))
    assert node.read(tree / "d1/f1") == SMALL["d1/f1"]
    registry.fault(Fault.FLIP, path="/blobs/", times=None)
    found = pages(node, tree / "d2/f2", SMALL["d2/f2"])
    assert found == {"right": 0, "error": 3, "wrong": 0}
    registry.clear_faults()
    assert node.read(tree / "d2/f2") == SMALL["d2/f2"]  # what failed is asked for again
    assert node.read(tree / "big") == BIG


@pytest.mark.parametrize("damage", ["flipped", "punched"])
def test_damaged_store_is_never_shown(node: Node, registry: FakeRegistry, damage: str) -> None:
    node.settings["MEMORY_SIZE"] = "0"
    tree = node.mount(add(registry, "damaged", layer()))
    assert node.read(tree / "big") == BIG
    (data,) = node.root.glob("layers/sha256/*/data")
    size = data.stat().st_size
    with open(data, "r+b") as handle:
        if damage == "flipped":
            handle.seek(size - 1_000_000)
            byte = handle.read(1)
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte[0] ^ 1]))
        else:
            at = (size - 1_000_000) & -4096
            assert node.tool("fallocate", "-p", "-o", str(at), "-l", "4096", data).returncode == 0
    node.python(DROP, tree)
    registry.fault(Fault.STATUS, path="/blobs/", status=404, times=None)
    found = pages(node, tree / "big", BIG)
    assert found["wrong"] == 0 and found["error"] > 0, found
    registry.clear_faults()
    assert node.read(tree / "big", timeout=60) == BIG


def test_killed_daemon_leaves_what_is_warm_and_no_zeros(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "killed", layer())
    tree = node.mount(image)
    head = "fd = os.open(a[0], os.O_RDONLY); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\n"
    node.python(head + "os.pread(fd, 1_000_000, 0)", tree / "big")
    node.python(WALK, tree / "d3")
    node.kill()
    assert node.read(tree / "d3/f3") == SMALL["d3/f3"]
    assert "rror" in node.read_fails(tree / "d4/f4")
    found = pages(node, tree / "big", BIG)
    assert found["wrong"] == 0 and found["right"] > 0 and found["error"] > 0, found
    node.umount(tree)
    fresh = node.mount(image)
    assert node.read(fresh / "big") == BIG
    assert len([entry for entry in mounts.below(os.fsencode(node.run_dir)) if entry.kind == "erofs"]) == 1


def test_overlay_upon_overlay(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "nested", layer()))
    script = """
set -e
mount -t tmpfs none "$2" && cd "$2" && mkdir u w m u2 w2 m2
mount -t overlay overlay -o lowerdir="$1",upperdir=u,workdir=w m
echo one >> m/d1/f1
mount -t overlay overlay -o lowerdir=m,upperdir=u2,workdir=w2 m2
echo two >> m2/d1/f1
rm m2/d2/f2
tail -c 8 m2/d1/f1
test ! -e m2/d2/f2
cmp "$1/big" m2/big
"""
    script_of = ("unshare", "--mount", "sh", "-c", script, "sh", tree, node.new_dir())
    done = node.tool(*script_of)
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n"), done.stderr


IDMAPPED = """
import ctypes
from lazyfs.container import idmap, mounts
tree, place = sys.argv[1:]
mounts.unshare(mounts.CLONE_NEWNS)
mounts.follow_host()
mounts.mount(b"none", os.fsencode(place), "tmpfs")
os.chdir(place)
for name in ("shown", "upper", "work", "merged"):
    os.mkdir(name)
copy = idmap._open_tree(os.fsencode(tree))
idmap._idmap(copy, idmap._user_namespace())  # 0 is shown as 100000
assert mounts.syscall(429, copy, b"", -100, b"shown", 4) == 0  # move_mount(2)
mounts.mount(b"overlay", b"merged", "overlay", 0, b"lowerdir=shown,upperdir=upper,workdir=work")
os.chmod("merged/d1/f1", 0o600)
print([os.stat(path + "/d1/f1").st_uid for path in (tree, "shown", "merged")])
sys.stdout.flush()
sys.stdout.buffer.write(open("merged/d1/f1", "rb").read())
"""


def test_idmapped_mounts_with_an_overlay_above(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "mapped", layer()))
    words = [sys.executable, "-c", "import os, sys" + IDMAPPED, str(tree), str(node.new_dir())]
    done = node.finish(node.spawn(words), 20)
    assert (done.returncode, done.stderr) == (0, b"")
    told, _, content = done.stdout.partition(b"\n")
    assert told == b"[0, 100000, 100000]" and content == SMALL["d1/f1"]


def test_loop_devices_do_where_files_do_not(node: Node, registry: FakeRegistry) -> None:
    node.mount(add(registry, "loops", layer()))
    (image,) = node.root.glob("trees/*.erofs")
    (device,) = (number for number in range(1, 9) if _is_data(node, number))
    target = node.new_dir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom lazyfs.mount.erofs_mount import Method, mount\n"
        "mount(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), Method.LOOPS)"
    )
    done = node.finish(node.spawn([sys.executable, "-c", code, str(image), str(_data(node, device)), str(target)]), 20)
    assert done.returncode == 0, done.stderr
    try:
        assert node.read(target / "big") == BIG
        assert node.read(target / "d1/f1") == SMALL["d1/f1"]
        shown = mounts.top_at(os.fsencode(target))
        assert shown is not None and shown.source.startswith(b"/dev/loop")
    finally:
        mounts.umount(os.fsencode(target), lazy=True)


def _data(node: Node, number: int) -> Path:
    return node.run_dir / "mnt" / ".data" / str(number)


def _is_data(node: Node, number: int) -> bool:
    return node.tool("test", "-e", _data(node, number)).returncode == 0


def test_image_of_the_tree_is_made_again_when_it_is_damaged(node: Node, registry: FakeRegistry) -> None:
    reference = add(registry, "image", layer())
    tree = node.mount(reference)
    (image,) = node.root.glob("trees/*.erofs")
    raw = image.read_bytes()
    node.umount(tree)
    image.write_bytes(raw[:5000] + b"damage" + raw[5006:])
    tree = node.mount(reference)
    assert node.read(tree / "big") == BIG
    assert image.read_bytes() == raw


def test_data_spaces_are_listed_nowhere_and_roots_alone(node: Node, registry: FakeRegistry) -> None:
    node.mount(add(registry, "hidden", layer()))
    session = node.run_dir / "mnt"
    assert node.python("print(json.dumps(os.listdir(a[0])))", session / ".data") == []
    assert ".data" not in node.python("print(json.dumps(os.listdir(a[0])))", session)
    (number,) = (number for number in range(1, 9) if _is_data(node, number))
    done = node.tool("stat", "-c", "%F %a %s", _data(node, number))
    kind, mode, size = done.stdout.decode().rsplit(maxsplit=2)
    assert (kind, mode, int(size) % 4096) == ("regular file", "400", 0)


def test_a_kernel_without_erofs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mounts.syscall

    def without(number: int, *args: object) -> int:
        if number != 430:  # fsopen(2), which looks for the module
            return real(number, *args)
        ctypes.set_errno(errno.ENODEV)
        return -1

    monkeypatch.setattr(mounts, "syscall", without)
    assert probe(tmp_path, tmp_path / "none") == Verdict(None, "this kernel has no erofs: No such device")


def test_a_kernel_whose_erofs_has_no_attributes_is_told(
    node: Node, registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.mount(add(registry, "attributes", layer()))

    def without(path: Path, name: bytes) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "getxattr", without)
    found = probe(tmp_path, node.run_dir / "mnt" / ".data" / "probe")
    assert found.method is None and "shows no extended attributes" in found.reason


def test_a_mount_of_somebody_elses_is_not_taken_away_after_a_crash(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "app", zstd_chunked_layer(tar_of(file("f", b"ours")))))
    node.kill()
    mounts.umount(os.fsencode(tree), lazy=True)
    theirs = {name: node.place / name for name in ("lower", "upper", "work")}
    for place in theirs.values():
        place.mkdir()
    (theirs["lower"] / "f").write_text("theirs")
    options = "lowerdir={lower},upperdir={upper},workdir={work}".format(**theirs)
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(tree)], check=True)
    try:
        node.mount(add(registry, "other", zstd_chunked_layer(tar_of(file("f", b"other")))))  # by a new daemon
        assert (tree / "f").read_text() == "theirs"
    finally:
        mounts.umount(os.fsencode(tree), lazy=True)
    assert node.lazyfs("umount", tree).returncode == 0  # what is written down of it
