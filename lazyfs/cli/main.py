"""The command line's frame: finds the command, imports only its module, and turns errors into sentences and exit codes.

The time from `lazyfs run` to the first instruction of the container is the product, so nothing is imported here that
the typed command doesn't need: each command is a module of this package with

    add_parser(subparsers) -> None            which calls parser.set_defaults(run=run)
    run(args: Namespace, out: Output) -> int
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from lazyfs import __version__
from lazyfs.cli import exit_codes
from lazyfs.cli.output import Output
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.process import keep_no_core

COMMANDS: dict[str, str] = {
    "convert": "make an image startable at once: seekable layers with a table of contents",
    "inspect": "show what an image is made of, which layers can be lazy, and what finding out costs",
    "verify": "check every byte of an image against its digests, without mounting it",
    "mount": "mount an image on a directory",
    "umount": "take away such a mount",
    "run": "start a container from an image at once",
    "fetch": "have images whole on this node, so that they start without their registry",
    "wait": "wait until images are whole on this node",
    "pull": "pull an image into containerd, lazily with a snapshotter that can",
    "cache": "list, remove, prune, verify and unpin what the store holds",
    "record": "start a container once and keep what its start read as a trace",
    "optimize": "attach what starts of an image read to the image in its registry",
    "status": "show mounts, caches, requests and errors of the running daemon",
    "why": "say of each layer of an image whether it is lazy, and if not why",
    "trace": "draw what a recorded start read, and where it waited",
    "upgrade": "have the lazyfs that is installed now serve the mounts, and no reader notice",
    "install": "have systemd keep lazyfs on this node, and containerd use it",
    "uninstall": "take back what install did",
    "doctor": "check what this machine has and lacks",
}
_WITH_VALUE = ("--root", "--config")


class Terminated(KeyboardInterrupt):
    """SIGTERM, on KeyboardInterrupt's path so that no `except Exception` on the way swallows it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors and whose help keeps the examples' lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def entry() -> None:
    """Run the command line as this process: the console script. Never returns."""
    signal.signal(signal.SIGTERM, _on_term)
    keep_no_core()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. Blocking; raises nothing."""
    name = command_of(argv)
    out = Output(json="--json" in argv and name != "run")  # `run` has none of its own: it's the container's
    verbose = False
    try:
        args = _parse(name, argv)
        verbose = bool(args.verbose)
        out = Output(json=bool(getattr(args, "json", False)), quiet=args.quiet)
        if args.config is not None:
            _use_config(args.config)
        _set_up_log(name, args.verbose)
        code = int(args.run(args, out))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's --help and --version
        return _flushed(stop.code if isinstance(stop.code, int) else exit_codes.OK)
    except Terminated:
        return exit_codes.TERMINATED
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return exit_codes.BROKEN_PIPE
    except LazyfsError as error:
        return _fail(out, error, exit_codes.code_of(error, name), verbose)
    except Exception as error:
        return _fail(out, error, exit_codes.code_of(error, name), verbose)


def command_of(argv: Sequence[str]) -> str:
    """Return the first word of `argv` that is no global flag nor the value of one; "" when there is none."""
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in _WITH_VALUE:
            skip = True
        elif not word.startswith("-"):
            return word
    return ""


def build_parser(name: str = "") -> argparse.ArgumentParser:
    """Return the parser for command `name` alone, importing its module; "" gives the frame with the command list."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {command:<{width}}  {text}" for command, text in COMMANDS.items())
    parser = Parser(
        prog="lazyfs",
        usage="lazyfs [--root DIR] [--config FILE] [-v] [-q] COMMAND …",
        description="Start container images at once, straight from their registry; every byte verified.",
        epilog=f"commands:\n{table}\n\n`lazyfs COMMAND --help` shows a command's options and examples.\n"
        + exit_codes.summary(),
    )
    parser.add_argument("--version", action="version", version=f"lazyfs {__version__}")
    _add_globals(parser, first=True)
    if name:
        subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", prog="lazyfs")
        importlib.import_module(f"lazyfs.cli.{name}").add_parser(subparsers)
        sub = subparsers.choices[name]
        _add_globals(sub, first=False)
        sub.description = sub.description or COMMANDS[name]
        for inner in _inner_parsers(sub):
            _add_globals(inner, first=False)
        sub.epilog = f"{sub.epilog.rstrip()}\n\n{exit_codes.summary()}" if sub.epilog else exit_codes.summary()
    return parser


def _inner_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a command's own commands, as `lazyfs cache ls`."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [inner for table in choices for inner in table.values()]


def _add_globals(parser: argparse.ArgumentParser, *, first: bool) -> None:
    """Add the global flags. Behind the command they don't overwrite what stood before it, and yield to its own -v."""
    group = parser.add_argument_group("global options")

    def add(names: tuple[str, ...], default: Any, **how: Any) -> None:
        try:
            group.add_argument(*names, default=default if first else argparse.SUPPRESS, **how)
        except argparse.ArgumentError:
            if len(names) > 1:
                add(names[1:], default, **how)

    add(("--root",), None, metavar="DIR", help="the store's directory instead of the configured one")
    add(("--config",), None, metavar="FILE", help="config file instead of the usual one")
    add(("-v", "--verbose"), 0, action="count", help="log more (twice: everything), show tracebacks")
    add(("-q", "--quiet"), False, action="store_true", help="no remarks and no progress")


def _parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    if name and name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"no command {name!r}", hint=f"did you mean {near[0]}?" if near else "see lazyfs --help")
    parser = build_parser(name)
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}", hint=f"see {' '.join(('lazyfs', name)).rstrip()} --help")
    if not name:
        raise UsageError("no command given", hint="see lazyfs --help")
    return args


def _use_config(path: str) -> None:
    """Make `path` the config file of this process and of a daemon that it starts."""
    if not os.path.isfile(path):
        raise UsageError(f"config file {path} does not exist")
    os.environ["LAZYFS_CONFIG"] = os.path.abspath(path)


def _set_up_log(name: str, verbosity: int) -> None:
    # `run` is measured in milliseconds, and what it has to say without -v are remarks and errors, not log lines.
    if verbosity or name != "run":
        from lazyfs import log

        log.set_up(verbosity)


def _fail(out: Output, error: Exception, code: int, verbose: bool) -> int:
    known = isinstance(error, LazyfsError)
    message = error.message if isinstance(error, LazyfsError) else f"this is a bug in lazyfs: {type(error).__name__}"
    hint = error.hint if isinstance(error, LazyfsError) else ""
    if not known:
        detail = " ".join(str(error).split())[:300]
        message += f": {detail}" if detail else ""
        hint = "" if verbose else "run it again with -v for the traceback"
    try:
        if verbose:
            import traceback

            out.error("".join(traceback.format_exception(error)).rstrip())
        out.error(message)
        if hint:
            out.error(f"hint: {hint}")
        out.json({"error": {"class": type(error).__name__, "message": message, "hint": hint, "exit_code": code}})
    except (OSError, LazyfsError):
        _drop_stdout()  # nobody is left to tell; the exit code still says it
    _flushed(code)
    return code


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
        return exit_codes.BROKEN_PIPE
    return code


def _drop_stdout() -> None:
    """Point stdout at /dev/null, so that the interpreter's flush at exit doesn't complain again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # ValueError: stdout is a closed or captured stream without a descriptor
        return


def _on_term(number: int, frame: FrameType | None) -> None:
    raise Terminated
