"""What containerd expects of every snapshotter, over the socket and with real mounts.

The cases are those of containerd's own suite (core/snapshots/testsuite), by the same names, in our own words. The suite
itself can be run against the socket by any Go program.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import grpc
import pytest

from snapshotter.model import Kind
from tests.helpers.snapshotter import Client, Info, Refused, mounted, serving

Change = Callable[[Path], None]
_NUMBERS = count()


@pytest.fixture
def client(scratch: Path) -> Iterator[Client]:
    """Yield a client of a snapshotter of the test's own."""
    with serving(scratch) as one:
        yield one


@pytest.fixture
def work(scratch: Path) -> Path:
    """Return a directory to mount things in."""
    directory = scratch / "work"
    directory.mkdir()
    return directory


def write(name: str, text: str, mode: int = 0o644) -> Change:
    def change(root: Path) -> None:
        (root / name).write_text(text)
        (root / name).chmod(mode)

    return change


def make(name: str, mode: int = 0o755) -> Change:
    def change(root: Path) -> None:
        (root / name).mkdir()
        (root / name).chmod(mode)

    return change


def remove(name: str) -> Change:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def give(name: str, owner: int) -> Change:
    return lambda root: os.chown(root / name, owner, owner)


def link(old: str, new: str) -> Change:
    return lambda root: os.link(root / old, root / new)


def move(old: str, new: str) -> Change:
    return lambda root: os.rename(root / old, root / new)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Return all that a user sees of a directory: names, types, modes, owners, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def apply(client: Client, work: Path, parent: str, *changes: Change) -> str:
    """Make a committed snapshot with these changes, and return its name."""
    name = f"layer-{next(_NUMBERS)}"
    with mounted(client.prepare(f"{name}-active", parent), work) as root:
        for change in changes:
            change(root)
    client.commit(name, f"{name}-active")
    return name


def check_layers(client: Client, work: Path, *layers: tuple[Change, ...]) -> None:
    """Make the layers on each other, and hold each against the same changes made in one plain directory."""
    flat = work / f"flat{next(_NUMBERS)}"
    flat.mkdir()
    parent = ""
    for layer in layers:
        parent = apply(client, work, parent, *layer)
        for change in layer:
            change(flat)
        with mounted(client.view(f"{parent}-view", parent), work) as root:
            assert tree(root) == tree(flat)
        client.remove(f"{parent}-view")


def some(client: Client, prefix: str = "") -> None:
    """Make snapshots of every kind: c1, c2 on it, a1 and v1 on that, a2 and v2 on nothing."""
    client.prepare(f"{prefix}c1-a")
    client.commit(f"{prefix}c1", f"{prefix}c1-a")
    client.prepare(f"{prefix}c2-a", f"{prefix}c1")
    client.commit(f"{prefix}c2", f"{prefix}c2-a")
    client.prepare(f"{prefix}a1", f"{prefix}c2")
    client.prepare(f"{prefix}a2")
    client.view(f"{prefix}v1", f"{prefix}c2")
    client.view(f"{prefix}v2")


def refused(code: grpc.StatusCode, call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        call()
    assert caught.value.code is code
    return caught.value.message


def test_basic(client: Client, work: Path) -> None:
    flat = work / "flat"
    flat.mkdir()
    first = (write("foo", "foo\n", 0o777), make("a"), make("a/b"), make("a/b/c"))
    then = (write("bar", "bar\n", 0o777), write("foo", "bar\n", 0o777), remove("a/b"))
    with mounted(client.prepare("preparing"), work) as root:
        for change in first:
            change(root)
            change(flat)
    client.commit("committed", "preparing", {"containerd.io/gc.root": "now"})
    one = client.stat("committed")
    assert (one.parent, one.kind, one.labels) == ("", Kind.COMMITTED, {"containerd.io/gc.root": "now"})
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.stat("preparing"))

    with mounted(client.prepare("next", "committed"), work) as root:
        assert tree(root) == tree(flat)
        for change in then:
            change(root)
            change(flat)
    assert (client.stat("next").parent, client.stat("next").kind) == ("committed", Kind.ACTIVE)
    client.commit("committed-next", "next")
    two = client.stat("committed-next")
    assert (two.parent, two.kind) == ("committed", Kind.COMMITTED)
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.stat("next"))
    assert client.list() == {"committed": one, "committed-next": two}

    with mounted(client.view("view", "committed-next"), work) as root:
        assert tree(root) == tree(flat)
    client.remove("view")
    assert "remove" in refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: client.remove("committed"))
    client.remove("committed-next")
    client.remove("committed")
    assert client.list() == {}


def test_stat_of_an_active_one(client: Client, work: Path) -> None:
    with mounted(client.prepare("preparing"), work) as root:
        (root / "foo").write_text("foo")
    found = client.stat("preparing")
    assert (found.name, found.kind, found.parent) == ("preparing", Kind.ACTIVE, "")
    assert found.created == found.updated and abs(time.time_ns() - found.created) < 60 * 10**9


def test_stat_of_a_committed_one(client: Client, work: Path) -> None:
    name = apply(client, work, "", write("foo", "foo"))
    found = client.stat(name)
    assert (found.name, found.kind, found.parent) == (name, Kind.COMMITTED, "")
    assert client.usage(name).inodes == 2 and client.usage(name).size >= 4096


def test_transitivity(client: Client, work: Path) -> None:
    a = apply(client, work, "", write("foo", "foo\n"))
    b = apply(client, work, a, write("foo", "foo bar\n"))
    assert client.stat(client.stat(b).parent) == client.stat(a)
    assert client.stat(a).parent == ""


def test_prepare_and_view_of_a_key_that_is_taken(client: Client, work: Path) -> None:
    a = apply(client, work, "")
    client.prepare("new", a)
    client.view("seen", a)
    for call in (client.prepare, client.view):
        for key in ("new", "seen"):
            refused(grpc.StatusCode.ALREADY_EXISTS, lambda call=call, key=key: call(key, a))  # type: ignore[misc]
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.prepare("x", "no such parent"))
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: client.prepare("x", "new"))
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: client.prepare(""))


def test_update(client: Client) -> None:
    some(client)
    for name, before in client.list().items():
        root = {"containerd.io/gc.root": "now"}
        early = time.time_ns()
        changed = client.update(name, {"l1": "v1", "l2": "v2", "l3": "v3", **root}, parent="doesnotexist")
        assert changed.labels == {"l1": "v1", "l2": "v2", "l3": "v3", **root}
        same = (before.name, before.parent, before.kind, before.created)
        assert (changed.name, changed.parent, changed.kind, changed.created) == same
        assert early <= changed.updated <= time.time_ns()
        changed = client.update(name, {"l1": "updated", "l4": "v4"}, "labels.l1", "labels.l2")
        assert changed.labels == {"l1": "updated", "l3": "v3", **root}
        changed = client.update(name, {"l4": "v4", **root}, "labels")
        assert changed.labels == {"l4": "v4", **root} == client.stat(name).labels
        refused(grpc.StatusCode.INVALID_ARGUMENT, lambda name=name: client.update(name, {}, "parent"))  # type: ignore[misc]
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.update("nothing", {}))


def test_remove(client: Client) -> None:
    client.prepare("committed-a")
    client.commit("committed-1", "committed-a")
    client.prepare("reuse", "committed-1")
    client.remove("reuse")
    client.view("reuse", "committed-1")
    client.remove("reuse")
    client.prepare("reuse")
    client.remove("committed-1")
    client.commit("committed-1", "reuse")
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.remove("reuse"))


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], "a-np p a v p-wl a-wl v-wl a-np-wl"),
        (['labels."containerd.io/gc.root"==check'], "a-np p a v p-wl a-wl v-wl a-np-wl"),
        (["kind==active"], "a-np a a-wl a-np-wl"),
        (['kind==view,labels."containerd.io/gc.root"==check'], "v v-wl"),
        (["kind==committed"], "p p-wl"),
        (["name==p", "name==a-np-wl"], "p a-np-wl"),
        (["name==a-wl,labels.l"], "a-wl"),
        (["parent==p"], "a v"),
        (['parent!=""'], "a v a-wl v-wl"),
        (["labels.l"], "p-wl a-wl v-wl a-np-wl"),
        (["labels.l==2"], "a-wl a-np-wl"),
    ],
)
def test_walk(client: Client, filters: list[str], names: str) -> None:
    root = {"containerd.io/gc.root": "check"}
    client.prepare("a-np", "", root)
    client.prepare("p-tmp", "", root)
    client.commit("p", "p-tmp", root)
    client.prepare("a", "p", root)
    client.view("v", "p", root)
    client.prepare("p-wl-tmp", "", root)
    client.commit("p-wl", "p-wl-tmp", {"l": "1", **root})
    client.prepare("a-wl", "p-wl", {"l": "2", **root})
    client.view("v-wl", "p-wl", {"l": "3", **root})
    client.prepare("a-np-wl", "", {"l": "2", **root})
    assert set(client.list(*filters)) == set(names.split())


def test_layer_file_update(client: Client, work: Path) -> None:
    first = (make("etc", 0o700), write("etc/hosts", "mydomain 10.0.0.1"), write("etc/profile", "PATH=/usr/bin"))
    then = (
        write("etc/hosts", "mydomain 10.0.0.2"),
        write("etc/profile", "PATH=/usr/bin", 0o666),
        make("root", 0o700),
        write("root/.bashrc", "PATH=/usr/sbin:/usr/bin"),
    )
    for _ in range(3):
        check_layers(client, work, first, then)


def test_remove_directory_in_lower_layer(client: Client, work: Path) -> None:
    first = (make("lib", 0o700), write("lib/hidden", ""))
    then = (remove("lib"), make("lib", 0o700), write("lib/not-hidden", ""))
    check_layers(client, work, first, then, (write("lib/newfile", ""),))


def test_chown(client: Client, work: Path) -> None:
    first = (make("opt", 0o700), make("opt/a", 0o700), make("opt/a/b", 0o700), write("opt/a/b/file.txt", "hello"))
    then = tuple(give(name, 1) for name in ("opt", "opt/a", "opt/a/b", "opt/a/b/file.txt"))
    check_layers(client, work, first, then)


def test_directory_permission_on_commit(client: Client, work: Path) -> None:
    first = (
        *(make(f"dir{number}", 0o700) for number in range(1, 6)),
        write("dir4/f1", "..."),
        write("dir5/f1", "..."),
        *(give(name, 1) for name in ("dir1", "dir2", "dir3", "dir5", "dir5/f1")),
    )
    second = (give("dir2", 0), remove("dir3"), give("dir4", 1), give("dir4/f1", 1))
    third = (make("dir3", 0o700), give("dir3", 1), remove("dir5"), make("dir5", 0o700), give("dir5", 1))
    check_layers(client, work, first, second, third)


def test_remove_intermediate_snapshot(client: Client, work: Path) -> None:
    base = apply(client, work, "")
    middle = apply(client, work, base)
    client.prepare("top", middle)
    refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: client.remove(middle))
    for key in ("top", middle, base):
        client.remove(key)


def test_deleted_files_in_child_snapshot(client: Client, work: Path) -> None:
    first = (write("foo", "foo\n", 0o777), write("foobar", "foobar\n", 0o777))
    check_layers(client, work, first, (remove("foobar"),), ())


def test_move_file_from_lower_layer(client: Client, work: Path) -> None:
    first = (make("dir1", 0o700), write("dir1/f1", "Hello"), make("dir2", 0o700), write("dir2/f2", "..."))
    then = (
        make("dir3", 0o700),
        write("dir3/f1", "Hello"),
        remove("dir1"),
        link("dir2/f2", "dir3/f2"),
        remove("dir2/f2"),
    )
    check_layers(client, work, first, then)


def test_rename(client: Client, work: Path) -> None:
    """Renaming a directory of a lower layer is left out: overlayfs answers EXDEV unless redirect_dir is on."""
    first = (make("somefiles", 0o700), write("somefiles/f1", "was here first!"), write("somefiles/f2", "nothing"))
    then = (
        write("somefiles/f1-overwrite", "new content 1"),
        move("somefiles/f1-overwrite", "somefiles/f1"),
        move("somefiles/f2", "somefiles/f3"),
    )
    check_layers(client, work, first, then)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_view_is_read_only(client: Client, work: Path, depth: int) -> None:
    parent = ""
    for _ in range(depth):
        parent = apply(client, work, parent)
    with mounted(client.view("view", parent), work) as root, pytest.raises(OSError, match="Read-only"):
        (root / "file").write_text("x")
    client.remove("view")


def test_stat_while_walking(client: Client) -> None:
    some(client, "walked-")
    for batch in client.batches():
        for info in batch:
            assert client.stat(info.name) == info


def test_a_long_list_comes_in_batches(client: Client) -> None:
    for number in range(103):
        client.view(f"v{number}")
    batches = list(client.batches("kind==view"))
    assert [len(batch) for batch in batches] == [100, 3]


def test_close_twice(scratch: Path) -> None:
    """A proxy's client has nothing to close; what remains of the case is that a client may go and come."""
    with serving(scratch) as one:
        one.prepare("p")
        one.commit("n", "p")
        one.remove("n")
        one.close()
        one.close()


def test_root_permission(client: Client, work: Path) -> None:
    with mounted(client.prepare("preparing"), work) as root:
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
        root.chmod(0o1777)
        os.chown(root, 7, 8)
    client.commit("tmp", "preparing")
    with mounted(client.prepare("on it", "tmp"), work) as root:
        found = root.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o1777, 7, 8)


def test_128_layers_mount(work: Path) -> None:
    """One page of mount options holds them when the root's path is about as long as /var/lib/lazyfs.

    Eight layers are written to, to save time.
    """
    short = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        with serving(short) as client:
            check_128_layers(client, work)
    finally:
        shutil.rmtree(short)


def check_128_layers(client: Client, work: Path) -> None:
    flat = work / "flat"
    flat.mkdir()
    changes: list[tuple[Change, ...]] = [
        (write("bottom", "way at the bottom\n"), make("addhere"), make("onlyme"), write("onlyme/bottom", "bye!\n"))
    ]
    for number in range(1, 128):
        changes.append(
            (
                write("overwriteme", f"{number} WAS HERE!\n", 0o777),
                write(f"addhere/file-{number}", "same\n", 0o755),
                remove("onlyme"),
                make("onlyme"),
                write(f"onlyme/file-{number}", "only me!\n", 0o777),
            )
            if number % 16 == 15
            else ()
        )
    parent = ""
    for number, layer in enumerate(changes):
        what = client.prepare(f"prepare-{number}", parent)
        if layer or number == 127:
            with mounted(what, work) as root:
                assert tree(root) == tree(flat)
                for change in layer:
                    change(root)
                    change(flat)
                assert tree(root) == tree(flat)
        parent = f"committed-{number}"
        client.commit(parent, f"prepare-{number}")
    with mounted(client.view("fullview", parent), work) as root:
        assert tree(root) == tree(flat)


def test_what_a_snapshot_is_never_lacks_a_time(client: Client) -> None:
    """Unset timestamps are the year 1 to clients."""
    some(client)
    infos: list[Info] = list(client.list().values())
    assert len(infos) == 6 and all(info.created > 10**18 and info.updated > 10**18 for info in infos)
