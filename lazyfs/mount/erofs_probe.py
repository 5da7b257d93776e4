"""Whether the erofs driver works on this machine, found out by using it: a tiny image over the FUSE session.

Kernels differ in what they can mount, what overlayfs takes below it, and in what they make of a read that fails: some
turn the pages behind a short one into zeros, and then the driver must not be used. So no version is asked.
"""

from __future__ import annotations

import errno as errnos
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lazyfs.container import mounts
from lazyfs.errors import LazyfsError, MountFailed
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.erofs_write import write_erofs
from lazyfs.format.listing import Listing
from lazyfs.format.table import FORM_PLAIN, LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.limits import PROBE_TIMEOUT
from lazyfs.mount import erofs_mount
from lazyfs.mount.erofs_mount import Method
from lazyfs.mount.forest import PROBE_GOOD, PROBE_SIZE
from lazyfs.tree import Tree, build_tree
from lazyfs.units import PAGE

log = logging.getLogger(__name__)

_WHOLE = 2 * PAGE  # bytes of the file that can be read from end to end; the next one, a read-ahead long, follows
_LABEL = b"security.lazyfs"  # an attribute of the kind that file capabilities are
_KEY = "probe"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the self-test found. `method` None: the driver doesn't work, for that reason; else why no better method."""

    method: Method | None
    reason: str


def probe(directory: Path, device: Path) -> Verdict:
    """Try the driver. `directory` is empty and in the store, `device` the probe's file in the session.

    Blocking, for PROBE_TIMEOUT at most. Everything is mounted by a thread in a mount namespace of its own,
    which goes with
    it, whatever happens.
    """
    found = _apart(partial(_try_methods, directory, device))
    return found if isinstance(found, Verdict) else Verdict(None, found)


def try_with(directory: Path, problem_of: Callable[[Path], str]) -> str:
    """Return what `problem_of` says of a mount as the driver makes them, or why there is none; it shows zeros.

    `directory` is empty. Blocking, for PROBE_TIMEOUT at most, and as `probe`.
    """
    found = _apart(partial(_try_with, directory, problem_of))
    return found.reason if isinstance(found, Verdict) else found


def _apart(work: Callable[[], Verdict]) -> Verdict | str:
    """Do `work` in a thread with a mount namespace of its own; return what it found, or what kept it from that."""
    found: list[Verdict | str] = []

    def run() -> None:
        try:
            mounts.unshare(mounts.CLONE_NEWNS)
            mounts.follow_host()
            found.append(work())
        except (LazyfsError, OSError) as error:
            found.append(str(error))
        except Exception as bug:
            log.exception("the self-test of the erofs driver broke")
            found.append(f"its self-test broke: {bug}")

    thread = threading.Thread(target=run, name="erofs-probe", daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT)
    return found[0] if found else f"its self-test did not end within {PROBE_TIMEOUT:.0f} s"


def _try_with(scratch: Path, problem_of: Callable[[Path], str]) -> Verdict:
    image, device, place = scratch / "image", scratch / "device", scratch / "place"
    _write_image(scratch, image)
    place.mkdir()
    with device.open("wb") as handle:
        handle.truncate(PROBE_SIZE)
    problem = ""
    for method in Method:
        try:
            erofs_mount.mount(image, [device], place, method)
        except MountFailed as error:
            problem = str(error)
            continue
        try:
            return Verdict(method, problem_of(place))
        finally:
            mounts.umount(os.fsencode(place), lazy=True)
    return Verdict(None, problem)


def _try_methods(scratch: Path, device: Path) -> Verdict:
    image = scratch / "image"
    _write_image(scratch, image)
    problems: list[str] = []
    for method in Method:
        place = scratch / method
        place.mkdir()
        try:
            mounts.mount(b"none", os.fsencode(place), "tmpfs")
            _try(image, device, place, method)
            return Verdict(method, "; ".join(problems))
        except (LazyfsError, OSError) as error:
            if isinstance(error, MountFailed) and error.errno in (errnos.ENODEV, errnos.ENOSYS):
                problems.append(str(error))  # no erofs, no module of it either, or no mount API: no method helps
                break
            problems.append(f"with {method}: {error}")
        finally:
            for entry in mounts.below(os.fsencode(place)):
                mounts.umount(entry.dir, lazy=True)
    return Verdict(None, "; ".join(problems))


def _write_image(scratch: Path, image: Path) -> None:
    table_path, tree_path = scratch / "table", scratch / "tree"
    build_table(table_path, LayerFacts(FORM_PLAIN, PROBE_SIZE, 0), Listing.of(_entries()))
    table = LayerTable(table_path)
    build_tree(tree_path, [table])
    tree = Tree(tree_path)
    try:
        write_erofs(image, tree, [table], _KEY)
    finally:
        tree.close()
        table.close()


def _entries() -> Iterator[tuple[Entry, list[Chunk]]]:
    yield Entry(b"labelled", Kind.REG, 0o644, 0, 0, 0, xattrs=((_LABEL, b"1"),)), []
    for name, start, size in ((b"whole", 0, _WHOLE), (b"half", _WHOLE, PROBE_SIZE - _WHOLE)):
        yield Entry(name, Kind.REG, 0o644, 0, 0, 0, size), [Chunk(0, size, start, 0, bytes(32))]


def _try(image: Path, device: Path, place: Path, method: Method) -> None:
    """Mount, read, and put two overlays above. Raise LazyfsError or OSError for what doesn't work."""
    names = ("shown", "upper", "work", "merged", "upper2", "work2", "merged2")
    shown, upper, work, merged, upper2, work2, merged2 = (place / name for name in names)
    for path in (shown, upper, work, merged, upper2, work2, merged2):
        path.mkdir()
    erofs_mount.mount(image, [device], shown, method)
    if (shown / "whole").read_bytes() != b"\xff" * _WHOLE:
        raise MountFailed("a file has other bytes than its device")
    _check_failing_read(shown / "half")
    _check_attribute(shown / "labelled")
    _overlay(shown, upper, work, merged)
    _overlay(merged, upper2, work2, merged2)


def _overlay(lower: Path, upper: Path, work: Path, merged: Path) -> None:
    """Put an overlay above and write through it. Raise MountFailed or OSError."""
    options = mounts.overlay_options(os.fsencode(lower), os.fsencode(upper), os.fsencode(work))
    try:
        mounts.mount(b"overlay", os.fsencode(merged), "overlay", 0, options)
        with open(merged / "whole", "r+b") as handle:  # a copy-up
            if handle.read() != b"\xff" * _WHOLE:
                raise MountFailed("an overlay above shows other bytes")
    except OSError as error:
        raise MountFailed(f"an overlay above fails: {error.strerror}") from None


def _check_attribute(path: Path) -> None:
    """Read an extended attribute. Without them programs would lose their capabilities without a word."""
    try:
        if os.getxattr(path, _LABEL) == b"1":
            return
    except OSError:
        pass
    raise MountFailed("this kernel's erofs shows no extended attributes")


def _check_failing_read(path: Path) -> None:
    """Read a file whose last page can't be had: alone, and as the end of the largest read there is."""
    half = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at, size in ((0, PROBE_SIZE), (PROBE_SIZE - _WHOLE - PAGE, PAGE)):
            try:
                got = os.pread(half, size, at)
            except OSError:
                continue
            if got.strip(b"\xff") or at + len(got) > PROBE_GOOD - _WHOLE:
                raise MountFailed("this kernel shows zeros where a read failed")
        if os.pread(half, PAGE, 0) != b"\xff" * PAGE:
            raise MountFailed("a file has other bytes than its device")
    finally:
        os.close(half)
