"""lazyfs umount: take away what lazyfs mount has mounted, whether or not the daemon lives."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import Output
from lazyfs.errors import DaemonFault, DaemonUnreachable, MountFailed, MountPointInvalid

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.container.attached import Attached

_EPILOG = """\
examples:
  lazyfs umount /mnt
  lazyfs umount --lazy /mnt     also while files in it are open: it disappears now, and ends with the last of them
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("umount", epilog=_EPILOG)
    parser.add_argument("dir", metavar="DIR", help="where the image is mounted")
    parser.add_argument("--lazy", action="store_true", help="also while it is in use")
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Unmount, drop what was written to an --rw mount, tell the daemon. Blocking. Raise LazyfsError."""
    from lazyfs.container import attached

    settings = common.settings(args)
    directory = os.path.realpath(args.dir)
    known = attached.recall(settings, directory)
    if known is None:
        raise MountPointInvalid(
            directory,
            "is no mount of lazyfs" if os.path.lexists(directory) else "does not exist",
            hint=f"searched in {settings.root}: lazyfs status lists its mounts, --root chooses another store",
        )
    _take_away(known, args.lazy)
    if known.state_dir:
        _remove_state(settings, known, out)
    attached.forget(settings, directory)
    release(settings, Path(known.dir) if known.kind == "solo" else None, known.mount)
    out.line(f"{directory} is unmounted")
    out.json({"dir": directory, "kind": known.kind, "mount": known.mount})
    return exit_codes.OK


def _take_away(known: Attached, lazy: bool) -> None:
    from lazyfs.container import mounts

    raw = os.fsencode(known.dir)
    top = mounts.top_at(raw)
    if top is None:
        return  # taken away behind our back: what is left of it is removed all the same
    if top.device != known.device:
        raise MountPointInvalid(
            known.dir, "has something else mounted over the image", hint=f"unmount that first: umount {known.dir}"
        )
    if os.geteuid() == 0:
        mounts.umount(raw, lazy=lazy)
        return
    try:
        mounts.umount_user(raw, lazy=lazy)
    except MountFailed:
        if mounts.top_at(raw) is not None:  # else the daemon was quicker
            raise


def _remove_state(settings: Settings, known: Attached, out: Output) -> None:
    from lazyfs.container import directory as directories

    state = Path(known.state_dir)
    if state.parent != settings.root / "rw":  # the record is a file; delete nothing elsewhere on its word
        out.warn(f"{state} does not lie in this store and stays")
        return
    directories.remove_tree(state)


def release(settings: Settings, solo: Path | None, mount: str) -> None:
    """Have the daemon let go of a mount; one that is gone, or does not know it, has nothing to let go. Blocking.

    One that is killed in the midst of it leaves the mount to the next, which is asked once more. Raise LazyfsError.
    """
    from lazyfs import control_client

    for _ in range(2):
        try:
            with control_client.open_daemon(settings, solo, start=False) as daemon:
                daemon.call("release", mount=mount)
        except DaemonUnreachable as error:
            if not error.hint:  # it went away; with one it hangs, and there is nobody else to ask
                continue
        except (DaemonFault, MountPointInvalid):
            pass
        return
