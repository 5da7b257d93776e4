"""lazyfs mount: show an image at a directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import Output
from lazyfs.errors import DaemonFault, LazyfsError, MountPointInvalid, UsageError
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.control_client import Daemon

_EPILOG = """\
examples:
  lazyfs mount docker://localhost:5000/debian:base /mnt
  lazyfs mount --rw oci:images:tool /mnt      writes are dropped by lazyfs umount
  lazyfs umount /mnt

Files arrive when they are read. DIR must exist; what it holds is hidden until lazyfs umount.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("mount", epilog=_EPILOG)
    common.add_image(parser)
    parser.add_argument("dir", metavar="DIR", help="an existing directory")
    parser.add_argument("--rw", action="store_true", help="writable, by a layer that lazyfs umount removes (root only)")
    common.add_platform(parser)
    common.add_pull(parser)
    common.add_driver(parser)
    common.add_registry(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Mount the image. Blocking. Raise LazyfsError; then nothing is mounted."""
    from lazyfs import control_client

    settings = common.settings(args)
    solo = os.geteuid() != 0
    if args.rw and solo:
        raise UsageError(
            "--rw needs root", hint="leave it away, or use lazyfs run, which gives every user a writable container"
        )
    directory = _check_directory(settings, args.dir)
    with control_client.open_daemon(settings, Path(directory) if solo else None) as daemon:
        answer = daemon.call(
            "mount_image",
            image=common.daemon_image(args),
            platform=args.platform,
            plain_http=args.plain_http,
            access=common.access(args, settings).to_json(),
            pull=common.pull(args, settings),
            driver=common.driver(args, settings),
            lease=False,
            on_event=out.note,
        )
        kind = "solo" if solo else "rw" if args.rw else "ro"
        _attach(settings, daemon, answer, directory, kind)
    _tell(out, args.image, directory, kind, answer)
    return exit_codes.OK


def _check_directory(settings: Settings, text: str) -> str:
    """Return the mount point's absolute path without symlinks. Raise MountPointInvalid."""
    from lazyfs.container import attached, mounts

    directory = os.path.realpath(text)
    try:
        mode = os.stat(directory).st_mode
    except FileNotFoundError:
        raise MountPointInvalid(directory, "does not exist", hint=f"mkdir {directory}") from None
    except OSError as error:
        raise MountPointInvalid(
            directory,
            f"can't be used: {error.strerror}",
            hint=f"lazyfs umount --lazy {directory}, if it is a dead mount",
        ) from None
    if not stat.S_ISDIR(mode):
        raise MountPointInvalid(directory, "is not a directory")
    for ours in (settings.root, settings.run):
        place = os.path.realpath(ours)
        if os.path.commonpath((place, directory)) in (place, directory):
            # the daemon would wait for itself as soon as it looks for its own files
            raise MountPointInvalid(directory, f"holds {ours} or lies in it", hint="mount the image somewhere else")
    known = attached.recall(settings, directory)
    if known is not None:
        if mounts.top_at(os.fsencode(directory)) is not None:
            raise MountPointInvalid(
                directory, "has an image mounted on it already", hint=f"lazyfs umount {directory} first"
            )
        attached.forget(settings, directory)  # somebody took the mount away behind our back
    return directory


def _attach(settings: Settings, daemon: Daemon, answer: dict[str, Any], directory: str, kind: str) -> None:
    """Show the daemon's tree at `directory` and write that down; on failure undo all of it, the daemon's part too."""
    from lazyfs.container import attached, mounts, rootfs
    from lazyfs.container import directory as directories

    path, mount = answer.get("path"), answer.get("mount")
    with contextlib.ExitStack() as undo:
        undo.callback(_release, settings, directory, kind, str(mount))
        if not isinstance(path, str) or not os.path.isabs(path):
            raise DaemonFault("lazyfsd's answer to mount_image has no path")
        state = ""
        if kind == "rw":
            place = attached.new_state(settings)
            undo.callback(directories.remove_tree, place)
            state = str(place)
            rootfs.mount_overlay(path, place, target=directory, rootless=False)
        elif kind == "ro":
            mounts.bind_read_only(os.fsencode(path), os.fsencode(directory))
        if kind != "solo":
            undo.callback(mounts.umount, os.fsencode(directory), lazy=True)
        shown = mounts.top_at(os.fsencode(directory))
        if shown is None:
            raise MountPointInvalid(directory, "does not show the mount that was just made")
        record = attached.Attached(directory, kind, str(mount), state, attached.boot_id(), shown.device)
        attached.remember(settings, record)
        undo.callback(attached.forget, settings, directory)
        daemon.call("attach", mount=mount, dir=directory, kind="ro" if kind == "solo" else kind, state_dir=state)
        undo.pop_all()


def _release(settings: Settings, directory: str, kind: str, mount: str) -> None:
    from lazyfs.cli.umount import release

    with contextlib.suppress(LazyfsError):  # the failure that brought us here is the one to tell
        release(settings, Path(directory) if kind == "solo" else None, mount)


def _tell(out: Output, image: str, directory: str, kind: str, answer: dict[str, Any]) -> None:
    layers = [layer for layer in answer.get("layers") or () if isinstance(layer, dict)]
    lazy = sum(bool(layer.get("lazy")) for layer in layers)
    for text in answer.get("notes") or ():
        out.note(str(text))
    out.line(
        f"{image} is mounted on {directory}{', writable' if kind == 'rw' else ''}: "
        f"{lazy} of {len(layers)} layers lazy, {format_size(int(answer.get('size') or 0))} in the registry"
    )
    names = ("mount", "manifest_digest", "driver", "reason", "layers", "notes", "size", "requests")
    out.json({"image": image, "dir": directory, "kind": kind, **{name: answer.get(name) for name in names}})
