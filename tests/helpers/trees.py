"""Directory trees as values: all that a process can see of them, and what differs between two.

Names are bytes, relative to the root; b"" is the root itself. Nothing is followed, and nothing of a tree is changed but
access times.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

_READ = 1 << 20  # bytes
TOC_FILES = frozenset({b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"})


@dataclass(frozen=True)
class Node:
    """One name. `mode` has the type bits too; `links`: all names of the inode, sorted, when there are several."""

    mode: int
    uid: int
    gid: int
    size: int  # files: bytes; symlinks: of the target; else 0, because it tells of the file system
    mtime_ns: int
    nlink: int  # 0 for directories: file systems count differently
    rdev: tuple[int, int]
    link: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    digest: str  # sha256 of a file's content
    links: tuple[bytes, ...]


def snapshot(root: str | os.PathLike[str], *, content: bool = True) -> dict[bytes, Node]:
    """Read a whole tree. `content=False` leaves files unread, and their digests empty."""
    base = os.fsencode(root)
    stats: dict[bytes, os.stat_result] = {}
    names: dict[tuple[int, int], list[bytes]] = {}
    for name in _walk(base):
        status = stats[name] = os.lstat(os.path.join(base, name) if name else base)
        if not stat.S_ISDIR(status.st_mode):
            names.setdefault((status.st_dev, status.st_ino), []).append(name)
    digests: dict[tuple[int, int], str] = {}
    out = {}
    for name, status in stats.items():
        key = status.st_dev, status.st_ino
        path = os.path.join(base, name) if name else base
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG and content and key not in digests:
            digests[key] = sha256_of(path)
        same = names.get(key, [])
        out[name] = Node(
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else 0,
            status.st_mtime_ns,
            0 if kind == stat.S_IFDIR else status.st_nlink,
            (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
            os.readlink(path) if kind == stat.S_IFLNK else b"",
            xattrs_of(path),
            digests.get(key, "") if kind == stat.S_IFREG else "",
            tuple(sorted(same)) if len(same) > 1 else (),
        )
    return out


def _walk(base: bytes) -> Iterator[bytes]:
    yield b""
    todo = [b""]
    while todo:
        at = todo.pop()
        with os.scandir(os.path.join(base, at) if at else base) as listing:
            for item in listing:
                name = at + b"/" + item.name if at else item.name
                yield name
                if item.is_dir(follow_symlinks=False):
                    todo.append(name)


def sha256_of(path: bytes) -> str:
    """Hash a file's content; it is never held whole."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        while data := handle.read(_READ):
            found.update(data)
    return found.hexdigest()


def xattrs_of(path: bytes) -> tuple[tuple[str, bytes], ...]:
    """Extended attributes of a name itself, sorted; none where the file system has none."""
    try:
        keys = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return ()
        raise
    return tuple(sorted((key, os.getxattr(path, key, follow_symlinks=False)) for key in keys))


def compare(
    a: dict[bytes, Node],
    b: dict[bytes, Node],
    *,
    ignore: Collection[bytes] = (),
    without: Collection[str] = (),
    undated: Collection[bytes] = (b"",),
    whole_seconds: bool = False,
    limit: int = 50,
) -> list[str]:
    """Return what differs, a readable line each; [] means equal trees.

    `ignore` are names (with all below) that don't count, `without` fields of Node that don't, `undated` names
    whose time doesn't: those of directories that no entry names, and of the root, are the time of the unpacking.
    `whole_seconds` rounds times half up, as some writers do. At most `limit` lines.
    """
    out = []
    skipped = frozenset(without)
    for name in sorted(a.keys() | b.keys()):
        if any(name == gone or name.startswith(gone + b"/") for gone in ignore):
            continue
        shown = os.fsdecode(name or b"/")
        if name not in a or name not in b:
            out.append(f"{shown!r}: only in the {'first' if name in a else 'second'} tree")
        else:
            off = skipped | {"mtime_ns"} if name in undated else skipped
            out += [f"{shown!r}: {text}" for text in _differences(a[name], b[name], off, whole_seconds)]
        if len(out) >= limit:
            return [*out[:limit], "… and maybe more"]
    return out


def _differences(one: Node, other: Node, without: frozenset[str], whole_seconds: bool) -> Iterator[str]:
    for field in fields(Node):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if field.name == "mtime_ns" and whole_seconds:
            left, right = ((value + 500_000_000) // 10**9 * 10**9 for value in (left, right))
        if left == right or field.name in without:
            continue
        if field.name == "mode":
            left, right = stat.filemode(left), stat.filemode(right)
        yield f"{field.name} is {str(left)[:120]} in the first tree and {str(right)[:120]} in the second"


def umoci_image(directory: Path, *tars: bytes, tag: str = "latest") -> Path:
    """Make an OCI layout at `directory` with one image of these layers, by umoci. Needs root for what is unpacked."""
    layout = directory / "layout"
    _run("umoci", "init", "--layout", str(layout))
    _run("umoci", "new", "--image", f"{layout}:{tag}")
    for number, tar in enumerate(tars):
        path = directory / f"layer-{number}.tar"
        path.write_bytes(tar)
        _run("umoci", "raw", "add-layer", "--image", f"{layout}:{tag}", str(path))
        path.unlink()
    return layout


def umoci_unpack(oci_layout: Path, tag: str, target: Path) -> Path:
    """Unpack an image in full, as root; return its root filesystem. gzip and plain layers only."""
    _run("umoci", "raw", "unpack", "--image", f"{oci_layout}:{tag}", str(target))
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
