"""What the user asked `lazyfs run` for and what the image says about itself, as checked values."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lazyfs.errors import DocumentInvalid, UsageError
from lazyfs.limits import MAX_CONFIG_WORDS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory or file of the host that shows in the container. Both paths are absolute."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `lazyfs run`, checked. None and "" mean: as the image says."""

    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    env: tuple[str, ...] = ()  # "K=V", or "K" taken from our environment
    workdir: str = ""
    user: str = ""
    volumes: tuple[Volume, ...] = ()
    terminal: bool = False
    interactive: bool = False
    network: str = "host"
    read_only: bool = False
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class ImageDefaults:
    """The "config" part of an image config (OCI image-spec, config.md): what a container of it starts as."""

    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    env: tuple[str, ...]
    workdir: str
    user: str
    stop_signal: int


def parse_image_defaults(document: Mapping[str, Any]) -> ImageDefaults:
    """Take the defaults out of a whole image config. Raise DocumentInvalid for wrong types and NUL bytes."""
    config = document.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise DocumentInvalid("image config: config is no object")

    def words(key: str) -> tuple[str, ...]:
        value = config.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > MAX_CONFIG_WORDS or not all(map(_is_word, value)):
            raise DocumentInvalid(f"image config: {key} is no list of strings")
        return tuple(value)

    def word(key: str) -> str:
        value = config.get(key)
        if value is not None and not _is_word(value):
            raise DocumentInvalid(f"image config: {key} is no string")
        return value or ""

    env = words("Env")
    if any("=" not in variable[1:] for variable in env):
        raise DocumentInvalid("image config: Env has a variable without a value")
    return ImageDefaults(
        words("Entrypoint"), words("Cmd"), env, word("WorkingDir"), word("User"), parse_signal(word("StopSignal"))
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def parse_signal(text: str) -> int:
    """Return the number of "SIGTERM", "TERM", "15" or "SIGRTMIN+3"; "" is SIGTERM. Raise DocumentInvalid."""
    name = text.upper().removeprefix("SIG")
    base, plus, offset = name.partition("+")
    number = 0
    if not text:
        number = signal.SIGTERM
    elif name.isascii() and name.isdigit() and len(name) < 4:
        number = int(name)
    elif "SIG" + base in signal.Signals.__members__ and (not plus or (base == "RTMIN" and offset.isdigit())):
        number = signal.Signals["SIG" + base] + int(offset[:3] or 0)
    if not 1 <= number <= signal.SIGRTMAX:
        raise DocumentInvalid(f"image config: StopSignal {text[:40]!r} is no signal")
    return number


def parse_volume(text: str) -> Volume:
    """Parse SRC:DST[:ro|rw]. Blocking (looks whether SRC exists). Raise UsageError."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise UsageError(f"volume {text!r} is malformed", hint="write SRC:DST, SRC:DST:ro or SRC:DST:rw")
    source, target = parts[0], parts[1]
    if not target.startswith("/") or os.path.normpath(target) in ("/", "//"):
        raise UsageError(f"volume {text!r}: DST must be an absolute path below /")
    if not source or not os.path.exists(source):
        raise UsageError(f"volume {text!r}: {source!r} does not exist")
    return Volume(os.path.realpath(source), os.path.normpath(target), parts[2:] == ["ro"])


def check_name(name: str) -> str:
    """Return a container's name, or raise UsageError: it becomes a directory's name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"container name {name[:80]!r} is malformed", hint="letters, digits, _ . - and at most 64")
    return name


def check_hostname(name: str) -> str:
    """Return a host name of at most 64 characters, or raise UsageError."""
    if not _HOSTNAME.fullmatch(name):
        raise UsageError(f"host name {name[:80]!r} is malformed", hint="letters, digits, . - and at most 64")
    return name


def command_line(options: RunOptions, image: ImageDefaults) -> list[str]:
    """Return the argv of the container: words on the command line replace Cmd, --entrypoint replaces both.

    Raise UsageError when nothing is left to run.
    """
    entrypoint = list(image.entrypoint)
    command = list(options.command or image.command)
    if options.entrypoint is not None:
        entrypoint = [options.entrypoint] if options.entrypoint else []
        command = list(options.command)
    argv = entrypoint + command
    if not argv:
        raise UsageError("the image names no command to run", hint="add one: lazyfs run IMAGE COMMAND")
    return argv


def environment(options: RunOptions, image: ImageDefaults, defaults: Mapping[str, str]) -> list[str]:
    """Return the container's environment: `defaults`, over them the image's, over them the user's.

    "K" without a value is taken from our own environment; when it isn't set there, it isn't in the container either.
    Raise UsageError for a variable without a name.
    """
    values = dict(defaults)
    for variable in image.env:
        name, _, value = variable.partition("=")
        values[name] = value
    for variable in options.env:
        name, equals, value = variable.partition("=")
        if not name or "\0" in variable:
            raise UsageError(f"environment variable {variable[:80]!r} is malformed", hint="write NAME=VALUE or NAME")
        if equals:
            values[name] = value
        elif name in os.environ:
            values[name] = os.environ[name]
        else:
            values.pop(name, None)
    return [f"{name}={value}" for name, value in values.items()]
