"""A container's root file system: overlayfs over the lazy tree, and the host's paths that show in it.

For containers this runs in a private mount namespace (lazyfs.container.namespaces) and undoes nothing: the namespace's
end does. `lazyfs mount --rw` uses the same overlay in the open.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lazyfs.container import mounts
from lazyfs.container.options import Volume
from lazyfs.errors import ContainerFailed, MountFailed
from lazyfs.limits import MAX_HOST_FILE

# `volatile`: the upper directory dies with its mount, so syncing it is work for nobody. `metacopy`: a chown (the
# first act of many entrypoints, on whole trees) copies a file's attributes up and leaves its bytes in the registry.
_FAST = b"volatile,metacopy=on,redirect_dir=on"
_FAST_USER = b"userxattr,volatile"
_PLAIN_USER = b"userxattr"


def mount_overlay(lower: str, directory: Path, *, target: str = "", rootless: bool = False) -> None:
    """Mount `lower` (a read-only tree) with directory/upper above it on `target` (directory/rootfs). Blocking.

    Raise MountFailed, with what to do about it where the store's own file system is the obstacle.
    """
    upper, work = directory / "upper", directory / "work"
    _take_over_root(lower, upper)
    attempts = (_FAST_USER, _PLAIN_USER) if rootless else (_FAST, b"")
    for extra in attempts:
        options = mounts.overlay_options(os.fsencode(lower), os.fsencode(upper), os.fsencode(work), extra=extra)
        try:
            mounts.mount(b"overlay", os.fsencode(target or directory / "rootfs"), "overlay", 0, options)
            return
        except MountFailed as error:
            # Kernels without one of the options say EINVAL, as they do for an upper directory that can't be one.
            if error.errno != errno.EINVAL:
                raise
            last = error
    raise MountFailed(
        last.message,
        errno=last.errno,
        hint="the store must lie on a file system that overlayfs can write to (ext4, xfs, btrfs, tmpfs): see --root",
    )


def _take_over_root(lower: str, upper: Path) -> None:
    # overlayfs takes the attributes of the merged root from the upper directory.
    try:
        known = os.stat(lower)
        os.chmod(upper, stat.S_IMODE(known.st_mode))
        if os.geteuid() == 0 and (known.st_uid, known.st_gid) != (0, 0):
            os.chown(upper, known.st_uid, known.st_gid)
    except OSError as error:
        raise ContainerFailed(f"the image's root directory can't be read: {error.strerror}") from None


def check_system_directories(lower: str) -> None:
    """Refuse an image whose /dev, /proc or /sys is anything but a directory. Blocking. Raise ContainerFailed.

    runc 1.1 makes /dev/fd and its like before it changes the root: through a symlink they would land on the host.
    """
    for name in ("dev", "proc", "sys"):
        try:
            mode = os.lstat(os.path.join(lower, name)).st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ContainerFailed(f"/{name} of the image can't be looked at: {error.strerror}") from None
        if not stat.S_ISDIR(mode):
            raise ContainerFailed(f"/{name} of the image is not a directory, which could lead out of the container")


def stage_volumes(volumes: tuple[Volume, ...], directory: Path) -> list[str]:
    """Bind each volume's source, with all mounts below it, into directory/volumes; return the staged paths in order.

    The sources are looked up here, once, in the host's own view: later /proc is ours, and a link can't be swapped under
    the runtime. Read-only means all of the mounts below too. Raise MountFailed.
    """
    staged = []
    for number, volume in enumerate(volumes):
        target = directory / "volumes" / str(number)
        try:
            if os.path.isdir(volume.source):
                target.mkdir()
            else:
                target.touch()
        except OSError as error:
            raise ContainerFailed(f"volume {volume.source} can't be prepared: {error.strerror}") from None
        mounts.bind(os.fsencode(volume.source), os.fsencode(target), recursive=True)
        if volume.read_only:
            mounts.make_read_only(os.fsencode(target))
        staged.append(str(target))
    return staged


def staged_path(directory: Path, number: int) -> str:
    """Return where volume `number` will be staged: known before the namespace exists."""
    return str(directory / "volumes" / str(number))


def write_host_files(directory: Path, hostname: str, network: str) -> list[tuple[str, str]]:
    """Write the container's own /etc/hosts, /etc/hostname and, on the host's network, /etc/resolv.conf; blocking.

    Copies, because a container may edit them. Return (file, path in the container). Raise ContainerFailed.
    """
    own = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n".encode()
    contents: dict[str, bytes | None] = {"hostname": hostname.encode() + b"\n", "hosts": own}
    if network == "host":
        hosts = _host_file("/etc/hosts")
        if hosts is not None:
            known = hostname.encode() in hosts.split()
            contents["hosts"] = hosts if known else hosts.rstrip(b"\n") + f"\n127.0.1.1\t{hostname}\n".encode()
        contents["resolv.conf"] = _host_file("/etc/resolv.conf")
    written = []
    try:
        for name, content in contents.items():
            if content is not None:
                path = directory / "files" / name
                path.write_bytes(content)
                path.chmod(0o644)
                written.append((str(path), f"/etc/{name}"))
    except OSError as error:
        raise ContainerFailed(f"the container's files can't be written: {error.strerror}") from None
    return written


def _host_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as handle:
            return handle.read(MAX_HOST_FILE)
    except OSError:
        return None
