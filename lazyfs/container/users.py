"""Who a container's process is: docker's USER and --user against the image's own /etc/passwd and /etc/group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lazyfs.container.rooted import read_in_root
from lazyfs.errors import ContainerFailed
from lazyfs.limits import MAX_PASSWD

_HINT = "use a number, or a name from it"
_MAX_ID = (1 << 31) - 1  # docker's bound, and the kernel's -1 stays out


@dataclass(frozen=True, slots=True)
class User:
    """A resolved user: numeric ids, the supplementary groups of its name, its home directory in the image."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root: str, spec: str) -> User:
    """Return the user that `spec` ("", NAME, UID, NAME:GROUP, UID:GID) means in the image below `root`.

    As with docker, the first line that fits by name or number is taken, and a number that the image doesn't know stands
    for itself with group 0. Blocking (reads two files of the image). Raise ContainerFailed when a name is not there.
    """
    passwd = read_in_root(root, b"/etc/passwd", MAX_PASSWD) or b""
    wants_groups = ":" in spec or passwd
    group = (read_in_root(root, b"/etc/group", MAX_PASSWD) or b"") if wants_groups else b""
    return choose(spec, passwd, group)


def choose(spec: str, passwd: bytes, group: bytes) -> User:
    """Return the user that `spec` means, given the two files' bytes. Raise ContainerFailed."""
    user_word, _, group_word = spec.partition(":")
    user_word = user_word or "0"
    uid, gid, home, name = _find_user(user_word, passwd)
    if group_word:
        return User(uid, _find_group(group_word, group), (), home)
    groups = sorted({number for _, number, members in _groups(group) if name and name in members} - {gid})
    return User(uid, gid, tuple(groups), home)


def _find_user(word: str, passwd: bytes) -> tuple[int, int, str, str]:
    for fields in _lines(passwd, 7):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None and (fields[0] == word or _number(word) == uid):
            return uid, gid, fields[5] or "/", fields[0]
    number = _number(word)
    if number is not None:
        return number, 0, "/root" if number == 0 else "/", ""
    if word == "root":  # an image without /etc/passwd still has a root
        return 0, 0, "/root", ""
    raise ContainerFailed(f"user {word[:100]!r} is not in the image's /etc/passwd", hint=_HINT)


def _find_group(word: str, group: bytes) -> int:
    for name, number, _ in _groups(group):
        if name == word:
            return number
    known = _number(word)
    if known is not None:
        return known
    if word == "root":
        return 0
    raise ContainerFailed(f"group {word[:100]!r} is not in the image's /etc/group", hint=_HINT)


def _groups(group: bytes) -> Iterator[tuple[str, int, list[str]]]:
    for fields in _lines(group, 4):
        number = _number(fields[2])
        if number is not None:
            yield fields[0], number, fields[3].split(",")


def _lines(raw: bytes, count: int) -> Iterator[list[str]]:
    for line in raw.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.strip().split(":")
        if len(fields) > 2 and not line.startswith("#"):
            yield fields[:count] + [""] * (count - len(fields))


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    value = int(text)
    return value if value <= _MAX_ID else None
