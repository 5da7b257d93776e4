"""The logins that kubelet sends with its pulls: kept in memory, and told to the daemon, which fetches the layers.

What was sent for one repository is used for that repository. A login that is new is tried beside the one that worked
before: when its pull fails, the older one is what counts again.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lazyfs import reference as references
from lazyfs.errors import LazyfsError, ReferenceInvalid
from lazyfs.limits import LOGIN_TOLD_TIMEOUT, MAX_IMAGE_NAME, MAX_LOGINS_DOCUMENT, MAX_SECRET, MAX_SEEN_LOGINS

log = logging.getLogger(__name__)

RETRY = 5.0  # seconds until a daemon that could not be told is told again
_TOKEN = re.compile(r"[\x21-\x7e]+")
# All names of Docker Hub. Its references say the first one.
_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")


class Daemon(Protocol):
    """What is needed of the daemon."""

    def set_logins(self, logins: list[dict[str, str]]) -> None: ...


@dataclass(frozen=True, slots=True, repr=False)
class Login:
    """A user with a password, or one of the two kinds of tokens; the others are "". Has no repr: never logged."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return "Login(…)"


@dataclass(slots=True)
class _Kept:
    """What is known of one repository: its newest login, and the one before while that one has not worked yet."""

    newest: Login = field(repr=False)
    before: Login | None = field(default=None, repr=False)
    size: int = 0  # bytes in the document


@dataclass(frozen=True, slots=True)
class Noted:
    """That a pull under way brought a login; for `settle`."""

    place: tuple[str, str]
    login: Login = field(repr=False)


class NodeLogins:
    """Logins by registry host and repository. Thread-safe. Nothing in here raises for what kubelet sends.

    `greet` makes it known to a daemon; from then on that one is told of every change, by a thread of its own.
    """

    def __init__(self, patience: float = LOGIN_TOLD_TIMEOUT) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._size = 0
        self._version = 0  # of what is kept
        self._told = 0  # the version that the daemon has
        self._send: Callable[[list[dict[str, str]]], None] | None = None
        self._sending = threading.Lock()  # an older document must not overtake a newer one
        self._failed = False  # the last time: it is tried again
        self._teller: threading.Thread | None = None

    def __len__(self) -> int:
        with self._changed:
            return len(self._kept)

    # -- the pulls

    def note(self, image: str, **texts: str) -> Noted | None:
        """Keep the login of a pull that begins (fields of CRI's AuthConfig), and have the daemon told.

        Blocks until it was, LOGIN_TOLD_TIMEOUT at most. None, and nothing changed: there is no login in it that holds
        for the image's registry. A pull without a login takes nothing away.
        """
        place = _place(image)
        login = decode(**texts)
        if place is None or login is None or not _is_for(texts.get("server_address", ""), place[0]):
            return None
        with self._changed:
            kept = self._kept.get(place)
            if kept is None or kept.newest != login:
                self._keep(place, login, kept.before or kept.newest if kept is not None else None)
                log.info("a login was given: host=%s repository=%s", *place)
            if place in self._kept:
                self._kept.move_to_end(place)
            version = self._version
            self._wake()
            self._changed.wait_for(lambda: self._told >= version, self._patience)  # or until there is a daemon
        return Noted(place, login)

    def settle(self, noted: Noted, *, worked: bool | None) -> None:
        """Tell how the pull ended that `noted` is from; None: that says nothing of its login. Doesn't wait."""
        with self._changed:
            kept = self._kept.get(noted.place)
            if kept is None or worked is None:
                return
            if worked and kept.newest != noted.login:
                self._keep(noted.place, kept.newest, noted.login)  # another pull is trying another one
            elif kept.before is not None and kept.newest == noted.login:
                self._keep(noted.place, noted.login if worked else kept.before, None)
            else:
                return
            self._wake()

    def _keep(self, place: tuple[str, str], newest: Login, before: Login | None) -> None:
        old = self._kept.pop(place, None)
        kept = _Kept(newest, None if before == newest else before)
        kept.size = sum(len(json.dumps(entry)) + 2 for entry in _entries(place, kept))
        self._kept[place] = kept
        self._size += kept.size - (old.size if old is not None else 0)
        while self._kept and (len(self._kept) > MAX_SEEN_LOGINS or self._size > MAX_LOGINS_DOCUMENT):
            _, gone = self._kept.popitem(last=False)
            self._size -= gone.size
        self._version += 1

    # -- the daemon

    def document(self) -> list[dict[str, str]]:
        """Return all logins as the daemon's `set_logins` takes them. It holds secrets: never log or store it."""
        with self._changed:
            return [entry for place, kept in self._kept.items() for entry in _entries(place, kept)]

    def greet(self, daemon: Daemon) -> None:
        """Tell a daemon that has just been met all logins, and from now on their changes. Blocking. Raises nothing."""
        with self._changed:
            self._send = daemon.set_logins
            self._told = -1
            self._wake()
        self._tell()

    def _wake(self) -> None:
        if self._teller is None and self._send is not None:
            self._teller = threading.Thread(target=self._tell_changes, name="node-logins", daemon=True)
            self._teller.start()
        self._changed.notify_all()

    def _tell_changes(self) -> None:
        while True:
            with self._changed:
                ripe = self._changed.wait_for(
                    lambda: self._send is not None and self._told < self._version, RETRY if self._failed else None
                )
                ripe = ripe or self._failed
            if ripe:
                self._tell()

    def _tell(self) -> None:
        """Send everything. What fails is sent again after RETRY, with the next change, or to the next daemon."""
        with self._sending:
            with self._changed:
                send, version = self._send, self._version
            assert send is not None
            failed = True
            try:
                send(self.document())
                failed = False
            except LazyfsError as error:
                log.warning("lazyfsd could not be told the node's logins: %s", error)
            finally:
                with self._changed:
                    self._told, self._failed = version, failed
                    self._changed.notify_all()


def decode(
    username: str = "",
    password: str = "",
    auth: str = "",
    server_address: str = "",
    identity_token: str = "",
    registry_token: str = "",
) -> Login | None:
    """Return the login in the fields of an AuthConfig, chosen as containerd does. None: there is none, or a bad one."""
    if max(map(len, (username, password, auth, identity_token, registry_token))) > MAX_SECRET:
        log.warning("a login of absurd length was passed over")
        return None
    if username:
        return Login(username, password)
    if identity_token:
        return Login(identity_token=identity_token)
    if auth:
        try:
            username, colon, password = base64.b64decode("".join(auth.split()), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            colon = ""
        if not colon or not username:
            log.warning("a login was passed over: `auth` is not base64 of user:password")
            return None
        return Login(username, password.strip("\0"))
    if registry_token and _TOKEN.fullmatch(registry_token):
        return Login(registry_token=registry_token)
    return None


def _place(image: str) -> tuple[str, str] | None:
    """The host and the repository that an image is pulled from, None where it is no name of one."""
    if len(image) > MAX_IMAGE_NAME:
        return None
    try:
        found = references.parse(image.removeprefix("docker://"))
    except ReferenceInvalid:
        return None
    return (found.host, found.repository) if found.transport == "docker" else None


def _is_for(server: str, host: str) -> bool:
    """Tell whether a login that names a server ("" for none) is for a host. It is sent nowhere else."""
    named = re.sub(r"^(?:[a-z]+:)?//", "", server.strip(), flags=re.IGNORECASE).partition("/")[0].lower()
    return not server or named == host.lower() or (named in _HUB and host in _HUB)


def _entries(place: tuple[str, str], kept: _Kept) -> list[dict[str, str]]:
    logins = [kept.newest] if kept.before is None else [kept.newest, kept.before]
    return [
        {
            "host": place[0],
            "repository": place[1],
            "username": login.username,
            "password": login.password,
            "identity_token": login.identity_token,
            "registry_token": login.registry_token,
        }
        for login in logins
    ]
