"""lazyfs run: start a container from an image at once and wait for its end."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import Output
from lazyfs.errors import ContainerFailed, DaemonFault, LazyfsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.cli.recording import Recording
    from lazyfs.config import Settings
    from lazyfs.container.directory import ContainerDir
    from lazyfs.container.options import RunOptions
    from lazyfs.control_client import Daemon

_QUIET = 1.0  # seconds of a start without a word
_EPILOG = """\
examples:
  lazyfs run docker://localhost:5000/debian:base cat /etc/os-release
  lazyfs run -it -v $PWD:/src -w /src python:3.12 bash
  lazyfs run --network none --read-only -u 1000:1000 oci:images:tool

The exit status is the container's: 128 + n when signal n ended it; 125 when lazyfs failed, 126 when the command can't
be executed, 127 when it isn't in the image. SIGTERM sends the image's stop signal, and SIGKILL after 10 s or at the
second SIGTERM; at the third Ctrl-C the container is killed too.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("run", epilog=_EPILOG, usage="lazyfs run [options] IMAGE [COMMAND [ARGUMENT…]]")
    add = parser.add_argument
    add("-t", "--tty", action="store_true", help="give the container a terminal")
    add("-i", "--interactive", action="store_true", help="hand our standard input on; otherwise it is empty")
    add("--rm", action="store_true", help="accepted for habit: a container is always removed at its end")
    add_container(parser)
    parser.set_defaults(run=run)


def add_container(parser: argparse.ArgumentParser) -> None:
    """Add what every command that starts a container takes: how, from where, IMAGE and its command."""
    add = parser.add_argument
    add("-e", "--env", metavar="K=V", action="append", default=[], help="set a variable; K alone: taken from ours")
    add("-w", "--workdir", metavar="DIR", default="", help="working directory, made when it is missing")
    add("-u", "--user", metavar="USER", default="", help="name or number, or USER:GROUP, as in the image's /etc/passwd")
    add("-v", "--volume", metavar="SRC:DST[:ro]", action="append", default=[], help="show SRC of this host at DST")
    add("--network", choices=("host", "none"), default="host", help="the host's network (default), or a loopback only")
    add("--read-only", action="store_true", help="the container can't write to its root file system")
    add("--entrypoint", metavar="PROGRAM", default=None, help="instead of the image's entrypoint and command")
    add("--name", metavar="NAME", default="", help="the container's name; otherwise 16 hex digits")
    add("--hostname", metavar="NAME", default="", help="the container's host name")
    add("--runtime", metavar="PROGRAM", default="runc", help="OCI runtime: runc (default), crun, or a path")
    common.add_platform(parser)
    common.add_pull(parser)
    common.add_driver(parser)
    common.add_registry(parser)
    common.add_image(parser)
    add("command_line", metavar="COMMAND", nargs=argparse.REMAINDER, help="instead of the image's command")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the container; return its exit status, or docker's 125, 126, 127. Blocking. Raise LazyfsError."""
    from lazyfs.container import runtime

    options = container_options(args)
    settings = common.settings(args)
    runtime_path = runtime.find(args.runtime)
    try:
        status = run_container(args, out, settings, options, runtime_path)
    except ContainerFailed as error:
        if error.status == exit_codes.RUN_FAILED:
            raise
        out.error(error.message)
        return error.status
    sweep_leftovers(settings)
    return status


def sweep_leftovers(settings: Settings) -> None:
    """Remove what dead commands left of their containers: after a run, because before the start it would cost time."""
    from lazyfs.container import directory

    if directory.any_left(settings):
        from lazyfs.container import sweep

        sweep.sweep(settings)


def run_container(
    args: argparse.Namespace,
    out: Output,
    settings: Settings,
    options: RunOptions,
    runtime_path: str,
    recording: Recording | None = None,
) -> int:
    """Mount the image, run the container and tidy up; return its exit status. Blocking. Raise LazyfsError.

    `args` are those of `add_container`. `recording`: the start is recorded, and the container stopped at its end.
    """
    preload = _preload()
    with contextlib.ExitStack() as stack:
        place, solo = None, None
        if os.geteuid() != 0:
            # The daemon mounts in the container's directory, so that goes last.
            place = _claim(args, out, settings, stack)
            solo = place.at("lower")
            solo.mkdir(mode=0o700)
        daemon, answer = stack.enter_context(_mounted(args, out, settings, solo, recording))
        path, document = answer.get("path"), answer.get("config")
        if not isinstance(path, str) or not isinstance(document, dict):
            raise DaemonFault("lazyfsd's answer to mount_image has no path or no config")
        preload.join()  # from the supervisor's fork on there must be one thread
        from lazyfs.container import launch

        place = place or _claim(args, out, settings, stack)
        with contextlib.suppress(LazyfsError):  # only `lazyfs status` would miss it
            daemon.call("attach", mount=answer.get("mount"), dir=str(place.path), kind="container")
        status = launch.run(settings, place, launch.Image(path, document), options, runtime_path, recording)
        if recording is not None:
            recording.finish(status)
        return status


def _claim(args: argparse.Namespace, out: Output, settings: Settings, stack: contextlib.ExitStack) -> ContainerDir:
    from lazyfs.container import directory

    place = directory.create(settings, args.name)
    stack.callback(_discard, settings, place, out)
    return place


def container_options(args: argparse.Namespace) -> RunOptions:
    """Return the options of a container, checked. Raise UsageError."""
    from lazyfs.container import options as checked

    if args.tty and args.interactive and not os.isatty(0):
        raise UsageError("standard input is no terminal", hint="leave -t away, or -i")
    if args.name:
        checked.check_name(args.name)
    return checked.RunOptions(
        command=tuple(args.command_line),
        entrypoint=args.entrypoint,
        env=tuple(args.env),
        workdir=args.workdir,
        user=args.user,
        volumes=tuple(checked.parse_volume(text) for text in args.volume),
        terminal=args.tty,
        interactive=args.interactive,
        network=args.network,
        read_only=args.read_only,
        hostname=checked.check_hostname(args.hostname) if args.hostname else "",
    )


def _preload() -> threading.Thread:
    """Import what the start needs while the daemon talks to the registry."""
    thread = threading.Thread(target=importlib.import_module, args=("lazyfs.container.launch",))
    thread.start()
    return thread


@contextlib.contextmanager
def _mounted(
    args: argparse.Namespace, out: Output, settings: Settings, solo: Path | None, recording: Recording | None
) -> Iterator[tuple[Daemon, dict[str, Any]]]:
    """Have the daemon mount the image for as long as this context lasts; yield the daemon and its answer."""
    from lazyfs import control_client

    with control_client.open_daemon(settings, solo) as daemon:
        recorded: dict[str, Any] = {}
        if recording is not None:
            recording.begin(daemon)
            recorded["trace"] = True
        answer = daemon.call(
            "mount_image",
            image=common.daemon_image(args),
            platform=args.platform,
            plain_http=args.plain_http,
            access=common.access(args, settings).to_json(),
            pull=common.pull(args, settings),
            driver=common.driver(args, settings),
            lease=True,
            entrypoint=args.entrypoint,
            command=args.command_line,
            on_event=_Events(out).say,
            **recorded,
        )
        if recording is not None:
            recording.mounted(answer)
        for text in answer.get("notes") or ():
            out.note(str(text))
        yield daemon, answer


class _Events:
    """Passes the daemon's remarks on once a start takes long enough to make somebody wonder."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._from = time.monotonic() + _QUIET

    def say(self, text: str) -> None:
        if time.monotonic() >= self._from:
            self._out.note(text)


def _discard(settings: Settings, place: ContainerDir, out: Output) -> None:
    from lazyfs.container.discard import discard

    try:
        discard(settings, place)
    except LazyfsError as error:
        out.warn(f"container {place.identity} is not removed entirely: {error}")
